//! The sweep over time for what comes between the recurrent product and the cell, or after the cell: each step is a row of
//! launches, the same on every device but for layer normalization ([`super::sweep_rows`]). The cell, with that, is one launch for both
//! sides; products have a launch each. Slower than `sweep_step`, which does without any of it; where another product is all that there
//! is, `sweep_pair` may do it on a GPU.

use super::cell_contract::{Block, CellKernel, GatedStep, is_gated, recurrent_runs};
use super::gate_mask::{self, Masks};
use super::gemm::Matrix;
use super::gemm_half::product;
use super::half::Factor;
use super::output_step::{self, Teacher};
use super::sweep::{Buffers, Plan, Side, Step};
use super::sweep_rows::{self, RowNorms, lines_of};
use super::sweep_step;
use crate::error::Result;
use crate::tensor::Tensor;

/// What a step does beside its cell.
#[derive(Default)]
pub(crate) struct Extras<'a> {
    /// Layer normalization of the recurrent product, and of a state on its way to h.
    pub norms: Option<RowNorms<'a>>,
    /// The output product `o = W_hr m + b`: o and not the cell's own output m is what the recurrence and y see.
    pub output: Option<OutputProduct<'a>>,
    /// Targets in place of o in the recurrence.
    pub teacher: Option<&'a Teacher>,
    /// What h is multiplied with on its way into each gate's product; for a cell without [`CellKernel::gated`].
    pub masks: Option<Masks>,
}

/// An output product: a projection, or a Jordan network's output.
pub(crate) struct OutputProduct<'a> {
    /// R.
    pub width: usize,
    /// Forward: W_hr transposed `[H, R]`. Backward: W_hr.
    pub weights: Factor,
    /// `[R]`
    pub bias: Option<&'a Tensor>,
    /// o of each step, laid out as the states: `[depth, B, R]`.
    pub outputs: &'a Tensor,
    /// Backward: `[T, B, R]`, the gradient of each o.
    pub douts: Option<&'a Tensor>,
    /// Backward: `[B, R]`. The gradient of the final o comes in, that of the initial one goes out.
    pub carried: Option<&'a Tensor>,
    /// As [`Buffers::y`] without an output product.
    pub y: &'a Tensor,
}

/// A side with what its steps have beside the cell. `weights` stand for [`Buffers::weights`]: W_hh, forward transposed `[R, GATES * H]`,
/// backward `[GATES * H, R]` in runs of H.
pub(crate) struct SplitSide<'a> {
    pub side: Side<'a>,
    pub weights: Factor,
    pub extras: Extras<'a>,
}

