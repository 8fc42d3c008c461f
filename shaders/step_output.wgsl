// The second launch of a step whose recurrence goes through an output: o = W_hr h + b from the h that the cell left. Rows past
// their end hold o, and y takes it. Backward what comes through it, then the cell. For sweep_step.wgsl, after step_projected.wgsl.

@group(0) @binding(9) var<storage, read_write> outputs: array<f32>; // [depth, B, R]: o of each step
@group(0) @binding(10) var<storage, read> douts: array<f32>;        // [T, B, R]: the whole gradient of o

override biased: bool = false; // whether unit_values is b [R]

const SUMS = 1u;
const FIRST = 0u;
const ALL = 1u;

fn seen_width() -> u32 { return params.hidden; }
fn made_width() -> u32 { return params.width; }

fn seen_at(row: u32) -> u32 { return state_at(0u, slot_after(step_of(params.t)), row, 0u); }
fn seen(at: u32) -> f32 { return states[at]; }

fn load_forward(unit: u32) -> Unit { return Unit(); }

fn step_forward(row: u32, unit: u32, r: Sums, p: Unit) {
    let t = step_of(params.t);
    let valid = is_valid(t, row);
    var o = r[0];
    if biased { o += unit_values[side * params.next_unit + unit]; }
    y[y_at(t, row, unit)] = select(0.0, o, valid);
    outputs[output_at(slot_after(t), row, unit)] = select(outputs[output_at(slot_before(t), row, unit)], o, valid);
}

fn dmade_at(gate: u32, row: u32) -> u32 { return dout_at(step_of(params.t), row, 0u); }
fn dmade(at: u32) -> f32 { return douts[at]; }

fn load_backward(unit: u32) -> Unit { return load_unit(unit); }

// o is all that sees h.
fn step_backward(row: u32, unit: u32, dh: f32, p: Unit) -> UnitBackward {
    var d = load_gradient(row, unit);
    d[0] = dh;
    return run_cell_backward(row, unit, d, p);
}
