//! Elementary functions.

use super::harness::{Cases, MANY, to_bits};
use crate::error::Result;
use crate::kernels::math_probe::{self, FUNCTIONS};
use crate::tensor::Tensor;

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
            run.near_ulps("y", &y, &expected, bounds[index])?;
            let (from, to): (Vec<f32>, Vec<f32>) = exact[index].iter().copied().unzip();
            let y = math_probe::probe(index, &Tensor::from_slice(run.device, &from, [from.len()])?)?;
            run.bits("exact values", &y, &to_bits(&to))
        })?;
    }
    Ok(())
}
