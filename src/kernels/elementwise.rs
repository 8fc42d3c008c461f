//! Sums, products and multiples, number by number.

use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Elementwise { count: u32, period: u32, factor: f32, }
}

pub(crate) static ADD: Kernel = Kernel {
    name: "add",
    source: include_str!("../../shaders/elementwise.wgsl"),
    entry: "add",
    params: Elementwise::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

pub(crate) static MULTIPLY: Kernel = Kernel { name: "multiply", entry: "multiply", ..ADD };

pub(crate) static SCALE: Kernel = Kernel { name: "scale", entry: "scale", bindings: &[(1, READ), (3, READ_WRITE)], ..ADD };

/// `a + b`; b holds as many numbers as a, or as its last dimensions, and then meets every row of those.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    combine(&ADD, a, b, |a, b| a + b)
}

/// `a * b`, as [`add`].
pub(crate) fn multiply(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    combine(&MULTIPLY, a, b, |a, b| a * b)
}

fn combine(kernel: &'static Kernel, a: &Tensor, b: &Tensor, twin: impl Fn(f32, f32) -> f32) -> Result<Tensor> {
    debug_assert_eq!(a.len() % b.len(), 0);
    let y = Tensor::uninitialized(a.device(), a.shape())?;
    match a.device().backend() {
        Backend::Native => {
            let (a, b, mut y) = (a.native::<f32>(), b.native::<f32>(), y.native_mut::<f32>());
            for (y, a) in y.chunks_exact_mut(b.len()).zip(a.chunks_exact(b.len())) {
                y.iter_mut().zip(a).zip(b.iter()).for_each(|((y, a), b)| *y = twin(*a, *b));
            }
        }
        Backend::Gpu(gpu) => {
            let params = Elementwise { count: a.len() as u32, period: b.len() as u32, factor: 0.0 };
            gpu.launch(kernel, &params, &[a.range(), b.range(), y.range()], grid(y.len()))?;
        }
    }
    Ok(y)
}

/// `a * factor`.
pub(crate) fn scale(a: &Tensor, factor: f32) -> Result<Tensor> {
    let y = Tensor::uninitialized(a.device(), a.shape())?;
    match a.device().backend() {
        Backend::Native => {
            let (a, mut y) = (a.native::<f32>(), y.native_mut::<f32>());
            y.iter_mut().zip(a.iter()).for_each(|(y, a)| *y = a * factor);
        }
        Backend::Gpu(gpu) => {
            let params = Elementwise { count: a.len() as u32, period: 1, factor };
            gpu.launch(&SCALE, &params, &[a.range(), y.range()], grid(y.len()))?;
        }
    }
    Ok(y)
}
