//! The native matrix product. Each number of C is one chain of multiply-adds over k, from the first to the last, so that neither
//! the size of C, nor how it is cut into tiles and shared among threads, shows in its bits.
//!
//! ```text
//!                      B   a panel, at most 64 columns, its rows one after another:
//!                          one line of vectors is loaded for each k
//!
//!   A   at most 6 rows     a tile of C: its sums stay in registers for up to 512 k;
//!       in place           a number of A is spread over a vector for each row and k
//! ```
//!
//! 6 rows x 4 vectors of AVX-512 are 24 sums, enough to hide that each waits for its predecessor. With AVX2, which has 16 registers
//! of half that size, a tile takes the panel in parts of 2 vectors. 512 k of a panel are 128 KiB: they stay in the second
//! cache while the rows go by, and 512 k of 6 rows in the first.

use crate::backend::native::{Scratch, Shared, for_parts};

/// Rows of a tile.
pub(super) const ROWS: usize = 6;
/// Columns of a panel of B at most; numbers of the widest vector divide those of each.
pub(super) const PANEL: usize = 64;
/// Numbers along k between two looks at the sums in memory.
const DEPTH: usize = 512;
/// Rows whose sums stay in the first cache.
pub(super) const BAND: usize = 64;
/// From so many rows on, copying B into panels costs less than reading it in place.
const PACKED: usize = 16;
/// Below this, in multiply-adds, waking a thread costs more than it saves.
const PARALLEL: usize = 1 << 21;

/// Sums of a band, `[rows, width]`, on the boundary of a vector.
#[repr(C, align(64))]
pub(super) struct Sums(pub [f32; BAND * PANEL]);

impl Sums {
    pub const ZERO: Self = Self([0.0; BAND * PANEL]);
}

/// Cuts `0..rows` into parts of at most `most` rows that differ by one row at most, as `(first, count)`.
#[inline(always)]
pub(super) fn cut(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let parts = rows.div_ceil(most);
    (0..parts).map(move |part| (part * rows / parts, (part + 1) * rows / parts - part * rows / parts))
}

/// `sums [rows, width] += A [rows, k] . B [k, width]`. For [`pulp::Simd::vectorize`], which makes it one function for all that
/// call it.
pub(super) struct PanelProduct<'a> {
    /// rows, width, k. The width is a multiple of 16, and at most [`PANEL`].
    pub sizes: [usize; 3],
    /// Rows of A, each contiguous, and how far they are apart.
    pub a: (&'a [f32], usize),
    /// Rows of B, likewise.
    pub panel: (&'a [f32], usize),
    pub sums: &'a mut [f32],
}

impl pulp::WithSimd for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let Self { sizes: [rows, width, k], a: (a, a_row), panel: (panel, stride), sums } = self;
        for first in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - first);
            let panel = &panel[first * stride..][..(depth - 1) * stride + width];
            for (row, count) in cut(rows, ROWS) {
                let a = (&a[row * a_row + first..], a_row, depth);
                let sums = &mut sums[row * width..][..count * width];
                match count {
                    1 => tiles::<S, 1>(simd, a, (panel, stride), sums, width),
                    2 => tiles::<S, 2>(simd, a, (panel, stride), sums, width),
                    3 => tiles::<S, 3>(simd, a, (panel, stride), sums, width),
                    4 => tiles::<S, 4>(simd, a, (panel, stride), sums, width),
                    5 => tiles::<S, 5>(simd, a, (panel, stride), sums, width),
                    _ => tiles::<S, ROWS>(simd, a, (panel, stride), sums, width),
                }
            }
        }
    }
}

