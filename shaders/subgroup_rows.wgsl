// What the kernels for subgroups of 8 lanes build their tiles of: 8 rows, whose numbers the lanes hold one each, times 4 columns a lane.

alias Rows = array<vec4<f32>, 8>; // a lane's columns of 8 rows

// Adds the product of a column of 8 numbers, one a lane, and a row of B.
fn multiply(sums: ptr<function, Rows>, column: f32, row: vec4<f32>) {
    (*sums)[0] += subgroupBroadcast(column, 0u) * row;
    (*sums)[1] += subgroupBroadcast(column, 1u) * row;
    (*sums)[2] += subgroupBroadcast(column, 2u) * row;
    (*sums)[3] += subgroupBroadcast(column, 3u) * row;
    (*sums)[4] += subgroupBroadcast(column, 4u) * row;
    (*sums)[5] += subgroupBroadcast(column, 5u) * row;
    (*sums)[6] += subgroupBroadcast(column, 6u) * row;
    (*sums)[7] += subgroupBroadcast(column, 7u) * row;
}

// Which column and which row of tiles a workgroup has, given its own place and how many there are of both: one column after another,
// because its rows read the same numbers of B, which a processor's cache then keeps.
fn by_columns(place: vec2<u32>, count: vec2<u32>) -> vec2<u32> {
    let at = place.y * count.x + place.x;
    return vec2(at / count.y, at % count.y);
}
