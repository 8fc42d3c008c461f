// The activations of ONNX's recurrent operators, and their slopes as functions of their values: a cell keeps the value of
// a gate alone. Which one a cell uses is a pipeline constant, so that the compiler keeps one branch.

const SIGMOID = 0u;
const TANH = 1u;
const RELU = 2u;
const HARD_SIGMOID = 3u;     // max(0, min(1, alpha x + beta))
const SOFTSIGN = 4u;         // x / (1 + |x|)
const LEAKY_RELU = 5u;       // x, for x < 0 alpha x
const ELU = 6u;              // x, for x < 0 alpha (e^x - 1)
const SOFTPLUS = 7u;         // log(1 + e^x)
const SCALED_TANH = 8u;      // alpha tanh(beta x)
const AFFINE = 9u;           // alpha x + beta
const THRESHOLDED_RELU = 10u; // x, for x <= alpha 0

fn activate(kind: u32, alpha: f32, beta: f32, x: f32) -> f32 {
    switch kind {
        case SIGMOID: { return sigmoid_f32(x); }
        case TANH: { return tanh_f32(x); }
        case RELU: { return select(x, 0.0, x < 0.0); } // no max(): it may drop NaN
        case HARD_SIGMOID: {
            let y = alpha * x + beta;
            return select(select(y, 1.0, y > 1.0), 0.0, y < 0.0);
        }
        case SOFTSIGN: { return x / (1.0 + abs(x)); }
        case LEAKY_RELU: { return select(x, alpha * x, x < 0.0); }
        case ELU: { return select(x, alpha * (exp_f32(x) - 1.0), x < 0.0); }
        case SOFTPLUS: { return select(x, 0.0, x < 0.0) + log_f32(1.0 + exp_f32(-abs(x))); }
        case SCALED_TANH: { return alpha * tanh_f32(beta * x); }
        case AFFINE: { return alpha * x + beta; }
        default: { return select(x, 0.0, x <= alpha); }
    }
}

// The slope where the activation has the value y.
fn slope(kind: u32, alpha: f32, beta: f32, y: f32) -> f32 {
    switch kind {
        case SIGMOID: { return y * (1.0 - y); }
        case TANH: { return 1.0 - y * y; }
        case RELU: { return select(0.0, 1.0, y > 0.0); }
        case HARD_SIGMOID: { return select(0.0, alpha, y > 0.0 && y < 1.0); }
        case SOFTSIGN: {
            let rest = 1.0 - abs(y);
            return rest * rest;
        }
        case LEAKY_RELU: { return select(1.0, alpha, y < 0.0); }
        case ELU: { return select(1.0, y + alpha, y < 0.0); }
        case SOFTPLUS: { return 1.0 - exp_f32(-y); }
        case SCALED_TANH: { return beta * (alpha - y * (y / alpha)); }
        case AFFINE: { return alpha; }
        default: { return select(0.0, 1.0, y != 0.0); }
    }
}

// x in [-limit, limit], NaN as it is; a limit of 0 stands for none.
fn clip_to(limit: f32, x: f32) -> f32 {
    if limit == 0.0 { return x; }
    return select(select(x, limit, x > limit), -limit, x < -limit);
}

// The slope of activate(clip_to(limit, x)): none where the value is that of a bound.
fn clipped_slope(kind: u32, alpha: f32, beta: f32, limit: f32, y: f32) -> f32 {
    let plain = slope(kind, alpha, beta, y);
    if limit == 0.0 { return plain; }
    return select(plain, 0.0, y == activate(kind, alpha, beta, limit) || y == activate(kind, alpha, beta, -limit));
}
