//! Encoders and decoders: logits and all gradients of both together, and decode loops against loops on the host.

use std::collections::BTreeSet;

use super::dropout::mask;
use super::harness::{Cases, GRADIENT, NAN, OUTPUT, Run, ragged, wide, within};
use super::sample::best;
use crate::device::Device;
use crate::error::{ErrorKind, Result};
use crate::loss::{CrossEntropy, Loss};
use crate::nn::{
    Cell, Choice, Decoding, EncoderDecoder, EncoderDecoderConfig, GruConfig, LstmConfig, Module, RecurrentConfig, Value,
};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Ids, Lengths};
use crate::verify::Comparison;
use crate::verify::oracle::{self, RecurrentInput, Weights};

const SOURCE: usize = 9;
const TARGET: usize = 7;
const EMBEDDING: usize = 5;
const HIDDEN: usize = 19;
const LAYERS: usize = 2;
const DROPOUT: f32 = 0.3;

pub(super) fn encoder_decoder(cases: &mut Cases<'_>) -> Result<()> {
    let cell = |cell| oracle::Recurrent { layers: LAYERS, ..oracle::Recurrent::new(cell, EMBEDDING, HIDDEN) };
    let (lstm, gru) = (LstmConfig::new(EMBEDDING, HIDDEN), GruConfig::new(EMBEDDING, HIDDEN));
    gradients(cases, "lstm", lstm.clone(), cell(oracle::Cell::LSTM), false)?;
    gradients(cases, "gru", gru.clone(), cell(oracle::Cell::GRU), false)?;
    gradients(cases, "gru, the source in reverse", gru.clone(), cell(oracle::Cell::GRU), true)?;
    let projected = oracle::Recurrent { projection: Some(6), ..cell(oracle::Cell::LSTM) };
    gradients(cases, "lstm with a projection", lstm.clone().projection(6), projected, true)?;
    decoding(cases, "lstm", lstm)?;
    decoding(cases, "gru", gru)?;
    not_a_number(cases)
}

