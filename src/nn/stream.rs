//! [`Stream`]: many sequences at once, each at its own pace.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Input, Module, Sequential, State, Value};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::{Ids, Lengths, Tensor};

/// Many independent streams through one model, as rows of one batch: they join, get a frame or several at a time or none, and leave,
/// and none sees the others. Each gives what it would give alone: within rounding, and to the bit on a device that is batch invariant
/// ([`Device::set_batch_invariant`]).
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::{Device, Rng, nn::{LinearConfig, LstmConfig, Sequential, Stream}};
/// let (device, mut rng) = (Device::cpu(), Rng::seed(0));
/// let model = Sequential::new()
///     .push(LstmConfig::new(3, 8).init(&device, &mut rng)?)
///     .push(LinearConfig::new(8, 1).init(&device, &mut rng)?);
/// let mut stream = Stream::new(model, 3, 16)?; // frames of 3 numbers, up to 16 streams
/// let (a, b) = (stream.join()?, stream.join()?);
/// let y = stream.push(&[(a, &[0.1, 0.2, 0.3]), (b, &[0.5; 6])])?; // one frame, and two
/// assert_eq!((y[0].len(), y[1].len()), (1, 2));
/// let y = stream.push(&[(b, &[0.7; 3])])?; // a waits
/// let state = stream.leave(a)?; // to be kept, or saved
/// let a = stream.join_with(&state)?; // goes on where it was
/// # let _ = (y, a);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Stream {
    model: Arc<Sequential>,
    device: Device,
    /// Numbers of a frame; `None`: a frame is an id.
    width: Option<usize>,
    /// The state that a stream starts from: one row.
    start: State,
    state: State,
    rows: Vec<Option<StreamId>>,
    /// Rows that are to get `start` before the next push.
    fresh: Vec<usize>,
}

/// One of the streams of a [`Stream`]; never used again for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId {
    row: usize,
    serial: u64,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {}", self.serial)
    }
}

/// What a frame is made of.
trait Part: Copy + Default {
    const NAME: &'static str;
    fn value(device: &Device, data: &[Self], shape: [usize; 2], width: Option<usize>) -> Result<Value>;
}

impl Part for f32 {
    const NAME: &'static str = "numbers";

    fn value(device: &Device, data: &[f32], [steps, rows]: [usize; 2], width: Option<usize>) -> Result<Value> {
        Ok(Tensor::from_slice(device, data, [steps, rows, width.unwrap_or(1)])?.into())
    }
}

impl Part for u32 {
    const NAME: &'static str = "ids";

    fn value(device: &Device, data: &[u32], shape: [usize; 2], _: Option<usize>) -> Result<Value> {
        Ok(Ids::from_slice(device, data, shape)?.into())
    }
}

impl Stream {
    /// Up to `capacity` streams whose frames are `width` numbers. The model may be shared (an `Arc`); its weights should stay as
    /// they are, and where it learned what rows start from, that is taken here.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a capacity or width of 0, or a width that the model refuses;
    /// [`crate::ErrorKind::Unsupported`] for a model without parameters, and for one that cannot stream, by the name of the layer: one
    /// that reads time in reverse, or pools over time; what the device reports.
    pub fn new(model: impl Into<Arc<Sequential>>, width: usize, capacity: usize) -> Result<Self> {
        Self::open::<f32>(model.into(), Some(width), capacity)
    }

    /// The same for frames that are ids, which an [`super::Embedding`] takes.
    ///
    /// # Errors
    /// As [`Stream::new`].
    pub fn of_ids(model: impl Into<Arc<Sequential>>, capacity: usize) -> Result<Self> {
        Self::open::<u32>(model.into(), None, capacity)
    }

