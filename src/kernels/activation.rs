//! Activations of gates: `shaders/activation.wgsl` in Rust.

use super::math::{self, Apart, Fusion, Lanes};

/// A function of one number, as ONNX's recurrent operators name and define them.
///
/// Alphas and betas must be finite and such that the value tells the slope: see each.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `tanh x`
    Tanh,
    /// `max(0, x)`
    Relu,
    /// `max(0, min(1, alpha x + beta))`; ONNX takes 0.2 and 0.5
    HardSigmoid {
        /// The slope.
        alpha: f32,
        /// The value at 0.
        beta: f32,
    },
    /// `x / (1 + |x|)`
    Softsign,
    /// `x`, for `x < 0`: `alpha x`; alpha above 0 (with 0 it is [`Activation::Relu`])
    LeakyRelu {
        /// The slope on the left.
        alpha: f32,
    },
    /// `x`, for `x < 0`: `alpha (e^x - 1)`; alpha above 0
    Elu {
        /// The limit on the left, with its sign changed.
        alpha: f32,
    },
    /// `log(1 + e^x)`
    Softplus,
    /// `alpha tanh(beta x)`; alpha not 0
    ScaledTanh {
        /// The limit on the right.
        alpha: f32,
        /// What x is multiplied with.
        beta: f32,
    },
    /// `alpha x + beta`
    Affine {
        /// The slope.
        alpha: f32,
        /// The value at 0.
        beta: f32,
    },
    /// `x`, for `x <= alpha`: 0; alpha at least 0
    ThresholdedRelu {
        /// The threshold.
        alpha: f32,
    },
}

/// `(kind, alpha, beta)` as the shader takes them.
pub(crate) type Constants = [f64; 3];

impl Activation {
    pub(crate) fn constants(self) -> Constants {
        let (kind, alpha, beta) = match self {
            Activation::Sigmoid => (0, 0.0, 0.0),
            Activation::Tanh => (1, 0.0, 0.0),
            Activation::Relu => (2, 0.0, 0.0),
            Activation::HardSigmoid { alpha, beta } => (3, alpha, beta),
            Activation::Softsign => (4, 0.0, 0.0),
            Activation::LeakyRelu { alpha } => (5, alpha, 0.0),
            Activation::Elu { alpha } => (6, alpha, 0.0),
            Activation::Softplus => (7, 0.0, 0.0),
            Activation::ScaledTanh { alpha, beta } => (8, alpha, beta),
            Activation::Affine { alpha, beta } => (9, alpha, beta),
            Activation::ThresholdedRelu { alpha } => (10, alpha, 0.0),
        };
        [f64::from(kind), f64::from(alpha), f64::from(beta)]
    }

