//! ONNX's recurrent operators RNN, GRU and LSTM: from an operator's attributes and tensors to this crate's layers.
//!
//! Reading the `.onnx` file is the caller's part: any protobuf reader gives attributes and initialisers of a node, and
//! [`Operator`] takes them as they are. ONNX's gates come in another order than PyTorch's, which is ours, and its outputs have
//! a dimension for the direction; [`Operator::init`] and [`Layer::forward`] translate. All options of opset 22 are there.
//!
//! ```
//! # fn main() -> gatefold::Result<()> {
//! use gatefold::{Device, Tensor, nn::Direction, onnx::{Inputs, Kind, Operator}};
//! let (directions, input, hidden) = (2, 3, 5);
//! let mut operator = Operator::new(Kind::Lstm, input, hidden);
//! operator.direction = Direction::Both;
//! operator.w = vec![0.1; directions * 4 * hidden * input]; // the initialiser W as it comes
//! operator.r = vec![0.1; directions * 4 * hidden * hidden];
//! operator.activations = ["HardSigmoid", "Tanh", "Tanh"].repeat(2).into_iter().map(str::to_owned).collect();
//!
//! let device = Device::cpu();
//! let layer = operator.init(&device)?;
//! let x = Tensor::zeros(&device, [7, 2, input])?; // seq, batch, input
//! let outputs = layer.forward(&x, Inputs::default())?;
//! assert_eq!(outputs.y.shape(), [7, directions, 2, hidden]);
//! assert_eq!(outputs.y_h.shape(), [directions, 2, hidden]);
//! # Ok(()) }
//! ```

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::columns::copy_columns;
use crate::kernels::gemm::Matrix;
use crate::kernels::transpose;
use crate::nn::{
    Activation, Cell, CellState, Direction, Gru, GruConfig, Input, Lstm, LstmConfig, Module, Recurrent, RecurrentConfig, Reset,
    Rnn, RnnConfig,
};
use crate::rng::Rng;
use crate::tensor::{Lengths, Tensor};

/// Which operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `RNN`
    Rnn,
    /// `GRU`
    Gru,
    /// `LSTM`
    Lstm,
}

impl Kind {
    /// Of each of our gates its place among ONNX's: LSTM i, o, f, c; GRU z, r, h.
    fn gates(self) -> &'static [usize] {
        match self {
            Kind::Rnn => &[0],
            Kind::Gru => &[1, 0, 2],
            Kind::Lstm => &[0, 2, 3, 1],
        }
    }

    /// The activations of one direction where none are named.
    fn activations(self) -> &'static [&'static str] {
        match self {
            Kind::Rnn => &["Tanh"],
            Kind::Gru => &["Sigmoid", "Tanh"],
            Kind::Lstm => &["Sigmoid", "Tanh", "Tanh"],
        }
    }
}

/// Of each of our peepholes i, f, o its place among ONNX's: i, o, f.
const PEEPHOLES: &[usize] = &[0, 2, 1];

/// A node of type RNN, GRU or LSTM: its attributes and weights under ONNX's names. Tensors are row-major; D directions, G gates,
/// H = `hidden_size`, I = `input_size`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Operator {
    /// Its type.
    pub kind: Kind,
    /// I: the last dimension of W.
    pub input_size: usize,
    /// H.
    pub hidden_size: usize,
    /// `forward`, `reverse` or `bidirectional`.
    pub direction: Direction,
    /// Names in any letter case, for each direction: RNN f; GRU f, g; LSTM f, g, h. Empty: ONNX's defaults.
    pub activations: Vec<String>,
    /// One number for each of `activations` that takes an alpha, in their order; those that are missing at the end have ONNX's
    /// defaults.
    pub activation_alpha: Vec<f32>,
    /// The same for beta.
    pub activation_beta: Vec<f32>,
    /// A bound for the input of each activation but the LSTM's h, above 0.
    pub clip: Option<f32>,
    /// GRU: whether the reset gate acts after the recurrent product, as in PyTorch.
    pub linear_before_reset: bool,
    /// LSTM: whether f = 1 - i.
    pub input_forget: bool,
    /// ONNX's `layout` 1: X, Y and the states have the batch as their first dimension.
    pub batch_first: bool,
    /// `[D, G * H, I]`
    pub w: Vec<f32>,
    /// `[D, G * H, H]`
    pub r: Vec<f32>,
    /// `[D, 2 * G * H]`: biases of W, then of R.
    pub b: Option<Vec<f32>>,
    /// LSTM: peepholes `[D, 3 * H]`.
    pub p: Option<Vec<f32>>,
}

