//! Reference cases: recurrent layers with what PyTorch answers in float64, one safetensors file a case.
//!
//! `tests/fixtures/generate.py` documents the format and writes a small set into `tests/fixtures/cases`. Inputs are F32,
//! results are F64 and computed from exactly those inputs, so a comparison sees the reader's rounding alone. Reading checks
//! everything: sizes, names, shapes, types, finite values; a tensor that does not belong is refused too.

use crate::error::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::str::FromStr;

/// A tensor of a file, its values as f64: exact for F32, F64 and integers up to 2^53.
#[derive(Clone, Debug, PartialEq)]
pub struct CaseTensor {
    /// The type in the file: F32, F64, I32 or I64.
    pub dtype: Dtype,
    /// The shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub values: Vec<f64>,
}

impl CaseTensor {
    /// The values as f32: exact for a tensor that is stored as F32.
    pub fn to_f32(&self) -> Vec<f32> {
        self.values.iter().map(|&v| v as f32).collect()
    }
}

/// Named tensors, in the order of their names.
pub type Tensors = BTreeMap<String, CaseTensor>;

/// One case: its options, its tensors, and how far PyTorch's own float32 run is from its results.
///
/// Sizes: T steps, B rows, I inputs, H hidden, L layers, D directions, G gates, R = `projection` or H.
#[derive(Clone, Debug)]
pub struct CaseFile {
    /// `lstm`, `gru` or `rnn`.
    pub cell: String,
    /// T.
    pub steps: usize,
    /// B.
    pub batch: usize,
    /// I.
    pub input: usize,
    /// H.
    pub hidden: usize,
    /// L.
    pub layers: usize,
    /// Whether there is a reverse direction.
    pub bidirectional: bool,
    /// The width of the projection, 0 for none.
    pub projection: usize,
    /// `tanh` or `relu`; of meaning for `rnn` only.
    pub nonlinearity: String,
    /// Whether there are bias vectors.
    pub bias: bool,
    /// Steps of each row \[B\], in any order, 1 to T; only where the batch is ragged.
    pub lengths: Option<Vec<usize>>,
    /// PyTorch's version.
    pub torch: String,
    /// The worst error of PyTorch's float32 run on y, hn, cn, each relative to its tensor's largest magnitude; NaN where that run
    /// overflowed.
    pub float32_error_outputs: f64,
    /// The same on the gradients.
    pub float32_error_gradients: f64,
    name: String,
    tensors: Tensors,
}

/// The type of what a case starts from, and of what PyTorch computed.
const INPUT: Dtype = Dtype::F32;
const RESULT: Dtype = Dtype::F64;

