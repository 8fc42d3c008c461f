//! Which kernel forms products and steps on which class of device: the tables, each line with what it rests on. The first match
//! wins. Which sweep runs is decided in [`super::sweep`].

use std::ops::RangeInclusive;

use super::cell_contract::CellKernel;
use super::gemm::{Matrix, ProductKernel};
use super::sweep_step::StepKernel;
use crate::backend::adapter::Class;
use crate::backend::gpu::Gpu;
use crate::device::Device;

/// A line of the table of products.
pub(crate) struct ProductChoice {
    pub classes: &'static [Class],
    /// Rows of A.
    pub rows: RangeInclusive<usize>,
    /// The first one that takes the product is used.
    pub kernels: &'static [ProductKernel],
}

/// A line of the table of step sweeps.
pub(crate) struct StepChoice {
    pub classes: &'static [Class],
    /// The first one that takes the sweep is used.
    pub kernels: &'static [StepKernel],
}

use Class::{Amd, Apple, Intel, Nvidia, Other, Software};
use ProductKernel::{General, SubgroupColumns, SubgroupRows, SubgroupRows8};

/// Columns count through what a kernel takes: its layouts and alignment.
pub(crate) static PRODUCTS: [ProductChoice; 3] = [
    // llvmpipe (Mesa 22.3, 2 busy cores), 8 x 512 x 512: 3.4 to 4.1 times as fast as the general one
    ProductChoice { classes: &[Software], rows: 1..=8, kernels: &[SubgroupRows8, General] },
    // The same, 512 x 512 x 512: rows 4.0 to 5.1 times; columns take as long as rows
    ProductChoice { classes: &[Software], rows: 9..=usize::MAX, kernels: &[SubgroupRows, SubgroupColumns, General] },
    // Not measured: the one that any device takes.
    ProductChoice { classes: &[Nvidia, Amd, Intel, Apple, Other], rows: 1..=usize::MAX, kernels: &[General] },
];

/// The kernel for `C = A . B`. On a device that is batch invariant the number of rows plays no part.
pub(crate) fn product(device: &Device, gpu: &Gpu, a: &Matrix<'_>, b: &Matrix<'_>, c: &Matrix<'_>) -> ProductKernel {
    let rows = if device.is_batch_invariant() { usize::MAX } else { a.rows };
    let choices = PRODUCTS.iter().filter(|choice| choice.classes.contains(&gpu.class()) && choice.rows.contains(&rows));
    let mut kernels = choices.flat_map(|choice| choice.kernels).copied();
    kernels.find(|kernel| kernel.takes(gpu, a, b, c)).unwrap_or(General)
}

pub(crate) static STEPS: [StepChoice; 2] = [
    // llvmpipe (Mesa 22.3, 2 busy cores), LSTM with 512 units, 64 rows, 10 steps, products included: 3.7 times as fast forward, 2.5 in training
    StepChoice { classes: &[Software], kernels: &[StepKernel::Subgroup, StepKernel::General] },
    // Not measured: the one that any device takes.
    StepChoice { classes: &[Nvidia, Amd, Intel, Apple, Other], kernels: &[StepKernel::General] },
];

/// The kernel of a sweep by steps. Rows and steps play no part, so that they do not show in the bits.
pub(crate) fn step<C: CellKernel>(gpu: &Gpu, hidden: usize) -> StepKernel {
    let choices = STEPS.iter().filter(|choice| choice.classes.contains(&gpu.class()));
    let mut kernels = choices.flat_map(|choice| choice.kernels).copied();
    kernels.find(|kernel| kernel.takes::<C>(gpu, hidden)).unwrap_or(StepKernel::General)
}
