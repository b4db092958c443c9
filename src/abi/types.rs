//! The structures that cross the boundary, as C sees them.
//!
//! Two kinds. *Descriptors* begin with `struct_size` and may grow: a caller compiled against an older header passes
//! fewer bytes, and what is missing counts as zero. *Values* (`Matrix`, `Triplets`, `Dropout`) are fixed for ever,
//! because they are embedded in descriptors.

use super::adapter::Adapter;
use std::ffi::{c_char, c_void};

/// Outcome of a call: `ADALORA_SUCCESS` or one of the `ADALORA_ERROR_*` numbers. Numbers are never reused.
pub type Status = i32;

/// Element type: one of `ADALORA_FLOAT32`, `ADALORA_FLOAT64`, `ADALORA_BFLOAT16`, `ADALORA_FLOAT16`. 0 is invalid
/// unless a field says otherwise.
pub type DtypeCode = i32;

/// IEEE 754 binary32.
pub const ADALORA_FLOAT32: i32 = 1;
/// IEEE 754 binary64.
pub const ADALORA_FLOAT64: i32 = 2;
/// bfloat16: the upper half of a binary32.
pub const ADALORA_BFLOAT16: i32 = 3;
/// IEEE 754 binary16.
pub const ADALORA_FLOAT16: i32 = 4;

/// One byte, 0 or 1. This type and those below are those of tensors in checkpoints; nothing computes with them.
pub const ADALORA_BOOL: i32 = 5;
/// As PyTorch's type of the name.
pub const ADALORA_UINT8: i32 = 6;
/// As PyTorch's type of the name.
pub const ADALORA_INT8: i32 = 7;
/// As PyTorch's type of the name.
pub const ADALORA_UINT16: i32 = 8;
/// As PyTorch's type of the name.
pub const ADALORA_INT16: i32 = 9;
/// As PyTorch's type of the name.
pub const ADALORA_UINT32: i32 = 10;
/// As PyTorch's type of the name.
pub const ADALORA_INT32: i32 = 11;
/// As PyTorch's type of the name.
pub const ADALORA_UINT64: i32 = 12;
/// As PyTorch's type of the name.
pub const ADALORA_INT64: i32 = 13;
/// As PyTorch's type of the name: two of binary32.
pub const ADALORA_COMPLEX64: i32 = 14;
/// As PyTorch's type of the name.
pub const ADALORA_FLOAT8_E4M3FN: i32 = 15;
/// As PyTorch's type of the name.
pub const ADALORA_FLOAT8_E5M2: i32 = 16;
/// As PyTorch's type of the name.
pub const ADALORA_FLOAT8_E8M0FNU: i32 = 17;
/// As PyTorch's type of the name.
pub const ADALORA_FLOAT8_E4M3FNUZ: i32 = 18;
/// As PyTorch's type of the name.
pub const ADALORA_FLOAT8_E5M2FNUZ: i32 = 19;

/// `files`: `adapter_config.json` and `adapter_model.safetensors`, as PEFT has them.
pub const ADALORA_FILES_ADAPTER: i32 = 1;
/// `files`: `training_state.safetensors`, what training needs beside them.
pub const ADALORA_FILES_STATE: i32 = 2;
/// `files`: all of them.
pub const ADALORA_FILES_ALL: i32 = 3;

/// The backend that computes on the host's processor, over host memory.
pub const ADALORA_BACKEND_CPU: i32 = 1;
/// The backend that computes on a CUDA device, over device memory.
pub const ADALORA_BACKEND_CUDA: i32 = 2;

/// `stages`: the products with the first factor, `h = x A^T` forward, `g = scaling dy B` backward.
pub const ADALORA_STAGE_PROJECT: i32 = 1;
/// `stages`: the products with the second factor, which read h (forward) or g and h (backward).
pub const ADALORA_STAGE_EXPAND: i32 = 2;
/// `stages`: the whole pass.
pub const ADALORA_STAGE_BOTH: i32 = 3;

/// The budget counts triplets, as PEFT's does. The default.
pub const ADALORA_BUDGET_TRIPLETS: i32 = 1;
/// The budget counts parameters: a triplet costs `in_features + out_features + 1`.
pub const ADALORA_BUDGET_PARAMETERS: i32 = 2;

