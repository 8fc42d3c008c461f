//! Losses and their gradients.

use super::harness::{Cases, MANY, NAN, OUTPUT, TIGHT, hundreds, mixed, normal, pad, ragged, wide, within};
use crate::error::Result;
use crate::kernels;
use crate::kernels::cross_entropy::Counted;
use crate::rng::Rng;
use crate::verify::{Comparison, oracle};

pub(super) fn cross_entropy(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(7);
    type Draw = fn(&mut Rng, usize) -> Vec<f32>;
    let table: [(usize, usize, usize, Option<u32>, bool, Draw); 14] = [
        (1, 1, 1, None, false, normal),
        (3, 2, 1, Some(7), true, mixed),
        (1, 5, 2, None, false, normal),
        (4, 3, 63, None, true, mixed),
        (4, 3, 64, Some(0), true, normal),
        (4, 3, 65, Some(3), false, mixed),
        (2, 3, 128, None, false, hundreds),
        (2, 3, 129, None, true, hundreds),
        (1, 7, 2, Some(1), false, hundreds),
        (5, 4, 3, Some(2), true, |_, count| vec![0.0; count]),
        (2, 2, 9, None, false, |rng, count| normal(rng, count).into_iter().map(|z| z + 1e4).collect()),
        (2, 2, 1000, Some(9999), true, normal),
        (1, 3, 70, None, false, |rng, count| normal(rng, count).into_iter().map(|z| 1e-40 * z).collect()),
        // More rows than workgroups, and more classes than lanes that run abreast: a row may not overtake the one before it. Not ragged,
        // so that both count.
        (33_000, 2, 20, Some(1), false, normal),
    ];
    for (steps, batch, classes, ignored, is_ragged, draw) in table {
        let rows = steps * batch;
        let mut z = draw(&mut rng, rows * classes);
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, batch));
        let mut targets: Vec<u32> = (0..rows).map(|_| rng.below(classes) as u32).collect();
        if let Some(ignored) = ignored.filter(|_| rows > 1) {
            targets[rows / 2] = ignored;
        }
        // For the oracle, rows that do not count have a target of their own; here their logits are NaN.
        let counts = |row: usize| Some(targets[row]) != ignored && within(lengths.as_deref(), batch, row);
        let oracle_targets: Vec<u32> = (0..rows).map(|row| if counts(row) { targets[row] } else { u32::MAX }).collect();
        (0..rows).filter(|row| !counts(*row)).for_each(|row| z[row * classes..][..classes].fill(NAN));
        let counted = oracle_targets.iter().filter(|target| **target != u32::MAX).count();
        let (loss, dz) = oracle::cross_entropy(&wide(&z), classes, &oracle_targets, Some(u32::MAX));
        let term = |row: usize| oracle::cross_entropy(&wide(&z[row * classes..][..classes]), classes, &[targets[row]], None).0;
        let terms: Vec<f64> = (0..rows).map(|row| if counts(row) { term(row) } else { 0.0 }).collect();
        let name = format!("{steps}x{batch}x{classes}, ignored {ignored:?}{}", if is_ragged { ", ragged" } else { "" });
        cases.run(name, |run| {
            let (z, ids) = (run.input("z", &z, [rows, classes])?, run.ids("targets", &targets)?);
            let lengths = run.lengths(lengths.as_deref())?;
            let counted = Counted { batch, lengths: lengths.as_ref(), scale: 1.0 / counted.max(1) as f32 };
            let launch = |gradient| kernels::cross_entropy::cross_entropy(&z, ids.tensor(), ignored, counted, gradient);
            let (computed, gradient) = launch(true)?;
            run.near("terms", &computed, &terms, OUTPUT)?;
            run.near(
                "loss",
                &kernels::reduce::sum(&computed, counted.scale)?,
                &[if loss.is_nan() { 0.0 } else { loss }],
                OUTPUT,
            )?;
            if let Some(gradient) = &gradient {
                run.near("dz", gradient, &dz, OUTPUT)?;
            }
            let (computed, none) = launch(false)?;
            run.near("terms without dz", &computed, &terms, OUTPUT)?;
            let gradients = f64::from(u8::from(gradient.is_some())) - 1.0 + f64::from(u8::from(none.is_some()));
            run.comparisons.push(Comparison::measured("gradients asked for", gradients.abs(), 0.0));
            Ok(())
        })?;
    }
    // A NaN anywhere in a row, at its first, wanted, or last class, makes the whole row's results NaN, and no other's.
    let (rows, classes) = (5, 70);
    for (row, class) in [(0, 0), (2, 30), (4, 69), (3, 64)] {
        let mut z = normal(&mut rng, rows * classes);
        z[row * classes + class] = NAN;
        cases.run(format!("NaN at {row}, {class}"), |run| {
            let (z, ids) = (run.input("z", &z, [rows, classes])?, run.ids("targets", &[30; 5])?);
            let counted = Counted { batch: rows, lengths: None, scale: 0.2 };
            let (terms, dz) = kernels::cross_entropy::cross_entropy(&z, ids.tensor(), None, counted, true)?;
            run.nan("terms", &terms, |at| at == row)?;
            dz.iter().try_for_each(|dz| run.nan("dz", dz, |at| at / classes == row))
        })?;
    }
    Ok(())
}

