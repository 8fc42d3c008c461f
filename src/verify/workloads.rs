//! Single kernels on the sizes that layers launch them with, to be timed by `gatefold bench --kernels`.

use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::device::{Backend, Device};
use crate::error::Result;
use crate::kernels::gemm::Matrix;
use crate::kernels::half::{Factor, Precision};
use crate::kernels::{column_sum, elementwise, gather, gemm_half, peak};
use crate::nn::{Cell, GruConfig, LstmConfig, MinGruConfig, Module, Recurrent, Reset, RnnConfig, SweepAlone};
use crate::optim::{AdamW, Optimizer};
use crate::rng::Rng;
use crate::tensor::{Ids, Tensor};

type Step = Box<dyn Fn() -> Result<()>>;

/// One kernel on given sizes, and what the least of work is that it could do.
pub struct Workload {
    /// `product x.W_ih^T`
    pub name: &'static str,
    /// The sizes: `3200x1024x256`.
    pub size: String,
    /// Operations: a multiply-add is two.
    pub flops: f64,
    /// Bytes to and from memory if each operand moved once.
    pub bytes: f64,
    device: Device,
    prepare: Step,
    run: Step,
}

impl Workload {
    fn new(device: &Device, name: &'static str, size: &[usize], work: [f64; 2], run: impl Fn() -> Result<()> + 'static) -> Self {
        let size = size.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let [flops, numbers] = work;
        Self { name, size, flops, bytes: 4.0 * numbers, device: device.clone(), prepare: Box::new(|| Ok(())), run: Box::new(run) }
    }

    /// Done before each run, outside of its time.
    fn after(self, prepare: impl Fn() -> Result<()> + 'static) -> Self {
        Self { prepare: Box::new(prepare), ..self }
    }

    /// The time of one run, by [`clock`].
    ///
    /// # Errors
    /// What the device reports.
    pub fn time(&self) -> Result<Duration> {
        self.time_by(clock(&self.device))
    }

    /// The time of one run by this clock. That of the GPU does not count what lies between launches.
    ///
    /// # Errors
    /// What the device reports; [`crate::ErrorKind::Unsupported`] for a clock that it has not.
    pub fn time_by(&self, clock: Clock) -> Result<Duration> {
        (self.prepare)()?;
        self.device.synchronize()?;
        if clock == Clock::Gpu {
            return Ok(self.device.profile(|| (self.run)())?.iter().map(|kernel| kernel.time).sum());
        }
        let start = Instant::now();
        (self.run)()?;
        self.device.synchronize()?;
        Ok(start.elapsed())
    }
}

/// What measures a [`Workload`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The GPU's timestamps.
    Gpu,
    /// The host's clock: on a GPU from the submission to its end.
    Host,
}

/// What measures workloads on `device`.
pub fn clock(device: &Device) -> Clock {
    match device.backend() {
        Backend::Gpu(gpu) if gpu.has_clock() => Clock::Gpu,
        _ => Clock::Host,
    }
}

/// The most that the device does: a copy of `numbers` numbers, and `rounds` multiply-adds of as many chains as fill it.
///
/// # Errors
/// What the device reports.
pub fn peaks(device: &Device, numbers: usize, rounds: u32) -> Result<[Workload; 2]> {
    let room = |value: f32, count: usize| Tensor::from_slice(device, &vec![value; count], [count]);
    let (x, y) = (room(1.0, numbers)?, room(0.0, numbers)?);
    let copy = Workload::new(device, "copy", &[numbers], [0.0, 2.0 * numbers as f64], move || peak::copy(&x, &y));
    // Many times as many vectors as any device has lanes.
    let chains = numbers.min(1 << 20);
    let (x, y) = (room(0.25, chains)?, room(0.0, chains)?);
    let flops = 2.0 * (peak::CHAINS * chains) as f64 * f64::from(rounds);
    let multiply_add = move || peak::multiply_add(&x, &y, rounds);
    Ok([copy, Workload::new(device, "multiply-add", &[chains, rounds as usize], [flops, 2.0 * chains as f64], multiply_add)])
}

