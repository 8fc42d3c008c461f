//! [`Dropout`] between layers.

use super::{Context, Layer, Module, Output, Param, Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::dropout;
use crate::rng::MaskKey;
use crate::tensor::Tensor;

/// In training, each number becomes zero with probability p, and `x / (1 - p)` otherwise; else x as it is
/// (Srivastava et al. 2014, inverted).
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    p: f32,
}

impl Dropout {
    /// With probability `p` of a zero.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a p outside `[0, 1)`.
    pub fn new(p: f32) -> Result<Self> {
        match (0.0..1.0).contains(&p) {
            true => Ok(Self { p }),
            false => Err(Error::argument("dropout.new", "p", p, "in [0, 1)")),
        }
    }

    fn apply(&self, op: &str, x: &Tensor, key: MaskKey) -> Result<Tensor> {
        match *x.shape() {
            [.., rows, width] => dropout::dropout(x, [0, rows, width], self.p, key),
            ref shape => Err(Error::shape(op, "x", shape, "[.., batch, features]")),
        }
    }
}

impl Module for Dropout {
    fn params(&self) -> Vec<(String, &Param)> {
        Vec::new()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        Vec::new()
    }
}

impl Layer for Dropout {
    fn kind(&self) -> &'static str {
        "dropout"
    }

    fn forward(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
        Ok(Output { y: x.numbers("dropout.forward")?.clone(), state: Vec::new() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let op = "dropout.forward_train";
        let Some(key) = context.key else {
            return Err(Error::argument(op, "key", "not given", "a MaskKey"));
        };
        Ok((Output { y: self.apply(op, x.numbers(op)?, key)?, state: Vec::new() }, Tape::new(key)))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let op = "dropout.backward";
        let key = tape.open::<MaskKey>(op)?;
        if needs_dx { self.apply(op, dy, key).map(Some) } else { Ok(None) }
    }

    fn step(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
        Ok(Output { y: x.numbers("dropout.step")?.clone(), state: Vec::new() })
    }
}
