//! Recurrent neural networks, trained and run on any GPU that [wgpu](https://wgpu.rs) reaches, from plain Rust.
//!
//! Kernels are WGSL compute shaders; each has a twin in Rust, which is both the native CPU device and what the GPU is
//! checked against. Start with [`Device`], [`Tensor`], [`nn::Lstm`] and [`Trainer`].
//!
//! ```
//! # fn main() -> gatefold::Result<()> {
//! use gatefold::{Device, Rng, Tensor, nn::{Input, LstmConfig}};
//!
//! let device = Device::new()?; // the best hardware GPU, else the native CPU
//! let mut rng = Rng::seed(0);
//! let lstm = LstmConfig::new(3, 16).layers(2).init(&device, &mut rng)?;
//!
//! let x = Tensor::from_slice(&device, &[0.5; 7 * 2 * 3], [7, 2, 3])?; // seq, batch, input
//! let (y, state) = lstm.forward(&x, None)?; // y [7, 2, 16]; state.h, state.c [2, 2, 16]
//! let x_t = Tensor::from_slice(&device, &[0.5; 2 * 3], [2, 3])?;
//! let (y_t, state) = lstm.step(&x_t, &state)?; // one step further
//!
//! let (y, _, tape) = lstm.forward_train(&x, Input::new().state(&state))?;
//! let (dx, dstate) = lstm.backward(tape, &y, None)?; // the gradient of sum(y * y) / 2
//! assert_eq!(dx.shape(), x.shape());
//! # let _ = (y_t, dstate);
//! # Ok(()) }
//! ```
//!
//! # Conventions
//!
//! Tensors are row-major and time-major: x is `[seq, batch, features]`; [`nn::RecurrentConfig::batch_first`] exchanges
//! the two at the edge. Gate order, parameter names and initial weights are PyTorch's, so that a saved `state_dict`
//! loads as it is ([`nn::Module::load`]). A state is a value: passed in, returned, cloned, saved, never hidden in a
//! layer; [`nn::Stream`] keeps those of many sequences that go on at their own pace. [`Lengths`] make a batch ragged: past
//! its end a row keeps its state and outputs zeros, and the reverse direction starts at each row's own end. Random masks
//! are functions of a [`MaskKey`] and a place, the same on every device. Whatever does not fit is an [`Error`] that names
//! the operation, the argument, what was expected and what was given.
//!
//! # Architecture
//!
//! Imports run one way, from the bottom of this list to its top:
//!
//! - `error`, `rng`: the error type; Philox, a generator that counts.
//! - `backend`: the only place that knows wgpu. `adapter` finds and opens adapters; `gpu` holds the buffer pool, the
//!   pipelines, and the recorder: launches, copies and uploads queue up in order and are encoded into one submission
//!   when something is read back, on [`Device::submit`], or at the end of a trainer's step. `native` is memory of the CPU;
//!   `wait` is how calls that are not async wait for wgpu's futures.
//! - [`Device`], [`Tensor`]: a GPU or the native CPU as one type; shapes over its memory.
//! - `kernels`: one file a family (`gemm`, `gather`, `cross_entropy`, ..): its contract, its uniform struct, its launch,
//!   its CPU twin. `shaders/` has a file of the same name. `choice` has the tables that say which one runs on
//!   which class of GPU, and what goes before them ([`KernelOverride`]).
//!   `half` has the factors of products in either precision, and `gemm_half` the product of two. `gemm::ProductKernel` lists the ways to
//!   form a product on a GPU; those in tiles are the shaders `gemm_tiled`, and `gemm_cooperative` on matrix units.
//! - `arithmetic`: [`Tensor::add`] and its like, on top of the kernels.
//! - [`nn`]: layers, each with `forward`, `forward_train`, `backward`. [`nn::Recurrent`] is the core of every recurrent
//!   layer: the input product of all steps at once, a sweep over time, and after the backward sweep the gradients of all
//!   weights at once.
//! - [`onnx`]: recurrent operators of ONNX as those layers.
//! - [`Loss`], [`optim`], [`data`], [`checkpoint`], [`Trainer`].
//! - `verify` (feature `verify`): f64 oracle and case tables, one body for the tests and the `gatefold verify` command.
//!
//! ## Cells and sweeps
//!
//! A cell is pointwise: from the input part, the recurrent part and the previous state of a unit it makes the new state,
//! and back (`shaders/cell_lstm.wgsl`). A sweep walks over time, does the recurrent product, and knows no cell
//! (`shaders/sweep_step.wgsl`; what all of them do around the cell is `sweep_unit.wgsl`). They meet in
//! `shaders/cell_contract.wgsl` and are joined as text, so that N cells and M sweeps are N + M files. In Rust the same two halves are
//! the traits of `kernels::cell_contract` and the generic functions of the sweeps. A cell is a value: its options are its fields, on the GPU constants of the pipeline.
//!
//! Six sweeps: `sweep_step`, one launch a step, product and cell in one; `sweep_resident`, the loop over time inside the kernel,
//! with the weights close to the lanes, for few units; `sweep_grid`, the same for more units, by workgroups that run at once and pass
//! each other h through memory; `sweep_pair`, two launches a step, each a product and what follows it (an output product, a gated
//! product); `sweep_split`, a step as a row of launches, for whatever else comes between the product and the cell or after the cell (masks,
//! half precision, layer normalisation), of which one launch, `sweep_rows`, is the cell with all of layer normalisation; `sweep_scan`,
//! in parallel over time, for cells that are linear in their state. `kernels::choice` chooses. On a GPU the first four have two
//! sides to a launch: both directions of a layer, or two layers of which the upper one is a block of steps behind the lower one (a
//! wavefront, `nn/recurrent/wavefront.rs`); `sweep_split` has both directions in that of the cell, and a launch of its own for every
//! product; a scan takes one after the other. On the CPU all but `sweep_split` are `sweep_native`, whose threads share the units or the rows.
//!
//! One buffer `[T, B, slots, H]` serves a pass three times, in place: the input part of every gate comes in, the forward
//! sweep leaves what backward needs, the backward sweep leaves the gradients, from which the products make those of
//! the weights and of x, in blocks of time from last to first. On the CPU, from 8 rows on, the forward sweep forms the input part itself.
#![deny(missing_docs)]

