"""The recorded runs through the C interface, and that a library with one constant changed does not pass."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import native
import numpy as np
import pytest
import replay
from safetensors.numpy import load_file, save_file

import adalora

GOLDEN = Path(__file__).with_name("golden")
CASES = sorted(file.stem for file in GOLDEN.glob("*.json"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run replay.py as a program."""
    command = [sys.executable, replay.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_recorded_runs(library: adalora.Library, dtype: str, threads: int) -> None:
    done = run("--library", library.path, "--dtype", dtype, "--device", "cpu", "--threads", threads, GOLDEN)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES) >= 9
    for line, name in zip(lines, CASES, strict=True):
        assert line.startswith(f"ok   {name} "), line
        assert "worst relative error" in line


# Each changes one constant in one call: the recorded runs have to notice every one.
CHANGES = {
    "adalora_allocator_create": [
        "adalora_allocator_desc_t d = *desc; d.beta1 += 1e-6; desc = &d;",
        "adalora_allocator_desc_t d = *desc; d.beta2 += 1e-6; desc = &d;",
        "adalora_allocator_desc_t d = *desc; d.tinit += 1; desc = &d;",
        "adalora_allocator_desc_t d = *desc; d.delta_t += 1; desc = &d;",
    ],
    "adalora_adapter_create": ["adalora_adapter_desc_t d = *desc; d.alpha *= 1 + 1e-8; desc = &d;"],
    "adalora_allocator_orthogonality": ["weight *= 1 + 1e-7;", "double one = 1; factor = &one;"],
    "adalora_allocator_bind": [
        "adalora_hyper_t h = *hypers; h.eps *= 10; hypers = &h;",
        "adalora_hyper_t h = *hypers; h.beta2 += 1e-6; hypers = &h;",
        "adalora_hyper_t h = *hypers; static double lr; lr = *h.lr * (1 + 1e-8); h.lr = &lr; hypers = &h;",
    ],
    "adalora_allocator_update": [
        "adalora_step_t s = *step; s.has_grad = 0; step = &s;",
        "adalora_step_t s = *step; static const float none; s.found_inf = &none; step = &s;",
        "adalora_step_t s = *step; s.grad_factor = 0; step = &s;",
    ],
    "adalora_allocator_step": [
        "adalora_step_t s = *step; static const float none; s.found_inf = &none; step = &s;",
    ],
    "adalora_allocator_select": ["adalora_step_t s = *step; int64_t t = *s.step + 1; s.step = &t; step = &s;"],
    "adalora_adapter_delta_weight": ["fan_in_fan_out = 0;"],
}


@pytest.mark.parametrize(
    ("function", "statement"), [(name, change) for name, changes in CHANGES.items() for change in changes]
)
def test_one_changed_constant_is_noticed(
    tmp_path: Path, library: adalora.Library, function: str, statement: str
) -> None:
    changed = native.compile_library(tmp_path, native.forwarding_source(library.path, function, statement))
    done = run("--library", changed, "--threads", 1, GOLDEN)
    assert done.returncode == 1, done.stdout
    assert "FAIL" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_forwarding_library_alone_changes_nothing(tmp_path: Path, library: adalora.Library) -> None:
    same = native.compile_library(tmp_path, native.forwarding_source(library.path, "adalora_allocator_create", ""))
    done = run("--library", same, "--threads", 1, GOLDEN)
    assert done.returncode == 0, done.stdout + done.stderr


def test_folders_without_a_case_fail(tmp_path: Path) -> None:
    done = run(GOLDEN, tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"FAIL {tmp_path}: no case"
    assert run(tmp_path / "nowhere").returncode == 1


def copied(folder: Path, name: str, new_name: str) -> tuple[Path, Path]:
    """A copy of a case under another name."""
    for suffix in ("json", "safetensors"):
        shutil.copy(GOLDEN / f"{name}.{suffix}", folder / f"{new_name}.{suffix}")
    return folder / f"{new_name}.json", folder / f"{new_name}.safetensors"


def test_a_case_under_another_name_is_replayed(tmp_path: Path) -> None:
    copied(tmp_path, "tiny", "something_else")
    done = run(tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("ok   something_else")


@pytest.mark.parametrize(
    "tensor",
    [
        "step/3/1/y",
        "step/3/1/dx",
        "step/3/2/dA_task",
        "step/3/2/dE",
        "step/3/0/B_after_adamw",
        "step/3/0/E_after_adamw",
        "step/4/0/E_after_allocate",
        "step/3/0/exp_avg_unc_A",
        "step/3/1/delta_weight",
        "final/1/A",
        "final/2/delta_weight",
    ],
)
@pytest.mark.parametrize("value", [1e-8, np.nan])
def test_one_changed_element_of_a_recording_is_noticed(tmp_path: Path, tensor: str, value: float) -> None:
    _, data = copied(tmp_path, "tiny", "tampered")
    tensors = load_file(data)
    tensors[tensor].reshape(-1)[1] += value * np.abs(tensors[tensor]).max()
    save_file(tensors, data)
    done = run(tmp_path)
    assert done.returncode == 1
    assert f"at {tensor} " in done.stdout


def test_a_changed_log_is_noticed(tmp_path: Path) -> None:
    meta, _ = copied(tmp_path, "events", "tampered")
    original = meta.read_text()
    for key, value, text in (
        ("budget", 1, "budget"),
        ("scheduled_mask", "maybe", "scheduled mask"),
        ("skipped", 77, "skipped"),
        ("kept", [[True] * 4, [], [True] * 6], "kept"),
        ("task_loss", 4.0, "task_loss"),
        ("total_loss", 4.0, "total_loss"),
    ):
        document = json.loads(original)
        document["steps"][20][key] = value
        meta.write_text(json.dumps(document))
        done = run(tmp_path)
        assert done.returncode == 1
        assert text in done.stdout


def test_what_is_no_case_fails(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no case")
    (tmp_path / "list.json").write_text("[]")
    _, data = copied(tmp_path, "tiny", "damaged")
    data.write_bytes(data.read_bytes()[:-1])
    copied(tmp_path, "tiny", "whole")
    done = run(tmp_path)
    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["FAIL", "damaged"],
        ["FAIL", "list"],
        ["FAIL", "text"],
        ["ok", "whole"],
    ]


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    done = run("--library", tmp_path / "nothing.so", GOLDEN)
    assert done.returncode == 2
    assert str(tmp_path / "nothing.so") in done.stderr.splitlines()[-1]


def test_half_a_case_fails(tmp_path: Path) -> None:
    meta, data = copied(tmp_path, "tiny", "half")
    data.rename(tmp_path / "other.safetensors")
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("FAIL") == 2
    meta.unlink()


def test_a_recorded_tensor_that_is_never_met_fails(tmp_path: Path) -> None:
    _, data = copied(tmp_path, "tiny", "more")
    save_file(load_file(data) | {"step/99/0/y": np.zeros((10, 24))}, data)
    done = run(tmp_path)
    assert done.returncode == 1
    assert "step/99/0/y" in done.stdout
