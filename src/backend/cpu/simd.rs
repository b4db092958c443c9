//! Vectors of the processor, so that each kernel is written once: AVX2 with fused multiply-add, AVX-512, and a portable
//! one that the compiler maps to what there is. Chosen at run time.

use half::{bf16, f16};
use num_traits::Float;

/// Instruction sets that kernels are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// What every processor of the architecture has.
    Portable,
    /// AVX2, FMA and F16C.
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
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
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

    /// Whether half precision is computed with in this type.
    const MEETS_HALF: bool;

    fn from_f64(value: f64) -> Self;

    /// Rows become columns.
    #[inline(always)]
    fn transpose(block: [[Self; 4]; 4]) -> [[Self; 4]; 4] {
        std::array::from_fn(|j| std::array::from_fn(|i| block[i][j]))
    }
}

impl Real for f32 {
    const MEETS_HALF: bool = true;

    type Portable = Lanes<f32, 8>;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = x86::F32x8;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = x86::F32x16;

    fn from_f64(value: f64) -> Self {
        value as f32
    }

    /// The compiler takes the general one through memory, and waits for it.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn transpose(block: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
        use std::arch::x86_64::*;
        // SAFETY: SSE2 is what every processor of the architecture has; arrays and vectors are as large.
        unsafe {
            let [a, b, c, d] = std::mem::transmute::<[[f32; 4]; 4], [__m128; 4]>(block);
            let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
            std::mem::transmute::<[__m128; 4], [[f32; 4]; 4]>([
                _mm_movelh_ps(ab, cd),
                _mm_movehl_ps(cd, ab),
                _mm_movelh_ps(ab_high, cd_high),
                _mm_movehl_ps(cd_high, ab_high),
            ])
        }
    }
}

impl Real for f64 {
    const MEETS_HALF: bool = false;

    type Portable = Lanes<f64, 4>;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = x86::F64x4;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = x86::F64x8;

    fn from_f64(value: f64) -> Self {
        value
    }
}

/// Asks for the cache line at an address, which need not be one that can be read.
#[inline(always)]
pub(super) fn prefetch<P>(at: *const P) {
    // _MM_HINT_T0.
    ask_for::<3, P>(at);
}

/// As [`prefetch`], into the second cache.
#[inline(always)]
pub(super) fn prefetch_second<P>(at: *const P) {
    // _MM_HINT_T1.
    ask_for::<2, P>(at);
}

#[inline(always)]
fn ask_for<const HINT: i32, P>(at: *const P) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of the architecture has it, and a prefetch of any address is allowed.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<HINT>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
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
    /// The first `n` lanes; the others are zero.
    ///
    /// # Safety
    /// `n` elements, 1 to `LANES`, can be read there.
    unsafe fn load_part(from: *const Self::Element, n: usize) -> Self;
    /// Stores the first `n` lanes.
    ///
    /// # Safety
    /// `n` elements, 1 to `LANES`, can be written there.
    unsafe fn store_part(self, to: *mut Self::Element, n: usize);
    /// `self * factor + addend`.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The sum of the lanes, always in the same order.
    fn sum(self) -> Self::Element;
    /// # Safety
    /// As [`Vector::load`].
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: as this function asks.
        unsafe { widened(from, Self::LANES, f64::from) }
    }
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// As [`Vector::store`].
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        // SAFETY: as this function asks.
        unsafe { narrowed(self, to, Self::LANES, bf16::from_f32) };
    }
    /// # Safety
    /// As [`Vector::load`].
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: as this function asks.
        unsafe { widened(from, Self::LANES, f64::from) }
    }
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// As [`Vector::store`].
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16) {
        // SAFETY: as this function asks.
        unsafe { narrowed(self, to, Self::LANES, f16::from_f32) };
    }
    /// The sums of four vectors, each as [`Vector::sum`] has it: what stands beside a number changes no bit of it.
    #[inline(always)]
    fn sums(vectors: [Self; 4]) -> [Self::Element; 4] {
        let [a, b, c, d] = vectors;
        [a.sum(), b.sum(), c.sum(), d.sum()]
    }
}

