"""PEFT's quantized layers, accelerated: beside PEFT's own on the same tensors, in a run, in files, merged or not."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import bitsandbytes
import peft
import pytest
import torch
from pairs import SETTINGS, STEPS, layer_passes, layers, masks, step, trained
from peft.helpers import disable_input_dtype_casting
from peft.tuners import adalora as theirs
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import adalora.peft
from adalora import InvalidArgumentError, UnsupportedError

# How far results may be from PEFT's.
TYPES = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
CLASSES = {8: "SVDLinear8bitLt", 4: "SVDLinear4bit"}
ADAPTED = ["fc1", "fc2", "fc3"]


def quantized(base: nn.Linear, bits: int) -> nn.Linear:
    """A layer of bitsandbytes with another one's values."""
    shape = base.in_features, base.out_features
    if bits == 8:
        made = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(base.state_dict())
    # Moving it quantizes its weight.
    return made.to("cpu")


class Network(nn.Module):
    """Two quantized linear layers around a plain one, and a head that is trained whole."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = quantized(nn.Linear(64, 32), bits), nn.Linear(32, 64)
        self.fc3, self.head = quantized(nn.Linear(64, 32), bits), nn.Linear(32, 3)
        # As transformers marks a model.
        setattr(self, f"is_loaded_in_{bits}bit", True)

    def forward(self, x: Tensor, wanted: Tensor) -> SimpleNamespace:
        """The loss, as transformers' models return it."""
        logits = self.head(self.fc3(self.fc2(self.fc1(x).tanh()).tanh()).tanh())
        return SimpleNamespace(loss=(logits - wanted).square().mean(), logits=logits)


def base_network(bits: int) -> Network:
    torch.manual_seed(6)
    return Network(bits)


def adapted(bits: int, *, fast: bool, **changed) -> nn.Module:
    """The network with PEFT's adapters, the same ones each time."""
    config = peft.AdaLoraConfig(**{**SETTINGS, "target_modules": ADAPTED, "modules_to_save": ["head"], **changed})
    if fast:
        adalora.peft.install()
    try:
        base = base_network(bits)
        torch.manual_seed(7)
        return peft.get_peft_model(base, config)
    finally:
        adalora.peft.uninstall()


def batches() -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(7)
    return [(torch.randn(5, 64, generator=made), torch.randn(5, 3, generator=made)) for _ in range(STEPS)]


def first(model: nn.Module) -> nn.Module:
    return layers(model)["base_model.model.fc1"]


