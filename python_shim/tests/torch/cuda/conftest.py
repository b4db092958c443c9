"""Tests of `adalora.torch` on a GPU: collected where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# For what tests on the CPU share.
sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
