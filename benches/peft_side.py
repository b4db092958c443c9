"""PEFT's AdaLoRA: its own layers, penalty and rank allocator, with PyTorch's AdamW and gradient clipping."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from peft import AdaLoraConfig, get_peft_model
from problem import (
    ALPHA,
    FIRST_STEP,
    LR,
    MAX_NORM,
    ORTH_REG_WEIGHT,
    TFINAL,
    TINIT,
    TOTAL_STEP,
    WEIGHT_DECAY,
    Layer,
    Shape,
)
from torch import nn


class Prepared(torch.autograd.Function):
    """The output of a base layer that costs nothing."""

    @staticmethod
    def forward(ctx, x, y):
        """It hangs on x, as a layer's output does. `.data`: a tensor of its own, which may be added to in place."""
        return y.data

    @staticmethod
    def backward(ctx, dy):
        """The base layer adds nothing to dx."""
        return None, None


class PreparedBase(nn.Module):
    """Stands for a frozen layer, so that the adapter alone is timed."""

    def __init__(self, y: torch.Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x):
        """The output that is there already."""
        return Prepared.apply(x, self.y)


class Stack(nn.Module):
    """Linear layers side by side, and a loss that PEFT adds its penalty to."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(shape.in_features, shape.out_features) for _ in range(shape.layers))

    def forward(self, loss):
        """PEFT looks for `.loss` in what a model returns."""
        return SimpleNamespace(loss=loss)


class PeftSide:
    """One model's adapters, ready to be timed."""

    def __init__(self, shape: Shape, layers: Sequence[Layer]) -> None:
        config = AdaLoraConfig(
            init_r=shape.rank,
            target_r=shape.target_rank,
            tinit=TINIT,
            tfinal=TFINAL,
            total_step=TOTAL_STEP,
            deltaT=1,
            lora_alpha=ALPHA,
            orth_reg_weight=ORTH_REG_WEIGHT,
            target_modules=[f"layers.{i}" for i in range(shape.layers)],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(Stack(shape), config).base_model
        self.adapters = list(self.model.model.layers)
        self.ys = [layer.y.clone() for layer in layers]
        self.dys = [layer.dy for layer in layers]
        self.xs = []
        for adapter, layer, y in zip(self.adapters, layers, self.ys, strict=True):
            adapter.base_layer = PreparedBase(y)
            for name, parameter in self._triplets(adapter).items():
                parameter.data.copy_(layer.params[name])
            x = layer.x.clone().requires_grad_()
            # As in a network, where the base layer's part of dx is there and the adapter's is added.
            x.grad = torch.zeros_like(x)
            self.xs.append(x)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
        self.step = FIRST_STEP
        self.penalty = 0.0

    @staticmethod
    def _triplets(adapter) -> dict[str, nn.Parameter]:
        return {name: getattr(adapter, f"lora_{name}")["default"] for name in "AEB"}

    def set_gradients(self, layers: Sequence[Layer]) -> None:
        """Begin from given gradients."""
        for adapter, layer in zip(self.adapters, layers, strict=True):
            for name, parameter in self._triplets(adapter).items():
                parameter.grad = layer.grads[name].clone()

    def forward_backward(self) -> None:
        """All layers forward, then all backward. Gradients begin anew, as after `zero_grad`."""
        for parameter in self.parameters:
            parameter.grad = None
        ys = [adapter(x) for adapter, x in zip(self.adapters, self.xs, strict=True)]
        torch.autograd.backward(ys, self.dys)

    def orthogonality(self) -> None:
        """The penalty, which PEFT adds to the loss, and its gradient."""
        loss = self.model(torch.zeros(())).loss
        loss.backward()
        self.penalty = loss

    def optimizer_allocator(self) -> None:
        """Clip, step, and take a mask."""
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.model.update_and_allocate(self.step)
        self.step += 1

    def tensors(self, operation: str) -> dict[str, np.ndarray]:
        """What an operation leaves, in float32."""
        found = {}
        for k, (adapter, x, y) in enumerate(zip(self.adapters, self.xs, self.ys, strict=True)):
            triplets = self._triplets(adapter)
            if operation == "optimizer_allocator":
                found |= {f"{name} of layer {k}": triplets[name].detach() for name in "AEB"}
                continue
            found |= {f"d{name} of layer {k}": triplets[name].grad for name in "AEB"}
            if operation == "forward_backward":
                found |= {f"y of layer {k}": y, f"dx of layer {k}": x.grad}
        found = {name: tensor.float().numpy().copy() for name, tensor in found.items()}
        if operation == "orthogonality":
            found["penalty"] = np.array([float(self.penalty)])
        return found
