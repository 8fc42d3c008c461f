// Numbers rounded to half precision (IEEE 754 binary16, to the nearest, ties to even), two of them a word. Of a matrix [k, lines] the
// numbers that share a word are neighbours along k: one word of each factor is two terms of a product's sum. Runs of `run`
// numbers start with a word of their own; where a run ends in the middle of a word, 0 fills it.
//
// The rounding is integer arithmetic, because pack2x16float may round either way. Numbers go in as words, so that no bit of a NaN or of
// a denormal number is lost on the way.

struct Half {
    pairs: u32, // words along k
    lines: u32,
    along: u32, // 1: y is [lines, pairs]; 0: [pairs, lines]
    run: u32,
    offset: u32, // x: number (i, line) is word offset + i * row + line * col
    row: u32,
    col: u32,
}

@group(0) @binding(0) var<uniform> params: Half;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;

const LANES = 64u;

@compute @workgroup_size(LANES)
fn pack(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let run_pairs = (params.run + 1u) / 2u;
    for (var at = id.x; at < params.pairs * params.lines; at += groups.x * LANES) {
        var pair = at / params.lines;
        var line = at % params.lines;
        if params.along == 1u {
            pair = at % params.pairs;
            line = at / params.pairs;
        }
        let i = pair % run_pairs * 2u;
        let at_x = params.offset + (pair / run_pairs * params.run + i) * params.row + line * params.col;
        var word = half_bits(x[at_x]);
        if i + 1u < params.run { word |= half_bits(x[at_x + params.row]) << 16u; }
        y[at] = word;
    }
}

// The bits of a number in half precision.
fn half_bits(bits: u32) -> u32 {
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return sign | 0x7e00u; } // NaN
    if magnitude >= 0x477ff000u { return sign | 0x7c00u; } // from 65520 on: infinity
    if magnitude >= 0x38800000u { // from 2^-14 on: 13 bits less, exponents 112 apart
        return sign | (((magnitude + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u) - (112u << 10u));
    }
    // Below: a multiple of 2^-24.
    let fraction = (magnitude & 0x7fffffu) | 0x800000u;
    let shift = min(126u - (magnitude >> 23u), 25u);
    return sign | ((fraction + (1u << (shift - 1u)) - 1u + ((fraction >> shift) & 1u)) >> shift);
}
