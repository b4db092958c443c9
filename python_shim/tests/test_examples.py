"""The examples run as they are, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import adalora

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_readme_example(library: adalora.Library, tmp_path: Path) -> None:
    environment = {"ADALORA_LIBRARY": library.path, "PYTHONPATH": str(Path(adalora.__file__).parents[1])}
    command = [sys.executable, EXAMPLES / "readme_example.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    lines = [
        re.fullmatch(r"step +(\d+)  loss ([\d.]+)  budget +(\d+)  ranks by layer \[(\d), (\d)\]", line)
        for line in done.stdout.splitlines()
    ]
    first, last = lines[0].groups(), lines[-1].groups()
    assert float(last[1]) < 0.02 * float(first[1])
    # All that is left is where the change was.
    assert (first[2:], last[2:]) == (("12", "6", "6"), ("4", "0", "4"))
