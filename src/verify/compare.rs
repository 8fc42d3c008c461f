//! How results are compared and reported.

use serde::Serialize;

/// The distance of one output or gradient from what it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The tensor's name: `y`, `grad.weight_hh_l0`.
    pub tensor: String,
    /// The largest difference, relative to the expected tensor's largest magnitude; NaN where anything is NaN or missing. Of
    /// [`Comparison::ulps`] in units in the last place, of [`Comparison::bits`] and [`Comparison::measured`] something else.
    pub error: f64,
    /// The largest error that passes.
    pub bound: f64,
    /// How far numbers are from those of f64, where numbers were compared.
    pub distance: Option<Distance>,
}

/// The largest distance of a tensor's numbers from those that f64 gives.
///
/// A unit in the last place (ULP) is that of f32: `2^(e - 23)` for a magnitude from `2^e` to `2^(e + 1)`, and for smaller ones that of the
/// smallest normal number. In sums terms cancel, and what is left of them may be off by many units of its own and still be as
/// good as f32 can do: so their distance is told in units of the tensor's scale, and only that of pointwise functions in units of each number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// Relative to the tensor's scale: the largest expected magnitude, or 1 where all are 0.
    pub relative: f64,
    /// In units in the last place of that scale.
    pub ulps_of_scale: f64,
    /// In units in the last place of each number; only of [`Comparison::ulps`].
    pub ulps: Option<f64>,
}

impl Comparison {
    /// Compares numbers that a device computed with the expected ones.
    pub fn new(tensor: impl Into<String>, computed: &[f32], expected: &[f64], bound: f64) -> Self {
        let mut error = 0.0;
        for (computed, expected) in computed.iter().zip(expected) {
            error = worse(error, (f64::from(*computed) - expected).abs());
        }
        if computed.len() != expected.len() {
            error = f64::NAN;
        }
        let distance = Distance::of(error, expected.iter().copied(), None);
        Self { tensor: tensor.into(), error: distance.relative, bound, distance: Some(distance) }
    }

    /// Compares values of a pointwise function, in units in the last place of each. NaN must be NaN, what f32 rounds to infinity must be
    /// infinite, and a result that is no normal number may be 0; all else that is not a number is an infinite error.
    pub fn ulps(tensor: impl Into<String>, computed: &[f32], expected: &[f64], bound: f64) -> Self {
        let (mut ulps, mut error) = (0.0, 0.0);
        let is_finite = |expected: &f64| (*expected as f32).is_finite();
        for (computed, expected) in computed.iter().zip(expected) {
            ulps = worse(ulps, ulps_between(*computed, *expected));
            if is_finite(expected) {
                error = worse(error, (f64::from(*computed) - expected).abs());
            }
        }
        if computed.len() != expected.len() {
            ulps = f64::NAN;
        }
        let distance = Distance::of(error, expected.iter().copied().filter(is_finite), Some(ulps));
        Self { tensor: tensor.into(), error: ulps, bound, distance: Some(distance) }
    }

    /// Compares bits: `error` is the number of words that differ.
    pub fn bits(tensor: impl Into<String>, computed: &[u32], expected: &[u32]) -> Self {
        let differ = computed.iter().zip(expected).filter(|(a, b)| a != b).count() + computed.len().abs_diff(expected.len());
        Self::measured(tensor, differ as f64, 0.0)
    }

    /// Something that was counted or measured and must not be above `bound`: wrong choices, a statistic.
    pub fn measured(what: impl Into<String>, error: f64, bound: f64) -> Self {
        Self { tensor: what.into(), error, bound, distance: None }
    }

    /// Whether the error is within the bound. NaN is not.
    pub fn passes(&self) -> bool {
        self.error <= self.bound
    }
}

impl Distance {
    fn of(error: f64, expected: impl Iterator<Item = f64>, ulps: Option<f64>) -> Self {
        let largest = expected.fold(0.0f64, |largest, value| largest.max(value.abs()));
        // An expected tensor of zeros is compared absolutely.
        let scale = if largest > 0.0 { largest } else { 1.0 };
        Self { relative: error / scale, ulps_of_scale: error / unit(scale), ulps }
    }

    /// The larger of both, each for itself; NaN is the largest.
    pub fn worse(self, other: Self) -> Self {
        let ulps = match (self.ulps, other.ulps) {
            (Some(a), Some(b)) => Some(worse(a, b)),
            (a, b) => a.or(b),
        };
        let ulps_of_scale = worse(self.ulps_of_scale, other.ulps_of_scale);
        Self { relative: worse(self.relative, other.relative), ulps_of_scale, ulps }
    }
}

/// The larger error; NaN, which `max` would drop, is the largest.
fn worse(a: f64, b: f64) -> f64 {
    if a >= b || a.is_nan() { a } else { b }
}