impl CaseFile {
    /// Reads and checks a case file.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&path.display().to_string(), &read_bytes(path)?)
    }

    /// Checks the bytes of a case file. `name` stands in the errors.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self> {
        let tensors = parse_tensors(name, bytes)?;
        let values = parse_metadata(name, bytes)?;
        let meta = Meta { file: name, values: &values };
        let cell = meta.one_of("cell", &["lstm", "gru", "rnn"])?;
        meta.one_of("batch_first", &["0"])?;
        let mut case = Self {
            cell,
            steps: meta.size("T", 1)?,
            batch: meta.size("B", 1)?,
            input: meta.size("I", 1)?,
            hidden: meta.size("H", 1)?,
            layers: meta.size("layers", 1)?,
            bidirectional: meta.flag("bidirectional")?,
            projection: meta.size("proj", 0)?,
            nonlinearity: meta.one_of("nonlinearity", &["tanh", "relu"])?,
            bias: meta.flag("bias")?,
            lengths: None,
            torch: meta.text("torch")?.to_owned(),
            float32_error_outputs: meta.error("float32_error_outputs")?,
            float32_error_gradients: meta.error("float32_error_gradients")?,
            name: name.to_owned(),
            tensors,
        };
        let ragged = meta.flag("ragged")?;
        case.check_tensors(ragged)?;
        if ragged {
            case.lengths = Some(case.read_lengths()?);
        }
        Ok(case)
    }

    /// D: 1 or 2.
    pub fn directions(&self) -> usize {
        1 + usize::from(self.bidirectional)
    }

    /// The tensor of this name: `x`, `param.weight_ih_l0`, `grad.x`, ...
    pub fn tensor(&self, name: &str) -> Result<&CaseTensor> {
        self.tensors.get(name).ok_or_else(|| malformed(&self.name, format!("tensor {name} is missing")))
    }

    /// All tensors.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Names of the parameters in PyTorch's order, without `param.`: `weight_ih_l0`, ..., `weight_ih_l0_reverse`, ...
    pub fn parameter_names(&self) -> Vec<String> {
        let kinds = parameter_kinds(self.bias, self.projection > 0);
        let suffixes = (0..self.layers).flat_map(|layer| (0..self.directions()).map(move |direction| suffix(layer, direction)));
        suffixes.flat_map(|suffix| kinds.iter().map(move |kind| format!("{kind}{suffix}"))).collect()
    }

    /// The largest error to accept of y, hn and cn, relative to each tensor's largest magnitude: `tolerance`, or ten times
    /// PyTorch's own float32 error where that is more, since a saturated recurrence amplifies rounding, whoever does it.
    pub fn output_bound(&self, tolerance: f64) -> f64 {
        tolerance.max(10.0 * self.float32_error_outputs)
    }

    /// The same as [`output_bound`](Self::output_bound) for the gradients.
    pub fn gradient_bound(&self, tolerance: f64) -> f64 {
        tolerance.max(10.0 * self.float32_error_gradients)
    }

    /// Whether this crate can run the case; else the reason: no f32 can.
    pub fn supported(&self) -> std::result::Result<(), String> {
        if self.float32_error_outputs.is_nan() || self.float32_error_gradients.is_nan() {
            return Err("it overflows in float32, in PyTorch too".to_owned());
        }
        Ok(())
    }

    /// Checks that exactly the tensors are there that the options ask for, each with its shape and type, and finite.
    fn check_tensors(&self, ragged: bool) -> Result<()> {
        let width = if self.projection > 0 { self.projection } else { self.hidden };
        let directions = self.directions();
        let slots = self.layers.saturating_mul(directions);
        let outputs = width.saturating_mul(directions);
        let (h, c) = ([slots, self.batch, width], [slots, self.batch, self.hidden]);
        let x = [self.steps, self.batch, self.input];
        let y = [self.steps, self.batch, outputs];
        let mut known = 0;
        let mut check = |name: &str, dtype: Dtype, shape: &[usize]| {
            known += 1;
            self.check_tensor(name, dtype, shape)
        };
        for (names, shape) in [
            (["x", "grad.x"], &x),
            (["h0", "grad.h0"], &h),
            (["c0", "grad.c0"], &c),
            (["dy", "y"], &y),
            (["dhn", "hn"], &h),
            (["dcn", "cn"], &c),
        ] {
            if self.cell == "lstm" || !["c0", "dcn"].contains(&names[0]) {
                check(names[0], INPUT, shape)?;
                check(names[1], RESULT, shape)?;
            }
        }
        if ragged {
            check("lengths", Dtype::I64, &[self.batch])?;
        }
        let gates = match self.cell.as_str() {
            "lstm" => 4,
            "gru" => 3,
            _ => 1,
        };
        let rows = self.hidden.saturating_mul(gates);
        // Layer by layer, so that an absurd number of layers ends at the first missing name.
        for layer in 0..self.layers {
            for direction in 0..directions {
                for kind in parameter_kinds(self.bias, self.projection > 0) {
                    let inputs = if layer == 0 { self.input } else { outputs };
                    let shape = match kind {
                        "weight_ih" => vec![rows, inputs],
                        "weight_hh" => vec![rows, width],
                        "weight_hr" => vec![self.projection, self.hidden],
                        _ => vec![rows],
                    };
                    let name = format!("{kind}{}", suffix(layer, direction));
                    check(&format!("param.{name}"), INPUT, &shape)?;
                    check(&format!("grad.param.{name}"), RESULT, &shape)?;
                }
            }
        }
        if known != self.tensors.len() {
            let more = self.tensors.len() - known;
            return Err(malformed(&self.name, format!("has {more} tensors that its options do not ask for")));
        }
        Ok(())
    }

    fn check_tensor(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<()> {
        check_tensor(&self.name, name, self.tensor(name)?, dtype, shape)
    }

    fn read_lengths(&self) -> Result<Vec<usize>> {
        let wrong = |v: &f64| !(*v >= 1.0 && *v <= self.steps as f64);
        let values = &self.tensor("lengths")?.values;
        match values.iter().find(|v| wrong(v)) {
            Some(v) => Err(malformed(&self.name, format!("lengths holds {v}, expected 1 to T = {}", self.steps))),
            None => Ok(values.iter().map(|&v| v as usize).collect()),
        }
    }
}

