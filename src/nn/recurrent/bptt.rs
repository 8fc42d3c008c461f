//! Back-propagation through time within a budget of memory: a long sequence in segments, each computed again in the backward
//! sweep (Chen et al. 2016: "Training deep nets with sublinear memory cost"; Gruslys et al. 2016 for recurrent networks).

use std::ops::Range;

use super::{Cell, Direction, Recurrent, Sequence, Window, time_block};
use crate::error::{Error, Result};
use crate::kernels::cell_contract::Block;
use crate::kernels::gemm::part_sums;
use crate::kernels::sweep_step;
use crate::nn::{Input, Precision};
use crate::rng::MaskKey;
use crate::tensor::{Lengths, Tensor};

/// How [`BoundedBptt::run`] cuts a sequence, and what it will take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BpttPlan {
    /// Steps of a segment; the last one may have fewer.
    pub segment: usize,
    /// How many segments there are.
    pub segments: usize,
    /// The most bytes that tensors of the run hold at once, beside x, the parameters, and what the head makes other than dy.
    pub peak_bytes: u64,
}

/// What [`BoundedBptt::run`] gives; the gradients of the parameters are in them.
#[derive(Clone, Debug)]
pub struct Backpropagated<S> {
    /// The final state.
    pub state: S,
    /// The gradient of the initial state.
    pub dstate: S,
    /// The gradient of x, if it was asked for.
    pub dx: Option<Tensor>,
}

/// Forward and backward over one sequence in bounded memory; see [`Recurrent::bptt_memory`].
#[derive(Debug)]
pub struct BoundedBptt<'a, C: Cell> {
    layer: &'a Recurrent<C>,
    bytes: u64,
    needs_dx: bool,
}

impl<C: Cell> Recurrent<C> {
    /// Back-propagation through time in at most `bytes` of memory. The forward pass keeps the states between segments alone; the
    /// backward pass goes from the last segment to the first and computes each again. Gradients have the same bits as
    /// [`Recurrent::forward_train`] and [`Recurrent::backward`] over the whole sequence (of minGRU and minLSTM on a GPU, where the
    /// whole may take a scan, the same within rounding); the price is a second forward pass.
    ///
    /// ```
    /// # fn main() -> gatefold::Result<()> {
    /// use gatefold::{Device, Rng, Tensor, nn::{Input, LstmConfig}};
    /// let device = Device::cpu();
    /// let lstm = LstmConfig::new(1, 8).init(&device, &mut Rng::seed(0))?;
    /// let x = Tensor::zeros(&device, [5000, 2, 1])?;
    /// let bptt = lstm.bptt_memory(1 << 20);
    /// println!("{:?}", bptt.plan(5000, 2)?);
    /// // The loss is the sum of squares of all outputs, halved: the gradient of y is y.
    /// let result = bptt.run(&x, Input::new(), |_steps, y| y.scale(1.0))?;
    /// # let _ = result; Ok(()) }
    /// ```
    pub fn bptt_memory(&self, bytes: u64) -> BoundedBptt<'_, C> {
        BoundedBptt { layer: self, bytes, needs_dx: false }
    }
}

