//! The recurrent sweep: one direction of one layer, and both at once.

use super::harness::{Cases, GRADIENT, NAN, OUTPUT, Run, Window, overridden, pad, ragged, to_bits, wide, within};
use super::networks::{INPUT, Network, check};
use crate::error::Result;
use crate::kernels::cell_lstm::LstmCell;
use crate::kernels::choice::KernelOverride;
use crate::kernels::sweep::{self, Buffers, Plan, Side, SweepKernel};
use crate::kernels::sweep_pair::PairKernel;
use crate::kernels::sweep_step::StepKernel;
use crate::kernels::{sweep_grid, sweep_resident, sweep_step};
use crate::nn::{Direction, GruConfig, IndRnnConfig, LstmConfig, Merge, Reset, RnnConfig, SLstmConfig};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Lengths, POISON, Tensor};
use crate::verify::autodiff::sigmoid;
use crate::verify::oracle::{self, Cell, Recurrent, RecurrentInput};
use crate::verify::{Comparison, Report};

/// One direction of one layer, `[T, B, .., H]`.
#[derive(Clone)]
struct Sweep {
    steps: usize,
    rows: usize,
    hidden: usize,
    reverse: bool,
    /// Which of the sweeps.
    kind: SweepKernel,
    /// Whether zoneout and the clip of the gradient act between steps, and the flow is kept: more than `expected` knows.
    acts: bool,
    /// Of a grid: whether an alarm stands, so that its rescue does all.
    is_alarmed: bool,
    lengths: Option<Vec<u32>>,
    /// Input parts `[T, B, 4, H]`, W_hh `[4H, H]`, b_hh `[4H]`, initial state `[2, B, H]`.
    x: Vec<f32>,
    weights: Vec<f32>,
    bias: Vec<f32>,
    initial: Vec<f32>,
    /// Gradients of y `[T, B, H]` and of the final state `[2, B, H]`.
    dy: Vec<f32>,
    dlast: Vec<f32>,
}

/// What the sweep kernels give.
struct Swept {
    y: Vec<f64>,
    states: Vec<f64>,
    saved: Vec<f64>,
    dslots: Vec<f64>,
    dstates: Vec<f64>,
}

impl Sweep {
    fn new(rng: &mut Rng, steps: usize, rows: usize, hidden: usize, reverse: bool, is_ragged: bool, size: f32) -> Self {
        let lengths = is_ragged.then(|| ragged(rng, steps, rows));
        let mut scaled = |count: usize, size: f32| -> Vec<f32> { (0..count).map(|_| size * rng.normal()).collect() };
        let mut x = scaled(steps * rows * 4 * hidden, size);
        let mut dy = scaled(steps * rows * hidden, 1.0);
        pad(&mut x, 4 * hidden, lengths.as_deref(), rows, NAN);
        pad(&mut dy, hidden, lengths.as_deref(), rows, NAN);
        // Large weights would amplify rounding from step to step, whoever does it; large inputs saturate gates as well.
        let weights = scaled(4 * hidden * hidden, size.min(1.0) / (hidden as f32).sqrt());
        let (bias, initial) = (scaled(4 * hidden, 0.5), scaled(2 * rows * hidden, 1.0));
        let dlast = scaled(2 * rows * hidden, 1.0);
        let (kind, acts, is_alarmed) = (SweepKernel::Step, false, false);
        Self { steps, rows, hidden, reverse, kind, acts, is_alarmed, lengths, x, weights, bias, initial, dy, dlast }
    }

    fn name(&self) -> String {
        let Self { steps, rows, hidden, reverse, lengths, .. } = self;
        let ragged = lengths.as_ref().map_or(String::new(), |lengths| format!(", lengths {lengths:?}"));
        let (reverse, rescue) = (if *reverse { ", reverse" } else { "" }, if self.is_alarmed { ", by a rescue" } else { "" });
        format!("{steps}x{rows}x{hidden}{reverse}{ragged}{rescue}")
    }

