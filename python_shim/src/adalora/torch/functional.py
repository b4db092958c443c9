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

DTYPES = {torch.float32: FLOAT32, torch.float64: FLOAT64, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@view.register(Tensor)
def _(tensor: Tensor, name: str) -> View:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        found = "one on the meta device" if tensor.device.type == "meta" else f"one of layout {tensor.layout}"
        raise InvalidArgumentError(f"{name}: expected a tensor with memory of its own, found {found}")
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    kind = str(tensor.dtype).removeprefix("torch.")
    return View(tensor.data_ptr(), tuple(tensor.shape), strides, size, DTYPES.get(tensor.dtype), True, kind)


def context(device: torch.device) -> Context:
    """What computes on a device: one context for each, and on the CPU for each number of PyTorch's threads."""
    if device.type == "cpu":
        return _cpu_context(torch.get_num_threads())
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
    dtype = parts[0].y.dtype
    if dtype not in DTYPES:
        expected = ", ".join(NAMES.values())
        raise InvalidArgumentError(f"y: expected one of {expected}, found {str(dtype).removeprefix('torch.')}")
    _check_mode(x, parts)
    for k, part in enumerate(parts):
        _check(part, f"parts[{k}]." if len(parts) > 1 else "", x, dtype)
    x = x.to(dtype)
    tensors = [tensor for part in parts for tensor in (part.y, *(_fitting(t, dtype) for t in part[1:4]))]
    seeds = None
    if any(part.lora_dropout for part in parts):
        # Row by row a part's seed and offset.
        seeds = torch.randint(2**63 - 1, (len(parts), 2), dtype=torch.int64, device=x.device)
    on = context(x.device)
    adapters = tuple(
        native_adapter(
            on,
            A.shape[1],
            B.shape[0],
            A.shape[0],
            A.dtype,
            dtype,
            lora_dropout=parts[k].lora_dropout,
            place=k,
        )
        for k, (A, B) in enumerate(zip(tensors[1::4], tensors[3::4], strict=True))
    )
    plan = _Plan(adapters, tuple(part.scaling for part in parts), tuple(part.in_place for part in parts))
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        return list(_SVDLinear.apply(plan, seeds, x, [part.weight for part in parts], *tensors))
    return _forward(plan, seeds, _rows(x), tensors, None)


def _check(part: Part, name: str, x: Tensor, dtype: torch.dtype) -> None:
    """What the native call cannot see: it is given addresses."""
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


def _check_mode(x: Tensor, parts: Sequence[Part]) -> None:
    """Refuse what sees PyTorch's operators alone, and would take the base layer for the whole."""
    tracing = torch.jit.is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    if tracing:
        raise UnsupportedError("svd_linear: expected a model that runs, found one that is traced: merge adapters first")
    if forward_ad._current_level >= 0:
        tensors = [x, *(tensor for part in parts for tensor in part[:4])]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise UnsupportedError("svd_linear: expected differentiation in reverse mode, found forward mode")


class _Plan(NamedTuple):
    adapters: tuple[Adapter, ...]
    scalings: tuple[float, ...]
    in_place: tuple[bool, ...]


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
        with torch.no_grad():
            outputs = backward(ctx, *args)
        if not torch.is_grad_enabled():
            return outputs
        sources = [t for t in (*ctx.saved_tensors, *args) if t is not None and t.requires_grad]
        given = [output for output in outputs if output is not None]
        refusing = iter(_Once.apply(len(given), *given, *sources))
        return tuple(None if output is None else next(refusing) for output in outputs)

    return run


class _SVDLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, seeds: Tensor | None, x: Tensor, weights: list[Tensor | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        rows = _rows(x)
        rank = sum(adapter.init_r for adapter in plan.adapters)
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        # h of one part after the other: one tensor to keep until backward.
        h = torch.empty(rows.shape[0] * rank, dtype=compute, device=x.device)
        outputs = _forward(plan, seeds, rows, tensors, h)
        ctx.plan = plan
        params = (t for k in range(0, len(tensors), 4) for t in tensors[k + 1 : k + 4])
        ctx.save_for_backward(x, h, seeds, *weights, *params)
        ctx.mark_dirty(*(y for y, dirty in zip(tensors[::4], plan.in_place, strict=True) if dirty))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, seeds, *others = ctx.saved_tensors
        plan, weights, params = ctx.plan, others[: len(dys)], others[len(dys) :]
        shape, x = x.shape, _rows(x)
        # An output that the loss does not depend on has no gradient to give on.
        rows = {k: _rows(dy) for k, dy in enumerate(dys) if dy is not None}
        dx = None
        if ctx.needs_input_grad[2] and rows:
            with_weight = [k for k in rows if weights[k] is not None]
            empty = torch.empty_like if with_weight else torch.zeros_like
            dx = empty(x, memory_format=torch.contiguous_format)
            # Into memory that is there: autocast, which may be on around backward, leaves such operators alone.
            for k in with_weight:
                torch.mm(rows[k], weights[k], out=dx) if k == with_weight[0] else dx.addmm_(rows[k], weights[k])
        grads: list[Tensor | None] = [None] * (4 * len(dys))
        for k in rows:
            grads[4 * k] = dys[k]
            grads[4 * k + 1 : 4 * k + 4] = [
                torch.empty_like(p, memory_format=torch.contiguous_format) for p in params[3 * k : 3 * k + 3]
            ]
        if rows:
            _backward(plan, seeds, x, h, params, rows, grads, dx)
        needed = ctx.needs_input_grad[4:]
        return (
            None,
            None,
            None if dx is None else dx.view(shape),
            None,
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
        )


def _forward(plan: _Plan, seeds: Tensor | None, x: Tensor, tensors: Sequence[Tensor], h: Tensor | None) -> list[Tensor]:
    tokens = x.shape[0]
    outputs = [
        y if in_place else y.resolve_neg().clone(memory_format=torch.contiguous_format)
        for y, in_place in zip(tensors[::4], plan.in_place, strict=True)
    ]
    call = _call(plan.adapters)
    call.set_tokens(tokens)
    call.set_matrix(call.x, x)
    saved = 0 if h is None else h.data_ptr()
    kept = []
    for k, adapter in enumerate(plan.adapters):
        kept += call.set_params(k, tensors[4 * k + 1 : 4 * k + 4])
        call.y[k].data = outputs[k].data_ptr()
        call.structs[k].scaling = plan.scalings[k]
        call.structs[k].h = saved or None
        saved += 0 if h is None else tokens * adapter.init_r * h.element_size()
        call.set_dropout(k, seeds)
    call.forward(x.device)
    return outputs


def _backward(
    plan: _Plan,
    seeds: Tensor | None,
    x: Tensor,
    h: Tensor,
    params: Sequence[Tensor],
    dys: dict[int, Tensor],
    grads: list[Tensor | None],
    dx: Tensor | None,
) -> None:
    tokens = x.shape[0]
    call = _call(tuple(plan.adapters[k] for k in dys))
    call.set_tokens(tokens)
    call.set_matrix(call.x, x)
    if dx is not None:
        call.set_matrix(call.dx, dx)
    ends = [0]
    for adapter in plan.adapters:
        ends.append(ends[-1] + tokens * adapter.init_r * h.element_size())
    kept = []
    for at, (k, dy) in enumerate(dys.items()):
        struct = call.structs[at]
        kept += call.set_params(at, params[3 * k : 3 * k + 3])
        call.set_matrix(call.dy[at], dy)
        for matrix, grad in zip(call.grads[at], grads[4 * k + 1 : 4 * k + 4], strict=True):
            matrix.data = grad.data_ptr()
        struct.scaling = plan.scalings[k]
        struct.h = h.data_ptr() + ends[k] or None
        call.set_dropout(at, seeds, k)
    call.backward(x.device, dx is not None)


class _Call:
    """The C descriptors of a group of adapters, refilled for each call of one thread."""

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.library = adapters[0].library
        self.adapters = adapters
        # Held here: an adapter lives as long as a call that names it.
        self._handles = [adapter.handle for adapter in adapters]
        self.structs = (c.adalora_call_t * len(adapters))()
        self._size = (ctypes.sizeof(c.adalora_call_t), len(adapters))
        code = adapters[0].activation_dtype
        self.x, self.dx = (c.adalora_matrix_t(None, 0, adapters[0].in_features, 0, code, 0) for _ in range(2))
        self._x, self._dx = ctypes.byref(self.x), ctypes.byref(self.dx)
        # Structures inside structures are looked up once: each look makes an object.
        self.y, self.dy, self.params, self.grads = [], [], [], []
        for adapter, handle, struct in zip(adapters, self._handles, self.structs, strict=True):
            struct.struct_size = ctypes.sizeof(c.adalora_call_t)
            struct.adapter = handle.pointer
            for name, matrices in (("y", self.y), ("dy", self.dy)):
                setattr(struct, name, c.adalora_matrix_t(None, 0, adapter.out_features, 0, code, 0))
                matrices.append(getattr(struct, name))
            r, dtype = adapter.init_r, adapter.param_dtype
            for name, triplets in (("params", self.params), ("grads", self.grads)):
                found = getattr(struct, name)
                for field, (rows, columns) in zip(
                    "AEB", ((r, adapter.in_features), (1, r), (adapter.out_features, r)), strict=True
                ):
                    setattr(found, field, c.adalora_matrix_t(None, rows, columns, 0, dtype, 0))
                triplets.append((found.A, found.E, found.B))
        self._dropout = [struct.dropout for struct in self.structs]
        self._tokens = -1
        self._workspace_bytes = 0

    def set_tokens(self, tokens: int) -> None:
        """Say how many rows x and y have."""
        if tokens == self._tokens:
            return
        for matrix in (self.x, self.dx, *self.y, *self.dy):
            matrix.rows = tokens
        size = ctypes.c_size_t()
        self.library.adalora_adapter_sizes(self.structs, *self._size, tokens, None, ctypes.byref(size))
        self._tokens, self._workspace_bytes = tokens, size.value

    def set_matrix(self, matrix: c.adalora_matrix_t, rows: Tensor) -> None:
        """Point a descriptor to the rows of a tensor of two dimensions."""
        matrix.data = rows.data_ptr()
        matrix.row_stride = rows.stride(0) if rows.shape[0] > 1 else 0

    def set_params(self, k: int, params: Sequence[Tensor]) -> list[Tensor]:
        """Point to A, E and B; returns what has to live as long as the call."""
        kept = [p.contiguous() for p in params]
        for matrix, p in zip(self.params[k], kept, strict=True):
            matrix.data = p.data_ptr()
        return kept

    def set_dropout(self, k: int, seeds: Tensor | None, row: int | None = None) -> None:
        """Point to a part's seed and offset."""
        if seeds is not None:
            address = seeds.data_ptr() + 16 * (k if row is None else row)
            self._dropout[k].seed, self._dropout[k].offset = address, address + 8

    def forward(self, device: torch.device) -> None:
        """Run the forward pass."""
        workspace = _workspace(device, self._workspace_bytes)
        self.library.adalora_adapter_forward(
            self.structs, *self._size, Stage.BOTH, self._x, workspace.data_ptr(), workspace.numel(), _stream(device)
        )

    def backward(self, device: torch.device, with_dx: bool) -> None:
        """Run the backward pass, which overwrites gradients."""
        workspace = _workspace(device, self._workspace_bytes)
        self.library.adalora_adapter_backward(
            self.structs,
            *self._size,
            Stage.BOTH,
            0,
            self._x,
            self._dx if with_dx else None,
            workspace.data_ptr(),
            workspace.numel(),
            _stream(device),
        )


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Adapter, ...], _Call] = {}
        self.workspaces: dict[torch.device, Tensor] = {}


_per_thread = _PerThread()


def _call(adapters: tuple[Adapter, ...]) -> _Call:
    call = _per_thread.calls.get(adapters)
    if call is None:
        call = _per_thread.calls[adapters] = _Call(adapters)
    return call


def _workspace(device: torch.device, size: int) -> Tensor:
    """Scratch memory of this thread; a CUDA call takes new memory, which PyTorch's allocator orders by stream."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    found = _per_thread.workspaces.get(device)
    if found is None or found.numel() < size:
        found = _per_thread.workspaces[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return found


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


def _fitting(param: Tensor, activation_dtype: torch.dtype) -> Tensor:
    """A parameter in a type that goes with the activations'."""
    if param.dtype == activation_dtype:
        return param
    wide = activation_dtype in (torch.float32, torch.float64)
    return param.to(activation_dtype if wide else torch.float32)
