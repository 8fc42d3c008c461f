// exp, log, tanh and sigmoid for f32: the built-in ones are far off on some devices, and some give NaN for large arguments.
//
// Twins of src/kernels/math.rs: the same steps, the same constants. The method is Cody and Waite's ("Software Manual for the
// Elementary Functions", 1980) in the single-precision form of Moshier's Cephes library; the polynomials were fitted with
// Remez' exchange algorithm (Muller, "Elementary Functions", ch. 3).
// Error: exp, log and tanh 1.5 ULP, sigmoid 2.5 ULP where division is correctly rounded. WGSL allows division an error of
// 2.5 ULP; sigmoid may then have 5, tanh 3. Results that are no normal numbers may be 0.
//
// WGSL lets an implementation take infinities and NaN for absent, and some compilers do: special values are found and made as
// bit patterns, and no result hangs on a comparison or sum of them.

// ln 2 in two parts: the first has 9 bits, so that its product with an exponent is exact.
const LN2_HIGH = 0.6933594;
const LN2_LOW = -2.1219444e-4;
// The bits of 88.72283 and -87.33654: the range in which exp is finite and a normal number.
const EXP_MAX_BITS = 0x42b17217i;
const EXP_MIN_BITS = 0xc2aeac4fu;
const INFINITY_BITS = 0x7f800000u;
const NAN_BITS = 0x7fc00000u;
const SIGN_BIT = 0x80000000u;

fn is_nan_bits(x: f32) -> bool {
    return (bitcast<u32>(x) & ~SIGN_BIT) > INFINITY_BITS;
}

fn is_finite_bits(x: f32) -> bool {
    return (bitcast<u32>(x) & ~SIGN_BIT) < INFINITY_BITS;
}

// exp(x) = 2^k exp(r) with k = round(x / ln 2), where the result is a normal number; elsewhere any number.
fn exp_in_range(x: f32) -> f32 {
    let n = round(x * 1.442695);
    let k = i32(n);
    // f32(k) is n, and the sums are fma: else a fast-math compiler would merge the two parts of ln 2, and lose 60 ULP.
    let r = fma(f32(k), -LN2_LOW, fma(n, -LN2_HIGH, x));
    // exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2.
    let p = (((0.0013814536 * r + 0.008368745) * r + 0.041668393) * r + 0.16666521) * r + 0.49999994;
    let y = 1.0 + (r + r * r * p);
    // Adding k to the exponent's bits reaches 2^128 y for y < 1, for which 2^128 itself would be too large.
    return bitcast<f32>(bitcast<u32>(y) + (bitcast<u32>(k) << 23u));
}

// e^x.
fn exp_f32(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    var y = bitcast<u32>(exp_in_range(x));
    // Bits of positive numbers are ordered as integers, those of negative ones as unsigned integers, backwards.
    y = select(y, INFINITY_BITS, bitcast<i32>(x) > EXP_MAX_BITS);
    y = select(y, 0u, bits > EXP_MIN_BITS);
    return bitcast<f32>(select(y, bits, is_nan_bits(x)));
}

// The natural logarithm: ln(2^e m) = e ln 2 + ln m, sqrt(1/2) <= m < sqrt(2).
fn log_f32(x: f32) -> f32 {
    const SQRT_HALF = 0x3f3504f3i;
    let bits = bitcast<i32>(x);
    // A denormal number is its bits, as an integer, times 2^-149: no device can flush an integer.
    let denormal = bits < 0x00800000i;
    let offset = select(bits, bitcast<i32>(f32(bits)), denormal) - SQRT_HALF;
    let e = f32((offset >> 23u) - select(0i, 149i, denormal));
    let f = bitcast<f32>((offset & 0x007fffffi) + SQRT_HALF) - 1.0;
    // ln(1 + f) = f - f^2 / 2 + f^3 p(f).
    var p = ((0.06746663 * f - 0.1167564) * f + 0.11888145) * f - 0.12405589;
    p = (((p * f + 0.14219555) * f - 0.16667996) * f + 0.20002119) * f - 0.2500001;
    p = p * f + 0.33333313;
    let z = f * f;
    // The smallest terms first.
    var y = bitcast<u32>(((f * z * p + e * LN2_LOW) - 0.5 * z + f) + e * LN2_HIGH);
    y = select(y, NAN_BITS, bits < 0i);
    // Infinity and NaN.
    y = select(y, bitcast<u32>(x), bits >= 0x7f800000i);
    y = select(y, INFINITY_BITS | SIGN_BIT, (bitcast<u32>(x) & ~SIGN_BIT) == 0u);
    return bitcast<f32>(y);
}

// The hyperbolic tangent: a + a^3 p(a^2) for a = |x| < 0.625; above, 1 - 2 / (e^(2a) + 1), where the quotient is so small that
// its error hardly counts, and the result never beyond 1.
fn tanh_f32(x: f32) -> f32 {
    let a = abs(x);
    let z = a * a;
    let p = (((-0.0057049775 * z + 0.02063908) * z - 0.05373971) * z + 0.13331442) * z - 0.3333328;
    let far = 1.0 - 2.0 / (exp_in_range(2.0 * a) + 1.0);
    var y = bitcast<u32>(select(far, a + a * (z * p), a < 0.625));
    // From 9.02, whose bits these are, 1 is the nearest number; far beyond, the exponential is out of its range.
    let bits = bitcast<u32>(x);
    y = select(y, 0x3f800000u, (bits & ~SIGN_BIT) > 0x411051ecu);
    // The sign as a bit: tanh(-0) is -0, and a compiler that ignores the sign of zero cannot tell.
    return bitcast<f32>(select(y | (bits & SIGN_BIT), bits, is_nan_bits(x)));
}

// The logistic function 1 / (1 + e^-x): 1 / (1 + e) on the right and e / (1 + e) on the left, for e = e^-|x| cannot overflow.
fn sigmoid_f32(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let e = select(exp_in_range(-abs(x)), 0.0, (bits | SIGN_BIT) > EXP_MIN_BITS);
    let y = select(1.0, e, bits >= SIGN_BIT) / (1.0 + e);
    return bitcast<f32>(select(bitcast<u32>(y), bits, is_nan_bits(x)));
}
