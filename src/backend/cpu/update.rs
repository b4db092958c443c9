//! AdamW and importance over a run of elements, in one pass.

use super::element::{is_own, load, pointer, store};
use super::simd::{Isa, Real};
use crate::allocator::binding::Slice;
use crate::allocator::importance::{Smoothing, sensitivity};
use crate::optimizer::Coefficients;
use crate::tensor::{Address, Dtype};

/// Elements that are converted at a time; all arrays of a batch stay in the first cache.
const BATCH: usize = 256;

/// What one update does to a slice.
pub(super) struct Update<T> {
    /// AdamW, where it is asked for and the adapter has a gradient.
    pub(super) adamw: Option<Coefficients<T>>,
    /// Importance, while it is taken.
    pub(super) smoothing: Option<Smoothing<T>>,
    /// Multiplies every gradient; nothing where the adapter has none.
    pub(super) factor: Option<T>,
}

impl<T: Real> Update<T> {
    /// Updates elements `begin..end` of the slice, counted from its first.
    ///
    /// # Safety
    /// The slice was checked, has moments where AdamW is asked for, and the elements are this task's.
    pub(super) unsafe fn apply(&self, isa: Isa, slice: &Slice, begin: usize, end: usize) {
        let (mut p_wide, mut g_wide) = ([T::default(); BATCH], [T::default(); BATCH]);
        for first in (begin..end).step_by(BATCH) {
            let n = BATCH.min(end - first);
            let of = |base: Address| -> *mut T { pointer::<T>(base).wrapping_add(first) };
            // SAFETY: n elements of each array, none of which overlap.
            unsafe {
                let direct = is_own::<T>(slice.p.1);
                let p_at = slice.p.0.offset(first * slice.p.1.size());
                let p = if direct {
                    std::slice::from_raw_parts_mut(pointer::<T>(p_at), n)
                } else {
                    load(slice.p.1, p_at, n, p_wide.as_mut_ptr());
                    &mut p_wide[..n]
                };
                let g = match self.factor {
                    None => &g_wide[..n],
                    Some(_) if is_own::<T>(slice.g.1) => std::slice::from_raw_parts(of(slice.g.0).cast_const(), n),
                    Some(_) => {
                        load(slice.g.1, slice.g.0.offset(first * slice.g.1.size()), n, g_wide.as_mut_ptr());
                        &g_wide[..n]
                    }
                };
                if let (Some(adamw), Some((m, v)), Some(factor)) = (&self.adamw, slice.moments, self.factor) {
                    let (m, v) = (std::slice::from_raw_parts_mut(of(m), n), std::slice::from_raw_parts_mut(of(v), n));
                    step(isa, adamw, factor, p, g, m, v);
                    if !direct {
                        store(slice.p.1, p.as_ptr(), n, p_at);
                        // Importance sees what the forward pass will read.
                        load(slice.p.1, p_at, n, p.as_mut_ptr());
                    }
                    if let Some((low, dtype)) = slice.p_low {
                        store(dtype, p.as_ptr(), n, low.offset(first * dtype.size()));
                    }
                }
                if let Some(smoothing) = &self.smoothing {
                    let ipt = std::slice::from_raw_parts_mut(of(slice.exp_avg_ipt), n);
                    let unc = std::slice::from_raw_parts_mut(of(slice.exp_avg_unc), n);
                    smooth(isa, smoothing, self.factor, p, g, ipt, unc);
                }
            }
        }
    }
}

fn step<T: Real>(isa: Isa, adamw: &Coefficients<T>, factor: T, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
    match isa {
        Isa::Portable => step_with(adamw, factor, p, g, m, v),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { step_avx2(adamw, factor, p, g, m, v) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn step_avx2<T: Real>(adamw: &Coefficients<T>, factor: T, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
    step_with(adamw, factor, p, g, m, v);
}

#[inline(always)]
fn step_with<T: Real>(adamw: &Coefficients<T>, factor: T, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *p = adamw.update(*p, *g * factor, m, v);
    }
}

fn smooth<T: Real>(
    isa: Isa,
    smoothing: &Smoothing<T>,
    factor: Option<T>,
    p: &[T],
    g: &[T],
    ipt: &mut [T],
    unc: &mut [T],
) {
    match isa {
        Isa::Portable => smooth_with(smoothing, factor, p, g, ipt, unc),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { smooth_avx2(smoothing, factor, p, g, ipt, unc) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn smooth_avx2<T: Real>(smoothing: &Smoothing<T>, factor: Option<T>, p: &[T], g: &[T], ipt: &mut [T], unc: &mut [T]) {
    smooth_with(smoothing, factor, p, g, ipt, unc);
}

#[inline(always)]
fn smooth_with<T: Real>(smoothing: &Smoothing<T>, factor: Option<T>, p: &[T], g: &[T], ipt: &mut [T], unc: &mut [T]) {
    match factor {
        Some(factor) => {
            for (((p, g), ipt), unc) in p.iter().zip(g).zip(ipt).zip(unc) {
                smoothing.advance(sensitivity(*p, *g * factor), ipt, unc);
            }
        }
        None => {
            for (ipt, unc) in ipt.iter_mut().zip(unc) {
                smoothing.advance(T::zero(), ipt, unc);
            }
        }
    }
}

/// Sum of squares of elements `begin..end` of a slice's gradients, in float64 and a fixed order, and whether all are
/// finite.
///
/// # Safety
/// The slice was checked.
pub(super) unsafe fn sum_of_squares(isa: Isa, slice: &Slice, begin: usize, end: usize) -> (f64, bool) {
    // SAFETY: as this function asks.
    unsafe {
        match slice.g.1 {
            Dtype::Float64 => squares_of::<f64>(isa, slice, begin, end),
            _ => squares_of::<f32>(isa, slice, begin, end),
        }
    }
}

/// # Safety
/// As [`sum_of_squares`].
unsafe fn squares_of<T: Real>(isa: Isa, slice: &Slice, begin: usize, end: usize) -> (f64, bool) {
    let mut wide = [T::default(); BATCH];
    let (mut sum, mut finite) = (0.0, true);
    for first in (begin..end).step_by(BATCH) {
        let n = BATCH.min(end - first);
        let from = slice.g.0.offset(first * slice.g.1.size());
        // SAFETY: n elements of the gradients.
        let g = unsafe {
            if is_own::<T>(slice.g.1) {
                std::slice::from_raw_parts(pointer::<T>(from).cast_const(), n)
            } else {
                load(slice.g.1, from, n, wide.as_mut_ptr());
                &wide[..n]
            }
        };
        let part = squares(isa, g);
        sum += part;
        // A square may overflow where its root is finite, but not the other way round.
        finite &= part.is_finite() || g.iter().all(|x| x.is_finite());
    }
    (sum, finite)
}

fn squares<T: Real>(isa: Isa, g: &[T]) -> f64 {
    match isa {
        Isa::Portable => squares_with(g),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { squares_avx2(g) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn squares_avx2<T: Real>(g: &[T]) -> f64 {
    squares_with(g)
}

#[inline(always)]
fn squares_with<T: Real>(g: &[T]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (groups, rest) = g.as_chunks::<LANES>();
    for group in groups {
        for (sum, x) in sums.iter_mut().zip(group) {
            let x: f64 = (*x).into();
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        let x: f64 = (*x).into();
        *sum += x * x;
    }
    sums.iter().sum()
}
