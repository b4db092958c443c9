"""Processes that tests start."""

from __future__ import annotations

from pathlib import Path

import adalora


def package(library: adalora.Library) -> dict[str, str]:
    """The environment in which another process takes the very package and library that are tested."""
    return {"ADALORA_LIBRARY": library.path, "PYTHONPATH": str(Path(adalora.__file__).parents[1])}
