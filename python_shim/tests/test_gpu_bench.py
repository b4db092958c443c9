"""The scripts that run on a GPU, as far as they go without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import adalora

PRINTS = "print('[  PASSED  ] 3 tests.')"
GPU = Path(__file__).resolve().parents[2] / "benches" / "gpu"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(library: adalora.Library, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the benchmark says of tiny shapes on the CPU."""
    pytest.importorskip("peft")
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, GPU / "bench.py", "--device", "cpu", "--seconds", "0.01", "--output", output]
    run = subprocess.run(
        command, env=os.environ | {"ADALORA_LIBRARY": library.path}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(output.read_text())


def test_the_benchmark_times_every_operation_on_all_sides(measured: dict) -> None:
    sides = {row["operation"]: set(row["ms"]) for row in measured["rows"]}
    passes = {f"{side}{how}" for side in ("c", "c_one_term", "torch", "peft", "lora") for how in ("", "_graph")}
    update = {"c", "c_graph", "torch", "torch_graph", "peft"}
    assert sides == {
        "forward": passes,
        "forward_backward": passes,
        "orthogonality": update,
        "step": update,
        "training_step": {"c_graph", "torch", "torch_graph", "peft"},
    }
    assert all(ms > 0 for row in measured["rows"] for ms in row["ms"].values())


def test_a_table_shows_what_was_measured(measured: dict) -> None:
    table = script("table")
    row = {"operation": "step", "layers": 24, "width": 4096, "rank": 12, "floor_ms": 1.5}
    row["ms"] = {"c": 2.5, "c_graph": 2.0, "torch": 5.0, "peft": 40.0}
    bench = measured | {"rows": [*measured["rows"], row], "date": "2026-01-01", "revision": "0123456789abcdef"}
    text = table.render([{"card": "A card", "driver": "1.2", "bench": bench}])
    assert text.startswith("A card, driver 1.2, PyTorch ")
    assert "| `step` | 24 layers, width 4096, rank 12 | 2.000 | 75 % | 20.0 |  |  | 5.000 | 8.0 |\n" in text
    assert len(text.splitlines()) == 4 + len(bench["rows"])


def test_no_table_without_a_measurement() -> None:
    assert script("table").render([{"card": "A card", "driver": "1.2", "parts": {}}]) == "Not yet measured on a GPU.\n"


def test_pages_show_what_was_measured() -> None:
    pages = script("table").pages()
    assert pages
    for page, (now, expected) in pages.items():
        assert now == expected, f"{page}: run benches/gpu/table.py"


def test_parts_end_in_time_and_say_what_came_of_them() -> None:
    check = script("check")

    def run(code: str, limit: float, shards: int = 1) -> object:
        part = check.Part("part", [sys.executable, "-c", code], limit, shards=shards)
        return part.run(dict(os.environ), time.monotonic() + 60)

    passed, failed = run(PRINTS, 30), run(f"{PRINTS}; exit(3)", 30)
    assert (passed.outcome, passed.summary) == ("passed", "3 tests passed")
    assert (failed.outcome, failed.summary) == ("failed: status 3", "3 tests passed")
    # What the part itself starts, and what holds its output open, ends with it.
    begin = time.monotonic()
    endless = run("import subprocess; subprocess.run(['sleep', '60'])", 1)
    assert endless.outcome == "failed: stopped after 1 s"
    assert time.monotonic() - begin < 20
    # Programs that share the tests: all have to pass.
    both = "import os; print('[  PASSED  ] ' + os.environ['GTEST_SHARD_INDEX'] + ' tests.')"
    assert (run(both, 30, 3).outcome, run(both, 30, 3).summary) == ("passed", "3 tests passed")
    assert run(f"{both}; exit(os.environ['GTEST_SHARD_INDEX'] == '1')", 30, 3).outcome == "failed: status 1"
    assert run("print('[==========] 0 tests from 0 test suites ran.')", 30).outcome == "failed: no test was found"


def test_a_result_keeps_parts_that_were_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = script("check")
    for name in ("ROOT", "BUNDLE"):
        monkeypatch.setattr(check, name, tmp_path)
    part = lambda name, outcome: check.Part(name, [], 1, outcome=outcome)  # noqa: E731
    for revision, card, done in (
        ("1", "NVIDIA H100 80GB HBM3", [part("operations", "passed"), part("graphs", "failed: status 1")]),
        ("2", "NVIDIA H100 80GB HBM3", [part("graphs", "passed")]),
    ):
        (tmp_path / "revision").write_text(revision)
        check.keep(done, card, "580.1")
    result = json.loads((tmp_path / "benches" / "results" / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert (result["card"], result["driver"]) == ("NVIDIA H100 80GB HBM3", "580.1")
    found = {name: (part["outcome"], part["revision"]) for name, part in result["parts"].items()}
    assert found == {"operations": ("passed", "1"), "graphs": ("passed", "2")}
    # Another driver begins anew.
    check.keep([part("graphs", "passed")], "NVIDIA H100 80GB HBM3", "590.1")
    file = tmp_path / "benches" / "results" / "gpu-nvidia-h100-80gb-hbm3.json"
    assert set(json.loads(file.read_text())["parts"]) == {"graphs"}
