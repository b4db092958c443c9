"""What picture and page share: shades of ranks, ticks, thinning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

# Powers of ten that a chart of scores shows; lower ones are "less".
MOST_DECADES = 12
# Shades from the lowest rank above 0 to the highest; 0 has one of its own.
SHADES = 8


def shade(share: float) -> int:
    """0 where nothing is kept, else 1 to SHADES."""
    return 0 if share <= 0 else max(1, min(SHADES, math.ceil(share * SHADES)))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most that many and a few."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= most)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most that many of some values, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[k * (len(values) - 1) // (most - 1)] for k in range(most)]


def decades(scores: Sequence[float]) -> tuple[int, int] | None:
    """The powers of ten around positive scores, the upper ones where there are many; None where none is positive."""
    positive = [score for score in scores if score > 0]
    if not positive:
        return None
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    return max(low, high - MOST_DECADES), high


def between(low: int, high: int) -> list[int]:
    """Some powers of ten, evenly."""
    return list(range(low, high + 1, math.ceil((high - low) / 6)))


def with_room(labels: Sequence[tuple[float, str]], character: float) -> Sequence[tuple[float, str]]:
    """Every label, or every second one and so on, so that none runs into another.

    Args:
        labels: middles and texts, from left to right.
        character: width of a character, in the middles' unit.

    """
    for every in range(1, len(labels)):
        chosen = labels[::every]
        if all(right - left >= (len(a) + len(b) + 2) * character / 2 for (left, a), (right, b) in pairwise(chosen)):
            return chosen
    return labels[:1]
