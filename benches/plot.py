"""Draw what bench.py wrote: how much faster than PEFT, how far from the floor, and how cost grows.

plot.py FILE [PNG]                 default: beside FILE

Prints README.md's table of the same rows, too.
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


def times(row: dict[str, Any], side: str) -> str:
    """How many times as long as we another side took."""
    return f"{row[side] / row['ours_ms']:.1f}"


def over_floor(row: dict[str, Any]) -> str:
    """Our time over the floor."""
    return f"{row['over_floor']:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each shape, all with the same number of threads."""
    columns = [
        "layers, in to out, rank, tokens",
        *("`forward_backward` in float32", "compiled", "LoRA", "over the floor", "compacted"),
        *("in bfloat16", "compiled", "over the floor", "compacted"),
        *("`orthogonality`", "over the floor", "`optimizer_allocator`", "over the floor"),
    ]
    lines = [columns, ["---"] * len(columns)]
    shapes = dict.fromkeys(tuple(row[name] for name in BASE) for row in rows)
    for layers, wide, out, rank, tokens in shapes:
        of = {
            (row["operation"], row["dtype"]): row
            for row in rows
            if tuple(row[name] for name in BASE) == (layers, wide, out, rank, tokens)
        }
        passes, half = (of["forward_backward", dtype] for dtype in ("float32", "bfloat16"))
        compacted, half_compacted = (of["forward_backward_compacted", dtype] for dtype in ("float32", "bfloat16"))
        penalty, update = of["orthogonality", "float32"], of["optimizer_allocator", "float32"]
        texts = [
            *(times(passes, "peft_ms"), times(passes, "compiled_ms"), times(passes, "lora_ms"), over_floor(passes)),
            f"{compacted['ours_ms'] / passes['ours_ms']:.2f}",
            *(times(half, "peft_ms"), times(half, "compiled_ms"), over_floor(half)),
            f"{half_compacted['ours_ms'] / half['ours_ms']:.2f}",
            *(times(penalty, "peft_ms"), over_floor(penalty), times(update, "peft_ms"), over_floor(update)),
        ]
        lines.append([f"{layers}, {wide} to {out}, {rank}, {tokens}", *texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Draw one file."""
    source = Path(sys.argv[1])
    document = json.loads(source.read_text())
    rows = [row for row in document["rows"] if row["operation"] not in ("demo_step", "eager_call")]
    most = max(row["threads"] for row in rows)
    print(table([row for row in rows if row["threads"] == most]))
    rows = [row for row in rows if row["dtype"] == "float32"]
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
