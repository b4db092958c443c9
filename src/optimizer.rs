//! AdamW (Loshchilov and Hutter, 2019) as PyTorch computes it: decoupled decay, bias correction, epsilon outside the
//! root.

use num_traits::Float;

/// Numbers that serve one group of parameters.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// What one update multiplies by, computed once in float64 for a whole slice.
#[derive(Clone, Copy, Debug)]
pub struct Coefficients<T> {
    decay: T,
    beta1: T,
    rest1: T,
    beta2: T,
    rest2: T,
    step_size: T,
    root_of_bias2: T,
    eps: T,
}

impl AdamW {
    /// Coefficients of the k-th update, counted from 1.
    pub fn coefficients<T: Float>(&self, k: i64) -> Coefficients<T> {
        let k = k as f64;
        let round = |value: f64| T::from(value).unwrap_or_else(T::nan);
        Coefficients {
            decay: round(1.0 - self.lr * self.weight_decay),
            beta1: round(self.beta1),
            rest1: round(1.0 - self.beta1),
            beta2: round(self.beta2),
            rest2: round(1.0 - self.beta2),
            step_size: round(self.lr / (1.0 - self.beta1.powf(k))),
            root_of_bias2: round((1.0 - self.beta2.powf(k)).sqrt()),
            eps: round(self.eps),
        }
    }
}

impl<T: Float> Coefficients<T> {
    /// The parameter after the update; the moments become those after it.
    #[inline(always)]
    pub fn update(&self, p: T, g: T, m: &mut T, v: &mut T) -> T {
        *m = self.beta1 * *m + self.rest1 * g;
        *v = self.beta2 * *v + self.rest2 * g * g;
        p * self.decay - self.step_size * *m / (v.sqrt() / self.root_of_bias2 + self.eps)
    }
}

/// What multiplies every gradient: unscaling times clipping, as PyTorch's `clip_grad_norm_` has it.
pub fn gradient_factor(sum_of_squares: f64, loss_scale: f64, max_norm: f64) -> f64 {
    let norm = sum_of_squares.sqrt() / loss_scale;
    let clip = max_norm / (norm + 1e-6);
    // `clip` is NaN where the norm is: such a step is suppressed by found_inf, whatever the factor.
    (if clip < 1.0 { clip } else { 1.0 }) / loss_scale
}
