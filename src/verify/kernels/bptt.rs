//! Back-propagation in segments: the bits of the whole sequence at once, in the memory that was predicted.

use super::harness::{Cases, is_nan, normal, overridden, ragged};
use crate::error::Result;
use crate::kernels::choice::KernelOverride;
use crate::kernels::gemm::ProductKernel;
use crate::kernels::sweep::LayerOrder;
use crate::nn::{Cell, CellState, GruConfig, Input, LstmConfig, Module, Precision, RecurrentConfig, Reset, RnnConfig};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Lengths, Tensor};
use crate::verify::{Comparison, Report};

const INPUT: usize = 8;
const HIDDEN: usize = 19;

pub(super) fn bptt(cases: &mut Cases<'_>) -> Result<()> {
    let lstm = || LstmConfig::new(INPUT, HIDDEN);
    check(cases, "lstm", lstm())?;
    // For kernels that load vectors, and more units than a resident sweep has.
    check(cases, "lstm_wide", LstmConfig::new(INPUT, 132))?;
    // A row by itself has kernels of its own, and blocks of a thousand steps.
    check_sizes(cases, "lstm_row", LstmConfig::new(INPUT, 132), KernelOverride::default(), [3100, 1])?;
    let wavefront = KernelOverride::default().layers(LayerOrder::Wavefront);
    check_by(cases, "lstm_wavefront", lstm().layers(2).gradient_clip(0.05), wavefront)?;
    let added = GruConfig::new(INPUT, INPUT).layers(2).residual(true);
    check_by(cases, "gru_wavefront_added", added, wavefront)?;
    // A last segment that is shorter than a block.
    check_sizes(cases, "lstm_wavefront_short", LstmConfig::new(INPUT, 128).layers(2), wavefront, [266, 17])?;
    check_by(cases, "gru_wavefront", GruConfig::new(INPUT, 40).layers(3).dropout(0.3).residual(true), wavefront)?;
    check(cases, "lstm_masks", lstm().layers(2).dropout(0.3).zoneout(0.2, 0.1).weight_dropout(0.3))?;
    check(cases, "lstm_sums", lstm().layers(2).peepholes(true).gradient_clip(0.05))?;
    check(cases, "lstm_projection", lstm().layers(2).projection(INPUT).residual(true))?;
    check(cases, "lstm_learned_state", lstm().learn_initial_state(true))?;
    check(cases, "lstm_layer_norm", lstm().layers(2).layer_norm(true).projection(INPUT))?;
    check(cases, "gru_layer_norm", GruConfig::new(INPUT, HIDDEN).layer_norm(true).gradient_clip(0.05))?;
    check(cases, "lstm_recurrent_dropout", lstm().recurrent_dropout(0.3))?;
    check(cases, "gru_reset_before", GruConfig::new(INPUT, HIDDEN).reset(Reset::BeforeProduct).gradient_clip(0.05))?;
    check(cases, "gru", GruConfig::new(INPUT, HIDDEN).layers(2))?;
    check(cases, "lstm_recurrent_dropout", lstm().layers(2).projection(7).recurrent_dropout(0.3))?;
    check(cases, "rnn", RnnConfig::new(INPUT, HIDDEN))?;
    check(cases, "rnn_jordan", RnnConfig::new(INPUT, HIDDEN).jordan(4))?;
    check(cases, "lstm_half", lstm().precision(Precision::Half))?;
    check(cases, "lstm_projection_half", lstm().layers(2).projection(7).precision(Precision::Half))?;
    check(cases, "gru_half", GruConfig::new(INPUT, HIDDEN).layers(2).precision(Precision::Half))
}

/// With products in parts of k, which take memory of their own.
pub(super) fn bptt_parts(cases: &mut Cases<'_>) -> Result<()> {
    let by = |kernel| KernelOverride::default().product(kernel);
    let half = LstmConfig::new(INPUT, 132).precision(Precision::Half);
    check_by(cases, "lstm_parts", LstmConfig::new(INPUT, 132), by(ProductKernel::Tiled64Parts))?;
    check_by(cases, "lstm_parts_half", half, by(ProductKernel::HalfTiled64Parts))
}

