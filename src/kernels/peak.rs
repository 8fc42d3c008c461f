//! The most that a device does: copies of memory, and multiply-adds in registers.

use super::{READ, READ_WRITE, grid};
use crate::backend::native::{Shared, for_parts, threads};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Peak { count: u32, rounds: u32, }
}

pub(crate) static COPY: Kernel = Kernel {
    name: "peak_copy",
    source: include_str!("../../shaders/peak.wgsl"),
    entry: "copy",
    params: Peak::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

pub(crate) static MULTIPLY_ADD: Kernel = Kernel { name: "peak_multiply_add", entry: "multiply_add", ..COPY };

/// Numbers of a vector in the shader.
const VECTOR: usize = 4;
/// Chains of a number.
pub(crate) const CHAINS: usize = 2;

/// `y = x`, whose length is a multiple of 4.
pub(crate) fn copy(x: &Tensor, y: &Tensor) -> Result<()> {
    match x.device().backend() {
        Backend::Native => {
            native(x, y, |x, y| y.copy_from_slice(x));
            Ok(())
        }
        Backend::Gpu(gpu) => launch(gpu, &COPY, x, y, 0),
    }
}

/// For each number x: `y = c0 + c1`, where each of them is `rounds` (a multiple of 8) times `c = c x + x`, from 0 and from 1.
pub(crate) fn multiply_add(x: &Tensor, y: &Tensor, rounds: u32) -> Result<()> {
    match x.device().backend() {
        Backend::Native => {
            native(x, y, |x, y| pulp::Arch::new().dispatch(Chains { x, y, rounds }));
            Ok(())
        }
        Backend::Gpu(gpu) => launch(gpu, &MULTIPLY_ADD, x, y, rounds),
    }
}

fn launch(gpu: &crate::backend::gpu::Gpu, kernel: &'static Kernel, x: &Tensor, y: &Tensor, rounds: u32) -> Result<()> {
    let count = x.len() / VECTOR;
    gpu.launch(kernel, &Peak { count: count as u32, rounds }, &[x.range(), y.range()], grid(count))
}

/// Runs `work` on a part of x and y on each thread.
fn native(x: &Tensor, y: &Tensor, work: impl Fn(&[f32], &mut [f32]) + Sync) {
    let (x, mut y) = (x.native::<f32>(), y.native_mut::<f32>());
    let y = Shared::new(&mut y);
    for_parts(x.len() / VECTOR, threads(), |first, count| {
        let (first, count) = (first * VECTOR, count * VECTOR);
        // SAFETY: each part has numbers of its own.
        work(&x[first..first + count], unsafe { y.slice(first, count) });
    });
}

/// The chains of some numbers.
struct Chains<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    rounds: u32,
}

/// Vectors at once: with two chains each, as many as hide the latency of two units.
const VECTORS: usize = 5;

impl pulp::WithSimd for Chains<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let width = VECTORS * S::F32_LANES;
        let mut buffer = [0.0; VECTORS * 16];
        for (x, y) in self.x.chunks(width).zip(self.y.chunks_mut(width)) {
            // What lies past the last number is computed too, and not stored.
            buffer[..x.len()].copy_from_slice(x);
            let mut factors = [simd.splat_f32s(0.0); VECTORS];
            factors.copy_from_slice(S::as_simd_f32s(&buffer[..width]).0);
            let mut chains = [[simd.splat_f32s(0.0), simd.splat_f32s(1.0)]; VECTORS];
            for _ in 0..self.rounds {
                for (chains, factor) in chains.iter_mut().zip(&factors) {
                    for chain in chains {
                        *chain = simd.mul_add_e_f32s(*chain, *factor, *factor);
                    }
                }
            }
            for (sum, [c0, c1]) in S::as_mut_simd_f32s(&mut buffer[..width]).0.iter_mut().zip(chains) {
                *sum = simd.add_f32s(c0, c1);
            }
            y.copy_from_slice(&buffer[..y.len()]);
        }
    }
}
