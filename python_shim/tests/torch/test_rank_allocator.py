"""The rank allocator beside optimisers of others: whole runs beside PEFT, and each promise by itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

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

from adalora import CorruptDataError, InvalidArgumentError, InvalidStateError
from adalora.torch import AdaLoraConfig, AdamW, RankAllocator, adapt

STEPS = SETTINGS["total_step"]


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], **options) -> None:
    loss_of(model, batch, **options).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, allocator: RankAllocator, data, begin: int = 0) -> None:
    """A loop as users write it."""
    for step, batch in enumerate(data, begin):
        backward(model, batch)
        allocator.orthogonality()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()


def snapshot(model: nn.Module, allocator: RankAllocator) -> dict[str, Tensor]:
    """Everything that a step may change."""
    return {name: value.clone() for name, value in (*trained(model).items(), *allocator.state_dict().items())}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


class Importance:
    """PEFT's smoothing, written down again for single gradients."""

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.ipt: dict[str, Tensor] = {}
        self.unc: dict[str, Tensor] = {}

    def update(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        for name, p in params.items():
            g = grads[name]
            s = torch.zeros_like(p) if g is None else (p * g).abs()
            ipt = self.ipt.get(name, torch.zeros_like(p))
            unc = self.unc.get(name, torch.zeros_like(p))
            self.ipt[name] = self.beta1 * ipt + (1 - self.beta1) * s
            self.unc[name] = self.beta2 * unc + (1 - self.beta2) * (s - self.ipt[name]).abs()

    def check(self, allocator: RankAllocator, **close) -> None:
        state = allocator.state_dict()
        for average, kept in (("exp_avg_ipt", self.ipt), ("exp_avg_unc", self.unc)):
            for name, expected in kept.items():
                torch.testing.assert_close(state[f"{average}.{name}"], expected, **close)


def by_name(allocator: RankAllocator, wide: bool = True) -> dict[str, Tensor]:
    """Copies of the parameters by `<path>.A` and so on."""
    return {
        f"{path}.{matrix}": (p.detach().float() if wide and p.dtype.itemsize == 2 else p.detach().clone())
        for path, layer in allocator.layers.items()
        for matrix, p in layer.triplets("default")._asdict().items()
    }


def grads_by_name(allocator: RankAllocator) -> dict[str, Tensor | None]:
    return {
        f"{path}.{matrix}": None
        if p.grad is None
        else p.grad.detach().clone().to(torch.promote_types(p.dtype, torch.float32))
        for path, layer in allocator.layers.items()
        for matrix, p in layer.triplets("default")._asdict().items()
    }


# Beside PEFT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("penalty", ["call", "loss"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_whole_run_is_pefts(dtype, penalty, kind):
    ours = network(dtype)
    theirs = with_peft(ours)
    allocator = RankAllocator(ours)
    optimizers, schedulers = [], []
    for model in (ours, theirs):
        if kind == "adamw":
            optimizers.append(torch.optim.AdamW(groups(model), lr=1e-2))
        else:
            optimizers.append(torch.optim.SGD(trained(model).values(), lr=1e-2, momentum=0.9))
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], STEPS))
    for step, batch in enumerate(batches(STEPS, dtype)):
        if penalty == "call":
            backward(ours, batch)
            allocator.orthogonality()
        else:
            (ours(*batch).loss + allocator.orthogonality_loss()).backward()
        backward(theirs, batch)
        norms = [clip_grad_norm_(trained(model).values(), 0.5) for model in (ours, theirs)]
        torch.testing.assert_close(*norms, rtol=1e-8 if dtype == torch.float64 else 1e-3, atol=0)
        for optimizer in optimizers:
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        assert_same(ours, theirs, **tolerance(dtype))
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            scheduler.step()
    assert allocator.rank_pattern() == peft_pattern(theirs)
    assert allocator.ranks() == {path: sum(kept) for path, kept in peft_pattern(theirs).items()}
    assert sum(allocator.ranks().values()) == 6
    standing = allocator.standing()
    assert (standing.is_final, standing.last_step, standing.live_triplets) == (True, STEPS - 1, 6)