    /// Steps as computed, with the slots of the state before and after.
    fn order(&self) -> Vec<(usize, usize, usize)> {
        match self.reverse {
            false => (0..self.steps).map(|t| (t, t, t + 1)).collect(),
            true => (0..self.steps).rev().map(|t| (t, t + 1, t)).collect(),
        }
    }

    /// The textbook: a layer that takes its gates' input parts as they are.
    fn expected(&self) -> Swept {
        let (rows, gates) = (self.rows, 4 * self.hidden);
        let block = rows * self.hidden;
        let identity = (0..gates * gates).map(|at| if at % gates == at / gates { 1.0 } else { 0.0 });
        let parts = [("weight_ih", identity.collect()), ("weight_hh", wide(&self.weights)), ("bias_hh", wide(&self.bias))];
        let weights = [parts.map(|(name, part)| (name.to_owned(), part)).into()];
        let (x, initial, dlast) = (wide(&self.x), wide(&self.initial), wide(&self.dlast));
        let lengths: Option<Vec<usize>> = self.lengths.as_ref().map(|lengths| lengths.iter().map(|n| *n as usize).collect());
        let spec = Recurrent { first_reverse: self.reverse, ..Recurrent::new(Cell::LSTM, gates, self.hidden) };
        let want = spec.forward_backward(
            &weights,
            RecurrentInput {
                batch: rows,
                x: &x,
                state: &[&initial[..block], &initial[block..]],
                lengths: lengths.as_deref(),
                dy: &wide(&self.dy),
                dstate: &[&dlast[..block], &dlast[block..]],
                ..RecurrentInput::default()
            },
        );
        // The states before the first step lie at its end of time.
        let states = want.states[0]
            .iter()
            .zip(initial.chunks_exact(block))
            .map(|(after, first)| if self.reverse { [after, first].concat() } else { [first, after].concat() });
        let states: Vec<f64> = states.collect::<Vec<_>>().concat();
        let mut saved = vec![0.0; x.len()];
        for (t, before, _) in self.order() {
            let r = oracle::linear(&states[before * block..][..block], &weights[0]["weight_hh"], None, self.hidden, gates);
            for (n, r) in r.into_iter().enumerate() {
                let at = t * rows * gates + n;
                let sum = x[at] + r + f64::from(self.bias[n % gates]);
                saved[at] = if n % gates / self.hidden == 2 { sum.tanh() } else { sigmoid(sum) };
            }
        }
        Swept { y: want.y, states, saved, dslots: want.dx, dstates: want.dstate.concat() }
    }

    /// The kernels on `run`'s device; `check` gets what forward made, and what backward made of it.
    fn launch(
        &self,
        run: &mut Run<'_>,
        depth: usize,
        check: impl FnOnce(&mut Run<'_>, &Launched<'_>) -> Result<()>,
    ) -> Result<()> {
        launch(&[self], run, depth, |run, launched| check(run, &launched[0]))
    }

    /// The buffers before the forward sweep.
    fn prepare<'a>(&'a self, run: &mut Run<'_>, depth: usize, lengths: Option<&'a Lengths>) -> Result<Launched<'a>> {
        let Self { steps, rows, hidden, reverse, acts, .. } = *self;
        let plan = Plan {
            steps,
            run: sweep::Run::whole(steps),
            rows,
            hidden,
            reverse,
            lengths,
            output: true,
            y_stride: hidden + 8,
            y_offset: 5,
            key: MaskKey::new(3, u64::from(reverse)),
            start: 0,
            total: steps,
            random: acts,
            zoneout: if acts { [0.3, 0.2] } else { [0.0; 2] },
            clip: if acts { 0.5 } else { 0.0 },
            flow: acts,
        };
        let slots = Tensor::from_slice(run.device, &self.x, [steps, rows, 4, hidden])?;
        let block = rows * hidden;
        let states = Tensor::uninitialized(run.device, [2, depth, rows, hidden])?;
        for s in 0..2 {
            states.slice((s * depth + plan.ends(depth).0) * block, [block]).write(&self.initial[s * block..][..block])?;
        }
        let unit = run.input("unit", &self.bias, [4, hidden])?;
        let weights = run.input("weights", &self.weights, [4 * hidden, hidden])?;
        let forward_weights = sweep_step::forward_weights::<LstmCell>(&weights, hidden)?;
        let y = run.window_of_y(self, None)?;
        Ok(Launched { sweep: self, plan, slots, states, y, weights, forward_weights, unit })
    }
}

