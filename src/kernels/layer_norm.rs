//! Layer normalization (Ba, Kiros & Hinton 2016) of the rows of a matrix, and of the products of a recurrent layer's gates.

use super::gemm::Matrix;
use super::{READ, READ_WRITE, grid, row_groups};
use crate::backend::gpu::{Gpu, Range};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    LayerNorm {
        rows: u32, width: u32,
        x_offset: u32, x_row: u32,
        y_offset: u32, y_row: u32,
        dy_offset: u32, dy_row: u32,
        column: u32, line: u32,
        shifted: u32,
    }
}

pub(crate) static FORWARD: Kernel = Kernel {
    name: "layer_norm",
    source: concat!(include_str!("../../shaders/layer_norm.wgsl"), include_str!("../../shaders/row_norm.wgsl")),
    entry: "forward",
    params: LayerNorm::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE), (5, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

pub(crate) static BACKWARD: Kernel = Kernel {
    name: "layer_norm_backward",
    entry: "backward",
    bindings: &[(1, READ), (2, READ), (4, READ_WRITE), (5, READ_WRITE), (6, READ)],
    ..FORWARD
};

pub(crate) static BACKWARD_GAIN: Kernel = Kernel {
    name: "layer_norm_backward_gain",
    entry: "backward_gain",
    bindings: &[(1, READ), (4, READ_WRITE), (6, READ), (7, READ_WRITE)],
    ..FORWARD
};

/// Added to the variance, as in the shader.
const EPSILON: f32 = 1e-5;

/// Rows to normalize: `y = gain (x - mean) / sqrt(variance + 1e-5) + shift`.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    /// `[rows, width]`, with contiguous columns. Backward sees what forward saw.
    pub x: Matrix<'a>,
    /// `[.., width, ..]`, from `column` on.
    pub gain: &'a Tensor,
    pub column: usize,
    /// `[.., rows, .., 2]`, from row `line` on: forward leaves there what backward needs.
    pub stats: &'a Tensor,
    pub line: usize,
}

