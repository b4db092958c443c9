//! Half precision from float64, rounded once: to the nearest, ties to even.
//!
//! `half` cuts the float64's lower bits off before it looks which neighbour is nearer, and so errs next to ties.

use half::{bf16, f16};

/// The float32 towards zero, its last bit set if anything was cut off: rounding that to nearest once more gives what
/// rounding the float64 to nearest would, while two roundings to nearest may not.
pub fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || value.is_nan() {
        return nearest;
    }
    f32::from_bits((nearest.to_bits() - u32::from(back.abs() > value.abs())) | 1)
}

/// The nearest bfloat16.
pub fn to_bf16(value: f64) -> bf16 {
    bf16::from_f32(round_to_odd(value))
}

/// The nearest float16.
pub fn to_f16(value: f64) -> f16 {
    f16::from_f32(round_to_odd(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between each two neighbours: the one that is nearer, however little decides it, and the even one of a tie.
    fn rounds_to_nearest(value_of: impl Fn(u16) -> f64, infinity: u16, round: impl Fn(f64) -> u16) {
        for lower in 0..infinity {
            let (upper, from) = (lower + 1, value_of(lower));
            // What would come next, were there one more exponent.
            let to = if upper == infinity { from + (from - value_of(lower - 1)) } else { value_of(upper) };
            let tie = from + (to - from) / 2.0;
            let even = if lower % 2 == 0 { lower } else { upper };
            for (value, want) in [
                (from, lower),
                (from.next_up(), lower),
                (tie.next_down(), lower),
                (tie, even),
                (tie.next_up(), upper),
                (to.next_down(), upper),
            ] {
                assert_eq!(round(value), want, "{value:e}");
                assert_eq!(round(-value), want | 0x8000, "{:e}", -value);
            }
        }
        for (value, want) in [(f64::MAX, infinity), (f64::INFINITY, infinity), (f64::MIN_POSITIVE, 0), (5e-324, 0)] {
            assert_eq!(round(value), want, "{value:e}");
        }
        assert!(value_of(round(f64::NAN)).is_nan());
    }

    #[test]
    fn bfloat16_is_the_nearest() {
        let value_of = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
        rounds_to_nearest(value_of, 0x7f80, |value| to_bf16(value).to_bits());
    }

    #[test]
    fn float16_is_the_nearest() {
        let value_of = |bits: u16| {
            let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
            match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction > 0.0 => f64::NAN,
                31 => f64::INFINITY,
                _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
            }
        };
        rounds_to_nearest(value_of, 0x7c00, |value| to_f16(value).to_bits());
    }
}
