//! Layers as a wavefront: the bits of the layers in turn, which other families compare with the oracle.

use super::harness::{Cases, GRADIENT, NAN, normal, overridden, pad, ragged, to_bits, wide};
use crate::device::{Backend, Device};
use crate::error::Result;
use crate::kernels::choice::{KernelChoice, KernelOverride};
use crate::kernels::gemm::{Matrix, Product, ProductKernel};
use crate::kernels::sweep::{LayerOrder, SweepKernel};
use crate::kernels::sweep_pair::PairKernel;
use crate::nn::{
    Cell, CellState, GruConfig, Input, LstmConfig, MinGruConfig, Module, Precision, RecurrentConfig, Reset, RnnConfig,
    SLstmConfig,
};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Lengths, Tensor};
use crate::verify::Comparison;

const INPUT: usize = 20;

pub(super) fn wavefront(cases: &mut Cases<'_>) -> Result<()> {
    let lstm = || LstmConfig::new(INPUT, 20).layers(2);
    let masked = lstm().dropout(0.3).zoneout(0.2, 0.1).weight_dropout(0.3);
    let residual = GruConfig::new(INPUT, INPUT).layers(3).dropout(0.3).residual(true);
    for sweep in [SweepKernel::Resident, SweepKernel::Grid, SweepKernel::Step] {
        let kernels = KernelOverride::default().sweep(sweep);
        // Blocks of 32 steps; the last one is shorter, or as long as the others.
        check(cases, &format!("lstm, {sweep}"), lstm(), kernels, [70, 3])?;
        check(cases, &format!("lstm, masks, {sweep}"), masked.clone(), kernels, [64, 3])?;
        check(cases, &format!("gru, residual, {sweep}"), residual.clone(), kernels, [70, 3])?;
    }
    let steps = KernelOverride::default().sweep(SweepKernel::Step);
    // Products that a block of one size and the whole would have others for.
    check(cases, "lstm, a row", LstmConfig::new(INPUT, 132).layers(2).peepholes(true).gradient_clip(0.05), steps, [70, 1])?;
    // Blocks of 24 steps, and of 64 for products.
    check(cases, "lstm, many rows", lstm(), steps, [150, 24])?;
    check(cases, "rnn, four layers", RnnConfig::new(INPUT, 33).layers(4).learn_initial_state(true), steps, [70, 3])?;
    check(cases, "slstm", SLstmConfig::new(INPUT, 20).layers(2), steps, [70, 3])?;
    check(cases, "min_gru", MinGruConfig::new(INPUT, 20).layers(2), steps, [70, 3])?;
    let fused = steps.pair(PairKernel::Fused);
    check(cases, "lstm, projection", lstm().projection(INPUT).residual(true).dropout(0.3), fused, [70, 3])?;
    check(cases, "rnn, jordan", RnnConfig::new(INPUT, 20).layers(2).jordan(7), fused, [70, 3])?;
    let reset = GruConfig::new(INPUT, 20).layers(2).reset(Reset::BeforeProduct).gradient_clip(0.05);
    check(cases, "gru, reset before", reset, fused, [70, 3])?;
    // A tape of one order taken back in the other.
    let mixed = [[LayerOrder::Wavefront, LayerOrder::InTurn], [LayerOrder::InTurn, LayerOrder::Wavefront]];
    check_orders(cases, "lstm, either order", masked, steps, [70, 3], &mixed)?;
    kernels_of_parts(cases)?;
    // By the tables.
    check(cases, "lstm, two rows", LstmConfig::new(INPUT, 32).layers(2), KernelOverride::default(), [130, 2])
}

fn check<C: Cell>(
    cases: &mut Cases<'_>,
    name: &str,
    config: RecurrentConfig<C>,
    kernels: KernelOverride,
    [steps, rows]: [usize; 2],
) -> Result<()> {
    check_orders(cases, name, config, kernels, [steps, rows], &[[LayerOrder::Wavefront; 2]])
}

