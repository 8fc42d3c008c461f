//! Dropout and its masks.

use super::harness::{Cases, MANY, normal};
use crate::error::Result;
use crate::kernels;
use crate::rng::{MaskKey, Rng, philox, unit};
use crate::tensor::Tensor;
use crate::verify::Comparison;

/// What multiplies the element at `[t, row, unit]` of a tensor `[steps, rows, width]`, for all of them.
pub(super) fn mask(steps: usize, rows: usize, width: usize, p: f32, key: MaskKey) -> Vec<f32> {
    let kept = |at: usize| {
        let [u, row, t] = [at % width, at / width % rows, at / width / rows].map(|n| n as u32);
        unit(philox(key.words(), [u, row, t, 0])[0]) >= p
    };
    (0..steps * rows * width).map(|at| if kept(at) { 1.0 / (1.0 - p) } else { 0.0 }).collect()
}

pub(super) fn dropout(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(10);
    for (steps, rows, width, p) in
        [(1, 1, 1, 0.5), (3, 7, 3, 0.0), (5, 4, 16, 0.1), (13, 5, 1, 0.5), (6, 4, 65, 0.9), (3, 2, MANY / 6 + 1, 0.25)]
    {
        let key = MaskKey::new(11, steps as u64);
        // In one case the first draw is exactly p, and is kept.
        let p = if width == 65 { unit(philox(key.words(), [0; 4])[0]) } else { p };
        let mask = mask(steps, rows, width, p, key);
        let masked = |x: &[f32]| -> Vec<u32> {
            // Not a product with the mask: that would turn -1 into -0.
            x.iter().zip(&mask).map(|(x, mask)| if *mask == 0.0 { 0 } else { (x * mask).to_bits() }).collect()
        };
        let (x, dy) = (normal(&mut rng, mask.len()), normal(&mut rng, mask.len()));
        let (y, dx) = (masked(&x), masked(&dy));
        cases.run(format!("{steps}x{rows}x{width}, p {p}"), |run| {
            let (x, dy) = (run.input("x", &x, [steps, rows, width])?, run.input("dy", &dy, [steps, rows, width])?);
            run.bits("y", &kernels::dropout::dropout(&x, [0, rows, width], p, key)?, &y)?;
            run.bits("dx", &kernels::dropout::dropout(&dy, [0, rows, width], p, key)?, &dx)?;
            // Five standard deviations.
            let (zeros, n) = (mask.iter().filter(|mask| **mask == 0.0).count() as f64, mask.len() as f64);
            let p = f64::from(p);
            let error = if n > 1.0 { (zeros / n - p).abs() } else { 0.0 };
            run.comparisons.push(Comparison::measured("rate", error, 5.0 * (p * (1.0 - p) / n).sqrt()));
            Ok(())
        })?;
    }
    // More rows and steps change no mask of those that were there.
    let (steps, rows, width, key) = (4, 3, 37, MaskKey::new(1, 2));
    cases.run("a padded batch", |run| {
        let ones =
            |steps: usize, rows: usize| Tensor::from_slice(run.device, &vec![1.0; steps * rows * width], [steps, rows, width]);
        let small: Vec<u32> = kernels::dropout::dropout(&ones(steps, rows)?, [0, rows, width], 0.5, key)?.read_back()?;
        let large: Vec<u32> =
            kernels::dropout::dropout(&ones(steps + 2, rows + 4)?, [0, rows + 4, width], 0.5, key)?.read_back()?;
        let part: Vec<u32> = (0..steps).flat_map(|t| &large[t * (rows + 4) * width..][..rows * width]).copied().collect();
        run.comparisons.push(Comparison::bits("masks", &part, &small));
        let late: Vec<u32> = kernels::dropout::dropout(&ones(steps - 1, rows)?, [1, rows, width], 0.5, key)?.read_back()?;
        run.comparisons.push(Comparison::bits("masks of a later window", &late, &small[rows * width..]));
        let other: Vec<u32> = kernels::dropout::dropout(&ones(steps, rows)?, [0, rows, width], 0.5, key.layer(1))?.read_back()?;
        let differ = f64::from(u8::from(other == small));
        run.comparisons.push(Comparison::measured("another key, the same mask", differ, 0.0));
        Ok(())
    })
}
