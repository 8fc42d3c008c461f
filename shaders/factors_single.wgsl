// Factors of a tiled product in single precision: a word is a number.

alias Words = vec4<f32>;

fn multiply(sums: ptr<function, Sums>, a0: Words, a1: Words, b0: Words, b1: Words) { add_product(sums, a0, a1, b0, b1); }
