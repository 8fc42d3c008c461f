//! `gatefold verify`.

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use gatefold::verify::cases::{self, Case};
use gatefold::verify::{Comparison, DeviceReport, Report, TestReport, Verdict, kernels, write_reports};

#[derive(clap::Args)]
pub struct Args {
    /// A device to check, as `gatefold devices` names it; several are checked in turn [default: the default device]
    #[arg(long, value_name = "NAME")]
    device: Vec<String>,
    /// Only the kernel families with TEXT in their names; case files run all the same
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// A folder of case files (*.safetensors) that PyTorch or ONNX Runtime wrote; generate.py and generate_onnx.py of tests/fixtures
    /// describe them. Several are checked in turn
    #[arg(long, value_name = "FOLDER")]
    cases: Vec<PathBuf>,
    /// The largest errors of a case file's outputs and gradients, relative to a tensor's largest magnitude; ten times
    /// PyTorch's own float32 error where that is more, and twice OUT for ONNX Runtime's outputs, which are float32
    #[arg(long, value_name = "OUT,GRAD", default_value = "1e-5,5e-5", value_parser = tolerance)]
    tolerance: [f64; 2],
    /// Write what came of it, with the device, its driver and the largest errors of all outputs and gradients, to FILE.md and, for programs,
    /// to FILE.json; an extension .md or .json of FILE is left out. To send along with a bug report, or from a machine that nobody else has
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
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

/// Whether tests ran and all of them passed, on all devices: a test is a kernel family or the folder of case files on one device.
pub fn run(args: &Args, out: &mut impl Write) -> Result<bool> {
    // Unreadable files and unknown devices are told at once, not after minutes of checks.
    let read = |folder: &PathBuf| Ok((folder.display().to_string(), cases::read_dir(folder)?));
    let folders: Vec<(String, Vec<(String, Case)>)> = args.cases.iter().map(read).collect::<Result<_>>()?;
    let devices = match &args.device[..] {
        [] => vec![crate::device(None)?],
        names => names.iter().map(|name| crate::device(Some(name))).collect::<Result<_>>()?,
    };
    let [output, gradient] = args.tolerance;
    let write = |reports: &[DeviceReport]| args.report.as_deref().map_or(Ok(()), |file| write_reports(file, reports));
    let mut reports: Vec<DeviceReport> = Vec::new();
    write(&reports)?;
    for device in &devices {
        writeln!(out, "{}", device.info())?;
        reports.push(DeviceReport::new(device));
        let is_wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
        let kernels: Vec<_> = kernels::all().into_iter().filter(|kernel| is_wanted(kernel.name)).collect();
        let of_kernels = kernels.iter().map(|kernel| (TestReport::of_kernel(device, kernel), false));
        let of_folders = folders.iter().map(|(folder, cases)| {
            let test = TestReport::of_cases(device, folder, cases, (output, gradient));
            (test, true)
        });
        for (test, files) in of_kernels.chain(of_folders) {
            Table { out, verbose: args.verbose, files }.test(&test)?;
            if let Some(report) = reports.last_mut() {
                report.tests.push(test);
            }
            // After each test: a driver may take the program down with it.
            write(&reports)?;
        }
        writeln!(out)?;
    }
    let [passed, failed, ignored] = reports.iter().map(DeviceReport::counts).fold([0; 3], |a, b| [0, 1, 2].map(|n| a[n] + b[n]));
    if ignored > 0 {
        writeln!(out, "{ignored} not for this device")?;
    }
    writeln!(out, "{passed} passed, {failed} failed")?;
    Ok(failed == 0 && passed > 0)
}

struct Table<'a, W> {
    out: &'a mut W,
    verbose: bool,
    /// Whether each case has a line of its own.
    files: bool,
}

impl<W: Write> Table<'_, W> {
    /// A line with the worst tensor of all cases; then what failed, or all.
    fn test(&mut self, test: &TestReport) -> Result<()> {
        let all = || test.reports.iter().flat_map(|report| report.comparisons.iter().map(move |c| (report, c)));
        let worst = |report: &Report| report.comparisons.iter().max_by(|a, b| severity(a).total_cmp(&severity(b))).map(text);
        if self.files {
            for report in &test.reports {
                let verdict = if report.unsupported.is_some() { "unsupported" } else { verdict(report.passes()) };
                self.line(verdict, &report.case, report.unsupported.clone().or_else(|| worst(report)).unwrap_or_default())?;
            }
        }
        let most = all().map(|(_, comparison)| comparison).max_by(|a, b| severity(a).total_cmp(&severity(b)));
        if test.verdict == Verdict::Ignored {
            return self.line(test.verdict.name(), &test.test, test.notes.join(", "));
        }
        let name = format!("{} ({} cases, {:.1} s)", test.test, test.cases, test.seconds);
        self.line(test.verdict.name(), &name, most.map_or(String::new(), text))?;
        for (report, comparison) in all().filter(|_| self.verbose).collect::<Vec<_>>() {
            self.line(&format!("  {}", verdict(comparison.passes())), &format!("  {}", report.case), text(comparison))?;
        }
        test.notes.iter().try_for_each(|note| self.line("", "", note))
    }

    fn line(&mut self, verdict: &str, name: &str, text: impl Display) -> Result<()> {
        Ok(writeln!(self.out, "  {verdict:14} {name:44} {text}")?)
    }
}

fn verdict(passes: bool) -> &'static str {
    if passes { Verdict::Passed.name() } else { Verdict::Failed.name() }
}

fn text(comparison: &Comparison) -> String {
    format!("{:8.1e} (bound {:.1e})  {}", comparison.error, comparison.bound, comparison.tensor)
}

/// How near its bound, or how far beyond, an error is: the worst tensor is not always the one with the largest error.
fn severity(comparison: &Comparison) -> f64 {
    if comparison.error.is_nan() { f64::INFINITY } else { comparison.error / comparison.bound.max(f64::MIN_POSITIVE) }
}
