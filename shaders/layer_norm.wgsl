// Layer normalization of the rows of a strided window, by the equations of row_norm.wgsl, with which it is composed. A workgroup owns
// a row.

struct LayerNorm {
    rows: u32,
    width: u32,
    x_offset: u32, x_row: u32,
    y_offset: u32, y_row: u32,   // backward: of dx
    dy_offset: u32, dy_row: u32,
    column: u32,  // of gain, shift and dgain: the window's first
    line: u32,    // of stats: the first row's
    shifted: u32, // 1: there is a shift
}

@group(0) @binding(0) var<uniform> params: LayerNorm;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> gain: array<f32>;
@group(0) @binding(3) var<storage, read> shift: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // of each row: mean of x - x[0], 1 / sqrt(variance + epsilon)
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read> dy: array<f32>;
@group(0) @binding(7) var<storage, read_write> dgain: array<f32>;

@compute @workgroup_size(lanes)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let width = f32(params.width);
    for (var row = group.x; row < params.rows; row += groups.x) {
        let at = params.x_offset + row * params.x_row;
        var sum = vec4<f32>();
        for (var v = lane; v < params.width; v += lanes) { sum.x += x[at + v] - x[at]; }
        let mean = workgroup_sum(lane, sum).x / width;
        sum = vec4<f32>();
        for (var v = lane; v < params.width; v += lanes) {
            let d = (x[at + v] - x[at]) - mean;
            sum.x += d * d;
        }
        let inverse = inverse_deviation(workgroup_sum(lane, sum) / width).x;
        if lane == 0u { stats[params.line + row] = vec2(mean, inverse); }
        for (var v = lane; v < params.width; v += lanes) {
            var value = gain[params.column + v] * normal(x[at + v], x[at], mean, inverse);
            if params.shifted == 1u { value += shift[params.column + v]; }
            y[params.y_offset + row * params.y_row + v] = value;
        }
    }
}

fn normal_at(row: u32, v: u32, stat: vec2<f32>) -> f32 {
    let at = params.x_offset + row * params.x_row;
    return normal(x[at + v], x[at], stat.x, stat.y);
}

@compute @workgroup_size(lanes)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let width = f32(params.width);
    for (var row = group.x; row < params.rows; row += groups.x) {
        let stat = stats[params.line + row];
        let dy_at = params.dy_offset + row * params.dy_row;
        var sums = vec4<f32>();
        for (var v = lane; v < params.width; v += lanes) {
            let g = gain[params.column + v] * dy[dy_at + v];
            sums += vec4(g, g * normal_at(row, v, stat), 0.0, 0.0);
        }
        let means = workgroup_sum(lane, sums).xy / width;
        for (var v = lane; v < params.width; v += lanes) {
            let g = gain[params.column + v] * dy[dy_at + v];
            y[params.y_offset + row * params.y_row + v] = normal_backward(g, normal_at(row, v, stat), means, stat.y);
        }
    }
}

// dgain += the column sums of dy xhat. A lane owns a column and adds from the first row to the last.
@compute @workgroup_size(lanes)
fn backward_gain(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var v = id.x; v < params.width; v += groups.x * lanes) {
        var sum = 0.0;
        for (var row = 0u; row < params.rows; row++) {
            sum += dy[params.dy_offset + row * params.dy_row + v] * normal_at(row, v, stats[params.line + row]);
        }
        dgain[params.column + v] += sum;
    }
}
