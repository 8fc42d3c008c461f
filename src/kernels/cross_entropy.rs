//! Softmax and negative log-likelihood, fused, with its gradient.

use super::{READ, READ_WRITE, math, row_groups};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::{Lengths, Tensor};

params! {
    /// The shader's uniform struct.
    CrossEntropy { rows: u32, classes: u32, batch: u32, ignored: u32, ragged: u32, gradient: u32, scale: f32, }
}

pub(crate) static CROSS_ENTROPY: Kernel = Kernel {
    name: "cross_entropy",
    source: concat!(include_str!("../../shaders/cross_entropy.wgsl"), include_str!("../../shaders/math.wgsl")),
    entry: "cross_entropy",
    params: CrossEntropy::LAYOUT,
    bindings: &[(1, READ), (2, READ), (3, READ), (4, READ_WRITE), (5, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// What counts in a loss over `[T, B, ..]`, and its weight.
#[derive(Clone, Copy)]
pub(crate) struct Counted<'a> {
    /// B.
    pub batch: usize,
    /// Steps past a sequence's length do not count.
    pub lengths: Option<&'a Lengths>,
    /// 1 / what counts.
    pub scale: f32,
}

/// Of logits `z [rows, classes]` and `targets [rows]` (`u32`): the loss terms `[rows]`, not yet scaled, and with
/// `gradient` also `dz`, scaled. Every counted target is below `classes`.
pub(crate) fn cross_entropy(
    z: &Tensor,
    targets: &Tensor,
    ignored: Option<u32>,
    counted: Counted<'_>,
    gradient: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, device) = (targets.len(), z.device());
    let classes = z.len() / rows;
    let terms = Tensor::uninitialized(device, [rows])?;
    let dz = if gradient { Some(Tensor::uninitialized(device, z.shape())?) } else { None };
    let ignored = ignored.unwrap_or(u32::MAX);
    match device.backend() {
        Backend::Native => {
            let (z, targets, mut terms) = (z.native::<f32>(), targets.native::<u32>(), terms.native_mut::<f32>());
            let mut dz = dz.as_ref().map(|dz| dz.native_mut::<f32>());
            let counts = |row: usize| {
                let within = |l: &Lengths| row / counted.batch < l.host()[row % counted.batch] as usize;
                targets[row] != ignored && counted.lengths.is_none_or(within)
            };
            let mut likelihood = vec![0.0f32; classes];
            for (row, logits) in z.chunks_exact(classes).enumerate() {
                let gradient = dz.as_mut().map(|dz| &mut dz[row * classes..][..classes]);
                if !counts(row) {
                    terms[row] = 0.0;
                    gradient.into_iter().for_each(|gradient| gradient.fill(0.0));
                    continue;
                }
                let wanted = targets[row] as usize;
                // max() may hide NaN here: the sum below still sees it.
                let top = logits.iter().copied().fold(logits[0], f32::max);
                likelihood.iter_mut().zip(logits).for_each(|(e, z)| *e = z - top);
                pulp::Arch::new().dispatch(|| likelihood.iter_mut().for_each(|e| *e = math::exp::<math::Apart>(*e)));
                let sum: f32 = likelihood.iter().sum();
                terms[row] = math::log(sum) + (top - logits[wanted]);
                if let Some(gradient) = gradient {
                    let factor = counted.scale / sum;
                    gradient.iter_mut().zip(&likelihood).for_each(|(dz, e)| *dz = e * factor);
                    gradient[wanted] -= counted.scale;
                }
            }
        }
        Backend::Gpu(gpu) => {
            let params = CrossEntropy {
                rows: rows as u32,
                classes: classes as u32,
                batch: counted.batch as u32,
                ignored,
                ragged: counted.lengths.is_some().into(),
                gradient: gradient.into(),
                scale: counted.scale,
            };
            // Without lengths or a gradient, something must still be bound in their places; writable memory only once.
            let lengths = counted.lengths.map_or(targets, Lengths::tensor);
            let unused = if gradient { None } else { Some(Tensor::uninitialized(device, [1])?) };
            let Some(dz) = dz.as_ref().or(unused.as_ref()) else { unreachable!("one of the two was made above") };
            let bindings = [z.range(), targets.range(), lengths.range(), terms.range(), dz.range()];
            gpu.launch(&CROSS_ENTROPY, &params, &bindings, row_groups(rows))?;
        }
    }
    Ok((terms, dz))
}
