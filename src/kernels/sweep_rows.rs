//! A step of a sweep with layer normalization (Ba et al. 2016), given its product: `shaders/sweep_rows.wgsl` does all of it in one
//! launch, not measured on hardware. An LSTM's cell state is normalized on its way to h as well: `h = o output(LN(c))`.

use super::activation::Activation;
use super::cell_contract::{Block, CellKernel, activation_constants};
use super::gemm::Matrix;
use super::layer_norm::{GateNorm, Norm, lanes};
use super::math::{Apart, Lanes};
use super::sweep::{self, Buffers, Plan, Side, Step};
use super::sweep_step::{self, Sweep};
use super::{READ, READ_WRITE, row_groups};
use crate::backend::gpu::Gpu;
use crate::backend::{Access, Kernel};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// A cell composed with this file's shader: forward and backward.
macro_rules! rows_kernels {
    ($name:literal, $cell:literal) => {{
        use crate::backend::Kernel;
        use crate::kernels::sweep_rows::{BACKWARD_BINDINGS, FORWARD_BINDINGS};
        use crate::kernels::sweep_step::{Sweep, composed};
        const FORWARD: Kernel = Kernel {
            name: concat!($name, "_rows_forward"),
            source: composed!(["sweep_rows.wgsl", "row_norm.wgsl"], $cell),
            entry: "forward",
            params: Sweep::LAYOUT,
            bindings: FORWARD_BINDINGS,
            workgroup: 64,
            features: &[],
        };
        [FORWARD, Kernel { name: concat!($name, "_rows_backward"), entry: "backward", bindings: BACKWARD_BINDINGS, ..FORWARD }]
    }};
}
pub(crate) use rows_kernels;

pub(crate) const FORWARD_BINDINGS: &[(u32, Access)] =
    &[(1, READ_WRITE), (2, READ_WRITE), (4, READ), (5, READ), (6, READ_WRITE), (8, READ), (9, READ_WRITE)];
pub(crate) const BACKWARD_BINDINGS: &[(u32, Access)] =
    &[(1, READ_WRITE), (2, READ_WRITE), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE), (8, READ), (10, READ_WRITE)];

/// What is normalized in each row of a step. On a GPU gains and the shift are read from [`Buffers::unit`], where they lie behind the unit
/// parameters: `[unit parameters + GATES, H]`, with a state two lines more.
pub(crate) struct RowNorms<'a> {
    /// The products, of lines `[T, B]`, or `[1, B]` where nothing is kept. Behind the statistics of the groups are those of the state.
    pub gates: GateNorm<'a>,
    /// A state on its way to h; [`Plan::output`] is false.
    pub state: Option<StateNorm<'a>>,
    /// Backward: `[T * B, GATES * H]`, the gradient of the products; with a state `[T * B, (GATES + 1) * H]`, that of the normalized
    /// state in the last columns.
    pub gradients: Option<&'a Tensor>,
}

/// The normalization of the last state, and what follows it. The cell leaves the other factor of h in place of h, and in its last slot.
pub(crate) struct StateNorm<'a> {
    /// `[H]`
    pub gain: &'a Tensor,
    /// `[H]`
    pub shift: Option<&'a Tensor>,
    /// Of the normalized state.
    pub activation: Activation,
    /// On the CPU the normalized state of each step, `[T, B, H]`, or `[1, B, H]` where nothing is kept.
    pub values: Option<&'a Tensor>,
    /// As [`Buffers::y`] without this; `None` where y is made by an output product.
    pub y: Option<&'a Tensor>,
}