impl<C: Cell> BoundedBptt<'_, C> {
    /// Whether the gradient of x is wanted, which takes as much memory as x.
    pub fn needs_dx(self, needs_dx: bool) -> Self {
        Self { needs_dx, ..self }
    }

    /// The longest segments that the budget allows for `steps` steps of `rows` rows.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] where a direction reads time in reverse, or `batch_first` is set;
    /// [`crate::ErrorKind::Argument`] when even the shortest segments take more than the budget.
    pub fn plan(&self, steps: usize, rows: usize) -> Result<BpttPlan> {
        let op = self.layer.op("bptt_memory");
        if self.layer.config.direction != Direction::Forward {
            let what = "segments need Direction::Forward: a reverse pass starts at the end, which needs the whole sequence";
            return Err(Error::unsupported(&op, what));
        }
        if self.layer.config.batch_first {
            return Err(Error::unsupported(&op, "segments need time-major sequences, and batch_first(true) is set"));
        }
        for (name, size) in [("steps", steps), ("rows", rows)] {
            if size == 0 {
                return Err(Error::argument(&op, name, size, "at least 1"));
            }
        }
        let block = time_block(rows);
        let plan = |blocks: usize| {
            let segment = (blocks * block).min(steps);
            let segments = steps.div_ceil(segment);
            BpttPlan { segment, segments, peak_bytes: self.peak_bytes(steps, rows, segment, segments) }
        };
        let plans = (1..=steps.div_ceil(block)).rev().map(plan);
        plans.into_iter().find(|plan| plan.peak_bytes <= self.bytes).ok_or_else(|| {
            let least = (1..=steps.div_ceil(block)).map(|blocks| plan(blocks).peak_bytes).min().unwrap_or_default();
            Error::argument(&op, "bytes", self.bytes, format!("at least {least} for {steps} steps of {rows} rows"))
        })
    }

    /// What tensors of a run hold at most; see [`BpttPlan::peak_bytes`].
    fn peak_bytes(&self, steps: usize, rows: usize, segment: usize, segments: usize) -> u64 {
        let (config, layer) = (&self.layer.config, self.layer);
        let (hidden, width) = (config.hidden, config.width());
        let (gates, kept) = (C::Pre::LEN * hidden, C::Slots::LEN * hidden);
        let lines = segment * rows;
        let split = layer.is_split(true);
        // Copies of the weights for the forward products, made once; DropConnect has another of W_hh.
        let weights: usize = layer.weights.iter().map(|weights| weights.copies(config, split)).sum();
        let packed = if split { gates * width } else { sweep_step::forward_weights_len::<C>(hidden) };
        let dropped = if config.weight_dropout > 0.0 { (2 * gates * width + packed) * config.layers } else { 0 };
        let state: usize = (0..C::State::LEN).map(|s| config.layers * rows * layer.width_of(s)).sum();
        // Of two layers that go as a wavefront the upper one's y stays with the lower one's, where the upper one sees that.
        let key = Some(MaskKey::new(0, 0));
        let sequence = Sequence { window: Window { start: 0, total: steps }, key, ..Sequence::plain(segment, rows) };
        let goes = |steps: usize| layer.is_wavefront(0, &Sequence { steps, ..sequence }, true);
        let pairs = if goes(segment) { config.layers / 2 } else { 0 };
        // With a last segment that is too short for it there are copies of the weights for each layer by itself as well.
        let output = if config.output.is_some() { hidden * width } else { 0 };
        let is_last_alone = pairs > 0 && !goes(steps - (segments - 1) * segment);
        let weights = weights + if is_last_alone { 2 * pairs * (packed + output) } else { 0 };
        let beside = if config.dropout > 0.0 || config.residual { 0 } else { pairs * lines * layer.output() };
        // The tape: gates, states, with an output product o, of each layer; the inputs of the upper layers.
        let outputs = if config.output.is_some() { (segment + 1) * rows * width } else { 0 };
        // Layer normalization keeps the products and statistics of their rows, and statistics of the cell state; the CPU that, normalized.
        let (norm, state_norm) = (usize::from(config.layer_norm), usize::from(config.normalized_output().is_some()));
        let values = if layer.device.is_cpu() { hidden } else { 0 };
        let norms = norm * 2 * lines * (gates + 2 * config.cell.norms().len()) + state_norm * lines * (values + 2);
        let pass = lines * kept + C::State::LEN * (segment + 1) * rows * hidden + outputs + norms;
        let tape = config.layers * pass + (config.layers - 1) * lines * layer.output() + beside;
        // While the head runs: y and dy. In backward: dy and dx; masks and sums of residual layers make copies.
        let copies = usize::from(config.dropout > 0.0) + usize::from(config.residual);
        let dx_of = |layers: usize| match (layers, self.needs_dx) {
            (1, true) => lines * config.input,
            (1, false) => 0,
            _ => lines * layer.output(),
        };
        let douts = if config.output.is_some() { lines * width } else { 0 };
        let dnorms = norm * (lines + lines.min(time_block(rows) * rows)) * gates + state_norm * lines * hidden;
        let plan = layer.plan(&sequence, 0);
        let carried = plan.dstates_len(&config.cell);
        let sums = config.layers * plan.sums_len(&config.cell);
        // Steps apart from their products have a buffer for one; masks on what the products see have a masked copy of it.
        let product = if split { rows * gates } else { 0 };
        let masked = if config.recurrent_dropout > 0.0 { time_block(rows).min(segment) * rows * width } else { 0 };
        let spread = if config.recurrent_dropout > 0.0 { rows * C::Pre::LEN * width } else { 0 };
        // In half precision the gradients of a block of W_hh are made of copies of dr, h, and the x of W_ih.
        let factors = time_block(rows).min(segment) * rows * (gates + width + config.input.max(layer.output()));
        let halves = match (config.precision, layer.device.is_cpu()) {
            (Precision::Single, _) => 0,
            (Precision::Half, true) => factors,
            (Precision::Half, false) => factors / 2,
        };
        // On a GPU the sums of products over many lines may be in parts, while one of the gradients of W_ih, W_hh or x is made.
        let inputs = config.input.max(if config.layers > 1 { layer.output() } else { 0 });
        let of_block = time_block(rows).min(segment) * rows;
        let any = layer.weights[0].weight_ih.value();
        let parts_of = |size| part_sums(any, config.precision, size);
        let of_weights = parts_of([gates, inputs, of_block]).max(parts_of([gates, width, of_block]));
        let of_dx = parts_of([of_block, inputs, gates]);
        let head = lines * layer.output();
        let (common, parts) = (halves + douts + dnorms + carried + masked, of_weights.max(of_dx));
        let backward = match (pairs, config.layers % 2) {
            (0, _) => common + parts + dx_of(config.layers) + copies * lines * layer.output(),
            // A wavefront has the gradients of two layers, and a copy of W_hh of both. A last layer by itself is done with by then.
            (_, odd) => {
                let (y, added) = (lines * layer.output(), usize::from(config.residual));
                let dys = (2 + usize::from(config.dropout > 0.0)) * y;
                let copies = 2 * (gates * width + output);
                // Where x is added to what the lower layer gives, the gradient is a sum; by then the copies are gone, as they are when
                // gradients of weights are made.
                let is_added = added > 0 && (pairs > 1 || self.needs_dx && config.input == layer.output());
                let sum = if is_added { y } else { 0 };
                let of_run = of_dx * layer.block(segment, rows) * rows / of_block;
                let wavefront = common + douts + carried + dys + dx_of(pairs) + (copies + of_run).max(sum).max(of_weights);
                let last = common + parts + dx_of(config.layers) + added * y;
                wavefront.saturating_sub(odd * (pass + y)).max(odd * last)
            }
        };
        let whole = if self.needs_dx { steps * rows * config.input } else { 0 };
        let words = weights
            + dropped
            + (segments + 3) * state
            + tape
            + lines * layer.output()
            + head.max(backward)
            + whole
            + product
            + sums
            + spread;
        4 * words as u64
    }

    /// Forward and backward over x `[seq, batch, input]`. `head` gets the steps of a segment and their y `[steps, batch, output]`, and
    /// gives dy of the same shape; it is called from the last segment to the first. Adds to the gradients of the parameters.
    ///
    /// # Errors
    /// As [`BoundedBptt::plan`], [`Recurrent::forward_train`] and [`Recurrent::backward`]; [`crate::ErrorKind::Unsupported`] for a
    /// teacher; what `head` gives.
    pub fn run<'a>(
        &self,
        x: &Tensor,
        input: impl Into<Input<'a, C::Value>>,
        mut head: impl FnMut(Range<usize>, &Tensor) -> Result<Tensor>,
    ) -> Result<Backpropagated<C::Value>>
    where
        C::Value: 'a,
    {
        let (layer, input) = (self.layer, input.into());
        let op = layer.op("bptt_memory");
        let &[steps, rows, features] = x.shape() else {
            return Err(Error::shape(&op, "x", x.shape(), format!("[seq, batch, {}]", layer.input())));
        };
        if input.teacher.is_some() {
            return Err(Error::unsupported(&op, "a teacher makes steps independent, or cuts them: train it in windows"));
        }
        if let Some(lengths) = input.lengths {
            lengths.check(&op, &layer.device, steps, rows)?;
        }
        let plan = self.plan(steps, rows)?;
        let segments: Vec<Range<usize>> =
            (0..steps).step_by(plan.segment).map(|start| start..steps.min(start + plan.segment)).collect();
        let part = |steps: &Range<usize>| x.slice(steps.start * rows * features, [steps.len(), rows, features]);
        let lengths = segments.iter().map(|steps| lengths_of(input.lengths, &layer.device, steps)).collect::<Result<Vec<_>>>()?;
        let window = |steps: &Range<usize>| Some(Window { start: steps.start, total: x.shape()[0] });

        // The state before each segment but the first, whose own may be the layer's.
        let mut states: Vec<C::Value> = Vec::with_capacity(segments.len());
        let given = |index: usize, states: &[C::Value]| match index {
            0 => input.state.cloned(),
            _ => states.get(index - 1).cloned(),
        };
        let run = |index: usize, states: &[C::Value]| {
            let state = given(index, states);
            let segment = Input { lengths: lengths[index].as_ref(), state: state.as_ref(), ..input };
            layer.run("bptt_memory", &part(&segments[index]), segment, true, window(&segments[index]))
        };
        for index in 0..segments.len() - 1 {
            let (_, state, _) = run(index, &states)?;
            states.push(state);
            layer.device.submit()?;
        }
        let dx = match self.needs_dx {
            true => Some(Tensor::uninitialized(&layer.device, x.shape())?),
            false => None,
        };
        let sums = layer.new_sums(rows)?;
        let (mut last, mut dstate) = (None, None);
        for (index, steps) in segments.iter().enumerate().rev() {
            let (y, state, tape) = run(index, &states)?;
            states.truncate(index);
            let dy = head(steps.clone(), &y)?;
            drop(y);
            last.get_or_insert(state);
            let Some(tape) = tape else { unreachable!("a training run records a tape") };
            let (part, before) = layer.run_backward_of("backward", tape, &dy, dstate.as_ref(), self.needs_dx, &sums, None)?;
            if let (Some(dx), Some(part)) = (&dx, part) {
                dx.slice(steps.start * rows * features, part.shape()).copy_from(&part)?;
            }
            dstate = Some(before);
            layer.device.submit()?;
        }
        layer.add_sums(&sums)?;
        match (last, dstate) {
            (Some(state), Some(dstate)) => Ok(Backpropagated { state, dstate, dx }),
            _ => unreachable!("a sequence has at least one segment"),
        }
    }
}

/// What is left of each row's length in a segment.
fn lengths_of(lengths: Option<&Lengths>, device: &crate::device::Device, steps: &Range<usize>) -> Result<Option<Lengths>> {
    let Some(lengths) = lengths else { return Ok(None) };
    let part = |length: &u32| (*length as usize).clamp(steps.start, steps.end) - steps.start;
    let parts: Vec<u32> = lengths.host().iter().map(|length| part(length) as u32).collect();
    Ok(Some(Lengths::from_slice(device, &parts)?))
}
