//! Reference cases of ONNX's operators RNN, GRU and LSTM, one safetensors file a case.
//!
//! `tests/fixtures/generate_onnx.py` documents the format and writes a set into `tests/fixtures/onnx`. All numbers are F32, the
//! results too, from ONNX Runtime or from ONNX's own tests. Reading checks everything, as in
//! [`case_file`](super::case_file); an attribute or tensor that does not belong is refused too.

use super::case_file::{CaseTensor, Meta, Tensors, check_tensor, malformed, parse_metadata, parse_tensors};
use super::{Comparison, Report};
use crate::device::Device;
use crate::error::Result;
use crate::nn::Direction;
use crate::onnx::{Inputs, Kind, Operator, Outputs};
use crate::tensor::{Lengths, Tensor};
use safetensors::Dtype;
use serde::de::DeserializeOwned;

/// One case: an operator, its inputs and its outputs.
///
/// Sizes: T steps, B rows, I inputs, H hidden, D directions; shapes are those of `layout` 0.
#[derive(Clone, Debug)]
pub struct OnnxFile {
    /// The operator with its weights.
    pub operator: Operator,
    /// Steps of each row \[B\], in any order, 1 to T (for 0 ONNX Runtime answers a state of zeros, and this crate the initial one);
    /// only where the batch is ragged.
    pub lengths: Option<Vec<u32>>,
    /// `X`, and perhaps `initial_h`, `initial_c`; `Y`, `Y_h`, `Y_c`, at least one of them.
    tensors: Tensors,
}

/// The attributes that a file may have; `op` stands for the node's type.
const ATTRIBUTES: [&str; 10] = [
    "op",
    "hidden_size",
    "direction",
    "activations",
    "activation_alpha",
    "activation_beta",
    "clip",
    "linear_before_reset",
    "input_forget",
    "layout",
];

const OUTPUTS: [&str; 3] = ["Y", "Y_h", "Y_c"];

impl OnnxFile {
    /// Checks the bytes of a case file. `name` stands in the errors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Format`] for whatever does not belong.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self> {
        let mut tensors = parse_tensors(name, bytes)?;
        let values = parse_metadata(name, bytes)?;
        if let Some(key) = values.keys().filter(|key| !ATTRIBUTES.contains(&key.as_str())).min() {
            return Err(malformed(name, format!("has an attribute {key:?} that is not known")));
        }
        let meta = Meta { file: name, values: &values };
        let given = |key: &str| values.contains_key(key);
        let (kind, gates) = match meta.one_of("op", &["RNN", "GRU", "LSTM"])?.as_str() {
            "RNN" => (Kind::Rnn, 1),
            "GRU" => (Kind::Gru, 3),
            _ => (Kind::Lstm, 4),
        };
        let hidden = meta.size("hidden_size", 1)?;
        let flag = |key: &str| if given(key) { meta.flag(key) } else { Ok(false) };
        let batch_first = flag("layout")?;
        let (input, steps, batch) = match tensors.get("X").map(|x| &x.shape[..]) {
            Some(&[a, b, input]) if a * b * input > 0 => {
                if batch_first {
                    (input, b, a)
                } else {
                    (input, a, b)
                }
            }
            Some(shape) => return Err(malformed(name, format!("tensor X has shape {shape:?}, expected three sizes from 1"))),
            None => return Err(malformed(name, "tensor X is missing")),
        };
        let mut operator = Operator::new(kind, input, hidden);
        if given("direction") {
            operator.direction = match meta.one_of("direction", &["forward", "reverse", "bidirectional"])?.as_str() {
                "forward" => Direction::Forward,
                "reverse" => Direction::Reverse,
                _ => Direction::Both,
            };
        }
        operator.batch_first = batch_first;
        operator.linear_before_reset = flag("linear_before_reset")?;
        operator.input_forget = flag("input_forget")?;
        operator.activations = list(&meta, "activations")?;
        operator.activation_alpha = list(&meta, "activation_alpha")?;
        operator.activation_beta = list(&meta, "activation_beta")?;
        if given("clip") {
            operator.clip = Some(meta.parsed("clip", "a number above 0", |clip: &f32| *clip > 0.0 && clip.is_finite())?);
        }

