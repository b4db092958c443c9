//! The allocator on the device: what decides a call's course lies there, so that a captured call serves every step.
//!
//! `bind` writes tables into the workspace. A call that changes the run is a sequence of launches: the first decides
//! from step, flags and state what the others do, and the last alone writes the state. Sums over blocks are kept in the
//! workspace, and added in order.

use super::BoundAllocator;
use super::device::{Arguments, Device, Kernel, Session, code, undefined};
use crate::adapter::{ALIGNMENT, Geometry};
use crate::allocator::binding::Slice;
use crate::allocator::compaction::Compacted;
use crate::allocator::schedule::Schedule;
use crate::allocator::state::{Header, MAGIC, State};
use crate::allocator::{Binding, BudgetUnit, Factor, Model, StepSource};
use crate::error::{Code, Error, Result, out_of_memory, reserve};
use crate::tensor::{Address, Dtype, Stream};
use std::sync::Arc;

/// Threads of every block.
const THREADS: usize = 256;
/// Threads that share a triplet's scores.
const WARP: usize = 32;
/// Elements of a block that goes over slices.
const CHUNK: usize = 1 << 12;
/// Elements of B whose scores one block adds up, where that is not fewer than `SCORE_ROWS` rows: not quite six reads of
/// four by each thread, since of threads only a multiple of the rank read.
const SCORE_ELEMENTS: usize = 5800;
const SCORE_ROWS: usize = 64;
/// Columns of a row of A whose scores one warp adds up.
const SCORE_COLUMNS: usize = 1 << 10;
/// Rows and columns of a block's part of a Gram matrix.
const TILE: usize = 32;
/// Elements of a factor of at most `TILE` triplets that one block takes, in about three turns.
const FACTOR_ELEMENTS: usize = 8640;
/// Columns of a larger factor that one block multiplies, for every `GRAM_RANKS` triplets.
const GRAM_COLUMNS: usize = 1 << 10;
const GRAM_RANKS: usize = 128;
/// Columns of a larger factor whose penalty's gradient one block adds.
const PENALTY_COLUMNS: usize = 128;
/// Elements of 4 bytes that are read from memory together.
const LINE: usize = 32;
/// Elements of a Gram matrix whose distance from the identity's one block adds up.
const DISTANCE_ELEMENTS: usize = 1 << 12;
/// Blocks of a multiprocessor that end a call.
const FINISH_BLOCKS: usize = 4;
/// Masks of the budget phase whose budgets are tabled.
const MAX_BUDGETS: i64 = 1 << 24;
/// Triplets of an adapter, so that elements of a block's rows of B can be counted in 32 bits.
const MAX_RANK: usize = 1 << 24;
/// Blocks of a launch, and entries of a table.
const MAX_BLOCKS: usize = i32::MAX as usize;

/// Slices whose gradients' places fit a launch.
const REBIND_SLICES: usize = 496;

const NULL: Address = Address(0);

/// The end of a call that changes the run: what of it is asked for.
mod operation {
    pub(super) const UPDATE: i32 = 1;
    pub(super) const SELECT: i32 = 2;
    pub(super) const FINALIZE: i32 = 4;
    pub(super) const RESET: i32 = 8;
    pub(super) const SET_PATTERN: i32 = 16;
}

/// Declares twins of the kernels' structures, of the same names, fields and sizes.
macro_rules! twins {
    ($($(#[$meta:meta])* $name:ident: $bytes:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            struct $name {
                $($field: $type,)*
            }

            const _: () = assert!(size_of::<$name>() == $bytes && $bytes == 0 $(+ size_of::<$type>())*);

            // SAFETY: the twin of the kernels' structure, without padding.
            unsafe impl Arguments for $name {}
        )*
    };
}

