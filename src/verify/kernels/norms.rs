//! Layer normalization.

use super::harness::{Cases, NAN, OUTPUT, normal, to_bits, wide};
use crate::error::Result;
use crate::kernels::layer_norm::Norm;
use crate::nn::LstmConfig;
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::verify::Comparison;

/// The largest error relative to the largest element: a row's statistics are sums of it all.
const BOUND: f64 = 5e-6;

/// xhat `[rows, width]` and 1 / deviation `[rows]`, by Ba et al.'s formulas.
fn normalize(x: &[f32], width: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut xhat, mut inverses) = (Vec::new(), Vec::new());
    for row in wide(x).chunks_exact(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
        let inverse = 1.0 / (variance + 1e-5).sqrt();
        xhat.extend(row.iter().map(|x| (x - mean) * inverse));
        inverses.push(inverse);
    }
    (xhat, inverses)
}

/// Rows, width, mean and deviation of the numbers. Of two numbers that are far apart nothing but rounding would come back: there
/// the deviation is as small as the root of epsilon.
const SIZES: [([usize; 2], f32, f32); 14] = [
    ([1, 1], 2.0, 1.0),
    ([5, 1], 2.0, 1.0),
    ([1, 2], 0.0, 3e-3),
    ([5, 2], 1.0, 3e-3),
    ([3, 63], 0.0, 1.0),
    ([1, 64], 0.0, 1.0),
    ([4, 65], -1.0, 2.0),
    ([7, 200], 0.0, 1.0),
    ([1000, 65], 0.0, 1.0),
    ([70_000, 3], 0.0, 1.0),
    ([3, 1000], 1e-3, 1e-3),
    ([5, 200], 1e4, 1.0),
    ([5, 65], -3e5, 1.0),
    ([2, 64], 7.0, 0.0),
];

