//! What is refused, and in which words. Nothing here may panic, and nothing wrong may pass.

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use anyhow::{Context as _, Result};
use common::{adapters, devices};
use gatefold::ErrorKind::{Argument, DeviceLost, DeviceMismatch, Format, Io, Limit, NoDevice, Unsupported};
use gatefold::checkpoint::{self, Metadata};
use gatefold::nn::{
    CellState, Choice, Context, Decoding, Direction, Dropout, EmbeddingConfig, EncoderDecoderConfig, GruConfig, Input, LastState,
    LastStep, Layer, LinearConfig, LstmConfig, LstmState, MaxOverTime, MeanOverTime, Merge, MinGruConfig, Module, Output, Param,
    Reset, Residual, RnnConfig, SLstmConfig, Sequential, Skip, State, Stream, Tape, Value,
};
use gatefold::onnx::{Inputs, Kind, Operator};
use gatefold::optim::{AdamW, LossScale, Optimizer, Rule, Sgd};
use gatefold::{
    Batch, CrossEntropy, Device, ErrorKind, Ids, KernelOverride, Lengths, Loss, MaskKey, MeanSquaredError, ProductKernel, Rng,
    StepKernel, SweepKernel, Tensor, Trainer,
};
use safetensors::{Dtype, tensor::TensorView};

/// Calls and the errors that they must give; all that differ are reported at once.
struct Table {
    title: String,
    wrong: Vec<String>,
}

impl Table {
    fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), wrong: Vec::new() }
    }

    /// `text` is the whole message, or its beginning where it ends in `..`.
    fn row<T>(&mut self, call: impl FnOnce() -> gatefold::Result<T>, kind: ErrorKind, text: impl AsRef<str>) {
        let text = text.as_ref();
        let given = match catch_unwind(AssertUnwindSafe(call)) {
            Err(_) => "a panic".to_owned(),
            Ok(Ok(_)) => "no error".to_owned(),
            Ok(Err(error)) => {
                let message = error.to_string();
                let fits = text.strip_suffix("..").map_or(message == text, |start| message.starts_with(start));
                if fits && error.kind() == kind {
                    return;
                }
                format!("{error:?}")
            }
        };
        self.wrong.push(format!("expected {kind:?}: {text}\n   given {given}"));
    }

    fn finish(self) {
        assert!(self.wrong.is_empty(), "{}:\n{}", self.title, self.wrong.join("\n"));
    }
}

/// Runs a table on every device; the second device is another one, for mismatches.
fn everywhere(mut fill: impl FnMut(&mut Table, &Device, &Device) -> Result<()>) -> Result<()> {
    let devices = devices()?;
    for (index, device) in devices.iter().enumerate() {
        let mut table = Table::new(format!("{device:?}"));
        fill(&mut table, device, &devices[(index + 1) % devices.len()])?;
        table.finish();
    }
    Ok(())
}

fn zeros<const N: usize>(device: &Device, shape: [usize; N]) -> gatefold::Result<Tensor> {
    Tensor::zeros(device, shape)
}

const STALE: &str = "the tape does not fit: the parameters changed since it was recorded, or it is another layer's";
const NOTHING: &str = "nothing counts: every target is ignored or past its row's end";

#[test]
fn tensors() -> Result<()> {
    everywhere(|t, device, other| {
        let data = &[1.0; 5];
        t.row(
            || Tensor::from_slice(device, data, [2, 3]),
            Argument,
            "Tensor.from_slice: data has shape [5], expected 6 elements for shape [2, 3]",
        );
        t.row(
            || Tensor::from_slice(device, &[], [0, 3]),
            Argument,
            "Tensor.from_slice: shape is [0, 3], expected every size at least 1",
        );
        t.row(|| Tensor::zeros(device, [2, 0]), Argument, "Tensor.zeros: shape is [2, 0], expected every size at least 1");
        for shape in [[1 << 16, 1 << 16], [usize::MAX, 2], [usize::MAX, usize::MAX]] {
            let text = format!("shape is {shape:?}, expected at most 4278190335 elements");
            t.row(|| Tensor::zeros(device, shape), Argument, format!("Tensor.zeros: {text}"));
            t.row(|| Tensor::from_slice(device, data, shape), Argument, format!("Tensor.from_slice: {text}"));
            t.row(|| Tensor::zeros(device, [1])?.reshape(shape), Argument, format!("Tensor.reshape: {text}"));
        }
        let six = zeros(device, [2, 3])?;
        t.row(|| six.reshape([4]), Argument, "Tensor.reshape: shape is [4], expected 6 elements");
        t.row(|| six.reshape([0]), Argument, "Tensor.reshape: shape is [0], expected 6 elements");
        t.row(|| six.item(), Argument, "Tensor.item: tensor has shape [2, 3], expected one element");
        t.row(
            || Ids::from_slice(device, &[1], [2]),
            Argument,
            "Ids.from_slice: data has shape [1], expected 2 elements for shape [2]",
        );
        t.row(
            || Ids::from_slice(device, &[], [0, 4]),
            Argument,
            "Ids.from_slice: shape is [0, 4], expected every size at least 1",
        );
        t.row(|| Lengths::from_slice(device, &[]), Argument, "Lengths.from_slice: shape is [0], expected every size at least 1");
        let param = Param::new("weight", device, &[0.0; 4], [2, 2])?;
        t.row(|| param.set(&[0.0; 3]), Argument, "Param.set: weight has shape [3], expected [2, 2]");

        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        for shape in [vec![2], vec![3, 2], vec![1, 2, 3], vec![2, 1], vec![6]] {
            let operand = Tensor::zeros(device, shape.clone())?;
            let text = format!("other has shape {shape:?}, expected [2, 3] or its last dimensions");
            t.row(|| six.add(&operand), Argument, format!("Tensor.add: {text}"));
            t.row(|| six.mul(&operand), Argument, format!("Tensor.mul: {text}"));
        }
        let there = zeros(other, [2, 3])?;
        t.row(|| six.add(&there), DeviceMismatch, format!("Tensor.add: other {elsewhere}"));
        t.row(|| six.mul(&there), DeviceMismatch, format!("Tensor.mul: other {elsewhere}"));
        for shape in [vec![2], vec![4], vec![2, 3], vec![2, 2, 1]] {
            let gradient = Tensor::zeros(device, shape.clone())?;
            let text =
                format!("gradient has shape {shape:?}, expected [2, 2] (that of weight), or this behind further dimensions");
            t.row(|| param.accumulate(&gradient), Argument, format!("Param.accumulate: {text}"));
        }
        let there = zeros(other, [2, 2])?;
        t.row(|| param.accumulate(&there), DeviceMismatch, format!("Param.accumulate: gradient {elsewhere}"));
        let text =
            "Param.accumulate: gradient is the memory of weight, expected a tensor of its own (Tensor.to_device makes a copy)";
        t.row(|| param.accumulate(param.grad()), Argument, text);
        t.row(|| param.accumulate(param.value()), Argument, text);
        Ok(())
    })
}

#[test]
fn onnx_operators() -> Result<()> {
    const INIT: &str = "onnx.Operator.init:";
    everywhere(|t, device, other| {
        let fresh = |kind, gates: usize| {
            let mut operator = Operator::new(kind, 2, 3);
            (operator.w, operator.r) = (vec![0.0; gates * 3 * 2], vec![0.0; gates * 3 * 3]);
            operator
        };
        let mut row = |kind, gates, change: &dyn Fn(&mut Operator), text: &str| {
            let mut operator = fresh(kind, gates);
            change(&mut operator);
            t.row(|| operator.init(device), Argument, format!("{INIT} {text}"));
        };
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        row(Kind::Lstm, 3, &|_| (), "w has shape [18], expected 24 elements for shape [1, 12, 2]");
        row(Kind::Gru, 3, &|o| o.direction = Direction::Both, "w has shape [18], expected 36 elements for shape [2, 9, 2]");
        row(Kind::Gru, 3, &|o| o.r = vec![], "r has shape [0], expected 27 elements for shape [1, 9, 3]");
        row(Kind::Rnn, 1, &|o| o.b = Some(vec![0.0; 3]), "b has shape [3], expected 6 elements for shape [1, 6]");
        row(Kind::Lstm, 4, &|o| o.p = Some(vec![0.0; 3]), "p has shape [3], expected 9 elements for shape [1, 9]");
        row(Kind::Gru, 3, &|o| o.p = Some(vec![0.0; 9]), "p is given, expected none: Lstm has it, not Gru");
        row(Kind::Rnn, 1, &|o| o.input_forget = true, "input_forget is given, expected none: Lstm has it, not Rnn");
        row(
            Kind::Lstm,
            4,
            &|o| o.linear_before_reset = true,
            "linear_before_reset is given, expected none: Gru has it, not Lstm",
        );
        for clip in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            row(Kind::Rnn, 1, &|o| o.clip = Some(clip), &format!("clip is {clip}, expected a finite number above 0, or none"));
        }
        row(Kind::Gru, 3, &|o| o.activations = names(&["Tanh"]), "activations is [\"Tanh\"], expected 2 names");
        row(Kind::Rnn, 1, &|o| o.activations = names(&["Gelu"]), "activations is \"Gelu\", expected Sigmoid, Tanh, Relu, ..");
        let affine = |o: &mut Operator| {
            (o.activations, o.activation_alpha) = (names(&["Affine"]), vec![1.0]);
        };
        row(Kind::Rnn, 1, &affine, "activation_beta is used up, expected a number for Affine, which has no default");
        let many = |o: &mut Operator| {
            (o.activations, o.activation_alpha) = (names(&["Elu", "Tanh"]), vec![1.0, 2.0]);
        };
        let text = "activation_alpha is [1.0, 2.0], expected at most 1 numbers, which [\"Elu\", \"Tanh\"] take";
        row(Kind::Gru, 3, &many, text);
        let mut steep = fresh(Kind::Rnn, 1);
        (steep.activations, steep.activation_alpha) = (names(&["LeakyRelu"]), vec![-1.0]);
        t.row(|| steep.init(device), Argument, "rnn.init: activation is LeakyRelu { alpha: -1.0 }, expected alpha above 0");
        t.row(|| Operator::new(Kind::Rnn, 2, 0).init(device), Argument, "rnn.init: hidden is 0, expected at least 1");

        const FORWARD: &str = "onnx.Layer.forward:";
        for batch_first in [false, true] {
            let mut rnn = fresh(Kind::Rnn, 1);
            rnn.batch_first = batch_first;
            let rnn = rnn.init(device)?;
            let given = |shape: [usize; 3]| zeros(device, shape);
            let run = |x: &Tensor, inputs: Inputs<'_>| rnn.forward(x, inputs);
            let order = if batch_first { "batch, seq" } else { "seq, batch" };
            let none = Inputs::default();
            let flat = zeros(device, [5, 2])?;
            t.row(|| run(&flat, none), Argument, format!("{FORWARD} x has shape [5, 2], expected [{order}, 2]"));
            let wide = given([5, 4, 3])?;
            t.row(|| run(&wide, none), Argument, format!("{FORWARD} x has shape [5, 4, 3], expected [{order}, 2]"));
            t.row(|| run(&zeros(other, [5, 4, 2])?, none), DeviceMismatch, format!("{FORWARD} x is on .."));
            let x = given([5, 4, 2])?;
            let state = given([1, 1, 3])?;
            let expected =
                if batch_first { "[batch, directions, hidden] = [5, 1, 3]" } else { "[directions, batch, hidden] = [1, 4, 3]" };
            t.row(
                || run(&x, Inputs { initial_h: Some(&state), ..none }),
                Argument,
                format!("{FORWARD} initial_h has shape [1, 1, 3], expected {expected}"),
            );
            let cell = if batch_first { given([5, 1, 3])? } else { given([1, 4, 3])? };
            t.row(
                || run(&x, Inputs { initial_c: Some(&cell), ..none }),
                Argument,
                format!("{FORWARD} initial_c is given, expected none: only an LSTM has a cell state"),
            );
            let lengths = Lengths::from_slice(device, &[1, 2, 3])?;
            t.row(|| run(&x, Inputs { sequence_lens: Some(&lengths), ..none }), Argument, "rnn.forward: lengths ..");
        }
        Ok(())
    })
}

