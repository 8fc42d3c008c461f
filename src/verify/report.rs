//! What came of all families on one device, for people and for programs. Needs no command line, no files and no clock of std:
//! a program in a browser, or with a wgpu device of its own, makes the same report.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use web_time::{Instant, SystemTime};

use super::cases::Case;
use super::kernels::KernelCheck;
use super::known::{KNOWN_FAILURES, judge};
use super::{Comparison, Distance, Report};
use crate::device::{Device, DeviceInfo};
use crate::error::{Error, Result};

/// What came of all tests on one device. As JSON, numbers that are not finite are `null`.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DeviceReport {
    /// This crate's version.
    pub gatefold: &'static str,
    /// Operating system and processor of the program: `linux x86_64`.
    pub target: String,
    /// When the report was begun, UTC: `2026-11-25T23:30:00Z`.
    pub date: String,
    /// Name, backend, driver and its version, kind, features and limits of the open device.
    pub device: DeviceInfo,
    /// Kernel families and folders of case files, in the order in which they ran.
    pub tests: Vec<TestReport>,
}

/// What came of one test: a kernel family, or a folder of case files, on one device.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct TestReport {
    /// The family's or the folder's name.
    pub test: String,
    /// Whether it passed.
    pub verdict: Verdict,
    /// Cases that ran.
    pub cases: usize,
    /// What it took.
    pub seconds: f64,
    /// Where it failed; why it did not run, or not all of it; what is known.
    pub notes: Vec<String>,
    /// Each output and gradient that was compared with f64, in the order of their first comparison.
    pub tensors: Vec<TensorReport>,
    /// All cases.
    #[serde(skip)]
    pub reports: Vec<Report>,
}

/// Whether a test passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All cases ran and all comparisons were within their bounds.
    Passed,
    /// As [`KNOWN_FAILURES`] says: counts as passed.
    FailedAsKnown,
    /// Something was wrong, or nothing ran.
    Failed,
    /// The device does not offer what the family's kernels need.
    Ignored,
}

/// The largest distances of one tensor's numbers from those of f64, over all cases of a test.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TensorReport {
    /// The tensor's name; a number in it, as of a layer or a step, is `#`.
    pub tensor: String,
    /// How often it was compared.
    pub comparisons: usize,
    /// The largest distance of each kind.
    #[serde(flatten)]
    pub distance: Distance,
}

