"""Forward and backward on tensors: native calls, contexts by device, and the function that autograd differentiates."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _bindings as c
from ..adapter import Adapter, Stage
from ..arrays import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, NAMES, View, view
from ..context import Context
from ..errors import InvalidArgumentError, UnsupportedError
from .distributed import is_dtensor

DTYPES = {torch.float32: FLOAT32, torch.float64: FLOAT64, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@view.register(Tensor)
def _(tensor: Tensor, name: str) -> View:
    sharded = is_dtensor(tensor)
    if tensor.layout != torch.strided or tensor.device.type == "meta" or sharded:
        found = "one on the meta device" if tensor.device.type == "meta" else f"one of layout {tensor.layout}"
        found = "one that is spread over processes" if sharded else found
        raise InvalidArgumentError(f"{name}: expected a tensor with memory of its own, found {found}")
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    kind = str(tensor.dtype).removeprefix("torch.")
    return View(tensor.data_ptr(), tuple(tensor.shape), strides, size, DTYPES.get(tensor.dtype), True, kind)


def context(device: torch.device, threads: int | None = None) -> Context:
    """What computes on a device: one context for each, and on the CPU for each number of threads.

    Args:
        device: of type cpu or cuda.
        threads: how many compute on the CPU; None: PyTorch's number.

    """
    if device.type == "cpu":
        return _cpu_context(torch.get_num_threads() if threads is None else threads)
    if device.type == "cuda":
        return _cuda_context(device.index or 0)
    raise UnsupportedError(f"device: expected one of type cpu or cuda, found {device}")


@cache
def _cpu_context(threads: int) -> Context:
    return Context("cpu", threads=threads, parallel=_torch_parallel())


@cache
def _cuda_context(index: int) -> Context:
    return Context("cuda", device=index)


def _torch_parallel() -> Any:
    """The entry of the OpenMP runtime that PyTorch runs on, so that its idle threads do the library's work."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looked up in the library's own dependencies: another OpenMP runtime in the process has threads of its own.
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None


@cache
def native_adapter(
    on: Context,
    in_features: int,
    out_features: int,
    r: int,
    dtype: torch.dtype,
    activation_dtype: torch.dtype,
    *,
    lora_dropout: float = 0.0,
    place: int = 0,
) -> Adapter:
    """The native object for a geometry, one for all layers that have it.

    Args:
        on: what computes.
        in_features: input features.
        out_features: output features.
        r: rank at creation.
        dtype: element type of the triplets.
        activation_dtype: element type of x and y.
        lora_dropout: probability of dropping an element of x.
        place: position in a call, which takes each native object once.

    """
    return Adapter(
        on,
        in_features,
        out_features,
        r,
        lora_dropout=lora_dropout,
        dtype=NAMES[DTYPES[dtype]],
        activation_dtype=NAMES[DTYPES[activation_dtype]],
    )


class Part(NamedTuple):
    """What one adapter adds to one output."""

    y: Tensor
    """The base layer's output, [..., out]."""
    A: Tensor
    """[r, in]."""
    E: Tensor
    """[r, 1]."""
    B: Tensor
    """[out, r]."""
    scaling: float
    """Multiplier of the adapter's output."""
    lora_dropout: float = 0.0
    """Probability with which an element of x is dropped for it."""
    in_place: bool = False
    """Whether `y` may be overwritten by the result."""
    weight: Tensor | None = None
    """[out, in], the frozen weight that y was made with, where y itself carries no gradient to x: backward then adds
    `dy weight` to the gradient for x, in memory that it has at hand anyway."""


def svd_linear(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """`y + scaling * dropout(x) A^T diag(E) B^T` for every part, in one call that reads x once.

    x is cast to each output's type (all outputs have the same), and A, E and B to what goes with it: float64 and
    float32 as the output, half precision as it is or else float32. Gradients come for x, y, A, E and B, once
    differentiable, from one node of the graph for all parts. With dropout, seeds are drawn from PyTorch's generator of
    x's device, for all parts at once.

    Args:
        x: [..., in].
        parts: one or several adapters; each y has x's leading dimensions.

    Returns:
        One output for each part, of y's shape and type.

    """
    if not parts:
        raise InvalidArgumentError("parts: expected at least one, found none")
    _check_mode(x, parts)
    if traced():
        # At its first use: the operators are made from what stands here.
        from .operators import by_operator

        _check(x, parts)
        return by_operator(x, parts)
    call = prepared(x, parts)
    ys, As, Es, Bs, scalings, _, in_place, weights = zip(*parts, strict=True)
    if x.dtype is not call.dtype:
        x = x.to(call.dtype)
    if call.casts:
        types = call.param_dtypes
        As, Es, Bs = (tuple(p.to(dtype) for p, dtype in zip(ps, types, strict=True)) for ps in (As, Es, Bs))
    seeds = None
    if call.drops:
        # Row by row a part's seed and offset.
        seeds = torch.randint(2**63 - 1, (len(parts), 2), dtype=torch.int64, device=x.device)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *ys, *As, *Es, *Bs):
        return list(_SVDLinear.apply(call, scalings, in_place, weights, seeds, x, *ys, *As, *Es, *Bs))
    outputs = _to_write(ys, in_place)
    call.forward(x, As, Es, Bs, outputs, scalings, None, seeds)
    return outputs


