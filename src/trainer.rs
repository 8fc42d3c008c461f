//! [`Trainer`]: a model, a loss and an optimizer at work.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Entry, Metadata};
use crate::error::{Error, Result};
use crate::kernels::choice::KernelOverride;
use crate::kernels::optimizer::CONTROL_WORDS;
use crate::loss::Loss;
use crate::nn::{Cell, EncoderDecoder, EncoderDecoderTape, Input, Module, Sequential, SequentialTape, State, Value};
use crate::optim::{LossScale, Optimizer, Rule, Stats};
use crate::rng::MaskKey;
use crate::tensor::{Ids, Lengths, Tensor};

/// What one step of training is about: inputs, what is wanted of them, and how long each row is. Each setter takes a
/// value or an `Option` of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Batch {
    /// See [`Batch::new`].
    pub input: Value,
    /// See [`Batch::new`].
    pub target: Value,
    /// See [`Batch::lengths`].
    pub lengths: Option<Lengths>,
    /// See [`Batch::state`].
    pub state: Option<State>,
    /// See [`Batch::source`].
    pub source: Option<(Ids, Option<Lengths>)>,
    /// See [`Batch::teacher`].
    pub teacher: Option<f32>,
}

impl Batch {
    /// Inputs (numbers or ids) and targets (numbers or ids), time-major.
    pub fn new(input: impl Into<Value>, target: impl Into<Value>) -> Self {
        Self { input: input.into(), target: target.into(), lengths: None, state: None, source: None, teacher: None }
    }

    /// Valid steps of each row; they reach every layer and the loss. The inputs past a row's end must be finite numbers, such
    /// as zeros.
    pub fn lengths(self, lengths: impl Into<Option<Lengths>>) -> Self {
        Self { lengths: lengths.into(), ..self }
    }

    /// The state to start from, such as an earlier step's final one. Gradients do not flow back into it.
    pub fn state(self, state: impl Into<Option<State>>) -> Self {
        Self { state: state.into(), ..self }
    }

    /// What an [`EncoderDecoder`] reads, ids `[S, B]` and their lengths; the batch's input is then what its decoder sees, and the
    /// batch's lengths are those of the targets.
    pub fn source(self, ids: &Ids, lengths: impl Into<Option<Lengths>>) -> Self {
        Self { source: Some((ids.clone(), lengths.into())), ..self }
    }

    /// Teacher forcing: the targets, which must be numbers, stand in with this probability for the outputs of the model's last
    /// layer in its recurrence, which must go through the output only. See [`Input::teacher`]. Between 0 and 1 only a step can
    /// draw: [`Trainer::evaluate`] takes 0 (the network runs free, as without a teacher) or 1.
    pub fn teacher(self, probability: impl Into<Option<f32>>) -> Self {
        Self { teacher: probability.into(), ..self }
    }

    fn beside(&self) -> Result<Input<'_, State>> {
        let input = Input::new().lengths(self.lengths.as_ref()).state(self.state.as_ref());
        match (self.teacher, &self.target) {
            (None, _) => Ok(input),
            (Some(probability), Value::Numbers(targets)) => Ok(input.teacher(targets, probability)),
            (Some(_), Value::Ids(_)) => {
                Err(Error::argument("Batch.teacher", "target", "ids", "numbers, to stand in for the model's outputs"))
            }
        }
    }
}

/// What a step or an evaluation gives: nothing of it is waited for until it is read.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The mean loss, before the step.
    pub loss: Tensor,
    /// The layers' final states; of an [`EncoderDecoder`] none.
    pub state: State,
}

impl Outcome {
    /// The loss as a number. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn item(&self) -> Result<f32> {
        self.loss.item()
    }

    /// [`Outcome::item`] for programs that may not wait, as in a browser.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn item_async(&self) -> Result<f32> {
        self.loss.item_async().await
    }
}

/// What a [`Trainer`] trains: [`Sequential`], [`EncoderDecoder`], or a model of one's own that refuses what it does not know.
pub trait Model: Module {
    /// What the forward pass leaves for the backward pass.
    type Tape;

    /// The output for a batch and the final states, without dropout.
    ///
    /// # Errors
    /// What the model refuses, and what the device reports.
    fn forward(&self, batch: &Batch) -> Result<(Tensor, State)>;

    /// The same with dropout, and a tape for [`Model::backward`].
    ///
    /// # Errors
    /// As [`Model::forward`].
    fn forward_train(&self, batch: &Batch, key: MaskKey) -> Result<(Tensor, State, Self::Tape)>;

