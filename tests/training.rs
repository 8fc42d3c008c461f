//! Whole training runs, on the native CPU and on every adapter: PyTorch's trajectories, the f64 oracle's gradients,
//! submissions, bits, resumed runs, skipped steps, carried state.

mod common;

use anyhow::{Context as _, Result, ensure};
use common::{adapters, devices};
use gatefold::nn::{
    Choice, Context, Decoding, Direction, Dropout, EmbeddingConfig, EncoderDecoderConfig, GruConfig, GruEncoderDecoder, Input,
    LastState, LastStep, Layer, LinearConfig, LstmConfig, MaxOverTime, MeanOverTime, Module, Output, Param, Precision, Residual,
    RnnConfig, Sequential, Skip, State, Tape, Value,
};
use gatefold::optim::{AdamW, LossScale, Optimizer, Rule, Sgd};
use gatefold::verify::{Comparison, case_file, oracle};
use gatefold::{Batch, CrossEntropy, Device, Ids, Lengths, Loss, MaskKey, MeanSquaredError, Rng, Tensor, Trainer};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
const PAD: u32 = 0;

// ---- what the tests share ----

/// Fails unless `computed` lies within `bound` of `expected`, relative to the largest magnitude there; NaN fails.
fn close(what: impl Into<String>, computed: &[f32], expected: &[f64], bound: f64) -> Result<()> {
    let comparison = Comparison::new(what, computed, expected, bound);
    ensure!(comparison.passes(), "{comparison:?}");
    Ok(())
}

fn wide(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|number| f64::from(*number)).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// All parameters, one after another.
fn weights(model: &Sequential) -> Result<Vec<f32>> {
    let parts = model.params().iter().map(|(_, param)| param.value().to_vec()).collect::<Result<Vec<_>, _>>()?;
    Ok(parts.concat())
}

fn normals(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal()).collect()
}

/// A network with every kind of dropout, and batches for it: ids `[6, 5]` over a vocabulary of 9, ragged.
fn network(device: &Device, seed: u64, p: f32) -> Result<Sequential> {
    let mut rng = Rng::seed(seed);
    Ok(Sequential::new()
        .push(EmbeddingConfig::new(9, 4).padding(PAD).init(device, &mut rng)?)
        .push(LstmConfig::new(4, 7).layers(2).direction(Direction::Both).dropout(p).init(device, &mut rng)?)
        .push(Dropout::new(p)?)
        .push(LinearConfig::new(14, 9).init(device, &mut rng)?))
}

fn batches(device: &Device, count: usize) -> Result<Vec<Batch>> {
    let mut rng = Rng::seed(77);
    let mut ids = || -> Result<Ids> {
        let ids: Vec<u32> = (0..30).map(|_| rng.below(9) as u32).collect();
        Ok(Ids::from_slice(device, &ids, [6, 5])?)
    };
    let lengths = Lengths::from_slice(device, &[6, 1, 4, 0, 5])?;
    (0..count).map(|_| Ok(Batch::new(ids()?, ids()?).lengths(lengths.clone()))).collect()
}

fn trainer(device: &Device, seed: u64, p: f32, rule: impl Into<Rule>) -> Result<Trainer<CrossEntropy>> {
    Ok(Trainer::new(network(device, seed, p)?, CrossEntropy::ignoring(PAD), rule)?.clip_grad_norm(0.5).seed(11))
}

/// The losses of one step on each batch, all read after the last.
fn run<L: Loss>(trainer: &mut Trainer<L>, batches: &[Batch]) -> Result<Vec<f32>> {
    let outcomes = batches.iter().map(|batch| trainer.step(batch)).collect::<Result<Vec<_>, _>>()?;
    Ok(outcomes.iter().map(|outcome| outcome.item()).collect::<Result<Vec<_>, _>>()?)
}

// ---- PyTorch's trajectories ----

struct Fixture(case_file::Tensors);

impl Fixture {
    fn read(name: &str) -> Result<Self> {
        Ok(Self(case_file::read_tensors(format!("{FIXTURES}/{name}.safetensors"))?))
    }

    /// The part of the input `name` that belongs to `step`, and its shape.
    fn part(&self, name: &str, step: usize) -> (Vec<f64>, Vec<usize>) {
        let tensor = &self.0[name];
        let size = tensor.shape[1..].iter().product::<usize>();
        (tensor.values[step * size..][..size].to_vec(), tensor.shape[1..].to_vec())
    }

    fn numbers(&self, device: &Device, name: &str, step: usize) -> Result<Tensor> {
        let (values, shape) = self.part(name, step);
        Ok(Tensor::from_slice(device, &values.iter().map(|value| *value as f32).collect::<Vec<_>>(), shape)?)
    }

    fn whole(&self, name: &str, step: usize) -> (Vec<u32>, Vec<usize>) {
        let (values, shape) = self.part(name, step);
        (values.iter().map(|value| *value as u32).collect(), shape)
    }

    fn ids(&self, device: &Device, name: &str, step: usize) -> Result<Ids> {
        let (ids, shape) = self.whole(name, step);
        Ok(Ids::from_slice(device, &ids, shape)?)
    }
}

/// Takes PyTorch's ten steps on every device. Two runs each: one is read after its end, one is asked for its norms.
fn trajectory<L: Loss>(
    name: &str,
    make: impl Fn(&Device) -> Result<Trainer<L>>,
    batch: impl Fn(&Fixture, &Device, usize) -> Result<Batch>,
) -> Result<()> {
    let fixture = Fixture::read(name)?;
    // LastStep takes a place in a row of layers that it does not take in PyTorch's.
    let theirs = |name: &str| if fixture.0.contains_key(name) { name.to_owned() } else { name.replacen("2.", "1.", 1) };
    let mut first: Option<Vec<f32>> = None;
    for device in devices()? {
        let start = || -> Result<Trainer<L>> {
            let trainer = make(&device)?;
            for (name, param) in trainer.model().params() {
                param.set(&fixture.0[&theirs(&name)].to_f32())?;
            }
            Ok(trainer)
        };
        let steps = (0..10).map(|step| batch(&fixture, &device, step)).collect::<Result<Vec<_>>>()?;

        let mut trainer = start()?;
        let losses = run(&mut trainer, &steps)?;
        for (step, (loss, expected)) in losses.iter().zip(&fixture.0["loss"].values).enumerate() {
            close(format!("{device:?}: loss of step {step}"), &[*loss], &[*expected], 1e-4)?;
        }
        for (name, param) in trainer.model().params() {
            let expected = &fixture.0[&format!("final.{}", theirs(&name))].values;
            close(format!("{device:?}: {name} at the end"), &param.value().to_vec()?, expected, 1e-4)?;
        }
        let last = weights(trainer.model())?;
        let reference = first.get_or_insert_with(|| last.clone());
        close(format!("{device:?}: weights against the first device"), &last, &wide(reference), 1e-4)?;

        let (mut trainer, mut clipped) = (start()?, 0);
        for (step, (batch, expected)) in steps.iter().zip(&fixture.0["grad_norm"].values).enumerate() {
            trainer.step(batch)?;
            let stats = trainer.stats()?;
            close(format!("{device:?}: grad_norm of step {step}"), &[stats.grad_norm], &[*expected], 1e-4)?;
            clipped += u32::from(name == "torch_training" && *expected > 1.0);
            assert_eq!((stats.steps, stats.skipped, stats.clipped), (step as u32 + 1, 0, clipped), "{device:?}");
        }
        assert_eq!(bits(&weights(trainer.model())?), bits(&last), "{device:?}: waiting changes nothing");
    }
    Ok(())
}

