//! Initial triplets, delta weights, copies, and the factor that unscales and clips gradients.

use super::device::{Arguments, Device, Kernel, code, undefined};
use crate::adapter::{Combine, Geometry, Layout};
use crate::error::Result;
use crate::tensor::{Address, Dtype, Matrix, Stream, Triplets};

/// Threads of every block.
const THREADS: usize = 256;
/// A block's tile of w.
const ROWS: usize = 32;
const COLUMNS: usize = 128;

#[derive(Clone, Copy)]
#[repr(C)]
struct WeightInitialize {
    a: Address,
    e: Address,
    b: Address,
    a_stride: i64,
    e_stride: i64,
    b_stride: i64,
    input: i64,
    input_begin: i64,
    output: i64,
    output_begin: i64,
    rank: i64,
    seed: u64,
    a_blocks: i64,
    b_blocks: i64,
    a_dtype: i32,
    e_dtype: i32,
    b_dtype: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct WeightDelta {
    w: Address,
    across: Address,
    e: Address,
    along: Address,
    non_finite: Address,
    scaling: f64,
    w_stride: i64,
    e_stride: i64,
    rows: i64,
    columns: i64,
    rank: i64,
    across_feature: i64,
    across_triplet: i64,
    along_feature: i64,
    along_triplet: i64,
    column_tiles: i64,
    w_dtype: i32,
    dtype: i32,
    combine: i32,
    reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GradientFactor {
    sum_of_squares: Address,
    loss_scale: Address,
    max_norm: f64,
    factor: Address,
}

const _: () = {
    assert!(size_of::<WeightInitialize>() == 128);
    assert!(size_of::<WeightDelta>() == 144);
    assert!(size_of::<GradientFactor>() == 32);
};

// SAFETY: repr(C) without padding, the twins of the structures of their names in kernels.cu.
unsafe impl Arguments for WeightInitialize {}
// SAFETY: as above.
unsafe impl Arguments for WeightDelta {}
// SAFETY: as above.
unsafe impl Arguments for GradientFactor {}

/// One f64: what unscales and clips gradients.
pub(super) fn gradient_factor(
    device: &Device,
    sum_of_squares: Address,
    loss_scale: Option<Address>,
    max_norm: f64,
    grad_factor: Address,
    stream: Stream,
) -> Result<()> {
    let loss_scale = loss_scale.unwrap_or(Address(0));
    let args = GradientFactor { sum_of_squares, loss_scale, max_norm, factor: grad_factor };
    device
        .enter(stream, |session| session.launch(Kernel::GradientFactor, 1, 32, &args))
        .map_err(undefined("grad_factor"))
}

/// Initial triplets.
pub(super) fn initialize(
    device: &Device,
    geometry: &Geometry,
    params: &Triplets,
    seed: u64,
    stream: Stream,
) -> Result<()> {
    let (a, e, b) = (&params.a, &params.e, &params.b);
    // Four neighbouring features of a triplet are a thread's.
    let blocks = |begin: usize, features: usize| {
        (((begin + features - 1) / 4 - begin / 4 + 1) * geometry.rank).div_ceil(THREADS)
    };
    let a_blocks = blocks(geometry.input.begin, a.columns);
    let b_blocks = blocks(geometry.output.begin, b.rows);
    let args = WeightInitialize {
        a: a.data,
        e: e.data,
        b: b.data,
        a_stride: a.row_stride as i64,
        e_stride: e.stride as i64,
        b_stride: b.row_stride as i64,
        input: a.columns as i64,
        input_begin: geometry.input.begin as i64,
        output: b.rows as i64,
        output_begin: geometry.output.begin as i64,
        rank: geometry.rank as i64,
        seed,
        a_blocks: a_blocks as i64,
        b_blocks: b_blocks as i64,
        a_dtype: code(a.dtype),
        e_dtype: code(e.dtype),
        b_dtype: code(b.dtype),
        reserved: 0,
    };
    let blocks = a_blocks + b_blocks + geometry.rank.div_ceil(THREADS);
    device
        .enter(stream, |session| session.launch(Kernel::WeightInitialize, blocks, THREADS as u32, &args))
        .map_err(undefined("params"))
}

/// Combines w with the delta weight; sets the flag where the outcome is not finite.
#[expect(clippy::too_many_arguments, reason = "one operation")]
pub(super) fn delta(
    device: &Device,
    geometry: &Geometry,
    params: &Triplets,
    scaling: f64,
    layout: Layout,
    combine: Combine,
    w: &Matrix,
    non_finite: Option<Address>,
    stream: Stream,
) -> Result<()> {
    let (a, e, b) = (&params.a, &params.e, &params.b);
    // Elements from one feature to the next, and from one triplet to the next.
    let (a_steps, b_steps) = ((1, a.row_stride as i64), (b.row_stride as i64, 1));
    let ((across, across_steps), (along, along_steps)) = match layout {
        Layout::OutIn => ((b, b_steps), (a, a_steps)),
        Layout::InOut => ((a, a_steps), (b, b_steps)),
    };
    let column_tiles = w.columns.div_ceil(COLUMNS);
    let args = WeightDelta {
        w: w.data,
        across: across.data,
        e: e.data,
        along: along.data,
        non_finite: non_finite.unwrap_or(Address(0)),
        scaling,
        w_stride: w.row_stride as i64,
        e_stride: e.stride as i64,
        rows: w.rows as i64,
        columns: w.columns as i64,
        rank: geometry.rank as i64,
        across_feature: across_steps.0,
        across_triplet: across_steps.1,
        along_feature: along_steps.0,
        along_triplet: along_steps.1,
        column_tiles: column_tiles as i64,
        w_dtype: code(w.dtype),
        dtype: code(a.dtype),
        combine: match combine {
            Combine::Overwrite => 0,
            Combine::Add => 1,
            Combine::Subtract => 2,
        },
        reserved: 0,
    };
    let kernel = match geometry.compute_dtype() {
        Dtype::Float64 => Kernel::WeightDeltaFloat64,
        _ => Kernel::WeightDeltaFloat32,
    };
    let blocks = w.rows.div_ceil(ROWS) * column_tiles;
    device.enter(stream, |session| session.launch(kernel, blocks, THREADS as u32, &args)).map_err(undefined("w"))
}

/// Copies a matrix to another of the same shape and type.
pub(super) fn copy(device: &Device, from: &Matrix, to: &Matrix, stream: Stream) -> Result<()> {
    let element = from.dtype.size();
    device
        .enter(stream, |session| {
            let (from_pitch, to_pitch) = (from.row_stride * element, to.row_stride * element);
            session.copy_rows(from.data, from_pitch, to.data, to_pitch, from.columns * element, from.rows)
        })
        .map_err(undefined("the copy"))
}
