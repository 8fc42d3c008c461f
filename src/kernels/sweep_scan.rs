//! The sweep over time as a scan over blocks of steps, for cells that are linear in their one state: `shaders/sweep_scan.wgsl`.
//!
//! On the CPU it is the step sweep: a scan does more work to do it at once, and rows and units fill a CPU's vectors already.

use std::slice;

use super::cell_contract::CellKernel;
use super::sweep::{Plan, Run, Side};
use super::sweep_step;
use super::tiles;
use crate::backend::{Kernel, params};
use crate::device::{Backend, Device};
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Scan {
        rows: u32, hidden: u32, steps: u32, blocks: u32,
        reverse: u32, descending: u32, ragged: u32, keep: u32,
        edge: u32, last: u32, y_stride: u32, y_offset: u32,
    }
}

/// The entry points of a cell composed with `sweep_scan.wgsl`.
#[derive(Debug)]
pub struct ScanKernels {
    /// Each block as one step.
    pub fold: Kernel,
    /// The same for the gradient.
    pub fold_backward: Kernel,
    /// What comes into each block, forward or backward.
    pub carry: Kernel,
    /// The cell over each block.
    pub forward: Kernel,
    /// The cell backward over each block.
    pub backward: Kernel,
}

impl ScanKernels {
    /// All of them.
    #[cfg(feature = "verify")]
    pub(crate) fn all(&'static self) -> [&'static Kernel; 5] {
        [&self.fold, &self.fold_backward, &self.carry, &self.forward, &self.backward]
    }
}

/// A cell composed with this file's shader: the contract, the cell and more files of its own, the functions that they use.
macro_rules! scan_kernels {
    ($name:literal, $cell:literal $(, $more:literal)*) => {{
        use crate::backend::Kernel;
        use crate::kernels::{READ, READ_WRITE};
        const FOLD: Kernel = Kernel {
            name: concat!($name, "_scan_fold"),
            source: concat!(
                include_str!("../../shaders/sweep_scan.wgsl"),
                include_str!("../../shaders/cell_contract.wgsl"),
                include_str!(concat!("../../shaders/", $cell)),
                $(include_str!(concat!("../../shaders/", $more)),)*
                include_str!("../../shaders/math.wgsl"),
            ),
            entry: "fold",
            params: crate::kernels::sweep_scan::Scan::LAYOUT,
            bindings: &[(1, READ_WRITE), (3, READ), (6, READ_WRITE)],
            workgroup: 64,
            features: &[],
        };
        crate::kernels::sweep_scan::ScanKernels {
            fold: FOLD,
            fold_backward: Kernel {
                name: concat!($name, "_scan_fold_backward"),
                entry: "fold_backward",
                bindings: &[(1, READ_WRITE), (3, READ), (4, READ_WRITE), (6, READ_WRITE)],
                ..FOLD
            },
            carry: Kernel {
                name: concat!($name, "_scan_carry"),
                entry: "carry",
                bindings: &[(6, READ_WRITE), (7, READ)],
                ..FOLD
            },
            forward: Kernel {
                name: concat!($name, "_scan_forward"),
                entry: "forward",
                bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ_WRITE), (6, READ_WRITE)],
                ..FOLD
            },
            backward: Kernel {
                name: concat!($name, "_scan_backward"),
                entry: "backward",
                bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ_WRITE), (5, READ_WRITE), (6, READ_WRITE)],
                ..FOLD
            },
        }
    }};
}
pub(crate) use scan_kernels;

/// Lanes of a workgroup and steps of a block, as in the shader.
const WORKGROUP: usize = 64;
const BLOCK: usize = 32;

/// Whether a scan can do this. Zoneout and the clip of the gradient act between steps, and an output product after each: they take
/// steps. So do the windows of a bounded back-propagation, and who asks for the gradients of all states.
pub(crate) fn fits(plan: &Plan<'_>) -> bool {
    let linear = plan.zoneout == [0.0; 2] && plan.clip == 0.0 && plan.output && !plan.flow;
    linear && plan.start == 0 && plan.steps == plan.total
}

