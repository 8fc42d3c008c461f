//! One network with its input and the gradient of its output: what is timed, and checked before that.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gatefold::nn::{Cell, CellState, GruConfig, LstmConfig, Module, Recurrent, RnnConfig};
use gatefold::verify::Comparison;
use gatefold::{Device, Rng, Tensor};

use super::{CellName, Mode, PrecisionName};

/// An answer further from the reference than this is wrong: there is no point in timing it. In half precision each factor is rounded to
/// 2^-11 of itself.
fn tolerance(precision: PrecisionName) -> f64 {
    match precision {
        PrecisionName::Single => 1e-4,
        PrecisionName::Half => 1e-2,
    }
}

/// A network of any cell.
pub trait Work {
    /// One run, not waited for.
    fn run(&mut self, mode: Mode) -> gatefold::Result<()>;
    /// The distances of all that comes out from the reference, where there is one.
    fn check(&self, mode: Mode) -> Result<Option<Vec<Comparison>>>;
}

/// What to build.
pub struct Spec<'a> {
    pub device: &'a Device,
    pub cell: CellName,
    pub shape: [usize; 4],
    pub layers: usize,
    pub precision: PrecisionName,
}

/// `lstm_100_32_256_256`: the cell, T, B, I, H.
pub fn name(cell: CellName, [t, b, i, h]: [usize; 4]) -> String {
    format!("{}_{t}_{b}_{i}_{h}", cell.name())
}

impl Spec<'_> {
    pub fn name(&self) -> String {
        name(self.cell, self.shape)
    }

    /// With random weights, or those of the reference file in `folder`.
    pub fn build(&self, folder: Option<&Path>) -> Result<Box<dyn Work>> {
        let [_, _, i, h] = self.shape;
        let (device, precision, rng) = (self.device, self.precision.into(), &mut Rng::seed(1));
        Ok(match self.cell {
            CellName::Lstm => {
                self.with(LstmConfig::new(i, h).layers(self.layers).precision(precision).init(device, rng)?, folder)?
            }
            CellName::Gru => {
                self.with(GruConfig::new(i, h).layers(self.layers).precision(precision).init(device, rng)?, folder)?
            }
            CellName::Rnn => {
                self.with(RnnConfig::new(i, h).layers(self.layers).precision(precision).init(device, rng)?, folder)?
            }
        })
    }

    fn with<C: Cell + 'static>(&self, net: Recurrent<C>, folder: Option<&Path>) -> Result<Box<dyn Work>> {
        let [t, b, i, h] = self.shape;
        let (x, y) = (t * b * i, t * b * h);
        let (x, dy, expected) = match folder {
            Some(folder) => self.read(&net, &folder.join(format!("{}.bin", self.name())))?,
            None => {
                let mut rng = Rng::seed(2);
                let mut draw = |count: usize, scale: f32| -> Vec<f32> { (0..count).map(|_| scale * rng.normal()).collect() };
                (draw(x, 1.0), draw(y, 1.0 / (y as f32).sqrt()), None)
            }
        };
        let steps: Vec<Tensor> =
            x.chunks_exact(b * i).map(|x| Tensor::from_slice(self.device, x, [b, i])).collect::<Result<_, _>>()?;
        let x = Tensor::from_slice(self.device, &x, [t, b, i])?;
        let dy = Tensor::from_slice(self.device, &dy, [t, b, h])?;
        let tolerance = tolerance(self.precision);
        Ok(Box::new(Network { net, x, steps, dy, expected, tolerance, state: None }))
    }

    /// Little-endian f32 without gaps: x, the four parameters, dy; then y, h (and c), dx and the parameters' gradients.
    fn read<C: Cell>(&self, net: &Recurrent<C>, path: &Path) -> Result<(Vec<f32>, Vec<f32>, Option<Expected>)> {
        ensure!(self.layers == 1, "BENCH_REF: references are of one layer");
        let [t, b, i, h] = self.shape;
        let bytes = std::fs::read(path).with_context(|| format!("BENCH_REF: {}", path.display()))?;
        let (x, y, state) = (t * b * i, t * b * h, b * h);
        let params: Vec<usize> = net.params().iter().map(|(_, param)| param.value().len()).collect();
        let count = 2 * (x + y + params.iter().sum::<usize>()) + C::Value::NAMES.len() * state;
        let (given, wanted) = (bytes.len(), 4 * count);
        ensure!(given == wanted, "BENCH_REF: {} has {given} bytes, expected {wanted}", path.display());
        let mut numbers = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let mut take = |count: usize| -> Vec<f32> { numbers.by_ref().take(count).collect() };

        let x_values = take(x);
        for ((_, param), count) in net.params().into_iter().zip(&params) {
            param.set(&take(*count))?;
        }
        let dy = take(y);
        let mut expected = |count: usize| -> Vec<f64> { take(count).into_iter().map(f64::from).collect() };
        let expected = Expected {
            y: expected(y),
            states: C::Value::NAMES.iter().map(|_| expected(state)).collect(),
            dx: expected(x),
            params: params.into_iter().map(expected).collect(),
        };
        Ok((x_values, dy, Some(expected)))
    }
}

