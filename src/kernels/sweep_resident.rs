//! The sweep over time with the loop inside the kernel, for any cell: `shaders/sweep_resident.wgsl`. A workgroup carries a tile of
//! the batch through many steps of a direction of a layer; two of these go in one launch.
//!
//! On the CPU it is the step sweep, whose product is as fast and whose steps cost no launch.

use super::cell_contract::CellKernel;
use super::sweep::{Plan, Run, Side};
use super::sweep_step::{self, Sweep};
use super::tiles;
use crate::backend::Kernel;
use crate::backend::gpu::Gpu;
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// The entry points of a cell composed with `sweep_resident.wgsl`.
#[derive(Debug)]
pub struct ResidentKernels {
    /// For any adapter.
    pub plain: [Kernel; 2],
    /// For subgroups of eight lanes.
    pub eight: [Kernel; 2],
}

impl ResidentKernels {
    /// All of them.
    #[cfg(feature = "verify")]
    pub(crate) fn all(&'static self) -> impl Iterator<Item = &'static Kernel> {
        self.plain.iter().chain(&self.eight)
    }
}

/// A cell composed with this file's shader: forward and backward, plain and for subgroups of eight lanes.
macro_rules! resident_kernels {
    ($name:literal, $($cell:literal),+) => {{
        use crate::backend::{Feature, Kernel};
        use crate::kernels::sweep_step::{Sweep, composed};
        use crate::kernels::{READ, READ_WRITE};
        const FORWARD: Kernel = Kernel {
            name: concat!($name, "_resident_forward"),
            source: composed!(["sweep_resident.wgsl", "eight.wgsl"], $($cell),+),
            entry: "forward",
            params: Sweep::LAYOUT,
            bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE)],
            workgroup: 256,
            features: &[],
        };
        const BACKWARD: Kernel = Kernel {
            name: concat!($name, "_resident_backward"),
            entry: "backward",
            bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE)],
            ..FORWARD
        };
        const EIGHT: &str = composed!(["sweep_resident.wgsl", "eight_subgroup.wgsl"], $($cell),+);
        const FEATURES: &[Feature] = &[Feature::Subgroups];
        crate::kernels::sweep_resident::ResidentKernels {
            plain: [FORWARD, BACKWARD],
            eight: [
                Kernel { name: concat!($name, "_resident_forward_eight"), source: EIGHT, features: FEATURES, ..FORWARD },
                Kernel { name: concat!($name, "_resident_backward_eight"), source: EIGHT, features: FEATURES, ..BACKWARD },
            ],
        }
    }};
}
pub(crate) use resident_kernels;

/// Units of a workgroup at most, k of a lane, and rows of a workgroup at most, as in the shader. More rows would share the loads of
/// the weights, but each size is a pipeline of its own, and takes longer to compile.
const WIDTH: usize = 128;
const DEPTH: usize = 64;
const ROWS: usize = 2;
/// Steps of a launch: an estimate of what takes a GPU some 10 ms. An operating system resets one that answers for seconds to
/// nothing else.
const LONGEST: usize = 2048;

/// Whether the sweep can run this at all: all units of a cell with a product fit in a workgroup.
pub(crate) fn fits<C: CellKernel>(plan: &Plan<'_>) -> bool {
    !C::PRODUCT || plan.hidden <= WIDTH
}

/// How a sweep is cut into workgroups: the units of one, the parts of a unit's product, and the rows.
fn tile<C: CellKernel>(plan: &Plan<'_>) -> [usize; 3] {
    let width = [32, 64, WIDTH].into_iter().find(|width| plan.hidden <= *width).unwrap_or(WIDTH);
    if !C::PRODUCT {
        return [width, 1, 1];
    }
    [width, width.div_ceil(DEPTH), plan.rows.min(ROWS)]
}

/// Launches `kernels` for the steps of a run, in the order of the direction or, backward, in the opposite one.
fn launch<C: CellKernel>(gpu: &Gpu, cell: &C, sides: &[Side<'_>], dstates: &[&Tensor], backward: bool) -> Result<()> {
    let plan = &sides[0].plan;
    let (params, bindings) = sweep_step::prepare(cell, sides, dstates);
    let [width, parts, rows] = tile::<C>(plan);
    let kernels = if gpu.subgroup_size() == Some(8) { &C::RESIDENT.eight } else { &C::RESIDENT.plain };
    let kernel = &kernels[usize::from(backward)];
    let mut constants = plan.constants(cell, backward);
    constants.extend([("width", width), ("parts", parts), ("tile", rows)].map(|(name, value)| (name, value as f64)));
    let columns = if C::PRODUCT { 1 } else { plan.hidden.div_ceil(width) };
    let groups = tiles(sides.len() * columns, plan.rows.div_ceil(rows));
    let Run { first, count } = plan.run;
    let runs = (0..count).step_by(LONGEST).map(|done| {
        let steps = LONGEST.min(count - done);
        let t = if backward { first + count - 1 - done } else { first + done };
        (Sweep { t: t as u32, steps: steps as u32, ..params }, groups)
    });
    gpu.launch_each(kernel, &constants, &bindings, runs)
}

/// As [`sweep_step::forward`], which it is on the CPU.
pub(crate) fn forward<C: CellKernel>(cell: &C, sides: &[Side<'_>]) -> Result<()> {
    let Backend::Gpu(gpu) = sides[0].buffers.slots.device().backend() else {
        return sweep_step::forward(cell, sides);
    };
    launch(gpu, cell, sides, &[], false)
}

/// As [`sweep_step::backward`], which it is on the CPU.
pub(crate) fn backward<C: CellKernel>(cell: &C, sides: &[Side<'_>], dstates: &[&Tensor]) -> Result<()> {
    let Backend::Gpu(gpu) = sides[0].buffers.slots.device().backend() else {
        return sweep_step::backward(cell, sides, dstates);
    };
    launch(gpu, cell, sides, dstates, true)
}
