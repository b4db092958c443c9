#!/usr/bin/env python3
"""Write what was measured on GPUs into the pages that show it.

    table.py [--check]

A page shows it between two comments; the results are benches/results/gpu-*.json, which `make gpu-check` writes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benches" / "results"
PAGES = [ROOT / "README.md", ROOT / "benches" / "README.md"]
BEGIN, END = "<!-- measured on a GPU: benches/gpu/table.py -->", "<!-- end -->"
COLUMNS = (
    *("operation", "shape", "ours, ms", "of the copy's bandwidth", "PEFT over ours", "LoRA over ours", "over one term"),
    *("`adalora.torch`, ms", "PEFT over it"),
)


def render(results: list[dict[str, Any]]) -> str:
    """The text for the results of all cards."""
    measured = [result for result in results if result.get("bench", {}).get("rows")]
    if not measured:
        return "Not yet measured on a GPU.\n"
    return "\n".join(map(of_card, measured))


def of_card(result: dict[str, Any]) -> str:
    """The text for one card's result."""
    bench = result["bench"]
    versions = bench["versions"]
    peft = f"PEFT {versions['peft']}" if versions["peft"] else "without PEFT"
    lines = [
        f"{result['card']}, driver {result['driver']}, PyTorch {versions['torch']}, {peft}, {bench['date']}, revision "
        f"{bench['revision'][:10]}; a copy moves {bench['copy_tb_s']:.2f} TB/s.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += [row_text(row) for row in bench["rows"]]
    return "\n".join(lines) + "\n"


def row_text(row: dict[str, Any]) -> str:
    """A line of the table."""
    shape = ", ".join(f"{row[name]} {name}" for name in ("layers", "tokens") if name in row)
    shape += f", width {row['width']}, rank {row['rank']}"
    if row["operation"].startswith("forward"):
        shape = f"[{row['tokens']}, {row['width']}, {row['rank']}]"
    if "error" in row or "c_graph" not in row["ms"]:
        return f"| `{row['operation']}` | {shape} | failed |" + " |" * 6
    ms = row["ms"]
    ours, torch = ms["c_graph"], ms["torch"]
    peft, lora = ms.get("peft_graph", ms.get("peft")), ms.get("lora_graph")
    ratio = lambda other, own: f"{other / own:.1f}" if other and own else ""  # noqa: E731
    share = f"{100 * row['floor_ms'] / ours:.0f} %" if "floor_ms" in row else ""
    cells = [share, ratio(peft, ours), ratio(lora, ours), ratio(lora, ms.get("c_one_term_graph"))]
    cells += [f"{torch:.3f}", ratio(ms.get("peft"), torch)]
    return f"| `{row['operation']}` | {shape} | {ours:.3f} | " + " | ".join(cells) + " |"


def pages() -> dict[Path, tuple[str, str]]:
    """Each page that shows results, as it is and as it should be."""
    text = render([json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu-*.json"))])
    place = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    found = {page: page.read_text() for page in PAGES}
    return {page: (now, place.sub(lambda _: text, now)) for page, now in found.items() if BEGIN in now}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    options = parser.parse_args(arguments)
    stale = {page: text for page, (now, text) in pages().items() if now != text}
    for page, text in stale.items():
        if options.check:
            print(
                f"{page.relative_to(ROOT)} does not show what was measured: run benches/gpu/table.py", file=sys.stderr
            )
        else:
            page.write_text(text)
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