        let directions = if operator.direction == Direction::Both { 2 } else { 1 };
        let rows = hidden.saturating_mul(gates);
        let (state, y) = match batch_first {
            true => (vec![batch, directions, hidden], vec![batch, steps, directions, hidden]),
            false => (vec![directions, batch, hidden], vec![steps, directions, batch, hidden]),
        };
        let lstm = kind == Kind::Lstm;
        let tensor_shape = |tensor: &str| match tensor {
            "X" => tensors["X"].shape.clone(),
            "W" => vec![directions, rows, input],
            "R" => vec![directions, rows, hidden],
            "B" => vec![directions, rows.saturating_mul(2)],
            "P" if lstm => vec![directions, hidden.saturating_mul(3)],
            "sequence_lens" => vec![batch],
            "Y" => y.clone(),
            "initial_h" | "Y_h" => state.clone(),
            "initial_c" | "Y_c" if lstm => state.clone(),
            _ => Vec::new(),
        };
        for (tensor, found) in &tensors {
            let shape = tensor_shape(tensor);
            if shape.is_empty() {
                return Err(malformed(name, format!("tensor {tensor} is none of this operator's")));
            }
            let dtype = if tensor == "sequence_lens" { Dtype::I32 } else { Dtype::F32 };
            check_tensor(name, tensor, found, dtype, &shape)?;
        }
        if !OUTPUTS.iter().any(|output| tensors.contains_key(*output)) {
            return Err(malformed(name, format!("has none of the outputs {OUTPUTS:?}")));
        }
        let mut take = |tensor: &str| tensors.remove(tensor).map(|tensor| tensor.to_f32());
        operator.w = take("W").ok_or_else(|| malformed(name, "tensor W is missing"))?;
        operator.r = take("R").ok_or_else(|| malformed(name, "tensor R is missing"))?;
        (operator.b, operator.p) = (take("B"), take("P"));
        let lengths = tensors.remove("sequence_lens").map(|lengths| read_lengths(name, &lengths, steps)).transpose()?;
        Ok(Self { operator, lengths, tensors })
    }

    /// Runs the case on `device`: outputs within twice `tolerance` of their tensor's largest magnitude, since the expected ones are
    /// rounded to float32 at every step themselves.
    ///
    /// # Errors
    /// What the device reports; what [`Operator::init`] refuses.
    pub fn run(&self, device: &Device, name: &str, tolerance: f64) -> Result<Report> {
        let layer = self.operator.init(device)?;
        let upload = |tensor: &CaseTensor| Tensor::from_slice(device, &tensor.to_f32(), tensor.shape.clone());
        let given = |name: &str| self.tensors.get(name).map(upload).transpose();
        let lengths = self.lengths.as_ref().map(|lengths| Lengths::from_slice(device, lengths)).transpose()?;
        let (initial_h, initial_c) = (given("initial_h")?, given("initial_c")?);
        let inputs = Inputs { sequence_lens: lengths.as_ref(), initial_h: initial_h.as_ref(), initial_c: initial_c.as_ref() };
        let Outputs { y, y_h, y_c } = layer.forward(&upload(&self.tensors["X"])?, inputs)?;
        let mut comparisons = Vec::new();
        for (label, computed) in OUTPUTS.into_iter().zip([Some(y), Some(y_h), y_c]) {
            if let (Some(computed), Some(expected)) = (computed, self.tensors.get(label)) {
                // A wrong shape fails as a wrong length does.
                let numbers = if computed.shape() == expected.shape { computed.to_vec()? } else { Vec::new() };
                comparisons.push(Comparison::new(label, &numbers, &expected.values, 2.0 * tolerance));
            }
        }
        Ok(Report::new(name, comparisons))
    }
}

/// A list in JSON, or as Python prints it; empty where there is none.
fn list<T: DeserializeOwned>(meta: &Meta<'_>, key: &str) -> Result<Vec<T>> {
    let Some(text) = meta.values.get(key) else { return Ok(Vec::new()) };
    let wrong = || malformed(meta.file, format!("metadata {key} is {text:?}, expected a list"));
    serde_json::from_str(&text.replace('\'', "\"")).map_err(|e| wrong().with_source(e))
}

