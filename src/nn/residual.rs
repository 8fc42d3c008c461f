//! Layers around layers: [`Residual`] adds what goes in to what comes out, [`Skip`] puts it beside.

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
pub struct Residual {
    layer: Box<dyn Layer>,
}

/// `y = [x, f(x)]` on the last axis: x `[.., F]` and f(x) `[.., G]` give `[.., F + G]`; else as [`Residual`].
pub struct Skip {
    layer: Box<dyn Layer>,
}

/// The gradient of x, and that of the initial state where it was asked for.
type Gradients = (Option<Tensor>, Vec<Tensor>);

/// The backward pass of the layer inside.
trait LayerBackward: FnOnce(Tape, &Tensor) -> Result<Gradients> {}

impl<F: FnOnce(Tape, &Tensor) -> Result<Gradients>> LayerBackward for F {}

impl Residual {
    /// Around `layer`.
    pub fn new(layer: impl Layer + 'static) -> Self {
        Self { layer: Box::new(layer) }
    }

    fn backward_around(&self, tape: Tape, dy: &Tensor, needs_dx: bool, layer: impl LayerBackward) -> Result<Gradients> {
        let op = "residual.backward";
        let ResidualTape { inner, x } = tape.open(op)?;
        dy.expect_shape(op, "dy", &x, "the shape of x")?;
        match layer(inner, dy)? {
            (_, dstate) if !needs_dx => Ok((None, dstate)),
            (Some(dx), dstate) => Ok((Some(dx.add(dy)?), dstate)),
            (None, _) => Err(no_gradient(op, self.layer.as_ref())),
        }
    }

    fn join(&self, op: &str, x: &Tensor, output: Output) -> Result<Output> {
        output.y.expect_shape(op, "f(x)", x.shape(), "the shape of x")?;
        x.device().expect_same(op, "f(x)", output.y.device())?;
        Ok(Output { y: x.add(&output.y)?, ..output })
    }
}

impl Skip {
    /// Around `layer`.
    pub fn new(layer: impl Layer + 'static) -> Self {
        Self { layer: Box::new(layer) }
    }

    fn backward_around(&self, tape: Tape, dy: &Tensor, needs_dx: bool, layer: impl LayerBackward) -> Result<Gradients> {
        let op = "skip.backward";
        let SkipTape { inner, x, y } = tape.open(op)?;
        let (rows, own) = (&x[..x.len() - 1], x[x.len() - 1]);
        let whole: Vec<usize> = rows.iter().copied().chain([own + y[y.len() - 1]]).collect();
        dy.expect_shape(op, "dy", &whole, "the shape of [x, f(x)]")?;
        match layer(inner, &columns_of(dy, own, &y)?)? {
            (_, dstate) if !needs_dx => Ok((None, dstate)),
            (Some(dx), dstate) => Ok((Some(dx.add(&columns_of(dy, 0, &x)?)?), dstate)),
            (None, _) => Err(no_gradient(op, self.layer.as_ref())),
        }
    }

    fn join(&self, op: &str, x: &Tensor, output: Output) -> Result<Output> {
        x.device().expect_same(op, "f(x)", output.y.device())?;
        match (x.shape(), output.y.shape()) {
            ([rows @ .., a], [others @ .., b]) if rows == others => {
                let (count, width) = (x.len() / a, a + b);
                let shape: Vec<usize> = rows.iter().copied().chain([width]).collect();
                let y = Tensor::uninitialized(x.device(), shape)?;
                copy_columns(Matrix::new(x, count, *a), Matrix::window(&y, 0, count, *a, width))?;
                copy_columns(Matrix::new(&output.y, count, *b), Matrix::window(&y, *a, count, *b, width))?;
                Ok(Output { y, ..output })
            }
            (x, y) => Err(Error::shape(op, "f(x)", y, format!("the shape of x {x:?} up to the last size"))),
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

/// The tape of the layer inside, and the shape of x.
struct ResidualTape {
    inner: Tape,
    x: Vec<usize>,
}

/// The tape of the layer inside, and the shapes of x and f(x).
struct SkipTape {
    inner: Tape,
    x: Vec<usize>,
    y: Vec<usize>,
}

impl Layer for Residual {
    fn kind(&self) -> &'static str {
        "residual"
    }

    fn state_len(&self) -> usize {
        self.layer.state_len()
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = "residual.forward";
        self.join(op, x.numbers(op)?, self.layer.forward(x, context)?)
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let op = "residual.forward_train";
        let numbers = x.numbers(op)?;
        let (output, inner) = self.layer.forward_train(x, context)?;
        Ok((self.join(op, numbers, output)?, Tape::new(ResidualTape { inner, x: numbers.shape().to_vec() })))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let plain = |tape, dy: &Tensor| Ok((self.layer.backward(tape, dy, needs_dx)?, Vec::new()));
        Ok(self.backward_around(tape, dy, needs_dx, plain)?.0)
    }

    fn backward_from(&self, tape: Tape, dy: &Tensor, dstate: &[Tensor], needs_dx: bool) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        self.backward_around(tape, dy, needs_dx, |tape, dy| self.layer.backward_from(tape, dy, dstate, needs_dx))
    }

    fn step(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = "residual.step";
        self.join(op, x.numbers(op)?, self.layer.step(x, context)?)
    }
}

impl Layer for Skip {
    fn kind(&self) -> &'static str {
        "skip"
    }

    fn state_len(&self) -> usize {
        self.layer.state_len()
    }

    fn forward(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = "skip.forward";
        self.join(op, x.numbers(op)?, self.layer.forward(x, context)?)
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let op = "skip.forward_train";
        let numbers = x.numbers(op)?;
        let (output, inner) = self.layer.forward_train(x, context)?;
        let y = output.y.shape().to_vec();
        Ok((self.join(op, numbers, output)?, Tape::new(SkipTape { inner, x: numbers.shape().to_vec(), y })))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let plain = |tape, dy: &Tensor| Ok((self.layer.backward(tape, dy, needs_dx)?, Vec::new()));
        Ok(self.backward_around(tape, dy, needs_dx, plain)?.0)
    }

    fn backward_from(&self, tape: Tape, dy: &Tensor, dstate: &[Tensor], needs_dx: bool) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        self.backward_around(tape, dy, needs_dx, |tape, dy| self.layer.backward_from(tape, dy, dstate, needs_dx))
    }

    fn step(&self, x: &Value, context: &Context<'_>) -> Result<Output> {
        let op = "skip.step";
        self.join(op, x.numbers(op)?, self.layer.step(x, context)?)
    }
}

fn no_gradient(op: &str, layer: &dyn Layer) -> Error {
    Error::unsupported(op, format!("the layer inside ({}) gives no gradient of x", layer.kind()))
}

macro_rules! passed_on {
    ($($layer:ty,)*) => {$(
        impl Module for $layer {
            fn params(&self) -> Vec<(String, &Param)> {
                self.layer.params()
            }

            fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
                self.layer.params_mut()
            }
        }

        impl std::fmt::Debug for $layer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_tuple(self.kind()).field(&self.layer.kind()).finish()
            }
        }
    )*};
}

passed_on!(Residual, Skip,);
