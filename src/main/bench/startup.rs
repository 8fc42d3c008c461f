//! `gatefold bench --startup`: what comes before the second step of a program.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::layer::Spec;
use super::timing::milliseconds;
use super::{Args, Mode, layer, line, shapes};

/// A small network, unless a shape is given: what takes long is then not its work.
const SHAPE: [usize; 4] = [8, 4, 32, 32];

/// Opens the device, makes a network, and times its first steps and one more of each, for every shape that is asked for.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    if !args.json {
        let head = ["cell", "open ms", "build ms", "infer ms", "again ms", "train ms", "again ms", "together"];
        writeln!(out, "{}", head.map(|title| format!("{title:>9}")).join(" "))?;
    }
    for (cell, shape) in shapes(args, &[SHAPE])? {
        // Each shape as if it were a program's only one.
        let start = Instant::now();
        let device = super::open(args)?;
        let open_ms = milliseconds(start.elapsed());
        let spec = Spec { device: &device, cell, shape, layers: args.layers.into(), precision: args.precision };
        let start = Instant::now();
        let mut work = spec.build(None)?;
        device.synchronize()?;
        let build_ms = milliseconds(start.elapsed());
        let mut time = |mode| -> Result<f64> { Ok(milliseconds(layer::timed(work.as_mut(), mode, &device)?.0)) };
        let [infer_ms, infer_again_ms] = [time(Mode::Infer)?, time(Mode::Infer)?];
        let [train_ms, train_again_ms] = [time(Mode::Train)?, time(Mode::Train)?];
        let together = open_ms + build_ms + infer_ms + train_ms;
        if args.json {
            let fields = json!({"mode": "startup", "open_ms": open_ms, "build_ms": build_ms, "infer_ms": infer_ms,
                "infer_again_ms": infer_again_ms, "train_ms": train_ms, "train_again_ms": train_again_ms, "startup_ms": together});
            writeln!(out, "{}", line(&spec, &fields))?;
        } else {
            let times = [open_ms, build_ms, infer_ms, infer_again_ms, train_ms, train_again_ms, together];
            writeln!(out, "{:>9} {}  {}", cell.name(), times.map(|ms| format!("{ms:>9.2}")).join(" "), device.info())?;
        }
    }
    Ok(())
}
