"""All kinds of layers in one model, one of them a layer of which the output alone is known."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adalora.errors import InvalidArgumentError, UnsupportedError
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    SVDConv1d,
    SVDConv2d,
    SVDEmbedding,
    SVDLinear,
    adapt,
    disable_adapters,
    load_adapter,
    load_training_state,
    merge,
    merge_and_unload,
    named_adapters,
    save_adapter,
    save_training_state,
    set_adapter,
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


def test_quantized_layers_share_an_input():
    # They have no weight, in PyTorch's sense, that could tell of changes.
    torch.manual_seed(1)
    names = ["q_proj", "k_proj", "v_proj"]
    model = nn.ModuleDict({name: Int8Linear(nn.Linear(6, 4)) for name in names})
    adapt(model, config(target_modules=names))
    x = torch.randn(3, 6)
    for name, layer in model.items():
        assert layer.shared_input is model["q_proj"].shared_input is not None
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        model["q_proj"](x)
        # The key's output lies ready by now.
        model["k_proj"].base_layer.scale.mul_(2)
        found = model["k_proj"](x)
        model["k_proj"].shared_input = None
        assert torch.equal(found, model["k_proj"](x))


def train(model: nn.Module, optimizer: AdamW, allocator: RankAllocator, ids: Tensor, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        wanted = torch.randn(len(ids), 2, dtype=torch.float64)
        (model(ids) - wanted).square().mean().backward()
        allocator.orthogonality()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module) -> tuple[AdamW, RankAllocator]:
    allocator = RankAllocator(model)
    return AdamW([p for p in model.parameters() if p.requires_grad], allocator, lr=1e-2), allocator


def test_ranks_are_shared_over_all_kinds_and_a_run_is_resumed(ids, tmp_path):
    model = network(lora_dropout=0.1)
    optimizer, allocator = optimizer_of(model)
    train(model, optimizer, allocator, ids, range(7))
    save_adapter(model, tmp_path)
    save_training_state(tmp_path, optimizer=optimizer)
    train(model, optimizer, allocator, ids, range(7, 16))
    assert sum(allocator.ranks().values()) == len(KINDS)
    for path, kept in allocator.rank_pattern().items():
        values = model.get_submodule(path).lora_E["default"].flatten()
        assert (values != 0).tolist() == kept
    assert not model.words.lora_A["default"][:, 3].any()

    again = load_adapter(Network().double(), tmp_path, is_trainable=True)
    again.load_state_dict({name: p for name, p in network().state_dict().items() if "lora" not in name}, strict=False)
    optimizer, allocator = optimizer_of(again)
    load_training_state(tmp_path, optimizer=optimizer)
    train(again, optimizer, allocator, ids, range(7, 16))
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_layers_copy_pickle_and_repeat_under_checkpointing(ids):
    model = network(lora_dropout=0.3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.manual_seed(3)
        expected = model(ids)
        torch.manual_seed(3)
        assert torch.equal(other(ids), expected)
    gradients = []
    for run in (model, lambda ids: checkpoint(model, ids, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        run(ids).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_two_adapters_add_up(ids):
    model = network()
    adapt(model, config(init_r=2, inference_mode=True), "second")
    outputs = {}
    for names in (["default"], ["second"], ["default", "second"]):
        set_adapter(model, names)
        for path in KINDS:
            layer = model.get_submodule(path)
            base = layer.base_layer
            given = {"words": ids, "out": torch.ones(2, 8), "quantized": torch.ones(2, 5)}.get(path)
            if given is None:
                given = torch.ones(2, base.in_channels, *(5, 6)[: len(base.kernel_size)])
            given = given if path == "words" else given.double()
            outputs[path, tuple(names)] = layer(given) - base(given)
    for path in KINDS:
        torch.testing.assert_close(
            outputs[path, ("default", "second")], outputs[path, ("default",)] + outputs[path, ("second",)]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ids, dtype):
    exact, half = network(), network(dtype)
    values = {name: p.to(dtype) for name, p in exact.state_dict().items()}
    exact.load_state_dict(values)
    half.load_state_dict(values)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    found, expected = half(ids), exact(ids)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", dtype):
        mixed = network(torch.float32)
        mixed.load_state_dict(values)
        found = mixed(ids)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixed.parameters() if p.requires_grad)


def test_dropout_of_an_embedding_leaves_tokens_out():
    torch.manual_seed(4)
    layer = SVDEmbedding(nn.Embedding(9, 5))
    layer.add_adapter("default", r=2, lora_alpha=2, lora_dropout=0.25, init_lora_weights=False)
    layer.active_adapters = ["default"]
    ids = torch.randint(9, (4000,))
    added = layer(ids) - layer.base_layer(ids)
    layer.eval()
    whole = layer(ids) - layer.base_layer(ids)
    kept = added.abs().sum(dim=-1) > 1e-4 * whole.abs().sum(dim=-1)
    torch.testing.assert_close(added[kept], whole[kept] / 0.75, rtol=1e-4, atol=1e-5)
    assert 0.7 < kept.float().mean() < 0.8


class Scaled(nn.Embedding):
    """Has a forward of its own, as in some language models."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class Standardized(nn.Conv2d):
    """Computes its weight anew in each call."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        (SVDEmbedding, nn.Embedding(5, 4, max_norm=1.0), r"without max_norm, found .* has max_norm=1\.0"),
        (SVDEmbedding, nn.Embedding(5, 4, sparse=True), "without sparse, found .* has sparse=True"),
        (SVDEmbedding, nn.Embedding(5, 4, scale_grad_by_freq=True), "without scale_grad_by_freq, found"),
        (SVDEmbedding, Scaled(5, 4), r"computes what torch\.nn\.Embedding does, found .* has its own forward"),
        (SVDConv2d, Standardized(2, 2, 1), r"computes what torch\.nn\.Conv2d does, found .* has its own forward"),
        (SVDConv2d, nn.Conv1d(2, 2, 1), r"a torch\.nn\.Conv2d, found one that is of type Conv1d"),
        (SVDConv1d, nn.LazyConv1d(2, 1), "has no weight yet"),
        (SVDLinear, nn.Bilinear(2, 2, 2), "or another layer with in_features and out_features, found .* Bilinear"),
    ],
)
def test_what_cannot_be_adapted_is_refused(kind, layer, message):
    with pytest.raises(InvalidArgumentError, match=f"base_layer: expected .*{message}"):
        kind(layer)
    model = nn.Sequential(layer)
    if type(layer) is not nn.Conv1d:
        with pytest.raises(InvalidArgumentError, match=r"target_modules: expected .* found 0, which "):
            adapt(model, config(target_modules=["0"]))
    assert model[0] is layer


def test_a_base_layer_that_returns_more_than_a_tensor():
    class WithBias(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return nn.functional.linear(x, self.weight), self.bias

    model = adapt(nn.Sequential(WithBias(3, 2)), config(target_modules=["0"]))
    with pytest.raises(UnsupportedError, match=r"expected one that returns a tensor, found WithBias, which .* tuple"):
        model(torch.randn(4, 3))


def test_layers_without_triplets(ids):
    model = network(init_r=0, target_r=0)
    plain = Network()
    plain.load_state_dict(unload(network()).state_dict())
    found = model(ids)
    assert torch.equal(found, plain(ids))
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_that_asks_its_convolutions_for_their_strides():
    """Whisper's encoder does; its convolutions and the words' embedding are adapted."""
    settings = transformers.WhisperConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
        num_mel_bins=4, max_source_positions=6, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.WhisperForConditionalGeneration(settings).eval()
    given = {"input_features": torch.randn(2, 4, 12), "labels": torch.randint(3, 20, (2, 5))}
    before = model(**given).logits
    with pytest.warns(UserWarning, match="embed_tokens: shares its weight with proj_out"):
        adapt(model, config(target_modules=["conv1", "conv2", "q_proj", "embed_tokens"]))
    output = model(**given)
    assert not torch.allclose(output.logits, before, atol=1e-3)
    output.loss.backward()
    layers = named_adapters(model)
    assert {type(layer) for layer in layers.values()} == {SVDConv1d, SVDEmbedding, SVDLinear}
    assert all(layer.lora_E["default"].grad.any() for layer in layers.values())


def test_a_tied_output_layer_is_warned_of():
    model = nn.ModuleDict({"words": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["words"].weight
    with pytest.warns(UserWarning, match="words: shares its weight with out"):
        adapt(model, config(target_modules=["words"]))
