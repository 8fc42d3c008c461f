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
use super::math::{Fusion, Lanes, OnLanes, on_lanes};
use super::product::{BAND, PANEL, PanelProduct, ROWS, Rows, Sums, cut, pack_panel};
use super::sweep::{Buffers, Inputs, Plan, Step};
use crate::backend::native::{Member, Part, Scratch, Shared, for_parts, team, threads};
use crate::error::Result;
use crate::rng::{philox, unit as unit_f32};
use crate::tensor::Tensor;

/// A sweep of less work than this, in multiply-adds, runs on one thread.
const PARALLEL: usize = 1 << 22;
/// A member of a team that meets at every step has at least this much work in one, about a microsecond.
const MEETING: usize = 1 << 15;
/// From such a step on, some ten microseconds, a team is worth it even where other programs want the cores.
const LASTING: usize = 1 << 19;
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
        } else {
            team(panels.min(step / MEETING), C::PRODUCT && width > 0 && step < LASTING, |member| work((0, self.rows), member));
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

/// Steps forward.
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

/// The unit parameters of `width` units from `at` on.
#[inline(always)]
fn load_unit<C: CellKernel>(cell: &C, unit: &[f32], hidden: usize, (at, width): (usize, usize)) -> C::Unit {
    let count = cell.unit_params();
    C::Unit::from_fn(|i| if i < count { Lanes::load(&unit[i * hidden + at..][..width]) } else { Lanes::splat(0.0) })
}

impl<C: CellKernel> OnLanes for ForwardSweep<'_, C> {
    #[inline(always)]
    fn run<S: pulp::Simd, F: Fusion>(self, simd: S) {
        // A constant first: no code is made for what a cell never is.
        if const { C::HAS_PLAIN } && self.cell.is_plain() {
            self.steps::<S, F, true>(simd);
        } else {
            self.steps::<S, F, false>(simd);
        }
    }
}

impl<C: CellKernel> ForwardSweep<'_, C> {
    #[inline(always)]
    fn steps<S: pulp::Simd, F: Fusion, const PLAIN: bool>(self, simd: S) {
        let Self { plan, steps, rows: (first, count), mut member, input, recurrent, states, .. } = self;
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
                    for block in 0..units / LANES {
                        let at = panel * units + block * LANES;
                        if at >= hidden {
                            break;
                        }
                        let (x, r) = (&mut inputs.0[block * gates * LANES..], &mut sums.0[block * gates * LANES..]);
                        let place = (at, LANES.min(hidden - at));
                        if let Input::Slots = input {
                            let line = |row: usize| (t * rows + first + row) * C::Slots::LEN;
                            // SAFETY: units of a row that this thread owns.
                            let part = |row, gate| unsafe { self.slots.read((line(row) + gate) * hidden + at, place.1) };
                            copy_gates::<C>(count, part, (x, width));
                        }
                        if let Recurrent::Product(product) = recurrent {
                            let part = |row, gate| &product[((first + row) * gates + gate) * hidden + at..][..place.1];
                            copy_gates::<C>(count, part, (r, width));
                        }
                        // The width of full blocks is a constant in the inlined call: their loads and stores are single
                        // instructions.
                        match place {
                            (at, LANES) => self.units::<F, PLAIN>(*step, (first, count), (at, LANES), (x, r, width)),
                            place => self.units::<F, PLAIN>(*step, (first, count), place, (x, r, width)),
                        }
                    }
                }
            }
            if C::PRODUCT && !member.wait() {
                return;
            }
        }
    }

    /// `width` units of some rows, from unit `at` on. Of all their gates, sixteen numbers each: the input and the recurrent parts, and
    /// how far rows are apart.
    #[inline(always)]
    fn units<F: Fusion, const PLAIN: bool>(
        &self,
        (t, before, after): Step,
        (first, count): (usize, usize),
        (at, width): (usize, usize),
        (x, r, stride): (&[f32], &[f32], usize),
    ) {
        let Self { cell, plan, depth, unit, slots, states, y, keep, .. } = *self;
        let (rows, hidden) = (plan.rows, plan.hidden);
        let state = |slot: usize| {
            let planes = [C::State::LEN, depth * rows * hidden];
            states.part((slot * rows + first) * hidden + at, [count, hidden], planes, width)
        };
        let (previous, next) = (state(before), state(after));
        let (line, planes) = (t * rows + first, [if keep { C::Slots::LEN } else { 0 }, hidden]);
        let slots = slots.part(line * C::Slots::LEN * hidden + at, [count, C::Slots::LEN * hidden], planes, width);
        let planes = [usize::from(plan.output), 0];
        let y = y.part(line * plan.y_stride + plan.y_offset + at, [count, plan.y_stride], planes, width);
        let p = load_unit(&cell, unit, hidden, (at, width));
        let holds = plan.zoneout != [0.0; 2];
        for row in 0..count {
            // SAFETY: here and below: units of rows that this thread owns, and no two slices overlap; the states before are read only.
            let before: C::State = unsafe { load_row(previous, row) };
            if !plan.is_valid(t, first + row) {
                if keep {
                    // SAFETY: as above.
                    unsafe { store_row(slots, row, &zeros::<C::Slots>()) };
                }
                if plan.output {
                    // SAFETY: as above.
                    unsafe { y.slice(row, 0) }.fill(0.0);
                }
                // SAFETY: as above.
                unsafe { store_row(next, row, &before) };
                continue;
            }
            let site = plan.site(t, first + row, at);
            let r = if C::PRODUCT { load_gates(&r[row * stride..]) } else { zeros() };
            let (mut state, saved) = cell.forward::<F, PLAIN>(site, load_gates(&x[row * stride..]), r, before, p);
            if holds {
                for (s, (state, before)) in state.lanes_mut().iter_mut().zip(before.lanes()).enumerate() {
                    let k = plan.held(site, s);
                    *state = k * *before + (Lanes::splat(1.0) - k) * *state;
                }
            }
            // SAFETY: as above.
            unsafe { store_row(next, row, &state) };
            if keep {
                // SAFETY: as above.
                unsafe { store_row(slots, row, &saved) };
            }
            if plan.output {
                // SAFETY: as above.
                state.lanes()[0].store(unsafe { y.slice(row, 0) });
            }
        }
    }
}

