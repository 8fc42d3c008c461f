//! Layers as a wavefront: the bits of the layers in turn, which other families compare with the oracle.

use std::collections::BTreeSet;

use super::harness::{Cases, GRADIENT, NAN, normal, overridden, pad, ragged, to_bits, wide};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::choice::KernelOverride;
use crate::kernels::sweep::{LayerOrder, SweepKernel};
use crate::kernels::sweep_pair::PairKernel;
use crate::nn::{
    Cell, CellState, GruConfig, Input, LstmConfig, MinGruConfig, Module, RecurrentConfig, Reset, RnnConfig, SLstmConfig,
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
        // Blocks of 16 steps; the last one is shorter, or as long as the others.
        check(cases, &format!("lstm, {sweep}"), lstm(), kernels, [70, 3])?;
        check(cases, &format!("lstm, masks, {sweep}"), masked.clone(), kernels, [64, 3])?;
        check(cases, &format!("gru, residual, {sweep}"), residual.clone(), kernels, [70, 3])?;
    }
    let steps = KernelOverride::default().sweep(SweepKernel::Step);
    // Products that a block of one size and the whole would have others for.
    check(cases, "lstm, a row", LstmConfig::new(INPUT, 132).layers(2).peepholes(true).gradient_clip(0.05), steps, [70, 1])?;
    check(cases, "lstm, many rows", lstm(), steps, [50, 40])?;
    check(cases, "rnn, four layers", RnnConfig::new(INPUT, 33).layers(4).learn_initial_state(true), steps, [70, 3])?;
    check(cases, "slstm", SLstmConfig::new(INPUT, 20).layers(2), steps, [70, 3])?;
    check(cases, "min_gru", MinGruConfig::new(INPUT, 20).layers(2), steps, [70, 3])?;
    let fused = steps.pair(PairKernel::Fused);
    check(cases, "lstm, projection", lstm().projection(INPUT).residual(true).dropout(0.3), fused, [70, 3])?;
    check(cases, "rnn, jordan", RnnConfig::new(INPUT, 20).layers(2).jordan(7), fused, [70, 3])?;
    let reset = GruConfig::new(INPUT, 20).layers(2).reset(Reset::BeforeProduct).gradient_clip(0.05);
    check(cases, "gru, reset before", reset, fused, [70, 3])?;
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
    let [in_turn, wavefront] =
        [LayerOrder::InTurn, LayerOrder::Wavefront].map(|order| overridden(cases.device, kernels.layers(order)));
    let (in_turn, wavefront) = (in_turn?, wavefront?);
    for (kind, is_ragged) in [("", false), (", ragged", true)] {
        let run = |device: &Device| -> Result<Vec<(String, Vec<f32>)>> {
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
                let of_run = if given.is_some() { ", state given" } else { "" };
                let (y, last) = layer.forward(&x, input().state(given))?;
                read(format!("y{of_run}"), &[&y])?;
                read(format!("last state{of_run}"), &last.tensors())?;
                layer.zero_grad()?;
                let (y, last, tape) = layer.forward_train(&x, input().state(given))?;
                read(format!("y in training{of_run}"), &[&y])?;
                read(format!("last state in training{of_run}"), &last.tensors())?;
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
            let (expected, products) = explained(&in_turn, || run(&in_turn))?;
            let (computed, in_parts) = explained(&wavefront, || run(&wavefront))?;
            // Kernels that here give the same bits may give others elsewhere.
            let others = products.symmetric_difference(&in_parts).count();
            case.comparisons.push(Comparison::measured("products of other sizes, or by other kernels", others as f64, 0.0));
            for ((name, expected), (_, computed)) in expected.into_iter().zip(computed) {
                // The same bits alone might be those of NaN.
                case.comparisons.push(Comparison::new(name.clone(), &computed, &wide(&expected), GRADIENT));
                case.comparisons.push(Comparison::bits(format!("{name}, bits"), &to_bits(&computed), &to_bits(&expected)));
                case.words.extend(to_bits(&computed));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What `work` gives, and the sizes and kernels of the products in it.
fn explained<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, BTreeSet<(String, String)>)> {
    let mut result = None;
    let choices = device.explain(|| {
        result = Some(work()?);
        Ok(())
    })?;
    let products = choices.into_iter().filter(|choice| choice.table == "product");
    let products = products.map(|choice| (choice.work, choice.kernel)).collect();
    match result {
        Some(result) => Ok((result, products)),
        None => unreachable!("the work was done"),
    }
}
