//! The next token of every row, chosen on the device: a decode loop reads nothing back before its end.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{READ, READ_WRITE, math, row_groups};
use crate::backend::native::{for_parts, threads};
use crate::backend::{Kernel, params};
use crate::device::{Backend, Device};
use crate::error::{Error, Result};
use crate::rng::{MaskKey, philox};
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Sample {
        rows: u32, vocabulary: u32, step: u32, sampling: u32, top_k: u32, pad: u32, end: u32,
        temperature: f32, inverse: f32, key0: u32, key1: u32,
    }
}

pub(crate) static SAMPLE: Kernel = Kernel {
    name: "sample",
    source: concat!(
        include_str!("../../shaders/sample.wgsl"),
        include_str!("../../shaders/math.wgsl"),
        include_str!("../../shaders/rng.wgsl")
    ),
    entry: "sample",
    params: Sample::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE), (3, READ_WRITE), (4, READ_WRITE), (5, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// How a token is chosen from its row's logits.
///
/// A logit of -inf is never drawn beside a finite one; where the largest is infinite, its first place is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Choice {
    /// The first maximum.
    #[default]
    Greedy,
    /// Token v with probability `softmax(z / temperature)[v]`, by the Gumbel-max trick (Gumbel, "Statistical Theory of
    /// Extreme Values", 1954; Maddison, Tarlow, Minka, "A* Sampling", NeurIPS 2014): the maximum of `z / temperature + g`,
    /// `g` being noise that is a function of the key, the step, the row and the token. Devices differ in a draw only where
    /// two tokens are as close as rounding.
    Draw {
        /// From 1e-6 to 1e6: below 1 the likely tokens become likelier, above 1 rarer ones do.
        temperature: f32,
        /// Only this many of the largest logits take part, of equal ones the lower ids (Fan, Lewis, Dauphin, "Hierarchical
        /// Neural Story Generation", ACL 2018); at least 1.
        top_k: Option<u32>,
        /// Names the noise.
        key: MaskKey,
    },
}

/// The temperatures for which nothing overflows.
const TEMPERATURES: std::ops::RangeInclusive<f32> = 1e-6..=1e6;

