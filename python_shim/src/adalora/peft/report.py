"""A report of what became of the ranks of a PEFT model during training."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InvalidArgumentError
from ..torch import RankReport as LayersReport
from .allocator import RankAllocator


class RankReport(LayersReport):
    """`adalora.torch.RankReport` for a PEFT model that is accelerated.

    >>> report = adalora.peft.RankReport(model)
    >>> for step, batch in enumerate(batches):
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     model.base_model.update_and_allocate(step)
    ...     report.record(step)
    ...     optimizer.zero_grad()
    >>> report.save_html("report.html")

    Args:
        model: what `get_peft_model` returned, accelerated.
        title: what the report is headed with.

    """

    def __init__(self, model: nn.Module, title: str = "AdaLoRA rank report") -> None:
        allocator = getattr(getattr(model, "base_model", model), "rankallocator", None)
        if not isinstance(allocator, RankAllocator):
            found = "none" if allocator is None else f"{type(allocator).__module__}'s"
            raise InvalidArgumentError(f"model: expected the rank allocator of an accelerated model, found {found}")
        super().__init__(_Current(allocator), title)


class _Current:
    """The allocator over the layers as they are, which is made anew where the schedule changes."""

    def __init__(self, allocator: RankAllocator) -> None:
        self._allocator = allocator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._allocator._for(), name)
