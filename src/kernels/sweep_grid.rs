//! The sweep over time by a grid of workgroups that all run at once, for any cell with a product: `shaders/sweep_grid.wgsl`. Each
//! keeps its part of W_hh in registers for a run of steps, and h goes from one to the others through memory.
//!
//! No interface promises that workgroups run at once, so nothing is taken for granted. Before the first sweep a probe, a run of
//! no steps of the very kernel, counts how many do; it is waited for, once a kernel. Should a grid come to a halt all the same,
//! its workgroups give up after a bounded wait, and a second launch, which follows each run, does what is left, without other
//! workgroups and in the same order of sums: the host waits for nothing, and inputs need not be kept for a second try, which would take as
//! much memory again as the largest buffer of a layer, because who gives up leaves every row between two steps. An empty
//! second launch costs a few microseconds a run; one for each step, kept ready in case, would cost as much as the sweep by steps.
//! A second launch that has work is slow: the alarm that was raised stays on the device and comes along with the next readback; from
//! then on the host chooses the sweep by steps.
//!
//! Two sides make one grid, unless the workgroups of one alone run at once where those of both do not, or the exchange of both is too
//! large.
//!
//! On the CPU it is the step sweep.

use super::cell_contract::{Block, CellKernel};
use super::sweep::{Plan, Side};
use super::sweep_step::{self, Sweep};
use crate::backend::Kernel;
use crate::backend::adapter::Class;
use crate::backend::gpu::{Gpu, Range};
use crate::device::{Backend, Device};
use crate::error::Result;
use crate::tensor::Tensor;

/// A cell composed with this file's shader: forward and backward.
macro_rules! grid_kernels {
    ($name:literal, $($cell:literal),+) => {{
        use crate::backend::Kernel;
        use crate::kernels::sweep_step::{Sweep, composed};
        use crate::kernels::{READ, READ_WRITE};
        const FORWARD: Kernel = Kernel {
            name: concat!($name, "_grid_forward"),
            source: composed!(["sweep_grid.wgsl"], $($cell),+),
            entry: "forward",
            params: Sweep::LAYOUT,
            bindings: &[(1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (8, READ_WRITE)],
            workgroup: 256,
            features: &[],
        };
        const BACKWARD: Kernel = Kernel {
            name: concat!($name, "_grid_backward"),
            entry: "backward",
            bindings: &[
                (1, READ_WRITE), (2, READ_WRITE), (3, READ), (4, READ), (5, READ), (6, READ_WRITE), (7, READ_WRITE), (8, READ_WRITE),
            ],
            ..FORWARD
        };
        [FORWARD, BACKWARD]
    }};
}
pub(crate) use grid_kernels;

/// Lanes of a workgroup, and k of a lane, as in the shader.
const LANES: usize = 256;
const DEPTH: usize = 32;
/// The most units: as many lines of `DEPTH` numbers as workgroup memory has room for.
const HIDDEN: usize = 1024;
/// The most rows: beyond, the product has so much to do that the launch of a step does not show.
const ROWS: usize = 256;
/// The most workgroups of a grid, as the shader has room for; the words of its exchange before the values, and those that the probe
/// and a run clear, all but the alarm.
const GROUPS: usize = 256;
const VALUES: usize = 512;
const PRESENT: u64 = 1;
/// Words of the exchange, at most, where they are enough for [`LEAST_RUN`] steps: 16 MiB, which stay in the caches of a large GPU.
const EXCHANGE: usize = 4 << 20;
/// Steps of a launch. Fewer would load the weights too often; more would take a rescue too long: it has a millisecond a step, and
/// an operating system resets a GPU that answers for seconds to nothing else.
const LEAST_RUN: usize = 16;
const MOST_RUN: usize = 256;

/// Whether the sweep can run this at all.
pub(crate) fn fits<C: CellKernel>(plan: &Plan<'_>) -> bool {
    C::GRID.is_some() && plan.hidden <= HIDDEN && plan.rows <= ROWS
}

/// Whether as many workgroups run at once as the units need, by the probe.
pub(crate) fn runs_at_once<C: CellKernel>(device: &Device, cell: &C, plan: &Plan<'_>, backward: bool) -> Result<bool> {
    let Backend::Gpu(gpu) = device.backend() else { return Ok(true) };
    Ok(unit_tiles(plan.hidden) <= co_resident(device, gpu, cell, plan, backward)?)
}

/// Whether nothing speaks against a grid: after an alarm none is trusted. One that waits for nothing needs no trust.
pub(crate) fn may_run<C: CellKernel>(device: &Device, cell: &C, plan: &Plan<'_>, backward: bool) -> Result<bool> {
    let Backend::Gpu(gpu) = device.backend() else { return Ok(true) };
    // By the steps of the whole, not of a window of it, so that windows choose the same.
    let waits = backward || plan.total > 1;
    Ok(!waits || (!gpu.is_alarmed() && runs_at_once(device, cell, plan, backward)?))
}

/// Whether workgroups wait for each other; not in a single step forward. Backward, the product comes after it.
fn waits(plan: &Plan<'_>, backward: bool) -> bool {
    backward || plan.steps > 1
}

/// Workgroups that share the units.
fn unit_tiles(hidden: usize) -> usize {
    let units = (LANES / hidden.div_ceil(DEPTH)).min(hidden);
    hidden.div_ceil(units)
}

fn kernel<C: CellKernel>(backward: bool) -> &'static Kernel {
    match C::GRID {
        Some(kernels) => &kernels[usize::from(backward)],
        None => unreachable!("only a cell with a product has a grid"),
    }
}