/// What a reference file says should come out, computed in float64.
struct Expected {
    y: Vec<f64>,
    states: Vec<Vec<f64>>,
    dx: Vec<f64>,
    /// weight_ih, weight_hh, bias_ih, bias_hh
    params: Vec<Vec<f64>>,
}

struct Network<C: Cell> {
    net: Recurrent<C>,
    /// [T, B, I], and each step of it [B, I].
    x: Tensor,
    steps: Vec<Tensor>,
    dy: Tensor,
    expected: Option<Expected>,
    tolerance: f64,
    /// What a stream carries from step to step.
    state: Option<C::Value>,
}

impl<C: Cell> Work for Network<C> {
    fn run(&mut self, mode: Mode) -> gatefold::Result<()> {
        match mode {
            Mode::Infer => {
                self.net.forward(&self.x, None)?;
            }
            Mode::Train => {
                let (_, _, tape) = self.net.forward_train(&self.x, None)?;
                self.net.backward(tape, &self.dy, None)?;
            }
            Mode::Step => self.state = Some(self.net.step(&self.steps[0], self.state.as_ref())?.1),
        }
        Ok(())
    }

    /// Under the names that the other programs of the comparison use.
    fn check(&self, mode: Mode) -> Result<Option<Vec<Comparison>>> {
        let Some(expected) = &self.expected else { return Ok(None) };
        let compare = |name: &str, computed: &[f32], expected: &[f64]| Comparison::new(name, computed, expected, self.tolerance);
        let mut comparisons = Vec::new();
        let state = match mode {
            Mode::Infer => {
                let (y, state) = self.net.forward(&self.x, None)?;
                comparisons.push(compare("y", &y.to_vec()?, &expected.y));
                state
            }
            Mode::Step => {
                let (mut y, mut state) = (Vec::new(), None);
                for x in &self.steps {
                    let (y_t, next) = self.net.step(x, state.as_ref())?;
                    y.extend(y_t.to_vec()?);
                    state = Some(next);
                }
                comparisons.push(compare("y", &y, &expected.y));
                state.context("no step")?
            }
            Mode::Train => {
                self.net.zero_grad()?;
                let (y, state, tape) = self.net.forward_train(&self.x, None)?;
                let (dx, _) = self.net.backward(tape, &self.dy, None)?;
                comparisons.push(compare("y", &y.to_vec()?, &expected.y));
                comparisons.push(compare("dx", &dx.to_vec()?, &expected.dx));
                let names = ["dw_ih", "dw_hh", "db_ih", "db_hh"];
                for (((_, param), expected), name) in self.net.params().into_iter().zip(&expected.params).zip(names) {
                    comparisons.push(compare(name, &param.grad().to_vec()?, expected));
                }
                state
            }
        };
        for ((name, tensor), expected) in C::Value::NAMES.iter().zip(state.tensors()).zip(&expected.states) {
            comparisons.push(compare(name, &tensor.to_vec()?, expected));
        }
        Ok(Some(comparisons))
    }
}

/// The time of one run and, on a GPU, of its recording and submission by the host.
pub fn timed(work: &mut dyn Work, mode: Mode, device: &Device) -> Result<(Duration, Option<Duration>)> {
    let start = Instant::now();
    work.run(mode)?;
    device.submit()?;
    let host = start.elapsed();
    device.synchronize()?;
    Ok((start.elapsed(), (!device.is_cpu()).then_some(host)))
}
