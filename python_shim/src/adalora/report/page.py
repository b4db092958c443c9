"""A report as one HTML page that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from .axis import SHADES, between, decades, shade, thinned, ticks, with_room
from .summary import Summary

# Of a chart, in units of its view box: about pixels.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000, 62, 18, 34, 40
# Of a character, in the same unit.
CHARACTER = 7.2
# Where a name may be broken: attention.|output, q_|proj, Self|Attention.
WORD_ENDS = r"(?<=[._])(?=\w)|(?<=[a-z])(?=[A-Z])"
# Points in time of the strips.
MOST_TIMES = 160

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --surface: #fff; --ink: #1a2230; --muted: #5b6675; --line: #e2e6ec; --accent: #2563c9;
  --masked: #98a3b3; --mark: #b4540a;
  --h0: #eceef2; --h1: #e3edfb; --h2: #c7dbf6; --h3: #a3c4ef; --h4: #7aa8e5; --h5: #538cd9; --h6: #3370c6;
  --h7: #1f56a6; --h8: #153e7e; --on-low: #0d1b33; --on-high: #fff; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1218; --surface: #161b23; --ink: #e6eaf1; --muted: #98a3b3; --line: #2a323e; --accent: #6aa9ff;
  --masked: #6c7889; --mark: #f0a35e;
  --h0: #20262f; --h1: #1c2a3f; --h2: #20395b; --h3: #254a7a; --h4: #2c5d9c; --h5: #3972be; --h6: #558fd9;
  --h7: #82b1ee; --h8: #b9d6ff; --on-low: #f2f6fc; --on-high: #0a1120; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 2px; }
h3 { font-size: 14px; font-weight: 600; margin: 14px 0 -8px; }
p { margin: 0; color: var(--muted); }
section, .facts div { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 18px 20px 16px; margin-top: 16px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 0; }
.facts div { padding: 12px 16px; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 0; font-size: 22px; font-weight: 600; line-height: 1.3; }
.facts dd span { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.wide { overflow-x: auto; margin-top: 12px; }
svg { display: block; width: 100%; min-width: 640px; height: auto; }
svg text { fill: var(--muted); font-size: 12.5px; }
svg .name { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.kept { stroke: var(--accent); fill: none; stroke-width: 2; stroke-linejoin: round; }
.area { fill: var(--accent); opacity: .12; }
.planned { stroke: var(--muted); fill: none; stroke-width: 1.25; stroke-dasharray: 5 4; }
.mark { stroke: var(--mark); stroke-width: 1; stroke-dasharray: 2 3; }
svg .marked { fill: var(--mark); }
.band { fill: var(--line); opacity: .45; }
.dots { stroke-linecap: round; fill: none; }
.dots.on { stroke: var(--accent); }
.dots.off { stroke: var(--masked); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 8px; font-size: 13px; color: var(--muted); }
.legend i { display: inline-block; width: 20px; height: 10px; margin-right: 6px; border-radius: 2px; }
.legend .dashed { height: 0; border-top: 2px dashed var(--muted); vertical-align: middle; }
.legend .dotted { height: 0; border-top: 2px dotted var(--mark); vertical-align: middle; }
table { border-collapse: separate; border-spacing: 2px; font-size: 14px; }
th { font-weight: 500; color: var(--muted); padding: 3px 8px; white-space: nowrap; }
td { padding: 4px 8px; text-align: center; white-space: nowrap; }
.heat { table-layout: fixed; width: 100%; }
.heat thead th { vertical-align: bottom; white-space: normal; line-height: 1.25; padding: 3px 2px; }
.heat th:first-child { text-align: right; padding-right: 8px; }
.heat td { border-radius: 4px; }
.heat td.sum, .heat tfoot td, .heat tfoot th { color: var(--muted); }
.bar { height: 14px; min-width: 120px; background: var(--h0); border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.list { width: 100%; }
.list th { text-align: right; }
.list th:first-child, .list td:first-child { text-align: left; }
.list td { text-align: right; border-bottom: 1px solid var(--line); }
.list .name { min-width: 15em; white-space: normal; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 17px; font-weight: 600; }
footer { margin-top: 20px; font-size: 13px; color: var(--muted); }
@media print { section { break-inside: avoid; } }
"""
STYLE += "".join(
    f".h{k} {{ background: var(--h{k}); fill: var(--h{k});"
    f" color: var(--{'muted' if k == 0 else 'on-low' if k <= 5 else 'on-high'}); }}\n"
    for k in range(SHADES + 1)
)


