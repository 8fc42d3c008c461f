//! The parameters of one direction of one layer.

use super::{Cell, CellState, RecurrentConfig};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::cell_contract::Block;
use crate::kernels::sweep_step;
use crate::nn::param::CachedCopy;
use crate::nn::{Param, Precision};
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
    /// With layer normalization: gains of the products [G * H]; of c on its way to h, where the cell has one, gain and shift [H].
    pub norm_ih: Option<Param>,
    pub norm_hh: Option<Param>,
    pub norm_c: Option<Param>,
    pub norm_c_bias: Option<Param>,
    /// The state that rows start from, where it is learned: [width] each.
    pub initial: Vec<Param>,
    /// See [`Self::unit`]; zeros for absent biases.
    unit: CachedCopy,
    /// How often the clip of the recurrent gradient acted, for each unit [H]; where there is a clip.
    pub clipped: Option<Tensor>,
}

impl Weights {
    /// Draws them from U(-1/sqrt(hidden), 1/sqrt(hidden)), extras from their own range if they have one, but for gains, which start
    /// at 1, and shifts, at 0; `suffix` ends their names: `_l0_reverse`.
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
        let weight_ih = param("weight_ih", all, &[gates, inputs])?.bounded(config.gradient_clip > 0.0);
        let weight_hh = if C::PRODUCT { Some(param("weight_hh", all, &[gates, width])?) } else { None };
        let bias_ih = if config.bias { Some(param("bias_ih", all, &[gates])?) } else { None };
        let bias_hh = if config.bias && C::BIASES > 0 { Some(param("bias_hh", all, &[gates])?) } else { None };
        let weight_hr = match config.output {
            Some((width, _)) => Some(param("weight_hr", all, &[width, hidden])?),
            None => None,
        };
        let bias_hr = match config.output {
            Some((width, true)) if config.bias => Some(param("bias_hr", all, &[width])?),
            _ => None,
        };
        let extra = match config.cell.extras() {
            0 => None,
            count => Some(param(C::EXTRA, C::EXTRA_RANGE.unwrap_or(all), &[count * hidden])?),
        };
        let constant = |part: &str, len: usize, wanted: bool, value: f32| match wanted {
            true => Param::draw(&format!("{part}{suffix}"), device, [len], |_| value).map(Some),
            false => Ok(None),
        };
        let (norm, state_norm) = (config.layer_norm, config.normalized_output().is_some());
        let (norm_ih, norm_hh) = (constant("norm_ih", gates, norm, 1.0)?, constant("norm_hh", gates, norm, 1.0)?);
        let norm_c = constant("norm_c", hidden, state_norm, 1.0)?;
        let norm_c_bias = constant("norm_c_bias", hidden, state_norm && config.bias, 0.0)?;
        let states = if config.learn_initial_state { C::Value::NAMES } else { &[] };
        let initial = states.iter().enumerate().map(|(s, name)| {
            let width = if s == 0 { width } else { hidden };
            Param::new(format!("initial_{name}{suffix}"), device, &vec![0.0; width], [width])
        });
        let initial = initial.collect::<Result<Vec<_>>>()?;
        let clipped = if config.gradient_clip > 0.0 { Some(Tensor::zeros(device, [hidden])?) } else { None };
        Ok(Self {
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            extra,
            weight_hr,
            bias_hr,
            norm_ih,
            norm_hh,
            norm_c,
            norm_c_bias,
            initial,
            unit: CachedCopy::default(),
            clipped,
        })
    }

    pub fn params(&self) -> impl Iterator<Item = &Param> {
        let optional = [&self.weight_hh, &self.bias_ih, &self.bias_hh, &self.weight_hr, &self.bias_hr, &self.extra];
        let norms = [&self.norm_ih, &self.norm_hh, &self.norm_c, &self.norm_c_bias];
        let optional = optional.into_iter().chain(norms).flatten();
        std::iter::once(&self.weight_ih).chain(optional).chain(&self.initial)
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        let Self { weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, bias_hr, extra, initial, .. } = self;
        let Self { norm_ih, norm_hh, norm_c, norm_c_bias, .. } = self;
        let optional = [weight_hh, bias_ih, bias_hh, weight_hr, bias_hr, extra, norm_ih, norm_hh, norm_c, norm_c_bias];
        std::iter::once(weight_ih).chain(optional.into_iter().flatten()).chain(initial)
    }

    /// Words that its copies hold: of matrices, in the order in which products read them, and [`Self::unit`] where it is one. `split`:
    /// whether more than a product of h and the cell makes a step.
    pub fn copies<C: Cell>(&self, config: &RecurrentConfig<C>, split: bool) -> usize {
        let hidden = config.hidden;
        let len = |param: &Option<Param>| param.as_ref().map_or(0, |param| param.value().len());
        let unit = if self.whole_unit::<C>().is_some() { 0 } else { self.unit_lines(&config.cell) * hidden };
        if config.precision == Precision::Single {
            let weight_hh = match len(&self.weight_hh) {
                0 => 0,
                // DropConnect's products read a copy of their own.
                _ if config.weight_dropout > 0.0 => 0,
                len if split => len,
                _ => sweep_step::forward_weights_len::<C>(hidden),
            };
            return unit + sweep_step::input_weights_len::<C>(hidden, self.inputs()) + weight_hh + len(&self.weight_hr);
        }
        // The matrix in runs of rows, and its transpose.
        let both = |param: &Param, run: Option<usize>| {
            let (value, [rows, cols]) = (param.value(), [param.value().shape()[0], param.value().shape()[1]]);
            let depth = |run: usize| if value.device().is_cpu() { run } else { run.div_ceil(2) };
            let run = run.unwrap_or(rows);
            depth(cols) * rows + rows / run * depth(run) * cols
        };
        let weight_hh = self.weight_hh.as_ref().map_or(0, |param| both(param, Some(hidden)));
        unit + both(&self.weight_ih, None) + weight_hh + self.weight_hr.as_ref().map_or(0, |param| both(param, None))
    }

    /// I of this layer.
    pub fn inputs(&self) -> usize {
        self.weight_ih.value().shape()[1]
    }

    /// The unit's own parameters `[unit parameters, H]`: recurrent biases, then extras; behind them, with layer normalization, what
    /// [`crate::kernels::sweep_rows`] reads there: the gains of the products of h, then gain and shift of c.
    pub fn unit<C: Cell>(&self, cell: &C, hidden: usize) -> Result<Tensor> {
        if let Some(param) = self.whole_unit::<C>() {
            return Ok(param.value().clone());
        }
        self.unit.get(self.unit_version(), || {
            let params = cell.unit_params();
            let unit = Tensor::zeros(self.weight_ih.value().device(), [self.unit_lines(cell) * hidden])?;
            let lines = [0, C::BIASES, params, params + C::Pre::LEN, params + C::Pre::LEN + 1];
            for (line, param) in lines.into_iter().zip(self.unit_parts()) {
                if let Some(param) = param {
                    unit.slice(line * hidden, [param.value().len()]).copy_from(param.value())?;
                }
            }
            Ok(unit)
        })
    }

    /// The parameter that is all of [`Self::unit`], where one is.
    fn whole_unit<C: Cell>(&self) -> Option<&Param> {
        match (&self.bias_hh, &self.extra, &self.norm_hh) {
            (Some(bias), None, None) => Some(bias),
            (None, Some(extra), None) if C::BIASES == 0 => Some(extra),
            _ => None,
        }
    }

    /// A cell without any parameter still gets something to bind.
    fn unit_lines<C: Cell>(&self, cell: &C) -> usize {
        let norms = self.norm_hh.as_ref().map_or(0, |_| C::Pre::LEN) + self.norm_c.as_ref().map_or(0, |_| 2);
        (cell.unit_params() + norms).max(1)
    }

    /// The version of what [`Self::unit`] is made of.
    pub fn unit_version(&self) -> u64 {
        self.unit_parts().into_iter().flatten().map(|param| param.version().get()).sum()
    }

    fn unit_parts(&self) -> [Option<&Param>; 5] {
        [&self.bias_hh, &self.extra, &self.norm_hh, &self.norm_c, &self.norm_c_bias].map(Option::as_ref)
    }
}
