//! The sweep over time, one launch a step for both sides, for any cell: `shaders/sweep_step.wgsl`; its native twin is `sweep_native`.
//! `sweep_pair` is the same with two products a step.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::cell_contract::{Block, CellKernel, StepProduct};
use super::choice;
use super::sweep::{self, Inputs, Plan, Run, Side, Step};
use super::{sweep_native, tiles, transpose};
use crate::backend::gpu::{Gpu, Range};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Sweep {
        rows: u32, hidden: u32, width: u32, depth: u32,
        t: u32, steps: u32, last: u32, reverse: u32, sides: u32, recurrent: u32, finish: u32,
        tile: u32, rescue: u32,
        ragged: u32, keep: u32,
        output: u32, y_stride: u32, y_offset: u32,
        key0: u32, key1: u32, start: u32,
        random: u32, zoneout_h: f32, zoneout_c: f32,
        clip: f32,
        flow_at: u32,
        opposite: u32, ahead: u32, next_key0: u32, next_key1: u32,
        next_slots: u32, next_states: u32, next_weights: u32, next_unit: u32, next_y: u32, next_dstates: u32,
        next_between: u32, next_carried: u32, next_douts: u32,
        next_stats: u32, next_norms: u32, lines: u32, shows: u32,
    }
}

/// The text of a cell and of a sweep over steps: the sweep's own files; the contract, the cell and more files of its own, holding
/// back, the functions that they use.
macro_rules! composed {
    ([$($sweep:literal),+], $cell:literal $(, $more:literal)*) => {
        concat!(
            $(include_str!(concat!("../../shaders/", $sweep)),)+
            include_str!("../../shaders/sweep_unit.wgsl"),
            include_str!("../../shaders/cell_contract.wgsl"),
            include_str!(concat!("../../shaders/", $cell)),
            $(include_str!(concat!("../../shaders/", $more)),)*
            include_str!("../../shaders/component.wgsl"),
            include_str!("../../shaders/hold.wgsl"),
            include_str!("../../shaders/activation.wgsl"),
            include_str!("../../shaders/math.wgsl"),
            include_str!("../../shaders/rng.wgsl"),
        )
    };
}
pub(crate) use composed;

/// A product of a step and what follows it: a part of a step, composed with this file's shader and a cell; with the bindings of both ways.
macro_rules! step_product {
    ($name:expr, [$($part:literal),+], $forward:expr, $backward:expr, $($cell:literal),+) => {{
        use crate::backend::{Feature, Kernel};
        use crate::kernels::sweep_step::{Sweep, composed};
        const FORWARD: Kernel = Kernel {
            name: concat!($name, "_forward"),
            source: composed!(["sweep_step.wgsl", $($part),+], $($cell),+),
            entry: "forward",
            params: Sweep::LAYOUT,
            bindings: $forward,
            workgroup: 64,
            features: &[],
        };
        const BACKWARD: Kernel =
            Kernel { name: concat!($name, "_backward"), entry: "backward", bindings: $backward, ..FORWARD };
        const TILED: &str = composed!(["sweep_step.wgsl", $($part),+, "sweep_step_tiled.wgsl"], $($cell),+);
        const SUBGROUP: &str =
            composed!(["sweep_step.wgsl", $($part),+, "sweep_step_subgroup.wgsl", "subgroup_rows.wgsl"], $($cell),+);
        const FORWARD_SUBGROUP: Kernel = Kernel {
            name: concat!($name, "_forward_subgroup"),
            source: SUBGROUP,
            entry: "forward_subgroup",
            workgroup: 8,
            features: &[Feature::Subgroups],
            ..FORWARD
        };
        const BACKWARD_SUBGROUP: Kernel = Kernel {
            name: concat!($name, "_backward_subgroup"),
            entry: "backward_subgroup",
            bindings: $backward,
            ..FORWARD_SUBGROUP
        };
        crate::kernels::cell_contract::StepProduct {
            forward: [
                FORWARD,
                Kernel { name: concat!($name, "_forward_tiled"), source: TILED, entry: "forward_tiled", workgroup: 256, ..FORWARD },
                FORWARD_SUBGROUP,
                Kernel { name: concat!($name, "_forward_row"), entry: "forward_row", ..FORWARD_SUBGROUP },
            ],
            backward: [
                BACKWARD,
                Kernel { name: concat!($name, "_backward_tiled"), source: TILED, entry: "backward_tiled", workgroup: 256, ..BACKWARD },
                BACKWARD_SUBGROUP,
                Kernel { name: concat!($name, "_backward_row"), entry: "backward_row", ..BACKWARD_SUBGROUP },
            ],
        }
    }};
}
pub(crate) use step_product;

