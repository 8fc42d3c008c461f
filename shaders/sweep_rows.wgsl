// One time step of any cell with layer normalization, given its product: a workgroup owns a row of the batch. It normalizes the
// product, gates in one group or two, and runs the cell for all units. Where the last state is normalized as well, on its way to h, the
// cell has left in place of h, and in its last slot, the other factor of h (of an LSTM o: h = o act(LN(c))). Backward the same in the
// opposite order; the statistics are computed again, by the same code. Composed with row_norm.wgsl, sweep_unit.wgsl,
// cell_contract.wgsl, one cell file and hold.wgsl.
//
// A lane owns units a workgroup apart, and reads back nothing that another lane stored. Gains and the shift are lines of `unit_values`
// behind the unit parameters: of each gate, then gain and shift of the state.

@group(0) @binding(8) var<storage, read> products: array<f32>;          // [lines, GATES, H], as they came
@group(0) @binding(9) var<storage, read_write> stats: array<vec2<f32>>; // forward: [groups, then the state, lines], as layer_norm.wgsl has them
@group(0) @binding(10) var<storage, read_write> dnorms: array<f32>;     // backward: [lines, GATES, then the state, H]: gradients of the
                                                                        // products, and of the normalized state

override first_group: u32 = GATES; // gates of the first group; the others are the second
override state_norm: bool = false; // whether the last state is normalized on its way to h
override state_kind: u32 = 1u;     // what it goes through after that: tanh
override state_alpha: f32 = 0.0;
override state_beta: f32 = 0.0;

const NORMED = STATES - 1u; // the state that is normalized
const FACTOR = SLOTS - 1u;  // the slot of the other factor of h

var<workgroup> first_of_state: f32;

// Of a row: the groups of gates in x and y, the state in z.
struct Normal { first: vec4<f32>, mean: vec4<f32>, inverse: vec4<f32> }

// What belongs to the group of a gate.
fn of_group(gate: u32, groups: vec2<f32>) -> f32 { return select(groups.x, groups.y, gate >= first_group); }

// Where a row of a step lies among those that are kept.
fn line_of(t: u32, row: u32) -> u32 { return t * params.rows % params.lines + row; }

fn stats_at(t: u32, row: u32, group: u32) -> u32 { return side * params.next_stats + group * params.lines + line_of(t, row); }

fn product_of(t: u32, row: u32, gate: u32, unit: u32) -> f32 {
    return products[side * params.next_between + (line_of(t, row) * GATES + gate) * params.hidden + unit];
}

// The state that is normalized, after the step.
fn normed_of(t: u32, row: u32, unit: u32) -> f32 { return states[state_at(NORMED, slot_after(t), row, unit)]; }

fn gain_of(line: u32, unit: u32) -> f32 {
    return unit_values[side * params.next_unit + (unit_params + line) * params.hidden + unit];
}

// column: a gate, or GATES, the state.
fn dnorm_at(t: u32, row: u32, column: u32, unit: u32) -> u32 {
    let columns = select(GATES, GATES + 1u, state_norm);
    return side * params.next_norms + (line_of(t, row) * columns + column) * params.hidden + unit;
}

// The statistics of the product, of the state, or of both.
fn measure(lane: u32, t: u32, row: u32, of_product: bool, of_state: bool, first: f32) -> Normal {
    let H = params.hidden;
    let gates = vec3(first_group, max(GATES - first_group, 1u), 1u);
    let widths = vec4(vec3<f32>(gates * H), 1.0);
    var n: Normal;
    n.first = vec4(product_of(t, row, 0u, 0u), product_of(t, row, min(first_group, GATES - 1u), 0u), first, 0.0);
    for (var squares = 0u; squares < 2u; squares++) {
        var sum = vec4<f32>();
        for (var unit = lane; unit < H; unit += lanes) {
            for (var g = 0u; of_product && g < GATES; g++) {
                let d = (product_of(t, row, g, unit) - of_group(g, n.first.xy)) - of_group(g, n.mean.xy);
                let part = select(d, d * d, squares == 1u);
                sum += select(vec4(part, 0.0, 0.0, 0.0), vec4(0.0, part, 0.0, 0.0), g >= first_group);
            }
            if of_state {
                let d = (normed_of(t, row, unit) - n.first.z) - n.mean.z;
                sum.z += select(d, d * d, squares == 1u);
            }
        }
        let means = workgroup_sum(lane, sum) / widths;
        if squares == 0u { n.mean = means; } else { n.inverse = inverse_deviation(means); }
    }
    return n;
}

fn normal_product(t: u32, row: u32, gate: u32, unit: u32, n: Normal) -> f32 {
    let x = product_of(t, row, gate, unit);
    return normal(x, of_group(gate, n.first.xy), of_group(gate, n.mean.xy), of_group(gate, n.inverse.xy));
}

fn normal_state(t: u32, row: u32, unit: u32, n: Normal) -> f32 {
    return normal(normed_of(t, row, unit), n.first.z, n.mean.z, n.inverse.z);
}

