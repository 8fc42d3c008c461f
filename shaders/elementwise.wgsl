// Number by number: sums, products, multiples. b holds as many numbers as a, or those of its last dimensions alone, which then
// meet every row of a.

struct Elementwise {
    count: u32,  // numbers of a and y
    period: u32, // numbers of b; divides count
    factor: f32, // scale
}

@group(0) @binding(0) var<uniform> params: Elementwise;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) { y[at] = a[at] + b[at % params.period]; }
}

@compute @workgroup_size(LANES)
fn multiply(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) { y[at] = a[at] * b[at % params.period]; }
}

@compute @workgroup_size(LANES)
fn scale(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) { y[at] = a[at] * params.factor; }
}
