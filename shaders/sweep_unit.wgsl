// What every sweep over steps does around the cell, for one step, row and unit: it loads and stores, holds back, skips what is past
// a row's end, clips. Composed with a sweep, cell_contract.wgsl, one cell file and hold.wgsl; the sweep makes the product.
//
// A launch has one side or two: a direction of a layer, or both directions, or two layers of which one is some steps ahead. Then the second
// half of each row of workgroups has the second side, whose part of each buffer but `lengths` lies behind that of the first: what
// follows knows where.

struct Sweep {
    rows: u32,   // B
    hidden: u32, // H
    width: u32,  // R, of the output that recurs where it is not h
    depth: u32,  // slots that `states` has for each state: T + 1, or 2 when nothing is kept for backward
    t: u32,      // the first step of this launch, counted as the first side reads them
    steps: u32,  // how many it takes
    last: u32,   // T - 1
    reverse: u32, // 1: the first side reads the sequence from its last step to its first
    sides: u32,  // of the launch: 1 or 2
    recurrent: u32, // sweep_step, sweep_grid, backward: 1 where there are gradients for the product, of the step handled before
    finish: u32, // backward: 1: the product of the first step is wanted, for the initial state's gradient; sweep_step: and nothing else
    tile: u32,   // sweep_grid: rows of a workgroup
    rescue: u32, // sweep_grid: 1: does what workgroups of the launch before it left undone
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
    // Of the second side: whether it reads the other way, the steps that it is ahead, modulo 2^32, its key, and words from what the first
    // has to what it has.
    opposite: u32,
    ahead: u32,
    next_key0: u32,
    next_key1: u32,
    next_slots: u32,
    next_states: u32,
    next_weights: u32,
    next_unit: u32,
    next_y: u32,
    next_dstates: u32,
    next_between: u32, // steps of several launches: to what one leaves the next, or the other way around; products by themselves
    next_carried: u32, // see step_projected.wgsl
    next_douts: u32,
    // sweep_rows: to the statistics, in pairs, and to the gradients of what is normalized; the lines that there are of each group, and whether
    // y (backward: dy) is h.
    next_stats: u32,
    next_norms: u32,
    lines: u32,
    shows: u32,
}

@group(0) @binding(0) var<uniform> params: Sweep;
@group(0) @binding(1) var<storage, read_write> slots: array<f32>;   // [T, B, SLOTS, H]: input part in, saved out, gradients out
@group(0) @binding(2) var<storage, read_write> states: array<f32>;  // [STATES, depth, B, H]
// Forward: W_hh transposed [R, GATES * H]; backward: W_hh [GATES * H, R]; see step_output.wgsl for others.
@group(0) @binding(3) var<storage, read> weights: array<f32>;
@group(0) @binding(4) var<storage, read> unit_values: array<f32>;   // [unit_params, H], or more lines: sweep_rows.wgsl
@group(0) @binding(5) var<storage, read> lengths: array<u32>;       // [B]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;       // [T, B, y_stride]: forward: written; backward: dy, only read
// What goes from later steps to earlier ones: the gradient of the state [STATES, B, H]; then, where the cell or the clip needs
// them, sums for tiles of rows [B or more, SUMS, H]: the gradients of the unit parameters from BIASES on, and how often
// the clip acted; then, for the flow of the gradient, that of each state after each step [T, STATES, B, H].
@group(0) @binding(7) var<storage, read_write> dstates: array<f32>;

override sums: bool = false; // whether dstates has room for the sums
override flow: bool = false; // and for the gradients of all steps

var<private> side: u32; // of this workgroup: 0 or 1

// The tile of units and the tile of rows that a workgroup has; rows go on in z where y is full. A sweep of two sides asks first of
// all, because from then on the side is known.
fn take_tile(group: vec3<u32>, groups: vec3<u32>) -> vec2<u32> {
    let tiles = groups.x / params.sides;
    side = group.x / tiles;
    return vec2(group.x % tiles, group.z * groups.y + group.y);
}