/// The unit in the last place of f32 at this magnitude: see [`Distance`].
fn unit(magnitude: f64) -> f64 {
    let exponent = (magnitude.to_bits() >> 52 & 0x7ff).max(1023 - 126);
    f64::from_bits((exponent - 23) << 52)
}

fn ulps_between(computed: f32, expected: f64) -> f64 {
    let same = |is_same: bool| if is_same { 0.0 } else { f64::INFINITY };
    if expected.is_nan() {
        return same(computed.is_nan());
    }
    if (expected as f32).is_infinite() {
        return same(computed == expected as f32);
    }
    if expected.abs() < f64::from(f32::MIN_POSITIVE) && computed == 0.0 {
        return 0.0;
    }
    match computed.is_finite() {
        true => (f64::from(computed) - expected).abs() / unit(expected),
        false => f64::INFINITY,
    }
}

/// What came of one case.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The case's name.
    pub case: String,
    /// Its outputs and gradients; empty where it did not run.
    pub comparisons: Vec<Comparison>,
    /// What the case needs and this crate does not have, by name.
    pub unsupported: Option<String>,
}

impl Report {
    /// A case that ran.
    pub fn new(case: impl Into<String>, comparisons: Vec<Comparison>) -> Self {
        Self { case: case.into(), comparisons, unsupported: None }
    }

    /// A case that cannot run.
    pub fn unsupported(case: impl Into<String>, what: impl Into<String>) -> Self {
        Self { case: case.into(), comparisons: Vec::new(), unsupported: Some(what.into()) }
    }

    /// Whether it ran and every comparison passes.
    pub fn passes(&self) -> bool {
        self.unsupported.is_none() && !self.comparisons.is_empty() && self.comparisons.iter().all(Comparison::passes)
    }

    /// The comparisons that fail, as lines of text.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.comparisons.iter().filter(|comparison| !comparison.passes());
        failed.map(|c| format!("{}: {}: error {:.3e}, bound {:.1e}", self.case, c.tensor, c.error, c.bound)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_missing_numbers_fail() {
        for (computed, expected, passes) in [
            (&[1.0f32, 2.0][..], &[1.0f64, 2.0][..], true),
            (&[1.0, 2.0001], &[1.0, 2.0], false),
            (&[f32::NAN, 2.0], &[1.0, 2.0], false),
            (&[1.0, f32::NAN], &[1.0, 2.0], false),
            (&[1.0], &[1.0, 2.0], false),
            (&[f32::INFINITY, 2.0], &[f64::INFINITY, 2.0], false),
        ] {
            let comparison = Comparison::new("y", computed, expected, 1e-6);
            assert_eq!(comparison.passes(), passes, "{computed:?} {expected:?} {comparison:?}");
        }
        assert!(!Report::new("nothing compared", Vec::new()).passes());
    }

    /// Half a unit of 1 is 2^-24; just below 1 units are half as large.
    #[test]
    fn units_in_the_last_place() {
        let (tiny, inf) = (f64::from(f32::MIN_POSITIVE), f64::INFINITY);
        for (computed, expected, ulps) in [
            (1.0f32, 1.0 + 2f64.powi(-24), 0.5),
            (1.0, 1.0 - 2f64.powi(-24), 1.0),
            (-3.0, -3.0 - 2f64.powi(-22), 1.0),
            (1e-45, tiny / 2.0, 2f64.powi(22) - 1.0),
            (0.0, tiny / 2.0, 0.0),
            (0.0, tiny, 2f64.powi(23)),
            (f32::MAX, 3.5e38, inf),
            (f32::INFINITY, 3.5e38, 0.0),
            (f32::NEG_INFINITY, 3.5e38, inf),
            (f32::INFINITY, 3.4e38, inf),
            (f32::NAN, f64::NAN, 0.0),
            (1.0, f64::NAN, inf),
            (f32::NAN, 1.0, inf),
        ] {
            let comparison = Comparison::ulps("y", &[computed], &[expected], 0.5);
            assert_eq!(comparison.error, ulps, "{computed:e} {expected:e}");
            assert_eq!(comparison.passes(), ulps <= 0.5);
        }
        assert!(!Comparison::ulps("y", &[1.0], &[1.0, 1.0], 0.5).passes());
        // Beside 1000 a number near 0 is as exact as f32 can be.
        let distance = Comparison::new("y", &[1000.0, 1e-5], &[1000.0, 0.0], 1e-6).distance;
        let relative = f64::from(1e-5f32) / 1000.0;
        assert_eq!(distance, Some(Distance { relative, ulps_of_scale: f64::from(1e-5f32) * 2f64.powi(14), ulps: None }));
    }
}