def prepared(x: Tensor, parts: Sequence[Part]) -> Call:
    """The thread's descriptors for such a call, after a check of what the native one cannot see: it gets addresses.

    What stays from step to step is looked up by one key, and was checked when the key was new.
    """
    geometries = []
    shapes = [x.shape]
    for y, A, E, B, _, lora_dropout, in_place, _ in parts:
        geometry = (lora_dropout, y.dtype, y.device, A.shape, A.dtype, A.device)
        geometries.append((*geometry, E.shape, E.dtype, E.device, B.shape, B.dtype, B.device))
        shapes.append(y.shape)
        if in_place and not (y.is_contiguous() and not y.is_neg()):
            _check(x, parts)
    key = (torch.get_num_threads(), x.device, *geometries)
    call = _this_thread.calls.get(key)
    if call is None or call.shapes != shapes:
        _check(x, parts)
        call = _call(key)
        call.set_tokens(x.shape[:-1].numel())
        call.shapes = shapes
    return call


def _check(x: Tensor, parts: Sequence[Part]) -> None:
    dtype = parts[0].y.dtype
    if dtype not in DTYPES:
        expected = ", ".join(NAMES.values())
        raise InvalidArgumentError(f"y: expected one of {expected}, found {str(dtype).removeprefix('torch.')}")
    for k, part in enumerate(parts):
        _check_part(part, f"parts[{k}]." if len(parts) > 1 else "", x, dtype)


def _check_part(part: Part, name: str, x: Tensor, dtype: torch.dtype) -> None:
    r, features = part.A.shape[0], part.A.shape[-1]
    if x.shape[-1] != features:
        raise InvalidArgumentError(f"{name}x: expected {features} features as A has, found {x.shape[-1]}")
    shapes = ((*x.shape[:-1], part.B.shape[0]), (r, features), (r, 1), (part.B.shape[0], r))
    for field, tensor, shape in zip("yAEB", part[:4], shapes, strict=True):
        if tensor.shape != shape:
            raise InvalidArgumentError(f"{name}{field}: expected shape {list(shape)}, found {list(tensor.shape)}")
        if tensor.device != x.device:
            raise InvalidArgumentError(f"{name}{field}: expected a tensor on {x.device}, found one on {tensor.device}")
    if part.y.dtype != dtype:
        raise InvalidArgumentError(f"{name}y: expected {dtype} as the first, found {part.y.dtype}")
    if part.in_place and not (part.y.is_contiguous() and not part.y.is_neg()):
        raise InvalidArgumentError(
            f"{name}y: expected a contiguous tensor to overwrite, found strides {list(part.y.stride())}"
        )


def traced() -> bool:
    """Whether something sees PyTorch's operators alone: a compiler, an exporter, a mode, or functorch."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def param_dtype(activation: torch.dtype, *params: torch.dtype) -> torch.dtype:
    """What A, E and B are cast to, to go with the activations."""
    wide = activation in (torch.float32, torch.float64)
    return activation if wide or all(dtype == activation for dtype in params) else torch.float32


def _check_mode(x: Tensor, parts: Sequence[Part]) -> None:
    """Refuse what would take the base layer for the whole."""
    if torch.compiler.is_dynamo_compiling():
        return
    if torch._C._is_tracing():
        raise UnsupportedError(
            "svd_linear: expected a model that runs, found one that torch.jit traces: use torch.export, or merge "
            "adapters first"
        )
    if forward_ad._current_level >= 0:
        tensors = [x, *(tensor for part in parts for tensor in part[:4])]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise UnsupportedError("svd_linear: expected differentiation in reverse mode, found forward mode")


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated again: what they depend on leads to an error."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("an adapter's gradients cannot be differentiated again: they are once_differentiable")


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Let a backward pass give gradients that cannot be differentiated again, and say so where that is tried.

    PyTorch's decorator of this name takes them for constants where the incoming gradient is one: but they depend on
    what was saved, too.
    """

    @wraps(backward)
    def run(ctx: Any, *args: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *args)
        with torch.no_grad():
            outputs = backward(ctx, *args)
        sources = [t for t in (*ctx.saved_tensors, *args) if t is not None and t.requires_grad]
        given = [output for output in outputs if output is not None]
        refusing = iter(_Once.apply(len(given), *given, *sources))
        return tuple(None if output is None else next(refusing) for output in outputs)

    return run


