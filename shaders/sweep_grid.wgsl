// Many time steps of any cell in one dispatch of workgroups that all run at once, of one side or two, which know nothing of each
// other. Each workgroup has a tile of units and keeps its part of W_hh in registers through all steps; what the others need of its
// results travels through `exchange`: forward h, backward the gradients of the product. Composed with sweep_unit.wgsl,
// cell_contract.wgsl, one cell file and hold.wgsl; the product is the cell's.
//
// A word of the exchange is 0 until its value is there, so that the value is its own message. Every step has words of its own,
// which are written once: atomics of WGSL are relaxed, and of one word everybody sees the same order, of two words not.
//
// A grid of which not all workgroups run would wait for ever. So who waits too long raises the alarm, and all others leave at the next
// block of rows that they cannot finish; each leaves word how many blocks it has done. What a workgroup has done it has done right,
// and no row is more than a step ahead in one workgroup of where it is in another, so nothing is lost: the host launches the same run
// once more with `rescue`, in which a workgroup for each row does alone what is left, and in most cases finds nothing.
// src/kernels/sweep_grid.rs says how the host learns of it.

const LANES = 256u;
const DEPTH = 32u;              // k of a lane's product
const VECTORS = DEPTH / 4u;     // the same in vectors; written out in `multiply` and below
const MOST = 1024u / 4u;        // vectors of a line at most: H is at most 1024

// The head of the exchange, before the values [steps, sides, B, 1 or GATES, H].
const ALARM = 0u;               // 1: a workgroup has waited in vain, in this run or in any before it
const PRESENT = 1u;             // a run of no steps counts in it the workgroups that run at once
const CLOSED = 2u;              // 1: that count is over
const PROGRESS = 16u;           // blocks of rows done by each workgroup [tiles of rows, tiles of units, sides], 256 at most
const VALUES = 512u;

// A NaN that no arithmetic makes: a value is exchanged with its bits turned by these, so that it is 0 for none but this.
const ABSENT = 0x7fc5a1e5u;
// Rounds of LOOKS looks at words that are not there, all waits of a launch together, before the alarm is raised: some 0.2 s on a GPU, which
// hangs on no launch for seconds. llvmpipe ends all loops of an invocation after 65535 rounds together, but for those that it unrolls.
const PATIENCE = 32768u;
const LOOKS = 16u;

@group(0) @binding(8) var<storage, read_write> exchange: array<atomic<u32>>;

// A line is what a row brings to the product, H numbers: vector `e` has k = e, e + lanes, e + 2 lanes, e + 3 lanes, where `lanes`
// is the number of vectors, so that neighbouring lanes bring neighbouring words. A lane's product takes VECTORS vectors of it.
var<private> resident: array<vec4<f32>, GATES * VECTORS>; // the weights of a lane's unit and k
var<private> products: array<vec4<f32>, GATES>;           // of them and a line
var<private> rounds: u32;       // that waits have taken so far
var<private> coming: vec4<u32>; // the words of the next line that a lane brings, as far as they were there
var<workgroup> line: array<vec4<f32>, MOST>;                 // forward
var<workgroup> gate_sums: array<f32, 2u * GATES * LANES>;    // of the slices of k [slice, GATES, units]; of the rows [row, GATES, units]
var<workgroup> lines: array<vec4<f32>, 2u * MOST>;           // backward: two in turn
var<workgroup> line_sums: array<f32, 2u * LANES>;            // the same sums without gates
var<workgroup> gave_up: u32;
var<workgroup> first_step: u32;

// How all is cut. What is the same for all lanes stands apart from what is a lane's own: browsers take a struct for as uniform as the
// least of its members, and let no barrier depend on one that is not.
struct Cut {
    slices: u32,  // of k, DEPTH each
    units: u32,   // of a tile
    tiles: u32,   // of units
    rows: u32,    // of a block, whose cells take a lane each
    blocks: u32,  // of a workgroup
}

fn cut() -> Cut {
    var c: Cut;
    c.slices = (params.hidden + DEPTH - 1u) / DEPTH;
    c.units = min(LANES / c.slices, params.hidden);
    c.tiles = (params.hidden + c.units - 1u) / c.units;
    c.rows = LANES / c.units;
    c.blocks = (params.tile + c.rows - 1u) / c.rows;
    return c;
}

