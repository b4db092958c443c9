"""Count the instructions of the library's operations under callgrind, and hold them against a baseline.

    count.py PROGRAM FOLDER [--write]

PROGRAM is operations.cpp, built; callgrind's own files go to FOLDER, one for each operation. The baseline is
baseline.json beside this file, which --write replaces. Exits with 1 where a count is more than 1 % off.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.01
# Symbols are bound before main, and glibc copies by vector instructions: of a string instruction callgrind counts each
# byte that it moves. Nothing else is passed on, and the program runs under a relative path, so that its stack begins at
# the same place everywhere.
ENVIRONMENT = {
    "LD_BIND_NOW": "1",
    "GLIBC_TUNABLES": "glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824",
}


def made_with(description: str) -> dict[str, str]:
    """What decides the counts: the compiler, and the instruction set that the library chose under valgrind."""
    compiler = subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    return {"rustc": compiler, "instruction_set": description.rsplit(", ", 1)[-1].strip()}


def count(program: Path, folder: Path) -> dict[str, Any]:
    """Run the program: what it was made with, and instructions by operation."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        sys.exit("valgrind: expected on PATH (Debian's package valgrind), found nothing")
    for old in folder.glob("*.callgrind*"):
        old.unlink()
    output = folder.resolve() / "dump.callgrind"
    command = [valgrind, "-q", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={output}"]
    run = subprocess.run(
        [*command, f"./{program.name}"], cwd=program.parent, env=ENVIRONMENT, capture_output=True, text=True
    )
    if run.returncode != 0:
        sys.exit(f"{program} under valgrind: exit status {run.returncode}\n{run.stdout}{run.stderr}")
    counts = {}
    dumps = [path for path in folder.glob(f"{output.name}.*") if path.suffix[1:].isdigit()]
    for dump in sorted(dumps, key=lambda path: int(path.suffix[1:])):
        text = dump.read_text()
        trigger = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if trigger and total:
            counts[trigger[1]] = int(total[1])
            dump.rename(folder / f"{re.sub('[^a-z0-9]+', '-', trigger[1].lower())}.callgrind")
    output.unlink()
    if not counts:
        sys.exit(f"{folder}: expected a dump of callgrind for each operation, found none\n{run.stderr}")
    return {**made_with(run.stdout), "instructions": counts}


def show(found: dict[str, int], baseline: dict[str, int]) -> None:
    """Print every operation, and how far it is from its baseline."""
    for name, now in found.items():
        change = f"{now / baseline[name] - 1:+.2%}" if name in baseline else "new"
        print(f"{name:64} {now:>12,} {change:>9}")


def judge(found: dict[str, Any], baseline: dict[str, Any]) -> int:
    """Say what is off; the exit status."""
    differs = [key for key in ("rustc", "instruction_set") if found[key] != baseline[key]]
    if differs:
        for key in differs:
            print(f"{key}: the baseline's is {baseline[key]}, this one is {found[key]}")
        print(
            "NOT COMPARED: counts change with these, so nothing is judged. `make instructions-baseline`, at a commit "
            "whose counts are good, makes the baseline anew."
        )
        return 0
    off = []
    for name in {**baseline["instructions"], **found["instructions"]}:
        before, now = baseline["instructions"].get(name), found["instructions"].get(name)
        if before is None or now is None:
            where = "program" if before is None else "baseline"
            off.append(f"{name}: expected in program and baseline, found in the {where} alone")
        elif abs(now - before) > TOLERANCE * before:
            off.append(f"{name}: expected {before:,} instructions to {TOLERANCE:.0%}, found {now:,}")
    if off:
        print(*off, sep="\n")
        print("Where this is meant, `make instructions-baseline` records it; commit the new baseline with its reason.")
        return 1
    print(f"{len(found['instructions'])} operations within {TOLERANCE:.0%} of the baseline")
    return 0


def main() -> int:
    """Count, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="replace the baseline by these counts")
    options = parser.parse_args()
    found = count(options.program, options.folder)
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else None
    show(found["instructions"], baseline["instructions"] if baseline else {})
    if options.write:
        BASELINE.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    if baseline is None:
        sys.exit(f"{BASELINE}: expected a baseline, found none: `make instructions-baseline` makes it")
    return judge(found, baseline)


if __name__ == "__main__":
    sys.exit(main())