/// As [`sweep_step::forward`]; with an output product [`Plan::output`] is false.
pub(crate) fn forward<C: CellKernel>(cell: &C, splits: &[SplitSide<'_>]) -> Result<()> {
    let sides: Vec<Side<'_>> = splits.iter().map(|split| split.side).collect();
    let (plan, buffers) = (&sides[0].plan, &sides[0].buffers);
    let (rows, hidden, depth) = (plan.rows, plan.hidden, plan.depth::<C>(buffers.states));
    let masks = splits.iter().map(SplitSide::masks::<C>).collect::<Result<Vec<_>>>()?;
    let norms: Vec<&RowNorms<'_>> = splits.iter().filter_map(|split| split.extras.norms.as_ref()).collect();
    let device = buffers.slots.device();
    // Layer normalization keeps the products itself; the CPU makes others of them.
    let recurrent = match norms.is_empty() || device.is_cpu() {
        true => Tensor::in_a_row(device, [rows, C::Pre::LEN * hidden], sides.len())?,
        false => Vec::new(),
    };
    for steps in steps_of(&sides, depth) {
        for (side, split) in splits.iter().enumerate() {
            let SplitSide { side: Side { plan, .. }, extras, .. } = split;
            let step = steps[side];
            if let (Some(teacher), Some(output)) = (extras.teacher, &extras.output) {
                output_step::teach(plan, teacher, output.width, output.outputs, step)?;
            }
            let target = match &extras.norms {
                Some(norms) => norms.product(plan, step.0),
                None => Matrix::new(&recurrent[side], rows, C::Pre::LEN * hidden),
            };
            split.multiply(cell, masks[side].as_ref(), target, step)?;
        }
        match norms.is_empty() {
            true => sweep_step::forward_split(cell, &sides, &recurrent, &steps)?,
            false => sweep_rows::forward(cell, &sides, &norms, &recurrent, &steps)?,
        }
        for (SplitSide { side: Side { plan, buffers }, extras, .. }, step) in splits.iter().zip(&steps) {
            let Some(output) = &extras.output else { continue };
            let (_, _, after) = *step;
            let m = Matrix::window(buffers.states, after * rows * hidden, rows, hidden, hidden);
            let o = Matrix::window(output.outputs, after * rows * output.width, rows, output.width, output.width);
            product(m, &output.weights, output.bias, o, false)?;
            output_step::output(plan, output.width, output.outputs, output.y, buffers.unit, *step)?;
        }
    }
    Ok(())
}

/// The steps of all sides, those together that are taken together.
fn steps_of(sides: &[Side<'_>], depth: usize) -> impl DoubleEndedIterator<Item = Vec<Step>> + use<> {
    let orders: Vec<Vec<Step>> = sides.iter().map(|side| side.plan.order(depth).collect()).collect();
    (0..orders[0].len()).map(move |n| orders.iter().map(|order| order[n]).collect())
}

/// As [`sweep_step::backward`], but the initial state's gradient is whole: in `dstates`, or, that of o, in [`OutputProduct::carried`].
pub(crate) fn backward<C: CellKernel>(cell: &C, splits: &[SplitSide<'_>], dstates: &[&Tensor]) -> Result<()> {
    let sides: Vec<Side<'_>> = splits.iter().map(|split| split.side).collect();
    let (rows, hidden) = (sides[0].plan.rows, sides[0].plan.hidden);
    let masks = splits.iter().map(SplitSide::masks::<C>).collect::<Result<Vec<_>>>()?;
    let norms: Vec<&RowNorms<'_>> = splits.iter().filter_map(|split| split.extras.norms.as_ref()).collect();
    let dseen = match cell.gated() {
        Some(_) => Some(Tensor::uninitialized(dstates[0].device(), [rows, hidden])?),
        None => None,
    };
    for steps in steps_of(&sides, sides[0].plan.steps + 1).rev() {
        for ((SplitSide { side: Side { plan, buffers }, extras, .. }, dstates), step) in splits.iter().zip(dstates).zip(&steps) {
            let Some((output, carried, douts)) = extras.backward_output() else { continue };
            output_step::output_backward(plan, output.width, output.y, carried, douts, buffers.unit, *step)?;
            let dout = Matrix::window(douts, step.0 * rows * output.width, rows, output.width, output.width);
            product(dout, &output.weights, None, Matrix::window(dstates, 0, rows, hidden, hidden), false)?;
        }
        match norms.is_empty() {
            true => sweep_step::backward_split(cell, &sides, dstates, &steps)?,
            false => sweep_rows::backward(cell, &sides, &norms, dstates, &steps)?,
        }
        for (((split, masks), dstates), step) in splits.iter().zip(&masks).zip(dstates).zip(&steps) {
            split.multiply_backward(cell, masks.as_ref(), dseen.as_ref(), dstates, *step)?;
        }
    }
    Ok(())
}

impl SplitSide<'_> {
    /// The masks, and room for what they make of h, `[GATES, B, R]`.
    fn masks<C: CellKernel>(&self) -> Result<Option<(Masks, Tensor)>> {
        let (Some(masks), Side { plan, buffers }) = (self.extras.masks, &self.side) else { return Ok(None) };
        let width = self.extras.output.as_ref().map_or(plan.hidden, |output| output.width);
        Ok(Some((masks, Tensor::uninitialized(buffers.slots.device(), [C::Pre::LEN, plan.rows, width])?)))
    }

    /// The recurrent product of a step, `recurrent [B, GATES * H]`.
    fn multiply<C: CellKernel>(
        &self,
        cell: &C,
        masks: Option<&(Masks, Tensor)>,
        recurrent: Matrix<'_>,
        step: Step,
    ) -> Result<()> {
        let Self { side: Side { plan, buffers }, weights, extras } = self;
        let (rows, hidden, all) = (plan.rows, plan.hidden, C::Pre::LEN);
        let h = state_of(plan, buffers, extras, step.1);
        // Of `count` gates from `first` on, from what they see.
        let gates = |seen: Matrix<'_>, first: usize, count: usize| {
            let (first, count) = (first * hidden, count * hidden);
            product(seen, &weights.lines(first, count), None, recurrent.columns(first, count), false)
        };
        if let Some((masks, masked)) = masks {
            gate_mask::spread(masks, 0..all, h, masked)?;
            let seen = |gate: usize| Matrix::window(masked, gate * rows * h.cols, rows, h.cols, h.cols);
            return (0..all).try_for_each(|gate| gates(seen(gate), gate, 1));
        }
        let Some(gated) = cell.gated() else { return gates(h, 0, all) };
        gates(h, 0, all - 1)?;
        gated.forward(&gated_step(plan, buffers, step), buffers.unit, recurrent.tensor)?;
        gates(slots_of::<C>(plan, buffers, step, gated.slot(), 1), all - 1, 1)
    }

    /// What comes through the recurrent product of a step, after the cell.
    fn multiply_backward<C: CellKernel>(
        &self,
        cell: &C,
        masks: Option<&(Masks, Tensor)>,
        dseen: Option<&Tensor>,
        dstates: &Tensor,
        step: Step,
    ) -> Result<()> {
        let Self { side: Side { plan, buffers }, weights, extras } = self;
        let (rows, hidden, t) = (plan.rows, plan.hidden, step.0);
        let target = match extras.backward_output() {
            Some((output, carried, _)) => Matrix::new(carried, rows, output.width),
            None => Matrix::window(dstates, 0, rows, hidden, hidden),
        };
        let normalized = extras.norms.as_ref().and_then(|norms| norms.gradients);
        for run @ (gate, _, gates) in recurrent_runs(cell, masks.is_some()).into_iter().rev() {
            let dr = recurrent_gradient::<C>(buffers.slots, normalized, hidden, [t * rows, rows], run);
            let w = weights.runs(gate, gates);
            match (masks, cell.gated(), dseen) {
                (Some((_, masked)), ..) => {
                    let seen = Matrix::window(masked, gate * rows * target.cols, rows, target.cols, target.cols);
                    product(dr, &w, None, seen, false)?;
                }
                // The last gate comes first: the others' gradients follow from what its product saw.
                (None, Some(gated), Some(dseen)) if is_gated(cell, gate) => {
                    product(dr, &w, None, Matrix::new(dseen, rows, hidden), false)?;
                    gated.backward(&gated_step(plan, buffers, step), dseen, dstates)?;
                }
                _ => product(dr, &w, None, target, true)?,
            }
        }
        if let Some((masks, masked)) = masks {
            gate_mask::collect(masks, 0..C::Pre::LEN, masked, target)?;
        }
        if let (Some(teacher), Some((output, carried, _))) = (extras.teacher, extras.backward_output()) {
            output_step::teach_backward(plan, teacher, output.width, carried, step)?;
        }
        Ok(())
    }
}

/// After a backward step, the gradient of `count` lines of the recurrent product, `[count, gates * H]` for a run of gates: slots, or,
/// where the product is normalized, what came of them: [`RowNorms::gradients`].
pub(crate) fn recurrent_gradient<'a, C: CellKernel>(
    slots: &'a Tensor,
    normalized: Option<&'a Tensor>,
    hidden: usize,
    [line, count]: [usize; 2],
    (gate, slot, run): (usize, usize, usize),
) -> Matrix<'a> {
    let kept = C::Slots::LEN * hidden;
    match normalized {
        Some(gradients) => lines_of(gradients, line, count).columns(gate * hidden, run * hidden),
        None => Matrix::window(slots, line * kept + slot * hidden, count, run * hidden, kept),
    }
}

