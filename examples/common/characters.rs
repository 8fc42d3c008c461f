//! The character model of the examples `chars` and `web`: its text, its layers, its batches, and how it writes.

use gatefold::data::{PAD, TokenWindow, UNK, Vocabulary};
use gatefold::nn::{EmbeddingConfig, LinearConfig, LstmConfig, Precision, Sequential};
use gatefold::{Batch, Device, Ids, Rng};

/// What is learnt unless another text is given: this crate's own sources.
pub const SOURCES: &[&str] = &[
    include_str!("../../src/backend/adapter.rs"),
    include_str!("../../src/backend/gpu.rs"),
    include_str!("../../src/nn/recurrent/mod.rs"),
    include_str!("../../src/nn/linear.rs"),
    include_str!("../../src/nn/embedding.rs"),
    include_str!("../../src/nn/sequential.rs"),
    include_str!("../../src/nn/mod.rs"),
    include_str!("../../src/data/padding.rs"),
    include_str!("../../src/data/series.rs"),
    include_str!("../../src/data/batches.rs"),
    include_str!("../../src/kernels/sweep_step.rs"),
    include_str!("../../src/kernels/gemm.rs"),
    include_str!("../../src/kernels/gather.rs"),
    include_str!("../../src/kernels/optimizer.rs"),
    include_str!("../../src/checkpoint.rs"),
    include_str!("../../src/device.rs"),
    include_str!("../../src/error.rs"),
    include_str!("../../src/loss.rs"),
    include_str!("../../src/rng.rs"),
    include_str!("../../src/tensor.rs"),
    include_str!("../../src/optim.rs"),
    include_str!("../../src/trainer.rs"),
];
const EMBEDDING: usize = 64;
/// Streams read side by side.
pub const ROWS: usize = 16;
/// Characters of each stream in one step of training: how far gradients flow back.
pub const WINDOW: usize = 64;
/// At the start of training.
pub const LEARNING_RATE: f64 = 4e-3;

/// Embedding, an LSTM of `hidden` units, and a score for each token of the vocabulary.
pub fn build(
    vocabulary: &Vocabulary,
    hidden: usize,
    precision: Precision,
    device: &Device,
    rng: &mut Rng,
) -> gatefold::Result<Sequential> {
    Ok(Sequential::new()
        .push(EmbeddingConfig::new(vocabulary.len(), EMBEDDING).init(device, rng)?)
        .push(LstmConfig::new(EMBEDDING, hidden).forget_bias(1.0).precision(precision).init(device, rng)?)
        .push(LinearConfig::new(hidden, vocabulary.len()).precision(precision).init(device, rng)?))
}

/// A window of the text on the device.
pub fn batch(device: &Device, window: &TokenWindow) -> gatefold::Result<Batch> {
    let shape = [window.steps, window.rows];
    Ok(Batch::new(Ids::from_slice(device, &window.inputs, shape)?, Ids::from_slice(device, &window.targets, shape)?))
}

/// A character from softmax(logits / temperature), never padding or "unknown".
pub fn draw(logits: &[f32], temperature: f32, rng: &mut Rng) -> u32 {
    let largest = logits.iter().copied().fold(f32::MIN, f32::max);
    let real = |id: usize| id != PAD as usize && id != UNK as usize;
    let weight = |(id, logit): (usize, &f32)| if real(id) { ((logit - largest) / temperature).exp() } else { 0.0 };
    let weights: Vec<f32> = logits.iter().enumerate().map(weight).collect();
    let mut left = rng.uniform(0.0, weights.iter().sum());
    // Rounding may leave a rest past the end: the last character takes it.
    let reached = |weight: &f32| {
        left -= weight;
        left < 0.0
    };
    weights.iter().position(reached).unwrap_or(weights.len() - 1) as u32
}
