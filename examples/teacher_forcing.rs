//! Teacher forcing on one task: what it gains, what it costs, and what scheduled sampling wins back.
//!
//! ```sh
//! cargo run --release --example teacher_forcing
//! cargo run --release --example teacher_forcing -- --seed 1 --plot out/teacher-forcing.svg
//! ```
//!
//! A network learns to simulate a damped pendulum from the torque that drives it; angle and speed are measured with a noisy
//! sensor. Its recurrence goes through its output only (Jordan 1986): the angle and speed of the step before are all it knows
//! of the past. So its targets can stand in for its outputs in training, all steps run at once, and nothing is propagated back
//! through time. But it is then used without a teacher, on its own outputs, and there lies the exposure bias: with a
//! measurement at hand the best forecast leans on it only as far as noise allows, which is the wrong thing to have learned when
//! the network runs free. Scheduled sampling (Bengio et al. 2015) takes the teacher away bit by bit; free-running training
//! never has one.
//!
//! All three start from the same weights and see the same batches.

mod common;
#[path = "common/plot.rs"]
mod plot;

use std::f32::consts::TAU;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gatefold::nn::{RnnConfig, Sequential};
use gatefold::{Batch, Device, MeanSquaredError, Rng, Tensor, Trainer, optim::AdamW};
use plot::{BLUE_LINE, Chart, ORANGE_LINE};
use plotters::style::RGBColor;

const STEPS: usize = 100;
const HELD_OUT: usize = 256;
/// At the start.
const LEARNING_RATE: f64 = 5e-3;
/// Of the sensor, in radians and radians a second.
const NOISE: f32 = 0.15;
/// How often the held-out losses are looked at.
const LOOKS: u32 = 50;
const GREEN_LINE: RGBColor = RGBColor(44, 130, 60);
const GREY_LINE: RGBColor = RGBColor(140, 140, 140);

/// Shows what teacher forcing gains and costs, and what scheduled sampling wins back
#[derive(Parser)]
struct Args {
    /// Steps of training, each on sequences of 100 steps
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Sequences in each step of training
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Units of the network
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    hidden: u16,
    /// Of the initial weights and of the sequences
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Such as `cpu` or `vulkan:llvmpipe`; by default the best GPU, else the CPU
    #[arg(long)]
    device: Option<String>,
    /// Draw the held-out losses over the steps of training as an SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Fail unless full forcing trains at least this many times faster than free running, and scheduled sampling ends with a
    /// lower free-running loss than full forcing
    #[arg(long, value_name = "TIMES")]
    require: Option<f64>,
}

/// Pendulums that start at rest: x [T, B, 1] the torque, target [T, B, 2] angle and speed after each step as the sensor reads
/// them.
fn pendulums(device: &Device, rows: usize, rng: &mut Rng) -> gatefold::Result<Batch> {
    const SECONDS: f32 = 0.25;
    const PARTS: usize = 10;
    let (mut torque, mut measured) = (vec![0.0; STEPS * rows], vec![0.0; STEPS * rows * 2]);
    for row in 0..rows {
        // Two sines whose periods have no common multiple: the torque never repeats.
        let waves = [0, 1].map(|_| [rng.uniform(0.1, 0.35), TAU / rng.uniform(3.0, 20.0), rng.uniform(0.0, TAU)]);
        let (mut angle, mut speed) = (0.0f32, 0.0f32);
        for step in 0..STEPS {
            let seconds = step as f32 * SECONDS;
            let drive = waves.iter().map(|[height, rate, phase]| height * (rate * seconds + phase).sin()).sum::<f32>();
            for _ in 0..PARTS {
                let part = SECONDS / PARTS as f32;
                speed += part * (drive - angle.sin() - 0.4 * speed);
                angle += part * speed;
            }
            let at = step * rows + row;
            torque[at] = drive;
            measured[2 * at] = angle + NOISE * rng.normal();
            measured[2 * at + 1] = speed + NOISE * rng.normal();
        }
    }
    Ok(Batch::new(
        Tensor::from_slice(device, &torque, [STEPS, rows, 1])?,
        Tensor::from_slice(device, &measured, [STEPS, rows, 2])?,
    ))
}

/// One way of training, and how it goes.
struct Regime {
    name: &'static str,
    color: RGBColor,
    /// How likely the teacher is, after a share of the training.
    teacher: fn(f32) -> f32,
    trainer: Trainer<MeanSquaredError>,
    /// Of each step.
    seconds: Vec<f64>,
    /// Held-out losses, forced and free-running.
    curve: Vec<[f32; 2]>,
}

impl Regime {
    fn new(name: &'static str, color: RGBColor, teacher: fn(f32) -> f32, device: &Device, args: &Args) -> Result<Self> {
        let network = RnnConfig::new(1, args.hidden.into()).jordan(2).init(device, &mut Rng::seed(args.seed))?;
        let model = Sequential::new().push(network);
        let trainer = Trainer::new(model, MeanSquaredError, AdamW::new(LEARNING_RATE))?.clip_grad_norm(1.0).seed(args.seed);
        Ok(Self { name, color, teacher, trainer, seconds: Vec::new(), curve: Vec::new() })
    }

