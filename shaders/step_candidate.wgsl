// The second launch of a step of a GRU whose reset gate acts before the product: that of n, which sees r h, then the cell.
// Backward what comes through it: the gradients of r and h. For sweep_step.wgsl and cell_gru.wgsl, after step_reset.wgsl.

const SUMS = 1u;
const FIRST = 2u;
const ALL = GATES;

fn seen_width() -> u32 { return params.hidden; }
fn made_width() -> u32 { return params.hidden; }

fn seen_at(row: u32) -> u32 { return product_at(row, 2u, 0u); }
fn seen(at: u32) -> f32 { return products[at]; }

fn load_forward(unit: u32) -> Unit { return load_unit(unit); }

fn step_forward(row: u32, unit: u32, r: Sums, p: Unit) {
    run_cell(row, unit, Pre(products[product_at(row, 0u, unit)], products[product_at(row, 1u, unit)], r[0]), p);
}

fn dmade_at(gate: u32, row: u32) -> u32 { return slot_at(step_of(params.t), row, 2u, 0u); }
fn dmade(at: u32) -> f32 { return slots[at]; }

fn load_backward(unit: u32) -> Unit { return Unit(); }

// Slot 0, which holds r, becomes the gradient of its pre-activation. All is zero in rows past their end, as d is.
fn step_backward(row: u32, unit: u32, d: f32, p: Unit) -> UnitBackward {
    let t = step_of(params.t);
    let at = slot_at(t, row, 0u, unit);
    let r = slots[at];
    slots[at] = d * states[state_at(0u, slot_before(t), row, unit)] * gate_slope(r);
    dstates[gradient_at(0u, row, unit)] += d * r;
    var nothing: UnitBackward;
    return nothing;
}
