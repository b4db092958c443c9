"""Training a PEFT model that is accelerated: beside PEFT step by step, and what PEFT does not get right."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from pairs import SETTINGS, STEPS, Network, accelerated, batches, layers, masks, pair, peft_model, step, trained
from peft.tuners import adalora as theirs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import adalora.peft
from adalora import InvalidArgumentError, InvalidStateError
from adalora.torch import load_training_state, save_training_state

CLOSE = {"rtol": 0, "atol": 1e-4}
OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=3e-3, momentum=0.5),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](trained(model).values())


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    """The same bits."""
    for (name, p), (same, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(p, q), name


def assert_near(model: nn.Module, other: nn.Module, **close) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **(close or CLOSE))


# Beside PEFT


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, CLOSE), (torch.float64, {"rtol": 0, "atol": 1e-12})],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_whole_run_is_pefts(kind, dtype, close):
    theirs_, ours = pair(dtype=dtype)
    optimizers = [OPTIMIZERS[kind](trained(model).values()) for model in (theirs_, ours)]
    patterns = []
    for number, batch in enumerate(batches(dtype=dtype)):
        losses = [step(m, o, number, batch) for m, o in zip((theirs_, ours), optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=close["atol"], atol=0)
        assert masks(ours) == masks(theirs_)
        assert_near(ours, theirs_, **close)
        found, expected = (m.peft_config["default"].rank_pattern for m in (ours, theirs_))
        assert found == expected
        if found not in patterns:
            patterns.append(found)
        budgets = [m.base_model.rankallocator.budget_schedule(number) for m in (theirs_, ours)]
        assert budgets[0] == budgets[1]
    assert len(patterns) > 3
    standing = ours.base_model.rankallocator.standing()
    assert (standing.live_triplets, standing.is_final, standing.irregular) == (8, True, 0)


def test_averages_are_pefts():
    theirs_, ours = pair()
    optimizers = [adamw(model) for model in (theirs_, ours)]
    for number, batch in enumerate(batches(8)):
        for model, optimizer in zip((theirs_, ours), optimizers, strict=True):
            step(model, optimizer, number, batch)
    for average in ("exp_avg_ipt", "exp_avg_unc"):
        found, expected = (getattr(m.base_model.rankallocator, average) for m in (ours, theirs_))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-8)
    allocators = [m.base_model.rankallocator for m in (ours, theirs_)]
    for name in ("init_bgt", "target_bgt"):
        assert getattr(allocators[0], name) == getattr(allocators[1], name)


@pytest.mark.parametrize("at", [3, 9, 16, 27])
def test_a_run_is_accelerated_under_way(at):
    model = peft_model(dtype=torch.float64)
    optimizer = adamw(model)
    for number, batch in enumerate(batches(dtype=torch.float64)):
        if number == at:
            ours = copy.deepcopy(model)
            theirs_optimizer, optimizer = optimizer, adamw(ours)
            optimizer.load_state_dict(copy.deepcopy(theirs_optimizer.state_dict()))
            adalora.peft.accelerate(ours)
        if number >= at:
            step(ours, optimizer, number, batch)
            step(model, theirs_optimizer, number, batch)
            assert masks(ours) == masks(model)
            assert_near(ours, model, rtol=0, atol=1e-12)
        else:
            step(model, optimizer, number, batch)


def test_pefts_methods_one_by_one():
    theirs_, ours = pair()
    for model in (theirs_, ours):
        for batch in batches(2):
            model.zero_grad()
            model.base_model(*batch).loss.backward()
            model.base_model.rankallocator.update_ipt(model.base_model.model)
    patterns = [m.base_model.rankallocator.mask_to_budget(m.base_model.model, 9) for m in (theirs_, ours)]
    assert patterns[0] == patterns[1]
    assert masks(ours) == masks(theirs_)
    assert sum(map(sum, patterns[1].values())) == 9
    # Names without the adapter's, as saving leaves them.
    pattern = {name.removesuffix(".default"): [True, False, True, False] for name in patterns[0]}
    for model in (theirs_, ours):
        nn.init.ones_(layers(model)["base_model.model.fc1"].lora_E["default"])
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
        assert masks(model)["base_model.model.fc1"] == [False, True, False, True]
    ours.base_model.rankallocator.reset_ipt()
    assert not any(value.any() for value in ours.base_model.rankallocator.exp_avg_ipt.values())
    ours.base_model.rankallocator.set_total_step(50)
    assert ours.base_model.rankallocator.budget_schedule(30) == (theirs_budget(50, 30), True)
    with pytest.raises(InvalidArgumentError, match=re.escape("budget: expected 0 to 16")):
        ours.base_model.rankallocator.mask_to_budget(ours.base_model.model, 17)


def theirs_budget(total: int, number: int) -> int:
    left = 1 - (number - SETTINGS["tinit"]) / (total - SETTINGS["tfinal"] - SETTINGS["tinit"])
    return int((16 - 8) * left**3 + 8)


# The penalty


def penalty_of(model: nn.Module, weight: float) -> Tensor:
    """PEFT's formula."""
    terms = []
    for layer in layers(model).values():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        terms += [(A @ A.T - torch.eye(len(A))).norm(), (B.T @ B - torch.eye(len(A))).norm()]
    return weight * torch.stack(terms).mean()


