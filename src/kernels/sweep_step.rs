//! The sweep over time, one launch a step, for any cell: `shaders/sweep_step.wgsl` and its native twin.

use std::marker::PhantomData;

use super::cell_contract::{Block, CellKernel, Site, recurrent_runs};
use super::math::Lanes;
use super::{MAX_GROUPS, gemm};
use crate::backend::native::{Shared, for_parts, threads};
use crate::backend::params;
use crate::device::Backend;
use crate::error::Result;
use crate::rng::MaskKey;
use crate::tensor::{Lengths, Tensor};

params! {
    /// The shader's uniform struct.
    Sweep {
        rows: u32, hidden: u32, depth: u32,
        t: u32, before: u32, after: u32, later: u32, recurrent: u32,
        ragged: u32, keep: u32,
        y_stride: u32, y_offset: u32,
        key0: u32, key1: u32,
    }
}

/// A cell's forward sweep: this file's shader, the contract, the cell, the elementary functions.
macro_rules! forward_kernel {
    ($name:literal, $cell:literal) => {
        crate::backend::Kernel {
            name: $name,
            source: concat!(
                include_str!("../../shaders/sweep_step.wgsl"),
                include_str!("../../shaders/cell_contract.wgsl"),
                include_str!(concat!("../../shaders/", $cell)),
                include_str!("../../shaders/math.wgsl"),
            ),
            entry: "forward",
            params: crate::kernels::sweep_step::Sweep::LAYOUT,
            bindings: &[
                (1, crate::kernels::READ_WRITE),
                (2, crate::kernels::READ_WRITE),
                (3, crate::kernels::READ),
                (4, crate::kernels::READ),
                (5, crate::kernels::READ),
                (6, crate::kernels::READ_WRITE),
            ],
            workgroup: 64,
        }
    };
}
pub(crate) use forward_kernel;

/// The same with the backward entry point.
macro_rules! backward_kernel {
    ($name:literal, $cell:literal) => {
        crate::backend::Kernel {
            entry: "backward",
            bindings: &[
                (1, crate::kernels::READ_WRITE),
                (2, crate::kernels::READ_WRITE),
                (3, crate::kernels::READ),
                (4, crate::kernels::READ),
                (5, crate::kernels::READ),
                (6, crate::kernels::READ_WRITE),
                (7, crate::kernels::READ_WRITE),
            ],
            ..crate::kernels::sweep_step::forward_kernel!($name, $cell)
        }
    };
}
pub(crate) use backward_kernel;

/// Lanes of a workgroup; rows and, in backward, units of a lane, as in the shader.
const WORKGROUP: usize = 64;
const ROWS: usize = 4;
const UNITS: usize = 4;
/// A sweep of fewer multiply-adds than this runs on one thread.
const PARALLEL: usize = 1 << 23;
/// Units that [`Lanes`] hold.
const LANES: usize = Lanes::COUNT;

/// One direction of one layer over all of its steps.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'a> {
    /// T.
    pub steps: usize,
    /// B.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// From the last step to the first.
    pub reverse: bool,
    /// Valid steps of each row.
    pub lengths: Option<&'a Lengths>,
    /// Numbers of a row of y, all directions together.
    pub y_stride: usize,
    /// Where this direction's units start in it.
    pub y_offset: usize,
    /// Keys for random masks.
    pub key: MaskKey,
}

/// The buffers of a sweep.
pub(crate) struct Buffers<'a> {
    /// `[T, B, SLOTS, H]`. Forward: the input part of each gate comes in, what backward needs goes out. Backward: the
    /// gradients go out.
    pub slots: &'a Tensor,
    /// `[STATES, depth, B, H]`, with the initial state in slot 0 (reverse: the last slot). Depth T + 1 keeps every
    /// state, as backward needs; depth 2 keeps the newest two.
    pub states: &'a Tensor,
    /// Forward: W_hh transposed `[H, GATES * H]`, so that neighbouring units lie side by side. Backward: W_hh.
    pub weights: &'a Tensor,
    /// `[PARAMS, H]`.
    pub unit: &'a Tensor,
    /// `[T, B, y_stride]`. Forward: y goes out, zeros past a row's end. Backward: dy comes in.
    pub y: &'a Tensor,
}

