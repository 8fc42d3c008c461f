//! Elementary functions.

use super::harness::{Cases, MANY, to_bits};
use crate::error::Result;
use crate::kernels::math_probe::{self, FUNCTIONS};
use crate::tensor::Tensor;

/// Where something changes: the ends of normal numbers, of exp's range, of the ranges of tanh, of what has a nearest number but
/// itself, and of rounding to an integer.
const EDGES: [f32; 18] = [
    0.0,
    f32::MIN_POSITIVE,
    2.980_232_2e-8, // 2^-25
    0.346_573_6,    // ln(2) / 2
    0.625,
    std::f32::consts::FRAC_1_SQRT_2,
    1.0,
    std::f32::consts::SQRT_2,
    9.02,
    16.635_532, // 24 ln(2)
    87.336_54,
    88.0,
    88.722_83,
    103.972_08, // 150 ln(2)
    16_777_216.0,
    1e38,
    f32::MAX,
    f32::INFINITY,
];

/// Numbers of every exponent and sign, more than one launch has lanes, and all numbers near an edge; then NaN.
fn inputs() -> Vec<f32> {
    // A prime: low bits of every kind.
    const STRIDE: usize = 1021;
    const NEAR: u32 = 300;
    let dense = (0..=u32::MAX).step_by(STRIDE);
    let near = EDGES.into_iter().map(f32::to_bits).flat_map(|edge| edge.saturating_sub(NEAR)..=edge + NEAR);
    let signs = near.flat_map(|bits| [bits, bits | 0x8000_0000]);
    let nan = [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, 0x7fff_ffff, u32::MAX];
    dense.chain(signs).chain(nan).map(f32::from_bits).collect()
}

/// Within bounds in units in the last place at every number, which also says that no finite one gives NaN, and that NaN is let through.
pub(super) fn math(cases: &mut Cases<'_>) -> Result<()> {
    let x = inputs();
    assert!(x.len() > MANY);
    // Division rounds correctly on the CPU; WGSL allows it 2.5 ULP.
    let bounds = if cases.device.is_cpu() { [1.0, 1.0, 1.5, 2.5] } else { [2.5, 2.5, 3.0, 4.5] };
    let inf = f32::INFINITY;
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
            run.near_ulps(function.name, &y, &expected, bounds[index])?;
            let (from, to): (Vec<f32>, Vec<f32>) = exact[index].iter().copied().unzip();
            let y = math_probe::probe(index, &Tensor::from_slice(run.device, &from, [from.len()])?)?;
            run.bits("exact values", &y, &to_bits(&to))
        })?;
    }
    Ok(())
}
