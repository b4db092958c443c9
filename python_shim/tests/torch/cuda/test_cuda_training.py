"""Training on CUDA tensors: beside PEFT, beside the CPU, without reading back, and captured into graphs."""

from __future__ import annotations

import copy
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

import adalora.peft
from adalora import InvalidStateError
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    adapt,
    load_adapter,
    load_training_state,
    merge,
    save_adapter,
    save_training_state,
    unmerge,
)

DEVICE = torch.device("cuda")
STEPS = SETTINGS["total_step"]
pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")


def begin(dtype: torch.dtype = torch.float64, **changed) -> tuple[nn.Module, AdamW]:
    model = network(dtype, **changed).to(DEVICE)
    return model, AdamW(groups(model), RankAllocator(model), lr=1e-2)


def data(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, ...]]:
    return [tuple(tensor.to(DEVICE) for tensor in batch) for batch in batches(steps, dtype)]


def step(model: nn.Module, optimizer: AdamW, batch: tuple[Tensor, ...], in_place: bool = False) -> Tensor:
    loss = loss_of(model, batch)
    loss.backward()
    penalty = optimizer.allocator.orthogonality()
    optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not in_place)
    return penalty


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_whole_run_is_pefts(dtype):
    ours, optimizer = begin(dtype)
    theirs = with_peft(ours).to(DEVICE)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    for number, batch in enumerate(data(STEPS, dtype)):
        assert optimizer.global_step == number
        loss_of(ours, batch).backward()
        optimizer.allocator.orthogonality()
        loss_of(theirs, batch).backward()
        norm = optimizer.clip_grad_norm_(0.5)
        expected = torch.nn.utils.clip_grad_norm_(trained(theirs).values(), 0.5)
        torch.testing.assert_close(norm, expected, rtol=1e-8 if dtype == torch.float64 else 1e-3, atol=0)
        optimizer.step()
        other.step()
        theirs.base_model.update_and_allocate(number)
        assert_same(ours, theirs, **tolerance(dtype))
        optimizer.zero_grad()
        other.zero_grad()
    assert optimizer.allocator.rank_pattern() == peft_pattern(theirs)
    expected = trained(theirs)
    for name, p in trained(ours).items():
        assert optimizer.state[p]["step"].item() == other.state[expected[name]]["step"].item() == STEPS
    assert optimizer.state_dict()["state"][0]["step"].item() == STEPS


def test_pefts_model_is_accelerated():
    theirs = with_peft(network()).to(DEVICE)
    ours = adalora.peft.accelerate(copy.deepcopy(theirs))
    optimizers = [torch.optim.AdamW(groups(model), lr=1e-2) for model in (ours, theirs)]
    for number, batch in enumerate(data(STEPS)):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss_of(model, batch).backward()
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
        for name, p in trained(ours).items():
            torch.testing.assert_close(p, trained(theirs)[name], rtol=1e-8, atol=1e-9)
            assert "lora_E" not in name or torch.equal(p == 0, trained(theirs)[name] == 0)


