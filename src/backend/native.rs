//! Memory and threads of the native CPU device.

use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, ErrorKind, Result};

/// A block of 32-bit words that kernels lock while they run.
pub(crate) struct NativeBuffer {
    words: RwLock<Vec<u32>>,
}

impl NativeBuffer {
    /// `len` words, all 0: the system clears memory when it is first touched, not here.
    pub fn new(len: usize) -> Result<Self> {
        let words = bytemuck::allocation::try_zeroed_vec(len).map_err(|()| {
            let bytes = len.saturating_mul(4);
            Error::new(ErrorKind::OutOfMemory, format!("tensor: the CPU has no memory for {bytes} bytes"))
        })?;
        Ok(Self { words: RwLock::new(words) })
    }

    /// A view for reading. Two views of one buffer may be read at once, also by one thread.
    pub fn read<T: bytemuck::Pod>(&self, range: Range<usize>) -> MappedRwLockReadGuard<'_, [T]> {
        RwLockReadGuard::map(self.words.read_recursive(), |words| bytemuck::cast_slice(&words[range]))
    }

    /// A view for writing. No other view of this buffer may be held by the same thread: a kernel's outputs are no inputs.
    pub fn write<T: bytemuck::Pod>(&self, range: Range<usize>) -> MappedRwLockWriteGuard<'_, [T]> {
        RwLockWriteGuard::map(self.words.write(), |words| bytemuck::cast_slice_mut(&mut words[range]))
    }
}

/// Threads that a kernel uses: as many as the system lets this process run at once.
pub(crate) fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The threads themselves; `None` where the system gives none.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let name = |index| format!("gatefold-{index}");
    POOL.get_or_init(|| ThreadPoolBuilder::new().num_threads(threads()).thread_name(name).build().ok()).as_ref()
}

/// Calls `work(first, count)` for at most `parts` parts of `0..rows`, at once on several threads.
///
/// A kernel waits here with its buffers locked, so that its thread must not take up other work meanwhile, which may want the
/// same buffers. A worker of an application's rayon pool would: there a plain thread waits in its place.
pub(crate) fn for_parts(rows: usize, parts: usize, work: impl Fn(usize, usize) + Sync) {
    let size = rows.div_ceil(parts.clamp(1, rows));
    let (Some(pool), true) = (pool(), size < rows) else {
        return work(0, rows);
    };
    let run = || {
        pool.in_place_scope(|scope| {
            for first in (size..rows).step_by(size) {
                let work = &work;
                scope.spawn(move |_| work(first, size.min(rows - first)));
            }
            work(0, size);
        });
    };
    match rayon::current_thread_index() {
        None => run(),
        Some(_) => std::thread::scope(|scope| {
            scope.spawn(run);
        }),
    }
}

/// Memory that several threads write at places that differ from thread to thread.
pub(crate) struct Shared<'a>(*mut f32, usize, PhantomData<&'a mut [f32]>);

// SAFETY: threads reach the memory through `slice` and `pointer` alone, whose callers promise to stay apart.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self(slice.as_mut_ptr(), slice.len(), PhantomData)
    }

    /// The `len` numbers from `start` on.
    ///
    /// # Safety
    /// No other thread may use them, nor may this one through another slice that is still alive.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "each caller owns the part that it asks for")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start <= self.1 && len <= self.1 - start);
        // SAFETY: inside the allocation, by the assertion; alone, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    /// Where number `start` lies, which must exist.
    pub fn pointer(&self, start: usize) -> *mut f32 {
        assert!(start < self.1);
        self.0.wrapping_add(start)
    }
}
