//! Which kernel forms products, steps and sweeps on which class of device: the tables, each row with what it rests on. Of the rows
//! that match the first counts whose kernel can do the work. [`KernelOverride`] goes before them all.
//!
//! `gatefold bench --tune` measures rows for the adapter at hand, `gatefold bench --explain` says which ones are used.

use std::fmt;
use std::ops::RangeInclusive;

use super::cell_contract::CellKernel;
use super::gemm::{Product, ProductKernel};
use super::half::Precision;
use super::sweep::{LayerOrder, Plan, SweepKernel};
use super::sweep_grid;
use super::sweep_pair::PairKernel;
use super::sweep_step::StepKernel;
use crate::backend::adapter::Class;
use crate::backend::gpu::Gpu;
use crate::device::{Backend, Device};
use crate::error::{Error, Result};

/// Which kernel is taken for what: rows, and what is left for any device that no row names.
pub(crate) struct Table<S: 'static, K: 'static> {
    /// What is chosen, for people.
    pub name: &'static str,
    pub rows: &'static [Row<S, K>],
    pub otherwise: K,
}

/// A row of a table.
pub(crate) struct Row<S: 'static, K: 'static> {
    pub classes: &'static [Class],
    /// Sizes that all lie within these bounds.
    pub limits: &'static [(S, RangeInclusive<usize>)],
    /// The first one that can do the work is used.
    pub kernels: &'static [K],
    /// What was measured, or why it is thought to be so.
    pub reason: &'static str,
}

/// What limits a row of [`PRODUCTS`]: `C [M, N] = A [M, K] . B [K, N]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ProductSize {
    M,
    MxN,
    /// In half precision, words of two numbers.
    K,
}

/// What limits a row of [`STEPS`], [`PAIRS`], [`SWEEPS`] or [`LAYERS`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum SweepSize {
    /// Steps of the whole sequence.
    T,
    /// Units that see each other through the product of a step: 0 for a cell without one.
    H,
    /// Rows.
    B,
    /// Units of all rows.
    BxH,
    /// Lanes of every subgroup; 0: they vary, or may not be used.
    Lanes,
}

use Class::Software;
use ProductKernel::{
    General, HalfCooperative16, HalfGeneral, HalfTiled64, HalfTiled64Parts, HalfTiled128, SubgroupColumns, SubgroupRows,
    SubgroupRows8, Tiled64, Tiled64Parts, Tiled128,
};
use ProductSize::{K, M, MxN};
use SweepSize::{B, BxH, H, Lanes, T};

const ALL: &[Class] = &[Software, Class::Nvidia, Class::Amd, Class::Intel, Class::Apple, Class::Other];
const HARDWARE: &[Class] = &[Class::Nvidia, Class::Amd, Class::Intel, Class::Apple, Class::Other];

