//! `gatefold bench --explain`: which kernels are chosen, and why. `--tune`: which ones should be, as rows of the tables in
//! `kernels/choice.rs`.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::io::Write;

use anyhow::{Context, Result};
use gatefold::nn::Precision;
use gatefold::verify::workloads::{self, Clock, SweptCell, Workload};
use gatefold::{Device, KernelOverride, LayerOrder, PairKernel, ProductKernel, StepKernel, SweepKernel};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::timing::Policy;
use super::{Args, Mode, SHAPES, line, specs, wanted};

/// What must be gained on the general kernel to be worth a row.
const GAIN: f64 = 1.05;

/// A kernel by its name.
pub fn kernel<K: DeserializeOwned>(name: &str) -> Result<K, String> {
    serde_json::from_value(Value::String(name.to_owned())).map_err(|error| error.to_string())
}

/// The choices for a step of every shape that is asked for: in training, unless a mode is given.
pub fn explain(args: &Args, device: &Device, out: &mut impl Write) -> Result<()> {
    if !args.json {
        writeln!(out, "{}, override: {}", device.info(), device.kernel_override())?;
    }
    for spec in specs(args, device, &SHAPES)? {
        let mut work = spec.build(None)?;
        let choices = device.explain(|| work.run(args.mode.unwrap_or(Mode::Train)))?;
        if !args.json {
            let none = if choices.is_empty() { ": nothing to choose" } else { "" };
            writeln!(out, "\n{}{none}", spec.name())?;
        }
        for choice in choices {
            let (table, work, kernel, row, reason) = (choice.table, choice.work, choice.kernel, choice.row, choice.reason);
            if args.json {
                let fields =
                    json!({"mode": "explain", "table": table, "work": work, "kernel": kernel, "row": row, "reason": reason});
                writeln!(out, "{}", line(&spec, &fields))?;
            } else {
                writeln!(out, "{table:8} {work:36} {kernel:16} {}", row.as_deref().unwrap_or("-"))?;
                writeln!(out, "{:8} {reason}", "")?;
            }
        }
    }
    Ok(())
}

/// Measurements and rows, printed as they come.
struct Tuner<'a, W> {
    device: &'a Device,
    class: String,
    policy: Policy,
    json: bool,
    out: &'a mut W,
}

/// Kernels that can do the work, and how often as fast as the general one each is.
type Gains<K> = Vec<(K, f64)>;

/// Measures every table's kernels, and prints the rows that follow.
pub fn tune(args: &Args, policy: &Policy, device: &Device, out: &mut impl Write) -> Result<()> {
    let (class, lanes) = workloads::class(device).with_context(|| format!("{} has no kernels to choose from", device.info()))?;
    if !args.json {
        let lanes = lanes.map_or("no subgroups of one size".to_owned(), |lanes| format!("subgroups of {lanes} lanes"));
        writeln!(out, "{}: {class}, {lanes}; how often as fast as the general kernel", device.info())?;
    }
    // A few dozen measurements, each of a part of a case.
    let mut tuner = Tuner { device, class, policy: policy.shared(8.0), json: args.json, out };
    let wanted = wanted("BENCH_ONLY", &["product", "step", "pair", "sweep", "layers"], |name, text| name == text)?;
    for (table, _) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted) {
        match table {
            0 => tuner.products()?,
            1 => tuner.steps()?,
            2 => tuner.pairs()?,
            3 => tuner.sweeps()?,
            _ => tuner.layers()?,
        }
    }
    Ok(device.override_kernels(KernelOverride::default())?)
}

/// From which size on these kernels are best, and what they gained.
struct Bands<K>(Vec<(usize, Vec<K>, Vec<String>)>);

impl<K> Default for Bands<K> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: PartialEq> Bands<K> {
    fn push(&mut self, size: usize, best: Vec<K>, gained: Vec<String>) {
        match self.0.last_mut() {
            Some((_, kernels, all)) if *kernels == best => all.extend(gained),
            _ => self.0.push((size, best, gained)),
        }
    }
}