def test_the_penalty_is_in_the_loss_in_training_alone():
    theirs_, ours = pair()
    (batch,) = batches(1)
    bare = ours(*batch).loss
    with_penalty = ours.base_model(*batch).loss
    torch.testing.assert_close(with_penalty, theirs_.base_model(*batch).loss)
    torch.testing.assert_close(with_penalty - bare, penalty_of(ours, 0.3))
    torch.testing.assert_close(ours.base_model.orthogonality_loss(2.0), penalty_of(ours, 2.0))
    ours.eval()
    assert torch.equal(ours.base_model(*batch).loss, bare)
    ours.train()
    ours.peft_config["default"].orth_reg_weight = 0.0
    assert torch.equal(ours.base_model(*batch).loss, bare)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_has_one_graph_with_the_penalty():
    model = accelerated(peft_model())
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    # Before anything native is made.
    compiled = torch.compile(model.base_model, backend=counter, fullgraph=True)
    optimizers = adamw(model), adamw(eager)
    for number, batch in enumerate(batches()):
        loss = compiled(*batch).loss
        loss.backward()
        optimizers[0].step()
        model.base_model.update_and_allocate(number)
        optimizers[0].zero_grad()
        torch.testing.assert_close(loss.detach(), step(eager, optimizers[1], number, batch), rtol=1e-4, atol=1e-5)
        assert masks(model) == masks(eager)
    assert counter.frame_count == 1
    loss, task = compiled(*batch).loss, eager.eval().base_model(*batch).loss
    torch.testing.assert_close(loss - task, eager.base_model.orthogonality_loss(), rtol=1e-4, atol=1e-4)


