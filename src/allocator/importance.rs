//! Sensitivity of every parameter, smoothed, and its uncertainty (the AdaLoRA paper's equations 8 to 10). Numbers that
//! overflow count as the largest one, so that scores are finite and can be ordered.

use num_traits::Float;

/// Smoothing of one pass, rounded once.
#[derive(Clone, Copy, Debug)]
pub struct Smoothing<T> {
    beta1: T,
    rest1: T,
    beta2: T,
    rest2: T,
}

impl<T: Float> Smoothing<T> {
    /// From the allocator's betas.
    pub fn new(beta1: f64, beta2: f64) -> Self {
        let round = |value: f64| T::from(value).unwrap_or_else(T::nan);
        Self { beta1: round(beta1), rest1: round(1.0 - beta1), beta2: round(beta2), rest2: round(1.0 - beta2) }
    }

    /// Takes this step's sensitivity into the averages.
    #[inline(always)]
    pub fn advance(&self, now: T, exp_avg_ipt: &mut T, exp_avg_unc: &mut T) {
        let ipt = finite(self.beta1 * *exp_avg_ipt + self.rest1 * now);
        *exp_avg_unc = finite(self.beta2 * *exp_avg_unc + self.rest2 * (now - ipt).abs());
        *exp_avg_ipt = ipt;
    }
}

/// `abs(p * g)`.
#[inline(always)]
pub fn sensitivity<T: Float>(p: T, g: T) -> T {
    finite((p * g).abs())
}

/// What one parameter adds to its triplet's score.
#[inline(always)]
pub fn score<T: Float + Into<f64>>(exp_avg_ipt: T, exp_avg_unc: T) -> f64 {
    finite(exp_avg_ipt.into() * exp_avg_unc.into())
}

/// The largest number in place of infinity and NaN.
#[inline(always)]
pub fn finite<T: Float>(value: T) -> T {
    if value < T::max_value() { value } else { T::max_value() }
}
