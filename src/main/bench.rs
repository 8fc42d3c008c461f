//! `gatefold bench`: times the same work, in the same way and the same JSON lines, as benchmarks of other libraries, so
//! that their lines can be put side by side (`benches/record`).

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gatefold::nn::{Lstm, LstmConfig, LstmState, Module};
use gatefold::verify::{Comparison, ForcedSweep};
use gatefold::{Device, Rng, Tensor};
use serde::Serialize;
use serde_json::json;

/// Cells that can be timed.
const CELLS: [&str; 1] = ["lstm"];

/// The shapes that are timed when none is given.
const SHAPES: [[usize; 4]; 6] =
    [[100, 1, 128, 128], [100, 32, 128, 128], [100, 32, 256, 256], [100, 64, 512, 512], [50, 64, 1024, 1024], [512, 1, 512, 512]];

/// An answer further from the reference than this is wrong: there is no point in timing it.
const TOLERANCE: f64 = 1e-4;

#[derive(clap::Args)]
#[command(after_long_help = "Environment:
  BENCH_BUDGET      seconds of timed runs for a case [4]
  BENCH_WARM        seconds of warm-up for a case [0.5]
  BENCH_MIN_RUNS    timed runs at least [5]
  BENCH_QUIET_WAIT  seconds to wait at most for other processes to leave the processor alone (Linux) [0]
  BENCH_ONLY        of the default shapes, those with one of these texts in their name: lstm_100_32,lstm_512
  BENCH_MODES       infer,train: what --mode overrides
  BENCH_REF         a folder of reference weights, inputs and answers (lstm_T_B_I_H.bin), to check before timing")]
pub struct Args {
    /// The device, as `gatefold devices` names it [default: the default device]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The cell: lstm
    #[arg(long, default_value = CELLS[0], value_parser = cell)]
    cell: String,
    /// Steps, rows of the batch, inputs, hidden units; may be repeated [default: six shapes, small to large]
    #[arg(long, value_name = "T,B,I,H", value_parser = shape)]
    shape: Vec<[usize; 4]>,
    /// Only one of the two [default: both]
    #[arg(long)]
    mode: Option<Mode>,
    /// The sweep over time of all shapes that it can do [default: as layers choose]
    #[arg(long)]
    sweep: Option<Sweep>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// The forward pass over the whole sequence
    Infer,
    /// Forward with a tape, and backward to all weights and to x; gradients accumulate, no optimizer
    Train,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Sweep {
    /// One launch a step
    Step,
    /// The loop over time inside the kernel
    Resident,
}

impl From<Sweep> for ForcedSweep {
    fn from(sweep: Sweep) -> Self {
        match sweep {
            Sweep::Step => Self::Step,
            Sweep::Resident => Self::Resident,
        }
    }
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Infer => "infer",
            Mode::Train => "train",
        }
    }
}

fn cell(text: &str) -> Result<String, String> {
    if CELLS.contains(&text) { Ok(text.to_owned()) } else { Err(format!("cells that exist: {}", CELLS.join(", "))) }
}

fn shape(text: &str) -> Result<[usize; 4], String> {
    crate::list(text, "T,B,I,H from 1").and_then(|sizes: [usize; 4]| match sizes.contains(&0) {
        true => Err("expected 4 numbers T,B,I,H from 1".to_owned()),
        false => Ok(sizes),
    })
}

/// Times every shape in every mode.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let policy = Policy::from_env()?;
    let device = crate::device(args.device.as_deref())?;
    device.force_sweep(args.sweep.map(Into::into));
    let modes = match args.mode {
        Some(mode) => vec![mode],
        None => modes_from_env(),
    };
    let reference = std::env::var_os("BENCH_REF");
    if !args.json {
        writeln!(out, "{} on {}\n", args.cell, device.info())?;
        let head = ("T", "B", "I", "H", "mode", "ms median", "ms min", "GFLOP/s", "runs", "first ms");
        let (t, b, i, h, mode, median, min, rate, runs, first) = head;
        writeln!(out, "{t:>5} {b:>5} {i:>5} {h:>5}  {mode:5} {median:>10} {min:>10} {rate:>8} {runs:>5} {first:>9}")?;
    }
    for shape in shapes(args) {
        let name = name(&args.cell, shape);
        let work = match &reference {
            Some(folder) => Work::read(&device, shape, &Path::new(folder).join(format!("{name}.bin"))),
            None => Work::random(&device, shape),
        };
        let work = work.with_context(|| name.clone())?;
        for mode in &modes {
            time(args, &policy, &device, &work, *mode, out).with_context(|| format!("{name} {}", mode.name()))?;
        }
    }
    Ok(())
}