def test_averages_are_pefts():
    ours = network()
    theirs = with_peft(ours)
    allocator = RankAllocator(ours)
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (ours, theirs)]
    for step, batch in enumerate(batches(10)):
        backward(ours, batch)
        allocator.orthogonality()
        backward(theirs, batch)
        for optimizer in optimizers:
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
    state, expected = allocator.state_dict(), theirs.base_model.rankallocator
    for average in ("exp_avg_ipt", "exp_avg_unc"):
        for name, value in getattr(expected, average).items():
            path, matrix = name.removeprefix("model.").removesuffix(".default").split(".lora_")
            torch.testing.assert_close(state[f"{average}.{path}.{matrix}"], value, rtol=1e-9, atol=1e-15)


def test_budgets_are_pefts():
    ours = network()
    expected = with_peft(ours).base_model.rankallocator
    allocator = RankAllocator(ours)
    for step in range(STEPS + 5):
        assert tuple(allocator.budget(step)) == expected.budget_schedule(step)
    # A triplet costs its in features, out features and 1.
    costs = {"fc1": 15, "fc2": 17, "fc3": 14}
    assert RankAllocator(network(), budget_unit="parameters").budget(0).budget == 4 * sum(costs.values())


def test_gradients_accumulate_as_with_peft():
    ours = network()
    theirs = with_peft(ours)
    allocator = RankAllocator(ours)
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (ours, theirs)]
    data = batches(3 * 12)
    for step in range(12):
        for model in (ours, theirs):
            # PEFT's loss has its penalty in every part.
            for batch in data[3 * step : 3 * step + 3]:
                (loss_of(model, batch) / 3).backward()
        allocator.orthogonality()
        for optimizer in optimizers:
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        assert_same(ours, theirs, rtol=1e-9, atol=1e-10)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step % 2 == 0)


# The penalty


def penalty_of(allocator: RankAllocator, weight: float) -> Tensor:
    """PEFT's formula on this allocator's parameters, which autograd differentiates."""
    terms = []
    for layer in allocator.layers.values():
        A, _, B = layer.triplets("default")
        terms += [
            (A @ A.T - torch.eye(len(A), dtype=A.dtype)).norm(),
            (B.T @ B - torch.eye(len(A), dtype=A.dtype)).norm(),
        ]
    return weight * torch.stack(terms).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight", [None, 0.7, 0.0])
def test_penalty_and_gradient_are_autograds(dtype, weight):
    ours = network(dtype)
    allocator = RankAllocator(ours)
    params = allocator.parameters()
    expected = penalty_of(allocator, SETTINGS["orth_reg_weight"] if weight is None else weight)
    grads = torch.autograd.grad(expected, params, allow_unused=True)
    assert [g is None for g in grads] == [False, True, False] * 3
    close = tolerance(dtype)

    # As a call: what is there is added to.
    before = [torch.randn_like(p) for p in params]
    for p, g in zip(params, before, strict=True):
        p.grad = g.clone()
    value = allocator.orthogonality(weight, loss_scale=512.0)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value == pytest.approx(expected.item(), rel=close["rtol"], abs=1e-12)
    for p, g, more in zip(params, before, grads, strict=True):
        torch.testing.assert_close(p.grad, g if more is None else g + 512 * more, **close)

    # As a value: alone, times something, and added to what is there.
    for p in params:
        p.grad = None
    loss = allocator.orthogonality_loss(weight)
    assert loss.shape == () and loss.dtype == dtype
    torch.testing.assert_close(loss, expected.detach(), **close)
    (3 * loss).backward()
    for p, more in zip(params, grads, strict=True):
        assert (p.grad is None) == (more is None)
        if more is not None:
            torch.testing.assert_close(p.grad, 3 * more, **close)
    allocator.orthogonality_loss(weight).backward()
    for p, more in zip(params, grads, strict=True):
        if more is not None:
            torch.testing.assert_close(p.grad, 4 * more, **close)