impl<W: Write> Tuner<'_, W> {
    /// By rows of A; the best kernel for each layout of A.
    fn products(&mut self) -> Result<()> {
        const ROWS: [usize; 6] = [1, 8, 16, 64, 256, 512];
        const WIDTH: usize = 512;
        let mut bands = Bands::default();
        for m in ROWS {
            let (mut best, mut gained) = (Vec::new(), Vec::new());
            for (name, a_t) in [("A by rows", false), ("A by columns", true)] {
                let load = [workloads::product(self.device, name, Precision::Single, [m, WIDTH, WIDTH], a_t)?];
                let work = format!("{m}x{WIDTH}x{WIDTH} {name}");
                let by = |kernel| KernelOverride::default().product(kernel);
                let gains = self.gains("product", &work, &load, (&ProductKernel::ALL, ProductKernel::General), by)?;
                if let Some((kernel, gain)) = fastest(&gains) {
                    best.push(kernel);
                    gained.push(format!("{work}: {gain:.1}"));
                }
            }
            bands.push(m, best, gained);
        }
        self.rows("M", "ProductKernel", bands)?;
        self.large_products()
    }

    /// What rows by the numbers of C, by k and by precision rest on: the products of a layer over all steps.
    fn large_products(&mut self) -> Result<()> {
        let by = |kernel| KernelOverride::default().product(kernel);
        for (precision, general) in [(Precision::Single, ProductKernel::General), (Precision::Half, ProductKernel::HalfGeneral)] {
            for hidden in [128, 512] {
                const LINES: usize = 4096;
                let gates = 4 * hidden;
                for (name, size, a_t) in [("dg^T.h", [gates, hidden, LINES], true), ("x.W_ih^T", [LINES, gates, hidden], false)] {
                    let load = [workloads::product(self.device, name, precision, size, a_t)?];
                    let work = format!("{name} {} {precision:?}", load[0].size);
                    self.gains("product", &work, &load, (&ProductKernel::ALL, general), by)?;
                }
            }
        }
        Ok(())
    }

    /// By rows: the kernel that gains most on narrow and wide layers together.
    fn steps(&mut self) -> Result<()> {
        let mut bands = Bands::default();
        for rows in [1, 2, 4, 16, 64] {
            let mut all = Vec::new();
            for hidden in [128, 512] {
                let loads = workloads::sweeps(self.device, SweptCell::Lstm, [4, rows, hidden])?;
                let work = format!("LSTM B={rows} H={hidden}");
                let by = |kernel| KernelOverride::default().sweep(SweepKernel::Step).step(kernel);
                let gains = self.gains("step", &work, &loads, (&StepKernel::ALL, StepKernel::General), by)?;
                all.push((work, gains));
            }
            let means: Gains<_> =
                StepKernel::ALL.into_iter().filter_map(|kernel| Some((kernel, mean_of(&all, kernel)?))).collect();
            let best = fastest(&means).map(|(kernel, _)| kernel);
            bands.push(rows, best.into_iter().collect(), best.map_or_else(Vec::new, |best| gained(&all, best)));
        }
        self.rows("B", "StepKernel", bands)
    }

    /// By the units of all rows.
    fn pairs(&mut self) -> Result<()> {
        let mut bands = Bands::default();
        for (rows, hidden) in [(1, 128), (1, 512), (8, 128), (8, 512), (32, 256), (64, 512)] {
            let loads = workloads::sweeps(self.device, SweptCell::GruResetBefore, [4, rows, hidden])?;
            let work = format!("GRU, reset before, B={rows} H={hidden}");
            let by = |kernel| KernelOverride::default().pair(kernel);
            let gains = self.gains("pair", &work, &loads, (&PairKernel::ALL, PairKernel::Apart), by)?;
            let best = fastest(&gains).map_or(PairKernel::Apart, |(kernel, _)| kernel);
            bands.push(rows * hidden, vec![best], gained(&[(work, gains)], best));
        }
        self.rows("BxH", "PairKernel", bands)
    }

    /// By the size that a sweep is chosen by: up to which it gains on steps, and from how many steps on.
    fn sweeps(&mut self) -> Result<()> {
        const LONG: usize = 64;
        let kernels = (&SweepKernel::ALL[..], SweepKernel::Step);
        let by = |kernel| KernelOverride::default().sweep(kernel);
        for (cell, swept, size) in [("minGRU", SweptCell::MinGru, "BxH"), ("LSTM", SweptCell::Lstm, "H")] {
            let mut measure = |[steps, rows, hidden]: [usize; 3]| -> Result<(String, Gains<SweepKernel>)> {
                let loads = workloads::sweeps(self.device, swept, [steps, rows, hidden])?;
                let work = format!("{cell} T={steps} B={rows} H={hidden}");
                let gains = self.gains("sweep", &work, &loads, kernels, by)?;
                Ok((work, gains))
            };
            let mut by_size: BTreeMap<usize, Vec<(String, Gains<SweepKernel>)>> = BTreeMap::new();
            for hidden in [32, 64, 128, 256, 512] {
                for rows in [1, 16, 64] {
                    let size = if swept == SweptCell::Lstm { hidden } else { rows * hidden };
                    by_size.entry(size).or_default().push(measure([LONG, rows, hidden])?);
                }
            }
            let mut by_steps = Vec::new();
            for steps in [2, 4, 8, 16, 32] {
                by_steps.push((steps, measure([steps, 16, 32])?.1));
            }
            for kernel in SweepKernel::ALL.into_iter().filter(|kernel| *kernel != SweepKernel::Step) {
                let pays = |gain: Option<f64>| gain.is_some_and(|gain| gain >= GAIN);
                let of = |gains: &Gains<SweepKernel>| gain_of(gains, kernel);
                let pay = by_size.iter().take_while(|(_, works)| pays(mean(works.iter().filter_map(|(_, gains)| of(gains)))));
                let pay: Vec<_> = pay.collect();
                let Some((most, _)) = pay.last() else { continue };
                let least =
                    by_steps.iter().rev().take_while(|(_, gains)| pays(of(gains))).last().map_or(LONG, |(steps, _)| *steps);
                let works = pay.iter().flat_map(|(_, works)| *works);
                let gained: Vec<String> = works.filter_map(|(work, gains)| Some(format!("{work}: {:.1}", of(gains)?))).collect();
                let limits = format!("(T, {least}..=usize::MAX), ({size}, 0..={most})");
                self.row(&limits, &[format!("SweepKernel::{kernel:?}")], &gained)?;
            }
        }
        Ok(())
    }

    /// By the units of all rows, over more and fewer steps.
    fn layers(&mut self) -> Result<()> {
        let mut bands = Bands::default();
        for (rows, hidden) in [(1, 64), (1, 128), (2, 128), (8, 64), (8, 128), (16, 128), (8, 512), (64, 256)] {
            let mut all = Vec::new();
            for steps in [64, 256] {
                let loads = workloads::stack(self.device, [steps, rows, hidden])?;
                let work = format!("two LSTM layers, T={steps} B={rows} H={hidden}");
                let by = |order| KernelOverride::default().layers(order);
                let gains = self.gains("layers", &work, &loads, (&LayerOrder::ALL, LayerOrder::InTurn), by)?;
                all.push((work, gains));
            }
            let gain = mean_of(&all, LayerOrder::Wavefront).unwrap_or_default();
            let best = if gain >= GAIN { LayerOrder::Wavefront } else { LayerOrder::InTurn };
            bands.push(rows * hidden, vec![best], gained(&all, best));
        }
        self.rows("BxH", "LayerOrder", bands)
    }

    /// The gain of every kernel on `general`, which can do anything; the loads of `work` count together.
    fn gains<K: Copy + PartialEq + Display>(
        &mut self,
        table: &str,
        work: &str,
        loads: &[Workload],
        (kernels, general): (&[K], K),
        by: impl Fn(K) -> KernelOverride,
    ) -> Result<Gains<K>> {
        let mut times = Vec::new();
        for &kernel in kernels {
            if let Some(ms) = self.time(table, kernel, loads, by(kernel)).with_context(|| format!("{table} {work}"))? {
                times.push((kernel, ms));
            }
        }
        let general = times.iter().find(|(kernel, _)| *kernel == general).map(|(_, ms)| *ms);
        let general = general.with_context(|| format!("{table} {work}: the general kernel was not chosen"))?;
        let gains: Gains<K> = times.iter().map(|(kernel, ms)| (*kernel, general / ms)).collect();
        if !self.json {
            write!(self.out, "{table:8} {work:24}")?;
        }
        for ((kernel, ms), (_, gain)) in times.iter().zip(&gains) {
            if self.json {
                let fields = json!({"peer": "gatefold", "mode": "tune", "table": table, "work": work, "kernel": kernel.to_string(), "ms_min": ms,
                    "gain": gain, "device": self.device.info().to_string()});
                writeln!(self.out, "{fields}")?;
            } else {
                write!(self.out, "  {kernel} {gain:.2}")?;
            }
        }
        if !self.json {
            writeln!(self.out)?;
        }
        Ok(gains)
    }

    /// Milliseconds of all loads together by the host's clock, or `None` where the kernel cannot do them.
    fn time<K: Display>(&self, table: &str, kernel: K, loads: &[Workload], by: KernelOverride) -> Result<Option<f64>> {
        let name = kernel.to_string();
        if self.device.override_kernels(by).is_err() {
            return Ok(None);
        }
        let mut whole = 0.0;
        for load in loads {
            let choices = self.device.explain(|| load.time_by(Clock::Host).map(|_| ()))?;
            if choices.iter().any(|choice| choice.table == table && choice.kernel != name) {
                return Ok(None);
            }
            whole += self.policy.time(|| Ok((load.time_by(Clock::Host)?, None)))?.ms_min;
        }
        Ok(Some(whole))
    }

    /// The rows of bands of `size`.
    fn rows<K: Debug>(&mut self, size: &str, kind: &str, Bands(bands): Bands<K>) -> Result<()> {
        for (i, (first, kernels, gained)) in bands.iter().enumerate() {
            let least = if i == 0 { 1 } else { *first };
            let most = bands.get(i + 1).map_or("usize::MAX".to_owned(), |(next, ..)| (next - 1).to_string());
            let kernels: Vec<String> = kernels.iter().map(|kernel| format!("{kind}::{kernel:?}")).collect();
            self.row(&format!("({size}, {least}..={most})"), &kernels, gained)?;
        }
        Ok(())
    }

    /// A row as it stands in the tables.
    fn row(&mut self, limits: &str, kernels: &[String], gained: &[String]) -> Result<()> {
        if kernels.is_empty() {
            return Ok(());
        }
        let Self { device, class, .. } = self;
        let (kernels, gained) = (kernels.join(", "), gained.join("; "));
        let reason = format!("{}, times as fast as the general one: {gained}", device.info());
        let row =
            format!("Row {{ classes: &[Class::{class}], limits: &[{limits}], kernels: &[{kernels}], reason: {reason:?} }},");
        match self.json {
            true => writeln!(self.out, "{}", json!({"peer": "gatefold", "mode": "row", "row": row}))?,
            false => writeln!(self.out, "{row}")?,
        }
        Ok(())
    }
}

/// The kernel that gains most, if it gains anything worth a row.
fn fastest<K: Copy>(gains: &Gains<K>) -> Option<(K, f64)> {
    gains.iter().copied().filter(|(_, gain)| *gain >= GAIN).max_by(|(_, a), (_, b)| a.total_cmp(b))
}

/// What a kernel gained on each work.
fn gained<K: Copy + PartialEq>(all: &[(String, Gains<K>)], kernel: K) -> Vec<String> {
    all.iter().filter_map(|(work, gains)| Some(format!("{work}: {:.1}", gain_of(gains, kernel)?))).collect()
}

fn mean_of<K: Copy + PartialEq>(all: &[(String, Gains<K>)], kernel: K) -> Option<f64> {
    mean(all.iter().filter_map(|(_, gains)| gain_of(gains, kernel)))
}

fn gain_of<K: Copy + PartialEq>(gains: &Gains<K>, kernel: K) -> Option<f64> {
    gains.iter().find(|(known, _)| *known == kernel).map(|(_, gain)| *gain)
}

/// The geometric mean, of at least one number.
fn mean(numbers: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = numbers.map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}
