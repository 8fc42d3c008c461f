//! minGRU: `shaders/cell_min_gru.wgsl` and its native half; and g, which minLSTM shares (`shaders/positive.wgsl`).

use super::cell_contract::{Backward, CellKernel, Site, StepKernels};
use super::math::{Fusion, Lanes, sigmoid};
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_scan::{ScanKernels, scan_kernels};
use super::sweep_step::step_kernels;

static NATIVE: NativeSweeps<MinGruCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("min_gru", "cell_min_gru.wgsl", "positive.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("min_gru", "cell_min_gru.wgsl", "positive.wgsl");
pub(crate) static SCAN: ScanKernels = scan_kernels!("min_gru", "cell_min_gru.wgsl", "positive.wgsl");

/// The cell of Feng et al. (2024), gates z, n: `z = sigmoid(x_z)`, `h = (1 - z) h' + z g(x_n)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MinGruCell;

/// g: `v + 1/2`, for `v < 0` `sigmoid(v)`.
#[inline(always)]
pub(crate) fn positive<F: Fusion>(v: Lanes) -> Lanes {
    v.map(|v| if v < 0.0 { sigmoid::<F>(v) } else { v + 0.5 })
}

/// The slope where g has that value.
#[inline(always)]
pub(crate) fn positive_slope(g: Lanes) -> Lanes {
    g.map(|g| if g < 0.5 { g * (1.0 - g) } else { 1.0 })
}

impl CellKernel for MinGruCell {
    type Pre = [Lanes; 2]; // z, n
    type Slots = [Lanes; 2]; // sigmoid(x_z), g(x_n)
    type State = [Lanes; 1]; // h
    type Unit = [Lanes; 0];

    const BIASES: usize = 0;
    const PRODUCT: bool = false;
    const NATIVE: &'static NativeSweeps<Self> = &NATIVE;
    const KERNELS: &'static StepKernels = &KERNELS;
    const RESIDENT: &'static ResidentKernels = &RESIDENT;
    const SCAN: Option<&'static ScanKernels> = Some(&SCAN);

    #[inline(always)]
    fn forward<F: Fusion, const PLAIN: bool>(
        &self,
        _: Site,
        x: Self::Pre,
        _: Self::Pre,
        previous: Self::State,
        _: Self::Unit,
    ) -> (Self::State, Self::Slots) {
        let (z, g) = (x[0].sigmoid::<F>(), positive::<F>(x[1]));
        ([(Lanes::splat(1.0) - z) * previous[0] + z * g], [z, g])
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
        let ([z, g], kept) = (saved, Lanes::splat(1.0) - saved[0]);
        let dz = d[0] * (g - previous[0]) * (z * kept);
        Backward { slots: [dz, d[0] * z * positive_slope(g)], previous: [d[0] * kept], unit: [] }
    }
}
