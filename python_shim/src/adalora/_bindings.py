"""The C interface of libadalora in ctypes.

Generated from include/adalora.h by generate_bindings.py: generate it again instead of editing it.
"""

from __future__ import annotations

from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, NamedTuple


class Function(NamedTuple):
    """A function of the library."""

    restype: Any
    # Whether the result is a status, 0 where all went well.
    is_status: bool
    # Names and types of the arguments.
    arguments: tuple[tuple[str, Any], ...]
    doc: str


# All went well.
ADALORA_SUCCESS = 0

# An argument is wrong; nothing was changed.
ADALORA_ERROR_INVALID_ARGUMENT = 1

# A handle is NULL or of another kind; nothing was changed.
ADALORA_ERROR_INVALID_HANDLE = 2

# The call does not fit the object's state, such as an update before a bind; nothing was changed.
ADALORA_ERROR_INVALID_STATE = 3

# Memory for the library's own use could not be had; nothing was changed.
ADALORA_ERROR_OUT_OF_MEMORY = 4

# The combination is legal, and this backend does not have it; nothing was changed.
ADALORA_ERROR_UNSUPPORTED = 5

# The backend is not in this library, or this machine lacks what it needs.
ADALORA_ERROR_BACKEND_UNAVAILABLE = 6

# Work failed after it had begun: the outputs that the text names are undefined, the library's own state is as it was
# unless the text says otherwise.
ADALORA_ERROR_INCOMPLETE = 7

# Bytes from outside are damaged; nothing was changed.
ADALORA_ERROR_CORRUPT_DATA = 8

# A defect of the library: the text says where. Please report it.
ADALORA_ERROR_INTERNAL = 9

# A file or folder is not there; nothing was changed.
ADALORA_ERROR_NOT_FOUND = 10

# The operating system refused to read or write a file: the text says which, and why. Files are as they were.
ADALORA_ERROR_IO = 11

# Version of the interface that this header describes. It changes where a caller compiled against an older header would
# break.
ADALORA_ABI_VERSION = 1

# IEEE 754 binary32.
ADALORA_FLOAT32 = 1

# IEEE 754 binary64.
ADALORA_FLOAT64 = 2

# bfloat16: the upper half of a binary32.
ADALORA_BFLOAT16 = 3

# IEEE 754 binary16.
ADALORA_FLOAT16 = 4

# One byte, 0 or 1. This type and those below are those of tensors in checkpoints; nothing computes with them.
ADALORA_BOOL = 5

# As PyTorch's type of the name.
ADALORA_UINT8 = 6

# As PyTorch's type of the name.
ADALORA_INT8 = 7

# As PyTorch's type of the name.
ADALORA_UINT16 = 8

# As PyTorch's type of the name.
ADALORA_INT16 = 9

# As PyTorch's type of the name.
ADALORA_UINT32 = 10

# As PyTorch's type of the name.
ADALORA_INT32 = 11

# As PyTorch's type of the name.
ADALORA_UINT64 = 12

# As PyTorch's type of the name.
ADALORA_INT64 = 13

# As PyTorch's type of the name: two of binary32.
ADALORA_COMPLEX64 = 14

# As PyTorch's type of the name.
ADALORA_FLOAT8_E4M3FN = 15

# As PyTorch's type of the name.
ADALORA_FLOAT8_E5M2 = 16

# As PyTorch's type of the name.
ADALORA_FLOAT8_E8M0FNU = 17

# As PyTorch's type of the name.
ADALORA_FLOAT8_E4M3FNUZ = 18

# As PyTorch's type of the name.
ADALORA_FLOAT8_E5M2FNUZ = 19

# `files`: `adapter_config.json` and `adapter_model.safetensors`, as PEFT has them.
ADALORA_FILES_ADAPTER = 1

# `files`: `training_state.safetensors`, what training needs beside them.
ADALORA_FILES_STATE = 2

# `files`: all of them.
ADALORA_FILES_ALL = 3

# The backend that computes on the host's processor, over host memory.
ADALORA_BACKEND_CPU = 1

# The backend that computes on a CUDA device, over device memory.
ADALORA_BACKEND_CUDA = 2

# `stages`: the products with the first factor, `h = x A^T` forward, `g = scaling dy B` backward.
ADALORA_STAGE_PROJECT = 1

# `stages`: the products with the second factor, which read h (forward) or g and h (backward).
ADALORA_STAGE_EXPAND = 2

# `stages`: the whole pass.
ADALORA_STAGE_BOTH = 3

# The budget counts triplets, as PEFT's does. The default.
ADALORA_BUDGET_TRIPLETS = 1

# The budget counts parameters: a triplet costs `in_features + out_features + 1`.
ADALORA_BUDGET_PARAMETERS = 2

# `adalora_slice_t.matrix`: right vectors, [rank, in_features].
ADALORA_MATRIX_A = 1

# `adalora_slice_t.matrix`: values, [rank].
ADALORA_MATRIX_E = 2

# `adalora_slice_t.matrix`: left vectors, [out_features, rank].
ADALORA_MATRIX_B = 3

# Log level: something went on with less than was asked for, such as fewer threads.
ADALORA_LOG_WARNING = 1

# Log level: what was chosen, once per object.
ADALORA_LOG_INFO = 2


class adalora_adapter_t(Structure):
    """The geometry of one layer's adapter; holds no pointer of the caller's. May be used from any thread, by several at
    once.
    """


class adalora_allocator_t(Structure):
    """Rank allocator over the adapters of a model: schedule, importance, selection, and with them the optimiser. May be
    used from any thread; a call whose parameter is not const runs alone on the object.
    """


class adalora_checkpoint_t(Structure):
    """A checkpoint that was opened to be read. May be used from any thread, by several at once."""


class adalora_context_t(Structure):
    """A backend, its device and threads. May be used from any thread."""


# Outcome of a call: `ADALORA_SUCCESS` or one of the `ADALORA_ERROR_*` numbers. Numbers are never reused.
adalora_status_t = c_int32

# Element type: one of `ADALORA_FLOAT32`, `ADALORA_FLOAT64`, `ADALORA_BFLOAT16`, `ADALORA_FLOAT16`. 0 is invalid unless
# a field says otherwise.
adalora_dtype_t = c_int32


class adalora_adapter_desc_t(Structure):
    """The geometry of one layer's adapter."""

    _fields_ = [
        # `sizeof(adalora_adapter_desc_t)`.
        ("struct_size", c_size_t),
        # Input features of the whole layer, at least 1.
        ("in_features", c_int64),
        # Output features of the whole layer, at least 1.
        ("out_features", c_int64),
        # Triplets (PEFT's `init_r`), 0 or more.
        ("rank", c_int64),
        # PEFT's `lora_alpha`: 0 stands for the rank at creation. Not negative.
        ("alpha", c_double),
        # Probability with which an element of the adapter's input is dropped, in [0, 1). There is no evaluation mode:
        # evaluate with a second adapter of the same geometry and dropout 0, since adapters hold no parameters.
        ("dropout", c_double),
        # Element type of A, E and B as the forward pass reads them.
        ("param_dtype", adalora_dtype_t),
        # Element type of x, y, dx and dy. `ADALORA_FLOAT64` goes with `ADALORA_FLOAT64` alone; the other three go with
        # each other.
        ("activation_dtype", adalora_dtype_t),
        # How many half-precision terms, 1 to 3, stand for a float32 A or B where a backend multiplies in half
        # precision; 0: 2. The CPU backend multiplies in float32 and rounds neither factor, whatever this says.
        ("operand_terms", c_int32),
        # Must be 0.
        ("reserved", c_int32),
        # Columns of A in this tensor-parallel process; 0: all of `in_features`.
        ("in_local", c_int64),
        # First of them, in the whole layer.
        ("in_begin", c_int64),
        # Rows of B in this tensor-parallel process; 0: all of `out_features`.
        ("out_local", c_int64),
        # First of them, in the whole layer.
        ("out_begin", c_int64),
        # Triplets at creation, PEFT's `ranknum`, the constant divisor of the scaling; 0: `rank`. More than `rank` says
        # that the adapter was compacted: see `adalora_allocator_compact_sync`.
        ("ranknum", c_int64),
    ]


