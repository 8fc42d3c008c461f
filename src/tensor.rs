//! [`Tensor`]: a shape over memory on a [`Device`]; [`Ids`] and [`Lengths`]: whole numbers that the host has checked.

use std::fmt;
use std::sync::{Arc, OnceLock};

use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard};

use crate::backend::gpu::{GpuBuffer, Range};
use crate::backend::native::NativeBuffer;
use crate::device::{Backend, Device};
use crate::error::{Error, Result};

enum Buffer {
    Native(NativeBuffer),
    Gpu(GpuBuffer),
}

/// A block of memory, counted on its device.
struct Block {
    buffer: Buffer,
    device: Device,
    bytes: u64,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.device.release(self.bytes);
    }
}

/// Sizes of a tensor, outermost first; anything that turns into a `Vec<usize>`: `[seq, batch, 28]`.
pub type Shape = Vec<usize>;

/// The bits that a fresh tensor of a poisoned device holds: a quiet NaN that arithmetic does not produce.
#[cfg(feature = "verify")]
pub(crate) const POISON: u32 = 0x7fc0_dead;

/// Numbers (`f32`) of some shape on a device, row-major without gaps.
///
/// Cloning is cheap and shares the memory. No operation of the public interface changes a tensor in place, except that
/// an optimizer's step changes the value of a parameter ([`crate::nn::Param`]), seen through every clone of it.
#[derive(Clone)]
pub struct Tensor {
    block: Arc<Block>,
    /// In 32-bit words from the start of the buffer.
    offset: usize,
    shape: Shape,
}

/// Where parts of a block start, in words, so that each can be bound by itself: the largest alignment that WebGPU allows an adapter to
/// ask for.
pub(crate) const ALIGNMENT: usize = 64;

/// Kernels index with 32 bits, and step over the last element by at most 65535 workgroups of 256 lanes.
const MAX_ELEMENTS: usize = u32::MAX as usize - 65_535 * 256;

/// The number of elements of `shape`, or an error if `usize` cannot hold it.
fn elements(op: &str, shape: &[usize]) -> Result<usize> {
    let count = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    match count {
        Some(count) if count <= MAX_ELEMENTS => Ok(count),
        _ => Err(Error::argument(op, "shape", format!("{shape:?}"), format!("at most {MAX_ELEMENTS} elements"))),
    }
}

impl Tensor {
    /// A copy of `data` on `device`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when `data` does not fill `shape`, has a size of 0, or too many elements;
    /// [`crate::ErrorKind::Limit`] or [`crate::ErrorKind::OutOfMemory`] when the device cannot hold it.
    pub fn from_slice(device: &Device, data: &[f32], shape: impl Into<Shape>) -> Result<Self> {
        Self::upload("Tensor.from_slice", device, data, shape.into())
    }

    /// All zeros.
    ///
    /// # Errors
    /// As [`Tensor::from_slice`].
    pub fn zeros(device: &Device, shape: impl Into<Shape>) -> Result<Self> {
        let tensor = Self::allocate("Tensor.zeros", device, shape.into())?;
        tensor.clear()?;
        Ok(tensor)
    }

    pub(crate) fn upload<T: bytemuck::Pod>(op: &str, device: &Device, data: &[T], shape: Shape) -> Result<Self> {
        let count = elements(op, &shape)?;
        if count != data.len() {
            return Err(Error::shape(op, "data", &[data.len()], format!("{count} elements for shape {shape:?}")));
        }
        let tensor = Self::allocate(op, device, shape)?;
        tensor.write(data)?;
        Ok(tensor)
    }

    /// Memory for `shape`, of unspecified content: for outputs that a kernel fills.
    pub(crate) fn uninitialized(device: &Device, shape: impl Into<Shape>) -> Result<Self> {
        Self::allocate("tensor", device, shape.into())
    }

    /// `count` tensors of this shape, one behind the other in one block of memory, of unspecified content.
    pub(crate) fn in_a_row(device: &Device, shape: impl Into<Shape>, count: usize) -> Result<Vec<Self>> {
        let shape = shape.into();
        let len = elements("tensor", &shape)?;
        let stride = len.next_multiple_of(ALIGNMENT);
        let all = Self::uninitialized(device, [stride * (count - 1) + len])?;
        Ok((0..count).map(|n| all.slice(n * stride, shape.clone())).collect())
    }

