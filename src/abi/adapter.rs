//! `adalora_adapter_t`: one layer's adapter, and what is computed with it.

use super::context::Context;
use super::guard::{Handle, Kind, guard, guard_void, output, required};
use super::read;
use super::types::{AdapterDesc, Call, Matrix, Status, Triplets};
use crate::adapter::{self, Direction, Layout};
use arrayvec::ArrayVec;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

/// The geometry of one layer's adapter; holds no pointer of the caller's. May be used from any thread, by several at
/// once.
pub struct Adapter(pub(super) Handle<Arc<adapter::Adapter>>);

/// Makes an adapter.
///
/// @param context May be destroyed before the adapter.
/// @param desc Geometry and element types.
/// @param adapter Receives the handle; written on success alone. Destroy it by `adalora_adapter_destroy`.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` names the field, what it held and what it may hold.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_create(
    context: Option<NonNull<Context>>,
    desc: *const AdapterDesc,
    adapter: Option<&mut MaybeUninit<*mut Adapter>>,
) -> Status {
    guard("adalora_adapter_create", || {
        let slot = output(adapter, "adapter")?;
        let context = super::guard::shared(context, "context")?.0.get(Kind::Context, "context")?;
        // SAFETY: the caller passes a readable descriptor or null, as the documentation asks.
        let geometry = unsafe { read::geometry(desc) }?;
        let object = Arc::new(adapter::Adapter::new(Arc::clone(context), geometry));
        slot.write(Box::into_raw(Box::new(Adapter(Handle::new(Kind::Adapter, object)))));
        Ok(())
    })
}

/// Destroys an adapter; NULL is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_destroy(adapter: Option<NonNull<Adapter>>) {
    // SAFETY: the caller gives up the handle; its kind is checked before it is freed.
    guard_void("adalora_adapter_destroy", || unsafe {
        super::guard::destroy(adapter, Kind::Adapter, "adapter", |a| &a.0)
    });
}

/// Writes the initial triplets, PEFT's `reset_lora_parameters`: A and B normal with deviation 0.02, E zero.
///
/// Each element is a function of the seed and of its place in the whole layer, so that tensor-parallel shares fit
/// together.
///
/// @param params Receives them; of `param_dtype`, or float32 for a master copy of half-precision parameters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_initialize(
    adapter: Option<&Adapter>,
    params: *const Triplets,
    seed: u64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_adapter_initialize", || {
        let adapter = required(adapter, "adapter")?.0.get(Kind::Adapter, "adapter")?;
        // SAFETY: the caller passes readable triplets or null, as the documentation asks.
        let params = unsafe { read::triplets(params, "params") }?;
        adapter.initialize(&params, seed, stream.into())
    })
}

/// Delta weight: `scaling * B diag(E) A`, PEFT's `get_delta_weight`.
///
/// @param params Parameters, of `param_dtype`.
/// @param scaling 0: the adapter's own.
/// @param fan_in_fan_out 0: w is [out_local, in_local]. 1: w is [in_local, out_local] (transformers' Conv1D).
/// @param accumulate 0: w is overwritten. 1: the delta is added to it.
/// @param w Of any element type; rounded once, from the compute type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_delta_weight(
    adapter: Option<&Adapter>,
    params: *const Triplets,
    scaling: f64,
    fan_in_fan_out: i32,
    accumulate: i32,
    w: *const Matrix,
    stream: *mut c_void,
) -> Status {
    guard("adalora_adapter_delta_weight", || {
        let adapter = required(adapter, "adapter")?.0.get(Kind::Adapter, "adapter")?;
        // SAFETY: the caller passes readable triplets and matrix or null, as the documentation asks.
        let (params, w) = unsafe { (read::triplets(params, "params")?, read::matrix(w, "w")?) };
        let layout = Layout::from_code(fan_in_fan_out)?;
        let accumulate = read::flag(accumulate, "accumulate")?;
        adapter.delta_weight(&params, scaling, layout, accumulate, &w, stream.into())
    })
}

