//! A GRU's reset gate before the product: what a step does between its two products.

use super::cell_contract::{Gated, GatedStep};
use super::cell_gru::GruCell;
use super::math::{Fusion, Lanes, OnLanes, on_lanes};
use super::{READ, READ_WRITE, grid};
use crate::backend::{Access, Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    GruReset { rows: u32, hidden: u32, t: u32, before: u32, }
}

const fn kernel(name: &'static str, entry: &'static str, bindings: &'static [(u32, Access)]) -> Kernel {
    let source = concat!(
        include_str!("../../shaders/gru_reset.wgsl"),
        include_str!("../../shaders/activation.wgsl"),
        include_str!("../../shaders/math.wgsl"),
    );
    Kernel { name, source, entry, params: GruReset::LAYOUT, bindings, workgroup: 64, features: &[] }
}

pub(crate) static RESET: Kernel = kernel("gru_reset", "reset", &[(1, READ_WRITE), (2, READ), (3, READ), (4, READ)]);
pub(crate) static RESET_BACKWARD: Kernel =
    kernel("gru_reset_backward", "reset_backward", &[(1, READ_WRITE), (2, READ), (5, READ), (6, READ_WRITE)]);

/// Gates r, z, n; slots of a step; the slot of `r h'`.
const GATES: usize = 3;
const SLOTS: usize = 4;
const SEEN: usize = 3;

fn params(at: &GatedStep<'_>) -> GruReset {
    GruReset { rows: at.rows as u32, hidden: at.hidden as u32, t: at.t as u32, before: at.before as u32 }
}

/// Units of a row, sixteen at a time: `(first, count)`.
fn blocks(hidden: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..hidden).step_by(Lanes::COUNT).map(move |at| (at, Lanes::COUNT.min(hidden - at)))
}

impl Gated for GruCell {
    fn slot(&self) -> usize {
        SEEN
    }

    fn forward(&self, at: &GatedStep<'_>, unit: &Tensor, product: &Tensor) -> Result<()> {
        match at.slots.device().backend() {
            Backend::Native => {
                let (unit, product, states) = (unit.native::<f32>(), product.native::<f32>(), at.states.native::<f32>());
                let mut slots = at.slots.native_mut::<f32>();
                on_lanes(Reset { cell: self, at, unit: &unit, product: &product, states: &states, slots: &mut slots });
                Ok(())
            }
            Backend::Gpu(gpu) => {
                let bindings = [at.slots, at.states, product, unit].map(Tensor::range);
                let step = (params(at), grid(at.rows * at.hidden));
                gpu.launch_each(&RESET, &self.gate_constants(), &bindings, std::iter::once(step))
            }
        }
    }

    fn backward(&self, at: &GatedStep<'_>, dseen: &Tensor, dh: &Tensor) -> Result<()> {
        match at.slots.device().backend() {
            Backend::Native => {
                let (dseen, states) = (dseen.native::<f32>(), at.states.native::<f32>());
                let (mut slots, mut dh) = (at.slots.native_mut::<f32>(), dh.native_mut::<f32>());
                on_lanes(ResetBackward { cell: self, at, dseen: &dseen, states: &states, slots: &mut slots, dh: &mut dh });
                Ok(())
            }
            Backend::Gpu(gpu) => {
                let bindings = [at.slots, at.states, dseen, dh].map(Tensor::range);
                let step = (params(at), grid(at.rows * at.hidden));
                gpu.launch_each(&RESET_BACKWARD, &self.gate_constants(), &bindings, std::iter::once(step))
            }
        }
    }
}

/// [`Gated::forward`] on the CPU. As the sweep computes: what that keeps of the gate is what this lets through.
struct Reset<'a> {
    cell: &'a GruCell,
    at: &'a GatedStep<'a>,
    unit: &'a [f32],
    product: &'a [f32],
    states: &'a [f32],
    slots: &'a mut [f32],
}

impl OnLanes for Reset<'_> {
    #[inline(always)]
    fn run<S: pulp::Simd, F: Fusion>(self, _: S) {
        let Self { cell, at: GatedStep { rows, hidden, t, before, .. }, unit, product, states, slots } = self;
        for row in 0..*rows {
            let slots = &mut slots[(t * rows + row) * SLOTS * hidden..][..SLOTS * hidden];
            let product = &product[row * GATES * hidden..];
            let h = &states[(before * rows + row) * hidden..];
            for (u, width) in blocks(*hidden) {
                let load = |from: &[f32]| Lanes::load(&from[u..][..width]);
                let r = cell.gate::<F>(load(slots) + (load(product) + load(unit)));
                (r * load(h)).store(&mut slots[SEEN * hidden + u..][..width]);
            }
        }
    }
}

/// [`Gated::backward`] on the CPU, likewise.
struct ResetBackward<'a> {
    cell: &'a GruCell,
    at: &'a GatedStep<'a>,
    dseen: &'a [f32],
    states: &'a [f32],
    slots: &'a mut [f32],
    dh: &'a mut [f32],
}

impl OnLanes for ResetBackward<'_> {
    #[inline(always)]
    fn run<S: pulp::Simd, F: Fusion>(self, _: S) {
        let Self { cell, at: GatedStep { rows, hidden, t, before, .. }, dseen, states, slots, dh } = self;
        for row in 0..*rows {
            let slot = &mut slots[(t * rows + row) * SLOTS * hidden..][..*hidden];
            let h = &states[(before * rows + row) * hidden..];
            let (dseen, dh) = (&dseen[row * hidden..], &mut dh[row * hidden..][..*hidden]);
            for (u, width) in blocks(*hidden) {
                let load = |from: &[f32]| Lanes::load(&from[u..][..width]);
                let (r, d) = (load(slot), load(dseen));
                (d * load(h) * cell.gate_slope::<F>(r)).store(&mut slot[u..][..width]);
                (load(dh) + d * r).store(&mut dh[u..][..width]);
            }
        }
    }
}
