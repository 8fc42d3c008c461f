//! Sums over a whole tensor in a fixed order: blocks first, then the blocks' sums.

use super::{READ, READ_WRITE};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Reduce { count: u32, block: u32, scale: f32, }
}

pub(crate) static SUM: Kernel = Kernel {
    name: "sum",
    source: include_str!("../../shaders/reduce.wgsl"),
    entry: "sum",
    params: Reduce::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 256,
    features: &[],
};

pub(crate) static SUM_OF_SQUARES: Kernel = Kernel { name: "sum_of_squares", entry: "sum_of_squares", ..SUM };

/// Numbers of a block at least, and blocks at most.
const BLOCK: usize = 4096;
const BLOCKS: usize = 1024;

/// `[1]`: the sum of all elements, times `scale`.
pub(crate) fn sum(x: &Tensor, scale: f32) -> Result<Tensor> {
    reduce(&SUM, x, scale, |block| block.iter().sum())
}

/// `[1]`: the sum of the squares of all elements.
pub(crate) fn sum_of_squares(x: &Tensor) -> Result<Tensor> {
    reduce(&SUM_OF_SQUARES, x, 1.0, |block| block.iter().map(|value| value * value).sum())
}

fn reduce(kernel: &'static Kernel, x: &Tensor, scale: f32, of_block: fn(&[f32]) -> f32) -> Result<Tensor> {
    let total = Tensor::uninitialized(x.device(), [1])?;
    let block = BLOCK.max(x.len().div_ceil(BLOCKS));
    let blocks = x.len().div_ceil(block);
    match x.device().backend() {
        Backend::Native => {
            let sums: f32 = x.native::<f32>().chunks(block).map(of_block).sum();
            total.native_mut::<f32>()[0] = sums * scale;
        }
        Backend::Gpu(gpu) => {
            let params = |count: usize, block: usize, scale| Reduce { count: count as u32, block: block as u32, scale };
            if blocks == 1 {
                gpu.launch(kernel, &params(x.len(), block, scale), &[x.range(), total.range()], [1, 1, 1])?;
            } else {
                let sums = Tensor::uninitialized(x.device(), [blocks])?;
                gpu.launch(kernel, &params(x.len(), block, 1.0), &[x.range(), sums.range()], [blocks as u32, 1, 1])?;
                gpu.launch(&SUM, &params(blocks, blocks, scale), &[sums.range(), total.range()], [1, 1, 1])?;
            }
        }
    }
    Ok(total)
}
