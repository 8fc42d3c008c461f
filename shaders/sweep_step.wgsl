// One time step of any cell, of one side or two: a product for a tile of rows x units, then what follows it. Composed with
// sweep_unit.wgsl, cell_contract.wgsl, one cell file and hold.wgsl, and with one file that says what is multiplied and what is made of it:
//     step_whole.wgsl          all gates from h, then the cell: the whole step in one dispatch
//     step_projected.wgsl, then step_output.wgsl: the gates from the output o and the cell, then o from the cell's h
//     step_reset.wgsl, then step_candidate.wgsl: r and z from h, then n from r h and the cell: a GRU with the reset before the product
// Such a file, with step_from_h.wgsl where it starts from h, defines
//     SUMS, FIRST, ALL         gates that its product makes, the first of them, and how many its matrix has
//     seen_width, made_width   the numbers that a product of a row sees, and those that each gate makes of them
//     seen_at, seen            where those of a row lie; one of them
//     load_forward, step_forward    what follows, for a row and one of the numbers made, and what it wants to know of the latter
//     dmade_at, dmade, load_backward, step_backward    the same backward, where the product makes gradients of what was seen from those
//                              of what was made
// and the host launches forward for each step in the order in which a side reads them, backward in the opposite order. Where there is
// more around the product (see src/kernels/sweep_split.rs) it launches `forward_split`, which is given the product, and backward
// without one.
//
// A lane owns one unit with all its gates and ROWS rows of the batch: 4 rows and 4 gates make 16 multiply-adds of 8 loads.
// Neighbouring lanes read neighbouring weights, and no lane needs another's results, so there are no barriers.

@group(0) @binding(8) var<storage, read_write> products: array<f32>; // [B, GATES, H]: forward_split is given them; and see step_reset.wgsl

const LANES = 64u;
const ROWS = 4u;  // of a lane, written out below as the components of a vector
const UNITS = 4u; // of a lane in backward, likewise

alias Sums = array<f32, SUMS>;

fn product_at(row: u32, gate: u32, unit: u32) -> u32 {
    return side * params.next_between + (row * GATES + gate) * params.hidden + unit;
}

fn output_at(slot: u32, row: u32, unit: u32) -> u32 {
    return side * params.next_between + (slot * params.rows + row) * params.width + unit;
}

fn dout_at(t: u32, row: u32, unit: u32) -> u32 {
    return side * params.next_douts + (t * params.rows + row) * params.width + unit;
}

// The weight with which number k of those seen goes into a unit of the first gate; those of the next gates are made_width() apart.
fn forward_weight(k: u32, unit: u32) -> u32 { return first_weight() + (k * ALL + FIRST) * made_width() + unit; }

// The weight with which the gradient of number k of a gate goes into that of a number seen.
fn backward_weight(gate: u32, k: u32, unit: u32) -> u32 {
    return first_weight() + ((FIRST + gate) * made_width() + k) * seen_width() + unit;
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = take_tile(group, groups);
    let unit = tile.x * LANES + lane;
    let row = tile.y * ROWS;
    let seen_count = seen_width();
    let made_count = made_width();
    if unit >= made_count || row >= params.rows { return; }

    // r[gate] holds ROWS rows. Rows past the end repeat the last one; their results are not stored.
    var r: array<vec4<f32>, SUMS>;
    for (var g = 0u; g < SUMS; g++) { r[g] = vec4<f32>(); }
    let last = params.rows - 1u;
    let at0 = seen_at(min(row, last));
    let at1 = seen_at(min(row + 1u, last));
    let at2 = seen_at(min(row + 2u, last));
    let at3 = seen_at(min(row + 3u, last));
    var w = forward_weight(0u, unit);
    for (var k = 0u; PRODUCT && k < seen_count; k++) {
        let h = vec4(seen(at0 + k), seen(at1 + k), seen(at2 + k), seen(at3 + k));
        for (var g = 0u; g < SUMS; g++) { r[g] += h * weights[w + g * made_count]; }
        w += ALL * made_count;
    }

    let p = load_forward(unit);
    for (var i = 0u; i < ROWS && row + i < params.rows; i++) {
        var product: Sums;
        for (var g = 0u; g < SUMS; g++) { product[g] = component(r[g], i); }
        step_forward(row + i, unit, product, p);
    }
}

