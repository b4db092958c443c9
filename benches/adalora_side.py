"""This library through its Python package: calls prepared once, as a trainer would keep them."""

from __future__ import annotations

from collections.abc import Sequence

import adalora
import numpy as np
import torch
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


def as_array(tensor: torch.Tensor) -> adalora.arrays.Array:
    """The tensor's own memory; NumPy has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return adalora.BFloat16(tensor.view(torch.uint16).numpy())
    return tensor.numpy()


def as_triplets(tensors: dict[str, torch.Tensor]) -> adalora.Triplets:
    """New arrays."""
    return adalora.Triplets(*(tensors[name].clone().numpy() for name in "AEB"))


class AdaloraSide:
    """One model's adapters, ready to be timed."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], context: adalora.Context) -> None:
        self.context = context
        dtype = "bfloat16" if layers[0].x.dtype == torch.bfloat16 else "float32"
        self.params = [as_triplets(layer.params) for layer in layers]
        self.ys = [layer.y.clone() for layer in layers]
        self.dxs = [torch.zeros_like(layer.x) for layer in layers]
        adapters = [
            adalora.Adapter(
                context, shape.in_features, shape.out_features, shape.rank, lora_alpha=ALPHA, activation_dtype=dtype
            )
            for _ in layers
        ]
        self.grads = [adapter.zeros() for adapter in adapters]
        self.calls = []
        workspace = None
        for k, (adapter, layer) in enumerate(zip(adapters, layers, strict=True)):
            share = adalora.Share(
                adapter,
                self.params[k],
                self.grads[k],
                y=as_array(self.ys[k]),
                dy=as_array(layer.dy),
                h=np.zeros((shape.tokens, shape.rank), np.float32),
            )
            x, dx = as_array(layer.x), as_array(self.dxs[k])
            self.calls.append(adalora.GroupCall([share], x, dx=dx, workspace=workspace))
            workspace = self.calls[0].workspace
        self.allocator = adalora.Allocator(
            context, adapters, target_r=shape.target_rank, tinit=TINIT, tfinal=TFINAL, total_step=TOTAL_STEP, deltaT=1
        )
        hyper = adalora.Hyper(LR, weight_decay=WEIGHT_DECAY)
        self.allocator.bind_all(self.params, self.grads, hyper=hyper)
        self.sum_of_squares, self.penalty = np.zeros(1), np.zeros(1)
        self.values = adalora.StepValues(FIRST_STEP, grad_factor=1.0, found_inf=0.0)

    def set_gradients(self, layers: Sequence[Layer]) -> None:
        """Begin from given gradients."""
        for grads, layer in zip(self.grads, layers, strict=True):
            for name, array in grads._asdict().items():
                array[...] = layer.grads[name].numpy().reshape(array.shape)

    def forward_backward(self) -> None:
        """All layers forward, then all backward. Gradients begin anew."""
        for call in self.calls:
            call.forward()
        for call in reversed(self.calls):
            call.backward(accumulate=False)

    def orthogonality(self) -> None:
        """The penalty and its gradient."""
        self.allocator.orthogonality(ORTH_REG_WEIGHT, value=self.penalty)

    def optimizer_allocator(self) -> None:
        """Clip, step, and take a mask."""
        self.sum_of_squares[0] = 0
        self.values.found_inf[0] = 0
        self.allocator.gradient_norm(self.sum_of_squares, self.values.found_inf)
        self.context.gradient_factor(self.sum_of_squares, self.values.grad_factor, max_norm=MAX_NORM)
        self.allocator.step(self.values)
        self.values.step[0] += 1

    def tensors(self, operation: str) -> dict[str, np.ndarray]:
        """What an operation leaves, in float32."""
        found = {}
        for k, (params, grads) in enumerate(zip(self.params, self.grads, strict=True)):
            found |= {f"{name} of layer {k}": array.copy() for name, array in params._asdict().items()}
            found |= {f"d{name} of layer {k}": array.copy() for name, array in grads._asdict().items()}
            if operation == "forward_backward":
                activations = {"y": self.ys[k], "dx": self.dxs[k]}
                found |= {f"{name} of layer {k}": tensor.float().numpy() for name, tensor in activations.items()}
        return found | {"penalty": self.penalty.copy()}
