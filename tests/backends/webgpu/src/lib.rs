use gatefold::Device;
use gatefold::verify::{Report, kernels};
use wasm_bindgen::prelude::*;

#[wasm_bindgen(inline_js = "
    const channel = new MessageChannel();
    export function turn() {
        return new Promise(resolve => { channel.port1.onmessage = resolve; channel.port2.postMessage(null); });
    }
")]
extern "C" {
    #[wasm_bindgen(suspending)]
    fn turn();
}

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = console)]
    fn log(text: &str);
}

#[wasm_bindgen(jspi)]
pub fn suite(device: &str, filter: &str) -> String {
    console_error_panic_hook::set_once();
    gatefold::set_suspend(turn);
    let device = match Device::by_name(device) {
        Ok(device) => device,
        Err(error) => return error.to_string(),
    };
    log(&format!("{device:?}"));
    let (mut passed, mut failed) = (0, 0);
    for family in kernels::all() {
        if !family.name.contains(filter) {
            continue;
        }
        let text = match family.run(&device) {
            Ok(reports) => {
                let failures: Vec<String> = reports.iter().flat_map(Report::failures).collect();
                if failures.is_empty() {
                    passed += 1
                } else {
                    failed += 1
                }
                format!(
                    "{}: {} cases, {} failures {:?}",
                    family.name,
                    reports.len(),
                    failures.len(),
                    failures.iter().take(3).collect::<Vec<_>>()
                )
            }
            Err(error) => {
                failed += 1;
                format!("{}: {error}", family.name)
            }
        };
        log(&text);
    }
    format!("{passed} passed, {failed} failed")
}