pub(super) fn layer_norm(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(21);
    for ([rows, width], mean, deviation) in SIZES {
        for loose in [false, true] {
            let mut draw = |count: usize, mean: f32, deviation: f32| -> Vec<f32> {
                normal(&mut rng, count).into_iter().map(|v| mean + deviation * v).collect()
            };
            let (x, gain, shift) = (draw(rows * width, mean, deviation), draw(width, 1.0, 0.5), draw(width, 0.0, 1.0));
            let (dy, dgain) = (draw(rows * width, 0.5, 1.0), draw(width, 0.0, 1.0));
            let (xhat, inverses) = normalize(&x, width);
            let wide_dy = wide(&dy);
            let (mut y, mut dx, mut gains) = (Vec::new(), Vec::new(), wide(&dgain));
            for (row, inverse) in inverses.iter().enumerate() {
                let (xhat, dy) = (&xhat[row * width..][..width], &wide_dy[row * width..][..width]);
                y.extend(xhat.iter().zip(&gain).map(|(xhat, gain)| xhat * f64::from(*gain)));
                let g: Vec<f64> = dy.iter().zip(&gain).map(|(dy, gain)| dy * f64::from(*gain)).collect();
                let over = |f: &dyn Fn(usize) -> f64| (0..width).map(f).sum::<f64>() / width as f64;
                let (mean, along) = (over(&|v| g[v]), over(&|v| g[v] * xhat[v]));
                dx.extend(xhat.iter().zip(&g).map(|(xhat, g)| (g - mean - xhat * along) * inverse));
                gains.iter_mut().zip(dy.iter().zip(xhat)).for_each(|(gain, (dy, xhat))| *gain += dy * xhat);
            }
            let shifted: Vec<f64> = y.iter().enumerate().map(|(at, y)| y + f64::from(shift[at % width])).collect();
            let (column, line) = if loose { (3, 2) } else { (0, 0) };
            let padded = |values: &[f32]| [&vec![NAN; column], values, &vec![NAN; column]].concat();
            let name = format!("{rows}x{width} about {mean:e} by {deviation:e}{}", if loose { ", windows" } else { "" });
            cases.run(name, |run| {
                let x = run.input_window("x", [rows, width], loose, &x)?;
                let dy = run.input_window("dy", [rows, width], loose, &dy)?;
                let gain = run.input("gain", &padded(&gain), [width + 2 * column])?;
                let shift = run.input("shift", &padded(&shift), [width + 2 * column])?;
                let stats = Tensor::uninitialized(run.device, [rows + line, 2])?;
                let norm = Norm { x: x.matrix(), gain: &gain, column, stats: &stats, line };
                let with = run.window([rows, width], loose, None)?;
                norm.forward(Some(&shift), with.matrix())?;
                run.near_window("y", &with, &shifted, BOUND)?;
                let without = run.window([rows, width], loose, None)?;
                norm.forward(None, without.matrix())?;
                run.near_window("y without a shift", &without, &y, BOUND)?;
                let gradient = run.window([rows, width], loose, None)?;
                norm.backward(dy.matrix(), gradient.matrix())?;
                run.near_window("dx", &gradient, &dx, BOUND)?;
                // Where a software driver ends a loop after 65535 rounds, no lane adds up more rows.
                if rows > 65_535 {
                    return Ok(());
                }
                let dgain = Tensor::from_slice(run.device, &padded(&dgain), [width + 2 * column])?;
                norm.backward_gain(dy.matrix(), &dgain)?;
                let inside = |at: usize| at >= column && at < column + width;
                let expected: Vec<f64> =
                    (0..width + 2 * column).map(|at| if inside(at) { gains[at - column] } else { 0.0 }).collect();
                run.near_where("dgain", &dgain, &expected, BOUND, inside)?;
                run.nan("words around dgain", &dgain, |at| !inside(at))
            })?;
        }
    }
    // NaN stays in its row.
    let (rows, width) = (3, 70);
    let mut x = normal(&mut rng, rows * width);
    x[width + 66] = NAN;
    cases.run("NaN in x", |run| {
        let x = run.input_window("x", [rows, width], false, &x)?;
        let gain = run.input("gain", &vec![1.0; width], [width])?;
        let dy = run.input_window("dy", [rows, width], false, &vec![1.0; rows * width])?;
        let (y, dx) = (run.window([rows, width], false, None)?, run.window([rows, width], false, None)?);
        let stats = Tensor::uninitialized(run.device, [rows, 2])?;
        let norm = Norm { x: x.matrix(), gain: &gain, column: 0, stats: &stats, line: 0 };
        norm.forward(None, y.matrix())?;
        run.nan("y", &y.tensor, |at| at / width == 1)?;
        norm.backward(dy.matrix(), dx.matrix())?;
        run.nan("dx", &dx.tensor, |at| at / width == 1)
    })?;
    many_rows(cases)
}

/// Of an LSTM more rows than workgroups: the last ones are the first ones again. What layers compute is under test in `networks`.
fn many_rows(cases: &mut Cases<'_>) -> Result<()> {
    const GROUPS: usize = 65_535;
    const MORE: usize = 3;
    const INPUT: usize = 3;
    let mut rng = Rng::seed(22);
    let layer = LstmConfig::new(INPUT, 2).layer_norm(true).init(cases.device, &mut rng)?;
    let mut x = normal(&mut rng, GROUPS * INPUT);
    x.extend_from_within(..MORE * INPUT);
    cases.run(format!("lstm of {} rows", GROUPS + MORE), |run| {
        let x = Tensor::from_slice(run.device, &x, [1, GROUPS + MORE, INPUT])?;
        let (y, _, tape) = layer.forward_train(&x, None)?;
        let (dx, _) = layer.backward(tape, &y, None)?;
        for (name, tensor) in [("y", y), ("dx", dx)] {
            let values = tensor.to_vec()?;
            let (rows, last) = values.split_at(GROUPS * tensor.shape()[2]);
            run.comparisons.push(Comparison::new(name, last, &wide(&rows[..last.len()]), OUTPUT));
            run.words.extend(to_bits(&values));
        }
        Ok(())
    })
}
