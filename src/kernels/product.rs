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
    // Millions of rows in tens of thousands of parts do not fit into the 32 bits of a browser's addresses.
    let start = move |part: usize| (part as u64 * rows as u64 / parts as u64) as usize;
    (0..parts).map(move |part| (start(part), start(part + 1) - start(part)))
}

/// The rows of A that go against a panel.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    /// Each contiguous, and how far they are apart.
    Apart(&'a [f32], usize),
    /// Tile by tile as [`cut`] gives them, in each the rows side by side for every k.
    Packed(&'a [f32]),
}

/// `sums [rows, width] += A [rows, k] . B [k, width]`. For [`pulp::Simd::vectorize`], which makes it one function for all that
/// call it. The caller owns the sums.
pub(super) struct PanelProduct<'a> {
    /// rows, width, k; packed rows have at most [`DEPTH`] k. The width is a multiple of 16, and at most [`PANEL`].
    pub sizes: [usize; 3],
    pub a: Rows<'a>,
    /// Rows of B, and how far they are apart.
    pub panel: (&'a [f32], usize),
    /// The sums' memory, where they start, and how far their rows are apart.
    pub sums: (&'a Shared<'a>, usize, usize),
    /// Whether the sums start at 0, and not at what is there.
    pub fresh: bool,
}

impl pulp::WithSimd for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let Self { sizes: [rows, width, k], a, panel: (panel, stride), sums: (sums, start, sums_row), fresh } = self;
        for first in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - first);
            let panel = &panel[first * stride..][..(depth - 1) * stride + width];
            for (row, count) in cut(rows, ROWS) {
                let a = match a {
                    Rows::Apart(a, a_row) => Rows::Apart(&a[row * a_row + first..], a_row),
                    Rows::Packed(a) => Rows::Packed(&a[row * depth..][..count * depth]),
                };
                let tile =
                    Tile { a, depth, panel, stride, sums, start: start + row * sums_row, sums_row, fresh: fresh && first == 0 };
                match count {
                    1 => tile.run::<S, 1>(simd, width),
                    2 => tile.run::<S, 2>(simd, width),
                    3 => tile.run::<S, 3>(simd, width),
                    4 => tile.run::<S, 4>(simd, width),
                    5 => tile.run::<S, 5>(simd, width),
                    _ => tile.run::<S, ROWS>(simd, width),
                }
            }
        }
    }
}

/// Some rows against all columns of a panel.
#[derive(Clone, Copy)]
struct Tile<'a> {
    a: Rows<'a>,
    depth: usize,
    panel: &'a [f32],
    stride: usize,
    sums: &'a Shared<'a>,
    start: usize,
    sums_row: usize,
    fresh: bool,
}

