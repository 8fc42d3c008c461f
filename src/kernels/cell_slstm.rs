//! The scalar LSTM of xLSTM: `shaders/cell_slstm.wgsl` and its native half.

use super::cell_contract::{Backward, CellKernel, Site, StepKernels};
use super::math::{Fusion, Lanes, exp, log};
use super::sweep_grid::grid_kernels;
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_step::step_kernels;
use crate::backend::Kernel;

static NATIVE: NativeSweeps<SLstmCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("slstm", "cell_slstm.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("slstm", "cell_slstm.wgsl");
pub(crate) static GRID: [Kernel; 2] = grid_kernels!("slstm", "cell_slstm.wgsl");

/// Below it n counts as nothing, and c / n as 0.
const NONE: f32 = 1e-30;

/// The cell of Beck et al. (2024), gates i, f, z, o; with `s = x + r + b`: `m = max(log sigmoid(s_f) + m', s_i)`,
/// `i = exp(s_i - m)`, `f = exp(log sigmoid(s_f) + m' - m)`, `c = f c' + i tanh(s_z)`, `n = f n' + i`, `h = sigmoid(s_o) c / n`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SLstmCell;

/// log sigmoid(x): the first term exact, the second in (0, log 2].
#[inline(always)]
fn log_sigmoid<F: Fusion>(x: Lanes) -> Lanes {
    x.map(|x| if x > 0.0 { 0.0 } else { x } - log(1.0 + exp::<F>(-x.abs())))
}

/// What the two gates make of m'.
struct Gates {
    m: Lanes,
    i: Lanes,
    f: Lanes,
    /// 1 where m comes from the past, as it does where both are equal; else 0.
    past: Lanes,
}

#[inline(always)]
fn gates<F: Fusion>(s_i: Lanes, s_f: Lanes, m_before: Lanes) -> Gates {
    let a = log_sigmoid::<F>(s_f) + m_before;
    // NaN stays, whichever the comparison picks: a difference with it is NaN again.
    let past = s_i.zip(a, |s_i, a| if s_i > a { 0.0 } else { 1.0 });
    let m = s_i.zip(a, |s_i, a| if s_i > a { s_i } else { a });
    Gates { m, i: (s_i - m).map(exp::<F>), f: (a - m).map(exp::<F>), past }
}

#[inline(always)]
fn quotient(a: Lanes, n: Lanes) -> Lanes {
    a.zip(n, |a, n| if n.abs() < NONE { 0.0 } else { a / n })
}

impl CellKernel for SLstmCell {
    type Pre = [Lanes; 4]; // i, f, z, o
    type Slots = [Lanes; 4]; // s_i, s_f, tanh(s_z), sigmoid(s_o)
    type State = [Lanes; 4]; // h, c, n, m
    type Unit = [Lanes; 4]; // b_hh of i, f, z, o

    const BIASES: usize = 4;
    const PRODUCT: bool = true;
    const NATIVE: &'static NativeSweeps<Self> = &NATIVE;
    const KERNELS: &'static StepKernels = &KERNELS;
    const RESIDENT: &'static ResidentKernels = &RESIDENT;
    const GRID: Option<&'static [Kernel; 2]> = Some(&GRID);

    #[inline(always)]
    fn forward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        x: Self::Pre,
        r: Self::Pre,
        previous: Self::State,
        p: Self::Unit,
    ) -> (Self::State, Self::Slots) {
        let sum = |at: usize| x[at] + (r[at] + p[at]);
        let (s_i, s_f, z, o) = (sum(0), sum(1), sum(2).tanh::<F>(), sum(3).sigmoid::<F>());
        let g = gates::<F>(s_i, s_f, previous[3]);
        let c = g.f * previous[1] + g.i * z;
        let n = g.f * previous[2] + g.i;
        ([o * quotient(c, n), c, n, g.m], [s_i, s_f, z, o])
    }

    #[inline(always)]
    fn totals<F: Fusion>(&self, saved: Self::Slots, previous: Self::State, _: Self::Unit, d: Self::State) -> Self::State {
        let [s_i, s_f, z, o] = saved;
        let g = gates::<F>(s_i, s_f, previous[3]);
        let (c, n) = (g.f * previous[1] + g.i * z, g.f * previous[2] + g.i);
        let dq = quotient(d[0] * o, n);
        let (dc, dn) = (d[1] + dq, d[2] - dq * quotient(c, n));
        let dm = d[3] - (dc * z + dn) * g.i - (dc * previous[1] + dn * previous[2]) * g.f;
        [d[0], dc, dn, dm]
    }

    #[inline(always)]
    fn backward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        saved: Self::Slots,
        previous: Self::State,
        _: Self::Unit,
        d: Self::State,
    ) -> Backward<Self> {
        let [s_i, s_f, z, o] = saved;
        let one = Lanes::splat(1.0);
        // Computed again, not read from the stored state: a sweep may have held that one back.
        let g = gates::<F>(s_i, s_f, previous[3]);
        let c = g.f * previous[1] + g.i * z;
        let n = g.f * previous[2] + g.i;
        let q = quotient(c, n);
        let dq = quotient(d[0] * o, n);
        let d_out = d[0] * q * (o * (one - o));
        let (dc, dn) = (d[1] + dq, d[2] - dq * q);
        // By the exponents of i and f; what m takes from both comes back to the larger of its two, whose own part cancels.
        let own_i = (dc * z + dn) * g.i;
        let own_f = (dc * previous[1] + dn * previous[2]) * g.f;
        let pick = |a: Lanes, b: Lanes| {
            a.zip(g.past, |a, past| if past == 1.0 { a } else { 0.0 })
                + b.zip(g.past, |b, past| if past == 1.0 { 0.0 } else { b })
        };
        let di = pick(own_i, d[3] - own_f);
        let da = pick(d[3] - own_i, own_f);
        Backward {
            slots: [di, da * (-s_f).sigmoid::<F>(), dc * g.i * (one - z * z), d_out],
            previous: [Lanes::splat(0.0), dc * g.f, dn * g.f, da],
            unit: [Lanes::splat(0.0); 4],
        }
    }
}
