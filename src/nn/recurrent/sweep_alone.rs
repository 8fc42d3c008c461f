//! The sweep of one layer without the products before and after it, for the bench of kernels.

use std::slice;

use super::{Cell, Gradients, Pass, PassTape, Recurrent, Sequence, Slots};
use crate::error::Result;
use crate::tensor::Tensor;

/// The first layer and direction of a network, after a forward pass in training.
pub(crate) struct SweepAlone<C: Cell> {
    layer: Recurrent<C>,
    shape: [usize; 2],
    tapes: Vec<PassTape>,
    gradients: Vec<Gradients>,
    /// The slots before and after the forward sweep, which works in place.
    before: Tensor,
    after: Tensor,
    y: Tensor,
    dy: Tensor,
}

impl<C: Cell> SweepAlone<C> {
    /// For x `[T, B, I]` and dy `[T, B, H]`.
    pub fn new(layer: Recurrent<C>, x: &Tensor, dy: &Tensor) -> Result<Self> {
        let shape = [x.shape()[0], x.shape()[1]];
        let y = Tensor::uninitialized(&layer.device, dy.shape())?;
        let (tapes, gradients) = {
            let pass = [pass(&layer, shape)];
            (layer.prepare(&pass, x, shape[0] + 1, Slots::InputPart)?, layer.new_gradients(&pass)?)
        };
        tapes[0].states.clear()?;
        let copy = || -> Result<Tensor> {
            let copy = Tensor::uninitialized(&layer.device, tapes[0].slots.shape())?;
            copy.copy_from(&tapes[0].slots)?;
            Ok(copy)
        };
        let before = copy()?;
        layer.sweep_forward(&[pass(&layer, shape)], &tapes, None, &[], slice::from_ref(&y))?;
        let after = copy()?;
        Ok(Self { shape, tapes, gradients, before, after, y, dy: dy.clone(), layer })
    }

    /// Puts the input part back into the slots.
    pub fn prepare_forward(&self) -> Result<()> {
        self.tapes[0].slots.copy_from(&self.before)
    }

    /// The forward sweep.
    pub fn forward(&self) -> Result<()> {
        // x has gone into the slots.
        self.layer.sweep_forward(&[pass(&self.layer, self.shape)], &self.tapes, None, &[], slice::from_ref(&self.y))
    }

    /// Puts what the forward sweep left back into the slots.
    pub fn prepare_backward(&self) -> Result<()> {
        self.tapes[0].slots.copy_from(&self.after)?;
        self.gradients[0].dstates.clear()
    }

    /// The backward sweep.
    pub fn backward(&self) -> Result<()> {
        let pass = [pass(&self.layer, self.shape)];
        self.layer.sweep_backward(&pass, &self.tapes, slice::from_ref(&self.dy), &self.gradients, None)
    }

    /// Numbers of the slots and of the states, all steps together.
    pub fn sizes(&self) -> [usize; 2] {
        [self.tapes[0].slots.len(), self.tapes[0].states.len()]
    }
}

fn pass<C: Cell>(layer: &Recurrent<C>, [steps, rows]: [usize; 2]) -> Pass<'_> {
    let plan = layer.plan(&Sequence::plain(steps, rows), 0);
    Pass { plan, index: 0, key: None, batch: rows, teacher: None }
}
