//! The sweep over time, one launch a step, for any cell: `shaders/sweep_step.wgsl` and its native twin.

use super::activation::clip_to;
use super::cell_contract::{Backward, Block, CellKernel, Site, recurrent_runs};
use super::math::Lanes;
use super::{MAX_GROUPS, gemm};
use crate::backend::gpu::Range;
use crate::backend::native::{Shared, for_parts, threads};
use crate::backend::params;
use crate::device::Backend;
use crate::error::Result;
use crate::rng::{MaskKey, philox, unit as unit_f32};
use crate::tensor::{Lengths, Tensor};

params! {
    /// The shader's uniform struct.
    Sweep {
        rows: u32, hidden: u32, depth: u32,
        t: u32, before: u32, after: u32, later: u32, recurrent: u32, finish: u32,
        ragged: u32, keep: u32,
        output: u32, y_stride: u32, y_offset: u32,
        key0: u32, key1: u32, start: u32,
        random: u32, zoneout_h: f32, zoneout_c: f32,
        clip: f32,
        flow_at: u32,
    }
}

/// A cell composed with this file's shader: the contract, the cell and more files of its own, holding back, the functions that
/// they use.
macro_rules! step_kernels {
    ($name:literal, $cell:literal $(, $more:literal)*) => {{
        use crate::backend::Kernel;
        use crate::kernels::{READ, READ_WRITE};
        const FORWARD: Kernel = Kernel {
            name: concat!($name, "_step_forward"),
            source: concat!(
                include_str!("../../shaders/sweep_step.wgsl"),
                include_str!("../../shaders/cell_contract.wgsl"),
                include_str!(concat!("../../shaders/", $cell)),
                $(include_str!(concat!("../../shaders/", $more)),)*
                include_str!("../../shaders/hold.wgsl"),
                include_str!("../../shaders/activation.wgsl"),
                include_str!("../../shaders/math.wgsl"),
                include_str!("../../shaders/rng.wgsl"),
            ),
            entry: "forward",
            params: crate::kernels::sweep_step::Sweep::LAYOUT,
            bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE)],
            workgroup: 64,
        };
        crate::kernels::cell_contract::StepKernels {
            forward: FORWARD,
            forward_split: Kernel {
                name: concat!($name, "_step_forward_split"),
                entry: "forward_split",
                bindings: &[(1, READ_WRITE), (2, READ_WRITE), (4, READ), (5, READ), (6, READ_WRITE), (8, READ)],
                ..FORWARD
            },
            backward: Kernel {
                name: concat!($name, "_step_backward"),
                entry: "backward",
                bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE)],
                ..FORWARD
            },
        }
    }};
}
pub(crate) use step_kernels;

/// Lanes of a workgroup; rows and, in backward, units of a lane, as in the shader.
const WORKGROUP: usize = 64;
const ROWS: usize = 4;
const UNITS: usize = 4;
/// A sweep of fewer multiply-adds than this runs on one thread.
const PARALLEL: usize = 1 << 23;
/// Units that [`Lanes`] hold.
const LANES: usize = Lanes::COUNT;
/// Tells zoneout's draws from others under one key, as in the shader.
const HOLD: u32 = 0x686f_6c64;

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
    /// Steps of the sequence that this is a window of: what is worth threads for the whole is for each window, so that the
    /// bits are the same.
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
    /// `[T, B, SLOTS, H]`. Forward: the input part of each gate comes in, what backward needs goes out. Backward: the
    /// gradients go out.
    pub slots: &'a Tensor,
    /// `[STATES, depth, B, H]`, with the initial state in slot 0 (reverse: the last slot). Depth T + 1 keeps every
    /// state, as backward needs; depth 2 keeps the newest two.
    pub states: &'a Tensor,
    /// Forward: W_hh transposed `[H, GATES * H]`, so that neighbouring units lie side by side. Backward: W_hh.
    pub weights: &'a Tensor,
    /// `[unit parameters, H]`.
    pub unit: &'a Tensor,
    /// `[T, B, y_stride]`. Forward: y goes out, zeros past a row's end. Backward: dy comes in. Without [`Plan::output`] any
    /// tensor that is none of the others.
    pub y: &'a Tensor,
}

