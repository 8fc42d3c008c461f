//! What a recurrent layer tells of itself: states against the oracle's, and the norms of their gradients.

use super::harness::{Cases, GRADIENT, OUTPUT, Run, normal, ragged};
use super::networks::{Given, HIDDEN, INPUT, Network, check, check_given};
use crate::error::Result;
use crate::kernels::cell_contract::Block;
use crate::nn::{
    Cell, CellState, Direction, GruConfig, Input, LstmConfig, MinGruConfig, Module, Recurrent, Reset, RnnConfig, SLstmConfig,
};
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::verify::{Comparison, oracle};

pub(super) fn gradient_flow(cases: &mut Cases<'_>) -> Result<()> {
    let spec = |cell| oracle::Recurrent::new(cell, INPUT, HIDDEN);
    let deep = |cell| oracle::Recurrent { layers: 2, directions: 2, ..spec(cell) };
    let lstm = || LstmConfig::new(INPUT, HIDDEN);
    let (gru, rnn) = (GruConfig::new(INPUT, HIDDEN), RnnConfig::new(INPUT, HIDDEN));
    let (lstm64, gru64, rnn64) = (oracle::Cell::LSTM, oracle::Cell::GRU, oracle::Cell::RNN);
    let deep_lstm = || lstm().layers(2).direction(Direction::Both);
    let peepholes = match lstm64 {
        oracle::Cell::Lstm { gate, candidate, output, .. } => {
            oracle::Cell::Lstm { gate, candidate, output, peepholes: true, coupled: false, cell_clip: Some(0.25) }
        }
        cell => cell,
    };
    let projected = |spec: oracle::Recurrent| oracle::Recurrent { projection: Some(7), ..spec };
    for network in [
        Network::new("lstm", deep_lstm(), deep(lstm64)),
        Network::new("lstm_projection", deep_lstm().projection(7), projected(deep(lstm64))),
        // With sums of their own in front of the flow.
        Network::new("lstm_peepholes_cell_clip", lstm().peepholes(true).cell_clip(0.25), spec(peepholes)),
        Network { zoneout: [0.3, 0.2], ..Network::new("lstm_zoneout", deep_lstm().zoneout(0.3, 0.2), deep(lstm64)) },
    ] {
        check(cases, Network { flow: true, ..network })?;
    }
    check(cases, Network { flow: true, ..Network::new("gru", gru.clone().layers(2).direction(Direction::Both), deep(gru64)) })?;
    for network in [
        Network::new(
            "gru_reset_before",
            gru.clone().reset(Reset::BeforeProduct).gradient_clip(1e6),
            spec(oracle::Cell::GRU_RESET_BEFORE),
        ),
        Network::new(
            "gru_layer_norm",
            gru.clone().layer_norm(true).gradient_clip(1e6),
            oracle::Recurrent { layer_norm: true, ..spec(gru64) },
        ),
    ] {
        check(cases, Network { flow: true, ..network })?;
    }
    let slstm = SLstmConfig::new(INPUT, HIDDEN).layers(2).direction(Direction::Both);
    check(cases, Network { flow: true, ..Network::new("slstm", slstm, deep(oracle::Cell::SLstm)) })?;
    let min_gru = MinGruConfig::new(INPUT, HIDDEN).layers(2).direction(Direction::Both);
    check(cases, Network { flow: true, ..Network::new("min_gru", min_gru, deep(oracle::Cell::MinGru)) })?;
    let reverse = oracle::Recurrent { first_reverse: true, ..spec(rnn64) };
    let both = oracle::Recurrent { directions: 2, ..spec(rnn64) };
    for network in [
        Network::new("rnn", rnn.clone().layers(2).direction(Direction::Both), deep(rnn64)),
        // A bound that is never reached.
        Network::new("rnn_reverse_gradient_clip", rnn.clone().direction(Direction::Reverse).gradient_clip(1e6), reverse),
        Network::new("rnn_both_gradient_clip", rnn.clone().direction(Direction::Both).gradient_clip(1e6), both),
    ] {
        check(cases, Network { flow: true, ..network })?;
    }
    let jordan = Network { flow: true, ..Network::new("rnn_jordan", rnn.jordan(7), projected(spec(rnn64))) };
    for (name, probability) in [("jordan_forced", 1.0), ("jordan_scheduled", 0.5)] {
        let mut rng = Rng::seed(5);
        let layer = jordan.config.clone().init(cases.device, &mut rng)?;
        let (steps, rows) = (7, 5);
        let lengths = Some(ragged(&mut rng, steps, rows));
        let x = normal(&mut rng, steps * rows * INPUT);
        let [dy, targets] = [0; 2].map(|_| normal(&mut rng, steps * rows * 7));
        let [state, dstate] = [0; 2].map(|_| vec![normal(&mut rng, rows * 7)]);
        let given = Given { steps, rows, lengths, x, dy, state, dstate };
        check_given(cases, name, &jordan, &layer, &given, Some((&targets, probability)))?;
    }
    Ok(())
}

