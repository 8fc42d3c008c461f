// The sweep over time as a scan, for a cell that is linear in its one state, h = a h' + b with a and b functions of x alone. A
// step sweep is a dispatch for each step, which few rows and units cannot fill; here time is cut into blocks of BLOCK steps, and
// all of them run at once. Composed with cell_contract.wgsl and a cell file that also defines
//     fn scan_coefficients(x: Pre) -> vec2<f32>   a and b
//     fn scan_decay(saved: Slots) -> f32          a, from what is kept for backward
// Three dispatches: `fold` makes of each block one step, h = A h' + B; `carry` goes over the blocks in their order, to the state
// before each; `forward` runs the cell over each block from there. Backward the gradient d of the state goes from step to step as
// d' = a (d + dy), so that it is a scan too, in the opposite order: `fold_backward`, `carry`, `backward`.

struct Scan {
    rows: u32,   // B
    hidden: u32, // H
    steps: u32,  // T
    blocks: u32,
    reverse: u32,    // 1: the state after step t is slot t, and the one before it t + 1
    descending: u32, // 1: this scan computes the last step first
    ragged: u32,     // 1: steps past lengths[row] hold the state and output zeros
    keep: u32,       // forward: 1: store every state, and what backward needs; 0: the last state alone
    edge: u32,       // where in `edges` the first state or gradient lies
    last: u32,       // slot of the last state
    y_stride: u32,
    y_offset: u32,
}

@group(0) @binding(0) var<uniform> params: Scan;
@group(0) @binding(1) var<storage, read_write> slots: array<f32>;   // [T, B, SLOTS, H]: input part in, saved out, gradients out
@group(0) @binding(2) var<storage, read_write> states: array<f32>;  // [depth, B, H]
@group(0) @binding(3) var<storage, read> lengths: array<u32>;       // [B]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;       // [T, B, y_stride]: forward: written; backward: dy, only read
@group(0) @binding(5) var<storage, read_write> dstates: array<f32>; // [B, H]: backward: the first state's gradient goes out
@group(0) @binding(6) var<storage, read_write> carries: array<f32>; // [blocks, 2, B, H]: A and B; then in place of A what comes in
@group(0) @binding(7) var<storage, read> edges: array<f32>;         // carry: what comes into the first block: `states` or `dstates`

const LANES = 64u;
const BLOCK = 32u;

// A lane owns a unit of a row over a block of steps.
struct Place { unit: u32, row: u32, block: u32, first: u32, end: u32, exists: bool }

fn place_of(group: vec3<u32>, groups: vec3<u32>, lane: u32) -> Place {
    let unit = group.x * LANES + lane;
    let line = group.z * groups.y + group.y; // lines go on in z where y is full
    let block = line / params.rows;
    let end = min((block + 1u) * BLOCK, params.steps);
    return Place(unit, line % params.rows, block, block * BLOCK, end, unit < params.hidden && block < params.blocks);
}

// The n-th step of the scan.
fn time_of(n: u32) -> u32 { return select(n, params.steps - 1u - n, params.descending == 1u); }

fn is_valid(t: u32, row: u32) -> bool {
    if params.ragged == 0u { return true; }
    return t < lengths[row];
}

fn slot_at(t: u32, row: u32, slot: u32, unit: u32) -> u32 {
    return ((t * params.rows + row) * SLOTS + slot) * params.hidden + unit;
}

fn state_at(slot: u32, row: u32, unit: u32) -> u32 { return (slot * params.rows + row) * params.hidden + unit; }

fn carry_at(block: u32, part: u32, row: u32, unit: u32) -> u32 {
    return ((block * 2u + part) * params.rows + row) * params.hidden + unit;
}

fn y_at(t: u32, row: u32, unit: u32) -> u32 {
    return (t * params.rows + row) * params.y_stride + params.y_offset + unit;
}

fn load_input(t: u32, row: u32, unit: u32) -> Pre {
    var x: Pre;
    for (var g = 0u; g < GATES; g++) { x[g] = slots[slot_at(t, row, g, unit)]; }
    return x;
}

