//! Every kernel family against the f64 oracle: a function a family, with its table of cases.
//!
//! A case runs twice on a poisoned device, where new memory is NaN: outputs are compared with the oracle, the bits of both
//! runs with each other, and inputs afterwards with what they were. Windows lie in larger tensors of NaN words, which
//! a kernel must neither use nor touch.

mod pooling;

use super::oracle::{self, Cell, Recurrent, RecurrentInput};
use super::{Comparison, Report};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::cell_lstm::LstmCell;
use crate::kernels::cross_entropy::Counted;
use crate::kernels::gemm::Matrix;
use crate::kernels::math_probe::FUNCTIONS;
use crate::kernels::optimizer::{Arena, CONTROL_WORDS, Control, Optimizer};
use crate::kernels::sweep_step::{self, Buffers, Plan};
use crate::kernels::{self, math_probe};
use crate::nn::{Direction, Input, Lstm, LstmConfig, LstmState, Module};
use crate::rng::{MaskKey, Rng, philox, unit};
use crate::tensor::{Ids, Lengths, POISON, Tensor};

/// Largest errors relative to a tensor's largest magnitude: of outputs, of gradients, and where few operations round.
const OUTPUT: f64 = 1e-5;
const GRADIENT: f64 = 5e-5;
const TIGHT: f64 = 2e-6;

/// More elements than one launch has lanes: 65535 workgroups of 64.
const MANY: usize = 65_535 * 64 + 1;

/// The cases of one kernel family.
#[derive(Clone, Copy, Debug)]
pub struct KernelCheck {
    /// The family: `gemm`, `lstm_sweep`.
    pub name: &'static str,
    cases: Family,
}

type Family = fn(&mut Cases<'_>) -> Result<()>;

impl KernelCheck {
    /// Runs all cases on `device`, one report each. From then on new tensors of this device start as NaN.
    ///
    /// # Errors
    /// What the device reports.
    pub fn run(&self, device: &Device) -> Result<Vec<Report>> {
        device.poison();
        let mut cases = Cases { device, reports: Vec::new() };
        (self.cases)(&mut cases)?;
        Ok(cases.reports)
    }
}

/// Every kernel family, then LSTM layers as a whole.
pub fn all() -> Vec<KernelCheck> {
    let families: [(_, Family); 18] = [
        ("math", math),
        ("gemm", gemm),
        ("transpose", transpose),
        ("gather", gather),
        ("scatter", scatter),
        ("column_sum", column_sum),
        ("reduce", reduce),
        ("cross_entropy", cross_entropy),
        ("mean_squared_error", mean_squared_error),
        ("sgd", sgd),
        ("adamw", adamw),
        ("dropout", dropout),
        ("pooling", pooling::pooling),
        ("elementwise", pooling::elementwise),
        ("columns", pooling::columns),
        ("lstm_sweep", lstm_sweep),
        ("lstm_layers", lstm_layers),
        ("lstm_properties", lstm_properties),
    ];
    families.map(|(name, cases)| KernelCheck { name, cases }).to_vec()
}

// ---- the harness ----

struct Cases<'a> {
    device: &'a Device,
    reports: Vec<Report>,
}

impl Cases<'_> {
    /// Runs `case` twice and reports what it compared, whether both runs gave the same bits, and whether inputs changed.
    fn run(&mut self, name: impl Into<String>, case: impl Fn(&mut Run<'_>) -> Result<()>) -> Result<()> {
        let once = || -> Result<Run<'_>> {
            let mut run = Run { device: self.device, inputs: Vec::new(), comparisons: Vec::new(), words: Vec::new() };
            case(&mut run)?;
            for (name, tensor, before) in std::mem::take(&mut run.inputs) {
                run.comparisons.push(Comparison::bits(format!("{name}, an input"), &tensor.read_back()?, &before));
            }
            Ok(run)
        };
        let (first, second) = (once()?, once()?);
        let mut comparisons = first.comparisons;
        comparisons.push(Comparison::bits("bits of a second run", &second.words, &first.words));
        self.reports.push(Report::new(name, comparisons));
        Ok(())
    }
}

/// One run of a case.
struct Run<'a> {
    device: &'a Device,
    /// Name, tensor, and its words before the run.
    inputs: Vec<(&'static str, Tensor, Vec<u32>)>,
    comparisons: Vec<Comparison>,
    /// All outputs, one after another.
    words: Vec<u32>,
}

impl Run<'_> {
    /// A tensor that the kernel must leave as it is.
    fn input(&mut self, name: &'static str, values: &[f32], shape: impl Into<Vec<usize>>) -> Result<Tensor> {
        let tensor = Tensor::from_slice(self.device, values, shape)?;
        self.inputs.push((name, tensor.clone(), to_bits(values)));
        Ok(tensor)
    }

    /// The same for the words of ids or lengths, which are on the device already.
    fn input_words(&mut self, name: &'static str, tensor: &Tensor, words: &[u32]) {
        self.inputs.push((name, tensor.clone(), words.to_vec()));
    }

    fn ids(&mut self, name: &'static str, ids: &[u32]) -> Result<Ids> {
        let device = Ids::from_slice(self.device, ids, [ids.len()])?;
        self.input_words(name, device.tensor(), ids);
        Ok(device)
    }

    fn lengths(&mut self, lengths: Option<&[u32]>) -> Result<Option<Lengths>> {
        let Some(lengths) = lengths else { return Ok(None) };
        let device = Lengths::from_slice(self.device, lengths)?;
        self.input_words("lengths", device.tensor(), lengths);
        Ok(Some(device))
    }

    /// The words of an output, remembered for the comparison of both runs.
    fn read(&mut self, tensor: &Tensor) -> Result<Vec<u32>> {
        let words = tensor.read_back()?;
        self.words.extend_from_slice(&words);
        Ok(words)
    }

    fn near(&mut self, name: &str, tensor: &Tensor, expected: &[f64], bound: f64) -> Result<()> {
        self.near_where(name, tensor, expected, bound, |_| true)
    }

    /// As `near`, but only for the elements that `defined` picks: the contract leaves the others open.
    fn near_where(
        &mut self,
        name: &str,
        tensor: &Tensor,
        expected: &[f64],
        bound: f64,
        defined: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let words: Vec<u32> = tensor.read_back()?;
        let pick = |at: &usize| defined(*at);
        let computed: Vec<f32> = (0..words.len()).filter(pick).map(|at| f32::from_bits(words[at])).collect();
        let expected: Vec<f64> = (0..expected.len()).filter(pick).map(|at| expected[at]).collect();
        self.words.extend(computed.iter().map(|value| value.to_bits()));
        self.comparisons.push(Comparison::new(name, &computed, &expected, bound));
        Ok(())
    }

    fn bits(&mut self, name: &str, tensor: &Tensor, expected: &[u32]) -> Result<()> {
        let words = self.read(tensor)?;
        self.comparisons.push(Comparison::bits(name, &words, expected));
        Ok(())
    }

    /// NaN stands exactly where `expected` says so; the error is the number of wrong places.
    fn nan(&mut self, name: &str, tensor: &Tensor, expected: impl Fn(usize) -> bool) -> Result<()> {
        let words = self.read(tensor)?;
        let wrong = words.iter().enumerate().filter(|(at, word)| is_nan(**word) != expected(*at)).count();
        self.comparisons.push(Comparison { tensor: format!("NaN in {name}"), error: wrong as f64, bound: 0.0 });
        Ok(())
    }

    /// A `[rows, cols]` matrix: a tensor of its own, or, when `loose`, part of a larger one of NaN; with `values` or NaN.
    fn window(&self, [rows, cols]: [usize; 2], loose: bool, values: Option<&[f32]>) -> Result<Window> {
        let (offset, row, after) = if loose { (5, cols + 3, 70) } else { (0, cols, 0) };
        let mut words = vec![POISON; offset + (rows - 1) * row + cols + after];
        for (r, values) in values.into_iter().flat_map(|values| values.chunks_exact(cols)).enumerate() {
            words[offset + r * row..][..cols].copy_from_slice(&to_bits(values));
        }
        let tensor = Tensor::upload("window", self.device, &words, vec![words.len()])?;
        Ok(Window { tensor, words, offset, rows, cols, row })
    }

    /// A window that the kernel must leave as it is.
    fn input_window(&mut self, name: &'static str, size: [usize; 2], loose: bool, values: &[f32]) -> Result<Window> {
        let window = self.window(size, loose, Some(values))?;
        self.input_words(name, &window.tensor, &window.words);
        Ok(window)
    }

    /// The window is near `expected`, and the words around it are what they were.
    fn near_window(&mut self, name: &str, window: &Window, expected: &[f64], bound: f64) -> Result<()> {
        let words = self.read(&window.tensor)?;
        let (mut inside, mut outside, mut guards) = (Vec::new(), Vec::new(), Vec::new());
        for (at, (word, before)) in words.iter().zip(&window.words).enumerate() {
            if window.holds(at) {
                inside.push(f32::from_bits(*word));
            } else {
                outside.push(*word);
                guards.push(*before);
            }
        }
        self.comparisons.push(Comparison::new(name, &inside, expected, bound));
        self.comparisons.push(Comparison::bits(format!("words around {name}"), &outside, &guards));
        Ok(())
    }
}