impl Plan<'_> {
    /// Steps in the order of computation, with the slots of the state before and after.
    fn order(&self, depth: usize) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> + use<> {
        let (steps, reverse) = (self.steps, self.reverse);
        (0..steps).map(move |n| {
            let t = if reverse { steps - 1 - n } else { n };
            let (from, to) = if reverse { (t + 1, t) } else { (t, t + 1) };
            (t, from % depth, to % depth)
        })
    }

    /// The slot of the initial state, and that of the final one.
    pub fn ends(&self, depth: usize) -> (usize, usize) {
        if self.reverse { (self.steps % depth, 0) } else { (0, self.steps % depth) }
    }

    fn params(&self, depth: usize, t: usize, before: usize, after: usize) -> Sweep {
        let [key0, key1] = self.key.words();
        Sweep {
            rows: self.rows as u32,
            hidden: self.hidden as u32,
            depth: depth as u32,
            t: t as u32,
            before: before as u32,
            after: after as u32,
            later: 0,
            recurrent: 0,
            ragged: self.lengths.is_some().into(),
            keep: u32::from(depth > 2 || self.steps == 1),
            y_stride: self.y_stride as u32,
            y_offset: self.y_offset as u32,
            key0,
            key1,
        }
    }

    /// For lanes of `units` units each.
    fn groups(&self, units: usize) -> [u32; 3] {
        let tiles = self.rows.div_ceil(ROWS);
        let y = tiles.min(MAX_GROUPS);
        [self.hidden.div_ceil(units).div_ceil(WORKGROUP) as u32, y as u32, tiles.div_ceil(y) as u32]
    }

    fn is_valid(&self, t: usize, row: usize) -> bool {
        self.lengths.is_none_or(|lengths| t < lengths.host()[row] as usize)
    }

    /// Parts of the batch that are worth a thread each.
    fn parts<C: CellKernel>(&self) -> usize {
        let work = self.steps * self.rows * self.hidden * self.hidden * C::Pre::LEN;
        if work < PARALLEL { 1 } else { threads() }
    }

    #[inline(always)]
    fn site(&self, t: usize, row: usize, unit: usize) -> Site {
        Site { key: self.key.words(), t: t as u32, row: row as u32, unit: unit as u32 }
    }

    fn depth<C: CellKernel>(&self, states: &Tensor) -> usize {
        states.len() / (C::State::LEN * self.rows * self.hidden)
    }
}

/// Runs the cell over all steps: fills y, the states, and what backward needs.
pub(crate) fn forward<C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'_>) -> Result<()> {
    let Buffers { slots, states, weights, unit, y } = buffers;
    let depth = plan.depth::<C>(states);
    match slots.device().backend() {
        Backend::Native => {
            native_forward::<C>(plan, buffers, depth);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let lengths = plan.lengths.map_or(*unit, |lengths| lengths.tensor());
            let bindings = [slots.range(), states.range(), weights.range(), unit.range(), lengths.range(), y.range()];
            let steps = plan.order(depth).map(|(t, from, to)| (plan.params(depth, t, from, to), plan.groups(1)));
            gpu.launch_each(C::FORWARD, &bindings, steps)
        }
    }
}

/// Runs the cell backward over all steps. `dstates [STATES, B, H]`: the gradient of the final state comes in, that of
/// the initial state goes out, but for the part that comes through the first step's product.
pub(crate) fn backward<C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'_>, dstates: &Tensor) -> Result<()> {
    let Buffers { slots, states, weights, unit, y } = buffers;
    let depth = plan.steps + 1;
    debug_assert_eq!(plan.depth::<C>(states), depth, "backward needs every state");
    match slots.device().backend() {
        Backend::Native => {
            native_backward::<C>(plan, buffers, dstates);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let lengths = plan.lengths.map_or(*unit, |lengths| lengths.tensor());
            let mut bindings = vec![slots.range(), states.range(), weights.range(), unit.range(), lengths.range()];
            bindings.extend([y.range(), dstates.range()]);
            let mut later = None;
            let steps = plan.order(depth).rev().map(|(t, from, to)| {
                let recurrent = u32::from(later.is_some());
                let params = Sweep { later: later.unwrap_or(0), recurrent, ..plan.params(depth, t, from, to) };
                later = Some(t as u32);
                (params, plan.groups(UNITS))
            });
            gpu.launch_each(C::BACKWARD, &bindings, steps)
        }
    }
}

/// One step of some rows. A struct and no closure, because [`pulp`] inlines it whole into code for the widest vectors.
struct ForwardStep<'a, C> {
    plan: &'a Plan<'a>,
    depth: usize,
    /// (t, slot of the state before, slot of the state after)
    step: (usize, usize, usize),
    /// (first, count)
    rows: (usize, usize),
    /// [count, GATES * H]
    product: &'a [f32],
    unit: &'a [f32],
    slots: &'a Shared<'a>,
    states: &'a Shared<'a>,
    y: &'a Shared<'a>,
    cell: PhantomData<C>,
}

