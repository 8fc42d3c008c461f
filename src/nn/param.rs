//! Parameters and what holds them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::expect_apart;
use crate::checkpoint::{self, Metadata};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::column_sum::column_sum;
use crate::kernels::gemm::Matrix;
use crate::kernels::half::{Factor, Precision};
use crate::kernels::transpose;
use crate::tensor::{Shape, Tensor};

/// A trained tensor and its gradient. Backward passes add to the gradient; an optimizer's step zeroes it.
#[derive(Debug)]
pub struct Param {
    name: String,
    value: Tensor,
    grad: Tensor,
    version: Version,
    transposed: CachedCopy,
    packed: CachedCopy,
    /// In half precision: the value and its transpose as right factors.
    halves: [CachedCopy<Factor>; 2],
    /// Whether its layer bounds gradients on their way back.
    bounded: bool,
}

/// A copy of the values of parameters in another order or place, and the version, of several the sum of versions, that it was made of.
#[derive(Debug)]
pub(super) struct CachedCopy<T = Tensor>(Mutex<Option<(u64, T)>>);

impl<T> Default for CachedCopy<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> CachedCopy<T> {
    pub(super) fn get(&self, version: u64, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut cached = self.0.lock();
        match &*cached {
            Some((made_of, copy)) if *made_of == version => Ok(copy.clone()),
            _ => {
                let copy = make()?;
                *cached = Some((version, copy.clone()));
                Ok(copy)
            }
        }
    }
}

/// Counts the changes of a parameter's value; shared with the optimizer that makes them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Version(Arc<AtomicU64>);

