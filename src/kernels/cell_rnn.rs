//! The vanilla recurrent network: `shaders/cell_rnn.wgsl` and its native half.

use super::activation::{Activation, clip_to};
use super::cell_contract::{Backward, CellKernel, Site, StepKernels, activation_constants};
use super::math::{Fusion, Lanes};
use super::sweep_grid::grid_kernels;
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_step::step_kernels;
use crate::backend::Kernel;

static NATIVE: NativeSweeps<RnnCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("rnn", projected, "cell_rnn.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("rnn", "cell_rnn.wgsl");
pub(crate) static GRID: [Kernel; 2] = grid_kernels!("rnn", "cell_rnn.wgsl");

/// The cell of Elman (1990): `h = act(x + r + b)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RnnCell {
    /// Of h.
    pub(crate) activation: Activation,
    /// A bound for the pre-activation; 0: none.
    pub(crate) clip: f32,
}

impl Default for RnnCell {
    fn default() -> Self {
        Self { activation: Activation::Tanh, clip: 0.0 }
    }
}

impl CellKernel for RnnCell {
    type Pre = [Lanes; 1];
    type Slots = [Lanes; 1]; // h, before any holding back
    type State = [Lanes; 1]; // h
    type Unit = [Lanes; 1]; // b_hh

    const BIASES: usize = 1;
    const PRODUCT: bool = true;
    const NATIVE: &'static NativeSweeps<Self> = &NATIVE;
    const KERNELS: &'static StepKernels = &KERNELS;
    const RESIDENT: &'static ResidentKernels = &RESIDENT;
    const GRID: Option<&'static [Kernel; 2]> = Some(&GRID);

    fn constants(&self) -> Vec<(&'static str, f64)> {
        let mut constants = vec![("clip", f64::from(self.clip))];
        constants.extend(activation_constants!(self.activation, "kind", "alpha", "beta"));
        constants
    }

    #[inline(always)]
    fn forward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        x: Self::Pre,
        r: Self::Pre,
        _: Self::State,
        p: Self::Unit,
    ) -> (Self::State, Self::Slots) {
        let h = self.activation.apply::<F>(clip_to(self.clip, x[0] + (r[0] + p[0])));
        ([h], [h])
    }

    #[inline(always)]
    fn backward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        saved: Self::Slots,
        _: Self::State,
        _: Self::Unit,
        d: Self::State,
    ) -> Backward<Self> {
        let da = d[0] * self.activation.clipped_slope::<F>(self.clip, saved[0]);
        Backward { slots: [da], previous: [Lanes::splat(0.0)], unit: [Lanes::splat(0.0)] }
    }
}
