//! Forward and backward. Blocks of tokens go through both factors while they are in cache, so that x, y, dy and dx are
//! each touched once.
//!
//! Tokens are cut into chunks whose size depends on the shape alone. Backward sums each chunk's gradients apart and
//! adds the chunks in order, so that the number of threads changes no bit.

use super::Host;
use super::element::{is_own, load, pointer, store};
use super::kernels::{Ahead, Coefficients, Order, Rows, Sums, accumulate, dot};
use super::simd::{Isa, Real, prefetch};
use crate::adapter::{ALIGNMENT, Call, Geometry, Pass};
use crate::error::{Error, Result};
use crate::philox::Dropout;
use crate::tensor::{Address, Dtype, Matrix, Triplets};
use half::{bf16, f16};
use std::marker::PhantomData;

/// Tokens that go through all products together; at a width of 768, x, y and the factors stay in the second cache.
const BLOCK: usize = 32;
/// Tokens of a chunk of the backward pass, each of which has a sum of its own to be added in the end: so many where
/// there are chunks enough for a few threads, and more where there would be too many chunks.
const BACKWARD_CHUNK: usize = 4 * BLOCK;
const FEW_CHUNKS: usize = 4;
const MOST_CHUNKS: usize = 16;
/// Triplets, and bytes of a factor, from which on it leaves the first cache before it is used again.
const MANY_TRIPLETS: usize = 16;
const LARGE_FACTOR: usize = 1 << 15;
/// Multiplications below which waking other threads costs more than it gains.
const SERIAL_WORK: usize = 1 << 18;
/// Elements of factors below which that holds for packing them.
const SERIAL_FACTORS: usize = 1 << 14;
/// Most bytes of a block that is asked for ahead: larger ones would push out of the second cache what is computed with.
const MOST_AHEAD: usize = 1 << 18;
/// Gradient elements that are added over chunks at a time.
const PIECE: usize = 256;
/// Rows of B that are transposed at a time, so that they stay in the first cache.
const TRANSPOSED: usize = 64;

/// Tokens of a chunk of the backward pass.
fn chunk_tokens(tokens: usize) -> usize {
    let [most, few] = [MOST_CHUNKS, FEW_CHUNKS].map(|chunks| tokens.div_ceil(chunks).next_multiple_of(BLOCK));
    most.max(few.clamp(BLOCK, BACKWARD_CHUNK))
}

/// Tokens of a task of the forward pass: as in the backward pass, but where that would leave threads without work.
fn forward_tokens(tokens: usize, threads: usize) -> usize {
    tokens.div_ceil(2 * threads).next_multiple_of(BLOCK).clamp(BLOCK, BACKWARD_CHUNK)
}

/// How far apart rows of our own lie: an odd number of cache lines, so that many rows do not meet in few of its sets.
fn stride<T>(columns: usize) -> usize {
    let line = 64 / size_of::<T>();
    (columns.div_ceil(line) | 1) * line
}

/// In which order rows of dx or y meet a factor of so many triplets: a large one a few columns at a time, where the rows
/// of a block wait in the second cache. Those of few triplets that are too wide for that stream through once.
fn order<T>(triplets: usize, columns: usize) -> Order {
    let bytes = columns * size_of::<T>();
    let is_large = triplets * bytes > LARGE_FACTOR && BLOCK * bytes <= MOST_AHEAD;
    if triplets > MANY_TRIPLETS || is_large { Order::ByColumn } else { Order::ByRow }
}

/// Hands out the workspace, piece after piece; also computes how much there must be.
struct Arena {
    next: usize,
    overflow: bool,
}

impl Arena {
    fn new(begin: Address) -> Self {
        Self { next: begin.0, overflow: false }
    }

    fn take<T>(&mut self, counts: &[usize]) -> *mut T {
        let address = self.next;
        let bytes = counts.iter().try_fold(size_of::<T>(), |n, count| n.checked_mul(*count));
        let end = bytes.and_then(|b| b.checked_next_multiple_of(ALIGNMENT)).and_then(|b| address.checked_add(b));
        self.overflow |= end.is_none_or(|end| isize::try_from(end).is_err());
        self.next = end.unwrap_or(0);
        pointer(Address(address))
    }

    /// Rows that are used again and again.
    fn rows<T>(&mut self, rows: usize, columns: usize) -> Rows<T> {
        let stride = stride::<T>(columns);
        Rows::new(self.take(&[rows, stride]), stride)
    }
}

/// The place of a triplet that is not live.
const NOWHERE: u32 = u32::MAX;

/// One adapter's factors, made ready: its live triplets, those with a value first.
struct Share<T> {
    rank: usize,
    /// Numbers of the live triplets; those whose E is not zero come first.
    order: *mut u32,
    /// For each triplet its place in the order, or [`NOWHERE`].
    places: *mut u32,
    live: usize,
    active: usize,
    /// E of the live ones.
    e: *mut T,
    /// Rows of A, in order.
    a: Rows<T>,
    packs_a: bool,
    /// Rows of B transposed, in order.
    bt: Rows<T>,
}

impl<T: Real> Share<T> {
    fn new(arena: &mut Arena, g: &Geometry) -> Self {
        let (rank, input, output) = (g.rank, g.input.local, g.output.local);
        Self {
            rank,
            order: arena.take(&[rank]),
            places: arena.take(&[rank]),
            live: 0,
            active: 0,
            e: arena.take(&[rank]),
            a: arena.rows(rank, input),
            packs_a: false,
            bt: arena.rows(rank, output),
        }
    }

