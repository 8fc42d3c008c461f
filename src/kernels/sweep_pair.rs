//! The sweep over time on a GPU where a step has two products, a launch for each, for both sides: the second sees what came of
//! the first. Either the recurrence goes through an output product (projection, a Jordan network), or the last gate sees what another has
//! made of h ([`CellKernel::gated`], a GRU with the reset before the product). Whatever else there is around a product is for
//! `sweep_split`.

use std::fmt;
use std::ops::Range as Indices;

use serde::{Deserialize, Serialize};

use super::cell_contract::{Block, CellKernel, StepProduct};
use super::choice;
use super::sweep::{self, Plan, Side, range, words};
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
                ["step_projected.wgsl"],
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (9, READ_WRITE)],
                &[(1, READ_WRITE), (3, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE), (10, READ_WRITE), (11, READ_WRITE)],
                $($cell),+
            ),
            step_product!(
                concat!($name, "_step_output"),
                ["step_output.wgsl"],
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
                ["step_reset.wgsl", "step_from_h.wgsl"],
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (8, READ_WRITE)],
                &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE)],
                $($cell),+
            ),
            step_product!(
                concat!($name, "_step_candidate"),
                ["step_candidate.wgsl"],
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

/// Whether steps have two products on this device, and these are fused; `output`: whether the recurrence goes through one.
pub(crate) fn is_fused<C: CellKernel>(device: &Device, cell: &C, plan: &Plan<'_>, output: bool) -> bool {
    let Backend::Gpu(gpu) = device.backend() else { return false };
    let is_pair = C::KERNELS.pair.is_some() && (output || cell.gated().is_some());
    is_pair && choice::pair::<C>(device, gpu, plan) == PairKernel::Fused
}

/// The output products of all sides; what belongs to the second side lies behind what belongs to the first.
pub(crate) struct Outputs<'a> {
    /// R.
    pub width: usize,
    /// W_hr transposed `[H, R]`.
    pub weights: Vec<Tensor>,
    /// `[R]`
    pub biases: Option<Vec<Tensor>>,
    /// o of each step, laid out as the states: `[depth, B, R]`.
    pub outputs: Vec<&'a Tensor>,
}

impl Outputs<'_> {
    /// Those of some sides.
    pub fn part(&self, sides: Indices<usize>) -> Self {
        let of_sides = |tensors: &Vec<Tensor>| tensors[sides.clone()].to_vec();
        let (weights, biases) = (of_sides(&self.weights), self.biases.as_ref().map(of_sides));
        Self { width: self.width, weights, biases, outputs: self.outputs[sides].to_vec() }
    }
}

/// The same backward.
pub(crate) struct OutputGradients<'a> {
    /// R.
    pub width: usize,
    /// W_hr `[R, H]`.
    pub weights: Vec<Tensor>,
    /// `[B, R]`: the gradient of the final o comes in, that of the initial one goes out.
    pub carried: Vec<&'a Tensor>,
    /// `[T, B, R]`: the gradient of each o.
    pub douts: Vec<&'a Tensor>,
}

impl<'a> OutputGradients<'a> {
    /// Those of some sides.
    pub fn part(&self, sides: Indices<usize>) -> Self {
        let of_sides = |tensors: &Vec<&'a Tensor>| tensors[sides.clone()].to_vec();
        let (carried, douts) = (of_sides(&self.carried), of_sides(&self.douts));
        Self { width: self.width, weights: self.weights[sides].to_vec(), carried, douts }
    }
}

/// A launch of each step.
struct Part {
    kernel: &'static Kernel,
    constants: Vec<(&'static str, f64)>,
    bindings: Vec<Range>,
    groups: [u32; 3],
    params: Sweep,
}

impl Part {
    /// `of_step`: what this step has in place of what all have.
    fn launch(&self, gpu: &Gpu, of_step: impl FnOnce(Sweep) -> Sweep) -> Result<()> {
        gpu.launch_each(self.kernel, &self.constants, &self.bindings, std::iter::once((of_step(self.params), self.groups)))
    }
}

fn kernels<'a, C: CellKernel>(sides: &[Side<'a>]) -> (&'a Gpu, &'static [StepProduct; 2]) {
    match (sides[0].buffers.slots.device().backend(), &C::KERNELS.pair) {
        (Backend::Gpu(gpu), Some(pair)) => (gpu, pair),
        _ => unreachable!("callers ask is_fused"),
    }
}

