//! Tests that are known to fail somewhere, and why.

use crate::device::DeviceInfo;

/// A failure that is known: where, of which test, with what message. It counts as passed while it is seen, and fails when it is not.
#[derive(Clone, Copy, Debug)]
pub struct KnownFailure {
    /// wgpu's backend, as [`DeviceInfo`] names it.
    pub backend: &'static str,
    /// A part of the driver's or the adapter's name.
    pub driver: &'static str,
    /// The test: a kernel family, or a folder of case files.
    pub test: &'static str,
    /// A part of the failure's text.
    pub message: &'static str,
    /// Whose fault it is, and what was done about it.
    pub reason: &'static str,
}

/// All that are known.
pub const KNOWN_FAILURES: &[KnownFailure] = &[];

impl KnownFailure {
    fn is_of(&self, info: &DeviceInfo, test: &str) -> bool {
        let named = info.driver.contains(self.driver) || info.name.contains(self.driver);
        info.backend == self.backend && named && test == self.test
    }
}

/// What the failures of a test come to: nothing (it passed, or all that failed is known, with the reasons), or what has to be looked at.
pub(super) fn judge(
    known: &[KnownFailure],
    info: &DeviceInfo,
    test: &str,
    failures: Vec<String>,
) -> Result<Vec<&'static str>, Vec<String>> {
    let known: Vec<&KnownFailure> = known.iter().filter(|known| known.is_of(info, test)).collect();
    let gone = known.iter().filter(|known| !failures.iter().any(|failure| failure.contains(known.message)));
    let gone: Vec<String> = gone
        .map(|known| format!("known failure {:?} ({}) is seen no more: delete it from the list", known.message, known.reason))
        .collect();
    let is_known = |failure: &String| known.iter().any(|known| failure.contains(known.message));
    let unknown: Vec<String> = failures.into_iter().filter(|failure| !is_known(failure)).chain(gone).collect();
    match unknown.is_empty() {
        true => Ok(known.iter().map(|known| known.reason).collect()),
        false => Err(unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_failures_pass_while_they_are_seen() {
        let list = [
            KnownFailure { backend: "gl", driver: "llvmpipe", test: "gemm", message: "c: error", reason: "wrong product" },
            KnownFailure { backend: "gl", driver: "Mesa 22", test: "gemm", message: "lost", reason: "crash" },
        ];
        let info = |backend: &str, driver: &str| DeviceInfo {
            name: "llvmpipe".into(),
            backend: backend.into(),
            driver: driver.into(),
            ..crate::Device::cpu().info()
        };
        let judged = |backend: &str, driver: &str, test: &str, failures: &[&str]| {
            judge(&list, &info(backend, driver), test, failures.iter().map(|text| (*text).to_owned()).collect())
        };
        assert_eq!(judged("gl", "Mesa 25", "gemm", &["1x1: c: error 2"]), Ok(vec!["wrong product"]));
        assert_eq!(judged("gl", "Mesa 22", "gemm", &["1x1: c: error 2", "device lost"]), Ok(vec!["wrong product", "crash"]));
        // Another failure beside it; elsewhere; of another test.
        assert_eq!(judged("gl", "Mesa 25", "gemm", &["1x1: c: error 2", "b"]), Err(vec!["b".to_owned()]));
        assert!(judged("vulkan", "Mesa 25", "gemm", &["1x1: c: error 2"]).is_err());
        assert!(judged("gl", "Mesa 25", "half", &["1x1: c: error 2"]).is_err());
        assert_eq!(judged("gl", "Mesa 25", "half", &[]), Ok(Vec::new()));
        // Seen no more.
        for failures in [&[][..], &["device lost"]] {
            let left = judged("gl", "Mesa 22", "gemm", failures).expect_err("one is not seen");
            assert!(left[0].contains("delete it from the list"), "{left:?}");
        }
    }
}