/// A matrix in a tensor, and the words that the tensor started with.
struct Window {
    tensor: Tensor,
    words: Vec<u32>,
    offset: usize,
    rows: usize,
    cols: usize,
    row: usize,
}

impl Window {
    fn matrix(&self) -> Matrix<'_> {
        Matrix::window(&self.tensor, self.offset, self.rows, self.cols, self.row)
    }

    fn holds(&self, at: usize) -> bool {
        at.checked_sub(self.offset).is_some_and(|at| at / self.row < self.rows && at % self.row < self.cols)
    }
}

fn is_nan(word: u32) -> bool {
    word & 0x7fff_ffff > 0x7f80_0000
}

fn to_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

fn normal(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal()).collect()
}

/// 100 or -100.
fn hundreds(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| if rng.below(2) == 0 { 100.0 } else { -100.0 }).collect()
}

/// Zeros of both signs, 100, -100 and denormal numbers among normal draws.
fn mixed(rng: &mut Rng, count: usize) -> Vec<f32> {
    let draw = |rng: &mut Rng| match rng.below(12) {
        0 => 0.0,
        1 => -0.0,
        2 => 100.0,
        3 => -100.0,
        4 => f32::from_bits(rng.bits() & 0x807f_ffff),
        _ => rng.normal(),
    };
    (0..count).map(|_| draw(rng)).collect()
}

/// Lengths in no order, with a row of no step and a row of all.
fn ragged(rng: &mut Rng, steps: usize, rows: usize) -> Vec<u32> {
    let mut lengths: Vec<u32> = (0..rows).map(|_| rng.below(steps + 1) as u32).collect();
    lengths[rows - 1] = steps as u32;
    if rows > 1 {
        lengths[rng.below(rows - 1)] = 0;
    }
    lengths
}

/// Whether line `t * rows + row` is a step of its row.
fn within(lengths: Option<&[u32]>, rows: usize, line: usize) -> bool {
    lengths.is_none_or(|lengths| line / rows < lengths[line % rows] as usize)
}

/// What a row holds past its end: it must not get into any result.
fn pad(values: &mut [f32], width: usize, lengths: Option<&[u32]>, rows: usize, with: f32) {
    for (line, values) in values.chunks_exact_mut(width).enumerate() {
        if !within(lengths, rows, line) {
            values.fill(with);
        }
    }
}

const NAN: f32 = f32::from_bits(POISON);

// ---- elementary functions ----

fn math(cases: &mut Cases<'_>) -> Result<()> {
    // A prime: every exponent and sign, and low bits of every kind. It makes more numbers than one launch has lanes.
    const STRIDE: usize = 1021;
    let mut x: Vec<f32> = (0..=u32::MAX).step_by(STRIDE).map(f32::from_bits).collect();
    assert!(x.len() > MANY);
    let inf = f32::INFINITY;
    x.extend([100.0, -100.0, inf, -inf, -0.0, 1e-40, -1e-40, 88.722_83, 88.722_84, -87.336_54, -87.336_55, 9.02, 0.625, 1.0]);
    x.extend([0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, u32::MAX].map(f32::from_bits));
    // Division rounds correctly on the CPU; WGSL allows it 2.5 ULP.
    let bounds = if cases.device.is_cpu() { [1.5, 1.5, 2.5, 2.5] } else { [2.5, 2.5, 3.0, 4.5] };
    let exact: [&[(f32, f32)]; 4] = [
        &[(0.0, 1.0), (-0.0, 1.0), (inf, inf), (-inf, 0.0), (-200.0, 0.0), (200.0, inf)],
        &[(0.0, -inf), (-0.0, -inf), (1.0, 0.0), (inf, inf)],
        &[(0.0, 0.0), (-0.0, -0.0), (100.0, 1.0), (-100.0, -1.0), (inf, 1.0), (-inf, -1.0)],
        &[(0.0, 0.5), (-0.0, 0.5), (100.0, 1.0), (-100.0, 0.0), (inf, 1.0), (-inf, 0.0)],
    ];
    for (index, function) in FUNCTIONS.iter().enumerate() {
        let expected: Vec<f64> = x.iter().map(|x| (function.exact)(f64::from(*x))).collect();
        cases.run(function.name, |run| {
            let y = math_probe::probe(index, &run.input("x", &x, [x.len()])?)?;
            let y = run.read(&y)?;
            let mut worst = 0.0;
            for (got, want) in y.iter().zip(&expected) {
                let error = ulps(*got, *want);
                if !(error <= worst) {
                    worst = error;
                }
            }
            run.comparisons.push(Comparison { tensor: "ULP".into(), error: worst, bound: bounds[index] });
            let (from, to): (Vec<f32>, Vec<f32>) = exact[index].iter().copied().unzip();
            let y = math_probe::probe(index, &Tensor::from_slice(run.device, &from, [from.len()])?)?;
            run.bits("exact values", &y, &to_bits(&to))
        })?;
    }
    Ok(())
}

/// The distance of a result's bits from the true value in units in the last place, no smaller than those of normal numbers.
/// A result that is no normal number may be 0.
fn ulps(got: u32, want: f64) -> f64 {
    let smallest = f64::from(f32::MIN_POSITIVE);
    if want.is_nan() {
        return if is_nan(got) { 0.0 } else { f64::INFINITY };
    }
    let got = f32::from_bits(got);
    if (want as f32).is_infinite() || (want.abs() < smallest && got == 0.0) {
        return if got == 0.0 || got == want as f32 { 0.0 } else { f64::INFINITY };
    }
    (f64::from(got) - want).abs() / (want.abs().max(smallest).log2().floor() - 23.0).exp2()
}

// ---- products and copies ----

/// `C [m, n] = A [m, k] . B [k, n]` and what comes with it.
#[derive(Clone, Copy)]
struct Product {
    size: [usize; 3],
    /// Whether A and B are stored transposed.
    transposed: [bool; 2],
    bias: bool,
    accumulate: bool,
    loose: bool,
}

impl Product {
    fn name(&self) -> String {
        let [m, n, k] = self.size;
        let mut name = format!("{m}x{n}x{k}");
        let [a_t, b_t] = self.transposed;
        for (given, part) in [(a_t, "A^T"), (b_t, "B^T"), (self.bias, "bias"), (self.accumulate, "+C"), (self.loose, "windows")] {
            if given {
                name += &format!(" {part}");
            }
        }
        name
    }

    /// Launches on the given values; the window of C.
    fn launch(&self, run: &mut Run<'_>, a: &[f32], b: &[f32], bias: Option<&[f32]>, c: Option<&[f32]>) -> Result<Window> {
        let [m, n, k] = self.size;
        let [a_t, b_t] = self.transposed;
        let a = run.input_window("a", if a_t { [k, m] } else { [m, k] }, self.loose, a)?;
        let b = run.input_window("b", if b_t { [n, k] } else { [k, n] }, self.loose, b)?;
        let bias = bias.map(|bias| run.input("bias", bias, [n])).transpose()?;
        let c = run.window([m, n], self.loose, c)?;
        let (a, b) = (a.matrix(), b.matrix());
        let (a, b) = (if a_t { a.t() } else { a }, if b_t { b.t() } else { b });
        kernels::gemm::gemm(a, b, bias.as_ref(), c.matrix(), self.accumulate)?;
        Ok(c)
    }
}

