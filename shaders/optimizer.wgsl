// Clipping by global norm, then by value, SGD with momentum (Sutskever et al. 2013, in PyTorch's form) and AdamW (Loshchilov & Hutter 2019)
// over the flat parameter arena. A step whose gradient is not finite changes nothing but the count of skipped steps.
// The step count and Adam's bias corrections live on the device, so that the host need not wait to know them.

struct Optimizer {
    count: u32, // numbers in the arena
    learning_rate: f32,
    weight_decay: f32,
    max_norm: f32, // clip to this global norm; 0: do not clip
    momentum: f32, // SGD
    beta1: f32,    // AdamW
    beta2: f32,
    one_minus_beta1: f32, // rounded once, on the host: 1 - 0.999f has only 4 good digits
    one_minus_beta2: f32,
    epsilon: f32,
    max_value: f32, // clip each element to -max_value .. max_value, after the norm; 0: do not clip
}

struct Control {
    norm: f32,        // of the last gradient, before clipping
    scale: f32,       // that clipping gives it
    correction1: f32, // 1 - beta1^steps
    correction2: f32, // 1 - beta2^steps
    skip: u32,        // 1: the last gradient was not finite
    steps: u32,       // applied
    skipped: u32,
    clipped: u32,
    clipped_values: atomic<u32>, // elements that the last step clipped by value: a sum that no order changes
    values_low: u32,             // those of the steps before it, 64 bits
    values_high: u32,
    value_steps: u32,            // steps before it that clipped any
}

@group(0) @binding(0) var<uniform> params: Optimizer;
@group(0) @binding(1) var<storage, read_write> control: Control;

// prepare: one invocation; squares [1]: the sum of all squared gradients.
@group(0) @binding(2) var<storage, read> squares: array<f32>;

@compute @workgroup_size(1)
fn prepare() {
    let clipped_values = atomicExchange(&control.clipped_values, 0u);
    control.values_low += clipped_values;
    control.values_high += select(0u, 1u, control.values_low < clipped_values);
    control.value_steps += select(0u, 1u, clipped_values > 0u);
    let finite = is_finite_bits(squares[0]);
    let norm = sqrt(squares[0]);
    control.norm = norm;
    control.scale = 1.0;
    control.skip = select(1u, 0u, finite);
    if !finite {
        control.skipped += 1u;
        return;
    }
    if params.max_norm > 0.0 && norm > params.max_norm {
        control.scale = params.max_norm / (norm + 1e-6); // PyTorch's guard
        control.clipped += 1u;
    }
    control.steps += 1u;
    // 1 - b^(t+1) = b (1 - b^t) + (1 - b): no cancellation, unlike the power itself.
    control.correction1 = params.beta1 * control.correction1 + params.one_minus_beta1;
    control.correction2 = params.beta2 * control.correction2 + params.one_minus_beta2;
}

@group(0) @binding(3) var<storage, read_write> value: array<f32>;
@group(0) @binding(4) var<storage, read_write> gradient: array<f32>; // zeroed: the next backward adds to it
@group(0) @binding(5) var<storage, read_write> first: array<f32>;    // momentum, or Adam's first moment
@group(0) @binding(6) var<storage, read_write> second: array<f32>;   // Adam's second moment

const LANES = 64u;

// The gradient at a place after both clips, and whether the second acted.
struct Clipped { g: f32, acted: bool }

fn clipped_gradient(at: u32) -> Clipped {
    let scaled = gradient[at] * control.scale;
    let g = clip_to(params.max_value, scaled);
    return Clipped(g, g != scaled && control.skip == 0u);
}

@compute @workgroup_size(LANES)
fn sgd(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    var clipped_values = 0u;
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        let clipped = clipped_gradient(at);
        let g = clipped.g + params.weight_decay * value[at];
        gradient[at] = 0.0;
        if control.skip == 1u { continue; }
        let velocity = params.momentum * first[at] + g;
        first[at] = velocity;
        value[at] -= params.learning_rate * velocity;
        clipped_values += select(0u, 1u, clipped.acted);
    }
    if clipped_values > 0u { atomicAdd(&control.clipped_values, clipped_values); }
}

@compute @workgroup_size(LANES)
fn adamw(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let root = sqrt(control.correction2);
    var clipped_values = 0u;
    for (var at = id.x; at < params.count; at += groups.x * LANES) {
        let clipped = clipped_gradient(at);
        let g = clipped.g;
        gradient[at] = 0.0;
        if control.skip == 1u { continue; }
        let m = params.beta1 * first[at] + params.one_minus_beta1 * g;
        let v = params.beta2 * second[at] + params.one_minus_beta2 * g * g;
        first[at] = m;
        second[at] = v;
        let decayed = value[at] - params.learning_rate * params.weight_decay * value[at];
        value[at] = decayed - params.learning_rate / control.correction1 * m / (sqrt(v) / root + params.epsilon);
        clipped_values += select(0u, 1u, clipped.acted);
    }
    if clipped_values > 0u { atomicAdd(&control.clipped_values, clipped_values); }
}
