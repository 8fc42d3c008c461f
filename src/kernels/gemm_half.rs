//! Matrix product in either precision; in half precision `shaders/gemm_half.wgsl`.

use super::gemm::{Matrix, gemm};
use super::half::{Factor, Precision};
use super::{MAX_GROUPS, READ, READ_WRITE, tiles};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    GemmHalf {
        m: u32, n: u32,
        pairs: u32,
        a_offset: u32, a_row: u32, a_pair: u32,
        b_offset: u32, b_pair: u32,
        c_offset: u32, c_row: u32,
        accumulate: u32,
        biased: u32,
    }
}

pub(crate) static GEMM_HALF: Kernel = Kernel {
    name: "gemm_half",
    source: include_str!("../../shaders/gemm_half.wgsl"),
    entry: "gemm_half",
    params: GemmHalf::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// Lanes of a workgroup, and rows and columns of a lane, as in the shader.
const LANES: usize = 64;
const ROWS: usize = 8;
const COLUMNS: usize = 4;

/// `C [m, n] = A [m, k] . B [k, n] (+ bias [n]) (+ C)`, as [`gemm`], in B's precision.
pub(crate) fn product(a: Matrix<'_>, b: &Factor, bias: Option<&Tensor>, c: Matrix<'_>, accumulate: bool) -> Result<()> {
    debug_assert!(b.lines == c.cols && a.rows == c.rows && c.col == 1);
    if b.precision == Precision::Single {
        return gemm(a, b.matrix(), bias, c, accumulate);
    }
    let a = b.half_left(a)?;
    debug_assert!(a.depth == b.depth && b.across == 1);
    match c.tensor.device().backend() {
        Backend::Native => gemm(a.matrix().t(), b.matrix(), bias, c, accumulate),
        Backend::Gpu(gpu) => {
            let (m, n) = (a.lines, b.lines);
            let params = GemmHalf {
                m: m as u32,
                n: n as u32,
                pairs: a.depth as u32,
                a_offset: a.offset as u32,
                a_row: a.across as u32,
                a_pair: a.along as u32,
                b_offset: b.offset as u32,
                b_pair: b.along as u32,
                c_offset: c.offset as u32,
                c_row: c.row as u32,
                accumulate: accumulate.into(),
                biased: bias.is_some().into(),
            };
            let groups = tiles(n.div_ceil(COLUMNS).div_ceil(LANES).min(MAX_GROUPS), m.div_ceil(ROWS));
            // Without a bias, something must still be bound in its place.
            let bias = bias.unwrap_or(&a.words);
            gpu.launch(&GEMM_HALF, &params, &[a.words.range(), b.words.range(), bias.range(), c.tensor.range()], groups)
        }
    }
}