impl Operator {
    /// ONNX's defaults: forward, its own activations, no bias; W and R are still empty.
    pub fn new(kind: Kind, input_size: usize, hidden_size: usize) -> Self {
        Self {
            kind,
            input_size,
            hidden_size,
            direction: Direction::Forward,
            activations: Vec::new(),
            activation_alpha: Vec::new(),
            activation_beta: Vec::new(),
            clip: None,
            linear_before_reset: false,
            input_forget: false,
            batch_first: false,
            w: Vec::new(),
            r: Vec::new(),
            b: None,
            p: None,
        }
    }

    /// The layer, on `device`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`], by name, for a tensor that does not have its size, an activation that ONNX does not define,
    /// too few or too many activations, alphas or betas, an attribute of another operator, and numbers that
    /// [`crate::nn::Activation`] refuses; [`crate::ErrorKind::Limit`] or [`crate::ErrorKind::OutOfMemory`] when the device cannot hold it.
    pub fn init(&self, device: &Device) -> Result<Layer> {
        self.check()?;
        let (input, hidden, clip) = (self.input_size, self.hidden_size, self.clip.unwrap_or(0.0));
        let network = match self.kind {
            Kind::Rnn => Network::Rnn(self.layers(device, |of| RnnConfig::new(input, hidden).activation(of[0]).gate_clip(clip))?),
            Kind::Gru => {
                let reset = if self.linear_before_reset { Reset::AfterProduct } else { Reset::BeforeProduct };
                Network::Gru(
                    self.layers(device, |of| {
                        GruConfig::new(input, hidden).activations(of[0], of[1]).reset(reset).gate_clip(clip)
                    })?,
                )
            }
            Kind::Lstm => Network::Lstm(self.layers(device, |of| {
                let config = LstmConfig::new(input, hidden).activations(of[0], of[1], of[2]).gate_clip(clip);
                config.peepholes(self.p.is_some()).coupled(self.input_forget)
            })?),
        };
        let batch_first = self.batch_first;
        Ok(Layer { network, device: device.clone(), directions: self.directions(), input, hidden, batch_first })
    }

    fn directions(&self) -> usize {
        if self.direction == Direction::Both { 2 } else { 1 }
    }

    fn check(&self) -> Result<()> {
        let (directions, hidden) = (self.directions(), self.hidden_size);
        let rows = self.kind.gates().len().saturating_mul(hidden);
        for (name, values, shape) in [
            ("w", Some(&self.w), vec![directions, rows, self.input_size]),
            ("r", Some(&self.r), vec![directions, rows, hidden]),
            ("b", self.b.as_ref(), vec![directions, rows.saturating_mul(2)]),
            ("p", self.p.as_ref(), vec![directions, hidden.saturating_mul(3)]),
        ] {
            let count = shape.iter().fold(1, |count: usize, size| count.saturating_mul(*size));
            if let Some(values) = values.filter(|values| values.len() != count) {
                let expected = format!("{count} elements for shape {shape:?}");
                return Err(Error::shape(INIT, name, &[values.len()], expected));
            }
        }
        for (name, given, kind) in [
            ("p", self.p.is_some(), Kind::Lstm),
            ("input_forget", self.input_forget, Kind::Lstm),
            ("linear_before_reset", self.linear_before_reset, Kind::Gru),
        ] {
            if given && self.kind != kind {
                return Err(Error::argument(INIT, name, "given", format!("none: {:?} has it, not {:?}", kind, self.kind)));
            }
        }
        match self.clip {
            Some(clip) if !(clip > 0.0 && clip.is_finite()) => {
                Err(Error::argument(INIT, "clip", clip, "a finite number above 0, or none"))
            }
            _ => Ok(()),
        }
    }

