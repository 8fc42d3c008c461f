// The vanilla recurrent network (Elman 1990): h = act(x + r + b), tanh or another activation.

const GATES = 1u;
const SLOTS = 1u;  // h, before any holding back
const STATES = 1u; // h
const PARAMS = 1u; // b_hh
const BIASES = 1u;
const PRODUCT = true;

override unit_params: u32 = 1u;
override kind: u32 = 1u; // tanh
override alpha: f32 = 0.0;
override beta: f32 = 0.0;
override clip: f32 = 0.0; // of the pre-activation; 0: none

fn recurrent_slot(gate: u32) -> u32 { return gate; }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let h = activate(kind, alpha, beta, clip_to(clip, x[0] + (r[0] + p[0])));
    return Forward(State(h), Slots(h));
}

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let da = d[0] * clipped_slope(kind, alpha, beta, clip, saved[0]);
    return Backward(Slots(da), State(0.0), Unit(0.0));
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State { return d; }