mod arithmetic;
mod backend;
pub mod checkpoint;
pub mod data;
mod device;
mod error;
mod kernels;
mod loss;
pub mod nn;
pub mod onnx;
pub mod optim;
mod rng;
mod tensor;
mod trainer;
#[cfg(feature = "verify")]
pub mod verify;

#[cfg(target_arch = "wasm32")]
pub use backend::wait::set_suspend;
pub use device::{Device, DeviceInfo, KernelTime, MemoryUse};
pub use error::{Error, ErrorKind, Result};
pub use kernels::choice::{KernelChoice, KernelOverride};
pub use kernels::gemm::ProductKernel;
pub use kernels::sweep::{LayerOrder, SweepKernel};
pub use kernels::sweep_pair::PairKernel;
pub use kernels::sweep_step::StepKernel;
pub use loss::{CrossEntropy, Loss, MeanSquaredError};
pub use rng::{MaskKey, Rng};
pub use tensor::{Ids, Lengths, Shape, Tensor};
pub use trainer::{Batch, Model, Outcome, Trainer};

// Threads may share devices, tensors and layers.
#[cfg(not(target_arch = "wasm32"))]
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<(Device, Tensor, Ids, nn::Lstm, nn::Sequential, Trainer<CrossEntropy>)>();
    shared::<(nn::Decoded, Trainer<CrossEntropy, nn::GruEncoderDecoder>)>();
};

// The README's program compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