    /// The activations of all directions in a row.
    fn parse_activations(&self) -> Result<Vec<Activation>> {
        let defaults = self.kind.activations().repeat(self.directions());
        let named: Vec<&str> = self.activations.iter().map(String::as_str).collect();
        let names = if named.is_empty() { defaults.clone() } else { named };
        if names.len() != defaults.len() {
            return Err(Error::argument(INIT, "activations", format!("{names:?}"), format!("{} names", defaults.len())));
        }
        let (mut alphas, mut betas) = (self.activation_alpha.iter(), self.activation_beta.iter());
        let parsed = names.iter().map(|name| activation(name, &mut alphas, &mut betas)).collect::<Result<_>>()?;
        for (argument, given, left) in
            [("activation_alpha", &self.activation_alpha, alphas.len()), ("activation_beta", &self.activation_beta, betas.len())]
        {
            if left > 0 {
                let expected = format!("at most {} numbers, which {names:?} take", given.len() - left);
                return Err(Error::argument(INIT, argument, format!("{given:?}"), expected));
            }
        }
        Ok(parsed)
    }

    /// One layer, or two where a cell of ours could not serve both directions.
    fn layers<C: Cell>(
        &self,
        device: &Device,
        config: impl Fn(&[Activation]) -> RecurrentConfig<C>,
    ) -> Result<Vec<Recurrent<C>>> {
        let activations = self.parse_activations()?;
        let (first, last) = activations.split_at(self.kind.activations().len());
        let parts = match self.direction {
            Direction::Both if first != last => vec![(Direction::Forward, first), (Direction::Reverse, last)],
            direction => vec![(direction, first)],
        };
        let mut layers = Vec::new();
        for (direction, activations) in parts {
            let config = config(activations).direction(direction).bias(self.b.is_some());
            let layer = config.init(device, &mut Rng::seed(0))?;
            for (name, param) in layer.params() {
                param.set(&self.parameter(&name))?;
            }
            layers.push(layer);
        }
        Ok(layers)
    }

    /// The values of our parameter `name`: `weight_ih_l0`, `bias_hh_l0_reverse`, ...
    fn parameter(&self, name: &str) -> Vec<f32> {
        let of_direction = |values: &Vec<f32>| {
            let size = values.len() / self.directions();
            let at = usize::from(self.directions() == 2 && name.ends_with("_reverse"));
            values[at * size..(at + 1) * size].to_vec()
        };
        let bias = |half: usize| {
            let both = self.b.as_ref().map(of_direction).unwrap_or_default();
            both[half * both.len() / 2..(half + 1) * both.len() / 2].to_vec()
        };
        let (values, order) = match name.split_once("_l0").map_or(name, |(kind, _)| kind) {
            "weight_ih" => (of_direction(&self.w), self.kind.gates()),
            "weight_hh" => (of_direction(&self.r), self.kind.gates()),
            "bias_ih" => (bias(0), self.kind.gates()),
            "bias_hh" => (bias(1), self.kind.gates()),
            "weight_peephole" => (self.p.as_ref().map(of_direction).unwrap_or_default(), PEEPHOLES),
            other => unreachable!("these layers have no {other}"),
        };
        let size = values.len() / order.len();
        order.iter().flat_map(|gate| &values[gate * size..(gate + 1) * size]).copied().collect()
    }
}

const INIT: &str = "onnx.Operator.init";
const FORWARD: &str = "onnx.Layer.forward";