pub(super) fn mean_squared_error(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(8);
    for (steps, batch, width, is_ragged) in [
        (1, 1, 1, false),
        (7, 3, 3, true),
        (7, 9, 1, false),
        (4, 16, 1, true),
        (13, 5, 1, true),
        (3, 2, 65, true),
        (MANY, 1, 1, false),
    ] {
        let count = steps * batch * width;
        let (mut y, mut wanted) = (mixed(&mut rng, count), mixed(&mut rng, count));
        let lengths = is_ragged.then(|| ragged(&mut rng, steps, batch));
        let counts: Vec<bool> = (0..count).map(|at| within(lengths.as_deref(), batch, at / width)).collect();
        pad(&mut y, width, lengths.as_deref(), batch, NAN);
        pad(&mut wanted, width, lengths.as_deref(), batch, NAN);
        let (loss, dy) = oracle::mean_squared_error(&wide(&y), &wide(&wanted), &counts);
        let term = |at: usize| if counts[at] { (f64::from(y[at]) - f64::from(wanted[at])).powi(2) } else { 0.0 };
        let terms: Vec<f64> = (0..count).map(term).collect();
        let scale = 1.0 / counts.iter().filter(|counts| **counts).count() as f32;
        cases.run(format!("{steps}x{batch}x{width}{}", if is_ragged { ", ragged" } else { "" }), |run| {
            let (y, wanted) = (run.input("y", &y, [count])?, run.input("wanted", &wanted, [count])?);
            let lengths = run.lengths(lengths.as_deref())?;
            let counted = Counted { batch, lengths: lengths.as_ref(), scale };
            let (computed, gradient) = kernels::mean_squared_error::mean_squared_error(&y, &wanted, width, counted)?;
            run.near("terms", &computed, &terms, TIGHT)?;
            run.near("dy", &gradient, &dy, TIGHT)?;
            run.near("loss", &kernels::reduce::sum(&computed, scale)?, &[loss], OUTPUT)
        })?;
    }
    let mut values = [normal(&mut rng, 70), normal(&mut rng, 70)];
    (values[0][3], values[1][68]) = (NAN, NAN);
    cases.run("NaN in both", |run| {
        let (y, wanted) = (run.input("y", &values[0], [70])?, run.input("wanted", &values[1], [70])?);
        let counted = Counted { batch: 7, lengths: None, scale: 1.0 };
        let (terms, dy) = kernels::mean_squared_error::mean_squared_error(&y, &wanted, 1, counted)?;
        run.nan("terms", &terms, |at| at == 3 || at == 68)?;
        run.nan("dy", &dy, |at| at == 3 || at == 68)
    })
}