#[test]
fn pytorch_adamw_with_clipping() -> Result<()> {
    let make = |device: &Device| {
        let mut rng = Rng::seed(1);
        let model = Sequential::new()
            .push(EmbeddingConfig::new(11, 6).init(device, &mut rng)?)
            .push(LstmConfig::new(6, 8).layers(2).init(device, &mut rng)?)
            .push(LinearConfig::new(8, 11).init(device, &mut rng)?);
        Ok(Trainer::new(model, CrossEntropy::ignoring(PAD), AdamW::new(1e-2))?.clip_grad_norm(1.0))
    };
    trajectory("torch_training", make, |fixture, device, step| {
        Ok(Batch::new(fixture.ids(device, "ids", step)?, fixture.ids(device, "targets", step)?))
    })
}

#[test]
fn pytorch_sgd_on_ragged_rows() -> Result<()> {
    let make = |device: &Device| {
        let mut rng = Rng::seed(1);
        let model = Sequential::new()
            .push(LstmConfig::new(3, 7).init(device, &mut rng)?)
            .push(LastStep)
            .push(LinearConfig::new(7, 2).init(device, &mut rng)?);
        Ok(Trainer::new(model, MeanSquaredError, Sgd::new(0.1).momentum(0.9))?)
    };
    trajectory("torch_training_sgd", make, |fixture, device, step| {
        let lengths = Lengths::from_slice(device, &fixture.whole("lengths", step).0)?;
        Ok(Batch::new(fixture.numbers(device, "x", step)?, fixture.numbers(device, "targets", step)?).lengths(lengths))
    })
}

// ---- gradients ----

/// A layer that tells the key of its masks.
#[derive(Clone, Default)]
struct Spy(std::sync::Arc<std::sync::OnceLock<MaskKey>>);

impl Module for Spy {
    fn params(&self) -> Vec<(String, &Param)> {
        Vec::new()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        Vec::new()
    }
}

