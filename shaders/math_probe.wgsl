// y[i] = f(x[i]) for the functions of math.wgsl: how `gatefold verify` measures them on an adapter.

struct Probe {
    count: u32,
    function: u32, // 0 exp, 1 log, 2 tanh, 3 sigmoid
}

@group(0) @binding(0) var<uniform> params: Probe;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn probe(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        switch params.function {
            case 0u: { y[at] = exp_f32(x[at]); }
            case 1u: { y[at] = log_f32(x[at]); }
            case 2u: { y[at] = tanh_f32(x[at]); }
            default: { y[at] = sigmoid_f32(x[at]); }
        }
    }
}
