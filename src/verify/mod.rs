//! The built-in checks: every kernel against an independent f64 oracle, and whole layers against case files that PyTorch
//! and ONNX Runtime wrote. One body for `cargo test`, the `gatefold verify` command, and other platforms' runs.

pub mod autodiff;
pub mod case_file;
pub mod cases;
mod compare;
pub mod kernels;
pub mod layers;
pub mod onnx_file;
pub mod oracle;
pub mod shaders;
pub mod workloads;

pub use compare::{Comparison, Report};