class adalora_matrix_t(Structure):
    """A row-major matrix in the caller's memory: element (i, j) stands at `data + (i * row_stride + j) *
    sizeof(element)`.

    `row_stride` counts elements; 0 means `columns`, and anything else must be at least `columns`. `data` is aligned
    to its element, and may be NULL where `rows` or `columns` is 0. A *vector* of n elements may be given as 1 x n or
    as n x 1.

    A value, not a descriptor: it never grows.
    """

    _fields_ = [
        # First element: a host pointer on the CPU backend, a device pointer on the CUDA one.
        ("data", c_void_p),
        # Number of rows.
        ("rows", c_int64),
        # Number of columns.
        ("columns", c_int64),
        # Elements from one row to the next; 0: `columns`.
        ("row_stride", c_int64),
        # Element type.
        ("dtype", adalora_dtype_t),
        # Must be 0.
        ("reserved", c_int32),
    ]


class adalora_triplets_t(Structure):
    """The triplets of one adapter, or their gradients. A value: it never grows.

    Under tensor parallelism `A` and `B` are this process's share: `in_local` columns of A, `out_local` rows of B.
    """

    _fields_ = [
        # Right vectors, [rank, in_local].
        ("A", adalora_matrix_t),
        # Values: a vector of `rank` elements (PEFT's `lora_E` is rank x 1).
        ("E", adalora_matrix_t),
        # Left vectors, [out_local, rank].
        ("B", adalora_matrix_t),
    ]


class adalora_dropout_t(Structure):
    """Where the dropout mask of one call stands. Read only if the adapter's dropout is above 0. A value: it never
    grows.

    The mask of element (t, c) of x is a pure function of (`*seed`, `*offset`, `token0` + t, in_begin + c), so that
    backward makes the same one, and every backend too: Philox4x32-10 with key (low, high word of seed) on the
    counter (column / 4, token, low, high word of offset) gives the words of four neighbouring columns; the element
    is dropped where its word is below `dropout * 2^32` (rounded to the nearest integer), and otherwise multiplied by
    `1 / (1 - dropout)`. No call advances seed or offset.
    """

    _fields_ = [
        # One value in the memory of the context's backend. Adapters of one call with the same seed and offset drop the
        # same elements: give each its own, unless masks are to be shared.
        ("seed", c_void_p),
        # One value in the memory of the context's backend; usually the step.
        ("offset", c_void_p),
        # Logical number of row 0 of x, where a process sees a part of the tokens. `token0` + tokens is at most 2^32.
        ("token0", c_int64),
    ]


class adalora_call_t(Structure):
    """One adapter's share in a forward or backward call. All adapters of a call read the same x."""

    _fields_ = [
        # `sizeof(adalora_call_t)`.
        ("struct_size", c_size_t),
        # The adapter; each may appear once in a call.
        ("adapter", POINTER(adalora_adapter_t)),
        # Parameters, of the adapter's `param_dtype`.
        ("params", adalora_triplets_t),
        # Backward: gradients, each of `param_dtype` or of the compute type (float64 for float64, else float32).
        # Forward: not read.
        ("grads", adalora_triplets_t),
        # Multiplier of the adapter's output, a number of the compute type; 0: the adapter's own, `(alpha > 0 ? alpha :
        # rank) / (rank + 1e-5)`.
        ("scaling", c_double),
        # Forward: [tokens, out_local]. Holds the base layer's output; the adapter's is added. Backward: not read.
        ("y", adalora_matrix_t),
        # Backward: [tokens, out_local], the gradient for y. Forward: not read.
        ("dy", adalora_matrix_t),
        # `h = x A^T`, [tokens, rank] without gaps, of the compute type. The forward pass writes it, backward reads it.
        # NULL where both stages run in one call: then forward keeps nothing, and backward computes it again.
        ("h", c_void_p),
        # `g = scaling dy B`, likewise: written by backward's first stage, read by its second. NULL where both run in
        # one call.
        ("g", c_void_p),
        # [rank], not 0 where the triplet is kept; only where the pattern is final, since masked triplets then cost
        # nothing and receive no gradient (0 where gradients are overwritten); their columns of h and g are written as
        # 0. NULL: all are computed.
        ("pattern", c_void_p),
        # Dropout's seed and place.
        ("dropout", adalora_dropout_t),
    ]


class adalora_allocator_desc_t(Structure):
    """What a rank allocator is made of. The names are PEFT's."""

    _fields_ = [
        # `sizeof(adalora_allocator_desc_t)`.
        ("struct_size", c_size_t),
        # Number of adapters, at least 1.
        ("n_adapters", c_int64),
        # All adapters of the model, over all processes, in an order that every process shares. Adapters may be
        # destroyed before the allocator.
        ("adapters", POINTER(POINTER(adalora_adapter_t))),
        # Mean rank per adapter at the end (PEFT's `target_r`): the target budget is `target_rank * n_adapters`
        # triplets, or their cost.
        ("target_rank", c_int64),
        # Steps before the budget begins to fall. `tinit < total_step - tfinal`.
        ("tinit", c_int64),
        # Steps at the end during which the pattern is fixed.
        ("tfinal", c_int64),
        # Steps of the training run.
        ("total_step", c_int64),
        # A mask falls on every step that this number divides, while the budget falls (PEFT's `deltaT`). At least 1.
        ("delta_t", c_int64),
        # Smoothing of the sensitivity, in (0, 1). PEFT's default is 0.85.
        ("beta1", c_double),
        # Smoothing of the uncertainty, in (0, 1). PEFT's default is 0.85.
        ("beta2", c_double),
        # `ADALORA_BUDGET_TRIPLETS` (also 0) or `ADALORA_BUDGET_PARAMETERS`.
        ("budget_unit", c_int32),
        # 0: this process owns every element, and `adalora_allocator_bind` says which one is missing. 1: it may own a
        # part.
        ("sharded", c_int32),
    ]