/// Logits without and with dropout, and the gradients of the mean loss, chained by the states at which the halves meet.
fn gradients<C: Cell>(
    cases: &mut Cases<'_>,
    name: &str,
    config: RecurrentConfig<C>,
    decoder: oracle::Recurrent,
    reverse: bool,
) -> Result<()> {
    let encoder = oracle::Recurrent { first_reverse: reverse, ..decoder };
    let config = EncoderDecoderConfig::new(SOURCE, TARGET, config.layers(LAYERS).dropout(DROPOUT)).reverse_source(reverse);
    let width = decoder.projection.unwrap_or(HIDDEN);
    for (steps, target_steps, rows, is_ragged) in [(8, 6, 5, true), (3, 4, 2, false), (1, 1, 3, true)] {
        let mut rng = Rng::seed(71);
        let model = config.clone().init(cases.device, &mut rng)?;
        let ids =
            |rng: &mut Rng, count: usize, below: usize| -> Vec<u32> { (0..count).map(|_| rng.below(below) as u32).collect() };
        let source = ids(&mut rng, steps * rows, SOURCE);
        let [target_in, target] = [0; 2].map(|_| ids(&mut rng, target_steps * rows, TARGET));
        let lengths = |rng: &mut Rng, steps: usize| is_ragged.then(|| ragged(rng, steps, rows));
        let (source_lengths, target_lengths) = (lengths(&mut rng, steps), lengths(&mut rng, target_steps));
        let key = MaskKey::new(21, 22);

        let param = |name: &str| -> Result<Vec<f64>> {
            match model.params().into_iter().find(|(given, _)| given == name) {
                Some((_, param)) => Ok(wide(&param.value().to_vec()?)),
                None => unreachable!("{name} is a parameter"),
            }
        };
        let ending =
            |half: &str, layer: usize| format!("_l{layer}{}", if reverse && half == "encoder" { "_reverse" } else { "" });
        let weights = |half: &str, spec: &oracle::Recurrent| -> Result<Vec<Weights>> {
            let part = |layer, part: &str| -> Result<_> {
                // The projection has no bias here, which the oracle takes for zeros.
                Ok((part.to_owned(), param(&format!("{half}.rnn.{part}{}", ending(half, layer)))?))
            };
            let layer = |layer| {
                spec.parts(layer).into_iter().filter(|(name, _)| *name != "bias_hr").map(|(p, _)| part(layer, p)).collect()
            };
            (0..LAYERS).map(layer).collect()
        };
        let (encoder_weights, decoder_weights) = (weights("encoder", &encoder)?, weights("decoder", &decoder)?);
        let tables = [param("encoder.embedding.weight")?, param("decoder.embedding.weight")?];
        let (weight, bias) = (param("decoder.linear.weight")?, param("decoder.linear.bias")?);
        let (x, x_in) = (oracle::embedding(&source, &tables[0], EMBEDDING), oracle::embedding(&target_in, &tables[1], EMBEDDING));
        let sizes = |lengths: &Option<Vec<u32>>| -> Option<Vec<usize>> {
            lengths.as_ref().map(|lengths| lengths.iter().map(|length| *length as usize).collect())
        };
        let (source_sizes, target_sizes) = (sizes(&source_lengths), sizes(&target_lengths));
        let masks = |steps: usize, half: usize| {
            vec![mask(steps, rows, width, DROPOUT, key.layer(half).layer(0)).into_iter().map(f64::from).collect::<Vec<f64>>()]
        };
        let masks = [masks(steps, 0), masks(target_steps, 1)];
        const NONE: u32 = u32::MAX;
        let counted: Vec<u32> =
            (0..target.len()).map(|at| if within(target_lengths.as_deref(), rows, at) { target[at] } else { NONE }).collect();

        let none: &[Vec<f64>] = &[];
        let encode = |masks, dstate: &[&[f64]]| {
            let input =
                RecurrentInput { batch: rows, x: &x, lengths: source_sizes.as_deref(), masks, dstate, ..Default::default() };
            encoder.forward_backward(&encoder_weights, input)
        };
        let decode = |masks, state: &[Vec<f64>], dy: &[f64]| {
            let state: Vec<&[f64]> = state.iter().map(Vec::as_slice).collect();
            let (lengths, rest) = (target_sizes.as_deref(), RecurrentInput::default());
            decoder.forward_backward(
                &decoder_weights,
                RecurrentInput { batch: rows, x: &x_in, lengths, masks, state: &state, dy, ..rest },
            )
        };
        let linear = |y: &[f64]| oracle::linear(y, &weight, Some(&bias), width, TARGET);
        let inferred = linear(&decode(none, &encode(none, &[]).state, &[]).y);

        let state = encode(&masks[0], &[]).state;
        let y = decode(&masks[1], &state, &[]).y;
        let logits = linear(&y);
        let (loss, dlogits) = oracle::cross_entropy(&logits, TARGET, &counted, Some(NONE));
        let last = oracle::linear_backward(&y, &weight, &dlogits, width, TARGET);
        let decoded = decode(&masks[1], &state, &last.dx);
        let dstate: Vec<&[f64]> = decoded.dstate.iter().map(Vec::as_slice).collect();
        let encoded = encode(&masks[0], &dstate);
        let mut want: Vec<(String, Vec<f64>)> = Vec::new();
        for (half, ids, vocabulary, back) in [("encoder", &source, SOURCE, &encoded), ("decoder", &target_in, TARGET, &decoded)] {
            let table = oracle::embedding_backward(ids, &back.dx, vocabulary, EMBEDDING);
            want.push((format!("{half}.embedding.weight"), table));
            for (layer, gradients) in back.dweights.iter().enumerate() {
                let named = |(part, gradient): (&String, &Vec<f64>)| {
                    (format!("{half}.rnn.{part}{}", ending(half, layer)), gradient.clone())
                };
                want.extend(gradients.iter().filter(|(part, _)| *part != "bias_hr").map(named));
            }
        }
        want.extend([("decoder.linear.weight".into(), last.dweight), ("decoder.linear.bias".into(), last.dbias)]);

        cases.run(format!("{name}, from {steps} to {target_steps} steps of {rows} rows"), |run| {
            model.zero_grad()?;
            let lengths = [run.lengths(source_lengths.as_deref())?, run.lengths(target_lengths.as_deref())?];
            let [source, target_in, target] = [
                run.ids_of("source", &source, [steps, rows])?,
                run.ids_of("target_in", &target_in, [target_steps, rows])?,
                run.ids_of("target", &target, [target_steps, rows])?,
            ];
            let y = model.forward(&source, lengths[0].as_ref(), &target_in, lengths[1].as_ref())?;
            run.near("infer.logits", &y, &inferred, OUTPUT)?;
            let (y, tape) = model.forward_train(&source, lengths[0].as_ref(), &target_in, lengths[1].as_ref(), Some(key))?;
            run.near("logits", &y, &logits, OUTPUT)?;
            let (mean, dlogits) = CrossEntropy::new().loss_and_gradient(&y, &Value::Ids(target), lengths[1].as_ref())?;
            run.near("loss", &mean, &[loss], OUTPUT)?;
            model.backward(tape, &dlogits)?;
            let params = model.params();
            let missing = params.len().abs_diff(want.len());
            run.comparisons.push(Comparison::measured("parameters", missing as f64, 0.0));
            for (name, param) in params {
                let expected = want.iter().find(|(given, _)| *given == name).map_or(&[][..], |(_, gradient)| gradient);
                run.near(&format!("grad.{name}"), param.grad(), expected, GRADIENT)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

const STEPS: usize = 6;
const ROWS: usize = 7;
const MAX_STEPS: usize = 24;
const START: u32 = 2;

/// A network that says many things, and what it reads.
struct Talker<C: Cell> {
    model: EncoderDecoder<C>,
    source: Vec<u32>,
    lengths: Vec<u32>,
    /// What it says, and an id of that at which rows end at different steps.
    greedy: Vec<u32>,
    end: u32,
}

impl<C: Cell> Talker<C> {
    fn new(device: &Device, config: RecurrentConfig<C>) -> Result<Self> {
        let config = EncoderDecoderConfig::new(SOURCE, TARGET, config.layers(LAYERS));
        for seed in 72.. {
            let mut rng = Rng::seed(seed);
            let model = config.clone().init(device, &mut rng)?;
            for (name, param) in model.params() {
                let size = if name.contains("rnn") { 4.0 } else { 2.0 };
                param.set(&param.value().to_vec()?.iter().map(|number| number * size).collect::<Vec<_>>())?;
            }
            let source: Vec<u32> = (0..STEPS * ROWS).map(|_| rng.below(SOURCE) as u32).collect();
            let lengths = ragged(&mut rng, STEPS, ROWS);
            let decoding = Decoding { start: START, end: None, pad: 0, max_steps: MAX_STEPS, choice: Choice::Greedy };
            let ids = Ids::from_slice(device, &source, [STEPS, ROWS])?;
            let greedy = model.decode(&ids, Some(&Lengths::from_slice(device, &lengths)?), decoding)?.to_vec()?;
            let distinct = |values: &[Option<usize>]| values.iter().collect::<BTreeSet<_>>().len();
            let ends = |id: u32| (0..ROWS).map(|row| column(&greedy, row).position(|at| at == id)).collect::<Vec<_>>();
            let end = (0..TARGET as u32).find(|id| distinct(&ends(*id)) >= 4 && ends(*id).contains(&None));
            if let (Some(end), 4..) = (end, greedy.iter().collect::<BTreeSet<_>>().len()) {
                return Ok(Self { model, source, lengths, greedy, end });
            }
        }
        unreachable!("of so many networks one talks")
    }
}

/// The ids of a row.
fn column(ids: &[u32], row: usize) -> impl Iterator<Item = u32> + '_ {
    ids.iter().skip(row).step_by(ROWS).copied()
}

/// What a host that reads all logits of each step writes, by `choose(step, row, logits)`; row by row, up to the end.
fn by_hand<C: Cell>(
    model: &EncoderDecoder<C>,
    run: &Run<'_>,
    [source, lengths]: [&[u32]; 2],
    Decoding { start, end, pad, max_steps, .. }: Decoding,
    mut choose: impl FnMut(usize, usize, &[f32]) -> u32,
) -> Result<Vec<u32>> {
    let rows = lengths.len();
    let source = Ids::from_slice(run.device, source, [source.len() / rows, rows])?;
    let mut state = model.encode(&source, Some(&Lengths::from_slice(run.device, lengths)?))?;
    let (mut last, mut running, mut ids) = (vec![start; rows], vec![true; rows], Vec::new());
    for step in 0..max_steps {
        let (logits, next) = model.step(&Ids::from_slice(run.device, &last, [rows])?, &state)?;
        let logits = logits.to_vec()?;
        for (row, logits) in logits.chunks_exact(TARGET).enumerate() {
            last[row] = if running[row] { choose(step, row, logits) } else { pad };
            running[row] &= Some(last[row]) != end;
        }
        ids.extend(&last);
        // A padded row's state does not matter, but its id must have a vector here.
        last.iter_mut().for_each(|id| *id = (*id).min(TARGET as u32 - 1));
        state = next;
    }
    Ok(ids)
}

fn argmax(logits: &[f32]) -> u32 {
    let larger = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (0..logits.len()).fold(0, larger) as u32
}

fn decoding<C: Cell>(cases: &mut Cases<'_>, name: &str, config: RecurrentConfig<C>) -> Result<()> {
    let Talker { model, source, lengths, greedy, end } = Talker::new(cases.device, config)?;
    let draw = |temperature, top_k| Choice::Draw { temperature, top_k, key: MaskKey::new(5, 6) };
    for (end, pad, choice) in [
        (None, 0, Choice::Greedy),
        (Some(end), 0, Choice::Greedy),
        (Some(end), 3_000_000, Choice::Greedy),
        (Some(end), end, Choice::Greedy),
        (None, 0, draw(2.0, None)),
        (Some(end), 0, draw(5.0, Some(3))),
    ] {
        cases.run(format!("{name} decodes, end {end:?}, pad {pad}, {}", super::sample::title(&choice)), |run| {
            let ids = run.ids_of("source", &source, [STEPS, ROWS])?;
            let ragged = run.lengths(Some(&lengths))?;
            let decoding = Decoding { start: START, end, pad, max_steps: MAX_STEPS, choice };
            let decoded = model.decode(&ids, ragged.as_ref(), decoding)?;
            let written = decoded.to_vec()?;
            run.words.extend(&written);
            // Of a draw: whether the id is one of the best, by the noise of its place; the host goes on with what the device chose.
            let mut wrong = 0;
            let by_hand = by_hand(&model, run, [&source, &lengths], decoding, |step, row, z| match choice {
                Choice::Greedy => argmax(z),
                Choice::Draw { temperature, top_k, key } => {
                    let id = written[step * ROWS + row];
                    wrong += usize::from(!best(z, row, step, temperature, top_k, key).contains(&id));
                    id
                }
            })?;
            run.comparisons.push(Comparison::bits("ids", &written, &by_hand));
            run.comparisons.push(Comparison::measured("wrong draws", wrong as f64, 0.0));
            let same = choice != Choice::Greedy && written[..ROWS * 6] == greedy[..ROWS * 6];
            run.comparisons.push(Comparison::measured("a draw like none", f64::from(u8::from(same)), 0.0));

            let ends = |row: usize| column(&by_hand, row).position(|id| Some(id) == end);
            let expected: Vec<u32> = (0..ROWS).map(|row| ends(row).map_or(MAX_STEPS, |at| at + 1) as u32).collect();
            run.comparisons.push(Comparison::bits("lengths", &decoded.lengths()?, &expected));
            for (row, written) in decoded.rows()?.iter().enumerate() {
                let expected: Vec<u32> = column(&by_hand, row).take(ends(row).unwrap_or(MAX_STEPS)).collect();
                run.comparisons.push(Comparison::bits(format!("row {row}"), written, &expected));
            }
            // A step at a time is all at once: the logits behind the ids that were written tell the same ids.
            if choice == Choice::Greedy && end.is_none() {
                let seen = [&[START; ROWS], &written[..(MAX_STEPS - 1) * ROWS]].concat();
                let seen = Ids::from_slice(run.device, &seen, [MAX_STEPS, ROWS])?;
                let logits = model.forward(&ids, ragged.as_ref(), &seen, None)?.to_vec()?;
                let expected: Vec<u32> = logits.chunks_exact(TARGET).map(argmax).collect();
                run.comparisons.push(Comparison::bits("ids of all steps at once", &written, &expected));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A model that is not finite says so when it is read.
fn not_a_number(cases: &mut Cases<'_>) -> Result<()> {
    let model =
        EncoderDecoderConfig::new(SOURCE, TARGET, GruConfig::new(EMBEDDING, HIDDEN)).init(cases.device, &mut Rng::seed(73))?;
    for (name, param) in model.params() {
        if name == "decoder.linear.bias" {
            param.set(&[NAN; TARGET])?;
        }
    }
    cases.run("NaN", |run| {
        let ids = run.ids_of("source", &[1, 2], [1, 2])?;
        let decoding = Decoding { start: 0, end: None, pad: 0, max_steps: 3, choice: Choice::Greedy };
        let decoded = model.decode(&ids, None, decoding)?;
        let told = [decoded.to_vec().err(), decoded.lengths().err(), decoded.rows().err()];
        let text = "encoder_decoder.decode: a logit of row 0 is NaN at step 0: are all weights finite?";
        let right = told.iter().flatten().filter(|e| e.kind() == ErrorKind::Argument && e.to_string() == text).count();
        run.comparisons.push(Comparison::measured("errors", 3.0 - right as f64, 0.0));
        Ok(())
    })
}
