"""The operators that compiled and exported graphs hold: `torch.ops.adalora.svd_linear` and its backward pass, and
`torch.ops.adalora.orthogonality`.

They change no argument, so that PyTorch's compilers may reorder them; eager mode has `autograd.Function`, which costs
less for each call and works in place.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..allocator import Allocator, Slice
from ..errors import InvalidArgumentError, UnsupportedError
from .functional import Part, context, current_stream, native_adapter, param_dtype, prepared
from .penalty import Penalty, state_dtype

_library = torch.library.Library("adalora", "DEF")
_library.define(
    "svd_linear(Tensor x, Tensor y, Tensor A, Tensor E, Tensor B, float scaling, float lora_dropout, Tensor? seed, "
    "Tensor? weight) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "svd_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor A, Tensor E, Tensor B, float scaling, "
    "float lora_dropout, Tensor? seed, bool with_dx) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define("orthogonality(Tensor[] params, float weight) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)


def _svd_linear(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    lora_dropout: float,
    seed: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`y + scaling * dropout(x) A^T diag(E) B^T`, and `h = dropout(x) A^T` for backward.

    Args:
        x: [..., in], of y's type.
        y: [..., out].
        A: [r, in], of a type that goes with y's, as E and B.
        E: [r, 1].
        B: [out, r].
        scaling: multiplier.
        lora_dropout: probability with which an element of x is dropped.
        seed: [2], int64: seed and offset of dropout.
        weight: [out, in]; backward adds `dy weight` to the gradient for x.

    Returns:
        The output, of y's shape, and h, [tokens, r].

    """
    call = prepared(x, [Part(y, A, E, B, scaling, lora_dropout)])
    if not all(map(operator.is_, call.fitting((x, y, A, E, B)), (x, y, A, E, B))):
        raise InvalidArgumentError(f"x, A, E, B: expected types that go with y's, {call.dtype}, found others")
    output = y.clone(memory_format=torch.contiguous_format)
    h = torch.empty((call.tokens, A.shape[0]), dtype=call.compute_dtype, device=x.device)
    call.forward(x, (A, E, B), (output,), (scaling,), h, seed)
    return output, h


def _svd_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    lora_dropout: float,
    seed: Tensor | None,
    with_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adapter's gradients for x (no element without `with_dx`), A, E and B."""
    call = prepared(x, [Part(dy, A, E, B, scaling, lora_dropout)])
    contiguous = torch.contiguous_format
    dx = torch.zeros_like(x, memory_format=contiguous) if with_dx else x.new_empty(0)
    grads = [torch.empty_like(p, memory_format=contiguous) for p in (A, E, B)]
    call.backward(x, dx if with_dx else None, (0,), (dy,), (A, E, B), grads, (scaling,), (h.data_ptr(),), seed)
    return dx, *grads


class _Penalties(threading.local):
    """Memory for the penalty, each thread's own: by device, stream and geometry."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[Penalty, list[Tensor]]] = {}


_penalties = _Penalties()


def _orthogonality(params: Sequence[Tensor], weight: float) -> list[Tensor]:
    """The penalty of adapters' A, E and B, and its gradients for all of them."""
    params = [p.detach().contiguous() for p in params]
    device = params[0].device
    stream = current_stream(device)
    on, key = context(device), (device, stream, tuple((p.shape, p.dtype) for p in params))
    if key not in _penalties.known:
        adapters = [
            native_adapter(on, A.shape[1], B.shape[0], A.shape[0], A.dtype, A.dtype)
            for A, B in zip(params[::3], params[2::3], strict=True)
        ]
        if len(_penalties.known) == 8:
            _penalties.known.clear()
        # The penalty asks for no schedule, and for no averages.
        penalty = Penalty(Allocator(on, adapters, target_r=0, total_step=1), params)
        averages = [torch.empty((2, *p.shape), dtype=state_dtype(p), device=device) for p in params]
        _penalties.known[key] = penalty, averages
    penalty, averages = _penalties.known[key]

    def slices(grads: Sequence[Tensor]) -> list[Slice]:
        each = enumerate(zip(params, grads, averages, strict=True))
        return [Slice(k // 3, "AEB"[k % 3], p, grad, *pair) for k, (p, grad, pair) in each]

    value = torch.empty((), dtype=torch.float64, device=device)
    grads = penalty.gradients(params, slices, weight, value, stream)
    # An operator's outputs share no memory.
    return [value.to(state_dtype(params[0])), *(grad.clone() for grad in grads)]


for _name, _kernel in (
    ("svd_linear", _svd_linear),
    ("svd_linear_backward", _svd_linear_backward),
    ("orthogonality", _orthogonality),
):
    for _backend in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _backend)


@torch.library.register_fake("adalora::svd_linear", lib=_library)
def _(x: Tensor, y: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens = math.prod(x.shape[:-1])
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return torch.empty_like(y, memory_format=torch.contiguous_format), x.new_empty((tokens, A.shape[0]), dtype=dtype)


@torch.library.register_fake("adalora::svd_linear_backward", lib=_library)
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    seed: Any,
    dx: bool,
) -> tuple[Tensor, ...]:
    like = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in (x, A, E, B)]
    return (like[0] if dx else x.new_empty(0), *like[1:])