impl Choice {
    /// `op: temperature is 0, expected ..`, for callers of [`sample`].
    pub(crate) fn check(&self, op: &str) -> Result<()> {
        let Self::Draw { temperature, top_k, .. } = self else { return Ok(()) };
        if !TEMPERATURES.contains(temperature) {
            let expected = format!("from {:e} to {:e}", TEMPERATURES.start(), TEMPERATURES.end());
            return Err(Error::argument(op, "temperature", temperature, expected));
        }
        match top_k {
            Some(0) => Err(Error::argument(op, "top_k", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

/// Tokens that mean something to a decode loop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marks {
    /// What a stopped row emits.
    pub pad: u32,
    /// What stops a row.
    pub end: Option<u32>,
}

/// What a decode loop over B rows has emitted: all of `u32`, on the device, without a copy on the host.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// `[steps, B]`; rows past the last step hold anything.
    pub ids: Tensor,
    /// `[B]`: the last step's tokens, which the next step's [`super::gather::gather`] takes for indices. (A row of `ids` lies
    /// at an offset that no device must allow a binding to have.)
    pub last: Tensor,
    /// `[B]`: [`RUNNING`], [`ENDED`] or [`NOT_A_NUMBER`].
    pub stopped: Tensor,
    /// `[B]`: tokens emitted, the end counted, padding not. Where NaN stopped a row, the step at which it did.
    pub lengths: Tensor,
}

/// The row goes on.
pub(crate) const RUNNING: u32 = 0;
/// The row has emitted the end.
pub(crate) const ENDED: u32 = 1;
/// A logit of the row was NaN: the row emits padding from there on, and whoever reads `stopped` must call that an error.
pub(crate) const NOT_A_NUMBER: u32 = 2;

impl Decoded {
    /// Before the first of at most `steps` steps, which begins from the tokens `start [B]`.
    pub fn new(device: &Device, steps: usize, start: &[u32]) -> Result<Self> {
        let rows = start.len();
        Ok(Self {
            ids: Tensor::uninitialized(device, [steps, rows])?,
            last: Tensor::upload("decode", device, start, vec![rows])?,
            stopped: Tensor::zeros(device, [rows])?,
            lengths: Tensor::zeros(device, [rows])?,
        })
    }
}

/// Chooses the token of step `step` of every row from `logits [B, V]`: into row `step` of `to.ids` and into `to.last`, with
/// `to.stopped` and `to.lengths` brought up to date. A row that has stopped emits padding.
pub(crate) fn sample(logits: &Tensor, to: &Decoded, step: usize, marks: Marks, choice: &Choice) -> Result<()> {
    let rows = to.last.len();
    let vocabulary = logits.len() / rows;
    debug_assert!((step + 1) * rows <= to.ids.len(), "step {step} of ids {:?}", to.ids.shape());
    debug_assert!(choice.check("sample").is_ok(), "{choice:?}");
    let (sampling, temperature, top_k, [key0, key1]) = match *choice {
        Choice::Greedy => (0, 1.0, None, [0; 2]),
        Choice::Draw { temperature, top_k, key } => (1, temperature, top_k, key.words()),
    };
    let params = Sample {
        rows: rows as u32,
        vocabulary: vocabulary as u32,
        step: step as u32,
        sampling,
        top_k: top_k.unwrap_or(u32::MAX),
        pad: marks.pad,
        end: marks.end.unwrap_or(u32::MAX),
        temperature,
        inverse: 1.0 / temperature,
        key0,
        key1,
    };
    match logits.device().backend() {
        Backend::Native => {
            let (logits, mut ids) = (logits.native::<f32>(), to.ids.native_mut::<u32>());
            let (mut last, mut stopped) = (to.last.native_mut::<u32>(), to.stopped.native_mut::<u32>());
            let mut lengths = to.lengths.native_mut::<u32>();
            // A row's token; for NaN the largest number, which no token is.
            let chosen: Vec<AtomicU32> = (0..rows).map(|_| AtomicU32::new(params.pad)).collect();
            let running: Vec<bool> = stopped.iter().map(|state| *state == RUNNING).collect();
            // Below that, starting threads takes longer than the work.
            const LEAST: usize = 1 << 15;
            for_parts(rows, threads().min(logits.len().div_ceil(LEAST)), |first, count| {
                for row in (first..first + count).filter(|row| running[*row]) {
                    let token = params.choose(row as u32, &logits[row * vocabulary..][..vocabulary]);
                    chosen[row].store(token.unwrap_or(u32::MAX), Ordering::Relaxed);
                }
            });
            for (row, token) in chosen.into_iter().map(AtomicU32::into_inner).enumerate() {
                let nan = running[row] && token == u32::MAX;
                if nan {
                    stopped[row] = NOT_A_NUMBER;
                } else if running[row] {
                    lengths[row] += 1;
                    stopped[row] = if token == params.end { ENDED } else { RUNNING };
                }
                let token = if nan { params.pad } else { token };
                ids[step * rows + row] = token;
                last[row] = token;
            }
            Ok(())
        }
        Backend::Gpu(gpu) => {
            let bindings = [logits.range(), to.ids.range(), to.last.range(), to.stopped.range(), to.lengths.range()];
            gpu.launch(&SAMPLE, &params, &bindings, row_groups(rows))
        }
    }
}

impl Sample {
    /// The token of a row; `None` where a logit is NaN.
    fn choose(&self, row: u32, logits: &[f32]) -> Option<u32> {
        let (mut top, mut highest) = (0, f32::NEG_INFINITY);
        for (id, z) in logits.iter().enumerate() {
            if z.is_nan() {
                return None;
            }
            if *z > highest {
                (top, highest) = (id as u32, *z);
            }
        }
        if self.sampling == 0 || highest.is_infinite() {
            return Some(top);
        }
        let mut least = 0;
        if (self.top_k as usize) < logits.len() {
            let mut pairs: Vec<u64> = (0..).zip(logits).map(|(id, z)| pair(*z, id)).collect();
            let place = pairs.len() - self.top_k as usize;
            least = *pairs.select_nth_unstable(place).1;
        }
        // What lies further below cannot win: the noise is between -3.2 and 22.9.
        let reached = highest - 32.0 * self.temperature;
        let mut chosen = (f32::NEG_INFINITY, top);
        for (id, z) in (0..).zip(logits) {
            if *z >= reached && pair(*z, id) >= least {
                let score = (z - highest) * self.inverse + self.gumbel(row, id);
                if score > chosen.0 {
                    chosen = (score, id);
                }
            }
        }
        Some(chosen.1)
    }

    /// `-log(-log(u))` for a u that lies evenly between 0 and 1.
    fn gumbel(&self, row: u32, token: u32) -> f32 {
        const UNIT: f32 = 1.0 / 4_294_967_296.0;
        // "samp": other draws of the same key are other draws.
        const DOMAIN: u32 = 0x7361_6d70;
        let [bits, ..] = philox([self.key0, self.key1], [token, row, self.step, DOMAIN]);
        // The winners are those whose u is close to 1: from the other end, where numbers are dense. -log(1 - x) is a sum there.
        let x = (bits as f32 + 0.5) * UNIT;
        let near = x * (1.0 + x * (0.5 + x * (1.0 / 3.0 + x * (0.25 + x * (0.2 + x * (1.0 / 6.0))))));
        let far = -math::log((!bits as f32 + 0.5) * UNIT);
        -math::log(if x < 0.0625 { near } else { far })
    }
}

/// An integer for a logit, no NaN, and its id: in the order of the logits, of equal ones the lower id is the larger.
fn pair(z: f32, id: u32) -> u64 {
    // Adding 0 turns -0 into 0.
    let bits = (z + 0.0).to_bits();
    let image = if bits >> 31 == 1 { !bits } else { bits | (1 << 31) };
    (u64::from(image) << 32) | u64::from(!id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_choices_are_refused() {
        let draw = |temperature, top_k| Choice::Draw { temperature, top_k, key: MaskKey::new(0, 0) };
        let text = |choice: Choice| choice.check("decode").err().map(|error| error.to_string());
        for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-7, 1e7] {
            let expected = format!("decode: temperature is {temperature}, expected from 1e-6 to 1e6");
            assert_eq!(text(draw(temperature, None)), Some(expected));
        }
        assert_eq!(text(draw(1.0, Some(0))), Some("decode: top_k is 0, expected at least 1".into()));
        for choice in [Choice::Greedy, draw(1e-6, Some(1)), draw(1e6, Some(u32::MAX)), draw(1.0, None)] {
            assert_eq!(text(choice), None, "{choice:?}");
        }
    }
}