/// All tensors of any safetensors file that holds only F32, F64, I32 and I64.
pub fn read_tensors(path: impl AsRef<Path>) -> Result<Tensors> {
    let path = path.as_ref();
    parse_tensors(&path.display().to_string(), &read_bytes(path)?)
}

/// That tensor `name` of `file` has this type and shape, and finite values.
pub(super) fn check_tensor(file: &str, name: &str, tensor: &CaseTensor, dtype: Dtype, shape: &[usize]) -> Result<()> {
    if tensor.shape != shape || tensor.dtype != dtype {
        let given = format!("tensor {name} is {} {:?}", tensor.dtype, tensor.shape);
        return Err(malformed(file, format!("{given}, expected {dtype} {shape:?}")));
    }
    match tensor.values.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(malformed(file, format!("tensor {name} holds {} at {at}", tensor.values[at]))),
        None => Ok(()),
    }
}

/// `_l0`, `_l0_reverse`, ...: how PyTorch ends the names of the parameters of one layer and direction (0 forward, 1 reverse).
pub fn suffix(layer: usize, direction: usize) -> String {
    format!("_l{layer}{}", if direction == 0 { "" } else { "_reverse" })
}

/// The kinds of parameters of one layer and direction, in PyTorch's order.
fn parameter_kinds(bias: bool, projection: bool) -> Vec<&'static str> {
    let mut kinds = vec!["weight_ih", "weight_hh"];
    if bias {
        kinds.extend(["bias_ih", "bias_hh"]);
    }
    if projection {
        kinds.push("weight_hr");
    }
    kinds
}

pub(super) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io("case_file.read", path, e))
}

pub(super) fn parse_tensors(name: &str, bytes: &[u8]) -> Result<Tensors> {
    let file =
        SafeTensors::deserialize(bytes).map_err(|e| malformed(name, format!("not a safetensors file: {e}")).with_source(e))?;
    let mut tensors = Tensors::new();
    for (tensor, view) in file.iter() {
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => scalars(data, |b| f32::from_le_bytes(b).into()),
            Dtype::F64 => scalars(data, f64::from_le_bytes),
            Dtype::I32 => scalars(data, |b| i32::from_le_bytes(b).into()),
            Dtype::I64 => scalars(data, |b| i64::from_le_bytes(b) as f64),
            other => return Err(malformed(name, format!("tensor {tensor} is {other}, expected F32, F64, I32 or I64"))),
        };
        tensors.insert(tensor.to_owned(), CaseTensor { dtype: view.dtype(), shape: view.shape().to_vec(), values });
    }
    Ok(tensors)
}

pub(super) fn parse_metadata(name: &str, bytes: &[u8]) -> Result<HashMap<String, String>> {
    let not_read = |e| malformed(name, format!("not a safetensors file: {e}")).with_source(e);
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(not_read)?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// Little-endian scalars of N bytes.
fn scalars<const N: usize>(data: &[u8], scalar: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    let read = |bytes: &[u8]| {
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        scalar(array)
    };
    data.chunks_exact(N).map(read).collect()
}

pub(super) fn malformed(file: &str, what: impl std::fmt::Display) -> Error {
    Error::format("case_file.read", format_args!("{file}: {what}"))
}

/// The metadata of a file, with errors that name the file and the key.
pub(super) struct Meta<'a> {
    pub file: &'a str,
    pub values: &'a HashMap<String, String>,
}

