"""Compiled, exported and transformed models: the same results as eager mode's, and one graph without breaks."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from child import package
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import adalora
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    adapt,
    disable_adapters,
    merge,
    named_adapters,
    set_adapter,
    unmerge,
)

TARGETS = ["query", "key", "value", "output"]


class Block(nn.Module):
    """Attention, whose query, key and value share their input in eager mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        weights = (self.query(z) @ self.key(z).transpose(-1, -2)).softmax(-1)
        return x + self.output(weights @ self.value(z)).tanh()


class Kinds(nn.Module):
    """Layers of other kinds than linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding="same", padding_mode="circular")
        self.conv2 = nn.Conv2d(2, 4, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embedding(ids).transpose(1, 2)).tanh()
        return self.conv2(x.unflatten(1, (2, 3)))


class Checkpointed(nn.Module):
    """A module whose activations are computed again in backward."""

    def __init__(self, block: nn.Module, **how: object) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, **self.how)


def settings(**changed: object) -> AdaLoraConfig:
    schedule = {"tinit": 1, "tfinal": 2, "total_step": 12}
    return AdaLoraConfig(**{"init_r": 4, "target_r": 2, "target_modules": TARGETS, **schedule, **changed})


def block(**changed: object) -> Block:
    torch.manual_seed(1)
    return randomize(adapt(Block(), settings(**changed)), "default")


def randomize(model: nn.Module, adapter_name: str) -> nn.Module:
    """Make an adapter that changes the output."""
    with torch.no_grad():
        for layer in named_adapters(model, adapter_name).values():
            for p in layer.triplets(adapter_name):
                p.normal_(0.0, 0.3)
    return model


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, 8, requires_grad=True)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def results(run: object, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients for the input and for everything that is trained."""
    torch.manual_seed(3)
    y = run(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=10 * tolerance, atol=tolerance)


# torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_and_backward_are_eager_modes(backend):
    model, x = block(), inputs(2, 5)
    expected = results(model, model, x)
    compare(results(torch.compile(model, backend=backend, fullgraph=True), model, x), expected)


def test_one_graph_with_the_backward_pass():
    """As the README says that PyTorch allows it."""
    model, x = block(), inputs(2, 5).detach()
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model(x).square().sum().backward()

    step()
    expected = [p.grad for p in trained]
    model.zero_grad()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch.compile(step, backend="aot_eager", fullgraph=True)()
    compare([p.grad for p in trained], expected)


def test_other_kinds_of_layers():
    torch.manual_seed(1)
    model = randomize(adapt(Kinds(), settings(target_modules=["embedding", "conv1", "conv2"])), "default")
    ids = torch.arange(10).view(2, 5)
    trained = [p for p in model.parameters() if p.requires_grad]
    outputs = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = run(ids)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    compare(outputs[1], outputs[0])
    program = torch.export.export(model.eval(), (ids,))
    compare([program.module()(ids)], outputs[0][:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_within_the_graph(dtype):
    model, x = block(), inputs(2, 5)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x).float()

    expected = results(run, model, x)
    found = results(torch.compile(run, backend="aot_eager", fullgraph=True), model, x)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, rtol=0.1, atol=0.1 * e.abs().max().item())