/// A step of a sweep: t, the slot of the state before it and the slot after it.
pub(crate) type Step = (usize, usize, usize);

impl<'a> Plan<'a> {
    /// Steps in the order of computation.
    pub fn order(&self, depth: usize) -> impl DoubleEndedIterator<Item = Step> + use<> {
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

    /// Words of `dstates`: the state's gradient, and room for sums and for the flow where they are wanted.
    pub fn dstates_len<C: CellKernel>(&self, cell: &C) -> usize {
        let flow = if self.flow { self.steps * C::State::LEN * self.rows * self.hidden } else { 0 };
        self.after_sums(cell) + flow
    }

    /// Where the flow lies in `dstates`: the first word of `[T, STATES, B, H]`, zeros past a row's end.
    pub fn flow_at<C: CellKernel>(&self, cell: &C) -> Option<usize> {
        self.flow.then(|| self.after_sums(cell))
    }

    fn after_sums<C: CellKernel>(&self, cell: &C) -> usize {
        C::State::LEN * self.rows * self.hidden + self.sums_len(cell)
    }

    /// Words of the sums, which follow the state's gradient in `dstates`: `[tiles, extras + 1, H]`, the last line of a tile that of
    /// the clip's counts.
    pub fn sums_len<C: CellKernel>(&self, cell: &C) -> usize {
        if self.sums(cell) { self.tiles() * (cell.extras() + 1) * self.hidden } else { 0 }
    }

    fn sums<C: CellKernel>(&self, cell: &C) -> bool {
        cell.extras() > 0 || self.clip > 0.0
    }

    /// Tiles on a GPU, parts of the batch on the CPU.
    fn tiles(&self) -> usize {
        self.rows.div_ceil(ROWS).max(threads())
    }

    fn constants<C: CellKernel>(&self, cell: &C, backward: bool) -> Vec<(&'static str, f64)> {
        let mut constants = cell.constants();
        constants.push(("zoneout", f64::from(u8::from(self.zoneout != [0.0; 2]))));
        constants.push(("sums", f64::from(u8::from(backward && self.sums(cell)))));
        constants.push(("flow", f64::from(u8::from(backward && self.flow))));
        constants
    }

    fn params(&self, depth: usize, (t, before, after): Step) -> Sweep {
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
            finish: 0,
            ragged: self.lengths.is_some().into(),
            keep: u32::from(depth > 2 || self.steps == 1),
            output: self.output.into(),
            y_stride: self.y_stride as u32,
            y_offset: self.y_offset as u32,
            key0,
            key1,
            start: self.start as u32,
            random: self.random.into(),
            zoneout_h: self.zoneout[0],
            zoneout_c: self.zoneout[1],
            clip: self.clip,
            flow_at: 0,
        }
    }

    /// For lanes of `rows` rows and `units` units each.
    fn groups(&self, rows: usize, units: usize) -> [u32; 3] {
        let tiles = self.rows.div_ceil(rows);
        let y = tiles.min(MAX_GROUPS);
        [self.hidden.div_ceil(units).div_ceil(WORKGROUP) as u32, y as u32, tiles.div_ceil(y) as u32]
    }

    pub fn is_valid(&self, t: usize, row: usize) -> bool {
        self.lengths.is_none_or(|lengths| t < lengths.host()[row] as usize)
    }

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

    pub fn depth<C: CellKernel>(&self, states: &Tensor) -> usize {
        states.len() / (C::State::LEN * self.rows * self.hidden)
    }
}

impl Buffers<'_> {
    fn bindings(&self, plan: &Plan<'_>) -> [Range; 6] {
        // Without lengths something must still be bound in their place.
        let lengths = plan.lengths.map_or(self.unit, |lengths| lengths.tensor());
        [self.slots, self.states, self.weights, self.unit, lengths, self.y].map(Tensor::range)
    }
}

