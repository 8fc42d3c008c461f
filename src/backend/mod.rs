//! Where memory lives and work runs: wgpu (the only module that names `wgpu::`) and the native CPU.

pub(crate) mod adapter;
mod clock;
pub(crate) mod gpu;
pub(crate) mod native;
pub(crate) mod wait;

/// How a kernel uses one of its storage buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    ReadWrite,
}

/// The uniform struct of a kernel as Rust sees it; a test compares it with the shader's.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The struct's name in WGSL.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Each field's name and offset in bytes.
    pub fields: &'static [(&'static str, usize)],
}

/// One compute entry point: binding 0 is the uniform struct `params`, the others are storage buffers.
#[derive(Debug)]
pub struct Kernel {
    /// Unique name, for labels, the pipeline cache, errors and tests.
    pub name: &'static str,
    /// The composed WGSL: the kernel's file first, so that line numbers hold.
    pub source: &'static str,
    /// The entry point.
    pub entry: &'static str,
    /// The uniform struct.
    pub params: Layout,
    /// The storage buffers: binding and use. Entry points of one file share the numbering, so there may be gaps.
    pub bindings: &'static [(u32, Access)],
    /// Invocations of a workgroup, as the shader declares them.
    pub workgroup: u32,
    /// What the adapter must offer beyond the least: the host launches it nowhere else.
    pub features: &'static [Feature],
}

/// WGSL with what its aliases stand for in their place.
///
/// To naga an alias is a type of its own. In HLSL it writes for each type that needs them functions that make zeros or put values
/// together, and names them by what the type is made of: with two aliases of one array there are two functions of one name.
pub fn without_aliases(source: &str) -> String {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut text = source.to_owned();
    while let Some((before, (alias, after))) =
        text.split_once("\nalias ").and_then(|(before, rest)| Some((before, rest.split_once(';')?)))
    {
        let Some((name, meaning)) = alias.split_once(" = ") else { break };
        let rest = [before, "\n", after].concat();
        let pieces = rest.split_inclusive(|c| !is_word(c)).map(|piece| match piece.trim_end_matches(|c| !is_word(c)) {
            word if word == name => piece.replacen(name, meaning, 1),
            _ => piece.to_owned(),
        });
        text = pieces.collect();
    }
    text
}

/// What some adapters offer beyond what every kernel may take for granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Operations among the lanes of a subgroup.
    Subgroups,
    /// Products of small matrices of `f16` by a subgroup, summed in `f32`.
    CooperativeMatrices,
}

/// Declares a kernel's uniform struct (32-bit scalars only) together with the layout that a test checks.
macro_rules! params {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        pub(crate) struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl $name {
            pub(crate) const LAYOUT: $crate::backend::Layout = $crate::backend::Layout {
                name: stringify!($name),
                size: size_of::<$name>(),
                fields: &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
            };
        }
    };
}
pub(crate) use params;
