//! Programs that print a JSON line for each figure, `gatefold bench --json` first of all.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A check line with a larger error than this is of a wrong answer.
const TOLERANCE: f64 = 1e-4;

/// One line with times.
#[derive(Clone, Debug)]
pub struct Figure {
    pub mode: String,
    line: Value,
}

impl Figure {
    /// A number of the line by its name: `ms_median`; NaN where there is none.
    pub fn number(&self, name: &str) -> f64 {
        self.line[name].as_f64().unwrap_or(f64::NAN)
    }

    /// `!` where other processes used so much of the machine that the times say little.
    pub fn mark(&self) -> &'static str {
        if self.number("other_cpu") > 0.3 { "!" } else { "" }
    }
}

/// What a program printed.
#[derive(Default)]
pub struct Printed {
    pub figures: Vec<Figure>,
    /// All lines, as they came.
    pub lines: Vec<String>,
    /// Whether there was a check line.
    pub checked: bool,
    /// What it says that it cannot do.
    pub errors: Vec<String>,
}

/// Gatefold's own command.
pub fn gatefold() -> Command {
    Command::new(env!("CARGO_BIN_EXE_gatefold"))
}

/// Runs a program to its end, or to its first check line with a wrong answer, which is an error.
pub fn run(command: &mut Command) -> Result<Printed> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("does not start")?;
    let (stdout, mut stderr) = (child.stdout.take().context("no stdout")?, child.stderr.take().context("no stderr")?);
    // Read at the same time: a full pipe would stop the program.
    let complaints = std::thread::spawn(move || std::io::read_to_string(&mut stderr).unwrap_or_default());
    let printed = read(BufReader::new(stdout));
    if printed.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    let printed = printed?;
    let complaints = complaints.join().unwrap_or_default();
    ensure!(status.success(), "{status}: {}", complaints.lines().last().unwrap_or_default());
    Ok(printed)
}

fn read(lines: impl BufRead) -> Result<Printed> {
    let mut printed = Printed::default();
    for text in lines.lines() {
        let text = text?;
        let Ok(line) = serde_json::from_str::<Value>(&text) else { continue };
        if line["mode"] == "check" {
            let relerr = line["relerr"].as_object().context("a check line without relerr")?;
            printed.checked |= !relerr.is_empty();
            // No number is NaN.
            let wrong = relerr.iter().find(|(_, error)| !error.as_f64().is_some_and(|error| error <= TOLERANCE));
            if let Some((tensor, error)) = wrong {
                bail!("wrong: {tensor} is off by {error}");
            }
        }
        printed.errors.extend(line["error"].as_str().map(str::to_owned));
        if let (Some(mode), true) = (line["mode"].as_str(), line["ms_median"].is_number()) {
            printed.figures.push(Figure { mode: mode.to_owned(), line });
        }
        printed.lines.push(text);
    }
    Ok(printed)
}
