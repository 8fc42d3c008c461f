//! Arithmetic of tensors, for an application's own layers.

use crate::error::{Error, Result};
use crate::kernels::elementwise;
use crate::tensor::Tensor;

impl Tensor {
    /// `self + other`, number by number. Other has the shape of self, or of its last dimensions alone, and is then added to
    /// each row of those: `[seq, batch, features] + [features]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for another shape; [`crate::ErrorKind::DeviceMismatch`]; what the device reports.
    pub fn add(&self, other: &Tensor) -> Result<Self> {
        self.expect_operand("Tensor.add", other)?;
        elementwise::add(self, other)
    }

    /// `self * other`, number by number; shapes as in [`Tensor::add`].
    ///
    /// # Errors
    /// As [`Tensor::add`].
    pub fn mul(&self, other: &Tensor) -> Result<Self> {
        self.expect_operand("Tensor.mul", other)?;
        elementwise::multiply(self, other)
    }

    /// `self * factor`, number by number.
    ///
    /// # Errors
    /// What the device reports.
    pub fn scale(&self, factor: f32) -> Result<Self> {
        elementwise::scale(self, factor)
    }

    fn expect_operand(&self, op: &str, other: &Tensor) -> Result<()> {
        self.device().expect_same(op, "other", other.device())?;
        match self.shape().ends_with(other.shape()) {
            true => Ok(()),
            false => Err(Error::shape(op, "other", other.shape(), format!("{:?} or its last dimensions", self.shape()))),
        }
    }
}
