"""An allocator that does not follow its optimisers step by step says so, and one that does is left in peace."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from peft_runs import SETTINGS, batches, loss_of, network, trained
from torch import nn

from adalora.torch import AdamW, RankAllocator

MISSED = r"one call of update_and_allocate after each step of the optimiser, found 2 steps of {} and no call"
DOUBLED = r"update_and_allocate: expected one call after each step of the optimiser, found {} calls and one step"


def made(optimizer=torch.optim.SGD, **options):
    model = network()
    return model, RankAllocator(model), optimizer(trained(model).values(), lr=1e-2, **options)


def backward(model: nn.Module, batch) -> None:
    loss_of(model, batch).backward()


def found(model, allocator, step, *, parts=1, steps=1, calls=1, optimizer) -> list[str]:
    """Train one step, with parts of a batch, steps and calls as many as told. What was reported."""
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        for batch in batches(parts, seed=step):
            backward(model, batch)
        for _ in range(steps):
            optimizer.step()
        for _ in range(calls):
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
    assert all(each.category is UserWarning for each in reported)
    return [str(each.message) for each in reported]


def test_a_step_that_is_missed():
    model, allocator, optimizer = made()
    assert found(model, allocator, 0, optimizer=optimizer) == []
    assert found(model, allocator, 1, calls=0, optimizer=optimizer) == []
    with pytest.warns(UserWarning, match=MISSED.format("SGD")):
        backward(model, *batches(1))
        optimizer.step()
    # Once, however many more there are.
    assert found(model, allocator, 3, steps=2, optimizer=optimizer) == []
    assert found(model, allocator, 4, optimizer=optimizer) == []
    assert len(found(model, allocator, 5, steps=2, optimizer=optimizer)) == 1


def test_an_allocator_that_is_never_called():
    model, allocator, optimizer = made(torch.optim.Adam)
    reported = [found(model, allocator, step, calls=0, optimizer=optimizer) for step in range(4)]
    assert [len(each) for each in reported] == [0, 1, 0, 0]
    assert "found 2 steps of Adam and no call" in reported[1][0]


def test_a_call_too_many():
    model, allocator, optimizer = made()
    assert found(model, allocator, 0, optimizer=optimizer) == []
    with pytest.warns(UserWarning, match=DOUBLED.format(2)):
        backward(model, *batches(1))
        allocator.update_and_allocate(1)
    with pytest.warns(UserWarning, match=DOUBLED.format(3)):
        allocator.update_and_allocate(2)
    optimizer.step()
    allocator.update_and_allocate(3)
    optimizer.zero_grad()
    assert len(found(model, allocator, 4, calls=3, optimizer=optimizer)) == 2


def test_a_call_for_each_part_of_a_batch():
    model, allocator, optimizer = made()
    for step in range(2):
        for part, batch in enumerate(batches(3)):
            backward(model, batch)
            if part == 2:
                optimizer.step()
            if step == 1 and part < 2:
                with pytest.warns(UserWarning, match=DOUBLED.format(part + 2)):
                    allocator.update_and_allocate(3 * step + part)
            else:
                allocator.update_and_allocate(3 * step + part)
        optimizer.zero_grad()


def test_gradients_that_accumulate():
    model, allocator, optimizer = made(torch.optim.AdamW)
    assert all(found(model, allocator, step, parts=3, optimizer=optimizer) == [] for step in range(4))


def test_parameters_in_several_optimisers():
    model = network()
    allocator = RankAllocator(model)
    params = allocator.parameters()
    optimizers = [torch.optim.SGD(params[k::3], lr=1e-2) for k in range(3)]
    head = torch.optim.SGD(model.head.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(3)):
        backward(model, batch)
        for optimizer in (*optimizers, head, head, head):
            optimizer.step()
        allocator.update_and_allocate(step)
        model.zero_grad()
    # Parameters may come later.
    head.add_param_group({"params": params[:3], "lr": 0.0})
    with pytest.warns(UserWarning, match=MISSED.format("SGD")):
        for _ in range(2):
            head.step()


class Derived(torch.optim.SGD):
    """An optimiser that calls another one's step, whose hooks run as well."""

    def step(self, closure=None):
        super().step()
        return super().step(closure)


def test_optimisers_that_call_others():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    model, allocator, optimizer = made(Derived)
    assert all(found(model, allocator, step, optimizer=optimizer) == [] for step in range(3))
    assert len(found(model, allocator, 3, steps=2, optimizer=optimizer)) == 1


def test_a_step_that_fails():
    model, allocator, optimizer = made()

    def fail() -> None:
        raise RuntimeError("out of memory")

    for step, batch in enumerate(batches(3)):
        backward(model, batch)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fail)
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()


def test_adamw_follows_by_itself():
    model = network()
    allocator = RankAllocator(model)
    optimizer = AdamW(trained(model).values(), allocator, lr=1e-2)
    for batch in batches(4):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.standing().last_step == 3


@pytest.mark.parametrize("begin", ["load_state_dict", "reset"])
def test_a_run_that_begins_anew(begin):
    model, allocator, optimizer = made()
    assert found(model, allocator, 0, optimizer=optimizer) == []
    assert found(model, allocator, 1, calls=0, optimizer=optimizer) == []
    if begin == "reset":
        allocator.reset()
    else:
        allocator.load_state_dict(allocator.state_dict())
    assert found(model, allocator, 1, optimizer=optimizer) == []


def test_allocators_that_are_gone_report_nothing():
    model, allocator, optimizer = made()
    del allocator
    gc.collect()
    backward(model, *batches(1))
    for _ in range(3):
        optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "fused", "ours"])
@pytest.mark.parametrize("where", ["head", "adapter"])
@pytest.mark.parametrize("first", [False, True])
def test_steps_that_a_scaler_leaves_out(kind, where, first):
    model = network(torch.float32)
    allocator = RankAllocator(model)
    if kind == "sgd":
        optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    elif kind == "fused":
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, fused=True)
    else:
        optimizer = AdamW(trained(model).values(), allocator, lr=1e-2)
    allocator.optimizer_steps.watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    mask = next(step for step in range(SETTINGS["total_step"]) if allocator.budget(step).masks)
    skipped = 0 if first else mask
    for step, batch in enumerate(batches(mask + 2, torch.float32)):
        scaler.scale(loss_of(model, batch)).backward()
        if step == skipped:
            p = model.head.weight if where == "head" else model.fc1.lora_E["default"]
            p.grad.view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        before = {name: t.clone() for name, t in allocator.state_dict().items() if name.startswith("exp_avg")}
        weights = [p.detach().clone() for p in allocator.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if kind != "ours":
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
        after = allocator.state_dict()
        changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
        assert bool(changed) == (step != skipped)
        if step == skipped:
            # A and B; E is masked all the same.
            assert all(
                torch.equal(p, old)
                for k, (p, old) in enumerate(zip(allocator.parameters(), weights, strict=True))
                if k % 3 != 1
            )
    standing = allocator.standing()
    assert (standing.skipped, standing.irregular, standing.last_step) == (1, 0, mask + 1)
    assert standing.live_triplets == allocator.budget(mask).budget
