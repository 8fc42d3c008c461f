//! `gatefold verify`.

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use gatefold::Device;
use gatefold::verify::cases::{self, Case};
use gatefold::verify::{Comparison, Report, kernels};

#[derive(clap::Args)]
pub struct Args {
    /// A device to check, as `gatefold devices` names it; several are checked in turn [default: the default device]
    #[arg(long, value_name = "NAME")]
    device: Vec<String>,
    /// A folder of case files (*.safetensors) that PyTorch or ONNX Runtime wrote; generate.py and generate_onnx.py of tests/fixtures
    /// describe them
    #[arg(long, value_name = "FOLDER")]
    cases: Option<PathBuf>,
    /// The largest errors of a case file's outputs and gradients, relative to a tensor's largest magnitude; ten times
    /// PyTorch's own float32 error where that is more, and twice OUT for ONNX Runtime's outputs, which are float32
    #[arg(long, value_name = "OUT,GRAD", default_value = "1e-5,5e-5", value_parser = tolerance)]
    tolerance: [f64; 2],
    /// Every tensor of every case
    #[arg(short, long)]
    verbose: bool,
}

fn tolerance(text: &str) -> Result<[f64; 2], String> {
    crate::list(text, "OUT,GRAD from 0").and_then(|values: [f64; 2]| match values.iter().all(|value| *value >= 0.0) {
        true => Ok(values),
        false => Err("expected 2 numbers OUT,GRAD from 0".to_owned()),
    })
}

/// Whether everything that could run passed, on all devices.
pub fn run(args: &Args, out: &mut impl Write) -> Result<bool> {
    // Unreadable files and unknown devices are told at once, not after minutes of checks.
    let cases = args.cases.as_deref().map(cases::read_dir).transpose()?.unwrap_or_default();
    let devices = match &args.device[..] {
        [] => vec![crate::device(None)?],
        names => names.iter().map(|name| crate::device(Some(name))).collect::<Result<_>>()?,
    };
    let mut all_passed = true;
    for device in &devices {
        all_passed &= check(device, &cases, args, out)?;
    }
    Ok(all_passed)
}

fn check(device: &Device, cases: &[(String, Case)], args: &Args, out: &mut impl Write) -> Result<bool> {
    writeln!(out, "{}", device.info())?;
    let start = Instant::now();
    let mut table = Table { out, verbose: args.verbose, passed: 0, failed: 0, unsupported: 0 };
    for kernel in kernels::all() {
        table.row(kernel.name, kernel.run(device))?;
    }
    let (mut outputs, mut gradients) = (0.0, 0.0);
    let [output, gradient] = args.tolerance;
    if let Some(folder) = &args.cases {
        writeln!(table.out, "  case files of {}", folder.display())?;
    }
    for (name, case) in cases {
        let report = case.run(device, name, (output, gradient));
        for comparison in report.iter().flat_map(|report| &report.comparisons) {
            let worst = if comparison.tensor.starts_with("grad.") { &mut gradients } else { &mut outputs };
            *worst = worse(*worst, comparison.error);
        }
        table.row(name, report.map(|report| vec![report]))?;
    }
    let Table { passed, failed, unsupported, .. } = table;
    if !cases.is_empty() {
        writeln!(out, "Case files: worst error of outputs {outputs:.1e}, of gradients {gradients:.1e}")?;
    }
    let seconds = start.elapsed().as_secs_f64();
    writeln!(out, "{passed} passed, {failed} failed, {unsupported} unsupported ({seconds:.1} s)\n")?;
    Ok(failed == 0)
}

struct Table<'a, W> {
    out: &'a mut W,
    verbose: bool,
    passed: usize,
    failed: usize,
    unsupported: usize,
}

impl<W: Write> Table<'_, W> {
    /// One line with the worst tensor of a kernel's cases or of a case file; then what failed, or all.
    fn row(&mut self, name: &str, reports: gatefold::Result<Vec<Report>>) -> Result<()> {
        let reports = match reports {
            Ok(reports) => reports,
            Err(error) => {
                self.failed += 1;
                return self.line("FAIL", name, error);
            }
        };
        let mut ran = 0;
        let before = self.failed;
        for report in &reports {
            match &report.unsupported {
                Some(what) => {
                    self.unsupported += 1;
                    self.line("unsupported", &report.case, what)?;
                }
                None => {
                    ran += 1;
                    self.failed += usize::from(!report.passes());
                }
            }
        }
        let failed = self.failed - before;
        self.passed += ran - failed;
        let all = || reports.iter().flat_map(|report| report.comparisons.iter().map(move |comparison| (report, comparison)));
        if let Some((_, worst)) = all().max_by(|a, b| severity(a.1).total_cmp(&severity(b.1))) {
            let cases = if ran == 1 { String::new() } else { format!(" ({ran} cases)") };
            self.line(verdict(failed == 0), &format!("{name}{cases}"), text(worst))?;
        } else if failed > 0 {
            self.line(verdict(false), name, "nothing was compared")?;
        }
        for (report, comparison) in all().filter(|(_, comparison)| self.verbose || !comparison.passes()).collect::<Vec<_>>() {
            self.line(&format!("  {}", verdict(comparison.passes())), &format!("  {}", report.case), text(comparison))?;
        }
        Ok(())
    }

    fn line(&mut self, verdict: &str, name: &str, text: impl Display) -> Result<()> {
        Ok(writeln!(self.out, "  {verdict:11} {name:40} {text}")?)
    }
}

fn verdict(passes: bool) -> &'static str {
    if passes { "ok" } else { "FAIL" }
}

fn text(comparison: &Comparison) -> String {
    format!("{:8.1e} (bound {:.1e})  {}", comparison.error, comparison.bound, comparison.tensor)
}

/// How near its bound, or how far beyond, an error is: the worst tensor is not always the one with the largest error.
fn severity(comparison: &Comparison) -> f64 {
    if comparison.error.is_nan() { f64::INFINITY } else { comparison.error / comparison.bound.max(f64::MIN_POSITIVE) }
}

/// The larger error; NaN is the largest.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || a >= b { a } else { b }
}
