// One time step of any cell in one dispatch: the product with W_hh for a tile of rows x units, all gates, then the cell.
// Composed with cell_contract.wgsl, one cell file and hold.wgsl. The host launches forward for each step in the direction's
// order, backward for each step in the opposite order. Where something comes between the product and the cell (see
// src/kernels/sweep_split.rs) the host launches `forward_split`, which is given the product, and backward without one.
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
    finish: u32, // backward: 1: nothing but the product of the first step, for the gradient of the initial state
    ragged: u32, // 1: steps past lengths[row] hold the state and output zeros
    keep: u32,   // forward: 1: store what backward needs
    output: u32, // 1: y is this state 0 (backward: dy is its gradient); 0: y is made of it elsewhere
    y_stride: u32,
    y_offset: u32,
    key0: u32,
    key1: u32,
    start: u32,     // steps of the sequence before step 0
    random: u32,    // 1: zoneout draws; 0: it takes its mean
    zoneout_h: f32, // probabilities, of state 0 and of the others
    zoneout_c: f32,
    clip: f32,      // backward: a bound for each element of the gradient that later steps give; 0: none
    flow_at: u32,   // backward with `flow`: where the gradients of all steps start in dstates
}

@group(0) @binding(0) var<uniform> params: Sweep;
@group(0) @binding(1) var<storage, read_write> slots: array<f32>;   // [T, B, SLOTS, H]: input part in, saved out, gradients out
@group(0) @binding(2) var<storage, read_write> states: array<f32>;  // [STATES, depth, B, H]
@group(0) @binding(3) var<storage, read> weights: array<f32>;       // forward: W_hh transposed [H, GATES * H]; backward: W_hh [GATES * H, H]
@group(0) @binding(4) var<storage, read> unit_values: array<f32>;   // [unit_params, H]
@group(0) @binding(5) var<storage, read> lengths: array<u32>;       // [B]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;       // [T, B, y_stride]: forward: written; backward: dy, only read
// What goes from later steps to earlier ones: the gradient of the state [STATES, B, H]; then, where the cell or the clip needs
// them, sums for each tile of ROWS rows [tiles, SUMS, H]: the gradients of the unit parameters from BIASES on, and how often
// the clip acted; then, for the flow of the gradient, that of each state after each step [T, STATES, B, H].
@group(0) @binding(7) var<storage, read_write> dstates: array<f32>;
@group(0) @binding(8) var<storage, read> products: array<f32>; // forward_split: [B, GATES, H]

override sums: bool = false; // whether dstates has room for the sums
override flow: bool = false; // and for the gradients of all steps

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
    for (var i = 0u; i < PARAMS; i++) {
        p[i] = 0.0;
        if i < unit_params { p[i] = unit_values[i * params.hidden + unit]; }
    }
    return p;
}

fn site_of(row: u32, unit: u32) -> Site {
    return Site(params.key0, params.key1, params.start + params.t, row, unit);
}

