//! From text and tables to plain host arrays in the layouts that the layers take; nothing here touches a device.
//!
//! - [`Vocabulary`]: text to token ids and back.
//! - [`pad`]: sequences of different lengths to one padded batch with lengths.
//! - [`TokenStreams`]: one long text to consecutive windows, for language models trained by truncated backpropagation
//!   through time.
//! - [`Series`], [`Normalizer`], [`Windows`]: a table of measurements to normalised sliding windows.
//! - [`shuffled_batches`]: the order of one epoch.
//!
//! Arrays are time-major: element `[t, b]` of a `[steps, rows]` array lies at `t * rows + b`.

mod batches;
mod padding;
mod series;
mod vocabulary;

pub use batches::shuffled_batches;
pub use padding::{Padded, TokenStreams, TokenWindow, pad};
pub use series::{Normalizer, Series, WindowBatch, WindowSpec, Windows};
pub use vocabulary::{PAD, UNK, Vocabulary};
