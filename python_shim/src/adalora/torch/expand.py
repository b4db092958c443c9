"""The second product of an adapter alone, for layers whose first one is an operator of PyTorch."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _bindings as c
from ..adapter import Stage
from ..arrays import NAMES
from ..errors import InvalidArgumentError
from .functional import (
    DTYPES,
    Part,
    _check_mode,
    context,
    native_adapter,
    once_differentiable,
    run,
    scratch_on,
    traced,
    word_of,
)

# How many matrices one native call takes: each is compared with each for overlaps.
_LARGEST_CALL = 16


def svd_expand(
    y: Tensor,
    h: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    *,
    channel_dim: int = -1,
    groups: int = 1,
    in_place: bool = False,
) -> Tensor:
    """`y + scaling * B diag(E) h` at every place: what follows `h = A x` in a layer whose product with A is its own.

    Gradients come for y, h, E and B, once differentiable. The library works on y where it lies, both where channels lie
    next to each other in memory (as the last dimension, or in `torch.channels_last`) and where places do.

    Args:
        y: the base layer's output, with `out` channels in `channel_dim`.
        h: of y's shape, but with `groups * r` channels.
        E: [r, 1].
        B: [out, r].
        scaling: multiplier of the adapter's output.
        channel_dim: where the channels are.
        groups: how many equal parts y's channels, B's rows and h's channels have: each part of y is made of its own.
        in_place: whether y may be overwritten by the result.

    Returns:
        A tensor of y's shape and type.

    """
    out, r = B.shape
    _check_mode(h, [Part(y, h, E, B, scaling)])
    if y.dtype not in DTYPES:
        found = str(y.dtype).removeprefix("torch.")
        raise InvalidArgumentError(f"y: expected one of {', '.join(NAMES.values())}, found {found}")
    if out % groups:
        raise InvalidArgumentError(f"B: expected rows for {groups} equal groups, found {out}")
    around = lambda shape: (*shape[:channel_dim], *shape[channel_dim:][1:])  # noqa: E731
    if y.shape[channel_dim] != out or h.shape[channel_dim] != groups * r or around(y.shape) != around(h.shape):
        raise InvalidArgumentError(
            f"y and h: expected the same shape but for {out} and {groups * r} channels in dimension {channel_dim}, "
            f"found {list(y.shape)} and {list(h.shape)}"
        )
    if E.shape != (r, 1):
        raise InvalidArgumentError(f"E: expected shape {[r, 1]} as B has, found {list(E.shape)}")
    for name, tensor in (("h", h), ("E", E), ("B", B)):
        if tensor.device != y.device:
            raise InvalidArgumentError(f"{name}: expected a tensor on {y.device}, found one on {tensor.device}")
    if r == 0:
        return without_triplets(y, h, E, B)
    h, E, B = (t.to(_compute(y)) for t in (h, E, B))
    if traced() or y.is_meta:
        return _by_operators(y, h, E, B, scaling, channel_dim, groups)
    place = _Place(scaling, channel_dim, groups)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(y, h, E, B):
        return _Expand.apply(y, h, E, B, place, in_place)
    return _forward(y, h, E, B, place, in_place)


def without_triplets(y: Tensor, *empty: Tensor) -> Tensor:
    """The output y, in a graph that gives parameters of rank 0 their gradients, as those who count them expect."""
    return y + sum(tensor.sum() for tensor in empty).to(y.dtype)


def _by_operators(y: Tensor, h: Tensor, E: Tensor, B: Tensor, scaling: float, channel_dim: int, groups: int) -> Tensor:
    """What `svd_expand` computes, for what sees PyTorch's operators alone."""
    out, r = B.shape
    rows = h.movedim(channel_dim, -1).unflatten(-1, (groups, r)) * (scaling * E.view(-1))
    added = torch.einsum("...gr,gor->...go", rows, B.view(groups, out // groups, r))
    return y + added.flatten(-2).movedim(-1, channel_dim).to(y.dtype)


def _compute(activation: Tensor) -> torch.dtype:
    return torch.float64 if activation.dtype == torch.float64 else torch.float32


class _Place(NamedTuple):
    scaling: float
    channel_dim: int
    groups: int


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, E: Tensor, B: Tensor, place: _Place, in_place: bool) -> Tensor:
        ctx.place = place
        ctx.save_for_backward(h, E, B)
        output = _forward(y, h, E, B, place, in_place)
        if output is y:
            ctx.mark_dirty(y)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, E, B = ctx.saved_tensors
        if not any(ctx.needs_input_grad[1:4]):
            return dy, None, None, None, None, None
        products = _Products(_as_it_can_lie(dy, ctx.place), h, E, B, ctx.place)
        dh, dE, dB = products.backward()
        return dy, dh, dE, dB, None, None


def _forward(y: Tensor, h: Tensor, E: Tensor, B: Tensor, place: _Place, in_place: bool) -> Tensor:
    output = _as_it_can_lie(y, place)
    if output is y and not in_place:
        output = y.clone()
    _Products(output, h, E, B, place).forward()
    return output


def _as_it_can_lie(y: Tensor, place: _Place) -> Tensor:
    """The tensor itself, or a copy in a layout that `_Products` takes."""
    y = y.resolve_neg()
    return y if y.is_contiguous() or y.movedim(place.channel_dim, -1).is_contiguous() else y.contiguous()


class _Products:
    """`y += scaling * left diag(E) right^T` for all matrices that y is made of, and what it means for gradients.

    Where channels lie next to each other, there is one matrix [places, channels] for each group: left is h, right is B.
    Where places do, there is one [channels, places] for each item of the batch and each group: left is B, right is h.

    Args:
        y: the output, or its gradient.
        h: as in `svd_expand`, E and B too, all of the compute type.
        E: values.
        B: left vectors.
        place: scaling, dimension of channels, groups.

    """

    def __init__(self, y: Tensor, h: Tensor, E: Tensor, B: Tensor, place: _Place) -> None:
        groups, dim = place.groups, place.channel_dim % y.dim()
        out, r = B.shape
        batch, places = math.prod(y.shape[:dim]), math.prod(y.shape[dim + 1 :])
        self.h_like, self.E, self.scaling = h, E.contiguous(), place.scaling
        # [groups, batch, places, r] without gaps, which [groups, batch * places, r] is too.
        h = h.resolve_neg().reshape(batch, groups, r, places).permute(1, 0, 3, 2).contiguous()
        self.h_shape = h.shape
        B = B.contiguous().view(1, groups, out // groups, r)
        self.by_places = y.movedim(dim, -1).is_contiguous()
        if self.by_places:
            self.matrices = y.movedim(dim, -1).view(1, batch * places, groups, out // groups).transpose(1, 2)
            self.left, self.right = h.view(1, groups, batch * places, r), B
        else:
            self.matrices = y.view(batch, groups, out // groups, places)
            self.left, self.right = B.expand(batch, -1, -1, -1), h.transpose(0, 1)

    def forward(self) -> None:
        """Add to y."""
        self._run(Stage.EXPAND, None, None)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for h, E and B, where y is the output's gradient."""
        left, right, E = self.left, self.right, self.E.view(-1)
        g = left.new_empty(left.shape)
        d_right = torch.empty_like(right)
        self._run(Stage.PROJECT, g, d_right)
        dE = (g * left).sum(dim=(0, 1, 2)).view_as(self.E)
        d_left = g.mul_(E)
        dh, dB = (d_left, d_right) if self.by_places else (d_right.transpose(0, 1), d_left.sum(dim=0))
        # As h lies, so that the operator before finds the layout that it chose.
        like = self.h_like
        dh = dh.reshape(self.h_shape).permute(1, 0, 3, 2).reshape(like.shape)
        return torch.empty_like(like).copy_(dh), dE, dB.reshape(-1, left.shape[-1])

    def _run(self, stage: Stage, g: Tensor | None, d_right: Tensor | None) -> None:
        calls = _calls(self.matrices, *self.right.shape[2:], self.left.dtype)
        calls.run(stage, self.matrices, self.left, self.right, self.E, self.scaling, g, d_right)


_FIELDS = ("y", "dy", "params.A", "params.E", "params.B", "grads.A", "grads.E", "grads.B")
_DATA = {name: word_of(f"{name}.data") for name in _FIELDS} | {name: word_of(name) for name in ("h", "g")}
_ROWS = {name: word_of(f"{name}.rows") for name in ("y", "dy")}
_STRIDE = {name: word_of(f"{name}.row_stride") for name in ("y", "dy")}
_SCALING = word_of("scaling")


class _Calls:
    """C descriptors for the products of one geometry, refilled for each call of one thread.

    An adapter of one input feature stands for each matrix: these stages do not read x, and of A the shape alone, so
    that E can stand for it.
    """

    def __init__(self, threads: int, device: torch.device, dtype: torch.dtype, n: int, r: int, compute: torch.dtype):
        on = context(device, threads)
        adapters = [native_adapter(on, 1, n, r, compute, dtype, place=k) for k in range(_LARGEST_CALL)]
        self._library = adapters[0].library
        self._handles = [adapter.handle for adapter in adapters]
        self._structs = (c.adalora_call_t * len(adapters))()
        self._words = np.frombuffer(self._structs, np.int64).reshape(len(adapters), -1)
        self._reals = self._words.view(np.float64)
        self._sizes: dict[tuple[int, int], int] = {}
        self._scratch = scratch_on(device)
        for struct, adapter, handle in zip(self._structs, adapters, self._handles, strict=True):
            struct.struct_size, struct.adapter = ctypes.sizeof(c.adalora_call_t), handle.pointer
            for matrix in (struct.y, struct.dy):
                matrix.columns, matrix.dtype = n, adapter.activation_dtype
            for triplets in (struct.params, struct.grads):
                for matrix, shape in ((triplets.A, (r, 1)), (triplets.E, (1, r)), (triplets.B, (n, r))):
                    matrix.rows, matrix.columns, matrix.dtype = *shape, adapter.param_dtype

    def run(
        self,
        stage: Stage,
        matrices: Tensor,
        left: Tensor,
        right: Tensor,
        E: Tensor,
        scaling: float,
        g: Tensor | None,
        d_right: Tensor | None,
    ) -> None:
        """Forward's second stage, which adds to the matrices, or backward's first, which writes g and d_right."""
        output, m = "y" if g is None else "dy", matrices.shape[2]
        given = {output: matrices, "h": left, "params.B": right, "g": g, "grads.B": d_right}
        addresses = {_DATA[name]: _addresses(tensor) for name, tensor in given.items() if tensor is not None}
        words = self._words
        for name in ("params.A", "params.E", "grads.A", "grads.E"):
            words[:, _DATA[name]] = E.data_ptr()
        self._reals[:, _SCALING] = scaling
        words[:, _ROWS[output]], words[:, _STRIDE[output]] = m, matrices.stride(2) if m > 1 else 0
        stride, count = ctypes.sizeof(c.adalora_call_t), matrices.shape[0] * matrices.shape[1]
        for first in range(0, count, _LARGEST_CALL):
            n = min(_LARGEST_CALL, count - first)
            for place, values in addresses.items():
                words[:n, place] = values[first : first + n] if count > 1 else values
            where = self._scratch, self._workspace_bytes(n, m), E.device
            if g is None:
                run(self._library.adalora_adapter_forward, (self._structs, stride, n, stage, None), *where)
            else:
                run(self._library.adalora_adapter_backward, (self._structs, stride, n, stage, 0, None, None), *where)

    def _workspace_bytes(self, n: int, m: int) -> int:
        found = self._sizes.get((n, m))
        if found is None:
            size, stride = ctypes.c_size_t(), ctypes.sizeof(c.adalora_call_t)
            self._library.adalora_adapter_sizes(self._structs, stride, n, m, None, ctypes.byref(size))
            found = self._sizes[n, m] = size.value
        return found


def _addresses(matrices: Tensor) -> int | np.ndarray:
    """Where each of the matrices begins."""
    first, second = matrices.shape[:2]
    if first * second == 1:
        return matrices.data_ptr()
    offsets = np.arange(first)[:, None] * matrices.stride(0) + np.arange(second) * matrices.stride(1)
    return matrices.data_ptr() + matrices.element_size() * offsets.reshape(-1)


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], _Calls] = {}


_this_thread = _ThisThread()


def _calls(matrices: Tensor, n: int, r: int, compute: torch.dtype) -> _Calls:
    key = (torch.get_num_threads(), matrices.device, matrices.dtype, n, r, compute)
    found = _this_thread.calls.get(key)
    if found is None:
        found = _this_thread.calls[key] = _Calls(*key)
    return found
