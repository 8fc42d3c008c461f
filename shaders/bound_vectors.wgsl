// The buffers of a tiled product as vectors: what lies side by side starts at multiples of 4 words, and its numbers are multiples of 4.

@group(0) @binding(1) var<storage, read> a: array<Words>;
@group(0) @binding(2) var<storage, read> b: array<Words>;
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>;

// 4 words of A or B; all of them are there.
fn load(operand: u32, at: u32, count: u32) -> Words {
    if operand == 0u { return a[at / 4u]; }
    return b[at / 4u];
}

// 4 columns of a row, at row and column `at` of the C that starts at `base`.
fn store(base: u32, at: vec2<u32>, sums: vec4<f32>) {
    if at.x >= params.m || at.y >= params.n { return; }
    let word = (base + at.x * params.c_row + at.y) / 4u;
    var value = sums;
    if params.biased == 1u { value += bias[at.y / 4u]; }
    if params.accumulate == 1u { value += c[word]; }
    c[word] = value;
}
