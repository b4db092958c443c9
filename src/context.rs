//! The context: which backend computes, and how it talks to the caller.

use crate::backend::{self, Backend};
use crate::error::{Error, Result};
use crate::tensor::{Address, Region, Stream, disjoint};
use std::ffi::OsString;
use std::sync::Arc;

/// Which backend is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The host's processor.
    Cpu,
    /// A CUDA device.
    Cuda,
}

/// The library's messages.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// Less than was asked for.
    Warning,
    /// What was chosen.
    Info,
}

/// Receives messages.
pub type Log = Box<dyn Fn(Level, &str) + Send + Sync>;

/// Runs a body on several threads at once; returns when all have returned.
pub type Parallel = Box<dyn Fn(&(dyn Fn() + Sync), usize) + Send + Sync>;

/// What a context is made of.
pub struct Settings {
    /// Backend.
    pub kind: Kind,
    /// Threads that compute; 0: as many as the process may run on.
    pub threads: usize,
    /// The caller's threads.
    pub parallel: Option<Parallel>,
    /// Receives messages.
    pub log: Option<Log>,
    /// Number of the CUDA device.
    pub device: i32,
    /// The caller's cuBLAS handle.
    pub cublas_handle: Option<Address>,
    /// Where alone CUDA's libraries are looked for: folders, separated by colons.
    pub library_folder: Option<OsString>,
    /// Whether products of float32 may round to TF32.
    pub tf32: bool,
}

/// A backend, kept alive by everything that was made from it.
pub struct Context {
    backend: Arc<dyn Backend>,
}

impl Context {
    /// Makes the backend that is asked for.
    pub fn new(settings: Settings) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { backend: backend::create(settings)? }))
    }

    /// Over a backend that a test has made.
    #[cfg(test)]
    pub(crate) fn over(backend: Arc<dyn Backend>) -> Arc<Self> {
        Arc::new(Self { backend })
    }

    /// Who computes.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Takes now what would be taken at the first computation.
    pub fn prepare(&self, stream: Stream) -> Result<()> {
        self.backend.prepare(stream)
    }

    /// What the context computes with, in words.
    pub fn describe(&self) -> String {
        format!("adalora {}, {}", env!("CARGO_PKG_VERSION"), self.backend.describe())
    }

    /// The factor that unscales and clips gradients.
    pub fn gradient_factor(
        &self,
        sum_of_squares: Address,
        loss_scale: Option<Address>,
        max_norm: f64,
        grad_factor: Address,
        stream: Stream,
    ) -> Result<()> {
        if max_norm.is_nan() || max_norm <= 0.0 {
            return Err(Error::argument("max_norm", max_norm, "a number above 0, or infinity"));
        }
        let value = |address| Region::contiguous(address, size_of::<f64>());
        let inputs =
            [("sum_of_squares", value(sum_of_squares)), ("loss_scale", value(loss_scale.unwrap_or(sum_of_squares)))];
        disjoint(&[("grad_factor", value(grad_factor))], &inputs)?;
        self.backend.gradient_factor(sum_of_squares, loss_scale, max_norm, grad_factor, stream)
    }
}
