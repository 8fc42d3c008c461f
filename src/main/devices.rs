//! `gatefold devices`.

use std::io::Write;

use anyhow::Result;
use gatefold::{Device, DeviceInfo};

/// Lists every device and marks the one that [`Device::new`] takes.
pub fn run(out: &mut impl Write) -> Result<()> {
    let chosen = Device::new();
    // Opened devices and listed ones say the same of themselves, but for features and limits.
    let is_chosen = |info: &DeviceInfo| {
        let same = |chosen: DeviceInfo| {
            (&chosen.name, &chosen.backend, &chosen.driver, &chosen.kind) == (&info.name, &info.backend, &info.driver, &info.kind)
        };
        chosen.as_ref().is_ok_and(|device| same(device.info()))
    };
    let devices = Device::list();
    let marked = devices.iter().position(is_chosen);
    for (at, info) in devices.iter().enumerate() {
        writeln!(out, "{} {info}", if Some(at) == marked { "*" } else { " " })?;
        writeln!(out, "    name       {}", name(info))?;
        if info.backend != "native" {
            let features = if info.features.is_empty() { "none of those we use".to_owned() } else { info.features.join(" ") };
            writeln!(out, "    features   {features}")?;
            for (limit, value) in &info.limits {
                writeln!(out, "    {:<10} {limit} = {value}", if limit == &info.limits[0].0 { "limits" } else { "" })?;
            }
        }
    }
    writeln!(out)?;
    match chosen {
        Ok(device) => writeln!(out, "* default: {}, {}", device.info(), reason(&device))?,
        Err(error) => writeln!(out, "no default: {error}")?,
    }
    writeln!(out, "To name one: cpu, a part of a name, a backend, or both: --device gl:, GATEFOLD_DEVICE=vulkan:llvmpipe")?;
    Ok(())
}

/// What `--device` and `GATEFOLD_DEVICE` take.
fn name(info: &DeviceInfo) -> String {
    if info.backend == "native" { info.name.clone() } else { format!("{}:{}", info.backend, info.name) }
}

fn reason(device: &Device) -> String {
    match std::env::var("GATEFOLD_DEVICE") {
        Ok(wanted) if !wanted.is_empty() => format!("because GATEFOLD_DEVICE is {wanted:?}"),
        _ if device.is_cpu() => "because no hardware GPU was found (software adapters are used only when named)".to_owned(),
        _ => "the best hardware GPU".to_owned(),
    }
}
