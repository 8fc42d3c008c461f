//! Optimizers over one flat arena of parameters: a step is a few launches, whatever the number of parameters.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::optimizer::{self, Arena, CONTROL_WORDS, Control, LARGEST_LOSS_SCALE};
use crate::nn::Param;
use crate::tensor::{ALIGNMENT, Tensor};

/// Stochastic gradient descent with momentum, in PyTorch's form: `v = momentum v + g + weight_decay w`, `w -= rate v`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Sgd {
    learning_rate: f64,
    momentum: f64,
    weight_decay: f64,
}

impl Sgd {
    /// Without momentum or decay.
    pub fn new(learning_rate: f64) -> Self {
        Self { learning_rate, momentum: 0.0, weight_decay: 0.0 }
    }

    /// The share of the last step's velocity that is kept.
    pub fn momentum(self, momentum: f64) -> Self {
        Self { momentum, ..self }
    }

    /// L2 penalty: this times the value is added to the gradient.
    pub fn weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay, ..self }
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter 2019), with PyTorch's defaults:
/// betas 0.9 and 0.999, epsilon 1e-8, weight decay 0.01.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdamW {
    learning_rate: f64,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

impl AdamW {
    /// With PyTorch's defaults for everything else.
    pub fn new(learning_rate: f64) -> Self {
        Self { learning_rate, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.01 }
    }

    /// Decay rates of the two moments.
    pub fn betas(self, first: f64, second: f64) -> Self {
        Self { betas: (first, second), ..self }
    }

    /// Added to the denominator.
    pub fn epsilon(self, epsilon: f64) -> Self {
        Self { epsilon, ..self }
    }

    /// Each step, values shrink by this times the learning rate.
    pub fn weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay, ..self }
    }
}

/// How parameters follow their gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Rule {
    /// Stochastic gradient descent with momentum.
    Sgd(Sgd),
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
}

impl From<Sgd> for Rule {
    fn from(rule: Sgd) -> Self {
        Rule::Sgd(rule)
    }
}

impl From<AdamW> for Rule {
    fn from(rule: AdamW) -> Self {
        Rule::AdamW(rule)
    }
}

impl Rule {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Rule::Sgd(_) => "sgd",
            Rule::AdamW(_) => "adamw",
        }
    }

    fn learning_rate_mut(&mut self) -> &mut f64 {
        match self {
            Rule::Sgd(rule) => &mut rule.learning_rate,
            Rule::AdamW(rule) => &mut rule.learning_rate,
        }
    }

    fn check(&self, max_norm: Option<f64>, max_value: Option<f64>) -> Result<()> {
        // As the kernels see it: in f32 a tiny number may be 0 and a large one infinite.
        let finite = |value: f64| value >= 0.0 && (value as f32).is_finite();
        let positive = |value: f64| finite(value) && value as f32 > 0.0;
        let share = |value: f64| (0.0..1.0).contains(&value);
        let checks = match *self {
            Rule::Sgd(Sgd { learning_rate, momentum, weight_decay }) => vec![
                ("learning_rate", learning_rate, finite(learning_rate)),
                ("momentum", momentum, share(momentum)),
                ("weight_decay", weight_decay, finite(weight_decay)),
            ],
            Rule::AdamW(AdamW { learning_rate, betas, epsilon, weight_decay }) => vec![
                ("learning_rate", learning_rate, finite(learning_rate)),
                ("beta1", betas.0, share(betas.0)),
                ("beta2", betas.1, share(betas.1)),
                ("epsilon", epsilon, positive(epsilon)),
                ("weight_decay", weight_decay, finite(weight_decay)),
            ],
        };
        for (name, value, good) in checks {
            if !good {
                let expected = match name {
                    "momentum" | "beta1" | "beta2" => "in [0, 1)",
                    "epsilon" => "finite and positive",
                    _ => "finite and not negative",
                };
                return Err(Error::argument(self.name(), name, value, expected));
            }
        }
        for (op, name, limit) in [("clip_grad_norm", "max_norm", max_norm), ("clip_grad_value", "limit", max_value)] {
            if let Some(limit) = limit.filter(|limit| !positive(*limit)) {
                return Err(Error::argument(op, name, limit, "finite and positive"));
            }
        }
        Ok(())
    }
}

