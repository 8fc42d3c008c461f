//! The built-in checks: every kernel against an independent f64 oracle, and whole layers against case files that PyTorch
//! and ONNX Runtime wrote. One body for `cargo test`, the `gatefold verify` command, and other platforms' runs.

use std::path::Path;

use crate::error::{Error, Result};

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
pub use report::{DeviceReport, TensorReport, TestReport, Verdict, to_markdown, write_reports};

/// From now on this process builds its GPU pipelines with `edited` in place of a file of `shaders/`: to see that the checks notice an
/// error. The file's name says which it stands for; `shaders` is the folder of the originals.
///
/// # Errors
/// That of a file which cannot be read; a file that equals its original; an original that is not what this program was built from; a
/// second call.
pub fn edit_shader(shaders: &Path, edited: &Path) -> Result<()> {
    const OP: &str = "verify.edit_shader";
    let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| Error::io(OP, path, error));
    let (original, text) = (read(&shaders.join(edited.file_name().unwrap_or_default()))?, read(edited)?);
    let failed = |what: &str| Err(Error::format(OP, format_args!("{}: {what}", edited.display())));
    if text == original {
        return failed("it equals its original");
    }
    if !crate::kernels::all().iter().any(|kernel| kernel.source.contains(&original)) {
        return failed("no kernel of this program has its original: build it anew");
    }
    match crate::backend::gpu::EDITED.set((original, text)) {
        Ok(()) => Ok(()),
        Err(_) => failed("a shader is edited already"),
    }
}
