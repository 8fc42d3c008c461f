//! Long short-term memory: `shaders/cell_lstm.wgsl` and its native half.

use super::cell_contract::{CellKernel, Site};
use super::math::Lanes;
use super::sweep_step;
use crate::backend::Kernel;

pub(crate) static FORWARD: Kernel = sweep_step::forward_kernel!("lstm_step_forward", "cell_lstm.wgsl");
pub(crate) static BACKWARD: Kernel = sweep_step::backward_kernel!("lstm_step_backward", "cell_lstm.wgsl");

/// The cell of Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000); gates in PyTorch's order:
/// `i, f, o = sigmoid(x + r + b)`, `g = tanh(x + r + b)`, `c = f c' + i g`, `h = o tanh(c)`.
#[derive(Clone, Copy, Debug)]
pub enum LstmCell {}

impl CellKernel for LstmCell {
    type Pre = [Lanes; 4]; // i, f, g, o
    type Slots = [Lanes; 4]; // the same, after their functions
    type State = [Lanes; 2]; // h, c
    type Unit = [Lanes; 4]; // b_hh of i, f, g, o

    const FORWARD: &'static Kernel = &FORWARD;
    const BACKWARD: &'static Kernel = &BACKWARD;

    fn recurrent_slot(gate: usize) -> usize {
        gate
    }

    #[inline(always)]
    fn forward(_: Site, x: Self::Pre, r: Self::Pre, previous: Self::State, p: Self::Unit) -> (Self::State, Self::Slots) {
        let i = (x[0] + (r[0] + p[0])).sigmoid();
        let f = (x[1] + (r[1] + p[1])).sigmoid();
        let g = (x[2] + (r[2] + p[2])).tanh();
        let o = (x[3] + (r[3] + p[3])).sigmoid();
        let c = f * previous[1] + i * g;
        ([o * c.tanh(), c], [i, f, g, o])
    }

    #[inline(always)]
    fn backward(_: Site, saved: Self::Slots, previous: Self::State, _: Self::Unit, d: Self::State) -> (Self::Slots, Self::State) {
        let one = Lanes::splat(1.0);
        let [i, f, g, o] = saved;
        // Computed again, not read from the stored state: a sweep may have held that one back.
        let tanh_c = (f * previous[1] + i * g).tanh();
        let dc = d[1] + d[0] * o * (one - tanh_c * tanh_c);
        let di = dc * g * i * (one - i);
        let df = dc * previous[1] * f * (one - f);
        let dg = dc * i * (one - g * g);
        let d_out = d[0] * tanh_c * o * (one - o);
        ([di, df, dg, d_out], [Lanes::splat(0.0), dc * f])
    }
}