/// As [`sweep_step::forward`] of one side, which it is on the CPU.
pub(crate) fn forward<C: CellKernel>(kernels: &'static ScanKernels, cell: &C, side: &Side<'_>) -> Result<()> {
    let Side { plan, buffers } = side;
    let device = buffers.slots.device();
    let Backend::Gpu(gpu) = device.backend() else {
        return sweep_step::forward(cell, slice::from_ref(side));
    };
    debug_assert_eq!(plan.run, Run::whole(plan.steps), "a scan takes all steps");
    let depth = plan.depth::<C>(buffers.states);
    let (first, last) = plan.ends(depth);
    let edge = first * plan.rows * plan.hidden;
    let keep = depth > 2 || plan.steps == 1;
    let params = Scan { edge: edge as u32, last: last as u32, keep: keep.into(), ..scan(plan, plan.reverse) };
    let carries = carries(device, plan)?;
    let [slots, states, y, carries] = [buffers.slots, buffers.states, buffers.y, &carries].map(Tensor::range);
    let lengths = plan.lengths.map_or(buffers.unit, |lengths| lengths.tensor()).range();
    let blocks = params.blocks as usize;
    if blocks > 1 {
        gpu.launch(&kernels.fold, &params, &[slots.clone(), lengths.clone(), carries.clone()], groups(plan, blocks - 1))?;
    }
    gpu.launch(&kernels.carry, &params, &[carries.clone(), states.clone()], groups(plan, 1))?;
    gpu.launch(&kernels.forward, &params, &[slots, states, lengths, y, carries], groups(plan, blocks))
}

/// As [`sweep_step::backward`] of one side, which it is on the CPU; `dstates [B, H]`.
pub(crate) fn backward<C: CellKernel>(kernels: &'static ScanKernels, cell: &C, side: &Side<'_>, dstates: &Tensor) -> Result<()> {
    let Side { plan, buffers } = side;
    let device = buffers.slots.device();
    let Backend::Gpu(gpu) = device.backend() else {
        return sweep_step::backward(cell, slice::from_ref(side), &[dstates]);
    };
    debug_assert_eq!(plan.depth::<C>(buffers.states), plan.steps + 1, "backward needs every state");
    let params = scan(plan, !plan.reverse);
    let carries = carries(device, plan)?;
    let [slots, states, dy, carries] = [buffers.slots, buffers.states, buffers.y, &carries].map(Tensor::range);
    let lengths = plan.lengths.map_or(buffers.unit, |lengths| lengths.tensor()).range();
    let blocks = params.blocks as usize;
    if blocks > 1 {
        let bindings = [slots.clone(), lengths.clone(), dy.clone(), carries.clone()];
        gpu.launch(&kernels.fold_backward, &params, &bindings, groups(plan, blocks - 1))?;
    }
    gpu.launch(&kernels.carry, &params, &[carries.clone(), dstates.range()], groups(plan, 1))?;
    let bindings = [slots, states, lengths, dy, dstates.range(), carries];
    gpu.launch(&kernels.backward, &params, &bindings, groups(plan, blocks))
}

fn scan(plan: &Plan<'_>, descending: bool) -> Scan {
    Scan {
        rows: plan.rows as u32,
        hidden: plan.hidden as u32,
        steps: plan.steps as u32,
        blocks: plan.steps.div_ceil(BLOCK) as u32,
        reverse: plan.reverse.into(),
        descending: descending.into(),
        ragged: plan.lengths.is_some().into(),
        keep: 0,
        edge: 0,
        last: 0,
        y_stride: plan.y_stride as u32,
        y_offset: plan.y_offset as u32,
    }
}

fn carries(device: &Device, plan: &Plan<'_>) -> Result<Tensor> {
    Tensor::uninitialized(device, [plan.steps.div_ceil(BLOCK), 2, plan.rows, plan.hidden])
}

/// A lane for each unit of each row and block.
fn groups(plan: &Plan<'_>, blocks: usize) -> [u32; 3] {
    tiles(plan.hidden.div_ceil(WORKGROUP), plan.rows * blocks)
}
