//! How gradients flow back through time: norms at every step, and the spectral radii of the recurrent weights.

use super::inspect::{NonFinite, Quantity, first_in_step, pass_direction};
use super::{Cell, CellState, Direction, Gradients, Pass, Recurrent, RecurrentTape};
use crate::error::{Error, Result};
use crate::kernels::cell_contract::Block;
use crate::kernels::gemm;
use crate::tensor::Tensor;

/// What a state's gradient does on its way back through a sequence: the rule of [`StateFlow::verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// It shrinks to less than a thousandth: what lies far back is not learned (Hochreiter 1991; Bengio et al. 1994).
    Vanishing,
    /// Neither.
    Healthy,
    /// It grows more than a thousandfold, or to numbers that are none (Pascanu et al. 2013): clip it.
    Exploding,
}

/// The norms of one state's gradient in one layer and direction.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StateFlow {
    /// From 0, the one next to the input.
    pub layer: usize,
    /// [`Direction::Forward`] or [`Direction::Reverse`].
    pub direction: Direction,
    /// Of [`CellState::NAMES`].
    pub state: &'static str,
    /// For each step t of the sequence the Euclidean norm, over batch and units, of the loss's gradient by the state after step t;
    /// 0 where no row has such a step, NaN or infinite where an element of the gradient is.
    pub norms: Vec<f64>,
    /// Steps of the longest row.
    steps: usize,
}

impl StateFlow {
    /// A norm changes by a factor of this, over the whole sequence, before it counts as exploding; and by its inverse.
    pub const LIMIT: f64 = 1e3;

    /// The factor by which the norm changes with each step back, from the least-squares line through its logarithm over the distance
    /// in steps from the last step that the direction computes; 0.9: a tenth is lost each step.
    ///
    /// Of the norms only those between the first one that is not zero and the first one that is not finite count, and of them not the
    /// zeros. `None` where fewer than two are left. Where the loss sends gradients into every step, these hide how fast each of
    /// them shrinks: to see the reach of a cell give a dy that is zero but for the last step.
    pub fn decay(&self) -> Option<f64> {
        let norms = self.backward().enumerate().map(|(distance, (_, norm))| (distance as f64, norm));
        let points: Vec<(f64, f64)> = norms
            .take_while(|(_, norm)| norm.is_finite())
            .filter(|(_, norm)| *norm > 0.0)
            .map(|(distance, norm)| (distance, norm.ln()))
            .collect();
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let slope = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum::<f64>()
            / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>();
        (points.len() > 1).then(|| slope.exp())
    }

    /// [`Verdict::Exploding`] where a norm is not finite, or [`StateFlow::decay`] to the power of the distances that there are is above
    /// 1000; [`Verdict::Vanishing`] where a gradient that was there became exactly zero, or that power is below 1/1000;
    /// [`Verdict::Healthy`] otherwise, and where there is nothing to fit.
    pub fn verdict(&self) -> Verdict {
        if self.first_non_finite().is_some() {
            return Verdict::Exploding;
        }
        let mut came_in = self.backward().map(|(_, norm)| norm).skip_while(|norm| *norm == 0.0);
        if came_in.any(|norm| norm == 0.0) {
            return Verdict::Vanishing;
        }
        let distances = self.steps.saturating_sub(1) as f64;
        match self.decay().map(|decay| decay.ln() * distances) {
            Some(change) if change > Self::LIMIT.ln() => Verdict::Exploding,
            Some(change) if change < -Self::LIMIT.ln() => Verdict::Vanishing,
            _ => Verdict::Healthy,
        }
    }

    /// The first step, going back, at which the gradient is not finite.
    pub fn first_non_finite(&self) -> Option<usize> {
        self.backward().find(|(_, norm)| !norm.is_finite()).map(|(step, _)| step)
    }

    /// Steps that some row has, and their norms, in the order of the backward pass.
    fn backward(&self) -> impl Iterator<Item = (usize, f64)> {
        (0..self.steps)
            .map(|n| if self.direction == Direction::Reverse { n } else { self.steps - 1 - n })
            .map(|t| (t, self.norms[t]))
    }
}

