//! Cases of `pooling`, and of what wrapped layers are joined with: `elementwise` and `columns`.

use super::harness::{Cases, MANY, NAN, Run, TIGHT, mixed, normal, pad, ragged, wide};
use crate::error::Result;
use crate::kernels::columns::copy_columns;
use crate::kernels::elementwise as arithmetic;
use crate::kernels::pooling::{self as kernels, Sequences};
use crate::rng::Rng;
use crate::verify::Comparison;

/// The valid steps of number `cell` of `[batch, width]`.
fn valid(lengths: Option<&[u32]>, steps: usize, width: usize, cell: usize) -> usize {
    lengths.map_or(steps, |lengths| lengths[cell / width] as usize)
}

/// The numbers of dx `[steps, cells]`, of which `of` gives one.
fn by_step(steps: usize, cells: usize, of: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..steps * cells).map(|at| of(at / cells, at % cells)).collect()
}

pub(super) fn pooling(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(20);
    for (steps, batch, width, is_ragged) in [
        (1, 1, 1, false),
        (1, 3, 2, true),
        (2, 1, 64, false),
        (7, 3, 3, true),
        (5, 9, 7, true),
        (40, 5, 13, true),
        (6, 4, 65, false),
        (3, 64, 5, true),
        (1000, 2, 3, true),
        // More numbers than one launch has lanes: of y, of dx.
        (1, 1, MANY, false),
        (3, 2, MANY / 6 + 1, true),
    ] {
        let cells = batch * width;
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, batch));
        let lengths = lengths.as_deref();
        let length = |cell: usize| valid(lengths, steps, width, cell);
        let [mut plain, mut odd] = [normal(&mut rng, steps * cells), mixed(&mut rng, steps * cells)];
        pad(&mut plain, width, lengths, batch, NAN);
        // The largest of all numbers is one that does not count.
        pad(&mut odd, width, lengths, batch, if steps % 2 == 1 { f32::INFINITY } else { NAN });
        let dy = normal(&mut rng, cells);
        let name = |what: &str| format!("{what} {steps}x{batch}x{width}{}", if is_ragged { ", ragged" } else { "" });
        let given = |run: &mut Run<'_>, x: &[f32]| -> Result<_> {
            let (x, dy) = (run.input("x", x, [steps, batch, width])?, run.input("dy", &dy, [batch, width])?);
            Ok((x, dy, run.lengths(lengths)?))
        };

        let mean: Vec<f64> = (0..cells)
            .map(|cell| (0..length(cell)).map(|t| f64::from(plain[t * cells + cell])).sum::<f64>() / length(cell).max(1) as f64)
            .collect();
        let share = |t: usize, cell: usize| if t < length(cell) { f64::from(dy[cell]) / length(cell) as f64 } else { 0.0 };
        cases.run(name("mean"), |run| {
            let (x, dy, lengths) = given(run, &plain)?;
            let sequences = Sequences { steps, batch, width, lengths: lengths.as_ref() };
            run.near("y", &kernels::mean(&x, sequences)?, &mean, TIGHT)?;
            run.near("dx", &kernels::mean_backward(&dy, sequences)?, &by_step(steps, cells, share), TIGHT)
        })?;

        for split in [0, width / 2, width] {
            let from = |cell: usize| match length(cell) {
                0 => None,
                length => Some(if cell % width < split { length - 1 } else { 0 }),
            };
            let last: Vec<u32> = (0..cells).map(|cell| from(cell).map_or(0, |t| odd[t * cells + cell].to_bits())).collect();
            let chosen = |t: usize, cell: usize| if from(cell) == Some(t) { f64::from(dy[cell]) } else { 0.0 };
            cases.run(format!("{}, split {split}", name("last")), |run| {
                let (x, dy, lengths) = given(run, &odd)?;
                let sequences = Sequences { steps, batch, width, lengths: lengths.as_ref() };
                run.bits("y", &kernels::last(&x, split, sequences)?, &last)?;
                run.near("dx", &kernels::last_backward(&dy, split, sequences)?, &by_step(steps, cells, chosen), 0.0)
            })?;
        }

        // Compared in f64; ties (zeros of both signs, hundreds) go to the first.
        let first = |cell: usize| {
            (0..length(cell)).fold(None, |best: Option<usize>, t| match best {
                Some(best) if odd[best * cells + cell] >= odd[t * cells + cell] => Some(best),
                _ => Some(t),
            })
        };
        let at: Vec<u32> = (0..cells).map(|cell| first(cell).map_or(steps, |t| t) as u32).collect();
        let largest: Vec<u32> = (0..cells).map(|cell| first(cell).map_or(0, |t| odd[t * cells + cell].to_bits())).collect();
        let chosen = |t: usize, cell: usize| if at[cell] as usize == t { f64::from(dy[cell]) } else { 0.0 };
        cases.run(name("max"), |run| {
            let (x, dy, lengths) = given(run, &odd)?;
            let sequences = Sequences { steps, batch, width, lengths: lengths.as_ref() };
            let (y, found) = kernels::max(&x, sequences)?;
            run.bits("y", &y, &largest)?;
            run.bits("found", &found, &at)?;
            run.near("dx", &kernels::max_backward(&dy, &found, sequences)?, &by_step(steps, cells, chosen), 0.0)
        })?;
    }

    // NaN at a valid step comes through in its column and no other; past the end it does not, nor does infinity. Of two NaN the
    // first counts, whatever its sign, and before infinity.
    let (steps, batch, width) = (6, 3, 5);
    let cells = batch * width;
    let lengths = [4, 6, 0];
    let mut x = normal(&mut rng, steps * cells);
    pad(&mut x, width, Some(&lengths), batch, NAN);
    let bad = [(2, 1, -NAN), (3, 1, NAN), (5, 7, NAN), (1, 7, f32::INFINITY), (0, 8, f32::INFINITY), (5, 9, f32::NEG_INFINITY)];
    for (t, cell, value) in bad {
        x[t * cells + cell] = value;
    }
    cases.run("NaN in x", |run| {
        let (x, lengths) = (run.input("x", &x, [steps, batch, width])?, run.lengths(Some(&lengths))?);
        let sequences = Sequences { steps, batch, width, lengths: lengths.as_ref() };
        run.nan("mean", &kernels::mean(&x, sequences)?, |cell| [1, 7].contains(&cell))?;
        run.nan("last", &kernels::last(&x, width, sequences)?, |cell| [1, 7].contains(&cell))?;
        run.nan("last, but some columns of step 0", &kernels::last(&x, 1, sequences)?, |_| false)?;
        let (y, found) = kernels::max(&x, sequences)?;
        run.nan("max", &y, |cell| [1, 7].contains(&cell))?;
        let found = run.read(&found)?;
        let at: Vec<u32> = [1, 7, 8, 10, 14].iter().map(|cell| found[*cell]).collect();
        run.comparisons.push(Comparison::bits("found", &at, &[2, 5, 0, 6, 6]));
        let y: Vec<u32> = run.read(&y)?;
        let sure = y[8] == f32::INFINITY.to_bits() && y[9] != f32::NEG_INFINITY.to_bits() && y[10..].iter().all(|y| *y == 0);
        run.comparisons.push(Comparison::measured("infinities", f64::from(u8::from(!sure)), 0.0));
        Ok(())
    })?;
    // NaN in dy stays in its column, and reaches no step past the end.
    let mut dy = normal(&mut rng, cells);
    (dy[2], dy[12]) = (NAN, NAN);
    cases.run("NaN in dy", |run| {
        let dy = run.input("dy", &dy, [batch, width])?;
        let (ids, lengths) = (run.ids("found", &[3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6])?, run.lengths(Some(&lengths))?);
        let sequences = Sequences { steps, batch, width, lengths: lengths.as_ref() };
        run.nan("dx of mean", &kernels::mean_backward(&dy, sequences)?, |at| at % cells == 2 && at / cells < 4)?;
        run.nan("dx of last", &kernels::last_backward(&dy, 3, sequences)?, |at| at == 3 * cells + 2)?;
        run.nan("dx of max", &kernels::max_backward(&dy, ids.tensor(), sequences)?, |at| at == cells + 2)
    })
}