/// Columns and precision count through what a kernel takes: its layouts, alignment and factors.
pub(crate) static PRODUCTS: Table<ProductSize, ProductKernel> = Table {
    name: "product",
    rows: &[
        Row {
            classes: &[Software],
            limits: &[(M, 1..=8)],
            kernels: &[SubgroupRows8],
            reason: "llvmpipe (Mesa 22.3, 2 busy cores), 8 x 512 x 512: 3.4 to 4.1 times as fast as the general one",
        },
        Row {
            classes: &[Software],
            limits: &[(M, 9..=usize::MAX)],
            kernels: &[SubgroupRows, SubgroupColumns],
            reason: "llvmpipe (Mesa 22.3, 2 busy cores), 512 x 512 x 512: rows 4.0 to 6.3 times as fast as the general one, columns \
                     up to 5.3; tiles through workgroup memory 1.4 (64 x 64) to 1.7 (128 x 128)",
        },
        Row {
            classes: HARDWARE,
            limits: &[(M, 17..=usize::MAX), (MxN, 0..=1 << 20), (K, 512..=usize::MAX)],
            kernels: &[Tiled64Parts, HalfTiled64Parts],
            reason: "not measured: by its tiles alone a C of this size leaves most of a large GPU idle, and gradients of weights are long \
                     sums",
        },
        Row {
            classes: HARDWARE,
            limits: &[(M, 0..=16)],
            kernels: &[General, HalfGeneral],
            reason: "not measured: a tile of 64 rows would compute most of them for nothing",
        },
        Row {
            classes: HARDWARE,
            limits: &[(MxN, 1 << 20..=usize::MAX)],
            kernels: &[HalfCooperative16],
            reason: "not measured: matrix units are so fast that a GPU is better off with few of their tiles than with many others",
        },
        Row {
            classes: HARDWARE,
            limits: &[(MxN, 1 << 22..=usize::MAX)],
            kernels: &[Tiled128, HalfTiled128],
            reason: "not measured: large tiles read half as much, but 256 are needed, two a multiprocessor of the largest GPUs",
        },
        Row {
            classes: HARDWARE,
            limits: &[],
            kernels: &[Tiled64, HalfTiled64],
            reason: "not measured: 4 vectors from workgroup memory feed 64 multiply-adds, where the general one has 12 loads from the \
                     buffers for 32",
        },
        Row {
            classes: ALL,
            limits: &[],
            kernels: &[General, HalfGeneral],
            reason: "the one of its precision that any device takes",
        },
    ],
    otherwise: General,
};

/// Steps play no part, so that they do not show in the bits.
pub(crate) static STEPS: Table<SweepSize, StepKernel> = Table {
    name: "step",
    rows: &[
        Row {
            classes: &[Software],
            limits: &[(B, 1..=2)],
            kernels: &[StepKernel::SubgroupRow],
            reason: "llvmpipe (Mesa 22.3, 2 busy cores), LSTM, 40 steps, products included, beside tiles of 16 rows: a row of 128 or 512 units \
                     1.2 and 1.8 times as fast in inference, 2.2 and 2.7 in training; 2 rows 1.0 to 1.1, 1.5 to 1.8; 3 rows 0.97, 1.25; 4 \
                     0.6 to 0.9, 0.9 to 1.0",
        },
        Row {
            classes: &[Software],
            limits: &[],
            kernels: &[StepKernel::Subgroup],
            reason: "llvmpipe (Mesa 22.3, 2 busy cores), LSTM with 512 units, 64 rows, 10 steps, products included: 3.7 times as fast \
                     forward as the general one, 2.5 in training",
        },
        Row {
            classes: HARDWARE,
            limits: &[],
            kernels: &[StepKernel::Tiled],
            reason: "not measured: reads a weight once for 32 rows, where the general one does for 4, and sums k in slices of many lanes",
        },
    ],
    otherwise: StepKernel::General,
};

/// Steps of two products where nothing else lies around these: through an output, or with a reset gate before the product.
pub(crate) static PAIRS: Table<SweepSize, PairKernel> = Table {
    name: "pair",
    rows: &[
        Row {
            classes: &[Software],
            limits: &[(BxH, 1 << 13..=usize::MAX)],
            kernels: &[PairKernel::Apart],
            reason: "llvmpipe (Mesa 22.3, 2 busy cores), fused beside apart, LSTM with a projection and GRU with the reset before the product, \
                     50 steps, products included: 1.0 to 1.1 times as fast at B x H = 8 K, 0.93 to 0.96 in training, 0.9 at 32 K, because a \
                     product by itself loads vectors of both factors",
        },
        Row {
            classes: &[Software],
            limits: &[],
            kernels: &[PairKernel::Fused],
            reason: "the same at 1 x 128: 1.8 to 2.0, 1.7 to 1.8 in training; 1 x 512: 1.5, 1.4; 16 x 256: 1.4, 1.1; 32 x 128: 1.1 to 1.3, 1.1",
        },
    ],
    // Not measured on hardware: two launches a step and not four.
    otherwise: PairKernel::Fused,
};

