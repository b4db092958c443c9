//! Forward and backward: cuBLAS multiplies what is as long as the tokens, kernels do the rest. So do they where a product
//! is added to y or dx of half precision: there cuBLAS rounds twice, the product and the sum, and takes longer.
//!
//! What is read and written per call, as large as x, y, dy or dx (everything else is as small as the factors, or as
//! [tokens, rank]):
//!
//! | stage | product | x | y | dy | dx |
//! | --- | --- | --- | --- | --- | --- |
//! | forward, project | `x A'^T`, one for all adapters | read | | | |
//! | forward, expand | `y += hE B'^T`, one for each adapter, in float32 sums that are rounded once | | read, written | | |
//! | backward, project | `dy B'`, one for each adapter | | | read | |
//! | backward, project | `(hE)^T dy`, one for each adapter | | | read | |
//! | backward, both, where h was not kept | `x A'^T`, one for all adapters | read | | | |
//! | backward, expand | `(gE)^T x`, one for all adapters | read | | | |
//! | backward, expand | `dx += gE A'`, one for all adapters, likewise | | | | read, written |
//!
//! Dropout above 0: the adapter is multiplied alone. A copy of x without its dropped elements is written to the
//! workspace (x read, the copy written) and read instead of x. Its share of dx is written to the workspace in the
//! compute type, read, and added: where it is the only adapter to dx; else to a sum of all shares (read, written), which
//! the last one adds to dx, so that dx is rounded once.
//!
//! The factors are packed: in the type of x where that is half precision, each element in one to three terms, and each
//! triplet of float16 divided by a power of two; E and the scaling go into h and g on their way to the second factor.

use super::device::{Arguments, Blas, Device, Gemm, Kernel, Operand, Session, code, undefined};
use crate::adapter::{ALIGNMENT, Call, Geometry, MAX_GROUP, Pass};
use crate::error::{Error, Result};
use crate::philox::Dropout;
use crate::tensor::{Address, Buffer, Dtype, Matrix, Vector};
use arrayvec::ArrayVec;
use std::ops::Range;

/// What cuBLAS may use: as much as NVIDIA advises for its largest devices, and what aligning it may lose.
const BLAS_WORKSPACE: usize = (32 << 20) + 192;
/// Threads of every block.
const THREADS: usize = 256;
/// Factors, or adapters, of a launch.
const PIECES: usize = 16;
/// Columns of our own matrices are a multiple of this, so that rows begin on 16 bytes in half precision.
const PADDING: usize = 8;
/// Tokens of a tile at least, and tiles at most.
const LEAST_TILE: usize = 8;
const MOST_TILES: usize = 1024;
/// Tokens of a block that expands, and columns.
const EXPAND_TILE: usize = 128;
/// Blocks that go over a matrix or a factor at most; each then does more.
const MOST_BLOCKS: usize = 1 << 20;
const MOST_FACTOR_BLOCKS: usize = 1 << 12;

const NULL: Address = Address(0);

fn optional(address: Option<Address>) -> Address {
    address.unwrap_or(NULL)
}

