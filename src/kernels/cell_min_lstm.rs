//! minLSTM: `shaders/cell_min_lstm.wgsl` and its native half.

use super::cell_contract::{Backward, CellKernel, Site, StepKernels};
use super::cell_min_gru::{positive, positive_slope};
use super::math::{Fusion, Lanes, exp, log};
use super::sweep_native::NativeSweeps;
use super::sweep_resident::{ResidentKernels, resident_kernels};
use super::sweep_scan::{ScanKernels, scan_kernels};
use super::sweep_step::step_kernels;

static NATIVE: NativeSweeps<MinLstmCell> = NativeSweeps::new();
pub(crate) static KERNELS: StepKernels = step_kernels!("min_lstm", "cell_min_lstm.wgsl", "positive.wgsl");
pub(crate) static RESIDENT: ResidentKernels = resident_kernels!("min_lstm", "cell_min_lstm.wgsl", "positive.wgsl");
pub(crate) static SCAN: ScanKernels = scan_kernels!("min_lstm", "cell_min_lstm.wgsl", "positive.wgsl");

/// The cell of Feng et al. (2024), gates f, i, n: `f, i = sigmoid(x)`, `h = f / (f + i) h' + i / (f + i) g(x_n)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MinLstmCell;

/// `i / (f + i) = sigmoid(log i - log f)`: both may vanish, their quotient does not.
#[inline(always)]
fn input_share<F: Fusion>(x_f: Lanes, x_i: Lanes) -> Lanes {
    let softplus = |x: Lanes| x.map(|x| if x < 0.0 { 0.0 } else { x } + log(1.0 + exp::<F>(-x.abs())));
    (softplus(-x_f) - softplus(-x_i)).sigmoid::<F>()
}

impl CellKernel for MinLstmCell {
    type Pre = [Lanes; 3]; // f, i, n
    type Slots = [Lanes; 3]; // x_f, x_i, g(x_n)
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
        let (share, g) = (input_share::<F>(x[0], x[1]), positive::<F>(x[2]));
        ([(Lanes::splat(1.0) - share) * previous[0] + share * g], [x[0], x[1], g])
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
        let [x_f, x_i, g] = saved;
        let share = input_share::<F>(x_f, x_i);
        let kept = Lanes::splat(1.0) - share;
        let dk = d[0] * (g - previous[0]) * (share * kept);
        let slots = [-dk * (-x_f).sigmoid::<F>(), dk * (-x_i).sigmoid::<F>(), d[0] * share * positive_slope(g)];
        Backward { slots, previous: [d[0] * kept], unit: [] }
    }
}