def test_penalty_of_orthonormal_factors_has_no_gradient():
    model = network()
    allocator = RankAllocator(model)
    with torch.no_grad():
        for layer in allocator.layers.values():
            A, _, B = layer.triplets("default")
            A.copy_(torch.eye(*A.shape))
            B.copy_(torch.eye(*B.shape))
    loss = allocator.orthogonality_loss()
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for k, p in enumerate(allocator.parameters()) if k % 3 != 1)


def test_penalties_of_several_passes_are_apart():
    """Each has gradients of its own, whatever is computed before they are used, and those of steps stay bound."""
    model = network()
    allocator, params = RankAllocator(model), list(trained(model).values())
    expected = torch.autograd.grad(penalty_of(allocator, 0.3), params, allow_unused=True)
    (batch,) = batches(1)
    backward(model, batch)
    task = [p.grad.clone() for p in params]
    first, second = allocator.orthogonality_loss(), allocator.orthogonality_loss()
    (3 * second + first).backward()
    for p, g, more in zip(params, task, expected, strict=True):
        torch.testing.assert_close(p.grad, g if more is None else g + 4 * more, **tolerance(torch.float64))
    allocator.update_and_allocate(0)
    for name, p in trained(model).items():
        if "lora_" in name:
            wanted = 0.15 * (p * p.grad).abs()
            path, matrix = name.split(".lora_")
            found = allocator.state_dict()[f"exp_avg_ipt.{path}.{matrix[0]}"]
            torch.testing.assert_close(found, wanted, **tolerance(torch.float64))


def test_a_steps_number_in_a_tensor():
    """What a captured step needs; the device reads it where it lies."""
    runs = []
    for kind in (int, lambda step: torch.tensor(step)):
        model = network()
        allocator, optimizer = RankAllocator(model), torch.optim.AdamW(groups(model), lr=1e-2)
        for step, batch in enumerate(batches(STEPS)):
            backward(model, batch)
            optimizer.step()
            allocator.update_and_allocate(kind(step))
            optimizer.zero_grad()
        runs.append(snapshot(model, allocator))
    assert_equal(*runs)