impl Extras<'_> {
    fn backward_output(&self) -> Option<(&OutputProduct<'_>, &Tensor, &Tensor)> {
        self.output.as_ref().and_then(|output| Some((output, output.carried?, output.douts?)))
    }
}

/// What the recurrence sees of a slot of the states, `[B, R]`.
fn state_of<'a>(plan: &Plan<'_>, buffers: &Buffers<'a>, extras: &Extras<'a>, slot: usize) -> Matrix<'a> {
    let (tensor, width) = match &extras.output {
        Some(output) => (output.outputs, output.width),
        None => (buffers.states, plan.hidden),
    };
    Matrix::window(tensor, slot * plan.rows * width, plan.rows, width, width)
}

/// `run` slots of a step from `slot` on, `[B, run * H]`.
fn slots_of<'a, C: CellKernel>(plan: &Plan<'_>, buffers: &Buffers<'a>, (t, ..): Step, slot: usize, run: usize) -> Matrix<'a> {
    let kept = C::Slots::LEN * plan.hidden;
    Matrix::window(buffers.slots, t * plan.rows * kept + slot * plan.hidden, plan.rows, run * plan.hidden, kept)
}

fn gated_step<'a>(plan: &Plan<'_>, buffers: &Buffers<'a>, (t, before, _): Step) -> GatedStep<'a> {
    GatedStep { rows: plan.rows, hidden: plan.hidden, t, before, slots: buffers.slots, states: buffers.states }
}
