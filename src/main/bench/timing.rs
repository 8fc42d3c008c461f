//! How long to run, what to make of the times, and who else used the machine meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// How long to run.
pub struct Policy {
    warm: f64,
    budget: f64,
    min_runs: usize,
    quiet_wait: f64,
}

/// What a run took.
#[derive(Serialize)]
pub struct Timing {
    pub ms_median: f64,
    pub ms_min: f64,
    pub runs: usize,
    /// Of a run, what the host spent; absent where it does all of the work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_ms: Option<f64>,
    /// Cores that other processes used meanwhile; absent where the system does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other_cpu: Option<f64>,
}

impl Timing {
    /// A mark for a table, where others disturbed the runs.
    pub fn disturbed(&self) -> String {
        match self.other_cpu {
            Some(cores) if cores > 0.3 => format!("  ! other processes used {cores} cores"),
            _ => String::new(),
        }
    }
}

impl Policy {
    pub fn from_env() -> Result<Self> {
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

    /// The same for one of `parts` parts of a case.
    pub fn shared(&self, parts: f64) -> Self {
        Self { warm: self.warm / parts, budget: self.budget / parts, ..*self }
    }

    /// Warms up, then times runs until the budget is spent. A run of more than 2 seconds is warmed up once and timed
    /// three times. `run` gives its own time and, of that, what the host spent, where that is not all.
    pub fn time(&self, mut run: impl FnMut() -> Result<(Duration, Option<Duration>)>) -> Result<Timing> {
        self.wait_until_quiet();
        let (start, mut runs, mut last) = (Instant::now(), 1, 0.0);
        while (runs < 3 || start.elapsed().as_secs_f64() < self.warm) && last < 2.0 {
            last = run()?.0.as_secs_f64();
            runs += 1;
        }
        let min_runs = if last > 2.0 { self.min_runs.min(3) } else { self.min_runs };
        let (before, start) = (cpu_seconds(), Instant::now());
        let (mut times, mut hosts) = (Vec::new(), Vec::new());
        while times.len() < min_runs || (start.elapsed().as_secs_f64() < self.budget && times.len() < 300) {
            let (time, host) = run()?;
            times.push(milliseconds(time));
            hosts.extend(host.map(milliseconds));
        }
        let other_cpu = others(before, cpu_seconds(), start.elapsed()).map(|cores| (cores * 100.0).round() / 100.0);
        times.sort_by(f64::total_cmp);
        hosts.sort_by(f64::total_cmp);
        let host_ms = (!hosts.is_empty()).then(|| median(&hosts));
        Ok(Timing { ms_median: median(&times), ms_min: times[0], runs: times.len(), host_ms, other_cpu })
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

/// Of sorted numbers, at least one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { 0.5 * (sorted[middle - 1] + sorted[middle]) }
}

pub fn milliseconds(elapsed: Duration) -> f64 {
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