/// A cell composed with this file's shader; with the macro of [`super::sweep_pair`] that names the parts of a step of two products, if
/// the cell has such.
macro_rules! step_kernels {
    ($name:literal, $($cell:literal),+) => {
        crate::kernels::sweep_step::step_kernels!(@ None, $name, $($cell),+)
    };
    ($name:literal, $pair:ident, $($cell:literal),+) => {
        crate::kernels::sweep_step::step_kernels!(@ Some(crate::kernels::sweep_pair::$pair!($name, $($cell),+)), $name, $($cell),+)
    };
    (@ $pair:expr, $name:literal, $($cell:literal),+) => {{
        use crate::kernels::sweep_step::step_product;
        use crate::kernels::{READ, READ_WRITE};
        const WHOLE: crate::kernels::cell_contract::StepProduct = step_product!(
            concat!($name, "_step"),
            ["step_whole.wgsl", "step_from_h.wgsl"],
            &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE)],
            &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE)],
            $($cell),+
        );
        crate::kernels::cell_contract::StepKernels {
            whole: WHOLE,
            forward_split: crate::backend::Kernel {
                name: concat!($name, "_step_forward_split"),
                entry: "forward_split",
                bindings: &[(1, READ_WRITE), (2, READ_WRITE), (4, READ), (5, READ), (6, READ_WRITE), (8, READ_WRITE)],
                ..WHOLE.forward[0]
            },
            pair: $pair,
        }
    }};
}
pub(crate) use step_kernels;

/// Lanes of a workgroup; rows of a lane, which have sums of their own; units of a lane in backward, as in the shader.
const WORKGROUP: usize = 64;
const ROWS: usize = 4;
const UNITS: usize = 4;

/// How a step is computed on a GPU; `kernels::choice` picks one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StepKernel {
    /// Any device: a lane has 4 rows, of one unit, in backward of 4.
    General,
    /// Through workgroup memory: tiles of 32 rows and 8 units, in backward 16.
    Tiled,
    /// Subgroups of 8 lanes: tiles of 16 rows, in backward 32, and 32 units.
    Subgroup,
    /// The same for a row by itself.
    SubgroupRow,
}

impl fmt::Display for StepKernel {
    /// Its name as serde knows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl StepKernel {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::General, Self::Tiled, Self::Subgroup, Self::SubgroupRow];

    /// Whether the device has what the kernel asks for.
    pub(crate) fn runs_on(self, gpu: &Gpu) -> bool {
        match self {
            Self::General | Self::Tiled => true,
            Self::Subgroup | Self::SubgroupRow => gpu.subgroup_size() == Some(8),
        }
    }

    /// Whether the kernel can do products of these widths on this device.
    pub(crate) fn takes<C: CellKernel>(self, gpu: &Gpu, widths: [usize; 2]) -> bool {
        match self {
            Self::General => true,
            Self::Tiled => C::PRODUCT,
            Self::Subgroup | Self::SubgroupRow => {
                self.runs_on(gpu) && C::PRODUCT && widths.iter().all(|width| width.is_multiple_of(4))
            }
        }
    }

    /// The kernel, and rows and units of a workgroup.
    pub(super) fn forward(self, product: &'static StepProduct) -> (&'static Kernel, [usize; 2]) {
        let [general, tiled, subgroup, row] = &product.forward;
        match self {
            Self::General => (general, [ROWS, WORKGROUP]),
            Self::Tiled => (tiled, [32, 8]),
            Self::Subgroup => (subgroup, [16, 32]),
            Self::SubgroupRow => (row, [1, 32]),
        }
    }

    /// The same backward, where units are those of what is seen.
    pub(super) fn backward(self, product: &'static StepProduct) -> (&'static Kernel, [usize; 2]) {
        let [general, tiled, subgroup, row] = &product.backward;
        match self {
            Self::General => (general, [ROWS, WORKGROUP * UNITS]),
            Self::Tiled => (tiled, [32, 16]),
            Self::Subgroup => (subgroup, [32, 32]),
            Self::SubgroupRow => (row, [1, 32]),
        }
    }
}

impl Plan<'_> {
    /// Which step this is in the order of the direction.
    pub(super) fn number(&self, (t, ..): Step) -> u32 {
        (if self.reverse { self.steps - 1 - t } else { t }) as u32
    }

    /// A launch of one step of this direction, the first of the run.
    pub(super) fn params(&self, depth: usize) -> Sweep {
        let [key0, key1] = self.key.words();
        Sweep {
            rows: self.rows as u32,
            hidden: self.hidden as u32,
            width: self.hidden as u32,
            depth: depth as u32,
            t: self.run.first as u32,
            steps: 1,
            last: self.steps as u32 - 1,
            reverse: self.reverse.into(),
            sides: 1,
            recurrent: 0,
            finish: 0,
            tile: 0,
            rescue: 0,
            ragged: self.lengths.is_some().into(),
            keep: self.keeps(depth).into(),
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
            opposite: 0,
            ahead: 0,
            next_key0: 0,
            next_key1: 0,
            next_slots: 0,
            next_states: 0,
            next_weights: 0,
            next_unit: 0,
            next_y: 0,
            next_dstates: 0,
            next_between: 0,
            next_carried: 0,
            next_douts: 0,
            next_stats: 0,
            next_norms: 0,
            lines: 0,
            shows: 0,
        }
    }
}

