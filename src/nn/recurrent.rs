//! Layers x directions of a recurrent cell: one generic core, of which [`Lstm`] is a face.

use std::marker::PhantomData;

use super::{Context, Input, Layer, Module, Output, Param, Tape, Value, Version, expect_apart};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::cell_contract::{Block, CellKernel, recurrent_runs};
use crate::kernels::cell_lstm::LstmCell;
use crate::kernels::column_sum::column_sum;
use crate::kernels::gemm::{Matrix, gemm};
use crate::kernels::sweep_step::{self, Buffers, Plan};
use crate::kernels::{dropout, transpose};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Lengths, Tensor};

/// A recurrent cell. The crate's own kernels implement it.
pub trait Cell: CellKernel + Copy + std::fmt::Debug + Send + Sync {
    /// Its name in errors: `lstm`.
    const NAME: &'static str;
    /// Its state as a user meets it.
    type Value: CellState;
}

impl Cell for LstmCell {
    const NAME: &'static str = "lstm";
    type Value = LstmState;
}

/// The state of a recurrent layer: a value, passed in and returned, never hidden.
pub trait CellState: Clone + std::fmt::Debug + Send + Sync + Sized {
    /// The names of its tensors: `h`, `c`.
    const NAMES: &'static [&'static str];
    /// Its tensors, each `[layers * directions, batch, hidden]`, in the order of [`CellState::NAMES`].
    fn tensors(&self) -> Vec<&Tensor>;
    /// A state of these tensors, as many as [`CellState::NAMES`].
    fn from_tensors(tensors: Vec<Tensor>) -> Option<Self>;
}

/// The state of an LSTM; layer and direction `(l, d)` stand at `l * directions + d`, as in PyTorch.
#[derive(Clone, Debug)]
pub struct LstmState {
    /// Hidden state `[layers * directions, batch, hidden]`.
    pub h: Tensor,
    /// Cell state `[layers * directions, batch, hidden]`.
    pub c: Tensor,
}

impl CellState for LstmState {
    const NAMES: &'static [&'static str] = &["h", "c"];

    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.h, &self.c]
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Option<Self> {
        let [h, c] = tensors.try_into().ok()?;
        Some(Self { h, c })
    }
}

/// Which way a recurrent layer reads its sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// From the first step to the last.
    #[default]
    Forward,
    /// From each row's last valid step to the first.
    Reverse,
    /// Both, their outputs side by side: forward first.
    Both,
}

impl Direction {
    /// The passes over time, `true` for those in reverse.
    fn passes(self) -> &'static [bool] {
        match self {
            Direction::Forward => &[false],
            Direction::Reverse => &[true],
            Direction::Both => &[false, true],
        }
    }
}

/// Sizes and options of a recurrent layer; [`RecurrentConfig::init`] makes the layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecurrentConfig<C> {
    input: usize,
    hidden: usize,
    layers: usize,
    direction: Direction,
    dropout: f32,
    bias: bool,
    batch_first: bool,
    forget_bias: Option<f32>,
    cell: PhantomData<C>,
}

/// Sizes and options of an [`Lstm`].
pub type LstmConfig = RecurrentConfig<LstmCell>;

impl<C: Cell> RecurrentConfig<C> {
    /// One layer of `hidden` units over inputs of `input` numbers, forward in time, with biases.
    pub fn new(input: usize, hidden: usize) -> Self {
        Self {
            input,
            hidden,
            layers: 1,
            direction: Direction::Forward,
            dropout: 0.0,
            bias: true,
            batch_first: false,
            forget_bias: None,
            cell: PhantomData,
        }
    }

    /// Layers on top of each other, each fed by the outputs of the one below.
    pub fn layers(self, layers: usize) -> Self {
        Self { layers, ..self }
    }

    /// Which way time is read.
    pub fn direction(self, direction: Direction) -> Self {
        Self { direction, ..self }
    }

    /// In training, zero each output between two layers with probability `p` and scale the others by `1 / (1 - p)`;
    /// needs at least two layers.
    pub fn dropout(self, p: f32) -> Self {
        Self { dropout: p, ..self }
    }

    /// Whether there are biases.
    pub fn bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// Whether x and y are `[batch, seq, ..]` instead of `[seq, batch, ..]`; states are not affected, as in PyTorch.
    pub fn batch_first(self, batch_first: bool) -> Self {
        Self { batch_first, ..self }
    }

