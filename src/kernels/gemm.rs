//! Matrix product: `C = A . B (+ bias) (+ C)` on strided windows, every transposition by strides.

use super::product::Product;
use super::{MAX_GROUPS, READ, READ_WRITE};
use crate::backend::{Kernel, native, params};
use crate::device::{Backend, Device};
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Gemm {
        m: u32, n: u32, k: u32,
        a_offset: u32, a_row: u32, a_col: u32,
        b_offset: u32, b_row: u32, b_col: u32,
        c_offset: u32, c_row: u32,
        accumulate: u32,
        biased: u32,
    }
}

pub(crate) static GEMM: Kernel = Kernel {
    name: "gemm",
    source: include_str!("../../shaders/gemm.wgsl"),
    entry: "gemm",
    params: Gemm::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// Lanes of a workgroup, and rows and columns of a lane, as in the shader.
const LANES: usize = 64;
const ROWS: usize = 8;
const COLUMNS: usize = 4;

/// A window of a tensor seen as a matrix: element `(r, c)` is word `offset + r * row + c * col` of the tensor.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub tensor: &'a Tensor,
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
    pub row: usize,
    pub col: usize,
}

impl<'a> Matrix<'a> {
    /// The whole tensor as `rows` rows without gaps.
    pub fn new(tensor: &'a Tensor, rows: usize, cols: usize) -> Self {
        debug_assert_eq!(tensor.len(), rows * cols);
        Self { tensor, offset: 0, rows, cols, row: cols, col: 1 }
    }

    /// `rows` rows of `cols` columns that start at word `offset` and lie `row` words apart.
    pub fn window(tensor: &'a Tensor, offset: usize, rows: usize, cols: usize, row: usize) -> Self {
        debug_assert!(offset + (rows - 1) * row + cols <= tensor.len());
        Self { tensor, offset, rows, cols, row, col: 1 }
    }

    /// `cols` of its columns, from `first` on.
    pub fn columns(self, first: usize, cols: usize) -> Self {
        debug_assert!(first + cols <= self.cols);
        Self { offset: self.offset + first * self.col, cols, ..self }
    }

    /// The transposed matrix: the same memory with rows and columns exchanged.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }
}

/// `C [m, n] = A [m, k] . B [k, n] (+ bias [n]) (+ C)`. C's columns are contiguous and C shares no memory with the others.
/// Fast where B's columns lie side by side: lanes, and the native vectors, run along them.
pub(crate) fn gemm(a: Matrix<'_>, b: Matrix<'_>, bias: Option<&Tensor>, c: Matrix<'_>, accumulate: bool) -> Result<()> {
    debug_assert!(a.rows == c.rows && b.cols == c.cols && a.cols == b.rows && c.col == 1);
    let (m, n, k) = (a.rows, b.cols, a.cols);
    match c.tensor.device().backend() {
        Backend::Native => {
            multiply_native(a, b, bias, c, accumulate);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let params = Gemm {
                m: m as u32,
                n: n as u32,
                k: k as u32,
                a_offset: a.offset as u32,
                a_row: a.row as u32,
                a_col: a.col as u32,
                b_offset: b.offset as u32,
                b_row: b.row as u32,
                b_col: b.col as u32,
                c_offset: c.offset as u32,
                c_row: c.row as u32,
                accumulate: accumulate.into(),
                biased: bias.is_some().into(),
            };
            let tiles = m.div_ceil(ROWS);
            let y = tiles.min(MAX_GROUPS);
            let x = n.div_ceil(COLUMNS).div_ceil(LANES).min(MAX_GROUPS);
            let groups = [x as u32, y as u32, tiles.div_ceil(y) as u32];
            // Without a bias, something must still be bound in its place.
            let bias = bias.unwrap_or(a.tensor);
            gpu.launch(&GEMM, &params, &[a.tensor.range(), b.tensor.range(), bias.range(), c.tensor.range()], groups)
        }
    }
}

fn multiply_native(a: Matrix<'_>, b: Matrix<'_>, bias: Option<&Tensor>, c: Matrix<'_>, accumulate: bool) {
    let (lhs, rhs) = (a.tensor.native::<f32>(), b.tensor.native::<f32>());
    let mut out = c.tensor.native_mut::<f32>();
    if let Some(bias) = bias {
        // The product is then added to the bias, row by row.
        let bias = bias.native::<f32>();
        for row in out[c.offset..].chunks_mut(c.row).take(c.rows) {
            for (value, bias) in row[..c.cols].iter_mut().zip(bias.iter()) {
                *value = if accumulate { *value + bias } else { *bias };
            }
        }
    }
    multiply(
        c.tensor.device(),
        [a.rows, b.cols, a.cols],
        (&lhs[a.offset..], a.row, a.col),
        (&rhs[b.offset..], b.row, b.col),
        (&mut out[c.offset..], c.row),
        accumulate || bias.is_some(),
        native::threads(),
    );
}

/// `A [m, k] . B [k, n]` in f64 on the host, for sizes `[m, n, k]`.
pub(crate) fn multiply_f64([m, n, k]: [usize; 3], a: &[f64], b: &[f64]) -> Vec<f64> {
    assert!(a.len() == m * k && b.len() == k * n);
    let mut c = vec![0.0; m * n];
    let [row_a, row_b, row_c] = [k as isize, n as isize, n as isize];
    // SAFETY: the assertion keeps every element inside its slice; `c` is a buffer of its own.
    unsafe {
        let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
        let one = gemm::Parallelism::None;
        gemm::gemm(m, n, k, c, 1, row_c, false, a, 1, row_a, b, 1, row_b, 0.0, 1.0, false, false, false, one);
    }
    c
}

/// `C = A . B (+ C)` for sizes `[m, n, k]`; A and B are slices with their row and column strides, C with its row stride.
/// On at most `threads` threads, which share the rows or the columns of C. The device says whether it is batch invariant.
pub(crate) fn multiply(
    device: &Device,
    [m, n, k]: [usize; 3],
    (a, a_row, a_col): (&[f32], usize, usize),
    (b, b_row, b_col): (&[f32], usize, usize),
    (c, c_row): (&mut [f32], usize),
    accumulate: bool,
    threads: usize,
) {
    let last = |rows: usize, cols: usize, row: usize, col: usize| (rows - 1) * row + (cols - 1) * col;
    assert!(last(m, k, a_row, a_col) < a.len() && last(k, n, b_row, b_col) < b.len() && last(m, n, c_row, 1) < c.len());
    if device.is_batch_invariant() && !accumulate {
        c.chunks_mut(c_row).take(m).for_each(|row| row[..n].fill(0.0));
    }
    let c = native::Shared::new(c);
    // Below this, waking a thread costs more than it saves.
    let threads = if m * n * k < 1 << 22 { 1 } else { threads };
    native::for_parts(m.max(n), threads, |first, count| {
        let (row, col, m, n) = if m >= n { (first, 0, count, n) } else { (0, first, m, count) };
        if device.is_batch_invariant() {
            let (a, b) = ((&a[row * a_row..], a_row, a_col), (&b[col * b_col..], b_row, b_col));
            return pulp::Arch::new().dispatch(Product { sizes: [m, n, k], a, b, c: (&c, row * c_row + col, c_row) });
        }
        // SAFETY: the assertion keeps every element inside its slice; `c` is borrowed apart from `a` and `b`, and each part
        // writes rows or columns of its own.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.pointer(row * c_row + col),
                1,
                c_row as isize,
                accumulate,
                a[row * a_row..].as_ptr(),
                a_col as isize,
                a_row as isize,
                b[col * b_col..].as_ptr(),
                b_col as isize,
                b_row as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}