/// `adalora_slice_t.matrix`: right vectors, [rank, in_features].
pub const ADALORA_MATRIX_A: i32 = 1;
/// `adalora_slice_t.matrix`: values, [rank].
pub const ADALORA_MATRIX_E: i32 = 2;
/// `adalora_slice_t.matrix`: left vectors, [out_features, rank].
pub const ADALORA_MATRIX_B: i32 = 3;

/// Log level: something went on with less than was asked for, such as fewer threads.
pub const ADALORA_LOG_WARNING: i32 = 1;
/// Log level: what was chosen, once per object.
pub const ADALORA_LOG_INFO: i32 = 2;

/// Runs `body(data)` on `threads` threads at once, the calling one among them, and returns when all have returned: the
/// shape of `GOMP_parallel`, so that the library can compute on OpenMP's, PyTorch's or a trainer's own threads. `flags`
/// is 0. Fewer threads, down to the calling one alone, change the speed and not the results. It must not throw.
pub type ParallelFn = Option<
    unsafe extern "C" fn(
        body: Option<unsafe extern "C" fn(data: *mut c_void)>,
        data: *mut c_void,
        threads: u32,
        flags: u32,
    ),
>;

/// Receives the library's messages; it writes to no stream itself. `text` is valid during the call alone. May be called
/// from any thread that is inside a call of the library, and must neither call the library nor throw.
pub type LogFn = Option<unsafe extern "C" fn(user: *mut c_void, level: i32, text: *const c_char)>;

/// A row-major matrix in the caller's memory: element (i, j) stands at `data + (i * row_stride + j) * sizeof(element)`.
///
/// `row_stride` counts elements; 0 means `columns`, and anything else must be at least `columns`. `data` is aligned to
/// its element, and may be NULL where `rows` or `columns` is 0. A *vector* of n elements may be given as 1 x n or as n
/// x 1.
///
/// A value, not a descriptor: it never grows.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Matrix {
    /// First element: a host pointer on the CPU backend, a device pointer on the CUDA one.
    pub data: *mut c_void,
    /// Number of rows.
    pub rows: i64,
    /// Number of columns.
    pub columns: i64,
    /// Elements from one row to the next; 0: `columns`.
    pub row_stride: i64,
    /// Element type.
    pub dtype: DtypeCode,
    /// Must be 0.
    pub reserved: i32,
}

/// The triplets of one adapter, or their gradients. A value: it never grows.
///
/// Under tensor parallelism `A` and `B` are this process's share: `in_local` columns of A, `out_local` rows of B.
#[repr(C)]
#[derive(Clone, Copy)]
#[expect(non_snake_case, reason = "the paper's names")]
pub struct Triplets {
    /// Right vectors, [rank, in_local].
    pub A: Matrix,
    /// Values: a vector of `rank` elements (PEFT's `lora_E` is rank x 1).
    pub E: Matrix,
    /// Left vectors, [out_local, rank].
    pub B: Matrix,
}

/// Where the dropout mask of one call stands. Read only if the adapter's dropout is above 0. A value: it never grows.
///
/// The mask of element (t, c) of x is a pure function of (`*seed`, `*offset`, `token0` + t, in_begin + c), so that
/// backward makes the same one, and every backend too: Philox4x32-10 with key (low, high word of seed) on the counter
/// (column / 4, token, low, high word of offset) gives the words of four neighbouring columns; the element is dropped
/// where its word is below `dropout * 2^32` (rounded to the nearest integer), and otherwise multiplied by `1 / (1 -
/// dropout)`. No call advances seed or offset.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Dropout {
    /// One value in the memory of the context's backend. Adapters of one call with the same seed and offset drop the same
    /// elements: give each its own, unless masks are to be shared.
    pub seed: *const u64,
    /// One value in the memory of the context's backend; usually the step.
    pub offset: *const u64,
    /// Logical number of row 0 of x, where a process sees a part of the tokens. `token0` + tokens is at most 2^32.
    pub token0: i64,
}