    /// The layer, with every weight and bias drawn from U(-1/sqrt(hidden), 1/sqrt(hidden)), as PyTorch does.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a size of 0, a dropout outside `[0, 1)`, a forget bias without biases;
    /// [`crate::ErrorKind::Limit`] or [`crate::ErrorKind::OutOfMemory`] when the device cannot hold it.
    pub fn init(self, device: &Device, rng: &mut Rng) -> Result<Recurrent<C>> {
        Recurrent::init(self, device, rng)
    }

    fn directions(&self) -> usize {
        self.direction.passes().len()
    }
}

impl LstmConfig {
    /// Start with forget gates open: the two forget biases add up to `bias` (Jozefowicz et al. 2015 advise 1).
    pub fn forget_bias(self, bias: f32) -> Self {
        Self { forget_bias: Some(bias), ..self }
    }
}

/// The parameters of one direction of one layer.
#[derive(Debug)]
struct Weights {
    /// [gates * hidden, inputs]
    weight_ih: Param,
    /// [gates * hidden, hidden]
    weight_hh: Param,
    /// [gates * hidden] each
    bias: Option<(Param, Param)>,
    /// Zeros that stand in for the recurrent bias where there is none.
    no_bias: Option<Tensor>,
}

impl Weights {
    fn params(&self) -> impl Iterator<Item = &Param> {
        let biases = self.bias.iter().flat_map(|(ih, hh)| [ih, hh]);
        [&self.weight_ih, &self.weight_hh].into_iter().chain(biases)
    }

    fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        let biases = self.bias.iter_mut().flat_map(|(ih, hh)| [ih, hh]);
        [&mut self.weight_ih, &mut self.weight_hh].into_iter().chain(biases)
    }

    /// The cell's own parameters `[PARAMS, H]`.
    fn unit(&self) -> &Tensor {
        match (&self.bias, &self.no_bias) {
            (Some((_, hh)), _) => hh.value(),
            (None, Some(zeros)) => zeros,
            (None, None) => unreachable!("a layer without biases has zeros in their place"),
        }
    }
}

/// Layers x directions of a recurrent cell.
#[derive(Debug)]
pub struct Recurrent<C: Cell> {
    config: RecurrentConfig<C>,
    device: Device,
    /// Layer by layer, in each layer by direction.
    weights: Vec<Weights>,
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

/// What [`Recurrent::forward_train`] keeps for [`Recurrent::backward`]. Dropping it truncates back-propagation here.
#[derive(Debug)]
pub struct RecurrentTape {
    steps: usize,
    rows: usize,
    lengths: Option<Lengths>,
    key: Option<MaskKey>,
    layers: Vec<LayerTape>,
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
    /// For each direction: slots [T, B, SLOTS, H] and states [STATES, T + 1, B, H].
    passes: Vec<(Tensor, Tensor)>,
}

impl<C: Cell> Recurrent<C> {
    fn init(config: RecurrentConfig<C>, device: &Device, rng: &mut Rng) -> Result<Self> {
        let op = format!("{}.init", C::NAME);
        let RecurrentConfig { input, hidden, layers, dropout, .. } = config;
        for (name, size) in [("input", input), ("hidden", hidden), ("layers", layers)] {
            if size == 0 {
                return Err(Error::argument(&op, name, size, "at least 1"));
            }
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::argument(&op, "dropout", dropout, "in [0, 1)"));
        }
        if dropout > 0.0 && layers == 1 {
            return Err(Error::argument(&op, "dropout", dropout, "0 for a single layer: it acts between layers"));
        }
        if let Some(bias) = config.forget_bias.filter(|bias| !bias.is_finite()) {
            return Err(Error::argument(&op, "forget_bias", bias, "a finite number"));
        }
        if config.forget_bias.is_some() && !config.bias {
            return Err(Error::argument(&op, "forget_bias", "given", "biases, which bias(false) removed"));
        }
        // Saturating: a size beyond all memory is refused by the tensor that would have it.
        let gates = C::Pre::LEN.saturating_mul(hidden);
        let bound = 1.0 / (hidden as f32).sqrt();
        let mut weights = Vec::new();
        for layer in 0..layers {
            let inputs = if layer == 0 { input } else { config.directions().saturating_mul(hidden) };
            for reverse in config.direction.passes() {
                let name = |part: &str| format!("{part}_l{layer}{}", if *reverse { "_reverse" } else { "" });
                let mut param = |part: &str, rows: usize, cols: Option<usize>| {
                    let draw = |at: usize| match (rng.uniform(-bound, bound), config.forget_bias, cols) {
                        // Of an LSTM's gates i, f, g, o the second.
                        (_, Some(bias), None) if at / hidden == 1 => bias * f32::from(part == "bias_ih"),
                        (number, ..) => number,
                    };
                    let shape = std::iter::once(rows).chain(cols).collect::<Vec<_>>();
                    Param::draw(&name(part), device, shape, draw)
                };
                let weight_ih = param("weight_ih", gates, Some(inputs))?;
                let weight_hh = param("weight_hh", gates, Some(hidden))?;
                let bias = match config.bias {
                    true => Some((param("bias_ih", gates, None)?, param("bias_hh", gates, None)?)),
                    false => None,
                };
                let no_bias = if config.bias { None } else { Some(Tensor::zeros(device, [C::Unit::LEN * hidden])?) };
                weights.push(Weights { weight_ih, weight_hh, bias, no_bias });
            }
        }
        Ok(Self { config, device: device.clone(), weights })
    }

