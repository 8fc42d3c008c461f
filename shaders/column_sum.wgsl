// sums[first ..] += the column sums of a strided window of x: the gradient of a bias.
//
// One lane owns one column and adds from the first row to the last: neighbouring lanes read neighbouring numbers,
// and the order is fixed.

struct ColumnSum { rows: u32, columns: u32, offset: u32, row_stride: u32, first: u32 }

@group(0) @binding(0) var<uniform> params: ColumnSum;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn column_sum(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var column = id.x; column < params.columns; column += groups.x * LANES) {
        var sum = 0.0;
        for (var row = 0u; row < params.rows; row++) {
            sum += x[params.offset + row * params.row_stride + column];
        }
        sums[params.first + column] += sum;
    }
}
