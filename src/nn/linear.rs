//! [`Linear`]: y = x W^T + b.

use super::{Context, Layer, Module, Output, Param, Tape, Value, Version, expect_apart, rows_of};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::column_sum::column_sum;
use crate::kernels::gemm::Matrix;
use crate::kernels::gemm_half::product;
use crate::kernels::half::{Factor, Precision};
use crate::rng::Rng;
use crate::tensor::Tensor;

/// Sizes and options of a [`Linear`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LinearConfig {
    input: usize,
    output: usize,
    bias: bool,
    precision: Precision,
}

impl LinearConfig {
    /// From `input` to `output` numbers, with a bias.
    pub fn new(input: usize, output: usize) -> Self {
        Self { input, output, bias: true, precision: Precision::Single }
    }

    /// Whether there is a bias.
    pub fn bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// The precision of the products, [`Precision::Single`] at first.
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The layer, with weights and bias drawn from U(-1/sqrt(input), 1/sqrt(input)), as PyTorch does.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a size of 0; what the device reports.
    pub fn init(self, device: &Device, rng: &mut Rng) -> Result<Linear> {
        let Self { input, output, bias, precision } = self;
        for (name, size) in [("input", input), ("output", output)] {
            if size == 0 {
                return Err(Error::argument("linear.init", name, size, "at least 1"));
            }
        }
        let bound = 1.0 / (input as f32).sqrt();
        let mut draw = |_| rng.uniform(-bound, bound);
        let weight = Param::draw("weight", device, [output, input], &mut draw)?;
        let bias = if bias { Some(Param::draw("bias", device, [output], &mut draw)?) } else { None };
        Ok(Linear { weight, bias, precision })
    }
}

/// `y [.., output] = x [.., input] weight^T + bias`, `weight [output, input]`, `bias [output]`.
#[derive(Debug)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
    precision: Precision,
}

impl Linear {
    fn sizes(&self) -> [usize; 2] {
        [self.weight.value().shape()[0], self.weight.value().shape()[1]]
    }

    /// `x weight^T + bias` for x `[.., input]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when x does not fit; what the device reports.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (op, [output, input]) = ("linear.forward", self.sizes());
        self.weight.value().device().expect_same(op, "x", x.device())?;
        let rows = rows_of(op, x, input)?;
        let mut shape = x.shape().to_vec();
        shape.pop();
        shape.push(output);
        let y = Tensor::uninitialized(x.device(), shape)?;
        let (a, c) = (Matrix::new(x, rows, input), Matrix::new(&y, rows, output));
        let bias = self.bias.as_ref().map(Param::value);
        product(a, &self.weight.transposed_factor(self.precision)?, bias, c, false)?;
        Ok(y)
    }

    /// From dy `[.., output]` and the x of the forward pass: adds to the gradients of weight and bias, and gives, if asked
    /// for, `dx = dy weight`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when dy does not fit x; what the device reports.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let (op, [output, input]) = ("linear.backward", self.sizes());
        for (argument, tensor) in [("x", x), ("dy", dy)] {
            self.weight.value().device().expect_same(op, argument, tensor.device())?;
            expect_apart(op, argument, tensor, [&self.weight].into_iter().chain(&self.bias))?;
        }
        let rows = rows_of(op, x, input)?;
        let mut shape = x.shape().to_vec();
        shape.pop();
        shape.push(output);
        dy.expect_shape(op, "dy", &shape, "[.., output]")?;
        let gradient = Matrix::new(dy, rows, output);
        let x_factor = Factor::right(self.precision, Matrix::new(x, rows, input), rows)?;
        product(gradient.t(), &x_factor, None, Matrix::new(self.weight.grad(), output, input), true)?;
        if let Some(bias) = &self.bias {
            column_sum(gradient, 0, bias.grad())?;
        }
        if !needs_dx {
            return Ok(None);
        }
        let dx = Tensor::uninitialized(x.device(), x.shape())?;
        let weight = self.weight.factor(self.precision, output)?;
        product(gradient, &weight, None, Matrix::new(&dx, rows, input), false)?;
        Ok(Some(dx))
    }
}

impl Module for Linear {
    fn params(&self) -> Vec<(String, &Param)> {
        [&self.weight].into_iter().chain(&self.bias).map(|param| (param.name().to_owned(), param)).collect()
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        [&mut self.weight].into_iter().chain(&mut self.bias).map(|param| (param.name().to_owned(), param)).collect()
    }
}

struct LinearTape {
    x: Tensor,
    /// Whose tape it is, and of which of its values.
    weight: Version,
    version: u64,
}

impl Layer for Linear {
    fn kind(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
        Ok(Output { y: self.forward(x.numbers("linear.forward")?)?, state: Vec::new() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let tape = LinearTape {
            x: x.numbers("linear.forward_train")?.clone(),
            weight: self.weight.version().clone(),
            version: self.weight.version().get(),
        };
        Ok((Layer::forward(self, x, context)?, Tape::new(tape)))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, needs_dx: bool) -> Result<Option<Tensor>> {
        let op = "linear.backward";
        let LinearTape { x, weight, version } = tape.open(op)?;
        if !weight.same(self.weight.version()) || version != weight.get() {
            return Err(super::stale_tape(op));
        }
        self.backward(&x, dy, needs_dx)
    }

    fn step(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
        Ok(Output { y: self.forward(x.numbers("linear.step")?)?, state: Vec::new() })
    }
}
