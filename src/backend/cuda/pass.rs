//! Forward and backward.

use super::device::Device;
use crate::adapter::{Geometry, Pass};
use crate::error::{Code, Error, Result};
use crate::tensor::Matrix;

fn unsupported<T>() -> Result<T> {
    Err(Error::new(Code::Unsupported, "the CUDA backend computes no pass yet"))
}

/// Bytes of workspace for a pass.
pub(super) fn workspace(_: &Device, _: &[&Geometry], _: usize) -> Result<usize> {
    unsupported()
}

/// Adds every adapter's output to its y.
pub(super) fn forward(_: &Device, _: &Pass) -> Result<()> {
    unsupported()
}

/// Gradients of every adapter, and of x.
pub(super) fn backward(_: &Device, _: &Pass, _: bool, _: Option<&Matrix>) -> Result<()> {
    unsupported()
}
