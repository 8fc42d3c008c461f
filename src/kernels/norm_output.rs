//! The output of an LSTM whose cell state is normalized on its way to h (Ba et al. 2016): `h = o output(LN(c))`.

use super::activation::Activation;
use super::cell_contract::activation_constants;
use super::gemm::Matrix;
use super::layer_norm::Norm;
use super::math::{Apart, Lanes};
use super::sweep::{Buffers, Plan, Step};
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    NormOutput {
        rows: u32, hidden: u32, t: u32, after: u32, line: u32,
        ragged: u32, output: u32, y_stride: u32, y_offset: u32,
    }
}

pub(crate) static FORWARD: Kernel = Kernel {
    name: "norm_output",
    source: concat!(
        include_str!("../../shaders/norm_output.wgsl"),
        include_str!("../../shaders/activation.wgsl"),
        include_str!("../../shaders/math.wgsl"),
    ),
    entry: "forward",
    params: NormOutput::LAYOUT,
    bindings: &[(1, READ_WRITE), (2, READ), (3, READ_WRITE), (4, READ)],
    workgroup: 64,
    features: &[],
};

pub(crate) static BACKWARD: Kernel = Kernel {
    name: "norm_output_backward",
    entry: "backward",
    bindings: &[(2, READ), (3, READ_WRITE), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE)],
    ..FORWARD
};

/// Slots of the LSTM, and that of o.
const SLOTS: usize = 4;
const O: usize = 3;

/// The normalization of c, and what follows it. The cell leaves o in place of h.
pub(crate) struct StateNorm<'a> {
    /// `[H]`
    pub gain: &'a Tensor,
    /// `[H]`
    pub shift: Option<&'a Tensor>,
    /// Of the normalized c.
    pub activation: Activation,
    /// The normalized c of each step `[T, B, H]`; `[1, B, H]` where nothing is kept.
    pub values: &'a Tensor,
    /// `[T, B, 2]`, or `[1, B, 2]`.
    pub stats: &'a Tensor,
    /// Backward: `[T, B, H]`, the gradient of the normalized c.
    pub dvalues: Option<&'a Tensor>,
    /// As [`Buffers::y`] without this; `None` where y is made by an output product.
    pub y: Option<&'a Tensor>,
}

