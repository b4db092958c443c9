"""PEFT's own AdaLoRA tests, offline, without this package and with it: all that pass without it pass with it.

They are in PEFT's source distribution, which pip fetches. With this package, PEFT's replaced functions fail when they
are called (see `replaced.py`), and the native library's calls are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import peft

VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
FILES = ("test_custom_models.py", "test_mixed.py", "test_config.py", "test_initialization.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CALLS = ("adalora_adapter_forward", "adalora_adapter_backward", "adalora_adapter_merge")
LEAST = 250
"""How many tests pass without this package where everything that they need offline is there: 254."""


def fetch(folder: Path) -> Path:
    """The unpacked source distribution."""
    name = f"peft-{VERSION}"
    if not (folder / f"{name}.tar.gz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requirements.txt").write_text(f"peft=={VERSION} --hash=sha256:{SHA256}\n")
        command = "download --quiet --no-deps --no-binary :all: --require-hashes -r requirements.txt".split()
        subprocess.run([sys.executable, "-m", "pip", *command], cwd=folder, check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    # The distribution leaves it out.
    (folder / name / "tests" / "__init__.py").touch()
    return folder / name


def run(source: Path, report: Path, *options: str) -> dict[str, str]:
    """Run the tests; returns how each ended."""
    here = Path(__file__).parent
    # The package is the installed one: the checkout's own has no native library beside it.
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    files = [f"tests/{name}" for name in FILES]
    # Without PEFT's own options, which measure coverage.
    command = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-o",
        "addopts=",
        "-k",
        "adalora",
        *options,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command, f"--junitxml={report}", *files],
        cwd=source,
        env={**os.environ, **OFFLINE, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    outcomes = {}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            ends = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = ends[0] if ends else "passed"
    if not outcomes:
        sys.exit(f"{done.stdout}\npytest ended with {done.returncode}, expected the results of tests")
    counts = {end: list(outcomes.values()).count(end) for end in ("passed", "failure", "error", "skipped")}
    print(", ".join(f"{count} {end}" for end, count in counts.items()), flush=True)
    report.with_suffix(".txt").write_text(done.stdout)
    return outcomes


def main() -> None:
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("target/pefts-tests"), help="for what is fetched and found")
    folder = parser.parse_args().folder.resolve()
    if peft.__version__ != VERSION:
        sys.exit(f"peft: expected {VERSION}, of which the tests are, found {peft.__version__}")
    source = fetch(folder)
    print("PEFT's AdaLoRA tests without adalora: ", end="", flush=True)
    without = run(source, folder / "without.xml")
    passed, errors = (sum(end == wanted for end in without.values()) for wanted in ("passed", "error"))
    if passed < LEAST or errors:
        text = (folder / "without.txt").read_text()
        sys.exit(f"{text}\nwithout adalora: expected {LEAST} passed and no error, found {passed} and {errors}")
    print("with adalora.peft.install(): ", end="", flush=True)
    counters = folder / "calls.json"
    counters.unlink(missing_ok=True)
    within = run(source, folder / "with.xml", "-p", "replaced", f"--native-calls={counters}")
    lost = [name for name, end in without.items() if end == "passed" and within.get(name) != "passed"]
    if lost:
        sys.exit((folder / "with.txt").read_text() + "\nno longer passed:\n" + "\n".join(lost))
    calls = json.loads(counters.read_text())
    print("native calls: " + ", ".join(f"{name} {count}" for name, count in sorted(calls.items())))
    for name in CALLS:
        if not calls.get(name):
            sys.exit(f"{name}: expected calls, found none")


if __name__ == "__main__":
    main()