    /// Finds the live triplets.
    ///
    /// # Safety
    /// The call was checked, and the arena's memory is this share's alone.
    unsafe fn list(&mut self, call: &Call) {
        // SAFETY: E and the pattern have `rank` elements, and so have the arena's.
        unsafe {
            let value = |i: usize| {
                let mut value = T::default();
                load(call.params.e.dtype, element(&call.params.e, i), 1, &raw mut value);
                value
            };
            let kept = |i: usize| call.pattern.is_none_or(|p| *pointer::<u8>(p).add(i) != 0);
            (0..self.rank).for_each(|i| *self.places.add(i) = NOWHERE);
            for zero in [false, true] {
                for i in (0..self.rank).filter(|i| kept(*i) && (value(*i) == T::zero()) == zero) {
                    *self.order.add(self.live) = i as u32;
                    *self.places.add(i) = self.live as u32;
                    *self.e.add(self.live) = value(i);
                    self.live += 1;
                }
                if !zero {
                    self.active = self.live;
                }
            }
            let in_order = (0..self.live).all(|k| *self.order.add(k) as usize == k);
            let a = &call.params.a;
            self.packs_a = !(is_own::<T>(a.dtype) && in_order && order::<T>(self.live, a.columns) == Order::ByRow);
            if !self.packs_a {
                self.a = Rows::new(pointer(a.data), a.row_stride);
            }
        }
    }

    /// Brings A into order and into the compute type.
    ///
    /// # Safety
    /// As [`Share::list`], which ran before.
    unsafe fn pack_a(&self, call: &Call) {
        if !self.packs_a {
            return;
        }
        let a = &call.params.a;
        for k in 0..self.live {
            // SAFETY: within the matrix and the arena's copy of it.
            unsafe { load(a.dtype, row_of(a, *self.order.add(k) as usize), a.columns, self.a.from(k).data) };
        }
    }

    /// As [`Share::pack_a`], for B, whose columns become rows.
    ///
    /// # Safety
    /// As [`Share::pack_a`].
    unsafe fn pack_b(&self, call: &Call) {
        let b = &call.params.b;
        // SAFETY: within the matrix and the arena's copy of it.
        unsafe {
            if is_own::<T>(b.dtype) {
                // Takes what is not live, so that four columns go together wherever one of them is.
                let mut dropped = [T::default(); TRANSPOSED];
                for first in (0..b.rows).step_by(TRANSPOSED) {
                    let rows = first..(first + TRANSPOSED).min(b.rows);
                    for j in (0..self.rank).step_by(SIDE) {
                        let from = Rows::new(pointer::<T>(row_of(b, rows.start)).add(j), b.row_stride);
                        let places = self.places_of(j, self.live);
                        if places == [None; SIDE] {
                            continue;
                        }
                        let to = places.map(|place| match place {
                            Some(k) => self.bt.from(k).data.add(rows.start),
                            None => dropped.as_mut_ptr(),
                        });
                        if j + SIDE <= self.rank {
                            columns_to_rows(rows.len(), from, to);
                            continue;
                        }
                        for (k, to) in to.iter().enumerate().take(self.rank - j) {
                            (0..rows.len()).for_each(|o| *to.add(o) = *from.from(o).data.add(k));
                        }
                    }
                }
                return;
            }
            let mut wide = [T::default(); PIECE];
            for o in 0..b.rows {
                for begin in (0..self.rank).step_by(PIECE) {
                    let n = PIECE.min(self.rank - begin);
                    load(b.dtype, row_of(b, o).offset(begin * b.dtype.size()), n, wide.as_mut_ptr());
                    for (i, value) in wide[..n].iter().enumerate() {
                        if let Some(k) = self.place(begin + i, self.live) {
                            *self.bt.from(k).data.add(o) = *value;
                        }
                    }
                }
            }
        }
    }

    /// A triplet's place among the first `limit` in order.
    fn place(&self, triplet: usize, limit: usize) -> Option<usize> {
        // SAFETY: there is a place for each triplet.
        let place = unsafe { *self.places.add(triplet) } as usize;
        (place < limit).then_some(place)
    }

    /// The places of up to [`SIDE`] triplets from one on, among the first `limit` in order.
    fn places_of(&self, first: usize, limit: usize) -> [Option<usize>; SIDE] {
        std::array::from_fn(|i| (first + i < self.rank).then(|| self.place(first + i, limit)).flatten())
    }

    /// Copies live columns of a saved [tokens, rank] matrix into order.
    ///
    /// # Safety
    /// `from` has rows of `rank` elements, `to` rows of `live`, m each.
    unsafe fn gather(&self, m: usize, from: *const T, to: Rows<T>) {
        for t in 0..m {
            for k in 0..self.live {
                // SAFETY: as this function asks.
                unsafe { *to.data.add(t * to.stride + k) = *from.add(t * self.rank + *self.order.add(k) as usize) };
            }
        }
    }

    /// The reverse; columns of other triplets become zero.
    ///
    /// # Safety
    /// As [`Share::gather`].
    unsafe fn scatter(&self, m: usize, from: Rows<T>, to: *mut T) {
        for t in 0..m {
            // SAFETY: as this function asks.
            unsafe {
                let row = to.add(t * self.rank);
                if self.live < self.rank {
                    row.write_bytes(0, self.rank);
                }
                for k in 0..self.live {
                    *row.add(*self.order.add(k) as usize) = *from.data.add(t * from.stride + k);
                }
            }
        }
    }
}

