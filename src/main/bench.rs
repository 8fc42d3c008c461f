//! `gatefold bench`: times the same work, in the same way and the same JSON lines, as benchmarks of other libraries, so
//! that their lines can be put side by side (`benches/compare.rs`, `benches/record`); single kernels against the peaks of the
//! device; and the start of a program.

#[path = "bench/choices.rs"]
mod choices;
#[path = "bench/kernels.rs"]
mod kernels;
#[path = "bench/layer.rs"]
mod layer;
#[path = "bench/startup.rs"]
mod startup;
#[path = "bench/timing.rs"]
mod timing;

use std::io::Write;

use anyhow::{Context, Result, bail};
use gatefold::nn::Precision;
use gatefold::{Device, KernelOverride, LayerOrder, PairKernel, ProductKernel, StepKernel, SweepKernel};
use serde_json::{Value, json};

use layer::{Spec, Work};
use timing::{Policy, Timing, milliseconds};

/// The shapes that are timed when none is given.
const SHAPES: [[usize; 4]; 6] =
    [[100, 1, 128, 128], [100, 32, 128, 128], [100, 32, 256, 256], [100, 64, 512, 512], [50, 64, 1024, 1024], [512, 1, 512, 512]];

#[derive(clap::Args)]
#[command(after_long_help = "Environment:
  BENCH_BUDGET      seconds of timed runs for a case [4]
  BENCH_WARM        seconds of warm-up for a case [0.5]
  BENCH_MIN_RUNS    timed runs at least [5]
  BENCH_QUIET_WAIT  seconds to wait at most for other processes to leave the processor alone (Linux) [0]
  BENCH_ONLY        of the default shapes, those with one of these texts in their name: lstm_100_32,lstm_512; of --tune, the tables
  BENCH_MODES       infer,train,step: what --mode overrides [infer,train]
  BENCH_REF         a folder of reference weights, inputs and answers (lstm_T_B_I_H.bin), to check before timing")]
pub struct Args {
    /// The device, as `gatefold devices` names it [default: the default device]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The cells
    #[arg(long, value_enum, value_delimiter = ',', default_value = "lstm")]
    cell: Vec<CellName>,
    /// Steps, rows of the batch, inputs, hidden units; may be repeated [default: six shapes, small to large]
    #[arg(long, value_name = "T,B,I,H", value_parser = shape)]
    shape: Vec<[usize; 4]>,
    /// Layers on top of each other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    layers: u8,
    /// Only one of these [default: infer and train]
    #[arg(long)]
    mode: Option<Mode>,
    /// Of the products of layers
    #[arg(long, value_enum, default_value = "single")]
    precision: PrecisionName,
    /// The sweep over time of all layers that it can do, in place of the tables' [scan, resident, grid, step]
    #[arg(long, value_name = "KERNEL", value_parser = choices::kernel::<SweepKernel>)]
    sweep: Option<SweepKernel>,
    /// The kernel of single steps, likewise [general, tiled, subgroup, subgroup_row]
    #[arg(long, value_name = "KERNEL", value_parser = choices::kernel::<StepKernel>)]
    step_kernel: Option<StepKernel>,
    /// Of steps of two products, likewise [fused, apart]
    #[arg(long, value_name = "KERNEL", value_parser = choices::kernel::<PairKernel>)]
    pair_kernel: Option<PairKernel>,
    /// How the layers of a stack follow each other, likewise [in_turn, wavefront]
    #[arg(long, value_name = "ORDER", value_parser = choices::kernel::<LayerOrder>)]
    layer_order: Option<LayerOrder>,
    /// The kernel of products, likewise [general, subgroup_rows, ..]
    #[arg(long, value_name = "KERNEL", value_parser = choices::kernel::<ProductKernel>)]
    product_kernel: Option<ProductKernel>,
    /// Time each kernel of a layer's training step by itself, against a copy and a multiply-add loop on the same device
    #[arg(long, conflicts_with_all = ["mode", "layers"])]
    kernels: bool,
    /// Say which kernels a training step on a GPU spends its time in
    #[arg(long, conflicts_with_all = ["mode", "kernels"])]
    profile: bool,
    /// Time what comes before the second step of a program: opening the device, making pipelines
    #[arg(long, conflicts_with_all = ["mode", "kernels", "profile"])]
    startup: bool,
    /// Say which kernels a training step on a GPU takes, by which row of the tables, and why
    #[arg(long, conflicts_with_all = ["kernels", "profile", "startup"])]
    explain: bool,
    /// Measure the kernels that a GPU can take against each other, and print rows for the tables in kernels/choice.rs
    #[arg(long, conflicts_with_all = ["mode", "layers", "shape", "kernels", "profile", "startup", "explain", "sweep", "step_kernel", "pair_kernel", "layer_order", "product_kernel"])]
    tune: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// A precision that can be timed.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PrecisionName {
    /// f32
    Single,
    /// Factors of products in f16, sums in f32
    Half,
}

