//! The sweep over time on the CPU, for any cell: the twin of `shaders/sweep_step.wgsl`.
//!
//! ```text
//!   forward: 16 or more units with all their gates, up to 64       backward: up to 64 columns of W_hh are a panel
//!   columns, are a panel of W_hh
//!
//!   step t     panel 0   panel 1 | panel 2   panel 3     A panel times h of all rows: sums in the first cache, on which
//!   -----------thread 0----------|------thread 1------   the cell goes to work at once.
//!   step t+1   panel 1   panel 0 | panel 3   panel 2     There and back: what was read last is read first.
//! ```
//!
//! From some rows on the sweep forms the product with W_ih as well, panel by panel: the input part of the gates, the largest tensor of a
//! forward pass by far, then never leaves the first cache.
//!
//! Weights are copied into panels once for all steps. Threads share the rows, which never meet. Where rows are few, or weights larger
//! than what the last cache surely holds, they share the units and meet after every step ([`Member::wait`]): each then reads its part
//! of the weights alone. Neither shows in the bits: every product is one chain of multiply-adds ([`super::product`]).

use std::ops::Range;

use super::activation::clip_to;
use super::cell_contract::{Backward, Block, CellKernel, Site, recurrent_runs};
use super::math::Lanes;
use super::product::{BAND, PANEL, PanelProduct, ROWS, Rows, Sums, cut, pack_panel};
use super::sweep::{Buffers, Inputs, Plan, Step};
use crate::backend::native::{Member, Scratch, Shared, for_parts, team, threads};
use crate::error::Result;
use crate::rng::{philox, unit as unit_f32};
use crate::tensor::Tensor;

/// A sweep of less work than this, in multiply-adds, runs on one thread.
const PARALLEL: usize = 1 << 22;
/// A step of less work than this, some ten microseconds, is not worth a meeting of threads: where other programs want the cores,
/// each may have to wait for its turn on one.
const MEETING: usize = 1 << 19;
/// What a gate's functions cost, in multiply-adds.
const GATE: usize = 32;
/// Numbers of the weights that every thread may read at every step: 8 MB of them, a part of the cache that all share.
const SHARED: usize = 1 << 21;
/// Fewer numbers of W_hh than this are copied into panels by one thread.
const PARALLEL_COPY: usize = 1 << 17;
/// Units that [`Lanes`] hold.
const LANES: usize = Lanes::COUNT;
/// Tells zoneout's draws from others under one key, as in the shader.
const HOLD: u32 = 0x686f_6c64;

impl Plan<'_> {
    /// Calls `work(rows, member)`, rows as (first, count), on the threads that `steps` steps are worth. `width`: of the products,
    /// 0 without; `panels`: parts of the units. With `whole` every call has all rows.
    fn spread<C: CellKernel>(
        &self,
        steps: usize,
        width: usize,
        panels: usize,
        whole: bool,
        work: impl Fn((usize, usize), Member<'_>) + Sync,
    ) {
        let gates = C::Pre::LEN * self.hidden;
        let step = self.rows * gates * (width + GATE);
        if steps.saturating_mul(step) < PARALLEL {
            work((0, self.rows), Member::ALONE);
        } else if !whole && gates * width <= SHARED && self.rows >= ROWS * threads() {
            for_parts(self.rows, threads(), |first, count| work((first, count), Member::ALONE));
        } else if step < MEETING {
            work((0, self.rows), Member::ALONE);
        } else {
            team(threads().min(panels), |member| work((0, self.rows), member));
        }
    }

    #[inline(always)]
    fn site(&self, t: usize, row: usize, unit: usize) -> Site {
        Site { key: self.key.words(), t: (self.start + t) as u32, row: row as u32, unit: unit as u32 }
    }

    /// What part of state `s` is held back at sixteen units; the twin of `hold.wgsl`.
    #[inline(always)]
    fn held(&self, site: Site, s: usize) -> Lanes {
        let probability = self.zoneout[s.min(1)];
        let mut lanes = [probability; LANES];
        if self.random {
            for (lane, unit) in lanes.iter_mut().zip(site.unit..) {
                let [bits, ..] = philox(site.key, [unit, site.row, site.t, HOLD + s as u32]);
                *lane = f32::from(unit_f32(bits) < probability);
            }
        }
        Lanes::from_array(lanes)
    }
}

