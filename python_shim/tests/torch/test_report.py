"""The report of ranks: what it records, beside PEFT's own numbers, and each form that it is shown in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from peft_runs import SETTINGS, batches, loss_of, network, peft_pattern, trained, with_peft
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from adalora import InvalidArgumentError, Standing
from adalora.report import Summary, page, picture, text
from adalora.report.axis import between, decades, shade, thinned, ticks, with_room
from adalora.report.table import arrange
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    RankReport,
    adapt,
    load_training_state,
    save_training_state,
)

STEPS, LAST_MASK = SETTINGS["total_step"], SETTINGS["total_step"] - SETTINGS["tfinal"]
MASKS = [step for step in range(STEPS) if SETTINGS["tinit"] < step < LAST_MASK and step % SETTINGS["deltaT"] == 0]


class Run:
    """A network in training, with a report."""

    def __init__(self, **changed) -> None:
        self.model = network(**changed)
        self.allocator = RankAllocator(self.model)
        self.optimizer = AdamW(trained(self.model).values(), self.allocator, lr=1e-2)
        self.report = RankReport(self.allocator)

    def train(self, begin: int, end: int) -> Run:
        for step, batch in list(enumerate(batches(STEPS)))[begin:end]:
            loss_of(self.model, batch).backward()
            self.allocator.orthogonality()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.report.record(step)
        return self


@pytest.fixture(scope="module")
def run() -> Run:
    """A whole run."""
    return Run().train(0, STEPS)


def peft_scores(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT's allocator would choose by, by its own functions."""
    allocator, scores = theirs.base_model.rankallocator, {}
    for name in SETTINGS["target_modules"]:
        of = lambda matrix, name=name: allocator._element_score(f"{name}.lora_{matrix}.default")  # noqa: E731
        both = torch.cat([of("A").mean(1, keepdim=True), of("B").mean(0).view(-1, 1)], 1)
        scores[name] = allocator._combine_ipt(of("E"), both)
    return scores


# What is recorded


def test_history_and_scores_are_pefts():
    theirs = with_peft(network())
    layers = {name: theirs.base_model.model.get_submodule(name) for name in SETTINGS["target_modules"]}
    ours = network()
    allocator = RankAllocator(ours)
    report = RankReport(allocator)
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (ours, theirs)]
    expected, scores = [(0, [4, 4, 4])], None
    for step, batch in enumerate(batches(STEPS)):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            (loss_of(model, batch) + (allocator.orthogonality_loss() if model is ours else 0)).backward()
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        report.record(step)
        if step in (*MASKS, LAST_MASK):
            expected.append((step, [sum(peft_pattern(theirs)[name]) for name in layers]))
        if step == LAST_MASK - 1:
            scores = peft_scores(theirs)
            for name, found in allocator.scores().items():
                torch.testing.assert_close(found, scores[name], rtol=1e-8, atol=0)
        for optimizer in optimizers:
            optimizer.zero_grad()
    summary = report._summary()
    assert summary.history == expected
    assert len({tuple(ranks) for _, ranks in expected}) > 3
    assert summary.scores_step == LAST_MASK - 1
    for name, found in zip(layers, summary.scores, strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), scores[name], rtol=1e-8, atol=0)


def test_scores_explain_the_last_mask(run: Run):
    summary = run.report._summary()
    kept, masked = ([score for scores in side for score in scores] for side in summary.split_scores())
    assert (len(kept), len(masked)) == (6, 6)
    assert min(kept) == summary.lowest_kept >= max(masked)
    # The allocator has forgotten them.
    assert all(not scores.any() for scores in run.allocator.scores().values())


def test_nothing_is_read_without_a_mask(monkeypatch: pytest.MonkeyPatch):
    reads = []
    for name in ("standing", "scores"):
        read = getattr(RankAllocator, name)
        monkeypatch.setattr(RankAllocator, name, lambda self, name=name, read=read: reads.append(name) or read(self))
    run = Run()
    found = {}
    for step in range(STEPS):
        reads.clear()
        run.train(step, step + 1)
        found[step] = list(reads)
    expected = {step: ["standing", "scores"] for step in MASKS}
    # The first entry; the scores before the last mask; the last mask, after which there are none.
    expected |= {0: ["standing"], LAST_MASK - 1: ["scores"], LAST_MASK: ["standing"]}
    assert {step: names for step, names in found.items() if names} == expected


