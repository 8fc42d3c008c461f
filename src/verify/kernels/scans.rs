//! The scan against the step sweep, whose numbers it must give, and chosen by a layer against the oracle.

use super::harness::{Cases, GRADIENT, NAN, OUTPUT, Run, normal, pad, ragged, wide};
use super::networks::{Given, Network, check_given};
use crate::error::Result;
use crate::kernels::cell_contract::Block;
use crate::kernels::cell_min_gru::MinGruCell;
use crate::kernels::cell_min_lstm::MinLstmCell;
use crate::kernels::choice::KernelOverride;
use crate::kernels::sweep::{self, Buffers, Plan, Side, SweepKernel};
use crate::kernels::sweep_scan;
use crate::kernels::sweep_step;
use crate::nn::{Cell, Direction, MinGruConfig, MinLstmConfig, RecurrentConfig};
use crate::rng::{MaskKey, Rng};
use crate::tensor::Tensor;
use crate::verify::{Comparison, oracle};

pub(super) fn scans(cases: &mut Cases<'_>) -> Result<()> {
    against_steps::<MinGruCell>(cases)?;
    against_steps::<MinLstmCell>(cases)?;
    // Where the tables would choose another sweep too.
    cases.under(KernelOverride::default().sweep(SweepKernel::Scan), |cases| {
        chosen(cases, "min_gru", MinGruConfig::new(5, 19), oracle::Cell::MinGru)?;
        chosen(cases, "min_lstm", MinLstmConfig::new(5, 19), oracle::Cell::MinLstm)
    })
}

/// One direction of one layer, `[T, B, .., H]`.
struct Sweep {
    steps: usize,
    rows: usize,
    hidden: usize,
    reverse: bool,
    lengths: Option<Vec<u32>>,
    /// Input parts in the first gates of `[T, B, SLOTS, H]`, initial state and final gradient `[B, H]`, dy `[T, B, H]`.
    x: Vec<f32>,
    initial: Vec<f32>,
    dlast: Vec<f32>,
    dy: Vec<f32>,
}

fn against_steps<C: Cell>(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(31);
    let mut sizes = vec![[100, 3, 63], [33, 2, 64], [64, 4, 65], [31, 5, 1], [97, 1, 130]]; // [T, B, H]; a block has 32 steps
    sizes.extend([1, 2, 31, 32, 33, 64, 65, 100].map(|steps| [steps, 3, 7]));
    // More blocks and rows than one dimension of workgroups has.
    sizes.push([33, 65_535 / 2 + 9, 1]);
    for [steps, rows, hidden] in sizes {
        for (reverse, is_ragged) in [(false, false), (true, false), (false, true), (true, true)] {
            if rows > 1000 && !(reverse && is_ragged) {
                continue; // once is enough: it is slow
            }
            let lengths = is_ragged.then(|| ragged(&mut rng, steps, rows));
            let mut x = normal(&mut rng, steps * rows * C::Slots::LEN * hidden);
            let [initial, dlast] = [0; 2].map(|_| normal(&mut rng, rows * hidden));
            let mut dy = normal(&mut rng, steps * rows * hidden);
            // Gates that stay open for long, so that the state and its gradient go far.
            for (at, x) in x.iter_mut().enumerate() {
                let gate = at / hidden % C::Slots::LEN;
                if gate + 1 < C::Pre::LEN {
                    *x = 2.0 * *x + if C::Pre::LEN == 3 && gate == 0 { 3.0 } else { -3.0 };
                }
            }
            pad(&mut x, C::Slots::LEN * hidden, lengths.as_deref(), rows, NAN);
            pad(&mut dy, hidden, lengths.as_deref(), rows, NAN);
            let sweep = Sweep { steps, rows, hidden, reverse, lengths, x, initial, dlast, dy };
            for depth in [steps + 1, 2] {
                check::<C>(cases, &sweep, depth)?;
            }
        }
    }
    Ok(())
}

/// What a sweep gives: y, the states, dslots, dstates.
type Swept = [Tensor; 4];

