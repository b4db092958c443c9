"""Adapters on convolutions: against the explicit delta weight, finite differences, and PEFT beside ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalora.errors import InvalidArgumentError
from adalora.torch import svd_conv

# Every option of a convolution, alone and together.
GEOMETRIES = {
    "plain": (2, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
    "pointwise": (2, {"in_channels": 4, "out_channels": 6, "kernel_size": 1}),
    "uneven": (2, {"in_channels": 3, "out_channels": 5, "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)}),
    "dilated": (2, {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "dilation": (2, 1), "padding": "valid"}),
    "same": (2, {"in_channels": 3, "out_channels": 5, "kernel_size": (5, 3), "dilation": (1, 2), "padding": "same"}),
    "reflect": (
        2,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    ),
    "replicate": (
        2,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 2, "padding": "same", "padding_mode": "replicate"},
    ),
    "circular": (
        2,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2},
    ),
    "grouped": (2, {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "stride": 2, "padding": 1}),
    "depthwise": (2, {"in_channels": 20, "out_channels": 60, "kernel_size": 3, "groups": 20, "padding": 1}),
    "one dimension": (
        1,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 2, "dilation": 2},
    ),
    "one dimension, reflect": (
        1,
        {"in_channels": 3, "out_channels": 5, "kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    ),
}


def convolution(name: str, dtype: torch.dtype = torch.float64) -> nn.Conv1d | nn.Conv2d:
    dimensions, options = GEOMETRIES[name]
    return (nn.Conv1d, nn.Conv2d)[dimensions - 1](**options, dtype=dtype)


def an_input(base: nn.Conv1d | nn.Conv2d, dtype: torch.dtype = torch.float64, n: int = 2) -> Tensor:
    return torch.randn(n, base.in_channels, *(7, 6)[: len(base.kernel_size)]).to(dtype)


def triplets(base: nn.Conv1d | nn.Conv2d, r: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (r, base.weight[0].numel()), (r, 1), (base.out_channels, r)
    return [torch.randn(shape).to(dtype).requires_grad_(True) for shape in shapes]


def reference(x: Tensor, y: Tensor, A: Tensor, E: Tensor, B: Tensor, scaling: float, base: nn.Module) -> Tensor:
    """The base's own forward with the delta weight in the place of its weight."""
    x, y, A, E, B = (t.double() for t in (x, y, A, E, B))
    delta = (scaling * B @ (E * A)).view(base.weight.shape)
    return y + base._conv_forward(x, delta, None)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("r", [2, 3])
def test_results_are_those_of_the_delta_weight(geometry, in_place, layout, r):
    torch.manual_seed(1)
    base = convolution(geometry)
    x = an_input(base)
    if layout == torch.channels_last:
        x = x.to(memory_format=layout) if x.dim() == 4 else x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_(True)
    y = base(x).detach().requires_grad_(True)
    if layout == torch.channels_last:
        y = y.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(True)
    params = triplets(base, r)
    dy = torch.randn_like(y)

    expected = reference(x, y, *params, 0.7, base)
    wanted = torch.autograd.grad(expected, [x, y, *params], dy)
    given = y * 1
    found = svd_conv(x, given, *params, 0.7, base=base, in_place=in_place)
    assert (found is given) == in_place
    torch.testing.assert_close(found, expected)
    assert found.stride() == y.stride()
    for got, want in zip(torch.autograd.grad(found, [x, y, *params], dy), wanted, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(svd_conv(x, y, *params, 0.7, base=base), expected)


@pytest.mark.parametrize("geometry", ["uneven", "circular", "one dimension, reflect"])
def test_finite_differences(geometry):
    torch.manual_seed(2)
    base = convolution(geometry)
    x = an_input(base, n=1).requires_grad_(True)
    y = base(x).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *given: svd_conv(*given, 0.7, base=base), [x, y, *triplets(base, 2)])


@pytest.mark.parametrize(
    ("activation", "param", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.float16, torch.float32, 1e-3),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.float32, torch.bfloat16, 1e-2),
        (torch.float64, torch.float32, 1e-6),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("r", [2, 3])