/// R rows against all columns of a panel: as many vectors at once as leave registers for B.
#[inline(always)]
fn tiles<S: pulp::Simd, const R: usize>(
    simd: S,
    (a, a_row, depth): (&[f32], usize, usize),
    (panel, stride): (&[f32], usize),
    sums: &mut [f32],
    width: usize,
) {
    let rows: [&[f32]; R] = std::array::from_fn(|r| &a[r * a_row..][..depth]);
    match (S::F32_LANES, width) {
        (16, 64) => tile::<S, R, 4>(simd, rows, (panel, stride), sums, width),
        (16, 48) => tile::<S, R, 3>(simd, rows, (panel, stride), sums, width),
        (16, 32) => tile::<S, R, 2>(simd, rows, (panel, stride), sums, width),
        (16, _) => tile::<S, R, 1>(simd, rows, (panel, stride), sums, width),
        (8, _) => {
            for at in (0..width).step_by(16) {
                tile::<S, R, 2>(simd, rows, (&panel[at..], stride), &mut sums[at..], width);
            }
        }
        (lanes, _) => {
            for at in (0..width).step_by(4 * lanes) {
                tile::<S, R, 4>(simd, rows, (&panel[at..], stride), &mut sums[at..], width);
            }
        }
    }
}

/// R rows and P vectors of sums, `width` apart.
#[inline(always)]
fn tile<S: pulp::Simd, const R: usize, const P: usize>(
    simd: S,
    rows: [&[f32]; R],
    (panel, stride): (&[f32], usize),
    memory: &mut [f32],
    width: usize,
) {
    let span = P * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); P]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(S::as_simd_f32s(&memory[r * width..][..span]).0);
    }
    for (k, b) in (0..rows[0].len()).zip(panel.chunks(stride)) {
        let b = S::as_simd_f32s(&b[..span]).0;
        let b: [S::f32s; P] = std::array::from_fn(|p| b[p]);
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let a = simd.splat_f32s(row[k]);
            for (sum, b) in sums.iter_mut().zip(b) {
                // Fused wherever the CPU can, in every column.
                *sum = simd.mul_add_e_f32s(a, b, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        S::as_mut_simd_f32s(&mut memory[r * width..][..span]).0.copy_from_slice(sums);
    }
}

/// `C (+)= A . B (+ bias)` for sizes `[m, n, k]`; A and B are slices with their row and column strides, C with its row stride. On
/// at most `threads` threads, which share the rows or the columns of C.
pub(crate) fn multiply(
    [m, n, k]: [usize; 3],
    (a, a_row, a_col): (&[f32], usize, usize),
    (b, b_row, b_col): (&[f32], usize, usize),
    bias: Option<&[f32]>,
    (c, c_row): (&mut [f32], usize),
    accumulate: bool,
    threads: usize,
) {
    let threads = if m * n * k < PARALLEL { 1 } else { threads };
    let c = Shared::new(c);
    // Whole tiles, and whole panels, for each thread.
    let (by_rows, unit) = if m >= n { (true, ROWS) } else { (false, PANEL) };
    let items = if by_rows { m } else { n };
    for_parts(items.div_ceil(unit), threads, |first, count| {
        let (first, count) = (first * unit, (count * unit).min(items - first * unit));
        let (row, column, m, n) = if by_rows { (first, 0, count, n) } else { (0, first, m, count) };
        pulp::Arch::new().dispatch(Product {
            sizes: [m, n, k],
            a: (&a[row * a_row..], a_row, a_col),
            b: (&b[column * b_col..], b_row, b_col),
            bias: bias.map(|bias| &bias[column..column + n]),
            c: (&c, row * c_row + column, c_row),
            accumulate,
        });
    });
}

/// What one thread does of a product. C from its first number on, with its row stride.
struct Product<'a> {
    sizes: [usize; 3],
    a: (&'a [f32], usize, usize),
    b: (&'a [f32], usize, usize),
    bias: Option<&'a [f32]>,
    c: (&'a Shared<'a>, usize, usize),
    accumulate: bool,
}

impl pulp::WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let ([m, n, k], (a, a_row, a_col), (b, b_row, b_col)) = (self.sizes, self.a, self.b);
        let (c, c_first, c_row) = self.c;
        let (panels, deepest) = (n.div_ceil(PANEL), DEPTH.min(k));
        let in_place = m < PACKED && b_col == 1;
        // In place only the last panel is copied, where it is no whole one.
        let copied = if in_place { usize::from(n % PANEL > 0) } else { panels };
        let mut packed = Scratch::new(copied * deepest * PANEL);
        let mut turned = Scratch::new(if a_col == 1 { 0 } else { BAND * deepest });
        let mut sums = Sums::ZERO;
        for first in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - first);
            let block = &b[first * b_row..];
            let packed = packed.numbers();
            if !in_place {
                for (panel, to) in packed.chunks_mut(depth * PANEL).take(panels).enumerate() {
                    let width = PANEL.min(n - panel * PANEL);
                    pack_panel(&block[panel * PANEL * b_col..], [depth, width], (b_row, b_col), (to, PANEL));
                }
            }
            for (row, rows) in cut(m, BAND) {
                let a = &a[row * a_row + first * a_col..];
                let (a, a_row) =
                    if a_col == 1 { (a, a_row) } else { (turn(a, [rows, depth], (a_row, a_col), turned.numbers()), depth) };
                for panel in 0..panels {
                    let width = PANEL.min(n - panel * PANEL);
                    let (b, stride) = match in_place {
                        true if width == PANEL => (&block[panel * PANEL..], b_row),
                        true => {
                            pack_panel(&block[panel * PANEL..], [depth, width], (b_row, 1), (packed, PANEL));
                            (&*packed, PANEL)
                        }
                        false => (&packed[panel * depth * PANEL..], PANEL),
                    };
                    let at = |r: usize| c_first + (row + r) * c_row + panel * PANEL;
                    for (r, sums) in sums.0.chunks_exact_mut(PANEL).take(rows).enumerate() {
                        if self.accumulate || first > 0 {
                            // SAFETY: here and below: a part of C that this thread owns; dropped before the next one is made.
                            sums[..width].copy_from_slice(unsafe { c.slice(at(r), width) });
                        } else {
                            sums.fill(0.0);
                        }
                        if let (Some(bias), 0) = (self.bias, first) {
                            sums.iter_mut().zip(&bias[panel * PANEL..]).for_each(|(sum, bias)| *sum += bias);
                        }
                    }
                    let (sizes, sums_of) = ([rows, PANEL, depth], &mut sums.0);
                    simd.vectorize(PanelProduct { sizes, a: (a, a_row), panel: (b, stride), sums: sums_of });
                    for (r, sums) in sums.0.chunks_exact(PANEL).take(rows).enumerate() {
                        // SAFETY: as above.
                        unsafe { c.slice(at(r), width) }.copy_from_slice(&sums[..width]);
                    }
                }
            }
        }
    }
}

