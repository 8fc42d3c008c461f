//! [`Sequential`]: layers in a row.

use std::path::Path;

use super::{Context, Input, Layer, Module, Output, Param, Tape, Value};
use crate::checkpoint;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Layers in a row, itself a layer. Lengths, state and mask keys reach each of them, a teacher the last; parameters are named
/// `0.weight`, `1.weight_ih_l0`, .. as in PyTorch's `nn.Sequential`, or `encoder.weight_ih_l0` where the layer has a name.
#[derive(Default)]
pub struct Sequential {
    layers: Vec<(String, Box<dyn Layer>)>,
}

/// The states of all layers of a [`Sequential`]: a value, passed in and returned.
#[derive(Clone, Debug)]
pub struct State {
    layers: Vec<Vec<Tensor>>,
}

impl State {
    /// Of the tensors of each layer, in its own order: none for a layer without state; for an LSTM h and c
    /// `[layers * directions, batch, hidden]`.
    pub fn new(layers: Vec<Vec<Tensor>>) -> Self {
        Self { layers }
    }

    /// The tensors of layer `index`, in its own order; empty for a layer without state.
    pub fn layer(&self, index: usize) -> &[Tensor] {
        self.layers.get(index).map_or(&[], Vec::as_slice)
    }

    pub(super) fn layers(&self) -> &[Vec<Tensor>] {
        &self.layers
    }

    /// Writes all tensors to a safetensors file; `1.0` and `1.1` are the first two of layer 1.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`]; what the device reports.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        checkpoint::write_state(path.as_ref(), &self.layers)
    }

    /// The state that [`State::save`] wrote, on `device`. Whether it fits a model shows when the model gets it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Format`]; what the device reports.
    pub fn load(device: &Device, path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { layers: checkpoint::read_state(device, path.as_ref())? })
    }
}

/// What [`Sequential::forward_train`] keeps for [`Sequential::backward`].
#[derive(Debug)]
pub struct SequentialTape {
    tapes: Vec<Tape>,
}

/// The initial state of each layer; `None`: zeros.
type States<'a> = Option<Vec<&'a [Tensor]>>;

impl Sequential {
    /// No layers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more layer at the end, named by its place.
    pub fn push(mut self, layer: impl Layer + 'static) -> Self {
        self.layers.push((self.layers.len().to_string(), Box::new(layer)));
        self
    }

    /// With one more layer at the end, named `name` in place of its number.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a name that another layer has, that is empty, a number, or has a dot in it.
    pub fn push_named(mut self, name: &str, layer: impl Layer + 'static) -> Result<Self> {
        let (op, given) = ("sequential.push_named", format!("{name:?}"));
        if self.layers.iter().any(|(other, _)| other == name) {
            return Err(Error::argument(op, "name", given, "a name that no other layer has"));
        }
        if name.bytes().all(|byte| byte.is_ascii_digit()) || name.contains('.') {
            return Err(Error::argument(op, "name", given, "a name without dots, not empty, not a number"));
        }
        self.layers.push((name.to_owned(), Box::new(layer)));
        Ok(self)
    }

