"""Forward and backward on tensors: native calls, contexts by device, and the function that autograd differentiates."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from .. import _bindings as c
from ..adapter import Adapter, Stage
from ..arrays import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, NAMES, Lease, View, view
from ..context import Context
from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError
from .distributed import is_dtensor

DTYPES = {torch.float32: FLOAT32, torch.float64: FLOAT64, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@view.register(Tensor)
def _(tensor: Tensor, name: str, lease: Lease) -> View:
    sharded = is_dtensor(tensor)
    if tensor.layout != torch.strided or tensor.device.type == "meta" or sharded:
        found = "one on the meta device" if tensor.device.type == "meta" else f"one of layout {tensor.layout}"
        found = "one that is spread over processes" if sharded else found
        raise InvalidArgumentError(f"{name}: expected a tensor with memory of its own, found {found}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"{name}: expected a tensor of type cpu or cuda, found one on {tensor.device}")
    if tensor.is_neg():
        raise InvalidArgumentError(
            f"{name}: expected a tensor that lies in memory as it is, found one that PyTorch negates as it reads it: "
            "give its resolve_neg()"
        )
    device = tensor.device.index if tensor.device.type == "cuda" else None
    lease.check(device, name)
    if device is not None:
        lease.runtime.order(device, lease.stream, current_stream(tensor.device))
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    kind = str(tensor.dtype).removeprefix("torch.")
    code = DTYPES.get(tensor.dtype)
    return View(tensor.data_ptr(), tuple(tensor.shape), strides, size, code, True, kind, device)


def context(device: torch.device, threads: int | None = None) -> Context:
    """What computes on a device: one context for each, and on the CPU for each number of threads.

    On CUDA it multiplies in float32 proper, whatever PyTorch's setting of TF32.

    Args:
        device: of type cpu or cuda; without a number, PyTorch's current one.
        threads: how many compute on the CPU; None: PyTorch's number.

    """
    if device.type == "cpu":
        return _cpu_context(torch.get_num_threads() if threads is None else threads)
    if device.type == "cuda":
        return _cuda_context(torch.cuda.current_device() if device.index is None else device.index)
    raise UnsupportedError(f"device: expected one of type cpu or cuda, found {device}")


@cache
def _cpu_context(threads: int) -> Context:
    return Context("cpu", threads=threads, parallel=_torch_parallel())


@cache
def _cuda_context(index: int) -> Context:
    if torch.cuda.is_current_stream_capturing():
        raise InvalidStateError("capture: expected a step before that is not captured, found none on this device")
    made = Context("cuda", device=index)
    # All that it ever allocates.
    made.prepare(current_stream(torch.device("cuda", index)))
    return made


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
    ranknum: int = 0,
) -> Adapter:
    """The native object for a geometry, one for all layers that have it.

    Args:
        on: what computes.
        in_features: input features.
        out_features: output features.
        r: rank.
        dtype: element type of the triplets.
        activation_dtype: element type of x and y.
        lora_dropout: probability of dropping an element of x.
        place: position in a call, which takes each native object once.
        ranknum: rank at creation, where the adapter was compacted; 0: `r`.

    """
    return Adapter(
        on,
        in_features,
        out_features,
        r,
        lora_dropout=lora_dropout,
        dtype=NAMES[DTYPES[dtype]],
        activation_dtype=NAMES[DTYPES[activation_dtype]],
        ranknum=ranknum,
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
    ys, As, Es, Bs, scalings, dropouts, in_place, weights = zip(*parts, strict=True)
    tensors = (x, *ys, *As, *Es, *Bs)
    call = None if torch.compiler.is_dynamo_compiling() else _this_thread.hints.get(id(As[0]))
    if call is None or not call.knows(tensors, dropouts):
        _check_mode(x, parts)
        if traced() or x.is_meta:
            # At its first use: the operators are made from what stands here.
            from .operators import by_operator

            # Which overwrites nothing.
            parts = [part._replace(in_place=False) for part in parts]
            _check(x, parts)
            return by_operator(x, parts)
        call = prepared(x, parts)
        tensors = call.fitting(tensors)
        call.learn(tensors)
    seeds = None
    if call.drops:
        # Row by row a part's seed and offset.
        seeds = torch.randint(2**63 - 1, (len(parts), 2), dtype=torch.int64, device=x.device)
    if call.needs_grad and torch.is_grad_enabled():
        return list(_SVDLinear.apply(call, scalings, in_place, weights, seeds, *tensors))
    outputs = _to_write(ys, in_place)
    call.forward(tensors[0], tensors[1 + len(ys) :], outputs, scalings, None, seeds)
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
    call.regular = False
    return call


def _check(x: Tensor, parts: Sequence[Part]) -> None:
    dtype = parts[0].y.dtype
    if dtype not in DTYPES:
        expected = ", ".join(NAMES.values())
        raise InvalidArgumentError(f"y: expected one of {expected}, found {str(dtype).removeprefix('torch.')}")
    for k, part in enumerate(parts):
        _check_part(part, f"parts[{k}]." if len(parts) > 1 else "", x, dtype)


def _check_part(part: Part, name: str, x: Tensor, dtype: torch.dtype) -> None:
    for field, tensor in (("x", x), *zip("yAEB", part[:4], strict=True)):
        if tensor.layout != torch.strided:
            raise InvalidArgumentError(f"{name}{field}: expected a dense tensor, found one of layout {tensor.layout}")
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
    tensors = [x, *(tensor for part in parts for tensor in part[:4])]
    if any(map(is_dtensor, tensors)):
        raise UnsupportedError(
            "svd_linear: expected whole tensors, as fully_shard shows them in the pass, found a DTensor: tensor "
            "parallelism is not served"
        )
    if forward_ad._current_level >= 0:
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
        if any(dy is not None and is_legacy_batchedtensor(dy) for dy in args):
            raise UnsupportedError(
                "backward: expected gradients without vmap's dimension, found is_grads_batched or what uses it: take "
                "them one after the other"
            )
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
        n = call.n
        params = tensors[n:]
        outputs = _to_write(tensors[:n], in_place)
        # h of one part after the other: one tensor to keep until backward.
        h = torch.empty(call.h_size, dtype=call.compute_dtype, device=call.device)
        call.forward(x, params, outputs, scalings, h, seeds)
        ctx.known = call, call.tokens, call.regular, scalings
        ctx.save_for_backward(x, h, seeds, *weights, *params)
        if True in in_place:
            ctx.mark_dirty(*(y for y, overwrite in zip(outputs, in_place, strict=True) if overwrite))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, seeds, *others = ctx.saved_tensors
        ctx.has_run = True
        call, tokens, regular, scalings = ctx.known
        n = call.n
        weights, params = others[:n], others[n:]
        call.check_again(x, tokens, params)
        # An output that the loss does not depend on has no gradient to give on.
        given = [k for k, dy in enumerate(dys) if dy is not None]
        dx = None
        if ctx.needs_input_grad[5] and given:
            dx = _base_gradient(x, [(_rows(dys[k]), weights[k]) for k in given if weights[k] is not None])
        # What took a tensor's place may lie otherwise.
        regular = regular and all(map(Tensor.is_contiguous, (x, *params)))
        grads: list[Tensor | None] = [None] * (3 * n)
        for at in range(0, 3 * n, n):
            for k in given:
                grads[at + k] = torch.empty_like(params[at + k], memory_format=torch.contiguous_format)
        if given:
            h_at = call.h_places(h, tokens)
            if len(given) < n:
                call = _call((*call.key[:2], *(call.key[2 + k] for k in given)))
            elif call.thread != threading.get_ident():
                call = _call(call.key)
            if call.tokens != tokens:
                call.set_tokens(tokens)
            call.regular = regular
            call.backward(x, dx, given, dys, params, grads, scalings, h_at, seeds)
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
    if False not in in_place:
        return list(ys)
    return [
        y if overwrite else y.clone(memory_format=torch.contiguous_format)
        for y, overwrite in zip(ys, in_place, strict=True)
    ]


_MOST_GUARDS, _MOST_HINTS = 64, 1 << 14

# Where fields stand in words of 8 bytes.
_MATRIX, _STRUCT = (ctypes.sizeof(kind) // 8 for kind in (c.adalora_matrix_t, c.adalora_call_t))
_STRIDE = c.adalora_matrix_t.row_stride.offset // 8
_X, _DX, _STRUCTS = 0, _MATRIX, 2 * _MATRIX


def word_of(name: str) -> int:
    """Where a field of `adalora_call_t` stands, such as "params.A.data", in words of 8 bytes."""
    kind, offset = c.adalora_call_t, 0
    for field in name.split("."):
        offset += getattr(kind, field).offset
        kind = dict(kind._fields_)[field]
    return offset // 8


def _places(k: int, *names: str) -> tuple[int, ...]:
    """Where fields of a part's `adalora_call_t` stand among all words."""
    return tuple(_STRUCTS + k * _STRUCT + word_of(name) for name in names)


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
        self.threads, self.device, *geometries = key
        self.n = len(geometries)
        self.dtype = geometries[0][1]
        self.compute_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.dropouts = tuple(geometry[0] for geometry in geometries)
        self.drops = any(self.dropouts)
        self.regular = False
        """Whether the tensors of the call that comes are contiguous, and of the types that the native call takes."""
        self.needs_grad = False
        self._shapes = [(geometry[3], geometry[6], geometry[9]) for geometry in geometries]
        self._ranks = [A[0] for A, _, _ in self._shapes]
        self._param_dtypes, self._casts = [], False
        # One for all, also where two threads make the device's first one at the same time.
        on = context(self.device, self.threads)
        adapters = []
        for k, (lora_dropout, _, _, A, A_dtype, _, _, E_dtype, _, B, B_dtype, _) in enumerate(geometries):
            dtype = param_dtype(self.dtype, A_dtype, E_dtype, B_dtype)
            self._casts = self._casts or {A_dtype, E_dtype, B_dtype} != {dtype}
            self._param_dtypes.append(dtype)
            adapters.append(
                native_adapter(
                    on,
                    A[1],
                    B[0],
                    A[0],
                    dtype,
                    self.dtype,
                    lora_dropout=lora_dropout,
                    place=k,
                )
            )
        # What forward saves of each part.
        self._saved = [(*s, d, d, d) for s, d in zip(self._shapes, self._param_dtypes, strict=True)]
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
        x, dx = map(ctypes.byref, matrices)
        both, overwrite = int(Stage.BOTH), 0
        self._forward_arguments = (*self._group, both, x)
        self._backward_arguments = (*self._group, both, overwrite, x, dx)
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
        self._seen = [
            _places(k, "params.A", "params.E", "params.B", "scaling", "h", "dropout.seed", "dropout.offset")
            for k in range(self.n)
        ]
        self._y = [_places(k, "y.data")[0] for k in range(self.n)]
        self._gradients = [_places(k, "dy.data", "grads.A", "grads.E", "grads.B") for k in range(self.n)]
        self.tokens = -1
        self.shapes: list[torch.Size] | None = None
        """Shapes of x and of each y, where `prepared` found them to fit."""
        self._guards: dict[Any, tuple[Any, int, bool]] = {}
        self._guard: tuple[Any, int, bool] = (lambda *_: False, 0, False)
        self._scratch = scratch_on(self.device)
        self._workspace_bytes = 0

    def knows(self, tensors: tuple[Tensor, ...], dropouts: tuple[float, ...]) -> bool:
        """Whether the tensors (x, each y, A, E and B) are as those of an earlier call, which `learn` saw."""
        holds, tokens, needs_grad = self._guard
        if (
            dropouts != self.dropouts
            or torch.get_num_threads() != self.threads
            or forward_ad._current_level >= 0
            or not holds(*tensors)
        ):
            return False
        if tokens != self.tokens:
            self.set_tokens(tokens)
        self.regular, self.needs_grad = True, needs_grad
        return True

    def learn(self, tensors: tuple[Tensor, ...]) -> None:
        """Look at the tensors of the call that comes, and remember what an equal one can do without."""
        self.needs_grad = torch._C._any_requires_grad(*tensors)
        self.regular = all(t.is_contiguous() and not t.is_neg() for t in tensors)
        if not self.regular:
            return
        properties = tuple((type(t), t.shape, t.requires_grad) for t in tensors)
        known = self._guards.get(properties)
        if known is None or not known[0](*tensors):
            if len(self._guards) >= _MOST_GUARDS:
                self._guards.clear()
            # What compiled graphs look at before they run: types, devices, shapes, strides and modes in one go.
            guards = TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(t.shape) for t in tensors],
                dynamic_dims_strides=[list(t.stride()) for t in tensors],
            )
            known = self._guards[properties] = (guards.check, self.tokens, self.needs_grad)
        self._guard = known
        hints = _this_thread.hints
        if len(hints) >= _MOST_HINTS:
            hints.clear()
        hints[id(tensors[1 + self.n])] = self

    def fitting(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """x, each y, A, E and B in types that go with each other."""
        x, *others = tensors
        ys, params = others[: self.n], others[self.n :]
        if self._casts:
            params = [p.to(dtype) for p, dtype in zip(params, 3 * self._param_dtypes, strict=True)]
        return (x if x.dtype is self.dtype else x.to(self.dtype), *ys, *params)

    def set_tokens(self, tokens: int) -> None:
        """Say how many rows x and y have."""
        size = ctypes.c_size_t()
        self.library.adalora_adapter_sizes(*self._group, tokens, None, ctypes.byref(size))
        for matrix in self._of_tokens:
            matrix.rows = tokens
        self.tokens, self.shapes, self._workspace_bytes = tokens, None, size.value
        self.h_size = tokens * sum(self._ranks)

    def h_places(self, h: Tensor, tokens: int) -> Sequence[int]:
        """Where each part's h stands, in memory that holds all parts'."""
        begin = h.data_ptr()
        if self.n == 1:
            return (begin,)
        size = tokens * self.compute_dtype.itemsize
        return [begin + size * ranks for ranks in itertools.accumulate(self._ranks[:-1], initial=0)]

    def forward(
        self,
        x: Tensor,
        params: Sequence[Tensor],
        outputs: Sequence[Tensor],
        scalings: Sequence[float],
        h: Tensor | None,
        seeds: Tensor | None,
    ) -> None:
        """Add to the outputs, which hold the base layer's, and keep h: [tokens, r] of one part after the other.

        Args:
            x: [..., in].
            params: A, [r, in], of each part, then E, [r, 1], of each part, then B, [out, r].
            outputs: [..., out], contiguous.
            scalings: multipliers.
            h: all parts' elements; None: nothing is kept.
            seeds: [parts, 2]: seed and offset, where a part drops.

        """
        h_at = None if h is None else self.h_places(h, self.tokens)
        kept = self._fill(x, range(self.n), params, scalings, h_at, seeds)
        words = self._words
        for place, output in zip(self._y, outputs, strict=True):
            words[place] = output.data_ptr()
        run(
            self.library.adalora_adapter_forward,
            self._forward_arguments,
            self._scratch,
            self._workspace_bytes,
            self.device,
        )
        del kept

    def backward(
        self,
        x: Tensor,
        dx: Tensor | None,
        given: Sequence[int],
        dys: Sequence[Tensor | None],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        scalings: Sequence[float],
        h_at: Sequence[int],
        seeds: Tensor | None,
    ) -> None:
        """Write gradients for A, E and B, and add to the one for x.

        Args:
            x: as forward had it.
            dx: of x's shape, contiguous; None: not wanted.
            given: which of the following there are descriptors for.
            dys: gradients for each output.
            params: as forward had them.
            grads: as `params`, contiguous.
            scalings: multipliers.
            h_at: where each part's h stands.
            seeds: as forward had them.

        """
        n = len(dys)
        kept = [self._fill(x, given, params, scalings, h_at, seeds)]
        words = self._words
        if dx is not None:
            words[_DX] = dx.data_ptr()
        for k, (dy_place, A_place, E_place, B_place) in zip(given, self._gradients, strict=True):
            kept.append(self._set_rows(dy_place, dys[k]))
            words[A_place], words[E_place] = grads[k].data_ptr(), grads[n + k].data_ptr()
            words[B_place] = grads[2 * n + k].data_ptr()
        arguments = self._backward_arguments if dx is not None else (*self._backward_arguments[:-1], None)
        run(self.library.adalora_adapter_backward, arguments, self._scratch, self._workspace_bytes, self.device)

    def _fill(
        self,
        x: Tensor,
        given: Sequence[int],
        params: Sequence[Tensor],
        scalings: Sequence[float],
        h_at: Sequence[int] | None,
        seeds: Tensor | None,
    ) -> Any:
        """Write what forward and backward both read; returns what has to live as long as the call."""
        words, n = self._words, len(scalings)
        if self.regular:
            words[_X], words[_X + _STRIDE] = x.data_ptr(), 0
        else:
            params = [p.resolve_neg().contiguous() for p in params]
            x = self._set_rows(_X, x)
        for k, places in zip(given, self._seen, strict=True):
            A_place, E_place, B_place, scaling_place, h_place, seed_place, offset_place = places
            words[A_place], words[E_place] = params[k].data_ptr(), params[n + k].data_ptr()
            words[B_place] = params[2 * n + k].data_ptr()
            self._reals[scaling_place] = scalings[k]
            words[h_place] = 0 if h_at is None else h_at[k]
            if seeds is not None:
                words[seed_place] = seed_at = seeds.data_ptr() + 16 * k
                words[offset_place] = seed_at + 8
        return x, params

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

    def check_again(self, x: Tensor, tokens: int, params: Sequence[Tensor]) -> None:
        """Refuse tensors that others took the place of (`p.data = ...`) between forward and backward."""
        n = self.n
        for k in range(n):
            A, E, B = params[k], params[n + k], params[2 * n + k]
            found = (A.shape, E.shape, B.shape, A.dtype, E.dtype, B.dtype)
            if found != self._saved[k]:
                raise InvalidStateError(
                    f"backward: expected A, E and B as forward had them, found shapes {[list(s) for s in found[:3]]} "
                    f"and types {found[3:]}"
                )
        if x.numel() != tokens * self._shapes[0][0][1] or x.dtype is not self.dtype:
            raise InvalidStateError(f"backward: expected x as forward had it, found {list(x.shape)} of {x.dtype}")


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
        # By the identity of the first A: which descriptors served it last.
        self.hints: dict[int, Call] = {}
        self.scratch = _Scratch()


_this_thread = _ThisThread()


def scratch_on(device: torch.device) -> _Scratch | None:
    """The working memory of this thread on the CPU; None on other devices."""
    return _this_thread.scratch if device.type == "cpu" else None


def run(
    function: Any, arguments: tuple[Any, ...], scratch: _Scratch | None, workspace_bytes: int, device: torch.device
) -> None:
    """Call forward or backward of the library with a workspace and the current stream."""
    if scratch is not None:
        if scratch.bytes < workspace_bytes:
            scratch.reserve(workspace_bytes)
        function(*arguments, scratch.address, scratch.bytes, None)
    else:
        # New memory for each call, which PyTorch's allocator orders by stream.
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        function(*arguments, workspace.data_ptr(), workspace_bytes, torch._C._cuda_getCurrentRawStream(device.index))


def _call(key: tuple[Any, ...]) -> Call:
    call = _this_thread.calls.get(key)
    if call is None:
        call = _this_thread.calls[key] = Call(key)
    return call


def current_stream(device: torch.device) -> int | None:
    """PyTorch's current stream on a device of type cuda; None on the CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None


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