@torch.library.register_fake("adalora::orthogonality", lib=_library)
def _(params: Sequence[Tensor], weight: float) -> list[Tensor]:
    like = [torch.empty_like(p, dtype=state_dtype(p), memory_format=torch.contiguous_format) for p in params]
    return [params[0].new_empty((), dtype=state_dtype(params[0])), *like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, A, E, B, ctx.scaling, ctx.lora_dropout, seed, weight = inputs
    ctx.save_for_backward(x, output[1], A, E, B, seed, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None, gradients: Any = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, h, A, E, B, seed, weight = ctx.saved_tensors
    with_dx = ctx.needs_input_grad[0]
    gradients = gradients or torch.ops.adalora.svd_linear_backward
    dx, *grads = gradients(dy, x, h, A, E, B, ctx.scaling, ctx.lora_dropout, seed, with_dx)
    if not with_dx:
        dx = None
    elif weight is not None:
        dx = dx + dy @ weight
    return dx, dy, *grads, None, None, None, None


def _save_penalty(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.dtypes = [p.dtype for p in inputs[0]]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _penalty_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    d, *second = gradients
    if any(each is not None for each in second):
        _refuse_second(ctx)
    if d is None:
        return [None] * len(second), None
    scaled = enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True))
    # E has no part in it.
    return [(grad * d).to(dtype) if k % 3 != 1 else None for k, (grad, dtype) in scaled], None


def _refuse_second(ctx: Any, *_: Any) -> None:
    raise RuntimeError("an adapter's gradients cannot be differentiated again: they are once_differentiable")


def _refuse_vmap(*_: Any) -> None:
    raise UnsupportedError("svd_linear: expected tensors without vmap's dimension: give x further leading ones instead")


def _refuse_vmap_of_penalty(*_: Any) -> None:
    raise UnsupportedError("orthogonality_loss: expected tensors without vmap's dimension, found some with it")


torch.library.register_autograd("adalora::svd_linear", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd("adalora::svd_linear_backward", _refuse_second, lib=_library)
torch.library.register_autograd("adalora::orthogonality", _penalty_backward, setup_context=_save_penalty, lib=_library)
for _name in ("svd_linear", "svd_linear_backward"):
    torch.library.register_vmap(f"adalora::{_name}", _refuse_vmap, lib=_library)
torch.library.register_vmap("adalora::orthogonality", _refuse_vmap_of_penalty, lib=_library)


def _in_functorch() -> bool:
    return not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()


class _SVDLinear(torch.autograd.Function):
    """The operator for `torch.func.grad` and its like, which registered autograd does not serve."""

    forward = staticmethod(lambda *inputs: torch.ops.adalora.svd_linear(*inputs))
    setup_context = staticmethod(_save)
    backward = staticmethod(lambda ctx, dy, _: _backward(ctx, dy, _, _SVDLinearBackward.apply))
    vmap = staticmethod(_refuse_vmap)


class _SVDLinearBackward(torch.autograd.Function):
    forward = staticmethod(lambda *inputs: torch.ops.adalora.svd_linear_backward(*inputs))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse_second)
    vmap = staticmethod(_refuse_vmap)


class _Orthogonality(torch.autograd.Function):
    """The penalty, likewise."""

    forward = staticmethod(lambda weight, *params: tuple(torch.ops.adalora.orthogonality(params, weight)))
    vmap = staticmethod(_refuse_vmap_of_penalty)
    setup_context = staticmethod(lambda ctx, inputs, output: _save_penalty(ctx, (inputs[1:],), output))
    backward = staticmethod(lambda ctx, *gradients: (None, *_penalty_backward(ctx, gradients)[0]))


def by_operator(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """What `svd_linear` computes, by one operator for each part."""
    outputs = []
    for y, A, E, B, scaling, lora_dropout, _, weight in parts:
        dtype = param_dtype(y.dtype, A.dtype, E.dtype, B.dtype)
        seed = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=x.device) if lora_dropout else None
        inputs = (x.to(y.dtype), y, A.to(dtype), E.to(dtype), B.to(dtype), scaling, lora_dropout, seed, weight)
        if _in_functorch():
            outputs.append(_SVDLinear.apply(*inputs)[0])
        else:
            outputs.append(torch.ops.adalora.svd_linear(*inputs)[0])
    return outputs


def penalty_by_operator(params: Sequence[Tensor], weight: float) -> Tensor:
    """The orthogonality penalty of adapters' A, E and B, to add to a loss."""
    if _in_functorch():
        return _Orthogonality.apply(weight, *params)[0]
    return torch.ops.adalora.orthogonality(params, weight)[0]
