//! The two skinny products that everything is made of, on one thread, in registers:
//! `dot` (rows times rows, along the features) and `accumulate` (few rows added into many columns).

use super::simd::{Isa, Memory, Real, Vector, prefetch, prefetch_second};

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

/// What a product asks for from memory while it computes, so that memory and arithmetic do not wait for each other.
pub(super) trait Asks: Copy {
    /// Whether there is ever something.
    const ANYTHING: bool;

    /// From where on a tile asks for what lies `step` bytes apart, in so many steps. Where nothing is left, it asks for
    /// what it has, again and again: that costs less than to look whether there is something.
    fn take<T>(&mut self, steps: usize, step: usize, has: *const T) -> (*const u8, usize);
}

/// For products of what is in cache.
#[derive(Clone, Copy)]
pub(super) struct Nothing;

impl Asks for Nothing {
    const ANYTHING: bool = false;

    #[inline(always)]
    fn take<T>(&mut self, _: usize, _: usize, has: *const T) -> (*const u8, usize) {
        (has.cast(), 0)
    }
}

/// Rows that are needed soon.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    row: *const u8,
    stride: usize,
    bytes: usize,
    rows: usize,
    /// Bytes of the first row that have been asked for.
    asked: usize,
}

impl Ahead {
    pub(super) const NOTHING: Self = Self { row: std::ptr::null(), stride: 0, bytes: 0, rows: 0, asked: 0 };

    /// m rows of so many bytes, `stride` apart.
    pub(super) fn new(row: *const u8, m: usize, bytes: usize, stride: usize) -> Self {
        let (rows, bytes) = if stride == bytes { (m.min(1), m * bytes) } else { (m, bytes) };
        Self { row, stride, bytes, rows, asked: 0 }
    }
}

impl Asks for Ahead {
    const ANYTHING: bool = true;

    #[inline(always)]
    fn take<T>(&mut self, steps: usize, step: usize, has: *const T) -> (*const u8, usize) {
        if self.rows == 0 {
            return (has.cast(), 0);
        }
        let at = self.row.wrapping_add(self.asked);
        self.asked += steps * step;
        if self.asked >= self.bytes {
            (self.row, self.asked, self.rows) = (self.row.wrapping_add(self.stride), 0, self.rows - 1);
        }
        (at, step)
    }
}

/// Rows of the output that one tile of an `accumulate` computes.
const TILE_ROWS: usize = 4;

/// Bytes of a line.
const LINE: usize = 64;

/// `out[i, j] = sum_k x[i, k] * p[j, k]` for i below m, j below n, k below `length`.
///
/// # Safety
/// All rows can be read, and m rows of n elements written, and the output overlaps no input. The processor has the
/// instruction set.
pub(super) unsafe fn dot<T: Real, S: Memory<T>, A: Asks>(
    isa: Isa,
    size: (usize, usize, usize),
    x: Rows<S>,
    p: Rows<T>,
    out: Rows<T>,
    ahead: A,
) {
    // SAFETY: as this function asks. Tiles are as large as the registers hold with their operands.
    unsafe {
        match isa {
            Isa::Portable => dot_with::<T::Portable, S, A, 4, 2>(size, x, p, out, ahead),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => dot_avx2::<T::Avx2, S, A>(size, x, p, out, ahead),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => dot_avx512::<T::Avx512, S, A>(size, x, p, out, ahead),
        }
    }
}

/// # Safety
/// As [`dot`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_avx2<V: Vector, S: Memory<V::Element>, A: Asks>(
    size: (usize, usize, usize),
    x: Rows<S>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
    ahead: A,
) {
    // SAFETY: as this function asks.
    unsafe { dot_with::<V, S, A, 4, 2>(size, x, p, out, ahead) }
}

/// # Safety
/// As [`dot`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn dot_avx512<V: Vector, S: Memory<V::Element>, A: Asks>(
    size: (usize, usize, usize),
    x: Rows<S>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
    ahead: A,
) {
    // SAFETY: as this function asks.
    unsafe { dot_with::<V, S, A, 6, 4>(size, x, p, out, ahead) }
}

