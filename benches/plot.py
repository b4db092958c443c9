"""Draw what bench.py wrote: how much faster than PEFT, how far from the floor, and how cost grows.

plot.py FILE [PNG]                 default: beside FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The shape that the others differ from in one respect.
BASE = {"layers": 24, "in_features": 768, "out_features": 768, "rank": 12, "tokens": 512}
OPERATIONS = ("forward_backward", "forward_backward_compacted", "orthogonality", "optimizer_allocator")
SIDES = {"ours_ms": "ours", "peft_ms": "PEFT", "compiled_ms": "PEFT, compiled", "lora_ms": "LoRA", "floor_ms": "floor"}


def name_of(row: dict[str, Any]) -> str:
    """A shape in short."""
    return f"{row['layers']} x {row['in_features']} to {row['out_features']}, r {row['rank']}, {row['tokens']} tokens"


def draw_ratios(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """For each shape, how often as fast as PEFT each operation is."""
    names = list(dict.fromkeys(name_of(row) for row in rows))
    height = 0.8 / len(OPERATIONS)
    for k, operation in enumerate(OPERATIONS):
        ratios = {name_of(row): row["ratio"] for row in rows if row["operation"] == operation}
        places = [names.index(name) + (k - 1.5) * height for name in ratios]
        axes.barh(places, list(ratios.values()), height, label=operation)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as PEFT")
    axes.legend(fontsize=8)


def draw_growth(axes: Axes, rows: list[dict[str, Any]], base: dict[str, Any], along: str) -> None:
    """Forward and backward along one property, with all others as in the base."""
    chosen = sorted(
        (row for row in rows if all(row[name] == value for name, value in base.items() if name != along)),
        key=lambda row: row[along],
    )
    for side, label in SIDES.items():
        points = [(row[along], row[side]) for row in chosen if side in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel=along, ylabel="forward + backward, ms")
    axes.legend(fontsize=8)


def main() -> None:
    """Draw one file."""
    source = Path(sys.argv[1])
    document = json.loads(source.read_text())
    rows = [row for row in document["rows"] if row["operation"] != "demo_step" and row["dtype"] == "float32"]
    most = max(row["threads"] for row in rows)
    passes = [row for row in rows if row["operation"] == "forward_backward"]
    rows = [row for row in rows if row["threads"] == most]
    base = BASE | {"threads": most}
    figure = Figure(figsize=(13, 10), layout="constrained")
    grid = figure.add_gridspec(4, 2, width_ratios=(3, 2))
    draw_ratios(figure.add_subplot(grid[:, 0]), rows)
    for k, along in enumerate(("tokens", "rank", "layers", "threads")):
        draw_growth(figure.add_subplot(grid[k, 1]), passes, base, along)
    figure.suptitle(f"{document['machine']['processor']}, {most} threads, float32")
    figure.savefig(sys.argv[2] if len(sys.argv) > 2 else source.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
