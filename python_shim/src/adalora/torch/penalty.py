"""The orthogonality penalty as a part of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..allocator import Allocator, Slice
from .distributed import is_dtensor
from .functional import once_differentiable, traced

if TYPE_CHECKING:
    from .allocator import RankAllocator


def state_dtype(p: Tensor) -> torch.dtype:
    """The type of averages and moments for a parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def orthogonality_loss(allocator: RankAllocator, weight: float | None, params: Sequence[Tensor]) -> Tensor:
    """The penalty as a value to add to the loss; see `RankAllocator.orthogonality_loss`."""
    if traced() and not any(map(is_dtensor, params)):
        # At its first use: the operators are made from what stands here.
        from .operators import penalty_by_operator

        return penalty_by_operator(params, allocator.config.orth_reg_weight if weight is None else weight)
    return _OrthogonalityLoss.apply(allocator, weight, *params)


class _OrthogonalityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, allocator: RankAllocator, weight: float | None, *params: Tensor) -> Tensor:
        value, grads = allocator.penalty_and_gradients(weight, params)
        ctx.dtypes = [p.dtype for p in params]
        ctx.save_for_backward(*grads, *params)
        return value.to(state_dtype(params[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(ctx.saved_tensors[: len(ctx.dtypes)], d)
        grads = [
            g.to(dtype) if k % 3 != 1 else None for k, (g, dtype) in enumerate(zip(scaled, ctx.dtypes, strict=True))
        ]
        return None, None, *grads


class Penalty:
    """The penalty's gradients in memory of their own, apart from the gradients that steps work on.

    Args:
        native: an allocator of its own, over the same adapters.
        params: A, E and B of every adapter, in order.

    """

    def __init__(self, native: Allocator, params: Sequence[Tensor]) -> None:
        self._native = native
        device = params[0].device
        by_dtype: dict[torch.dtype, list[int]] = {}
        for k, p in enumerate(params):
            by_dtype.setdefault(state_dtype(p), []).append(k)
        # One after the other, so that zeroing and copying are one operation each.
        self._flat = {
            dtype: torch.zeros(sum(params[k].numel() for k in numbers), dtype=dtype, device=device)
            for dtype, numbers in by_dtype.items()
        }
        self._where = [(torch.float32, 0, 0)] * len(params)
        for dtype, numbers in by_dtype.items():
            ends = accumulate((params[k].numel() for k in numbers), initial=0)
            for k, (begin, end) in zip(numbers, pairwise(ends), strict=True):
                self._where[k] = dtype, begin, end
        sizes = native.sizes(len(params))
        self.memory = [
            *self._flat.values(),
            *(torch.zeros(size, dtype=torch.uint8, device=device) for size in (sizes.state, sizes.workspace)),
        ]
        self._places: list[int] = []

    def gradients(
        self,
        params: Sequence[Tensor],
        slices: Callable[[Sequence[Tensor]], list[Slice]],
        weight: float,
        value: Tensor,
        stream: int | None,
    ) -> list[Tensor]:
        """New gradients for all parameters.

        Args:
            params: as there are now.
            slices: makes slices of the parameters with gradients.
            weight: of the penalty.
            value: receives the penalty, one float64.
            stream: CUDA stream.

        """
        places = list(map(Tensor.data_ptr, params))
        if places != self._places:
            self._places = []
            *_, state, workspace = self.memory
            grads = self._views(self._flat, params)
            self._native.bind(slices(grads), state=state, workspace=workspace, stream=stream)
            self._places = places
        for flat in self._flat.values():
            flat.zero_()
        self._native.orthogonality(weight, value=value, stream=stream)
        return self._views({dtype: flat.clone() for dtype, flat in self._flat.items()}, params)

    def _views(self, flat: dict[torch.dtype, Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        return [
            flat[dtype][begin:end].view(p.shape) for p, (dtype, begin, end) in zip(params, self._where, strict=True)
        ]