twins! {
    SliceEntry: 144 {
        p: Address,
        p_low: Address,
        g: Address,
        m: Address,
        v: Address,
        exp_avg_ipt: Address,
        exp_avg_unc: Address,
        lr: Address,
        weight_decay: Address,
        beta1: f64,
        beta2: f64,
        eps: f64,
        begin: i64,
        end: i64,
        adapter: i32,
        factor: i32,
        p_dtype: i32,
        low_dtype: i32,
        g_dtype: i32,
        state_dtype: i32,
        replica: i32,
        aligned: i32,
    }

    ChunkEntry: 16 {
        begin: i64,
        count: i32,
        slice: i32,
    }

    AdapterEntry: 104 {
        input: i64,
        output: i64,
        rank: i64,
        first_triplet: i64,
        gram: i64,
        score_rows: i64,
        score_block_of_a: i64,
        score_part_of_a: i64,
        score_block_of_b: i64,
        score_part_of_b: i64,
        slices: [i32; 4],
        is_float64: i32,
        reserved: i32,
    }

    FactorEntry: 48 {
        gram_columns: i64,
        gram_block: i64,
        gram_part: i64,
        distance_block: i64,
        penalty_columns: i64,
        penalty_block: i64,
    }

    RebindArguments: 4080 {
        slices: Address,
        first: i64,
        count: i64,
        header: Address,
        pattern: Address,
        n_triplets: i64,
        fresh: Header,
        g: [Address; REBIND_SLICES],
    }

    SquaresArguments: 48 {
        slices: Address,
        chunks: Address,
        has_grad: Address,
        sums: Address,
        not_finite: Address,
        with_replicas: i64,
    }

    NormArguments: 40 {
        sums: Address,
        not_finite: Address,
        n_chunks: i64,
        sum_of_squares: Address,
        found_inf: Address,
    }

    PlanArguments: 160 {
        plan: Address,
        header: Address,
        step: Address,
        grad_factor: Address,
        found_inf: Address,
        not_finite: Address,
        n_chunks: i64,
        budgets: Address,
        tinit: i64,
        end: i64,
        delta_t: i64,
        target: i64,
        model: u64,
        fresh_flags: i64,
        slices: Address,
        clocks: Address,
        rates: Address,
        n_slices: i64,
        operation: i32,
        with_adamw: i32,
        in_float32: i32,
        is_final: i32,
    }

    UpdateArguments: 80 {
        plan: Address,
        slices: Address,
        chunks: Address,
        rates: Address,
        has_grad: Address,
        beta1: f64,
        rest1: f64,
        beta2: f64,
        rest2: f64,
        with_adamw: i64,
    }

    ScoresArguments: 80 {
        plan: Address,
        adapters: Address,
        slices: Address,
        adapter_of: Address,
        adapter_of_block: Address,
        parts_of_a: Address,
        parts_of_b: Address,
        scores: Address,
        blocks_of_b: i64,
        n_triplets: i64,
    }

    SelectArguments: 56 {
        plan: Address,
        scores: Address,
        adapters: Address,
        adapter_of: Address,
        chosen: Address,
        n_triplets: i64,
        in_parameters: i64,
    }

    FinishArguments: 112 {
        plan: Address,
        header: Address,
        clocks: Address,
        pattern: Address,
        chosen: Address,
        given: Address,
        has_grad: Address,
        adapters: Address,
        slices: Address,
        chunks: Address,
        adapter_of: Address,
        n_chunks: i64,
        n_adapters: i64,
        n_triplets: i64,
    }

    GramArguments: 40 {
        adapters: Address,
        factors: Address,
        slices: Address,
        parts: Address,
        n_factors: i64,
    }

    DistanceArguments: 48 {
        adapters: Address,
        factors: Address,
        parts: Address,
        gram: Address,
        distances: Address,
        n_factors: i64,
    }

    PenaltyArguments: 80 {
        adapters: Address,
        factors: Address,
        slices: Address,
        gram: Address,
        distances: Address,
        factor: Address,
        value: Address,
        share: f64,
        n_factors: i64,
        n_blocks: i64,
    }

    DigestArguments: 32 {
        header: Address,
        pattern: Address,
        n_triplets: i64,
        digest: Address,
    }

    GatherArguments: 232 {
        from: [Address; 7],
        to: [Address; 7],
        size: [i64; 7],
        kept: Address,
        from_begin: i64,
        to_begin: i64,
        count: i64,
        input: i64,
        from_rank: i64,
        to_rank: i64,
        factor: i64,
    }
}

/// A plan's bytes, and those of a slice's rates.
const PLAN_BYTES: usize = 112;
const RATES_BYTES: usize = 96;

/// Where the parts of the workspace lie, in bytes from its beginning.
struct Layout {
    /// Written by `bind`, up to `plan`.
    slices: usize,
    chunks: usize,
    adapters: usize,
    factors: usize,
    adapter_of: usize,
    /// For each block that adds up scores, of B and then of A.
    adapter_of_block: usize,
    budgets: usize,
    plan: usize,
    rates: usize,
    /// Sums of squares, a chunk each, and whether its gradients are finite.
    squares: usize,
    not_finite: usize,
    scores: usize,
    /// Scores of some columns of A, added up for each row.
    score_parts_of_a: usize,
    /// Scores of some rows of B, added up for each column.
    score_parts_of_b: usize,
    chosen: usize,
    /// The triplets that a compacted run keeps.
    kept: usize,
    gram: usize,
    /// Products over some columns of each factor.
    gram_parts: usize,
    /// Parts of the factors' distances from the identity.
    distances: usize,
    bytes: usize,
}

/// Blocks and parts of what is computed over a model.
#[derive(Clone, Copy, Default)]
struct Extents {
    elements: usize,
    score_blocks_of_a: usize,
    score_parts_of_a: usize,
    score_blocks_of_b: usize,
    score_parts_of_b: usize,
    gram_blocks: usize,
    gram_parts: usize,
    distance_blocks: usize,
    penalty_blocks: usize,
}

/// How many of `n` things a block takes, about `most`: blocks take about as many, a multiple of `step`.
fn even_share(n: usize, most: usize, step: usize) -> usize {
    n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(step).max(step)
}

/// Rows of B that one block adds up.
fn score_rows(g: &Geometry) -> usize {
    even_share(g.output.whole, (SCORE_ELEMENTS / g.rank.max(1)).max(SCORE_ROWS), 4)
}

/// Columns of a factor that one block multiplies: more for larger ranks, whose sums take more memory.
fn gram_columns(rank: usize, columns: usize) -> usize {
    if rank <= TILE { factor_columns(rank, columns) } else { GRAM_COLUMNS * rank.div_ceil(GRAM_RANKS) }
}

/// Columns of a factor whose penalty's gradient one block adds.
fn penalty_columns(rank: usize, columns: usize) -> usize {
    if rank <= TILE { factor_columns(rank, columns) } else { PENALTY_COLUMNS }
}

/// Columns that a block takes of a factor of which it takes all rows.
fn factor_columns(rank: usize, columns: usize) -> usize {
    even_share(columns, FACTOR_ELEMENTS / rank.next_multiple_of(4).max(4), LINE)
}

impl Extents {
    /// Takes an adapter's score sums in; `None` where it overflows memory.
    fn add_adapter(&mut self, g: &Geometry) -> Option<()> {
        let triplet = g.input.whole.checked_add(g.output.whole)?.checked_add(1)?;
        self.elements = g.rank.checked_mul(triplet)?.checked_add(self.elements)?;
        let parts = g.rank.checked_mul(g.input.whole.div_ceil(SCORE_COLUMNS))?;
        self.score_blocks_of_a = parts.div_ceil(THREADS / WARP).checked_add(self.score_blocks_of_a)?;
        self.score_parts_of_a = parts.checked_add(self.score_parts_of_a)?;
        let blocks = g.output.whole.div_ceil(score_rows(g));
        self.score_blocks_of_b = blocks.checked_mul(g.rank.div_ceil(THREADS))?.checked_add(self.score_blocks_of_b)?;
        self.score_parts_of_b = blocks.checked_mul(g.rank)?.checked_add(self.score_parts_of_b)?;
        Some(())
    }

