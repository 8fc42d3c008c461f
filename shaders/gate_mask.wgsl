// Recurrent dropout (Gal & Ghahramani 2016): h times a mask of its own for each gate, on its way into that gate's product; and
// back. A mask is a function of the key, the row, the gate and the unit, and of no step: all steps of a sequence share it.

struct GateMask {
    count: u32,  // N * R
    width: u32,  // R
    batch: u32,  // B: line n of N is one of row n % B
    first: u32,  // the first gate
    gates: u32,  // G
    offset: u32, // where the lines without gates start: those of x in spread, of y in collect
    p: f32,      // the probability of a zero
    scale: f32,  // 1 / (1 - p)
    key0: u32,
    key1: u32,
}

@group(0) @binding(0) var<uniform> params: GateMask;
@group(0) @binding(1) var<storage, read> x: array<f32>;       // spread: [N, R], collect: [G, N, R]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // spread: [G, N, R], collect: [N, R]

const LANES = 64u;
const GATE = 0x67617465u; // tells these draws from others under one key

fn masked(value: f32, at: u32, gate: u32) -> f32 {
    let row = at / params.width % params.batch;
    let bits = philox(vec2(params.key0, params.key1), vec4(at % params.width, row, params.first + gate, GATE));
    return select(0.0, value * params.scale, unit_f32(bits.x) >= params.p);
}

@compute @workgroup_size(LANES)
fn spread(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        let value = x[params.offset + at];
        for (var gate = 0u; gate < params.gates; gate++) { y[gate * params.count + at] = masked(value, at, gate); }
    }
}

@compute @workgroup_size(LANES)
fn collect(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        var sum = y[params.offset + at];
        for (var gate = 0u; gate < params.gates; gate++) { sum += masked(x[gate * params.count + at], at, gate); }
        y[params.offset + at] = sum;
    }
}
