//! Whole training runs: the same bits again, on a fresh device too, and at every step near the textbook in f64 and near the native CPU.

use super::harness::{Cases, normal, overridden, to_bits, wide};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::choice::KernelOverride;
use crate::loss::MeanSquaredError;
use crate::nn::{Cell, GruConfig, LinearConfig, LstmConfig, Module, RecurrentConfig, Sequential};
use crate::optim::Sgd;
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::trainer::{Batch, Trainer};
use crate::verify::{Comparison, oracle};

const STEPS: usize = 200;
/// Of a run that only has to give the bits of the first steps of another.
const FEW: usize = 20;
const TIME: usize = 12;
const ROWS: usize = 8;
const INPUT: usize = 3;
const HIDDEN: usize = 16;
const OUTPUT: usize = 2;
const RATE: f64 = 0.05;
const MOMENTUM: f64 = 0.9;
const CLIP: f64 = 0.5;

/// How far a loss may be from that of f64 or of another device at the same step, relative to itself.
const LOSS: f64 = 2e-5;
/// The same of the weights after the last step, relative to the tensor's largest.
const WEIGHTS: f64 = 2e-5;

pub(super) fn training(cases: &mut Cases<'_>) -> Result<()> {
    check(cases, "lstm", LstmConfig::new(INPUT, HIDDEN), oracle::Cell::LSTM)?;
    check(cases, "gru", GruConfig::new(INPUT, HIDDEN), oracle::Cell::GRU)
}

/// The loss of each step, and all parameters after the last.
struct Trained<T> {
    losses: Vec<T>,
    weights: Vec<(String, Vec<T>)>,
}

/// Inputs \[T,B,I\] and targets \[T,B,O\], which take some memory: batches that are taken in turn.
fn data() -> [[Vec<f32>; 2]; 4] {
    let mut rng = Rng::seed(41);
    std::array::from_fn(|_| {
        let x = normal(&mut rng, TIME * ROWS * INPUT);
        let before = |at: usize, steps: usize| at.checked_sub(steps * ROWS).map_or(0.0, |line| x[line * INPUT]);
        let target =
            |line: usize| [0.5 * (x[line * INPUT + 1] + before(line, 1)), (before(line, 2) * x[line * INPUT + 2]).tanh()];
        let targets = (0..TIME * ROWS).flat_map(target).collect();
        [x, targets]
    })
}

fn network<C: Cell>(device: &Device, config: &RecurrentConfig<C>) -> Result<Sequential> {
    let mut rng = Rng::seed(42);
    let model = Sequential::new().push(config.clone().init(device, &mut rng)?);
    Ok(model.push(LinearConfig::new(HIDDEN, OUTPUT).init(device, &mut rng)?))
}

fn weights(model: &Sequential) -> Result<Vec<(String, Vec<f32>)>> {
    model.params().into_iter().map(|(name, param)| Ok((name, param.value().to_vec()?))).collect()
}

fn train<C: Cell>(device: &Device, config: &RecurrentConfig<C>, steps: usize) -> Result<Trained<f32>> {
    let batch = |[x, target]: [Vec<f32>; 2]| -> Result<Batch> {
        let x = Tensor::from_slice(device, &x, [TIME, ROWS, INPUT])?;
        Ok(Batch::new(x, Tensor::from_slice(device, &target, [TIME, ROWS, OUTPUT])?))
    };
    let batches = data().into_iter().map(batch).collect::<Result<Vec<_>>>()?;
    let rule = Sgd::new(RATE).momentum(MOMENTUM);
    let mut trainer = Trainer::new(network(device, config)?, MeanSquaredError, rule)?.clip_grad_norm(CLIP);
    let outcomes = (0..steps).map(|step| trainer.step(&batches[step % batches.len()])).collect::<Result<Vec<_>>>()?;
    let losses = outcomes.iter().map(|outcome| outcome.item()).collect::<Result<_>>()?;
    Ok(Trained { losses, weights: weights(trainer.model())? })
}

