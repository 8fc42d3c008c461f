//! What a pass computed, seen from outside: states, gates, and the first number that is none.

use std::fmt;

use super::{Cell, CellState, Direction, Recurrent, RecurrentTape};
use crate::error::{Error, Result};
use crate::kernels::activation::Activation;
use crate::kernels::cell_contract::Block;
use crate::kernels::gather;
use crate::tensor::{Ids, Lengths, Tensor};

/// The states and gates of one layer and direction at every step: [`Recurrent::inspect`].
#[derive(Clone, Debug)]
pub struct Inspection {
    states: Vec<(&'static str, Tensor)>,
    gates: Vec<(&'static str, Tensor)>,
    activations: Vec<Option<Activation>>,
    lengths: Option<Lengths>,
}

impl Inspection {
    /// The states after each step by the names of [`CellState::NAMES`], `[seq, batch, hidden]`, or, of a layer with an output
    /// product, its width for h. Past its end a row has what it had last, in reverse its initial state. Where a teacher that does not
    /// teach every step taught the next one, h is the target that stood in for it.
    pub fn states(&self) -> &[(&'static str, Tensor)] {
        &self.states
    }

    /// The gates of each step by the names of [`Cell::GATES`], after their activations, `[seq, batch, hidden]`: zeros past a row's
    /// end.
    pub fn gates(&self) -> &[(&'static str, Tensor)] {
        &self.gates
    }

    /// A state by its name.
    pub fn state(&self, name: &str) -> Option<&Tensor> {
        self.states.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor)
    }

    /// A gate by its name.
    pub fn gate(&self, name: &str) -> Option<&Tensor> {
        self.gates.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor)
    }

    /// What share of each gate's values, over valid steps, is saturated: where its activation has hardly any slope left. Between 0
    /// and 1 (sigmoid, hard sigmoid) that is below 0.05 or above 0.95; between two limits of opposite sign (tanh, softsign) beyond
    /// 95 % of them. A value that is no number counts too. `None` where the activation has no two ends (ReLU), where the gate is
    /// not the value of one activation (f of coupled gates), and where there is no valid step. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn saturation(&self) -> Result<Vec<(&'static str, Option<f64>)>> {
        let share = |((name, gate), activation): (&(&'static str, Tensor), &Option<Activation>)| {
            let Some((low, high)) = activation.and_then(inner) else { return Ok((*name, None)) };
            let &[_, rows, hidden] = gate.shape() else { unreachable!("gates are [seq, batch, hidden]") };
            let (mut saturated, mut count) = (0usize, 0usize);
            for (line, values) in gate.to_vec()?.chunks_exact(hidden).enumerate() {
                if is_valid(self.lengths.as_ref(), rows, line) {
                    // Not in, and not below or above: NaN is neither.
                    saturated += values.iter().filter(|value| !(low..=high).contains(*value)).count();
                    count += hidden;
                }
            }
            Ok((*name, (count > 0).then(|| saturated as f64 / count as f64)))
        };
        self.gates.iter().zip(&self.activations).map(share).collect()
    }
}

/// The range inside the saturated ends of an activation.
fn inner(activation: Activation) -> Option<(f32, f32)> {
    const NEAR: f32 = 0.95;
    match activation {
        Activation::Sigmoid | Activation::HardSigmoid { .. } => Some((1.0 - NEAR, NEAR)),
        Activation::Tanh | Activation::Softsign => Some((-NEAR, NEAR)),
        Activation::ScaledTanh { alpha, .. } => Some((-NEAR * alpha.abs(), NEAR * alpha.abs())),
        _ => None,
    }
}

/// Whether line `t * rows + row` is a step of its row.
fn is_valid(lengths: Option<&Lengths>, rows: usize, line: usize) -> bool {
    lengths.is_none_or(|lengths| line / rows < lengths.host()[line % rows] as usize)
}

/// What a number belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantity {
    /// The layer's input x.
    Input,
    /// The value of a gate, by its name.
    Gate(&'static str),
    /// A state after the step, by its name.
    State(&'static str),
    /// The gradient of a state after the step, by its name.
    Gradient(&'static str),
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Quantity::Input => f.write_str("x"),
            Quantity::Gate(name) => write!(f, "gate {name}"),
            Quantity::State(name) => write!(f, "state {name}"),
            Quantity::Gradient(name) => write!(f, "the gradient of state {name}"),
        }
    }
}

/// Where the first number that is not finite stands; `Display` is one line:
/// `layer 0, Forward, step 3, row 1, unit 7: gate f is NaN`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NonFinite {
    /// From 0, the one next to the input.
    pub layer: usize,
    /// [`Direction::Forward`] or [`Direction::Reverse`].
    pub direction: Direction,
    /// Of the sequence, whichever way it is read.
    pub step: usize,
    /// Of the batch.
    pub row: usize,
    /// Which of the quantity's numbers.
    pub unit: usize,
    /// What it is.
    pub quantity: Quantity,
    /// The number: NaN or infinite.
    pub value: f32,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, direction, step, row, unit, quantity, value } = self;
        write!(f, "layer {layer}, {direction:?}, step {step}, row {row}, unit {unit}: {quantity} is {value}")
    }
}