# Layers of bitsandbytes


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("bits", [8, 4])
def test_passes_are_pefts(bits, dtype):
    theirs_, ours = (first(adapted(bits, fast=fast)) for fast in (False, True))
    assert type(theirs_) is getattr(theirs, CLASSES[bits])
    assert type(ours) is adalora.peft.layers.CLASSES[type(theirs_)]
    assert repr(ours) == repr(theirs_)
    x, dy = torch.randn(5, 64, dtype=dtype), torch.randn(5, 32, dtype=dtype)
    for name, found, expected in zip("yxAEB", layer_passes(ours, x, dy), layer_passes(theirs_, x, dy), strict=True):
        # PEFT's 8-bit layer turns half precision into float32.
        assert found.dtype == (dtype if name in "yx" else torch.float32)
        assert (found - expected).abs().max() <= TYPES[dtype] * expected.abs().max(), name
    ours.enable_adapters(False)
    assert torch.equal(ours(x), ours.get_base_layer()(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_run_and_its_files_are_pefts(bits, tmp_path):
    theirs_, ours = (adapted(bits, fast=fast, init_lora_weights=True) for fast in (False, True))
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=5e-2) for model in (theirs_, ours)]
    for number, batch in enumerate(batches()):
        losses = [step(m, o, number, batch) for m, o in zip((theirs_, ours), optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        assert masks(ours) == masks(theirs_)
    assert sum(flags.count(False) for flags in masks(ours).values()) == SETTINGS["target_r"] * 3
    for (name, p), q in zip(trained(ours).items(), trained(theirs_).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    ours.save_pretrained(tmp_path)
    expected = ours(*batch).logits
    # Read by PEFT, and by this package.
    for fast in (False, True):
        if fast:
            adalora.peft.install()
        try:
            with warnings.catch_warnings():
                # PEFT warns of every pattern.
                warnings.simplefilter("ignore")
                loaded = peft.PeftModel.from_pretrained(base_network(bits), tmp_path).train()
        finally:
            adalora.peft.uninstall()
        torch.testing.assert_close(loaded.base_model.model(*batch).logits, expected, rtol=1e-5, atol=1e-6)
        ranks = [layer.lora_E["default"].shape[0] for layer in layers(loaded).values()]
        assert ranks == [flags.count(False) for flags in masks(ours).values()]


@pytest.mark.parametrize("dtype", list(TYPES))
def test_only_4_bit_layers_heed_that_inputs_are_not_cast(dtype):
    x = torch.randn(5, 64, dtype=dtype)
    for bits in CLASSES:
        model = adapted(bits, fast=True)
        expected = first(model)(x)
        with disable_input_dtype_casting(model):
            if bits == 8 or dtype == torch.float32:
                assert torch.equal(first(model)(x), expected)
            else:
                with pytest.raises(InvalidArgumentError, match=r"x: expected torch\.float32"):
                    first(model)(x)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_do_not_merge_and_nothing_is_changed(bits):
    model = adapted(bits, fast=True, target_modules=["fc2", "fc3"])
    plain = peft.AdaLoraConfig(target_modules=["fc2"], total_step=10, init_lora_weights=False, inference_mode=True)
    model.add_adapter("plain", plain)
    # PEFT has merged this one by the time it comes to the other.
    fc2 = layers(model)["base_model.model.fc2"]
    before = fc2.get_base_layer().weight.detach().clone()
    for safe_merge in (False, True):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(UnsupportedError, match=r"found Linear[48]bit.*, which is quantized"):
                merge(safe_merge=safe_merge)
            assert set(layers(model)) == {"base_model.model.fc2", "base_model.model.fc3"}
            assert fc2.merged_adapters == []
            assert torch.equal(fc2.get_base_layer().weight, before)
    # What no quantized layer has may be merged.
    model.merge_adapter(["plain"])
    assert fc2.merged_adapters == ["plain"]
    assert not torch.equal(fc2.get_base_layer().weight, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(fc2.get_base_layer().weight, before)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_that_peft_takes_for_plain_ones(bits):
    # It looks at what transformers marks.
    base = nn.Sequential(quantized(nn.Linear(64, 32), bits))
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False)
    theirs_ = peft.get_peft_model(base, config).base_model.model[0]
    assert type(theirs_) is theirs.SVDLinear
    ours = adalora.peft.accelerate(copy.deepcopy(theirs_))
    x, dy = torch.randn(5, 64), torch.randn(5, 32)
    for found, expected in zip(layer_passes(ours, x, dy), layer_passes(theirs_, x, dy), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = (layer.get_delta_weight("default") for layer in (ours, theirs_))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = ours.get_base_layer().weight
    before = weight.detach().clone()
    for safe_merge in (False, True):
        with pytest.raises(UnsupportedError, match=rf"shape \[32, 64\], found a \w+ of {weight.dtype} and shape"):
            ours.merge(safe_merge=safe_merge)
        assert ours.merged_adapters == []
        assert torch.equal(weight, before)


def test_weights_that_are_no_plain_tensors_do_not_merge():
    # As torchao's, which quantizes what a layer holds.
    base = nn.Sequential(nn.Linear(64, 32))
    model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False))
    layer = adalora.peft.accelerate(model).base_model.model[0]
    values = layer.get_base_layer().weight.detach()
    layer.get_base_layer().weight = nn.Parameter(TwoTensor(values, values.clone()), requires_grad=False)
    for merge in (layer.merge, model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="found a TwoTensor"):
            merge()


# Layers of GPTQ


class Quantized(nn.Module):
    """A linear layer that keeps its weight in eight bits."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = base.in_features, base.out_features
        self.scale = base.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (base.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.qweight * self.scale).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantized_layers_are_pefts(dtype):
    torch.manual_seed(6)
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False, lora_alpha=4)
    bare = Quantized(nn.Linear(12, 7))
    theirs_ = nn.Sequential(theirs.SVDQuantLinear(bare, "default", config, r=3, lora_alpha=4))
    ours = adalora.peft.accelerate(copy.deepcopy(theirs_))
    assert repr(ours) == repr(theirs_)
    x = torch.randn(5, 12, dtype=dtype)
    outputs, grads = [], []
    for model in (ours, theirs_):
        own = x.clone().requires_grad_(True)
        y = model(own)
        y.float().square().sum().backward()
        outputs.append(y)
        grads.append([own.grad, *(p.grad for p in (model[0].lora_A["default"], model[0].lora_E["default"]))])
    assert outputs[0].dtype == dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*outputs, **tolerance)
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).abs().max() <= tolerance["rtol"] * expected.abs().max()
    ours[0].enable_adapters(False)
    assert torch.equal(ours(x), bare(x))


def test_the_kernel_of_gptq_that_is_expected_is_named(monkeypatch):
    # Of several, PEFT adapts one.
    monkeypatch.setattr(adalora.peft.model, "get_gptqmodel_quant_linear", lambda *args, **kwargs: Quantized)
    base = nn.Sequential(nn.Bilinear(4, 4, 4))
    adalora.peft.install()
    try:
        with pytest.raises(UnsupportedError, match=r"or GPTQ: `Quantized`, which GPTQConfig\(backend="):
            peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0"], total_step=10))
    finally:
        adalora.peft.uninstall()


def test_layers_of_gptq_are_adapted_where_the_model_is_quantized(monkeypatch):
    # What PEFT asks gptqmodel for, whose kernels want a quantized model.
    for module in (adalora.peft.model, theirs.model):
        monkeypatch.setattr(module, "get_gptqmodel_quant_linear", lambda *args, **kwargs: Quantized)
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False)
    base = nn.Sequential(Quantized(nn.Linear(12, 7)), nn.Linear(7, 2))
    torch.manual_seed(2)
    expected = peft.get_peft_model(copy.deepcopy(base), config)
    adalora.peft.install()
    try:
        torch.manual_seed(2)
        model = peft.get_peft_model(base, config)
    finally:
        adalora.peft.uninstall()
    layer = model.base_model.model[0]
    assert type(layer) is adalora.peft.layers.SVDQuantLinear
    assert layer.quant_linear_module is layer.base_layer is base[0].base_layer
    x = torch.randn(5, 12)
    torch.testing.assert_close(model(x), expected(x))
