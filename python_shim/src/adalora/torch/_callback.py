"""What the callbacks for trainers share: one run, from the trainer's first step to its last."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError
from .allocator import RankAllocator
from .model import get_config
from .optim import AdamW
from .report import RankReport


class Run:
    """A trainer's run: its allocator, and whose work what is.

    Args:
        model: has adapters, or a part of it has.
        optimizer: the trainer's, without what a trainer wraps around it.
        adapter_name: which adapter is trained.
        total_step: how many steps the optimiser will take; None: the trainer does not know.
        allocator: the caller's own; None: the one of the optimiser, else a new one.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        adapter_name: str,
        total_step: int | None,
        allocator: RankAllocator | None,
    ) -> None:
        owner = _adapted(model, adapter_name)
        self.tuner = None if hasattr(owner, "adalora_config") else owner
        """What PEFT has put around the model; None: `adapt` was called for it."""
        self.optimizer = optimizer if isinstance(optimizer, AdamW) else None
        """`adalora.torch.AdamW`, whose step does the allocator's work; None: another optimiser."""
        self.config = get_config(owner, adapter_name) if self.tuner is None else owner.peft_config[adapter_name]
        self._set_total_step(total_step)
        if self.tuner is not None:
            if self.optimizer is not None:
                raise UnsupportedError(
                    "optimizer: expected another one than adalora.torch.AdamW for a PEFT model, found that one"
                )
            own = self.tuner.rankallocator
        elif self.optimizer is not None:
            own = self.optimizer.allocator
        else:
            own = allocator or RankAllocator(owner, adapter_name)
        config = own.config if self.tuner is None else own.peft_config
        if allocator not in (None, own) or config is not self.config:
            raise InvalidArgumentError(
                f"allocator: expected that of the trainer's model, adapter {adapter_name!r}, and optimiser, or None, "
                "found another one"
            )
        self.allocator = own
        own.optimizer_steps.start()
        own.optimizer_steps.take_over()
        if not own.optimizer_steps.watch(optimizer):
            raise InvalidArgumentError(
                f"optimizer: expected one that has the parameters of the adapter {adapter_name!r}, found "
                f"{type(optimizer).__name__} without them: put the adapter on before the optimiser is made"
            )
        if self.tuner is not None:
            own.in_trainer = True
        self.penalty: Tensor | None = None
        """The orthogonality penalty at the last step, on the parameters' device."""

    def _set_total_step(self, total_step: int | None) -> None:
        # PEFT's configurations have a number.
        self._sets_total_step = self.config.total_step is None
        if not self._sets_total_step:
            if total_step not in (None, self.config.total_step):
                expected = f"{total_step}" + (", or None" if self.tuner is None else "")
                raise InvalidArgumentError(
                    f"config.total_step: expected the trainer's number of optimiser steps, {expected}, found "
                    f"{self.config.total_step}"
                )
            return
        if total_step is None:
            raise InvalidArgumentError(
                "config.total_step: expected the number of steps, since the trainer sets no end, found None"
            )
        self.config.total_step = total_step
        try:
            self.config.check()
        except InvalidArgumentError:
            self.config.total_step = None
            raise

    def begin(self, step: int) -> None:
        """Begin before the step of that number: a new run before 0, else one that was restored."""
        standing = self.allocator.standing()
        if step == 0 and standing.last_step >= 0:
            self.allocator.reset()
            if self.optimizer is not None:
                self.optimizer.global_step = 0
        elif step > 0 and standing.last_step != step - 1 and not (self.tuner is not None and standing.last_step < 0):
            # Checkpoints of PEFT's users have no state. Its allocator warns.
            raise InvalidStateError(
                f"checkpoint: expected the allocator's state after step {step - 1}, found "
                + (f"that after step {standing.last_step}" if standing.last_step >= 0 else "none")
                + ": was it saved by a run with this callback?"
            )

    def add_penalty(self, loss_scale: float = 1.0) -> None:
        """Add the penalty's gradient: after the last backward pass of a step, before clipping."""
        if any(p.grad is not None for p in self.allocator.parameters()):
            self.penalty = self.allocator.orthogonality(loss_scale=loss_scale)

    def follow(self, step: int) -> None:
        """Do the allocator's work after the optimiser's step, before its gradients are zeroed."""
        allocator = self.allocator
        if self.optimizer is None:
            if all(p.grad is None for p in allocator.parameters()):
                # A batch that had no loss.
                allocator.optimizer_steps.follow()
            elif self.tuner is None:
                allocator.update_and_allocate(step)
            else:
                self.tuner.update_and_allocate(step)
        elif self.optimizer.global_step != step + 1:
            raise InvalidStateError(
                f"AdamW.global_step: expected {step + 1} after the trainer's step {step}, found "
                f"{self.optimizer.global_step}: somebody else steps the optimiser, or sets its number"
            )
        # Without tfinal there is no step after the budget phase.
        if step == self.config.total_step - 1 and not allocator.standing().is_final:
            allocator.finalize()

    def end(self, reason: str) -> None:
        """Leave the model, and warn where its ranks are not the final ones."""
        standing = self.allocator.standing()
        if self.tuner is not None:
            self.allocator.in_trainer = False
            if standing.has_pattern:
                # Saving with masked triplets has left one that keeps all.
                kept = self.allocator.rank_pattern()
                name = self.allocator.adapter_name
                self.config.rank_pattern = {f"{path}.lora_E.{name}": flags for path, flags in kept.items()}
        if not standing.is_final:
            warnings.warn(
                f"RankAllocator: expected the last mask at step {self.config.total_step - self.config.tfinal}, found "
                f"{reason} {standing.last_step}, with {standing.live_triplets} triplets: allocator.finalize() takes it",
                stacklevel=2,
            )

    def logs(self) -> dict[str, float]:
        """Where the run stands, for logs."""
        standing = self.allocator.standing()
        logs = {"adalora_budget": standing.budget, "adalora_ranks": standing.live_triplets}
        return logs if self.penalty is None else {**logs, "adalora_penalty": float(self.penalty)}

    def close(self) -> None:
        """Make room for another run of the model."""
        self.allocator.optimizer_steps.stop()
        if self.tuner is not None:
            self.allocator.in_trainer = False
        if self._sets_total_step:
            self.config.total_step = None