/// How the gradient flowed back through every layer, direction and state: [`Recurrent::backward_with_flow`].
#[derive(Clone, Debug)]
pub struct GradientFlow {
    states: Vec<StateFlow>,
    non_finite: Option<NonFinite>,
}

impl GradientFlow {
    /// Layer by layer, in each by direction, in each by state.
    pub fn states(&self) -> &[StateFlow] {
        &self.states
    }

    /// One of them.
    pub fn state(&self, layer: usize, direction: Direction, state: &str) -> Option<&StateFlow> {
        self.states.iter().find(|flow| (flow.layer, flow.direction, flow.state) == (layer, direction, state))
    }

    /// The worst of all: [`Verdict::Exploding`] where any state's gradient explodes; [`Verdict::Vanishing`] where in some layer and
    /// direction those of all states vanish: one that does not is a way through, as c of an LSTM is; else [`Verdict::Healthy`].
    pub fn verdict(&self) -> Verdict {
        let verdicts: Vec<Verdict> = self.states.iter().map(StateFlow::verdict).collect();
        if verdicts.contains(&Verdict::Exploding) {
            return Verdict::Exploding;
        }
        let mut vanishes = false;
        let mut rest = &self.states[..];
        let mut verdicts = &verdicts[..];
        while let Some(first) = rest.first() {
            let count = rest.iter().take_while(|flow| (flow.layer, flow.direction) == (first.layer, first.direction)).count();
            vanishes |= verdicts[..count].iter().all(|verdict| *verdict == Verdict::Vanishing);
            (rest, verdicts) = (&rest[count..], &verdicts[count..]);
        }
        if vanishes { Verdict::Vanishing } else { Verdict::Healthy }
    }

    /// The first number of all these gradients that is NaN or infinite, in the order of the backward pass: the top layer first, in
    /// each layer by direction, step by step from the end of the direction, in each step by state.
    pub fn first_non_finite(&self) -> Option<NonFinite> {
        self.non_finite
    }
}

/// The gradients of one pass's states after every step, on the device.
pub(super) struct Totals {
    /// Layer and direction.
    index: usize,
    /// [T, STATES, B, H]
    states: Tensor,
    /// With an output product, in place of state 0: [T, B, R].
    outputs: Option<Tensor>,
}

/// The spectral radius of each gate's recurrent weights in one layer and direction: [`Recurrent::spectral_radii`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SpectralRadii {
    /// From 0, the one next to the input.
    pub layer: usize,
    /// [`Direction::Forward`] or [`Direction::Reverse`].
    pub direction: Direction,
    /// By the names of [`Cell::GATES`]; empty for a cell without recurrent weights between units.
    pub gates: Vec<(&'static str, f64)>,
}