// The same for one row and unit a lane, with the product given.
@compute @workgroup_size(LANES)
fn forward_split(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = take_tile(group, groups);
    let unit = tile.x * LANES + lane;
    let row = tile.y;
    if unit >= params.hidden || row >= params.rows { return; }
    var product: Pre;
    for (var g = 0u; g < GATES; g++) { product[g] = products[product_at(row, g, unit)]; }
    run_cell(row, unit, product, load_unit(unit));
}

fn run_cell(row: u32, unit: u32, r: Pre, p: Unit) {
    let t = step_of(params.t);
    let previous = load_state(slot_before(t), row, unit);
    let x = load_input(t, row, unit);
    store_state(slot_after(t), row, unit, forward_unit(t, row, unit, x, r, previous, p));
}

// A lane owns UNITS units here, `stride` apart, because only one weight is read for each unit and k.
@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let seen_count = seen_width();
    let made_count = made_width();
    let stride = (seen_count + UNITS - 1u) / UNITS;
    let tile = take_tile(group, groups);
    let unit = tile.x * LANES + lane;
    let row = tile.y * ROWS;
    if unit >= stride || row >= params.rows { return; }

    // The gradients that come back through the product; units and rows past the end as above.
    var d0 = vec4<f32>(); var d1 = vec4<f32>(); var d2 = vec4<f32>(); var d3 = vec4<f32>();
    if PRODUCT && params.recurrent == 1u {
        let last = params.rows - 1u;
        let units = min(vec4(unit) + vec4(0u, 1u, 2u, 3u) * stride, vec4(seen_count - 1u));
        for (var g = 0u; g < SUMS; g++) {
            let at0 = dmade_at(g, row);
            let at1 = dmade_at(g, min(row + 1u, last));
            let at2 = dmade_at(g, min(row + 2u, last));
            let at3 = dmade_at(g, min(row + 3u, last));
            var w = vec4(backward_weight(g, 0u, 0u)) + units;
            for (var k = 0u; k < made_count; k++) {
                let values = vec4(weights[w.x], weights[w.y], weights[w.z], weights[w.w]);
                d0 += dmade(at0 + k) * values; d1 += dmade(at1 + k) * values;
                d2 += dmade(at2 + k) * values; d3 += dmade(at3 + k) * values;
                w += vec4(seen_count);
            }
        }
    }

    for (var i = 0u; i < UNITS && unit + i * stride < seen_count; i++) {
        let p = load_backward(unit + i * stride);
        let d = vec4(component(d0, i), component(d1, i), component(d2, i), component(d3, i));
        var dunit: Unit;
        for (var j = 0u; j < PARAMS; j++) { dunit[j] = 0.0; }
        var clipped = 0u;
        for (var j = 0u; j < ROWS && row + j < params.rows; j++) {
            let step = step_backward(row + j, unit + i * stride, component(d, j), p);
            for (var k = BIASES; k < PARAMS; k++) { dunit[k] += step.dunit[k]; }
            clipped += step.clipped;
        }
        if sums { add_sums(row / ROWS, unit + i * stride, dunit, clipped); }
    }
}

// The step that was handled before this one; where only its product is wanted, this one.
fn step_later() -> u32 { return step_of(params.t + 1u - params.finish); }

// d: the gradient that later steps give the state.
fn run_cell_backward(row: u32, unit: u32, d: State, p: Unit) -> UnitBackward {
    let t = step_of(params.t);
    let step = backward_unit(t, row, unit, load_kept(t, row, unit), d, p);
    store_gradient(row, unit, step.d);
    return step;
}
