// A step in one launch: the product of all gates with h, then the cell. For sweep_step.wgsl.

const SUMS = GATES;
const FIRST = 0u;
const ALL = GATES;

fn seen_width() -> u32 { return params.hidden; }
fn made_width() -> u32 { return params.hidden; }

// h before the step.
fn seen_at(row: u32) -> u32 { return state_at(0u, slot_before(step_of(params.t)), row, 0u); }
fn seen(at: u32) -> f32 { return states[at]; }

fn load_forward(unit: u32) -> Unit { return load_unit(unit); }

fn step_forward(row: u32, unit: u32, r: Sums, p: Unit) { run_cell(row, unit, r, p); }

fn dmade_at(gate: u32, row: u32) -> u32 { return slot_at(step_later(), row, recurrent_slot(gate), 0u); }
fn dmade(at: u32) -> f32 { return slots[at]; }

fn load_backward(unit: u32) -> Unit { return load_unit(unit); }

fn step_backward(row: u32, unit: u32, dh: f32, p: Unit) -> UnitBackward { return step_backward_through(row, unit, dh, p); }