// 1: this side reads the sequence from its last step to its first.
fn is_reverse() -> u32 { return params.reverse ^ (side * params.opposite); }

// The step of the sequence that this side reads while the first one reads number n, from 0.
fn step_of(n: u32) -> u32 {
    let own = n + side * params.ahead;
    return select(own, params.last - own, is_reverse() == 1u);
}

fn slot_at(t: u32, row: u32, slot: u32, unit: u32) -> u32 {
    return side * params.next_slots + ((t * params.rows + row) * SLOTS + slot) * params.hidden + unit;
}

// The slots of `states` before and after a step.
fn slot_before(t: u32) -> u32 { return (t + is_reverse()) % params.depth; }
fn slot_after(t: u32) -> u32 { return (t + 1u - is_reverse()) % params.depth; }

fn state_at(s: u32, slot: u32, row: u32, unit: u32) -> u32 {
    return side * params.next_states + ((s * params.depth + slot) * params.rows + row) * params.hidden + unit;
}

fn load_state(slot: u32, row: u32, unit: u32) -> State {
    var state: State;
    for (var s = 0u; s < STATES; s++) { state[s] = states[state_at(s, slot, row, unit)]; }
    return state;
}

fn store_state(slot: u32, row: u32, unit: u32, state: State) {
    for (var s = 0u; s < STATES; s++) { states[state_at(s, slot, row, unit)] = state[s]; }
}

// Where this side's gradients, sums and flow start.
fn first_dstate() -> u32 { return side * params.next_dstates; }

fn gradient_at(s: u32, row: u32, unit: u32) -> u32 {
    return first_dstate() + (s * params.rows + row) * params.hidden + unit;
}

// The gradient that later steps give.
fn load_gradient(row: u32, unit: u32) -> State {
    var d: State;
    for (var s = 0u; s < STATES; s++) { d[s] = dstates[gradient_at(s, row, unit)]; }
    return d;
}

fn store_gradient(row: u32, unit: u32, d: State) {
    for (var s = 0u; s < STATES; s++) { dstates[gradient_at(s, row, unit)] = d[s]; }
}

fn first_weight() -> u32 { return side * params.next_weights; }

fn load_unit(unit: u32) -> Unit {
    var p: Unit;
    for (var i = 0u; i < PARAMS; i++) {
        p[i] = 0.0;
        if i < unit_params { p[i] = unit_values[side * params.next_unit + i * params.hidden + unit]; }
    }
    return p;
}

fn site_of(t: u32, row: u32, unit: u32) -> Site {
    let is_next = side == 1u;
    let key0 = select(params.key0, params.next_key0, is_next);
    let key1 = select(params.key1, params.next_key1, is_next);
    return Site(key0, key1, params.start + t, row, unit);
}

// What part of state s is held back.
fn held(site: Site, s: u32) -> f32 {
    return hold_factor(site, s, select(params.zoneout_c, params.zoneout_h, s == 0u), params.random == 1u);
}

fn is_valid(t: u32, row: u32) -> bool {
    if params.ragged == 0u { return true; }
    return t < lengths[row];
}

fn y_at(t: u32, row: u32, unit: u32) -> u32 {
    return side * params.next_y + (t * params.rows + row) * params.y_stride + params.y_offset + unit;
}

// The input part of all gates.
fn load_input(t: u32, row: u32, unit: u32) -> Pre {
    var x: Pre;
    for (var g = 0u; g < GATES; g++) { x[g] = slots[slot_at(t, row, g, unit)]; }
    return x;
}