    /// Takes a factor's products in; `None` where it overflows memory.
    fn add_factor(&mut self, rank: usize, columns: usize) -> Option<()> {
        let (tiles, square) = (rank.div_ceil(TILE), rank.checked_mul(rank)?);
        let splits = columns.div_ceil(gram_columns(rank, columns));
        self.gram_blocks = splits.checked_mul(tiles * (tiles + 1) / 2)?.checked_add(self.gram_blocks)?;
        self.gram_parts = splits.checked_mul(square)?.checked_add(self.gram_parts)?;
        self.distance_blocks = square.div_ceil(DISTANCE_ELEMENTS).checked_add(self.distance_blocks)?;
        let penalty_blocks = tiles.checked_mul(columns.div_ceil(penalty_columns(rank, columns)))?;
        self.penalty_blocks = penalty_blocks.checked_add(self.penalty_blocks)?;
        Some(())
    }

    /// Blocks that add up scores.
    fn score_blocks(&self) -> usize {
        self.score_blocks_of_a.saturating_add(self.score_blocks_of_b)
    }

    fn of(model: &Model) -> Option<Self> {
        let mut all = Self::default();
        for g in &model.geometries {
            all.add_adapter(g)?;
            all.add_factor(g.rank, g.input.whole)?;
            all.add_factor(g.rank, g.output.whole)?;
        }
        let blocks = [all.score_blocks(), all.gram_blocks, all.distance_blocks, all.penalty_blocks];
        blocks.iter().all(|b| *b < MAX_BLOCKS).then_some(all)
    }
}

/// How many masks fall in the budget phase.
fn n_budgets(schedule: &Schedule) -> i64 {
    schedule.end / schedule.delta_t - schedule.tinit / schedule.delta_t
}

impl Layout {
    fn new(model: &Model, n_slices: usize) -> Result<Self> {
        let budgets = n_budgets(&model.schedule);
        if budgets > MAX_BUDGETS {
            return Err(Error::new(
                Code::Unsupported,
                format!(
                    "desc.delta_t: found {}, with which {budgets} masks fall in the budget phase, expected at most \
                     {MAX_BUDGETS} of them: on CUDA their budgets are tabled",
                    model.schedule.delta_t
                ),
            ));
        }
        if let Some(i) = model.geometries.iter().position(|g| g.rank > MAX_RANK) {
            let rank = model.geometries[i].rank;
            return Err(Error::new(
                Code::Unsupported,
                format!("adapters[{i}].rank: found {rank}, expected at most {MAX_RANK} on CUDA"),
            ));
        }
        Self::of(model, n_slices, budgets as usize)
            .ok_or_else(|| Error::argument("n_slices", n_slices, "fewer: the workspace overflows memory"))
    }

    fn of(model: &Model, n_slices: usize, n_budgets: usize) -> Option<Self> {
        let extents = Extents::of(model)?;
        let n_chunks = (extents.elements / CHUNK).checked_add(n_slices).filter(|n| *n < MAX_BLOCKS)?;
        let triplets = Some(model.triplets()).filter(|n| *n < MAX_BLOCKS)?;
        let adapters = model.geometries.len();
        let mut bytes = 0usize;
        let mut take = |count: usize, size: usize| -> Option<usize> {
            let begin = bytes;
            bytes = count.checked_mul(size)?.checked_next_multiple_of(ALIGNMENT)?.checked_add(begin)?;
            isize::try_from(bytes).ok()?;
            Some(begin)
        };
        Some(Self {
            slices: take(n_slices, size_of::<SliceEntry>())?,
            chunks: take(n_chunks, size_of::<ChunkEntry>())?,
            adapters: take(adapters + 1, size_of::<AdapterEntry>())?,
            factors: take(2 * adapters + 1, size_of::<FactorEntry>())?,
            adapter_of: take(triplets, size_of::<u32>())?,
            adapter_of_block: take(extents.score_blocks(), size_of::<u32>())?,
            budgets: take(n_budgets, size_of::<i64>())?,
            plan: take(1, PLAN_BYTES)?,
            rates: take(n_slices, RATES_BYTES)?,
            squares: take(n_chunks, size_of::<f64>())?,
            not_finite: take(n_chunks, size_of::<u32>())?,
            scores: take(triplets, size_of::<f64>())?,
            score_parts_of_a: take(extents.score_parts_of_a, size_of::<f64>())?,
            score_parts_of_b: take(extents.score_parts_of_b, size_of::<f64>())?,
            chosen: take(triplets, 1)?,
            kept: take(triplets, size_of::<u32>())?,
            gram: take(model.gram_offsets[adapters], size_of::<f64>())?,
            gram_parts: take(extents.gram_parts, size_of::<f64>())?,
            distances: take(extents.distance_blocks, size_of::<f64>())?,
            bytes,
        })
    }
}

/// Bytes of workspace.
pub(super) fn workspace(model: &Model, n_slices: usize) -> Result<usize> {
    Layout::new(model, n_slices).map(|l| l.bytes)
}

fn factor_code(factor: Factor) -> i32 {
    match factor {
        Factor::A => 0,
        Factor::E => 1,
        Factor::B => 2,
    }
}

fn optional(address: Option<Address>) -> Address {
    address.unwrap_or(NULL)
}

