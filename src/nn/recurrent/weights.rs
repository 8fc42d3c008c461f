//! The parameters of one direction of one layer.

use parking_lot::Mutex;

use super::{Cell, RecurrentConfig};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::cell_contract::Block;
use crate::nn::Param;
use crate::rng::Rng;
use crate::tensor::Tensor;

/// The parameters of one direction of one layer; G gates, H units, R the width of h.
#[derive(Debug)]
pub(super) struct Weights {
    /// [G * H, inputs]
    pub weight_ih: Param,
    /// [G * H, R], where the cell has a product.
    pub weight_hh: Option<Param>,
    /// [G * H]
    pub bias_ih: Option<Param>,
    /// [G * H], where the cell has recurrent biases.
    pub bias_hh: Option<Param>,
    /// The unit's own parameters that are no biases: peepholes [3 * H], the recurrent weights of an IndRNN [H].
    pub extra: Option<Param>,
    /// The output product: [R, H], and perhaps a bias [R].
    pub weight_hr: Option<Param>,
    pub bias_hr: Option<Param>,
    /// Biases and extras in a row, and the sum of the versions that it was made of; zeros for absent biases.
    unit: Mutex<Option<(u64, Tensor)>>,
    /// How often the clip of the recurrent gradient acted, for each unit [H]; where there is a clip.
    pub clipped: Option<Tensor>,
}

impl Weights {
    /// Draws them from U(-1/sqrt(hidden), 1/sqrt(hidden)), extras from their own range if they have one; `suffix` ends their names: `_l0_reverse`.
    pub fn init<C: Cell>(
        config: &RecurrentConfig<C>,
        inputs: usize,
        suffix: &str,
        device: &Device,
        rng: &mut Rng,
    ) -> Result<Self> {
        let (hidden, width) = (config.hidden, config.width());
        // Saturating: a size beyond all memory is refused by the tensor that would have it.
        let gates = C::Pre::LEN.saturating_mul(hidden);
        let bound = 1.0 / (hidden as f32).sqrt();
        let all = (-bound, bound);
        let mut param = |part: &str, (low, high): (f32, f32), shape: &[usize]| {
            let draw = |at: usize| match (rng.uniform(low, high), config.forget_bias) {
                // Of an LSTM's gates i, f, g, o the second.
                (_, Some(bias)) if part.starts_with("bias_") && part != "bias_hr" && at / hidden == 1 => {
                    bias * f32::from(part == "bias_ih")
                }
                (number, _) => number,
            };
            Param::draw(&format!("{part}{suffix}"), device, shape, draw)
        };
        // In PyTorch's order.
        let weight_ih = param("weight_ih", all, &[gates, inputs])?;
        let weight_hh = if C::PRODUCT { Some(param("weight_hh", all, &[gates, width])?) } else { None };
        let bias_ih = if config.bias { Some(param("bias_ih", all, &[gates])?) } else { None };
        let bias_hh = if config.bias && C::BIASES > 0 { Some(param("bias_hh", all, &[gates])?) } else { None };
        let weight_hr = match config.output {
            Some((width, _)) => Some(param("weight_hr", all, &[width, hidden])?),
            None => None,
        };
        let bias_hr = match config.output {
            Some((width, true)) => Some(param("bias_hr", all, &[width])?),
            _ => None,
        };
        let extra = match config.cell.extras() {
            0 => None,
            count => Some(param(C::EXTRA, C::EXTRA_RANGE.unwrap_or(all), &[count * hidden])?),
        };
        let clipped = if config.gradient_clip > 0.0 { Some(Tensor::zeros(device, [hidden])?) } else { None };
        Ok(Self { weight_ih, weight_hh, bias_ih, bias_hh, extra, weight_hr, bias_hr, unit: Mutex::default(), clipped })
    }

    pub fn params(&self) -> impl Iterator<Item = &Param> {
        let optional = [&self.weight_hh, &self.bias_ih, &self.bias_hh, &self.weight_hr, &self.bias_hr, &self.extra];
        std::iter::once(&self.weight_ih).chain(optional.into_iter().flatten())
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        let Self { weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, bias_hr, extra, .. } = self;
        std::iter::once(weight_ih).chain([weight_hh, bias_ih, bias_hh, weight_hr, bias_hr, extra].into_iter().flatten())
    }

    /// I of this layer.
    pub fn inputs(&self) -> usize {
        self.weight_ih.value().shape()[1]
    }

    /// The unit's own parameters `[unit parameters, H]`: recurrent biases, then extras.
    pub fn unit<C: Cell>(&self, cell: &C, hidden: usize) -> Result<Tensor> {
        match (&self.bias_hh, &self.extra) {
            (Some(bias), None) => return Ok(bias.value().clone()),
            (None, Some(extra)) if C::BIASES == 0 => return Ok(extra.value().clone()),
            _ => {}
        }
        let parts = || [&self.bias_hh, &self.extra].into_iter().flatten();
        let version = parts().map(|param| param.version().get()).sum();
        let mut cached = self.unit.lock();
        match &*cached {
            Some((made_of, unit)) if *made_of == version => Ok(unit.clone()),
            _ => {
                // A cell without any parameter still gets something to bind.
                let unit = Tensor::zeros(self.weight_ih.value().device(), [cell.unit_params().max(1) * hidden])?;
                if let Some(bias) = &self.bias_hh {
                    unit.slice(0, [bias.value().len()]).copy_from(bias.value())?;
                }
                if let Some(extra) = &self.extra {
                    unit.slice(C::BIASES * hidden, [extra.value().len()]).copy_from(extra.value())?;
                }
                *cached = Some((version, unit.clone()));
                Ok(unit)
            }
        }
    }
}
