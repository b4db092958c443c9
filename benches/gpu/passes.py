"""Forward and backward of adapters alone: the base layers' outputs are prepared, and cost neither side anything."""

from __future__ import annotations

from typing import Any, NamedTuple

import adalora
import torch
from adalora.torch import Part, svd_linear
from adalora.torch.functional import context
from timing import Timer, Times
from torch import Tensor, nn

ALPHA = 32
# More than the calls ask for.
WORKSPACE_BYTES = 256 << 20


class Shape(NamedTuple):
    """What is timed: that many layers of `width` to `width`, each on an input of its own."""

    tokens: int
    width: int
    rank: int
    layers: int

    def floor_bytes(self, operation: str) -> int:
        """What has to move in any case: x, y, dy and dx in bfloat16."""
        # Forward reads x and adds to y; backward reads dy and x and adds to dx.
        matrices = 3 if operation == "forward" else 7
        return matrices * 2 * self.layers * self.tokens * self.width


class Inputs:
    """What both sides work on."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        matrix = lambda: torch.randn(shape.tokens, shape.width, device=device).bfloat16()  # noqa: E731
        self.x = [matrix() for _ in range(shape.layers)]
        self.dy = [matrix() for _ in range(shape.layers)]
        self.params = [
            (
                0.02 * torch.randn(shape.rank, shape.width, device=device),
                torch.randn(shape.rank, 1, device=device),
                0.02 * torch.randn(shape.width, shape.rank, device=device),
            )
            for _ in range(shape.layers)
        ]


class Prepared(nn.Linear):
    """A base layer that costs nothing: it returns a y that was prepared."""

    def __init__(self, width: int, tokens: int, device: torch.device) -> None:
        super().__init__(1, 1, bias=False, device=device)
        self.in_features = self.out_features = width
        # Nobody reads it: one element takes the place of all.
        weight = torch.zeros((), dtype=torch.bfloat16, device=device).expand(width, width)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("y", torch.zeros(tokens, width, dtype=torch.bfloat16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """y, whatever x is."""
        return self.y.detach()


class Side:
    """One of those that are compared: `forward` and `forward_backward` of all layers."""

    def __init__(self, inputs: Inputs) -> None:
        self.dy = inputs.dy
        self.x = [x.clone().requires_grad_() for x in inputs.x]
        self.y = [torch.zeros_like(dy) for dy in inputs.dy]
        self.params: list[tuple[Tensor, ...]] = []

    def output(self, k: int) -> Tensor:
        """The output of layer k, as autograd sees it."""
        raise NotImplementedError

    def forward(self) -> None:
        """Outputs, with all that backward needs kept."""
        for k in range(len(self.x)):
            self.output(k)

    def forward_backward(self) -> None:
        """Gradients for A, E, B and x."""
        for tensor in (*self.x, *(p for triplets in self.params for p in triplets)):
            tensor.grad = None
        torch.autograd.backward([self.output(k) for k in range(len(self.x))], self.dy)

    def results(self) -> dict[str, Tensor]:
        """What one `forward_backward` on fresh outputs computed."""
        self.forward_backward()
        grads = {f"{k}/{n}": p.grad for k, triplets in enumerate(self.params) for n, p in enumerate(triplets)}
        return grads | {f"{k}/dx": x.grad for k, x in enumerate(self.x)} | {f"{k}/y": y for k, y in enumerate(self.y)}


class OverTorch(Side):
    """Ours by `adalora.torch`."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.params = [tuple(p.clone().requires_grad_() for p in triplets) for triplets in inputs.params]
        self.scaling = ALPHA / (len(inputs.params[0][0]) + 1e-5)

    def output(self, k: int) -> Tensor:
        """As `adalora.torch.SVDLinear` computes it."""
        return svd_linear(self.x[k], [Part(self.y[k].detach(), *self.params[k], self.scaling, in_place=True)])[0]