    /// What is wrong with its numbers, if anything.
    pub(crate) fn check(self) -> Result<(), &'static str> {
        let [_, alpha, beta] = self.constants();
        match self {
            _ if !alpha.is_finite() || !beta.is_finite() => Err("finite alpha and beta"),
            Activation::ThresholdedRelu { .. } if alpha < 0.0 => Err("alpha of at least 0"),
            Activation::LeakyRelu { .. } | Activation::Elu { .. } if alpha <= 0.0 => Err("alpha above 0"),
            Activation::ScaledTanh { .. } if alpha == 0.0 => Err("alpha other than 0"),
            _ => Ok(()),
        }
    }

    /// Its value of every lane.
    #[inline(always)]
    pub(crate) fn apply<F: Fusion>(self, x: Lanes) -> Lanes {
        match self {
            Activation::Sigmoid => x.sigmoid::<F>(),
            Activation::Tanh => x.tanh::<F>(),
            Activation::Relu => x.map(|x| if x < 0.0 { 0.0 } else { x }),
            _ => self.apply_rare(x),
        }
    }

    /// The others. A call: inlined, all of them would stand in each gate of each cell, for every instruction set.
    #[inline(never)]
    fn apply_rare(self, x: Lanes) -> Lanes {
        match self {
            Activation::Sigmoid | Activation::Tanh | Activation::Relu => unreachable!("inlined by apply"),
            Activation::HardSigmoid { alpha, beta } => x.map(|x| {
                let y = alpha * x + beta;
                let y = if y > 1.0 { 1.0 } else { y };
                if y < 0.0 { 0.0 } else { y }
            }),
            Activation::Softsign => x.map(|x| x / (1.0 + x.abs())),
            Activation::LeakyRelu { alpha } => x.map(|x| if x < 0.0 { alpha * x } else { x }),
            Activation::Elu { alpha } => x.map(|x| if x < 0.0 { alpha * (math::exp::<Apart>(x) - 1.0) } else { x }),
            Activation::Softplus => x.map(|x| if x < 0.0 { 0.0 } else { x } + math::log(1.0 + math::exp::<Apart>(-x.abs()))),
            Activation::ScaledTanh { alpha, beta } => x.map(|x| alpha * math::tanh::<Apart>(beta * x)),
            Activation::Affine { alpha, beta } => x.map(|x| alpha * x + beta),
            Activation::ThresholdedRelu { alpha } => x.map(|x| if x <= alpha { 0.0 } else { x }),
        }
    }

    /// The slope where the activation has the value y.
    #[inline(always)]
    pub(crate) fn slope(self, y: Lanes) -> Lanes {
        match self {
            Activation::Sigmoid => y.map(|y| y * (1.0 - y)),
            Activation::Tanh => y.map(|y| 1.0 - y * y),
            Activation::Relu => y.map(|y| if y > 0.0 { 1.0 } else { 0.0 }),
            _ => self.slope_rare(y),
        }
    }

    #[inline(never)]
    fn slope_rare(self, y: Lanes) -> Lanes {
        match self {
            Activation::Sigmoid | Activation::Tanh | Activation::Relu => unreachable!("inlined by slope"),
            Activation::HardSigmoid { alpha, .. } => y.map(|y| if y > 0.0 && y < 1.0 { alpha } else { 0.0 }),
            Activation::Softsign => y.map(|y| (1.0 - y.abs()) * (1.0 - y.abs())),
            Activation::LeakyRelu { alpha } => y.map(|y| if y < 0.0 { alpha } else { 1.0 }),
            Activation::Elu { alpha } => y.map(|y| if y < 0.0 { y + alpha } else { 1.0 }),
            Activation::Softplus => y.map(|y| 1.0 - math::exp::<Apart>(-y)),
            Activation::ScaledTanh { alpha, beta } => y.map(|y| beta * (alpha - y * (y / alpha))),
            Activation::Affine { alpha, .. } => Lanes::splat(alpha),
            Activation::ThresholdedRelu { .. } => y.map(|y| if y != 0.0 { 1.0 } else { 0.0 }),
        }
    }

    /// The slope of the activation behind [`clip_to`]: none where the value is that of a bound.
    #[inline(always)]
    pub(crate) fn clipped_slope<F: Fusion>(self, limit: f32, y: Lanes) -> Lanes {
        if limit == 0.0 { self.slope(y) } else { self.slope_behind::<F>(limit, y) }
    }

    #[inline(always)]
    fn slope_behind<F: Fusion>(self, limit: f32, y: Lanes) -> Lanes {
        let mut limits = [limit; Lanes::COUNT];
        limits[0] = -limit;
        let [low, high, ..] = self.apply::<F>(Lanes::from_array(limits)).to_array();
        self.slope(y) * y.map(|y| if y == low || y == high { 0.0 } else { 1.0 })
    }
}

/// x in `[-limit, limit]`, NaN as it is; a limit of 0 stands for none.
#[inline(always)]
pub(crate) fn clip_to(limit: f32, x: Lanes) -> Lanes {
    if limit == 0.0 {
        return x;
    }
    x.map(|x| {
        let y = if x > limit { limit } else { x };
        if x < -limit { -limit } else { y }
    })
}