/// Units of a panel of forward sweeps.
const fn panel_units<C: CellKernel>() -> usize {
    let blocks = PANEL / LANES / C::Pre::LEN;
    if blocks == 0 { LANES } else { blocks * LANES }
}

/// The panels of a member, those of odd steps from last to first.
fn in_turn(own: Range<usize>, n: usize) -> impl Iterator<Item = usize> {
    (0..own.len()).map(move |i| if n.is_multiple_of(2) { own.start + i } else { own.end - 1 - i })
}

/// Numbers of what [`pack`] makes of weights `[GATES * H, inputs]`.
pub(super) fn packed_len<C: CellKernel>(hidden: usize, inputs: usize) -> usize {
    hidden.next_multiple_of(panel_units::<C>()) * C::Pre::LEN * inputs
}

/// W_hh `[GATES * H, H]` or W_ih `[GATES * H, inputs]` as forward sweeps read it: for every panel `[inputs, units / 16, GATES, 16]`,
/// with zeros for units that do not exist.
pub(super) fn pack<C: CellKernel>(weights: &Tensor, hidden: usize) -> Result<Tensor> {
    const { assert!(C::Pre::LEN * LANES <= PANEL, "the gates of a block of units fill no more than a panel") };
    let (gates, units) = (C::Pre::LEN, panel_units::<C>());
    let (panels, width, inputs) = (hidden.div_ceil(units), gates * units, weights.len() / (gates * hidden));
    let packed = Tensor::uninitialized(weights.device(), [panels, inputs, width])?;
    let (weights, mut numbers) = (weights.native::<f32>(), packed.native_mut::<f32>());
    let (weights, target) = (&*weights, &Shared::new(&mut numbers));
    let parts = if gates * hidden * inputs < PARALLEL_COPY { 1 } else { threads() };
    for_parts(panels, parts, |first, count| {
        for panel in first..first + count {
            // SAFETY: a panel of this part alone.
            let target = unsafe { target.slice(panel * inputs * width, inputs * width) };
            // Sixteen k at a time: what is written stays in the first cache until its lines are full.
            for from in (0..inputs).step_by(LANES) {
                let depth = LANES.min(inputs - from);
                for column in 0..width {
                    let (block, gate, lane) = (column / LANES / gates, column / LANES % gates, column % LANES);
                    let unit = panel * units + block * LANES + lane;
                    let line = |k: usize| (from + k) * width + column;
                    match unit < hidden {
                        true => {
                            let row = &weights[(gate * hidden + unit) * inputs + from..][..depth];
                            row.iter().enumerate().for_each(|(k, weight)| target[line(k)] = *weight);
                        }
                        false => (0..depth).for_each(|k| target[line(k)] = 0.0),
                    }
                }
            }
        }
    });
    drop(numbers);
    Ok(packed)
}

/// [`pack`]'s order for a bias `[GATES * H]`.
fn pack_bias<C: CellKernel>(bias: Option<&[f32]>, hidden: usize) -> Vec<f32> {
    let (gates, columns) = (C::Pre::LEN, hidden.next_multiple_of(panel_units::<C>()) * C::Pre::LEN);
    let number = |column: usize| {
        let (unit, gate) = (column / LANES / gates * LANES + column % LANES, column / LANES % gates);
        bias.filter(|_| unit < hidden).map_or(0.0, |bias| bias[gate * hidden + unit])
    };
    (0..columns).map(number).collect()
}

/// Where a forward sweep has the input part of the gates from.
#[derive(Clone, Copy)]
enum Input<'a> {
    /// The slots.
    Slots,
    /// The product of x `[T, B, inputs]` with W_ih, from [`pack`], and the bias, from [`pack_bias`].
    Weights { x: &'a [f32], inputs: usize, weights: &'a [f32], bias: &'a [f32] },
}