/// Choices hang on the length of the whole sequence and not of a window of it, so that windows give the bits of the whole.
pub(crate) static SWEEPS: Table<SweepSize, SweepKernel> = Table {
    name: "sweep",
    rows: &[
        Row {
            classes: &[Software],
            limits: &[(T, 4..=usize::MAX), (H, 0..=0)],
            kernels: &[SweepKernel::Resident],
            reason: "llvmpipe (Mesa 22.3, 2 quiet cores), minGRU of 32 to 512 units, 1 to 64 rows, 64 steps, forward and backward: 1.6 to 12 \
                     times as fast as steps, where the scan is 1.2 to 8.6 times",
        },
        Row {
            classes: &[Software],
            limits: &[(T, 5..=usize::MAX), (H, 1..=32), (BxH, 0..=512), (Lanes, 8..=8)],
            kernels: &[SweepKernel::Resident],
            reason: "llvmpipe (Mesa 22.3, 2 quiet cores), LSTM of 32 units, 64 steps, training, products included: with 1, 4, 8, 16, 32 rows \
                     5.0, 3.4, 2.1, 1.5, 0.86 times as fast as steps, in inference 5.7, 4.7, 3.3, 2.5, 2.1 times",
        },
        Row {
            classes: &[Software],
            limits: &[(T, 5..=usize::MAX), (H, 1..=128), (BxH, 0..=256), (Lanes, 8..=8)],
            kernels: &[SweepKernel::Resident],
            reason: "the same with 64 units and 1, 2, 4, 8 rows: 3.7, 2.0, 1.1, 0.61 times, in inference 6.6, 4.7, 2.2, 1.4; with 128 units \
                     and 1, 2, 4 rows 1.8, 1.8, 0.93 times, in inference 3.7, 2.3, 4.1",
        },
        Row {
            classes: &[Software],
            limits: &[(Lanes, 8..=8)],
            kernels: &[SweepKernel::Step],
            reason: "what the rows above leave: a step of many rows shares the loads of its weights",
        },
        Row {
            classes: &[Software],
            limits: &[(T, 5..=usize::MAX), (H, 1..=64)],
            kernels: &[SweepKernel::Resident],
            reason: "an estimate: steps take the general kernel there, and without subgroups of eight either pays for every load of h",
        },
        Row {
            classes: HARDWARE,
            // Two blocks, which run at once.
            limits: &[(T, 64..=usize::MAX), (BxH, 0..=1 << 18)],
            kernels: &[SweepKernel::Scan],
            reason: "an estimate: a step of so many units moves some 8 MB, which takes a GPU of 1 TB/s about as long as a launch, and a \
                     scan moves up to one and a half times as much",
        },
        Row {
            classes: HARDWARE,
            limits: &[(T, 5..=usize::MAX), (H, 0..=32)],
            kernels: &[SweepKernel::Resident],
            reason: "not measured: only weights that surely stay in registers",
        },
        // A grid whose workgroups wait for each other has no row: no hardware has run it yet. By an estimate for Nvidia and AMD it pays for
        // (T, 5..), (H, 33..=1024), (B, 1..=64): of 1024 units of an LSTM on 128 multiprocessors a row takes some 400 cycles and a step
        // 1 to 2 us to exchange h, where a launch takes 3 to 5 us and as long again to read the weights, but less for each row. Not for
        // Apple, whose workgroups may wait in vain.
        Row {
            classes: HARDWARE,
            limits: &[(T, 1..=1), (H, 33..=1024), (B, 1..=16)],
            kernels: &[SweepKernel::Grid],
            reason: "not measured: a step of a stream is one reading of the weights, which the grid has under way all at once; it waits \
                     for nothing then",
        },
    ],
    otherwise: SweepKernel::Step,
};

