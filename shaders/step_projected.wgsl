// The first launch of a step whose recurrence goes through an output o = W_hr h + b (projection; a Jordan network): the product of
// all gates with o, then the cell. Backward it is the first of a step as well: what came through this product at the step handled
// before, then the whole gradient of o. For sweep_step.wgsl; step_output.wgsl is the other launch.

@group(0) @binding(9) var<storage, read_write> outputs: array<f32>; // [depth, B, R]: o of each step
@group(0) @binding(10) var<storage, read_write> douts: array<f32>;  // [T, B, R]: the whole gradient of o
@group(0) @binding(11) var<storage, read_write> carried: array<f32>; // [B, R]: that of o from later steps, for rows that hold it

const SUMS = GATES;
const FIRST = 0u;
const ALL = GATES;

fn seen_width() -> u32 { return params.width; }
fn made_width() -> u32 { return params.hidden; }

fn seen_at(row: u32) -> u32 { return output_at(slot_before(step_of(params.t)), row, 0u); }
fn seen(at: u32) -> f32 { return outputs[at]; }

fn load_forward(unit: u32) -> Unit { return load_unit(unit); }

fn step_forward(row: u32, unit: u32, r: Sums, p: Unit) { run_cell(row, unit, r, p); }

fn dmade_at(gate: u32, row: u32) -> u32 { return slot_at(step_later(), row, recurrent_slot(gate), 0u); }
fn dmade(at: u32) -> f32 { return slots[at]; }

fn load_backward(unit: u32) -> Unit { return Unit(); }

fn step_backward(row: u32, unit: u32, d: f32, p: Unit) -> UnitBackward {
    let t = step_of(params.t);
    let at = side * params.next_carried + row * params.width + unit;
    let later = carried[at] + d;
    let ends_here = params.finish == 0u && is_valid(t, row);
    carried[at] = select(later, 0.0, ends_here);
    if params.finish == 0u {
        var dout = 0.0;
        if ends_here { dout = later + y[y_at(t, row, unit)]; }
        douts[dout_at(t, row, unit)] = dout;
    }
    var nothing: UnitBackward;
    return nothing;
}