// Which k and unit of a tile a lane's product has, and which row of a block its cell; the cell's unit is the same.
struct Share { slice: u32, unit: u32, row: u32 }

fn share_of(c: Cut, lane: u32) -> Share {
    // Lanes past the end repeat the last slice.
    return Share(min(lane / c.units, c.slices - 1u), lane % c.units, lane / c.units);
}

fn encode(x: f32) -> u32 {
    return select(bitcast<u32>(x), NAN_BITS, is_nan_bits(x)) ^ ABSENT;
}

fn decode(word: u32) -> f32 { return bitcast<f32>(word ^ ABSENT); }

// Where a value lies that goes out at step n of this run. lines: what a row brings to the product, 1 or GATES.
fn word_at(n: u32, lines_of_row: u32, row: u32, index: u32, k: u32) -> u32 {
    return VALUES + (((n * params.sides + side) * params.rows + row) * lines_of_row + index) * params.hidden + k;
}

// The word at `at` as soon as it is more than `less`, or what it is after some looks.
fn look(at: u32, less: u32) -> u32 {
    var word = atomicLoad(&exchange[at]);
    for (var i = 1u; i < LOOKS; i++) {
        if word <= less { word = atomicLoad(&exchange[at]); }
    }
    return word;
}

// The word at `at`, as soon as it is there.
fn wait_for(at: u32) -> u32 {
    for (; rounds < PATIENCE; rounds++) {
        let word = look(at, 0u);
        if word != 0u { return word; }
        if atomicLoad(&exchange[ALARM]) != 0u { break; }
    }
    atomicStore(&exchange[ALARM], 1u);
    gave_up = 1u;
    return 0u;
}

// The vector of a line that a lane brings, once all of it is there. at: where the words of the line start in the exchange.
fn receive(c: Cut, lane: u32, at: u32) -> vec4<f32> {
    var values: array<f32, 4>; // FXC writes no vector at a place that is not constant
    for (var j = 0u; j < 4u; j++) {
        var word = coming[j];
        if word == 0u { word = wait_for(at + lane + j * c.slices * VECTORS); }
        values[j] = decode(word);
    }
    return vec4(values[0], values[1], values[2], values[3]);
}

// A run of no steps: how many workgroups of this grid run at once. It is over when all are there, or when one has waited long enough.
fn count_present(lane: u32, groups: u32) {
    if lane > 0u || atomicLoad(&exchange[CLOSED]) != 0u { return; }
    atomicAdd(&exchange[PRESENT], 1u);
    for (; rounds < PATIENCE; rounds++) {
        if look(PRESENT, groups - 1u) >= groups || atomicLoad(&exchange[CLOSED]) != 0u { break; }
    }
    atomicStore(&exchange[CLOSED], 1u);
}

// Where a workgroup of the grid leaves word how many blocks it has done. tile: of units and of rows.
fn progress_at(c: Cut, tile: vec2<u32>) -> u32 { return PROGRESS + (tile.y * c.tiles + tile.x) * params.sides + side; }

// Steps that a workgroup of the grid has done for a row.
fn steps_done(c: Cut, tile: u32, row: u32) -> u32 {
    let block = row % params.tile / c.rows;
    return (atomicLoad(&exchange[progress_at(c, vec2(tile, row / params.tile))]) + c.blocks - 1u - block) / c.blocks;
}

// The step that this workgroup begins with: in a rescue the first that some workgroup has not done.
fn first_step_of(c: Cut, lane: u32, row: u32, steps: u32) -> u32 {
    if lane == 0u {
        var first = 0u;
        gave_up = 0u;
        if params.rescue == 1u {
            first = steps;
            for (var tile = 0u; tile < c.tiles; tile++) { first = min(first, steps_done(c, tile, row)); }
        } else if steps > 1u {
            gave_up = atomicLoad(&exchange[ALARM]); // after an alarm nobody waits any more
        }
        first_step = first;
    }
    return workgroupUniformLoad(&first_step);
}

