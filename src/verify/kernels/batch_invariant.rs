//! On a device that is batch invariant nothing shows in the bits of an output but its own row: not the batch, nor the padding, nor
//! how a sequence is cut.

use super::harness::{Cases, OUTPUT, Run, TIGHT, normal, overridden, to_bits, wide};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::choice::KernelOverride;
use crate::kernels::sweep_pair::PairKernel;
use crate::nn::{
    Cell, CellState, Direction, GruConfig, IndRnnConfig, Input, Linear, LinearConfig, LstmConfig, MinGruConfig, MinLstmConfig,
    Precision, Recurrent, RecurrentConfig, Reset, RnnConfig, SLstmConfig,
};
use crate::rng::Rng;
use crate::tensor::{Lengths, Tensor};
use crate::verify::Comparison;

const STEPS: usize = 6;
const ROWS: usize = 9;
const INPUT: usize = 20; // with 68 and 300 units, what kernels that load vectors take
const BOTH_WAYS: &str = "lstm, both ways";
const HALF: &str = "lstm, half";
/// Of outputs in half precision: a sum that differs in its last bit may round a factor to the next f16.
const HALF_OUTPUT: f64 = 2e-3;

pub(super) fn batch_invariant(cases: &mut Cases<'_>) -> Result<()> {
    // A device of its own: others share the given one.
    let device = overridden(cases.device, KernelOverride::default())?;
    device.set_batch_invariant(true);
    let cases = &mut Cases { device: &device, reports: cases.reports };
    super::products::gemm(cases)?;
    super::products::gemm_half(cases)?;
    for hidden in [5, 19, 68] {
        check(cases, "lstm", 2, LstmConfig::new(INPUT, hidden).layers(2))?;
        check(cases, BOTH_WAYS, 2, LstmConfig::new(INPUT, hidden).direction(Direction::Both))?;
        check(cases, "lstm, projection", 2, LstmConfig::new(INPUT, hidden).projection(7).layers(2))?;
        check(cases, "lstm, peepholes", 1, LstmConfig::new(INPUT, hidden).peepholes(true))?;
        check(cases, "lstm, layer norm", 1, LstmConfig::new(INPUT, hidden).layer_norm(true))?;
        check(cases, "gru", 2, GruConfig::new(INPUT, hidden).layers(2))?;
        check(cases, "gru, reset before", 1, GruConfig::new(INPUT, hidden).reset(Reset::BeforeProduct))?;
        check(cases, "rnn", 1, RnnConfig::new(INPUT, hidden))?;
        check(cases, "indrnn", 1, IndRnnConfig::new(INPUT, hidden))?;
        check(cases, "slstm", 1, SLstmConfig::new(INPUT, hidden))?;
        check(cases, "min_gru", 2, MinGruConfig::new(INPUT, hidden).layers(2))?;
        check(cases, "min_lstm", 1, MinLstmConfig::new(INPUT, hidden))?;
        check(cases, HALF, 2, LstmConfig::new(INPUT, hidden).layers(2).precision(Precision::Half))?;
        check(cases, "jordan", 1, RnnConfig::new(INPUT, hidden).jordan(4))?;
    }
    // Enough for threads, and for more than one block of k.
    check(cases, "lstm", 1, LstmConfig::new(INPUT, 300))?;
    linear(cases)?;
    // What hardware does.
    let device = overridden(cases.device, KernelOverride::default().pair(PairKernel::Fused))?;
    device.set_batch_invariant(true);
    let cases = &mut Cases { device: &device, reports: cases.reports };
    check(cases, "lstm, projection, fused", 2, LstmConfig::new(INPUT, 68).projection(12).layers(2))?;
    check(cases, "gru, reset before, fused", 1, GruConfig::new(INPUT, 19).reset(Reset::BeforeProduct))?;
    check(cases, "jordan, fused", 1, RnnConfig::new(INPUT, 19).jordan(4))
}

/// Some rows of blocks of `rows` lines.
fn pick(values: &[f32], rows: usize, width: usize, picked: &[usize]) -> Vec<f32> {
    let blocks = values.chunks_exact(rows * width);
    blocks.flat_map(|block| picked.iter().flat_map(|row| block[row * width..][..width].to_vec())).collect()
}

/// Outputs and final states of a run.
type Outputs = (Vec<f32>, Vec<Vec<f32>>);