// The state after a step; stores all else that it leaves.
fn forward_unit(t: u32, row: u32, unit: u32, x: Pre, r: Pre, previous: State, p: Unit) -> State {
    let valid = is_valid(t, row);
    let site = site_of(t, row, unit);
    let out = cell_forward(site, x, r, previous, p);
    var state = out.state;
    if zoneout {
        for (var s = 0u; s < STATES; s++) {
            let k = held(site, s);
            state[s] = k * previous[s] + (1.0 - k) * state[s];
        }
    }
    for (var s = 0u; s < STATES; s++) { state[s] = select(previous[s], state[s], valid); }
    if params.keep == 1u {
        for (var s = 0u; s < SLOTS; s++) { slots[slot_at(t, row, s, unit)] = out.saved[s]; }
    }
    if params.output == 1u { y[y_at(t, row, unit)] = select(0.0, state[0], valid); }
    return state;
}

// What backward reads of a step: what forward left, and the gradient of y. Past a row's end there is nothing.
struct Kept { saved: Slots, previous: State, dy: f32 }

fn load_kept(t: u32, row: u32, unit: u32) -> Kept {
    var kept: Kept;
    if is_valid(t, row) {
        var saved: Slots; // FXC writes no array inside a struct at a place that is not constant
        for (var s = 0u; s < SLOTS; s++) { saved[s] = slots[slot_at(t, row, s, unit)]; }
        kept.saved = saved;
        kept.previous = load_state(slot_before(t), row, unit);
        if params.output == 1u { kept.dy = y[y_at(t, row, unit)]; }
    }
    return kept;
}

// d: the gradient of the state before the step, the direct path only; clipped: how many of its parts the clip acted on.
struct UnitBackward { d: State, dslots: Slots, dunit: Unit, clipped: u32 }

// From d, the gradient that later steps give the state after a step; stores the gradients that the step leaves.
fn backward_unit(t: u32, row: u32, unit: u32, kept: Kept, later: State, p: Unit) -> UnitBackward {
    var result: UnitBackward;
    var d = later;
    var totals: State;
    if is_valid(t, row) {
        for (var s = 0u; s < STATES; s++) {
            let clipped = clip_to(params.clip, d[s]);
            result.clipped += select(0u, 1u, clipped != d[s] && !is_nan_bits(clipped));
            d[s] = clipped;
        }
        if params.output == 1u { d[0] += kept.dy; }
        let site = site_of(t, row, unit);
        var held_back: State; // its gradient passes the cell by
        if flow && !zoneout { totals = cell_totals(kept.saved, kept.previous, p, d); }
        if zoneout {
            totals = d; // what was held back goes into nothing else of its step
            for (var s = 0u; s < STATES; s++) {
                let k = held(site, s);
                held_back[s] = k * d[s];
                d[s] -= held_back[s];
            }
        }
        let out = cell_backward(site, kept.saved, kept.previous, p, d);
        result.dslots = out.dslots;
        d = out.dprevious;
        if zoneout { for (var s = 0u; s < STATES; s++) { d[s] += held_back[s]; } }
        result.dunit = out.dunit;
    }
    if flow { store_flow(t, row, unit, totals); }
    for (var s = 0u; s < SLOTS; s++) { slots[slot_at(t, row, s, unit)] = result.dslots[s]; }
    result.d = d;
    return result;
}

// The whole gradient of each state after a step, behind the sums.
fn store_flow(t: u32, row: u32, unit: u32, d: State) {
    let at = first_dstate() + params.flow_at + unit;
    for (var s = 0u; s < STATES; s++) { dstates[at + ((t * STATES + s) * params.rows + row) * params.hidden] = d[s]; }
}

// Adds to the sums of a tile of rows, which no other lane has.
fn add_sums(tile: u32, unit: u32, dunit: Unit, clipped: u32) {
    let counts = unit_params - BIASES; // the line of the counts, after those of the unit parameters
    let at = first_dstate() + STATES * params.rows * params.hidden + tile * (counts + 1u) * params.hidden + unit;
    for (var k = BIASES; k < PARAMS; k++) {
        if k < unit_params { dstates[at + (k - BIASES) * params.hidden] += dunit[k]; }
    }
    dstates[at + counts * params.hidden] += f32(clipped);
}