class OverC(Side):
    """Ours by the C interface; `operand_terms` as in `adalora.Adapter`."""

    def __init__(self, inputs: Inputs, timer: Timer, operand_terms: int = 0) -> None:
        super().__init__(inputs)
        self.timer = timer
        self.dx = [torch.zeros_like(x) for x in inputs.x]
        self.grads = [tuple(torch.zeros_like(p) for p in triplets) for triplets in inputs.params]
        on = context(timer.device)
        # One for all: they run in one stream.
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=timer.device)
        self.calls = []
        for x, y, dy, dx, params, grads in zip(
            inputs.x, self.y, inputs.dy, self.dx, inputs.params, self.grads, strict=True
        ):
            rank, width = params[0].shape
            adapter = adalora.Adapter(
                on, width, width, rank, lora_alpha=ALPHA, activation_dtype="bfloat16", operand_terms=operand_terms
            )
            h = torch.zeros(len(x), rank, device=timer.device)
            share = adalora.Share(adapter, adalora.Triplets(*params), adalora.Triplets(*grads), y=y, dy=dy, h=h)
            self.calls.append(adalora.GroupCall([share], x, dx=dx, workspace=workspace))

    def forward(self) -> None:
        """Outputs, with h kept."""
        for call in self.calls:
            call.forward(stream=self.timer.stream)

    def forward_backward(self) -> None:
        """Gradients for A, E, B and x."""
        self.forward()
        for call in reversed(self.calls):
            call.backward(accumulate=False, stream=self.timer.stream)

    def results(self) -> dict[str, Tensor]:
        """What one `forward_backward` on fresh outputs computed."""
        self.forward_backward()
        grads = {f"{k}/{n}": g for k, triplets in enumerate(self.grads) for n, g in enumerate(triplets)}
        return grads | {f"{k}/dx": x for k, x in enumerate(self.dx)} | {f"{k}/y": y for k, y in enumerate(self.y)}


class Lora(Side):
    """Plain LoRA of the same rank in PyTorch's operators, with parameters in bfloat16."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.params = [(A.bfloat16().requires_grad_(), B.bfloat16().requires_grad_()) for A, _, B in inputs.params]

    def output(self, k: int) -> Tensor:
        """`y + x A^T B^T`, scaled."""
        A, B = self.params[k]
        y = self.y[k].detach()
        y += (self.x[k] @ A.T @ B.T) * (ALPHA / len(A))
        return y


class Peft(Side):
    """PEFT's layers."""

    def __init__(self, inputs: Inputs, peft: Any) -> None:
        super().__init__(inputs)
        tokens, width = inputs.x[0].shape
        names = [str(k) for k in range(len(inputs.x))]
        base = nn.ModuleDict({name: Prepared(width, tokens, inputs.x[0].device) for name in names})
        config = peft.AdaLoraConfig(
            init_r=len(inputs.params[0][0]), target_r=1, lora_alpha=ALPHA, target_modules=names, total_step=1000
        )
        model = peft.get_peft_model(base, config)
        self.layers = [model.base_model.model[name] for name in names]
        self.y = [layer.base_layer.y for layer in self.layers]
        self.params = [tuple(getattr(layer, f"lora_{matrix}")["default"] for matrix in "AEB") for layer in self.layers]
        with torch.no_grad():
            for own, given in zip(self.params, inputs.params, strict=True):
                for p, value in zip(own, given, strict=True):
                    p.copy_(value)

    def output(self, k: int) -> Tensor:
        """What PEFT's layer returns."""
        return self.layers[k](self.x[k])


def compare(shape: Shape, timer: Timer, peft: Any) -> dict[str, Times]:
    """By operation, once all sides were seen to compute the same."""
    inputs = Inputs(shape, timer.device)
    sides: dict[str, Side] = {"c": OverC(inputs, timer), "torch": OverTorch(inputs)}
    # A and B rounded to bfloat16 where they are multiplied, as LoRA's are.
    sides["c_one_term"] = OverC(inputs, timer, operand_terms=1)
    if peft is not None:
        sides["peft"] = Peft(inputs, peft)
    agree({name: side.results() for name, side in sides.items()})
    sides["lora"] = Lora(inputs)
    times = {}
    for operation in ("forward", "forward_backward"):
        works = {name: getattr(side, operation) for name, side in sides.items()}
        times[operation] = timer.times(works | timer.graphs(works))
    return times


def agree(results: dict[str, dict[str, Tensor]]) -> None:
    """Refuse to time what computes something else: everything is compared with the last side's."""
    *others, (last, expected) = results.items()
    for name, found in others:
        for tensor, want in expected.items():
            got, want = found[tensor].float(), want.float()
            error = ((got - want).norm() / want.norm()).item()
            if not error <= 2e-2:
                raise SystemExit(f"{tensor}: {name} and {last} differ by {error:.1e}, expected at most 2e-2")