/// # Safety
/// As [`dot`].
#[inline(always)]
unsafe fn dot_with<V: Vector, S: Memory<V::Element>, A: Asks, const M: usize, const N: usize>(
    (m, n, length): (usize, usize, usize),
    x: Rows<S>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
    mut ahead: A,
) {
    // SAFETY: within the rows that this function may use.
    unsafe {
        for i in (0..m - m % M).step_by(M) {
            dot_rows::<V, S, A, M, N>((n, length), x.from(i), p, out.from(i), &mut ahead);
        }
        let mut i = m - m % M;
        if M > 4 && i + 4 <= m {
            dot_rows::<V, S, A, 4, N>((n, length), x.from(i), p, out.from(i), &mut ahead);
            i += 4;
        }
        while i + 2 <= m {
            dot_rows::<V, S, A, 2, N>((n, length), x.from(i), p, out.from(i), &mut ahead);
            i += 2;
        }
        if i < m {
            dot_rows::<V, S, A, 1, N>((n, length), x.from(i), p, out.from(i), &mut ahead);
        }
    }
}

/// # Safety
/// As [`dot`], for M rows of x.
#[inline(always)]
unsafe fn dot_rows<V: Vector, S: Memory<V::Element>, A: Asks, const M: usize, const N: usize>(
    (n, length): (usize, usize),
    x: Rows<S>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
    ahead: &mut A,
) {
    let whole = n - n % N;
    // SAFETY: within the rows that this function may use.
    unsafe {
        for j in (0..whole).step_by(N) {
            let to = Rows::new(out.data.add(j), out.stride);
            // The first tile brings the rows that come next from memory, while it computes with these.
            if j == 0 {
                dot_tile::<V, S, A, M, N, true>(length, x, p, to, ahead);
            } else {
                dot_tile::<V, S, A, M, N, false>(length, x, p.from(j), to, ahead);
            }
        }
        let (p, to) = (p.from(whole), Rows::new(out.data.add(whole), out.stride));
        match n - whole {
            0 => {}
            1 => dot_tile::<V, S, A, M, 1, true>(length, x, p, to, ahead),
            2 => dot_tile::<V, S, A, M, 2, true>(length, x, p, to, ahead),
            _ => dot_tile::<V, S, A, M, 3, true>(length, x, p, to, ahead),
        }
    }
}