impl Version {
    pub fn advance(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether both count the changes of one parameter.
    pub fn same(&self, other: &Version) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Param {
    /// A parameter named `name` with the initial `value` of the given shape and a gradient of zeros.
    ///
    /// # Errors
    /// As [`Tensor::from_slice`].
    pub fn new(name: impl Into<String>, device: &Device, value: &[f32], shape: impl Into<Shape>) -> Result<Self> {
        let value = Tensor::from_slice(device, value, shape)?;
        let grad = Tensor::zeros(device, value.shape())?;
        Ok(Self::with(name.into(), value, grad))
    }

    /// A parameter whose element number `at` starts as `draw(at)`. Memory is asked for first: a size that nothing can hold is
    /// refused before anything is drawn.
    pub(crate) fn draw(name: &str, device: &Device, shape: impl Into<Shape>, draw: impl FnMut(usize) -> f32) -> Result<Self> {
        let value = Tensor::zeros(device, shape)?;
        let grad = Tensor::zeros(device, value.shape())?;
        value.write(&(0..value.len()).map(draw).collect::<Vec<f32>>())?;
        Ok(Self::with(name.to_owned(), value, grad))
    }

    fn with(name: String, value: Tensor, grad: Tensor) -> Self {
        let (transposed, packed, halves) = (CachedCopy::default(), CachedCopy::default(), Default::default());
        Self { name, value, grad, version: Version::default(), transposed, packed, halves, bounded: false }
    }

    /// Its name inside its layer, as PyTorch has it: `weight_ih_l0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its value. The tensor follows the parameter: an optimizer's step changes what it holds.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Its gradient, the sum of all backward passes since it was last zeroed.
    pub fn grad(&self) -> &Tensor {
        &self.grad
    }

    /// Replaces the value by a copy of `data`, which has as many elements.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when the number of elements differs.
    pub fn set(&self, data: &[f32]) -> Result<()> {
        if data.len() != self.value.len() {
            let expected = format!("{:?}", self.value.shape());
            return Err(Error::shape("Param.set", &self.name, &[data.len()], expected));
        }
        self.value.write(data)?;
        self.version.advance();
        Ok(())
    }

    /// Adds to the gradient: for a layer's backward pass. `gradient` has the parameter's shape, or that behind further
    /// dimensions, over which it is summed: that of a bias `[features]` may be dy `[seq, batch, features]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for another shape, or the memory of a parameter; [`crate::ErrorKind::DeviceMismatch`];
    /// what the device reports.
    pub fn accumulate(&self, gradient: &Tensor) -> Result<()> {
        let op = "Param.accumulate";
        self.value.device().expect_same(op, "gradient", gradient.device())?;
        if !gradient.shape().ends_with(self.value.shape()) {
            let expected = format!("{:?} (that of {}), or this behind further dimensions", self.value.shape(), self.name);
            return Err(Error::shape(op, "gradient", gradient.shape(), expected));
        }
        expect_apart(op, "gradient", gradient, [self])?;
        let columns = self.value.len();
        column_sum(Matrix::new(gradient, gradient.len() / columns, columns), 0, &self.grad)
    }

    pub(crate) fn version(&self) -> &Version {
        &self.version
    }

    pub(crate) fn is_bounded(&self) -> bool {
        self.bounded
    }

    /// From a layer that bounds gradients on their way back.
    pub(crate) fn bounded(self, bounded: bool) -> Self {
        Self { bounded, ..self }
    }

    /// A transposed copy of the value `[rows, cols]`, remade when the value changed: products read it row by row.
    pub(crate) fn transposed(&self) -> Result<Tensor> {
        let make = || transpose::matrix(&self.value, self.value.shape()[0], self.value.shape()[1]);
        self.transposed.get(self.version.get(), make)
    }

    /// A copy in the order in which a kernel reads it, as `pack` makes it, always the same; remade when the value changed.
    pub(crate) fn packed(&self, pack: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        self.packed.get(self.version.get(), || pack(&self.value))
    }

    /// The value `[rows, cols]` as a right factor, with runs of `run` rows.
    pub(crate) fn factor(&self, precision: Precision, run: usize) -> Result<Factor> {
        let value = || Matrix::new(&self.value, self.value.shape()[0], self.value.shape()[1]);
        match precision {
            Precision::Single => Factor::right(precision, value(), run),
            Precision::Half => self.halves[0].get(self.version.get(), || Factor::right(precision, value(), run)),
        }
    }

    /// Its transpose `[cols, rows]` as a right factor.
    pub(crate) fn transposed_factor(&self, precision: Precision) -> Result<Factor> {
        let (rows, cols) = (self.value.shape()[0], self.value.shape()[1]);
        match precision {
            Precision::Single => Factor::right(precision, Matrix::new(&self.transposed()?, cols, rows), cols),
            Precision::Half => self.halves[1]
                .get(self.version.get(), || Factor::right(precision, Matrix::new(&self.value, rows, cols).t(), cols)),
        }
    }

    /// Moves value and gradient into slices of the arena.
    pub(crate) fn relocate(&mut self, value: Tensor, grad: Tensor) -> Result<()> {
        value.copy_from(&self.value)?;
        grad.copy_from(&self.grad)?;
        (self.value, self.grad) = (value, grad);
        Ok(())
    }
}

/// Anything with parameters: a layer, or layers in a row.
pub trait Module {
    /// All parameters with their full names, in a fixed order.
    fn params(&self) -> Vec<(String, &Param)>;

    /// The same, to move them.
    fn params_mut(&mut self) -> Vec<(String, &mut Param)>;

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// What the device reports.
    fn zero_grad(&self) -> Result<()> {
        self.params().iter().try_for_each(|(_, param)| param.grad.clear())
    }

    /// Writes all values to a safetensors file, under the names that PyTorch gives them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`]; what the device reports.
    fn save(&self, path: impl AsRef<Path>) -> Result<()>
    where
        Self: Sized,
    {
        self.save_with(path, &Metadata::new())
    }

    /// The same with texts of the caller's beside them: a vocabulary, a normaliser.
    ///
    /// # Errors
    /// As [`Module::save`].
    fn save_with(&self, path: impl AsRef<Path>, metadata: &Metadata) -> Result<()>
    where
        Self: Sized,
    {
        checkpoint::write_params(path.as_ref(), &self.params(), metadata)
    }

    /// Reads all values from a safetensors file (f32, f16 or bf16), such as a saved PyTorch `state_dict`; gives the
    /// texts beside them. The file must hold just these names and shapes; on an error nothing has changed.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Format`] with every missing, unexpected and misshapen tensor.
    fn load(&self, path: impl AsRef<Path>) -> Result<Metadata>
    where
        Self: Sized,
    {
        checkpoint::read_params("Module.load", path.as_ref(), &self.params(), |name| Some(name.to_owned()))
    }

    /// As [`Module::load`], from a file with other names: `name_of` gives the parameter that a tensor of the file is meant for,
    /// or `None` where it is of no use here.
    ///
    /// ```no_run
    /// # fn load(model: &gatefold::nn::Sequential) -> gatefold::Result<()> {
    /// use gatefold::nn::Module;
    /// // `lstm.weight_ih_l0` and so on are layer 0; the file's other tensors are left out.
    /// model.load_mapped("torch.safetensors", |name| Some(format!("0.{}", name.strip_prefix("lstm.")?)))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Module::load`]; [`crate::ErrorKind::Format`] also where two tensors are meant for one parameter.
    fn load_mapped(&self, path: impl AsRef<Path>, name_of: impl Fn(&str) -> Option<String>) -> Result<Metadata>
    where
        Self: Sized,
    {
        checkpoint::read_params("Module.load_mapped", path.as_ref(), &self.params(), name_of)
    }
}
