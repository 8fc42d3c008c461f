//! Two layers as a wavefront: while the lower one takes a block of steps, the upper one takes the block before it, in the same launches.
//! Backward the upper one goes ahead. Where a step of one layer leaves a GPU mostly idle, two take the time of one.
//!
//! It shows in no bit: steps are the same whoever takes part in a launch, and the products between the layers, block by block here,
//! are parts of those of the layer by itself ([`part_of_product`](crate::kernels::gemm_half::part_of_product)).

use std::ops::Range;

use super::{BackwardEnds, Cell, Direction, ForwardEnds, LayerTape, Pass, PassTape, Recurrent, Sequence, Steps};
use crate::error::Result;
use crate::kernels::choice;
use crate::kernels::sweep::{self, LayerOrder, Plan, Run, Side, Sweep};
use crate::tensor::{ALIGNMENT, Tensor};

/// A sequence has so many blocks, or fewer of so many steps: two layers take a block longer than one, but each block has a product of its
/// own, and launches, of which a resident sweep has few otherwise.
const BLOCKS: usize = 8;
const LEAST_STEPS: usize = 24;

/// Gradients of what two layers give, `[T, B, R]`.
pub(super) struct Between<'a> {
    /// Of what the upper one gave to the next one.
    above: &'a Tensor,
    /// Of what the lower one gave to the upper one: is filled run by run.
    between: &'a Tensor,
}

/// Launches of one or two passes.
pub(super) struct Turn {
    /// What one layer leaves to the other before.
    pub handed: Option<Run>,
    /// The first of the passes that take part.
    first: usize,
    /// What each of them does.
    runs: Vec<Run>,
}

impl Turn {
    /// Which passes take part.
    pub fn passes(&self) -> Range<usize> {
        self.first..self.first + self.runs.len()
    }

    /// Of all sides those that take part, each with its run.
    pub fn sides<'a>(&self, all: &[Side<'a>]) -> Vec<Side<'a>> {
        let side = |(side, run): (&Side<'a>, &Run)| Side { plan: Plan { run: *run, ..side.plan }, ..*side };
        all[self.passes()].iter().zip(&self.runs).map(side).collect()
    }
}

/// The turns of a lower and an upper layer.
fn turns(steps: usize, block: usize, backward: bool) -> Vec<Turn> {
    let mut blocks: Vec<Run> = (0..steps).step_by(block).map(|first| Run { first, count: block.min(steps - first) }).collect();
    if backward {
        blocks.reverse();
    }
    let mut turns = Vec::new();
    for wave in 0..=blocks.len() {
        let (ahead, behind) = (blocks.get(wave), wave.checked_sub(1).map(|before| blocks[before]));
        let mut handed = behind;
        for [ahead, behind] in cut([ahead.copied(), behind], steps, backward) {
            let (lower, upper) = if backward { (behind, ahead) } else { (ahead, behind) };
            let first = usize::from(lower.is_none());
            turns.push(Turn { handed: handed.take(), first, runs: lower.into_iter().chain(upper).collect() });
        }
    }
    turns
}

/// Cuts the blocks of two layers into runs that are equally long where both take part, in the order of the sweep. Backward the first and
/// the last step of the sequence are a layer's own: sweeps ask for that.
fn cut([ahead, behind]: [Option<Run>; 2], steps: usize, backward: bool) -> Vec<[Option<Run>; 2]> {
    let (Some(mut ahead), Some(mut behind)) = (ahead, behind) else { return vec![[ahead, behind]] };
    let mut runs = Vec::new();
    let take = |from: &mut Run, count: usize| {
        let taken = Run { first: if backward { from.end() - count } else { from.first }, count };
        *from = Run { first: if backward { from.first } else { taken.end() }, count: from.count - count };
        (count > 0).then_some(taken)
    };
    if backward && behind.end() == steps {
        runs.push([None, take(&mut behind, 1)]);
    }
    let last = usize::from(backward && ahead.first == 0);
    let both = (ahead.count - last).min(behind.count);
    let [of_ahead, of_behind] = [ahead.count - last - both, behind.count - both];
    runs.push([take(&mut ahead, both), take(&mut behind, both)]);
    runs.push([take(&mut ahead, of_ahead), None]);
    runs.push([None, take(&mut behind, of_behind)]);
    runs.push([take(&mut ahead, last), None]);
    runs.retain(|runs| runs.iter().any(Option::is_some));
    runs
}

