//! Products in half precision on a GPU's matrix units: the kernels of `shaders/gemm_cooperative.wgsl`.

use super::gemm::GEMM_KERNEL;
use crate::backend::{Feature, Kernel};

/// The shader with a size of fragments.
macro_rules! cooperative {
    ($fragments:literal) => {
        concat!(
            include_str!("../../shaders/gemm_cooperative.wgsl"),
            include_str!("../../shaders/product.wgsl"),
            include_str!("../../shaders/tile_source.wgsl"),
            include_str!("../../shaders/tile_128.wgsl"),
            include_str!("../../shaders/bound_vectors.wgsl"),
            include_str!(concat!("../../shaders/", $fragments, ".wgsl")),
        )
    };
}

pub(crate) static COOPERATIVE_16: Kernel = COOPERATIVE;
const COOPERATIVE: Kernel = Kernel {
    name: "gemm_half_cooperative_16",
    source: cooperative!("fragments_16"),
    entry: "cooperative",
    workgroup: 256,
    features: &[Feature::Subgroups, Feature::CooperativeMatrices],
    ..GEMM_KERNEL
};
pub(crate) static COOPERATIVE_8: Kernel =
    Kernel { name: "gemm_half_cooperative_8", source: cooperative!("fragments_8"), ..COOPERATIVE };
