// The steps of sweep_step.wgsl, which this file is composed with, for software drivers whose subgroups have 8 lanes, with the
// tiles of gemm_subgroup.wgsl and for its reasons: a workgroup is a subgroup, a lane has 4 neighbouring units, and what the
// rows bring is loaded by the lane that stands for the row and spread. H is a multiple of 4. Composed with subgroup_rows.wgsl.

@group(0) @binding(3) var<storage, read> weight_vectors: array<vec4<f32>>;

const SUBGROUP = 8u;
const TILE_UNITS = 32u; // of a workgroup
const FORWARD_ROWS = 16u;
const BACKWARD_ROWS = 32u;

alias GateRows = array<Rows, GATES>;

// As `multiply` of subgroup_rows.wgsl, for the sums of one gate: WGSL passes no pointer to an element.
fn multiply_gate(sums: ptr<function, GateRows>, g: u32, h: f32, w: vec4<f32>) {
    (*sums)[g][0] += subgroupBroadcast(h, 0u) * w;
    (*sums)[g][1] += subgroupBroadcast(h, 1u) * w;
    (*sums)[g][2] += subgroupBroadcast(h, 2u) * w;
    (*sums)[g][3] += subgroupBroadcast(h, 3u) * w;
    (*sums)[g][4] += subgroupBroadcast(h, 4u) * w;
    (*sums)[g][5] += subgroupBroadcast(h, 5u) * w;
    (*sums)[g][6] += subgroupBroadcast(h, 6u) * w;
    (*sums)[g][7] += subgroupBroadcast(h, 7u) * w;
}

@compute @workgroup_size(SUBGROUP)
fn forward_subgroup(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let H = params.hidden;
    let tile = by_columns(take_tile(group, groups), vec2(groups.x / params.directions, groups.y * groups.z));
    let unit = tile.x * TILE_UNITS + 4u * lane;
    let row = tile.y * FORWARD_ROWS;

    // Rows and units past the end repeat the last ones, so that all lanes take part; their results are not stored.
    let last = params.rows - 1u;
    let before = slot_before(step_of(params.t));
    let at0 = state_at(0u, before, min(row + lane, last), 0u);
    let at1 = state_at(0u, before, min(row + SUBGROUP + lane, last), 0u);
    let stride = H / 4u;
    var w = (first_weight() + min(unit, H - 4u)) / 4u;
    var r0 = GateRows();
    var r1 = GateRows();
    for (var k = 0u; k < H; k++) {
        let h0 = states[at0 + k];
        let h1 = states[at1 + k];
        for (var g = 0u; g < GATES; g++) {
            let values = weight_vectors[w + g * stride];
            multiply_gate(&r0, g, h0, values);
            multiply_gate(&r1, g, h1, values);
        }
        w += GATES * stride;
    }

    if unit < H {
        // What is indexed with variables lies in memory: a copy does, not the sums of the loop above.
        var r = array<GateRows, 2>(r0, r1);
        for (var i = 0u; i < 4u; i++) {
            let p = load_unit(unit + i);
            for (var j = 0u; j < FORWARD_ROWS && row + j < params.rows; j++) {
                var product: Pre;
                for (var g = 0u; g < GATES; g++) { product[g] = r[j / 8u][g][j % 8u][i]; }
                step_forward(row + j, unit + i, product, p);
            }
        }
    }
}

@compute @workgroup_size(SUBGROUP)
fn backward_subgroup(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let H = params.hidden;
    let tile = by_columns(take_tile(group, groups), vec2(groups.x / params.directions, groups.y * groups.z));
    let unit = tile.x * TILE_UNITS + 4u * lane;
    let row = tile.y * BACKWARD_ROWS;

    var d0 = Rows(); var d1 = Rows(); var d2 = Rows(); var d3 = Rows();
    if params.recurrent == 1u {
        let later = step_later();
        let last = params.rows - 1u;
        for (var g = 0u; g < GATES; g++) {
            let slot = recurrent_slot(g);
            let at0 = slot_at(later, min(row + lane, last), slot, 0u);
            let at1 = slot_at(later, min(row + 8u + lane, last), slot, 0u);
            let at2 = slot_at(later, min(row + 16u + lane, last), slot, 0u);
            let at3 = slot_at(later, min(row + 24u + lane, last), slot, 0u);
            var w = (first_weight() + g * H * H + min(unit, H - 4u)) / 4u;
            for (var k = 0u; k < H; k++) {
                let values = weight_vectors[w];
                multiply(&d0, slots[at0 + k], values); multiply(&d1, slots[at1 + k], values);
                multiply(&d2, slots[at2 + k], values); multiply(&d3, slots[at3 + k], values);
                w += H / 4u;
            }
        }
    }

    if unit < H {
        var dh = array<Rows, 4>(d0, d1, d2, d3);
        for (var i = 0u; i < 4u; i++) {
            let p = load_unit(unit + i);
            for (var first = 0u; first < BACKWARD_ROWS && row + first < params.rows; first += ROWS) {
                var dunit: Unit;
                for (var k = 0u; k < PARAMS; k++) { dunit[k] = 0.0; }
                var clipped = 0u;
                for (var j = first; j < first + ROWS && row + j < params.rows; j++) {
                    let step = step_backward(row + j, unit + i, dh[j / 8u][j % 8u][i], p);
                    for (var k = BIASES; k < PARAMS; k++) { dunit[k] += step.dunit[k]; }
                    clipped += step.clipped;
                }
                if sums { add_sums((row + first) / ROWS, unit + i, dunit, clipped); }
            }
        }
    }
}