def page(summary: Summary) -> str:
    """The whole document."""
    s = summary
    sections = [_budget(s), _ranks(s), _movement(s), _scores(s), _adapters(s)]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(s.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{escape(s.title)}</h1>\n<p>{escape(_sentence(s.state))}</p>\n{_facts(s)}\n</header>\n"
        + "\n".join(f"<section>\n{section}\n</section>" for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(s: Summary) -> str:
    standing = s.standing
    facts = {
        "triplets kept": (f"{standing.live_triplets:,}", f"of {s.triplets:,}"),
        "their parameters": (f"{standing.live_parameters:,}", f"of {s.parameters:,}"),
        "mean rank": (f"{standing.live_triplets / len(s.paths):.3g}", f"of {s.triplets / len(s.paths):.3g}"),
        "adapters at rank 0": (f"{s.ranks.count(0)}", f"of {len(s.paths)}"),
        "masks taken": (f"{standing.selections:,}", ""),
        "steps skipped": (f"{standing.skipped:,}", ""),
    }
    return (
        '<dl class="facts">\n'
        + "\n".join(
            f"<div><dt>{name}</dt><dd>{value}<span>{of}</span></dd></div>" for name, (value, of) in facts.items()
        )
        + "\n</dl>"
    )


# Budget


def _budget(s: Summary) -> str:
    height = 280
    last = max(s.total_step - 1, s.step, 1)
    most = max(s.in_unit(s.initial), *(budget for _, budget in s.schedule), 1)
    scale = _Scale(last, most * 1.05, height)
    y_ticks, x_ticks = ticks(0, most), ticks(0, last, 8)
    parts = [_lines_across([(scale.y(value), f"{value:,.0f}") for value in y_ticks])]
    parts += [_text(scale.x(value), height - BOTTOM + 18, f"{value:,.0f}", "middle") for value in x_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 4, "step", "middle"))
    # Two lines of names, which may be close to each other.
    for step, name, y in ((s.tinit, "budget begins to fall", 12), (s.last_mask, "last mask", 26)):
        if 0 < step <= last:
            x, anchor = scale.x(step), "start" if step < 0.1 * last else "end" if step > 0.9 * last else "middle"
            parts.append(_line(x, y + 5, x, height - BOTTOM, "mark"))
            parts.append(_text(x, y, f"{name}, step {step:,}", anchor, "marked"))
    planned = [(scale.x(step), scale.y(budget)) for step, budget in s.schedule]
    parts.append(f'<path class="planned" d="{_path(planned)}"/>')
    points = [(scale.x(step), scale.y(s.in_unit(ranks))) for step, ranks in s.history]
    if points:
        stairs = _stairs([*points, (scale.x(s.step), points[-1][1])])
        base = scale.y(0)
        area = [*stairs, (stairs[-1][0], base), (stairs[0][0], base)]
        parts.append(f'<path class="area" d="{_path(area)}Z"/><path class="kept" d="{_path(stairs)}"/>')
    legend = '<span><i style="background:var(--accent)"></i>kept</span><span><i class="dashed"></i>'
    return (
        f"<h2>Budget over time</h2>\n<p>{_sentence(s.unit)} that are kept after each step, and what the schedule says."
        f"</p>\n{_svg(height, parts, 'Budget over time')}\n"
        f'<div class="legend">{legend}schedule</span></div>'
    )


# Ranks


def _ranks(s: Summary) -> str:
    parts = ["<h2>Ranks by layer and module</h2>" if s.table.rows else "<h2>Ranks</h2>"]
    parts.append(f"<p>Triplets that are kept in each adapter, of {_range(s.initial)} at the beginning.</p>")
    if s.table.rows:
        parts.append(f'<div class="wide">{_heat(s)}</div>')
        parts.append(_shades())
    if s.table.others:
        rows = "\n".join(
            f'<tr><td class="name">{escape(s.paths[k])}</td><td>{s.ranks[k]} of {s.initial[k]}</td>'
            f'<td><div class="bar"><i style="width:{100 * s.share([k], s.ranks):.4g}%"></i></div></td></tr>'
            for k in s.table.others
        )
        parts.append(
            f'<div class="wide"><table class="list">\n<thead><tr><th>adapter</th><th>rank</th><th></th></tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody>\n</table></div>"
        )
    return "\n".join(parts)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _heat(s: Summary) -> str:
    table = s.table
    highest = max(1, *s.initial)
    head = "".join(f'<th scope="col">{_breakable(name)}</th>' for name in (*table.columns, "sum"))
    rows = []
    for name, row in zip(table.rows, table.cells, strict=True):
        cells = "".join(
            "<td></td>"
            if k is None
            else f'<td class="h{shade(s.ranks[k] / highest)}" title="{escape(s.paths[k])}: {s.ranks[k]} of '
            f'{s.initial[k]}">{s.ranks[k]}</td>'
            for k in row
        )
        total = sum(s.ranks[k] for k in row if k is not None)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}<td class="sum">{total}</td></tr>')
    columns = [[row[c] for row in table.cells if row[c] is not None] for c in range(len(table.columns))]
    sums = [sum(s.ranks[k] for k in column) for column in columns]
    foot = "".join(f"<td>{value}</td>" for value in (*sums, sum(sums)))
    # In em: a column for the layers' names, and no column below what its name's parts need.
    first = 1.5 + 0.62 * max(len(name) for name in (*table.rows, "layer"))
    longest = max(len(word) for name in table.columns for word in re.split(WORD_ENDS, name))
    least = first + max(3.2, 0.6 + 0.58 * longest) * (len(table.columns) + 1)
    return (
        f'<table class="heat" style="min-width:{least:.4g}em">\n<col style="width:{first:.4g}em">\n'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f'\n</tbody>\n<tfoot><tr><th scope="row">sum</th>{foot}</tr></tfoot>\n</table>'
    )


