//! [`EncoderDecoder`]: sequences to sequences.

use super::{
    Cell, Context, Direction, Embedding, EmbeddingConfig, Input, Layer, Linear, LinearConfig, Module, Param, Recurrent,
    RecurrentConfig, RecurrentTape, Tape, Value,
};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::cell_gru::GruCell;
use crate::kernels::cell_lstm::LstmCell;
use crate::kernels::gather;
use crate::kernels::sample::{self, Choice, ENDED, Marks, NOT_A_NUMBER};
use crate::rng::{MaskKey, Rng};
use crate::tensor::{Ids, Lengths, Tensor};

/// Sizes and options of an [`EncoderDecoder`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EncoderDecoderConfig<C> {
    source: usize,
    target: usize,
    rnn: RecurrentConfig<C>,
    reverse_source: bool,
}

impl<C: Cell> EncoderDecoderConfig<C> {
    /// From `source` to `target` different ids, by two recurrent layers like `rnn` (one of [`super::LstmConfig`],
    /// [`super::GruConfig`], ..), whose input is the width of both embeddings.
    pub fn new(source: usize, target: usize, rnn: RecurrentConfig<C>) -> Self {
        Self { source, target, rnn, reverse_source: false }
    }

    /// Whether the encoder reads each source from its end to its start, after which Sutskever et al. found their networks to
    /// learn more: the first words of both languages then stand close together.
    pub fn reverse_source(self, reverse: bool) -> Self {
        Self { reverse_source: reverse, ..self }
    }

    /// The network; each part is drawn as it is by itself.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] for a vocabulary of 0, and what [`RecurrentConfig::init`] refuses; [`ErrorKind::Unsupported`] where
    /// time is not read forward (the states of a bidirectional encoder do not fit a decoder) or the batch comes first; what
    /// the device reports.
    pub fn init(self, device: &Device, rng: &mut Rng) -> Result<EncoderDecoder<C>> {
        let op = "encoder_decoder.init";
        let Self { source, target, rnn, reverse_source } = self;
        for (name, size) in [("source", source), ("target", target)] {
            if size == 0 {
                return Err(Error::argument(op, &format!("the {name} vocabulary"), size, "at least 1"));
            }
        }
        if rnn.direction != Direction::Forward {
            let what =
                "a decoder needs Direction::Forward, and an encoder with states like its own (reverse_source turns the encoder)";
            return Err(Error::unsupported(op, what));
        }
        if rnn.batch_first {
            return Err(Error::unsupported(op, "batch_first(true) has no place here: ids are time-major, [seq, batch]"));
        }
        let width = rnn.input;
        let direction = if reverse_source { Direction::Reverse } else { Direction::Forward };
        let mut half = |vocabulary: usize, direction: Direction, encodes: bool| -> Result<Half<C>> {
            // A decoder is always given its state.
            let learns = rnn.learn_initial_state && encodes;
            let rnn = rnn.clone().direction(direction).learn_initial_state(learns).init(device, rng)?;
            Ok(Half { embedding: EmbeddingConfig::new(vocabulary, width).init(device, rng)?, rnn })
        };
        let (encoder, decoder) = (half(source, direction, true)?, half(target, Direction::Forward, false)?);
        let linear = LinearConfig::new(decoder.rnn.output(), target).init(device, rng)?;
        Ok(EncoderDecoder { encoder, decoder, linear })
    }
}

/// A recurrent encoder whose final state starts a recurrent decoder (Sutskever, Vinyals, Le, "Sequence to Sequence Learning
/// with Neural Networks", NeurIPS 2014; Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014).
///
/// `state = encoder(embedding(source))`, `logits = linear(decoder(embedding(target_in), state))`: target_in is the target
/// behind a start id and without its last id, so that step t sees the ids before t and tells the t-th. [`super::Module`] names
/// the parameters `encoder.embedding.weight`, `encoder.rnn.weight_ih_l0`, `decoder.embedding.weight`, `decoder.rnn.weight_ih_l0`,
/// `decoder.linear.weight` and so on. A [`crate::Trainer`] takes it with [`crate::Batch::source`].
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::{Device, Ids, Rng, nn::{Choice, Decoding, EncoderDecoderConfig, GruConfig}};
/// let device = Device::cpu();
/// let model = EncoderDecoderConfig::new(30, 9, GruConfig::new(4, 16)).init(&device, &mut Rng::seed(0))?;
/// let source = Ids::from_slice(&device, &[3, 14, 15, 9, 2, 6], [3, 2])?; // seq, batch
/// let target_in = Ids::from_slice(&device, &[1, 1, 5, 7], [2, 2])?; // 1 starts each row
/// assert_eq!(model.forward(&source, None, &target_in, None)?.shape(), [2, 2, 9]);
///
/// let decoded = model.decode(&source, None, Decoding { start: 1, end: Some(2), pad: 0, max_steps: 12, choice: Choice::Greedy })?;
/// let rows: Vec<Vec<u32>> = decoded.rows()?; // nothing is waited for before this
/// assert_eq!(rows.len(), 2);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct EncoderDecoder<C: Cell> {
    encoder: Half<C>,
    decoder: Half<C>,
    linear: Linear,
}