/// What a context is made of.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ContextDesc {
    /// `sizeof(adalora_context_desc_t)`.
    pub struct_size: usize,
    /// `ADALORA_BACKEND_CPU` or `ADALORA_BACKEND_CUDA`.
    pub backend: i32,
    /// CUDA: the device's number. Memory and streams are those of its primary context, which CUDA's runtime and PyTorch
    /// use; which context and device are current in the calling thread does not matter, and stays. CPU: 0.
    pub device: i32,
    /// CPU: how many threads compute, the calling one included; 0: as many as the process may run on. At most 1024.
    /// CUDA: 0.
    pub threads: i32,
    /// Must be 0.
    pub reserved: i32,
    /// CUDA: a `cublasHandle_t` of this device, lent by the caller for the context's lifetime, or NULL for our own.
    /// Calls that multiply wait for each other, and nobody else may use it meanwhile. Its stream, math mode and pointer
    /// mode are left as they were found; a workspace that was set on it cannot be read, and is cuBLAS's own afterwards.
    /// Where the process has cuBLAS of both versions, `library_folder` says which one made it. CPU: NULL.
    pub cublas_handle: *mut c_void,
    /// CUDA: the folder in which `libcudart` and `libcublas` lie, or several separated by colons; they are taken from
    /// there and from nowhere else. NULL: those that the process has loaded already, else those of CUDA 13 or of CUDA
    /// 12 that the loader finds: the newest that the driver serves. CPU: NULL.
    pub library_folder: *const c_char,
    /// CPU: the caller's threads, or NULL for a pool of the context's own, which starts at the first computation.
    /// CUDA: NULL.
    pub parallel: ParallelFn,
    /// Receives messages, or NULL.
    pub log: LogFn,
    /// Handed to `log`.
    pub log_user: *mut c_void,
    /// CUDA: 1 lets tensor cores round the operands of float32 products to TF32, which has 10 bits of fraction; 0 does
    /// not. CPU: 0.
    pub tf32: i32,
    /// Must be 0.
    pub reserved_end: i32,
}

/// The geometry of one layer's adapter.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AdapterDesc {
    /// `sizeof(adalora_adapter_desc_t)`.
    pub struct_size: usize,
    /// Input features of the whole layer, at least 1.
    pub in_features: i64,
    /// Output features of the whole layer, at least 1.
    pub out_features: i64,
    /// Triplets (PEFT's `init_r`), 0 or more.
    pub rank: i64,
    /// PEFT's `lora_alpha`: 0 stands for the rank at creation. Not negative.
    pub alpha: f64,
    /// Probability with which an element of the adapter's input is dropped, in [0, 1). There is no evaluation mode:
    /// evaluate with a second adapter of the same geometry and dropout 0, since adapters hold no parameters.
    pub dropout: f64,
    /// Element type of A, E and B as the forward pass reads them.
    pub param_dtype: DtypeCode,
    /// Element type of x, y, dx and dy. `ADALORA_FLOAT64` goes with `ADALORA_FLOAT64` alone; the other three go with
    /// each other.
    pub activation_dtype: DtypeCode,
    /// How many half-precision terms, 1 to 3, stand for a float32 A or B where a backend multiplies in half precision;
    /// 0: 2. The CPU backend multiplies in float32 and rounds neither factor, whatever this says.
    pub operand_terms: i32,
    /// Must be 0.
    pub reserved: i32,
    /// Columns of A in this tensor-parallel process; 0: all of `in_features`.
    pub in_local: i64,
    /// First of them, in the whole layer.
    pub in_begin: i64,
    /// Rows of B in this tensor-parallel process; 0: all of `out_features`.
    pub out_local: i64,
    /// First of them, in the whole layer.
    pub out_begin: i64,
    /// Triplets at creation, PEFT's `ranknum`, the constant divisor of the scaling; 0: `rank`. More than `rank` says that
    /// the adapter was compacted: see `adalora_allocator_compact_sync`.
    pub ranknum: i64,
}

