"""The report of a PEFT model's ranks, beside what PEFT chose by itself."""

from __future__ import annotations

import pytest
import torch
from pairs import SETTINGS, STEPS, batches, layers, pair, peft_model, step, trained

import adalora.peft
from adalora import InvalidArgumentError

LAST_MASK = STEPS - SETTINGS["tfinal"]


def test_a_runs_report_is_pefts():
    theirs, ours = pair(dtype=torch.float64)
    report = adalora.peft.RankReport(ours, "PEFT")
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (theirs, ours)]
    ranks = {}
    for number, batch in enumerate(batches(dtype=torch.float64)):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            step(model, optimizer, number, batch)
        report.record(number)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        ranks[number] = [sum(kept) for kept in pattern.values()] or [SETTINGS["init_r"]] * 4
    summary = report._summary()
    assert summary.paths == [path.removeprefix("base_model.model.") for path in layers(theirs)]
    assert summary.shapes == [(18, 3), (12, 8), (8, 8), (8, 5)]
    assert [number for number, _ in summary.history] == [0, *range(6, LAST_MASK, 3), LAST_MASK]
    for number, found in summary.history:
        assert found == ranks[number], number
    assert summary.scores_step == LAST_MASK - 1
    assert "8 of 16" in report.text()


def test_the_schedule_may_change():
    ours = adalora.peft.accelerate(peft_model(total_step=60))
    report = adalora.peft.RankReport(ours)
    optimizer = torch.optim.AdamW(trained(ours).values(), lr=1e-2)
    for number, batch in enumerate(batches()):
        step(ours, optimizer, number, batch)
        report.record(number)
        if number == 10:
            ours.base_model.rankallocator.set_total_step(STEPS)
    summary = report._summary()
    assert summary.total_step == STEPS
    assert summary.history[-1][0] == LAST_MASK
    assert summary.scores_step == LAST_MASK - 1
    assert sum(summary.ranks) == 8


def test_other_models_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"found peft\.tuners\.adalora\.layer's"):
        adalora.peft.RankReport(peft_model())
    with pytest.raises(InvalidArgumentError, match="found none"):
        adalora.peft.RankReport(torch.nn.Linear(2, 2))
