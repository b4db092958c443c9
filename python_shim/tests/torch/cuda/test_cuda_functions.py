"""The functions that autograd differentiates, on CUDA tensors: beside PyTorch's operators and beside the CPU."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

import adalora
from adalora import InvalidArgumentError
from adalora.torch import Part, svd_conv, svd_linear

DEVICE = torch.device("cuda")
SCALING = 0.7


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_(True) for tensor in tensors]


def expected(x: Tensor, y: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """By PyTorch's operators, in float64."""
    x, y, A, E, B = (tensor.double() for tensor in (x, y, A, E, B))
    return y + SCALING * ((x @ A.T) * E.view(-1)) @ B.T


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "error"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        # Output and gradients are rounded to eight bits.
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float16, torch.float32, 2e-3),
    ],
)
def test_values_and_gradients_are_autograds(dtype, param_dtype, error):
    x = made(3, 70, 40, seed=1, dtype=dtype)
    parts = []
    for k, (out, r) in enumerate(((56, 5), (33, 12))):
        y = made(3, 70, out, seed=10 * k + 2, dtype=dtype)
        params = (
            made(*shape, seed=10 * k + 3 + n, dtype=param_dtype) for n, shape in enumerate(((r, 40), (r, 1), (out, r)))
        )
        parts.append((y, *params))
    dys = [made(*part[0].shape, seed=k + 50, dtype=dtype) for k, part in enumerate(parts)]

    (x_own,), own = leaves(x), [leaves(*part) for part in parts]
    outputs = svd_linear(x_own, [Part(*part, SCALING) for part in own])
    torch.autograd.backward(outputs, dys)
    (x_ref,), ref = leaves(x.double()), [leaves(*(t.double() for t in part)) for part in parts]
    wanted = [expected(x_ref, *part) for part in ref]
    torch.autograd.backward(wanted, [dy.double() for dy in dys])

    pairs = [(y, want) for y, want in zip(outputs, wanted, strict=True)] + [(x_own.grad, x_ref.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(chain(*own), chain(*ref), strict=True)]
    for found, want in pairs:
        assert (found.double() - want).abs().max() <= error * want.abs().max()
    assert all(y.dtype == dtype and y.device.type == "cuda" for y in outputs)


def test_tensors_with_gaps_and_without_tokens():
    A, E, B = made(4, 24, seed=1), made(4, 1, seed=2), made(16, 4, seed=3)
    wide, y = made(10, 48, seed=4), made(10, 16, seed=5)
    for x in (wide[:, :24], wide[:, ::2], wide.T[:24, :10].T):
        (found,) = svd_linear(x, [Part(y, A, E, B, SCALING)])
        torch.testing.assert_close(found, expected(x, y, A, E, B), rtol=1e-12, atol=1e-12)
    (found,) = svd_linear(wide[:0, :24], [Part(y[:0], A, E, B, SCALING)])
    assert found.shape == (0, 16)


def test_dropout_is_the_cpus():
    inputs = [made(*shape, seed=k, dtype=torch.float32) for k, shape in enumerate(((50, 36), (50, 20), (6, 36)))]
    inputs += [made(6, 1, seed=8, dtype=torch.float32), made(20, 6, seed=9, dtype=torch.float32)]
    seed = torch.tensor([1234567890123, 42], device=DEVICE)
    dy = made(50, 20, seed=11, dtype=torch.float32)

    def results(device: str) -> list[Tensor]:
        x, y, A, E, B = (t.to(device) for t in inputs)
        output, h = torch.ops.adalora.svd_linear(x, y, A, E, B, SCALING, 0.3, seed.to(device), None)
        grads = torch.ops.adalora.svd_linear_backward(dy.to(device), x, h, A, E, B, SCALING, 0.3, seed.to(device), True)
        return [output, h, *grads]

    for found, want in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)
    x, y, A, E, B = inputs
    torch.manual_seed(3)
    first = svd_linear(x, [Part(y, A, E, B, SCALING, 0.5)])[0]
    second = svd_linear(x, [Part(y, A, E, B, SCALING, 0.5)])[0]
    torch.manual_seed(3)
    again = svd_linear(x, [Part(y, A, E, B, SCALING, 0.5)])[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_convolution():
    base = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64, device=DEVICE)
    x, A, E, B = made(2, 4, 9, 8, seed=1), made(3, 18, seed=2), made(3, 1, seed=3), made(6, 3, seed=4)
    y = base(x).detach()
    delta = SCALING * (B * E.view(-1)) @ A
    want = y + torch.nn.functional.conv2d(x, delta.view(6, 2, 3, 3), padding=1, groups=2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = svd_conv(
            x.to(memory_format=memory_format), y.to(memory_format=memory_format), A, E, B, SCALING, base=base
        )
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


def test_streams_side_by_side():
    """What one thread puts into two streams at once, each with memory of its own."""
    A, E, B = (t.float() for t in (made(8, 256, seed=1), made(8, 1, seed=2), made(256, 8, seed=3)))
    inputs = [(made(4096, 256, seed=4 + k).float(), made(4096, 256, seed=14 + k).float()) for k in range(2)]
    want = [svd_linear(x, [Part(y, A, E, B, SCALING)])[0] for x, y in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found = [None, None]
    for _ in range(5):
        for k, (stream, (x, y)) in enumerate(zip(streams, inputs, strict=True)):
            with torch.cuda.stream(stream):
                found[k] = svd_linear(x, [Part(y, A, E, B, SCALING)])[0]
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, want))