def test_dropout_is_drawn_within_the_graph():
    model, x = block(lora_dropout=0.5), inputs(2, 5)
    expected = results(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # Eager mode draws for query, key and value at once what the graph draws one after the other.
    compare(results(compiled, model, x), expected)
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert torch.equal(compiled(x), compiled(x))
    compare(results(compiled, model, x), results(model, model, x))


def test_backward_drops_what_forward_dropped():
    n = 16
    layer = adapt(nn.Sequential(nn.Linear(n, n)), settings(init_r=n, target_modules="all-linear", lora_dropout=0.5))
    adapter = layer[0]
    with torch.no_grad():
        for p in adapter.base_layer.parameters():
            p.zero_()
        for p, value in zip(adapter.triplets("default"), (torch.eye(n), torch.ones(n, 1), torch.eye(n)), strict=True):
            p.copy_(value / adapter.scaling("default") if p.shape[1] == 1 else value)
    x = torch.ones(50, n, requires_grad=True)
    compiled = torch.compile(layer, backend="inductor", fullgraph=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    for y in (first, second):
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, y)
        # Bernoulli: 800 elements, four standard deviations.
        assert abs((y == 0).float().mean().item() - 0.5) < 4 * (0.25 / y.numel()) ** 0.5


@pytest.mark.parametrize("how", [{}, {"context_fn": None}])
def test_activation_checkpointing_repeats_the_mask(how):
    model, x = block(lora_dropout=0.5), inputs(2, 5)
    if how:
        keep = lambda ctx, op, *_, **__: (  # noqa: E731
            CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE
        )
        how = {"context_fn": partial(create_selective_checkpoint_contexts, keep)}
    expected = results(model, model, x)
    wrapped = Checkpointed(model, **how)
    compare(results(wrapped, model, x), expected)
    compare(results(torch.compile(wrapped, backend="aot_eager", fullgraph=True), model, x), expected)


def test_numbers_of_tokens_share_one_graph():
    model = block()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for shape in ((2, 5), (3, 7), (4, 6)):
        x = inputs(*shape)
        compare(results(compiled, model, x), results(model, model, x))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_what_changes_the_model_changes_the_graph():
    model, x = block(), inputs(2, 5)
    randomize(adapt(model, settings(init_r=2, inference_mode=True), "second"), "second")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = compiled(x)
    compare([first], [model(x)])
    with disable_adapters(model):
        disabled = compiled(x)
        compare([disabled], [model(x)])
    set_adapter(model, ["default", "second"])
    both = compiled(x)
    compare([both], [model(x)])
    merge(model, adapter_names=["second"])
    compare([compiled(x)], [both])
    unmerge(model)
    set_adapter(model, "default")
    compare([compiled(x)], [first])
    model.query.lora_alpha["default"] = 30
    assert not torch.allclose(compiled(x), first)
    compare([compiled(x)], [model(x)])
    assert len({round(y.sum().item(), 4) for y in (first, disabled, both)}) == 3


def test_a_compiled_run_takes_the_same_masks():
    x = inputs(2, 5).detach()
    ranks, parameters = [], []
    for compile in (False, True):
        model = block()
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True) if compile else model
        allocator = RankAllocator(model)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], allocator, lr=0.05)
        for _ in range(12):
            run(x).square().sum().backward()
            allocator.orthogonality()
            optimizer.step()
            optimizer.zero_grad()
        ranks.append(allocator.rank_pattern())
        parameters.append([p.detach() for p in model.parameters()])
        assert counter.frame_count == compile
    assert ranks[0] == ranks[1]
    compare(parameters[1], parameters[0], 1e-3)


def test_the_penalty_in_the_loss_is_within_the_graph():
    model, x = block(), inputs(2, 5)
    allocator = RankAllocator(model)

    def run(x: Tensor) -> Tensor:
        return model(x) + allocator.orthogonality_loss(0.3)

    # Before eager mode has bound anything.
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compare(results(compiled, model, x), results(run, model, x))
        randomize(model, "default")


def test_an_error_while_compiling_says_what_was_expected():
    model = block()
    with torch.no_grad():
        model.query.lora_E["default"] = nn.Parameter(torch.zeros(3, 1))
    with pytest.raises(Exception, match=r"E: expected shape \[4, 1\], found \[3, 1\]"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(inputs(2, 5))


# torch.export

LOAD = """
import sys, torch
import adalora.torch
program, x, y = sys.argv[1:]
assert torch.equal(torch.export.load(program).module()(torch.load(x)), torch.load(y))
"""


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_compute_the_same(strict, tmp_path, library):
    model, x = block(lora_dropout=0.5).eval(), inputs(2, 5).detach()
    program = torch.export.export(
        model, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    )
    operators = [node for node in program.graph.nodes if node.target is torch.ops.adalora.svd_linear.default]
    assert len(operators) == 4
    x = inputs(3, 7).detach()
    expected = model(x).detach()
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.run_decompositions().module()(x), expected)
    paths = [tmp_path / name for name in ("program.pt2", "x.pt", "y.pt")]
    torch.export.save(program, paths[0])
    torch.save(x, paths[1])
    torch.save(expected, paths[2])
    subprocess.run([sys.executable, "-c", LOAD, *map(str, paths)], env=package(library), check=True)


def test_merged_models_are_exported_without_adapters():
    model, x = block().eval(), inputs(2, 5).detach()
    expected = model(x)
    merge(model)
    program = torch.export.export(model, (x,))
    assert not any("adalora" in str(node.target) for node in program.graph.nodes)
    compare([program.module()(x)], [expected])


# Modes and transforms


# The checks themselves look at gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_the_rules_of_their_kind():
    for dtype, seed, weight in (
        (torch.float32, None, None),
        (torch.float64, torch.tensor([3, 4]), torch.randn(4, 6, dtype=torch.float64)),
    ):
        x, y, A, E, B = (
            torch.randn(shape, dtype=dtype, requires_grad=True)
            for shape in ((2, 5, 6), (2, 5, 4), (3, 6), (3, 1), (4, 3))
        )
        dropout = 0.0 if seed is None else 0.5
        forward = (x, y, A, E, B, 0.7, dropout, seed, weight)
        torch.library.opcheck(torch.ops.adalora.svd_linear.default, forward)
        with torch.no_grad():
            _, h = torch.ops.adalora.svd_linear(*forward)
            for with_dx in (False, True):
                backward = (torch.randn(2, 5, 4, dtype=dtype), x, h, A, E, B, 0.7, dropout, seed, with_dx)
                torch.library.opcheck(torch.ops.adalora.svd_linear_backward.default, backward)