/// Layers of a stack, one direction.
pub(crate) static LAYERS: Table<SweepSize, LayerOrder> = Table {
    name: "layers",
    rows: &[
        Row {
            classes: &[Software],
            limits: &[(T, 96..=usize::MAX), (H, 65..=128), (B, 1..=2)],
            kernels: &[LayerOrder::Wavefront],
            reason: "llvmpipe (Mesa 22.3, 2 quiet cores), two LSTM layers, beside one after the other: resident sweeps of one tile \
                     of rows leave a core idle; 128 units, 100 steps, 1 and 2 rows 1.05 and 1.13 times as fast in inference, 1.21 \
                     and 1.34 in training; 512 steps 1.35 and 1.45, 1.52 and 1.46; 60 steps 0.8, 1.0",
        },
        Row {
            classes: &[Software],
            limits: &[(T, 400..=usize::MAX), (H, 33..=64), (B, 1..=2)],
            kernels: &[LayerOrder::Wavefront],
            reason: "the same with 64 units, a row, 512 steps: 1.2, 1.4; 100 steps: 0.8, 1.06; 32 units, 512 steps: 0.97, 1.2",
        },
        Row {
            classes: &[Software],
            limits: &[(T, 64..=usize::MAX), (H, 33..=128), (BxH, 512..=2048)],
            kernels: &[LayerOrder::Wavefront],
            reason: "the same by steps, 100 steps, 16 x 64: 1.19, 1.21; 4, 8, 16, 32 rows of 128 units: 1.17, 1.14, 1.09, 1.03, in \
                     training 1.03, 1.07, 1.07, 1.05; 8 x 256: 1.03, 0.97; 1 x 512: 0.86, 0.88, because the weights of both layers \
                     leave the caches",
        },
        Row {
            classes: HARDWARE,
            limits: &[(T, 48..=usize::MAX), (H, 0..=1024), (BxH, 0..=1 << 14)],
            kernels: &[LayerOrder::Wavefront],
            reason: "an estimate: 16 rows of 1024 units are 128 workgroups of a step, one for each multiprocessor of a large GPU, which has room \
                     for more; and fewer units are less than a launch takes",
        },
    ],
    otherwise: LayerOrder::InTurn,
};

/// Kernels that a device uses in place of those of its tables, for whatever they can do: to test and to tune
/// ([`Device::override_kernels`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelOverride {
    /// Of matrix products, in the kernel's precision.
    pub product: Option<ProductKernel>,
    /// Of a step, in sweeps that launch each step by itself, or its two products.
    pub step: Option<StepKernel>,
    /// Of steps of two products, an output or a reset gate before the product between them, where nothing else is.
    pub pair: Option<PairKernel>,
    /// Of a sweep over time; not on a device that is batch invariant ([`Device::set_batch_invariant`]), which takes steps, and not
    /// where something comes between the product and the cell (layer normalization, masks, an output product).
    pub sweep: Option<SweepKernel>,
    /// How the layers of a stack follow each other.
    pub layers: Option<LayerOrder>,
}

impl KernelOverride {
    /// With this kernel, or that of the tables.
    pub fn product(self, product: impl Into<Option<ProductKernel>>) -> Self {
        Self { product: product.into(), ..self }
    }

    /// With this kernel, or that of the tables.
    pub fn step(self, step: impl Into<Option<StepKernel>>) -> Self {
        Self { step: step.into(), ..self }
    }

    /// With this kernel, or that of the tables.
    pub fn pair(self, pair: impl Into<Option<PairKernel>>) -> Self {
        Self { pair: pair.into(), ..self }
    }

    /// With this sweep, or that of the tables.
    pub fn sweep(self, sweep: impl Into<Option<SweepKernel>>) -> Self {
        Self { sweep: sweep.into(), ..self }
    }

    /// In this order, or that of the tables.
    pub fn layers(self, layers: impl Into<Option<LayerOrder>>) -> Self {
        Self { layers: layers.into(), ..self }
    }

    /// Each kernel's table and name.
    fn names(&self) -> impl Iterator<Item = (&'static str, String)> {
        let product = self.product.map(|kernel| (PRODUCTS.name, kernel.to_string()));
        let step = self.step.map(|kernel| (STEPS.name, kernel.to_string()));
        let pair = self.pair.map(|kernel| (PAIRS.name, kernel.to_string()));
        let sweep = self.sweep.map(|kernel| (SWEEPS.name, kernel.to_string()));
        let layers = self.layers.map(|order| (LAYERS.name, order.to_string()));
        [product, step, pair, sweep, layers].into_iter().flatten()
    }

