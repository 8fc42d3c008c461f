// y = x for windows of columns: what lies apart side by side, and the other way round.

struct Columns { rows: u32, columns: u32, x_offset: u32, x_row: u32, y_offset: u32, y_row: u32 }

@group(0) @binding(0) var<uniform> params: Columns;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn copy_columns(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.rows * params.columns; at += groups.x * LANES) {
        let row = at / params.columns;
        let column = at % params.columns;
        y[params.y_offset + row * params.y_row + column] = x[params.x_offset + row * params.x_row + column];
    }
}
