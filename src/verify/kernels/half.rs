//! Layers in half precision: against an oracle that rounds the same factors, and, with wider bounds, against one that rounds nothing.

use super::harness::{Cases, TIGHT, normal, wide};
use super::networks::{HIDDEN, INPUT, Network, check};
use crate::error::Result;
use crate::nn::{
    Cell, Direction, GruConfig, IndRnnConfig, LinearConfig, LstmConfig, MinGruConfig, MinLstmConfig, Module, Precision,
    RecurrentConfig, Reset, RnnConfig, SLstmConfig,
};
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::verify::oracle;

/// Outputs and gradients of recurrent layers beside the rounding oracle: f32 and f64 may round a number that lies by a midpoint to
/// different sides, and a step hands that on to the next.
///
/// Narrower than what rounding changes in a whole network, so that one which rounds nothing fails; single products are compared
/// in `gemm_half` and `half_linear`, with the bounds of single precision.
const ROUNDED: [f64; 2] = [1.5e-4, 4e-4];
/// Beside the oracle that rounds nothing: what half precision costs.
const UNROUNDED: [f64; 2] = [1.5e-3, 3e-3];
/// What divides by a deviation makes either larger.
const NORMALIZED: [[f64; 2]; 2] = [[1.5e-3, 3e-3], [1e-2, 2e-2]];

/// Both comparisons of a network.
fn both<C: Cell>(cases: &mut Cases<'_>, make: impl Fn() -> Network<C>) -> Result<()> {
    let network = || Network { config: make().config.precision(Precision::Half), ..make() };
    let rounded = network();
    let oracle = oracle::Recurrent { half: true, ..rounded.oracle };
    let bounds = if rounded.oracle.layer_norm { NORMALIZED } else { [ROUNDED, UNROUNDED] };
    check(cases, Network { name: format!("{}_rounded", rounded.name), oracle, bounds: bounds[0], ..rounded })?;
    check(cases, Network { bounds: bounds[1], ..network() })
}

pub(super) fn half_networks(cases: &mut Cases<'_>) -> Result<()> {
    use oracle::Cell as C;
    every_cell(cases, "lstm", LstmConfig::new(INPUT, HIDDEN), C::LSTM)?;
    every_cell(cases, "gru", GruConfig::new(INPUT, HIDDEN), C::GRU)?;
    every_cell(cases, "rnn", RnnConfig::new(INPUT, HIDDEN), C::RNN)?;
    every_cell(cases, "indrnn", IndRnnConfig::new(INPUT, HIDDEN), C::IndRnn { activation: oracle::Activation::Relu })?;
    every_cell(cases, "slstm", SLstmConfig::new(INPUT, HIDDEN), C::SLstm)?;
    every_cell(cases, "min_gru", MinGruConfig::new(INPUT, HIDDEN), C::MinGru)?;
    every_cell(cases, "min_lstm", MinLstmConfig::new(INPUT, HIDDEN), C::MinLstm)?;

    // What takes products of its own.
    let lstm = || LstmConfig::new(INPUT, HIDDEN).layers(2).direction(Direction::Both);
    let lstm64 = oracle::Recurrent { layers: 2, directions: 2, ..oracle::Recurrent::new(C::LSTM, INPUT, HIDDEN) };
    let projection = oracle::Recurrent { projection: Some(7), ..lstm64 };
    both(cases, || Network::new("lstm_projection", lstm().projection(7), projection))?;
    let norm = oracle::Recurrent { layer_norm: true, ..lstm64 };
    both(cases, || Network::new("lstm_layer_norm", lstm().layer_norm(true), norm))?;
    both(cases, || Network {
        recurrent_dropout: 0.4,
        ..Network::new("lstm_recurrent_dropout", lstm().recurrent_dropout(0.4), lstm64)
    })?;
    both(cases, || Network {
        weight_dropout: 0.4,
        zoneout: [0.3, 0.2],
        ..Network::new("lstm_weight_dropout_zoneout", lstm().weight_dropout(0.4).zoneout(0.3, 0.2), lstm64)
    })?;
    let gru = || GruConfig::new(INPUT, HIDDEN).reset(Reset::BeforeProduct);
    both(cases, || Network::new("gru_reset_before", gru(), oracle::Recurrent::new(C::GRU_RESET_BEFORE, INPUT, HIDDEN)))?;
    let jordan = oracle::Recurrent { projection: Some(4), ..oracle::Recurrent::new(C::RNN, INPUT, HIDDEN) };
    both(cases, || Network::new("rnn_jordan", RnnConfig::new(INPUT, HIDDEN).jordan(4), jordan))
}

fn every_cell<C: Cell>(cases: &mut Cases<'_>, name: &str, config: RecurrentConfig<C>, cell: oracle::Cell) -> Result<()> {
    let one = oracle::Recurrent::new(cell, INPUT, HIDDEN);
    let deep = oracle::Recurrent { layers: 2, directions: 2, ..one };
    both(cases, || Network::new(format!("{name}_one_layer"), config.clone(), one))?;
    both(cases, || Network::new(format!("{name}_deep"), config.clone().layers(2).direction(Direction::Both), deep))
}

/// All factors are given: beside the rounding oracle the bounds of a product in single precision hold.
pub(super) fn half_linear(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(12);
    for [rows, input, output] in [[1, 1, 1], [3, 5, 7], [17, 64, 9], [40, 33, 130]] {
        let layer = LinearConfig::new(input, output).precision(Precision::Half).init(cases.device, &mut rng)?;
        let [x, dy] = [input, output].map(|width| normal(&mut rng, rows * width));
        let value = |name: &str| -> Result<Vec<f64>> {
            let found = layer.params().into_iter().find(|(full, _)| full == name);
            found.map_or(Ok(Vec::new()), |(_, param)| Ok(wide(&param.value().to_vec()?)))
        };
        let (weight, bias) = (value("weight")?, value("bias")?);
        cases.run(format!("linear of {rows} rows from {input} to {output}"), |run| {
            layer.zero_grad()?;
            let (x64, dy64) = (wide(&x), wide(&dy));
            let (x, dy) = (run.input("x", &x, [rows, input])?, run.input("dy", &dy, [rows, output])?);
            let (y, dx) = (layer.forward(&x)?, layer.backward(&x, &dy, true)?);
            let gradients: Vec<&Tensor> = layer.params().into_iter().map(|(_, param)| param.grad()).collect();
            for (kind, round, bounds) in
                [("rounded", oracle::half as fn(f64) -> f64, [TIGHT, TIGHT]), ("unrounded", |factor| factor, UNROUNDED)]
            {
                let [x64, dy64, weight] =
                    [&x64, &dy64, &weight].map(|values| values.iter().map(|v| round(*v)).collect::<Vec<_>>());
                run.near(&format!("{kind} y"), &y, &oracle::linear(&x64, &weight, Some(&bias), input, output), bounds[0])?;
                let expected = oracle::linear_backward(&x64, &weight, &dy64, input, output);
                for (dx, gradients) in dx.iter().map(|dx| (dx, &gradients)) {
                    run.near(&format!("{kind} dx"), dx, &expected.dx, bounds[1])?;
                    run.near(&format!("{kind} grad.weight"), gradients[0], &expected.dweight, bounds[1])?;
                }
            }
            // The gradient of the bias is a sum, not a product: nothing is rounded.
            let exact = oracle::linear_backward(&x64, &weight, &dy64, input, output);
            run.near("grad.bias", gradients[1], &exact.dbias, TIGHT)
        })?;
    }
    Ok(())
}