/// Adds the delta weight to a base weight: PEFT's `merge`.
///
/// @param w The base weight, in either layout, of any element type.
/// @param backup As w: receives the base as it was, so that `adalora_adapter_unmerge` restores it exactly. NULL: none
/// is kept.
/// @param non_finite One value, set to 1 where a merged element is not finite, else left alone (PEFT's `safe_merge`; w
/// is written all the same, and the backup brings it back); NULL: not looked for.
///
/// The other parameters are as in `adalora_adapter_delta_weight`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_merge(
    adapter: Option<&Adapter>,
    params: *const Triplets,
    scaling: f64,
    fan_in_fan_out: i32,
    w: *const Matrix,
    backup: *const Matrix,
    non_finite: *mut f32,
    stream: *mut c_void,
) -> Status {
    guard("adalora_adapter_merge", || {
        let adapter = required(adapter, "adapter")?.0.get(Kind::Adapter, "adapter")?;
        // SAFETY: the caller passes readable triplets and matrices or null, as the documentation asks.
        let (params, w, backup) = unsafe {
            (read::triplets(params, "params")?, read::matrix(w, "w")?, read::optional_matrix(backup, "backup")?)
        };
        let layout = Layout::from_code(fan_in_fan_out)?;
        let non_finite = read::one_or_null(non_finite, "non_finite")?;
        adapter.merge(&params, scaling, layout, &w, backup.as_ref(), non_finite, stream.into())
    })
}

/// Takes the delta weight out of a base weight again: PEFT's `unmerge`.
///
/// @param backup What `adalora_adapter_merge` kept: w becomes its copy, bit for bit, and `params` may be NULL. NULL:
/// the delta weight is subtracted, which leaves a rounding error where w has few bits.
///
/// The other parameters are as in `adalora_adapter_delta_weight`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_unmerge(
    adapter: Option<&Adapter>,
    params: *const Triplets,
    scaling: f64,
    fan_in_fan_out: i32,
    w: *const Matrix,
    backup: *const Matrix,
    stream: *mut c_void,
) -> Status {
    guard("adalora_adapter_unmerge", || {
        let adapter = required(adapter, "adapter")?.0.get(Kind::Adapter, "adapter")?;
        let layout = Layout::from_code(fan_in_fan_out)?;
        // SAFETY: the caller passes readable triplets and matrices or null, as the documentation asks.
        let (w, backup) = unsafe { (read::matrix(w, "w")?, read::optional_matrix(backup, "backup")?) };
        match backup {
            Some(backup) => adapter.restore(layout, &w, &backup, stream.into()),
            None => {
                // SAFETY: as above.
                let params = unsafe { read::triplets(params, "params") }?;
                adapter.unmerge(&params, scaling, layout, &w, stream.into())
            }
        }
    })
}

/// Sizes that a forward or backward call with these adapters needs.
///
/// @param calls Only the adapters are read.
/// @param stride Bytes from one element of `calls` to the next: `sizeof(adalora_call_t)`.
/// @param n Elements of `calls`, 1 to 64.
/// @param tokens Rows of x.
/// @param saved Receives n values: bytes of `h`, and of `g`, of each adapter; NULL: not asked for.
/// @param workspace Receives the bytes of workspace that serve `adalora_adapter_forward` and
/// `adalora_adapter_backward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_sizes(
    calls: *const Call,
    stride: usize,
    n: i64,
    tokens: i64,
    saved: *mut usize,
    workspace: Option<&mut MaybeUninit<usize>>,
) -> Status {
    guard("adalora_adapter_sizes", || {
        let workspace = output(workspace, "workspace")?;
        let saved = read::one_or_null(saved, "saved")?;
        // SAFETY: the caller passes n readable descriptors at that stride, as the documentation asks.
        let adapters = unsafe { read::call_adapters(calls, stride, n) }?;
        let sizes = adapter::sizes(&adapters, read::count(tokens, "tokens")?)?;
        // SAFETY: `saved` has room for n values or is null, as the documentation asks.
        unsafe { read::write_all(saved, &sizes.saved) };
        workspace.write(sizes.workspace);
        Ok(())
    })
}