impl SliceEntry {
    fn new(slice: &Slice, binding: &Binding) -> Self {
        let hyper = binding.hypers.get(slice.hyper);
        let (m, v) = slice.moments.unzip();
        let (p_low, low) = slice.p_low.unzip();
        let state = slice.state_dtype;
        let arrays = [
            Some(slice.p),
            slice.p_low,
            Some(slice.g),
            m.map(|m| (m, state)),
            v.map(|v| (v, state)),
            Some((slice.exp_avg_ipt, state)),
            Some((slice.exp_avg_unc, state)),
        ];
        let aligned = arrays.iter().flatten().all(|(at, dtype)| at.0.is_multiple_of(4 * dtype.size()));
        Self {
            p: slice.p.0,
            p_low: optional(p_low),
            g: slice.g.0,
            m: optional(m),
            v: optional(v),
            exp_avg_ipt: slice.exp_avg_ipt,
            exp_avg_unc: slice.exp_avg_unc,
            lr: hyper.map_or(NULL, |h| h.lr),
            weight_decay: hyper.map_or(NULL, |h| h.weight_decay),
            beta1: hyper.map_or(0.0, |h| h.beta1),
            beta2: hyper.map_or(0.0, |h| h.beta2),
            eps: hyper.map_or(0.0, |h| h.eps),
            begin: slice.begin as i64,
            end: slice.end as i64,
            adapter: slice.adapter as i32,
            factor: factor_code(slice.factor),
            p_dtype: code(slice.p.1),
            low_dtype: low.map_or(0, code),
            g_dtype: code(slice.g.1),
            state_dtype: code(state),
            replica: i32::from(slice.replica),
            aligned: i32::from(aligned),
        }
    }
}

/// The part of the workspace that `bind` writes.
struct Tables {
    bytes: Vec<u8>,
    n_slices: usize,
    n_chunks: usize,
}

impl Tables {
    fn new(binding: &Binding, layout: &Layout, all: &Extents) -> Result<Self> {
        let model = &binding.model;
        let mut bytes = reserve(layout.plan, "bytes of tables")?;
        bytes.resize(layout.plan, 0);
        let mut tables = Self { bytes, n_slices: 0, n_chunks: 0 };
        let slices = || binding.slices.iter().filter(|s| !s.is_empty());
        for (i, slice) in slices().enumerate() {
            tables.put(layout.slices, i, &SliceEntry::new(slice, binding));
            tables.n_slices += 1;
            for begin in (0..slice.len()).step_by(CHUNK) {
                let count = CHUNK.min(slice.len() - begin) as i32;
                let entry = ChunkEntry { begin: begin as i64, count, slice: i as i32 };
                tables.put(layout.chunks, tables.n_chunks, &entry);
                tables.n_chunks += 1;
            }
        }
        let overflow = || out_of_memory(layout.bytes, "bytes of workspace");
        let mut extents = Extents::default();
        let mut first_slices = [0; 4];
        let mut rest = slices().map(|s| (s.adapter, s.factor)).peekable();
        for (a, g) in model.geometries.iter().enumerate() {
            for (i, factor) in [Factor::A, Factor::E, Factor::B].into_iter().enumerate() {
                first_slices[i + 1] = first_slices[i];
                while rest.next_if(|s| *s == (a, factor)).is_some() {
                    first_slices[i + 1] += 1;
                }
            }
            let entry = AdapterEntry {
                input: g.input.whole as i64,
                output: g.output.whole as i64,
                rank: g.rank as i64,
                first_triplet: model.offsets[a] as i64,
                gram: model.gram_offsets[a] as i64,
                score_rows: score_rows(g) as i64,
                score_block_of_a: extents.score_blocks_of_a as i64,
                score_part_of_a: extents.score_parts_of_a as i64,
                score_block_of_b: extents.score_blocks_of_b as i64,
                score_part_of_b: extents.score_parts_of_b as i64,
                slices: first_slices,
                is_float64: i32::from(g.compute_dtype() == Dtype::Float64),
                reserved: 0,
            };
            tables.put(layout.adapters, a, &entry);
            first_slices[0] = first_slices[3];
            let before = extents;
            extents.add_adapter(g).ok_or_else(overflow)?;
            let of_b = before.score_blocks_of_b..extents.score_blocks_of_b;
            let of_a = before.score_blocks_of_a..extents.score_blocks_of_a;
            for block in of_b.chain(of_a.map(|block| all.score_blocks_of_b + block)) {
                tables.put(layout.adapter_of_block, block, &(a as u32));
            }
            for (i, columns) in [g.input.whole, g.output.whole].into_iter().enumerate() {
                tables.put(layout.factors, 2 * a + i, &FactorEntry::new(g.rank, columns, &extents));
                extents.add_factor(g.rank, columns).ok_or_else(overflow)?;
            }
            for triplet in model.range(a) {
                tables.put(layout.adapter_of, triplet, &(a as u32));
            }
        }
        let adapters = model.geometries.len();
        let end = AdapterEntry {
            input: 0,
            output: 0,
            rank: 0,
            first_triplet: model.triplets() as i64,
            gram: model.gram_offsets[adapters] as i64,
            score_rows: 1,
            score_block_of_a: extents.score_blocks_of_a as i64,
            score_part_of_a: extents.score_parts_of_a as i64,
            score_block_of_b: extents.score_blocks_of_b as i64,
            score_part_of_b: extents.score_parts_of_b as i64,
            slices: [first_slices[0]; 4],
            is_float64: 0,
            reserved: 0,
        };
        tables.put(layout.adapters, adapters, &end);
        tables.put(layout.factors, 2 * adapters, &FactorEntry::new(0, 0, &extents));
        let schedule = &model.schedule;
        let first = schedule.tinit / schedule.delta_t + 1;
        for i in 0..n_budgets(schedule) {
            tables.put(layout.budgets, i as usize, &schedule.at((first + i) * schedule.delta_t).0);
        }
        Ok(tables)
    }

