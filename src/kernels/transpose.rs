//! Exchange of the two leading dimensions.

use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Transpose { a: u32, b: u32, c: u32, }
}

pub(crate) static TRANSPOSE: Kernel = Kernel {
    name: "transpose",
    source: include_str!("../../shaders/transpose.wgsl"),
    entry: "transpose",
    params: Transpose::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// `y [cols, rows]` = the transpose of `x [rows, cols]`.
pub(crate) fn matrix(x: &Tensor, rows: usize, cols: usize) -> Result<Tensor> {
    leading(&x.reshape([rows, cols, 1])?)?.reshape([cols, rows])
}

/// `y [b, a, c]` from `x [a, b, c]`: batch-first turned into time-major and back.
pub(crate) fn leading(x: &Tensor) -> Result<Tensor> {
    let [a, b, c] = [x.shape()[0], x.shape()[1], x.shape()[2]];
    let y = Tensor::uninitialized(x.device(), [b, a, c])?;
    match x.device().backend() {
        Backend::Native => {
            let (source, mut target) = (x.native::<u32>(), y.native_mut::<u32>());
            for (at, row) in target.chunks_exact_mut(c).enumerate() {
                let from = ((at % a) * b + at / a) * c;
                row.copy_from_slice(&source[from..from + c]);
            }
        }
        Backend::Gpu(gpu) => {
            let params = Transpose { a: a as u32, b: b as u32, c: c as u32 };
            gpu.launch(&TRANSPOSE, &params, &[x.range(), y.range()], grid(x.len()))?;
        }
    }
    Ok(y)
}