impl<C: Cell> Recurrent<C> {
    /// As [`Recurrent::backward`], with the same results, and how the gradient flowed: the norm of the loss's gradient by every state
    /// after every step. That is the whole gradient, through all later steps and what the state goes into in its own step (c
    /// into h); of a state that zoneout held back in part, that after holding back; of a gradient that
    /// [`super::RecurrentConfig::gradient_clip`] bounds, that after the bound. Waits for the device.
    ///
    /// ```
    /// # fn main() -> gatefold::Result<()> {
    /// use gatefold::{Device, Rng, Tensor, nn::{RnnConfig, Verdict}};
    /// let device = Device::cpu();
    /// let rnn = RnnConfig::new(1, 8).init(&device, &mut Rng::seed(0))?;
    /// let x = Tensor::zeros(&device, [60, 1, 1])?;
    /// let (y, _, tape) = rnn.forward_train(&x, None)?;
    /// let mut dy = vec![0.0; 60 * 8];
    /// dy[59 * 8..].fill(1.0); // a loss at the last step alone
    /// let dy = Tensor::from_slice(&device, &dy, y.shape())?;
    /// let (_, _, flow) = rnn.backward_with_flow(tape, &dy, None)?;
    /// assert_eq!(flow.verdict(), Verdict::Vanishing);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Recurrent::backward`]; [`crate::ErrorKind::Unsupported`] for an LSTM with layer normalization.
    pub fn backward_with_flow(
        &self,
        tape: RecurrentTape,
        dy: &Tensor,
        dstate: Option<&C::Value>,
    ) -> Result<(Tensor, C::Value, GradientFlow)> {
        if self.config.normalized_output().is_some() {
            // Its backward sweep carries the gradients of what h is made of, and not that of h.
            return Err(Error::unsupported(&self.op("backward_with_flow"), "layer_norm of a cell state"));
        }
        let (steps, rows, lengths) = (tape.steps, tape.rows, tape.lengths.clone());
        let mut passes = Vec::new();
        let (dx, dstate) = match self.run_backward("backward_with_flow", tape, dy, dstate, true, Some(&mut passes))? {
            (Some(dx), dstate) => (dx, dstate),
            (None, _) => unreachable!("dx was asked for"),
        };
        let longest = lengths.as_ref().map_or(steps, |l| l.host().iter().max().map_or(0, |longest| *longest as usize));
        let (directions, hidden) = (self.config.directions(), self.config.hidden);
        let mut flow = GradientFlow { states: Vec::new(), non_finite: None };
        // As they were computed: the top layer first.
        for Totals { index, states, outputs } in passes {
            let (layer, reverse) = (index / directions, self.config.direction.passes()[index % directions]);
            let direction = pass_direction(reverse);
            let states = states.to_vec()?;
            let outputs = outputs.map(|outputs| outputs.to_vec()).transpose()?;
            // [T, B, width], each step `step` numbers after the one before it.
            let part = |s: usize| match &outputs {
                Some(outputs) if s == 0 => (&outputs[..], self.width_of(0), rows * self.width_of(0)),
                _ => (&states[s * rows * hidden..], hidden, C::State::LEN * rows * hidden),
            };
            for n in 0..longest {
                let t = if reverse { n } else { longest - 1 - n };
                for (s, name) in C::Value::NAMES.iter().enumerate() {
                    let (values, width, step) = part(s);
                    let found = first_in_step(&values[t * step..], [rows, width], 0, None, 0, width);
                    if let (Some((row, unit, value)), None) = (found, flow.non_finite) {
                        let quantity = Quantity::Gradient(name);
                        flow.non_finite = Some(NonFinite { layer, direction, step: t, row, unit, quantity, value });
                    }
                }
            }
            for (s, state) in C::Value::NAMES.iter().copied().enumerate() {
                let (values, width, step) = part(s);
                let norm = |t: usize| {
                    values[t * step..][..rows * width].iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
                };
                flow.states.push(StateFlow { layer, direction, state, norms: (0..steps).map(norm).collect(), steps: longest });
            }
        }
        // Stable: within a layer the order stays.
        flow.states.sort_by_key(|state| state.layer);
        Ok((dx, dstate, flow))
    }

    /// After the backward sweep of a pass.
    pub(super) fn totals(&self, pass: &Pass<'_>, gradients: Gradients) -> Totals {
        let at = pass.plan.flow_at(&self.config.cell).unwrap_or_default();
        let len = gradients.dstates.len() - at;
        Totals {
            index: pass.index,
            states: gradients.dstates.slice(at, [len]),
            outputs: gradients.output.map(|(_, douts)| douts),
        }
    }

    /// The spectral radius of each gate's block of W_hh: the largest magnitude of its eigenvalues, from Gelfand's formula, the limit of
    /// `|W^k|^(1/k)`, with k doubled by squaring W, on the host in f64. With an output product it is that of `W_hr W_hh`. Of
    /// [`super::RecurrentConfig::weight_dropout`] nothing is seen.
    ///
    /// In a vanilla network a radius below 1 makes gradients vanish over many steps, since tanh only shrinks them further; one above 1
    /// is what exploding needs, but does not make it certain (Pascanu et al. 2013). Gates multiply each block with numbers below
    /// 1, and the state that a cell carries past its gates adds a way of its own.
    ///
    /// # Errors
    /// What the device reports.
    pub fn spectral_radii(&self) -> Result<Vec<SpectralRadii>> {
        let (directions, hidden, width) = (self.config.directions(), self.config.hidden, self.config.width());
        let mut all = Vec::new();
        for (index, weights) in self.weights.iter().enumerate() {
            let direction = pass_direction(self.config.direction.passes()[index % directions]);
            let wide =
                |param: &super::Param| -> Result<Vec<f64>> { Ok(param.value().to_vec()?.into_iter().map(f64::from).collect()) };
            let recurrent = weights.weight_hh.as_ref().map(wide).transpose()?.unwrap_or_default();
            let output = weights.weight_hr.as_ref().map(wide).transpose()?;
            let radius = |block: &[f64]| match &output {
                Some(output) => spectral_radius(&gemm::multiply_f64([width, width, hidden], output, block), width),
                None => spectral_radius(block, hidden),
            };
            let gates =
                C::GATES.iter().copied().zip(recurrent.chunks_exact(hidden * width)).map(|(gate, block)| (gate, radius(block)));
            all.push(SpectralRadii { layer: index / directions, direction, gates: gates.collect() });
        }
        Ok(all)
    }
}

