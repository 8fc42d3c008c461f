//! What surrounds the output product of a step (projections, Jordan networks), and teacher forcing.

use super::sweep::{Plan, Step};
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::rng::{MaskKey, philox, unit};
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    OutputStep {
        rows: u32, width: u32, t: u32, before: u32, after: u32,
        ragged: u32, y_stride: u32, y_offset: u32,
        key0: u32, key1: u32, start: u32, probability: f32,
    }
}

const fn kernel(name: &'static str, entry: &'static str, bindings: &'static [(u32, crate::backend::Access)]) -> Kernel {
    let source = concat!(include_str!("../../shaders/output_step.wgsl"), include_str!("../../shaders/rng.wgsl"));
    Kernel { name, source, entry, params: OutputStep::LAYOUT, bindings, workgroup: 64, features: &[] }
}

pub(crate) static TEACH: Kernel = kernel("teach", "teach", &[(1, READ_WRITE), (3, READ), (4, READ)]);
pub(crate) static OUTPUT: Kernel = kernel("output", "output", &[(1, READ_WRITE), (2, READ_WRITE), (3, READ)]);
pub(crate) static OUTPUT_BACKWARD: Kernel =
    kernel("output_backward", "output_backward", &[(2, READ_WRITE), (3, READ), (5, READ_WRITE), (6, READ_WRITE)]);
pub(crate) static TEACH_BACKWARD: Kernel = kernel("teach_backward", "teach_backward", &[(3, READ), (5, READ_WRITE)]);

/// Tells the draws of teacher forcing from others under one key, as in the shader.
const TAUGHT: u32 = 0x7465_6163;

/// Targets that stand in for a layer's own outputs in its recurrence.
#[derive(Clone)]
pub(crate) struct Teacher {
    /// [T, B, R]
    pub targets: Tensor,
    /// Of seeing the target, for each row and step.
    pub probability: f32,
    pub key: MaskKey,
}

impl Teacher {
    /// Whether step `t` of the row sees the target of the step before.
    fn taught(&self, plan: &Plan<'_>, t: usize, row: usize) -> bool {
        let [bits, ..] = philox(self.key.words(), [TAUGHT, row as u32, (plan.start + t) as u32, 0]);
        t > 0 && plan.is_valid(t, row) && unit(bits) < self.probability
    }
}

fn params(plan: &Plan<'_>, width: usize, (t, before, after): Step, teacher: Option<&Teacher>) -> OutputStep {
    let [key0, key1] = teacher.map_or([0; 2], |teacher| teacher.key.words());
    OutputStep {
        rows: plan.rows as u32,
        width: width as u32,
        t: t as u32,
        before: before as u32,
        after: after as u32,
        ragged: plan.lengths.is_some().into(),
        y_stride: plan.y_stride as u32,
        y_offset: plan.y_offset as u32,
        key0,
        key1,
        start: plan.start as u32,
        probability: teacher.map_or(0.0, |teacher| teacher.probability),
    }
}

/// Before the product of step `t`: in `outputs [depth, B, width]` the targets of step `t - 1` replace the state before it, in the
/// rows that the teacher draws.
pub(crate) fn teach(plan: &Plan<'_>, teacher: &Teacher, width: usize, outputs: &Tensor, step: Step) -> Result<()> {
    match outputs.device().backend() {
        Backend::Native => {
            let (targets, mut outputs) = (teacher.targets.native::<f32>(), outputs.native_mut::<f32>());
            let (t, before, _) = step;
            for row in (0..plan.rows).filter(|row| teacher.taught(plan, t, *row)) {
                let target = &targets[((t - 1) * plan.rows + row) * width..][..width];
                outputs[(before * plan.rows + row) * width..][..width].copy_from_slice(target);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let lengths = plan.lengths.map_or(&teacher.targets, |lengths| lengths.tensor());
            let bindings = [outputs, lengths, &teacher.targets].map(Tensor::range);
            gpu.launch(&TEACH, &params(plan, width, step, Some(teacher)), &bindings, grid(plan.rows * width))
        }
    }
}

/// After the product, which lies in slot `after` of `outputs [depth, B, width]`: rows past their end hold; y `[T, B, y_stride]`
/// takes the output, zeros past a row's end. `spare` is bound where there are no lengths.
pub(crate) fn output(plan: &Plan<'_>, width: usize, outputs: &Tensor, y: &Tensor, spare: &Tensor, step: Step) -> Result<()> {
    match outputs.device().backend() {
        Backend::Native => {
            let (mut outputs, mut y) = (outputs.native_mut::<f32>(), y.native_mut::<f32>());
            let (t, before, after) = step;
            for row in 0..plan.rows {
                let y = &mut y[(t * plan.rows + row) * plan.y_stride + plan.y_offset..][..width];
                let at = |slot: usize| (slot * plan.rows + row) * width;
                if plan.is_valid(t, row) {
                    y.copy_from_slice(&outputs[at(after)..][..width]);
                } else {
                    y.fill(0.0);
                    outputs.copy_within(at(before)..at(before) + width, at(after));
                }
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let lengths = plan.lengths.map_or(spare, |lengths| lengths.tensor());
            let bindings = [outputs, y, lengths].map(Tensor::range);
            gpu.launch(&OUTPUT, &params(plan, width, step, None), &bindings, grid(plan.rows * width))
        }
    }
}

/// In backward, before the products: `douts[t] = dy[t] + carried` in valid rows, whose `carried [B, width]` becomes zero; in others
/// zero.
pub(crate) fn output_backward(
    plan: &Plan<'_>,
    width: usize,
    dy: &Tensor,
    carried: &Tensor,
    douts: &Tensor,
    spare: &Tensor,
    step: Step,
) -> Result<()> {
    match dy.device().backend() {
        Backend::Native => {
            let (dy, mut carried, mut douts) = (dy.native::<f32>(), carried.native_mut::<f32>(), douts.native_mut::<f32>());
            let (t, ..) = step;
            for row in 0..plan.rows {
                let d = &mut douts[(t * plan.rows + row) * width..][..width];
                if !plan.is_valid(t, row) {
                    d.fill(0.0);
                    continue;
                }
                let dy = &dy[(t * plan.rows + row) * plan.y_stride + plan.y_offset..][..width];
                for ((d, carried), dy) in d.iter_mut().zip(&mut carried[row * width..]).zip(dy) {
                    *d = *carried + dy;
                    *carried = 0.0;
                }
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let lengths = plan.lengths.map_or(spare, |lengths| lengths.tensor());
            let bindings = [dy, lengths, carried, douts].map(Tensor::range);
            gpu.launch(&OUTPUT_BACKWARD, &params(plan, width, step, None), &bindings, grid(plan.rows * width))
        }
    }
}

/// In backward, after the recurrent product: `carried` is zero in rows whose step saw the target.
pub(crate) fn teach_backward(plan: &Plan<'_>, teacher: &Teacher, width: usize, carried: &Tensor, step: Step) -> Result<()> {
    match carried.device().backend() {
        Backend::Native => {
            let mut carried = carried.native_mut::<f32>();
            for row in (0..plan.rows).filter(|row| teacher.taught(plan, step.0, *row)) {
                carried[row * width..][..width].fill(0.0);
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let lengths = plan.lengths.map_or(&teacher.targets, |lengths| lengths.tensor());
            let bindings = [lengths, carried].map(Tensor::range);
            gpu.launch(&TEACH_BACKWARD, &params(plan, width, step, Some(teacher)), &bindings, grid(plan.rows * width))
        }
    }
}
