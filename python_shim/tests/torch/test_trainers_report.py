"""The report of ranks under transformers' Trainer: beside a plain loop's, resumed, and of PEFT's models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import SETTINGS, STEPS, adapted, bert, examples
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import adalora.peft
from adalora import InvalidStateError
from adalora.torch import AdamW, RankAllocator
from adalora.torch.transformers import AdaLoraCallback, RankReportCallback

# What PyTorch says about transformers' own loading of states.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
LAST_MASK = STEPS - SETTINGS["tfinal"]


def trainer(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    own = {"optimizers": options.pop("optimizers")} if "optimizers" in options else {}
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    data = examples()
    return Trainer(
        model, arguments, train_dataset=data, data_collator=default_data_collator, callbacks=list(callbacks), **own
    )


def build(folder: Path, kind: str, **options: Any) -> tuple[Trainer, RankReportCallback]:
    """A trainer with a report: of our layers, under PyTorch's optimiser or ours, or of PEFT's."""
    callback = AdaLoraCallback()
    if kind.startswith("peft"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            model = peft.get_peft_model(bert(), peft.AdaLoraConfig(**SETTINGS, total_step=STEPS))
        reporting = RankReportCallback(title="Run") if kind == "peft" else RankReportCallback(callback, "Run")
        return trainer(folder, adalora.peft.accelerate(model), callback, reporting, **options), reporting
    model = adapted(total_step=STEPS)
    if kind == "ours":
        params = [p for p in model.parameters() if p.requires_grad]
        options["optimizers"] = AdamW(params, RankAllocator(model), lr=1e-2), None
    reporting = RankReportCallback(callback, "Run")
    return trainer(folder, model, callback, reporting, **options), reporting


@pytest.mark.parametrize("kind", ["torch", "ours", "peft", "peft, with its callback"])
def test_a_run_and_resumed_ones(tmp_path: Path, kind: str):
    whole, reporting = build(tmp_path / "whole", kind, save_strategy="steps", save_steps=1)
    whole.train()
    summary = reporting.report._summary()
    assert [step for step, _ in summary.history] == [0, 2, 4, 6, LAST_MASK]
    assert sum(summary.ranks) == 2 * len(summary.paths)
    assert summary.scores_step == LAST_MASK - 1
    page = (tmp_path / "whole" / "rank_report.html").read_bytes()
    assert b"<h1>Run</h1>" in page
    # Before the first mask, between masks, before the last one, and after it.
    for step in (1, 5, LAST_MASK, LAST_MASK + 1):
        resumed, reporting = build(tmp_path / "resumed", kind)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert (tmp_path / "resumed" / "rank_report.html").read_bytes() == page, step


def test_history_is_the_allocators(tmp_path: Path):
    class Recorder(TrainerCallback):
        ranks: dict[int, list[int]] = {}

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.ranks[state.global_step - 1] = list(callback.allocator.ranks().values())

    callback = AdaLoraCallback()
    reporting, recorder = RankReportCallback(callback), Recorder()
    trainer(tmp_path, adapted(), callback, reporting, recorder).train()
    assert len(recorder.ranks) == STEPS
    for step, ranks in reporting.report._summary().history:
        assert ranks == recorder.ranks[step]
    assert len({tuple(ranks) for ranks in recorder.ranks.values()}) > 3
    # The trainer's number of steps, which the configuration does not have any more.
    assert "after step 11 of 12" in reporting.report.text()


def test_a_second_run_begins_anew(tmp_path: Path):
    model = adapted()
    callback = AdaLoraCallback()
    reporting = RankReportCallback(callback)
    made = trainer(tmp_path, model, callback, reporting)
    made.train()
    first = reporting.report
    made.train()
    assert reporting.report is not first
    assert [step for step, _ in reporting.report._summary().history] == [0, 2, 4, 6, LAST_MASK]


def test_a_callback_that_is_not_the_trainers(tmp_path: Path):
    with pytest.raises(InvalidStateError, match="callback: expected one that is among the trainer's callbacks"):
        trainer(tmp_path, adapted(total_step=STEPS), RankReportCallback(AdaLoraCallback())).train()
