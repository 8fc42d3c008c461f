//! Layers x directions of a recurrent cell: one generic core, of which [`Lstm`], [`Gru`], [`Rnn`] and others are faces.

mod bptt;
mod config;
mod flow;
mod inspect;
mod state;
#[cfg(feature = "verify")]
mod sweep_alone;
mod wavefront;
mod weights;

use std::ops::Range;

pub use bptt::{Backpropagated, BoundedBptt, BpttPlan};
pub use config::{
    Direction, GruConfig, IndRnnConfig, LstmConfig, Merge, MinGruConfig, MinLstmConfig, RecurrentConfig, Reset, RnnConfig,
    SLstmConfig,
};
pub use flow::{GradientFlow, SpectralRadii, StateFlow, Verdict};
pub use inspect::{Inspection, NonFinite, Quantity};
pub use state::{CellState, HiddenState, LstmState, SLstmState};
#[cfg(feature = "verify")]
pub(crate) use sweep_alone::SweepAlone;
use wavefront::Between;
use weights::Weights;

use super::param::CachedCopy;
use super::{Context, Input, Layer, Module, Output, Param, Tape, Value, Version, expect_apart};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::activation::Activation;
use crate::kernels::cell_contract::{Block, CellKernel, is_gated, norm_groups, recurrent_runs};
use crate::kernels::cell_gru::GruCell;
use crate::kernels::cell_indrnn::IndRnnCell;
use crate::kernels::cell_lstm::LstmCell;
use crate::kernels::cell_min_gru::MinGruCell;
use crate::kernels::cell_min_lstm::MinLstmCell;
use crate::kernels::cell_rnn::RnnCell;
use crate::kernels::cell_slstm::SLstmCell;
use crate::kernels::column_sum::column_sum;
use crate::kernels::gate_mask::{self, Masks};
use crate::kernels::gather;
use crate::kernels::gemm::Matrix;
use crate::kernels::gemm_half::{part_of_product, product};
use crate::kernels::half::{Factor, Precision};
use crate::kernels::layer_norm::GateNorm;
use crate::kernels::output_step::Teacher;
use crate::kernels::sweep::{self, Buffers, Inputs, Plan, Run, Side, Sweep};
use crate::kernels::sweep_grid;
use crate::kernels::sweep_pair::{self, OutputGradients, Outputs};
use crate::kernels::sweep_resident;
use crate::kernels::sweep_rows::{RowNorms, StateNorm, lines_of};
use crate::kernels::sweep_scan;
use crate::kernels::sweep_split::{self, Extras, OutputProduct, SplitSide, recurrent_gradient};
use crate::kernels::sweep_step;
use crate::kernels::{dropout, elementwise, transpose};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Ids, Lengths, Tensor};

/// A recurrent cell. The crate's own kernels implement it.
pub trait Cell: CellKernel + Default + std::fmt::Debug {
    /// Its name in errors: `lstm`.
    const NAME: &'static str;
    /// The name of the unit parameters that are no biases.
    const EXTRA: &'static str = "";
    /// The names of its gates: the first values that it keeps of each step.
    const GATES: &'static [&'static str];
    /// The range that they are drawn from; `None`: that of all other parameters.
    const EXTRA_RANGE: Option<(f32, f32)> = None;
    /// Its state as a user meets it.
    type Value: CellState;
    /// With layer normalization, where h is made of a normalized state: the cell that leaves the other factor of h in its place,
    /// and the activation of the normalized state.
    fn normalized_output(&self) -> Option<(Self, Activation)> {
        None
    }
    /// Whether a forget bias has an effect.
    fn has_forget_gate(&self) -> bool {
        true
    }
    /// Whether its options are in their ranges.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for one that is not.
    fn check(&self, op: &str) -> Result<()>;
    /// What the values of a gate of [`Cell::GATES`] come out of, where that is one activation.
    fn gate_activation(&self, gate: usize) -> Option<Activation>;
}

impl Cell for LstmCell {
    const NAME: &'static str = "lstm";
    const GATES: &'static [&'static str] = &["i", "f", "g", "o"];
    const EXTRA: &'static str = "weight_peephole";
    type Value = LstmState;

    fn normalized_output(&self) -> Option<(Self, Activation)> {
        let one = Activation::Affine { alpha: 0.0, beta: 1.0 };
        Some((Self { output: one, ..*self }, self.output))
    }

    fn has_forget_gate(&self) -> bool {
        !self.coupled
    }

    fn check(&self, op: &str) -> Result<()> {
        for (name, activation) in [("gate", self.gate), ("candidate", self.candidate), ("output", self.output)] {
            config::check_activation(op, &format!("the {name} activation"), activation)?;
        }
        config::check_limit(op, "gate_clip", self.clip)?;
        config::check_limit(op, "cell_clip", self.cell_clip)
    }

    fn gate_activation(&self, gate: usize) -> Option<Activation> {
        match gate {
            1 if self.coupled => None, // 1 - i
            2 => Some(self.candidate),
            _ => Some(self.gate),
        }
    }
}

impl Cell for GruCell {
    const NAME: &'static str = "gru";
    const GATES: &'static [&'static str] = &["r", "z", "n"];
    type Value = HiddenState;

    fn check(&self, op: &str) -> Result<()> {
        config::check_activation(op, "the gate activation", self.gate)?;
        config::check_activation(op, "the candidate activation", self.candidate)?;
        config::check_limit(op, "gate_clip", self.clip)
    }

    fn gate_activation(&self, gate: usize) -> Option<Activation> {
        Some(if gate == 2 { self.candidate } else { self.gate })
    }
}

impl Cell for RnnCell {
    const NAME: &'static str = "rnn";
    const GATES: &'static [&'static str] = &["h"];
    type Value = HiddenState;

    fn check(&self, op: &str) -> Result<()> {
        config::check_activation(op, "activation", self.activation)?;
        config::check_limit(op, "gate_clip", self.clip)
    }

    fn gate_activation(&self, _: usize) -> Option<Activation> {
        Some(self.activation)
    }
}

impl Cell for IndRnnCell {
    const NAME: &'static str = "indrnn";
    const GATES: &'static [&'static str] = &["h"];
    const EXTRA: &'static str = "weight_hh";
    const EXTRA_RANGE: Option<(f32, f32)> = Some((0.0, 1.0));
    type Value = HiddenState;

    fn check(&self, op: &str) -> Result<()> {
        config::check_activation(op, "activation", self.activation)
    }

    fn gate_activation(&self, _: usize) -> Option<Activation> {
        Some(self.activation)
    }
}

impl Cell for SLstmCell {
    const NAME: &'static str = "slstm";
    const GATES: &'static [&'static str] = &["i_pre", "f_pre", "z", "o"];
    type Value = SLstmState;

    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn gate_activation(&self, gate: usize) -> Option<Activation> {
        match gate {
            2 => Some(Activation::Tanh),
            3 => Some(Activation::Sigmoid),
            _ => None, // kept as they are before their exponentials
        }
    }
}

impl Cell for MinGruCell {
    const NAME: &'static str = "min_gru";
    const GATES: &'static [&'static str] = &["z", "n"];
    type Value = HiddenState;

    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn gate_activation(&self, gate: usize) -> Option<Activation> {
        (gate == 0).then_some(Activation::Sigmoid)
    }
}

impl Cell for MinLstmCell {
    const NAME: &'static str = "min_lstm";
    const GATES: &'static [&'static str] = &["f_pre", "i_pre", "n"];
    type Value = HiddenState;

    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn gate_activation(&self, _: usize) -> Option<Activation> {
        None // f and i are kept as they are before their sigmoids
    }
}

/// Layers x directions of a recurrent cell.
#[derive(Debug)]
pub struct Recurrent<C: Cell> {
    config: RecurrentConfig<C>,
    device: Device,
    /// Layer by layer, in each layer by direction.
    weights: Vec<Weights>,
    /// Of each layer.
    side_copies: Vec<SideCopies>,
}

/// Where a sweep takes both directions of a layer at once, or this layer and the next, what it reads of both, one behind the other.
#[derive(Debug, Default)]
struct SideCopies {
    /// W_hh as forward sweeps read it.
    recurrent: CachedCopy<Vec<Tensor>>,
    /// See [`Weights::unit`].
    units: CachedCopy<Vec<Tensor>>,
    /// W_hr transposed.
    outputs: CachedCopy<Vec<Tensor>>,
}

/// Long short-term memory, with the equations, gate order and parameter names of PyTorch's `nn.LSTM`.
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::{Device, Rng, Tensor, nn::LstmConfig};
/// let device = Device::cpu();
/// let lstm = LstmConfig::new(3, 8).layers(2).init(&device, &mut Rng::seed(0))?;
/// let x = Tensor::zeros(&device, [5, 2, 3])?; // seq, batch, input
/// let (y, state) = lstm.forward(&x, None)?;
/// assert_eq!((y.shape(), state.h.shape()), (&[5, 2, 8][..], &[2, 2, 8][..]));
/// # Ok(()) }
/// ```
pub type Lstm = Recurrent<LstmCell>;
/// The gated recurrent unit, with the equations, gate order and parameter names of PyTorch's `nn.GRU`.
pub type Gru = Recurrent<GruCell>;
/// The vanilla recurrent network, with the equations and parameter names of PyTorch's `nn.RNN`: `h(t) = tanh(b + W h(t-1) + U x(t))`.
/// [`RnnConfig::jordan`] makes it one whose recurrence goes through the output only.
pub type Rnn = Recurrent<RnnCell>;
/// The independently recurrent network (Li et al. 2018, "Independently Recurrent Neural Network"):
/// `h(t) = act(W x(t) + b + u h(t-1))`, products of vectors elementwise, relu unless [`IndRnnConfig::activation`] says otherwise.
///
/// A unit sees its own past alone; another layer mixes units. Parameters: `weight_ih [hidden, input]`, `bias_ih [hidden]`,
/// `weight_hh [hidden]`, which is u. u starts as U(0, 1): of the paper's range for relu, `[0, 2^(1/T)]`, what fits any number of
/// steps T.
pub type IndRnn = Recurrent<IndRnnCell>;
/// The scalar LSTM of xLSTM (Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory"), stabilized, with an exponential input
/// gate, a sigmoid forget gate and full recurrent matrices. Gates i, f, z, o, in this order; with
/// `s = W_ih x(t) + b_ih + W_hh h(t-1) + b_hh` of each, products of vectors elementwise:
///
/// ```text
/// m = max(log sigmoid(s_f) + m', s_i)    i = exp(s_i - m)    f = exp(log sigmoid(s_f) + m' - m)
/// c = f c' + i tanh(s_z)    n = f n' + i    h = sigmoid(s_o) c / n
/// ```
///
/// A state of zeros is the usual start. From it n grows to what the input gates let in, and where that is less than 1e-30 (s_i
/// some 69 below `log sigmoid(s_f) + m'` at every step so far) nothing was: h is 0 there, and c / n has no gradient.
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::{Device, Rng, Tensor, nn::SLstmConfig};
/// let device = Device::cpu();
/// let slstm = SLstmConfig::new(3, 8).init(&device, &mut Rng::seed(0))?;
/// let (y, state) = slstm.forward(&Tensor::zeros(&device, [5, 2, 3])?, None)?;
/// assert_eq!((y.shape(), state.m.shape()), (&[5, 2, 8][..], &[1, 2, 8][..]));
/// # Ok(()) }
/// ```
pub type SLstm = Recurrent<SLstmCell>;
/// minGRU (Feng et al. 2024, "Were RNNs All We Needed?"), gates z, n, which see x alone, so that `weight_ih [2 * hidden, input]` and
/// `bias_ih [2 * hidden]` are all parameters; with `x = W_ih x(t) + b_ih` of each, products of vectors elementwise:
///
/// ```text
/// h = (1 - z) h' + z g(x_n)    z = sigmoid(x_z)    g(v) = v + 1/2 if v >= 0, else sigmoid(v)
/// ```
///
/// This is linear in h', so that on a GPU long sequences of few rows and units run as a scan, many steps at once; streams, zoneout
/// and the clip of the gradient take one step after another. Both give the same numbers up to rounding.
pub type MinGru = Recurrent<MinGruCell>;
/// minLSTM (Feng et al. 2024, "Were RNNs All We Needed?"), gates f, i, n, which see x alone, so that `weight_ih [3 * hidden, input]`
/// and `bias_ih [3 * hidden]` are all parameters; g and the scan as in [`MinGru`]:
///
/// ```text
/// h = f / (f + i) h' + i / (f + i) g(x_n)    f, i = sigmoid(x)
/// ```
pub type MinLstm = Recurrent<MinLstmCell>;