/// Dynamic scaling of the loss (Micikevicius et al. 2018, "Mixed Precision Training"), for layers of
/// [`Precision::Half`](crate::nn::Precision::Half), whose gradients may be too small for binary16.
///
/// The gradients that go backward are those of the loss times a scale, a power of two. A step unscales them before it clips, so that
/// norms, limits and rates mean what they mean without it. A gradient that is not finite changes nothing, is counted in
/// [`Stats::skipped`], and halves the scale, not below 1; after an interval of steps without one the scale doubles, not beyond 2^24. The
/// scale lives on the device, and in a trainer's checkpoint.
///
/// Until a step, [`Param::grad`] holds scaled gradients, and what [`Param::accumulate`] adds to them is unscaled with them: it has to be
/// scaled too ([`Optimizer::scale_loss`]).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LossScale {
    initial: f64,
    growth_interval: u32,
}

impl LossScale {
    /// From 2^16, doubled after 2000 steps without a gradient that is not finite.
    pub fn dynamic() -> Self {
        Self { initial: 65_536.0, growth_interval: 2000 }
    }

    /// The scale to start with, a power of two from 1 to 2^24.
    pub fn initial(self, scale: f64) -> Self {
        Self { initial: scale, ..self }
    }

    /// Steps without a gradient that is not finite after which the scale doubles, at least 1.
    pub fn growth_interval(self, steps: u32) -> Self {
        Self { growth_interval: steps, ..self }
    }

    fn check(self) -> Result<()> {
        let Self { initial, growth_interval } = self;
        if !((1.0..=f64::from(LARGEST_LOSS_SCALE)).contains(&initial) && initial.log2().fract() == 0.0) {
            return Err(Error::argument("loss_scaling", "initial", initial, "a power of two from 1 to 2^24"));
        }
        if growth_interval == 0 {
            return Err(Error::argument("loss_scaling", "growth_interval", growth_interval, "at least 1"));
        }
        Ok(())
    }
}

/// What an optimizer has done so far.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Steps that changed the parameters.
    pub steps: u32,
    /// Steps that were skipped because their gradient was not finite.
    pub skipped: u32,
    /// Steps whose gradient was clipped by its norm.
    pub clipped: u32,
    /// Steps in which an element of the gradient was clipped by value.
    pub value_clipped: u32,
    /// Elements that were clipped by value, in all steps together.
    pub clipped_values: u64,
    /// Global norm of the last gradient, before clipping.
    pub grad_norm: f32,
    /// What the next gradient is scaled with; 1 without [`Optimizer::loss_scaling`].
    pub loss_scale: f32,
}

/// A rule at work on a fixed set of parameters, whose values and gradients it has moved into one arena.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    max_norm: Option<f64>,
    max_value: Option<f64>,
    loss_scale: Option<LossScale>,
    /// A parameter of a layer that bounds gradients on their way back.
    bounded: Option<String>,
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Option<Tensor>,
    control: Tensor,
    /// Name, offset in the arena, shape and version of each parameter.
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    offset: usize,
    shape: Vec<usize>,
    version: crate::nn::Version,
}

