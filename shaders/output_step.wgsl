// What follows the output product o = W_hr m (+ b) of one step, and what precedes it in backward: rows past their end hold their
// state, y takes o; and teacher forcing (Williams & Zipser 1989), in full or scheduled (Bengio et al. 2015): with a probability
// drawn for each row and step, the recurrence sees the target of the step before in place of o.

struct OutputStep {
    rows: u32,  // B
    width: u32, // R
    t: u32,
    before: u32, // slot of the state before the step
    after: u32,  // and after it
    ragged: u32, // 1: steps past lengths[row] hold the state and output zeros
    y_stride: u32,
    y_offset: u32,
    key0: u32,
    key1: u32,
    start: u32, // steps of the sequence before step 0
    probability: f32, // of seeing the target
}

@group(0) @binding(0) var<uniform> params: OutputStep;
@group(0) @binding(1) var<storage, read_write> outputs: array<f32>; // [depth, B, R]: o of each step
@group(0) @binding(2) var<storage, read_write> y: array<f32>;       // [T, B, y_stride]; backward: dy, only read
@group(0) @binding(3) var<storage, read> lengths: array<u32>;       // [B]
@group(0) @binding(4) var<storage, read> targets: array<f32>;       // [T, B, R]
@group(0) @binding(5) var<storage, read_write> carried: array<f32>; // backward: [B, R], the gradient of o from later steps
@group(0) @binding(6) var<storage, read_write> douts: array<f32>;   // backward: [T, B, R], the whole gradient of o

const LANES = 64u;
const TEACH = 0x74656163u; // tells these draws from others under one key

fn is_valid(row: u32) -> bool {
    if params.ragged == 0u { return true; }
    return params.t < lengths[row];
}

// Whether step t of the row sees the target of step t - 1. The first step sees the state that it was given.
fn is_taught(row: u32) -> bool {
    if params.t == 0u || !is_valid(row) { return false; }
    let bits = philox(vec2(params.key0, params.key1), vec4(TEACH, row, params.start + params.t, 0u));
    return unit_f32(bits.x) < params.probability;
}

// Before the step's recurrent product.
@compute @workgroup_size(LANES)
fn teach(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.width;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        if is_taught(at / params.width) { outputs[params.before * count + at] = targets[(params.t - 1u) * count + at]; }
    }
}

// After the output product.
@compute @workgroup_size(LANES)
fn output(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.width;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        let row = at / params.width;
        let valid = is_valid(row);
        let o = outputs[params.after * count + at];
        if !valid { outputs[params.after * count + at] = outputs[params.before * count + at]; }
        y[(params.t * params.rows + row) * params.y_stride + params.y_offset + at % params.width] = select(0.0, o, valid);
    }
}

// Before the products of backward: the gradient of this step's o.
@compute @workgroup_size(LANES)
fn output_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.width;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        let row = at / params.width;
        var d = 0.0;
        if is_valid(row) {
            d = carried[at] + y[(params.t * params.rows + row) * params.y_stride + params.y_offset + at % params.width];
            carried[at] = 0.0;
        }
        douts[params.t * count + at] = d;
    }
}

// After the step's recurrent product of backward: no gradient reaches an o that the target stood in for.
@compute @workgroup_size(LANES)
fn teach_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.width;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        if is_taught(at / params.width) { carried[at] = 0.0; }
    }
}
