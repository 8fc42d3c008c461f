// C = A . B (+ bias) (+ C) (product.wgsl, component.wgsl), for any device and any strides.
//
// One lane computes ROWS rows of COLUMNS columns in registers: 12 loads feed 32 multiply-adds. Its columns lie `stride`
// apart, so that neighbouring lanes read and write neighbouring columns, and each lane has all of its columns even where n
// is small. The loads of A are the same for all lanes of a workgroup. No workgroup memory: tiles in it slow software
// drivers down.

@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> c: array<f32>;

const LANES = 64u;
const ROWS = 8u;
const COLUMNS = 4u; // written out below as the components of a vector

@compute @workgroup_size(LANES)
fn gemm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let stride = (params.n + COLUMNS - 1u) / COLUMNS;
    let row = (group.z * groups.y + group.y) * ROWS; // rows go on in z where y is full
    if row >= params.m { return; }
    for (var column = group.x * LANES + lane; column < stride; column += groups.x * LANES) { tile(row, column, stride); }
}

fn tile(row: u32, column: u32, stride: u32) {

    // Rows and columns past the end repeat the last one; their results are not stored.
    let last = params.m - 1u;
    var at0 = params.a_offset + row * params.a_row;
    var at1 = params.a_offset + min(row + 1u, last) * params.a_row;
    var at2 = params.a_offset + min(row + 2u, last) * params.a_row;
    var at3 = params.a_offset + min(row + 3u, last) * params.a_row;
    var at4 = params.a_offset + min(row + 4u, last) * params.a_row;
    var at5 = params.a_offset + min(row + 5u, last) * params.a_row;
    var at6 = params.a_offset + min(row + 6u, last) * params.a_row;
    var at7 = params.a_offset + min(row + 7u, last) * params.a_row;
    let columns = min(vec4(column) + vec4(0u, 1u, 2u, 3u) * stride, vec4(params.n - 1u));
    var b_at = vec4(params.b_offset) + columns * params.b_col;

    var c0 = vec4<f32>(); var c1 = vec4<f32>(); var c2 = vec4<f32>(); var c3 = vec4<f32>();
    var c4 = vec4<f32>(); var c5 = vec4<f32>(); var c6 = vec4<f32>(); var c7 = vec4<f32>();
    for (var k = 0u; k < params.k; k++) {
        let values = vec4(b[b_at.x], b[b_at.y], b[b_at.z], b[b_at.w]);
        c0 += a[at0] * values; c1 += a[at1] * values; c2 += a[at2] * values; c3 += a[at3] * values;
        c4 += a[at4] * values; c5 += a[at5] * values; c6 += a[at6] * values; c7 += a[at7] * values;
        at0 += params.a_col; at1 += params.a_col; at2 += params.a_col; at3 += params.a_col;
        at4 += params.a_col; at5 += params.a_col; at6 += params.a_col; at7 += params.a_col;
        b_at += vec4(params.b_row);
    }
    store(row, column, stride, c0); store(row + 1u, column, stride, c1);
    store(row + 2u, column, stride, c2); store(row + 3u, column, stride, c3);
    store(row + 4u, column, stride, c4); store(row + 5u, column, stride, c5);
    store(row + 6u, column, stride, c6); store(row + 7u, column, stride, c7);
}

fn store(row: u32, column: u32, stride: u32, values: vec4<f32>) {
    if row >= params.m { return; }
    for (var i = 0u; i < COLUMNS && column + i * stride < params.n; i++) {
        let at = params.c_offset + row * params.c_row + column + i * stride;
        var value = component(values, i);
        if params.biased == 1u { value += bias[column + i * stride]; }
        if params.accumulate == 1u { value += c[at]; }
        c[at] = value;
    }
}