impl<C: CellKernel> pulp::WithSimd for ForwardStep<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { plan, depth, step: (t, before, after), rows: (first, count), product, .. } = self;
        let (rows, hidden) = (plan.rows, plan.hidden);
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        for row in first..first + count {
            let state_at = |s: usize, slot: usize| ((s * depth + slot) * rows + row) * hidden;
            // SAFETY: here and below: parts of one row of each buffer, which this thread owns, and no two overlap.
            let slots = unsafe { self.slots.slice((t * rows + row) * kept, kept) };
            // SAFETY: as above.
            let y = unsafe { self.y.slice((t * rows + row) * plan.y_stride + plan.y_offset, hidden) };
            if !plan.is_valid(t, row) {
                y.fill(0.0);
                for s in 0..C::State::LEN {
                    // SAFETY: as above; the slots before and after differ.
                    let old = unsafe { self.states.slice(state_at(s, before), hidden) };
                    // SAFETY: as above.
                    unsafe { self.states.slice(state_at(s, after), hidden) }.copy_from_slice(old);
                }
                continue;
            }
            let r = &product[(row - first) * gates..][..gates];
            // The width of the full blocks is a constant in the inlined call: their loads and stores are single instructions.
            let full = hidden / LANES * LANES;
            for at in (0..full).step_by(LANES) {
                self.units((row, at, LANES), r, slots, y);
            }
            if full < hidden {
                self.units((row, full, hidden - full), r, slots, y);
            }
        }
    }
}

impl<C: CellKernel> ForwardStep<'_, C> {
    /// `width` units of a row from unit `at` on; `r`, `slots` and `y` are that row's.
    #[inline(always)]
    fn units(&self, (row, at, width): (usize, usize, usize), r: &[f32], slots: &mut [f32], y: &mut [f32]) {
        let Self { plan, depth, step: (t, before, after), unit, states, .. } = *self;
        let hidden = plan.hidden;
        let state_at = |s: usize, slot: usize| ((s * depth + slot) * plan.rows + row) * hidden + at;
        let x = C::Pre::from_fn(|g| Lanes::load(&slots[g * hidden + at..][..width]));
        let r = C::Pre::from_fn(|g| Lanes::load(&r[g * hidden + at..][..width]));
        let p = C::Unit::from_fn(|i| Lanes::load(&unit[i * hidden + at..][..width]));
        // SAFETY: here and below: parts of a row that this thread owns, and no two overlap.
        let previous = C::State::from_fn(|s| Lanes::load(unsafe { states.slice(state_at(s, before), width) }));
        let (state, saved) = C::forward(plan.site(t, row, at), x, r, previous, p);
        for (s, value) in state.lanes().iter().enumerate() {
            // SAFETY: as above.
            value.store(unsafe { states.slice(state_at(s, after), width) });
        }
        for (s, value) in saved.lanes().iter().enumerate() {
            value.store(&mut slots[s * hidden + at..][..width]);
        }
        state.lanes()[0].store(&mut y[at..][..width]);
    }
}

fn native_forward<C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'_>, depth: usize) {
    let (rows, hidden) = (plan.rows, plan.hidden);
    let gates = C::Pre::LEN * hidden;
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let mut states = buffers.states.native_mut::<f32>();
    let (mut slots, mut y) = (buffers.slots.native_mut::<f32>(), buffers.y.native_mut::<f32>());
    let (slots, states, y) = (Shared::new(&mut slots), Shared::new(&mut states), Shared::new(&mut y));
    let (unit, arch) = (&*unit, pulp::Arch::new());
    // Rows never meet: a part runs through all of its steps without waiting for another.
    for_parts(rows, plan.parts::<C>(), |first, count| {
        let mut product = vec![0.0f32; count * gates];
        for step @ (_, before, _) in plan.order(depth) {
            // SAFETY: rows of this part alone, and nothing else of the states is borrowed.
            let h = unsafe { states.slice((before * rows + first) * hidden, count * hidden) };
            gemm::multiply([count, gates, hidden], (h, hidden, 1), (&weights, gates, 1), (&mut product, gates), false, 1);
            let (rows, product, cell) = ((first, count), &*product, PhantomData::<C>);
            arch.dispatch(ForwardStep { plan, depth, step, rows, product, unit, slots: &slots, states: &states, y: &y, cell });
        }
    });
}