/// An [`EncoderDecoder`] of LSTMs.
pub type LstmEncoderDecoder = EncoderDecoder<LstmCell>;
/// An [`EncoderDecoder`] of GRUs.
pub type GruEncoderDecoder = EncoderDecoder<GruCell>;

/// What reads the source, or the target.
#[derive(Debug)]
struct Half<C: Cell> {
    embedding: Embedding,
    rnn: Recurrent<C>,
}

/// What [`EncoderDecoder::forward_train`] keeps for [`EncoderDecoder::backward`].
#[derive(Debug)]
pub struct EncoderDecoderTape {
    encoder: HalfTape,
    decoder: HalfTape,
    linear: Tape,
}

#[derive(Debug)]
struct HalfTape {
    ids: Ids,
    rnn: RecurrentTape,
}

/// How [`EncoderDecoder::decode`] writes.
#[derive(Clone, Copy, Debug)]
pub struct Decoding {
    /// What every row begins with; no part of what is decoded.
    pub start: u32,
    /// What ends a row; `None`: all rows have `max_steps` ids.
    pub end: Option<u32>,
    /// What stands behind a row's end; it need not be in the vocabulary.
    pub pad: u32,
    /// The most ids that a row may have, its end counted.
    pub max_steps: usize,
    /// How each id is chosen.
    pub choice: Choice,
}

impl Decoding {
    fn check(&self, op: &str, vocabulary: usize) -> Result<()> {
        for (name, id) in [("start", Some(self.start)), ("end", self.end)] {
            if let Some(id) = id.filter(|id| *id as usize >= vocabulary) {
                return Err(Error::argument(op, name, id, format!("an id below {vocabulary} (the target vocabulary)")));
            }
        }
        if self.max_steps == 0 {
            return Err(Error::argument(op, "max_steps", 0, "at least 1"));
        }
        self.choice.check(op)
    }
}

/// What [`EncoderDecoder::decode`] has written, on its device; reading it waits.
#[derive(Debug)]
pub struct Decoded(sample::Decoded);

impl Decoded {
    /// `[max_steps, batch]`.
    pub fn shape(&self) -> [usize; 2] {
        let rows = self.0.last.len();
        [self.0.ids.len() / rows, rows]
    }

    /// All ids `[max_steps, batch]`, time-major, with each row's end, and padding behind it.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] where a logit was NaN: the model's weights are not finite; what the device reports.
    pub fn to_vec(&self) -> Result<Vec<u32>> {
        self.stopped()?;
        self.0.ids.read_back()
    }

    /// How many ids each row has, its end counted.
    ///
    /// # Errors
    /// As [`Decoded::to_vec`].
    pub fn lengths(&self) -> Result<Vec<u32>> {
        self.stopped()?;
        self.0.lengths.read_back()
    }

    /// The ids of each row, up to its end and without it.
    ///
    /// # Errors
    /// As [`Decoded::to_vec`].
    pub fn rows(&self) -> Result<Vec<Vec<u32>>> {
        let stopped = self.stopped()?;
        let (ids, lengths): (Vec<u32>, Vec<u32>) = (self.0.ids.read_back()?, self.0.lengths.read_back()?);
        let count = stopped.len();
        let row = |row: usize| {
            let length = lengths[row] as usize - usize::from(stopped[row] == ENDED);
            (0..length).map(|step| ids[step * count + row]).collect()
        };
        Ok((0..count).map(row).collect())
    }

    /// Why each row stopped, if it did.
    fn stopped(&self) -> Result<Vec<u32>> {
        let stopped: Vec<u32> = self.0.stopped.read_back()?;
        match stopped.iter().position(|state| *state == NOT_A_NUMBER) {
            None => Ok(stopped),
            Some(row) => {
                let step = self.0.lengths.read_back::<u32>()?[row];
                let what = format!("encoder_decoder.decode: a logit of row {row} is NaN at step {step}: are all weights finite?");
                Err(Error::new(ErrorKind::Argument, what))
            }
        }
    }
}

