//! Sums of columns, and of all elements.

use super::harness::{Cases, MANY, NAN, TIGHT, hundreds, mixed, normal, wide};
use crate::error::Result;
use crate::kernels;
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::verify::oracle;

pub(super) fn column_sum(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(5);
    // On the GPU a block has 128 rows: one row of blocks, two, more than a block of them, more rows than a shader's loop may have rounds.
    let sizes = [[1, 1], [2, 3], [5, 63], [4, 64], [3, 65], [127, 5], [128, 6], [129, 66], [1000, 129], [70_000, 3], [1, MANY]];
    for [rows, columns] in sizes {
        for loose in [false, true] {
            // Sums of that many hundreds are exact.
            let draw = if rows > 65_535 {
                hundreds
            } else if loose {
                mixed
            } else {
                normal
            };
            let (x, before) = (draw(&mut rng, rows * columns), normal(&mut rng, columns));
            let mut expected = wide(&before);
            x.chunks_exact(columns).for_each(|row| expected.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x)));
            cases.run(format!("{rows}x{columns}{}", if loose { " windows" } else { "" }), |run| {
                let x = run.input_window("x", [rows, columns], loose, &x)?;
                let sums = run.window([1, columns], loose, Some(&before))?;
                kernels::column_sum::column_sum(x.matrix(), sums.offset, &sums.tensor)?;
                run.near_window("sums", &sums, &expected, TIGHT)
            })?;
        }
    }
    for (rows, columns) in [(5, 70), (300, 70)] {
        let mut x = normal(&mut rng, rows * columns);
        x[(rows - 2) * columns + 66] = NAN;
        cases.run(format!("NaN in {rows} rows"), |run| {
            let x = run.input_window("x", [rows, columns], false, &x)?;
            let sums = Tensor::zeros(run.device, [columns])?;
            kernels::column_sum::column_sum(x.matrix(), 0, &sums)?;
            run.nan("sums", &sums, |at| at == 66)
        })?;
    }
    Ok(())
}

pub(super) fn reduce(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(6);
    // 256 lanes, blocks of 4096, at most 1024 blocks.
    for count in [1, 2, 255, 256, 257, 4095, 4096, 4097, 8193, 100_000, 4096 * 1024 + 1] {
        // Mostly of one sign: a sum that cancels says nothing of the error.
        let x: Vec<f32> = mixed(&mut rng, count).into_iter().map(|x| if x.abs() < 50.0 { x + 1.0 } else { x.abs() }).collect();
        let sum: f64 = x.iter().map(|x| f64::from(*x)).sum();
        let squares = oracle::global_norm(&[&wide(&x)]).powi(2);
        cases.run(count.to_string(), |run| {
            let x = run.input("x", &x, [count])?;
            run.near("sum", &kernels::reduce::sum(&x, 0.25)?, &[0.25 * sum], 2.0 * TIGHT)?;
            run.near("sum of squares", &kernels::reduce::sum_of_squares(&x)?, &[squares], 2.0 * TIGHT)
        })?;
    }
    for (count, at) in [(1, 0), (4097, 4096), (9000, 5000)] {
        let mut x = normal(&mut rng, count);
        x[at] = NAN;
        cases.run(format!("NaN at {at} of {count}"), |run| {
            let x = run.input("x", &x, [count])?;
            run.nan("sum", &kernels::reduce::sum(&x, 1.0)?, |_| true)?;
            run.nan("sum of squares", &kernels::reduce::sum_of_squares(&x)?, |_| true)
        })?;
    }
    Ok(())
}
