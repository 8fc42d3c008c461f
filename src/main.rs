//! The `gatefold` command: which devices there are, whether the kernels are right on them, and how fast they run.

#[path = "main/bench.rs"]
mod bench;
#[path = "main/devices.rs"]
mod devices;
#[path = "main/verify.rs"]
mod verify;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use gatefold::Device;

/// Recurrent neural networks on any GPU that wgpu reaches, and on the native CPU.
#[derive(Parser)]
#[command(name = "gatefold", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the devices, what each can do, and which one is taken by default.
    Devices,
    /// Check every kernel against a float64 oracle, and layers against case files that PyTorch or ONNX Runtime wrote.
    Verify(verify::Args),
    /// Time a layer: the median and the minimum of many runs.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let out = &mut std::io::stdout().lock();
    let done = match Cli::parse().command {
        Command::Devices => devices::run(out).map(|()| true),
        Command::Verify(args) => verify::run(&args, out),
        Command::Bench(args) => bench::run(&args, out).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // `gatefold devices | head -1`: the reader has what it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The device of this name, or the default one.
fn device(name: Option<&str>) -> Result<Device> {
    match name {
        Some(name) => Device::by_name(name).context("--device"),
        None => Device::new().context("the default device"),
    }
}

/// `N` comma-separated values.
fn list<const N: usize, T: std::str::FromStr>(text: &str, names: &str) -> Result<[T; N], String> {
    let values: Option<Vec<T>> = text.split(',').map(|value| value.trim().parse().ok()).collect();
    values.and_then(|values| values.try_into().ok()).ok_or_else(|| format!("expected {N} numbers {names}"))
}
