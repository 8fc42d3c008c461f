//! Layers: each computes a forward pass, records a tape for training, and turns the gradient of its output into those of
//! its input and its parameters.

mod dropout;
mod embedding;
mod encoder_decoder;
mod linear;
mod param;
mod pooling;
mod recurrent;
mod residual;
mod rows;
mod sequential;
mod stream;

use std::any::Any;

pub use crate::kernels::activation::Activation;
pub use crate::kernels::half::Precision;
pub use crate::kernels::sample::Choice;
pub use dropout::Dropout;
pub use embedding::{Embedding, EmbeddingConfig};
pub use encoder_decoder::{
    Decoded, Decoding, EncoderDecoder, EncoderDecoderConfig, EncoderDecoderTape, GruEncoderDecoder, LstmEncoderDecoder,
};
pub use linear::{Linear, LinearConfig};
pub(crate) use param::Version;
pub use param::{Module, Param};
pub use pooling::{LastState, LastStep, MaxOverTime, MeanOverTime};
#[cfg(feature = "verify")]
pub(crate) use recurrent::SweepAlone;
pub use recurrent::{
    Backpropagated, BoundedBptt, BpttPlan, Cell, CellState, Direction, GradientFlow, Gru, GruConfig, HiddenState, IndRnn,
    IndRnnConfig, Inspection, Lstm, LstmConfig, LstmState, LstmTape, Merge, MinGru, MinGruConfig, MinLstm, MinLstmConfig,
    NonFinite, Quantity, Recurrent, RecurrentConfig, RecurrentTape, Reset, Rnn, RnnConfig, SLstm, SLstmConfig, SLstmState,
    SpectralRadii, StateFlow, Verdict,
};
pub use residual::{Around, Beside, Join, Residual, Skip, Sum};
pub use sequential::{Sequential, SequentialTape, State};
pub use stream::{Stream, StreamId};

use crate::error::{Error, ErrorKind, Result};
use crate::rng::MaskKey;
use crate::tensor::{Ids, Lengths, Tensor};

/// What goes into a layer: numbers, or token ids.
#[derive(Clone, Debug)]
pub enum Value {
    /// Numbers: `[T, B, F]`, time-major, or `[B, F]`.
    Numbers(Tensor),
    /// Token ids: `[T, B]`, time-major.
    Ids(Ids),
}

impl Value {
    /// The numbers, or an error that names the layer.
    pub fn numbers(&self, op: &str) -> Result<&Tensor> {
        match self {
            Value::Numbers(tensor) => Ok(tensor),
            Value::Ids(_) => Err(Error::argument(op, "x", "token ids", "numbers [.., features] (an Embedding makes them)")),
        }
    }

    /// The token ids, or an error that names the layer.
    pub fn ids(&self, op: &str) -> Result<&Ids> {
        match self {
            Value::Ids(ids) => Ok(ids),
            Value::Numbers(_) => Err(Error::argument(op, "x", "numbers", "token ids [seq, batch]")),
        }
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Value::Numbers(tensor)
    }
}

impl From<&Tensor> for Value {
    fn from(tensor: &Tensor) -> Self {
        Value::Numbers(tensor.clone())
    }
}

impl From<Ids> for Value {
    fn from(ids: Ids) -> Self {
        Value::Ids(ids)
    }
}

impl From<&Ids> for Value {
    fn from(ids: &Ids) -> Self {
        Value::Ids(ids.clone())
    }
}

/// What a forward pass may be given beside x; `S` is the state. `None` or a reference to a state also stand for one.
/// Each setter takes a value or an `Option` of it.
#[derive(Debug)]
pub struct Input<'a, S> {
    lengths: Option<&'a Lengths>,
    state: Option<&'a S>,
    key: Option<MaskKey>,
    teacher: Option<(&'a Tensor, f32)>,
}

impl<S> Clone for Input<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Input<'_, S> {}

impl<S> Default for Input<'_, S> {
    fn default() -> Self {
        Self { lengths: None, state: None, key: None, teacher: None }
    }
}

impl<'a, S> Input<'a, S> {
    /// All rows of full length, an initial state of zeros, no random masks.
    pub fn new() -> Self {
        Self::default()
    }

