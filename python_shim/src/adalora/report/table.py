"""Adapters in rows by layer and columns by module, from the paths of a model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where an adapter stands in the table."""

    stack: str
    """What comes before the layer's number."""
    layer: int
    module: str
    """What comes after it."""


class Table(NamedTuple):
    """Adapters by layer and module, as positions in a list of paths."""

    rows: list[str]
    columns: list[str]
    cells: list[list[int | None]]
    """Of each row: a position in each column, None where the layer has no such adapter."""
    others: list[int]
    """Adapters that no layer has."""

    @property
    def groups(self) -> list[tuple[str, list[int]]]:
        """The adapters of each row, and one group with the others."""
        rows = [(name, [k for k in row if k is not None]) for name, row in zip(self.rows, self.cells, strict=True)]
        return [*rows, ("others", self.others)] if self.others else rows


def arrange(paths: Sequence[str]) -> Table:
    """Arrange adapters.

    The layer is a number in the path: the first one, unless another gives a smaller or squarer table. Where no path has
    a number with a module behind it, the table is empty and all are others.
    """
    depth = max(sum(part.isdecimal() for part in path.split(".")) for path in paths)
    tables = [_arrange(paths, number) for number in range(max(depth, 1))]
    return min(tables, key=lambda t: (len(t.others), len(t.rows) * len(t.columns), max(len(t.rows), len(t.columns))))


def _arrange(paths: Sequence[str], number: int) -> Table:
    places = [_place(path, number) for path in paths]
    stacks = list(dict.fromkeys(place.stack for place in places if place))
    modules = list(dict.fromkeys(place.module for place in places if place))
    layers = sorted({(stacks.index(place.stack), place.layer) for place in places if place})
    position = {place: k for k, place in enumerate(places) if place}
    names = _short(stacks)
    # A number that all have says nothing beside the stacks' names.
    numbered = len(stacks) == 1 or len({layer for _, layer in layers}) > 1
    return Table(
        [f"{names[stack]} {layer if numbered else ''}".strip() for stack, layer in layers],
        [_ending(module, modules) for module in modules],
        [[position.get(Place(stacks[stack], layer, module)) for module in modules] for stack, layer in layers],
        [k for k, place in enumerate(places) if not place],
    )


def _place(path: str, number: int) -> Place | None:
    """A path's place by its number of that index, or by its last one before a module."""
    parts = path.split(".")
    numbers = [k for k, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not numbers:
        return None
    k = numbers[min(number, len(numbers) - 1)]
    return Place(".".join(parts[:k]), int(parts[k]), ".".join(parts[k + 1 :]))


def _short(stacks: Sequence[str]) -> list[str]:
    """The stacks' names without the parts that all begin or end with."""
    parts = [stack.split(".") for stack in stacks]
    while len(parts) > 1 and all(parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    while len(parts) > 1 and all(parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return [".".join(each) for each in parts] if len(parts) > 1 else [""]


def _ending(module: str, modules: Sequence[str]) -> str:
    """The last parts of a module's name that no other has."""
    parts = module.split(".")
    for n in range(1, len(parts)):
        ending = parts[-n:]
        if sum(other.split(".")[-n:] == ending for other in modules) == 1:
            return ".".join(ending)
    return module
