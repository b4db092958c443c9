//! Vectors of the processor, so that each kernel is written once: AVX2 with fused multiply-add, and a portable one that
//! the compiler maps to what there is. Chosen at run time.

use num_traits::Float;

/// Instruction sets that kernels are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// What every processor of the architecture has.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The better the later.
    pub(super) const ALL: &[Self] = &[
        Self::Portable,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
    ];

    /// Whether this processor has it.
    pub(super) fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    /// The best that this processor has.
    pub(super) fn detect() -> Self {
        Self::ALL.iter().copied().rev().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
        }
    }
}

/// A type that sums are taken in.
pub(super) trait Real:
    Float + Into<f64> + Default + Send + Sync + std::iter::Sum + std::ops::AddAssign + 'static
{
    type Portable: Vector<Element = Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Element = Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Element = Self>;

    fn from_f64(value: f64) -> Self;
}

impl Real for f32 {
    type Portable = Lanes<f32, 8>;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = x86::F32x8;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = x86::F32x16;

    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    type Portable = Lanes<f64, 4>;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = x86::F64x4;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = x86::F64x8;

    fn from_f64(value: f64) -> Self {
        value
    }
}

/// A vector register.
pub(super) trait Vector: Copy {
    type Element: Real;
    const LANES: usize;

    fn splat(value: Self::Element) -> Self;
    /// # Safety
    /// `LANES` elements can be read there.
    unsafe fn load(from: *const Self::Element) -> Self;
    /// # Safety
    /// `LANES` elements can be written there.
    unsafe fn store(self, to: *mut Self::Element);
    /// `self * factor + addend`.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The sum of the lanes, always in the same order.
    fn sum(self) -> Self::Element;
}

/// A vector that the compiler makes of an array.
#[derive(Clone, Copy)]
pub(super) struct Lanes<T, const N: usize>([T; N]);

impl<T: Real, const N: usize> Vector for Lanes<T, N> {
    type Element = T;
    const LANES: usize = N;

    #[inline(always)]
    fn splat(value: T) -> Self {
        Self([value; N])
    }

    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: as this function asks.
        Self(unsafe { from.cast::<[T; N]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: as this function asks.
        unsafe { to.cast::<[T; N]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Two roundings: a fused operation would be a function call where the processor has none.
        Self(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }

    #[inline(always)]
    fn sum(self) -> T {
        let mut lanes = self.0;
        let mut half = N / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    /// Implements a vector by intrinsics; `$sum` adds its lanes.
    macro_rules! vector {
        ($name:ident($register:ty) of $lanes:literal $element:ty:
            $splat:ident, $load:ident, $store:ident, $mul_add:ident, $sum:expr) => {
            #[derive(Clone, Copy)]
            pub struct $name($register);

            // SAFETY of all blocks: only kernels use the type that run after its instruction set was found
            // (`Isa::is_available`); addresses are as the functions ask.
            impl Vector for $name {
                type Element = $element;
                const LANES: usize = $lanes;

                #[inline(always)]
                fn splat(value: $element) -> Self {
                    // SAFETY: see above.
                    Self(unsafe { $splat(value) })
                }

                #[inline(always)]
                unsafe fn load(from: *const $element) -> Self {
                    // SAFETY: see above.
                    Self(unsafe { $load(from) })
                }

                #[inline(always)]
                unsafe fn store(self, to: *mut $element) {
                    // SAFETY: see above.
                    unsafe { $store(to, self.0) }
                }

                #[inline(always)]
                fn mul_add(self, factor: Self, addend: Self) -> Self {
                    // SAFETY: see above.
                    Self(unsafe { $mul_add(self.0, factor.0, addend.0) })
                }

                #[inline(always)]
                fn sum(self) -> $element {
                    let sum: unsafe fn($register) -> $element = $sum;
                    // SAFETY: see above.
                    unsafe { sum(self.0) }
                }
            }
        };
    }

    vector!(F32x8(__m256) of 8 f32:
        _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps, sum_f32);
    vector!(F64x4(__m256d) of 4 f64:
        _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd, sum_f64);
    vector!(F32x16(__m512) of 16 f32:
    _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps, |v| {
        // SAFETY: see above.
        unsafe { sum_f32(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))) }
    });
    vector!(F64x8(__m512d) of 8 f64:
    _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd, |v| {
        // SAFETY: see above.
        unsafe { sum_f64(_mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1))) }
    });

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sum_f32(v: __m256) -> f32 {
        // SAFETY: as this function asks.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sum_f64(v: __m256d) -> f64 {
        // SAFETY: as this function asks.
        unsafe {
            let two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
}