impl Tile<'_> {
    /// R rows: as many vectors at once as leave registers for B.
    #[inline(always)]
    fn run<S: pulp::Simd, const R: usize>(self, simd: S, width: usize) {
        match (S::F32_LANES, width) {
            (16, 64) => self.columns::<S, R, 4>(simd, 0),
            (16, 48) => self.columns::<S, R, 3>(simd, 0),
            (16, 32) => self.columns::<S, R, 2>(simd, 0),
            (16, _) => self.columns::<S, R, 1>(simd, 0),
            (8, _) => {
                for at in (0..width).step_by(16) {
                    self.columns::<S, R, 2>(simd, at);
                }
            }
            (lanes, _) => {
                for at in (0..width).step_by(4 * lanes) {
                    self.columns::<S, R, 4>(simd, at);
                }
            }
        }
    }

    /// R rows and P vectors of sums from column `at` on.
    #[inline(always)]
    fn columns<S: pulp::Simd, const R: usize, const P: usize>(self, simd: S, at: usize) {
        let Self { a, depth, stride, start, sums_row, .. } = self;
        let (panel, span) = (&self.panel[at..], P * S::F32_LANES);
        // SAFETY: sums that the caller owns; each slice is dropped before the next one is made.
        let memory = |r: usize| unsafe { self.sums.slice(start + r * sums_row + at, span) };
        let mut sums = [[simd.splat_f32s(0.0); P]; R];
        if !self.fresh {
            for (r, sums) in sums.iter_mut().enumerate() {
                sums.copy_from_slice(S::as_simd_f32s(memory(r)).0);
            }
        }
        // Fused wherever the CPU can, in every column.
        match a {
            Rows::Apart(a, a_row) => {
                let rows: [&[f32]; R] = std::array::from_fn(|r| &a[r * a_row..][..depth]);
                for (k, b) in (0..depth).zip(panel.chunks(stride)) {
                    let b = S::as_simd_f32s(&b[..span]).0;
                    let b: [S::f32s; P] = std::array::from_fn(|p| b[p]);
                    for (sums, row) in sums.iter_mut().zip(&rows) {
                        let a = simd.splat_f32s(row[k]);
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = simd.mul_add_e_f32s(a, b, *sum);
                        }
                    }
                }
            }
            Rows::Packed(a) => {
                for (a, b) in a.chunks_exact(R).zip(panel.chunks(stride)) {
                    let b = S::as_simd_f32s(&b[..span]).0;
                    let b: [S::f32s; P] = std::array::from_fn(|p| b[p]);
                    for (sums, a) in sums.iter_mut().zip(a) {
                        let a = simd.splat_f32s(*a);
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = simd.mul_add_e_f32s(a, b, *sum);
                        }
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            S::as_mut_simd_f32s(memory(r)).0.copy_from_slice(sums);
        }
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
    let threads = if m.saturating_mul(n).saturating_mul(k) < PARALLEL { 1 } else { threads };
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
        let mut tiles = Scratch::new(if a_col == 1 { 0 } else { BAND * deepest });
        let mut rest = Sums::ZERO;
        let rest = &Shared::new(&mut rest.0);
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
                let from = &a[row * a_row + first * a_col..];
                let a = match a_col {
                    1 => Rows::Apart(from, a_row),
                    _ => Rows::Packed(pack_rows(from, [rows, depth], (a_row, a_col), tiles.numbers())),
                };
                for panel in 0..panels {
                    let width = PANEL.min(n - panel * PANEL);
                    let b = match in_place {
                        true if width == PANEL => (&block[panel * PANEL..], b_row),
                        true => {
                            pack_panel(&block[panel * PANEL..], [depth, width], (b_row, 1), (packed, PANEL));
                            (&*packed, PANEL)
                        }
                        false => (&packed[panel * depth * PANEL..], PANEL),
                    };
                    // A panel that is no whole one has its sums apart from C.
                    let whole = width == PANEL;
                    let target = (c, c_first + row * c_row + panel * PANEL, c_row);
                    let sums = if whole { target } else { (rest, 0, PANEL) };
                    let adds = self.accumulate || first > 0;
                    let bias = self.bias.filter(|_| first == 0).map(|bias| &bias[panel * PANEL..][..width]);
                    for r in 0..rows {
                        // SAFETY: parts of C that this thread owns, and of a buffer of its own; dropped before others are made.
                        let [sums, target] =
                            [sums, target].map(|(memory, at, row)| move || unsafe { memory.slice(at + r * row, width) });
                        if adds && !whole {
                            sums().copy_from_slice(target());
                        }
                        match bias {
                            Some(bias) if adds => sums().iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias),
                            Some(bias) => sums().copy_from_slice(bias),
                            None => {}
                        }
                    }
                    let fresh = !adds && bias.is_none();
                    simd.vectorize(PanelProduct { sizes: [rows, PANEL, depth], a, panel: b, sums, fresh });
                    for r in 0..if whole { 0 } else { rows } {
                        // SAFETY: as above; and not the same memory.
                        let [sums, target] = [sums, target].map(|(memory, at, row)| unsafe { memory.slice(at + r * row, width) });
                        target.copy_from_slice(sums);
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

/// Copies a band of A whose columns are apart, tile by tile, the rows of each side by side for every k.
#[inline(always)]
fn pack_rows<'a>(a: &[f32], [rows, depth]: [usize; 2], (a_row, a_col): (usize, usize), to: &'a mut [f32]) -> &'a [f32] {
    for (row, count) in cut(rows, ROWS) {
        let tile = &mut to[row * depth..][..count * depth];
        for (k, values) in tile.chunks_exact_mut(count).enumerate() {
            let from = &a[row * a_row + k * a_col..];
            match (a_row, count) {
                (1, ROWS) => values.copy_from_slice(&from[..ROWS]),
                (1, 5) => values.copy_from_slice(&from[..5]),
                _ => values.iter_mut().enumerate().for_each(|(r, value)| *value = from[r * a_row]),
            }
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes around tiles, bands, panels and the cut of k: threads, the size of C and the order of A in memory show in no bit.
    #[test]
    fn bits_depend_on_no_cut() {
        for [m, n, k] in [[1, 70, 300], [15, 64, 513], [65, 130, 520], [200, 190, 130], [190, 200, 130]] {
            let number = |at: usize| ((at * 7919) % 1013) as f32 / 1013.0 - 0.5;
            let a: Vec<f32> = (0..m * k).map(number).collect();
            let turned: Vec<f32> = (0..m * k).map(|at| a[at % m * k + at / m]).collect();
            let b: Vec<f32> = (0..k * n).map(|at| number(at + 11)).collect();
            let bits = |sizes, a: (&[f32], usize, usize), threads| {
                let [m, n, _]: [usize; 3] = sizes;
                let mut c = vec![f32::NAN; m * n];
                multiply(sizes, a, (&b, b.len() / k, 1), None, (&mut c, n), false, threads);
                c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let whole = bits([m, n, k], (&a, k, 1), 1);
            for threads in [2, 3, 7] {
                assert_eq!(bits([m, n, k], (&a, k, 1), threads), whole, "{m}x{n}x{k} on {threads} threads");
            }
            assert_eq!(bits([m, n, k], (&turned, 1, m), 2), whole, "{m}x{n}x{k} of A^T");
            let row = m - 1;
            assert_eq!(bits([1, n, k], (&a[row * k..], k, 1), 1), whole[row * n..], "{m}x{n}x{k}: the last row alone");
        }
    }
}
