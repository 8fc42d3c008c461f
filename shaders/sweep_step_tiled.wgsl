// The steps of sweep_step.wgsl, which this file is composed with, for GPUs with fast workgroup memory: a workgroup has a tile of
// rows and units, and every weight, every h that it needs is loaded once, into workgroup memory. A lane sums 4 rows, forward of all gates
// of a unit, backward of 4 units: 16 multiply-adds of two vectors. So that a GPU has enough workgroups of enough lanes where
// H B is no more than 32 K, tiles are small, and their lanes share the sums over k among them in slices.

const TILED_LANES = 256u;
const TILED_ROWS = 32u;       // of a tile
const ROW_VECTORS = 8u;       // the same in vectors of 4
const FORWARD_UNITS = 8u;     // of a tile
const FORWARD_SLICES = 4u;    // of k
const BACKWARD_UNITS = 16u;
const UNIT_VECTORS = 4u;
const BACKWARD_SLICES = 8u;
const CHUNK = 8u;             // k of a slice that are in workgroup memory

// Forward: h [slice, row vector, k], then weights [slice, k, unit], a component a gate. Backward: gradients
// [slice, row vector, k], then weights [slice, k, unit vector]. After the sums over k: the sums of slices.
var<workgroup> tiled_vectors: array<vec4<f32>, 768>;
var<private> tiled_sums: array<vec4<f32>, 4>; // forward [gate], of 4 rows; backward [row], of 4 units

@compute @workgroup_size(TILED_LANES)
fn forward_tiled(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let seen_count = seen_width();
    let tile = take_tile(group, groups);
    let unit0 = tile.x * FORWARD_UNITS;
    let row0 = tile.y * TILED_ROWS;
    let depth = (seen_count + FORWARD_SLICES * CHUNK - 1u) / (FORWARD_SLICES * CHUNK) * CHUNK; // k of a slice
    // What a lane sums: a slice of k, a unit, 4 rows.
    let slice = lane / 64u;
    let place = lane % 64u;
    let h_from = (slice * ROW_VECTORS + place / FORWARD_UNITS) * CHUNK;
    let w_from = TILED_LANES + slice * CHUNK * FORWARD_UNITS + place % FORWARD_UNITS;
    // What it loads: 4 rows of h at a k, all gates of a unit at a k.
    let h_k = slice * depth + lane % CHUNK;
    let h_row = row0 + lane / CHUNK % ROW_VECTORS * 4u;
    let w_k = slice * depth + place / FORWARD_UNITS;
    let w_unit = unit0 + lane % FORWARD_UNITS;

    for (var g = 0u; g < SUMS; g++) { tiled_sums[g] = vec4<f32>(); }
    var h = load_h(h_k, h_row);
    var w = load_gates(w_k, w_unit);
    for (var k = 0u; k < depth; k += CHUNK) {
        tiled_vectors[lane] = h;
        tiled_vectors[TILED_LANES + lane] = w;
        workgroupBarrier();
        if k + CHUNK < depth { // the next loads are under way while this chunk is summed
            h = load_h(h_k + k + CHUNK, h_row);
            w = load_gates(w_k + k + CHUNK, w_unit);
        }
        add_gates(h_from, w_from, 0u); add_gates(h_from, w_from, 1u); add_gates(h_from, w_from, 2u); add_gates(h_from, w_from, 3u);
        add_gates(h_from, w_from, 4u); add_gates(h_from, w_from, 5u); add_gates(h_from, w_from, 6u); add_gates(h_from, w_from, 7u);
        workgroupBarrier();
    }
    add_slices(slice, place, 64u, FORWARD_SLICES, SUMS);

    // A lane has one unit and row for the cell.
    let row = lane / FORWARD_UNITS;
    if row0 + row < params.rows && w_unit < made_width() {
        var product: Sums;
        let at = row / 4u * FORWARD_UNITS + lane % FORWARD_UNITS;
        for (var g = 0u; g < SUMS; g++) { product[g] = component(tiled_vectors[g * 64u + at], row % 4u); }
        step_forward(row0 + row, w_unit, product, load_forward(w_unit));
    }
}

// What 4 rows see. Rows past the end repeat the last one: their sums are not used; past the last k is nothing.
fn load_h(k: u32, row: u32) -> vec4<f32> {
    if k >= seen_width() { return vec4<f32>(); }
    let last = params.rows - 1u;
    return vec4(
        seen(seen_at(min(row, last)) + k), seen(seen_at(min(row + 1u, last)) + k),
        seen(seen_at(min(row + 2u, last)) + k), seen(seen_at(min(row + 3u, last)) + k),
    );
}

// The weights of all gates of a unit.
fn load_gates(k: u32, unit: u32) -> vec4<f32> {
    var w: array<f32, 4>; // FXC writes no vector at a place that is not constant
    let made_count = made_width();
    if k < seen_width() && unit < made_count {
        for (var g = 0u; g < SUMS; g++) { w[g] = weights[forward_weight(k, unit) + g * made_count]; }
    }
    return vec4(w[0], w[1], w[2], w[3]);
}

fn add_gates(h_from: u32, w_from: u32, k: u32) {
    let h = tiled_vectors[h_from + k];
    let w = tiled_vectors[w_from + k * FORWARD_UNITS];
    for (var g = 0u; g < SUMS; g++) { tiled_sums[g] += h * component(w, g); }
}

