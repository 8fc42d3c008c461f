// The buffers of a tiled product word by word, for any start and any number of words.

@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> c: array<f32>;

// 4 words of A or B, or the first `count` and zeros.
fn load(operand: u32, at: u32, count: u32) -> vec4<f32> {
    var value = vec4<f32>();
    value.x = word(operand, at);
    if count > 1u { value.y = word(operand, at + 1u); }
    if count > 2u { value.z = word(operand, at + 2u); }
    if count > 3u { value.w = word(operand, at + 3u); }
    return value;
}

fn word(operand: u32, at: u32) -> f32 {
    if operand == 0u { return a[at]; }
    return b[at];
}

// 4 columns of a row, or as many as there are, at row and column `at` of the C that starts at `base`.
fn store(base: u32, at: vec2<u32>, sums: vec4<f32>) {
    if at.x >= params.m { return; }
    for (var i = 0u; i < 4u && at.y + i < params.n; i++) {
        let word = base + at.x * params.c_row + at.y + i;
        var value = component(sums, i);
        if params.biased == 1u { value += bias[at.y + i]; }
        if params.accumulate == 1u { value += c[word]; }
        c[word] = value;
    }
}
