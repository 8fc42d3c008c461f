//! [`Sequential`]: layers in a row.

use super::{Context, Input, Layer, Module, Output, Param, Tape, Value};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Layers in a row. Lengths, state and mask keys reach each of them; parameters are named `0.weight`,
/// `1.weight_ih_l0`, .. as in PyTorch's `nn.Sequential`.
#[derive(Default)]
pub struct Sequential {
    layers: Vec<Box<dyn Layer>>,
}

/// The states of all layers of a [`Sequential`]: a value, passed in and returned.
#[derive(Clone, Debug)]
pub struct State {
    layers: Vec<Vec<Tensor>>,
}

impl State {
    /// The tensors of layer `index`, in its own order; empty for a layer without state.
    pub fn layer(&self, index: usize) -> &[Tensor] {
        self.layers.get(index).map_or(&[], Vec::as_slice)
    }
}

/// What [`Sequential::forward_train`] keeps for [`Sequential::backward`].
#[derive(Debug)]
pub struct SequentialTape {
    tapes: Vec<Tape>,
}

impl Sequential {
    /// No layers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more layer at the end.
    pub fn push(mut self, layer: impl Layer + 'static) -> Self {
        self.layers.push(Box::new(layer));
        self
    }

    /// The output for `x`, and the layers' final states.
    ///
    /// # Errors
    /// What a layer refuses, and what the device reports.
    pub fn forward<'a>(&self, x: impl Into<Value>, input: impl Into<Input<'a, State>>) -> Result<(Tensor, State)> {
        let (y, state, _) = self.run(x.into(), input.into(), |layer, x, context| Ok((layer.forward(x, context)?, ())))?;
        Ok((y, state))
    }

    /// The same, with dropout, and a tape for [`Sequential::backward`].
    ///
    /// # Errors
    /// As [`Sequential::forward`]; [`crate::ErrorKind::Argument`] where dropout has no key.
    pub fn forward_train<'a>(
        &self,
        x: impl Into<Value>,
        input: impl Into<Input<'a, State>>,
    ) -> Result<(Tensor, State, SequentialTape)> {
        let (y, state, tapes) = self.run(x.into(), input.into(), |layer, x, context| layer.forward_train(x, context))?;
        Ok((y, state, SequentialTape { tapes }))
    }

    /// Adds to the gradients of all parameters, from that of the output.
    ///
    /// # Errors
    /// What a layer refuses, and what the device reports.
    pub fn backward(&self, tape: SequentialTape, dy: &Tensor) -> Result<()> {
        if tape.tapes.len() != self.layers.len() {
            let (given, expected) = (tape.tapes.len(), self.layers.len());
            return Err(Error::argument("sequential.backward", "tape", format!("of {given} layers"), expected));
        }
        let mut dy = dy.clone();
        for (index, (layer, tape)) in self.layers.iter().zip(tape.tapes).enumerate().rev() {
            match layer.backward(tape, &dy, index > 0)? {
                Some(dx) => dy = dx,
                None if index == 0 => {}
                None => {
                    let what = format!("layer {index} ({}) takes ids and must be the first", layer.kind());
                    return Err(Error::unsupported("sequential.backward", what));
                }
            }
        }
        Ok(())
    }

    fn run<T>(
        &self,
        x: Value,
        Input { lengths, state, key, teacher }: Input<'_, State>,
        call: impl Fn(&dyn Layer, &Value, &Context<'_>) -> Result<(Output, T)>,
    ) -> Result<(Tensor, State, Vec<T>)> {
        if let Some(state) = state.filter(|state| state.layers.len() != self.layers.len()) {
            let (given, expected) = (state.layers.len(), self.layers.len());
            return Err(Error::argument("sequential.forward", "state", format!("of {given} layers"), expected));
        }
        let (mut value, mut states, mut extras) = (x, Vec::new(), Vec::new());
        for (index, layer) in self.layers.iter().enumerate() {
            let key = key.map(|key| key.layer(index));
            let context = Context { lengths, state: state.map_or(&[], |state| state.layer(index)), key, teacher };
            let (output, extra) = call(layer.as_ref(), &value, &context)?;
            if state.is_some() && context.state.len() != output.state.len() {
                let (argument, given) = (format!("state of layer {index} ({})", layer.kind()), context.state.len());
                let (given, expected) = (format!("{given} tensors"), format!("{} tensors", output.state.len()));
                return Err(Error::argument("sequential.forward", &argument, given, expected));
            }
            value = Value::Numbers(output.y);
            states.push(output.state);
            extras.push(extra);
        }
        match value {
            Value::Numbers(y) => Ok((y, State { layers: states }, extras)),
            Value::Ids(_) => Err(Error::unsupported("sequential.forward", "there are no layers")),
        }
    }
}

impl Module for Sequential {
    fn params(&self) -> Vec<(String, &Param)> {
        let mut params = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            params.extend(layer.params().into_iter().map(|(name, param)| (format!("{index}.{name}"), param)));
        }
        params
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        let mut params = Vec::new();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            params.extend(layer.params_mut().into_iter().map(|(name, param)| (format!("{index}.{name}"), param)));
        }
        params
    }
}

impl std::fmt::Debug for Sequential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.layers.iter().map(|layer| layer.kind())).finish()
    }
}
