//! Inverted dropout with a mask that is drawn again in the backward pass.

use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::rng::{MaskKey, philox, unit};
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Dropout { count: u32, width: u32, batch: u32, start: u32, p: f32, scale: f32, key0: u32, key1: u32, }
}

pub(crate) static DROPOUT: Kernel = Kernel {
    name: "dropout",
    source: concat!(include_str!("../../shaders/dropout.wgsl"), include_str!("../../shaders/rng.wgsl")),
    entry: "dropout",
    params: Dropout::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// `y [T, batch, width]` from `x`: zero with probability `p`, else `x / (1 - p)`. The same call maps `dy` to `dx`. `start`: steps of
/// the sequence before the first one.
pub(crate) fn dropout(x: &Tensor, [start, batch, width]: [usize; 3], p: f32, key: MaskKey) -> Result<Tensor> {
    let y = Tensor::uninitialized(x.device(), x.shape())?;
    let ([key0, key1], scale) = (key.words(), 1.0 / (1.0 - p));
    match x.device().backend() {
        Backend::Native => {
            let (x, mut y) = (x.native::<f32>(), y.native_mut::<f32>());
            for (row, (y, x)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                for (u, (y, x)) in y.iter_mut().zip(x).enumerate() {
                    let [bits, ..] = philox([key0, key1], [u as u32, (row % batch) as u32, (start + row / batch) as u32, 0]);
                    *y = if unit(bits) >= p { x * scale } else { 0.0 };
                }
            }
        }
        Backend::Gpu(gpu) => {
            let params = Dropout {
                count: x.len() as u32,
                width: width as u32,
                batch: batch as u32,
                start: start as u32,
                p,
                scale,
                key0,
                key1,
            };
            gpu.launch(&DROPOUT, &params, &[x.range(), y.range()], grid(x.len()))?;
        }
    }
    Ok(y)
}