/// Lanes of the widest vector.
const MOST_LANES: usize = 16;

/// A vector of n elements of another type.
///
/// # Safety
/// n elements can be read, at most as many as the vector has lanes.
#[inline(always)]
unsafe fn widened<V: Vector, S: Copy>(from: *const S, n: usize, value: impl Fn(S) -> f64) -> V {
    let mut lanes = [V::Element::default(); MOST_LANES];
    // SAFETY: as this function asks.
    unsafe {
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            *lane = V::Element::from_f64(value(*from.add(i)));
        }
        V::load(lanes.as_ptr())
    }
}

/// The reverse. Half precision is computed with in float32, so that this is one rounding.
///
/// # Safety
/// n elements can be written, at most as many as the vector has lanes.
#[inline(always)]
unsafe fn narrowed<V: Vector, S>(vector: V, to: *mut S, n: usize, rounded: impl Fn(f32) -> S) {
    let mut lanes = [V::Element::default(); MOST_LANES];
    // SAFETY: as this function asks.
    unsafe {
        vector.store(lanes.as_mut_ptr());
        for (i, lane) in lanes.iter().enumerate().take(n) {
            to.add(i).write(rounded(Into::<f64>::into(*lane) as f32));
        }
    }
}

/// What vectors of T are made of in memory: T itself, or half precision.
pub(super) trait Memory<T: Real>: Copy + 'static {
    /// # Safety
    /// As [`Vector::load`].
    unsafe fn load<V: Vector<Element = T>>(from: *const Self) -> V;
    /// # Safety
    /// As [`Vector::load_part`].
    unsafe fn load_part<V: Vector<Element = T>>(from: *const Self, n: usize) -> V;
    /// # Safety
    /// As [`Vector::store`].
    unsafe fn store<V: Vector<Element = T>>(v: V, to: *mut Self);
    /// # Safety
    /// As [`Vector::store_part`].
    unsafe fn store_part<V: Vector<Element = T>>(v: V, to: *mut Self, n: usize);
}

// SAFETY of all blocks: as the functions ask.
impl<T: Real> Memory<T> for T {
    #[inline(always)]
    unsafe fn load<V: Vector<Element = T>>(from: *const T) -> V {
        // SAFETY: see above.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn load_part<V: Vector<Element = T>>(from: *const T, n: usize) -> V {
        // SAFETY: see above.
        unsafe { V::load_part(from, n) }
    }

    #[inline(always)]
    unsafe fn store<V: Vector<Element = T>>(v: V, to: *mut T) {
        // SAFETY: see above.
        unsafe { v.store(to) }
    }

    #[inline(always)]
    unsafe fn store_part<V: Vector<Element = T>>(v: V, to: *mut T, n: usize) {
        // SAFETY: see above.
        unsafe { v.store_part(to, n) }
    }
}

/// Implements [`Memory`] for a half-precision type; parts of vectors go through an array.
macro_rules! half {
    ($half:ident: $load:ident, $store:ident) => {
        // SAFETY of all blocks: as the functions ask; the array has room for every vector.
        impl<T: Real> Memory<T> for $half {
            #[inline(always)]
            unsafe fn load<V: Vector<Element = T>>(from: *const $half) -> V {
                // SAFETY: see above.
                unsafe { V::$load(from) }
            }

            #[inline(always)]
            unsafe fn load_part<V: Vector<Element = T>>(from: *const $half, n: usize) -> V {
                let mut lanes = [$half::ZERO; MOST_LANES];
                // SAFETY: see above.
                unsafe {
                    from.copy_to_nonoverlapping(lanes.as_mut_ptr(), n);
                    V::$load(lanes.as_ptr())
                }
            }

            #[inline(always)]
            unsafe fn store<V: Vector<Element = T>>(v: V, to: *mut $half) {
                // SAFETY: see above.
                unsafe { v.$store(to) }
            }

            #[inline(always)]
            unsafe fn store_part<V: Vector<Element = T>>(v: V, to: *mut $half, n: usize) {
                let mut lanes = [$half::ZERO; MOST_LANES];
                // SAFETY: see above.
                unsafe {
                    v.$store(lanes.as_mut_ptr());
                    lanes.as_ptr().copy_to_nonoverlapping(to, n);
                }
            }
        }
    };
}