fn name(cell: &str, [t, b, i, h]: [usize; 4]) -> String {
    format!("{cell}_{t}_{b}_{i}_{h}")
}

fn shapes(args: &Args) -> Vec<[usize; 4]> {
    if !args.shape.is_empty() {
        return args.shape.clone();
    }
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    let wanted = |shape: &[usize; 4]| only.is_empty() || only.split(',').any(|text| name(&args.cell, *shape).contains(text));
    SHAPES.into_iter().filter(wanted).collect()
}

/// Other programs of the comparison know more modes than these two, so others are left out.
fn modes_from_env() -> Vec<Mode> {
    let wanted = std::env::var("BENCH_MODES").unwrap_or_else(|_| "infer,train".to_owned());
    [Mode::Infer, Mode::Train].into_iter().filter(|mode| wanted.split(',').any(|text| text == mode.name())).collect()
}

/// Checks one mode of one shape where there is a reference, then times it.
fn time(args: &Args, policy: &Policy, device: &Device, work: &Work, mode: Mode, out: &mut impl Write) -> Result<()> {
    let [t, b, i, h] = work.shape;
    let json = |fields: serde_json::Value| {
        let mut line = json!({"peer": "gatefold", "cell": args.cell, "T": t, "B": b, "I": i, "H": h});
        line.as_object_mut().into_iter().zip(fields.as_object()).for_each(|(line, fields)| line.extend(fields.clone()));
        line["device"] = device.info().to_string().into();
        line
    };

    // The first run makes shaders, pipelines and buffers.
    work.lstm.zero_grad()?;
    device.synchronize()?;
    let start = Instant::now();
    let first = work.step(mode)?;
    device.synchronize()?;
    let first_ms = milliseconds(start.elapsed());
    if let Some(expected) = &work.expected {
        let errors = work.compare(&first, mode, expected)?;
        if args.json {
            let relerr: serde_json::Map<_, _> = errors.iter().map(|c| (c.tensor.clone(), json!(c.error))).collect();
            writeln!(out, "{}", json(json!({"mode": "check", "relerr": relerr})))?;
        } else {
            let errors: Vec<_> = errors.iter().map(|c| format!("{} {:.1e}", c.tensor, c.error)).collect();
            writeln!(out, "{t:>5} {b:>5} {i:>5} {h:>5}  check {}", errors.join(", "))?;
        }
        if let Some(wrong) = errors.iter().find(|comparison| !comparison.passes()) {
            bail!("{} is off its reference by {:.1e}: not timed", wrong.tensor, wrong.error);
        }
    }
    drop(first);

    let timing = policy.time(|| {
        work.step(mode)?;
        Ok(device.synchronize()?)
    })?;
    let Timing { ms_median, ms_min, runs, .. } = timing;
    if args.json {
        let mut fields = serde_json::to_value(&timing)?;
        fields["mode"] = mode.name().into();
        fields["first_ms"] = first_ms.into();
        writeln!(out, "{}", json(fields))?;
    } else {
        // Forward: the input product and the recurrent one; backward: each twice, by its input and by its weights.
        let passes = if mode == Mode::Train { 3 } else { 1 };
        let gflops = (passes * 8 * t * b * h * (i + h)) as f64 / ms_median / 1e6;
        let others = match timing.other_cpu {
            Some(cores) if cores > 0.3 => format!("  ! other processes used {cores} cores"),
            _ => String::new(),
        };
        let mode = mode.name();
        writeln!(
            out,
            "{t:>5} {b:>5} {i:>5} {h:>5}  {mode:5} {ms_median:>10.3} {ms_min:>10.3} {gflops:>8.1} {runs:>5} {first_ms:>9.1}{others}"
        )?;
    }
    Ok(())
}

/// One layer with its input and the gradient of its output, on the device.
struct Work {
    shape: [usize; 4],
    lstm: Lstm,
    x: Tensor,
    dy: Tensor,
    expected: Option<Expected>,
}

