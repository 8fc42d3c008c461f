// Sums in a fixed order. Workgroup g adds up block g of x; a second launch over the results adds up the blocks.

struct Reduce {
    count: u32,
    block: u32, // numbers a workgroup
    scale: f32, // of each result
}

@group(0) @binding(0) var<uniform> params: Reduce;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

const LANES = 256u;
var<workgroup> partial: array<f32, LANES>;

@compute @workgroup_size(LANES)
fn sum(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = group.x * params.block;
    let end = min(first + params.block, params.count);
    var total = 0.0;
    for (var at = first + lane; at < end; at += LANES) { total += x[at]; }
    finish(group.x, lane, total);
}

@compute @workgroup_size(LANES)
fn sum_of_squares(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = group.x * params.block;
    let end = min(first + params.block, params.count);
    var total = 0.0;
    for (var at = first + lane; at < end; at += LANES) { total += x[at] * x[at]; }
    finish(group.x, lane, total);
}

fn finish(block: u32, lane: u32, total: f32) {
    partial[lane] = total;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half { partial[lane] += partial[lane + half]; }
    }
    if lane == 0u { sums[block] = partial[0] * params.scale; }
}