/// Where a forward sweep has the recurrent part of the gates from.
#[derive(Clone, Copy)]
enum Recurrent<'a> {
    /// The cell has none.
    Nothing,
    /// The product of h with W_hh, from [`pack`].
    Weights(&'a [f32]),
    /// `[B, GATES, H]`, of the one step that the sweep is.
    Product(&'a [f32]),
}

/// Steps of some rows and units. A struct and no closure, because [`pulp`] inlines it whole into code for the widest vectors.
struct ForwardSweep<'a, C> {
    cell: C,
    plan: &'a Plan<'a>,
    depth: usize,
    steps: &'a [Step],
    /// (first, count)
    rows: (usize, usize),
    member: Member<'a>,
    input: Input<'a>,
    recurrent: Recurrent<'a>,
    unit: &'a [f32],
    /// With or without the input part.
    slots: &'a Shared<'a>,
    /// Whether they take what backward needs.
    keep: bool,
    states: &'a Shared<'a>,
    y: &'a Shared<'a>,
}

impl<C: CellKernel> pulp::WithSimd for ForwardSweep<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let Self { plan, steps, rows: (first, count), member, input, recurrent, states, .. } = self;
        let (rows, hidden) = (plan.rows, plan.hidden);
        let (gates, units) = (C::Pre::LEN, panel_units::<C>());
        let width = gates * units;
        let (mut inputs, mut sums) = (Sums::ZERO, Sums::ZERO);
        for (n, step @ (t, before, _)) in steps.iter().enumerate() {
            for panel in in_turn(member.share(hidden.div_ceil(units)), n) {
                for (from, count) in cut(count, BAND) {
                    let first = first + from;
                    if let Input::Weights { x, inputs: depth, weights, bias } = input {
                        let bias = &bias[panel * width..][..width];
                        inputs.0.chunks_exact_mut(width).take(count).for_each(|sums| sums.copy_from_slice(bias));
                        let x = Rows::Apart(&x[(t * rows + first) * depth..], depth);
                        let panel = (&weights[panel * depth * width..][..depth * width], width);
                        let sums = (&Shared::new(&mut inputs.0), 0, width);
                        simd.vectorize(PanelProduct { sizes: [count, width, depth], a: x, panel, sums, fresh: false });
                    }
                    if let Recurrent::Weights(weights) = recurrent {
                        // SAFETY: nobody writes the states before this step.
                        let h = unsafe { states.read((before * rows + first) * hidden, count * hidden) };
                        let weights = &weights[panel * hidden * width..][..hidden * width];
                        let (sizes, sums) = ([count, width, hidden], (&Shared::new(&mut sums.0), 0, width));
                        let (a, panel) = (Rows::Apart(h, hidden), (weights, width));
                        simd.vectorize(PanelProduct { sizes, a, panel, sums, fresh: true });
                    }
                    for row in 0..count {
                        for block in 0..units / LANES {
                            let at = panel * units + block * LANES;
                            if at >= hidden {
                                break;
                            }
                            let own = row * width + block * gates * LANES;
                            let x = match input {
                                Input::Slots => None,
                                Input::Weights { .. } => Some(&inputs.0[own..]),
                            };
                            let r = match recurrent {
                                Recurrent::Nothing => (&[][..], 0),
                                Recurrent::Weights(_) => (&sums.0[own..], LANES),
                                Recurrent::Product(product) => (&product[(first + row) * gates * hidden + at..], hidden),
                            };
                            // The width of full blocks is a constant in the inlined call: their loads and stores are single
                            // instructions.
                            match hidden - at {
                                LANES.. => self.units(*step, (first + row, at, LANES), x, r),
                                width => self.units(*step, (first + row, at, width), x, r),
                            }
                        }
                    }
                }
            }
            if C::PRODUCT {
                member.wait();
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

impl<C: CellKernel> ForwardSweep<'_, C> {
    /// `width` units of a row from unit `at` on. `x`: their input parts, sixteen of each gate, where they are not in the slots;
    /// `r`: the recurrent ones, with what lies between two gates.
    #[inline(always)]
    fn units(
        &self,
        (t, before, after): Step,
        (row, at, width): (usize, usize, usize),
        x: Option<&[f32]>,
        (r, stride): (&[f32], usize),
    ) {
        let Self { cell, plan, depth, input, unit, slots, states, y, .. } = self;
        let (rows, hidden) = (plan.rows, plan.hidden);
        let state_at = |s: usize, slot: usize| ((s * depth + slot) * rows + row) * hidden + at;
        // SAFETY: here and below: units of a row that this thread owns, and no two slices overlap; the states before are read only.
        let previous = C::State::from_fn(|s| Lanes::load(unsafe { states.read(state_at(s, before), width) }));
        let line = t * rows + row;
        // SAFETY: as above.
        let slot = |s: usize| unsafe { slots.slice((line * C::Slots::LEN + s) * hidden + at, width) };
        if !plan.is_valid(t, row) {
            if self.keep && !matches!(input, Input::Slots) {
                (0..C::Slots::LEN).for_each(|s| slot(s).fill(0.0));
            }
            if plan.output {
                // SAFETY: as above.
                unsafe { y.slice(line * plan.y_stride + plan.y_offset + at, width) }.fill(0.0);
            }
            for (s, value) in previous.lanes().iter().enumerate() {
                // SAFETY: as above.
                value.store(unsafe { states.slice(state_at(s, after), width) });
            }
            return;
        }
        // Not by closures, which may become calls: those would hand the vectors on through memory, in pieces.
        let mut x_part = C::Pre::from_fn(|_| Lanes::splat(0.0));
        for (g, lanes) in x_part.lanes_mut().iter_mut().enumerate() {
            *lanes = match x {
                Some(x) => Lanes::load(&x[g * LANES..][..width]),
                None => Lanes::load(slot(g)),
            };
        }
        let mut r_part = C::Pre::from_fn(|_| Lanes::splat(0.0));
        if C::PRODUCT {
            for (g, lanes) in r_part.lanes_mut().iter_mut().enumerate() {
                *lanes = Lanes::load(&r[g * stride..][..width]);
            }
        }
        let p = load_unit(cell, unit, hidden, (at, width));
        let site = plan.site(t, row, at);
        let (mut state, saved) = cell.forward(site, x_part, r_part, previous, p);
        if plan.zoneout != [0.0; 2] {
            for (s, (state, previous)) in state.lanes_mut().iter_mut().zip(previous.lanes()).enumerate() {
                let k = plan.held(site, s);
                *state = k * *previous + (Lanes::splat(1.0) - k) * *state;
            }
        }
        for (s, value) in state.lanes().iter().enumerate() {
            // SAFETY: as above.
            value.store(unsafe { states.slice(state_at(s, after), width) });
        }
        for (s, value) in saved.lanes().iter().enumerate().filter(|_| self.keep) {
            value.store(slot(s));
        }
        if plan.output {
            // SAFETY: as above.
            state.lanes()[0].store(unsafe { y.slice(line * plan.y_stride + plan.y_offset + at, width) });
        }
    }
}

/// See [`super::sweep_step::forward`] and [`super::sweep_step::forward_split`], which gives one step and the product of its h.
pub(super) fn forward<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    depth: usize,
    steps: &[Step],
    inputs: Option<&Inputs<'_>>,
    product: Option<&Tensor>,
) {
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let product = product.map(Tensor::native::<f32>);
    let recurrent = match &product {
        Some(product) => Recurrent::Product(product),
        None if C::PRODUCT => Recurrent::Weights(&weights),
        None => Recurrent::Nothing,
    };
    let bias = inputs.and_then(|inputs| inputs.bias).map(Tensor::native::<f32>);
    let bias = inputs.map(|_| pack_bias::<C>(bias.as_deref(), plan.hidden)).unwrap_or_default();
    let given = inputs.map(|inputs| (inputs.x.native::<f32>(), inputs.weights.native::<f32>()));
    let mut states = buffers.states.native_mut::<f32>();
    let (mut slots, mut y) = (buffers.slots.native_mut::<f32>(), buffers.y.native_mut::<f32>());
    let (slots, states, y) = (&Shared::new(&mut slots), &Shared::new(&mut states), &Shared::new(&mut y));
    let keep = inputs.map_or(plan.keeps(depth), |inputs| inputs.keep);
    let inputs = given.as_ref().map_or(0, |(x, _)| x.len() / (plan.steps * plan.rows));
    let input = match &given {
        Some((x, weights)) => Input::Weights { x, inputs, weights, bias: &bias },
        None => Input::Slots,
    };
    let (cell, unit, arch) = (*cell, &*unit, pulp::Arch::new());
    let width = inputs + if matches!(recurrent, Recurrent::Weights(_)) { plan.hidden } else { 0 };
    plan.spread::<C>(steps.len(), width, plan.hidden.div_ceil(panel_units::<C>()), false, |rows, member| {
        arch.dispatch(ForwardSweep { cell, plan, depth, steps, rows, member, input, recurrent, unit, slots, keep, states, y });
    });
}