/// The spectral radius of a matrix `[n, n]`; NaN where a number of it is not finite.
///
/// The growth of the Frobenius norm from `W^k` to `W^2k` has no constant factor in it, so that it is exact at once for what neither
/// turns nor shears. What is left shrinks as 1 / k. A nilpotent matrix is zero before k is 2n, and until then nothing is taken for a
/// limit.
fn spectral_radius(matrix: &[f64], n: usize) -> f64 {
    const DOUBLINGS: u32 = 24;
    const CLOSE: f64 = 1e-10;
    // W^k = exp(log) * power, with |power| = 1.
    let (mut power, mut log, mut k) = (matrix.to_vec(), 0.0, 1.0f64);
    let normalize = |power: &mut [f64]| -> Option<f64> {
        // By the largest number first, since squares of huge ones overflow.
        let largest = power.iter().fold(0.0f64, |largest, value| if value.abs() > largest { value.abs() } else { largest });
        let scaled = power.iter().map(|value| (value / largest).powi(2)).sum::<f64>().sqrt();
        let norm = largest * scaled;
        power.iter_mut().for_each(|value| *value = *value / largest / scaled);
        (largest > 0.0).then(|| norm.ln())
    };
    if matrix.iter().any(|value| !value.is_finite()) {
        return f64::NAN;
    }
    let Some(first) = normalize(&mut power) else { return 0.0 };
    log += first;
    let mut estimate = f64::NAN;
    for _ in 0..DOUBLINGS {
        power = gemm::multiply_f64([n, n, n], &power, &power);
        let Some(norm) = normalize(&mut power) else { return 0.0 };
        let squared = 2.0 * log + norm;
        let growth = (squared - log) / k;
        (log, k) = (squared, 2.0 * k);
        if k > 2.0 * n as f64 && (growth - estimate).abs() <= CLOSE {
            return growth.exp();
        }
        estimate = growth;
    }
    estimate.exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(direction: Direction, norms: &[f64]) -> StateFlow {
        StateFlow { layer: 0, direction, state: "h", norms: norms.to_vec(), steps: norms.len() }
    }

    fn near(given: f64, expected: f64, bound: f64) {
        assert!((given - expected).abs() <= bound, "{given}, expected {expected}");
    }

    #[test]
    fn spectral_radii_of_known_matrices() {
        let turned = |angle: f64, by: f64| [by * angle.cos(), -by * angle.sin(), by * angle.sin(), by * angle.cos()];
        near(spectral_radius(&[0.5, 0.0, 0.0, 0.0, -1.25, 0.0, 0.0, 0.0, 0.75], 3), 1.25, 1e-9);
        near(spectral_radius(&turned(0.7, 0.9), 2), 0.9, 1e-12);
        near(spectral_radius(&[3.0], 1), 3.0, 1e-12);
        near(spectral_radius(&[-1e200, 0.0, 0.0, 1e199], 2) / 1e200, 1.0, 1e-9);
        near(spectral_radius(&[1e-300, 0.0, 0.0, 1e-301], 2) / 1e-300, 1.0, 1e-9);
        // A sheared rotation: S R S^-1 with S = [1 3; 0 1].
        let [a, b, c, d] = turned(1.1, 0.9);
        near(spectral_radius(&[a + 3.0 * c, b + 3.0 * d - 3.0 * (a + 3.0 * c), c, d - 3.0 * c], 2), 0.9, 1e-6);
        // A defective one: the norm of its powers grows as k 0.8^k.
        near(spectral_radius(&[0.8, 1.0, 0.0, 0.8], 2), 0.8, 1e-6);
        // +r and -r, as of a bipartite graph.
        near(spectral_radius(&[0.0, 2.0, 0.5, 0.0], 2), 1.0, 1e-9);
        assert_eq!(spectral_radius(&[0.0; 4], 2), 0.0);
        let mut shift = vec![0.0; 37 * 37];
        (0..36).for_each(|n| shift[n * 37 + n + 1] = 1.0);
        assert_eq!(spectral_radius(&shift, 37), 0.0);
        assert!(spectral_radius(&[f64::NAN, 0.0, 0.0, 1.0], 2).is_nan());
    }

    #[test]
    fn decay_and_verdict_by_hand() {
        let powers = |base: f64, count: i32| -> Vec<f64> { (0..count).map(|n| 3.0 * base.powi(n)).collect() };
        let forward = |mut norms: Vec<f64>| {
            norms.reverse();
            flow(Direction::Forward, &norms)
        };
        for (base, verdict) in
            [(0.8, Verdict::Vanishing), (0.9, Verdict::Healthy), (1.1, Verdict::Healthy), (1.2, Verdict::Exploding)]
        {
            let norms = powers(base, 50);
            for flow in [flow(Direction::Reverse, &norms), forward(norms)] {
                near(flow.decay().unwrap_or(f64::NAN), base, 1e-12);
                assert_eq!(flow.verdict(), verdict, "{base}");
            }
        }
        // 1.15^49 = 942, 1.16^49 = 1440.
        assert_eq!(forward(powers(1.15, 50)).verdict(), Verdict::Healthy);
        assert_eq!(forward(powers(1.16, 50)).verdict(), Verdict::Exploding);
        // Before the gradient comes in there is nothing to judge; what became zero has vanished.
        let late = forward(vec![0.0, 0.0, 4.0, 2.0, 1.0]);
        near(late.decay().unwrap_or(f64::NAN), 0.5, 1e-12);
        assert_eq!((late.verdict(), late.first_non_finite()), (Verdict::Healthy, None));
        assert_eq!(forward(vec![4.0, 2.0, 0.0]).verdict(), Verdict::Vanishing);
        let burst = forward(vec![1.0, 2.0, 4.0, f64::INFINITY, f64::NAN]);
        near(burst.decay().unwrap_or(f64::NAN), 2.0, 1e-12);
        assert_eq!((burst.verdict(), burst.first_non_finite()), (Verdict::Exploding, Some(1)));
        for nothing in [vec![], vec![1.0], vec![0.0; 4], vec![0.0, 2.0]] {
            let nothing = forward(nothing);
            assert_eq!((nothing.decay(), nothing.verdict()), (None, Verdict::Healthy), "{:?}", nothing.norms);
        }
        // Steps that no row has are no sign of anything.
        let padded = StateFlow { steps: 3, ..flow(Direction::Reverse, &[4.0, 2.0, 1.0, 0.0, 0.0]) };
        near(padded.decay().unwrap_or(f64::NAN), 0.5, 1e-12);
        assert_eq!(padded.verdict(), Verdict::Healthy);
    }

    #[test]
    fn one_state_is_a_way_through() {
        let shrinking: Vec<f64> = (0..50).map(|n| 0.5f64.powi(50 - n)).collect();
        let pass = |layer, c: &[f64]| {
            [("h", &shrinking[..]), ("c", c)].map(|(state, norms)| StateFlow { layer, state, ..flow(Direction::Forward, norms) })
        };
        let verdict = |states: Vec<StateFlow>| GradientFlow { states, non_finite: None }.verdict();
        assert_eq!(verdict([pass(0, &[1.0; 50]), pass(1, &[1.0; 50])].concat()), Verdict::Healthy);
        assert_eq!(verdict([pass(0, &[1.0; 50]), pass(1, &shrinking)].concat()), Verdict::Vanishing);
        assert_eq!(verdict([pass(0, &[f64::NAN; 50]), pass(1, &shrinking)].concat()), Verdict::Exploding);
    }
}
