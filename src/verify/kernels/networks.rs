//! The recurrent family: every cell with every option that it has, a whole stack at a time, against the oracle: inference,
//! training, all gradients, and streaming step by step.

use super::harness::{Cases, GRADIENT, OUTPUT, Run, normal, pad, ragged, wide, within};
use crate::error::Result;
use crate::kernels::cell_contract::Block;
use crate::nn::{
    Activation, Cell, CellState, Direction, GruConfig, IndRnnConfig, Input, LstmConfig, Merge, MinGruConfig, MinLstmConfig,
    Module, Recurrent, RecurrentConfig, Reset, RnnConfig, SLstmConfig,
};
use crate::rng::{MaskKey, Rng, philox, unit};
use crate::tensor::Tensor;
use crate::verify::Comparison;
use crate::verify::oracle::{self, RecurrentInput, Weights};

/// A network in both worlds.
pub(super) struct Network<C> {
    pub name: String,
    pub config: RecurrentConfig<C>,
    pub oracle: oracle::Recurrent,
    /// Probabilities of what draws masks, as given to the configuration.
    pub zoneout: [f32; 2],
    pub weight_dropout: f32,
    /// Between layers.
    pub dropout: f32,
    /// Whether the initial state is learned, where none is given.
    pub learns_state: bool,
    pub recurrent_dropout: f32,
    /// Whether a step at a time gives the same as all at once.
    pub streams: bool,
    /// Whether states and the flow of gradients are looked at too.
    pub flow: bool,
    /// Of outputs and of gradients.
    pub bounds: [f64; 2],
}

impl<C: Cell> Network<C> {
    pub fn new(name: impl Into<String>, config: RecurrentConfig<C>, oracle: oracle::Recurrent) -> Self {
        let streams = oracle.directions == 1 && !oracle.first_reverse;
        Self {
            name: name.into(),
            config,
            oracle,
            zoneout: [0.0; 2],
            weight_dropout: 0.0,
            recurrent_dropout: 0.0,
            dropout: 0.0,
            learns_state: false,
            streams,
            flow: false,
            // A norm over few units divides what was rounded by a spread that may be small: 4.97e-5 was seen.
            bounds: [OUTPUT, if oracle.layer_norm { 2.0 * GRADIENT } else { GRADIENT }],
        }
    }
}

const KEY: (u64, u64) = (11, 12);
pub(super) const INPUT: usize = 5;
pub(super) const HIDDEN: usize = 19;
const WIDE: usize = 70; // more than a workgroup has lanes

/// Every cell and option: `cell_option` is the case of a mark in the README's table.
pub(super) fn networks(cases: &mut Cases<'_>) -> Result<()> {
    use oracle::Cell as C;
    every_option(cases, "lstm", LstmConfig::new(INPUT, HIDDEN), C::LSTM)?;
    every_option(cases, "gru", GruConfig::new(INPUT, HIDDEN), C::GRU)?;
    every_option(cases, "rnn", RnnConfig::new(INPUT, HIDDEN), C::RNN)?;
    every_option(cases, "indrnn", IndRnnConfig::new(INPUT, HIDDEN), C::IndRnn { activation: oracle::Activation::Relu })?;
    every_option(cases, "slstm", SLstmConfig::new(INPUT, HIDDEN), C::SLstm)?;
    every_option(cases, "min_gru", MinGruConfig::new(INPUT, HIDDEN), C::MinGru)?;
    every_option(cases, "min_lstm", MinLstmConfig::new(INPUT, HIDDEN), C::MinLstm)?;
    lstms(cases)?;
    grus(cases)?;
    rnns(cases)?;
    indrnns(cases)?;
    gradient_clip(cases)
}

