//! The allocator on the device.

use super::BoundAllocator;
use super::device::Device;
use crate::allocator::{Binding, Model};
use crate::error::{Code, Error, Result};
use crate::tensor::Stream;
use std::sync::Arc;

fn unsupported<T>() -> Result<T> {
    Err(Error::new(Code::Unsupported, "the CUDA backend has no allocator yet"))
}

/// Bytes of workspace for an allocator.
pub(super) fn workspace(_: &Device, _: &Model, _: usize) -> Result<usize> {
    unsupported()
}

/// Takes an allocator's buffers.
pub(super) fn bind(_: Arc<Device>, _: Binding, _: Stream) -> Result<Box<dyn BoundAllocator>> {
    unsupported()
}
