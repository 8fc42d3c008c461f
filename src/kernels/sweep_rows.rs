//! A step of a sweep with layer normalization (Ba et al. 2016), given its product: `shaders/sweep_rows.wgsl` does all of it in one
//! launch, of both sides, not measured on hardware. An LSTM's cell state is normalized on its way to h as well: `h = o output(LN(c))`.

use std::slice;

use super::activation::Activation;
use super::cell_contract::{Block, CellKernel, activation_constants};
use super::gemm::Matrix;
use super::layer_norm::{GateNorm, Norm, lanes};
use super::math::{Apart, Lanes};
use super::sweep::{self, Buffers, Plan, Side, Step};
use super::sweep_step::{self, Sweep};
use super::{MAX_GROUPS, READ, READ_WRITE, tiles};
use crate::backend::Access;
use crate::backend::gpu::Gpu;
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

/// What is normalized in each row of a step, of one side. On a GPU gains and the shift are read from [`Buffers::unit`], where they lie
/// behind the unit parameters: `[unit parameters + GATES, H]`, with a state two lines more.
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

    /// On the CPU, after the product, all else of a step. `normalized [B, GATES * H]`: room for what is made of the product.
    fn forward_native<C: CellKernel>(&self, cell: &C, side: &Side<'_>, normalized: &Tensor, step: Step) -> Result<()> {
        let Side { plan, buffers } = side;
        let line = self.line(plan, step.0);
        self.gates.forward(line, None, Matrix::new(normalized, plan.rows, C::Pre::LEN * plan.hidden))?;
        sweep_step::forward_split(cell, slice::from_ref(side), slice::from_ref(normalized), &[step])?;
        match &self.state {
            Some(state) => self.state_forward::<C>(state, plan, buffers, step),
            None => Ok(()),
        }
    }

    /// The same backward.
    fn backward_native<C: CellKernel>(&self, cell: &C, side: &Side<'_>, dstates: &Tensor, step: Step) -> Result<()> {
        let Side { plan, buffers } = side;
        let (rows, hidden, line) = (plan.rows, plan.hidden, self.line(plan, step.0));
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let gradients = lines_of(self.gradients(), line, rows);
        if let Some(state) = &self.state {
            self.state_backward::<C>(state, plan, buffers, dstates, gradients.columns(gates, hidden), step)?;
        }
        sweep_step::backward_split(cell, slice::from_ref(side), &[dstates], &[step])?;
        let dslots = Matrix::window(buffers.slots, line * kept, rows, kept, kept);
        self.gates.backward(line, dslots, gradients.columns(0, gates))
    }

    fn gradients(&self) -> &Tensor {
        match self.gradients {
            Some(gradients) => gradients,
            None => unreachable!("backward has room for gradients"),
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

/// After the products of a step of each side, all else of it. What belongs to the second side lies behind what belongs to the first.
/// `normalized [B, GATES * H]`: on the CPU room for what is made of the products.
pub(crate) fn forward<C: CellKernel>(
    cell: &C,
    sides: &[Side<'_>],
    norms: &[&RowNorms<'_>],
    normalized: &[Tensor],
    steps: &[Step],
) -> Result<()> {
    match sides[0].buffers.slots.device().backend() {
        Backend::Native => {
            let mut all = sides.iter().zip(norms).zip(normalized).zip(steps);
            all.try_for_each(|(((side, norms), normalized), step)| norms.forward_native(cell, side, normalized, *step))
        }
        Backend::Gpu(gpu) => launch(gpu, cell, sides, norms, &[], steps),
    }
}

/// Before the backward of the products, all else of a step: in the slots and in the gradients of the products lies what these need.
pub(crate) fn backward<C: CellKernel>(
    cell: &C,
    sides: &[Side<'_>],
    norms: &[&RowNorms<'_>],
    dstates: &[&Tensor],
    steps: &[Step],
) -> Result<()> {
    match dstates[0].device().backend() {
        Backend::Native => {
            let mut all = sides.iter().zip(norms).zip(dstates).zip(steps);
            all.try_for_each(|(((side, norms), dstates), step)| norms.backward_native(cell, side, dstates, *step))
        }
        Backend::Gpu(gpu) => launch(gpu, cell, sides, norms, dstates, steps),
    }
}

/// One launch for a step of all sides; backward with `dstates`.
fn launch<'a, C: CellKernel>(
    gpu: &Gpu,
    cell: &C,
    sides: &[Side<'a>],
    norms: &[&RowNorms<'a>],
    dstates: &[&Tensor],
    steps: &[Step],
) -> Result<()> {
    let kernels = match C::ROWS {
        Some(kernels) => kernels,
        None => unreachable!("a cell whose norms are defined has kernels for them"),
    };
    let mut sides = sides.to_vec();
    for (side, y) in sides.iter_mut().zip(norms.iter().map(|norms| norms.state.as_ref().and_then(|state| state.y))) {
        side.buffers.y = y.unwrap_or(side.buffers.y);
    }
    let (plan, own, is_backward) = (&sides[0].plan, norms[0], !dstates.is_empty());
    let products: Vec<&Tensor> = norms.iter().map(|norms| norms.gates.products).collect();
    let stats: Vec<&Tensor> = norms.iter().map(|norms| norms.gates.stats).collect();
    let gradients: Vec<&Tensor> = norms.iter().filter(|_| is_backward).map(|norms| norms.gradients()).collect();
    let [slots, states, _, unit, lengths, y] = sweep::bindings(&sides);
    let mut bindings = vec![slots, states, unit, lengths, y];
    match is_backward {
        true => bindings.extend([sweep::range(dstates), sweep::range(&products), sweep::range(&gradients)]),
        false => bindings.extend([sweep::range(&products), sweep::range(&stats)]),
    }
    let params = Sweep {
        t: plan.number(steps[0]),
        next_between: sweep::words(&products),
        next_stats: sweep::words(&stats) / 2,
        next_norms: if is_backward { sweep::words(&gradients) } else { 0 },
        lines: own.gates.lines() as u32,
        shows: own.state.as_ref().is_some_and(|state| state.y.is_some()).into(),
        ..sweep_step::uniforms(cell, &sides, dstates)
    };
    let constants = own.constants(gpu, cell, plan, is_backward);
    let groups = tiles(sides.len() * plan.rows.min(MAX_GROUPS / sides.len()), 1);
    gpu.launch_each(&kernels[usize::from(is_backward)], &constants, &bindings, std::iter::once((params, groups)))
}

/// Lines of what a backward sweep keeps of the norms.
pub(crate) fn lines_of(gradients: &Tensor, first: usize, count: usize) -> Matrix<'_> {
    let width = gradients.shape()[1];
    Matrix::window(gradients, first * width, count, width, width)
}
