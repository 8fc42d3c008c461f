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
mod training;
mod wavefront;

use super::Report;
use crate::device::{Device, DeviceInfo};
use crate::error::Result;
use crate::kernels::gemm::{COOPERATIVE_MEMORY, TILED_128_MEMORY};
use harness::Cases;
use std::ops::RangeInclusive;

/// The cases of one kernel family.
#[derive(Clone, Copy, Debug)]
pub struct KernelCheck {
    /// The family: `gemm`, `lstm_sweep`.
    pub name: &'static str,
    needs: Needs,
    cases: Family,
}

type Family = fn(&mut Cases<'_>) -> Result<()>;

/// What an adapter must offer for any case of a family, by the names of [`DeviceInfo`]: features, and bounds of limits.
#[derive(Clone, Copy, Debug)]
struct Needs {
    features: &'static [&'static str],
    limits: &'static [(&'static str, RangeInclusive<u64>)],
}

const NOTHING: Needs = Needs { features: &[], limits: &[] };
const A_GPU: Needs = Needs { features: &[], limits: &[("max_buffer_size", 0..=u64::MAX)] };
const SUBGROUPS_OF_8: Needs =
    Needs { features: &["SUBGROUP"], limits: &[("subgroup_min_size", 8..=8), ("subgroup_max_size", 8..=8)] };
const TILES_OF_128: Needs =
    Needs { features: &[], limits: &[("max_compute_workgroup_storage_size", TILED_128_MEMORY as u64..=u64::MAX)] };
const MATRICES: &[&str] = &["SUBGROUP", "EXPERIMENTAL_COOPERATIVE_MATRIX"];
const MATRICES_OF_8: Needs = Needs {
    features: MATRICES,
    limits: &[("subgroup_max_size", 8..=8), ("max_compute_workgroup_storage_size", COOPERATIVE_MEMORY as u64..=u64::MAX)],
};
const MATRICES_OF_16: Needs = Needs {
    features: MATRICES,
    limits: &[("subgroup_max_size", 32..=32), ("max_compute_workgroup_storage_size", COOPERATIVE_MEMORY as u64..=u64::MAX)],
};

impl KernelCheck {
    /// What a device lacks without which no case can run, for people; `None` where all cases run.
    pub fn missing(&self, info: &DeviceInfo) -> Option<String> {
        let feature = self.needs.features.iter().find(|needed| !info.features.iter().any(|has| has == *needed));
        let limit = || {
            self.needs.limits.iter().find_map(|(name, bounds)| match info.limits.iter().find(|(limit, _)| limit == name) {
                Some((_, value)) if bounds.contains(value) => None,
                Some((_, value)) if *bounds.end() == u64::MAX => {
                    Some(format!("{name} is {value}, needed at least {}", bounds.start()))
                }
                Some((_, value)) => Some(format!("{name} is {value}, needed {}", bounds.start())),
                None => Some(format!("{name} is not known")),
            })
        };
        match (self.needs.features, self.needs.limits) {
            ([], []) => None,
            _ if info.backend == "native" => Some("a kernel for GPUs".to_owned()),
            _ => feature.map(|name| format!("no {name}")).or_else(limit),
        }
    }

    /// Runs all cases on `device` and adds a report of each to `reports`. From then on new tensors of this device start as NaN.
    ///
    /// # Errors
    /// What the device reports, at the first case that meets it; `reports` holds the cases before it.
    pub fn run(&self, device: &Device, reports: &mut Vec<Report>) -> Result<()> {
        device.poison();
        (self.cases)(&mut Cases { device, reports })
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
        ("gemm_subgroup", products::gemm_subgroup),
        ("gemm_tiled_128", products::gemm_tiled_128),
        ("gemm_cooperative_8", products::gemm_cooperative_8),
        ("gemm_cooperative_16", products::gemm_cooperative_16),
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
        ("step_subgroup", sweeps::step_subgroup),
        ("step_row", sweeps::step_row),
        ("step_tiled", sweeps::step_tiled),
        ("lstm_resident", sweeps::lstm_resident),
        ("resident_cells", sweeps::resident_cells),
        ("lstm_grid", sweeps::lstm_grid),
        ("grid_cells", sweeps::grid_cells),
        ("wide_cells", sweeps::wide_cells),
        ("lstm_layers", layers::lstm_layers),
        ("lstm_properties", layers::lstm_properties),
        ("networks", networks::networks),
        ("jordan", networks::jordan),
        ("half_networks", half::half_networks),
        ("half_linear", half::half_linear),
        ("gradient_flow", flow::gradient_flow),
        ("scans", scans::scans),
        ("batch_invariant", batch_invariant::batch_invariant),
        ("wavefront", wavefront::wavefront),
        ("bptt", bptt::bptt),
        ("bptt_parts", bptt::bptt_parts),
        ("encoder_decoder", encoder_decoder::encoder_decoder),
        ("training", training::training),
    ];
    let needs = |name| match name {
        "step_tiled" | "lstm_resident" | "resident_cells" | "lstm_grid" | "grid_cells" | "wavefront" | "bptt_parts" => A_GPU,
        "gemm_subgroup" | "step_subgroup" | "step_row" => SUBGROUPS_OF_8,
        "gemm_tiled_128" => TILES_OF_128,
        "gemm_cooperative_8" => MATRICES_OF_8,
        "gemm_cooperative_16" => MATRICES_OF_16,
        _ => NOTHING,
    };
    families.into_iter().map(|(name, cases)| KernelCheck { name, needs: needs(name), cases }).collect()
}