/// Forward: `y += scaling * ((x A^T) * E) B^T` for every adapter of the call; x is read once for all of them.
///
/// With dropout, x stands for the masked and scaled input throughout. Triplets whose E is 0 add nothing to y, even
/// where h is not finite.
///
/// @param calls n descriptors, `stride` bytes apart: `adapter`, `params`, `y`, `h`, and where wanted `scaling`,
/// `pattern`, `dropout`.
/// @param stages `ADALORA_STAGE_BOTH`; or `ADALORA_STAGE_PROJECT` (writes h; y is not read), then, once tensor-parallel
/// processes have summed their h, `ADALORA_STAGE_EXPAND` (reads h; x may be NULL).
/// @param x [tokens, in_local], of `activation_dtype`.
/// @param workspace Memory of the backend, at least as large as `adalora_adapter_sizes` says, aligned to 64 bytes.
/// @param bytes Its size.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT`, before anything is computed, for a wrong shape, type, alignment, overlap
/// or size.
///
/// Outputs (y, h) and workspace must not overlap each other or anything that is read; columns of one larger matrix do
/// not overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_forward(
    calls: *const Call,
    stride: usize,
    n: i64,
    stages: i32,
    x: *const Matrix,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> Status {
    guard("adalora_adapter_forward", || {
        let stages = read::stages(stages)?;
        let mut shares = ArrayVec::new();
        // SAFETY: the caller passes n readable descriptors at that stride, as the documentation asks.
        unsafe { read::calls(calls, stride, n, Direction::Forward, stages, &mut shares) }?;
        // SAFETY: the caller passes a readable matrix or null, as the documentation asks.
        let x = unsafe { read::optional_matrix(x, "x") }?;
        let workspace = read::buffer(workspace, bytes, "workspace")?;
        adapter::forward(&shares, stages, x, workspace, stream.into())
    })
}

/// Backward, for every adapter of the call: `g = scaling * dy B`; `dA += diag(E) g^T x`; `dE += colsum(g * h)`;
/// `dB += scaling * dy^T (h * E)`; `dx += sum over adapters of (g * E) A`.
///
/// @param calls n descriptors, `stride` bytes apart: `adapter`, `params`, `grads`, `dy`, `h`, and where wanted `g`,
/// `scaling`, `pattern`, `dropout`, the last three as forward had them. `y` is not read.
/// @param stages `ADALORA_STAGE_BOTH`; or `ADALORA_STAGE_PROJECT` (reads dy and h, writes g and dB), then, once
/// tensor-parallel processes have summed their g, `ADALORA_STAGE_EXPAND` (reads x, g and h, writes dA, dE and dx; dy
/// may be left out).
/// @param accumulate 1: gradients are added to. 0: they are overwritten, with zeros where there is no token.
/// @param x [tokens, in_local], as forward had it. May be NULL in `ADALORA_STAGE_PROJECT`.
/// @param dx [tokens, in_local], added to; NULL: not wanted.
/// @param workspace As in `adalora_adapter_forward`.
///
/// The same bits for any number of threads. Outputs (grads, g, dx) and workspace must not overlap each other or
/// anything that is read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_adapter_backward(
    calls: *const Call,
    stride: usize,
    n: i64,
    stages: i32,
    accumulate: i32,
    x: *const Matrix,
    dx: *const Matrix,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> Status {
    guard("adalora_adapter_backward", || {
        let stages = read::stages(stages)?;
        let accumulate = read::flag(accumulate, "accumulate")?;
        let mut shares = ArrayVec::new();
        // SAFETY: the caller passes n readable descriptors at that stride, as the documentation asks.
        unsafe { read::calls(calls, stride, n, Direction::Backward, stages, &mut shares) }?;
        // SAFETY: the caller passes readable matrices or null, as the documentation asks.
        let (x, dx) = unsafe { (read::optional_matrix(x, "x")?, read::optional_matrix(dx, "dx")?) };
        let workspace = read::buffer(workspace, bytes, "workspace")?;
        adapter::backward(&shares, stages, accumulate, x, dx, workspace, stream.into())
    })
}