/// As [`Sweep::launch`], of both directions in one.
fn launch(
    sweeps: &[&Sweep],
    run: &mut Run<'_>,
    depth: usize,
    check: impl FnOnce(&mut Run<'_>, &[Launched<'_>]) -> Result<()>,
) -> Result<()> {
    if sweeps[0].kind == SweepKernel::Grid {
        run.device.set_alarm(sweeps[0].is_alarmed)?;
    }
    let lengths = run.lengths(sweeps[0].lengths.as_deref())?;
    let launched = sweeps.iter().map(|sweep| sweep.prepare(run, depth, lengths.as_ref()));
    let mut launched = launched.collect::<Result<Vec<_>>>()?;
    let fields: [for<'a> fn(&'a mut Launched<'_>) -> &'a mut Tensor; 6] = [
        |at| &mut at.slots,
        |at| &mut at.states,
        |at| &mut at.y.tensor,
        |at| &mut at.weights,
        |at| &mut at.forward_weights,
        |at| &mut at.unit,
    ];
    for field in fields {
        let together = Tensor::behind_each_other(launched.iter_mut().map(|at| Ok(field(at).clone())))?;
        launched.iter_mut().zip(together).for_each(|(at, tensor)| *field(at) = tensor);
    }
    let sides: Vec<Side<'_>> = launched.iter().map(|at| at.side(&at.forward_weights, &at.y.tensor)).collect();
    let cell = LstmCell::default();
    match sweeps[0].kind {
        SweepKernel::Scan | SweepKernel::Step => sweep_step::forward(&cell, &sides)?,
        SweepKernel::Resident => sweep_resident::forward(&cell, &sides)?,
        SweepKernel::Grid => sweep_grid::forward(&cell, &sides)?,
    }
    check(run, &launched)
}

/// The buffers after the forward sweep.
struct Launched<'a> {
    sweep: &'a Sweep,
    plan: Plan<'a>,
    slots: Tensor,
    states: Tensor,
    y: Window,
    weights: Tensor,
    forward_weights: Tensor,
    unit: Tensor,
}

impl Launched<'_> {
    fn side<'a>(&'a self, weights: &'a Tensor, y: &'a Tensor) -> Side<'a> {
        let Self { plan, slots, states, unit, .. } = self;
        Side { plan: *plan, buffers: Buffers { slots, states, weights, unit, y } }
    }

    /// Runs the backward sweep, which turns the slots into gradients; gives dstates.
    fn backward(&self, run: &mut Run<'_>) -> Result<Tensor> {
        Ok(backward(std::slice::from_ref(self), run)?.swap_remove(0))
    }
}

/// As [`Launched::backward`], of both directions in one launch.
fn backward(launched: &[Launched<'_>], run: &mut Run<'_>) -> Result<Vec<Tensor>> {
    let cell = LstmCell::default();
    let (mut dys, mut dstates) = (Vec::new(), Vec::new());
    for Launched { sweep, plan, states, .. } in launched {
        let dy = run.window_of_y(sweep, Some(&sweep.dy))?;
        run.input_words("dy", &dy.tensor, &dy.words);
        run.input_words("states", states, &states.read_back::<u32>()?);
        dys.push(dy.tensor);
        let dlast = Tensor::zeros(run.device, [plan.dstates_len(&cell)])?;
        dlast.slice(0, [sweep.dlast.len()]).write(&sweep.dlast)?;
        dstates.push(dlast);
    }
    let behind_each_other = |tensors: Vec<Tensor>| Tensor::behind_each_other(tensors.into_iter().map(Ok));
    let (dys, dstates) = (behind_each_other(dys)?, behind_each_other(dstates)?);
    let sides: Vec<Side<'_>> = launched.iter().zip(&dys).map(|(at, dy)| at.side(&at.weights, dy)).collect();
    let all_dstates: Vec<&Tensor> = dstates.iter().collect();
    match launched[0].sweep.kind {
        SweepKernel::Scan | SweepKernel::Step => sweep_step::backward(&cell, &sides, &all_dstates)?,
        SweepKernel::Resident => sweep_resident::backward(&cell, &sides, &all_dstates)?,
        SweepKernel::Grid => sweep_grid::backward(&cell, &sides, &all_dstates)?,
    }
    Ok(dstates)
}

impl Run<'_> {
    /// `[T, B, H]` inside `[T, B, H + 8]`, from column 5 on; NaN elsewhere.
    fn window_of_y(&self, sweep: &Sweep, values: Option<&[f32]>) -> Result<Window> {
        let (lines, hidden) = (sweep.steps * sweep.rows, sweep.hidden);
        let mut words = vec![POISON; lines * (hidden + 8)];
        for (line, values) in values.into_iter().flat_map(|values| values.chunks_exact(hidden)).enumerate() {
            words[line * (hidden + 8) + 5..][..hidden].copy_from_slice(&to_bits(values));
        }
        let tensor = Tensor::upload("y", self.device, &words, vec![words.len()])?;
        Ok(Window { tensor, words, offset: 5, rows: lines, cols: hidden, row: hidden + 8 })
    }
}