/// What every cell has, and masks on the recurrent product where there is one.
fn every_option<C: Cell>(cases: &mut Cases<'_>, name: &str, config: RecurrentConfig<C>, cell: oracle::Cell) -> Result<()> {
    let one = oracle::Recurrent::new(cell, INPUT, HIDDEN);
    let config = || config.clone();
    let deep = || config().layers(2).direction(Direction::Both);
    let deep64 = oracle::Recurrent { layers: 2, directions: 2, ..one };
    let network = |option: &str, config: RecurrentConfig<C>, spec| Network::new(format!("{name}_{option}"), config, spec);
    let merged = |option: &str, merge: Merge, merge64: oracle::Merge| {
        network(option, deep().merge(merge), oracle::Recurrent { merge: merge64, ..deep64 })
    };
    let held = [0.3, if C::State::LEN == 2 { 0.2 } else { 0.0 }];
    let mut table = vec![
        network("one_layer", config(), one),
        network("deep", deep(), deep64),
        network("reverse", config().direction(Direction::Reverse), oracle::Recurrent { first_reverse: true, ..one }),
        network("no_bias", config().bias(false), oracle::Recurrent { bias: false, ..one }),
        Network { dropout: 0.3, ..network("dropout", deep().dropout(0.3), deep64) },
        Network { zoneout: held, ..network("zoneout", config().zoneout(held[0], held[1]), one) },
        Network { zoneout: held, ..network("zoneout_deep", deep().zoneout(held[0], held[1]), deep64) },
        network("residual", config().layers(3).residual(true), oracle::Recurrent { layers: 3, residual: true, ..one }),
        merged("merge_sum", Merge::Sum, oracle::Merge::Sum),
        merged("merge_mean", Merge::Mean, oracle::Merge::Mean),
        merged("merge_product", Merge::Product, oracle::Merge::Product),
        Network { learns_state: true, ..network("learned_state", config().learn_initial_state(true), one) },
    ];
    if C::PRODUCT {
        table.extend([
            Network { recurrent_dropout: 0.4, ..network("recurrent_dropout", config().recurrent_dropout(0.4), one) },
            Network { recurrent_dropout: 0.3, ..network("recurrent_dropout_deep", deep().recurrent_dropout(0.3), deep64) },
            Network { weight_dropout: 0.4, ..network("weight_dropout", config().weight_dropout(0.4), one) },
            Network { weight_dropout: 0.4, ..network("weight_dropout_deep", deep().weight_dropout(0.4), deep64) },
        ]);
    }
    table.into_iter().try_for_each(|network| check(cases, network))
}

fn lstms(cases: &mut Cases<'_>) -> Result<()> {
    use oracle::Activation as A;
    let config = || LstmConfig::new(INPUT, HIDDEN);
    let plain = || oracle::Recurrent::new(oracle::Cell::LSTM, INPUT, HIDDEN);
    let cell = |peepholes: bool, coupled: bool, cell_clip: Option<f64>| oracle::Cell::Lstm {
        gate: A::Sigmoid,
        candidate: A::Tanh,
        output: A::Tanh,
        peepholes,
        coupled,
        cell_clip,
    };
    let acts = |gate, candidate, output| oracle::Cell::Lstm {
        gate,
        candidate,
        output,
        peepholes: false,
        coupled: false,
        cell_clip: None,
    };
    let hard = Activation::HardSigmoid { alpha: 0.2, beta: 0.5 };
    let hard64 = A::HardSigmoid { alpha: f64::from(0.2f32), beta: 0.5 };
    let deep = |config: LstmConfig| config.layers(2).direction(Direction::Both);
    let deep64 = |spec: oracle::Recurrent| oracle::Recurrent { layers: 2, directions: 2, ..spec };
    let elu = Activation::Elu { alpha: 0.7 };
    let elu64 = A::Elu { alpha: f64::from(0.7f32) };
    let table = vec![
        Network::new("lstm_projection", config().projection(7), oracle::Recurrent { projection: Some(7), ..plain() }),
        Network::new(
            "lstm_projection_deep",
            deep(config().projection(7)),
            deep64(oracle::Recurrent { projection: Some(7), ..plain() }),
        ),
        Network::new("lstm_peepholes", config().peepholes(true), oracle::Recurrent { cell: cell(true, false, None), ..plain() }),
        Network::new(
            "lstm_peepholes_no_bias",
            config().peepholes(true).bias(false),
            oracle::Recurrent { cell: cell(true, false, None), bias: false, ..plain() },
        ),
        Network::new(
            "lstm_peepholes_deep",
            deep(config().peepholes(true)),
            deep64(oracle::Recurrent { cell: cell(true, false, None), ..plain() }),
        ),
        Network::new("lstm_coupled", config().coupled(true), oracle::Recurrent { cell: cell(false, true, None), ..plain() }),
        Network::new(
            "lstm_cell_clip",
            config().cell_clip(0.25),
            oracle::Recurrent { cell: cell(false, false, Some(0.25)), ..plain() },
        ),
        Network::new("lstm_gate_clip", config().gate_clip(0.5), oracle::Recurrent { pre_clip: Some(0.5), ..plain() }),
        Network::new(
            "lstm_all",
            deep(config().peepholes(true).coupled(true).cell_clip(0.5).gate_clip(1.0).projection(7)),
            deep64(oracle::Recurrent { cell: cell(true, true, Some(0.5)), pre_clip: Some(1.0), projection: Some(7), ..plain() }),
        ),
        Network::new(
            "lstm_hard_sigmoid_softsign_relu",
            config().activations(hard, Activation::Softsign, Activation::Relu),
            oracle::Recurrent { cell: acts(hard64, A::Softsign, A::Relu), ..plain() },
        ),
        Network::new(
            "lstm_softplus_elu",
            config().activations(Activation::Sigmoid, Activation::Softplus, elu),
            oracle::Recurrent { cell: acts(A::Sigmoid, A::Softplus, elu64), ..plain() },
        ),
        Network {
            dropout: 0.3,
            ..Network::new(
                "lstm_residual_merge_dropout",
                deep(config().projection(INPUT).merge(Merge::Sum).residual(true).dropout(0.3)),
                oracle::Recurrent { projection: Some(INPUT), residual: true, merge: oracle::Merge::Sum, ..deep64(plain()) },
            )
        },
        Network {
            learns_state: true,
            ..Network::new(
                "lstm_projection_learned_state",
                deep(config().projection(7).learn_initial_state(true)),
                oracle::Recurrent { projection: Some(7), ..deep64(plain()) },
            )
        },
        Network::new("lstm_layer_norm", config().layer_norm(true), norm64(plain())),
        Network::new("lstm_layer_norm_deep", deep(config().layer_norm(true)), deep64(norm64(plain()))),
        Network::new(
            "lstm_layer_norm_wide",
            LstmConfig::new(INPUT, WIDE).layer_norm(true),
            norm64(oracle::Recurrent::new(oracle::Cell::LSTM, INPUT, WIDE)),
        ),
        Network::new(
            "lstm_layer_norm_no_bias",
            config().layer_norm(true).bias(false).direction(Direction::Reverse),
            oracle::Recurrent { bias: false, first_reverse: true, ..norm64(plain()) },
        ),
        Network::new(
            "lstm_layer_norm_all",
            deep(config().layer_norm(true).peepholes(true).coupled(true).cell_clip(0.5).gate_clip(1.0).projection(7)),
            deep64(norm64(oracle::Recurrent {
                cell: cell(true, true, Some(0.5)),
                pre_clip: Some(1.0),
                projection: Some(7),
                ..plain()
            })),
        ),
        Network::new(
            "lstm_layer_norm_softsign",
            config().layer_norm(true).activations(hard, Activation::Tanh, Activation::Softsign),
            norm64(oracle::Recurrent { cell: acts(hard64, A::Tanh, A::Softsign), ..plain() }),
        ),
        Network {
            weight_dropout: 0.4,
            ..Network::new(
                "lstm_layer_norm_weight_dropout",
                deep(config().layer_norm(true).weight_dropout(0.4)),
                deep64(norm64(plain())),
            )
        },
        Network {
            recurrent_dropout: 0.4,
            ..Network::new(
                "lstm_layer_norm_recurrent_dropout",
                deep(config().layer_norm(true).recurrent_dropout(0.4)),
                deep64(norm64(plain())),
            )
        },
        Network {
            recurrent_dropout: 0.4,
            ..Network::new(
                "lstm_recurrent_dropout_projection",
                deep(config().recurrent_dropout(0.4).projection(7)),
                deep64(oracle::Recurrent { projection: Some(7), ..plain() }),
            )
        },
        Network {
            recurrent_dropout: 0.4,
            zoneout: [0.3, 0.2],
            ..Network::new("lstm_recurrent_dropout_zoneout", config().recurrent_dropout(0.4).zoneout(0.3, 0.2), plain())
        },
        Network {
            recurrent_dropout: 0.2,
            weight_dropout: 0.3,
            ..Network::new(
                "lstm_recurrent_dropout_all",
                deep(config().recurrent_dropout(0.2).weight_dropout(0.3).peepholes(true).gate_clip(1.0).bias(false)),
                deep64(oracle::Recurrent { cell: cell(true, false, None), pre_clip: Some(1.0), bias: false, ..plain() }),
            )
        },
    ];
    table.into_iter().try_for_each(|network| check(cases, network))
}