    /// Tensors of one shape, one behind the other in one block of memory: these where they lie so already, or are one and the same, else
    /// copies.
    pub(crate) fn behind_each_other(tensors: impl Iterator<Item = Result<Self>>) -> Result<Vec<Self>> {
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        if tensors.windows(2).all(|pair| pair[0].shares_memory(&pair[1]) && pair[0].offset <= pair[1].offset) {
            return Ok(tensors);
        }
        let copies = Self::in_a_row(tensors[0].device(), tensors[0].shape(), tensors.len())?;
        copies.iter().zip(&tensors).try_for_each(|(copy, tensor)| copy.copy_from(tensor))?;
        Ok(copies)
    }

    fn allocate(op: &str, device: &Device, shape: Shape) -> Result<Self> {
        let count = elements(op, &shape)?;
        if count == 0 {
            return Err(Error::argument(op, "shape", format!("{shape:?}"), "every size at least 1"));
        }
        let buffer = match device.backend() {
            Backend::Native => Buffer::Native(NativeBuffer::new(count)?),
            Backend::Gpu(gpu) => Buffer::Gpu(gpu.allocate(count)?),
        };
        let bytes = 4 * count as u64;
        device.hold(bytes);
        let block = Arc::new(Block { buffer, device: device.clone(), bytes });
        let tensor = Self { block, offset: 0, shape };
        #[cfg(feature = "verify")]
        if device.is_poisoned() {
            tensor.write(&vec![POISON; count])?;
        }
        Ok(tensor)
    }

    /// The device that holds it.
    pub fn device(&self) -> &Device {
        &self.block.device
    }

