//! Random numbers by name, never from a global generator: [`Stream`], and [`TorchGenerator`] for PyTorch's.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_mt::Mt;
use sha2::{Digest, Sha256};

/// A stream of random numbers named by a seed, a purpose and an index.
///
/// The key of a ChaCha8 generator is the SHA-256 of the name, so that streams of different names have nothing to
/// do with each other. Only exact operations and software logarithms and cosines are used, not the system's: the
/// numbers are the same on every machine.
#[derive(Debug, Clone)]
pub struct Stream {
    generator: ChaCha8Rng,
    /// The second of the pair of normals that are made at a time.
    spare: Option<f32>,
}

impl Stream {
    /// The stream of this name.
    pub fn new(seed: u64, purpose: &str, index: u64) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(seed.to_le_bytes());
        hasher.update(index.to_le_bytes());
        hasher.update(purpose.as_bytes());
        Self { generator: ChaCha8Rng::from_seed(hasher.finalize().into()), spare: None }
    }

    /// Uniform in `[0, 1)`, 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.generator.next_u32() >> 8) as f32 / (1_u32 << 24) as f32
    }

    /// Uniform from `low` to `high`, which only rounding can reach.
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// True with probability `p`.
    pub fn bernoulli(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Uniform in `0..n`, without bias.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "below 0 there is no number");
        // Lemire (2019): the high half of a product, drawn again where the low half would favour some numbers.
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.generator.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box and Muller, 1958, in f64).
    pub fn normal(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * libm::log(1.0 - self.unit())).sqrt();
        let (sine, cosine) = libm::sincos(std::f64::consts::TAU * self.unit());
        self.spare = Some((radius * sine) as f32);
        (radius * cosine) as f32
    }

    /// `n` standard normals.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Puts `items` into a uniformly random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// Uniform in `[0, 1)`, 53 bits.
    fn unit(&mut self) -> f64 {
        (self.generator.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// PyTorch's generator on the CPU: the same seed gives `torch.randn`'s numbers.
///
/// Mersenne Twister (mt19937) and the transform of `aten/src/ATen/native/cpu/DistributionTemplates.h`; equal to
/// PyTorch within 1e-6, which is what its vectorized logarithm and cosine differ by.
#[derive(Debug, Clone)]
pub struct TorchGenerator {
    generator: Mt,
    /// The second of the pair of normals of the scalar path.
    spare: Option<f64>,
}

impl TorchGenerator {
    /// `torch.Generator().manual_seed(seed)`. The twister takes the low 32 bits: seeds that share them are one.
    pub fn new(seed: u64) -> Self {
        Self { generator: Mt::new(seed as u32), spare: None }
    }

    /// `torch.randn(n, generator=...)` in f32; the generator goes on where it ended.
    ///
    /// Below 16 values and from there on PyTorch has two ways: `randn(32)` begins other than `randn(15)`.
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return (0..n).map(|_| self.scalar_normal() as f32).collect();
        }
        let mut data: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        for block in data.chunks_exact_mut(16) {
            fill_block(block);
        }
        if !n.is_multiple_of(16) {
            // the last 16 values are drawn anew, over the end of the block before
            let tail = &mut data[n - 16..];
            for value in tail.iter_mut() {
                *value = self.uniform();
            }
            fill_block(tail);
        }
        data
    }

    fn uniform(&mut self) -> f32 {
        (self.generator.next_u32() & 0x00ff_ffff) as f32 / (1_u32 << 24) as f32
    }

    /// The path of fewer than 16 values: doubles, a pair at a time, the cosine first.
    fn scalar_normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (sine, cosine) = libm::sincos(std::f64::consts::TAU * self.double());
        let radius = (-2.0 * libm::log1p(-self.double())).sqrt();
        self.spare = Some(radius * sine);
        radius * cosine
    }

    /// 53 bits of two draws, the first one high.
    fn double(&mut self) -> f64 {
        let high = u64::from(self.generator.next_u32());
        let low = u64::from(self.generator.next_u32());
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }
}

/// Eight pairs of uniforms to sixteen normals, in place.
fn fill_block(block: &mut [f32]) {
    for j in 0..8 {
        // The angle is rounded to f32 as PyTorch does it, which shows; what follows is as near as f32 gets.
        let angle = std::f32::consts::TAU * block[j + 8];
        let radius = (-2.0 * libm::log(f64::from(1.0 - block[j]))).sqrt();
        let (sine, cosine) = libm::sincos(f64::from(angle));
        block[j] = (radius * cosine) as f32;
        block[j + 8] = (radius * sine) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ_by_every_part_of_their_name() {
        let first = Stream::new(1, "noise", 2).normals(4);
        assert_eq!(first, Stream::new(1, "noise", 2).normals(4));
        for mut other in [Stream::new(0, "noise", 2), Stream::new(1, "order", 2), Stream::new(1, "noise", 3)]
        {
            assert_ne!(first, other.normals(4));
        }
    }

    /// A run is a pure function of its seed: these values, once published, stay. A ChaCha8 of its own in Python,
    /// under the key SHA-256(7 and 1 as little-endian u64, "noise"), gives the same.
    #[test]
    fn the_numbers_of_a_stream_do_not_change() {
        let mut stream = Stream::new(7, "noise", 1);
        assert_eq!(stream.normals(3), [-0.8226485, -0.37417144, 1.8642389]);
        assert_eq!(stream.uniform(), 0.9113083);
        assert_eq!([stream.below(1000), stream.below(1000)], [629, 674]);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut stream = Stream::new(3, "test", 0);
        let n = 100_000;
        let normals = stream.normals(n);
        let moment = |power: i32| normals.iter().map(|x| f64::from(*x).powi(power)).sum::<f64>() / n as f64;
        let moments = [1, 2, 3, 4].map(moment);
        for (found, (expected, tolerance)) in
            moments.into_iter().zip([(0.0, 0.02), (1.0, 0.02), (0.0, 0.05), (3.0, 0.15)])
        {
            assert!((found - expected).abs() < tolerance, "{moments:?}");
        }
        // neighbours come from one pair: they must not depend on each other
        let product = normals.chunks_exact(2).map(|pair| f64::from(pair[0] * pair[1])).sum::<f64>();
        assert!((product / (n / 2) as f64).abs() < 0.02);
        let mut counts = [0; 7];
        (0..n).for_each(|_| counts[stream.below(7) as usize] += 1);
        assert!(counts.iter().all(|c| (*c as f64 / n as f64 - 1.0 / 7.0).abs() < 0.01), "{counts:?}");
        let uniforms: Vec<f32> = (0..n).map(|_| stream.range(-1.0, 3.0)).collect();
        assert!(uniforms.iter().all(|x| (-1.0..=3.0).contains(x)));
        assert!((uniforms.iter().sum::<f32>() / n as f32 - 1.0).abs() < 0.03);
        let hits = (0..n).filter(|_| stream.bernoulli(0.3)).count();
        assert!((hits as f64 / n as f64 - 0.3).abs() < 0.01, "{hits}");
        assert!(!stream.bernoulli(0.0) && stream.bernoulli(1.0));
        assert_eq!(stream.below(1), 0);
    }

    #[test]
    fn every_order_is_as_likely() {
        let mut stream = Stream::new(4, "test", 0);
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            stream.shuffle(&mut items);
            *counts.entry(items).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
