"""Compaction after the last mask: beside uncompacted runs and PEFT's own resizing, in files, with any optimiser."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft_runs import SETTINGS, TARGETS, TIGHT, Network, batches, groups, loss_of, network, trained, with_peft
from safetensors.torch import load_file
from torch import Tensor, nn

from adalora import CorruptDataError, InvalidArgumentError, InvalidStateError, UnsupportedError
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    RankReport,
    adapt,
    export_lora,
    load_adapter,
    load_training_state,
    merge,
    named_adapters,
    save_adapter,
    save_training_state,
    unmerge,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

LAST_MASK = SETTINGS["total_step"] - SETTINGS["tfinal"]
DATA = batches(SETTINGS["total_step"])
# fc1 keeps nothing, fc2 a few out of order, fc3 everything.
PATTERN = {"fc1": [False] * 4, "fc2": [False, True, False, True], "fc3": [True] * 4}


def optimizer_of(model: nn.Module, allocator: RankAllocator, **options) -> AdamW:
    return AdamW(groups(model), allocator, lr=1e-2, **options)


def train(model: nn.Module, optimizer: AdamW, begin: int, end: int, weight: float | None = None) -> Tensor:
    for step in range(begin, end):
        assert optimizer.global_step == step
        loss = loss_of(model, DATA[step])
        loss.backward()
        optimizer.allocator.orthogonality(weight)
        optimizer.step()
        optimizer.zero_grad()
    # Alive, with its graph, as in users' loops.
    return loss


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(*DATA[0]).logits


def finished(**options) -> tuple[nn.Module, AdamW]:
    """A run after its last mask, whose pattern is PATTERN."""
    model = network(**options)
    optimizer = optimizer_of(model, RankAllocator(model))
    train(model, optimizer, 0, LAST_MASK + 1)
    optimizer.allocator.set_rank_pattern(PATTERN)
    return model, optimizer


def shapes(model: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    return {path: [tuple(p.shape) for p in layer.triplets("default")] for path, layer in named_adapters(model).items()}


COMPACT = {"fc1": [(0, 6), (0, 1), (8, 0)], "fc2": [(2, 8), (2, 1), (8, 2)], "fc3": [(4, 8), (4, 1), (5, 4)]}


def test_everything_shrinks_and_nothing_else_changes():
    model, optimizer = finished()
    allocator = optimizer.allocator
    loss = loss_of(model, DATA[0])
    loss.backward()
    before = outputs(model)
    full = {name: (p, p.detach().clone(), p.grad.clone()) for name, p in trained(model).items()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, (p, _, _) in full.items()}
    standing = allocator.standing()
    assert standing.ranks == [0, 2, 4]

    allocator.compact()
    assert shapes(model) == COMPACT
    torch.testing.assert_close(outputs(model), before, **TIGHT)
    for name, p in trained(model).items():
        old, value, grad = full[name]
        assert p is old
        layer, _, rest = name.partition(".lora_")
        if rest:
            kept = torch.tensor(PATTERN[layer])
            take = (lambda t, kept=kept: t[:, kept]) if rest[0] == "B" else (lambda t, kept=kept: t[kept])
            value, grad, moments[name] = take(value), take(grad), take(moments[name])
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)
        assert torch.equal(optimizer.state[p]["exp_avg"], moments[name])
        assert optimizer.state[p]["exp_avg_sq"].shape == p.shape
    after = allocator.standing()
    assert allocator.rank_pattern() == PATTERN
    assert allocator.ranks() == {"fc1": 0, "fc2": 2, "fc3": 4}
    assert allocator.initial_ranks == [4, 4, 4]
    for name in ("ranks", "adam_steps", "last_step", "skipped", "selections", "budget", "live_triplets", "is_final"):
        assert getattr(after, name) == getattr(standing, name), name
    assert [allocator.budget(k) for k in range(30)] == [RankAllocator(network()).budget(k) for k in range(30)]
    assert {name: len(scores) for name, scores in allocator.scores().items()} == {"fc1": 0, "fc2": 2, "fc3": 4}
    for layer in named_adapters(model).values():
        assert layer.scaling("default") == 6 / (4 + 1e-5)

    # Once more is nothing.
    values = {name: p.detach().clone() for name, p in trained(model).items()}
    allocator.compact()
    assert all(torch.equal(p, values[name]) for name, p in trained(model).items())
    assert allocator.rank_pattern() == PATTERN
    assert loss.grad_fn is not None


def test_training_goes_on_as_if_nothing_was_cut():
    """Without penalty and decay, masked triplets have no part in a run that was not compacted either."""
    runs = []
    for compacts in (False, True):
        model = network(lora_dropout=0.0)
        optimizer = AdamW(trained(model).values(), RankAllocator(model), lr=1e-2, weight_decay=0.0)
        loss = train(model, optimizer, 0, LAST_MASK + 1)
        if compacts:
            optimizer.allocator.compact()
            assert optimizer.allocator.ranks() == runs[0][1].allocator.ranks()
        last = train(model, optimizer, LAST_MASK + 1, SETTINGS["total_step"], weight=0.0)
        runs.append((model, optimizer))
        del loss, last
    (whole, other), (compacted, own) = runs
    torch.testing.assert_close(outputs(compacted), outputs(whole), **TIGHT)
    pattern = own.allocator.rank_pattern()
    assert pattern == other.allocator.rank_pattern()
    assert sum(map(sum, pattern.values())) == SETTINGS["target_r"] * 3
    for path, layer in named_adapters(compacted).items():
        kept = torch.tensor(pattern[path])
        A, E, B = whole.get_submodule(path).triplets("default")
        for found, expected in zip(layer.triplets("default"), (A[kept], E[kept], B[:, kept]), strict=True):
            torch.testing.assert_close(found, expected, **TIGHT)


def test_beside_pefts_own_resizing():
    """PEFT's model, resized by PEFT, trained by PyTorch's AdamW with PEFT's penalty and clipping by the whole norm."""
    ours, optimizer = finished()
    optimizer.allocator.compact()
    theirs = with_peft(network())
    for name, p in trained(theirs).items():
        layer, _, rest = name.partition(".lora_")
        if not rest:
            p.data.copy_(trained(ours)[name])
            continue
        kept = torch.tensor(PATTERN[layer])
        with torch.no_grad():
            (p.T if rest[0] == "B" else p)[kept] = (lambda q, b=rest[0]: q.T if b == "B" else q)(trained(ours)[name])
    with torch.no_grad():
        for path, kept in PATTERN.items():
            module = theirs.base_model.model.get_submodule(path)
            module.lora_E["default"][~torch.tensor(kept)] = 0
    theirs.base_model.resize_modules_by_rank_pattern(
        {f"{path}.lora_E.default": kept for path, kept in PATTERN.items()}, "default"
    )
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name or "head" in name)
    torch.testing.assert_close(outputs(theirs.base_model.model), outputs(ours), **TIGHT)
    # PEFT's penalty of an empty factor is the same zero.
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    for group, own in zip(other.param_groups, optimizer.param_groups, strict=True):
        for p, q in zip(group["params"], own["params"], strict=True):
            other.state[p] = {key: value.clone() for key, value in optimizer.state[q].items()}
    for step in range(LAST_MASK + 1, SETTINGS["total_step"]):
        loss_of(theirs, DATA[step]).backward()
        expected = nn.utils.clip_grad_norm_(trained(theirs).values(), 0.1)
        other.step()
        other.zero_grad()

        loss_of(ours, DATA[step]).backward()
        optimizer.allocator.orthogonality()
        torch.testing.assert_close(optimizer.clip_grad_norm_(0.1), expected, **TIGHT)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(outputs(ours), outputs(theirs.base_model.model), **TIGHT)
    for name, p in trained(ours).items():
        torch.testing.assert_close(p, trained(theirs)[name], **TIGHT)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
        lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=1e-2),
        lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.5),
    ],
    ids=["amsgrad", "momentum", "plain", "rmsprop"],
)
def test_other_optimisers(make):
    runs = []
    for compacts in (False, True):
        model = network()
        allocator = RankAllocator(model)
        optimizer = make(list(trained(model).values()))
        for step in range(SETTINGS["total_step"]):
            loss = loss_of(model, DATA[step])
            loss.backward()
            optimizer.step()
            allocator.update_and_allocate(step)
            optimizer.zero_grad()
            if step == LAST_MASK and compacts:
                allocator.compact(optimizer)
                assert loss.requires_grad
        runs.append((model, allocator))
        for p in trained(model).values():
            for value in optimizer.state[p].values():
                assert not isinstance(value, Tensor) or value.shape in (p.shape, ())
    (whole, other), (compacted, own) = runs
    assert own.rank_pattern() == other.rank_pattern()
    assert sum(own.ranks().values()) == sum(
        layer.lora_E["default"].shape[0] for layer in named_adapters(compacted).values()
    )
    torch.testing.assert_close(outputs(compacted), outputs(whole), **TIGHT)


