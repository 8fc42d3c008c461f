// minLSTM (Feng et al. 2024), with gates that add up to 1; gates and candidate see x alone, so that h is linear in h':
//     f, i = sigmoid(x)    h = f / (f + i) h' + i / (f + i) g(x_n)    g(v) = v + 1/2, for v < 0 sigmoid(v)

const GATES = 3u;  // f, i, n
const SLOTS = 3u;  // x_f, x_i, g(x_n)
const STATES = 1u; // h
const PARAMS = 1u; // none: an array cannot be empty
const BIASES = 0u;
const PRODUCT = false;

override unit_params: u32 = 0u;

fn recurrent_slot(gate: u32) -> u32 { return gate; }

fn softplus(x: f32) -> f32 { return select(x, 0.0, x < 0.0) + log_f32(1.0 + exp_f32(-abs(x))); }

// i / (f + i) = sigmoid(log i - log f): both may vanish, their quotient does not.
fn input_share(x_f: f32, x_i: f32) -> f32 { return sigmoid_f32(softplus(-x_f) - softplus(-x_i)); }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let share = input_share(x[0], x[1]);
    let g = positive(x[2]);
    return Forward(State((1.0 - share) * previous[0] + share * g), Slots(x[0], x[1], g));
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State { return d; }

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let share = input_share(saved[0], saved[1]);
    let g = saved[2];
    let dk = d[0] * (g - previous[0]) * (share * (1.0 - share));
    let slots = Slots(-dk * sigmoid_f32(-saved[0]), dk * sigmoid_f32(-saved[1]), d[0] * share * positive_slope(g));
    return Backward(slots, State(d[0] * (1.0 - share)), Unit(0.0));
}

// For a scan: see `sweep_scan.wgsl`.
fn scan_coefficients(x: Pre) -> vec2<f32> {
    let share = input_share(x[0], x[1]);
    return vec2(1.0 - share, share * positive(x[2]));
}

fn scan_decay(saved: Slots) -> f32 { return 1.0 - input_share(saved[0], saved[1]); }
