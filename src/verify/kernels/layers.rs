//! Whole layers: their results, and what must not matter to them.

use super::dropout::mask;
use super::harness::{Cases, GRADIENT, NAN, OUTPUT, Run, normal, pad, ragged, to_bits, wide};
use crate::device::Device;
use crate::error::Result;
use crate::nn::{Direction, Input, Lstm, LstmConfig, LstmState, Module};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Lengths, Tensor};
use crate::verify::Comparison;
use crate::verify::oracle::{self, Cell, Recurrent, RecurrentInput};

#[derive(Clone, Copy)]
struct Layers {
    input: usize,
    hidden: usize,
    layers: usize,
    direction: Direction,
    /// T, B.
    size: [usize; 2],
    ragged: bool,
    bias: bool,
    batch_first: bool,
    dropout: f32,
    /// Initial states and gradients of final states are given.
    state: bool,
}

pub(super) fn lstm_layers(cases: &mut Cases<'_>) -> Result<()> {
    use Direction::{Both, Forward, Reverse};
    let mut rng = Rng::seed(13);
    let base = Layers {
        input: 3,
        hidden: 5,
        layers: 1,
        direction: Forward,
        size: [4, 3],
        ragged: false,
        bias: true,
        batch_first: false,
        dropout: 0.0,
        state: true,
    };
    for layers in [
        Layers { input: 1, hidden: 1, size: [1, 1], state: false, ..base },
        Layers { ragged: true, ..base },
        Layers { direction: Reverse, size: [5, 4], ..base },
        Layers { direction: Reverse, ragged: true, size: [5, 6], layers: 2, ..base },
        Layers { direction: Both, layers: 2, ragged: true, size: [6, 5], ..base },
        Layers { direction: Both, layers: 3, bias: false, hidden: 17, state: false, ..base },
        Layers { layers: 3, bias: false, ragged: true, size: [5, 7], ..base },
        Layers { batch_first: true, direction: Both, ragged: true, size: [3, 5], ..base },
        Layers { batch_first: true, layers: 2, size: [7, 2], state: false, ..base },
        Layers { dropout: 0.5, layers: 3, direction: Both, size: [4, 9], ..base },
        Layers { dropout: 0.1, layers: 2, ragged: true, batch_first: true, size: [8, 5], hidden: 20, ..base },
        Layers { input: 70, hidden: 65, layers: 2, direction: Both, size: [5, 9], ragged: true, ..base },
        Layers { input: 9, hidden: 130, size: [3, 17], ..base },
    ] {
        check_layers(cases, &mut rng, layers)?;
    }
    Ok(())
}

