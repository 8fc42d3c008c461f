// Clipping by global norm, then by value, SGD with momentum (Sutskever et al. 2013, in PyTorch's form) and AdamW (Loshchilov & Hutter 2019)
// over the flat parameter arena. A step whose gradient is not finite changes nothing but the count of skipped steps.
// Gradients may be those of the loss times a scale, a power of two that follows what they allow (Micikevicius et al. 2018, "Mixed Precision
// Training"): it halves when a step is skipped, and doubles after `growth_interval` steps without one.
// The step count, the scale and Adam's bias corrections live on the device, so that the host need not wait to know them.

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
    loss_scale: f32,      // to start with; 0: gradients are those of the loss itself
    growth_interval: u32,
}

struct Control {
    norm: f32,        // of the last gradient, before clipping
    scale: f32,       // that clipping and the loss's scale give it
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
    loss_scale: f32, // of the next gradient; 0 before the first step
    good_steps: u32, // since the scale changed
}

@group(0) @binding(0) var<uniform> params: Optimizer;
@group(0) @binding(1) var<storage, read_write> control: Control;

// prepare: one invocation; squares [1]: the sum of all squared gradients.
@group(0) @binding(2) var<storage, read> squares: array<f32>;

const LEAST_LOSS_SCALE = 1.0;
const LARGEST_LOSS_SCALE = 16777216.0; // 2^24

fn present_loss_scale() -> f32 {
    if params.loss_scale == 0.0 { return 1.0; }
    return select(control.loss_scale, params.loss_scale, control.loss_scale == 0.0);
}

@compute @workgroup_size(1)
fn prepare() {
    let clipped_values = atomicExchange(&control.clipped_values, 0u);
    control.values_low += clipped_values;
    control.values_high += select(0u, 1u, control.values_low < clipped_values);
    control.value_steps += select(0u, 1u, clipped_values > 0u);
    let finite = is_finite_bits(squares[0]);
    let loss_scale = present_loss_scale();
    let norm = sqrt(squares[0]) / loss_scale;
    control.norm = norm;
    control.scale = 1.0 / loss_scale;
    control.skip = select(1u, 0u, finite);
    if !finite {
        control.skipped += 1u;
        if params.loss_scale > 0.0 {
            control.loss_scale = max(LEAST_LOSS_SCALE, loss_scale / 2.0);
            control.good_steps = 0u;
        }
        return;
    }
    if params.loss_scale > 0.0 {
        control.loss_scale = loss_scale;
        control.good_steps += 1u;
        if control.good_steps >= params.growth_interval {
            control.loss_scale = min(LARGEST_LOSS_SCALE, loss_scale * 2.0);
            control.good_steps = 0u;
        }
    }
    if params.max_norm > 0.0 && norm > params.max_norm {
        control.scale = params.max_norm / (norm + 1e-6) / loss_scale; // PyTorch's guard
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

@group(0) @binding(7) var<storage, read> dy: array<f32>; // scale_loss: of the loss by what the model gave, and that times the scale
@group(0) @binding(8) var<storage, read_write> scaled: array<f32>;

@compute @workgroup_size(LANES)
fn scale_loss(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var at = id.x; at < params.count; at += groups.x * LANES) { scaled[at] = present_loss_scale() * dy[at]; }
}

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
