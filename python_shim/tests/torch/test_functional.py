"""The autograd function: against PyTorch's own operators, finite differences, and the laws of autograd."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from child import package
from torch.utils.checkpoint import checkpoint

import adalora
from adalora.torch import Part, functional, svd_linear
from adalora.torch.functional import context

# Type of x and y, of the triplets, and how far results may be from float64's.
TYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 2e-2),
    (torch.float16, torch.float32, 2e-3),
    (torch.bfloat16, torch.bfloat16, 4e-2),
    (torch.float16, torch.float16, 4e-3),
    # Cast to the type that goes with y.
    (torch.float32, torch.bfloat16, 1e-2),
    (torch.float64, torch.float32, 1e-6),
    (torch.bfloat16, torch.float16, 2e-2),
]


def triplets(rank: int, into: int, out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = (rank, into), (rank, 1), (out, rank)
    return [torch.randn(shape).to(dtype).requires_grad_(True) for shape in shapes]


def reference(x: torch.Tensor, part: Part, mask: torch.Tensor | float = 1.0) -> torch.Tensor:
    x, y, A, E, B = (t.double() for t in (x, *part[:4]))
    return y + (x * mask @ A.T * E.squeeze(-1)) @ B.T * part.scaling


def gradients(outputs: list[torch.Tensor], dys: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(outputs, inputs, dys))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("activation", "param", "tolerance"), TYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_results_are_those_of_pytorchs_operators(activation, param, tolerance, in_place):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 20).to(activation).requires_grad_(True)
    parts = [
        Part(torch.randn(3, 5, out).to(activation).requires_grad_(True), *triplets(rank, 20, out, param), scaling=0.7)
        for out, rank in ((12, 4), (7, 3), (12, 1))
    ]
    dys = [torch.randn(part.y.shape).to(activation) for part in parts]
    inputs = [x, *(t for part in parts for t in part[:4])]

    expected = [reference(x, part) for part in parts]
    wanted = gradients(expected, [dy.double() for dy in dys], inputs)
    # A leaf may not be overwritten, and what is computed from it may.
    given = [part._replace(y=part.y * 1, in_place=in_place) for part in parts]
    before = [part.y for part in given]
    found = svd_linear(x, given)
    assert all(y is b for y, b in zip(found, before, strict=True)) == in_place
    assert [y.dtype for y in found] == [activation] * 3
    assert max(map(distance, found, expected)) < tolerance
    got = gradients(found, dys, inputs)
    assert [g.dtype for g in got] == [t.dtype for t in inputs]
    assert max(map(distance, got, (w.double() for w in wanted))) < tolerance


def test_finite_differences():
    torch.manual_seed(2)
    A, E, B = triplets(3, 6, 5, torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    run = lambda x, y, A, E, B: svd_linear(x, [Part(y * 1, A, E, B, 0.3, in_place=True)])[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, y, A, E, B))


@pytest.mark.parametrize(
    "x", [torch.randn(9, 40)[:, 5:25], torch.randn(20, 9).T, torch.randn(1, 20).expand(9, 20), torch.randn(2, 9, 20)[1]]
)
def test_any_strides(x):
    part = Part(torch.randn(6, 9).T, *triplets(2, 20, 6, torch.float32), scaling=1.5)
    x.requires_grad_(True)
    expected = reference(x, part)
    # The gradient of a sum has strides of 0.
    wanted = gradients([expected.sum()], None, [x, *part[1:4]])
    (found,) = svd_linear(x, [part])
    assert distance(found, expected) < 1e-5
    got = gradients([found.sum()], None, [x, *part[1:4]])
    assert max(map(distance, got, wanted)) < 1e-5


def test_a_negative_view():
    A, E, B = triplets(2, 1, 6, torch.float64)
    x = torch.randn(5, 1, dtype=torch.complex128).conj().imag
    y = torch.randn(5, 6, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    (found,) = svd_linear(x, [Part(y, A, E, B, 1.0)])
    torch.testing.assert_close(found, reference(x.clone(), Part(y.clone(), A, E, B, 1.0)))


def test_a_negative_view_is_no_array_for_native_calls():
    adapter = adalora.Adapter(adalora.Context(), 4, 3, init_r=2, dtype="float64")
    w = torch.zeros(3, 4, dtype=torch.complex128).conj().imag
    assert w.is_neg()
    with pytest.raises(adalora.InvalidArgumentError, match=r"^w: .* give its resolve_neg\(\)$"):
        adapter.delta_weight(adapter.new_params(1), w)


def test_no_tokens_and_no_rank():
    x = torch.randn(0, 20, requires_grad=True)
    part = Part(torch.randn(0, 6), *triplets(2, 20, 6, torch.float32), scaling=1.0)
    (y,) = svd_linear(x, [part])
    assert y.shape == (0, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in part[1:4])
    x = torch.randn(3, 20, requires_grad=True)
    part = Part(torch.randn(3, 6), *triplets(0, 20, 6, torch.float32), scaling=1.0)
    (y,) = svd_linear(x, [part])
    assert torch.equal(y, part.y)
    y.sum().backward()
    assert (x.grad == 0).all()


def test_only_what_is_needed_gets_a_gradient():
    part = Part(torch.randn(3, 6), *triplets(2, 20, 6, torch.float32), scaling=1.0)
    part.A.requires_grad_(False)
    x = torch.randn(3, 20)
    (y,) = svd_linear(x, [part])
    y.sum().backward()
    assert (x.grad, part.A.grad) == (None, None)
    assert part.E.grad is not None
    assert part.B.grad is not None


def test_an_unused_output_gives_no_gradient():
    x = torch.randn(3, 20, requires_grad=True)
    used, unused = (Part(torch.randn(3, 6), *triplets(2, 20, 6, torch.float32), scaling=1.0) for _ in range(2))
    ys = svd_linear(x, [unused, used])
    ys[1].sum().backward()
    alone = torch.autograd.grad(svd_linear(x, [used])[0].sum(), [x, *used[1:4]])
    assert all(map(torch.equal, (x.grad, *(p.grad for p in used[1:4])), alone))
    assert [p.grad for p in unused[1:4]] == [None] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    part = Part(torch.randn(3, 6), *triplets(2, 20, 6, torch.float32), scaling=1.0)
    x = torch.randn(3, 20)
    (expected,) = svd_linear(x, [part])
    with mode():
        (found,) = svd_linear(x, [part])
    assert found.grad_fn is None
    assert found.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("power", [1, 2])
def test_once_differentiable(power):
    part = Part(torch.randn(3, 6), *triplets(2, 20, 6, torch.float32), scaling=1.0)
    x = torch.randn(3, 20, requires_grad=True)
    (y,) = svd_linear(x, [part])
    # With power 1 the incoming gradient is constant, and dx depends on A, E and B all the same.
    dx, dA = torch.autograd.grad(y.pow(power).sum(), [x, part.A], create_graph=True)
    for grad in (dx, dA):
        for again in (grad.sum().backward, lambda: torch.autograd.grad(dx.sum(), part.A, allow_unused=True)):
            with pytest.raises(RuntimeError, match="once_differentiable"):
                again()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hessian(lambda x: svd_linear(x, [part])[0].pow(power).sum(), x)


def test_a_parameter_changed_before_backward_is_noticed():
    part = Part(torch.randn(3, 6), *triplets(2, 20, 6, torch.float32), scaling=1.0)
    (y,) = svd_linear(torch.randn(3, 20), [part])
    with torch.no_grad():
        part.B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_shapes_and_types_are_named():
    A, E, B = triplets(2, 20, 6, torch.float32)
    x, y = torch.randn(3, 20), torch.randn(3, 6)
    for wrong, message in (
        ((torch.randn(2, 6), A, E, B), r"y: expected shape \[3, 6\], found \[2, 6\]"),
        ((torch.zeros(3, 6, dtype=torch.int64), A, E, B), r"y: expected one of float32, .*, found int64"),
        ((y, A[:, 1:], E, B), r"x: expected 19 features as A has, found 20"),
        ((y, A, E[:1], B), r"E: expected shape \[2, 1\], found \[1, 1\]"),
        ((y, A, E, B[:, :1]), r"B: expected shape \[6, 2\], found \[6, 1\]"),
        ((y, A, E.to("meta"), B), r"E: expected a tensor on cpu, found one on meta"),
        ((torch.zeros(3, 8)[:, :6], A, E, B), r"y: expected a contiguous tensor to overwrite, found strides \[8, 1\]"),
        ((torch.zeros(1, 6).expand(3, 6), A, E, B), r"y: expected a contiguous tensor to overwrite, found"),
    ):
        with pytest.raises(adalora.InvalidArgumentError, match=message):
            svd_linear(x, [Part(*wrong, 1.0, in_place=True)])
    with pytest.raises(adalora.InvalidArgumentError, match="overlap"):
        svd_linear(x, [Part(y, A, E, B, 1.0, in_place=True)] * 2)
    with pytest.raises(adalora.InvalidArgumentError, match=r"parts: expected at least one, found none"):
        svd_linear(x, [])
    good = Part(y, A, E, B, 1.0)
    with pytest.raises(adalora.InvalidArgumentError, match=r"parts\[1\]\.y: expected torch.float32 as the first"):
        svd_linear(x, [good, good._replace(y=y.double())])


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_parameters_of_different_types(kept):
    params = triplets(2, 20, 6, torch.bfloat16)
    params[kept] = params[kept].detach().float().requires_grad_(True)
    part = Part(torch.randn(3, 6).bfloat16(), *params, scaling=1.5)
    x = torch.randn(3, 20).bfloat16()
    (y,) = svd_linear(x, [part])
    assert distance(y, reference(x, part)) < 2e-2
    grads = torch.autograd.grad(y.sum(), params)
    wanted = torch.autograd.grad(reference(x, part).sum(), params)
    assert [g.dtype for g in grads] == [p.dtype for p in params]
    assert max(distance(g, w.double()) for g, w in zip(grads, wanted, strict=True)) < 4e-2


def test_the_same_parameters_with_other_data_are_looked_at_again():
    A, E, B = triplets(4, 20, 6, torch.float32)
    x = torch.randn(3, 20)

    def check() -> None:
        part = Part(torch.randn(3, 6), A, E, B, 1.0)
        for _ in range(2):
            assert distance(svd_linear(x, [part])[0], reference(x, part)) < 1e-5

    check()
    # A view of the same memory, then other strides, types and no gradient.
    A.data, E.data, B.data = A.data[:3], E.data[:3], B.data[:, :3]
    check()
    B.data = B.data.contiguous()
    check()
    A.data, E.data, B.data = A.data.double(), E.data.double(), B.data.double()
    check()
    B.data = torch._neg_view(B.data)
    check()
    for p in (A, E, B):
        p.requires_grad_(False)
    check()
    with torch.no_grad():
        check()
    E.data = E.data[:2]
    for _ in range(2):
        with pytest.raises(adalora.InvalidArgumentError, match=r"E: expected shape \[3, 1\], found \[2, 1\]"):
            svd_linear(x, [Part(torch.randn(3, 6), A, E, B, 1.0)])


def test_backward_reads_exchanged_parameters_as_they_lie():
    A, E, B = triplets(6, 6, 6, torch.float64)
    x, dy = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, dtype=torch.float64)
    for _ in range(2):
        (y,) = svd_linear(x, [Part(torch.zeros(3, 6, dtype=torch.float64), A, E, B, 0.5)])
        A.data, B.data = A.data.t(), B.data.t()
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, (0.5 * ((dy @ B) * E.T) @ A).detach(), rtol=1e-12, atol=1e-12)
        A.data, B.data = A.data.t(), B.data.t()


@pytest.mark.parametrize("changed", [lambda p: p[:2], lambda p: p.double(), lambda p: p.half()])
def test_backward_refuses_exchanged_parameters(changed):
    A, E, B = triplets(4, 20, 6, torch.float32)
    (y,) = svd_linear(torch.randn(3, 20), [Part(torch.randn(3, 6), A, E, B, 1.0)])
    A.data = changed(A.data)
    with pytest.raises(adalora.InvalidStateError, match=r"backward: expected A, E and B as forward had them, found"):
        y.sum().backward()


def test_calls_of_one_geometry_and_different_numbers_of_tokens_interleave():
    params = triplets(2, 20, 6, torch.float32)
    xs = [torch.randn(*shape, 20, requires_grad=True) for shape in ((3,), (2, 4), (0,), (5,), (3,))]
    parts = [Part(torch.randn(*x.shape[:-1], 6), *params, 0.5) for x in xs]
    for _ in range(2):
        ys = [svd_linear(x, [part])[0] for x, part in zip(xs, parts, strict=True)]
        expected = [reference(x, part) for x, part in zip(xs, parts, strict=True)]
        found = torch.autograd.grad([y.square().sum() for y in ys], [*xs, *params])
        wanted = torch.autograd.grad([y.square().sum() for y in expected], [*xs, *params])
        assert max(distance(f, w) for f, w in zip(found, wanted, strict=True) if f.numel()) < 1e-5


# Dropout


def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements of x are kept, seen through an adapter that passes x on."""
    n = x.shape[1]
    eye = torch.eye(n, dtype=x.dtype)
    part = Part(x.new_zeros(len(x), n), eye, x.new_ones(n, 1), eye, 1.0, lora_dropout=p)
    (y,) = svd_linear(torch.ones_like(x), [part])
    return y


