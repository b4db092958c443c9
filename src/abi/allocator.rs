//! `adalora_allocator_t`: the rank allocator over the adapters of a model.

use super::context::Context;
use super::guard::{self, Handle, Kind, guard, guard_void, output, required, shared};
use super::read;
use super::types::{AllocatorDesc, Hyper, Report, Slice, Status, Step};
use crate::allocator;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// Rank allocator over the adapters of a model: schedule, importance, selection, and with them the optimiser. May be
/// used from any thread; a call whose parameter is not const runs alone on the object.
pub struct Allocator(pub(super) Handle<allocator::Allocator>);

/// Makes a rank allocator.
///
/// @param context May be destroyed before the allocator.
/// @param desc Adapters in order, schedule, smoothing.
/// @param allocator Receives the handle; written on success alone. Destroy it by `adalora_allocator_destroy`.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` for a schedule or smoothing that makes no sense, with the field, what it
/// held and what it may hold.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_create(
    context: Option<NonNull<Context>>,
    desc: *const AllocatorDesc,
    allocator: Option<&mut MaybeUninit<*mut Allocator>>,
) -> Status {
    guard("adalora_allocator_create", || {
        let slot = output(allocator, "allocator")?;
        let context = shared(context, "context")?.0.get(Kind::Context, "context")?;
        // SAFETY: the caller passes a readable descriptor and array of adapters or null, as the documentation asks.
        let (config, adapters) = unsafe { read::allocator_config(desc) }?;
        let object = allocator::Allocator::new(context, config, &adapters)?;
        slot.write(Box::into_raw(Box::new(Allocator(Handle::new(Kind::Allocator, object)))));
        Ok(())
    })
}

/// Destroys an allocator; NULL is nothing. The bound buffers are the caller's and stay as they are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_destroy(allocator: Option<NonNull<Allocator>>) {
    // SAFETY: the caller gives up the handle; its kind is checked before it is freed.
    guard_void("adalora_allocator_destroy", || unsafe {
        guard::destroy(allocator, Kind::Allocator, "allocator", |a| &a.0)
    });
}

/// Sizes of the buffers that `adalora_allocator_bind` and the calls after it take.
///
/// @param n_slices How many slices will be bound.
/// @param state Receives the bytes of the state: pattern, Adam's clocks, counters.
/// @param workspace Receives the bytes of the workspace, whose contents need not be kept between calls on the CPU.
/// @param gram Receives the bytes of the Gram matrices: for each adapter in order `A A^T`, then `B^T B`, [rank, rank]
/// each, float64, without gaps.
///
/// Each may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_sizes(
    allocator: Option<&Allocator>,
    n_slices: i64,
    state: Option<&mut MaybeUninit<usize>>,
    workspace: Option<&mut MaybeUninit<usize>>,
    gram: Option<&mut MaybeUninit<usize>>,
) -> Status {
    guard("adalora_allocator_sizes", || {
        let allocator = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        let sizes = allocator.sizes(read::count(n_slices, "n_slices")?)?;
        for (slot, bytes) in [(state, sizes.state), (workspace, sizes.workspace), (gram, sizes.gram)] {
            if let Some(slot) = slot {
                slot.write(bytes);
            }
        }
        Ok(())
    })
}