/// Layers forward and backward in these orders, beside both in turn.
fn check_orders<C: Cell>(
    cases: &mut Cases<'_>,
    name: &str,
    config: RecurrentConfig<C>,
    kernels: KernelOverride,
    [steps, rows]: [usize; 2],
    orders: &[[LayerOrder; 2]],
) -> Result<()> {
    let device = &overridden(cases.device, kernels)?;
    for (kind, is_ragged) in [("", false), (", ragged", true)] {
        let run = |[forward, backward]: [LayerOrder; 2]| -> Result<Vec<(String, Vec<f32>)>> {
            device.override_kernels(kernels.layers(forward))?;
            let mut rng = Rng::seed(9);
            let layer = config.clone().init(device, &mut rng)?;
            let host = is_ragged.then(|| ragged(&mut rng, steps, rows));
            let lengths = host.as_ref().map(|lengths| Lengths::from_slice(device, lengths)).transpose()?;
            let mut draw = |width: usize, padding: f32| {
                let mut values = normal(&mut rng, steps * rows * width);
                pad(&mut values, width, host.as_deref(), rows, padding);
                Tensor::from_slice(device, &values, [steps, rows, width])
            };
            let (x, dy) = (draw(INPUT, -100.0)?, draw(layer.output(), NAN)?);
            let dlast = layer.forward(&x, None)?.1;
            let input = || Input::new().lengths(lengths.as_ref()).key(MaskKey::new(1, 2));
            let state = layer.forward(&x, input())?.1;
            let mut all = Vec::new();
            let mut read = |name: String, tensors: &[&Tensor]| -> Result<()> {
                let values = tensors.iter().map(|tensor| tensor.to_vec()).collect::<Result<Vec<_>>>()?;
                all.push((name, values.concat()));
                Ok(())
            };
            // The layer's own initial state, or one that is given.
            for given in [None, Some(&state)] {
                device.override_kernels(kernels.layers(forward))?;
                let of_run = if given.is_some() { ", state given" } else { "" };
                let (y, last) = layer.forward(&x, input().state(given))?;
                read(format!("y{of_run}"), &[&y])?;
                read(format!("last state{of_run}"), &last.tensors())?;
                layer.zero_grad()?;
                let (y, last, tape) = layer.forward_train(&x, input().state(given))?;
                read(format!("y in training{of_run}"), &[&y])?;
                read(format!("last state in training{of_run}"), &last.tensors())?;
                device.override_kernels(kernels.layers(backward))?;
                let (dx, dstate, flow) = layer.backward_with_flow(tape, &dy, given.map(|_| &dlast))?;
                read(format!("dx{of_run}"), &[&dx])?;
                read(format!("initial state's gradient{of_run}"), &dstate.tensors())?;
                for (name, param) in layer.params() {
                    read(format!("gradient of {name}{of_run}"), &[param.grad()])?;
                }
                let norms: Vec<f32> = flow.states().iter().flat_map(|state| &state.norms).map(|norm| *norm as f32).collect();
                let clipped = layer.clipped_gradients()? as f32;
                let sums = [norms, vec![clipped]].concat();
                read(format!("flow and clipped{of_run}"), &[&Tensor::from_slice(device, &sums, [sums.len()])?])?;
            }
            Ok(all)
        };
        cases.run(format!("{name}{kind}"), |case| {
            let (expected, in_turn) = explained(device, || run([LayerOrder::InTurn; 2]))?;
            for order in orders {
                let (computed, choices) = explained(device, || run(*order))?;
                let of = |choices: &Choices, table: &str| -> Choices {
                    choices.iter().filter(|choice| choice.table == table).cloned().collect()
                };
                let is_wavefront = |choices: &Choices| of(choices, "layers").iter().any(|choice| choice.kernel == "wavefront");
                // A tape of layers in turn goes back so.
                let is_right = is_wavefront(&choices) == (order[0] == LayerOrder::Wavefront) && !is_wavefront(&in_turn);
                case.comparisons.push(Comparison::measured("other orders", if is_right { 0.0 } else { 1.0 }, 0.0));
                // Kernels that here give the same bits may give others elsewhere.
                let (products, whole) = (of(&choices, "product"), of(&in_turn, "product"));
                let others = products.iter().chain(&whole).filter(|choice| !products.contains(choice) || !whole.contains(choice));
                let others = others.count() as f64;
                case.comparisons.push(Comparison::measured("products of other sizes, or by other kernels", others, 0.0));
                for ((name, expected), (_, computed)) in expected.iter().zip(computed) {
                    // The same bits alone might be those of NaN.
                    case.comparisons.push(Comparison::new(name.clone(), &computed, &wide(expected), GRADIENT));
                    let bits = Comparison::bits(format!("{name}, bits, {order:?}"), &to_bits(&computed), &to_bits(expected));
                    case.comparisons.push(bits);
                    case.words.extend(to_bits(&computed));
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

type Choices = Vec<KernelChoice>;

/// What `work` gives, and the kernels that were chosen for it.
fn explained<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, Choices)> {
    let mut result = None;
    let choices = device.explain(|| {
        result = Some(work()?);
        Ok(())
    })?;
    match result {
        Some(result) => Ok((result, choices)),
        None => unreachable!("the work was done"),
    }
}

/// What takes some rows of a product takes all of them, and the other way around: of sizes between which sums in parts grow too large.
fn kernels_of_parts(cases: &mut Cases<'_>) -> Result<()> {
    cases.run("kernels of parts", |case| {
        let Backend::Gpu(gpu) = case.device.backend() else { return Ok(()) };
        let any = &Tensor::zeros(case.device, [1])?;
        let (whole, n, k) = (1024, 1024, 4096);
        for kernel in ProductKernel::ALL {
            for precision in [Precision::Single, Precision::Half] {
                let takes = |rows: usize| {
                    let matrix = |rows, cols| Matrix { tensor: any, offset: 0, rows, cols, row: cols, col: 1 };
                    let (a, b, c) = (matrix(rows, k), matrix(k, n), matrix(rows, n));
                    kernel.takes(gpu, &Product { precision, a, b, bias: None, c, accumulate: false, whole })
                };
                let differs = f64::from(u8::from(takes(384) != takes(whole)));
                case.comparisons.push(Comparison::measured(format!("{kernel}, {precision:?}"), differs, 0.0));
            }
        }
        Ok(())
    })
}
