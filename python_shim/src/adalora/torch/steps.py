"""Whether an allocator and the optimisers of its parameters go step by step."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import InvalidArgumentError, InvalidStateError
from .distributed import any_is_not_finite


class OptimizerSteps:
    """Counts the steps of the optimisers that hold an allocator's parameters, and warns where it does not follow.

    Optimisers that do not derive from `torch.optim.Optimizer` are not seen: about them nothing is reported.

    Args:
        parameters: returns the allocator's parameters; a method, which is held weakly.

    """

    def __init__(self, parameters: Callable[[], list[nn.Parameter]]) -> None:
        self._parameters = WeakMethod(parameters)
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self.forget()
        _register_hooks()
        _counting.add(self)

    def take_over(self) -> None:
        """Let allocators of the same parameters, which earlier runs have left, count no more."""
        mine = self._mine()
        for other in list(_counting):
            if other is not self and not mine.isdisjoint(other._mine()):
                other.stop()

    def stop(self) -> None:
        """Count no more, for an allocator that gives way to another one."""
        _counting.discard(self)

    def forget(self) -> None:
        """Begin anew, as where a run is restored."""
        # Steps since the allocator followed: several optimisers may share the parameters.
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        # Optimisers of other parameters, by the number of their groups.
        self._others: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        # Steps under way: a class's step may call that of the class from which it derives, and both run the hooks.
        self._depths: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._calls = 0
        self._found_inf: Tensor | None = None

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that hold the parameters and have begun a step."""
        return list(self._steps)

    def watch(self, optimizer: Optimizer) -> bool:
        """Know an optimiser before its first step, which may be left out. Whether it holds the parameters."""
        if optimizer in self._steps:
            return True
        if self._others.get(optimizer) == len(optimizer.param_groups):
            return False
        if self._mine().isdisjoint(_parameters(optimizer)):
            self._others[optimizer] = len(optimizer.param_groups)
            return False
        self._steps[optimizer] = 0
        return True

    def _mine(self) -> set[nn.Parameter]:
        try:
            return set(self._parameters()())
        except InvalidStateError:
            # The adapter was deleted.
            return set()

    def begin(self, optimizer: Optimizer) -> None:
        """Count a step that begins."""
        if not self.watch(optimizer):
            return
        self._depths[optimizer] = self._depths.get(optimizer, 0) + 1
        if self._depths[optimizer] > 1:
            return
        self._steps[optimizer] += 1
        self._calls = 0
        # What a GradScaler tells optimisers that leave a step out by themselves.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and self._found_inf is not None:
            found_inf = torch.maximum(found_inf, self._found_inf.to(found_inf.device))
        self._found_inf = self._found_inf if found_inf is None else found_inf
        if self._steps[optimizer] == 2:
            warnings.warn(
                "RankAllocator: expected one call of update_and_allocate after each step of the optimiser, found 2 "
                f"steps of {type(optimizer).__name__} and no call",
                stacklevel=4,
            )

    def end(self, optimizer: Optimizer) -> None:
        """Note that a step has ended."""
        if self._depths.get(optimizer):
            self._depths[optimizer] -= 1

    def follow(self) -> Tensor | None:
        """Note that the allocator follows.

        Returns:
            Above 0 where the step was left out because a gradient was not finite, one value; None: nobody has looked.

        """
        # A step may have ended in an exception.
        self._depths.clear()
        found_inf, self._found_inf = self._found_inf, None
        if self._steps and not any(self._steps.values()):
            parameters = chain.from_iterable(map(_parameters, self._steps))
            if any_is_not_finite(p.grad for p in parameters if p.grad is not None):
                # A GradScaler did not call the optimiser.
                return torch.ones(())
            self._calls += 1
            warnings.warn(
                "update_and_allocate: expected one call after each step of the optimiser, found "
                f"{self._calls + 1} calls and one step",
                stacklevel=4,
            )
        for optimizer in self._steps:
            self._steps[optimizer] = 0
        return found_inf


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


_counting: WeakSet[OptimizerSteps] = WeakSet()


@cache
def _register_hooks() -> None:
    """Have all optimisers' steps noted, once for all: which ones an allocator's parameters are in shows in them."""

    def begin(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for steps in list(_counting):
            steps.begin(optimizer)

    def end(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for steps in list(_counting):
            steps.end(optimizer)

    register_optimizer_step_pre_hook(begin)
    register_optimizer_step_post_hook(end)


def step_number(name: str, value: Any) -> int:
    """The number of a step, of any type that Python takes for an integer; `name` is the argument's."""
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidArgumentError(
            f"{name}: expected an integer, the number of the optimiser's step, found {value!r}"
        ) from None
