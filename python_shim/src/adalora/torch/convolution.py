"""What an adapter adds to a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from .expand import _fitting, svd_expand

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}
"""The layers that can be adapted, and what they call."""


def svd_conv(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    *,
    base: nn.Conv1d | nn.Conv2d,
    lora_dropout: float = 0.0,
    in_place: bool = False,
) -> Tensor:
    """`y` and the convolution of dropped-out x with `scaling * B diag(E) A`, in the shape of the base's weight.

    That weight is never made: x is convolved with the r filters of A, by PyTorch, and the library multiplies what comes
    out by E and B. With groups, each one's rows of B meet the convolution of its own channels with A, as the rows of
    the weight do. Gradients come for x, y, A, E and B, once differentiable.

    A, E and B are cast to what goes with y's type (half precision as it is or else float32), x to A's type. Dropout
    draws from PyTorch's generator as `torch.nn.functional.dropout` does.

    Args:
        x: the base layer's input, [n, in, *sizes] or [in, *sizes].
        y: the base layer's output for it.
        A: [r, in / groups * kernel elements].
        E: [r, 1].
        B: [out, r].
        scaling: multiplier of the adapter's output.
        base: whose kernel size, stride, padding with its mode, dilation and groups count; its weight is not read.
        lora_dropout: probability with which an element of x is dropped.
        in_place: whether y may be overwritten by the result.

    Returns:
        A tensor of y's shape and type.

    """
    convolve = next((function for kind, function in CONVOLUTIONS.items() if isinstance(base, kind)), None)
    if convolve is None:
        raise InvalidArgumentError(f"base: expected torch.nn.Conv1d or torch.nn.Conv2d, found {type(base).__name__}")
    filters = (A.shape[0], base.in_channels // base.groups, *base.kernel_size)
    features = torch.Size(filters[1:]).numel()
    if A.dim() != 2 or A.shape[1] != features:
        raise InvalidArgumentError(f"A: expected shape [r, {features}] for the base's kernel, found {list(A.shape)}")
    if B.shape != (base.out_channels, filters[0]):
        raise InvalidArgumentError(f"B: expected shape {[base.out_channels, filters[0]]}, found {list(B.shape)}")
    if filters[0] == 0:
        return y
    A = _fitting(A, y.dtype)
    x = F.dropout(x.to(A.dtype), lora_dropout)
    weight, padding = A.view(filters), base.padding
    if base.groups > 1:
        weight = weight.repeat(base.groups, *(1 for _ in filters[1:]))
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    h = convolve(x, weight, None, base.stride, padding, base.dilation, base.groups)
    channel_dim = -1 - len(base.kernel_size)
    return svd_expand(y, h, E, B, scaling, channel_dim=channel_dim, groups=base.groups, in_place=in_place)
