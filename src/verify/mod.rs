//! The built-in checks: every kernel against an independent f64 oracle, and whole layers against case files that PyTorch
//! and ONNX Runtime wrote. One body for `cargo test`, the `gatefold verify` command, and other platforms' runs.

pub mod autodiff;
pub mod case_file;
pub mod cases;
mod compare;
pub mod kernels;
mod known;
pub mod layers;
pub mod onnx_file;
pub mod oracle;
mod report;
pub mod shaders;
pub mod workloads;

pub use compare::{Comparison, Distance, Report};
pub use known::{KNOWN_FAILURES, KnownFailure};
pub use report::{DeviceReport, TensorReport, TestReport, Verdict, to_markdown};

/// From now on this process builds its GPU pipelines with `edited` in place of `original`, the text of a file of `shaders/`: to see
/// that the checks notice an error. The first call counts.
pub fn edit_shader(original: String, edited: String) {
    let _ = crate::backend::gpu::EDITED.set((original, edited));
}
