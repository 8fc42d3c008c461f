//! `gatefold bench --kernels`: each kernel of a layer's training step by itself, against the roofline of the device, whose roof are
//! a copy and a multiply-add loop measured in the same run. `--profile`: what such a step spends its time in.

use std::io::Write;

use anyhow::{Context, Result};
use gatefold::Device;
use gatefold::verify::workloads::{self, Clock, Workload};
use serde_json::json;

use super::timing::{Policy, Timing, milliseconds};
use super::{Args, Mode, SHAPES, line, specs};

/// Kernels of a layer, for the seconds that each gets.
const KERNELS: f64 = 12.0;

/// Copies of 96 MB: more than caches hold, less than the least binding limit.
const COPIED: usize = 24 << 20;

/// What the device can do.
struct Roof {
    /// Operations and bytes a millisecond.
    flops: f64,
    bytes: f64,
}

impl Roof {
    fn measure(policy: &Policy, device: &Device) -> Result<Self> {
        // Long enough to be measured on a GPU, short enough for a software driver.
        let [copy, multiply_add] = workloads::peaks(device, COPIED, 256)?;
        let best = |load: &Workload| -> Result<f64> { Ok(time(policy, load)?.ms_min) };
        Ok(Self { flops: multiply_add.flops / best(&multiply_add)?, bytes: copy.bytes / best(&copy)? })
    }

    /// The least time in milliseconds that the work could take.
    fn least(&self, load: &Workload) -> f64 {
        (load.flops / self.flops).max(load.bytes / self.bytes)
    }
}

fn time(policy: &Policy, load: &Workload) -> Result<Timing> {
    policy.time(|| Ok((load.time()?, None))).with_context(|| format!("{} {}", load.name, load.size))
}

/// Every kernel of every shape that is asked for.
pub fn run(args: &Args, policy: &Policy, device: &Device, out: &mut impl Write) -> Result<()> {
    let policy = policy.shared(KERNELS);
    let roof = Roof::measure(&policy, device)?;
    let clock = match workloads::clock(device) {
        Clock::Gpu => "timestamps of the GPU",
        Clock::Host => "the host's clock",
    };
    let (copy, multiply_add) = (roof.bytes / 1e6, roof.flops / 1e6);
    if args.json {
        let peaks = json!({"peer": "gatefold", "mode": "peak", "copy_gb_per_s": copy, "multiply_add_gflops": multiply_add,
            "clock": clock, "device": device.info().to_string()});
        writeln!(out, "{peaks}")?;
    } else {
        writeln!(out, "{}, by {clock}", device.info())?;
        writeln!(out, "peaks: copy {copy:.1} GB/s, multiply-add {multiply_add:.1} GFLOP/s")?;
    }
    for spec in specs(args, device, &SHAPES)? {
        if !args.json {
            let head = ("size", "ms median", "ms min", "GFLOP/s", "GB/s", "of roof");
            let (size, median, min, flops, bytes, share) = head;
            writeln!(out, "\n{:18} {size:>18} {median:>10} {min:>10} {flops:>9} {bytes:>8} {share:>8}", spec.name())?;
        }
        for load in workloads::layer(device, spec.cell.name(), spec.shape)?.context("a cell without kernels")? {
            let timing = time(&policy, &load)?;
            let Timing { ms_median, ms_min, .. } = timing;
            let (gflops, gbytes) = (load.flops / ms_median / 1e6, load.bytes / ms_median / 1e6);
            let share = roof.least(&load) / ms_median;
            if args.json {
                let mut fields = serde_json::to_value(&timing)?;
                fields["mode"] = "kernel".into();
                fields["kernel"] = load.name.into();
                fields["size"] = load.size.clone().into();
                fields["gflops"] = gflops.into();
                fields["gb_per_s"] = gbytes.into();
                fields["of_roof"] = share.into();
                writeln!(out, "{}", line(&spec, &fields))?;
            } else {
                let (name, size, marked) = (load.name, &load.size, timing.disturbed());
                write!(out, "{name:18} {size:>18} {ms_median:>10.4} {ms_min:>10.4} ")?;
                writeln!(out, "{gflops:>9.1} {gbytes:>8.1} {:>7.1}%{marked}", 100.0 * share)?;
            }
        }
    }
    Ok(())
}

/// The kernels of one training step of every shape that is asked for, the longest first.
pub fn profile(args: &Args, device: &Device, out: &mut impl Write) -> Result<()> {
    if !args.json {
        writeln!(out, "{}", device.info())?;
    }
    for spec in specs(args, device, &SHAPES)? {
        let mut work = spec.build(None)?;
        // The first step makes pipelines and buffers.
        work.run(Mode::Train)?;
        let mut kernels = device.profile(|| work.run(Mode::Train))?;
        kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.time));
        let whole: f64 = kernels.iter().map(|kernel| milliseconds(kernel.time)).sum();
        if !args.json {
            writeln!(out, "\n{:28} {:>9} {:>10} {:>7}", spec.name(), "launches", "ms", "share")?;
        }
        for kernel in kernels {
            let (name, launches, ms) = (kernel.kernel, kernel.launches, milliseconds(kernel.time));
            if args.json {
                let fields = json!({"mode": "profile", "kernel": name, "launches": launches, "ms": ms});
                writeln!(out, "{}", line(&spec, &fields))?;
            } else {
                writeln!(out, "{name:28} {launches:>9} {ms:>10.3} {:>6.1}%", 100.0 * ms / whole)?;
            }
        }
    }
    Ok(())
}