/// W_hh for a backward sweep: panels `[GATES * H, columns]`.
struct Panels<'a> {
    weights: &'a [f32],
    /// Of each panel: a multiple of 16.
    columns: usize,
    /// As [`recurrent_runs`] gives them.
    runs: &'a [(usize, usize, usize)],
}

/// Columns of a panel of backward sweeps: as many as there can be, unless threads then had shares too unlike.
fn panel_columns(hidden: usize, members: usize) -> usize {
    let longest = |columns: usize| hidden.div_ceil(columns).div_ceil(members) * columns;
    (1..=PANEL / LANES).rev().map(|blocks| blocks * LANES).min_by_key(|columns| longest(*columns)).unwrap_or(PANEL)
}

/// Steps of some rows and units, backward.
struct BackwardSweep<'a, C> {
    cell: C,
    plan: &'a Plan<'a>,
    steps: &'a [Step],
    /// (first, count)
    rows: (usize, usize),
    member: Member<'a>,
    /// Whether this forms the products; else they are in `dstates`.
    products: bool,
    panels: Panels<'a>,
    unit: &'a [f32],
    states: &'a [f32],
    dy: &'a [f32],
    slots: &'a Shared<'a>,
    dstates: &'a Shared<'a>,
    /// `[T, STATES, B, H]`, or nothing.
    flow: &'a Shared<'a>,
    /// `[extras + 1, H]`, or nothing.
    sums: &'a Shared<'a>,
}

