//! A language model of characters: trains an LSTM on any text, compares it with counting, and writes text of its own.
//!
//! ```sh
//! cargo run --release --example chars                   # on this crate's own sources, about a minute on a CPU
//! cargo run --release --example chars -- novel.txt      # on any UTF-8 text
//! cargo run --release --example chars -- --device vulkan:llvmpipe --steps 40    # software adapters are slow: few steps
//! cargo run --release --example chars -- --sample out/chars.safetensors --temperature 0.7 --prompt "impl "
//! ```
//!
//! Truncated back-propagation through time: each step's final state is the next step's initial one, its tape is not kept.

#[path = "common/characters.rs"]
mod characters;
mod common;

use std::f64::consts::{LN_2, PI};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gatefold::checkpoint::{self, Metadata};
use gatefold::data::{TokenStreams, Vocabulary};
use gatefold::nn::{Module, Precision};
use gatefold::optim::{AdamW, LossScale};
use gatefold::{CrossEntropy, Device, Ids, Rng, Tensor, Trainer};

use characters::{LEARNING_RATE, ROWS, SOURCES, WINDOW, batch, build, draw};

const HIDDEN: usize = 256;
/// The name of the vocabulary among a checkpoint's texts.
const VOCABULARY: &str = "vocabulary";

/// Trains a character language model, or writes text with one
#[derive(Parser)]
struct Args {
    /// The text to learn; by default this crate's own sources
    file: Option<PathBuf>,
    /// Train nothing: write text with this checkpoint
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "file")]
    sample: Option<PathBuf>,
    /// Steps of training, each of 16 x 64 characters
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Of the initial weights and of the written text
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Products in half precision, in training with a scaled loss
    #[arg(long)]
    half: bool,
    /// Such as `cpu` or `vulkan:llvmpipe`; by default the best GPU, else the CPU
    #[arg(long)]
    device: Option<String>,
    /// Where the checkpoint goes
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// Characters to write
    #[arg(long, default_value_t = 400)]
    length: usize,
    /// Below 1 the likely characters become likelier, above 1 rarer ones do
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// What the written text continues
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Fail when the held-out bits per character are above this
    #[arg(long)]
    require: Option<f64>,
}

impl Args {
    fn precision(&self) -> Precision {
        if self.half { Precision::Half } else { Precision::Single }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.temperature > 0.0 && args.temperature.is_finite(), "--temperature must be a number above 0");
    ensure!(!args.prompt.is_empty(), "--prompt must hold at least one character");
    let device = common::open_device(args.device.as_deref())?;
    match &args.sample {
        Some(checkpoint) => write_text(checkpoint, &device, &args),
        None => train(&device, &args),
    }
}

fn train(device: &Device, args: &Args) -> Result<()> {
    let (name, text) = match &args.file {
        Some(file) => {
            (file.display().to_string(), std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?)
        }
        None => ("this crate's sources".into(), SOURCES.concat()),
    };
    let count = text.chars().count();
    ensure!(count >= 1000, "{name}: {count} characters are too few to learn from, give at least 1000");
    let cut = text.char_indices().nth(count - count / 10).map_or(text.len(), |(at, _)| at);
    // The vocabulary is part of the model: it must not see the held-out text either.
    let vocabulary = Vocabulary::chars(&text[..cut]);
    let (train, held_out) = (vocabulary.encode(&text[..cut]), vocabulary.encode(&text[cut..]));
    println!(
        "Text: {name}, {count} characters, {} different ones; the last {} are held out",
        vocabulary.len() - 2,
        held_out.len()
    );

    let mut rng = Rng::seed(args.seed);
    let model = build(&vocabulary, HIDDEN, args.precision(), device, &mut rng)?;
    let mut trainer = Trainer::new(model, CrossEntropy::new(), AdamW::new(LEARNING_RATE))?.clip_grad_norm(1.0);
    if args.half {
        trainer = trainer.loss_scaling(LossScale::dynamic());
    }
    let (streams, held_out) = (TokenStreams::new(&train, ROWS, WINDOW)?, TokenStreams::new(&held_out, ROWS, WINDOW)?);
    let bar = common::progress_bar(u64::from(args.steps) * (ROWS * WINDOW) as u64, "characters")?;
    let (start, mut recent) = (Instant::now(), Vec::new());
    let (mut windows, mut state) = (streams.windows(), None);
    for step in 1..=args.steps {
        let window = match windows.next() {
            Some(window) => window,
            None => {
                // The text begins again: with it the memory of what came before.
                (windows, state) = (streams.windows(), None);
                windows.next().context("a text of no windows")?
            }
        };
        let done = f64::from(step - 1) / f64::from(args.steps);
        trainer.set_learning_rate(LEARNING_RATE * 0.5 * (1.0 + (PI * done).cos()));
        let outcome = trainer.step(&batch(device, &window)?.state(state))?;
        state = Some(outcome.state);
        recent.push(outcome.loss);
        bar.inc((ROWS * WINDOW) as u64);
        // Reading a loss waits for the device: now and then is enough.
        if step % 20 == 0 || step == args.steps {
            let count = recent.len() as f64;
            let sum = recent.drain(..).map(|loss: Tensor| loss.item()).sum::<gatefold::Result<f32>>()?;
            bar.set_message(format!("{:.3} bits/character", f64::from(sum) / LN_2 / count));
        }
        if step % (args.steps.div_ceil(5)) == 0 && step < args.steps {
            let bits = bits_per_character(&trainer, device, &held_out)?;
            bar.suspend(|| println!("step {step}: held out {bits:.3} bits/character"));
        }
    }
    bar.finish();
    println!("Trained for {} steps in {:.1} s", args.steps, start.elapsed().as_secs_f32());

    let bits = bits_per_character(&trainer, device, &held_out)?;
    let [unigram, bigram] = counting(&train, &held_out, vocabulary.len());
    println!("Bits per character of the held-out text:");
    println!("  the LSTM {bits:.3}\n  bigrams  {bigram:.3}\n  unigrams {unigram:.3}");

    std::fs::create_dir_all(&args.out).with_context(|| format!("creating the folder {}", args.out.display()))?;
    let checkpoint = args.out.join("chars.safetensors");
    let metadata = Metadata::from([(VOCABULARY.into(), vocabulary.to_json())]);
    trainer.model().save_with(&checkpoint, &metadata)?;
    println!("Checkpoint: {0} (more text: --sample {0})", checkpoint.display());
    write_text(&checkpoint, device, args)?;
    if let Some(limit) = args.require {
        ensure!(bits <= limit, "the held-out text took {bits:.3} bits per character, required at most {limit}");
    }
    Ok(())
}

