// The first launch of a step of a GRU whose reset gate acts before the product (Cho et al. 2014): the products of r and z with h,
// then what the product of n sees, r h. Backward it is the first of a step as well: what came through these products at the step
// handled before, then the cell. For sweep_step.wgsl, step_from_h.wgsl and cell_gru.wgsl; step_candidate.wgsl is the other launch.

const SUMS = 2u;
const FIRST = 0u;
const ALL = GATES;

fn step_forward(row: u32, unit: u32, r: Sums, p: Unit) {
    let t = step_of(params.t);
    for (var g = 0u; g < SUMS; g++) { products[product_at(row, g, unit)] = r[g]; }
    let reset = gate(slots[slot_at(t, row, 0u, unit)] + (r[0] + p[0]));
    // Not in the slot that keeps it: the other launch stores that while other lanes still read this.
    products[product_at(row, 2u, unit)] = reset * states[state_at(0u, slot_before(t), row, unit)];
}
