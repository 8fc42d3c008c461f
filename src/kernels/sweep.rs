//! What all sweeps over time share: the plan of a direction of a layer, its buffers, and which sweep runs.

use std::borrow::Borrow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::cell_contract::{Block, CellKernel};
use super::choice;
use super::sweep_grid;
use super::sweep_resident;
use super::sweep_scan::{self, ScanKernels};
use crate::backend::gpu::Range;
use crate::device::{Backend, Device};
use crate::rng::MaskKey;
use crate::tensor::{ALIGNMENT, Lengths, Tensor};

/// Steps one after another, as their direction reads them, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: usize,
    pub count: usize,
}

impl Run {
    /// All of so many.
    pub fn whole(count: usize) -> Self {
        Self { first: 0, count }
    }

    /// The number after the last.
    pub fn end(self) -> usize {
        self.first + self.count
    }
}

/// One direction of one layer over all of its steps, of which a sweep takes a run.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'a> {
    /// T.
    pub steps: usize,
    /// What a sweep takes of them: all, or in a wavefront of layers a part. Runs follow each other in the order of the sweep.
    pub run: Run,
    /// B.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// From the last step to the first.
    pub reverse: bool,
    /// Valid steps of each row.
    pub lengths: Option<&'a Lengths>,
    /// Whether y is the state 0, and not made of it elsewhere.
    pub output: bool,
    /// Numbers of a row of y, all directions together.
    pub y_stride: usize,
    /// Where this direction's units start in it.
    pub y_offset: usize,
    /// Keys for random masks.
    pub key: MaskKey,
    /// Steps of the sequence before step 0, for the masks.
    pub start: usize,
    /// Steps of the sequence that this is a window of: the sweep that suits the whole is taken for each window, so that the bits are
    /// the same.
    pub total: usize,
    /// Whether zoneout draws, as in training, or takes its mean.
    pub random: bool,
    /// What part of h, and of the other states, is held back; 0: none.
    pub zoneout: [f32; 2],
    /// In backward, a bound for each element of the gradient of the state that later steps give; 0: none.
    pub clip: f32,
    /// In backward, whether to keep the whole gradient of the states after every step.
    pub flow: bool,
}

/// The buffers of a sweep.
#[derive(Clone, Copy)]
pub(crate) struct Buffers<'a> {
    /// `[T, B, SLOTS, H]`. Forward: the input part of each gate comes in (not where [`forms_inputs`]), what backward needs goes out.
    /// Backward: the gradients go out.
    pub slots: &'a Tensor,
    /// `[STATES, depth, B, H]`, with the initial state in slot 0 (reverse: the last slot). Depth T + 1 keeps every
    /// state, as backward needs; depth 2 keeps the newest two.
    pub states: &'a Tensor,
    /// Forward: W_hh as [`super::sweep_step::forward_weights`] gives it. Backward: W_hh. Not read by [`super::sweep_split`].
    pub weights: &'a Tensor,
    /// `[unit parameters, H]`; with layer normalization more lines, see [`super::sweep_rows::RowNorms`].
    pub unit: &'a Tensor,
    /// `[T, B, y_stride]`. Forward: y goes out, zeros past a row's end. Backward: dy comes in. Without [`Plan::output`] any
    /// tensor that is none of the others.
    pub y: &'a Tensor,
}

/// A direction of a layer, for a sweep. On a GPU a sweep of steps may run two at once ([`at_once`]): both directions of a layer, or the
/// runs of two layers. Their plans differ in what hangs on that alone, the runs are equally long, and each buffer of the second lies behind
/// that of the first ([`Tensor::behind_each_other`]).
#[derive(Clone, Copy)]
pub(crate) struct Side<'a> {
    pub plan: Plan<'a>,
    pub buffers: Buffers<'a>,
}

/// What a sweep that forms the input part of the gates itself makes it of. See [`forms_inputs`].
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// `[T, B, inputs]`
    pub x: &'a Tensor,
    /// W_ih as [`super::sweep_step::input_weights`] gives it.
    pub weights: &'a Tensor,
    /// b_ih `[GATES * H]`.
    pub bias: Option<&'a Tensor>,
    /// Whether the slots take what backward needs; else they play no part.
    pub keep: bool,
}