impl Optimizer {
    /// Moves the parameters into an arena. Their tensors from before no longer follow them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a rate or decay out of range, no parameters, or two of one name;
    /// [`crate::ErrorKind::DeviceMismatch`]; [`crate::ErrorKind::Limit`] or [`crate::ErrorKind::OutOfMemory`] when the arena does not fit.
    pub fn new(rule: impl Into<Rule>, params: Vec<(String, &mut Param)>) -> Result<Self> {
        let rule = rule.into();
        rule.check(None, None)?;
        let Some(device) = params.first().map(|(_, param)| param.value().device().clone()) else {
            return Err(Error::argument("Optimizer.new", "params", "empty", "at least one parameter"));
        };
        let mut length = 0;
        let mut slots: Vec<Slot> = Vec::new();
        for (name, param) in &params {
            device.expect_same("Optimizer.new", name, param.value().device())?;
            if slots.iter().any(|slot| slot.name == *name) {
                return Err(Error::argument("Optimizer.new", "params", format!("{name} twice"), "distinct names"));
            }
            let (version, shape) = (param.version().clone(), param.value().shape().to_vec());
            slots.push(Slot { name: name.clone(), offset: length, shape, version });
            length += param.value().len().next_multiple_of(ALIGNMENT);
        }
        let arena = || Tensor::zeros(&device, [length]);
        let second = if matches!(rule, Rule::AdamW(_)) { Some(arena()?) } else { None };
        let control = Tensor::zeros(&device, [CONTROL_WORDS])?;
        let bounded = params.iter().find(|(_, param)| param.is_bounded()).map(|(name, _)| name.clone());
        let optimizer = Self {
            rule,
            max_norm: None,
            max_value: None,
            loss_scale: None,
            bounded,
            value: arena()?,
            gradient: arena()?,
            first: arena()?,
            second,
            control,
            slots,
        };
        for ((_, param), slot) in params.into_iter().zip(&optimizer.slots) {
            let part = |arena: &Tensor| arena.slice(slot.offset, slot.shape.clone());
            param.relocate(part(&optimizer.value), part(&optimizer.gradient))?;
        }
        Ok(optimizer)
    }

    /// Scale each gradient down to this global norm where it is larger (Pascanu et al. 2013).
    pub fn clip_grad_norm(self, max_norm: f64) -> Self {
        Self { max_norm: Some(max_norm), ..self }
    }

    /// Keep each element of each gradient within `[-limit, limit]`. Beside [`Optimizer::clip_grad_norm`] it comes second, as PyTorch's
    /// `clip_grad_value_` after `clip_grad_norm_`: both bounds hold then, and [`Stats::grad_norm`] is that of the gradient as it was.
    pub fn clip_grad_value(self, limit: f64) -> Self {
        Self { max_value: Some(limit), ..self }
    }

    /// Take the gradients for those of the loss times a scale: see [`LossScale`]. [`Optimizer::scale_loss`] makes them that.
    pub fn loss_scaling(self, loss_scale: LossScale) -> Self {
        Self { loss_scale: Some(loss_scale), ..self }
    }

    /// For a training loop of one's own: the gradient dy of the loss by a model's output, times the present scale, which only a step
    /// changes; what all backward passes up to the next step start from. Without [`Optimizer::loss_scaling`] it is dy.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a scale out of range; [`crate::ErrorKind::Unsupported`] where a layer has a
    /// `gradient_clip`, whose limit would meet scaled gradients; [`crate::ErrorKind::DeviceMismatch`]; what the device reports.
    pub fn scale_loss(&self, dy: &Tensor) -> Result<Tensor> {
        self.device().expect_same("Optimizer.scale_loss", "dy", dy.device())?;
        if self.loss_scale.is_none() {
            return Ok(dy.clone());
        }
        self.check_loss_scale("Optimizer.scale_loss")?;
        optimizer::scale_loss(&self.params(), &self.control, dy)
    }

    fn check_loss_scale(&self, op: &str) -> Result<()> {
        let Some(loss_scale) = self.loss_scale else { return Ok(()) };
        loss_scale.check()?;
        match &self.bounded {
            Some(name) => Err(Error::unsupported(
                op,
                format!("loss_scaling with gradient_clip in the layer of {name}, whose limit would meet scaled gradients"),
            )),
            None => Ok(()),
        }
    }

