//! The sweep over time, one launch a step, for any cell: `shaders/sweep_step.wgsl` and its native twin.

use super::cell_contract::{Block, CellKernel, Site};
use super::gemm;
use super::math::Lanes;
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
/// Fewer units than this in a step are computed by one thread.
const PARALLEL: usize = 1 << 13;
/// Units that [`Lanes`] hold.
const LANES: usize = 16;

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
    /// W_hh `[GATES * H, H]`; forward on a GPU: its transpose.
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
        [self.hidden.div_ceil(units).div_ceil(WORKGROUP) as u32, self.rows.div_ceil(ROWS) as u32, 1]
    }

    fn is_valid(&self, t: usize, row: usize) -> bool {
        self.lengths.is_none_or(|lengths| t < lengths.host()[row] as usize)
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

/// Calls `work(first row, rows)` for parts of the batch, on several threads where that pays.
fn for_rows(plan: &Plan<'_>, work: impl Fn(usize, usize) + Sync) {
    let threads = rayon::current_num_threads().min(plan.rows);
    if plan.rows * plan.hidden < PARALLEL || threads == 1 {
        return work(0, plan.rows);
    }
    let part = plan.rows.div_ceil(threads);
    rayon::scope(|scope| {
        for first in (part..plan.rows).step_by(part) {
            let work = &work;
            scope.spawn(move |_| work(first, part.min(plan.rows - first)));
        }
        work(0, part);
    });
}

/// Memory that several threads write at places that differ from thread to thread.
struct Shared(*mut f32, usize);

// SAFETY: a thread touches only the rows that `for_rows` gave it, and rows do not overlap.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(slice: &mut [f32]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// The `len` numbers from `start` on.
    ///
    /// # Safety
    /// No other thread may use them, nor may this one through another slice that is still alive.
    #[expect(clippy::mut_from_ref, reason = "each caller owns the rows that it asks for")]
    unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.1);
        // SAFETY: inside the allocation, by the assertion; alone, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

fn native_forward<C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'_>, depth: usize) {
    let (rows, hidden) = (plan.rows, plan.hidden);
    let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let mut states = buffers.states.native_mut::<f32>();
    let (mut slots, mut y) = (buffers.slots.native_mut::<f32>(), buffers.y.native_mut::<f32>());
    let mut product = vec![0.0f32; rows * gates];
    let arch = pulp::Arch::new();
    for (t, from, to) in plan.order(depth) {
        let h = &states[from * rows * hidden..][..rows * hidden];
        gemm::multiply([rows, gates, hidden], (h, hidden, 1), (&weights, 1, hidden), (&mut product, gates), false);

        let (slots, states, y) = (Shared::new(&mut slots), Shared::new(&mut states), Shared::new(&mut y));
        let state_at = |s: usize, slot: usize, row: usize| ((s * depth + slot) * rows + row) * hidden;
        for_rows(plan, |first, count| {
            arch.dispatch(|| {
                for row in first..first + count {
                    // SAFETY: these are parts of one row of each buffer, and no two of them overlap.
                    let slots = unsafe { slots.slice((t * rows + row) * kept, kept) };
                    let y = unsafe { y.slice((t * rows + row) * plan.y_stride + plan.y_offset, hidden) };
                    let r = &product[row * gates..][..gates];
                    if !plan.is_valid(t, row) {
                        y.fill(0.0);
                        for s in 0..C::State::LEN {
                            // SAFETY: as above; the slots `from` and `to` differ.
                            let (old, new) = unsafe {
                                (states.slice(state_at(s, from, row), hidden), states.slice(state_at(s, to, row), hidden))
                            };
                            new.copy_from_slice(old);
                        }
                        continue;
                    }
                    for unit0 in (0..hidden).step_by(LANES) {
                        let width = LANES.min(hidden - unit0);
                        let site = site(plan, t, row, unit0);
                        let x = C::Pre::from_fn(|g| Lanes::load(&slots[g * hidden + unit0..][..width]));
                        let r = C::Pre::from_fn(|g| Lanes::load(&r[g * hidden + unit0..][..width]));
                        let p = C::Unit::from_fn(|i| Lanes::load(&unit[i * hidden + unit0..][..width]));
                        // SAFETY: as above.
                        let previous =
                            C::State::from_fn(|s| unsafe { Lanes::load(states.slice(state_at(s, from, row) + unit0, width)) });
                        let (state, saved) = C::forward(site, x, r, previous, p);
                        for (s, value) in state.lanes().iter().enumerate() {
                            // SAFETY: as above.
                            value.store(unsafe { states.slice(state_at(s, to, row) + unit0, width) });
                        }
                        for (s, value) in saved.lanes().iter().enumerate() {
                            value.store(&mut slots[s * hidden + unit0..][..width]);
                        }
                        state.lanes()[0].store(&mut y[unit0..][..width]);
                    }
                }
            });
        });
    }
}