/// Passes everything on, and no gradient back.
struct NoGradient;

impl Module for NoGradient {
    fn params(&self) -> Vec<(String, &Param)> {
        Vec::new()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        Vec::new()
    }
}

impl Layer for NoGradient {
    fn kind(&self) -> &'static str {
        "no_gradient"
    }

    fn forward(&self, x: &Value, _: &Context<'_>) -> gatefold::Result<Output> {
        Ok(Output { y: x.numbers("no_gradient.forward")?.clone(), state: Vec::new() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> gatefold::Result<(Output, Tape)> {
        Ok((self.forward(x, context)?, Tape::new(())))
    }

    fn backward(&self, _: Tape, _: &Tensor, _: bool) -> gatefold::Result<Option<Tensor>> {
        Ok(None)
    }
}

#[test]
fn configurations() -> Result<()> {
    everywhere(|t, device, _| {
        let rng = &mut Rng::seed(0);
        let mut lstm = |t: &mut Table, config: LstmConfig, text: &str| {
            t.row(|| config.init(device, rng), Argument, text);
        };
        lstm(t, LstmConfig::new(0, 4), "lstm.init: input is 0, expected at least 1");
        lstm(t, LstmConfig::new(4, 0), "lstm.init: hidden is 0, expected at least 1");
        lstm(t, LstmConfig::new(4, 4).layers(0), "lstm.init: layers is 0, expected at least 1");
        for (p, given) in [(1.0, "1"), (-0.5, "-0.5"), (f32::NAN, "NaN")] {
            let text = format!("lstm.init: dropout is {given}, expected in [0, 1)");
            lstm(t, LstmConfig::new(4, 4).dropout(p), &text);
            let text = format!("dropout.new: p is {given}, expected in [0, 1)");
            t.row(|| Dropout::new(p), Argument, text);
        }
        let text = "lstm.init: dropout is 0.5, expected 0 for a single layer: it acts between layers";
        lstm(t, LstmConfig::new(4, 4).dropout(0.5), text);
        let text = "lstm.init: forget_bias is NaN, expected a finite number";
        lstm(t, LstmConfig::new(4, 4).forget_bias(f32::NAN), text);
        let text = "lstm.init: forget_bias is given, expected biases, which bias(false) removed";
        lstm(t, LstmConfig::new(4, 4).bias(false).forget_bias(1.0), text);
        let rng = &mut Rng::seed(0);
        let undefined = "layer_norm, which is defined for an LSTM, and for a GRU with Reset::AfterProduct";
        t.row(|| RnnConfig::new(4, 4).layer_norm(true).init(device, rng), Unsupported, format!("rnn.init: {undefined}"));
        let before = GruConfig::new(4, 4).layer_norm(true).reset(Reset::BeforeProduct);
        t.row(|| before.init(device, rng), Unsupported, format!("gru.init: {undefined}"));
        let normalized = || LstmConfig::new(4, 4).layer_norm(true);
        let text = "lstm.init: zoneout with layer_norm of a cell state";
        t.row(|| normalized().zoneout(0.1, 0.0).init(device, rng), Unsupported, text);
        let text = "lstm.init: gradient_clip with layer_norm of a cell state";
        t.row(|| normalized().gradient_clip(1.0).init(device, rng), Unsupported, text);
        for (p, given) in [(1.0, "1"), (-0.5, "-0.5"), (f32::NAN, "NaN")] {
            let text = format!("lstm.init: recurrent_dropout is {given}, expected in [0, 1)");
            lstm(t, LstmConfig::new(4, 4).recurrent_dropout(p), &text);
        }
        lstm(t, LstmConfig::new(4, 4).projection(0), "lstm.init: projection is 0, expected at least 1");
        lstm(t, LstmConfig::new(4, 4).zoneout(0.0, 1.5), "lstm.init: zoneout is 1.5, expected in [0, 1)");
        lstm(t, LstmConfig::new(4, 4).weight_dropout(-1.0), "lstm.init: weight_dropout is -1, expected in [0, 1)");
        let text = "lstm.init: gradient_clip is NaN, expected a finite number of at least 0 (0: none)";
        lstm(t, LstmConfig::new(4, 4).gradient_clip(f32::NAN), text);
        let text = "lstm.init: cell_clip is -1, expected a finite number of at least 0 (0: none)";
        lstm(t, LstmConfig::new(4, 4).cell_clip(-1.0), text);
        let text = "lstm.init: merge is Sum with Direction::Forward, expected Direction::Both, whose two outputs it makes one";
        lstm(t, LstmConfig::new(4, 4).merge(Merge::Sum), text);
        let text = "lstm.init: residual is an input of 3, expected an input as wide as the output, 4, or more layers";
        lstm(t, LstmConfig::new(3, 4).residual(true), text);
        let rng = &mut Rng::seed(0);
        let text = "lstm.init: forget_bias with coupled(true), where f = 1 - i has no bias of its own";
        t.row(|| LstmConfig::new(4, 4).coupled(true).forget_bias(1.0).init(device, rng), Unsupported, text);
        let text = "gru.init: zoneout of other states than h: this cell has none";
        t.row(|| GruConfig::new(4, 4).zoneout(0.1, 0.1).init(device, rng), Unsupported, text);
        let text = "slstm.init: zoneout of c, n and m, which share one scale: hold h alone";
        t.row(|| SLstmConfig::new(4, 4).zoneout(0.1, 0.1).init(device, rng), Unsupported, text);
        let text = "min_gru.init: weight_dropout acts on the recurrent product, and this cell has none";
        t.row(|| MinGruConfig::new(4, 4).weight_dropout(0.5).init(device, rng), Unsupported, text);
        let (x, targets) = (Tensor::zeros(device, [4, 4, 2])?, Tensor::zeros(device, [4, 4, 2])?);
        let taught = || Input::new().teacher(&targets, 1.0);
        let jordan = || RnnConfig::new(2, 8).jordan(2);
        let around = jordan().residual(true).init(device, rng)?;
        let text = "rnn.forward: a teacher with residual(true), where the output is not what recurs";
        t.row(|| around.forward(&x, taught()), Unsupported, text);
        let first = jordan().batch_first(true).init(device, rng)?;
        let text = "rnn.forward: a teacher with batch_first(true): its targets are time-major";
        t.row(|| first.forward(&x, taught()), Unsupported, text);
        let text = "rnn.bptt_memory: bytes is 1000, expected at least..";
        let deep = RnnConfig::new(2, 8).init(device, rng)?;
        t.row(|| deep.bptt_memory(1000).plan(4000, 4), Argument, text);
        let both = RnnConfig::new(2, 8).direction(Direction::Both).init(device, rng)?;
        let text =
            "rnn.bptt_memory: segments need Direction::Forward: a reverse pass starts at the end, which needs the whole sequence";
        t.row(|| both.bptt_memory(1 << 30).plan(4000, 4), Unsupported, text);
        // Refused before a number is drawn.
        let mut lstm = |t: &mut Table, config: LstmConfig, text: &str| {
            t.row(|| config.init(device, rng), Argument, text);
        };
        for (input, hidden) in [(usize::MAX, 4), (4, usize::MAX), (1 << 40, 1 << 40)] {
            let shape = [hidden.saturating_mul(4), input];
            let text = format!("Tensor.zeros: shape is {shape:?}, expected at most 4278190335 elements");
            lstm(t, LstmConfig::new(input, hidden), &text);
        }
        let both = GruConfig::new(4, 4).reset(Reset::BeforeProduct).recurrent_dropout(0.5);
        let text =
            "gru.init: recurrent_dropout with Reset::BeforeProduct: whether the mask acts before or after the reset gate ..";
        t.row(|| both.init(device, &mut Rng::seed(0)), Unsupported, text);
        for (vocabulary, width, name) in [(0, 4, "vocabulary"), (4, 0, "width")] {
            let text = format!("embedding.init: {name} is 0, expected at least 1");
            t.row(|| EmbeddingConfig::new(vocabulary, width).init(device, &mut Rng::seed(0)), Argument, text);
        }
        let text = "embedding.init: padding is 5, expected an id below 5";
        t.row(|| EmbeddingConfig::new(5, 2).padding(5).init(device, &mut Rng::seed(0)), Argument, text);
        let text = "Tensor.zeros: shape is [4294967296, 1099511627776], expected at most 4278190335 elements";
        t.row(|| EmbeddingConfig::new(1 << 32, 1 << 40).init(device, &mut Rng::seed(0)), Argument, text);
        t.row(|| LinearConfig::new(1 << 40, 1 << 32).init(device, &mut Rng::seed(0)), Argument, text);
        for (input, output, name) in [(0, 4, "input"), (4, 0, "output")] {
            let text = format!("linear.init: {name} is 0, expected at least 1");
            t.row(|| LinearConfig::new(input, output).init(device, &mut Rng::seed(0)), Argument, text);
        }
        Ok(())
    })
}

#[test]
fn recurrent_layers() -> Result<()> {
    everywhere(|t, device, other| {
        let rng = &mut Rng::seed(0);
        let lstm = LstmConfig::new(3, 4).layers(2).init(device, rng)?;
        let x = zeros(device, [5, 2, 3])?;
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        for shape in [vec![5, 2, 4], vec![2, 3], vec![3], vec![], vec![1, 5, 2, 3]] {
            let x = Tensor::zeros(device, shape.clone())?;
            let text = format!("x has shape {shape:?}, expected [seq, batch, 3]");
            t.row(|| lstm.forward(&x, None), Argument, format!("lstm.forward: {text}"));
            t.row(|| lstm.forward_train(&x, None), Argument, format!("lstm.forward_train: {text}"));
        }
        t.row(|| lstm.forward(&zeros(other, [5, 2, 3])?, None), DeviceMismatch, format!("lstm.forward: x {elsewhere}"));
        let first = LstmConfig::new(3, 4).batch_first(true).init(device, rng)?;
        let text = "lstm.forward: x has shape [5, 2, 4], expected [batch, seq, 3]";
        t.row(|| first.forward(&zeros(device, [5, 2, 4])?, None), Argument, text);

        for (lengths, text) in [
            (&[1][..], "lstm.forward: lengths has shape [1], expected [batch] = [2]"),
            (&[1, 2, 3], "lstm.forward: lengths has shape [3], expected [batch] = [2]"),
            (&[2, 6], "lstm.forward: lengths[1] is 6, expected at most the 5 steps of the batch"),
            (&[u32::MAX, 0], "lstm.forward: lengths[0] is 4294967295, expected at most the 5 steps of the batch"),
        ] {
            let lengths = Lengths::from_slice(device, lengths)?;
            t.row(|| lstm.forward(&x, Input::new().lengths(&lengths)), Argument, text);
        }
        let lengths = Lengths::from_slice(other, &[1, 2])?;
        let text = format!("lstm.forward: lengths {elsewhere}");
        t.row(|| lstm.forward(&x, Input::new().lengths(&lengths)), DeviceMismatch, text);

        let good = zeros(device, [2, 2, 4])?;
        let expected = "expected [layers * directions, batch, hidden] = [2, 2, 4]";
        for shape in [vec![1, 2, 4], vec![2, 3, 4], vec![16], vec![2, 2, 5]] {
            let bad = Tensor::zeros(device, shape.clone())?;
            let state = LstmState { h: bad.clone(), c: good.clone() };
            t.row(|| lstm.forward(&x, &state), Argument, format!("lstm.forward: state.h has shape {shape:?}, {expected}"));
            let state = LstmState { h: good.clone(), c: bad };
            t.row(|| lstm.forward(&x, &state), Argument, format!("lstm.forward: state.c has shape {shape:?}, {expected}"));
        }
        let state = LstmState { h: good.clone(), c: zeros(other, [2, 2, 4])? };
        t.row(|| lstm.forward(&x, &state), DeviceMismatch, format!("lstm.forward: state.c {elsewhere}"));
        let one = Context { state: std::slice::from_ref(&good), ..Context::default() };
        let text = "lstm.forward: state is 1 tensors, expected [\"h\", \"c\"]";
        t.row(|| Layer::forward(&lstm, &Value::from(&x), &one), Argument, text);

        let text = "lstm.step: streaming needs Direction::Forward; the reverse pass needs the whole sequence";
        for direction in [Direction::Both, Direction::Reverse] {
            let lstm = LstmConfig::new(3, 4).direction(direction).init(device, rng)?;
            t.row(|| lstm.step(&zeros(device, [2, 3])?, None), Unsupported, text);
        }
        for shape in [vec![5, 2, 3], vec![2, 4], vec![3]] {
            let x = Tensor::zeros(device, shape.clone())?;
            t.row(|| lstm.step(&x, None), Argument, format!("lstm.step: x has shape {shape:?}, expected [batch, 3]"));
        }

        let dropping = LstmConfig::new(3, 4).layers(2).dropout(0.5).init(device, rng)?;
        let text = "lstm.forward_train: key is not given, expected a MaskKey, which dropout 0.5 needs";
        t.row(|| dropping.forward_train(&x, None), Argument, text);
        let dropping = GruConfig::new(3, 4).recurrent_dropout(0.5).init(device, rng)?;
        let text = "gru.forward_train: key is not given, expected a MaskKey, which recurrent_dropout 0.5 needs";
        t.row(|| dropping.forward_train(&x, None), Argument, text);

        let tape = || lstm.forward_train(&x, None).map(|(.., tape)| tape);
        let dy = zeros(device, [5, 2, 4])?;
        let text = "lstm.backward: dy has shape [5, 2, 3], expected [seq, batch, output] = [5, 2, 4]";
        t.row(|| lstm.backward(tape()?, &x, None), Argument, text);
        let text = format!("lstm.backward: dy {elsewhere}");
        t.row(|| lstm.backward(tape()?, &zeros(other, [5, 2, 4])?, None), DeviceMismatch, text);
        let dstate = LstmState { h: good.clone(), c: dy.clone() };
        let text = format!("lstm.backward: dstate.c has shape [5, 2, 4], {expected}");
        t.row(|| lstm.backward(tape()?, &dy, Some(&dstate)), Argument, text);
        let dy_first = zeros(device, [5, 2, 4])?;
        let text = "lstm.backward: dy has shape [5, 2, 4], expected [batch, seq, output] = [2, 5, 4]";
        let x_first = zeros(device, [2, 5, 3])?;
        t.row(|| first.backward(first.forward_train(&x_first, None)?.2, &dy_first, None), Argument, text);

        // Memory that a kernel writes, or binds in another way: refused, not deadlocked.
        let own = lstm.params()[0].1.value().reshape([16, 3])?;
        let dy_own = LstmConfig::new(4, 4).init(device, rng)?;
        let (_, _, own_tape) = dy_own.forward_train(&zeros(device, [4, 4, 4])?, None)?;
        let text = "is the memory of weight_ih_l0, expected a tensor of its own (Tensor.to_device makes a copy)";
        let alias = dy_own.params()[0].1.grad().reshape([4, 4, 4])?;
        t.row(|| dy_own.backward(own_tape, &alias, None), Argument, format!("lstm.backward: dy {text}"));
        let alias = own.reshape([4, 4, 3])?;
        t.row(|| lstm.forward_train(&alias, None), Argument, format!("lstm.forward_train: x {text}"));

        // Tapes that do not belong: of a twin, of a narrower layer, of this one before its parameters changed.
        let twin = LstmConfig::new(3, 4).layers(2).init(device, rng)?;
        t.row(|| twin.backward(tape()?, &dy, None), Argument, format!("lstm.backward: {STALE}"));
        let wide = LstmConfig::new(3, 64).layers(2).init(device, rng)?;
        let dy_wide = zeros(device, [5, 2, 64])?;
        t.row(|| wide.backward(tape()?, &dy_wide, None), Argument, format!("lstm.backward: {STALE}"));
        let old = tape()?;
        let (_, param) = &lstm.params()[3];
        param.set(&[0.5; 16])?;
        t.row(|| lstm.backward(old, &dy, None), Argument, format!("lstm.backward: {STALE}"));

        // Questions about a tape.
        let text = "tape is of another layer, expected the tape of this layer's forward_train";
        t.row(|| twin.inspect(&tape()?, 0, Direction::Forward), Argument, format!("lstm.inspect: {text}"));
        t.row(|| twin.first_non_finite(&tape()?), Argument, format!("lstm.first_non_finite: {text}"));
        let text = "lstm.inspect: layer is 2, expected below the 2 layers that there are";
        t.row(|| lstm.inspect(&tape()?, 2, Direction::Forward), Argument, text);
        for direction in [Direction::Reverse, Direction::Both] {
            let text = format!("lstm.inspect: direction is {direction:?}, expected Forward");
            t.row(|| lstm.inspect(&tape()?, 0, direction), Argument, text);
        }
        let both = LstmConfig::new(3, 4).direction(Direction::Both).init(device, rng)?;
        let text = "lstm.inspect: direction is Both, expected Forward or Reverse";
        t.row(|| both.inspect(&both.forward_train(&x, None)?.2, 0, Direction::Both), Argument, text);
        let text = "lstm.backward_with_flow: dy has shape [5, 2, 3], expected [seq, batch, output] = [5, 2, 4]";
        t.row(|| lstm.backward_with_flow(tape()?, &x, None), Argument, text);
        t.row(|| twin.backward_with_flow(tape()?, &dy, None), Argument, format!("lstm.backward_with_flow: {STALE}"));
        let normalized = LstmConfig::new(3, 4).layer_norm(true).init(device, rng)?;
        let text = "lstm.backward_with_flow: layer_norm of a cell state";
        t.row(|| normalized.backward_with_flow(normalized.forward_train(&x, None)?.2, &dy, None), Unsupported, text);
        t.row(
            || Layer::backward(&lstm, Tape::new(()), &dy, true),
            Argument,
            "lstm.backward: tape is of another layer, expected the tape of this layer's forward_train",
        );
        Ok(())
    })
}

#[test]
fn other_layers() -> Result<()> {
    everywhere(|t, device, other| {
        let rng = &mut Rng::seed(0);
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        let mut linear = LinearConfig::new(3, 2).init(device, rng)?;
        for shape in [vec![5, 4], vec![], vec![2]] {
            let x = Tensor::zeros(device, shape.clone())?;
            t.row(|| linear.forward(&x), Argument, format!("linear.forward: x has shape {shape:?}, expected [.., 3]"));
        }
        let (x, dy) = (zeros(device, [5, 3])?, zeros(device, [5, 2])?);
        let (x_there, dy_there) = (zeros(other, [5, 3])?, zeros(other, [5, 2])?);
        t.row(|| linear.forward(&x_there), DeviceMismatch, format!("linear.forward: x {elsewhere}"));
        t.row(|| linear.backward(&x_there, &dy, true), DeviceMismatch, format!("linear.backward: x {elsewhere}"));
        t.row(|| linear.backward(&x, &dy_there, true), DeviceMismatch, format!("linear.backward: dy {elsewhere}"));
        t.row(|| linear.backward(&dy, &dy, true), Argument, "linear.backward: x has shape [5, 2], expected [.., 3]");
        let text = "linear.backward: dy has shape [5, 3], expected [.., output] = [5, 2]";
        t.row(|| linear.backward(&x, &x, true), Argument, text);
        let ids = Ids::from_slice(device, &[0, 4], [2, 1])?;
        let text = "linear.forward: x is token ids, expected numbers [.., features] (an Embedding makes them)";
        t.row(|| Layer::forward(&linear, &Value::from(&ids), &Context::default()), Argument, text);
        let text = "linear.backward: tape is of another layer, expected the tape of this layer's forward_train";
        t.row(|| Layer::backward(&linear, Tape::new(7u8), &dy, true), Argument, text);
        let (_, old) = linear.forward_train(&Value::from(&x), &Context::default())?;
        Optimizer::new(Sgd::new(0.1), linear.params_mut())?.step()?;
        t.row(|| Layer::backward(&linear, old, &dy, true), Argument, format!("linear.backward: {STALE}"));

        let embedding = EmbeddingConfig::new(5, 4).init(device, rng)?;
        let beyond = Ids::from_slice(device, &[5, 1], [2, 1])?;
        let text = "embedding.forward: ids has id 5, expected ids below 5 (the vocabulary)";
        t.row(|| embedding.forward(&beyond), Argument, text);
        let ids_there = Ids::from_slice(other, &[0, 4], [2, 1])?;
        t.row(|| embedding.forward(&ids_there), DeviceMismatch, format!("embedding.forward: ids {elsewhere}"));
        let dy = zeros(device, [2, 1, 4])?;
        let text = "embedding.backward: ids has id 5, expected ids below 5 (the vocabulary)";
        t.row(|| embedding.backward(&beyond, &dy), Argument, text);
        t.row(|| embedding.backward(&ids_there, &dy), DeviceMismatch, format!("embedding.backward: ids {elsewhere}"));
        let dy_there = zeros(other, [2, 1, 4])?;
        t.row(|| embedding.backward(&ids, &dy_there), DeviceMismatch, format!("embedding.backward: dy {elsewhere}"));
        let text = "embedding.backward: dy has shape [2, 4], expected [seq, batch, width] = [2, 1, 4]";
        t.row(|| embedding.backward(&ids, &zeros(device, [2, 4])?), Argument, text);
        let text = "embedding.forward: x is numbers, expected token ids [seq, batch]";
        t.row(|| Layer::forward(&embedding, &Value::from(&dy), &Context::default()), Argument, text);

        let dropout = Dropout::new(0.5)?;
        let text = "dropout.forward_train: key is not given, expected a MaskKey";
        t.row(|| dropout.forward_train(&Value::from(&x), &Context::default()), Argument, text);
        let keyed = Context { key: Some(MaskKey::new(0, 0)), ..Context::default() };
        let line = Value::from(zeros(device, [3])?);
        let text = "dropout.forward_train: x has shape [3], expected [.., batch, features]";
        t.row(|| dropout.forward_train(&line, &keyed), Argument, text);

        let text = "last_step.forward: x has shape [5, 3], expected [seq, batch, features]";
        t.row(|| LastStep.forward(&Value::from(&x), &Context::default()), Argument, text);
        let lengths = Lengths::from_slice(device, &[3])?;
        let ragged = Context { lengths: Some(&lengths), ..Context::default() };
        let text = "last_step.forward: lengths[0] is 3, expected at most the 2 steps of the batch";
        t.row(|| LastStep.forward(&Value::from(&dy), &ragged), Argument, text);
        let tape = || LastStep.forward_train(&Value::from(&dy), &Context::default()).map(|(_, tape)| tape);
        let text = "last_step.backward: dy has shape [2, 1, 4], expected [batch, features] = [1, 4]";
        t.row(|| LastStep.backward(tape()?, &dy, true), Argument, text);
        let text = format!("last_step.backward: dy {elsewhere}");
        t.row(|| LastStep.backward(tape()?, &zeros(other, [1, 4])?, true), DeviceMismatch, text);

        let pools: [&dyn Layer; 3] = [&MeanOverTime, &MaxOverTime, &LastState::new(Direction::Both)];
        let there = Lengths::from_slice(other, &[1])?;
        let elsewhere_ragged = Context { lengths: Some(&there), ..Context::default() };
        for layer in pools {
            let (kind, none) = (layer.kind(), Context::default());
            let text = format!("{kind}.forward: x has shape [5, 3], expected [seq, batch, features]");
            t.row(|| layer.forward(&Value::from(&x), &none), Argument, text);
            let text = format!("{kind}.forward: x is token ids, expected numbers [.., features] (an Embedding makes them)");
            t.row(|| layer.forward(&Value::from(&ids), &none), Argument, text);
            let text = format!("{kind}.forward: lengths[0] is 3, expected at most the 2 steps of the batch");
            t.row(|| layer.forward_train(&Value::from(&dy), &ragged), Argument, text);
            let text = format!("{kind}.forward: lengths {elsewhere}");
            t.row(|| layer.forward_train(&Value::from(&dy), &elsewhere_ragged), DeviceMismatch, text);
            let tape = || layer.forward_train(&Value::from(&dy), &none).map(|(_, tape)| tape);
            let text = format!("{kind}.backward: dy has shape [2, 1, 4], expected [batch, features] = [1, 4]");
            t.row(|| layer.backward(tape()?, &dy, true), Argument, text);
            let text = format!("{kind}.backward: dy {elsewhere}");
            t.row(|| layer.backward(tape()?, &zeros(other, [1, 4])?, true), DeviceMismatch, text);
            let text = "last_step.backward: tape is of another layer, expected the tape of this layer's forward_train";
            t.row(|| LastStep.backward(tape()?, &zeros(device, [1, 4])?, true), Argument, text);
            let text = format!("{kind}.step: this layer cannot stream: it has no single step");
            t.row(|| layer.step(&Value::from(&x), &none), Unsupported, text);
        }
        let text = "last_state.forward: x has shape [2, 1, 3], expected [seq, batch, 2 * hidden]";
        let odd = Value::from(zeros(device, [2, 1, 3])?);
        t.row(|| LastState::new(Direction::Both).forward(&odd, &Context::default()), Argument, text);
        Ok(())
    })
}

#[test]
fn layers_around_layers() -> Result<()> {
    everywhere(|t, device, other| {
        let rng = &mut Rng::seed(0);
        let none = Context::default();
        let (x, there) = (zeros(device, [2, 1, 3])?, zeros(other, [2, 1, 3])?);
        let ids = Value::from(Ids::from_slice(device, &[0, 4], [2, 1])?);
        let mut linear = |to: usize| LinearConfig::new(3, to).init(device, rng);
        let (narrow, same) = (Residual::new(linear(2)?), Residual::new(linear(3)?));
        let (skip, shorter) = (Skip::new(linear(2)?), Skip::new(LastStep));
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());

        let text = "f(x) has shape [2, 1, 2], expected the shape of x = [2, 1, 3]";
        t.row(|| narrow.forward(&Value::from(&x), &none), Argument, format!("residual.forward: {text}"));
        t.row(|| narrow.forward_train(&Value::from(&x), &none), Argument, format!("residual.forward_train: {text}"));
        t.row(|| narrow.step(&Value::from(&x), &none), Argument, format!("residual.step: {text}"));
        let text = "f(x) has shape [1, 3], expected the shape of x [2, 1, 3] up to the last size";
        t.row(|| shorter.forward(&Value::from(&x), &none), Argument, format!("skip.forward: {text}"));
        t.row(|| shorter.forward_train(&Value::from(&x), &none), Argument, format!("skip.forward_train: {text}"));
        let layers: [&dyn Layer; 2] = [&same, &skip];
        for layer in layers {
            let kind = layer.kind();
            let text = "x is token ids, expected numbers [.., features] (an Embedding makes them)";
            t.row(|| layer.forward(&ids, &none), Argument, format!("{kind}.forward: {text}"));
            t.row(|| layer.forward_train(&ids, &none), Argument, format!("{kind}.forward_train: {text}"));
            t.row(|| layer.step(&ids, &none), Argument, format!("{kind}.step: {text}"));
            t.row(|| layer.forward(&Value::from(&there), &none), DeviceMismatch, format!("linear.forward: x {elsewhere}"));
            let text = format!("{kind}.backward: tape is of another layer, expected the tape of this layer's forward_train");
            t.row(|| layer.backward(Tape::new(()), &x, true), Argument, text);
            let tape = || layer.forward_train(&Value::from(&x), &none).map(|(_, tape)| tape);
            let text = format!("{kind}.backward: dy has shape [1, 3], expected ..");
            t.row(|| layer.backward(tape()?, &zeros(device, [1, 3])?, true), Argument, text);
        }
        let dy_there = zeros(other, [2, 1, 5])?;
        let text = format!("linear.backward: dy {elsewhere}");
        t.row(|| same.backward(same.forward_train(&Value::from(&x), &none)?.1, &there, true), DeviceMismatch, &text);
        t.row(|| skip.backward(skip.forward_train(&Value::from(&x), &none)?.1, &dy_there, true), DeviceMismatch, &text);
        let text = "the layer inside (no_gradient) gives no gradient of x";
        let stuck: [(&dyn Layer, _); 2] = [(&Residual::new(NoGradient), 3), (&Skip::new(NoGradient), 6)];
        for (layer, width) in stuck {
            let back = || layer.backward(layer.forward_train(&Value::from(&x), &none)?.1, &zeros(device, [2, 1, width])?, true);
            t.row(back, Unsupported, format!("{}.backward: {text}", layer.kind()));
        }
        Ok(())
    })
}

#[test]
fn layers_in_a_row() -> Result<()> {
    everywhere(|t, device, _| {
        let rng = &mut Rng::seed(0);
        let key = MaskKey::new(0, 0);
        let ids = Ids::from_slice(device, &[0, 4], [2, 1])?;
        let x = zeros(device, [2, 1, 3])?;
        t.row(|| Sequential::new().forward(&ids, None), Unsupported, "sequential.forward: there are no layers");
        let turned = Sequential::new().push(LstmConfig::new(3, 3).batch_first(true).init(device, rng)?);
        let text = "lstm.forward: batch_first(true) has no place among other layers, which are time-major; give the model [seq, batch, ..]";
        t.row(|| turned.forward(&zeros(device, [2, 2, 3])?, None), Unsupported, text);
        let text = "Optimizer.new: params is empty, expected at least one parameter";
        t.row(|| Trainer::new(Sequential::new(), MeanSquaredError, Sgd::new(0.1)), Argument, text);

        let late = Sequential::new()
            .push(LinearConfig::new(3, 3).init(device, rng)?)
            .push(EmbeddingConfig::new(5, 3).init(device, rng)?);
        let text = "x is numbers, expected token ids [seq, batch]";
        t.row(|| late.forward(&x, None), Argument, format!("embedding.forward: {text}"));
        t.row(|| late.forward_train(&x, Input::new().key(key)), Argument, format!("embedding.forward_train: {text}"));

        // Only a layer that gives no dx although it is not the first one gets this far.
        let stuck = Sequential::new().push(LinearConfig::new(3, 3).init(device, rng)?).push(NoGradient);
        let text = "sequential.backward: layer 1 (no_gradient) takes ids and must be the first";
        t.row(
            || {
                let (y, _, tape) = stuck.forward_train(&x, None)?;
                stuck.backward(tape, &y)
            },
            Unsupported,
            text,
        );

        let linear_last =
            Sequential::new().push(LstmConfig::new(3, 3).init(device, rng)?).push(LinearConfig::new(3, 3).init(device, rng)?);
        let linear_first =
            Sequential::new().push(LinearConfig::new(3, 3).init(device, rng)?).push(LstmConfig::new(3, 3).init(device, rng)?);
        let single = Sequential::new().push(LstmConfig::new(3, 3).init(device, rng)?);
        let (_, state) = linear_last.forward(&x, None)?;
        let text = "sequential.forward: state is of 2 layers, expected 1";
        t.row(|| single.forward(&x, &state), Argument, text);
        let text = "sequential.forward: state of layer 0 (linear) is 2 tensors, expected 0 tensors";
        t.row(|| linear_first.forward(&x, &state), Argument, text);
        let (y, _, tape) = single.forward_train(&x, Input::new().key(key))?;
        t.row(|| linear_last.backward(tape, &y), Argument, "sequential.backward: tape is of 1 layers, expected 2");
        let (y, _, tape) = linear_last.forward_train(&x, Input::new().key(key))?;
        let text = "lstm.backward: tape is of another layer, expected the tape of this layer's forward_train";
        t.row(|| linear_first.backward(tape, &y), Argument, text);

        let taught = Sequential::new().push(RnnConfig::new(3, 4).jordan(3).init(device, rng)?);
        let text = "recurrence through the output only, one layer, and time read forward (RnnConfig::jordan)";
        for (model, kind) in [(&single, "lstm"), (&linear_last, "linear")] {
            let text = format!("sequential.forward: the last layer ({kind}) cannot use a teacher, which needs {text}");
            t.row(|| model.forward(&x, Input::new().teacher(&x, 1.0)), Unsupported, text);
        }
        let text = "rnn.forward: key is not given, expected a MaskKey, which a teacher of probability 0.5 needs";
        let trainer = Trainer::new(taught, MeanSquaredError, Sgd::new(0.1))?;
        t.row(|| trainer.evaluate(&Batch::new(&x, &x).teacher(0.5)), Argument, text);
        let text = "Batch.teacher: target is ids, expected numbers, to stand in for the model's outputs";
        t.row(|| trainer.evaluate(&Batch::new(&x, &ids).teacher(1.0)), Argument, text);

        // A row inside another one.
        let text = "sequential.forward: state is 2 tensors, expected 0 tensors";
        let inner = Sequential::new().push(LinearConfig::new(3, 3).init(device, rng)?);
        let outer = Sequential::new().push(Residual::new(inner));
        let two = State::new(vec![vec![x.clone(), x.clone()]]);
        t.row(|| outer.forward(&x, &two), Argument, text);
        t.row(|| outer.forward_train(&x, &two), Argument, text);
        t.row(|| outer.step(&x, &two), Argument, "sequential.step: state is 2 tensors, expected 0 tensors");
        t.row(|| outer.step(&x, &State::new(Vec::new())), Argument, "sequential.step: state is of 0 layers, expected 1");
        let pooled = Sequential::new().push(Dropout::new(0.5)?).push(Skip::new(LastStep));
        let text = "last_step.step: this layer cannot stream: it has no single step";
        t.row(|| pooled.step(&zeros(device, [1, 3])?, None), Unsupported, text);

        let named = |names: [&str; 2]| -> gatefold::Result<Sequential> {
            let first = Sequential::new().push(Dropout::new(0.5)?).push_named(names[0], LastStep)?;
            first.push_named(names[1], LastStep)
        };
        assert!(named(["encoder", "head"]).is_ok());
        let text = "sequential.push_named: name is \"encoder\", expected a name that no other layer has";
        t.row(|| named(["encoder", "encoder"]), Argument, text);
        t.row(|| named(["0", "head"]), Argument, "sequential.push_named: name is \"0\", expected a name that no other layer has");
        for name in ["", "7", "a.b"] {
            let text = "a name without dots, not empty, not a number";
            let text = format!("sequential.push_named: name is {name:?}, expected {text}");
            t.row(|| named([name, "head"]), Argument, text);
        }
        Ok(())
    })
}

#[test]
fn rows_of_states() -> Result<()> {
    everywhere(|t, device, other| {
        let state =
            |device: &Device, shape: [usize; 3]| Ok::<_, anyhow::Error>(State::new(vec![vec![], vec![zeros(device, shape)?]]));
        let good = state(device, [2, 3, 4])?;
        let flags = "rows has shape [2], expected [batch] = [3]";
        t.row(|| good.reset_rows(&[true, false]), Argument, format!("State.reset_rows: {flags}"));
        let h = zeros(device, [2, 3, 4])?;
        let typed = LstmState { h: h.clone(), c: h };
        t.row(|| typed.reset_rows(&[true, false]), Argument, format!("State.reset_rows: {flags}"));
        let flat = State::new(vec![vec![zeros(device, [4])?]]);
        let text = "tensor 0 of layer 0 has shape [4], expected [.., batch, features]";
        t.row(|| flat.reset_rows(&[true; 4]), Argument, format!("State.reset_rows: {text}"));
        t.row(|| flat.take_rows(&[0]), Argument, format!("State.take_rows: {text}"));
        t.row(|| good.take_rows(&[2, 3]), Argument, "State.take_rows: row is 3, expected below the batch 3");
        t.row(|| good.take_rows(&[]), Argument, "State.take_rows: rows has shape [0], expected at least one row");
        t.row(|| good.put_rows(&[(3, 0)], &good), Argument, "State.put_rows: row is 3, expected below the batch 3");
        t.row(|| good.put_rows(&[(0, 5)], &good), Argument, "State.put_rows: row is 5, expected below the batch 3");
        let text = "State.put_rows: from is of layers with [1] tensors, expected of layers with [0, 1] tensors";
        t.row(|| good.put_rows(&[(0, 0)], &flat), Argument, text);
        for shape in [[1, 3, 4], [2, 3, 5]] {
            let text = format!("State.put_rows: from: tensor 0 of layer 1 has shape {shape:?}, expected [2, 3, 4] for any batch");
            let wrong = state(device, shape)?;
            t.row(|| good.put_rows(&[(0, 0)], &wrong), Argument, text);
        }
        let there = state(other, [2, 3, 4])?;
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        let text = format!("State.put_rows: from: tensor 0 of layer 1 {elsewhere}");
        t.row(|| good.put_rows(&[(0, 0)], &there), DeviceMismatch, text);
        Ok(())
    })
}

#[test]
fn streams() -> Result<()> {
    everywhere(|t, device, other| {
        let rng = &mut Rng::seed(0);
        let mut lstm = |direction| LstmConfig::new(3, 4).direction(direction).init(device, rng);
        let model = std::sync::Arc::new(Sequential::new().push(lstm(Direction::Forward)?));
        let text = "lstm.step: streaming needs Direction::Forward; the reverse pass needs the whole sequence";
        for direction in [Direction::Reverse, Direction::Both] {
            let model = Sequential::new().push(lstm(direction)?);
            t.row(|| Stream::new(model, 3, 2), Unsupported, text);
        }
        let pooled = Sequential::new().push(lstm(Direction::Forward)?).push(LastStep);
        let text = "last_step.step: this layer cannot stream: it has no single step";
        t.row(|| Stream::new(pooled, 3, 2), Unsupported, text);
        t.row(|| Stream::new(Sequential::new(), 3, 2), Unsupported, "Stream.new: the model has no parameters");
        t.row(|| Stream::new(model.clone(), 3, 0), Argument, "Stream.new: capacity is 0, expected at least 1");
        t.row(|| Stream::new(model.clone(), 0, 2), Argument, "Stream.new: width is 0, expected at least 1");
        t.row(|| Stream::new(model.clone(), 5, 2), Argument, "lstm.step: x has shape [2, 5], expected [batch, 3]");
        t.row(|| Stream::of_ids(model.clone(), 2), Argument, "lstm.step: x is token ids, expected numbers..");

        let mut stream = Stream::new(model.clone(), 3, 2)?;
        let (a, b) = (stream.join()?, stream.join()?);
        let text = "capacity is 2, expected a free row: that many streams have joined";
        t.row(|| stream.join(), Argument, format!("Stream.join: {text}"));
        let left = stream.leave(a)?;
        let gone = format!("id is {a}, which is not here, expected a stream that joined and has not left");
        t.row(|| stream.leave(a), Argument, format!("Stream.leave: {gone}"));
        t.row(|| stream.row(a), Argument, format!("Stream.row: {gone}"));
        t.row(|| stream.push(&[(b, &[0.0; 3]), (a, &[0.0; 3])]), Argument, format!("Stream.push: {gone}"));
        let mut twin = Stream::new(model, 3, 2)?;
        let text = format!("Stream.push: id is {b}, which is not here, expected a stream that joined and has not left");
        t.row(|| twin.push(&[(b, &[0.0; 3])]), Argument, text);
        let text = format!("Stream.push: data of {b} has shape [4], expected a multiple of 3 numbers, which a frame has");
        t.row(|| stream.push(&[(b, &[0.0; 4])]), Argument, text);
        let text = format!("Stream.push: {b} is given twice, expected once");
        t.row(|| stream.push(&[(b, &[0.0; 3]), (b, &[])]), Argument, text);
        t.row(|| stream.push_ids(&[(b, &[1])]), Argument, "Stream.push_ids: frames is ids, expected numbers");
        let lengths = Lengths::from_slice(device, &[0, 1])?;
        for shape in [vec![1, 3, 3], vec![1, 2, 4], vec![2, 3]] {
            let x = Tensor::zeros(device, shape.clone())?;
            let text = format!("Stream.push_batch: x has shape {shape:?}, expected [seq, 2, 3]");
            t.row(|| stream.push_batch(x, &lengths), Argument, text);
        }
        let x = zeros(device, [4, 2, 3])?;
        for (lengths, text) in [
            (&[0, 1, 2][..], "lengths has shape [3], expected [batch] = [2]"),
            (&[0, 5], "lengths[1] is 5, expected at most the 4 steps of the batch"),
            (&[1, 4], "lengths[0] is 1, expected 0: no stream has this row"),
        ] {
            let lengths = Lengths::from_slice(device, lengths)?;
            t.row(|| stream.push_batch(&x, &lengths), Argument, format!("Stream.push_batch: {text}"));
        }
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        t.row(|| stream.push_batch(&zeros(other, [4, 2, 3])?, &lengths), DeviceMismatch, format!("lstm.forward: x {elsewhere}"));
        let there = Lengths::from_slice(other, &[0, 1])?;
        t.row(|| stream.push_batch(&x, &there), DeviceMismatch, format!("Stream.push_batch: lengths {elsewhere}"));
        let two = State::new(vec![vec![zeros(device, [1, 2, 4])?; 2]]);
        let text = "Stream.join_with: state has shape [1, 2, 4], expected [.., 1, features], of one row";
        t.row(|| stream.join_with(&two), Argument, text);
        let text = "Stream.join_with: from is of layers with [0] tensors, expected of layers with [2] tensors";
        t.row(|| stream.join_with(&State::new(vec![vec![]])), Argument, text);
        // Nothing of that has moved a stream.
        let before = stream.leave(b)?;
        for (tensor, zeros) in before.layer(0).iter().zip(left.layer(0)) {
            assert_eq!(tensor.to_vec()?, zeros.to_vec()?);
        }
        Ok(())
    })
}

#[test]
fn encoders_and_decoders() -> Result<()> {
    everywhere(|t, device, other| {
        let rng = &mut Rng::seed(0);
        let gru = || GruConfig::new(4, 5);
        let refused = |t: &mut Table, source: usize, target: usize, rnn: GruConfig, kind: ErrorKind, text: &str| {
            t.row(|| EncoderDecoderConfig::new(source, target, rnn).init(device, &mut Rng::seed(0)), kind, text);
        };
        let text = "is 0, expected at least 1";
        refused(t, 0, 3, gru(), Argument, &format!("encoder_decoder.init: the source vocabulary {text}"));
        refused(t, 3, 0, gru(), Argument, &format!("encoder_decoder.init: the target vocabulary {text}"));
        refused(t, 3, 3, GruConfig::new(4, 0), Argument, &format!("gru.init: hidden {text}"));
        let text = "encoder_decoder.init: a decoder needs Direction::Forward, and an encoder with states like its own \
                    (reverse_source turns the encoder)";
        for direction in [Direction::Both, Direction::Reverse] {
            refused(t, 3, 3, gru().direction(direction), Unsupported, text);
        }
        let text = "encoder_decoder.init: batch_first(true) has no place here: ids are time-major, [seq, batch]";
        refused(t, 3, 3, gru().batch_first(true), Unsupported, text);

        let mut model = EncoderDecoderConfig::new(6, 5, gru()).init(device, rng)?;
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        let ids = |device: &Device, shape: &[usize], id: u32| Ids::from_slice(device, &vec![id; shape.iter().product()], shape);
        let (source, target) = (ids(device, &[3, 2], 5)?, ids(device, &[4, 2], 4)?);
        // The source and its lengths go into all of these, the target only into the first two.
        type Given<'a> = (&'a Ids, Option<&'a Lengths>, &'a Ids, Option<&'a Lengths>);
        let run = |t: &mut Table, (source, lengths, target, target_lengths): Given<'_>, kind: ErrorKind, text: &str| {
            let op = "encoder_decoder.forward";
            t.row(|| model.forward(source, lengths, target, target_lengths), kind, format!("{op}: {text}"));
            let train = || model.forward_train(source, lengths, target, target_lengths, None);
            t.row(train, kind, format!("{op}_train: {text}"));
            if text.starts_with("source") {
                t.row(|| model.encode(source, lengths), kind, format!("encoder_decoder.encode: {text}"));
                let decoding = Decoding { start: 1, end: Some(2), pad: 0, max_steps: 3, choice: Choice::Greedy };
                t.row(|| model.decode(source, lengths, decoding), kind, format!("encoder_decoder.decode: {text}"));
            }
        };
        for shape in [&[6][..], &[3, 2, 1]] {
            let text = format!("has shape {shape:?}, expected [seq, batch]");
            run(t, (&ids(device, shape, 0)?, None, &target, None), Argument, &format!("source {text}"));
            run(t, (&source, None, &ids(device, shape, 0)?, None), Argument, &format!("target_in {text}"));
        }
        let text = "source has id 6, expected ids below 6 (its vocabulary)";
        run(t, (&ids(device, &[3, 2], 6)?, None, &target, None), Argument, text);
        let text = "target_in has id 5, expected ids below 5 (its vocabulary)";
        run(t, (&source, None, &ids(device, &[4, 2], 5)?, None), Argument, text);
        run(t, (&ids(other, &[3, 2], 0)?, None, &target, None), DeviceMismatch, &format!("source {elsewhere}"));
        run(t, (&source, None, &ids(other, &[4, 2], 0)?, None), DeviceMismatch, &format!("target_in {elsewhere}"));
        let text = "target_in has shape [4, 3], expected [seq, batch of the source] = [_, 2]";
        run(t, (&source, None, &ids(device, &[4, 3], 0)?, None), Argument, text);
        for (lengths, text) in [
            (&[3][..], "lengths has shape [1], expected [batch] = [2]".to_owned()),
            (&[1, 5], "lengths[1] is 5, expected at most the".to_owned()),
        ] {
            let lengths = Lengths::from_slice(device, lengths)?;
            let steps =
                |steps: usize| if text.ends_with("the") { format!("{text} {steps} steps of the batch") } else { text.clone() };
            run(t, (&source, Some(&lengths), &target, None), Argument, &format!("source: {}", steps(3)));
            run(t, (&source, None, &target, Some(&lengths)), Argument, &format!("target_in: {}", steps(4)));
        }
        let lengths = Lengths::from_slice(other, &[1, 1])?;
        run(t, (&source, Some(&lengths), &target, None), DeviceMismatch, &format!("source: lengths {elsewhere}"));
        run(t, (&source, None, &target, Some(&lengths)), DeviceMismatch, &format!("target_in: lengths {elsewhere}"));
        let dropping = EncoderDecoderConfig::new(6, 5, gru().layers(2).dropout(0.5)).init(device, rng)?;
        let text = "gru.forward_train: key is not given, expected a MaskKey, which dropout 0.5 needs";
        t.row(|| dropping.forward_train(&source, None, &target, None, None), Argument, text);

        let state = model.encode(&source, None)?;
        let op = "encoder_decoder.step";
        t.row(|| model.step(&target, &state), Argument, format!("{op}: last has shape [4, 2], expected [batch]"));
        let text = format!("{op}: last has id 5, expected ids below 5 (its vocabulary)");
        t.row(|| model.step(&ids(device, &[2], 5)?, &state), Argument, text);
        t.row(|| model.step(&ids(other, &[2], 0)?, &state), DeviceMismatch, format!("{op}: last {elsewhere}"));
        let text = "gru.step: state.h has shape [1, 2, 5], expected [layers * directions, batch, hidden] = [1, 3, 5]";
        t.row(|| model.step(&ids(device, &[3], 0)?, &state), Argument, text);

        let decode = |t: &mut Table, change: &dyn Fn(&mut Decoding), text: &str| {
            let mut decoding = Decoding { start: 1, end: Some(2), pad: 0, max_steps: 3, choice: Choice::Greedy };
            change(&mut decoding);
            t.row(|| model.decode(&source, None, decoding), Argument, format!("encoder_decoder.decode: {text}"));
        };
        let draw = |temperature, top_k| Choice::Draw { temperature, top_k, key: MaskKey::new(0, 0) };
        decode(t, &|d| d.start = 5, "start is 5, expected an id below 5 (the target vocabulary)");
        decode(t, &|d| d.end = Some(u32::MAX), "end is 4294967295, expected an id below 5 (the target vocabulary)");
        decode(t, &|d| d.max_steps = 0, "max_steps is 0, expected at least 1");
        decode(t, &|d| d.choice = draw(1.0, Some(0)), "top_k is 0, expected at least 1");
        for (temperature, given) in [(0.0, "0"), (-1.0, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let text = format!("temperature is {given}, expected from 1e-6 to 1e6");
            decode(t, &|d| d.choice = draw(temperature, None), &text);
        }

        // What a trainer hands over.
        let linear = Sequential::new().push(LinearConfig::new(3, 2).init(device, rng)?);
        let trainer = Trainer::new(linear, MeanSquaredError, Sgd::new(0.1))?;
        let batch = Batch::new(zeros(device, [5, 3])?, zeros(device, [5, 2])?).source(&source, None);
        let text = "sequential.forward: source is given, expected none: only an EncoderDecoder reads one";
        t.row(|| trainer.evaluate(&batch), Argument, text);

        let tape = model.forward_train(&source, None, &target, None, None)?.1;
        let text = "linear.backward: dy has shape [4, 2, 4], expected [.., output] = [4, 2, 5]";
        t.row(|| model.backward(tape, &zeros(device, [4, 2, 4])?), Argument, text);
        let (logits, old) = model.forward_train(&source, None, &target, None, None)?;
        Optimizer::new(Sgd::new(0.1), model.params_mut())?.step()?;
        t.row(|| model.backward(old, &logits), Argument, format!("linear.backward: {STALE}"));

        let mut trainer = Trainer::new(model, CrossEntropy::new(), Sgd::new(0.1))?;
        let op = "encoder_decoder.forward_train";
        let text = format!("{op}: source is not given, expected the ids that the encoder reads (Batch::source)");
        t.row(|| trainer.step(&Batch::new(&target, &target)), Argument, text);
        let text = format!("{op}: x is numbers, expected token ids [seq, batch]");
        t.row(|| trainer.step(&Batch::new(zeros(device, [4, 2])?, &target).source(&source, None)), Argument, text);
        let text = format!("{op}: state is given, expected none: the encoder makes it");
        let carried = State::new(Vec::new());
        t.row(|| trainer.step(&Batch::new(&target, &target).source(&source, None).state(carried)), Argument, text);
        Ok(())
    })
}

#[test]
fn losses() -> Result<()> {
    everywhere(|t, device, other| {
        let elsewhere = format!("is on {}, expected on {}", other.info(), device.info());
        let ids = |ids: &[u32], shape: &[usize]| Ids::from_slice(device, ids, shape).map(Value::from);
        let both = |t: &mut Table, loss: &dyn Loss, y: &Tensor, target: &Value, lengths: Option<&[u32]>, kind, text: &str| {
            let lengths = || lengths.map(|lengths| Lengths::from_slice(device, lengths)).transpose();
            t.row(|| loss.loss(y, target, lengths()?.as_ref()), kind, text);
            t.row(|| loss.loss_and_gradient(y, target, lengths()?.as_ref()), kind, text);
        };
        let (flat, y, line) = (zeros(device, [2, 3])?, zeros(device, [2, 1, 3])?, zeros(device, [3])?);
        let entropy = &CrossEntropy::new();
        let text = "cross_entropy: target is numbers, expected class ids in the shape of y without its last dimension";
        both(t, entropy, &flat, &Value::from(&flat), None, Argument, text);
        for (y, shape) in [(&flat, vec![4]), (&flat, vec![4, 1]), (&y, vec![2, 2]), (&line, vec![1])] {
            let text = format!(
                "cross_entropy: target has shape {shape:?}, expected the shape of y {:?} without its last dimension",
                y.shape()
            );
            both(t, entropy, y, &ids(&vec![0; shape.iter().product()], &shape)?, None, Argument, &text);
        }
        let there = Value::from(Ids::from_slice(other, &[0, 0], [2])?);
        both(t, entropy, &flat, &there, None, DeviceMismatch, &format!("cross_entropy: target {elsewhere}"));
        let text = "cross_entropy: target has id 3, expected ids below 3 (the classes of y)";
        both(t, entropy, &flat, &ids(&[0, 3], &[2])?, None, Argument, text);
        both(t, &CrossEntropy::ignoring(7), &flat, &ids(&[7, 3], &[2])?, None, Argument, text);
        let nothing = format!("cross_entropy: {NOTHING}");
        both(t, &CrossEntropy::ignoring(7), &flat, &ids(&[7, 7], &[2])?, None, Argument, &nothing);
        both(t, entropy, &y, &ids(&[0, 0], &[2, 1])?, Some(&[0]), Argument, &nothing);
        let text = "cross_entropy: lengths has shape [2], expected [batch] = [1]";
        both(t, entropy, &y, &ids(&[0, 0], &[2, 1])?, Some(&[1, 1]), Argument, text);
        let text = "cross_entropy: lengths[0] is 3, expected at most the 2 steps of the batch";
        both(t, entropy, &y, &ids(&[0, 0], &[2, 1])?, Some(&[3]), Argument, text);
        let deep = zeros(device, [1, 2, 1, 3])?;
        let text = "y has shape [1, 2, 1, 3], expected [seq, batch, ..] or [batch, ..] where there are lengths";
        both(t, entropy, &deep, &ids(&[0, 0], &[1, 2, 1])?, Some(&[1]), Argument, &format!("cross_entropy: {text}"));

        let squares = &MeanSquaredError;
        let text = "mean_squared_error: target is ids, expected numbers in the shape of y";
        both(t, squares, &flat, &ids(&[0, 0], &[2])?, None, Argument, text);
        let text = "mean_squared_error: target has shape [3], expected the shape of y = [2, 3]";
        both(t, squares, &flat, &Value::from(&line), None, Argument, text);
        let text = "mean_squared_error: y has shape [3], expected [seq, batch, features] or [batch, features]";
        both(t, squares, &line, &Value::from(&line), None, Argument, text);
        let there = Value::from(zeros(other, [2, 3])?);
        both(t, squares, &flat, &there, None, DeviceMismatch, &format!("mean_squared_error: target {elsewhere}"));
        both(t, squares, &y, &Value::from(&y), Some(&[0]), Argument, &format!("mean_squared_error: {NOTHING}"));
        both(
            t,
            squares,
            &deep,
            &Value::from(&deep),
            Some(&[1]),
            Argument,
            &format!(
                "mean_squared_error: {text}",
                text = "y has shape [1, 2, 1, 3], expected [seq, batch, ..] or [batch, ..] where there are lengths"
            ),
        );
        Ok(())
    })
}

#[test]
fn optimizers() -> Result<()> {
    everywhere(|t, device, other| {
        let linear = |device: &Device| LinearConfig::new(1, 1).init(device, &mut Rng::seed(0));
        let model = || Ok::<_, gatefold::Error>(Sequential::new().push(linear(device)?));
        let (rate, share, positive) = ("finite and not negative", "in [0, 1)", "finite and positive");
        let adamw = AdamW::new(0.1);
        let rules: [(Rule, &str, f64, &str); 14] = [
            (AdamW::new(f64::NAN).into(), "adamw: learning_rate", f64::NAN, rate),
            (AdamW::new(-1.0).into(), "adamw: learning_rate", -1.0, rate),
            (AdamW::new(1e39).into(), "adamw: learning_rate", 1e39, rate),
            (adamw.betas(1.0, 0.9).into(), "adamw: beta1", 1.0, share),
            (adamw.betas(0.9, -0.5).into(), "adamw: beta2", -0.5, share),
            (adamw.betas(0.9, f64::NAN).into(), "adamw: beta2", f64::NAN, share),
            (adamw.epsilon(0.0).into(), "adamw: epsilon", 0.0, positive),
            (adamw.epsilon(1e-60).into(), "adamw: epsilon", 1e-60, positive),
            (adamw.epsilon(f64::INFINITY).into(), "adamw: epsilon", f64::INFINITY, positive),
            (adamw.weight_decay(-0.1).into(), "adamw: weight_decay", -0.1, rate),
            (Sgd::new(f64::INFINITY).into(), "sgd: learning_rate", f64::INFINITY, rate),
            (Sgd::new(0.1).momentum(1.5).into(), "sgd: momentum", 1.5, share),
            (Sgd::new(0.1).momentum(f64::NAN).into(), "sgd: momentum", f64::NAN, share),
            (Sgd::new(0.1).weight_decay(f64::NAN).into(), "sgd: weight_decay", f64::NAN, rate),
        ];
        for (rule, name, given, expected) in rules {
            let text = format!("{name} is {given}, expected {expected}");
            t.row(|| Trainer::new(model()?, MeanSquaredError, rule), Argument, text);
        }
        let ones = zeros(device, [1, 1])?;
        for norm in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-60, 1e39] {
            let step = || Trainer::new(model()?, MeanSquaredError, adamw)?.clip_grad_norm(norm).step(&Batch::new(&ones, &ones));
            t.row(step, Argument, format!("clip_grad_norm: max_norm is {norm}, expected finite and positive"));
            let step = || Trainer::new(model()?, MeanSquaredError, adamw)?.clip_grad_value(norm).step(&Batch::new(&ones, &ones));
            t.row(step, Argument, format!("clip_grad_value: limit is {norm}, expected finite and positive"));
        }
        for scale in [0.0, 3.0, 0.5, f64::NAN, 33_554_432.0] {
            let scaling = LossScale::dynamic().initial(scale);
            let step = || Trainer::new(model()?, MeanSquaredError, adamw)?.loss_scaling(scaling).step(&Batch::new(&ones, &ones));
            t.row(step, Argument, format!("loss_scaling: initial is {scale}, expected a power of two from 1 to 2^24"));
        }
        let scaling = LossScale::dynamic().growth_interval(0);
        let step = || Trainer::new(model()?, MeanSquaredError, adamw)?.loss_scaling(scaling).step(&Batch::new(&ones, &ones));
        t.row(step, Argument, "loss_scaling: growth_interval is 0, expected at least 1");
        let bounded = || {
            Ok::<_, gatefold::Error>(
                Sequential::new().push(RnnConfig::new(4, 4).gradient_clip(1.0).init(device, &mut Rng::seed(0))?),
            )
        };
        let optimizer =
            || Ok::<_, gatefold::Error>(Optimizer::new(adamw, bounded()?.params_mut())?.loss_scaling(LossScale::dynamic()));
        let text = "loss_scaling with gradient_clip in the layer of 0.weight_ih_l0, whose limit would meet scaled gradients";
        t.row(|| optimizer()?.step(), Unsupported, format!("Optimizer.step: {text}"));
        t.row(|| optimizer()?.scale_loss(&ones), Unsupported, format!("Optimizer.scale_loss: {text}"));
        let mut trainer = Trainer::new(model()?, MeanSquaredError, Sgd::new(0.1))?;
        trainer.set_learning_rate(f64::NAN);
        let text = "sgd: learning_rate is NaN, expected finite and not negative";
        t.row(|| trainer.step(&Batch::new(&ones, &ones)), Argument, text);

        let (mut a, mut b) = (linear(device)?, linear(device)?);
        let twice = a.params_mut().into_iter().chain(b.params_mut()).collect();
        let text = "Optimizer.new: params is weight twice, expected distinct names";
        t.row(|| Optimizer::new(adamw, twice), Argument, text);
        let mut there = LstmConfig::new(1, 1).init(other, &mut Rng::seed(0))?;
        let mixed = a.params_mut().into_iter().chain(there.params_mut()).collect();
        let text = format!("Optimizer.new: weight_ih_l0 is on {}, expected on {}", other.info(), device.info());
        t.row(|| Optimizer::new(adamw, mixed), DeviceMismatch, text);
        Ok(())
    })
}