def test_autocast_is_as_near_as_pefts():
    (batch,) = data(1, torch.float32)
    exact, ours = network(torch.float32).to(DEVICE), network(torch.float32).to(DEVICE)
    theirs = with_peft(ours).to(DEVICE)
    loss_of(exact, batch).backward()
    with torch.autocast("cuda", torch.bfloat16):
        losses = [model(*batch).loss for model in (ours, theirs.base_model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1].detach() - penalty_in(theirs), rtol=2e-2, atol=2e-2)
    for name, p in trained(exact).items():
        # The others' gradients have the penalty in PEFT's loss.
        if "head" in name or "lora_E" in name:
            errors = [(trained(model)[name].grad - p.grad).norm() for model in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + 1e-2 * p.grad.norm(), name


def penalty_in(theirs: nn.Module) -> Tensor:
    """What PEFT's loss has beside the task's."""
    layers = [module for module in theirs.modules() if hasattr(module, "lora_E") and len(module.lora_E)]
    total = 0.0
    for layer in layers:
        for rows in (layer.lora_A["default"], layer.lora_B["default"].T):
            total = total + (rows @ rows.T - torch.eye(len(rows), device=DEVICE)).norm()
    return SETTINGS["orth_reg_weight"] / (2 * len(layers)) * total.detach()


def test_the_penalty_as_a_part_of_the_loss():
    model, _ = begin()
    allocator = RankAllocator(model)
    (batch,) = data(1)
    loss_of(model, batch).backward()
    value = allocator.orthogonality()
    wanted = [p.grad.clone() for p in allocator.parameters()]
    for _ in range(2):
        model.zero_grad()
        added = allocator.orthogonality_loss()
        (loss_of(model, batch) + added).backward()
        torch.testing.assert_close(added, value, rtol=1e-12, atol=0)
        for p, want in zip(allocator.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-12)


def test_a_scaler_leaves_steps_out():
    model, optimizer = begin(torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    before = None
    for number, batch in enumerate(data(6, torch.float32)):
        scaler.scale(loss_of(model, batch)).backward()
        optimizer.allocator.orthogonality(loss_scale=scaler.get_scale())
        if number == 3:
            optimizer.allocator.parameters()[0].grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in trained(model).values()]
        scaler.step(optimizer)
        scaler.update()
        if number == 3:
            assert all(map(torch.equal, before, trained(model).values()))
        optimizer.zero_grad()
    standing = optimizer.allocator.standing()
    assert (standing.skipped, standing.adam_steps) == (1, [5, 5, 5])
    assert scaler.get_scale() == 2.0**15


def test_a_step_reads_nothing_back():
    model, optimizer = begin()
    steps = data(STEPS)
    for batch in steps[:3]:
        step(model, optimizer, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in steps[3:]:
            step(model, optimizer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(optimizer.allocator.ranks().values()) == 6


@pytest.mark.parametrize(
    ("scheduled", "in_place", "first_steps"),
    [(False, True, "in a stream of their own"), (True, False, "in a stream of their own"), (True, True, "as any")],
)
def test_a_captured_step_is_the_eager_one(scheduled, in_place, first_steps):
    """Forward, backward, penalty, clipping, AdamW and masks in one graph, through the whole schedule."""
    eager, other = begin()
    model, optimizer = begin()
    steps = data(STEPS)
    rate = torch.tensor(2.0**-7, dtype=torch.float64, device=DEVICE)
    if scheduled:
        for group in optimizer.param_groups:
            group["lr"] = rate
    static = tuple(tensor.clone() for tensor in steps[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side if first_steps == "in a stream of their own" else torch.cuda.current_stream()):
        for batch in steps[:3]:
            step(model, optimizer, batch, in_place)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        penalty = step(model, optimizer, static, in_place)
    assert optimizer.global_step == 3
    for number, batch in enumerate(steps):
        if scheduled:
            # Powers of two, which PyTorch's kernel reads in float32 as they are.
            lr = 2.0 ** -(6 + number % 3) if number >= 3 else 2.0**-7
            for group in other.param_groups:
                group["lr"] = lr
            rate.fill_(lr)
        expected = step(eager, other, batch)
        if number < 3:
            continue
        for target, tensor in zip(static, batch, strict=True):
            target.copy_(tensor)
        graph.replay()
        assert optimizer.global_step == number + 1
        torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-12)
        assert_same(model, eager, rtol=1e-9, atol=1e-11)
    found, want = optimizer.allocator.standing(), other.allocator.standing()
    assert (found.ranks, found.adam_steps, found.last_step) == (want.ranks, want.adam_steps, want.last_step)
    assert (found.selections, found.irregular, found.is_final) == (want.selections, 0, True)
    states = optimizer.state_dict(), other.state_dict()
    assert [state["global_step"] for state in states] == [STEPS, STEPS]
    assert [s["step"].item() for s in states[0]["state"].values()] == [STEPS] * len(states[0]["state"])
    # Eager steps and replays go on from each other.
    for number, batch in enumerate(steps[:4]):
        step(eager, other, batch)
        if number % 2:
            for target, tensor in zip(static, batch, strict=True):
                target.copy_(tensor)
            graph.replay()
        else:
            step(model, optimizer, batch, in_place)
        assert_same(model, eager, rtol=1e-9, atol=1e-11)
    assert optimizer.global_step == STEPS + 4
    assert optimizer.allocator.standing().last_step == STEPS + 3


def test_another_optimisers_step_is_captured():
    models = [network().to(DEVICE) for _ in range(2)]
    allocators = [RankAllocator(model) for model in models]
    optimizers = [torch.optim.AdamW(groups(model), lr=1e-2, capturable=True) for model in models]
    number = torch.zeros((), dtype=torch.int64, device=DEVICE)
    steps = data(STEPS)
    static = tuple(tensor.clone() for tensor in steps[0])

    def train(k: int, batch: tuple[Tensor, ...], global_step: int | Tensor) -> None:
        loss_of(models[k], batch).backward()
        allocators[k].orthogonality()
        optimizers[k].step()
        allocators[k].update_and_allocate(global_step)
        optimizers[k].zero_grad(set_to_none=False)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for each in range(2):
            train(1, steps[each], each)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(1, static, number)
    for each, batch in enumerate(steps):
        train(0, batch, each)
        if each >= 2:
            number.fill_(each)
            for target, tensor in zip(static, batch, strict=True):
                target.copy_(tensor)
            graph.replay()
    assert_same(models[1], models[0], rtol=1e-9, atol=1e-11)
    assert allocators[1].rank_pattern() == allocators[0].rank_pattern()


def test_a_capture_that_comes_too_early_is_refused():
    model, optimizer = begin()
    (batch,) = data(1)
    # So that the context is there.
    loss_of(model, batch).backward()
    with pytest.raises(InvalidStateError, match="capture: expected parameters, moments and hyperparameters as"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(model, optimizer, batch)
    torch.cuda.synchronize()
    optimizer.zero_grad()
    step(model, optimizer, batch)
    assert optimizer.global_step == 1


def test_a_run_in_a_stream_of_its_own():
    """Allocator and optimiser are made in one stream and used in another, whose work nobody waits for."""
    eager, other = begin(torch.float32)
    model, optimizer = begin(torch.float32)
    steps = data(12, torch.float32)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch in steps:
            step(model, optimizer, batch)
        del optimizer
    rubbish = [torch.full((4096,), float("nan"), device=DEVICE) for _ in range(200)]
    for batch in steps:
        step(eager, other, batch)
    torch.cuda.synchronize()
    assert_same(model, eager, rtol=0, atol=0)
    assert len(rubbish) == 200


def test_merging_in_a_stream_of_its_own():
    model = network(torch.float32).to(DEVICE)
    (batch,) = data(1, torch.float32)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        want = model(*batch).logits
        merge(model, safe_merge=True)
        torch.testing.assert_close(model(*batch).logits, want, rtol=1e-4, atol=1e-5)
        unmerge(model)
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)


def test_a_run_goes_on_from_files(tmp_path):
    model, optimizer = begin(torch.float32)
    steps = data(20, torch.float32)
    for batch in steps[:10]:
        step(model, optimizer, batch)
    save_adapter(model, tmp_path)
    save_training_state(tmp_path, optimizer=optimizer)
    again = network(torch.float32).to(DEVICE)
    load_adapter(again, tmp_path, adapter_name="default")
    # The head has no place in the adapter's files.
    again.head.load_state_dict(model.head.state_dict())
    resumed = AdamW(groups(again), RankAllocator(again), lr=1e-2)
    load_training_state(tmp_path, optimizer=resumed)
    assert resumed.global_step == 10
    for batch in steps[10:]:
        step(model, optimizer, batch)
        step(again, resumed, batch)
    assert_same(again, model, rtol=0, atol=0)
    assert resumed.allocator.digest() == optimizer.allocator.digest()


def test_compaction():
    model, optimizer = begin(torch.float64)
    steps = data(STEPS)
    for batch in steps:
        step(model, optimizer, batch)
    want = model(*steps[0]).logits
    optimizer.allocator.compact()
    torch.testing.assert_close(model(*steps[0]).logits, want, rtol=1e-11, atol=1e-12)
    ranks = optimizer.allocator.ranks()
    assert {path: layer.lora_E["default"].numel() for path, layer in optimizer.allocator.layers.items()} == ranks
    step(model, optimizer, steps[0])


def test_a_run_moves_to_the_device():
    """Made on the CPU, moved in the middle: averages and clocks come along."""
    (here, on_cpu), steps = cpu_run(), batches(12)
    model, optimizer = cpu_run()
    for number, batch in enumerate(steps):
        step(here, on_cpu, batch)
        if number == 6:
            model.to(DEVICE)
            for state in optimizer.state.values():
                for name, tensor in state.items():
                    state[name] = tensor.to(DEVICE)
        if number >= 6:
            batch = tuple(tensor.to(DEVICE) for tensor in batch)
        step(model, optimizer, batch)
    assert optimizer.global_step == 12
    assert_same(model.cpu(), here, rtol=1e-9, atol=1e-11)


def cpu_run() -> tuple[nn.Module, AdamW]:
    model = network()
    return model, AdamW(groups(model), RankAllocator(model), lr=1e-2)


def test_a_model_in_half_precision():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).to(DEVICE, torch.bfloat16)
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=2, tfinal=2, deltaT=1, total_step=10, target_modules="all-linear"
    )
    model = adapt(base, config)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], RankAllocator(model), lr=1e-2)
    x, wanted = torch.randn(64, 32, device=DEVICE).bfloat16(), torch.randn(64, 16, device=DEVICE).bfloat16()
    losses = []
    for _ in range(10):
        loss = (model(x) - wanted).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1].item() < losses[0].item()
    assert sum(optimizer.allocator.ranks().values()) == 6


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # PyTorch's own products want a setting of the environment.
            warnings.simplefilter("ignore")
            runs = [begin(torch.float32) for _ in range(2)]
            for model, optimizer in runs:
                for batch in data(8, torch.float32):
                    step(model, optimizer, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(runs[0][0], runs[1][0], rtol=0, atol=0)
