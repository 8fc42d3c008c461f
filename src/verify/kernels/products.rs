//! Products and copies.

use super::harness::{Cases, MANY, NAN, Run, TIGHT, Window, layout, mixed, normal, to_bits, wide};
use crate::device::{Backend, Device};
use crate::error::Result;
use crate::kernels;
use crate::kernels::gemm::{self, Matrix, ProductKernel, gemm_by};
use crate::kernels::half::{Factor, Precision};
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::verify::{Comparison, oracle};

/// `C [m, n] = A [m, k] . B [k, n]` and what comes with it.
#[derive(Clone, Copy)]
struct Product {
    size: [usize; 3],
    /// Whether A and B are stored transposed.
    transposed: [bool; 2],
    bias: bool,
    accumulate: bool,
    loose: bool,
    precision: Precision,
    /// Whether A's numbers lie below 2^-14, where half precision has fewer bits.
    tiny: bool,
}

impl Product {
    fn name(&self, kernel: Option<ProductKernel>) -> String {
        let [m, n, k] = self.size;
        let mut name = kernel.map_or(String::new(), |kernel| format!("{kernel:?} ")) + &format!("{m}x{n}x{k}");
        let [a_t, b_t] = self.transposed;
        for (given, part) in [
            (a_t, "A^T"),
            (b_t, "B^T"),
            (self.bias, "bias"),
            (self.accumulate, "+C"),
            (self.loose, "windows"),
            (self.tiny, "tiny A"),
        ] {
            if given {
                name += &format!(" {part}");
            }
        }
        name
    }

    /// Launches on the given values; the window of C.
    fn launch(
        &self,
        run: &mut Run<'_>,
        kernel: Option<ProductKernel>,
        [a, b]: [&[f32]; 2],
        bias: Option<&[f32]>,
        c: Option<&[f32]>,
    ) -> Result<Window> {
        let [m, n, k] = self.size;
        let [a_t, b_t] = self.transposed;
        let a = run.input_window("a", if a_t { [k, m] } else { [m, k] }, self.loose, a)?;
        let b = run.input_window("b", if b_t { [n, k] } else { [k, n] }, self.loose, b)?;
        let bias = bias.map(|bias| run.input("bias", bias, [n])).transpose()?;
        let c = run.window([m, n], self.loose, c)?;
        let (a, b) = (a.matrix(), b.matrix());
        let (a, b) = (if a_t { a.t() } else { a }, if b_t { b.t() } else { b });
        let factor = Factor::right(self.precision, b, k)?;
        match (run.device.backend(), kernel) {
            (Backend::Gpu(gpu), Some(kernel)) => {
                let half_a = if factor.is_paired() { Some(factor.half_left(a)?) } else { None };
                let a = half_a.as_ref().map_or(a, |a| a.matrix().t());
                gemm_by(kernel, gpu, &self.on_gpu(a, factor.matrix(), bias.as_ref(), c.matrix()))?;
            }
            _ => kernels::gemm_half::product(a, &factor, bias.as_ref(), c.matrix(), self.accumulate)?,
        }
        Ok(c)
    }

    fn on_gpu<'a>(&self, a: Matrix<'a>, b: Matrix<'a>, bias: Option<&'a Tensor>, c: Matrix<'a>) -> gemm::Product<'a> {
        gemm::Product { precision: self.precision, a, b, bias, c, accumulate: self.accumulate, whole: c.rows }
    }

    /// What the device would choose, `None`, and each kernel that takes the product; of these the ones that are wanted.
    fn kernels(&self, device: &Device, of: fn(Option<ProductKernel>) -> bool) -> Result<Vec<Option<ProductKernel>>> {
        let Backend::Gpu(gpu) = device.backend() else { return Ok(vec![None]) };
        let [m, n, k] = self.size;
        let [a_t, b_t] = self.transposed;
        let tensor = Tensor::zeros(device, [1])?; // only the layout counts
        let window = |rows: usize, cols: usize| {
            let [offset, row, _] = layout([rows, cols], self.loose);
            Matrix { tensor: &tensor, offset, rows, cols, row, col: 1 }
        };
        let whole = |rows: usize, cols: usize| Matrix { tensor: &tensor, offset: 0, rows, cols, row: cols, col: 1 };
        let pairs = k.div_ceil(2);
        let (a, b) = match (self.precision, a_t, b_t) {
            (Precision::Single, _, _) => {
                (if a_t { window(k, m).t() } else { window(m, k) }, if b_t { window(n, k).t() } else { window(k, n) })
            }
            (Precision::Half, a_t, _) => (if a_t { whole(pairs, m).t() } else { whole(m, pairs) }, whole(pairs, n)),
        };
        let bias = self.bias.then_some(&tensor);
        let product = self.on_gpu(a, b, bias, window(m, n));
        // Tall ones are there for what kernels do then.
        let fits = |kernel: &ProductKernel| m <= 65_535 || kernel.wraps(m);
        let takes = |kernel: &ProductKernel| fits(kernel) && kernel.takes(gpu, &product);
        let all = ProductKernel::ALL.into_iter().filter(takes).map(Some);
        Ok(std::iter::once(None).chain(all).filter(|kernel| of(*kernel)).collect())
    }
}

