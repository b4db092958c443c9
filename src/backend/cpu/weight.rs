//! Initial values, and the delta weight in a base's layout and type.

use super::Host;
use super::element::{is_own, load, pointer, read, store, sum_to_odd, write};
use super::kernels::{Coefficients, Nothing, Order, Rows, Sums, accumulate};
use super::simd::{Isa, Real};
use crate::adapter::{Combine, Geometry, Layout};
use crate::error::Result;
use crate::philox::{Factor, normal};
use crate::tensor::{Address, Dtype, Matrix, Triplets};
use std::sync::atomic::{AtomicBool, Ordering};

/// Deviation of the initial A and B, as in PEFT.
const DEVIATION: f64 = 0.02;
/// A tile of the delta weight, on the stack: rows, columns, and triplets that are added at a time.
const ROWS: usize = 8;
const COLUMNS: usize = 256;
const DEPTH: usize = 16;

fn at(matrix: &Matrix, row: usize, column: usize) -> Address {
    matrix.data.offset((row * matrix.row_stride + column) * matrix.dtype.size())
}

/// # Safety
/// The triplets were checked against the geometry.
pub(super) unsafe fn initialize(host: &Host, geometry: &Geometry, params: &Triplets, seed: u64) -> Result<()> {
    let (a, e, b) = (&params.a, &params.e, &params.b);
    for i in 0..e.length {
        // SAFETY: an element of E.
        unsafe { write(e.dtype, 0.0, e.data.offset(i * e.stride * e.dtype.size())) };
    }
    host.team.run(a.rows, a.columns * a.rows > ROWS * COLUMNS, "A is", |row, _| {
        for column in 0..a.columns {
            let value = normal(seed, Factor::A, row as u64, (geometry.input.begin + column) as u64);
            // SAFETY: an element of A; each row is one task.
            unsafe { write(a.dtype, DEVIATION * value, at(a, row, column)) };
        }
    })?;
    host.team.run(b.rows.div_ceil(ROWS), b.columns * b.rows > ROWS * COLUMNS, "B is", |group, _| {
        for row in group * ROWS..((group + 1) * ROWS).min(b.rows) {
            for column in 0..b.columns {
                let value = normal(seed, Factor::B, column as u64, (geometry.output.begin + row) as u64);
                // SAFETY: an element of B; each group of rows is one task.
                unsafe { write(b.dtype, DEVIATION * value, at(b, row, column)) };
            }
        }
    })
}

/// # Safety
/// Both are of one shape and type, and do not overlap.
pub(super) unsafe fn copy(from: &Matrix, to: &Matrix) {
    let bytes = from.columns * from.dtype.size();
    for row in 0..if bytes == 0 { 0 } else { from.rows } {
        // SAFETY: a row of each.
        unsafe { pointer::<u8>(at(to, row, 0)).copy_from_nonoverlapping(pointer::<u8>(at(from, row, 0)), bytes) };
    }
}

/// Combines w with the delta weight.
///
/// # Safety
/// Triplets and w were checked against the geometry.
#[expect(clippy::too_many_arguments, reason = "one operation")]
pub(super) unsafe fn delta(
    host: &Host,
    geometry: &Geometry,
    params: &Triplets,
    scaling: f64,
    layout: Layout,
    combine: Combine,
    w: &Matrix,
    non_finite: Option<Address>,
) -> Result<()> {
    let finite = AtomicBool::new(true);
    let parallel = w.rows * w.columns * geometry.rank.max(1) > 1 << 18;
    host.team.run(w.rows.div_ceil(ROWS), parallel, "w is", |group, _| {
        let first = group * ROWS;
        let rows = ROWS.min(w.rows - first);
        for begin in (0..w.columns).step_by(COLUMNS) {
            let tile = Tile { first, rows, begin, columns: COLUMNS.min(w.columns - begin) };
            // SAFETY: as this function asks; each group of rows is one task.
            let all = unsafe {
                match geometry.compute_dtype() {
                    Dtype::Float64 => tile.delta::<f64>(host, params, scaling, layout, combine, w),
                    _ => tile.delta::<f32>(host, params, scaling, layout, combine, w),
                }
            };
            if !all {
                finite.store(false, Ordering::Relaxed);
            }
        }
    })?;
    if let Some(flag) = non_finite.filter(|_| !finite.load(Ordering::Relaxed)) {
        // SAFETY: a checked address of one f32.
        unsafe { *pointer::<f32>(flag) = 1.0 };
    }
    Ok(())
}

/// A part of a base weight.
struct Tile {
    first: usize,
    rows: usize,
    begin: usize,
    columns: usize,
}