// ---- devices ----

fn no_device(name: &str) -> String {
    let exist = Device::list().iter().fold(Vec::new(), |mut names, info| {
        names.push(if info.backend == "native" { "cpu".to_owned() } else { format!("{}:{}", info.backend, info.name) });
        names
    });
    format!("device: no device is named {name:?}, expected one of: {}", exist.join(", "))
}

#[test]
fn device_names() -> Result<()> {
    let mut t = Table::new("device names");
    for name in ["nonsense", "", "cpu:", "vulkan:nonsense", "nonsense:llvmpipe"] {
        t.row(|| Device::by_name(name), NoDevice, no_device(name));
    }
    t.finish();
    Ok(())
}

/// Not a test by itself: `in_a_child` runs it in a process of its own.
#[test]
fn child() {
    match std::env::var("GATEFOLD_TEST_CHILD").as_deref() {
        Ok("new") => println!("child: {:?}", Device::new()),
        Ok("huge") => println!("child: {:?}", Tensor::zeros(&Device::cpu(), [1 << 30])),
        _ => {}
    }
}

/// What `child` prints under `variables`; `shell` stands before the command line.
fn in_a_child(what: &str, shell: &str, variables: &[(&str, &std::ffi::OsStr)]) -> Result<String> {
    let this = std::env::current_exe()?;
    let mut command = if shell.is_empty() { Command::new(&this) } else { Command::new("sh") };
    if !shell.is_empty() {
        command.args(["-c", &format!("{shell}; exec \"$0\" \"$@\"")]).arg(&this);
    }
    command.args(["--exact", "child", "--nocapture"]).env("GATEFOLD_TEST_CHILD", what).env_remove("GATEFOLD_DEVICE");
    let output = command.envs(variables.iter().copied()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer = text.split_once("child: ").and_then(|(_, rest)| rest.lines().next());
    Ok(answer.with_context(|| format!("{what}: {output:?}"))?.to_owned())
}

#[test]
fn the_variable_names_the_device() -> Result<()> {
    let adapter = adapters()?[0].info();
    let variable = |value: &std::ffi::OsStr| in_a_child("new", "", &[("GATEFOLD_DEVICE", value)]);
    let named = |value: &str| variable(value.as_ref());
    assert_eq!(named("nonsense")?, format!("Err(NoDevice: {})", no_device("nonsense")));
    assert!(named("CPU")?.starts_with("Ok(Device(cpu (native, "));
    let found = named(&format!("{}:{}", adapter.backend, adapter.name.to_uppercase()))?;
    assert_eq!(found, format!("Ok(Device({adapter}))"));
    // Empty is as good as unset; what is no text is a name that nothing has.
    assert_eq!(named("")?, in_a_child("new", "", &[])?);
    #[cfg(unix)]
    {
        let value = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff");
        assert!(variable(value)?.starts_with("Err(NoDevice: device: no device is named"));
    }
    Ok(())
}

/// On the CPU only: to fill a software adapter's memory would fill the machine's.
#[test]
#[cfg(target_os = "linux")]
fn memory_that_is_not_there() -> Result<()> {
    let answer = in_a_child("huge", "ulimit -v 3000000", &[])?;
    assert!(answer.starts_with("Err(OutOfMemory: tensor: the CPU has no memory for 4294967296 bytes"), "{answer}");
    Ok(())
}

#[test]
fn tensors_beyond_an_adapters_limits() -> Result<()> {
    for (device, info) in adapters()?.iter().zip(Device::list().iter().skip(1)) {
        let limit = |name: &str| info.limits.iter().find(|(given, _)| given == name).map(|(_, value)| *value);
        let limit = limit("max_storage_buffer_binding_size").min(limit("max_buffer_size")).context("limits are listed")?;
        let words = limit as usize / 4 + 1;
        let mut t = Table::new(format!("{device:?}"));
        if words <= u32::MAX as usize {
            let text =
                format!("a tensor of {words} elements takes {} bytes, expected at most {limit} (the adapter's limit)", words * 4);
            let text = format!("device: {}: {text}", info.name);
            t.row(|| Tensor::zeros(device, [words]), Limit, &text);
            t.row(|| LinearConfig::new(words, 1).init(device, &mut Rng::seed(0)), Limit, &text);
        }
        // Refused, not broken: the device still works.
        assert_eq!(zeros(device, [3])?.to_vec()?, [0.0; 3]);
        t.finish();
    }
    Ok(())
}

#[test]
fn a_lost_device() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run.safetensors");
    for device in adapters()? {
        let rng = &mut Rng::seed(0);
        let lstm = LstmConfig::new(2, 3).init(&device, rng)?;
        let model =
            Sequential::new().push(LstmConfig::new(2, 3).init(&device, rng)?).push(LinearConfig::new(3, 1).init(&device, rng)?);
        let mut trainer = Trainer::new(model, MeanSquaredError, AdamW::new(0.1))?;
        let (x, target) = (zeros(&device, [4, 2, 2])?, zeros(&device, [4, 2, 1])?);
        let batch = Batch::new(&x, &target);
        let outcome = trainer.step(&batch)?;
        trainer.save(&path)?;
        let state = outcome.state.clone();
        // Work is recorded, some of it is under way.
        trainer.step(&batch)?;
        let (y, _, tape) = lstm.forward_train(&x, None)?;
        device.lose();
        let mut t = Table::new(format!("{device:?}"));
        let text = format!("device: {}: ..", device.info().name);
        t.row(|| outcome.item(), DeviceLost, &text);
        t.row(|| y.to_vec(), DeviceLost, &text);
        t.row(|| lstm.backward(tape, &y, None), DeviceLost, &text);
        t.row(|| lstm.forward(&x, None), DeviceLost, &text);
        t.row(|| lstm.step(&Tensor::zeros(&device, [2, 2])?, None), DeviceLost, &text);
        t.row(|| Tensor::zeros(&device, [3]), DeviceLost, &text);
        t.row(|| Tensor::from_slice(&device, &[1.0], [1]), DeviceLost, &text);
        t.row(|| Ids::from_slice(&device, &[1], [1]), DeviceLost, &text);
        t.row(|| x.to_device(&Device::cpu()), DeviceLost, &text);
        t.row(
            || Device::cpu().synchronize().and_then(|()| Tensor::zeros(&Device::cpu(), [1])?.to_device(&device)),
            DeviceLost,
            &text,
        );
        t.row(|| trainer.step(&batch), DeviceLost, &text);
        t.row(|| trainer.step(&batch.clone().state(state)), DeviceLost, &text);
        t.row(|| trainer.evaluate(&batch), DeviceLost, &text);
        t.row(|| trainer.stats(), DeviceLost, &text);
        t.row(|| trainer.model().zero_grad(), DeviceLost, &text);
        t.row(|| trainer.model().params()[0].1.set(&[0.0; 24]), DeviceLost, &text);
        t.row(|| trainer.save(&path), DeviceLost, &text);
        t.row(|| trainer.load(&path), DeviceLost, &text);
        t.row(|| LinearConfig::new(1, 1).init(&device, &mut Rng::seed(0)), DeviceLost, &text);
        t.row(|| MeanSquaredError.loss(&target, &Value::from(&target), None), DeviceLost, &text);
        t.row(|| device.submit(), DeviceLost, &text);
        t.row(|| device.synchronize(), DeviceLost, &text);
        t.finish();
        drop((lstm, x, target, outcome, y));
        // The file from before is whole; the adapter itself is not lost.
        let info = device.info();
        let fresh = Device::by_name(&format!("{}:{}", info.backend, info.name))?;
        let model =
            Sequential::new().push(LstmConfig::new(2, 3).init(&fresh, rng)?).push(LinearConfig::new(3, 1).init(&fresh, rng)?);
        let mut trainer = Trainer::new(model, MeanSquaredError, AdamW::new(0.1))?;
        trainer.load(&path)?;
        assert_eq!((trainer.steps(), trainer.stats()?.steps), (1, 1));
    }
    Device::cpu().lose();
    Ok(())
}

