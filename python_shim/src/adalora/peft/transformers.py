"""A PEFT model with AdaLoRA under `transformers.Trainer`.

>>> model = adalora.peft.accelerate(get_peft_model(model, AdaLoraConfig(...)))
>>> trainer = Trainer(model, args, train_dataset=data, callbacks=[AdaLoraCallback()])
>>> trainer.train()
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InvalidArgumentError
from .model import AdaLoraModel

# Where the allocator's state lies in the first group of the optimiser's state dict.
_KEY = "adalora"


class AdaLoraCallback(TrainerCallback):
    """Calls `update_and_allocate` after each of the optimiser's steps, and keeps the allocator's state in checkpoints.

    - The state is in the checkpoints' `optimizer.pt`; resuming from one goes on bit for bit. One without it, as
      PEFT's users have them, lets importance begin anew.
    - Where `tfinal` is 0 the last mask is taken at the last step: the schedule has none before it.
    - Logs get `adalora_budget` and `adalora_ranks`, the triplets that are kept over all layers.

    The penalty is in the model's loss already.
    """

    def __init__(self) -> None:
        self._tuner: AdaLoraModel | None = None
        self._handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find adapter and optimiser, and go on from a checkpoint where the trainer does."""
        self._tuner = tuner = _tuner_of(kwargs["model"])
        allocator = tuner._allocator("AdaLoraCallback")
        expected = allocator.peft_config.total_step
        if state.max_steps != expected:
            raise InvalidArgumentError(
                f"AdaLoraConfig.total_step: expected the trainer's number of optimiser steps, {state.max_steps}, "
                f"found {expected}"
            )
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        saved = optimizer.param_groups[0].pop(_KEY, None)
        if saved is not None:
            allocator.load_state_dict(saved)
        elif state.global_step == 0 and allocator.standing().last_step >= 0:
            allocator.reset()
        self._handle = optimizer.register_state_dict_post_hook(self._add_state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the allocator follow."""
        self._tuner.update_and_allocate(state.global_step)
        if state.global_step == state.max_steps - 1:
            self._tuner.rankallocator.finalize()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to what is logged about training."""
        if logs is not None and "loss" in logs:
            standing = self._tuner.rankallocator.standing()
            values = {"adalora_budget": standing.budget, "adalora_ranks": standing.live_triplets}
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimiser, and report ranks that are not the final ones."""
        self._handle.remove()
        standing = self._tuner.rankallocator.standing()
        if not standing.is_final:
            warnings.warn(
                f"rankallocator: expected the last mask before the end, found a run that ended at step "
                f"{standing.last_step}, with {standing.live_triplets} triplets: rankallocator.finalize() takes it",
                stacklevel=2,
            )

    def _add_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        # Groups are what every optimiser loads as it was saved.
        state_dict["param_groups"][0][_KEY] = self._tuner.rankallocator.state_dict()


def _tuner_of(model: nn.Module) -> AdaLoraModel:
    for module in model.modules():
        if isinstance(module, AdaLoraModel):
            return module
    raise InvalidArgumentError(
        f"model: expected a PEFT model that is accelerated, by adalora.peft, found {type(model).__name__}"
    )
