//! What layers and optimizers tell of themselves: gates, saturation, the first number that is none, spectral radii, clips.

mod common;

use anyhow::{Context as _, Result, ensure};
use common::{adapters, devices};
use gatefold::nn::{
    Activation, Cell, Direction, GruConfig, Input, LinearConfig, LstmConfig, Module, NonFinite, Quantity, Recurrent,
    RecurrentConfig, Reset, RnnConfig, Sequential, Verdict,
};
use gatefold::optim::Sgd;
use gatefold::{
    Batch, Device, ErrorKind, KernelOverride, LayerOrder, Lengths, MeanSquaredError, PairKernel, Rng, SweepKernel, Tensor,
    Trainer,
};

const STEPS: usize = 4;
const ROWS: usize = 3;
const INPUT: usize = 2;
const HIDDEN: usize = 5;

fn values<C: Cell>(layer: &Recurrent<C>, name: &str) -> Result<Vec<f32>> {
    let params = layer.params();
    let (_, param) = params.iter().find(|(known, _)| known == name).with_context(|| format!("no {name}"))?;
    Ok(param.value().to_vec()?)
}

fn set<C: Cell>(layer: &Recurrent<C>, name: &str, values: &[f32]) -> Result<()> {
    let params = layer.params();
    let (_, param) = params.iter().find(|(known, _)| known == name).with_context(|| format!("no {name}"))?;
    Ok(param.set(values)?)
}

