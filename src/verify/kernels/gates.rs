//! What comes between h and the recurrent product of a gate: masks, and a GRU's reset gate.

use std::ops::Range;

use super::harness::{Cases, GRADIENT, MANY, NAN, Run, TIGHT, normal, to_bits, wide};
use crate::error::Result;
use crate::kernels::activation::Activation;
use crate::kernels::cell_contract::{Gated, GatedStep};
use crate::kernels::cell_gru::GruCell;
use crate::kernels::gate_mask::{self, Masks};
use crate::kernels::gemm::Matrix;
use crate::rng::{MaskKey, Rng, philox, unit};
use crate::tensor::Tensor;
use crate::verify::Comparison;
use crate::verify::autodiff::sigmoid;

/// What multiplies h `[rows, width]` before the product of each gate: `[gates, rows, width]`.
pub(super) fn masks(gates: Range<usize>, rows: usize, width: usize, p: f32, key: MaskKey) -> Vec<f32> {
    let mut mask = Vec::new();
    for gate in gates {
        for row in 0..rows {
            for u in 0..width {
                let [bits, ..] = philox(key.words(), [u as u32, row as u32, gate as u32, 0x6761_7465]);
                mask.push(if unit(bits) >= p { 1.0 / (1.0 - p) } else { 0.0 });
            }
        }
    }
    mask
}

pub(super) fn gate_mask(cases: &mut Cases<'_>) -> Result<()> {
    let mut rng = Rng::seed(21);
    for (gates, steps, rows, width, p) in [
        (0..1, 1, 1, 1, 0.5),
        (0..4, 1, 1, 63, 0.1),
        (0..3, 1, 5, 64, 0.0),
        (2..3, 7, 3, 65, 0.9),
        (1..4, 1, 9, 65, 0.5),
        (0..1, 3, 2, MANY / 6 + 1, 0.25),
    ] {
        let key = MaskKey::new(3, width as u64);
        // In one case the first draw is exactly p, and is kept.
        let p = if width == 63 { unit(philox(key.words(), [0, 0, 0, 0x6761_7465])[0]) } else { p };
        let (lines, count) = (steps * rows, steps * rows * width);
        // All steps share a mask.
        let of_steps = |mask: &[f32]| -> Vec<f32> { (0..steps).flat_map(|_| mask).copied().collect() };
        let mask = masks(gates.clone(), rows, width, p, key);
        let mask: Vec<f32> = mask.chunks_exact(rows * width).flat_map(of_steps).collect();
        let (h, sums, d) = (normal(&mut rng, count), normal(&mut rng, count), normal(&mut rng, gates.len() * count));
        let masked = |x: f32, mask: f32| if mask == 0.0 { 0.0 } else { x * mask };
        let seen: Vec<u32> = mask.iter().enumerate().map(|(at, mask)| masked(h[at % count], *mask).to_bits()).collect();
        let mut dh = wide(&sums);
        for (at, mask) in mask.iter().enumerate() {
            dh[at % count] += f64::from(d[at]) * f64::from(*mask);
        }
        cases.run(format!("gates {gates:?}, {steps}x{rows}x{width}, p {p}"), |run| {
            let masks = Masks { probability: p, key, batch: rows };
            let h = run.input_window("h", [1, count], true, &h)?;
            let out = Tensor::uninitialized(run.device, [gates.len(), lines, width])?;
            gate_mask::spread(&masks, gates.clone(), Matrix::window(&h.tensor, h.offset, lines, width, width), &out)?;
            run.bits("seen", &out, &seen)?;
            let d = run.input("d", &d, [gates.len(), lines, width])?;
            let dh_window = run.window([1, count], true, Some(&sums))?;
            let target = Matrix::window(&dh_window.tensor, dh_window.offset, lines, width, width);
            gate_mask::collect(&masks, gates.clone(), &d, target)?;
            run.near_window("dh", &dh_window, &dh, TIGHT)
        })?;
    }
    // More rows and steps change no mask of those that were there; another key or another gate is another mask.
    let (rows, width, key) = (3, 37, MaskKey::new(1, 2));
    cases.run("a padded batch", |run| {
        let drawn = |gates: Range<usize>, steps: usize, rows: usize, key: MaskKey| -> Result<Vec<u32>> {
            let ones = Tensor::from_slice(run.device, &vec![1.0; steps * rows * width], [steps * rows, width])?;
            let out = Tensor::uninitialized(run.device, [gates.len(), steps * rows, width])?;
            let masks = Masks { probability: 0.5, key, batch: rows };
            gate_mask::spread(&masks, gates, Matrix::new(&ones, steps * rows, width), &out)?;
            out.read_back()
        };
        let small = drawn(1..2, 1, rows, key)?;
        let large = drawn(1..2, 3, rows + 4, key)?;
        for step in large.chunks_exact((rows + 4) * width) {
            run.comparisons.push(Comparison::bits("masks", &step[..rows * width], &small));
        }
        for (name, other) in [("key", drawn(1..2, 1, rows, key.layer(1))?), ("gate", drawn(0..1, 1, rows, key)?)] {
            let same = f64::from(u8::from(other == small));
            run.comparisons.push(Comparison::measured(format!("another {name}, the same mask"), same, 0.0));
        }
        Ok(())
    })
}

/// A step of a GRU whose reset gate acts before the product.
struct Reset {
    name: &'static str,
    cell: GruCell,
    /// The gate and its slope, of a pre-activation that no bound touches.
    gate: fn(f64) -> f64,
    slope: fn(f64) -> f64,
    /// T, B, H, the step, the slot of the state before it.
    sizes: [usize; 5],
}

