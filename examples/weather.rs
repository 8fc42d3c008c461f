//! Forecasts tomorrow's highest temperature in Seattle from the last 30 days, with an LSTM of 32 units.
//!
//! ```sh
//! cargo run --release --example weather
//! cargo run --release --example weather -- --seed 1 --device vulkan:llvmpipe --out /tmp/weather
//! ```
//!
//! Trained on 2012 to June 2014 and judged on 2015. The settings below were chosen by the second half of 2014.

mod common;
#[path = "common/plot.rs"]
mod plot;

use std::f32::consts::TAU;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gatefold::data::{Normalizer, Series, WindowSpec, Windows, shuffled_batches};
use gatefold::nn::{LastStep, LinearConfig, LstmConfig, Precision, Sequential};
use gatefold::optim::{AdamW, LossScale};
use gatefold::{Batch, Device, MeanSquaredError, Rng, Tensor, Trainer};
use plot::{BLUE_LINE, Chart, ORANGE_LINE};

const DATA: &str = include_str!("data/seattle-weather.csv");
const PAST_DAYS: usize = 30;
const HIDDEN: usize = 32;
const BATCH: usize = 32;
const LEARNING_RATE: f64 = 5e-3;

/// Forecasts tomorrow's highest temperature in Seattle
#[derive(Parser)]
struct Args {
    /// Of the initial weights and of the order of the batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Passes over the training years
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Products in half precision, with a scaled loss
    #[arg(long)]
    half: bool,
    /// Such as `cpu` or `vulkan:llvmpipe`; by default the best GPU, else the CPU
    #[arg(long)]
    device: Option<String>,
    /// Where the plots go
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// Fail when the error on 2015 is above this, in °C
    #[arg(long)]
    require: Option<f32>,
}

/// The daily measurements, with the day of the year as a point on a circle, and each row's date `YYYY/MM/DD`.
fn read_weather() -> Result<(Series, Vec<String>)> {
    let columns = ["precipitation", "temp_max", "temp_min", "wind", "season_sine", "season_cosine"];
    let (mut rows, mut dates) = (Vec::new(), Vec::new());
    for (day, record) in csv::Reader::from_reader(DATA.as_bytes()).deserialize().enumerate() {
        let (date, rain, high, low, wind, _): (String, f32, f32, f32, f32, String) = record?;
        // The table starts on a 1st of January and has no gap.
        let season = TAU * day as f32 / 365.25;
        rows.push([rain, high, low, wind, season.sin(), season.cos()]);
        dates.push(date);
    }
    Ok((Series::new(&columns, &rows)?, dates))
}

/// Windows as tensors. The model learns the change from today to tomorrow, so its forecast starts at "as today".
struct Examples {
    x: Tensor,
    change: Tensor,
    today: Vec<f32>,
}

impl Examples {
    fn new(device: &Device, windows: &Windows<'_>, indices: &[usize], target: usize) -> Result<Self> {
        let batch = windows.batch(indices)?;
        let last_day = &batch.x[(batch.past - 1) * batch.rows * batch.features..];
        let today: Vec<f32> = last_day.chunks_exact(batch.features).map(|features| features[target]).collect();
        let change: Vec<f32> = batch.y.iter().zip(&today).map(|(tomorrow, today)| tomorrow - today).collect();
        let x = Tensor::from_slice(device, &batch.x, [batch.past, batch.rows, batch.features])?;
        Ok(Self { x, change: Tensor::from_slice(device, &change, [batch.rows, 1])?, today })
    }

    fn all(device: &Device, windows: &Windows<'_>, target: usize) -> Result<Self> {
        Self::new(device, windows, &(0..windows.len()).collect::<Vec<_>>(), target)
    }

    fn batch(&self) -> Batch {
        Batch::new(&self.x, &self.change)
    }
}

/// The root of the mean squared difference.
fn rmse(forecast: &[f32], truth: &[f32]) -> f32 {
    let squares = forecast.iter().zip(truth).map(|(forecast, truth)| (forecast - truth).powi(2));
    (squares.sum::<f32>() / truth.len() as f32).sqrt()
}

