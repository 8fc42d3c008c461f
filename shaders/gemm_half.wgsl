// C = A . B (+ bias) (+ C) as in gemm.wgsl, where A and B hold half-precision numbers in pairs along k (half.wgsl), B's columns
// side by side; sums, bias and C are f32. The product of two such numbers is exact in f32.
//
// One lane computes ROWS rows of COLUMNS columns in registers: 12 loads feed 64 multiply-adds, twice as many as in gemm.wgsl, and read
// as many bytes. `enable f16` would add nothing: the pairs are one load as they are, and have to become f32 for the sums.

@group(0) @binding(1) var<storage, read> a: array<u32>;
@group(0) @binding(2) var<storage, read> b: array<u32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> c: array<f32>;

const LANES = 64u;
const ROWS = 8u;
const COLUMNS = 4u; // written out below as the components of a vector

@compute @workgroup_size(LANES)
fn gemm_half(
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
    var b_at = vec4(params.b_offset) + min(vec4(column) + vec4(0u, 1u, 2u, 3u) * stride, vec4(params.n - 1u));

    var c0 = vec4<f32>(); var c1 = vec4<f32>(); var c2 = vec4<f32>(); var c3 = vec4<f32>();
    var c4 = vec4<f32>(); var c5 = vec4<f32>(); var c6 = vec4<f32>(); var c7 = vec4<f32>();
    for (var pair = 0u; pair < params.k; pair++) {
        let b0 = unpack2x16float(b[b_at.x]); let b1 = unpack2x16float(b[b_at.y]);
        let b2 = unpack2x16float(b[b_at.z]); let b3 = unpack2x16float(b[b_at.w]);
        let even = vec4(b0.x, b1.x, b2.x, b3.x);
        let odd = vec4(b0.y, b1.y, b2.y, b3.y);
        let a0 = unpack2x16float(a[at0]); let a1 = unpack2x16float(a[at1]);
        let a2 = unpack2x16float(a[at2]); let a3 = unpack2x16float(a[at3]);
        let a4 = unpack2x16float(a[at4]); let a5 = unpack2x16float(a[at5]);
        let a6 = unpack2x16float(a[at6]); let a7 = unpack2x16float(a[at7]);
        c0 += a0.x * even; c1 += a1.x * even; c2 += a2.x * even; c3 += a3.x * even;
        c4 += a4.x * even; c5 += a5.x * even; c6 += a6.x * even; c7 += a7.x * even;
        c0 += a0.y * odd; c1 += a1.y * odd; c2 += a2.y * odd; c3 += a3.y * odd;
        c4 += a4.y * odd; c5 += a5.y * odd; c6 += a6.y * odd; c7 += a7.y * odd;
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