/// As [`sweep_step::forward`], but W_hh has R columns where there are outputs; then [`Plan::output`] is false, and y takes these.
pub(crate) fn forward<C: CellKernel>(cell: &C, sides: &[Side<'_>], outputs: Option<&Outputs<'_>>) -> Result<()> {
    let (gpu, [first, second]) = kernels::<C>(sides);
    let plan = &sides[0].plan;
    let device = sides[0].buffers.slots.device();
    let width = outputs.map_or(plan.hidden, |outputs| outputs.width);
    let step = choice::step::<C>(device, gpu, plan, width);
    let [slots, states, weights, unit, lengths, y] = sweep::bindings(sides);
    let params = Sweep { width: width as u32, ..sweep_step::uniforms(cell, sides, &[]) };
    let part = |product, made, bindings: Vec<Range>, params| {
        let (kernel, tile) = step.forward(product);
        Part { kernel, constants: plan.constants(cell, false), bindings, groups: groups(sides, made, tile), params }
    };
    let parts = match outputs {
        Some(Outputs { weights: weights_hr, biases, outputs, .. }) => {
            let params = Sweep { next_between: words(outputs), ..params };
            let outputs = range(outputs);
            // Without a bias something must still be bound in its place.
            let (bias, next_unit) = biases.as_ref().map_or((unit.clone(), 0), |biases| (range(biases), words(biases)));
            let of_second = vec![states.clone(), range(weights_hr), bias, lengths.clone(), y.clone(), outputs.clone()];
            let mut second = part(second, width, of_second, Sweep { next_weights: words(weights_hr), next_unit, ..params });
            second.constants.push(("biased", f64::from(u8::from(biases.is_some()))));
            [part(first, plan.hidden, vec![slots, states, weights, unit, lengths, y, outputs], params), second]
        }
        None => {
            let products = Tensor::in_a_row(device, [plan.rows, C::Pre::LEN, plan.hidden], sides.len())?;
            let params = Sweep { next_between: words(&products), ..params };
            let products = range(&products);
            let of_first = vec![slots.clone(), states.clone(), weights.clone(), unit.clone(), products.clone()];
            let of_second = vec![slots, states, weights, unit, lengths, y, products];
            [part(first, plan.hidden, of_first, params), part(second, plan.hidden, of_second, params)]
        }
    };
    let mut run = plan.run.first as u32..plan.run.end() as u32;
    run.try_for_each(|t| parts.iter().try_for_each(|part| part.launch(gpu, |params| Sweep { t, ..params })))
}

/// As [`sweep_step::backward`], likewise; the gradient of the final output comes in, and that of the initial one goes out, in
/// [`OutputGradients::carried`].
pub(crate) fn backward<C: CellKernel>(
    cell: &C,
    sides: &[Side<'_>],
    dstates: &[&Tensor],
    outputs: Option<&OutputGradients<'_>>,
) -> Result<()> {
    let (gpu, [first, second]) = kernels::<C>(sides);
    let plan = &sides[0].plan;
    let width = outputs.map_or(plan.hidden, |outputs| outputs.width);
    let step = choice::step::<C>(sides[0].buffers.slots.device(), gpu, plan, width);
    let ([slots, states, weights, unit, lengths, y], all_dstates) = (sweep::bindings(sides), range(dstates));
    let params = Sweep { width: width as u32, recurrent: 1, ..sweep_step::uniforms(cell, sides, dstates) };
    // The sums and the flow are the cell's.
    let part = |product, seen, has_cell, bindings: Vec<Range>, params| {
        let (kernel, tile) = step.backward(product);
        Part { kernel, constants: plan.constants(cell, has_cell), bindings, groups: groups(sides, seen, tile), params }
    };
    let (through, own) = match outputs {
        Some(OutputGradients { weights: weights_hr, carried, douts, .. }) => {
            let params = Sweep { next_carried: words(carried), next_douts: words(douts), ..params };
            let (carried, douts) = (range(carried), range(douts));
            let of_first = vec![slots.clone(), weights, lengths.clone(), y.clone(), all_dstates.clone(), douts.clone(), carried];
            let of_second = vec![slots, states, range(weights_hr), unit, lengths, y, all_dstates, douts];
            let of_weights = Sweep { next_weights: words(weights_hr), ..params };
            (part(first, width, false, of_first, params), part(second, plan.hidden, true, of_second, of_weights))
        }
        None => {
            let of_first = vec![slots.clone(), states.clone(), weights.clone(), unit, lengths, y, all_dstates.clone()];
            let of_second = vec![slots, states, weights, all_dstates];
            (part(first, plan.hidden, true, of_first, params), part(second, plan.hidden, false, of_second, params))
        }
    };
    for t in (plan.run.first as u32..plan.run.end() as u32).rev() {
        through.launch(gpu, |params| Sweep { t, recurrent: u32::from(t + 1 < plan.steps as u32), ..params })?;
        own.launch(gpu, |params| Sweep { t, ..params })?;
    }
    // The product of the first step, whose gradient is the initial state's.
    if plan.run.first > 0 {
        return Ok(());
    }
    through.launch(gpu, |params| Sweep { finish: 1, ..params })
}
