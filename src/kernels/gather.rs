//! Rows of a table by index, and the gradient of that in a fixed order of summation.

use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::{Positions, Tensor};

params! {
    /// The shader's uniform struct.
    Gather { rows: u32, width: u32, table: u32, skipped: u32, }
}

pub(crate) static GATHER: Kernel = Kernel {
    name: "gather",
    source: include_str!("../../shaders/gather.wgsl"),
    entry: "gather",
    params: Gather::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

pub(crate) static SCATTER: Kernel = Kernel {
    name: "scatter",
    entry: "scatter",
    bindings: &[(4, READ), (5, READ), (6, READ), (7, READ), (8, READ_WRITE)],
    ..GATHER
};

/// `y [indices, width]`: row `r` is `table[indices[r]]`, zeros where the index is past the table `[rows, width]`.
pub(crate) fn gather(indices: &Tensor, table: &Tensor, width: usize) -> Result<Tensor> {
    let (count, rows) = (indices.len(), table.len() / width);
    let y = Tensor::uninitialized(table.device(), [count, width])?;
    match table.device().backend() {
        Backend::Native => {
            let (indices, table, mut y) = (indices.native::<u32>(), table.native::<f32>(), y.native_mut::<f32>());
            for (row, index) in y.chunks_exact_mut(width).zip(indices.iter()) {
                // No index times a width: that may not fit into the 32 bits of a browser's addresses.
                match table.chunks_exact(width).nth(*index as usize) {
                    Some(values) => row.copy_from_slice(values),
                    None => row.fill(0.0),
                }
            }
        }
        Backend::Gpu(gpu) => {
            let params = Gather { rows: count as u32, width: width as u32, table: rows as u32, skipped: u32::MAX };
            gpu.launch(&GATHER, &params, &[indices.range(), table.range(), y.range()], grid(y.len()))?;
        }
    }
    Ok(y)
}

/// `dtable[id] += ` the sum of `dy [indices, width]` over the positions of `id`; not for `skipped` nor ids past the table.
pub(crate) fn scatter(positions: &Positions, dy: &Tensor, dtable: &Tensor, width: usize, skipped: Option<u32>) -> Result<()> {
    let (distinct, rows, skipped) = (positions.ids.len(), dtable.len() / width, skipped.unwrap_or(u32::MAX));
    let Positions { ids, starts, order } = positions;
    match dtable.device().backend() {
        Backend::Native => {
            let (ids, starts, order) = (ids.native::<u32>(), starts.native::<u32>(), order.native::<u32>());
            let (dy, mut dtable) = (dy.native::<f32>(), dtable.native_mut::<f32>());
            let mut sum = vec![0.0; width];
            for (id, range) in ids.iter().zip(starts.windows(2)) {
                if *id as usize >= rows || *id == skipped {
                    continue;
                }
                sum.fill(0.0);
                for at in &order[range[0] as usize..range[1] as usize] {
                    let row = &dy[*at as usize * width..][..width];
                    sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                }
                let target = &mut dtable[*id as usize * width..][..width];
                target.iter_mut().zip(&sum).for_each(|(value, sum)| *value += sum);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let params = Gather { rows: distinct as u32, width: width as u32, table: rows as u32, skipped };
            let bindings = [ids.range(), starts.range(), order.range(), dy.range(), dtable.range()];
            gpu.launch(&SCATTER, &params, &bindings, grid(distinct * width))
        }
    }
}
