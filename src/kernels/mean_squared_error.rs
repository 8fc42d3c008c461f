//! Squared error and its gradient.

use super::cross_entropy::Counted;
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::{Lengths, Tensor};

params! {
    /// The shader's uniform struct.
    MeanSquaredError { count: u32, width: u32, batch: u32, ragged: u32, scale: f32, }
}

pub(crate) static MEAN_SQUARED_ERROR: Kernel = Kernel {
    name: "mean_squared_error",
    source: include_str!("../../shaders/mean_squared_error.wgsl"),
    entry: "mean_squared_error",
    params: MeanSquaredError::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE), (5, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// Of `y` and `wanted`, both `[T * B, width]`: the loss terms, not yet scaled, and the gradient, scaled.
pub(crate) fn mean_squared_error(y: &Tensor, wanted: &Tensor, width: usize, counted: Counted<'_>) -> Result<(Tensor, Tensor)> {
    let device = y.device();
    let (terms, dy) = (Tensor::uninitialized(device, y.shape())?, Tensor::uninitialized(device, y.shape())?);
    match device.backend() {
        Backend::Native => {
            let (y, wanted) = (y.native::<f32>(), wanted.native::<f32>());
            let (mut terms, mut dy) = (terms.native_mut::<f32>(), dy.native_mut::<f32>());
            for at in 0..y.len() {
                let row = at / width;
                let within = |l: &Lengths| row / counted.batch < l.host()[row % counted.batch] as usize;
                let difference = if counted.lengths.is_none_or(within) { y[at] - wanted[at] } else { 0.0 };
                terms[at] = difference * difference;
                dy[at] = 2.0 * difference * counted.scale;
            }
        }
        Backend::Gpu(gpu) => {
            let params = MeanSquaredError {
                count: y.len() as u32,
                width: width as u32,
                batch: counted.batch as u32,
                ragged: counted.lengths.is_some().into(),
                scale: counted.scale,
            };
            let lengths = counted.lengths.map_or(wanted, Lengths::tensor);
            let bindings = [y.range(), wanted.range(), lengths.range(), terms.range(), dy.range()];
            gpu.launch(&MEAN_SQUARED_ERROR, &params, &bindings, grid(y.len()))?;
        }
    }
    Ok((terms, dy))
}
