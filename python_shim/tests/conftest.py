"""What all tests share: the library, a context, random numbers."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# For generate_bindings; and for the package of this checkout, where none is installed.
PROJECT = Path(__file__).resolve().parents[1]
sys.path += [str(PROJECT), str(PROJECT / "src")]
import adalora  # noqa: E402


@pytest.fixture(scope="session")
def library() -> adalora.Library:
    """The native library that is tested: the package's own, or the one that `ADALORA_LIBRARY` names."""
    return adalora.load()


@pytest.fixture(scope="session")
def context() -> Iterator[adalora.Context]:
    """A context with two threads."""
    with adalora.Context(threads=2) as made:
        yield made


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240607)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A process that gets some four gigabytes more, whatever the machine has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
