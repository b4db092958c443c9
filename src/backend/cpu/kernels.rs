//! The two skinny products that everything is made of, on one thread, in registers:
//! `dot` (rows times rows, along the features) and `accumulate` (few rows added into many columns).

use super::simd::{Isa, Real, Vector};

/// Rows of elements in memory, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<T> {
    pub(super) data: *mut T,
    pub(super) stride: usize,
}

impl<T> Rows<T> {
    pub(super) fn new(data: *mut T, stride: usize) -> Self {
        Self { data, stride }
    }

    /// The same rows from row `i` on.
    pub(super) fn from(self, i: usize) -> Self {
        Self { data: self.data.wrapping_add(i * self.stride), stride: self.stride }
    }
}

/// Coefficients in memory: element (i, j) at `data + i * row + j * column`.
#[derive(Clone, Copy)]
pub(super) struct Coefficients<T> {
    pub(super) data: *const T,
    pub(super) row: usize,
    pub(super) column: usize,
}

/// Which rows or columns an `accumulate` goes through first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Each row of the output from end to end: where the output streams from memory.
    ByRow,
    /// All rows of a few columns: where the input is used again for every row.
    ByColumn,
}

/// `out[i, j] = sum_k x[i, k] * p[j, k]` for i below m, j below n, k below `length`.
///
/// # Safety
/// All rows can be read, and m rows of n elements written, and the output overlaps no input. The processor has the
/// instruction set.
pub(super) unsafe fn dot<T: Real>(isa: Isa, size: (usize, usize, usize), x: Rows<T>, p: Rows<T>, out: Rows<T>) {
    // SAFETY: as this function asks. Tiles are as large as the registers hold with their operands.
    unsafe {
        match isa {
            Isa::Portable => dot_with::<T::Portable, 4, 2>(size, x, p, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => dot_avx2::<T::Avx2>(size, x, p, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => dot_avx512::<T::Avx512>(size, x, p, out),
        }
    }
}

/// # Safety
/// As [`dot`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_avx2<V: Vector>(
    size: (usize, usize, usize),
    x: Rows<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    // SAFETY: as this function asks.
    unsafe { dot_with::<V, 4, 2>(size, x, p, out) }
}

/// # Safety
/// As [`dot`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
unsafe fn dot_avx512<V: Vector>(
    size: (usize, usize, usize),
    x: Rows<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    // SAFETY: as this function asks.
    unsafe { dot_with::<V, 4, 4>(size, x, p, out) }
}

/// # Safety
/// As [`dot`].
#[inline(always)]
unsafe fn dot_with<V: Vector, const M: usize, const N: usize>(
    (m, n, length): (usize, usize, usize),
    x: Rows<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    let at = |i: usize, j: usize| Rows::new(out.from(i).data.wrapping_add(j), out.stride);
    let (rows, columns) = (m - m % M, n - n % N);
    // SAFETY: within the rows that this function may use.
    unsafe {
        for i in (0..rows).step_by(M) {
            for j in (0..columns).step_by(N) {
                dot_tile::<V, M, N>(length, x.from(i), p.from(j), at(i, j));
            }
            for j in columns..n {
                dot_tile::<V, M, 1>(length, x.from(i), p.from(j), at(i, j));
            }
        }
        for i in rows..m {
            for j in (0..columns).step_by(N) {
                dot_tile::<V, 1, N>(length, x.from(i), p.from(j), at(i, j));
            }
            for j in columns..n {
                dot_tile::<V, 1, 1>(length, x.from(i), p.from(j), at(i, j));
            }
        }
    }
}

/// # Safety
/// As [`dot`], for M rows of x and N of p.
#[inline(always)]
unsafe fn dot_tile<V: Vector, const M: usize, const N: usize>(
    length: usize,
    x: Rows<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    let zero = V::splat(V::Element::default());
    let mut sums = [[zero; N]; M];
    let whole = length - length % V::LANES;
    let mut k = 0;
    while k < whole {
        // SAFETY: k + LANES is at most `length`, in each of the rows.
        unsafe {
            let factors: [V; N] = std::array::from_fn(|j| V::load(p.data.add(j * p.stride + k)));
            for (i, row) in sums.iter_mut().enumerate() {
                let value = V::load(x.data.add(i * x.stride + k));
                for (sum, factor) in row.iter_mut().zip(factors) {
                    *sum = value.mul_add(factor, *sum);
                }
            }
        }
        k += V::LANES;
    }
    for (i, row) in sums.iter().enumerate() {
        for (j, sum) in row.iter().enumerate() {
            let mut total = sum.sum();
            for k in whole..length {
                // SAFETY: k is below `length`.
                total += unsafe { *x.data.add(i * x.stride + k) * *p.data.add(j * p.stride + k) };
            }
            // SAFETY: row i and column j of the output.
            unsafe { *out.data.add(i * out.stride + j) = total };
        }
    }
}

/// `out[i, j] += sum_k c[i, k] * p[k, j]` for i below m, k below `depth`, j below `length`.
///
/// # Safety
/// All coefficients and rows can be read, and m rows of `length` elements written, and the output overlaps no input.
/// The processor has the instruction set.
pub(super) unsafe fn accumulate<T: Real>(
    isa: Isa,
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<T>,
    p: Rows<T>,
    out: Rows<T>,
) {
    // SAFETY: as this function asks. Tiles are as large as the registers hold with their operands.
    unsafe {
        match isa {
            Isa::Portable => accumulate_with::<T::Portable, 4, 2>(order, size, c, p, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => accumulate_avx2::<T::Avx2>(order, size, c, p, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => accumulate_avx512::<T::Avx512>(order, size, c, p, out),
        }
    }
}

/// # Safety
/// As [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate_avx2<V: Vector>(
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    // SAFETY: as this function asks.
    unsafe { accumulate_with::<V, 4, 2>(order, size, c, p, out) }
}

/// # Safety
/// As [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
unsafe fn accumulate_avx512<V: Vector>(
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    // SAFETY: as this function asks.
    unsafe { accumulate_with::<V, 4, 4>(order, size, c, p, out) }
}

/// # Safety
/// As [`accumulate`].
#[inline(always)]
unsafe fn accumulate_with<V: Vector, const M: usize, const W: usize>(
    order: Order,
    (m, depth, length): (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    let wide = W * V::LANES;
    let (row_groups, column_groups) = (m.div_ceil(M), length.div_ceil(wide));
    let (outer, inner) = if order == Order::ByRow { (row_groups, column_groups) } else { (column_groups, row_groups) };
    for a in 0..outer {
        for b in 0..inner {
            let (i, j) = if order == Order::ByRow { (M * a, wide * b) } else { (M * b, wide * a) };
            let (rows, columns) = ((m - i).min(M), (length - j).min(wide));
            let c = Coefficients { data: c.data.wrapping_add(i * c.row), ..c };
            let p = Rows::new(p.data.wrapping_add(j), p.stride);
            let out = Rows::new(out.from(i).data.wrapping_add(j), out.stride);
            // SAFETY: within the rows and columns that this function may use.
            unsafe {
                if rows == M && columns == wide {
                    accumulate_tile::<V, M, W>(depth, c, p, out);
                } else {
                    accumulate_edge::<V, M>((rows, depth, columns), c, p, out);
                }
            }
        }
    }
}

/// # Safety
/// As [`accumulate`], for at most M rows.
#[inline(always)]
unsafe fn accumulate_edge<V: Vector, const M: usize>(
    (rows, depth, columns): (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    let whole = columns - columns % V::LANES;
    for j in (0..whole).step_by(V::LANES) {
        let p = Rows::new(p.data.wrapping_add(j), p.stride);
        let out = Rows::new(out.data.wrapping_add(j), out.stride);
        // SAFETY: as this function asks.
        unsafe {
            if rows == M {
                accumulate_tile::<V, M, 1>(depth, c, p, out);
            } else {
                for i in 0..rows {
                    let c = Coefficients { data: c.data.wrapping_add(i * c.row), ..c };
                    accumulate_tile::<V, 1, 1>(depth, c, p, out.from(i));
                }
            }
        }
    }
    // SAFETY: as this function asks.
    unsafe { accumulate_rest(rows, depth, whole..columns, c, p, out) };
}

/// # Safety
/// As [`accumulate`], for M rows and W vectors.
#[inline(always)]
unsafe fn accumulate_tile<V: Vector, const M: usize, const W: usize>(
    depth: usize,
    c: Coefficients<V::Element>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
) {
    // SAFETY: M rows of W vectors of the output, and of p for each k.
    unsafe {
        let at = |i: usize, v: usize| out.data.add(i * out.stride + v * V::LANES);
        let mut sums: [[V; W]; M] = std::array::from_fn(|i| std::array::from_fn(|v| V::load(at(i, v))));
        for k in 0..depth {
            let values: [V; W] = std::array::from_fn(|v| V::load(p.data.add(k * p.stride + v * V::LANES)));
            for (i, row) in sums.iter_mut().enumerate() {
                let factor = V::splat(*c.data.add(i * c.row + k * c.column));
                for (sum, value) in row.iter_mut().zip(values) {
                    *sum = factor.mul_add(value, *sum);
                }
            }
        }
        for (i, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                sum.store(at(i, v));
            }
        }
    }
}

/// # Safety
/// As [`accumulate`], for the columns of a range.
#[inline(always)]
unsafe fn accumulate_rest<T: Real>(
    m: usize,
    depth: usize,
    columns: std::ops::Range<usize>,
    c: Coefficients<T>,
    p: Rows<T>,
    out: Rows<T>,
) {
    for i in 0..m {
        for j in columns.clone() {
            // SAFETY: row i and column j of the output, and of p for each k.
            unsafe {
                let slot = out.data.add(i * out.stride + j);
                let mut sum = *slot;
                for k in 0..depth {
                    sum += *c.data.add(i * c.row + k * c.column) * *p.data.add(k * p.stride + j);
                }
                *slot = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isas() -> Vec<Isa> {
        Isa::ALL.iter().copied().filter(|isa| isa.is_available()).collect()
    }

    /// Small whole numbers: sums are exact, so that every order of adding gives the same.
    fn numbers<T: Real>(n: usize, seed: usize) -> Vec<T> {
        (0..n).map(|i| T::from_f64(((i * 7 + seed * 13 + i * i) % 11) as f64 - 5.0)).collect()
    }

    fn products_match_plain_loops<T: Real + std::fmt::Debug>() {
        for isa in isas() {
            for m in [1, 2, 3, 4, 5, 9] {
                for n in [1, 2, 3, 4, 7] {
                    for length in [1, 3, 4, 8, 11, 24, 25, 33, 50] {
                        let (x, p) = (numbers::<T>(m * (length + 2), 1), numbers::<T>(n * (length + 1), 2));
                        let mut out = vec![T::from_f64(99.0); m * (n + 1)];
                        let rows = |v: &[T], stride| Rows::new(v.as_ptr().cast_mut(), stride);
                        let to = Rows::new(out.as_mut_ptr(), n + 1);
                        // SAFETY: sizes as above.
                        unsafe { dot(isa, (m, n, length), rows(&x, length + 2), rows(&p, length + 1), to) };
                        for i in 0..m {
                            for j in 0..n {
                                let want: T =
                                    (0..length).map(|k| x[i * (length + 2) + k] * p[j * (length + 1) + k]).sum();
                                assert_eq!(out[i * (n + 1) + j], want, "dot {isa:?} {m} {n} {length} at {i} {j}");
                            }
                            assert_eq!(out[i * (n + 1) + n], T::from_f64(99.0));
                        }
                        for order in [Order::ByRow, Order::ByColumn] {
                            let (c, mut out) = (numbers::<T>(m * n, 3), numbers::<T>(m * (length + 2), 4));
                            let before = out.clone();
                            let c_view = Coefficients { data: c.as_ptr(), row: 1, column: m };
                            let to = Rows::new(out.as_mut_ptr(), length + 2);
                            // SAFETY: sizes as above.
                            unsafe { accumulate(isa, order, (m, n, length), c_view, rows(&p, length + 1), to) };
                            for i in 0..m {
                                for j in 0..length + 2 {
                                    let at = i * (length + 2) + j;
                                    let sum: T =
                                        (0..n).map(|k| c[i + k * m] * p[k * (length + 1) + j.min(length)]).sum();
                                    let want = if j < length { before[at] + sum } else { before[at] };
                                    assert_eq!(out[at], want, "accumulate {isa:?} {m} {n} {length} at {i} {j}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn float32() {
        products_match_plain_loops::<f32>();
    }

    #[test]
    fn float64() {
        products_match_plain_loops::<f64>();
    }
}