fn gemm(cases: &mut Cases<'_>) -> Result<()> {
    let plain = Product { size: [1, 1, 1], transposed: [false; 2], bias: false, accumulate: false, loose: false };
    let mut products = Vec::new();
    // Tiles: 8 rows, 4 columns a lane, 64 lanes. k around vector widths.
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
    ]; // [m, n, k]
    for (i, size) in sizes.into_iter().enumerate() {
        for (j, [a, b]) in [[false, false], [false, true], [true, false], [true, true]].into_iter().enumerate() {
            let kind = i + j;
            let (bias, accumulate, loose) = (kind % 2 == 1, kind % 4 > 1, kind % 8 > 3);
            products.push(Product { size, transposed: [a, b], bias, accumulate, loose });
        }
    }
    // Every option with every other, with rows and columns left over, below and above the tile's rows.
    for m in [5, 9] {
        for bits in 0..32 {
            let [a, b, bias, accumulate, loose] = [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
            products.push(Product { size: [m, 66, 17], transposed: [a, b], bias, accumulate, loose });
        }
    }
    // More tiles of rows than one dimension of workgroups has.
    products.push(Product { size: [65_535 * 8 + 9, 1, 1], loose: true, ..plain });

    let mut rng = Rng::seed(1);
    for (i, product) in products.into_iter().enumerate() {
        let [m, n, k] = product.size;
        // Large numbers hide errors in the others: only some cases have them.
        let draw = if i % 3 == 0 { mixed } else { normal };
        let (a, b) = (draw(&mut rng, m * k), draw(&mut rng, k * n));
        let bias = product.bias.then(|| normal(&mut rng, n));
        let c = product.accumulate.then(|| normal(&mut rng, m * n));
        let [a_t, b_t] = product.transposed;
        let mut expected = oracle::matmul(&wide(&a), &wide(&b), m, n, k, a_t, b_t);
        for (at, value) in expected.iter_mut().enumerate() {
            *value += bias.as_ref().map_or(0.0, |bias| bias[at % n].into()) + c.as_ref().map_or(0.0, |c| c[at].into());
        }
        cases.run(product.name(), |run| {
            let c = product.launch(run, &a, &b, bias.as_deref(), c.as_deref())?;
            run.near_window("c", &c, &expected, TIGHT)
        })?;
    }

    // One NaN in A, B, bias or C reaches its row, its column, its column, its place.
    let (m, n, k) = (9, 70, 5);
    for transposed in [[false, false], [true, true]] {
        for part in 0..4 {
            let product = Product { size: [m, n, k], transposed, bias: true, accumulate: true, loose: false };
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
            cases.run(format!("NaN in {}", ["A", "B", "bias", "C"][part]), |run| {
                let c = product.launch(run, &a, &b, Some(&bias), Some(&c))?;
                run.nan("c", &c.tensor, |at| match part {
                    0 => at / n == row,
                    1 | 2 => at % n == column,
                    _ => at == row * n + column,
                })
            })?;
        }
    }
    Ok(())
}

fn transpose(cases: &mut Cases<'_>) -> Result<()> {
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

fn gather(cases: &mut Cases<'_>) -> Result<()> {
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
        let row = |id: &u32| values.get(*id as usize * width..(*id as usize + 1) * width).map_or(vec![0; width], to_bits);
        let expected: Vec<u32> = indices.iter().flat_map(row).collect();
        cases.run(format!("{count} of {table}x{width}"), |run| {
            let (indices, values) = (run.ids("indices", &indices)?, run.input("table", &values, [table, width])?);
            let y = kernels::gather::gather(indices.tensor(), &values, width)?;
            run.bits("y", &y, &expected)
        })?;
    }
    Ok(())
}

fn scatter(cases: &mut Cases<'_>) -> Result<()> {
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

// ---- sums ----

fn column_sum(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(5);
    for [rows, columns] in [[1, 1], [2, 3], [5, 63], [4, 64], [3, 65], [1000, 129], [1, MANY]] {
        for loose in [false, true] {
            let (x, before) = (if loose { mixed } else { normal }(&mut rng, rows * columns), normal(&mut rng, columns));
            let mut expected = wide(&before);
            x.chunks_exact(columns).for_each(|row| expected.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x)));
            cases.run(format!("{rows}x{columns}{}", if loose { " windows" } else { "" }), |run| {
                let x = run.input_window("x", [rows, columns], loose, &x)?;
                let sums = run.window([1, columns], loose, Some(&before))?;
                kernels::column_sum::column_sum(x.matrix(), sums.offset, &sums.tensor)?;
                run.near_window("sums", &sums, &expected, TIGHT)
            })?;
        }
    }
    let (rows, columns) = (5, 70);
    let mut x = normal(&mut rng, rows * columns);
    x[3 * columns + 66] = NAN;
    cases.run("NaN in x", |run| {
        let x = run.input_window("x", [rows, columns], false, &x)?;
        let sums = Tensor::zeros(run.device, [columns])?;
        kernels::column_sum::column_sum(x.matrix(), 0, &sums)?;
        run.nan("sums", &sums, |at| at == 66)
    })
}

fn reduce(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(6);
    // 256 lanes, blocks of 4096, at most 1024 blocks.
    for count in [1, 2, 255, 256, 257, 4095, 4096, 4097, 8193, 100_000, 4096 * 1024 + 1] {
        // Mostly of one sign: a sum that cancels says nothing of the error.
        let x: Vec<f32> = mixed(&mut rng, count).into_iter().map(|x| if x.abs() < 50.0 { x + 1.0 } else { x.abs() }).collect();
        let sum: f64 = x.iter().map(|x| f64::from(*x)).sum();
        let squares = oracle::global_norm(&[&wide(&x)]).powi(2);
        cases.run(count.to_string(), |run| {
            let x = run.input("x", &x, [count])?;
            run.near("sum", &kernels::reduce::sum(&x, 0.25)?, &[0.25 * sum], 2.0 * TIGHT)?;
            run.near("sum of squares", &kernels::reduce::sum_of_squares(&x)?, &[squares], 2.0 * TIGHT)
        })?;
    }
    for (count, at) in [(1, 0), (4097, 4096), (9000, 5000)] {
        let mut x = normal(&mut rng, count);
        x[at] = NAN;
        cases.run(format!("NaN at {at} of {count}"), |run| {
            let x = run.input("x", &x, [count])?;
            run.nan("sum", &kernels::reduce::sum(&x, 1.0)?, |_| true)?;
            run.nan("sum of squares", &kernels::reduce::sum_of_squares(&x)?, |_| true)
        })?;
    }
    Ok(())
}

// ---- losses ----

fn cross_entropy(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(7);
    type Draw = fn(&mut Rng, usize) -> Vec<f32>;
    let table: [(usize, usize, usize, Option<u32>, bool, Draw); 14] = [
        (1, 1, 1, None, false, normal),
        (3, 2, 1, Some(7), true, mixed),
        (1, 5, 2, None, false, normal),
        (4, 3, 63, None, true, mixed),
        (4, 3, 64, Some(0), true, normal),
        (4, 3, 65, Some(3), false, mixed),
        (2, 3, 128, None, false, hundreds),
        (2, 3, 129, None, true, hundreds),
        (1, 7, 2, Some(1), false, hundreds),
        (5, 4, 3, Some(2), true, |_, count| vec![0.0; count]),
        (2, 2, 9, None, false, |rng, count| normal(rng, count).into_iter().map(|z| z + 1e4).collect()),
        (2, 2, 1000, Some(9999), true, normal),
        (1, 3, 70, None, false, |rng, count| normal(rng, count).into_iter().map(|z| 1e-40 * z).collect()),
        // More rows than workgroups.
        (40_000, 2, 3, Some(1), true, normal),
    ];
    for (steps, batch, classes, ignored, is_ragged, draw) in table {
        let rows = steps * batch;
        let mut z = draw(&mut rng, rows * classes);
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, batch));
        let mut targets: Vec<u32> = (0..rows).map(|_| rng.below(classes) as u32).collect();
        if let Some(ignored) = ignored.filter(|_| rows > 1) {
            targets[rows / 2] = ignored;
        }
        // For the oracle, rows that do not count have a target of their own; here their logits are NaN.
        let counts = |row: usize| Some(targets[row]) != ignored && within(lengths.as_deref(), batch, row);
        let oracle_targets: Vec<u32> = (0..rows).map(|row| if counts(row) { targets[row] } else { u32::MAX }).collect();
        (0..rows).filter(|row| !counts(*row)).for_each(|row| z[row * classes..][..classes].fill(NAN));
        let counted = oracle_targets.iter().filter(|target| **target != u32::MAX).count();
        let (loss, dz) = oracle::cross_entropy(&wide(&z), classes, &oracle_targets, Some(u32::MAX));
        let term = |row: usize| oracle::cross_entropy(&wide(&z[row * classes..][..classes]), classes, &[targets[row]], None).0;
        let terms: Vec<f64> = (0..rows).map(|row| if counts(row) { term(row) } else { 0.0 }).collect();
        let name = format!("{steps}x{batch}x{classes}, ignored {ignored:?}{}", if is_ragged { ", ragged" } else { "" });
        cases.run(name, |run| {
            let (z, ids) = (run.input("z", &z, [rows, classes])?, run.ids("targets", &targets)?);
            let lengths = run.lengths(lengths.as_deref())?;
            let counted = Counted { batch, lengths: lengths.as_ref(), scale: 1.0 / counted.max(1) as f32 };
            let launch = |gradient| kernels::cross_entropy::cross_entropy(&z, ids.tensor(), ignored, counted, gradient);
            let (computed, gradient) = launch(true)?;
            run.near("terms", &computed, &terms, OUTPUT)?;
            run.near(
                "loss",
                &kernels::reduce::sum(&computed, counted.scale)?,
                &[if loss.is_nan() { 0.0 } else { loss }],
                OUTPUT,
            )?;
            if let Some(gradient) = &gradient {
                run.near("dz", gradient, &dz, OUTPUT)?;
            }
            let (computed, none) = launch(false)?;
            run.near("terms without dz", &computed, &terms, OUTPUT)?;
            let gradients = f64::from(u8::from(gradient.is_some())) - 1.0 + f64::from(u8::from(none.is_some()));
            run.comparisons.push(Comparison { tensor: "gradients asked for".into(), error: gradients.abs(), bound: 0.0 });
            Ok(())
        })?;
    }
    // A NaN anywhere in a row, at its first, wanted, or last class, makes the whole row's results NaN, and no other's.
    let (rows, classes) = (5, 70);
    for (row, class) in [(0, 0), (2, 30), (4, 69), (3, 64)] {
        let mut z = normal(&mut rng, rows * classes);
        z[row * classes + class] = NAN;
        cases.run(format!("NaN at {row}, {class}"), |run| {
            let (z, ids) = (run.input("z", &z, [rows, classes])?, run.ids("targets", &[30; 5])?);
            let counted = Counted { batch: rows, lengths: None, scale: 0.2 };
            let (terms, dz) = kernels::cross_entropy::cross_entropy(&z, ids.tensor(), None, counted, true)?;
            run.nan("terms", &terms, |at| at == row)?;
            dz.iter().try_for_each(|dz| run.nan("dz", dz, |at| at / classes == row))
        })?;
    }
    Ok(())
}