    /// The valid steps of each row: any order, 0 allowed. Past its end a row keeps its state and outputs zeros. The values of x
    /// there do not matter, but must be finite: the gradient of the weights multiplies them by zero.
    pub fn lengths(self, lengths: impl Into<Option<&'a Lengths>>) -> Self {
        Self { lengths: lengths.into(), ..self }
    }

    /// The initial state.
    pub fn state(self, state: impl Into<Option<&'a S>>) -> Self {
        Self { state: state.into(), ..self }
    }

    /// The key of this pass's random masks; a layer with dropout, zoneout or the like needs one to train.
    pub fn key(self, key: impl Into<Option<MaskKey>>) -> Self {
        Self { key: key.into(), ..self }
    }

    /// Teacher forcing, for networks whose recurrence goes through the output only: in each row and step the recurrence sees, with
    /// this probability, the target of the step before in place of the layer's own output. With 1 nothing recurs: all steps run
    /// at once, without back-propagation through time (Williams & Zipser 1989); with 0 the network runs free; between them it is
    /// scheduled sampling (Bengio et al. 2015), which needs a key. `targets [seq, batch, outputs]`.
    pub fn teacher(self, targets: &'a Tensor, probability: f32) -> Self {
        Self { teacher: Some((targets, probability)), ..self }
    }
}

impl<'a, S> From<Option<&'a S>> for Input<'a, S> {
    fn from(state: Option<&'a S>) -> Self {
        Self { state, ..Self::new() }
    }
}

impl<'a, S> From<&'a S> for Input<'a, S> {
    fn from(state: &'a S) -> Self {
        Self::new().state(state)
    }
}

/// What a layer may need beside its input.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context<'a> {
    /// Valid steps of each row; `None`: all.
    pub lengths: Option<&'a Lengths>,
    /// The layer's initial state, in its own order of tensors; empty: zeros.
    pub state: &'a [Tensor],
    /// Key of this pass's random masks; needed where a layer draws one.
    pub key: Option<MaskKey>,
    /// Targets in place of a layer's own outputs in its recurrence, and the probability of each: see [`Input::teacher`].
    pub teacher: Option<(&'a Tensor, f32)>,
}

/// What a layer gives back.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its output.
    pub y: Tensor,
    /// Its final state; empty for layers without one.
    pub state: Vec<Tensor>,
}

/// What a layer's forward pass left for its backward pass; only that layer can read it.
pub struct Tape(Box<dyn Any + Send>);

impl Tape {
    /// Wraps what the layer needs.
    pub fn new(content: impl Any + Send) -> Self {
        Self(Box::new(content))
    }

    /// What [`Tape::new`] got.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when another kind of layer wrote it.
    pub fn open<T: Any>(self, op: &str) -> Result<T> {
        match self.0.downcast() {
            Ok(content) => Ok(*content),
            Err(_) => Err(Error::argument(op, "tape", "of another layer", "the tape of this layer's forward_train")),
        }
    }
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tape")
    }
}

/// A layer that [`Sequential`] can hold. An application may write its own:
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::nn::{Context, Layer, Module, Output, Param, Sequential, Tape, Value};
/// use gatefold::{Device, Result, Tensor};
///
/// /// y = gain * x, with a gain for each feature.
/// struct Gain(Param);
///
/// impl Module for Gain {
///     fn params(&self) -> Vec<(String, &Param)> {
///         vec![("gain".into(), &self.0)]
///     }
///     fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
///         vec![("gain".into(), &mut self.0)]
///     }
/// }
///
/// impl Layer for Gain {
///     fn kind(&self) -> &'static str {
///         "gain"
///     }
///     fn forward(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
///         Ok(Output { y: x.numbers("gain.forward")?.mul(self.0.value())?, state: Vec::new() })
///     }
///     fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
///         Ok((self.forward(x, context)?, Tape::new(x.numbers("gain.forward")?.clone())))
///     }
///     fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
///         let x: Tensor = tape.open("gain.backward")?;
///         self.0.accumulate(&x.mul(dy)?)?; // summed over all steps and rows
///         needs_dx.then(|| dy.mul(self.0.value())).transpose()
///     }
/// }
///
/// let device = Device::cpu();
/// let model = Sequential::new().push(Gain(Param::new("gain", &device, &[2.0, 3.0], [2])?));
/// let x = Tensor::from_slice(&device, &[1.0, 10.0, 5.0, 50.0], [2, 1, 2])?;
/// let (y, _, tape) = model.forward_train(&x, None)?;
/// assert_eq!(y.to_vec()?, [2.0, 30.0, 10.0, 150.0]);
/// model.backward(tape, &Tensor::from_slice(&device, &[1.0; 4], [2, 1, 2])?)?;
/// assert_eq!(model.params()[0].1.grad().to_vec()?, [6.0, 60.0]);
/// # Ok(()) }
/// ```
pub trait Layer: Module + Send + Sync {
    /// Its name in errors: `lstm`, `linear`.
    fn kind(&self) -> &'static str;

