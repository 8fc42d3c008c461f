//! The sweep over time for what comes between the recurrent product and the cell, or after the cell: each step is a row of
//! launches, the same on every device. Slower than `sweep_step`, which does without any of it.

use super::cell_contract::{Block, CellKernel, recurrent_runs};
use super::gemm::{Matrix, gemm};
use super::layer_norm::GateNorm;
use super::norm_output::StateNorm;
use super::output_step::{self, Teacher};
use super::sweep_step::{self, Buffers, Plan};
use crate::error::Result;
use crate::tensor::Tensor;

/// What a step does beside its cell.
#[derive(Default)]
pub(crate) struct Extras<'a> {
    /// Layer normalization of the recurrent product.
    pub norm: Option<ProductNorm<'a>>,
    /// Layer normalization of an LSTM's c on its way to h; [`Plan::output`] is false.
    pub state_norm: Option<StateNorm<'a>>,
    /// The output product `o = W_hr m + b`: o and not the cell's own output m is what the recurrence and y see.
    pub output: Option<OutputProduct<'a>>,
    /// Targets in place of o in the recurrence.
    pub teacher: Option<&'a Teacher>,
}

/// Layer normalization of the recurrent product.
pub(crate) struct ProductNorm<'a> {
    /// Of lines `[T, B]`, or `[1, B]` where nothing is kept.
    pub gates: GateNorm<'a>,
    /// Backward: `[T, B, GATES * H]`, the product's gradient.
    pub dproducts: Option<&'a Tensor>,
}

/// An output product: a projection, or a Jordan network's output.
pub(crate) struct OutputProduct<'a> {
    /// R.
    pub width: usize,
    /// Forward: W_hr transposed `[H, R]`. Backward: W_hr.
    pub weights: &'a Tensor,
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

/// As [`sweep_step::forward`]; with an output product [`Buffers::weights`] is `[R, GATES * H]` and [`Plan::output`] false.
pub(crate) fn forward<C: CellKernel>(cell: &C, plan: &Plan<'_>, buffers: &Buffers<'_>, extras: &Extras<'_>) -> Result<()> {
    let (rows, hidden) = (plan.rows, plan.hidden);
    let gates = C::Pre::LEN * hidden;
    let product = Tensor::uninitialized(buffers.slots.device(), [rows, gates])?;
    let depth = plan.depth::<C>(buffers.states);
    for step @ (t, before, after) in plan.order(depth) {
        if let (Some(teacher), Some(output)) = (extras.teacher, &extras.output) {
            output_step::teach(plan, teacher, output.width, output.outputs, step)?;
        }
        let h = state_of(plan, buffers, extras, before);
        let target = Matrix::new(&product, rows, gates);
        let weights = Matrix::new(buffers.weights, h.cols, gates);
        match &extras.norm {
            Some(ProductNorm { gates: norm, .. }) => {
                let line = t * rows % norm.lines();
                gemm(h, weights, None, norm.window(line, rows), false)?;
                norm.forward(line, None, target)?;
            }
            None => gemm(h, weights, None, target, false)?,
        }
        sweep_step::forward_split(cell, plan, buffers, &product, step)?;
        if let Some(norm) = &extras.state_norm {
            norm.forward(plan, buffers, step)?;
        }
        if let Some(output) = &extras.output {
            let m = Matrix::window(buffers.states, after * rows * hidden, rows, hidden, hidden);
            let o = Matrix::window(output.outputs, after * rows * output.width, rows, output.width, output.width);
            gemm(m, Matrix::new(output.weights, hidden, output.width), output.bias, o, false)?;
            output_step::output(plan, output.width, output.outputs, output.y, buffers.unit, step)?;
        }
    }
    Ok(())
}

/// As [`sweep_step::backward`], but the initial state's gradient is whole: in `dstates`, or, that of o, in
/// [`OutputProduct::carried`].
pub(crate) fn backward<C: CellKernel>(
    cell: &C,
    plan: &Plan<'_>,
    buffers: &Buffers<'_>,
    extras: &Extras<'_>,
    dstates: &Tensor,
) -> Result<()> {
    let (rows, hidden) = (plan.rows, plan.hidden);
    let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
    for step @ (t, ..) in plan.order(plan.steps + 1).rev() {
        let dm = Matrix::window(dstates, 0, rows, hidden, hidden);
        if let Some((output, carried, douts)) = extras.backward_output() {
            output_step::output_backward(plan, output.width, output.y, carried, douts, buffers.unit, step)?;
            let dout = Matrix::window(douts, t * rows * output.width, rows, output.width, output.width);
            gemm(dout, Matrix::new(output.weights, output.width, hidden), None, dm, false)?;
        }
        if let Some((norm, dvalues)) = extras.state_norm.as_ref().and_then(|norm| Some((norm, norm.dvalues?))) {
            norm.backward(plan, buffers, dstates, dvalues, step)?;
        }
        sweep_step::backward_split(cell, plan, buffers, dstates, step)?;
        if let Some((norm, dproducts)) = extras.norm.as_ref().and_then(|norm| Some((norm, norm.dproducts?))) {
            let dslots = Matrix::window(buffers.slots, t * rows * kept, rows, kept, kept);
            norm.gates.backward(t * rows, dslots, Matrix::window(dproducts, t * rows * gates, rows, gates, gates))?;
        }
        let target = match extras.backward_output() {
            Some((output, carried, _)) => Matrix::new(carried, rows, output.width),
            None => dm,
        };
        let dproducts = extras.norm.as_ref().and_then(|norm| norm.dproducts);
        for (gate, dr) in recurrent_gradients(cell, buffers.slots, dproducts, hidden, [t * rows, rows]) {
            let w = Matrix::window(buffers.weights, gate * hidden * target.cols, dr.cols, target.cols, target.cols);
            gemm(dr, w, None, target, true)?;
        }
        if let (Some(teacher), Some((output, carried, _))) = (extras.teacher, extras.backward_output()) {
            output_step::teach_backward(plan, teacher, output.width, carried, step)?;
        }
    }
    Ok(())
}

/// After a backward step, the gradients of `count` lines of the recurrent product, as `(first gate, [count, gates * H])`: runs of
/// slots, or, where the product is normalized, what came of them.
pub(crate) fn recurrent_gradients<'a, C: CellKernel>(
    cell: &C,
    slots: &'a Tensor,
    dproducts: Option<&'a Tensor>,
    hidden: usize,
    [line, count]: [usize; 2],
) -> Vec<(usize, Matrix<'a>)> {
    let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
    if let Some(dproducts) = dproducts {
        return vec![(0, Matrix::window(dproducts, line * gates, count, gates, gates))];
    }
    let run = |(gate, slot, run)| (gate, Matrix::window(slots, line * kept + slot * hidden, count, run * hidden, kept));
    recurrent_runs(cell).into_iter().map(run).collect()
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
