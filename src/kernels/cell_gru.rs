//! The gated recurrent unit: `shaders/cell_gru.wgsl` and its native half.

use super::activation::{Activation, clip_to};
use super::cell_contract::{Backward, CellKernel, Gated, Site, StepKernels, activation_constants};
use super::math::{Fusion, Lanes};
use super::sweep_grid::grid_kernels;
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_rows::rows_kernels;
use super::sweep_step::step_kernels;
use crate::backend::Kernel;

static NATIVE: NativeSweeps<GruCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("gru", reset, "cell_gru.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("gru", "cell_gru.wgsl");
pub(crate) static GRID: [Kernel; 2] = grid_kernels!("gru", "cell_gru.wgsl");
pub(crate) static ROWS: [Kernel; 2] = rows_kernels!("gru", "cell_gru.wgsl");

/// The cell of Cho et al. (2014), gates in PyTorch's order: `r, z = sigmoid(x + r + b)`, `n = tanh(x + q)`,
/// `h = (1 - z) n + z h'`; `q = r (W_hn h' + b_hn)`, or, with the reset before the product, `q = W_hn (r h') + b_hn`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GruCell {
    /// Of r and z.
    pub(crate) gate: Activation,
    /// Of n.
    pub(crate) candidate: Activation,
    /// Whether the reset gate acts before the product.
    pub(crate) reset_before: bool,
    /// A bound for each pre-activation; 0: none.
    pub(crate) clip: f32,
}

impl Default for GruCell {
    fn default() -> Self {
        Self { gate: Activation::Sigmoid, candidate: Activation::Tanh, reset_before: false, clip: 0.0 }
    }
}

impl GruCell {
    /// r or z, of its pre-activation.
    #[inline(always)]
    pub(super) fn gate<F: Fusion>(&self, sum: Lanes) -> Lanes {
        self.gate.apply::<F>(clip_to(self.clip, sum))
    }

    /// The slope where r or z is `y`.
    #[inline(always)]
    pub(super) fn gate_slope<F: Fusion>(&self, y: Lanes) -> Lanes {
        self.gate.clipped_slope::<F>(self.clip, y)
    }

    /// What the shaders must know of r and z.
    pub(super) fn gate_constants(&self) -> Vec<(&'static str, f64)> {
        let mut constants = vec![("clip", f64::from(self.clip))];
        constants.extend(activation_constants!(self.gate, "gate_kind", "gate_alpha", "gate_beta"));
        constants
    }
}

impl CellKernel for GruCell {
    type Pre = [Lanes; 3]; // r, z, n
    type Slots = [Lanes; 4]; // the same, after their functions; after: W_hn h' + b_hn, before: r h'
    type State = [Lanes; 1]; // h
    type Unit = [Lanes; 3]; // b_hh of r, z, n

    const BIASES: usize = 3;
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

    fn constants(&self) -> Vec<(&'static str, f64)> {
        let mut constants = self.gate_constants();
        constants.push(("reset_before", f64::from(u8::from(self.reset_before))));
        constants.extend(activation_constants!(self.candidate, "candidate_kind", "candidate_alpha", "candidate_beta"));
        constants
    }

    fn recurrent_slot(&self, gate: usize) -> usize {
        if gate == 2 && !self.reset_before { 3 } else { gate }
    }

    fn norms(&self) -> &'static [usize] {
        // Before the product, n's part is no product of h.
        if self.reset_before { &[] } else { &[2, 1] }
    }

    fn gated(&self) -> Option<&dyn Gated> {
        if self.reset_before { Some(self) } else { None }
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
        if PLAIN {
            let (reset, z) = ((x[0] + (r[0] + p[0])).sigmoid::<F>(), (x[1] + (r[1] + p[1])).sigmoid::<F>());
            let q = r[2] + p[2];
            let n = (x[2] + reset * q).tanh::<F>();
            return ([(Lanes::splat(1.0) - z) * n + z * previous[0]], [reset, z, n, q]);
        }
        // No closure: as a call of its own it would not be code for wide vectors.
        let (reset, z) = (self.gate::<F>(x[0] + (r[0] + p[0])), self.gate::<F>(x[1] + (r[1] + p[1])));
        let q = r[2] + p[2];
        let part = if self.reset_before { q } else { reset * q };
        let n = self.candidate.apply::<F>(clip_to(self.clip, x[2] + part));
        let kept = if self.reset_before { reset * previous[0] } else { q };
        ([(Lanes::splat(1.0) - z) * n + z * previous[0]], [reset, z, n, kept])
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
        let ([reset, z, n, q], one, unit) = (saved, Lanes::splat(1.0), [Lanes::splat(0.0); 3]);
        if PLAIN {
            let dn = d[0] * (one - z) * (one - n * n);
            let dz = d[0] * (previous[0] - n) * (z * (one - z));
            let dreset = dn * q * (reset * (one - reset));
            return Backward { slots: [dreset, dz, dn, dn * reset], previous: [d[0] * z], unit };
        }
        let dn = d[0] * (one - z) * self.candidate.clipped_slope::<F>(self.clip, n);
        let dz = d[0] * (previous[0] - n) * self.gate_slope::<F>(z);
        // With the reset before the product, its gradient follows from that of the product: see gru_reset and sweep_pair.
        let slots = match self.reset_before {
            true => [reset, dz, dn, q],
            false => [dn * q * self.gate_slope::<F>(reset), dz, dn, dn * reset],
        };
        Backward { slots, previous: [d[0] * z], unit }
    }
}