/// The same run in f64 from the same weights. The gradient of one parameter may be off by a thousandth.
fn textbook(cell: oracle::Cell, start: &[(String, Vec<f32>)], spoilt: Option<usize>) -> Trained<f64> {
    let spec = oracle::Recurrent::new(cell, INPUT, HIDDEN);
    let rule = oracle::Sgd { lr: RATE, momentum: MOMENTUM, weight_decay: 0.0 };
    let mut weights: Vec<(String, Vec<f64>)> = start.iter().map(|(name, values)| (name.clone(), wide(values))).collect();
    let mut velocities: Vec<Vec<f64>> = weights.iter().map(|(_, values)| vec![0.0; values.len()]).collect();
    let part = |name: &str| name.trim_start_matches("0.").trim_end_matches("_l0").to_owned();
    let data = data().map(|batch| batch.map(|values| wide(&values)));
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let [x, target] = &data[step % data.len()];
        let [recurrent @ .., (_, w), (_, b)] = &weights[..] else { unreachable!("a recurrent and a linear layer") };
        let parts = [recurrent.iter().map(|(name, values)| (part(name), values.clone())).collect::<oracle::Weights>()];
        let input = oracle::RecurrentInput { batch: ROWS, x, ..oracle::RecurrentInput::default() };
        let h = spec.forward_backward(&parts, input).y;
        let y = oracle::linear(&h, w, Some(b), HIDDEN, OUTPUT);
        let (loss, dy) = oracle::mean_squared_error(&y, target, &vec![true; y.len()]);
        losses.push(loss);
        let linear = oracle::linear_backward(&h, w, &dy, HIDDEN, OUTPUT);
        let mut back = spec.forward_backward(&parts, oracle::RecurrentInput { dy: &linear.dx, ..input });
        let of_parts = recurrent.iter().map(|(name, _)| back.dweights[0].remove(&part(name)).unwrap_or_default());
        let mut gradients: Vec<Vec<f64>> = of_parts.chain([linear.dweight, linear.dbias]).collect();
        if let Some(spoilt) = spoilt {
            gradients[spoilt].iter_mut().for_each(|g| *g *= 1.001);
        }
        let all: Vec<&[f64]> = gradients.iter().map(Vec::as_slice).collect();
        let factor = oracle::clip_factor(oracle::global_norm(&all), CLIP);
        gradients.iter_mut().flatten().for_each(|g| *g *= factor);
        for (((_, values), gradient), velocity) in weights.iter_mut().zip(&gradients).zip(&mut velocities) {
            rule.step(values, gradient, velocity);
        }
    }
    Trained { losses, weights }
}

/// Every loss relative to itself, every parameter relative to its largest.
fn compare(computed: &Trained<f32>, expected: &Trained<f64>, to: &str) -> Vec<Comparison> {
    let losses = computed.losses.iter().zip(&expected.losses).enumerate();
    let losses =
        losses.map(|(step, (loss, expected))| Comparison::new(format!("loss {step} beside {to}"), &[*loss], &[*expected], LOSS));
    let weights = computed.weights.iter().zip(&expected.weights);
    let weights =
        weights.map(|((name, values), (_, expected))| Comparison::new(format!("{name} beside {to}"), values, expected, WEIGHTS));
    losses.chain(weights).collect()
}

fn check<C: Cell>(cases: &mut Cases<'_>, name: &str, config: RecurrentConfig<C>, cell: oracle::Cell) -> Result<()> {
    let native = Device::cpu();
    let exact = textbook(cell, &weights(&network(&native, &config)?)?, None);
    let on_cpu = train(&native, &config, STEPS)?;
    let losses = wide(&on_cpu.losses);
    let on_cpu = Trained { losses, weights: on_cpu.weights.into_iter().map(|(name, values)| (name, wide(&values))).collect() };
    cases.run(format!("{name}, {STEPS} steps"), |run| {
        let trained = train(run.device, &config, STEPS)?;
        run.comparisons.extend(compare(&trained, &exact, "the textbook"));
        if !run.device.is_cpu() {
            run.comparisons.extend(compare(&trained, &on_cpu, "the native CPU"));
        }
        // A case runs twice: these words must be the same then.
        run.words.extend(to_bits(&trained.losses));
        trained.weights.iter().for_each(|(_, values)| run.words.extend(to_bits(values)));
        let fresh = train(&overridden(run.device, KernelOverride::default())?, &config, FEW)?;
        let (fresh, first) = (to_bits(&fresh.losses), to_bits(&trained.losses[..FEW]));
        run.comparisons.push(Comparison::bits(format!("{FEW} steps with other memory"), &fresh, &first));
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the bounds are worth: the gradient of any one parameter off by a thousandth is beyond them, and the run does learn.
    #[test]
    fn a_gradient_off_by_a_thousandth_is_seen() -> Result<()> {
        fn check<C: Cell>(config: RecurrentConfig<C>, cell: oracle::Cell) -> Result<()> {
            let start = weights(&network(&Device::cpu(), &config)?)?;
            let exact = textbook(cell, &start, None);
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            let [first, last] = [mean(&exact.losses[..4]), mean(&exact.losses[STEPS - 4..])];
            assert!(last < 0.5 * first, "the loss falls from {first} to {last} only");
            for (at, (name, _)) in start.iter().enumerate() {
                let spoilt = textbook(cell, &start, Some(at));
                let narrow = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<f32>>();
                let weights = spoilt.weights.iter().map(|(name, values)| (name.clone(), narrow(values))).collect();
                let comparisons = compare(&Trained { losses: narrow(&spoilt.losses), weights }, &exact, "the textbook");
                let worst = comparisons.iter().map(|c| c.error / c.bound).fold(0.0, f64::max);
                assert!(worst > 1.0, "{name} off by a thousandth: {worst} of the bound");
                println!("{name}: {worst:.1} times the bound");
            }
            Ok(())
        }
        check(LstmConfig::new(INPUT, HIDDEN), oracle::Cell::LSTM)?;
        check(GruConfig::new(INPUT, HIDDEN), oracle::Cell::GRU)
    }
}