class adalora_slice_t(Structure):
    """A range of elements of one adapter's A, E or B that this process owns, and everything that belongs to them.

    Elements are numbered in row-major order over the *whole* matrix ([rank, in_features], [rank] or [out_features,
    rank]); each pointer addresses element `begin`, and the `end - begin` elements lie without gaps. The state type
    is float64 for float64 parameters, else float32.
    """

    _fields_ = [
        # `sizeof(adalora_slice_t)`.
        ("struct_size", c_size_t),
        # Position of the adapter in the allocator.
        ("adapter", c_int64),
        # First element.
        ("begin", c_int64),
        # One past the last element.
        ("end", c_int64),
        # `ADALORA_MATRIX_A`, `ADALORA_MATRIX_E` or `ADALORA_MATRIX_B`.
        ("matrix", c_int32),
        # Which element of the table of hyperparameters serves it.
        ("hyper", c_int32),
        # Element type of `p`: the adapter's `param_dtype` (also 0 where `p_low` is NULL), or float32 where it is the
        # master of `p_low` (also 0 there).
        ("p_dtype", adalora_dtype_t),
        # Element type of `g`: `param_dtype` (also 0) or the state type.
        ("g_dtype", adalora_dtype_t),
        # 1: another process owns these elements too and counts them in scores, Gram matrices and the gradient norm;
        # here they are updated alone. Else 0.
        ("replica", c_int32),
        # Must be 0.
        ("reserved", c_int32),
        # Parameters.
        ("p", c_void_p),
        # The half-precision copy that the forward pass reads, of `param_dtype`, written whenever AdamW or a mask
        # changes p; or NULL.
        ("p_low", c_void_p),
        # Gradients; orthogonality adds to them.
        ("g", c_void_p),
        # AdamW's first moment, of the state type; NULL where AdamW is never asked for.
        ("m", c_void_p),
        # AdamW's second moment, likewise.
        ("v", c_void_p),
        # Smoothed sensitivity, of the state type.
        ("exp_avg_ipt", c_void_p),
        # Smoothed uncertainty of the sensitivity, of the state type.
        ("exp_avg_unc", c_void_p),
    ]


class adalora_hyper_t(Structure):
    """AdamW's hyperparameters for one group of slices. They have no defaults: 0 means 0."""

    _fields_ = [
        # `sizeof(adalora_hyper_t)`.
        ("struct_size", c_size_t),
        # Learning rate: one value in the memory of the context's backend, read at every update.
        ("lr", c_void_p),
        # Decoupled weight decay: one value, read likewise.
        ("weight_decay", c_void_p),
        # Decay of the first moment, in [0, 1). PyTorch's default is 0.9.
        ("beta1", c_double),
        # Decay of the second moment, in [0, 1). PyTorch's default is 0.999.
        ("beta2", c_double),
        # Added to the denominator, 0 or more. PyTorch's default is 1e-8.
        ("eps", c_double),
    ]


class adalora_step_t(Structure):
    """What changes from step to step: values in the memory of the context's backend, read when the work runs, so that a
    captured graph sees new ones at each replay.
    """

    _fields_ = [
        # `sizeof(adalora_step_t)`.
        ("struct_size", c_size_t),
        # The trainer's step number, one value; required. It counts from 0 or 1, as the trainer likes, and is compared
        # with tinit and total_step - tfinal as it stands.
        ("step", c_void_p),
        # Multiplies every gradient: unscaling times clipping, one value; NULL: 1. One that is not finite, in the state
        # type too, suppresses the step as `found_inf` does.
        ("grad_factor", c_void_p),
        # Above 0 where a gradient anywhere in the model is not finite, one value: then AdamW and importance do nothing
        # this step. NULL: the library looks itself, at the cost of one more reading of the gradients; a sharded
        # allocator needs it.
        ("found_inf", c_void_p),
        # [n_adapters], 0 where the adapter has no gradient this step; NULL: all have one.
        ("has_grad", c_void_p),
    ]


class adalora_report_t(Structure):
    """Where a run stands."""

    _fields_ = [
        # `sizeof(adalora_report_t)`, set by the caller.
        ("struct_size", c_size_t),
        # The step of the last selection (`adalora_allocator_select` or `adalora_allocator_step`); -1 before the first.
        ("last_step", c_int64),
        # Updates that were suppressed by `found_inf`.
        ("skipped", c_int64),
        # Selections whose step was not above the one before: a step counted twice, or a clock that went back.
        ("irregular", c_int64),
        # How often the pattern was chosen anew.
        ("selections", c_int64),
        # Budget that the schedule sets for the last step, in the allocator's unit; the initial one before the first.
        # What is kept is in `live_triplets` and `live_parameters`.
        ("budget", c_int64),
        # Triplets kept, over all adapters.
        ("live_triplets", c_int64),
        # Their parameters: `in_features + out_features + 1` each.
        ("live_parameters", c_int64),
        # 1 where a pattern was chosen or set, else 0 (everything is kept).
        ("has_pattern", c_int32),
        # 1 where the pattern is final, else 0.
        ("is_final", c_int32),
    ]


class adalora_adapter_entry_t(Structure):
    """An adapter for a checkpoint."""

    _fields_ = [
        # `sizeof(adalora_adapter_entry_t)`.
        ("struct_size", c_size_t),
        # Path of its module in the model, such as "encoder.layers.0.query", of UTF-8.
        ("name", c_char_p),
        # Triplets in host memory, of any of the four types that are computed with: all `rank` of them, of which the
        # file gets those that the pattern keeps; or these alone, where others were compacted away.
        ("params", adalora_triplets_t),
        # Triplets at creation (PEFT's `init_r`), the same for all adapters of a checkpoint.
        ("rank", c_int64),
        # [rank], not 0 where the triplet is kept; then E of the others must be 0, so that the file computes what ran.
        # NULL: all are written, masked ones too, as training needs them that goes on.
        ("pattern", c_void_p),
        # `adalora_checkpoint_export_lora`: multiplier of the adapter's output; 0: what the configuration's `lora_alpha`
        # says. Otherwise 0.
        ("scaling", c_double),
        # `adalora_checkpoint_export_lora`, for a convolution: `n_kernel` extents of its kernel, in the order of the
        # columns of A, which run over input channels first. Otherwise NULL.
        ("kernel", c_void_p),
        # How many there are, 0 to 3.
        ("n_kernel", c_int64),
        # `adalora_checkpoint_export_lora`: 1 for the adapter of an embedding, whose matrices have other names in plain
        # LoRA. Otherwise 0.
        ("embedding", c_int32),
        # Must be 0.
        ("reserved", c_int32),
    ]


class adalora_tensor_t(Structure):
    """A tensor in a checkpoint, or for one."""

    _fields_ = [
        # `sizeof(adalora_tensor_t)`.
        ("struct_size", c_size_t),
        # Its name in the file, of UTF-8: PEFT's begin with "base_model.model.".
        ("name", c_char_p),
        # To write: its elements in host memory, row-major and without gaps; may be NULL where there is none. Of a
        # checkpoint: NULL.
        ("data", c_void_p),
        # `n_dims` extents, 0 or more each.
        ("shape", c_void_p),
        # Number of dimensions, 0 to 64. Without a dimension there is one element.
        ("n_dims", c_int64),
        # Bytes of all elements. To write: may be 0 for as many as shape and type say.
        ("bytes", c_size_t),
        # Element type: any of the `ADALORA_*` types.
        ("dtype", adalora_dtype_t),
        # Must be 0.
        ("reserved", c_int32),
    ]