/// Sums of one chunk's gradients, for one adapter; rows in the share's order.
struct Partial<T> {
    a: Rows<T>,
    bt: Rows<T>,
    /// In float64: the values are few, and their gradients decide what stays.
    e: *mut f64,
}

impl<T: Real> Partial<T> {
    fn new(arena: &mut Arena, g: &Geometry) -> Self {
        Self { a: arena.rows(g.rank, g.input.local), bt: arena.rows(g.rank, g.output.local), e: arena.take(&[g.rank]) }
    }
}

/// A worker's own memory, for one block of tokens.
struct Scratch<T> {
    /// x, dropped out, for one adapter.
    dropped: Rows<T>,
    /// dx, while several adapters add to it.
    dx: Rows<T>,
    /// One adapter's share of dx, before the mask.
    masked: Rows<T>,
    h: Rows<T>,
    g: Rows<T>,
    scaled: Rows<T>,
}

impl<T: Real> Scratch<T> {
    fn new(arena: &mut Arena, geometries: &[&Geometry]) -> Self {
        let most = |f: fn(&Geometry) -> usize| geometries.iter().map(|g| f(g)).max().unwrap_or(0);
        let (input, rank) = (most(|g| g.input.local), most(|g| g.rank));
        let mut rows = |columns| Rows::new(arena.take(&[BLOCK, columns]), columns);
        Self {
            dropped: rows(input),
            dx: rows(input),
            masked: rows(input),
            h: rows(rank),
            g: rows(rank),
            scaled: rows(rank),
        }
    }
}

/// The workspace of a pass.
struct Layout<T> {
    begin: usize,
    /// From here on, a worker each.
    scratch: usize,
    scratch_bytes: usize,
    /// From here on, a chunk each.
    partials: usize,
    partial_bytes: usize,
    chunk: usize,
    chunks: usize,
    element: PhantomData<T>,
}

impl<T: Real> Layout<T> {
    fn new(begin: Address, geometries: &[&Geometry], tokens: usize, threads: usize) -> Option<Self> {
        let mut arena = Arena::new(begin);
        for g in geometries {
            Share::<T>::new(&mut arena, g);
        }
        let shares = arena.next;
        Scratch::<T>::new(&mut arena, geometries);
        let scratch_bytes = arena.next.wrapping_sub(shares);
        let mut chunk = Arena::new(Address(0));
        for g in geometries {
            Partial::<T>::new(&mut chunk, g);
        }
        let size = chunk_tokens(tokens);
        let chunks = tokens.div_ceil(size);
        let partials = scratch_bytes.checked_mul(threads).and_then(|n| n.checked_add(shares))?;
        let end = chunk.next.checked_mul(chunks).and_then(|n| n.checked_add(partials))?;
        let fits = !arena.overflow && !chunk.overflow && isize::try_from(end).is_ok();
        fits.then_some(Self {
            begin: begin.0,
            scratch: shares,
            scratch_bytes,
            partials,
            partial_bytes: chunk.next,
            chunk: size,
            chunks,
            element: PhantomData,
        })
    }

    fn bytes(&self) -> usize {
        self.partials + self.partial_bytes * self.chunks - self.begin
    }

    fn scratch(&self, worker: usize, geometries: &[&Geometry]) -> Scratch<T> {
        Scratch::new(&mut Arena::new(Address(self.scratch + worker * self.scratch_bytes)), geometries)
    }

    fn partials<'a>(
        &self,
        chunk: usize,
        geometries: impl Iterator<Item = &'a Geometry>,
    ) -> impl Iterator<Item = Partial<T>> {
        let mut arena = Arena::new(Address(self.partials + chunk * self.partial_bytes));
        geometries.map(move |g| Partial::new(&mut arena, g))
    }
}

/// Bytes of workspace of a pass.
pub(super) fn workspace(geometries: &[&Geometry], tokens: usize, threads: usize) -> Result<usize> {
    let bytes = match geometries[0].compute_dtype() {
        Dtype::Float64 => Layout::<f64>::new(Address(0), geometries, tokens, threads).map(|l| l.bytes()),
        _ => Layout::<f32>::new(Address(0), geometries, tokens, threads).map(|l| l.bytes()),
    };
    bytes.ok_or_else(|| Error::argument("tokens", tokens, "fewer: the workspace overflows memory"))
}

fn row_of(matrix: &Matrix, row: usize) -> Address {
    matrix.data.offset(row * matrix.row_stride * matrix.dtype.size())
}

fn element(vector: &crate::tensor::Vector, i: usize) -> Address {
    vector.data.offset(i * vector.stride * vector.dtype.size())
}

/// m tokens from `first` on, and how many follow them in the same task.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    m: usize,
    next: usize,
}

/// The blocks of a task.
fn blocks(tokens: std::ops::Range<usize>) -> impl Iterator<Item = Block> {
    tokens.clone().step_by(BLOCK).map(move |first| {
        let m = BLOCK.min(tokens.end - first);
        Block { first, m, next: BLOCK.min(tokens.end - first - m) }
    })
}

/// Rows of x, y, dy or dx where the caller has them.
#[derive(Clone, Copy)]
enum Lines<T> {
    Own(Rows<T>),
    Bfloat16(Rows<bf16>),
    Float16(Rows<f16>),
}

