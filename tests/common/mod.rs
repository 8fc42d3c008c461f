//! The devices that the tests run on.

use anyhow::{Result, ensure};
use gatefold::Device;

/// Freshly opened: every adapter of the machine. None at all is a failure, never a skip.
pub fn adapters() -> Result<Vec<Device>> {
    let list = Device::list();
    let names = list.iter().filter(|info| info.backend != "native").map(|info| format!("{}:{}", info.backend, info.name));
    let adapters = names.map(|name| Device::by_name(&name)).collect::<Result<Vec<_>, _>>()?;
    ensure!(!adapters.is_empty(), "this test needs a wgpu adapter and found none: apt-get install mesa-vulkan-drivers");
    Ok(adapters)
}

/// Freshly opened: the native CPU and every adapter.
pub fn devices() -> Result<Vec<Device>> {
    Ok(std::iter::once(Device::cpu()).chain(adapters()?).collect())
}
