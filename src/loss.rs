//! Losses: the mean over what counts, and its gradient.

use crate::error::{Error, ErrorKind, Result};
use crate::kernels::cross_entropy::{self, Counted};
use crate::kernels::{mean_squared_error, reduce};
use crate::nn::Value;
use crate::tensor::{Lengths, Tensor};

/// Compares a model's output with what was wanted.
///
/// Of an output `[T, B, ..]` the steps past a row's end do not enter the mean; of one output a sequence, `[B, ..]`, the rows of
/// length 0 do not.
pub trait Loss: Send + Sync {
    /// The mean loss `[1]`.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] for a target that does not fit, or when nothing counts; what the device reports.
    fn loss(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>) -> Result<Tensor>;

    /// The mean loss `[1]`, and its gradient in the shape of y.
    ///
    /// # Errors
    /// As [`Loss::loss`].
    fn loss_and_gradient(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>) -> Result<(Tensor, Tensor)>;
}

/// Softmax and negative log-likelihood over classes, fused:
/// `mean over counted rows of log(sum_v exp(y[v])) - y[target]`. y: logits `[T, B, classes]` or `[B, classes]`;
/// target: ids `[T, B]` or `[B]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct CrossEntropy {
    ignored: Option<u32>,
}

impl CrossEntropy {
    /// Every row counts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rows whose target is `id` (padding) do not count.
    pub fn ignoring(id: u32) -> Self {
        Self { ignored: Some(id) }
    }

    fn run(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>, gradient: bool) -> Result<(Tensor, Option<Tensor>)> {
        let op = "cross_entropy";
        let Value::Ids(ids) = target else {
            return Err(Error::argument(op, "target", "numbers", "class ids in the shape of y without its last dimension"));
        };
        y.device().expect_same(op, "target", ids.device())?;
        let Some((classes, rows)) = y.shape().split_last().filter(|(_, rows)| !rows.is_empty() && *rows == ids.shape()) else {
            return Err(Error::shape(
                op,
                "target",
                ids.shape(),
                format!("the shape of y {:?} without its last dimension", y.shape()),
            ));
        };
        let lengths = counted_lengths(op, y, lengths)?;
        let lengths = lengths.as_ref();
        let batch = rows[rows.len() - 1];
        let within = |at: usize| lengths.is_none_or(|l| at / batch < l.host()[at % batch] as usize);
        let counts = |(at, id): &(usize, &u32)| Some(**id) != self.ignored && within(*at);
        let (mut counted, mut largest) = (0usize, 0);
        for (_, id) in ids.host().iter().enumerate().filter(counts) {
            counted += 1;
            largest = largest.max(*id);
        }
        if counted == 0 {
            return Err(nothing_counts(op));
        }
        if largest as usize >= *classes {
            let what = format!("{op}: target has id {largest}, expected ids below {classes} (the classes of y)");
            return Err(Error::new(ErrorKind::Argument, what));
        }
        let scale = 1.0 / counted as f32;
        let counted = Counted { batch, lengths, scale };
        let (terms, dz) = cross_entropy::cross_entropy(y, ids.tensor(), self.ignored, counted, gradient)?;
        Ok((reduce::sum(&terms, scale)?, dz))
    }
}

impl Loss for CrossEntropy {
    fn loss(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>) -> Result<Tensor> {
        Ok(self.run(y, target, lengths, false)?.0)
    }

    fn loss_and_gradient(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>) -> Result<(Tensor, Tensor)> {
        match self.run(y, target, lengths, true)? {
            (loss, Some(dy)) => Ok((loss, dy)),
            (_, None) => unreachable!("the gradient was asked for"),
        }
    }
}

/// `mean over counted numbers of (y - target)^2`; y and target of one shape, `[T, B, features]` or `[B, features]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeanSquaredError;

impl Loss for MeanSquaredError {
    fn loss(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>) -> Result<Tensor> {
        Ok(self.loss_and_gradient(y, target, lengths)?.0)
    }

    fn loss_and_gradient(&self, y: &Tensor, target: &Value, lengths: Option<&Lengths>) -> Result<(Tensor, Tensor)> {
        let op = "mean_squared_error";
        let Value::Numbers(wanted) = target else {
            return Err(Error::argument(op, "target", "ids", "numbers in the shape of y"));
        };
        y.device().expect_same(op, "target", wanted.device())?;
        wanted.expect_shape(op, "target", y.shape(), "the shape of y")?;
        let [.., rows, width] = *y.shape() else {
            return Err(Error::shape(op, "y", y.shape(), "[seq, batch, features] or [batch, features]"));
        };
        let lengths = counted_lengths(op, y, lengths)?;
        let lengths = lengths.as_ref();
        let counted = lengths.map_or(y.len(), |l| l.host().iter().map(|length| *length as usize).sum::<usize>() * width);
        if counted == 0 {
            return Err(nothing_counts(op));
        }
        let scale = 1.0 / counted as f32;
        let counted = Counted { batch: rows, lengths, scale };
        let (terms, dy) = mean_squared_error::mean_squared_error(y, wanted, width, counted)?;
        Ok((reduce::sum(&terms, scale)?, dy))
    }
}

fn nothing_counts(op: &str) -> Error {
    Error::new(ErrorKind::Argument, format!("{op}: nothing counts: every target is ignored or past its row's end"))
}

/// Which rows of y count. `[T, B, ..]`: the steps before each row's end. `[B, ..]`, one output a sequence: the rows that have
/// a step at all. `None`: everything.
fn counted_lengths(op: &str, y: &Tensor, lengths: Option<&Lengths>) -> Result<Option<Lengths>> {
    match (y.shape(), lengths) {
        (_, None) => Ok(None),
        (&[steps, rows, _], Some(lengths)) => {
            lengths.check(op, y.device(), steps, rows)?;
            Ok(Some(lengths.clone()))
        }
        (&[rows, _], Some(lengths)) => {
            lengths.check(op, y.device(), usize::MAX, rows)?;
            if lengths.host().iter().all(|length| *length > 0) {
                return Ok(None);
            }
            // To the kernel y is one step of each row.
            let steps: Vec<u32> = lengths.host().iter().map(|length| (*length).min(1)).collect();
            Lengths::from_slice(y.device(), &steps).map(Some)
        }
        (shape, Some(_)) => Err(Error::shape(op, "y", shape, "[seq, batch, ..] or [batch, ..] where there are lengths")),
    }
}
