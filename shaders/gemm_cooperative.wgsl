enable f16;
enable wgpu_cooperative_matrix;

// C = A . B (+ bias) (+ C) (product.wgsl) of half-precision pairs (half.wgsl) on the matrix units of a GPU, with sums in f32, in tiles of
// TILE x TILE: each subgroup multiplies fragments of EDGE x EDGE, and has 4 of them below each other and 2 beside each other.
//
// Blocks of DEPTH words of A's rows and B's columns come to workgroup memory as in gemm_tiled.wgsl, but line by line, so that a fragment is
// loaded as it lies: 16 numbers along k of a line, then those of the next line. A loaded matrix has the type of the memory's elements, so
// pairs are taken apart on the way. Nothing reads the elements of a fragment: sums go through workgroup memory, one fragment of each
// subgroup at a time. Composed with product.wgsl, tile_source.wgsl, tile_128.wgsl, bound_vectors.wgsl, and the size of fragments that
// the adapter has (fragments_16.wgsl), for whose subgroups there are as many patches of 4 x 2 fragments as subgroups.

alias Words = vec4<u32>;

const DEPTH = SIDE;
const LINE = 4u;                    // vectors of a line's 16 numbers
const OPERAND = TILE * DEPTH / 2u;  // vectors of an operand's block
const FRAGMENT = EDGE * EDGE / 4u;  // vectors of a fragment's sums
const PATCHES = TILE / (2u * EDGE); // beside each other

var<workgroup> tile: array<vec4<f16>, 2u * OPERAND>; // [A or B, 16 numbers of k, line, 4 vectors]
var<workgroup> fragments: array<vec4<f32>, LANES * 2u>; // one of every subgroup

@compute @workgroup_size(LANES)
fn cooperative(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) place: u32,
    @builtin(subgroup_size) size: u32,
) {
    let source = source_of(lane, TILE * group.yx);
    let home = source.operand * OPERAND + home_of(source.k / 2u, 4u * source.vector);
    let first = group.z * params.part;
    let end = min(first + params.part, params.k);
    let corner = vec2(4u * EDGE * (subgroup / PATCHES), 2u * EDGE * (subgroup % PATCHES));

    if lane < FRAGMENT { fragments[lane] = vec4<f32>(); }
    workgroupBarrier();
    var c0 = coopLoadT<Sums>(&fragments[0], EDGE / 4u);
    var c1 = c0; var c2 = c0; var c3 = c0; var c4 = c0; var c5 = c0; var c6 = c0; var c7 = c0;
    var next = by_line(source, fetch(source, first, end));
    for (var k = first; k < end; k += DEPTH) {
        workgroupBarrier();
        fill(home, next.x);
        fill(home + LINE, next.y);
        fill(home + 2u * LINE, next.z);
        fill(home + 3u * LINE, next.w);
        workgroupBarrier();
        next = by_line(source, fetch(source, k + DEPTH, end));
        for (var vector = 0u; vector < DEPTH / 2u; vector += EDGE / 4u) {
            let a_at = home_of(vector, corner.x);
            let b_at = OPERAND + home_of(vector, corner.y);
            let b0 = coopLoad<Right>(&tile[b_at], LINE);
            let b1 = coopLoad<Right>(&tile[b_at + EDGE * LINE], LINE);
            let a0 = coopLoadT<Left>(&tile[a_at], LINE);
            c0 = coopMultiplyAdd(a0, b0, c0); c1 = coopMultiplyAdd(a0, b1, c1);
            let a1 = coopLoadT<Left>(&tile[a_at + EDGE * LINE], LINE);
            c2 = coopMultiplyAdd(a1, b0, c2); c3 = coopMultiplyAdd(a1, b1, c3);
            let a2 = coopLoadT<Left>(&tile[a_at + 2u * EDGE * LINE], LINE);
            c4 = coopMultiplyAdd(a2, b0, c4); c5 = coopMultiplyAdd(a2, b1, c5);
            let a3 = coopLoadT<Left>(&tile[a_at + 3u * EDGE * LINE], LINE);
            c6 = coopMultiplyAdd(a3, b0, c6); c7 = coopMultiplyAdd(a3, b1, c7);
        }
    }

    var to = Target(params.c_offset + group.z * params.c_part, TILE * group.yx + corner, subgroup * FRAGMENT, place, size);
    store_fragment(c0, to); to.corner.y += EDGE; store_fragment(c1, to); to.corner += vec2(EDGE, 0u);
    store_fragment(c3, to); to.corner.y -= EDGE; store_fragment(c2, to); to.corner += vec2(EDGE, 0u);
    store_fragment(c4, to); to.corner.y += EDGE; store_fragment(c5, to); to.corner += vec2(EDGE, 0u);
    store_fragment(c7, to); to.corner.y -= EDGE; store_fragment(c6, to);
}

// Where vector `vector` along k of a line lies.
fn home_of(vector: u32, line: u32) -> u32 {
    return (vector / LINE * TILE + line) * LINE + vector % LINE;
}

fn fill(at: u32, words: Words) {
    tile[at] = vec4<f16>(vec4(unpack2x16float(words.x), unpack2x16float(words.y)));
    tile[at + 1u] = vec4<f16>(vec4(unpack2x16float(words.z), unpack2x16float(words.w)));
}

// Where a fragment's sums go: the start of C, its first row and column, by way of which workgroup memory, and which lane of how many this is.
struct Target { base: u32, corner: vec2<u32>, memory: u32, place: u32, size: u32 }

fn store_fragment(sums: Sums, to: Target) {
    workgroupBarrier();
    coopStoreT(sums, &fragments[to.memory], EDGE / 4u);
    workgroupBarrier();
    for (var i = to.place; i < FRAGMENT; i += to.size) {
        store(to.base, to.corner + vec2(i / (EDGE / 4u), 4u * (i % (EDGE / 4u))), fragments[to.memory + i]);
    }
}
