//! The backend on a CUDA device. Nothing is linked: CUDA's libraries are found when a context asks for them.

mod allocator;
mod device;
mod libraries;
mod pass;
mod weight;

use super::{Backend, BoundAllocator};
use crate::adapter::{Combine, Geometry, Layout, Pass};
use crate::allocator::{Binding, Model};
use crate::context::Settings;
use crate::error::Result;
use crate::tensor::{Address, Matrix, Stream, Triplets};
use device::Device;
use std::sync::Arc;

/// A device.
pub(super) struct Cuda(Arc<Device>);

impl Cuda {
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        Ok(Self(Arc::new(Device::new(settings)?)))
    }
}

impl Backend for Cuda {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn prepare(&self, stream: Stream) -> Result<()> {
        self.0.prepare(stream)
    }

    fn gradient_factor(
        &self,
        sum_of_squares: Address,
        loss_scale: Option<Address>,
        max_norm: f64,
        grad_factor: Address,
        stream: Stream,
    ) -> Result<()> {
        weight::gradient_factor(&self.0, sum_of_squares, loss_scale, max_norm, grad_factor, stream)
    }

    fn initialize(&self, geometry: &Geometry, params: &Triplets, seed: u64, stream: Stream) -> Result<()> {
        weight::initialize(&self.0, geometry, params, seed, stream)
    }

    fn delta_weight(
        &self,
        geometry: &Geometry,
        params: &Triplets,
        scaling: f64,
        layout: Layout,
        combine: Combine,
        w: &Matrix,
        non_finite: Option<Address>,
        stream: Stream,
    ) -> Result<()> {
        weight::delta(&self.0, geometry, params, scaling, layout, combine, w, non_finite, stream)
    }

    fn copy(&self, from: &Matrix, to: &Matrix, stream: Stream) -> Result<()> {
        weight::copy(&self.0, from, to, stream)
    }

    fn workspace(&self, geometries: &[&Geometry], tokens: usize) -> Result<usize> {
        pass::workspace(&self.0, geometries, tokens)
    }

    fn forward(&self, pass: &Pass) -> Result<()> {
        pass::forward(&self.0, pass)
    }

    fn backward(&self, pass: &Pass, accumulate: bool, dx: Option<&Matrix>) -> Result<()> {
        pass::backward(&self.0, pass, accumulate, dx)
    }

    fn allocator_workspace(&self, model: &Model, n_slices: usize) -> Result<usize> {
        allocator::workspace(model, n_slices)
    }

    fn bind(&self, binding: Binding, stream: Stream) -> Result<Box<dyn BoundAllocator>> {
        allocator::bind(Arc::clone(&self.0), binding, stream)
    }
}