/// Tells the allocator where everything lies. The one call that keeps the caller's addresses: they stay in use until
/// the next bind or the allocator's end, and the descriptors themselves are copied. May allocate and synchronise. To be
/// repeated when a buffer moves.
///
/// On CUDA the workspace is the allocator's alone until then, since it holds where everything lies: calls that were
/// captured into a graph work on what is bound there when they run, in the state and with the slices' ranges and types that
/// they were captured with; where these change, or the workspace, capture anew. A bind waits for the stream, and cannot be
/// captured; but one that finds all as it was bound before, gradients alone elsewhere, only enqueues, may be captured, and
/// does not look at the state, but that zeros begin a run.
///
/// @param state `adalora_allocator_sizes` bytes, aligned to 64. Zeros are a fresh run; otherwise what an earlier bind of
/// the same adapters left there, which goes on (also in a copy at another address). What begins otherwise is refused.
/// @param workspace Likewise sized and aligned; any contents, but on CUDA, where it is what was bound before, as it was
/// left. Not to be shared with another allocator there.
/// @param slices n descriptors, `stride` bytes apart. Their order does not matter. Ranges of one matrix must not
/// overlap.
/// @param hypers n_hyper descriptors, `hyper_stride` bytes apart; none are needed where AdamW is never asked for.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` names the slice and field; the earlier binding then stays. So it does
/// after `ADALORA_ERROR_INCOMPLETE`, unless its workspace was written to: then the text says that nothing is bound.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_bind(
    allocator: Option<NonNull<Allocator>>,
    state: *mut c_void,
    workspace: *mut c_void,
    slices: *const Slice,
    stride: usize,
    n: i64,
    hypers: *const Hyper,
    hyper_stride: usize,
    n_hyper: i64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_bind", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes readable descriptors at those strides, as the documentation asks.
        let (slices, hypers) =
            unsafe { (read::slices(slices, stride, n)?, read::hypers(hypers, hyper_stride, n_hyper)?) };
        allocator.bind(read::address(state), read::address(workspace), &slices, &hypers, stream.into())
    })
}

/// The budget that the schedule sets for a step, on the host; touches no buffer.
///
/// `step <= tinit`: the initial budget. Up to `end = total_step - tfinal`: `trunc((initial - target) * pow(1 - (step -
/// tinit) / (end - tinit), 3) + target)` in float64, in this order, as PEFT computes it. Later: the target.
///
/// @param budget Receives the budget, in the allocator's unit.
/// @param masks Receives 1 where a mask falls on the step (`step % delta_t == 0` while the budget falls; every step
/// after the end), else 0. NULL: not asked for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_budget(
    allocator: Option<&Allocator>,
    step: i64,
    budget: Option<&mut MaybeUninit<i64>>,
    masks: Option<&mut MaybeUninit<i32>>,
) -> Status {
    guard("adalora_allocator_budget", || {
        let budget = output(budget, "budget")?;
        let (value, mask) = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?.schedule().at(step);
        budget.write(value);
        if let Some(masks) = masks {
            masks.write(i32::from(mask));
        }
        Ok(())
    })
}

/// Gram matrices `A A^T` and `B^T B` of every adapter, summed over the owned elements that are not replicas.
///
/// Needs whole columns: for each column of an adapter's A that this process owns it owns all rank rows, and each slice of
/// B holds whole rows.
///
/// @param gram Receives them; its size and layout are those of `adalora_allocator_sizes`. Processes that share the
/// parameters sum it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_gram(
    allocator: Option<NonNull<Allocator>>,
    gram: *mut f64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_gram", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.gram(read::address(gram), stream.into())
    })
}

/// Orthogonal regularisation: the penalty `weight / (2 n) * (sum ||A A^T - I|| + ||B^T B - I||)` over the n adapters,
/// Frobenius norms, and its gradient times `factor` added to the gradients of A and B (paper: equation 4 without the
/// square, as PEFT has it). A norm of 0 has gradient 0.
///
/// Call it once per optimiser step: after gradients are reduced over processes, before their norm is taken.
///
/// @param gram As `adalora_allocator_gram` wrote it, summed where sharded; NULL: computed here.
/// @param weight PEFT's `orth_reg_weight`: finite, 0 or more.
/// @param factor One value, the loss scale that the gradients carry; NULL: 1.
/// @param value Receives one value, the penalty, without `factor`; NULL: not wanted.
///
/// The pointers are in the memory of the context's backend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_orthogonality(
    allocator: Option<NonNull<Allocator>>,
    gram: *const f64,
    weight: f64,
    factor: *const f64,
    value: *mut f64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_orthogonality", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.orthogonality(
            read::optional_address(gram),
            weight,
            read::one_or_null(factor, "factor")?,
            read::one_or_null(value, "value")?,
            stream.into(),
        )
    })
}