/// No numbers but 0.
#[inline(always)]
fn zeros<B: Block>() -> B {
    B::from_fn(|_| Lanes::splat(0.0))
}

/// Copies `count` rows of `part(row, gate)` to where products of gates lie, rows `stride` apart.
#[inline(always)]
fn copy_gates<'a, C: CellKernel>(count: usize, part: impl Fn(usize, usize) -> &'a [f32], (to, stride): (&mut [f32], usize)) {
    for (row, gate) in (0..count).flat_map(|row| (0..C::Pre::LEN).map(move |gate| (row, gate))) {
        let from = part(row, gate);
        to[row * stride + gate * LANES..][..from.len()].copy_from_slice(from);
    }
}

/// Sixteen numbers of each gate. Here and below not by a closure, which may become a call: that would hand the vectors on through memory.
#[inline(always)]
fn load_gates<B: Block>(from: &[f32]) -> B {
    let mut gates: B = zeros();
    for (lanes, from) in gates.lanes_mut().iter_mut().zip(from[..B::LEN * LANES].chunks_exact(LANES)) {
        *lanes = Lanes::load(from);
    }
    gates
}

/// A row of each plane.
///
/// # Safety
/// As for [`Part::read`].
#[inline(always)]
unsafe fn load_row<B: Block>(from: Part<'_>, row: usize) -> B {
    let mut planes: B = zeros();
    for (plane, lanes) in planes.lanes_mut().iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *lanes = Lanes::load(unsafe { from.read(row, plane) });
    }
    planes
}

/// Writes a row of each plane.
///
/// # Safety
/// As for [`Part::slice`].
#[inline(always)]
unsafe fn store_row<B: Block>(to: Part<'_>, row: usize, planes: &B) {
    for (plane, lanes) in planes.lanes().iter().enumerate() {
        // SAFETY: the caller's promise.
        lanes.store(unsafe { to.slice(row, plane) });
    }
}

/// Adds to numbers in memory.
#[inline(always)]
fn add_to(sum: &mut [f32], value: Lanes) {
    (Lanes::load(sum) + value).store(sum);
}

