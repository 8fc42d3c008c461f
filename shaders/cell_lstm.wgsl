// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), gates in PyTorch's order:
//     i, f, o = sigmoid(x + r + b)    g = tanh(x + r + b)    c = f c' + i g    h = o tanh(c)

const GATES = 4u; // i, f, g, o
const SLOTS = 4u; // the same, after their functions
const STATES = 2u; // h, c
const PARAMS = 4u; // b_hh of i, f, g, o

fn recurrent_slot(gate: u32) -> u32 { return gate; }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let i = sigmoid_f32(x[0] + (r[0] + p[0]));
    let f = sigmoid_f32(x[1] + (r[1] + p[1]));
    let g = tanh_f32(x[2] + (r[2] + p[2]));
    let o = sigmoid_f32(x[3] + (r[3] + p[3]));
    let c = f * previous[1] + i * g;
    return Forward(State(o * tanh_f32(c), c), Slots(i, f, g, o));
}

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let i = saved[0];
    let f = saved[1];
    let g = saved[2];
    let o = saved[3];
    // Computed again, not read from the stored state: a sweep may have held that one back.
    let tanh_c = tanh_f32(f * previous[1] + i * g);
    let dc = d[1] + d[0] * o * (1.0 - tanh_c * tanh_c);
    let di = dc * g * i * (1.0 - i);
    let df = dc * previous[1] * f * (1.0 - f);
    let dg = dc * i * (1.0 - g * g);
    let d_out = d[0] * tanh_c * o * (1.0 - o);
    return Backward(Slots(di, df, dg, d_out), State(0.0, dc * f));
}