    /// Writes entry `i` of the table that begins there.
    fn put<T: Arguments>(&mut self, table: usize, i: usize, entry: &T) {
        let at = table + i * size_of::<T>();
        self.bytes[at..at + size_of::<T>()].copy_from_slice(bytes_of(entry));
    }
}

impl FactorEntry {
    fn new(rank: usize, columns: usize, before: &Extents) -> Self {
        Self {
            gram_columns: gram_columns(rank, columns) as i64,
            gram_block: before.gram_blocks as i64,
            gram_part: before.gram_parts as i64,
            distance_block: before.distance_blocks as i64,
            penalty_columns: penalty_columns(rank, columns) as i64,
            penalty_block: before.penalty_blocks as i64,
        }
    }
}

// SAFETY: numbers, which have no padding.
unsafe impl Arguments for u32 {}
// SAFETY: as above.
unsafe impl Arguments for i64 {}
// SAFETY: `repr(C)`, eight numbers of eight bytes.
unsafe impl Arguments for Header {}
const _: () = assert!(size_of::<Header>() == 64);

fn bytes_of<T: Arguments>(value: &T) -> &[u8] {
    // SAFETY: the trait's types have no padding, so that all their bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

struct CudaAllocator {
    device: Arc<Device>,
    binding: Binding,
    layout: Layout,
    extents: Extents,
    n_slices: usize,
    n_chunks: usize,
}

/// Takes an allocator's buffers.
pub(super) fn bind(device: Arc<Device>, binding: Binding, stream: Stream) -> Result<Box<dyn BoundAllocator>> {
    let layout = Layout::new(&binding.model, binding.slices.len())?;
    let extents = Extents::of(&binding.model).ok_or_else(|| out_of_memory(layout.bytes, "bytes of workspace"))?;
    let tables = Tables::new(&binding, &layout, &extents)?;
    let (n_slices, n_chunks) = (tables.n_slices, tables.n_chunks);
    let allocator = CudaAllocator { device, binding, layout, extents, n_slices, n_chunks };
    let bound = allocator.device.enter(stream, |session| {
        let is_fresh = allocator.is_fresh(session)?;
        session.upload_sync(&tables.bytes, allocator.binding.workspace)?;
        if is_fresh {
            let state = allocator.state_bytes(&allocator.fresh()?)?;
            session.upload_sync(&state, allocator.binding.state)?;
        }
        Ok(())
    });
    bound.map_err(undefined("workspace and state"))?;
    Ok(Box::new(allocator))
}

const UPDATED: &str = "parameters, moments and averages";
const SELECTED: &str = "E and averages";

impl CudaAllocator {
    fn model(&self) -> &Model {
        &self.binding.model
    }

    /// Whether the state is all zeros; an error where it is neither that nor a state of these adapters.
    fn is_fresh(&self, session: &Session) -> Result<bool> {
        let layout = &self.model().layout;
        let mut bytes = reserve(layout.bytes, "bytes of state")?;
        bytes.resize(layout.bytes, 0);
        session.download_sync(self.binding.state, &mut bytes)?;
        let header = header_from(&bytes);
        if header.magic == MAGIC && header.model == self.model().digest {
            return Ok(false);
        }
        if bytes.iter().any(|b| *b != 0) {
            let found = if header.magic == MAGIC { "the state of other adapters" } else { "bytes that are no state" };
            return Err(Error::argument("state", found, "zeros, or what an earlier bind of these adapters left"));
        }
        Ok(true)
    }

    /// Whether the tables hold for other buffers, but for where gradients lie.
    fn serves(&self, other: &Binding) -> bool {
        let entry = |slice: &Slice, binding| SliceEntry { g: NULL, ..SliceEntry::new(slice, binding) };
        let own = &self.binding;
        own.state == other.state
            && own.workspace == other.workspace
            && own.slices.len() == other.slices.len()
            && own.slices.iter().zip(&other.slices).all(|(slice, moved)| {
                slice.is_empty() == moved.is_empty()
                    && (slice.is_empty() || bytes_of(&entry(slice, own)) == bytes_of(&entry(moved, other)))
            })
    }

    fn fresh_header(&self) -> Header {
        let model = self.model();
        Header { magic: MAGIC, model: model.digest, flags: model.fresh_flags(), ..Header::default() }
    }

    fn fresh(&self) -> Result<State> {
        let model = self.model();
        let mut state = State {
            header: self.fresh_header(),
            clocks: reserve(model.geometries.len(), "clocks")?,
            pattern: reserve(model.triplets(), "triplets")?,
        };
        state.clocks.resize(model.geometries.len(), 0);
        state.pattern.resize(model.triplets(), 1);
        Ok(state)
    }

    /// A state as it lies in memory.
    fn state_bytes(&self, state: &State) -> Result<Vec<u8>> {
        let layout = &self.model().layout;
        let mut bytes = reserve(layout.pattern + state.pattern.len(), "bytes of state")?;
        bytes.extend(bytes_of(&state.header));
        bytes.extend(state.clocks.iter().flat_map(|clock| clock.to_ne_bytes()));
        bytes.extend(&state.pattern);
        Ok(bytes)
    }

    fn at(&self, offset: usize) -> Address {
        self.binding.workspace.offset(offset)
    }

    fn clocks(&self) -> Address {
        self.binding.state.offset(self.model().layout.clocks)
    }

    fn pattern(&self) -> Address {
        self.binding.state.offset(self.model().layout.pattern)
    }

    /// Sums of squares of all gradients that are counted, a chunk each, and whether they are finite.
    fn squares(&self, session: &Session, has_grad: Option<Address>, with_replicas: bool) -> Result<()> {
        let args = SquaresArguments {
            slices: self.at(self.layout.slices),
            chunks: self.at(self.layout.chunks),
            has_grad: optional(has_grad),
            sums: self.at(self.layout.squares),
            not_finite: self.at(self.layout.not_finite),
            with_replicas: i64::from(with_replicas),
        };
        launch(session, Kernel::AllocatorSquares, self.n_chunks, &args)
    }

    /// Decides what the other launches of a call do.
    fn plan(
        &self,
        session: &Session,
        operation: i32,
        step: Option<&StepSource>,
        with_adamw: bool,
        is_final: bool,
    ) -> Result<()> {
        let (model, schedule) = (self.model(), &self.model().schedule);
        let looks = operation & operation::UPDATE != 0 && step.is_some_and(|s| s.found_inf.is_none());
        let args = PlanArguments {
            plan: self.at(self.layout.plan),
            header: self.binding.state,
            step: step.map_or(NULL, |s| s.step),
            grad_factor: optional(step.and_then(|s| s.grad_factor)),
            found_inf: optional(step.and_then(|s| s.found_inf)),
            not_finite: if looks { self.at(self.layout.not_finite) } else { NULL },
            n_chunks: self.n_chunks as i64,
            budgets: self.at(self.layout.budgets),
            tinit: schedule.tinit,
            end: schedule.end,
            delta_t: schedule.delta_t,
            target: schedule.target,
            model: model.digest,
            fresh_flags: model.fresh_flags(),
            slices: self.at(self.layout.slices),
            clocks: self.clocks(),
            rates: self.at(self.layout.rates),
            n_slices: self.n_slices as i64,
            operation,
            with_adamw: i32::from(with_adamw),
            in_float32: i32::from(self.binding.slices.iter().any(|s| s.state_dtype == Dtype::Float32)),
            is_final: i32::from(is_final),
        };
        let blocks = if with_adamw { self.n_slices.div_ceil(THREADS).max(1) } else { 1 };
        launch(session, Kernel::AllocatorPlan, blocks, &args)
    }

    /// The beginning of a step: its plan, AdamW and importance.
    fn begin_update(&self, session: &Session, operation: i32, step: &StepSource, with_adamw: bool) -> Result<()> {
        if step.found_inf.is_none() {
            self.squares(session, step.has_grad, true)?;
        }
        self.plan(session, operation, Some(step), with_adamw, false)?;
        let model = self.model();
        let args = UpdateArguments {
            plan: self.at(self.layout.plan),
            slices: self.at(self.layout.slices),
            chunks: self.at(self.layout.chunks),
            rates: self.at(self.layout.rates),
            has_grad: optional(step.has_grad),
            beta1: model.beta1,
            rest1: 1.0 - model.beta1,
            beta2: model.beta2,
            rest2: 1.0 - model.beta2,
            with_adamw: i64::from(with_adamw),
        };
        launch(session, Kernel::AllocatorUpdate, self.n_chunks, &args)
    }

    /// Scores of all triplets, where there is no plan or it chooses.
    fn write_scores(&self, session: &Session, plan: Address, to: Address) -> Result<()> {
        let (model, extents) = (self.model(), &self.extents);
        let args = ScoresArguments {
            plan,
            adapters: self.at(self.layout.adapters),
            slices: self.at(self.layout.slices),
            adapter_of: self.at(self.layout.adapter_of),
            adapter_of_block: self.at(self.layout.adapter_of_block),
            parts_of_a: self.at(self.layout.score_parts_of_a),
            parts_of_b: self.at(self.layout.score_parts_of_b),
            scores: to,
            blocks_of_b: extents.score_blocks_of_b as i64,
            n_triplets: model.triplets() as i64,
        };
        launch(session, Kernel::AllocatorScoreParts, extents.score_blocks(), &args)?;
        launch(session, Kernel::AllocatorScores, model.triplets().div_ceil(THREADS / WARP), &args)
    }

    /// The pattern that the plan asks for.
    fn choose(&self, session: &Session, scores: Option<Address>) -> Result<()> {
        let plan = self.at(self.layout.plan);
        let from = scores.unwrap_or_else(|| self.at(self.layout.scores));
        if scores.is_none() {
            self.write_scores(session, plan, from)?;
        }
        let model = self.model();
        let args = SelectArguments {
            plan,
            scores: from,
            adapters: self.at(self.layout.adapters),
            adapter_of: self.at(self.layout.adapter_of),
            chosen: self.at(self.layout.chosen),
            n_triplets: model.triplets() as i64,
            in_parameters: i64::from(model.unit == BudgetUnit::Parameters),
        };
        launch(session, Kernel::AllocatorSelect, 1, &args)
    }

    /// Does the rest of what the plan says; the state is written here alone.
    fn finish(&self, session: &Session, given: Option<Address>, has_grad: Option<Address>) -> Result<()> {
        let model = self.model();
        let args = FinishArguments {
            plan: self.at(self.layout.plan),
            header: self.binding.state,
            clocks: self.clocks(),
            pattern: self.pattern(),
            chosen: self.at(self.layout.chosen),
            given: optional(given),
            has_grad: optional(has_grad),
            adapters: self.at(self.layout.adapters),
            slices: self.at(self.layout.slices),
            chunks: self.at(self.layout.chunks),
            adapter_of: self.at(self.layout.adapter_of),
            n_chunks: self.n_chunks as i64,
            n_adapters: model.geometries.len() as i64,
            n_triplets: model.triplets() as i64,
        };
        let most = self.device.multiprocessors() * FINISH_BLOCKS;
        let threads = model.triplets().max(model.geometries.len());
        let blocks = self.n_chunks.max(threads.div_ceil(THREADS)).clamp(1, most);
        launch(session, Kernel::AllocatorFinish, blocks, &args)
    }

    /// What to launch where a kernel serves the adapters of one compute type; never nothing.
    fn of_compute_types(&self, float32: Kernel, float64: Kernel) -> impl Iterator<Item = Kernel> {
        let geometries = &self.model().geometries;
        let with_float64 = geometries.iter().any(|g| g.compute_dtype() == Dtype::Float64);
        let with_others = !with_float64 || geometries.iter().any(|g| g.compute_dtype() != Dtype::Float64);
        [(with_others, float32), (with_float64, float64)]
            .into_iter()
            .filter_map(|(runs, kernel)| runs.then_some(kernel))
    }

    /// Gram matrices, from the parameters unless they are given, and their distances from the identity.
    fn write_gram(&self, session: &Session, gram: Address, is_given: bool) -> Result<()> {
        let n_factors = 2 * self.model().geometries.len() as i64;
        let (adapters, factors) = (self.at(self.layout.adapters), self.at(self.layout.factors));
        let parts = self.at(self.layout.gram_parts);
        if !is_given {
            let slices = self.at(self.layout.slices);
            let args = GramArguments { adapters, factors, slices, parts, n_factors };
            for kernel in self.of_compute_types(Kernel::AllocatorGramFloat32, Kernel::AllocatorGramFloat64) {
                launch(session, kernel, self.extents.gram_blocks, &args)?;
            }
        }
        let args = DistanceArguments {
            adapters,
            factors,
            parts: if is_given { NULL } else { parts },
            gram,
            distances: self.at(self.layout.distances),
            n_factors,
        };
        launch(session, Kernel::AllocatorDistance, self.extents.distance_blocks, &args)
    }
}

fn launch<A: Arguments>(session: &Session, kernel: Kernel, blocks: usize, args: &A) -> Result<()> {
    session.launch(kernel, blocks, THREADS as u32, args)
}

fn header_from(bytes: &[u8]) -> Header {
    // SAFETY: a state begins with a header, eight numbers that any bytes are.
    unsafe { bytes.as_ptr().cast::<Header>().read_unaligned() }
}

impl BoundAllocator for CudaAllocator {
    fn binding(&self) -> &Binding {
        &self.binding
    }

    /// Gradients move from step to step where a trainer lets them go: then nothing is read back, so that the bind may
    /// be captured.
    fn rebind(&mut self, binding: Binding, stream: Stream) -> Result<Option<Binding>> {
        if !self.serves(&binding) {
            return Ok(Some(binding));
        }
        let mut g: Vec<Address> = reserve(self.n_slices, "slices")?;
        g.extend(binding.slices.iter().filter(|s| !s.is_empty()).map(|s| s.g.0));
        let mut args = RebindArguments {
            slices: self.at(self.layout.slices),
            first: 0,
            count: 0,
            header: binding.state,
            pattern: self.pattern(),
            n_triplets: self.model().triplets() as i64,
            fresh: self.fresh_header(),
            g: [NULL; REBIND_SLICES],
        };
        let written = self.device.enter(stream, |session| {
            for first in (0..g.len().max(1)).step_by(REBIND_SLICES) {
                let some = &g[first..g.len().min(first + REBIND_SLICES)];
                args.g[..some.len()].copy_from_slice(some);
                (args.first, args.count) = (first as i64, some.len() as i64);
                launch(session, Kernel::AllocatorRebind, 1, &args)?;
            }
            Ok(())
        });
        written.map_err(undefined("workspace and state"))?;
        self.binding = binding;
        Ok(None)
    }

    fn gram(&mut self, gram: Address, stream: Stream) -> Result<()> {
        self.device.enter(stream, |session| self.write_gram(session, gram, false)).map_err(undefined("gram"))
    }

    fn orthogonality(
        &mut self,
        gram: Option<Address>,
        weight: f64,
        factor: Option<Address>,
        value: Option<Address>,
        stream: Stream,
    ) -> Result<()> {
        self.binding.panels()?;
        let adapters = self.model().geometries.len();
        let grams = gram.unwrap_or_else(|| self.at(self.layout.gram));
        let n_blocks = self.extents.penalty_blocks;
        let args = PenaltyArguments {
            adapters: self.at(self.layout.adapters),
            factors: self.at(self.layout.factors),
            slices: self.at(self.layout.slices),
            gram: grams,
            distances: self.at(self.layout.distances),
            factor: optional(factor),
            value: optional(value),
            share: weight / (2 * adapters) as f64,
            n_factors: 2 * adapters as i64,
            n_blocks: n_blocks as i64,
        };
        self.device
            .enter(stream, |session| {
                self.write_gram(session, grams, gram.is_some())?;
                // Each of them writes the same value.
                self.of_compute_types(Kernel::AllocatorPenaltyFloat32, Kernel::AllocatorPenaltyFloat64)
                    .try_for_each(|kernel| launch(session, kernel, n_blocks + 1, &args))
            })
            .map_err(undefined("gradients and value"))
    }

    fn gradient_norm(
        &mut self,
        has_grad: Option<Address>,
        sum_of_squares: Address,
        found_inf: Option<Address>,
        stream: Stream,
    ) -> Result<()> {
        let args = NormArguments {
            sums: self.at(self.layout.squares),
            not_finite: self.at(self.layout.not_finite),
            n_chunks: self.n_chunks as i64,
            sum_of_squares,
            found_inf: optional(found_inf),
        };
        self.device
            .enter(stream, |session| {
                self.squares(session, has_grad, false)?;
                launch(session, Kernel::AllocatorNorm, 1, &args)
            })
            .map_err(undefined("sum_of_squares and found_inf"))
    }

    fn update(&mut self, step: &StepSource, with_adamw: bool, stream: Stream) -> Result<()> {
        self.device
            .enter(stream, |session| {
                self.begin_update(session, operation::UPDATE, step, with_adamw)?;
                self.finish(session, None, step.has_grad)
            })
            .map_err(undefined(UPDATED))
    }

    fn scores(&self, scores: Address, stream: Stream) -> Result<()> {
        self.device.enter(stream, |session| self.write_scores(session, NULL, scores)).map_err(undefined("scores"))
    }

    fn select(&mut self, step: &StepSource, scores: Option<Address>, stream: Stream) -> Result<()> {
        self.device
            .enter(stream, |session| {
                self.plan(session, operation::SELECT, Some(step), false, false)?;
                self.choose(session, scores)?;
                self.finish(session, None, None)
            })
            .map_err(undefined(SELECTED))
    }

    fn step(&mut self, step: &StepSource, with_adamw: bool, stream: Stream) -> Result<()> {
        self.device
            .enter(stream, |session| {
                self.begin_update(session, operation::UPDATE | operation::SELECT, step, with_adamw)?;
                self.choose(session, None)?;
                self.finish(session, None, step.has_grad)
            })
            .map_err(undefined(UPDATED))
    }

    fn finalize(&mut self, scores: Option<Address>, stream: Stream) -> Result<()> {
        self.device
            .enter(stream, |session| {
                self.plan(session, operation::FINALIZE, None, false, false)?;
                self.choose(session, scores)?;
                self.finish(session, None, None)
            })
            .map_err(undefined(SELECTED))
    }

    fn reset(&mut self, stream: Stream) -> Result<()> {
        self.device
            .enter(stream, |session| {
                self.plan(session, operation::RESET, None, false, false)?;
                self.finish(session, None, None)
            })
            .map_err(undefined("moments and averages"))
    }

    fn digest(&self, digest: Address, stream: Stream) -> Result<()> {
        let args = DigestArguments {
            header: self.binding.state,
            pattern: self.pattern(),
            n_triplets: self.model().triplets() as i64,
            digest,
        };
        self.device
            .enter(stream, |session| launch(session, Kernel::AllocatorDigest, 1, &args))
            .map_err(undefined("digest"))
    }

    fn set_pattern(&mut self, pattern: Address, is_final: bool, stream: Stream) -> Result<()> {
        self.device
            .enter(stream, |session| {
                self.plan(session, operation::SET_PATTERN, None, false, is_final)?;
                self.finish(session, Some(pattern), None)
            })
            .map_err(undefined(SELECTED))
    }

    fn gather(&self, pattern: &[u8], pairs: &[Compacted], stream: Stream) -> Result<()> {
        let model = self.model();
        let mut kept: Vec<u8> = reserve(pattern.len() * size_of::<u32>(), "triplets")?;
        let mut first: Vec<usize> = reserve(model.geometries.len() + 1, "adapters")?;
        first.push(0);
        for adapter in 0..model.geometries.len() {
            let own = pattern[model.range(adapter)].iter().enumerate().filter(|(_, k)| **k != 0);
            kept.extend(own.flat_map(|(i, _)| (i as u32).to_ne_bytes()));
            first.push(kept.len());
        }
        self.device
            .enter(stream, |session| {
                session.upload_sync(&kept, self.at(self.layout.kept))?;
                for Compacted { from, to } in pairs {
                    let geometry = &model.geometries[from.adapter];
                    let (begin, end) = (first[from.adapter], first[from.adapter + 1]);
                    let mut args = GatherArguments {
                        from: [NULL; 7],
                        to: [NULL; 7],
                        size: [0; 7],
                        kept: self.at(self.layout.kept + begin),
                        from_begin: from.begin as i64,
                        to_begin: to.begin as i64,
                        count: to.len() as i64,
                        input: geometry.input.whole as i64,
                        from_rank: geometry.rank as i64,
                        to_rank: ((end - begin) / size_of::<u32>()) as i64,
                        factor: i64::from(factor_code(from.factor)),
                    };
                    let arrays = Compacted { from: *from, to: *to };
                    for (i, (_, from, to, dtype)) in arrays.arrays().enumerate() {
                        (args.from[i], args.to[i], args.size[i]) = (from, to, dtype.size() as i64);
                    }
                    launch(session, Kernel::AllocatorGather, to.len().div_ceil(THREADS), &args)?;
                }
                session.synchronize()
            })
            .map_err(undefined("the compacted run's arrays"))
    }

    fn read_sync(&self, stream: Stream) -> Result<State> {
        let layout = &self.model().layout;
        let triplets = self.model().triplets();
        let mut bytes = reserve(layout.bytes, "bytes of state")?;
        bytes.resize(layout.bytes, 0);
        self.device
            .enter(stream, |session| session.download_sync(self.binding.state, &mut bytes))
            .map_err(undefined("what was to be read"))?;
        let (clocks, rest) = bytes[layout.clocks..layout.pattern].as_chunks();
        debug_assert!(rest.is_empty());
        let mut state = State {
            header: header_from(&bytes),
            clocks: reserve(clocks.len(), "clocks")?,
            pattern: reserve(triplets, "triplets")?,
        };
        state.clocks.extend(clocks.iter().map(|clock| i64::from_ne_bytes(*clock)));
        state.pattern.extend(&bytes[layout.pattern..layout.pattern + triplets]);
        Ok(state)
    }

    fn write_sync(&mut self, state: &State, stream: Stream) -> Result<()> {
        let bytes = self.state_bytes(state)?;
        self.device
            .enter(stream, |session| session.upload_sync(&bytes, self.binding.state))
            .map_err(undefined("the state"))
    }
}