    fn open<P: Part>(model: Arc<Sequential>, width: Option<usize>, capacity: usize) -> Result<Self> {
        let op = "Stream.new";
        for (name, size) in [("width", width.unwrap_or(1)), ("capacity", capacity)] {
            if size == 0 {
                return Err(Error::argument(op, name, size, "at least 1"));
            }
        }
        let device = match model.params().first() {
            Some((_, param)) => param.value().device().clone(),
            None => return Err(Error::unsupported(op, "the model has no parameters")),
        };
        // A batch whose rows have no step: a layer that cannot stream refuses it, the others give what rows start from.
        let frame = P::value(&device, &vec![P::default(); capacity * width.unwrap_or(1)], [1, capacity], width)?;
        let nothing = Lengths::from_slice(&device, &vec![0; capacity])?;
        let step = match &frame {
            Value::Numbers(x) => Value::Numbers(x.reshape(&x.shape()[1..])?),
            Value::Ids(_) => Ids::from_slice(&device, &vec![0; capacity], [capacity])?.into(),
        };
        model.step(step, Input::new().lengths(&nothing))?;
        let (_, state) = model.forward(frame, Input::new().lengths(&nothing))?;
        for tensor in state.layers().iter().flatten() {
            if !matches!(tensor.shape(), [.., batch, _] if *batch == capacity) {
                return Err(Error::shape(
                    op,
                    "a layer's state",
                    tensor.shape(),
                    format!("[.., batch, features], batch {capacity}"),
                ));
            }
        }
        let start = state.take_rows(&[0])?;
        Ok(Self { model, device, width, start, state, rows: vec![None; capacity], fresh: Vec::new() })
    }