// What part of state s is held back.
fn held(site: Site, s: u32) -> f32 {
    return hold_factor(site, s, select(params.zoneout_c, params.zoneout_h, s == 0u), params.random == 1u);
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
    for (var k = 0u; PRODUCT && k < H; k++) {
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

// The same for one row and unit a lane, with the product given.
@compute @workgroup_size(LANES)
fn forward_split(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let unit = group.x * LANES + lane;
    let row = group.z * groups.y + group.y;
    if unit >= params.hidden || row >= params.rows { return; }
    var product: Pre;
    for (var g = 0u; g < GATES; g++) { product[g] = products[(row * GATES + g) * params.hidden + unit]; }
    step_forward(row, unit, product, load_unit(unit));
}

fn step_forward(row: u32, unit: u32, r: Pre, p: Unit) {
    var x: Pre;
    for (var g = 0u; g < GATES; g++) { x[g] = slots[slot_at(params.t, row, g, unit)]; }
    let previous = load_state(params.before, row, unit);
    let valid = is_valid(row);
    let site = site_of(row, unit);
    let out = cell_forward(site, x, r, previous, p);
    var state = out.state;
    if zoneout {
        for (var s = 0u; s < STATES; s++) {
            let k = held(site, s);
            state[s] = k * previous[s] + (1.0 - k) * state[s];
        }
    }
    for (var s = 0u; s < STATES; s++) {
        states[((s * params.depth + params.after) * params.rows + row) * params.hidden + unit] = select(previous[s], state[s], valid);
    }
    if params.keep == 1u {
        for (var s = 0u; s < SLOTS; s++) { slots[slot_at(params.t, row, s, unit)] = out.saved[s]; }
    }
    if params.output == 1u { y[y_at(row, unit)] = select(0.0, state[0], valid); }
}

fn y_at(row: u32, unit: u32) -> u32 {
    return (params.t * params.rows + row) * params.y_stride + params.y_offset + unit;
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
    if PRODUCT && params.recurrent == 1u {
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
        var dunit: Unit;
        for (var j = 0u; j < PARAMS; j++) { dunit[j] = 0.0; }
        var clipped = 0u;
        for (var j = 0u; j < ROWS && row + j < params.rows; j++) {
            let step = step_backward(row + j, unit + i * stride, dh[j], p);
            for (var k = BIASES; k < PARAMS; k++) { dunit[k] += step.dunit[k]; }
            clipped += step.clipped;
        }
        if sums { add_sums(row / ROWS, unit + i * stride, dunit, clipped); }
    }
}

fn add_sums(tile: u32, unit: u32, dunit: Unit, clipped: u32) {
    let counts = unit_params - BIASES; // the line of the counts, after those of the unit parameters
    let at = STATES * params.rows * params.hidden + tile * (counts + 1u) * params.hidden + unit;
    for (var k = BIASES; k < PARAMS; k++) {
        if k < unit_params { dstates[at + (k - BIASES) * params.hidden] += dunit[k]; }
    }
    dstates[at + counts * params.hidden] += f32(clipped);
}

// The whole gradient of each state after this step, behind the sums.
fn store_flow(row: u32, unit: u32, d: State) {
    for (var s = 0u; s < STATES; s++) {
        dstates[params.flow_at + ((params.t * STATES + s) * params.rows + row) * params.hidden + unit] = d[s];
    }
}

struct StepBackward { dunit: Unit, clipped: u32 }

fn step_backward(row: u32, unit: u32, dh: f32, p: Unit) -> StepBackward {
    var result: StepBackward;
    var d: State;
    for (var s = 0u; s < STATES; s++) { d[s] = dstates[(s * params.rows + row) * params.hidden + unit]; }
    d[0] += dh;
    if params.finish == 1u {
        dstates[row * params.hidden + unit] = d[0];
        return result;
    }
    var dslots: Slots;
    for (var s = 0u; s < SLOTS; s++) { dslots[s] = 0.0; }
    var totals: State;
    if is_valid(row) {
        for (var s = 0u; s < STATES; s++) {
            let kept = clip_to(params.clip, d[s]);
            result.clipped += select(0u, 1u, kept != d[s] && !is_nan_bits(kept));
            d[s] = kept;
        }
        if params.output == 1u { d[0] += y[y_at(row, unit)]; }
        var saved: Slots;
        for (var s = 0u; s < SLOTS; s++) { saved[s] = slots[slot_at(params.t, row, s, unit)]; }
        let previous = load_state(params.before, row, unit);
        let site = site_of(row, unit);
        var held_back: State; // its gradient passes the cell by
        if flow && !zoneout { totals = cell_totals(saved, previous, p, d); }
        if zoneout {
            totals = d; // what was held back goes into nothing else of its step
            for (var s = 0u; s < STATES; s++) {
                let k = held(site, s);
                held_back[s] = k * d[s];
                d[s] -= held_back[s];
            }
        }
        let out = cell_backward(site, saved, previous, p, d);
        dslots = out.dslots;
        d = out.dprevious;
        if zoneout { for (var s = 0u; s < STATES; s++) { d[s] += held_back[s]; } }
        result.dunit = out.dunit;
    }
    if flow { store_flow(row, unit, totals); }
    for (var s = 0u; s < SLOTS; s++) { slots[slot_at(params.t, row, s, unit)] = dslots[s]; }
    for (var s = 0u; s < STATES; s++) { dstates[(s * params.rows + row) * params.hidden + unit] = d[s]; }
    return result;
}