class adalora_checkpoint_desc_t(Structure):
    """What a checkpoint is made of."""

    _fields_ = [
        # `sizeof(adalora_checkpoint_desc_t)`.
        ("struct_size", c_size_t),
        # Folder of the files, made if it is not there.
        ("folder", c_char_p),
        # The adapter's configuration, a JSON object of UTF-8 with PEFT's names; NULL leaves the adapter's files alone.
        # Written are its fields, and: `peft_type` "ADALORA"; `init_r`, the adapters' rank; `rank_pattern`, from the
        # adapters' patterns, null where none has one; `target_modules`, the adapters' names, unless given; and
        # `lora_alpha` 0 as the rank that it stands for, since PEFT would take it from a cut adapter. PEFT also needs
        # `total_step`, `tinit` and `tfinal` to be of a schedule.
        ("config", c_char_p),
        # The adapters.
        ("adapters", POINTER(adalora_adapter_entry_t)),
        # Bytes from one to the next.
        ("adapter_stride", c_size_t),
        # How many there are.
        ("n_adapters", c_int64),
        # What was trained beside them, such as biases and heads.
        ("tensors", POINTER(adalora_tensor_t)),
        # Bytes from one to the next.
        ("tensor_stride", c_size_t),
        # How many there are.
        ("n_tensors", c_int64),
        # A text of the trainer's own for the training state, of UTF-8; NULL leaves the file of the training state
        # alone.
        ("state", c_char_p),
        # Tensors of the training state: moments, averages, what `adalora_allocator_save_state_sync` wrote, generators.
        ("state_tensors", POINTER(adalora_tensor_t)),
        # Bytes from one to the next.
        ("state_tensor_stride", c_size_t),
        # How many there are.
        ("n_state_tensors", c_int64),
    ]


class adalora_adapter_info_t(Structure):
    """An adapter in a checkpoint."""

    _fields_ = [
        # `sizeof(adalora_adapter_info_t)`, set by the caller.
        ("struct_size", c_size_t),
        # Path of its module in the model.
        ("name", c_char_p),
        # [rank], 1 where the file holds the triplet, else 0; NULL where it holds all.
        ("pattern", c_void_p),
        # Triplets at creation, PEFT's `init_r`: what the scaling is divided by.
        ("rank", c_int64),
        # Triplets in the file.
        ("kept", c_int64),
        # Input features.
        ("in_features", c_int64),
        # Output features.
        ("out_features", c_int64),
        # Element type of A in the file.
        ("a_dtype", adalora_dtype_t),
        # Element type of E in the file.
        ("e_dtype", adalora_dtype_t),
        # Element type of B in the file.
        ("b_dtype", adalora_dtype_t),
        # 0.
        ("reserved", c_int32),
    ]


# Runs `body(data)` on `threads` threads at once, the calling one among them, and returns when all have returned: the
# shape of `GOMP_parallel`, so that the library can compute on OpenMP's, PyTorch's or a trainer's own threads. `flags`
# is 0. Fewer threads, down to the calling one alone, change the speed and not the results. It must not throw.
adalora_parallel_fn = CFUNCTYPE(None, CFUNCTYPE(None, c_void_p), c_void_p, c_uint32, c_uint32)

# Receives the library's messages; it writes to no stream itself. `text` is valid during the call alone. May be called
# from any thread that is inside a call of the library, and must neither call the library nor throw.
adalora_log_fn = CFUNCTYPE(None, c_void_p, c_int32, c_char_p)


class adalora_context_desc_t(Structure):
    """What a context is made of."""

    _fields_ = [
        # `sizeof(adalora_context_desc_t)`.
        ("struct_size", c_size_t),
        # `ADALORA_BACKEND_CPU` or `ADALORA_BACKEND_CUDA`.
        ("backend", c_int32),
        # CUDA: the device's number. Memory and streams are those of its primary context, which CUDA's runtime and
        # PyTorch use; which context and device are current in the calling thread does not matter, and stays. CPU: 0.
        ("device", c_int32),
        # CPU: how many threads compute, the calling one included; 0: as many as the process may run on. At most 1024.
        # CUDA: 0.
        ("threads", c_int32),
        # Must be 0.
        ("reserved", c_int32),
        # CUDA: a `cublasHandle_t` of this device, lent by the caller for the context's lifetime, or NULL for our own.
        # Calls that multiply wait for each other, and nobody else may use it meanwhile. Its stream, math mode and
        # pointer mode are left as they were found; a workspace that was set on it cannot be read, and is cuBLAS's own
        # afterwards. Where the process has cuBLAS of both versions, `library_folder` says which one made it. CPU: NULL.
        ("cublas_handle", c_void_p),
        # CUDA: the folder in which `libcudart` and `libcublas` lie, or several separated by colons; they are taken from
        # there and from nowhere else. NULL: those that the process has loaded already, else those of CUDA 13 or of CUDA
        # 12 that the loader finds: the newest that the driver serves. CPU: NULL.
        ("library_folder", c_char_p),
        # CPU: the caller's threads, or NULL for a pool of the context's own, which starts at the first computation.
        # CUDA: NULL.
        ("parallel", adalora_parallel_fn),
        # Receives messages, or NULL.
        ("log", adalora_log_fn),
        # Handed to `log`.
        ("log_user", c_void_p),
        # CUDA: 1 lets tensor cores round the operands of float32 products to TF32, which has 10 bits of fraction; 0
        # does not. CPU: 0.
        ("tf32", c_int32),
        # Must be 0.
        ("reserved_end", c_int32),
    ]


