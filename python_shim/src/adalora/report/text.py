"""A report as plain text, for terminals and logs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .summary import Summary

# Rows of the table of budgets, and characters of its bars.
MOST_ROWS, BAR = 12, 40


def text(summary: Summary) -> str:
    """The report; it ends with a newline."""
    parts = [_head(summary), _ranks(summary), _budget(summary)]
    if summary.scores is not None:
        parts.append(_scores(summary))
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _head(s: Summary) -> list[str]:
    facts = {
        "triplets kept": f"{s.standing.live_triplets:,} of {s.triplets:,}",
        "their parameters": f"{s.standing.live_parameters:,} of {s.parameters:,}",
        "budget": f"{s.standing.budget:,} {s.unit}",
        "adapters at rank 0": f"{s.ranks.count(0)} of {len(s.ranks)}",
        "masks taken": f"{s.standing.selections:,}",
        "steps skipped": f"{s.standing.skipped:,}",
    }
    return [s.title, s.state, "", *(f"{name:18}  {value}" for name, value in facts.items())]


def _ranks(s: Summary) -> list[str]:
    table, lines = s.table, []
    if table.rows:
        sums = [sum(s.ranks[row[c]] for row in table.cells if row[c] is not None) for c in range(len(table.columns))]
        rows = [
            [name, *("-" if k is None else s.ranks[k] for k in row), sum(s.ranks[k] for k in row if k is not None)]
            for name, row in zip(table.rows, table.cells, strict=True)
        ]
        head = _stacked(["layer", *table.columns, "sum"])
        lines += _aligned([*head, *rows, ["sum", *sums, sum(sums)]])
    if table.others:
        lines += [""] if lines else []
        lines += _aligned(
            [["adapter", "rank", "of"], *([s.paths[k], s.ranks[k], s.initial[k]] for k in table.others)], left=1
        )
    return lines


def _budget(s: Summary) -> list[str]:
    entries = s.history
    if len(entries) > MOST_ROWS:
        entries = [entries[k * (len(entries) - 1) // (MOST_ROWS - 1)] for k in range(MOST_ROWS)]
    counts = [s.in_unit(ranks) for _, ranks in entries]
    most = max(1, s.in_unit(s.initial))
    rows = [[step, f"{n:,}", "#" * round(BAR * n / most)] for (step, _), n in zip(entries, counts, strict=True)]
    return [line.rstrip() for line in _aligned([["step", s.unit, ""], *rows], left=0, bar=True)] if rows else []


def _scores(s: Summary) -> list[str]:
    ordered = sorted(
        ((score, s.paths[k], i, kept[i]) for k, (scores, kept) in _with_pattern(s) for i, score in enumerate(scores)),
        key=lambda entry: -entry[0],
    )
    kept, masked = ([entry for entry in ordered if entry[3] == is_kept] for is_kept in (True, False))
    named = {"highest": ordered[:1], "lowest kept": kept[-1:], "highest masked": masked[:1], "lowest": ordered[-1:]}
    rows = [[name, f"{score:.3g}", f"{path}[{i}]"] for name, found in named.items() for score, path, i, _ in found]
    return [f"scores after step {s.scores_step}", *_aligned(rows, left=1, bar=True)]


def _with_pattern(s: Summary) -> list[tuple[int, tuple[list[float], list[bool]]]]:
    return list(enumerate(zip(s.scores or [], (p.tolist() for p in s.standing.pattern), strict=True)))


def _stacked(names: Sequence[str]) -> list[list[str]]:
    """Names such as SelfAttention.q, a word in each line, ended by the last ones."""
    parts = [re.split(r"(?<=\.)(?=.)|(?<=[a-z])(?=[A-Z])", name) for name in names]
    height = max(map(len, parts))
    return [list(line) for line in zip(*([""] * (height - len(each)) + each for each in parts), strict=True)]


def _aligned(rows: Sequence[Sequence[object]], left: int = 0, bar: bool = False) -> list[str]:
    """Lines in columns, flush right; the first `left` ones, and with `bar` the last one, flush left."""
    widths = [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
    is_left = [c < left or (bar and c == len(widths) - 1) for c in range(len(widths))]
    return [
        "  ".join(
            str(value).ljust(width) if to_left else str(value).rjust(width)
            for value, width, to_left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    ]