/// Adds the sum of squares of all owned gradients that are not replicas, as they are (times the loss scale), to a sum
/// that the trainer shares with its other parameters, and reports what is not finite. Summed in float64, in an order
/// that does not depend on threads.
///
/// Set the sum and the flag to 0 at the beginning of each step.
///
/// @param has_grad [n_adapters], 0: that adapter's gradients are not read; NULL: all are.
/// @param sum_of_squares One value, added to.
/// @param found_inf One value, set to 1 where a gradient is not finite, else left alone; NULL: not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_gradient_norm(
    allocator: Option<NonNull<Allocator>>,
    has_grad: *const u8,
    sum_of_squares: *mut f64,
    found_inf: *mut f32,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_gradient_norm", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.gradient_norm(
            read::optional_address(has_grad),
            read::one(sum_of_squares, "sum_of_squares")?,
            read::one_or_null(found_inf, "found_inf")?,
            stream.into(),
        )
    })
}

/// AdamW, if asked for, and importance, in one pass over all slices.
///
/// AdamW is PyTorch's: `p *= 1 - lr * weight_decay`; m and v from the gradient times `grad_factor`; `p -= lr / (1 -
/// beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)` with k the number of updates that this adapter has had.
/// Importance, while `step < total_step - tfinal` and the pattern is not final, from the parameters after that and the
/// same gradients: `s = abs(p * g)`; `exp_avg_ipt = beta1 * exp_avg_ipt + (1 - beta1) * s`; `exp_avg_unc = beta2 *
/// exp_avg_unc + (1 - beta2) * abs(s - exp_avg_ipt)`. An adapter without a gradient is left alone by AdamW, and its s
/// is 0. A step with `found_inf` changes nothing and is counted as skipped.
///
/// @param with_adamw 1: AdamW, then importance. 0: importance alone, for trainers with an optimiser of their own, from
/// the parameters as they stand.
/// @return `ADALORA_ERROR_INVALID_STATE` where nothing is bound, or AdamW is asked for and moments or hyperparameters
/// are not bound.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_update(
    allocator: Option<NonNull<Allocator>>,
    step: *const Step,
    with_adamw: i32,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_update", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes a readable descriptor or null, as the documentation asks.
        let step = unsafe { read::step(step) }?;
        allocator.update(&step, read::flag(with_adamw, "with_adamw")?, stream.into())
    })
}

/// Scores of all triplets of the model, adapter by adapter: `s(E) + mean(s(A row)) + mean(s(B column))` with `s =
/// exp_avg_ipt * exp_avg_unc`, in float64, from the owned elements that are not replicas; always finite.
///
/// @param scores Receives the total rank's values. Processes that share the parameters sum it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_scores(
    allocator: Option<&Allocator>,
    scores: *mut f64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_scores", || {
        let allocator = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.scores(read::address(scores), stream.into())
    })
}

/// Does what the schedule says for the step: where a mask falls on it, keeps exactly `budget` triplets (highest scores,
/// ties by lower adapter, then lower triplet; in parameters, the longest prefix of that order whose cost fits), and
/// sets E of the others to 0. The first step at or past `total_step - tfinal` takes the last mask and clears the
/// averages; from then on the pattern is final and applied at every step.
///
/// @param step Of it, only `step->step` is used. Call it once per step, also after a step with `found_inf`.
/// @param scores As `adalora_allocator_scores` wrote them, summed where sharded; NULL: computed here where they are
/// needed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_select(
    allocator: Option<NonNull<Allocator>>,
    step: *const Step,
    scores: *const f64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_select", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes a readable descriptor or null, as the documentation asks.
        let step = unsafe { read::step(step) }?;
        allocator.select(&step, read::optional_address(scores), stream.into())
    })
}

