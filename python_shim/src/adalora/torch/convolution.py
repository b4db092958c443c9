"""What an adapter adds to a convolution."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from .expand import svd_expand, without_triplets
from .functional import param_dtype
from .layers import Refusal, SVDLayer, of_base_layer

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}


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

    That weight is not made: x is convolved with the r filters of A, by PyTorch, and the library multiplies what comes
    out by E and B. With groups, each one's rows of B meet the convolution of its own channels with A, as the rows of
    the weight do. Only where a group has no more than r output channels, as in depthwise convolutions, the weight is
    smaller than what its factors would make of x, and takes their place. Gradients come for x, y, A, E and B, once
    differentiable.

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
    convolve = next((function for kind, function in _CONVOLUTIONS.items() if isinstance(base, kind)), None)
    if convolve is None:
        raise InvalidArgumentError(f"base: expected torch.nn.Conv1d or torch.nn.Conv2d, found {type(base).__name__}")
    filters = (A.shape[0], base.in_channels // base.groups, *base.kernel_size)
    features = math.prod(filters[1:])
    if A.dim() != 2 or A.shape[1] != features:
        raise InvalidArgumentError(f"A: expected shape [r, {features}] for the base's kernel, found {list(A.shape)}")
    if B.shape != (base.out_channels, filters[0]):
        raise InvalidArgumentError(f"B: expected shape {[base.out_channels, filters[0]]}, found {list(B.shape)}")
    if E.shape != (filters[0], 1):
        raise InvalidArgumentError(f"E: expected shape {[filters[0], 1]}, found {list(E.shape)}")
    if filters[0] == 0:
        return without_triplets(y, A, E, B)
    A = A.to(param_dtype(y.dtype, A.dtype))
    x = x.to(A.dtype)
    if lora_dropout:
        x = F.dropout(x, lora_dropout)
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    options = None, base.stride, padding, base.dilation, base.groups
    if base.groups > 1 and base.out_channels // base.groups <= filters[0]:
        delta = (scaling * B.to(A.dtype)) @ (E.to(A.dtype) * A)
        added = convolve(x, delta.view(base.out_channels, *filters[1:]), *options)
        if y.shape != added.shape:
            raise InvalidArgumentError(f"y: expected shape {list(added.shape)}, found {list(y.shape)}")
        return y.add_(added) if in_place else (y + added).to(y.dtype)
    weight = A.view(filters)
    if base.groups > 1:
        weight = weight.repeat(base.groups, *(1 for _ in filters[1:]))
    h = convolve(x, weight, *options)
    channel_dim = -1 - len(base.kernel_size)
    return svd_expand(y, h, E, B, scaling, channel_dim=channel_dim, groups=base.groups, in_place=in_place)


class _SVDConvolution(SVDLayer):
    # Models look at them.
    in_channels, out_channels, groups = map(of_base_layer, ("in_channels", "out_channels", "groups"))
    kernel_size, stride, dilation = map(of_base_layer, ("kernel_size", "stride", "dilation"))
    padding, padding_mode = map(of_base_layer, ("padding", "padding_mode"))

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> Refusal | None:
        """Why a layer cannot be adapted; None: it can."""
        refusal = super().refusal(base_layer)
        if refusal is not None:
            return refusal
        (kind,) = cls.base_types
        own = [
            name for name in ("forward", "_conv_forward") if getattr(type(base_layer), name) is not getattr(kind, name)
        ]
        if own:
            return Refusal(f"a layer that computes what torch.nn.{kind.__name__} does", f"has its own {own[0]}")
        return None

    @staticmethod
    def _may_overwrite(y: Tensor) -> bool:
        # Whatever its layout.
        return not y._is_view() and not (y.requires_grad and y.is_leaf)

    def _add(self, adapter_name: str, x: Tensor, y: Tensor, lora_dropout: float, in_place: bool) -> Tensor:
        return svd_conv(
            x,
            y,
            *self.triplets(adapter_name),
            self.scaling(adapter_name),
            base=self.base_layer,
            lora_dropout=lora_dropout,
            in_place=in_place,
        )


class SVDConv2d(_SVDConvolution):
    """A frozen two-dimensional convolution and its adapters (PEFT's class): see `svd_conv`.

    A is [r, in_channels / groups * kernel elements], as the rows of the base weight; stride, padding with its modes,
    dilation and groups are the base layer's.

    Args:
        base_layer: a `torch.nn.Conv2d`.

    """

    base_types = (nn.Conv2d,)


class SVDConv1d(_SVDConvolution):
    """A frozen one-dimensional convolution and its adapters, as `SVDConv2d`.

    Args:
        base_layer: a `torch.nn.Conv1d`.

    """

    base_types = (nn.Conv1d,)