/// The kernels of a layer's training step: `lstm`, `gru` or `rnn` with T steps, B rows, I inputs, H units. `None` for another cell.
///
/// # Errors
/// What the device reports.
pub fn layer(device: &Device, cell: &str, shape: [usize; 4]) -> Result<Option<Vec<Workload>>> {
    let [_, _, i, h] = shape;
    let rng = &mut Rng::seed(1);
    match cell {
        "lstm" => of_layer(LstmConfig::new(i, h).init(device, rng)?, shape, rng).map(Some),
        "gru" => of_layer(GruConfig::new(i, h).init(device, rng)?, shape, rng).map(Some),
        "rnn" => of_layer(RnnConfig::new(i, h).init(device, rng)?, shape, rng).map(Some),
        _ => Ok(None),
    }
}

/// `C [m, n] = A [m, k] . B [k, n]`, with A lying transposed in memory or as it is; in half precision with rounding A, but not B.
///
/// # Errors
/// What the device reports.
pub fn product(device: &Device, name: &'static str, precision: Precision, [m, n, k]: [usize; 3], a_t: bool) -> Result<Workload> {
    let mut rng = Rng::seed(3);
    let mut draw = |count: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..count).map(|_| 0.1 * rng.normal()).collect();
        Tensor::from_slice(device, &values, [count])
    };
    let (a, b, c) = (draw(m * k)?, draw(k * n)?, draw(m * n)?);
    let b = Factor::right(precision, Matrix::new(&b, k, n), k)?;
    let numbers = (m * k + k * n + m * n) as f64;
    Ok(Workload::new(device, name, &[m, n, k], [2.0 * (m * n * k) as f64, numbers], move || {
        let a = if a_t { Matrix::new(&a, k, m).t() } else { Matrix::new(&a, m, k) };
        gemm_half::product(a, &b, None, Matrix::new(&c, m, n), false)
    }))
}

fn of_layer<C: Cell + 'static>(mut layer: Recurrent<C>, shape: [usize; 4], rng: &mut Rng) -> Result<Vec<Workload>> {
    let [t, b, i, h] = shape;
    let device = layer.params()[0].1.value().device().clone();
    let device = &device;
    let (lines, gates) = (t * b, C::GATES.len() * h);
    let mut draw = |shape: &[usize]| -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| 0.1 * rng.normal()).collect();
        Tensor::from_slice(device, &values, shape)
    };
    let mut loads = Vec::new();

    // [m, n, k], and whether A lies transposed.
    let products = [
        ("product x.W_ih^T", [lines, gates, i], false),
        ("product dg.W_ih", [lines, i, gates], false),
        ("product dg^T.x", [gates, i, lines], true),
        ("product dg^T.h", [gates, h, lines], true),
        ("product of a step", [b, gates, h], false),
    ];
    for (name, size, a_t) in products {
        loads.push(product(device, name, Precision::Single, size, a_t)?);
    }

    let dg = draw(&[lines, gates])?;
    let sums = draw(&[gates])?;
    loads.push(Workload::new(device, "column sum", &[lines, gates], [0.0, (lines * gates) as f64], move || {
        column_sum::column_sum(Matrix::new(&dg, lines, gates), 0, &sums)
    }));
    let (x, y) = (draw(&[lines, h])?, draw(&[lines, h])?);
    loads.push(Workload::new(device, "add", &[lines, h], [0.0, 3.0 * (lines * h) as f64], move || {
        elementwise::add(&x, &y).map(|_| ())
    }));
    let vocabulary = 256;
    let ids: Vec<u32> = (0..lines as u32).map(|at| at * 97 % vocabulary).collect();
    let (ids, table, dtable) = (Ids::from_slice(device, &ids, [lines])?, draw(&[256, h])?, draw(&[256, h])?);
    let (of, dy) = (ids.clone(), draw(&[lines, h])?);
    loads.push(Workload::new(device, "gather", &[lines, h], [0.0, 2.0 * (lines * h) as f64], move || {
        gather::gather(of.tensor(), &table, h).map(|_| ())
    }));
    loads.push(Workload::new(device, "scatter", &[lines, h], [0.0, (lines * h) as f64], move || {
        gather::scatter(&ids.positions()?, &dy, &dtable, h, None)
    }));

    let count: usize = layer.params().iter().map(|(_, param)| param.value().len()).sum();
    // Weight, gradient and two moments, in and out.
    let optimizer = std::cell::RefCell::new(Optimizer::new(AdamW::new(1e-3), layer.params_mut())?.clip_grad_norm(1.0));
    loads.push(Workload::new(device, "adamw", &[count], [0.0, 8.0 * count as f64], move || optimizer.borrow_mut().step()));

    loads.extend(of_sweep(layer, shape, rng)?);
    Ok(loads)
}