    /// For schedules: the rate of the next step.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        *self.rule.learning_rate_mut() = learning_rate;
    }

    /// Moves every parameter along its gradient and zeroes the gradients. A gradient that is not finite changes nothing
    /// and is counted. Queues up like every operation: [`Device::submit`] hands it to the GPU.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a learning rate, a bound of the gradient or a scale out of range;
    /// [`crate::ErrorKind::Unsupported`] as for [`Optimizer::scale_loss`]; what the device reports.
    pub fn step(&mut self) -> Result<()> {
        self.rule.check(self.max_norm, self.max_value)?;
        self.check_loss_scale("Optimizer.step")?;
        let Self { control, value, gradient, first, second, .. } = &*self;
        optimizer::step(&self.params(), &Arena { control, value, gradient, first, second: second.as_ref() })?;
        self.slots.iter().for_each(|slot| slot.version.advance());
        Ok(())
    }

    /// What the kernels are told.
    fn params(&self) -> optimizer::Optimizer {
        let length = self.value.len() as u32;
        let mut params = optimizer::Optimizer {
            count: length,
            learning_rate: 0.0,
            weight_decay: 0.0,
            max_norm: self.max_norm.unwrap_or(0.0) as f32,
            momentum: 0.0,
            beta1: 0.0,
            beta2: 0.0,
            one_minus_beta1: 1.0,
            one_minus_beta2: 1.0,
            epsilon: 0.0,
            max_value: self.max_value.unwrap_or(0.0) as f32,
            loss_scale: self.loss_scale.map_or(0.0, |scale| scale.initial) as f32,
            growth_interval: self.loss_scale.map_or(0, |scale| scale.growth_interval),
        };
        match self.rule {
            Rule::Sgd(rule) => {
                params.learning_rate = rule.learning_rate as f32;
                params.weight_decay = rule.weight_decay as f32;
                params.momentum = rule.momentum as f32;
            }
            Rule::AdamW(rule) => {
                params.learning_rate = rule.learning_rate as f32;
                params.weight_decay = rule.weight_decay as f32;
                (params.beta1, params.beta2) = (rule.betas.0 as f32, rule.betas.1 as f32);
                (params.one_minus_beta1, params.one_minus_beta2) = ((1.0 - rule.betas.0) as f32, (1.0 - rule.betas.1) as f32);
                params.epsilon = rule.epsilon as f32;
            }
        }
        params
    }

    /// What was done so far. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn stats(&self) -> Result<Stats> {
        let words: Vec<u32> = self.control.read_back()?;
        let control: &Control = bytemuck::from_bytes(bytemuck::cast_slice(&words));
        let Control { steps, skipped, clipped, norm, .. } = *control;
        let (clipped_values, value_clipped) = control.clipped_by_value();
        let loss_scale = self.params().present_loss_scale(control.loss_scale);
        Ok(Stats { steps, skipped, clipped, value_clipped, clipped_values, grad_norm: norm, loss_scale })
    }

    /// Where the parameters live.
    pub fn device(&self) -> &Device {
        self.value.device()
    }

    pub(crate) fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Everything beside the values that a resumed run needs: names, shapes and tensors.
    pub(crate) fn moments(&self) -> Vec<(String, Tensor)> {
        let mut parts = Vec::new();
        for (kind, arena) in [("first", Some(&self.first)), ("second", self.second.as_ref())] {
            for (slot, arena) in self.slots.iter().zip(arena.into_iter().cycle()) {
                parts.push((format!("optimizer.{kind}.{}", slot.name), arena.slice(slot.offset, slot.shape.clone())));
            }
        }
        parts
    }

    pub(crate) fn control_words(&self) -> Result<Vec<u32>> {
        self.control.read_back()
    }

    pub(crate) fn set_control_words(&self, words: &[u32]) -> Result<()> {
        self.control.write(words)
    }
}