fn check<C: Cell>(cases: &mut Cases<'_>, name: &str, config: RecurrentConfig<C>) -> Result<()> {
    check_by(cases, name, config, KernelOverride::default())
}

fn check_by<C: Cell>(cases: &mut Cases<'_>, name: &str, config: RecurrentConfig<C>, kernels: KernelOverride) -> Result<()> {
    check_sizes(cases, name, config, kernels, [250, 17])
}

fn check_sizes<C: Cell>(
    cases: &mut Cases<'_>,
    name: &str,
    config: RecurrentConfig<C>,
    kernels: KernelOverride,
    [steps, rows]: [usize; 2],
) -> Result<()> {
    // A device of its own: whatever else runs at the same time is not in its count.
    let device = &overridden(cases.device, kernels)?;
    for (kind, is_ragged) in [("", false), ("_ragged", true)] {
        let mut rng = Rng::seed(8);
        let layer = config.clone().init(device, &mut rng)?;
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, rows));
        let lengths = lengths.map(|lengths| Lengths::from_slice(device, &lengths)).transpose()?;
        let x = Tensor::from_slice(device, &normal(&mut rng, steps * rows * INPUT), [steps, rows, INPUT])?;
        let width = layer.output();
        let dy = normal(&mut rng, steps * rows * width);
        let whole_dy = Tensor::from_slice(device, &dy, [steps, rows, width])?;
        let input = || Input::new().lengths(lengths.as_ref()).key(MaskKey::new(1, 2));

        let mut words = Vec::new();
        let mut read = |tensor: &Tensor| -> Result<()> {
            words.extend(tensor.read_back::<u32>()?);
            Ok(())
        };
        layer.zero_grad()?;
        let (y, state, tape) = layer.forward_train(&x, input())?;
        let (dx, dstate) = layer.backward(tape, &whole_dy, None)?;
        let y = y.read_back::<u32>()?;
        state.tensors().into_iter().chain(dstate.tensors()).chain([&dx]).try_for_each(&mut read)?;
        layer.params().into_iter().try_for_each(|(_, param)| read(param.grad()))?;
        let expected = std::mem::take(&mut words);
        let clipped = layer.clipped_gradients()?;
        drop((dx, state, dstate));

        // The same layer without copies of its weights, which count.
        let layer = config.clone().init(device, &mut Rng::seed(8))?;
        let bptt = |bytes| layer.bptt_memory(bytes).needs_dx(true);
        let one = bptt(u64::MAX).plan(steps, rows)?;
        let plan = bptt(one.peak_bytes / 2).plan(steps, rows)?;
        device.synchronize()?;
        device.reset_peak();
        let before = device.memory().held;
        let mut seen = vec![0; y.len()];
        let result = bptt(one.peak_bytes / 2).run(&x, input(), |steps, part| {
            let range = steps.start * rows * width..steps.end * rows * width;
            seen[range.clone()].copy_from_slice(&part.read_back::<u32>()?);
            Tensor::from_slice(device, &dy[range], part.shape())
        })?;
        let peak = device.memory().peak - before;
        let mut words = Vec::new();
        let tensors = [result.state.tensors(), result.dstate.tensors(), result.dx.iter().collect()].concat();
        for tensor in tensors.into_iter().chain(layer.params().into_iter().map(|(_, param)| param.grad())) {
            words.extend(tensor.read_back::<u32>()?);
        }
        let off = (plan.peak_bytes as f64 / peak as f64 - 1.0).abs();
        let cut = if one.segments == 1 && plan.segments > 1 { 0.0 } else { f64::NAN };
        let counts = (layer.clipped_gradients()? as f64 - clipped as f64).abs();
        let comparisons = vec![
            Comparison::measured(format!("segments of {plan:?}"), cut, 0.0),
            Comparison::bits("y", &seen, &y),
            Comparison::bits("states and gradients", &words, &expected),
            Comparison::measured("clipped", counts, 0.0),
            Comparison::measured(format!("predicted {} bytes of {peak}", plan.peak_bytes), off, 0.1),
            Comparison::measured("NaN", y.iter().chain(&words).filter(|word| is_nan(**word)).count() as f64, 0.0),
        ];
        cases.reports.push(Report::new(format!("{name}{kind}"), comparisons));
    }
    Ok(())
}