impl PrecisionName {
    fn name(self) -> &'static str {
        match self {
            PrecisionName::Single => "single",
            PrecisionName::Half => "half",
        }
    }
}

impl From<PrecisionName> for Precision {
    fn from(name: PrecisionName) -> Self {
        match name {
            PrecisionName::Single => Precision::Single,
            PrecisionName::Half => Precision::Half,
        }
    }
}

/// A cell that can be timed.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CellName {
    Lstm,
    Gru,
    Rnn,
}

impl CellName {
    fn name(self) -> &'static str {
        match self {
            CellName::Lstm => "lstm",
            CellName::Gru => "gru",
            CellName::Rnn => "rnn",
        }
    }

    fn gates(self) -> usize {
        match self {
            CellName::Lstm => 4,
            CellName::Gru => 3,
            CellName::Rnn => 1,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// The forward pass over the whole sequence
    Infer,
    /// Forward with a tape, and backward to all weights and to x; gradients accumulate, no optimizer
    Train,
    /// One step of a stream, with the state carried from run to run; each is waited for
    Step,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Infer => "infer",
            Mode::Train => "train",
            Mode::Step => "step",
        }
    }

    /// Multiply-adds are two operations. Forward: the input product and the recurrent one; backward: each twice, by its input and by
    /// its weights.
    fn flops(self, spec: &Spec<'_>) -> f64 {
        let [t, b, i, h] = spec.shape;
        let steps = if self == Mode::Step { 1 } else { t };
        let widths = i + h + (spec.layers - 1) * 2 * h;
        let passes = if self == Mode::Train { 3 } else { 1 };
        (passes * 2 * spec.cell.gates() * steps * b * h * widths) as f64
    }
}

fn shape(text: &str) -> Result<[usize; 4], String> {
    crate::list(text, "T,B,I,H from 1").and_then(|sizes: [usize; 4]| match sizes.contains(&0) {
        true => Err("expected 4 numbers T,B,I,H from 1".to_owned()),
        false => Ok(sizes),
    })
}

/// Times what the arguments say.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let policy = Policy::from_env()?;
    if args.startup {
        return startup::run(args, out);
    }
    let device = open(args)?;
    match args {
        Args { kernels: true, .. } => kernels::run(args, &policy, &device, out),
        Args { profile: true, .. } => kernels::profile(args, &device, out),
        Args { explain: true, .. } => choices::explain(args, &device, out),
        Args { tune: true, .. } => choices::tune(args, &policy, &device, out),
        _ => layers(args, &policy, &device, out),
    }
}

/// The device with the kernels that the arguments name.
fn open(args: &Args) -> Result<Device> {
    let device = crate::device(args.device.as_deref())?;
    let kernels = KernelOverride::default().product(args.product_kernel).step(args.step_kernel);
    let kernels = kernels.pair(args.pair_kernel).sweep(args.sweep).layers(args.layer_order);
    device.override_kernels(kernels).context("--sweep, --step-kernel, --pair-kernel, --layer-order, --product-kernel")?;
    Ok(device)
}

/// Every cell with every shape that is asked for, or with those of `default`.
fn specs<'a>(args: &Args, device: &'a Device, default: &[[usize; 4]]) -> Result<Vec<Spec<'a>>> {
    let spec = |(cell, shape)| Spec { device, cell, shape, layers: args.layers.into(), precision: args.precision };
    Ok(shapes(args, default)?.into_iter().map(spec).collect())
}

fn shapes(args: &Args, default: &[[usize; 4]]) -> Result<Vec<(CellName, [usize; 4])>> {
    let of = |cell: CellName, shapes: &[[usize; 4]]| shapes.iter().map(|shape| (cell, *shape)).collect::<Vec<_>>();
    if !args.shape.is_empty() {
        return Ok(args.cell.iter().flat_map(|cell| of(*cell, &args.shape)).collect());
    }
    let all: Vec<_> = args.cell.iter().flat_map(|cell| of(*cell, default)).collect();
    let names: Vec<String> = all.iter().map(|(cell, shape)| layer::name(*cell, *shape)).collect();
    let wanted = wanted("BENCH_ONLY", &names, |name, text| name.contains(text))?;
    Ok(all.into_iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(shape, _)| shape).collect())
}

/// Which of `names` an environment variable asks for, by texts between commas: all of them where it is not set. A text that fits none
/// is an error.
fn wanted(variable: &str, names: &[impl AsRef<str>], fits: impl Fn(&str, &str) -> bool) -> Result<Vec<bool>> {
    let texts = std::env::var(variable).unwrap_or_default();
    if texts.is_empty() {
        return Ok(vec![true; names.len()]);
    }
    let texts: Vec<&str> = texts.split(',').map(str::trim).collect();
    if let Some(none) = texts.iter().find(|text| !names.iter().any(|name| fits(name.as_ref(), text))) {
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        bail!("{variable} names {none:?}, expected some of: {}", names.join(", "));
    }
    Ok(names.iter().map(|name| texts.iter().any(|text| fits(name.as_ref(), text))).collect())
}