fn mean_squared_error(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(8);
    for (steps, batch, width, is_ragged) in [
        (1, 1, 1, false),
        (7, 3, 3, true),
        (7, 9, 1, false),
        (4, 16, 1, true),
        (13, 5, 1, true),
        (3, 2, 65, true),
        (MANY, 1, 1, false),
    ] {
        let count = steps * batch * width;
        let (mut y, mut wanted) = (mixed(&mut rng, count), mixed(&mut rng, count));
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, batch));
        let counts: Vec<bool> = (0..count).map(|at| within(lengths.as_deref(), batch, at / width)).collect();
        pad(&mut y, width, lengths.as_deref(), batch, NAN);
        pad(&mut wanted, width, lengths.as_deref(), batch, NAN);
        let (loss, dy) = oracle::mean_squared_error(&wide(&y), &wide(&wanted), &counts);
        let term = |at: usize| if counts[at] { (f64::from(y[at]) - f64::from(wanted[at])).powi(2) } else { 0.0 };
        let terms: Vec<f64> = (0..count).map(term).collect();
        let scale = 1.0 / counts.iter().filter(|counts| **counts).count() as f32;
        cases.run(format!("{steps}x{batch}x{width}{}", if is_ragged { ", ragged" } else { "" }), |run| {
            let (y, wanted) = (run.input("y", &y, [count])?, run.input("wanted", &wanted, [count])?);
            let lengths = run.lengths(lengths.as_deref())?;
            let counted = Counted { batch, lengths: lengths.as_ref(), scale };
            let (computed, gradient) = kernels::mean_squared_error::mean_squared_error(&y, &wanted, width, counted)?;
            run.near("terms", &computed, &terms, TIGHT)?;
            run.near("dy", &gradient, &dy, TIGHT)?;
            run.near("loss", &kernels::reduce::sum(&computed, scale)?, &[loss], OUTPUT)
        })?;
    }
    let mut values = [normal(&mut rng, 70), normal(&mut rng, 70)];
    (values[0][3], values[1][68]) = (NAN, NAN);
    cases.run("NaN in both", |run| {
        let (y, wanted) = (run.input("y", &values[0], [70])?, run.input("wanted", &values[1], [70])?);
        let counted = Counted { batch: 7, lengths: None, scale: 1.0 };
        let (terms, dy) = kernels::mean_squared_error::mean_squared_error(&y, &wanted, 1, counted)?;
        run.nan("terms", &terms, |at| at == 3 || at == 68)?;
        run.nan("dy", &dy, |at| at == 3 || at == 68)
    })
}

// ---- optimizers ----

fn sgd(cases: &mut Cases<'_>) -> Result<()> {
    optimizer(cases, false)
}

fn adamw(cases: &mut Cases<'_>) -> Result<()> {
    optimizer(cases, true)
}

