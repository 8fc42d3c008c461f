//! Matrix product in either precision; in half precision `shaders/gemm_half.wgsl`.

use super::gemm::{GEMM_KERNEL, Matrix, Product, gemm, launch, part_of_gemm};
use super::half::{Factor, Precision};
use crate::backend::Kernel;
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

pub(crate) static GEMM_HALF: Kernel = Kernel {
    name: "gemm_half",
    source: concat!(
        include_str!("../../shaders/gemm_half.wgsl"),
        include_str!("../../shaders/product.wgsl"),
        include_str!("../../shaders/component.wgsl")
    ),
    entry: "gemm_half",
    ..GEMM_KERNEL
};

/// `C [m, n] = A [m, k] . B [k, n] (+ bias [n]) (+ C)`, as [`gemm`], in B's precision.
pub(crate) fn product(a: Matrix<'_>, b: &Factor, bias: Option<&Tensor>, c: Matrix<'_>, accumulate: bool) -> Result<()> {
    part_of_product(a, b, bias, c, accumulate, c.rows)
}

/// Some rows of a product of `whole` rows, with its bits.
pub(crate) fn part_of_product(
    a: Matrix<'_>,
    b: &Factor,
    bias: Option<&Tensor>,
    c: Matrix<'_>,
    accumulate: bool,
    whole: usize,
) -> Result<()> {
    debug_assert!(b.lines == c.cols && a.rows == c.rows && c.col == 1);
    if b.precision == Precision::Single {
        return part_of_gemm(a, b.matrix(), bias, c, accumulate, whole);
    }
    let a = b.half_left(a)?;
    debug_assert!(a.depth == b.depth && b.across == 1);
    let (precision, a, b) = (b.precision, a.matrix().t(), b.matrix());
    match c.tensor.device().backend() {
        Backend::Native => gemm(a, b, bias, c, accumulate),
        Backend::Gpu(gpu) => launch(gpu, &Product { precision, a, b, bias, c, accumulate, whole }),
    }
}
