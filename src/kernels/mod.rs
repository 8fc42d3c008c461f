//! The kernels: each file holds a family's contract, its uniform struct, its launch on a GPU and its CPU twin.
//! `shaders/<name>.wgsl` is the same family on the GPU, and `verify::kernels` its cases.
//!
//! Layouts are row-major and time-major; shapes stand beside each buffer. Outputs never share memory with inputs unless
//! the contract says so. Callers have checked shapes and devices: kernels only debug-assert.

pub(crate) mod activation;
pub(crate) mod cell_contract;
pub(crate) mod cell_gru;
pub(crate) mod cell_indrnn;
pub(crate) mod cell_lstm;
pub(crate) mod cell_min_gru;
pub(crate) mod cell_min_lstm;
pub(crate) mod cell_rnn;
pub(crate) mod cell_slstm;
pub(crate) mod choice;
pub(crate) mod column_sum;
pub(crate) mod columns;
pub(crate) mod cross_entropy;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod gate_mask;
pub(crate) mod gather;
pub(crate) mod gemm;
mod gemm_cooperative;
pub(crate) mod gemm_half;
mod gemm_tiled;
pub(crate) mod gru_reset;
pub(crate) mod half;
pub(crate) mod layer_norm;
pub(crate) mod math;
pub(crate) mod mean_squared_error;
pub(crate) mod optimizer;
pub(crate) mod output_step;
pub(crate) mod pooling;
mod product;
pub(crate) mod reduce;
pub(crate) mod sample;
pub(crate) mod sweep;
pub(crate) mod sweep_grid;
mod sweep_native;
pub(crate) mod sweep_pair;
pub(crate) mod sweep_resident;
pub(crate) mod sweep_rows;
pub(crate) mod sweep_scan;
pub(crate) mod sweep_split;
pub(crate) mod sweep_step;
pub(crate) mod transpose;

#[cfg(feature = "verify")]
pub(crate) mod math_probe;
#[cfg(feature = "verify")]
pub(crate) mod peak;

use crate::backend::Access;

const READ: Access = Access::Read;
const READ_WRITE: Access = Access::ReadWrite;

/// Workgroups a dimension that every adapter allows.
const MAX_GROUPS: usize = 65_535;

/// Workgroups of 64 lanes for `count` elements; the shader strides over what is left.
fn grid(count: usize) -> [u32; 3] {
    [count.div_ceil(64).min(MAX_GROUPS) as u32, 1, 1]
}

/// A workgroup for each row; the shader strides over what is left.
fn row_groups(rows: usize) -> [u32; 3] {
    [rows.min(MAX_GROUPS) as u32, 1, 1]
}

/// Workgroups in `columns` columns, and in rows that go on in z where y is full: as many as `tiles`, or some more, which the shader
/// lets go.
fn tiles(columns: usize, tiles: usize) -> [u32; 3] {
    let y = tiles.min(MAX_GROUPS);
    [columns as u32, y as u32, tiles.div_ceil(y) as u32]
}

/// Every kernel, for the tests that need no GPU.
#[cfg(feature = "verify")]
pub(crate) fn all() -> Vec<&'static crate::backend::Kernel> {
    let cells = [
        &cell_lstm::KERNELS,
        &cell_gru::KERNELS,
        &cell_rnn::KERNELS,
        &cell_indrnn::KERNELS,
        &cell_slstm::KERNELS,
        &cell_min_gru::KERNELS,
        &cell_min_lstm::KERNELS,
    ];
    let mut kernels: Vec<&'static crate::backend::Kernel> = vec![
        &gemm::GEMM,
        &gemm::SUBGROUP_ROWS,
        &gemm::SUBGROUP_ROWS_8,
        &gemm::SUBGROUP_COLUMNS,
        &half::PACK,
        &gemm_half::GEMM_HALF,
        &gemm_tiled::TILED_64,
        &gemm_tiled::TILED_64_WORDS,
        &gemm_tiled::TILED_128,
        &gemm_tiled::HALF_TILED_64,
        &gemm_tiled::HALF_TILED_128,
        &gemm_cooperative::COOPERATIVE_8,
        &gemm_cooperative::COOPERATIVE_16,
        &transpose::TRANSPOSE,
        &gather::GATHER,
        &gather::SCATTER,
        &column_sum::COLUMN_SUM,
        &columns::COPY_COLUMNS,
        &elementwise::ADD,
        &elementwise::MULTIPLY,
        &elementwise::SCALE,
        &pooling::MEAN,
        &pooling::MEAN_BACKWARD,
        &pooling::LAST,
        &pooling::LAST_BACKWARD,
        &pooling::MAX,
        &pooling::MAX_BACKWARD,
        &cross_entropy::CROSS_ENTROPY,
        &mean_squared_error::MEAN_SQUARED_ERROR,
        &reduce::SUM,
        &reduce::SUM_OF_SQUARES,
        &optimizer::PREPARE,
        &optimizer::SGD,
        &optimizer::ADAMW,
        &optimizer::SCALE_LOSS,
        &dropout::DROPOUT,
        &sample::SAMPLE,
        &math_probe::PROBE,
        &peak::COPY,
        &peak::MULTIPLY_ADD,
        &output_step::TEACH,
        &output_step::OUTPUT,
        &output_step::OUTPUT_BACKWARD,
        &output_step::TEACH_BACKWARD,
        &layer_norm::FORWARD,
        &layer_norm::BACKWARD,
        &layer_norm::BACKWARD_GAIN,
        &gru_reset::RESET,
        &gru_reset::RESET_BACKWARD,
        &gate_mask::SPREAD,
        &gate_mask::COLLECT,
    ];
    kernels.extend(cells.into_iter().flat_map(cell_contract::StepKernels::all));
    let resident = [
        &cell_lstm::RESIDENT,
        &cell_gru::RESIDENT,
        &cell_rnn::RESIDENT,
        &cell_indrnn::RESIDENT,
        &cell_slstm::RESIDENT,
        &cell_min_gru::RESIDENT,
        &cell_min_lstm::RESIDENT,
    ];
    kernels.extend(resident.into_iter().flat_map(sweep_resident::ResidentKernels::all));
    kernels.extend([&cell_lstm::GRID, &cell_gru::GRID, &cell_rnn::GRID, &cell_slstm::GRID].into_iter().flatten());
    kernels.extend([&cell_lstm::ROWS, &cell_gru::ROWS].into_iter().flatten());
    kernels.extend([&cell_min_gru::SCAN, &cell_min_lstm::SCAN].into_iter().flat_map(sweep_scan::ScanKernels::all));
    kernels
}