/// One step of some rows, backward.
struct BackwardStep<'a, C> {
    plan: &'a Plan<'a>,
    t: usize,
    /// Slot of the state before the step.
    before: usize,
    /// (first, count)
    rows: (usize, usize),
    unit: &'a [f32],
    states: &'a [f32],
    dy: &'a [f32],
    slots: &'a Shared<'a>,
    dstates: &'a Shared<'a>,
    cell: PhantomData<C>,
}

impl<C: CellKernel> pulp::WithSimd for BackwardStep<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { plan, t, rows: (first, count), dy, .. } = self;
        let (rows, hidden) = (plan.rows, plan.hidden);
        let kept = C::Slots::LEN * hidden;
        for row in first..first + count {
            // SAFETY: here and below: parts of one row of each buffer, which this thread owns, and no two overlap.
            let slots = unsafe { self.slots.slice((t * rows + row) * kept, kept) };
            if !plan.is_valid(t, row) {
                slots.fill(0.0);
                continue;
            }
            let dy = &dy[(t * rows + row) * plan.y_stride + plan.y_offset..][..hidden];
            let full = hidden / LANES * LANES;
            for at in (0..full).step_by(LANES) {
                self.units((row, at, LANES), dy, slots);
            }
            if full < hidden {
                self.units((row, full, hidden - full), dy, slots);
            }
        }
    }
}

impl<C: CellKernel> BackwardStep<'_, C> {
    /// `width` units of a row from unit `at` on; `dy` and `slots` are that row's.
    #[inline(always)]
    fn units(&self, (row, at, width): (usize, usize, usize), dy: &[f32], slots: &mut [f32]) {
        let Self { plan, t, before, unit, states, dstates, .. } = *self;
        let (rows, hidden, depth) = (plan.rows, plan.hidden, plan.steps + 1);
        let saved = C::Slots::from_fn(|s| Lanes::load(&slots[s * hidden + at..][..width]));
        let p = C::Unit::from_fn(|i| Lanes::load(&unit[i * hidden + at..][..width]));
        let previous = C::State::from_fn(|s| Lanes::load(&states[((s * depth + before) * rows + row) * hidden + at..][..width]));
        let d = C::State::from_fn(|s| {
            // SAFETY: here and below: parts of a row that this thread owns, and no two overlap.
            let d = Lanes::load(unsafe { dstates.slice((s * rows + row) * hidden + at, width) });
            if s == 0 { d + Lanes::load(&dy[at..][..width]) } else { d }
        });
        let (gradients, direct) = C::backward(plan.site(t, row, at), saved, previous, p, d);
        for (s, value) in gradients.lanes().iter().enumerate() {
            value.store(&mut slots[s * hidden + at..][..width]);
        }
        for (s, value) in direct.lanes().iter().enumerate() {
            // SAFETY: as above.
            value.store(unsafe { dstates.slice((s * rows + row) * hidden + at, width) });
        }
    }
}

fn native_backward<C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'_>, dstates: &Tensor) {
    let (rows, hidden) = (plan.rows, plan.hidden);
    let kept = C::Slots::LEN * hidden;
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let (states, dy) = (buffers.states.native::<f32>(), buffers.y.native::<f32>());
    let (mut slots, mut dstates) = (buffers.slots.native_mut::<f32>(), dstates.native_mut::<f32>());
    let (slots, dstates) = (Shared::new(&mut slots), Shared::new(&mut dstates));
    let (unit, states, dy, arch) = (&*unit, &*states, &*dy, pulp::Arch::new());
    let runs = recurrent_runs::<C>();
    // Rows never meet: a part runs through all of its steps without waiting for another.
    for_parts(rows, plan.parts::<C>(), |first, count| {
        let mut later = None;
        for (t, before, _) in plan.order(plan.steps + 1).rev() {
            if let Some(later) = later {
                // The gradient that comes back through W_hh from the step handled before.
                // SAFETY: rows of this part alone, and nothing else of the two buffers is borrowed.
                let dr = unsafe { slots.slice((later * rows + first) * kept, count * kept) };
                // SAFETY: as above.
                let dh = unsafe { dstates.slice(first * hidden, count * hidden) };
                for (gate, slot, run) in &runs {
                    let w = &weights[gate * hidden * hidden..];
                    let sizes = [count, hidden, run * hidden];
                    let dr = &dr[slot * hidden..];
                    gemm::multiply(sizes, (dr, kept, 1), (w, hidden, 1), (dh, hidden), true, 1);
                }
            }
            later = Some(t);
            let (rows, cell) = ((first, count), PhantomData::<C>);
            arch.dispatch(BackwardStep { plan, t, before, rows, unit, states, dy, slots: &slots, dstates: &dstates, cell });
        }
    });
}
