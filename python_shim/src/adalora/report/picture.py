"""A report as a picture, drawn by matplotlib without a display."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from .axis import SHADES, between, decades, shade, thinned, with_room
from .summary import Summary

SHADE_COLORS = ("#eceef2", "#e3edfb", "#c7dbf6", "#a3c4ef", "#7aa8e5", "#538cd9", "#3370c6", "#1f56a6", "#153e7e")
INK, MUTED, LINE, ACCENT, MASKED, MARK = "#1a2230", "#5b6675", "#e2e6ec", "#2563c9", "#98a3b3", "#b4540a"
MOST_TIMES = 400
# Characters of a line of the title, its lines, and their height in inches.
TITLE_WIDTH, TITLE_LINES, TITLE_HEIGHT = 105, 3, 0.26
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "legend.frameon": False,
}


def picture(summary: Summary) -> Any:
    """A `matplotlib.figure.Figure`: ranks at the left; budget, movement of ranks and scores at the right."""
    import matplotlib
    from matplotlib.figure import Figure

    s = summary
    rows = len(s.table.rows) or len(s.paths)
    with matplotlib.rc_context(STYLE):
        title = wrap(_literal(s.title), TITLE_WIDTH, max_lines=TITLE_LINES, placeholder=" …") or [""]
        head = 0.75 + TITLE_HEIGHT * (len(title) - 1)
        height = max(7.5, 1.6 + 0.25 * rows) + head - 0.75
        figure = Figure(figsize=(15, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, rect=(0, 0, 1, 1 - head / height))
        kept = f"{s.standing.live_triplets:,} of {s.triplets:,} triplets kept"
        heading = figure.text(0.01, 1 - 0.12 / height, "\n".join(title), va="top", fontsize=15, fontweight="bold")
        # Wide letters become smaller ones.
        heading.set_fontsize(15 * min(1, 0.98 * figure.bbox.width / max(1, heading.get_window_extent().width)))
        figure.text(0.01, 1 - (head - 0.3) / height, f"{kept} {s.state}", va="top", color=MUTED)
        left, right = figure.subfigures(1, 2, width_ratios=(6, 7))
        (_heat if s.table.rows else _bars)(left.subplots(), s)
        budget, movement, scores = right.subplots(3, 1, height_ratios=(3, 3, 3))
        _budget(budget, s)
        _movement(movement, s)
        _scores(scores, s)
    return figure


def _heat(axes: Any, s: Summary) -> None:
    from matplotlib.colors import ListedColormap

    table, highest = s.table, max(1, *s.initial)
    colors = ListedColormap(SHADE_COLORS)
    values = [[float("nan") if k is None else shade(s.ranks[k] / highest) for k in row] for row in table.cells]
    axes.imshow(values, cmap=colors, vmin=-0.5, vmax=SHADES + 0.5, aspect="auto")
    size = max(5.5, min(10, 300 / max(len(table.rows), 3 * len(table.columns))))
    for y, row in enumerate(table.cells):
        for x, k in enumerate(row):
            if k is not None:
                level = shade(s.ranks[k] / highest)
                color = MUTED if level == 0 else INK if level <= 5 else "white"
                axes.text(x, y, s.ranks[k], ha="center", va="center", color=color, fontsize=size)
        total = sum(s.ranks[k] for k in row if k is not None)
        axes.text(len(row) - 0.35, y, total, ha="left", va="center", color=MUTED, fontsize=size)
    sums = [sum(s.ranks[row[x]] for row in table.cells if row[x] is not None) for x in range(len(table.columns))]
    for x, total in enumerate([*sums, sum(sums)]):
        axes.annotate(
            total,
            (x if x < len(sums) else x - 0.35, len(table.rows) - 0.5),
            (0, -4),
            textcoords="offset points",
            ha="center" if x < len(sums) else "left",
            va="top",
            color=MUTED,
            fontsize=size,
            annotation_clip=False,
        )
    names = [_literal(name).replace(".", ".\n") for name in table.columns]
    if max(len(part) for name in names for part in name.split("\n")) * len(names) > 80:
        names = list(map(_literal, table.columns))
        axes.set_xticks(range(len(names)), names, rotation=40, ha="left", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), names)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(table.rows)), list(map(_literal, table.rows)))
    axes.set_xticks([x - 0.5 for x in range(1, len(names))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(table.rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer")
    axes.set_title("Ranks by layer and module", pad=10)
    if table.others:
        text = "\n".join(f"{_literal(s.paths[k])}: {s.ranks[k]} of {s.initial[k]}" for k in table.others)
        axes.set_xlabel(text, loc="left", labelpad=18, color=INK)


def _bars(axes: Any, s: Summary) -> None:
    places = range(len(s.paths))
    axes.barh(places, s.initial, height=0.7, color=SHADE_COLORS[0])
    axes.barh(places, s.ranks, height=0.7, color=ACCENT)
    for y, (rank, initial) in enumerate(zip(s.ranks, s.initial, strict=True)):
        axes.text(initial, y, f" {rank} of {initial}", va="center", color=MUTED, fontsize=8)
    axes.set_yticks(places, [_literal(path if len(path) <= 40 else f"…{path[-39:]}") for path in s.paths])
    # Few bars stay thin.
    axes.set_ylim(max(len(s.paths), 10) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(1, *s.initial))
    axes.xaxis.get_major_locator().set_params(integer=True)
    # Where the bars are, however few.
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Ranks", pad=10)


def _budget(axes: Any, s: Summary) -> None:
    steps, budgets = zip(*s.schedule, strict=True)
    axes.plot(steps, budgets, color=MUTED, linewidth=1, linestyle=(0, (5, 4)), label="schedule")
    if s.history:
        steps, counts = [step for step, _ in s.history], [s.in_unit(ranks) for _, ranks in s.history]
        steps, counts = [*steps, s.step], [*counts, counts[-1]]
        axes.step(steps, counts, where="post", color=ACCENT, linewidth=1.8, label="kept")
        axes.fill_between(steps, counts, step="post", color=ACCENT, alpha=0.12, linewidth=0)
    close = s.last_mask - s.tinit < 0.4 * s.total_step
    for step, name, height in (
        (s.tinit, "budget begins to fall", 0.97),
        (s.last_mask, "last mask", 0.85 if close else 0.97),
    ):
        if 0 < step < s.total_step:
            axes.axvline(step, color=MARK, linewidth=0.8, linestyle=(0, (2, 3)))
            axes.annotate(
                f" {name}, step {step:,} ",
                (step, height),
                xycoords=("data", "axes fraction"),
                ha="right" if step > 0.7 * s.total_step else "left",
                va="top",
                color=MARK,
                fontsize=8,
            )
    axes.set_ylim(0, 1.2 * max(1, s.in_unit(s.initial), *budgets))
    axes.set_xlim(0, max(s.total_step - 1, s.step, 1))
    axes.set(xlabel="step", ylabel=s.unit)
    _finish(axes, "Budget over time")
    axes.legend(loc="lower left", fontsize=8)


def _movement(axes: Any, s: Summary) -> None:
    from matplotlib.colors import ListedColormap

    groups = s.groups
    _finish(axes, "The part of the ranks that is kept, step by step")
    axes.grid(False)
    axes.set(xlabel="step", ylabel="layer" if s.table.rows else "adapter")
    if not s.history:
        return
    entries = thinned(s.history, MOST_TIMES)
    edges = [step for step, _ in entries] + [max(s.step, entries[-1][0]) + 1]
    values = [[shade(s.share(positions, ranks)) for _, ranks in entries] for _, positions in groups]
    colors = ListedColormap(SHADE_COLORS)
    axes.pcolormesh(edges, [y - 0.5 for y in range(len(groups) + 1)], values, cmap=colors, vmin=-0.5, vmax=SHADES + 0.5)
    every = -(-len(groups) // 12)
    axes.set_yticks(range(0, len(groups), every), [_literal(name) for name, _ in groups][::every])
    axes.invert_yaxis()
    axes.hlines([y + 0.5 for y in range(len(groups) - 1)], edges[0], edges[-1], color="white", linewidth=0.8)


def _scores(axes: Any, s: Summary) -> None:
    _finish(axes, "Scores of triplets" + (f", after step {s.scores_step:,}" if s.scores is not None else ""))
    powers = decades([score for scores in s.scores or [] for score in scores])
    if powers is None:
        axes.text(0.5, 0.5, "none recorded", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set(xticks=[], yticks=[])
        return
    groups = s.groups
    order = {k: place for place, k in enumerate(k for _, positions in groups for k in positions)}
    # Below the lowest power is a place for what is less.
    low, high = powers
    floor = 10.0 ** (low - (high - low) / 8)
    size = max(2, min(26, 900 / len(order)))
    for side, color, name in zip(s.split_scores(), (ACCENT, MASKED), ("kept", "masked"), strict=True):
        points = [
            (order[k], score if score >= 10.0**low else floor) for k, scores in enumerate(side) for score in scores
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=size, color=color, label=name, linewidths=0, zorder=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    marks = {10.0**p: f"1e{p}" for p in between(low, high)}
    if any(score < 10.0**low for scores in s.scores or [] for score in scores):
        marks[floor] = "less"
    axes.set_yticks(list(marks), list(marks.values()))
    begin, ticks = 0, []
    for number, (name, positions) in enumerate(groups):
        if number % 2:
            axes.axvspan(begin - 0.5, begin + len(positions) - 0.5, color=LINE, alpha=0.45, linewidth=0)
        ticks.append((begin + (len(positions) - 1) / 2, _literal(name)))
        begin += len(positions)
    # About 85 characters fit.
    places, names = zip(*with_room(ticks, len(order) / 85), strict=True)
    axes.set_xticks(places, names)
    axes.set_xlim(-0.6, len(order) - 0.4)
    if s.lowest_kept:
        axes.axhline(s.lowest_kept, color=MARK, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axes.set_xlabel("layer" if s.table.rows else "adapter")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0.6, 1.0), ncols=2, fontsize=8, borderaxespad=0.2)


def _literal(text: str) -> str:
    """A text that is not taken for a formula."""
    return text.replace("$", r"\$")


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