fn grus(cases: &mut Cases<'_>) -> Result<()> {
    use oracle::Activation as A;
    let config = || GruConfig::new(INPUT, HIDDEN);
    let plain = || oracle::Recurrent::new(oracle::Cell::GRU, INPUT, HIDDEN);
    let deep = |config: GruConfig| config.layers(2).direction(Direction::Both);
    let deep64 = |spec: oracle::Recurrent| oracle::Recurrent { layers: 2, directions: 2, ..spec };
    let hard = Activation::HardSigmoid { alpha: 0.2, beta: 0.5 };
    let hard64 = A::HardSigmoid { alpha: f64::from(0.2f32), beta: 0.5 };
    let before = || config().reset(Reset::BeforeProduct);
    let plain_before = || oracle::Recurrent { cell: oracle::Cell::GRU_RESET_BEFORE, ..plain() };
    let acts = oracle::Cell::Gru { reset: oracle::Reset::After, gate: hard64, candidate: A::Softsign };
    let table = vec![
        Network::new("gru_gate_clip", config().gate_clip(0.5), oracle::Recurrent { pre_clip: Some(0.5), ..plain() }),
        Network::new(
            "gru_hard_sigmoid_softsign",
            config().activations(hard, Activation::Softsign),
            oracle::Recurrent { cell: acts, ..plain() },
        ),
        Network::new("gru_layer_norm", config().layer_norm(true), norm64(plain())),
        Network::new("gru_layer_norm_deep", deep(config().layer_norm(true)), deep64(norm64(plain()))),
        Network::new(
            "gru_layer_norm_wide",
            GruConfig::new(INPUT, WIDE).layer_norm(true),
            norm64(oracle::Recurrent::new(oracle::Cell::GRU, INPUT, WIDE)),
        ),
        Network::new(
            "gru_layer_norm_no_bias",
            config().layer_norm(true).bias(false).direction(Direction::Reverse),
            oracle::Recurrent { bias: false, first_reverse: true, ..norm64(plain()) },
        ),
        Network {
            zoneout: [0.3, 0.0],
            weight_dropout: 0.4,
            ..Network::new(
                "gru_layer_norm_zoneout_weight_dropout",
                deep(config().layer_norm(true).zoneout(0.3, 0.0).weight_dropout(0.4)),
                deep64(norm64(plain())),
            )
        },
        Network {
            recurrent_dropout: 0.4,
            ..Network::new(
                "gru_layer_norm_recurrent_dropout",
                deep(config().layer_norm(true).recurrent_dropout(0.4)),
                deep64(norm64(plain())),
            )
        },
        Network {
            recurrent_dropout: 0.4,
            zoneout: [0.3, 0.0],
            ..Network::new("gru_recurrent_dropout_zoneout", config().recurrent_dropout(0.4).zoneout(0.3, 0.0), plain())
        },
        Network::new("gru_reset_before", before(), plain_before()),
        Network::new("gru_reset_before_deep", deep(before()), deep64(plain_before())),
        Network::new("gru_reset_before_no_bias", before().bias(false), oracle::Recurrent { bias: false, ..plain_before() }),
        Network::new(
            "gru_reset_before_gate_clip",
            before().gate_clip(0.5),
            oracle::Recurrent { pre_clip: Some(0.5), ..plain_before() },
        ),
        Network::new(
            "gru_reset_before_hard_sigmoid_softsign",
            before().activations(hard, Activation::Softsign),
            oracle::Recurrent {
                cell: oracle::Cell::Gru { reset: oracle::Reset::Before, gate: hard64, candidate: A::Softsign },
                ..plain()
            },
        ),
        Network {
            zoneout: [0.3, 0.0],
            ..Network::new("gru_reset_before_zoneout", deep(before().zoneout(0.3, 0.0)), deep64(plain_before()))
        },
        Network {
            weight_dropout: 0.4,
            ..Network::new("gru_reset_before_weight_dropout", before().weight_dropout(0.4), plain_before())
        },
    ];
    table.into_iter().try_for_each(|network| check(cases, network))
}