def _breakable(name: str) -> str:
    """A name that may be broken between its words."""
    return "<wbr>".join(map(escape, re.split(WORD_ENDS, name)))


def _shades() -> str:
    cells = "".join(f'<i class="h{k}" style="margin:0"></i>' for k in range(SHADES + 1))
    return f'<div class="legend"><span>nothing kept &nbsp;{cells}&nbsp; all kept</span></div>'


# Movement


def _movement(s: Summary) -> str:
    if len(s.history) < 2:
        return ""
    charts = [("By layer", s.table.groups)]
    if s.table.rows:
        columns = [
            (name, [row[c] for row in s.table.cells if row[c] is not None]) for c, name in enumerate(s.table.columns)
        ]
        charts.append(("By module", columns))
    else:
        charts = [("By adapter", [(s.paths[k], [k]) for k in s.table.others])]
    parts = ["<h2>How the ranks moved</h2>", "<p>The part of the triplets that is kept, step by step.</p>"]
    longest = max(len(name) for _, groups in charts for name, _ in groups)
    label = min(260, max(LEFT, 14 + CHARACTER * longest))
    for name, groups in charts:
        parts += [f"<h3>{name}</h3>", _strips(s, name, groups, label)]
    return "\n".join(parts)


def _strips(s: Summary, title: str, groups: Sequence[tuple[str, list[int]]], label: float) -> str:
    row = max(12, min(22, 420 // len(groups)))
    height = row * len(groups) + BOTTOM
    first, last = s.history[0][0], max(s.step, s.history[-1][0], s.history[0][0] + 1)
    x_of = lambda step: label + (WIDTH - RIGHT - label) * (step - first) / (last - first)  # noqa: E731
    entries = thinned(s.history, MOST_TIMES)
    ends = [step for step, _ in entries[1:]] + [last]
    parts = []
    for y, (name, positions) in enumerate(groups):
        middle = y * row + row / 2 + 4
        most = int((label - 10) / CHARACTER)
        short = name if len(name) <= most else "…" + name[1 - most :]
        parts.append(f"<g><title>{escape(name)}</title>{_text(label - 8, middle, short, 'end', 'name')}</g>")
        spans = [
            (shade(s.share(positions, ranks)), begin, end)
            for (begin, ranks), end in zip(entries, ends, strict=True)
            if end > begin
        ]
        for level, run in groupby(spans, key=lambda span: span[0]):
            run = list(run)
            begin, end = x_of(run[0][1]), x_of(run[-1][2])
            parts.append(
                f'<rect class="h{level}" x="{begin:.1f}" y="{y * row + 1}" width="{end - begin + 0.2:.1f}" '
                f'height="{row - 2}"/>'
            )
    bottom = row * len(groups)
    parts += [_text(x_of(value), bottom + 16, f"{value:,.0f}", "middle") for value in ticks(first, last, 8)]
    parts.append(_text((label + WIDTH - RIGHT) / 2, height - 4, "step", "middle"))
    return _svg(height, parts, f"Ranks over time, {title}")


# Scores


def _scores(s: Summary) -> str:
    if s.scores is None:
        return ""
    kept, masked = s.split_scores()
    powers = decades([score for scores in s.scores for score in scores])
    if powers is None:
        return ""
    low, high = powers
    height, above, margin = 310, 8, 12
    floor, top = height - BOTTOM - margin, above + 6
    # Below the lowest power is a line for what is less.
    lowest_y = floor - 18
    y_of = lambda score: (  # noqa: E731
        floor if score < 10.0**low else lowest_y - (lowest_y - top) * (math.log10(score) - low) / (high - low)
    )
    slot = (WIDTH - RIGHT - LEFT) / len(s.paths)
    groups = s.groups
    order = [k for _, positions in groups for k in positions]
    x_of = {k: LEFT + (place + 0.5) * slot for place, k in enumerate(order)}
    parts, labels, begin = [], [], float(LEFT)
    for number, (name, positions) in enumerate(groups):
        width = len(positions) * slot
        if number % 2:
            size = f'width="{width:.1f}" height="{height - BOTTOM - above}"'
            parts.append(f'<rect class="band" x="{begin:.1f}" y="{above}" {size}/>')
        labels.append((begin + width / 2, name))
        begin += width
    parts += [_text(x, height - BOTTOM + 18, name, "middle") for x, name in with_room(labels, CHARACTER)]
    parts.append(_lines_across([(y_of(10.0**p), f"1e{p}") for p in between(low, high)]))
    if any(score < 10.0**low for scores in s.scores for score in scores):
        parts.append(_lines_across([(floor, "less")]))
    size = max(3, min(6.5, slot * 0.55))
    for name, sides in (("off", masked), ("on", kept)):
        dots = "".join(f"M{x_of[k]:.1f} {y_of(score):.1f}h0" for k, scores in enumerate(sides) for score in scores)
        if dots:
            parts.append(f'<path class="dots {name}" stroke-width="{size:.1f}" d="{dots}"/>')
    legend = (
        '<span><i style="background:var(--accent)"></i>kept</span>'
        '<span><i style="background:var(--masked)"></i>masked</span>'
    )
    lowest = s.lowest_kept
    if lowest is not None and lowest >= 10.0**low:
        y = y_of(lowest)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "mark"))
        legend += f'<span><i class="dotted"></i>lowest score that is kept, {lowest:.3g}</span>'
    below = "layer" if s.table.rows else "adapter, in the order of the list"
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 4, below, "middle"))
    return (
        f"<h2>Scores</h2>\n<p>The importance of every triplet after step {s.scores_step:,}, by which "
        f"{'the last mask' if s.standing.is_final else 'a mask'} chose; adapters side by side.</p>\n"
        f"{_svg(height, parts, 'Scores of triplets')}\n"
        f'<div class="legend">{legend}</div>'
    )