/// What a reference file says should come out, computed in float64.
struct Expected {
    y: Vec<f64>,
    h: Vec<f64>,
    c: Vec<f64>,
    dx: Vec<f64>,
    /// weight_ih, weight_hh, bias_ih, bias_hh
    params: Vec<Vec<f64>>,
}

/// What came out; the gradients of the parameters stay with them.
struct Answer {
    y: Tensor,
    state: LstmState,
    dx: Option<Tensor>,
}

impl Work {
    fn random(device: &Device, shape: [usize; 4]) -> Result<Self> {
        let [t, b, i, h] = shape;
        let mut rng = Rng::seed(1);
        let lstm = LstmConfig::new(i, h).init(device, &mut rng)?;
        let mut tensor = |features: usize, scale: f32| {
            let values: Vec<f32> = (0..t * b * features).map(|_| scale * rng.normal()).collect();
            Tensor::from_slice(device, &values, [t, b, features])
        };
        let (x, dy) = (tensor(i, 1.0)?, tensor(h, 1.0 / ((t * b * h) as f32).sqrt())?);
        Ok(Self { shape, lstm, x, dy, expected: None })
    }

    /// Little-endian f32 without gaps: x, the four parameters, dy; then y, h, c, dx and the parameters' gradients.
    fn read(device: &Device, shape: [usize; 4], path: &Path) -> Result<Self> {
        let [t, b, i, h] = shape;
        let bytes = std::fs::read(path).with_context(|| format!("BENCH_REF: {}", path.display()))?;
        let (x, y, state) = (t * b * i, t * b * h, b * h);
        let params = [4 * h * i, 4 * h * h, 4 * h, 4 * h];
        let count = 2 * (x + y + state + params.iter().sum::<usize>());
        let (given, wanted) = (bytes.len(), 4 * count);
        ensure!(given == wanted, "BENCH_REF: {} has {given} bytes, expected {wanted}", path.display());
        let mut numbers = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let mut take = |count: usize| -> Vec<f32> { numbers.by_ref().take(count).collect() };

        let lstm = LstmConfig::new(i, h).init(device, &mut Rng::seed(1))?;
        let x_values = take(x);
        for ((_, param), count) in lstm.params().into_iter().zip(params) {
            param.set(&take(count))?;
        }
        let dy = take(y);
        let mut expected = |count: usize| -> Vec<f64> { take(count).into_iter().map(f64::from).collect() };
        let expected = Expected {
            y: expected(y),
            h: expected(state),
            c: expected(state),
            dx: expected(x),
            params: params.into_iter().map(expected).collect(),
        };
        let x = Tensor::from_slice(device, &x_values, [t, b, i])?;
        let dy = Tensor::from_slice(device, &dy, [t, b, h])?;
        Ok(Self { shape, lstm, x, dy, expected: Some(expected) })
    }

    fn step(&self, mode: Mode) -> Result<Answer> {
        match mode {
            Mode::Infer => {
                let (y, state) = self.lstm.forward(&self.x, None)?;
                Ok(Answer { y, state, dx: None })
            }
            Mode::Train => {
                let (y, state, tape) = self.lstm.forward_train(&self.x, None)?;
                let (dx, _) = self.lstm.backward(tape, &self.dy, None)?;
                Ok(Answer { y, state, dx: Some(dx) })
            }
        }
    }

    /// Under the names that the other programs of the comparison use.
    fn compare(&self, answer: &Answer, mode: Mode, expected: &Expected) -> Result<Vec<Comparison>> {
        let compare = |name: &str, computed: &Tensor, expected: &[f64]| -> Result<Comparison> {
            Ok(Comparison::new(name, &computed.to_vec()?, expected, TOLERANCE))
        };
        let mut comparisons = vec![
            compare("y", &answer.y, &expected.y)?,
            compare("h", &answer.state.h, &expected.h)?,
            compare("c", &answer.state.c, &expected.c)?,
        ];
        if let Some(dx) = answer.dx.as_ref().filter(|_| mode == Mode::Train) {
            comparisons.push(compare("dx", dx, &expected.dx)?);
            for (((_, param), expected), name) in
                self.lstm.params().into_iter().zip(&expected.params).zip(["dw_ih", "dw_hh", "db_ih", "db_hh"])
            {
                comparisons.push(compare(name, param.grad(), expected)?);
            }
        }
        Ok(comparisons)
    }
}

/// How long to run.
struct Policy {
    warm: f64,
    budget: f64,
    min_runs: usize,
    quiet_wait: f64,
}