fn load_saved(t: u32, row: u32, unit: u32) -> Slots {
    var saved: Slots;
    for (var s = 0u; s < SLOTS; s++) { saved[s] = slots[slot_at(t, row, s, unit)]; }
    return saved;
}

@compute @workgroup_size(LANES)
fn fold(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = place_of(group, groups, lane);
    if !at.exists { return; }
    var a = 1.0;
    var b = 0.0;
    for (var n = at.first; n < at.end; n++) {
        let t = time_of(n);
        if is_valid(t, at.row) {
            let step = scan_coefficients(load_input(t, at.row, at.unit));
            a = step.x * a;
            b = step.x * b + step.y;
        }
    }
    carries[carry_at(at.block, 0u, at.row, at.unit)] = a;
    carries[carry_at(at.block, 1u, at.row, at.unit)] = b;
}

@compute @workgroup_size(LANES)
fn fold_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = place_of(group, groups, lane);
    if !at.exists { return; }
    var a = 1.0;
    var b = 0.0;
    for (var n = at.first; n < at.end; n++) {
        let t = time_of(n);
        if is_valid(t, at.row) {
            let decay = scan_decay(load_saved(t, at.row, at.unit));
            a = decay * a;
            b = decay * (b + y[y_at(t, at.row, at.unit)]);
        }
    }
    carries[carry_at(at.block, 0u, at.row, at.unit)] = a;
    carries[carry_at(at.block, 1u, at.row, at.unit)] = b;
}

// A lane for each unit of each row.
@compute @workgroup_size(LANES)
fn carry(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = place_of(group, groups, lane);
    if !at.exists || at.block > 0u { return; }
    var value = edges[params.edge + at.row * params.hidden + at.unit];
    for (var block = 0u; block < params.blocks; block++) {
        let a_at = carry_at(block, 0u, at.row, at.unit);
        // The last block is not folded.
        var next = value;
        if block + 1u < params.blocks { next = carries[a_at] * value + carries[carry_at(block, 1u, at.row, at.unit)]; }
        carries[a_at] = value;
        value = next;
    }
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = place_of(group, groups, lane);
    if !at.exists { return; }
    var h = carries[carry_at(at.block, 0u, at.row, at.unit)];
    for (var n = at.first; n < at.end; n++) {
        let t = time_of(n);
        let valid = is_valid(t, at.row);
        let x = load_input(t, at.row, at.unit);
        let out = cell_forward(Site(0u, 0u, t, at.row, at.unit), x, Pre(), State(h), Unit());
        h = select(h, out.state[0], valid);
        if params.keep == 1u {
            for (var s = 0u; s < SLOTS; s++) { slots[slot_at(t, at.row, s, at.unit)] = out.saved[s]; }
            states[state_at(t + 1u - params.reverse, at.row, at.unit)] = h;
        } else if n + 1u == params.steps {
            states[state_at(params.last, at.row, at.unit)] = h;
        }
        y[y_at(t, at.row, at.unit)] = select(0.0, h, valid);
    }
}

@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = place_of(group, groups, lane);
    if !at.exists { return; }
    var d = carries[carry_at(at.block, 0u, at.row, at.unit)];
    for (var n = at.first; n < at.end; n++) {
        let t = time_of(n);
        var dslots: Slots;
        for (var s = 0u; s < SLOTS; s++) { dslots[s] = 0.0; }
        if is_valid(t, at.row) {
            let saved = load_saved(t, at.row, at.unit);
            let previous = State(states[state_at(t + params.reverse, at.row, at.unit)]);
            let whole = State(d + y[y_at(t, at.row, at.unit)]);
            let out = cell_backward(Site(0u, 0u, t, at.row, at.unit), saved, previous, Unit(), whole);
            dslots = out.dslots;
            d = out.dprevious[0];
        }
        for (var s = 0u; s < SLOTS; s++) { slots[slot_at(t, at.row, s, at.unit)] = dslots[s]; }
    }
    if at.end == params.steps { dstates[at.row * params.hidden + at.unit] = d; }
}
