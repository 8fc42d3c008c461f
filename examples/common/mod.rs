//! What the examples share: the choice of a device, and a progress bar.

use anyhow::Context;
use gatefold::Device;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// Opens the device called `name`, or the default one, and says which it is.
pub fn open_device(name: Option<&str>) -> anyhow::Result<Device> {
    let device = match name {
        Some(name) => Device::by_name(name),
        None => Device::new(),
    };
    let device = device.context("opening the device (--device cpu always works)")?;
    let chosen = name.is_some() || std::env::var_os("GATEFOLD_DEVICE").is_some_and(|name| !name.is_empty());
    match device.is_cpu() && !chosen {
        true => println!("Device: {}; no GPU was found, so the native CPU does the work", device.info()),
        false => println!("Device: {}", device.info()),
    }
    Ok(device)
}

/// A bar over `total` items of work, with their rate; `unit` is their name in the plural.
pub fn progress_bar(total: u64, unit: &str) -> anyhow::Result<ProgressBar> {
    let template = format!("{{elapsed}} {{bar:30}} {{rate}} {unit}/s, {{eta}} left | {{msg}}");
    let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        // A bar that cannot be drawn has no one to tell.
        out.write_fmt(format_args!("{:.0}", state.per_sec())).ok();
    };
    Ok(ProgressBar::new(total).with_style(ProgressStyle::with_template(&template)?.with_key("rate", rate)))
}