/// The states of a training run and the norms of their gradients, and that asking for these changes no bit of the others.
pub(super) fn check_flow<C: Cell>(
    run: &mut Run<'_>,
    spec: &oracle::Recurrent,
    layer: &Recurrent<C>,
    (x, input): (&Tensor, Input<'_, C::Value>),
    (dy, dstate): (&Tensor, Option<&C::Value>),
    trained: &oracle::RecurrentOutput,
) -> Result<()> {
    let results = |dx: &Tensor, first: &C::Value| -> Result<Vec<u32>> {
        let mut words: Vec<u32> = dx.read_back()?;
        for tensor in first.tensors() {
            words.extend(tensor.read_back::<u32>()?);
        }
        for (_, param) in layer.params() {
            words.extend(param.grad().read_back::<u32>()?);
        }
        Ok(words)
    };
    layer.zero_grad()?;
    let (dx, first) = layer.backward(layer.forward_train(x, input)?.2, dy, dstate)?;
    let plain = results(&dx, &first)?;
    layer.zero_grad()?;
    let (.., tape) = layer.forward_train(x, input)?;
    let direction = |slot: usize| match spec.first_reverse || slot % spec.directions == 1 {
        true => Direction::Reverse,
        false => Direction::Forward,
    };
    for slot in 0..spec.layers * spec.directions {
        let seen = layer.inspect(&tape, slot / spec.directions, direction(slot))?;
        for ((name, state), expected) in seen.states().iter().zip(&trained.states[slot]) {
            run.near(&format!("{name} of {slot}"), state, expected, OUTPUT)?;
        }
    }
    let nowhere = layer.first_non_finite(&tape)?.is_some() as u8;
    let (dx, first, flow) = layer.backward_with_flow(tape, dy, dstate)?;
    run.comparisons.push(Comparison::bits("backward with and without flow", &results(&dx, &first)?, &plain));
    let found = [nowhere, flow.first_non_finite().is_some() as u8].map(u32::from);
    run.comparisons.push(Comparison::bits("numbers that are not finite", &found, &[0; 2]));
    let count = [flow.states().len() as u32];
    run.comparisons.push(Comparison::bits("lines", &count, &[(spec.layers * spec.directions * C::State::LEN) as u32]));
    for (line, flow) in flow.states().iter().enumerate() {
        let (slot, s) = (line / C::State::LEN, line % C::State::LEN);
        let place = (flow.layer, flow.direction, flow.state) == (slot / spec.directions, direction(slot), C::Value::NAMES[s]);
        run.comparisons.push(Comparison::bits(format!("place of line {line}"), &[u32::from(place)], &[1]));
        let dh = &trained.dh[slot][s];
        let expected = dh.chunks_exact(dh.len() / flow.norms.len()).map(|d| d.iter().map(|d| d * d).sum::<f64>().sqrt());
        // Each step by itself: a small norm is as good as a large one.
        for (t, (norm, expected)) in flow.norms.iter().zip(expected).enumerate() {
            let name = format!("|d{}| of {slot} at {t}", flow.state);
            // An sLSTM's h does not depend on m: what is left of its gradient is rounding.
            let expected = if expected < 1e-9 { 0.0 } else { expected };
            run.comparisons.push(Comparison::new(name, &[*norm as f32], &[expected], GRADIENT));
        }
    }
    Ok(())
}
