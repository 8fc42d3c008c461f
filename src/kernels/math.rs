//! Our own `exp`, `log`, `tanh` and `sigmoid`, and [`Lanes`], the vector type of the CPU cells.
//!
//! The twins in `shaders/math.wgsl` follow the same steps with the same constants. Every function is free of branches and
//! calls, so a loop over an array becomes vector code. Whether products and sums are fused hangs on what the CPU has: [`Fusion`].
//!
//! The method is Cody and Waite's ("Software Manual for the Elementary Functions", 1980), in the single-precision form of
//! Moshier's Cephes library; the polynomials were fitted with Remez' exchange algorithm (Muller, "Elementary Functions", ch. 3).
//! Error bounds are in units in the last place, found by trying every f32 against f64.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// How `a b + c` is formed: the bits of what follows depend on it, the bounds of its error do not.
pub trait Fusion {
    /// `a b + c`
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once. Only in code for CPUs that have an instruction for it: elsewhere it is a slow call.
#[derive(Clone, Copy, Debug)]
pub struct Fused;

/// Rounded twice, on any CPU.
#[derive(Clone, Copy, Debug)]
pub struct Apart;

impl Fusion for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Fusion for Apart {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Whether code for these vectors runs on CPUs that fuse: AVX2 comes with it, as does NEON.
const fn fuses<S: pulp::Simd>() -> bool {
    S::F32_LANES >= 8 || cfg!(target_arch = "aarch64")
}

/// Work on [`Lanes`]. A struct and no closure, because [`pulp`] inlines it whole.
pub(super) trait OnLanes {
    /// Does it. To be inlined, with all that it calls for each row: its code is made for several instruction sets.
    fn run<S: pulp::Simd, F: Fusion>(self, simd: S);
}

/// Does it in the widest vectors that the CPU has.
pub(super) fn on_lanes(work: impl OnLanes) {
    struct Dispatched<W>(W);
    impl<W: OnLanes> pulp::WithSimd for Dispatched<W> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) {
            // A constant: no code is made for the other.
            if const { fuses::<S>() } { self.0.run::<S, Fused>(simd) } else { self.0.run::<S, Apart>(simd) }
        }
    }
    pulp::Arch::new().dispatch(Dispatched(work));
}

/// `ln 2` in two parts: the first has 9 bits, so that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Above it `exp` overflows.
const EXP_MAX: f32 = 88.722_83;
/// Below it `exp` is no normal number.
const EXP_MIN: f32 = -87.336_54;

/// `sum of coefficients[i] x^i`, by Horner's rule.
#[inline(always)]
fn polynomial<F: Fusion, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    coefficients.into_iter().rev().reduce(|sum, c| F::mul_add(sum, x, c)).unwrap_or(0.0)
}

/// `exp(x) = 2^k exp(r)` with `k = round(x / ln 2)`, for `EXP_MIN <= x <= EXP_MAX`; elsewhere any number.
#[inline(always)]
fn exp_in_range<F: Fusion>(x: f32) -> f32 {
    // Near 1.5 * 2^23 floats are the integers: the sum rounds, and its low bits are k.
    const ROUND: f32 = 12_582_912.0;
    let rounded = F::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = F::mul_add(n, -LN2_LOW, F::mul_add(n, -LN2_HIGH, x));
    // exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2.
    let p = polynomial::<F, _>(r, [0.499_999_94, 0.166_665_21, 0.041_668_393, 0.008_368_745, 0.001_381_453_6]);
    let y = 1.0 + F::mul_add(r * r, p, r);
    // Adding k to the exponent's bits reaches 2^128 y for y < 1, for which 2^128 itself would be too large.
    f32::from_bits(y.to_bits().wrapping_add(rounded.to_bits() << 23))
}

/// `e^x`, to 1 ULP. Results that are no normal numbers (`x < -87.33654`) are 0.
#[inline(always)]
pub(crate) fn exp<F: Fusion>(x: f32) -> f32 {
    let y = exp_in_range::<F>(x);
    let y = if x > EXP_MAX { f32::INFINITY } else { y };
    let y = if x < EXP_MIN { 0.0 } else { y };
    if x.is_nan() { x } else { y }
}

