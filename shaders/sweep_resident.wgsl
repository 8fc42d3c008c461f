// Many time steps of any cell in one dispatch, of one side or two: a workgroup carries `tile` rows of the batch through all of
// them, with all units of a cell that has a product. A lane owns a unit; its weights lie in an array of its own, which a compiler keeps
// in registers or close by, and h or its gradient goes from lane to lane through workgroup memory. Composed with sweep_unit.wgsl,
// cell_contract.wgsl, one cell file, hold.wgsl and eight.wgsl or eight_subgroup.wgsl.
//
// Products are written as calls for eight k each, so that every place in the weights is a constant: an array that is indexed
// by a variable would leave the registers.

override width: u32 = 128u; // units of a workgroup, 32, 64 or 128: those of the product, rounded up
override parts: u32 = 2u;   // of the k of a unit's product, for as many lanes; DEPTH or fewer k each
override tile: u32 = 2u;    // rows of a workgroup, at most ROWS

const DEPTH = 64u;
const ROWS = 2u;
const WORDS = 256u; // at least width * tile
const UNITS = 4u; // of a lane in backward, where a sum over k is cut in UNITS * parts slices

var<private> resident: array<f32, GATES * DEPTH>;            // forward: [GATES, k]; backward: [GATES, UNITS, k of a slice]
var<private> sum_of: array<f32, ROWS * max(GATES, UNITS)>; // [tile, GATES or UNITS]
// forward: h [2, tile, width], two steps in turn, then sums [parts, GATES, tile, width]; backward: the product's gradient
// [GATES, tile, width], then sums [slices, tile, width].
var<workgroup> shared_words: array<f32, (GATES + 2u * max(GATES, UNITS)) * WORDS>;

@compute @workgroup_size(width * parts)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let H = params.hidden;
    let own = take_tile(group, groups);
    let row = own.y * tile;
    let place = lane % width;
    let part = lane / width;
    // Lanes and rows past the end go along for the barriers; their results are not stored.
    let is_unit = own.x * width + place < H && part == 0u;
    let unit = min(own.x * width + place, H - 1u);
    if PRODUCT {
        prepare_eight();
        let k = part * DEPTH;
        forward_load(k, 0u, place); forward_load(k, 8u, place); forward_load(k, 16u, place); forward_load(k, 24u, place);
        if width > 32u {
            forward_load(k, 32u, place); forward_load(k, 40u, place); forward_load(k, 48u, place); forward_load(k, 56u, place);
        }
    }
    let p = load_unit(unit);
    var state: array<State, ROWS>;
    for (var i = 0u; i < tile; i++) { state[i] = load_state(slot_before(step_of(params.t)), min(row + i, params.rows - 1u), unit); }
    for (var n = 0u; n < params.steps; n++) {
        let t = step_of(params.t + n);
        for (var i = 0u; i < tile * GATES; i++) { sum_of[i] = 0.0; }
        if PRODUCT {
            let h = (n & 1u) * WORDS;
            if part == 0u {
                for (var i = 0u; i < tile; i++) { shared_words[h + i * width + place] = select(0.0, state[i][0], is_unit); }
            }
            workgroupBarrier();
            let k = h + part * DEPTH;
            forward_8(k, 0u); forward_8(k, 8u); forward_8(k, 16u); forward_8(k, 24u);
            if width > 32u { forward_8(k, 32u); forward_8(k, 40u); forward_8(k, 48u); forward_8(k, 56u); }
            if parts > 1u { forward_sum(part, place); }
        }
        // A copy, because the loop over the cell is too long to be unrolled.
        var r: array<Pre, ROWS>;
        for (var i = 0u; i < tile; i++) {
            for (var g = 0u; g < GATES; g++) { r[i][g] = sum_of[i * GATES + g]; }
        }
        for (var i = 0u; i < tile; i++) {
            if is_unit && row + i < params.rows {
                state[i] = forward_unit(t, row + i, unit, load_input(t, row + i, unit), r[i], state[i], p);
                // Where only the newest state is kept, those within the run are nobody's.
                if params.keep == 1u || n + 1u == params.steps { store_state(slot_after(t), row + i, unit, state[i]); }
            }
        }
    }
}

// Eight weights of each gate. at: the lane's first k; k: from there.
fn forward_load(at: u32, k: u32, unit: u32) {
    let H = params.hidden;
    for (var j = k; j < k + 8u; j++) {
        for (var g = 0u; g < GATES; g++) {
            var w = 0.0;
            if at + j < H && unit < H { w = weights[first_weight() + ((at + j) * GATES + g) * H + unit]; }
            resident[g * DEPTH + j] = w;
        }
    }
}

// at: where the lane's part of h starts; k: within it.
fn forward_8(at: u32, k: u32) {
    for (var i = 0u; i < tile; i++) {
        let values = eight(at + i * width + k);
        for (var g = 0u; g < GATES; g++) {
            sum_of[i * GATES + g] = add_8(sum_of[i * GATES + g], values, g * DEPTH + k);
        }
    }
}