/// # Safety
/// As [`dot`], for M rows of x and N of p.
#[inline(always)]
unsafe fn dot_tile<V: Vector, S: Memory<V::Element>, A: Asks, const M: usize, const N: usize, const PREFETCH: bool>(
    length: usize,
    x: Rows<S>,
    p: Rows<V::Element>,
    out: Rows<V::Element>,
    ahead: &mut A,
) {
    let mut sums = [zeros::<V, N>(); M];
    // SAFETY: `length` elements of each of the rows; sums of M rows and N columns.
    unsafe {
        let whole = length - length % V::LANES;
        let (mut ask, step) = ahead.take(length / V::LANES, size_of::<V>(), p.data);
        for k in (0..whole).step_by(V::LANES) {
            let mut factors = zeros::<V, N>();
            for (j, factor) in factors.iter_mut().enumerate() {
                *factor = V::load(p.data.add(j * p.stride + k));
            }
            if A::ANYTHING {
                prefetch_second(ask);
                ask = ask.wrapping_add(step);
            }
            for (i, row) in sums.iter_mut().enumerate() {
                if PREFETCH {
                    prefetch(x.data.wrapping_add((M + i) * x.stride + k));
                }
                let value: V = S::load(x.data.add(i * x.stride + k));
                for (sum, factor) in row.iter_mut().zip(&factors) {
                    *sum = value.mul_add(*factor, *sum);
                }
            }
        }
        if whole < length {
            let rest = length - whole;
            let mut factors = zeros::<V, N>();
            for (j, factor) in factors.iter_mut().enumerate() {
                *factor = V::load_part(p.data.add(j * p.stride + whole), rest);
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let value: V = S::load_part(x.data.add(i * x.stride + whole), rest);
                for (sum, factor) in row.iter_mut().zip(&factors) {
                    *sum = value.mul_add(*factor, *sum);
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            let to = out.data.add(i * out.stride);
            if let Ok(four) = <[V; 4]>::try_from(row.as_slice()) {
                to.cast::<[V::Element; 4]>().write_unaligned(V::sums(four));
            } else {
                for (j, sum) in row.iter().enumerate() {
                    *to.add(j) = sum.sum();
                }
            }
        }
    }
}

/// Whether an `accumulate` adds to what is there, or begins a sum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sums {
    Go,
    Begin,
}

/// `out[i, j] += sum_k c[i, k] * p[k, j]` for i below m, k below `depth`, j below `length`; `=` where sums begin.
///
/// # Safety
/// All coefficients and rows can be read, and m rows of `length` elements written, and the output overlaps no input.
/// The processor has the instruction set.
pub(super) unsafe fn accumulate<T: Real, P: Memory<T>, O: Memory<T>, A: Asks>(
    isa: Isa,
    how: (Order, Sums),
    size: (usize, usize, usize),
    c: Coefficients<T>,
    p: Rows<P>,
    out: Rows<O>,
    mut ahead: A,
) {
    let (order, sums) = how;
    // SAFETY: as this function asks.
    unsafe {
        match sums {
            Sums::Go => accumulate_on::<T, P, O, A, false>(isa, order, size, c, p, out, &mut ahead),
            Sums::Begin => accumulate_on::<T, P, O, A, true>(isa, order, size, c, p, out, &mut ahead),
        }
    }
}

/// # Safety
/// As [`accumulate`].
unsafe fn accumulate_on<T: Real, P: Memory<T>, O: Memory<T>, A: Asks, const BEGIN: bool>(
    isa: Isa,
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<T>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    // SAFETY: as this function asks.
    unsafe {
        match isa {
            Isa::Portable => accumulate_portable::<T::Portable, P, O, A, BEGIN>(order, size, c, p, out, ahead),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => accumulate_avx2::<T::Avx2, P, O, A, BEGIN>(order, size, c, p, out, ahead),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => accumulate_avx512::<T::Avx512, P, O, A, BEGIN>(order, size, c, p, out, ahead),
        }
    }
}

/// # Safety
/// As [`accumulate`].
// Not a part of its caller, whose stack would hold its tiles beside the other instruction sets'.
#[inline(never)]
unsafe fn accumulate_portable<V: Vector, P: Memory<V::Element>, O: Memory<V::Element>, A: Asks, const BEGIN: bool>(
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    // SAFETY: as this function asks. Tiles are as large as the registers hold with their operands.
    unsafe { accumulate_with::<V, P, O, A, 2, BEGIN>(order, size, c, p, out, ahead) }
}

/// # Safety
/// As [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn accumulate_avx2<V: Vector, P: Memory<V::Element>, O: Memory<V::Element>, A: Asks, const BEGIN: bool>(
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    // SAFETY: as this function asks. Tiles are as large as the registers hold with their operands.
    unsafe { accumulate_with::<V, P, O, A, 2, BEGIN>(order, size, c, p, out, ahead) }
}

/// # Safety
/// As [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn accumulate_avx512<V: Vector, P: Memory<V::Element>, O: Memory<V::Element>, A: Asks, const BEGIN: bool>(
    order: Order,
    size: (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    // SAFETY: as this function asks. Tiles are as large as the registers hold with their operands.
    unsafe { accumulate_with::<V, P, O, A, 4, BEGIN>(order, size, c, p, out, ahead) }
}

/// # Safety
/// As [`accumulate`].
#[inline(always)]
unsafe fn accumulate_with<
    V: Vector,
    P: Memory<V::Element>,
    O: Memory<V::Element>,
    A: Asks,
    const W: usize,
    const BEGIN: bool,
