//! Products in tiles through workgroup memory, in either precision: the kernels of `shaders/gemm_tiled.wgsl`.

use super::gemm::GEMM_KERNEL;
use crate::backend::Kernel;

/// The shader with a tile's size, a precision, and buffers bound as vectors or words.
macro_rules! tiled {
    ($tile:literal, $factors:literal, $bound:literal) => {
        concat!(
            include_str!("../../shaders/gemm_tiled.wgsl"),
            include_str!("../../shaders/product.wgsl"),
            include_str!("../../shaders/component.wgsl"),
            include_str!("../../shaders/tile_source.wgsl"),
            include_str!(concat!("../../shaders/", $tile, ".wgsl")),
            include_str!(concat!("../../shaders/", $factors, ".wgsl")),
            include_str!(concat!("../../shaders/", $bound, ".wgsl")),
        )
    };
}

const TILED: Kernel = Kernel { entry: "tiled", ..GEMM_KERNEL };

pub(crate) static TILED_64: Kernel =
    Kernel { name: "gemm_tiled_64", source: tiled!("tile_64", "factors_single", "bound_vectors"), workgroup: 64, ..TILED };
pub(crate) static TILED_64_WORDS: Kernel =
    Kernel { name: "gemm_tiled_64_words", source: tiled!("tile_64", "factors_single", "bound_words"), workgroup: 64, ..TILED };
pub(crate) static TILED_128: Kernel =
    Kernel { name: "gemm_tiled_128", source: tiled!("tile_128", "factors_single", "bound_vectors"), workgroup: 256, ..TILED };
pub(crate) static HALF_TILED_64: Kernel =
    Kernel { name: "gemm_half_tiled_64", source: tiled!("tile_64", "factors_half", "bound_vectors"), workgroup: 64, ..TILED };
pub(crate) static HALF_TILED_128: Kernel =
    Kernel { name: "gemm_half_tiled_128", source: tiled!("tile_128", "factors_half", "bound_vectors"), workgroup: 256, ..TILED };
