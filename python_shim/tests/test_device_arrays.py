"""Arrays in device memory, in a process of their own: where PyTorch has loaded CUDA's libraries, no others can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import device_arrays
import pytest

RUNS = Path(__file__).with_name("device_runs.py")


@pytest.mark.skipif(not device_arrays.is_there(), reason="no CUDA and no software CUDA (make test-cpp builds it)")
def test_device_arrays() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", RUNS.parents[1] / "pyproject.toml"]
    done = subprocess.run([*command, RUNS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
