//! Matrix product: `C = A . B (+ bias) (+ C)` on strided windows, every transposition by strides.

use serde::{Deserialize, Serialize};

use super::choice;
use super::product::multiply;
use super::{MAX_GROUPS, READ, READ_WRITE, tiles};
use crate::backend::gpu::Gpu;
use crate::backend::{Feature, Kernel, native, params};
use crate::device::Backend;
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

pub(crate) static GEMM: Kernel = GEMM_KERNEL;
const GEMM_KERNEL: Kernel = Kernel {
    name: "gemm",
    source: include_str!("../../shaders/gemm.wgsl"),
    entry: "gemm",
    params: Gemm::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// The same for subgroups of 8 lanes and aligned operands: a kernel for each layout of A.
const SUBGROUP: Kernel = Kernel {
    name: "gemm_subgroup_rows",
    source: concat!(include_str!("../../shaders/gemm_subgroup.wgsl"), include_str!("../../shaders/subgroup_rows.wgsl")),
    entry: "rows",
    workgroup: 8,
    features: &[Feature::Subgroups],
    ..GEMM_KERNEL
};
pub(crate) static SUBGROUP_ROWS: Kernel = SUBGROUP;
pub(crate) static SUBGROUP_ROWS_8: Kernel = Kernel { name: "gemm_subgroup_rows_8", entry: "rows_8", ..SUBGROUP };
pub(crate) static SUBGROUP_COLUMNS: Kernel = Kernel { name: "gemm_subgroup_columns", entry: "columns", ..SUBGROUP };

/// A way to compute a product on a GPU; `kernels::choice` picks one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ProductKernel {
    /// Any device, any strides: a lane has 8 rows of 4 columns.
    General,
    /// Subgroups of 8 lanes, tiles of 32 x 32, everything in fours; A's k lie side by side.
    SubgroupRows,
    /// The same with tiles of 8 rows.
    SubgroupRows8,
    /// As the first of them, but A's rows lie side by side.
    SubgroupColumns,
}

impl ProductKernel {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::General, Self::SubgroupRows, Self::SubgroupRows8, Self::SubgroupColumns];

    fn kernel(self) -> &'static Kernel {
        match self {
            Self::General => &GEMM,
            Self::SubgroupRows => &SUBGROUP_ROWS,
            Self::SubgroupRows8 => &SUBGROUP_ROWS_8,
            Self::SubgroupColumns => &SUBGROUP_COLUMNS,
        }
    }

    /// Rows of a tile, and columns of a workgroup's step.
    fn tile(self) -> [usize; 2] {
        match self {
            Self::General => [8, 256],
            Self::SubgroupRows8 => [8, 32],
            Self::SubgroupRows | Self::SubgroupColumns => [32, 32],
        }
    }

    /// Whether the device has what the kernel asks for.
    pub(crate) fn runs_on(self, gpu: &Gpu) -> bool {
        gpu.offers(self.kernel()) && (self == Self::General || gpu.subgroup_size() == Some(8))
    }

    /// Whether the kernel can do this product on this device.
    pub(crate) fn takes(self, gpu: &Gpu, a: &Matrix<'_>, b: &Matrix<'_>, c: &Matrix<'_>) -> bool {
        let aligned = |words: &[usize]| words.iter().all(|words| words.is_multiple_of(4));
        let subgroups = self.runs_on(gpu)
            && b.col == 1
            && aligned(&[b.cols, b.offset, b.row, c.offset, c.row])
            && b.cols <= MAX_GROUPS * self.tile()[1];
        match self {
            Self::General => true,
            Self::SubgroupRows | Self::SubgroupRows8 => subgroups && a.col == 1 && aligned(&[a.cols, a.offset, a.row]),
            Self::SubgroupColumns => subgroups && a.row == 1 && aligned(&[a.rows, a.offset, a.col]),
        }
    }

    fn groups(self, m: usize, n: usize) -> [u32; 3] {
        let [rows, columns] = self.tile();
        tiles(n.div_ceil(columns).min(MAX_GROUPS), m.div_ceil(rows))
    }
}

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
    match c.tensor.device().backend() {
        Backend::Native => {
            multiply_native(a, b, bias, c, accumulate);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let kernel = choice::product(c.tensor.device(), gpu, &a, &b, &c);
            gemm_by(kernel, gpu, [a, b, c], bias, accumulate)
        }
    }
}

/// The same for `[A, B, C]` by this kernel, which takes them.
pub(crate) fn gemm_by(
    kernel: ProductKernel,
    gpu: &Gpu,
    [a, b, c]: [Matrix<'_>; 3],
    bias: Option<&Tensor>,
    accumulate: bool,
) -> Result<()> {
    debug_assert!(kernel.takes(gpu, &a, &b, &c));
    let (m, n, k) = (a.rows, b.cols, a.cols);
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
    // Without a bias, something must still be bound in its place.
    let bias = bias.unwrap_or(a.tensor);
    let bindings = [a.tensor.range(), b.tensor.range(), bias.range(), c.tensor.range()];
    gpu.launch(kernel.kernel(), &params, &bindings, kernel.groups(m, n))
}

fn multiply_native(a: Matrix<'_>, b: Matrix<'_>, bias: Option<&Tensor>, c: Matrix<'_>, accumulate: bool) {
    let (lhs, rhs) = (a.tensor.native::<f32>(), b.tensor.native::<f32>());
    let mut out = c.tensor.native_mut::<f32>();
    let bias = bias.map(Tensor::native::<f32>);
    multiply(
        [a.rows, b.cols, a.cols],
        (&lhs[a.offset..], a.row, a.col),
        (&rhs[b.offset..], b.row, b.col),
        bias.as_deref(),
        (&mut out[c.offset..], c.row),
        accumulate,
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
