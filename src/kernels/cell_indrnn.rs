//! The independently recurrent network: `shaders/cell_indrnn.wgsl` and its native half.

use super::activation::Activation;
use super::cell_contract::{Backward, CellKernel, Site, StepKernels, activation_constants};
use super::math::{Fusion, Lanes};
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_step::step_kernels;

static NATIVE: NativeSweeps<IndRnnCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("indrnn", "cell_indrnn.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("indrnn", "cell_indrnn.wgsl");

/// The cell of Li et al. (2018): `h = act(x + u h')`, a weight u for each unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IndRnnCell {
    /// Of h.
    pub(crate) activation: Activation,
}

impl Default for IndRnnCell {
    fn default() -> Self {
        Self { activation: Activation::Relu }
    }
}

impl CellKernel for IndRnnCell {
    type Pre = [Lanes; 1];
    type Slots = [Lanes; 1]; // h, before any holding back
    type State = [Lanes; 1]; // h
    type Unit = [Lanes; 1]; // u

    const BIASES: usize = 0;
    const PRODUCT: bool = false;
    const NATIVE: &'static NativeSweeps<Self> = &NATIVE;
    const KERNELS: &'static StepKernels = &KERNELS;
    const RESIDENT: &'static ResidentKernels = &RESIDENT;

    fn unit_params(&self) -> usize {
        1
    }

    fn constants(&self) -> Vec<(&'static str, f64)> {
        activation_constants!(self.activation, "kind", "alpha", "beta").to_vec()
    }

    #[inline(always)]
    fn forward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        x: Self::Pre,
        _: Self::Pre,
        previous: Self::State,
        p: Self::Unit,
    ) -> (Self::State, Self::Slots) {
        let h = self.activation.apply::<F>(x[0] + p[0] * previous[0]);
        ([h], [h])
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
        let da = d[0] * self.activation.slope(saved[0]);
        Backward { slots: [da], previous: [da * p[0]], unit: [da * previous[0]] }
    }
}
