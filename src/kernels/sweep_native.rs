//! The sweep over time on the CPU, for any cell: the twin of `shaders/sweep_step.wgsl`.

use super::activation::clip_to;
use super::cell_contract::{Backward, Block, CellKernel, Site, recurrent_runs};
use super::gemm;
use super::math::Lanes;
use super::sweep::{Buffers, Plan, Step};
use crate::backend::native::{Shared, for_parts, threads};
use crate::rng::{philox, unit as unit_f32};
use crate::tensor::Tensor;

/// A sweep of fewer multiply-adds than this runs on one thread.
const PARALLEL: usize = 1 << 23;
/// Units that [`Lanes`] hold.
const LANES: usize = Lanes::COUNT;
/// Tells zoneout's draws from others under one key, as in the shader.
const HOLD: u32 = 0x686f_6c64;

impl Plan<'_> {
    /// Parts of the batch that are worth a thread each, for a sweep of `steps` steps.
    fn parts<C: CellKernel>(&self, steps: usize) -> usize {
        let width = if C::PRODUCT { self.hidden } else { 1 };
        if steps * self.rows * self.hidden * width * C::Pre::LEN < PARALLEL { 1 } else { threads() }
    }

    #[inline(always)]
    fn site(&self, t: usize, row: usize, unit: usize) -> Site {
        Site { key: self.key.words(), t: (self.start + t) as u32, row: row as u32, unit: unit as u32 }
    }

    /// What part of state `s` is held back at sixteen units; the twin of `hold.wgsl`.
    #[inline(always)]
    fn held(&self, site: Site, s: usize) -> Lanes {
        let probability = self.zoneout[s.min(1)];
        let mut lanes = Lanes::splat(probability);
        if self.random {
            for (lane, unit) in lanes.0.iter_mut().zip(site.unit..) {
                let [bits, ..] = philox(site.key, [unit, site.row, site.t, HOLD + s as u32]);
                *lane = f32::from(unit_f32(bits) < probability);
            }
        }
        lanes
    }
}

/// One step of some rows. A struct and no closure, because [`pulp`] inlines it whole into code for the widest vectors.
struct ForwardStep<'a, C> {
    cell: C,
    plan: &'a Plan<'a>,
    depth: usize,
    step: Step,
    /// (first, count)
    rows: (usize, usize),
    /// [count, GATES * H]
    product: &'a [f32],
    unit: &'a [f32],
    slots: &'a Shared<'a>,
    states: &'a Shared<'a>,
    y: &'a Shared<'a>,
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
            let y: &mut [f32] = match plan.output {
                // SAFETY: as above.
                true => unsafe { self.y.slice((t * rows + row) * plan.y_stride + plan.y_offset, hidden) },
                false => &mut [],
            };
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
            let r = if C::PRODUCT { &product[(row - first) * gates..][..gates] } else { &[] };
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

/// The unit parameters of `width` units from `at` on.
#[inline(always)]
fn load_unit<C: CellKernel>(cell: &C, unit: &[f32], hidden: usize, (at, width): (usize, usize)) -> C::Unit {
    let count = cell.unit_params();
    C::Unit::from_fn(|i| if i < count { Lanes::load(&unit[i * hidden + at..][..width]) } else { Lanes::splat(0.0) })
}

impl<C: CellKernel> ForwardStep<'_, C> {
    /// `width` units of a row from unit `at` on; `r`, `slots` and `y` are that row's.
    #[inline(always)]
    fn units(&self, (row, at, width): (usize, usize, usize), r: &[f32], slots: &mut [f32], y: &mut [f32]) {
        let Self { cell, plan, depth, step: (t, before, after), unit, states, .. } = *self;
        let hidden = plan.hidden;
        let state_at = |s: usize, slot: usize| ((s * depth + slot) * plan.rows + row) * hidden + at;
        let x = C::Pre::from_fn(|g| Lanes::load(&slots[g * hidden + at..][..width]));
        let r = C::Pre::from_fn(|g| match C::PRODUCT {
            true => Lanes::load(&r[g * hidden + at..][..width]),
            false => Lanes::splat(0.0),
        });
        let p = load_unit(&cell, unit, hidden, (at, width));
        // SAFETY: here and below: parts of a row that this thread owns, and no two overlap.
        let previous = C::State::from_fn(|s| Lanes::load(unsafe { states.slice(state_at(s, before), width) }));
        let site = plan.site(t, row, at);
        let (mut state, saved) = cell.forward(site, x, r, previous, p);
        if plan.zoneout != [0.0; 2] {
            state = C::State::from_fn(|s| {
                let k = plan.held(site, s);
                k * previous.lanes()[s] + (Lanes::splat(1.0) - k) * state.lanes()[s]
            });
        }
        for (s, value) in state.lanes().iter().enumerate() {
            // SAFETY: as above.
            value.store(unsafe { states.slice(state_at(s, after), width) });
        }
        for (s, value) in saved.lanes().iter().enumerate() {
            value.store(&mut slots[s * hidden + at..][..width]);
        }
        if plan.output {
            state.lanes()[0].store(&mut y[at..][..width]);
        }
    }
}

