//! [`Embedding`]: ids to vectors.

use super::{Context, Layer, Module, Output, Param, Tape, Value, expect_apart};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::gather;
use crate::rng::Rng;
use crate::tensor::{Ids, Tensor};

/// Sizes and options of an [`Embedding`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EmbeddingConfig {
    vocabulary: usize,
    width: usize,
    padding: Option<u32>,
}

impl EmbeddingConfig {
    /// `vocabulary` vectors of `width` numbers.
    pub fn new(vocabulary: usize, width: usize) -> Self {
        Self { vocabulary, width, padding: None }
    }

    /// The vector of this id starts as zeros and is not trained.
    pub fn padding(self, id: u32) -> Self {
        Self { padding: Some(id), ..self }
    }

    /// The layer, with every number drawn from N(0, 1), as PyTorch does.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a size of 0 or a padding id outside the vocabulary; what the device reports.
    pub fn init(self, device: &Device, rng: &mut Rng) -> Result<Embedding> {
        let Self { vocabulary, width, padding } = self;
        for (name, size) in [("vocabulary", vocabulary), ("width", width)] {
            if size == 0 {
                return Err(Error::argument("embedding.init", name, size, "at least 1"));
            }
        }
        if let Some(id) = padding.filter(|id| *id as usize >= vocabulary) {
            return Err(Error::argument("embedding.init", "padding", id, format!("an id below {vocabulary}")));
        }
        let draw = |at: usize| {
            let number = rng.normal();
            if padding.is_some_and(|id| id as usize == at / width) { 0.0 } else { number }
        };
        Ok(Embedding { weight: Param::draw("weight", device, [vocabulary, width], draw)?, padding })
    }
}

/// Ids `[T, B]` to vectors `[T, B, width]`: `y[t, b] = weight[ids[t, b]]`, `weight [vocabulary, width]`.
#[derive(Debug)]
pub struct Embedding {
    weight: Param,
    padding: Option<u32>,
}

impl Embedding {
    /// The vectors, `[vocabulary, width]`.
    pub(super) fn table(&self) -> &Tensor {
        self.weight.value()
    }

    /// The vectors of `ids`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for an id outside the vocabulary; what the device reports.
    pub fn forward(&self, ids: &Ids) -> Result<Tensor> {
        let (op, table) = ("embedding.forward", self.weight.value());
        let [vocabulary, width] = [table.shape()[0], table.shape()[1]];
        table.device().expect_same(op, "ids", ids.device())?;
        ids.expect_below(op, "ids", vocabulary, "the vocabulary")?;
        let shape: Vec<usize> = ids.shape().iter().copied().chain([width]).collect();
        gather::gather(ids.tensor(), table, width)?.reshape(shape)
    }

    /// Adds to the gradient of the vectors, in a fixed order of summation. `dy [T, B, width]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] when dy does not fit the ids; what the device reports.
    pub fn backward(&self, ids: &Ids, dy: &Tensor) -> Result<()> {
        let (op, table) = ("embedding.backward", self.weight.value());
        let [vocabulary, width] = [table.shape()[0], table.shape()[1]];
        table.device().expect_same(op, "ids", ids.device())?;
        table.device().expect_same(op, "dy", dy.device())?;
        expect_apart(op, "dy", dy, [&self.weight])?;
        ids.expect_below(op, "ids", vocabulary, "the vocabulary")?;
        let shape: Vec<usize> = ids.shape().iter().copied().chain([width]).collect();
        dy.expect_shape(op, "dy", &shape, "[seq, batch, width]")?;
        gather::scatter(&ids.positions()?, dy, self.weight.grad(), width, self.padding)
    }
}

impl Module for Embedding {
    fn params(&self) -> Vec<(String, &Param)> {
        vec![(self.weight.name().to_owned(), &self.weight)]
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        vec![(self.weight.name().to_owned(), &mut self.weight)]
    }
}

impl Layer for Embedding {
    fn kind(&self) -> &'static str {
        "embedding"
    }

    fn forward(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
        Ok(Output { y: self.forward(x.ids("embedding.forward")?)?, state: Vec::new() })
    }

    fn forward_train(&self, x: &Value, context: &Context<'_>) -> Result<(Output, Tape)> {
        let ids = x.ids("embedding.forward_train")?.clone();
        Ok((Layer::forward(self, x, context)?, Tape::new(ids)))
    }

    fn backward(&self, tape: Tape, dy: &Tensor, _: bool) -> Result<Option<Tensor>> {
        self.backward(&tape.open::<Ids>("embedding.backward")?, dy)?;
        Ok(None)
    }

    fn step(&self, x: &Value, _: &Context<'_>) -> Result<Output> {
        Ok(Output { y: self.forward(x.ids("embedding.step")?)?, state: Vec::new() })
    }
}