impl<C: CellKernel> pulp::WithSimd for BackwardSweep<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let Self { plan, steps, rows: (first, count), member, panels: Panels { columns, .. }, .. } = self;
        let hidden = plan.hidden;
        let mut products = Sums::ZERO;
        // Once more than there are steps: the product of the last one handled, for the gradient of the initial state.
        for n in 0..steps.len() + usize::from(self.products) {
            let later = if n > 0 && self.products { Some(steps[n - 1].0) } else { None };
            for panel in in_turn(member.share(hidden.div_ceil(columns)), n) {
                let width = columns.min((hidden - panel * columns).next_multiple_of(LANES));
                for (from, count) in cut(count, BAND) {
                    let first = first + from;
                    if let Some(t) = later {
                        self.multiply(simd, t, (first, count), (panel, width), &mut products.0);
                    }
                    for row in 0..count {
                        for block in (0..width).step_by(LANES) {
                            let (row, at) = (first + row, panel * columns + block);
                            let product = &products.0[(row - first) * width + block..];
                            // Past a row's end there are no gradients to come back.
                            let product = later.filter(|t| plan.is_valid(*t, row)).map(|_| Lanes::load(product));
                            match (steps.get(n), LANES.min(hidden - at)) {
                                (Some(step), LANES) => self.units(*step, (row, at, LANES), product),
                                (Some(step), width) => self.units(*step, (row, at, width), product),
                                (None, width) => self.arrive((row, at, width), product),
                            }
                        }
                    }
                }
            }
            // Without products units never meet.
            if self.products {
                member.wait();
            }
        }
    }
}