>(
    order: Order,
    (m, depth, length): (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    if length <= V::LANES {
        // SAFETY: as this function asks.
        return unsafe { accumulate_narrow::<V, P, O, A, BEGIN>((m, depth, length), c, p, out, ahead) };
    }
    let wide = W * V::LANES;
    let (row_groups, column_groups) = (m.div_ceil(TILE_ROWS), length.div_ceil(wide));
    let (outer, inner) = if order == Order::ByRow { (row_groups, column_groups) } else { (column_groups, row_groups) };
    for a in 0..outer {
        for b in 0..inner {
            let (i, j) = if order == Order::ByRow { (TILE_ROWS * a, wide * b) } else { (TILE_ROWS * b, wide * a) };
            let (rows, columns) = ((m - i).min(TILE_ROWS), (length - j).min(wide));
            let c = Coefficients { data: c.data.wrapping_add(i * c.row), ..c };
            let p = Rows::new(p.data.wrapping_add(j), p.stride);
            let out = Rows::new(out.from(i).data.wrapping_add(j), out.stride);
            // SAFETY: within the rows and columns that this function may use.
            unsafe {
                let size = (rows, depth, columns);
                match order {
                    Order::ByRow => accumulate_tiles::<V, P, O, A, W, BEGIN, NEXT_ROWS>(size, c, p, out, ahead),
                    // The first rows bring the columns that come next from memory.
                    Order::ByColumn if b == 0 => {
                        accumulate_tiles::<V, P, O, A, W, BEGIN, NEXT_INPUT>(size, c, p, out, ahead)
                    }
                    Order::ByColumn => accumulate_tiles::<V, P, O, A, W, BEGIN, NEXT_COLUMNS>(size, c, p, out, ahead),
                }
            }
        }
    }
}

/// Rows of one vector: as many together as it takes to keep the units busy while each waits for its own sum.
///
/// # Safety
/// As [`accumulate`], for at most as many columns as a vector has lanes.
#[inline(always)]
unsafe fn accumulate_narrow<V: Vector, P: Memory<V::Element>, O: Memory<V::Element>, A: Asks, const BEGIN: bool>(
    (m, depth, length): (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    if length == 0 {
        return;
    }
    // SAFETY: as this function asks.
    unsafe {
        // Where coefficients of rows lie side by side, a tile's addresses need one register.
        if c.row == 1 {
            narrow_rows::<V, P, O, A, 12, BEGIN>((m, depth, length), Coefficients { row: 1, ..c }, p, out, ahead);
        } else {
            narrow_rows::<V, P, O, A, 8, BEGIN>((m, depth, length), c, p, out, ahead);
        }
    }
}

/// # Safety
/// As [`accumulate`], for at most as many columns as a vector has lanes.
#[inline(always)]
unsafe fn narrow_rows<
    V: Vector,
    P: Memory<V::Element>,
    O: Memory<V::Element>,
    A: Asks,
    const M: usize,
    const BEGIN: bool,
>(
    (m, depth, length): (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    let mut i = 0;
    while i < m {
        let c = Coefficients { data: c.data.wrapping_add(i * c.row), ..c };
        // SAFETY: as this function asks.
        unsafe {
            i += if m - i >= M {
                accumulate_tile::<V, P, O, A, M, 1, BEGIN, NOTHING, true>((depth, length), c, p, out.from(i), ahead);
                M
            } else if m - i >= 4 {
                accumulate_tile::<V, P, O, A, 4, 1, BEGIN, NOTHING, true>((depth, length), c, p, out.from(i), ahead);
                4
            } else {
                accumulate_tile::<V, P, O, A, 1, 1, BEGIN, NOTHING, true>((depth, length), c, p, out.from(i), ahead);
                1
            };
        }
    }
}

/// # Safety
/// As [`accumulate`], for at most [`TILE_ROWS`] rows and W vectors.
#[inline(always)]
unsafe fn accumulate_tiles<
    V: Vector,
    P: Memory<V::Element>,
    O: Memory<V::Element>,
    A: Asks,
    const W: usize,
    const BEGIN: bool,
    const PREFETCH: u8,
>(
    (rows, depth, columns): (usize, usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    // SAFETY: as this function asks.
    unsafe {
        match rows {
            1 => accumulate_columns::<V, P, O, A, 1, W, BEGIN, PREFETCH>((depth, columns), c, p, out, ahead),
            2 => accumulate_columns::<V, P, O, A, 2, W, BEGIN, PREFETCH>((depth, columns), c, p, out, ahead),
            3 => accumulate_columns::<V, P, O, A, 3, W, BEGIN, PREFETCH>((depth, columns), c, p, out, ahead),
            _ => accumulate_columns::<V, P, O, A, TILE_ROWS, W, BEGIN, PREFETCH>((depth, columns), c, p, out, ahead),
        }
    }
}

/// # Safety
/// As [`accumulate`], for M rows and at most W vectors.
#[inline(always)]
unsafe fn accumulate_columns<
    V: Vector,
    P: Memory<V::Element>,
    O: Memory<V::Element>,
    A: Asks,
    const M: usize,
    const W: usize,
    const BEGIN: bool,
    const PREFETCH: u8,
>(
    (depth, columns): (usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    let last = columns - (columns - 1) / V::LANES * V::LANES;
    // SAFETY: as this function asks.
    unsafe {
        if columns == W * V::LANES {
            return accumulate_tile::<V, P, O, A, M, W, BEGIN, PREFETCH, false>((depth, last), c, p, out, ahead);
        }
        match columns.div_ceil(V::LANES) {
            1 => accumulate_tile::<V, P, O, A, M, 1, BEGIN, NOTHING, true>((depth, last), c, p, out, ahead),
            2 => accumulate_tile::<V, P, O, A, M, 2, BEGIN, NOTHING, true>((depth, last), c, p, out, ahead),
            3 => accumulate_tile::<V, P, O, A, M, 3, BEGIN, NOTHING, true>((depth, last), c, p, out, ahead),
            _ => accumulate_tile::<V, P, O, A, M, 4, BEGIN, NOTHING, true>((depth, last), c, p, out, ahead),
        }
    }
}

/// What a tile asks for from memory, beside what it computes with: nothing, the output's rows or columns that come next,
/// or also the input's columns.
const NOTHING: u8 = 0;
const NEXT_ROWS: u8 = 1;
const NEXT_COLUMNS: u8 = 2;
const NEXT_INPUT: u8 = 3;

/// `PART` says whether the last vector has `last` columns alone.
///
/// # Safety
/// As [`accumulate`], for M rows and W vectors.
#[inline(always)]
unsafe fn accumulate_tile<
    V: Vector,
    P: Memory<V::Element>,
    O: Memory<V::Element>,
    A: Asks,
    const M: usize,
    const W: usize,
    const BEGIN: bool,
    const PREFETCH: u8,
    const PART: bool,
>(
    (depth, last): (usize, usize),
    c: Coefficients<V::Element>,
    p: Rows<P>,
    out: Rows<O>,
    ahead: &mut A,
) {
    // SAFETY: M rows of W vectors of the output, and of p for each k.
    unsafe {
        let mut sums = [zeros::<V, W>(); M];
        if !BEGIN {
            for (i, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = load::<V, O, W, PART>(out.data.add(i * out.stride), v, last);
                }
            }
        }
        if PREFETCH != NOTHING {
            let next = if PREFETCH == NEXT_ROWS { M * out.stride } else { W * V::LANES };
            for i in 0..M {
                for v in 0..W {
                    prefetch(out.data.wrapping_add(next + i * out.stride + v * V::LANES));
                }
            }
        }
        let asks = A::ANYTHING && PREFETCH != NOTHING;
        let (mut ask, step) = if asks { ahead.take(depth, LINE, p.data) } else { (std::ptr::null(), 0) };
        for k in 0..depth {
            if asks {
                prefetch_second(ask);
                ask = ask.wrapping_add(step);
            }
            let mut values = zeros::<V, W>();
            for (v, value) in values.iter_mut().enumerate() {
                *value = load::<V, P, W, PART>(p.data.add(k * p.stride), v, last);
                if PREFETCH == NEXT_INPUT {
                    prefetch(p.data.wrapping_add(k * p.stride + (W + v) * V::LANES));
                }
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let factor = V::splat(*c.data.add(i * c.row + k * c.column));
                for (sum, value) in row.iter_mut().zip(&values) {
                    *sum = factor.mul_add(*value, *sum);
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                let to = out.data.add(i * out.stride + v * V::LANES);
                if PART && v == W - 1 { O::store_part(*sum, to, last) } else { O::store(*sum, to) }
            }
        }
    }
}

/// Vectors that a loop fills: what fills an array from a closure, the compiler does not always inline, and the call takes
/// every vector through memory.
#[inline(always)]
fn zeros<V: Vector, const N: usize>() -> [V; N] {
    [V::splat(V::Element::default()); N]
}

/// Vector v of W of a row, of which the last may have `last` columns alone.
///
/// # Safety
/// The columns can be read.
#[inline(always)]
unsafe fn load<V: Vector, S: Memory<V::Element>, const W: usize, const PART: bool>(
    row: *const S,
    v: usize,
    last: usize,
) -> V {
    // SAFETY: as this function asks.
    unsafe {
        let at = row.add(v * V::LANES);
        if PART && v == W - 1 { S::load_part(at, last) } else { S::load(at) }
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
            for m in [1, 2, 3, 4, 6, 7, 9, 13, 29] {
                for n in [1, 2, 3, 4, 7] {
                    for length in [1, 3, 4, 8, 11, 24, 25, 33, 50, 131] {
                        let (x, p) = (numbers::<T>(m * (length + 2), 1), numbers::<T>(n * (length + 1), 2));
                        let mut out = vec![T::from_f64(99.0); m * (n + 1)];
                        let rows = |v: &[T], stride| Rows::new(v.as_ptr().cast_mut(), stride);
                        let to = Rows::new(out.as_mut_ptr(), n + 1);
                        // SAFETY: sizes as above.
                        unsafe { dot(isa, (m, n, length), rows(&x, length + 2), rows(&p, length + 1), to, Nothing) };
                        for i in 0..m {
                            for j in 0..n {
                                let want: T =
                                    (0..length).map(|k| x[i * (length + 2) + k] * p[j * (length + 1) + k]).sum();
                                assert_eq!(out[i * (n + 1) + j], want, "dot {isa:?} {m} {n} {length} at {i} {j}");
                            }
                            assert_eq!(out[i * (n + 1) + n], T::from_f64(99.0));
                        }
                        let hows = [Order::ByRow, Order::ByColumn].map(|o| [(o, Sums::Go), (o, Sums::Begin)]);
                        for (order, sums) in hows.into_iter().flatten() {
                            let (c, mut out) = (numbers::<T>(m * n, 3), numbers::<T>(m * (length + 2), 4));
                            let before = out.clone();
                            let c_view = Coefficients { data: c.as_ptr(), row: 1, column: m };
                            let to = Rows::new(out.as_mut_ptr(), length + 2);
                            // SAFETY: sizes as above.
                            unsafe {
                                let p = rows(&p, length + 1);
                                accumulate(isa, (order, sums), (m, n, length), c_view, p, to, Nothing);
                            }
                            for i in 0..m {
                                for j in 0..length + 2 {
                                    let at = i * (length + 2) + j;
                                    let sum: T =
                                        (0..n).map(|k| c[i + k * m] * p[k * (length + 1) + j.min(length)]).sum();
                                    let want = match sums {
                                        _ if j >= length => before[at],
                                        Sums::Go => before[at] + sum,
                                        Sums::Begin => sum,
                                    };
                                    assert_eq!(out[at], want, "accumulate {isa:?} {m} {n} {length} at {i} {j}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// A product's bits depend on its own rows alone, not on how many others are computed with it.
    fn products_stand_alone<T: Real + std::fmt::Debug>() {
        let values = |n: usize, seed: f64| -> Vec<T> { (0..n).map(|i| T::from_f64((i as f64 + seed).sin())).collect() };
        let (m, n, length) = (13, 11, 261);
        let (x, p) = (values(m * length, 0.5), values(n * length, 0.25));
        let rows = |v: &Vec<T>, i: usize| Rows::new(v.as_ptr().wrapping_add(i * length).cast_mut(), length);
        for isa in isas() {
            let mut all = vec![T::default(); m * n];
            // SAFETY: sizes as above.
            unsafe { dot(isa, (m, n, length), rows(&x, 0), rows(&p, 0), Rows::new(all.as_mut_ptr(), n), Nothing) };
            for i in 0..m {
                for j in 0..n {
                    let mut alone = T::default();
                    let to = Rows::new(&raw mut alone, 1);
                    // SAFETY: one row of each.
                    unsafe { dot(isa, (1, 1, length), rows(&x, i), rows(&p, j), to, Nothing) };
                    assert_eq!(alone, all[i * n + j], "{isa:?} at {i} {j}");
                }
            }
        }
    }

    #[test]
    fn products_do_not_see_each_other() {
        products_stand_alone::<f32>();
        products_stand_alone::<f64>();
    }

    #[test]
    fn float32() {
        products_match_plain_loops::<f32>();
    }

    #[test]
    fn float64() {
        products_match_plain_loops::<f64>();
    }

    /// All floating-point numbers but for bits that no rounding to half precision can see, and ties beside them.
    fn singles() -> impl Iterator<Item = f32> {
        let lows = [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff];
        (0..=u16::MAX).flat_map(move |high| lows.map(|low| f32::from_bits(u32::from(high) << 16 | low)))
    }

    /// Sums of one product with 1, stored in half precision, are what `half` makes of the numbers; loaded again, too.
    fn half_precision_is_what_half_makes_of_it<H: Memory<f32>>(round: fn(f32) -> H, bits: fn(H) -> u16) {
        let values: Vec<f32> = singles().filter(|x| x.to_bits() != 0x8000_0000).collect();
        let length = values.len() - 3;
        let one = 1.0;
        let c = Coefficients { data: &raw const one, row: 0, column: 0 };
        for isa in isas() {
            let mut rounded = vec![round(0.0); length];
            let (from, to) = (Rows::new(values.as_ptr().cast_mut(), 0), Rows::new(rounded.as_mut_ptr(), 0));
            // SAFETY: one row of so many elements.
            unsafe { accumulate(isa, (Order::ByRow, Sums::Begin), (1, 1, length), c, from, to, Nothing) };
            for (value, got) in values.iter().zip(&rounded) {
                let want = round(*value + 0.0);
                assert_eq!(bits(*got), bits(want), "{isa:?} {value:e}");
            }
            let mut back = vec![0f32; length];
            // SAFETY: one row of so many elements.
            unsafe {
                accumulate(
                    isa,
                    (Order::ByRow, Sums::Begin),
                    (1, 1, length),
                    c,
                    to,
                    Rows::new(back.as_mut_ptr(), 0),
                    Nothing,
                );
            }
            for (half, single) in rounded.iter().zip(&back) {
                assert!(single.is_nan() || bits(round(*single)) == bits(*half) || *single == 0.0, "{isa:?} {single:e}");
            }
        }
    }

    #[test]
    fn bfloat16() {
        half_precision_is_what_half_makes_of_it(half::bf16::from_f32, half::bf16::to_bits);
    }

    #[test]
    fn float16() {
        half_precision_is_what_half_makes_of_it(half::f16::from_f32, half::f16::to_bits);
    }
}