#[test]
fn overrides_of_kernels() -> Result<()> {
    let [none, steps] = [KernelOverride::default(), KernelOverride::default().sweep(SweepKernel::Step)];
    let cpu = Device::cpu();
    let mut t = Table::new("cpu");
    let text = "device.override_kernels: product general, step subgroup: the native CPU has no kernels to choose from";
    let given = none.product(ProductKernel::General).step(StepKernel::Subgroup);
    t.row(|| cpu.override_kernels(given), Unsupported, text);
    t.finish();
    cpu.override_kernels(none)?;

    let folder = tempfile::tempdir()?;
    let [under, without] = ["under", "without"].map(|name| folder.path().join(name));
    let make = |device: &Device| -> gatefold::Result<_> {
        let model = Sequential::new().push(LstmConfig::new(2, 8).init(device, &mut Rng::seed(1))?);
        Trainer::new(model, MeanSquaredError, Sgd::new(0.1))
    };
    for (device, info) in adapters()?.iter().zip(Device::list().iter().skip(1)) {
        let mut t = Table::new(format!("{device:?}"));
        let limit = |name: &str| info.limits.iter().find(|(given, _)| given == name).map(|(_, value)| *value);
        let eights = limit("subgroup_min_size") == Some(8) && limit("subgroup_max_size") == Some(8);
        for (given, kernel) in [
            (none.product(ProductKernel::SubgroupRows8), "product kernel subgroup_rows8"),
            (none.step(StepKernel::Subgroup), "step kernel subgroup"),
        ] {
            if eights && info.features.iter().any(|feature| feature == "SUBGROUP") {
                device.override_kernels(given)?;
            } else {
                let text = format!("device.override_kernels: {} cannot run the {kernel}", device.info());
                t.row(|| device.override_kernels(given), Unsupported, text);
            }
        }

        // What runs is what was asked for.
        let lstm = LstmConfig::new(2, 8).init(device, &mut Rng::seed(1))?;
        let x = zeros(device, [6, 3, 2])?;
        let sweep = || -> Result<String> {
            let choices = device.explain(|| lstm.forward(&x, None).map(|_| ()))?;
            Ok(choices.into_iter().find(|choice| choice.table == "sweep").context("no sweep was chosen")?.kernel)
        };
        for (given, expected) in [(none, "resident"), (steps, "step"), (none.sweep(SweepKernel::Scan), "resident")] {
            device.override_kernels(given)?;
            assert_eq!(sweep()?, expected, "{device:?}: {given}");
        }
        device.override_kernels(none.sweep(SweepKernel::Resident))?;
        device.set_batch_invariant(true);
        assert_eq!(sweep()?, "step", "{device:?}: batch invariant");
        device.set_batch_invariant(false);
        let text = "device.explain: the device explains other work already";
        t.row(|| device.explain(|| device.explain(|| Ok(())).map(|_| ())), Unsupported, text);

        // A run goes on with the kernels that it had.
        let mut trainer = make(device)?;
        device.override_kernels(steps)?;
        trainer.save(&under)?;
        device.override_kernels(none)?;
        trainer.save(&without)?;
        let text = |path: &std::path::Path, given: &str, expected: &str| {
            let path = path.display();
            format!("Trainer.load: {path}: the override of kernels is {given:?}, expected that of the device: {expected:?}")
        };
        t.row(|| trainer.load(&under), Format, text(&under, "sweep step", "none"));
        trainer.load(&without)?;
        device.override_kernels(steps)?;
        t.row(|| trainer.load(&without), Format, text(&without, "none", "sweep step"));
        assert!(trainer.load(&under)?.is_empty(), "the override is no text of the caller's");
        make(&cpu)?.load(&under)?;
        t.finish();
    }
    Ok(())
}