    /// `device.override_kernels: ..` for a kernel that `gpu` cannot run at all.
    pub(crate) fn check(&self, gpu: &Gpu, device: &Device) -> Result<()> {
        let product = self.product.filter(|kernel| !kernel.runs_on(gpu)).map(|kernel| (PRODUCTS.name, kernel.to_string()));
        let step = self.step.filter(|kernel| !kernel.runs_on(gpu)).map(|kernel| (STEPS.name, kernel.to_string()));
        match product.or(step) {
            None => Ok(()),
            Some((table, kernel)) => {
                let what = format!("{} cannot run the {table} kernel {kernel}", device.info());
                Err(Error::unsupported("device.override_kernels", what))
            }
        }
    }
}

impl fmt::Display for KernelOverride {
    /// `product general, sweep resident`, or `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.names().map(|(table, kernel)| format!("{table} {kernel}")).collect();
        f.write_str(if names.is_empty() { "none".to_owned() } else { names.join(", ") }.as_str())
    }
}

/// The kernel for a product. On a device that is batch invariant the numbers of rows and of outputs play no part.
pub(crate) fn product(device: &Device, gpu: &Gpu, product: &Product<'_>) -> ProductKernel {
    let [m, n, k] = [product.whole, product.b.cols, product.a.cols];
    let size = |size| match size {
        M | MxN if device.is_batch_invariant() => usize::MAX,
        M => m,
        MxN => m * n,
        K => k,
    };
    let takes = |kernel: ProductKernel| kernel.takes(gpu, product);
    let work = || {
        let layout = if product.a.col == 1 { "" } else { " of A transposed" };
        let pairs = if product.precision == Precision::Half { " of pairs" } else { "" };
        format!("{m}x{n}x{k}{layout}{pairs}")
    };
    choose(&PRODUCTS, device, gpu, device.kernel_override().product, size, takes, work)
}

/// The kernel of a sweep by steps. `width`: that of what recurs, H but for an output.
pub(crate) fn step<C: CellKernel>(device: &Device, gpu: &Gpu, plan: &Plan<'_>, width: usize) -> StepKernel {
    let takes = |kernel: StepKernel| kernel.takes::<C>(gpu, [plan.hidden, width]);
    choose(&STEPS, device, gpu, device.kernel_override().step, sizes::<C>(device, gpu, plan), takes, || work(plan))
}

/// How steps of two products are computed.
pub(crate) fn pair<C: CellKernel>(device: &Device, gpu: &Gpu, plan: &Plan<'_>) -> PairKernel {
    let sizes = sizes::<C>(device, gpu, plan);
    choose(&PAIRS, device, gpu, device.kernel_override().pair, sizes, |_| true, || work(plan))
}

/// How this layer and the next follow each other.
pub(crate) fn layers<C: CellKernel>(device: &Device, plan: &Plan<'_>) -> LayerOrder {
    let Backend::Gpu(gpu) = device.backend() else { return LayerOrder::InTurn };
    let sizes = sizes::<C>(device, gpu, plan);
    choose(&LAYERS, device, gpu, device.kernel_override().layers, sizes, |_| true, || work(plan))
}

