//! States of recurrent layers, as a user meets them.

use crate::error::Result;
use crate::nn::rows;
use crate::tensor::Tensor;

/// The state of a recurrent layer: a value, passed in and returned, never hidden.
pub trait CellState: Clone + std::fmt::Debug + Send + Sync + Sized {
    /// The names of its tensors: `h`, `c`.
    const NAMES: &'static [&'static str];
    /// Its tensors, in the order of [`CellState::NAMES`]: h `[layers * directions, batch, recurrent width]`, the others
    /// `[layers * directions, batch, hidden]`.
    fn tensors(&self) -> Vec<&Tensor>;
    /// A state of these tensors, as many as [`CellState::NAMES`].
    fn from_tensors(tensors: Vec<Tensor>) -> Option<Self>;

    /// With zeros in the rows that are flagged: as [`crate::nn::State::reset_rows`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] unless there is a flag for each row; what the device reports.
    fn reset_rows(&self, rows: &[bool]) -> Result<Self> {
        let tensors = Self::NAMES.iter().zip(self.tensors());
        let tensors = tensors.map(|(name, tensor)| rows::reset("State.reset_rows", name, tensor, rows)).collect::<Result<_>>()?;
        match Self::from_tensors(tensors) {
            Some(state) => Ok(state),
            None => unreachable!("as many tensors as before"),
        }
    }
}

/// The state of an LSTM; layer and direction `(l, d)` stand at `l * directions + d`, as in PyTorch.
#[derive(Clone, Debug)]
pub struct LstmState {
    /// Hidden state `[layers * directions, batch, hidden]`, with a projection `[.., projection]`.
    pub h: Tensor,
    /// Cell state `[layers * directions, batch, hidden]`.
    pub c: Tensor,
}

impl CellState for LstmState {
    const NAMES: &'static [&'static str] = &["h", "c"];

    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.h, &self.c]
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Option<Self> {
        let [h, c] = tensors.try_into().ok()?;
        Some(Self { h, c })
    }
}

/// The state of an sLSTM, each `[layers * directions, batch, hidden]`; the order is that of [`LstmState`].
#[derive(Clone, Debug)]
pub struct SLstmState {
    /// Hidden state.
    pub h: Tensor,
    /// Cell state, a sum of candidates weighted by `exp(.. - m)`.
    pub c: Tensor,
    /// Normalizer, the sum of these weights.
    pub n: Tensor,
    /// Stabilizer, the exponent that c and n are relative to.
    pub m: Tensor,
}

impl CellState for SLstmState {
    const NAMES: &'static [&'static str] = &["h", "c", "n", "m"];

    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.h, &self.c, &self.n, &self.m]
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Option<Self> {
        let [h, c, n, m] = tensors.try_into().ok()?;
        Some(Self { h, c, n, m })
    }
}

/// The state of a network whose cells have nothing but h: RNN, GRU, IndRNN and others; the order is that of [`LstmState`].
#[derive(Clone, Debug)]
pub struct HiddenState {
    /// Hidden state `[layers * directions, batch, hidden]`; of a Jordan network the last output `[.., outputs]`.
    pub h: Tensor,
}

impl CellState for HiddenState {
    const NAMES: &'static [&'static str] = &["h"];

    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.h]
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Option<Self> {
        let [h] = tensors.try_into().ok()?;
        Some(Self { h })
    }
}
