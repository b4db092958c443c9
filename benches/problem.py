"""What both sides compute on: the shapes, and the tensors that they begin with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# A training run whose middle is timed: the budget falls, and every step takes a mask.
ALPHA = 32
TINIT, TFINAL, TOTAL_STEP, FIRST_STEP = 10, 10, 100_000, 50_000
ORTH_REG_WEIGHT = 0.5
LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.01, 1.0


@dataclass(frozen=True)
class Shape:
    """Equal layers, and how many tokens pass through each."""

    layers: int
    in_features: int
    out_features: int
    rank: int
    tokens: int

    @property
    def target_rank(self) -> int:
        """Mean rank per layer at the run's end."""
        return max(self.rank // 3, 1)


@dataclass
class Layer:
    """One layer's activations, and its triplets with the gradients that the optimiser sees."""

    x: torch.Tensor
    y: torch.Tensor
    dy: torch.Tensor
    params: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor]


def make_layers(shape: Shape, dtype: torch.dtype) -> list[Layer]:
    """Normal numbers, the same in every run. E is not zero, or half of the work would be skipped."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    sizes = {
        "A": (shape.rank, shape.in_features),
        "E": (shape.rank, 1),
        "B": (shape.out_features, shape.rank),
    }
    deviation = {"A": 0.02, "E": 1.0, "B": 0.02}
    return [
        Layer(
            x=normal(shape.tokens, shape.in_features).to(dtype),
            y=normal(shape.tokens, shape.out_features).to(dtype),
            dy=normal(shape.tokens, shape.out_features).to(dtype),
            params={name: deviation[name] * normal(*size) for name, size in sizes.items()},
            grads={name: normal(*size) for name, size in sizes.items()},
        )
        for _ in range(shape.layers)
    ]


def require_close(what: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    """Refuse to go on where two sides differ, relative to the largest element of each tensor."""
    for name, want in theirs.items():
        got = ours[name].reshape(want.shape)
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        if not error <= tolerance:
            raise SystemExit(f"{what}: {name} of the two sides differ by {error:.1e}, more than {tolerance:.0e}")