// What h is made of with the other factor, where the state is xhat.
fn shown(unit: u32, xhat: f32) -> f32 {
    return activate(state_kind, state_alpha, state_beta, gain_of(GATES, unit) * xhat + gain_of(GATES + 1u, unit));
}

@compute @workgroup_size(lanes)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let H = params.hidden;
    let own = take_tile(group, groups);
    let t = step_of(params.t);
    for (var row = own.x; row < params.rows; row += groups.x / params.sides) {
        let n = measure(lane, t, row, true, false, 0.0);
        if lane == 0u {
            stats[stats_at(t, row, 0u)] = vec2(n.mean.x, n.inverse.x);
            if first_group < GATES { stats[stats_at(t, row, 1u)] = vec2(n.mean.y, n.inverse.y); }
        }
        for (var unit = lane; unit < H; unit += lanes) {
            var r: Pre;
            for (var g = 0u; g < GATES; g++) { r[g] = gain_of(g, unit) * normal_product(t, row, g, unit, n); }
            let previous = load_state(slot_before(t), row, unit);
            let state = forward_unit(t, row, unit, load_input(t, row, unit), r, previous, load_unit(unit));
            store_state(slot_after(t), row, unit, state);
            if unit == 0u { first_of_state = state[NORMED]; }
        }
        if state_norm {
            workgroupBarrier();
            let n = measure(lane, t, row, false, true, first_of_state);
            if lane == 0u { stats[stats_at(t, row, select(1u, 2u, first_group < GATES))] = vec2(n.mean.z, n.inverse.z); }
            let valid = is_valid(t, row);
            for (var unit = lane; unit < H; unit += lanes) {
                let at = state_at(0u, slot_after(t), row, unit);
                var h = states[at];
                if valid {
                    h *= shown(unit, normal_state(t, row, unit, n));
                    states[at] = h;
                }
                if params.shows == 1u { y[y_at(t, row, unit)] = select(0.0, h, valid); }
            }
        }
    }
}

@compute @workgroup_size(lanes)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let H = params.hidden;
    let own = take_tile(group, groups);
    let t = step_of(params.t);
    for (var row = own.x; row < params.rows; row += groups.x / params.sides) {
        let n = measure(lane, t, row, true, state_norm, normed_of(t, row, 0u));

        // From the gradient of h to that of its other factor, in its place, and that of the normalized state.
        var means = vec4<f32>();
        if state_norm {
            let valid = is_valid(t, row);
            for (var unit = lane; unit < H; unit += lanes) {
                let xhat = normal_state(t, row, unit, n);
                var dshown = 0.0;
                if valid {
                    let at = gradient_at(0u, row, unit);
                    var dh = dstates[at];
                    if params.shows == 1u { dh += y[y_at(t, row, unit)]; }
                    let value = shown(unit, xhat);
                    dstates[at] = dh * value;
                    dshown = dh * slots[slot_at(t, row, FACTOR, unit)] * slope(state_kind, state_alpha, state_beta, value);
                }
                dnorms[dnorm_at(t, row, GATES, unit)] = dshown;
                let g = gain_of(GATES, unit) * dshown;
                means += vec4(g, g * xhat, 0.0, 0.0);
            }
            means = workgroup_sum(lane, means) / f32(H);
        }

        // The cell; what it leaves to the product.
        var sum = vec4<f32>();
        for (var unit = lane; unit < H; unit += lanes) {
            var later = load_gradient(row, unit);
            if state_norm {
                let g = gain_of(GATES, unit) * dnorms[dnorm_at(t, row, GATES, unit)];
                later[NORMED] += normal_backward(g, normal_state(t, row, unit, n), means.xy, n.inverse.z);
            }
            let step = backward_unit(t, row, unit, load_kept(t, row, unit), later, load_unit(unit));
            store_gradient(row, unit, step.d);
            if sums { add_sums(row, unit, step.dunit, step.clipped); }
            for (var g = 0u; g < GATES; g++) {
                let scaled = gain_of(g, unit) * step.dslots[recurrent_slot(g)];
                let part = vec2(scaled, scaled * normal_product(t, row, g, unit, n));
                sum += select(vec4(part, 0.0, 0.0), vec4(0.0, 0.0, part), g >= first_group);
            }
        }
        let widths = vec2<f32>(vec2(first_group, max(GATES - first_group, 1u)) * H);
        means = workgroup_sum(lane, sum) / vec4(widths.x, widths.x, widths.y, widths.y);
        for (var unit = lane; unit < H; unit += lanes) {
            for (var g = 0u; g < GATES; g++) {
                let scaled = gain_of(g, unit) * slots[slot_at(t, row, recurrent_slot(g), unit)];
                let xhat = normal_product(t, row, g, unit, n);
                let own = select(means.xy, means.zw, g >= first_group);
                dnorms[dnorm_at(t, row, g, unit)] = normal_backward(scaled, xhat, own, of_group(g, n.inverse.xy));
            }
        }
    }
}