pub(super) fn lstm_sweep(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(12);
    let sizes = [
        [1, 1, 1],
        [1, 3, 5],
        [2, 4, 16],
        [5, 5, 3],
        [7, 1, 17],
        [3, 9, 63],
        [2, 2, 64],
        [3, 4, 65],
        [4, 6, 100],
        [2, 5, 130],
        [2, 3, 256],
        [2, 5, 257],
        [20, 3, 9],
        // On the CPU a tile has 6 rows, a band of tiles 64, a panel 16 units, in backward 64; a product is cut after 512 units.
        [2, 6, 15],
        [2, 7, 16],
        [2, 13, 48],
        [2, 65, 9],
        [2, 2, 513],
        // There, enough work for threads: which share the rows, and the units.
        [4, 13, 130],
        [4, 5, 272],
    ]; // [T, B, H]; on a GPU a tile has 4 rows and 64 units, in backward 256
    let kernels = KernelOverride::default().step(StepKernel::General);
    cases.under(kernels, |cases| lstm_sweeps(cases, SweepKernel::Step, &mut rng, &sizes, [65_535 * 4 + 5, 1]))
}

pub(super) fn step_subgroup(cases: &mut Cases<'_>) -> Result<()> {
    let kernels = KernelOverride::default().sweep(SweepKernel::Step).step(StepKernel::Subgroup);
    // A tile has 16 or 32 rows and 32 units, all in fours.
    let sizes = [
        [1, 1, 4],
        [2, 7, 4],
        [3, 15, 28],
        [2, 16, 32],
        [3, 17, 36],
        [2, 31, 12],
        [2, 32, 64],
        [3, 33, 68],
        [7, 1, 100],
        [2, 5, 260],
    ];
    cases.under(kernels, |cases| lstm_sweeps(cases, SweepKernel::Step, &mut Rng::seed(16), &sizes, [100, 4]))?;
    other_cells(cases, kernels, &[36])?;
    two_products(cases, kernels.pair(PairKernel::Fused), [36, 20])
}

pub(super) fn step_row(cases: &mut Cases<'_>) -> Result<()> {
    let kernels = KernelOverride::default().sweep(SweepKernel::Step).step(StepKernel::SubgroupRow);
    let sizes = [[1, 1, 4], [2, 2, 28], [3, 1, 32], [2, 3, 36], [4, 1, 64], [2, 1, 260]];
    // A tile is a row.
    cases.under(kernels, |cases| lstm_sweeps(cases, SweepKernel::Step, &mut Rng::seed(17), &sizes, [65_535 + 3, 4]))?;
    other_cells(cases, kernels, &[36])?;
    two_products(cases, kernels.pair(PairKernel::Fused), [36, 20])
}

