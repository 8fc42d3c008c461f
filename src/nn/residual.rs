//! Layers around layers: [`Residual`] adds what goes in to what comes out, [`Skip`] puts it beside.

use std::marker::PhantomData;

use super::{Context, Layer, Module, Output, Param, Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::columns::copy_columns;
use crate::kernels::gemm::Matrix;
use crate::tensor::Tensor;

/// `y = x + f(x)` (He et al. 2015), where f is any layer, or several in a [`super::Sequential`], whose output has the shape of
/// x. Parameters, state, lengths and mask keys are those of f.
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::{Device, Rng, Tensor, nn::{LinearConfig, LstmConfig, Module, Residual, Sequential}};
/// let (device, mut rng) = (Device::cpu(), Rng::seed(0));
/// let block = Sequential::new()
///     .push(LstmConfig::new(8, 16).init(&device, &mut rng)?)
///     .push(LinearConfig::new(16, 8).init(&device, &mut rng)?);
/// let model = Sequential::new().push(Residual::new(block)).push(LinearConfig::new(8, 1).init(&device, &mut rng)?);
/// let (y, _) = model.forward(&Tensor::zeros(&device, [5, 2, 8])?, None)?;
/// assert_eq!(y.shape(), [5, 2, 1]);
/// assert_eq!(model.params()[0].0, "0.0.weight_ih_l0");
/// # Ok(()) }
/// ```
pub type Residual = Around<Sum>;

/// `y = [x, f(x)]` on the last axis: x `[.., F]` and f(x) `[.., G]` give `[.., F + G]`; else as [`Residual`].
pub type Skip = Around<Beside>;

/// A layer and how its input joins its output: [`Residual`] or [`Skip`].
pub struct Around<J> {
    layer: Box<dyn Layer>,
    join: PhantomData<J>,
}

/// How x and f(x) become one, and what of the gradient belongs to each.
pub trait Join: Send + Sync + 'static {
    /// The layer's name in errors.
    const KIND: &'static str;
    /// y of x and f(x), which lie on one device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for shapes that do not fit; what the device reports.
    fn join(op: &str, x: &Tensor, y: &Tensor) -> Result<Tensor>;
    /// From dy the gradient by f(x); x and f(x) have these shapes.
    ///
    /// # Errors
    /// As [`Join::join`].
    fn through(op: &str, dy: &Tensor, x: &[usize], y: &[usize]) -> Result<Tensor>;
    /// From the same dy the gradient by x on its way past the layer.
    ///
    /// # Errors
    /// What the device reports.
    fn past(dy: &Tensor, x: &[usize]) -> Result<Tensor>;
}

/// Of [`Residual`].
#[derive(Clone, Copy, Debug)]
pub enum Sum {}

/// Of [`Skip`].
#[derive(Clone, Copy, Debug)]
pub enum Beside {}

impl Join for Sum {
    const KIND: &'static str = "residual";

    fn join(op: &str, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        y.expect_shape(op, "f(x)", x.shape(), "the shape of x")?;
        x.add(y)
    }

    fn through(op: &str, dy: &Tensor, x: &[usize], _: &[usize]) -> Result<Tensor> {
        dy.expect_shape(op, "dy", x, "the shape of x")?;
        Ok(dy.clone())
    }

    fn past(dy: &Tensor, _: &[usize]) -> Result<Tensor> {
        Ok(dy.clone())
    }
}

impl Join for Beside {
    const KIND: &'static str = "skip";

    fn join(op: &str, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        match (x.shape(), y.shape()) {
            ([rows @ .., a], [others @ .., b]) if rows == others => {
                let (count, width) = (x.len() / a, a + b);
                let shape: Vec<usize> = rows.iter().copied().chain([width]).collect();
                let joined = Tensor::uninitialized(x.device(), shape)?;
                copy_columns(Matrix::new(x, count, *a), Matrix::window(&joined, 0, count, *a, width))?;
                copy_columns(Matrix::new(y, count, *b), Matrix::window(&joined, *a, count, *b, width))?;
                Ok(joined)
            }
            (x, y) => Err(Error::shape(op, "f(x)", y, format!("the shape of x {x:?} up to the last size"))),
        }
    }

