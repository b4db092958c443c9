"""What picture and page share: shades of ranks, ticks, thinning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

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
    """The powers of ten around positive scores; None where there are none."""
    positive = [score for score in scores if score > 0]
    if not positive:
        return None
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return low, max(high, low + 1)


def with_room(labels: Sequence[tuple[float, str]], character: float) -> list[tuple[float, str]]:
    """The labels, from the left, that do not run into those before.

    Args:
        labels: middles and texts, from left to right.
        character: width of a character, in the middles' unit.

    """
    chosen, room = [], -math.inf
    for middle, text in labels:
        half = (len(text) + 1) * character / 2
        if middle - half >= room:
            chosen.append((middle, text))
            room = middle + half
    return chosen
