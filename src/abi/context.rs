//! `adalora_context_t`: a backend, its device and its threads.

use super::guard::{Handle, Kind, guard, guard_void, output, shared};
use super::types::{ContextDesc, Status};
use crate::context;
use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

/// A backend, its device and threads. May be used from any thread.
pub struct Context(pub(super) Handle<Arc<context::Context>>);

/// Makes a context. No thread is started and no device memory taken before it is asked to compute or to prepare; on CUDA
/// the libraries are found and the driver started.
///
/// @param desc What to make; `backend` must be named.
/// @param context Receives the handle; written on success alone. Destroy it by `adalora_context_destroy`.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` for a field out of range; `ADALORA_ERROR_BACKEND_UNAVAILABLE` where this
/// library or machine lacks the backend, with what was looked for: on CUDA also where there is no driver, one older than
/// that of CUDA 12.0, no device of that number, or one of a compute capability below 8.0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_context_create(
    desc: *const ContextDesc,
    context: Option<&mut MaybeUninit<*mut Context>>,
) -> Status {
    guard("adalora_context_create", || {
        let slot = output(context, "context")?;
        // SAFETY: the caller passes a readable descriptor or null, as the documentation asks.
        let settings = unsafe { super::read::context_settings(desc) }?;
        let object = context::Context::new(settings)?;
        slot.write(Box::into_raw(Box::new(Context(Handle::new(Kind::Context, object)))));
        Ok(())
    })
}

/// Takes now what the context would otherwise take at its first computation: the pool's threads on the CPU; on CUDA, the
/// device's primary context, the kernels, and two cuBLAS handles where none was lent, so that two calls at a time enqueue
/// products and others wait for them. May allocate and synchronise; after it none but binds and what has _sync in its name
/// does. (CUDA itself loads the code of cuBLAS's kernels, and with drivers before that of CUDA 12.4 of this library's, at
/// their first launch, unless CUDA_MODULE_LOADING in the environment is EAGER.) Not beside a capture, here and where a
/// context ends: CUDA may break off what any stream of the process has begun to capture.
///
/// @param stream A `cudaStream_t` on CUDA; not read on the CPU.
/// @return `ADALORA_ERROR_INVALID_STATE` where the stream is being captured into a graph: prepare first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_context_prepare(context: Option<NonNull<Context>>, stream: *mut c_void) -> Status {
    guard("adalora_context_prepare", || {
        shared(context, "context")?.0.get(Kind::Context, "context")?.prepare(stream.into())
    })
}

/// Says in words what the context computes with: library version, backend, threads, instruction set, libraries and
/// their paths.
///
/// @param text Receives the text, ended by a zero byte; NULL to ask for the size alone.
/// @param bytes In: the room at `text`. Out: the bytes needed, the zero byte included, also where the room is too
/// small.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` where the room is too small; then `text` is not written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_context_describe(
    context: Option<&Context>,
    text: *mut c_char,
    bytes: Option<&mut usize>,
) -> Status {
    guard("adalora_context_describe", || {
        let description = super::guard::required(context, "context")?.0.get(Kind::Context, "context")?.describe();
        // SAFETY: `text` has room for `*bytes` bytes or is null, as the documentation asks.
        unsafe { super::guard::copy_out(description.as_bytes(), true, text.cast(), bytes, ["text", "bytes"]) }
    })
}

/// From the sum of squares of all gradients (`adalora_allocator_gradient_norm`, and the trainer's own) makes the factor
/// that unscales and clips them: `min(1, max_norm / (norm + 1e-6)) / loss_scale` with `norm = sqrt(sum_of_squares) /
/// loss_scale`, as PyTorch's `clip_grad_norm_` has it.
///
/// @param sum_of_squares One value.
/// @param loss_scale One value, what the loss was multiplied by; NULL: 1.
/// @param max_norm Above 0; infinity clips nothing.
/// @param grad_factor Receives one value.
///
/// The pointers are in the memory of the context's backend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_context_gradient_factor(
    context: Option<&Context>,
    sum_of_squares: *const f64,
    loss_scale: *const f64,
    max_norm: f64,
    grad_factor: *mut f64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_context_gradient_factor", || {
        super::guard::required(context, "context")?.0.get(Kind::Context, "context")?.gradient_factor(
            super::read::one(sum_of_squares, "sum_of_squares")?,
            super::read::one_or_null(loss_scale, "loss_scale")?,
            max_norm,
            super::read::one(grad_factor, "grad_factor")?,
            stream.into(),
        )
    })
}

/// Destroys a context; NULL is nothing. Adapters and allocators made from it go on working: it ends with the last of
/// them, and on CUDA the kernels with it, which graphs that were captured must not run any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_context_destroy(context: Option<NonNull<Context>>) {
    // SAFETY: the caller gives up the handle; its kind is checked before it is freed.
    guard_void("adalora_context_destroy", || unsafe {
        super::guard::destroy(context, Kind::Context, "context", |c| &c.0)
    });
}