def test_dropout_follows_pytorchs_generator():
    x = torch.ones(200, 64)
    torch.manual_seed(3)
    first, second = dropped(x, 0.25), dropped(x, 0.25)
    torch.manual_seed(3)
    assert torch.equal(dropped(x, 0.25), first)
    state = torch.get_rng_state()
    assert torch.equal(dropped(x, 0.25), second)
    torch.set_rng_state(state)
    assert torch.equal(dropped(x, 0.25), second)
    assert not torch.equal(first, second)
    # Bernoulli: 12,800 elements, four standard deviations.
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert abs((first == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / first.numel()) ** 0.5


def test_parts_of_a_call_drop_different_elements():
    n = 32
    eye = lambda: [torch.eye(n), torch.ones(n, 1), torch.eye(n)]  # noqa: E731
    parts = [Part(torch.zeros(50, n), *eye(), 1.0, lora_dropout=0.5) for _ in range(2)]
    one, two = svd_linear(torch.ones(50, n), parts)
    assert abs((one == two).float().mean().item() - 0.5) < 0.1


def test_backward_drops_what_forward_dropped():
    torch.manual_seed(4)
    part = Part(torch.zeros(30, 6), *triplets(2, 20, 6, torch.float64), scaling=1.0, lora_dropout=0.4)
    part = part._replace(y=part.y.double())
    x = torch.randn(30, 20, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    (y,) = svd_linear(x, [part])
    torch.set_rng_state(state)
    mask = dropped(x, 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    expected = reference(x, part, mask)
    assert distance(y, expected) < 1e-12
    dy = torch.randn_like(y)
    # Other draws in between change nothing.
    torch.rand(5)
    got = gradients([y], [dy], [x, *part[1:4]])
    wanted = gradients([expected], [dy], [x, *part[1:4]])
    assert max(map(distance, got, wanted)) < 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_mask(use_reentrant):
    parts = triplets(4, 20, 6, torch.float32)
    x = torch.randn(30, 20, requires_grad=True)
    frozen = torch.randn(6, 20)

    def block(x: torch.Tensor) -> torch.Tensor:
        return svd_linear(x, [Part(x @ frozen.T, *parts, 2.0, lora_dropout=0.5, in_place=True)])[0].tanh()

    torch.manual_seed(5)
    plain = block(x)
    wanted = torch.autograd.grad(plain.sum(), [x, *parts])
    torch.manual_seed(5)
    again = checkpoint(block, x, use_reentrant=use_reentrant)
    assert torch.equal(again, plain)
    again.sum().backward()
    assert all(map(torch.equal, (x.grad, *(p.grad for p in parts)), wanted))


# Threads


def test_threads_change_no_bit():
    torch.manual_seed(6)
    x = torch.randn(700, 96, requires_grad=True)
    part = Part(torch.randn(700, 80), *triplets(12, 96, 80, torch.float32), scaling=1.0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            (y,) = svd_linear(x, [part])
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *part[1:4]])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_from_many_threads_at_once():
    torch.manual_seed(7)
    x = torch.randn(64, 48)
    part = Part(torch.randn(64, 40), *triplets(5, 48, 40, torch.float32), scaling=1.0)
    (expected,) = svd_linear(x, [part])
    wanted = torch.autograd.grad(expected.sum(), part.A)[0]
    failures = []

    def work() -> None:
        for _ in range(30):
            (y,) = svd_linear(x, [part])
            if not torch.equal(y, expected) or not torch.equal(torch.autograd.grad(y.sum(), part.A)[0], wanted):
                failures.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


COUNT_THREADS = """
import os, torch
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
torch.randn(4_000_000).exp_()
before = count()
from adalora.torch import Part, svd_linear
from adalora.torch.functional import context
part = Part(torch.randn(4000, 256), torch.randn(8, 256), torch.randn(8, 1), torch.randn(256, 8), 1.0)
for _ in range(5):
    svd_linear(torch.randn(4000, 256), [part])
print(before, count(), context(torch.device("cpu")).describe())
"""


def test_pytorchs_own_threads_do_the_work(library):
    command = [sys.executable, "-c", COUNT_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=package(library), check=True)
    before, after, description = done.stdout.strip().split(" ", 2)
    assert int(before) >= 4
    assert after == before
    assert "at most 4 threads of the caller's" in description


def test_a_call_has_one_context(monkeypatch):
    """Threads that come first at the same time may make several."""
    monkeypatch.setattr(functional, "context", lambda *_: adalora.Context())
    parts = [Part(torch.zeros(3, 17), *triplets(2, 19, 17, torch.float32), 1.0) for _ in range(2)]
    assert len(svd_linear(torch.ones(3, 19), parts)) == 2


def test_one_context_for_each_device():
    assert context(torch.device("cpu")) is context(torch.device("cpu"))
    with pytest.raises(adalora.UnsupportedError, match="expected one of type cpu or cuda, found meta"):
        context(torch.device("meta"))