    /// Adds to the gradients of all parameters, from that of the output.
    ///
    /// # Errors
    /// As [`Model::forward`].
    fn backward(&self, tape: Self::Tape, dy: &Tensor) -> Result<()>;
}

impl Model for Sequential {
    type Tape = SequentialTape;

    fn forward(&self, batch: &Batch) -> Result<(Tensor, State)> {
        no_source(batch)?;
        self.forward(batch.input.clone(), batch.beside()?)
    }

    fn forward_train(&self, batch: &Batch, key: MaskKey) -> Result<(Tensor, State, SequentialTape)> {
        no_source(batch)?;
        self.forward_train(batch.input.clone(), batch.beside()?.key(key))
    }

    fn backward(&self, tape: SequentialTape, dy: &Tensor) -> Result<()> {
        self.backward(tape, dy)
    }
}

fn no_source(batch: &Batch) -> Result<()> {
    match batch.source {
        None => Ok(()),
        Some(_) => Err(Error::argument("sequential.forward", "source", "given", "none: only an EncoderDecoder reads one")),
    }
}

impl<C: Cell> Model for EncoderDecoder<C> {
    type Tape = EncoderDecoderTape;

    fn forward(&self, batch: &Batch) -> Result<(Tensor, State)> {
        let (source, source_lengths, target_in) = pair("encoder_decoder.forward", batch)?;
        Ok((self.forward(source, source_lengths, target_in, batch.lengths.as_ref())?, State::new(Vec::new())))
    }

    fn forward_train(&self, batch: &Batch, key: MaskKey) -> Result<(Tensor, State, EncoderDecoderTape)> {
        let (source, source_lengths, target_in) = pair("encoder_decoder.forward_train", batch)?;
        let (y, tape) = self.forward_train(source, source_lengths, target_in, batch.lengths.as_ref(), Some(key))?;
        Ok((y, State::new(Vec::new()), tape))
    }

    fn backward(&self, tape: EncoderDecoderTape, dy: &Tensor) -> Result<()> {
        self.backward(tape, dy)
    }
}

/// What an encoder and a decoder read.
fn pair<'a>(op: &str, batch: &'a Batch) -> Result<(&'a Ids, Option<&'a Lengths>, &'a Ids)> {
    if batch.state.is_some() {
        return Err(Error::argument(op, "state", "given", "none: the encoder makes it"));
    }
    if batch.teacher.is_some() {
        return Err(Error::argument(op, "teacher", "given", "none: an encoder-decoder is always taught, by the batch's input"));
    }
    match &batch.source {
        Some((source, lengths)) => Ok((source, lengths.as_ref(), batch.input.ids(op)?)),
        None => Err(Error::argument(op, "source", "not given", "the ids that the encoder reads (Batch::source)")),
    }
}

/// Trains a model: each step is one submission to the GPU and no wait.
///
/// ```
/// # fn main() -> gatefold::Result<()> {
/// use gatefold::{Batch, Device, MeanSquaredError, Rng, Tensor, Trainer};
/// use gatefold::{nn::{LinearConfig, LstmConfig, Sequential}, optim::AdamW};
/// let (device, mut rng) = (Device::cpu(), Rng::seed(0));
/// let model = Sequential::new()
///     .push(LstmConfig::new(1, 8).init(&device, &mut rng)?)
///     .push(LinearConfig::new(8, 1).init(&device, &mut rng)?);
/// let mut trainer = Trainer::new(model, MeanSquaredError, AdamW::new(1e-2))?.clip_grad_norm(1.0);
/// let x = Tensor::from_slice(&device, &[0.1, 0.2, 0.3], [3, 1, 1])?;
/// let target = Tensor::from_slice(&device, &[0.2, 0.3, 0.4], [3, 1, 1])?;
/// let outcome = trainer.step(&Batch::new(x, target))?; // submitted, not waited for
/// println!("{}", outcome.item()?);
/// # Ok(()) }
/// ```
pub struct Trainer<L, M = Sequential> {
    model: M,
    loss: L,
    optimizer: Optimizer,
    progress: Progress,
}

/// What a checkpoint holds beside tensors.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Progress {
    /// Of the random masks.
    seed: u64,
    /// Steps taken, skipped ones included: the masks' counter.
    step: u64,
}

/// The texts that [`Trainer::save`] writes for itself.
const PROGRESS: &str = "gatefold.trainer";
const RULE: &str = "gatefold.optimizer";
const KERNELS: &str = "gatefold.kernels";
const CONTROL: &str = "optimizer.control";

