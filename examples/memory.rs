//! Long-term dependencies: which networks remember over hundreds of steps? Trains a vanilla RNN, one that starts with orthogonal
//! recurrent weights, a GRU and an LSTM, each with and without clipping of the gradient's norm, on two classic tasks.
//!
//! ```sh
//! cargo run --release --example memory -- --quick                               # four rows, half a minute on a CPU
//! cargo run --release --example memory -- --task adding --t 200 --net gru       # some rows of the table
//! cargo run --release --example memory                                          # the whole table: 48 rows of at most 3 minutes
//! ```
//!
//! Adding (Hochreiter & Schmidhuber 1997): T steps of a random number and a marker; two are marked, and after the last step
//! their sum is wanted. Whoever remembers nothing answers 1 and errs by 1/6, the variance of the sum. Copying: ten letters of
//! eight, T steps of silence, and a signal on which the letters are wanted back. Whoever remembers nothing guesses them, which
//! costs 10 ln 8 over the T + 20 steps. Solved is a row whose loss on held-out sequences falls under a tenth of that.
//!
//! `--plot DIR` shows why: the gradient of one answer of the last step by the state after every step, on its way back, before and
//! after training. A line that falls to nothing is a network that cannot learn from what was said there (Bengio et al. 1994).

mod common;
#[path = "common/plot.rs"]
mod plot;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use gatefold::nn::{
    Cell, Direction, GruConfig, LastStep, LinearConfig, LstmConfig, Module, RecurrentConfig, RnnConfig, Sequential,
};
use gatefold::{Batch, CrossEntropy, Device, Ids, Loss, MeanSquaredError, Rng, Tensor, Trainer, optim::AdamW};
use plot::{BLUE_LINE, Chart, ORANGE_LINE};
use plotters::style::RGBColor;

const HIDDEN: usize = 64;
const BATCH: usize = 32;
const HELD_OUT: usize = 256;
const CLIP: f64 = 1.0;
/// Steps of training between two looks at the held-out loss.
const LOOK: u32 = 50;
/// A row is solved under this share of the loss of remembering nothing.
const SOLVED: f32 = 0.1;
/// Letters to remember, and how many there are; symbol 0 is silence, the last one the signal to recall.
const WORD: usize = 10;
const ALPHABET: usize = 8;
const SYMBOLS: usize = ALPHABET + 2;