/// One adapter's share in a forward or backward call. All adapters of a call read the same x.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Call {
    /// `sizeof(adalora_call_t)`.
    pub struct_size: usize,
    /// The adapter; each may appear once in a call.
    pub adapter: *const Adapter,
    /// Parameters, of the adapter's `param_dtype`.
    pub params: Triplets,
    /// Backward: gradients, each of `param_dtype` or of the compute type (float64 for float64, else float32). Forward:
    /// not read.
    pub grads: Triplets,
    /// Multiplier of the adapter's output, a number of the compute type; 0: the adapter's own, `(alpha > 0 ? alpha : rank) /
    /// (rank + 1e-5)`.
    pub scaling: f64,
    /// Forward: [tokens, out_local]. Holds the base layer's output; the adapter's is added. Backward: not read.
    pub y: Matrix,
    /// Backward: [tokens, out_local], the gradient for y. Forward: not read.
    pub dy: Matrix,
    /// `h = x A^T`, [tokens, rank] without gaps, of the compute type. The forward pass writes it, backward reads it.
    /// NULL where both stages run in one call: then forward keeps nothing, and backward computes it again.
    pub h: *mut c_void,
    /// `g = scaling dy B`, likewise: written by backward's first stage, read by its second. NULL where both run in one
    /// call.
    pub g: *mut c_void,
    /// [rank], not 0 where the triplet is kept; only where the pattern is final, since masked triplets then cost nothing
    /// and receive no gradient (0 where gradients are overwritten); their columns of h and g are written as 0. NULL: all
    /// are computed.
    pub pattern: *const u8,
    /// Dropout's seed and place.
    pub dropout: Dropout,
}

/// What a rank allocator is made of. The names are PEFT's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AllocatorDesc {
    /// `sizeof(adalora_allocator_desc_t)`.
    pub struct_size: usize,
    /// Number of adapters, at least 1.
    pub n_adapters: i64,
    /// All adapters of the model, over all processes, in an order that every process shares. Adapters may be destroyed
    /// before the allocator.
    pub adapters: *const *const Adapter,
    /// Mean rank per adapter at the end (PEFT's `target_r`): the target budget is `target_rank * n_adapters` triplets,
    /// or their cost.
    pub target_rank: i64,
    /// Steps before the budget begins to fall. `tinit < total_step - tfinal`.
    pub tinit: i64,
    /// Steps at the end during which the pattern is fixed.
    pub tfinal: i64,
    /// Steps of the training run.
    pub total_step: i64,
    /// A mask falls on every step that this number divides, while the budget falls (PEFT's `deltaT`). At least 1.
    pub delta_t: i64,
    /// Smoothing of the sensitivity, in (0, 1). PEFT's default is 0.85.
    pub beta1: f64,
    /// Smoothing of the uncertainty, in (0, 1). PEFT's default is 0.85.
    pub beta2: f64,
    /// `ADALORA_BUDGET_TRIPLETS` (also 0) or `ADALORA_BUDGET_PARAMETERS`.
    pub budget_unit: i32,
    /// 0: this process owns every element, and `adalora_allocator_bind` says which one is missing. 1: it may own a
    /// part.
    pub sharded: i32,
}

/// A range of elements of one adapter's A, E or B that this process owns, and everything that belongs to them.
///
/// Elements are numbered in row-major order over the *whole* matrix ([rank, in_features], [rank] or [out_features,
/// rank]); each pointer addresses element `begin`, and the `end - begin` elements lie without gaps. The state type is
/// float64 for float64 parameters, else float32.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slice {
    /// `sizeof(adalora_slice_t)`.
    pub struct_size: usize,
    /// Position of the adapter in the allocator.
    pub adapter: i64,
    /// First element.
    pub begin: i64,
    /// One past the last element.
    pub end: i64,
    /// `ADALORA_MATRIX_A`, `ADALORA_MATRIX_E` or `ADALORA_MATRIX_B`.
    pub matrix: i32,
    /// Which element of the table of hyperparameters serves it.
    pub hyper: i32,
    /// Element type of `p`: the adapter's `param_dtype` (also 0 where `p_low` is NULL), or float32 where it is the
    /// master of `p_low` (also 0 there).
    pub p_dtype: DtypeCode,
    /// Element type of `g`: `param_dtype` (also 0) or the state type.
    pub g_dtype: DtypeCode,
    /// 1: another process owns these elements too and counts them in scores, Gram matrices and the gradient norm; here
    /// they are updated alone. Else 0.
    pub replica: i32,
    /// Must be 0.
    pub reserved: i32,
    /// Parameters.
    pub p: *mut c_void,
    /// The half-precision copy that the forward pass reads, of `param_dtype`, written whenever AdamW or a mask changes p;
    /// or NULL.
    pub p_low: *mut c_void,
    /// Gradients; orthogonality adds to them.
    pub g: *mut c_void,
    /// AdamW's first moment, of the state type; NULL where AdamW is never asked for.
    pub m: *mut c_void,
    /// AdamW's second moment, likewise.
    pub v: *mut c_void,
    /// Smoothed sensitivity, of the state type.
    pub exp_avg_ipt: *mut c_void,
    /// Smoothed uncertainty of the sensitivity, of the state type.
    pub exp_avg_unc: *mut c_void,
}