/// See [`super::sweep_step::forward`].
pub(super) fn forward<C: CellKernel>(cell: &C, plan: &Plan<'_>, buffers: &Buffers<'_>, depth: usize) {
    let (rows, hidden) = (plan.rows, plan.hidden);
    let gates = if C::PRODUCT { C::Pre::LEN * hidden } else { 0 };
    let device = buffers.slots.device();
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let mut states = buffers.states.native_mut::<f32>();
    let (mut slots, mut y) = (buffers.slots.native_mut::<f32>(), buffers.y.native_mut::<f32>());
    let (slots, states, y) = (&Shared::new(&mut slots), &Shared::new(&mut states), &Shared::new(&mut y));
    let (unit, arch) = (&*unit, pulp::Arch::new());
    // Rows never meet: a part runs through all of its steps without waiting for another.
    for_parts(rows, plan.parts::<C>(plan.total), |first, count| {
        let mut product = vec![0.0f32; count * gates];
        for step @ (_, before, _) in plan.order(depth) {
            if C::PRODUCT {
                // SAFETY: rows of this part alone, and nothing else of the states is borrowed.
                let h = unsafe { states.slice((before * rows + first) * hidden, count * hidden) };
                let sizes = [count, gates, hidden];
                gemm::multiply(device, sizes, (h, hidden, 1), (&weights, gates, 1), (&mut product, gates), false, 1);
            }
            let product = &*product;
            arch.dispatch(ForwardStep { cell: *cell, plan, depth, step, rows: (first, count), product, unit, slots, states, y });
        }
    });
}

/// See [`super::sweep_step::forward_split`].
pub(super) fn forward_split<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    product: &Tensor,
    depth: usize,
    step: Step,
) {
    let gates = C::Pre::LEN * plan.hidden;
    let (product, unit) = (product.native::<f32>(), buffers.unit.native::<f32>());
    let mut states = buffers.states.native_mut::<f32>();
    let (mut slots, mut y) = (buffers.slots.native_mut::<f32>(), buffers.y.native_mut::<f32>());
    let (slots, states, y) = (&Shared::new(&mut slots), &Shared::new(&mut states), &Shared::new(&mut y));
    let (unit, arch) = (&*unit, pulp::Arch::new());
    for_parts(plan.rows, plan.parts::<C>(1), |first, count| {
        let product = &product[first * gates..];
        arch.dispatch(ForwardStep { cell: *cell, plan, depth, step, rows: (first, count), product, unit, slots, states, y });
    });
}

/// One step of some rows, backward.
struct BackwardStep<'a, C> {
    cell: C,
    plan: &'a Plan<'a>,
    step: Step,
    /// (first, count)
    rows: (usize, usize),
    unit: &'a [f32],
    states: &'a [f32],
    dy: &'a [f32],
    slots: &'a Shared<'a>,
    dstates: &'a Shared<'a>,
    /// [T, STATES, B, H], or nothing.
    flow: &'a Shared<'a>,
    /// [extras + 1, H] of this part, or nothing.
    sums: &'a mut [f32],
}

