//! Every kernel on every adapter of the machine: one test an adapter and kernel, named `backend:adapter::kernel`. Of adapters of one
//! backend and one name, all tests run on the first.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};
use gatefold::Device;
use gatefold::verify::{self, Report, TestReport, Verdict, cases, kernels};
use libtest_mimic::{Arguments, Failed, Trial};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// A device that is opened by the first test that needs it: one that cannot be opened fails all of its tests.
struct Lazy {
    name: String,
    device: OnceLock<std::result::Result<Device, String>>,
    /// Held by a test on GL: wgpu's backend for it panics where a thread waits for another's work for more than a second.
    turn: Mutex<()>,
}

impl Lazy {
    fn new(name: String) -> Arc<Self> {
        Arc::new(Self { name, device: OnceLock::new(), turn: Mutex::default() })
    }

    fn get(&self) -> Result<&Device> {
        let opened = self.device.get_or_init(|| Device::by_name(&self.name).map_err(|error| error.to_string()));
        opened.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
    }
}

fn test(device: &Arc<Lazy>, name: &str, body: impl Fn(&Device) -> Result<TestReport> + Send + 'static) -> Trial {
    let (device, full_name) = (device.clone(), format!("{}::{name}", device.name));
    Trial::test(full_name, move || check(&device, body).map_err(|error| Failed::from(format!("{error:#}"))))
}

fn check(device: &Lazy, body: impl Fn(&Device) -> Result<TestReport>) -> Result<()> {
    let _turn = device.name.starts_with("gl:").then(|| device.turn.lock().unwrap_or_else(PoisonError::into_inner));
    let test = body(device.get()?)?;
    // Here a case file that is not supported fails too.
    let passes = test.verdict == Verdict::FailedAsKnown || (test.verdict == Verdict::Passed && test.notes.is_empty());
    ensure!(passes, "of {} cases:\n{}", test.cases, test.notes.join("\n"));
    Ok(())
}

/// Each mark of the README's table of cells and options stands for a case `cell_option` that compared what the mark says: f the
/// forward pass, b the gradients, s the same sequence step by step.
fn marks() -> Result<()> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"))?;
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect::<Vec<_>>();
    let mut table = readme.lines().skip_while(|line| !line.starts_with("| option |")).take_while(|line| line.starts_with('|'));
    let header = cells(table.next().unwrap_or_default());
    let networks = kernels::all().into_iter().find(|check| check.name == "networks");
    let (mut reports, mut missing, mut marks) = (Vec::new(), Vec::new(), 0);
    networks.context("there is no family `networks`")?.run(&Device::cpu(), &mut reports)?;
    for row in table.skip(1).map(cells) {
        for (cell, mark) in header.iter().zip(&row).skip(1) {
            for letter in mark.chars() {
                let name = format!("{cell}_{}", row[0]);
                let compared = match letter {
                    'f' => "infer.y",
                    'b' => "dx",
                    's' => "step 0",
                    '-' => continue,
                    other => anyhow::bail!("the README has the mark {other:?} for {name}"),
                };
                let case = |report: &&Report| report.case.strip_prefix(&name).is_some_and(|rest| ["", "_plain"].contains(&rest));
                let found = reports.iter().filter(case).flat_map(|report| &report.comparisons).any(|c| c.tensor == compared);
                if !found {
                    missing.push(format!("{name}: {compared}"));
                }
                marks += 1;
            }
        }
    }
    ensure!(marks > 100 && missing.is_empty(), "of {marks} marks without a case:\n{}", missing.join("\n"));
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::from_args();
    // For tests/mutations.py.
    if let Some(file) = std::env::var_os("GATEFOLD_EDITED_SHADER") {
        verify::edit_shader(&Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders"), Path::new(&file))
            .context("GATEFOLD_EDITED_SHADER")?;
    }
    let infos = Device::list();
    let names = infos.iter().map(|info| match info.backend.as_str() {
        "native" => "cpu".to_owned(),
        backend => format!("{backend}:{}", info.name),
    });
    let mut trials = Vec::new();
    for (device, info) in names.map(Lazy::new).zip(&infos) {
        trials.extend(kernels::all().into_iter().map(|kernel| {
            let trial = test(&device, kernel.name, move |device| Ok(TestReport::of_kernel(device, &kernel)));
            // Listed as ignored where the adapter does not offer what it needs.
            trial.with_ignored_flag(kernel.missing(info).is_some())
        }));
        for (name, folder) in [("case_files", "cases"), ("onnx_files", "onnx")] {
            trials.push(test(&device, name, move |device| {
                let cases = cases::read_dir(format!("{FIXTURES}/{folder}"))?;
                Ok(TestReport::of_cases(device, &format!("tests/fixtures/{folder}"), &cases, (1e-5, 5e-5)))
            }));
        }
    }
    trials.push(Trial::test("readme::every_mark_has_its_case", || marks().map_err(|error| Failed::from(format!("{error:#}")))));
    let adapters = infos.iter().filter(|info| info.backend != "native").count();
    trials.push(Trial::test("adapters::at_least_one_gpu_adapter", move || match adapters {
        0 => Err("no wgpu adapter was found, so no shader was run: apt-get install mesa-vulkan-drivers".into()),
        _ => Ok(()),
    }));
    libtest_mimic::run(&arguments, trials).exit();
}
