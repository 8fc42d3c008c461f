// Rows of a table by index, and the gradient of that.

struct Gather {
    rows: u32,    // gather: indices; scatter: distinct ids
    width: u32,   // numbers a row
    table: u32,   // rows of the table
    skipped: u32, // scatter: the id that receives no gradient; 2^32 - 1: none
}

@group(0) @binding(0) var<uniform> params: Gather;

const LANES = 64u;

// gather: y [rows, width]; y[r] = table[indices[r]], zeros where the index is past the table.
@group(0) @binding(1) var<storage, read> indices: array<u32>;
@group(0) @binding(2) var<storage, read> source: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES)
fn gather(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.rows * params.width; at += groups.x * LANES) {
        let index = indices[at / params.width];
        var value = 0.0;
        if index < params.table {
            value = source[index * params.width + at % params.width];
        }
        y[at] = value;
    }
}

// scatter: dtable[ids[i]] += the sum of dy over order[starts[i] .. starts[i + 1]]. Each table row has one owner that adds
// in order of position, so the bits do not depend on the schedule.
@group(0) @binding(4) var<storage, read> ids: array<u32>;
@group(0) @binding(5) var<storage, read> starts: array<u32>;
@group(0) @binding(6) var<storage, read> order: array<u32>;
@group(0) @binding(7) var<storage, read> dy: array<f32>;
@group(0) @binding(8) var<storage, read_write> dtable: array<f32>;

@compute @workgroup_size(LANES)
fn scatter(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.rows * params.width; at += groups.x * LANES) {
        let i = at / params.width;
        let column = at % params.width;
        let row = ids[i];
        if row >= params.table || row == params.skipped { continue; }
        var sum = 0.0;
        for (var rank = starts[i]; rank < starts[i + 1u]; rank++) {
            sum += dy[order[rank] * params.width + column];
        }
        dtable[row * params.width + column] += sum;
    }
}