pub(super) fn step_tiled(cases: &mut Cases<'_>) -> Result<()> {
    let kernels = KernelOverride::default().sweep(SweepKernel::Step).step(StepKernel::Tiled);
    // A tile has 32 rows and 8 units, in backward 16; a product is cut in 4 slices of chunks of 8 k, in backward in 8.
    let widths = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130];
    let rows = [1, 3, 4, 31, 32, 33, 5];
    let sizes: Vec<_> = widths.into_iter().enumerate().map(|(i, hidden)| [[2, 1, 3][i % 3], rows[i % 7], hidden]).collect();
    // Two million rows, more than one dimension has tiles for, would take llvmpipe minutes.
    cases.under(kernels, |cases| lstm_sweeps(cases, SweepKernel::Step, &mut Rng::seed(15), &sizes, [100, 1]))?;
    other_cells(cases, kernels, &[33])?;
    two_products(cases, kernels.pair(PairKernel::Fused), [33, 65])?;
    two_products(cases, kernels.pair(PairKernel::Fused), [70, 7])
}

pub(super) fn lstm_resident(cases: &mut Cases<'_>) -> Result<()> {
    // A tile has 1 or 2 rows and 32, 64 or 128 units, those of 128 in two parts; a launch has 2048 steps.
    let widths = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128];
    let rows = [1, 2, 3, 5];
    let mut sizes: Vec<_> = widths.into_iter().enumerate().map(|(i, hidden)| [[7, 1, 2][i % 3], rows[i % 4], hidden]).collect();
    sizes.extend([[3, 1, 128], [3, 9, 64], [4, 8, 31], [2049, 1, 5]]);
    lstm_sweeps(cases, SweepKernel::Resident, &mut Rng::seed(13), &sizes, [65_535 * 2 + 3, 1])
}

pub(super) fn lstm_grid(cases: &mut Cases<'_>) -> Result<()> {
    // A slice of a product has 32 k, a tile of units as many as 256 lanes allow, a block of rows likewise; a launch has 16 steps here.
    let widths = [1, 31, 32, 33, 64, 65, 85, 86, 100, 127, 128, 130];
    let rows = [1, 2, 3, 5, 9];
    let mut sizes: Vec<_> = widths.into_iter().enumerate().map(|(i, hidden)| [[7, 1, 2][i % 3], rows[i % 5], hidden]).collect();
    sizes.extend([[33, 2, 90], [17, 5, 20]]);
    let mut rng = Rng::seed(14);
    // An alarm stays on a device.
    cases.under(KernelOverride::default(), |cases| {
        lstm_sweeps(cases, SweepKernel::Grid, &mut rng, &sizes, [256, 1])?;
        for hidden in [20, 90] {
            let sweep =
                Sweep { kind: SweepKernel::Grid, is_alarmed: true, ..Sweep::new(&mut rng, 5, 3, hidden, false, true, 1.0) };
            check_sweep(cases, &sweep)?;
            let both = both_ways(&mut rng, SweepKernel::Grid, [5, 3, hidden], true, false);
            check_both(cases, &both.map(|sweep| Sweep { is_alarmed: true, ..sweep }))?;
        }
        Ok(())
    })?;

    // Workgroups that run at once come to an end by themselves, if not at every try: threads of a software driver on a busy machine take
    // turns. Workgroups that do not run at once never do, and the rest is done without them.
    const TRIES: usize = 100;
    // A page has one thread, and the browser's driver as many as there are.
    let several = cfg!(target_arch = "wasm32") || std::thread::available_parallelism().is_ok_and(|threads| threads.get() > 1);
    let sizes = [(3, 2, 20, true), (3, 2, 90, several), (3, 2, 512, false)];
    for ((steps, rows, hidden, is_possible), backward) in sizes.into_iter().flat_map(|size| [(size, false), (size, true)]) {
        let sweep = Sweep { kind: SweepKernel::Grid, ..Sweep::new(&mut rng, steps, rows, hidden, false, false, 1.0) };
        let expected = sweep.expected();
        let (mut comparisons, mut tries, mut halts, mut at_once) = (Vec::new(), 0, 0, false);
        // Until one has come to an end and the probe, maybe at another try, has found that they can.
        while tries < if is_possible { TRIES } else { 1 } && !(at_once && halts < tries) {
            let device = overridden(cases.device, KernelOverride::default())?; // without an alarm, and not probed yet
            let mut run = Run::new(&device);
            sweep.launch(&mut run, steps + 1, |run, launched| {
                at_once |= sweep_grid::runs_at_once(&device, &LstmCell::default(), &launched.plan, backward)?;
                run.near("states", &launched.states, &expected.states, OUTPUT)?;
                if backward {
                    device.set_alarm(false)?;
                    let dstates = launched.backward(run)?;
                    run.near("dslots", &launched.slots, &expected.dslots, GRADIENT)?;
                    run.near("dstates", &dstates, &expected.dstates, GRADIENT)?;
                }
                Ok(())
            })?;
            comparisons.extend(run.comparisons);
            tries += 1;
            halts += usize::from(device.is_alarmed());
        }
        let (ended, halted) = (at_once && halts < tries, halts == tries);
        let error = f64::from(u8::from(if is_possible { !ended } else { at_once == halted }));
        comparisons.push(Comparison::measured(format!("{halts} of {tries} halted, at once: {at_once}"), error, 0.0));
        let pass = if backward { "backward" } else { "forward" };
        cases.reports.push(Report::new(format!("alarm at {hidden} units, {pass}"), comparisons));
    }
    Ok(())
}

