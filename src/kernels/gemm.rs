//! Matrix product: `C = A . B (+ bias) (+ C)` on strided windows, every transposition by strides.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::choice;
use super::column_sum::sum_columns;
use super::gemm_cooperative::{COOPERATIVE_8, COOPERATIVE_16};
use super::gemm_half::GEMM_HALF;
use super::gemm_tiled::{HALF_TILED_64, HALF_TILED_128, TILED_64, TILED_64_WORDS, TILED_128};
use super::half::Precision;
use super::product::multiply;
use super::{MAX_GROUPS, READ, READ_WRITE, tiles};
use crate::backend::gpu::Gpu;
use crate::backend::{Feature, Kernel, native, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The uniform struct of every product's shader.
    Gemm {
        m: u32, n: u32, k: u32,
        a_offset: u32, a_row: u32, a_col: u32,
        b_offset: u32, b_row: u32, b_col: u32,
        c_offset: u32, c_row: u32,
        accumulate: u32,
        biased: u32,
        part: u32,
        c_part: u32,
    }
}

pub(crate) static GEMM: Kernel = GEMM_KERNEL;
pub(super) const GEMM_KERNEL: Kernel = Kernel {
    name: "gemm",
    source: concat!(
        include_str!("../../shaders/gemm.wgsl"),
        include_str!("../../shaders/product.wgsl"),
        include_str!("../../shaders/component.wgsl")
    ),
    entry: "gemm",
    params: Gemm::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// The same for subgroups of 8 lanes and aligned operands: a kernel for each layout of A.
const SUBGROUP: Kernel = Kernel {
    name: "gemm_subgroup_rows",
    source: concat!(
        include_str!("../../shaders/gemm_subgroup.wgsl"),
        include_str!("../../shaders/product.wgsl"),
        include_str!("../../shaders/subgroup_rows.wgsl")
    ),
    entry: "rows",
    workgroup: 8,
    features: &[Feature::Subgroups],
    ..GEMM_KERNEL
};
pub(crate) static SUBGROUP_ROWS: Kernel = SUBGROUP;
pub(crate) static SUBGROUP_ROWS_8: Kernel = Kernel { name: "gemm_subgroup_rows_8", entry: "rows_8", ..SUBGROUP };
pub(crate) static SUBGROUP_COLUMNS: Kernel = Kernel { name: "gemm_subgroup_columns", entry: "columns", ..SUBGROUP };

/// Words along k of a part, where k is in parts: a number of its own, so that the parts of a sum over time depend on nothing else.
const PART: usize = 256;
/// Words of all sums of parts together, at most: 32 MB.
const PARTS: usize = 8 << 20;

/// Workgroup memory of the kernels that take more than the least that adapters have, in bytes.
pub(crate) const TILED_128_MEMORY: u32 = 16 << 10;
pub(crate) const COOPERATIVE_MEMORY: u32 = 24 << 10;

/// A product on a GPU: `C [m, n] = A [m, k] . B [k, n] (+ bias [n]) (+ C)`. In half precision the elements of A and B are words, which hold
/// two numbers along k.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub precision: Precision,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
    pub bias: Option<&'a Tensor>,
    pub c: Matrix<'a>,
    pub accumulate: bool,
    /// M of the product that this is a part of, with some of its rows: the kernel that suits the whole is taken for each part, so that the
    /// bits are the same.
    pub whole: usize,
}

impl Product<'_> {
    /// Whether all that lies side by side is in fours: along k, or across it, in both factors, and along C's rows.
    fn is_in_fours(&self) -> bool {
        let fours = |words: &[usize]| words.iter().all(|words| words.is_multiple_of(4));
        let factor = |m: &Matrix<'_>| match m.row {
            1 => fours(&[m.rows, m.col, m.offset]),
            _ => m.col == 1 && fours(&[m.cols, m.row, m.offset]),
        };
        factor(&self.a.t()) && factor(&self.b) && fours(&[self.c.cols, self.c.offset, self.c.row])
    }
}

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
    /// Tiles of 64 x 64 through workgroup memory. Faster where everything is in fours.
    Tiled64,
    /// The same with k in parts, each for workgroups of its own, and a launch that sums their products: C has no gaps, and no bias is added.
    Tiled64Parts,
    /// Tiles of 128 x 128, everything in fours.
    Tiled128,
    /// The general one of half precision: B's columns lie side by side.
    HalfGeneral,
    /// As [`ProductKernel::Tiled64`], everything in fours.
    HalfTiled64,
    /// As [`ProductKernel::Tiled64Parts`], everything in fours.
    HalfTiled64Parts,
    /// As [`ProductKernel::Tiled128`].
    HalfTiled128,
    /// Cooperative matrices of 8 x 8, by subgroups of 8 lanes: tiles of 128 x 128, everything in fours.
    HalfCooperative8,
    /// The same of 16 x 16, by subgroups of 32 lanes.
    HalfCooperative16,
}