/// What the launches of a sweep share: [`uniforms`], and what they bind, backward with dstates.
pub(super) fn prepare<C: CellKernel>(cell: &C, sides: &[Side<'_>], dstates: &[&Tensor]) -> (Sweep, Vec<Range>) {
    let mut bindings = sweep::bindings(sides).to_vec();
    if !dstates.is_empty() {
        bindings.push(sweep::range(dstates));
    }
    (uniforms(cell, sides, dstates), bindings)
}

/// The uniform struct of the first step of the sides' runs.
pub(super) fn uniforms<C: CellKernel>(cell: &C, sides: &[Side<'_>], dstates: &[&Tensor]) -> Sweep {
    let Side { plan, buffers } = &sides[0];
    let flow_at = plan.flow_at(cell).unwrap_or(0) as u32;
    let params = Sweep { flow_at, ..plan.params(plan.depth::<C>(buffers.states)) };
    let [_, second] = sides else { return params };
    let next = &second.buffers;
    let ends = |plan: &Plan<'_>| [plan.run.first == 0, plan.run.end() == plan.steps];
    debug_assert_eq!(second.plan.run.count, plan.run.count, "sides have equally many steps");
    debug_assert!(dstates.is_empty() || ends(&second.plan) == ends(plan), "sides begin and end backward together");
    let [next_key0, next_key1] = second.plan.key.words();
    Sweep {
        sides: 2,
        opposite: (second.plan.reverse != plan.reverse).into(),
        ahead: (second.plan.run.first as u32).wrapping_sub(plan.run.first as u32),
        next_key0,
        next_key1,
        next_slots: sweep::words(&[buffers.slots, next.slots]),
        next_states: sweep::words(&[buffers.states, next.states]),
        next_weights: sweep::words(&[buffers.weights, next.weights]),
        next_unit: sweep::words(&[buffers.unit, next.unit]),
        next_y: sweep::words(&[buffers.y, next.y]) + (second.plan.y_offset - plan.y_offset) as u32,
        next_dstates: if dstates.is_empty() { 0 } else { sweep::words(dstates) },
        ..params
    }
}

/// Workgroups of `rows` rows and `units` units each, for so many units of each side.
pub(super) fn groups(sides: &[Side<'_>], width: usize, [rows, units]: [usize; 2]) -> [u32; 3] {
    tiles(sides.len() * width.div_ceil(units), sides[0].plan.rows.div_ceil(rows))
}

/// W_hh `[GATES * H, R]` as [`forward`], or `sweep_pair`, reads it on its device.
pub(crate) fn forward_weights<C: CellKernel>(weights: &Tensor, hidden: usize) -> Result<Tensor> {
    match weights.device().backend() {
        Backend::Native => sweep_native::pack::<C>(weights, hidden),
        Backend::Gpu(_) => transpose::matrix(weights, C::Pre::LEN * hidden, weights.shape()[1]),
    }
}

/// Numbers of what [`forward_weights`] makes, at most.
pub(crate) fn forward_weights_len<C: CellKernel>(hidden: usize) -> usize {
    if C::PRODUCT { sweep_native::packed_len::<C>(hidden, hidden) } else { 0 }
}

/// Numbers of a copy of W_ih for forward passes, at most.
pub(crate) fn input_weights_len<C: CellKernel>(hidden: usize, inputs: usize) -> usize {
    sweep_native::packed_len::<C>(hidden, inputs)
}

/// W_ih `[GATES * H, inputs]` as [`forward_from`] reads it.
pub(crate) fn input_weights<C: CellKernel>(weights: &Tensor, hidden: usize) -> Result<Tensor> {
    sweep_native::pack::<C>(weights, hidden)
}

/// As [`forward`] of one side, with the product of x formed here: only where [`super::sweep::forms_inputs`].
pub(crate) fn forward_from<C: CellKernel>(cell: &C, Side { plan, buffers }: &Side<'_>, inputs: &Inputs<'_>) {
    let depth = plan.depth::<C>(buffers.states);
    (C::NATIVE.forward)(cell, plan, buffers, depth, &plan.order(depth).collect::<Vec<_>>(), Some(inputs), None);
}

/// Runs the cell over a run of steps, of two sides at once: fills y, the states, and what backward needs.
pub(crate) fn forward<C: CellKernel>(cell: &C, sides: &[Side<'_>]) -> Result<()> {
    let plan = &sides[0].plan;
    let device = sides[0].buffers.slots.device();
    match device.backend() {
        Backend::Native => {
            for Side { plan, buffers } in sides {
                let depth = plan.depth::<C>(buffers.states);
                (C::NATIVE.forward)(cell, plan, buffers, depth, &plan.order(depth).collect::<Vec<_>>(), None, None);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let (kernel, tile) = choice::step::<C>(device, gpu, plan, plan.hidden).forward(&C::KERNELS.whole);
            let (params, bindings) = prepare(cell, sides, &[]);
            let run = plan.run.first as u32..plan.run.end() as u32;
            let steps = run.map(|t| (Sweep { t, ..params }, groups(sides, plan.hidden, tile)));
            gpu.launch_each(kernel, &plan.constants(cell, false), &bindings, steps)
        }
    }
}

/// Runs the cell over one step of each side, given the products `[B, GATES, H]`, one behind the other.
pub(crate) fn forward_split<C: CellKernel>(cell: &C, sides: &[Side<'_>], products: &[Tensor], steps: &[Step]) -> Result<()> {
    let plan = &sides[0].plan;
    match products[0].device().backend() {
        Backend::Native => {
            for ((Side { plan, buffers }, product), step) in sides.iter().zip(products).zip(steps) {
                let depth = plan.depth::<C>(buffers.states);
                (C::NATIVE.forward)(cell, plan, buffers, depth, &[*step], None, Some(product));
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let [slots, states, _, unit, lengths, y] = sweep::bindings(sides);
            let bindings = [slots, states, unit, lengths, y, sweep::range(products)];
            let params = Sweep { t: plan.number(steps[0]), next_between: sweep::words(products), ..uniforms(cell, sides, &[]) };
            let step = (params, groups(sides, plan.hidden, [1, WORKGROUP]));
            gpu.launch_each(&C::KERNELS.forward_split, &plan.constants(cell, false), &bindings, std::iter::once(step))
        }
    }
}

/// Runs the cell backward over a run of steps, of two sides at once; the first and the last step are of both or of neither. `dstates` of
/// each, of [`Plan::dstates_len`] words: the gradient of the final state `[STATES, B, H]` comes in before the first run, that of the initial
/// state goes out of the last one; sums are added to those behind it.
pub(crate) fn backward<C: CellKernel>(cell: &C, sides: &[Side<'_>], dstates: &[&Tensor]) -> Result<()> {
    let Side { plan, buffers } = &sides[0];
    let depth = plan.steps + 1;
    debug_assert_eq!(plan.depth::<C>(buffers.states), depth, "backward needs every state");
    let device = buffers.slots.device();
    match device.backend() {
        Backend::Native => {
            for (Side { plan, buffers }, dstates) in sides.iter().zip(dstates) {
                debug_assert_eq!(plan.run, Run::whole(plan.steps));
                (C::NATIVE.backward)(cell, plan, buffers, dstates, &plan.order(depth).rev().collect::<Vec<_>>(), true);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let (kernel, tile) = choice::step::<C>(device, gpu, plan, plan.hidden).backward(&C::KERNELS.whole);
            let (params, bindings) = prepare(cell, sides, dstates);
            let steps = plan.run.first as u32..plan.run.end() as u32;
            let steps = steps.rev().map(|t| Sweep { t, recurrent: u32::from(t + 1 < plan.steps as u32), ..params });
            // The product of the first step, whose gradient is the initial state's.
            let finish = (C::PRODUCT && plan.run.first == 0).then_some(Sweep { recurrent: 1, finish: 1, ..params });
            let launches = steps.chain(finish).map(|params| (params, groups(sides, plan.hidden, tile)));
            gpu.launch_each(kernel, &plan.constants(cell, true), &bindings, launches)
        }
    }
}

/// Runs the cell backward over one step of each side; what comes through the product is in `dstates` already.
pub(crate) fn backward_split<C: CellKernel>(cell: &C, sides: &[Side<'_>], dstates: &[&Tensor], steps: &[Step]) -> Result<()> {
    let plan = &sides[0].plan;
    match dstates[0].device().backend() {
        Backend::Native => {
            for ((Side { plan, buffers }, dstates), step) in sides.iter().zip(dstates).zip(steps) {
                (C::NATIVE.backward)(cell, plan, buffers, dstates, &[*step], false);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let (kernel, tile) = StepKernel::General.backward(&C::KERNELS.whole);
            let (params, bindings) = prepare(cell, sides, dstates);
            let step = (Sweep { t: plan.number(steps[0]), ..params }, groups(sides, plan.hidden, tile));
            gpu.launch_each(kernel, &plan.constants(cell, true), &bindings, std::iter::once(step))
        }
    }
}
