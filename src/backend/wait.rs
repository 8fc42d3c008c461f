//! How calls that are not async wait for wgpu's futures.
//!
//! A native program just waits. A browser runs no callback before the program has returned to it, so that waiting would never end:
//! programs there use the async calls, or say with [`set_suspend`] how to hand control to the browser for a while.

use std::future::Future;

use crate::error::Result;

/// Waits for what `op` needs.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn wait_for<T>(_op: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    pollster::block_on(future)
}

/// Waits for what `op` needs: `ErrorKind::Unsupported` unless the program can be suspended.
#[cfg(target_arch = "wasm32")]
pub(crate) fn wait_for<T>(op: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    use crate::error::Error;
    use std::task::{Context, Poll, Waker};

    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(outcome) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return outcome;
        }
        match SUSPEND.get() {
            Some(suspend) => suspend(),
            None => {
                return Err(Error::unsupported(
                    op,
                    "a browser lets no program wait: see Device::new_async and gatefold::set_suspend",
                ));
            }
        }
    }
}

#[cfg(target_arch = "wasm32")]
static SUSPEND: std::sync::OnceLock<fn()> = std::sync::OnceLock::new();

/// In a browser: from now on, calls that wait do so by calling `suspend` again and again. It must let the browser run other work
/// before it returns, as an import of JavaScript Promise Integration does (`WebAssembly.Suspending`); the first function given is kept.
/// Calls that wait must then come from exports that can be suspended (`WebAssembly.promising`), and meanwhile no other export that
/// uses the same device may be entered.
///
/// Without it, calls that wait give [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported), and the async calls
/// ([`Device::new_async`](crate::Device::new_async), [`Tensor::to_vec_async`](crate::Tensor::to_vec_async)) are the way.
#[cfg(target_arch = "wasm32")]
pub fn set_suspend(suspend: fn()) {
    let _ = SUSPEND.set(suspend);
}