fn x(device: &Device) -> gatefold::Result<Tensor> {
    let mut rng = Rng::seed(4);
    let numbers: Vec<f32> = (0..STEPS * ROWS * INPUT).map(|_| rng.normal()).collect();
    Tensor::from_slice(device, &numbers, [STEPS, ROWS, INPUT])
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A layer's gates, each from x and the state before the step, by the textbook; zeros past a row's end.
fn check_gates<C: Cell>(layer: &Recurrent<C>, device: &Device, gate: impl Fn(&str, f64, f64, f64) -> f64) -> Result<()> {
    let (x, ends) = (x(device)?, [STEPS, 2, 0]);
    let lengths = Lengths::from_slice(device, &ends.map(|n| n as u32))?;
    let (.., tape) = layer.forward_train(&x, Input::new().lengths(&lengths))?;
    let x = x.to_vec()?;
    for (direction, suffix) in [(Direction::Forward, "l0"), (Direction::Reverse, "l0_reverse")] {
        let seen = layer.inspect(&tape, 0, direction)?;
        let h = seen.state("h").context("no h")?.to_vec()?;
        let part = |name: &str| values(layer, &format!("{name}_{suffix}"));
        let (w, u, b, c) = (part("weight_ih")?, part("weight_hh")?, part("bias_ih")?, part("bias_hh")?);
        ensure!(seen.gates().len() == C::GATES.len() && seen.gate("none").is_none());
        for (g, (name, tensor)) in seen.gates().iter().enumerate() {
            ensure!(*name == C::GATES[g] && tensor.shape() == [STEPS, ROWS, HIDDEN]);
            let first = |at: usize| seen.gates()[0].1.to_vec().map(|values| f64::from(values[at]));
            for (at, value) in tensor.to_vec()?.into_iter().enumerate() {
                let (t, row, unit) = (at / HIDDEN / ROWS, at / HIDDEN % ROWS, at % HIDDEN);
                if t >= ends[row] {
                    ensure!(value == 0.0, "{name} past the end is {value}");
                    continue;
                }
                let before = match direction {
                    Direction::Reverse => (t + 1 < ends[row]).then_some(t + 1),
                    _ => t.checked_sub(1),
                };
                let line = g * HIDDEN + unit;
                let dot = |weights: &[f32], values: &[f32]| -> f64 {
                    weights.iter().zip(values).map(|(w, v)| f64::from(*w) * f64::from(*v)).sum()
                };
                let input = dot(&w[line * INPUT..][..INPUT], &x[(t * ROWS + row) * INPUT..]) + f64::from(b[line]);
                let product =
                    before.map_or(0.0, |t| dot(&u[line * HIDDEN..][..HIDDEN], &h[(t * ROWS + row) * HIDDEN..][..HIDDEN]));
                let expected = gate(name, input, product + f64::from(c[line]), first(at)?);
                ensure!((f64::from(value) - expected).abs() < 1e-5, "{name} at {at} is {value}, expected {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn gates_by_hand() -> Result<()> {
    for device in devices()? {
        let rng = &mut Rng::seed(1);
        let lstm = LstmConfig::new(INPUT, HIDDEN).direction(Direction::Both).init(&device, rng)?;
        check_gates(&lstm, &device, |name, x, r, _| if name == "g" { (x + r).tanh() } else { sigmoid(x + r) })?;
        let gru = GruConfig::new(INPUT, HIDDEN).direction(Direction::Both).init(&device, rng)?;
        check_gates(&gru, &device, |name, x, r, reset| if name == "n" { (x + reset * r).tanh() } else { sigmoid(x + r) })?;
        let rnn = RnnConfig::new(INPUT, HIDDEN).direction(Direction::Both).init(&device, rng)?;
        check_gates(&rnn, &device, |_, x, r, _| (x + r).tanh())?;
    }
    Ok(())
}

#[test]
fn saturation() -> Result<()> {
    for device in devices()? {
        let rng = &mut Rng::seed(1);
        let lstm = LstmConfig::new(INPUT, HIDDEN).init(&device, rng)?;
        // i is always 1, f always 0, g always -1, o near 1/2; of i one unit in five is free.
        let bias: Vec<f32> = [30.0, -30.0, -30.0, 0.0].iter().flat_map(|b| [*b; HIDDEN]).collect();
        let mut bias_i = bias.clone();
        bias_i[0] = 0.0;
        set(&lstm, "bias_ih_l0", &bias_i)?;
        let lengths = Lengths::from_slice(&device, &[4, 1, 0])?;
        let seen = |input: Input<'_, _>| lstm.inspect(&lstm.forward_train(&x(&device)?, input)?.2, 0, Direction::Forward);
        let shares = seen(Input::new().lengths(&lengths))?.saturation()?;
        ensure!(shares == [("i", Some(0.8)), ("f", Some(1.0)), ("g", Some(1.0)), ("o", Some(0.0))], "{shares:?}");
        let none = Lengths::from_slice(&device, &[0, 0, 0])?;
        let shares = seen(Input::new().lengths(&none))?.saturation()?;
        ensure!(shares.iter().all(|(_, share)| share.is_none()), "{shares:?}");

        let relu = RnnConfig::new(INPUT, HIDDEN).activation(Activation::Relu).init(&device, rng)?;
        let shares = relu.inspect(&relu.forward_train(&x(&device)?, None)?.2, 0, Direction::Forward)?.saturation()?;
        ensure!(shares == [("h", None)], "{shares:?}");
        let coupled = LstmConfig::new(INPUT, HIDDEN).coupled(true).init(&device, rng)?;
        let shares = coupled.inspect(&coupled.forward_train(&x(&device)?, None)?.2, 0, Direction::Forward)?.saturation()?;
        ensure!(shares[1] == ("f", None) && shares[0].1.is_some(), "{shares:?}");
    }
    Ok(())
}

/// Text, place and quantity of what was found first.
fn expect(found: Option<NonFinite>, place: (usize, Direction, [usize; 3]), quantity: Quantity, text: &str) -> Result<()> {
    let found = found.context("nothing was found")?;
    let given = (found.layer, found.direction, [found.step, found.row, found.unit]);
    ensure!(given == place && found.quantity == quantity && !found.value.is_finite(), "{found:?}");
    ensure!(found.to_string() == text, "{found}");
    Ok(())
}

#[test]
fn the_first_number_that_is_none() -> Result<()> {
    for device in devices()? {
        let rng = &mut Rng::seed(1);
        let deep = || LstmConfig::new(INPUT, HIDDEN).layers(2).direction(Direction::Both);
        let lstm = deep().init(&device, rng)?;
        let clean = x(&device)?;
        ensure!(lstm.first_non_finite(&lstm.forward_train(&clean, None)?.2)?.is_none());

        // In x, in a step of a row; the same past the row's end is not there.
        let mut numbers = clean.to_vec()?;
        numbers[(2 * ROWS + 1) * INPUT + 1] = f32::NAN;
        let bad = Tensor::from_slice(&device, &numbers, [STEPS, ROWS, INPUT])?;
        let found = lstm.first_non_finite(&lstm.forward_train(&bad, None)?.2)?;
        expect(found, (0, Direction::Forward, [2, 1, 1]), Quantity::Input, "layer 0, Forward, step 2, row 1, unit 1: x is NaN")?;
        let lengths = Lengths::from_slice(&device, &[4, 2, 3])?;
        ensure!(lstm.first_non_finite(&lstm.forward_train(&bad, Input::new().lengths(&lengths))?.2)?.is_none());

        // In a weight of the second layer: of f, unit 3, read in reverse, from the row's own end.
        let (name, row) = ("weight_hh_l1_reverse", HIDDEN + 3);
        let mut weights = values(&lstm, name)?;
        weights[row * HIDDEN] = f32::NAN;
        set(&lstm, name, &weights)?;
        let (.., tape) = lstm.forward_train(&clean, Input::new().lengths(&Lengths::from_slice(&device, &[1, 3, 0])?))?;
        let text = "layer 1, Reverse, step 2, row 1, unit 3: gate f is NaN";
        expect(lstm.first_non_finite(&tape)?, (1, Direction::Reverse, [2, 1, 3]), Quantity::Gate("f"), text)?;

        // A state whose gates are as they should be: in the projection, of its third number.
        let projected = LstmConfig::new(INPUT, HIDDEN).projection(3).init(&device, rng)?;
        let mut weights = values(&projected, "weight_hr_l0")?;
        weights[2 * HIDDEN] = f32::INFINITY;
        set(&projected, "weight_hr_l0", &weights)?;
        let found = projected.first_non_finite(&projected.forward_train(&clean, None)?.2)?;
        let text = found.map(|found| format!("layer 0, Forward, step 0, row 0, unit 2: state h is {}", found.value));
        expect(found, (0, Direction::Forward, [0, 0, 2]), Quantity::State("h"), &text.unwrap_or_default())?;

        // Going back: dy is not a number at one place, and all that lies before it in the forward direction.
        let lstm = deep().init(&device, rng)?;
        let mut dy = vec![1.0; STEPS * ROWS * 2 * HIDDEN];
        dy[(2 * ROWS + 1) * 2 * HIDDEN + 4] = f32::NAN;
        let dy = Tensor::from_slice(&device, &dy, [STEPS, ROWS, 2 * HIDDEN])?;
        let (.., flow) = lstm.backward_with_flow(lstm.forward_train(&clean, None)?.2, &dy, None)?;
        let text = "layer 1, Forward, step 2, row 1, unit 4: the gradient of state h is NaN";
        expect(flow.first_non_finite(), (1, Direction::Forward, [2, 1, 4]), Quantity::Gradient("h"), text)?;
        let states = flow.states().iter().map(|flow| flow.first_non_finite());
        // The layer below: from the same step on forward in time; in reverse from the first step, which comes first going back.
        let expected = [Some(2), Some(2), Some(0), Some(0), Some(2), Some(2), None, None];
        ensure!(states.clone().eq(expected), "{:?}", states.collect::<Vec<_>>());
        ensure!(flow.verdict() == Verdict::Exploding);
    }
    Ok(())
}

#[test]
fn vanishing_exploding_and_neither() -> Result<()> {
    const T: usize = 80;
    for device in devices()? {
        let judge = |scale: f32| -> Result<(Verdict, f64)> {
            let rnn =
                RnnConfig::new(1, 8).activation(Activation::Affine { alpha: 1.0, beta: 0.0 }).init(&device, &mut Rng::seed(0))?;
            let diagonal: Vec<f32> = (0..64).map(|at| if at % 9 == 0 { scale } else { 0.0 }).collect();
            set(&rnn, "weight_hh_l0", &diagonal)?;
            let radii = rnn.spectral_radii()?;
            ensure!(radii.len() == 1 && (radii[0].gates[0].1 - f64::from(scale)).abs() < 1e-7, "{radii:?}");
            let mut dy = vec![0.0; T * 8];
            dy[(T - 1) * 8..].fill(1.0);
            let dy = Tensor::from_slice(&device, &dy, [T, 1, 8])?;
            let (.., tape) = rnn.forward_train(&Tensor::zeros(&device, [T, 1, 1])?, None)?;
            let (.., flow) = rnn.backward_with_flow(tape, &dy, None)?;
            let h = flow.state(0, Direction::Forward, "h").context("no h")?;
            Ok((flow.verdict(), h.decay().context("no decay")?))
        };
        for (scale, verdict) in [(0.5, Verdict::Vanishing), (1.0, Verdict::Healthy), (1.25, Verdict::Exploding)] {
            let (given, decay) = judge(scale)?;
            ensure!(given == verdict && (decay - f64::from(scale)).abs() < 1e-6, "{scale}: {given:?}, {decay}");
        }
    }
    Ok(())
}

#[test]
fn spectral_radii_by_layer_direction_and_gate() -> Result<()> {
    let device = Device::cpu();
    let gru = GruConfig::new(2, 2).layers(2).direction(Direction::Both).init(&device, &mut Rng::seed(0))?;
    // Of r: diagonal; z: a quarter turn by 3; n: nilpotent.
    set(&gru, "weight_hh_l1_reverse", &[0.5, 0.0, 0.0, -2.0, 0.0, -3.0, 3.0, 0.0, 0.0, 7.0, 0.0, 0.0])?;
    let radii = gru.spectral_radii()?;
    let places: Vec<_> = radii.iter().map(|radii| (radii.layer, radii.direction)).collect();
    let (forward, reverse) = (Direction::Forward, Direction::Reverse);
    ensure!(places == [(0, forward), (0, reverse), (1, forward), (1, reverse)], "{places:?}");
    for ((name, radius), (expected_name, expected)) in radii[3].gates.iter().zip([("r", 2.0), ("z", 3.0), ("n", 0.0)]) {
        ensure!(*name == expected_name && (radius - expected).abs() < 1e-9, "{radii:?}");
    }
    // Through the output: W_hr W_hh = [1 2] [3; 4] = 11.
    let jordan = RnnConfig::new(1, 2).jordan(1).init(&device, &mut Rng::seed(0))?;
    set(&jordan, "weight_hh_l0", &[3.0, 4.0])?;
    set(&jordan, "weight_hr_l0", &[1.0, 2.0])?;
    let radius = jordan.spectral_radii()?[0].gates[0].1;
    ensure!((radius - 11.0).abs() < 1e-9, "{radius}");
    Ok(())
}

#[test]
fn gradients_clipped_by_value() -> Result<()> {
    for device in devices()? {
        // dL/dw = dL/db = 2 (w + b - 10): both move by the limit and no more.
        let step = |norm: Option<f64>, limit: f64| -> Result<(Vec<f32>, gatefold::optim::Stats)> {
            let model = Sequential::new().push(LinearConfig::new(1, 1).init(&device, &mut Rng::seed(0))?);
            let before = read(&model)?;
            let mut trainer = Trainer::new(model, MeanSquaredError, Sgd::new(1.0))?.clip_grad_value(limit);
            if let Some(norm) = norm {
                trainer = trainer.clip_grad_norm(norm);
            }
            let batch = Batch::new(Tensor::from_slice(&device, &[1.0], [1, 1])?, Tensor::from_slice(&device, &[10.0], [1, 1])?);
            trainer.step(&batch)?;
            let moved = read(trainer.model())?.iter().zip(&before).map(|(after, before)| after - before).collect();
            Ok((moved, trainer.stats()?))
        };
        let (moved, stats) = step(None, 0.125)?;
        ensure!(moved.iter().all(|moved| (moved - 0.125).abs() < 1e-6), "{moved:?}");
        ensure!((stats.value_clipped, stats.clipped_values, stats.clipped) == (1, 2, 0), "{stats:?}");
        // The norm comes first: its bound of 0.1 leaves elements of 0.07.
        let (moved, stats) = step(Some(0.1), 0.125)?;
        ensure!(moved.iter().all(|moved| (moved - 0.0707).abs() < 1e-4), "{moved:?}");
        ensure!((stats.value_clipped, stats.clipped_values, stats.clipped) == (0, 0, 1), "{stats:?}");
        let (moved, stats) = step(Some(0.1), 0.05)?;
        ensure!(moved.iter().all(|moved| (moved - 0.05).abs() < 1e-6), "{moved:?}");
        ensure!((stats.value_clipped, stats.clipped_values, stats.clipped) == (1, 2, 1), "{stats:?}");
    }
    Ok(())
}

fn read(model: &Sequential) -> Result<Vec<f32>> {
    let parts = model.params().into_iter().map(|(_, param)| param.value().to_vec());
    Ok(parts.collect::<gatefold::Result<Vec<_>>>()?.concat())
}

/// Forward and backward of a layer with this configuration.
fn train<C: Cell>(device: &Device, config: RecurrentConfig<C>) -> gatefold::Result<()> {
    let layer = config.init(device, &mut Rng::seed(1))?;
    let (y, _, tape) = layer.forward_train(&x(device)?, None)?;
    layer.backward(tape, &y, None).map(|_| ())
}

/// Launches of kernels with this in their names, where the device has a clock of kernels, which can tell.
fn launches(device: &Device, kernel: &str, work: impl FnOnce() -> gatefold::Result<()>) -> Result<Option<usize>> {
    match device.profile(work) {
        Ok(times) => Ok(Some(times.iter().filter(|time| time.kernel.contains(kernel)).map(|time| time.launches).sum())),
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How many launches a step takes, of one direction and of both.
#[test]
fn directions_share_the_launches_of_a_step() -> Result<()> {
    type Run = fn(&Device, Direction) -> gatefold::Result<()>;
    let steps = KernelOverride::default().sweep(SweepKernel::Step).pair(PairKernel::Fused);
    let lstm: Run = |device, direction| train(device, LstmConfig::new(INPUT, HIDDEN).direction(direction));
    let projection: Run = |device, direction| train(device, LstmConfig::new(INPUT, HIDDEN).projection(3).direction(direction));
    let reset: Run =
        |device, direction| train(device, GruConfig::new(INPUT, HIDDEN).reset(Reset::BeforeProduct).direction(direction));
    let norm: Run = |device, direction| train(device, LstmConfig::new(INPUT, HIDDEN).layer_norm(true).direction(direction));
    // Of T steps forward and backward. Backward by steps has a launch more, for the gradient of the initial state. What a grid does
    // hangs on how many workgroups run at once.
    let cases = [
        ("_resident_", steps.sweep(SweepKernel::Resident), lstm, [2, 2]),
        ("_step_", steps, lstm, [2 * STEPS + 1; 2]),
        ("_step_projected_", steps, projection, [2 * STEPS + 1; 2]),
        ("_step_output_", steps, projection, [2 * STEPS; 2]),
        ("_step_reset_", steps, reset, [2 * STEPS + 1; 2]),
        ("_step_candidate_", steps, reset, [2 * STEPS; 2]),
        ("_step_", steps.pair(PairKernel::Apart), reset, [2 * STEPS; 2]),
        ("lstm_rows_", steps, norm, [2 * STEPS; 2]),
    ];
    let mut clocks = 0;
    for device in adapters()? {
        for (kernel, given, run, expected) in cases {
            device.override_kernels(given)?;
            for (direction, expected) in [Direction::Forward, Direction::Both].into_iter().zip(expected) {
                let Some(launches) = launches(&device, kernel, || run(&device, direction))? else { continue };
                clocks += 1;
                ensure!(launches == expected, "{device:?}, {kernel}, {direction:?}: {launches} launches, expected {expected}");
            }
        }
    }
    ensure!(clocks > 0, "no adapter has a clock");
    Ok(())
}

/// How many launches two layers take, in turn and as a wavefront of blocks of 24, 24 and 16 steps: of steps so many less as layers take
/// together; sweeps that are one launch have one or two a block.
#[test]
fn layers_share_the_launches_of_a_step() -> Result<()> {
    const LONG: usize = 64;
    let steps = KernelOverride::default().sweep(SweepKernel::Step);
    let (shared, backward) = (24 + 16, 15 + 23);
    let cases = [
        ("_step_forward", steps, [2 * LONG, 2 * LONG - shared]),
        // And a launch of each layer for the gradient of the initial state.
        ("_step_backward", steps, [2 * LONG + 2, 2 * LONG + 2 - backward]),
        // The blocks alone, and where one is shorter what is left; backward the last and the first step of the sequence too.
        ("_resident_forward", steps.sweep(SweepKernel::Resident), [2, 5]),
        ("_resident_backward", steps.sweep(SweepKernel::Resident), [2, 8]),
    ];
    let mut clocks = 0;
    for device in adapters()? {
        for (kernel, given, expected) in cases {
            for (order, expected) in LayerOrder::ALL.into_iter().zip(expected) {
                device.override_kernels(given.layers(order))?;
                let layer = LstmConfig::new(INPUT, 32).layers(2).init(&device, &mut Rng::seed(1))?;
                let x = Tensor::zeros(&device, [LONG, 2, INPUT])?;
                let train = || {
                    let (y, _, tape) = layer.forward_train(&x, None)?;
                    layer.backward(tape, &y, None).map(|_| ())
                };
                let Some(launches) = launches(&device, kernel, train)? else { continue };
                clocks += 1;
                ensure!(launches == expected, "{device:?}, {kernel}, {order}: {launches} launches, expected {expected}");
            }
        }
    }
    ensure!(clocks > 0, "no adapter has a clock");
    Ok(())
}