/// `slots`: layers x directions.
fn check<C: Cell>(cases: &mut Cases<'_>, name: &str, slots: usize, config: RecurrentConfig<C>) -> Result<()> {
    // Cells that may scan over time do so from 64 steps on.
    let steps = if C::SCAN.is_some() { 70 } else { STEPS };
    let streams = name != BOTH_WAYS;
    let mut rng = Rng::seed(5);
    let layer = config.clone().init(cases.device, &mut rng)?;
    let x = normal(&mut rng, steps * ROWS * INPUT);
    let (output, hidden) = (layer.output(), layer.hidden());
    // The same weights where other kernels may be taken, which other families compare with the oracle.
    let usual_device = overridden(cases.device, KernelOverride::default())?;
    let usual_layer = config.init(&usual_device, &mut Rng::seed(5))?;
    let bound = if name == HALF { HALF_OUTPUT } else { OUTPUT };
    cases.run(format!("{name} of {hidden}"), |run| {
        type State<'a> = Option<&'a [Vec<f32>]>;
        let forward_by = |device: &Device,
                          layer: &Recurrent<C>,
                          x: &[f32],
                          rows: usize,
                          state: State<'_>,
                          lengths: Option<&[u32]>|
         -> Result<Outputs> {
            let tensor = |values: &Vec<f32>| Tensor::from_slice(device, values, [slots, rows, values.len() / slots / rows]);
            let state = state.map(|state| state.iter().map(tensor).collect::<Result<Vec<_>>>()).transpose()?;
            let state = state.and_then(C::Value::from_tensors);
            let lengths = lengths.map(|lengths| Lengths::from_slice(device, lengths)).transpose()?;
            let x = Tensor::from_slice(device, x, [x.len() / (rows * INPUT), rows, INPUT])?;
            let (y, last) = layer.forward(&x, Input::new().lengths(&lengths).state(&state))?;
            Ok((y.to_vec()?, last.tensors().into_iter().map(Tensor::to_vec).collect::<Result<_>>()?))
        };
        let forward = |x: &[f32], rows: usize, state: State<'_>, lengths: Option<&[u32]>| {
            forward_by(run.device, &layer, x, rows, state, lengths)
        };
        // A state that is not zero.
        let (_, state) = forward(&x, ROWS, None, None)?;
        let whole = forward(&x, ROWS, Some(&state), None)?;
        let usual = forward_by(&usual_device, &usual_layer, &x, ROWS, Some(&state), None)?;
        run.comparisons.extend(near(&whole, &usual, bound));
        let part = |from: usize, to: usize| &x[from * ROWS * INPUT..to * ROWS * INPUT];
        let of_rows = |state: &[Vec<f32>], rows: &[usize]| -> Vec<Vec<f32>> {
            state.iter().map(|values| pick(values, ROWS, values.len() / slots / ROWS, rows)).collect()
        };

        if streams {
            for cuts in [(0..=steps).collect(), vec![0, 1, steps], vec![0, 4, steps]] {
                let (mut y, mut carried) = (Vec::new(), state.clone());
                for ends in cuts.windows(2) {
                    let (part, next) = forward(part(ends[0], ends[1]), ROWS, Some(&carried), None)?;
                    y.extend(part);
                    carried = next;
                }
                same(run, &format!("cut at {cuts:?}"), &(y, carried), &whole);
            }
            let (mut y, mut carried) = (Vec::new(), None);
            for t in 0..steps {
                let x = Tensor::from_slice(run.device, part(t, t + 1), [ROWS, INPUT])?;
                let (part, next) = layer.step(&x, carried.as_ref())?;
                y.extend(part.to_vec()?);
                carried = Some(next);
            }
            let last = carried.iter().flat_map(CellState::tensors).map(Tensor::to_vec).collect::<Result<_>>()?;
            same(run, "in steps", &(y, last), &forward(&x, ROWS, None, None)?);
        }

        // Rows alone, and in batches where they stand elsewhere.
        let batches = (0..ROWS).map(|row| vec![row]).chain((2..ROWS).map(|count| (ROWS - count..ROWS).rev().collect()));
        for rows in batches {
            let alone = forward(&pick(&x, ROWS, INPUT, &rows), rows.len(), Some(&of_rows(&state, &rows)), None)?;
            let expected = (pick(&whole.0, ROWS, output, &rows), of_rows(&whole.1, &rows));
            same(run, &format!("rows {rows:?}"), &alone, &expected);
        }

        // Ragged rows in a batch that is larger and longer.
        let lengths: Vec<u32> = (0..ROWS as u32).map(|row| (row * 5 + 3) % (steps as u32 + 1)).collect();
        let ragged = forward(&x, ROWS, Some(&state), Some(&lengths))?;
        let more = ROWS + 4;
        let pad = |values: &[f32], width: usize, blocks: usize| -> Vec<f32> {
            let mut all = vec![7.0; blocks * more * width];
            for (all, block) in all.chunks_exact_mut(more * width).zip(values.chunks_exact(ROWS * width)) {
                all[2 * width..][..ROWS * width].copy_from_slice(block);
            }
            all
        };
        let padded_state: Vec<_> = state.iter().map(|values| pad(values, values.len() / slots / ROWS, slots)).collect();
        let padded_lengths = [&[steps as u32 + 2, 0][..], &lengths, &[3, steps as u32 + 2]].concat();
        let (y, last) = forward(&pad(&x, INPUT, steps + 2), more, Some(&padded_state), Some(&padded_lengths))?;
        let rows: Vec<usize> = (2..ROWS + 2).collect();
        let last: Vec<_> = last.iter().map(|values| pick(values, more, values.len() / slots / more, &rows)).collect();
        same(run, "padded", &(pick(&y, more, output, &rows)[..ragged.0.len()].to_vec(), last), &ragged);
        for (row, length) in lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
            let length = *length as usize;
            let alone = forward(&pick(part(0, length), ROWS, INPUT, &[row]), 1, Some(&of_rows(&state, &[row])), None)?;
            let expected = (pick(&ragged.0[..length * ROWS * output], ROWS, output, &[row]), of_rows(&ragged.1, &[row]));
            same(run, &format!("ragged row {row}"), &alone, &expected);
        }
        Ok(())
    })
}

