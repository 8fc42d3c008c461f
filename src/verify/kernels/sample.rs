//! Cases of `sample`: choices against f64 and a sort, frequencies against probabilities, a decode loop against the host.

use super::harness::{Cases, NAN, Run, normal};
use crate::error::Result;
use crate::kernels::gather;
use crate::kernels::sample::{self, Choice, Decoded, ENDED, Marks, NOT_A_NUMBER, RUNNING};
use crate::rng::{MaskKey, Rng, philox};
use crate::tensor::{POISON, Tensor};
use crate::verify::Comparison;

const INF: f32 = f32::INFINITY;
/// Of no row and no token of these cases.
const PAD: u32 = 1_000_000;
const NO_END: Marks = Marks { pad: PAD, end: None };

pub(super) fn sample(cases: &mut Cases<'_>) -> Result<()> {
    greedy(cases)?;
    draws(cases)?;
    frequencies(cases)?;
    stopping(cases)?;
    not_a_number(cases)?;
    decode_loop(cases)
}

fn draw(temperature: f32, top_k: Option<u32>) -> Choice {
    Choice::Draw { temperature, top_k, key: MaskKey::new(5, 6) }
}

/// `greedy`, `temperature 0.7, top-k Some(3)`.
pub(super) fn title(choice: &Choice) -> String {
    match choice {
        Choice::Greedy => "greedy".into(),
        Choice::Draw { temperature, top_k, .. } => format!("temperature {temperature}, top-k {top_k:?}"),
    }
}

/// One step on fresh rows; the tokens.
fn step(run: &mut Run<'_>, logits: &[f32], rows: usize, choice: &Choice) -> Result<Vec<u32>> {
    let logits = run.input("logits", logits, [rows, logits.len() / rows])?;
    let to = Decoded::new(run.device, 1, &vec![0; rows])?;
    sample::sample(&logits, &to, 0, NO_END, choice)?;
    run.bits("stopped", &to.stopped, &vec![RUNNING; rows])?;
    run.bits("lengths", &to.lengths, &vec![1; rows])?;
    let ids = run.read(&to.ids)?;
    run.bits("last", &to.last, &ids)?;
    Ok(ids)
}

