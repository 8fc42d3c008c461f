// What every kernel of products is told: C = A . B (+ bias) (+ C), A [m, k], B [k, n], C [m, n], bias [n]; A, B and C strided windows of
// their buffers. In half precision k counts words, which hold two numbers along k (half.wgsl).

struct Gemm {
    m: u32, n: u32, k: u32,
    a_offset: u32, a_row: u32, a_col: u32,
    b_offset: u32, b_row: u32, b_col: u32,
    c_offset: u32, c_row: u32,
    accumulate: u32, // 1: add to C
    biased: u32,     // 1: add bias
    part: u32,       // where k may be in parts, each with a C of its own: k of a part; all of k where there is one
    c_part: u32,     // and words from C to C
}

@group(0) @binding(0) var<uniform> params: Gemm;