def test_steps_with_masks_are_enough(run: Run):
    sparse = Run()
    record, sparse.report.record = sparse.report.record, lambda step: None
    for step in range(STEPS):
        sparse.train(step, step + 1)
        if step in (*MASKS, LAST_MASK):
            record(step)
    summary = sparse.report._summary()
    assert summary.history == run.report._summary().history[1:]
    # What the mask before the last one saw.
    assert summary.scores_step == MASKS[-1]


def test_what_was_not_recorded_is_looked_up():
    run = Run().train(0, MASKS[2])
    assert run.report._summary().standing.ranks == run.report._summary().history[-1][1]
    run.allocator.finalize()
    summary = run.report._summary()
    assert summary.history[-1] == (MASKS[2] - 1, list(run.allocator.ranks().values()))
    assert sum(summary.ranks) == 6
    assert summary.standing.is_final
    assert "6 of 12" in run.report.text()
    unrecorded = RankReport(run.allocator)
    assert unrecorded._summary().history == [summary.history[-1]]
    assert "scores" not in unrecorded.text()


def test_before_the_first_step(tmp_path: Path):
    report = RankReport(RankAllocator(network()))
    assert "before the first of 30 steps" in report.text()
    report.save_html(tmp_path / "report.html")
    report.save_png(tmp_path / "report.png", dpi=30)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_steps_are_refused():
    run = Run().train(0, 5)
    before = run.report.state_dict()
    with pytest.raises(InvalidArgumentError, match="step: expected one above 4, which was recorded last, found 4"):
        run.report.record(4)
    run.optimizer.global_step = 20
    loss_of(run.model, batches(1)[0]).backward()
    run.optimizer.step()
    with pytest.raises(InvalidArgumentError, match="step: expected the allocator's last one, 20, found 18"):
        run.report.record(18)
    with pytest.raises(InvalidArgumentError, match="step: expected the allocator's last one, -1, found 0"):
        Run().report.record(0)
    with pytest.raises(InvalidArgumentError, match=r"step: expected an integer, .* found 5\.0"):
        run.report.record(5.0)
    assert str(run.report.state_dict()) == str(before)


def test_a_step_without_the_allocator():
    run = Run().train(0, MASKS[0])
    run.report.record(MASKS[0])
    # Without its mask, which the step would have had.
    assert run.report._summary().history == [(0, [4, 4, 4])]
    run.optimizer.global_step += 1
    run.train(MASKS[0] + 1, STEPS)
    assert [step for step, _ in run.report._summary().history] == [0, *MASKS[1:], LAST_MASK]


def test_a_mask_that_is_taken_by_hand_keeps_the_scores():
    run = Run(tfinal=0).train(0, STEPS - 1)
    (x, wanted), *_ = batches(1)
    loss_of(run.model, (x, wanted)).backward()
    run.optimizer.step()
    run.allocator.finalize()
    run.report.record(STEPS - 1)
    summary = run.report._summary()
    assert summary.standing.is_final
    assert summary.scores_step < STEPS - 1
    assert any(map(any, summary.scores))


def test_a_long_history_is_thinned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adalora.torch.report.MOST_ENTRIES", 6)
    run = Run(deltaT=1).train(0, STEPS)
    steps = [step for step, _ in run.report._summary().history]
    # Step 0, masks from 5 on: of these every fourth, and the last one.
    assert steps == [0, 8, 12, 16, 20, 24]
    assert sum(run.report._summary().history[-1][1]) == 6


# State