class _SVDLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        scalings: tuple[float, ...],
        in_place: tuple[bool, ...],
        weights: tuple[Tensor | None, ...],
        seeds: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        n = len(scalings)
        outputs = _to_write(tensors[:n], in_place)
        # h of one part after the other: one tensor to keep until backward.
        h = torch.empty(call.tokens * call.starts[-1], dtype=call.compute_dtype, device=x.device)
        call.forward(x, tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :], outputs, scalings, h, seeds)
        ctx.call, ctx.scalings, ctx.tokens = call, scalings, call.tokens
        ctx.save_for_backward(x, h, seeds, *weights, *tensors[n:])
        if True in in_place:
            ctx.mark_dirty(*(y for y, overwrite in zip(outputs, in_place, strict=True) if overwrite))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, seeds, *others = ctx.saved_tensors
        n, call = len(dys), ctx.call
        weights, As, Es, Bs = (others[k : k + n] for k in range(0, 4 * n, n))
        # An output that the loss does not depend on has no gradient to give on.
        given = [k for k, dy in enumerate(dys) if dy is not None]
        dx = None
        if ctx.needs_input_grad[5] and given:
            dx = _base_gradient(x, [(_rows(dys[k]), weights[k]) for k in given if weights[k] is not None])
        grads: list[Tensor | None] = [None] * (3 * n)
        shares = []
        for k in given:
            A, E, B = As[k], Es[k], Bs[k]
            grads[k], grads[n + k], grads[2 * n + k] = dA, dE, dB = _empty_like(A), _empty_like(E), _empty_like(B)
            h_at = h.data_ptr() + ctx.tokens * call.starts[k] * h.element_size()
            seed_at = None if seeds is None else seeds.data_ptr() + 16 * k
            shares.append((A, E, B, ctx.scalings[k], dys[k], dA, dE, dB, h_at, seed_at))
        if shares:
            if len(given) < n or call.thread != threading.get_ident():
                call = _call((*call.key[:2], *(call.key[2 + k] for k in given)))
            if call.tokens != ctx.tokens:
                call.set_tokens(ctx.tokens)
            call.backward(x, dx, shares)
        return (None, None, None, None, None, dx, *dys, *grads)