def test_refusals_change_nothing():
    model = network()
    optimizer = optimizer_of(model, RankAllocator(model))
    train(model, optimizer, 0, 8)
    with pytest.raises(InvalidStateError, match=r"compact: expected a final pattern, .* at step 24"):
        optimizer.allocator.compact()
    assert shapes(model)["fc1"] == [(4, 6), (4, 1), (8, 4)]

    model = network()
    allocator = RankAllocator(model)
    sgd = torch.optim.SGD(trained(model).values(), lr=1e-2, momentum=0.9)
    factored = torch.optim.Adafactor(trained(model).values(), lr=1e-3)
    loss_of(model, DATA[0]).backward()
    sgd.step()
    allocator.update_and_allocate(0)
    allocator.set_rank_pattern(PATTERN, final=True)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    with pytest.raises(InvalidArgumentError, match=r"optimizers: expected all .* found none that is the SGD"):
        allocator.compact()
    factored.step()
    allocator.update_and_allocate(1)
    with pytest.raises(UnsupportedError, match=r"found 'row_var' of Adafactor for fc1.A \[4, 6\] with shape \[4, 1\]"):
        allocator.compact(sgd, factored)
    assert shapes(model)["fc2"] == [(4, 8), (4, 1), (8, 4)]
    assert allocator.state_dict().keys() == RankAllocator(network()).state_dict().keys()
    del factored
    for name, p in trained(model).items():
        assert p.shape == before[name].shape
        assert sgd.state[p]["momentum_buffer"].shape == p.shape


