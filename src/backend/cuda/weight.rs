//! Initial triplets, delta weights, copies, and the factor that unscales and clips gradients.

use super::device::Device;
use crate::adapter::{Combine, Geometry, Layout};
use crate::error::{Code, Error, Result};
use crate::tensor::{Address, Matrix, Stream, Triplets};

fn unsupported<T>() -> Result<T> {
    Err(Error::new(Code::Unsupported, "the CUDA backend computes no weight yet"))
}

/// One f64: what unscales and clips gradients.
pub(super) fn gradient_factor(_: &Device, _: Address, _: Option<Address>, _: f64, _: Address, _: Stream) -> Result<()> {
    unsupported()
}

/// Initial triplets.
pub(super) fn initialize(_: &Device, _: &Geometry, _: &Triplets, _: u64, _: Stream) -> Result<()> {
    unsupported()
}

/// Combines w with the delta weight; sets the flag where the outcome is not finite.
#[expect(clippy::too_many_arguments, reason = "one operation")]
pub(super) fn delta(
    _: &Device,
    _: &Geometry,
    _: &Triplets,
    _: f64,
    _: Layout,
    _: Combine,
    _: &Matrix,
    _: Option<Address>,
    _: Stream,
) -> Result<()> {
    unsupported()
}

/// Copies a matrix to another of the same shape and type.
pub(super) fn copy(_: &Device, _: &Matrix, _: &Matrix, _: Stream) -> Result<()> {
    unsupported()
}