/// `adalora_allocator_update`, `adalora_allocator_scores` and `adalora_allocator_select` in one call, with the same
/// bits. PEFT's `update_and_allocate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_step(
    allocator: Option<NonNull<Allocator>>,
    step: *const Step,
    with_adamw: i32,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_step", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes a readable descriptor or null, as the documentation asks.
        let step = unsafe { read::step(step) }?;
        allocator.step(&step, read::flag(with_adamw, "with_adamw")?, stream.into())
    })
}

/// Takes the last mask now, as crossing `total_step - tfinal` would: target budget, averages cleared, pattern final.
/// Nothing where it is final already.
///
/// @param scores As in `adalora_allocator_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_finalize(
    allocator: Option<NonNull<Allocator>>,
    scores: *const f64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_finalize", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.finalize(read::optional_address(scores), stream.into())
    })
}

/// Begins a new run: pattern, clocks, counters, averages and bound moments as at the start. Parameters stay as they
/// are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_reset(allocator: Option<NonNull<Allocator>>, stream: *mut c_void) -> Status {
    guard("adalora_allocator_reset", || {
        shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?.reset(stream.into())
    })
}

/// A hash of what every process must agree on: pattern, whether it is final, last step.
///
/// @param digest Receives one value, in the memory of the context's backend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_digest(
    allocator: Option<&Allocator>,
    digest: *mut u64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_digest", || {
        let allocator = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.digest(read::one(digest, "digest")?, stream.into())
    })
}

/// Reads back where the run stands, into host memory. Waits for the stream.
///
/// @param pattern Receives the total rank's values, adapter by adapter: 1 where the triplet is kept, else 0.
/// @param ranks Receives n_adapters values: triplets kept.
/// @param adam_steps Receives n_adapters values: updates that AdamW applied.
/// @param report Receives counters; its `struct_size` is set by the caller.
///
/// Each may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_read_sync(
    allocator: Option<&Allocator>,
    pattern: *mut u8,
    ranks: *mut i64,
    adam_steps: *mut i64,
    report: *mut Report,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_read_sync", || {
        let allocator = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes a writable report that begins with its size, or null, as the documentation asks.
        let size = unsafe { read::report_size(report) }?;
        let pattern = read::one_or_null(pattern, "pattern")?;
        let ranks = read::one_or_null(ranks, "ranks")?;
        let adam_steps = read::one_or_null(adam_steps, "adam_steps")?;
        let snapshot = allocator.read_sync(stream.into())?;
        // SAFETY: each pointer has room for what the documentation says, or is null; `size` is the report's own.
        unsafe {
            read::write_all(pattern, &snapshot.pattern);
            read::write_all(ranks, &snapshot.ranks);
            read::write_all(adam_steps, &snapshot.adam_steps);
            read::write_report(report, size, &snapshot.counters);
        }
        Ok(())
    })
}

/// Sets the pattern: from another process, or from a checkpoint. E of the triplets that are not kept becomes 0.
///
/// @param pattern The total rank's values, adapter by adapter, in the memory of the context's backend; not 0 where the
/// triplet is kept.
/// @param is_final 1: the pattern is final from now on, and the averages are cleared. 0: a later mask may choose anew,
/// unless it was final already.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_set_pattern(
    allocator: Option<NonNull<Allocator>>,
    pattern: *const u8,
    is_final: i32,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_set_pattern", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        allocator.set_pattern(read::address(pattern), read::flag(is_final, "is_final")?, stream.into())
    })
}