impl Layer for Spy {
    fn kind(&self) -> &'static str {
        "spy"
    }

    fn forward(&self, x: &Value, _: &Context<'_>) -> gatefold::Result<Output> {
        Ok(Output { y: x.numbers("spy")?.clone(), state: Vec::new() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> gatefold::Result<(Output, Tape)> {
        self.0.get_or_init(|| context.key.expect("a training pass has a key"));
        Ok((self.forward(x, context)?, Tape::new(())))
    }

    fn backward(&self, _: Tape, dy: &Tensor, _: bool) -> gatefold::Result<Option<Tensor>> {
        Ok(Some(dy.clone()))
    }
}

/// What a dropout layer at `place` in a row multiplies ones of `shape` with, and the key that a layer there gets.
fn mask(device: &Device, key: MaskKey, place: usize, p: f32, shape: [usize; 3]) -> Result<(Vec<f64>, MaskKey)> {
    let idle = |count: usize| (0..count).try_fold(Sequential::new(), |row, _| anyhow::Ok(row.push(Dropout::new(0.0)?)));
    let ones = Tensor::from_slice(device, &vec![1.0; shape.iter().product()], shape)?;
    let (mask, ..) = idle(place)?.push(Dropout::new(p)?).forward_train(&ones, Input::new().key(key))?;
    let spy = Spy::default();
    idle(place)?.push(spy.clone()).forward_train(&ones, Input::new().key(key))?;
    Ok((wide(&mask.to_vec()?), *spy.0.get().context("the spy was not asked")?))
}

#[test]
fn gradients_of_a_whole_network_are_the_oracles() -> Result<()> {
    const P: f32 = 0.4;
    let (steps, batch, vocabulary, width, hidden) = (6, 5, 9, 4, 7);
    let lengths = [6, 1, 4, 0, 5];
    let mut rng = Rng::seed(8);
    let ids: Vec<u32> = (0..steps * batch).map(|_| rng.below(vocabulary) as u32).collect();
    let mut targets: Vec<u32> = (0..steps * batch).map(|_| rng.below(vocabulary) as u32).collect();
    let key = MaskKey::new(3, 9);
    for device in devices()? {
        let model = network(&device, 5, P)?;
        let param = |name: &str| -> Result<Vec<f64>> {
            let params = model.params();
            let (_, param) = params.iter().find(|(given, _)| given == name).with_context(|| name.to_owned())?;
            Ok(wide(&param.value().to_vec()?))
        };
        let given = Ids::from_slice(&device, &targets, [steps, batch])?;
        let ragged = Lengths::from_slice(&device, &lengths)?;
        let input = Ids::from_slice(&device, &ids, [steps, batch])?;
        let (y, _, tape) = model.forward_train(input, Input::new().lengths(&ragged).key(key))?;
        let (loss, dy) = CrossEntropy::ignoring(PAD).loss_and_gradient(&y, &given.into(), Some(&ragged))?;
        model.backward(tape, &dy)?;

        // The same in f64, under the same masks.
        let shape = [steps, batch, 2 * hidden];
        let (_, inside) = mask(&device, key, 1, P, shape)?;
        let (between, _) = mask(&device, inside, 0, P, shape)?;
        let (after, _) = mask(&device, key, 2, P, shape)?;
        let zeros = |mask: &[f64]| mask.iter().filter(|value| **value == 0.0).count() as f64 / mask.len() as f64;
        assert!((0.3..0.5).contains(&zeros(&between)) && (0.3..0.5).contains(&zeros(&after)) && between != after);
        for (at, target) in targets.iter_mut().enumerate() {
            if at / batch >= lengths[at % batch] as usize {
                *target = PAD;
            }
        }
        let base = oracle::Recurrent::new(oracle::Cell::LSTM, width, hidden);
        let spec = oracle::Recurrent { layers: 2, directions: 2, ..base };
        let name = |kind: &str, slot: usize| format!("1.{kind}{}", case_file::suffix(slot / 2, slot % 2));
        let lstm = (0..4)
            .map(|slot| {
                let kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];
                kinds.into_iter().map(|kind| Ok((kind.to_owned(), param(&name(kind, slot))?))).collect()
            })
            .collect::<Result<Vec<oracle::Weights>>>()?;
        let x = oracle::embedding(&ids, &param("0.weight")?, width);
        let masks = [between];
        let sizes = lengths.map(|length| length as usize);
        let run = |dy: &[f64]| {
            let (lengths, rest) = (Some(&sizes[..]), oracle::RecurrentInput::default());
            spec.forward_backward(&lstm, oracle::RecurrentInput { batch, x: &x, lengths, masks: &masks, dy, ..rest })
        };
        let masked = |values: &[f64]| values.iter().zip(&after).map(|(value, mask)| value * mask).collect::<Vec<_>>();
        let h = masked(&run(&[]).y);
        let (weight, bias) = (param("3.weight")?, param("3.bias")?);
        let logits = oracle::linear(&h, &weight, Some(&bias), 2 * hidden, vocabulary);
        let (expected, dlogits) = oracle::cross_entropy(&logits, vocabulary, &targets, Some(PAD));
        close(format!("{device:?}: y"), &y.to_vec()?, &logits, 1e-5)?;
        close(format!("{device:?}: loss"), &loss.to_vec()?, &[expected], 1e-5)?;

        let linear = oracle::linear_backward(&h, &weight, &dlogits, 2 * hidden, vocabulary);
        let back = run(&masked(&linear.dx));
        let mut table = oracle::embedding_backward(&ids, &back.dx, vocabulary, width);
        table[..width].fill(0.0); // padding is not trained
        let mut expected = vec![("0.weight".to_owned(), table)];
        for (slot, w) in back.dweights.into_iter().enumerate() {
            // In the order of the layer's parameters.
            let parts = spec.parts(slot / 2).into_iter();
            expected.extend(parts.map(|(kind, _)| (name(kind, slot), w[kind].clone())));
        }
        expected.extend([("3.weight".to_owned(), linear.dweight), ("3.bias".to_owned(), linear.dbias)]);
        let params = model.params();
        assert_eq!(params.len(), expected.len());
        for ((name, param), (wanted, gradient)) in params.iter().zip(&expected) {
            assert_eq!(name, wanted);
            close(format!("{device:?}: gradient of {name}"), &param.grad().to_vec()?, gradient, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn gradients_add_up_until_a_step_or_zero_grad() -> Result<()> {
    for device in devices()? {
        let mut model = network(&device, 5, 0.0)?;
        let mut optimizer = Optimizer::new(Sgd::new(1.0), model.params_mut())?;
        let gradients = |model: &Sequential| -> Result<Vec<f32>> {
            let parts = model.params().iter().map(|(_, param)| param.grad().to_vec()).collect::<Result<Vec<_>, _>>()?;
            Ok(parts.concat())
        };
        let backward = |seed: u64| -> Result<()> {
            let mut rng = Rng::seed(seed);
            let ids: Vec<u32> = (0..30).map(|_| rng.below(9) as u32).collect();
            let (y, _, tape) =
                model.forward_train(Ids::from_slice(&device, &ids, [6, 5])?, Input::new().key(MaskKey::new(0, 0)))?;
            Ok(model.backward(tape, &Tensor::from_slice(&device, &normals(&mut rng, y.len()), y.shape())?)?)
        };
        let mut alone = Vec::new();
        for seed in [1, 2] {
            backward(seed)?;
            alone.push(gradients(&model)?);
            model.zero_grad()?;
            assert!(gradients(&model)?.iter().all(|gradient| *gradient == 0.0), "{device:?}");
        }
        backward(1)?;
        backward(2)?;
        let sum: Vec<f64> = alone[0].iter().zip(&alone[1]).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
        close(format!("{device:?}: two passes"), &gradients(&model)?, &sum, 1e-6)?;
        let before = weights(&model)?;
        optimizer.step()?;
        let after: Vec<f64> = before.iter().zip(&sum).map(|(value, gradient)| f64::from(*value) - gradient).collect();
        close(format!("{device:?}: one step"), &weights(&model)?, &after, 1e-6)?;
        assert!(gradients(&model)?.iter().all(|gradient| *gradient == 0.0), "{device:?}: a step zeroes the gradients");
    }
    Ok(())
}

/// A layer of an application's own, from public arithmetic alone: y = gain * x + shift + counter. Its state, the counter,
/// goes up by one a call.
struct Affine {
    gain: Param,
    shift: Param,
}

impl Affine {
    fn new(device: &Device, features: usize) -> Result<Self> {
        let values: Vec<f32> = (0..features).map(|at| at as f32 - 1.5).collect();
        Ok(Self {
            gain: Param::new("gain", device, &values, [features])?,
            shift: Param::new("shift", device, &vec![0.5; features], [features])?,
        })
    }
}

impl Module for Affine {
    fn params(&self) -> Vec<(String, &Param)> {
        vec![("gain".into(), &self.gain), ("shift".into(), &self.shift)]
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        vec![("gain".into(), &mut self.gain), ("shift".into(), &mut self.shift)]
    }
}

impl Layer for Affine {
    fn kind(&self) -> &'static str {
        "affine"
    }

    fn state_len(&self) -> usize {
        1
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> gatefold::Result<Output> {
        let y = x.numbers("affine")?.mul(self.gain.value())?.add(self.shift.value())?;
        let one = Tensor::from_slice(y.device(), &[1.0], [1])?;
        match context.state {
            [] => Ok(Output { y, state: vec![one] }),
            [counter, ..] => {
                let rows = Tensor::from_slice(y.device(), &vec![1.0; y.len()], y.shape())?.reshape([y.len(), 1])?;
                let counters = rows.mul(counter)?.reshape(y.shape())?;
                Ok(Output { y: y.add(&counters)?, state: vec![counter.add(&one)?] })
            }
        }
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> gatefold::Result<(Output, Tape)> {
        Ok((self.forward(x, context)?, Tape::new(x.numbers("affine")?.clone())))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> gatefold::Result<Option<Tensor>> {
        let x: Tensor = tape.open("affine")?;
        self.gain.accumulate(&x.mul(dy)?)?;
        self.shift.accumulate(dy)?;
        needs_dx.then(|| dy.mul(self.gain.value())).transpose()
    }

    fn step(&self, x: &Value, context: &Context<'_>) -> gatefold::Result<Output> {
        self.forward(x, context)
    }
}

/// Central differences of what each layer itself computes, for every number of x and of the parameters.
#[test]
fn gradients_of_layers_are_their_differences() -> Result<()> {
    const STEP: f32 = 1e-2;
    let shape @ [_, batch, width] = [4, 3, 4];
    let lengths = [4, 0, 2];
    let key = MaskKey::new(1, 2);
    for device in devices()? {
        let mut rng = Rng::seed(31);
        let r = &mut rng;
        let ragged = Lengths::from_slice(&device, &lengths)?;
        let lstm = |r: &mut Rng, hidden: usize, direction: Direction| {
            LstmConfig::new(width, hidden).direction(direction).init(&device, r)
        };
        let linear = |r: &mut Rng, from: usize, to: usize| LinearConfig::new(from, to).init(&device, r);
        let row = Sequential::new;
        let block = row().push(lstm(r, 3, Direction::Both)?).push(Dropout::new(0.4)?).push(linear(r, 6, width)?);
        let inner = row().push(linear(r, width, width)?).push(Residual::new(Affine::new(&device, width)?));
        let layers = [
            ("linear", row().push(linear(r, width, 3)?)),
            ("lstm", row().push(lstm(r, 3, Direction::Both)?)),
            ("affine", row().push(Affine::new(&device, width)?)),
            ("last_step", row().push(LastStep)),
            ("last_state, forward", row().push(LastState::new(Direction::Forward))),
            ("last_state, reverse", row().push(LastState::new(Direction::Reverse))),
            ("last_state, both", row().push(LastState::new(Direction::Both))),
            ("mean_over_time", row().push(MeanOverTime)),
            ("max_over_time", row().push(MaxOverTime)),
            ("residual", row().push(Residual::new(block))),
            ("residual in residual", row().push(Residual::new(inner))),
            ("skip", row().push(Skip::new(lstm(r, 3, Direction::Forward)?)).push(linear(r, width + 3, 2)?)),
            ("many to one", row().push(lstm(r, 3, Direction::Both)?).push(MeanOverTime).push(linear(r, 6, 2)?)),
        ];
        // Further apart than a difference reaches: the largest stays the largest.
        let mut order: Vec<usize> = (0..shape.iter().product()).collect();
        r.shuffle(&mut order);
        let plain: Vec<f32> = order.iter().map(|at| 0.05 * (*at as f32 - 23.5)).collect();
        for (name, model) in &layers {
            for lengths in [None, Some(&ragged)] {
                let what = format!("{device:?}: {name}{}", if lengths.is_some() { ", ragged" } else { "" });
                let pools = ["last_", "mean_", "max_"].iter().any(|start| name.starts_with(start));
                let mut x = plain.clone();
                // Of what a pooling layer gets past a row's end, not even NaN matters.
                for (at, x) in x.iter_mut().enumerate().filter(|_| pools && lengths.is_some()) {
                    let (step, row) = (at / (batch * width), at / width % batch);
                    *x = if step < ragged.to_vec()[row] as usize { *x } else { f32::NAN };
                }
                let context = Context { lengths, key: Some(key), ..Context::default() };
                let forward = |x: &[f32]| -> Result<(Tensor, Tape)> {
                    let x = Tensor::from_slice(&device, x, shape)?;
                    let (output, tape) = Layer::forward_train(model, &Value::from(x), &context)?;
                    Ok((output.y, tape))
                };
                let (y, tape) = forward(&x)?;
                let direction = normals(&mut Rng::seed(7), y.len());
                let loss = |x: &[f32]| -> Result<f64> {
                    Ok(forward(x)?.0.to_vec()?.iter().zip(&direction).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum())
                };
                model.zero_grad()?;
                let dy = Tensor::from_slice(&device, &direction, y.shape())?;
                let dx = Layer::backward(model, tape, &dy, true)?.context("dx was asked for")?;
                let moved = |values: &[f32], at: usize, by: f32| -> Vec<f32> {
                    let mut values = values.to_vec();
                    values[at] += by;
                    values
                };
                let slope = |plus: f64, minus: f64| (plus - minus) / f64::from(2.0 * STEP);
                let expected = (0..x.len()).map(|at| Ok(slope(loss(&moved(&x, at, STEP))?, loss(&moved(&x, at, -STEP))?)));
                close(format!("{what}: dx"), &dx.to_vec()?, &expected.collect::<Result<Vec<_>>>()?, 1e-3)?;
                for (name, param) in model.params() {
                    let values = param.value().to_vec()?;
                    let shifted = |at: usize, by: f32| -> Result<f64> {
                        param.set(&moved(&values, at, by))?;
                        loss(&x)
                    };
                    let expected = (0..values.len()).map(|at| Ok(slope(shifted(at, STEP)?, shifted(at, -STEP)?)));
                    let expected = expected.collect::<Result<Vec<_>>>()?;
                    param.set(&values)?;
                    close(format!("{what}: gradient of {name}"), &param.grad().to_vec()?, &expected, 1e-3)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_layer_of_an_applications_own_trains() -> Result<()> {
    let mut rng = Rng::seed(3);
    let x = normals(&mut rng, 5 * 4 * 2);
    let wanted: Vec<f32> = x.iter().enumerate().map(|(at, x)| if at % 2 == 0 { 2.0 * x - 1.0 } else { 3.0 - x }).collect();
    for device in devices()? {
        let model = Sequential::new().push_named("affine", Affine::new(&device, 2)?)?;
        let mut trainer = Trainer::new(model, MeanSquaredError, Sgd::new(0.4))?;
        let batch = Batch::new(Tensor::from_slice(&device, &x, [5, 4, 2])?, Tensor::from_slice(&device, &wanted, [5, 4, 2])?);
        for _ in 0..100 {
            trainer.step(&batch)?;
        }
        close(format!("{device:?}"), &weights(trainer.model())?, &[2.0, -1.0, -1.0, 3.0], 1e-4)?;
        assert_eq!(trainer.model().params()[1].0, "affine.shift");
    }
    Ok(())
}

// ---- how a step runs ----

#[test]
fn a_step_is_one_submission() -> Result<()> {
    // Devices of this test's own: nobody else submits to them.
    for device in adapters()? {
        let mut trainer = trainer(&device, 1, 0.3, AdamW::new(1e-2))?;
        let mut outcomes = Vec::new();
        for (step, batch) in batches(&device, 8)?.iter().enumerate() {
            let before = device.submissions();
            outcomes.push(trainer.step(batch)?);
            assert_eq!(device.submissions(), before + 1, "{device:?}: step {step}");
        }
        // All losses are still there, and reading one is a submission of its own.
        let before = device.submissions();
        for outcome in &outcomes {
            ensure!(outcome.item()?.is_finite());
        }
        assert_eq!(device.submissions(), before + 8, "{device:?}");
    }
    Ok(())
}

#[test]
fn decoding_waits_for_nothing() -> Result<()> {
    for device in adapters()? {
        let config = EncoderDecoderConfig::new(9, 7, GruConfig::new(4, 6).layers(2));
        let model = config.init(&device, &mut Rng::seed(1))?;
        let source = Ids::from_slice(&device, &[5; 6], [2, 3])?;
        for (max_steps, choice) in [
            (1, Choice::Greedy),
            (300, Choice::Greedy),
            (300, Choice::Draw { temperature: 1.0, top_k: Some(3), key: MaskKey::new(1, 2) }),
        ] {
            let before = device.submissions();
            let decoded = model.decode(&source, None, Decoding { start: 1, end: None, pad: 0, max_steps, choice })?;
            assert_eq!(device.submissions(), before, "{device:?}: {max_steps} steps");
            assert_eq!(decoded.shape(), [max_steps, 3]);
            assert!(decoded.rows()?.iter().all(|row| row.len() == max_steps && row.iter().all(|id| *id < 7)), "{device:?}");
        }
    }
    Ok(())
}

#[test]
fn same_seed_same_bits_and_same_masks_everywhere() -> Result<()> {
    let mut reference: Option<Vec<f64>> = None;
    for device in devices()? {
        let batches = batches(&device, 5)?;
        let train = |seed: u64| -> Result<(Vec<f32>, Vec<f32>)> {
            let mut trainer = trainer(&device, 1, 0.3, AdamW::new(1e-2))?.seed(seed);
            let losses = run(&mut trainer, &batches)?;
            Ok((losses, weights(trainer.model())?))
        };
        let (losses, last) = train(11)?;
        let (again, last_again) = train(11)?;
        assert_eq!((bits(&losses), bits(&last)), (bits(&again), bits(&last_again)), "{device:?}");
        // Other masks would move the first loss far more than the bound.
        let other = train(12)?.0[0];
        assert!((losses[0] - other).abs() > 1e-3, "{device:?}: the masks do not depend on the seed");
        let reference = reference.get_or_insert_with(|| wide(&losses));
        close(format!("{device:?}: losses against the first device"), &losses, reference, 1e-5)?;
    }
    Ok(())
}

#[test]
fn a_resumed_run_continues_to_the_same_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for device in devices()? {
        let batches = batches(&device, 6)?;
        for rule in [Rule::from(AdamW::new(1e-2)), Rule::from(Sgd::new(0.5).momentum(0.9).weight_decay(0.01))] {
            let path = folder.path().join("run.safetensors");
            let mut whole = trainer(&device, 1, 0.3, rule)?;
            let expected = run(&mut whole, &batches)?;

            let mut first = trainer(&device, 1, 0.3, rule)?;
            run(&mut first, &batches[..3])?;
            first.save(&path)?;
            drop(first);
            // Other weights, another seed of masks: all of it must come from the file.
            let mut second = trainer(&device, 2, 0.3, rule)?.seed(999);
            second.load(&path)?;
            assert_eq!(second.steps(), 3);
            let losses = run(&mut second, &batches[3..])?;
            assert_eq!(bits(&losses), bits(&expected[3..]), "{device:?} {rule:?}: losses");
            assert_eq!(bits(&weights(second.model())?), bits(&weights(whole.model())?), "{device:?} {rule:?}: weights");
            assert_eq!(second.stats()?, whole.stats()?, "{device:?} {rule:?}");

            // On another device it continues too, if not to the same bits.
            let cpu = Device::cpu();
            let mut elsewhere = trainer(&cpu, 3, 0.3, rule)?;
            elsewhere.load(&path)?;
            let losses = run(&mut elsewhere, &self::batches(&cpu, 6)?[3..])?;
            close(format!("{device:?} {rule:?}: resumed on the CPU"), &losses, &wide(&expected[3..]), 1e-4)?;
        }
    }
    Ok(())
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() -> Result<()> {
    let batch = |device: &Device, seed: u64, spoil: Option<(usize, f32)>| -> Result<Batch> {
        let mut rng = Rng::seed(seed);
        let mut parts = [normals(&mut rng, 4 * 3 * 2), normals(&mut rng, 4 * 3)];
        if let Some((part, value)) = spoil {
            parts[part][5] = value;
        }
        let x = Tensor::from_slice(device, &parts[0], [4, 3, 2])?;
        Ok(Batch::new(x, Tensor::from_slice(device, &parts[1], [4, 3, 1])?))
    };
    for device in devices()? {
        let make = |rule: Rule| -> Result<Trainer<MeanSquaredError>> {
            let mut rng = Rng::seed(4);
            let model = Sequential::new()
                .push(LstmConfig::new(2, 5).init(&device, &mut rng)?)
                .push(LinearConfig::new(5, 1).init(&device, &mut rng)?);
            Ok(Trainer::new(model, MeanSquaredError, rule)?.clip_grad_norm(0.1))
        };
        for rule in [Rule::from(AdamW::new(1e-2)), Rule::from(Sgd::new(0.1).momentum(0.9))] {
            for spoil in [(0, f32::NAN), (1, f32::NAN), (1, f32::INFINITY)] {
                let (mut spoilt, mut clean) = (make(rule)?, make(rule)?);
                spoilt.step(&batch(&device, 1, None)?)?;
                clean.step(&batch(&device, 1, None)?)?;
                let loss = spoilt.step(&batch(&device, 2, Some(spoil))?)?;
                let what = format!("{device:?} {rule:?} {spoil:?}");
                assert!(!loss.item()?.is_finite(), "{what}: the loss tells");
                assert_eq!(bits(&weights(spoilt.model())?), bits(&weights(clean.model())?), "{what}");
                let stats = spoilt.stats()?;
                assert_eq!((stats.steps, stats.skipped, spoilt.steps()), (1, 1, 2), "{what}");
                // The moments have not seen it either.
                let next = batch(&device, 3, None)?;
                let losses = [spoilt.step(&next)?.item()?, clean.step(&next)?.item()?];
                assert!(losses[0].is_finite() && losses[0].to_bits() == losses[1].to_bits(), "{what}: {losses:?}");
                assert_eq!(bits(&weights(spoilt.model())?), bits(&weights(clean.model())?), "{what}: the next step");
                assert_eq!((spoilt.stats()?.steps, spoilt.stats()?.skipped), (2, 1), "{what}");
            }
        }
    }
    Ok(())
}

/// A scale is a power of two: where nothing overflows, it changes no bit.
#[test]
fn a_scaled_loss_changes_no_bit_of_single_precision() -> Result<()> {
    for device in devices()? {
        let batches = batches(&device, 6)?;
        for rule in [Rule::from(AdamW::new(1e-2)), Rule::from(Sgd::new(0.5).momentum(0.9).weight_decay(0.01))] {
            let mut plain = trainer(&device, 1, 0.3, rule)?.clip_grad_value(0.05);
            // It grows on the way.
            let scaling = LossScale::dynamic().initial(1024.0).growth_interval(2);
            let mut scaled = trainer(&device, 1, 0.3, rule)?.clip_grad_value(0.05).loss_scaling(scaling);
            let (expected, losses) = (run(&mut plain, &batches)?, run(&mut scaled, &batches)?);
            assert_eq!(bits(&losses), bits(&expected), "{device:?} {rule:?}: losses");
            assert_eq!(bits(&weights(scaled.model())?), bits(&weights(plain.model())?), "{device:?} {rule:?}: weights");
            let (stats, plain) = (scaled.stats()?, plain.stats()?);
            assert_eq!((stats.loss_scale, plain.loss_scale), (8192.0, 1.0), "{device:?} {rule:?}");
            let (norm, expected) = (stats.grad_norm, plain.grad_norm);
            assert_eq!(
                (norm, stats.clipped, stats.clipped_values),
                (expected, plain.clipped, plain.clipped_values),
                "{device:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn half_precision_halves_the_scale_until_gradients_fit_and_resumes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for device in devices()? {
        let mut rng = Rng::seed(6);
        let x = Tensor::from_slice(&device, &normals(&mut rng, 4 * 3 * 2), [4, 3, 2])?;
        // Far away: the gradient of the loss by y is near -17, so that a scale of 2^16 takes it out of half precision.
        let batch = Batch::new(x, Tensor::from_slice(&device, &[100.0; 12], [4, 3, 1])?);
        let make = || -> Result<Trainer<MeanSquaredError>> {
            let mut rng = Rng::seed(4);
            let model = Sequential::new()
                .push(LstmConfig::new(2, 5).precision(Precision::Half).init(&device, &mut rng)?)
                .push(LinearConfig::new(5, 1).precision(Precision::Half).init(&device, &mut rng)?);
            let trainer = Trainer::new(model, MeanSquaredError, AdamW::new(1e-2))?.clip_grad_norm(1.0);
            Ok(trainer.loss_scaling(LossScale::dynamic().growth_interval(4)))
        };
        let mut whole = make()?;
        let start = weights(whole.model())?;
        let mut skipped = 0;
        let loss = whole.step(&batch)?.item()?;
        while whole.stats()?.steps == 0 {
            skipped += 1;
            let stats = whole.stats()?;
            assert_eq!((stats.skipped, stats.loss_scale), (skipped, 65_536.0 / 2.0f32.powi(skipped as i32)), "{device:?}");
            assert_eq!(bits(&weights(whole.model())?), bits(&start), "{device:?}: a skipped step");
            ensure!(skipped < 10, "{device:?}: never fits");
            assert_eq!(whole.step(&batch)?.item()?, loss, "{device:?}: the loss is not scaled");
        }
        ensure!(skipped >= 2, "{device:?}: {skipped} skipped");
        let path = folder.path().join("half.safetensors");
        whole.save(&path)?;
        let mut resumed = make()?;
        resumed.load(&path)?;
        let batches = vec![batch; 9];
        let (expected, losses) = (run(&mut whole, &batches)?, run(&mut resumed, &batches)?);
        assert_eq!(bits(&losses), bits(&expected), "{device:?}: losses");
        assert_eq!(bits(&weights(resumed.model())?), bits(&weights(whole.model())?), "{device:?}: weights");
        // As text: the norm of a gradient that did not fit is NaN.
        assert_eq!(format!("{:?}", resumed.stats()?), format!("{:?}", whole.stats()?), "{device:?}");
        // It has grown and halved again.
        ensure!(whole.stats()?.skipped > skipped && expected[8] < loss, "{device:?}: {:?}", whole.stats()?);
    }
    Ok(())
}

#[test]
fn a_refused_batch_changes_nothing() -> Result<()> {
    for device in devices()? {
        let batches = batches(&device, 2)?;
        let (mut refused, mut clean) = (trainer(&device, 1, 0.3, AdamW::new(1e-2))?, trainer(&device, 1, 0.3, AdamW::new(1e-2))?);
        // The loss refuses after the forward pass.
        let targets = Ids::from_slice(&device, &[8; 20], [4, 5])?;
        let short = Batch::new(Ids::from_slice(&device, &[1; 30], [6, 5])?, targets);
        assert!(refused.step(&short).is_err());
        // The optimizer refuses after the backward pass: its gradients must not reach the next step.
        refused.set_learning_rate(f64::NAN);
        assert!(refused.step(&batches[1]).is_err());
        refused.set_learning_rate(1e-2);
        assert_eq!(refused.steps(), 0);
        assert_eq!(bits(&run(&mut refused, &batches)?), bits(&run(&mut clean, &batches)?), "{device:?}");
    }
    Ok(())
}

// ---- state ----

#[test]
fn carried_state_equals_one_long_pass() -> Result<()> {
    let mut rng = Rng::seed(6);
    let (x, targets) = (normals(&mut rng, 12 * 3 * 2), normals(&mut rng, 12 * 3));
    for device in devices()? {
        let mut rng = Rng::seed(4);
        let model = Sequential::new()
            .push(LinearConfig::new(2, 4).init(&device, &mut rng)?)
            .push(LstmConfig::new(4, 6).layers(2).init(&device, &mut rng)?)
            .push(LinearConfig::new(6, 1).init(&device, &mut rng)?);
        let mut trainer = Trainer::new(model, MeanSquaredError, Sgd::new(0.05))?;
        let window = |from: usize, to: usize| -> Result<Batch> {
            let x = Tensor::from_slice(&device, &x[from * 6..to * 6], [to - from, 3, 2])?;
            Ok(Batch::new(x, Tensor::from_slice(&device, &targets[from * 3..to * 3], [to - from, 3, 1])?))
        };
        let long = trainer.evaluate(&window(0, 12)?)?;
        let (mut state, mut sum) = (None, 0.0);
        for (from, to) in [(0, 5), (5, 6), (6, 12)] {
            let outcome = trainer.evaluate(&window(from, to)?.state(state))?;
            sum += f64::from(outcome.item()?) * (to - from) as f64;
            state = Some(outcome.state);
        }
        close(format!("{device:?}: loss"), &[long.item()?], &[sum / 12.0], 1e-6)?;
        let state = state.context("three windows ran")?;
        for (last, expected) in state.layer(1).iter().zip(long.state.layer(1)) {
            close(format!("{device:?}: state"), &last.to_vec()?, &wide(&expected.to_vec()?), 1e-6)?;
        }
        assert_eq!((state.layer(0).len(), state.layer(1).len(), state.layer(2).len(), state.layer(7).len()), (0, 2, 0, 0));

        // Truncated back-propagation: the state goes on from step to step, gradients do not.
        let mut losses = Vec::new();
        for _ in 0..10 {
            let (mut state, mut sum) = (None, 0.0);
            for (from, to) in [(0, 4), (4, 8), (8, 12)] {
                let batch = window(from, to)?.state(state);
                let expected = trainer.evaluate(&batch)?.item()?;
                let outcome = trainer.step(&batch)?;
                close(format!("{device:?}: step against evaluate"), &[outcome.item()?], &[f64::from(expected)], 1e-6)?;
                sum += outcome.item()?;
                state = Some(outcome.state);
            }
            losses.push(sum);
        }
        assert!(losses[9] < losses[0], "{device:?}: {losses:?}");
    }
    Ok(())
}

/// Padding a batch with rows of length 0 changes neither the loss nor any gradient, also behind LastStep.
#[test]
fn a_batchs_targets_teach_the_last_layer() -> Result<()> {
    for device in devices()? {
        let layers = || -> Result<_> {
            let rng = &mut Rng::seed(5);
            Ok([RnnConfig::new(3, 4).jordan(2).init(&device, rng)?, RnnConfig::new(2, 4).jordan(2).init(&device, rng)?])
        };
        let rng = &mut Rng::seed(6);
        let [x, target] = [3, 2].map(|width| Tensor::from_slice(&device, &normals(rng, 5 * 4 * width), [5, 4, width]));
        let (x, target) = (x?, target?);
        // By hand: the first layer runs free, the last one sees the targets.
        let [first, last] = layers()?;
        let between = first.forward(&x, None)?.0;
        let loss = |input| MeanSquaredError.loss(&last.forward(&between, input)?.0, &Value::from(&target), None)?.item();
        let (by_hand, free) = (loss(Input::new().teacher(&target, 1.0))?, loss(Input::new())?);
        ensure!((by_hand - free).abs() > 1e-3, "{device:?}: the teacher makes no difference: {by_hand} and {free}");

        let model = layers()?.into_iter().fold(Sequential::new(), Sequential::push);
        let mut trainer = Trainer::new(model, MeanSquaredError, Sgd::new(0.1))?;
        let batch = |p: Option<f32>| Batch::new(&x, &target).teacher(p);
        for (p, expected) in [(Some(1.0), by_hand), (Some(0.0), free), (None, free)] {
            let loss = trainer.evaluate(&batch(p))?.item()?;
            ensure!((loss - expected).abs() <= 1e-6, "{device:?}: teacher {p:?} gives {loss}, expected {expected}");
        }
        let sampled = trainer.step(&batch(Some(0.5)))?.item()?;
        ensure!(
            (sampled - by_hand).abs() > 1e-4 && (sampled - free).abs() > 1e-4,
            "{device:?}: scheduled sampling gives {sampled}"
        );
        let taught = trainer.evaluate(&batch(Some(1.0)))?.item()?;
        let stepped = trainer.step(&batch(Some(1.0)))?.item()?;
        ensure!((stepped - taught).abs() <= 1e-6, "{device:?}: a taught step's loss is {stepped}, expected {taught}");
    }
    Ok(())
}

#[test]
fn empty_rows_do_not_count() -> Result<()> {
    let mut rng = Rng::seed(8);
    let (x, targets) = (normals(&mut rng, 5 * 2 * 3), normals(&mut rng, 2));
    for device in devices()? {
        let run = |rows: usize, lengths: &[u32]| -> Result<(Vec<f32>, Vec<f32>)> {
            let rng = &mut Rng::seed(9);
            let model = Sequential::new()
                .push(LstmConfig::new(3, 6).init(&device, rng)?)
                .push(LastStep)
                .push(LinearConfig::new(6, 1).init(&device, rng)?);
            let mut trainer = Trainer::new(model, MeanSquaredError, Sgd::new(0.1))?;
            let of_rows = |values: &[f32], width: usize| -> Vec<f32> {
                values.chunks(2 * width).flat_map(|step| step[..rows * width].to_vec()).collect()
            };
            let x = Tensor::from_slice(&device, &of_rows(&x, 3), [5, rows, 3])?;
            let target = Tensor::from_slice(&device, &targets[..rows], [rows, 1])?;
            let lengths = Lengths::from_slice(&device, lengths)?;
            let loss = trainer.step(&Batch::new(x, target).lengths(lengths))?.item()?;
            Ok((vec![loss], weights(trainer.model())?))
        };
        let ((loss, values), (padded_loss, padded)) = (run(1, &[4])?, run(2, &[4, 0])?);
        close(format!("{device:?}: loss"), &padded_loss, &wide(&loss), 1e-6)?;
        close(format!("{device:?}: weights"), &padded, &wide(&values), 1e-6)?;
    }
    Ok(())
}

#[test]
fn streaming_equals_a_whole_sequence() -> Result<()> {
    for device in devices()? {
        let mut rng = Rng::seed(12);
        let lstm = LstmConfig::new(3, 6).layers(2).init(&device, &mut rng)?;
        let data = normals(&mut rng, 7 * 2 * 3);
        let (y, last) = lstm.forward(&Tensor::from_slice(&device, &data, [7, 2, 3])?, Input::new())?;
        let (mut state, mut outputs) = (None, Vec::new());
        for x in data.chunks_exact(6) {
            let (y, next) = lstm.step(&Tensor::from_slice(&device, x, [2, 3])?, state.as_ref())?;
            outputs.extend(y.to_vec()?);
            state = Some(next);
        }
        let state = state.context("seven steps ran")?;
        close(format!("{device:?}: y"), &outputs, &wide(&y.to_vec()?), 1e-6)?;
        close(format!("{device:?}: h"), &state.h.to_vec()?, &wide(&last.h.to_vec()?), 1e-6)?;
        close(format!("{device:?}: c"), &state.c.to_vec()?, &wide(&last.c.to_vec()?), 1e-6)?;
    }
    Ok(())
}

/// The layers that act on one step alone, inside others too, and the state of a layer inside.
#[test]
fn a_row_of_layers_streams() -> Result<()> {
    for device in devices()? {
        let rng = &mut Rng::seed(12);
        let block = Sequential::new()
            .push(LinearConfig::new(4, 4).init(&device, rng)?)
            .push(Affine::new(&device, 4)?)
            .push(Skip::new(LinearConfig::new(4, 3).init(&device, rng)?))
            .push(Affine::new(&device, 7)?)
            .push(LinearConfig::new(7, 4).init(&device, rng)?);
        let model = Sequential::new()
            .push(EmbeddingConfig::new(9, 4).init(&device, rng)?)
            .push(Dropout::new(0.5)?)
            .push_named("block", Residual::new(block))?
            .push(Affine::new(&device, 4)?);
        let ids = [3, 1, 4, 1, 5, 8];
        let (mut stream, mut whole) = (None, None);
        for ids in ids.chunks(2) {
            // A sequence of one step each: the counters count calls.
            let (y, state) = model.step(Ids::from_slice(&device, ids, [2])?, stream.as_ref())?;
            let (expected, next) = model.forward(Ids::from_slice(&device, ids, [1, 2])?, whole.as_ref())?;
            assert_eq!((y.shape(), expected.shape()), (&[2, 4][..], &[1, 2, 4][..]));
            close(format!("{device:?}: y"), &y.to_vec()?, &wide(&expected.to_vec()?), 1e-6)?;
            (stream, whole) = (Some(state), Some(next));
        }
        for state in [stream, whole] {
            let state: State = state.context("three steps ran")?;
            assert_eq!((state.layer(0).len(), state.layer(1).len(), state.layer(2).len(), state.layer(3).len()), (0, 0, 2, 1));
            for counter in state.layer(2).iter().chain(state.layer(3)) {
                assert_eq!(counter.item()?, 3.0, "{device:?}");
            }
        }
        // What each layer gets of a state is its own.
        let ids = Ids::from_slice(&device, &[3, 1], [2])?;
        let answer = |counters: [f32; 3]| -> Result<Vec<f32>> {
            let [a, b, c] = counters.map(|counter| Tensor::from_slice(&device, &[counter], [1]));
            let state = State::new(vec![vec![], vec![], vec![a?, b?], vec![c?]]);
            Ok(model.step(&ids, &state)?.0.to_vec()?)
        };
        let zeros = answer([0.0; 3])?;
        let last = answer([0.0, 0.0, 2.0])?;
        close(
            format!("{device:?}: the last counter"),
            &last,
            &zeros.iter().map(|y| f64::from(*y) + 2.0).collect::<Vec<_>>(),
            1e-6,
        )?;
        let (first, second) = (answer([1.0, 0.0, 0.0])?, answer([0.0, 1.0, 0.0])?);
        assert!(first != second && first != zeros && second != zeros, "{device:?}");
    }
    Ok(())
}

/// From y alone the states that the layer itself gives, in each direction.
#[test]
fn last_state_is_the_layers_final_state() -> Result<()> {
    let x = normals(&mut Rng::seed(5), 6 * 3 * 2);
    for device in devices()? {
        let x = Tensor::from_slice(&device, &x, [6, 3, 2])?;
        let lengths = Lengths::from_slice(&device, &[6, 0, 3])?;
        for (direction, directions) in [(Direction::Forward, 1), (Direction::Reverse, 1), (Direction::Both, 2)] {
            let lstm = LstmConfig::new(2, 5).direction(direction).init(&device, &mut Rng::seed(1))?;
            for lengths in [None, Some(&lengths)] {
                let (y, state) = lstm.forward(&x, Input::new().lengths(lengths))?;
                let context = Context { lengths, ..Context::default() };
                let last = LastState::new(direction).forward(&Value::from(y), &context)?.y;
                assert_eq!(last.shape(), [3, 5 * directions]);
                let h = state.h.to_vec()?;
                let at = |row: usize, column: usize| h[column / 5 * 15 + row * 5 + column % 5];
                let expected: Vec<f32> = (0..15 * directions).map(|i| at(i / (5 * directions), i % (5 * directions))).collect();
                assert_eq!(bits(&last.to_vec()?), bits(&expected), "{device:?} {direction:?} {lengths:?}");
            }
        }
    }
    Ok(())
}

/// Kernels wait with buffers locked: a worker that took up another of these tasks meanwhile would wait for itself.
#[test]
fn an_application_may_call_from_its_own_thread_pool() -> Result<()> {
    use rayon::prelude::*;
    let device = Device::cpu();
    let (shape, tasks) = ([16, 32, 64], 24);
    let lstm = LstmConfig::new(64, 64).init(&device, &mut Rng::seed(3))?;
    let x = Tensor::from_slice(&device, &normals(&mut Rng::seed(4), shape.iter().product()), shape)?;
    let train = || -> gatefold::Result<()> {
        let (y, _, tape) = lstm.forward_train(&x, None)?;
        lstm.backward(tape, &y, None).map(|_| ())
    };
    train()?;
    let gradients = || lstm.params().into_iter().map(|(_, param)| param.grad().to_vec()).collect::<gatefold::Result<Vec<_>>>();
    let once = gradients()?;
    lstm.zero_grad()?;
    // One task a piece, so that there is always one more to take up.
    (0..tasks).into_par_iter().with_max_len(1).try_for_each(|_| train())?;
    for (all, one) in gradients()?.iter().zip(&once) {
        let expected: Vec<f64> = one.iter().map(|value| f64::from(*value) * f64::from(tasks)).collect();
        close("the sum over all tasks", all, &expected, 1e-5)?;
    }
    Ok(())
}

/// Ragged sources to ragged targets: what was trained is what decoding writes. 1 starts a target, 2 ends it.
#[test]
fn an_encoder_decoder_overfits_and_writes_what_it_learnt() -> Result<()> {
    const STEPS: usize = 120;
    let (rows, steps) = (12, 6);
    let mut rng = Rng::seed(13);
    let mut sequence = |low: u32, row: usize| -> Vec<u32> { (0..row % steps).map(|_| low + rng.below(6) as u32).collect() };
    let sources: Vec<Vec<u32>> = (0..rows).map(|row| [sequence(1, row * 5 + 3), vec![7 + row as u32]].concat()).collect();
    let targets: Vec<Vec<u32>> = (0..rows).map(|row| sequence(3, row)).collect();
    let framed = |first: &[u32], last: &[u32]| targets.iter().map(|t| [first, t, last].concat()).collect::<Vec<_>>();
    for device in devices()? {
        let ids = |sequences: &[Vec<u32>]| -> Result<(Ids, Lengths)> {
            let padded = gatefold::data::pad(sequences, PAD)?;
            let ids = Ids::from_slice(&device, &padded.ids, [padded.steps, padded.rows])?;
            Ok((ids, Lengths::from_slice(&device, &padded.lengths)?))
        };
        let ((source, lengths), (seen, _)) = (ids(&sources)?, ids(&framed(&[1], &[]))?);
        let (said, target_lengths) = ids(&framed(&[], &[2]))?;
        let batch = Batch::new(seen, said).lengths(target_lengths).source(&source, lengths.clone());
        let make = || -> Result<Trainer<CrossEntropy, GruEncoderDecoder>> {
            let rnn = GruConfig::new(8, 24).layers(2).dropout(0.1);
            let model = EncoderDecoderConfig::new(7 + rows, 9, rnn).reverse_source(true).init(&device, &mut Rng::seed(2))?;
            Ok(Trainer::new(model, CrossEntropy::new(), AdamW::new(2e-2).weight_decay(0.0))?.clip_grad_norm(1.0))
        };
        let mut trainer = make()?;
        let mut losses = Vec::new();
        for _ in 0..STEPS {
            let before = device.submissions();
            losses.push(trainer.step(&batch)?);
            assert_eq!(device.submissions(), before + u64::from(!device.is_cpu()), "{device:?}: a step is one submission");
        }
        let [first, last] = [losses[0].item()?, losses[STEPS - 1].item()?];
        assert!(last < 0.1 * first, "{device:?}: from {first} to {last}");
        assert!(trainer.evaluate(&batch)?.item()? < 0.02, "{device:?}");
        let decoding = Decoding { start: 1, end: Some(2), pad: PAD, max_steps: steps + 2, choice: Choice::Greedy };
        let decoded = trainer.model().decode(&source, Some(&lengths), decoding)?;
        assert_eq!(decoded.rows()?, targets, "{device:?}");
        let ends: Vec<u32> = targets.iter().map(|target| target.len() as u32 + 1).collect();
        assert_eq!(decoded.lengths()?, ends, "{device:?}");

        // A trainer's file goes on with the same bits.
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("run.safetensors");
        trainer.save(&path)?;
        let mut resumed = make()?;
        resumed.load(&path)?;
        let losses = [trainer.step(&batch)?.item()?, resumed.step(&batch)?.item()?];
        assert_eq!(losses[0].to_bits(), losses[1].to_bits(), "{device:?}");
    }
    Ok(())
}

#[test]
fn an_lstm_overfits_a_ragged_batch() -> Result<()> {
    const STEPS: usize = 80;
    let device = Device::cpu();
    let mut rng = Rng::seed(2);
    let model = Sequential::new()
        .push(EmbeddingConfig::new(9, 8).padding(PAD).init(&device, &mut rng)?)
        .push(LstmConfig::new(8, 24).forget_bias(1.0).init(&device, &mut rng)?)
        .push(LinearConfig::new(24, 9).init(&device, &mut rng)?);
    let mut trainer = Trainer::new(model, CrossEntropy::ignoring(PAD), AdamW::new(3e-2).weight_decay(0.0))?.clip_grad_norm(1.0);
    // Every row begins with another id, so that all targets can be learnt.
    let ids: Vec<u32> = (0..30).map(|at| 1 + (at % 5 + at / 5 * 3) % 8).collect();
    let targets: Vec<u32> = (0..30).map(|_| rng.below(9) as u32).collect();
    let batch = Batch::new(Ids::from_slice(&device, &ids, [6, 5])?, Ids::from_slice(&device, &targets, [6, 5])?)
        .lengths(Lengths::from_slice(&device, &[6, 1, 4, 0, 5])?);
    let losses = run(&mut trainer, &vec![batch; STEPS])?;
    assert!(losses[STEPS - 1] < 0.01 * losses[0], "from {} to {} in {STEPS} steps", losses[0], losses[STEPS - 1]);
    Ok(())
}