    /// The output for `x`.
    ///
    /// # Errors
    /// What the layer refuses, and what its device reports.
    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output>;

    /// The same, with a tape for [`Layer::backward`]; random masks are drawn here.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)>;

    /// From the gradient of the output: adds to the gradients of the parameters, and, if asked for and x was numbers,
    /// gives that of x.
    ///
    /// # Errors
    /// What the layer refuses, and what its device reports.
    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>>;

    /// The same where gradients also flow through the state, from one window of a sequence to the one before it: from the gradient
    /// of the final state (empty: zeros) also to that of the initial one, both in the layer's own order of tensors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] from a layer with a state that does not say how; as [`Layer::backward`].
    fn backward_from(&self, tape: Tape, dy: &Tensor, dstate: &[Tensor], needs_dx: bool) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let op = format!("{}.backward_from", self.kind());
        match (self.state_len(), dstate.len()) {
            (0, 0) => Ok((self.backward(tape, dy, needs_dx)?, Vec::new())),
            (0, given) => Err(Error::argument(&op, "dstate", format!("{given} tensors"), "none: this layer has no state")),
            _ => Err(Error::unsupported(&op, "this layer gives no gradient of its state")),
        }
    }

    /// Whether it can use [`Context::teacher`]; a model whose last layer cannot is refused one.
    fn takes_teacher(&self) -> bool {
        false
    }

    /// How many tensors its state has: a row of layers inside another one finds each layer's part of its state by that.
    fn state_len(&self) -> usize {
        0
    }

    /// One step of a stream: x `[B, F]`, or ids `[B]`, and the state so far give y `[B, ..]` and the next state.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] from a layer that cannot stream, which is every layer that does not say how; as
    /// [`Layer::forward`].
    fn step(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let _ = (x, context);
        Err(Error::unsupported(&format!("{}.step", self.kind()), "this layer cannot stream: it has no single step"))
    }
}

/// The tape of another layer, or of this one before its parameters changed.
fn stale_tape(op: &str) -> Error {
    let what = "the tape does not fit: the parameters changed since it was recorded, or it is another layer's";
    Error::new(ErrorKind::Argument, format!("{op}: {what}"))
}

/// `op: argument is ..` where `tensor` is memory of one of the parameters: kernels write those, or bind them in another way.
fn expect_apart<'a>(op: &str, argument: &str, tensor: &Tensor, params: impl IntoIterator<Item = &'a Param>) -> Result<()> {
    match params.into_iter().find(|param| tensor.shares_memory(param.value()) || tensor.shares_memory(param.grad())) {
        None => Ok(()),
        Some(param) => {
            let given = format!("the memory of {}", param.name());
            Err(Error::argument(op, argument, given, "a tensor of its own (Tensor.to_device makes a copy)"))
        }
    }
}

/// `op: x has shape .., expected [.., features]`; gives the number of rows before the last dimension.
fn rows_of(op: &str, x: &Tensor, features: usize) -> Result<usize> {
    match x.shape() {
        [.., last] if *last == features => Ok(x.len() / features),
        shape => Err(Error::shape(op, "x", shape, format!("[.., {features}]"))),
    }
}