/// Sets how many updates led to the bound moments, for moments that another optimiser made: AdamW's bias correction
/// goes on from there. Waits for the stream.
///
/// @param adam_steps n_adapters values in host memory, 0 or more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_set_adam_steps_sync(
    allocator: Option<NonNull<Allocator>>,
    adam_steps: *const i64,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_set_adam_steps_sync", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes as many readable values, as the documentation asks.
        let adam_steps = unsafe { read::values(adam_steps, allocator.n_adapters(), "adam_steps") }?;
        allocator.set_adam_steps_sync(adam_steps, stream.into())
    })
}

/// Hands a run over to an allocator of the triplets that are kept alone, after the last mask: from then on forward,
/// backward and everything else cost what those cost, and penalty and norm cover them alone. Reads the pattern back.
/// Waits for the stream.
///
/// Before the call: ask `adalora_allocator_read_sync` for the ranks, make adapters of these (with `ranknum` the rank at
/// creation, so that the scaling stays) and an allocator over them with the same descriptor, and bind it, with memory
/// for state and arrays of its own; where A's rows and B's columns are sharded, with what is kept of each slice. An
/// allocator over compacted adapters counts its budget as before, and its pattern is final from the start, also after
/// `adalora_allocator_reset`.
///
/// The call copies what is kept of `p`, `p_low`, `g`, the averages, and `m` and `v` where both allocators have them, and
/// sets clocks and counters. The allocator itself stays as it is; it, its adapters and its buffers are of no use then.
///
/// @param allocator Bound, its pattern final.
/// @param compacted Bound, of the same context.
/// @return `ADALORA_ERROR_INVALID_STATE` where the pattern is not final, or either is not bound;
/// `ADALORA_ERROR_INVALID_ARGUMENT` names what of `compacted` does not fit the pattern. Nothing is written then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_compact_sync(
    allocator: Option<&Allocator>,
    compacted: Option<NonNull<Allocator>>,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_compact_sync", || {
        let allocator = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        let compacted = shared(compacted, "compacted")?.0.get(Kind::Allocator, "compacted")?;
        allocator.compact_sync(compacted, stream.into())
    })
}

/// Writes the allocator's state (pattern, clocks, counters) as bytes that any machine reads, into host memory. With the
/// tensors that the caller owns (parameters, moments, averages) a run resumed from them continues bit for bit. Waits
/// for the stream.
///
/// @param bytes Receives them; NULL to ask for the size alone.
/// @param size In: the room at `bytes`. Out: the bytes needed, also where the room is too small.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` where the room is too small; then `bytes` is not written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_save_state_sync(
    allocator: Option<&Allocator>,
    bytes: *mut c_void,
    size: Option<&mut usize>,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_save_state_sync", || {
        let allocator = required(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        let image = allocator.save_state_sync(stream.into())?;
        // SAFETY: `bytes` has room for `*size` bytes or is null, as the documentation asks.
        unsafe { guard::copy_out(&image, false, bytes.cast(), size, ["bytes", "size"]) }
    })
}

/// Reads what `adalora_allocator_save_state_sync` wrote into the bound state: bind first, with parameters, moments and
/// averages restored. Waits for the stream.
///
/// A state from before compaction, whose pattern is final, is taken by compacted adapters that have the ranks that it
/// keeps.
///
/// @param bytes Host memory; not trusted: length, version, checksum and every value are checked.
/// @return `ADALORA_ERROR_CORRUPT_DATA` for damaged bytes; `ADALORA_ERROR_INVALID_ARGUMENT` for a state of adapters
/// with other ranks. The state is then as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_allocator_load_state_sync(
    allocator: Option<NonNull<Allocator>>,
    bytes: *const c_void,
    size: usize,
    stream: *mut c_void,
) -> Status {
    guard("adalora_allocator_load_state_sync", || {
        let allocator = shared(allocator, "allocator")?.0.get(Kind::Allocator, "allocator")?;
        // SAFETY: the caller passes `size` readable bytes, as the documentation asks.
        let image = unsafe { read::bytes(bytes, size, "bytes") }?;
        allocator.load_state_sync(image, stream.into())
    })
}