def test_penalty_is_once_differentiable_and_needs_no_gradient_mode():
    allocator = RankAllocator(network())
    (g,) = torch.autograd.grad(allocator.orthogonality_loss().square(), allocator.parameters()[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with torch.no_grad():
        assert not allocator.orthogonality_loss().requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalty_of_half_precision_is_rounded_once(dtype):
    model = network(torch.float32).to(dtype)
    allocator = RankAllocator(model)
    wide = RankAllocator(copy.deepcopy(model).float())
    grads = torch.autograd.grad(penalty_of(wide, 0.3), wide.parameters(), allow_unused=True)
    loss = allocator.orthogonality_loss()
    assert loss.dtype == torch.float32
    (64 * loss).backward()
    for p, g in zip(allocator.parameters(), grads, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, (64 * g).to(dtype))


# Gradients that are missing, moved, laid out otherwise


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_captured_step_took_for_gradients_stays(captured, monkeypatch):
    """A replay writes there again, whatever came in between."""
    model = network()
    allocator = RankAllocator(model)
    steps = iter(batches(4))
    backward(model, next(steps), skip=True)
    allocator.update_and_allocate(0)
    with monkeypatch.context() as patched:
        patched.setattr(allocator, "is_capturing", lambda: captured)
        allocator.orthogonality()
    zeros = [weakref.ref(array) for array in allocator._no_gradients.values()]
    assert len(zeros) == 3
    for skip in (False, True, False):
        model.zero_grad()
        backward(model, next(steps), skip=skip)
        allocator.orthogonality()
        gc.collect()
        assert all((array() is not None) == captured for array in zeros)


def test_an_adapter_without_gradients_has_no_sensitivity():
    model = network()
    allocator = RankAllocator(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    expected = Importance()
    for step, batch in enumerate(batches(4)):
        backward(model, batch, skip=step in (1, 2))
        assert (model.fc2.lora_A["default"].grad is None) == (step in (1, 2))
        allocator.orthogonality()
        if step in (1, 2):
            assert all(p.grad is None for p in model.fc2.triplets("default"))
        optimizer.step()
        expected.update(by_name(allocator), grads_by_name(allocator))
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        expected.check(allocator, rtol=1e-10, atol=1e-15)


def test_a_missing_gradient_beside_others_is_zero():
    model = network()
    allocator = RankAllocator(model)
    backward(model, *batches(1))
    E = model.fc1.lora_E["default"]
    E.grad = None
    allocator.orthogonality()
    assert torch.equal(E.grad, torch.zeros_like(E))
    expected = Importance()
    expected.update(by_name(allocator), grads_by_name(allocator))
    allocator.update_and_allocate(0)
    expected.check(allocator, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("call", ["orthogonality", "update_and_allocate"])
def test_no_gradients_at_all_are_an_error(call):
    allocator = RankAllocator(network())
    with pytest.raises(InvalidStateError, match=f"{call}: expected gradients, found none"):
        getattr(allocator, call)(0)


def test_gradients_may_lie_anywhere():
    model = network()
    allocator = RankAllocator(model)
    expected = Importance()
    made = torch.Generator().manual_seed(3)
    kept = []
    for step in range(4):
        for p in allocator.parameters():
            g = torch.randn(p.shape, generator=made, dtype=p.dtype)
            # Column by column, every other element, the old place, a new place.
            layouts = (g.T.contiguous().T, torch.stack([g, g], -1)[..., 0], g, g)
            if step == 3:
                p.grad.copy_(g)
            else:
                p.grad = layouts[step]
        expected.update(by_name(allocator), grads_by_name(allocator))
        allocator.update_and_allocate(step)
        expected.check(allocator, rtol=1e-10, atol=1e-15)
        kept.append([p.grad for p in allocator.parameters()])


def test_gradients_of_a_backward_pass_are_kept_no_longer_than_they_live():
    import gc
    import weakref

    model = network()
    allocator = RankAllocator(model)
    backward(model, *batches(1))
    allocator.update_and_allocate(0)
    first = weakref.ref(model.fc1.lora_A["default"].grad)
    for step, batch in enumerate(batches(2), 1):
        held = [p.grad for p in allocator.parameters()]
        model.zero_grad()
        backward(model, batch)
        allocator.update_and_allocate(step)
        del held
    gc.collect()
    assert first() is None


def test_gradients_in_one_buffer():
    ours = network()
    theirs = with_peft(ours)
    allocator = RankAllocator(ours)
    params = allocator.parameters()
    backward(ours, batches(1, seed=9)[0])
    before = [p.grad.clone() for p in params]
    flat = allocator.flatten_gradients()
    assert flat.shape == (sum(p.numel() for p in params),)
    assert torch.equal(flat, torch.cat([g.flatten() for g in before]))
    assert all(p.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in params)
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (ours, theirs)]
    optimizers[0].zero_grad(set_to_none=False)
    assert (flat == 0).all()
    for step, batch in enumerate(batches(12)):
        backward(ours, batch)
        backward(theirs, batch)
        # What an all-reduce over two processes with equal gradients does, before its division.
        flat *= 2
        flat /= 2
        allocator.orthogonality()
        assert torch.equal(flat, torch.cat([p.grad.flatten() for p in params]))
        for optimizer in optimizers:
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)
        assert_same(ours, theirs, rtol=1e-9, atol=1e-10)


# Parameters that are frozen, replaced, in half precision


def test_frozen_parameters():
    model = network()
    for p in model.fc2.triplets("default"):
        p.requires_grad_(False)
    allocator = RankAllocator(model)
    assert len(allocator.flatten_gradients()) == sum(p.numel() for p in allocator.parameters() if p.requires_grad)
    backward(model, *batches(1))
    expected = Importance()
    expected.update(by_name(allocator), grads_by_name(allocator))
    allocator.update_and_allocate(0)
    expected.check(allocator, rtol=1e-10, atol=1e-15)

    model = network()
    model.fc3.lora_E["default"].requires_grad_(False)
    allocator = RankAllocator(model)
    backward(model, *batches(1))
    with pytest.raises(InvalidArgumentError, match=r"fc3.E: expected requires_grad as its adapter's others"):
        allocator.update_and_allocate(0)

    # Also once the run has begun.
    model = network()
    allocator = RankAllocator(model)
    optimizer = AdamW(trained(model).values(), allocator, lr=1e-2)
    A = model.fc3.lora_A["default"]
    for step, batch in enumerate(batches(2)):
        A.requires_grad_(step == 0)
        before = A.detach().clone()
        backward(model, batch)
        if step == 0:
            optimizer.step()
        else:
            with pytest.raises(InvalidArgumentError, match=r"fc3.A: expected requires_grad as its adapter's others"):
                optimizer.step()
            assert torch.equal(A, before)
        optimizer.zero_grad()


def test_parameters_of_another_shape_are_refused():
    model = network()
    allocator = RankAllocator(model)
    p = model.fc2.lora_A["default"]
    p.data = p.data[:2].contiguous()
    with pytest.raises(
        InvalidArgumentError, match=r"fc2.A: expected shape \[\d+, \d+\], as when the allocator was made"
    ):
        allocator.standing()


@pytest.mark.parametrize("way", ["data", "assign", "to"])
def test_replaced_parameters_are_noticed(way):
    model = network(torch.float32)
    allocator = RankAllocator(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    train(model, optimizer, allocator, batches(8, torch.float32))
    expected = Importance()
    state = allocator.state_dict()
    for name in by_name(allocator):
        expected.ipt[name], expected.unc[name] = (state[f"{a}.{name}"].clone() for a in ("exp_avg_ipt", "exp_avg_unc"))
    standing, old = allocator.standing(), by_name(allocator)
    if way == "data":
        for p in trained(model).values():
            p.data = p.data + 0.25
    elif way == "assign":
        model.load_state_dict({name: value + 0.25 for name, value in model.state_dict().items()}, assign=True)
        assert all(p.requires_grad for p in allocator.parameters())
    else:
        model.to(torch.float64)
        expected.ipt = {name: value.double() for name, value in expected.ipt.items()}
        expected.unc = {name: value.double() for name, value in expected.unc.items()}
    backward(model, *batches(1, trained(model)["head.weight"].dtype, seed=11))
    params = by_name(allocator)
    if way != "to":
        assert all(torch.equal(p, old[name] + 0.25) for name, p in params.items())
    expected.update(params, grads_by_name(allocator))
    optimizer.param_groups[0]["lr"] = 0
    optimizer.step()
    allocator.update_and_allocate(9)
    expected.check(allocator, **tolerance(next(iter(params.values())).dtype))
    # The run went on: a mask fell on step 9, over the parameters that are there now.
    assert standing.last_step == 7
    now = allocator.standing()
    assert (now.last_step, now.irregular) == (9, 0)
    assert now.live_triplets == allocator.budget(9).budget < 12
    for path, kept in allocator.rank_pattern().items():
        assert (allocator.layers[path].lora_E["default"].flatten() != 0).tolist() == kept


def test_a_parameter_that_is_not_contiguous_is_refused():
    model = network()
    allocator = RankAllocator(model)
    backward(model, *batches(1))
    A = model.fc1.lora_A["default"]
    A.data = A.data.T.contiguous().T
    with pytest.raises(InvalidArgumentError, match=r"fc1.A: expected a contiguous parameter"):
        allocator.update_and_allocate(0)
    A.data = A.data.contiguous()
    allocator.update_and_allocate(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_are_float32(dtype):
    model = network(torch.float32).to(dtype)
    allocator = RankAllocator(model)
    expected = Importance()
    made = torch.Generator().manual_seed(3)
    for step in range(12):
        for p in allocator.parameters():
            # Sensitivities that underflow float16.
            p.grad = (torch.randn(p.shape, generator=made) * 2**-16).to(dtype)
        expected.update(by_name(allocator), grads_by_name(allocator))
        allocator.update_and_allocate(step)
        expected.check(allocator, rtol=1e-5, atol=1e-14)
    assert allocator.standing().live_triplets == allocator.budget(9).budget < 12
    assert all(v.dtype == torch.float32 for name, v in allocator.state_dict().items() if name.startswith("exp_avg"))


# What is not finite


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_no_average(value):
    model = network()
    allocator = RankAllocator(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    train(model, optimizer, allocator, batches(9))
    backward(model, *batches(1, seed=5))
    before = allocator.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items() if name != "state"}
    model.fc3.lora_B["default"].grad[1, 1] = value
    # A mask falls on it all the same.
    allocator.update_and_allocate(9)
    after = allocator.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    standing = allocator.standing()
    assert (standing.skipped, standing.selections) == (1, 2)
    assert standing.live_triplets == allocator.budget(9).budget < allocator.budget(6).budget


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_an_optimizer_of_pytorch(fused):
    ours = network(torch.float32)
    theirs = with_peft(ours)
    allocator = RankAllocator(ours)
    optimizers = [torch.optim.AdamW(trained(m).values(), lr=1e-2, fused=fused) for m in (ours, theirs)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, batch in enumerate(batches(16, torch.float32)):
        scaler.scale(ours(*batch).loss).backward()
        allocator.orthogonality(loss_scale=scaler.get_scale())
        if step == 9:
            # The step is skipped; a mask falls on it.
            held = {name: p.detach().clone() for name, p in trained(ours).items()}
            ours.fc1.lora_A["default"].grad[0, 0] = float("inf")
            scaler.step(optimizers[0])
            allocator.update_and_allocate(step)
            assert all(torch.equal(p, held[n]) for n, p in trained(ours).items() if "lora_E" not in n)
            assert allocator.standing().live_triplets == allocator.budget(9).budget
            # PEFT, which has no such step, masks the same by its averages as they are.
            theirs.base_model.rankallocator.mask_to_budget(theirs.base_model.model, allocator.budget(9).budget)
        else:
            backward(theirs, batch)
            scaler.step(optimizers[0])
            optimizers[1].step()
            allocator.update_and_allocate(step)
            theirs.base_model.update_and_allocate(step)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert_same(ours, theirs, rtol=1e-4, atol=1e-5)
    assert scaler.get_scale() == 2.0**9
    assert allocator.standing().skipped == 1


# States


def begin(**changed) -> tuple[nn.Module, torch.optim.Optimizer, RankAllocator]:
    model = network(torch.float32, **changed)
    return model, torch.optim.AdamW(groups(model), lr=1e-2), RankAllocator(model)


@pytest.mark.parametrize("stop", [1, 5, 11, 24, 25, 28])
def test_a_resumed_run_goes_on_bit_for_bit(stop, tmp_path):
    data = batches(STEPS, torch.float32)
    model, optimizer, allocator = begin()
    train(model, optimizer, allocator, data[:stop])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "allocator": allocator.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    train(model, optimizer, allocator, data[stop:], stop)

    other, other_optimizer, other_allocator = begin()
    loaded = torch.load(tmp_path / "state.pt")
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    other_allocator.load_state_dict(loaded["allocator"])
    train(other, other_optimizer, other_allocator, data[stop:], stop)
    assert_equal(snapshot(other, other_allocator), snapshot(model, allocator))
    assert other_allocator.digest() == allocator.digest()
    assert other_allocator.rank_pattern() == allocator.rank_pattern()


def test_a_wrong_state_changes_nothing():
    model, optimizer, allocator = begin()
    train(model, optimizer, allocator, batches(8, torch.float32))
    before = snapshot(model, allocator)
    good = copy.deepcopy(allocator.state_dict())
    wider = RankAllocator(network(torch.float32, init_r=5)).state_dict()
    bad = {**good, "state": good["state"].clone()}
    bad["state"][40] ^= 1
    average = "exp_avg_unc.fc2.B"
    doubled = {**good, "exp_avg_ipt.fc1.A": torch.zeros(4, 7)}
    for state, error, match in (
        (bad, CorruptDataError, "checksum"),
        (doubled, InvalidArgumentError, r"exp_avg_ipt.fc1.A: expected shape \[4, 6\], found \[4, 7\]"),
        (wider, InvalidArgumentError, "expected shape"),
        ({k: v for k, v in good.items() if k != "exp_avg_unc.fc2.E"}, InvalidArgumentError, "exp_avg_unc.fc2.E"),
        ({**good, "more": good["state"]}, InvalidArgumentError, "'more'"),
        ({**good, average: good[average].to("meta")}, InvalidArgumentError, f"{average}: expected .* on meta"),
        ({**good, average: good[average].to_sparse()}, InvalidArgumentError, f"{average}: expected .*sparse"),
        (
            {**good, average: good[average].long()},
            InvalidArgumentError,
            f"{average}: expected .*float32, found .*int64",
        ),
    ):
        with pytest.raises(error, match=match):
            allocator.load_state_dict(state)
        assert_equal(snapshot(model, allocator), before)


def test_patterns_out_and_in():
    model, optimizer, allocator = begin()
    assert allocator.rank_pattern() == {path: [True] * 4 for path in allocator.layers}
    train(model, optimizer, allocator, batches(STEPS, torch.float32))
    pattern = allocator.rank_pattern()
    other = RankAllocator(network(torch.float32))
    assert other.digest() != allocator.digest()
    other.set_rank_pattern(pattern, final=True)
    assert other.rank_pattern() == pattern
    assert other.standing().is_final
    for path, layer in other.layers.items():
        assert (layer.lora_E["default"].flatten() != 0).tolist() == pattern[path]
    for wrong, match in (
        ({**pattern, "fc9": [True] * 4}, "'fc9'"),
        ({**pattern, "fc1": [True] * 3}, r"pattern\['fc1'\]: expected 4 flags, found 3"),
        ({"fc1": [True] * 4}, "'fc2'"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            other.set_rank_pattern(wrong)
    assert other.rank_pattern() == pattern


def test_finalize_and_reset():
    model, optimizer, allocator = begin()
    theirs = with_peft(model)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    train(model, optimizer, allocator, batches(8, torch.float32))
    for step, batch in enumerate(batches(8, torch.float32)):
        backward(theirs, batch)
        other.step()
        theirs.base_model.update_and_allocate(step)
        other.zero_grad()
    allocator.finalize()
    expected = theirs.base_model.rankallocator.mask_to_budget(theirs.base_model.model, 6)
    assert list(allocator.rank_pattern().values()) == list(expected.values())
    assert allocator.standing().is_final
    assert_same(model, theirs, rtol=1e-4, atol=1e-5)
    allocator.reset()
    standing = allocator.standing()
    assert (standing.live_triplets, standing.last_step, standing.is_final) == (12, -1, False)
    assert all((v == 0).all() for name, v in allocator.state_dict().items() if name.startswith("exp_avg"))


def test_changes_are_seen_by_autograd():
    model, _, allocator = begin()
    loss = model(*batches(1, torch.float32)[0]).loss
    loss.backward(retain_graph=True)
    E = model.fc3.lora_E["default"]
    version = E._version
    allocator.update_and_allocate(25)
    assert (E == 0).any()
    assert E._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_allocated_is_refused():
    with pytest.raises(InvalidArgumentError, match="adapter_name"):
        RankAllocator(network(), "other")
    with pytest.raises(InvalidArgumentError, match="model: expected one with adapters, found none"):
        RankAllocator(nn.Linear(2, 2))
    with pytest.raises(InvalidArgumentError, match="budget_unit"):
        RankAllocator(network(), budget_unit="bytes")
    model = adapt(nn.Sequential(nn.Linear(4, 4)), AdaLoraConfig(inference_mode=True, target_modules=["0"]))
    with pytest.raises(InvalidArgumentError, match="total_step: expected"):
        RankAllocator(model)
    allocator = RankAllocator(network())
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            way(allocator)


def test_layers_without_triplets():
    model = network(init_r=0, target_r=0)
    allocator = RankAllocator(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    train(model, optimizer, allocator, batches(4))
    assert allocator.ranks() == {"fc1": 0, "fc2": 0, "fc3": 0}