/// AdamW's hyperparameters for one group of slices. They have no defaults: 0 means 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Hyper {
    /// `sizeof(adalora_hyper_t)`.
    pub struct_size: usize,
    /// Learning rate: one value in the memory of the context's backend, read at every update.
    pub lr: *const f64,
    /// Decoupled weight decay: one value, read likewise.
    pub weight_decay: *const f64,
    /// Decay of the first moment, in [0, 1). PyTorch's default is 0.9.
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1). PyTorch's default is 0.999.
    pub beta2: f64,
    /// Added to the denominator, 0 or more. PyTorch's default is 1e-8.
    pub eps: f64,
}

/// What changes from step to step: values in the memory of the context's backend, read when the work runs, so that a
/// captured graph sees new ones at each replay.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Step {
    /// `sizeof(adalora_step_t)`.
    pub struct_size: usize,
    /// The trainer's step number, one value; required. It counts from 0 or 1, as the trainer likes, and is compared with
    /// tinit and total_step - tfinal as it stands.
    pub step: *const i64,
    /// Multiplies every gradient: unscaling times clipping, one value; NULL: 1. One that is not finite, in the state type
    /// too, suppresses the step as `found_inf` does.
    pub grad_factor: *const f64,
    /// Above 0 where a gradient anywhere in the model is not finite, one value: then AdamW and importance do nothing
    /// this step. NULL: the library looks itself, at the cost of one more reading of the gradients; a sharded allocator
    /// needs it.
    pub found_inf: *const f32,
    /// [n_adapters], 0 where the adapter has no gradient this step; NULL: all have one.
    pub has_grad: *const u8,
}

/// Where a run stands.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Report {
    /// `sizeof(adalora_report_t)`, set by the caller.
    pub struct_size: usize,
    /// The step of the last selection (`adalora_allocator_select` or `adalora_allocator_step`); -1 before the first.
    pub last_step: i64,
    /// Updates that were suppressed by `found_inf`.
    pub skipped: i64,
    /// Selections whose step was not above the one before: a step counted twice, or a clock that went back.
    pub irregular: i64,
    /// How often the pattern was chosen anew.
    pub selections: i64,
    /// Budget that the schedule sets for the last step, in the allocator's unit; the initial one before the first. What is
    /// kept is in `live_triplets` and `live_parameters`.
    pub budget: i64,
    /// Triplets kept, over all adapters.
    pub live_triplets: i64,
    /// Their parameters: `in_features + out_features + 1` each.
    pub live_parameters: i64,
    /// 1 where a pattern was chosen or set, else 0 (everything is kept).
    pub has_pattern: i32,
    /// 1 where the pattern is final, else 0.
    pub is_final: i32,
}

/// A tensor in a checkpoint, or for one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tensor {
    /// `sizeof(adalora_tensor_t)`.
    pub struct_size: usize,
    /// Its name in the file, of UTF-8: PEFT's begin with "base_model.model.".
    pub name: *const c_char,
    /// To write: its elements in host memory, row-major and without gaps; may be NULL where there is none. Of a checkpoint:
    /// NULL.
    pub data: *const c_void,
    /// `n_dims` extents, 0 or more each.
    pub shape: *const i64,
    /// Number of dimensions, 0 to 64. Without a dimension there is one element.
    pub n_dims: i64,
    /// Bytes of all elements. To write: may be 0 for as many as shape and type say.
    pub bytes: usize,
    /// Element type: any of the `ADALORA_*` types.
    pub dtype: DtypeCode,
    /// Must be 0.
    pub reserved: i32,
}

