//! The kernels that measure a device: a bench of wrong numbers would be one of wrong speeds.

use super::harness::{Cases, MANY, TIGHT, mixed, to_bits};
use crate::error::Result;
use crate::kernels::peak;
use crate::rng::Rng;
use crate::tensor::Tensor;

pub(super) fn peak(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(31);
    for count in [4, 8, 160, 252, 260, 4 * MANY] {
        let x = mixed(&mut rng, count);
        cases.run(format!("copy of {count}"), |run| {
            let y = Tensor::uninitialized(run.device, [count])?;
            peak::copy(&run.input("x", &x, [count])?, &y)?;
            run.bits("y", &y, &to_bits(&x))
        })?;
    }
    for (count, rounds) in [(4, 0), (4, 8), (84, 16), (252, 64), (4 * 70_000, 8)] {
        // Below 1 / 2 a chain converges.
        let x: Vec<f32> = (0..count).map(|_| rng.uniform(0.0, 0.5)).collect();
        let chain = |x: f64, from: f64| (0..rounds).fold(from, |c, _| c * x + x);
        let expected: Vec<f64> = x.iter().map(|x| chain(f64::from(*x), 0.0) + chain(f64::from(*x), 1.0)).collect();
        cases.run(format!("{rounds} multiply-adds of {count}"), |run| {
            let (x, y) = (run.input("x", &x, [count])?, Tensor::uninitialized(run.device, [count])?);
            peak::multiply_add(&x, &y, rounds)?;
            run.near("y", &y, &expected, TIGHT)
        })?;
    }
    Ok(())
}
