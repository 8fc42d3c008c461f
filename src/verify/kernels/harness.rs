//! What every family's cases are run with: two runs of a case, inputs and windows that are guarded, draws, and bounds.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::choice::KernelOverride;
use crate::kernels::gemm::Matrix;
use crate::rng::Rng;
use crate::tensor::{Ids, Lengths, POISON, Tensor};
use crate::verify::{Comparison, Report};

/// Largest errors relative to a tensor's largest magnitude: of outputs, of gradients, and where few operations round.
pub(super) const OUTPUT: f64 = 1e-5;
pub(super) const GRADIENT: f64 = 5e-5;
pub(super) const TIGHT: f64 = 2e-6;

/// More elements than one launch has lanes: 65535 workgroups of 64.
pub(super) const MANY: usize = 65_535 * 64 + 1;

pub(super) const NAN: f32 = f32::from_bits(POISON);

pub(super) struct Cases<'a> {
    pub(super) device: &'a Device,
    pub(super) reports: &'a mut Vec<Report>,
}

impl Cases<'_> {
    /// Runs `cases` on a device of its own with these kernels: see [`overridden`].
    pub(super) fn under(&mut self, kernels: KernelOverride, cases: impl FnOnce(&mut Cases<'_>) -> Result<()>) -> Result<()> {
        let device = overridden(self.device, kernels)?;
        cases(&mut Cases { device: &device, reports: self.reports })
    }

    /// Runs `case` twice and reports what it compared, whether both runs gave the same bits, and whether inputs changed.
    pub(super) fn run(&mut self, name: impl Into<String>, case: impl Fn(&mut Run<'_>) -> Result<()>) -> Result<()> {
        let name = name.into();
        let once = || -> Result<Run<'_>> {
            // After an alarm of an earlier case a grid's rescue alone would be at work.
            if self.device.is_alarmed() {
                self.device.set_alarm(false)?;
            }
            let mut run = Run::new(self.device);
            case(&mut run)?;
            for (name, tensor, before) in std::mem::take(&mut run.inputs) {
                run.comparisons.push(Comparison::bits(format!("{name}, an input"), &tensor.read_back()?, &before));
            }
            Ok(run)
        };
        let in_case = |error: Error| Error::new(error.kind(), format!("{name}: {error}")).with_source(error);
        let (first, second) = (once().map_err(in_case)?, once().map_err(in_case)?);
        let mut comparisons = first.comparisons;
        comparisons.push(Comparison::bits("bits of a second run", &second.words, &first.words));
        self.reports.push(Report::new(name, comparisons));
        Ok(())
    }
}

/// The same adapter as a device of its own, with these kernels where there are any to choose: others share the given one.
pub(super) fn overridden(device: &Device, kernels: KernelOverride) -> Result<Device> {
    let device = device.again();
    device.poison();
    if !device.is_cpu() {
        device.override_kernels(kernels)?;
    }
    Ok(device)
}

/// One run of a case.
pub(super) struct Run<'a> {
    pub(super) device: &'a Device,
    /// Name, tensor, and its words before the run.
    inputs: Vec<(&'static str, Tensor, Vec<u32>)>,
    pub(super) comparisons: Vec<Comparison>,
    /// All outputs, one after another.
    pub(super) words: Vec<u32>,
}

impl<'a> Run<'a> {
    pub(super) fn new(device: &'a Device) -> Self {
        Self { device, inputs: Vec::new(), comparisons: Vec::new(), words: Vec::new() }
    }
}

