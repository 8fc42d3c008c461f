//! Recurrent dropout: a mask for each gate on what its product sees, the same at all steps.

use std::ops::Range;

use super::gemm::Matrix;
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::rng::{MaskKey, philox, unit};
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    GateMask {
        count: u32, width: u32, batch: u32, first: u32, gates: u32, offset: u32,
        p: f32, scale: f32, key0: u32, key1: u32,
    }
}

const fn kernel(name: &'static str, entry: &'static str) -> Kernel {
    let source = concat!(include_str!("../../shaders/gate_mask.wgsl"), include_str!("../../shaders/rng.wgsl"));
    Kernel {
        name,
        source,
        entry,
        params: GateMask::LAYOUT,
        bindings: &[(1, READ), (2, READ_WRITE)],
        workgroup: 64,
        features: &[],
    }
}

pub(crate) static SPREAD: Kernel = kernel("gate_mask_spread", "spread");
pub(crate) static COLLECT: Kernel = kernel("gate_mask_collect", "collect");

/// Tells these draws from others under one key, as in the shader.
const GATE: u32 = 0x6761_7465;

/// The masks of one direction of one layer.
#[derive(Clone, Copy)]
pub(crate) struct Masks {
    /// Of a zero; what is kept is scaled by `1 / (1 - probability)`.
    pub probability: f32,
    pub key: MaskKey,
    /// B: line n of several steps is one of row `n % B`.
    pub batch: usize,
}

impl Masks {
    fn scale(&self) -> f32 {
        1.0 / (1.0 - self.probability)
    }

    /// A line of `values` under the mask of its row and the gate.
    fn line<'a>(&'a self, gate: usize, line: usize, values: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        values.iter().enumerate().map(move |(u, value)| {
            let [bits, ..] = philox(self.key.words(), [u as u32, (line % self.batch) as u32, gate as u32, GATE]);
            if unit(bits) >= self.probability { value * self.scale() } else { 0.0 }
        })
    }

    /// For lines without gates in `plain`.
    fn params(&self, gates: Range<usize>, plain: Matrix<'_>) -> GateMask {
        let [key0, key1] = self.key.words();
        GateMask {
            count: (plain.rows * plain.cols) as u32,
            width: plain.cols as u32,
            batch: self.batch as u32,
            first: gates.start as u32,
            gates: gates.len() as u32,
            offset: plain.offset as u32,
            p: self.probability,
            scale: self.scale(),
            key0,
            key1,
        }
    }
}

/// `out [gates, N, R]`: `x [N, R]`, whose rows lie side by side, under the mask of each of the gates.
pub(crate) fn spread(masks: &Masks, gates: Range<usize>, x: Matrix<'_>, out: &Tensor) -> Result<()> {
    let count = x.rows * x.cols;
    debug_assert!(x.row == x.cols && x.col == 1 && out.len() == gates.len() * count);
    match out.device().backend() {
        Backend::Native => {
            let (lines, mut out) = (x.tensor.native::<f32>(), out.native_mut::<f32>());
            for (gate, out) in gates.zip(out.chunks_exact_mut(count)) {
                let lines = lines[x.offset..].chunks_exact(x.cols);
                for (n, (out, line)) in out.chunks_exact_mut(x.cols).zip(lines).enumerate() {
                    out.iter_mut().zip(masks.line(gate, n, line)).for_each(|(out, value)| *out = value);
                }
            }
            Ok(())
        }
        Backend::Gpu(gpu) => gpu.launch(&SPREAD, &masks.params(gates, x), &[x.tensor.range(), out.range()], grid(count)),
    }
}

/// The way back: `out [N, R]`, whose rows lie side by side, grows by the sum over the gates of `x [gates, N, R]` under their masks.
pub(crate) fn collect(masks: &Masks, gates: Range<usize>, x: &Tensor, out: Matrix<'_>) -> Result<()> {
    let count = out.rows * out.cols;
    debug_assert!(out.row == out.cols && out.col == 1 && x.len() == gates.len() * count);
    match x.device().backend() {
        Backend::Native => {
            let (x, mut sums) = (x.native::<f32>(), out.tensor.native_mut::<f32>());
            for (gate, x) in gates.zip(x.chunks_exact(count)) {
                let sums = sums[out.offset..].chunks_exact_mut(out.cols);
                for (n, (sum, line)) in sums.zip(x.chunks_exact(out.cols)).enumerate() {
                    sum.iter_mut().zip(masks.line(gate, n, line)).for_each(|(sum, value)| *sum += value);
                }
            }
            Ok(())
        }
        Backend::Gpu(gpu) => gpu.launch(&COLLECT, &masks.params(gates, out), &[x.range(), out.tensor.range()], grid(count)),
    }
}