impl fmt::Display for ProductKernel {
    /// Its name as serde knows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl ProductKernel {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::General,
        Self::SubgroupRows,
        Self::SubgroupRows8,
        Self::SubgroupColumns,
        Self::Tiled64,
        Self::Tiled64Parts,
        Self::Tiled128,
        Self::HalfGeneral,
        Self::HalfTiled64,
        Self::HalfTiled64Parts,
        Self::HalfTiled128,
        Self::HalfCooperative8,
        Self::HalfCooperative16,
    ];

    fn kernel(self, product: &Product<'_>) -> &'static Kernel {
        match self {
            Self::General => &GEMM,
            Self::SubgroupRows => &SUBGROUP_ROWS,
            Self::SubgroupRows8 => &SUBGROUP_ROWS_8,
            Self::SubgroupColumns => &SUBGROUP_COLUMNS,
            Self::Tiled64 | Self::Tiled64Parts if product.is_in_fours() => &TILED_64,
            Self::Tiled64 | Self::Tiled64Parts => &TILED_64_WORDS,
            Self::Tiled128 => &TILED_128,
            Self::HalfGeneral => &GEMM_HALF,
            Self::HalfTiled64 | Self::HalfTiled64Parts => &HALF_TILED_64,
            Self::HalfTiled128 => &HALF_TILED_128,
            Self::HalfCooperative8 => &COOPERATIVE_8,
            Self::HalfCooperative16 => &COOPERATIVE_16,
        }
    }

    fn precision(self) -> Precision {
        match self {
            Self::General | Self::SubgroupRows | Self::SubgroupRows8 | Self::SubgroupColumns => Precision::Single,
            Self::Tiled64 | Self::Tiled64Parts | Self::Tiled128 => Precision::Single,
            Self::HalfGeneral | Self::HalfTiled64 | Self::HalfTiled64Parts | Self::HalfTiled128 => Precision::Half,
            Self::HalfCooperative8 | Self::HalfCooperative16 => Precision::Half,
        }
    }

    /// Rows of a tile, and columns of a workgroup's step.
    fn tile(self) -> [usize; 2] {
        match self {
            Self::General | Self::HalfGeneral => [8, 256],
            Self::SubgroupRows8 => [8, 32],
            Self::SubgroupRows | Self::SubgroupColumns => [32, 32],
            Self::Tiled64 | Self::Tiled64Parts | Self::HalfTiled64 | Self::HalfTiled64Parts => [64, 64],
            Self::Tiled128 | Self::HalfTiled128 | Self::HalfCooperative8 | Self::HalfCooperative16 => [128, 128],
        }
    }

    /// Whether a workgroup's place in z is its part of k, and not that of more rows.
    fn has_parts_in_z(self) -> bool {
        !matches!(self, Self::General | Self::HalfGeneral | Self::SubgroupRows | Self::SubgroupRows8 | Self::SubgroupColumns)
    }

    /// Whether so many rows take more workgroups than one dimension has, and go on in z.
    #[cfg(feature = "verify")]
    pub fn wraps(self, rows: usize) -> bool {
        !self.has_parts_in_z() && rows.div_ceil(self.tile()[0]) > MAX_GROUPS
    }

    /// Into how many parts it cuts k.
    fn parts(self, k: usize) -> usize {
        match self {
            Self::Tiled64Parts | Self::HalfTiled64Parts => k.div_ceil(PART),
            _ => 1,
        }
    }

    /// Whether the device has what the kernel asks for.
    pub(crate) fn runs_on(self, gpu: &Gpu) -> bool {
        match self {
            Self::General | Self::Tiled64 | Self::Tiled64Parts => true,
            Self::HalfGeneral | Self::HalfTiled64 | Self::HalfTiled64Parts => true,
            Self::SubgroupRows | Self::SubgroupRows8 | Self::SubgroupColumns => gpu.subgroup_size() == Some(8),
            Self::Tiled128 | Self::HalfTiled128 => gpu.workgroup_memory() >= TILED_128_MEMORY,
            Self::HalfCooperative8 => gpu.workgroup_memory() >= COOPERATIVE_MEMORY && gpu.cooperative_edge() == Some(8),
            Self::HalfCooperative16 => gpu.workgroup_memory() >= COOPERATIVE_MEMORY && gpu.cooperative_edge() == Some(16),
        }
    }

    /// Whether the kernel can do this product on this device.
    pub(crate) fn takes(self, gpu: &Gpu, product: &Product<'_>) -> bool {
        let Product { a, b, c, bias, whole, .. } = product;
        let [rows, columns] = self.tile();
        let (y, x, parts) = (whole.div_ceil(rows), b.cols.div_ceil(columns), self.parts(a.cols));
        let fours = || product.is_in_fours();
        let vectors = || [a.row, a.col].contains(&1) && [b.row, b.col].contains(&1);
        let in_parts = || parts > 1 && parts * whole * b.cols <= PARTS && c.row == c.cols && bias.is_none();
        let takes = match self {
            Self::General => true,
            Self::SubgroupRows | Self::SubgroupRows8 => a.col == 1 && b.col == 1 && fours() && x <= MAX_GROUPS,
            Self::SubgroupColumns => a.row == 1 && b.col == 1 && fours() && x <= MAX_GROUPS,
            Self::Tiled64 => vectors(),
            Self::Tiled64Parts => vectors() && in_parts(),
            Self::HalfGeneral => b.col == 1,
            Self::HalfTiled64Parts => fours() && in_parts(),
            Self::Tiled128 | Self::HalfTiled64 | Self::HalfTiled128 => fours(),
            Self::HalfCooperative8 | Self::HalfCooperative16 => fours(),
        };
        let fits = !self.has_parts_in_z() || x.max(y).max(parts) <= MAX_GROUPS;
        takes && fits && self.precision() == product.precision && self.runs_on(gpu)
    }

    fn groups(self, m: usize, n: usize, k: usize) -> [u32; 3] {
        let [rows, columns] = self.tile();
        match self.has_parts_in_z() {
            true => [n.div_ceil(columns), m.div_ceil(rows), self.parts(k)].map(|groups| groups as u32),
            false => tiles(n.div_ceil(columns).min(MAX_GROUPS), m.div_ceil(rows)),
        }
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
    part_of_gemm(a, b, bias, c, accumulate, c.rows)
}

/// Some rows of a product of `whole` rows, with its bits.
pub(super) fn part_of_gemm(
    a: Matrix<'_>,
    b: Matrix<'_>,
    bias: Option<&Tensor>,
    c: Matrix<'_>,
    accumulate: bool,
    whole: usize,
) -> Result<()> {
    debug_assert!(a.rows == c.rows && b.cols == c.cols && a.cols == b.rows && c.col == 1);
    match c.tensor.device().backend() {
        Backend::Native => {
            multiply_native(a, b, bias, c, accumulate);
            Ok(())
        }
        Backend::Gpu(gpu) => launch(gpu, &Product { precision: Precision::Single, a, b, bias, c, accumulate, whole }),
    }
}

/// A product on a GPU, by the kernel that suits it.
pub(super) fn launch(gpu: &Gpu, product: &Product<'_>) -> Result<()> {
    gemm_by(choice::product(product.c.tensor.device(), gpu, product), gpu, product)
}

/// The same by this kernel, which takes the product.
pub(crate) fn gemm_by(kernel: ProductKernel, gpu: &Gpu, product: &Product<'_>) -> Result<()> {
    debug_assert!(kernel.takes(gpu, product));
    let Product { a, b, bias, c, accumulate, .. } = *product;
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
        part: k as u32,
        c_part: 0,
    };
    let groups = kernel.groups(m, n, k);
    // Without a bias, something must still be bound in its place.
    let run = |params: &Gemm, c: &Tensor| {
        let bindings = [a.tensor.range(), b.tensor.range(), bias.unwrap_or(a.tensor).range(), c.range()];
        gpu.launch(kernel.kernel(product), params, &bindings, groups)
    };
    match kernel.parts(k) {
        1 => run(&params, c.tensor),
        parts => {
            let sums = Tensor::uninitialized(c.tensor.device(), [parts, m * n])?;
            let of_parts = Gemm { c_offset: 0, accumulate: 0, part: PART as u32, c_part: (m * n) as u32, ..params };
            run(&of_parts, &sums)?;
            sum_columns(gpu, Matrix::new(&sums, parts, m * n), c.offset, c.tensor, accumulate)
        }
    }
}

/// Words that the sums of parts take while a gradient of weights `[m, n]` is made from `k` lines, or one like it; `any` is on its device.
pub(crate) fn part_sums(any: &Tensor, precision: Precision, [m, n, k]: [usize; 3]) -> usize {
    let Backend::Gpu(gpu) = any.device().backend() else { return 0 };
    let k = if precision == Precision::Half { k.div_ceil(2) } else { k };
    let matrix = |rows, cols| Matrix { tensor: any, offset: 0, rows, cols, row: cols, col: 1 };
    let (a, b, c) = (matrix(k, m).t(), matrix(k, n), matrix(m, n));
    let product = Product { precision, a, b, bias: None, c, accumulate: true, whole: c.rows };
    match choice::product(any.device(), gpu, &product).parts(k) {
        1 => 0,
        parts => parts * m * n,
    }
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
