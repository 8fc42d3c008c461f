// Factors of a tiled product in half precision: a word is two numbers along k (half.wgsl). Their products are exact in f32.

alias Words = vec4<u32>;

fn multiply(sums: ptr<function, Sums>, a0: Words, a1: Words, b0: Words, b1: Words) {
    let i = unpacked(a0); let j = unpacked(a1);
    let p = unpacked(b0); let q = unpacked(b1);
    add_product(sums, i.even, j.even, p.even, q.even);
    add_product(sums, i.odd, j.odd, p.odd, q.odd);
}

struct Numbers { even: vec4<f32>, odd: vec4<f32> }

fn unpacked(words: Words) -> Numbers {
    let x = unpack2x16float(words.x); let y = unpack2x16float(words.y);
    let z = unpack2x16float(words.z); let w = unpack2x16float(words.w);
    return Numbers(vec4(x.x, y.x, z.x, w.x), vec4(x.y, y.y, z.y, w.y));
}