/// Cells of one, three and four gates, of one and four states, with a product and without, at widths of each kind, and what acts between steps.
pub(super) fn resident_cells(cases: &mut Cases<'_>) -> Result<()> {
    let kernels = KernelOverride::default().sweep(SweepKernel::Resident);
    other_cells(cases, kernels, &[33, 100, 128])?;
    // More units than a workgroup has.
    let spec = Recurrent::new(Cell::IndRnn { activation: oracle::Activation::Relu }, INPUT, 300);
    cases.under(kernels, |cases| check(cases, Network::new("indrnn_300", IndRnnConfig::new(INPUT, 300), spec)))
}

/// The same under the grid.
pub(super) fn grid_cells(cases: &mut Cases<'_>) -> Result<()> {
    other_cells(cases, KernelOverride::default().sweep(SweepKernel::Grid), &[33, 100])
}

/// The same, wider than the cells of `networks`, by whatever kernels the tables name; and two products a step in launches of their own.
pub(super) fn wide_cells(cases: &mut Cases<'_>) -> Result<()> {
    let kernels = KernelOverride::default();
    other_cells(cases, kernels, &[33, 100, 128])?;
    two_products(cases, kernels.pair(PairKernel::Apart), [33, 7])
}

/// Cells of one, three and four gates, of one and four states, in one direction and in both, and what acts between steps.
fn other_cells(cases: &mut Cases<'_>, kernels: KernelOverride, widths: &[usize]) -> Result<()> {
    cases.under(kernels, |cases| {
        for &hidden in widths {
            let plain = |cell| Recurrent::new(cell, INPUT, hidden);
            let stack = |cell| Recurrent { layers: 2, directions: 2, ..plain(cell) };
            let (gru, rnn, slstm) =
                (GruConfig::new(INPUT, hidden), RnnConfig::new(INPUT, hidden), SLstmConfig::new(INPUT, hidden));
            check(cases, Network::new(format!("gru_{hidden}"), gru.layers(2).direction(Direction::Both), stack(Cell::GRU)))?;
            check(cases, Network::new(format!("slstm_{hidden}"), slstm, plain(Cell::SLstm)))?;
            let rnn = rnn.zoneout(0.3, 0.0).direction(Direction::Both).merge(Merge::Product);
            let rnn64 = Recurrent { directions: 2, merge: oracle::Merge::Product, ..plain(Cell::RNN) };
            check(cases, Network { zoneout: [0.3, 0.0], ..Network::new(format!("rnn_{hidden}"), rnn, rnn64) })?;
        }
        Ok(())
    })
}

