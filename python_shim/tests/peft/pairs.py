"""A small network under PEFT, and a copy of it that is accelerated: what the tests beside PEFT share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import settings
import torch
from torch import Tensor, nn

import adalora.peft

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers.pytorch_utils import Conv1D

SETTINGS = {
    **settings.SETTINGS,
    "target_modules": ["conv", "fc1", "fc2", "fc3"],
    "modules_to_save": ["head"],
}
STEPS = SETTINGS["total_step"]


class Network(nn.Module):
    """A convolution, two linear layers and a Conv1D to adapt, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 8), Conv1D(8, 8), nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, wanted: Tensor, skip: bool = False) -> SimpleNamespace:
        """The loss, as transformers' models return it. With `skip`, fc2 is not used."""
        x = self.fc1(self.conv(x).tanh().flatten(1)).tanh()
        if not skip:
            x = self.fc2(x).tanh()
        logits = self.head(self.fc3(x).tanh())
        return SimpleNamespace(loss=(logits - wanted).square().mean(), logits=logits)


def peft_model(seed: int = 1, *, autocast_adapter_dtype: bool = True, dtype: torch.dtype = torch.float32, **changed):
    """The network with PEFT's adapters."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT warns of Conv1D, and for all layers alike.
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(**{**SETTINGS, **changed})
        model = peft.get_peft_model(Network().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    # PEFT sets one layout for all layers: that of the last.
    for layer in layers(model).values():
        if hasattr(layer, "fan_in_fan_out"):
            layer.fan_in_fan_out = isinstance(layer.get_base_layer(), Conv1D)
    return model


def accelerated(model: nn.Module) -> nn.Module:
    """A copy of a model, accelerated."""
    return adalora.peft.accelerate(copy.deepcopy(model))


def pair(**changed) -> tuple[nn.Module, nn.Module]:
    """A model of PEFT's, and the same accelerated."""
    model = peft_model(**changed)
    return model, accelerated(model)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by path."""
    from peft.tuners.adalora import AdaLoraLayer

    return {path: each for path, each in model.named_modules() if isinstance(each, AdaLoraLayer)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, without the initial rank, a constant that PEFT leaves to the optimiser at times."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name}


def batches(steps: int = STEPS, seed: int = 7, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield (
            torch.randn(5, 2, 4, 4, generator=made).to(dtype),
            torch.randn(5, 3, generator=made).to(dtype),
        )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A step as PEFT's users write it; returns the loss."""
    # Without a task type, PEFT's outer model leaves the penalty out.
    loss = model.base_model(*batch).loss
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(number)
    optimizer.zero_grad()
    return loss.detach()


def masks(model: nn.Module) -> dict[str, list[bool]]:
    """Which values are zero."""
    return {path: (layer.lora_E["default"].flatten() == 0).tolist() for path, layer in layers(model).items()}


def layer_passes(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, A, E and B."""
    x = x.clone().requires_grad_(True)
    y = layer(x)
    params = [getattr(layer, f"lora_{factor}")["default"] for factor in "AEB"]
    return [y.detach(), *torch.autograd.grad(y, [x, *params], dy.to(y.dtype))]
