"""The facts that a report shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..allocator import Standing
from .table import Table, arrange


@dataclass(frozen=True)
class Summary:
    """Where a run stands and how it came there. Lists go by adapter, in the model's order."""

    title: str
    paths: list[str]
    shapes: list[tuple[int, int]]
    """Input and output features."""
    initial: list[int]
    """Ranks at creation."""
    standing: Standing
    step: int
    """The last step that was recorded; -1 before the first."""
    total_step: int
    tinit: int
    last_mask: int
    """The step at which the pattern becomes final."""
    unit: str
    """What the budget counts: "triplets" or "parameters"."""
    schedule: list[tuple[int, int]]
    """Steps and their budgets, over the whole run."""
    history: list[tuple[int, list[int]]]
    """Steps and the ranks after them, where they changed; the last entry is how it is now."""
    scores: list[list[float]] | None
    """Of every triplet; None: not recorded."""
    scores_step: int

    @property
    def ranks(self) -> list[int]:
        """Triplets kept."""
        return self.standing.ranks

    @property
    def triplets(self) -> int:
        """Triplets at creation, over all adapters."""
        return sum(self.initial)

    @property
    def costs(self) -> list[int]:
        """Parameters of one triplet."""
        return [in_features + out_features + 1 for in_features, out_features in self.shapes]

    @property
    def parameters(self) -> int:
        """Parameters at creation, over all adapters."""
        return sum(r * cost for r, cost in zip(self.initial, self.costs, strict=True))

    @cached_property
    def table(self) -> Table:
        """The adapters by layer and module."""
        return arrange(self.paths)

    @property
    def groups(self) -> list[tuple[str, list[int]]]:
        """What stands side by side: the adapters of each layer, or without layers single ones by their numbers."""
        return self.table.groups if self.table.rows else [(str(k + 1), [k]) for k in range(len(self.paths))]

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        if self.step < 0:
            return f"before the first of {self.total_step} steps"
        final = "the pattern is final" if self.standing.is_final else f"the last mask comes at step {self.last_mask}"
        return f"after step {self.step} of {self.total_step}; {final}"

    @property
    def lowest_kept(self) -> float | None:
        """The lowest score of a triplet that is kept."""
        kept = self.split_scores()[0]
        return min((score for scores in kept for score in scores), default=None)

    def split_scores(self) -> tuple[list[list[float]], list[list[float]]]:
        """The scores of triplets that are kept, and of those that are masked."""
        pairs = [
            list(zip(scores, pattern.tolist(), strict=True))
            for scores, pattern in zip(self.scores or [], self.standing.pattern, strict=self.scores is not None)
        ]
        return (
            [[score for score, is_kept in each if is_kept] for each in pairs],
            [[score for score, is_kept in each if not is_kept] for each in pairs],
        )

    def in_unit(self, ranks: list[int]) -> int:
        """Ranks as the budget counts them."""
        return sum(ranks) if self.unit == "triplets" else sum(r * c for r, c in zip(ranks, self.costs, strict=True))

    def share(self, positions: list[int], ranks: list[int]) -> float:
        """The part of some adapters' triplets that is kept."""
        return sum(ranks[k] for k in positions) / max(1, sum(self.initial[k] for k in positions))
