// A product that sees h before the step. Backward: what came through it at the step handled before, then the cell. For step_whole.wgsl
// and step_reset.wgsl.

fn seen_width() -> u32 { return params.hidden; }
fn made_width() -> u32 { return params.hidden; }

fn seen_at(row: u32) -> u32 { return state_at(0u, slot_before(step_of(params.t)), row, 0u); }
fn seen(at: u32) -> f32 { return states[at]; }

fn load_forward(unit: u32) -> Unit { return load_unit(unit); }

// Of the step handled before this one.
fn dmade_at(gate: u32, row: u32) -> u32 { return slot_at(step_later(), row, recurrent_slot(gate), 0u); }
fn dmade(at: u32) -> f32 { return slots[at]; }

fn load_backward(unit: u32) -> Unit { return load_unit(unit); }

fn step_backward(row: u32, unit: u32, dh: f32, p: Unit) -> UnitBackward {
    var d = load_gradient(row, unit);
    d[0] += dh;
    if params.finish == 0u { return run_cell_backward(row, unit, d, p); }
    store_gradient(row, unit, d); // nothing but the product is wanted
    var nothing: UnitBackward;
    return nothing;
}