def _base_gradient(x: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Where the gradient for x goes: a tensor that holds the sum of `dy weight`."""
    if not terms:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    (dy, weight), *others = terms
    # Into memory that is there: autocast, which may be on around backward, leaves such operators alone.
    rows = dx.view(dy.shape[0], x.shape[-1])
    torch.mm(dy, weight, out=rows)
    for dy, weight in others:
        rows.addmm_(dy, weight)
    return dx


def _to_write(ys: Sequence[Tensor], in_place: Sequence[bool]) -> list[Tensor]:
    """Where outputs go: tensors that hold the base layer's."""
    return [
        y if overwrite else y.clone(memory_format=torch.contiguous_format)
        for y, overwrite in zip(ys, in_place, strict=True)
    ]


def _empty_like(p: Tensor) -> Tensor:
    return torch.empty_like(p) if p.is_contiguous() else torch.empty_like(p, memory_format=torch.contiguous_format)


# Where fields stand in words of 8 bytes.
_MATRIX, _STRUCT = (ctypes.sizeof(kind) // 8 for kind in (c.adalora_matrix_t, c.adalora_call_t))
_STRIDE = c.adalora_matrix_t.row_stride.offset // 8
_X, _DX, _STRUCTS = 0, _MATRIX, 2 * _MATRIX


def _places(k: int, *names: str) -> tuple[int, ...]:
    """Where fields of a part's `adalora_call_t` stand, such as `params.A`."""
    places = []
    for name in names:
        kind, offset = c.adalora_call_t, 0
        for field in name.split("."):
            offset += getattr(kind, field).offset
            kind = dict(kind._fields_)[field]
        places.append(_STRUCTS + k * _STRUCT + offset // 8)
    return tuple(places)


class Call:
    """The C descriptors of a group of adapters, refilled for each call of one thread.

    They lie in one array of words: x, dx, and the parts' `adalora_call_t`. What differs from call to call is written by
    its place, since each look at a field of a ctypes structure makes an object. Nothing else runs between that and the
    native call.

    Args:
        key: what `prepared` makes of a call.

    """

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self.thread = threading.get_ident()
        threads, device, *geometries = key
        self._device = device
        self.dtype = geometries[0][1]
        self.compute_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.drops = any(geometry[0] for geometry in geometries)
        self.param_dtypes, self.starts, self.casts = [], [0], False
        adapters = []
        for k, (lora_dropout, _, _, A, A_dtype, _, _, E_dtype, _, B, B_dtype, _) in enumerate(geometries):
            dtype = param_dtype(self.dtype, A_dtype, E_dtype, B_dtype)
            self.casts = self.casts or {A_dtype, E_dtype, B_dtype} != {dtype}
            self.param_dtypes.append(dtype)
            self.starts.append(self.starts[-1] + A[0])
            adapters.append(
                native_adapter(
                    context(device, threads), A[1], B[0], A[0], dtype, self.dtype, lora_dropout=lora_dropout, place=k
                )
            )
        self.library = adapters[0].library
        # Held here: an adapter lives as long as a call that names it.
        self._handles = [adapter.handle for adapter in adapters]
        self._words = (ctypes.c_uint64 * (_STRUCTS + _STRUCT * len(adapters)))()
        self._reals = (ctypes.c_double * len(self._words)).from_buffer(self._words)
        structs = (c.adalora_call_t * len(adapters)).from_buffer(self._words, 8 * _STRUCTS)
        self._group = (structs, ctypes.sizeof(c.adalora_call_t), len(adapters))
        code = DTYPES[self.dtype]
        matrices = [c.adalora_matrix_t.from_buffer(self._words, 8 * at) for at in (_X, _DX)]
        for matrix in matrices:
            matrix.columns, matrix.dtype = adapters[0].in_features, code
        self._x, self._dx = map(ctypes.byref, matrices)
        for adapter, handle, struct in zip(adapters, self._handles, structs, strict=True):
            struct.struct_size = ctypes.sizeof(c.adalora_call_t)
            struct.adapter = handle.pointer
            for matrix in (struct.y, struct.dy):
                matrix.columns, matrix.dtype = adapter.out_features, code
            r = adapter.init_r
            for triplets in (struct.params, struct.grads):
                for field, (rows, columns) in zip(
                    "AEB", ((r, adapter.in_features), (1, r), (adapter.out_features, r)), strict=True
                ):
                    matrix = getattr(triplets, field)
                    matrix.rows, matrix.columns, matrix.dtype = rows, columns, adapter.param_dtype
            matrices += (struct.y, struct.dy)
        self._of_tokens = matrices
        parts = range(len(adapters))
        self._params = [_places(k, "params.A", "params.E", "params.B", "scaling") for k in parts]
        self._forward = [_places(k, "y", "h") for k in parts]
        self._backward = [_places(k, "grads.A", "grads.E", "grads.B", "h") for k in parts]
        self._dy = [_places(k, "dy")[0] for k in parts]
        self._dropout = [_places(k, "dropout.seed", "dropout.offset") for k in parts]
        self.tokens = -1
        self.shapes: list[torch.Size] | None = None
        """Shapes of x and of each y, where `prepared` found them to fit."""
        self._scratch = _this_thread.scratch
        self._workspace_bytes = 0

    def set_tokens(self, tokens: int) -> None:
        """Say how many rows x and y have."""
        size = ctypes.c_size_t()
        self.library.adalora_adapter_sizes(*self._group, tokens, None, ctypes.byref(size))
        for matrix in self._of_tokens:
            matrix.rows = tokens
        self.tokens, self.shapes, self._workspace_bytes = tokens, None, size.value

    def forward(
        self,
        x: Tensor,
        As: Sequence[Tensor],
        Es: Sequence[Tensor],
        Bs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        scalings: Sequence[float],
        h: Tensor | None,
        seeds: Tensor | None,
    ) -> None:
        """Add to the outputs, which hold the base layer's, and keep h: [tokens, r] of one part after the other.

        Args:
            x: [..., in].
            As: [r, in] for each part, as everything that follows.
            Es: [r, 1].
            Bs: [out, r].
            outputs: [..., out], contiguous.
            scalings: multipliers.
            h: all parts' elements; None: nothing is kept.
            seeds: [parts, 2]: seed and offset, where a part drops.

        """
        words = self._words
        kept: list[Any] = [self._set_rows(_X, x)]
        at = 0 if h is None else h.data_ptr()
        for k, (A, E, B, output, scaling) in enumerate(zip(As, Es, Bs, outputs, scalings, strict=True)):
            kept.append(self._set_params(k, A, E, B, scaling))
            y_place, h_place = self._forward[k]
            words[y_place], words[h_place] = output.data_ptr(), at
            if h is not None:
                at += self.tokens * A.shape[0] * h.element_size()
            if seeds is not None:
                self._set_dropout(k, seeds.data_ptr() + 16 * k)
        self._run(self.library.adalora_adapter_forward, Stage.BOTH, self._x)

    def backward(self, x: Tensor, dx: Tensor | None, shares: Sequence[tuple[Any, ...]]) -> None:
        """Write gradients for A, E and B, and add to the one for x.

        Args:
            x: as forward had it.
            dx: of x's shape, contiguous; None: not wanted.
            shares: for each part A, E, B, the scaling, dy, dA, dE, dB, and the addresses of its h and of its seed.

        """
        words = self._words
        kept: list[Any] = [self._set_rows(_X, x)]
        if dx is not None:
            words[_DX] = dx.data_ptr()
        for k, (A, E, B, scaling, dy, dA, dE, dB, h_at, seed_at) in enumerate(shares):
            kept.append(self._set_params(k, A, E, B, scaling))
            kept.append(self._set_rows(self._dy[k], dy))
            dA_place, dE_place, dB_place, h_place = self._backward[k]
            words[dA_place], words[dE_place], words[dB_place] = dA.data_ptr(), dE.data_ptr(), dB.data_ptr()
            words[h_place] = h_at
            if seed_at is not None:
                self._set_dropout(k, seed_at)
        # Gradients are overwritten.
        accumulate, dx_matrix = 0, None if dx is None else self._dx
        self._run(self.library.adalora_adapter_backward, Stage.BOTH, accumulate, self._x, dx_matrix)

    def _set_rows(self, place: int, tensor: Tensor) -> Tensor:
        """Point a matrix to a tensor's rows; returns what has to live as long as the call."""
        words = self._words
        if tensor.is_contiguous() and not tensor.is_neg():
            words[place], words[place + _STRIDE] = tensor.data_ptr(), 0
            return tensor
        rows = _rows(tensor)
        words[place] = rows.data_ptr()
        words[place + _STRIDE] = rows.stride(0) if rows.shape[0] > 1 else 0
        return rows

    def _set_params(self, k: int, A: Tensor, E: Tensor, B: Tensor, scaling: float) -> Any:
        """Point a part to A, E and B; returns what has to live as long as the call."""
        words = self._words
        if (
            not (A.is_contiguous() and E.is_contiguous() and B.is_contiguous())
            or A.is_neg()
            or E.is_neg()
            or B.is_neg()
        ):
            A, E, B = (p.resolve_neg().contiguous() for p in (A, E, B))
        A_place, E_place, B_place, scaling_place = self._params[k]
        words[A_place], words[E_place], words[B_place] = A.data_ptr(), E.data_ptr(), B.data_ptr()
        self._reals[scaling_place] = scaling
        return A, E, B

    def _set_dropout(self, k: int, seed: int) -> None:
        seed_place, offset_place = self._dropout[k]
        self._words[seed_place], self._words[offset_place] = seed, seed + 8

    def _run(self, function: Any, *arguments: Any) -> None:
        if self._device.type == "cpu":
            scratch = self._scratch
            if scratch.bytes < self._workspace_bytes:
                scratch.reserve(self._workspace_bytes)
            function(*self._group, *arguments, scratch.address, scratch.bytes, None)
        else:
            # New memory for each call, which PyTorch's allocator orders by stream.
            workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=self._device)
            function(*self._group, *arguments, workspace.data_ptr(), workspace.numel(), _stream(self._device))


class _Scratch:
    """A thread's working memory on the CPU."""

    def __init__(self) -> None:
        self.address, self.bytes = 0, 0

    def reserve(self, size: int) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8)
        self.address, self.bytes = self._memory.data_ptr(), size


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], Call] = {}
        self.scratch = _Scratch()


_this_thread = _ThisThread()


def _call(key: tuple[Any, ...]) -> Call:
    call = _this_thread.calls.get(key)
    if call is None:
        call = _this_thread.calls[key] = Call(key)
    return call


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _rows(tensor: Tensor) -> Tensor:
    """A tensor as rows of features, one element after the other in a row."""
    features = tensor.shape[-1]
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return tensor if tensor.dim() == 2 else tensor.view(tensor.shape[:-1].numel(), features)
    rows = tensor.reshape(tensor.shape[:-1].numel(), features)
    columns_apart = features > 1 and rows.stride(1) != 1
    rows_overlap = rows.shape[0] > 1 and rows.stride(0) < features
    return rows.contiguous() if columns_apart or rows_overlap else rows