/// For each of the days `test` the mean over all earlier years' days at most 5 days away in the calendar.
fn climate(highs: &[f32], dates: &[String], test: Range<usize>) -> Vec<f32> {
    let year_start = |day: usize| (0..=day).rev().find(|at| dates[*at].ends_with("/01/01")).unwrap_or(0);
    let day_of_year: Vec<usize> = (0..dates.len()).map(|day| day - year_start(day)).collect();
    let mean = |day: usize| {
        let distance = |other: usize| day_of_year[day].abs_diff(day_of_year[other]);
        let near = (0..test.start).filter(|other| distance(*other).min(365usize.abs_diff(distance(*other))) <= 5);
        let (sum, count) = near.fold((0.0, 0.0), |(sum, count), other| (sum + highs[other], count + 1.0));
        sum / count
    };
    test.clone().map(mean).collect()
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (series, dates) = read_weather().context("the embedded weather table")?;
    let device = common::open_device(args.device.as_deref())?;
    let first = |date: &str| dates.partition_point(|other| other.as_str() < date);
    let (validation, test, end) = (first("2014/07/01"), first("2015/01/01"), dates.len());

    // Statistics of the training rows alone.
    let normalizer = Normalizer::fit(&series, 0..validation)?;
    let normalized = normalizer.apply(&series)?;
    let target = series.column("temp_max")?;
    let celsius = |loss: f32| loss.sqrt() * normalizer.deviation()[target];
    let spec = WindowSpec { past: PAST_DAYS, horizon: 1, target };
    let train_windows = Windows::new(&normalized, spec, spec.first_target()..validation)?;
    let validation_days = Examples::all(&device, &Windows::new(&normalized, spec, validation..test)?, target)?.batch();

    let mut rng = Rng::seed(args.seed);
    let precision = if args.half { Precision::Half } else { Precision::Single };
    let model = Sequential::new()
        .push(LstmConfig::new(series.features(), HIDDEN).precision(precision).init(&device, &mut rng)?)
        .push(LastStep)
        .push(LinearConfig::new(HIDDEN, 1).precision(precision).init(&device, &mut rng)?);
    let mut trainer = Trainer::new(model, MeanSquaredError, AdamW::new(LEARNING_RATE))?.clip_grad_norm(1.0);
    if args.half {
        trainer = trainer.loss_scaling(LossScale::dynamic());
    }

    let start = Instant::now();
    let bar = common::progress_bar(u64::from(args.epochs) * train_windows.len() as u64, "sequences")?;
    let mut curve = Vec::new();
    for epoch in 0..args.epochs {
        // Half a cosine, from the full rate to almost none.
        let turn = std::f64::consts::PI * f64::from(epoch) / f64::from(args.epochs);
        trainer.set_learning_rate(LEARNING_RATE * 0.5 * (1.0 + turn.cos()));
        let mut steps = Vec::new();
        for indices in shuffled_batches(train_windows.len(), BATCH, &mut rng)? {
            let examples = Examples::new(&device, &train_windows, &indices, target)?;
            steps.push((trainer.step(&examples.batch())?, indices.len()));
            bar.inc(indices.len() as u64);
        }
        // Losses are read once an epoch, so that the device never waits for the host within one.
        let mut sum = 0.0;
        for (outcome, rows) in &steps {
            sum += outcome.item()? * *rows as f32;
        }
        let train = celsius(sum / train_windows.len() as f32);
        let validation = celsius(trainer.evaluate(&validation_days)?.item()?);
        curve.push((train, validation));
        bar.set_message(format!("epoch {}: train {train:.2} °C, validation {validation:.2} °C", epoch + 1));
    }
    bar.finish();
    let (seconds, (train, validation)) = (start.elapsed().as_secs_f32(), curve[curve.len() - 1]);
    println!("Trained for {} epochs in {seconds:.1} s: RMSE train {train:.2} °C, validation {validation:.2} °C", args.epochs);

    let examples = Examples::all(&device, &Windows::new(&normalized, spec, test..end)?, target)?;
    let (change, _) = trainer.model().forward(&examples.x, None)?;
    let change = change.to_vec()?;
    let forecast = change.iter().zip(&examples.today).map(|(change, today)| normalizer.invert(target, today + change));
    let forecast = forecast.collect::<gatefold::Result<Vec<f32>>>()?;
    let highs: Vec<f32> = series.values().chunks_exact(series.features()).map(|row| row[target]).collect();
    let truth = &highs[test..];
    let error = rmse(&forecast, truth);
    println!("RMSE on the {} days of 2015:", truth.len());
    println!("  the LSTM                {error:.2} °C");
    println!("  tomorrow = today        {:.2} °C", rmse(&highs[test - 1..end - 1], truth));
    println!(
        "  the season's usual      {:.2} °C  (mean of 2012 to 2014 within 5 days)",
        rmse(&climate(&highs, &dates, test..end), truth)
    );

    std::fs::create_dir_all(&args.out).with_context(|| format!("creating the folder {}", args.out.display()))?;
    let (forecast_file, loss_file) = (args.out.join("weather-forecast.svg"), args.out.join("weather-loss.svg"));
    plot_forecast(&forecast_file, &dates[test..], &forecast, truth, error)?;
    plot_loss(&loss_file, &curve)?;
    println!("Plots: {} and {}", forecast_file.display(), loss_file.display());
    if let Some(limit) = args.require {
        ensure!(error <= limit, "the RMSE on 2015 is {error:.3} °C, required at most {limit} °C");
    }
    Ok(())
}

fn plot_forecast(file: &Path, dates: &[String], forecast: &[f32], truth: &[f32], error: f32) -> Result<()> {
    let starts = dates.iter().enumerate().filter(|(_, date)| date.ends_with("/01"));
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    Chart {
        file,
        title: format!("Seattle, 2015: highest temperature, forecast one day ahead (RMSE {error:.2} °C)"),
        x_title: "day of 2015 (ticks: the first of each month)",
        y_title: "highest temperature [°C]",
        log: false,
        ticks: starts.zip(months).map(|((day, _), month)| (day, format!("1 {month}"))).collect(),
        lines: vec![("measured", BLUE_LINE, truth.to_vec()), ("forecast", ORANGE_LINE, forecast.to_vec())],
    }
    .draw()
}

fn plot_loss(file: &Path, curve: &[(f32, f32)]) -> Result<()> {
    let (train, validation) = curve.iter().copied().unzip();
    Chart {
        file,
        title: "Training: error of the forecast, epoch by epoch".into(),
        x_title: "epoch",
        y_title: "RMSE [°C]",
        log: false,
        ticks: (0..curve.len()).step_by(curve.len().div_ceil(20)).map(|epoch| (epoch, (epoch + 1).to_string())).collect(),
        lines: vec![
            ("train (2012 to June 2014)", BLUE_LINE, train),
            ("validation (July to December 2014)", ORANGE_LINE, validation),
        ],
    }
    .draw()
}