/// Runs the cell over all steps: fills y, the states, and what backward needs.
pub(crate) fn forward<C: CellKernel>(cell: &C, plan: &Plan<'_>, buffers: &Buffers<'_>) -> Result<()> {
    let depth = plan.depth::<C>(buffers.states);
    match buffers.slots.device().backend() {
        Backend::Native => {
            native_forward(cell, plan, buffers, depth);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let steps = plan.order(depth).map(|step| (plan.params(depth, step), plan.groups(ROWS, 1)));
            gpu.launch_each(&C::KERNELS.forward, &plan.constants(cell, false), &buffers.bindings(plan), steps)
        }
    }
}

/// Runs the cell over one step, given the product `[B, GATES, H]`.
pub(crate) fn forward_split<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    product: &Tensor,
    step: Step,
) -> Result<()> {
    let depth = plan.depth::<C>(buffers.states);
    match buffers.slots.device().backend() {
        Backend::Native => {
            native_forward_split(cell, plan, buffers, product, depth, step);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let [slots, states, _, unit, lengths, y] = buffers.bindings(plan);
            let bindings = [slots, states, unit, lengths, y, product.range()];
            let step = (plan.params(depth, step), plan.groups(1, 1));
            gpu.launch_each(&C::KERNELS.forward_split, &plan.constants(cell, false), &bindings, std::iter::once(step))
        }
    }
}

/// Runs the cell backward over all steps. `dstates` of [`Plan::dstates_len`] words: the gradient of the final state
/// `[STATES, B, H]` comes in, that of the initial state goes out; sums are added to those behind it.
pub(crate) fn backward<C: CellKernel>(cell: &C, plan: &Plan<'_>, buffers: &Buffers<'_>, dstates: &Tensor) -> Result<()> {
    let depth = plan.steps + 1;
    debug_assert_eq!(plan.depth::<C>(buffers.states), depth, "backward needs every state");
    match buffers.slots.device().backend() {
        Backend::Native => {
            native_backward(cell, plan, buffers, dstates, &plan.order(depth).rev().collect::<Vec<_>>(), true);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let mut later = None;
            let mut params = |step: Step, finish: bool| {
                let recurrent = u32::from(later.is_some());
                let finish = u32::from(finish);
                let (later_step, flow_at) = (later.unwrap_or(0), plan.flow_at(cell).unwrap_or(0) as u32);
                let params = Sweep { later: later_step, recurrent, finish, flow_at, ..plan.params(depth, step) };
                later = Some(step.0 as u32);
                (params, plan.groups(ROWS, UNITS))
            };
            let mut steps: Vec<_> = plan.order(depth).rev().map(|step| params(step, false)).collect();
            // The product of the first step, whose gradient is the initial state's.
            if let (true, Some(first)) = (C::PRODUCT, plan.order(depth).next()) {
                steps.push(params(first, true));
            }
            let steps = steps.into_iter();
            let bindings = [&buffers.bindings(plan)[..], &[dstates.range()]].concat();
            gpu.launch_each(&C::KERNELS.backward, &plan.constants(cell, true), &bindings, steps)
        }
    }
}

/// Runs the cell backward over one step; what comes through the product is in `dstates` already.
pub(crate) fn backward_split<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    dstates: &Tensor,
    step: Step,
) -> Result<()> {
    match buffers.slots.device().backend() {
        Backend::Native => {
            native_backward(cell, plan, buffers, dstates, &[step], false);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let bindings = [&buffers.bindings(plan)[..], &[dstates.range()]].concat();
            let flow_at = plan.flow_at(cell).unwrap_or(0) as u32;
            let step = (Sweep { flow_at, ..plan.params(plan.steps + 1, step) }, plan.groups(ROWS, UNITS));
            gpu.launch_each(&C::KERNELS.backward, &plan.constants(cell, true), &bindings, std::iter::once(step))
        }
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

fn native_forward<C: CellKernel>(cell: &C, plan: &Plan<'_>, buffers: &Buffers<'_>, depth: usize) {
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

fn native_forward_split<C: CellKernel>(
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
fn native_backward<C: CellKernel>(
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