impl<C: CellKernel> BackwardSweep<'_, C> {
    /// `[count, width]`: what goes back from step `t` through W_hh to the units of a panel.
    #[inline(always)]
    fn multiply<S: pulp::Simd>(
        &self,
        simd: S,
        t: usize,
        (first, count): (usize, usize),
        (panel, width): (usize, usize),
        products: &mut [f32],
    ) {
        let Panels { weights, columns, runs } = self.panels;
        let (rows, hidden) = (self.plan.rows, self.plan.hidden);
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let sums = &Shared::new(products);
        for (n, (gate, slot, run)) in runs.iter().enumerate() {
            let at = (t * rows + first) * kept + slot * hidden;
            // SAFETY: the gradients of that step are complete, and nobody writes them again.
            let dr = unsafe { self.slots.read(at, (count - 1) * kept + run * hidden) };
            let weights = &weights[(panel * gates + gate * hidden) * columns..][..run * hidden * columns];
            let (sizes, a) = ([count, width, run * hidden], Rows::Apart(dr, kept));
            simd.vectorize(PanelProduct { sizes, a, panel: (weights, columns), sums: (sums, 0, width), fresh: n == 0 });
        }
    }

    /// Adds what came through the product to the gradient of h.
    #[inline(always)]
    fn arrive(&self, (row, at, width): (usize, usize, usize), product: Option<Lanes>) {
        if let Some(product) = product {
            // SAFETY: units of a row that this thread owns.
            let dh = unsafe { self.dstates.slice(row * self.plan.hidden + at, width) };
            (Lanes::load(dh) + product).store(dh);
        }
    }

    /// `width` units of a row from unit `at` on; `product`: what comes back through W_hh.
    #[inline(always)]
    fn units(&self, (t, before, _): Step, (row, at, width): (usize, usize, usize), product: Option<Lanes>) {
        let Self { cell, plan, unit, states, dy, slots, dstates, flow, sums, .. } = self;
        let (rows, hidden, depth) = (plan.rows, plan.hidden, plan.steps + 1);
        let line = t * rows + row;
        // SAFETY: here and below: units of a row that this thread owns, and no two slices overlap.
        let slot = |s: usize| unsafe { slots.slice((line * C::Slots::LEN + s) * hidden + at, width) };
        // SAFETY: as above.
        let flow = |s: usize| unsafe { flow.slice(((t * C::State::LEN + s) * rows + row) * hidden + at, width) };
        // SAFETY: as above.
        let dstate = |s: usize| unsafe { dstates.slice((s * rows + row) * hidden + at, width) };
        if !plan.is_valid(t, row) {
            self.arrive((row, at, width), product);
            (0..C::Slots::LEN).for_each(|s| slot(s).fill(0.0));
            if plan.flow {
                (0..C::State::LEN).for_each(|s| flow(s).fill(0.0));
            }
            return;
        }
        let saved = C::Slots::from_fn(|s| Lanes::load(slot(s)));
        let p = load_unit(cell, unit, hidden, (at, width));
        let previous = C::State::from_fn(|s| Lanes::load(&states[((s * depth + before) * rows + row) * hidden + at..][..width]));
        let mut clipped = Lanes::splat(0.0);
        let mut d = C::State::from_fn(|s| Lanes::load(dstate(s)));
        if let Some(product) = product {
            d.lanes_mut()[0] += product;
        }
        if plan.clip > 0.0 {
            for d in d.lanes_mut() {
                clipped += d.map(|d| f32::from(d.abs() > plan.clip));
                *d = clip_to(plan.clip, *d);
            }
        }
        if plan.output {
            d.lanes_mut()[0] += Lanes::load(&dy[line * plan.y_stride + plan.y_offset + at..][..width]);
        }
        let site = plan.site(t, row, at);
        let holds = plan.zoneout != [0.0; 2];
        // The gradient of what was held back passes the cell by.
        let mut held = C::State::from_fn(|_| Lanes::splat(0.0));
        if holds {
            for (s, (held, d)) in held.lanes_mut().iter_mut().zip(d.lanes()).enumerate() {
                *held = plan.held(site, s) * *d;
            }
        }
        if plan.flow {
            // What was held back goes into nothing else of its step.
            let totals = if holds { d } else { cell.totals(saved, previous, p, d) };
            for (s, value) in totals.lanes().iter().enumerate() {
                value.store(flow(s));
            }
        }
        for (d, held) in d.lanes_mut().iter_mut().zip(held.lanes()) {
            *d = *d - *held;
        }
        let Backward { slots: gradients, previous: direct, unit: dunit } = cell.backward(site, saved, previous, p, d);
        for (s, value) in gradients.lanes().iter().enumerate() {
            value.store(slot(s));
        }
        for (s, value) in direct.lanes().iter().enumerate() {
            let value = if holds { *value + held.lanes()[s] } else { *value };
            value.store(dstate(s));
        }
        if plan.sums(cell) {
            for (line, value) in dunit.lanes()[C::BIASES..].iter().take(cell.extras()).chain([&clipped]).enumerate() {
                // SAFETY: as above: with sums, threads share units and not rows.
                let sum = unsafe { sums.slice(line * hidden + at, width) };
                (Lanes::load(sum) + *value).store(sum);
            }
        }
    }
}