    /// Its sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never true: a size of 0 is refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same memory under another shape with as many elements.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if elements("Tensor.reshape", &shape)? != self.len() {
            let given = format!("{shape:?}");
            return Err(Error::argument("Tensor.reshape", "shape", given, format!("{} elements", self.len())));
        }
        Ok(Self { shape, ..self.clone() })
    }

    /// The values, in order. Waits until all queued work that leads to them ran.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] or [`crate::ErrorKind::OutOfMemory`].
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.read_back()
    }

    /// [`Tensor::to_vec`] for programs that may not wait, as in a browser. On other targets it waits when it is polled.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    pub async fn to_vec_async(&self) -> Result<Vec<f32>> {
        match (&self.block.buffer, self.device().backend()) {
            (Buffer::Gpu(_), Backend::Gpu(gpu)) => Ok(bytemuck::pod_collect_to_vec(&gpu.read_async(self.range()).await?)),
            _ => Ok(self.native().to_vec()),
        }
    }

    /// The value of a tensor of one element. Waits, as [`Tensor::to_vec`] does.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`]; [`crate::ErrorKind::Argument`] when there is more than one element.
    pub fn item(&self) -> Result<f32> {
        self.expect_one()?;
        Ok(self.to_vec()?[0])
    }

    /// [`Tensor::item`] for programs that may not wait.
    ///
    /// # Errors
    /// As [`Tensor::item`].
    pub async fn item_async(&self) -> Result<f32> {
        self.expect_one()?;
        Ok(self.to_vec_async().await?[0])
    }

    fn expect_one(&self) -> Result<()> {
        match self.len() {
            1 => Ok(()),
            _ => Err(Error::shape("Tensor.item", "tensor", &self.shape, "one element")),
        }
    }

    /// A copy on another device (or on the same one).
    ///
    /// # Errors
    /// As [`Tensor::to_vec`] and [`Tensor::from_slice`].
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Self::upload("Tensor.to_device", device, &self.read_back::<u32>()?, self.shape.clone())
    }

    /// The part of `len` words from `start` on, as one row of numbers. The caller proves that it lies inside.
    pub(crate) fn slice(&self, start: usize, shape: impl Into<Shape>) -> Self {
        let part = Self { offset: self.offset + start, shape: shape.into(), ..self.clone() };
        debug_assert!(start + part.len() <= self.len(), "slice of {:?} from {start} in {:?}", part.shape, self.shape);
        part
    }

    pub(crate) fn read_back<T: bytemuck::Pod>(&self) -> Result<Vec<T>> {
        match (&self.block.buffer, self.device().backend()) {
            (Buffer::Gpu(_), Backend::Gpu(gpu)) => Ok(bytemuck::pod_collect_to_vec(&gpu.read(self.range())?)),
            _ => Ok(self.native().to_vec()),
        }
    }

    /// Replaces all values, in the order of recorded work.
    pub(crate) fn write<T: bytemuck::Pod>(&self, data: &[T]) -> Result<()> {
        match (&self.block.buffer, self.device().backend()) {
            (Buffer::Gpu(_), Backend::Gpu(gpu)) => gpu.upload(bytemuck::cast_slice(data), self.range()),
            _ => {
                self.native_mut().copy_from_slice(data);
                Ok(())
            }
        }
    }

    /// Sets all values to zero.
    pub(crate) fn clear(&self) -> Result<()> {
        match (&self.block.buffer, self.device().backend()) {
            (Buffer::Gpu(_), Backend::Gpu(gpu)) => gpu.clear(self.range()),
            _ => {
                self.native_mut::<u32>().fill(0);
                Ok(())
            }
        }
    }

    /// Copies all values of `from`, which has as many and lies in other memory.
    pub(crate) fn copy_from(&self, from: &Tensor) -> Result<()> {
        debug_assert_eq!(self.len(), from.len(), "copy");
        match (&self.block.buffer, self.device().backend()) {
            (Buffer::Gpu(_), Backend::Gpu(gpu)) => gpu.copy(from.range(), self.range()),
            _ => {
                self.native_mut::<u32>().copy_from_slice(&from.native());
                Ok(())
            }
        }
    }

    /// Words from the start of this one to the start of one that lies behind it in the same block.
    pub(crate) fn words_to(&self, next: &Tensor) -> usize {
        debug_assert!(self.shares_memory(next));
        next.offset - self.offset
    }

    /// Whether both lie in one block of memory.
    pub(crate) fn shares_memory(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.block, &other.block)
    }

    /// For a launch on a GPU: the bytes that the tensor occupies.
    pub(crate) fn range(&self) -> Range {
        match &self.block.buffer {
            Buffer::Gpu(buffer) => Range::new(buffer, self.offset as u64 * 4, self.len() as u64 * 4),
            Buffer::Native(_) => unreachable!("a native tensor given to a GPU kernel: callers compare devices first"),
        }
    }

    /// The same from the start of this one to the end of one that lies behind it in the same block.
    pub(crate) fn range_to(&self, last: &Tensor) -> Range {
        let end = last.offset + last.len();
        Self { shape: vec![end - self.offset], ..self.clone() }.range()
    }

    /// For a CPU twin: the values, locked for reading.
    pub(crate) fn native<T: bytemuck::Pod>(&self) -> MappedRwLockReadGuard<'_, [T]> {
        match &self.block.buffer {
            Buffer::Native(buffer) => buffer.read(self.offset..self.offset + self.len()),
            Buffer::Gpu(_) => unreachable!("a GPU tensor given to a CPU twin: callers compare devices first"),
        }
    }

    /// For a CPU twin: the values, locked for writing.
    pub(crate) fn native_mut<T: bytemuck::Pod>(&self) -> MappedRwLockWriteGuard<'_, [T]> {
        match &self.block.buffer {
            Buffer::Native(buffer) => buffer.write(self.offset..self.offset + self.len()),
            Buffer::Gpu(_) => unreachable!("a GPU tensor given to a CPU twin: callers compare devices first"),
        }
    }

    /// `op: argument has shape [..], expected [..]` unless the sizes are `expected`; `names` describe them.
    pub(crate) fn expect_shape(&self, op: &str, argument: &str, expected: &[usize], names: &str) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::shape(op, argument, &self.shape, format!("{names} = {expected:?}")))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?} on {})", self.shape, self.device().info())
    }
}

/// Token ids on a device, time-major `[T, B]`, with a copy on the host, where they are checked.
///
/// Layers and losses compare the largest id with their table before anything runs.
#[derive(Clone)]
pub struct Ids {
    tensor: Tensor,
    inner: Arc<IdsInner>,
}

struct IdsInner {
    host: Vec<u32>,
    largest: u32,
    positions: OnceLock<Positions>,
}

