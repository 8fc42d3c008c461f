// minGRU (Feng et al. 2024): gates and candidate see x alone, so that h is linear in h':
//     z = sigmoid(x_z)    h = (1 - z) h' + z g(x_n)    g(v) = v + 1/2, for v < 0 sigmoid(v)

const GATES = 2u;  // z, n
const SLOTS = 2u;  // sigmoid(x_z), g(x_n)
const STATES = 1u; // h
const PARAMS = 1u; // none: an array cannot be empty
const BIASES = 0u;
const PRODUCT = false;

override unit_params: u32 = 0u;

fn recurrent_slot(gate: u32) -> u32 { return gate; }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let z = sigmoid_f32(x[0]);
    let g = positive(x[1]);
    return Forward(State((1.0 - z) * previous[0] + z * g), Slots(z, g));
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State { return d; }

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let z = saved[0];
    let g = saved[1];
    let dz = d[0] * (g - previous[0]) * (z * (1.0 - z));
    return Backward(Slots(dz, d[0] * z * positive_slope(g)), State(d[0] * (1.0 - z)), Unit(0.0));
}

// For a scan: see `sweep_scan.wgsl`.
fn scan_coefficients(x: Pre) -> vec2<f32> {
    let z = sigmoid_f32(x[0]);
    return vec2(1.0 - z, z * positive(x[1]));
}

fn scan_decay(saved: Slots) -> f32 { return 1.0 - saved[0]; }
