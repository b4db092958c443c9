"""All kinds of layers in one model, one of them a layer of which the output alone is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adalora.errors import UnsupportedError
from adalora.torch import (
    AdaLoraConfig,
    SVDConv1d,
    SVDConv2d,
    SVDEmbedding,
    SVDLinear,
    adapt,
    disable_adapters,
    merge,
    merge_and_unload,
    named_adapters,
    unload,
    unmerge,
)


class Int8Linear(nn.Module):
    """A linear layer that holds its weight in eight bits, with one scale for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scale).to(x.dtype).T


class Network(nn.Module):
    """Tokens to vectors to a picture to numbers."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        options = {"dtype": dtype}
        self.words = nn.Embedding(11, 8, padding_idx=3, **options)
        self.along = nn.Conv1d(8, 6, 3, padding=1, groups=2, **options)
        self.picture = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect", **options)
        self.depth = nn.Conv2d(4, 8, (3, 1), padding="same", groups=4, **options)
        self.out = nn.Linear(8, 5, **options)
        self.quantized = Int8Linear(nn.Linear(5, 4, **options))
        self.head = nn.Linear(4, 2, **options)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.along(self.words(ids).transpose(1, 2)).tanh()
        x = self.picture(x.view(len(ids), 2, 3, -1)).tanh()
        x = self.depth(x).tanh().mean(dim=(-1, -2))
        return self.head(self.quantized(self.out(x).tanh()).tanh())


KINDS = {
    "words": SVDEmbedding,
    "along": SVDConv1d,
    "picture": SVDConv2d,
    "depth": SVDConv2d,
    "out": SVDLinear,
    "quantized": SVDLinear,
}
FLOAT = [name for name in KINDS if name != "quantized"]


def config(**changed) -> AdaLoraConfig:
    options = {"init_r": 3, "target_r": 1, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 16, "lora_alpha": 5}
    return AdaLoraConfig(**{**options, "init_lora_weights": False, "target_modules": list(KINDS), **changed})


def network(dtype: torch.dtype = torch.float64, **changed) -> Network:
    torch.manual_seed(1)
    return adapt(Network(dtype), config(**changed))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(11, (4, 10), generator=torch.Generator().manual_seed(2))


def test_each_type_gets_its_kind(ids):
    model = network()
    assert {path: type(layer) for path, layer in named_adapters(model).items()} == KINDS
    assert {path: tuple(layer.lora_A["default"].shape) for path, layer in named_adapters(model).items()} == {
        "words": (3, 11),
        "along": (3, 12),
        "picture": (3, 18),
        "depth": (3, 3),
        "out": (3, 8),
        "quantized": (3, 5),
    }
    plain = Network()
    plain.load_state_dict(unload(network()).state_dict())
    with disable_adapters(model):
        assert torch.equal(model(ids), plain(ids))
    assert not torch.allclose(model(ids), plain(ids))
    linear = adapt(Network(), config(target_modules="all-linear"))
    assert list(named_adapters(linear)) == ["out", "head"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_delta_weights_are_what_the_forward_pass_adds(ids, dtype):
    model = network(dtype, target_modules=FLOAT)
    expected = model(ids)
    plain = copy.deepcopy(model)
    for name, layer in named_adapters(plain).items():
        A, E, B = layer.triplets("default")
        delta = 5 / (3 + 1e-5) * B @ (E * A)
        delta = delta.T if name == "words" else delta.reshape(layer.weight.shape)
        if name == "words":
            assert not delta[3].any()
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)
        layer.base_layer.weight.data += delta
    torch.testing.assert_close(unload(plain)(ids), expected)

    before = {name: p.clone() for name, p in model.named_parameters()}
    merge(model)
    assert all(layer.merged_adapters for layer in named_adapters(model).values())
    torch.testing.assert_close(model(ids), expected)
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(merge_and_unload(model, safe_merge=True)(ids), expected)


def test_every_parameter_gets_its_gradient(ids):
    model = network().double()
    params = [p for p in model.parameters() if p.requires_grad]
    assert len(params) == 18

    def loss(*values: Tensor) -> Tensor:
        state = dict(zip((name for name, p in model.named_parameters() if p.requires_grad), values, strict=True))
        return torch.func.functional_call(model, state, (ids.where(ids != 3, 4),)).square().sum()

    assert torch.autograd.gradcheck(loss, params)
    # As in torch.nn.Embedding, the padding's vector is not trained.
    assert (ids == 3).any()
    model(ids).square().sum().backward()
    gradient = model.words.lora_A["default"].grad
    assert not gradient[:, 3].any()
    assert gradient[:, 4].all()


def test_what_is_quantized_is_not_merged(ids):
    model = network()
    before = model(ids)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"quantized: .*found Int8Linear, whose forward is its own"):
        merge(model)
    assert not any(layer.merged_adapters for layer in named_adapters(model).values())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(ids), before)
    layer = model.quantized
    A, E, B = layer.triplets("default")
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.scaling("default") * B @ (E * A))