pub(super) fn gru_reset(cases: &mut Cases<'_>) -> Result<()> {
    let plain = GruCell { reset_before: true, ..GruCell::default() };
    // Exact at its bounds: 1/4 and 3/4.
    let hard = GruCell { gate: Activation::HardSigmoid { alpha: 0.25, beta: 0.5 }, clip: 1.0, ..plain };
    let row = |name, sizes| Reset { name, cell: plain, gate: sigmoid, slope: |x| sigmoid(x) * sigmoid(-x), sizes };
    let hard = |sizes| Reset {
        cell: hard,
        gate: |x| 0.25 * x.clamp(-1.0, 1.0) + 0.5,
        slope: |x| if x.abs() < 1.0 { 0.25 } else { 0.0 },
        ..row("hard sigmoid, clip 1", sizes)
    };
    let mut rng = Rng::seed(22);
    for case in [
        row("", [1, 1, 1, 0, 0]),
        row("", [3, 7, 63, 1, 1]),
        row("", [2, 3, 64, 1, 0]),
        row("", [2, 5, 65, 0, 1]),
        hard([2, 5, 65, 1, 2]),
        row("", [1, 64, MANY / 64 + 1, 0, 0]),
    ] {
        check_reset(cases, &case, &mut rng)?;
    }
    Ok(())
}

fn check_reset(cases: &mut Cases<'_>, case: &Reset, rng: &mut Rng) -> Result<()> {
    let [steps, rows, hidden, t, before] = case.sizes;
    let (depth, count) = (steps + 1, rows * hidden);
    // Draws repeat in large tensors.
    let mut draw = |len: usize| -> Vec<f32> { normal(rng, len.min(9973)).into_iter().cycle().take(len).collect() };
    let (mut slots, states, product) = (draw(steps * rows * 4 * hidden), draw(depth * count), draw(rows * 3 * hidden));
    let (unit, dseen, mut dh) = (draw(3 * hidden), draw(count), draw(count));
    dh.extend([NAN; 7]); // sums may lie behind it
    let place = |slot: usize, at: usize| ((t * rows + at / hidden) * 4 + slot) * hidden + at % hidden;
    let sum = |slots: &[f32], at: usize| -> f64 {
        let (row, u) = (at / hidden, at % hidden);
        f64::from(slots[place(0, at)]) + f64::from(product[row * 3 * hidden + u]) + f64::from(unit[u])
    };
    let h = |at: usize| f64::from(states[before * count + at]);
    // Far from a bound, where rounding decides the slope.
    for at in 0..count {
        if (sum(&slots, at).abs() - 1.0).abs() < 1e-3 {
            slots[place(0, at)] += 0.25;
        }
    }
    let mut seen = wide(&slots);
    for at in 0..count {
        seen[place(3, at)] = (case.gate)(sum(&slots, at)) * h(at);
    }
    // Backward finds r in slot 0.
    let mut kept = slots.clone();
    let mut gradients = vec![0.0; slots.len()];
    let mut dh64 = wide(&dh);
    for at in 0..count {
        let (x, d) = (sum(&slots, at), f64::from(dseen[at]));
        let r = (case.gate)(x);
        kept[place(0, at)] = r as f32;
        gradients[place(0, at)] = d * h(at) * (case.slope)(x);
        dh64[at] += d * r;
    }
    let step = |slot: usize| move |at: usize| at / (rows * 4 * hidden) == t && at / hidden % 4 == slot;
    cases.run(format!("{steps}x{rows}x{hidden}, step {t}, {}", case.name), |run| {
        let states = run.input("states", &states, [depth, rows, hidden])?;
        let (product, unit) = (run.input("product", &product, [rows, 3 * hidden])?, run.input("unit", &unit, [3 * hidden])?);
        let forward = Tensor::from_slice(run.device, &slots, [steps * rows, 4 * hidden])?;
        let at = GatedStep { rows, hidden, t, before, slots: &forward, states: &states };
        case.cell.forward(&at, &unit, &product)?;
        run.near_where("seen", &forward, &seen, TIGHT, step(3))?;
        elsewhere(run, &forward, &slots, step(3))?;

        let dseen = run.input("dseen", &dseen, [rows, hidden])?;
        let backward = Tensor::from_slice(run.device, &kept, [steps * rows, 4 * hidden])?;
        let dh_after = Tensor::from_slice(run.device, &dh, [dh.len()])?;
        case.cell.backward(&GatedStep { slots: &backward, ..at }, &dseen, &dh_after)?;
        run.near_where("dr", &backward, &gradients, GRADIENT, step(0))?;
        elsewhere(run, &backward, &kept, step(0))?;
        run.near_where("dh", &dh_after, &dh64, TIGHT, |at| at < count)?;
        elsewhere(run, &dh_after, &dh, |at| at < count)
    })
}

/// The numbers that `written` does not pick are what they were.
fn elsewhere(run: &mut Run<'_>, tensor: &Tensor, before: &[f32], written: impl Fn(usize) -> bool) -> Result<()> {
    let (words, before) = (run.read(tensor)?, to_bits(before));
    let others = |words: &[u32]| -> Vec<u32> { (0..words.len()).filter(|at| !written(*at)).map(|at| words[at]).collect() };
    run.comparisons.push(Comparison::bits("the rest", &others(&words), &others(&before)));
    Ok(())
}