#[derive(Serialize)]
struct Timing {
    ms_median: f64,
    ms_min: f64,
    runs: usize,
    /// Cores that other processes used meanwhile; absent where the system does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    other_cpu: Option<f64>,
}

impl Policy {
    fn from_env() -> Result<Self> {
        let number = |variable: &str, default: f64| match std::env::var(variable) {
            Ok(text) if !text.is_empty() => {
                let value = text.parse().ok().filter(|value: &f64| *value >= 0.0);
                value.with_context(|| format!("{variable} is {text:?}, expected a number from 0"))
            }
            _ => Ok(default),
        };
        Ok(Self {
            warm: number("BENCH_WARM", 0.5)?,
            budget: number("BENCH_BUDGET", 4.0)?,
            min_runs: number("BENCH_MIN_RUNS", 5.0)?.max(1.0) as usize,
            quiet_wait: number("BENCH_QUIET_WAIT", 0.0)?,
        })
    }

    /// Warms up, then times runs until the budget is spent. A run of more than 2 seconds is warmed up once and timed
    /// three times.
    fn time(&self, mut run: impl FnMut() -> Result<()>) -> Result<Timing> {
        self.wait_until_quiet();
        let (start, mut runs, mut last) = (Instant::now(), 1, 0.0);
        while (runs < 3 || start.elapsed().as_secs_f64() < self.warm) && last < 2.0 {
            let start = Instant::now();
            run()?;
            last = start.elapsed().as_secs_f64();
            runs += 1;
        }
        let min_runs = if last > 2.0 { self.min_runs.min(3) } else { self.min_runs };
        let (before, start, mut times) = (cpu_seconds(), Instant::now(), Vec::new());
        while times.len() < min_runs || (start.elapsed().as_secs_f64() < self.budget && times.len() < 300) {
            let start = Instant::now();
            run()?;
            times.push(milliseconds(start.elapsed()));
        }
        let other_cpu = others(before, cpu_seconds(), start.elapsed());
        times.sort_by(f64::total_cmp);
        let middle = times.len() / 2;
        let ms_median = if times.len() % 2 == 1 { times[middle] } else { 0.5 * (times[middle - 1] + times[middle]) };
        let other_cpu = other_cpu.map(|cores| (cores * 100.0).round() / 100.0);
        Ok(Timing { ms_median, ms_min: times[0], runs: times.len(), other_cpu })
    }

    /// Waits until other processes use less than 0.15 cores, but no longer than it may.
    fn wait_until_quiet(&self) {
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < self.quiet_wait {
            let (before, start) = (cpu_seconds(), Instant::now());
            std::thread::sleep(Duration::from_millis(1500));
            if others(before, cpu_seconds(), start.elapsed()).is_none_or(|cores| cores < 0.15) {
                return;
            }
        }
    }
}

fn milliseconds(elapsed: Duration) -> f64 {
    elapsed.as_nanos() as f64 / 1e6
}

/// Cores that other processes used between two readings of [`cpu_seconds`].
fn others(before: Option<(f64, f64)>, after: Option<(f64, f64)>, elapsed: Duration) -> Option<f64> {
    let ((all_before, own_before), (all_after, own_after)) = (before?, after?);
    Some((((all_after - all_before) - (own_after - own_before)) / elapsed.as_secs_f64()).max(0.0))
}

/// Seconds of processor time that the machine and that this process used so far, from Linux's /proc.
fn cpu_seconds() -> Option<(f64, f64)> {
    // Ticks of Linux's interface, whatever the kernel's own are.
    const HERTZ: f64 = 100.0;
    let numbers = |text: &str| -> Vec<f64> { text.split_whitespace().map(|word| word.parse().unwrap_or(0.0)).collect() };
    let machine = std::fs::read_to_string("/proc/stat").ok()?;
    let machine = numbers(machine.lines().next()?.strip_prefix("cpu")?);
    let [user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen, ..] = machine[..] else { return None };
    // The name of the process stands in brackets and may hold anything; utime and stime are fields 14 and 15.
    let own = std::fs::read_to_string("/proc/self/stat").ok()?;
    let own = numbers(own.rsplit_once(')')?.1);
    let busy = user + nice + system + interrupts + soft_interrupts + stolen;
    Some((busy / HERTZ, (own.get(11)? + own.get(12)?) / HERTZ))
}