fn greedy(cases: &mut Cases<'_>) -> Result<()> {
    const TINY: f32 = f32::from_bits(1);
    const MOST: f32 = f32::MAX;
    // A row's size, its background, what stands in it, and the choice.
    type Row = (usize, f32, &'static [(usize, f32)], u32);
    let table: [Row; 22] = [
        (1, -3.0, &[], 0),
        (1, -INF, &[], 0),
        (1, INF, &[], 0),
        (2, 1.0, &[], 0),
        (2, 1.0, &[(1, 1.5)], 1),
        (63, 0.0, &[(62, 1.0)], 62),
        (64, -1.0, &[(63, -0.5), (10, -0.5)], 10),
        (65, -1.0, &[(64, 0.0), (63, -0.0)], 63),
        (65, -1.0, &[(64, -0.0), (0, 0.0)], 0),
        (130, 2.0, &[(127, 7.0), (66, 7.0), (129, 7.0)], 66),
        (130, 2.0, &[(3, 7.0), (67, 7.0), (2, 7.0)], 2),
        (200, 0.0, &[(150, TINY), (151, TINY)], 150),
        (200, -0.0, &[(150, -TINY), (0, -TINY)], 1),
        (200, -TINY, &[(77, -2.0 * TINY), (0, -1.0)], 1),
        (100, -INF, &[(99, -MOST)], 99),
        (100, -INF, &[], 0),
        (100, MOST, &[(70, INF), (90, INF)], 70),
        (100, -MOST, &[(50, -1e38), (51, -1e37)], 51),
        (1000, -0.1, &[(777, -0.099_999)], 777),
        (1000, 5.0, &[(0, 4.0), (1, 4.0)], 2),
        (70_000, 1e-3, &[(69_999, 1.001e-3)], 69_999),
        (70_000, 0.0, &[(64, 1.0), (69_000, 1.0)], 64),
    ];
    for (index, (vocabulary, background, places, expected)) in table.into_iter().enumerate() {
        let mut row = vec![background; vocabulary];
        places.iter().for_each(|(id, z)| row[*id] = *z);
        cases.run(format!("greedy, row {index} of {vocabulary}"), |run| {
            // The coldest draw, and one out of a single token, have no choice but the maximum; nor has one beside infinities.
            for choice in [Choice::Greedy, draw(1.0, Some(1)), draw(1e-6, Some(1)), draw(1e6, Some(1))] {
                let ids = step(run, &row.repeat(3), 3, &choice)?;
                run.comparisons.push(Comparison::bits(title(&choice), &ids, &[expected; 3]));
            }
            Ok(())
        })?;
    }
    // More rows than workgroups.
    let rows = 65_535 + 70;
    let logits = normal(&mut Rng::seed(31), rows * 2);
    let expected: Vec<u32> = logits.chunks_exact(2).map(|z| u32::from(z[1] > z[0])).collect();
    cases.run(format!("greedy, {rows} rows"), |run| {
        let ids = step(run, &logits, rows, &Choice::Greedy)?;
        run.comparisons.push(Comparison::bits("ids", &ids, &expected));
        Ok(())
    })
}

/// The tokens that are within rounding of the best score of a row, by sorting and in f64.
pub(super) fn best(z: &[f32], row: usize, step: usize, temperature: f32, top_k: Option<u32>, key: MaskKey) -> Vec<u32> {
    let mut order: Vec<u32> = (0..z.len() as u32).collect();
    // Stable: of equal logits the lower id stays first.
    order.sort_by(|a, b| z[*b as usize].total_cmp(&z[*a as usize]));
    order.truncate(top_k.map_or(z.len(), |k| k as usize));
    let score = |id: &u32| {
        let [bits, ..] = philox(key.words(), [*id, row as u32, step as u32, 0x7361_6d70]);
        let u = (f64::from(bits) + 0.5) / 4_294_967_296.0;
        f64::from(z[*id as usize]) / f64::from(temperature) - (-(-u).ln_1p()).ln()
    };
    let scores: Vec<f64> = order.iter().map(score).collect();
    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let near = 1e-5 * (1.0 + z.iter().fold(0.0f64, |m, z| m.max(f64::from(z.abs()))) / f64::from(temperature)).max(4.0);
    order.into_iter().zip(scores).filter(|(_, score)| *score >= highest - near).map(|(id, _)| id).collect()
}

fn draws(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(32);
    let tied = |rng: &mut Rng, count: usize| -> Vec<f32> { (0..count).map(|_| rng.below(4) as f32 * 0.5 - 1.0).collect() };
    type Logits = fn(&mut Rng, usize) -> Vec<f32>;
    let table: [(usize, usize, f32, Option<u32>, Logits); 18] = [
        (3, 1, 0.7, None, normal),
        // So many rows that noise which is off by a thousandth changes some choices.
        (20_000, 2, 1.0, None, normal),
        (50, 2, 1.0, Some(1), normal),
        (50, 63, 0.7, None, normal),
        (50, 64, 2.0, Some(64), normal),
        (50, 65, 1e6, None, normal),
        (50, 65, 1e6, Some(64), normal),
        (50, 130, 1e-3, None, normal),
        (50, 1000, 1.3, Some(40), normal),
        (50, 1000, 0.5, Some(5_000), normal),
        // Ties, many more than take part: the lower ids do.
        (50, 300, 1.0, Some(7), |_, count| vec![0.25; count]),
        (50, 300, 1.0, Some(90), tied),
        (50, 17, 1.0, Some(16), tied),
        (50, 4096, 3.0, Some(257), tied),
        (50, 300, 1.0, Some(3), |_, count| (0..count).map(|at| if at % 2 == 0 { -0.0 } else { 0.0 }).collect()),
        (50, 300, 2.0, Some(299), |rng, count| (0..count).map(|_| rng.uniform(-5.0, 5.0)).collect()),
        (2, 70_000, 1.0, None, normal),
        (2, 70_000, 1.5, Some(60_001), tied),
    ];
    for (rows, vocabulary, temperature, top_k, logits) in table {
        let mut logits = logits(&mut rng, rows * vocabulary);
        // Zeros of both signs are equal; total_cmp in the reference does not think so.
        let key = MaskKey::new(33, vocabulary as u64);
        let expected: Vec<Vec<u32>> = logits
            .chunks_exact(vocabulary)
            .enumerate()
            .map(|(row, z)| best(&z.iter().map(|z| z + 0.0).collect::<Vec<_>>(), row, 0, temperature, top_k, key))
            .collect();
        let choice = Choice::Draw { temperature, top_k, key };
        cases.run(format!("{rows}x{vocabulary}, {}", title(&choice)), |run| {
            let ids = step(run, &logits, rows, &choice)?;
            let wrong = ids.iter().zip(&expected).filter(|(id, expected)| !expected.contains(id)).count();
            run.comparisons.push(Comparison::measured("wrong choices", wrong as f64, 0.0));
            let open = expected.iter().filter(|expected| expected.len() > 1).count();
            run.comparisons.push(Comparison::measured("close choices", open as f64, 1.0 + rows as f64 * 1e-4));
            Ok(())
        })?;
        // A token of no probability changes nothing for the others.
        logits.chunks_exact_mut(vocabulary).for_each(|z| z[0] = -INF);
        let finite = vocabulary > 1;
        cases.run(format!("{rows}x{vocabulary}, temperature {temperature}, the first -inf"), |run| {
            let ids = step(run, &logits, rows, &Choice::Draw { temperature, top_k: None, key })?;
            let wrong = ids.iter().filter(|id| finite && **id == 0).count();
            run.comparisons.push(Comparison::measured("drawn though impossible", wrong as f64, 0.0));
            Ok(())
        })?;
    }
    // Where an f32 cannot hold the quotient, and where the largest is infinite.
    for (z, temperature, expected) in [
        ([-3e38, 3e38, 2.9e38, 0.0], 1e-6, 1),
        ([-3e38, -2e38, -f32::MAX, -INF], 1e6, 1),
        ([-f32::MAX, -f32::MAX, -INF, -f32::MAX], 1e6, u32::MAX),
        ([-1.0, INF, 1.0, INF], 1.0, 1),
        ([-INF; 4], 1.0, 0),
    ] {
        cases.run(format!("{z:?}, temperature {temperature}"), |run| {
            let mut ids = step(run, &z.repeat(100), 100, &draw(temperature, None))?;
            // Of three equal ones each must come.
            if expected == u32::MAX {
                ids.sort_unstable();
                ids.dedup();
                run.comparisons.push(Comparison::bits("ids", &ids, &[0, 1, 3]));
            } else {
                run.comparisons.push(Comparison::bits("ids", &ids, &[expected; 100]));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Pearson's chi-squared of `ids` against softmax(z / temperature) of the tokens that take part; the others must not come.
fn chi_squared(ids: &[u32], z: &[f32], temperature: f32, part: &[usize]) -> f64 {
    let weight = |id: &usize| (f64::from(z[*id]) / f64::from(temperature)).exp();
    let total: f64 = part.iter().map(weight).sum();
    let mut counts = vec![0.0; z.len()];
    for id in ids {
        match counts.get_mut(*id as usize) {
            Some(count) if part.contains(&(*id as usize)) => *count += 1.0,
            _ => return f64::NAN,
        }
    }
    let term = |id: &usize| {
        let expected = weight(id) / total * ids.len() as f64;
        (counts[*id] - expected).powi(2) / expected
    };
    part.iter().map(term).sum()
}

fn frequencies(cases: &mut Cases<'_>) -> Result<()> {
    const DRAWS: usize = 20_000;
    let z = [0.3, -1.0, 1.2, 0.9, -0.2];
    // The bounds are exceeded by one seed in ten thousand, for 4 and 2 degrees of freedom.
    let table: [(f32, Option<u32>, &[usize], f64); 4] = [
        (0.7, None, &[0, 1, 2, 3, 4], 23.5),
        (0.7, Some(3), &[0, 2, 3], 18.4),
        (1.0, None, &[0, 1, 2, 3, 4], 23.5),
        (4.0, Some(3), &[0, 2, 3], 18.4),
    ];
    for (temperature, top_k, part, bound) in table {
        for steps in [1, 100] {
            let rows = DRAWS / steps;
            let choice = draw(temperature, top_k);
            cases.run(format!("frequencies in {steps}x{rows}, {}", title(&choice)), |run| {
                let logits = run.input("logits", &z.repeat(rows), [rows, z.len()])?;
                let to = Decoded::new(run.device, steps, &vec![0; rows])?;
                (0..steps).try_for_each(|t| sample::sample(&logits, &to, t, NO_END, &choice))?;
                let error = chi_squared(&run.read(&to.ids)?, &z, temperature, part);
                run.comparisons.push(Comparison::measured("chi-squared", error, bound));
                Ok(())
            })?;
        }
    }
    // Tokens of all lanes and many to a lane, by tens: 9 degrees of freedom.
    let (rows, vocabulary) = (4_000, 1_000);
    cases.run("frequencies of 1000 equal tokens", |run| {
        let ids = step(run, &vec![-2.0; rows * vocabulary], rows, &draw(1.0, None))?;
        let tenths: Vec<u32> = ids.iter().map(|id| id / 100).collect();
        let error = chi_squared(&tenths, &[0.0; 10], 1.0, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        run.comparisons.push(Comparison::measured("chi-squared", error, 33.7));
        let digits: Vec<u32> = ids.iter().map(|id| id % 10).collect();
        let error = chi_squared(&digits, &[0.0; 10], 1.0, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        run.comparisons.push(Comparison::measured("chi-squared of last digits", error, 33.7));
        Ok(())
    })
}

/// Rows that end at different steps, or never; what is not yet written stays as it is.
fn stopping(cases: &mut Cases<'_>) -> Result<()> {
    let (rows, vocabulary, steps) = (70, 5, 6);
    let mut rng = Rng::seed(34);
    let tokens: Vec<u32> = (0..steps * rows).map(|_| rng.below(vocabulary) as u32).collect();
    let logits: Vec<f32> =
        tokens.iter().flat_map(|token| (0..vocabulary as u32).map(move |v| if v == *token { 50.0 } else { v as f32 })).collect();
    for (marks, choice) in [
        (Marks { pad: 0, end: Some(3) }, Choice::Greedy),
        (Marks { pad: 7, end: Some(0) }, draw(0.5, None)),
        (Marks { pad: u32::MAX, end: Some(4) }, draw(0.5, Some(2))),
        (Marks { pad: 2, end: Some(2) }, Choice::Greedy),
        (Marks { pad: 1, end: None }, Choice::Greedy),
    ] {
        cases.run(format!("stopping, {marks:?}, {}", title(&choice)), |run| {
            let logits = run.input("logits", &logits, [steps, rows * vocabulary])?;
            let to = Decoded::new(run.device, steps, &vec![9; rows])?;
            run.bits("last before", &to.last, &vec![9; rows])?;
            let (mut ids, mut stopped, mut lengths) = (vec![POISON; steps * rows], vec![RUNNING; rows], vec![0; rows]);
            for t in 0..steps {
                let z = gather::gather(&Tensor::upload("step", run.device, &[t as u32], vec![1])?, &logits, rows * vocabulary)?;
                sample::sample(&z, &to, t, marks, &choice)?;
                for row in 0..rows {
                    let at = t * rows + row;
                    ids[at] = if stopped[row] == RUNNING { tokens[at] } else { marks.pad };
                    if stopped[row] == RUNNING {
                        lengths[row] += 1;
                        stopped[row] = if marks.end == Some(tokens[at]) { ENDED } else { RUNNING };
                    }
                }
                run.bits(&format!("ids at {t}"), &to.ids, &ids)?;
                run.bits(&format!("last at {t}"), &to.last, &ids[t * rows..][..rows])?;
                run.bits(&format!("stopped at {t}"), &to.stopped, &stopped)?;
                run.bits(&format!("lengths at {t}"), &to.lengths, &lengths)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// NaN of any kind, at any place, stops its own row with a mark, and no other.
fn not_a_number(cases: &mut Cases<'_>) -> Result<()> {
    let (rows, vocabulary) = (7, 70);
    let negative = f32::from_bits(0xffff_ffff);
    for (row, id, nan) in [(0, 0, NAN), (2, 30, negative), (6, 69, NAN), (3, 64, f32::from_bits(0x7f80_0001))] {
        for choice in [Choice::Greedy, draw(1.0, None), draw(1.0, Some(3))] {
            cases.run(format!("NaN at {row}, {id}, {}", title(&choice)), |run| {
                let mut z = normal(&mut Rng::seed(35), rows * vocabulary);
                (0..rows).for_each(|row| z[row * vocabulary + row] = 60.0);
                let whole = run.input("logits", &z, [rows, vocabulary])?;
                z[row * vocabulary + id] = nan;
                z[row * vocabulary + 40] = INF;
                let spoiled = run.input("logits with NaN", &z, [rows, vocabulary])?;
                let to = Decoded::new(run.device, 3, &vec![0; rows])?;
                for (t, logits) in [&whole, &spoiled, &whole].into_iter().enumerate() {
                    sample::sample(logits, &to, t, NO_END, &choice)?;
                }
                let mut ids: Vec<u32> = (0..rows as u32).collect::<Vec<_>>().repeat(3);
                (ids[rows + row], ids[2 * rows + row]) = (PAD, PAD);
                run.bits("ids", &to.ids, &ids)?;
                let each =
                    |own: u32, others: u32| -> Vec<u32> { (0..rows).map(|r| if r == row { own } else { others }).collect() };
                run.bits("stopped", &to.stopped, &each(NOT_A_NUMBER, RUNNING))?;
                run.bits("lengths", &to.lengths, &each(1, 3))
            })?;
        }
    }
    Ok(())
}

/// Tokens go from step to step on the device: the next step's logits are a row of a table for each last token.
fn decode_loop(cases: &mut Cases<'_>) -> Result<()> {
    let (rows, vocabulary, steps) = (11, 90, 30);
    let mut rng = Rng::seed(36);
    let mut next: Vec<u32> = (0..vocabulary as u32).collect();
    rng.shuffle(&mut next);
    let mut table = normal(&mut rng, vocabulary * vocabulary);
    next.iter().enumerate().for_each(|(token, next)| table[token * vocabulary + *next as usize] = 20.0);
    let start: Vec<u32> = (0..rows as u32).map(|row| row * 7).collect();
    let marks = Marks { pad: 0, end: Some(next[next[start[4] as usize] as usize]) };
    let mut ids = Vec::new();
    let (mut last, mut lengths, mut running) = (start.clone(), vec![0; rows], vec![true; rows]);
    for _ in 0..steps {
        for row in 0..rows {
            last[row] = if running[row] { next[last[row] as usize] } else { marks.pad };
            lengths[row] += u32::from(running[row]);
            running[row] &= Some(last[row]) != marks.end;
        }
        ids.extend(&last);
    }
    cases.run(format!("a decode loop of {steps} steps"), |run| {
        let table = run.input("table", &table, [vocabulary, vocabulary])?;
        let to = Decoded::new(run.device, steps, &start)?;
        let before = run.device.submissions();
        for t in 0..steps {
            sample::sample(&gather::gather(&to.last, &table, vocabulary)?, &to, t, marks, &Choice::Greedy)?;
        }
        let submissions = run.device.submissions() - before;
        run.comparisons.push(Comparison::measured("submissions in the loop", submissions as f64, 0.0));
        run.bits("ids", &to.ids, &ids)?;
        run.bits("lengths", &to.lengths, &lengths)
    })
}