// ---- The kernels' structures ----------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
#[repr(C)]
struct Stack {
    data: Address,
    segment: i64,
    dtype: i32,
    first: i32,
    second: i32,
    part: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MagnitudePiece {
    a: Address,
    b: Address,
    of_a: Address,
    of_b: Address,
    a_stride: i64,
    b_stride: i64,
    input: i64,
    output: i64,
    rank: i64,
    first_block: i64,
    dtype: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassMagnitudes {
    piece: [MagnitudePiece; PIECES],
    pieces: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PackPiece {
    from: Address,
    e: Address,
    pattern: Address,
    magnitudes: Address,
    to: Stack,
    from_stride: i64,
    to_stride: i64,
    features: i64,
    rank: i64,
    padded: i64,
    e_stride: i64,
    first_block: i64,
    blocks: i64,
    from_dtype: i32,
    e_dtype: i32,
    is_a: i32,
    expands: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassPack {
    piece: [PackPiece; PIECES],
    pieces: i32,
    is_double: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct FinishPiece {
    from: Address,
    partner: Address,
    saved: Address,
    e: Address,
    pattern: Address,
    magnitudes: Address,
    partner_magnitudes: Address,
    scales: Address,
    sums: Address,
    peaks: Address,
    weighted: Stack,
    multiplier: f64,
    partner_multiplier: f64,
    weight: f64,
    from_stride: i64,
    from_segment: i64,
    partner_stride: i64,
    partner_segment: i64,
    weighted_stride: i64,
    rank: i64,
    padded: i64,
    e_stride: i64,
    from_terms: i32,
    partner_terms: i32,
    e_dtype: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassFinish {
    piece: [FinishPiece; PIECES],
    tokens: i64,
    tile: i64,
    tiles: i64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct ScalePiece {
    peaks: Address,
    scales: Address,
    rank: i64,
    first_block: i64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassScales {
    piece: [ScalePiece; PIECES],
    tiles: i64,
    pieces: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct ExpandPiece {
    first: Address,
    second: Address,
    to: Address,
    to_stride: i64,
    tokens: i64,
    columns: i64,
    depth: i64,
    first_block: i64,
    column_tiles: i32,
    is_aligned: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassExpand {
    piece: [ExpandPiece; PIECES],
    pieces: i32,
    dtype: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GradientPiece {
    from: Address,
    e: Address,
    pattern: Address,
    scales: Address,
    to: Address,
    from_stride: i64,
    segment: i64,
    to_stride: i64,
    features: i64,
    rank: i64,
    e_stride: i64,
    first_block: i64,
    blocks: i64,
    multiplier: f64,
    terms: i32,
    e_dtype: i32,
    to_dtype: i32,
    matrix: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassGradient {
    piece: [GradientPiece; PIECES],
    pieces: i32,
    is_double: i32,
    accumulate: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Mask {
    seed: Address,
    offset: Address,
    threshold: u64,
    first_column: i64,
    token0: i64,
}

impl Mask {
    /// Whether the four columns of a draw can be read from a matrix at once.
    fn is_aligned(&self, matrix: &Matrix) -> i32 {
        let four = 4 * matrix.dtype.size();
        let aligned =
            self.first_column % 4 == 0 && matrix.row_stride.is_multiple_of(4) && matrix.data.0.is_multiple_of(four);
        i32::from(aligned)
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassDrop {
    mask: Mask,
    x: Address,
    to: Address,
    x_stride: i64,
    to_stride: i64,
    tokens: i64,
    columns: i64,
    row_blocks: i64,
    blocks: i64,
    dtype: i32,
    is_aligned: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassUndrop {
    mask: Mask,
    share: Address,
    before: Address,
    after: Address,
    dx: Address,
    multiplier: f64,
    stride: i64,
    dx_stride: i64,
    tokens: i64,
    columns: i64,
    row_blocks: i64,
    blocks: i64,
    dx_dtype: i32,
    is_aligned: i32,
}

const _: () = {
    assert!(size_of::<MagnitudePiece>() == 88 && size_of::<PassMagnitudes>() == 16 * 88 + 8);
    assert!(size_of::<PackPiece>() == 144 && size_of::<PassPack>() == 16 * 144 + 8);
    assert!(size_of::<FinishPiece>() == 216 && size_of::<PassFinish>() == 16 * 216 + 24);
    assert!(size_of::<ScalePiece>() == 32 && size_of::<PassScales>() == 16 * 32 + 16);
    assert!(size_of::<ExpandPiece>() == 72 && size_of::<PassExpand>() == 16 * 72 + 8);
    assert!(size_of::<GradientPiece>() == 128 && size_of::<PassGradient>() == 16 * 128 + 16);
    assert!(size_of::<Mask>() == 40 && size_of::<PassDrop>() == 112 && size_of::<PassUndrop>() == 136);
};

// SAFETY: repr(C) without padding, the twins of the structures of their names in kernels.cu, below 4 KB.
unsafe impl Arguments for PassMagnitudes {}
// SAFETY: as above.
unsafe impl Arguments for PassPack {}
// SAFETY: as above.
unsafe impl Arguments for PassFinish {}
// SAFETY: as above.
unsafe impl Arguments for PassScales {}
// SAFETY: as above.
unsafe impl Arguments for PassExpand {}
// SAFETY: as above.
unsafe impl Arguments for PassGradient {}
// SAFETY: as above.
unsafe impl Arguments for PassDrop {}
// SAFETY: as above.
unsafe impl Arguments for PassUndrop {}

/// One of the parts of a launch, each with blocks of its own, in order.
trait Piece: Copy {
    /// How many blocks.
    fn blocks(&self) -> usize;
    /// The first of them.
    fn place(&mut self, first_block: i64);
}

macro_rules! pieces {
    ($($name:ident: |$p:ident| $blocks:expr;)*) => {$(
        impl Piece for $name {
            fn blocks(&self) -> usize {
                let $p = self;
                $blocks as usize
            }

            fn place(&mut self, first_block: i64) {
                self.first_block = first_block;
            }
        }
    )*};
}

pieces! {
    MagnitudePiece: |p| 2 * p.rank;
    PackPiece: |p| p.blocks;
    ScalePiece: |p| p.rank;
    ExpandPiece: |p| (p.tokens as usize).div_ceil(EXPAND_TILE) * p.column_tiles as usize;
    GradientPiece: |p| p.blocks;
}

/// Pieces of one launch.
type Chunk<P> = ArrayVec<P, PIECES>;

/// Launches pieces, as many at a time as fit: `launch` takes them, how many there are, and their blocks.
fn in_launches<P: Piece>(
    mut pieces: impl Iterator<Item = P>,
    launch: impl Fn([P; PIECES], i32, usize) -> Result<()>,
) -> Result<()> {
    loop {
        let mut chunk: Chunk<P> = pieces.by_ref().take(PIECES).collect();
        if chunk.is_empty() {
            return Ok(());
        }
        let mut blocks = 0;
        for piece in &mut chunk {
            piece.place(blocks as i64);
            blocks += piece.blocks();
        }
        launch(filled(&chunk), chunk.len() as i32, blocks)?;
    }
}

/// Pieces in an array of their own, whose rest nobody reads.
fn filled<P: Copy>(pieces: &[P]) -> [P; PIECES] {
    std::array::from_fn(|i| pieces[i.min(pieces.len() - 1)])
}

fn factor_blocks(elements: usize) -> i64 {
    elements.div_ceil(THREADS).min(MOST_FACTOR_BLOCKS) as i64
}

// ---- The workspace --------------------------------------------------------------------------------------------------

/// What the products multiply.
#[derive(Clone, Copy)]
struct Elements {
    /// The type of both operands.
    operand: Dtype,
    /// The type of h and g, and of sums.
    compute: Dtype,
    /// Terms of h and g where they are operands.
    terms: usize,
    /// Terms of A and B: one where they are of the operands' type already.
    factor_terms: usize,
}

impl Elements {
    fn new(geometries: &[&Geometry]) -> Self {
        let (compute, activation) = (geometries[0].compute_dtype(), geometries[0].activation_dtype);
        let operand = if activation.size() < compute.size() { activation } else { compute };
        let is_half = operand != compute;
        let terms = geometries.iter().map(|g| g.operand_terms).max().filter(|_| is_half).unwrap_or(1);
        let is_exact = geometries.iter().all(|g| g.param_dtype == operand);
        Self { operand, compute, terms, factor_terms: if is_exact { 1 } else { terms } }
    }

    /// Segments of a product of two operands in terms.
    fn pairs(&self) -> usize {
        (0..self.factor_terms).map(|j| self.terms - j).sum()
    }

    /// Whether operands need powers of two to fit their type's range.
    fn scaled(&self) -> bool {
        self.operand == Dtype::Float16
    }
}

/// Hands out the workspace, piece after piece; also computes how much there must be.
struct Arena {
    next: usize,
    overflow: bool,
}

impl Arena {
    fn take(&mut self, counts: &[usize]) -> Address {
        let address = self.next;
        let bytes = counts.iter().try_fold(1usize, |n, count| n.checked_mul(*count));
        let end = bytes.and_then(|b| b.checked_next_multiple_of(ALIGNMENT)).and_then(|b| address.checked_add(b));
        self.overflow |= end.is_none_or(|end| isize::try_from(end).is_err());
        self.next = end.unwrap_or(0);
        Address(address)
    }
}

/// One adapter's place in a unit, and its part of the workspace.
struct Slot {
    /// Number of its call.
    call: usize,
    rank: usize,
    padded: usize,
    /// Triplets of the unit before it.
    offset: usize,
    output: usize,
    /// Powers of two of A's rows and of B's columns.
    magnitudes: [Address; 2],
    /// Of the columns of h and g.
    scales: [Address; 2],
    /// B for the first and second product: [output, terms * padded], [output, pairs * padded].
    b_project: Address,
    b_expand: Address,
    /// `dy B`, [tokens, terms * padded].
    projected: Address,
    /// h as operand: [tokens, pairs * padded] forward, [tokens, terms * padded] backward.
    weighted: Address,
    /// Terms of B's gradient, [terms * padded, output].
    gradient: Address,
    /// Of each tile: sums for E's gradient, largest elements of h and g.
    sums: Address,
    peaks: [Address; 2],
}

/// Adapters whose A is multiplied at once: all that read x as it is; each that has a mask of its own.
struct Unit {
    slots: Range<usize>,
    /// Padded triplets.
    rank: usize,
    drops: bool,
    /// A for the first and second product: [terms * rank, input], [input, pairs * rank].
    a_project: Address,
    a_expand: Address,
    /// `x A^T`, [tokens, terms * rank].
    projected: Address,
    /// g as operand, [tokens, pairs * rank].
    weighted: Address,
    /// Terms of A's gradient, [terms * rank, input].
    gradient: Address,
}

/// The workspace of a call.
struct Layout {
    elements: Elements,
    blas: Buffer,
    slots: ArrayVec<Slot, MAX_GROUP>,
    units: ArrayVec<Unit, MAX_GROUP>,
    input_stride: usize,
    /// x without dropped elements.
    dropped: Address,
    /// One unit's share of dx, and the sum of several.
    share: Address,
    sum: Address,
    tile: usize,
    tiles: usize,
    bytes: usize,
}

fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PADDING)
}

impl Layout {
    /// `None` where it overflows memory.
    fn new(begin: Address, geometries: &[&Geometry], tokens: usize) -> Option<Self> {
        let elements = Elements::new(geometries);
        let (operand, compute) = (elements.operand.size(), elements.compute.size());
        let (terms, factor_terms, pairs) = (elements.terms, elements.factor_terms, elements.pairs());
        let input = padded(geometries[0].input.local);
        // A block has its threads side by side over an adapter's triplets, and below each other over tokens.
        let widest = geometries.iter().map(|g| padded(g.rank)).max().unwrap_or(0).max(1).next_power_of_two();
        let least = (THREADS / widest).max(LEAST_TILE);
        let tile = tokens.div_ceil(MOST_TILES).next_multiple_of(least).max(least);
        let tiles = tokens.div_ceil(tile);
        let mut arena = Arena { next: begin.0, overflow: false };
        let blas = Buffer { data: arena.take(&[BLAS_WORKSPACE]), bytes: BLAS_WORKSPACE };

        let (mut slots, mut units) = (ArrayVec::<Slot, MAX_GROUP>::new(), ArrayVec::<Unit, MAX_GROUP>::new());
        let drops = |g: &Geometry| g.dropout > 0.0;
        let whole = (0..geometries.len()).filter(|i| !drops(geometries[*i]));
        for call in whole.chain((0..geometries.len()).filter(|i| drops(geometries[*i]))) {
            let g = geometries[call];
            if drops(g) || units.is_empty() {
                let slots = slots.len()..slots.len();
                units.push(Unit {
                    slots,
                    rank: 0,
                    drops: drops(g),
                    a_project: NULL,
                    a_expand: NULL,
                    projected: NULL,
                    weighted: NULL,
                    gradient: NULL,
                });
            }
            let unit = units.last_mut()?;
            let table = if elements.scaled() { padded(g.rank) * size_of::<f32>() } else { 0 };
            slots.push(Slot {
                call,
                rank: g.rank,
                padded: padded(g.rank),
                offset: unit.rank,
                output: g.output.local,
                magnitudes: std::array::from_fn(|_| arena.take(&[table])),
                scales: std::array::from_fn(|_| arena.take(&[table])),
                b_project: NULL,
                b_expand: NULL,
                projected: NULL,
                weighted: NULL,
                gradient: NULL,
                sums: NULL,
                peaks: [NULL; 2],
            });
            unit.slots.end += 1;
            unit.rank += padded(g.rank);
        }
        // Forward takes the first part of this alone; what either takes of it is not live at the same time.
        for unit in &mut units {
            unit.a_project = arena.take(&[factor_terms * unit.rank, input, operand]);
            unit.projected = arena.take(&[tokens, factor_terms * unit.rank, compute]);
        }
        let dropped = arena.take(&[tokens, if units.iter().any(|u| u.drops) { input } else { 0 }, operand]);
        for slot in &mut slots {
            slot.b_expand = arena.take(&[slot.output, pairs * slot.padded, operand]);
            slot.weighted = arena.take(&[tokens, pairs * slot.padded, operand]);
        }
        for unit in &mut units {
            unit.a_expand = arena.take(&[geometries[0].input.local, pairs * unit.rank, operand]);
            unit.weighted = arena.take(&[tokens, pairs * unit.rank, operand]);
            unit.gradient = arena.take(&[terms * unit.rank, input, compute]);
        }
        for slot in &mut slots {
            slot.b_project = arena.take(&[slot.output, factor_terms * slot.padded, operand]);
            slot.projected = arena.take(&[tokens, factor_terms * slot.padded, compute]);
            slot.gradient = arena.take(&[terms * slot.padded, padded(slot.output), compute]);
            slot.sums = arena.take(&[tiles, slot.rank, size_of::<f64>()]);
            let table = if elements.scaled() { tiles } else { 0 };
            slot.peaks = std::array::from_fn(|_| arena.take(&[table, slot.rank, size_of::<f32>()]));
        }
        let dropped_share = if units.iter().any(|u| u.drops) { input } else { 0 };
        let share = arena.take(&[tokens, dropped_share, compute]);
        let sum = arena.take(&[tokens, if units.len() > 1 { dropped_share } else { 0 }, compute]);
        let bytes = arena.next.wrapping_sub(begin.0);
        (!arena.overflow).then_some(Self {
            elements,
            blas,
            slots,
            units,
            input_stride: input,
            dropped,
            share,
            sum,
            tile,
            tiles,
            bytes,
        })
    }
}

fn overflows(tokens: usize) -> Error {
    Error::argument("tokens", tokens, "fewer: the workspace overflows memory")
}

/// Bytes of workspace of a pass.
pub(super) fn workspace(_: &Device, geometries: &[&Geometry], tokens: usize) -> Result<usize> {
    Layout::new(NULL, geometries, tokens).map(|l| l.bytes).ok_or_else(|| overflows(tokens))
}

// ---- The passes -----------------------------------------------------------------------------------------------------

/// Where h or g is read from: as saved, or a product's terms.
#[derive(Clone, Copy)]
struct Source {
    data: Address,
    stride: usize,
    segment: usize,
    terms: usize,
    multiplier: f64,
    magnitudes: Address,
}

/// A pass, and where its workspace is.
struct Run<'a> {
    pass: &'a Pass<'a>,
    layout: Layout,
    session: &'a Session<'a>,
    blas: &'a Blas<'a>,
}

/// Matrices, as the header numbers them.
const MATRIX_A: i32 = 1;
const MATRIX_E: i32 = 2;
const MATRIX_B: i32 = 3;

/// Which of a slot's tables.
const H: usize = 0;
const G: usize = 1;

fn is_double(elements: &Elements) -> bool {
    elements.compute == Dtype::Float64
}

impl Run<'_> {
    fn call(&self, slot: &Slot) -> &Call<'_> {
        &self.pass.calls[slot.call]
    }

    fn slots(&self, unit: &Unit) -> &[Slot] {
        &self.layout.slots[unit.slots.clone()]
    }

    /// Those of a unit that have triplets.
    fn live(&self, unit: &Unit) -> impl Iterator<Item = &Slot> {
        self.slots(unit).iter().filter(|s| s.rank > 0)
    }

    /// All that have triplets, with their units.
    fn all_live(&self) -> impl Iterator<Item = (&Unit, &Slot)> {
        self.layout.units.iter().flat_map(|unit| self.live(unit).map(move |slot| (unit, slot)))
    }

    /// `1 / (1 - p)`.
    fn keep(&self, unit: &Unit) -> f64 {
        if unit.drops { 1.0 / (1.0 - self.call(&self.layout.slots[unit.slots.start]).geometry.dropout) } else { 1.0 }
    }

    fn magnitudes(&self, slot: &Slot, factor: usize) -> Address {
        if self.layout.elements.scaled() { slot.magnitudes[factor] } else { NULL }
    }

    fn scales(&self, slot: &Slot, of: usize) -> Address {
        if self.layout.elements.scaled() { slot.scales[of] } else { NULL }
    }

    /// A matrix of our own, in the operands' type.
    fn own(&self, data: Address, stride: usize, transposed: bool) -> Operand {
        Operand { data, stride, dtype: self.layout.elements.operand, transposed }
    }

    /// A matrix of our own, in the compute type.
    fn sums(&self, data: Address, stride: usize) -> Operand {
        Operand { data, stride, dtype: self.layout.elements.compute, transposed: false }
    }

    /// `c[m, n] = a b + beta c`, k being summed over.
    fn multiply(&self, (m, n, k): (usize, usize, usize), a: Operand, b: Operand, beta: f64, c: Operand) -> Result<()> {
        self.blas.gemm(&Gemm { m, n, k, alpha: 1.0, a, b, beta, c })
    }

    /// The power of two of each triplet, where the operands' type asks for them.
    fn find_magnitudes(&self) -> Result<()> {
        if !self.layout.elements.scaled() {
            return Ok(());
        }
        let piece = |slot: &Slot| {
            let params = &self.call(slot).params;
            MagnitudePiece {
                a: params.a.data,
                b: params.b.data,
                of_a: slot.magnitudes[0],
                of_b: slot.magnitudes[1],
                a_stride: params.a.row_stride as i64,
                b_stride: params.b.row_stride as i64,
                input: params.a.columns as i64,
                output: params.b.rows as i64,
                rank: slot.rank as i64,
                first_block: 0,
                dtype: code(params.a.dtype),
                reserved: 0,
            }
        };
        in_launches(self.all_live().map(|(_, slot)| piece(slot)), |piece, pieces, blocks| {
            let args = PassMagnitudes { piece, pieces, reserved: 0 };
            self.session.launch(Kernel::PassMagnitudes, blocks, THREADS as u32, &args)
        })
    }

    /// A factor as operand. For the first product its terms side by side; for the second one segments for each pair of
    /// terms, and zeros for triplets that take no part.
    fn pack_piece(&self, slot: &Slot, is_a: bool, expands: bool, to: Address, place: (usize, usize)) -> PackPiece {
        let call = self.call(slot);
        let elements = &self.layout.elements;
        let (factor, features) =
            if is_a { (&call.params.a, call.params.a.columns) } else { (&call.params.b, call.params.b.rows) };
        let (stride, segment) = place;
        let (first, second) =
            if expands { (elements.terms, elements.factor_terms) } else { (elements.factor_terms, 1) };
        let to = Stack {
            data: to,
            segment: segment as i64,
            dtype: code(elements.operand),
            first: first as i32,
            second: second as i32,
            part: i32::from(expands),
        };
        PackPiece {
            from: factor.data,
            e: call.params.e.data,
            pattern: optional(call.pattern),
            magnitudes: self.magnitudes(slot, usize::from(!is_a)),
            to,
            from_stride: factor.row_stride as i64,
            to_stride: stride as i64,
            features: features as i64,
            rank: slot.rank as i64,
            padded: slot.padded as i64,
            e_stride: call.params.e.stride as i64,
            first_block: 0,
            blocks: factor_blocks(features * slot.padded),
            from_dtype: code(factor.dtype),
            e_dtype: code(call.params.e.dtype),
            is_a: i32::from(is_a),
            expands: i32::from(expands),
        }
    }

    /// A for the first or the second product.
    fn pack_a(&self, unit: &Unit, slot: &Slot, expands: bool) -> PackPiece {
        let (elements, stride) = (&self.layout.elements, self.layout.input_stride);
        let (to, begin, place) = if expands {
            (unit.a_expand, slot.offset, (elements.pairs() * unit.rank, unit.rank))
        } else {
            (unit.a_project, slot.offset * stride, (stride, unit.rank * stride))
        };
        self.pack_piece(slot, true, expands, to.offset(begin * elements.operand.size()), place)
    }

    /// B for the first or the second product.
    fn pack_b(&self, slot: &Slot, expands: bool) -> PackPiece {
        let elements = &self.layout.elements;
        let (to, segments) =
            if expands { (slot.b_expand, elements.pairs()) } else { (slot.b_project, elements.factor_terms) };
        self.pack_piece(slot, false, expands, to, (segments * slot.padded, slot.padded))
    }

    fn pack(&self, pieces: impl Iterator<Item = PackPiece>) -> Result<()> {
        in_launches(pieces, |piece, pieces, blocks| {
            let args = PassPack { piece, pieces, is_double: i32::from(is_double(&self.layout.elements)) };
            self.session.launch(Kernel::PassPack, blocks, THREADS as u32, &args)
        })
    }

    /// The mask of a unit that has one.
    fn mask(&self, unit: &Unit) -> Option<Mask> {
        let call = self.call(&self.layout.slots[unit.slots.start]);
        let place = call.dropout.filter(|_| unit.drops)?;
        Some(Mask {
            seed: place.seed,
            offset: place.offset,
            threshold: Dropout::threshold(call.geometry.dropout),
            first_column: call.geometry.input.begin as i64,
            token0: place.token0,
        })
    }

    /// Blocks for a row of x, and for all of them.
    fn row_blocks(&self, mask: &Mask, columns: usize) -> (usize, usize) {
        let quads = (mask.first_column as usize % 4 + columns).div_ceil(4);
        let row_blocks = quads.div_ceil(THREADS);
        (row_blocks, (self.pass.tokens.saturating_mul(row_blocks)).min(MOST_BLOCKS))
    }

    /// x as a unit reads it.
    fn input(&self, unit: &Unit, x: &Matrix) -> Result<Operand> {
        let whole = Operand { data: x.data, stride: x.row_stride, dtype: x.dtype, transposed: false };
        // float32 parameters of float32 x: x is of the operands' type in any case.
        let Some(mask) = self.mask(unit) else { return Ok(whole) };
        let (row_blocks, blocks) = self.row_blocks(&mask, x.columns);
        let args = PassDrop {
            mask,
            x: x.data,
            to: self.layout.dropped,
            x_stride: x.row_stride as i64,
            to_stride: self.layout.input_stride as i64,
            tokens: self.pass.tokens as i64,
            columns: x.columns as i64,
            row_blocks: row_blocks as i64,
            blocks: blocks as i64,
            dtype: code(x.dtype),
            is_aligned: mask.is_aligned(x),
        };
        self.session.launch(Kernel::PassDrop, blocks, THREADS as u32, &args)?;
        Ok(self.own(self.layout.dropped, self.layout.input_stride, false))
    }

    /// `x A^T`, in terms.
    fn project(&self, unit: &Unit, x: Operand) -> Result<()> {
        let columns = self.layout.elements.factor_terms * unit.rank;
        let input = self.pass.calls[0].geometry.input.local;
        let a = self.own(unit.a_project, self.layout.input_stride, true);
        self.multiply((self.pass.tokens, columns, input), x, a, 0.0, self.sums(unit.projected, columns))
    }

    /// Adds to each matrix what two operands give: [tokens, depth] and [columns, depth].
    fn expand<'m>(&self, products: impl Iterator<Item = (Address, Address, usize, &'m Matrix)>) -> Result<()> {
        let (tokens, operand) = (self.pass.tokens, self.layout.elements.operand);
        if !matches!(operand, Dtype::Bfloat16 | Dtype::Float16) {
            for (first, second, depth, to) in products {
                let (first, second) = (self.own(first, depth, false), self.own(second, depth, true));
                let c = Operand { data: to.data, stride: to.row_stride, dtype: to.dtype, transposed: false };
                self.multiply((tokens, to.columns, depth), first, second, 1.0, c)?;
            }
            return Ok(());
        }
        let pieces = products.map(|(first, second, depth, to)| ExpandPiece {
            first,
            second,
            to: to.data,
            to_stride: to.row_stride as i64,
            tokens: tokens as i64,
            columns: to.columns as i64,
            depth: depth as i64,
            first_block: 0,
            column_tiles: to.columns.div_ceil(EXPAND_TILE) as i32,
            is_aligned: i32::from(to.data.0.is_multiple_of(16) && (to.row_stride * 2).is_multiple_of(16)),
        });
        in_launches(pieces, |piece, pieces, blocks| {
            let args = PassExpand { piece, pieces, dtype: code(operand) };
            self.session.launch(Kernel::PassExpand, blocks, THREADS as u32, &args)
        })
    }

    fn h_of_product(&self, unit: &Unit, slot: &Slot) -> Source {
        let elements = &self.layout.elements;
        Source {
            data: unit.projected.offset(slot.offset * elements.compute.size()),
            stride: elements.factor_terms * unit.rank,
            segment: unit.rank,
            terms: elements.factor_terms,
            multiplier: self.keep(unit),
            magnitudes: self.magnitudes(slot, 0),
        }
    }

    fn g_of_product(&self, slot: &Slot) -> Source {
        let elements = &self.layout.elements;
        Source {
            data: slot.projected,
            stride: elements.factor_terms * slot.padded,
            segment: slot.padded,
            terms: elements.factor_terms,
            multiplier: self.call(slot).scaling,
            magnitudes: self.magnitudes(slot, 1),
        }
    }

    fn saved(data: Address, slot: &Slot) -> Source {
        Source { data, stride: slot.rank, segment: 0, terms: 1, multiplier: 1.0, magnitudes: NULL }
    }

    /// Reads h or g, and does nothing with it yet.
    fn finish_piece(&self, slot: &Slot, from: Source) -> FinishPiece {
        let call = self.call(slot);
        FinishPiece {
            from: from.data,
            partner: NULL,
            saved: NULL,
            e: call.params.e.data,
            pattern: optional(call.pattern),
            magnitudes: from.magnitudes,
            partner_magnitudes: NULL,
            scales: NULL,
            sums: NULL,
            peaks: NULL,
            weighted: Stack { data: NULL, segment: 0, dtype: 0, first: 0, second: 0, part: 0 },
            multiplier: from.multiplier,
            partner_multiplier: 1.0,
            weight: 1.0,
            from_stride: from.stride as i64,
            from_segment: from.segment as i64,
            partner_stride: 0,
            partner_segment: 0,
            weighted_stride: 0,
            rank: slot.rank as i64,
            padded: slot.padded as i64,
            e_stride: call.params.e.stride as i64,
            from_terms: from.terms as i32,
            partner_terms: 1,
            e_dtype: code(call.params.e.dtype),
            reserved: 0,
        }
    }

    /// Where a weighted h or g goes: terms alone, or segments for each pair of its and the factor's terms.
    fn weighted(&self, data: Address, segment: usize, pairs: bool) -> Stack {
        let elements = &self.layout.elements;
        Stack {
            data,
            segment: segment as i64,
            dtype: code(elements.operand),
            first: elements.terms as i32,
            second: if pairs { elements.factor_terms as i32 } else { 1 },
            part: 0,
        }
    }

    fn finish(&self, mut pieces: impl Iterator<Item = FinishPiece>) -> Result<()> {
        let layout = &self.layout;
        let kernel = if is_double(&layout.elements) { Kernel::PassFinishFloat64 } else { Kernel::PassFinishFloat32 };
        loop {
            let chunk: Chunk<FinishPiece> = pieces.by_ref().take(PIECES).collect();
            if chunk.is_empty() {
                return Ok(());
            }
            let args = PassFinish {
                piece: filled(&chunk),
                tokens: self.pass.tokens as i64,
                tile: layout.tile as i64,
                tiles: layout.tiles as i64,
            };
            self.session.launch(kernel, chunk.len() * layout.tiles, THREADS as u32, &args)?;
        }
    }

    fn forward(&self) -> Result<()> {
        let (pass, layout) = (self.pass, &self.layout);
        let pairs = layout.elements.pairs();
        self.find_magnitudes()?;
        self.pack(self.all_live().flat_map(|(unit, slot)| {
            let a = pass.stages.project.then(|| self.pack_a(unit, slot, false));
            a.into_iter().chain(pass.stages.expand.then(|| self.pack_b(slot, true)))
        }))?;
        for unit in layout.units.iter().filter(|u| u.rank > 0) {
            if let Some(x) = &pass.x {
                self.project(unit, self.input(unit, x)?)?;
            }
            self.finish(self.live(unit).map(|slot| {
                let call = self.call(slot);
                let from = match call.h {
                    Some(h) if !pass.stages.project => Self::saved(h, slot),
                    _ => self.h_of_product(unit, slot),
                };
                let mut piece = self.finish_piece(slot, from);
                if pass.stages.project {
                    piece.saved = optional(call.h);
                }
                if pass.stages.expand {
                    piece.weighted = self.weighted(slot.weighted, slot.padded, true);
                    piece.weighted_stride = (pairs * slot.padded) as i64;
                    piece.weight = call.scaling;
                    piece.scales = self.magnitudes(slot, 1);
                }
                piece
            }))?;
            if pass.stages.expand {
                self.expand(self.live(unit).filter_map(|slot| {
                    let y = self.call(slot).output.as_ref()?;
                    Some((slot.weighted, slot.b_expand, pairs * slot.padded, y))
                }))?;
            }
        }
        Ok(())
    }

    fn backward(&self, accumulate: bool, dx: Option<&Matrix>) -> Result<()> {
        let (pass, layout) = (self.pass, &self.layout);
        // In two stages h is always there.
        let lacks_h = |unit: &Unit| pass.x.is_some() && self.slots(unit).iter().any(|s| self.call(s).h.is_none());
        self.find_magnitudes()?;
        self.pack(self.all_live().flat_map(|(unit, slot)| {
            let a = lacks_h(unit).then(|| self.pack_a(unit, slot, false));
            let b = pass.stages.project.then(|| self.pack_b(slot, false));
            a.into_iter().chain(b).chain(dx.is_some().then(|| self.pack_a(unit, slot, true)))
        }))?;
        for (i, unit) in layout.units.iter().enumerate() {
            let x = match &pass.x {
                Some(x) => Some(self.input(unit, x)?),
                None => None,
            };
            if let Some(x) = x.filter(|_| lacks_h(unit)) {
                self.project(unit, x)?;
            }
            for slot in self.slots(unit) {
                self.project_back(slot)?;
            }
            self.finish_backward(unit, dx.is_some())?;
            for slot in self.slots(unit) {
                self.gradient_of_b(slot)?;
            }
            if let Some(x) = x {
                self.gradient_of_a(unit, x)?;
            }
            if let Some(dx) = dx {
                self.add_to_dx(i, dx)?;
            }
            self.give_gradients(unit, accumulate)?;
        }
        Ok(())
    }

    /// dy, where it is read.
    fn dy(&self, slot: &Slot) -> Option<Operand> {
        let dy = self.call(slot).output.filter(|_| self.pass.stages.project)?;
        Some(Operand { data: dy.data, stride: dy.row_stride, dtype: dy.dtype, transposed: false })
    }

    /// `dy B`, in terms.
    fn project_back(&self, slot: &Slot) -> Result<()> {
        let Some(dy) = self.dy(slot) else { return Ok(()) };
        let columns = self.layout.elements.factor_terms * slot.padded;
        let b = self.own(slot.b_project, columns, false);
        self.multiply((self.pass.tokens, columns, slot.output), dy, b, 0.0, self.sums(slot.projected, columns))
    }

    fn h(&self, unit: &Unit, slot: &Slot) -> Source {
        self.call(slot).h.map_or_else(|| self.h_of_product(unit, slot), |h| Self::saved(h, slot))
    }

    /// h as it meets dy.
    fn weigh_h(&self, unit: &Unit, slot: &Slot) -> FinishPiece {
        let mut piece = self.finish_piece(slot, self.h(unit, slot));
        piece.weight = self.call(slot).scaling;
        piece.weighted = self.weighted(slot.weighted, slot.padded, false);
        piece.weighted_stride = (self.layout.elements.terms * slot.padded) as i64;
        piece
    }

    /// g as it meets x, and A as well where there is a dx.
    fn weigh_g(&self, unit: &Unit, slot: &Slot, pairs: bool) -> FinishPiece {
        let elements = &self.layout.elements;
        let from = match self.call(slot).g {
            Some(g) if !self.pass.stages.project => Self::saved(g, slot),
            _ => self.g_of_product(slot),
        };
        let mut piece = self.finish_piece(slot, from);
        if self.pass.stages.expand {
            let to = unit.weighted.offset(slot.offset * elements.operand.size());
            piece.weighted = self.weighted(to, unit.rank, pairs);
            piece.weighted_stride = (elements.pairs() * unit.rank) as i64;
        }
        piece
    }

    /// g, both weighted operands, and what the gradient of E sums over tokens.
    fn finish_backward(&self, unit: &Unit, wants_dx: bool) -> Result<()> {
        let mut live = self.live(unit);
        loop {
            // Two pieces for each slot.
            let mut slots = live.by_ref().take(PIECES / 2).peekable();
            if slots.peek().is_none() {
                return Ok(());
            }
            let (mut pieces, mut again, mut scales) = (Chunk::new(), Chunk::new(), Chunk::new());
            for slot in slots {
                let first = pieces.len();
                if self.pass.stages.project {
                    pieces.push(self.weigh_h(unit, slot));
                }
                pieces.push(self.finish_g(unit, slot, wants_dx));
                if self.layout.elements.scaled() {
                    self.scale(slot, &mut pieces[first..], (&mut scales, &mut again));
                }
            }
            self.finish(pieces.into_iter())?;
            in_launches(scales.into_iter(), |piece, pieces, blocks| {
                let args = PassScales { piece, tiles: self.layout.tiles as i64, pieces, reserved: 0 };
                self.session.launch(Kernel::PassScales, blocks, THREADS as u32, &args)
            })?;
            self.finish(again.into_iter())?;
        }
    }

    /// g, kept, summed, and as operand.
    fn finish_g(&self, unit: &Unit, slot: &Slot, wants_dx: bool) -> FinishPiece {
        let (stages, call) = (self.pass.stages, self.call(slot));
        let mut piece = self.weigh_g(unit, slot, wants_dx && !self.layout.elements.scaled());
        if stages.project {
            piece.saved = optional(call.g);
        }
        if stages.expand {
            let h = self.h(unit, slot);
            piece.partner = h.data;
            piece.partner_magnitudes = h.magnitudes;
            piece.partner_multiplier = h.multiplier;
            piece.partner_stride = h.stride as i64;
            piece.partner_segment = h.segment as i64;
            piece.partner_terms = h.terms as i32;
            piece.sums = slot.sums;
        }
        piece
    }

    /// Lets pieces find their operands' largest elements instead of the operands, which are made again when there are
    /// scales.
    fn scale(
        &self,
        slot: &Slot,
        pieces: &mut [FinishPiece],
        (scales, again): (&mut Chunk<ScalePiece>, &mut Chunk<FinishPiece>),
    ) {
        for piece in pieces.iter_mut().filter(|p| p.weighted.data != NULL) {
            let of = if piece.weighted.data == slot.weighted { H } else { G };
            scales.push(ScalePiece {
                peaks: slot.peaks[of],
                scales: slot.scales[of],
                rank: slot.rank as i64,
                first_block: 0,
            });
            again.push(FinishPiece { scales: slot.scales[of], saved: NULL, partner: NULL, sums: NULL, ..*piece });
            piece.weighted.data = NULL;
            piece.peaks = slot.peaks[of];
        }
    }

    /// `scaling (h E)^T dy`, in terms.
    fn gradient_of_b(&self, slot: &Slot) -> Result<()> {
        let Some(dy) = self.dy(slot) else { return Ok(()) };
        let rows = self.layout.elements.terms * slot.padded;
        let h = self.own(slot.weighted, rows, true);
        let c = self.sums(slot.gradient, padded(slot.output));
        self.multiply((rows, slot.output, self.pass.tokens), h, dy, 0.0, c)
    }

    /// `(g E)^T x`, in terms.
    fn gradient_of_a(&self, unit: &Unit, x: Operand) -> Result<()> {
        let (elements, stride) = (&self.layout.elements, self.layout.input_stride);
        let rows = elements.terms * unit.rank;
        let g = self.own(unit.weighted, elements.pairs() * unit.rank, true);
        let input = self.pass.calls[0].geometry.input.local;
        self.multiply((rows, input, self.pass.tokens), g, x, 0.0, self.sums(unit.gradient, stride))
    }

    /// `g E A`, to dx; or to the sum of all units' shares, which the last one adds to dx.
    fn add_to_dx(&self, i: usize, dx: &Matrix) -> Result<()> {
        let (layout, unit) = (&self.layout, &self.layout.units[i]);
        if layout.elements.scaled() {
            self.finish(self.live(unit).map(|slot| {
                let mut piece = self.weigh_g(unit, slot, true);
                piece.scales = slot.magnitudes[0];
                piece
            }))?;
        }
        let columns = layout.elements.pairs() * unit.rank;
        let (g, a) = (self.own(unit.weighted, columns, false), self.own(unit.a_expand, columns, true));
        let product = (self.pass.tokens, dx.columns, columns);
        let is_last = i + 1 == layout.units.len();
        let Some(mask) = self.mask(unit) else {
            // Only the first unit has no mask.
            if is_last {
                let live = (columns > 0).then_some((unit.weighted, unit.a_expand, columns, dx));
                return self.expand(live.into_iter());
            }
            return self.multiply(product, g, a, 0.0, self.sums(layout.sum, layout.input_stride));
        };
        self.multiply(product, g, a, 0.0, self.sums(layout.share, layout.input_stride))?;
        let (row_blocks, blocks) = self.row_blocks(&mask, dx.columns);
        let args = PassUndrop {
            mask,
            share: layout.share,
            before: if i == 0 { NULL } else { layout.sum },
            after: if is_last { NULL } else { layout.sum },
            dx: dx.data,
            multiplier: self.keep(unit),
            stride: layout.input_stride as i64,
            dx_stride: dx.row_stride as i64,
            tokens: self.pass.tokens as i64,
            columns: dx.columns as i64,
            row_blocks: row_blocks as i64,
            blocks: blocks as i64,
            dx_dtype: code(dx.dtype),
            is_aligned: mask.is_aligned(dx),
        };
        self.session.launch(Kernel::PassUndrop, blocks, THREADS as u32, &args)
    }

    /// Gradients, from their terms and sums.
    fn give_gradients(&self, unit: &Unit, accumulate: bool) -> Result<()> {
        let stages = self.pass.stages;
        let pieces = self.live(unit).flat_map(|slot| {
            let grads = self.call(slot).grads.as_ref();
            let (expand, project) = (grads.filter(|_| stages.expand), grads.filter(|_| stages.project));
            let a = expand.map(|grads| self.gradient_of_factor(unit, slot, &grads.a, MATRIX_A));
            let e = expand.map(|grads| self.gradient_of_e(slot, &grads.e));
            let b = project.map(|grads| self.gradient_of_factor(unit, slot, &grads.b, MATRIX_B));
            a.into_iter().chain(e).chain(b)
        });
        in_launches(pieces, |piece, pieces, blocks| {
            let args = PassGradient {
                piece,
                pieces,
                is_double: i32::from(is_double(&self.layout.elements)),
                accumulate: i32::from(accumulate),
                reserved: 0,
            };
            self.session.launch(Kernel::PassGradient, blocks, THREADS as u32, &args)
        })
    }

    fn gradient_of_e(&self, slot: &Slot, to: &Vector) -> GradientPiece {
        GradientPiece {
            from: slot.sums,
            e: NULL,
            pattern: NULL,
            scales: NULL,
            to: to.data,
            from_stride: 0,
            segment: 0,
            to_stride: to.stride as i64,
            features: self.layout.tiles as i64,
            rank: slot.rank as i64,
            e_stride: 0,
            first_block: 0,
            blocks: slot.rank as i64,
            multiplier: 1.0,
            terms: 1,
            e_dtype: 0,
            to_dtype: code(to.dtype),
            matrix: MATRIX_E,
        }
    }

    fn gradient_of_factor(&self, unit: &Unit, slot: &Slot, to: &Matrix, matrix: i32) -> GradientPiece {
        let (call, layout) = (self.call(slot), &self.layout);
        let is_a = matrix == MATRIX_A;
        let features = if is_a { to.columns } else { to.rows };
        let (from, stride, rank) = if is_a {
            let (stride, compute) = (layout.input_stride, layout.elements.compute.size());
            (unit.gradient.offset(slot.offset * stride * compute), stride, unit.rank)
        } else {
            (slot.gradient, padded(slot.output), slot.padded)
        };
        GradientPiece {
            from,
            e: call.params.e.data,
            pattern: optional(call.pattern),
            scales: self.scales(slot, if is_a { G } else { H }),
            to: to.data,
            from_stride: stride as i64,
            segment: (rank * stride) as i64,
            to_stride: to.row_stride as i64,
            features: features as i64,
            rank: slot.rank as i64,
            e_stride: call.params.e.stride as i64,
            first_block: 0,
            blocks: factor_blocks(features * slot.rank),
            multiplier: if is_a { self.keep(unit) } else { 1.0 },
            terms: layout.elements.terms as i32,
            e_dtype: code(call.params.e.dtype),
            to_dtype: code(to.dtype),
            matrix,
        }
    }
}

/// Runs a pass, and says what is undefined where it ends half done.
fn run(device: &Device, pass: &Pass, outputs: &str, body: impl FnOnce(&Run) -> Result<()>) -> Result<()> {
    let geometries: ArrayVec<&Geometry, MAX_GROUP> = pass.calls.iter().map(|c| c.geometry).collect();
    let layout = Layout::new(pass.workspace.data, &geometries, pass.tokens).ok_or_else(|| overflows(pass.tokens))?;
    let blas_workspace = layout.blas;
    device
        .enter(pass.stream, |session| session.blas(blas_workspace, |blas| body(&Run { pass, layout, session, blas })))
        .map_err(undefined(outputs))
}

/// Adds every adapter's output to its y.
pub(super) fn forward(device: &Device, pass: &Pass) -> Result<()> {
    if pass.tokens == 0 {
        return Ok(());
    }
    let outputs = if pass.stages.expand { "y and h" } else { "h" };
    run(device, pass, outputs, |run| run.forward())
}

/// Gradients of every adapter, and of x.
pub(super) fn backward(device: &Device, pass: &Pass, accumulate: bool, dx: Option<&Matrix>) -> Result<()> {
    run(device, pass, "grads, g and dx", |run| run.backward(accumulate, dx))
}
