//! Columns from one matrix into another.

use super::gemm::Matrix;
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;

params! {
    /// The shader's uniform struct.
    Columns { rows: u32, columns: u32, x_offset: u32, x_row: u32, y_offset: u32, y_row: u32, }
}

pub(crate) static COPY_COLUMNS: Kernel = Kernel {
    name: "copy_columns",
    source: include_str!("../../shaders/columns.wgsl"),
    entry: "copy_columns",
    params: Columns::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// `y = x`, both of one size, each with contiguous columns.
pub(crate) fn copy_columns(x: Matrix<'_>, y: Matrix<'_>) -> Result<()> {
    debug_assert!((x.rows, x.cols) == (y.rows, y.cols) && x.col == 1 && y.col == 1);
    match y.tensor.device().backend() {
        Backend::Native => {
            let (from, mut to) = (x.tensor.native::<u32>(), y.tensor.native_mut::<u32>());
            for (to, from) in to[y.offset..].chunks_mut(y.row).zip(from[x.offset..].chunks(x.row)).take(y.rows) {
                to[..y.cols].copy_from_slice(&from[..x.cols]);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let params = Columns {
                rows: x.rows as u32,
                columns: x.cols as u32,
                x_offset: x.offset as u32,
                x_row: x.row as u32,
                y_offset: y.offset as u32,
                y_row: y.row as u32,
            };
            gpu.launch(&COPY_COLUMNS, &params, &[x.tensor.range(), y.tensor.range()], grid(x.rows * x.cols))
        }
    }
}