def test_patterns_after_compaction():
    model, optimizer = finished()
    allocator = optimizer.allocator
    allocator.compact()
    with pytest.raises(InvalidArgumentError, match=r"pattern\['fc1'\]\[1\]: expected False for a triplet that compact"):
        allocator.set_rank_pattern({**PATTERN, "fc1": [False, True, False, False]})
    with pytest.raises(InvalidArgumentError, match=r"pattern\['fc2'\]: expected 4 flags, found 2"):
        allocator.set_rank_pattern({**PATTERN, "fc2": [True, True]})
    # Fewer of those that are left, and compacted again.
    fewer = {**PATTERN, "fc2": [False, False, False, True], "fc3": [False, True, True, True]}
    allocator.set_rank_pattern(fewer)
    assert allocator.rank_pattern() == fewer
    before = outputs(model)
    allocator.compact()
    assert allocator.rank_pattern() == fewer
    assert allocator.initial_ranks == [4, 4, 4]
    assert shapes(model)["fc2"] == [(1, 8), (1, 1), (8, 1)]
    torch.testing.assert_close(outputs(model), before, **TIGHT)
    train(model, optimizer, LAST_MASK + 1, SETTINGS["total_step"])
    # A new run of what is left.
    allocator.reset()
    standing = allocator.standing()
    assert standing.is_final
    assert standing.adam_steps == [0, 0, 0]
    assert allocator.rank_pattern() == fewer


def test_merging_and_copying():
    model, optimizer = finished()
    before = outputs(model)
    optimizer.allocator.compact()
    for backup in (True, False):
        weights = [layer.base_layer.weight.clone() for layer in named_adapters(model).values()]
        merge(model, backup=backup)
        torch.testing.assert_close(outputs(model), before, **TIGHT)
        unmerge(model)
        torch.testing.assert_close(outputs(model), before, **TIGHT)
        for layer, weight in zip(named_adapters(model).values(), weights, strict=True):
            torch.testing.assert_close(layer.base_layer.weight, weight, **TIGHT)
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
    assert "r=2" in repr(model.fc2)
    # Compacted while it is merged, an adapter comes out as it went in.
    model, optimizer = finished()
    merge(model, backup=False)
    optimizer.allocator.compact()
    unmerge(model)
    torch.testing.assert_close(outputs(model), before, **TIGHT)


def test_a_report_of_a_compacted_run():
    model = network()
    optimizer = optimizer_of(model, RankAllocator(model))
    report = RankReport(optimizer.allocator)
    for step in range(LAST_MASK + 1):
        train(model, optimizer, step, step + 1)
        report.record(step)
    text = report.text()
    optimizer.allocator.compact()
    assert report.text() == text
    assert RankReport(optimizer.allocator).text().count("of 12") == text.count("of 12")