@pytest.mark.parametrize("stop", [1, MASKS[1], MASKS[1] + 1, LAST_MASK, STEPS - 1])
def test_a_resumed_run_has_the_whole_report(run: Run, stop: int, tmp_path: Path):
    first = Run().train(0, stop)
    save_training_state(tmp_path, optimizer=first.optimizer, report=first.report)
    second = Run()
    second.model.load_state_dict(first.model.state_dict())
    load_training_state(tmp_path, optimizer=second.optimizer, report=second.report)
    second.train(stop, STEPS)
    assert second.report.text() == run.report.text()
    for report, name in ((run.report, "whole"), (second.report, "resumed")):
        report.save_html(tmp_path / f"{name}.html")
    assert (tmp_path / "whole.html").read_bytes() == (tmp_path / "resumed.html").read_bytes()


def test_wrong_states_are_refused(run: Run):
    report = Run().report
    before = str(report.state_dict())
    state = run.report.state_dict()
    for name, value, message in (
        ("layers", ["fc1", "fc2"], "layers: expected this model's 3, found 2 that are not the same"),
        ("ranks", state["ranks"][:, :2], r"ranks: expected shape \[\d+, 3\], found"),
        ("ranks", state["ranks"][1:], r"ranks: expected shape \[\d+, 3\], found"),
        ("scores", state["scores"][1:], "scores: expected 12 or none, found 11"),
        ("further", 1, "state_dict: expected the keys"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            report.load_state_dict({**state, name: value})
        assert str(report.state_dict()) == before


# Layers of another make, and other units


def test_layers_of_peft(run: Run):
    theirs = with_peft(network())
    layers = {name: theirs.base_model.model.get_submodule(name) for name in SETTINGS["target_modules"]}
    allocator = RankAllocator.over(layers, theirs.peft_config["default"])
    optimizer = AdamW(trained(theirs).values(), allocator, lr=1e-2)
    report = RankReport(allocator)
    for step, batch in enumerate(batches(STEPS)):
        # The network itself: PEFT's model would add its penalty.
        theirs.base_model.model(*batch).loss.backward()
        allocator.orthogonality()
        optimizer.step()
        report.record(step)
        optimizer.zero_grad()
    assert report._summary().history == run.report._summary().history
    assert report.text() == run.report.text()


def test_budget_in_parameters():
    model = network()
    allocator = RankAllocator(model, budget_unit="parameters")
    optimizer, report = AdamW(trained(model).values(), allocator, lr=1e-2), RankReport(allocator)
    for step, batch in enumerate(batches(STEPS)):
        loss_of(model, batch).backward()
        optimizer.step()
        report.record(step)
    # One triplet of fc1, fc2 and fc3 costs 15, 17 and 14.
    cost = sum(r * c for r, c in zip(allocator.ranks().values(), (15, 17, 14), strict=True))
    assert cost <= allocator.standing().budget == 92
    assert f"their parameters    {cost} of 184" in report.text()
    assert re.search(rf"^ +24 +{cost}  #+$", report.text(), re.MULTILINE)


# Arrangement


@pytest.mark.parametrize(
    ("paths", "rows", "columns", "others"),
    [
        (
            [f"encoder.layer.{i}.{m}" for i in (0, 10, 2) for m in ("attention.self.query", "output.dense")],
            ["0", "2", "10"],
            ["query", "dense"],
            [],
        ),
        (
            ["h.0.attn.output.dense", "h.0.output.dense", "h.0.mlp.dense"],
            ["0"],
            ["attn.output.dense", "output.dense", "mlp.dense"],
            [],
        ),
        (
            ["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.0.x.k", "lm_head", "mlp.2"],
            ["encoder 0", "encoder 1", "decoder 0"],
            ["q", "k"],
            [4, 5],
        ),
        # A number that all share says nothing.
        ([f"0.layers.{i}.{m}" for i in range(4) for m in "qk"], ["0", "1", "2", "3"], ["q", "k"], []),
        (
            [f"{a}.{i}.tx.{t}.to_{m}" for a in ("down", "up") for i in (0, 1) for t in (0, 1) for m in "qk"],
            ["down 0", "down 1", "up 0", "up 1"],
            ["0.to_q", "0.to_k", "1.to_q", "1.to_k"],
            [],
        ),
        (
            [f"{a}.{i}.tx.0.{b}.{m}" for a in ("down", "up") for i in (0, 1) for b in "xy" for m in "qk"]
            + ["mid.tx.0.x.q"],
            ["down.0", "down.1", "up.0", "up.1", "mid"],
            ["x.q", "x.k", "y.q", "y.k"],
            [],
        ),
        # Experts by layer.
        (
            [f"layers.{i}.experts.{e}.w{k}" for i in range(6) for e in range(2) for k in (1, 2)],
            [str(i) for i in range(6)],
            ["0.w1", "0.w2", "1.w1", "1.w2"],
            [],
        ),
        (["0", "2"], [], [], [0, 1]),
        (["query", "key"], [], [], [0, 1]),
    ],
)
def test_arrange(paths: list[str], rows: list[str], columns: list[str], others: list[int]):
    table = arrange(paths)
    assert (table.rows, table.columns, table.others) == (rows, columns, others)
    assert sorted([k for row in table.cells for k in row if k is not None] + table.others) == list(range(len(paths)))
    for name, row in zip(table.rows, table.cells, strict=True):
        for column, k in zip(table.columns, row, strict=True):
            if k is not None:
                assert paths[k].endswith(column)
                assert name.split()[-1] in paths[k]


def test_ticks():
    assert ticks(0, 432) == [0, 100, 200, 300, 400]
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(12, 30, 8) == [15, 20, 25, 30]
    assert ticks(3, 3) == [3]
    assert all(len(ticks(0, high)) <= 7 for high in range(1, 3000))


def test_shades_thinning_and_labels():
    assert [shade(share) for share in (0, 0.01, 0.125, 0.126, 0.99, 1)] == [0, 1, 1, 2, 8, 8]
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(3), 4) == [0, 1, 2]
    assert decades([3e-7, 0.0, 2e-3]) == (-7, -2)
    assert decades([0.0]) is None
    assert decades([1e-5]) == (-5, -4)
    assert decades([1e-40, 3e-3]) == (-14, -2)
    assert between(-14, -2) == [-14, -12, -10, -8, -6, -4, -2]
    assert between(-5, -4) == [-5, -4]
    labels = [(0, "ab"), (2, "cd"), (4, "ef"), (6, "gh")]
    assert with_room(labels, 0.6) == labels
    assert with_room(labels, 1) == [(0, "ab"), (4, "ef")]
    assert with_room(labels, 9) == labels[:1] == with_room(labels[:1], 9)


# Forms


def made_up(paths: Sequence[str], r: int = 12, title: str = "Ranks") -> Summary:
    """A finished run of any size, with numbers that are made up."""
    made = torch.Generator().manual_seed(len(paths))
    scores = torch.rand(len(paths), r, generator=made, dtype=torch.float64).pow(9) * 1e-4
    scores[0, 0] = 0.0
    lowest = scores.flatten().sort(descending=True).values[len(paths) * r // 3 - 1]
    pattern = [kept.numpy() for kept in scores >= lowest]
    ranks = [int(kept.sum()) for kept in pattern]
    history = [(0, [r] * len(paths))]
    history += [(step, [max(rank, r - step // 10) for rank in ranks]) for step in range(10, 160, 3)]
    costs = 769 * sum(ranks)
    return Summary(
        title=title,
        paths=list(paths),
        shapes=[(512, 256)] * len(paths),
        initial=[r] * len(paths),
        standing=Standing(pattern, ranks, [200] * len(paths), 199, 1, 0, 51, sum(ranks), sum(ranks), costs, True, True),
        step=199,
        total_step=200,
        tinit=9,
        last_mask=160,
        unit="triplets",
        schedule=[(0, r * len(paths)), (199, sum(ranks))],
        history=[*history, (160, ranks)],
        scores=scores.tolist(),
        scores_step=159,
    )


MODELS = {
    "12, no layers": [f"{a}.{b}" for a in ("encoder", "decoder", "head") for b in ("query", "key", "value", "out")],
    "36": [f"bert.layer.{i}.{m}" for i in range(6) for m in ("query", "key", "value", "attn.out", "inner", "out")],
    "224": [f"model.layers.{i}.{m}_proj" for i in range(32) for m in ("q", "k", "v", "o", "gate", "up", "down")],
    "1": ["score"],
    "names to escape": ["<b>.0.&amp", "<b>.1.&amp", '"><script>alert(1)</script>.0.x', "plain<i>", "$\\frac$"],
}


class Page(HTMLParser):
    """A page, checked to be well formed; texts of cells, and what it refers to."""

    VOID = {"meta", "col", "wbr"}
    # SVG's, which are written as closing themselves.
    SHAPES = {"path", "rect", "line"}

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        assert len(dict(attrs)) == len(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.SHAPES
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", MODELS)
def test_page(name: str):
    summary = made_up(MODELS[name], title=f"{name} <title> & more")
    source = page(summary)
    shown = Page(source)
    assert "script" not in shown.tags
    assert not {"link", "img", "iframe", "object", "embed", "use", "image"} & shown.tags
    assert {key for key, _ in shown.attributes}.isdisjoint({"src", "href", "xlink:href", "onload", "onclick"})
    assert not re.search(r"url\(|@import|https?:", source)
    assert "prefers-color-scheme: dark" in source
    assert summary.title in shown.texts

    # Every adapter with its numbers; and the table of layers and modules.
    rows = {row[0]: row for row in shown.rows if len(row) == 8}
    for k, path in enumerate(summary.paths):
        rank, cost = summary.ranks[k], f"{769 * summary.ranks[k]:,}"
        assert rows[path][:6] == [path, "512", "256", str(rank), "12", cost]
        assert float(rows[path][6]) == pytest.approx(max(summary.scores[k]), rel=5e-3)
    table = summary.table
    begin = next((k for k, row in enumerate(shown.rows) if row[0] == "layer"), None)
    assert (begin is None) == (not table.rows)
    if table.rows:
        assert shown.rows[begin][1:-1] == table.columns
        for row, label, cells in zip(shown.rows[begin + 1 :], table.rows, table.cells, strict=False):
            values = [summary.ranks[k] for k in cells if k is not None]
            assert row == [label, *("" if k is None else str(summary.ranks[k]) for k in cells), str(sum(values))]
    # All numbers of the drawings are inside them.
    for value in re.findall(r' (?:x|y|x1|x2|y1|y2)="([^"]*)"', source):
        assert -1 <= float(value) <= 1001


def test_page_without_history_or_scores():
    summary = made_up(MODELS["36"])
    bare = Summary(**{**vars_of(summary), "history": [], "scores": None, "step": -1})
    shown = Page(page(bare))
    assert "Scores" not in shown.texts
    assert "Before the first of 200 steps" in shown.texts


def vars_of(summary: Summary) -> dict:
    return {name: getattr(summary, name) for name in Summary.__dataclass_fields__}


@pytest.mark.parametrize("name", MODELS)
def test_picture(name: str, tmp_path: Path):
    summary = made_up(MODELS[name], title=f"{name} $title & more")
    figure = picture(summary)
    figure.savefig(tmp_path / "report.png", dpi=20)
    png = (tmp_path / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    inches = figure.get_size_inches()
    assert [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] == [int(20 * inch) for inch in inches]
    ranks, budget, movement, scores = figure.axes
    written = [label.get_text().strip() for label in ranks.texts]
    expected = [str(rank) for rank in summary.ranks] if summary.table.rows else []
    for rank in expected:
        assert rank in written
    (kept,) = (line for line in budget.lines if line.get_label() == "kept")
    assert list(kept.get_ydata()) == [*(sum(ranks) for _, ranks in summary.history), sum(summary.ranks)]
    dots = {
        part.get_label(): len(part.get_offsets())
        for part in scores.collections
        if part.get_label() in ("kept", "masked")
    }
    assert dots == {"kept": sum(summary.ranks), "masked": 12 * len(summary.paths) - sum(summary.ranks)}
    assert len(movement.get_yticks()) > 0


@pytest.mark.parametrize(
    "title", ["word " * 80, "w" * 400, "", "first\nsecond"], ids=["words", "one word", "none", "lines"]
)
def test_a_title_stays_in_the_picture(title: str):
    figure = picture(made_up(MODELS["36"], title=title))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    heading, state = figure.texts
    above, below = heading.get_window_extent(), state.get_window_extent()
    assert 0 <= above.x0 and above.x1 <= width and above.y1 <= height
    assert not title or above.y0 >= below.y1
    assert all(axes.get_tightbbox().y1 <= below.y0 for axes in figure.axes)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_axis_of_ranks_is_beside_the_bars(count: int):
    figure = picture(made_up([f"part{i}" for i in range(count)]))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (first, *_) = sorted(
        (label for label in axes.get_xticklabels() if label.get_text()), key=lambda t: t.get_position()
    )
    bar = axes.patches[0].get_window_extent()
    # No further from the first bar than a bar is high.
    assert 0 <= first.get_window_extent().y0 - bar.y1 <= bar.height


@pytest.mark.parametrize("name", MODELS)
def test_text(name: str):
    summary = made_up(MODELS[name])
    shown = text(summary)
    assert shown.isascii()
    assert shown.endswith("\n") and not shown.endswith("\n\n")
    assert all(line == line.rstrip() for line in shown.splitlines())
    table = summary.table
    for label, cells in zip(table.rows, table.cells, strict=True):
        values = [None if k is None else summary.ranks[k] for k in cells]
        numbers = " +".join("-" if value is None else str(value) for value in values)
        total = sum(value for value in values if value is not None)
        assert re.search(rf"^ *{re.escape(label)} +{numbers} +{total}$", shown, re.MULTILINE)
    for k in table.others:
        assert re.search(rf"^{re.escape(summary.paths[k])} +{summary.ranks[k]} +12$", shown, re.MULTILINE)
    scores = [
        (score, f"{path}[{i}]")
        for path, each in zip(summary.paths, summary.scores, strict=True)
        for i, score in enumerate(each)
    ]
    score, where = max(scores)
    assert re.search(rf"^highest +{re.escape(f'{score:.3g}')}  {re.escape(where)}$", shown, re.MULTILINE)


def test_saved_files(run: Run, tmp_path: Path):
    run.report.save_html(tmp_path / "report.html")
    shown = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "AdaLoRA rank report" in shown.texts
    run.report.save_png(tmp_path / "report.png", dpi=30)
    run.report.save_png(tmp_path / "report.svg")
    assert "<svg" in (tmp_path / "report.svg").read_text(encoding="utf-8")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_scalars(run: Run, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # After every step, and at the end: the same.
    live = Run()
    with SummaryWriter(tmp_path / "live") as writer:
        for step in range(STEPS):
            live.train(step, step + 1).report.add_scalars(writer)
    with SummaryWriter(tmp_path / "end") as writer:
        run.report.add_scalars(writer)
        run.report.add_scalars(writer)
    history = run.report._summary().history
    assert [step for step, _ in history] == [0, *MASKS, LAST_MASK]
    for folder in ("live", "end"):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        read = lambda tag, events=events: [(event.step, event.value) for event in events.Scalars(f"adalora/{tag}")]  # noqa: E731
        assert read("live_triplets") == [(step, sum(ranks)) for step, ranks in history]
        assert read("budget") == [(step, run.allocator.budget(step).budget) for step, _ in history]
        costs = (15, 17, 14)
        assert read("live_parameters") == [
            (step, sum(r * c for r, c in zip(ranks, costs, strict=True))) for step, ranks in history
        ]
        for k, name in enumerate(SETTINGS["target_modules"]):
            assert read(f"rank/{name}") == [(step, ranks[k]) for step, ranks in history]


def test_a_model_with_layers(tmp_path: Path):
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({m: nn.Linear(4, 4) for m in "qk"}) for _ in range(3))}
    )
    adapt(model, AdaLoraConfig(init_r=2, target_r=1, tinit=1, tfinal=1, total_step=4, target_modules="all-linear"))
    report = RankReport(RankAllocator(model), "A & B")
    assert re.search(r"^layer  q  k  sum\n    0  2  2    4\n", report.text(), re.MULTILINE)
