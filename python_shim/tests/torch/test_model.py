"""Adapters on whole models: beside PEFT, and through everything that users do with modules."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import adalora
from adalora import InvalidArgumentError, InvalidStateError
from adalora.torch import (
    AdaLoraConfig,
    SVDLinear,
    adapt,
    delete_adapter,
    disable_adapters,
    get_config,
    load_adapter,
    merge,
    merge_and_unload,
    named_adapters,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

SCHEDULE = {"tinit": 2, "tfinal": 3, "total_step": 20}


class Attention(nn.Module):
    """Three layers that are given the same x, or two of them another sequence."""

    def __init__(self, width: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, dtype=dtype) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q = self.query(x)
        other = x if other is None else other
        weights = (q @ self.key(other).transpose(-1, -2)).softmax(-1)
        return self.output(weights @ self.value(other))


class Network(nn.Module):
    """Two layers of attention, a Conv1D and a head."""

    def __init__(self, width: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(width, dtype) for _ in range(2))
        self.mix = Conv1D(10, width).to(dtype)
        self.head = nn.Linear(10, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.mix(x).tanh())


TARGETS = ["query", "key", "value", "output", "mix"]
SETTINGS = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "target_modules": TARGETS, **SCHEDULE}


def config(**changed) -> AdaLoraConfig:
    return AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "lora_alpha": 6, "target_modules": TARGETS, **SCHEDULE, **changed}
    )


def network(dtype: torch.dtype = torch.float32, **changed) -> Network:
    torch.manual_seed(1)
    return adapt(Network(dtype=dtype), config(**changed))


@pytest.fixture
def x() -> Tensor:
    """Input of the network."""
    torch.manual_seed(2)
    return torch.randn(2, 5, 24)


@pytest.fixture
def calls(monkeypatch, library) -> list[int]:
    """How many adapters each native forward pass had."""
    counted = []
    forward = adalora.load().adalora_adapter_forward
    loaded = adalora.load()
    monkeypatch.setattr(loaded, "adalora_adapter_forward", lambda *a: (counted.append(a[2]), forward(*a))[1])
    return counted


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomize(model: nn.Module, adapter_name: str = "default") -> None:
    """Make an adapter that changes the output."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in named_adapters(model, adapter_name).values():
            for p in layer.triplets(adapter_name):
                p.normal_(0.0, 0.3)


def with_peft(model: Network, **changed) -> nn.Module:
    """The same network under PEFT, with the same parameters."""
    return peft_twin(Network(dtype=next(model.parameters()).dtype), model, **changed)


