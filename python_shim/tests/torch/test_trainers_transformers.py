"""The callback for transformers' Trainer: beside plain loops, beside PEFT, and each promise by itself."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import SETTINGS, STEPS, accelerated, adapted, bert, examples
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from adalora import InvalidArgumentError, InvalidStateError, UnsupportedError
from adalora.torch import AdamW, RankAllocator, load_adapter
from adalora.torch.transformers import AdaLoraCallback

# PEFT reads what transformers deprecates, and does not know its own rank_pattern when it loads one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers' progress is not wanted."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**options, **changed})


class Recorder(TrainerCallback):
    """Notes where the allocator stands after each step."""

    def __init__(self, callback: AdaLoraCallback) -> None:
        self.callback = callback
        self.patterns: list[dict[str, list[bool]]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.patterns.append(self.callback.allocator.rank_pattern())


def made(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """A trainer whose `batches` will be what it trained on."""
    batches = []

    def collate(features):
        batches.append(default_data_collator(features))
        return batches[-1]

    own = {
        name: options.pop(name) for name in ("optimizers", "compute_loss_func", "compute_metrics") if name in options
    }
    made = Trainer(
        model,
        arguments(folder, **options),
        data_collator=collate,
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=list(callbacks),
        **own,
    )
    # The losses of the parts of a batch are divided by their number.
    made.model_accepts_loss_kwargs = False
    made.batches = batches
    return made


def optimizer_of(kind: str, model: nn.Module) -> tuple[torch.optim.Optimizer, RankAllocator]:
    allocator, params = RankAllocator(model), [p for p in model.parameters() if p.requires_grad]
    if kind == "ours":
        return AdamW(params, allocator, lr=1e-2, weight_decay=0.1), allocator
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1), allocator


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# Beside a plain loop


def own_loss(outputs, labels, num_items_in_batch=None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels) / 2


@pytest.mark.parametrize("kind", ["torch", "ours"])
@pytest.mark.parametrize(("parts", "loss_func"), [(1, None), (3, None), (2, own_loss)])
def test_a_run_is_that_of_a_plain_loop(tmp_path, kind, parts, loss_func):
    model = adapted(total_step=STEPS)
    optimizer, allocator = optimizer_of(kind, model)
    callback = AdaLoraCallback(allocator=allocator)
    trainer = made(
        tmp_path,
        model,
        callback,
        optimizers=(optimizer, None),
        gradient_accumulation_steps=parts,
        compute_loss_func=loss_func,
        max_grad_norm=0.3,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()

    expected = adapted(total_step=STEPS)
    optimizer, allocator = optimizer_of(kind, expected)
    losses, norms, penalties = [], [], []
    data = [batch for batch in trainer.batches if len(batch["labels"]) == 4][: parts * STEPS]
    for step in range(STEPS):
        losses.append(0.0)
        for batch in data[step * parts : (step + 1) * parts]:
            labels = batch["labels"]
            outputs = expected(**batch)
            loss = outputs.loss / parts if loss_func is None else loss_func(outputs, labels)
            loss.backward()
            losses[-1] += loss.item()
        penalties.append(allocator.orthogonality().item())
        norms.append(clip_grad_norm_(expected.parameters(), 0.3).item())
        optimizer.step()
        if kind == "torch":
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
    assert_equal(trained(model), trained(expected))
    assert_equal(callback.allocator.state_dict(), allocator.state_dict())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-6)
    assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-6)
    assert [entry["adalora_penalty"] for entry in logs] == pytest.approx(penalties, rel=1e-6)
    assert min(norms) > 0.3
    standing = callback.allocator.standing()
    assert (standing.last_step, standing.irregular, standing.is_final) == (STEPS - 1, 0, True)


# Beside PEFT


@pytest.mark.parametrize("kind", ["torch", "peft"])
def test_a_run_is_that_of_peft(tmp_path, kind):
    model = adapted(task_type=None, total_step=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            bert(), peft.AdaLoraConfig(**{**SETTINGS, "task_type": None}, total_step=STEPS, inference_mode=False)
        )
    start = {f"base_model.model.{name}": value.clone() for name, value in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(start, strict=False)
    assert not unexpected and all("ranknum" in name for name in missing)
    if kind == "peft":
        model = accelerated(task_type=None)
    callback = AdaLoraCallback()
    recorder = Recorder(callback)
    trainer = made(tmp_path, model, callback, recorder, max_grad_norm=0.3)
    trainer.train()

    params = [p for name, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in name]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(trainer.batches[:STEPS]):
        theirs.base_model(**batch).loss.backward()
        clip_grad_norm_(params, 0.3)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            pattern = {
                name.removeprefix("model.").removesuffix(".lora_E.default"): kept for name, kept in pattern.items()
            }
            assert recorder.patterns[step] == pattern
    assert len({str(pattern) for pattern in recorder.patterns}) > 3
    found = {name.removeprefix("base_model.model."): p for name, p in trained(model).items()}
    for name, p in theirs.named_parameters():
        if p.requires_grad and "ranknum" not in name:
            torch.testing.assert_close(found[name.removeprefix("base_model.model.")], p.detach(), rtol=0, atol=1e-4)


# Several processes


def one_of_two(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    model = adapted().double()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    made(folder, model, AdaLoraCallback(), ddp_backend="gloo", train_sampling_strategy="sequential", **options).train()
    torch.save(trained(model), folder / f"{rank}.pt")


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (tmp_path, port), nprocs=2)
    model = adapted().double()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    made(tmp_path, model, AdaLoraCallback(), train_sampling_strategy="sequential", **options).train()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first, second)
    for name, p in trained(model).items():
        torch.testing.assert_close(first[name], p, rtol=0, atol=1e-12)


# Steps that mixed precision leaves out


@pytest.mark.parametrize("kind", ["torch", "fused", "ours"])
def test_steps_that_mixed_precision_leaves_out(tmp_path, monkeypatch, kind):
    """Accelerate has float16 on accelerators alone: here its parts are put together for the CPU."""
    from accelerate import Accelerator

    def build():
        model = adapted(total_step=STEPS)
        if kind == "fused":
            params = [p for p in model.parameters() if p.requires_grad]
            optimizer, allocator = torch.optim.AdamW(params, lr=1e-2, fused=True), RankAllocator(model)
        else:
            optimizer, allocator = optimizer_of(kind, model)
        # Of the classifier's gradients alone one is not finite.
        calls = []

        def spoil(grad: Tensor) -> Tensor:
            calls.append(0)
            return grad * float("inf") if len(calls) in (1, 5) else grad

        model.classifier.weight.register_hook(spoil)
        return model, optimizer, allocator, torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=3)

    model, optimizer, allocator, scaler = build()
    callback = AdaLoraCallback(allocator=allocator)
    trainer = made(tmp_path, model, callback, optimizers=(optimizer, None), max_grad_norm=0.3)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    monkeypatch.setattr(trainer.accelerator, "native_amp", True)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    trainer.train()

    expected, optimizer, allocator, scaler = build()
    # The first step is left out, before which nobody knows the optimiser.
    allocator.optimizer_steps.watch(optimizer)
    for step, batch in enumerate(trainer.batches[:STEPS]):
        with torch.autocast("cpu"):
            loss = expected(**batch).loss
        scaler.scale(loss.float()).backward()
        allocator.orthogonality(loss_scale=scaler.get_scale())
        scaler.unscale_(optimizer)
        clip_grad_norm_(expected.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        if kind != "ours":
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
    assert scaler.get_scale() == trainer.accelerator.scaler.get_scale() != 512
    assert_equal(trained(model), trained(expected))
    assert_equal(callback.allocator.state_dict(), allocator.state_dict())
    standing = callback.allocator.standing()
    assert (standing.skipped, standing.last_step, standing.is_final) == (2, STEPS - 1, True)


# Going on from checkpoints


@pytest.fixture(scope="module", params=["torch", "ours", "peft"])
def whole(request, tmp_path_factory) -> tuple[Path, Callable[..., Any], Trainer, AdaLoraCallback]:
    """A run with checkpoints after every step. Every third step is the last of an epoch, and has fewer parts."""

    def build(folder: Path, **options: Any) -> tuple[Trainer, AdaLoraCallback]:
        if request.param == "peft":
            model = accelerated(0.1)
        else:
            model = adapted(0.1, total_step=STEPS if request.param == "ours" else None)
        callback = AdaLoraCallback()
        if request.param == "ours":
            options["optimizers"] = (optimizer_of("ours", model)[0], None)
        return made(
            folder, model, callback, gradient_accumulation_steps=5, lr_scheduler_type="cosine", **options
        ), callback

    folder = tmp_path_factory.mktemp(request.param)
    trainer, callback = build(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder, build, trainer, callback


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 8, 11])
def test_a_resumed_run_is_the_same(tmp_path, whole, step):
    folder, build, expected, expected_callback = whole
    resumed, callback = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.global_step == STEPS
    assert_equal(trained(resumed.model), trained(expected.model))
    assert_equal(callback.allocator.state_dict(), expected_callback.allocator.state_dict())
    states = [
        {
            f"{k}.{name}": value
            for k, state in each.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        for each in (resumed, expected)
    ]
    assert_equal(*states)


def test_a_run_that_is_over_stays_over(tmp_path, whole):
    folder, build, expected, expected_callback = whole
    resumed, callback = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    assert_equal(trained(resumed.model), trained(expected.model))
    assert callback.allocator.rank_pattern() == expected_callback.allocator.rank_pattern()


# What the callback says


def test_total_step_is_the_trainers(tmp_path):
    model = adapted()
    callback = AdaLoraCallback()
    # Three epochs of twelve batches in fours.
    trainer = made(tmp_path, model, callback, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert model.adalora_config["default"].total_step == 9 == trainer.state.global_step
    assert callback.allocator.standing().is_final

    with pytest.raises(InvalidArgumentError, match=r"total_step: expected the trainer's .* 9, or None, found 12"):
        made(tmp_path, adapted(total_step=12), AdaLoraCallback(), max_steps=9).train()
    model = adapted(tinit=8)
    with pytest.raises(InvalidArgumentError, match=r"tinit: expected less than total_step - tfinal, 8, found 8"):
        made(tmp_path, model, AdaLoraCallback()).train()
    assert model.adalora_config["default"].total_step is None


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(
        InvalidArgumentError, match=r"model: expected one module with the trained adapter 'default'.*found 0"
    ):
        made(tmp_path, bert(), AdaLoraCallback()).train()
    with pytest.raises(InvalidArgumentError, match="the trained adapter 'other'"):
        made(tmp_path, adapted(), AdaLoraCallback("other")).train()
    model = adapted(total_step=STEPS)
    optimizer = torch.optim.SGD(model.classifier.parameters())
    with pytest.raises(InvalidArgumentError, match="has the parameters of the adapter 'default', found SGD"):
        made(tmp_path, model, AdaLoraCallback(), optimizers=(optimizer, None)).train()
    optimizer, _ = optimizer_of("ours", model)
    with pytest.raises(InvalidArgumentError, match="allocator: expected that of the trainer's model"):
        made(tmp_path, model, AdaLoraCallback(allocator=RankAllocator(model)), optimizers=(optimizer, None)).train()
    other = RankAllocator(adapted(total_step=STEPS))
    with pytest.raises(InvalidArgumentError, match="allocator: expected that of the trainer's model"):
        made(tmp_path, model, AdaLoraCallback(allocator=other)).train()
    trainer = made(tmp_path, model, AdaLoraCallback())
    trainer.args.fsdp = "full_shard"
    with pytest.raises(UnsupportedError, match="neither deepspeed nor fsdp"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_a_checkpoint_without_state_is_refused(tmp_path, kind):
    def build(*callbacks):
        model = adapted(total_step=STEPS)
        optimizer = optimizer_of("ours" if kind == "ours" and callbacks else "torch", model)[0]
        return made(tmp_path, model, *callbacks, optimizers=(optimizer, None), save_strategy="steps", save_steps=5)

    build().train()
    with pytest.raises(InvalidStateError, match="the allocator's state after step 4, found none"):
        build(AdaLoraCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.filterwarnings("error:.*one call of update_and_allocate")
def test_a_second_trainer_takes_over(tmp_path):
    model = adapted(total_step=STEPS)
    callbacks = AdaLoraCallback(), AdaLoraCallback()
    for callback in callbacks:
        made(tmp_path, model, callback).train()
        assert callback.allocator.standing().last_step == STEPS - 1


def test_steps_of_others_are_noticed(tmp_path):
    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 4:
                kwargs["optimizer"].optimizer.step()

    model = adapted(total_step=STEPS)
    optimizer, _ = optimizer_of("ours", model)
    with pytest.raises(InvalidStateError, match="expected 5 after the trainer's step 4, found 6"):
        made(tmp_path, model, AdaLoraCallback(), Other(), optimizers=(optimizer, None)).train()
    optimizer, _ = optimizer_of("torch", model)
    with pytest.warns(UserWarning, match="found 2 steps of AdamW and no call"):
        made(tmp_path, model, AdaLoraCallback(), Other(), optimizers=(optimizer, None)).train()


def test_a_loss_from_elsewhere_is_refused(tmp_path):
    model = adapted()

    class Elsewhere(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model.bert(inputs["input_ids"]).pooler_output.square().mean()

    trainer = Elsewhere(model, arguments(tmp_path), train_dataset=examples(), callbacks=[AdaLoraCallback()])
    with pytest.raises(InvalidStateError, match="a backward pass from what the model returned"):
        trainer.train()


def test_evaluation_has_no_penalty(tmp_path):
    model = adapted()
    trainer = made(tmp_path, model, AdaLoraCallback(), eval_strategy="steps", eval_steps=4)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 3
    with torch.no_grad():
        expected = model.eval()(**default_data_collator(examples(8))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert found[-1] == pytest.approx(expected, rel=1e-6)


def test_logs(tmp_path):
    seen = {"before": [], "after": []}

    class Reader(TrainerCallback):
        def __init__(self, place: str) -> None:
            self.place = place

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            seen[self.place].append(dict(logs))

    callback = AdaLoraCallback()
    recorder = Recorder(callback)
    trainer = made(tmp_path, adapted(), Reader("before"), callback, Reader("after"), recorder)
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(callback))
    trainer.train()
    ranks = [sum(map(sum, pattern.values())) for pattern in recorder.patterns]
    budgets = [callback.allocator.budget(step).budget for step in range(STEPS)]
    assert ranks[0] == 24 and ranks[-1] == 12
    for logs in (*seen.values(), trainer.state.log_history):
        logs = [entry for entry in logs if "loss" in entry]
        assert [entry["adalora_ranks"] for entry in logs] == ranks
        assert [entry["adalora_budget"] for entry in logs] == budgets
    assert "adalora_ranks" not in trainer.state.log_history[-1]


def test_without_a_final_phase_the_last_step_masks(tmp_path):
    # With masks at steps 0, 7 and 14, which does not come.
    model = adapted(tfinal=0, deltaT=7)
    callback = AdaLoraCallback()
    recorder = Recorder(callback)
    made(tmp_path, model, callback, recorder, save_strategy="steps", save_steps=STEPS).train()
    ranks = [sum(map(sum, pattern.values())) for pattern in recorder.patterns]
    assert ranks[-2] > ranks[-1] == 12
    restored = load_adapter(bert(), tmp_path / f"checkpoint-{STEPS}")
    kept = {path: layer.lora_E["default"].flatten() != 0 for path, layer in callback.allocator.layers.items()}
    assert sum(int(each.sum()) for each in kept.values()) == 12
    assert_equal(
        {n: p for n, p in restored.named_parameters() if "lora" in n},
        {n: p.detach() for n, p in model.named_parameters() if "lora" in n},
    )


def test_a_run_that_ends_early_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == 5

    model = adapted()
    trainer = made(tmp_path, model, AdaLoraCallback(), Stop())
    with pytest.warns(UserWarning, match="expected the last mask at step 8, found a run that ended at step 4, with 14"):
        trainer.train()
    # Another run begins anew.
    trainer.pop_callback(Stop)
    callback = trainer.pop_callback(AdaLoraCallback)
    trainer.add_callback(callback)
    trainer.train()
    standing = callback.allocator.standing()
    assert (standing.last_step, standing.irregular, standing.is_final) == (STEPS - 1, 0, True)


@pytest.mark.parametrize("kind", ["torch", "ours", "peft"])
@pytest.mark.parametrize("best", [4, 10, 12])
def test_the_best_model_has_its_ranks(tmp_path, kind, best):
    evaluations = []

    def compute_metrics(_) -> dict[str, float]:
        evaluations.append(0)
        return {"goodness": float(2 * len(evaluations) == best)}

    model = accelerated() if kind == "peft" else adapted(total_step=STEPS)
    callback = AdaLoraCallback()
    recorder = Recorder(callback)
    trainer = made(
        tmp_path,
        model,
        callback,
        recorder,
        optimizers=(optimizer_of("ours", model)[0] if kind == "ours" else None, None),
        compute_metrics=compute_metrics,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="goodness",
    )
    if best == 4:
        with pytest.warns(UserWarning, match="found the best model at step 3, with 19 triplets"):
            trainer.train()
    else:
        trainer.train()
    assert callback.allocator.rank_pattern() == recorder.patterns[best - 1]
    folder, batch = tmp_path / f"checkpoint-{best}", default_data_collator(examples(8))
    del batch["labels"]
    restored = peft.PeftModel.from_pretrained(bert(), folder) if kind == "peft" else load_adapter(bert(), folder)
    torch.testing.assert_close(model.eval()(**batch).logits, restored.eval()(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(tmp_path, use_reentrant):
    models = [adapted(), adapted()]
    made(tmp_path, models[0], AdaLoraCallback()).train()
    trainer = made(
        tmp_path,
        models[1],
        AdaLoraCallback(),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    trainer.train()
    assert trainer.state.log_history[-2]["adalora_penalty"] > 0
    for name, p in trained(models[1]).items():
        torch.testing.assert_close(p, trained(models[0])[name], rtol=0, atol=1e-6)


def test_peft_models_are_left_as_they_were(tmp_path):
    model = accelerated()
    batch = default_data_collator(examples(8))
    made(tmp_path, model, AdaLoraCallback(), save_strategy="steps", save_steps=STEPS).train()
    # The penalty is in losses again.
    loss = model.train()(**batch).loss.item()
    penalty = model.base_model.orthogonality_loss().item()
    assert model.eval()(**batch).loss.item() == pytest.approx(loss - penalty, rel=1e-4)
    # What is saved now is without masked triplets, and the same.
    model.save_pretrained(tmp_path)
    cut = peft.PeftModel.from_pretrained(bert(), tmp_path)
    ranks = {path: p.shape[0] for path, p in cut.named_parameters() if "lora_E" in path}
    assert sum(ranks.values()) == 12
    del batch["labels"]
    torch.testing.assert_close(cut.eval()(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


def test_peft_models_that_cannot_be_trained_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(bert(), peft.AdaLoraConfig(**SETTINGS, total_step=STEPS))
    with pytest.raises(InvalidArgumentError, match=r"found PEFT's own: call adalora.peft.accelerate\(model\) first"):
        made(tmp_path, theirs, AdaLoraCallback()).train()
    with pytest.raises(InvalidArgumentError, match=r"total_step: expected the trainer's number .* steps, 9, found 12"):
        made(tmp_path, accelerated(), AdaLoraCallback(), max_steps=9).train()
    model = accelerated()
    optimizer, _ = optimizer_of("ours", other := adapted(total_step=STEPS))
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    with pytest.raises(UnsupportedError, match=r"another one than adalora\.torch\.AdamW for a PEFT model"):
        made(tmp_path, model, AdaLoraCallback(), optimizers=(optimizer, None)).train()
    with pytest.raises(InvalidArgumentError, match="allocator: expected that of the trainer's model"):
        made(tmp_path, model, AdaLoraCallback(allocator=RankAllocator(other))).train()
