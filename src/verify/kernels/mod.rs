//! Every kernel family against the f64 oracle: a function a family, with its table of cases.
//!
//! A case runs twice on a poisoned device, where new memory is NaN: outputs are compared with the oracle, the bits of both
//! runs with each other, and inputs afterwards with what they were. Windows lie in larger tensors of NaN words, which
//! a kernel must neither use nor touch.

mod batch_invariant;
mod bptt;
mod dropout;
mod encoder_decoder;
mod flow;
mod gates;
mod half;
mod harness;
mod layers;
mod losses;
mod math;
mod networks;
mod norms;
mod optimizers;
mod peak;
mod pooling;
mod products;
mod sample;
mod scans;
mod sums;
mod sweeps;

use super::Report;
use crate::device::Device;
use crate::error::Result;
use harness::Cases;

/// The cases of one kernel family.
#[derive(Clone, Copy, Debug)]
pub struct KernelCheck {
    /// The family: `gemm`, `lstm_sweep`.
    pub name: &'static str,
    /// wgpu's name of the feature, as in [`DeviceInfo`](crate::DeviceInfo), without which no case can run.
    pub feature: Option<&'static str>,
    cases: Family,
}

type Family = fn(&mut Cases<'_>) -> Result<()>;

impl KernelCheck {
    /// Runs all cases on `device`, one report each. From then on new tensors of this device start as NaN.
    ///
    /// # Errors
    /// What the device reports.
    pub fn run(&self, device: &Device) -> Result<Vec<Report>> {
        device.poison();
        let mut cases = Cases { device, reports: Vec::new() };
        (self.cases)(&mut cases)?;
        Ok(cases.reports)
    }
}

/// Every kernel family, then LSTM layers as a whole.
pub fn all() -> Vec<KernelCheck> {
    let families: Vec<(_, Family)> = vec![
        ("math", math::math),
        ("peak", peak::peak),
        ("gemm", products::gemm),
        ("half", products::half),
        ("gemm_half", products::gemm_half),
        ("gemm_cooperative", products::gemm_cooperative),
        ("transpose", products::transpose),
        ("gather", products::gather),
        ("scatter", products::scatter),
        ("column_sum", sums::column_sum),
        ("reduce", sums::reduce),
        ("cross_entropy", losses::cross_entropy),
        ("mean_squared_error", losses::mean_squared_error),
        ("sgd", optimizers::sgd),
        ("adamw", optimizers::adamw),
        ("dropout", dropout::dropout),
        ("layer_norm", norms::layer_norm),
        ("pooling", pooling::pooling),
        ("elementwise", pooling::elementwise),
        ("columns", pooling::columns),
        ("sample", sample::sample),
        ("gate_mask", gates::gate_mask),
        ("gru_reset", gates::gru_reset),
        ("lstm_sweep", sweeps::lstm_sweep),
        ("step_tiled", sweeps::step_tiled),
        ("lstm_resident", sweeps::lstm_resident),
        ("resident_cells", sweeps::resident_cells),
        ("lstm_grid", sweeps::lstm_grid),
        ("grid_cells", sweeps::grid_cells),
        ("lstm_layers", layers::lstm_layers),
        ("lstm_properties", layers::lstm_properties),
        ("networks", networks::networks),
        ("jordan", networks::jordan),
        ("half_networks", half::half_networks),
        ("half_linear", half::half_linear),
        ("gradient_flow", flow::gradient_flow),
        ("scans", scans::scans),
        ("batch_invariant", batch_invariant::batch_invariant),
        ("bptt", bptt::bptt),
        ("encoder_decoder", encoder_decoder::encoder_decoder),
    ];
    let feature = |name| (name == "gemm_cooperative").then_some("EXPERIMENTAL_COOPERATIVE_MATRIX");
    families.into_iter().map(|(name, cases)| KernelCheck { name, feature: feature(name), cases }).collect()
}