fn rnns(cases: &mut Cases<'_>) -> Result<()> {
    use oracle::Activation as A;
    let config = || RnnConfig::new(INPUT, HIDDEN);
    let plain = || oracle::Recurrent::new(oracle::Cell::RNN, INPUT, HIDDEN);
    let f = f64::from;
    let activations = [
        ("rnn_relu", Activation::Relu, A::Relu),
        ("rnn_sigmoid", Activation::Sigmoid, A::Sigmoid),
        ("rnn_leaky_relu", Activation::LeakyRelu { alpha: 0.1 }, A::LeakyRelu { alpha: f(0.1f32) }),
        ("rnn_scaled_tanh", Activation::ScaledTanh { alpha: 1.5, beta: 0.5 }, A::ScaledTanh { alpha: 1.5, beta: 0.5 }),
        ("rnn_affine", Activation::Affine { alpha: 0.5, beta: 0.25 }, A::Affine { alpha: 0.5, beta: 0.25 }),
        ("rnn_thresholded_relu", Activation::ThresholdedRelu { alpha: 0.1 }, A::ThresholdedRelu { alpha: f(0.1f32) }),
    ];
    let mut table: Vec<_> = activations
        .into_iter()
        .map(|(name, activation, activation64)| {
            let spec = oracle::Recurrent { cell: oracle::Cell::Rnn { activation: activation64 }, ..plain() };
            Network::new(name, config().activation(activation), spec)
        })
        .collect();
    table.extend([
        Network::new("rnn_gate_clip", config().gate_clip(0.5), oracle::Recurrent { pre_clip: Some(0.5), ..plain() }),
        Network::new("rnn_jordan", config().jordan(4), oracle::Recurrent { projection: Some(4), ..plain() }),
        Network {
            recurrent_dropout: 0.4,
            zoneout: [0.3, 0.0],
            ..Network::new("rnn_recurrent_dropout_zoneout", config().recurrent_dropout(0.4).zoneout(0.3, 0.0), plain())
        },
    ]);
    table.into_iter().try_for_each(|network| check(cases, network))
}

fn indrnns(cases: &mut Cases<'_>) -> Result<()> {
    use oracle::Activation as A;
    let config = || IndRnnConfig::new(INPUT, HIDDEN);
    let cell = |activation| oracle::Cell::IndRnn { activation };
    for (name, activation, activation64) in
        [("indrnn_tanh", Activation::Tanh, A::Tanh), ("indrnn_softsign", Activation::Softsign, A::Softsign)]
    {
        let spec = oracle::Recurrent::new(cell(activation64), INPUT, HIDDEN);
        check(cases, Network::new(name, config().activation(activation), spec))?;
    }
    Ok(())
}