/// Workgroups that run at once, by a run of no steps.
fn co_resident<C: CellKernel>(device: &Device, gpu: &Gpu, cell: &C, plan: &Plan<'_>, backward: bool) -> Result<usize> {
    let kernel = kernel::<C>(backward);
    gpu.co_resident(kernel, || {
        let _in_use = gpu.exchange_in_use();
        let exchange = gpu.exchange(VALUES)?;
        gpu.clear(exchange.part(4, 4 * (VALUES as u64 - 1)))?;
        // It touches nothing but the exchange; browsers let no two bindings share what either may write.
        let unused = kernel.bindings.iter().map(|_| Tensor::uninitialized(device, [1])).collect::<Result<Vec<_>>>()?;
        let bindings: Vec<Range> = kernel
            .bindings
            .iter()
            .zip(&unused)
            .map(|((binding, _), unused)| if *binding == 8 { exchange.clone() } else { unused.range() })
            .collect();
        let params = Sweep { steps: 0, ..plan.params(2) };
        let groups = [GROUPS as u32, 1, 1];
        gpu.launch_each(kernel, &plan.constants(cell, backward), &bindings, std::iter::once((params, groups)))?;
        let present = gpu.read(exchange.part(4 * PRESENT, 4))?;
        Ok(bytemuck::pod_read_unaligned::<u32>(&present) as usize)
    })
}

/// Launches runs of steps, in the order of the direction or, backward, in the opposite one. Of two sides one comes after the other where
/// only the workgroups of one run at once, or the exchange of both is too large.
fn launch<C: CellKernel>(gpu: &Gpu, cell: &C, sides: &[Side<'_>], dstates: &[&Tensor], backward: bool) -> Result<()> {
    let (kernel, plan, device) = (kernel::<C>(backward), &sides[0].plan, sides[0].buffers.slots.device());
    let (of_side, columns) = (unit_tiles(plan.hidden), sides.len() * unit_tiles(plan.hidden));
    let waits = waits(plan, backward);
    let at_once = if waits { co_resident(device, gpu, cell, plan, backward)? } else { GROUPS }.min(GROUPS);
    let values = sides.len() * plan.rows * plan.hidden * if backward { C::Pre::LEN } else { 1 }; // of a step
    if sides.len() > 1 && ((of_side..columns).contains(&at_once) || !gpu.fits(VALUES + LEAST_RUN * values)) {
        let each = |n: usize| launch(gpu, cell, &sides[n..=n], dstates.get(n..=n).unwrap_or_default(), backward);
        return (0..sides.len()).try_for_each(each);
    }
    let (params, bindings) = sweep_step::prepare(cell, sides, dstates);
    // As many tiles of rows as have room beside each other.
    let tile = plan.rows.div_ceil((at_once / columns).max(1));
    let groups = [columns as u32, plan.rows.div_ceil(tile) as u32, 1];
    let longest = match gpu.class() {
        Class::Software => LEAST_RUN, // see PATIENCE in the shader
        _ => (EXCHANGE / values).clamp(LEAST_RUN, MOST_RUN),
    };
    let longest = longest.min(plan.run.count);
    // One exchange serves all threads of a program: a run clears it and fills it before another may.
    let _in_use = gpu.exchange_in_use();
    let exchange = gpu.exchange(VALUES + longest * values)?;
    let cleared = exchange.part(4, exchange.size() - 4);
    let bindings = [bindings, vec![exchange]].concat();
    for done in (0..plan.run.count).step_by(longest) {
        let steps = longest.min(plan.run.count - done);
        let t = if backward { plan.run.end() - 1 - done } else { plan.run.first + done };
        let grid = Sweep {
            t: t as u32,
            steps: steps as u32,
            recurrent: u32::from(t + 1 < plan.steps),
            finish: u32::from(t + 1 == steps),
            tile: tile as u32,
            ..params
        };
        let rescue = (Sweep { rescue: 1, ..grid }, [sides.len() as u32, plan.rows as u32, 1]);
        if waits {
            gpu.clear(cleared.clone())?;
        }
        let launches = std::iter::once((grid, groups)).chain(waits.then_some(rescue));
        gpu.launch_each(kernel, &plan.constants(cell, backward), &bindings, launches)?;
    }
    Ok(())
}

/// As [`sweep_step::forward`], which it is on the CPU.
pub(crate) fn forward<C: CellKernel>(cell: &C, sides: &[Side<'_>]) -> Result<()> {
    let Backend::Gpu(gpu) = sides[0].buffers.slots.device().backend() else { return sweep_step::forward(cell, sides) };
    launch(gpu, cell, sides, &[], false)
}

/// As [`sweep_step::backward`], which it is on the CPU.
pub(crate) fn backward<C: CellKernel>(cell: &C, sides: &[Side<'_>], dstates: &[&Tensor]) -> Result<()> {
    let Backend::Gpu(gpu) = sides[0].buffers.slots.device().backend() else { return sweep_step::backward(cell, sides, dstates) };
    launch(gpu, cell, sides, dstates, true)
}
