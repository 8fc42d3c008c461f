//! One output for a whole sequence: [`LastStep`], [`LastState`], [`MeanOverTime`], [`MaxOverTime`].

use std::marker::PhantomData;

use super::{Context, Direction, Layer, Module, Output, Param, Tape, Value};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::pooling::{self, Sequences};
use crate::tensor::{Lengths, Tensor};

/// Of each row the output at its last valid step: `[T, B, F]` to `[B, F]`; zeros for a row of length 0.
///
/// Of a bidirectional layer this takes both halves at that step: the reverse half has then seen that step alone.
/// [`LastState`] takes the reverse half after the whole row.
#[derive(Clone, Copy, Debug, Default)]
pub struct LastStep;

/// Of each row the final hidden state of the recurrent layer below, from its outputs: `[T, B, F]` to `[B, F]`; zeros for a row
/// of length 0. What a direction has read last stands at a row's last valid step, of the reverse direction at step 0.
#[derive(Clone, Copy, Debug)]
pub struct LastState {
    direction: Direction,
}

impl LastState {
    /// For a layer below that reads in this `direction`. Of [`Direction::Both`] the first half of the columns is the forward
    /// direction's.
    pub fn new(direction: Direction) -> Self {
        Self { direction }
    }
}

/// The mean of each row's valid steps: `[T, B, F]` to `[B, F]`; zeros for a row of length 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeanOverTime;

/// The largest of each row's valid steps, feature by feature: `[T, B, F]` to `[B, F]`; zeros for a row of length 0. NaN counts
/// as the largest; of equal steps the first receives the gradient.
#[derive(Clone, Copy, Debug, Default)]
pub struct MaxOverTime;

/// What becomes of the valid steps.
#[derive(Clone, Copy)]
enum Rule {
    Last(Direction),
    Mean,
    Max,
}

/// What the layers of this file differ in.
trait Pooling: 'static {
    const KIND: &'static str;
    fn rule(&self) -> Rule;
}

impl Pooling for LastStep {
    const KIND: &'static str = "last_step";

    fn rule(&self) -> Rule {
        Rule::Last(Direction::Forward)
    }
}

impl Pooling for LastState {
    const KIND: &'static str = "last_state";

    fn rule(&self) -> Rule {
        Rule::Last(self.direction)
    }
}

impl Pooling for MeanOverTime {
    const KIND: &'static str = "mean_over_time";

    fn rule(&self) -> Rule {
        Rule::Mean
    }
}

impl Pooling for MaxOverTime {
    const KIND: &'static str = "max_over_time";

    fn rule(&self) -> Rule {
        Rule::Max
    }
}

/// The tape of a `P`.
struct PoolingTape<P> {
    device: Device,
    shape: [usize; 3],
    lengths: Option<Lengths>,
    /// Of [`MaxOverTime`]: the step that each number came from.
    found: Option<Tensor>,
    layer: PhantomData<fn(P)>,
}

/// The first column that comes from step 0.
fn split(direction: Direction, width: usize) -> usize {
    match direction {
        Direction::Forward => width,
        Direction::Reverse => 0,
        Direction::Both => width / 2,
    }
}

fn forward<P: Pooling>(layer: &P, x: &Value, context: &Context<'_>) -> Result<(Output, PoolingTape<P>)> {
    let op = format!("{}.forward", P::KIND);
    let x = x.numbers(&op)?;
    let &[steps, batch, width] = x.shape() else {
        return Err(Error::shape(&op, "x", x.shape(), "[seq, batch, features]"));
    };
    if let Some(lengths) = context.lengths {
        lengths.check(&op, x.device(), steps, batch)?;
    }
    let sequences = Sequences { steps, batch, width, lengths: context.lengths };
    let (y, found) = match layer.rule() {
        Rule::Last(Direction::Both) if width % 2 == 1 => {
            return Err(Error::shape(&op, "x", x.shape(), "[seq, batch, 2 * hidden]"));
        }
        Rule::Last(direction) => (pooling::last(x, split(direction, width), sequences)?, None),
        Rule::Mean => (pooling::mean(x, sequences)?, None),
        Rule::Max => {
            let (y, found) = pooling::max(x, sequences)?;
            (y, Some(found))
        }
    };
    let (device, lengths) = (x.device().clone(), context.lengths.cloned());
    let tape = PoolingTape { device, shape: [steps, batch, width], lengths, found, layer: PhantomData };
    Ok((Output { y, state: Vec::new() }, tape))
}

fn backward<P: Pooling>(layer: &P, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
    let op = format!("{}.backward", P::KIND);
    let PoolingTape { device, shape, lengths, found, .. } = tape.open::<PoolingTape<P>>(&op)?;
    device.expect_same(&op, "dy", dy.device())?;
    dy.expect_shape(&op, "dy", &shape[1..], "[batch, features]")?;
    if !needs_dx {
        return Ok(None);
    }
    let [steps, batch, width] = shape;
    let sequences = Sequences { steps, batch, width, lengths: lengths.as_ref() };
    let dx = match (layer.rule(), found) {
        (Rule::Last(direction), _) => pooling::last_backward(dy, split(direction, width), sequences)?,
        (Rule::Mean, _) => pooling::mean_backward(dy, sequences)?,
        (Rule::Max, Some(found)) => pooling::max_backward(dy, &found, sequences)?,
        (Rule::Max, None) => unreachable!("its forward pass found the steps"),
    };
    Ok(Some(dx))
}

macro_rules! layers {
    ($($layer:ty,)*) => {$(
        impl Module for $layer {
            fn params(&self) -> Vec<(String, &Param)> {
                Vec::new()
            }

            fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
                Vec::new()
            }
        }

        impl Layer for $layer {
            fn kind(&self) -> &'static str {
                Self::KIND
            }

            fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
                Ok(forward(self, x, context)?.0)
            }

            fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
                let (output, tape) = forward(self, x, context)?;
                Ok((output, Tape::new(tape)))
            }

            fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
                backward(self, tape, dy, needs_dx)
            }
        }
    )*};
}

layers!(LastStep, LastState, MeanOverTime, MaxOverTime,);
