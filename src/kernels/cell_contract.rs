//! What a cell and a sweep know of each other: `shaders/cell_contract.wgsl` in Rust.
//!
//! The native half of a cell computes sixteen units at once, in [`Lanes`].

use super::math::Lanes;
use crate::backend::Kernel;

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
}

/// A recurrent cell: pointwise, it knows neither sweeps nor products. See `shaders/cell_contract.wgsl`.
pub trait CellKernel: 'static {
    /// Input and recurrent part of each gate.
    type Pre: Block;
    /// Values kept for each unit and step; at least as many as gates.
    type Slots: Block;
    /// The state; the first is h.
    type State: Block;
    /// The unit's own parameters, the recurrent bias first.
    type Unit: Block;

    /// The cell composed with `sweep_step.wgsl`.
    const FORWARD: &'static Kernel;
    /// Its backward.
    const BACKWARD: &'static Kernel;

    /// The slot that gets the gradient of the gate's recurrent part.
    fn recurrent_slot(gate: usize) -> usize;
    /// The new state, and what backward needs.
    fn forward(site: Site, x: Self::Pre, r: Self::Pre, previous: Self::State, p: Self::Unit) -> (Self::State, Self::Slots);
    /// From the gradient `d` of the new state: the gradients of x and r, and the direct part of the previous state's.
    fn backward(
        site: Site,
        saved: Self::Slots,
        previous: Self::State,
        p: Self::Unit,
        d: Self::State,
    ) -> (Self::Slots, Self::State);
}

/// Gates whose recurrent gradients lie in neighbouring slots, as `(first gate, first slot, count)`: each run is one product.
pub(crate) fn recurrent_runs<C: CellKernel>() -> Vec<(usize, usize, usize)> {
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    for gate in 0..C::Pre::LEN {
        let slot = C::recurrent_slot(gate);
        match runs.last_mut() {
            Some((_, first, count)) if *first + *count == slot => *count += 1,
            _ => runs.push((gate, slot, 1)),
        }
    }
    runs
}