impl<T: Real> Lines<T> {
    /// From a row of a matrix on.
    fn of(matrix: &Matrix, first: usize) -> Self {
        let (at, stride) = (row_of(matrix, first), matrix.row_stride);
        match matrix.dtype {
            Dtype::Bfloat16 => Self::Bfloat16(Rows::new(pointer(at), stride)),
            Dtype::Float16 => Self::Float16(Rows::new(pointer(at), stride)),
            Dtype::Float32 | Dtype::Float64 => Self::Own(Rows::new(pointer(at), stride)),
        }
    }

    /// [`dot`] of these rows and of p.
    ///
    /// # Safety
    /// As [`dot`].
    unsafe fn dot(self, isa: Isa, size: (usize, usize, usize), p: Rows<T>, out: Rows<T>, ahead: Ahead) {
        // SAFETY: as this function asks.
        unsafe {
            match self {
                Self::Own(x) => dot(isa, size, x, p, out, ahead),
                Self::Bfloat16(x) if T::MEETS_HALF => dot(isa, size, x, p, out, ahead),
                Self::Float16(x) if T::MEETS_HALF => dot(isa, size, x, p, out, ahead),
                _ => unreachable!("float64 goes with itself alone"),
            }
        }
    }

    /// [`accumulate`] of these rows into sums.
    ///
    /// # Safety
    /// As [`accumulate`].
    unsafe fn add_to(
        self,
        isa: Isa,
        sums: Sums,
        size: (usize, usize, usize),
        c: Coefficients<T>,
        out: Rows<T>,
        ahead: Ahead,
    ) {
        let how = (Order::ByColumn, sums);
        // SAFETY: as this function asks.
        unsafe {
            match self {
                Self::Own(p) => accumulate(isa, how, size, c, p, out, ahead),
                Self::Bfloat16(p) if T::MEETS_HALF => accumulate(isa, how, size, c, p, out, ahead),
                Self::Float16(p) if T::MEETS_HALF => accumulate(isa, how, size, c, p, out, ahead),
                _ => unreachable!("float64 goes with itself alone"),
            }
        }
    }

    /// [`accumulate`] of a factor's rows into these.
    ///
    /// # Safety
    /// As [`accumulate`].
    unsafe fn add(self, isa: Isa, size: (usize, usize, usize), c: Coefficients<T>, p: Rows<T>, ahead: Ahead) {
        let how = (order::<T>(size.1, size.2), Sums::Go);
        // SAFETY: as this function asks.
        unsafe {
            match self {
                Self::Own(out) => accumulate(isa, how, size, c, p, out, ahead),
                Self::Bfloat16(out) if T::MEETS_HALF => accumulate(isa, how, size, c, p, out, ahead),
                Self::Float16(out) if T::MEETS_HALF => accumulate(isa, how, size, c, p, out, ahead),
                _ => unreachable!("float64 goes with itself alone"),
            }
        }
    }
}

/// A pass in its compute type: the shares made ready, and where the workspace is.
struct Run<'a, T> {
    cpu: &'a Host,
    pass: &'a Pass<'a>,
    geometries: arrayvec::ArrayVec<&'a Geometry, { crate::adapter::MAX_GROUP }>,
    layout: Layout<T>,
    shares: arrayvec::ArrayVec<Share<T>, { crate::adapter::MAX_GROUP }>,
    masks: arrayvec::ArrayVec<Option<(Dropout, u32)>, { crate::adapter::MAX_GROUP }>,
    parallel: bool,
    /// Whether blocks are asked for ahead.
    asks: bool,
}

// SAFETY: what is shared is read only; tasks write disjoint rows, chunks and scratches.
unsafe impl<T> Sync for Run<'_, T> {}

impl<'a, T: Real> Run<'a, T> {
    /// # Safety
    /// The pass was checked against the geometries, and its workspace is large enough.
    unsafe fn new(cpu: &'a Host, pass: &'a Pass<'a>) -> Result<Self> {
        let geometries: arrayvec::ArrayVec<&Geometry, _> = pass.calls.iter().map(|c| c.geometry).collect();
        let layout = Layout::new(pass.workspace.data, &geometries, pass.tokens, cpu.team.threads())
            .ok_or_else(|| Error::argument("tokens", pass.tokens, "fewer: the workspace overflows memory"))?;
        let mut arena = Arena::new(pass.workspace.data);
        let asks = geometries
            .iter()
            .all(|g| BLOCK * g.input.local.max(g.output.local) * g.activation_dtype.size() <= MOST_AHEAD);
        let mut run = Self {
            cpu,
            pass,
            geometries,
            layout,
            shares: arrayvec::ArrayVec::new(),
            masks: arrayvec::ArrayVec::new(),
            parallel: false,
            asks,
        };
        let mut factors = 0;
        for call in pass.calls {
            let mut share = Share::new(&mut arena, call.geometry);
            // SAFETY: as this function asks.
            unsafe { share.list(call) };
            factors += share.live * (call.geometry.input.local + call.geometry.output.local);
            run.shares.push(share);
            run.masks.push(call.dropout.map(|place| {
                // SAFETY: checked addresses of one u64 each; the token was checked to fit 32 bits.
                let (seed, offset) = unsafe { (*pointer::<u64>(place.seed), *pointer::<u64>(place.offset)) };
                (Dropout::new(seed, offset, call.geometry.dropout), place.token0 as u32)
            }));
        }
        run.parallel = factors * pass.tokens > SERIAL_WORK;
        let parallel = run.parallel && factors > SERIAL_FACTORS;
        let packed = if pass.tokens > 0 { 2 * pass.calls.len() } else { 0 };
        cpu.team.run(packed, parallel, "workspace is", |task, _| {
            // SAFETY: as this function asks; each share has memory of its own, for either factor.
            unsafe { run.pack(task) };
        })?;
        Ok(run)
    }