/// The mean over all targets of `-log2 p(target)`, the state being carried from window to window.
fn bits_per_character(trainer: &Trainer<CrossEntropy>, device: &Device, streams: &TokenStreams<'_>) -> Result<f64> {
    let (mut sum, mut count, mut state) = (0.0, 0, None);
    for window in streams.windows() {
        let outcome = trainer.evaluate(&batch(device, &window)?.state(state))?;
        sum += f64::from(outcome.item()?) * window.targets.len() as f64;
        count += window.targets.len();
        state = Some(outcome.state);
    }
    Ok(sum / LN_2 / count as f64)
}

/// What counting gives on the same targets: unigrams and bigrams of the training text, each count plus one.
fn counting(train: &[u32], held_out: &TokenStreams<'_>, size: usize) -> [f64; 2] {
    let (mut single, mut pairs) = (vec![0.0; size], vec![0.0; size * size]);
    let pair = |first: u32, second: u32| first as usize * size + second as usize;
    train.iter().for_each(|id| single[*id as usize] += 1.0);
    train.windows(2).for_each(|ids| pairs[pair(ids[0], ids[1])] += 1.0);
    let (mut bits, mut count) = ([0.0, 0.0], 0.0);
    for window in held_out.windows() {
        for (&first, &second) in window.inputs.iter().zip(&window.targets) {
            let followed: f64 = pairs[pair(first, 0)..][..size].iter().sum();
            bits[0] -= f64::log2((single[second as usize] + 1.0) / (train.len() + size) as f64);
            bits[1] -= f64::log2((pairs[pair(first, second)] + 1.0) / (followed + size as f64));
            count += 1.0;
        }
    }
    bits.map(|bits| bits / count)
}

/// Reads a checkpoint and writes text, character by character: each step takes the last character and the state so far.
fn write_text(checkpoint: &Path, device: &Device, args: &Args) -> Result<()> {
    let metadata = checkpoint::read_metadata(checkpoint)?;
    let json = metadata.get(VOCABULARY).with_context(|| format!("{}: there is no vocabulary in it", checkpoint.display()))?;
    let vocabulary = Vocabulary::from_json(json).with_context(|| checkpoint.display().to_string())?;
    let mut rng = Rng::seed(args.seed);
    let model = build(&vocabulary, HIDDEN, args.precision(), device, &mut rng)?;
    model.load(checkpoint)?;

    let mut out = std::io::stdout().lock();
    write!(out, "--- temperature {} ---\n{}", args.temperature, args.prompt)?;
    let (mut ids, mut state) = (vocabulary.encode(&args.prompt), None);
    for _ in 0..args.length {
        let (logits, next) = model.forward(Ids::from_slice(device, &ids, [ids.len(), 1])?, state.as_ref())?;
        let last = &logits.to_vec()?[(ids.len() - 1) * vocabulary.len()..];
        ids = vec![draw(last, args.temperature, &mut rng)];
        state = Some(next);
        write!(out, "{}", vocabulary.decode(&ids)?)?;
        out.flush()?;
    }
    writeln!(out, "\n---")?;
    Ok(())
}