FUNCTIONS: dict[str, Function] = {
    "adalora_adapter_create": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("context", POINTER(adalora_context_t)),
            ("desc", POINTER(adalora_adapter_desc_t)),
            ("adapter", POINTER(POINTER(adalora_adapter_t))),
        ),
        doc="""Makes an adapter.

@param context May be destroyed before the adapter.
@param desc Geometry and element types.
@param adapter Receives the handle; written on success alone. Destroy it by
`adalora_adapter_destroy`.
@return `ADALORA_ERROR_INVALID_ARGUMENT` names the field, what it held and what it may hold.
""",
    ),
    "adalora_adapter_destroy": Function(
        restype=None,
        is_status=False,
        arguments=(("adapter", POINTER(adalora_adapter_t)),),
        doc="""Destroys an adapter; NULL is nothing.""",
    ),
    "adalora_adapter_initialize": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("adapter", POINTER(adalora_adapter_t)),
            ("params", POINTER(adalora_triplets_t)),
            ("seed", c_uint64),
            ("stream", c_void_p),
        ),
        doc="""Writes the initial triplets, PEFT's `reset_lora_parameters`: A and B normal with deviation 0.02, E
zero.

Each element is a function of the seed and of its place in the whole layer, so that tensor-parallel
shares fit together.

@param params Receives them; of `param_dtype`, or float32 for a master copy of half-precision
parameters.
""",
    ),
    "adalora_adapter_delta_weight": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("adapter", POINTER(adalora_adapter_t)),
            ("params", POINTER(adalora_triplets_t)),
            ("scaling", c_double),
            ("fan_in_fan_out", c_int32),
            ("accumulate", c_int32),
            ("w", POINTER(adalora_matrix_t)),
            ("stream", c_void_p),
        ),
        doc="""Delta weight: `scaling * B diag(E) A`, PEFT's `get_delta_weight`.

@param params Parameters, of `param_dtype`.
@param scaling 0: the adapter's own.
@param fan_in_fan_out 0: w is [out_local, in_local]. 1: w is [in_local, out_local] (transformers'
Conv1D).
@param accumulate 0: w is overwritten. 1: the delta is added to it.
@param w Of any element type; rounded once, from the compute type.
""",
    ),
    "adalora_adapter_merge": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("adapter", POINTER(adalora_adapter_t)),
            ("params", POINTER(adalora_triplets_t)),
            ("scaling", c_double),
            ("fan_in_fan_out", c_int32),
            ("w", POINTER(adalora_matrix_t)),
            ("backup", POINTER(adalora_matrix_t)),
            ("non_finite", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Adds the delta weight to a base weight: PEFT's `merge`.

@param w The base weight, in either layout, of any element type.
@param backup As w: receives the base as it was, so that `adalora_adapter_unmerge` restores it
exactly. NULL: none is kept.
@param non_finite One value, set to 1 where a merged element is not finite, else left alone (PEFT's
`safe_merge`; w is written all the same, and the backup brings it back); NULL: not looked for.

The other parameters are as in `adalora_adapter_delta_weight`.
""",
    ),
    "adalora_adapter_unmerge": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("adapter", POINTER(adalora_adapter_t)),
            ("params", POINTER(adalora_triplets_t)),
            ("scaling", c_double),
            ("fan_in_fan_out", c_int32),
            ("w", POINTER(adalora_matrix_t)),
            ("backup", POINTER(adalora_matrix_t)),
            ("stream", c_void_p),
        ),
        doc="""Takes the delta weight out of a base weight again: PEFT's `unmerge`.

@param backup What `adalora_adapter_merge` kept: w becomes its copy, bit for bit, and `params` may be
NULL. NULL: the delta weight is subtracted, which leaves a rounding error where w has few bits.

The other parameters are as in `adalora_adapter_delta_weight`.
""",
    ),
    "adalora_adapter_sizes": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("calls", POINTER(adalora_call_t)),
            ("stride", c_size_t),
            ("n", c_int64),
            ("tokens", c_int64),
            ("saved", c_void_p),
            ("workspace", c_void_p),
        ),
        doc="""Sizes that a forward or backward call with these adapters needs.

@param calls Only the adapters are read.
@param stride Bytes from one element of `calls` to the next: `sizeof(adalora_call_t)`.
@param n Elements of `calls`, 1 to 64.
@param tokens Rows of x.
@param saved Receives n values: bytes of `h`, and of `g`, of each adapter; NULL: not asked for.
@param workspace Receives the bytes of workspace that serve `adalora_adapter_forward` and
`adalora_adapter_backward`.
""",
    ),
    "adalora_adapter_forward": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("calls", POINTER(adalora_call_t)),
            ("stride", c_size_t),
            ("n", c_int64),
            ("stages", c_int32),
            ("x", POINTER(adalora_matrix_t)),
            ("workspace", c_void_p),
            ("bytes", c_size_t),
            ("stream", c_void_p),
        ),
        doc="""Forward: `y += scaling * ((x A^T) * E) B^T` for every adapter of the call; x is read once for all of
them.

With dropout, x stands for the masked and scaled input throughout. Triplets whose E is 0 add nothing
to y, even where h is not finite.

@param calls n descriptors, `stride` bytes apart: `adapter`, `params`, `y`, `h`, and where wanted
`scaling`, `pattern`, `dropout`.
@param stages `ADALORA_STAGE_BOTH`; or `ADALORA_STAGE_PROJECT` (writes h; y is not read), then, once
tensor-parallel processes have summed their h, `ADALORA_STAGE_EXPAND` (reads h; x may be NULL).
@param x [tokens, in_local], of `activation_dtype`.
@param workspace Memory of the backend, at least as large as `adalora_adapter_sizes` says, aligned to
64 bytes.
@param bytes Its size.
@return `ADALORA_ERROR_INVALID_ARGUMENT`, before anything is computed, for a wrong shape, type,
alignment, overlap or size.

Outputs (y, h) and workspace must not overlap each other or anything that is read; columns of one
larger matrix do not overlap.
""",
    ),
    "adalora_adapter_backward": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("calls", POINTER(adalora_call_t)),
            ("stride", c_size_t),
            ("n", c_int64),
            ("stages", c_int32),
            ("accumulate", c_int32),
            ("x", POINTER(adalora_matrix_t)),
            ("dx", POINTER(adalora_matrix_t)),
            ("workspace", c_void_p),
            ("bytes", c_size_t),
            ("stream", c_void_p),
        ),
        doc="""Backward, for every adapter of the call: `g = scaling * dy B`; `dA += diag(E) g^T x`; `dE += colsum(g
* h)`; `dB += scaling * dy^T (h * E)`; `dx += sum over adapters of (g * E) A`.

@param calls n descriptors, `stride` bytes apart: `adapter`, `params`, `grads`, `dy`, `h`, and where
wanted `g`, `scaling`, `pattern`, `dropout`, the last three as forward had them. `y` is not read.
@param stages `ADALORA_STAGE_BOTH`; or `ADALORA_STAGE_PROJECT` (reads dy and h, writes g and dB),
then, once tensor-parallel processes have summed their g, `ADALORA_STAGE_EXPAND` (reads x, g and h,
writes dA, dE and dx; dy may be left out).
@param accumulate 1: gradients are added to. 0: they are overwritten, with zeros where there is no
token.
@param x [tokens, in_local], as forward had it. May be NULL in `ADALORA_STAGE_PROJECT`.
@param dx [tokens, in_local], added to; NULL: not wanted.
@param workspace As in `adalora_adapter_forward`.

The same bits for any number of threads. Outputs (grads, g, dx) and workspace must not overlap each
other or anything that is read.
""",
    ),
    "adalora_allocator_create": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("context", POINTER(adalora_context_t)),
            ("desc", POINTER(adalora_allocator_desc_t)),
            ("allocator", POINTER(POINTER(adalora_allocator_t))),
        ),
        doc="""Makes a rank allocator.

@param context May be destroyed before the allocator.
@param desc Adapters in order, schedule, smoothing.
@param allocator Receives the handle; written on success alone. Destroy it by
`adalora_allocator_destroy`.
@return `ADALORA_ERROR_INVALID_ARGUMENT` for a schedule or smoothing that makes no sense, with the
field, what it held and what it may hold.
""",
    ),
    "adalora_allocator_destroy": Function(
        restype=None,
        is_status=False,
        arguments=(("allocator", POINTER(adalora_allocator_t)),),
        doc="""Destroys an allocator; NULL is nothing. The bound buffers are the caller's and stay as they are.""",
    ),
    "adalora_allocator_sizes": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("n_slices", c_int64),
            ("state", c_void_p),
            ("workspace", c_void_p),
            ("gram", c_void_p),
        ),
        doc="""Sizes of the buffers that `adalora_allocator_bind` and the calls after it take.

@param n_slices How many slices will be bound.
@param state Receives the bytes of the state: pattern, Adam's clocks, counters.
@param workspace Receives the bytes of the workspace, whose contents need not be kept between calls
on the CPU.
@param gram Receives the bytes of the Gram matrices: for each adapter in order `A A^T`, then `B^T B`,
[rank, rank] each, float64, without gaps.

Each may be NULL.
""",
    ),
    "adalora_allocator_bind": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("state", c_void_p),
            ("workspace", c_void_p),
            ("slices", POINTER(adalora_slice_t)),
            ("stride", c_size_t),
            ("n", c_int64),
            ("hypers", POINTER(adalora_hyper_t)),
            ("hyper_stride", c_size_t),
            ("n_hyper", c_int64),
            ("stream", c_void_p),
        ),
        doc="""Tells the allocator where everything lies. The one call that keeps the caller's addresses: they stay
in use until the next bind or the allocator's end, and the descriptors themselves are copied. May
allocate and synchronise. To be repeated when a buffer moves.

On CUDA the workspace is the allocator's alone until then, since it holds where everything lies:
calls that were captured into a graph work on what is bound there when they run, in the state and
with the slices' ranges and types that they were captured with; where these change, or the workspace,
capture anew. A bind waits for the stream, and cannot be captured; but one that finds all as it was
bound before, gradients alone elsewhere, only enqueues, may be captured, and does not look at the
state, but that zeros begin a run.

@param state `adalora_allocator_sizes` bytes, aligned to 64. Zeros are a fresh run; otherwise what an
earlier bind of the same adapters left there, which goes on (also in a copy at another address). What
begins otherwise is refused.
@param workspace Likewise sized and aligned; any contents, but on CUDA, where it is what was bound
before, as it was left. Not to be shared with another allocator there.
@param slices n descriptors, `stride` bytes apart. Their order does not matter. Ranges of one matrix
must not overlap.
@param hypers n_hyper descriptors, `hyper_stride` bytes apart; none are needed where AdamW is never
asked for.
@return `ADALORA_ERROR_INVALID_ARGUMENT` names the slice and field; the earlier binding then stays.
So it does after `ADALORA_ERROR_INCOMPLETE`, unless its workspace was written to: then the text says
that nothing is bound.
""",
    ),
    "adalora_allocator_budget": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("step", c_int64),
            ("budget", c_void_p),
            ("masks", c_void_p),
        ),
        doc="""The budget that the schedule sets for a step, on the host; touches no buffer.

`step <= tinit`: the initial budget. Up to `end = total_step - tfinal`: `trunc((initial - target) *
pow(1 - (step - tinit) / (end - tinit), 3) + target)` in float64, in this order, as PEFT computes it.
Later: the target.

@param budget Receives the budget, in the allocator's unit.
@param masks Receives 1 where a mask falls on the step (`step % delta_t == 0` while the budget falls;
every step after the end), else 0. NULL: not asked for.
""",
    ),
    "adalora_allocator_gram": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("gram", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Gram matrices `A A^T` and `B^T B` of every adapter, summed over the owned elements that are not
replicas.

Needs whole columns: for each column of an adapter's A that this process owns it owns all rank rows,
and each slice of B holds whole rows.

@param gram Receives them; its size and layout are those of `adalora_allocator_sizes`. Processes that
share the parameters sum it.
""",
    ),
    "adalora_allocator_orthogonality": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("gram", c_void_p),
            ("weight", c_double),
            ("factor", c_void_p),
            ("value", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Orthogonal regularisation: the penalty `weight / (2 n) * (sum ||A A^T - I|| + ||B^T B - I||)` over
the n adapters, Frobenius norms, and its gradient times `factor` added to the gradients of A and B
(paper: equation 4 without the square, as PEFT has it). A norm of 0 has gradient 0.

Call it once per optimiser step: after gradients are reduced over processes, before their norm is
taken.

@param gram As `adalora_allocator_gram` wrote it, summed where sharded; NULL: computed here.
@param weight PEFT's `orth_reg_weight`: finite, 0 or more.
@param factor One value, the loss scale that the gradients carry; NULL: 1.
@param value Receives one value, the penalty, without `factor`; NULL: not wanted.

The pointers are in the memory of the context's backend.
""",
    ),
    "adalora_allocator_gradient_norm": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("has_grad", c_void_p),
            ("sum_of_squares", c_void_p),
            ("found_inf", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Adds the sum of squares of all owned gradients that are not replicas, as they are (times the loss
scale), to a sum that the trainer shares with its other parameters, and reports what is not finite.
Summed in float64, in an order that does not depend on threads.

Set the sum and the flag to 0 at the beginning of each step.

@param has_grad [n_adapters], 0: that adapter's gradients are not read; NULL: all are.
@param sum_of_squares One value, added to.
@param found_inf One value, set to 1 where a gradient is not finite, else left alone; NULL: not
wanted.
""",
    ),
    "adalora_allocator_update": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("step", POINTER(adalora_step_t)),
            ("with_adamw", c_int32),
            ("stream", c_void_p),
        ),
        doc="""AdamW, if asked for, and importance, in one pass over all slices.

AdamW is PyTorch's: `p *= 1 - lr * weight_decay`; m and v from the gradient times `grad_factor`; `p
-= lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)` with k the number of updates that
this adapter has had. Importance, while `step < total_step - tfinal` and the pattern is not final,
from the parameters after that and the same gradients: `s = abs(p * g)`; `exp_avg_ipt = beta1 *
exp_avg_ipt + (1 - beta1) * s`; `exp_avg_unc = beta2 * exp_avg_unc + (1 - beta2) * abs(s -
exp_avg_ipt)`. An adapter without a gradient is left alone by AdamW, and its s is 0. A step with
`found_inf` changes nothing and is counted as skipped.

@param with_adamw 1: AdamW, then importance. 0: importance alone, for trainers with an optimiser of
their own, from the parameters as they stand.
@return `ADALORA_ERROR_INVALID_STATE` where nothing is bound, or AdamW is asked for and moments or
hyperparameters are not bound.
""",
    ),
    "adalora_allocator_scores": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("scores", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Scores of all triplets of the model, adapter by adapter: `s(E) + mean(s(A row)) + mean(s(B column))`
with `s = exp_avg_ipt * exp_avg_unc`, in float64, from the owned elements that are not replicas;
always finite.

@param scores Receives the total rank's values. Processes that share the parameters sum it.
""",
    ),
    "adalora_allocator_select": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("step", POINTER(adalora_step_t)),
            ("scores", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Does what the schedule says for the step: where a mask falls on it, keeps exactly `budget` triplets
(highest scores, ties by lower adapter, then lower triplet; in parameters, the longest prefix of that
order whose cost fits), and sets E of the others to 0. The first step at or past `total_step -
tfinal` takes the last mask and clears the averages; from then on the pattern is final and applied at
every step.

@param step Of it, only `step->step` is used. Call it once per step, also after a step with
`found_inf`.
@param scores As `adalora_allocator_scores` wrote them, summed where sharded; NULL: computed here
where they are needed.
""",
    ),
    "adalora_allocator_step": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("step", POINTER(adalora_step_t)),
            ("with_adamw", c_int32),
            ("stream", c_void_p),
        ),
        doc="""`adalora_allocator_update`, `adalora_allocator_scores` and `adalora_allocator_select` in one call,
with the same bits. PEFT's `update_and_allocate`.
""",
    ),
    "adalora_allocator_finalize": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("scores", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Takes the last mask now, as crossing `total_step - tfinal` would: target budget, averages cleared,
pattern final. Nothing where it is final already.

@param scores As in `adalora_allocator_select`.
""",
    ),
    "adalora_allocator_reset": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("stream", c_void_p),
        ),
        doc="""Begins a new run: pattern, clocks, counters, averages and bound moments as at the start. Parameters
stay as they are.
""",
    ),
    "adalora_allocator_digest": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("digest", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""A hash of what every process must agree on: pattern, whether it is final, last step.

@param digest Receives one value, in the memory of the context's backend.
""",
    ),
    "adalora_allocator_read_sync": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("pattern", c_void_p),
            ("ranks", c_void_p),
            ("adam_steps", c_void_p),
            ("report", POINTER(adalora_report_t)),
            ("stream", c_void_p),
        ),
        doc="""Reads back where the run stands, into host memory. Waits for the stream.

@param pattern Receives the total rank's values, adapter by adapter: 1 where the triplet is kept,
else 0.
@param ranks Receives n_adapters values: triplets kept.
@param adam_steps Receives n_adapters values: updates that AdamW applied.
@param report Receives counters; its `struct_size` is set by the caller.

Each may be NULL.
""",
    ),
    "adalora_allocator_set_pattern": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("pattern", c_void_p),
            ("is_final", c_int32),
            ("stream", c_void_p),
        ),
        doc="""Sets the pattern: from another process, or from a checkpoint. E of the triplets that are not kept
becomes 0.

@param pattern The total rank's values, adapter by adapter, in the memory of the context's backend;
not 0 where the triplet is kept.
@param is_final 1: the pattern is final from now on, and the averages are cleared. 0: a later mask
may choose anew, unless it was final already.
""",
    ),
    "adalora_allocator_set_adam_steps_sync": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("adam_steps", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Sets how many updates led to the bound moments, for moments that another optimiser made: AdamW's bias
correction goes on from there. Waits for the stream.

@param adam_steps n_adapters values in host memory, 0 or more.
""",
    ),
    "adalora_allocator_compact_sync": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("compacted", POINTER(adalora_allocator_t)),
            ("stream", c_void_p),
        ),
        doc="""Hands a run over to an allocator of the triplets that are kept alone, after the last mask: from then
on forward, backward and everything else cost what those cost, and penalty and norm cover them alone.
Reads the pattern back. Waits for the stream.

Before the call: ask `adalora_allocator_read_sync` for the ranks, make adapters of these (with
`ranknum` the rank at creation, so that the scaling stays) and an allocator over them with the same
descriptor, and bind it, with memory for state and arrays of its own; where A's rows and B's columns
are sharded, with what is kept of each slice. An allocator over compacted adapters counts its budget
as before, and its pattern is final from the start, also after `adalora_allocator_reset`.

The call copies what is kept of `p`, `p_low`, `g`, the averages, and `m` and `v` where both
allocators have them, and sets clocks and counters. The allocator itself stays as it is; it, its
adapters and its buffers are of no use then.

@param allocator Bound, its pattern final.
@param compacted Bound, of the same context.
@return `ADALORA_ERROR_INVALID_STATE` where the pattern is not final, or either is not bound;
`ADALORA_ERROR_INVALID_ARGUMENT` names what of `compacted` does not fit the pattern. Nothing is
written then.
""",
    ),
    "adalora_allocator_save_state_sync": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("bytes", c_void_p),
            ("size", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""Writes the allocator's state (pattern, clocks, counters) as bytes that any machine reads, into host
memory. With the tensors that the caller owns (parameters, moments, averages) a run resumed from them
continues bit for bit. Waits for the stream.

@param bytes Receives them; NULL to ask for the size alone.
@param size In: the room at `bytes`. Out: the bytes needed, also where the room is too small.
@return `ADALORA_ERROR_INVALID_ARGUMENT` where the room is too small; then `bytes` is not written.
""",
    ),
    "adalora_allocator_load_state_sync": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("allocator", POINTER(adalora_allocator_t)),
            ("bytes", c_void_p),
            ("size", c_size_t),
            ("stream", c_void_p),
        ),
        doc="""Reads what `adalora_allocator_save_state_sync` wrote into the bound state: bind first, with
parameters, moments and averages restored. Waits for the stream.

A state from before compaction, whose pattern is final, is taken by compacted adapters that have the
ranks that it keeps.

@param bytes Host memory; not trusted: length, version, checksum and every value are checked.
@return `ADALORA_ERROR_CORRUPT_DATA` for damaged bytes; `ADALORA_ERROR_INVALID_ARGUMENT` for a state
of adapters with other ranks. The state is then as it was.
""",
    ),
    "adalora_checkpoint_write": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(("desc", POINTER(adalora_checkpoint_desc_t)),),
        doc="""Writes a checkpoint: the adapter's files (`adapter_config.json`, `adapter_model.safetensors`), which
PEFT reads, and the training state beside them (`training_state.safetensors`), or either.

Files are replaced together: each is written beside its place and brought to the disk first. A
process that dies in between leaves the old files, or, where several change, a folder without
`adapter_config.json`, which nobody loads; it never leaves files of two checkpoints that look like
one. Gradients are not part of a checkpoint: write between steps.

@param desc What to write, in host memory.
@return `ADALORA_ERROR_INVALID_ARGUMENT` names what does not fit. `ADALORA_ERROR_IO`: the files are
as they were.
""",
    ),
    "adalora_checkpoint_export_lora": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(("desc", POINTER(adalora_checkpoint_desc_t)),),
        doc="""Writes adapters as plain LoRA, for programs that know no AdaLoRA: E and the scaling go into B, each
element rounded once, and the same outputs come out.

All adapters get one rank, the largest number of triplets whose E is not 0, filled up with zeros, and
`lora_alpha` is the rank, so that the multiplier is 1. A is written as it is. Half precision becomes
float32, in which the product has room. The configuration's fields of AdaLoRA are left out.

@param desc As in `adalora_checkpoint_write`; `state` must be NULL.
""",
    ),
    "adalora_checkpoint_open": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("folder", c_char_p),
            ("files", c_int32),
            ("checkpoint", POINTER(POINTER(adalora_checkpoint_t))),
        ),
        doc="""Opens a checkpoint that this library or PEFT wrote, and checks it: the configuration, the header of
each file of tensors, the shapes of all adapters. Tensors are read later, from the files as they were
now, also where others take their places meanwhile.

The files are not trusted. No name in them becomes a path; what is allocated is bounded by the size
of header and configuration, which may have 16 MiB each.

@param folder Where the files are.
@param files `ADALORA_FILES_ADAPTER`, `ADALORA_FILES_STATE` or `ADALORA_FILES_ALL`.
@param checkpoint Receives the handle; written on success alone. Destroy it by
`adalora_checkpoint_destroy`.
@return `ADALORA_ERROR_NOT_FOUND` where a file is not there; `ADALORA_ERROR_CORRUPT_DATA` for a
damaged one; `ADALORA_ERROR_INVALID_ARGUMENT` where the files do not fit together, or are not of
AdaLoRA: those of `adalora_checkpoint_export_lora` are LoRA's.
""",
    ),
    "adalora_checkpoint_destroy": Function(
        restype=None,
        is_status=False,
        arguments=(("checkpoint", POINTER(adalora_checkpoint_t)),),
        doc="""Destroys a checkpoint; NULL is nothing. The files stay.""",
    ),
    "adalora_checkpoint_text": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("checkpoint", POINTER(adalora_checkpoint_t)),
            ("files", c_int32),
            ("text", c_void_p),
            ("bytes", c_void_p),
        ),
        doc="""The text of `adapter_config.json`, or the one that was written with the training state.

@param files `ADALORA_FILES_ADAPTER` or `ADALORA_FILES_STATE`.
@param text Receives it, ended by a zero byte; NULL to ask for the size alone.
@param bytes In: the room at `text`. Out: the bytes needed, the zero byte included, also where the
room is too small.
@return `ADALORA_ERROR_INVALID_STATE` where the checkpoint was opened without the files;
`ADALORA_ERROR_INVALID_ARGUMENT` where the room is too small; then `text` is not written.
""",
    ),
    "adalora_checkpoint_sizes": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("checkpoint", POINTER(adalora_checkpoint_t)),
            ("files", c_int32),
            ("n_adapters", c_void_p),
            ("n_tensors", c_void_p),
        ),
        doc="""How much there is in files.

@param files `ADALORA_FILES_ADAPTER` or `ADALORA_FILES_STATE`.
@param n_adapters Receives the number of adapters, 0 for the training state; may be NULL.
@param n_tensors Receives the number of tensors that belong to no adapter; may be NULL.
""",
    ),
    "adalora_checkpoint_adapter": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("checkpoint", POINTER(adalora_checkpoint_t)),
            ("index", c_int64),
            ("adapter", POINTER(adalora_adapter_info_t)),
        ),
        doc="""What an adapter in the checkpoint is.

@param index 0 or more: adapters are in the order of their names.
@param adapter Receives it; its `struct_size` is set by the caller. What it points to lives as long
as the checkpoint.
""",
    ),
    "adalora_checkpoint_read_adapter": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("checkpoint", POINTER(adalora_checkpoint_t)),
            ("index", c_int64),
            ("params", POINTER(adalora_triplets_t)),
        ),
        doc="""Reads an adapter's triplets into host memory, converted to the types that are wanted, to the nearest.

@param index As in `adalora_checkpoint_adapter`.
@param params Receives them. With room for `rank` triplets each comes to its place, and zeros where
the file holds none; with room for `kept` of them, those of the file come alone.
@return `ADALORA_ERROR_INCOMPLETE` where the file could not be read to the end: `params` are
undefined.
""",
    ),
    "adalora_checkpoint_tensor": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("checkpoint", POINTER(adalora_checkpoint_t)),
            ("files", c_int32),
            ("index", c_int64),
            ("tensor", POINTER(adalora_tensor_t)),
        ),
        doc="""What a tensor in the checkpoint is.

@param files `ADALORA_FILES_ADAPTER`, for those that belong to no adapter, or `ADALORA_FILES_STATE`.
@param index 0 or more: tensors are in the order of their names.
@param tensor Receives it; its `struct_size` is set by the caller. What it points to lives as long as
the checkpoint.
""",
    ),
    "adalora_checkpoint_read_tensor": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("checkpoint", POINTER(adalora_checkpoint_t)),
            ("files", c_int32),
            ("index", c_int64),
            ("data", c_void_p),
            ("bytes", c_size_t),
        ),
        doc="""Reads a tensor's elements as they are in the file, row-major and without gaps.

@param files As in `adalora_checkpoint_tensor`.
@param index As in `adalora_checkpoint_tensor`.
@param data Receives them, in host memory; may be NULL where there is none.
@param bytes Room at `data`: the tensor's bytes.
@return `ADALORA_ERROR_INCOMPLETE` where the file could not be read to the end: `data` is undefined.
""",
    ),
    "adalora_context_create": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("desc", POINTER(adalora_context_desc_t)),
            ("context", POINTER(POINTER(adalora_context_t))),
        ),
        doc="""Makes a context. No thread is started and no device memory taken before it is asked to compute or to
prepare; on CUDA the libraries are found and the driver started.

@param desc What to make; `backend` must be named.
@param context Receives the handle; written on success alone. Destroy it by
`adalora_context_destroy`.
@return `ADALORA_ERROR_INVALID_ARGUMENT` for a field out of range;
`ADALORA_ERROR_BACKEND_UNAVAILABLE` where this library or machine lacks the backend, with what was
looked for: on CUDA also where there is no driver, one older than that of CUDA 12.0, no device of
that number, or one of a compute capability below 8.0.
""",
    ),
    "adalora_context_prepare": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("context", POINTER(adalora_context_t)),
            ("stream", c_void_p),
        ),
        doc="""Takes now what the context would otherwise take at its first computation: the pool's threads on the
CPU; on CUDA, the device's primary context, the kernels, and two cuBLAS handles where none was lent,
so that two calls at a time enqueue products and others wait for them. May allocate and synchronise;
after it none but binds and what has _sync in its name does. (CUDA itself loads the code of cuBLAS's
kernels, and with drivers before that of CUDA 12.4 of this library's, at their first launch, unless
CUDA_MODULE_LOADING in the environment is EAGER.) Not beside a capture, here and where a context
ends: CUDA may break off what any stream of the process has begun to capture.

@param stream A `cudaStream_t` on CUDA; not read on the CPU.
@return `ADALORA_ERROR_INVALID_STATE` where the stream is being captured into a graph: prepare first.
""",
    ),
    "adalora_context_describe": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("context", POINTER(adalora_context_t)),
            ("text", c_void_p),
            ("bytes", c_void_p),
        ),
        doc="""Says in words what the context computes with: library version, backend, threads, instruction set,
libraries and their paths.

@param text Receives the text, ended by a zero byte; NULL to ask for the size alone.
@param bytes In: the room at `text`. Out: the bytes needed, the zero byte included, also where the
room is too small.
@return `ADALORA_ERROR_INVALID_ARGUMENT` where the room is too small; then `text` is not written.
""",
    ),
    "adalora_context_gradient_factor": Function(
        restype=adalora_status_t,
        is_status=True,
        arguments=(
            ("context", POINTER(adalora_context_t)),
            ("sum_of_squares", c_void_p),
            ("loss_scale", c_void_p),
            ("max_norm", c_double),
            ("grad_factor", c_void_p),
            ("stream", c_void_p),
        ),
        doc="""From the sum of squares of all gradients (`adalora_allocator_gradient_norm`, and the trainer's own)
makes the factor that unscales and clips them: `min(1, max_norm / (norm + 1e-6)) / loss_scale` with
`norm = sqrt(sum_of_squares) / loss_scale`, as PyTorch's `clip_grad_norm_` has it.

@param sum_of_squares One value.
@param loss_scale One value, what the loss was multiplied by; NULL: 1.
@param max_norm Above 0; infinity clips nothing.
@param grad_factor Receives one value.

The pointers are in the memory of the context's backend.
""",
    ),
    "adalora_context_destroy": Function(
        restype=None,
        is_status=False,
        arguments=(("context", POINTER(adalora_context_t)),),
        doc="""Destroys a context; NULL is nothing. Adapters and allocators made from it go on working: it ends with
the last of them, and on CUDA the kernels with it, which graphs that were captured must not run any
more.
""",
    ),
    "adalora_version": Function(
        restype=c_uint32,
        is_status=False,
        arguments=(),
        doc="""Version of the library: `major << 16 | minor << 8 | patch`.""",
    ),
    "adalora_abi_version": Function(
        restype=c_uint32,
        is_status=False,
        arguments=(),
        doc="""Version of the interface that the library serves: compare it with `ADALORA_ABI_VERSION` after
loading.
""",
    ),
    "adalora_status_name": Function(
        restype=c_char_p,
        is_status=False,
        arguments=(("status", adalora_status_t),),
        doc="""The name of a status, such as "ADALORA_ERROR_INVALID_ARGUMENT"; "unknown status" for another number.
Never NULL, valid for ever.
""",
    ),
    "adalora_last_error": Function(
        restype=c_char_p,
        is_status=False,
        arguments=(),
        doc="""The text of this thread's last error: which call, which adapter, which argument, what was found and
what was expected. Empty before the first. A call that succeeds leaves it alone. Never NULL; valid
until this thread's next failing call.
""",
    ),
}