/// The natural logarithm, to 1 ULP, denormal numbers included: `ln(2^e m) = e ln 2 + ln m`, `sqrt(1/2) <= m < sqrt(2)`.
#[inline(always)]
pub(crate) fn log(x: f32) -> f32 {
    const SQRT_HALF: i32 = 0x3f35_04f3;
    let bits = x.to_bits() as i32;
    // A denormal number is its bits, as an integer, times 2^-149.
    let denormal = bits < 0x0080_0000;
    let normal = if denormal { (bits as f32).to_bits() as i32 } else { bits };
    let offset = normal.wrapping_sub(SQRT_HALF);
    let e = ((offset >> 23) - if denormal { 149 } else { 0 }) as f32;
    let f = f32::from_bits(((offset & 0x007f_ffff) + SQRT_HALF) as u32) - 1.0;
    // ln(1 + f) = f - f^2 / 2 + f^3 p(f).
    let p = polynomial::<Apart, _>(
        f,
        [
            0.333_333_13,
            -0.250_000_1,
            0.200_021_19,
            -0.166_679_96,
            0.142_195_55,
            -0.124_055_89,
            0.118_881_45,
            -0.116_756_4,
            0.067_466_63,
        ],
    );
    let z = f * f;
    // The smallest terms first.
    let y = ((f * z * p + e * LN2_LOW) - 0.5 * z + f) + e * LN2_HIGH;
    let y = if bits < 0 { f32::NAN } else { y };
    // Infinity and NaN.
    let y = if bits >= 0x7f80_0000 { x } else { y };
    if x == 0.0 { f32::NEG_INFINITY } else { y }
}

/// The hyperbolic tangent, to 1.5 ULP; odd, and never beyond 1.
///
/// `tanh a = a + a^3 p(a^2)` for `a < 0.625`, `1 - 2 / (e^(2a) + 1)` above: there the quotient is so small that its
/// error hardly counts.
#[inline(always)]
pub(crate) fn tanh<F: Fusion>(x: f32) -> f32 {
    let a = x.abs();
    let z = a * a;
    let p = polynomial::<F, _>(z, [-0.333_332_8, 0.133_314_42, -0.053_739_71, 0.020_639_08, -0.005_704_977_5]);
    let y = 1.0 - 2.0 / (exp_in_range::<F>(2.0 * a) + 1.0);
    let y = if a < 0.625 { F::mul_add(a, z * p, a) } else { y };
    // From here on 1 is the nearest number; far beyond, the exponential is out of its range.
    let y = if a > 9.02 { 1.0 } else { y };
    let y = y.copysign(x);
    if x.is_nan() { x } else { y }
}

/// The logistic function `1 / (1 + e^-x)`, to 2.5 ULP. It is 0 for `x < -87.33654`.
#[inline(always)]
pub(crate) fn sigmoid<F: Fusion>(x: f32) -> f32 {
    let a = -x.abs();
    // e^-|x| cannot overflow: 1 / (1 + e) on the right, e / (1 + e) on the left.
    let e = if a < EXP_MIN { 0.0 } else { exp_in_range::<F>(a) };
    let y = if x < 0.0 { e } else { 1.0 } / (1.0 + e);
    if x.is_nan() { x } else { y }
}

/// What [`Lanes`] are kept in. Not an array on x86-64: the compiler takes one to pieces, whose widths then fit no more.
#[cfg(target_arch = "x86_64")]
type Vector = std::arch::x86_64::__m512;
#[cfg(not(target_arch = "x86_64"))]
type Vector = [f32; Lanes::COUNT];

/// Sixteen floats that are worked on at once: one AVX-512 register, two of AVX2, four of SSE2 or NEON.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Lanes(Vector);

impl std::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_array().fmt(f)
    }
}

impl Lanes {
    /// How many floats there are.
    pub(crate) const COUNT: usize = 16;

    #[inline(always)]
    pub(crate) fn from_array(lanes: [f32; Self::COUNT]) -> Self {
        Self(bytemuck::must_cast(lanes))
    }

    #[inline(always)]
    pub(crate) fn to_array(self) -> [f32; Self::COUNT] {
        bytemuck::must_cast(self.0)
    }

    /// The same value in every lane.
    #[inline(always)]
    pub(crate) fn splat(value: f32) -> Self {
        Self::from_array([value; Self::COUNT])
    }

    /// The first sixteen values of `from`; where it is shorter the rest are 0.
    #[inline(always)]
    pub(crate) fn load(from: &[f32]) -> Self {
        match from.first_chunk::<{ Self::COUNT }>() {
            Some(full) => Self(bytemuck::pod_read_unaligned(bytemuck::bytes_of(full))),
            None => {
                let mut lanes = [0.0; Self::COUNT];
                lanes[..from.len()].copy_from_slice(from);
                Self::from_array(lanes)
            }
        }
    }

    /// Writes the lanes to the start of `to`; where it is shorter only as many as it holds.
    #[inline(always)]
    pub(crate) fn store(self, to: &mut [f32]) {
        match to.first_chunk_mut() {
            Some(full) => *full = self.to_array(),
            None => to.copy_from_slice(&self.to_array()[..to.len()]),
        }
    }