    fn through(op: &str, dy: &Tensor, x: &[usize], y: &[usize]) -> Result<Tensor> {
        let (rows, own) = (&x[..x.len() - 1], x[x.len() - 1]);
        let whole: Vec<usize> = rows.iter().copied().chain([own + y[y.len() - 1]]).collect();
        dy.expect_shape(op, "dy", &whole, "the shape of [x, f(x)]")?;
        columns_of(dy, own, y)
    }

    fn past(dy: &Tensor, x: &[usize]) -> Result<Tensor> {
        columns_of(dy, 0, x)
    }
}

/// The gradient of x, and that of the initial state where it was asked for.
type Gradients = (Option<Tensor>, Vec<Tensor>);

impl<J: Join> Around<J> {
    /// Around `layer`.
    pub fn new(layer: impl Layer + 'static) -> Self {
        Self { layer: Box::new(layer), join: PhantomData }
    }

    fn op(&self, method: &str) -> String {
        format!("{}.{method}", J::KIND)
    }

    fn join(&self, op: &str, x: &Tensor, output: Output) -> Result<Output> {
        x.device().expect_same(op, "f(x)", output.y.device())?;
        Ok(Output { y: J::join(op, x, &output.y)?, ..output })
    }

    /// `layer`: the backward pass of the layer inside.
    fn backward_around(
        &self,
        tape: Tape,
        dy: &Tensor,
        needs_dx: bool,
        layer: impl FnOnce(Tape, &Tensor) -> Result<Gradients>,
    ) -> Result<Gradients> {
        let op = self.op("backward");
        let AroundTape::<J> { inner, x, y, .. } = tape.open(&op)?;
        match layer(inner, &J::through(&op, dy, &x, &y)?)? {
            (_, dstate) if !needs_dx => Ok((None, dstate)),
            (Some(dx), dstate) => Ok((Some(dx.add(&J::past(dy, &x)?)?), dstate)),
            (None, _) => {
                let what = format!("the layer inside ({}) gives no gradient of x", self.layer.kind());
                Err(Error::unsupported(&op, what))
            }
        }
    }
}

/// The columns of dy from `first` on, as a tensor of the given shape.
fn columns_of(dy: &Tensor, first: usize, shape: &[usize]) -> Result<Tensor> {
    let (Some(columns), Some(width)) = (shape.last(), dy.shape().last()) else {
        unreachable!("the forward pass has seen a last size");
    };
    let part = Tensor::uninitialized(dy.device(), shape)?;
    let rows = part.len() / columns;
    copy_columns(Matrix::window(dy, first, rows, *columns, *width), Matrix::new(&part, rows, *columns))?;
    Ok(part)
}

/// The tape of the layer inside, and the shapes of x and f(x).
struct AroundTape<J> {
    inner: Tape,
    x: Vec<usize>,
    y: Vec<usize>,
    join: PhantomData<J>,
}

impl<J: Join> Layer for Around<J> {
    fn kind(&self) -> &'static str {
        J::KIND
    }

    fn state_len(&self) -> usize {
        self.layer.state_len()
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = self.op("forward");
        self.join(&op, x.numbers(&op)?, self.layer.forward(x, context)?)
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let op = self.op("forward_train");
        let numbers = x.numbers(&op)?;
        let (output, inner) = self.layer.forward_train(x, context)?;
        let (x, y) = (numbers.shape().to_vec(), output.y.shape().to_vec());
        let tape = AroundTape::<J> { inner, x, y, join: PhantomData };
        Ok((self.join(&op, numbers, output)?, Tape::new(tape)))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let plain = |tape, dy: &Tensor| Ok((self.layer.backward(tape, dy, needs_dx)?, Vec::new()));
        Ok(self.backward_around(tape, dy, needs_dx, plain)?.0)
    }

    fn backward_from(&self, tape: Tape, dy: &Tensor, dstate: &[Tensor], needs_dx: bool) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        self.backward_around(tape, dy, needs_dx, |tape, dy| self.layer.backward_from(tape, dy, dstate, needs_dx))
    }

    fn step(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = self.op("step");
        self.join(&op, x.numbers(&op)?, self.layer.step(x, context)?)
    }
}

impl<J: Join> Module for Around<J> {
    fn params(&self) -> Vec<(String, &Param)> {
        self.layer.params()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        self.layer.params_mut()
    }
}

impl<J: Join> std::fmt::Debug for Around<J> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple(self.kind()).field(&self.layer.kind()).finish()
    }
}
