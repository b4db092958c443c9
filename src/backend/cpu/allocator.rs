//! The allocator's buffers on the host: norm, update, scores, selection, orthogonality.
//!
//! Work is cut into pieces that depend on the shapes alone, and what is summed over pieces is summed in order.

use super::Host;
use super::element::{load, pointer, store, write};
use super::kernels::{Coefficients, Nothing, Order, Rows, Sums, accumulate, dot};
use super::simd::{Isa, Real};
use super::update::{Update, sum_of_squares};
use crate::adapter::ALIGNMENT;
use crate::allocator::binding::Slice;
use crate::allocator::compaction::Compacted;
use crate::allocator::importance::{Smoothing, finite, score};
use crate::allocator::panels::Panel;
use crate::allocator::state::{HAS_PATTERN, Header, IS_FINAL, MAGIC, State, digest};
use crate::allocator::{Binding, Factor, Model, StepSource, selection};
use crate::backend::BoundAllocator;
use crate::error::{Error, Result, reserve};
use crate::optimizer::AdamW;
use crate::regularizer::penalty;
use crate::tensor::{Address, Dtype, Stream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Elements of a task that goes over slices.
const CHUNK: usize = 1 << 14;
/// Columns of a factor that are multiplied at a time; a float32 sum over them is then added in float64.
const PANEL: usize = 256;
/// Elements below which waking other threads costs more than it gains.
const SERIAL_ELEMENTS: usize = 1 << 15;

/// Where the parts of the workspace lie, in bytes from its beginning.
struct Layout {
    scores: usize,
    order: usize,
    /// Sums of squares, a chunk each.
    squares: usize,
    /// Distances of the factors' Gram matrices from the identity.
    norms: usize,
    /// From here on, a worker each: a panel of P, one of the gradient, a product of two panels, a Gram matrix, and what P
    /// is multiplied by to give the penalty's gradient.
    scratch: usize,
    scratch_bytes: usize,
    bytes: usize,
}

impl Layout {
    fn new(model: &Model, n_slices: usize, threads: usize) -> Option<Self> {
        let mut next = 0usize;
        let mut take = |count: usize| -> Option<usize> {
            let begin = next;
            next = count.checked_mul(8)?.checked_next_multiple_of(ALIGNMENT)?.checked_add(begin)?;
            Some(begin)
        };
        let elements = model.geometries.iter().try_fold(0usize, |sum, g| {
            g.rank.checked_mul(g.input.whole.checked_add(g.output.whole)?.checked_add(1)?)?.checked_add(sum)
        })?;
        let rank = model.geometries.iter().map(|g| g.rank).max().unwrap_or(0);
        let scores = take(model.triplets())?;
        let order = take(model.triplets())?;
        let squares = take((elements / CHUNK).checked_add(n_slices)?)?;
        let norms = take(model.geometries.len().checked_mul(2)?)?;
        let scratch = take(0)?;
        let square = rank.checked_mul(rank)?;
        take(rank.checked_mul(PANEL)?.checked_add(square)?.checked_mul(2)?.checked_add(square)?)?;
        let scratch_bytes = next - scratch;
        let bytes = scratch_bytes.checked_mul(threads)?.checked_add(scratch)?;
        isize::try_from(bytes).ok()?;
        Some(Self { scores, order, squares, norms, scratch, scratch_bytes, bytes })
    }
}

/// Bytes of workspace.
pub(super) fn workspace(model: &Model, n_slices: usize, threads: usize) -> Result<usize> {
    Layout::new(model, n_slices, threads)
        .map(|l| l.bytes)
        .ok_or_else(|| Error::argument("n_slices", n_slices, "fewer: the workspace overflows memory"))
}

/// A run of elements of a slice: one task.
struct Chunk {
    slice: usize,
    begin: usize,
    end: usize,
}

/// A worker's memory for Gram matrices and the penalty.
struct Scratch<T> {
    /// A panel of P.
    p: *mut T,
    /// A panel of the gradient.
    g: *mut T,
    /// rank times rank.
    product: Rows<T>,
    /// rank times rank.
    gram: *mut f64,
    /// rank times rank.
    coefficients: *mut f64,
}

/// Where an array's share of a panel begins, and how many elements its rows are apart: A's rows, or those of B.
#[derive(Clone, Copy)]
struct Place {
    begin: Address,
    apart: usize,
}

/// Where a panel's P and its gradient lie; None: not at equal distances, or not of the type that they are computed in.
#[derive(Clone, Copy)]
struct Places {
    p: Option<Place>,
    g: Option<Place>,
}

struct CpuAllocator {
    host: Arc<Host>,
    binding: Binding,
    layout: Layout,
    chunks: Vec<Chunk>,
    /// The panels of each adapter's A, then of its B.
    factors: Vec<Range<usize>>,
    /// One for each panel.
    places: Vec<Places>,
    /// First slice of each adapter, and one past the last.
    first_slice: Vec<usize>,
    /// Whether there is enough to do for several threads.
    parallel: bool,
}

/// Takes an allocator's buffers.
///
/// # Safety
/// The binding was checked, and its addresses stay valid as long as it is used.
pub(super) unsafe fn bind(host: Arc<Host>, binding: Binding) -> Result<Box<dyn BoundAllocator>> {
    let model = &binding.model;
    let layout = Layout::new(model, binding.slices.len(), host.team.threads())
        .ok_or_else(|| Error::argument("slices", binding.slices.len(), "fewer: the workspace overflows memory"))?;
    let n_chunks = binding.slices.iter().map(|s| s.len().div_ceil(CHUNK)).sum();
    let mut chunks = reserve(n_chunks, "chunks")?;
    for (i, slice) in binding.slices.iter().enumerate() {
        for begin in (0..slice.len()).step_by(CHUNK) {
            chunks.push(Chunk { slice: i, begin, end: (begin + CHUNK).min(slice.len()) });
        }
    }
    let panels = binding.panels().unwrap_or_default();
    let mut factors = reserve(2 * model.geometries.len(), "factors")?;
    for adapter in 0..model.geometries.len() {
        for factor in [Factor::A, Factor::B] {
            let end = |key| panels.partition_point(|p| (p.adapter, p.factor) <= key);
            let begin = panels.partition_point(|p| (p.adapter, p.factor) < (adapter, factor));
            factors.push(begin..end((adapter, factor)));
        }
    }
    let mut places = reserve(panels.len(), "panels")?;
    for panel in panels {
        let dtype = model.geometries[panel.adapter].compute_dtype();
        let place = |array: fn(&Slice) -> (Address, Dtype)| {
            let (slice, first) = *panel.rows.first()?;
            let (base, stored) = array(&binding.slices[slice]);
            let apart = match panel.factor {
                Factor::B => model.geometries[panel.adapter].rank,
                _ => panel.rows.get(1).map_or(panel.columns, |row| row.1.saturating_sub(first)),
            };
            let regular = panel.rows.iter().enumerate().all(|(i, row)| *row == (slice, first + i * apart));
            (regular && stored == dtype).then(|| Place { begin: base.offset(first * dtype.size()), apart })
        };
        places.push(Places { p: place(|s| s.p), g: place(|s| s.g) });
    }
    let adapters = model.geometries.len();
    let mut first_slice = reserve(adapters + 1, "adapters")?;
    first_slice.extend((0..=adapters).map(|a| binding.slices.partition_point(|s| s.adapter < a)));
    let parallel = binding.slices.iter().map(Slice::len).sum::<usize>() > SERIAL_ELEMENTS;
    let mut allocator = CpuAllocator { host, binding, layout, chunks, factors, places, first_slice, parallel };
    allocator.begin()?;
    Ok(Box::new(allocator))
}

impl CpuAllocator {
    /// Goes on with the state that is there, or makes zeros a fresh one.
    fn begin(&mut self) -> Result<()> {
        let digest = self.binding.model.digest;
        let bytes = self.binding.model.layout.bytes;
        let header = self.header();
        if header.magic == MAGIC && header.model == digest {
            return Ok(());
        }
        // SAFETY: the state has `bytes` bytes, and this call has it alone.
        let zeros = unsafe { std::slice::from_raw_parts(pointer::<u8>(self.binding.state), bytes) };
        if zeros.iter().any(|b| *b != 0) {
            let found = if header.magic == MAGIC { "the state of other adapters" } else { "bytes that are no state" };
            return Err(Error::argument("state", found, "zeros, or what an earlier bind of these adapters left"));
        }
        self.fresh();
        Ok(())
    }

    fn fresh(&mut self) {
        let (model, flags) = (self.binding.model.digest, self.binding.model.fresh_flags());
        *self.header_mut() = Header { magic: MAGIC, model, flags, ..Header::default() };
        self.clocks_mut().fill(0);
        self.pattern_mut().fill(1);
    }

    fn header(&self) -> Header {
        // SAFETY: the state begins with a header; changes need this object alone.
        unsafe { *pointer::<Header>(self.binding.state) }
    }

    fn header_mut(&mut self) -> &mut Header {
        // SAFETY: as above; bound memory is the allocator's own.
        unsafe { &mut *pointer::<Header>(self.binding.state) }
    }

    fn clocks(&self) -> &[i64] {
        let model = &self.binding.model;
        let at = self.binding.state.offset(model.layout.clocks);
        // SAFETY: the state holds as many clocks as there are adapters.
        unsafe { std::slice::from_raw_parts(pointer(at), model.geometries.len()) }
    }

    fn clocks_mut(&mut self) -> &mut [i64] {
        let model = &self.binding.model;
        let at = self.binding.state.offset(model.layout.clocks);
        // SAFETY: as above, alone.
        unsafe { std::slice::from_raw_parts_mut(pointer(at), model.geometries.len()) }
    }

    fn pattern(&self) -> &[u8] {
        let model = &self.binding.model;
        let at = self.binding.state.offset(model.layout.pattern);
        // SAFETY: the state holds a byte for each triplet.
        unsafe { std::slice::from_raw_parts(pointer(at), model.triplets()) }
    }

    fn pattern_mut(&mut self) -> &mut [u8] {
        let model = &self.binding.model;
        let at = self.binding.state.offset(model.layout.pattern);
        // SAFETY: as above, alone.
        unsafe { std::slice::from_raw_parts_mut(pointer(at), model.triplets()) }
    }

    fn at(&self, offset: usize) -> Address {
        self.binding.workspace.offset(offset)
    }

    /// Whether an adapter has a gradient this step.
    ///
    /// # Safety
    /// The address, if any, is of a byte for each adapter.
    unsafe fn has_grad(has_grad: Option<Address>, adapter: usize) -> bool {
        // SAFETY: as this function asks.
        has_grad.is_none_or(|flags| unsafe { *pointer::<u8>(flags).add(adapter) } != 0)
    }

    /// Sum of squares of all gradients that are counted, and whether all are finite.
    fn squares(&mut self, has_grad: Option<Address>, replicas: bool) -> Result<(f64, bool)> {
        let all_finite = AtomicBool::new(true);
        let squares = self.at(self.layout.squares);
        self.host.team.run(self.chunks.len(), self.parallel, "nothing is", |i, _| {
            let chunk = &self.chunks[i];
            let slice = &self.binding.slices[chunk.slice];
            // SAFETY: the caller's flags; the slice was checked; each chunk has a place of its own.
            unsafe {
                let counts = Self::has_grad(has_grad, slice.adapter) && (replicas || !slice.replica);
                let (sum, finite) =
                    if counts { sum_of_squares(self.host.isa, slice, chunk.begin, chunk.end) } else { (0.0, true) };
                *pointer::<f64>(squares).add(i) = sum;
                if !finite {
                    all_finite.store(false, Ordering::Relaxed);
                }
            }
        })?;
        // SAFETY: written above.
        let sums = unsafe { std::slice::from_raw_parts(pointer::<f64>(squares).cast_const(), self.chunks.len()) };
        Ok((sums.iter().sum(), all_finite.into_inner()))
    }

    fn write_scores(&self, to: Address) -> Result<()> {
        let model = &self.binding.model;
        self.host.team.run(model.geometries.len(), self.parallel, "scores are", |adapter, _| {
            let range = model.range(adapter);
            // SAFETY: the scores of one adapter are one task's; the slices were checked.
            unsafe {
                let scores = std::slice::from_raw_parts_mut(pointer::<f64>(to).add(range.start), range.len());
                scores.fill(0.0);
                for slice in &self.binding.slices[self.first_slice[adapter]..self.first_slice[adapter + 1]] {
                    if !slice.replica && !slice.is_empty() {
                        let geometry = &model.geometries[adapter];
                        let (input, output) = (geometry.input.whole, geometry.output.whole);
                        match slice.state_dtype {
                            Dtype::Float64 => add_scores::<f64>(self.host.isa, slice, input, output, scores),
                            _ => add_scores::<f32>(self.host.isa, slice, input, output, scores),
                        }
                    }
                }
            }
        })
    }

    /// Chooses the pattern anew.
    fn choose(&mut self, budget: i64, scores: Option<Address>) -> Result<()> {
        let from = scores.unwrap_or_else(|| self.at(self.layout.scores));
        if scores.is_none() {
            self.write_scores(from)?;
        }
        let model = Arc::clone(&self.binding.model);
        let order = pointer::<u64>(self.at(self.layout.order));
        // SAFETY: a place for each triplet in both.
        let (scores, order) = unsafe {
            (
                std::slice::from_raw_parts(pointer::<f64>(from).cast_const(), model.triplets()),
                std::slice::from_raw_parts_mut(order, model.triplets()),
            )
        };
        selection::select(&model, scores, budget, order, self.pattern_mut());
        let header = self.header_mut();
        header.flags |= HAS_PATTERN;
        header.selections += 1;
        Ok(())
    }

    /// From now on the pattern stays.
    fn fix(&mut self) -> Result<()> {
        self.clear(|slice| [Some(slice.exp_avg_ipt), Some(slice.exp_avg_unc), None, None])?;
        self.header_mut().flags |= IS_FINAL;
        Ok(())
    }

    /// Zeroes arrays of the state type.
    fn clear(&self, arrays: impl Fn(&Slice) -> [Option<Address>; 4] + Sync) -> Result<()> {
        self.host.team.run(self.chunks.len(), self.parallel, "averages and moments are", |i, _| {
            let chunk = &self.chunks[i];
            let slice = &self.binding.slices[chunk.slice];
            let size = slice.state_dtype.size();
            for array in arrays(slice).into_iter().flatten() {
                // SAFETY: the chunk is one task's, and within the array.
                unsafe {
                    pointer::<u8>(array.offset(chunk.begin * size)).write_bytes(0, (chunk.end - chunk.begin) * size);
                }
            }
        })
    }

    /// E of the triplets that are not kept becomes zero.
    fn mask(&self) {
        let (model, pattern) = (&self.binding.model, self.pattern());
        for slice in self.binding.slices.iter().filter(|s| s.factor == Factor::E) {
            let kept = &pattern[model.range(slice.adapter)][slice.begin..slice.end];
            for (i, _) in kept.iter().enumerate().filter(|(_, kept)| **kept == 0) {
                // SAFETY: element i of the slice.
                unsafe {
                    write(slice.p.1, 0.0, slice.p.0.offset(i * slice.p.1.size()));
                    if let Some((low, dtype)) = slice.p_low {
                        write(dtype, 0.0, low.offset(i * dtype.size()));
                    }
                }
            }
        }
    }

    fn write_gram(&self, to: Address) -> Result<()> {
        let panels = self.binding.panels()?;
        self.host.team.run(self.factors.len(), self.parallel, "gram is", |i, worker| {
            // SAFETY: the buffer has room for all Gram matrices; each is one task's.
            unsafe { self.write_gram_of(i, panels, self.gram_at(i, to), worker) };
        })
    }

    /// Where a factor's Gram matrix is in a buffer of all of them.
    fn gram_at(&self, factor: usize, grams: Address) -> *mut f64 {
        let model = &self.binding.model;
        let rank = model.geometries[factor / 2].rank;
        pointer::<f64>(grams).wrapping_add(model.gram_offsets[factor / 2] + factor % 2 * rank * rank)
    }

    /// # Safety
    /// The factor's Gram matrix is this task's, and the scratch the worker's.
    unsafe fn write_gram_of(&self, factor: usize, panels: &[Panel], gram: *mut f64, worker: usize) {
        let geometry = &self.binding.model.geometries[factor / 2];
        let rank = geometry.rank;
        // SAFETY: rank times rank elements.
        unsafe {
            gram.write_bytes(0, rank * rank);
            for i in self.factors[factor].clone() {
                let panel = (&panels[i], self.places[i].p);
                match geometry.compute_dtype() {
                    _ if panel.0.replica => {}
                    Dtype::Float64 => self.add_gram::<f64>(panel, rank, gram, &self.scratch(worker, rank)),
                    _ => self.add_gram::<f32>(panel, rank, gram, &self.scratch(worker, rank)),
                }
            }
            for row in 1..rank {
                (0..row).for_each(|j| *gram.add(row * rank + j) = *gram.add(j * rank + row));
            }
        }
    }

    fn scratch<T>(&self, worker: usize, rank: usize) -> Scratch<T> {
        let begin = self.at(self.layout.scratch + worker * self.layout.scratch_bytes);
        let after = |elements: usize| begin.offset(elements * size_of::<f64>());
        let panel = rank * PANEL;
        Scratch {
            p: pointer(begin),
            g: pointer(after(panel)),
            product: Rows::new(pointer(after(2 * panel)), rank),
            gram: pointer(after(2 * panel + rank * rank)),
            coefficients: pointer(after(2 * panel + 2 * rank * rank)),
        }
    }

    /// Adds a panel's products to the upper triangle of a Gram matrix.
    ///
    /// # Safety
    /// The panel was checked; matrix and scratch are this task's.
    unsafe fn add_gram<T: Real>(
        &self,
        (panel, place): (&Panel, Option<Place>),
        rank: usize,
        gram: *mut f64,
        scratch: &Scratch<T>,
    ) {
        let (isa, product) = (self.host.isa, scratch.product);
        for begin in (0..panel.columns).step_by(PANEL) {
            let n = PANEL.min(panel.columns - begin);
            // SAFETY: the panel's elements; the product has rank times rank.
            unsafe {
                let p = self.rows_of((panel, place), rank, (begin, n), |s| s.p, scratch.p);
                // Little more than the triangle, in as many rows as the kernels take together.
                let together = if panel.factor == Factor::A { 4 } else { 12 };
                for row in (0..rank).step_by(together) {
                    let (rows, columns) = (together.min(rank - row), rank - row);
                    let to = Rows::new(product.from(row).data.wrapping_add(row), rank);
                    if panel.factor == Factor::A {
                        dot(isa, (rows, columns, n), p.from(row), p.from(row), to, Nothing);
                    } else {
                        let p = Rows::new(p.data.wrapping_add(row), p.stride);
                        let c = Coefficients { data: p.data.cast_const(), row: 1, column: p.stride };
                        accumulate(isa, (Order::ByColumn, Sums::Begin), (rows, n, columns), c, p, to, Nothing);
                    }
                }
                for row in 0..rank {
                    for j in row..rank {
                        *gram.add(row * rank + j) += Into::<f64>::into(*product.data.add(row * rank + j));
                    }
                }
            }
        }
    }

    /// Adds the gradient of `scale` times a factor's distance from orthonormal rows to its gradient, from its Gram
    /// matrix; returns the distance.
    ///
    /// # Safety
    /// The factor's gradients are this task's, and the scratch the worker's.
    unsafe fn add_penalty_of(
        &self,
        factor: usize,
        panels: &[Panel],
        gram: *const f64,
        scale: f64,
        worker: usize,
    ) -> f64 {
        let geometry = &self.binding.model.geometries[factor / 2];
        let (rank, square) = (geometry.rank, geometry.rank * geometry.rank);
        // SAFETY: rank times rank elements of both.
        unsafe {
            let gram = std::slice::from_raw_parts(gram, square);
            let coefficients = self.scratch::<f64>(worker, rank).coefficients;
            let norm = penalty(gram, rank, scale, std::slice::from_raw_parts_mut(coefficients, square));
            for i in self.factors[factor].clone() {
                let panel = (&panels[i], self.places[i]);
                match geometry.compute_dtype() {
                    Dtype::Float64 => self.add_penalty::<f64>(panel, rank, &self.scratch(worker, rank)),
                    _ => self.add_penalty::<f32>(panel, rank, &self.scratch(worker, rank)),
                }
            }
            norm
        }
    }

    /// Adds what the coefficients in the scratch make of P to the gradients of a panel.
    ///
    /// # Safety
    /// The panel was checked; its gradients and the scratch are this task's.
    unsafe fn add_penalty<T: Real>(&self, (panel, places): (&Panel, Places), rank: usize, scratch: &Scratch<T>) {
        let (isa, c) = (self.host.isa, scratch.product);
        // SAFETY: rank times rank coefficients; the panel's elements.
        unsafe {
            (0..rank * rank).for_each(|i| *c.data.add(i) = T::from_f64(*scratch.coefficients.add(i)));
            for begin in (0..panel.columns).step_by(PANEL) {
                let n = PANEL.min(panel.columns - begin);
                let p = self.rows_of((panel, places.p), rank, (begin, n), |s| s.p, scratch.p);
                let g = self.rows_of((panel, places.g), rank, (begin, n), |s| s.g, scratch.g);
                if panel.factor == Factor::A {
                    let c = Coefficients { data: c.data.cast_const(), row: rank, column: 1 };
                    accumulate(isa, (Order::ByColumn, Sums::Go), (rank, rank, n), c, p, g, Nothing);
                } else {
                    // Symmetric, so that it may stand on either side.
                    let along = Coefficients { data: p.data.cast_const(), row: p.stride, column: 1 };
                    accumulate(isa, (Order::ByRow, Sums::Go), (n, rank, rank), along, c, g, Nothing);
                }
                if g.data == scratch.g {
                    self.put_gradient(panel, rank, (begin, n), g);
                }
            }
        }
    }

    /// Some columns of P or of its gradient, rank rows of A or n rows of B: in place, or converted into the buffer.
    ///
    /// # Safety
    /// The panel was checked; the buffer has room for rank times n elements.
    unsafe fn rows_of<T: Real>(
        &self,
        (panel, place): (&Panel, Option<Place>),
        rank: usize,
        (begin, n): (usize, usize),
        array: impl Fn(&Slice) -> (Address, Dtype),
        buffer: *mut T,
    ) -> Rows<T> {
        let is_b = panel.factor == Factor::B;
        if let Some(place) = place {
            let first = if is_b { begin * place.apart } else { begin };
            return Rows::new(pointer(place.begin.offset(first * size_of::<T>())), place.apart);
        }
        if is_b {
            let (slice, first) = panel.rows[0];
            let (base, dtype) = array(&self.binding.slices[slice]);
            // SAFETY: whole rows lie without gaps.
            unsafe { load(dtype, base.offset((first + begin * rank) * dtype.size()), n * rank, buffer) };
            return Rows::new(buffer, rank);
        }
        for (row, (slice, first)) in panel.rows.iter().enumerate() {
            let (base, dtype) = array(&self.binding.slices[*slice]);
            // SAFETY: n elements of the row.
            unsafe { load(dtype, base.offset((first + begin) * dtype.size()), n, buffer.wrapping_add(row * n)) };
        }
        Rows::new(buffer, n)
    }

    /// Puts a converted panel of the gradient back.
    ///
    /// # Safety
    /// As [`CpuAllocator::rows_of`], which gave `rows`.
    unsafe fn put_gradient<T: Real>(&self, panel: &Panel, rank: usize, (begin, n): (usize, usize), rows: Rows<T>) {
        // SAFETY: the panel's elements.
        unsafe {
            if panel.factor == Factor::B {
                let (slice, first) = panel.rows[0];
                let (g, dtype) = self.binding.slices[slice].g;
                return store(dtype, rows.data, n * rank, g.offset((first + begin * rank) * dtype.size()));
            }
            for (row, (slice, first)) in panel.rows.iter().enumerate() {
                let (g, dtype) = self.binding.slices[*slice].g;
                store(dtype, rows.from(row).data, n, g.offset((first + begin) * dtype.size()));
            }
        }
    }
}

impl BoundAllocator for CpuAllocator {
    fn binding(&self) -> &Binding {
        &self.binding
    }

    fn gram(&mut self, gram: Address, _: Stream) -> Result<()> {
        self.write_gram(gram)
    }

    fn orthogonality(
        &mut self,
        gram: Option<Address>,
        weight: f64,
        factor: Option<Address>,
        value: Option<Address>,
        _: Stream,
    ) -> Result<()> {
        let adapters = self.binding.model.geometries.len();
        let norms = self.at(self.layout.norms);
        // SAFETY: a checked address of one f64.
        let factor = factor.map_or(1.0, |f| unsafe { *pointer::<f64>(f) });
        let share = weight / (2 * adapters) as f64;
        let panels = self.binding.panels()?;
        self.host.team.run(self.factors.len(), self.parallel, "gradients are", |i, worker| {
            // SAFETY: each factor's gradients, Gram matrix and norm are one task's; the scratch is the worker's.
            unsafe {
                let gram = if let Some(grams) = gram {
                    self.gram_at(i, grams)
                } else {
                    // Not far from the worker, as all of them together would be.
                    let own = self.scratch::<f64>(worker, self.binding.model.geometries[i / 2].rank).gram;
                    self.write_gram_of(i, panels, own, worker);
                    own
                };
                *pointer::<f64>(norms).add(i) = self.add_penalty_of(i, panels, gram, share * factor, worker);
            }
        })?;
        // SAFETY: a norm for each factor.
        let sum = (0..2 * adapters).map(|i| share * unsafe { *pointer::<f64>(norms).add(i) }).sum::<f64>();
        if let Some(value) = value {
            // SAFETY: a checked address of one f64.
            unsafe { *pointer::<f64>(value) = sum };
        }
        Ok(())
    }

    fn gradient_norm(
        &mut self,
        has_grad: Option<Address>,
        sum_of_squares: Address,
        found_inf: Option<Address>,
        _: Stream,
    ) -> Result<()> {
        let (sum, finite) = self.squares(has_grad, false)?;
        // SAFETY: checked addresses of one value each.
        unsafe {
            *pointer::<f64>(sum_of_squares) += sum;
            if let Some(flag) = found_inf.filter(|_| !finite) {
                *pointer::<f32>(flag) = 1.0;
            }
        }
        Ok(())
    }

    fn update(&mut self, step: &StepSource, with_adamw: bool, _: Stream) -> Result<()> {
        // SAFETY: checked addresses of one value each.
        let (t, factor, found_inf) = unsafe {
            (
                *pointer::<i64>(step.step),
                step.grad_factor.map_or(1.0, |f| *pointer::<f64>(f)),
                step.found_inf.map(|f| *pointer::<f32>(f)),
            )
        };
        let suppressed = match found_inf {
            Some(found) => found > 0.0 || found.is_nan(),
            None => !self.squares(step.has_grad, true)?.1,
        };
        let in_float32 = self.binding.slices.iter().any(|s| s.state_dtype == Dtype::Float32);
        if suppressed || !factor.is_finite() || (in_float32 && !(factor as f32).is_finite()) {
            self.header_mut().skipped += 1;
            return Ok(());
        }
        let takes_importance = t < self.binding.model.schedule.end && !self.header().is_final();
        self.host.team.run(self.chunks.len(), self.parallel, "parameters, moments and averages are", |i, _| {
            let chunk = &self.chunks[i];
            let slice = &self.binding.slices[chunk.slice];
            // SAFETY: the caller's flags; the slice was checked, also for AdamW; each chunk is one task.
            unsafe {
                let factor = Self::has_grad(step.has_grad, slice.adapter).then_some(factor);
                match slice.state_dtype {
                    Dtype::Float64 => self.update_chunk::<f64>(chunk, factor, with_adamw, takes_importance),
                    _ => self.update_chunk::<f32>(chunk, factor, with_adamw, takes_importance),
                }
            }
        })?;
        if with_adamw {
            for (adapter, clock) in self.clocks_mut().iter_mut().enumerate() {
                // SAFETY: the caller's flags.
                *clock += i64::from(unsafe { Self::has_grad(step.has_grad, adapter) });
            }
        }
        Ok(())
    }

    fn scores(&self, scores: Address, _: Stream) -> Result<()> {
        self.write_scores(scores)
    }

    fn select(&mut self, step: &StepSource, scores: Option<Address>, _: Stream) -> Result<()> {
        // SAFETY: a checked address of one i64.
        let t = unsafe { *pointer::<i64>(step.step) };
        let schedule = self.binding.model.schedule;
        let (budget, masks) = schedule.at(t);
        let reached = t >= schedule.end;
        if !self.header().is_final() {
            if masks || reached {
                self.choose(budget, scores)?;
            }
            if reached {
                self.fix()?;
            }
        }
        let header = self.header_mut();
        header.irregular += i64::from(header.steps > 0 && t <= header.last_step);
        header.steps += 1;
        header.last_step = t;
        if header.has_pattern() && (masks || header.is_final()) {
            self.mask();
        }
        Ok(())
    }

    fn finalize(&mut self, scores: Option<Address>, _: Stream) -> Result<()> {
        if !self.header().is_final() {
            self.choose(self.binding.model.schedule.target, scores)?;
            self.fix()?;
            self.mask();
        }
        Ok(())
    }

    fn reset(&mut self, _: Stream) -> Result<()> {
        self.clear(|slice| {
            let (m, v) = slice.moments.unzip();
            [Some(slice.exp_avg_ipt), Some(slice.exp_avg_unc), m, v]
        })?;
        self.fresh();
        Ok(())
    }

    fn digest(&self, to: Address, _: Stream) -> Result<()> {
        // SAFETY: a checked address of one u64.
        unsafe { *pointer::<u64>(to) = digest(&self.header(), self.pattern()) };
        Ok(())
    }

    fn set_pattern(&mut self, pattern: Address, is_final: bool, _: Stream) -> Result<()> {
        let n = self.binding.model.triplets();
        if n > 0 {
            // SAFETY: a byte for each triplet, not in the allocator's state.
            let given = unsafe { std::slice::from_raw_parts(pointer::<u8>(pattern).cast_const(), n) };
            for (own, given) in self.pattern_mut().iter_mut().zip(given) {
                *own = u8::from(*given != 0);
            }
        }
        self.header_mut().flags |= HAS_PATTERN;
        if is_final {
            self.fix()?;
        }
        self.mask();
        Ok(())
    }

    fn gather(&self, pattern: &[u8], pairs: &[Compacted], _: Stream) -> Result<()> {
        let model = &self.binding.model;
        self.host.team.run(pairs.len(), self.parallel, "the compacted run's arrays are", |i, _| {
            let slice = pairs[i].from;
            let (geometry, kept) = (&model.geometries[slice.adapter], &pattern[model.range(slice.adapter)]);
            for (_, from, to, dtype) in pairs[i].arrays() {
                let (from, mut to) = (pointer::<u8>(from), pointer::<u8>(to));
                for element in (slice.begin..slice.end).filter(|e| kept[slice.factor.triplet(*e, geometry)] != 0) {
                    // SAFETY: elements of two arrays that do not overlap; the second has room for what is kept, and is
                    // one task's.
                    unsafe {
                        let size = dtype.size();
                        to.copy_from_nonoverlapping(from.add((element - slice.begin) * size), size);
                        to = to.add(size);
                    }
                }
            }
        })
    }

    fn read_sync(&self, _: Stream) -> Result<State> {
        let (clocks, pattern) = (self.clocks(), self.pattern());
        let mut state = State {
            header: self.header(),
            clocks: reserve(clocks.len(), "clocks")?,
            pattern: reserve(pattern.len(), "triplets")?,
        };
        state.clocks.extend(clocks);
        state.pattern.extend(pattern);
        Ok(state)
    }

    fn write_sync(&mut self, state: &State, _: Stream) -> Result<()> {
        *self.header_mut() = state.header;
        self.clocks_mut().copy_from_slice(&state.clocks);
        self.pattern_mut().copy_from_slice(&state.pattern);
        Ok(())
    }
}

impl CpuAllocator {
    /// # Safety
    /// The chunk is this task's, and has moments where AdamW is asked for.
    unsafe fn update_chunk<T: Real>(
        &self,
        chunk: &Chunk,
        factor: Option<f64>,
        with_adamw: bool,
        takes_importance: bool,
    ) {
        let (binding, slice) = (&self.binding, &self.binding.slices[chunk.slice]);
        let adamw = (with_adamw && factor.is_some()).then(|| {
            let hyper = &binding.hypers[slice.hyper];
            // SAFETY: checked addresses of one f64 each.
            let (lr, weight_decay) = unsafe { (*pointer::<f64>(hyper.lr), *pointer::<f64>(hyper.weight_decay)) };
            let adamw = AdamW { lr, weight_decay, beta1: hyper.beta1, beta2: hyper.beta2, eps: hyper.eps };
            adamw.coefficients(self.clocks()[slice.adapter] + 1)
        });
        let update = Update {
            adamw,
            smoothing: takes_importance.then(|| Smoothing::new(binding.model.beta1, binding.model.beta2)),
            factor: factor.map(T::from_f64),
        };
        // SAFETY: as this function asks.
        unsafe { update.apply(self.host.isa, slice, chunk.begin, chunk.end) };
    }
}

/// Adds a slice's share to the scores of its adapter.
///
/// # Safety
/// The slice was checked, and is not empty.
unsafe fn add_scores<T: Real>(isa: Isa, slice: &Slice, input: usize, output: usize, scores: &mut [f64]) {
    // SAFETY: arrays of the slice's length.
    let (ipt, unc) = unsafe {
        (
            std::slice::from_raw_parts(pointer::<T>(slice.exp_avg_ipt).cast_const(), slice.len()),
            std::slice::from_raw_parts(pointer::<T>(slice.exp_avg_unc).cast_const(), slice.len()),
        )
    };
    let rank = scores.len();
    match slice.factor {
        Factor::E => {
            for (i, total) in scores[slice.begin..slice.end].iter_mut().enumerate() {
                *total = finite(*total + score(ipt[i], unc[i]));
            }
        }
        Factor::A => {
            let mut at = slice.begin;
            while at < slice.end {
                let row = at / input;
                let end = slice.end.min((row + 1) * input);
                let piece = at - slice.begin..end - slice.begin;
                let sum = sum_of_scores(isa, &ipt[piece.clone()], &unc[piece]);
                scores[row] = finite(scores[row] + sum / input as f64);
                at = end;
            }
        }
        Factor::B => {
            let mut sums = [0.0; PANEL];
            for begin in (0..rank).step_by(PANEL) {
                let columns = begin..(begin + PANEL).min(rank);
                sums.fill(0.0);
                for row in slice.begin / rank..slice.end.div_ceil(rank) {
                    let first = slice.begin.max(row * rank + columns.start);
                    let last = slice.end.min(row * rank + columns.end);
                    if first < last {
                        let piece = first - slice.begin..last - slice.begin;
                        let to = &mut sums[first - row * rank - begin..last - row * rank - begin];
                        add_each_score(isa, &ipt[piece.clone()], &unc[piece], to);
                    }
                }
                for (total, sum) in scores[columns].iter_mut().zip(sums) {
                    *total = finite(*total + sum / output as f64);
                }
            }
        }
    }
}

fn sum_of_scores<T: Real>(isa: Isa, ipt: &[T], unc: &[T]) -> f64 {
    match isa {
        Isa::Portable => sum_of_scores_with(ipt, unc),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { sum_of_scores_avx2(ipt, unc) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn sum_of_scores_avx2<T: Real>(ipt: &[T], unc: &[T]) -> f64 {
    sum_of_scores_with(ipt, unc)
}

#[inline(always)]
fn sum_of_scores_with<T: Real>(ipt: &[T], unc: &[T]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let ((ipt, ipt_rest), (unc, unc_rest)) = (ipt.as_chunks::<LANES>(), unc.as_chunks::<LANES>());
    for (ipt, unc) in ipt.iter().zip(unc) {
        for i in 0..LANES {
            sums[i] += score(ipt[i], unc[i]);
        }
    }
    for ((sum, ipt), unc) in sums.iter_mut().zip(ipt_rest).zip(unc_rest) {
        *sum += score(*ipt, *unc);
    }
    sums.iter().sum()
}

fn add_each_score<T: Real>(isa: Isa, ipt: &[T], unc: &[T], to: &mut [f64]) {
    match isa {
        Isa::Portable => add_each_score_with(ipt, unc, to),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { add_each_score_avx2(ipt, unc, to) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_each_score_avx2<T: Real>(ipt: &[T], unc: &[T], to: &mut [f64]) {
    add_each_score_with(ipt, unc, to);
}

#[inline(always)]
fn add_each_score_with<T: Real>(ipt: &[T], unc: &[T], to: &mut [f64]) {
    for ((total, ipt), unc) in to.iter_mut().zip(ipt).zip(unc) {
        *total += score(*ipt, *unc);
    }
}