// The weights of a lane. by_k, by_gate: from one k, and one gate, to the next.
fn load_weights(c: Cut, own: Share, tile: u32, by_k: u32, by_gate: u32) {
    let unit = tile * c.units + own.unit;
    load_vectors(c, own.slice, 0u, unit, by_k, by_gate); load_vectors(c, own.slice, 1u, unit, by_k, by_gate);
    load_vectors(c, own.slice, 2u, unit, by_k, by_gate); load_vectors(c, own.slice, 3u, unit, by_k, by_gate);
    load_vectors(c, own.slice, 4u, unit, by_k, by_gate); load_vectors(c, own.slice, 5u, unit, by_k, by_gate);
    load_vectors(c, own.slice, 6u, unit, by_k, by_gate); load_vectors(c, own.slice, 7u, unit, by_k, by_gate);
}

fn load_vectors(c: Cut, slice: u32, v: u32, unit: u32, by_k: u32, by_gate: u32) {
    let stride = c.slices * VECTORS;
    let k = vec4(slice * VECTORS + v) + vec4(0u, 1u, 2u, 3u) * stride;
    for (var g = 0u; g < GATES; g++) {
        var w: array<f32, 4>;
        for (var j = 0u; j < 4u; j++) {
            if k[j] < params.hidden && unit < params.hidden { w[j] = weights[first_weight() + k[j] * by_k + g * by_gate + unit]; }
        }
        resident[g * VECTORS + v] = vec4(w[0], w[1], w[2], w[3]);
    }
}

// A workgroup of the grid has a tile of units and one of rows, which it takes in blocks; one of a rescue has a row, and takes all
// tiles of units. A block, or in a rescue a tile, is an item of a step.
struct Item {
    n: u32,    // the step
    tile: u32, // of units
    row1: u32, // the first row
    rows: u32,
}

fn items_of_step(c: Cut) -> u32 { return select(c.blocks, c.tiles, params.rescue == 1u); }

fn rows_of_group() -> u32 { return select(params.tile, 1u, params.rescue == 1u); }

fn first_row(tile: u32) -> u32 { return tile * rows_of_group(); }

// Item number `at` of all steps. tile: the workgroup's.
fn item_at(c: Cut, tile: vec2<u32>, at: u32) -> Item {
    let rescue = params.rescue == 1u;
    let index = at % items_of_step(c);
    var item: Item;
    item.n = at / items_of_step(c);
    item.tile = select(tile.x, index, rescue);
    item.row1 = first_row(tile.y) + select(index * c.rows, 0u, rescue);
    let end = min(first_row(tile.y) + rows_of_group(), params.rows);
    item.rows = min(c.rows, max(end, item.row1) - item.row1);
    return item;
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if params.steps == 0u {
        count_present(lane, groups.x * groups.y);
        return;
    }
    let H = params.hidden;
    let tile = take_tile(group, groups);
    let c = cut();
    let own = share_of(c, lane);
    let rescue = params.rescue == 1u;
    let items = items_of_step(c);
    var at = first_step_of(c, lane, first_row(tile.y), params.steps) * items;
    if !rescue { load_weights(c, own, tile.x, GATES * H, H); }
    for (; at < params.steps * items; at++) {
        let item = item_at(c, tile, at);
        let n = item.n;
        // The lane's, where there are such.
        let row = item.row1 + own.row;
        let unit = item.tile * c.units + own.unit;
        let is_unit = own.row < item.rows && unit < H;
        let t = step_of(params.t + n);
        if rescue { load_weights(c, own, item.tile, GATES * H, H); }
        // What the cell reads is asked for before the wait.
        var x: Pre;
        var previous: State;
        var p: Unit;
        if is_unit {
            x = load_input(t, row, unit);
            previous = load_state(slot_before(t), row, unit);
            p = load_unit(unit);
        }
        if item.rows > 0u { coming = look_for_h(c, lane, t, n, item.row1); }
        for (var i = 0u; i < item.rows; i++) {
            line[lane] = receive(c, lane, word_at(n - 1u, 1u, item.row1 + i, 0u, 0u));
            if i + 1u < item.rows { coming = look_for_h(c, lane, t, n, item.row1 + i + 1u); }
            workgroupBarrier();
            forward_slice(c, own, lane);
            workgroupBarrier();
            let columns = GATES * c.units;
            for (var column = lane; column < columns; column += LANES) {
                var total = 0.0;
                for (var slice = 0u; slice < c.slices; slice++) { total += gate_sums[slice * columns + column]; }
                gate_sums[GATES * LANES + i * columns + column] = total;
            }
        }
        if workgroupUniformLoad(&gave_up) == 1u { break; }
        if is_unit && (!rescue || n >= steps_done(c, item.tile, row)) {
            var r: Pre;
            for (var g = 0u; g < GATES; g++) { r[g] = gate_sums[GATES * LANES + (own.row * GATES + g) * c.units + own.unit]; }
            let state = forward_unit(t, row, unit, x, r, previous, p);
            if !rescue && n + 1u < params.steps { atomicStore(&exchange[word_at(n, 1u, row, 0u, unit)], encode(state[0])); }
            store_state(slot_after(t), row, unit, state);
        }
        if rescue { storageBarrier(); } // the next step reads what other lanes wrote
    }
    if !rescue && lane == 0u { atomicStore(&exchange[progress_at(c, tile)], at); }
}