/// The activation of this name, which takes its numbers from the lists as they come.
fn activation<'a>(
    name: &str,
    alphas: &mut impl Iterator<Item = &'a f32>,
    betas: &mut impl Iterator<Item = &'a f32>,
) -> Result<Activation> {
    // Where ONNX has no operator of that name any more, it gives no default either.
    let needed = |argument: &str, number: Option<&f32>| match number {
        Some(number) => Ok(*number),
        None => Err(Error::argument(INIT, argument, "used up", format!("a number for {name}, which has no default"))),
    };
    let mut alpha = |default: f32| alphas.next().copied().unwrap_or(default);
    Ok(match name.to_ascii_lowercase().as_str() {
        "sigmoid" => Activation::Sigmoid,
        "tanh" => Activation::Tanh,
        "relu" => Activation::Relu,
        "softsign" => Activation::Softsign,
        "softplus" => Activation::Softplus,
        "hardsigmoid" => Activation::HardSigmoid { alpha: alpha(0.2), beta: betas.next().copied().unwrap_or(0.5) },
        "leakyrelu" => match alpha(0.01) {
            0.0 => Activation::Relu,
            alpha => Activation::LeakyRelu { alpha },
        },
        "elu" => Activation::Elu { alpha: alpha(1.0) },
        "thresholdedrelu" => Activation::ThresholdedRelu { alpha: alpha(1.0) },
        "scaledtanh" => Activation::ScaledTanh {
            alpha: needed("activation_alpha", alphas.next())?,
            beta: needed("activation_beta", betas.next())?,
        },
        "affine" => Activation::Affine {
            alpha: needed("activation_alpha", alphas.next())?,
            beta: needed("activation_beta", betas.next())?,
        },
        _ => {
            let expected =
                "Sigmoid, Tanh, Relu, HardSigmoid, Softsign, Softplus, LeakyRelu, Elu, ThresholdedRelu, ScaledTanh or Affine";
            return Err(Error::argument(INIT, "activations", format!("{name:?}"), expected));
        }
    })
}

/// The layers that do an operator's work: one of that direction, or two, forward and reverse, where the activations of the two
/// directions differ.
#[derive(Debug)]
pub enum Network {
    /// Of an RNN.
    Rnn(Vec<Rnn>),
    /// Of a GRU.
    Gru(Vec<Gru>),
    /// Of an LSTM.
    Lstm(Vec<Lstm>),
}

/// An ONNX operator on a device.
#[derive(Debug)]
pub struct Layer {
    network: Network,
    device: Device,
    directions: usize,
    input: usize,
    hidden: usize,
    batch_first: bool,
}

/// An operator's inputs beside X and the weights; shapes are those of `layout` 0, in brackets those of 1.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inputs<'a> {
    /// Valid steps of each row; `None`: all. A row of length 0 keeps its initial state, which ONNX leaves open.
    pub sequence_lens: Option<&'a Lengths>,
    /// `[D, batch, H]` (`[batch, D, H]`); `None`: zeros.
    pub initial_h: Option<&'a Tensor>,
    /// The same of an LSTM's cell state.
    pub initial_c: Option<&'a Tensor>,
}

/// An operator's outputs; shapes are those of `layout` 0, in brackets those of 1.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// `[seq, D, batch, H]` (`[batch, seq, D, H]`), zero past a row's end.
    pub y: Tensor,
    /// h after each row's last step `[D, batch, H]` (`[batch, D, H]`).
    pub y_h: Tensor,
    /// The same of an LSTM's cell state.
    pub y_c: Option<Tensor>,
}

impl Layer {
    /// The layers, to look at their parameters.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The layers, to train them, or to put them among others. They take and give [`crate::nn`]'s layouts: `[seq, batch, features]`,
    /// with the directions side by side.
    pub fn into_network(self) -> Network {
        self.network
    }