    /// How many streams there can be at once: the rows of the batch.
    pub fn capacity(&self) -> usize {
        self.rows.len()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.iter().flatten().count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A new stream, from the beginning.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when all rows are taken.
    pub fn join(&mut self) -> Result<StreamId> {
        let row = self.free_row("Stream.join")?;
        self.fresh.push(row);
        Ok(self.enter(row))
    }

    /// A new stream that goes on from a state of one row, such as [`Stream::leave`] gives, or the model itself for a batch of one.
    ///
    /// # Errors
    /// As [`Stream::join`]; [`crate::ErrorKind::Argument`] for a state of another model, [`crate::ErrorKind::DeviceMismatch`]; what
    /// the device reports.
    pub fn join_with(&mut self, state: &State) -> Result<StreamId> {
        let op = "Stream.join_with";
        let row = self.free_row(op)?;
        self.settle()?;
        let other = state.layers().iter().flatten().find(|tensor| !matches!(tensor.shape(), [.., 1, _]));
        if let Some(other) = other {
            return Err(Error::shape(op, "state", other.shape(), "[.., 1, features], of one row"));
        }
        self.state = self.state.put(op, &[(row, 0)], state)?;
        Ok(self.enter(row))
    }

    /// Ends a stream and gives its state, of one row. Does not wait for the device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a stream that is not here; what the device reports.
    pub fn leave(&mut self, id: StreamId) -> Result<State> {
        let row = self.find("Stream.leave", id)?;
        self.settle()?;
        let state = self.state.take_rows(&[row])?;
        self.rows[row] = None;
        Ok(state)
    }

    /// The row of a stream in the batch, for [`Stream::push_batch`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a stream that is not here.
    pub fn row(&self, id: StreamId) -> Result<usize> {
        self.find("Stream.row", id)
    }

    /// The next frames of some streams, one after another: `[frames * width]` each, none allowed. Gives the outputs of each, in the
    /// same order. Waits for the device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a stream that is not here or comes twice, or for a part of a frame; what the device
    /// reports. No stream has moved then.
    pub fn push(&mut self, frames: &[(StreamId, &[f32])]) -> Result<Vec<Vec<f32>>> {
        self.run("Stream.push", frames)
    }

    /// The next ids of some streams; else as [`Stream::push`].
    ///
    /// # Errors
    /// As [`Stream::push`]; [`crate::ErrorKind::Argument`] for an id outside the vocabulary.
    pub fn push_ids(&mut self, ids: &[(StreamId, &[u32])]) -> Result<Vec<Vec<f32>>> {
        self.run("Stream.push_ids", ids)
    }

    /// The same on the device, without waiting for it: x `[T, capacity, width]`, or ids `[T, capacity]`, of which row
    /// [`Stream::row`] belongs to a stream, and how many of the T steps are valid in each row; 0 where it waits, and in rows of
    /// no stream. Gives y `[T, capacity, ..]`, of which only the valid steps count.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for an x or lengths that do not fit; what the model refuses, and what the device reports. No
    /// stream has moved then.
    pub fn push_batch(&mut self, x: impl Into<Value>, lengths: &Lengths) -> Result<Tensor> {
        let (op, x, capacity) = ("Stream.push_batch", x.into(), self.capacity());
        let shape = match &x {
            Value::Numbers(x) => x.shape(),
            Value::Ids(ids) => ids.shape(),
        };
        let (steps, expected) = match (shape, self.width) {
            ([steps, rows, width], Some(own)) if (*rows, *width) == (capacity, own) => (*steps, None),
            ([steps, rows], None) if *rows == capacity => (*steps, None),
            (_, Some(width)) => (0, Some(format!("[seq, {capacity}, {width}]"))),
            (_, None) => (0, Some(format!("[seq, {capacity}]"))),
        };
        if let Some(expected) = expected {
            return Err(Error::shape(op, "x", shape, expected));
        }
        lengths.check(op, &self.device, steps, capacity)?;
        for (row, (length, id)) in lengths.host().iter().zip(&self.rows).enumerate() {
            if id.is_none() && *length > 0 {
                return Err(Error::argument(op, &format!("lengths[{row}]"), length, "0: no stream has this row"));
            }
        }
        self.settle()?;
        let (y, state) = self.model.forward(x, Input::new().lengths(lengths).state(&self.state))?;
        self.state = state;
        Ok(y)
    }

    fn run<P: Part>(&mut self, op: &str, frames: &[(StreamId, &[P])]) -> Result<Vec<Vec<f32>>> {
        let kind = if self.width.is_some() { f32::NAME } else { u32::NAME };
        if P::NAME != kind {
            return Err(Error::argument(op, "frames", P::NAME, kind));
        }
        let (capacity, width) = (self.capacity(), self.width.unwrap_or(1));
        let mut rows = vec![(0, &[][..]); frames.len()];
        let mut lengths = vec![None; capacity];
        for ((id, data), target) in frames.iter().zip(&mut rows) {
            let row = self.find(op, *id)?;
            if data.len() % width != 0 {
                let expected = format!("a multiple of {width} numbers, which a frame has");
                return Err(Error::shape(op, &format!("data of {id}"), &[data.len()], expected));
            }
            if lengths[row].replace((data.len() / width) as u32).is_some() {
                return Err(Error::argument(op, &id.to_string(), "given twice", "once"));
            }
            *target = (row, *data);
        }
        let lengths: Vec<u32> = lengths.into_iter().map(Option::unwrap_or_default).collect();
        let steps = lengths.iter().copied().max().unwrap_or(0) as usize;
        if steps == 0 {
            return Ok(vec![Vec::new(); frames.len()]);
        }
        let mut x = vec![P::default(); steps * capacity * width];
        for (row, data) in &rows {
            for (t, frame) in data.chunks_exact(width).enumerate() {
                x[(t * capacity + row) * width..][..width].copy_from_slice(frame);
            }
        }
        let x = P::value(&self.device, &x, [steps, capacity], self.width)?;
        // New rows get their start first: what a refused push falls back to must not be another stream's state.
        self.settle()?;
        let before = self.state.clone();
        let pushed = self.push_batch(x, &Lengths::from_slice(&self.device, &lengths)?).and_then(|y| y.to_vec());
        let y = pushed.inspect_err(|_| self.state = before)?;
        let width = y.len() / (steps * capacity);
        let of_row = |row: usize| {
            (0..lengths[row] as usize).flat_map(move |t| (t * capacity + row) * width..(t * capacity + row + 1) * width)
        };
        Ok(rows.iter().map(|(row, _)| of_row(*row).map(|at| y[at]).collect()).collect())
    }

    /// Gives new streams the state that they start from.
    fn settle(&mut self) -> Result<()> {
        if !self.fresh.is_empty() {
            let rows: Vec<_> = self.fresh.iter().map(|row| (*row, 0)).collect();
            self.state = self.state.put_rows(&rows, &self.start)?;
            self.fresh.clear();
        }
        Ok(())
    }

    fn free_row(&self, op: &str) -> Result<usize> {
        let full = || Error::argument(op, "capacity", self.capacity(), "a free row: that many streams have joined");
        self.rows.iter().position(Option::is_none).ok_or_else(full)
    }

    fn enter(&mut self, row: usize) -> StreamId {
        // Counted for all, so that the id of another one's stream is known as such.
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let id = StreamId { row, serial: SERIAL.fetch_add(1, Ordering::Relaxed) };
        self.rows[row] = Some(id);
        id
    }

    fn find(&self, op: &str, id: StreamId) -> Result<usize> {
        match self.rows.get(id.row) {
            Some(Some(own)) if *own == id => Ok(id.row),
            _ => Err(Error::argument(op, "id", format!("{id}, which is not here"), "a stream that joined and has not left")),
        }
    }
}