use ProductKernel as By;

/// What the device chooses, and what any device can run.
pub(super) fn gemm(cases: &mut Cases<'_>) -> Result<()> {
    products(cases, Precision::Single, |kernel| matches!(kernel, None | Some(By::General | By::Tiled64 | By::Tiled64Parts)))
}

/// The same products of rounded factors: with rounding the bound is that of single precision.
pub(super) fn gemm_half(cases: &mut Cases<'_>) -> Result<()> {
    let of = |kernel| matches!(kernel, None | Some(By::HalfGeneral | By::HalfTiled64 | By::HalfTiled64Parts));
    products(cases, Precision::Half, of)?;
    windows(cases)
}

pub(super) fn gemm_subgroup(cases: &mut Cases<'_>) -> Result<()> {
    let of = |kernel| matches!(kernel, Some(By::SubgroupRows | By::SubgroupRows8 | By::SubgroupColumns));
    products(cases, Precision::Single, of)
}

pub(super) fn gemm_tiled_128(cases: &mut Cases<'_>) -> Result<()> {
    products(cases, Precision::Single, |kernel| kernel == Some(By::Tiled128))?;
    products(cases, Precision::Half, |kernel| kernel == Some(By::HalfTiled128))
}

/// On matrix units.
pub(super) fn gemm_cooperative_8(cases: &mut Cases<'_>) -> Result<()> {
    products(cases, Precision::Half, |kernel| kernel == Some(By::HalfCooperative8))
}

pub(super) fn gemm_cooperative_16(cases: &mut Cases<'_>) -> Result<()> {
    products(cases, Precision::Half, |kernel| kernel == Some(By::HalfCooperative16))
}

