"""Adapted convolutions beside PEFT's: outputs, whole training runs with their masks, files both ways; and base layers
of bitsandbytes.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from peft_runs import LOOSE, SETTINGS, TIGHT, assert_same, loss_of, peft_pattern, trained, with_parameters_of
from torch import Tensor, nn

from adalora.errors import UnsupportedError
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    adapt,
    get_config,
    load_adapter,
    merge,
    named_adapters,
    save_adapter,
)

TARGETS = ["first", "second", "third", "last"]
STEPS = 24
RUN = {**SETTINGS, "target_modules": TARGETS, "total_step": STEPS}


class Pictures(nn.Module):
    """Three convolutions of different geometry and a linear layer, all adapted, and a head that is trained whole."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1, dtype=dtype)
        self.second = nn.Conv2d(6, 6, (1, 3), padding="same", dilation=2, bias=False, dtype=dtype)
        self.third = nn.Conv2d(6, 8, 1, dtype=dtype)
        self.last = nn.Linear(8, 5, dtype=dtype)
        self.head = nn.Linear(5, 3, dtype=dtype)

    def forward(self, x: Tensor, wanted: Tensor) -> SimpleNamespace:
        """The loss, as transformers' models return it."""
        for layer in (self.first, self.second, self.third):
            x = layer(x).tanh()
        logits = self.head(self.last(x.mean(dim=(-1, -2))).tanh())
        return SimpleNamespace(loss=(logits - wanted).square().mean(), logits=logits)


def pictures(dtype: torch.dtype = torch.float64, **changed) -> Pictures:
    torch.manual_seed(1)
    model = adapt(Pictures(dtype), AdaLoraConfig(**{**RUN, **changed}))
    model.head.requires_grad_(True)
    return model


def under_peft(ours: Pictures, **changed) -> nn.Module:
    """The same network under PEFT, with the same parameters."""
    bare = Pictures(ours.head.weight.dtype)
    theirs = peft.get_peft_model(bare, peft.AdaLoraConfig(**{**RUN, **changed}), autocast_adapter_dtype=False)
    return with_parameters_of(ours, theirs)


def batches(dtype: torch.dtype, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(7)
    return [
        (torch.randn(4, 3, 9, 8, generator=made).to(dtype), torch.randn(4, 3, generator=made).to(dtype))
        for _ in range(steps)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_pefts(dtype, lora_dropout):
    ours = pictures(dtype, lora_dropout=lora_dropout)
    # A linear layer of ours drops by the library's generator, PEFT's by PyTorch's.
    ours.last.lora_dropout["default"] = 0.0
    theirs = under_peft(ours, lora_dropout=lora_dropout)
    theirs.base_model.model.last.lora_dropout["default"] = nn.Identity()
    (batch,) = batches(dtype, 1)
    losses = []
    for model in (ours, theirs.base_model.model):
        torch.manual_seed(2)
        loss = model(*batch).loss
        loss.backward()
        losses.append(loss)
    tolerance = TIGHT if dtype == torch.float64 else LOOSE
    torch.testing.assert_close(*losses, **tolerance)
    expected = trained(theirs)
    for name, p in trained(ours).items():
        torch.testing.assert_close(p.grad, expected[name].grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fused", [True, False])
def test_a_training_run_is_pefts(dtype, fused):
    ours = pictures(dtype)
    theirs = under_peft(ours)
    tolerance = TIGHT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    options = {"lr": 2e-2, "weight_decay": 0.1}
    reference = torch.optim.AdamW(trained(theirs).values(), **options)
    allocator = RankAllocator(ours)
    params = list(trained(ours).values())
    optimizer = AdamW(params, allocator, **options) if fused else torch.optim.AdamW(params, **options)
    masks = set()
    for step, batch in enumerate(batches(dtype)):
        loss_of(theirs, batch).backward()
        reference.step()
        theirs.base_model.update_and_allocate(step)
        reference.zero_grad()

        ours(*batch).loss.backward()
        allocator.orthogonality()
        optimizer.step()
        if not fused:
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
        assert_same(ours, theirs, **tolerance)
        if allocator.budget(step).masks:
            masks.add(tuple(map(tuple, allocator.rank_pattern().values())))
    assert len(masks) > 2
    assert allocator.rank_pattern() == peft_pattern(theirs)
    assert sum(allocator.ranks().values()) == 2 * len(TARGETS)


def test_delta_weights_and_merged_weights_are_pefts():
    ours = pictures()
    theirs = under_peft(ours).base_model.model
    for name in TARGETS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine.get_delta_weight("default"), other.get_delta_weight("default"), **TIGHT)
        mine.merge()
        other.merge()
        torch.testing.assert_close(mine.weight, other.weight, **TIGHT)


def test_files_pass_both_ways(tmp_path):
    ours = pictures()
    plain = Pictures()
    base = {name.replace(".base_layer", ""): value for name, value in ours.state_dict().items() if "lora_" not in name}
    plain.load_state_dict(base)
    (batch,) = batches(torch.float64, 1)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours", autocast_adapter_dtype=False)
    theirs.base_model.model.double()
    expected = ours(*batch).logits
    torch.testing.assert_close(theirs.base_model.model(*batch).logits, expected, **TIGHT)

    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert torch.equal(again(*batch).logits, expected)
    assert get_config(again, "default").target_modules == set(TARGETS)


# Base layers of bitsandbytes.


def quantized(kind: str) -> nn.Module:
    import bitsandbytes

    torch.manual_seed(3)
    linear = nn.Linear(64, 16)
    if kind == "8bit":
        made = bitsandbytes.nn.Linear8bitLt(64, 16, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(64, 16, compute_dtype=torch.float32, quant_type=kind)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


@pytest.mark.parametrize("kind", ["8bit", "nf4", "fp4"])
def test_layers_of_bitsandbytes(kind, tmp_path):
    base = quantized(kind)
    model = nn.Sequential(base, nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 64, requires_grad=True)
    plain = base(x)
    adapt(model, AdaLoraConfig(**{**RUN, "target_modules": "all-linear"}))
    layer = model[0]
    assert not base.weight.is_floating_point()
    A, E, B = (p.detach() for p in layer.triplets("default"))
    assert A.dtype == torch.float32
    y = layer(x)
    torch.testing.assert_close(y, plain + x @ (layer.scaling("default") * B @ (E * A)).T)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (before,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(dx - before, (layer.scaling("default") * B @ (E * A)).sum(dim=0).expand(5, 64))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.triplets("default"))
    with pytest.raises(UnsupportedError, match=r"0: merge: .*, found Linear"):
        merge(model)
    assert not named_adapters(model)["2"].merged_adapters

    save_adapter(model, tmp_path)
    again = load_adapter(nn.Sequential(quantized(kind), nn.Tanh(), nn.Linear(16, 4)), tmp_path)
    again[2].load_state_dict(model[2].state_dict())
    assert torch.equal(again(x), model(x))
