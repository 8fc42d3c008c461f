//! What goes on for longer than a batch: windows of back-propagation, states carried and reset, many streams at once.

mod common;

use anyhow::{Context as _, Result, ensure};
use common::devices;
use gatefold::nn::{
    CellState, EmbeddingConfig, GruConfig, LinearConfig, LstmConfig, LstmState, Module, Residual, Sequential, Skip, State,
    Stream, StreamId,
};
use gatefold::verify::Comparison;
use gatefold::{Device, Ids, Lengths, Rng, Tensor};

/// Fails unless `computed` lies within `bound` of `expected`, relative to the largest magnitude there; NaN fails.
fn close(what: &str, computed: &[f32], expected: &[f32], bound: f64) -> Result<()> {
    let expected: Vec<f64> = expected.iter().map(|number| f64::from(*number)).collect();
    let comparison = Comparison::new(what, computed, &expected, bound);
    ensure!(comparison.passes(), "{comparison:?}");
    Ok(())
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

fn normals(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal()).collect()
}

fn values<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Vec<f32>> {
    Ok(tensors.into_iter().map(Tensor::to_vec).collect::<gatefold::Result<Vec<_>>>()?.concat())
}

/// All gradients, one after another.
fn gradients(model: &impl Module) -> Result<Vec<f32>> {
    values(model.params().into_iter().map(|(_, param)| param.grad()))
}

// ---- windows of back-propagation ----

const STEPS: usize = 9;
const ROWS: usize = 3;
const WINDOWS: [(usize, usize); 3] = [(0, 4), (4, 5), (5, STEPS)];

/// The gradients of windows whose tapes are kept are those of one long pass; without that, each window has its own.
#[test]
fn gradients_through_windows() -> Result<()> {
    for device in devices()? {
        let name = format!("{device:?}");
        let rng = &mut Rng::seed(31);
        let lstm = LstmConfig::new(2, 7).layers(2).init(&device, rng)?;
        let (x, dy) = (normals(rng, STEPS * ROWS * 2), normals(rng, STEPS * ROWS * 7));
        let mut state = || -> Result<LstmState> {
            let mut part = || Tensor::from_slice(&device, &normals(rng, 2 * ROWS * 7), [2, ROWS, 7]);
            Ok(LstmState { h: part()?, c: part()? })
        };
        let (first, dlast) = (state()?, state()?);
        let window = |values: &[f32], width: usize, (from, to): (usize, usize)| {
            let line = ROWS * width;
            Tensor::from_slice(&device, &values[from * line..to * line], [to - from, ROWS, width])
        };
        let (whole_x, whole_dy) = (window(&x, 2, (0, STEPS))?, window(&dy, 7, (0, STEPS))?);
        let (_, _, tape) = lstm.forward_train(&whole_x, &first)?;
        let (dx, dfirst) = lstm.backward(tape, &whole_dy, Some(&dlast))?;
        let (dx, dfirst, whole) = (dx.to_vec()?, values(dfirst.tensors())?, gradients(&lstm)?);

        lstm.zero_grad()?;
        let (mut tapes, mut carried) = (Vec::new(), first.clone());
        for ends in WINDOWS {
            let (_, next, tape) = lstm.forward_train(&window(&x, 2, ends)?, &carried)?;
            tapes.push((ends, carried, tape));
            carried = next;
        }
        let (mut parts, mut dstate, mut last) = (Vec::new(), dlast.clone(), None);
        for (ends, before, tape) in tapes.into_iter().rev() {
            let (part, next) = lstm.backward(tape, &window(&dy, 7, ends)?, Some(&dstate))?;
            parts.insert(0, part.to_vec()?);
            dstate = next;
            if last.is_none() {
                last = Some((before, gradients(&lstm)?));
            }
        }
        close(&format!("{name}: dx"), &parts.concat(), &dx, 1e-6)?;
        close(&format!("{name}: dstate"), &values(dstate.tensors())?, &dfirst, 1e-6)?;
        close(&format!("{name}: gradients"), &gradients(&lstm)?, &whole, 1e-6)?;

        // Dropped tapes: as if the last window were all, from a state that is a constant.
        let (before, last) = last.context("three windows ran")?;
        lstm.zero_grad()?;
        let (h, c) = (before.h.to_device(&device)?, before.c.to_device(&device)?);
        let (_, _, tape) = lstm.forward_train(&window(&x, 2, WINDOWS[2])?, &LstmState { h, c })?;
        lstm.backward(tape, &window(&dy, 7, WINDOWS[2])?, Some(&dlast))?;
        assert_eq!(bits(&gradients(&lstm)?), bits(&last), "{name}");
        ensure!(close("truncated", &last, &whole, 1e-2).is_err(), "{name}: the other windows do not count");
    }
    Ok(())
}