def _adapted(model: nn.Module, adapter_name: str) -> nn.Module:
    """The module that has the adapter: `adapt` was called for it, or PEFT has put it around a model."""
    # What `torch.compile` has put around one shows its attributes too.
    found = [each for each in model.modules() if adapter_name in each.__dict__.get("adalora_config", ())]
    # Whoever has such a model has imported these.
    theirs, ours = (sys.modules.get(name) for name in ("peft.tuners.adalora.model", "adalora.peft.model"))
    if theirs is not None:
        tuners = [each for each in model.modules() if isinstance(each, theirs.AdaLoraModel)]
        if any(ours is None or not isinstance(each, ours.AdaLoraModel) for each in tuners):
            raise InvalidArgumentError(
                "model: expected adapters of adalora.torch or adalora.peft, found PEFT's own: call "
                "adalora.peft.accelerate(model) first"
            )
        found += [each for each in tuners if getattr(each, "trainable_adapter_name", None) == adapter_name]
    if len(found) != 1:
        raise InvalidArgumentError(
            f"model: expected one module with the trained adapter {adapter_name!r} in the trainer's model, found "
            f"{len(found)}"
        )
    return found[0]


class InOptimizer:
    """A state of ours that a trainer saves and loads with its optimiser's.

    It lies in the first group of the optimiser's state dict: groups are what every optimiser loads as it was saved.

    Args:
        key: its name there.

    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._handle: Any = None

    def begin(self, optimizer: torch.optim.Optimizer, state: Callable[[], Any] | None) -> Any:
        """Take what a checkpoint brought, None if nothing, and add `state()`, unless it is None, to what is saved."""
        self.end()
        if state is not None:
            self._handle = optimizer.register_state_dict_post_hook(lambda _, saved: self._add(saved, state()))
        return optimizer.param_groups[0].pop(self.key, None)

    def _add(self, saved: dict[str, Any], state: Any) -> None:
        if state is not None:
            saved["param_groups"][0][self.key] = state

    def end(self) -> None:
        """Leave the optimiser's state as it is."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _HasAllocator(Protocol):
    allocator: RankAllocator | None


class Reporting:
    """A report of ranks beside a trainer: the run's, from its first step on."""

    def __init__(self, callback: _HasAllocator | None, title: str) -> None:
        self.report: RankReport | None = None
        self.title = title
        self._callback = callback
        # A checkpoint's state, until there is a report.
        self._restored: dict[str, Any] | None = None

    def begin(self, restored: dict[str, Any] | None) -> None:
        """Begin a run; `restored` is what a checkpoint has of it."""
        self.report, self._restored = None, restored

    def record(self, model: nn.Module, step: int) -> None:
        """Note where the ranks stand after a step."""
        if self.report is None:
            self.report = self._new_report(model)
            if self._restored is not None:
                self.report.load_state_dict(self._restored)
        self.report.record(step)

    def state(self) -> dict[str, Any] | None:
        """What is to be saved; None: nothing yet."""
        return self._restored if self.report is None else self.report.state_dict()

    def _new_report(self, model: nn.Module) -> RankReport:
        theirs = next((each for each in model.modules() if hasattr(each, "peft_config")), None)
        if theirs is not None or self._callback is None:
            from ..peft import RankReport as PeftReport

            return PeftReport(model if theirs is None else theirs, self.title)
        if self._callback.allocator is None:
            raise InvalidStateError("callback: expected one that is among the trainer's callbacks, found it idle")
        return RankReport(self._callback.allocator, self.title)