/// Where each distinct id stands, sorted by id: what a gradient by table row sums over, in a fixed order.
#[derive(Clone)]
pub(crate) struct Positions {
    /// The distinct ids.
    pub ids: Tensor,
    /// The positions of `ids[i]` are `order[starts[i]..starts[i + 1]]`.
    pub starts: Tensor,
    /// All positions, by id, then in order of time.
    pub order: Tensor,
}

impl Ids {
    /// A copy of `ids` on `device`; for a batch of sequences `[T, B]`, time-major.
    ///
    /// # Errors
    /// As [`Tensor::from_slice`].
    pub fn from_slice(device: &Device, ids: &[u32], shape: impl Into<Shape>) -> Result<Self> {
        let tensor = Tensor::upload("Ids.from_slice", device, ids, shape.into())?;
        let largest = ids.iter().copied().max().unwrap_or(0);
        Ok(Self { tensor, inner: Arc::new(IdsInner { host: ids.to_vec(), largest, positions: OnceLock::new() }) })
    }

    /// The sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    /// The device that holds them.
    pub fn device(&self) -> &Device {
        self.tensor.device()
    }

    /// The ids, in order; does not wait for the device.
    pub fn to_vec(&self) -> Vec<u32> {
        self.inner.host.clone()
    }

    pub(crate) fn host(&self) -> &[u32] {
        &self.inner.host
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// `op: argument has id 7, expected ids below 5 (the vocabulary)` unless all ids are below `bound`.
    pub(crate) fn expect_below(&self, op: &str, argument: &str, bound: usize, what: &str) -> Result<()> {
        if (self.inner.largest as usize) < bound {
            return Ok(());
        }
        let given = format!("has id {}", self.inner.largest);
        Err(Error::new(crate::ErrorKind::Argument, format!("{op}: {argument} {given}, expected ids below {bound} ({what})")))
    }

    /// Where each distinct id stands; uploaded at the first call.
    pub(crate) fn positions(&self) -> Result<Positions> {
        if let Some(positions) = self.inner.positions.get() {
            return Ok(positions.clone());
        }
        let host = &self.inner.host;
        let mut order: Vec<u32> = (0..host.len() as u32).collect();
        order.sort_by_key(|at| (host[*at as usize], *at));
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        for (rank, at) in order.iter().enumerate() {
            let id = host[*at as usize];
            if ids.last() != Some(&id) {
                ids.push(id);
                starts.push(rank as u32);
            }
        }
        starts.push(order.len() as u32);
        let upload = |data: &[u32]| Tensor::upload("Ids.positions", self.device(), data, vec![data.len()]);
        let positions = Positions { ids: upload(&ids)?, starts: upload(&starts)?, order: upload(&order)? };
        Ok(self.inner.positions.get_or_init(|| positions).clone())
    }
}

impl fmt::Debug for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ids({:?} on {})", self.shape(), self.device().info())
    }
}

/// The number of valid steps of each row of a padded batch, `[B]`: any order, 0 allowed.
#[derive(Clone)]
pub struct Lengths {
    tensor: Tensor,
    host: Arc<Vec<u32>>,
}

impl Lengths {
    /// A copy of `lengths` on `device`.
    ///
    /// # Errors
    /// As [`Tensor::from_slice`].
    pub fn from_slice(device: &Device, lengths: &[u32]) -> Result<Self> {
        let tensor = Tensor::upload("Lengths.from_slice", device, lengths, vec![lengths.len()])?;
        Ok(Self { tensor, host: Arc::new(lengths.to_vec()) })
    }

    /// The lengths, in order; does not wait for the device.
    pub fn to_vec(&self) -> Vec<u32> {
        self.host.to_vec()
    }

    pub(crate) fn host(&self) -> &[u32] {
        &self.host
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Checks that there is one length a row, none beyond the padded `steps`, on `device`.
    pub(crate) fn check(&self, op: &str, device: &Device, steps: usize, rows: usize) -> Result<()> {
        device.expect_same(op, "lengths", self.tensor.device())?;
        if self.host.len() != rows {
            return Err(Error::shape(op, "lengths", &[self.host.len()], format!("[batch] = [{rows}]")));
        }
        match self.host.iter().enumerate().find(|(_, length)| **length as usize > steps) {
            Some((row, length)) => {
                Err(Error::argument(op, &format!("lengths[{row}]"), length, format!("at most the {steps} steps of the batch")))
            }
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lengths({:?})", self.host)
    }
}