    /// Numbers in an input row.
    pub fn input(&self) -> usize {
        self.config.input
    }

    /// Units of a layer and direction.
    pub fn hidden(&self) -> usize {
        self.config.hidden
    }

    /// Numbers in an output row: directions x hidden.
    pub fn output(&self) -> usize {
        self.config.directions() * self.config.hidden
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
        let (y, state, _) = self.run("forward", x, input.into(), false)?;
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
        let (y, state, _) = self.run("step", &x.reshape(sequence)?, input.into(), false)?;
        Ok((y.reshape([rows, self.output()])?, state))
    }

    /// As [`Recurrent::forward`], with dropout, and a tape for [`Recurrent::backward`].
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
        match self.run("forward_train", x, input.into(), true)? {
            (y, state, Some(tape)) => Ok((y, state, tape)),
            (.., None) => unreachable!("a training run records a tape"),
        }
    }

    /// Back-propagation through time: from dy (the shape of y) and the gradient of the final state (`None`: zeros) to the
    /// gradients of x and of the initial state; adds to those of the parameters.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] or [`crate::ErrorKind::DeviceMismatch`] for a dy or dstate that does not fit, or when a parameter
    /// changed since the tape was recorded; what the device reports.
    pub fn backward(&self, tape: RecurrentTape, dy: &Tensor, dstate: Option<&C::Value>) -> Result<(Tensor, C::Value)> {
        match self.run_backward(tape, dy, dstate, true)? {
            (Some(dx), dstate) => Ok((dx, dstate)),
            (None, _) => unreachable!("dx was asked for"),
        }
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

    fn check_state(&self, op: &str, argument: &str, state: &C::Value, rows: usize) -> Result<()> {
        let shape = [self.weights.len(), rows, self.config.hidden];
        for (name, tensor) in C::Value::NAMES.iter().zip(state.tensors()) {
            let argument = format!("{argument}.{name}");
            self.device.expect_same(op, &argument, tensor.device())?;
            tensor.expect_shape(op, &argument, &shape, "[layers * directions, batch, hidden]")?;
        }
        Ok(())
    }

    fn plan<'a>(&self, steps: usize, rows: usize, direction: usize, lengths: Option<&'a Lengths>) -> Plan<'a> {
        let hidden = self.config.hidden;
        Plan {
            steps,
            rows,
            hidden,
            reverse: self.config.direction.passes()[direction],
            lengths,
            y_stride: self.output(),
            y_offset: direction * hidden,
            key: MaskKey::new(0, 0),
        }
    }

    fn run(
        &self,
        method: &str,
        x: &Tensor,
        input: Input<'_, C::Value>,
        train: bool,
    ) -> Result<(Tensor, C::Value, Option<RecurrentTape>)> {
        let op = self.op(method);
        let RecurrentConfig { hidden, layers, dropout, batch_first, .. } = self.config;
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
        if train && dropout > 0.0 && input.key.is_none() {
            return Err(Error::argument(&op, "key", "not given", format!("a MaskKey, which dropout {dropout} needs")));
        }

        let directions = self.config.directions();
        let depth = if train { steps + 1 } else { 2 };
        let block = rows * hidden;
        let finals = (0..C::State::LEN)
            .map(|_| Tensor::uninitialized(&self.device, [self.weights.len(), rows, hidden]))
            .collect::<Result<Vec<_>>>()?;
        let initial = input.state.map(|state| state.tensors());
        let mut x = if batch_first { transpose::leading(x)? } else { x.clone() };
        let mut tapes = Vec::new();
        for layer in 0..layers {
            let y = Tensor::uninitialized(&self.device, [steps, rows, self.output()])?;
            let mut passes = Vec::new();
            for direction in 0..directions {
                let index = layer * directions + direction;
                let weights = &self.weights[index];
                let plan = self.plan(steps, rows, direction, input.lengths);
                let slots = self.input_part(weights, &x, steps * rows)?;
                let states = Tensor::uninitialized(&self.device, [C::State::LEN, depth, rows, hidden])?;
                let (first, last) = plan.ends(depth);
                let at = |s: usize, slot: usize| states.slice((s * depth + slot) * block, [block]);
                for s in 0..C::State::LEN {
                    match &initial {
                        Some(initial) => at(s, first).copy_from(&initial[s].slice(index * block, [block]))?,
                        None => at(s, first).clear()?,
                    }
                }
                let recurrent = weights.weight_hh.transposed()?;
                let buffers = Buffers { slots: &slots, states: &states, weights: &recurrent, unit: weights.unit(), y: &y };
                sweep_step::forward::<C>(&plan, &buffers)?;
                for (s, state) in finals.iter().enumerate() {
                    state.slice(index * block, [block]).copy_from(&at(s, last))?;
                }
                if train {
                    passes.push((slots, states));
                }
            }
            let input_of_layer = std::mem::replace(&mut x, y);
            if train {
                tapes.push(LayerTape { x: input_of_layer, passes });
                if let Some(key) = self.mask_key(input.key, layer) {
                    x = dropout::dropout(&x, rows, self.output(), dropout, key)?;
                }
            }
        }
        let y = if batch_first { transpose::leading(&x)? } else { x };
        let tape = train.then(|| RecurrentTape {
            steps,
            rows,
            lengths: input.lengths.cloned(),
            key: input.key,
            layers: tapes,
            owner: self.owner().clone(),
            version: self.version(),
        });
        Ok((y, self.state(finals), tape))
    }

    fn state(&self, tensors: Vec<Tensor>) -> C::Value {
        match C::Value::from_tensors(tensors) {
            Some(state) => state,
            None => unreachable!("a cell and its state have as many tensors"),
        }
    }

    /// The key of the mask between `layer` and the next; `None` where there is no mask.
    fn mask_key(&self, key: Option<MaskKey>, layer: usize) -> Option<MaskKey> {
        let masked = self.config.dropout > 0.0 && layer + 1 < self.config.layers;
        key.filter(|_| masked).map(|key| key.layer(layer))
    }

    /// The input part of every gate and step in one product: `xp [T*B, gates*H] = x W_ih^T + b_ih`, in the first columns
    /// of the slots `[T, B, SLOTS, H]`.
    fn input_part(&self, weights: &Weights, x: &Tensor, rows: usize) -> Result<Tensor> {
        let (hidden, inputs) = (self.config.hidden, weights.weight_ih.value().shape()[1]);
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let slots = Tensor::uninitialized(&self.device, [rows, kept])?;
        let bias = weights.bias.as_ref().map(|(ih, _)| ih.value());
        let x = Matrix::new(x, rows, inputs);
        let target = Matrix::window(&slots, 0, rows, gates, kept);
        gemm(x, Matrix::new(&weights.weight_ih.transposed()?, inputs, gates), bias, target, false)?;
        Ok(slots)
    }

    fn run_backward(
        &self,
        tape: RecurrentTape,
        dy: &Tensor,
        dstate: Option<&C::Value>,
        needs_dx: bool,
    ) -> Result<(Option<Tensor>, C::Value)> {
        let op = self.op("backward");
        let RecurrentConfig { hidden, dropout, batch_first, .. } = self.config;
        let RecurrentTape { steps, rows, lengths, key, layers, owner, version } = tape;
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

        let block = rows * hidden;
        let finals = dstate.map(|dstate| dstate.tensors());
        let initial = (0..C::State::LEN)
            .map(|_| Tensor::uninitialized(&self.device, [self.weights.len(), rows, hidden]))
            .collect::<Result<Vec<_>>>()?;
        let mut dy = if batch_first { transpose::leading(dy)? } else { dy.clone() };
        for (layer, LayerTape { x, passes }) in layers.into_iter().enumerate().rev() {
            let directions = passes.len();
            if let Some(key) = self.mask_key(key, layer) {
                dy = dropout::dropout(&dy, rows, self.output(), dropout, key)?;
            }
            let dx = match needs_dx || layer > 0 {
                true => Some(Tensor::uninitialized(&self.device, x.shape())?),
                false => None,
            };
            for (direction, (slots, states)) in passes.into_iter().enumerate() {
                let index = layer * directions + direction;
                let weights = &self.weights[index];
                let plan = self.plan(steps, rows, direction, lengths.as_ref());
                let dstates = Tensor::uninitialized(&self.device, [C::State::LEN, rows, hidden])?;
                for s in 0..C::State::LEN {
                    let part = dstates.slice(s * block, [block]);
                    match &finals {
                        Some(finals) => part.copy_from(&finals[s].slice(index * block, [block]))?,
                        None => part.clear()?,
                    }
                }
                let recurrent = weights.weight_hh.value();
                let buffers = Buffers { slots: &slots, states: &states, weights: recurrent, unit: weights.unit(), y: &dy };
                sweep_step::backward::<C>(&plan, &buffers, &dstates)?;
                self.gradients(weights, &plan, &slots, &states, &x, &dstates)?;
                for (s, gradient) in initial.iter().enumerate() {
                    gradient.slice(index * block, [block]).copy_from(&dstates.slice(s * block, [block]))?;
                }
                if let Some(dx) = &dx {
                    let (count, inputs) = (steps * rows, weights.weight_ih.value().shape()[1]);
                    let gates = Matrix::window(&slots, 0, count, C::Pre::LEN * hidden, C::Slots::LEN * hidden);
                    let weight_ih = Matrix::new(weights.weight_ih.value(), gates.cols, inputs);
                    gemm(gates, weight_ih, None, Matrix::new(dx, count, inputs), direction > 0)?;
                }
            }
            match dx {
                Some(dx) => dy = dx,
                None => return Ok((None, self.state(initial))),
            }
        }
        let dx = if batch_first { transpose::leading(&dy)? } else { dy };
        Ok((Some(dx), self.state(initial)))
    }

    /// After a backward sweep: the last part of the initial state's gradient, and, once for all steps, the gradients of
    /// the parameters.
    fn gradients(
        &self,
        weights: &Weights,
        plan: &Plan<'_>,
        slots: &Tensor,
        states: &Tensor,
        x: &Tensor,
        dstates: &Tensor,
    ) -> Result<()> {
        let (hidden, rows, count) = (plan.hidden, plan.rows, plan.steps * plan.rows);
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        // dx-part: the first columns of the slots. dr-part: one or more runs of columns.
        let input_part = Matrix::window(slots, 0, count, gates, kept);
        let inputs = weights.weight_ih.value().shape()[1];
        gemm(input_part.t(), Matrix::new(x, count, inputs), None, Matrix::new(weights.weight_ih.grad(), gates, inputs), true)?;
        if let Some((bias_ih, _)) = &weights.bias {
            column_sum(input_part, 0, bias_ih.grad())?;
        }
        let first_step = if plan.reverse { plan.steps - 1 } else { 0 };
        // The states before each step: slots 0 .. T of h, or 1 .. T + 1 in reverse.
        let h = Matrix::window(states, if plan.reverse { rows * hidden } else { 0 }, count, hidden, hidden);
        for (gate, slot, run) in recurrent_runs::<C>() {
            let run = run * hidden;
            let recurrent_part = |offset: usize, rows: usize| Matrix::window(slots, offset + slot * hidden, rows, run, kept);
            let w = Matrix::window(weights.weight_hh.value(), gate * hidden * hidden, run, hidden, hidden);
            let dw = Matrix::window(weights.weight_hh.grad(), gate * hidden * hidden, run, hidden, hidden);
            let dh0 = Matrix::window(dstates, 0, rows, hidden, hidden);
            gemm(recurrent_part(first_step * rows * kept, rows), w, None, dh0, true)?;
            gemm(recurrent_part(0, count).t(), h, None, dw, true)?;
            if let Some((_, bias_hh)) = &weights.bias {
                column_sum(recurrent_part(0, count), gate * hidden, bias_hh.grad())?;
            }
        }
        Ok(())
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
        Ok(self.run_backward(tape.open(&op)?, dy, None, needs_dx)?.0)
    }
}

impl<C: Cell> Recurrent<C> {
    fn run_layer(
        &self,
        method: &str,
        x: &Value,
        context: &Context<'_>,
        train: bool,
    ) -> Result<(Tensor, C::Value, Option<RecurrentTape>)> {
        let op = self.op(method);
        if self.config.batch_first {
            let what = "batch_first(true) has no place among other layers, which are time-major; give the model [seq, batch, ..]";
            return Err(Error::unsupported(&op, what));
        }
        let state = match context.state {
            [] => None,
            tensors => Some(C::Value::from_tensors(tensors.to_vec()).ok_or_else(|| {
                Error::argument(&op, "state", format!("{} tensors", tensors.len()), format!("{:?}", C::Value::NAMES))
            })?),
        };
        let input = Input { lengths: context.lengths, state: state.as_ref(), key: context.key };
        self.run(method, x.numbers(&op)?, input, train)
    }
}