    /// The output for `x`, and the layers' final states.
    ///
    /// # Errors
    /// What a layer refuses, and what the device reports.
    pub fn forward<'a>(&self, x: impl Into<Value>, input: impl Into<Input<'a, State>>) -> Result<(Tensor, State)> {
        let op = "sequential.forward";
        let (states, context) = self.open(op, input.into())?;
        let (y, layers, _) = self.run(op, x.into(), states, context, |layer, x, c| Ok((layer.forward(x, c)?, ())))?;
        Ok((y, State { layers }))
    }

    /// One step of a stream: x `[B, F]`, or ids `[B]`, and the states so far give y `[B, ..]` and the next states.
    ///
    /// # Errors
    /// As [`Sequential::forward`]; [`crate::ErrorKind::Unsupported`] from a layer that cannot stream, by its name.
    pub fn step<'a>(&self, x: impl Into<Value>, input: impl Into<Input<'a, State>>) -> Result<(Tensor, State)> {
        let op = "sequential.step";
        let (states, context) = self.open(op, input.into())?;
        let (y, layers, _) = self.run(op, x.into(), states, context, |layer, x, c| Ok((layer.step(x, c)?, ())))?;
        Ok((y, State { layers }))
    }

    /// As [`Sequential::forward`], with dropout, and a tape for [`Sequential::backward`].
    ///
    /// # Errors
    /// As [`Sequential::forward`]; [`crate::ErrorKind::Argument`] where dropout has no key.
    pub fn forward_train<'a>(
        &self,
        x: impl Into<Value>,
        input: impl Into<Input<'a, State>>,
    ) -> Result<(Tensor, State, SequentialTape)> {
        let op = "sequential.forward";
        let (states, context) = self.open(op, input.into())?;
        let (y, layers, tapes) = self.run(op, x.into(), states, context, |layer, x, c| layer.forward_train(x, c))?;
        Ok((y, State { layers }, SequentialTape { tapes }))
    }

    /// Adds to the gradients of all parameters, from that of the output.
    ///
    /// # Errors
    /// What a layer refuses, and what the device reports.
    pub fn backward(&self, tape: SequentialTape, dy: &Tensor) -> Result<()> {
        self.run_backward(tape, dy, None, false).map(|_| ())
    }

    /// The same where gradients also flow through the state: from that of the final states (`None`: zeros) also to that of the
    /// initial ones. With the tapes of several windows kept, the last window's goes first, and each hands on its gradient to the one
    /// before it: the gradients are then those of one long pass. [`super::Recurrent::backward`] has an example.
    ///
    /// # Errors
    /// As [`Sequential::backward`]; [`crate::ErrorKind::Argument`] for the state of another model;
    /// [`crate::ErrorKind::Unsupported`] from a layer of the application's own whose state has no gradient.
    pub fn backward_from(&self, tape: SequentialTape, dy: &Tensor, dstate: Option<&State>) -> Result<State> {
        if let Some(dstate) = dstate.filter(|dstate| dstate.layers.len() != self.layers.len()) {
            let (given, expected) = (dstate.layers.len(), self.layers.len());
            return Err(Error::argument("sequential.backward_from", "dstate", format!("of {given} layers"), expected));
        }
        let dstates = match dstate {
            Some(dstate) => dstate.layers.iter().map(Vec::as_slice).collect(),
            None => vec![&[][..]; self.layers.len()],
        };
        Ok(State { layers: self.run_backward(tape, dy, Some(dstates), false)?.1 })
    }

    /// What each layer gets of a state for all.
    fn open<'a>(&self, op: &str, input: Input<'a, State>) -> Result<(States<'a>, Context<'a>)> {
        let Input { lengths, state, key, teacher } = input;
        if let Some(state) = state.filter(|state| state.layers.len() != self.layers.len()) {
            let (given, expected) = (state.layers.len(), self.layers.len());
            return Err(Error::argument(op, "state", format!("of {given} layers"), expected));
        }
        let states = state.map(|state| state.layers.iter().map(Vec::as_slice).collect());
        Ok((states, Context { lengths, state: &[], key, teacher }))
    }

    /// The same where the tensors of all layers come one after another.
    fn open_layer<'a>(&self, op: &str, context: &Context<'a>) -> Result<(States<'a>, Context<'a>)> {
        Ok((self.split(op, "state", context.state)?, *context))
    }

    /// The tensors of each layer, of those of all layers one after another.
    fn split<'a>(&self, op: &str, argument: &str, mut rest: &'a [Tensor]) -> Result<States<'a>> {
        if rest.is_empty() {
            return Ok(None);
        }
        if rest.len() != self.state_len() {
            let (given, expected) = (format!("{} tensors", rest.len()), format!("{} tensors", self.state_len()));
            return Err(Error::argument(op, argument, given, expected));
        }
        let mut states = Vec::new();
        for (_, layer) in &self.layers {
            let (part, others) = rest.split_at(layer.state_len());
            states.push(part);
            rest = others;
        }
        Ok(Some(states))
    }

    /// Calls every layer in turn; gives the output, and each layer's final state and what `call` gave beside.
    fn run<T>(
        &self,
        op: &str,
        x: Value,
        states: States<'_>,
        context: Context<'_>,
        call: impl Fn(&dyn Layer, &Value, &Context<'_>) -> Result<(Output, T)>,
    ) -> Result<(Tensor, Vec<Vec<Tensor>>, Vec<T>)> {
        // A teacher's targets are those of the whole row: of its last layer's output.
        let last = self.layers.len().saturating_sub(1);
        if let (Some(_), Some((_, layer))) = (context.teacher, self.layers.last().filter(|(_, layer)| !layer.takes_teacher())) {
            let what = "cannot use a teacher, which needs recurrence through the output only, one layer, and time read forward";
            return Err(Error::unsupported(op, format!("the last layer ({}) {what} (RnnConfig::jordan)", layer.kind())));
        }
        let (mut value, mut finals, mut extras) = (x, Vec::new(), Vec::new());
        for (index, (_, layer)) in self.layers.iter().enumerate() {
            let state = states.as_ref().map_or(&[][..], |states| states[index]);
            let key = context.key.map(|key| key.layer(index));
            let teacher = context.teacher.filter(|_| index == last);
            let (output, extra) = call(layer.as_ref(), &value, &Context { state, key, teacher, ..context })?;
            if states.is_some() && state.len() != output.state.len() {
                let argument = format!("state of layer {index} ({})", layer.kind());
                let (given, expected) = (format!("{} tensors", state.len()), format!("{} tensors", output.state.len()));
                return Err(Error::argument(op, &argument, given, expected));
            }
            value = Value::Numbers(output.y);
            finals.push(output.state);
            extras.push(extra);
        }
        match value {
            Value::Numbers(y) => Ok((y, finals, extras)),
            Value::Ids(_) => Err(Error::unsupported(op, "there are no layers")),
        }
    }

    /// With the gradients of the final states, where those of the initial ones are wanted.
    fn run_backward(
        &self,
        tape: SequentialTape,
        dy: &Tensor,
        dstates: States<'_>,
        needs_dx: bool,
    ) -> Result<(Option<Tensor>, Vec<Vec<Tensor>>)> {
        let op = "sequential.backward";
        if tape.tapes.len() != self.layers.len() {
            let (given, expected) = (tape.tapes.len(), self.layers.len());
            return Err(Error::argument(op, "tape", format!("of {given} layers"), expected));
        }
        let (mut dy, mut firsts) = (dy.clone(), vec![Vec::new(); self.layers.len()]);
        for (index, ((_, layer), tape)) in self.layers.iter().zip(tape.tapes).enumerate().rev() {
            let needs = index > 0 || needs_dx;
            let dx = match &dstates {
                None => layer.backward(tape, &dy, needs)?,
                Some(dstates) => {
                    let (dx, first) = layer.backward_from(tape, &dy, dstates[index], needs)?;
                    firsts[index] = first;
                    dx
                }
            };
            match dx {
                Some(dx) => dy = dx,
                None if index == 0 => return Ok((None, firsts)),
                None => {
                    let what = format!("layer {index} ({}) takes ids and must be the first", layer.kind());
                    return Err(Error::unsupported(op, what));
                }
            }
        }
        Ok((needs_dx.then_some(dy), firsts))
    }
}