pub(super) fn elementwise(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(21);
    for (rows, period) in [(1, 1), (1, 63), (2, 64), (3, 65), (70, 1), (9, 5), (1, MANY), (2, MANY / 2 + 1)] {
        // Large numbers hide errors in the others: only some cases have them.
        let draw = if rows % 2 == 1 { mixed } else { normal };
        let (a, b, factor) = (draw(&mut rng, rows * period), draw(&mut rng, period), rng.normal());
        let with = |f: fn(f64, f64) -> f64| -> Vec<f64> {
            a.iter().enumerate().map(|(at, a)| f(f64::from(*a), f64::from(b[at % period]))).collect()
        };
        let (sum, product) = (with(|a, b| a + b), with(|a, b| a * b));
        let square: Vec<f64> = a.iter().map(|a| f64::from(*a).powi(2)).collect();
        let multiple: Vec<f64> = a.iter().map(|a| f64::from(*a) * f64::from(factor)).collect();
        cases.run(format!("{rows}x{period}"), |run| {
            let (a, b) = (run.input("a", &a, [rows, period])?, run.input("b", &b, [period])?);
            run.near("sum", &arithmetic::add(&a, &b)?, &sum, TIGHT)?;
            run.near("product", &arithmetic::multiply(&a, &b)?, &product, TIGHT)?;
            run.near("multiple", &arithmetic::scale(&a, factor)?, &multiple, TIGHT)?;
            run.near("square", &arithmetic::multiply(&a, &a)?, &square, TIGHT)
        })?;
    }
    let (mut a, mut b) = (normal(&mut rng, 70), normal(&mut rng, 7));
    (a[3], b[6]) = (NAN, NAN);
    cases.run("NaN in both", |run| {
        let (a, b) = (run.input("a", &a, [10, 7])?, run.input("b", &b, [7])?);
        for (name, y) in [("sum", arithmetic::add(&a, &b)?), ("product", arithmetic::multiply(&a, &b)?)] {
            run.nan(name, &y, |at| at == 3 || at % 7 == 6)?;
        }
        run.nan("multiple", &arithmetic::scale(&a, 0.0)?, |at| at == 3)
    })
}

pub(super) fn columns(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(22);
    for [rows, cols] in [[1, 1], [1, 65], [5, 63], [64, 1], [7, 9], [1, MANY], [MANY / 3 + 1, 3]] {
        let x = mixed(&mut rng, rows * cols);
        for loose in [false, true] {
            cases.run(format!("{rows}x{cols}{}", if loose { " windows" } else { "" }), |run| {
                let x_window = run.input_window("x", [rows, cols], loose, &x)?;
                let y = run.window([rows, cols], !loose, None)?;
                copy_columns(x_window.matrix(), y.matrix())?;
                run.near_window("y", &y, &wide(&x), 0.0)?;
                let y = run.window([rows, cols], loose, None)?;
                copy_columns(x_window.matrix(), y.matrix())?;
                run.near_window("y", &y, &wide(&x), 0.0)
            })?;
        }
    }
    let mut x = normal(&mut rng, 35);
    x[17] = NAN;
    cases.run("NaN in x", |run| {
        let x = run.input_window("x", [5, 7], false, &x)?;
        let y = run.window([5, 7], false, None)?;
        copy_columns(x.matrix(), y.matrix())?;
        run.nan("y", &y.tensor, |at| at == 17)
    })
}