    /// The operator's outputs for X `[seq, batch, I]`, with `batch_first` `[batch, seq, I]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] or [`crate::ErrorKind::DeviceMismatch`] for an input that does not fit, or an `initial_c` where
    /// there is no cell state; what the device reports.
    pub fn forward(&self, x: &Tensor, inputs: Inputs<'_>) -> Result<Outputs> {
        self.device.expect_same(FORWARD, "x", x.device())?;
        let &[a, b, features] = x.shape() else { return Err(self.wrong_x(x)) };
        if features != self.input {
            return Err(self.wrong_x(x));
        }
        let (steps, rows) = if self.batch_first { (b, a) } else { (a, b) };
        for (name, state) in [("initial_h", inputs.initial_h), ("initial_c", inputs.initial_c)] {
            let Some(state) = state else { continue };
            self.device.expect_same(FORWARD, name, state.device())?;
            let (shape, names) = match self.batch_first {
                true => ([rows, self.directions, self.hidden], "[batch, directions, hidden]"),
                false => ([self.directions, rows, self.hidden], "[directions, batch, hidden]"),
            };
            state.expect_shape(FORWARD, name, &shape, names)?;
        }
        if inputs.initial_c.is_some() && !matches!(self.network, Network::Lstm(_)) {
            return Err(Error::argument(FORWARD, "initial_c", "given", "none: only an LSTM has a cell state"));
        }
        let x = self.turned(x)?;
        let (y, finals) = match &self.network {
            Network::Rnn(layers) => self.run(layers, &x, inputs)?,
            Network::Gru(layers) => self.run(layers, &x, inputs)?,
            Network::Lstm(layers) => self.run(layers, &x, inputs)?,
        };
        let mut finals = finals.iter().map(|tensor| self.turned(tensor)).collect::<Result<Vec<_>>>()?;
        let y_c = if finals.len() == 2 { finals.pop() } else { None };
        let Some(y_h) = finals.pop() else { unreachable!("every state has an h") };
        let (directions, hidden) = (self.directions, self.hidden);
        let y = match self.batch_first {
            true => transpose::leading(&y)?.reshape([rows, steps, directions, hidden])?,
            false if directions == 1 => y.reshape([steps, 1, rows, hidden])?,
            false => {
                let apart = transpose::leading(&y.reshape([steps * rows, directions, hidden])?)?;
                let joined = transpose::leading(&apart.reshape([directions, steps, rows * hidden])?)?;
                joined.reshape([steps, directions, rows, hidden])?
            }
        };
        Ok(Outputs { y, y_h, y_c })
    }

    fn wrong_x(&self, x: &Tensor) -> Error {
        let order = if self.batch_first { "batch, seq" } else { "seq, batch" };
        Error::shape(FORWARD, "x", x.shape(), format!("[{order}, {}]", self.input))
    }

    /// From the operator's layout to ours and back: with `batch_first` the two leading dimensions exchanged.
    fn turned(&self, tensor: &Tensor) -> Result<Tensor> {
        if self.batch_first { transpose::leading(tensor) } else { Ok(tensor.clone()) }
    }

    /// y `[seq, batch, D * H]` and the final state's tensors `[D, batch, H]` for x `[seq, batch, I]`.
    fn run<C: Cell>(&self, layers: &[Recurrent<C>], x: &Tensor, inputs: Inputs<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let (steps, rows, hidden) = (x.shape()[0], x.shape()[1], self.hidden);
        let size = self.directions * rows * hidden / layers.len();
        let names = C::Value::NAMES;
        let given = [inputs.initial_h, inputs.initial_c].map(|state| state.map(|state| self.turned(state)).transpose());
        let given = given.into_iter().take(names.len()).collect::<Result<Vec<_>>>()?;
        let part = |at: usize, from: Option<&Tensor>| -> Result<Tensor> {
            let shape = [self.directions / layers.len(), rows, hidden];
            let Some(from) = from else { return Tensor::zeros(&self.device, shape) };
            let part = Tensor::uninitialized(&self.device, shape)?;
            part.copy_from(&from.slice(at * size, [size]))?;
            Ok(part)
        };
        let mut outputs = Vec::new();
        for (at, layer) in layers.iter().enumerate() {
            let state = given.iter().map(|from| part(at, from.as_ref())).collect::<Result<Vec<_>>>()?;
            let state = C::Value::from_tensors(state);
            outputs.push(layer.forward(x, Input::new().lengths(inputs.sequence_lens).state(state.as_ref()))?);
        }
        if let [(y, state)] = &outputs[..] {
            return Ok((y.clone(), state.tensors().into_iter().cloned().collect()));
        }
        let width = self.directions * hidden;
        let y = Tensor::uninitialized(&self.device, [steps, rows, width])?;
        let new_final = |_: &&str| Tensor::uninitialized(&self.device, [self.directions, rows, hidden]);
        let finals = names.iter().map(new_final).collect::<Result<Vec<_>>>()?;
        for (at, (part, state)) in outputs.iter().enumerate() {
            copy_columns(Matrix::new(part, steps * rows, hidden), Matrix::window(&y, at * hidden, steps * rows, hidden, width))?;
            for (whole, part) in finals.iter().zip(state.tensors()) {
                whole.slice(at * size, [size]).copy_from(part)?;
            }
        }
        Ok((y, finals))
    }
}
