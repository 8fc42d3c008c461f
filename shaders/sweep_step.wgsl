// One time step of any cell in one dispatch, of one direction or both: the product with W_hh for a tile of rows x units, all gates, then
// the cell. Composed with sweep_unit.wgsl, cell_contract.wgsl, one cell file and hold.wgsl. The host launches forward for each step in
// the direction's order, backward for each step in the opposite order. Where something comes between the product and the cell (see
// src/kernels/sweep_split.rs) the host launches `forward_split`, which is given the product, and backward without one.
//
// A lane owns one unit with all its gates and ROWS rows of the batch: 4 rows and 4 gates make 16 multiply-adds of 8 loads.
// Neighbouring lanes read neighbouring weights, and no lane needs another's results, so there are no barriers.

@group(0) @binding(8) var<storage, read> products: array<f32>; // forward_split: [B, GATES, H]

const LANES = 64u;
const ROWS = 4u;  // of a lane, written out below as the components of a vector
const UNITS = 4u; // of a lane in backward, likewise

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = take_tile(group, groups);
    let unit = tile.x * LANES + lane;
    let row = tile.y * ROWS;
    let H = params.hidden;
    if unit >= H || row >= params.rows { return; }

    // r[gate] holds ROWS rows. Rows past the end repeat the last one; their results are not stored.
    var r: array<vec4<f32>, GATES>;
    for (var g = 0u; g < GATES; g++) { r[g] = vec4<f32>(); }
    let before = slot_before(step_of(params.t));
    let last = params.rows - 1u;
    let at0 = state_at(0u, before, min(row, last), 0u);
    let at1 = state_at(0u, before, min(row + 1u, last), 0u);
    let at2 = state_at(0u, before, min(row + 2u, last), 0u);
    let at3 = state_at(0u, before, min(row + 3u, last), 0u);
    var w = first_weight() + unit;
    for (var k = 0u; PRODUCT && k < H; k++) {
        let h = vec4(states[at0 + k], states[at1 + k], states[at2 + k], states[at3 + k]);
        for (var g = 0u; g < GATES; g++) { r[g] += h * weights[w + g * H]; }
        w += GATES * H;
    }

    let p = load_unit(unit);
    for (var i = 0u; i < ROWS && row + i < params.rows; i++) {
        var product: Pre;
        for (var g = 0u; g < GATES; g++) { product[g] = component(r[g], i); }
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
    for (var g = 0u; g < GATES; g++) { product[g] = products[(row * GATES + g) * params.hidden + unit]; }
    step_forward(row, unit, product, load_unit(unit));
}

fn step_forward(row: u32, unit: u32, r: Pre, p: Unit) {
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
    let H = params.hidden;
    let stride = (H + UNITS - 1u) / UNITS;
    let tile = take_tile(group, groups);
    let unit = tile.x * LANES + lane;
    let row = tile.y * ROWS;
    if unit >= stride || row >= params.rows { return; }

    // The gradient that comes back through W_hh from the step handled before; units and rows past the end as above.
    var dh0 = vec4<f32>(); var dh1 = vec4<f32>(); var dh2 = vec4<f32>(); var dh3 = vec4<f32>();
    if PRODUCT && params.recurrent == 1u {
        let later = step_later();
        let last = params.rows - 1u;
        let units = min(vec4(unit) + vec4(0u, 1u, 2u, 3u) * stride, vec4(H - 1u));
        for (var g = 0u; g < GATES; g++) {
            let slot = recurrent_slot(g);
            let at0 = slot_at(later, row, slot, 0u);
            let at1 = slot_at(later, min(row + 1u, last), slot, 0u);
            let at2 = slot_at(later, min(row + 2u, last), slot, 0u);
            let at3 = slot_at(later, min(row + 3u, last), slot, 0u);
            var w = vec4(first_weight() + g * H * H) + units;
            for (var k = 0u; k < H; k++) {
                let values = vec4(weights[w.x], weights[w.y], weights[w.z], weights[w.w]);
                dh0 += slots[at0 + k] * values; dh1 += slots[at1 + k] * values;
                dh2 += slots[at2 + k] * values; dh3 += slots[at3 + k] * values;
                w += vec4(H);
            }
        }
    }

    for (var i = 0u; i < UNITS && unit + i * stride < H; i++) {
        let p = load_unit(unit + i * stride);
        let dh = vec4(component(dh0, i), component(dh1, i), component(dh2, i), component(dh3, i));
        var dunit: Unit;
        for (var j = 0u; j < PARAMS; j++) { dunit[j] = 0.0; }
        var clipped = 0u;
        for (var j = 0u; j < ROWS && row + j < params.rows; j++) {
            let step = step_backward(row + j, unit + i * stride, component(dh, j), p);
            for (var k = BIASES; k < PARAMS; k++) { dunit[k] += step.dunit[k]; }
            clipped += step.clipped;
        }
        if sums { add_sums(row / ROWS, unit + i * stride, dunit, clipped); }
    }
}

// The step that was handled before this one; where only the product is wanted, this one.
fn step_later() -> u32 { return step_of(params.t + 1u - params.finish); }

fn step_backward(row: u32, unit: u32, dh: f32, p: Unit) -> UnitBackward {
    var d = load_gradient(row, unit);
    d[0] += dh;
    var step: UnitBackward;
    if params.finish == 1u {
        step.d = d;
    } else {
        let t = step_of(params.t);
        step = backward_unit(t, row, unit, load_kept(t, row, unit), d, p);
    }
    store_gradient(row, unit, step.d);
    return step;
}
