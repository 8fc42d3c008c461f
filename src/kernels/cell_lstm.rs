//! Long short-term memory: `shaders/cell_lstm.wgsl` and its native half.

use super::activation::{Activation, clip_to};
use super::cell_contract::{Backward, CellKernel, Site, StepKernels, activation_constants};
use super::math::{Fusion, Lanes};
use super::sweep_grid::grid_kernels;
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_rows::rows_kernels;
use super::sweep_step::step_kernels;
use crate::backend::Kernel;

static NATIVE: NativeSweeps<LstmCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("lstm", projected, "cell_lstm.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("lstm", "cell_lstm.wgsl");
pub(crate) static GRID: [Kernel; 2] = grid_kernels!("lstm", "cell_lstm.wgsl");
pub(crate) static ROWS: [Kernel; 2] = rows_kernels!("lstm", "cell_lstm.wgsl");

/// The cell of Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000); gates in PyTorch's order:
/// `i, f, o = sigmoid(x + r + b)`, `g = tanh(x + r + b)`, `c = f c' + i g`, `h = o tanh(c)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LstmCell {
    /// Of i, f and o.
    pub(crate) gate: Activation,
    /// Of g.
    pub(crate) candidate: Activation,
    /// Of c on its way to h.
    pub(crate) output: Activation,
    /// Whether i and f see c', and o sees c.
    pub(crate) peepholes: bool,
    /// Whether f = 1 - i.
    pub(crate) coupled: bool,
    /// A bound for each pre-activation; 0: none.
    pub(crate) clip: f32,
    /// A bound for c; 0: none.
    pub(crate) cell_clip: f32,
}

impl Default for LstmCell {
    fn default() -> Self {
        let (gate, tanh) = (Activation::Sigmoid, Activation::Tanh);
        Self { gate, candidate: tanh, output: tanh, peepholes: false, coupled: false, clip: 0.0, cell_clip: 0.0 }
    }
}

impl LstmCell {
    /// The slope where i, f or o is `y`.
    #[inline(always)]
    fn gate_slope<F: Fusion>(&self, y: Lanes) -> Lanes {
        self.gate.clipped_slope::<F>(self.clip, y)
    }

    /// 0 without peepholes: 0 c would be NaN for a c that is infinite.
    #[inline(always)]
    fn peephole(&self, p: Lanes, c: Lanes) -> Lanes {
        if self.peepholes { p * c } else { Lanes::splat(0.0) }
    }
}

impl CellKernel for LstmCell {
    type Pre = [Lanes; 4]; // i, f, g, o
    type Slots = [Lanes; 4]; // the same, after their functions
    type State = [Lanes; 2]; // h, c
    type Unit = [Lanes; 7]; // b_hh of i, f, g, o; peepholes of i, f, o

    const BIASES: usize = 4;
    const PRODUCT: bool = true;
    const HAS_PLAIN: bool = true;
    const NATIVE: &'static NativeSweeps<Self> = &NATIVE;
    const KERNELS: &'static StepKernels = &KERNELS;
    const RESIDENT: &'static ResidentKernels = &RESIDENT;
    const GRID: Option<&'static [Kernel; 2]> = Some(&GRID);
    const ROWS: Option<&'static [Kernel; 2]> = Some(&ROWS);

    fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    fn unit_params(&self) -> usize {
        if self.peepholes { 7 } else { 4 }
    }

    fn constants(&self) -> Vec<(&'static str, f64)> {
        let mut constants = vec![
            ("unit_params", self.unit_params() as f64),
            ("coupled", f64::from(u8::from(self.coupled))),
            ("clip", f64::from(self.clip)),
            ("cell_clip", f64::from(self.cell_clip)),
        ];
        constants.extend(activation_constants!(self.gate, "gate_kind", "gate_alpha", "gate_beta"));
        constants.extend(activation_constants!(self.candidate, "candidate_kind", "candidate_alpha", "candidate_beta"));
        constants.extend(activation_constants!(self.output, "output_kind", "output_alpha", "output_beta"));
        constants
    }

