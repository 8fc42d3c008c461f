// C = A . B (+ bias) (+ C) as in gemm.wgsl, for software drivers whose subgroups have 8 lanes: a workgroup is one of them.
//
// Such a driver turns a load into a loop over the lanes, whatever they read, and arithmetic into vector instructions. So each
// loaded number has to feed many multiply-adds: a tile has 32 rows and 32 columns, 4 columns a lane. A's numbers are loaded by
// the lane that stands for their row and spread from there. The accumulators of a tile are more than the registers, but
// a spilled one costs a plain move. No workgroup memory, no barriers: they are slow there. Composed with subgroup_rows.wgsl.
//
// All is loaded and stored as vectors: n, the rows of B and C, and where they start, are multiples of 4; so are k and A's rows in
// `rows`, m and A's columns in `columns`.

@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>;

const LANES = 8u;
const TILE = 32u;  // rows and columns of a tile
const COLUMNS = 4u; // of a lane

// Without a bias nothing may be read in its place.
fn bias_at(column: u32) -> vec4<f32> {
    var value = vec4<f32>();
    if params.biased == 1u && column < params.n { value = bias[column / 4u]; }
    return value;
}

// Rows past the end repeat the last one; their results are not stored.
fn a_at(row: u32) -> u32 { return params.a_offset + min(row, params.m - 1u) * params.a_row; }

// A's k side by side.
@compute @workgroup_size(LANES)
fn rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // Rows go on in z where y is full.
    let tile = by_columns(vec2(group.x, group.z * groups.y + group.y), vec2(groups.x, groups.y * groups.z));
    let row = tile.y * TILE;
    let column = tile.x * TILE + COLUMNS * lane;
    var at0 = a_at(row + lane) / 4u; var at1 = a_at(row + 8u + lane) / 4u;
    var at2 = a_at(row + 16u + lane) / 4u; var at3 = a_at(row + 24u + lane) / 4u;
    var b_at = (params.b_offset + min(column, params.n - 4u)) / 4u;
    let b_row = params.b_row / 4u;
    var c0 = Rows(); var c1 = Rows(); var c2 = Rows(); var c3 = Rows();
    for (var k = 0u; k < params.k; k += 4u) {
        let a0 = a[at0]; let a1 = a[at1]; let a2 = a[at2]; let a3 = a[at3];
        let bx = b[b_at]; let by = b[b_at + b_row];
        let bz = b[b_at + 2u * b_row]; let bw = b[b_at + 3u * b_row];
        multiply(&c0, a0.x, bx); multiply(&c1, a1.x, bx); multiply(&c2, a2.x, bx); multiply(&c3, a3.x, bx);
        multiply(&c0, a0.y, by); multiply(&c1, a1.y, by); multiply(&c2, a2.y, by); multiply(&c3, a3.y, by);
        multiply(&c0, a0.z, bz); multiply(&c1, a1.z, bz); multiply(&c2, a2.z, bz); multiply(&c3, a3.z, bz);
        multiply(&c0, a0.w, bw); multiply(&c1, a1.w, bw); multiply(&c2, a2.w, bw); multiply(&c3, a3.w, bw);
        at0++; at1++; at2++; at3++;
        b_at += 4u * b_row;
    }
    let added = bias_at(column);
    store(row, column, added, c0); store(row + 8u, column, added, c1);
    store(row + 16u, column, added, c2); store(row + 24u, column, added, c3);
}

// The same for 8 rows: with fewer, most of the 32 would be computed for nothing.
@compute @workgroup_size(LANES)
fn rows_8(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row = (group.z * groups.y + group.y) * 8u;
    let column = group.x * TILE + COLUMNS * lane;
    var at = a_at(row + lane) / 4u;
    var b_at = (params.b_offset + min(column, params.n - 4u)) / 4u;
    let b_row = params.b_row / 4u;
    var sums = Rows();
    for (var k = 0u; k < params.k; k += 4u) {
        let values = a[at];
        multiply(&sums, values.x, b[b_at]);
        multiply(&sums, values.y, b[b_at + b_row]);
        multiply(&sums, values.z, b[b_at + 2u * b_row]);
        multiply(&sums, values.w, b[b_at + 3u * b_row]);
        at++;
        b_at += 4u * b_row;
    }
    store(row, column, bias_at(column), sums);
}

