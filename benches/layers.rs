//! `cargo bench --features verify --bench layers`: a forward pass, a training step (forward, and backward to x and to all weights)
//! and a step of a stream, on the native CPU and on the adapter that `GATEFOLD_DEVICE` names. Answers are compared with the f64
//! oracle before anything is timed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use criterion::Criterion;
use gatefold::nn::{Cell, GruConfig, LstmConfig, Module, Recurrent, RnnConfig};
use gatefold::verify::{Comparison, oracle};
use gatefold::{Device, Rng, Tensor};

/// T, B, I, H: a stream, a small batch, and one that is worth two threads.
const SHAPES: [[usize; 4]; 3] = [[32, 1, 64, 64], [16, 16, 64, 64], [8, 32, 128, 256]];

/// The bounds of the suite, for outputs and gradients.
const TOLERANCE: (f64, f64) = (1e-5, 5e-5);

fn main() -> Result<()> {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(20)
        .configure_from_args();
    let mut devices = vec![Device::cpu()];
    devices.extend(Some(Device::new()?).filter(|device| !device.is_cpu()));
    for device in &devices {
        for [t, b, i, h] in SHAPES {
            let (shape, rng) = ([t, b, i, h], &mut Rng::seed(1));
            layer(&mut criterion, device, shape, oracle::Cell::LSTM, &LstmConfig::new(i, h).init(device, rng)?)?;
            layer(&mut criterion, device, shape, oracle::Cell::GRU, &GruConfig::new(i, h).init(device, rng)?)?;
            layer(&mut criterion, device, shape, oracle::Cell::RNN, &RnnConfig::new(i, h).init(device, rng)?)?;
        }
    }
    criterion.final_summary();
    Ok(())
}

fn layer<C: Cell>(
    criterion: &mut Criterion,
    device: &Device,
    [t, b, i, h]: [usize; 4],
    cell: oracle::Cell,
    net: &Recurrent<C>,
) -> Result<()> {
    let mut rng = Rng::seed(2);
    let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal()).collect() };
    let (x, dy) = (draw(t * b * i), draw(t * b * h));
    check(device, [t, b, i, h], cell, net, &x, &dy)?;

    let x_t = Tensor::from_slice(device, &x[..b * i], [b, i])?;
    let (x, dy) = (Tensor::from_slice(device, &x, [t, b, i])?, Tensor::from_slice(device, &dy, [t, b, h])?);
    let mut group = criterion.benchmark_group(format!("{} {t}x{b}x{i}x{h} {}", C::NAME, device.info().name));
    let mut failed = None;
    let mut keep = |done: Result<()>| failed = failed.take().or(done.err());
    group.bench_function("infer", |bencher| {
        bencher.iter(|| {
            let run = || -> Result<()> {
                net.forward(&x, None)?;
                Ok(device.synchronize()?)
            };
            keep(run());
        });
    });
    group.bench_function("train", |bencher| {
        bencher.iter(|| {
            let run = || -> Result<()> {
                let (_, _, tape) = net.forward_train(&x, None)?;
                net.backward(tape, &dy, None)?;
                Ok(device.synchronize()?)
            };
            keep(run());
        });
    });
    let mut state = None;
    group.bench_function("step", |bencher| {
        bencher.iter(|| {
            let mut run = || -> Result<()> {
                state = Some(net.step(&x_t, state.as_ref())?.1);
                Ok(device.synchronize()?)
            };
            keep(run());
        });
    });
    group.finish();
    failed.map_or(Ok(()), Err)
}

/// y, the sequence step by step, dx and the gradients of the weights against the oracle.
fn check<C: Cell>(
    device: &Device,
    [t, b, i, h]: [usize; 4],
    cell: oracle::Cell,
    net: &Recurrent<C>,
    x: &[f32],
    dy: &[f32],
) -> Result<()> {
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|value| f64::from(*value)).collect() };
    let mut weights = oracle::Weights::new();
    for (name, param) in net.params() {
        let name = name.strip_suffix("_l0").context("a parameter of another layer")?;
        weights.insert(name.to_owned(), wide(&param.value().to_vec()?));
    }
    let zeros = vec![0.0; b * h];
    let states = vec![zeros.as_slice(); cell.states()];
    let (wide_x, wide_dy) = (wide(x), wide(dy));
    let input =
        oracle::RecurrentInput { batch: b, x: &wide_x, state: &states, dy: &wide_dy, dstate: &states, ..Default::default() };
    let expected = oracle::Recurrent::new(cell, i, h).forward_backward(&[weights], input);

    let mut comparisons = Vec::new();
    let x_all = Tensor::from_slice(device, x, [t, b, i])?;
    let (y, _, tape) = net.forward_train(&x_all, None)?;
    let (dx, _) = net.backward(tape, &Tensor::from_slice(device, dy, [t, b, h])?, None)?;
    comparisons.push(Comparison::new("y", &y.to_vec()?, &expected.y, TOLERANCE.0));
    comparisons.push(Comparison::new("dx", &dx.to_vec()?, &expected.dx, TOLERANCE.1));
    for (name, param) in net.params() {
        let expected = &expected.dweights[0][name.trim_end_matches("_l0")];
        comparisons.push(Comparison::new(name, &param.grad().to_vec()?, expected, TOLERANCE.1));
    }
    comparisons.push(Comparison::new("y of forward", &net.forward(&x_all, None)?.0.to_vec()?, &expected.y, TOLERANCE.0));
    let (mut stepped, mut state) = (Vec::new(), None);
    for x in x.chunks_exact(b * i) {
        let (y, next) = net.step(&Tensor::from_slice(device, x, [b, i])?, state.as_ref())?;
        stepped.extend(y.to_vec()?);
        state = Some(next);
    }
    comparisons.push(Comparison::new("y of steps", &stepped, &expected.y, TOLERANCE.0));
    for comparison in comparisons {
        let Comparison { tensor, error, .. } = &comparison;
        ensure!(comparison.passes(), "{} {t}x{b}x{i}x{h} on {}: {tensor} is off by {error:.1e}", C::NAME, device.info());
    }
    Ok(net.zero_grad()?)
}