# Likewise.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_penalty_as_an_operator(dtype):
    shapes = (3, 6), (3, 1), (4, 3), (2, 5), (2, 1), (7, 2)
    params = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.adalora.orthogonality.default, (params, 0.5), test_utils=checks)
    wide = [p.detach().double().requires_grad_() for p in params]
    factors = [factor for A, B in zip(wide[::3], wide[2::3], strict=True) for factor in (A, B.T)]
    expected = 0.5 / 4 * sum((each @ each.T - torch.eye(len(each))).norm() for each in factors)
    found = torch.ops.adalora.orthogonality(params, 0.5)[0]
    close = {"check_dtype": False, "rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected.detach(), **close)
    trained = [k for k in range(6) if k % 3 != 1]
    grads = [torch.autograd.grad(3 * y, [p[k] for k in trained]) for y, p in ((found, params), (expected, wide))]
    for one, other in zip(*grads, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **close)


def test_finite_differences_of_the_operator():
    shapes = (2, 3, 6), (2, 3, 4), (3, 6), (3, 1), (4, 3)
    torch.manual_seed(4)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight, seed = torch.randn(4, 6, dtype=torch.float64), torch.tensor([5, 6])

    def run(x: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        base = nn.functional.linear(x, weight)
        # The base layer's gradient for x comes from the operator: its output carries none.
        y = y + base.detach()
        return torch.ops.adalora.svd_linear(x, y, *params, 0.3, 0.4, seed, weight)[0]

    def whole(x: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        return torch.ops.adalora.svd_linear(x, y + nn.functional.linear(x, weight), *params, 0.3, 0.4, seed, None)[0]

    assert torch.autograd.gradcheck(whole, tensors)
    dy = torch.randn(2, 3, 4, dtype=torch.float64)
    outputs = [torch.autograd.grad(f(*tensors), tensors, dy) for f in (run, whole)]
    compare(*outputs)


def test_make_fx_and_fake_tensors_see_the_operator():
    model, x = block().eval(), inputs(2, 5).detach()
    with torch.no_grad():
        graph = make_fx(model)(x)
        assert torch.equal(graph(x), model(x))
    assert sum("adalora" in str(node.target) for node in graph.graph.nodes) == 4
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(3, 7, 8)).shape == (3, 7, 8)


def test_functional_call_takes_other_parameters():
    model, x = block(), inputs(2, 5)
    torch.manual_seed(5)
    other = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    changed = copy.deepcopy(model)
    changed.load_state_dict(other)
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = lambda other, x: torch.func.functional_call(model, other, (x,))  # noqa: E731
    found = run({name: p.requires_grad_() for name, p in other.items()}, x)
    assert torch.equal(found, changed(x))
    changed.requires_grad_(True)
    expected = torch.autograd.grad(changed(x).square().sum(), list(changed.parameters()))
    compare(list(torch.autograd.grad(found.square().sum(), list(other.values()))), list(expected))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    plain = {name: p.detach() for name, p in other.items()}
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compare([compiled(plain, x)], [found])
    grads = torch.func.grad(lambda other: run(other, x).square().sum())(plain)
    compare([grads[name] for name, _ in changed.named_parameters()], list(expected))


class Penalised(nn.Module):
    """The penalty of a block's adapters, for whatever parameters are in their places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.allocator = model, RankAllocator(model)

    def forward(self) -> Tensor:
        return self.allocator.orthogonality_loss()


def test_functional_call_of_the_penalty():
    module = Penalised(block())
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    plain = {name: p.detach() for name, p in trained.items()}
    run = lambda params: torch.func.functional_call(module, params, ())  # noqa: E731
    grads = torch.func.grad(run)(plain)
    expected = torch.autograd.grad(module(), list(trained.values()), allow_unused=True)
    for name, grad in zip(trained, expected, strict=True):
        torch.testing.assert_close(grads[name], torch.zeros_like(plain[name]) if grad is None else grad)
    first = next(iter(plain))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.func.grad(lambda params: torch.func.grad(run)(params)[first].sum())(plain)
    with pytest.raises(adalora.UnsupportedError, match="orthogonality_loss: expected tensors without vmap's dimension"):
        torch.func.vmap(run)({name: torch.stack([p, p]) for name, p in plain.items()})


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_is_not_supported_is_refused():
    model, x = block().eval(), inputs(2, 5).detach()
    unsupported = partial(pytest.raises, adalora.UnsupportedError)
    with unsupported(match="expected tensors without vmap's dimension"):
        torch.func.vmap(model)(x)
    with unsupported(match="expected tensors without vmap's dimension"):
        torch.func.jacrev(model)(x)
    with unsupported(match="found forward mode"):
        torch.func.jvp(model, (x,), (x,))
    with unsupported(match=r"found one that torch\.jit traces: use torch\.export"):
        torch.jit.trace(model, x)
    x.requires_grad_(True)
    with unsupported(match="backward: expected gradients without vmap's dimension"):
        torch.autograd.functional.jacobian(model, x, vectorize=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: model(x).square().sum())(x).sum())(x)
