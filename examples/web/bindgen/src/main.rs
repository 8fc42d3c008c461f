//! `gatefold-bindgen MODULE.wasm FOLDER`: writes the module and its JavaScript side into a folder, for `<script type="module">`. It
//! is wasm-bindgen's own command cut down to what builds in a minute, at the version of the lock file.

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (module, folder) = arguments.next().zip(arguments.next()).context("usage: gatefold-bindgen MODULE.wasm FOLDER")?;
    wasm_bindgen_cli_support::Bindgen::new()
        .input_path(module)
        .web(true)?
        .typescript(false)
        .omit_default_module_path(false)
        .generate(folder)
}