fn add_8(sum: f32, values: array<f32, 8>, w: u32) -> f32 {
    var result = sum + values[0] * resident[w];
    result += values[1] * resident[w + 1u];
    result += values[2] * resident[w + 2u];
    result += values[3] * resident[w + 3u];
    result += values[4] * resident[w + 4u];
    result += values[5] * resident[w + 5u];
    result += values[6] * resident[w + 6u];
    return result + values[7] * resident[w + 7u];
}

// The sums of a unit's parts, for the lane of its first part.
fn forward_sum(part: u32, place: u32) {
    let at = 2u * WORDS + place;
    for (var i = 0u; i < tile * GATES; i++) { shared_words[at + (part * tile * GATES + i) * width] = sum_of[i]; }
    workgroupBarrier();
    for (var other = 1u; other < parts; other++) {
        for (var i = 0u; i < tile * GATES; i++) { sum_of[i] += shared_words[at + (other * tile * GATES + i) * width]; }
    }
}

@compute @workgroup_size(width * parts)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let H = params.hidden;
    let own = take_tile(group, groups);
    let row = own.y * tile;
    let place = lane % width;
    let is_unit = own.x * width + place < H && lane < width;
    let unit = min(own.x * width + place, H - 1u);
    // For the product a lane has a slice of all k and UNITS units, `stride` apart.
    let stride = width / UNITS;
    let depth = stride / parts; // k of a slice: 8 or 16
    let slice = lane / stride;
    let first = lane % stride;
    if PRODUCT {
        prepare_eight();
        let k = slice * depth;
        backward_load(k, 0u, first, stride);
        if GATES > 1u { backward_load(k, 1u, first, stride); }
        if GATES > 2u { backward_load(k, 2u, first, stride); }
        if GATES > 3u { backward_load(k, 3u, first, stride); }
    }
    let p = load_unit(unit);
    var d: array<State, ROWS>;
    for (var i = 0u; i < tile; i++) { d[i] = load_gradient(min(row + i, params.rows - 1u), unit); }
    for (var n = 0u; n < params.steps; n++) {
        let t = step_of(params.t - n);
        var dunit: Unit;
        for (var j = 0u; j < PARAMS; j++) { dunit[j] = 0.0; }
        var clipped = 0u;
        for (var i = 0u; i < tile; i++) {
            var step: UnitBackward;
            if is_unit && row + i < params.rows {
                step = backward_unit(t, row + i, unit, load_kept(t, row + i, unit), d[i], p);
                d[i] = step.d;
                for (var k = BIASES; k < PARAMS; k++) { dunit[k] += step.dunit[k]; }
                clipped += step.clipped;
            }
            if PRODUCT && lane < width {
                for (var g = 0u; g < GATES; g++) {
                    shared_words[(g * tile + i) * width + place] = step.dslots[recurrent_slot(g)];
                }
            }
        }
        if sums && is_unit && row < params.rows { add_sums(row / tile, unit, dunit, clipped); }
        if PRODUCT {
            for (var i = 0u; i < tile * UNITS; i++) { sum_of[i] = 0.0; }
            workgroupBarrier();
            let k = slice * depth;
            backward_8(k, 0u);
            if width > 32u { backward_8(k, 8u); }
            let sums_at = GATES * WORDS;
            for (var i = 0u; i < tile; i++) {
                for (var j = 0u; j < UNITS; j++) {
                    shared_words[sums_at + (slice * tile + i) * width + first + j * stride] = sum_of[i * UNITS + j];
                }
            }
            workgroupBarrier();
            for (var i = 0u; i < tile; i++) {
                var dh = 0.0;
                for (var s = 0u; s < UNITS * parts; s++) { dh += shared_words[sums_at + (s * tile + i) * width + place]; }
                d[i][0] += dh;
            }
        }
    }
    for (var i = 0u; i < tile; i++) {
        if is_unit && row + i < params.rows { store_gradient(row + i, unit, d[i]); }
    }
}

// A gate's weights. at: the lane's first k.
fn backward_load(at: u32, g: u32, first: u32, stride: u32) {
    backward_load_8(at, g, 0u, first, stride);
    if width > 32u { backward_load_8(at, g, 8u, first, stride); }
}

fn backward_load_8(at: u32, g: u32, k: u32, first: u32, stride: u32) {
    let H = params.hidden;
    for (var j = k; j < k + 8u; j++) {
        for (var i = 0u; i < UNITS; i++) {
            let unit = first + i * stride;
            var w = 0.0;
            if at + j < H && unit < H { w = weights[first_weight() + (g * H + at + j) * H + unit]; }
            resident[(g * UNITS + i) * (DEPTH / UNITS) + j] = w;
        }
    }
}

// at: where the lane's slice of k starts; k: within it. Gates are a loop: of a call for each, FXC makes wrong sums.
fn backward_8(at: u32, k: u32) {
    for (var i = 0u; i < tile; i++) {
        for (var g = 0u; g < GATES; g++) {
            let values = eight((g * tile + i) * width + at + k);
            for (var j = 0u; j < UNITS; j++) {
                sum_of[i * UNITS + j] = add_8(sum_of[i * UNITS + j], values, (g * UNITS + j) * (DEPTH / UNITS) + k);
            }
        }
    }
}