/// What [`Recurrent::forward_train`] keeps for [`Recurrent::backward`]. Dropping it truncates back-propagation here.
#[derive(Debug)]
pub struct RecurrentTape {
    steps: usize,
    rows: usize,
    lengths: Option<Lengths>,
    key: Option<MaskKey>,
    teacher: Option<(Tensor, f32)>,
    layers: Vec<LayerTape>,
    /// What part of a sequence this is.
    window: Window,
    /// Whether the initial state was given, and not the layer's own.
    given_state: bool,
    /// Whose tape it is, and of which of its parameters' values.
    owner: Version,
    version: u64,
}

/// The tape of an [`Lstm`].
pub type LstmTape = RecurrentTape;

#[derive(Debug)]
struct LayerTape {
    /// The layer's input [T, B, I].
    x: Tensor,
    /// For each direction.
    passes: Vec<PassTape>,
    /// The directions' outputs [T, B, R], where they are multiplied.
    factors: Vec<Tensor>,
}

/// A part of a sequence: the steps before it, and all steps of the sequence.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: usize,
    total: usize,
}

/// What all passes of a run share.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    steps: usize,
    rows: usize,
    window: Window,
    lengths: Option<&'a Lengths>,
    key: Option<MaskKey>,
    teacher: Option<&'a Teacher>,
}

impl Sequence<'_> {
    /// A whole one, without lengths and masks.
    fn plain(steps: usize, rows: usize) -> Self {
        Self { steps, rows, window: Window { start: 0, total: steps }, lengths: None, key: None, teacher: None }
    }
}

/// What one direction of one layer leaves for its backward pass.
#[derive(Debug)]
struct PassTape {
    /// [T, B, SLOTS, H]
    slots: Tensor,
    /// [STATES, T + 1, B, H]
    states: Tensor,
    /// With an output product: o of each step [T + 1, B, R].
    outputs: Option<Tensor>,
    /// With DropConnect: W_hh as the products saw it [G * H, R].
    weights: Option<Tensor>,
    /// With layer normalization.
    norms: Option<Norms>,
}

/// What layer normalization keeps of a pass, each with the statistics of its rows.
#[derive(Debug)]
struct Norms {
    /// The product of x [T * B, G * H].
    input: Kept,
    /// The product of h at each step [T, B, G * H]; statistics of c too, where it is normalized on its way to h.
    recurrent: Kept,
    /// On the CPU c after that [T, B, H].
    values: Option<Tensor>,
}

/// One side of a normalization, and the statistics of its rows [groups, lines, 2].
#[derive(Debug)]
struct Kept {
    rows: Tensor,
    stats: Tensor,
}

/// What one direction of one layer takes and gives beside its parameters.
struct Pass<'a> {
    plan: Plan<'a>,
    /// Layer and direction, as states have them.
    index: usize,
    key: Option<MaskKey>,
    /// B, also where the plan has the steps of all rows as its rows.
    batch: usize,
    teacher: Option<&'a Teacher>,
}

/// What draws under one key, for masks that differ.
mod draws {
    pub const CELL: u32 = 0x6365_6c6c;
    pub const WEIGHTS: u32 = 0x7765_6967;
    pub const TEACHER: u32 = 0x7465_6163;
    pub const GATES: u32 = 0x6761_7465;
}

impl<C: Cell> Recurrent<C> {
    fn init(config: RecurrentConfig<C>, device: &Device, rng: &mut Rng) -> Result<Self> {
        let mut weights = Vec::new();
        for layer in 0..config.layers {
            let inputs = if layer == 0 { config.input } else { config.output_width() };
            for reverse in config.direction.passes() {
                let suffix = format!("_l{layer}{}", if *reverse { "_reverse" } else { "" });
                weights.push(Weights::init(&config, inputs, &suffix, device, rng)?);
            }
        }
        let side_copies = (0..config.layers).map(|_| SideCopies::default()).collect();
        Ok(Self { config, device: device.clone(), weights, side_copies })
    }

    /// Numbers in an input row.
    pub fn input(&self) -> usize {
        self.config.input
    }

    /// Units of a layer and direction.
    pub fn hidden(&self) -> usize {
        self.config.hidden
    }

    /// Numbers in an output row: hidden, or the width of the output product; twice as many for two directions side by side.
    pub fn output(&self) -> usize {
        self.config.output_width()
    }

