// What a cell and a sweep know of each other. A cell file defines
//     GATES, SLOTS, STATES     sizes; state 0 is h; SLOTS >= GATES: values kept for each unit and step
//     PARAMS, BIASES           a unit's own parameters: the recurrent bias of each gate first, then those whose gradient the sweep sums
//     override unit_params     how many of them the buffer holds: the rest are zero and have no gradient
//     PRODUCT                  whether there is a recurrent product at all
//     fn recurrent_slot(gate: u32) -> u32      the slot that gets the gradient of the gate's recurrent part
//     fn cell_forward(site: Site, x: Pre, r: Pre, previous: State, p: Unit) -> Forward
//     fn cell_backward(site: Site, saved: Slots, previous: State, p: Unit, d: State) -> Backward
//     fn cell_totals(saved: Slots, previous: State, p: Unit, d: State) -> State
//                              d and what the new state's parts get from each other within the step (c goes into h)
//     for `sweep_scan.wgsl`, where a cell is linear in its one state: scan_coefficients and scan_decay, described there
// and a sweep file calls them for each step, row and unit. x is the input part W_ih x + b_ih, r the product W_hh h of a
// unit's gates, p the unit's own parameters, d the gradient of the new state. Options of a cell are pipeline constants. Where the
// last gate's product sees not h but what another gate makes of it, files of the cell's own make that (step_reset.wgsl, gru_reset.wgsl).

alias Pre = array<f32, GATES>;
alias Slots = array<f32, SLOTS>;
alias State = array<f32, STATES>;
alias Unit = array<f32, PARAMS>;

// Where a unit stands: keys for random masks. t counts from the start of the sequence, whatever window is computed.
struct Site { key0: u32, key1: u32, t: u32, row: u32, unit: u32 }

struct Forward { state: State, saved: Slots }

// Slots 0 .. GATES hold the gradient of x; previous gets the direct path only, not the one through W_hh; of unit only those
// from BIASES on count.
struct Backward { dslots: Slots, dprevious: State, dunit: Unit }
