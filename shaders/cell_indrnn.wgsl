// The independently recurrent network (Li et al. 2018): h = act(x + u h'), relu or another activation; a unit sees its own past
// alone, through one weight u.

const GATES = 1u;
const SLOTS = 1u;  // h, before any holding back
const STATES = 1u; // h
const PARAMS = 1u; // u
const BIASES = 0u;
const PRODUCT = false;

override unit_params: u32 = 1u;
override kind: u32 = 2u; // relu
override alpha: f32 = 0.0;
override beta: f32 = 0.0;

fn recurrent_slot(gate: u32) -> u32 { return gate; }

fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward {
    let h = activate(kind, alpha, beta, x[0] + p[0] * previous[0]);
    return Forward(State(h), Slots(h));
}

fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State { return d; }

fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward {
    let da = d[0] * slope(kind, alpha, beta, saved[0]);
    return Backward(Slots(da), State(da * p[0]), Unit(da * previous[0]));
}
