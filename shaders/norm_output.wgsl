// The output of an LSTM whose cell state c is normalized on its way to h: after the cell, which leaves o in place of h, and the
// normalization of c, h = o output(v), v being the normalized c; in backward the gradients of o and v. Rows past their end hold.

struct NormOutput {
    rows: u32,   // B
    hidden: u32, // H
    t: u32,
    after: u32,  // slot of the state after the step
    line: u32,   // first row of `values`
    ragged: u32, // 1: steps past lengths[row] hold the state and output zeros
    output: u32, // 1: y is this h (backward: dy is its gradient); 0: y is made of it elsewhere
    y_stride: u32,
    y_offset: u32,
}

@group(0) @binding(0) var<uniform> params: NormOutput;
@group(0) @binding(1) var<storage, read_write> states: array<f32>;  // [2, depth, B, H]: o in, h out
@group(0) @binding(2) var<storage, read> values: array<f32>;        // [.., H]: v
@group(0) @binding(3) var<storage, read_write> y: array<f32>;       // [T, B, y_stride]; backward: dy, only read
@group(0) @binding(4) var<storage, read> lengths: array<u32>;       // [B]
@group(0) @binding(5) var<storage, read> slots: array<f32>;         // backward: [T, B, 4, H], o last
@group(0) @binding(6) var<storage, read_write> dstates: array<f32>; // backward: [2, B, H]: the gradient of h in, of o out
@group(0) @binding(7) var<storage, read_write> dvalues: array<f32>; // backward: [T, B, H], of v

override output_kind: u32 = 1u; // tanh
override output_alpha: f32 = 0.0;
override output_beta: f32 = 0.0;

const LANES = 64u;

fn is_valid(row: u32) -> bool {
    if params.ragged == 0u { return true; }
    return params.t < lengths[row];
}

fn y_at(at: u32) -> u32 {
    return (params.t * params.rows + at / params.hidden) * params.y_stride + params.y_offset + at % params.hidden;
}

fn output(at: u32) -> f32 {
    return activate(output_kind, output_alpha, output_beta, values[params.line * params.hidden + at]);
}

@compute @workgroup_size(LANES)
fn forward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.hidden;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        var h = 0.0;
        if is_valid(at / params.hidden) {
            h = states[params.after * count + at] * output(at);
            states[params.after * count + at] = h;
        }
        if params.output == 1u { y[y_at(at)] = h; }
    }
}

@compute @workgroup_size(LANES)
fn backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.hidden;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        let row = at / params.hidden;
        var dv = 0.0;
        if is_valid(row) {
            var dh = dstates[at];
            if params.output == 1u { dh += y[y_at(at)]; }
            let o = slots[((params.t * params.rows + row) * 4u + 3u) * params.hidden + at % params.hidden];
            let value = output(at);
            dstates[at] = dh * value;
            dv = dh * o * slope(output_kind, output_alpha, output_beta, value);
        }
        dvalues[params.t * count + at] = dv;
    }
}