@pytest.mark.parametrize("alpha", [0, 6])
def test_files(tmp_path, alpha):
    """PEFT loads what is left, with the scaling that it had; so do we, to compute and to train."""
    model, optimizer = finished(lora_alpha=alpha)
    optimizer.allocator.compact()
    expected = outputs(model)
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["rank_pattern"] == {f"{path}.lora_E": kept for path, kept in PATTERN.items()}
    assert values["lora_alpha"] == (alpha or 4)
    assert values["init_r"] == 4
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [list(saved[f"base_model.model.fc2.lora_{name}"].shape) for name in "AEB"] == [[2, 8], [2, 1], [8, 2]]

    def base() -> Network:
        bare = Network()
        own = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
        bare.load_state_dict({name: own[name] for name in bare.state_dict()})
        return bare

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(outputs(theirs.base_model.model), expected, **TIGHT)

    to_compute = load_adapter(base(), tmp_path)
    assert shapes(to_compute) == COMPACT
    assert torch.equal(outputs(to_compute), expected)
    merge(to_compute)
    torch.testing.assert_close(outputs(to_compute), expected, **TIGHT)
    to_train = load_adapter(base(), tmp_path, is_trainable=True)
    assert shapes(to_train)["fc1"] == [(4, 6), (4, 1), (8, 4)]
    torch.testing.assert_close(outputs(to_train), expected, **TIGHT)

    # Saved again, the same files; loaded over what is there, the same adapter.
    save_adapter(to_compute, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    fresh = network(lora_alpha=alpha)
    fresh.head.load_state_dict(model.head.state_dict())
    for each in (model, fresh):
        for layer in named_adapters(each).values():
            with torch.no_grad():
                layer.lora_E["default"].fill_(7)
        load_adapter(each, tmp_path, is_trainable=True)
        torch.testing.assert_close(outputs(each), expected, **TIGHT)
    # Not what has other triplets.
    save_adapter(network(lora_alpha=alpha), tmp_path / "whole")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(InvalidArgumentError, match=r"rank_pattern: expected the triplets that the compacted .* null"):
        load_adapter(model, tmp_path / "whole")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**values, "rank_pattern": {**values["rank_pattern"], "fc2.lora_E": [True, True, False, False]}})
    )
    with pytest.raises(InvalidArgumentError, match=r"rank_pattern: expected the triplets that the compacted .* others"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("alpha", [0, 6])
def test_exported_to_plain_lora(tmp_path, alpha):
    model, optimizer = finished(lora_alpha=alpha)
    model.eval()
    before = outputs(model)
    optimizer.allocator.compact()
    export_lora(model, tmp_path)
    bare = Network()
    state = {name.replace(".base_layer", ""): v for name, v in model.state_dict().items() if ".lora_" not in name}
    bare.load_state_dict(state)
    plain = peft.PeftModel.from_pretrained(bare, tmp_path)
    torch.testing.assert_close(outputs(plain.eval()), before, rtol=1e-5, atol=1e-5)


def resumed(folder, begin_compacted: bool, own_optimizer: bool) -> dict[str, Tensor]:
    """What a run that stopped compacted becomes when it goes on in objects made anew."""
    model = network()
    if begin_compacted:
        RankAllocator(model).set_rank_pattern(PATTERN, final=True)
        allocator = RankAllocator(model)
        allocator.set_rank_pattern(PATTERN, final=True)
        allocator.compact()
    load_adapter(model, folder, is_trainable=True)
    model.head.load_state_dict(torch.load(folder / "head.pt"))
    allocator = RankAllocator(model)
    if own_optimizer:
        optimizer = optimizer_of(model, allocator)
        load_training_state(folder, optimizer=optimizer)
    else:
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        load_training_state(folder, allocator=allocator, optimizer=optimizer)
    assert shapes(model) == COMPACT
    assert allocator.rank_pattern() == PATTERN
    go_on(model, optimizer, allocator, allocator.standing().last_step + 1)
    return {**model.state_dict(), **allocator.state_dict()}


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, allocator: RankAllocator, begin: int) -> None:
    for step in range(begin, SETTINGS["total_step"]):
        loss_of(model, DATA[step]).backward()
        allocator.orthogonality()
        optimizer.step()
        if not isinstance(optimizer, AdamW):
            allocator.update_and_allocate(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("own_optimizer", [True, False])
def test_a_compacted_run_resumes_bit_for_bit(tmp_path, own_optimizer):
    model = network()
    allocator = RankAllocator(model)
    optimizer = optimizer_of(model, allocator) if own_optimizer else torch.optim.AdamW(groups(model), lr=1e-2)
    for step in range(LAST_MASK + 3):
        loss_of(model, DATA[step]).backward()
        allocator.orthogonality()
        optimizer.step()
        if not own_optimizer:
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
        if step == LAST_MASK:
            allocator.set_rank_pattern(PATTERN)
            allocator.compact(optimizer)
    save_adapter(model, tmp_path)
    objects = {"optimizer": optimizer} if own_optimizer else {"optimizer": optimizer, "allocator": allocator}
    save_training_state(tmp_path, **objects)
    torch.save(model.head.state_dict(), tmp_path / "head.pt")
    go_on(model, optimizer, allocator, LAST_MASK + 3)
    expected = {**model.state_dict(), **allocator.state_dict()}
    for begin_compacted in (False, True):
        found = resumed(tmp_path, begin_compacted, own_optimizer)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


def test_states_that_do_not_fit():
    _, optimizer = finished()
    whole = {name: value.clone() for name, value in optimizer.allocator.state_dict().items()}
    optimizer.allocator.compact()
    state = optimizer.allocator.state_dict()
    with pytest.raises(
        InvalidArgumentError, match=r"rank_pattern: expected the state of a run compacted .* not compac"
    ):
        optimizer.allocator.load_state_dict(whole)
    other = {**state, "rank_pattern": ~state["rank_pattern"]}
    with pytest.raises(InvalidArgumentError, match=r"rank_pattern: .* found one that kept other triplets"):
        optimizer.allocator.load_state_dict(other)

    fresh = network()
    allocator = RankAllocator(fresh)
    before = fresh.state_dict()
    damaged = state["state"].clone()
    damaged[40] ^= 1
    for wrong, error, text in (
        ({**state, "rank_pattern": state["rank_pattern"][1:]}, InvalidArgumentError, "expected 12 flags"),
        (other, InvalidArgumentError, r"exp_avg_ipt.fc1.A: expected shape \[4, 6\], found \[0, 6\]"),
        ({**state, "budget_unit": torch.tensor(1)}, InvalidArgumentError, "budget_unit"),
        ({**state, "state": damaged}, CorruptDataError, "checksum"),
        ({**state, "state": whole["state"][:-8]}, CorruptDataError, "bytes"),
        ({k: v for k, v in state.items() if k != "exp_avg_unc.fc2.B"}, InvalidArgumentError, "exp_avg_unc.fc2.B"),
    ):
        with pytest.raises(error, match=text):
            allocator.load_state_dict(wrong)
        assert fresh.state_dict().keys() == before.keys()
        assert all(value.shape == before[name].shape for name, value in fresh.state_dict().items())
        assert fresh.adalora_config["default"].rank_pattern is None
        assert not allocator.standing().is_final
        assert "rank_pattern" not in allocator.state_dict()
    allocator.load_state_dict(state)
    assert shapes(fresh) == COMPACT
    assert allocator.rank_pattern() == PATTERN
    assert allocator.standing().last_step == LAST_MASK
    assert RankAllocator(fresh).rank_pattern() == PATTERN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_share_an_input(dtype):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) + 2 * self.key(x) + 3 * self.value(x)

    torch.manual_seed(1)
    config = AdaLoraConfig(**{**SETTINGS, "target_modules": ["query", "key", "value"]})
    model = adapt(Attention().to(dtype), config, autocast_adapter_dtype=False)
    allocator = RankAllocator(model)
    pattern = dict(zip(["query", "key", "value"], PATTERN.values(), strict=True))
    allocator.set_rank_pattern(pattern, final=True)
    x = torch.randn(3, 6).to(dtype)
    before = model(x)
    allocator.compact()
    after = model(x)
    torch.testing.assert_close(after, before)
    after.sum().backward()
    assert model.value.lora_A["default"].grad.shape == (4, 6)
    assert model.query.lora_B["default"].grad.shape == (6, 0)


