//! Column sums: the gradient of a bias.

use super::gemm::Matrix;
use super::{MAX_GROUPS, READ, READ_WRITE, tiles};
use crate::backend::gpu::Gpu;
use crate::backend::native::{Shared, for_parts, threads};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    ColumnSum { rows: u32, columns: u32, offset: u32, row_stride: u32, first: u32, accumulate: u32, }
}

pub(crate) static COLUMN_SUM: Kernel = Kernel {
    name: "column_sum",
    source: include_str!("../../shaders/column_sum.wgsl"),
    entry: "column_sum",
    params: ColumnSum::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// Lanes of a workgroup, and rows of a block, as in the shader.
const LANES: usize = 64;
const ROWS: usize = 128;

/// On the CPU, fewer numbers than this are summed by one thread.
const PARALLEL: usize = 1 << 19;

/// `sums[first ..] +=` the sum of each column of `x [rows, columns]`, whose columns are contiguous.
pub(crate) fn column_sum(x: Matrix<'_>, first: usize, sums: &Tensor) -> Result<()> {
    debug_assert!(x.col == 1 && first + x.cols <= sums.len());
    match sums.device().backend() {
        Backend::Native => {
            let (values, mut sums) = (x.tensor.native::<f32>(), sums.native_mut::<f32>());
            let (values, sums) = (&values[x.offset..], &Shared::new(&mut sums[first..]));
            let parts = if x.rows * x.cols < PARALLEL { 1 } else { threads() };
            for_parts(x.cols, parts, |from, count| {
                let mut totals = vec![0.0f32; count];
                for row in values.chunks(x.row).take(x.rows) {
                    totals.iter_mut().zip(&row[from..]).for_each(|(total, value)| *total += value);
                }
                // SAFETY: columns of this part alone.
                let sums = unsafe { sums.slice(from, count) };
                sums.iter_mut().zip(&totals).for_each(|(sum, total)| *sum += total);
            });
            Ok(())
        }
        Backend::Gpu(gpu) => sum_columns(gpu, x, first, sums, true),
    }
}

/// The same on a GPU, added to `sums`, or in their place: the sums of blocks of rows, and then their sums in the same way.
pub(super) fn sum_columns(gpu: &Gpu, x: Matrix<'_>, first: usize, sums: &Tensor, accumulate: bool) -> Result<()> {
    let blocks = x.rows.div_ceil(ROWS);
    let params = ColumnSum {
        rows: x.rows as u32,
        columns: x.cols as u32,
        offset: x.offset as u32,
        row_stride: x.row as u32,
        first: first as u32,
        accumulate: accumulate.into(),
    };
    let groups = tiles(x.cols.div_ceil(LANES).min(MAX_GROUPS), blocks);
    if blocks == 1 {
        return gpu.launch(&COLUMN_SUM, &params, &[x.tensor.range(), sums.range()], groups);
    }
    let part = Tensor::uninitialized(sums.device(), [blocks, x.cols])?;
    let params = ColumnSum { first: 0, accumulate: 0, ..params };
    gpu.launch(&COLUMN_SUM, &params, &[x.tensor.range(), part.range()], groups)?;
    sum_columns(gpu, Matrix::new(&part, blocks, x.cols), first, sums, accumulate)
}