fn check_layers(cases: &mut Cases<'_>, rng: &mut Rng, layers: Layers) -> Result<()> {
    let Layers { input, hidden, direction, size: [steps, rows], bias, batch_first, dropout, .. } = layers;
    let directions = if direction == Direction::Both { 2 } else { 1 };
    let (width, slots) = (directions * hidden, layers.layers * directions);
    let lengths = layers.ragged.then(|| ragged(rng, steps, rows));
    let lengths = lengths.as_deref();
    let mut x = normal(rng, steps * rows * input);
    let mut dy = normal(rng, steps * rows * width);
    // A product with a gradient of 0 brings NaN along, so what stands in x's padding must be finite.
    pad(&mut x, input, lengths, rows, -100.0);
    pad(&mut dy, width, lengths, rows, NAN);
    let block = slots * rows * hidden;
    let mut states = || if layers.state { normal(rng, block) } else { vec![0.0; block] };
    let [h0, c0, dh, dc] = [states(), states(), states(), states()];
    let config = LstmConfig::new(input, hidden).layers(layers.layers).direction(direction).bias(bias);
    let config = config.batch_first(batch_first).dropout(dropout);
    let make = |device: &Device, values: &[Vec<f32>]| -> Result<Lstm> {
        let lstm = config.clone().init(device, &mut Rng::seed(0))?;
        lstm.params().iter().zip(values).try_for_each(|((_, param), values)| param.set(values))?;
        Ok(lstm)
    };
    let of = make(cases.device, &[])?;
    let names: Vec<String> = of.params().into_iter().map(|(name, _)| name).collect();
    let scale = 1.5 / (hidden as f32).sqrt();
    let sizes: Vec<usize> = of.params().iter().map(|(_, param)| param.value().len()).collect();
    let values: Vec<Vec<f32>> = sizes.iter().map(|n| normal(rng, *n).into_iter().map(|w| w * scale).collect()).collect();

    let key = MaskKey::new(5, 6);
    let masks: Vec<Vec<f64>> = (0..layers.layers - 1)
        .filter(|_| dropout > 0.0)
        .map(|layer| wide(&mask(steps, rows, width, dropout, key.layer(layer))))
        .collect();
    let reverse = direction == Direction::Reverse;
    let spec = Recurrent {
        layers: layers.layers,
        directions,
        bias,
        first_reverse: reverse,
        ..Recurrent::new(Cell::LSTM, input, hidden)
    };
    let mut at = values.iter().map(|values| wide(values));
    let weights: Vec<oracle::Weights> = (0..slots)
        .map(|slot| spec.parts(slot / directions).into_iter().map(|(name, _)| name.to_owned()).zip(at.by_ref()).collect())
        .collect();
    let oracle_lengths: Option<Vec<usize>> = lengths.map(|lengths| lengths.iter().map(|n| *n as usize).collect());
    let [h64, c64, dh64, dc64] = [&h0, &c0, &dh, &dc].map(|state| wide(state));
    let want = spec.forward_backward(
        &weights,
        RecurrentInput {
            batch: rows,
            x: &wide(&x),
            state: &[&h64, &c64],
            lengths: oracle_lengths.as_deref(),
            masks: &masks,
            dy: &wide(&dy),
            dstate: &[&dh64, &dc64],
            ..RecurrentInput::default()
        },
    );
    // In the order of the layer's parameters.
    let gradient = |slot: usize| spec.parts(slot / directions).into_iter().map(move |(name, _)| (slot, name));
    let gradients: Vec<&Vec<f64>> = (0..slots).flat_map(gradient).map(|(slot, name)| &want.dweights[slot][name]).collect();
    // [T, B, ..] as the layer has it.
    let edge32 = |values: &[f32], width: usize| if batch_first { swap(values, width, steps, rows) } else { values.to_vec() };
    let edge = |values: &[f64], width: usize| if batch_first { swap(values, width, steps, rows) } else { values.to_vec() };
    let (y, dx) = (edge(&want.y, width), edge(&want.dx, input));
    let shape = |width: usize| if batch_first { [rows, steps, width] } else { [steps, rows, width] };

    let name = format!(
        "{input}->{hidden} x{} {direction:?} {steps}x{rows}{}{}{}{}{}",
        layers.layers,
        lengths.map_or(String::new(), |lengths| format!(" lengths {lengths:?}")),
        if bias { "" } else { " no bias" },
        if batch_first { " batch first" } else { "" },
        if dropout > 0.0 { format!(" dropout {dropout}") } else { String::new() },
        if layers.state { "" } else { " no state" },
    );
    cases.run(name, |run| {
        let lstm = make(run.device, &values)?;
        let x = run.input("x", &edge32(&x, input), shape(input))?;
        let dy = run.input("dy", &edge32(&dy, width), shape(width))?;
        let mut state = |h: &[f32], c: &[f32]| -> Result<LstmState> {
            let shape = [slots, rows, hidden];
            Ok(LstmState { h: run.input("h", h, shape)?, c: run.input("c", c, shape)? })
        };
        let (state, dstate) = (state(&h0, &c0)?, state(&dh, &dc)?);
        let lengths = run.lengths(lengths)?;
        let mut given = Input::new().key(key);
        given = lengths.as_ref().map_or(given, |lengths| given.lengths(lengths));
        given = if layers.state { given.state(&state) } else { given };
        if dropout == 0.0 {
            let (computed, last) = lstm.forward(&x, given)?;
            run.near("infer.y", &computed, &y, OUTPUT)?;
            run.near("infer.hn", &last.h, &want.state[0], OUTPUT)?;
            run.near("infer.cn", &last.c, &want.state[1], OUTPUT)?;
        }
        let (computed, last, tape) = lstm.forward_train(&x, given)?;
        run.near("y", &computed, &y, OUTPUT)?;
        run.near("hn", &last.h, &want.state[0], OUTPUT)?;
        run.near("cn", &last.c, &want.state[1], OUTPUT)?;
        let (computed, dfirst) = lstm.backward(tape, &dy, layers.state.then_some(&dstate))?;
        run.near("grad.x", &computed, &dx, GRADIENT)?;
        run.near("grad.h0", &dfirst.h, &want.dstate[0], GRADIENT)?;
        run.near("grad.c0", &dfirst.c, &want.dstate[1], GRADIENT)?;
        for (((_, param), name), gradient) in lstm.params().iter().zip(&names).zip(&gradients) {
            run.near(&format!("grad.{name}"), param.grad(), gradient, GRADIENT)?;
        }
        // A second pass adds to the gradients of the parameters.
        let (_, _, tape) = lstm.forward_train(&x, given)?;
        lstm.backward(tape, &dy, layers.state.then_some(&dstate))?;
        for (((_, param), name), gradient) in lstm.params().iter().zip(&names).zip(&gradients) {
            let twice: Vec<f64> = gradient.iter().map(|g| 2.0 * g).collect();
            run.near(&format!("twice grad.{name}"), param.grad(), &twice, GRADIENT)?;
        }
        Ok(())
    })
}

/// `[rows, steps, width]` from `[steps, rows, width]`.
fn swap<T: Copy>(values: &[T], width: usize, steps: usize, rows: usize) -> Vec<T> {
    let line = |line: usize| &values[(line % steps * rows + line / steps) * width..][..width];
    (0..rows * steps).flat_map(line).copied().collect()
}

// ---- what must not matter ----

