//! Recurrent neural networks on any GPU, from plain Rust.
#![deny(missing_docs)]

mod backend;
pub mod checkpoint;
pub mod data;
mod device;
mod error;
mod kernels;
mod loss;
pub mod nn;
pub mod optim;
mod rng;
mod tensor;
mod trainer;
#[cfg(feature = "verify")]
pub mod verify;

pub use device::{Device, DeviceInfo};
pub use error::{Error, ErrorKind, Result};
pub use loss::{CrossEntropy, Loss, MeanSquaredError};
pub use rng::{MaskKey, Rng};
pub use tensor::{Ids, Lengths, Shape, Tensor};
pub use trainer::{Batch, Outcome, Trainer};
