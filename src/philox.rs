//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), and what is drawn from it:
//! dropout masks and initial values. Every number is a pure function of a key and a counter, so that any backend makes
//! the same.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The four words for a counter under a key.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [p0, p1] =
            [u64::from(MULTIPLIERS[0]) * u64::from(counter[0]), u64::from(MULTIPLIERS[1]) * u64::from(counter[2])];
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// The dropout of one call: which elements of x fall, and what the others are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    key: [u32; 2],
    offset: [u32; 2],
    /// An element falls where its word is below this: `p * 2^32`, rounded.
    threshold: u64,
    /// `1 / (1 - p)`.
    pub keep_scale: f64,
}

impl Dropout {
    /// The mask of (seed, offset) that drops with probability p.
    pub fn new(seed: u64, offset: u64, p: f64) -> Self {
        Self { key: words(seed), offset: words(offset), threshold: Self::threshold(p), keep_scale: 1.0 / (1.0 - p) }
    }

    /// The word below which an element falls.
    pub fn threshold(p: f64) -> u64 {
        (p * 4_294_967_296.0).round() as u64
    }

    /// Calls `keep(i, stays)` for the columns `first`, `first + 1`, … of a token, i counting from 0.
    #[inline(always)]
    pub fn for_each(&self, token: u32, first: usize, count: usize, mut keep: impl FnMut(usize, bool)) {
        let mut i = 0;
        while i < count {
            let column = first + i;
            let drawn = philox([(column / 4) as u32, token, self.offset[0], self.offset[1]], self.key);
            let lanes = (4 - column % 4).min(count - i);
            for lane in 0..lanes {
                keep(i + lane, u64::from(drawn[column % 4 + lane]) >= self.threshold);
            }
            i += lanes;
        }
    }
}

/// Which factor an initial value is for; part of the counter, so that A and B differ.
#[derive(Clone, Copy, Debug)]
pub enum Factor {
    /// Right vectors.
    A = 0,
    /// Left vectors.
    B = 1,
}

/// A standard normal number for feature `feature` of triplet `triplet` (Box and Muller, 1958, in float64).
pub fn normal(seed: u64, factor: Factor, triplet: u64, feature: u64) -> f64 {
    let [low, high] = words(triplet);
    // 2^34 features and 2^63 triplets at most: the counter's four words hold both without a clash.
    let drawn = philox([(feature / 4) as u32, low, high, factor as u32], words(seed));
    let pair = (feature % 4 / 2) as usize * 2;
    let uniform = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let (radius, angle) = ((-2.0 * uniform(drawn[pair]).ln()).sqrt(), std::f64::consts::TAU * uniform(drawn[pair + 1]));
    radius * if feature.is_multiple_of(2) { angle.cos() } else { angle.sin() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers that Random123 publishes for philox4x32, 10 rounds.
    #[test]
    fn random123_vectors() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(counter, key), want);
        }
    }

    #[test]
    fn a_mask_does_not_depend_on_where_it_is_cut() {
        let dropout = Dropout::new(7, 1 << 40, 0.3);
        let mut whole = [false; 50];
        dropout.for_each(9, 0, 50, |i, stays| whole[i] = stays);
        for first in 0..9 {
            dropout.for_each(9, first, 23, |i, stays| assert_eq!(stays, whole[first + i], "{first} {i}"));
        }
        assert!(whole.contains(&true) && whole.contains(&false));
    }

    #[test]
    fn probability_zero_drops_nothing() {
        Dropout::new(1, 2, 0.0).for_each(0, 0, 1000, |_, stays| assert!(stays));
    }

    #[test]
    fn normal_numbers_have_mean_0_and_deviation_1() {
        let n = 40_000;
        let values: Vec<f64> = (0..n).map(|i| normal(3, Factor::A, i / 400, i % 400)).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        let fourth = values.iter().map(|v| v.powi(4)).sum::<f64>() / n as f64;
        // Five standard errors: 1, sqrt(2) and sqrt(96) over sqrt(n).
        let error = 5.0 / (n as f64).sqrt();
        assert!(mean.abs() < error, "mean {mean}");
        assert!((variance - 1.0).abs() < error * 2f64.sqrt(), "variance {variance}");
        assert!((fourth - 3.0).abs() < error * 96f64.sqrt(), "fourth moment {fourth}");
    }
}
