// The scalar LSTM of xLSTM (Beck et al. 2024), with an exponential input gate, stabilized, and full recurrent matrices; gates
// i, f, z, o, where s = x + r + b:
//     m = max(log sigmoid(s_f) + m', s_i)    i = exp(s_i - m)    f = exp(log sigmoid(s_f) + m' - m)
//     c = f c' + i tanh(s_z)    n = f n' + i    h = sigmoid(s_o) c / n
// From n' = 0 all of i, c and n vanish in f32 where s_i lies some 69 below log sigmoid(s_f) + m': where n is below NONE, nothing
// has been let in yet, c / n counts as 0, and no gradient passes it.

const GATES = 4u;  // i, f, z, o
const SLOTS = 4u;  // s_i, s_f, tanh(s_z), sigmoid(s_o)
const STATES = 4u; // h, c, n, m
const PARAMS = 4u; // b_hh of i, f, z, o
const BIASES = 4u;
const PRODUCT = true;

override unit_params: u32 = 4u;

const NONE = 1e-30;

fn recurrent_slot(gate: u32) -> u32 { return gate; }

// log sigmoid(x): the first term exact, the second in (0, log 2].
fn log_sigmoid(x: f32) -> f32 { return select(x, 0.0, x > 0.0) - log_f32(1.0 + exp_f32(-abs(x))); }

// What the two gates make of m': m, i, f, and whether m comes from the past, as it does where both are equal.
struct Gates { m: f32, i: f32, f: f32, past: bool }

fn gates(s_i: f32, s_f: f32, m_before: f32) -> Gates {
    let a = log_sigmoid(s_f) + m_before;
    let past = !(s_i > a);
    // A difference of NaN with itself is NaN: it stays, whichever the comparison picks.
    let m = select(s_i, a, past);
    return Gates(m, exp_f32(s_i - m), exp_f32(a - m), past);
}

fn quotient(a: f32, n: f32) -> f32 { return select(a / n, 0.0, abs(n) < NONE); }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let s_i = x[0] + (r[0] + p[0]);
    let s_f = x[1] + (r[1] + p[1]);
    let z = tanh_f32(x[2] + (r[2] + p[2]));
    let o = sigmoid_f32(x[3] + (r[3] + p[3]));
    let g = gates(s_i, s_f, previous[3]);
    let c = g.f * previous[1] + g.i * z;
    let n = g.f * previous[2] + g.i;
    return Forward(State(o * quotient(c, n), c, n, g.m), Slots(s_i, s_f, z, o));
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State {
    let g = gates(saved[0], saved[1], previous[3]);
    let c = g.f * previous[1] + g.i * saved[2];
    let n = g.f * previous[2] + g.i;
    let dq = quotient(d[0] * saved[3], n);
    let dc = d[1] + dq;
    let dn = d[2] - dq * quotient(c, n);
    let dm = d[3] - (dc * saved[2] + dn) * g.i - (dc * previous[1] + dn * previous[2]) * g.f;
    return State(d[0], dc, dn, dm);
}

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let z = saved[2];
    let o = saved[3];
    // Computed again, not read from the stored state: a sweep may have held that one back.
    let g = gates(saved[0], saved[1], previous[3]);
    let c = g.f * previous[1] + g.i * z;
    let n = g.f * previous[2] + g.i;
    let q = quotient(c, n);
    let dq = quotient(d[0] * o, n);
    let d_out = d[0] * q * (o * (1.0 - o));
    let dc = d[1] + dq;
    let dn = d[2] - dq * q;
    // By the exponents of i and f; what m takes from both comes back to the larger of its two, whose own part cancels.
    var di = (dc * z + dn) * g.i;
    var da = (dc * previous[1] + dn * previous[2]) * g.f;
    if g.past { da = d[3] - di; } else { di = d[3] - da; }
    let slots = Slots(di, da * sigmoid_f32(-saved[1]), dc * g.i * (1.0 - z * z), d_out);
    return Backward(slots, State(0.0, dc * g.f, dn * g.f, da), Unit());
}