/// The same through a row of layers, some inside others.
#[test]
fn gradients_through_windows_of_a_model() -> Result<()> {
    for device in devices()? {
        let name = format!("{device:?}");
        let rng = &mut Rng::seed(32);
        let block = Sequential::new()
            .push(LstmConfig::new(4, 5).layers(2).init(&device, rng)?)
            .push(LinearConfig::new(5, 4).init(&device, rng)?);
        let model = Sequential::new()
            .push(EmbeddingConfig::new(6, 4).init(&device, rng)?)
            .push(Residual::new(block))
            .push(Skip::new(GruConfig::new(4, 3).init(&device, rng)?))
            .push(LinearConfig::new(7, 2).init(&device, rng)?);
        let ids: Vec<u32> = (0..STEPS * ROWS).map(|_| rng.below(6) as u32).collect();
        let dy = normals(rng, STEPS * ROWS * 2);
        let pass = |(from, to): (usize, usize), state: Option<&State>| {
            let ids = Ids::from_slice(&device, &ids[from * ROWS..to * ROWS], [to - from, ROWS])?;
            let dy = Tensor::from_slice(&device, &dy[from * ROWS * 2..to * ROWS * 2], [to - from, ROWS, 2])?;
            let (_, state, tape) = model.forward_train(ids, state)?;
            Ok::<_, anyhow::Error>((dy, state, tape))
        };
        let all = |state: &State| values((0..4).flat_map(|layer| state.layer(layer).to_vec()).collect::<Vec<_>>().iter());
        let (dy, _, tape) = pass((0, STEPS), None)?;
        let dfirst = all(&model.backward_from(tape, &dy, None)?)?;
        let whole = gradients(&model)?;
        model.zero_grad()?;
        let (dy, _, tape) = pass((0, STEPS), None)?;
        model.backward(tape, &dy)?;
        assert_eq!(bits(&gradients(&model)?), bits(&whole), "{name}: with and without the state's gradient");

        model.zero_grad()?;
        let (mut passes, mut state) = (Vec::new(), None);
        for ends in WINDOWS {
            let (dy, next, tape) = pass(ends, state.as_ref())?;
            passes.push((dy, tape));
            state = Some(next);
        }
        let mut dstate = None;
        for (dy, tape) in passes.into_iter().rev() {
            dstate = Some(model.backward_from(tape, &dy, dstate.as_ref())?);
        }
        let dstate = dstate.context("three windows ran")?;
        assert_eq!((0..4).map(|layer| dstate.layer(layer).len()).collect::<Vec<_>>(), [0, 2, 1, 0]);
        close(&format!("{name}: dstate"), &all(&dstate)?, &dfirst, 1e-6)?;
        close(&format!("{name}: gradients"), &gradients(&model)?, &whole, 1e-6)?;
    }
    Ok(())
}

// ---- rows of states ----

#[test]
fn rows_of_states() -> Result<()> {
    for device in devices()? {
        let rng = &mut Rng::seed(33);
        let lstm = LstmConfig::new(2, 5).layers(2).init(&device, rng)?;
        let numbers = normals(rng, 4 * 3 * 2);
        let x = Tensor::from_slice(&device, &numbers, [4, 3, 2])?;
        let (_, state) = lstm.forward(&x, None)?;
        let submissions = device.submissions();
        let reset = state.reset_rows(&[false, true, false])?;
        let model_state = State::new(vec![vec![], vec![state.h.clone(), state.c.clone()]]);
        let rows = model_state.reset_rows(&[false, true, false])?;
        let taken = model_state.take_rows(&[2, 0, 2])?;
        let put = model_state.put_rows(&[(1, 0), (0, 2)], &taken.reset_rows(&[true, false, false])?)?;
        assert_eq!(device.submissions(), submissions, "{device:?}: nothing was waited for");
        for (tensor, before) in reset.tensors().into_iter().zip(state.tensors()) {
            let before = before.to_vec()?;
            let row = |at: usize| at / 5 % 3;
            let expected: Vec<f32> = (0..30).map(|at| if row(at) == 1 { 0.0 } else { before[at] }).collect();
            assert_eq!(bits(&tensor.to_vec()?), bits(&expected), "{device:?}");
        }
        for (s, before) in state.tensors().into_iter().enumerate() {
            let before = before.to_vec()?;
            let of = |block: usize, row: usize| before[(block * 3 + row) * 5..][..5].to_vec();
            let expect = |rows: [Option<usize>; 3]| -> Vec<f32> {
                (0..2)
                    .flat_map(|block| rows.into_iter().flat_map(move |row| row.map_or(vec![0.0; 5], |row| of(block, row))))
                    .collect()
            };
            for (computed, expected) in
                [(&rows, [Some(0), None, Some(2)]), (&taken, [Some(2), Some(0), Some(2)]), (&put, [Some(2), None, Some(2)])]
            {
                assert_eq!(bits(&computed.layer(1)[s].to_vec()?), bits(&expect(expected)), "{device:?} {expected:?}");
            }
        }
        // The next window: row 1 begins, the others go on.
        let (y, _) = lstm.forward(&x, &reset)?;
        let ((carried, _), (begun, _)) = (lstm.forward(&x, &state)?, lstm.forward(&x, None)?);
        let (y, carried, begun) = (y.to_vec()?, carried.to_vec()?, begun.to_vec()?);
        let expected: Vec<f32> = (0..y.len()).map(|at| if at / 5 % 3 == 1 { begun[at] } else { carried[at] }).collect();
        assert_eq!(bits(&y), bits(&expected), "{device:?}");
    }
    Ok(())
}