def test_operators_of_compiled_graphs():
    A, E, B = leaves(made(4, 24, seed=1), made(4, 1, seed=2), made(16, 4, seed=3))
    x, y = made(10, 24, seed=4), made(10, 16, seed=5)

    def loss(x, y):
        return svd_linear(x, [Part(y, A, E, B, SCALING)])[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, y), (A, E, B))
    want = torch.autograd.grad(expected(x, y, A, E, B).square().sum(), (A, E, B))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_tensors_elsewhere_are_refused():
    x, y = made(10, 24, seed=4), made(10, 16, seed=5)
    A, E, B = made(4, 24, seed=1), made(4, 1, seed=2), made(16, 4, seed=3)
    with pytest.raises(InvalidArgumentError, match="B: expected a tensor on cuda:0, found one on cpu"):
        svd_linear(x, [Part(y, A, E, B.cpu(), SCALING)])
    on_device, on_host = (adalora.Adapter(adalora.Context(backend), 24, 16, 4) for backend in ("cuda", "cpu"))
    params = adalora.Triplets(A.float(), E.float(), B.float())
    with pytest.raises(InvalidArgumentError, match=r"params\.A: expected an array in host memory, found one on cuda:0"):
        on_host.initialize(params, 1)
    with pytest.raises(InvalidArgumentError, match=r"params\.E: expected an array on cuda:0, found one in host memory"):
        on_device.initialize(params._replace(E=np.zeros(4, np.float32)), 1)


class Handed:
    """A tensor of which nothing but DLPack is known."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)


def test_arrays_of_any_framework():
    context = adalora.Context("cuda", to_device=lambda array: torch.from_numpy(array).to(DEVICE))
    adapter = adalora.Adapter(context, 24, 16, 4, dtype="bfloat16")
    A, E, B = (t.bfloat16() for t in (made(4, 24, seed=1), made(4, 1, seed=2), made(16, 4, seed=3)))
    x, y = made(10, 24, seed=4).bfloat16(), made(10, 16, seed=5).bfloat16()
    want = expected(x, y, A, E, B)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    y.mul_(1)
    # What PyTorch's stream has yet to do comes first: DLPack orders the two.
    params = adalora.Triplets(*map(Handed, (A, E, B)))
    call = adapter.call(Handed(x), params, y=Handed(y), scaling=SCALING, stream=side.cuda_stream)
    call.forward(stream=side.cuda_stream)
    side.synchronize()
    assert (y.double() - want).abs().max() <= 1e-2 * want.abs().max()