    /// One step, timed, of as many as `args` says.
    fn train(&mut self, batch: &Batch, args: &Args, device: &Device) -> Result<()> {
        let done = self.trainer.steps() as f32 / args.steps as f32;
        // Half a cosine, from the full rate to almost none.
        let rate = LEARNING_RATE * 0.5 * (1.0 + (std::f64::consts::PI * f64::from(done)).cos());
        self.trainer.set_learning_rate(rate);
        let start = Instant::now();
        self.trainer.step(&batch.clone().teacher((self.teacher)(done)))?;
        device.synchronize()?;
        self.seconds.push(start.elapsed().as_secs_f64());
        Ok(())
    }

    /// The loss with the truth at every step, and the loss without it.
    fn look(&mut self, held_out: &Batch) -> Result<[f32; 2]> {
        let forced = self.trainer.evaluate(&held_out.clone().teacher(1.0))?.item()?;
        let losses = [forced, self.trainer.evaluate(held_out)?.item()?];
        self.curve.push(losses);
        Ok(losses)
    }

    /// By the median step.
    fn steps_per_second(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        1.0 / seconds[seconds.len() / 2]
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = common::open_device(args.device.as_deref())?;
    let mut rng = Rng::seed(args.seed.wrapping_add(1 << 32));
    let held_out = pendulums(&device, HELD_OUT, &mut rng)?;
    let regime = |name, color, teacher| Regime::new(name, color, teacher, &device, &args);
    let mut regimes = [
        regime("full forcing", ORANGE_LINE, |_| 1.0)?,
        regime("scheduled sampling", BLUE_LINE, |done| 1.0 - done)?,
        regime("free running", GREEN_LINE, |_| 0.0)?,
    ];

    let every = args.steps.div_ceil(LOOKS);
    let bar = common::progress_bar(u64::from(args.steps), "steps")?;
    for step in 1..=args.steps {
        let batch = pendulums(&device, args.batch.into(), &mut rng)?;
        // In turns, so that what else the machine does slows each of them alike.
        for regime in &mut regimes {
            regime.train(&batch, &args, &device)?;
            if step % every == 0 || step == args.steps {
                let [_, free] = regime.look(&held_out)?;
                bar.set_message(format!("{}: free-running loss {free:.4}", regime.name));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    println!("{} steps of {} sequences of {STEPS}; losses on {HELD_OUT} held-out ones.", args.steps, args.batch);
    println!(
        "The noise of the sensor alone is {:.4}. Gap: what the loss of the teacher costs; below 0 the network does better",
        NOISE * NOISE
    );
    println!("left alone, because the teacher, too, is noisy.");
    println!("training            forced loss  free-running loss      gap  steps/s");
    for regime in &regimes {
        let [forced, free] = regime.curve[regime.curve.len() - 1];
        println!("{:18}  {forced:11.4}  {free:17.4}  {:+7.4}  {:7.0}", regime.name, free - forced, regime.steps_per_second());
    }
    let [forcing, scheduled, running] = &regimes;
    let faster = forcing.steps_per_second() / running.steps_per_second();
    println!("Full forcing trains {faster:.1} times as fast as free running.");
    if let Some(file) = &args.plot {
        plot_losses(file, &regimes, every as usize)?;
        println!("Plot: {}", file.display());
    }
    if let Some(times) = args.require {
        ensure!(faster >= times, "full forcing is {faster:.2} times as fast as free running, required at least {times}");
        let [forcing, scheduled] = [forcing, scheduled].map(|regime| regime.curve[regime.curve.len() - 1][1]);
        let narrowed = scheduled < forcing;
        ensure!(
            narrowed,
            "the free-running loss is {scheduled} with scheduled sampling, required under full forcing's {forcing}"
        );
    }
    Ok(())
}

/// `each`: steps from one look to the next.
fn plot_losses(file: &Path, regimes: &[Regime], each: usize) -> Result<()> {
    if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(|| format!("creating the folder {}", folder.display()))?;
    }
    let names = regimes.iter().map(|regime| format!("{}, left alone", regime.name)).collect::<Vec<_>>();
    let free = |regime: &Regime| regime.curve.iter().map(|[_, free]| *free).collect::<Vec<_>>();
    let mut lines: Vec<_> = names.iter().zip(regimes).map(|(name, regime)| (name.as_str(), regime.color, free(regime))).collect();
    let looks = regimes[0].curve.len();
    lines.push(("full forcing, with its teacher", GREY_LINE, regimes[0].curve.iter().map(|[forced, _]| *forced).collect()));
    Chart {
        file,
        title: "A pendulum simulated by a Jordan network: what the teacher hides".into(),
        x_title: "steps of training",
        y_title: "mean squared error, held out",
        log: false,
        ticks: (0..looks).step_by(looks.div_ceil(10)).map(|look| (look, ((look + 1) * each).to_string())).collect(),
        lines,
    }
    .draw()
}
