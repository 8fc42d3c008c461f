// C = A . B (+ bias) (+ C) (product.wgsl) in tiles of TILE x TILE through workgroup memory, for hardware.
//
// A workgroup holds DEPTH words along k of its rows of A and its columns of B in workgroup memory, k by k, so that both are read as
// vectors; a lane computes 8 rows of 8 columns from them: 16 words read feed 64 multiply-adds, or 128 of pairs. The next words are under
// way from the buffers, into registers, while these are multiplied. Composed with product.wgsl, tile_source.wgsl, a tile's size
// (tile_64.wgsl), the precision (factors_single.wgsl) and how buffers are bound (bound_vectors.wgsl).
//
// k may be in parts, whose sums of products are matrices of their own: workgroups of a small C are many then.

const DEPTH = SIDE;
const VECTORS = 2u * SIDE; // of a tile's rows or columns

var<workgroup> tile: array<Words, 2u * DEPTH * VECTORS>; // [A or B, k, rows or columns]

alias Sums = array<vec4<f32>, 16>; // [half of the columns, row]

@compute @workgroup_size(LANES)
fn tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let source = source_of(lane, TILE * group.yx);
    let home = source.operand * DEPTH * VECTORS + source.k * VECTORS + source.vector;
    let first = group.z * params.part;
    let end = min(first + params.part, params.k);
    // This lane's 8 rows are two neighbouring fours, half a tile apart, and so are its columns: lanes read neighbouring vectors.
    let place = vec2(lane / SIDE, lane % SIDE);
    let a_at = place.x;
    let b_at = DEPTH * VECTORS + place.y;

    var sums = Sums();
    var next = by_k(source, fetch(source, first, end));
    for (var k = first; k < end; k += DEPTH) {
        workgroupBarrier();
        tile[home] = next.x;
        tile[home + VECTORS] = next.y;
        tile[home + 2u * VECTORS] = next.z;
        tile[home + 3u * VECTORS] = next.w;
        workgroupBarrier();
        next = by_k(source, fetch(source, k + DEPTH, end));
        for (var i = 0u; i < DEPTH * VECTORS; i += VECTORS) {
            multiply(&sums, tile[a_at + i], tile[a_at + SIDE + i], tile[b_at + i], tile[b_at + SIDE + i]);
        }
    }

    let corner = TILE * group.yx + 4u * place;
    let base = params.c_offset + group.z * params.c_part;
    store_rows(base, corner, sums[0], sums[1], sums[2], sums[3]);
    store_rows(base, corner + vec2(4u * SIDE, 0u), sums[4], sums[5], sums[6], sums[7]);
    store_rows(base, corner + vec2(0u, 4u * SIDE), sums[8], sums[9], sums[10], sums[11]);
    store_rows(base, corner + 4u * SIDE, sums[12], sums[13], sums[14], sums[15]);
}

// Adds the product of 8 numbers of A and 8 of B.
fn add_product(sums: ptr<function, Sums>, a0: vec4<f32>, a1: vec4<f32>, b0: vec4<f32>, b1: vec4<f32>) {
    (*sums)[0] += a0.x * b0; (*sums)[1] += a0.y * b0; (*sums)[2] += a0.z * b0; (*sums)[3] += a0.w * b0;
    (*sums)[4] += a1.x * b0; (*sums)[5] += a1.y * b0; (*sums)[6] += a1.z * b0; (*sums)[7] += a1.w * b0;
    (*sums)[8] += a0.x * b1; (*sums)[9] += a0.y * b1; (*sums)[10] += a0.z * b1; (*sums)[11] += a0.w * b1;
    (*sums)[12] += a1.x * b1; (*sums)[13] += a1.y * b1; (*sums)[14] += a1.z * b1; (*sums)[15] += a1.w * b1;
}

fn store_rows(base: u32, corner: vec2<u32>, x: vec4<f32>, y: vec4<f32>, z: vec4<f32>, w: vec4<f32>) {
    store(base, corner, x); store(base, corner + vec2(1u, 0u), y);
    store(base, corner + vec2(2u, 0u), z); store(base, corner + vec2(3u, 0u), w);
}
