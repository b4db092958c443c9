"""AdamW in one pass with the allocator: beside PEFT, beside `torch.optim.AdamW`, and each promise by itself."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft_runs import (
    SETTINGS,
    assert_same,
    batches,
    groups,
    loss_of,
    network,
    peft_pattern,
    tolerance,
    trained,
    with_peft,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from adalora import CorruptDataError, InvalidArgumentError, InvalidStateError, UnsupportedError
from adalora.torch import AdaLoraConfig, AdamW, RankAllocator, adapt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

STEPS = SETTINGS["total_step"]
# The first step of a schedule may come before the optimiser's where a GradScaler skips.
pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")


def begin(dtype: torch.dtype = torch.float64, **changed) -> tuple[nn.Module, AdamW]:
    model = network(dtype, **changed)
    return model, AdamW(groups(model), RankAllocator(model), lr=1e-2)


def train(model: nn.Module, optimizer: AdamW, data, scheduler=None, max_norm: float | None = None) -> None:
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.allocator.orthogonality()
        if max_norm is not None:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
    """A schedule that changes the learning rates and the betas at every step."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[3e-2, 2e-2, 1e-2, 5e-3], total_steps=STEPS + 1)


def snapshot(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Everything that a step may change, copied."""
    values = {f"p.{name}": p for name, p in trained(model).items()}
    for name, p in trained(model).items():
        values |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    values |= {f"allocator.{name}": value for name, value in optimizer.allocator.state_dict().items()}
    return {name: value.detach().clone() for name, value in values.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if not name.startswith(but):
            assert torch.equal(value, expected[name]), name


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trained(model).items() if "lora_" in name}


def test_a_learning_rate_in_a_tensor():
    """It is read at every step, also where it was changed in place."""
    (ours, optimizer), (other, by_number) = begin(), begin()
    rate = torch.tensor(0.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for step, batch in enumerate(batches(8)):
        # Powers of two, which PyTorch's kernel reads in float32 as they are.
        rate.fill_(2.0 ** -(5 + step % 3))
        for group in by_number.param_groups:
            group["lr"] = rate.item()
        for model, each in ((ours, optimizer), (other, by_number)):
            train(model, each, [batch])
    assert_equal(snapshot(ours, optimizer), snapshot(other, by_number))


# Beside PEFT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_a_whole_run_is_pefts(dtype, max_norm):
    ours, optimizer = begin(dtype)
    theirs = with_peft(ours)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    schedulers = [one_cycle(optimizer), one_cycle(other)]
    for step, batch in enumerate(batches(STEPS, dtype)):
        assert optimizer.global_step == step
        loss_of(ours, batch).backward()
        optimizer.allocator.orthogonality()
        loss_of(theirs, batch).backward()
        if max_norm is not None:
            norm = optimizer.clip_grad_norm_(max_norm)
            expected = clip_grad_norm_(trained(theirs).values(), max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-8 if dtype == torch.float64 else 1e-3, atol=0)
        optimizer.step()
        other.step()
        theirs.base_model.update_and_allocate(step)
        assert_same(ours, theirs, **tolerance(dtype))
        optimizer.zero_grad()
        other.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.allocator.rank_pattern() == peft_pattern(theirs)
    assert sum(optimizer.allocator.ranks().values()) == 6
    expected = trained(theirs)
    for name, p in trained(ours).items():
        assert optimizer.state[p].keys() == other.state[expected[name]].keys()
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(value, other.state[expected[name]][key], rtol=1e-3, atol=1e-6)


def test_a_transformer_is_trained_as_with_peft():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    settings = {
        **SETTINGS,
        "target_modules": ["query", "key", "value", "dense"],
        "exclude_modules": ["pooler.dense", "classifier"],
        "total_step": 14,
        "tfinal": 3,
        "task_type": "SEQ_CLS",
    }
    made = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **shape)
    torch.manual_seed(4)
    base = transformers.BertForSequenceClassification(made).double().eval()
    ours = adapt(copy.deepcopy(base), AdaLoraConfig(**settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, peft.AdaLoraConfig(**settings))

    # The head is a copy of its own there.
    def name_there(name: str) -> str:
        return name.replace("classifier.", "classifier.modules_to_save.default.")

    expected = {n: p for n, p in trained(theirs).items() if "ranknum" not in n}
    assert {name_there(name) for name in trained(ours)} == expected.keys()
    with torch.no_grad():
        for name, p in trained(ours).items():
            p.copy_(expected[name_there(name)])
    optimizer = AdamW(trained(ours).values(), RankAllocator(ours), lr=1e-2)
    other = torch.optim.AdamW(expected.values(), lr=1e-2)
    made = torch.Generator().manual_seed(3)
    for step in range(14):
        batch = {
            "input_ids": torch.randint(20, (3, 7), generator=made),
            "labels": torch.randint(3, (3,), generator=made),
        }
        ours(**batch).loss.backward()
        optimizer.allocator.orthogonality()
        theirs.base_model(**batch).loss.backward()
        optimizer.step()
        other.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        other.zero_grad()
        for name, p in trained(ours).items():
            torch.testing.assert_close(p, expected[name_there(name)], rtol=1e-8, atol=1e-9)
            if "lora_E" in name:
                assert torch.equal(p == 0, expected[name_there(name)] == 0)
    assert sum(optimizer.allocator.ranks().values()) == 2 * 6 * 2


def test_closures_and_accumulation():
    ours, optimizer = begin()
    theirs = with_peft(ours)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    data = batches(20)

    def evaluate(model: nn.Module, zero_grad, penalty, step: int):
        def closure() -> Tensor:
            zero_grad()
            parts = [loss_of(model, batch) / 2 for batch in data[2 * step : 2 * step + 2]]
            for part in parts:
                part.backward()
            penalty()
            return sum(parts)

        return closure

    for step in range(10):
        loss = optimizer.step(evaluate(ours, optimizer.zero_grad, optimizer.allocator.orthogonality, step))
        expected = other.step(evaluate(theirs, other.zero_grad, lambda: None, step))
        theirs.base_model.update_and_allocate(step)
        assert loss.requires_grad and loss < expected
        assert_same(ours, theirs, **tolerance(torch.float64))


# PyTorch's interface


def test_hooks_run_once():
    # Making this one gives the class that ours derives from a step with hooks of its own.
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    model, optimizer = begin()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    train(model, optimizer, batches(2))
    assert calls == ["before", "after"] * 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[4:] == ["saved", "loading"]


def test_groups_may_come_later():
    ours, theirs = network(), network()
    optimizer = AdamW(ours.head.parameters(), RankAllocator(ours), lr=1e-2)
    loss_of(ours, *batches(1)).backward()
    with pytest.raises(InvalidArgumentError, match=r"params: expected all .* found no fc1.A"):
        optimizer.step()
    ours.zero_grad()
    other = torch.optim.AdamW(theirs.head.parameters(), lr=1e-2)
    optimizer.add_param_group({"params": list(adapters(ours).values()), "lr": 3e-3, "weight_decay": 0.3})
    other.add_param_group({"params": list(adapters(theirs).values()), "lr": 3e-3, "weight_decay": 0.3})
    more = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    for step, batch in enumerate(batches(4)):
        if step == 2:
            optimizer.add_param_group({"params": more[:1], "lr": 0.5})
            other.add_param_group({"params": more[1:], "lr": 0.5})
        for model, extra, its in ((ours, more[0], optimizer), (theirs, more[1], other)):
            (loss_of(model, batch) + extra.square().sum()).backward()
            its.step()
            its.zero_grad()
        for p, q in zip((*trained(ours).values(), more[0]), (*trained(theirs).values(), more[1]), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_options_that_adapters_cannot_have_are_refused():
    ours, theirs = network(), network()
    for option in ("amsgrad", "maximize"):
        with pytest.raises(UnsupportedError, match=rf"param_groups\[0\].{option}: expected False"):
            AdamW([{"params": list(adapters(ours).values()), option: True}], RankAllocator(ours))
        with_option = torch.optim.AdamW(trained(ours).values(), **{option: True}).state_dict()
        optimizer = AdamW(trained(ours).values(), RankAllocator(ours))
        with pytest.raises(UnsupportedError, match=option):
            optimizer.load_state_dict(with_option)
    # Others can.
    lists = [
        [
            {"params": list(adapters(m).values())},
            {"params": list(m.head.parameters()), "amsgrad": True, "maximize": True},
        ]
        for m in (ours, theirs)
    ]
    optimizer, other = AdamW(lists[0], RankAllocator(ours)), torch.optim.AdamW(lists[1])
    for batch in batches(4):
        for model, its in ((ours, optimizer), (theirs, other)):
            loss_of(model, batch).backward()
            its.step()
            its.zero_grad()
    assert_same(ours, theirs, rtol=1e-9, atol=1e-12)


def test_state_dicts_pass_to_and_from_pytorch(tmp_path):
    data = batches(24, torch.float64)
    options = {"tinit": 25, "tfinal": 0}
    ours, theirs = network(**options), network(**options)
    optimizer, other = AdamW(groups(ours), RankAllocator(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)

    def go_on(model: nn.Module, its: torch.optim.Optimizer, part) -> None:
        for batch in part:
            loss_of(model, batch).backward()
            its.step()
            its.zero_grad()

    go_on(ours, optimizer, data[:8])
    go_on(theirs, other, data[:8])
    assert_same(ours, theirs, rtol=1e-9, atol=1e-12)
    # Each takes over the other's, by a file and by a copy.
    torch.save(optimizer.state_dict(), tmp_path / "ours.pt")
    saved = torch.load(tmp_path / "ours.pt"), copy.deepcopy(other.state_dict())
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    other.load_state_dict(saved[0])
    optimizer = AdamW(groups(ours), RankAllocator(ours), lr=1e-2)
    optimizer.load_state_dict(saved[1])
    assert optimizer.global_step == 0
    go_on(ours, optimizer, data[8:16])
    go_on(theirs, other, data[8:16])
    assert_same(ours, theirs, rtol=1e-9, atol=1e-12)
    assert {state["step"].item() for state in optimizer.state.values()} == {16.0}
    assert optimizer.allocator.standing().adam_steps == [16] * 3
    # What was loaded is not written to.
    assert {state["step"].item() for state in saved[1]["state"].values()} == {8.0}
    assert any(
        (state["exp_avg"] != saved[1]["state"][k]["exp_avg"]).any() for k, state in enumerate(optimizer.state.values())
    )
    # A reset by hand, as trainers do it.
    for its in (optimizer, other):
        its.state.clear()
    go_on(ours, optimizer, data[16:])
    go_on(theirs, other, data[16:])
    assert_same(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_state_with_different_steps_in_an_adapter_is_refused():
    model, optimizer = begin()
    train(model, optimizer, batches(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] += 1
    optimizer.load_state_dict({name: state[name] for name in ("state", "param_groups")})
    with pytest.raises(InvalidArgumentError, match="expected one step for A, E and B of fc1"):
        optimizer.step()


@pytest.mark.parametrize(
    ("stop", "dtype"), [*((stop, torch.float32) for stop in (1, 5, 11, 24, 25, 28)), (11, torch.bfloat16)]
)
def test_a_resumed_run_goes_on_bit_for_bit(stop, dtype, tmp_path):
    def start() -> tuple[nn.Module, AdamW, torch.optim.lr_scheduler.LRScheduler]:
        model = network(torch.float32).to(dtype)
        optimizer = AdamW(groups(model), RankAllocator(model), lr=1e-2)
        return model, optimizer, one_cycle(optimizer)

    data = batches(STEPS, dtype)
    model, optimizer, scheduler = start()
    train(model, optimizer, data[:stop], scheduler, max_norm=0.5)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state.pt")
    train(model, optimizer, data[stop:], scheduler, max_norm=0.5)

    other, other_optimizer, other_scheduler = start()
    loaded = torch.load(tmp_path / "state.pt")
    for name, part in {"model": other, "optimizer": other_optimizer, "scheduler": other_scheduler}.items():
        part.load_state_dict(loaded[name])
    assert other_optimizer.global_step == stop
    train(other, other_optimizer, data[stop:], other_scheduler, max_norm=0.5)
    assert_equal(snapshot(other, other_optimizer), snapshot(model, optimizer))
    assert other_optimizer.allocator.rank_pattern() == optimizer.allocator.rank_pattern()
    assert other_optimizer.allocator.digest() == optimizer.allocator.digest()
    assert other_optimizer.allocator.standing().is_final


def test_an_optimizer_cannot_be_copied():
    _, optimizer = begin()
    for way in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            way(optimizer)


# Gradients: clipped, missing, not finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipping_counts_all_parameters(dtype):
    ours, optimizer = begin(dtype)
    theirs, plain = copy.deepcopy(ours), None
    plain = torch.optim.AdamW(groups(theirs), lr=1e-2)
    for batch in batches(3, dtype):
        for model in (ours, theirs):
            loss_of(model, batch).backward()
        held = {name: p.grad.clone() for name, p in trained(ours).items()}
        # The last call counts, and gradients stay as they are until the step.
        optimizer.clip_grad_norm_(1e-3)
        norm = optimizer.clip_grad_norm_(0.05)
        expected = clip_grad_norm_(trained(theirs).values(), 0.05)
        assert norm.dtype == expected.dtype and norm.shape == ()
        torch.testing.assert_close(norm, expected)
        assert all(torch.equal(p.grad, held[name]) for name, p in trained(ours).items())
        optimizer.step()
        plain.step()
        assert_same(ours, theirs, **tolerance(dtype))
        moments = [
            {n: its.state[p]["exp_avg"] for n, p in trained(m).items()}
            for m, its in ((ours, optimizer), (theirs, plain))
        ]
        for name, moment in moments[0].items():
            torch.testing.assert_close(moment, moments[1][name], rtol=1e-5, atol=1e-8)
        for its in (optimizer, plain):
            its.zero_grad()


def test_a_clipped_gradient_is_forgotten_with_the_gradient():
    data = batches(2)
    ours, optimizer = begin()
    theirs, other = begin()
    loss_of(ours, data[0]).backward()
    optimizer.clip_grad_norm_(1e-6)
    optimizer.zero_grad()
    for model, its in ((ours, optimizer), (theirs, other)):
        loss_of(model, data[1]).backward()
        its.step()
    assert_equal(snapshot(ours, optimizer), snapshot(theirs, other))
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="max_norm: expected a number above 0"):
            optimizer.clip_grad_norm_(wrong)


def test_a_clip_does_not_outlive_what_it_measured():
    data = batches(3)
    models = [begin() for _ in range(2)]
    for model, optimizer in models:
        if optimizer is models[0][1]:
            loss_of(model, data[0]).backward()
            optimizer.clip_grad_norm_(1e-3)
            # Not by the optimiser, which would forget the clip itself.
            model.zero_grad()
        loss_of(model, data[1]).backward()
        optimizer.step()
    assert_equal(*(snapshot(*each) for each in models))


def test_the_allocator_is_not_asked_twice():
    model, optimizer = begin()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    with pytest.raises(InvalidStateError, match="whose step does it already"):
        optimizer.allocator.update_and_allocate(0)
    with pytest.raises(InvalidArgumentError, match="allocator: expected a RankAllocator, found float"):
        AdamW(groups(model), 1e-3)


def test_a_state_of_another_budget_is_refused():
    model, optimizer = begin()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    other = RankAllocator(model, budget_unit="parameters")
    with pytest.raises(InvalidArgumentError, match="budget_unit: expected 'parameters', found a state that counts"):
        other.load_state_dict(optimizer.allocator.state_dict())


def test_edits_of_groups_are_honoured():
    data = batches(3)
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        model = network(torch.float64)
        adapter, other = list(adapters(model).values()), [p for n, p in trained(model).items() if "lora_" not in n]
        held = other.pop()
        given = [{"params": adapter + other}, {"params": [], "lr": 0.1, "weight_decay": 0.3}]
        optimizer = kind(given, RankAllocator(model), lr=1e-2) if kind is AdamW else kind(given, lr=1e-2)
        for k, batch in enumerate(data):
            if k == 1:
                optimizer.param_groups[0]["params"].append(held)
                optimizer.param_groups[1]["params"] += [optimizer.param_groups[0]["params"].pop(0) for _ in range(3)]
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            held.grad = None if k == 0 else held.grad
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_damaged_state_changes_nothing():
    model, optimizer = begin()
    train(model, optimizer, batches(3))
    before = snapshot(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    lr = state["param_groups"][0]["lr"]
    state["param_groups"][0]["lr"] = 9.0
    state["allocator"]["state"] = state["allocator"]["state"][:-3]
    with pytest.raises(CorruptDataError):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == lr
    assert_equal(snapshot(model, optimizer), before)


def test_an_adapter_without_gradients_is_left_alone():
    ours, theirs = network(), network()
    optimizer, other = AdamW(groups(ours), RankAllocator(ours)), torch.optim.AdamW(groups(theirs))
    for step, batch in enumerate(batches(5)):
        for model, its in ((ours, optimizer), (theirs, other)):
            loss_of(model, batch, skip=step in (0, 2, 3)).backward()
            if step == 2:
                assert model.fc2.lora_A["default"].grad is None
            norm = optimizer.clip_grad_norm_(0.1) if its is optimizer else clip_grad_norm_(trained(model).values(), 0.1)
            its.step()
            its.zero_grad()
            if its is optimizer:
                first = norm
        torch.testing.assert_close(first, norm)
        assert_same(ours, theirs, rtol=1e-9, atol=1e-12)
    assert optimizer.allocator.standing().adam_steps == [5, 2, 5]
    assert optimizer.state[ours.fc2.lora_E["default"]]["step"] == 2
    # No gradient anywhere: PyTorch's does nothing either.
    before = {name: p.detach().clone() for name, p in trained(ours).items()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in trained(ours).items())


def test_frozen_adapters_stay():
    ours, theirs = network(), network()
    for model in (ours, theirs):
        for p in model.fc2.triplets("default"):
            p.requires_grad_(False)
    optimizer = AdamW(trained(ours).values(), RankAllocator(ours))
    other = torch.optim.AdamW(trained(theirs).values())
    frozen = [p.clone() for p in ours.fc2.triplets("default")]
    for batch in batches(3):
        for model, its in ((ours, optimizer), (theirs, other)):
            loss_of(model, batch).backward()
            its.step()
            its.zero_grad()
    assert_same(ours, theirs, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(ours.fc2.triplets("default"), frozen, strict=True))
    assert len(optimizer.state_dict()["state"]) == len(trained(ours))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("where", ["fc2.lora_B.default", "head.weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_nothing_but_a_mask(value, where, clip):
    model, optimizer = begin()
    train(model, optimizer, batches(8))
    before = snapshot(model, optimizer)
    for kept in ("allocator.state", "p.fc1.lora_E", "p.fc2.lora_E", "p.fc3.lora_E"):
        assert any(name.startswith(kept) for name in before)
    for step in (8, 9):
        loss_of(model, batches(1)[0]).backward()
        trained(model)[where].grad[1, 1] = value
        if clip:
            assert not optimizer.clip_grad_norm_(1.0).isfinite()
        optimizer.step()
        optimizer.zero_grad()
        # A mask falls on step 9.
        mask = ("p.fc1.lora_E", "p.fc2.lora_E", "p.fc3.lora_E") if step == 9 else ()
        assert_equal(snapshot(model, optimizer), before, but=("allocator.state", *mask))
    standing = optimizer.allocator.standing()
    assert (standing.skipped, standing.last_step, optimizer.global_step) == (2, 9, 10)
    assert standing.live_triplets == optimizer.allocator.budget(9).budget < optimizer.allocator.budget(6).budget
    for path, kept in optimizer.allocator.rank_pattern().items():
        assert (optimizer.allocator.layers[path].lora_E["default"].flatten() != 0).tolist() == kept


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale):
    ours, optimizer = begin(torch.float32)
    theirs, other = begin(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=6)
    scales = []
    for step, batch in enumerate(batches(16, torch.float32)):
        scaler.scale(loss_of(ours, batch)).backward()
        loss_of(theirs, batch).backward()
        if step in (5, 9):
            where = ours.fc2.lora_A["default"] if step == 5 else ours.head.weight
            where.grad[0, 1] = float("inf")
            trained(theirs)["fc2.lora_A.default"].grad[0, 1] = float("nan")
        if unscale:
            scaler.unscale_(optimizer)
            optimizer.allocator.orthogonality()
            optimizer.clip_grad_norm_(0.25)
            other.allocator.orthogonality()
            other.clip_grad_norm_(0.25)
        else:
            optimizer.allocator.orthogonality(loss_scale=scaler.get_scale())
            other.allocator.orthogonality()
        scaler.step(optimizer)
        scaler.update()
        other.step()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
        other.zero_grad()
        # Powers of two round nothing.
        assert_equal(snapshot(ours, optimizer), snapshot(theirs, other))
    assert (min(scales), max(scales)) == (2.0**10, 2.0**12)
    assert optimizer.allocator.standing().skipped == 2
    assert optimizer.allocator.rank_pattern() == other.allocator.rank_pattern()
    assert {state["step"].item() for state in optimizer.state.values()} == {14.0}
    assert not hasattr(optimizer, "found_inf")


# Parameters: replaced, in half precision


def test_cast_parameters_go_on():
    ours = network(torch.float32)
    ours.head.requires_grad_(False)
    optimizer = AdamW(groups(ours)[:3], RankAllocator(ours), lr=1e-2)
    train(ours, optimizer, batches(8, torch.float32))
    old = snapshot(ours, optimizer)
    ours.double()
    # What PyTorch's optimiser, made for the cast parameters, does with the state so far.
    theirs = copy.deepcopy(ours)
    other = torch.optim.AdamW(groups(theirs)[:3], lr=1e-2)
    other.load_state_dict(
        copy.deepcopy({k: v for k, v in optimizer.state_dict().items() if k in ("state", "param_groups")})
    )
    for group in other.param_groups:
        group["fused"] = None
    for step, batch in enumerate(batches(3), 8):
        loss_of(ours, batch).backward()
        loss_of(theirs, batch).backward()
        optimizer.step()
        other.step()
        for name, p in trained(ours).items():
            q = trained(theirs)[name]
            assert p.dtype == torch.float64
            live = p != 0
            torch.testing.assert_close(p[live], q[live], rtol=1e-9, atol=1e-12)
            with torch.no_grad():
                q.copy_(p)
        optimizer.zero_grad()
        other.zero_grad()
        standing = optimizer.allocator.standing()
        assert (standing.last_step, standing.irregular, standing.adam_steps) == (step, 0, [step + 1] * 3)
    assert old["allocator.exp_avg_ipt.fc1.A"].dtype == torch.float32
    assert optimizer.allocator.state_dict()["exp_avg_ipt.fc1.A"].dtype == torch.float64


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.bfloat16, torch.float32), (torch.float16,)])
def test_cast_parameters_go_on_at_once(dtypes):
    """With the very next step, and as where the run is saved, and loaded for the cast parameters."""
    ours = network(torch.float32)
    # PyTorch's own part does not cast its moments.
    ours.head.requires_grad_(False)
    optimizer = AdamW(groups(ours)[:3], RankAllocator(ours), lr=1e-2)
    train(ours, optimizer, batches(8, torch.float32))
    for dtype in dtypes:
        saved = copy.deepcopy(optimizer.state_dict())
        ours.to(dtype)
        other = copy.deepcopy(ours)
        again = AdamW(groups(other)[:3], RankAllocator(other), lr=1e-2)
        again.load_state_dict(saved)
        for model, its in ((ours, optimizer), (other, again)):
            for batch in batches(3, dtype, seed=2):
                loss_of(model, batch).backward()
                its.step()
                its.zero_grad()
        assert_equal(snapshot(ours, optimizer), snapshot(other, again))


def test_assigned_parameters():
    ours, optimizer = begin(torch.float32)
    train(ours, optimizer, batches(2, torch.float32))
    other, other_optimizer = begin(torch.float32)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # The tensors are others, and the parameters the same.
    for name, p in trained(other).items():
        p.data = trained(ours)[name].detach().clone()
    for model, its in ((ours, optimizer), (other, other_optimizer)):
        train(model, its, batches(8, torch.float32, seed=2))
    assert_equal(snapshot(ours, optimizer), snapshot(other, other_optimizer))
    # The parameters are others: the optimiser has to be made anew.
    ours.load_state_dict(copy.deepcopy(ours.state_dict()), assign=True)
    loss_of(ours, *batches(1, torch.float32)).backward()
    with pytest.raises(InvalidArgumentError, match="make the optimiser anew"):
        optimizer.step()
    again = AdamW(groups(ours), optimizer.allocator, lr=1e-2)
    again.load_state_dict(copy.deepcopy(other_optimizer.state_dict()))
    ours.zero_grad()
    for model, its in ((ours, again), (other, other_optimizer)):
        train(model, its, batches(6, torch.float32, seed=3))
    assert_equal(snapshot(ours, again), snapshot(other, other_optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_moments_in_float32(dtype):
    model = network(torch.float32).to(dtype)
    optimizer = AdamW(trained(model).values(), RankAllocator(model), lr=1e-2, weight_decay=0.1)
    moments = {name: (torch.zeros(p.shape), torch.zeros(p.shape)) for name, p in adapters(model).items()}
    made = torch.Generator().manual_seed(3)
    for step in range(1, 5):
        wanted = {}
        for name, p in adapters(model).items():
            p.grad = (torch.randn(p.shape, generator=made) * 2**-10).to(dtype)
            m, v = moments[name]
            m.lerp_(p.grad.float(), 0.1)
            v.mul_(0.999).addcmul_(p.grad.float(), p.grad.float(), value=0.001)
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            wanted[name] = p.detach().float() * (1 - 1e-3) - 1e-2 * update
        optimizer.step()
        for name, p in adapters(model).items():
            # One rounding, half a unit in the last place, and what the order of operations changes in it.
            torch.testing.assert_close(p.float(), wanted[name], rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-7)
            for key, moment in zip(("exp_avg", "exp_avg_sq"), moments[name], strict=True):
                assert optimizer.state[p][key].dtype == torch.float32
                torch.testing.assert_close(optimizer.state[p][key], moment, rtol=1e-5, atol=1e-12)


def test_changes_are_seen_by_autograd():
    model, optimizer = begin()
    loss = loss_of(model, *batches(1))
    loss.backward(retain_graph=True)
    versions = [p._version for p in adapters(model).values()]
    optimizer.step()
    assert all(p._version > version for p, version in zip(adapters(model).values(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