impl<C: Cell> Half<C> {
    /// The sizes `[seq, batch]` of ids that fit, with their lengths.
    fn check(&self, op: &str, argument: &str, ids: &Ids, lengths: Option<&Lengths>) -> Result<[usize; 2]> {
        let table = self.embedding.table();
        table.device().expect_same(op, argument, ids.device())?;
        let &[steps, rows] = ids.shape() else {
            return Err(Error::shape(op, argument, ids.shape(), "[seq, batch]"));
        };
        ids.expect_below(op, argument, table.shape()[0], "its vocabulary")?;
        if let Some(lengths) = lengths {
            lengths.check(&format!("{op}: {argument}"), table.device(), steps, rows)?;
        }
        Ok([steps, rows])
    }

    fn forward_train(&self, ids: &Ids, input: Input<'_, C::Value>) -> Result<(Tensor, C::Value, HalfTape)> {
        let (y, state, rnn) = self.rnn.forward_train(&self.embedding.forward(ids)?, input)?;
        Ok((y, state, HalfTape { ids: ids.clone(), rnn }))
    }

    /// The gradient of the initial state.
    fn backward(&self, HalfTape { ids, rnn }: HalfTape, dy: &Tensor, dstate: Option<&C::Value>) -> Result<C::Value> {
        let (dx, dstate) = self.rnn.backward(rnn, dy, dstate)?;
        self.embedding.backward(&ids, &dx)?;
        Ok(dstate)
    }
}

impl<C: Cell> EncoderDecoder<C> {
    /// The logits `[T, B, V]` of the ids that follow each id of `target_in [T, B]`, given `source [S, B]`; without dropout. Past
    /// a target's end the logits are the linear layer's bias.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] for ids outside their vocabularies, and for shapes and lengths that do not fit each other;
    /// [`ErrorKind::DeviceMismatch`]; what the device reports.
    pub fn forward(
        &self,
        source: &Ids,
        source_lengths: Option<&Lengths>,
        target_in: &Ids,
        target_lengths: Option<&Lengths>,
    ) -> Result<Tensor> {
        self.check("encoder_decoder.forward", source, source_lengths, target_in, target_lengths)?;
        let state = self.encode(source, source_lengths)?;
        let x = self.decoder.embedding.forward(target_in)?;
        let (y, _) = self.decoder.rnn.forward(&x, Input::new().lengths(target_lengths).state(&state))?;
        self.linear.forward(&y)
    }

    /// The same with dropout, and a tape for [`EncoderDecoder::backward`].
    ///
    /// # Errors
    /// As [`EncoderDecoder::forward`]; [`ErrorKind::Argument`] where dropout has no key.
    pub fn forward_train(
        &self,
        source: &Ids,
        source_lengths: Option<&Lengths>,
        target_in: &Ids,
        target_lengths: Option<&Lengths>,
        key: Option<MaskKey>,
    ) -> Result<(Tensor, EncoderDecoderTape)> {
        self.check("encoder_decoder.forward_train", source, source_lengths, target_in, target_lengths)?;
        let key = |half: usize| key.map(|key| key.layer(half));
        let (_, state, encoder) = self.encoder.forward_train(source, Input::new().lengths(source_lengths).key(key(0)))?;
        let input = Input::new().lengths(target_lengths).state(&state).key(key(1));
        let (y, _, decoder) = self.decoder.forward_train(target_in, input)?;
        let (logits, linear) = Layer::forward_train(&self.linear, &Value::Numbers(y), &Context::default())?;
        Ok((logits.y, EncoderDecoderTape { encoder, decoder, linear }))
    }

    /// Adds to the gradients of all parameters, from that of the logits `[T, B, V]`: through the decoder's initial state they reach
    /// the encoder.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] or [`ErrorKind::DeviceMismatch`] for a gradient that does not fit, or when a parameter changed since
    /// the tape was recorded; what the device reports.
    pub fn backward(&self, tape: EncoderDecoderTape, dlogits: &Tensor) -> Result<()> {
        let EncoderDecoderTape { encoder, decoder, linear } = tape;
        let Some(dy) = Layer::backward(&self.linear, linear, dlogits, true)? else { unreachable!("dx was asked for") };
        let dstate = self.decoder.backward(decoder, &dy, None)?;
        // Of the encoder nothing but its final state is seen.
        let [steps, rows] = [encoder.ids.shape()[0], encoder.ids.shape()[1]];
        let nothing = Tensor::zeros(dy.device(), [steps, rows, self.encoder.rnn.output()])?;
        self.encoder.backward(encoder, &nothing, Some(&dstate))?;
        Ok(())
    }