/// With layer normalization.
fn norm64(spec: oracle::Recurrent) -> oracle::Recurrent {
    oracle::Recurrent { layer_norm: true, ..spec }
}

/// What a case hands to both.
pub(super) struct Given {
    pub steps: usize,
    pub rows: usize,
    pub lengths: Option<Vec<u32>>,
    pub x: Vec<f32>,
    pub dy: Vec<f32>,
    pub state: Vec<Vec<f32>>,
    pub dstate: Vec<Vec<f32>>,
}

/// One network: ragged with a state, then plain and from zeros, then of one step. Where layers choose the resident sweep, they do so
/// from five steps on: the shorter cases are those of a launch a step.
pub(super) fn check<C: Cell>(cases: &mut Cases<'_>, network: Network<C>) -> Result<()> {
    for (suffix, steps, rows, is_ragged) in [("", 9, 5, true), ("_plain", 4, 3, false), ("_step", 1, 1, false)] {
        let mut rng = Rng::seed(network.name.len() as u64 + 7);
        let layer = network.config.clone().init(cases.device, &mut rng)?;
        // Gains of 1 and shifts of 0 would hide where they go.
        for (_, param) in layer.params().iter().filter(|(name, _)| name.starts_with("norm_")) {
            let values: Vec<f32> = param.value().to_vec()?.iter().map(|value| value + 0.4 * rng.normal()).collect();
            param.set(&values)?;
        }
        for (_, param) in layer.params().into_iter().filter(|(name, _)| name.starts_with("initial_")) {
            param.set(&normal(&mut rng, param.value().len()))?;
        }
        let slots = network.oracle.layers * network.oracle.directions;
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, rows));
        let mut x = normal(&mut rng, steps * rows * INPUT);
        pad(&mut x, INPUT, lengths.as_deref(), rows, 3.0);
        let mut state = |size: f32| -> Vec<Vec<f32>> {
            let hidden = network.oracle.hidden;
            let width = |s| if s == 0 { network.oracle.projection.unwrap_or(hidden) } else { hidden };
            (0..C::State::LEN).map(|s| normal(&mut rng, slots * rows * width(s)).iter().map(|v| v * size).collect()).collect()
        };
        let (mut state, dstate) = (if is_ragged { state(0.5) } else { Vec::new() }, state(1.0));
        if let (oracle::Cell::SLstm, Some(n)) = (network.oracle.cell, state.get_mut(2)) {
            n.iter_mut().for_each(|n| *n = 0.5 + n.abs()); // a sum of exponentials
        }
        let dy = normal(&mut rng, steps * rows * layer.output());
        let given = Given { steps, rows, lengths, x, dy, state, dstate };
        check_given(cases, &format!("{}{suffix}", network.name), &network, &layer, &given, None)?;
    }
    Ok(())
}

/// Parameters of a layer and direction, by their names without the suffix.
fn suffix(oracle: &oracle::Recurrent, slot: usize) -> String {
    let reverse = slot % oracle.directions == 1 || oracle.first_reverse;
    format!("_l{}{}", slot / oracle.directions, if reverse { "_reverse" } else { "" })
}