half!(bf16: load_bf16, store_bf16);
half!(f16: load_f16, store_f16);

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
    unsafe fn load_part(from: *const T, n: usize) -> Self {
        let mut lanes = [T::default(); N];
        // SAFETY: as this function asks.
        unsafe { from.copy_to_nonoverlapping(lanes.as_mut_ptr(), n) };
        Self(lanes)
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut T, n: usize) {
        // SAFETY: as this function asks.
        unsafe { self.0.as_ptr().copy_to_nonoverlapping(to, n) };
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Two roundings: a fused operation would be a function call where the processor has none.
        let mut lanes = addend.0;
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = self.0[i] * factor.0[i] + *lane;
        }
        Self(lanes)
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
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    /// Implements a vector by intrinsics; `$sum` adds its lanes.
    macro_rules! vector {
        ($name:ident($register:ty) of $lanes:literal $element:ty:
            $splat:ident, $load:ident, $store:ident, $load_part:ident, $store_part:ident, $mul_add:ident, $sum:ident, $sums:ident
            $(, $load_bf16:ident, $store_bf16:ident, $load_f16:ident, $store_f16:ident)?) => {
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
                unsafe fn load_part(from: *const $element, n: usize) -> Self {
                    // SAFETY: see above.
                    Self(unsafe { $load_part(from, n) })
                }

                #[inline(always)]
                unsafe fn store_part(self, to: *mut $element, n: usize) {
                    // SAFETY: see above.
                    unsafe { $store_part(to, n, self.0) }
                }

                #[inline(always)]
                fn mul_add(self, factor: Self, addend: Self) -> Self {
                    // SAFETY: see above.
                    Self(unsafe { $mul_add(self.0, factor.0, addend.0) })
                }

                #[inline(always)]
                fn sum(self) -> $element {
                    // SAFETY: see above.
                    unsafe { $sum(self.0) }
                }

                #[inline(always)]
                fn sums(vectors: [Self; 4]) -> [$element; 4] {
                    // SAFETY: see above.
                    unsafe {
                        let [a, b, c, d] = vectors;
                        $sums([a.0, b.0, c.0, d.0])
                    }
                }

                $(
                    #[inline(always)]
                    unsafe fn load_bf16(from: *const bf16) -> Self {
                        // SAFETY: see above.
                        Self(unsafe { $load_bf16(from) })
                    }

                    #[inline(always)]
                    unsafe fn store_bf16(self, to: *mut bf16) {
                        // SAFETY: see above.
                        unsafe { $store_bf16(to, self.0) }
                    }

                    #[inline(always)]
                    unsafe fn load_f16(from: *const f16) -> Self {
                        // SAFETY: see above.
                        Self(unsafe { $load_f16(from) })
                    }

                    #[inline(always)]
                    unsafe fn store_f16(self, to: *mut f16) {
                        // SAFETY: see above.
                        unsafe { $store_f16(to, self.0) }
                    }
                )?
            }
        };
    }

    vector!(F32x8(__m256) of 8 f32: _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, load_f32x8, store_f32x8,
        _mm256_fmadd_ps, sum_f32x8, sums_f32x8, load_bf16x8, store_bf16x8, load_f16x8, store_f16x8);
    vector!(F64x4(__m256d) of 4 f64: _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, load_f64x4, store_f64x4,
        _mm256_fmadd_pd, sum_f64x4, sums_f64x4);
    vector!(F32x16(__m512) of 16 f32: _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, load_f32x16, store_f32x16,
        _mm512_fmadd_ps, sum_f32x16, sums_f32x16, load_bf16x16, store_bf16x16, load_f16x16, store_f16x16);
    vector!(F64x8(__m512d) of 8 f64: _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, load_f64x8, store_f64x8,
        _mm512_fmadd_pd, sum_f64x8, sums_f64x8);

    /// # Safety
    /// The processor has AVX2; 8 elements can be read.
    #[inline(always)]
    unsafe fn load_bf16x8(from: *const bf16) -> __m256 {
        // SAFETY: as this function asks.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }

    /// # Safety
    /// The processor has AVX2; 8 elements can be written.
    #[inline(always)]
    unsafe fn store_bf16x8(to: *mut bf16, v: __m256) {
        // SAFETY: as this function asks.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            // A NaN keeps its sign and upper bits, and stays a NaN.
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(nearest, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }

    /// # Safety
    /// The processor has F16C; 8 elements can be read.
    #[inline(always)]
    unsafe fn load_f16x8(from: *const f16) -> __m256 {
        // SAFETY: as this function asks.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    /// # Safety
    /// The processor has F16C; 8 elements can be written.
    #[inline(always)]
    unsafe fn store_f16x8(to: *mut f16, v: __m256) {
        // SAFETY: as this function asks.
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) };
    }

    /// # Safety
    /// The processor has AVX-512 F; 16 elements can be read.
    #[inline(always)]
    unsafe fn load_bf16x16(from: *const bf16) -> __m512 {
        // SAFETY: as this function asks.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }

    /// # Safety
    /// The processor has AVX-512 F; 16 elements can be written.
    #[inline(always)]
    unsafe fn store_bf16x16(to: *mut bf16, v: __m512) {
        // SAFETY: as this function asks.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            // A NaN keeps its sign and upper bits, and stays a NaN.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let rounded = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x40_0000));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
        }
    }

    /// # Safety
    /// The processor has AVX-512 F; 16 elements can be read.
    #[inline(always)]
    unsafe fn load_f16x16(from: *const f16) -> __m512 {
        // SAFETY: as this function asks.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    /// # Safety
    /// The processor has AVX-512 F; 16 elements can be written.
    #[inline(always)]
    unsafe fn store_f16x16(to: *mut f16, v: __m512) {
        // SAFETY: as this function asks.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) };
    }

    /// Implements loading and storing of the first n lanes.
    macro_rules! part {
        ($load:ident, $store:ident of $element:ty as $register:ty: $load_with:ident, $store_with:ident, $mask:ident) => {
            /// # Safety
            /// The processor has the instruction set; n elements, at most as many as lanes, can be read.
            #[inline(always)]
            unsafe fn $load(from: *const $element, n: usize) -> $register {
                // SAFETY: as this function asks.
                unsafe { part!(@load $load_with, from, $mask(n)) }
            }

            /// # Safety
            /// The processor has the instruction set; n elements, at most as many as lanes, can be written.
            #[inline(always)]
            unsafe fn $store(to: *mut $element, n: usize, v: $register) {
                // SAFETY: as this function asks.
                unsafe { $store_with(to, $mask(n), v) }
            }
        };
        // AVX-512's masked loads take the mask first.
        (@load _mm512_maskz_loadu_ps, $from:ident, $mask:expr) => { _mm512_maskz_loadu_ps($mask, $from) };
        (@load _mm512_maskz_loadu_pd, $from:ident, $mask:expr) => { _mm512_maskz_loadu_pd($mask, $from) };
        (@load $load_with:ident, $from:ident, $mask:expr) => { $load_with($from, $mask) };
    }

    part!(load_f32x8, store_f32x8 of f32 as __m256: _mm256_maskload_ps, _mm256_maskstore_ps, first_of_8);
    part!(load_f64x4, store_f64x4 of f64 as __m256d: _mm256_maskload_pd, _mm256_maskstore_pd, first_of_4);
    part!(load_f32x16, store_f32x16 of f32 as __m512: _mm512_maskz_loadu_ps, _mm512_mask_storeu_ps, first_of_16_bits);
    part!(load_f64x8, store_f64x8 of f64 as __m512d: _mm512_maskz_loadu_pd, _mm512_mask_storeu_pd, first_of_8_bits);

    #[inline(always)]
    fn first_of_16_bits(n: usize) -> __mmask16 {
        (0xffff_u32 >> (16 - n)) as __mmask16
    }

    #[inline(always)]
    fn first_of_8_bits(n: usize) -> __mmask8 {
        (0xff_u32 >> (8 - n)) as __mmask8
    }

    /// A mask of the first n of eight lanes.
    ///
    /// # Safety
    /// The processor has AVX2, and n is at most 8.
    #[inline(always)]
    unsafe fn first_of_8(n: usize) -> __m256i {
        const LANES: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: eight elements from 8 - n on.
        unsafe { _mm256_loadu_si256(LANES.as_ptr().add(8 - n).cast()) }
    }

    /// A mask of the first n of four lanes.
    ///
    /// # Safety
    /// The processor has AVX2, and n is at most 4.
    #[inline(always)]
    unsafe fn first_of_4(n: usize) -> __m256i {
        const LANES: [i64; 8] = [-1, -1, -1, -1, 0, 0, 0, 0];
        // SAFETY: four elements from 4 - n on.
        unsafe { _mm256_loadu_si256(LANES.as_ptr().add(4 - n).cast()) }
    }

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sum_f32x8(v: __m256) -> f32 {
        // SAFETY: as this function asks.
        unsafe {
            let pairs = _mm256_add_ps(v, _mm256_permute_ps::<0b1110>(v));
            let halves = _mm256_add_ps(pairs, _mm256_movehdup_ps(pairs));
            _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)))
        }
    }

    /// Four sums at once: lanes of different vectors are brought side by side, and added together, in the order of
    /// `sum_f32x8`.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sums_f32x8([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // SAFETY: as this function asks.
        unsafe {
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let low = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
            let high = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
            let halves = _mm256_add_ps(low, high);
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }

    /// # Safety
    /// The processor has AVX-512 DQ.
    #[inline(always)]
    unsafe fn sums_f32x16([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // SAFETY: as this function asks.
        unsafe { sums_f32x8([halves_f32x16(a), halves_f32x16(b), halves_f32x16(c), halves_f32x16(d)]) }
    }

    /// # Safety
    /// The processor has AVX-512 DQ.
    #[inline(always)]
    unsafe fn halves_f32x16(v: __m512) -> __m256 {
        // SAFETY: as this function asks.
        unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)) }
    }

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sum_f64x4(v: __m256d) -> f64 {
        // SAFETY: as this function asks.
        unsafe {
            let two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }

    /// # Safety
    /// The processor has AVX-512 DQ.
    #[inline(always)]
    unsafe fn sum_f32x16(v: __m512) -> f32 {
        // SAFETY: as this function asks.
        unsafe { sum_f32x8(halves_f32x16(v)) }
    }

    /// # Safety
    /// The processor has AVX-512 F.
    #[inline(always)]
    unsafe fn sum_f64x8(v: __m512d) -> f64 {
        // SAFETY: as this function asks.
        unsafe { sum_f64x4(_mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1))) }
    }

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sums_f64x4([a, b, c, d]: [__m256d; 4]) -> [f64; 4] {
        // SAFETY: as this function asks.
        unsafe { [sum_f64x4(a), sum_f64x4(b), sum_f64x4(c), sum_f64x4(d)] }
    }

    /// # Safety
    /// The processor has AVX-512 F.
    #[inline(always)]
    unsafe fn sums_f64x8([a, b, c, d]: [__m512d; 4]) -> [f64; 4] {
        // SAFETY: as this function asks.
        unsafe { [sum_f64x8(a), sum_f64x8(b), sum_f64x8(c), sum_f64x8(d)] }
    }
}