// ---- streams ----

fn model(device: &Device) -> Result<Sequential> {
    let rng = &mut Rng::seed(34);
    Ok(Sequential::new()
        .push(LinearConfig::new(3, 4).init(device, rng)?)
        .push(LstmConfig::new(4, 19).layers(2).learn_initial_state(true).init(device, rng)?)
        .push(Residual::new(GruConfig::new(19, 19).init(device, rng)?))
        .push(LinearConfig::new(19, 2).init(device, rng)?))
}

/// One of the sequences of a simulation.
struct Sequence {
    frames: Vec<f32>,
    /// How many of them are through.
    done: usize,
    id: Option<StreamId>,
    /// The state that it left with.
    left: Option<State>,
    y: Vec<f32>,
}

/// Streams come and go in rows that others had, in chunks of any length: each gives what it gives alone.
#[test]
fn streams_do_not_see_each_other() -> Result<()> {
    const COUNT: usize = 5;
    for device in devices()? {
        for invariant in [false, true] {
            let name = format!("{device:?}, batch invariant: {invariant}");
            device.set_batch_invariant(invariant);
            let model = std::sync::Arc::new(model(&device)?);
            // Not what rows start from by chance.
            for (_, param) in model.params().into_iter().filter(|(name, _)| name.contains("initial")) {
                param.set(&vec![0.3; param.value().len()])?;
            }
            let mut stream = Stream::new(model.clone(), 3, 3)?;
            let rng = &mut Rng::seed(35);
            let mut sequences: Vec<Sequence> = (0..COUNT)
                .map(|at| Sequence { frames: normals(rng, (9 + 2 * at) * 3), done: 0, id: None, left: None, y: Vec::new() })
                .collect();
            let (mut pushes, mut returns) = (0, 0);
            while sequences.iter().any(|sequence| sequence.done * 3 < sequence.frames.len()) {
                for sequence in &mut sequences {
                    let over = sequence.done * 3 == sequence.frames.len();
                    match sequence.id {
                        None if !over && stream.len() < stream.capacity() && rng.below(2) == 0 => {
                            returns += usize::from(sequence.left.is_some());
                            sequence.id = Some(match &sequence.left {
                                Some(state) => stream.join_with(state)?,
                                None => stream.join()?,
                            });
                        }
                        Some(id) if over || rng.below(8) == 0 => {
                            sequence.left = Some(stream.leave(id)?);
                            sequence.id = None;
                        }
                        _ => {}
                    }
                }
                let mut frames = Vec::new();
                for (at, sequence) in sequences.iter().enumerate() {
                    if let Some(id) = sequence.id {
                        let rest = sequence.frames.len() / 3 - sequence.done;
                        frames.push((at, id, rng.below(4).min(rest)));
                    }
                }
                // In no order.
                if rng.below(2) == 0 {
                    frames.reverse();
                }
                let part = |(at, id, count): &(usize, StreamId, usize)| {
                    let sequence = &sequences[*at];
                    (*id, &sequence.frames[sequence.done * 3..(sequence.done + count) * 3])
                };
                let outputs = stream.push(&frames.iter().map(part).collect::<Vec<_>>())?;
                pushes += 1;
                for ((at, _, count), y) in frames.into_iter().zip(outputs) {
                    assert_eq!(y.len(), count * 2, "{name}");
                    sequences[at].y.extend(y);
                    sequences[at].done += count;
                }
            }
            assert!(pushes > 12 && returns > 0, "{name}: {pushes} pushes, {returns} returns");
            for (at, sequence) in sequences.into_iter().enumerate() {
                let steps = sequence.frames.len() / 3;
                let (y, last) = model.forward(Tensor::from_slice(&device, &sequence.frames, [steps, 1, 3])?, None)?;
                let state = match sequence.id {
                    Some(id) => stream.leave(id)?,
                    None => sequence.left.context("it left")?,
                };
                let all = |state: &State| values((0..4).flat_map(|layer| state.layer(layer).to_vec()).collect::<Vec<_>>().iter());
                for (what, computed, expected) in [("y", sequence.y, y.to_vec()?), ("state", all(&state)?, all(&last)?)] {
                    if invariant {
                        assert_eq!(bits(&computed), bits(&expected), "{name}: {what} of sequence {at}");
                    }
                    close(&format!("{name}: {what} of sequence {at}"), &computed, &expected, 2e-6)?;
                }
            }
            assert!(stream.is_empty());
        }
    }
    Ok(())
}