/// Copies `depth` rows of `width` columns of B into a panel of `columns`, with zeros behind them.
#[inline(always)]
pub(super) fn pack_panel(
    b: &[f32],
    [depth, width]: [usize; 2],
    (b_row, b_col): (usize, usize),
    (panel, columns): (&mut [f32], usize),
) {
    for (k, to) in panel.chunks_exact_mut(columns).take(depth).enumerate() {
        let from = &b[k * b_row..];
        match b_col {
            1 => to[..width].copy_from_slice(&from[..width]),
            _ => to[..width].iter_mut().enumerate().for_each(|(j, value)| *value = from[j * b_col]),
        }
        to[width..].fill(0.0);
    }
}

/// Copies a band of A whose columns are apart into rows `[rows, depth]` without gaps.
#[inline(always)]
fn turn<'a>(a: &[f32], [rows, depth]: [usize; 2], (a_row, a_col): (usize, usize), to: &'a mut [f32]) -> &'a [f32] {
    // Sixteen columns at a time: what is written stays in the first cache until its lines are full.
    for first in (0..depth).step_by(16) {
        for row in 0..rows {
            let values = &mut to[row * depth + first..][..16.min(depth - first)];
            values.iter_mut().enumerate().for_each(|(i, value)| *value = a[row * a_row + (first + i) * a_col]);
        }
    }
    to
}