/// How a sequence is cut, who else is in the batch, and what padding there is changes nothing, but for rounding.
pub(super) fn lstm_properties(cases: &mut Cases<'_>) -> Result<()> {
    const SAME: f64 = 1e-6;
    let mut rng = Rng::seed(14);
    for (layers, hidden, rows) in [(1, 5, 3), (2, 17, 5), (2, 66, 9)] {
        let (steps, input) = (6, 4);
        let lengths: Vec<u32> = (0..rows as u32).map(|row| (row * 5 + 3) % 7).collect();
        let x = normal(&mut rng, steps * rows * input);
        let dy = normal(&mut rng, steps * rows * hidden);
        let config = |direction| LstmConfig::new(input, hidden).layers(layers).direction(direction);
        let part = |values: &[f32], width: usize, from: usize, to: usize, row: Option<usize>| -> Vec<f32> {
            let lines = (from * rows..to * rows).filter(|line| row.is_none_or(|row| line % rows == row));
            lines.flat_map(|line| &values[line * width..][..width]).copied().collect()
        };
        let equal = |run: &mut Run<'_>, name: &str, computed: &[f32], expected: &[f32]| {
            run.words.extend(to_bits(computed));
            run.comparisons.push(Comparison::new(name, computed, &wide(expected), SAME));
        };

        cases.run(format!("{layers} layers of {hidden}, {rows} rows: in steps and in chunks"), |run| {
            let lstm = config(Direction::Forward).init(run.device, &mut Rng::seed(3))?;
            let tensor = |from: usize, to: usize| {
                Tensor::from_slice(run.device, &part(&x, input, from, to, None), [to - from, rows, input])
            };
            let (whole, last) = lstm.forward(&tensor(0, steps)?, None)?;
            let (whole, h, c) = (whole.to_vec()?, last.h.to_vec()?, last.c.to_vec()?);
            let mut state: Option<LstmState> = None;
            let mut outputs = Vec::new();
            for t in 0..steps {
                let x = tensor(t, t + 1)?.reshape([rows, input])?;
                let (y, next) = lstm.step(&x, state.as_ref())?;
                outputs.extend(y.to_vec()?);
                state = Some(next);
            }
            equal(run, "y in steps", &outputs, &whole);
            if let Some(next) = state {
                equal(run, "h in steps", &next.h.to_vec()?, &h);
                equal(run, "c in steps", &next.c.to_vec()?, &c);
            }
            for cut in [1, 4] {
                let (first, state) = lstm.forward(&tensor(0, cut)?, None)?;
                let (second, last) = lstm.forward(&tensor(cut, steps)?, &state)?;
                equal(run, "y in chunks", &[first.to_vec()?, second.to_vec()?].concat(), &whole);
                equal(run, "h in chunks", &last.h.to_vec()?, &h);
                equal(run, "c in chunks", &last.c.to_vec()?, &c);
            }
            Ok(())
        })?;

        cases.run(format!("{layers} layers of {hidden}, {rows} rows: alone and padded"), |run| {
            let lstm = config(Direction::Both).init(run.device, &mut Rng::seed(4))?;
            let width = 2 * hidden;
            let dy: Vec<f32> = [&dy[..], &dy[..]].concat();
            let pass = |x: &[f32], dy: &[f32], lengths: &[u32]| -> Result<[Vec<f32>; 2]> {
                let batch = lengths.len();
                let steps = x.len() / (batch * input);
                let x = Tensor::from_slice(run.device, x, [steps, batch, input])?;
                let dy = Tensor::from_slice(run.device, dy, [steps, batch, width])?;
                let lengths = Lengths::from_slice(run.device, lengths)?;
                let (y, _, tape) = lstm.forward_train(&x, Input::new().lengths(&lengths))?;
                let (dx, _) = lstm.backward(tape, &dy, None)?;
                Ok([y.to_vec()?, dx.to_vec()?])
            };
            let [y, dx] = pass(&x, &dy, &lengths)?;
            for (row, length) in lengths.iter().enumerate() {
                let of = |values: &[f32], width: usize| part(values, width, 0, steps, Some(row));
                let [y_alone, dx_alone] = pass(&of(&x, input), &of(&dy, width), &[*length])?;
                equal(run, &format!("y of row {row} alone"), &y_alone, &of(&y, width));
                equal(run, &format!("dx of row {row} alone"), &dx_alone, &of(&dx, input));
            }
            // Three more rows and two more steps.
            let padded = |values: &[f32], width: usize| -> Vec<f32> {
                let mut all = vec![7.0; (steps + 2) * (rows + 3) * width];
                for (t, lines) in values.chunks_exact(rows * width).enumerate() {
                    all[t * (rows + 3) * width..][..rows * width].copy_from_slice(lines);
                }
                all
            };
            let unpadded = |values: &[f32], width: usize| -> Vec<f32> {
                (0..steps).flat_map(|t| &values[t * (rows + 3) * width..][..rows * width]).copied().collect()
            };
            let more = [&lengths[..], &[0, 8, 3]].concat();
            let [y_padded, dx_padded] = pass(&padded(&x, input), &padded(&dy, width), &more)?;
            equal(run, "y of a padded batch", &unpadded(&y_padded, width), &y);
            equal(run, "dx of a padded batch", &unpadded(&dx_padded, input), &dx);
            Ok(())
        })?;
    }
    Ok(())
}