/// A sweep of whole steps on a GPU; `kernels::choice` picks one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SweepKernel {
    /// All steps at once, for cells that are linear in their state.
    Scan,
    /// The loop over time inside the kernel, for few units.
    Resident,
    /// The same, with the units spread over workgroups that run at once. Should they come to a halt, another launch does the rest, slowly,
    /// to the same bits. Not yet run on any hardware; software adapters take small sizes alone (a shader's loops end after 65535 rounds).
    Grid,
    /// A launch a step.
    Step,
}

impl fmt::Display for SweepKernel {
    /// Its name as serde knows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl SweepKernel {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Scan, Self::Resident, Self::Grid, Self::Step];

    /// Whether the sweep can do this.
    pub(crate) fn takes<C: CellKernel>(self, plan: &Plan<'_>) -> bool {
        match self {
            Self::Scan => C::SCAN.is_some() && sweep_scan::fits(plan),
            Self::Resident => sweep_resident::fits::<C>(plan),
            Self::Grid => sweep_grid::fits::<C>(plan),
            Self::Step => true,
        }
    }
}

/// How the layers of a stack follow each other on a GPU; `kernels::choice` picks one. It shows in no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LayerOrder {
    /// Each takes all steps before the next one begins.
    InTurn,
    /// Two layers go at once, the upper one a block of steps behind the lower one: where time is read forward, and steps are not made of more
    /// than their products.
    Wavefront,
}

impl fmt::Display for LayerOrder {
    /// Its name as serde knows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl LayerOrder {
    /// Both.
    pub const ALL: [Self; 2] = [Self::InTurn, Self::Wavefront];
}

/// The sweeps, from one launch to many.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sweep {
    /// All steps at once.
    Scan(&'static ScanKernels),
    /// The loop over time inside the kernel.
    Resident,
    /// The same, with the units spread over workgroups that run at once.
    Grid,
    /// A launch a step.
    Step,
}

/// Which sweep of whole steps runs, forward or backward. It may wait for the device, once a kernel: see [`sweep_grid`].
pub(crate) fn choose<C: CellKernel>(device: &Device, cell: &C, plan: &Plan<'_>, backward: bool) -> Sweep {
    match device.backend() {
        Backend::Native => Sweep::Step,
        Backend::Gpu(gpu) => match choice::sweep(device, gpu, cell, plan, backward) {
            SweepKernel::Scan => C::SCAN.map_or(Sweep::Step, Sweep::Scan),
            SweepKernel::Resident => Sweep::Resident,
            SweepKernel::Grid => Sweep::Grid,
            SweepKernel::Step => Sweep::Step,
        },
    }
}

/// Whether two directions or layers may be sides of one sweep: on a GPU, where buffers of both fit in one. `width`: that of what recurs;
/// `norms`: of what layer normalization keeps of a row. It shows in no bit.
pub(crate) fn at_once<C: CellKernel>(device: &Device, cell: &C, plan: &Plan<'_>, [width, norms]: [usize; 2]) -> bool {
    let Backend::Gpu(gpu) = device.backend() else { return false };
    let lines = plan.steps * plan.rows;
    let states = (plan.steps + 1) * plan.rows;
    let slots = (C::Slots::LEN * lines).max(C::Pre::LEN * width); // or the weights
    let dstates = Plan { flow: true, ..*plan }.dstates_len(cell); // it may be wanted later
    let largest = [C::State::LEN * states * plan.hidden, states * width, slots * plan.hidden, dstates, lines * norms];
    gpu.fits(2 * largest.into_iter().fold(0, usize::max) + ALIGNMENT)
}

/// From so many rows on a sweep on the CPU forms the product with W_ih as well: with fewer it would read W_ih again at every step for
/// too little.
const INPUT_ROWS: usize = 8;

/// Whether a forward sweep forms the input part of the gates itself. `split`: whether it is that of [`super::sweep_split`]. It shows in no
/// bit.
pub(crate) fn forms_inputs(device: &Device, plan: &Plan<'_>, split: bool) -> bool {
    matches!(device.backend(), Backend::Native) && !split && plan.rows >= INPUT_ROWS
}

/// A step of a sweep: t, the slot of the state before it and the slot after it.
pub(crate) type Step = (usize, usize, usize);