def test_a_penalty_that_is_not_in_the_loss_is_reported_once():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    (batch,) = batches(1)
    with pytest.warns(UserWarning, match="orth_reg_weight: expected the penalty in the loss, since the weight is 0.3"):
        for number in range(2):
            # The outer model does not call base_model.
            model(*batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
    model = accelerated(peft_model())
    optimizer = adamw(model)
    (model(*batch).loss + model.base_model.orthogonality_loss()).backward()
    optimizer.step()
    model.base_model.update_and_allocate(0)


def test_an_adapter_that_is_not_trained_has_no_penalty_and_no_allocator():
    model = accelerated(peft_model(inference_mode=True))
    (batch,) = batches(1)
    assert torch.equal(model.base_model(*batch).loss, model(*batch).loss)
    with pytest.raises(InvalidStateError, match="expected an adapter that is trained"):
        model.base_model.update_and_allocate(0)


# What PEFT does not get right


def test_equal_scores_keep_exactly_the_budget():
    model = accelerated(peft_model())
    params = [p for name, p in model.named_parameters() if "lora_" in name]
    for number in range(STEPS):
        for p in params:
            p.grad = torch.zeros_like(p)
        model.base_model._penalty_was_taken = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.base_model.update_and_allocate(number)
        budget, masks_now = model.base_model.rankallocator.budget_schedule(number)
        if masks_now:
            assert sum(kept.count(False) for kept in masks(model).values()) == budget
    assert budget == 8


def test_a_target_equal_to_the_initial_rank_masks_nothing():
    model = accelerated(peft_model(target_r=4))
    optimizer = adamw(model)
    for number, batch in enumerate(batches()):
        step(model, optimizer, number, batch)
    assert not any(any(flags) for flags in masks(model).values())


def test_a_gradient_that_is_not_finite_changes_no_importance():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    for number, batch in enumerate(batches(3)):
        step(model, optimizer, number, batch)
    before = {name: value.clone() for name, value in model.base_model.rankallocator.exp_avg_unc.items()}
    (batch,) = batches(1)
    model.base_model(*batch).loss.backward()
    layers(model)["base_model.model.fc1"].lora_A["default"].grad[0, 0] = torch.inf
    model.base_model.update_and_allocate(3)
    assert model.base_model.rankallocator.standing().skipped == 1
    for name, value in model.base_model.rankallocator.exp_avg_unc.items():
        assert torch.equal(value, before[name])


def test_a_layer_without_gradients_takes_no_part():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    for number, batch in enumerate(batches(6)):
        # The penalty reaches all layers.
        model.base_model._penalty_was_taken = True
        model(*batch, skip=True).loss.backward()
        assert layers(model)["base_model.model.fc2"].lora_A["default"].grad is None
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    averages = model.base_model.rankallocator.exp_avg_ipt
    assert not averages["fc2.lora_A.default"].any()
    assert averages["fc1.lora_A.default"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_have_scores(dtype):
    model = accelerated(peft_model(dtype=dtype, autocast_adapter_dtype=False))
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    for number, batch in enumerate(batches(dtype=dtype)):
        step(model, optimizer, number, batch)
    assert sum(kept.count(False) for kept in masks(model).values()) == 8
    averages = model.base_model.rankallocator.exp_avg_ipt
    assert all(value.dtype == torch.float32 for value in averages.values())


def test_a_stride_over_the_boundary_takes_the_last_mask():
    model = accelerated(peft_model(tfinal=7, deltaT=4))
    optimizer = adamw(model)
    for number, batch in zip((*range(20), *range(25, 30)), batches(), strict=False):
        step(model, optimizer, number, batch)
        assert model.base_model.rankallocator.standing().is_final == (number >= 25)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 8


def test_a_run_that_ends_early_takes_the_last_mask_on_demand(tmp_path):
    model = accelerated(peft_model(tfinal=0))
    optimizer = adamw(model)
    data = list(batches(12))
    for number, batch in enumerate(data):
        step(model, optimizer, number, batch)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) > 8
    pattern = model.base_model.rankallocator.finalize()
    fresh = accelerated(peft_model())
    fresh.base_model.rankallocator.finalize()
    step(fresh, adamw(fresh), 27, data[0])
    assert pattern == model.peft_config["default"].rank_pattern
    assert sum(kept.count(False) for kept in masks(model).values()) == 8
    expected = model(*data[0]).logits
    save(model, tmp_path)
    saved = model.peft_config["default"].rank_pattern
    assert {f"{name}.default": kept for name, kept in saved.items()} == pattern
    other = loaded(tmp_path)
    torch.testing.assert_close(other(*data[0]).logits, expected)
    assert sum(layer.lora_E["default"].shape[0] for layer in layers(other).values()) == 8


def test_steps_that_go_back_are_reported():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    for number, batch in enumerate(batches(4)):
        step(model, optimizer, number, batch)
    (batch,) = batches(1)
    with pytest.warns(UserWarning, match="expected a step after 3, found 2"):
        step(model, optimizer, 2, batch)
    model.base_model.rankallocator.reset()
    step(model, optimizer, 0, batch)
    assert model.base_model.rankallocator.standing().last_step == 0


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("followed", [[], [0, 1, 3]])
def test_steps_without_a_call_are_reported(weight, followed):
    # A copy, whose own allocator it is that does not follow.
    model = copy.deepcopy(accelerated(peft_model(orth_reg_weight=weight)))
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match="found 2 steps of AdamW and no call") as caught:
        for number, batch in enumerate(batches(5)):
            model.base_model(*batch).loss.backward()
            optimizer.step()
            if number in followed:
                model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
            assert len(caught) == (number >= (3 if followed else 1))
            if len(caught):
                break