fn modes(args: &Args) -> Result<Vec<Mode>> {
    if let Some(mode) = args.mode {
        return Ok(vec![mode]);
    }
    if std::env::var_os("BENCH_MODES").is_none_or(|modes| modes.is_empty()) {
        return Ok(vec![Mode::Infer, Mode::Train]);
    }
    let all = [Mode::Infer, Mode::Train, Mode::Step];
    let wanted = wanted("BENCH_MODES", &all.map(Mode::name), |name, text| name == text)?;
    Ok(all.into_iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(mode, _)| mode).collect())
}

/// Every shape in every mode.
fn layers(args: &Args, policy: &Policy, device: &Device, out: &mut impl Write) -> Result<()> {
    let reference = std::env::var_os("BENCH_REF");
    if !args.json {
        writeln!(out, "{}, {} precision\n", device.info(), args.precision.name())?;
        let head = ("T", "B", "I", "H", "mode", "ms median", "ms min", "GFLOP/s", "host ms", "peak MB", "runs", "first ms");
        let (t, b, i, h, mode, median, min, rate, host, peak, runs, first) = head;
        write!(out, "cell {t:>5} {b:>5} {i:>5} {h:>5}  {mode:5} {median:>10} {min:>10} ")?;
        writeln!(out, "{rate:>8} {host:>8} {peak:>8} {runs:>5} {first:>9}")?;
    }
    let modes = modes(args)?;
    for spec in specs(args, device, &SHAPES)? {
        let name = spec.name();
        let mut work = spec.build(reference.as_deref().map(std::path::Path::new)).with_context(|| name.clone())?;
        for &mode in &modes {
            time(args, policy, &spec, work.as_mut(), mode, out).with_context(|| format!("{name} {}", mode.name()))?;
        }
    }
    Ok(())
}

/// A JSON line of the schema that the programs of the comparison share.
fn line(spec: &Spec<'_>, fields: &Value) -> Value {
    let [t, b, i, h] = spec.shape;
    let cell = spec.cell.name();
    let mut line = json!({"peer": "gatefold", "cell": cell, "T": t, "B": b, "I": i, "H": h, "layers": spec.layers,
        "precision": spec.precision.name()});
    line.as_object_mut().into_iter().zip(fields.as_object()).for_each(|(line, fields)| line.extend(fields.clone()));
    line["device"] = spec.device.info().to_string().into();
    line
}

/// Checks one mode of one shape where there is a reference, then times it.
fn time(args: &Args, policy: &Policy, spec: &Spec<'_>, work: &mut dyn Work, mode: Mode, out: &mut impl Write) -> Result<()> {
    let ([t, b, i, h], device) = (spec.shape, spec.device);
    let start = format!("{:4} {t:>5} {b:>5} {i:>5} {h:>5} ", spec.cell.name());
    device.synchronize()?;
    device.reset_peak();
    // The first run makes shaders, pipelines and buffers.
    let first_ms = milliseconds(layer::timed(work, mode, device)?.0);
    let peak_bytes = device.memory().peak;
    if let Some(errors) = work.check(mode)? {
        if args.json {
            let relerr: serde_json::Map<_, _> = errors.iter().map(|c| (c.tensor.clone(), json!(c.error))).collect();
            writeln!(out, "{}", line(spec, &json!({"mode": "check", "relerr": relerr})))?;
        } else {
            let errors: Vec<_> = errors.iter().map(|c| format!("{} {:.1e}", c.tensor, c.error)).collect();
            writeln!(out, "{start} check {}", errors.join(", "))?;
        }
        if let Some(wrong) = errors.iter().find(|comparison| !comparison.passes()) {
            bail!("{} is off its reference by {:.1e}: not timed", wrong.tensor, wrong.error);
        }
    }

    let timing = policy.time(|| layer::timed(work, mode, device))?;
    if args.json {
        let mut fields = serde_json::to_value(&timing)?;
        fields["mode"] = mode.name().into();
        fields["first_ms"] = first_ms.into();
        fields["peak_bytes"] = peak_bytes.into();
        writeln!(out, "{}", line(spec, &fields))?;
    } else {
        let Timing { ms_median, ms_min, runs, host_ms, .. } = timing;
        let gflops = mode.flops(spec) / ms_median / 1e6;
        let host = host_ms.map_or("-".to_owned(), |ms| format!("{ms:.3}"));
        let peak = peak_bytes as f64 / 1e6;
        write!(out, "{start} {:5} {ms_median:>10.3} {ms_min:>10.3} {gflops:>8.1} {host:>8} ", mode.name())?;
        writeln!(out, "{peak:>8.1} {runs:>5} {first_ms:>9.1}{}", timing.disturbed())?;
    }
    Ok(())
}