    /// # Safety
    /// As [`Run::new`]; one factor of one share is this task's.
    unsafe fn pack(&self, task: usize) {
        let (share, call) = (&self.shares[task / 2], &self.pass.calls[task / 2]);
        // SAFETY: as this function asks.
        unsafe {
            match task % 2 {
                0 => share.pack_a(call),
                _ => share.pack_b(call),
            }
        }
    }

    /// m rows of a matrix that are needed soon.
    fn ahead(&self, matrix: Option<&Matrix>, first: usize, m: usize) -> Ahead {
        let Some(matrix) = matrix.filter(|_| self.asks) else { return Ahead::NOTHING };
        let [columns, stride] = [matrix.columns, matrix.row_stride].map(|n| n * matrix.dtype.size());
        Ahead::new(pointer(row_of(matrix, first)), m, columns, stride)
    }

    /// The input of adapter i for a block: x itself, or its dropped-out copy.
    ///
    /// # Safety
    /// The matrix has m rows from `first` on, and the scratch is this worker's.
    unsafe fn input(&self, i: usize, (first, m): (usize, usize), x: &Matrix, scratch: &Scratch<T>) -> Lines<T> {
        let Some((dropout, token0)) = &self.masks[i] else { return Lines::of(x, first) };
        let share = &self.geometries[i].input;
        let scale = T::from_f64(dropout.keep_scale);
        let rows = Rows::new(scratch.dropped.data, share.local);
        for t in 0..m {
            let row = rows.from(t).data;
            // SAFETY: rows of as many columns.
            unsafe { load(x.dtype, row_of(x, first + t), share.local, row) };
            dropout.for_each(token0 + (first + t) as u32, share.begin, share.local, |c, stays| {
                // SAFETY: column c of the row.
                unsafe { *row.add(c) = if stays { *row.add(c) * scale } else { T::zero() } };
            });
        }
        Lines::Own(rows)
    }

    /// `out = values * factors * scaling`, for the first `columns` of each row.
    ///
    /// # Safety
    /// m rows of both.
    unsafe fn scale((m, columns): (usize, usize), values: Rows<T>, factors: *const T, scaling: T, out: Rows<T>) {
        for t in 0..m {
            for k in 0..columns {
                // SAFETY: as this function asks.
                unsafe {
                    *out.data.add(t * out.stride + k) =
                        *values.data.add(t * values.stride + k) * *factors.add(k) * scaling;
                }
            }
        }
    }

    /// # Safety
    /// As [`Run::new`]; the scratch is this worker's.
    unsafe fn forward_block(&self, Block { first, m, next }: Block, scratch: &Scratch<T>) {
        let (pass, isa) = (self.pass, self.cpu.isa);
        // SAFETY: everything was checked; rows `first..first + m` are this task's.
        unsafe {
            for (i, call) in pass.calls.iter().enumerate() {
                let share = &self.shares[i];
                let h = Rows::new(scratch.h.data, share.live);
                let saved = call.h.map(|h| pointer::<T>(h).add(first * share.rank));
                let output = call.output.as_ref().filter(|_| pass.stages.expand && share.active > 0);
                match (&pass.x, saved) {
                    (Some(x), saved) if saved.is_some() || share.active > 0 => {
                        let columns = if saved.is_some() { share.live } else { share.active };
                        let size = (m, columns, call.geometry.input.local);
                        let y = self.ahead(output, first, m);
                        self.input(i, (first, m), x, scratch).dot(isa, size, share.a, h, y);
                        if let Some(saved) = saved {
                            share.scatter(m, h, saved);
                        }
                    }
                    (None, Some(saved)) => share.gather(m, saved, h),
                    _ => {}
                }
                if let Some(y) = output {
                    let scaled = Rows::new(scratch.scaled.data, share.active);
                    Self::scale((m, share.active), h, share.e, T::from_f64(call.scaling), scaled);
                    let c = Coefficients { data: scaled.data, row: scaled.stride, column: 1 };
                    let x = self.ahead(pass.x.as_ref().filter(|_| i + 1 == pass.calls.len()), first + m, next);
                    Lines::of(y, first).add(isa, (m, share.active, y.columns), c, share.bt, x);
                }
            }
        }
    }

    /// # Safety
    /// As [`Run::new`]; chunk and scratch are this worker's.
    unsafe fn backward_chunk(&self, chunk: usize, dx: Option<&Matrix>, scratch: &Scratch<T>) {
        let begin = chunk * self.layout.chunk;
        let end = (begin + self.layout.chunk).min(self.pass.tokens);
        let partials: arrayvec::ArrayVec<Partial<T>, { crate::adapter::MAX_GROUP }> =
            self.layout.partials(chunk, self.geometries.iter().copied()).collect();
        // SAFETY: the chunk's own sums, as large as the geometries say; rows of the chunk are this task's.
        unsafe {
            for (partial, share) in partials.iter().zip(&self.shares) {
                partial.e.write_bytes(0, share.live);
            }
            for block in blocks(begin..end) {
                let sums = if block.first == begin { Sums::Begin } else { Sums::Go };
                self.backward_block(block, dx, (&partials, sums), scratch);
            }
        }
    }

