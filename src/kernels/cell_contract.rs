//! What a cell and a sweep know of each other: `shaders/cell_contract.wgsl` in Rust.
//!
//! The native half of a cell computes sixteen units at once, in [`Lanes`]. A cell is a value: its options are its fields.

use super::math::{Fusion, Lanes};
use super::sweep_native::NativeSweeps;
use super::sweep_resident::ResidentKernels;
use super::sweep_scan::ScanKernels;
use crate::backend::Kernel;
use crate::error::Result;
use crate::tensor::Tensor;

/// Where sixteen units stand: keys for random masks. The first of them is `unit`.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// The two words of the mask key.
    pub key: [u32; 2],
    /// Steps from the start of the sequence.
    pub t: u32,
    /// The row of the batch.
    pub row: u32,
    /// The first unit.
    pub unit: u32,
}

/// A fixed number of [`Lanes`]: `[Lanes; N]`, with `N` known to generic code.
pub trait Block: Copy {
    /// How many.
    const LEN: usize;
    /// The `i`-th is `f(i)`.
    fn from_fn(f: impl FnMut(usize) -> Lanes) -> Self;
    /// All of them.
    fn lanes(&self) -> &[Lanes];
    /// The same, to fill them where a closure would be a call, which knows no wide vectors.
    fn lanes_mut(&mut self) -> &mut [Lanes];
}

impl<const N: usize> Block for [Lanes; N] {
    const LEN: usize = N;

    #[inline(always)]
    fn from_fn(f: impl FnMut(usize) -> Lanes) -> Self {
        std::array::from_fn(f)
    }

    #[inline(always)]
    fn lanes(&self) -> &[Lanes] {
        self
    }

    #[inline(always)]
    fn lanes_mut(&mut self) -> &mut [Lanes] {
        self
    }
}

/// What a cell's backward gives.
#[derive(Clone, Copy)]
pub struct Backward<C: CellKernel> {
    /// The first ones are the gradients of x, gate by gate; [`CellKernel::recurrent_slot`] says where those of r lie.
    pub slots: C::Slots,
    /// The direct part of the previous state's gradient: without what comes through the product.
    pub previous: C::State,
    /// Those of the unit's own parameters; only the ones from [`CellKernel::BIASES`] on count.
    pub unit: C::Unit,
}

/// A product of a step and what follows it: the entry points of a cell composed with `sweep_step.wgsl`, in the order of
/// [`super::sweep_step::StepKernel::ALL`]. Without a product only the first is of use.
#[derive(Debug)]
pub struct StepProduct {
    /// The product, then what is made of it.
    pub forward: [Kernel; 4],
    /// The product (where there is a later step), then the same backward.
    pub backward: [Kernel; 4],
}

/// The steps of a cell.
#[derive(Debug)]
pub struct StepKernels {
    /// All of a step: the product, then the cell.
    pub whole: StepProduct,
    /// The cell, given the product.
    pub forward_split: Kernel,
    /// Two products a step in the order of forward, where the cell may have them: see `sweep_pair`.
    pub pair: Option<[StepProduct; 2]>,
}

impl StepKernels {
    /// All of them.
    #[cfg(feature = "verify")]
    pub(crate) fn all(&'static self) -> impl Iterator<Item = &'static Kernel> {
        let products = std::iter::once(&self.whole).chain(self.pair.iter().flatten());
        products.flat_map(|product| product.forward.iter().chain(&product.backward)).chain([&self.forward_split])
    }
}

/// A recurrent cell: pointwise, it knows neither sweeps nor products. See `shaders/cell_contract.wgsl`.
pub trait CellKernel: Copy + Send + Sync + 'static {
    /// Input and recurrent part of each gate.
    type Pre: Block;
    /// Values kept for each unit and step; at least as many as gates.
    type Slots: Block;
    /// The state; the first is h.
    type State: Block;
    /// The unit's own parameters: the recurrent bias of each gate, then those whose gradient the sweep sums.
    type Unit: Block;

    /// How many of the unit's parameters are recurrent biases.
    const BIASES: usize;
    /// Whether there is a recurrent product at all.
    const PRODUCT: bool;
    /// Whether [`Self::forward`] and [`Self::backward`] have code of their own for a cell that `PLAIN` says to be without options: one
    /// run of vector code. Around the calls that options need all vectors would be saved, in each turn of a loop that makes none.
    const HAS_PLAIN: bool = false;
    /// The cell's sweeps on the CPU.
    const NATIVE: &'static NativeSweeps<Self>;
    /// The cell on the GPU.
    const KERNELS: &'static StepKernels;
    /// The same with the loop over time inside the kernel.
    const RESIDENT: &'static ResidentKernels;
    /// The same by workgroups that run at once, where there is a product: forward and backward.
    const GRID: Option<&'static [Kernel; 2]> = None;
    /// The same for a step with layer normalization, where [`Self::norms`] defines it: forward and backward.
    const ROWS: Option<&'static [Kernel; 2]> = None;
    /// Where the cell is linear in its one state, with factors that hang on x alone: the same for a scan.
    const SCAN: Option<&'static ScanKernels> = None;