// A lane's words of h before the step, as far as they are there: at the first step of a run, and in a rescue, in `states`.
fn look_for_h(c: Cut, lane: u32, t: u32, n: u32, row: u32) -> vec4<u32> {
    let stride = c.slices * VECTORS;
    var words = array(ABSENT, ABSENT, ABSENT, ABSENT); // a zero
    for (var j = 0u; j < 4u; j++) {
        let k = lane + j * stride;
        if lane >= stride || k >= params.hidden { continue; }
        if n == 0u || params.rescue == 1u {
            words[j] = encode(states[state_at(0u, slot_before(t), row, k)]);
        } else {
            words[j] = atomicLoad(&exchange[word_at(n - 1u, 1u, row, 0u, k)]);
        }
    }
    return vec4(words[0], words[1], words[2], words[3]);
}

// A lane's slice of the product of a line with the weights of all gates of its unit.
fn forward_slice(c: Cut, own: Share, lane: u32) {
    for (var g = 0u; g < GATES; g++) { products[g] = vec4<f32>(); }
    let e = own.slice * VECTORS;
    forward_multiply(e, 0u); forward_multiply(e, 1u); forward_multiply(e, 2u); forward_multiply(e, 3u);
    forward_multiply(e, 4u); forward_multiply(e, 5u); forward_multiply(e, 6u); forward_multiply(e, 7u);
    if lane < c.slices * c.units {
        for (var g = 0u; g < GATES; g++) { gate_sums[(own.slice * GATES + g) * c.units + own.unit] = sum_of(products[g]); }
    }
}

fn forward_multiply(e: u32, v: u32) {
    let h = line[e + v];
    for (var g = 0u; g < GATES; g++) { products[g] += h * resident[g * VECTORS + v]; }
}

fn sum_of(v: vec4<f32>) -> f32 { return (v.x + v.y) + (v.z + v.w); }

