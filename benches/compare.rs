//! `cargo bench --features cli --bench compare`: Gatefold and what users would pick instead, on the same shapes in one run.
//!
//! `GATEFOLD_PEERS` names the other programs, one a line or between semicolons: `name=command`, or `name@device=command` to be compared
//! with Gatefold on another device than the native CPU:
//!
//! ```text
//! torch-cpu=python3 peers/bench_torch.py; burn-wgpu@vulkan:llvmpipe=peers/burn-wgpu
//! ```
//!
//! A program gets the case in `BENCH_ONLY` (`lstm_100_32_256_256`: cell, T, B, I, H) and `BENCH_MODES` (`infer,train`), reads the
//! weights of the file of that name in `BENCH_REF`, and prints the lines of `gatefold bench --json`: first `"mode": "check"` with the
//! largest relative error of each output, then `ms_median`, `ms_min` and `other_cpu` of each mode. What it cannot do is a line with
//! an `error`. One program runs at a time, case by case; a wrong answer is not timed, and one
//! that checks none (as does the one that wrote the references) is named. More of the environment: `gatefold bench --help`.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use common::{Figure, Printed};
use plotters::prelude::*;
use serde_json::json;

/// Peers of the record: those that the variable leaves out are named.
const KNOWN: [&str; 8] = ["torch-cpu", "onnxruntime", "rten", "tract", "candle-cpu", "burn-flex", "burn-ndarray", "burn-wgpu"];

const CELLS: [&str; 3] = ["lstm", "gru", "rnn"];
const SHAPES: [&str; 6] =
    ["100_1_128_128", "100_32_128_128", "100_32_256_256", "100_64_512_512", "50_64_1024_1024", "512_1_512_512"];

#[derive(Parser)]
struct Args {
    /// Cases with one of these texts in their name
    #[arg(long, value_delimiter = ',', default_value = "")]
    only: Vec<String>,
    /// What is timed
    #[arg(long, value_delimiter = ',', default_value = "infer,train")]
    modes: Vec<String>,
    /// Where compare.jsonl and compare.svg go
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// What cargo gives every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// Another program.
struct Peer {
    name: String,
    /// Where Gatefold runs beside it.
    device: String,
    command: Vec<String>,
}

impl Peer {
    fn parse(text: &str) -> Result<Self> {
        let (name, command) = text.split_once('=').with_context(|| format!("GATEFOLD_PEERS: {text:?}, expected name=command"))?;
        let (name, device) = name.split_once('@').unwrap_or((name, "cpu"));
        let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        ensure!(!command.is_empty(), "GATEFOLD_PEERS: {name} has no command");
        Ok(Self { name: name.trim().to_owned(), device: device.trim().to_owned(), command })
    }
}

/// A case and a mode, and Gatefold's figure and a peer's.
struct Ratio<'a> {
    case: &'a str,
    peer: usize,
    ours: Figure,
    theirs: Figure,
}

impl Ratio<'_> {
    /// Above 1: Gatefold is faster. Of medians, and of minima.
    fn values(&self) -> (f64, f64) {
        let of = |name| self.theirs.number(name) / self.ours.number(name);
        (of("ms_median"), of("ms_min"))
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let Ok(given) = std::env::var("GATEFOLD_PEERS") else {
        println!("compare: nothing to compare with: GATEFOLD_PEERS is not set (the head of benches/compare.rs says how)");
        return Ok(());
    };
    let texts = given.split(['\n', ';']).map(str::trim).filter(|text| !text.is_empty());
    let peers: Vec<Peer> = texts.map(Peer::parse).collect::<Result<_>>()?;
    ensure!(!peers.is_empty(), "GATEFOLD_PEERS names no program");
    ensure!(std::env::var_os("BENCH_REF").is_some(), "BENCH_REF names no folder of references: no answer could be checked");
    let absent: Vec<&str> = KNOWN.into_iter().filter(|known| peers.iter().all(|peer| peer.name != *known)).collect();
    println!("not in GATEFOLD_PEERS: {}", if absent.is_empty() { "none of those known".to_owned() } else { absent.join(", ") });

    fs::create_dir_all(&args.out)?;
    // Written as it comes: what was measured stays if the rest is lost.
    let file = args.out.join("compare.jsonl");
    let mut file = fs::File::create(&file).with_context(|| format!("writing {}", file.display()))?;
    let (mut ratios, mut notes) = (Vec::new(), BTreeMap::<String, Vec<&str>>::new());
    let all: Vec<String> = CELLS.iter().flat_map(|cell| SHAPES.map(|shape| format!("{cell}_{shape}"))).collect();
    if let Some(none) = args.only.iter().find(|text| !all.iter().any(|case| case.contains(text.as_str()))) {
        bail!("--only names {none:?}, expected some of: {}", all.join(", "));
    }
    let wanted = |case: &&str| args.only.iter().any(|text| case.contains(text.as_str()));
    let cases: Vec<&str> = all.iter().map(String::as_str).filter(wanted).collect();
    for case in &cases {
        let mut ours = BTreeMap::<&str, Printed>::new();
        for (at, peer) in peers.iter().enumerate() {
            let [program, rest @ ..] = &peer.command[..] else { continue };
            eprintln!("{case}: {}", peer.name);
            let printed = match measure(Command::new(program).args(rest), case, &args) {
                Ok(printed) => printed,
                Err(error) => {
                    notes.entry(format!("{}: {error:#}", peer.name)).or_default().push(case);
                    continue;
                }
            };
            for error in &printed.errors {
                notes.entry(format!("{}: {error}", peer.name)).or_default().push(case);
            }
            if !printed.checked {
                notes.entry(format!("{}: prints no check of its answers", peer.name)).or_default().push(case);
            }
            if !ours.contains_key(peer.device.as_str()) {
                eprintln!("{case}: gatefold on {}", peer.device);
                let mut command = common::gatefold();
                let (cell, shape) = case.split_once('_').context("a case without a cell")?;
                command.args(["bench", "--json", "--device", &peer.device, "--cell", cell, "--shape", &shape.replace('_', ",")]);
                ours.insert(&peer.device, measure(&mut command, case, &args).with_context(|| format!("gatefold, {case}"))?);
            }
            let Some(gatefold) = ours.get(peer.device.as_str()) else { continue };
            for theirs in &printed.figures {
                if let Some(ours) = gatefold.figures.iter().find(|ours| ours.mode == theirs.mode) {
                    let ratio = Ratio { case, peer: at, ours: ours.clone(), theirs: theirs.clone() };
                    let (median, min) = ratio.values();
                    let line = json!({"mode": "ratio", "case": case, "of": theirs.mode, "peer": peer.name, "device": peer.device,
                        "ratio_median": median, "ratio_min": min, "disturbed": ratio.ours.mark() != "" || ratio.theirs.mark() != ""});
                    writeln!(file, "{line}")?;
                    ratios.push(ratio);
                }
            }
            printed.lines.iter().try_for_each(|line| writeln!(file, "{line}"))?;
        }
        ours.values().flat_map(|printed| &printed.lines).try_for_each(|line| writeln!(file, "{line}"))?;
    }
    table(&peers, &cases, &args.modes, &ratios);
    for (note, cases) in notes {
        println!("{note} ({})", cases.join(", "));
    }
    ensure!(!ratios.is_empty(), "no program of GATEFOLD_PEERS could be compared");
    draw(&args.out.join("compare.svg"), &peers, &ratios)
}