    /// The state that the decoder starts from.
    ///
    /// # Errors
    /// As [`EncoderDecoder::forward`].
    pub fn encode(&self, source: &Ids, lengths: Option<&Lengths>) -> Result<C::Value> {
        self.encoder.check("encoder_decoder.encode", "source", source, lengths)?;
        let (_, state) = self.encoder.rnn.forward(&self.encoder.embedding.forward(source)?, Input::new().lengths(lengths))?;
        Ok(state)
    }

    /// One step of the decoder, for searches of one's own: from the last ids `[B]` and the state so far to the logits `[B, V]` of the
    /// next ids, and the next state.
    ///
    /// # Errors
    /// As [`EncoderDecoder::forward`].
    pub fn step(&self, last: &Ids, state: &C::Value) -> Result<(Tensor, C::Value)> {
        let (op, table) = ("encoder_decoder.step", self.decoder.embedding.table());
        table.device().expect_same(op, "last", last.device())?;
        if last.shape().len() != 1 {
            return Err(Error::shape(op, "last", last.shape(), "[batch]"));
        }
        last.expect_below(op, "last", table.shape()[0], "its vocabulary")?;
        self.step_from(last.tensor(), state)
    }

    /// The same for ids that only the device knows.
    fn step_from(&self, last: &Tensor, state: &C::Value) -> Result<(Tensor, C::Value)> {
        let table = self.decoder.embedding.table();
        let x = gather::gather(last, table, table.shape()[1])?;
        let (y, state) = self.decoder.rnn.step(&x, state)?;
        Ok((self.linear.forward(&y)?, state))
    }

    /// Writes a target for each source, id by id: each step sees the id that the step before chose. A row that has ended goes on
    /// with padding. The whole loop queues up on the device: nothing is read back, and nothing waited for.
    ///
    /// # Errors
    /// As [`EncoderDecoder::forward`]; [`ErrorKind::Argument`] for a start or an end outside the target vocabulary, no steps, and a
    /// choice out of its range.
    pub fn decode(&self, source: &Ids, lengths: Option<&Lengths>, decoding: Decoding) -> Result<Decoded> {
        let (op, table) = ("encoder_decoder.decode", self.decoder.embedding.table());
        let [_, rows] = self.encoder.check(op, "source", source, lengths)?;
        decoding.check(op, table.shape()[0])?;
        let Decoding { start, end, pad, max_steps, choice } = decoding;
        let to = sample::Decoded::new(table.device(), max_steps, &vec![start; rows])?;
        let mut state = self.encode(source, lengths)?;
        for step in 0..max_steps {
            let (logits, next) = self.step_from(&to.last, &state)?;
            sample::sample(&logits, &to, step, Marks { pad, end }, &choice)?;
            state = next;
        }
        Ok(Decoded(to))
    }

    fn check(
        &self,
        op: &str,
        source: &Ids,
        source_lengths: Option<&Lengths>,
        target_in: &Ids,
        target_lengths: Option<&Lengths>,
    ) -> Result<()> {
        let [_, rows] = self.encoder.check(op, "source", source, source_lengths)?;
        let [steps, columns] = self.decoder.check(op, "target_in", target_in, target_lengths)?;
        match rows == columns {
            true => Ok(()),
            false => Err(Error::shape(op, "target_in", &[steps, columns], format!("[seq, batch of the source] = [_, {rows}]"))),
        }
    }
}

impl<C: Cell> Module for EncoderDecoder<C> {
    fn params(&self) -> Vec<(String, &Param)> {
        let Self { encoder, decoder, linear } = self;
        let parts: [(&str, &dyn Module); 5] = [
            ("encoder.embedding", &encoder.embedding),
            ("encoder.rnn", &encoder.rnn),
            ("decoder.embedding", &decoder.embedding),
            ("decoder.rnn", &decoder.rnn),
            ("decoder.linear", linear),
        ];
        let mut params = Vec::new();
        for (place, part) in parts {
            params.extend(part.params().into_iter().map(|(name, param)| (format!("{place}.{name}"), param)));
        }
        params
    }

    fn params_mut(&mut self) -> Vec<(String, &mut Param)> {
        let Self { encoder, decoder, linear } = self;
        let parts: [(&str, &mut dyn Module); 5] = [
            ("encoder.embedding", &mut encoder.embedding),
            ("encoder.rnn", &mut encoder.rnn),
            ("decoder.embedding", &mut decoder.embedding),
            ("decoder.rnn", &mut decoder.rnn),
            ("decoder.linear", linear),
        ];
        let mut params = Vec::new();
        for (place, part) in parts {
            params.extend(part.params_mut().into_iter().map(|(name, param)| (format!("{place}.{name}"), param)));
        }
        params
    }
}