pub(super) fn check_given<C: Cell>(
    cases: &mut Cases<'_>,
    name: &str,
    network: &Network<C>,
    layer: &Recurrent<C>,
    given: &Given,
    teacher: Option<(&[f32], f32)>,
) -> Result<()> {
    let Given { steps, rows, .. } = *given;
    let [output_bound, gradient_bound] = network.bounds;
    let spec = network.oracle;
    let slots = spec.layers * spec.directions;
    let layer_width = layer.output();
    let key = MaskKey::new(KEY.0, KEY.1);

    // Training: what the masks are, the oracle is told.
    let mut weights: Vec<Weights> = Vec::new();
    for slot in 0..slots {
        let ending = suffix(&spec, slot);
        let mut parts = Weights::new();
        for (name, param) in layer.params() {
            if let Some(part) = name.strip_suffix(&ending).filter(|part| !part.starts_with("initial_")) {
                parts.insert(part.to_owned(), wide(&param.value().to_vec()?));
            }
        }
        weights.push(parts);
    }
    let between = if network.dropout > 0.0 { spec.layers - 1 } else { 0 };
    let drops: Vec<Vec<f64>> = (0..between)
        .map(|layer| wide(&super::dropout::mask(steps, rows, layer_width, network.dropout, key.layer(layer))))
        .collect();
    let mut dropped = weights.clone();
    let mut masks = Vec::new();
    if network.weight_dropout > 0.0 {
        for (slot, parts) in dropped.iter_mut().enumerate() {
            let gates = C::Pre::LEN * spec.hidden;
            let width = spec.projection.unwrap_or(spec.hidden);
            let key = key.draw(0x7765_6967, slot);
            let mask: Vec<f64> =
                super::dropout::mask(1, gates, width, network.weight_dropout, key).into_iter().map(f64::from).collect();
            parts.entry("weight_hh".to_owned()).and_modify(|w| w.iter_mut().zip(&mask).for_each(|(w, m)| *w *= m));
            masks.push(mask);
        }
    }
    let zoneout = |draws: bool| -> Option<Vec<Vec<f64>>> {
        let widths: Vec<usize> =
            (0..C::State::LEN).map(|s| if s == 0 { spec.projection.unwrap_or(spec.hidden) } else { spec.hidden }).collect();
        let factor = |slot: usize, at: [usize; 4]| {
            let ([t, s, row, u], p) = (at, network.zoneout[at[1].min(1)]);
            let counter = [u as u32, row as u32, t as u32, 0x686f_6c64 + s as u32];
            let [bits, ..] = philox(key.draw(0x6365_6c6c, slot).words(), counter);
            if draws { f64::from(u8::from(unit(bits) < p)) } else { f64::from(p) }
        };
        (network.zoneout != [0.0; 2]).then(|| {
            let factors = |slot: usize| {
                let mut all = Vec::new();
                for t in 0..steps {
                    for (s, width) in widths.iter().enumerate() {
                        for row in 0..rows {
                            all.extend((0..*width).map(|u| factor(slot, [t, s, row, u])));
                        }
                    }
                }
                all
            };
            (0..slots).map(factors).collect()
        })
    };
    let lengths64: Option<Vec<usize>> = given.lengths.as_ref().map(|lengths| lengths.iter().map(|n| *n as usize).collect());
    let x = wide(&given.x);
    let (mut state, dstate): (Vec<Vec<f64>>, Vec<Vec<f64>>) =
        (given.state.iter().map(|s| wide(s)).collect(), given.dstate.iter().map(|s| wide(s)).collect());
    let learned = network.learns_state && state.is_empty();
    if learned {
        // Each row starts from the same numbers.
        for name in C::Value::NAMES {
            let mut rows_of = Vec::new();
            for slot in 0..slots {
                let name = format!("initial_{name}{}", suffix(&spec, slot));
                for (_, param) in layer.params().into_iter().filter(|(full, _)| *full == name) {
                    rows_of.extend(wide(&param.value().to_vec()?).repeat(rows));
                }
            }
            state.push(rows_of);
        }
    }
    let (state, dstate): (Vec<&[f64]>, Vec<&[f64]>) =
        (state.iter().map(Vec::as_slice).collect(), dstate.iter().map(Vec::as_slice).collect());
    let dy = wide(&given.dy);
    let flags: Option<Vec<bool>> = teacher.map(|(_, p)| {
        let key = key.draw(0x7465_6163, 0);
        let taught = |line: usize| {
            let [bits, ..] = philox(key.words(), [0x7465_6163, (line % rows) as u32, (line / rows) as u32, 0]);
            unit(bits) < p
        };
        (0..steps * rows).map(taught).collect()
    });
    let targets = teacher.map(|(targets, _)| wide(targets));
    let input = RecurrentInput {
        batch: rows,
        x: &x,
        state: &state,
        lengths: lengths64.as_deref(),
        dy: &dy,
        dstate: &dstate,
        teacher: targets.as_deref().zip(flags.as_deref()),
        ..RecurrentInput::default()
    };
    let gate_masks = |slot: usize| {
        let (width, key) = (spec.projection.unwrap_or(spec.hidden), key.draw(0x6761_7465, slot));
        wide(&super::gates::masks(0..C::Pre::LEN, rows, width, network.recurrent_dropout, key))
    };
    let recurrent_masks: Vec<Vec<f64>> = match network.recurrent_dropout > 0.0 {
        true => (0..slots).map(gate_masks).collect(),
        false => Vec::new(),
    };
    let (random, mean) = (zoneout(true), zoneout(false));
    let drawn = RecurrentInput { zoneout: random.as_deref(), masks: &drops, recurrent_masks: &recurrent_masks, ..input };
    let mut trained = spec.forward_backward(&dropped, drawn);
    for (gradients, mask) in trained.dweights.iter_mut().zip(&masks) {
        gradients.entry("weight_hh".to_owned()).and_modify(|w| w.iter_mut().zip(mask).for_each(|(w, m)| *w *= m));
    }
    if let (Some((targets, probability)), Some(flags)) = (teacher, &flags)
        && probability < 1.0
    {
        // A tape has what the next step saw.
        let (states, width) = (&mut trained.states[0][0], targets.len() / (steps * rows));
        for line in
            (0..(steps - 1) * rows).filter(|line| flags[line + rows] && within(given.lengths.as_deref(), rows, line + rows))
        {
            let target = targets[line * width..][..width].iter().map(|target| f64::from(*target));
            states[line * width..][..width].iter_mut().zip(target).for_each(|(state, target)| *state = target);
        }
    }
    let inferred = spec.forward_backward(&weights, RecurrentInput { zoneout: mean.as_deref(), ..input });

    cases.run(name, |run| {
        layer.zero_grad()?;
        let x = run.input("x", &given.x, [steps, rows, INPUT])?;
        let dy = run.input("dy", &given.dy, [steps, rows, layer.output()])?;
        let lengths = run.lengths(given.lengths.as_deref())?;
        let value = |run: &mut Run<'_>, tensors: &[Vec<f32>]| -> Result<Option<C::Value>> {
            let tensors = tensors.iter().map(|t| run.input("state", t, [slots, rows, t.len() / (slots * rows)]));
            Ok(C::Value::from_tensors(tensors.collect::<Result<Vec<_>>>()?))
        };
        let state = value(run, &given.state)?;
        let dstate = value(run, &given.dstate)?;
        let targets = match teacher {
            Some((targets, _)) => Some(run.input("targets", targets, [steps, rows, layer.output()])?),
            None => None,
        };
        let mut input = Input::new().lengths(lengths.as_ref()).state(state.as_ref()).key(key);
        if let (Some(targets), Some((_, probability))) = (&targets, teacher) {
            input = input.teacher(targets, probability);
        }
        let compare_state = |run: &mut Run<'_>, what: &str, state: &C::Value, want: &[Vec<f64>], bound: f64| -> Result<()> {
            for ((name, tensor), want) in C::Value::NAMES.iter().zip(state.tensors()).zip(want) {
                // What cancels to nothing, as the gradient of an sLSTM's m, does so up to rounding: it is compared absolutely.
                let want: Vec<f64> = want.iter().map(|v| if v.abs() < 1e-12 { 0.0 } else { *v }).collect();
                run.near(&format!("{what}.{name}"), tensor, &want, bound)?;
            }
            Ok(())
        };

        let (y, last) = layer.forward(&x, input)?;
        run.near("infer.y", &y, &inferred.y, output_bound)?;
        compare_state(run, "infer.state", &last, &inferred.state, output_bound)?;
        let (y, last, tape) = layer.forward_train(&x, input)?;
        run.near("y", &y, &trained.y, output_bound)?;
        compare_state(run, "state", &last, &trained.state, output_bound)?;
        let (dx, first) = layer.backward(tape, &dy, dstate.as_ref())?;
        run.near("dx", &dx, &trained.dx, gradient_bound)?;
        compare_state(run, "dstate", &first, &trained.dstate, gradient_bound)?;
        for slot in 0..slots {
            let ending = suffix(&spec, slot);
            for (name, param) in layer.params() {
                let Some(part) = name.strip_suffix(&ending) else { continue };
                let Some(state) = part.strip_prefix("initial_") else {
                    run.near(&format!("grad.{name}"), param.grad(), &trained.dweights[slot][part], gradient_bound)?;
                    continue;
                };
                // The sum over the rows, or nothing where a state was given.
                let width = param.value().len();
                let s = C::Value::NAMES.iter().position(|name| *name == state).unwrap_or_default();
                let rows_of = trained.dstate[s][slot * rows * width..][..rows * width].chunks_exact(width);
                let mut sum = vec![0.0; width];
                for row in rows_of.filter(|_| learned) {
                    sum.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
                }
                run.near(&format!("grad.{name}"), param.grad(), &sum, gradient_bound)?;
            }
        }
        if network.flow {
            super::flow::check_flow(run, &spec, layer, (&x, input), (&dy, dstate.as_ref()), &trained)?;
        }
        if network.streams && teacher.is_none() && given.lengths.is_none() {
            stream(run, layer, &given.x, state.as_ref(), [steps, rows], (&inferred.y, output_bound))?;
        }
        Ok(())
    })
}

