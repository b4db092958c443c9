//! What AdaLoRA asks of a backend: whole operations, so that each may fuse as it likes. Everything that arrives here
//! has been checked.

mod cpu;
mod cuda;
pub mod panics;

use crate::adapter::{Combine, Geometry, Layout, Pass};
use crate::allocator::compaction::Compacted;
use crate::allocator::state::State;
use crate::allocator::{Binding, Model, StepSource};
use crate::context::{Kind, Settings};
use crate::error::Result;
use crate::tensor::{Address, Matrix, Stream, Triplets};
use std::sync::Arc;

/// Computes with adapters.
pub trait Backend: Send + Sync {
    /// What computes, in words.
    fn describe(&self) -> String;

    /// Takes now what would be taken at the first computation.
    fn prepare(&self, stream: Stream) -> Result<()>;

    /// One f64: what unscales and clips gradients.
    fn gradient_factor(
        &self,
        sum_of_squares: Address,
        loss_scale: Option<Address>,
        max_norm: f64,
        grad_factor: Address,
        stream: Stream,
    ) -> Result<()>;

    /// Initial triplets.
    fn initialize(&self, geometry: &Geometry, params: &Triplets, seed: u64, stream: Stream) -> Result<()>;

    /// Combines w with `scaling * B diag(E) A`; sets the flag where the outcome is not finite.
    #[expect(clippy::too_many_arguments, reason = "one operation")]
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
    ) -> Result<()>;

    /// Copies a matrix to another of the same shape and type.
    fn copy(&self, from: &Matrix, to: &Matrix, stream: Stream) -> Result<()>;

    /// Bytes of workspace for a forward or backward pass.
    fn workspace(&self, geometries: &[&Geometry], tokens: usize) -> Result<usize>;

    /// Adds every adapter's output to its y.
    fn forward(&self, pass: &Pass) -> Result<()>;

    /// Gradients of every adapter, and of x.
    fn backward(&self, pass: &Pass, accumulate: bool, dx: Option<&Matrix>) -> Result<()>;

    /// Bytes of workspace for an allocator.
    fn allocator_workspace(&self, model: &Model, n_slices: usize) -> Result<usize>;

    /// Takes an allocator's buffers.
    fn bind(&self, binding: Binding, stream: Stream) -> Result<Box<dyn BoundAllocator>>;
}

/// Computes with an allocator's buffers.
pub trait BoundAllocator: Send + Sync {
    /// Where they lie.
    fn binding(&self) -> &Binding;

    /// Takes other buffers in place of its own where that needs no new tables; else gives them back.
    fn rebind(&mut self, binding: Binding, _: Stream) -> Result<Option<Binding>> {
        Ok(Some(binding))
    }

    /// Gram matrices of the owned elements.
    fn gram(&mut self, gram: Address, stream: Stream) -> Result<()>;

    /// Adds the penalty's gradient, and writes its value.
    fn orthogonality(
        &mut self,
        gram: Option<Address>,
        weight: f64,
        factor: Option<Address>,
        value: Option<Address>,
        stream: Stream,
    ) -> Result<()>;

    /// Adds the gradients' squares, and reports what is not finite.
    fn gradient_norm(
        &mut self,
        has_grad: Option<Address>,
        sum_of_squares: Address,
        found_inf: Option<Address>,
        stream: Stream,
    ) -> Result<()>;

    /// AdamW, if asked for, and importance.
    fn update(&mut self, step: &StepSource, with_adamw: bool, stream: Stream) -> Result<()>;

    /// Scores of all triplets, from the owned elements.
    fn scores(&self, scores: Address, stream: Stream) -> Result<()>;

    /// What the schedule says for the step.
    fn select(&mut self, step: &StepSource, scores: Option<Address>, stream: Stream) -> Result<()>;

    /// Update and selection. An override ends with one change of the state.
    fn step(&mut self, step: &StepSource, with_adamw: bool, stream: Stream) -> Result<()> {
        self.update(step, with_adamw, stream)?;
        self.select(step, None, stream)
    }

    /// The last mask, now.
    fn finalize(&mut self, scores: Option<Address>, stream: Stream) -> Result<()>;

    /// A new run.
    fn reset(&mut self, stream: Stream) -> Result<()>;

    /// One u64: a hash of what every process must agree on.
    fn digest(&self, digest: Address, stream: Stream) -> Result<()>;

    /// Sets the pattern.
    fn set_pattern(&mut self, pattern: Address, is_final: bool, stream: Stream) -> Result<()>;

    /// Copies what the pattern, in host memory, keeps of each slice to the one beside it, which holds as many elements.
    fn gather(&self, pattern: &[u8], pairs: &[Compacted], stream: Stream) -> Result<()>;

    /// The state, read back.
    fn read_sync(&self, stream: Stream) -> Result<State>;

    /// The state, from the host.
    fn write_sync(&mut self, state: &State, stream: Stream) -> Result<()>;
}

/// The backend that is asked for.
pub fn create(settings: Settings) -> Result<Arc<dyn Backend>> {
    match settings.kind {
        Kind::Cpu => Ok(Arc::new(cpu::Cpu::new(settings))),
        Kind::Cuda => Ok(Arc::new(cuda::Cuda::new(&settings)?)),
    }
}