    /// Whether this cell needs no more than that code.
    fn is_plain(&self) -> bool {
        false
    }
    /// How many of the unit's parameters this cell has; the others are zero.
    fn unit_params(&self) -> usize {
        Self::BIASES
    }
    /// The shader's `override`s that tell its options.
    fn constants(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
    /// The slot that gets the gradient of the gate's recurrent part.
    fn recurrent_slot(&self, gate: usize) -> usize {
        gate
    }
    /// Layer normalization: how many gates are normalized together, from the first on; their recurrent gradients lie in
    /// neighbouring slots. Empty: it is not defined for this cell.
    fn norms(&self) -> &'static [usize] {
        &[]
    }
    /// What makes the input of the last gate's product, where that is not h itself.
    fn gated(&self) -> Option<&dyn Gated> {
        None
    }
    /// The new state, and what backward needs.
    fn forward<F: Fusion, const PLAIN: bool>(
        &self,
        site: Site,
        x: Self::Pre,
        r: Self::Pre,
        previous: Self::State,
        p: Self::Unit,
    ) -> (Self::State, Self::Slots);
    /// From the gradient `d` of the new state.
    fn backward<F: Fusion, const PLAIN: bool>(
        &self,
        site: Site,
        saved: Self::Slots,
        previous: Self::State,
        p: Self::Unit,
        d: Self::State,
    ) -> Backward<Self>;

    /// The whole gradient of the new state: `d`, and what its parts get from each other within the step (c goes into h).
    fn totals<F: Fusion>(&self, _: Self::Slots, _: Self::State, _: Self::Unit, d: Self::State) -> Self::State {
        d
    }

    /// Unit parameters that are no biases: the sweep sums their gradients.
    fn extras(&self) -> usize {
        self.unit_params() - Self::BIASES
    }
}

/// What a cell does between two products of a step: the last gate's product sees not h, but what another gate, of the first
/// product, has made of it. In a sweep of whole steps there is no place for that.
pub trait Gated {
    /// The slot that holds what the last gate's product sees.
    fn slot(&self) -> usize;
    /// Fills that slot. `unit`: the unit's own parameters; `product [B, GATES, H]`: that of all gates but the last.
    ///
    /// # Errors
    /// What the device reports.
    fn forward(&self, at: &GatedStep<'_>, unit: &Tensor, product: &Tensor) -> Result<()>;
    /// After the cell: from `dseen [B, H]`, the gradient of what that product saw, the gradients that were still open in the
    /// slots; `dh [B, H]`, that of h before the step, grows. Zero stays zero: rows past their end.
    ///
    /// # Errors
    /// What the device reports.
    fn backward(&self, at: &GatedStep<'_>, dseen: &Tensor, dh: &Tensor) -> Result<()>;
}

/// One step of a sweep, for [`Gated`].
pub struct GatedStep<'a> {
    /// B.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// The step.
    pub t: usize,
    /// The slot of the state before it.
    pub before: usize,
    /// `[T, B, SLOTS, H]`
    pub slots: &'a Tensor,
    /// `[STATES, depth, B, H]`
    pub states: &'a Tensor,
}

/// Gates whose recurrent gradients lie in neighbouring slots and whose products see the same, as `(first gate, first slot, count)`:
/// each run is one product. With `apart` each gate is a run.
pub(crate) fn recurrent_runs<C: CellKernel>(cell: &C, apart: bool) -> Vec<(usize, usize, usize)> {
    let begins = |gate: usize| apart || is_gated(cell, gate);
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    for gate in 0..if C::PRODUCT { C::Pre::LEN } else { 0 } {
        let slot = cell.recurrent_slot(gate);
        match runs.last_mut() {
            Some((_, first, count)) if *first + *count == slot && !begins(gate) => *count += 1,
            _ => runs.push((gate, slot, 1)),
        }
    }
    runs
}

/// Gates whose products are normalized together, as `(first gate, first recurrent slot, count)`.
pub(crate) fn norm_groups<C: CellKernel>(cell: &C) -> Vec<(usize, usize, usize)> {
    let mut first = 0;
    let group = |count: &usize| {
        let gate = first;
        first += count;
        (gate, cell.recurrent_slot(gate), *count)
    };
    cell.norms().iter().map(group).collect()
}

/// Whether the gate's product sees what [`Gated`] makes of h.
pub(crate) fn is_gated<C: CellKernel>(cell: &C, gate: usize) -> bool {
    gate + 1 == C::Pre::LEN && cell.gated().is_some()
}

/// An activation as the constants `kind`, `alpha` and `beta`, each behind a prefix; a macro, because names are static.
macro_rules! activation_constants {
    ($activation:expr, $kind:literal, $alpha:literal, $beta:literal) => {{
        let [kind, alpha, beta] = $activation.constants();
        [($kind, kind), ($alpha, alpha), ($beta, beta)]
    }};
}
pub(crate) use activation_constants;
