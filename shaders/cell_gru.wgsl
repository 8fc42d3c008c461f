// The gated recurrent unit (Cho et al. 2014), gates in PyTorch's order:
//     r, z = sigmoid(x + r + b)    n = tanh(x_n + q)    h = (1 - z) n + z h'
// with the reset gate after the product, q = r (W_hn h' + b_hn) (PyTorch, cuDNN), or before it, q = W_hn (r h') + b_hn (the
// original; ONNX's default). Before it `step_reset.wgsl`, or `gru_reset.wgsl`, forms r h', and its product comes in as r[2].

const GATES = 3u;  // r, z, n
const SLOTS = 4u;  // r, z, n after their functions; after: W_hn h' + b_hn, before: r h'
const STATES = 1u; // h
const PARAMS = 3u; // b_hh of r, z, n
const BIASES = 3u;
const PRODUCT = true;

override unit_params: u32 = 3u;
override reset_before: bool = false;
override gate_kind: u32 = 0u; // sigmoid
override gate_alpha: f32 = 0.0;
override gate_beta: f32 = 0.0;
override candidate_kind: u32 = 1u; // tanh
override candidate_alpha: f32 = 0.0;
override candidate_beta: f32 = 0.0;
override clip: f32 = 0.0; // of each pre-activation; 0: none

fn recurrent_slot(gate: u32) -> u32 { return select(gate, 3u, gate == 2u && !reset_before); }

fn gate(x: f32) -> f32 { return activate(gate_kind, gate_alpha, gate_beta, clip_to(clip, x)); }
fn gate_slope(y: f32) -> f32 { return clipped_slope(gate_kind, gate_alpha, gate_beta, clip, y); }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let reset = gate(x[0] + (r[0] + p[0]));
    let z = gate(x[1] + (r[1] + p[1]));
    let q = r[2] + p[2];
    let n = activate(candidate_kind, candidate_alpha, candidate_beta, clip_to(clip, x[2] + select(reset * q, q, reset_before)));
    return Forward(State((1.0 - z) * n + z * previous[0]), Slots(reset, z, n, select(q, reset * previous[0], reset_before)));
}

// With the reset before the product, slot 0 keeps the gate and slot 3 r h': their gradients follow from the product of dn
// with W_hn, in `step_candidate.wgsl` or `gru_reset.wgsl`.
fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let reset = saved[0];
    let z = saved[1];
    let n = saved[2];
    let q = saved[3];
    let dn = d[0] * (1.0 - z) * clipped_slope(candidate_kind, candidate_alpha, candidate_beta, clip, n);
    let dz = d[0] * (previous[0] - n) * gate_slope(z);
    let dr = dn * q * gate_slope(reset);
    let slots = Slots(select(dr, reset, reset_before), dz, dn, select(dn * reset, q, reset_before));
    return Backward(slots, State(d[0] * z), Unit());
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State { return d; }