impl<L: Loss, M: Model> Trainer<L, M> {
    /// Moves the model's parameters into the optimizer's arena.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn new(mut model: M, loss: L, rule: impl Into<Rule>) -> Result<Self> {
        let optimizer = Optimizer::new(rule, model.params_mut())?;
        Ok(Self { model, loss, optimizer, progress: Progress { seed: 0, step: 0 } })
    }

    /// Scale each gradient down to this global norm where it is larger.
    pub fn clip_grad_norm(self, max_norm: f64) -> Self {
        Self { optimizer: self.optimizer.clip_grad_norm(max_norm), ..self }
    }

    /// Keep each element of each gradient within `[-limit, limit]`: see [`Optimizer::clip_grad_value`].
    pub fn clip_grad_value(self, limit: f64) -> Self {
        Self { optimizer: self.optimizer.clip_grad_value(limit), ..self }
    }

    /// Scale the loss while it goes backward, for layers of [`Precision::Half`](crate::nn::Precision::Half): see [`LossScale`]. Losses
    /// are given back as they are.
    ///
    /// ```
    /// # fn main() -> gatefold::Result<()> {
    /// use gatefold::{Device, MeanSquaredError, Rng, Trainer};
    /// use gatefold::{nn::{LstmConfig, Precision, Sequential}, optim::{AdamW, LossScale}};
    /// let lstm = LstmConfig::new(1, 8).precision(Precision::Half).init(&Device::cpu(), &mut Rng::seed(0))?;
    /// let trainer = Trainer::new(Sequential::new().push(lstm), MeanSquaredError, AdamW::new(1e-2))?
    ///     .loss_scaling(LossScale::dynamic());
    /// assert_eq!(trainer.stats()?.loss_scale, 65536.0);
    /// # Ok(()) }
    /// ```
    pub fn loss_scaling(self, loss_scale: LossScale) -> Self {
        Self { optimizer: self.optimizer.loss_scaling(loss_scale), ..self }
    }

    /// The seed of random masks; 0 at first.
    pub fn seed(self, seed: u64) -> Self {
        Self { progress: Progress { seed, ..self.progress }, ..self }
    }

    /// Forward, loss, backward, clip and update: submitted as one, not waited for. At most two steps are under way; a
    /// third waits for the first.
    ///
    /// # Errors
    /// What a layer or the loss refuses: nothing has changed then, but that all gradients are zero. What the device reports,
    /// also of earlier steps.
    pub fn step(&mut self, batch: &Batch) -> Result<Outcome> {
        let outcome = match self.record(batch) {
            Ok(outcome) => outcome,
            Err(error) => {
                // A backward pass may have begun: its gradients are of no use to the next step. The first error counts.
                let _ = self.model.zero_grad();
                return Err(error);
            }
        };
        self.optimizer.device().submit()?;
        Ok(outcome)
    }

    fn record(&mut self, batch: &Batch) -> Result<Outcome> {
        let key = MaskKey::new(self.progress.seed, self.progress.step);
        let (y, state, tape) = self.model.forward_train(batch, key)?;
        let (loss, dy) = self.loss.loss_and_gradient(&y, &batch.target, batch.lengths.as_ref())?;
        self.model.backward(tape, &self.optimizer.scale_loss(&dy)?)?;
        self.optimizer.step()?;
        self.progress.step += 1;
        Ok(Outcome { loss, state })
    }

    /// The loss on a batch, without dropout and without a step.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn evaluate(&self, batch: &Batch) -> Result<Outcome> {
        let (y, state) = self.model.forward(batch)?;
        let loss = self.loss.loss(&y, &batch.target, batch.lengths.as_ref())?;
        Ok(Outcome { loss, state })
    }

    /// The model, to predict with or to save by itself.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model; the trainer's arena stays behind it.
    pub fn into_model(self) -> M {
        self.model
    }

    /// For schedules: the rate of the next step.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        self.optimizer.set_learning_rate(learning_rate);
    }

    /// Steps taken, skipped ones included.
    pub fn steps(&self) -> u64 {
        self.progress.step
    }

    /// What the optimizer has done: steps applied, skipped, clipped, the last gradient's norm. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn stats(&self) -> Result<Stats> {
        self.optimizer.stats()
    }

    /// Writes everything that a resumed run needs: weights, moments, counters, the masks' seed. Given the same batches
    /// and settings, the resumed run continues to the same bits on the same device (on the CPU: with as many threads).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`]; what the device reports.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path, &Metadata::new())
    }

    /// The same with texts of the caller's beside it: a vocabulary, a normaliser.
    ///
    /// # Errors
    /// As [`Trainer::save`]; [`crate::ErrorKind::Argument`] for a key that begins with `gatefold.`: those are the trainer's own.
    pub fn save_with(&self, path: impl AsRef<Path>, metadata: &Metadata) -> Result<()> {
        if let Some(key) = metadata.keys().find(|key| key.starts_with("gatefold.")) {
            let expected = "a name that does not begin with gatefold.";
            return Err(Error::argument("Trainer.save", "a metadata key", format!("{key:?}"), expected));
        }
        let mut entries = Vec::new();
        for (name, param) in self.model.params() {
            entries.push(Entry::of_tensor(name, param.value())?);
        }
        for (name, moment) in self.optimizer.moments() {
            entries.push(Entry::of_tensor(name, &moment)?);
        }
        entries.push(Entry::of_words(CONTROL, &self.optimizer.control_words()?));
        let mut metadata = metadata.clone();
        metadata.insert(PROGRESS.into(), serde_json::json!(self.progress).to_string());
        metadata.insert(RULE.into(), self.optimizer.rule().name().into());
        let kernels = self.optimizer.device().kernel_override();
        if kernels != KernelOverride::default() {
            metadata.insert(KERNELS.into(), kernels.to_string());
        }
        checkpoint::write("Trainer.save", path.as_ref(), &entries, &metadata)
    }

    /// Continues where [`Trainer::save`] stopped; gives the caller's texts. The model and the optimizer must be of the
    /// same kind and shape. On an error nothing has changed.
    ///
    /// Other kernels give other bits, so a GPU must have the [override](crate::Device::override_kernels) that the file was written
    /// under, or none where that had none; who means to change it does so after loading. The native CPU, which has nothing to choose,
    /// takes any file.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Format`] with every missing, unexpected and misshapen tensor, and for
    /// another override of kernels.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<Metadata> {
        let (op, path) = ("Trainer.load", path.as_ref());
        let mut file = checkpoint::read(op, path)?;
        let wrong = |what: String| Error::format(op, format!("{}: {what}", path.display()));
        let text = file.metadata.remove(PROGRESS).ok_or_else(|| wrong(format!("{PROGRESS} is missing: not a trainer's file")))?;
        let progress: Progress =
            serde_json::from_str(&text).map_err(|error| wrong(format!("{PROGRESS} is {text}: {error}")).with_source(error))?;
        let (rule, expected) = (file.metadata.remove(RULE).unwrap_or_default(), self.optimizer.rule().name());
        if rule != expected {
            return Err(wrong(format!("the optimizer is {rule:?}, expected {expected:?}")));
        }
        let device = self.optimizer.device();
        let none = KernelOverride::default().to_string();
        let (given, expected) = (file.metadata.remove(KERNELS).unwrap_or(none), device.kernel_override().to_string());
        if !device.is_cpu() && given != expected {
            let what = format!("the override of kernels is {given:?}, expected that of the device: {expected:?}");
            return Err(wrong(what));
        }
        let control = file.entries.remove(CONTROL).ok_or_else(|| wrong(format!("{CONTROL} is missing")))?;
        if (control.dtype, &control.shape[..]) != (Dtype::U32, &[CONTROL_WORDS]) {
            let given = format!("{CONTROL} is {:?} {:?}", control.dtype, control.shape);
            return Err(wrong(format!("{given}, expected U32 [{CONTROL_WORDS}]")));
        }
        let metadata = file.metadata.clone();
        let (params, moments) = (self.model.params(), self.optimizer.moments());
        let shapes = params.iter().map(|(name, param)| (name.clone(), param.value().shape().to_vec()));
        let wanted: Vec<_> = shapes.chain(moments.iter().map(|(name, moment)| (name.clone(), moment.shape().to_vec()))).collect();
        let values = file.take(op, path, &wanted)?;
        self.optimizer.set_control_words(&checkpoint::words(&control))?;
        let (weights, rest) = values.split_at(params.len());
        for ((_, param), values) in params.iter().zip(weights) {
            param.set(values)?;
        }
        for ((_, moment), values) in moments.iter().zip(rest) {
            moment.write(values)?;
        }
        self.progress = progress;
        Ok(metadata)
    }
}

impl<L, M: std::fmt::Debug> std::fmt::Debug for Trainer<L, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer").field("model", &self.model).field("step", &self.progress.step).finish_non_exhaustive()
    }
}