impl Norm<'_> {
    /// `y [rows, width]`; the shift is laid out as the gain.
    pub fn forward(&self, shift: Option<&Tensor>, y: Matrix<'_>) -> Result<()> {
        let Self { x, gain, column, stats, line } = *self;
        debug_assert!(x.col == 1 && y.col == 1 && (x.rows, x.cols) == (y.rows, y.cols));
        match stats.device().backend() {
            Backend::Native => {
                let (x, gain, mut out) = (Rows::new(x), gain.native::<f32>(), y.tensor.native_mut::<f32>());
                let (shift, mut stats) = (shift.map(|shift| shift.native::<f32>()), stats.native_mut::<f32>());
                pulp::Arch::new().dispatch(|| {
                    for row in 0..y.rows {
                        let (x, out) = (x.row(row), &mut out[y.offset + row * y.row..][..y.cols]);
                        out.iter_mut().zip(x).for_each(|(out, value)| *out = value - x[0]);
                        let mean = sum(out, |d| d) / y.cols as f32;
                        let variance = sum(out, |d| (d - mean) * (d - mean)) / y.cols as f32;
                        let inverse = 1.0 / (variance + EPSILON).sqrt();
                        stats[2 * (line + row)..][..2].copy_from_slice(&[mean, inverse]);
                        let gain = &gain[column..][..y.cols];
                        out.iter_mut().zip(gain).for_each(|(out, gain)| *out = gain * ((*out - mean) * inverse));
                        if let Some(shift) = &shift {
                            out.iter_mut().zip(&shift[column..]).for_each(|(out, shift)| *out += shift);
                        }
                    }
                });
                Ok(())
            }
            Backend::Gpu(gpu) => {
                let params = LayerNorm { shifted: shift.is_some().into(), ..self.params(y, None) };
                // Without a shift, something must still be bound in its place.
                let bindings = [x.tensor, gain, shift.unwrap_or(gain), stats, y.tensor].map(Tensor::range);
                launch(gpu, &FORWARD, params, &bindings)
            }
        }
    }

    /// From dy to dx, which is none of the others.
    pub fn backward(&self, dy: Matrix<'_>, dx: Matrix<'_>) -> Result<()> {
        let Self { x, gain, column, stats, line } = *self;
        debug_assert!(x.col == 1 && dx.col == 1 && dy.col == 1 && dy.rows == dx.rows && dy.cols == dx.cols);
        match stats.device().backend() {
            Backend::Native => {
                let (x, dy, gain) = (Rows::new(x), Rows::new(dy), gain.native::<f32>());
                let (stats, mut out) = (stats.native::<f32>(), dx.tensor.native_mut::<f32>());
                let (mut xhat, mut scaled) = (vec![0.0f32; dx.cols], vec![0.0f32; dx.cols]);
                pulp::Arch::new().dispatch(|| {
                    for row in 0..dx.rows {
                        let inverse = normalize(x.row(row), &stats[2 * (line + row)..], &mut xhat);
                        let parts = scaled.iter_mut().zip(dy.row(row)).zip(&gain[column..]);
                        parts.for_each(|((scaled, dy), gain)| *scaled = gain * dy);
                        let mean = sum(&scaled, |g| g) / dx.cols as f32;
                        let out = &mut out[dx.offset + row * dx.row..][..dx.cols];
                        let along = dot(&scaled, &xhat) / dx.cols as f32;
                        for ((out, g), xhat) in out.iter_mut().zip(&scaled).zip(&xhat) {
                            *out = ((g - mean) - xhat * along) * inverse;
                        }
                    }
                });
                Ok(())
            }
            Backend::Gpu(gpu) => {
                let bindings = [x.tensor, gain, stats, dx.tensor, dy.tensor].map(Tensor::range);
                launch(gpu, &BACKWARD, self.params(dx, Some(dy)), &bindings)
            }
        }
    }

    /// Adds the gain's gradient to `dgain`, which is laid out as the gain. The shift's is a [`super::column_sum`] of dy.
    pub fn backward_gain(&self, dy: Matrix<'_>, dgain: &Tensor) -> Result<()> {
        let Self { x, column, stats, line, .. } = *self;
        debug_assert!(x.col == 1 && dy.col == 1 && dy.rows == x.rows && dy.cols == x.cols);
        match stats.device().backend() {
            Backend::Native => {
                let (rows, x, dy) = (x.rows, Rows::new(x), Rows::new(dy));
                let (stats, mut dgain) = (stats.native::<f32>(), dgain.native_mut::<f32>());
                let (mut xhat, mut totals) = (vec![0.0f32; x.matrix.cols], vec![0.0f32; x.matrix.cols]);
                pulp::Arch::new().dispatch(|| {
                    for row in 0..rows {
                        normalize(x.row(row), &stats[2 * (line + row)..], &mut xhat);
                        let parts = totals.iter_mut().zip(&xhat).zip(dy.row(row));
                        parts.for_each(|((total, xhat), dy)| *total += dy * xhat);
                    }
                });
                dgain[column..].iter_mut().zip(&totals).for_each(|(dgain, total)| *dgain += total);
                Ok(())
            }
            Backend::Gpu(gpu) => {
                let bindings = [x.tensor, stats, dy.tensor, dgain].map(Tensor::range);
                gpu.launch(&BACKWARD_GAIN, &self.params(x, Some(dy)), &bindings, grid(x.cols))
            }
        }
    }

    fn params(&self, y: Matrix<'_>, dy: Option<Matrix<'_>>) -> LayerNorm {
        let (dy_offset, dy_row) = dy.map_or((0, 0), |dy| (dy.offset as u32, dy.row as u32));
        LayerNorm {
            rows: self.x.rows as u32,
            width: self.x.cols as u32,
            x_offset: self.x.offset as u32,
            x_row: self.x.row as u32,
            y_offset: y.offset as u32,
            y_row: y.row as u32,
            dy_offset,
            dy_row,
            column: self.column as u32,
            line: self.line as u32,
            shifted: 0,
        }
    }
}

/// A workgroup a row.
fn launch(gpu: &Gpu, kernel: &'static Kernel, params: LayerNorm, bindings: &[Range]) -> Result<()> {
    gpu.launch_each(kernel, &[lanes(gpu)], bindings, std::iter::once((params, row_groups(params.rows as usize))))
}