    /// [`tanh`] of every lane.
    #[inline(always)]
    pub(crate) fn tanh<F: Fusion>(self) -> Self {
        self.map(tanh::<F>)
    }

    /// [`sigmoid`] of every lane.
    #[inline(always)]
    pub(crate) fn sigmoid<F: Fusion>(self) -> Self {
        self.map(sigmoid::<F>)
    }

    #[inline(always)]
    pub(crate) fn map(self, f: impl Fn(f32) -> f32) -> Self {
        let mut lanes = self.to_array();
        for lane in &mut lanes {
            *lane = f(*lane);
        }
        Self::from_array(lanes)
    }

    #[inline(always)]
    pub(crate) fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut lanes = self.to_array();
        for (lane, value) in lanes.iter_mut().zip(other.to_array()) {
            *lane = f(*lane, value);
        }
        Self::from_array(lanes)
    }
}

impl Add for Lanes {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
}

impl Sub for Lanes {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
}

impl Mul for Lanes {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
}

impl Div for Lanes {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
}

impl Neg for Lanes {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        self.map(|a| -a)
    }
}

impl AddAssign for Lanes {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

#[cfg(test)]
mod tests {
    use rayon::iter::{IntoParallelIterator, ParallelIterator};

    use super::*;

    /// The distance of `got` from `want` in f32 units in the last place of `want`, no smaller than those of normal numbers.
    fn ulps(got: f32, want: f64) -> f64 {
        let exponent = (want.abs().to_bits() >> 52).max(1023 - 126);
        let unit = f64::from_bits((exponent - 23) << 52);
        (f64::from(got) - want).abs() / unit
    }

    /// Compares a function with its value in f64 for every `stride`-th bit pattern, infinities, NaN and overflow included: in lanes, for
    /// what the CPU has, as the kernels run it, and number by number, which must give the same bits. Returns the worst error and where it is.
    fn worst(ours: impl Fn(f32) -> f32 + Copy + Sync, exact: fn(f64) -> f64, stride: usize) -> (f64, f32) {
        const BLOCK: usize = 1 << 14;
        let count = (1usize << 32).div_ceil(stride);
        let block = |block: usize| {
            let bits = (block * BLOCK..count.min((block + 1) * BLOCK)).map(|index| (index * stride) as u32);
            let x: Vec<f32> = bits.map(f32::from_bits).collect();
            let mut in_lanes = vec![0.0; x.len()];
            pulp::Arch::new().dispatch(|| {
                let lanes = x.chunks(Lanes::COUNT).zip(in_lanes.chunks_mut(Lanes::COUNT));
                lanes.for_each(|(x, y)| Lanes::load(x).map(ours).store(y));
            });
            let mut worst = (0.0, 0.0);
            for (&x, &got) in x.iter().zip(&in_lanes) {
                let (alone, want) = (ours(x), exact(f64::from(x)));
                assert_eq!(got.to_bits(), alone.to_bits(), "at {x:e}: {got:e} in lanes, {alone:e} alone");
                // Round as f32 does: what is beyond the largest number is infinite, what is below the normal ones may be 0.
                let error = match () {
                    () if want.is_nan() => ulps_if(got.is_nan()),
                    () if (want as f32).is_infinite() => ulps_if(got == want as f32),
                    () if want.abs() < f64::from(f32::MIN_POSITIVE) && got == 0.0 => 0.0,
                    () => ulps(got, want),
                };
                // Not `>`: an error of NaN is the worst.
                if !(error <= worst.0) {
                    worst = (error, x);
                }
            }
            worst
        };
        let worse = |a: (f64, f32), b: (f64, f32)| if b.0 <= a.0 || a.0.is_nan() { a } else { b };
        (0..count.div_ceil(BLOCK)).into_par_iter().map(block).reduce(|| (0.0, 0.0), worse)
    }

    /// The distance of what is no number from what it must be.
    fn ulps_if(is_right: bool) -> f64 {
        if is_right { 0.0 } else { f64::INFINITY }
    }

    /// All four within the bounds of their comments.
    fn check(stride: usize) {
        let within = |name: &str, (error, x): (f64, f32), bound: f64| {
            println!("{name}: at most {error:.3} ULP, at {x:e} ({:#x})", x.to_bits());
            assert!(error <= bound, "{name}: {error:.3} ULP at {x:e}, bound {bound}");
        };
        let logistic: fn(f64) -> f64 = |x| 1.0 / (1.0 + (-x).exp());
        within("log", worst(log, f64::ln, stride), 1.0);
        within("exp", worst(exp::<Apart>, f64::exp, stride), 1.0);
        within("exp, fused", worst(exp::<Fused>, f64::exp, stride), 1.0);
        within("tanh", worst(tanh::<Apart>, f64::tanh, stride), 1.5);
        within("tanh, fused", worst(tanh::<Fused>, f64::tanh, stride), 1.5);
        within("sigmoid", worst(sigmoid::<Apart>, logistic, stride), 2.5);
        within("sigmoid, fused", worst(sigmoid::<Fused>, logistic, stride), 2.5);
    }