/// Near what the usual kernels give: the same bits alone might be those of NaN.
fn near(computed: &Outputs, usual: &Outputs, bound: f64) -> Vec<Comparison> {
    let near = |name: &str, computed: &[f32], usual: &[f32]| {
        Comparison::new(format!("{name} beside the usual kernels"), computed, &wide(usual), bound)
    };
    let states = computed.1.iter().zip(&usual.1).map(|(computed, usual)| near("state", computed, usual));
    std::iter::once(near("y", &computed.0, &usual.0)).chain(states).collect()
}

fn same(run: &mut Run<'_>, name: &str, computed: &Outputs, expected: &Outputs) {
    let words = |outputs: &Outputs| to_bits(&[&outputs.0[..], &outputs.1.concat()].concat());
    let computed = words(computed);
    run.comparisons.push(Comparison::bits(name, &computed, &words(expected)));
    run.words.extend(computed);
}

/// A product alone, of sizes around tiles, with and without a bias.
fn linear(cases: &mut Cases<'_>) -> Result<()> {
    const MANY: usize = 40;
    let usual_device = overridden(cases.device, KernelOverride::default())?;
    for (input, output, bias) in [(3, 2, true), (64, 1, true), (130, 33, false), (700, 257, true)] {
        let mut rng = Rng::seed(6);
        let config = LinearConfig::new(input, output).bias(bias);
        let layer = config.clone().init(cases.device, &mut rng)?;
        let usual_layer = config.init(&usual_device, &mut Rng::seed(6))?;
        let x = normal(&mut rng, MANY * input);
        cases.run(format!("linear from {input} to {output}"), |run| {
            let forward_by = |layer: &Linear, device: &Device, rows: &[usize]| -> Result<Outputs> {
                let x = Tensor::from_slice(device, &pick(&x, MANY, input, rows), [rows.len(), input])?;
                Ok((layer.forward(&x)?.to_vec()?, Vec::new()))
            };
            let forward = |rows: &[usize]| forward_by(&layer, run.device, rows);
            let all: Vec<usize> = (0..MANY).collect();
            let whole = forward(&all)?;
            run.comparisons.extend(near(&whole, &forward_by(&usual_layer, &usual_device, &all)?, TIGHT));
            for count in (1..10).chain([15, 16, 17, 39]) {
                let rows: Vec<usize> = (MANY - count..MANY).rev().collect();
                let expected = (pick(&whole.0, MANY, output, &rows), Vec::new());
                same(run, &format!("{count} rows"), &forward(&rows)?, &expected);
            }
            Ok(())
        })?;
    }
    Ok(())
}
