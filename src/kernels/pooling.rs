//! One row of numbers for a whole sequence: mean, largest, or last of the valid steps, and back.

use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::{Lengths, Tensor};

params! {
    /// The shader's uniform struct.
    Pooling { steps: u32, batch: u32, width: u32, ragged: u32, split: u32, }
}

pub(crate) static MEAN: Kernel = Kernel {
    name: "mean_over_time",
    source: include_str!("../../shaders/pooling.wgsl"),
    entry: "mean_over_time",
    params: Pooling::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

pub(crate) static MEAN_BACKWARD: Kernel = Kernel {
    name: "mean_over_time_backward",
    entry: "mean_over_time_backward",
    bindings: &[(1, READ), (4, READ), (5, READ_WRITE)],
    ..MEAN
};

pub(crate) static LAST: Kernel = Kernel { name: "last", entry: "last", ..MEAN };

pub(crate) static LAST_BACKWARD: Kernel = Kernel { name: "last_backward", entry: "last_backward", ..MEAN_BACKWARD };

pub(crate) static MAX: Kernel = Kernel {
    name: "max_over_time",
    entry: "max_over_time",
    bindings: &[(1, READ), (6, READ), (7, READ_WRITE), (8, READ_WRITE)],
    ..MEAN
};

pub(crate) static MAX_BACKWARD: Kernel = Kernel {
    name: "max_over_time_backward",
    entry: "max_over_time_backward",
    bindings: &[(4, READ), (5, READ_WRITE), (9, READ)],
    ..MEAN
};

/// The sizes of x `[steps, batch, width]`, and the valid steps of each sequence, at most `steps`.
#[derive(Clone, Copy)]
pub(crate) struct Sequences<'a> {
    pub steps: usize,
    pub batch: usize,
    pub width: usize,
    pub lengths: Option<&'a Lengths>,
}

impl Sequences<'_> {
    fn params(&self, split: usize) -> Pooling {
        Pooling {
            steps: self.steps as u32,
            batch: self.batch as u32,
            width: self.width as u32,
            ragged: self.lengths.is_some().into(),
            split: split as u32,
        }
    }

    fn length(&self, row: usize) -> usize {
        self.lengths.map_or(self.steps, |lengths| lengths.host()[row] as usize)
    }

    fn cells(&self) -> usize {
        self.batch * self.width
    }

    /// Calls `work(step, length, first number in x, first number in y)` for every valid step of every sequence, in order of
    /// time.
    fn each(&self, mut work: impl FnMut(usize, usize, usize, usize)) {
        for step in 0..self.steps {
            for row in (0..self.batch).filter(|row| step < self.length(*row)) {
                work(step, self.length(row), step * self.cells() + row * self.width, row * self.width);
            }
        }
    }

    /// The columns of a sequence of `length` that come from `step`.
    fn last_columns(&self, step: usize, length: usize, split: usize) -> std::ops::Range<usize> {
        match (step == 0, step + 1 == length) {
            (true, true) => 0..self.width,
            (true, false) => split..self.width,
            (false, true) => 0..split,
            (false, false) => 0..0,
        }
    }

    /// Makes dx `[steps, batch, width]`: on a GPU with `kernel`; else zeros, in which `work` fills in what belongs to a valid
    /// step: `(dx, step, length, first number in x, first number in y)`.
    fn backward(
        &self,
        kernel: &'static Kernel,
        split: usize,
        dy: &Tensor,
        mut work: impl FnMut(&mut [f32], &[f32], usize, usize, usize),
    ) -> Result<Tensor> {
        debug_assert_eq!(dy.len(), self.cells());
        let dx = Tensor::uninitialized(dy.device(), [self.steps, self.batch, self.width])?;
        match dy.device().backend() {
            Backend::Native => {
                let (dy, mut dx) = (dy.native::<f32>(), dx.native_mut::<f32>());
                dx.fill(0.0);
                self.each(|step, length, from, to| {
                    work(&mut dx[from..][..self.width], &dy[to..][..self.width], step, length, to);
                });
            }
            Backend::Gpu(gpu) => {
                let lengths = self.lengths.map_or(dy, Lengths::tensor);
                gpu.launch(kernel, &self.params(split), &[lengths.range(), dy.range(), dx.range()], grid(dx.len()))?;
            }
        }
        Ok(dx)
    }
}

/// `y [batch, width]`: the mean of each sequence's valid steps.
pub(crate) fn mean(x: &Tensor, sequences: Sequences<'_>) -> Result<Tensor> {
    let Sequences { batch, width, lengths, .. } = sequences;
    debug_assert_eq!(x.len(), sequences.steps * sequences.cells());
    let y = Tensor::uninitialized(x.device(), [batch, width])?;
    match x.device().backend() {
        Backend::Native => {
            let (x, mut y) = (x.native::<f32>(), y.native_mut::<f32>());
            y.fill(0.0);
            sequences.each(|_, _, from, to| y[to..][..width].iter_mut().zip(&x[from..]).for_each(|(sum, x)| *sum += x));
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                let length = sequences.length(row).max(1) as f32;
                y.iter_mut().for_each(|sum| *sum /= length);
            }
        }
        Backend::Gpu(gpu) => {
            let lengths = lengths.map_or(x, Lengths::tensor);
            gpu.launch(&MEAN, &sequences.params(0), &[lengths.range(), x.range(), y.range()], grid(y.len()))?;
        }
    }
    Ok(y)
}