/// One step at a time.
fn stream<C: Cell>(
    run: &mut Run<'_>,
    layer: &Recurrent<C>,
    x: &[f32],
    state: Option<&C::Value>,
    [steps, rows]: [usize; 2],
    (want, bound): (&[f64], f64),
) -> Result<()> {
    let mut state = state.cloned();
    for t in 0..steps {
        let x = Tensor::from_slice(run.device, &x[t * rows * INPUT..][..rows * INPUT], [rows, INPUT])?;
        let (y, next) = layer.step(&x, state.as_ref())?;
        let width = rows * layer.output();
        run.near(&format!("step {t}"), &y, &want[t * width..][..width], bound)?;
        state = Some(next);
    }
    Ok(())
}

/// The clip of the recurrent gradient, by hand: `d(t) = dy(t) + clip(W^T da(t+1))`, `da = d (1 - h^2)`, in f64 from the layer's own h.
fn gradient_clip(cases: &mut Cases<'_>) -> Result<()> {
    const LIMIT: f32 = 0.3;
    let (steps, rows) = (9, 3);
    let mut rng = Rng::seed(21);
    let layer = RnnConfig::new(INPUT, HIDDEN).gradient_clip(LIMIT).init(cases.device, &mut rng)?;
    let x = normal(&mut rng, steps * rows * INPUT);
    let dy = normal(&mut rng, steps * rows * HIDDEN);
    let value = |name: &str| -> Result<Vec<f64>> {
        let found = layer.params().into_iter().find(|(full, _)| full == name);
        found.map_or(Ok(Vec::new()), |(_, param)| Ok(wide(&param.value().to_vec()?)))
    };
    let (weight_ih, weight_hh) = (value("weight_ih_l0")?, value("weight_hh_l0")?);
    cases.run("rnn_gradient_clip", |run| {
        layer.zero_grad()?;
        let counted = layer.clipped_gradients()?;
        let x = run.input("x", &x, [steps, rows, INPUT])?;
        let (y, _, tape) = layer.forward_train(&x, None)?;
        let h = wide(&y.to_vec()?);
        let (dx, first) = layer.backward(tape, &Tensor::from_slice(run.device, &dy, [steps, rows, HIDDEN])?, None)?;
        let (mut clipped, mut carried) = (0.0, vec![0.0f64; rows * HIDDEN]);
        let (mut dx64, mut bias) = (vec![0.0; steps * rows * INPUT], vec![0.0; HIDDEN]);
        for t in (0..steps).rev() {
            let mut da = vec![0.0; rows * HIDDEN];
            for (at, da) in da.iter_mut().enumerate() {
                let limit = f64::from(LIMIT);
                clipped += f64::from(u8::from(carried[at].abs() > limit));
                let line = t * rows * HIDDEN + at;
                *da = (carried[at].clamp(-limit, limit) + f64::from(dy[line])) * (1.0 - h[line] * h[line]);
                bias[at % HIDDEN] += *da;
            }
            carried = oracle::matmul(&da, &weight_hh, rows, HIDDEN, HIDDEN, false, false);
            let part = oracle::matmul(&da, &weight_ih, rows, INPUT, HIDDEN, false, false);
            dx64[t * rows * INPUT..][..rows * INPUT].copy_from_slice(&part);
        }
        run.near("dx", &dx, &dx64, GRADIENT)?;
        run.near("dh0", &first.h, &carried, GRADIENT)?;
        for (_, param) in layer.params().into_iter().filter(|(name, _)| name == "bias_ih_l0") {
            run.near("grad.bias_ih_l0", param.grad(), &bias, GRADIENT)?;
        }
        let counts = (layer.clipped_gradients()? - counted) as f64 - clipped;
        run.comparisons.push(Comparison::measured(format!("{clipped} clipped"), counts.abs(), 0.0));
        let acted = if clipped > 0.0 { 0.0 } else { f64::NAN };
        run.comparisons.push(Comparison::measured("the clip acts", acted, 0.0));
        Ok(())
    })
}

