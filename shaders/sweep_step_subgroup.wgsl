// The steps of sweep_step.wgsl, which this file is composed with, for software drivers whose subgroups have 8 lanes, with the
// tiles of gemm_subgroup.wgsl and for its reasons: a workgroup is a subgroup, a lane has 4 neighbouring units, and what the
// rows bring is loaded by the lane that stands for the row and spread. What is seen and what is made are multiples of 4. Composed with
// subgroup_rows.wgsl.

@group(0) @binding(3) var<storage, read> weight_vectors: array<vec4<f32>>;

const SUBGROUP = 8u;
const TILE_UNITS = 32u; // of a workgroup
const FORWARD_ROWS = 16u;
const BACKWARD_ROWS = 32u;

alias GateRows = array<Rows, SUMS>;

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
    let seen_count = seen_width();
    let made_count = made_width();
    let tile = by_columns(take_tile(group, groups), vec2(groups.x / params.sides, groups.y * groups.z));
    let unit = tile.x * TILE_UNITS + 4u * lane;
    let row = tile.y * FORWARD_ROWS;

    // Rows and units past the end repeat the last ones, so that all lanes take part; their results are not stored.
    let last = params.rows - 1u;
    let at0 = seen_at(min(row + lane, last));
    let at1 = seen_at(min(row + SUBGROUP + lane, last));
    let stride = made_count / 4u;
    var w = forward_weight(0u, min(unit, made_count - 4u)) / 4u;
    var r0 = GateRows();
    var r1 = GateRows();
    for (var k = 0u; k < seen_count; k++) {
        let h0 = seen(at0 + k);
        let h1 = seen(at1 + k);
        for (var g = 0u; g < SUMS; g++) {
            let values = weight_vectors[w + g * stride];
            multiply_gate(&r0, g, h0, values);
            multiply_gate(&r1, g, h1, values);
        }
        w += ALL * stride;
    }

    if unit < made_count {
        // What is indexed with variables lies in memory: a copy does, not the sums of the loop above.
        var r = array<GateRows, 2>(r0, r1);
        for (var i = 0u; i < 4u; i++) {
            let p = load_forward(unit + i);
            for (var j = 0u; j < FORWARD_ROWS && row + j < params.rows; j++) {
                var product: Sums;
                for (var g = 0u; g < SUMS; g++) { product[g] = r[j / 8u][g][j % 8u][i]; }
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
    let seen_count = seen_width();
    let made_count = made_width();
    let tile = by_columns(take_tile(group, groups), vec2(groups.x / params.sides, groups.y * groups.z));
    let unit = tile.x * TILE_UNITS + 4u * lane;
    let row = tile.y * BACKWARD_ROWS;

    var d0 = Rows(); var d1 = Rows(); var d2 = Rows(); var d3 = Rows();
    if params.recurrent == 1u {
        let last = params.rows - 1u;
        for (var g = 0u; g < SUMS; g++) {
            let at0 = dmade_at(g, min(row + lane, last));
            let at1 = dmade_at(g, min(row + 8u + lane, last));
            let at2 = dmade_at(g, min(row + 16u + lane, last));
            let at3 = dmade_at(g, min(row + 24u + lane, last));
            var w = backward_weight(g, 0u, min(unit, seen_count - 4u)) / 4u;
            for (var k = 0u; k < made_count; k++) {
                let values = weight_vectors[w];
                multiply(&d0, dmade(at0 + k), values); multiply(&d1, dmade(at1 + k), values);
                multiply(&d2, dmade(at2 + k), values); multiply(&d3, dmade(at3 + k), values);
                w += seen_count / 4u;
            }
        }
    }

    if unit < seen_count {
        var d = array<Rows, 4>(d0, d1, d2, d3);
        for (var i = 0u; i < 4u; i++) {
            let p = load_backward(unit + i);
            for (var first = 0u; first < BACKWARD_ROWS && row + first < params.rows; first += ROWS) {
                var dunit: Unit;
                for (var k = 0u; k < PARAMS; k++) { dunit[k] = 0.0; }
                var clipped = 0u;
                for (var j = first; j < first + ROWS && row + j < params.rows; j++) {
                    let step = step_backward(row + j, unit + i, d[j / 8u][j % 8u][i], p);
                    for (var k = BIASES; k < PARAMS; k++) { dunit[k] += step.dunit[k]; }
                    clipped += step.clipped;
                }
                if sums { add_sums((row + first) / ROWS, unit + i, dunit, clipped); }
            }
        }
    }
}

// The same for one row: what it brings is loaded by 4 lanes for 4 k and spread, and nothing is computed for rows that are not there.

alias GateUnits = array<vec4<f32>, SUMS>; // of 4 units

fn add_seen(sums: ptr<function, GateUnits>, seen: f32, w: u32) {
    for (var g = 0u; g < SUMS; g++) { (*sums)[g] += seen * weight_vectors[w + g * (made_width() / 4u)]; }
}

@compute @workgroup_size(SUBGROUP)
fn forward_row(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let seen_count = seen_width();
    let made_count = made_width();
    let tile = take_tile(group, groups);
    let unit = tile.x * TILE_UNITS + 4u * lane;
    let row = tile.y;
    let at = seen_at(min(row, params.rows - 1u)) + lane % 4u;
    let stride = ALL * made_count / 4u;
    var w = forward_weight(0u, min(unit, made_count - 4u)) / 4u;
    var r = GateUnits();
    for (var k = 0u; k < seen_count; k += 4u) {
        let h = seen(at + k);
        add_seen(&r, subgroupBroadcast(h, 0u), w);
        add_seen(&r, subgroupBroadcast(h, 1u), w + stride);
        add_seen(&r, subgroupBroadcast(h, 2u), w + 2u * stride);
        add_seen(&r, subgroupBroadcast(h, 3u), w + 3u * stride);
        w += 4u * stride;
    }
    if unit < made_count && row < params.rows {
        for (var i = 0u; i < 4u; i++) {
            var product: Sums;
            for (var g = 0u; g < SUMS; g++) { product[g] = component(r[g], i); }
            step_forward(row, unit + i, product, load_forward(unit + i));
        }
    }
}

@compute @workgroup_size(SUBGROUP)
fn backward_row(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let seen_count = seen_width();
    let made_count = made_width();
    let tile = take_tile(group, groups);
    let unit = tile.x * TILE_UNITS + 4u * lane;
    let row = tile.y;
    var d = vec4<f32>();
    if params.recurrent == 1u {
        let stride = seen_count / 4u;
        for (var g = 0u; g < SUMS; g++) {
            let at = dmade_at(g, min(row, params.rows - 1u)) + lane % 4u;
            var w = backward_weight(g, 0u, min(unit, seen_count - 4u)) / 4u;
            for (var k = 0u; k < made_count; k += 4u) {
                let values = dmade(at + k);
                d += subgroupBroadcast(values, 0u) * weight_vectors[w];
                d += subgroupBroadcast(values, 1u) * weight_vectors[w + stride];
                d += subgroupBroadcast(values, 2u) * weight_vectors[w + 2u * stride];
                d += subgroupBroadcast(values, 3u) * weight_vectors[w + 3u * stride];
                w += 4u * stride;
            }
        }
    }
    if unit < seen_count && row < params.rows {
        for (var i = 0u; i < 4u; i++) {
            let step = step_backward(row, unit + i, component(d, i), load_backward(unit + i));
            if sums { add_sums(row, unit + i, step.dunit, step.clipped); }
        }
    }
}
