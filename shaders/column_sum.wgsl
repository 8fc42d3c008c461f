// The column sums of each block of ROWS rows of a strided window of x; block i's go to, or are added to, sums[first + i * columns ..].
// Sums of the blocks' sums, and so on, leave one row: the gradient of a bias.
//
// One lane owns one column of a block and adds from the first row to the last: neighbouring lanes read neighbouring numbers,
// the order is fixed, and a tall x still has work for many workgroups.

struct ColumnSum { rows: u32, columns: u32, offset: u32, row_stride: u32, first: u32, accumulate: u32 }

@group(0) @binding(0) var<uniform> params: ColumnSum;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

const LANES = 64u;
const ROWS = 128u;

@compute @workgroup_size(LANES)
fn column_sum(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block = group.z * groups.y + group.y; // blocks go on in z where y is full
    let first = block * ROWS;
    let end = min(first + ROWS, params.rows);
    if first >= end { return; }
    for (var column = group.x * LANES + lane; column < params.columns; column += groups.x * LANES) {
        var sum = 0.0;
        for (var row = first; row < end; row++) { sum += x[params.offset + row * params.row_stride + column]; }
        let at = params.first + block * params.columns + column;
        if params.accumulate == 1u { sum += sums[at]; }
        sums[at] = sum;
    }
}
