//! The sweep over time on a GPU where a step has two products, a launch for each: the second sees what came of the first. Either the
//! recurrence goes through an output product (projection, a Jordan network), or the last gate sees what another has made of h
//! ([`CellKernel::gated`], a GRU with the reset before the product). Whatever else there is around a product is for `sweep_split`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::cell_contract::{Block, CellKernel, StepProduct};
use super::choice;
use super::sweep::{self, Buffers, Plan, Side};
use super::sweep_split::OutputProduct;
use super::sweep_step::{self, Sweep, groups};
use crate::backend::Kernel;
use crate::backend::gpu::{Gpu, Range};
use crate::device::{Backend, Device};
use crate::error::Result;
use crate::tensor::Tensor;

/// The products of a step with an output.
macro_rules! projected {
    ($name:literal, $($cell:literal),+) => {{
        use crate::kernels::sweep_step::step_product;
        use crate::kernels::{READ, READ_WRITE};
        [
            step_product!(
                concat!($name, "_step_projected"),
                "step_projected.wgsl",
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (9, READ_WRITE)],
                &[(1, READ_WRITE), (3, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE), (10, READ_WRITE), (11, READ_WRITE)],
                $($cell),+
            ),
            step_product!(
                concat!($name, "_step_output"),
                "step_output.wgsl",
                &[(2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (9, READ_WRITE)],
                &[
                    (1, READ_WRITE),
                    (2, READ_WRITE),
                    (3, READ),
                    (4, READ),
                    (5, READ),
                    (6, READ_WRITE),
                    (7, READ_WRITE),
                    (10, READ),
                ],
                $($cell),+
            ),
        ]
    }};
}
pub(crate) use projected;

/// The products of a step of a GRU with the reset before the product.
macro_rules! reset {
    ($name:literal, $($cell:literal),+) => {{
        use crate::kernels::sweep_step::step_product;
        use crate::kernels::{READ, READ_WRITE};
        [
            step_product!(
                concat!($name, "_step_reset"),
                "step_reset.wgsl",
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (8, READ_WRITE)],
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE)],
                $($cell),+
            ),
            step_product!(
                concat!($name, "_step_candidate"),
                "step_candidate.wgsl",
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (8, READ_WRITE)],
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (7, READ_WRITE)],
                $($cell),+
            ),
        ]
    }};
}
pub(crate) use reset;

/// How steps of two products are computed on a GPU; `kernels::choice` picks one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PairKernel {
    /// Each product in one launch with what follows it.
    Fused,
    /// The products and what follows them in launches of their own.
    Apart,
}

impl fmt::Display for PairKernel {
    /// Its name as serde knows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl PairKernel {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Fused, Self::Apart];
}

/// The products of such a step, where they are fused.
pub(crate) fn products<'a, C: CellKernel>(device: &'a Device, plan: &Plan<'_>) -> Option<(&'a Gpu, &'static [StepProduct; 2])> {
    let (Backend::Gpu(gpu), Some(pair)) = (device.backend(), &C::KERNELS.pair) else { return None };
    (choice::pair::<C>(device, gpu, plan) == PairKernel::Fused).then_some((gpu, pair))
}

