"""The callback for Lightning: beside plain loops, under both names of the package, and each promise by itself."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import SETTINGS, STEPS, accelerated, adapted, bert, examples
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from adalora import InvalidArgumentError, InvalidStateError, UnsupportedError
from adalora.torch import AdamW, RankAllocator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch

    from adalora.torch.lightning import AdaLoraCallback, RankReportCallback

# What Lightning advises, and what it still does that PyTorch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

NAMES = ["lightning.pytorch", "pytorch_lightning"]


def module(model: nn.Module, kind: str = "torch", package: ModuleType = lightning.pytorch, **changed: Any) -> Any:
    """The classifier as a LightningModule."""

    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, batch, batch_idx):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self):
            params = [p for p in self.parameters() if p.requires_grad]
            if kind == "ours":
                return AdamW(params, RankAllocator(model), lr=1e-2, weight_decay=0.1)
            return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=kind == "fused")

    made = Classifier()
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def trainer(folder: Path, *callbacks: Any, package: ModuleType = lightning.pytorch, **changed: Any) -> Any:
    options = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
    }
    return package.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**options, **changed})


def batches() -> DataLoader:
    """Twelve of four sentences."""
    return DataLoader(examples(), batch_size=4)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("package", NAMES)
@pytest.mark.parametrize("kind", ["torch", "ours"])
@pytest.mark.parametrize("parts", [1, 5])
def test_a_run_is_that_of_a_plain_loop(tmp_path, package, kind, parts):
    package = importlib.import_module(package)
    model = adapted(total_step=STEPS)
    lit, callback = module(model, kind, package), AdaLoraCallback()
    made = trainer(
        tmp_path,
        callback,
        package=package,
        gradient_clip_val=0.3,
        accumulate_grad_batches=parts,
        limit_val_batches=2,
        check_val_every_n_epoch=1,
    )
    made.fit(lit, batches(), batches())
    assert made.global_step == STEPS

    expected = adapted(total_step=STEPS)
    params, allocator = [p for p in expected.parameters() if p.requires_grad], RankAllocator(expected)
    if kind == "ours":
        optimizer = AdamW(params, allocator, lr=1e-2, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    losses, data, step = [], list(batches()), 0
    while step < STEPS:
        for k, batch in enumerate(data):
            loss = expected(**batch).loss
            (loss / parts).backward()
            losses.append(loss.item())
            # The last part of an epoch ends a step, however few there are.
            if (k + 1) % parts == 0 or k == len(data) - 1:
                penalty = allocator.orthogonality().item()
                clip_grad_norm_(params, 0.3)
                optimizer.step()
                if kind == "torch":
                    allocator.update_and_allocate(step)
                optimizer.zero_grad()
                step += 1
    assert lit.losses == losses
    assert_equal(trained(model), trained(expected))
    assert_equal(callback.allocator.state_dict(), allocator.state_dict())
    standing = callback.allocator.standing()
    assert (standing.last_step, standing.irregular, standing.is_final) == (STEPS - 1, 0, True)
    found = {name: value.item() for name, value in made.callback_metrics.items() if name.startswith("adalora")}
    assert found == pytest.approx({"adalora_budget": 12, "adalora_ranks": 12, "adalora_penalty": penalty})
    with torch.no_grad():
        expected = sum(model.eval()(**batch).loss.item() for batch in data[:2]) / 2
    assert made.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["torch", "fused", "ours"])
def test_steps_that_mixed_precision_leaves_out(tmp_path, kind):
    from lightning.pytorch.plugins.precision import MixedPrecision

    def build():
        model, calls = adapted(total_step=STEPS), []

        def spoil(grad: Tensor) -> Tensor:
            calls.append(0)
            return grad * float("inf") if len(calls) in (1, 5) else grad

        # Of the classifier's gradients alone one is not finite.
        model.classifier.weight.register_hook(spoil)
        return module(model, kind), torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=3)

    lit, scaler = build()
    callback = AdaLoraCallback()
    clip = 0.3 if kind == "torch" else None
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    made = trainer(tmp_path, callback, plugins=[plugin], gradient_clip_val=clip)
    made.fit(lit, batches())

    expected, scaler = build()
    optimizer = expected.configure_optimizers()
    allocator = optimizer.allocator if kind == "ours" else RankAllocator(expected.model)
    allocator.optimizer_steps.watch(optimizer)
    for step, batch in enumerate(batches()):
        with torch.autocast("cpu", torch.float16):
            loss = expected.model(**batch).loss
        scaler.scale(loss).backward()
        allocator.orthogonality(loss_scale=scaler.get_scale())
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_(expected.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if kind != "ours":
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
    for name, value in trained(lit.model).items():
        # Lightning divides by the scale before the penalty comes, where the optimiser does not.
        torch.testing.assert_close(value, trained(expected.model)[name], rtol=1e-4, atol=1e-5)
    assert callback.allocator.rank_pattern() == allocator.rank_pattern()
    standing = callback.allocator.standing()
    assert (standing.skipped, standing.last_step, standing.is_final) == (2, STEPS - 1, True)


@pytest.mark.parametrize("kind", ["torch", "ours", "peft"])
@pytest.mark.parametrize("parts", [3, 5])
def test_resumed_runs_are_the_same(tmp_path, kind, parts):
    # Lightning goes on at the beginning of the data: a step for each epoch, or batches that are all the same, twelve of
    # them, so that the last step of an epoch has two alone.
    data = examples(12) if parts == 3 else examples(4) * 12

    def run(*callbacks, **options):
        model = accelerated() if kind == "peft" else adapted(total_step=STEPS if kind == "ours" else None)
        lit, callback = module(model, kind), AdaLoraCallback()
        checkpoint = options.pop("ckpt_path", None)
        made = trainer(tmp_path, callback, *callbacks, accumulate_grad_batches=parts, **options)
        made.fit(lit, DataLoader(data, batch_size=4), ckpt_path=checkpoint)
        assert made.global_step == STEPS
        return trained(model), callback.allocator.state_dict()

    save = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    params, state = run(save, enable_checkpointing=True)
    for step in (1, 2, 3, 5, 6, 8, 11):
        found, found_state = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_equal(found, params)
        assert_equal(found_state, state)


def test_peft_models_train_as_others(tmp_path):
    models, callbacks = [accelerated(task_type=None), adapted(task_type=None)], [AdaLoraCallback(), AdaLoraCallback()]
    for model, callback in zip(models, callbacks, strict=True):
        trainer(tmp_path, callback, accumulate_grad_batches=2, gradient_clip_val=0.3).fit(module(model), batches())
    assert callbacks[0].allocator.rank_pattern() == callbacks[1].allocator.rank_pattern()
    found = {name.removeprefix("base_model.model."): p for name, p in trained(models[0]).items()}
    expected = trained(models[1])
    assert found.keys() == expected.keys()
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-5)


def test_total_step_is_the_trainers(tmp_path):
    model = adapted()
    # Three epochs of twelve batches, in fives.
    callback = AdaLoraCallback()
    made = trainer(tmp_path, callback, max_steps=-1, max_epochs=3, accumulate_grad_batches=5)
    made.fit(module(model), batches())
    assert model.adalora_config["default"].total_step == 9 == made.global_step
    assert callback.allocator.standing().is_final
    with pytest.raises(InvalidArgumentError, match=r"total_step: expected the trainer's .* 9, or None, found 12"):
        trainer(tmp_path, AdaLoraCallback(), max_steps=9).fit(module(adapted(total_step=12)), batches())
    with pytest.raises(InvalidArgumentError, match="total_step: expected the number of steps, since the trainer"):
        trainer(tmp_path, AdaLoraCallback(), max_steps=-1, max_epochs=-1).fit(module(adapted()), batches())


def test_a_run_that_ends_early_says_so(tmp_path):
    class Stop(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            trainer.should_stop = trainer.global_step == 5

    callback = AdaLoraCallback()
    made = trainer(tmp_path, callback, Stop(), min_steps=1, min_epochs=0)
    lit = module(adapted())
    with pytest.warns(UserWarning, match="expected the last mask at step 8, found a run that ended at step 4, with 14"):
        made.fit(lit, batches())
    # It goes on where it was.
    made.callbacks = [each for each in made.callbacks if not isinstance(each, Stop)]
    made.fit(lit, batches())
    standing = callback.allocator.standing()
    assert (standing.last_step, standing.irregular, standing.is_final) == (STEPS - 1, 0, True)


def test_batches_without_a_loss(tmp_path):
    model = adapted(total_step=STEPS)
    lit, callback = module(model), AdaLoraCallback()
    step = lit.training_step
    lit.training_step = lambda batch, batch_idx: None if batch_idx in (2, 8) else step(batch, batch_idx)
    made = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        made.fit(lit, batches())
    standing = callback.allocator.standing()
    assert (standing.last_step, standing.irregular, standing.is_final) == (STEPS - 1, 0, True)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(
        InvalidArgumentError, match=r"model: expected one module with the trained adapter 'default'.*found 0"
    ):
        trainer(tmp_path, AdaLoraCallback()).fit(module(bert()), batches())
    with pytest.raises(UnsupportedError, match="automatic_optimization: expected True, found False"):
        trainer(tmp_path, AdaLoraCallback()).fit(module(adapted(), automatic_optimization=False), batches())
    made = trainer(tmp_path)
    made.fit(module(adapted()), batches())
    made.save_checkpoint(tmp_path / "saved.ckpt")
    model = adapted(total_step=15)
    with pytest.raises(InvalidStateError, match="the allocator's state after step 11, found none"):
        trainer(tmp_path, AdaLoraCallback(), max_steps=15).fit(
            module(model), batches(), ckpt_path=tmp_path / "saved.ckpt"
        )


@pytest.mark.parametrize("package", NAMES)
@pytest.mark.parametrize("kind", ["torch", "ours", "peft", "peft, by itself"])
def test_a_report_of_a_run_and_of_resumed_ones(tmp_path, package, kind):
    package, last_mask = importlib.import_module(package), STEPS - SETTINGS["tfinal"]

    def run(folder: Path, *callbacks, **options):
        model = accelerated() if kind.startswith("peft") else adapted(total_step=STEPS if kind == "ours" else None)
        callback = AdaLoraCallback()
        reporting = RankReportCallback(None if kind == "peft, by itself" else callback, "Run")
        checkpoint = options.pop("ckpt_path", None)
        made = trainer(folder, callback, reporting, *callbacks, package=package, accumulate_grad_batches=2, **options)
        # Lightning goes on at the beginning of the data: batches that are all the same.
        data = DataLoader(examples(4) * 24, batch_size=4)
        made.fit(module(model, kind, package), data, ckpt_path=checkpoint)
        assert made.global_step == STEPS
        return reporting.report, (folder / "rank_report.html").read_bytes()

    save = package.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    report, page = run(tmp_path / "whole", save, enable_checkpointing=True)
    summary = report._summary()
    assert [step for step, _ in summary.history] == [0, 2, 4, 6, last_mask]
    assert sum(summary.ranks) == 2 * len(summary.paths) and summary.scores_step == last_mask - 1
    assert b"<h1>Run</h1>" in page
    for step in (1, 5, last_mask, last_mask + 1):
        _, resumed = run(tmp_path / f"from {step}", ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed == page, step


def test_a_report_lies_where_the_logger_writes(tmp_path):
    callback = AdaLoraCallback()
    reporting = RankReportCallback(callback)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path / "logs", "name", version=3)
    made = trainer(tmp_path, callback, reporting, logger=logger)
    lit = module(adapted())
    made.fit(lit, batches())
    assert (tmp_path / "logs" / "name" / "version_3" / "rank_report.html").exists()
    first = reporting.report
    # Another run of the model begins anew.
    made = trainer(tmp_path, callback, reporting)
    made.fit(lit, batches())
    assert reporting.report is not first and len(reporting.report._summary().history) == 5


def test_a_report_of_nobodys_run(tmp_path):
    with pytest.raises(InvalidStateError, match="callback: expected one that is among the trainer's callbacks"):
        trainer(tmp_path, RankReportCallback(AdaLoraCallback())).fit(module(adapted(total_step=STEPS)), batches())
