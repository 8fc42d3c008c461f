//! Clipping by global norm and by value, and the optimizers, over the flat parameter arena.

use super::{READ, READ_WRITE, grid, reduce};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Optimizer {
        count: u32,
        learning_rate: f32,
        weight_decay: f32,
        max_norm: f32,
        momentum: f32,
        beta1: f32,
        beta2: f32,
        one_minus_beta1: f32,
        one_minus_beta2: f32,
        epsilon: f32,
        max_value: f32,
        loss_scale: f32,
        growth_interval: u32,
    }
}

/// What the device keeps from step to step; the shader's struct of the same name, zero at the start.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Control {
    pub norm: f32,
    pub scale: f32,
    pub correction1: f32,
    pub correction2: f32,
    pub skip: u32,
    pub steps: u32,
    pub skipped: u32,
    pub clipped: u32,
    pub clipped_values: u32,
    pub values_low: u32,
    pub values_high: u32,
    pub value_steps: u32,
    pub loss_scale: f32,
    pub good_steps: u32,
}

/// The bounds of the loss's scale.
const LEAST_LOSS_SCALE: f32 = 1.0;
pub(crate) const LARGEST_LOSS_SCALE: f32 = 16_777_216.0; // 2^24

impl Optimizer {
    /// What the loss is scaled with; `kept`: [`Control::loss_scale`].
    pub fn present_loss_scale(&self, kept: f32) -> f32 {
        match (self.loss_scale, kept) {
            (0.0, _) => 1.0,
            (initial, 0.0) => initial,
            (_, kept) => kept,
        }
    }
}

impl Control {
    /// Elements clipped by value so far, and the steps that did so, the last one with them.
    pub fn clipped_by_value(&self) -> (u64, u32) {
        let before = u64::from(self.values_high) << 32 | u64::from(self.values_low);
        (before + u64::from(self.clipped_values), self.value_steps + u32::from(self.clipped_values > 0))
    }
}

/// [`Control`] in 32-bit words.
pub(crate) const CONTROL_WORDS: usize = size_of::<Control>() / 4;

pub(crate) static PREPARE: Kernel = Kernel {
    name: "optimizer_prepare",
    source: concat!(
        include_str!("../../shaders/optimizer.wgsl"),
        include_str!("../../shaders/activation.wgsl"),
        include_str!("../../shaders/math.wgsl"),
    ),
    entry: "prepare",
    params: Optimizer::LAYOUT,
    bindings: &[(1, READ_WRITE), (2, READ)],
    workgroup: 1,
    features: &[],
};

pub(crate) static SGD: Kernel = Kernel {
    name: "sgd",
    entry: "sgd",
    bindings: &[(1, READ_WRITE), (3, READ_WRITE), (4, READ_WRITE), (5, READ_WRITE)],
    workgroup: 64,
    features: &[],
    ..PREPARE
};

pub(crate) static ADAMW: Kernel = Kernel {
    name: "adamw",
    entry: "adamw",
    bindings: &[(1, READ_WRITE), (3, READ_WRITE), (4, READ_WRITE), (5, READ_WRITE), (6, READ_WRITE)],
    ..SGD
};

pub(crate) static SCALE_LOSS: Kernel =
    Kernel { name: "scale_loss", entry: "scale_loss", bindings: &[(1, READ_WRITE), (7, READ), (8, READ_WRITE)], ..SGD };

/// The arena: all of the same length, but for the control words.
pub(crate) struct Arena<'a> {
    /// [`Control`], as `u32` words.
    pub control: &'a Tensor,
    pub value: &'a Tensor,
    /// Read, then zeroed.
    pub gradient: &'a Tensor,
    /// Momentum, or Adam's first moment.
    pub first: &'a Tensor,
    /// Adam's second moment; `None` for SGD.
    pub second: Option<&'a Tensor>,
}

/// One step: the gradient's norm, clipping, then AdamW where there is a second moment, else SGD.
pub(crate) fn step(params: &Optimizer, arena: &Arena<'_>) -> Result<()> {
    let squares = reduce::sum_of_squares(arena.gradient)?;
    let Arena { control, value, gradient, first, second } = arena;
    match value.device().backend() {
        Backend::Native => {
            native(params, arena, squares.native::<f32>()[0]);
            Ok(())
        }
        Backend::Gpu(gpu) => {
            gpu.launch(&PREPARE, params, &[control.range(), squares.range()], [1, 1, 1])?;
            let mut bindings = vec![control.range(), value.range(), gradient.range(), first.range()];
            bindings.extend(second.map(Tensor::range));
            let kernel = if second.is_some() { &ADAMW } else { &SGD };
            gpu.launch(kernel, params, &bindings, grid(value.len()))
        }
    }
}