/// `dx = dy / length` at every valid step, zeros past it.
pub(crate) fn mean_backward(dy: &Tensor, sequences: Sequences<'_>) -> Result<Tensor> {
    sequences.backward(&MEAN_BACKWARD, 0, dy, |dx, dy, _, length, _| {
        dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = dy / length as f32);
    })
}

/// `y [batch, width]`: of each sequence the last valid step in the columns before `split`, step 0 in the others.
pub(crate) fn last(x: &Tensor, split: usize, sequences: Sequences<'_>) -> Result<Tensor> {
    let Sequences { batch, width, lengths, .. } = sequences;
    debug_assert_eq!(x.len(), sequences.steps * sequences.cells());
    let y = Tensor::uninitialized(x.device(), [batch, width])?;
    match x.device().backend() {
        Backend::Native => {
            let (x, mut y) = (x.native::<f32>(), y.native_mut::<f32>());
            y.fill(0.0);
            sequences.each(|step, length, from, to| {
                let columns = sequences.last_columns(step, length, split);
                y[to..][columns.clone()].copy_from_slice(&x[from..][columns]);
            });
        }
        Backend::Gpu(gpu) => {
            let lengths = lengths.map_or(x, Lengths::tensor);
            gpu.launch(&LAST, &sequences.params(split), &[lengths.range(), x.range(), y.range()], grid(y.len()))?;
        }
    }
    Ok(y)
}

/// `dy` where [`last`] took its numbers, zeros elsewhere.
pub(crate) fn last_backward(dy: &Tensor, split: usize, sequences: Sequences<'_>) -> Result<Tensor> {
    sequences.backward(&LAST_BACKWARD, split, dy, |dx, dy, step, length, _| {
        let columns = sequences.last_columns(step, length, split);
        dx[columns.clone()].copy_from_slice(&dy[columns]);
    })
}

/// Numbers in order, from 1 on: zeros of both signs are one number, every NaN is the largest.
fn rank(bits: u32) -> u32 {
    match bits & 0x7fff_ffff {
        0x7f80_0001.. => u32::MAX,
        size if bits > 0x8000_0000 => 0x8000_0000 - size,
        size => 0x8000_0000 + size,
    }
}

/// `y [batch, width]`: the largest number of each sequence's valid steps, bit by bit, NaN being the largest of all; and the
/// first step that has it (`u32`), `steps` where there is none.
pub(crate) fn max(x: &Tensor, sequences: Sequences<'_>) -> Result<(Tensor, Tensor)> {
    let Sequences { steps, batch, width, lengths } = sequences;
    debug_assert_eq!(x.len(), steps * sequences.cells());
    let (y, found) = (Tensor::uninitialized(x.device(), [batch, width])?, Tensor::uninitialized(x.device(), [batch, width])?);
    match x.device().backend() {
        Backend::Native => {
            let x = x.native::<u32>();
            let (mut y, mut found) = (y.native_mut::<u32>(), found.native_mut::<u32>());
            y.fill(0);
            found.fill(steps as u32);
            sequences.each(|step, _, from, to| {
                let best = y[to..][..width].iter_mut().zip(&mut found[to..]);
                for ((bits, found), word) in best.zip(&x[from..]) {
                    if step == 0 || rank(*word) > rank(*bits) {
                        (*bits, *found) = (*word, step as u32);
                    }
                }
            });
        }
        Backend::Gpu(gpu) => {
            let lengths = lengths.map_or(x, Lengths::tensor);
            let bindings = [lengths.range(), x.range(), y.range(), found.range()];
            gpu.launch(&MAX, &sequences.params(0), &bindings, grid(y.len()))?;
        }
    }
    Ok((y, found))
}

/// `dx [steps, batch, width]`: `dy` at the steps that [`max`] found, zeros elsewhere.
pub(crate) fn max_backward(dy: &Tensor, found: &Tensor, sequences: Sequences<'_>) -> Result<Tensor> {
    debug_assert!(dy.len() == sequences.cells() && found.len() == dy.len());
    let dx = Tensor::uninitialized(dy.device(), [sequences.steps, sequences.batch, sequences.width])?;
    match dy.device().backend() {
        Backend::Native => {
            let (dy, found, mut dx) = (dy.native::<f32>(), found.native::<u32>(), dx.native_mut::<f32>());
            dx.fill(0.0);
            for (cell, (dy, step)) in dy.iter().zip(found.iter()).enumerate() {
                if (*step as usize) < sequences.steps {
                    dx[*step as usize * sequences.cells() + cell] = *dy;
                }
            }
        }
        Backend::Gpu(gpu) => {
            let bindings = [dy.range(), dx.range(), found.range()];
            gpu.launch(&MAX_BACKWARD, &sequences.params(0), &bindings, grid(dx.len()))?;
        }
    }
    Ok(dx)
}
