//! Random numbers from a counter: the same key and counter give the same bits on every device.
//!
//! The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011);
//! its twin for kernels is `shaders/rng.wgsl`.

/// Philox4x32-10: 128 random bits for a `counter` under a `key`.
pub(crate) fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let ([mut k0, mut k1], [mut c0, mut c1, mut c2, mut c3]) = (key, counter);
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// The first of the four words as a number in `[0, 1)` with 24 bits.
pub(crate) fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Names one draw of random masks: the same key gives the same masks on every device and for every batch size.
///
/// A mask's bit is a function of the key, the layer, the time step, the row and the unit, nothing else.
/// Give each training step a key of its own: `MaskKey::new(seed, step)`; a `Trainer` does so by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskKey {
    key: [u32; 2],
}

impl MaskKey {
    /// The key of training step `step` under `seed`.
    pub fn new(seed: u64, step: u64) -> Self {
        let [a, b, ..] = philox([seed as u32, (seed >> 32) as u32], [step as u32, (step >> 32) as u32, 0, 0x6761_7465]);
        Self { key: [a, b] }
    }

    /// A key of its own for the `index`-th layer.
    pub(crate) fn layer(self, index: usize) -> Self {
        self.draw(0, index)
    }

    /// A key of its own for one of the things that the `index`-th layer draws.
    pub(crate) fn draw(self, what: u32, index: usize) -> Self {
        let [a, b, ..] = philox(self.key, [index as u32, what, 0, 0x6c61_7965]);
        Self { key: [a, b] }
    }

    /// The two words that kernels take.
    pub(crate) fn words(self) -> [u32; 2] {
        self.key
    }
}

/// A seeded stream of random numbers on the host, for weights, shuffles and sampling.
///
/// ```
/// let mut rng = gatefold::Rng::seed(7);
/// let first = rng.uniform(-1.0, 1.0);
/// assert_eq!(first, gatefold::Rng::seed(7).uniform(-1.0, 1.0));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rng {
    seed: u64,
    position: u64,
}

impl Rng {
    /// The stream that `seed` names, from its start.
    pub fn seed(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    /// The next 32 random bits.
    pub fn bits(&mut self) -> u32 {
        let block = self.position / 4;
        let words = philox([self.seed as u32, (self.seed >> 32) as u32], [block as u32, (block >> 32) as u32, 0, 0]);
        let word = words[(self.position % 4) as usize];
        self.position += 1;
        word
    }

    /// A number from `low` to `high`, uniformly; rounding may give `high` itself.
    pub fn uniform(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * unit(self.bits())
    }

    /// A number from the normal distribution of mean 0 and variance 1 (Box and Muller, 1958).
    pub fn normal(&mut self) -> f32 {
        // 1 - u lies in (0, 1]: the logarithm is finite.
        let radius = (-2.0 * (1.0 - f64::from(unit(self.bits()))).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(unit(self.bits()))).cos()) as f32
    }

    /// An index in `0..n`; `n` must not be 0. The bias of at most `n / 2^32` is left in.
    pub fn below(&mut self, n: usize) -> usize {
        debug_assert!(n > 0, "below(0) has no answer");
        ((u64::from(self.bits()) * n as u64) >> 32) as usize
    }

    /// Puts `items` into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The known answers that the Random123 library ships (kat_vectors, philox4x32 10 rounds).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn moments_and_permutations() {
        let mut rng = Rng::seed(1);
        let draws: Vec<f64> = (0..40_000).map(|_| f64::from(rng.normal())).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "mean {mean}, variance {variance}");
        let mut items: Vec<u32> = (0..100).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
