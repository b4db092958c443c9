"""One layer's adapter: forward, backward, merging."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _bindings as c
from ._handle import Handle, NativeObject, refuse_copy
from .arrays import (
    HOST,
    NAMES,
    Array,
    Lease,
    Triplets,
    as_aligned,
    as_buffer,
    as_flags,
    as_matrix,
    as_values,
    compute_dtype,
    dtype_code,
    one_value,
)
from .context import Context
from .errors import InvalidArgumentError


class Stage(enum.IntEnum):
    """Which part of a pass a call computes: tensor-parallel processes sum h or g between the two."""

    PROJECT = c.ADALORA_STAGE_PROJECT
    """The products with the first factor: `h = x A^T` forward, `g = scaling dy B` backward."""
    EXPAND = c.ADALORA_STAGE_EXPAND
    """The products with the second factor, which read h (forward) or g and h (backward)."""
    BOTH = c.ADALORA_STAGE_BOTH
    """The whole pass."""


class Adapter(NativeObject):
    """The geometry of one layer's adapter. It holds no array: each call takes them.

    Its triplets are `A` [rank, in_features], `E` [rank] and `B` [out_features, rank]; it adds
    `scaling * ((x A^T) * E) B^T` to a layer's output.

    Args:
        context: what computes.
        in_features: input features of the whole layer.
        out_features: output features of the whole layer.
        init_r: rank, 0 or more. It stays the divisor of the scaling when triplets are masked.
        lora_alpha: numerator of the scaling; 0 stands for `ranknum`.
        lora_dropout: probability with which an element of the adapter's input is dropped, in [0, 1).
        dtype: element type of A, E and B as the forward pass reads them: a NumPy type or its name, or "bfloat16".
        activation_dtype: element type of x, y, dx and dy; None: as `dtype`.
        operand_terms: how many half-precision terms, 1 to 3, stand for a float32 A or B where a backend multiplies
            in half precision; 0: the default.
        in_local: columns of A in this tensor-parallel process; 0: all.
        in_begin: first of them.
        out_local: rows of B in this tensor-parallel process; 0: all.
        out_begin: first of them.
        ranknum: rank at creation, the divisor of the scaling, where the adapter is compacted (see `Allocator.compact`);
            0: `init_r`.

    """

    def __init__(
        self,
        context: Context,
        in_features: int,
        out_features: int,
        init_r: int = 12,
        *,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        dtype: Any = "float32",
        activation_dtype: Any = None,
        operand_terms: int = 0,
        in_local: int = 0,
        in_begin: int = 0,
        out_local: int = 0,
        out_begin: int = 0,
        ranknum: int = 0,
    ) -> None:
        self.library, self.memory = context.library, context.memory
        self.in_features, self.out_features, self.init_r = in_features, out_features, init_r
        self.lora_alpha, self.lora_dropout = lora_alpha, lora_dropout
        self.ranknum = ranknum or init_r
        self.in_local, self.out_local = in_local or in_features, out_local or out_features
        self.param_dtype = dtype_code(dtype)
        self.activation_dtype = (
            self.param_dtype if activation_dtype is None else dtype_code(activation_dtype, "activation_dtype")
        )
        desc = c.adalora_adapter_desc_t(
            struct_size=ctypes.sizeof(c.adalora_adapter_desc_t),
            in_features=in_features,
            out_features=out_features,
            rank=init_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            param_dtype=self.param_dtype,
            activation_dtype=self.activation_dtype,
            operand_terms=operand_terms,
            in_local=in_local,
            in_begin=in_begin,
            out_local=out_local,
            out_begin=out_begin,
            ranknum=ranknum,
        )
        pointer = ctypes.POINTER(c.adalora_adapter_t)()
        self.library.adalora_adapter_create(context.handle.pointer, ctypes.byref(desc), ctypes.byref(pointer))
        self._handle = Handle(self.library, pointer, self.library.adalora_adapter_destroy, context.callbacks)

    @property
    def scaling(self) -> float:
        """Multiplier of the adapter's output: `(lora_alpha or ranknum) / (ranknum + 1e-5)`."""
        return (self.lora_alpha if self.lora_alpha > 0 else self.ranknum) / (self.ranknum + 1e-5)

    @property
    def compute_dtype(self) -> int:
        """Code of the type of saved activations and optimiser state: float64 for float64, else float32."""
        return compute_dtype(self.param_dtype)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of A, E and B in this process."""
        return (self.init_r, self.in_local), (self.init_r,), (self.out_local, self.init_r)

    def zeros(self, dtype: Any = None) -> Triplets:
        """New arrays of zeros in the shapes of A, E and B.

        Args:
            dtype: None: the type of gradients, moments and averages (float64 for float64, else float32).

        """
        code = self.compute_dtype if dtype is None else dtype_code(dtype)
        return Triplets(*(self.memory.zeros(shape, code, "zeros") for shape in self.shapes))

    def new_params(self, seed: int, *, dtype: Any = None, stream: int | None = None) -> Triplets:
        """New arrays with initial triplets.

        Args:
            seed: as in `initialize`: give each adapter its own.
            dtype: None: the adapter's; "float32" makes a master copy of half-precision parameters.
            stream: CUDA stream.

        """
        params = self.zeros(NAMES[self.param_dtype] if dtype is None else dtype)
        self.initialize(params, seed, stream=stream)
        return params

    def initialize(self, params: Triplets, seed: int, *, stream: int | None = None) -> None:
        """Write the initial triplets: A and B normal with deviation 0.02, E zero (PEFT's `reset_lora_parameters`).

        Each element is a function of the seed and of its place in the whole layer.
        """
        handle, lease = self.handle, self.memory.lease(stream)
        if not 0 <= seed < 1 << 64:
            raise InvalidArgumentError(f"seed: expected 0 to 2^64 - 1, found {seed}")
        self.library.adalora_adapter_initialize(
            handle.pointer,
            ctypes.byref(self._triplets(params, "params", (self.param_dtype, c.ADALORA_FLOAT32), lease, writable=True)),
            seed,
            stream,
        )

    def delta_weight(
        self,
        params: Triplets,
        w: Array,
        *,
        scaling: float = 0.0,
        fan_in_fan_out: bool = False,
        accumulate: bool = False,
        stream: int | None = None,
    ) -> None:
        """Write `scaling * B diag(E) A`, PEFT's `get_delta_weight`, into `w`.

        Args:
            params: the triplets.
            w: [out, in], with `fan_in_fan_out` [in, out]; of any element type.
            scaling: 0: the adapter's own.
            fan_in_fan_out: whether the layer's weight is [in, out], as in transformers' Conv1D.
            accumulate: add to `w` instead of overwriting it.
            stream: CUDA stream.

        """
        handle, lease = self.handle, self.memory.lease(stream)
        self.library.adalora_adapter_delta_weight(
            handle.pointer,
            ctypes.byref(self._triplets(params, "params", (self.param_dtype,), lease)),
            scaling,
            fan_in_fan_out,
            accumulate,
            ctypes.byref(self._weight(w, "w", fan_in_fan_out, lease, writable=True)),
            stream,
        )

    def merge(
        self,
        params: Triplets,
        w: Array,
        *,
        backup: Array | None = None,
        non_finite: Array | None = None,
        scaling: float = 0.0,
        fan_in_fan_out: bool = False,
        stream: int | None = None,
    ) -> None:
        """Add the delta weight to a base weight, PEFT's `merge`.

        Args:
            params: the triplets.
            w: the base weight, [out, in] or with `fan_in_fan_out` [in, out], of any element type.
            backup: as `w`; receives the base as it was, so that `unmerge` restores it exactly.
            non_finite: one float32, set to 1 where a merged element is not finite, else left alone.
            scaling: 0: the adapter's own.
            fan_in_fan_out: whether the layer's weight is [in, out].
            stream: CUDA stream.

        """
        handle, lease = self.handle, self.memory.lease(stream)
        w_matrix = self._weight(w, "w", fan_in_fan_out, lease, writable=True)
        self.library.adalora_adapter_merge(
            handle.pointer,
            ctypes.byref(self._triplets(params, "params", (self.param_dtype,), lease)),
            scaling,
            fan_in_fan_out,
            ctypes.byref(w_matrix),
            None
            if backup is None
            else ctypes.byref(self._backup(backup, w_matrix, fan_in_fan_out, lease, writable=True)),
            None
            if non_finite is None
            else as_values(non_finite, "non_finite", dtype=np.float32, size=1, writable=True, lease=lease),
            stream,
        )

    def unmerge(
        self,
        params: Triplets | None,
        w: Array,
        *,
        backup: Array | None = None,
        scaling: float = 0.0,
        fan_in_fan_out: bool = False,
        stream: int | None = None,
    ) -> None:
        """Take the delta weight out of a base weight again, PEFT's `unmerge`.

        Args:
            params: the triplets; may be None with a backup.
            w: the merged weight.
            backup: what `merge` kept: `w` becomes its copy, bit for bit. None: the delta weight is subtracted.
            scaling: 0: the adapter's own.
            fan_in_fan_out: whether the layer's weight is [in, out].
            stream: CUDA stream.

        """
        handle, lease = self.handle, self.memory.lease(stream)
        w_matrix = self._weight(w, "w", fan_in_fan_out, lease, writable=True)
        self.library.adalora_adapter_unmerge(
            handle.pointer,
            None if params is None else ctypes.byref(self._triplets(params, "params", (self.param_dtype,), lease)),
            scaling,
            fan_in_fan_out,
            ctypes.byref(w_matrix),
            None if backup is None else ctypes.byref(self._backup(backup, w_matrix, fan_in_fan_out, lease)),
            stream,
        )

    def call(
        self,
        x: Array | None,
        params: Triplets,
        *,
        dx: Array | None = None,
        stream: int | None = None,
        **share: Any,
    ) -> GroupCall:
        """Prepare forward and backward of this adapter alone.

        Args:
            x: the layer's input, [tokens, in].
            params: the triplets.
            dx: [tokens, in], backward adds the adapter's part of the gradient for x to it; None: not wanted.
            stream: as in `GroupCall`.
            **share: the other fields of `Share`, such as `y`, `dy`, `grads` and `h`.

        """
        return GroupCall([Share(self, params, **share)], x, dx=dx, stream=stream)

    def _triplets(
        self, triplets: Triplets, name: str, dtypes: Sequence[int], lease: Lease, *, writable: bool = False
    ) -> c.adalora_triplets_t:
        try:
            A, E, B = triplets
        except (TypeError, ValueError):
            raise InvalidArgumentError(f"{name}: expected Triplets(A, E, B), found {type(triplets).__name__}") from None
        matrices = [
            as_matrix(array, f"{name}.{matrix}", shape=shape, dtypes=dtypes, writable=writable, lease=lease)
            for matrix, array, shape in zip("AEB", (A, E, B), self.shapes, strict=True)
        ]
        return c.adalora_triplets_t(*matrices)

    def _weight(
        self,
        w: Array,
        name: str,
        fan_in_fan_out: bool,
        lease: Lease,
        *,
        dtypes: Sequence[int] = tuple(NAMES),
        writable: bool = False,
    ) -> c.adalora_matrix_t:
        shape = (self.in_local, self.out_local) if fan_in_fan_out else (self.out_local, self.in_local)
        return as_matrix(w, name, shape=shape, dtypes=dtypes, writable=writable, lease=lease)

    def _backup(
        self, backup: Array, w: c.adalora_matrix_t, fan_in_fan_out: bool, lease: Lease, *, writable: bool = False
    ) -> c.adalora_matrix_t:
        return self._weight(backup, "backup", fan_in_fan_out, lease, dtypes=(w.dtype,), writable=writable)


class Dropout:
    """Where a call's dropout mask stands. The same place gives the same mask, in backward as in forward.

    No call moves it: a trainer adds to `offset[0]` once per step.

    Args:
        seed: a number, or an array of one uint64 that is used where it lies.
        offset: likewise.
        token0: number of the first row of x, where a process sees a part of the tokens.
        context: where numbers are put; None: in host memory.

    """

    def __init__(
        self, seed: int | Array, offset: int | Array = 0, *, token0: int = 0, context: Context | None = None
    ) -> None:
        memory = HOST if context is None else context.memory
        self.seed = one_value(seed, np.uint64, memory, "seed")
        self.offset = one_value(offset, np.uint64, memory, "offset")
        self.token0 = token0

    def struct(self, name: str, lease: Lease) -> c.adalora_dropout_t:
        """The C value; the arrays have to outlive it."""
        return c.adalora_dropout_t(
            as_values(self.seed, f"{name}.seed", dtype=np.uint64, size=1, lease=lease),
            as_values(self.offset, f"{name}.offset", dtype=np.uint64, size=1, lease=lease),
            self.token0,
        )


class Share(NamedTuple):
    """One adapter's share in a forward or backward call."""

    adapter: Adapter
    params: Triplets
    grads: Triplets | None = None
    """Gradients, each of the parameters' type or of the compute type; backward adds to them or overwrites them."""
    y: Array | None = None
    """[tokens, out]: holds the base layer's output, and forward adds the adapter's."""
    dy: Array | None = None
    """[tokens, out]: the gradient for y, which backward reads."""
    h: Array | None = None
    """[tokens, rank] of the compute type: forward keeps `x A^T` here for backward; None: backward computes it again."""
    g: Array | None = None
    """[tokens, rank] of the compute type: what backward's first stage hands to its second; None: not kept."""
    scaling: float = 0.0
    """Multiplier of the adapter's output; 0: the adapter's own."""
    pattern: Array | None = None
    """[rank] of uint8 or bool: which triplets are kept, where that is final: the others then cost nothing."""
    dropout: Dropout | None = None
    """Where the dropout mask stands; needed where the adapter drops."""


class GroupCall:
    """Forward and backward of one or several adapters that read the same x, prepared once and then run every step.

    It keeps the addresses of all its arrays, and the arrays alive: fill them anew for each step, in place. One thread
    at a time may run it.

    Args:
        shares: each adapter's share: query, key and value of one attention layer, for example.
        x: the layer's input, [tokens, in]; None where only a stage that does not read it is run.
        dx: [tokens, in], backward adds the adapters' part of the gradient for x to it; None: not wanted.
        workspace: scratch memory of `workspace_bytes` that several calls may share while they do not run at once, as
            `aligned_bytes` makes it; None: its own.
        stream: CUDA stream that the arrays are handed over to: what is in other streams by now, as far as the arrays
            tell, comes first in this one.

    """

    def __init__(
        self,
        shares: Sequence[Share],
        x: Array | None,
        *,
        dx: Array | None = None,
        workspace: Array | None = None,
        stream: int | None = None,
    ) -> None:
        if not shares:
            raise InvalidArgumentError("shares: expected at least one, found none")
        self.shares = tuple(shares)
        self.x, self.dx = x, dx
        first = self.shares[0].adapter
        self.library, memory = first.library, first.memory
        self._lease = memory.lease(stream)
        self.tokens = self._tokens()
        # Held here, so that closing an adapter takes nothing from under a prepared call.
        self._handles = [share.adapter.handle for share in self.shares]
        self._calls = (c.adalora_call_t * len(self.shares))()
        for k, share in enumerate(self.shares):
            self._fill(self._calls[k], share, self._handles[k], f"shares[{k}]." if len(self.shares) > 1 else "")
        self._size = (ctypes.sizeof(c.adalora_call_t), len(self.shares))
        self._x = self._input(x, "x", first, writable=False)
        self._dx = self._input(dx, "dx", first, writable=True)
        size = ctypes.c_size_t()
        self.library.adalora_adapter_sizes(self._calls, *self._size, self.tokens, None, ctypes.byref(size))
        self.workspace_bytes = size.value
        self.workspace = memory.aligned_bytes(size.value, "workspace") if workspace is None else workspace
        self._workspace = as_aligned(self.workspace, "workspace", size.value, self._lease)

    def forward(self, stages: int = Stage.BOTH, *, stream: int | None = None) -> None:
        """Add the adapters' outputs to each `y`: `y += scaling * ((x A^T) * E) B^T`."""
        self.library.adalora_adapter_forward(self._calls, *self._size, stages, self._x, *self._workspace, stream)

    def backward(self, stages: int = Stage.BOTH, *, accumulate: bool = True, stream: int | None = None) -> None:
        """Compute each `grads` and `dx` from `dy`.

        Args:
            stages: which part of the pass.
            accumulate: add to the gradients, or else overwrite them. `dx` is always added to.
            stream: CUDA stream.

        """
        self.library.adalora_adapter_backward(
            self._calls, *self._size, stages, accumulate, self._x, self._dx, *self._workspace, stream
        )

    def set_scaling(self, scaling: float, share: int = 0) -> None:
        """Change the multiplier of one adapter's output from the next call on; 0: the adapter's own."""
        self._calls[share].scaling = scaling

    def _tokens(self) -> int:
        first = self.shares[0]
        for array in (self.x, first.y, first.dy, first.h, first.g):
            if array is not None:
                return (*getattr(array, "shape", ()), 0)[0]
        raise InvalidArgumentError("x: expected an array, found none, nor one of y, dy, h and g to count tokens by")

    def _input(self, array: Array | None, name: str, adapter: Adapter, writable: bool) -> Any:
        if array is None:
            return None
        shape = (self.tokens, adapter.in_local)
        types = (adapter.activation_dtype,)
        return ctypes.byref(as_matrix(array, name, shape=shape, dtypes=types, writable=writable, lease=self._lease))

    def _fill(self, call: c.adalora_call_t, share: Share, handle: Handle, name: str) -> None:
        adapter, lease = share.adapter, self._lease
        call.struct_size = ctypes.sizeof(c.adalora_call_t)
        call.adapter = handle.pointer
        call.params = adapter._triplets(share.params, f"{name}params", (adapter.param_dtype,), lease)
        if share.grads is not None:
            either = (adapter.param_dtype, adapter.compute_dtype)
            call.grads = adapter._triplets(share.grads, f"{name}grads", either, lease, writable=True)
        call.scaling = share.scaling
        output, types = (self.tokens, adapter.out_local), (adapter.activation_dtype,)
        if share.y is not None:
            call.y = as_matrix(share.y, f"{name}y", shape=output, dtypes=types, writable=True, lease=lease)
        if share.dy is not None:
            call.dy = as_matrix(share.dy, f"{name}dy", shape=output, dtypes=types, lease=lease)
        saved, types = (self.tokens, adapter.init_r), (adapter.compute_dtype,)
        if share.h is not None:
            call.h, _ = as_buffer(share.h, f"{name}h", shape=saved, dtypes=types, lease=lease)
        if share.g is not None:
            call.g, _ = as_buffer(share.g, f"{name}g", shape=saved, dtypes=types, lease=lease)
        if share.pattern is not None:
            call.pattern = as_flags(share.pattern, f"{name}pattern", size=adapter.init_r, lease=lease)
        if share.dropout is not None:
            call.dropout = share.dropout.struct(f"{name}dropout", lease)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: the descriptors hold addresses."""
        refuse_copy(self)