// The sums of all slices, halved again and again: those of the first end in tiled_vectors [vector, place].
fn add_slices(slice: u32, place: u32, places: u32, slices: u32, vectors: u32) {
    for (var half = slices / 2u; half > 0u; half /= 2u) {
        if slice >= half && slice < 2u * half {
            for (var v = 0u; v < vectors; v++) { tiled_vectors[((slice - half) * vectors + v) * places + place] = tiled_sums[v]; }
        }
        workgroupBarrier();
        if slice < half {
            for (var v = 0u; v < vectors; v++) { tiled_sums[v] += tiled_vectors[(slice * vectors + v) * places + place]; }
        }
        workgroupBarrier();
    }
    if slice == 0u {
        for (var v = 0u; v < vectors; v++) { tiled_vectors[v * places + place] = tiled_sums[v]; }
    }
    workgroupBarrier();
}

@compute @workgroup_size(TILED_LANES)
fn backward_tiled(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let made_count = made_width();
    let tile = take_tile(group, groups);
    let unit0 = tile.x * BACKWARD_UNITS;
    let row0 = tile.y * TILED_ROWS;
    let depth = (made_count + BACKWARD_SLICES * CHUNK - 1u) / (BACKWARD_SLICES * CHUNK) * CHUNK; // k of a slice and gate
    // What a lane sums: a slice of k, 4 rows, 4 units.
    let slice = lane / 32u;
    let place = lane % 32u;
    let d_from = (slice * ROW_VECTORS + place / UNIT_VECTORS) * CHUNK;
    let w_from = 2u * TILED_LANES + slice * CHUNK * UNIT_VECTORS + place % UNIT_VECTORS;
    // What it loads: 8 rows of the gradients at a k, 4 units of the weights at a k.
    let d_k = slice * depth + lane % CHUNK;
    let d_row = row0 + place / CHUNK * 4u;
    let d_to = (slice * ROW_VECTORS + place / CHUNK) * CHUNK + lane % CHUNK;
    let w_k = slice * depth + place / UNIT_VECTORS;
    let w_unit = unit0 + place % UNIT_VECTORS * 4u;

    for (var i = 0u; i < 4u; i++) { tiled_sums[i] = vec4<f32>(); }
    if params.recurrent == 1u {
        var d0 = load_gradients(0u, d_k, d_row);
        var d1 = load_gradients(0u, d_k, d_row + 16u);
        var w = load_units(0u, w_k, w_unit);
        let steps = SUMS * depth;
        for (var k = 0u; k < steps; k += CHUNK) {
            tiled_vectors[d_to] = d0;
            tiled_vectors[d_to + 4u * CHUNK] = d1;
            tiled_vectors[2u * TILED_LANES + lane] = w;
            workgroupBarrier();
            let next = k + CHUNK;
            if next < steps {
                let gate = next / depth;
                d0 = load_gradients(gate, d_k + next % depth, d_row);
                d1 = load_gradients(gate, d_k + next % depth, d_row + 16u);
                w = load_units(gate, w_k + next % depth, w_unit);
            }
            add_units(d_from, w_from, 0u); add_units(d_from, w_from, 1u); add_units(d_from, w_from, 2u); add_units(d_from, w_from, 3u);
            add_units(d_from, w_from, 4u); add_units(d_from, w_from, 5u); add_units(d_from, w_from, 6u); add_units(d_from, w_from, 7u);
            workgroupBarrier();
        }
        add_slices(slice, place, 32u, BACKWARD_SLICES, 4u);
    }

    // A lane has one unit and two rows for the cell.
    let unit = unit0 + lane % BACKWARD_UNITS;
    for (var row = lane / BACKWARD_UNITS; row < TILED_ROWS; row += TILED_LANES / BACKWARD_UNITS) {
        if row0 + row < params.rows && unit < seen_width() {
            var d = 0.0;
            if params.recurrent == 1u {
                d = component(tiled_vectors[row % 4u * 32u + row / 4u * UNIT_VECTORS + lane % BACKWARD_UNITS / 4u], lane % 4u);
            }
            let step = step_backward(row0 + row, unit, d, load_backward(unit));
            if sums { add_sums(row0 + row, unit, step.dunit, step.clipped); }
        }
    }
}

// As load_h, of the gradients of what a gate made.
fn load_gradients(gate: u32, k: u32, row: u32) -> vec4<f32> {
    if k >= made_width() { return vec4<f32>(); }
    let last = params.rows - 1u;
    return vec4(
        dmade(dmade_at(gate, min(row, last)) + k), dmade(dmade_at(gate, min(row + 1u, last)) + k),
        dmade(dmade_at(gate, min(row + 2u, last)) + k), dmade(dmade_at(gate, min(row + 3u, last)) + k),
    );
}

fn load_units(gate: u32, k: u32, unit: u32) -> vec4<f32> {
    var w: array<f32, 4>;
    if k < made_width() {
        let at = backward_weight(gate, k, unit);
        for (var i = 0u; i < 4u; i++) {
            if unit + i < seen_width() { w[i] = weights[at + i]; }
        }
    }
    return vec4(w[0], w[1], w[2], w[3]);
}

fn add_units(d_from: u32, w_from: u32, k: u32) {
    let d = tiled_vectors[d_from + k];
    let w = tiled_vectors[w_from + k * UNIT_VECTORS];
    tiled_sums[0] += d.x * w;
    tiled_sums[1] += d.y * w;
    tiled_sums[2] += d.z * w;
    tiled_sums[3] += d.w * w;
}
