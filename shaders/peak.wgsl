// The most that a device does: copies of memory, and multiply-adds in registers. `gatefold bench --kernels` holds the other kernels
// against them.

struct Peak {
    count: u32,  // vectors of x and y
    rounds: u32, // multiply-adds of a chain, a multiple of 8
}

@group(0) @binding(0) var<uniform> params: Peak;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn copy(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) { y[at] = x[at]; }
}

// Two chains for each number, c = c x + x from 0 and from 1, and their sum. Eight chains a lane hide the latency of the units and
// fit the registers of an AVX2 driver; a loop's own work is little beside that of eight rounds.
@compute @workgroup_size(LANES)
fn multiply_add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        let factor = x[at];
        var c0 = vec4(0.0);
        var c1 = vec4(1.0);
        for (var round = 0u; round < params.rounds; round += 8u) {
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
            c0 = c0 * factor + factor; c1 = c1 * factor + factor;
        }
        y[at] = c0 + c1;
    }
}
