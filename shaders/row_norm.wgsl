// What kernels share that normalize rows, a workgroup a row (Ba et al. 2016):
//     y = gain xhat + shift    xhat = (x - mean) / sqrt(variance + epsilon)
// with the variance of all numbers of the row. Everything is measured from the row's first number, so that a large mean costs no
// digits: mean and variance are those of x - x[0], in two passes.

const EPSILON = 1e-5;
const MAX_LANES = 64u;
const EIGHT = 8u; // lanes that sum eight numbers each, or fewer
override lanes: u32 = 64u; // of a workgroup: 64, or 8, where a driver computes eight at a time
var<workgroup> partial: array<vec4<f32>, MAX_LANES>;
var<workgroup> eighths: array<vec4<f32>, EIGHT>;

fn inverse_deviation(variance: vec4<f32>) -> vec4<f32> { return 1.0 / sqrt(variance + EPSILON); }

fn normal(x: f32, first: f32, mean: f32, inverse: f32) -> f32 { return ((x - first) - mean) * inverse; }

// dx = (g - mean(g) - xhat mean(g xhat)) / sqrt(variance + epsilon) with g = gain dy; means: the two
fn normal_backward(g: f32, xhat: f32, means: vec2<f32>, inverse: f32) -> f32 {
    return ((g - means.x) - xhat * means.y) * inverse;
}

// The sum of all lanes' values. A call may follow another at once: what it writes was read before a barrier of the last.
fn workgroup_sum(lane: u32, value: vec4<f32>) -> vec4<f32> {
    partial[lane] = value;
    workgroupBarrier();
    if lane < EIGHT {
        var sum = partial[lane];
        for (var other = lane + EIGHT; other < lanes; other += EIGHT) { sum += partial[other]; }
        eighths[lane] = sum;
    }
    workgroupBarrier();
    var sum = eighths[0];
    for (var other = 1u; other < EIGHT; other++) { sum += eighths[other]; }
    return sum;
}