/// Steps of two products: an output of so many numbers in the recurrence, and a reset gate before the product.
fn two_products(cases: &mut Cases<'_>, kernels: KernelOverride, [hidden, width]: [usize; 2]) -> Result<()> {
    cases.under(kernels, |cases| {
        let stack = |cell| Recurrent { layers: 2, directions: 2, ..Recurrent::new(cell, INPUT, hidden) };
        let lstm = LstmConfig::new(INPUT, hidden).peepholes(true).projection(width).layers(2).direction(Direction::Both);
        let lstm64 = Cell::Lstm {
            gate: oracle::Activation::Sigmoid,
            candidate: oracle::Activation::Tanh,
            output: oracle::Activation::Tanh,
            peepholes: true,
            coupled: false,
            cell_clip: None,
        };
        let name = format!("lstm_{hidden}_projection_{width}");
        check(cases, Network::new(name, lstm, Recurrent { projection: Some(width), ..stack(lstm64) }))?;
        let rnn = RnnConfig::new(INPUT, hidden).jordan(width).layers(2).direction(Direction::Both);
        let rnn64 = Recurrent { projection: Some(width), ..stack(Cell::RNN) };
        check(cases, Network::new(format!("rnn_{hidden}_jordan_{width}"), rnn, rnn64))?;
        let gru =
            GruConfig::new(INPUT, hidden).reset(Reset::BeforeProduct).zoneout(0.3, 0.0).layers(2).direction(Direction::Both);
        let gru64 = stack(Cell::GRU_RESET_BEFORE);
        check(cases, Network { zoneout: [0.3, 0.0], ..Network::new(format!("gru_{hidden}_reset_before"), gru, gru64) })
    })
}

/// Of these sizes `[T, B, H]`, then of `many` rows and units, more than one dimension of workgroups has tiles for if the kernel's are small,
/// then with NaN.
fn lstm_sweeps(
    cases: &mut Cases<'_>,
    kind: SweepKernel,
    rng: &mut Rng,
    sizes: &[[usize; 3]],
    [many, units]: [usize; 2],
) -> Result<()> {
    for (i, &[steps, rows, hidden]) in sizes.iter().enumerate() {
        for (reverse, is_ragged) in [(false, false), (true, false), (false, true), (true, true)] {
            let size = [1.0, 0.1, 30.0][i % 3];
            let sweep = Sweep { kind, ..Sweep::new(rng, steps, rows, hidden, reverse, is_ragged, size) };
            check_sweep(cases, &sweep)?;
        }
        check_both(cases, &both_ways(rng, kind, [steps, rows, hidden], i % 2 == 0, false))?;
    }
    let sweep = Sweep { kind, ..Sweep::new(rng, 1, many, units, false, false, 1.0) };
    check_sweep(cases, &sweep)?;
    check_both(cases, &both_ways(rng, kind, [5, 3, 20], true, true))?;

    let (steps, rows, hidden) = (4, 5, 8);
    let (t, row, unit) = (1, 2, 4);
    for gate in 0..4 {
        let mut sweep = Sweep { kind, ..Sweep::new(rng, steps, rows, hidden, false, false, 1.0) };
        sweep.x[((t * rows + row) * 4 + gate) * hidden + unit] = NAN;
        cases.run(format!("NaN in gate {gate}"), |run| {
            sweep.launch(run, steps + 1, |run, launched| {
                let y = &launched.y;
                let at = |at: usize| (at / y.row / rows, at / y.row % rows, at % y.row);
                let hit = |at| matches!(at, (to, b, j) if b == row && (to > t || (to == t && j == unit + y.offset)));
                run.nan("y", &y.tensor, |word| !y.holds(word) || hit(at(word)))
            })
        })?;
    }
    let mut sweep = Sweep { kind, ..Sweep::new(rng, steps, rows, hidden, false, false, 1.0) };
    sweep.dy[(t * rows + row) * hidden + unit] = NAN;
    cases.run("NaN in dy", |run| {
        sweep.launch(run, steps + 1, |run, launched| {
            let dstates = launched.backward(run)?;
            let at = |at: usize| (at / (4 * hidden * rows), at / (4 * hidden) % rows, at % hidden);
            run.nan(
                "dslots",
                &launched.slots,
                |word| matches!(at(word), (to, b, j) if b == row && (to < t || (to == t && j == unit))),
            )?;
            run.nan("dc", &dstates.slice(rows * hidden, [rows * hidden]), |word| word / hidden == row)
        })
    })
}

