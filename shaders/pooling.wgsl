// One row of numbers for a whole sequence: x [T, B, F] to y [B, F] over the valid steps of each sequence, and back.
//
// One lane owns one number of y, or of dx, and goes from the first step to the last: neighbouring lanes read neighbouring
// numbers, and the order is fixed. Steps past a sequence's end are not read; a sequence of length 0 gives zeros.

struct Pooling {
    steps: u32,  // T
    batch: u32,  // B
    width: u32,  // F
    ragged: u32, // 1: sequence b has lengths[b] steps; 0: each has T
    split: u32,  // last: the columns from this one on are those of step 0
}

@group(0) @binding(0) var<uniform> params: Pooling;
@group(0) @binding(1) var<storage, read> lengths: array<u32>;

const LANES = 64u;

fn length_of(sequence: u32) -> u32 {
    var length = params.steps;
    if params.ragged == 1u { length = lengths[sequence]; }
    return length;
}

// The step that the columns of y come from; T where there is none.
fn last_step(sequence: u32, column: u32) -> u32 {
    let length = length_of(sequence);
    if length == 0u { return params.steps; }
    return select(length - 1u, 0u, column >= params.split);
}

// ---- mean_over_time: y[b] = the sum of x[t, b] over t < length, by length ----

@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES)
fn mean_over_time(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let cells = params.batch * params.width;
    for (var cell = id.x; cell < cells; cell += groups.x * LANES) {
        let length = length_of(cell / params.width);
        var sum = 0.0;
        for (var t = 0u; t < length; t++) { sum += x[t * cells + cell]; }
        y[cell] = sum / f32(max(length, 1u));
    }
}

@group(0) @binding(4) var<storage, read> dy: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(LANES)
fn mean_over_time_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let cells = params.batch * params.width;
    for (var at = id.x; at < params.steps * cells; at += groups.x * LANES) {
        let cell = at % cells;
        let length = length_of(cell / params.width);
        var gradient = 0.0;
        if at / cells < length { gradient = dy[cell] / f32(length); }
        dx[at] = gradient;
    }
}

// ---- last: y[b] = x[length - 1, b] in the columns before `split`, x[0, b] in the others ----

@compute @workgroup_size(LANES)
fn last(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let cells = params.batch * params.width;
    for (var cell = id.x; cell < cells; cell += groups.x * LANES) {
        let t = last_step(cell / params.width, cell % params.width);
        var value = 0.0;
        if t < params.steps { value = x[t * cells + cell]; }
        y[cell] = value;
    }
}

@compute @workgroup_size(LANES)
fn last_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let cells = params.batch * params.width;
    for (var at = id.x; at < params.steps * cells; at += groups.x * LANES) {
        let cell = at % cells;
        var gradient = 0.0;
        if at / cells == last_step(cell / params.width, cell % params.width) { gradient = dy[cell]; }
        dx[at] = gradient;
    }
}

// ---- max_over_time: y[b] = the largest x[t, b] over t < length, and the first t that has it; T where there is none ----
//
// In bits, because compilers may take it that no number is NaN.

@group(0) @binding(6) var<storage, read> x_bits: array<u32>;
@group(0) @binding(7) var<storage, read_write> y_bits: array<u32>;
@group(0) @binding(8) var<storage, read_write> found: array<u32>;

// Numbers in order, from 1 on: zeros of both signs are one number, every NaN is the largest.
fn rank(bits: u32) -> u32 {
    let size = bits & 0x7fffffffu;
    if size > 0x7f800000u { return 0xffffffffu; }
    return select(0x80000000u + size, 0x80000000u - size, bits > 0x80000000u);
}

@compute @workgroup_size(LANES)
fn max_over_time(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let cells = params.batch * params.width;
    for (var cell = id.x; cell < cells; cell += groups.x * LANES) {
        let length = length_of(cell / params.width);
        var largest = 0u; // below every rank
        var bits = 0u;
        var step = params.steps;
        for (var t = 0u; t < length; t++) {
            let word = x_bits[t * cells + cell];
            let given = rank(word);
            if given > largest {
                largest = given;
                bits = word;
                step = t;
            }
        }
        y_bits[cell] = bits;
        found[cell] = step;
    }
}

@group(0) @binding(9) var<storage, read> step_of: array<u32>;

@compute @workgroup_size(LANES)
fn max_over_time_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let cells = params.batch * params.width;
    for (var at = id.x; at < params.steps * cells; at += groups.x * LANES) {
        let cell = at % cells;
        var gradient = 0.0;
        if at / cells == step_of[cell] { gradient = dy[cell]; }
        dx[at] = gradient;
    }
}