    /// # Safety
    /// As [`Run::backward_chunk`].
    unsafe fn backward_block(
        &self,
        Block { first, m, next }: Block,
        dx: Option<&Matrix>,
        (partials, sums): (&[Partial<T>], Sums),
        scratch: &Scratch<T>,
    ) {
        let (pass, isa) = (self.pass, self.cpu.isa);
        // SAFETY: everything was checked; rows `first..first + m` are this task's.
        unsafe {
            let dx_lines = dx.map(|dx| self.begin_dx(dx, (first, m), scratch));
            for (i, call) in pass.calls.iter().enumerate() {
                let (share, partial) = (&self.shares[i], &partials[i]);
                if share.live == 0 {
                    if let Some(g) = call.g.filter(|_| pass.stages.project) {
                        share.scatter(m, scratch.g, pointer::<T>(g).add(first * share.rank));
                    }
                    continue;
                }
                let (input, output) = (call.geometry.input.local, call.geometry.output.local);
                let [h, g] = [scratch.h, scratch.g].map(|rows| Rows::new(rows.data, share.live));
                let scaled = Rows::new(scratch.scaled.data, share.active);
                let across = Coefficients { data: scaled.data, row: 1, column: scaled.stride };
                let scaling = T::from_f64(call.scaling);
                let masked = pass.x.as_ref().map(|x| self.input(i, (first, m), x, scratch));
                match (call.h, masked) {
                    (Some(saved), _) => share.gather(m, pointer::<T>(saved).add(first * share.rank), h),
                    (None, Some(x)) => x.dot(isa, (m, share.live, input), share.a, h, Ahead::NOTHING),
                    (None, None) => {}
                }
                let saved_g = call.g.map(|g| pointer::<T>(g).add(first * share.rank));
                if let Some(dy) = call.output.as_ref().filter(|_| pass.stages.project) {
                    let dy = Lines::of(dy, first);
                    let x = self.ahead(pass.x.as_ref().filter(|_| pass.stages.expand), first, m);
                    dy.dot(isa, (m, share.live, output), share.bt, g, x);
                    for t in 0..m {
                        (0..share.live)
                            .for_each(|k| *g.data.add(t * g.stride + k) = *g.data.add(t * g.stride + k) * scaling);
                    }
                    if let Some(saved) = saved_g {
                        share.scatter(m, g, saved);
                    }
                    Self::scale((m, share.active), h, share.e, scaling, scaled);
                    dy.add_to(isa, sums, (share.active, m, output), across, partial.bt, Ahead::NOTHING);
                } else if let Some(saved) = saved_g {
                    share.gather(m, saved, g);
                }
                let Some(x) = masked.filter(|_| pass.stages.expand) else { continue };
                for t in 0..m {
                    for k in 0..share.live {
                        let (g, h) = (*g.data.add(t * g.stride + k), *h.data.add(t * h.stride + k));
                        *partial.e.add(k) += Into::<f64>::into(g) * Into::<f64>::into(h);
                    }
                }
                Self::scale((m, share.active), g, share.e, T::one(), scaled);
                x.add_to(isa, sums, (share.active, m, input), across, partial.a, self.ahead(dx, first, m));
                if let Some(dx) = dx_lines {
                    let along = Coefficients { data: scaled.data, row: scaled.stride, column: 1 };
                    let dy = match pass.calls.get(i + 1) {
                        Some(call) => self.ahead(call.output.as_ref(), first, m),
                        None => self.ahead(pass.calls[0].output.as_ref(), first + m, next),
                    };
                    self.add_to_dx(i, (first, m), along, dx, scratch, dy);
                }
            }
            if let (Some(dx), Some(Lines::Own(rows))) = (dx, dx_lines)
                && !is_own::<T>(dx.dtype)
            {
                for t in 0..m {
                    store(dx.dtype, rows.from(t).data, dx.columns, row_of(dx, first + t));
                }
            }
        }
    }

    /// Where a block's share of dx is added up: where it is, or in the compute type, so that it is rounded once.
    ///
    /// # Safety
    /// As [`Run::backward_chunk`].
    unsafe fn begin_dx(&self, dx: &Matrix, (first, m): (usize, usize), scratch: &Scratch<T>) -> Lines<T> {
        if is_own::<T>(dx.dtype) || (self.pass.calls.len() == 1 && self.masks[0].is_none()) {
            return Lines::of(dx, first);
        }
        let rows = Rows::new(scratch.dx.data, dx.columns);
        // SAFETY: rows of as many columns.
        (0..m).for_each(|t| unsafe { load(dx.dtype, row_of(dx, first + t), dx.columns, rows.from(t).data) });
        Lines::Own(rows)
    }

    /// # Safety
    /// As [`Run::backward_chunk`].
    unsafe fn add_to_dx(
        &self,
        i: usize,
        (first, m): (usize, usize),
        c: Coefficients<T>,
        dx: Lines<T>,
        scratch: &Scratch<T>,
        ahead: Ahead,
    ) {
        let (share, input) = (&self.shares[i], &self.geometries[i].input);
        let product = (m, share.active, input.local);
        // SAFETY: m rows of dx, and of the worker's scratch.
        unsafe {
            let (Some((dropout, token0)), Lines::Own(dx)) = (&self.masks[i], dx) else {
                return dx.add(self.cpu.isa, product, c, share.a, ahead);
            };
            let raw = Rows::new(scratch.masked.data, input.local);
            let how = (order::<T>(share.active, input.local), Sums::Begin);
            accumulate(self.cpu.isa, how, product, c, share.a, raw, ahead);
            let scale = T::from_f64(dropout.keep_scale);
            for t in 0..m {
                let (from, to) = (raw.from(t).data, dx.from(t).data);
                dropout.for_each(token0 + (first + t) as u32, input.begin, input.local, |c, stays| {
                    if stays {
                        *to.add(c) += *from.add(c) * scale;
                    }
                });
            }
        }
    }