/// Two sweeps over sequences of the same lengths, the second in reverse.
fn both_ways(rng: &mut Rng, kind: SweepKernel, [steps, rows, hidden]: [usize; 3], is_ragged: bool, acts: bool) -> [Sweep; 2] {
    let lengths = is_ragged.then(|| ragged(rng, steps, rows));
    [false, true].map(|reverse| Sweep {
        kind,
        acts,
        lengths: lengths.clone(),
        ..Sweep::new(rng, steps, rows, hidden, reverse, false, 1.0)
    })
}

/// Both directions at once give the bits of each by itself.
fn check_both(cases: &mut Cases<'_>, both: &[Sweep; 2]) -> Result<()> {
    let name = format!("both ways, {}{}", both[0].name(), if both[0].acts { ", zoneout, clip and flow" } else { "" });
    cases.run(name, |run| {
        for depth in [both[0].steps + 1, 2] {
            let mut alone = Vec::new();
            for sweep in both {
                launch(&[sweep], run, depth, |run, launched| {
                    alone.extend(results(launched, depth, run)?);
                    Ok(())
                })?;
            }
            launch(&both.each_ref(), run, depth, |run, launched| {
                for (direction, (words, alone)) in results(launched, depth, run)?.into_iter().zip(alone).enumerate() {
                    for ((name, words), (_, alone)) in words.into_iter().zip(alone) {
                        let name = format!("{name} of direction {direction}, {depth} states");
                        run.comparisons.push(Comparison::bits(name, &words, &alone));
                        run.words.extend(words);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// The words of buffers, by their names.
type Words = Vec<(&'static str, Vec<u32>)>;

/// All that sweeps leave, forward and, where every state is kept, backward: of each direction.
fn results(launched: &[Launched<'_>], depth: usize, run: &mut Run<'_>) -> Result<Vec<Words>> {
    let forward = |at: &Launched<'_>| -> Result<Words> {
        let tensors = [("y", &at.y.tensor), ("states", &at.states), ("saved", &at.slots)];
        tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.read_back()?))).collect()
    };
    let mut all = launched.iter().map(forward).collect::<Result<Vec<_>>>()?;
    if depth == launched[0].plan.steps + 1 {
        for ((words, at), dstates) in all.iter_mut().zip(launched).zip(backward(launched, run)?) {
            words.extend([("dslots", at.slots.read_back()?), ("dstates", dstates.read_back()?)]);
        }
    }
    Ok(all)
}

fn check_sweep(cases: &mut Cases<'_>, sweep: &Sweep) -> Result<()> {
    let (steps, rows, hidden) = (sweep.steps, sweep.rows, sweep.hidden);
    let expected = sweep.expected();
    cases.run(sweep.name(), |run| {
        sweep.launch(run, steps + 1, |run, launched| {
            run.near_window("y", &launched.y, &expected.y, OUTPUT)?;
            run.near("states", &launched.states, &expected.states, OUTPUT)?;
            let valid = |at: usize| within(sweep.lengths.as_deref(), rows, at / (4 * hidden));
            run.near_where("saved", &launched.slots, &expected.saved, OUTPUT, valid)?;
            let dstates = launched.backward(run)?;
            run.near("dslots", &launched.slots, &expected.dslots, GRADIENT)?;
            run.near("dstates", &dstates, &expected.dstates, GRADIENT)
        })?;
        // Without backward, memory of two states is enough.
        sweep.launch(run, 2, |run, launched| {
            run.near_window("y of two states", &launched.y, &expected.y, OUTPUT)?;
            let (block, last) = (rows * hidden, if sweep.reverse { 0 } else { steps });
            for s in 0..2 {
                let state = launched.states.slice((s * 2 + launched.plan.ends(2).1) * block, [block]);
                let expected = &expected.states[(s * (steps + 1) + last) * block..][..block];
                run.near(["last h of two states", "last c of two states"][s], &state, expected, OUTPUT)?;
            }
            Ok(())
        })
    })
}