/// A gradient times the present scale of the loss.
pub(crate) fn scale_loss(params: &Optimizer, control: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let scaled = Tensor::uninitialized(dy.device(), dy.shape())?;
    match dy.device().backend() {
        Backend::Native => {
            let words = control.native::<u32>();
            let control: &Control = bytemuck::from_bytes(bytemuck::cast_slice(&words));
            let scale = params.present_loss_scale(control.loss_scale);
            let (dy, mut scaled) = (dy.native::<f32>(), scaled.native_mut::<f32>());
            scaled.iter_mut().zip(dy.iter()).for_each(|(scaled, dy)| *scaled = scale * dy);
        }
        Backend::Gpu(gpu) => {
            let params = Optimizer { count: dy.len() as u32, ..*params };
            gpu.launch(&SCALE_LOSS, &params, &[control.range(), dy.range(), scaled.range()], grid(dy.len()))?;
        }
    }
    Ok(scaled)
}

fn native(p: &Optimizer, arena: &Arena<'_>, squares: f32) {
    let mut words = arena.control.native_mut::<u32>();
    let control: &mut Control = bytemuck::from_bytes_mut(bytemuck::cast_slice_mut(&mut words));
    prepare(p, squares, control);
    let (mut value, mut gradient) = (arena.value.native_mut::<f32>(), arena.gradient.native_mut::<f32>());
    if control.skip == 1 {
        gradient.fill(0.0);
        return;
    }
    let mut first = arena.first.native_mut::<f32>();
    let (scale, mut clipped_values) = (control.scale, 0);
    let mut clipped = |gradient: f32| {
        let scaled = gradient * scale;
        let acts = p.max_value > 0.0 && scaled.abs() > p.max_value;
        clipped_values += u32::from(acts);
        if acts { p.max_value.copysign(scaled) } else { scaled }
    };
    match arena.second {
        None => {
            for ((value, gradient), first) in value.iter_mut().zip(gradient.iter_mut()).zip(first.iter_mut()) {
                let g = clipped(*gradient) + p.weight_decay * *value;
                *gradient = 0.0;
                *first = p.momentum * *first + g;
                *value -= p.learning_rate * *first;
            }
        }
        Some(second) => {
            let mut second = second.native_mut::<f32>();
            let root = control.correction2.sqrt();
            let moments = first.iter_mut().zip(second.iter_mut());
            for ((value, gradient), (m, v)) in value.iter_mut().zip(gradient.iter_mut()).zip(moments) {
                let g = clipped(*gradient);
                *gradient = 0.0;
                *m = p.beta1 * *m + p.one_minus_beta1 * g;
                *v = p.beta2 * *v + p.one_minus_beta2 * g * g;
                let decayed = *value - p.learning_rate * p.weight_decay * *value;
                *value = decayed - p.learning_rate / control.correction1 * *m / (v.sqrt() / root + p.epsilon);
            }
        }
    }
    control.clipped_values = clipped_values;
}

fn prepare(p: &Optimizer, squares: f32, control: &mut Control) {
    let (values, steps) = control.clipped_by_value();
    (control.values_low, control.values_high) = (values as u32, (values >> 32) as u32);
    (control.value_steps, control.clipped_values) = (steps, 0);
    let loss_scale = p.present_loss_scale(control.loss_scale);
    control.norm = squares.sqrt() / loss_scale;
    control.scale = 1.0 / loss_scale;
    control.skip = u32::from(!squares.is_finite());
    if control.skip == 1 {
        control.skipped += 1;
        if p.loss_scale > 0.0 {
            control.loss_scale = LEAST_LOSS_SCALE.max(loss_scale / 2.0);
            control.good_steps = 0;
        }
        return;
    }
    if p.loss_scale > 0.0 {
        control.loss_scale = loss_scale;
        control.good_steps += 1;
        if control.good_steps >= p.growth_interval {
            control.loss_scale = LARGEST_LOSS_SCALE.min(loss_scale * 2.0);
            control.good_steps = 0;
        }
    }
    if p.max_norm > 0.0 && control.norm > p.max_norm {
        control.scale = p.max_norm / (control.norm + 1e-6) / loss_scale; // PyTorch's guard
        control.clipped += 1;
    }
    control.steps += 1;
    control.correction1 = p.beta1 * control.correction1 + p.one_minus_beta1;
    control.correction2 = p.beta2 * control.correction2 + p.one_minus_beta2;
}
