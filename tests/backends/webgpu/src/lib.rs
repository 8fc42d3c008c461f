//! The suite in a browser: each kernel family on WebGPU, or on the CPU as the browser runs it, and the report of `gatefold verify`.
//!
//! The suite is written in calls that wait. Here they suspend the whole stack of WebAssembly by JavaScript Promise Integration
//! until the browser has run other work, and go on.

#![cfg(target_arch = "wasm32")]
#![allow(deprecated, reason = "wasm-bindgen marks its support of Promise Integration as experimental by deprecating it")]

use gatefold::verify::{DeviceReport, TestReport, kernels};
use gatefold::{Device, ErrorKind};
use wasm_bindgen::prelude::*;

#[wasm_bindgen(inline_js = "
    const channel = new MessageChannel();
    export function turn() {
        return new Promise(resolve => { channel.port1.onmessage = resolve; channel.port2.postMessage(null); });
    }
")]
extern "C" {
    /// Lets the browser run other work.
    #[wasm_bindgen(suspending)]
    fn turn();
}

/// The suite on one device.
#[wasm_bindgen]
pub struct Suite {
    device: Device,
    kernels: Vec<kernels::KernelCheck>,
    report: DeviceReport,
}

/// What a call that waits says where the program cannot be suspended; to be asked before [`open`].
///
/// # Errors
/// It waited.
#[wasm_bindgen]
pub fn refusal_to_wait() -> Result<String, JsError> {
    match Device::by_name("webgpu:") {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(error.to_string()),
        other => Err(JsError::new(&format!("expected Unsupported, got {other:?}"))),
    }
}

/// Opens a device for the families that have `family` in their names. `browser`: what the report says of it, for adapters have no
/// names here.
///
/// # Errors
/// What the device reports.
#[wasm_bindgen(jspi)]
pub fn open(device: &str, family: &str, browser: &str) -> Result<Suite, JsError> {
    console_error_panic_hook::set_once();
    gatefold::set_suspend(turn);
    let device = Device::by_name(device)?;
    let kernels = kernels::all().into_iter().filter(|kernel| kernel.name.contains(family)).collect();
    let mut report = DeviceReport::new(&device);
    report.target = format!("{} in {browser}", report.target);
    Ok(Suite { report, kernels, device })
}

/// Runs one family: a line about it, or nothing when there is none left.
#[wasm_bindgen(jspi)]
pub fn run(suite: &mut Suite, family: usize) -> Option<String> {
    let test = TestReport::of_kernel(&suite.device, suite.kernels.get(family)?);
    let mut line = format!("{}: {}, {} cases, {:.1} s", test.test, test.verdict.name(), test.cases, test.seconds);
    test.notes.iter().for_each(|note| line += &format!("\n  {note}"));
    suite.report.tests.push(test);
    Some(line)
}

#[wasm_bindgen]
impl Suite {
    /// Families that passed, failed, and are not for this device.
    pub fn counts(&self) -> Vec<usize> {
        self.report.counts().to_vec()
    }

    /// The device, in words.
    pub fn device(&self) -> String {
        self.device.info().to_string()
    }

    /// The report as Markdown.
    pub fn markdown(&self) -> String {
        gatefold::verify::to_markdown(std::slice::from_ref(&self.report))
    }

    /// The report as JSON.
    ///
    /// # Errors
    /// What serde reports.
    pub fn json(&self) -> Result<String, JsError> {
        Ok(serde_json::to_string_pretty(&[&self.report])?)
    }
}