fn read_lengths(file: &str, lengths: &CaseTensor, steps: usize) -> Result<Vec<u32>> {
    let wrong = |v: &&f64| !(**v >= 1.0 && **v <= steps as f64);
    match lengths.values.iter().find(wrong) {
        Some(v) => Err(malformed(file, format!("sequence_lens holds {v}, expected 1 to T = {steps}"))),
        None => Ok(lengths.values.iter().map(|v| *v as u32).collect()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::case_file::tests::{Parts, fixture, set, spoilt_bytes};
    use super::*;
    use crate::error::ErrorKind;

    fn spoilt(spoil: impl FnOnce(&mut Parts)) -> Result<OnnxFile> {
        OnnxFile::parse("spoilt", &spoilt_bytes("onnx/lstm_bidirectional_peepholes_ragged", spoil))
    }

    #[test]
    fn malformed_files_are_refused_by_name() {
        let plain = spoilt(|_| ()).unwrap();
        assert_eq!((plain.operator.direction, plain.lengths), (Direction::Both, Some(vec![2, 4, 1])));
        let lists = |p: &mut Parts| {
            set("activations", "['Tanh', \"Relu\"]")(p);
            set("activation_alpha", "[0.5, 1]")(p);
        };
        let Operator { activations, activation_alpha, .. } = spoilt(lists).unwrap().operator;
        assert_eq!((activations, activation_alpha), (vec!["Tanh".to_owned(), "Relu".to_owned()], vec![0.5, 1.0]));

        let refused = |case: Result<OnnxFile>, text: &str| {
            let error = case.expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Format);
            assert!(error.to_string().starts_with("case_file.read: spoilt: ") && error.to_string().contains(text), "{error}");
        };
        let remove = |name: &'static str| move |p: &mut Parts| drop(p.tensors.remove(name));
        refused(spoilt(set("op", "SRU")), "metadata op is \"SRU\", expected RNN or GRU or LSTM");
        refused(spoilt(set("output_sequence", "1")), "has an attribute \"output_sequence\" that is not known");
        refused(spoilt(set("hidden_size", "0")), "metadata hidden_size is \"0\", expected a whole number from 1");
        refused(spoilt(|p| drop(p.meta.remove("hidden_size"))), "metadata hidden_size is missing");
        refused(spoilt(set("hidden_size", "18446744073709551615")), "tensor B is F32 [2, 24], expected");
        refused(spoilt(set("direction", "backward")), "metadata direction is \"backward\"");
        refused(spoilt(set("input_forget", "2")), "metadata input_forget is \"2\", expected 0 or 1");
        refused(spoilt(set("clip", "0")), "metadata clip is \"0\", expected a number above 0");
        refused(spoilt(set("clip", "nan")), "metadata clip is \"nan\"");
        refused(spoilt(set("activations", "Tanh")), "metadata activations is \"Tanh\", expected a list");
        refused(spoilt(set("activation_beta", "['Tanh']")), "metadata activation_beta is");
        refused(spoilt(set("op", "GRU")), "tensor B is F32 [2, 24], expected F32 [2, 18]");
        refused(spoilt(set("direction", "reverse")), "tensor B is F32 [2, 24], expected F32 [1, 24]");
        refused(spoilt(set("layout", "1")), "tensor Y is F32 [4, 2, 3, 3], expected F32 [4, 3, 2, 3]");
        for name in ["X", "W", "R"] {
            refused(spoilt(remove(name)), &format!("tensor {name} is missing"));
        }
        refused(spoilt(|p| OUTPUTS.iter().for_each(|name| remove(name)(p))), "has none of the outputs");
        let renamed = |p: &mut Parts| {
            let y = p.tensors.remove("Y").unwrap();
            p.tensors.insert("Z".to_owned(), y);
        };
        refused(spoilt(renamed), "tensor Z is none of this operator's");
        let flat = |p: &mut Parts| p.tensors.get_mut("X").unwrap().1 = vec![12, 2];
        refused(spoilt(flat), "tensor X has shape [12, 2], expected three sizes from 1");
        let empty = |p: &mut Parts| *p.tensors.get_mut("X").unwrap() = (Dtype::F32, vec![0, 3, 2], Vec::new());
        refused(spoilt(empty), "tensor X has shape [0, 3, 2], expected three sizes from 1");
        let retyped = |p: &mut Parts| p.tensors.get_mut("Y_h").unwrap().0 = Dtype::I32;
        refused(spoilt(retyped), "tensor Y_h is I32 [2, 3, 3], expected F32 [2, 3, 3]");
        let nan = |p: &mut Parts| p.tensors.get_mut("W").unwrap().2[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
        refused(spoilt(nan), "tensor W holds NaN at 1");
        for length in [0i32, 5, -1] {
            let lengths =
                |p: &mut Parts| p.tensors.get_mut("sequence_lens").unwrap().2[..4].copy_from_slice(&length.to_le_bytes());
            refused(spoilt(lengths), &format!("sequence_lens holds {length}, expected 1 to T = 4"));
        }

        // Any prefix of a file, and any file with one byte changed, gives an error or a case, never a panic.
        let bytes = std::fs::read(fixture("onnx/lstm_bidirectional_peepholes_ragged")).unwrap();
        for end in 0..bytes.len() {
            refused(OnnxFile::parse("spoilt", &bytes[..end]), "not a safetensors file");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let _ = OnnxFile::parse("spoilt", &changed);
        }
    }
}
