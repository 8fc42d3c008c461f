//! How results are compared and reported.

/// The distance of one output or gradient from what it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The tensor's name: `y`, `grad.weight_hh_l0`.
    pub tensor: String,
    /// The largest difference, relative to the expected tensor's largest magnitude; NaN where anything is NaN or missing.
    pub error: f64,
    /// The largest error that passes.
    pub bound: f64,
}

impl Comparison {
    /// Compares numbers that a device computed with the expected ones.
    pub fn new(tensor: impl Into<String>, computed: &[f32], expected: &[f64], bound: f64) -> Self {
        let mut error = 0.0;
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        // An expected tensor of zeros is compared absolutely.
        let scale = if largest > 0.0 { largest } else { 1.0 };
        for (computed, expected) in computed.iter().zip(expected) {
            let difference = (f64::from(*computed) - expected).abs() / scale;
            // max() would drop NaN.
            if !(difference <= error) {
                error = difference;
            }
            if error.is_nan() {
                break;
            }
        }
        if computed.len() != expected.len() {
            error = f64::NAN;
        }
        Self { tensor: tensor.into(), error, bound }
    }

    /// Compares bits: `error` is the number of words that differ.
    pub fn bits(tensor: impl Into<String>, computed: &[u32], expected: &[u32]) -> Self {
        let differ = computed.iter().zip(expected).filter(|(a, b)| a != b).count() + computed.len().abs_diff(expected.len());
        Self { tensor: tensor.into(), error: differ as f64, bound: 0.0 }
    }

    /// Whether the error is within the bound. NaN is not.
    pub fn passes(&self) -> bool {
        self.error <= self.bound
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
}