#[test]
fn devices_of_the_applications_own() -> Result<()> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let found = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let adapter = found.first().context("this test needs a wgpu adapter and found none: apt-get install mesa-vulkan-drivers")?;
    let open = |limits: wgpu::Limits| {
        let required_limits = limits.using_resolution(adapter.limits());
        pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor { required_limits, ..Default::default() }))
    };
    let (device, queue) = open(wgpu::Limits::default())?;
    let device = Device::from_wgpu(adapter, device, queue)?;
    let lstm = LstmConfig::new(2, 3).layers(2).init(&device, &mut Rng::seed(0))?;
    let (y, ..) = lstm.forward(&zeros(&device, [4, 2, 2])?, None)?;
    assert!(y.to_vec()?.iter().all(|value| value.is_finite()));

    let mut t = Table::new("from_wgpu");
    let (device, queue) = open(wgpu::Limits::downlevel_defaults())?;
    let text = "limit max_storage_buffers_per_shader_stage is 4, expected at least 8; \
                GATEFOLD_DEVICE=cpu or Device::cpu() runs on the CPU instead";
    let text = format!("device: {}: {text}", adapter.get_info().name);
    t.row(|| Device::from_wgpu(adapter, device, queue), Limit, text);
    t.finish();
    Ok(())
}