// A step is the product with the gradients of the step before it, then the cell. With `finish` a run has a step more, of the
// product alone.
@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if params.steps == 0u {
        count_present(lane, groups.x * groups.y);
        return;
    }
    let H = params.hidden;
    let tile = take_tile(group, groups);
    let c = cut();
    let own = share_of(c, lane);
    let rescue = params.rescue == 1u;
    let items = items_of_step(c);
    let steps = params.steps + params.finish;
    var at = first_step_of(c, lane, first_row(tile.y), steps) * items;
    if !rescue { load_weights(c, own, tile.x, H, H * H); }
    for (; at < steps * items; at++) {
        let item = item_at(c, tile, at);
        let n = item.n;
        // The lane's, where there are such.
        let row = item.row1 + own.row;
        let unit = item.tile * c.units + own.unit;
        let is_unit = own.row < item.rows && unit < H;
        let t = step_of(params.t - n);
        let later = step_of(params.t - n + 1u);
        let recurrent = n > 0u || params.recurrent == 1u;
        if rescue { load_weights(c, own, item.tile, H, H * H); }
        var kept: Kept;
        var d: State;
        var p: Unit;
        if is_unit {
            if n < params.steps { kept = load_kept(t, row, unit); }
            d = load_gradient(row, unit);
            p = load_unit(unit);
        }
        if recurrent && item.rows > 0u { coming = look_for_gradients(c, lane, later, n, item.row1, 0u); }
        for (var i = 0u; recurrent && i < item.rows; i++) {
            products[0] = vec4<f32>();
            backward_gate(c, own, lane, later, n, item.row1, item.rows, i, 0u);
            if GATES > 1u { backward_gate(c, own, lane, later, n, item.row1, item.rows, i, 1u); }
            if GATES > 2u { backward_gate(c, own, lane, later, n, item.row1, item.rows, i, 2u); }
            if GATES > 3u { backward_gate(c, own, lane, later, n, item.row1, item.rows, i, 3u); }
            if lane < c.slices * c.units { line_sums[own.slice * c.units + own.unit] = sum_of(products[0]); }
            workgroupBarrier();
            if lane < c.units {
                var total = 0.0;
                for (var slice = 0u; slice < c.slices; slice++) { total += line_sums[slice * c.units + lane]; }
                line_sums[LANES + i * c.units + lane] = total;
            }
        }
        if workgroupUniformLoad(&gave_up) == 1u { break; }
        if is_unit && (!rescue || n >= steps_done(c, item.tile, row)) {
            if recurrent { d[0] += line_sums[LANES + own.row * c.units + own.unit]; }
            if n < params.steps {
                let step = backward_unit(t, row, unit, kept, d, p);
                if !rescue && n + 1u < steps {
                    for (var g = 0u; g < GATES; g++) {
                        atomicStore(&exchange[word_at(n, GATES, row, g, unit)], encode(step.dslots[recurrent_slot(g)]));
                    }
                }
                if sums { add_sums(row, unit, step.dunit, step.clipped); }
                d = step.d;
            }
            store_gradient(row, unit, d);
        }
        if rescue { storageBarrier(); }
    }
    if !rescue && lane == 0u { atomicStore(&exchange[progress_at(c, tile)], at); }
}

// As look_for_h, for the gradients of one gate's product, which lie in `slots`.
fn look_for_gradients(c: Cut, lane: u32, later: u32, n: u32, row: u32, gate: u32) -> vec4<u32> {
    let stride = c.slices * VECTORS;
    var words = array(ABSENT, ABSENT, ABSENT, ABSENT);
    for (var j = 0u; j < 4u; j++) {
        let k = lane + j * stride;
        if lane >= stride || k >= params.hidden { continue; }
        if n == 0u || params.rescue == 1u {
            words[j] = encode(slots[slot_at(later, row, recurrent_slot(gate), k)]);
        } else {
            words[j] = atomicLoad(&exchange[word_at(n - 1u, GATES, row, gate, k)]);
        }
    }
    return vec4(words[0], words[1], words[2], words[3]);
}

// A gate's line of row i, and a lane's slice of its product, added to that of the gates before.
fn backward_gate(c: Cut, own: Share, lane: u32, later: u32, n: u32, row1: u32, rows: u32, i: u32, gate: u32) {
    let index = i * GATES + gate;
    let here = (index & 1u) * MOST;
    lines[here + lane] = receive(c, lane, word_at(n - 1u, GATES, row1 + i, gate, 0u));
    if index + 1u < rows * GATES {
        coming = look_for_gradients(c, lane, later, n, row1 + (index + 1u) / GATES, (index + 1u) % GATES);
    }
    workgroupBarrier();
    let e = here + own.slice * VECTORS;
    let w = gate * VECTORS;
    products[0] += lines[e] * resident[w];
    products[0] += lines[e + 1u] * resident[w + 1u];
    products[0] += lines[e + 2u] * resident[w + 2u];
    products[0] += lines[e + 3u] * resident[w + 3u];
    products[0] += lines[e + 4u] * resident[w + 4u];
    products[0] += lines[e + 5u] * resident[w + 5u];
    products[0] += lines[e + 6u] * resident[w + 6u];
    products[0] += lines[e + 7u] * resident[w + 7u];
}