def test_parameters_as_budget():
    """Fewer parameters may be left than the target says: the longest prefix that fits."""
    model = network()
    allocator = RankAllocator(model, budget_unit="parameters")
    optimizer = optimizer_of(model, allocator)
    train(model, optimizer, 0, LAST_MASK + 1)
    standing = allocator.standing()
    allocator.compact()
    assert allocator.standing().budget == standing.budget == allocator.budget(29).budget
    assert standing.live_parameters <= standing.budget
    count = sum(p.numel() for layer in named_adapters(model).values() for p in layer.triplets("default"))
    assert count == standing.live_parameters == allocator.standing().live_parameters
    train(model, optimizer, LAST_MASK + 1, SETTINGS["total_step"])


def test_a_model_of_pefts_own_layers():
    """Layers of any make, whose scaling is their own."""
    ours, theirs = network(), with_peft(network())
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name or "head" in name)
    layers = {path: theirs.base_model.model.get_submodule(path) for path in TARGETS}
    allocator = RankAllocator.over(layers, ours.adalora_config["default"])
    allocator.set_rank_pattern(PATTERN, final=True)
    before = outputs(theirs.base_model.model)
    allocator.compact()
    torch.testing.assert_close(outputs(theirs.base_model.model), before, **TIGHT)
    assert layers["fc2"].lora_A["default"].shape == (2, 8)