impl Meta<'_> {
    pub fn text(&self, key: &str) -> Result<&str> {
        let value = self.values.get(key).map(String::as_str);
        value.ok_or_else(|| malformed(self.file, format!("metadata {key} is missing")))
    }

    pub fn parsed<T: FromStr>(&self, key: &str, expected: &str, accept: impl Fn(&T) -> bool) -> Result<T> {
        let text = self.text(key)?;
        let wrong = || malformed(self.file, format!("metadata {key} is {text:?}, expected {expected}"));
        text.parse().ok().filter(accept).ok_or_else(wrong)
    }

    pub fn one_of(&self, key: &str, choices: &[&str]) -> Result<String> {
        self.parsed(key, &choices.join(" or "), |text: &String| choices.contains(&text.as_str()))
    }

    pub fn size(&self, key: &str, least: usize) -> Result<usize> {
        self.parsed(key, &format!("a whole number from {least}"), |&size| size >= least)
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.one_of(key, &["0", "1"])? == "1")
    }

    fn error(&self, key: &str) -> Result<f64> {
        self.parsed(key, "a finite number from 0, or NaN", |e: &f64| e.is_nan() || (e.is_finite() && *e >= 0.0))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
pub(super) mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::verify::cases::{self, Case};
    use crate::verify::oracle::{self, Cell, Recurrent, RecurrentInput, Weights};
    use safetensors::tensor::TensorView;

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

    pub fn fixture(name: &str) -> String {
        format!("{FIXTURES}/{name}.safetensors")
    }

    /// The largest difference, relative to the largest expected magnitude.
    fn error(given: &[f64], expected: &[f64]) -> f64 {
        assert_eq!(given.len(), expected.len());
        let largest = expected.iter().fold(0.0, |m: f64, e| m.max(e.abs()));
        let differences = given.iter().zip(expected).map(|(g, e)| (g - e).abs());
        // f64::max would drop a NaN.
        let worst = differences.fold(0.0, |worst, d| if d <= worst { worst } else { d });
        if worst == 0.0 { 0.0 } else { worst / largest }
    }

    /// Fails if `given` is not within 1e-12 of `expected`; keeps the worst error in `worst`.
    fn compare(what: &str, given: &[f64], expected: &CaseTensor, worst: &mut f64) {
        let e = error(given, &expected.values);
        assert!(e <= 1e-12, "{what}: off by {e:e}");
        *worst = worst.max(e);
    }

    fn weights(tensors: &Tensors, prefix: &str, layers: usize, directions: usize) -> Vec<Weights> {
        let slots = (0..layers).flat_map(|layer| (0..directions).map(move |direction| suffix(layer, direction)));
        let part = |kind: &str, suffix: &str| {
            tensors.get(&format!("{prefix}{kind}{suffix}")).map(|tensor| (kind.to_owned(), tensor.values.clone()))
        };
        let kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];
        slots.map(|suffix| kinds.iter().filter_map(|kind| part(kind, &suffix)).collect()).collect()
    }

    #[test]
    fn oracle_agrees_with_pytorch() {
        let mut worst = 0.0;
        let cases = cases::read_dir(format!("{FIXTURES}/cases")).unwrap();
        let names: Vec<&str> = cases.iter().map(|(name, _)| name.as_str()).collect();
        let expected =
            ["bidirectional", "layers", "nobias", "one", "plain", "ragged", "saturated"].map(|name| format!("lstm_{name}"));
        assert_eq!(names, expected);
        for (name, case) in cases {
            let Case::Torch(case) = case else { panic!("{name} is another kind of case") };
            case.supported().unwrap();
            let get = |name: &str| case.tensor(name).unwrap();
            let (layers, directions) = (case.layers, case.directions());
            let spec = Recurrent { layers, directions, bias: case.bias, ..Recurrent::new(Cell::LSTM, case.input, case.hidden) };
            let given = RecurrentInput {
                batch: case.batch,
                x: &get("x").values,
                state: &[&get("h0").values, &get("c0").values],
                lengths: case.lengths.as_deref(),
                dy: &get("dy").values,
                dstate: &[&get("dhn").values, &get("dcn").values],
                ..RecurrentInput::default()
            };
            let output = spec.forward_backward(&weights(case.tensors(), "param.", layers, directions), given);
            let mut check = |tensor: &str, given: &[f64]| compare(&format!("{name} {tensor}"), given, get(tensor), &mut worst);
            check("y", &output.y);
            check("hn", &output.state[0]);
            check("cn", &output.state[1]);
            check("grad.x", &output.dx);
            check("grad.h0", &output.dstate[0]);
            check("grad.c0", &output.dstate[1]);
            for (slot, w) in output.dweights.iter().enumerate() {
                let suffix = suffix(slot / directions, slot % directions);
                assert_eq!(w.len(), if case.bias { 4 } else { 2 });
                w.iter().for_each(|(kind, gradient)| check(&format!("grad.param.{kind}{suffix}"), gradient));
            }
        }
        println!("worst error against PyTorch {worst:e}");
    }

    /// A training file and the parameters of its model, in the order of their names.
    struct Trained {
        file: Tensors,
        names: Vec<String>,
        parameters: Vec<Vec<f64>>,
    }

    impl Trained {
        fn read(name: &str) -> Self {
            let file = read_tensors(fixture(name)).unwrap();
            let names: Vec<String> = file.keys().filter_map(|name| name.strip_prefix("final.")).map(str::to_owned).collect();
            let parameters = names.iter().map(|name| file[name].values.clone()).collect();
            Self { file, names, parameters }
        }

        fn named(&self) -> Tensors {
            let tensor = |v: &Vec<f64>| CaseTensor { dtype: Dtype::F64, shape: vec![v.len()], values: v.clone() };
            self.names.iter().cloned().zip(self.parameters.iter().map(tensor)).collect()
        }

        /// The part of the input `name` that belongs to `step`.
        fn batch(&self, name: &str, step: usize) -> &[f64] {
            let tensor = &self.file[name];
            let size: usize = tensor.shape[1..].iter().product();
            &tensor.values[step * size..][..size]
        }

        /// Checks loss and gradient norm of a step, and hands out the gradients in the order of the parameters.
        fn gradients(
            &self,
            step: usize,
            loss: f64,
            gradients: &BTreeMap<String, Vec<f64>>,
            worst: &mut f64,
        ) -> (Vec<Vec<f64>>, f64) {
            let gradients: Vec<Vec<f64>> = self.names.iter().map(|name| gradients[name].clone()).collect();
            let norm = oracle::global_norm(&gradients.iter().map(Vec::as_slice).collect::<Vec<_>>());
            for (what, given) in [("loss", loss), ("grad_norm", norm)] {
                let e = error(&[given], &self.file[what].values[step..=step]);
                assert!(e <= 1e-12, "{what} of step {step}: off by {e:e}");
                *worst = worst.max(e);
            }
            (gradients, norm)
        }

        fn check_final(&self, worst: &mut f64) {
            for (name, parameter) in self.names.iter().zip(&self.parameters) {
                compare(name, parameter, &self.file[&format!("final.{name}")], worst);
            }
        }
    }

    fn insert_weights(gradients: &mut BTreeMap<String, Vec<f64>>, prefix: &str, dweights: Vec<Weights>) {
        for (layer, w) in dweights.into_iter().enumerate() {
            gradients.extend(w.into_iter().map(|(kind, values)| (format!("{prefix}{kind}_l{layer}"), values)));
        }
    }

    #[test]
    fn oracle_trains_as_pytorch_with_adamw_and_clipping() {
        let (batch, vocabulary, width, hidden, layers) = (4, 11, 6, 8, 2);
        let mut model = Trained::read("torch_training");
        let adamw = oracle::AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let mut moments: Vec<[Vec<f64>; 2]> = model.parameters.iter().map(|p| [vec![0.0; p.len()], vec![0.0; p.len()]]).collect();
        let spec = Recurrent { layers, ..Recurrent::new(Cell::LSTM, width, hidden) };
        let (mut worst, mut clipped) = (0.0, 0);
        for step in 0..10 {
            let p = model.named();
            let whole = |name: &str| model.batch(name, step).iter().map(|&v| v as u32).collect::<Vec<_>>();
            let (ids, targets) = (whole("ids"), whole("targets"));
            let x = oracle::embedding(&ids, &p["0.weight"].values, width);
            let lstm = weights(&p, "1.", layers, 1);
            // Forward alone first: dy is not known yet.
            let run = |dy| spec.forward_backward(&lstm, RecurrentInput { batch, x: &x, dy, ..RecurrentInput::default() });
            let y = run(&[]).y;
            let logits = oracle::linear(&y, &p["2.weight"].values, Some(&p["2.bias"].values), hidden, vocabulary);
            let (loss, dlogits) = oracle::cross_entropy(&logits, vocabulary, &targets, Some(0));
            let linear = oracle::linear_backward(&y, &p["2.weight"].values, &dlogits, hidden, vocabulary);
            let back = run(&linear.dx);
            let mut gradients = BTreeMap::from([
                ("0.weight".to_owned(), oracle::embedding_backward(&ids, &back.dx, vocabulary, width)),
                ("2.weight".to_owned(), linear.dweight),
                ("2.bias".to_owned(), linear.dbias),
            ]);
            insert_weights(&mut gradients, "1.", back.dweights);
            let (gradients, norm) = model.gradients(step, loss, &gradients, &mut worst);
            let factor = oracle::clip_factor(norm, 1.0);
            clipped += usize::from(factor < 1.0);
            for ((parameter, gradient), [mean, square]) in model.parameters.iter_mut().zip(gradients).zip(&mut moments) {
                let gradient: Vec<f64> = gradient.iter().map(|g| g * factor).collect();
                adamw.step(parameter, &gradient, mean, square, step as i32 + 1);
            }
        }
        assert!(clipped > 0 && clipped < 10, "the fixture should clip some steps, but clips {clipped} of 10");
        model.check_final(&mut worst);
        println!("worst error against PyTorch {worst:e}, {clipped} of 10 steps clipped");
    }

    #[test]
    fn oracle_trains_as_pytorch_with_sgd_on_ragged_rows() {
        let (batch, input, hidden, outputs) = (5, 3, 7, 2);
        let mut model = Trained::read("torch_training_sgd");
        let sgd = oracle::Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.0 };
        let mut velocities: Vec<Vec<f64>> = model.parameters.iter().map(|p| vec![0.0; p.len()]).collect();
        let spec = Recurrent::new(Cell::LSTM, input, hidden);
        let zeros = vec![0.0; batch * hidden];
        let mut worst = 0.0;
        for step in 0..10 {
            let p = model.named();
            let lengths: Vec<usize> = model.batch("lengths", step).iter().map(|&v| v as usize).collect();
            let lstm = weights(&p, "0.", 1, 1);
            // The output at each row's last step is hn.
            let run = |dhn: &[f64]| {
                let (x, lengths, dstate) = (model.batch("x", step), Some(&lengths[..]), &[dhn, &zeros]);
                spec.forward_backward(&lstm, RecurrentInput { batch, x, lengths, dstate, ..RecurrentInput::default() })
            };
            let last = run(&zeros).state.swap_remove(0);
            let prediction = oracle::linear(&last, &p["1.weight"].values, Some(&p["1.bias"].values), hidden, outputs);
            let (loss, d) = oracle::mean_squared_error(&prediction, model.batch("targets", step), &vec![true; prediction.len()]);
            let linear = oracle::linear_backward(&last, &p["1.weight"].values, &d, hidden, outputs);
            let mut gradients = BTreeMap::from([("1.weight".to_owned(), linear.dweight), ("1.bias".to_owned(), linear.dbias)]);
            insert_weights(&mut gradients, "0.", run(&linear.dx).dweights);
            let (gradients, _) = model.gradients(step, loss, &gradients, &mut worst);
            for ((parameter, gradient), velocity) in model.parameters.iter_mut().zip(gradients).zip(&mut velocities) {
                sgd.step(parameter, &gradient, velocity);
            }
        }
        model.check_final(&mut worst);
        println!("worst error against PyTorch {worst:e}");
    }

    /// A fixture, taken apart so that a test can spoil it.
    pub struct Parts {
        pub meta: HashMap<String, String>,
        pub tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    }

    fn spoilt(spoil: impl FnOnce(&mut Parts)) -> Result<CaseFile> {
        CaseFile::parse("spoilt", &spoilt_bytes("cases/lstm_plain", spoil))
    }

    /// The bytes of a fixture after `spoil`.
    pub fn spoilt_bytes(name: &str, spoil: impl FnOnce(&mut Parts)) -> Vec<u8> {
        let bytes = std::fs::read(fixture(name)).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let owned =
            |(name, view): (&str, TensorView<'_>)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        let mut parts = Parts { meta: header.metadata().clone().unwrap(), tensors: file.iter().map(owned).collect() };
        spoil(&mut parts);
        let views = parts
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize(views, Some(parts.meta)).unwrap()
    }

    pub fn set(key: &str, value: &str) -> impl FnOnce(&mut Parts) {
        move |parts| {
            parts.meta.insert(key.to_owned(), value.to_owned());
        }
    }

    #[test]
    fn malformed_files_are_refused_by_name() {
        assert!(spoilt(|_| ()).is_ok());
        let refused = |case: Result<CaseFile>, text: &str| {
            let error = case.expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Format);
            assert!(error.to_string().starts_with("case_file.read: spoilt: ") && error.to_string().contains(text), "{error}");
        };
        refused(spoilt(|p| p.meta.clear()), "metadata cell is missing");
        refused(spoilt(set("cell", "transformer")), "metadata cell is \"transformer\", expected lstm or gru or rnn");
        refused(spoilt(set("batch_first", "1")), "metadata batch_first");
        refused(spoilt(set("T", "-7")), "metadata T is \"-7\", expected a whole number from 1");
        refused(spoilt(set("layers", "0")), "metadata layers is \"0\", expected a whole number from 1");
        refused(spoilt(set("float32_error_outputs", "inf")), "float32_error_outputs is \"inf\"");
        refused(spoilt(set("T", "8")), "tensor x is F32 [7, 3, 5], expected F32 [8, 3, 5]");
        refused(spoilt(set("layers", "18446744073709551615")), "tensor h0");
        refused(spoilt(set("proj", "2")), "tensor h0");
        refused(spoilt(set("ragged", "1")), "tensor lengths is missing");
        refused(spoilt(set("bias", "0")), "has 4 tensors that its options do not ask for");
        refused(spoilt(|p| drop(p.tensors.remove("grad.c0"))), "tensor grad.c0 is missing");
        let retyped = |p: &mut Parts| p.tensors.get_mut("y").unwrap().0 = Dtype::I64;
        refused(spoilt(retyped), "tensor y is I64 [7, 3, 6], expected F64 [7, 3, 6]");
        let nan = |p: &mut Parts| p.tensors.get_mut("x").unwrap().2[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
        refused(spoilt(nan), "tensor x holds NaN at 1");
        let lengths = |last: i64| {
            move |p: &mut Parts| {
                set("ragged", "1")(p);
                let data = [1, 7, last].iter().flat_map(|n: &i64| n.to_le_bytes()).collect();
                p.tensors.insert("lengths".to_owned(), (Dtype::I64, vec![3], data));
            }
        };
        assert_eq!(spoilt(lengths(2)).unwrap().lengths, Some(vec![1, 7, 2]));
        refused(spoilt(lengths(8)), "lengths holds 8, expected 1 to T = 7");
        refused(spoilt(lengths(-1)), "lengths holds -1");

        // Any prefix of a file, and any file with one byte changed in its header, gives an error or a case, never a panic.
        let bytes = std::fs::read(fixture("cases/lstm_one")).unwrap();
        for end in 0..bytes.len() {
            refused(CaseFile::parse("spoilt", &bytes[..end]), "not a safetensors file");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let _ = CaseFile::parse("spoilt", &changed);
        }
    }

    #[test]
    fn what_cannot_run_is_named() {
        let plain = spoilt(|_| ()).unwrap();
        assert_eq!(plain.supported(), Ok(()));
        assert_eq!(
            spoilt(set("float32_error_gradients", "nan")).unwrap().supported().unwrap_err(),
            "it overflows in float32, in PyTorch too"
        );
        let bounds = spoilt(set("float32_error_outputs", "1e-3")).unwrap();
        assert_eq!((bounds.output_bound(1e-4), bounds.output_bound(0.5)), (0.01, 0.5));
        assert_eq!(plain.parameter_names(), ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]);
    }

    #[test]
    fn foreign_files_and_folders_are_refused() {
        let foreign = CaseFile::read(fixture("torch_lstm_state_dict")).unwrap_err();
        assert!(foreign.to_string().contains("torch_lstm_state_dict.safetensors: metadata cell is missing"), "{foreign}");
        assert_eq!(CaseFile::read(fixture("absent")).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(cases::read_dir(fixture("absent")).unwrap_err().kind(), ErrorKind::Io);
        let mixed = cases::read_dir(FIXTURES).unwrap_err();
        assert!(mixed.to_string().contains("metadata cell is missing"), "{mixed}");
        let empty = cases::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap_err();
        assert!(empty.to_string().contains("no .safetensors file"), "{empty}");
    }
}