/// Six steps in a row, of which the third has a gradient that is not finite: nothing changes but the count.
fn optimizer(cases: &mut Cases<'_>, adam: bool) -> Result<()> {
    let mut rng = Rng::seed(9);
    for (count, max_norm, bad, momentum, decay) in [
        (1, 0.0, NAN, 0.0, 0.0),
        (63, 0.0, f32::INFINITY, 0.9, 0.0),
        (64, 1.0, NAN, 0.5, 0.01),
        (65, 0.5, f32::NEG_INFINITY, 0.9, 0.1),
        // Finite, but its square is not.
        (5000, 1e6, 1e30, 0.9, 0.01),
        (5001, 2.0, NAN, 0.0, 0.0),
        (MANY, 1.0, NAN, 0.9, 0.01),
    ] {
        let (beta1, beta2) = (0.9, 0.999);
        let params = Optimizer {
            count: count as u32,
            learning_rate: 0.01,
            weight_decay: decay,
            max_norm,
            momentum: if adam { 0.0 } else { momentum },
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            epsilon: 1e-8,
        };
        let steps = if count == MANY { 2 } else { 6 };
        let start = normal(&mut rng, count);
        let gradients: Vec<Vec<f32>> = (0..steps)
            .map(|step| {
                // The last ones are small: where there is a norm to clip to, some are clipped and some are not.
                let size = if step < 4 { 1.0 } else { 1e-3 };
                let mut gradient: Vec<f32> = normal(&mut rng, count).into_iter().map(|g| size * g).collect();
                if step == 2 {
                    gradient[count - 1] = bad;
                }
                gradient
            })
            .collect();
        let [lr, weight_decay] = [params.learning_rate, params.weight_decay].map(f64::from);
        let by_sgd = oracle::Sgd { lr, momentum: params.momentum.into(), weight_decay };
        let by_adamw = oracle::AdamW { lr, beta1, beta2, epsilon: params.epsilon.into(), weight_decay };
        cases.run(format!("{count}, clipped to {max_norm}, skipped at {bad}"), |run| {
            let zeros = || Tensor::zeros(run.device, [count]);
            let (value, first, gradient) = (Tensor::from_slice(run.device, &start, [count])?, zeros()?, zeros()?);
            let second = if adam { Some(zeros()?) } else { None };
            let control = Tensor::zeros(run.device, [CONTROL_WORDS])?;
            let (mut w, mut m, mut v) = (wide(&start), vec![0.0; count], vec![0.0; count]);
            let (mut applied, mut skipped, mut clipped) = (0, 0, 0);
            for (step, given) in gradients.iter().enumerate() {
                gradient.write(given)?;
                let state = |tensors: [Option<&Tensor>; 3]| -> Result<Vec<u32>> {
                    let parts: Result<Vec<Vec<u32>>> = tensors.into_iter().flatten().map(Tensor::read_back).collect();
                    Ok(parts?.concat())
                };
                let tensors = [Some(&value), Some(&first), second.as_ref()];
                let before = state(tensors)?;
                let arena =
                    Arena { control: &control, value: &value, gradient: &gradient, first: &first, second: second.as_ref() };
                kernels::optimizer::step(&params, &arena)?;
                run.bits(&format!("gradient after step {step}"), &gradient, &vec![0; count])?;
                let words = run.read(&control)?;
                let now: Control = *bytemuck::from_bytes(bytemuck::cast_slice(&words));
                let norm = oracle::global_norm(&[&wide(given)]);
                let finite = norm.is_finite() && norm < 1e19;
                if finite {
                    let factor = if max_norm > 0.0 { oracle::clip_factor(norm, max_norm.into()) } else { 1.0 };
                    applied += 1;
                    clipped += u32::from(factor < 1.0);
                    let g: Vec<f64> = given.iter().map(|g| f64::from(*g) * factor).collect();
                    match adam {
                        true => by_adamw.step(&mut w, &g, &mut m, &mut v, applied as i32),
                        false => by_sgd.step(&mut w, &g, &mut m),
                    }
                    let numbers = [now.norm, now.scale];
                    run.comparisons.push(Comparison::new(format!("norm {step}"), &numbers[..1], &[norm], OUTPUT));
                    run.comparisons.push(Comparison::new(format!("scale {step}"), &numbers[1..], &[factor], OUTPUT));
                } else {
                    skipped += 1;
                    run.comparisons.push(Comparison::bits("all but the count, skipped", &state(tensors)?, &before));
                }
                let counts = [now.skip, now.steps, now.skipped, now.clipped];
                let expected = [u32::from(!finite), applied, skipped, clipped];
                run.comparisons.push(Comparison::bits(format!("counts {step}"), &counts, &expected));
                run.near(&format!("value {step}"), &value, &w, TIGHT)?;
                run.near(&format!("first {step}"), &first, &m, OUTPUT)?;
                if let Some(second) = &second {
                    run.near(&format!("second {step}"), second, &v, OUTPUT)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

// ---- dropout ----

/// What multiplies the element at `[t, row, unit]` of a tensor `[steps, rows, width]`, for all of them.
fn mask(steps: usize, rows: usize, width: usize, p: f32, key: MaskKey) -> Vec<f32> {
    let kept = |at: usize| {
        let [u, row, t] = [at % width, at / width % rows, at / width / rows].map(|n| n as u32);
        unit(philox(key.words(), [u, row, t, 0])[0]) >= p
    };
    (0..steps * rows * width).map(|at| if kept(at) { 1.0 / (1.0 - p) } else { 0.0 }).collect()
}

fn dropout(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(10);
    for (steps, rows, width, p) in
        [(1, 1, 1, 0.5), (3, 7, 3, 0.0), (5, 4, 16, 0.1), (13, 5, 1, 0.5), (6, 4, 65, 0.9), (3, 2, MANY / 6 + 1, 0.25)]
    {
        let key = MaskKey::new(11, steps as u64);
        // In one case the first draw is exactly p, and is kept.
        let p = if width == 65 { unit(philox(key.words(), [0; 4])[0]) } else { p };
        let mask = mask(steps, rows, width, p, key);
        let masked = |x: &[f32]| -> Vec<u32> {
            // Not a product with the mask: that would turn -1 into -0.
            x.iter().zip(&mask).map(|(x, mask)| if *mask == 0.0 { 0 } else { (x * mask).to_bits() }).collect()
        };
        let (x, dy) = (normal(&mut rng, mask.len()), normal(&mut rng, mask.len()));
        let (y, dx) = (masked(&x), masked(&dy));
        cases.run(format!("{steps}x{rows}x{width}, p {p}"), |run| {
            let (x, dy) = (run.input("x", &x, [steps, rows, width])?, run.input("dy", &dy, [steps, rows, width])?);
            run.bits("y", &kernels::dropout::dropout(&x, rows, width, p, key)?, &y)?;
            run.bits("dx", &kernels::dropout::dropout(&dy, rows, width, p, key)?, &dx)?;
            // Five standard deviations.
            let (zeros, n) = (mask.iter().filter(|mask| **mask == 0.0).count() as f64, mask.len() as f64);
            let p = f64::from(p);
            let error = if n > 1.0 { (zeros / n - p).abs() } else { 0.0 };
            run.comparisons.push(Comparison { tensor: "rate".into(), error, bound: 5.0 * (p * (1.0 - p) / n).sqrt() });
            Ok(())
        })?;
    }
    // More rows and steps change no mask of those that were there.
    let (steps, rows, width, key) = (4, 3, 37, MaskKey::new(1, 2));
    cases.run("a padded batch", |run| {
        let ones =
            |steps: usize, rows: usize| Tensor::from_slice(run.device, &vec![1.0; steps * rows * width], [steps, rows, width]);
        let small: Vec<u32> = kernels::dropout::dropout(&ones(steps, rows)?, rows, width, 0.5, key)?.read_back()?;
        let large: Vec<u32> = kernels::dropout::dropout(&ones(steps + 2, rows + 4)?, rows + 4, width, 0.5, key)?.read_back()?;
        let part: Vec<u32> = (0..steps).flat_map(|t| &large[t * (rows + 4) * width..][..rows * width]).copied().collect();
        run.comparisons.push(Comparison::bits("masks", &part, &small));
        let other: Vec<u32> = kernels::dropout::dropout(&ones(steps, rows)?, rows, width, 0.5, key.layer(1))?.read_back()?;
        let differ = f64::from(u8::from(other == small));
        run.comparisons.push(Comparison { tensor: "another key, the same mask".into(), error: differ, bound: 0.0 });
        Ok(())
    })
}

// ---- the recurrent sweep ----

/// One direction of one layer, `[T, B, .., H]`.
#[derive(Clone)]
struct Sweep {
    steps: usize,
    rows: usize,
    hidden: usize,
    reverse: bool,
    lengths: Option<Vec<u32>>,
    /// Input parts `[T, B, 4, H]`, W_hh `[4H, H]`, b_hh `[4H]`, initial state `[2, B, H]`.
    x: Vec<f32>,
    weights: Vec<f32>,
    bias: Vec<f32>,
    initial: Vec<f32>,
    /// Gradients of y `[T, B, H]` and of the final state `[2, B, H]`.
    dy: Vec<f32>,
    dlast: Vec<f32>,
}

/// What the sweep kernels give.
struct Swept {
    y: Vec<f64>,
    states: Vec<f64>,
    saved: Vec<f64>,
    dslots: Vec<f64>,
    dstates: Vec<f64>,
}

impl Sweep {
    fn new(rng: &mut Rng, steps: usize, rows: usize, hidden: usize, reverse: bool, is_ragged: bool, size: f32) -> Self {
        let lengths = is_ragged.then(|| ragged(rng, steps, rows));
        let mut scaled = |count: usize, size: f32| -> Vec<f32> { (0..count).map(|_| size * rng.normal()).collect() };
        let mut x = scaled(steps * rows * 4 * hidden, size);
        let mut dy = scaled(steps * rows * hidden, 1.0);
        pad(&mut x, 4 * hidden, lengths.as_deref(), rows, NAN);
        pad(&mut dy, hidden, lengths.as_deref(), rows, NAN);
        // Large weights would amplify rounding from step to step, whoever does it; large inputs saturate gates as well.
        let weights = scaled(4 * hidden * hidden, size.min(1.0) / (hidden as f32).sqrt());
        let (bias, initial) = (scaled(4 * hidden, 0.5), scaled(2 * rows * hidden, 1.0));
        let dlast = scaled(2 * rows * hidden, 1.0);
        Self { steps, rows, hidden, reverse, lengths, x, weights, bias, initial, dy, dlast }
    }

    fn name(&self) -> String {
        let Self { steps, rows, hidden, reverse, lengths, .. } = self;
        let ragged = lengths.as_ref().map_or(String::new(), |lengths| format!(", lengths {lengths:?}"));
        format!("{steps}x{rows}x{hidden}{}{ragged}", if *reverse { ", reverse" } else { "" })
    }

    /// Steps as computed, with the slots of the state before and after.
    fn order(&self) -> Vec<(usize, usize, usize)> {
        match self.reverse {
            false => (0..self.steps).map(|t| (t, t, t + 1)).collect(),
            true => (0..self.steps).rev().map(|t| (t, t + 1, t)).collect(),
        }
    }

    /// The textbook: step by step, row by row, unit by unit.
    fn expected(&self) -> Swept {
        let (rows, hidden, depth) = (self.rows, self.hidden, self.steps + 1);
        let state_at = |s: usize, slot: usize, row: usize, unit: usize| ((s * depth + slot) * rows + row) * hidden + unit;
        let slot_at = |line: usize, gate: usize, unit: usize| (line * 4 + gate) * hidden + unit;
        let w = |gate: usize, to: usize, from: usize| f64::from(self.weights[(gate * hidden + to) * hidden + from]);
        let places = || (0..rows).flat_map(|row| (0..hidden).map(move |unit| (row, unit)));
        let mut states = vec![0.0; 2 * depth * rows * hidden];
        for s in 0..2 {
            for (row, unit) in places() {
                let first = if self.reverse { self.steps } else { 0 };
                states[state_at(s, first, row, unit)] = self.initial[(s * rows + row) * hidden + unit].into();
            }
        }
        let mut y = vec![0.0; self.dy.len()];
        let (mut r, mut saved, mut dslots) = (vec![0.0; self.x.len()], vec![0.0; self.x.len()], vec![0.0; self.x.len()]);
        let x_of = |line, unit| [0, 1, 2, 3].map(|gate| f64::from(self.x[slot_at(line, gate, unit)]));
        for (t, before, after) in self.order() {
            for (row, unit) in places() {
                let line = t * rows + row;
                let previous = [0, 1].map(|s| states[state_at(s, before, row, unit)]);
                let mut next = previous.to_vec();
                if within(self.lengths.as_deref(), rows, line) {
                    let x = x_of(line, unit);
                    let product = [0, 1, 2, 3].map(|gate| {
                        let h = (0..hidden).map(|k| w(gate, unit, k) * states[state_at(0, before, row, k)]);
                        h.sum::<f64>() + f64::from(self.bias[gate * hidden + unit])
                    });
                    for gate in 0..4 {
                        let sum = x[gate] + product[gate];
                        r[slot_at(line, gate, unit)] = product[gate];
                        saved[slot_at(line, gate, unit)] = if gate == 2 { sum.tanh() } else { oracle::sigmoid(sum) };
                    }
                    next = Cell::Lstm.forward(&x, &product, &previous);
                    y[line * hidden + unit] = next[0];
                }
                (0..2).for_each(|s| states[state_at(s, after, row, unit)] = next[s]);
            }
        }
        let mut d = wide(&self.dlast);
        let mut later: Option<usize> = None;
        for (t, before, _) in self.order().into_iter().rev() {
            for (row, unit) in places() {
                if let Some(later) = later {
                    let part = |gate| (0..hidden).map(move |to| (gate, to));
                    let terms =
                        (0..4).flat_map(part).map(|(gate, to)| dslots[slot_at(later * rows + row, gate, to)] * w(gate, to, unit));
                    d[row * hidden + unit] += terms.sum::<f64>();
                }
            }
            later = Some(t);
            for (row, unit) in places().filter(|(row, _)| within(self.lengths.as_deref(), rows, t * rows + row)) {
                let (line, [h, c]) = (t * rows + row, [0, 1].map(|s| (s * rows + row) * hidden + unit));
                d[h] += f64::from(self.dy[line * hidden + unit]);
                let product = [0, 1, 2, 3].map(|gate| r[slot_at(line, gate, unit)]);
                let previous = [0, 1].map(|s| states[state_at(s, before, row, unit)]);
                let gradients = Cell::Lstm.backward(&x_of(line, unit), &product, &previous, &[d[h], d[c]]);
                (0..4).for_each(|gate| dslots[slot_at(line, gate, unit)] = gradients.x[gate]);
                (d[h], d[c]) = (gradients.previous[0], gradients.previous[1]);
            }
        }
        Swept { y, states, saved, dslots, dstates: d }
    }

    /// The kernels on `run`'s device; `check` gets what forward made, and what backward made of it.
    fn launch(
        &self,
        run: &mut Run<'_>,
        depth: usize,
        check: impl FnOnce(&mut Run<'_>, &Launched<'_>) -> Result<()>,
    ) -> Result<()> {
        let Self { steps, rows, hidden, reverse, .. } = *self;
        let lengths = run.lengths(self.lengths.as_deref())?;
        let (y_stride, y_offset) = (hidden + 8, 5);
        let key = MaskKey::new(0, 0);
        let plan = Plan { steps, rows, hidden, reverse, lengths: lengths.as_ref(), y_stride, y_offset, key };
        let slots = Tensor::from_slice(run.device, &self.x, [steps, rows, 4, hidden])?;
        let block = rows * hidden;
        let states = Tensor::uninitialized(run.device, [2, depth, rows, hidden])?;
        for s in 0..2 {
            states.slice((s * depth + plan.ends(depth).0) * block, [block]).write(&self.initial[s * block..][..block])?;
        }
        let unit = run.input("unit", &self.bias, [4, hidden])?;
        let weights = run.input("weights", &self.weights, [4 * hidden, hidden])?;
        let turned: Vec<f32> =
            (0..4 * hidden * hidden).map(|at| self.weights[at % (4 * hidden) * hidden + at / (4 * hidden)]).collect();
        let forward_weights = run.input("weights", &turned, [hidden, 4 * hidden])?;
        let y = run.window_of_y(self, None)?;
        let buffers = Buffers { slots: &slots, states: &states, weights: &forward_weights, unit: &unit, y: &y.tensor };
        sweep_step::forward::<LstmCell>(&plan, &buffers)?;
        check(run, &Launched { plan, slots: &slots, states: &states, y: &y, weights: &weights, unit: &unit })
    }
}

/// The buffers after the forward sweep.
struct Launched<'a> {
    plan: Plan<'a>,
    slots: &'a Tensor,
    states: &'a Tensor,
    y: &'a Window,
    weights: &'a Tensor,
    unit: &'a Tensor,
}

impl Launched<'_> {
    /// Runs the backward sweep, which turns the slots into gradients; gives dstates.
    fn backward(&self, run: &mut Run<'_>, sweep: &Sweep) -> Result<Tensor> {
        let dy = run.window_of_y(sweep, Some(&sweep.dy))?;
        run.input_words("dy", &dy.tensor, &dy.words);
        run.input_words("states", self.states, &self.states.read_back::<u32>()?);
        let dstates = Tensor::from_slice(run.device, &sweep.dlast, [2, sweep.rows, sweep.hidden])?;
        let buffers = Buffers { slots: self.slots, states: self.states, weights: self.weights, unit: self.unit, y: &dy.tensor };
        sweep_step::backward::<LstmCell>(&self.plan, &buffers, &dstates)?;
        Ok(dstates)
    }
}

impl Run<'_> {
    /// `[T, B, H]` inside `[T, B, H + 8]`, from column 5 on; NaN elsewhere.
    fn window_of_y(&self, sweep: &Sweep, values: Option<&[f32]>) -> Result<Window> {
        let (lines, hidden) = (sweep.steps * sweep.rows, sweep.hidden);
        let mut words = vec![POISON; lines * (hidden + 8)];
        for (line, values) in values.into_iter().flat_map(|values| values.chunks_exact(hidden)).enumerate() {
            words[line * (hidden + 8) + 5..][..hidden].copy_from_slice(&to_bits(values));
        }
        let tensor = Tensor::upload("y", self.device, &words, vec![words.len()])?;
        Ok(Window { tensor, words, offset: 5, rows: lines, cols: hidden, row: hidden + 8 })
    }
}

fn lstm_sweep(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(12);
    let sizes = [
        [1, 1, 1],
        [1, 3, 5],
        [2, 4, 16],
        [5, 5, 3],
        [7, 1, 17],
        [3, 9, 63],
        [2, 2, 64],
        [3, 4, 65],
        [4, 6, 100],
        [2, 5, 130],
        [2, 3, 256],
        [2, 5, 257],
        [20, 3, 9],
    ]; // [T, B, H]; a tile has 4 rows and 64 units, in backward 256
    for (i, [steps, rows, hidden]) in sizes.into_iter().enumerate() {
        for (reverse, is_ragged) in [(false, false), (true, false), (false, true), (true, true)] {
            let size = [1.0, 0.1, 30.0][i % 3];
            let sweep = Sweep::new(&mut rng, steps, rows, hidden, reverse, is_ragged, size);
            check_sweep(cases, &sweep)?;
        }
    }
    // More tiles of rows than one dimension of workgroups has.
    let sweep = Sweep::new(&mut rng, 1, 65_535 * 4 + 5, 1, false, false, 1.0);
    check_sweep(cases, &sweep)?;

    let (steps, rows, hidden) = (4, 5, 6);
    let (t, row, unit) = (1, 2, 4);
    for gate in 0..4 {
        let mut sweep = Sweep::new(&mut rng, steps, rows, hidden, false, false, 1.0);
        sweep.x[((t * rows + row) * 4 + gate) * hidden + unit] = NAN;
        cases.run(format!("NaN in gate {gate}"), |run| {
            sweep.launch(run, steps + 1, |run, launched| {
                let y = launched.y;
                let at = |at: usize| (at / y.row / rows, at / y.row % rows, at % y.row);
                let hit = |at| matches!(at, (to, b, j) if b == row && (to > t || (to == t && j == unit + y.offset)));
                run.nan("y", &y.tensor, |word| !y.holds(word) || hit(at(word)))
            })
        })?;
    }
    let mut sweep = Sweep::new(&mut rng, steps, rows, hidden, false, false, 1.0);
    sweep.dy[(t * rows + row) * hidden + unit] = NAN;
    cases.run("NaN in dy", |run| {
        sweep.launch(run, steps + 1, |run, launched| {
            let dstates = launched.backward(run, &sweep)?;
            let at = |at: usize| (at / (4 * hidden * rows), at / (4 * hidden) % rows, at % hidden);
            run.nan(
                "dslots",
                launched.slots,
                |word| matches!(at(word), (to, b, j) if b == row && (to < t || (to == t && j == unit))),
            )?;
            run.nan("dc", &dstates.slice(rows * hidden, [rows * hidden]), |word| word / hidden == row)
        })
    })
}

fn check_sweep(cases: &mut Cases<'_>, sweep: &Sweep) -> Result<()> {
    let (steps, rows, hidden) = (sweep.steps, sweep.rows, sweep.hidden);
    let expected = sweep.expected();
    cases.run(sweep.name(), |run| {
        sweep.launch(run, steps + 1, |run, launched| {
            run.near_window("y", launched.y, &expected.y, OUTPUT)?;
            run.near("states", launched.states, &expected.states, OUTPUT)?;
            let valid = |at: usize| within(sweep.lengths.as_deref(), rows, at / (4 * hidden));
            run.near_where("saved", launched.slots, &expected.saved, OUTPUT, valid)?;
            let dstates = launched.backward(run, sweep)?;
            run.near("dslots", launched.slots, &expected.dslots, GRADIENT)?;
            run.near("dstates", &dstates, &expected.dstates, GRADIENT)
        })?;
        // Without backward, memory of two states is enough.
        sweep.launch(run, 2, |run, launched| {
            run.near_window("y of two states", launched.y, &expected.y, OUTPUT)?;
            let (block, last) = (rows * hidden, if sweep.reverse { 0 } else { steps });
            for s in 0..2 {
                let state = launched.states.slice((s * 2 + launched.plan.ends(2).1) * block, [block]);
                let expected = &expected.states[(s * (steps + 1) + last) * block..][..block];
                run.near(["last h of two states", "last c of two states"][s], &state, expected, OUTPUT)?;
            }
            Ok(())
        })
    })
}

// ---- whole layers ----

#[derive(Clone, Copy)]
struct Layers {
    input: usize,
    hidden: usize,
    layers: usize,
    direction: Direction,
    /// T, B.
    size: [usize; 2],
    ragged: bool,
    bias: bool,
    batch_first: bool,
    dropout: f32,
    /// Initial states and gradients of final states are given.
    state: bool,
}

fn lstm_layers(cases: &mut Cases<'_>) -> Result<()> {
    use Direction::{Both, Forward, Reverse};
    let mut rng = Rng::seed(13);
    let base = Layers {
        input: 3,
        hidden: 5,
        layers: 1,
        direction: Forward,
        size: [4, 3],
        ragged: false,
        bias: true,
        batch_first: false,
        dropout: 0.0,
        state: true,
    };
    for layers in [
        Layers { input: 1, hidden: 1, size: [1, 1], state: false, ..base },
        Layers { ragged: true, ..base },
        Layers { direction: Reverse, size: [5, 4], ..base },
        Layers { direction: Reverse, ragged: true, size: [5, 6], layers: 2, ..base },
        Layers { direction: Both, layers: 2, ragged: true, size: [6, 5], ..base },
        Layers { direction: Both, layers: 3, bias: false, hidden: 17, state: false, ..base },
        Layers { layers: 3, bias: false, ragged: true, size: [5, 7], ..base },
        Layers { batch_first: true, direction: Both, ragged: true, size: [3, 5], ..base },
        Layers { batch_first: true, layers: 2, size: [7, 2], state: false, ..base },
        Layers { dropout: 0.5, layers: 3, direction: Both, size: [4, 9], ..base },
        Layers { dropout: 0.1, layers: 2, ragged: true, batch_first: true, size: [8, 5], hidden: 20, ..base },
        Layers { input: 70, hidden: 65, layers: 2, direction: Both, size: [5, 9], ragged: true, ..base },
        Layers { input: 9, hidden: 130, size: [3, 17], ..base },
    ] {
        check_layers(cases, &mut rng, layers)?;
    }
    Ok(())
}

fn check_layers(cases: &mut Cases<'_>, rng: &mut Rng, layers: Layers) -> Result<()> {
    let Layers { input, hidden, direction, size: [steps, rows], bias, batch_first, dropout, .. } = layers;
    let directions = if direction == Direction::Both { 2 } else { 1 };
    let (width, slots) = (directions * hidden, layers.layers * directions);
    let lengths = layers.ragged.then(|| ragged(rng, steps, rows));
    let lengths = lengths.as_deref();
    let mut x = normal(rng, steps * rows * input);
    let mut dy = normal(rng, steps * rows * width);
    // A product with a gradient of 0 brings NaN along, so what stands in x's padding must be finite.
    pad(&mut x, input, lengths, rows, -100.0);
    pad(&mut dy, width, lengths, rows, NAN);
    let block = slots * rows * hidden;
    let mut states = || if layers.state { normal(rng, block) } else { vec![0.0; block] };
    let [h0, c0, dh, dc] = [states(), states(), states(), states()];
    let config = LstmConfig::new(input, hidden).layers(layers.layers).direction(direction).bias(bias);
    let config = config.batch_first(batch_first).dropout(dropout);
    let make = |device: &Device, values: &[Vec<f32>]| -> Result<Lstm> {
        let lstm = config.clone().init(device, &mut Rng::seed(0))?;
        lstm.params().iter().zip(values).try_for_each(|((_, param), values)| param.set(values))?;
        Ok(lstm)
    };
    let of = make(cases.device, &[])?;
    let names: Vec<String> = of.params().into_iter().map(|(name, _)| name).collect();
    let scale = 1.5 / (hidden as f32).sqrt();
    let sizes: Vec<usize> = of.params().iter().map(|(_, param)| param.value().len()).collect();
    let values: Vec<Vec<f32>> = sizes.iter().map(|n| normal(rng, *n).into_iter().map(|w| w * scale).collect()).collect();

    // The oracle knows no reverse direction alone: it gets each row's steps in the opposite order.
    let turned = |values: &[f64], width: usize| -> Vec<f64> {
        if direction == Direction::Reverse { reverse_rows(values, width, steps, rows, lengths) } else { values.to_vec() }
    };
    let key = MaskKey::new(5, 6);
    let masks: Vec<Vec<f64>> = (0..layers.layers - 1)
        .filter(|_| dropout > 0.0)
        .map(|layer| turned(&wide(&mask(steps, rows, width, dropout, key.layer(layer))), width))
        .collect();
    let mut at = values.iter().map(|values| wide(values));
    let mut next = |given: bool| if given { at.next().unwrap_or_default() } else { Vec::new() };
    let weights: Vec<oracle::Weights> = (0..slots)
        .map(|_| oracle::Weights { weight_ih: next(true), weight_hh: next(true), bias_ih: next(bias), bias_hh: next(bias) })
        .collect();
    let oracle_lengths: Option<Vec<usize>> = lengths.map(|lengths| lengths.iter().map(|n| *n as usize).collect());
    let [h64, c64, dh64, dc64] = [&h0, &c0, &dh, &dc].map(|state| wide(state));
    let spec = Recurrent { cell: Cell::Lstm, input, hidden, layers: layers.layers, directions, bias };
    let want = spec.forward_backward(
        &weights,
        RecurrentInput {
            batch: rows,
            x: &turned(&wide(&x), input),
            state: &[&h64, &c64],
            lengths: oracle_lengths.as_deref(),
            masks: &masks,
            dy: &turned(&wide(&dy), width),
            dstate: &[&dh64, &dc64],
        },
    );
    let gradients: Vec<&Vec<f64>> = want
        .dweights
        .iter()
        .flat_map(|w| [&w.weight_ih, &w.weight_hh, &w.bias_ih, &w.bias_hh])
        .filter(|gradient| !gradient.is_empty())
        .collect();
    // [T, B, ..] as the layer has it.
    let edge32 = |values: &[f32], width: usize| if batch_first { swap(values, width, steps, rows) } else { values.to_vec() };
    let edge = |values: &[f64], width: usize| {
        let values = turned(values, width);
        if batch_first { swap(&values, width, steps, rows) } else { values }
    };
    let (y, dx) = (edge(&want.y, width), edge(&want.dx, input));
    let shape = |width: usize| if batch_first { [rows, steps, width] } else { [steps, rows, width] };

    let name = format!(
        "{input}->{hidden} x{} {direction:?} {steps}x{rows}{}{}{}{}{}",
        layers.layers,
        lengths.map_or(String::new(), |lengths| format!(" lengths {lengths:?}")),
        if bias { "" } else { " no bias" },
        if batch_first { " batch first" } else { "" },
        if dropout > 0.0 { format!(" dropout {dropout}") } else { String::new() },
        if layers.state { "" } else { " no state" },
    );
    cases.run(name, |run| {
        let lstm = make(run.device, &values)?;
        let x = run.input("x", &edge32(&x, input), shape(input))?;
        let dy = run.input("dy", &edge32(&dy, width), shape(width))?;
        let mut state = |h: &[f32], c: &[f32]| -> Result<LstmState> {
            let shape = [slots, rows, hidden];
            Ok(LstmState { h: run.input("h", h, shape)?, c: run.input("c", c, shape)? })
        };
        let (state, dstate) = (state(&h0, &c0)?, state(&dh, &dc)?);
        let lengths = run.lengths(lengths)?;
        let mut given = Input::new().key(key);
        given = lengths.as_ref().map_or(given, |lengths| given.lengths(lengths));
        given = if layers.state { given.state(&state) } else { given };
        if dropout == 0.0 {
            let (computed, last) = lstm.forward(&x, given)?;
            run.near("infer.y", &computed, &y, OUTPUT)?;
            run.near("infer.hn", &last.h, &want.state[0], OUTPUT)?;
            run.near("infer.cn", &last.c, &want.state[1], OUTPUT)?;
        }
        let (computed, last, tape) = lstm.forward_train(&x, given)?;
        run.near("y", &computed, &y, OUTPUT)?;
        run.near("hn", &last.h, &want.state[0], OUTPUT)?;
        run.near("cn", &last.c, &want.state[1], OUTPUT)?;
        let (computed, dfirst) = lstm.backward(tape, &dy, layers.state.then_some(&dstate))?;
        run.near("grad.x", &computed, &dx, GRADIENT)?;
        run.near("grad.h0", &dfirst.h, &want.dstate[0], GRADIENT)?;
        run.near("grad.c0", &dfirst.c, &want.dstate[1], GRADIENT)?;
        for (((_, param), name), gradient) in lstm.params().iter().zip(&names).zip(&gradients) {
            run.near(&format!("grad.{name}"), param.grad(), gradient, GRADIENT)?;
        }
        // A second pass adds to the gradients of the parameters.
        let (_, _, tape) = lstm.forward_train(&x, given)?;
        lstm.backward(tape, &dy, layers.state.then_some(&dstate))?;
        for (((_, param), name), gradient) in lstm.params().iter().zip(&names).zip(&gradients) {
            let twice: Vec<f64> = gradient.iter().map(|g| 2.0 * g).collect();
            run.near(&format!("twice grad.{name}"), param.grad(), &twice, GRADIENT)?;
        }
        Ok(())
    })
}

/// `[steps, rows, width]` with each row's valid steps in the opposite order.
fn reverse_rows(values: &[f64], width: usize, steps: usize, rows: usize, lengths: Option<&[u32]>) -> Vec<f64> {
    let line = |line: usize| {
        let (t, row) = (line / rows, line % rows);
        let length = lengths.map_or(steps, |lengths| lengths[row] as usize);
        let from = if t < length { length - 1 - t } else { t };
        &values[(from * rows + row) * width..][..width]
    };
    (0..steps * rows).flat_map(line).copied().collect()
}

/// `[rows, steps, width]` from `[steps, rows, width]`.
fn swap<T: Copy>(values: &[T], width: usize, steps: usize, rows: usize) -> Vec<T> {
    let line = |line: usize| &values[(line % steps * rows + line / steps) * width..][..width];
    (0..rows * steps).flat_map(line).copied().collect()
}

// ---- what must not matter ----

/// How a sequence is cut, who else is in the batch, and what padding there is changes nothing, but for rounding.
fn lstm_properties(cases: &mut Cases<'_>) -> Result<()> {
    const SAME: f64 = 1e-6;
    let mut rng = Rng::seed(14);
    for (layers, hidden, rows) in [(1, 5, 3), (2, 17, 5), (2, 66, 9)] {
        let (steps, input) = (6, 4);
        let lengths: Vec<u32> = (0..rows as u32).map(|row| (row * 5 + 3) % 7).collect();
        let x = normal(&mut rng, steps * rows * input);
        let dy = normal(&mut rng, steps * rows * hidden);
        let config = |direction| LstmConfig::new(input, hidden).layers(layers).direction(direction);
        let part = |values: &[f32], width: usize, from: usize, to: usize, row: Option<usize>| -> Vec<f32> {
            let lines = (from * rows..to * rows).filter(|line| row.is_none_or(|row| line % rows == row));
            lines.flat_map(|line| &values[line * width..][..width]).copied().collect()
        };
        let equal = |run: &mut Run<'_>, name: &str, computed: &[f32], expected: &[f32]| {
            run.words.extend(to_bits(computed));
            run.comparisons.push(Comparison::new(name, computed, &wide(expected), SAME));
        };

        cases.run(format!("{layers} layers of {hidden}, {rows} rows: in steps and in chunks"), |run| {
            let lstm = config(Direction::Forward).init(run.device, &mut Rng::seed(3))?;
            let tensor = |from: usize, to: usize| {
                Tensor::from_slice(run.device, &part(&x, input, from, to, None), [to - from, rows, input])
            };
            let (whole, last) = lstm.forward(&tensor(0, steps)?, None)?;
            let (whole, h, c) = (whole.to_vec()?, last.h.to_vec()?, last.c.to_vec()?);
            let mut state: Option<LstmState> = None;
            let mut outputs = Vec::new();
            for t in 0..steps {
                let x = tensor(t, t + 1)?.reshape([rows, input])?;
                let (y, next) = lstm.step(&x, state.as_ref())?;
                outputs.extend(y.to_vec()?);
                state = Some(next);
            }
            equal(run, "y in steps", &outputs, &whole);
            if let Some(next) = state {
                equal(run, "h in steps", &next.h.to_vec()?, &h);
                equal(run, "c in steps", &next.c.to_vec()?, &c);
            }
            for cut in [1, 4] {
                let (first, state) = lstm.forward(&tensor(0, cut)?, None)?;
                let (second, last) = lstm.forward(&tensor(cut, steps)?, &state)?;
                equal(run, "y in chunks", &[first.to_vec()?, second.to_vec()?].concat(), &whole);
                equal(run, "h in chunks", &last.h.to_vec()?, &h);
                equal(run, "c in chunks", &last.c.to_vec()?, &c);
            }
            Ok(())
        })?;

        cases.run(format!("{layers} layers of {hidden}, {rows} rows: alone and padded"), |run| {
            let lstm = config(Direction::Both).init(run.device, &mut Rng::seed(4))?;
            let width = 2 * hidden;
            let dy: Vec<f32> = [&dy[..], &dy[..]].concat();
            let pass = |x: &[f32], dy: &[f32], lengths: &[u32]| -> Result<[Vec<f32>; 2]> {
                let batch = lengths.len();
                let steps = x.len() / (batch * input);
                let x = Tensor::from_slice(run.device, x, [steps, batch, input])?;
                let dy = Tensor::from_slice(run.device, dy, [steps, batch, width])?;
                let lengths = Lengths::from_slice(run.device, lengths)?;
                let (y, _, tape) = lstm.forward_train(&x, Input::new().lengths(&lengths))?;
                let (dx, _) = lstm.backward(tape, &dy, None)?;
                Ok([y.to_vec()?, dx.to_vec()?])
            };
            let [y, dx] = pass(&x, &dy, &lengths)?;
            for (row, length) in lengths.iter().enumerate() {
                let of = |values: &[f32], width: usize| part(values, width, 0, steps, Some(row));
                let [y_alone, dx_alone] = pass(&of(&x, input), &of(&dy, width), &[*length])?;
                equal(run, &format!("y of row {row} alone"), &y_alone, &of(&y, width));
                equal(run, &format!("dx of row {row} alone"), &dx_alone, &of(&dx, input));
            }
            // Three more rows and two more steps.
            let padded = |values: &[f32], width: usize| -> Vec<f32> {
                let mut all = vec![7.0; (steps + 2) * (rows + 3) * width];
                for (t, lines) in values.chunks_exact(rows * width).enumerate() {
                    all[t * (rows + 3) * width..][..rows * width].copy_from_slice(lines);
                }
                all
            };
            let unpadded = |values: &[f32], width: usize| -> Vec<f32> {
                (0..steps).flat_map(|t| &values[t * (rows + 3) * width..][..rows * width]).copied().collect()
            };
            let more = [&lengths[..], &[0, 8, 3]].concat();
            let [y_padded, dx_padded] = pass(&padded(&x, input), &padded(&dy, width), &more)?;
            equal(run, "y of a padded batch", &unpadded(&y_padded, width), &y);
            equal(run, "dx of a padded batch", &unpadded(&dx_padded, input), &dx);
            Ok(())
        })?;
    }
    Ok(())
}
