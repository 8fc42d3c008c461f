// One time step of any cell in one dispatch: the product with W_hh for a tile of rows x units, all gates, then the cell.
// Composed with cell_contract.wgsl and one cell file. The host launches forward for each step in the direction's order,
// backward for each step in the opposite order.
//
// A lane owns one unit with all its gates and ROWS rows of the batch: 4 rows and 4 gates make 16 multiply-adds of 8 loads.
// Neighbouring lanes read neighbouring weights, and no lane needs another's results, so there are no barriers.

struct Sweep {
    rows: u32,   // B
    hidden: u32, // H
    depth: u32,  // slots that `states` has for each state: T + 1, or 2 when nothing is kept for backward
    t: u32,      // this step
    before: u32, // slot of the state before it
    after: u32,  // slot of the state after it
    later: u32,  // backward: the step handled before this one
    recurrent: u32, // backward: 1 where there is such a step
    ragged: u32, // 1: steps past lengths[row] hold the state and output zeros
    keep: u32,   // forward: 1: store what backward needs
    y_stride: u32,
    y_offset: u32,
    key0: u32,
    key1: u32,
}

@group(0) @binding(0) var<uniform> params: Sweep;
@group(0) @binding(1) var<storage, read_write> slots: array<f32>;   // [T, B, SLOTS, H]: input part in, saved out, gradients out
@group(0) @binding(2) var<storage, read_write> states: array<f32>;  // [STATES, depth, B, H]
@group(0) @binding(3) var<storage, read> weights: array<f32>;       // forward: W_hh transposed [H, GATES * H]; backward: W_hh [GATES * H, H]
@group(0) @binding(4) var<storage, read> unit_params: array<f32>;   // [PARAMS, H]
@group(0) @binding(5) var<storage, read> lengths: array<u32>;       // [B]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;       // [T, B, y_stride]: forward: written; backward: dy, only read
@group(0) @binding(7) var<storage, read_write> dstates: array<f32>; // [STATES, B, H]: gradient of the state, from later steps to earlier ones

const LANES = 64u;
const ROWS = 4u;  // of a lane, written out below as the components of a vector
const UNITS = 4u; // of a lane in backward, likewise

fn slot_at(t: u32, row: u32, slot: u32, unit: u32) -> u32 {
    return ((t * params.rows + row) * SLOTS + slot) * params.hidden + unit;
}

fn load_state(slot: u32, row: u32, unit: u32) -> State {
    var state: State;
    for (var s = 0u; s < STATES; s++) {
        state[s] = states[((s * params.depth + slot) * params.rows + row) * params.hidden + unit];
    }
    return state;
}

fn load_unit(unit: u32) -> Unit {
    var p: Unit;
    for (var i = 0u; i < PARAMS; i++) { p[i] = unit_params[i * params.hidden + unit]; }
    return p;
}

fn is_valid(row: u32) -> bool {
    if params.ragged == 0u { return true; }
    return params.t < lengths[row];
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let unit = group.x * LANES + lane;
    let row = (group.z * groups.y + group.y) * ROWS; // rows go on in z where y is full
    let H = params.hidden;
    if unit >= H || row >= params.rows { return; }

    // r[gate] holds ROWS rows. Rows past the end repeat the last one; their results are not stored.
    var r: array<vec4<f32>, GATES>;
    for (var g = 0u; g < GATES; g++) { r[g] = vec4<f32>(); }
    let h0 = params.before * params.rows;
    let last = params.rows - 1u;
    let at0 = (h0 + min(row, last)) * H;
    let at1 = (h0 + min(row + 1u, last)) * H;
    let at2 = (h0 + min(row + 2u, last)) * H;
    let at3 = (h0 + min(row + 3u, last)) * H;
    var w = unit;
    for (var k = 0u; k < H; k++) {
        let h = vec4(states[at0 + k], states[at1 + k], states[at2 + k], states[at3 + k]);
        for (var g = 0u; g < GATES; g++) { r[g] += h * weights[w + g * H]; }
        w += GATES * H;
    }

    let p = load_unit(unit);
    for (var i = 0u; i < ROWS && row + i < params.rows; i++) {
        var product: Pre;
        for (var g = 0u; g < GATES; g++) { product[g] = r[g][i]; }
        step_forward(row + i, unit, product, p);
    }
}

fn step_forward(row: u32, unit: u32, r: Pre, p: Unit) {
    var x: Pre;
    for (var g = 0u; g < GATES; g++) { x[g] = slots[slot_at(params.t, row, g, unit)]; }
    let previous = load_state(params.before, row, unit);
    let valid = is_valid(row);
    let out = cell_forward(Site(params.key0, params.key1, params.t, row, unit), x, r, previous, p);
    for (var s = 0u; s < STATES; s++) {
        states[((s * params.depth + params.after) * params.rows + row) * params.hidden + unit] = select(previous[s], out.state[s], valid);
    }
    if params.keep == 1u {
        for (var s = 0u; s < SLOTS; s++) { slots[slot_at(params.t, row, s, unit)] = out.saved[s]; }
    }
    y[(params.t * params.rows + row) * params.y_stride + params.y_offset + unit] = select(0.0, out.state[0], valid);
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
    let unit = group.x * LANES + lane;
    let row = (group.z * groups.y + group.y) * ROWS;
    if unit >= stride || row >= params.rows { return; }

    // The gradient that comes back through W_hh from the step handled before; units and rows past the end as above.
    var dh0 = vec4<f32>(); var dh1 = vec4<f32>(); var dh2 = vec4<f32>(); var dh3 = vec4<f32>();
    if params.recurrent == 1u {
        let last = params.rows - 1u;
        let units = min(vec4(unit) + vec4(0u, 1u, 2u, 3u) * stride, vec4(H - 1u));
        for (var g = 0u; g < GATES; g++) {
            let slot = recurrent_slot(g);
            let at0 = slot_at(params.later, row, slot, 0u);
            let at1 = slot_at(params.later, min(row + 1u, last), slot, 0u);
            let at2 = slot_at(params.later, min(row + 2u, last), slot, 0u);
            let at3 = slot_at(params.later, min(row + 3u, last), slot, 0u);
            var w = vec4(g * H * H) + units;
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
        let dh = vec4(dh0[i], dh1[i], dh2[i], dh3[i]);
        for (var j = 0u; j < ROWS && row + j < params.rows; j++) { step_backward(row + j, unit + i * stride, dh[j], p); }
    }
}

fn step_backward(row: u32, unit: u32, dh: f32, p: Unit) {
    var d: State;
    for (var s = 0u; s < STATES; s++) { d[s] = dstates[(s * params.rows + row) * params.hidden + unit]; }
    d[0] += dh;
    var dslots: Slots;
    for (var s = 0u; s < SLOTS; s++) { dslots[s] = 0.0; }
    if is_valid(row) {
        d[0] += y[(params.t * params.rows + row) * params.y_stride + params.y_offset + unit];
        var saved: Slots;
        for (var s = 0u; s < SLOTS; s++) { saved[s] = slots[slot_at(params.t, row, s, unit)]; }
        let previous = load_state(params.before, row, unit);
        let out = cell_backward(Site(params.key0, params.key1, params.t, row, unit), saved, previous, p, d);
        dslots = out.dslots;
        d = out.dprevious;
    }
    for (var s = 0u; s < SLOTS; s++) { slots[slot_at(params.t, row, s, unit)] = dslots[s]; }
    for (var s = 0u; s < STATES; s++) { dstates[(s * params.rows + row) * params.hidden + unit] = d[s]; }
}
