//! The backend on the host's processor. Everything runs before the call returns; streams are not read.

mod allocator;
mod element;
#[cfg(test)]
mod instruction_sets;
mod kernels;
mod pass;
mod simd;
mod team;
mod update;
mod weight;

use super::{Backend, BoundAllocator};
use crate::adapter::{Combine, Geometry, Layout, Pass};
use crate::allocator::{Binding, Model};
use crate::context::{Level, Settings};
use crate::error::Result;
use crate::optimizer;
use crate::tensor::{Address, Matrix, Stream, Triplets};
use element::pointer;
use simd::Isa;
use std::sync::Arc;
use team::Team;

/// Threads and instruction set of the host.
pub(super) struct Cpu(Arc<Host>);

/// What everything that computes on the host shares.
struct Host {
    isa: Isa,
    team: Team,
}

impl Cpu {
    pub(super) fn new(settings: Settings) -> Self {
        let host = Host { isa: Isa::detect(), team: Team::new(settings.threads, settings.parallel, settings.log) };
        host.team.say(Level::Info, &host.describe());
        Self(Arc::new(host))
    }
}

impl Host {
    fn describe(&self) -> String {
        let whose = if self.team.is_callers() { "of the caller's" } else { "of a pool of its own" };
        format!("CPU backend, at most {} threads {whose}, {}", self.team.threads(), self.isa.name())
    }
}

impl Backend for Cpu {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn prepare(&self, _: Stream) -> Result<()> {
        self.0.team.prepare();
        Ok(())
    }

    fn gradient_factor(
        &self,
        sum_of_squares: Address,
        loss_scale: Option<Address>,
        max_norm: f64,
        grad_factor: Address,
        _: Stream,
    ) -> Result<()> {
        // SAFETY: checked addresses of one f64 each, in the caller's memory.
        unsafe {
            let scale = loss_scale.map_or(1.0, |s| *pointer::<f64>(s));
            *pointer::<f64>(grad_factor) = optimizer::gradient_factor(*pointer::<f64>(sum_of_squares), scale, max_norm);
        }
        Ok(())
    }

    fn initialize(&self, geometry: &Geometry, params: &Triplets, seed: u64, _: Stream) -> Result<()> {
        // SAFETY: the triplets were checked.
        unsafe { weight::initialize(&self.0, geometry, params, seed) }
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
        _: Stream,
    ) -> Result<()> {
        // SAFETY: triplets and matrix were checked.
        unsafe { weight::delta(&self.0, geometry, params, scaling, layout, combine, w, non_finite) }
    }

    fn copy(&self, from: &Matrix, to: &Matrix, _: Stream) -> Result<()> {
        // SAFETY: both were checked to have one shape and type, and not to overlap.
        unsafe { weight::copy(from, to) }
        Ok(())
    }

    fn workspace(&self, geometries: &[&Geometry], tokens: usize) -> Result<usize> {
        pass::workspace(geometries, tokens, self.0.team.threads())
    }

    fn forward(&self, pass: &Pass) -> Result<()> {
        // SAFETY: the pass was checked.
        unsafe { pass::forward(&self.0, pass) }
    }

    fn backward(&self, pass: &Pass, accumulate: bool, dx: Option<&Matrix>) -> Result<()> {
        // SAFETY: the pass was checked.
        unsafe { pass::backward(&self.0, pass, accumulate, dx) }
    }

    fn allocator_workspace(&self, model: &Model, n_slices: usize) -> Result<usize> {
        allocator::workspace(model, n_slices, self.0.team.threads())
    }

    fn bind(&self, binding: Binding, _: Stream) -> Result<Box<dyn BoundAllocator>> {
        // SAFETY: the binding was checked, and says that the addresses stay valid.
        unsafe { allocator::bind(Arc::clone(&self.0), binding) }
    }
}
