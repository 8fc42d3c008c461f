// A number of a vector whose place is known only at run time. FXC makes `v[i]` a dot product with zeros and a one, which turns one
// infinity or NaN into NaN in all places.

fn component(v: vec4<f32>, i: u32) -> f32 {
    return select(select(v.x, v.y, i == 1u), select(v.z, v.w, i == 3u), i >= 2u);
}