impl StateNorm<'_> {
    /// After the cell: h in place of o in the state, and y.
    pub fn forward(&self, plan: &Plan<'_>, buffers: &Buffers<'_>, step: Step) -> Result<()> {
        let (rows, hidden) = (plan.rows, plan.hidden);
        let (t, _, after) = step;
        let line = self.line(plan, t);
        let values = Matrix::window(self.values, line * hidden, rows, hidden, hidden);
        self.norm(plan, buffers.states, after, line).forward(self.shift, values)?;
        match self.values.device().backend() {
            Backend::Native => {
                let (values, mut states) = (self.values.native::<f32>(), buffers.states.native_mut::<f32>());
                let mut y = self.y.map(|y| y.native_mut::<f32>());
                for row in 0..rows {
                    let values = &values[(line + row) * hidden..][..hidden];
                    let states = &mut states[(after * rows + row) * hidden..][..hidden];
                    let is_valid = plan.is_valid(t, row);
                    if is_valid {
                        for (h, value) in states.chunks_mut(Lanes::COUNT).zip(values.chunks(Lanes::COUNT)) {
                            (Lanes::load(h) * self.activation.apply::<Apart>(Lanes::load(value))).store(h);
                        }
                    }
                    if let Some(y) = &mut y {
                        let y = &mut y[(t * rows + row) * plan.y_stride + plan.y_offset..][..hidden];
                        if is_valid { y.copy_from_slice(states) } else { y.fill(0.0) }
                    }
                }
                Ok(())
            }
            Backend::Gpu(gpu) => {
                let (lengths, y) = self.others(plan, buffers);
                let bindings = [buffers.states, self.values, y, lengths].map(Tensor::range);
                let step = (self.params(plan, step), grid(rows * hidden));
                gpu.launch_each(&FORWARD, &self.constants(), &bindings, std::iter::once(step))
            }
        }
    }

    /// Before the cell's backward: in `dstates [2, B, H]` the gradient of o takes the place of that of h, and that of c gets what
    /// comes through h.
    pub fn backward(&self, plan: &Plan<'_>, buffers: &Buffers<'_>, dstates: &Tensor, dvalues: &Tensor, step: Step) -> Result<()> {
        let (rows, hidden) = (plan.rows, plan.hidden);
        let (t, _, after) = step;
        let line = self.line(plan, t);
        match self.values.device().backend() {
            Backend::Native => {
                let (values, slots) = (self.values.native::<f32>(), buffers.slots.native::<f32>());
                let (mut dstates, mut dvalues) = (dstates.native_mut::<f32>(), dvalues.native_mut::<f32>());
                let dy = self.y.map(|dy| dy.native::<f32>());
                for row in 0..rows {
                    let dvalues = &mut dvalues[(line + row) * hidden..][..hidden];
                    if !plan.is_valid(t, row) {
                        dvalues.fill(0.0);
                        continue;
                    }
                    let dstates = &mut dstates[row * hidden..][..hidden];
                    if let Some(dy) = &dy {
                        let dy = &dy[(t * rows + row) * plan.y_stride + plan.y_offset..];
                        dstates.iter_mut().zip(dy).for_each(|(d, dy)| *d += dy);
                    }
                    let values = values[(line + row) * hidden..][..hidden].chunks(Lanes::COUNT);
                    let o = slots[((t * rows + row) * SLOTS + O) * hidden..][..hidden].chunks(Lanes::COUNT);
                    let gradients = dstates.chunks_mut(Lanes::COUNT).zip(dvalues.chunks_mut(Lanes::COUNT));
                    for (((d, dvalue), value), o) in gradients.zip(values).zip(o) {
                        let (dh, value) = (Lanes::load(d), self.activation.apply::<Apart>(Lanes::load(value)));
                        (dh * Lanes::load(o) * self.activation.slope(value)).store(dvalue);
                        (dh * value).store(d);
                    }
                }
            }
            Backend::Gpu(gpu) => {
                let (lengths, dy) = self.others(plan, buffers);
                let bindings = [self.values, dy, lengths, buffers.slots, dstates, dvalues].map(Tensor::range);
                let step = (self.params(plan, step), grid(rows * hidden));
                gpu.launch_each(&BACKWARD, &self.constants(), &bindings, std::iter::once(step))?;
            }
        }
        let dvalues = Matrix::window(dvalues, line * hidden, rows, hidden, hidden);
        let dc = Matrix::window(dstates, rows * hidden, rows, hidden, hidden);
        self.norm(plan, buffers.states, after, line).backward(dvalues, dc, true)
    }

    /// After a backward sweep, adds the gain's gradient to `dgain`, of `dvalues [count, H]` from line `first` on.
    pub fn backward_gain(
        &self,
        plan: &Plan<'_>,
        states: &Tensor,
        first: usize,
        dvalues: Matrix<'_>,
        dgain: &Tensor,
    ) -> Result<()> {
        // The states after each step: those of slots 1 .. T + 1, or 0 .. T in reverse.
        let norm = self.norm(plan, states, usize::from(!plan.reverse), first);
        let x = Matrix::window(states, norm.x.offset + first * plan.hidden, dvalues.rows, plan.hidden, plan.hidden);
        Norm { x, ..norm }.backward_gain(dvalues, dgain)
    }

    /// Of the cell states in slot `after`.
    fn norm<'b>(&'b self, plan: &Plan<'_>, states: &'b Tensor, after: usize, line: usize) -> Norm<'b> {
        let (rows, hidden) = (plan.rows, plan.hidden);
        let depth = states.len() / (2 * rows * hidden);
        let x = Matrix::window(states, (depth + after) * rows * hidden, rows, hidden, hidden);
        Norm { x, gain: self.gain, column: 0, stats: self.stats, line }
    }

    /// The first row of step `t` in `values`.
    fn line(&self, plan: &Plan<'_>, t: usize) -> usize {
        let lines = self.values.len() / plan.hidden;
        t * plan.rows % lines
    }

    /// What is bound as lengths and as y.
    fn others<'b>(&'b self, plan: &Plan<'b>, buffers: &Buffers<'b>) -> (&'b Tensor, &'b Tensor) {
        (plan.lengths.map_or(buffers.unit, |lengths| lengths.tensor()), self.y.unwrap_or(buffers.y))
    }

    fn constants(&self) -> [(&'static str, f64); 3] {
        activation_constants!(self.activation, "output_kind", "output_alpha", "output_beta")
    }

    fn params(&self, plan: &Plan<'_>, (t, _, after): Step) -> NormOutput {
        NormOutput {
            rows: plan.rows as u32,
            hidden: plan.hidden as u32,
            t: t as u32,
            after: after as u32,
            line: self.line(plan, t) as u32,
            ragged: plan.lengths.is_some().into(),
            output: self.y.is_some().into(),
            y_stride: plan.y_stride as u32,
            y_offset: plan.y_offset as u32,
        }
    }
}
