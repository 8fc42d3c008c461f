//! The precision of products, and their factors. In half precision numbers are rounded once, then multiplied: on a GPU they lie in
//! pairs, two a word (`shaders/half.wgsl`); on the native CPU they are rounded `f32`, which is what its products take.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::gemm::Matrix;
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, native, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// The precision of a layer's matrix products.
///
/// With `a`, `b` the factors of any product of the forward or the backward pass (weights, inputs, states, and the gradients of any of
/// these), all `f32`, and `r` rounding to IEEE 754 binary16 (11 significant bits, to the nearest, ties to even; infinity from 65520 on; below
/// 2^-14 multiples of 2^-24):
///
/// ```text
/// Single: c = sum over k of a(k) b(k)
/// Half:   c = sum over k of r(a(k)) r(b(k))     the sum in f32
/// ```
///
/// Everything else is `f32` in either: biases, gates, cell states, what a layer gives back, losses, the gradients of parameters, and the
/// parameters themselves, which an optimizer changes in full (Micikevicius et al. 2018, "Mixed Precision Training"), so that checkpoints are
/// the same. Gradients may be too small for binary16: train with [`crate::optim::LossScale`].
///
/// On a GPU the products read half as many bytes of factors that another launch has rounded, and a copy of the weights in binary16 is
/// kept beside them; large ones run on matrix units (16 x 16) where the adapter has them. A recurrent step is three launches then and
/// not one. Whether that is faster was measured on no GPU yet. On the native CPU it saves nothing, and is there to give the same
/// numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// `f32` throughout.
    #[default]
    Single,
    /// Factors in binary16, sums in `f32`.
    Half,
}

params! {
    /// The shader's uniform struct.
    Half { pairs: u32, lines: u32, along: u32, run: u32, offset: u32, row: u32, col: u32, }
}

pub(crate) static PACK: Kernel = Kernel {
    name: "half_pack",
    source: include_str!("../../shaders/half.wgsl"),
    entry: "pack",
    params: Half::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// A factor of a product, in the product's precision: `lines` rows of A or columns of B, of k numbers each. In half precision numbers
/// beside each other along k share a word on a GPU; elsewhere each is a word.
#[derive(Clone, Debug)]
pub(crate) struct Factor {
    pub precision: Precision,
    pub words: Tensor,
    pub offset: usize,
    /// Words along k.
    pub depth: usize,
    pub lines: usize,
    /// Words from one to the next along k, and from line to line.
    pub along: usize,
    pub across: usize,
    /// Numbers along k of a run, which starts with a word of its own.
    run: usize,
}

impl Factor {
    /// The right factor of a product, B `[k, n]`; in half precision a rounded copy, whose columns lie side by side. Runs of `run`
    /// of its rows are windows by themselves ([`Factor::runs`]).
    pub fn right(precision: Precision, b: Matrix<'_>, run: usize) -> Result<Self> {
        match precision {
            Precision::Single => {
                let Matrix { tensor, offset, rows, cols, row, col } = b;
                let words = tensor.clone();
                Ok(Self { precision, words, offset, depth: rows, lines: cols, along: row, across: col, run })
            }
            Precision::Half => Self::half(b, run, false),
        }
    }

    /// The left factor for this one, in half precision: A `[m, k]`, rounded. What lies side by side stays so.
    pub fn half_left(&self, a: Matrix<'_>) -> Result<Self> {
        Self::half(a.t(), self.run, a.col == 1)
    }

    /// From a matrix `[k, lines]`; `along`: words `[lines, depth]`, else `[depth, lines]`.
    fn half(matrix: Matrix<'_>, run: usize, along: bool) -> Result<Self> {
        debug_assert!(run > 0 && matrix.rows.is_multiple_of(run));
        let (device, lines) = (matrix.tensor.device(), matrix.cols);
        let depth = matrix.rows / run * if device.is_cpu() { run } else { run.div_ceil(2) };
        let words = Tensor::uninitialized(device, [depth * lines])?;
        match device.backend() {
            Backend::Native => round_native(matrix, along, &words),
            Backend::Gpu(gpu) => {
                let params = Half {
                    pairs: depth as u32,
                    lines: lines as u32,
                    along: along.into(),
                    run: run as u32,
                    offset: matrix.offset as u32,
                    row: matrix.row as u32,
                    col: matrix.col as u32,
                };
                gpu.launch(&PACK, &params, &[matrix.tensor.range(), words.range()], grid(words.len()))?;
            }
        }
        let (along, across) = if along { (1, depth) } else { (lines, 1) };
        Ok(Self { precision: Precision::Half, words, offset: 0, depth, lines, along, across, run })
    }

    /// `count` of its lines, from `first` on.
    pub fn lines(&self, first: usize, count: usize) -> Self {
        debug_assert!(first + count <= self.lines);
        Self { offset: self.offset + first * self.across, lines: count, ..self.clone() }
    }

    /// `count` of its runs along k, from run `first` on.
    pub fn runs(&self, first: usize, count: usize) -> Self {
        let words = if self.is_paired() { self.run.div_ceil(2) } else { self.run };
        debug_assert!((first + count) * words <= self.depth);
        Self { offset: self.offset + first * words * self.along, depth: count * words, ..self.clone() }
    }

    /// Whether two numbers share a word.
    pub fn is_paired(&self) -> bool {
        self.precision == Precision::Half && !self.words.device().is_cpu()
    }

    /// The matrix of its words, `[depth, lines]`.
    pub fn matrix(&self) -> Matrix<'_> {
        let Self { words, offset, depth, lines, along, across, .. } = self;
        Matrix { tensor: words, offset: *offset, rows: *depth, cols: *lines, row: *along, col: *across }
    }
}

fn round_native(matrix: Matrix<'_>, along: bool, words: &Tensor) {
    // Rows of what is written, and how far apart their numbers are where they are read.
    let matrix = if along { matrix.t() } else { matrix };
    let Matrix { offset, rows, cols, row, col, .. } = matrix;
    let source = matrix.tensor.native::<f32>();
    let mut target = words.native_mut::<f32>();
    let target = native::Shared::new(&mut target);
    // Below this, waking a thread costs more than it saves.
    let threads = if rows * cols < 1 << 16 { 1 } else { native::threads() };
    native::for_parts(rows, threads, |first, count| {
        for line in first..first + count {
            let source = &source[offset + line * row..];
            // SAFETY: lines of this part alone.
            let target = unsafe { target.slice(line * cols, cols) };
            match col {
                1 => target.copy_from_slice(&source[..cols]),
                _ => target.iter_mut().zip(source.iter().step_by(col)).for_each(|(target, source)| *target = *source),
            }
            round(target);
        }
    });
}

/// Rounds each number to the nearest of half precision, ties to even; from 65520 on that is infinity.
fn round(numbers: &mut [f32]) {
    const CHUNK: usize = 256;
    let mut halves = [f16::ZERO; CHUNK];
    for numbers in numbers.chunks_mut(CHUNK) {
        let halves = &mut halves[..numbers.len()];
        halves.convert_from_f32_slice(numbers);
        halves.convert_to_f32_slice(numbers);
    }
}