WRONG = {
    "target_r": [5, -1, 1.5],
    "init_r": [2.5, -3],
    "deltaT": [0, -2, 0.5],
    "tinit": [-1, 0.5],
    "tfinal": [-1],
    "beta1": [0.0, 1.0, 2],
    "beta2": [0.0, 1.0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_schedules_are_refused_at_creation(name, value):
    config = peft.AdaLoraConfig(**{**SETTINGS, name: value})
    # PEFT names the lower bound of init_r by the upper one of target_r.
    base = Network()
    adalora.peft.install()
    try:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, found "):
            peft.get_peft_model(base, config)
    finally:
        adalora.peft.uninstall()
    assert type(base.fc1) is nn.Linear


def test_wrong_schedules_are_refused_when_accelerating():
    model = peft_model()
    model.peft_config["default"].deltaT = 0
    with pytest.raises(InvalidArgumentError, match=r"deltaT: expected an integer, 1 or more, found 0"):
        adalora.peft.accelerate(model)
    assert type(model.base_model) is theirs.AdaLoraModel


# Compaction


def loaded(folder: Path, *, trainable: bool = False, fast: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.PeftModel.from_pretrained(Network(), folder, is_trainable=trainable)
    layers(model)["base_model.model.fc1"].fan_in_fan_out = False
    layers(model)["base_model.model.fc3"].fan_in_fan_out = False
    return adalora.peft.accelerate(model) if fast else model


def save(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        # PEFT warns of the tensors of a layer without triplets.
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


@pytest.mark.parametrize("alpha", [0, 8])
@pytest.mark.parametrize("at", [27, STEPS, 33])
def test_a_compacted_run_shrinks_and_goes_on_bit_for_bit(at, alpha, tmp_path):
    data = list(batches(36))
    whole = accelerated(peft_model(lora_alpha=alpha))
    optimizer = adamw(whole)
    run_from(whole, optimizer, 0, data[:at])
    expected, params = whole(*data[0]).logits.detach(), list(whole.parameters())
    kept = whole.base_model.rankallocator.ranks()
    whole.base_model(*data[0]).loss.backward()
    whole.base_model.rankallocator.compact(optimizer)
    assert all(p is q for p, q in zip(params, whole.parameters(), strict=True))
    torch.testing.assert_close(whole(*data[0]).logits, expected)
    sizes = {"conv": (18, 3), "fc1": (12, 8), "fc2": (8, 8), "fc3": (8, 5)}
    for path, r in kept.items():
        layer, (n, m) = layers(whole)[f"base_model.model.{path}"], sizes[path]
        assert layer.r["default"] == r
        for factor, shape in (("A", (r, n)), ("E", (r, 1)), ("B", (m, r))):
            p = getattr(layer, f"lora_{factor}")["default"]
            assert p.shape == p.grad.shape == optimizer.state[p]["exp_avg"].shape == shape
    optimizer.zero_grad()
    assert whole.base_model.rankallocator.ranks() == kept

    whole.save_pretrained(tmp_path)
    save_training_state(tmp_path, allocator=whole.base_model.rankallocator, optimizer=optimizer)
    torch.testing.assert_close(loaded(tmp_path)(*data[0]).logits, expected, rtol=1e-4, atol=1e-5)
    runs = []
    # In a new model, in one that has all triplets yet, and in a copy.
    for model in (loaded(tmp_path, trainable=True, fast=True), accelerated(peft_model(lora_alpha=alpha))):
        runs.append((model, adamw(model)))
        load_training_state(tmp_path, allocator=model.base_model.rankallocator, optimizer=runs[-1][1])
    runs[1][0].load_adapter(tmp_path, "default", is_trainable=True)
    copied = copy.deepcopy(whole)
    runs.append((copied, adamw(copied)))
    runs[-1][1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run_from(whole, optimizer, at, data)
    for model, other in runs:
        run_from(model, other, at, data)
        assert_equal(model, whole)
        assert model.base_model.rankallocator.rank_pattern() == whole.base_model.rankallocator.rank_pattern()


def test_a_run_is_not_compacted_before_its_last_mask():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    run_from(model, optimizer, 0, list(batches())[:12])
    with pytest.raises(InvalidStateError, match="compact: expected a final pattern"):
        model.base_model.rankallocator.compact(optimizer)


@pytest.mark.parametrize("wrong", ["missing", "shape", "averages", "type", "other", "unknown"])
def test_a_wrong_state_of_masked_triplets_changes_nothing(wrong, tmp_path):
    model = accelerated(peft_model())
    optimizer = adamw(model)
    run_from(model, optimizer, 0, list(batches()))
    model.save_pretrained(tmp_path)
    state = model.base_model.rankallocator.state_dict()
    path = next(path for path, r in model.base_model.rankallocator.ranks().items() if r < 4)
    resumed = loaded(tmp_path, trainable=True, fast=True)
    before = copy.deepcopy(resumed)
    if wrong == "averages":
        name, text = "exp_avg_unc.fc3.B", "expected shape"
        state[name] = state[name][1:]
    elif wrong in ("type", "other"):
        name, text = (
            f"masked.{path}.kept",
            "a vector of bool" if wrong == "type" else "what the run's last mask has kept",
        )
        state[name] = state[name].float() if wrong == "type" else state[name].roll(1)
    elif wrong == "unknown":
        name, text = "state_dict", "found 'masked.fc9.A'"
        state["masked.fc9.A"] = torch.zeros(1, 8)
    else:
        name, text = f"masked.{path}.B", "for what the model's file has left out, found "
        text += "none" if wrong == "missing" else "shape"
        state[name] = None if wrong == "missing" else state[name][:, :0]
    with pytest.raises(InvalidArgumentError, match=f"{re.escape(name)}: .*{text}"):
        resumed.base_model.rankallocator.load_state_dict(state)
    assert_equal(resumed, before)
    assert [layer.r for layer in layers(resumed).values()] == [layer.r for layer in layers(before).values()]


# Stopping and going on


def run_from(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, data: list) -> None:
    for number in range(begin, len(data)):
        step(model, optimizer, number, data[number])


@pytest.mark.parametrize("at", [2, 7, 12, 23, 24, 25, 27, 30, 33])
def test_a_run_goes_on_bit_for_bit_from_its_files(at, tmp_path):
    data = list(batches(36))
    whole = accelerated(peft_model())
    optimizer = adamw(whole)
    run_from(whole, optimizer, 0, data[:at])
    saved_output = whole(*data[0]).logits
    whole.save_pretrained(tmp_path)
    save_training_state(tmp_path, allocator=whole.base_model.rankallocator, optimizer=optimizer)
    run_from(whole, optimizer, at, data)

    resumed = loaded(tmp_path, trainable=True, fast=True)
    # After the last mask the file has fewer triplets, whose sums are rounded otherwise.
    triplets = 8 if at > 24 else 16
    close = {} if triplets == 8 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed(*data[0]).logits, saved_output, **close)
    assert sum(layer.lora_E["default"].shape[0] for layer in layers(resumed).values()) == triplets
    optimizer = adamw(resumed)
    load_training_state(tmp_path, allocator=resumed.base_model.rankallocator, optimizer=optimizer)
    assert torch.equal(resumed(*data[0]).logits, saved_output)
    run_from(resumed, optimizer, at, data)
    assert_equal(resumed, whole)
    assert resumed.base_model.rankallocator.rank_pattern() == whole.base_model.rankallocator.rank_pattern()


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("at", [14, 26, 30])
def test_a_layer_without_triplets_goes_on_bit_for_bit(at, installed, tmp_path):
    def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for number in range(begin, end):
            model.base_model(*data[number]).loss.backward()
            nn.utils.clip_grad_norm_(trained(model).values(), 0.1)
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()

    data = list(batches(34))
    whole = accelerated(peft_model(target_r=1))
    optimizer = adamw(whole)
    clipped(whole, optimizer, 0, at)
    save(whole, tmp_path)
    save_training_state(tmp_path, allocator=whole.base_model.rankallocator, optimizer=optimizer)
    clipped(whole, optimizer, at, 34)
    assert 0 in whole.base_model.rankallocator.ranks().values()
    if installed:
        adalora.peft.install()
    try:
        resumed = loaded(tmp_path, trainable=True, fast=True)
    finally:
        adalora.peft.uninstall()
    other = adamw(resumed)
    load_training_state(tmp_path, allocator=resumed.base_model.rankallocator, optimizer=other)
    clipped(resumed, other, at, 34)
    assert_equal(resumed, whole)
    for p, q in zip(trained(resumed).values(), trained(whole).values(), strict=True):
        for name, value in other.state[p].items():
            assert torch.equal(value, optimizer.state[q][name])


def test_training_on_a_final_file_keeps_to_the_initial_pattern(tmp_path):
    data = list(batches(40))
    model = accelerated(peft_model(target_r=1))
    run_from(model, adamw(model), 0, data[:30])
    save(model, tmp_path / "first")
    pattern = model.peft_config["default"].rank_pattern
    again = loaded(tmp_path / "first", trainable=True, fast=True)
    run_from(again, adamw(again), 30, data)
    ranks = again.base_model.rankallocator.ranks()
    expected = again(*data[0]).logits
    save(again, tmp_path / "second")
    assert again.peft_config["default"].rank_pattern == pattern
    for fast in (False, True):
        other = loaded(tmp_path / "second", fast=fast)
        torch.testing.assert_close(other(*data[0]).logits, expected)
        assert [layer.lora_E["default"].shape[0] for layer in layers(other).values()] == list(ranks.values())


@pytest.mark.parametrize("at", [14, 30])
def test_a_cut_model_loses_ranks_down_to_a_lower_target(at, tmp_path):
    """A file of PEFT's from before the last mask or of the end, in layers of its ranks."""
    data = list(batches())
    model = peft_model()
    run_from(model, adamw(model), 0, data[:at])
    model.save_pretrained(tmp_path / "first")
    again = loaded(tmp_path / "first", trainable=True, fast=True)
    there = sum(layer.lora_E["default"].shape[0] for layer in layers(again).values())
    assert there == 8 if at == 30 else 8 < there < 16
    again.peft_config["default"].target_r = 1
    run_from(again, adamw(again), 0, data[:14])
    for part in ("early", "late"):
        expected = again(*data[0]).logits
        copied = copy.deepcopy(again)
        for each, folder in ((again, tmp_path / part), (copied, tmp_path / f"{part} copy")):
            save(each, folder)
            for fast in (False, True):
                other = loaded(folder, fast=fast)
                torch.testing.assert_close(other(*data[0]).logits, expected, rtol=1e-5, atol=1e-5)
        if part == "early":
            run_from(again, adamw(again), 14, data)
    assert sum(kept.count(False) for kept in masks(again).values()) == 4
    assert sum(layer.lora_E["default"].shape[0] for layer in layers(loaded(tmp_path / "late")).values()) == 4


@pytest.mark.parametrize("kind", ["copy", "pickle"])
def test_a_copy_goes_on_from_files_of_the_end(kind, tmp_path):
    data = list(batches(34))
    model = accelerated(peft_model())
    optimizer = adamw(model)
    run_from(model, optimizer, 0, data[:9])
    other = copy.deepcopy(model) if kind == "copy" else pickle.loads(pickle.dumps(model))
    run_from(model, optimizer, 9, data[:27])
    save(model, tmp_path)
    save_training_state(tmp_path, allocator=model.base_model.rankallocator, optimizer=optimizer)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    others = adamw(other)
    load_training_state(tmp_path, allocator=other.base_model.rankallocator, optimizer=others)
    for each, own in ((model, optimizer), (other, others)):
        run_from(each, own, 27, data)
    assert_equal(other, model)


def test_the_adapter_may_be_loaded_after_the_state(tmp_path):
    data = list(batches(34))
    model = accelerated(peft_model())
    optimizer = adamw(model)
    run_from(model, optimizer, 0, data[:27])
    save(model, tmp_path)
    save_training_state(tmp_path, allocator=model.base_model.rankallocator, optimizer=optimizer)
    other = accelerated(peft_model(seed=4))
    params, others = list(other.parameters()), adamw(other)
    load_training_state(tmp_path, allocator=other.base_model.rankallocator, optimizer=others)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(p is q for p, q in zip(params, other.parameters(), strict=True))
    for layer, same in zip(layers(other).values(), layers(model).values(), strict=True):
        layer.base_layer.load_state_dict(same.base_layer.state_dict())
    other.base_model.model.head.original_module.load_state_dict(
        model.base_model.model.head.original_module.state_dict()
    )
    for each, own in ((model, optimizer), (other, others)):
        run_from(each, own, 27, data)
    assert_equal(other, model)


def test_a_model_of_the_end_takes_an_earlier_file(tmp_path):
    data = list(batches())
    model = accelerated(peft_model())
    optimizer = adamw(model)
    for name, begin, end in (("early", 0, 8), ("late", 8, 30)):
        run_from(model, optimizer, begin, data[:end])
        save(model, tmp_path / name)
    early = loaded(tmp_path / "early")
    other = loaded(tmp_path / "late", trainable=True, fast=True)
    other.load_adapter(tmp_path / "early", "default", is_trainable=True)
    assert torch.equal(other(*data[0]).logits, accelerated(early)(*data[0]).logits)
    assert [layer.r["default"] for layer in layers(other).values()] == [4] * 4


@pytest.mark.parametrize("at", [14, 26, 30])
def test_a_run_goes_on_in_a_model_that_is_there(at, tmp_path):
    # As transformers' Trainer resumes: into the parameters that an optimiser may hold.
    data = list(batches(34))
    whole = accelerated(peft_model())
    optimizer = adamw(whole)
    run_from(whole, optimizer, 0, data[:at])
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy((optimizer.state_dict(), whole.base_model.rankallocator.state_dict()))
    other = accelerated(peft_model())
    params, optimizer = list(other.parameters()), adamw(other)
    run_from(other, optimizer, 0, data[:9])
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(p is q for p, q in zip(params, other.parameters(), strict=True))
    if at < 24:
        assert_equal(other, whole)
    optimizer.load_state_dict(copy.deepcopy(state[0]))
    other.base_model.rankallocator.load_state_dict(state[1])
    assert_equal(other, whole)
    run_from(other, optimizer, at, data)
    optimizer = adamw(whole)
    optimizer.load_state_dict(state[0])
    run_from(whole, optimizer, at, data)
    assert_equal(other, whole)


@pytest.mark.parametrize("at", [9, 14, 25, 28])
def test_an_earlier_state_is_loaded_into_a_model_that_has_gone_on(at, tmp_path):
    # As transformers' Trainer loads the best model at the end: after a mask, or after the last one.
    model = accelerated(peft_model())
    optimizer = adamw(model)
    data = list(batches())
    run_from(model, optimizer, 0, data[:8])
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model)
    run_from(model, optimizer, 8, data[:at])
    params = list(model.parameters())
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert_equal(model, before)
    run_from(model, optimizer, at, data)


def test_copies_go_on_bit_for_bit():
    data = list(batches())
    whole = accelerated(peft_model())
    optimizer = adamw(whole)
    run_from(whole, optimizer, 0, data[:11])
    others = [copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    state = copy.deepcopy(optimizer.state_dict())
    run_from(whole, optimizer, 11, data)
    for other in others:
        optimizer = adamw(other)
        optimizer.load_state_dict(copy.deepcopy(state))
        run_from(other, optimizer, 11, data)
        assert_equal(other, whole)


def test_a_changed_schedule_keeps_importance():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    run_from(model, optimizer, 0, list(batches(8)))
    allocator = model.base_model.rankallocator
    before = {name: value.clone() for name, value in allocator.exp_avg_ipt.items()}
    allocator.set_total_step(60)
    for name, value in allocator.exp_avg_ipt.items():
        assert torch.equal(value, before[name])
    assert allocator.standing().last_step == 7
    assert allocator.budget_schedule(30) == (theirs_budget(60, 30), True)


def test_a_late_start_without_a_state_is_reported():
    model = accelerated(peft_model())
    optimizer = adamw(model)
    data = list(batches())
    with pytest.warns(UserWarning, match="found step 12 first: importance begins anew"):
        step(model, optimizer, 12, data[12])
    with pytest.raises(InvalidStateError, match="expected steps before the last mask's, 24"):
        step(accelerated(peft_model()), optimizer, 26, data[26])


def test_the_last_phase_goes_on_from_what_is_zero():
    data = list(batches())
    whole = accelerated(peft_model())
    run_from(whole, adamw(whole), 0, data[:26])
    assert sum(kept.count(False) for kept in masks(whole).values()) == 8
    other = accelerated(peft_model())
    other.load_state_dict(whole.state_dict())
    run_from(other, adamw(other), 26, data)
    assert other.base_model.rankallocator.standing().is_final
    assert masks(other) == masks(whole)


# Files


@pytest.mark.parametrize("alpha", [6, 0])
@pytest.mark.parametrize("at", [2, 14, 26, 30])
def test_peft_loads_what_is_saved_here(at, alpha, tmp_path):
    model = accelerated(peft_model(lora_alpha=alpha))
    run_from(model, adamw(model), 0, list(batches(at)))
    (batch,) = batches(1, seed=11)
    expected = model(*batch).logits
    save(model, tmp_path)
    assert torch.equal(model(*batch).logits, expected)
    for fast in (False, True):
        torch.testing.assert_close(loaded(tmp_path, fast=fast)(*batch).logits, expected, rtol=1e-5, atol=1e-5)
    run_from(model, adamw(model), at, list(batches(at + 2)))


@pytest.mark.parametrize("at", [2, 14])
def test_peft_trains_on_what_is_saved_here_before_the_last_mask(at, tmp_path):
    data = list(batches())
    model = accelerated(peft_model())
    run_from(model, adamw(model), 0, data[:at])
    model.save_pretrained(tmp_path)
    runs = [loaded(tmp_path, trainable=True, fast=fast) for fast in (False, True)]
    with warnings.catch_warnings():
        # Importance begins anew, as PEFT's files have none.
        warnings.simplefilter("ignore")
        for each in runs:
            run_from(each, adamw(each), at, data)
    assert masks(runs[1]) == masks(runs[0])
    assert sum(kept.count(False) for kept in masks(runs[0]).values()) == 8
    assert_near(runs[1], runs[0])


@pytest.mark.parametrize("at", [2, 14, 26, 30])
def test_what_peft_saves_is_loaded_here(at, tmp_path):
    model = peft_model()
    optimizer = adamw(model)
    run_from(model, optimizer, 0, list(batches(at)))
    model.save_pretrained(tmp_path)
    (batch,) = batches(1, seed=11)
    expected = loaded(tmp_path)(*batch).logits
    torch.testing.assert_close(loaded(tmp_path, fast=True)(*batch).logits, expected, rtol=1e-5, atol=1e-5)
    adalora.peft.install()
    try:
        found = loaded(tmp_path, trainable=True)
    finally:
        adalora.peft.uninstall()
    torch.testing.assert_close(found(*batch).logits, expected, rtol=1e-5, atol=1e-5)
    ranks = [layer.lora_E["default"].shape[0] for layer in layers(found).values()]
    # In the middle of the schedule the pool stays whole; at its end it is what is left.
    assert sum(ranks) == (8 if at > 24 else 16)
    assert all(layer.ranknum["default"].item() == 4 for layer in layers(found).values())
    if 2 < at < 24:
        # What PEFT left out can learn again.
        optimizer = adamw(found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_from(found, optimizer, at, list(batches()))
        assert sum(kept.count(False) for kept in masks(found).values()) == 8
        assert found.base_model.rankallocator.standing().is_final


def test_adapters_with_names_that_occur_in_paths(tmp_path):
    # PEFT takes ".fc" out of "fc1.lora_E.fc" wherever it finds it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = nn.Sequential()
        base.add_module("fc", nn.Linear(4, 4))
        base.add_module("x", nn.Sequential())
        base.x.add_module("fc1", nn.Linear(4, 4))
        config = peft.AdaLoraConfig(
            **{**SETTINGS, "target_modules": ["fc", "x.fc1"], "modules_to_save": None, "total_step": 12, "tfinal": 2}
        )
        model = adalora.peft.accelerate(peft.get_peft_model(copy.deepcopy(base), config, adapter_name="fc"))
    optimizer = adamw(model)
    x = torch.randn(3, 4)
    for number in range(12):
        (model(x).square().mean() + model.base_model.orthogonality_loss()).backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    expected = model(x)
    assert model.peft_config["fc"].rank_pattern.keys() == {"fc.lora_E", "x.fc1.lora_E"}
    with warnings.catch_warnings():
        # PEFT takes the pattern for LoRA's.
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "fc", adapter_name="other")
    torch.testing.assert_close(model(x), expected)


def test_wrong_patterns_are_refused():
    model = accelerated(peft_model())
    base = model.base_model
    for pattern, text in (
        ({"fc9.lora_E": [True] * 4}, "found 'fc9'"),
        ({"fc1.lora_E": [True] * 3}, "expected 4 flags, found 3"),
        ({"fc1.lora_E": 3}, "expected a list of bool, found 3"),
    ):
        with pytest.raises(InvalidArgumentError, match=re.escape(text)):
            base.resize_modules_by_rank_pattern(pattern, "default")
    assert layers(model)["base_model.model.fc1"].lora_E["default"].shape == (4, 1)


def test_layers_keep_their_scaling_when_they_are_resized():
    model = accelerated(peft_model(lora_alpha=0, inference_mode=True))
    layer = layers(model)["base_model.model.fc1"]
    layer.scale_layer(3.0)
    with torch.no_grad():
        layer.lora_E["default"][[0, 2]] = 0
    (batch,) = batches(1)
    expected = model(*batch).logits
    A = layer.lora_A["default"].detach().clone()
    pattern = {"fc1.lora_E.default": torch.tensor([False, True, False, True])}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert torch.equal(layer.lora_A["default"], A[[1, 3]])
    assert (layer.r["default"], layer.ranknum["default"].item(), layer.scaling["default"]) == (2, 4.0, 12.0)
    assert not layer.lora_A["default"].requires_grad
    torch.testing.assert_close(model(*batch).logits, expected)
    model.base_model.resize_modules_by_rank_pattern({"fc1.lora_E": [False, False]}, "default")
    assert layer.lora_B["default"].shape == (8, 0)
    torch.testing.assert_close(layer(torch.ones(2, 12)), layer.base_layer(torch.ones(2, 12)))


def test_a_model_accelerated_after_loading_still_loses_ranks(tmp_path):
    """What was saved before the last mask holds no final pattern."""
    data = list(batches())
    model = accelerated(peft_model())
    optimizer = adamw(model)
    stop = SETTINGS["tinit"] + 2 * SETTINGS["deltaT"]
    for number in range(stop):
        step(model, optimizer, number, data[number])
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = adalora.peft.accelerate(peft.PeftModel.from_pretrained(Network(), tmp_path, is_trainable=True))
        optimizer = adamw(loaded)
        for number in range(stop, STEPS):
            step(loaded, optimizer, number, data[number])
    standing = loaded.base_model.rankallocator.standing()
    assert (standing.live_triplets, standing.is_final) == (loaded.base_model.rankallocator.target_bgt, True)


def test_a_run_goes_on_in_a_copy_that_its_allocator_is_given():
    data = list(batches())
    model = accelerated(peft_model())
    optimizer = adamw(model)
    for number in range(6):
        step(model, optimizer, number, data[number])
    allocator = model.base_model.rankallocator
    before = {name: tensor.clone() for name, tensor in allocator.exp_avg_ipt.items()}
    budget, _ = allocator.budget_schedule(5)
    allocator.mask_to_budget(copy.deepcopy(model.base_model.model), budget)
    assert all(torch.equal(tensor, before[name]) for name, tensor in allocator.exp_avg_ipt.items())
    assert allocator.standing().last_step == 5
