//! Between the caller's element types and the type that sums are taken in.

use super::simd::Real;
use crate::rounding;
use crate::tensor::{Address, Dtype};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A pointer to what the caller has there.
pub(super) fn pointer<T>(address: Address) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address.0)
}

/// The element type of a compute type.
pub(super) fn is_own<T: Real>(dtype: Dtype) -> bool {
    dtype.size() == size_of::<T>()
}

/// Half-precision elements are converted this many at a time.
const BATCH: usize = 64;

/// Converts `n` elements into the compute type.
///
/// # Safety
/// `n` elements of `dtype` can be read at `from`, aligned to their type, and `n` of T written at `to`; they do
/// not overlap.
pub(super) unsafe fn load<T: Real>(dtype: Dtype, from: Address, n: usize, to: *mut T) {
    // SAFETY: as this function asks.
    unsafe {
        match dtype {
            Dtype::Float32 => copy::<f32, T>(pointer(from), n, to, |x| T::from_f64(f64::from(x))),
            Dtype::Float64 => copy::<f64, T>(pointer(from), n, to, T::from_f64),
            #[cfg(target_arch = "x86_64")]
            Dtype::Bfloat16 if is_own::<T>(Dtype::Float32) && is_x86_feature_detected!("avx2") => {
                widen_avx2(pointer(from), n, to.cast());
            }
            Dtype::Bfloat16 => {
                copy::<u16, T>(pointer(from), n, to, |x| T::from_f64(f64::from(f32::from_bits(u32::from(x) << 16))));
            }
            Dtype::Float16 => {
                let mut wide = [0f32; BATCH];
                for begin in (0..n).step_by(BATCH) {
                    let count = BATCH.min(n - begin);
                    let narrow = std::slice::from_raw_parts(pointer::<f16>(from).add(begin), count);
                    narrow.convert_to_f32_slice(&mut wide[..count]);
                    copy(wide.as_ptr(), count, to.add(begin), |x| T::from_f64(f64::from(x)));
                }
            }
        }
    }
}

/// Rounds `n` elements of the compute type to the caller's.
///
/// # Safety
/// `n` elements of T can be read at `from`, and `n` of `dtype` written at `to`, aligned to their type; they do
/// not overlap.
pub(super) unsafe fn store<T: Real>(dtype: Dtype, from: *const T, n: usize, to: Address) {
    // SAFETY: as this function asks.
    unsafe {
        match dtype {
            Dtype::Float32 => copy::<T, f32>(from, n, pointer(to), |x| Into::<f64>::into(x) as f32),
            Dtype::Float64 => copy::<T, f64>(from, n, pointer(to), Into::into),
            // Half precision is computed with in float32, so that this is one rounding.
            #[cfg(target_arch = "x86_64")]
            Dtype::Bfloat16 if is_own::<T>(Dtype::Float32) && is_x86_feature_detected!("avx2") => {
                narrow_avx2(from.cast(), n, pointer(to));
            }
            Dtype::Bfloat16 => copy::<T, u16>(from, n, pointer(to), |x| to_bf16(Into::<f64>::into(x) as f32)),
            Dtype::Float16 => {
                let mut wide = [0f32; BATCH];
                for begin in (0..n).step_by(BATCH) {
                    let count = BATCH.min(n - begin);
                    copy(from.add(begin), count, wide.as_mut_ptr(), |x| Into::<f64>::into(x) as f32);
                    let narrow = std::slice::from_raw_parts_mut(pointer::<f16>(to).add(begin), count);
                    narrow.convert_from_f32_slice(&wide[..count]);
                }
            }
        }
    }
}

/// The bits of the nearest bfloat16, ties to even. `half` has a branch for NaN, which keeps a loop from being vectors.
#[inline(always)]
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN keeps its sign and upper bits, and stays a NaN.
    let nan = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { nearest }) as u16
}