fn products(cases: &mut Cases<'_>, precision: Precision, of: fn(Option<ProductKernel>) -> bool) -> Result<()> {
    let plain =
        Product { size: [1, 1, 1], transposed: [false; 2], bias: false, accumulate: false, loose: false, precision, tiny: false };
    let mut products = Vec::new();
    // Tiles: 8 rows, 4 columns a lane, 64 lanes; 8 and 32 rows, 32 columns, all in fours. k around vector widths.
    let sizes = [
        [1, 1, 1],
        [1, 3, 2],
        [2, 5, 3],
        [7, 63, 4],
        [8, 64, 5],
        [9, 65, 7],
        [15, 127, 8],
        [16, 128, 9],
        [17, 129, 15],
        [33, 255, 16],
        [8, 256, 17],
        [9, 257, 33],
        [1, 260, 64],
        [64, 4, 65],
        [3, 2, 1000],
        [130, 70, 31],
        // On the CPU a tile has 6 rows, a band of tiles 64, a panel 64 columns; k is cut after 512; threads share what is longer.
        [65, 65, 513],
        [100, 190, 120],
        [190, 100, 120],
        [4, 4, 4],
        [8, 32, 12],
        [12, 28, 8],
        [28, 36, 36],
        [31, 32, 16],
        [32, 28, 4],
        [33, 36, 20],
        [36, 60, 1],
        [64, 64, 64],
        [68, 100, 3],
        // Tiles of 64 and 128, 8 and 16 words along k, parts of 256 words.
        [60, 64, 20],
        [64, 68, 24],
        [68, 132, 260],
        [124, 128, 256],
        [128, 128, 32],
        [132, 124, 1032],
    ]; // [m, n, k]
    for (i, size) in sizes.into_iter().enumerate() {
        for (j, [a, b]) in [[false, false], [false, true], [true, false], [true, true]].into_iter().enumerate() {
            let kind = i + j;
            let (bias, accumulate, loose) = (kind % 2 == 1, kind % 4 > 1, kind % 8 > 3);
            products.push(Product { size, transposed: [a, b], bias, accumulate, loose, ..plain });
        }
    }
    // Every option with every other, with rows and columns left over, below and above the tile's rows.
    for m in [5, 9] {
        for bits in 0..32 {
            let [a, b, bias, accumulate, loose] = [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
            products.push(Product { size: [m, 66, 17], transposed: [a, b], bias, accumulate, loose, ..plain });
        }
    }
    for m in [6, 36] {
        for bits in 0..32 {
            let [a, b, bias, accumulate, loose] = [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
            products.push(Product { size: [m, 36, 8], transposed: [a, b], bias, accumulate, loose, ..plain });
        }
    }
    // More tiles of rows than one dimension of workgroups has, for the kernels that then go on in another.
    products.push(Product { size: [65_535 * 8 + 9, 1, 1], loose: true, ..plain });
    products.push(Product { size: [65_535 * 32 + 36, 4, 1], transposed: [true, false], ..plain });
    products.push(Product { size: [65_535 * 8 + 9, 4, 4], ..plain });
    // In half precision numbers below 2^-14 are denormal.
    for size in [[9, 70, 5], [68, 72, 48]] {
        products.push(Product { size, tiny: true, ..plain });
    }

    let mut rng = Rng::seed(1);
    for (i, product) in products.into_iter().enumerate() {
        let [m, n, k] = product.size;
        // Large numbers hide errors in the others: only some cases have them.
        let draw = if i % 3 == 0 { mixed } else { normal };
        let (mut a, b) = (draw(&mut rng, m * k), draw(&mut rng, k * n));
        if product.tiny {
            a.iter_mut().for_each(|a| *a *= 2f32.powi(-18));
        }
        let bias = product.bias.then(|| normal(&mut rng, n));
        let c = product.accumulate.then(|| normal(&mut rng, m * n));
        let [a_t, b_t] = product.transposed;
        let [rounded_a, rounded_b] = [&a, &b].map(|factor| rounded(precision, factor));
        let mut expected = oracle::matmul(&rounded_a, &rounded_b, m, n, k, a_t, b_t);
        for (at, value) in expected.iter_mut().enumerate() {
            *value += bias.as_ref().map_or(0.0, |bias| bias[at % n].into()) + c.as_ref().map_or(0.0, |c| c[at].into());
        }
        for kernel in product.kernels(cases.device, of)? {
            cases.run(product.name(kernel), |run| {
                let c = product.launch(run, kernel, [&a, &b], bias.as_deref(), c.as_deref())?;
                run.near_window("c", &c, &expected, TIGHT)
            })?;
        }
    }

    // One NaN in A, B, bias or C reaches its row, its column, its column, its place.
    for ([m, n, k], transposed) in
        [([9, 70, 5], [false; 2]), ([9, 70, 5], [true; 2]), ([36, 36, 8], [false; 2]), ([36, 36, 5], [true, false])]
    {
        for part in 0..4 {
            let product = Product { size: [m, n, k], transposed, bias: true, accumulate: true, ..plain };
            let [mut a, mut b] = [normal(&mut rng, m * k), normal(&mut rng, k * n)];
            let [mut bias, mut c] = [normal(&mut rng, n), normal(&mut rng, m * n)];
            let (row, column, depth) = (m - 1, n - 2, k - 1);
            let at =
                |turned: bool, [r, c]: [usize; 2], [rows, cols]: [usize; 2]| if turned { c * rows + r } else { r * cols + c };
            match part {
                0 => a[at(transposed[0], [row, depth], [m, k])] = NAN,
                1 => b[at(transposed[1], [depth, column], [k, n])] = NAN,
                2 => bias[column] = NAN,
                _ => c[row * n + column] = NAN,
            }
            for kernel in product.kernels(cases.device, of)? {
                cases.run(format!("NaN in {}, {}", ["A", "B", "bias", "C"][part], product.name(kernel)), |run| {
                    let c = product.launch(run, kernel, [&a, &b], Some(&bias), Some(&c))?;
                    run.nan("c", &c.tensor, |at| match part {
                        0 => at / n == row,
                        1 | 2 => at % n == column,
                        _ => at == row * n + column,
                    })
                })?;
            }
        }
    }
    Ok(())
}

/// A factor as a product sees it.
fn rounded(precision: Precision, factor: &[f32]) -> Vec<f64> {
    let round = |value: &f32| match precision {
        Precision::Single => f64::from(*value),
        Precision::Half => oracle::half(f64::from(*value)),
    };
    factor.iter().map(round).collect()
}

/// A right factor of runs of rows: with some of its runs, some of its columns, and all of both.
fn windows(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(10);
    let precision = Precision::Half;
    for [m, n, run, runs] in [[1, 1, 1, 3], [5, 9, 4, 3], [9, 70, 7, 4], [3, 129, 19, 3]] {
        let k = run * runs;
        let (a, b) = (normal(&mut rng, m * k), normal(&mut rng, k * n));
        let [wide_a, wide_b] = [&a, &b].map(|factor| rounded(precision, factor));
        cases.run(format!("{runs} runs of {run}, {m}x{n}"), |case| {
            let (a, b) = (case.input("a", &a, [m, k])?, case.input("b", &b, [k, n])?);
            let b = Factor::right(precision, Matrix::new(&b, k, n), run)?;
            for (first, count) in [(0, runs), (0, runs - 1), (runs - 1, 1), (1, runs - 1)] {
                let column = first.min(n - 1);
                let (from, depth) = (first * run, count * run);
                let columns = n - column;
                let part_a: Vec<f64> = wide_a.chunks_exact(k).flat_map(|line| line[from..from + depth].to_vec()).collect();
                let lines_b = wide_b.chunks_exact(n).skip(from).take(depth);
                let part_b: Vec<f64> = lines_b.flat_map(|line| line[column..column + columns].to_vec()).collect();
                let c = Tensor::uninitialized(case.device, [m * columns])?;
                let part = b.runs(first, count).lines(column, columns);
                let seen = Matrix::window(&a, from, m, depth, k);
                kernels::gemm_half::product(seen, &part, None, Matrix::new(&c, m, columns), false)?;
                let expected = oracle::matmul(&part_a, &part_b, m, columns, depth, false, false);
                case.near(&format!("runs from {first}, {count}"), &c, &expected, TIGHT)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Rounding to half precision, on every side of where it changes, to the bit.
pub(super) fn half(cases: &mut Cases<'_>) -> Result<()> {
    let mut words: Vec<u32> = Vec::new();
    // Every number of half precision and every midpoint, and the neighbours of both.
    for half in 0..=0x7bffu16 {
        let [low, high] = [half, half + 1].map(|bits| half::f16::from_bits(bits).to_f64());
        let high = if high.is_finite() { high } else { 65536.0 };
        for exact in [low, (low + high) / 2.0] {
            let bits = (exact as f32).to_bits();
            words.extend([bits.saturating_sub(1), bits, bits + 1]);
        }
    }
    words.extend([65536.0, 1e30, f32::MAX, f32::MIN_POSITIVE, f32::INFINITY].map(f32::to_bits));
    words.extend([1, 0x7f_ffff]); // denormal numbers
    words.extend(words.clone().into_iter().map(|word| word | 0x8000_0000));
    let nans = [NAN.to_bits(), 0x7f80_0001, 0xff80_0001, 0xffff_ffff];
    let rounded: Vec<f32> = words.iter().map(|word| oracle::half(f64::from(f32::from_bits(*word))) as f32).collect();
    let count = words.len();
    words.extend(nans);
    let all = words.len();
    for is_row in [true, false] {
        cases.run(if is_row { "rows" } else { "columns" }, |run| {
            // Each number alone on its line, or all in one.
            let x = Tensor::upload("x", run.device, &words, vec![all])?;
            run.input_words("x", &x, &words);
            let matrix = if is_row { Matrix::new(&x, all, 1) } else { Matrix::new(&x, 1, all) };
            let factor = Factor::right(Precision::Half, matrix, matrix.rows)?;
            let stored = run.read(&factor.words)?;
            let number = |at: usize| match (run.device.is_cpu(), is_row) {
                (true, _) => f32::from_bits(stored[at]),
                (false, true) => half::f16::from_bits((stored[at / 2] >> (at % 2 * 16)) as u16).to_f32(),
                (false, false) => half::f16::from_bits(stored[at] as u16).to_f32(),
            };
            let numbers: Vec<f32> = (0..count).map(number).collect();
            run.comparisons.push(Comparison::bits("numbers", &to_bits(&numbers), &to_bits(&rounded)));
            let lost = (count..all).filter(|at| !number(*at).is_nan()).count();
            run.comparisons.push(Comparison::measured("NaN", lost as f64, 0.0));
            Ok(())
        })?;
    }
    Ok(())
}

pub(super) fn transpose(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(2);
    for [a, b, c] in
        [[1, 1, 1], [1, 7, 3], [5, 1, 9], [3, 4, 5], [63, 1, 1], [8, 8, 1], [13, 5, 1], [9, 7, 65], [3, MANY / 3 + 1, 1]]
    {
        let x = mixed(&mut rng, a * b * c);
        let mut expected = Vec::with_capacity(x.len());
        for (j, i) in (0..b).flat_map(|j| (0..a).map(move |i| (j, i))) {
            expected.extend(to_bits(&x[(i * b + j) * c..][..c]));
        }
        cases.run(format!("{a}x{b}x{c}"), |run| {
            let x = run.input("x", &x, [a, b, c])?;
            let y =
                if c == 1 { kernels::transpose::matrix(&x.reshape([a, b])?, a, b)? } else { kernels::transpose::leading(&x)? };
            run.bits("y", &y, &expected)
        })?;
    }
    Ok(())
}

pub(super) fn gather(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(3);
    for (count, table, width) in [(1, 1, 1), (7, 3, 9), (63, 5, 1), (64, 5, 1), (65, 70, 1), (5, 300, 65), (4100, 3, 1024)] {
        let values = mixed(&mut rng, table * width);
        // The first id past the table, and the last of all, give zeros.
        let mut indices: Vec<u32> = (0..count).map(|_| rng.below(table + 1) as u32).collect();
        indices[count / 2] = u32::MAX;
        // Times the width this one is 0 in 32 bits: read without a check, it would be row 0 even where reads are clamped.
        if width.is_power_of_two() && width > 1 {
            indices[0] = (1u64 << 32 >> width.trailing_zeros()) as u32;
        }
        let row = |id: &u32| values.chunks_exact(width).nth(*id as usize).map_or(vec![0; width], to_bits);
        let expected: Vec<u32> = indices.iter().flat_map(row).collect();
        cases.run(format!("{count} of {table}x{width}"), |run| {
            let (indices, values) = (run.ids("indices", &indices)?, run.input("table", &values, [table, width])?);
            let y = kernels::gather::gather(indices.tensor(), &values, width)?;
            run.bits("y", &y, &expected)
        })?;
    }
    Ok(())
}

pub(super) fn scatter(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(4);
    for (count, table, width, skipped) in [
        (1, 1, 1, None),
        (9, 3, 7, None),
        (200, 5, 9, Some(2)),
        (65, 70, 1, Some(0)),
        (300, 64, 65, Some(u32::MAX - 1)),
        (6000, 4100, 1600, Some(7)),
    ] {
        let (before, dy) = (normal(&mut rng, table * width), normal(&mut rng, count * width));
        // Repeated ids and some past the table.
        let ids: Vec<u32> = (0..count).map(|_| rng.below(table + table.div_ceil(4)) as u32).collect();
        let counts = |id: &u32| (*id as usize) < table && Some(*id) != skipped;
        let kept = ids.iter().zip(dy.chunks_exact(width)).filter(|(id, _)| counts(id));
        let (kept_ids, kept_dy): (Vec<u32>, Vec<&[f32]>) = kept.unzip();
        let mut expected = oracle::embedding_backward(&kept_ids, &wide(&kept_dy.concat()), table, width);
        let untouched = |id: usize| !kept_ids.contains(&(id as u32));
        let same: Vec<bool> = (0..table).map(untouched).collect();
        expected.iter_mut().zip(&before).for_each(|(sum, before)| *sum += f64::from(*before));
        cases.run(format!("{count} into {table}x{width}, skipped {skipped:?}"), |run| {
            let (ids, dy) = (run.ids("ids", &ids)?, run.input("dy", &dy, [count, width])?);
            let dtable = Tensor::from_slice(run.device, &before, [table, width])?;
            kernels::gather::scatter(&ids.positions()?, &dy, &dtable, width, skipped)?;
            run.near("dtable", &dtable, &expected, TIGHT)?;
            let rows = |words: &[u32]| -> Vec<u32> {
                words.chunks_exact(width).zip(&same).filter(|(_, same)| **same).flat_map(|(row, _)| row).copied().collect()
            };
            let after: Vec<u32> = dtable.read_back()?;
            run.comparisons.push(Comparison::bits("rows without ids", &rows(&after), &rows(&to_bits(&before))));
            Ok(())
        })?;
    }
    Ok(())
}
