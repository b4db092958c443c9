"""Whole training steps: ours as one CUDA graph and by `adalora.torch`, beside PEFT's eager loop."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import adalora
import torch
import update
from passes import WORKSPACE_BYTES
from timing import Timer, Times
from torch import Tensor, nn
from torch.nn import functional as F

SCHEDULE = {"tinit": 1, "tfinal": 10, "deltaT": 10, "total_step": 1_000_000}
TARGETS = r"layers\.\d+"
# A mask falls on one of these.
STEPS = 10


class Size(NamedTuple):
    """What is trained: that many layers of `width` to `width`, with an adapter each."""

    layers: int
    width: int
    tokens: int
    rank: int


class Stack(nn.Module):
    """Frozen layers in bfloat16, one after the other."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(size.width, size.width, bias=False, dtype=torch.bfloat16, device=device)
            for _ in range(size.layers)
        )
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=(2 / size.width) ** 0.5)

    def forward(self, x: Tensor, target: Tensor) -> SimpleNamespace:
        """The loss, where PEFT looks for it."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return SimpleNamespace(loss=F.mse_loss(self.layers[-1](x).float(), target.float()))


class OverC:
    """Our step over the C interface, written out as a trainer in C++ has it. It reads nothing back."""

    def __init__(self, stack: Stack, params: list[update.Triplet], x: Tensor, target: Tensor, timer: Timer) -> None:
        self.timer, self.x, self.target = timer, x, target
        self.weights = [layer.weight.detach() for layer in stack.layers]
        grads = [tuple(torch.zeros_like(p) for p in triplet) for triplet in params]
        self.update = update.OverC(params, grads, timer, SCHEDULE)
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=timer.device)
        n = len(params)
        self.inputs = [x, *(torch.empty_like(x) for _ in range(n - 1))]
        self.y, self.dy = ([torch.empty_like(target) for _ in range(n)] for _ in range(2))
        # The first layer's input wants no gradient.
        self.dx = [None, *(torch.empty_like(x) for _ in range(n - 1))]
        self.loss = torch.zeros((), device=timer.device)
        self.calls = []
        for k, (adapter, triplet, gradients) in enumerate(zip(self.update.adapters, params, grads, strict=True)):
            h = torch.empty(len(x), adapter.init_r, device=timer.device)
            share = adalora.Share(
                adapter, adalora.Triplets(*triplet), adalora.Triplets(*gradients), y=self.y[k], dy=self.dy[k], h=h
            )
            self.calls.append(adalora.GroupCall([share], self.inputs[k], dx=self.dx[k], workspace=workspace))

    def step(self) -> None:
        """Forward, loss, backward, penalty, norm, update, and what the schedule says."""
        stream, last = self.timer.stream, len(self.calls) - 1
        for k, call in enumerate(self.calls):
            torch.mm(self.inputs[k], self.weights[k].T, out=self.y[k])
            call.forward(stream=stream)
            if k < last:
                torch.clamp_min(self.y[k], 0, out=self.inputs[k + 1])
        difference = self.y[last].float() - self.target
        self.loss.copy_(difference.square().mean())
        self.dy[last].copy_(difference * (2 / difference.numel()))
        for k in range(last, -1, -1):
            dx = self.dx[k]
            if dx is not None:
                torch.mm(self.dy[k], self.weights[k], out=dx)
            self.calls[k].backward(accumulate=False, stream=stream)
            if dx is not None:
                torch.ops.aten.threshold_backward(dx, self.inputs[k], 0, grad_input=self.dy[k - 1])
        self.update.orthogonality()
        self.update.step()


class OverTorch(update.OverTorch):
    """Our step by `adalora.torch`."""

    def __init__(self, stack: Stack, rank: int, x: Tensor, target: Tensor) -> None:
        super().__init__(stack, rank, TARGETS, SCHEDULE)
        self.x, self.target = x, target

    def train(self, set_to_none: bool = True) -> Tensor:
        """One step; returns the loss. In a graph, gradients are zeroed where they are."""
        loss = self.model(self.x, self.target).loss
        loss.backward()
        self.orthogonality()
        self.step()
        self.optimizer.zero_grad(set_to_none)
        return loss


class Peft(update.Peft):
    """PEFT's step, whose model adds the penalty to the loss."""

    def __init__(self, peft: Any, stack: Stack, rank: int, x: Tensor, target: Tensor) -> None:
        super().__init__(peft, stack, rank, TARGETS, SCHEDULE)
        self.x, self.target = x, target

    def train(self) -> Tensor:
        """One step; returns the loss with the penalty."""
        # PeftModel.forward would leave the penalty out.
        loss = self.model.base_model(self.x, self.target).loss
        loss.backward()
        self.step()
        self.optimizer.zero_grad()
        return loss


def compare(size: Size, timer: Timer, peft: Any) -> Times:
    """Of one step, once all sides were seen to have the same losses."""
    torch.manual_seed(0)
    stack = Stack(size, timer.device)
    x, target = (torch.randn(size.tokens, size.width, device=timer.device).bfloat16() for _ in range(2))
    ours = OverTorch(copy.deepcopy(stack), size.rank, x, target)
    params = [tuple(p.detach().clone() for p in triplet) for triplet in update.triplets_of(ours.params)]
    graph = OverC(stack, params, x, target, timer)
    other = None
    if peft is not None:
        other = Peft(peft, copy.deepcopy(stack), size.rank, x, target)
        with torch.no_grad():
            for p, value in zip(other.params, ours.params, strict=True):
                p.copy_(value)
    for _ in range(3):
        graph.step()
        losses = {"torch": ours.train().item(), "c": graph.loss.item()}
        if other is not None:
            losses["peft"] = other.train().item() - graph.update.penalty.item()
        if max(losses.values()) - min(losses.values()) > 1e-2 * abs(losses["torch"]):
            raise SystemExit(f"losses {losses}, expected to differ by less than a hundredth")

    def repeated(work: Any) -> Any:
        return lambda: [work() for _ in range(STEPS)]

    captured = OverTorch(stack, size.rank, x, target)
    graphs = timer.graphs({"c": graph.step, "torch": functools.partial(captured.train, set_to_none=False)})
    works = {name: repeated(work) for name, work in graphs.items()} | {"torch": repeated(ours.train)}
    if other is not None:
        works["peft"] = repeated(other.train)
    ms = {name: time / STEPS for name, time in timer.medians(works).items()}
    return Times(ms, timer.kernels(graph.step))