/// # Safety
/// As [`copy`], and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn widen_avx2(from: *const u16, n: usize, to: *mut f32) {
    // SAFETY: as this function asks.
    unsafe { copy(from, n, to, |x| f32::from_bits(u32::from(x) << 16)) };
}

/// # Safety
/// As [`copy`], and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn narrow_avx2(from: *const f32, n: usize, to: *mut u16) {
    // SAFETY: as this function asks.
    unsafe { copy(from, n, to, to_bf16) };
}

/// # Safety
/// `n` elements can be read at `from` and written at `to`; they do not overlap.
#[inline(always)]
unsafe fn copy<S: Copy, D>(from: *const S, n: usize, to: *mut D, convert: impl Fn(S) -> D) {
    for i in 0..n {
        // SAFETY: i is below n.
        unsafe { to.add(i).write(convert(*from.add(i))) };
    }
}

/// One element in float64.
///
/// # Safety
/// An element of `dtype` can be read there.
pub(super) unsafe fn read(dtype: Dtype, from: Address) -> f64 {
    // SAFETY: as this function asks.
    unsafe {
        match dtype {
            Dtype::Float32 => f64::from(*pointer::<f32>(from)),
            Dtype::Float64 => *pointer::<f64>(from),
            Dtype::Bfloat16 => (*pointer::<bf16>(from)).to_f64(),
            Dtype::Float16 => (*pointer::<f16>(from)).to_f64(),
        }
    }
}

/// As [`rounding::round_to_odd`], of a sum: which way it was rounded shows in what the rounding left over.
#[inline(always)]
pub(super) fn sum_to_odd(a: f32, b: f32) -> f32 {
    let sum = a + b;
    let of_b = sum - a;
    let rest = (a - (sum - of_b)) + (b - of_b);
    let inexact = rest.abs() > 0.0;
    let away = (rest < 0.0) == (sum > 0.0);
    let cut = (sum.to_bits().wrapping_sub(u32::from(away))) | 1;
    f32::from_bits(if inexact { cut } else { sum.to_bits() })
}

/// Rounds a float64 to one element; returns whether it is finite there.
///
/// # Safety
/// An element of `dtype` can be written there.
pub(super) unsafe fn write(dtype: Dtype, value: f64, to: Address) -> bool {
    // SAFETY: as this function asks.
    unsafe {
        match dtype {
            Dtype::Float32 => {
                *pointer::<f32>(to) = value as f32;
                (value as f32).is_finite()
            }
            Dtype::Float64 => {
                *pointer::<f64>(to) = value;
                value.is_finite()
            }
            Dtype::Bfloat16 => {
                let narrow = rounding::to_bf16(value);
                *pointer::<bf16>(to) = narrow;
                narrow.is_finite()
            }
            Dtype::Float16 => {
                let narrow = rounding::to_f16(value);
                *pointer::<f16>(to) = narrow;
                narrow.is_finite()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_is_what_half_makes_of_it() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(to_bf16(value), bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn sums_are_rounded_to_odd() {
        let values =
            [0.0, -0.0, 1.0, -1.5, 1.0 + f32::EPSILON, 3e-8, -2e-7, 1e-40, -7e-45, 65504.0, 3.4e38, f32::INFINITY];
        let more = (0..400u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        let values: Vec<f32> = values.into_iter().chain(more.filter(|x| !x.is_nan())).collect();
        for a in &values {
            for b in &values {
                let sum = f64::from(*a) + f64::from(*b);
                if sum.is_finite() && (sum - f64::from(*a) != f64::from(*b) || sum - f64::from(*b) != f64::from(*a)) {
                    continue;
                }
                let (got, want) = (sum_to_odd(*a, *b), rounding::round_to_odd(sum));
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                let overflow = got.is_infinite() && want.abs() == f32::MAX;
                assert!(same || overflow || (got == 0.0 && want == 0.0), "{a:e} + {b:e}: {got:e} {want:e}");
            }
        }
    }
}