/// Row, unit and value of the first number that is not finite among the valid rows of step `t` of `values`, whose line `line`
/// starts at `start + line * stride`.
pub(super) fn first_in_step(
    values: &[f32],
    [rows, width]: [usize; 2],
    t: usize,
    lengths: Option<&Lengths>,
    start: usize,
    stride: usize,
) -> Option<(usize, usize, f32)> {
    (0..rows).filter(|row| is_valid(lengths, rows, t * rows + row)).find_map(|row| {
        let line = &values[start + (t * rows + row) * stride..][..width];
        line.iter().position(|value| !value.is_finite()).map(|unit| (row, unit, line[unit]))
    })
}

impl<C: Cell> Recurrent<C> {
    /// All states and gates of one layer and direction, as [`Recurrent::forward_train`] left them on its tape. Time-major whatever
    /// [`super::RecurrentConfig::batch_first`] says.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a tape of another layer, and a layer or direction that there is not; what the device
    /// reports.
    pub fn inspect(&self, tape: &RecurrentTape, layer: usize, direction: Direction) -> Result<Inspection> {
        let op = self.op("inspect");
        self.check_tape(&op, tape)?;
        let layers = &tape.layers;
        let Some(in_layer) = layers.get(layer) else {
            return Err(Error::argument(&op, "layer", layer, format!("below the {} layers that there are", layers.len())));
        };
        let passes = self.config.direction.passes();
        let Some(at) = passes.iter().position(|reverse| pass_direction(*reverse) == direction) else {
            let known: Vec<String> = passes.iter().map(|reverse| format!("{:?}", pass_direction(*reverse))).collect();
            return Err(Error::argument(&op, "direction", format!("{direction:?}"), known.join(" or ")));
        };
        let (pass, lines, hidden) = (&in_layer.passes[at], tape.steps * tape.rows, self.config.hidden);
        let gather = |table: &Tensor, width: usize, place: &dyn Fn(usize) -> usize| -> Result<Tensor> {
            let places: Vec<u32> = (0..lines).map(|line| u32::try_from(place(line)).unwrap_or(u32::MAX)).collect();
            let places = Ids::from_slice(&self.device, &places, [lines])?;
            gather::gather(places.tensor(), table, width)?.reshape([tape.steps, tape.rows, width])
        };
        let mut states = Vec::new();
        for (s, name) in C::Value::NAMES.iter().enumerate() {
            let (table, width, start) = self.states_of(tape, pass, s, passes[at]);
            let first = start / width;
            let place = |line: usize| match tape.is_forced() && !is_valid(tape.lengths.as_ref(), tape.rows, line) {
                // There a row has no state of its own past its end.
                true => {
                    let row = line % tape.rows;
                    match tape.lengths.as_ref().map_or(tape.steps, |lengths| lengths.host()[row] as usize) {
                        0 => row,
                        length => first + (length - 1) * tape.rows + row,
                    }
                }
                false => first + line,
            };
            states.push((*name, gather(table, width, &place)?));
        }
        let mut gates = Vec::new();
        for (gate, name) in C::GATES.iter().enumerate() {
            let place = |line: usize| match is_valid(tape.lengths.as_ref(), tape.rows, line) {
                true => line * C::Slots::LEN + gate,
                false => usize::MAX,
            };
            gates.push((*name, gather(&pass.slots, hidden, &place)?));
        }
        let activations = (0..C::GATES.len()).map(|gate| self.config.cell.gate_activation(gate)).collect();
        Ok(Inspection { states, gates, activations, lengths: tape.lengths.clone() })
    }

