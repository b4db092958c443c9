"""The examples run as they are, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from child import package

import adalora

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, library: adalora.Library, folder: Path, *args: str, before: tuple[str, ...] = ()) -> list[str]:
    environment = package(library)
    done = subprocess.run(
        [sys.executable, *before, EXAMPLES / name, *args],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_readme_example(library: adalora.Library, tmp_path: Path) -> None:
    lines = [
        re.fullmatch(r"step +(\d+)  loss ([\d.]+)  budget +(\d+)  ranks by layer \[(\d), (\d)\]", line)
        for line in run("readme_example.py", library, tmp_path)
    ]
    first, last = lines[0].groups(), lines[-1].groups()
    assert float(last[1]) < 0.02 * float(first[1])
    # All that is left is where the change was.
    assert (first[2:], last[2:]) == (("12", "6", "6"), ("4", "0", "4"))


def test_torch_example(library: adalora.Library, tmp_path: Path) -> None:
    lines = [
        re.fullmatch(r"step +(\d+)  loss ([\d.]+)  budget +(\d+)  \{'0': (\d), '2': (\d)\}", line)
        for line in run("torch_example.py", library, tmp_path)
    ]
    first, last = lines[0].groups(), lines[-1].groups()
    assert float(last[1]) < 0.03 * float(first[1])
    assert (first[2:], last[2:]) == (("12", "6", "6"), ("4", "0", "4"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_trainers_examples(trainer: str, library: adalora.Library, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if f"from adalora.torch.{trainer} import" in block)
    (tmp_path / "example.py").write_text(example)
    ranks = eval(run(tmp_path / "example.py", library, tmp_path)[-1])
    assert sum(ranks.values()) == 3 * len(ranks)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("way", ["fsdp", "ddp", "plain"])
def test_distributed_example(way: str, library: adalora.Library, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    lines = [
        re.fullmatch(r"step +(\d+)  loss ([\d.]+)  budget +(\d+)  \{'0': (\d), '2': (\d)\}", line)
        for line in run("distributed_example.py", library, tmp_path, way, before=torchrun)
    ]
    first, last = lines[0].groups(), lines[-1].groups()
    assert float(last[1]) < 0.03 * float(first[1])
    assert (first[2:], last[2:]) == (("12", "6", "6"), ("4", "0", "4"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_peft_example(library: adalora.Library, tmp_path: Path) -> None:
    lines = [
        re.fullmatch(r"step +(\d+)  loss ([\d.]+)  triplets +(\d+)", line)
        for line in run("peft_example.py", library, tmp_path)
    ]
    first, last = lines[0].groups(), lines[-1].groups()
    assert float(last[1]) < 0.5 * float(first[1])
    assert (first[2], last[2]) == ("48", "24")