type Forward<C> = fn(&C, &Plan<'_>, &Buffers<'_>, usize, &[Step], Option<&Inputs<'_>>, Option<&Tensor>);
type BackwardOf<C> = fn(&C, &Plan<'_>, &Buffers<'_>, &Tensor, &[Step], bool);

/// The sweeps of a cell. A static of these has their code made here, once: generic functions would be compiled again in every program
/// that uses a layer, for minutes.
pub struct NativeSweeps<C> {
    /// See [`super::sweep_step::forward`] and [`super::sweep_step::forward_split`], which gives one step and the product of its h.
    pub(super) forward: Forward<C>,
    /// Steps in the order of computation, and whether this forms the recurrent products too.
    pub(super) backward: BackwardOf<C>,
}

impl<C: CellKernel> NativeSweeps<C> {
    pub(super) const fn new() -> Self {
        Self { forward, backward }
    }
}

fn forward<C: CellKernel>(
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
    let (cell, unit) = (*cell, &*unit);
    let width = inputs + if matches!(recurrent, Recurrent::Weights(_)) { plan.hidden } else { 0 };
    plan.spread::<C>(steps.len(), width, plan.hidden.div_ceil(panel_units::<C>()), false, |rows, member| {
        on_lanes(ForwardSweep { cell, plan, depth, steps, rows, member, input, recurrent, unit, slots, keep, states, y });
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

/// Steps backward.
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

/// What came back through W_hh to some rows: the step that it came from, and the numbers, with what is from one row to the next.
type Arrived<'a> = (usize, &'a [f32], usize);

impl<C: CellKernel> OnLanes for BackwardSweep<'_, C> {
    #[inline(always)]
    fn run<S: pulp::Simd, F: Fusion>(self, simd: S) {
        // A constant first: no code is made for what a cell never is.
        if const { C::HAS_PLAIN } && self.cell.is_plain() {
            self.steps::<S, F, true>(simd);
        } else {
            self.steps::<S, F, false>(simd);
        }
    }
}

impl<C: CellKernel> BackwardSweep<'_, C> {
    #[inline(always)]
    fn steps<S: pulp::Simd, F: Fusion, const PLAIN: bool>(self, simd: S) {
        let Self { plan, steps, rows: (first, count), mut member, panels: Panels { columns, .. }, .. } = self;
        let hidden = plan.hidden;
        let mut products = Sums::ZERO;
        // Once more than there are steps: the product of the last one handled, for the gradient of the initial state.
        for n in 0..steps.len() + usize::from(self.products) {
            let later = if n > 0 && self.products { Some(steps[n - 1].0) } else { None };
            for panel in in_turn(member.share(hidden.div_ceil(columns)), n) {
                let width = columns.min((hidden - panel * columns).next_multiple_of(LANES));
                for (from, count) in cut(count, BAND) {
                    let part = (first + from, count);
                    if let Some(t) = later {
                        self.multiply(simd, t, part, (panel, width), &mut products.0);
                    }
                    for block in (0..width).step_by(LANES) {
                        let at = panel * columns + block;
                        let arrived = later.map(|t| (t, &products.0[block..], width));
                        match (steps.get(n), hidden - at) {
                            (Some(step), LANES..) => self.units::<F, PLAIN>(*step, part, (at, LANES), arrived),
                            (Some(step), width) => self.units::<F, PLAIN>(*step, part, (at, width), arrived),
                            (None, width) => self.arrive(part, (at, width.min(LANES)), arrived),
                        }
                    }
                }
            }
            // Without products units never meet.
            if self.products && !member.wait() {
                return;
            }
        }
    }

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

    /// What came through the product to a row: nothing past its end.
    #[inline(always)]
    fn arrived(&self, row: usize, first: usize, arrived: Option<Arrived<'_>>) -> Option<Lanes> {
        let (t, products, stride) = arrived?;
        self.plan.is_valid(t, first + row).then(|| Lanes::load(&products[row * stride..]))
    }

    /// Adds what came through the product to the gradient of h.
    #[inline(always)]
    fn arrive(&self, (first, count): (usize, usize), (at, width): (usize, usize), arrived: Option<Arrived<'_>>) {
        let dh = self.dstates.part(first * self.plan.hidden + at, [count, self.plan.hidden], [1, 0], width);
        for row in 0..count {
            if let Some(product) = self.arrived(row, first, arrived) {
                // SAFETY: units of a row that this thread owns.
                add_to(unsafe { dh.slice(row, 0) }, product);
            }
        }
    }

    /// `width` units of some rows, from unit `at` on.
    #[inline(always)]
    fn units<F: Fusion, const PLAIN: bool>(
        &self,
        (t, before, _): Step,
        (first, count): (usize, usize),
        (at, width): (usize, usize),
        arrived: Option<Arrived<'_>>,
    ) {
        let Self { cell, plan, unit, states, dy, slots, dstates, flow, sums, .. } = *self;
        let (rows, hidden, depth) = (plan.rows, plan.hidden, plan.steps + 1);
        let line = t * rows + first;
        let slots =
            slots.part(line * C::Slots::LEN * hidden + at, [count, C::Slots::LEN * hidden], [C::Slots::LEN, hidden], width);
        let planes = [C::State::LEN, rows * hidden];
        let dstates = dstates.part(first * hidden + at, [count, hidden], planes, width);
        let flows = if plan.flow { count } else { 0 };
        let flow = flow.part((t * C::State::LEN * rows + first) * hidden + at, [flows, hidden], planes, width);
        let summed = if plan.sums(&cell) { cell.extras() + 1 } else { 0 };
        let sums = sums.part(at, [1, 0], [summed, hidden], width);
        let p = load_unit(&cell, unit, hidden, (at, width));
        let holds = plan.zoneout != [0.0; 2];
        for row in 0..count {
            let product = self.arrived(row, first, arrived);
            if !plan.is_valid(t, first + row) {
                if let Some(product) = product {
                    // SAFETY: here and below: units of rows that this thread owns, and no two slices overlap.
                    add_to(unsafe { dstates.slice(row, 0) }, product);
                }
                // SAFETY: as above.
                unsafe { store_row(slots, row, &zeros::<C::Slots>()) };
                if plan.flow {
                    // SAFETY: as above.
                    unsafe { store_row(flow, row, &zeros::<C::State>()) };
                }
                continue;
            }
            // SAFETY: as above.
            let saved: C::Slots = unsafe { load_row(slots, row) };
            let mut previous: C::State = zeros();
            for (s, lanes) in previous.lanes_mut().iter_mut().enumerate() {
                *lanes = Lanes::load(&states[((s * depth + before) * rows + first + row) * hidden + at..][..width]);
            }
            let mut clipped = Lanes::splat(0.0);
            // SAFETY: as above.
            let mut d: C::State = unsafe { load_row(dstates, row) };
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
                d.lanes_mut()[0] += Lanes::load(&dy[(line + row) * plan.y_stride + plan.y_offset + at..][..width]);
            }
            let site = plan.site(t, first + row, at);
            // The gradient of what was held back passes the cell by.
            let mut held: C::State = zeros();
            if holds {
                for (s, (held, d)) in held.lanes_mut().iter_mut().zip(d.lanes()).enumerate() {
                    *held = plan.held(site, s) * *d;
                }
            }
            if plan.flow {
                // What was held back goes into nothing else of its step.
                let totals = if holds { d } else { cell.totals::<F>(saved, previous, p, d) };
                // SAFETY: as above.
                unsafe { store_row(flow, row, &totals) };
            }
            if holds {
                for (d, held) in d.lanes_mut().iter_mut().zip(held.lanes()) {
                    *d = *d - *held;
                }
            }
            let Backward { slots: gradients, previous: mut direct, unit: dunit } =
                cell.backward::<F, PLAIN>(site, saved, previous, p, d);
            if holds {
                for (direct, held) in direct.lanes_mut().iter_mut().zip(held.lanes()) {
                    *direct += *held;
                }
            }
            // SAFETY: as above.
            unsafe {
                store_row(slots, row, &gradients);
                store_row(dstates, row, &direct);
            }
            if summed > 0 {
                for (line, value) in dunit.lanes()[C::BIASES..].iter().take(cell.extras()).chain([&clipped]).enumerate() {
                    // SAFETY: as above: with sums, threads share units and not rows.
                    add_to(unsafe { sums.slice(0, line) }, *value);
                }
            }
        }
    }
}

fn backward<C: CellKernel>(cell: &C, plan: &Plan<'_>, buffers: &Buffers<'_>, dstates: &Tensor, steps: &[Step], products: bool) {
    let (rows, hidden, gates) = (plan.rows, plan.hidden, C::Pre::LEN * plan.hidden);
    let products = products && C::PRODUCT;
    let (weights, unit) = (buffers.weights.native::<f32>(), buffers.unit.native::<f32>());
    let (states, dy) = (buffers.states.native::<f32>(), buffers.y.native::<f32>());
    let (mut slots, mut dstates) = (buffers.slots.native_mut::<f32>(), dstates.native_mut::<f32>());
    let (dstates, flow) = dstates.split_at_mut(plan.after_sums(cell));
    let (dstates, sums) = dstates.split_at_mut(C::State::LEN * rows * hidden);
    let (slots, dstates) = (&Shared::new(&mut slots), &Shared::new(dstates));
    let (sums, flow) = (&Shared::new(sums), &Shared::new(flow));
    let (cell, unit, states, dy) = (*cell, &*unit, &*states, &*dy);

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
        on_lanes(BackwardSweep {
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