/// Lanes of a workgroup that normalizes a row, as a constant of its shader.
pub(super) fn lanes(gpu: &Gpu) -> (&'static str, f64) {
    ("lanes", if gpu.subgroup_size() == Some(8) { 8.0 } else { 64.0 })
}

/// A native matrix, open for reading.
struct Rows<'a, T> {
    matrix: Matrix<'a>,
    values: T,
}

impl<'a> Rows<'a, parking_lot::MappedRwLockReadGuard<'a, [f32]>> {
    fn new(matrix: Matrix<'a>) -> Self {
        Self { matrix, values: matrix.tensor.native::<f32>() }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[f32] {
        &self.values[self.matrix.offset + row * self.matrix.row..][..self.matrix.cols]
    }
}

/// xhat of a row, and its factor, by what forward left.
#[inline(always)]
fn normalize(x: &[f32], stats: &[f32], xhat: &mut [f32]) -> f32 {
    let (mean, inverse) = (stats[0], stats[1]);
    xhat.iter_mut().zip(x).for_each(|(xhat, value)| *xhat = ((value - x[0]) - mean) * inverse);
    inverse
}

/// Partial sums that a vector holds.
const LANES: usize = 16;

#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for chunk in values.chunks(LANES) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += f(*value));
    }
    lanes.iter().sum()
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        lanes.iter_mut().zip(a).zip(b).for_each(|((lane, a), b)| *lane += a * b);
    }
    lanes.iter().sum()
}

/// The products of a recurrent layer's gates `[lines, GATES * H]`, normalized group by group.
pub(crate) struct GateNorm<'a> {
    /// H.
    pub hidden: usize,
    /// Of each group its first gate, the slot that gets the gradient of that, and how many gates are normalized together.
    pub groups: Vec<(usize, usize, usize)>,
    /// `[lines, GATES * H]`, as the products came.
    pub products: &'a Tensor,
    /// `[GATES * H]`
    pub gain: &'a Tensor,
    /// `[groups or more, lines, 2]`
    pub stats: &'a Tensor,
}

impl GateNorm<'_> {
    /// Lines that `products` has.
    pub fn lines(&self) -> usize {
        self.products.len() / self.gain.len()
    }

    /// `count` lines of the products.
    pub fn window(&self, line: usize, count: usize) -> Matrix<'_> {
        let width = self.gain.len();
        Matrix::window(self.products, line * width, count, width, width)
    }

    /// `y [count, GATES * H]` of the products from `line` on; the shift is laid out as the gain.
    pub fn forward(&self, line: usize, shift: Option<&Tensor>, y: Matrix<'_>) -> Result<()> {
        self.norms(line, y.rows).try_for_each(|(norm, _)| norm.forward(shift, y.columns(norm.column, norm.x.cols)))
    }

    /// The products' gradient `dx [count, GATES * H]` from `line` on, of dy in slots `[count, SLOTS * H]`.
    pub fn backward(&self, line: usize, dslots: Matrix<'_>, dx: Matrix<'_>) -> Result<()> {
        self.norms(line, dx.rows)
            .try_for_each(|(norm, slot)| norm.backward(dslots.columns(slot, norm.x.cols), dx.columns(norm.column, norm.x.cols)))
    }

    /// Adds the gain's gradient over the lines from `line` on to `dgain`, of dy in slots `[count, SLOTS * H]`.
    pub fn backward_gain(&self, line: usize, dslots: Matrix<'_>, dgain: &Tensor) -> Result<()> {
        let mut norms = self.norms(line, dslots.rows);
        norms.try_for_each(|(norm, slot)| norm.backward_gain(dslots.columns(slot, norm.x.cols), dgain))
    }

    /// Of each group the normalization of `count` lines, and the column of the slots where its gradient starts.
    fn norms(&self, line: usize, count: usize) -> impl Iterator<Item = (Norm<'_>, usize)> {
        let (lines, all) = (self.lines(), self.window(line, count));
        self.groups.iter().enumerate().map(move |(n, &(gate, slot, gates))| {
            let column = gate * self.hidden;
            let x = all.columns(column, gates * self.hidden);
            let norm = Norm { x, gain: self.gain, column, stats: self.stats, line: n * lines + line };
            (norm, slot * self.hidden)
        })
    }
}