    /// The first chunk's sums of adapter i; nothing where there is no token.
    fn total(&self, i: usize) -> Option<Partial<T>> {
        self.sums(i, 0).filter(|_| self.layout.chunks > 0)
    }

    /// The sums of the chunks after the first.
    fn others(&self, i: usize) -> arrayvec::ArrayVec<Partial<T>, MOST_CHUNKS> {
        (1..self.layout.chunks).filter_map(|chunk| self.sums(i, chunk)).collect()
    }

    fn sums(&self, i: usize, chunk: usize) -> Option<Partial<T>> {
        self.layout.partials(chunk, self.geometries[..=i].iter().copied()).last()
    }

    /// Adds up the chunks' sums of the gradients of one adapter's A and E, in order, and hands the totals to the caller.
    ///
    /// # Safety
    /// As [`Run::new`]; the chunks are done, and these gradients are this task's.
    unsafe fn reduce_a(&self, i: usize, grads: &Triplets, accumulate: bool) {
        let (share, total, (a, e)) = (&self.shares[i], self.total(i), (&grads.a, &grads.e));
        let zeros = [T::default(); PIECE];
        // SAFETY: everything was checked; the sums are as large as the geometry says.
        unsafe {
            if let Some(total) = &total {
                let others = self.others(i);
                add(share.live, others.iter().map(|partial| partial.e), total.e);
                add(share.active * total.a.stride, others.iter().map(|partial| partial.a.data), total.a.data);
            }
            for j in 0..share.rank {
                let row = share.place(j, share.active).zip(total.as_ref()).map(|(k, total)| total.a.from(k).data);
                for begin in (0..a.columns).step_by(PIECE) {
                    let to = row_of(a, j).offset(begin * a.dtype.size());
                    let sums = row.map_or(zeros.as_ptr(), |row| row.add(begin));
                    give(PIECE.min(a.columns - begin), accumulate, a.dtype, to, sums);
                }
                let sum = share.place(j, share.live).zip(total.as_ref()).map_or(0.0, |(k, total)| *total.e.add(k));
                give(1, accumulate, e.dtype, element(e, j), &T::from_f64(sum));
            }
        }
    }

    /// As [`Run::reduce_a`], for B.
    ///
    /// # Safety
    /// As [`Run::reduce_a`].
    unsafe fn reduce_b(&self, i: usize, grads: &Triplets, accumulate: bool) {
        let (share, total, b) = (&self.shares[i], self.total(i), &grads.b);
        let zeros = [T::default(); TRANSPOSED];
        // SAFETY: everything was checked; the sums are as large as the geometry says.
        unsafe {
            if let Some(total) = &total {
                let others = self.others(i);
                add(share.active * total.bt.stride, others.iter().map(|partial| partial.bt.data), total.bt.data);
            }
            for first in (0..b.rows).step_by(TRANSPOSED) {
                let n = TRANSPOSED.min(b.rows - first);
                let column = |place: Option<usize>| match place.zip(total.as_ref()) {
                    Some((k, total)) => total.bt.from(k).data.add(first),
                    None => zeros.as_ptr(),
                };
                if is_own::<T>(b.dtype) {
                    for j in (0..share.rank).step_by(SIDE) {
                        let to = Rows::new(pointer::<T>(row_of(b, first)).add(j), b.row_stride);
                        let from = share.places_of(j, share.active).map(column);
                        rows_to_columns(n, &from[..SIDE.min(share.rank - j)], to, accumulate);
                    }
                    continue;
                }
                for begin in (0..share.rank).step_by(PIECE) {
                    let count = PIECE.min(share.rank - begin);
                    let mut columns = [zeros.as_ptr(); PIECE];
                    for (j, at) in columns[..count].iter_mut().enumerate() {
                        *at = column(share.place(begin + j, share.active));
                    }
                    let mut sums = [T::default(); PIECE];
                    for o in 0..n {
                        sums[..count].iter_mut().zip(&columns).for_each(|(sum, column)| *sum = *column.add(o));
                        let to = row_of(b, first + o).offset(begin * b.dtype.size());
                        give(count, accumulate, b.dtype, to, sums.as_ptr());
                    }
                }
            }
        }
    }
}

/// Rows and columns of a block that is transposed in registers.
const SIDE: usize = 4;

/// Copies columns to rows.
///
/// # Safety
/// n rows of [`SIDE`] elements can be read, and n elements of each row written; they do not overlap.
unsafe fn columns_to_rows<T: Real>(n: usize, from: Rows<T>, to: [*mut T; SIDE]) {
    // SAFETY: as this function asks.
    unsafe {
        for o in (0..n - n % SIDE).step_by(SIDE) {
            let block = std::array::from_fn(|i| {
                prefetch(from.from(o + i + TRANSPOSED).data);
                from.from(o + i).data.cast::<[T; SIDE]>().read_unaligned()
            });
            for (to, values) in to.iter().zip(T::transpose(block)) {
                to.add(o).cast::<[T; SIDE]>().write_unaligned(values);
            }
        }
        for o in n - n % SIDE..n {
            (0..SIDE).for_each(|k| *to[k].add(o) = *from.from(o).data.add(k));
        }
    }
}