    /// The first number that is NaN or infinite, in the order of computation: layer by layer, in each by direction, step by step as
    /// the direction reads them, in each step x, the gates in their order, the states in theirs; in each of these the lowest row,
    /// then the lowest unit. Only valid steps count. Reads the whole tape back, for use when something went wrong.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a tape of another layer; what the device reports.
    pub fn first_non_finite(&self, tape: &RecurrentTape) -> Result<Option<NonFinite>> {
        self.check_tape(&self.op("first_non_finite"), tape)?;
        let (rows, hidden, lengths) = (tape.rows, self.config.hidden, tape.lengths.as_ref());
        for (layer, in_layer) in tape.layers.iter().enumerate() {
            let (x, inputs) = (in_layer.x.to_vec()?, in_layer.x.len() / (tape.steps * rows));
            for (pass, reverse) in in_layer.passes.iter().zip(self.config.direction.passes()) {
                let slots = pass.slots.to_vec()?;
                let mut quantities = vec![(Quantity::Input, x.clone(), inputs, 0, inputs)];
                for (gate, name) in C::GATES.iter().enumerate() {
                    quantities.push((Quantity::Gate(name), slots.clone(), hidden, gate * hidden, C::Slots::LEN * hidden));
                }
                for (s, name) in C::Value::NAMES.iter().enumerate() {
                    let (table, width, start) = self.states_of(tape, pass, s, *reverse);
                    quantities.push((Quantity::State(name), table.to_vec()?, width, start, width));
                }
                for n in 0..tape.steps {
                    let step = if *reverse { tape.steps - 1 - n } else { n };
                    for (quantity, values, width, start, stride) in &quantities {
                        let found = first_in_step(values, [rows, *width], step, lengths, *start, *stride);
                        if let Some((row, unit, value)) = found {
                            let (direction, quantity) = (pass_direction(*reverse), *quantity);
                            return Ok(Some(NonFinite { layer, direction, step, row, unit, quantity, value }));
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// Where state `s` after each step lies: the table, the numbers of a line, and the first word of `[T, B, width]`.
    fn states_of<'a>(
        &self,
        tape: &RecurrentTape,
        pass: &'a super::PassTape,
        s: usize,
        reverse: bool,
    ) -> (&'a Tensor, usize, usize) {
        let width = self.width_of(s);
        let block = tape.rows * width;
        match &pass.outputs {
            // All steps of all rows are one step's rows there.
            Some(outputs) if s == 0 && tape.is_forced() => (outputs, width, tape.steps * block),
            Some(outputs) if s == 0 => (outputs, width, if reverse { 0 } else { block }),
            _ => (&pass.states, width, (s * (tape.steps + 1) + usize::from(!reverse)) * block),
        }
    }

    fn check_tape(&self, op: &str, tape: &RecurrentTape) -> Result<()> {
        match tape.owner.same(self.owner()) {
            true => Ok(()),
            false => Err(Error::argument(op, "tape", "of another layer", "the tape of this layer's forward_train")),
        }
    }
}

impl RecurrentTape {
    /// Whether a teacher stood in for every output, so that nothing recurred.
    fn is_forced(&self) -> bool {
        self.teacher.as_ref().is_some_and(|(_, probability)| *probability >= 1.0)
    }
}

/// A pass's direction by itself.
pub(super) fn pass_direction(reverse: bool) -> Direction {
    if reverse { Direction::Reverse } else { Direction::Forward }
}
