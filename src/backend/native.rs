//! Memory of the native CPU device.

use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// A block of 32-bit words that kernels lock while they run.
pub(crate) struct NativeBuffer {
    words: RwLock<Vec<u32>>,
}

impl NativeBuffer {
    /// `len` words, all `fill`.
    pub fn new(len: usize, fill: u32) -> Result<Self> {
        let mut words = Vec::new();
        words.try_reserve_exact(len).map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, format!("tensor: {} bytes on the CPU: {error}", len.saturating_mul(4)))
        })?;
        words.resize(len, fill);
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
