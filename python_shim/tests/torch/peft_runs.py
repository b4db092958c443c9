"""A small network under this package and under PEFT, with the same values: what training tests share."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import settings
import torch
from torch import Tensor, nn

from adalora.torch import AdaLoraConfig, adapt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

TARGETS = ["fc1", "fc2", "fc3"]
SETTINGS = {**settings.SETTINGS, "target_modules": TARGETS}


class Network(nn.Module):
    """Three adapted layers, and a head that is trained whole."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(n, m, dtype=dtype) for n, m in ((6, 8), (8, 8), (8, 5)))
        self.head = nn.Linear(5, 3, dtype=dtype)

    def forward(self, x: Tensor, wanted: Tensor, skip: bool = False) -> SimpleNamespace:
        """The loss, as transformers' models return it. With `skip`, fc2 is not used."""
        x = self.fc1(x).tanh()
        if not skip:
            x = self.fc2(x).tanh()
        logits = self.head(self.fc3(x).tanh())
        return SimpleNamespace(loss=(logits - wanted).square().mean(), logits=logits)


def network(dtype: torch.dtype = torch.float64, **changed) -> Network:
    torch.manual_seed(1)
    model = adapt(Network(dtype), AdaLoraConfig(**{**SETTINGS, **changed}))
    model.head.requires_grad_(True)
    return model


def with_peft(ours: Network, **changed) -> nn.Module:
    """The same network under PEFT, with the same parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = Network(ours.head.weight.dtype)
        theirs = peft.get_peft_model(bare, peft.AdaLoraConfig(**{**SETTINGS, **changed}))
    return with_parameters_of(ours, theirs)


def with_parameters_of(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    """PEFT's model with our parameters, and its head trained too."""
    theirs.base_model.model.head.requires_grad_(True)
    # The initial rank, a constant, which PEFT leaves to the optimiser.
    for name, p in theirs.named_parameters():
        p.requires_grad_(p.requires_grad and "ranknum" not in name)
    state = {f"base_model.model.{name}": value for name, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert all("ranknum" in name for name in missing)
    assert not unexpected
    return theirs


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], **options) -> Tensor:
    """The loss of either; PEFT's has the penalty in it, which its outer model leaves out."""
    return getattr(model, "base_model", model)(*batch, **options).loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of either."""
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}


def groups(model: nn.Module) -> list[dict]:
    """A, E, B and the head in groups of their own."""
    params = trained(model)
    pick = lambda part: [p for name, p in params.items() if part in name]  # noqa: E731
    return [
        {"params": pick("lora_A"), "weight_decay": 0.1, "lr": 2e-2},
        {"params": pick("lora_E"), "weight_decay": 0.0, "lr": 3e-2},
        {"params": pick("lora_B"), "betas": (0.8, 0.99), "eps": 1e-6},
        {"params": pick("head"), "weight_decay": 0.2, "lr": 5e-3},
    ]


def batches(steps: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 6, generator=made).to(dtype), torch.randn(5, 3, generator=made).to(dtype)) for _ in range(steps)
    ]


def assert_same(ours: nn.Module, theirs: nn.Module, **tolerance) -> None:
    """The same parameters, and the same triplets that are masked."""
    expected = trained(theirs)
    assert trained(ours).keys() == expected.keys()
    for name, p in trained(ours).items():
        torch.testing.assert_close(p, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        if "lora_E" in name:
            assert torch.equal(p == 0, expected[name] == 0), name


def peft_pattern(theirs: nn.Module) -> dict[str, list[bool]]:
    """The rank pattern that PEFT chose, by our paths."""
    found = theirs.peft_config["default"].rank_pattern
    return {name.removeprefix("model.").removesuffix(".lora_E.default"): kept for name, kept in found.items()}


TIGHT = {"rtol": 1e-9, "atol": 1e-10}
LOOSE = {"rtol": 1e-4, "atol": 1e-5}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return TIGHT if dtype == torch.float64 else LOOSE