impl RowNorms<'_> {
    /// The product of step `t`, as it comes.
    pub fn product(&self, plan: &Plan<'_>, t: usize) -> Matrix<'_> {
        self.gates.window(self.line(plan, t), plan.rows)
    }

    /// After the product, all else of a step. `normalized [B, GATES * H]`: what the CPU makes of the product.
    pub fn forward<C: CellKernel>(
        &self,
        cell: &C,
        plan: &Plan<'_>,
        buffers: &Buffers<'_>,
        normalized: &Tensor,
        step: Step,
    ) -> Result<()> {
        match normalized.device().backend() {
            Backend::Native => {
                let line = self.line(plan, step.0);
                self.gates.forward(line, None, Matrix::new(normalized, plan.rows, C::Pre::LEN * plan.hidden))?;
                sweep_step::forward_split(cell, plan, buffers, normalized, step)?;
                match &self.state {
                    Some(state) => self.state_forward::<C>(state, plan, buffers, step),
                    None => Ok(()),
                }
            }
            Backend::Gpu(gpu) => {
                let [kernel, _] = kernels::<C>();
                let sides = [Side { plan: *plan, buffers: self.with_y(buffers) }];
                let [slots, states, _, unit, lengths, y] = sweep::bindings(&sides);
                let bindings = [slots, states, unit, lengths, y, self.gates.products.range(), self.gates.stats.range()];
                let params = self.params(sweep_step::uniforms(cell, &sides, &[]), plan, step);
                gpu.launch_each(kernel, &self.constants(gpu, cell, plan, false), &bindings, std::iter::once(params))
            }
        }
    }

    /// Before the product's backward, all else of a step: in the slots and in the gradients of the product lies what the products need.
    pub fn backward<C: CellKernel>(
        &self,
        cell: &C,
        plan: &Plan<'_>,
        buffers: &Buffers<'_>,
        dstates: &Tensor,
        gradients: &Tensor,
        step: Step,
    ) -> Result<()> {
        match dstates.device().backend() {
            Backend::Native => {
                let (rows, hidden, line) = (plan.rows, plan.hidden, self.line(plan, step.0));
                let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
                let gradients = lines_of(gradients, line, rows);
                if let Some(state) = &self.state {
                    self.state_backward::<C>(state, plan, buffers, dstates, gradients.columns(gates, hidden), step)?;
                }
                sweep_step::backward_split(cell, plan, buffers, dstates, step)?;
                let dslots = Matrix::window(buffers.slots, line * kept, rows, kept, kept);
                self.gates.backward(line, dslots, gradients.columns(0, gates))
            }
            Backend::Gpu(gpu) => {
                let [_, kernel] = kernels::<C>();
                let sides = [Side { plan: *plan, buffers: self.with_y(buffers) }];
                let params = self.params(sweep_step::uniforms(cell, &sides, &[dstates]), plan, step);
                let [slots, states, _, unit, lengths, y] = sweep::bindings(&sides);
                let (products, dstates) = (self.gates.products.range(), dstates.range());
                let bindings = [slots, states, unit, lengths, y, dstates, products, gradients.range()];
                gpu.launch_each(kernel, &self.constants(gpu, cell, plan, true), &bindings, std::iter::once(params))
            }
        }
    }

    /// After a backward sweep, adds the gradient of the state's gain to `dgain`, of `dvalues [count, H]` from line `first` on.
    pub fn backward_state_gain<C: CellKernel>(
        &self,
        plan: &Plan<'_>,
        states: &Tensor,
        first: usize,
        dvalues: Matrix<'_>,
        dgain: &Tensor,
    ) -> Result<()> {
        let Some(state) = &self.state else { unreachable!("only a state that is normalized has a gain") };
        // The states after each step: those of slots 1 .. T + 1, or 0 .. T in reverse.
        let norm = self.state_norm::<C>(plan, state, states, (0, 0, usize::from(!plan.reverse)));
        let x = Matrix::window(states, norm.x.offset + first * plan.hidden, dvalues.rows, plan.hidden, plan.hidden);
        Norm { x, line: norm.line + first, ..norm }.backward_gain(dvalues, dgain)
    }

    /// On the CPU, after the cell: h in place of its other factor, and y.
    fn state_forward<C: CellKernel>(
        &self,
        state: &StateNorm<'_>,
        plan: &Plan<'_>,
        buffers: &Buffers<'_>,
        step: Step,
    ) -> Result<()> {
        let (rows, hidden, (t, _, after)) = (plan.rows, plan.hidden, step);
        let values = self.values(state, plan, t);
        self.state_norm::<C>(plan, state, buffers.states, step).forward(state.shift, values)?;
        let (all, mut states) = (values.tensor.native::<f32>(), buffers.states.native_mut::<f32>());
        let mut y = state.y.map(|y| y.native_mut::<f32>());
        for row in 0..rows {
            let values = &all[values.offset + row * hidden..][..hidden];
            let states = &mut states[(after * rows + row) * hidden..][..hidden];
            let is_valid = plan.is_valid(t, row);
            if is_valid {
                for (h, value) in states.chunks_mut(Lanes::COUNT).zip(values.chunks(Lanes::COUNT)) {
                    (Lanes::load(h) * state.activation.apply::<Apart>(Lanes::load(value))).store(h);
                }
            }
            if let Some(y) = &mut y {
                let y = &mut y[(t * rows + row) * plan.y_stride + plan.y_offset..][..hidden];
                if is_valid { y.copy_from_slice(states) } else { y.fill(0.0) }
            }
        }
        Ok(())
    }

    /// On the CPU, before the cell's backward: in `dstates` the gradient of the other factor takes the place of that of h, and that of the
    /// last state gets what comes through h. `dvalues [B, H]`: that of the normalized state.
    fn state_backward<C: CellKernel>(
        &self,
        state: &StateNorm<'_>,
        plan: &Plan<'_>,
        buffers: &Buffers<'_>,
        dstates: &Tensor,
        dvalues: Matrix<'_>,
        step: Step,
    ) -> Result<()> {
        let (rows, hidden, (t, ..)) = (plan.rows, plan.hidden, step);
        let values = self.values(state, plan, t);
        {
            let (all, slots) = (values.tensor.native::<f32>(), buffers.slots.native::<f32>());
            let (mut dstates, mut gradients) = (dstates.native_mut::<f32>(), dvalues.tensor.native_mut::<f32>());
            let dy = state.y.map(|dy| dy.native::<f32>());
            for row in 0..rows {
                let dvalues = &mut gradients[dvalues.offset + row * dvalues.row..][..hidden];
                if !plan.is_valid(t, row) {
                    dvalues.fill(0.0);
                    continue;
                }
                let dstates = &mut dstates[row * hidden..][..hidden];
                if let Some(dy) = &dy {
                    let dy = &dy[(t * rows + row) * plan.y_stride + plan.y_offset..];
                    dstates.iter_mut().zip(dy).for_each(|(d, dy)| *d += dy);
                }
                let values = all[values.offset + row * hidden..][..hidden].chunks(Lanes::COUNT);
                let factors = &slots[((t * rows + row + 1) * C::Slots::LEN - 1) * hidden..][..hidden];
                let gradients = dstates.chunks_mut(Lanes::COUNT).zip(dvalues.chunks_mut(Lanes::COUNT));
                for (((d, dvalue), value), factor) in gradients.zip(values).zip(factors.chunks(Lanes::COUNT)) {
                    let (dh, value) = (Lanes::load(d), state.activation.apply::<Apart>(Lanes::load(value)));
                    (dh * Lanes::load(factor) * state.activation.slope(value)).store(dvalue);
                    (dh * value).store(d);
                }
            }
        }
        // The values have been used: what comes through the normalization may lie in their place.
        self.state_norm::<C>(plan, state, buffers.states, step).backward(dvalues, values)?;
        let (through, mut dstates) = (values.tensor.native::<f32>(), dstates.native_mut::<f32>());
        let last = &mut dstates[(C::State::LEN - 1) * rows * hidden..];
        last.iter_mut().zip(&through[values.offset..][..rows * hidden]).for_each(|(d, through)| *d += through);
        Ok(())
    }

    /// The normalized states of step `t`, `[B, H]`.
    fn values<'b>(&self, state: &StateNorm<'b>, plan: &Plan<'_>, t: usize) -> Matrix<'b> {
        let Some(values) = state.values else { unreachable!("on the CPU normalized states are kept") };
        Matrix::window(values, self.line(plan, t) * plan.hidden, plan.rows, plan.hidden, plan.hidden)
    }

    /// Of the last of the states after a step.
    fn state_norm<'b, C: CellKernel>(
        &'b self,
        plan: &Plan<'_>,
        state: &'b StateNorm<'_>,
        states: &'b Tensor,
        (t, _, after): Step,
    ) -> Norm<'b> {
        let (rows, hidden) = (plan.rows, plan.hidden);
        let slot = (C::State::LEN - 1) * plan.depth::<C>(states) + after;
        let x = Matrix::window(states, slot * rows * hidden, rows, hidden, hidden);
        let line = self.gates.groups.len() * self.gates.lines() + self.line(plan, t);
        Norm { x, gain: state.gain, column: 0, stats: self.gates.stats, line }
    }

    /// The first row of step `t`.
    fn line(&self, plan: &Plan<'_>, t: usize) -> usize {
        t * plan.rows % self.gates.lines()
    }

    fn with_y<'b>(&'b self, buffers: &Buffers<'b>) -> Buffers<'b> {
        Buffers { y: self.state.as_ref().and_then(|state| state.y).unwrap_or(buffers.y), ..*buffers }
    }

    fn params(&self, params: Sweep, plan: &Plan<'_>, step: Step) -> (Sweep, [u32; 3]) {
        let params = Sweep {
            t: plan.number(step),
            line: self.line(plan, step.0) as u32,
            lines: self.gates.lines() as u32,
            shows: self.state.as_ref().is_some_and(|state| state.y.is_some()).into(),
            ..params
        };
        (params, row_groups(plan.rows))
    }

    fn constants<C: CellKernel>(&self, gpu: &Gpu, cell: &C, plan: &Plan<'_>, backward: bool) -> Vec<(&'static str, f64)> {
        debug_assert!(cell.norms().len() <= 2, "the shader knows two groups");
        let mut constants = plan.constants(cell, backward);
        constants.push(lanes(gpu));
        constants.extend(cell.norms().first().map(|gates| ("first_group", *gates as f64)));
        if let Some(state) = &self.state {
            constants.push(("state_norm", 1.0));
            constants.extend(activation_constants!(state.activation, "state_kind", "state_alpha", "state_beta"));
        }
        constants
    }
}

/// Lines of what a backward sweep keeps of the norms.
pub(crate) fn lines_of(gradients: &Tensor, first: usize, count: usize) -> Matrix<'_> {
    let width = gradients.shape()[1];
    Matrix::window(gradients, first * width, count, width, width)
}

fn kernels<C: CellKernel>() -> &'static [Kernel; 2] {
    match C::ROWS {
        Some(kernels) => kernels,
        None => unreachable!("a cell whose norms are defined has kernels for them"),
    }
}