# All adapters


def _adapters(s: Summary) -> str:
    columns = ["adapter", "in", "out", "rank", "of", "parameters kept"]
    if s.scores is not None:
        columns += ["highest score", "mean score"]
    rows = []
    for k, path in enumerate(s.paths):
        in_features, out_features = s.shapes[k]
        values = [
            f"{in_features:,}",
            f"{out_features:,}",
            s.ranks[k],
            s.initial[k],
            f"{s.ranks[k] * s.costs[k]:,}",
        ]
        if s.scores is not None:
            scores = s.scores[k]
            values += [f"{max(scores):.3g}", f"{sum(scores) / len(scores):.3g}"] if scores else ["", ""]
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f'<tr><td class="name">{_breakable(path)}</td>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return (
        f"<details>\n<summary>All {len(s.paths)} adapters</summary>\n"
        f'<div class="wide"><table class="list">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>\n</details>"
    )


# SVG


class _Scale:
    """From values, both from 0 on, to places in a chart."""

    def __init__(self, most_x: float, most_y: float, height: float) -> None:
        self.most_x, self.most_y, self.height = most_x, most_y, height

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * value / self.most_x

    def y(self, value: float) -> float:
        bottom = self.height - BOTTOM
        return bottom - (bottom - TOP) * value / self.most_y


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">\n'
        + "\n".join(parts)
        + "\n</svg></div>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _lines_across(lines: Iterable[tuple[float, str]]) -> str:
    return "".join(_line(LEFT, y, WIDTH - RIGHT, y, "grid") + _text(LEFT - 8, y + 4, text, "end") for y, text in lines)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A line that keeps a value until the next one."""
    stairs = [points[0]]
    for x, y in points[1:]:
        stairs += [(x, stairs[-1][1]), (x, y)]
    return stairs