fn measure(command: &mut Command, case: &str, args: &Args) -> Result<Printed> {
    let threads = std::thread::available_parallelism()?.to_string();
    for (name, value) in [("BENCH_QUIET_WAIT", "30"), ("BENCH_THREADS", &threads), ("OMP_NUM_THREADS", &threads)] {
        if std::env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    common::run(command.env("BENCH_ONLY", case).env("BENCH_MODES", args.modes.join(",")))
}

/// Milliseconds, and how many times faster Gatefold is: by medians, by minima. `!`: disturbed.
fn table(peers: &[Peer], cases: &[&str], modes: &[String], ratios: &[Ratio<'_>]) {
    println!("\n| case | mode |{}", peers.iter().map(|peer| format!(" {} : {} |", peer.name, peer.device)).collect::<String>());
    println!("|---|---|{}", "---|".repeat(peers.len()));
    for (case, mode) in cases.iter().flat_map(|case| modes.iter().map(move |mode| (case, mode))) {
        let cell = |peer: usize| {
            let found = ratios.iter().find(|ratio| ratio.case == *case && ratio.ours.mode == *mode && ratio.peer == peer);
            found.map_or(" - |".to_owned(), |ratio| {
                let (median, min) = ratio.values();
                let ms = |figure: &Figure| format!("{:.3}{}", figure.number("ms_median"), figure.mark());
                format!(" {} : {} = {median:.2}, {min:.2} |", ms(&ratio.theirs), ms(&ratio.ours))
            })
        };
        println!("| {case} | {mode} |{}", (0..peers.len()).map(cell).collect::<String>());
    }
    println!("\npeer ms : gatefold ms = ratio of medians, of minima; above 1 Gatefold is faster; ! others used the machine\n");
}

/// Bars of the ratios of medians, on a logarithmic axis around 1.
fn draw(file: &Path, peers: &[Peer], ratios: &[Ratio<'_>]) -> Result<()> {
    let mut groups: Vec<String> = Vec::new();
    let group = |ratio: &Ratio<'_>| format!("{} {}", ratio.case.replace('_', " "), ratio.ours.mode);
    for name in ratios.iter().map(group) {
        if !groups.contains(&name) {
            groups.push(name);
        }
    }
    if groups.is_empty() {
        return Ok(());
    }
    let values = || ratios.iter().map(|ratio| ratio.values().0);
    let (low, high) = (values().fold(0.5, f64::min), values().fold(2.0, f64::max));
    let size = (260 + 44 * groups.len() as u32 + 14 * ratios.len() as u32, 520);
    let root = SVGBackend::new(file, size).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("How many times faster Gatefold is (peer / Gatefold, medians)", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(150)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..groups.len() as f64, (0.8 * low..1.25 * high).log_scale())?;
    // A label in the middle of each group.
    let label = |x: &f64| groups.get(x.floor() as usize).cloned().unwrap_or_default();
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().x_labels(2 * groups.len()).x_label_formatter(&label).y_label_formatter(&|y| format!("{y:.1}"));
    mesh.x_label_style(("sans-serif", 12).into_font().transform(FontTransform::Rotate90)).draw()?;
    let width = 0.9 / peers.len() as f64;
    for (at, peer) in peers.iter().enumerate() {
        let color = Palette99::pick(at).to_rgba();
        let bars = ratios.iter().filter(|ratio| ratio.peer == at).filter_map(|ratio| {
            let place = groups.iter().position(|name| *name == group(ratio))?;
            let left = place as f64 + 0.05 + at as f64 * width;
            Some(Rectangle::new([(left, 1.0), (left + width, ratio.values().0)], color.filled()))
        });
        let sample = move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled());
        chart.draw_series(bars)?.label(format!("{} : {}", peer.name, peer.device)).legend(sample);
    }
    chart.draw_series(LineSeries::new([(0.0, 1.0), (groups.len() as f64, 1.0)], BLACK))?;
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.85)).draw()?;
    root.present().with_context(|| format!("writing {}", file.display()))
}