def peft_twin(bare: nn.Module, model: nn.Module, **changed) -> nn.Module:
    """A bare model under PEFT, with the parameters of an adapted one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(bare, peft.AdaLoraConfig(**{**SETTINGS, **changed}))
    state = {f"base_model.model.{name}": value for name, value in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert all("ranknum" in name for name in missing)
    assert not unexpected
    return theirs


# Beside PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_pefts(dtype, x):
    ours = network(dtype)
    randomize(ours)
    theirs = with_peft(ours)
    x = x.to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    inputs = [x.clone().requires_grad_(True) for _ in range(2)]
    outputs = [model(each) for model, each in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, **tolerance)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(*(each.grad for each in inputs), **tolerance)
    expected = {name.removeprefix("base_model.model."): p for name, p in trained(theirs).items() if "lora_" in name}
    assert trained(ours).keys() == expected.keys()
    for name, p in trained(ours).items():
        torch.testing.assert_close(p.grad, expected[name].grad, **tolerance)


def test_initial_values_are_distributed_as_pefts():
    layer = SVDLinear(nn.Linear(400, 300))
    layer.add_adapter("default", r=50, lora_alpha=8)
    A, E, B = layer.triplets("default")
    for p in (A, B):
        assert abs(p.mean().item()) < 4 * 0.02 / p.numel() ** 0.5
        assert abs(p.std().item() / 0.02 - 1) < 4 / (2 * p.numel()) ** 0.5
    assert (E == 0).all()
    layer.add_adapter("random", r=50, lora_alpha=8, init_lora_weights=False)
    assert all(abs(p.std().item() - 1) < 0.35 for p in layer.triplets("random"))


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_parameter_types_are_pefts(base, autocast_adapter_dtype):
    model = adapt(Network(dtype=base), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(
            Network(dtype=base),
            peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=TARGETS, **SCHEDULE),
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    assert {p.dtype for p in trained(model).values()} == {p.dtype for p in trained(theirs).values()}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_is_trained_beside_the_adapters(bias):
    ours = network(bias=bias, modules_to_save=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"target_modules": TARGETS, "modules_to_save": ["head"], **SCHEDULE}
        theirs = get_peft_model(Network(), peft.AdaLoraConfig(bias=bias, **settings))
    expected = {name.removeprefix("base_model.model.") for name in trained(theirs)}
    expected = {name.replace("modules_to_save.default.", "") for name in expected if "original_module" not in name}
    assert set(trained(ours)) == expected


def test_the_new_head_of_a_task_is_trained_whole():
    settings = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    asked = {"target_modules": "all-linear", "task_type": "SEQ_CLS", **SCHEDULE}
    ours = adapt(transformers.BertForSequenceClassification(settings), AdaLoraConfig(**asked))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(transformers.BertForSequenceClassification(settings), peft.AdaLoraConfig(**asked))
    expected = {name.removeprefix("base_model.model.") for name in trained(theirs) if "original_module" not in name}
    assert set(trained(ours)) == {name.replace("modules_to_save.default.", "") for name in expected}
    assert "classifier.weight" in trained(ours)


def test_a_whole_transformer_beside_peft():
    settings = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(1)
    ours, bare = (transformers.BertModel(settings).eval() for _ in range(2))
    bare.load_state_dict(ours.state_dict())
    adapt(ours, AdaLoraConfig(init_r=3, target_r=2, target_modules="all-linear", **SCHEDULE))
    randomize(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(
            bare, peft.AdaLoraConfig(init_r=3, target_r=2, target_modules="all-linear", **SCHEDULE)
        ).eval()
    theirs.load_state_dict({f"base_model.model.{k}": v for k, v in ours.state_dict().items()}, strict=False)
    ids = torch.randint(50, (3, 7))
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


# What users do with modules


def test_modules_copy_pickle_and_move(x):
    model = network(lora_dropout=0.1, modules_to_save=["head"])
    randomize(model)
    model.eval()
    expected = model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(x), expected)
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
        assert not made(x).any()
    assert torch.equal(model(x), expected)
    wide = copy.deepcopy(model).to(torch.float64)
    torch.testing.assert_close(wide(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load(x, assign):
    model, other = network(), network()
    randomize(model)
    parameters = list(other.parameters())
    other(x)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert all((new is old) != assign for new, old in zip(other.parameters(), parameters, strict=True))
    assert torch.equal(other(x), model(x))
    assert set(trained(other)) == set(trained(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["model", "autocast"])
def test_half_precision(x, dtype, target):
    model = network()
    randomize(model)
    exact = model(x)
    exact.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    if target == "model":
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.to(dtype)
        y = model(x.to(dtype))
    else:
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
    assert y.dtype == dtype
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert (y - exact).abs().max() / exact.abs().max() < 0.05
    y.float().square().sum().backward()
    for name, p in trained(model).items():
        assert (p.grad - wanted[name]).abs().max() / wanted[name].abs().max() < 0.2, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(x, use_reentrant):
    model = network(lora_dropout=0.3)
    randomize(model)
    inputs = [x.clone().requires_grad_(True) for _ in range(2)]
    results = []
    for each, wrapped in zip(inputs, (False, True), strict=True):
        torch.manual_seed(4)
        y = checkpoint(model, each, use_reentrant=use_reentrant) if wrapped else model(each)
        y.square().sum().backward()
        results.append([y, each.grad, *(p.grad.clone() for p in trained(model).values())])
        model.zero_grad()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(x, mode):
    model = network(lora_dropout=0.5).eval()
    randomize(model)
    expected = model(x)
    with mode():
        assert torch.equal(model(x), expected)
    model(x).sum().backward()


def test_dropout_acts_in_training_alone(x):
    model = network(lora_dropout=0.5)
    randomize(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_trained_base_gets_its_gradient(x):
    model = network()
    randomize(model)
    theirs = with_peft(model)
    for each in (model, theirs):
        each.requires_grad_(True)
        each(x).square().sum().backward()
    expected = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_tensor_of_another_class_keeps_it(x):
    class Own(Tensor):
        pass

    model = network()
    randomize(model)
    expected = model(x)
    for own in (x.as_subclass(Own), x.clone().requires_grad_(True).as_subclass(Own)):
        y = model(own)
        assert type(y) is Own
        torch.testing.assert_close(y.as_subclass(Tensor), expected)
        found, wanted = (torch.autograd.grad(z.square().sum(), list(trained(model).values())) for z in (y, model(x)))
        torch.testing.assert_close([grad.as_subclass(Tensor) for grad in found], list(wanted))


def test_a_ragged_input_is_refused():
    model = network()
    ragged = torch.nested.nested_tensor([torch.randn(n, 24) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(InvalidArgumentError, match=r"x: expected a dense tensor, found one of layout torch\.jagged"):
        model.layers[0].output(ragged)


def test_hooks_see_the_base_layers_own_output(x):
    model = network()
    randomize(model)
    layer = model.layers[0].query
    seen = []
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(layer(x), expected)
    assert torch.equal(seen[0], nn.functional.linear(x, layer.weight, layer.bias))


def test_a_base_layer_whose_forward_was_replaced(x):
    layer = network().layers[0].query
    base = layer.base_layer
    kept = []
    original = base.forward
    base.forward = lambda x: kept.append(2 * original(x)) or kept[-1]
    x = x.requires_grad_(True)
    y = layer(x)
    assert torch.equal(kept[0], 2 * nn.functional.linear(x, base.weight, base.bias))
    (found,) = torch.autograd.grad(y.sum(), x)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(found[0, 0], 2 * base.weight.sum(0) + delta.sum(0), rtol=1e-4, atol=1e-5)


def test_backward_within_autocast_of_a_part_that_ran_outside(x):
    model = network()
    randomize(model)
    first, second = (x.clone().requires_grad_(True) for _ in range(2))
    model(first).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = model(second).square().sum()
        loss.backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=0.1, atol=0.1)
    assert second.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_tracing_and_forward_mode_are_refused(x):
    model = network().eval()
    randomize(model)
    with torch.no_grad(), pytest.raises(adalora.UnsupportedError, match=r"found one that torch\.jit traces"):
        torch.jit.trace(model, x)
    model.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(adalora.UnsupportedError, match="found forward mode"):
            model(dual)


class Same(nn.Linear):
    """A base layer that gives back what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Twice(nn.Linear):
    """A base layer that keeps its output, and gives a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept.view(-1, self.out_features)


@pytest.mark.parametrize("kind", [Same, Twice])
def test_outputs_that_others_hold_are_not_overwritten(x, kind):
    layer = SVDLinear(kind(24, 24))
    layer.add_adapter("default", r=3, lora_alpha=3, init_lora_weights=False)
    layer.active_adapters = ["default"]
    before = x.clone()
    rows = x.view(-1, 24).requires_grad_(True)
    y = layer(rows)
    assert torch.equal(x, before)
    if kind is Twice:
        assert torch.equal(layer.base_layer.kept, nn.functional.linear(rows, layer.weight, layer.bias))
    A, E, B = layer.triplets("default")
    base = kind.forward(layer.base_layer, rows)
    torch.testing.assert_close(y, base + (rows @ A.T * E.T) @ B.T * layer.scaling("default"), rtol=1e-4, atol=1e-4)
    y.sum().backward()


# Layers that share an input


def test_query_key_and_value_are_one_call(x, calls):
    model = network()
    model(x)
    assert calls == [3, 1, 3, 1, 1]


def test_shared_inputs_change_results_by_rounding_alone(x):
    together, apart = network(), network()
    for model in (together, apart):
        randomize(model)
    for layer in named_adapters(apart).values():
        layer.shared_input = None
    inputs = [x.clone().requires_grad_(True) for _ in range(2)]
    outputs = [model(each) for model, each in zip((together, apart), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    # The last layers' gradients come before any sum in another order.
    for name, p in named_adapters(together).items():
        for matrix, other in zip(p.triplets("default"), named_adapters(apart)[name].triplets("default"), strict=True):
            torch.testing.assert_close(matrix.grad, other.grad, rtol=1e-4, atol=1e-6)


def crossed(**changed) -> Attention:
    torch.manual_seed(1)
    model = adapt(Attention(), config(target_modules=["query", "key", "value"], **changed))
    randomize(model)
    return model


@pytest.mark.parametrize("retain_graph", [False, True])
def test_backward_between_layers_that_share_an_input(x, retain_graph):
    model = crossed()
    layers = model.query, model.key, model.value
    for layer in layers:
        layer(x).square().sum().backward(retain_graph=retain_graph)
    for layer in layers:
        A, E, B = layer.triplets("default")
        y = layer.base_layer(x) + (x @ A.T * E.T) @ B.T * layer.scaling("default")
        for p, expected in zip((A, E, B), torch.autograd.grad(y.square().sum(), [A, E, B]), strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_share_no_input_after_all_separate(x, calls):
    model = crossed()
    other = torch.randn(2, 6, 24)
    y = model(x, other)
    # Key and value were computed from x in vain; gradient checkpointing may have to repeat just that.
    assert calls == [3, 1, 1]
    assert torch.equal(model(x, other), y)
    assert calls == [3, 1, 1] * 2
    y.sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    y = model(x, other)
    assert calls == [3, 1, 1] * 2 + [1, 1, 1]
    delta = {name: layer.get_delta_weight("default") for name, layer in named_adapters(model).items()}
    with torch.no_grad():
        for name, layer in named_adapters(model).items():
            layer.base_layer.weight += delta[name]
    with disable_adapters(model):
        torch.testing.assert_close(model(x, other), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_where_no_input_is_shared(x, use_reentrant):
    other = torch.randn(2, 6, 24)
    results = []
    for wrapped in (False, True):
        model = crossed(lora_dropout=0.5)
        for _ in range(2):
            torch.manual_seed(4)
            first, second = x.clone().requires_grad_(True), other.clone().requires_grad_(True)
            y = checkpoint(model, first, second, use_reentrant=use_reentrant) if wrapped else model(first, second)
            y.square().sum().backward()
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        results.append([y, first.grad, second.grad, *(p.grad for p in trained(model).values())])
    assert all(map(torch.equal, *results))


def test_inference_does_not_compute_in_vain(x, calls):
    model = crossed().eval()
    other = torch.randn(2, 6, 24)
    with torch.no_grad():
        for _ in range(3):
            model(x, other)
    assert calls == [3, 1, 1] + [1, 1, 1] * 2


def test_a_model_that_was_made_in_inference_mode(x):
    with torch.inference_mode():
        model = crossed()
    expected = crossed()
    with torch.no_grad():
        assert torch.equal(model(x, x), expected(x, x))


def test_siblings_of_different_widths(x):
    model = Attention()
    model.key, model.value = nn.Linear(30, 24), nn.Linear(30, 24)
    adapt(model, config(target_modules=["query", "key", "value"]))
    randomize(model)
    bare = Attention()
    bare.key, bare.value = nn.Linear(30, 24), nn.Linear(30, 24)
    theirs = peft_twin(bare, model, target_modules=["query", "key", "value"])
    other = torch.randn(2, 6, 30)
    torch.testing.assert_close(model(x, other), theirs(x, other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("changed", ["x", "parameter", "bias", "mode", "scaling"])
def test_a_stale_output_is_never_used(mode, changed):
    model = crossed(lora_dropout=0.5 if changed == "mode" else 0.0)
    with mode():
        x = torch.randn(2, 5, 24)
        model.query(x)
        if changed == "x":
            x.mul_(2)
        elif changed == "parameter":
            model.key.lora_B["default"].mul_(2)
        elif changed == "bias":
            model.key.bias.add_(1)
        elif changed == "mode":
            model.eval()
        else:
            model.key.lora_alpha["default"] *= 2
        found = model.key(x)
        model.key.shared_input = None
        assert torch.equal(found, model.key(x))


def test_modes_that_differ_within_a_group(x):
    model = adapt(Attention(), config(target_modules=["query", "key", "value"], lora_dropout=0.5))
    randomize(model)
    model.key.eval()
    expected = model.key(x)
    for _ in range(2):
        model(x)
        assert torch.equal(model.key(x), expected)


# Several adapters


def test_several_adapters_on_one_model(x):
    model = network()
    randomize(model)
    alone = model(x)
    adapt(model, config(init_r=2, target_r=1, target_modules=["query", "output"], inference_mode=True), "second")
    randomize(model, "second")
    assert torch.equal(model(x), alone)
    assert set(trained(model)) == {name for name in model.state_dict() if name.endswith(".default")}
    assert list(named_adapters(model, "second")) == [
        f"layers.{k}.{name}" for k in (0, 1) for name in ("query", "output")
    ]

    set_adapter(model, "second")
    second = model(x)
    set_adapter(model, ["default", "second"])
    both = model(x)
    layer = model.layers[0].query
    y = layer(x)
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight + sum(deltas), layer.bias), rtol=1e-4, atol=1e-4)
    set_adapter(model, [])
    base = model(x)
    assert len({round(each.sum().item(), 4) for each in (alone, second, both, base)}) == 4
    set_adapter(model, "default")
    assert torch.equal(model(x), alone)

    with pytest.raises(InvalidArgumentError, match=r"expected inference_mode, since the adapter 'default' is trained"):
        adapt(model, config(), "third")
    with pytest.raises(InvalidArgumentError, match=r"expected a new name, found 'second', which the model has"):
        adapt(model, config(inference_mode=True), "second")
    with pytest.raises(InvalidArgumentError, match=r"expected one of \['default', 'second'\], found 'third'"):
        set_adapter(model, "third")
    for name, message in (("a.b", "without dots"), ("", "without dots"), ("pop", "ParameterDict has no use for")):
        with pytest.raises(InvalidArgumentError, match=message):
            adapt(model, config(inference_mode=True), name)

    delete_adapter(model, "second")
    assert torch.equal(model(x), alone)
    with pytest.raises(InvalidArgumentError, match="second"):
        get_config(model, "second")


def test_both_of_two_active_adapters_get_gradients(x):
    model = network()
    adapt(model, config(inference_mode=True), "second")
    randomize(model, "second")
    set_adapter(model, ["default", "second"])
    model(x).sum().backward()
    for layer in named_adapters(model).values():
        assert all(p.grad is not None for p in layer.triplets("default"))
        assert all(p.grad is None for p in layer.triplets("second"))


def test_a_failed_adapt_leaves_the_model_alone():
    model = Network()
    before = {name: type(module) for name, module in model.named_modules()}
    for wrong in (config(target_modules=["nothing"]), config(modules_to_save=["nothing"])):
        with pytest.raises(InvalidArgumentError, match="nothing"):
            adapt(model, wrong)
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "adalora_config")


def test_a_part_that_has_the_adapter_already():
    model = Network()
    adapt(model.layers[1], config(target_modules=["query"]))
    A, others = model.layers[1].query.lora_A["default"], dict(model.named_parameters())
    with pytest.raises(InvalidArgumentError, match=r"'default', which layers\.1\.query has from a call for a part"):
        adapt(model, config())
    assert model.layers[1].query.lora_A["default"] is A
    assert dict(model.named_parameters()) == others
    assert model.head.weight.requires_grad


def test_what_is_trained_whole_goes_with_the_first_adapter(tmp_path):
    model = network()
    before = copy.deepcopy(model.state_dict())
    for changed in ({"bias": "all"}, {"modules_to_save": ["head"]}):
        further = config(inference_mode=True, **changed)
        with pytest.raises(InvalidArgumentError, match="a model has one copy, which 'default' uses too"):
            adapt(model, further, "second")
        save_adapter(network(**changed), tmp_path)
        with pytest.raises(InvalidArgumentError, match="a model has one copy, which 'default' uses too"):
            load_adapter(model, tmp_path, "second")
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_what_comes_from_peft_is_pointed_out():
    with pytest.raises(InvalidArgumentError, match=r"expected one without PEFT's adapters, found one at .*query"):
        adapt(with_peft(network()), config())
    theirs = peft.AdaLoraConfig(**SETTINGS)
    with pytest.raises(
        InvalidArgumentError, match=r"found <class 'peft.*AdaLoraConfig.from_dict\(config.to_dict\(\)\)"
    ):
        adapt(Network(), theirs)
    assert named_adapters(adapt(Network(), AdaLoraConfig.from_dict(theirs.to_dict())))
    with pytest.raises(InvalidArgumentError, match="expected one with adapters, found none: call adapt"):
        get_config(Network(), "default")


def test_the_callers_configuration_stays_as_it_is():
    given = config()
    expected = copy.deepcopy(given)
    model = adapt(Network(), given)
    assert given == expected
    given.lora_alpha = 100
    assert get_config(model, "default").lora_alpha == 6


# Switching off, merging, unloading


def test_disabled_adapters_leave_the_base_model(x):
    model = network()
    randomize(model)
    torch.manual_seed(1)
    expected, adapted = Network()(x), model(x)
    with disable_adapters(model):
        assert torch.equal(model(x), expected)
        with disable_adapters(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)
    merge(model)
    merged = model(x)
    with pytest.raises(KeyError), disable_adapters(model):
        assert torch.equal(model(x), expected)
        raise KeyError
    assert torch.equal(model(x), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_merging_and_unmerging_restores_every_bit(x, dtype):
    model = network(dtype)
    randomize(model)
    x = x.to(dtype)
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    adapted = model(x)
    for _ in range(20):
        merge(model, safe_merge=True)
        merged = model(x)
        unmerge(model)
        assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.05)
    assert (merged - adapted).abs().max() / adapted.abs().max() < tolerance
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("name", ["layers.0.query", "mix"])
def test_merged_weights_are_pefts(x, name):
    ours = network(torch.float64)
    randomize(ours)
    theirs = with_peft(ours)
    layer, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
    torch.testing.assert_close(layer.get_delta_weight("default"), other.get_delta_weight("default"))
    merge(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.merge()
    torch.testing.assert_close(layer.weight, other.weight)
    assert layer.weight is layer.base_layer.weight
    merge(ours)
    torch.testing.assert_close(layer.weight, other.weight)


def test_layers_that_share_a_weight_merge_and_unmerge():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapt(model, config(target_modules="all-linear", init_lora_weights=False))
    weight = model[0].weight.clone()
    merge(model)
    with disable_adapters(model):
        assert torch.equal(model[0].weight, weight)
    assert not torch.equal(model[0].weight, weight)
    unmerge(model)
    assert torch.equal(model[0].weight, weight)


def test_unmerging_without_a_backup_subtracts():
    model = network(torch.float64)
    randomize(model)
    weight = model.mix.weight.clone()
    merge(model, backup=False)
    assert not torch.equal(model.mix.weight, weight)
    unmerge(model)
    torch.testing.assert_close(model.mix.weight, weight, rtol=1e-12, atol=1e-12)


def test_a_safe_merge_changes_all_layers_or_none(x):
    model = network()
    randomize(model)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.layers[1].value.lora_A["default"][0, 0] = float("nan")
    with pytest.raises(InvalidArgumentError, match=r"layers\.1\.value: .*expected a finite weight"):
        merge(model, safe_merge=True)
    assert not any(layer.merged_adapters for layer in named_adapters(model).values())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items() if name.endswith("weight"))


def test_a_weight_that_is_computed_is_not_merged_into():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    adapt(model, config(target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(adalora.UnsupportedError, match="whose weight is computed"):
        merge(model)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_default_type_does_not_matter(safe_merge):
    torch.set_default_dtype(torch.float64)
    try:
        merge(network(torch.float32), safe_merge)
    finally:
        torch.set_default_dtype(torch.float32)


def test_modes_that_keep_outputs(x):
    class Keeps(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.kept = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            self.kept += [(output, output.clone())] if func is torch.ops.aten.addmm.default else []
            return output

    model = network()
    randomize(model)
    with Keeps() as mode:
        model(x)
    assert len(mode.kept) >= 8
    assert all(torch.equal(*pair) for pair in mode.kept)


def test_merging_several_adapters(x):
    model = network()
    adapt(model, config(inference_mode=True), "second")
    randomize(model, "second")
    set_adapter(model, ["default", "second"])
    expected = model(x)
    merge(model, adapter_names=["second"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in trained(model).values())
    merge(model)
    assert model.mix.merged_adapters == ["second", "default"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    for forbidden in (
        lambda: set_adapter(model, "second"),
        lambda: delete_adapter(model, "second"),
        lambda: adapt(model, config(inference_mode=True), "third"),
    ):
        with pytest.raises(InvalidStateError, match=r"found layers\.0\.query merged"):
            forbidden()
    unmerge(model)
    assert torch.equal(model(x), expected)


def test_unloading_gives_the_plain_model_back(x):
    model = network()
    randomize(model)
    torch.manual_seed(1)
    plain = Network()
    merge(model)
    assert unload(model) is model
    assert str(model) == str(plain)
    assert torch.equal(model(x), plain(x))
    assert not hasattr(model, "adalora_config")
    adapt(model, config())


def test_merge_and_unload_computes_what_was_adapted(x):
    model = network()
    randomize(model)
    expected = model(x)
    merge_and_unload(model, safe_merge=True)
    assert not named_adapters(model, None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_deleting_the_only_adapter_unwraps(x):
    model = network()
    delete_adapter(model, "default")
    assert str(model) == str(Network())


@pytest.mark.parametrize("adapt_compiled", [False, True])
def test_a_compiled_model_is_taken_for_its_own(x, adapt_compiled):
    torch.manual_seed(1)
    plain, model = Network(), Network()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    # A regular expression is for whole paths.
    made = adapt(compiled if adapt_compiled else model, config(target_modules=r"layers\.\d\.query"))
    assert made is (compiled if adapt_compiled else model)
    randomize(model)
    assert list(named_adapters(compiled)) == list(named_adapters(model)) == ["layers.0.query", "layers.1.query"]
    adapted = model(x)
    with disable_adapters(compiled):
        torch.testing.assert_close(compiled(x), plain(x))
    assert merge_and_unload(compiled) is compiled
    torch.testing.assert_close(compiled(x), adapted)
    assert not hasattr(model, "adalora_config")
    assert [type(layer.query) for layer in model.layers] == [nn.Linear] * 2


def test_each_kind_wraps_its_own_layers():
    with pytest.raises(InvalidArgumentError, match=r"expected a torch.nn.Linear, .* found one that is of type Conv2d"):
        SVDLinear(nn.Conv2d(3, 4, 2))


def test_an_svdlinear_says_what_it_is():
    text = str(network(lora_dropout=0.1).layers[0].query)
    assert "default(r=4, scaling=1.5, lora_dropout=0.1)" in text
    assert "(base_layer): Linear(in_features=24" in text