/// Steps in the order of computation. `products`: whether this forms the recurrent products too.
pub(super) fn backward<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    dstates: &Tensor,
    steps: &[Step],
    products: bool,
) {
    let (rows, hidden, gates) = (plan.rows, plan.hidden, C::Pre::LEN * plan.hidden);
    let products = products && C::PRODUCT;
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let (states, dy) = (buffers.states.native::<f32>(), buffers.y.native::<f32>());
    let (mut slots, mut dstates) = (buffers.slots.native_mut::<f32>(), dstates.native_mut::<f32>());
    let (dstates, flow) = dstates.split_at_mut(plan.after_sums(cell));
    let (dstates, sums) = dstates.split_at_mut(C::State::LEN * rows * hidden);
    let (slots, dstates) = (&Shared::new(&mut slots), &Shared::new(dstates));
    let (sums, flow) = (&Shared::new(sums), &Shared::new(flow));
    let (cell, unit, states, dy, arch) = (*cell, &*unit, &*states, &*dy, pulp::Arch::new());

    let columns = panel_columns(hidden, threads());
    let panels = hidden.div_ceil(columns);
    let mut packed = Scratch::new(if products { panels * gates * columns } else { 0 });
    if products {
        let (weights, packed) = (&*weights, &Shared::new(packed.numbers()));
        for_parts(panels, if gates * hidden < PARALLEL_COPY { 1 } else { threads() }, |first, count| {
            for panel in first..first + count {
                // SAFETY: a panel of this part alone.
                let target = unsafe { packed.slice(panel * gates * columns, gates * columns) };
                let at = panel * columns;
                pack_panel(&weights[at..], [gates, columns.min(hidden - at)], (hidden, 1), (target, columns));
            }
        });
    }
    let (weights, runs) = (&*packed.numbers(), &*recurrent_runs(&cell, false));
    let width = if products { hidden } else { 0 };
    plan.spread::<C>(steps.len(), width, panels, plan.sums(&cell), |rows, member| {
        let panels = Panels { weights, columns, runs };
        arch.dispatch(BackwardSweep {
            cell,
            plan,
            steps,
            rows,
            member,
            products,
            panels,
            unit,
            states,
            dy,
            slots,
            dstates,
            flow,
            sums,
        });
    });
}
