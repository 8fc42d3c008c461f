// Layer normalization (Ba et al. 2016) of the rows of a strided window:
//     y = gain xhat + shift    xhat = (x - mean) / sqrt(variance + epsilon)
// with the variance of all numbers of the row. A workgroup owns a row. Everything is measured from the row's first number, so that
// a large mean costs no digits: mean and variance are those of x - x[0], in two passes.

struct LayerNorm {
    rows: u32,
    width: u32,
    x_offset: u32, x_row: u32,
    y_offset: u32, y_row: u32,   // backward: of dx
    dy_offset: u32, dy_row: u32,
    column: u32,     // of gain, shift and dgain: the window's first
    line: u32,       // of stats: the first row's
    shifted: u32,    // 1: there is a shift
    accumulate: u32, // backward: 1: add to dx
}

@group(0) @binding(0) var<uniform> params: LayerNorm;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> gain: array<f32>;
@group(0) @binding(3) var<storage, read> shift: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // of each row: mean of x - x[0], 1 / sqrt(variance + epsilon)
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read> dy: array<f32>;
@group(0) @binding(7) var<storage, read_write> dgain: array<f32>;

const EPSILON = 1e-5;
const LANES = 64u;
var<workgroup> partial: array<vec2<f32>, LANES>;

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let width = f32(params.width);
    for (var row = group.x; row < params.rows; row += groups.x) {
        let at = params.x_offset + row * params.x_row;
        var sum = 0.0;
        for (var v = lane; v < params.width; v += LANES) { sum += x[at + v] - x[at]; }
        let mean = workgroup_sum(lane, vec2(sum, 0.0)).x / width;
        sum = 0.0;
        for (var v = lane; v < params.width; v += LANES) {
            let d = (x[at + v] - x[at]) - mean;
            sum += d * d;
        }
        let inverse = 1.0 / sqrt(workgroup_sum(lane, vec2(sum, 0.0)).x / width + EPSILON);
        if lane == 0u { stats[params.line + row] = vec2(mean, inverse); }
        for (var v = lane; v < params.width; v += LANES) {
            var value = gain[params.column + v] * (((x[at + v] - x[at]) - mean) * inverse);
            if params.shifted == 1u { value += shift[params.column + v]; }
            y[params.y_offset + row * params.y_row + v] = value;
        }
    }
}

fn normal(row: u32, v: u32, stat: vec2<f32>) -> f32 {
    let at = params.x_offset + row * params.x_row;
    return ((x[at + v] - x[at]) - stat.x) * stat.y;
}

// dx = (g - mean(g) - xhat mean(g xhat)) / sqrt(variance + epsilon) with g = gain dy
@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let width = f32(params.width);
    for (var row = group.x; row < params.rows; row += groups.x) {
        let stat = stats[params.line + row];
        let dy_at = params.dy_offset + row * params.dy_row;
        var sums = vec2<f32>();
        for (var v = lane; v < params.width; v += LANES) {
            let g = gain[params.column + v] * dy[dy_at + v];
            sums += vec2(g, g * normal(row, v, stat));
        }
        let means = workgroup_sum(lane, sums) / width;
        for (var v = lane; v < params.width; v += LANES) {
            let g = gain[params.column + v] * dy[dy_at + v];
            var value = ((g - means.x) - normal(row, v, stat) * means.y) * stat.y;
            let at = params.y_offset + row * params.y_row + v;
            if params.accumulate == 1u { value += y[at]; }
            y[at] = value;
        }
    }
}

// dgain += the column sums of dy xhat. A lane owns a column and adds from the first row to the last.
@compute @workgroup_size(LANES)
fn backward_gain(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var v = id.x; v < params.width; v += groups.x * LANES) {
        var sum = 0.0;
        for (var row = 0u; row < params.rows; row++) {
            sum += dy[params.dy_offset + row * params.dy_row + v] * normal(row, v, stats[params.line + row]);
        }
        dgain[params.column + v] += sum;
    }
}

fn workgroup_sum(lane: u32, value: vec2<f32>) -> vec2<f32> {
    workgroupBarrier(); // the last result was read by all
    partial[lane] = value;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half { partial[lane] += partial[lane + half]; }
    }
    workgroupBarrier();
    return partial[0];
}
