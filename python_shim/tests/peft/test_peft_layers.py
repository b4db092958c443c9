"""PEFT's layers, accelerated: beside PEFT's own on the same tensors, and what a user can do with them."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from pairs import SETTINGS, Network, accelerated, batches, layer_passes, layers, pair, peft_model, trained
from peft.helpers import disable_input_dtype_casting
from peft.tuners import adalora as theirs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adalora.peft
from adalora import InvalidArgumentError, UnsupportedError

# How far results may be from float64's.
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = {"conv": (5, 2, 4, 4), "fc1": (5, 12), "fc2": (3, 4, 8)}


def passes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = batch[0].detach().clone().requires_grad_(True)
    model.zero_grad()
    outputs = model(x, batch[1])
    outputs.loss.backward()
    return {"logits": outputs.logits.detach(), "x": x.grad} | {name: p.grad for name, p in trained(model).items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert found[name].dtype == value.dtype, name
            largest = value.abs().max().float().clamp(min=1e-3)
            assert (found[name] - value).abs().max().float() <= tolerance * largest, name


@pytest.mark.parametrize("path", list(SHAPES))
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_passes_are_pefts(dtype, autocast_adapter_dtype, path):
    theirs_, ours = (
        layers(model)[f"base_model.model.{path}"]
        for model in pair(dtype=dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    )
    assert ours.lora_A["default"].dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    x = torch.randn(SHAPES[path]).to(dtype)
    dy = torch.randn_like(theirs_(x))
    expected = layer_passes(theirs_.double(), x.double(), dy.double())
    for name, found, wanted in zip("yxAEB", layer_passes(ours, x, dy), expected, strict=True):
        assert found.dtype == (dtype if name in "yx" else ours.lora_A["default"].dtype)
        assert (found - wanted).abs().max() <= TYPES[dtype] * wanted.abs().max(), name


@pytest.mark.parametrize("path", list(SHAPES))
def test_passes_under_autocast_are_pefts(path):
    theirs_, ours = (layers(model)[f"base_model.model.{path}"] for model in pair())
    x = torch.randn(SHAPES[path])
    dy = torch.randn_like(theirs_(x))
    expected = layer_passes(theirs_, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer_passes(ours, x, dy)
    assert result[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in result[1:])
    for name, found, wanted in zip("yxAEB", result, expected, strict=True):
        assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("installed", [False, True])
def test_ranknum_is_no_parameter_to_train(installed, dtype):
    # PEFT lets the optimiser have what it has cast or moved.
    assert peft_model(dtype=dtype).base_model.model.fc1.ranknum["default"].requires_grad == (dtype != torch.float32)
    if installed:
        adalora.peft.install()
    try:
        model = peft_model(dtype=dtype)
    finally:
        adalora.peft.uninstall()
    model = adalora.peft.accelerate(model)
    model.add_adapter("second", peft.AdaLoraConfig(**SETTINGS, inference_mode=True))
    model.double()
    for layer in layers(model).values():
        for name in ("default", "second"):
            assert layer.ranknum[name].item() == 4
            assert not layer.ranknum[name].requires_grad


def test_an_optimizer_that_holds_ranknum_leaves_it_alone():
    model = peft_model(dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    (batch,) = batches(1, dtype=torch.float64)
    for number in range(3):
        model.base_model(*batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad(set_to_none=False)
        if number == 0:
            adalora.peft.accelerate(model)
            before = [layer.ranknum["default"].item() for layer in layers(model).values()]
            # PEFT's step has moved them.
            assert before != [4.0] * 4
    assert [layer.ranknum["default"].item() for layer in layers(model).values()] == before


def test_layers_on_meta_have_shapes():
    model = accelerated(peft_model()).to("meta")
    found = model(*(each.to("meta") for batch in batches(1) for each in batch))
    assert (found.logits.shape, found.logits.is_meta) == ((5, 3), True)
    found.loss.backward()
    layer = layers(model)["base_model.model.conv"]
    assert layer.lora_A["default"].grad.shape == (4, 18)


def test_nothing_about_the_model_changes():
    model = peft_model()
    text, params, keys = str(model), dict(model.named_parameters()), list(model.state_dict())
    buffers, optimizer = dict(model.named_buffers()), torch.optim.AdamW(trained(model).values())
    seen = []
    handle = layers(model)["base_model.model.fc1"].register_forward_hook(lambda *args: seen.append(args[2].shape))
    same = adalora.peft.accelerate(model)
    assert same is model
    assert str(model) == text
    assert list(model.state_dict()) == keys
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(p is params[name] for name, p in model.named_parameters())
    assert all(isinstance(each, theirs.AdaLoraLayer) for each in layers(model).values())
    (batch,) = batches(1)
    before = [p.detach().clone() for p in trained(model).values()]
    model.base_model(*batch).loss.backward()
    optimizer.step()
    assert seen == [(5, 8)]
    handle.remove()
    assert all(not torch.equal(p, old) for p, old in zip(trained(model).values(), before, strict=True))
    # A second time changes nothing.
    assert str(adalora.peft.accelerate(model)) == text


def test_models_copy_and_pickle():
    _, model = pair()
    (batch,) = batches(1)
    expected = model(*batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*batch).logits, expected)
        assert {type(each) for each in layers(other).values()} == {type(each) for each in layers(model).values()}
        assert other.base_model.rankallocator.model is other.base_model.model


def test_scalings_and_ranknum_are_what_they_are_now():
    theirs_, ours = pair()
    (batch,) = batches(1)
    for model in (theirs_, ours):
        found = layers(model)
        found["base_model.model.fc1"].scale_layer(2.5)
        found["base_model.model.conv"].scale_layer(0.5)
        found["base_model.model.fc2"].scale_layer(0.0)
        state = {"base_model.model.fc3.ranknum.default": torch.tensor([7.0])}
        model.load_state_dict(state, strict=False)
    assert_near(passes(ours, batch), passes(theirs_, batch), 1e-5)
    for path, layer in layers(ours).items():
        expected = layers(theirs_)[path].get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-7)
    # As PEFT writes it: autograd counts no change.
    for model in (theirs_, ours):
        for layer in layers(model).values():
            layer.ranknum["default"].data.fill_(5.0)
    assert_near(passes(ours, batch), passes(theirs_, batch), 1e-5)


def test_inputs_are_cast_only_where_that_is_enabled():
    model = accelerated(peft_model(dtype=torch.bfloat16))
    (batch,) = batches(1, dtype=torch.bfloat16)
    model(*batch)
    with disable_input_dtype_casting(model), pytest.raises(InvalidArgumentError, match=r"x: expected torch\.float32"):
        model(*batch)
    model = accelerated(peft_model())
    (batch,) = batches(1)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(*batch).logits, model(*batch).logits)


def test_dropout_drops_and_scales():
    model = accelerated(peft_model(lora_dropout=0.5))
    layer = layers(model)["base_model.model.fc1"]
    x = torch.randn(20000, 12)
    y = layer.eval()(x)
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), dropped)
    added = layer.base_layer(x)
    difference = (dropped - y).mean(0).abs().max()
    assert difference < 0.05 * (y - added).abs().max()
    # A linear map of x times a mask: its variance doubles where half of the elements are dropped.
    ratio = (dropped - added).var() / (y - added).var()
    assert 1.9 < ratio < 2.1
    # What somebody put in the place of PEFT's dropout is called.
    layer.lora_dropout["default"] = nn.Threshold(0.3, 0.0)
    torch.testing.assert_close(
        layer(x[:5]) - added[:5],
        layer.eval()._add(torch.zeros(5, 8), nn.functional.threshold(x[:5], 0.3, 0.0), None, False),
    )


def test_disabled_adapters_add_nothing():
    theirs_, ours = pair()
    (batch,) = batches(1)
    with ours.disable_adapter():
        found = ours(*batch).logits
    with theirs_.disable_adapter():
        assert torch.equal(found, theirs_(*batch).logits)
    assert not torch.equal(found, ours(*batch).logits)


def test_several_adapters():
    theirs_, ours = pair()
    more = {"total_step": 10, "init_lora_weights": False, "inference_mode": True, "lora_alpha": 3}
    for model in (theirs_, ours):
        torch.manual_seed(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("other", peft.AdaLoraConfig(target_modules=["fc1", "fc3"], init_r=3, target_r=1, **more))
            model.add_adapter("small", peft.AdaLoraConfig(target_modules=["conv", "fc1"], init_r=2, target_r=1, **more))
    (batch,) = batches(1)
    outputs = []
    for active in (["default"], ["other"], ["default", "other", "small"], ["small", "other"]):
        for model in (theirs_, ours):
            model.base_model.set_adapter(active)
        assert_near(passes(ours, batch), passes(theirs_, batch), 1e-5)
        outputs.append(ours(*batch).logits)
        # What is merged does as much.
        ours.merge_adapter()
        torch.testing.assert_close(ours(*batch).logits, outputs[-1], rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():
            # Of layers without these adapters.
            warnings.simplefilter("ignore")
            ours.unmerge_adapter()
    ours.delete_adapter("other")
    theirs_.delete_adapter("other")
    torch.testing.assert_close(ours(*batch).logits, theirs_(*batch).logits, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_repeats_the_forward_pass():
    model = accelerated(peft_model(lora_dropout=0.3))
    layer = layers(model)["base_model.model.fc1"]
    x = torch.randn(6, 12, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, layer.lora_A["default"], layer.lora_E["default"]]))
    for found, expected in zip(*grads, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", list(SHAPES))
def test_layers_compile_without_breaks(path):
    layer = layers(accelerated(peft_model()))[f"base_model.model.{path}"]
    x = torch.randn(SHAPES[path])
    dy = torch.randn_like(layer(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        params = [getattr(layer, f"lora_{factor}")["default"] for factor in "AEB"]
        own = x.clone().requires_grad_(True)
        y = compiled(own)
        found = [y.detach(), *torch.autograd.grad(y, [own, *params], dy)]
        for one, expected in zip(found, layer_passes(layer, x, dy), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
        # Noticed by what is compiled already.
        with torch.no_grad():
            layer.ranknum["default"].fill_(9.0)


# Merging


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("path", ["conv", "fc1", "fc2"])
def test_merging_is_pefts_and_unmerging_is_exact(dtype, path):
    theirs_, ours = (layers(model)[f"base_model.model.{path}"] for model in pair(dtype=dtype))
    weight = ours.get_base_layer().weight
    before = weight.detach().clone()
    for safe in (False, True, False):
        ours.merge(safe_merge=safe)
        assert ours.merged_adapters == ["default"]
        assert weight is ours.get_base_layer().weight
        ours.unmerge()
        assert torch.equal(weight, before)
        assert ours.merged_adapters == []
    ours.merge()
    theirs_.merge()
    # One rounding of the same sum.
    torch.testing.assert_close(weight, theirs_.get_base_layer().weight)
    assert not torch.equal(weight, before)
    assert "_unmerged_weight" not in ours.state_dict()
    with pytest.warns(UserWarning, match="already merged"):
        ours.merge()
    ours.unmerge()
    assert dict(ours.named_buffers()) == {}
    with pytest.warns(UserWarning, match="Already unmerged"):
        ours.unmerge()


def test_unmerging_subtracts_where_somebody_changed_the_base():
    layer = layers(accelerated(peft_model()))["base_model.model.fc1"]
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge()
    # As another adapter's layer around this one does.
    weight.data += 1
    layer.unmerge()
    torch.testing.assert_close(weight, before + 1)


def test_loading_while_merged_leaves_the_base():
    layer = layers(accelerated(peft_model()))["base_model.model.fc1"]
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.lora_A["default"].mul_(3)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_safe_merging_changes_nothing_where_a_value_is_not_finite():
    layer = layers(accelerated(peft_model()))["base_model.model.fc1"]
    before = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        layer.lora_A["default"][1, 2] = torch.nan
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert layer.merged_adapters == []


def test_safe_merging_changes_all_layers_or_none():
    model = accelerated(peft_model())
    found = layers(model)
    before = {path: layer.get_base_layer().weight.detach().clone() for path, layer in found.items()}
    with torch.no_grad():
        list(found.values())[-1].lora_A["default"][1, 2] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter default seems to be broken"):
            merge(safe_merge=True)
        assert layers(model) == found
        for path, layer in found.items():
            assert layer.merged_adapters == []
            assert torch.equal(layer.get_base_layer().weight, before[path]), path
    with torch.no_grad():
        list(found.values())[-1].lora_A["default"][1, 2] = 0
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged_adapters == ["default"] for layer in found.values())
    assert not any(torch.equal(layer.get_base_layer().weight, before[path]) for path, layer in found.items())


@pytest.mark.parametrize("path", ["conv", "fc1", "fc2"])
def test_delta_weight_has_pefts_gradient(path):
    theirs_, ours = (layers(model)[f"base_model.model.{path}"] for model in pair())
    found, wanted = (layer.get_delta_weight("default") for layer in (ours, theirs_))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours.get_delta_weight("default"), wanted.detach(), rtol=1e-5, atol=1e-6)
    dy = torch.randn(wanted.shape)
    grads = [
        torch.autograd.grad(delta, [layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]], dy)
        for delta, layer in ((found, ours), (wanted, theirs_))
    ]
    for g, expected in zip(*grads, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-5)


def test_merge_and_unload_gives_plain_layers():
    model = accelerated(peft_model())
    (batch,) = batches(1)
    expected = model(*batch).logits
    plain = model.merge_and_unload()
    assert type(plain.fc1) is nn.Linear
    torch.testing.assert_close(plain(*batch).logits, expected, rtol=1e-4, atol=1e-5)


# Convolutions


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("shape", [{"stride": 2}, {"padding": (1, 2)}, {"dilation": 2, "padding": "same"}])
def test_convolutions_compute_what_their_merged_weight_computes(mode, shape):
    torch.manual_seed(2)
    base = nn.Sequential(nn.Conv2d(3, 4, (3, 2), padding_mode=mode, **shape))
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=10, init_lora_weights=False)
    model = adalora.peft.accelerate(peft.get_peft_model(base, config))
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    assert not torch.equal(expected, base[0].get_base_layer()(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_grouped_convolutions_that_peft_made_are_refused_before_anything_is_changed():
    config = peft.AdaLoraConfig(target_modules=["0", "1"], total_step=10)
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), config)
    with pytest.raises(UnsupportedError, match=r"expected lora_A of 18 columns .* found 36"):
        adalora.peft.accelerate(model)
    assert type(model.base_model.model[0]) is theirs.SVDConv2d


def test_grouped_convolutions(tmp_path):
    torch.manual_seed(8)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 2))
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=10, init_r=3, target_r=1, init_lora_weights=False)
    adalora.peft.install()
    try:
        model = peft.get_peft_model(copy.deepcopy(base), config)
        layer = model.base_model.model[0]
        assert layer.lora_A["default"].shape == (3, 18)
        assert layer.lora_A["default"].requires_grad
        x = torch.randn(5, 4, 4, 4)
        expected = model(x)
        # Each group's channels meet A, and its own rows of B.
        A, E, B = layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]
        kernel = A.view(3, 2, 3, 3)
        h = [nn.functional.conv2d(part, kernel) for part in x.split(2, 1)]
        added = torch.cat(
            [
                torch.einsum("nrhw,or->nohw", each * E[:, :, None], rows)
                for each, rows in zip(h, B.split(3), strict=True)
            ],
            1,
        )
        wanted = base[2]((base[0](x) + added * 8 / (3 + 1e-5)).flatten(1))
        torch.testing.assert_close(expected, wanted, rtol=1e-4, atol=1e-4)
        expected.square().sum().backward()
        assert A.grad.any()
        model.save_pretrained(tmp_path)
        restored = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    finally:
        adalora.peft.uninstall()
    assert torch.equal(restored(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


# What is refused


def test_models_without_adapters_are_refused():
    with pytest.raises(InvalidArgumentError, match="found Network without one"):
        adalora.peft.accelerate(Network())
    lora = peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["fc1"]))
    with pytest.raises(InvalidArgumentError, match="AdaLoRA adapter"):
        adalora.peft.accelerate(lora)


def test_layers_of_other_makes_are_refused_before_anything_is_changed():
    class Other(theirs.SVDLinear):
        pass

    model = peft_model()
    last = layers(model)["base_model.model.fc3"]
    last.__class__ = Other
    with pytest.raises(UnsupportedError, match="Other"):
        adalora.peft.accelerate(model)
    assert type(layers(model)["base_model.model.fc1"]) is theirs.SVDLinear
    assert type(model.base_model) is theirs.AdaLoraModel


def test_layers_with_a_forward_of_their_own_are_refused_before_anything_is_changed():
    model = peft_model()
    last = layers(model)["base_model.model.fc3"]
    last.forward = last.forward
    with pytest.raises(UnsupportedError, match="found another one on the layer itself"):
        adalora.peft.accelerate(model)
    assert type(layers(model)["base_model.model.fc1"]) is theirs.SVDLinear
    del last.forward
    adalora.peft.accelerate(model)
    last.forward = last.forward
    adalora.peft.accelerate(model)


def test_unmerging_keeps_what_somebody_else_made_of_the_weight():
    layer = layers(accelerated(peft_model()))["base_model.model.fc1"]
    with torch.no_grad():
        layer.lora_E["default"].fill_(0.5)
    weight = layer.base_layer.weight
    for change in (lambda w: w.flip(0), lambda w: w.flip(1), lambda w: w + 1):
        layer.merge()
        with torch.no_grad():
            changed = change(weight.detach()).clone()
            weight.copy_(changed)
        layer.unmerge()
        torch.testing.assert_close(weight.detach(), changed - layer.get_delta_weight("default").detach())