/// Jordan networks under a teacher: forced in full, scheduled, never.
pub(super) fn jordan(cases: &mut Cases<'_>) -> Result<()> {
    const OUTPUTS: usize = 4;
    let config = || RnnConfig::new(INPUT, HIDDEN).jordan(OUTPUTS);
    let spec = oracle::Recurrent { projection: Some(OUTPUTS), ..oracle::Recurrent::new(oracle::Cell::RNN, INPUT, HIDDEN) };
    let plain = Network::new("jordan", config(), spec);
    let masked =
        Network { recurrent_dropout: 0.4, ..Network::new("jordan_recurrent_dropout", config().recurrent_dropout(0.4), spec) };
    let kinds = [("forced", 1.0), ("scheduled", 0.5), ("free", 0.0)];
    for (network, (name, probability)) in [&plain, &masked].into_iter().flat_map(|network| kinds.map(|kind| (network, kind))) {
        for (steps, rows, is_ragged) in [(7, 5, true), (6, 4, false), (1, 2, false)] {
            let mut rng = Rng::seed(3);
            let layer = network.config.clone().init(cases.device, &mut rng)?;
            let lengths = is_ragged.then(|| ragged(&mut rng, steps, rows));
            let mut x = normal(&mut rng, steps * rows * INPUT);
            pad(&mut x, INPUT, lengths.as_deref(), rows, 3.0);
            let [dy, targets] = [0; 2].map(|_| normal(&mut rng, steps * rows * OUTPUTS));
            let [state, dstate] = [0; 2].map(|_| vec![normal(&mut rng, rows * OUTPUTS)]);
            let given = Given { steps, rows, lengths, x, dy, state, dstate };
            let kind = if is_ragged { "ragged" } else { "full" };
            check_given(
                cases,
                &format!("{}_{name}_{kind}_t{steps}", network.name),
                network,
                &layer,
                &given,
                Some((&targets, probability)),
            )?;
        }
    }
    Ok(())
}
