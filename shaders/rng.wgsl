// Random numbers from a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), the twin of src/rng.rs. All of it is exact: every device gives the same bits.

// The high half of the 64-bit product: WGSL has no 64-bit integers, so the factors are taken in halves of 16 bits.
fn multiply_high(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    // At most (2^16 - 1)^2 + 2^16 - 1 < 2^32: neither sum overflows.
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
}

// 128 random bits for a counter under a key.
fn philox(key: vec2<u32>, counter: vec4<u32>) -> vec4<u32> {
    const FIRST = 0xD2511F53u;
    const SECOND = 0xCD9E8D57u;
    var k = key;
    var c = counter;
    for (var i = 0u; i < 10u; i++) {
        let high = vec2<u32>(multiply_high(c.x, FIRST), multiply_high(c.z, SECOND));
        c = vec4<u32>(high.y ^ c.y ^ k.x, c.z * SECOND, high.x ^ c.w ^ k.y, c.x * FIRST);
        k += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    }
    return c;
}

// A word as a number in [0, 1) with 24 bits.
fn unit_f32(bits: u32) -> f32 {
    return f32(bits >> 8u) * (1.0 / 16777216.0);
}