fn native_backward<C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'_>, dstates: &Tensor) {
    let (rows, hidden, depth) = (plan.rows, plan.hidden, plan.steps + 1);
    let kept = C::Slots::LEN * hidden;
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let (states, dy) = (buffers.states.native::<f32>(), buffers.y.native::<f32>());
    let mut slots = buffers.slots.native_mut::<f32>();
    let mut dstates = dstates.native_mut::<f32>();
    let runs = super::cell_contract::recurrent_runs::<C>();
    let arch = pulp::Arch::new();
    let mut later = None;
    for (t, from, _) in plan.order(depth).rev() {
        if let Some(later) = later {
            // The gradient that comes back through W_hh from the step handled before.
            for (gate, slot, count) in &runs {
                let dr = &slots[later * rows * kept + slot * hidden..];
                let w = &weights[gate * hidden * hidden..];
                let dh = &mut dstates[..rows * hidden];
                gemm::multiply([rows, hidden, count * hidden], (dr, kept, 1), (w, hidden, 1), (dh, hidden), true);
            }
        }
        later = Some(t);

        let (slots, dstates) = (Shared::new(&mut slots), Shared::new(&mut dstates));
        for_rows(plan, |first, count| {
            arch.dispatch(|| {
                for row in first..first + count {
                    // SAFETY: these are parts of one row of each buffer, and no two of them overlap.
                    let slots = unsafe { slots.slice((t * rows + row) * kept, kept) };
                    if !plan.is_valid(t, row) {
                        slots.fill(0.0);
                        continue;
                    }
                    let dy = &dy[(t * rows + row) * plan.y_stride + plan.y_offset..][..hidden];
                    for unit0 in (0..hidden).step_by(LANES) {
                        let width = LANES.min(hidden - unit0);
                        let site = site(plan, t, row, unit0);
                        let saved = C::Slots::from_fn(|s| Lanes::load(&slots[s * hidden + unit0..][..width]));
                        let p = C::Unit::from_fn(|i| Lanes::load(&unit[i * hidden + unit0..][..width]));
                        let previous = C::State::from_fn(|s| {
                            Lanes::load(&states[((s * depth + from) * rows + row) * hidden + unit0..][..width])
                        });
                        let d = C::State::from_fn(|s| {
                            // SAFETY: as above.
                            let d = Lanes::load(unsafe { dstates.slice((s * rows + row) * hidden + unit0, width) });
                            if s == 0 { d + Lanes::load(&dy[unit0..][..width]) } else { d }
                        });
                        let (gradients, direct) = C::backward(site, saved, previous, p, d);
                        for (s, value) in gradients.lanes().iter().enumerate() {
                            value.store(&mut slots[s * hidden + unit0..][..width]);
                        }
                        for (s, value) in direct.lanes().iter().enumerate() {
                            // SAFETY: as above.
                            value.store(unsafe { dstates.slice((s * rows + row) * hidden + unit0, width) });
                        }
                    }
                }
            });
        });
    }
}

#[inline(always)]
fn site(plan: &Plan<'_>, t: usize, row: usize, unit: usize) -> Site {
    Site { key: plan.key.words(), t: t as u32, row: row as u32, unit: unit as u32 }
}
