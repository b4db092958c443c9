"""The second product of an adapter alone, for layers whose first one is an operator of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapter import GroupCall, Share, Stage
from ..arrays import NAMES, Triplets
from ..errors import InvalidArgumentError
from .functional import DTYPES, Part, _check_mode, _stream, context, native_adapter, once_differentiable, traced

# How many adapters one native call takes.
_LARGEST_GROUP = 64


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

    Gradients come for y, h, E and B, once differentiable. Where channels lie next to each other in memory (the last
    dimension, or `torch.channels_last`) the library works on y itself, otherwise on a product that is then added.

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
    E, B = _fitting(E, y.dtype), _fitting(B, y.dtype)
    if traced():
        return _by_operators(y, h, E, B, scaling, channel_dim, groups)
    options = scaling, channel_dim, groups, in_place
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, h, E, B)):
        return _Expand.apply(y, h, E, B, options)
    return _forward(y, h, E, B, *options)


def _by_operators(y: Tensor, h: Tensor, E: Tensor, B: Tensor, scaling: float, channel_dim: int, groups: int) -> Tensor:
    """What `svd_expand` computes, for what sees PyTorch's operators alone."""
    dtype, (out, r) = _compute(y), B.shape
    rows = h.movedim(channel_dim, -1).to(dtype).unflatten(-1, (groups, r)) * (scaling * E.to(dtype).view(-1))
    added = torch.einsum("...gr,gor->...go", rows, B.to(dtype).view(groups, out // groups, r))
    return y + added.flatten(-2).movedim(-1, channel_dim).to(y.dtype)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, E: Tensor, B: Tensor, options: tuple[float, int, int, bool]) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(h, E, B)
        if options[-1]:
            ctx.mark_dirty(y)
        return _forward(y, h, E, B, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, E, B = ctx.saved_tensors
        scaling, channel_dim, groups, _ = ctx.options
        if not any(ctx.needs_input_grad[1:4]):
            return dy, None, None, None, None
        rows = dy.resolve_neg().movedim(channel_dim, -1).contiguous().view(-1, B.shape[0])
        h_rows, dB = _rows_of_h(h, channel_dim, groups, _compute(dy)), torch.empty_like(B)
        g = torch.empty_like(h_rows)
        _run(Stage.PROJECT, rows, h_rows, E, B, scaling, groups, g, dB)
        dE = (g * h_rows).sum(dim=(0, 1)).to(E.dtype).view_as(E) if ctx.needs_input_grad[2] else None
        dh = None
        if ctx.needs_input_grad[1]:
            place = h.movedim(channel_dim, -1)
            dh = g.mul_(E.view(-1)).transpose(0, 1).reshape(place.shape).movedim(-1, channel_dim)
            # As h lies, so that the operator before finds the layout that it chose.
            dh = torch.empty_like(h).copy_(dh)
        return dy, dh, dE, dB, None


def _forward(
    y: Tensor, h: Tensor, E: Tensor, B: Tensor, scaling: float, channel_dim: int, groups: int, in_place: bool
) -> Tensor:
    y = y if in_place else y.resolve_neg().clone()
    rows = y.movedim(channel_dim, -1)
    if rows.is_contiguous() and not y.is_neg():
        _run(
            Stage.EXPAND,
            rows.view(-1, B.shape[0]),
            _rows_of_h(h, channel_dim, groups, _compute(y)),
            E,
            B,
            scaling,
            groups,
        )
        return y
    # In the type of sums, so that rounding happens once.
    added = torch.zeros(rows.shape, dtype=_compute(y), device=y.device)
    h_rows = _rows_of_h(h, channel_dim, groups, added.dtype)
    _run(Stage.EXPAND, added.view(-1, B.shape[0]), h_rows, E, _fitting(B, added.dtype), scaling, groups)
    return y.add_(added.movedim(-1, channel_dim))


def _fitting(param: Tensor, activation_dtype: torch.dtype) -> Tensor:
    """A parameter in a type that goes with the activations'."""
    if param.dtype == activation_dtype:
        return param
    wide = activation_dtype in (torch.float32, torch.float64)
    return param.to(activation_dtype if wide else torch.float32)


def _compute(activation: Tensor) -> torch.dtype:
    return torch.float64 if activation.dtype == torch.float64 else torch.float32


def _rows_of_h(h: Tensor, channel_dim: int, groups: int, dtype: torch.dtype) -> Tensor:
    """The rows of h as [groups, tokens, r] without gaps."""
    rows = h.resolve_neg().movedim(channel_dim, -1)
    r = rows.shape[-1] // groups
    return rows.reshape(rows.shape[:-1].numel(), groups, r).transpose(0, 1).to(dtype).contiguous()


def _run(
    stage: Stage,
    rows: Tensor,
    h: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    groups: int,
    g: Tensor | None = None,
    dB: Tensor | None = None,
) -> None:
    """Forward's second stage, where rows are y, or backward's first, where they are dy and g and dB are written."""
    r = h.shape[-1]
    width = B.shape[0] // groups
    E, B = E.to(B.dtype).contiguous(), B.contiguous()
    # These stages do not read x, and of A the shape alone: one feature, so that E can stand for it.
    make = lambda place: native_adapter(  # noqa: E731
        context(rows.device), 1, width, r, B.dtype, rows.dtype, place=place
    )
    for first in range(0, groups, _LARGEST_GROUP):
        shares = []
        for k in range(first, min(first + _LARGEST_GROUP, groups)):
            part = slice(k * width, (k + 1) * width)
            share = Share(make(k - first), Triplets(E, E, B[part]), h=h[k], scaling=scaling)
            if g is None:
                share = share._replace(y=rows[:, part])
            else:
                share = share._replace(dy=rows[:, part], g=g[k], grads=Triplets(E, E, dB[part]))
            shares.append(share)
        call = GroupCall(shares, None)
        if g is None:
            call.forward(stage, stream=_stream(rows.device))
        else:
            call.backward(stage, accumulate=False, stream=_stream(rows.device))