/// Compares how far recurrent networks remember
#[derive(Parser)]
struct Args {
    /// Only this task; may be given again, as the next two
    #[arg(long, value_enum)]
    task: Vec<Task>,
    /// Only this T: the steps over which to remember; by default 50, 200 and 500
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    t: Vec<u32>,
    /// Only this network
    #[arg(long, value_enum)]
    net: Vec<Net>,
    /// Only with clipping of the gradient's norm, or only without
    #[arg(long)]
    clip: Option<bool>,
    /// Adding over 50 steps, with clipping, and at most 2000 steps a row
    #[arg(long, conflicts_with_all = ["task", "t", "clip"])]
    quick: bool,
    /// Steps of training, at most, for each row of the table
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Seconds of training, at most, for each row of the table
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Of the initial weights and of the sequences
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Such as `cpu` or `vulkan:llvmpipe`; by default the best GPU, else the CPU
    #[arg(long)]
    device: Option<String>,
    /// Write how gradients flow back, before and after training, as SVG files here; where rows with and without clipping run, of
    /// those with it
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Fail unless every row that ran was solved
    #[arg(long)]
    require: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Task {
    /// The sum of two marked numbers among T
    Adding,
    /// Ten letters, T steps later
    Copying,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Net {
    /// h(t) = tanh(b + W h(t-1) + U x(t))
    Rnn,
    /// The same, with an orthogonal W at first: it neither shrinks nor stretches what it carries
    Orthogonal,
    /// Gated recurrent unit
    Gru,
    /// Long short-term memory with its forget gate open at first
    Lstm,
}

/// A row of the table: what is trained.
#[derive(Clone, Copy)]
struct Row {
    task: Task,
    t: usize,
    net: Net,
    clip: bool,
}

/// What came of it.
struct Outcome {
    loss: f32,
    solved: bool,
    steps: u32,
    seconds: f32,
    skipped: u32,
    clipped: f32,
    /// Before and after training.
    flows: Option<[Flow; 2]>,
}

/// How a network's gradients flow back.
struct Flow {
    /// The norms for each state by its name, over the steps.
    lines: Vec<(&'static str, Vec<f32>)>,
    summary: String,
}

impl Task {
    /// The loss of whoever remembers nothing.
    fn baseline(self, t: usize) -> f32 {
        match self {
            Task::Adding => 1.0 / 6.0,
            Task::Copying => WORD as f32 * (ALPHABET as f32).ln() / (t + 2 * WORD) as f32,
        }
    }

    /// Numbers in an input row, and in an output row.
    fn sizes(self) -> [usize; 2] {
        match self {
            Task::Adding => [2, 1],
            Task::Copying => [SYMBOLS, ALPHABET + 1],
        }
    }

    /// Random sequences, time-major.
    fn batch(self, device: &Device, t: usize, rows: usize, rng: &mut Rng) -> gatefold::Result<Batch> {
        match self {
            Task::Adding => {
                let (mut x, mut sums) = (vec![0.0; t * rows * 2], vec![0.0; rows]);
                for (row, sum) in sums.iter_mut().enumerate() {
                    (0..t).for_each(|step| x[(step * rows + row) * 2] = rng.uniform(0.0, 1.0));
                    // One number of the first half and one of the second.
                    for step in [rng.below(t / 2), t / 2 + rng.below(t - t / 2)] {
                        let at = (step * rows + row) * 2;
                        x[at + 1] = 1.0;
                        *sum += x[at];
                    }
                }
                Ok(Batch::new(Tensor::from_slice(device, &x, [t, rows, 2])?, Tensor::from_slice(device, &sums, [rows, 1])?))
            }
            Task::Copying => {
                let steps = t + 2 * WORD;
                let (mut x, mut wanted) = (vec![0.0; steps * rows * SYMBOLS], vec![0; steps * rows]);
                for row in 0..rows {
                    let mut say = |step: usize, symbol: usize| x[(step * rows + row) * SYMBOLS + symbol] = 1.0;
                    for step in 0..WORD {
                        let letter = 1 + rng.below(ALPHABET);
                        say(step, letter);
                        wanted[(t + WORD + step) * rows + row] = letter as u32;
                    }
                    // The signal comes one step before the first letter is wanted, silence all around it.
                    (WORD..steps).for_each(|step| say(step, if step + 1 == t + WORD { SYMBOLS - 1 } else { 0 }));
                }
                let x = Tensor::from_slice(device, &x, [steps, rows, SYMBOLS])?;
                Ok(Batch::new(x, Ids::from_slice(device, &wanted, [steps, rows])?))
            }
        }
    }
}

impl Net {
    /// Of its line in a plot; c of the LSTM has its own.
    fn color(self, state: &str) -> RGBColor {
        match (self, state) {
            (Net::Rnn, _) => RGBColor(140, 140, 140),
            (Net::Orthogonal, _) => RGBColor(44, 130, 60),
            (Net::Gru, _) => BLUE_LINE,
            (Net::Lstm, "c") => RGBColor(150, 50, 130),
            (Net::Lstm, _) => ORANGE_LINE,
        }
    }
}

/// The network of a row: the recurrent layer is layer 0.
fn build(row: Row, device: &Device, rng: &mut Rng) -> Result<Sequential> {
    let [input, output] = row.task.sizes();
    let model = match row.net {
        Net::Rnn | Net::Orthogonal => Sequential::new().push(RnnConfig::new(input, HIDDEN).init(device, rng)?),
        Net::Gru => Sequential::new().push(GruConfig::new(input, HIDDEN).init(device, rng)?),
        Net::Lstm => Sequential::new().push(LstmConfig::new(input, HIDDEN).forget_bias(1.0).init(device, rng)?),
    };
    let model = if row.task == Task::Adding { model.push(LastStep) } else { model };
    let model = model.push(LinearConfig::new(HIDDEN, output).init(device, rng)?);
    if row.net == Net::Orthogonal {
        let params = model.params();
        let (_, weight) = params.iter().find(|(name, _)| name == "0.weight_hh_l0").context("no recurrent weights")?;
        weight.set(&orthogonal(HIDDEN, rng))?;
    }
    Ok(model)
}

/// A random orthogonal matrix `[size, size]`: rows of normal numbers, each freed of its parts along the rows before (Gram and
/// Schmidt).
fn orthogonal(size: usize, rng: &mut Rng) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let mut rows: Vec<Vec<f32>> = Vec::new();
    for _ in 0..size {
        let mut row: Vec<f32> = (0..size).map(|_| rng.normal()).collect();
        // Twice, because rounding leaves a rest of the first time.
        for other in rows.iter().chain(&rows) {
            let along = dot(&row, other);
            row.iter_mut().zip(other).for_each(|(number, other)| *number -= along * other);
        }
        let norm = dot(&row, &row).sqrt();
        row.iter_mut().for_each(|number| *number /= norm);
        rows.push(row);
    }
    rows.concat()
}

/// How gradients of the last step flow back through the network of a row.
fn flow(row: Row, model: &Sequential, x: &Tensor) -> Result<Flow> {
    let [input, _] = row.task.sizes();
    match row.net {
        Net::Rnn | Net::Orthogonal => flow_through(RnnConfig::new(input, HIDDEN), model, x),
        Net::Gru => flow_through(GruConfig::new(input, HIDDEN), model, x),
        Net::Lstm => flow_through(LstmConfig::new(input, HIDDEN), model, x),
    }
}

/// The same, with a copy of the model's recurrent layer: behind [`Sequential`] its type is lost.
fn flow_through<C: Cell>(config: RecurrentConfig<C>, model: &Sequential, x: &Tensor) -> Result<Flow> {
    let layer = config.init(x.device(), &mut Rng::seed(0))?;
    let trained = model.params();
    for (name, param) in layer.params() {
        let (_, from) = trained.iter().find(|(other, _)| *other == format!("0.{name}")).context("a parameter is missing")?;
        param.set(&from.value().to_vec()?)?;
    }
    let (y, _, tape) = layer.forward_train(x, None)?;
    let saturation = layer.inspect(&tape, 0, Direction::Forward)?.saturation()?;
    // The loss: of each sequence one number of the last answer, in turn. Its gradient is a row of the last layer's weights.
    let readout = trained.iter().rfind(|(name, _)| name.ends_with(".weight")).context("no output layer")?.1.value().to_vec()?;
    let rows = y.shape()[1];
    let mut dy = vec![0.0; y.len() - rows * HIDDEN];
    dy.extend(readout.chunks_exact(HIDDEN).cycle().take(rows).flatten());
    let (_, _, flow) = layer.backward_with_flow(tape, &Tensor::from_slice(x.device(), &dy, y.shape())?, None)?;

    let decays = flow.states().iter().map(|state| {
        let decay = state.decay().map_or("-".into(), |decay| format!("{decay:.3}"));
        format!("{} {decay} {}", state.state, format!("{:?}", state.verdict()).to_lowercase())
    });
    let radii = layer.spectral_radii()?.into_iter().flat_map(|radii| radii.gates);
    let shares = saturation.iter().filter_map(|(gate, share)| share.map(|share| format!("{gate} {:.0}%", 100.0 * share)));
    let [decays, radii, shares] =
        [decays.collect::<Vec<_>>(), radii.map(|(gate, radius)| format!("{gate} {radius:.2}")).collect(), shares.collect()]
            .map(|list| list.join(", "));
    let lines = flow.states().iter().map(|state| (state.state, state.norms.iter().map(|norm| *norm as f32).collect()));
    Ok(Flow { lines: lines.collect(), summary: format!("decay {decays}; spectral radius {radii}; saturated {shares}") })
}

/// Draws the flows of one task and T: `flow-adding-t200-before.svg` and `-after.svg`.
fn plot_flows(directory: &Path, task: Task, t: usize, flows: &[(Net, [Flow; 2])]) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    for (moment, when) in ["before", "after"].into_iter().enumerate() {
        let mut lines = Vec::new();
        for (net, flows) in flows {
            for (state, norms) in &flows[moment].lines {
                lines.push((format!("{net:?}, {state}"), net.color(state), norms.clone()));
            }
        }
        let steps = lines.first().map_or(0, |(.., norms)| norms.len());
        Chart {
            file: &directory.join(format!("flow-{}-t{t}-{when}.svg", format!("{task:?}").to_lowercase())),
            title: format!("{task:?}, T = {t}: the gradient of the last answer, {when} training"),
            x_title: "step t",
            y_title: "norm of dL/dh(t), dL/dc(t)",
            log: true,
            ticks: (0..steps).step_by(steps.div_ceil(10).next_multiple_of(5)).map(|step| (step, step.to_string())).collect(),
            lines: lines.iter().map(|(name, color, norms)| (name.as_str(), *color, norms.clone())).collect(),
        }
        .draw()?;
    }
    Ok(())
}

fn learning_rate(row: Row) -> f64 {
    match row.net {
        // Gates keep gradients tame, a bare recurrence does not.
        Net::Rnn | Net::Orthogonal => 1e-3,
        Net::Gru | Net::Lstm => 5e-3,
    }
}

/// Trains the network of a row until the task is solved or a budget is spent.
fn train<L: Loss>(row: Row, loss: L, args: &Args, device: &Device, with_flow: bool) -> Result<Outcome> {
    let mut rng = Rng::seed(args.seed);
    let held_out = row.task.batch(device, row.t, HELD_OUT, &mut rng)?;
    let model = build(row, device, &mut rng)?;
    // Sequences of their own, so that the table stays what it is without a plot.
    let x = row.task.batch(device, row.t, BATCH, &mut Rng::seed(args.seed ^ 1))?.input.numbers("flow")?.clone();
    let before = with_flow.then(|| flow(row, &model, &x)).transpose()?;
    let mut trainer = Trainer::new(model, loss, AdamW::new(learning_rate(row)).weight_decay(0.0))?;
    if row.clip {
        trainer = trainer.clip_grad_norm(CLIP);
    }
    let budget = if args.quick { args.steps.min(2000) } else { args.steps };
    let bar = common::progress_bar(u64::from(budget), "steps")?;
    let (start, solved_under) = (Instant::now(), SOLVED * row.task.baseline(row.t));
    let mut loss = f32::NAN;
    for step in 1..=budget {
        trainer.step(&row.task.batch(device, row.t, BATCH, &mut rng)?)?;
        bar.inc(1);
        let spent = start.elapsed() >= Duration::from_secs(args.seconds);
        if step % LOOK == 0 || step == budget || spent {
            loss = trainer.evaluate(&held_out)?.item()?;
            bar.set_message(format!("held-out loss {loss:.4}"));
            if loss < solved_under || spent {
                break;
            }
        }
    }
    bar.finish_and_clear();
    let stats = trainer.stats()?;
    let flows = before.map(|before| Ok::<_, anyhow::Error>([before, flow(row, trainer.model(), &x)?])).transpose()?;
    Ok(Outcome {
        loss,
        solved: loss < solved_under,
        steps: trainer.steps() as u32,
        seconds: start.elapsed().as_secs_f32(),
        skipped: stats.skipped,
        clipped: stats.clipped as f32 / trainer.steps() as f32,
        flows,
    })
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = common::open_device(args.device.as_deref())?;
    let or = |given: &[u32], all: &[u32]| if given.is_empty() { all.to_vec() } else { given.to_vec() };
    let tasks = if args.task.is_empty() { Task::value_variants() } else { &args.task };
    let tasks = if args.quick { &[Task::Adding] } else { tasks };
    let nets = if args.net.is_empty() { Net::value_variants() } else { &args.net };
    let clips = args.clip.or(args.quick.then_some(true)).map_or(vec![true, false], |clip| vec![clip]);
    let mut rows = Vec::new();
    for &task in tasks {
        for t in or(&args.t, if args.quick { &[50] } else { &[50, 200, 500] }) {
            for &net in nets {
                rows.extend(clips.iter().map(|clip| Row { task, t: t as usize, net, clip: *clip }));
            }
        }
    }

    println!("{HIDDEN} units, batches of {BATCH}, AdamW; loss on {HELD_OUT} held-out sequences, of remembering nothing = 1");
    println!("task     T    network     clip  loss/baseline  solved  steps  seconds  skipped  clipped");
    let mut unsolved = Vec::new();
    for rows in rows.chunk_by(|a, b| (a.task, a.t) == (b.task, b.t)) {
        let mut all_flows = Vec::new();
        for row @ &Row { task, t, net, clip } in rows {
            let with_flow = args.plot.is_some() && clip == clips[0];
            let Outcome { loss, solved, steps, seconds, skipped, clipped, flows } = match task {
                Task::Adding => train(*row, MeanSquaredError, &args, &device, with_flow)?,
                Task::Copying => train(*row, CrossEntropy::new(), &args, &device, with_flow)?,
            };
            let [task_name, net_name] = [format!("{task:?}"), format!("{net:?}")].map(|name| name.to_lowercase());
            let [clip, answer] = [clip, solved].map(|yes| if yes { "yes" } else { "no" });
            let (share, clipped) = (loss / task.baseline(t), 100.0 * clipped);
            let (what, work) = (format!("{task_name:8} {t:<4} {net_name:11} {clip:4}"), format!("{steps:6}  {seconds:7.1}"));
            println!("{what}  {share:13.4}  {answer:6} {work}  {skipped:7}  {clipped:6.1}%");
            if let Some([before, after]) = &flows {
                println!("  before: {}\n  after:  {}", before.summary, after.summary);
            }
            all_flows.extend(flows.map(|flows| (net, flows)));
            if !solved {
                unsolved.push(what.split_whitespace().collect::<Vec<_>>().join(" "));
            }
        }
        if let [Row { task, t, .. }, ..] = rows
            && let Some(directory) = &args.plot
        {
            plot_flows(directory, *task, *t, &all_flows)?;
        }
    }
    if args.require {
        ensure!(unsolved.is_empty(), "not solved: {}", unsolved.join(", "));
    }
    Ok(())
}
