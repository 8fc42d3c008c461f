//! `cargo bench --features cli --bench scaling -- --device NAME`: what more steps, rows, units and layers cost, in time, memory and the
//! host's part of a step on a GPU. A table with the slopes on logarithmic axes (1: in proportion), JSON lines, and a chart.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use common::Figure;
use plotters::coord::Shift;
use plotters::prelude::*;
use serde_json::json;

/// What stays as it is while one of the sizes grows.
const STEPS: usize = 64;
const ROWS: usize = 16;
const UNITS: usize = 128;

/// The sizes that one of them goes through.
const SERIES: [(&str, &[usize]); 4] = [
    ("T", &[16, 32, 64, 128, 256, 512]),
    ("B", &[1, 4, 16, 64, 256]),
    ("H", &[32, 64, 128, 256, 512]),
    ("layers", &[1, 2, 4, 8]),
];

#[derive(Parser)]
struct Args {
    /// The device, as `gatefold devices` names it
    #[arg(long, default_value = "cpu")]
    device: String,
    /// lstm, gru or rnn
    #[arg(long, default_value = "lstm")]
    cell: String,
    /// Where scaling.jsonl and scaling.svg go
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// What cargo gives every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// One quantity as a size grows.
struct Line {
    label: &'static str,
    points: Vec<(f64, f64)>,
    /// Whether points were disturbed.
    marks: Vec<&'static str>,
}

impl Line {
    /// Of the figures in this mode, each with its size.
    fn new(label: &'static str, figures: &[(usize, Figure)], mode: &str, of: impl Fn(&Figure) -> f64) -> Self {
        let figures = figures.iter().filter(|(_, figure)| figure.mode == mode && of(figure).is_finite());
        let points = figures.clone().map(|(size, figure)| (*size as f64, of(figure))).collect();
        Self { label, points, marks: figures.map(|(_, figure)| figure.mark()).collect() }
    }

    /// The slopes of log y over log x: of the line of least squares, and between the last two points.
    fn slopes(&self) -> Option<(f64, f64)> {
        let logs: Vec<(f64, f64)> = self.points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
        let [.., before, last] = logs[..] else { return None };
        let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / logs.len() as f64;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let covariance: f64 = logs.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
        let variance: f64 = logs.iter().map(|p| (p.0 - x).powi(2)).sum();
        Some((covariance / variance, (last.1 - before.1) / (last.0 - before.0)))
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    fs::create_dir_all(&args.out)?;
    println!("{} on {}: T={STEPS}, B={ROWS}, I=H={UNITS}, one layer, but for\n", args.cell, args.device);
    let (mut panels, mut lines) = (Vec::new(), Vec::new());
    for (size, values) in SERIES {
        let mut figures = Vec::new();
        for value in values {
            let [mut t, mut b, mut h, mut layers] = [STEPS, ROWS, UNITS, 1];
            *match size {
                "T" => &mut t,
                "B" => &mut b,
                "H" => &mut h,
                _ => &mut layers,
            } = *value;
            let mut command = common::gatefold();
            command.args(["bench", "--json", "--device", &args.device, "--cell", &args.cell]);
            command.args(["--shape", &format!("{t},{b},{h},{h}"), "--layers", &layers.to_string()]);
            for (name, value) in [("BENCH_BUDGET", "0.4"), ("BENCH_WARM", "0.1")] {
                if std::env::var_os(name).is_none() {
                    command.env(name, value);
                }
            }
            let printed = common::run(command.env("BENCH_MODES", "infer,train").env_remove("BENCH_REF"))?;
            ensure!(printed.errors.is_empty(), "{}", printed.errors.join("; "));
            lines.extend(printed.lines);
            figures.extend(printed.figures.into_iter().map(|figure| (*value, figure)));
        }
        let ms = |figure: &Figure| figure.number("ms_median");
        let times = vec![Line::new("infer", &figures, "infer", ms), Line::new("train", &figures, "train", ms)];
        panels.push((size, "ms", times));
        let megabytes = |figure: &Figure| figure.number("peak_bytes") / 1e6;
        let memory = Line::new("train", &figures, "train", megabytes);
        panels.push((size, "MB at most", vec![Line::new("infer", &figures, "infer", megabytes), memory]));
        let share = |figure: &Figure| 100.0 * figure.number("host_ms") / figure.number("ms_median");
        let host = Line::new("host's share of train", &figures, "train", share);
        if !host.points.is_empty() {
            panels.push((size, "% of the step", vec![host]));
        }
    }
    for (size, unit, drawn) in &panels {
        for line in drawn {
            let points = line.points.iter().zip(&line.marks).map(|((x, y), mark)| format!("{x} {y:.3}{mark}"));
            let slopes = line.slopes();
            let shown = slopes.map_or("-".to_owned(), |(all, last)| format!("{all:.2}, at the end {last:.2}"));
            println!("{size:6} {unit:13} {:21} slope {shown}: {}", line.label, points.collect::<Vec<_>>().join(", "));
            let slope = json!({"mode": "slope", "size": size, "unit": unit, "of": line.label, "points": line.points,
                "slope": slopes.map(|slopes| slopes.0), "slope_at_end": slopes.map(|slopes| slopes.1)});
            lines.push(slope.to_string());
        }
    }
    fs::write(args.out.join("scaling.jsonl"), lines.join("\n") + "\n")?;
    draw(&args.out.join("scaling.svg"), &panels)
}

/// A panel for each size and unit.
fn draw(file: &Path, panels: &[(&str, &str, Vec<Line>)]) -> Result<()> {
    let columns = panels.len() / SERIES.len();
    let root = SVGBackend::new(file, (380 * columns as u32, 300 * SERIES.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (size, unit, lines)) in root.split_evenly((SERIES.len(), columns)).iter().zip(panels) {
        panel(area, size, unit, lines)?;
    }
    root.present().with_context(|| format!("writing {}", file.display()))
}

fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, size: &str, unit: &str, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let range = |of: fn((f64, f64)) -> f64| {
        let (low, high) = points().map(of).fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        (low / 1.2..high * 1.2).log_scale()
    };
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(range(|point| point.0), range(|point| point.1))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(size).y_desc(unit).x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("{y:.3}"));
    mesh.light_line_style(TRANSPARENT).draw()?;
    for (at, line) in lines.iter().enumerate() {
        let color = Palette99::pick(at).to_rgba();
        let label = line.slopes().map_or(line.label.to_owned(), |(slope, _)| format!("{}, slope {slope:.2}", line.label));
        let sample = move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2));
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)).point_size(3))?
            .label(label)
            .legend(sample);
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.85)).draw()?;
    Ok(())
}
