//! Folders of case files, of either kind.

use super::case_file::{self, CaseFile};
use super::onnx_file::OnnxFile;
use super::{Report, layers};
use crate::device::Device;
use crate::error::{Error, Result};
use std::path::Path;

/// A case file of either kind.
#[derive(Clone, Debug)]
pub enum Case {
    /// A layer, with PyTorch's answers.
    Torch(CaseFile),
    /// An ONNX operator, with ONNX Runtime's answers.
    Onnx(OnnxFile),
}

impl Case {
    /// Reads and checks a case file: with the metadata `op` it is one of ONNX.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (name, bytes) = (path.display().to_string(), case_file::read_bytes(path)?);
        match case_file::parse_metadata(&name, &bytes)?.contains_key("op") {
            true => OnnxFile::parse(&name, &bytes).map(Case::Onnx),
            false => CaseFile::parse(&name, &bytes).map(Case::Torch),
        }
    }

    /// Runs it on `device`, with outputs within `tolerance.0` and gradients within `tolerance.1` of their tensor's largest magnitude.
    /// See [`layers::run_case`] and [`OnnxFile::run`] for where a bound is larger.
    ///
    /// # Errors
    /// What the device reports; what the layer refuses.
    pub fn run(&self, device: &Device, name: &str, tolerance: (f64, f64)) -> Result<Report> {
        match self {
            Case::Torch(case) => layers::run_case(device, name, case, tolerance),
            Case::Onnx(case) => case.run(device, name, tolerance.0),
        }
    }
}

/// All case files (`*.safetensors`) of a folder with their names, without the extension, in the order of the names. A folder
/// without any is an error.
pub fn read_dir(dir: impl AsRef<Path>) -> Result<Vec<(String, Case)>> {
    let dir = dir.as_ref();
    let io = |e| Error::io("case_file.read_dir", dir, e);
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            cases.push((name, Case::read(&path)?));
        }
    }
    if cases.is_empty() {
        return Err(Error::format("case_file.read_dir", format_args!("{}: no .safetensors file", dir.display())));
    }
    cases.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(cases)
}
