//! Rows of states, on the device: to zero, out of a batch, into one.

use super::State;
use crate::error::{Error, Result};
use crate::kernels::gather;
use crate::tensor::{Ids, Tensor};

impl State {
    /// With zeros in the rows that are flagged, such as those that begin a new sequence in the next window; also where a layer has
    /// learned what rows start from. `rows [batch]`.
    ///
    /// ```
    /// # fn main() -> gatefold::Result<()> {
    /// use gatefold::{Device, Rng, Tensor, nn::{LstmConfig, Sequential}};
    /// let device = Device::cpu();
    /// let model = Sequential::new().push(LstmConfig::new(3, 8).init(&device, &mut Rng::seed(0))?);
    /// let window = Tensor::from_slice(&device, &[1.0; 4 * 2 * 3], [4, 2, 3])?;
    /// let (_, state) = model.forward(&window, None)?;
    /// let state = state.reset_rows(&[false, true])?; // the second sequence ended with this window
    /// let (y, _) = model.forward(&window, &state)?;
    /// # let _ = y;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] unless there is a flag for each row, or for a layer whose state is not
    /// `[.., batch, features]`; what the device reports.
    pub fn reset_rows(&self, rows: &[bool]) -> Result<Self> {
        self.each("State.reset_rows", |op, name, _, tensor| reset(op, name, tensor, rows))
    }

    /// The state of these rows alone, in this order.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a row that is not there, or for none; as [`State::reset_rows`].
    pub fn take_rows(&self, rows: &[usize]) -> Result<Self> {
        if rows.is_empty() {
            return Err(Error::shape("State.take_rows", "rows", &[0], "at least one row"));
        }
        let picks: Vec<_> = rows.iter().map(|row| Row::Own(*row)).collect();
        self.each("State.take_rows", |op, name, _, tensor| select(op, name, tensor, None, &picks))
    }

    /// With rows of another state of the same model in the place of some: each of `rows` is a row of this one and the row of `from`
    /// that replaces it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a row that is not there, or a state of another model;
    /// [`crate::ErrorKind::DeviceMismatch`]; as [`State::reset_rows`].
    pub fn put_rows(&self, rows: &[(usize, usize)], from: &State) -> Result<Self> {
        self.put("State.put_rows", rows, from)
    }

    pub(super) fn put(&self, op: &str, rows: &[(usize, usize)], from: &State) -> Result<Self> {
        let counts = |state: &State| state.layers().iter().map(Vec::len).collect::<Vec<_>>();
        if counts(self) != counts(from) {
            let [given, expected] = [counts(from), counts(self)].map(|counts| format!("of layers with {counts:?} tensors"));
            return Err(Error::argument(op, "from", given, expected));
        }
        self.each(op, |op, name, [layer, index], tensor| {
            let (_, batch, width) = split(op, name, tensor)?;
            let other = &from.layers()[layer][index];
            tensor.device().expect_same(op, &format!("from: {name}"), other.device())?;
            let (blocks, _, other_width) = split(op, &format!("from: {name}"), other)?;
            if (blocks * batch * width, other_width) != (tensor.len(), width) {
                let expected = format!("{:?} for any batch", tensor.shape());
                return Err(Error::shape(op, &format!("from: {name}"), other.shape(), expected));
            }
            let mut picks: Vec<_> = (0..batch).map(Row::Own).collect();
            for (row, other) in rows {
                let rows = picks.len();
                let pick =
                    picks.get_mut(*row).ok_or_else(|| Error::argument(op, "row", row, format!("below the batch {rows}")))?;
                *pick = Row::Other(*other);
            }
            select(op, name, tensor, Some(other), &picks)
        })
    }

    /// Calls `make` for each tensor, with its name for errors, and its layer and place there.
    fn each(&self, op: &str, make: impl Fn(&str, &str, [usize; 2], &Tensor) -> Result<Tensor>) -> Result<Self> {
        let of_layer = |(layer, tensors): (usize, &Vec<Tensor>)| {
            let made = tensors.iter().enumerate();
            made.map(|(index, tensor)| make(op, &format!("tensor {index} of layer {layer}"), [layer, index], tensor)).collect()
        };
        Ok(Self::new(self.layers().iter().enumerate().map(of_layer).collect::<Result<_>>()?))
    }
}

/// `tensor [.., batch, features]` with zeros in the rows that are flagged.
pub(super) fn reset(op: &str, name: &str, tensor: &Tensor, rows: &[bool]) -> Result<Tensor> {
    let (_, batch, _) = split(op, name, tensor)?;
    if rows.len() != batch {
        return Err(Error::shape(op, "rows", &[rows.len()], format!("[batch] = [{batch}]")));
    }
    let picks: Vec<_> = rows.iter().enumerate().map(|(row, reset)| if *reset { Row::Zero } else { Row::Own(row) }).collect();
    select(op, name, tensor, None, &picks)
}

/// Where a row comes from.
#[derive(Clone, Copy)]
enum Row {
    Zero,
    Own(usize),
    Other(usize),
}

/// Blocks, rows and width of `[.., batch, features]`.
fn split(op: &str, name: &str, tensor: &Tensor) -> Result<(usize, usize, usize)> {
    match tensor.shape() {
        [blocks @ .., batch, width] => Ok((blocks.iter().product(), *batch, *width)),
        shape => Err(Error::shape(op, name, shape, "[.., batch, features]")),
    }
}

/// `[.., picks, features]`, in every block each row from where `picks` says.
fn select(op: &str, name: &str, own: &Tensor, other: Option<&Tensor>, picks: &[Row]) -> Result<Tensor> {
    let (blocks, batch, width) = split(op, name, own)?;
    let others = other.map_or(Ok(0), |other| split(op, name, other).map(|(_, batch, _)| batch))?;
    for pick in picks {
        let (row, batch) = match pick {
            Row::Zero => continue,
            Row::Own(row) => (row, batch),
            Row::Other(row) => (row, others),
        };
        if *row >= batch {
            return Err(Error::argument(op, "row", row, format!("below the batch {batch}")));
        }
    }
    // One table of both.
    let table = match other {
        None => own.clone(),
        Some(other) => {
            let table = Tensor::uninitialized(own.device(), [own.len() + other.len()])?;
            table.slice(0, [own.len()]).copy_from(own)?;
            table.slice(own.len(), [other.len()]).copy_from(other)?;
            table
        }
    };
    let place = |at: usize| match (at / picks.len(), picks[at % picks.len()]) {
        (_, Row::Zero) => u32::MAX, // past the table: zeros
        (block, Row::Own(row)) => (block * batch + row) as u32,
        (block, Row::Other(row)) => (blocks * batch + block * others + row) as u32,
    };
    let count = blocks * picks.len();
    let places = Ids::from_slice(own.device(), &(0..count).map(place).collect::<Vec<_>>(), [count])?;
    let mut shape = own.shape().to_vec();
    let at = shape.len() - 2;
    shape[at] = picks.len();
    gather::gather(places.tensor(), &table, width)?.reshape(shape)
}
