//! Gatefold's whole suite on the MSL that wgpu's Metal backend would hand to Apple's compiler, compiled as C++ and run on the CPU.
//!
//! It stands in for Apple's compiler and driver, which it cannot judge. What it proves is the translation: bindings, sizes,
//! workgroup memory, control flow and arithmetic of every shader, under any order of threads.

mod device;
#[cfg(test)]
mod faults;
mod msl;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use gatefold::Device;
use gatefold::verify::{self, DeviceReport, TestReport, cases, kernels};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../..");

/// The suite on Metal's shaders, compiled for the CPU; exit code 1 on an error.
#[derive(Parser)]
struct Args {
    /// Only families with this in their name
    #[arg(default_value = "")]
    family: String,
    /// Where compiled shaders are kept
    #[arg(long, value_name = "FOLDER", default_value = "target/backends/metal")]
    folder: PathBuf,
    /// Write the report of `gatefold verify` to FILE.md and FILE.json
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Of the order of threads, which differs from launch to launch; 0: that of their indices
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u32,
    /// Lanes of a simdgroup, as on Apple's GPUs; kernels that are for subgroups of 8 run with 8 alone
    #[arg(long, value_name = "LANES", default_value_t = 32)]
    simd: u32,
    /// Threadgroups that run at once where they wait for each other
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    resident: u32,
    /// Compile for speed and not for exact floats, as Metal does by default
    #[arg(long)]
    fast_math: bool,
}

fn main() -> Result<ExitCode> {
    let Args { family, folder, report: file, seed, simd, resident, fast_math } = Args::parse();
    // For tests/mutations.py.
    if let Some(file) = std::env::var_os("GATEFOLD_EDITED_SHADER") {
        verify::edit_shader(&Path::new(ROOT).join("shaders"), Path::new(&file)).context("GATEFOLD_EDITED_SHADER")?;
    }
    let options = msl::Options { compiler: msl::Compiler::find()?, folder, seed, simd, resident, fast_math };
    // A launch that fails takes its device along: each test has its own.
    let open = || {
        let (adapter, device, queue) = device::open(options.clone());
        Device::from_wgpu(&adapter, device, queue)
    };
    let mut report = DeviceReport::new(&open()?);
    println!("{}", report.device);
    let mut add = |test: TestReport| -> Result<()> {
        println!("  {:14} {} ({} cases, {:.1} s)", test.verdict.name(), test.test, test.cases, test.seconds);
        test.notes.iter().for_each(|note| println!("      {note}"));
        report.tests.push(test);
        // After each test: what is wrong with a kernel may take the program down.
        Ok(file.as_ref().map_or(Ok(()), |file| verify::write_reports(file, std::slice::from_ref(&report)))?)
    };
    for kernel in kernels::all().iter().filter(|kernel| kernel.name.contains(&family)) {
        add(TestReport::of_kernel(&open()?, kernel))?;
    }
    for folder in ["tests/fixtures/cases", "tests/fixtures/onnx"].into_iter().filter(|folder| folder.contains(&family)) {
        let cases = cases::read_dir(format!("{ROOT}/{folder}"))?;
        add(TestReport::of_cases(&open()?, folder, &cases, (1e-5, 5e-5)))?;
    }
    let [passed, failed, ignored] = report.counts();
    println!("{ignored} not for this device\n{passed} passed, {failed} failed");
    Ok(ExitCode::from(u8::from(failed > 0 || passed == 0)))
}