impl<C: CellKernel> pulp::WithSimd for BackwardStep<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, _: S) {
        let Self { plan, step: (t, ..), rows: (first, count), dy, slots, .. } = self;
        let (rows, hidden) = (plan.rows, plan.hidden);
        let kept = C::Slots::LEN * hidden;
        for row in first..first + count {
            // SAFETY: parts of one row of each buffer, which this thread owns, and no two overlap.
            let slots = unsafe { slots.slice((t * rows + row) * kept, kept) };
            if !plan.is_valid(t, row) {
                slots.fill(0.0);
                for s in 0..if plan.flow { C::State::LEN } else { 0 } {
                    // SAFETY: as above.
                    unsafe { self.flow.slice(((t * C::State::LEN + s) * rows + row) * hidden, hidden) }.fill(0.0);
                }
                continue;
            }
            let dy = if plan.output { &dy[(t * rows + row) * plan.y_stride + plan.y_offset..][..hidden] } else { &[] };
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
    fn units(&mut self, (row, at, width): (usize, usize, usize), dy: &[f32], slots: &mut [f32]) {
        let Self { cell, plan, step: (t, before, _), unit, states, dstates, flow, .. } = *self;
        let (rows, hidden, depth) = (plan.rows, plan.hidden, plan.steps + 1);
        let saved = C::Slots::from_fn(|s| Lanes::load(&slots[s * hidden + at..][..width]));
        let p = load_unit(&cell, unit, hidden, (at, width));
        let previous = C::State::from_fn(|s| Lanes::load(&states[((s * depth + before) * rows + row) * hidden + at..][..width]));
        let mut clipped = Lanes::splat(0.0);
        let d = C::State::from_fn(|s| {
            // SAFETY: here and below: parts of a row that this thread owns, and no two overlap.
            let d = Lanes::load(unsafe { dstates.slice((s * rows + row) * hidden + at, width) });
            let d = match plan.clip > 0.0 {
                true => {
                    clipped += d.map(|d| f32::from(d.abs() > plan.clip));
                    clip_to(plan.clip, d)
                }
                false => d,
            };
            if s == 0 && plan.output { d + Lanes::load(&dy[at..][..width]) } else { d }
        });
        let site = plan.site(t, row, at);
        let holds = plan.zoneout != [0.0; 2];
        // The gradient of what was held back passes the cell by.
        let held = C::State::from_fn(|s| if holds { plan.held(site, s) * d.lanes()[s] } else { Lanes::splat(0.0) });
        if plan.flow {
            // What was held back goes into nothing else of its step.
            let totals = if holds { d } else { cell.totals(saved, previous, p, d) };
            for (s, value) in totals.lanes().iter().enumerate() {
                // SAFETY: as above.
                value.store(unsafe { flow.slice(((t * C::State::LEN + s) * rows + row) * hidden + at, width) });
            }
        }
        let d = C::State::from_fn(|s| d.lanes()[s] - held.lanes()[s]);
        let Backward { slots: gradients, previous: direct, unit: dunit } = cell.backward(site, saved, previous, p, d);
        for (s, value) in gradients.lanes().iter().enumerate() {
            value.store(&mut slots[s * hidden + at..][..width]);
        }
        for (s, value) in direct.lanes().iter().enumerate() {
            let value = if holds { *value + held.lanes()[s] } else { *value };
            // SAFETY: as above.
            value.store(unsafe { dstates.slice((s * rows + row) * hidden + at, width) });
        }
        if !self.sums.is_empty() {
            for (line, value) in dunit.lanes()[C::BIASES..].iter().take(cell.extras()).chain([&clipped]).enumerate() {
                let sum = &mut self.sums[line * hidden + at..][..width];
                (Lanes::load(sum) + *value).store(sum);
            }
        }
    }
}

/// Steps in the order of computation. `products`: whether this forms the recurrent products too, with threads for all of the plan.
pub(super) fn backward<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    dstates: &Tensor,
    steps: &[Step],
    products: bool,
) {
    let (rows, hidden, device) = (plan.rows, plan.hidden, buffers.slots.device());
    let kept = C::Slots::LEN * hidden;
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let (states, dy) = (buffers.states.native::<f32>(), buffers.y.native::<f32>());
    let (mut slots, mut dstates) = (buffers.slots.native_mut::<f32>(), dstates.native_mut::<f32>());
    let (dstates, flow) = dstates.split_at_mut(plan.after_sums(cell));
    let (dstates, sums) = dstates.split_at_mut(C::State::LEN * rows * hidden);
    let (slots, dstates) = (&Shared::new(&mut slots), &Shared::new(dstates));
    let (sums, flow) = (&Shared::new(sums), &Shared::new(flow));
    let (unit, states, dy, arch) = (&*unit, &*states, &*dy, pulp::Arch::new());
    let runs = recurrent_runs(cell, false);
    let parts = plan.parts::<C>(if products { plan.total } else { 1 });
    let lines = if plan.sums(cell) { (cell.extras() + 1) * hidden } else { 0 };
    // Rows never meet: a part runs through all of its steps without waiting for another.
    for_parts(rows, parts, |first, count| {
        let part = first / rows.div_ceil(parts);
        for step @ (t, ..) in steps {
            // SAFETY: the lines of this part alone.
            let sums = unsafe { sums.slice(part * lines, lines) };
            let (cell, step, part) = (*cell, *step, (first, count));
            arch.dispatch(BackwardStep { cell, plan, step, rows: part, unit, states, dy, slots, dstates, flow, sums });
            if !products {
                continue;
            }
            // The gradient that goes back through W_hh to the step before.
            // SAFETY: rows of this part alone, and nothing else of the two buffers is borrowed.
            let dr = unsafe { slots.slice((t * rows + first) * kept, count * kept) };
            // SAFETY: as above.
            let dh = unsafe { dstates.slice(first * hidden, count * hidden) };
            for (gate, slot, run) in &runs {
                let w = &weights[gate * hidden * hidden..];
                let sizes = [count, hidden, run * hidden];
                let dr = &dr[slot * hidden..];
                gemm::multiply(device, sizes, (dr, kept, 1), (w, hidden, 1), (dh, hidden), true, 1);
            }
        }
    });
}
