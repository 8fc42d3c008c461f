//! Elementary functions.

use super::harness::{Cases, MANY, is_nan, to_bits};
use crate::error::Result;
use crate::kernels::math_probe::{self, FUNCTIONS};
use crate::tensor::Tensor;
use crate::verify::Comparison;

pub(super) fn math(cases: &mut Cases<'_>) -> Result<()> {
    // A prime: every exponent and sign, and low bits of every kind. It makes more numbers than one launch has lanes.
    const STRIDE: usize = 1021;
    let mut x: Vec<f32> = (0..=u32::MAX).step_by(STRIDE).map(f32::from_bits).collect();
    assert!(x.len() > MANY);
    let inf = f32::INFINITY;
    x.extend([100.0, -100.0, inf, -inf, -0.0, 1e-40, -1e-40, 88.722_83, 88.722_84, -87.336_54, -87.336_55, 9.02, 0.625, 1.0]);
    x.extend([0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, u32::MAX].map(f32::from_bits));
    // Division rounds correctly on the CPU; WGSL allows it 2.5 ULP.
    let bounds = if cases.device.is_cpu() { [1.5, 1.5, 2.5, 2.5] } else { [2.5, 2.5, 3.0, 4.5] };
    let exact: [&[(f32, f32)]; 4] = [
        &[(0.0, 1.0), (-0.0, 1.0), (inf, inf), (-inf, 0.0), (-200.0, 0.0), (200.0, inf)],
        &[(0.0, -inf), (-0.0, -inf), (1.0, 0.0), (inf, inf)],
        &[(0.0, 0.0), (-0.0, -0.0), (100.0, 1.0), (-100.0, -1.0), (inf, 1.0), (-inf, -1.0)],
        &[(0.0, 0.5), (-0.0, 0.5), (100.0, 1.0), (-100.0, 0.0), (inf, 1.0), (-inf, 0.0)],
    ];
    for (index, function) in FUNCTIONS.iter().enumerate() {
        let expected: Vec<f64> = x.iter().map(|x| (function.exact)(f64::from(*x))).collect();
        cases.run(function.name, |run| {
            let y = math_probe::probe(index, &run.input("x", &x, [x.len()])?)?;
            let y = run.read(&y)?;
            let mut worst = 0.0;
            for (got, want) in y.iter().zip(&expected) {
                let error = ulps(*got, *want);
                if !(error <= worst) {
                    worst = error;
                }
            }
            run.comparisons.push(Comparison { tensor: "ULP".into(), error: worst, bound: bounds[index] });
            let (from, to): (Vec<f32>, Vec<f32>) = exact[index].iter().copied().unzip();
            let y = math_probe::probe(index, &Tensor::from_slice(run.device, &from, [from.len()])?)?;
            run.bits("exact values", &y, &to_bits(&to))
        })?;
    }
    Ok(())
}

/// The distance of a result's bits from the true value in units in the last place, no smaller than those of normal numbers.
/// A result that is no normal number may be 0.
fn ulps(got: u32, want: f64) -> f64 {
    let smallest = f64::from(f32::MIN_POSITIVE);
    if want.is_nan() {
        return if is_nan(got) { 0.0 } else { f64::INFINITY };
    }
    let got = f32::from_bits(got);
    if (want as f32).is_infinite() || (want.abs() < smallest && got == 0.0) {
        return if got == 0.0 || got == want as f32 { 0.0 } else { f64::INFINITY };
    }
    (f64::from(got) - want).abs() / (want.abs().max(smallest).log2().floor() - 23.0).exp2()
}