    fn norms(&self) -> &'static [usize] {
        &[4]
    }

    #[inline(always)]
    fn forward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        x: Self::Pre,
        r: Self::Pre,
        previous: Self::State,
        p: Self::Unit,
    ) -> (Self::State, Self::Slots) {
        let c_before = previous[1];
        let gate = |at: usize| x[at] + (r[at] + p[at]);
        if PLAIN {
            let (i, f, g, o) = (gate(0).sigmoid::<F>(), gate(1).sigmoid::<F>(), gate(2).tanh::<F>(), gate(3).sigmoid::<F>());
            let c = f * c_before + i * g;
            return ([o * c.tanh::<F>(), c], [i, f, g, o]);
        }
        let i = self.gate.apply::<F>(clip_to(self.clip, gate(0) + self.peephole(p[4], c_before)));
        let f = match self.coupled {
            true => Lanes::splat(1.0) - i,
            false => self.gate.apply::<F>(clip_to(self.clip, gate(1) + self.peephole(p[5], c_before))),
        };
        let g = self.candidate.apply::<F>(clip_to(self.clip, gate(2)));
        let c = clip_to(self.cell_clip, f * c_before + i * g);
        let o = self.gate.apply::<F>(clip_to(self.clip, gate(3) + self.peephole(p[6], c)));
        ([o * self.output.apply::<F>(c), c], [i, f, g, o])
    }

    #[inline(always)]
    fn totals<F: Fusion>(&self, saved: Self::Slots, previous: Self::State, p: Self::Unit, d: Self::State) -> Self::State {
        let [i, f, g, o] = saved;
        let y = self.output.apply::<F>(clip_to(self.cell_clip, f * previous[1] + i * g));
        let d_out = d[0] * y * self.gate.clipped_slope::<F>(self.clip, o);
        [d[0], d[1] + d[0] * o * self.output.slope(y) + d_out * p[6]]
    }

    #[inline(always)]
    fn backward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        saved: Self::Slots,
        previous: Self::State,
        p: Self::Unit,
        d: Self::State,
    ) -> Backward<Self> {
        let [i, f, g, o] = saved;
        let (zero, one) = (Lanes::splat(0.0), Lanes::splat(1.0));
        let c_before = previous[1];
        if PLAIN {
            let y = (f * c_before + i * g).tanh::<F>();
            let dc = d[1] + d[0] * o * (one - y * y);
            let (di, df) = (dc * g * (i * (one - i)), dc * c_before * (f * (one - f)));
            let (dg, d_out) = (dc * i * (one - g * g), d[0] * y * (o * (one - o)));
            return Backward { slots: [di, df, dg, d_out], previous: [zero, dc * f], unit: [zero; 7] };
        }
        // Computed again, not read from the stored state: a sweep may have held that one back.
        let free = f * c_before + i * g;
        let c = clip_to(self.cell_clip, free);
        let y = self.output.apply::<F>(c);
        let d_out = d[0] * y * self.gate_slope::<F>(o);
        let mut dc = d[1] + d[0] * o * self.output.slope(y) + d_out * p[6];
        if self.cell_clip > 0.0 {
            dc = dc.zip(free, |dc, free| if free.abs() > self.cell_clip { 0.0 } else { dc });
        }
        let (mut di, mut df) = (dc * g, dc * c_before);
        if self.coupled {
            (di, df) = (di - df, zero);
        }
        (di, df) = (di * self.gate_slope::<F>(i), df * self.gate_slope::<F>(f));
        let dg = dc * i * self.candidate.clipped_slope::<F>(self.clip, g);
        Backward {
            slots: [di, df, dg, d_out],
            previous: [zero, dc * f + di * p[4] + df * p[5]],
            unit: [zero, zero, zero, zero, di * c_before, df * c_before, d_out * c],
        }
    }
}