def test_types(activation, param, tolerance, layout, r):
    torch.manual_seed(3)
    base = convolution("grouped", activation)
    x = an_input(base, activation).to(memory_format=layout).requires_grad_(True)
    y = base(x).detach().to(memory_format=layout).requires_grad_(True)
    params = triplets(base, r, param)
    dy = torch.randn_like(y)
    expected = reference(x, y, *params, 0.7, base)
    wanted = torch.autograd.grad(expected, [x, y, *params], dy.double())
    found = svd_conv(x, y, *params, 0.7, base=base)
    assert found.dtype == activation
    got = torch.autograd.grad(found, [x, y, *params], dy)
    for ours, theirs in zip([found, *got], [expected, *wanted], strict=True):
        assert (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max()


def test_dropout_is_pytorchs():
    torch.manual_seed(4)
    base = convolution("plain")
    x, params = an_input(base), triplets(base)
    y = base(x).detach()
    torch.manual_seed(5)
    found = svd_conv(x, y, *params, 0.7, base=base, lora_dropout=0.4)
    torch.manual_seed(5)
    expected = reference(F.dropout(x, 0.4), y, *params, 0.7, base)
    torch.testing.assert_close(found, expected)


def test_one_image_no_image_and_no_triplet():
    torch.manual_seed(6)
    base = convolution("grouped")
    params = triplets(base)
    x = an_input(base)[0]
    y = base(x).detach()
    torch.testing.assert_close(svd_conv(x, y, *params, 0.7, base=base), reference(x, y, *params, 0.7, base))
    none = an_input(base, n=0)
    empty = svd_conv(none, base(none), *params, 0.7, base=base)
    assert empty.shape == (0, 9, 4, 3)
    gradients = torch.autograd.grad(empty.sum(), params)
    assert all(g.shape == p.shape and not g.any() for g, p in zip(gradients, params, strict=True))
    params = triplets(base, 0)
    found = svd_conv(x, y, *params, 0.7, base=base)
    assert torch.equal(found, y)
    assert [g.numel() for g in torch.autograd.grad(found.sum(), params)] == [0, 0, 0]


def test_gradients_are_not_differentiated_again():
    torch.manual_seed(7)
    base = convolution("plain")
    x, params = an_input(base).requires_grad_(True), triplets(base)
    loss = svd_conv(x, base(x), *params, 0.7, base=base).square().sum()
    (dB,) = torch.autograd.grad(loss, params[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dB.sum().backward()


def test_what_does_not_fit_is_refused():
    base = convolution("grouped")
    x = an_input(base)
    y, (A, E, B) = base(x).detach(), triplets(base)
    with pytest.raises(InvalidArgumentError, match=r"A: expected shape \[r, 18\] .* found \[3, 19\]"):
        svd_conv(x, y, torch.randn(3, 19), E, B, 1.0, base=base)
    with pytest.raises(InvalidArgumentError, match=r"B: expected shape \[9, 3\], found \[9, 4\]"):
        svd_conv(x, y, A, E, torch.randn(9, 4), 1.0, base=base)
    with pytest.raises(InvalidArgumentError, match=r"E: expected shape \[3, 1\], found \[3\]"):
        svd_conv(x, y, A, E[:, 0], B, 1.0, base=base)
    with pytest.raises(InvalidArgumentError, match=r"y: expected shape \[2, 9, 4, 3\], found \[2, 9, 4, 2\]"):
        svd_conv(x, y[..., :2], A, E, B, 1.0, base=base)
    with pytest.raises(InvalidArgumentError, match="y and h: expected the same shape but for 9 and 6 channels"):
        svd_conv(x, y[..., :2], A[:2], E[:2], B[:, :2], 1.0, base=base)
    with pytest.raises(InvalidArgumentError, match=r"base: expected .* found Conv3d"):
        svd_conv(x, y, A, E, B, 1.0, base=nn.Conv3d(1, 1, 1))
