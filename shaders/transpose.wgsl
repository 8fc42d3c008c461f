// y [b, a, c] = x [a, b, c]: a matrix transposed (c = 1), or batch-first turned into time-major and back.

struct Transpose { a: u32, b: u32, c: u32 }

@group(0) @binding(0) var<uniform> params: Transpose;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn transpose(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.a * params.b * params.c;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        let inner = at % params.c;
        let row = at / params.c;
        y[at] = x[((row % params.a) * params.b + row / params.a) * params.c + inner];
    }
}