// A's rows side by side, as in the gradient of weights: a lane loads 4 rows, so sums of `cx` are those of rows 0, 4, 8 ..
@compute @workgroup_size(LANES)
fn columns(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row = (group.z * groups.y + group.y) * TILE;
    let column = group.x * TILE + COLUMNS * lane;
    var at = (params.a_offset + min(row + 4u * lane, params.m - 4u)) / 4u;
    var b_at = (params.b_offset + min(column, params.n - 4u)) / 4u;
    var cx = Rows(); var cy = Rows(); var cz = Rows(); var cw = Rows();
    for (var k = 0u; k < params.k; k++) {
        let values = a[at];
        let b_values = b[b_at];
        multiply(&cx, values.x, b_values); multiply(&cy, values.y, b_values);
        multiply(&cz, values.z, b_values); multiply(&cw, values.w, b_values);
        at += params.a_col / 4u;
        b_at += params.b_row / 4u;
    }
    let added = bias_at(column);
    store_row(row, column, cx[0] + added); store_row(row + 1u, column, cy[0] + added);
    store_row(row + 2u, column, cz[0] + added); store_row(row + 3u, column, cw[0] + added);
    store_row(row + 4u, column, cx[1] + added); store_row(row + 5u, column, cy[1] + added);
    store_row(row + 6u, column, cz[1] + added); store_row(row + 7u, column, cw[1] + added);
    store_row(row + 8u, column, cx[2] + added); store_row(row + 9u, column, cy[2] + added);
    store_row(row + 10u, column, cz[2] + added); store_row(row + 11u, column, cw[2] + added);
    store_row(row + 12u, column, cx[3] + added); store_row(row + 13u, column, cy[3] + added);
    store_row(row + 14u, column, cz[3] + added); store_row(row + 15u, column, cw[3] + added);
    store_row(row + 16u, column, cx[4] + added); store_row(row + 17u, column, cy[4] + added);
    store_row(row + 18u, column, cz[4] + added); store_row(row + 19u, column, cw[4] + added);
    store_row(row + 20u, column, cx[5] + added); store_row(row + 21u, column, cy[5] + added);
    store_row(row + 22u, column, cz[5] + added); store_row(row + 23u, column, cw[5] + added);
    store_row(row + 24u, column, cx[6] + added); store_row(row + 25u, column, cy[6] + added);
    store_row(row + 26u, column, cz[6] + added); store_row(row + 27u, column, cw[6] + added);
    store_row(row + 28u, column, cx[7] + added); store_row(row + 29u, column, cy[7] + added);
    store_row(row + 30u, column, cz[7] + added); store_row(row + 31u, column, cw[7] + added);
}

fn store(row: u32, column: u32, bias: vec4<f32>, sums: Rows) {
    store_row(row, column, sums[0] + bias); store_row(row + 1u, column, sums[1] + bias);
    store_row(row + 2u, column, sums[2] + bias); store_row(row + 3u, column, sums[3] + bias);
    store_row(row + 4u, column, sums[4] + bias); store_row(row + 5u, column, sums[5] + bias);
    store_row(row + 6u, column, sums[6] + bias); store_row(row + 7u, column, sums[7] + bias);
}

fn store_row(row: u32, column: u32, sums: vec4<f32>) {
    if row < params.m && column < params.n {
        let at = (params.c_offset + row * params.c_row + column) / 4u;
        var value = sums;
        if params.accumulate == 1u { value += c[at]; }
        c[at] = value;
    }
}