// ---- files ----

type Parts<'a> = BTreeMap<&'a str, (Dtype, Vec<usize>)>;

/// A file with zeros under these names.
fn write(path: &std::path::Path, parts: &Parts<'_>, metadata: Option<&Metadata>) -> Result<()> {
    let zeros = [0; 256];
    let views = parts.iter().map(|(name, (dtype, shape))| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        Ok((*name, TensorView::new(*dtype, shape.clone(), &zeros[..bytes])?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    std::fs::write(path, safetensors::serialize(views, metadata.map(|m| m.clone().into_iter().collect()))?)?;
    Ok(())
}

#[test]
fn checkpoint_files() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let device = Device::cpu();
    let linear = LinearConfig::new(2, 1).init(&device, &mut Rng::seed(0))?;
    let before: Vec<Vec<f32>> = linear.params().iter().map(|(_, p)| p.value().to_vec()).collect::<Result<_, _>>()?;
    let mut t = Table::new("checkpoint files");

    // Not there, a folder, not this format, cut off anywhere.
    for name in ["absent", "."] {
        let path = path(name);
        let text = format!("{}: {}", path.display(), std::fs::read(&path).expect_err("there is no such file"));
        t.row(|| linear.load(&path), Io, format!("Module.load: {text}"));
        t.row(|| checkpoint::read_metadata(&path), Io, format!("read_metadata: {text}"));
    }
    let whole = path("whole");
    linear.save(&whole)?;
    let bytes = std::fs::read(&whole)?;
    let cut = path("cut");
    let text = format!("Module.load: {}: not a safetensors file: ..", cut.display());
    for end in 0..bytes.len() {
        std::fs::write(&cut, &bytes[..end])?;
        t.row(|| linear.load(&cut), Format, &text);
    }
    for content in [&b"not a checkpoint"[..], &[0xff; 64], &[bytes.as_slice(), b"x"].concat()] {
        std::fs::write(&cut, content)?;
        t.row(|| linear.load(&cut), Format, &text);
    }

    // Tensors that do not fit, all named at once.
    let odd = path("odd");
    let text = |what: &str| format!("Module.load: {}: {what}", odd.display());
    let (f32s, weight, bias) = (Dtype::F32, vec![1, 2], vec![1]);
    let cases: [(Parts<'_>, &str); 4] = [
        (
            Parts::from([("weight", (f32s, vec![2, 1])), ("other", (f32s, vec![3])), ("bias_ih", (f32s, vec![1]))]),
            "weight has shape [2, 1], expected [1, 2]; bias is missing; bias_ih is unexpected; other is unexpected",
        ),
        (
            Parts::from([("weight", (Dtype::I64, weight.clone())), ("bias", (Dtype::F64, bias.clone()))]),
            "weight has type I64, expected F32, F16 or BF16; bias has type F64, expected F32, F16 or BF16",
        ),
        (Parts::new(), "weight is missing; bias is missing"),
        (
            Parts::from([("weight", (f32s, weight.clone())), ("bias", (f32s, bias.clone())), ("0.bias", (f32s, bias))]),
            "0.bias is unexpected",
        ),
    ];
    for (parts, what) in &cases {
        write(&odd, parts, None)?;
        t.row(|| linear.load(&odd), Format, text(what));
    }
    let after: Vec<Vec<f32>> = linear.params().iter().map(|(_, p)| p.value().to_vec()).collect::<Result<_, _>>()?;
    assert_eq!(before, after, "a refused file changes nothing");

    // Other names.
    let text = |what: &str| format!("Module.load_mapped: {}: {what}", whole.display());
    let what = "bias and weight are both meant for weight";
    t.row(|| linear.load_mapped(&whole, |_| Some("weight".into())), Format, text(what));
    let what = "weight is missing; bias is missing; 0.bias is unexpected; 0.weight is unexpected";
    t.row(|| linear.load_mapped(&whole, |name| Some(format!("0.{name}"))), Format, text(what));
    let only = |name: &str| (name == "weight").then(|| name.to_owned());
    t.row(|| linear.load_mapped(&whole, only), Format, text("bias is missing"));
    t.row(|| linear.load_mapped(path("absent"), |_| None), Io, format!("Module.load_mapped: {}: ..", path("absent").display()));

    // Files of states.
    let text = |path: &std::path::Path, what: &str| format!("State.load: {}: {what}", path.display());
    t.row(|| State::load(&device, path("absent")), Io, text(&path("absent"), ".."));
    t.row(|| State::load(&device, &whole), Format, text(&whole, "gatefold.state is missing: not a state's file"));
    let two = Parts::from([("0.0", (f32s, vec![2])), ("2.0", (f32s, vec![3, 1]))]);
    for (counts, what) in [
        ("{}", "gatefold.state is {}: .."),
        ("[1,0,-1]", "gatefold.state is [1,0,-1]: .."),
        ("[1,0,2]", "gatefold.state is [1,0,2], expected as many tensors as there are: 2"),
        ("[18446744073709551615,3]", "gatefold.state is [18446744073709551615,3], expected as many tensors as there are: 2"),
        ("[1,1]", "1.0 is missing; 2.0 is unexpected"),
    ] {
        write(&odd, &two, Some(&Metadata::from([("gatefold.state".into(), counts.into())])))?;
        t.row(|| State::load(&device, &odd), Format, text(&odd, what));
    }
    let ids = Parts::from([("0.0", (Dtype::I64, vec![2]))]);
    write(&odd, &ids, Some(&Metadata::from([("gatefold.state".into(), "[1]".into())])))?;
    t.row(|| State::load(&device, &odd), Format, text(&odd, "0.0 has type I64, expected F32, F16 or BF16"));
    let state = State::new(vec![vec![zeros(&device, [1])?]]);
    t.row(|| state.save(folder.path()), Io, format!("State.save: {}: ..", folder.path().display()));

    // A trainer's files.
    let make = |rule: Rule| {
        Trainer::new(Sequential::new().push(LinearConfig::new(2, 1).init(&device, &mut Rng::seed(1))?), MeanSquaredError, rule)
    };
    let (adamw, mut sgd) = (make(AdamW::new(0.1).into())?, make(Sgd::new(0.1).into())?);
    let text = |path: &std::path::Path, what: &str| format!("Trainer.load: {}: {what}", path.display());
    t.row(|| sgd.load(&whole), Format, text(&whole, "gatefold.trainer is missing: not a trainer's file"));
    t.row(|| sgd.load(path("absent")), Io, text(&path("absent"), ".."));
    let run = path("run");
    adamw.save(&run)?;
    t.row(|| sgd.load(&run), Format, text(&run, "the optimizer is \"adamw\", expected \"sgd\""));
    let unexpected = "optimizer.control is unexpected; optimizer.first.0.bias is unexpected; ..";
    let model = Sequential::new().push(LinearConfig::new(2, 1).init(&device, &mut Rng::seed(1))?);
    t.row(|| model.load(&run), Format, format!("Module.load: {}: {unexpected}", run.display()));

    let meta = |progress: &str| {
        Metadata::from([("gatefold.trainer".into(), progress.into()), ("gatefold.optimizer".into(), "sgd".into())])
    };
    let good = r#"{"seed":0,"step":7}"#;
    let control = |dtype, words| Parts::from([("optimizer.control", (dtype, vec![words]))]);
    let cases = [
        (control(Dtype::U32, 14), "{}", "gatefold.trainer is {}: .."),
        (control(Dtype::U32, 14), r#"{"seed":-1,"step":7}"#, "gatefold.trainer is {\"seed\":-1,\"step\":7}: .."),
        (Parts::new(), good, "optimizer.control is missing"),
        (control(Dtype::U32, 7), good, "optimizer.control is U32 [7], expected U32 [14]"),
        (control(f32s, 12), good, "optimizer.control is F32 [12], expected U32 [14]"),
        (
            control(Dtype::U32, 14),
            good,
            "0.weight is missing; 0.bias is missing; optimizer.first.0.weight is missing; optimizer.first.0.bias is missing",
        ),
    ];
    for (parts, progress, what) in &cases {
        write(&odd, parts, Some(&meta(progress)))?;
        t.row(|| sgd.load(&odd), Format, text(&odd, what));
    }
    assert_eq!(sgd.steps(), 0, "a refused file changes nothing");
    let own = Metadata::from([("gatefold.trainer".to_owned(), String::new())]);
    let text = "Trainer.save: a metadata key is \"gatefold.trainer\", expected a name that does not begin with gatefold.";
    t.row(|| adamw.save_with(&run, &own), Argument, text);

    // Nowhere to write.
    let nowhere = path("no").join("folder");
    t.row(|| linear.save(&nowhere), Io, format!("Module.save: {}: ..", nowhere.display()));
    t.row(|| linear.save(folder.path()), Io, format!("Module.save: {}: ..", folder.path().display()));
    t.row(|| adamw.save(folder.path()), Io, format!("Trainer.save: {}: ..", folder.path().display()));
    t.row(|| linear.save(""), Io, "Module.save: : ..");
    t.finish();
    Ok(())
}