    #[test]
    fn one_number_in_61_is_accurate() {
        // A prime: every exponent and sign, and low bits of every kind.
        check(61);
    }

    #[test]
    #[ignore = "minutes: cargo test --release --lib math -- --ignored --nocapture"]
    fn every_number_is_accurate() {
        check(1);
    }

    #[test]
    fn limits_and_signs_of_zero() {
        limits::<Apart>();
        limits::<Fused>();
    }

    fn limits<F: Fusion>() {
        let inf = f32::INFINITY;
        let same = |got: f32, want: f32| assert_eq!(got.to_bits(), want.to_bits(), "{got:e}, not {want:e}");
        for (x, want) in [(0.0, 1.0), (-0.0, 1.0), (inf, inf), (-inf, 0.0), (88.722_83, 3.402_798_6e38), (88.722_84, inf)] {
            same(exp::<F>(x), want);
        }
        for x in [-87.336_55, -104.0, f32::MIN] {
            same(exp::<F>(x), 0.0);
            same(sigmoid::<F>(x), 0.0);
        }
        for (x, want) in [(0.0, -inf), (-0.0, -inf), (1.0, 0.0), (inf, inf)] {
            same(log(x), want);
        }
        // The smallest denormal number.
        same(log(f32::from_bits(1)), -103.278_93);
        for (x, want) in [(0.0, 0.0), (1e-40, 1e-40), (1e-10, 1e-10), (9.02, 1.0), (100.0, 1.0), (f32::MAX, 1.0), (inf, 1.0)] {
            same(tanh::<F>(x), want);
            same(tanh::<F>(-x), -want);
        }
        for (x, want) in [(0.0, 0.5), (-0.0, 0.5), (100.0, 1.0), (-100.0, 0.0), (inf, 1.0), (-inf, 0.0)] {
            same(sigmoid::<F>(x), want);
        }
    }

    #[test]
    fn nan_stays_nan() {
        for bits in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff] {
            let nan = f32::from_bits(bits);
            assert!([exp::<Fused>, tanh::<Fused>, sigmoid::<Fused>].iter().all(|f| f(nan).is_nan()), "{bits:#x}, fused");
            assert!([exp::<Apart>, log, tanh::<Apart>, sigmoid::<Apart>].iter().all(|f| f(nan).is_nan()), "{bits:#x}");
        }
        assert!(log(-1.0).is_nan() && log(f32::NEG_INFINITY).is_nan() && log(-1e-40).is_nan());
    }

    #[test]
    fn lanes_do_what_floats_do() {
        let values: Vec<f32> = (0..Lanes::COUNT).map(|i| i as f32 * 0.7 - 5.0).collect();
        let (a, b) = (Lanes::load(&values), Lanes::splat(1.25));
        let mut sum = a;
        sum += b;
        for (i, &x) in values.iter().enumerate() {
            assert_eq!((a + b).to_array()[i], x + 1.25);
            assert_eq!(sum.to_array()[i], x + 1.25);
            assert_eq!((a - b).to_array()[i], x - 1.25);
            assert_eq!((a * b).to_array()[i], x * 1.25);
            assert_eq!((b / a).to_array()[i], 1.25 / x);
            assert_eq!((-a).to_array()[i], -x);
            assert_eq!(a.tanh::<Fused>().to_array()[i], tanh::<Fused>(x));
            assert_eq!(a.sigmoid::<Fused>().to_array()[i], sigmoid::<Fused>(x));
        }
    }

    #[test]
    fn lanes_load_and_store_short_and_long_slices() {
        let values: Vec<f32> = (1..=20).map(|i| i as f32).collect();
        for len in [0, 1, 15, 16, 17, 20] {
            let lanes = Lanes::load(&values[..len]);
            let kept = len.min(Lanes::COUNT);
            assert_eq!(lanes.to_array()[..kept], values[..kept]);
            assert!(lanes.to_array()[kept..].iter().all(|&v| v == 0.0));
            let mut to = vec![-1.0; len];
            Lanes::load(&values).store(&mut to);
            assert_eq!(to[..kept], values[..kept]);
            assert!(to[kept..].iter().all(|&v| v == -1.0));
        }
    }
}