impl DeviceReport {
    /// A report of no test so far: a program adds one for each of [`kernels::all`](super::kernels::all), and does between two what it must.
    pub fn new(device: &Device) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let date = jiff::Timestamp::from_second(now.as_secs() as i64).unwrap_or_default();
        Self {
            gatefold: env!("CARGO_PKG_VERSION"),
            // A browser tells no system.
            target: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH).trim().to_owned(),
            date: date.to_string(),
            device: device.info(),
            tests: Vec::new(),
        }
    }

    /// Tests that passed, that failed, and that the device cannot run.
    pub fn counts(&self) -> [usize; 3] {
        let count = |of: &dyn Fn(Verdict) -> bool| self.tests.iter().filter(|test| of(test.verdict)).count();
        [count(&Verdict::passes), count(&|verdict| verdict == Verdict::Failed), count(&|verdict| verdict == Verdict::Ignored)]
    }

    /// A section of Markdown: the device, a table of the tests, and one of all tensors.
    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String never fails.
        let _ = self.write_markdown(&mut text);
        text
    }

    fn write_markdown(&self, text: &mut String) -> std::fmt::Result {
        let Self { device, .. } = self;
        let [passed, failed, ignored] = self.counts();
        writeln!(text, "## {device}\n")?;
        write!(text, "{passed} passed, {failed} failed, {ignored} not for this device.")?;
        // Families of half precision have it in their names.
        let single = self.tests.iter().filter(|test| !test.test.contains("half"));
        let compared = single.flat_map(|test| test.tensors.iter().map(|tensor| (&test.test, tensor)));
        if let Some((test, TensorReport { tensor, distance, .. })) = worst(compared, |(_, tensor)| tensor) {
            let Distance { relative, ulps_of_scale, .. } = distance;
            write!(
                text,
                " Largest error in single precision: {relative:.1e} ({ulps_of_scale:.0} ULP of scale), {tensor} of {test}."
            )?;
        }
        writeln!(text, " gatefold {}, {}, {}.\n", self.gatefold, self.target, self.date)?;
        let limits: Vec<String> = device.limits.iter().map(|(name, value)| format!("{name} {value}")).collect();
        for (what, list) in [("Features", device.features.join(", ")), ("Limits", limits.join(", "))] {
            if !list.is_empty() {
                writeln!(text, "{what}: {list}.\n")?;
            }
        }
        writeln!(
            text,
            "| test | verdict | cases | s | largest error | ULP of scale | ULP | tensor |\n|---|---|---|---|---|---|---|---|"
        )?;
        for test in &self.tests {
            let worst = worst(test.tensors.iter(), |tensor| tensor);
            let (name, numbers) = worst.map_or(("", " | | ".to_owned()), |worst| (&worst.tensor, worst.numbers()));
            let TestReport { test, verdict, cases, seconds, .. } = test;
            writeln!(text, "| {test} | {} | {cases} | {seconds:.1} | {numbers} | {} |", verdict.name(), cell(name))?;
        }
        for test in self.tests.iter().filter(|test| !test.notes.is_empty()) {
            writeln!(text, "\n{}, {}:\n", test.test, test.verdict.name())?;
            test.notes.iter().try_for_each(|note| writeln!(text, "- {}", note.replace('\n', "\n  ")))?;
        }
        writeln!(text, "\n| test | tensor | comparisons | largest error | ULP of scale | ULP |\n|---|---|---|---|---|---|")?;
        for (test, tensor) in self.tests.iter().flat_map(|test| test.tensors.iter().map(move |tensor| (&test.test, tensor))) {
            writeln!(text, "| {test} | {} | {} | {} |", cell(&tensor.tensor), tensor.comparisons, tensor.numbers())?;
        }
        Ok(())
    }
}

/// Reports as one document, which says what its numbers mean.
pub fn to_markdown(reports: &[DeviceReport]) -> String {
    let title = "# gatefold verify\n\n\
        Errors are the largest over all numbers of a tensor and all cases, against f64. The error is relative to the tensor's scale, \
        its largest magnitude; ULP are units in the last place of f32, of that scale or, for pointwise functions, of each number.\n";
    reports.iter().fold(title.to_owned(), |text, report| text + "\n" + &report.to_markdown())
}

/// Writes reports to FILE.md and FILE.json; an extension .md or .json of `file` is left out.
///
/// # Errors
/// That of the file which could not be written.
pub fn write_reports(file: &Path, reports: &[DeviceReport]) -> Result<()> {
    let failed = |path: &str, error| Error::io("verify.write_reports", Path::new(path), error);
    let whole = file.display().to_string();
    let stem = whole.strip_suffix(".md").or(whole.strip_suffix(".json")).unwrap_or(&whole);
    let json = format!("{stem}.json");
    let text = serde_json::to_string_pretty(reports).map_err(|error| failed(&json, error.into()))?;
    for (path, text) in [(format!("{stem}.md"), to_markdown(reports)), (json, text + "\n")] {
        std::fs::write(&path, text).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}

/// What has the tensor with the largest error relative to its scale; NaN is larger than any.
fn worst<'a, T>(mut all: impl Iterator<Item = T>, tensor: impl Fn(&T) -> &'a TensorReport) -> Option<T> {
    let relative = |of: &T| tensor(of).distance.relative;
    let first = all.next()?;
    Some(all.fold(first, |a, b| if relative(&b) > relative(&a) || relative(&b).is_nan() { b } else { a }))
}

/// What may stand in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

impl TensorReport {
    /// Three cells of a table.
    fn numbers(&self) -> String {
        let Distance { relative, ulps_of_scale, ulps } = self.distance;
        let ulps = ulps.map_or(String::new(), |ulps| format!("{ulps:.2}"));
        format!("{relative:.1e} | {ulps_of_scale:.1} | {ulps}")
    }
}