impl Module for Sequential {
    fn params(&self) -> Vec<(String, &Param)> {
        let mut params = Vec::new();
        for (place, layer) in &self.layers {
            params.extend(layer.params().into_iter().map(|(name, param)| (format!("{place}.{name}"), param)));
        }
        params
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        let mut params = Vec::new();
        for (place, layer) in &mut self.layers {
            params.extend(layer.params_mut().into_iter().map(|(name, param)| (format!("{place}.{name}"), param)));
        }
        params
    }
}

/// Its state is the tensors of all layers, one after another.
impl Layer for Sequential {
    fn kind(&self) -> &'static str {
        "sequential"
    }

    fn takes_teacher(&self) -> bool {
        self.layers.last().is_some_and(|(_, layer)| layer.takes_teacher())
    }

    fn state_len(&self) -> usize {
        self.layers.iter().map(|(_, layer)| layer.state_len()).sum()
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = "sequential.forward";
        let (states, context) = self.open_layer(op, context)?;
        let (y, finals, _) = self.run(op, x.clone(), states, context, |layer, x, c| Ok((layer.forward(x, c)?, ())))?;
        Ok(Output { y, state: finals.concat() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let op = "sequential.forward";
        let (states, context) = self.open_layer(op, context)?;
        let (y, finals, tapes) = self.run(op, x.clone(), states, context, |layer, x, c| layer.forward_train(x, c))?;
        Ok((Output { y, state: finals.concat() }, Tape::new(SequentialTape { tapes })))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        Ok(self.run_backward(tape.open("sequential.backward")?, dy, None, needs_dx)?.0)
    }

    fn backward_from(&self, tape: Tape, dy: &Tensor, dstate: &[Tensor], needs_dx: bool) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let op = "sequential.backward_from";
        let dstates = self.split(op, "dstate", dstate)?.unwrap_or_else(|| vec![&[][..]; self.layers.len()]);
        let (dx, firsts) = self.run_backward(tape.open(op)?, dy, Some(dstates), needs_dx)?;
        Ok((dx, firsts.concat()))
    }

    fn step(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = "sequential.step";
        let (states, context) = self.open_layer(op, context)?;
        let (y, finals, _) = self.run(op, x.clone(), states, context, |layer, x, c| Ok((layer.step(x, c)?, ())))?;
        Ok(Output { y, state: finals.concat() })
    }
}

impl std::fmt::Debug for Sequential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.layers.iter().map(|(_, layer)| layer.kind())).finish()
    }
}
