"""PEFT's AdaLoRA behind the names of adalora.torch that minilm_tweets.py uses, to run the same job with both.

Initial values are drawn in the order in which adalora.torch draws them, so that both start from the same.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import adalora

try:
    from peft import AdaLoraConfig, PeftModel, get_peft_model
    from peft.tuners.adalora import SVDLinear
except ModuleNotFoundError as error:
    sys.exit(f"The package {error.name} is missing. To compare with PEFT: pip install peft")

__all__ = ["AdaLoraConfig", "AdamW", "RankAllocator", "adapt", "load_adapter", "save_adapter"]


class Budget(NamedTuple):
    """What the schedule says for a step."""

    budget: int
    masks: bool


def adapt(model: nn.Module, config: AdaLoraConfig) -> PeftModel:
    """Put adapters on a model."""
    before = torch.get_rng_state()
    adapted = get_peft_model(model, config)
    torch.set_rng_state(before)
    for layer in adapted.modules():
        if isinstance(layer, SVDLinear):
            layer.reset_lora_parameters("default")
    return adapted


class RankAllocator:
    """PEFT's allocator, with the penalty for which PEFT needs a model that returns its loss."""

    adapter_name, budget_unit = "default", "triplets"

    def __init__(self, model: PeftModel) -> None:
        self.last_step = -1
        self.tuner = model.base_model
        self.config = model.peft_config["default"]
        self.layers = {path: m for path, m in self.tuner.model.named_modules() if isinstance(m, SVDLinear)}

    def orthogonality(self) -> None:
        """Add the penalty's gradient, computed by autograd as in PEFT's forward pass."""
        grams: list[Tensor] = []
        for layer in self.layers.values():
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            grams += [A @ A.T, B.T @ B]
        norms = [torch.norm(gram - torch.eye(len(gram), device=gram.device), p="fro") for gram in grams]
        (self.config.orth_reg_weight * sum(norms) / len(norms)).backward()

    def budget(self, step: int) -> Budget:
        """What the schedule says for a step."""
        return Budget(*self.tuner.rankallocator.budget_schedule(step))

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For each layer, which triplets are kept."""
        pattern = self.config.rank_pattern or {}
        everything = [True] * self.config.init_r
        return {path: pattern.get(f"{path}.lora_E.default", everything) for path in self.layers}

    def ranks(self) -> dict[str, int]:
        """For each layer, how many triplets are kept."""
        return {path: sum(kept) for path, kept in self.rank_pattern().items()}

    def scores(self) -> dict[str, Tensor]:
        """For each layer, the importance of its triplets."""
        scores = {}
        for path in self.layers:
            A, E, B = (self.tuner.rankallocator._element_score(f"{path}.lora_{matrix}.default") for matrix in "AEB")
            scores[path] = E.flatten() + A.mean(1) + B.mean(0)
        return scores

    def standing(self) -> adalora.Standing:
        """Where a run stands, as a report wants to know."""
        pattern = [np.array(kept) for kept in self.rank_pattern().values()]
        ranks = [int(kept.sum()) for kept in pattern]
        costs = [layer.in_features + layer.out_features + 1 for layer in self.layers.values()]
        end = self.config.total_step - self.config.tfinal
        masks = sum(self.budget(step).masks or step == end for step in range(min(self.last_step, end) + 1))
        return adalora.Standing(
            pattern=pattern,
            ranks=ranks,
            adam_steps=[self.last_step + 1] * len(ranks),
            last_step=self.last_step,
            skipped=0,
            irregular=0,
            selections=masks,
            budget=self.budget(max(self.last_step, 0)).budget,
            live_triplets=sum(ranks),
            live_parameters=sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)),
            has_pattern=masks > 0,
            is_final=self.last_step >= end,
        )


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, and after each step PEFT's allocation."""

    def __init__(self, params: list[nn.Parameter], allocator: RankAllocator, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.allocator = allocator
        self.global_step = 0

    def step(self) -> None:
        """Update the parameters, then importance, budget and mask."""
        super().step()
        self.allocator.tuner.update_and_allocate(self.global_step)
        self.allocator.last_step = self.global_step
        self.global_step += 1


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's files. PEFT warns of layers that are left with rank 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put a saved adapter on a model. PEFT warns of its own file's rank_pattern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder)