impl Tile {
    /// Combines the tile with its delta weight; returns whether all of it is finite.
    ///
    /// # Safety
    /// As [`delta`].
    unsafe fn delta<T: Real>(
        &self,
        host: &Host,
        params: &Triplets,
        scaling: f64,
        layout: Layout,
        combine: Combine,
        w: &Matrix,
    ) -> bool {
        let mut sum = [T::default(); ROWS * COLUMNS];
        let rank = params.e.length;
        for triplet in (0..rank).step_by(DEPTH) {
            let depth = DEPTH.min(rank - triplet);
            let mut c = [T::default(); ROWS * DEPTH];
            let mut p = [T::default(); DEPTH * COLUMNS];
            // SAFETY: elements of the triplets, and tiles as large as their counts.
            unsafe {
                let (across, along) =
                    if layout == Layout::OutIn { (&params.b, &params.a) } else { (&params.a, &params.b) };
                for k in 0..depth {
                    let j = triplet + k;
                    let e = read(params.e.dtype, params.e.data.offset(j * params.e.stride * params.e.dtype.size()));
                    for i in 0..self.rows {
                        let row = self.first + i;
                        let (row, column) = if layout == Layout::OutIn { (row, j) } else { (j, row) };
                        c[i * DEPTH + k] = T::from_f64(scaling * e * read(across.dtype, at(across, row, column)));
                    }
                }
                let rows = if layout == Layout::OutIn && is_own::<T>(along.dtype) {
                    Rows::new(pointer(at(along, triplet, self.begin)), along.row_stride)
                } else {
                    for k in 0..depth {
                        let to = &mut p[k * COLUMNS..][..self.columns];
                        if layout == Layout::OutIn {
                            load(along.dtype, at(along, triplet + k, self.begin), self.columns, to.as_mut_ptr());
                        } else {
                            for (i, slot) in to.iter_mut().enumerate() {
                                *slot = T::from_f64(read(along.dtype, at(along, self.begin + i, triplet + k)));
                            }
                        }
                    }
                    Rows::new(p.as_mut_ptr(), COLUMNS)
                };
                let c = Coefficients { data: c.as_ptr(), row: DEPTH, column: 1 };
                let out = Rows::new(sum.as_mut_ptr(), COLUMNS);
                accumulate(host.isa, (Order::ByRow, Sums::Go), (self.rows, depth, self.columns), c, rows, out, Nothing);
            }
        }
        let mut finite = true;
        for (i, delta) in sum.chunks_exact(COLUMNS).enumerate().take(self.rows) {
            // SAFETY: so many elements of w.
            finite &=
                unsafe { add(host.isa, combine, &delta[..self.columns], w.dtype, at(w, self.first + i, self.begin)) };
        }
        finite
    }
}

/// Combines up to [`COLUMNS`] elements of a row with the delta weight, each rounded once; returns whether all are
/// finite.
///
/// # Safety
/// As many elements of `dtype` as there are of `delta` can be read and written there.
unsafe fn add<T: Real>(isa: Isa, combine: Combine, delta: &[T], dtype: Dtype, to: Address) -> bool {
    // SAFETY: as this function asks; the processor has the instruction set.
    unsafe {
        match isa {
            Isa::Portable => add_with(combine, delta, dtype, to),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => add_avx2(combine, delta, dtype, to),
        }
    }
}

/// # Safety
/// As [`add`], and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_avx2<T: Real>(combine: Combine, delta: &[T], dtype: Dtype, to: Address) -> bool {
    // SAFETY: as this function asks.
    unsafe { add_with(combine, delta, dtype, to) }
}

/// # Safety
/// As [`add`].
#[inline(always)]
unsafe fn add_with<T: Real>(combine: Combine, delta: &[T], dtype: Dtype, to: Address) -> bool {
    let n = delta.len();
    // SAFETY: as this function asks; T is float32 where it is cast to it.
    unsafe {
        if is_own::<T>(dtype) {
            let w = std::slice::from_raw_parts_mut(pointer::<T>(to), n);
            match combine {
                Combine::Overwrite => each(w, delta, |_, d| d),
                Combine::Add => each(w, delta, |w, d| w + d),
                Combine::Subtract => each(w, delta, |w, d| w - d),
            }
            return all_finite(w);
        }
        if is_own::<T>(Dtype::Float32) && dtype.size() < size_of::<f32>() {
            let delta = std::slice::from_raw_parts(delta.as_ptr().cast::<f32>(), n);
            let mut wide = [0f32; COLUMNS];
            let w = &mut wide[..n];
            if combine != Combine::Overwrite {
                load(dtype, to, n, w.as_mut_ptr());
            }
            match combine {
                Combine::Overwrite => each(w, delta, |_, d| d),
                Combine::Add => each(w, delta, sum_to_odd),
                Combine::Subtract => each(w, delta, |w, d| sum_to_odd(w, -d)),
            }
            store(dtype, w.as_ptr(), n, to);
            load(dtype, to, n, w.as_mut_ptr());
            return all_finite(w);
        }
        let mut finite = true;
        for (i, delta) in delta.iter().enumerate() {
            let (to, delta) = (to.offset(i * dtype.size()), Into::<f64>::into(*delta));
            let value = match combine {
                Combine::Overwrite => delta,
                Combine::Add => read(dtype, to) + delta,
                Combine::Subtract => read(dtype, to) - delta,
            };
            finite &= write(dtype, value, to);
        }
        finite
    }
}

/// Replaces each element of w.
#[inline(always)]
fn each<T: Real>(w: &mut [T], delta: &[T], combined: impl Fn(T, T) -> T) {
    for (w, d) in w.iter_mut().zip(delta) {
        *w = combined(*w, *d);
    }
}

/// Without a branch for each.
#[inline(always)]
fn all_finite<T: Real>(values: &[T]) -> bool {
    values.iter().fold(true, |finite, x| finite & x.is_finite())
}
