//! The native product of the mode `batch_invariant` (`Device::set_batch_invariant`): each number of C is one chain of multiply-adds
//! over k, from the first to the last. How C is cut into tiles and shared among threads then does not show in its bits.

use crate::backend::native::Shared;

/// Rows and vectors of a tile: as many sums as registers hold on AVX2.
const ROWS: usize = 6;
const VECTORS: usize = 2;
/// Where there are so few rows, tiles are wider: a single chain would wait for itself.
const FEW: usize = 2;
const WIDE: usize = 4;
/// Of k, so that a panel of B stays in the first cache.
const DEPTH: usize = 256;
/// From so many rows on, copying a panel of B costs less than reading it in place.
const PACKED: usize = 16;
/// Numbers of the widest vectors.
const LANES: usize = 16;

/// `C += A . B` for sizes `[m, n, k]`. A and B with row and column strides; C from its first number on, with its row stride. The
/// caller owns that part of C.
pub(super) struct Product<'a> {
    pub sizes: [usize; 3],
    pub a: (&'a [f32], usize, usize),
    pub b: (&'a [f32], usize, usize),
    pub c: (&'a Shared<'a>, usize, usize),
}

impl pulp::WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        match self.sizes[0] <= FEW {
            true => self.run::<S, WIDE>(simd),
            false => self.run::<S, VECTORS>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn run<S: pulp::Simd, const P: usize>(self, simd: S) {
        let ([m, n, k], (a, a_row, a_col), (b, b_row, b_col)) = (self.sizes, self.a, self.b);
        let panel = P * S::F32_LANES;
        let in_place = m < PACKED && b_col == 1;
        let (mut a_block, mut b_panel) = (vec![0.0; m * DEPTH.min(k)], vec![0.0; panel * DEPTH.min(k)]);
        for first in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - first);
            // Of A the rows of a tile lie side by side, for each k.
            for row in (0..m).step_by(ROWS) {
                let rows = ROWS.min(m - row);
                for (i, values) in a_block[row * depth..][..rows * depth].chunks_exact_mut(rows).enumerate() {
                    let at = row * a_row + (first + i) * a_col;
                    values.iter_mut().enumerate().for_each(|(r, value)| *value = a[at + r * a_row]);
                }
            }
            for column in (0..n).step_by(panel) {
                let width = panel.min(n - column);
                let at = first * b_row + column * b_col;
                let (b, stride) = if in_place && width == panel {
                    (&b[at..], b_row)
                } else {
                    // What lies past the last column is computed too, and not stored.
                    for (i, values) in b_panel[..depth * panel].chunks_exact_mut(panel).enumerate() {
                        let at = at + i * b_row;
                        match b_col {
                            1 => values[..width].copy_from_slice(&b[at..at + width]),
                            _ => values[..width].iter_mut().enumerate().for_each(|(j, value)| *value = b[at + j * b_col]),
                        }
                    }
                    (&b_panel[..depth * panel], panel)
                };
                for row in (0..m).step_by(ROWS) {
                    let rows = ROWS.min(m - row);
                    let a = &a_block[row * depth..][..rows * depth];
                    match rows {
                        1 => self.tile::<S, 1, P>(simd, a, (b, stride), (row, column, width)),
                        2 => self.tile::<S, 2, P>(simd, a, (b, stride), (row, column, width)),
                        3 => self.tile::<S, 3, P>(simd, a, (b, stride), (row, column, width)),
                        4 => self.tile::<S, 4, P>(simd, a, (b, stride), (row, column, width)),
                        5 => self.tile::<S, 5, P>(simd, a, (b, stride), (row, column, width)),
                        _ => self.tile::<S, ROWS, P>(simd, a, (b, stride), (row, column, width)),
                    }
                }
            }
        }
    }

    /// R rows and P vectors of C, of which `width` columns exist; `a [depth, R]`, and rows of b `stride` apart.
    #[inline(always)]
    fn tile<S: pulp::Simd, const R: usize, const P: usize>(
        &self,
        simd: S,
        a: &[f32],
        (b, stride): (&[f32], usize),
        (row, column, width): (usize, usize, usize),
    ) {
        let (c, first, c_row) = self.c;
        let panel = P * S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); P]; R];
        let mut buffer = [0.0; WIDE * LANES];
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: a part of C, which the caller owns; dropped before the next one is made.
            let c = unsafe { c.slice(first + (row + r) * c_row + column, width) };
            buffer[..width].copy_from_slice(c);
            sums.copy_from_slice(S::as_simd_f32s(&buffer[..panel]).0);
        }
        for (a, b) in a.chunks_exact(R).zip(b.chunks(stride)) {
            let b = S::as_simd_f32s(&b[..panel]).0;
            for (sums, a) in sums.iter_mut().zip(a) {
                let a = simd.splat_f32s(*a);
                for (sum, b) in sums.iter_mut().zip(b) {
                    // Fused wherever the CPU can, in every column.
                    *sum = simd.mul_add_e_f32s(a, *b, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            S::as_mut_simd_f32s(&mut buffer[..panel]).0.copy_from_slice(sums);
            // SAFETY: as above.
            unsafe { c.slice(first + (row + r) * c_row + column, width) }.copy_from_slice(&buffer[..width]);
        }
    }
}
