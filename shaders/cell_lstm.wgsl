// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), gates in PyTorch's order:
//     i, f, o = sigmoid(x + r + b)    g = tanh(x + r + b)    c = f c' + i g    h = o tanh(c)
// Options: peepholes (Gers & Schmidhuber 2000: i and f see c', o sees c), coupled gates (f = 1 - i, Greff et al. 2015), other
// activations, a limit for each pre-activation (ONNX's clip), and a limit for c.

const GATES = 4u;  // i, f, g, o
const SLOTS = 4u;  // the same, after their functions
const STATES = 2u; // h, c
const PARAMS = 7u; // b_hh of i, f, g, o; peepholes of i, f, o
const BIASES = 4u;
const PRODUCT = true;

override unit_params: u32 = 4u; // 7 with peepholes
override coupled: bool = false;
override gate_kind: u32 = 0u; // sigmoid
override gate_alpha: f32 = 0.0;
override gate_beta: f32 = 0.0;
override candidate_kind: u32 = 1u; // tanh
override candidate_alpha: f32 = 0.0;
override candidate_beta: f32 = 0.0;
override output_kind: u32 = 1u; // tanh
override output_alpha: f32 = 0.0;
override output_beta: f32 = 0.0;
override clip: f32 = 0.0;      // 0: none
override cell_clip: f32 = 0.0; // 0: none

fn recurrent_slot(gate: u32) -> u32 { return gate; }

fn gate(x: f32) -> f32 { return activate(gate_kind, gate_alpha, gate_beta, clip_to(clip, x)); }
fn gate_slope(y: f32) -> f32 { return clipped_slope(gate_kind, gate_alpha, gate_beta, clip, y); }
// 0 without peepholes: 0 c would be NaN for a c that is infinite.
fn peephole(p: f32, c: f32) -> f32 { return select(0.0, p * c, unit_params > BIASES); }
fn output(c: f32) -> f32 { return activate(output_kind, output_alpha, output_beta, c); }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let i = gate(x[0] + (r[0] + p[0]) + peephole(p[4], previous[1]));
    var f = 1.0 - i;
    if !coupled { f = gate(x[1] + (r[1] + p[1]) + peephole(p[5], previous[1])); }
    let g = activate(candidate_kind, candidate_alpha, candidate_beta, clip_to(clip, x[2] + (r[2] + p[2])));
    let c = clip_to(cell_clip, f * previous[1] + i * g);
    let o = gate(x[3] + (r[3] + p[3]) + peephole(p[6], c));
    return Forward(State(o * output(c), c), Slots(i, f, g, o));
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State {
    let o = saved[3];
    let y = output(clip_to(cell_clip, saved[1] * previous[1] + saved[0] * saved[2]));
    let d_out = d[0] * y * gate_slope(o);
    return State(d[0], d[1] + d[0] * o * slope(output_kind, output_alpha, output_beta, y) + d_out * p[6]);
}

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let i = saved[0];
    let f = saved[1];
    let g = saved[2];
    let o = saved[3];
    // Computed again, not read from the stored state: a sweep may have held that one back.
    let free = f * previous[1] + i * g;
    let c = clip_to(cell_clip, free);
    let y = output(c);
    let d_out = d[0] * y * gate_slope(o);
    let dc_clipped = d[1] + d[0] * o * slope(output_kind, output_alpha, output_beta, y) + d_out * p[6];
    let dc = select(dc_clipped, 0.0, cell_clip > 0.0 && abs(free) > cell_clip);
    var di = dc * g;
    var df = dc * previous[1];
    if coupled { di -= df; df = 0.0; }
    di *= gate_slope(i);
    df *= gate_slope(f);
    let dg = dc * i * clipped_slope(candidate_kind, candidate_alpha, candidate_beta, clip, g);
    let unit = Unit(0.0, 0.0, 0.0, 0.0, di * previous[1], df * previous[1], d_out * c);
    return Backward(Slots(di, df, dg, d_out), State(0.0, dc * f + di * p[4] + df * p[5]), unit);
}