    /// Outputs and final state for x `[seq, batch, input]`: y `[seq, batch, directions * hidden]`, zero past a row's
    /// end, and the state after each row's own last step. Without dropout and without a tape.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] or [`crate::ErrorKind::DeviceMismatch`] for an x, lengths or state that do not fit; what the
    /// device reports.
    pub fn forward<'a>(&self, x: &Tensor, input: impl Into<Input<'a, C::Value>>) -> Result<(Tensor, C::Value)>
    where
        C::Value: 'a,
    {
        let (y, state, _) = self.run("forward", x, input.into(), false, None)?;
        Ok((y, state))
    }

    /// One step of a stream: x `[batch, input]` and the state so far give y `[batch, hidden]` and the next state.
    ///
    /// # Errors
    /// As [`Recurrent::forward`]; [`crate::ErrorKind::Unsupported`] where time is not read forward: the reverse pass needs the
    /// whole sequence.
    pub fn step<'a>(&self, x: &Tensor, input: impl Into<Input<'a, C::Value>>) -> Result<(Tensor, C::Value)>
    where
        C::Value: 'a,
    {
        let op = self.op("step");
        if self.config.direction != Direction::Forward {
            return Err(Error::unsupported(&op, "streaming needs Direction::Forward; the reverse pass needs the whole sequence"));
        }
        let &[rows, features] = x.shape() else {
            return Err(Error::shape(&op, "x", x.shape(), format!("[batch, {}]", self.config.input)));
        };
        if features != self.config.input {
            return Err(Error::shape(&op, "x", x.shape(), format!("[batch, {}]", self.config.input)));
        }
        let sequence = if self.config.batch_first { [rows, 1, features] } else { [1, rows, features] };
        let (y, state, _) = self.run("step", &x.reshape(sequence)?, input.into(), false, None)?;
        Ok((y.reshape([rows, self.output()])?, state))
    }

    /// As [`Recurrent::forward`], with dropout of every kind, and a tape for [`Recurrent::backward`].
    ///
    /// # Errors
    /// As [`Recurrent::forward`]; [`crate::ErrorKind::Argument`] where dropout has no key.
    pub fn forward_train<'a>(
        &self,
        x: &Tensor,
        input: impl Into<Input<'a, C::Value>>,
    ) -> Result<(Tensor, C::Value, RecurrentTape)>
    where
        C::Value: 'a,
    {
        match self.run("forward_train", x, input.into(), true, None)? {
            (y, state, Some(tape)) => Ok((y, state, tape)),
            (.., None) => unreachable!("a training run records a tape"),
        }
    }

    /// Back-propagation through time: from dy (the shape of y) and the gradient of the final state (`None`: zeros) to the
    /// gradients of x and of the initial state; adds to those of the parameters.
    ///
    /// A long sequence may go through in windows that carry the state. A window whose backward pass gets no gradient of its final
    /// state, or whose tape is dropped, is cut off: back-propagation is truncated. Where all tapes are kept it is not: the last
    /// window's goes first, and each hands on the gradient of its initial state to the one before it.
    ///
    /// ```
    /// # fn main() -> gatefold::Result<()> {
    /// use gatefold::{Device, Rng, Tensor, nn::LstmConfig};
    /// let device = Device::cpu();
    /// let lstm = LstmConfig::new(3, 8).init(&device, &mut Rng::seed(0))?;
    /// let window = || Tensor::from_slice(&device, &[0.5; 4 * 2 * 3], [4, 2, 3]);
    /// let (y1, state, tape1) = lstm.forward_train(&window()?, None)?;
    /// let (y2, _, tape2) = lstm.forward_train(&window()?, &state)?;
    /// let (_, dstate) = lstm.backward(tape2, &y2, None)?; // of sum(y * y) / 2 over both windows
    /// lstm.backward(tape1, &y1, Some(&dstate))?; // with None: truncated between them
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] or [`crate::ErrorKind::DeviceMismatch`] for a dy or dstate that does not fit, or when a parameter
    /// changed since the tape was recorded; what the device reports.
    pub fn backward(&self, tape: RecurrentTape, dy: &Tensor, dstate: Option<&C::Value>) -> Result<(Tensor, C::Value)> {
        match self.run_backward("backward", tape, dy, dstate, true, None)? {
            (Some(dx), dstate) => Ok((dx, dstate)),
            (None, _) => unreachable!("dx was asked for"),
        }
    }

    /// How often [`RecurrentConfig::gradient_clip`] acted on an element of a gradient, in all backward passes so far; exact up to
    /// 2^24 times a unit. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn clipped_gradients(&self) -> Result<u64> {
        let mut total = 0.0;
        for counts in self.weights.iter().filter_map(|weights| weights.clipped.as_ref()) {
            total += counts.to_vec()?.into_iter().map(f64::from).sum::<f64>();
        }
        Ok(total as u64)
    }

    fn op(&self, method: &str) -> String {
        format!("{}.{method}", C::NAME)
    }

    /// What tells this layer from every other.
    fn owner(&self) -> &Version {
        self.weights[0].weight_ih.version()
    }

    fn version(&self) -> u64 {
        self.weights.iter().flat_map(Weights::params).map(|param| param.version().get()).sum()
    }

    /// The width of state `s`: h is as wide as the output.
    fn width_of(&self, s: usize) -> usize {
        if s == 0 { self.config.width() } else { self.config.hidden }
    }

    fn check_state(&self, op: &str, argument: &str, state: &C::Value, rows: usize) -> Result<()> {
        for (s, (name, tensor)) in C::Value::NAMES.iter().zip(state.tensors()).enumerate() {
            let argument = format!("{argument}.{name}");
            self.device.expect_same(op, &argument, tensor.device())?;
            let shape = [self.weights.len(), rows, self.width_of(s)];
            tensor.expect_shape(op, &argument, &shape, "[layers * directions, batch, hidden]")?;
        }
        Ok(())
    }

    /// Uninitialised tensors of a state.
    fn new_state(&self, rows: usize) -> Result<Vec<Tensor>> {
        let state = |s| Tensor::uninitialized(&self.device, [self.weights.len(), rows, self.width_of(s)]);
        (0..C::State::LEN).map(state).collect()
    }

    fn state(&self, tensors: Vec<Tensor>) -> C::Value {
        match C::Value::from_tensors(tensors) {
            Some(state) => state,
            None => unreachable!("a cell and its state have as many tensors"),
        }
    }

    /// The learned initial state, for each row; `None` where it is zero.
    fn learned_state(&self, rows: usize) -> Result<Option<Vec<Tensor>>> {
        if !self.config.learn_initial_state {
            return Ok(None);
        }
        let states = self.new_state(rows)?;
        let first_row = Tensor::zeros(&self.device, [rows])?;
        for (index, weights) in self.weights.iter().enumerate() {
            for (state, param) in states.iter().zip(&weights.initial) {
                let width = param.value().len();
                part(state, index, rows * width).copy_from(&gather::gather(&first_row, param.value(), width)?)?;
            }
        }
        Ok(Some(states))
    }

    /// The layer's output from those of its directions; and these, where backward needs them.
    fn merge(&self, mut outputs: Vec<Tensor>) -> Result<(Tensor, Vec<Tensor>)> {
        match (self.config.merge, &outputs[..]) {
            (Merge::Sum, [a, b]) => Ok((elementwise::add(a, b)?, Vec::new())),
            (Merge::Mean, [a, b]) => Ok((elementwise::scale(&elementwise::add(a, b)?, 0.5)?, Vec::new())),
            (Merge::Product, [a, b]) => Ok((elementwise::multiply(a, b)?, outputs)),
            _ => Ok((outputs.swap_remove(0), Vec::new())),
        }
    }

    /// The gradient of each direction's output from that of the layer's.
    fn merge_backward(&self, dy: &Tensor, factors: &[Tensor]) -> Result<Vec<Tensor>> {
        let directions = self.config.directions();
        match (self.config.merge, factors) {
            (Merge::Mean, _) => Ok(vec![elementwise::scale(dy, 0.5)?; directions]),
            (Merge::Product, [a, b]) => Ok(vec![elementwise::multiply(dy, b)?, elementwise::multiply(dy, a)?]),
            _ => Ok(vec![dy.clone(); directions]),
        }
    }

    /// The key of the mask between a pass's layer and the next; `None` where there is no mask.
    fn mask_key(&self, pass: &Pass<'_>) -> Option<MaskKey> {
        let layer = pass.index / self.config.directions();
        let masked = self.config.dropout > 0.0 && layer + 1 < self.config.layers;
        pass.key.filter(|_| masked).map(|key| key.layer(layer))
    }

    /// Whether targets can stand in for all that recurs.
    fn is_teachable(&self) -> bool {
        let RecurrentConfig { layers, direction, .. } = self.config;
        let recurs = self.config.output.is_some() && !self.config.adds_input(self.config.input);
        recurs && C::State::LEN == 1 && layers == 1 && direction == Direction::Forward
    }

    /// The teacher of a run, after checks; one that always teaches makes all steps independent.
    fn teacher(
        &self,
        op: &str,
        teacher: Option<(&Tensor, f32)>,
        key: Option<MaskKey>,
        shape: [usize; 2],
    ) -> Result<Option<Teacher>> {
        let Some((targets, probability)) = teacher else { return Ok(None) };
        if self.config.output.is_some() && self.config.adds_input(self.config.input) {
            return Err(Error::unsupported(op, "a teacher with residual(true), where the output is not what recurs"));
        }
        if self.config.batch_first {
            return Err(Error::unsupported(op, "a teacher with batch_first(true): its targets are time-major"));
        }
        if !self.is_teachable() {
            let what = "a teacher needs recurrence through the output only, one layer, and time read forward (RnnConfig::jordan)";
            return Err(Error::unsupported(op, what));
        }
        if !(0.0..=1.0).contains(&probability) {
            return Err(Error::argument(op, "the teacher's probability", probability, "in [0, 1]"));
        }
        self.device.expect_same(op, "the teacher's targets", targets.device())?;
        let [steps, rows] = shape;
        targets.expect_shape(op, "the teacher's targets", &[steps, rows, self.config.width()], "[seq, batch, outputs]")?;
        if probability > 0.0 && probability < 1.0 && key.is_none() {
            return Err(Error::argument(
                op,
                "key",
                "not given",
                format!("a MaskKey, which a teacher of probability {probability} needs"),
            ));
        }
        let key = key.map_or(MaskKey::new(0, 0), |key| key.draw(draws::TEACHER, 0));
        Ok(Some(Teacher { targets: targets.clone(), probability, key }))
    }

    fn plan<'a>(&self, sequence: &Sequence<'a>, index: usize) -> Plan<'a> {
        let Sequence { steps, rows, window, lengths, key, .. } = *sequence;
        let direction = index % self.config.directions();
        Plan {
            steps,
            run: Run::whole(steps),
            rows,
            hidden: self.config.hidden,
            reverse: self.config.direction.passes()[direction],
            lengths,
            output: self.config.output.is_none() && self.config.normalized_output().is_none(),
            y_stride: self.output(),
            y_offset: if self.config.is_merged() { 0 } else { direction * self.config.width() },
            key: key.map_or(MaskKey::new(0, 0), |key| key.draw(draws::CELL, index)),
            start: window.start,
            total: window.total,
            random: key.is_some(),
            zoneout: self.config.zoneout,
            clip: self.config.gradient_clip,
            flow: false,
        }
    }

    /// The passes of layers, layer by layer, in each by direction.
    fn passes<'a>(&self, layers: Range<usize>, sequence: &Sequence<'a>) -> Vec<Pass<'a>> {
        let directions = self.config.directions();
        let Sequence { rows, key, teacher, .. } = *sequence;
        let pass = |index| Pass { plan: self.plan(sequence, index), index, key, batch: rows, teacher };
        (layers.start * directions..layers.end * directions).map(pass).collect()
    }

    /// Whether something comes between h and the recurrent product, between that and the cell, or after the cell. `draws`: in
    /// training, with a key.
    fn is_split(&self, draws: bool) -> bool {
        let RecurrentConfig { cell, output, layer_norm, recurrent_dropout, precision, .. } = &self.config;
        let masked = draws && *recurrent_dropout > 0.0;
        // A product in half precision is a kernel of its own.
        let half = C::PRODUCT && *precision == Precision::Half;
        output.is_some() || *layer_norm || cell.gated().is_some() || masked || half
    }

    /// What the steps of a pass are.
    fn steps_of(&self, pass: &Pass<'_>) -> Steps {
        if !self.is_split(pass.key.is_some()) {
            return Steps::Whole;
        }
        let RecurrentConfig { cell, output, layer_norm, precision, .. } = &self.config;
        let only_products =
            !layer_norm && *precision == Precision::Single && pass.teacher.is_none() && self.gate_masks(pass).is_none();
        // Where all steps are the rows of one, large products do better.
        let is_sequence = pass.batch == pass.plan.rows;
        match only_products && is_sequence && sweep_pair::is_fused(&self.device, cell, &pass.plan, output.is_some()) {
            true => Steps::Pairs,
            false => Steps::Split,
        }
    }

    /// How many passes of a layer a sweep takes at once: of two directions both, where it can.
    fn at_once(&self, passes: &[Pass<'_>]) -> usize {
        if sweep::at_once(&self.device, &self.config.cell, &passes[0].plan, self.widths()) { passes.len() } else { 1 }
    }

    /// Numbers of a row of what recurs, and of what layer normalization keeps of a step.
    fn widths(&self) -> [usize; 2] {
        let columns = C::Pre::LEN + usize::from(self.config.normalized_output().is_some());
        [self.config.width(), if self.config.layer_norm { columns * self.config.hidden } else { 0 }]
    }

    /// The masks of recurrent dropout, in training.
    fn gate_masks(&self, pass: &Pass<'_>) -> Option<Masks> {
        let probability = self.config.recurrent_dropout;
        let key = pass.key.filter(|_| probability > 0.0)?;
        Some(Masks { probability, key: key.draw(draws::GATES, pass.index), batch: pass.batch })
    }

    fn run(
        &self,
        method: &str,
        x: &Tensor,
        input: Input<'_, C::Value>,
        train: bool,
        window: Option<Window>,
    ) -> Result<(Tensor, C::Value, Option<RecurrentTape>)> {
        let op = self.op(method);
        let RecurrentConfig { layers, batch_first, .. } = self.config;
        self.device.expect_same(&op, "x", x.device())?;
        if train {
            expect_apart(&op, "x", x, self.weights.iter().flat_map(Weights::params))?;
        }
        let order = if batch_first { "batch, seq" } else { "seq, batch" };
        let expected = || format!("[{order}, {}]", self.config.input);
        let (&[a, b, features], 3) = (x.shape(), x.shape().len()) else {
            return Err(Error::shape(&op, "x", x.shape(), expected()));
        };
        if features != self.config.input {
            return Err(Error::shape(&op, "x", x.shape(), expected()));
        }
        let (steps, rows) = if batch_first { (b, a) } else { (a, b) };
        if let Some(lengths) = input.lengths {
            lengths.check(&op, &self.device, steps, rows)?;
        }
        if let Some(state) = input.state {
            self.check_state(&op, "state", state, rows)?;
        }
        if let (true, None, Some(mask)) = (train, input.key, self.masks()) {
            return Err(Error::argument(&op, "key", "not given", format!("a MaskKey, which {mask} needs")));
        }
        let teacher = self.teacher(&op, input.teacher, input.key, [steps, rows])?;
        let key = input.key.filter(|_| train);

        let window = window.unwrap_or(Window { start: 0, total: steps });
        let finals = self.new_state(rows)?;
        let initial = match input.state {
            Some(state) => Some(state.tensors().into_iter().cloned().collect()),
            None => self.learned_state(rows)?,
        };
        let ends = ForwardEnds { initial: initial.as_deref(), finals: &finals, train };
        let sequence = Sequence { steps, rows, window, lengths: input.lengths, key, teacher: teacher.as_ref() };
        let mut x = if batch_first { transpose::leading(x)? } else { x.clone() };
        let (mut tapes, mut layer) = (Vec::new(), 0);
        while layer < layers {
            let (y, of_layers) = match self.is_wavefront(layer, &sequence, false) {
                true => self.forward_wavefront(layer, &sequence, &x, &ends)?,
                false => self.forward_layer(layer, &sequence, &x, &ends)?,
            };
            x = y;
            layer += of_layers.len();
            if train {
                tapes.extend(of_layers);
            }
        }
        let y = if batch_first { transpose::leading(&x)? } else { x };
        let tape = train.then(|| RecurrentTape {
            steps,
            rows,
            lengths: input.lengths.cloned(),
            key: input.key,
            teacher: input.teacher.map(|(targets, probability)| (targets.clone(), probability)),
            layers: tapes,
            window,
            given_state: input.state.is_some(),
            owner: self.owner().clone(),
            version: self.version(),
        });
        Ok((y, self.state(finals), tape))
    }

    /// What draws masks in training, for an error.
    fn masks(&self) -> Option<String> {
        let RecurrentConfig { dropout, zoneout, weight_dropout, recurrent_dropout, .. } = self.config;
        match () {
            () if dropout > 0.0 => Some(format!("dropout {dropout}")),
            () if zoneout != [0.0; 2] => Some(format!("zoneout {zoneout:?}")),
            () if weight_dropout > 0.0 => Some(format!("weight_dropout {weight_dropout}")),
            () if recurrent_dropout > 0.0 => Some(format!("recurrent_dropout {recurrent_dropout}")),
            () => None,
        }
    }

    /// A layer by itself: from its x `[T, B, I]` and the initial state of all layers to what the next one sees, its tape and, in `finals`,
    /// its final state.
    fn forward_layer(
        &self,
        layer: usize,
        sequence: &Sequence<'_>,
        x: &Tensor,
        ends: &ForwardEnds<'_>,
    ) -> Result<(Tensor, Vec<LayerTape>)> {
        let of_layer = self.passes(layer..layer + 1, sequence);
        let shape = [sequence.steps, sequence.rows, self.output()];
        // One for both directions, or one for each.
        let shared = if self.config.is_merged() { None } else { Some(Tensor::uninitialized(&self.device, shape)?) };
        let (mut passes, mut outputs) = (Vec::new(), Vec::new());
        for at_once in of_layer.chunks(self.at_once(&of_layer)) {
            let ys = match &shared {
                Some(y) => vec![y.clone(); at_once.len()],
                None => Tensor::in_a_row(&self.device, shape, at_once.len())?,
            };
            passes.extend(match sequence.teacher {
                Some(teacher) if teacher.probability >= 1.0 => self.forced(&at_once[0], x, &ys, ends)?,
                _ => self.forward_passes(at_once, std::slice::from_ref(x), &ys, ends)?,
            });
            outputs.extend(ys);
        }
        let (y, factors) = self.merge(outputs)?;
        let y = self.passed_on(&of_layer[0], &y, x, Run::whole(sequence.steps))?;
        Ok((y, vec![LayerTape { x: x.clone(), passes, factors }]))
    }

    /// What a layer gives to the next: its output y `[steps, B, R]`, masked, with its x added. `run`: which steps these are.
    fn passed_on(&self, pass: &Pass<'_>, y: &Tensor, x: &Tensor, run: Run) -> Result<Tensor> {
        let Plan { start, rows, lengths, .. } = pass.plan;
        let mut y = y.clone();
        if let Some(key) = self.mask_key(pass) {
            y = dropout::dropout(&y, [start + run.first, rows, self.output()], self.config.dropout, key)?;
        }
        if self.config.adds_input(x.shape()[2]) {
            y = elementwise::add(&y, &valid_rows(x, lengths, run.first)?)?;
        }
        Ok(y)
    }

    /// Passes that a sweep takes at once: from x `[T, B, I]`, of each layer, and the initial state to y and the final state of each.
    fn forward_passes(&self, passes: &[Pass<'_>], xs: &[Tensor], ys: &[Tensor], ends: &ForwardEnds<'_>) -> Result<Vec<PassTape>> {
        let ForwardEnds { initial, finals, train } = *ends;
        let depth = if train { passes[0].plan.steps + 1 } else { 2 };
        let from_x = self.forms_inputs(&passes[0]);
        let slots = match (from_x, train) {
            (false, _) => Slots::InputPart,
            (true, true) => Slots::Empty,
            (true, false) => Slots::None,
        };
        let tapes = self.prepare(passes, &xs[0], depth, slots)?;
        for (Pass { plan, index, .. }, tape) in passes.iter().zip(&tapes) {
            for (s, state) in finals.iter().enumerate() {
                let width = self.width_of(s);
                let from = tape.state_slot::<C>(s, plan.ends(depth).0, plan, width);
                match initial {
                    Some(initial) => from.copy_from(&part(&initial[s], *index, plan.rows * width))?,
                    None => from.clear()?,
                }
                debug_assert_eq!(state.len(), self.weights.len() * plan.rows * width);
            }
        }
        self.sweep_forward(passes, &tapes, from_x.then_some(train), xs, ys)?;
        for (Pass { plan, index, .. }, tape) in passes.iter().zip(&tapes) {
            for (s, state) in finals.iter().enumerate() {
                let width = self.width_of(s);
                let last = tape.state_slot::<C>(s, plan.ends(depth).1, plan, width);
                part(state, *index, plan.rows * width).copy_from(&last)?;
            }
        }
        Ok(tapes)
    }

    /// The same where targets stand in for all outputs but the last: nothing recurs, so that all steps of all rows run at once, as
    /// the rows of a sweep of one step.
    fn forced(&self, pass: &Pass<'_>, x: &Tensor, ys: &[Tensor], ends: &ForwardEnds<'_>) -> Result<Vec<PassTape>> {
        let ForwardEnds { initial, finals, train } = *ends;
        let (plan, width) = (&pass.plan, self.config.width());
        let targets = match pass.teacher {
            Some(teacher) => &teacher.targets,
            None => unreachable!("only a teacher forces"),
        };
        let flat = Forced::new(plan, &self.device)?;
        let pass = [Pass { plan: flat.plan(plan), teacher: None, ..*pass }];
        debug_assert!(train || !pass[0].plan.random);
        let tapes = self.prepare(&pass, x, 2, Slots::InputPart)?;
        let tape = &tapes[0];
        // What each step sees: the given state, then the targets of the steps before.
        let seen = tape.state_slot::<C>(0, 0, &pass[0].plan, width);
        let block = plan.rows * width;
        match initial {
            Some(initial) => part(&seen, 0, block).copy_from(&initial[0])?,
            None => part(&seen, 0, block).clear()?,
        }
        if plan.steps > 1 {
            let count = (plan.steps - 1) * block;
            seen.slice(block, [count]).copy_from(&targets.slice(0, [count]))?;
        }
        self.sweep_forward(&pass, &tapes, None, std::slice::from_ref(x), ys)?;
        let outputs = tape.outputs.as_ref().unwrap_or(&tape.states);
        finals[0].copy_from(&gather::gather(flat.last.tensor(), outputs, width)?)?;
        Ok(tapes)
    }

    /// Whether the forward sweep forms the products of x itself.
    fn forms_inputs(&self, pass: &Pass<'_>) -> bool {
        let split = self.is_split(pass.key.is_some());
        self.config.precision == Precision::Single && sweep::forms_inputs(&self.device, &pass.plan, split)
    }

    /// The buffers of passes that a sweep takes at once, whose first layer sees x; the states are not set.
    fn prepare(&self, passes: &[Pass<'_>], x: &Tensor, depth: usize, slots: Slots) -> Result<Vec<PassTape>> {
        let Plan { steps, rows, hidden, .. } = passes[0].plan;
        let kept = match slots {
            Slots::InputPart | Slots::Empty => vec![steps * rows, C::Slots::LEN * hidden],
            // Something is still bound in their place.
            Slots::None => vec![1],
        };
        let all_slots = Tensor::in_a_row(&self.device, kept, passes.len())?;
        let all_states = Tensor::in_a_row(&self.device, [C::State::LEN, depth, rows, hidden], passes.len())?;
        let mut all_outputs = match self.config.output {
            Some((width, _)) => Tensor::in_a_row(&self.device, [depth, rows, width], passes.len())?,
            None => Vec::new(),
        }
        .into_iter();
        let mut all_norms = if self.config.layer_norm { self.norms(passes, depth)? } else { Vec::new() }.into_iter();
        let buffers = all_slots.into_iter().zip(all_states);
        let prepare = |(pass, buffers): (&Pass<'_>, _)| {
            // A second layer gets its input part block by block.
            let is_first = pass.index < passes[0].index + self.config.directions();
            let slots = if is_first { slots } else { Slots::Empty };
            self.prepare_pass(pass, x, slots, buffers, all_outputs.next(), all_norms.next())
        };
        passes.iter().zip(buffers).map(prepare).collect()
    }

    fn prepare_pass(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        content: Slots,
        (slots, states): (Tensor, Tensor),
        outputs: Option<Tensor>,
        norms: Option<Norms>,
    ) -> Result<PassTape> {
        let (plan, weights) = (&pass.plan, &self.weights[pass.index]);
        if let Slots::InputPart = content {
            self.input_part(pass, x, &slots, norms.as_ref())?;
        }
        if outputs.is_some() {
            // The cell's own h before the first step, which nothing sees.
            let (first, block) = (plan.ends(plan.depth::<C>(&states)).0, plan.rows * plan.hidden);
            states.slice(first * block, [block]).clear()?;
        }
        let dropped = match (&weights.weight_hh, pass.key) {
            (Some(weight), Some(key)) if self.config.weight_dropout > 0.0 => {
                Some(self.drop_weights(weight.value(), key, pass.index)?)
            }
            _ => None,
        };
        Ok(PassTape { slots, states, outputs, weights: dropped, norms })
    }

    /// Room for what layer normalization keeps of passes that a sweep takes at once.
    fn norms(&self, passes: &[Pass<'_>], depth: usize) -> Result<Vec<Norms>> {
        let (plan, count) = (&passes[0].plan, passes.len());
        let width = C::Pre::LEN * plan.hidden;
        let groups = self.config.cell.norms().len();
        let lines = plan.rows * if depth > 2 { plan.steps } else { 1 };
        let room = |shape: &[usize]| Tensor::in_a_row(&self.device, shape, count);
        let kept = |lines: usize, groups: usize| -> Result<_> {
            let rows = room(&[lines, width])?.into_iter();
            Ok(rows.zip(room(&[groups, lines, 2])?).map(|(rows, stats)| Kept { rows, stats }))
        };
        let is_state = self.config.normalized_output().is_some();
        let values = if is_state && self.device.is_cpu() { room(&[lines, plan.hidden])? } else { Vec::new() };
        let mut values = values.into_iter();
        let kept = kept(plan.steps * plan.rows, groups)?.zip(kept(lines, groups + usize::from(is_state))?);
        Ok(kept.map(|(input, recurrent)| Norms { input, recurrent, values: values.next() }).collect())
    }

    /// The normalization of the product of x.
    fn input_norm<'a>(&self, weights: &'a Weights, norms: Option<&'a Norms>) -> Option<GateNorm<'a>> {
        let (Some(Norms { input, .. }), Some(gain)) = (norms, &weights.norm_ih) else { return None };
        // The gradients of x lie in the slots of the gates themselves.
        let groups = norm_groups(&self.config.cell).into_iter().map(|(gate, _, count)| (gate, gate, count)).collect();
        Some(GateNorm { hidden: self.config.hidden, groups, products: &input.rows, gain: gain.value(), stats: &input.stats })
    }

    /// The normalizations of a sweep, whose `y` this is; `gradients` in backward.
    fn row_norms<'a>(
        &self,
        weights: &'a Weights,
        norms: Option<&'a Norms>,
        y: &'a Tensor,
        gradients: Option<&'a Tensor>,
    ) -> Option<RowNorms<'a>> {
        let (Some(Norms { recurrent, values, .. }), Some(gain)) = (norms, &weights.norm_hh) else { return None };
        let (hidden, groups) = (self.config.hidden, norm_groups(&self.config.cell));
        let gates = GateNorm { hidden, groups, products: &recurrent.rows, gain: gain.value(), stats: &recurrent.stats };
        let state = weights.norm_c.as_ref().zip(self.config.normalized_output()).map(|(gain, (_, activation))| StateNorm {
            gain: gain.value(),
            shift: weights.norm_c_bias.as_ref().map(Param::value),
            activation,
            values: values.as_ref(),
            y: Some(y).filter(|_| self.config.output.is_none()),
        });
        Some(RowNorms { gates, state, gradients })
    }

    /// The cell that a sweep runs.
    fn swept_cell(&self) -> C {
        self.config.normalized_output().map_or(self.config.cell, |(cell, _)| cell)
    }

    /// DropConnect: numbers of W_hh, or of its gradient, under this pass's mask.
    fn drop_weights(&self, weights: &Tensor, key: MaskKey, index: usize) -> Result<Tensor> {
        let [rows, cols] = [weights.shape()[0], weights.shape()[1]];
        dropout::dropout(weights, [0, rows, cols], self.config.weight_dropout, key.draw(draws::WEIGHTS, index))
    }

    /// The units' own parameters, of each pass of a sweep of whole steps.
    fn units(&self, passes: &[Pass<'_>]) -> Result<Vec<Tensor>> {
        let of_pass = |pass: &Pass<'_>| &self.weights[pass.index];
        let unit = |weights: &Weights| weights.unit(&self.config.cell, self.config.hidden);
        match passes {
            [pass] => Ok(vec![unit(of_pass(pass))?]),
            _ => {
                let version = passes.iter().map(|pass| of_pass(pass).unit_version()).sum();
                let make = || Tensor::behind_each_other(passes.iter().map(|pass| unit(of_pass(pass))));
                self.side_copies(passes).units.get(version, make)
            }
        }
    }

    /// Of these two passes.
    fn side_copies(&self, passes: &[Pass<'_>]) -> &SideCopies {
        &self.side_copies[passes[0].index / self.config.directions()]
    }

    /// W_hh as a forward sweep of whole steps reads it, of each of its passes; anything where the cell has no product.
    fn recurrent_weights(&self, passes: &[Pass<'_>], tapes: &[PassTape], units: &[Tensor]) -> Result<Vec<Tensor>> {
        let packed = |weight: &Tensor| sweep_step::forward_weights::<C>(weight, self.config.hidden);
        let weights: Vec<&Param> = passes.iter().filter_map(|pass| self.weights[pass.index].weight_hh.as_ref()).collect();
        let dropped: Vec<&Tensor> = tapes.iter().filter_map(|tape| tape.weights.as_ref()).collect();
        match &weights[..] {
            [] => Ok(units.to_vec()),
            _ if !dropped.is_empty() => Tensor::behind_each_other(dropped.into_iter().map(packed)),
            [weight] => Ok(vec![weight.packed(packed)?]),
            weights => copies(&self.side_copies(passes).recurrent, weights, packed),
        }
    }

    /// The output products of passes that a sweep takes at once, where there are any.
    fn outputs<'a>(&self, passes: &[Pass<'_>], tapes: &'a [PassTape]) -> Result<Option<Outputs<'a>>> {
        let Some((width, _)) = self.config.output else { return Ok(None) };
        let of_passes = |param: fn(&Weights) -> &Option<Param>| -> Vec<&Param> {
            passes.iter().filter_map(|pass| param(&self.weights[pass.index]).as_ref()).collect()
        };
        let weights = match &of_passes(|weights| &weights.weight_hr)[..] {
            [weight] => vec![weight.transposed_factor(Precision::Single)?.words],
            weights => {
                let transposed = |weight: &Tensor| transpose::matrix(weight, width, self.config.hidden);
                copies(&self.side_copies(passes).outputs, weights, transposed)?
            }
        };
        let biases = match &of_passes(|weights| &weights.bias_hr)[..] {
            [] => None,
            biases => Some(Tensor::behind_each_other(biases.iter().map(|bias| Ok(bias.value().clone())))?),
        };
        let outputs = tapes.iter().filter_map(|tape| tape.outputs.as_ref()).collect();
        Ok(Some(Outputs { width, weights, biases, outputs }))
    }

    /// The same backward.
    fn output_gradients<'a>(&self, passes: &[Pass<'_>], gradients: &'a [Gradients]) -> Result<Option<OutputGradients<'a>>> {
        let Some((width, _)) = self.config.output else { return Ok(None) };
        let weights = passes.iter().filter_map(|pass| self.weights[pass.index].weight_hr.as_ref());
        let weights = Tensor::behind_each_other(weights.map(|weight| Ok(weight.value().clone())))?;
        let of_passes = gradients.iter().filter_map(|gradients| gradients.output.as_ref());
        let (carried, douts) = of_passes.map(|(carried, douts)| (carried, douts)).unzip();
        Ok(Some(OutputGradients { width, weights, carried, douts }))
    }

    /// Of passes that a sweep takes at once. `forms`: where [`Self::forms_inputs`], whether backward will follow. `xs`: of each layer.
    fn sweep_forward(
        &self,
        passes: &[Pass<'_>],
        tapes: &[PassTape],
        forms: Option<bool>,
        xs: &[Tensor],
        ys: &[Tensor],
    ) -> Result<()> {
        let steps = self.steps_of(&passes[0]);
        if steps == Steps::Split {
            return self.split_forward(passes, tapes, ys);
        }
        let cell = &self.config.cell;
        let units = self.units(passes)?;
        let weights = self.recurrent_weights(passes, tapes, &units)?;
        let sides = sides(passes, tapes, &weights, &units, ys);
        if let Some(keep) = forms {
            let Weights { weight_ih, bias_ih, .. } = &self.weights[passes[0].index];
            let packed = weight_ih.packed(|weight| sweep_step::input_weights::<C>(weight, self.config.hidden))?;
            let inputs = Inputs { x: &xs[0], weights: &packed, bias: bias_ih.as_ref().map(Param::value), keep };
            sweep_step::forward_from(cell, &sides[0], &inputs);
            return Ok(());
        }
        let outputs = self.outputs(passes, tapes)?;
        let sweep = (steps == Steps::Whole).then(|| sweep::choose(&self.device, cell, &passes[0].plan, false));
        self.turns(passes, false).iter().try_for_each(|turn| {
            if let Some(run) = turn.handed {
                self.hand_up(passes, tapes, xs, ys, run)?;
            }
            let sides = turn.sides(&sides);
            match sweep {
                None => sweep_pair::forward(cell, &sides, outputs.as_ref().map(|outputs| outputs.part(turn.passes())).as_ref()),
                Some(Sweep::Scan(kernels)) => sides.iter().try_for_each(|side| sweep_scan::forward(kernels, cell, side)),
                Some(Sweep::Resident) => sweep_resident::forward(cell, &sides),
                Some(Sweep::Grid) => sweep_grid::forward(cell, &sides),
                Some(Sweep::Step) => sweep_step::forward(cell, &sides),
            }
        })
    }

    fn split_forward(&self, passes: &[Pass<'_>], tapes: &[PassTape], ys: &[Tensor]) -> Result<()> {
        let (units, precision, spare) = (self.units(passes)?, self.config.precision, Tensor::uninitialized(&self.device, [1])?);
        let sides = self.split_sides(passes, tapes, &units, ys, &spare).into_iter();
        let splits = sides.zip(passes.iter().zip(tapes).zip(ys)).map(|(side, ((pass, tape), y))| {
            let weights = &self.weights[pass.index];
            let Some(recurrent) = tape.recurrent_transposed(weights, precision)? else {
                unreachable!("only a cell with a product is split")
            };
            let norms = self.row_norms(weights, tape.norms.as_ref(), y, None);
            let mut extras = Extras { norms, teacher: pass.teacher, masks: self.gate_masks(pass), output: None };
            if let (Some(weight_hr), Some(outputs)) = (&weights.weight_hr, &tape.outputs) {
                let bias = weights.bias_hr.as_ref().map(Param::value);
                let (width, weights) = (self.config.width(), weight_hr.transposed_factor(precision)?);
                extras.output = Some(OutputProduct { width, weights, bias, outputs, douts: None, carried: None, y });
            }
            Ok(SplitSide { side, weights: recurrent, extras })
        });
        sweep_split::forward(&self.swept_cell(), &splits.collect::<Result<Vec<_>>>()?)
    }

    /// The sides of steps whose products are launches of their own. `spare`: stands in for y where the cell writes none.
    fn split_sides<'a>(
        &self,
        passes: &[Pass<'a>],
        tapes: &'a [PassTape],
        units: &'a [Tensor],
        ys: &'a [Tensor],
        spare: &'a Tensor,
    ) -> Vec<Side<'a>> {
        let mut sides = sides(passes, tapes, units, units, ys);
        sides.iter_mut().filter(|side| !side.plan.output).for_each(|side| side.buffers.y = spare);
        sides
    }

    /// The input part of every gate and step of the pass's run: `xp [T*B, gates*H] = x W_ih^T + b_ih`, or `LN(x W_ih^T) + b_ih`, in the
    /// first columns of the slots `[T, B, SLOTS, H]`.
    fn input_part(&self, pass: &Pass<'_>, x: &Tensor, slots: &Tensor, norms: Option<&Norms>) -> Result<()> {
        let weights = &self.weights[pass.index];
        let (hidden, inputs) = (self.config.hidden, weights.inputs());
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let bias = weights.bias_ih.as_ref().map(Param::value);
        let weight_ih = weights.weight_ih.transposed_factor(self.config.precision)?;
        for [first, count, whole] in time_blocks_of(&pass.plan) {
            let x = Matrix::window(x, first * inputs, count, inputs, inputs);
            let target = Matrix::window(slots, first * kept, count, gates, kept);
            match self.input_norm(weights, norms) {
                Some(norm) => {
                    part_of_product(x, &weight_ih, None, norm.window(first, count), false, whole)?;
                    norm.forward(first, bias, target)?;
                }
                None => part_of_product(x, &weight_ih, bias, target, false, whole)?,
            }
        }
        Ok(())
    }

    fn run_backward(
        &self,
        method: &str,
        tape: RecurrentTape,
        dy: &Tensor,
        dstate: Option<&C::Value>,
        needs_dx: bool,
        flow: Option<&mut Vec<flow::Totals>>,
    ) -> Result<(Option<Tensor>, C::Value)> {
        let sums = self.new_sums(tape.rows)?;
        let result = self.run_backward_of(method, tape, dy, dstate, needs_dx, &sums, flow)?;
        self.add_sums(&sums)?;
        Ok(result)
    }

    /// The backward pass of a window: what the sweeps sum over steps is added to `sums`, not yet to the gradients. `flow` takes the
    /// gradients of all states, pass by pass.
    #[expect(clippy::too_many_arguments, reason = "what a backward pass takes, what a window carries on, and what is looked at")]
    fn run_backward_of(
        &self,
        method: &str,
        tape: RecurrentTape,
        dy: &Tensor,
        dstate: Option<&C::Value>,
        needs_dx: bool,
        sums: &[Tensor],
        flow: Option<&mut Vec<flow::Totals>>,
    ) -> Result<(Option<Tensor>, C::Value)> {
        let op = self.op(method);
        let batch_first = self.config.batch_first;
        let RecurrentTape { steps, rows, lengths, key, teacher, mut layers, window, given_state, owner, version } = tape;
        if !owner.same(self.owner()) || version != self.version() {
            return Err(super::stale_tape(&op));
        }
        self.device.expect_same(&op, "dy", dy.device())?;
        expect_apart(&op, "dy", dy, self.weights.iter().flat_map(Weights::params))?;
        if batch_first {
            dy.expect_shape(&op, "dy", &[rows, steps, self.output()], "[batch, seq, output]")?;
        } else {
            dy.expect_shape(&op, "dy", &[steps, rows, self.output()], "[seq, batch, output]")?;
        }
        if let Some(dstate) = dstate {
            self.check_state(&op, "dstate", dstate, rows)?;
        }
        let teacher = self.teacher(&op, teacher.as_ref().map(|(targets, p)| (targets, *p)), key, [steps, rows])?;

        let finals = dstate.map(|dstate| dstate.tensors());
        let initial = self.new_state(rows)?;
        let sequence = Sequence { steps, rows, window, lengths: lengths.as_ref(), key, teacher: teacher.as_ref() };
        let mut ends = BackwardEnds { finals: finals.as_deref(), initial: &initial, sums, flow };
        let mut dy = if batch_first { transpose::leading(dy)? } else { dy.clone() };
        let mut dx = None;
        while let Some(tape) = layers.pop() {
            let layer = layers.len();
            let below = layers.pop_if(|below| self.goes_with(layer - 1, [below, &tape], &sequence));
            let needs = needs_dx || !layers.is_empty();
            dx = match below {
                Some(below) => self.backward_wavefront(layer - 1, &sequence, [below, tape], &dy, needs, &mut ends)?,
                None => self.backward_layer(layer, &sequence, &tape, &dy, needs, &mut ends)?,
            };
            if let Some(dx) = &dx {
                dy = dx.clone();
            }
        }
        if self.config.learn_initial_state && !given_state {
            for (index, weights) in self.weights.iter().enumerate() {
                for (gradient, param) in initial.iter().zip(&weights.initial) {
                    let width = param.value().len();
                    column_sum(Matrix::window(gradient, index * rows * width, rows, width, width), 0, param.grad())?;
                }
            }
        }
        let dx = match (dx, batch_first) {
            (Some(dx), true) if needs_dx => Some(transpose::leading(&dx)?),
            (dx, _) => dx.filter(|_| needs_dx),
        };
        Ok((dx, self.state(initial)))
    }

    /// A layer by itself, backward: from the gradient of what it gave to the next one to that of its x, where it `needs` one.
    fn backward_layer(
        &self,
        layer: usize,
        sequence: &Sequence<'_>,
        LayerTape { x, passes, factors }: &LayerTape,
        dy: &Tensor,
        needs: bool,
        ends: &mut BackwardEnds<'_>,
    ) -> Result<Option<Tensor>> {
        let mut of_layer = self.passes(layer..layer + 1, sequence);
        of_layer.iter_mut().for_each(|pass| pass.plan.flow = ends.flow.is_some());
        let dx = if needs { Some(Tensor::uninitialized(&self.device, x.shape())?) } else { None };
        let dys = self.merge_backward(&self.passed_back(&of_layer[0], dy, Run::whole(sequence.steps))?, factors)?;
        let (count, xs) = (self.at_once(&of_layer), vec![x.clone(); of_layer.len()]);
        for ((at_once, tapes), dys) in of_layer.chunks(count).zip(passes.chunks(count)).zip(dys.chunks(count)) {
            let gradients = match sequence.teacher {
                Some(teacher) if teacher.probability >= 1.0 => self.forced_backward(&at_once[0], tapes, [x, &dys[0]], ends)?,
                _ => self.backward_passes(at_once, tapes, &xs, dys, ends, None)?,
            };
            for ((pass, tape), gradients) in at_once.iter().zip(tapes).zip(gradients) {
                if let Some(flow) = &mut ends.flow {
                    flow.push(self.totals(pass, gradients));
                }
                if let Some(dx) = &dx {
                    self.input_gradient(pass, tape, dx)?;
                }
            }
        }
        let Some(dx) = dx else { return Ok(None) };
        self.with_added(&of_layer[0], dx, dy, Run::whole(sequence.steps)).map(Some)
    }

    /// The gradient of a layer's output from that of what it gave to the next one: see [`Self::passed_on`].
    fn passed_back(&self, pass: &Pass<'_>, dy: &Tensor, run: Run) -> Result<Tensor> {
        let Plan { start, rows, .. } = pass.plan;
        match self.mask_key(pass) {
            Some(key) => dropout::dropout(dy, [start + run.first, rows, self.output()], self.config.dropout, key),
            None => Ok(dy.clone()),
        }
    }

    /// The whole gradient of a layer's x from that through its gates, and from dy past them, where x was added to y.
    fn with_added(&self, pass: &Pass<'_>, dx: Tensor, dy: &Tensor, run: Run) -> Result<Tensor> {
        match self.config.adds_input(dx.shape()[2]) {
            true => elementwise::add(&dx, &valid_rows(dy, pass.plan.lengths, run.first)?),
            false => Ok(dx),
        }
    }

    /// The gradient of the product of x in a block, where it is normalized, `[count, G * H]`; else that in the slots is it.
    fn through_input_norm(&self, weights: &Weights, tape: &PassTape, [first, count]: [usize; 2]) -> Result<Option<Tensor>> {
        let Some(norm) = self.input_norm(weights, tape.norms.as_ref()) else { return Ok(None) };
        let (gates, kept) = (C::Pre::LEN * self.config.hidden, C::Slots::LEN * self.config.hidden);
        let dproducts = Tensor::uninitialized(&self.device, [count, gates])?;
        let dslots = Matrix::window(&tape.slots, first * kept, count, kept, kept);
        norm.backward(first, dslots, Matrix::new(&dproducts, count, gates))?;
        Ok(Some(dproducts))
    }

    /// `dx (+)= dx-part . W_ih`, from the gradients in the slots, of the pass's run; the first direction's is not added.
    fn input_gradient(&self, pass: &Pass<'_>, tape: &PassTape, dx: &Tensor) -> Result<()> {
        let (weights, accumulate) = (&self.weights[pass.index], !pass.index.is_multiple_of(self.config.directions()));
        let (hidden, inputs) = (self.config.hidden, weights.inputs());
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let weight_ih = weights.weight_ih.factor(self.config.precision, gates)?;
        for [first, count, whole] in time_blocks_of(&pass.plan) {
            let normalized = self.through_input_norm(weights, tape, [first, count])?;
            let part = Matrix::window(&tape.slots, first * kept, count, gates, kept);
            let part = normalized.as_ref().map_or(part, |part| Matrix::new(part, count, gates));
            let target = Matrix::window(dx, first * inputs, count, inputs, inputs);
            part_of_product(part, &weight_ih, None, target, accumulate, whole)?;
        }
        Ok(())
    }

    /// Passes that a sweep takes at once, backward: from dy and the gradient of the final state to that of the initial one, in the slots
    /// those of the gates, and those of the parameters. `xs`, `dys`: of each pass. `between`: of two layers.
    fn backward_passes(
        &self,
        passes: &[Pass<'_>],
        tapes: &[PassTape],
        xs: &[Tensor],
        dys: &[Tensor],
        ends: &BackwardEnds<'_>,
        between: Option<&Between<'_>>,
    ) -> Result<Vec<Gradients>> {
        let BackwardEnds { finals, initial, sums, .. } = *ends;
        let all = self.new_gradients(passes)?;
        let (rows, hidden) = (passes[0].plan.rows, self.config.hidden);
        let sums_of = |pass: &Pass<'_>, gradients: &Gradients| {
            let sums = sums.get(pass.index)?.clone();
            Some((gradients.dstates.slice(C::State::LEN * rows * hidden, [sums.len()]), sums))
        };
        for (pass, gradients) in passes.iter().zip(&all) {
            if let Some((place, sums)) = sums_of(pass, gradients) {
                place.copy_from(&sums)?;
            }
            for s in 0..C::State::LEN {
                let width = self.width_of(s);
                let target = gradients.state(s, rows, width, hidden);
                match finals {
                    Some(finals) => target.copy_from(&part(finals[s], pass.index, rows * width))?,
                    None => target.clear()?,
                }
            }
        }
        self.sweep_backward(passes, tapes, dys, &all, between)?;
        for (((pass, tape), gradients), x) in passes.iter().zip(tapes).zip(&all).zip(xs) {
            if let Some((place, sums)) = sums_of(pass, gradients) {
                sums.copy_from(&place)?;
            }
            self.gradients(pass, tape, x, gradients)?;
            for (s, state) in initial.iter().enumerate() {
                let width = self.width_of(s);
                part(state, pass.index, rows * width).copy_from(&gradients.state(s, rows, width, hidden))?;
            }
        }
        Ok(all)
    }

    fn forced_backward(
        &self,
        pass: &Pass<'_>,
        tapes: &[PassTape],
        [x, dy]: [&Tensor; 2],
        ends: &BackwardEnds<'_>,
    ) -> Result<Vec<Gradients>> {
        let (rows, width) = (pass.plan.rows, self.config.width());
        let flat = Forced::new(&pass.plan, &self.device)?;
        let pass = [Pass { plan: flat.plan(&pass.plan), teacher: None, ..*pass }];
        let gradients = self.new_gradients(&pass)?;
        let carried = gradients[0].state(0, pass[0].plan.rows, width, self.config.hidden);
        carried.clear()?;
        if let Some(finals) = ends.finals {
            gather::scatter(&flat.ends.positions()?, finals[0], &carried, width, None)?;
        }
        self.sweep_backward(&pass, tapes, std::slice::from_ref(dy), &gradients, None)?;
        self.gradients(&pass[0], &tapes[0], x, &gradients[0])?;
        // What is left of the others belongs to the targets.
        ends.initial[0].copy_from(&part(&carried, 0, rows * width))?;
        Ok(gradients)
    }

    /// Buffers for passes backward that a sweep takes at once: the gradients of the state are not set.
    fn new_gradients(&self, passes: &[Pass<'_>]) -> Result<Vec<Gradients>> {
        let (plan, count) = (&passes[0].plan, passes.len());
        let dstates = Tensor::in_a_row(&self.device, [plan.dstates_len(&self.config.cell)], count)?;
        let mut outputs = match self.config.output {
            Some((width, _)) => {
                let carried = Tensor::in_a_row(&self.device, [plan.rows, width], count)?;
                carried.into_iter().zip(Tensor::in_a_row(&self.device, [plan.steps, plan.rows, width], count)?).collect()
            }
            None => Vec::new(),
        }
        .into_iter();
        let [_, columns] = self.widths();
        let mut norms = match self.config.layer_norm {
            true => Tensor::in_a_row(&self.device, [plan.steps * plan.rows, columns], count)?,
            false => Vec::new(),
        }
        .into_iter();
        let gradients = |dstates| Gradients { dstates, output: outputs.next(), norms: norms.next() };
        Ok(dstates.into_iter().map(gradients).collect())
    }

    /// Of passes that a sweep takes at once. `between`: of two layers.
    fn sweep_backward(
        &self,
        passes: &[Pass<'_>],
        tapes: &[PassTape],
        dys: &[Tensor],
        gradients: &[Gradients],
        between: Option<&Between<'_>>,
    ) -> Result<()> {
        let steps = self.steps_of(&passes[0]);
        let dys = Tensor::behind_each_other(dys.iter().cloned().map(Ok))?;
        if steps == Steps::Split {
            return self.split_backward(passes, tapes, &dys, gradients);
        }
        let (cell, units) = (&self.config.cell, self.units(passes)?);
        let weights = passes.iter().zip(tapes).zip(&units).map(|((pass, tape), unit)| {
            let recurrent = tape.recurrent(&self.weights[pass.index], Precision::Single, self.config.hidden)?;
            Ok(recurrent.map_or_else(|| unit.clone(), |factor| factor.words))
        });
        let weights = Tensor::behind_each_other(weights)?;
        let sides = sides(passes, tapes, &weights, &units, &dys);
        let all_dstates: Vec<&Tensor> = gradients.iter().map(|gradients| &gradients.dstates).collect();
        let outputs = self.output_gradients(passes, gradients)?;
        let sweep = (steps == Steps::Whole).then(|| sweep::choose(&self.device, cell, &passes[0].plan, true));
        self.turns(passes, true).iter().try_for_each(|turn| {
            match (turn.handed, between) {
                (Some(run), Some(between)) => self.hand_down(passes, tapes, &dys, between, run)?,
                (Some(_), None) => unreachable!("only two layers hand on anything"),
                (None, _) => {}
            }
            let (sides, dstates) = (turn.sides(&sides), &all_dstates[turn.passes()]);
            match sweep {
                None => {
                    let outputs = outputs.as_ref().map(|outputs| outputs.part(turn.passes()));
                    sweep_pair::backward(cell, &sides, dstates, outputs.as_ref())
                }
                Some(Sweep::Scan(kernels)) => {
                    let mut all = sides.iter().zip(dstates);
                    all.try_for_each(|(side, dstates)| sweep_scan::backward(kernels, cell, side, dstates))
                }
                Some(Sweep::Resident) => sweep_resident::backward(cell, &sides, dstates),
                Some(Sweep::Grid) => sweep_grid::backward(cell, &sides, dstates),
                Some(Sweep::Step) => sweep_step::backward(cell, &sides, dstates),
            }
        })
    }

    fn split_backward(&self, passes: &[Pass<'_>], tapes: &[PassTape], dys: &[Tensor], gradients: &[Gradients]) -> Result<()> {
        let (units, precision, spare) = (self.units(passes)?, self.config.precision, Tensor::uninitialized(&self.device, [1])?);
        let sides = self.split_sides(passes, tapes, &units, dys, &spare).into_iter().zip(gradients);
        let splits = sides.zip(passes.iter().zip(tapes).zip(dys)).map(|((side, gradients), ((pass, tape), dy))| {
            let weights = &self.weights[pass.index];
            let Some(recurrent) = tape.recurrent(weights, precision, pass.plan.hidden)? else {
                unreachable!("only a cell with a product is split")
            };
            let norms = self.row_norms(weights, tape.norms.as_ref(), dy, gradients.norms.as_ref());
            let mut extras = Extras { norms, teacher: pass.teacher, masks: self.gate_masks(pass), output: None };
            if let (Some(weight_hr), Some(outputs), Some((carried, douts))) =
                (&weights.weight_hr, &tape.outputs, &gradients.output)
            {
                extras.output = Some(OutputProduct {
                    width: self.config.width(),
                    weights: weight_hr.factor(precision, self.config.width())?,
                    bias: None,
                    outputs,
                    douts: Some(douts),
                    carried: Some(carried),
                    y: dy,
                });
            }
            Ok(SplitSide { side, weights: recurrent, extras })
        });
        let splits = splits.collect::<Result<Vec<_>>>()?;
        let dstates: Vec<&Tensor> = gradients.iter().map(|gradients| &gradients.dstates).collect();
        sweep_split::backward(&self.swept_cell(), &splits, &dstates)
    }

    /// After a backward sweep: once for all steps, the gradients of the parameters.
    fn gradients(&self, pass: &Pass<'_>, tape: &PassTape, x: &Tensor, gradients: &Gradients) -> Result<()> {
        let (cell, plan, weights) = (&self.config.cell, &pass.plan, &self.weights[pass.index]);
        let (hidden, rows) = (plan.hidden, plan.rows);
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let (inputs, precision) = (weights.inputs(), self.config.precision);
        // What the products saw, but for masks: the states before each step, which are slots 0 .. T of h, or 1 .. T + 1 in reverse.
        let (seen, width) = tape.outputs.as_ref().map_or((&tape.states, hidden), |outputs| (outputs, self.config.width()));
        let before = if plan.reverse { rows } else { 0 };
        for (first, count) in time_blocks(plan.steps, rows).rev() {
            // dx-part: the first columns of the slots. dr-part: one or more runs of columns.
            let input_part = Matrix::window(&tape.slots, first * kept, count, gates, kept);
            let x = Matrix::window(x, first * inputs, count, inputs, inputs);
            let normalized = self.through_input_norm(weights, tape, [first, count])?;
            let dproducts = normalized.as_ref().map_or(input_part, |part| Matrix::new(part, count, gates));
            let x = Factor::right(precision, x, count)?;
            product(dproducts.t(), &x, None, Matrix::new(weights.weight_ih.grad(), gates, inputs), true)?;
            self.norm_gradients(pass, tape, gradients, [first, count])?;
            if let Some(bias) = &weights.bias_ih {
                column_sum(input_part, 0, bias.grad())?;
            }
            let h = Matrix::window(seen, (before + first) * width, count, width, width);
            let dropped = match &tape.weights {
                Some(_) => Some(Tensor::zeros(&self.device, [gates, width])?),
                None => None,
            };
            let masks = match self.gate_masks(pass) {
                Some(masks) => Some((masks, Tensor::uninitialized(&self.device, [count, width])?)),
                None => None,
            };
            for run @ (gate, ..) in recurrent_runs(cell, masks.is_some()) {
                let part = |dproducts| recurrent_gradient::<C>(&tape.slots, dproducts, hidden, [first, count], run);
                let seen = match (&masks, cell.gated()) {
                    (Some((masks, masked)), _) => {
                        gate_mask::spread(masks, gate..gate + 1, h, masked)?;
                        Matrix::new(masked, count, width)
                    }
                    (None, Some(gated)) if is_gated(cell, gate) => {
                        Matrix::window(&tape.slots, first * kept + gated.slot() * hidden, count, hidden, kept)
                    }
                    _ => h,
                };
                if let Some(weight) = &weights.weight_hh {
                    let target = dropped.as_ref().unwrap_or(weight.grad());
                    let dproducts = part(gradients.norms.as_ref());
                    let dw = Matrix::window(target, gate * hidden * width, dproducts.cols, width, width);
                    product(dproducts.t(), &Factor::right(precision, seen, count)?, None, dw, true)?;
                }
                if let Some(bias) = &weights.bias_hh {
                    column_sum(part(None), gate * hidden, bias.grad())?;
                }
            }
            if let (Some(dropped), Some(key), Some(weight)) = (dropped, pass.key, &weights.weight_hh) {
                let dropped = self.drop_weights(&dropped, key, pass.index)?;
                column_sum(Matrix::new(&dropped, 1, gates * width), 0, weight.grad())?;
            }
            if let (Some(weight_hr), Some((_, douts))) = (&weights.weight_hr, &gradients.output) {
                // The cell's own outputs: the states after each step.
                let m = Matrix::window(&tape.states, (rows - before + first) * hidden, count, hidden, hidden);
                let douts = Matrix::window(douts, first * width, count, width, width);
                let m = Factor::right(precision, m, count)?;
                product(douts.t(), &m, None, Matrix::new(weight_hr.grad(), width, hidden), true)?;
                if let Some(bias) = &weights.bias_hr {
                    column_sum(douts, 0, bias.grad())?;
                }
            }
        }
        Ok(())
    }

    /// The gradients of the parameters of layer normalization in a block.
    fn norm_gradients(&self, pass: &Pass<'_>, tape: &PassTape, gradients: &Gradients, [first, count]: [usize; 2]) -> Result<()> {
        let (hidden, weights, norms) = (pass.plan.hidden, &self.weights[pass.index], tape.norms.as_ref());
        let kept = C::Slots::LEN * hidden;
        let slots = Matrix::window(&tape.slots, first * kept, count, kept, kept);
        if let (Some(norm), Some(gain)) = (self.input_norm(weights, norms), &weights.norm_ih) {
            norm.backward_gain(first, slots, gain.grad())?;
        }
        let norms = self.row_norms(weights, norms, &tape.states, gradients.norms.as_ref());
        let Some(((norms, gradients), gain)) = norms.zip(gradients.norms.as_ref()).zip(weights.norm_hh.as_ref()) else {
            return Ok(());
        };
        norms.gates.backward_gain(first, slots, gain.grad())?;
        if let Some(gain) = &weights.norm_c {
            let values = lines_of(gradients, first, count).columns(C::Pre::LEN * hidden, hidden);
            norms.backward_state_gain::<C>(&pass.plan, &tape.states, first, values, gain.grad())?;
            if let Some(shift) = &weights.norm_c_bias {
                column_sum(values, 0, shift.grad())?;
            }
        }
        Ok(())
    }

    /// Room for the sums of each layer and direction over a batch, zeros: see [`Plan::sums_len`]; empty where there are none.
    fn new_sums(&self, rows: usize) -> Result<Vec<Tensor>> {
        let plan = self.plan(&Sequence::plain(1, rows), 0);
        match plan.sums_len(&self.config.cell) {
            0 => Ok(Vec::new()),
            len => self.weights.iter().map(|_| Tensor::zeros(&self.device, [len])).collect(),
        }
    }

    /// Adds the sums of all steps to the gradients that they are of.
    fn add_sums(&self, sums: &[Tensor]) -> Result<()> {
        let (extras, hidden) = (self.config.cell.extras() * self.config.hidden, self.config.hidden);
        for (weights, sums) in self.weights.iter().zip(sums) {
            let line = extras + hidden;
            let tiles = sums.len() / line;
            if let Some(extra) = &weights.extra {
                column_sum(Matrix::window(sums, 0, tiles, extras, line), 0, extra.grad())?;
            }
            if let Some(clipped) = &weights.clipped {
                column_sum(Matrix::window(sums, extras, tiles, hidden, line), 0, clipped)?;
            }
        }
        Ok(())
    }
}

/// A sequence in blocks of time, as `(first row, rows)`. All products over time go block by block, those that sum over time from
/// the last block to the first: a sequence in windows of whole blocks then gives the same bits as at once. A block is long enough to
/// keep the products busy; its bytes are a multiple of what bindings are aligned to.
fn time_blocks(steps: usize, rows: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
    let block = time_block(rows);
    (0..steps.div_ceil(block)).map(move |n| (n * block * rows, block.min(steps - n * block) * rows))
}

/// What the steps of a plan's run have of each block: the first row, rows, and those of the whole block.
fn time_blocks_of(plan: &Plan<'_>) -> impl Iterator<Item = [usize; 3]> + use<> {
    // Rows of the run.
    let (start, end) = (plan.run.first * plan.rows, plan.run.end() * plan.rows);
    debug_assert!(!plan.reverse || plan.run == Run::whole(plan.steps), "parts of a sequence are read forward");
    time_blocks(plan.steps, plan.rows).filter_map(move |(first, count)| {
        let [from, to] = [first.max(start), (first + count).min(end)];
        (from < to).then(|| [from, to - from, count])
    })
}

/// Steps of a block.
fn time_block(rows: usize) -> usize {
    1024usize.div_ceil(rows).next_multiple_of(64)
}

/// `x [T, B, F]` with zeros past each row's end; `start`: the steps before the first one.
fn valid_rows(x: &Tensor, lengths: Option<&Lengths>, start: usize) -> Result<Tensor> {
    let Some(lengths) = lengths else { return Ok(x.clone()) };
    let (rows, width) = (x.shape()[1], x.shape()[2]);
    let count = x.len() / width;
    // A place past the table gives zeros.
    let place = |line: usize| if start + line / rows < lengths.host()[line % rows] as usize { line } else { count } as u32;
    let places = Ids::from_slice(x.device(), &(0..count).map(place).collect::<Vec<_>>(), [count])?;
    gather::gather(places.tensor(), x, width)?.reshape(x.shape())
}

/// Passes, for a sweep that takes them at once.
fn sides<'a>(
    passes: &[Pass<'a>],
    tapes: &'a [PassTape],
    weights: &'a [Tensor],
    units: &'a [Tensor],
    ys: &'a [Tensor],
) -> Vec<Side<'a>> {
    let side = |n: usize| {
        let (PassTape { slots, states, .. }, weights) = (&tapes[n], &weights[n]);
        Side { plan: passes[n].plan, buffers: Buffers { slots, states, weights, unit: &units[n], y: &ys[n] } }
    };
    (0..passes.len()).map(side).collect()
}

/// What is made of each of these weights, one behind the other; made again where one has changed.
fn copies(cached: &CachedCopy<Vec<Tensor>>, weights: &[&Param], make: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let version = weights.iter().map(|weight| weight.version().get()).sum();
    cached.get(version, || Tensor::behind_each_other(weights.iter().map(|weight| make(weight.value()))))
}

/// Part number `index` of a tensor of parts of `len` numbers: a layer and direction of a state.
fn part(tensor: &Tensor, index: usize, len: usize) -> Tensor {
    tensor.slice(index * len, [len])
}

/// What the steps of a pass are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Steps {
    /// A product and a cell, for a sweep of whole steps.
    Whole,
    /// Two products, fused with what follows them.
    Pairs,
    /// A row of launches.
    Split,
}

/// What the slots of a forward pass hold before its sweep.
#[derive(Clone, Copy)]
enum Slots {
    /// The input part of every gate.
    InputPart,
    /// Nothing: the sweep forms that itself.
    Empty,
    /// As before, and nothing after it either: there are none.
    None,
}

/// What a forward pass through all layers takes and leaves at the ends of the sequence.
struct ForwardEnds<'a> {
    /// The initial state; none: zeros.
    initial: Option<&'a [Tensor]>,
    /// Takes the final one.
    finals: &'a [Tensor],
    /// Whether backward will follow.
    train: bool,
}

/// The same backward, and what is gathered on the way.
struct BackwardEnds<'a> {
    /// Gradients of the final state; none: zeros.
    finals: Option<&'a [&'a Tensor]>,
    /// Those of the initial state.
    initial: &'a [Tensor],
    /// Of each layer and direction, where there are any: see [`Plan::sums_len`].
    sums: &'a [Tensor],
    flow: Option<&'a mut Vec<flow::Totals>>,
}

/// What a backward pass carries from step to step.
struct Gradients {
    /// The gradient of the state, and sums: see [`Plan::dstates_len`].
    dstates: Tensor,
    /// With an output product: the gradient of o [B, R] from later steps, and the whole of it at each step [T, B, R].
    output: Option<(Tensor, Tensor)>,
    /// With layer normalization: see [`RowNorms::gradients`].
    norms: Option<Tensor>,
}

impl Gradients {
    /// The gradient of state `s` as later steps leave it, `[B, width]`.
    fn state(&self, s: usize, rows: usize, width: usize, hidden: usize) -> Tensor {
        match &self.output {
            Some((carried, _)) if s == 0 => carried.slice(0, [rows * width]),
            _ => self.dstates.slice(s * rows * hidden, [rows * hidden]),
        }
    }
}

impl PassTape {
    /// A slot of state `s`, `[B, width]`.
    fn state_slot<C: Cell>(&self, s: usize, slot: usize, plan: &Plan<'_>, width: usize) -> Tensor {
        let block = plan.rows * width;
        match &self.outputs {
            Some(outputs) if s == 0 => outputs.slice(slot * block, [block]),
            _ => self.states.slice((s * plan.depth::<C>(&self.states) + slot) * block, [block]),
        }
    }

    /// W_hh as the products see it, transposed `[R, G * H]`, where the cell has a product.
    fn recurrent_transposed(&self, weights: &Weights, precision: Precision) -> Result<Option<Factor>> {
        match &self.weights {
            Some(dropped) => {
                let [rows, cols] = [dropped.shape()[0], dropped.shape()[1]];
                let transposed = transpose::matrix(dropped, rows, cols)?;
                Factor::right(precision, Matrix::new(&transposed, cols, rows), cols).map(Some)
            }
            None => weights.weight_hh.as_ref().map(|weight| weight.transposed_factor(precision)).transpose(),
        }
    }

    /// The same `[G * H, R]`, in runs of H.
    fn recurrent(&self, weights: &Weights, precision: Precision, hidden: usize) -> Result<Option<Factor>> {
        match &self.weights {
            Some(dropped) => {
                let matrix = Matrix::new(dropped, dropped.shape()[0], dropped.shape()[1]);
                Factor::right(precision, matrix, hidden).map(Some)
            }
            None => weights.weight_hh.as_ref().map(|weight| weight.factor(precision, hidden)).transpose(),
        }
    }
}

/// T steps of B rows as one step of T * B rows.
struct Forced {
    /// 1 for each valid step, where rows are ragged.
    lengths: Option<Lengths>,
    /// Of each row the place of its final state in `outputs [2, T * B, R]`; that of its initial one where it has no step.
    last: Ids,
    /// Of each row its last step in `[T * B, R]`, or the first where it has none.
    ends: Ids,
}

impl Forced {
    fn new(plan: &Plan<'_>, device: &Device) -> Result<Self> {
        let (steps, rows) = (plan.steps, plan.rows);
        let length = |row: usize| plan.lengths.map_or(steps, |lengths| lengths.host()[row] as usize);
        let valid = |line: usize| u32::from(line / rows < length(line % rows));
        let lengths = match plan.lengths {
            Some(_) => Some(Lengths::from_slice(device, &(0..steps * rows).map(valid).collect::<Vec<_>>())?),
            None => None,
        };
        let end = |row: usize| length(row).saturating_sub(1) * rows + row;
        let last = |row: usize| if length(row) == 0 { row } else { steps * rows + end(row) };
        let ids = |place: &dyn Fn(usize) -> usize| {
            Ids::from_slice(device, &(0..rows).map(|row| place(row) as u32).collect::<Vec<_>>(), [rows])
        };
        Ok(Self { lengths, last: ids(&last)?, ends: ids(&end)? })
    }

    fn plan<'a>(&'a self, plan: &Plan<'_>) -> Plan<'a> {
        let (steps, rows) = (1, plan.steps * plan.rows);
        Plan { steps, run: Run::whole(steps), rows, lengths: self.lengths.as_ref(), total: steps, ..*plan }
    }
}

impl<C: Cell> Module for Recurrent<C> {
    fn params(&self) -> Vec<(String, &Param)> {
        self.weights.iter().flat_map(Weights::params).map(|param| (param.name().to_owned(), param)).collect()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        self.weights.iter_mut().flat_map(Weights::params_mut).map(|param| (param.name().to_owned(), param)).collect()
    }
}

impl<C: Cell> Layer for Recurrent<C> {
    fn kind(&self) -> &'static str {
        C::NAME
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let (y, state, _) = self.run_layer("forward", x, context, false)?;
        Ok(Output { y, state: state.tensors().into_iter().cloned().collect() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        match self.run_layer("forward_train", x, context, true)? {
            (y, state, Some(tape)) => Ok((Output { y, state: state.tensors().into_iter().cloned().collect() }, Tape::new(tape))),
            (.., None) => unreachable!("a training run records a tape"),
        }
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let op = self.op("backward");
        Ok(self.run_backward("backward", tape.open(&op)?, dy, None, needs_dx, None)?.0)
    }

    fn backward_from(&self, tape: Tape, dy: &Tensor, dstate: &[Tensor], needs_dx: bool) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let op = self.op("backward_from");
        let dstate = self.given_state(&op, "dstate", dstate)?;
        let (dx, first) = self.run_backward("backward_from", tape.open(&op)?, dy, dstate.as_ref(), needs_dx, None)?;
        Ok((dx, first.tensors().into_iter().cloned().collect()))
    }

    fn takes_teacher(&self) -> bool {
        self.is_teachable()
    }

    fn state_len(&self) -> usize {
        C::Value::NAMES.len()
    }

    fn step(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = self.op("step");
        self.expect_time_major(&op)?;
        let state = self.given_state(&op, "state", context.state)?;
        let input = Input { lengths: context.lengths, state: state.as_ref(), key: context.key, teacher: context.teacher };
        let (y, state) = Recurrent::step(self, x.numbers(&op)?, input)?;
        Ok(Output { y, state: state.tensors().into_iter().cloned().collect() })
    }
}

impl<C: Cell> Recurrent<C> {
    /// The state that other layers' caller gave, which knows no types.
    fn given_state(&self, op: &str, argument: &str, tensors: &[Tensor]) -> Result<Option<C::Value>> {
        if tensors.is_empty() {
            return Ok(None);
        }
        let expected = || format!("{:?}", C::Value::NAMES);
        let state = C::Value::from_tensors(tensors.to_vec());
        state.map(Some).ok_or_else(|| Error::argument(op, argument, format!("{} tensors", tensors.len()), expected()))
    }

    fn expect_time_major(&self, op: &str) -> Result<()> {
        if self.config.batch_first {
            let what = "batch_first(true) has no place among other layers, which are time-major; give the model [seq, batch, ..]";
            return Err(Error::unsupported(op, what));
        }
        Ok(())
    }

    fn run_layer(
        &self,
        method: &str,
        x: &Value,
        context: &Context<'_>,
        train: bool,
    ) -> Result<(Tensor, C::Value, Option<RecurrentTape>)> {
        let op = self.op(method);
        self.expect_time_major(&op)?;
        let state = self.given_state(&op, "state", context.state)?;
        let input = Input { lengths: context.lengths, state: state.as_ref(), key: context.key, teacher: context.teacher };
        self.run(method, x.numbers(&op)?, input, train, None)
    }
}