impl<C: Cell> Recurrent<C> {
    /// The turns of passes that a sweep takes at once: one, unless they are of two layers.
    pub(super) fn turns(&self, passes: &[Pass<'_>], backward: bool) -> Vec<Turn> {
        let Plan { steps, rows, .. } = passes[0].plan;
        let directions = self.config.directions();
        match passes {
            [lower, upper] if lower.index / directions < upper.index / directions => {
                turns(steps, self.block(steps, rows), backward)
            }
            _ => vec![Turn { handed: None, first: 0, runs: vec![Run::whole(steps); passes.len()] }],
        }
    }

    /// Steps of a block.
    pub(super) fn block(&self, steps: usize, rows: usize) -> usize {
        // Bindings may start where a block does.
        let unit = ALIGNMENT >> (rows * self.output()).trailing_zeros().min(ALIGNMENT.trailing_zeros());
        steps.div_ceil(BLOCKS).max(LEAST_STEPS).next_multiple_of(unit)
    }

    /// Whether this layer and the next go as a wavefront.
    pub(super) fn is_wavefront(&self, layer: usize, sequence: &Sequence<'_>, backward: bool) -> bool {
        let (cell, steps, device) = (&self.config.cell, sequence.steps, &self.device);
        let is_stack = layer + 1 < self.config.layers && self.config.direction == Direction::Forward;
        if !is_stack || self.block(steps, sequence.rows) >= steps {
            return false;
        }
        let pass = &self.passes(layer..layer + 1, sequence)[0];
        if !sweep::at_once(device, cell, &pass.plan, self.widths()) {
            return false;
        }
        let takes_runs = match self.steps_of(pass) {
            Steps::Split => false,
            Steps::Pairs => true,
            Steps::Whole => !matches!(sweep::choose(device, cell, &pass.plan, backward), Sweep::Scan(_)),
        };
        takes_runs && choice::layers::<C>(device, &pass.plan) == LayerOrder::Wavefront
    }

    /// As [`Self::forward_layer`], of this layer and the next.
    pub(super) fn forward_wavefront(
        &self,
        layer: usize,
        sequence: &Sequence<'_>,
        x: &Tensor,
        ends: &ForwardEnds<'_>,
    ) -> Result<(Tensor, Vec<LayerTape>)> {
        let passes = self.passes(layer..layer + 2, sequence);
        let ys = Tensor::in_a_row(&self.device, [sequence.steps, sequence.rows, self.output()], 2)?;
        let changes = self.mask_key(&passes[0]).is_some() || self.config.adds_input(x.shape()[2]);
        let between = if changes { Tensor::uninitialized(&self.device, ys[0].shape())? } else { ys[0].clone() };
        let xs = [x.clone(), between];
        let tapes = self.forward_passes(&passes, &xs, &ys, ends)?;
        let mut y = self.passed_on(&passes[1], &ys[1], &xs[1], Run::whole(sequence.steps))?;
        if y.shares_memory(&ys[0]) {
            // Who holds it need not hold the lower layer's as well.
            let own = Tensor::uninitialized(&self.device, y.shape())?;
            own.copy_from(&y)?;
            y = own;
        }
        let layers = tapes.into_iter().zip(xs).map(|(tape, x)| LayerTape { x, passes: vec![tape], factors: Vec::new() });
        Ok((y, layers.collect()))
    }

    /// What the upper of two layers needs of a run of the lower one: its x, where that is not the lower one's y, and its input part.
    pub(super) fn hand_up(&self, passes: &[Pass<'_>], tapes: &[PassTape], xs: &[Tensor], ys: &[Tensor], run: Run) -> Result<()> {
        let (lower, upper) = (&passes[0], &passes[1]);
        if !xs[1].shares_memory(&ys[0]) {
            let x = self.passed_on(lower, &of_run(&ys[0], run), &of_run(&xs[0], run), run)?;
            of_run(&xs[1], run).copy_from(&x)?;
        }
        let upper = Pass { plan: Plan { run, ..upper.plan }, ..*upper };
        self.input_part(&upper, &xs[1], &tapes[1].slots, None)
    }

    /// Whether the tape of this layer came of a wavefront with that of the next, and they go back as one. They may as well go one by one, but
    /// that of the next is then held as long as this one.
    pub(super) fn goes_with(&self, layer: usize, tapes: [&LayerTape; 2], sequence: &Sequence<'_>) -> bool {
        let [lower, upper] = tapes.map(|tape| &tape.passes[0].slots);
        lower.shares_memory(upper) && self.is_wavefront(layer, sequence, true)
    }

    /// As [`Self::backward_layer`], of this layer and the next.
    pub(super) fn backward_wavefront(
        &self,
        layer: usize,
        sequence: &Sequence<'_>,
        layers: [LayerTape; 2],
        dy: &Tensor,
        needs: bool,
        ends: &mut BackwardEnds<'_>,
    ) -> Result<Option<Tensor>> {
        let mut passes = self.passes(layer..layer + 2, sequence);
        passes.iter_mut().for_each(|pass| pass.plan.flow = ends.flow.is_some());
        let whole = Run::whole(sequence.steps);
        let dys = Tensor::in_a_row(&self.device, dy.shape(), 2)?;
        dys[1].copy_from(&self.passed_back(&passes[1], dy, whole)?)?;
        // The gradient of what the lower layer gave to the upper one.
        let is_masked = self.mask_key(&passes[0]).is_some();
        let between = if is_masked { Tensor::uninitialized(&self.device, dy.shape())? } else { dys[0].clone() };
        let xs = layers.each_ref().map(|layer| layer.x.clone());
        let tapes: Vec<PassTape> = layers.into_iter().flat_map(|layer| layer.passes).collect();
        let gradients =
            self.backward_passes(&passes, &tapes, &xs, &dys, ends, Some(&Between { above: dy, between: &between }))?;
        if let Some(flow) = &mut ends.flow {
            // From the last layer to the first.
            flow.extend(passes.iter().zip(gradients).rev().map(|(pass, gradients)| self.totals(pass, gradients)));
        }
        if !needs {
            return Ok(None);
        }
        let dx = Tensor::uninitialized(&self.device, xs[0].shape())?;
        self.input_gradient(&passes[0], &tapes[0], &dx)?;
        self.with_added(&passes[0], dx, &between, whole).map(Some)
    }

    /// What the lower of two layers needs of a run of the upper one: the gradient of its y, in `dys[0]`.
    pub(super) fn hand_down(
        &self,
        passes: &[Pass<'_>],
        tapes: &[PassTape],
        dys: &[Tensor],
        Between { above, between }: &Between<'_>,
        run: Run,
    ) -> Result<()> {
        let (lower, upper) = (&passes[0], &passes[1]);
        let upper = Pass { plan: Plan { run, ..upper.plan }, ..*upper };
        self.input_gradient(&upper, &tapes[1], between)?;
        let part = of_run(between, run);
        if self.config.adds_input(part.shape()[2]) {
            part.copy_from(&self.with_added(&upper, part.clone(), &of_run(above, run), run)?)?;
        }
        if !between.shares_memory(&dys[0]) {
            of_run(&dys[0], run).copy_from(&self.passed_back(lower, &part, run)?)?;
        }
        Ok(())
    }
}

/// The steps of a run, of a tensor `[T, B, F]` that is read forward.
fn of_run(tensor: &Tensor, run: Run) -> Tensor {
    let [rows, width] = [tensor.shape()[1], tensor.shape()[2]];
    tensor.slice(run.first * rows * width, [run.count, rows, width])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every layer takes every step once and in order, none before the other layer has handed it on; and who goes behind never waits.
    #[test]
    fn turns_of_two_layers() {
        for (steps, block) in [(33, 16), (100, 24), (96, 32), (25, 24), (64, 16), (1000, 125)] {
            for backward in [false, true] {
                let what = format!("{steps} steps by {block}, backward: {backward}");
                let order = |run: Run| -> Vec<usize> {
                    let run = run.first..run.end();
                    if backward { run.rev().collect() } else { run.collect() }
                };
                // Lower and upper; and what was handed on.
                let (mut done, mut handed) = ([Vec::new(), Vec::new()], Vec::new());
                let (ahead, behind) = if backward { (1, 0) } else { (0, 1) };
                let mut together = 0;
                for turn in turns(steps, block, backward) {
                    if let Some(run) = turn.handed {
                        handed.extend(order(run));
                        assert!(done[ahead].starts_with(&handed), "{what}: handed too early");
                    }
                    for (pass, run) in turn.passes().zip(&turn.runs) {
                        done[pass].extend(order(*run));
                        assert!(pass == ahead || handed.starts_with(&done[behind]), "{what}: taken too early");
                    }
                    if let [one, other] = turn.runs[..] {
                        let ends = |run: Run| [run.first == 0, run.end() == steps];
                        assert!(one.count == other.count, "{what}: {one:?} beside {other:?}");
                        assert!(!backward || ends(one) == ends(other), "{what}: {one:?} beside {other:?}");
                        together += one.count;
                    }
                }
                let all = order(Run::whole(steps));
                assert!(done.iter().all(|done| *done == all) && handed == all, "{what}: {done:?}, {handed:?}");
                // All but the first block of who goes ahead, and the ends.
                assert!(together + block + 2 >= steps, "{what}: {together} together");
            }
        }
    }
}
