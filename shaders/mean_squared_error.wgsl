// terms[i] = (y[i] - target[i])^2, dy[i] = 2 (y[i] - target[i]) * scale; zeros where the step lies past the sequence's end.

struct MeanSquaredError {
    count: u32,  // T * B * width
    width: u32,  // numbers a step of one sequence
    batch: u32,  // B
    ragged: u32, // 1: steps past lengths[sequence] do not count
    scale: f32,  // 1 / counted numbers
}

@group(0) @binding(0) var<uniform> params: MeanSquaredError;
@group(0) @binding(1) var<storage, read> y: array<f32>;
@group(0) @binding(2) var<storage, read> wanted: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read_write> terms: array<f32>;
@group(0) @binding(5) var<storage, read_write> dy: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn mean_squared_error(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        let row = at / params.width;
        var difference = y[at] - wanted[at];
        if params.ragged == 1u && row / params.batch >= lengths[row % params.batch] {
            difference = 0.0;
        }
        terms[at] = difference * difference;
        dy[at] = 2.0 * difference * params.scale;
    }
}
