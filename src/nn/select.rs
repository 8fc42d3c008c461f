//! [`LastStep`]: one output for a whole sequence.

use super::{Context, Layer, Module, Output, Param, Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::gather;
use crate::tensor::{Ids, Lengths, Tensor};

/// Of each row the output at its last valid step: `[T, B, F]` to `[B, F]`; zeros for a row of length 0.
///
/// Of a bidirectional layer this takes both halves at that step: the reverse half has then seen that step alone. The
/// final state holds the reverse half after the whole row.
#[derive(Clone, Copy, Debug, Default)]
pub struct LastStep;

struct LastStepTape {
    steps: Ids,
    shape: [usize; 3],
}

impl LastStep {
    /// The row of `x [T * B, F]` that holds each sequence's last valid step; past the end for sequences of length 0.
    fn rows(&self, op: &str, x: &Tensor, lengths: Option<&Lengths>) -> Result<LastStepTape> {
        let &[steps, rows, features] = x.shape() else {
            return Err(Error::shape(op, "x", x.shape(), "[seq, batch, features]"));
        };
        if let Some(lengths) = lengths {
            lengths.check(op, x.device(), steps, rows)?;
        }
        let last = |row: usize| match lengths.map_or(steps, |lengths| lengths.host()[row] as usize) {
            0 => (steps * rows) as u32,
            length => ((length - 1) * rows + row) as u32,
        };
        let indices: Vec<u32> = (0..rows).map(last).collect();
        Ok(LastStepTape { steps: Ids::from_slice(x.device(), &indices, [rows])?, shape: [steps, rows, features] })
    }
}

impl Module for LastStep {
    fn params(&self) -> Vec<(String, &Param)> {
        Vec::new()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        Vec::new()
    }
}

impl Layer for LastStep {
    fn kind(&self) -> &'static str {
        "last_step"
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        Ok(self.forward_train(x, context)?.0)
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let op = "last_step.forward";
        let x = x.numbers(op)?;
        let tape = self.rows(op, x, context.lengths)?;
        let y = gather::gather(tape.steps.tensor(), x, tape.shape[2])?;
        Ok((Output { y, state: Vec::new() }, Tape::new(tape)))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let op = "last_step.backward";
        let LastStepTape { steps, shape } = tape.open(op)?;
        steps.device().expect_same(op, "dy", dy.device())?;
        dy.expect_shape(op, "dy", &shape[1..], "[batch, features]")?;
        if !needs_dx {
            return Ok(None);
        }
        let dx = Tensor::zeros(dy.device(), shape)?;
        gather::scatter(&steps.positions()?, dy, &dx, shape[2], None)?;
        Ok(Some(dx))
    }
}