impl<'a> Plan<'a> {
    /// The steps of the run in the order of computation.
    pub fn order(&self, depth: usize) -> impl DoubleEndedIterator<Item = Step> + use<> {
        let (steps, reverse, run) = (self.steps, self.reverse, self.run);
        (run.first..run.end()).map(move |n| {
            let t = if reverse { steps - 1 - n } else { n };
            let (from, to) = if reverse { (t + 1, t) } else { (t, t + 1) };
            (t, from % depth, to % depth)
        })
    }

    /// The slot of the initial state, and that of the final one.
    pub fn ends(&self, depth: usize) -> (usize, usize) {
        if self.reverse { (self.steps % depth, 0) } else { (0, self.steps % depth) }
    }

    /// Words of `dstates`: the state's gradient, and room for sums and for the flow where they are wanted.
    pub fn dstates_len<C: CellKernel>(&self, cell: &C) -> usize {
        let flow = if self.flow { self.steps * C::State::LEN * self.rows * self.hidden } else { 0 };
        self.after_sums(cell) + flow
    }

    /// Where the flow lies in `dstates`: the first word of `[T, STATES, B, H]`, zeros past a row's end.
    pub fn flow_at<C: CellKernel>(&self, cell: &C) -> Option<usize> {
        self.flow.then(|| self.after_sums(cell))
    }

    pub(super) fn after_sums<C: CellKernel>(&self, cell: &C) -> usize {
        C::State::LEN * self.rows * self.hidden + self.sums_len(cell)
    }

    /// Words of the sums, which follow the state's gradient in `dstates`: `[tiles of rows, extras + 1, H]`, the last line of a tile
    /// that of the clip's counts. A sweep whose tiles have more than a row leaves the last ones as they are.
    pub fn sums_len<C: CellKernel>(&self, cell: &C) -> usize {
        if self.sums(cell) { self.rows * (cell.extras() + 1) * self.hidden } else { 0 }
    }

    pub(super) fn sums<C: CellKernel>(&self, cell: &C) -> bool {
        cell.extras() > 0 || self.clip > 0.0
    }

    /// The cell's constants, and those of a sweep's shader.
    pub(super) fn constants<C: CellKernel>(&self, cell: &C, backward: bool) -> Vec<(&'static str, f64)> {
        let mut constants = cell.constants();
        constants.push(("zoneout", f64::from(u8::from(self.zoneout != [0.0; 2]))));
        constants.push(("sums", f64::from(u8::from(backward && self.sums(cell)))));
        constants.push(("flow", f64::from(u8::from(backward && self.flow))));
        constants
    }

    /// Whether a forward sweep keeps what backward needs, where `states` have this depth.
    pub(super) fn keeps(&self, depth: usize) -> bool {
        depth > 2 || self.steps == 1
    }

    #[inline(always)]
    pub fn is_valid(&self, t: usize, row: usize) -> bool {
        self.lengths.is_none_or(|lengths| t < lengths.host()[row] as usize)
    }

    pub fn depth<C: CellKernel>(&self, states: &Tensor) -> usize {
        states.len() / (C::State::LEN * self.rows * self.hidden)
    }
}

/// What belongs to all sides, one behind the other.
pub(super) fn range(tensors: &[impl Borrow<Tensor>]) -> Range {
    tensors[0].borrow().range_to(tensors[tensors.len() - 1].borrow())
}

/// Words from what the first side has to what the second has.
pub(super) fn words(tensors: &[impl Borrow<Tensor>]) -> u32 {
    tensors[0].borrow().words_to(tensors[tensors.len() - 1].borrow()) as u32
}

/// What the shaders of sweeps bind, from the slots to y: of all sides at once.
pub(super) fn bindings(sides: &[Side<'_>]) -> [Range; 6] {
    let (from, to) = (&sides[0].buffers, &sides[sides.len() - 1].buffers);
    // Without lengths something must still be bound in their place.
    let lengths = sides[0].plan.lengths.map_or(from.unit, |lengths| lengths.tensor());
    [
        from.slots.range_to(to.slots),
        from.states.range_to(to.states),
        from.weights.range_to(to.weights),
        from.unit.range_to(to.unit),
        lengths.range(),
        from.y.range_to(to.y),
    ]
}
