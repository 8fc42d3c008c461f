//! The character model of the example `chars`, for a page: trained on WebGPU, or on the CPU where the browser has none.
//!
//! `examples/web/build.sh` builds it together with the page. A page may not wait, so whatever reads from the device is async.

#[path = "../../common/characters.rs"]
mod characters;

use std::f32::consts::LN_2;

use gatefold::data::{TokenStreams, Vocabulary};
use gatefold::nn::{Precision, State};
use gatefold::optim::AdamW;
use gatefold::{CrossEntropy, Device, Ids, Rng, Tensor, Trainer};
use wasm_bindgen::prelude::*;

use characters::{LEARNING_RATE, ROWS, WINDOW, batch, build, draw};

/// The text that the page begins with.
#[wasm_bindgen]
pub fn default_text() -> String {
    characters::SOURCES.concat()
}

/// A model in training.
#[wasm_bindgen]
pub struct Demo {
    device: Device,
    vocabulary: Vocabulary,
    text: Vec<u32>,
    trainer: Trainer<CrossEntropy>,
    /// The window that comes next, and what the layers remember of those before.
    window: usize,
    state: Option<State>,
    rng: Rng,
}

#[wasm_bindgen]
impl Demo {
    /// A new LSTM of `hidden` units for `text`. `device`: a name for `Device::by_name_async`, or nothing for the best.
    ///
    /// # Errors
    /// A device that is not there; a text of less than 16 x 64 characters.
    pub async fn open(text: String, hidden: usize, device: String) -> Result<Demo, JsError> {
        console_error_panic_hook::set_once();
        let device = match device.as_str() {
            "" => Device::new_async().await?,
            name => Device::by_name_async(name).await?,
        };
        let vocabulary = Vocabulary::chars(&text);
        let text = vocabulary.encode(&text);
        TokenStreams::new(&text, ROWS, WINDOW)?;
        let mut rng = Rng::seed(0);
        let model = build(&vocabulary, hidden, Precision::Single, &device, &mut rng)?;
        let trainer = Trainer::new(model, CrossEntropy::new(), AdamW::new(LEARNING_RATE))?.clip_grad_norm(1.0);
        Ok(Self { device, vocabulary, text, trainer, window: 0, state: None, rng })
    }

    /// What it runs on, in words.
    pub fn device(&self) -> String {
        self.device.info().to_string()
    }

    /// Characters that a step of training reads.
    pub fn characters_per_step(&self) -> usize {
        ROWS * WINDOW
    }

    /// Trains for some steps; the mean of their losses, in bits per character. One readback: the steps before it queue up on the GPU.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn train(&mut self, steps: usize) -> Result<f32, JsError> {
        let mut total: Option<Tensor> = None;
        let streams = TokenStreams::new(&self.text, ROWS, WINDOW)?;
        let mut windows = streams.windows().skip(self.window);
        for _ in 0..steps {
            let window = match windows.next() {
                Some(window) => window,
                None => {
                    // The text begins again: with it the memory of what came before.
                    (self.window, self.state) = (0, None);
                    windows = streams.windows().skip(self.window);
                    windows.next().ok_or_else(|| JsError::new("a text of no windows"))?
                }
            };
            self.window += 1;
            let outcome = self.trainer.step(&batch(&self.device, &window)?.state(self.state.take()))?;
            self.state = Some(outcome.state);
            total = Some(match total {
                Some(total) => total.add(&outcome.loss)?,
                None => outcome.loss,
            });
        }
        let total = total.ok_or_else(|| JsError::new("train: steps is 0, expected at least 1"))?;
        Ok(total.item_async().await? / LN_2 / steps as f32)
    }

    /// Text that the model writes after `prompt`, character by character.
    ///
    /// # Errors
    /// An empty prompt, and what the device reports.
    pub async fn write(&mut self, prompt: String, length: usize, temperature: f32) -> Result<String, JsError> {
        let (mut ids, mut state, mut text) = (self.vocabulary.encode(&prompt), None, prompt);
        for _ in 0..length {
            let ids_now = Ids::from_slice(&self.device, &ids, [ids.len(), 1])?;
            let (logits, next) = self.trainer.model().forward(ids_now, state.as_ref())?;
            let logits = logits.to_vec_async().await?;
            ids = vec![draw(&logits[(ids.len() - 1) * self.vocabulary.len()..], temperature, &mut self.rng)];
            state = Some(next);
            text += &self.vocabulary.decode(&ids)?;
        }
        Ok(text)
    }
}
