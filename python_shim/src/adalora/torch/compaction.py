"""What compaction does to tensors: parameters, gradients and optimisers' states keep some triplets alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UnsupportedError
from .config import AdaLoraConfig


def compacted_pattern(config: AdaLoraConfig, layers: Iterable[str]) -> dict[str, list[bool]] | None:
    """For each layer of a compacted adapter, which of its initial triplets it has; None where it has all."""
    pattern = config.rank_pattern
    return None if pattern is None else {path: pattern[f"{path}.lora_E"] for path in layers}


def keep_pattern(config: AdaLoraConfig, pattern: Mapping[str, list[bool]]) -> None:
    """Let a configuration say that its adapter was compacted."""
    config.rank_pattern = {f"{path}.lora_E": list(kept) for path, kept in pattern.items()}


def cut(tensor: Tensor, matrix: str, kept: Sequence[bool]) -> Tensor:
    """What is kept of a tensor in the shape of A [r, in], E [r, 1] or B [out, r]; itself where that is all."""
    if all(kept):
        return tensor
    index = torch.tensor([k for k, flag in enumerate(kept) if flag], dtype=torch.int64, device=tensor.device)
    return tensor.detach().index_select(1 if matrix == "B" else 0, index)


def cut_states(
    optimizer: Optimizer, params: Sequence[nn.Parameter], names: Sequence[str], kept: Sequence[Sequence[bool]]
) -> Callable[[], None]:
    """What is kept of an optimiser's state, ready to be put in its place.

    Args:
        optimizer: whose tensors have the parameter's shape or one element.
        params: A, E and B of every layer, in order, as they were.
        names: theirs, which end in the matrix.
        kept: for each layer, which of its triplets are kept.

    Returns:
        Puts it there.

    """
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for k, (p, name) in enumerate(zip(params, names, strict=True)):
        if p not in optimizer.state or all(kept[k // 3]):
            continue
        state = optimizer.state[p]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                replaced.append((state, key, cut(value, name[-1], kept[k // 3])))
            elif isinstance(value, Tensor) and value.numel() != 1:
                _refuse(optimizer, key, name, p, f"shape {list(value.shape)}")
            elif isinstance(value, Collection) and not isinstance(value, Tensor | str | bytes) and value:
                _refuse(optimizer, key, name, p, type(value).__name__)

    def put() -> None:
        for state, key, value in replaced:
            state[key] = value

    return put


def _refuse(optimizer: Optimizer, key: Any, name: str, p: Tensor, found: str) -> None:
    raise UnsupportedError(
        f"optimizers: expected states with tensors of the parameter's shape or one element, found {key!r} of "
        f"{type(optimizer).__name__} for {name} {list(p.shape)} with {found}"
    )


def resize(p: nn.Parameter, values: Tensor, grad: Tensor | None = None) -> None:
    """Give a parameter other values, of another shape; it stays the object that optimisers and hooks know."""
    if values.shape == p.shape:
        return
    p.grad = None
    # A graph that is still alive, such as the last loss's, holds the node that adds to p.grad, and that the shape it
    # has seen first. PyTorch makes another one where the type has changed in between.
    p.data = torch.empty(0, dtype=torch.float16 if p.dtype != torch.float16 else torch.float32, device=p.device)
    p.data = values
    p.grad = grad