impl Run<'_> {
    /// A tensor that the kernel must leave as it is.
    pub(super) fn input(&mut self, name: &'static str, values: &[f32], shape: impl Into<Vec<usize>>) -> Result<Tensor> {
        let tensor = Tensor::from_slice(self.device, values, shape)?;
        self.inputs.push((name, tensor.clone(), to_bits(values)));
        Ok(tensor)
    }

    /// The same for the words of ids or lengths, which are on the device already.
    pub(super) fn input_words(&mut self, name: &'static str, tensor: &Tensor, words: &[u32]) {
        self.inputs.push((name, tensor.clone(), words.to_vec()));
    }

    pub(super) fn ids(&mut self, name: &'static str, ids: &[u32]) -> Result<Ids> {
        self.ids_of(name, ids, [ids.len()])
    }

    pub(super) fn ids_of(&mut self, name: &'static str, ids: &[u32], shape: impl Into<Vec<usize>>) -> Result<Ids> {
        let device = Ids::from_slice(self.device, ids, shape)?;
        self.input_words(name, device.tensor(), ids);
        Ok(device)
    }

    pub(super) fn lengths(&mut self, lengths: Option<&[u32]>) -> Result<Option<Lengths>> {
        let Some(lengths) = lengths else { return Ok(None) };
        let device = Lengths::from_slice(self.device, lengths)?;
        self.input_words("lengths", device.tensor(), lengths);
        Ok(Some(device))
    }

    /// The words of an output, remembered for the comparison of both runs.
    pub(super) fn read(&mut self, tensor: &Tensor) -> Result<Vec<u32>> {
        let words = tensor.read_back()?;
        self.words.extend_from_slice(&words);
        Ok(words)
    }

    pub(super) fn near(&mut self, name: &str, tensor: &Tensor, expected: &[f64], bound: f64) -> Result<()> {
        self.near_where(name, tensor, expected, bound, |_| true)
    }

    /// As `near`, but only for the elements that `defined` picks: the contract leaves the others open.
    pub(super) fn near_where(
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

    /// The values of a pointwise function, within `bound` units in the last place of each: [`Comparison::ulps`].
    pub(super) fn near_ulps(&mut self, name: &str, tensor: &Tensor, expected: &[f64], bound: f64) -> Result<()> {
        let computed: Vec<f32> = self.read(tensor)?.into_iter().map(f32::from_bits).collect();
        self.comparisons.push(Comparison::ulps(name, &computed, expected, bound));
        Ok(())
    }

    pub(super) fn bits(&mut self, name: &str, tensor: &Tensor, expected: &[u32]) -> Result<()> {
        let words = self.read(tensor)?;
        self.comparisons.push(Comparison::bits(name, &words, expected));
        Ok(())
    }

    /// NaN stands exactly where `expected` says so; the error is the number of wrong places.
    pub(super) fn nan(&mut self, name: &str, tensor: &Tensor, expected: impl Fn(usize) -> bool) -> Result<()> {
        let words = self.read(tensor)?;
        let wrong = words.iter().enumerate().filter(|(at, word)| is_nan(**word) != expected(*at)).count();
        self.comparisons.push(Comparison::measured(format!("NaN in {name}"), wrong as f64, 0.0));
        Ok(())
    }

    /// A `[rows, cols]` matrix: a tensor of its own, or, when `loose`, part of a larger one of NaN; with `values` or NaN.
    pub(super) fn window(&self, [rows, cols]: [usize; 2], loose: bool, values: Option<&[f32]>) -> Result<Window> {
        let [offset, row, after] = layout([rows, cols], loose);
        let mut words = vec![POISON; offset + (rows - 1) * row + cols + after];
        for (r, values) in values.into_iter().flat_map(|values| values.chunks_exact(cols)).enumerate() {
            words[offset + r * row..][..cols].copy_from_slice(&to_bits(values));
        }
        let tensor = Tensor::upload("window", self.device, &words, vec![words.len()])?;
        Ok(Window { tensor, words, offset, rows, cols, row })
    }

    /// A window that the kernel must leave as it is.
    pub(super) fn input_window(&mut self, name: &'static str, size: [usize; 2], loose: bool, values: &[f32]) -> Result<Window> {
        let window = self.window(size, loose, Some(values))?;
        self.input_words(name, &window.tensor, &window.words);
        Ok(window)
    }

    /// The window is near `expected`, and the words around it are what they were.
    pub(super) fn near_window(&mut self, name: &str, window: &Window, expected: &[f64], bound: f64) -> Result<()> {
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

/// Where a window starts, words from row to row, words after it. In some loose ones all is a multiple of 4, in some nothing.
pub(super) fn layout([rows, cols]: [usize; 2], loose: bool) -> [usize; 3] {
    match loose {
        false => [0, cols, 0],
        true if rows.is_multiple_of(2) => [8, cols + 4, 70],
        true => [5, cols + 3, 70],
    }
}

/// A matrix in a tensor, and the words that the tensor started with.
pub(super) struct Window {
    pub(super) tensor: Tensor,
    pub(super) words: Vec<u32>,
    pub(super) offset: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row: usize,
}

impl Window {
    pub(super) fn matrix(&self) -> Matrix<'_> {
        Matrix::window(&self.tensor, self.offset, self.rows, self.cols, self.row)
    }

    pub(super) fn holds(&self, at: usize) -> bool {
        at.checked_sub(self.offset).is_some_and(|at| at / self.row < self.rows && at % self.row < self.cols)
    }
}

pub(super) fn is_nan(word: u32) -> bool {
    word & 0x7fff_ffff > 0x7f80_0000
}

pub(super) fn to_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(super) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

pub(super) fn normal(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal()).collect()
}

/// 100 or -100.
pub(super) fn hundreds(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| if rng.below(2) == 0 { 100.0 } else { -100.0 }).collect()
}

/// Zeros of both signs, 100, -100 and denormal numbers among normal draws.
pub(super) fn mixed(rng: &mut Rng, count: usize) -> Vec<f32> {
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
pub(super) fn ragged(rng: &mut Rng, steps: usize, rows: usize) -> Vec<u32> {
    let mut lengths: Vec<u32> = (0..rows).map(|_| rng.below(steps + 1) as u32).collect();
    lengths[rows - 1] = steps as u32;
    if rows > 1 {
        lengths[rng.below(rows - 1)] = 0;
    }
    lengths
}

/// Whether line `t * rows + row` is a step of its row.
pub(super) fn within(lengths: Option<&[u32]>, rows: usize, line: usize) -> bool {
    lengths.is_none_or(|lengths| line / rows < lengths[line % rows] as usize)
}

/// What a row holds past its end: it must not get into any result.
pub(super) fn pad(values: &mut [f32], width: usize, lengths: Option<&[u32]>, rows: usize, with: f32) {
    for (line, values) in values.chunks_exact_mut(width).enumerate() {
        if !within(lengths, rows, line) {
            values.fill(with);
        }
    }
}
