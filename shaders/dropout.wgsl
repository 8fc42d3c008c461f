// y = x * mask / (1 - p) (inverted dropout, Srivastava et al. 2014). The mask is a function of the key and the place
// (step, sequence, unit) alone: backward draws it again instead of keeping it, and padding a batch changes no other row.

struct Dropout {
    count: u32, // T * B * width
    width: u32,
    batch: u32,
    start: u32, // steps of the sequence before the first
    p: f32,     // the probability of a zero
    scale: f32, // 1 / (1 - p)
    key0: u32,
    key1: u32,
}

@group(0) @binding(0) var<uniform> params: Dropout;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn dropout(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        let unit = at % params.width;
        let row = at / params.width;
        let bits = philox(vec2(params.key0, params.key1), vec4(unit, row % params.batch, params.start + row / params.batch, 0u));
        y[at] = select(0.0, x[at] * params.scale, unit_f32(bits.x) >= params.p);
    }
}