/// The reverse, of up to [`SIDE`] rows; may add to the columns.
///
/// # Safety
/// n elements of each row can be read, and n rows of as many elements read and written; they do not overlap.
unsafe fn rows_to_columns<T: Real>(n: usize, from: &[*const T], to: Rows<T>, accumulate: bool) {
    let mut begin = 0;
    // SAFETY: as this function asks.
    unsafe {
        if let Ok(four) = <[*const T; SIDE]>::try_from(from) {
            begin = n - n % SIDE;
            for o in (0..begin).step_by(SIDE) {
                let block = four.map(|from| from.add(o).cast::<[T; SIDE]>().read_unaligned());
                for (i, sums) in T::transpose(block).into_iter().enumerate() {
                    let to = to.from(o + i).data.cast::<[T; SIDE]>();
                    let there = if accumulate { to.read_unaligned() } else { [T::zero(); SIDE] };
                    to.write_unaligned(std::array::from_fn(|k| there[k] + sums[k]));
                }
            }
        }
        for o in begin..n {
            for (k, from) in from.iter().enumerate() {
                let (sum, to) = (*from.add(o), to.from(o).data.add(k));
                *to = if accumulate { *to + sum } else { sum };
            }
        }
    }
}

/// Writes up to [`PIECE`] elements of a gradient, or adds to them.
///
/// # Safety
/// n sums can be read, and n elements of `dtype` read and written; they do not overlap.
unsafe fn give<T: Real>(n: usize, accumulate: bool, dtype: Dtype, to: Address, sums: *const T) {
    // SAFETY: as this function asks.
    unsafe {
        if !accumulate {
            return store(dtype, sums, n, to);
        }
        let mut there = [T::default(); PIECE];
        load(dtype, to, n, there.as_mut_ptr());
        add(n, std::iter::once(sums.cast_mut()), there.as_mut_ptr());
        store(dtype, there.as_ptr(), n, to);
    }
}

/// Adds arrays, in their order.
///
/// # Safety
/// n elements of each can be read, and read and written at `to`; they do not overlap.
unsafe fn add<T: Copy + std::ops::AddAssign>(n: usize, arrays: impl Iterator<Item = *mut T> + Clone, to: *mut T) {
    for begin in (0..n).step_by(PIECE) {
        for from in arrays.clone() {
            for i in begin..n.min(begin + PIECE) {
                // SAFETY: as this function asks.
                unsafe { *to.add(i) += *from.add(i) };
            }
        }
    }
}

/// # Safety
/// The pass was checked.
unsafe fn forward_as<T: Real>(cpu: &Host, pass: &Pass) -> Result<()> {
    // SAFETY: as this function asks.
    let run = unsafe { Run::<T>::new(cpu, pass) }?;
    let size = forward_tokens(pass.tokens, cpu.team.threads());
    cpu.team.run(pass.tokens.div_ceil(size), run.parallel, "y and h are", |task, worker| {
        let scratch = run.layout.scratch(worker, &run.geometries);
        for block in blocks(task * size..pass.tokens.min((task + 1) * size)) {
            // SAFETY: the worker's scratch; each block is in one task.
            unsafe { run.forward_block(block, &scratch) };
        }
    })
}

/// # Safety
/// The pass was checked.
unsafe fn backward_as<T: Real>(cpu: &Host, pass: &Pass, accumulate: bool, dx: Option<&Matrix>) -> Result<()> {
    // SAFETY: as this function asks.
    let run = unsafe { Run::<T>::new(cpu, pass) }?;
    cpu.team.run(run.layout.chunks, run.parallel, "grads, g and dx are", |chunk, worker| {
        let scratch = run.layout.scratch(worker, &run.geometries);
        // SAFETY: the worker's scratch; each chunk is one task.
        unsafe { run.backward_chunk(chunk, dx, &scratch) };
    })?;
    cpu.team.run(2 * pass.calls.len(), run.parallel, "grads are", |task, _| {
        let Some(grads) = &pass.calls[task / 2].grads else { return };
        // SAFETY: all chunks are done; an adapter's A and E are one task, its B another.
        unsafe {
            match task % 2 {
                0 if pass.stages.expand => run.reduce_a(task / 2, grads, accumulate),
                1 if pass.stages.project => run.reduce_b(task / 2, grads, accumulate),
                _ => {}
            }
        }
    })
}

/// # Safety
/// The pass was checked.
pub(super) unsafe fn forward(cpu: &Host, pass: &Pass) -> Result<()> {
    if pass.tokens == 0 {
        // Nothing is written, so that no factor need be made ready.
        return Ok(());
    }
    // SAFETY: as this function asks.
    unsafe {
        match pass.calls[0].geometry.compute_dtype() {
            Dtype::Float64 => forward_as::<f64>(cpu, pass),
            _ => forward_as::<f32>(cpu, pass),
        }
    }
}

/// # Safety
/// The pass was checked.
pub(super) unsafe fn backward(cpu: &Host, pass: &Pass, accumulate: bool, dx: Option<&Matrix>) -> Result<()> {
    // SAFETY: as this function asks.
    unsafe {
        match pass.calls[0].geometry.compute_dtype() {
            Dtype::Float64 => backward_as::<f64>(cpu, pass, accumulate, dx),
            _ => backward_as::<f32>(cpu, pass, accumulate, dx),
        }
    }
}