/// The forward and the backward sweep of a layer, without the products before and after it, over T steps of B rows and H units.
///
/// # Errors
/// What the device reports.
pub fn sweeps(device: &Device, cell: SweptCell, [t, b, h]: [usize; 3]) -> Result<[Workload; 2]> {
    let (shape, rng) = ([t, b, h, h], &mut Rng::seed(1));
    match cell {
        SweptCell::Lstm => of_sweep(LstmConfig::new(h, h).init(device, rng)?, shape, rng),
        SweptCell::MinGru => of_sweep(MinGruConfig::new(h, h).init(device, rng)?, shape, rng),
        SweptCell::GruResetBefore => of_sweep(GruConfig::new(h, h).reset(Reset::BeforeProduct).init(device, rng)?, shape, rng),
    }
}

/// Inference and a training step of an LSTM of two layers, over T steps of B rows and H units, which are its inputs too.
///
/// # Errors
/// What the device reports.
pub fn stack(device: &Device, [t, b, h]: [usize; 3]) -> Result<[Workload; 2]> {
    let rng = &mut Rng::seed(1);
    let layer = Rc::new(LstmConfig::new(h, h).layers(2).init(device, rng)?);
    let values: Vec<f32> = (0..t * b * h).map(|_| 0.1 * rng.normal()).collect();
    let x = Tensor::from_slice(device, &values, [t, b, h])?;
    let flops = 2.0 * (2 * t * b * 4 * h * 2 * h) as f64;
    let numbers = (t * b * h) as f64;
    let [trained, dy] = [x.clone(), x.clone()];
    let of_training = layer.clone();
    Ok([
        Workload::new(device, "two layers", &[t, b, h], [flops, numbers], move || layer.forward(&x, None).map(|_| ())),
        Workload::new(device, "two layers, training", &[t, b, h], [3.0 * flops, numbers], move || {
            let (.., tape) = of_training.forward_train(&trained, None)?;
            of_training.backward(tape, &dy, None).map(|_| ())
        }),
    ])
}

/// Whose sweep it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SweptCell {
    /// A product a step.
    Lstm,
    /// None.
    MinGru,
    /// Two.
    GruResetBefore,
}

fn of_sweep<C: Cell + 'static>(layer: Recurrent<C>, [t, b, i, h]: [usize; 4], rng: &mut Rng) -> Result<[Workload; 2]> {
    let device = layer.params()[0].1.value().device().clone();
    let (lines, gates) = (t * b, C::GATES.len() * h);
    let mut draw = |shape: [usize; 3]| -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| 0.1 * rng.normal()).collect();
        Tensor::from_slice(&device, &values, shape)
    };
    let (x, dy) = (draw([t, b, i])?, draw([t, b, h])?);
    let sweep = Rc::new(SweepAlone::new(layer, &x, &dy)?);
    let [slots, states] = sweep.sizes();
    let flops = 2.0 * (lines * gates * h) as f64;
    // The slots in and out, the states, y or dy, the weights.
    let numbers = (2 * slots + states + lines * h + gates * h) as f64;
    let load = |name, run: fn(&SweepAlone<C>) -> Result<()>, prepare: fn(&SweepAlone<C>) -> Result<()>| {
        let [prepared, swept] = [sweep.clone(), sweep.clone()];
        let load = Workload::new(&device, name, &[t, b, h], [flops, numbers], move || run(&swept));
        load.after(move || prepare(&prepared))
    };
    Ok([
        load("sweep forward", SweepAlone::forward, SweepAlone::prepare_forward),
        load("sweep backward", SweepAlone::backward, SweepAlone::prepare_backward),
    ])
}

/// The class that the tables of `kernels::choice` know the device by, and the lanes of its subgroups where kernels use them; `None` for
/// the native CPU.
pub fn class(device: &Device) -> Option<(String, Option<u32>)> {
    match device.backend() {
        Backend::Native => None,
        Backend::Gpu(gpu) => Some((format!("{:?}", gpu.class()), gpu.subgroup_size())),
    }
}
