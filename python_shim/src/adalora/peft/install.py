"""Acceleration of every model that PEFT makes in the process."""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.tuners import adalora as theirs
from peft.tuners.adalora import model as their_module

from .allocator import RankAllocator
from .model import AdaLoraModel, accelerate

# What PEFT had in these places.
_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Accelerate every model with an AdaLoRA adapter that PEFT makes from now on in this process.

    Models that are there stay as they are. A second call changes nothing.
    """
    if _replaced:
        return
    original = theirs.AdaLoraModel.__init__

    @wraps(original)
    def accelerated(self: theirs.AdaLoraModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        accelerate(self)

    new_module = AdaLoraModel.__dict__["_create_new_module"]
    for place, name, value in (
        (theirs.AdaLoraModel, "__init__", accelerated),
        (theirs.AdaLoraModel, "_create_new_module", new_module),
        (their_module, "RankAllocator", RankAllocator),
    ):
        _replaced.append((place, name, place.__dict__[name]))
        setattr(place, name, value)


def uninstall() -> None:
    """Let PEFT make its own models again. Those made since `install` stay accelerated."""
    for place, name, value in _replaced:
        setattr(place, name, value)
    _replaced.clear()