/// Characters in, scores of the next ones out: the model's own steps, and streams of ids, give what a whole text gives.
#[test]
fn a_character_model_streams() -> Result<()> {
    for device in devices()? {
        device.set_batch_invariant(true);
        let rng = &mut Rng::seed(36);
        let model = Sequential::new()
            .push(EmbeddingConfig::new(11, 5).init(&device, rng)?)
            .push(LstmConfig::new(5, 12).init(&device, rng)?)
            .push(LinearConfig::new(12, 11).init(&device, rng)?);
        let mut text = |count: usize| -> Vec<u32> { (0..count).map(|_| rng.below(11) as u32).collect() };
        let texts = [text(13), text(8)];
        let mut whole = Vec::new();
        for text in &texts {
            whole.push(bits(&model.forward(Ids::from_slice(&device, text, [text.len(), 1])?, None)?.0.to_vec()?));
        }
        let (mut y, mut state) = (Vec::new(), None);
        for id in &texts[0] {
            let (scores, next) = model.step(Ids::from_slice(&device, &[*id], [1])?, state.as_ref())?;
            y.extend(scores.to_vec()?);
            state = Some(next);
        }
        assert_eq!(bits(&y), whole[0], "{device:?}");

        let mut stream = Stream::of_ids(model, 4)?;
        let (a, b) = (stream.join()?, stream.join()?);
        let mut outputs = [Vec::new(), Vec::new()];
        for (from, to) in [([0, 0], [1, 3]), ([1, 3], [5, 3]), ([5, 3], [6, 4]), ([6, 4], [13, 8])] {
            let part = |at: usize| &texts[at][from[at]..to[at]];
            for (y, all) in stream.push_ids(&[(b, part(1)), (a, part(0))])?.into_iter().zip(outputs.iter_mut().rev()) {
                all.extend(y);
            }
        }
        assert_eq!(outputs.map(|y| bits(&y)), whole[..], "{device:?}");

        // The same on the device.
        let (a, b) = (stream.join()?, stream.join()?);
        let rows = [stream.row(a)?, stream.row(b)?];
        let (mut ids, mut lengths) = (vec![0; 13 * 4], vec![0; 4]);
        for (text, row) in texts.iter().zip(rows) {
            text.iter().enumerate().for_each(|(t, id)| ids[t * 4 + row] = *id);
            lengths[row] = text.len() as u32;
        }
        let y =
            stream.push_batch(Ids::from_slice(&device, &ids, [13, 4])?, &Lengths::from_slice(&device, &lengths)?)?.to_vec()?;
        for ((text, row), whole) in texts.iter().zip(rows).zip(&whole) {
            let y: Vec<f32> = (0..text.len()).flat_map(|t| y[(t * 4 + row) * 11..][..11].to_vec()).collect();
            assert_eq!(&bits(&y), whole, "{device:?}");
        }
        let none = stream.push_ids(&[(a, &[]), (b, &[])])?;
        assert!(none.len() == 2 && none.iter().all(Vec::is_empty), "{device:?}");
    }
    Ok(())
}

/// A refused push changes nothing: a stream in the row of another that left starts from its own start.
#[test]
fn a_refused_push_leaves_no_other_streams_state() -> Result<()> {
    for device in devices()? {
        let rng = &mut Rng::seed(5);
        let model = std::sync::Arc::new(
            Sequential::new()
                .push(EmbeddingConfig::new(7, 4).init(&device, rng)?)
                .push(LstmConfig::new(4, 6).init(&device, rng)?),
        );
        let mut fresh = Stream::of_ids(model.clone(), 1)?;
        let alone = fresh.join()?;
        let expected = fresh.push_ids(&[(alone, &[1, 2])])?;
        let mut stream = Stream::of_ids(model, 1)?;
        let first = stream.join()?;
        stream.push_ids(&[(first, &[3, 4, 5])])?;
        stream.leave(first)?;
        let second = stream.join()?;
        ensure!(stream.push_ids(&[(second, &[9999])]).is_err(), "an id outside of the vocabulary");
        ensure!(bits(&stream.push_ids(&[(second, &[1, 2])])?[0]) == bits(&expected[0]), "{}", device.info());
    }
    Ok(())
}