fn sweep<C: Cell>(run: &mut Run<'_>, sweep: &Sweep, depth: usize, scan: bool) -> Result<Swept> {
    let &Sweep { steps, rows, hidden, reverse, .. } = sweep;
    let (device, cell) = (run.device, C::default());
    let lengths = run.lengths(sweep.lengths.as_deref())?;
    let (key, zoneout) = (MaskKey::new(0, 0), [0.0; 2]);
    let (lengths, y_stride, y_offset) = (lengths.as_ref(), hidden + 3, 2);
    let (output, start, random, clip) = (true, 0, false, 0.0);
    let plan = Plan {
        steps,
        run: sweep::Run::whole(steps),
        rows,
        hidden,
        reverse,
        lengths,
        output,
        y_stride,
        y_offset,
        key,
        start,
        total: steps,
        random,
        zoneout,
        clip,
        flow: false,
    };
    let slots = Tensor::from_slice(device, &sweep.x, [steps, rows, C::Slots::LEN, hidden])?;
    let states = Tensor::zeros(device, [depth, rows, hidden])?;
    states.slice(plan.ends(depth).0 * rows * hidden, [rows * hidden]).write(&sweep.initial)?;
    let unit = run.input("unit", &vec![0.0; hidden], [hidden])?;
    let y = Tensor::zeros(device, [steps * rows, hidden + 3])?;
    let buffers = Buffers { slots: &slots, states: &states, weights: &unit, unit: &unit, y: &y };
    let kernels = C::SCAN.filter(|_| scan);
    match kernels {
        Some(kernels) => sweep_scan::forward(kernels, &cell, &Side { plan, buffers })?,
        None => sweep_step::forward(&cell, &[Side { plan, buffers }])?,
    }
    let dstates = Tensor::from_slice(device, &sweep.dlast, [rows, hidden])?;
    if depth != steps + 1 {
        // Of two states the newest counts.
        return Ok([y, states.slice(plan.ends(depth).1 * rows * hidden, [rows * hidden]), dstates.clone(), dstates]);
    }
    let mut words = vec![NAN; steps * rows * (hidden + 3)];
    for (line, dy) in sweep.dy.chunks_exact(hidden).enumerate() {
        words[line * (hidden + 3) + 2..][..hidden].copy_from_slice(dy);
    }
    let dy = run.input("dy", &words, [steps * rows, hidden + 3])?;
    let buffers = Buffers { y: &dy, ..buffers };
    match kernels {
        Some(kernels) => sweep_scan::backward(kernels, &cell, &Side { plan, buffers }, &dstates)?,
        None => sweep_step::backward(&cell, &[Side { plan, buffers }], &[&dstates])?,
    }
    Ok([y, states, slots, dstates])
}

fn check<C: Cell>(cases: &mut Cases<'_>, given: &Sweep, depth: usize) -> Result<()> {
    let Sweep { steps, rows, hidden, reverse, lengths, .. } = given;
    let name = format!("{}, {steps}x{rows}x{hidden}, {depth} states, reverse {reverse}, {}", C::NAME, lengths.is_some());
    cases.run(name, |run| {
        let want = sweep::<C>(run, given, depth, false)?;
        let got = sweep::<C>(run, given, depth, true)?;
        let bounds = [("y", OUTPUT), ("states", OUTPUT), ("dslots", GRADIENT), ("dstates", GRADIENT)];
        for ((want, got), (name, bound)) in want.iter().zip(&got).zip(bounds) {
            run.near(name, got, &wide(&want.to_vec()?), bound)?;
        }
        Ok(())
    })
}

/// Layers that take the scan where there is a GPU; and what falls back to steps.
fn chosen<C: Cell>(cases: &mut Cases<'_>, name: &'static str, config: RecurrentConfig<C>, cell: oracle::Cell) -> Result<()> {
    let plain = oracle::Recurrent::new(cell, 5, 19);
    let stack = config.clone().layers(2).direction(Direction::Both);
    let stack64 = oracle::Recurrent { layers: 2, directions: 2, ..plain };
    let (steps, rows) = (70, 3);
    for (kind, network, is_ragged) in [
        ("long", Network::new(name, config.clone(), plain), false),
        ("long_deep", Network::new(name, stack.clone(), stack64), true),
        ("long_zoneout", Network { zoneout: [0.3, 0.0], ..Network::new(name, stack.zoneout(0.3, 0.0), stack64) }, true),
    ] {
        let mut rng = Rng::seed(5);
        let layer = network.config.clone().init(cases.device, &mut rng)?;
        let slots = network.oracle.layers * network.oracle.directions;
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, rows));
        let mut x = normal(&mut rng, steps * rows * 5);
        pad(&mut x, 5, lengths.as_deref(), rows, 3.0);
        let [state, dstate] = [0; 2].map(|_| vec![normal(&mut rng, slots * rows * 19)]);
        let dy = normal(&mut rng, steps * rows * layer.output());
        let given = Given { steps, rows, lengths, x, dy, state, dstate };
        check_given(cases, &format!("{name}_{kind}"), &network, &layer, &given, None)?;
    }
    // The clip of the gradient takes steps too: one that never acts changes nothing, and one that does is counted.
    let clipped = config.gradient_clip(1e-3).init(cases.device, &mut Rng::seed(5))?;
    cases.run(format!("{name}_clip"), |run| {
        let x = run.input("x", &normal(&mut Rng::seed(6), steps * rows * 5), [steps, rows, 5])?;
        let before = clipped.clipped_gradients()?;
        let (y, _, tape) = clipped.forward_train(&x, None)?;
        clipped.backward(tape, &y, None)?;
        let acted = clipped.clipped_gradients()? > before;
        run.comparisons.push(Comparison::measured("whether the clip acted", f64::from(u8::from(!acted)), 0.0));
        Ok(())
    })
}