impl Verdict {
    /// Whether it counts as passed.
    pub fn passes(self) -> bool {
        matches!(self, Self::Passed | Self::FailedAsKnown)
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "ok",
            Self::FailedAsKnown => "fails as known",
            Self::Failed => "FAIL",
            Self::Ignored => "not here",
        }
    }
}

impl TestReport {
    /// Runs a kernel family where the device has what it needs.
    pub fn of_kernel(device: &Device, kernel: &KernelCheck) -> Self {
        let info = device.info();
        match kernel.missing(&info) {
            Some(what) => Self {
                test: kernel.name.to_owned(),
                verdict: Verdict::Ignored,
                cases: 0,
                seconds: 0.0,
                notes: vec![what],
                tensors: Vec::new(),
                reports: Vec::new(),
            },
            None => Self::of(&info, kernel.name, |reports| kernel.run(device, reports)),
        }
    }

    /// Runs a folder of case files as one test; `tolerance`: see [`Case::run`]. What a file needs and this crate does not have is
    /// noted, and no failure as long as another file runs.
    pub fn of_cases(device: &Device, folder: &str, cases: &[(String, Case)], tolerance: (f64, f64)) -> Self {
        Self::of(&device.info(), folder, |reports| {
            cases.iter().try_for_each(|(name, case)| case.run(device, name, tolerance).map(|report| reports.push(report)))
        })
    }

    fn of(info: &DeviceInfo, test: &str, run: impl FnOnce(&mut Vec<Report>) -> Result<()>) -> Self {
        let (start, mut reports) = (Instant::now(), Vec::new());
        let error = run(&mut reports).err().map(|error| error.to_string());
        let seconds = start.elapsed().as_secs_f64();
        let missing =
            reports.iter().filter_map(|report| report.unsupported.as_ref().map(|what| format!("{}: {what}", report.case)));
        let missing: Vec<String> = missing.collect();
        let cases = reports.len() - missing.len();
        // A case that compared nothing has not passed.
        let silent = reports.iter().filter(|report| report.unsupported.is_none() && report.comparisons.is_empty());
        let silent = silent.map(|report| format!("{}: nothing was compared", report.case));
        let nothing = (cases == 0 && error.is_none()).then(|| "no case ran".to_owned());
        let failures = reports.iter().flat_map(Report::failures).chain(silent).chain(error).chain(nothing).collect();
        let (verdict, mut notes) = match judge(KNOWN_FAILURES, info, test, failures) {
            Ok(reasons) if reasons.is_empty() => (Verdict::Passed, Vec::new()),
            Ok(reasons) => (Verdict::FailedAsKnown, reasons.into_iter().map(str::to_owned).collect()),
            Err(failures) => (Verdict::Failed, failures),
        };
        notes.extend(missing);
        let tensors = tensors(reports.iter().flat_map(|report| &report.comparisons));
        Self { test: test.to_owned(), verdict, cases, seconds, notes, tensors, reports }
    }
}

/// The worst of each tensor.
fn tensors<'a>(comparisons: impl Iterator<Item = &'a Comparison>) -> Vec<TensorReport> {
    let mut tensors: Vec<TensorReport> = Vec::new();
    for comparison in comparisons {
        let Some(distance) = comparison.distance else { continue };
        let tensor = without_numbers(&comparison.tensor);
        match tensors.iter_mut().find(|known| known.tensor == tensor) {
            Some(known) => {
                known.comparisons += 1;
                known.distance = known.distance.worse(distance);
            }
            None => tensors.push(TensorReport { tensor, comparisons: 1, distance }),
        }
    }
    tensors
}

/// `step #` for `step 12`.
fn without_numbers(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for letter in name.chars() {
        match letter.is_ascii_digit() {
            true if text.ends_with('#') => {}
            true => text.push('#'),
            false => text.push(letter),
        }
    }
    text
}