/// An adapter for a checkpoint.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AdapterEntry {
    /// `sizeof(adalora_adapter_entry_t)`.
    pub struct_size: usize,
    /// Path of its module in the model, such as "encoder.layers.0.query", of UTF-8.
    pub name: *const c_char,
    /// Triplets in host memory, of any of the four types that are computed with: all `rank` of them, of which the file
    /// gets those that the pattern keeps; or these alone, where others were compacted away.
    pub params: Triplets,
    /// Triplets at creation (PEFT's `init_r`), the same for all adapters of a checkpoint.
    pub rank: i64,
    /// [rank], not 0 where the triplet is kept; then E of the others must be 0, so that the file computes what ran. NULL:
    /// all are written, masked ones too, as training needs them that goes on.
    pub pattern: *const u8,
    /// `adalora_checkpoint_export_lora`: multiplier of the adapter's output; 0: what the configuration's `lora_alpha` says.
    /// Otherwise 0.
    pub scaling: f64,
    /// `adalora_checkpoint_export_lora`, for a convolution: `n_kernel` extents of its kernel, in the order of the columns of
    /// A, which run over input channels first. Otherwise NULL.
    pub kernel: *const i64,
    /// How many there are, 0 to 3.
    pub n_kernel: i64,
    /// `adalora_checkpoint_export_lora`: 1 for the adapter of an embedding, whose matrices have other names in plain LoRA.
    /// Otherwise 0.
    pub embedding: i32,
    /// Must be 0.
    pub reserved: i32,
}

/// An adapter in a checkpoint.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AdapterInfo {
    /// `sizeof(adalora_adapter_info_t)`, set by the caller.
    pub struct_size: usize,
    /// Path of its module in the model.
    pub name: *const c_char,
    /// [rank], 1 where the file holds the triplet, else 0; NULL where it holds all.
    pub pattern: *const u8,
    /// Triplets at creation, PEFT's `init_r`: what the scaling is divided by.
    pub rank: i64,
    /// Triplets in the file.
    pub kept: i64,
    /// Input features.
    pub in_features: i64,
    /// Output features.
    pub out_features: i64,
    /// Element type of A in the file.
    pub a_dtype: DtypeCode,
    /// Element type of E in the file.
    pub e_dtype: DtypeCode,
    /// Element type of B in the file.
    pub b_dtype: DtypeCode,
    /// 0.
    pub reserved: i32,
}

/// What a checkpoint is made of.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CheckpointDesc {
    /// `sizeof(adalora_checkpoint_desc_t)`.
    pub struct_size: usize,
    /// Folder of the files, made if it is not there.
    pub folder: *const c_char,
    /// The adapter's configuration, a JSON object of UTF-8 with PEFT's names; NULL leaves the adapter's files alone. Written
    /// are its fields, and: `peft_type` "ADALORA"; `init_r`, the adapters' rank; `rank_pattern`, from the adapters'
    /// patterns, null where none has one; `target_modules`, the adapters' names, unless given; and `lora_alpha` 0 as the
    /// rank that it stands for, since PEFT would take it from a cut adapter. PEFT also needs `total_step`, `tinit` and
    /// `tfinal` to be of a schedule.
    pub config: *const c_char,
    /// The adapters.
    pub adapters: *const AdapterEntry,
    /// Bytes from one to the next.
    pub adapter_stride: usize,
    /// How many there are.
    pub n_adapters: i64,
    /// What was trained beside them, such as biases and heads.
    pub tensors: *const Tensor,
    /// Bytes from one to the next.
    pub tensor_stride: usize,
    /// How many there are.
    pub n_tensors: i64,
    /// A text of the trainer's own for the training state, of UTF-8; NULL leaves the file of the training state alone.
    pub state: *const c_char,
    /// Tensors of the training state: moments, averages, what `adalora_allocator_save_state_sync` wrote, generators.
    pub state_tensors: *const Tensor,
    /// Bytes from one to the next.
    pub state_tensor_stride: usize,
    /// How many there are.
    pub n_state_tensors: i64,
}