/// The kernel of a sweep of whole steps. A device that is batch invariant has one order for any T and B.
pub(crate) fn sweep<C: CellKernel>(device: &Device, gpu: &Gpu, cell: &C, plan: &Plan<'_>, backward: bool) -> SweepKernel {
    let invariant = device.is_batch_invariant();
    // Who overrides the table wants to see the grid, or its rescue, at work. A probe fails with its device: the next launch says so.
    let overridden = device.kernel_override().sweep == Some(SweepKernel::Grid);
    // A browser lets no probe wait.
    let may_probe = cfg!(not(target_arch = "wasm32"));
    let may_run = || overridden || may_probe && sweep_grid::may_run(device, cell, plan, backward).unwrap_or(false);
    let takes = |kernel: SweepKernel| match kernel {
        SweepKernel::Step => true,
        _ if invariant => false,
        SweepKernel::Grid => kernel.takes::<C>(plan) && may_run(),
        _ => kernel.takes::<C>(plan),
    };
    choose(&SWEEPS, device, gpu, device.kernel_override().sweep, sizes::<C>(device, gpu, plan), takes, || work(plan))
}

/// On a device that is batch invariant the number of rows plays no part.
fn sizes<C: CellKernel>(device: &Device, gpu: &Gpu, plan: &Plan<'_>) -> impl Fn(SweepSize) -> usize {
    let (steps, rows, hidden, invariant) = (plan.total, plan.rows, plan.hidden, device.is_batch_invariant());
    let lanes = gpu.subgroup_size().unwrap_or(0) as usize;
    move |size| match size {
        B | BxH if invariant => usize::MAX,
        T => steps,
        H if C::PRODUCT => hidden,
        H => 0,
        B => rows,
        BxH => rows * hidden,
        Lanes => lanes,
    }
}

fn work(plan: &Plan<'_>) -> String {
    format!("{} steps, {} rows, {} units", plan.steps, plan.rows, plan.hidden)
}

/// The override where it can do the work, else by the table. `work` says for people what it is for.
fn choose<S: Copy + fmt::Debug, K: Copy + fmt::Display>(
    table: &'static Table<S, K>,
    device: &Device,
    gpu: &Gpu,
    wanted: Option<K>,
    size: impl Fn(S) -> usize,
    takes: impl Fn(K) -> bool,
    work: impl FnOnce() -> String,
) -> K {
    let matches = |row: &&'static Row<S, K>| {
        row.classes.contains(&gpu.class()) && row.limits.iter().all(|(limited, bounds)| bounds.contains(&size(*limited)))
    };
    let in_row = |row: &'static Row<S, K>| row.kernels.iter().find(|kernel| takes(**kernel)).map(|kernel| (*kernel, Some(row)));
    let by_override = wanted.filter(|kernel| takes(*kernel)).map(|kernel| (kernel, None));
    let chosen = by_override.or_else(|| table.rows.iter().filter(matches).find_map(in_row));
    device.note(|| {
        let (row, reason) = match &chosen {
            Some((_, Some(row))) => (Some(row.to_string()), row.reason),
            Some((_, None)) => (None, "Device::override_kernels"),
            None => (None, "the one that any device takes"),
        };
        let kernel = chosen.map_or(table.otherwise, |(kernel, _)| kernel).to_string();
        KernelChoice { table: table.name, work: work(), kernel, row, reason }
    });
    chosen.map_or(table.otherwise, |(kernel, _)| kernel)
}

impl<S: fmt::Debug, K> fmt::Display for Row<S, K> {
    /// `Software, M 1..=8`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let classes: Vec<String> = self.classes.iter().map(|class| format!("{class:?}")).collect();
        f.write_str(&classes.join(" "))?;
        self.limits.iter().try_for_each(|(size, bounds)| match (bounds.start(), bounds.end()) {
            (least, &usize::MAX) => write!(f, ", {size:?} {least}.."),
            (least, most) => write!(f, ", {size:?} {least}..={most}"),
        })
    }
}

/// A choice that a device made: see [`Device::explain`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelChoice {
    /// Of what: `product`, `step`, `pair`, `sweep` or `layers`.
    pub table: &'static str,
    /// The sizes of the work.
    pub work: String,
    /// The kernel that was taken.
    pub kernel: String,
    /// The row of the table, as device classes and bounds of sizes; `None` where the kernel comes from
    /// [`Device::override_kernels`] or is the one that any device takes.
    pub row: Option<String>,
    /// What the choice rests on.
    pub reason: &'static str,
}