/// A launch of each step.
struct Part {
    kernel: &'static Kernel,
    constants: Vec<(&'static str, f64)>,
    bindings: Vec<Range>,
    groups: [u32; 3],
}

impl Part {
    fn launch(&self, gpu: &Gpu, params: Sweep) -> Result<()> {
        gpu.launch_each(self.kernel, &self.constants, &self.bindings, std::iter::once((params, self.groups)))
    }
}

/// As [`super::sweep_split::forward`], in single precision with nothing but `output` around the products.
pub(crate) fn forward<C: CellKernel>(
    (gpu, [first, second]): (&Gpu, &'static [StepProduct; 2]),
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    weights: &Tensor,
    output: Option<&OutputProduct<'_>>,
) -> Result<()> {
    let device = buffers.slots.device();
    let width = output.map_or(plan.hidden, |output| output.width);
    let step = choice::step::<C>(device, gpu, plan, width);
    let sides = [Side { plan: *plan, buffers: *buffers }];
    let [slots, states, _, unit, lengths, y] = sweep::bindings(&sides);
    let weights = weights.range();
    let part = |product, made, bindings: Vec<Range>| {
        let (kernel, tile) = step.forward(product);
        Part { kernel, constants: plan.constants(cell, false), bindings, groups: groups(&sides, made, tile) }
    };
    let parts = match output {
        Some(OutputProduct { weights: weights_hr, bias, outputs, y: output_y, .. }) => {
            let outputs = outputs.range();
            let bias_or_unit = bias.map_or(unit.clone(), Tensor::range);
            let second_bindings =
                vec![states.clone(), weights_hr.words.range(), bias_or_unit, lengths.clone(), output_y.range(), outputs.clone()];
            let mut second = part(second, width, second_bindings);
            second.constants.push(("biased", f64::from(u8::from(bias.is_some()))));
            [part(first, plan.hidden, vec![slots, states, weights, unit, lengths, y, outputs]), second]
        }
        None => {
            let products = Tensor::uninitialized(device, [plan.rows, C::Pre::LEN, plan.hidden])?.range();
            [
                part(first, plan.hidden, vec![slots.clone(), states.clone(), weights.clone(), unit.clone(), products.clone()]),
                part(second, plan.hidden, vec![slots, states, weights, unit, lengths, y, products]),
            ]
        }
    };
    let params = Sweep { width: width as u32, ..plan.params(plan.depth::<C>(buffers.states)) };
    (0..plan.steps as u32).try_for_each(|t| parts.iter().try_for_each(|part| part.launch(gpu, Sweep { t, ..params })))
}

/// As [`super::sweep_split::backward`], likewise.
pub(crate) fn backward<C: CellKernel>(
    (gpu, [first, second]): (&Gpu, &'static [StepProduct; 2]),
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    weights: &Tensor,
    output: Option<(&OutputProduct<'_>, &Tensor, &Tensor)>,
    dstates: &Tensor,
) -> Result<()> {
    let width = output.map_or(plan.hidden, |(output, ..)| output.width);
    let step = choice::step::<C>(buffers.slots.device(), gpu, plan, width);
    let sides = [Side { plan: *plan, buffers: *buffers }];
    let (params, _) = sweep_step::prepare(cell, &sides, &[dstates]);
    let params = Sweep { width: width as u32, ..params };
    let [slots, states, _, unit, lengths, y] = sweep::bindings(&sides);
    let (weights, dstates) = (weights.range(), dstates.range());
    // The sums and the flow are the cell's.
    let part = |product, seen, has_cell, bindings: Vec<Range>| {
        let (kernel, tile) = step.backward(product);
        Part { kernel, constants: plan.constants(cell, has_cell), bindings, groups: groups(&sides, seen, tile) }
    };
    let (through, own) = match output {
        Some((OutputProduct { weights: weights_hr, y: dy, .. }, carried, douts)) => {
            let (carried, douts) = (carried.range(), douts.range());
            let bindings = vec![slots.clone(), weights, lengths.clone(), dy.range(), dstates.clone(), douts.clone(), carried];
            let through = part(first, width, false, bindings);
            let bindings = vec![slots, states, weights_hr.words.range(), unit, lengths, y, dstates, douts];
            (through, part(second, plan.hidden, true, bindings))
        }
        None => {
            let bindings = vec![slots.clone(), states.clone(), weights.clone(), unit, lengths, y, dstates.clone()];
            let through = part(first, plan.hidden, true, bindings);
            (through, part(second, plan.hidden, false, vec![slots, states, weights, dstates]))
        }
    };
    let count = plan.steps as u32;
    for t in (0..count).rev() {
        through.launch(gpu, Sweep { t, recurrent: u32::from(t + 1 < count), ..params })?;
        own.launch(gpu, Sweep { t, recurrent: 1, ..params })?;
    }
    // The product of the first step, whose gradient is the initial state's.
    through.launch(gpu, Sweep { recurrent: 1, finish: 1, ..params })
}
