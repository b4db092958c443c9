"""Acceleration of every model that is made, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import peft
import pytest
import torch
from pairs import SETTINGS, Network, batches, layers, peft_model, step, trained
from peft.tuners import adalora as theirs
from torch import nn

import adalora.peft
from adalora import UnsupportedError
from adalora.peft.layers import SVDConv2d, SVDLinear
from adalora.peft.model import AdaLoraModel


@pytest.fixture
def installed() -> Iterator[None]:
    adalora.peft.install()
    # A second time changes nothing.
    adalora.peft.install()
    yield
    adalora.peft.uninstall()


def test_models_made_between_are_accelerated_and_others_are_not():
    before = vars(theirs.AdaLoraModel).copy(), theirs.model.RankAllocator
    old = peft_model()
    adalora.peft.install()
    new = peft_model()
    adalora.peft.uninstall()
    adalora.peft.uninstall()
    assert (vars(theirs.AdaLoraModel).copy(), theirs.model.RankAllocator) == before
    later = peft_model()
    for model in (old, later):
        assert type(model.base_model) is theirs.AdaLoraModel
        assert type(model.base_model.rankallocator) is theirs.RankAllocator
        assert {type(each) for each in layers(model).values()} == {theirs.SVDLinear, theirs.SVDConv2d}
    assert type(new.base_model) is AdaLoraModel
    assert type(new.base_model.rankallocator) is adalora.peft.RankAllocator
    assert {type(each) for each in layers(new).values()} == {SVDLinear, SVDConv2d}
    # All draw the same values in the same order.
    for p, q, r in zip(old.parameters(), new.parameters(), later.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert str(new) == str(old)
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (old, new)]
    for number, batch in enumerate(batches()):
        for model, optimizer in zip((old, new), optimizers, strict=True):
            step(model, optimizer, number, batch)
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_other_ways_to_make_a_model(installed):
    # Whoever imported the class before has the same one.
    config = peft.AdaLoraConfig(total_step=10, target_modules=["fc1"])
    assert type(theirs.AdaLoraModel(Network(), config, "default")) is AdaLoraModel
    assert type(peft.inject_adapter_in_model(config, Network()).fc1) is SVDLinear
    mixed = peft.PeftMixedModel(Network(), peft.LoraConfig(target_modules=["fc3"]), "lora")
    mixed.add_adapter("adalora", config)
    assert type(mixed.base_model.model.fc1) is SVDLinear
    assert not isinstance(mixed.base_model.model.fc3, SVDLinear)
    wrong = peft.AdaLoraConfig(total_step=10, target_modules=["conv"], deltaT=0)
    with pytest.raises(ValueError, match="deltaT: expected an integer, 1 or more, found 0"):
        mixed.add_adapter("wrong", wrong)


def test_a_mixed_model_stays_accelerated():
    config = peft.AdaLoraConfig(total_step=10, target_modules=["fc1"])
    mixed = peft.PeftMixedModel(Network(), config, "first")
    text = str(mixed)
    assert str(adalora.peft.accelerate(mixed)) == text
    mixed.add_adapter("second", peft.AdaLoraConfig(total_step=10, target_modules=["fc1", "conv"]))
    mixed.add_adapter("lora", peft.LoraConfig(target_modules=["fc3"]))
    assert type(mixed.base_model.model.fc1) is SVDLinear
    assert type(mixed.base_model.model.conv) is SVDConv2d
    assert type(mixed.base_model.model.fc3) is peft.tuners.lora.Linear


def test_adapters_that_are_added(installed):
    model = peft_model(inference_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", peft.AdaLoraConfig(**{**SETTINGS, "target_modules": ["fc1", "fc3"]}))
    model.set_adapter("second")
    optimizer = torch.optim.AdamW([p for name, p in trained(model).items() if "second" in name], lr=1e-2)
    for number, batch in enumerate(batches()):
        step(model, optimizer, number, batch)
    ranks = [int((layer.lora_E["second"] != 0).sum()) for layer in layers(model).values() if "second" in layer.lora_E]
    assert len(ranks) == 2
    assert sum(ranks) == 4
    assert model.base_model.trainable_adapter_name == "second"


def test_modules_that_cannot_be_adapted_are_refused(installed):
    base = nn.Embedding(3, 4)
    model = nn.Sequential(base)
    with pytest.raises(ValueError, match="is not supported") as caught:
        peft.get_peft_model(model, peft.AdaLoraConfig(total_step=10, target_modules=["0"]))
    assert isinstance(caught.value, UnsupportedError)
    assert model[0] is base


def test_layouts_are_set_with_pefts_warnings(installed):
    for name, transposed in (("fc1", False), ("fc2", True)):
        config = peft.AdaLoraConfig(total_step=10, target_modules=[name], fan_in_fan_out=not transposed)
        with pytest.warns(UserWarning, match=f"Setting fan_in_fan_out to {transposed}"):
            model = peft.get_peft_model(Network(), config)
        assert getattr(model.base_model.model, name).fan_in_fan_out == transposed


def test_unloading_gives_a_model_back_that_can_be_adapted_again(installed):
    base = Network()
    model = peft.get_peft_model(base, peft.AdaLoraConfig(total_step=10, target_modules=["fc1", "conv"]))
    bare = model.unload()
    assert type(bare.fc1) is nn.Linear
    again = peft.get_peft_model(bare, peft.AdaLoraConfig(total_step=10, target_modules=["fc1"]))
    assert type(again.base_model.model.fc1) is SVDLinear


def test_outputs_of_any_kind_pass(installed):
    class Returns(nn.Module):
        def __init__(self, outputs) -> None:
            super().__init__()
            self.fc, self.outputs = nn.Linear(2, 2), outputs

        def forward(self, x):
            self.fc(x)
            return self.outputs

    config = peft.AdaLoraConfig(total_step=10, target_modules=["fc"])
    for outputs in (torch.ones(2), (torch.ones(1), 2), {"loss": torch.ones(())}, SimpleNamespace(loss=None)):
        model = peft.get_peft_model(Returns(outputs), config)
        assert model.base_model(torch.ones(1, 2)) is outputs
