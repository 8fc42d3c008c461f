// C = A . B (+ bias) (+ C): A [m, k], B [k, n], C [m, n], bias [n]; each operand a strided window of its buffer.
//
// One invocation computes ROWS rows of one column. Neighbouring lanes hold neighbouring columns, so that loads of B and
// stores of C are contiguous where b_col is 1; the loads of A are the same for all lanes.

struct Gemm {
    m: u32, n: u32, k: u32,
    a_offset: u32, a_row: u32, a_col: u32,
    b_offset: u32, b_row: u32, b_col: u32,
    c_offset: u32, c_row: u32,
    accumulate: u32, // 1: add to C
    biased: u32,     // 1: add bias
}

@group(0) @binding(0) var<uniform> params: Gemm;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> c: array<f32>;

const COLUMNS = 64u; // of a workgroup
const ROWS = 8u;

@compute @workgroup_size(COLUMNS)
fn gemm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let column = group.x * COLUMNS + lane;
    let row = (group.z * groups.y + group.y) * ROWS; // rows go on in z where y is full
    if column >= params.n || row >= params.m { return; }

    // Rows past the end repeat the last one; their results are not stored.
    let last = params.m - 1u;
    var at0 = params.a_offset + min(row, last) * params.a_row;
    var at1 = params.a_offset + min(row + 1u, last) * params.a_row;
    var at2 = params.a_offset + min(row + 2u, last) * params.a_row;
    var at3 = params.a_offset + min(row + 3u, last) * params.a_row;
    var at4 = params.a_offset + min(row + 4u, last) * params.a_row;
    var at5 = params.a_offset + min(row + 5u, last) * params.a_row;
    var at6 = params.a_offset + min(row + 6u, last) * params.a_row;
    var at7 = params.a_offset + min(row + 7u, last) * params.a_row;
    var b_at = params.b_offset + column * params.b_col;

    var low = vec4<f32>();  // rows 0 to 3
    var high = vec4<f32>(); // rows 4 to 7
    for (var k = 0u; k < params.k; k++) {
        let value = b[b_at];
        low += vec4(a[at0], a[at1], a[at2], a[at3]) * value;
        high += vec4(a[at4], a[at5], a[at6], a[at7]) * value;
        at0 += params.a_col; at1 += params.a_col; at2 += params.a_col; at3 += params.a_col;
        at4 += params.a_col; at5 += params.a_col; at6 += params.a_col; at7 += params.a_col;
        b_at += params.b_row;
    }
    if params.biased == 1u {
        low += vec4(bias[column]);
        high += vec4(bias[column]);
    }
    store(row, column, low.x); store(row + 1u, column, low.y); store(row + 2u, column, low.z); store(row + 3u, column, low.w);
    store(row + 4u, column, high.x); store(row + 5u, column, high.y); store(row + 6u, column, high.z); store(row + 7u, column, high.w);
}

fn store(row: u32, column: u32, value: f32) {
    if row >= params.m { return; }
    let at = params.c_offset + row * params.c_row + column;
    if params.accumulate == 1u {
        c[at] += value;
    } else {
        c[at] = value;
    }
}
