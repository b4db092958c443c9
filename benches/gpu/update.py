"""What comes after backward: the penalty, and the step (norm, AdamW, importance, mask) over all adapters of a model."""

from __future__ import annotations

from typing import Any

import adalora
import adalora.torch
import torch
from adalora.torch.functional import context
from passes import ALPHA, Prepared
from timing import Timer, Times
from torch import Tensor, nn

LR, WEIGHT_DECAY, MAX_NORM, ORTH_REG_WEIGHT = 1e-4, 0.01, 1.0, 0.5
# A schedule that masks on every step, and is far from its end.
SCHEDULE = {"tinit": 1, "tfinal": 10, "deltaT": 1, "total_step": 1_000_000}
FIRST_STEP = 100

Triplet = tuple[Tensor, Tensor, Tensor]


class OverC:
    """Ours by the C interface, on parameters and gradients that are given."""

    def __init__(self, params: list[Triplet], grads: list[Triplet], timer: Timer, schedule: dict[str, int]) -> None:
        self.timer, self.grads = timer, grads
        device = timer.device
        self.on = context(device)
        rank = params[0][0].shape[0]
        self.adapters = [
            adalora.Adapter(self.on, A.shape[1], B.shape[0], rank, lora_alpha=ALPHA, activation_dtype="bfloat16")
            for A, _, B in params
        ]
        self.allocator = adalora.Allocator(self.on, self.adapters, target_r=max(rank // 3, 1), **schedule)
        value = lambda number, dtype: torch.full((1,), number, dtype=dtype, device=device)  # noqa: E731
        self.step_number = value(FIRST_STEP, torch.int64)
        self.factor, self.penalty = value(1, torch.float64), value(0, torch.float64)
        # What a step begins with as zeros lies side by side.
        self.zeroed = torch.zeros(2, dtype=torch.float64, device=device)
        self.squares, self.found_inf = self.zeroed[:1], self.zeroed[1:].view(torch.float32)[:1]
        hyper = adalora.Hyper(
            value(LR, torch.float64), weight_decay=value(WEIGHT_DECAY, torch.float64), context=self.on
        )
        slices = [
            adalora.Slice(k, matrix, p, g, *(torch.zeros_like(p) for _ in range(4)))
            for k, (triplet, gradients) in enumerate(zip(params, grads, strict=True))
            for matrix, p, g in zip("AEB", triplet, gradients, strict=True)
        ]
        sizes = self.allocator.sizes(len(slices))
        state, workspace = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (sizes.state, sizes.workspace))
        self.allocator.bind(slices, [hyper], state=state, workspace=workspace, stream=timer.stream)
        self.values = adalora.StepValues(
            self.step_number,
            grad_factor=self.factor,
            found_inf=self.found_inf,
            sum_of_squares=self.squares,
            penalty=self.penalty,
            context=self.on,
            stream=timer.stream,
        )

    def orthogonality(self) -> None:
        """The penalty and its gradient."""
        self.allocator.orthogonality(ORTH_REG_WEIGHT, self.values, stream=self.timer.stream)

    def step(self) -> None:
        """Clipping, AdamW with importance, and what the schedule says."""
        stream = self.timer.stream
        self.step_number.add_(1)
        self.zeroed.zero_()
        self.allocator.gradient_norm(self.values, stream=stream)
        self.on.gradient_factor(self.values, max_norm=MAX_NORM, stream=stream)
        self.allocator.step(self.values, stream=stream)


class OverTorch:
    """Ours by `adalora.torch`, on a model of its own."""

    def __init__(self, model: nn.Module, rank: int, targets: Any, schedule: dict[str, int]) -> None:
        config = adalora.torch.AdaLoraConfig(
            init_r=rank,
            target_r=max(rank // 3, 1),
            lora_alpha=ALPHA,
            orth_reg_weight=ORTH_REG_WEIGHT,
            target_modules=targets,
            **schedule,
        )
        self.model = adalora.torch.adapt(model, config)
        self.allocator = adalora.torch.RankAllocator(self.model)
        self.params = self.allocator.parameters()
        self.optimizer = adalora.torch.AdamW(self.params, self.allocator, lr=LR, weight_decay=WEIGHT_DECAY)
        self.optimizer.global_step = FIRST_STEP + 1

    def orthogonality(self) -> None:
        """The penalty and its gradient."""
        self.allocator.orthogonality()

    def step(self) -> None:
        """Clipping, AdamW with importance, and what the schedule says."""
        self.optimizer.clip_grad_norm_(MAX_NORM)
        self.optimizer.step()


class Peft:
    """PEFT's allocator beside PyTorch's fused AdamW."""

    def __init__(self, peft: Any, model: nn.Module, rank: int, targets: Any, schedule: dict[str, int]) -> None:
        config = peft.AdaLoraConfig(
            init_r=rank,
            target_r=max(rank // 3, 1),
            lora_alpha=ALPHA,
            orth_reg_weight=ORTH_REG_WEIGHT,
            target_modules=targets,
            **schedule,
        )
        self.model = peft.get_peft_model(model, config)
        named = dict(self.model.named_parameters())
        As = [name for name in named if "lora_A" in name]
        self.triplets = [tuple(named[name.replace("lora_A", f"lora_{matrix}")] for matrix in "AEB") for name in As]
        self.params = [p for triplet in self.triplets for p in triplet]
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
        self.step_number = FIRST_STEP

    def orthogonality(self) -> None:
        """The penalty as `AdaLoraModel.forward` computes it, and its gradient."""
        penalty = 0
        for A, _, B in self.triplets:
            for gram in (A @ A.T, B.T @ B):
                identity = torch.eye(*gram.size(), out=torch.empty_like(gram))
                penalty = penalty + torch.norm(gram - identity, p="fro")
        (ORTH_REG_WEIGHT * penalty / (2 * len(self.triplets))).backward()

    def step(self) -> None:
        """Clipping, AdamW, importance, and what the schedule says."""
        self.step_number += 1
        nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.step_number)


def triplets_of(params: list[nn.Parameter]) -> list[Triplet]:
    """A, E and B of each layer, from a list of all."""
    return list(zip(params[::3], params[1::3], params[2::3], strict=True))


def compare(layers: int, width: int, rank: int, timer: Timer, peft: Any) -> dict[str, Times]:
    """By operation, once all sides were seen to keep and compute the same."""
    torch.manual_seed(0)
    names = [str(k) for k in range(layers)]
    base = lambda: nn.ModuleDict({name: Prepared(width, 1, timer.device) for name in names})  # noqa: E731
    shapes = ((rank, width), (rank, 1), (width, rank))
    params = [tuple(0.02 * torch.randn(shape, device=timer.device) for shape in shapes) for _ in names]
    grads = [tuple(0.01 * torch.randn(shape, device=timer.device) for shape in shapes) for _ in names]
    # What is captured is not run by single calls as well: a side of its own.
    sides: dict[str, Any] = {name: OverTorch(base(), rank, names, SCHEDULE) for name in ("torch", "captured")}
    if peft is not None:
        sides["peft"] = Peft(peft, base(), rank, names, SCHEDULE)
    for side in sides.values():
        for own, given, gradients in zip(triplets_of(side.params), params, grads, strict=True):
            for p, value, gradient in zip(own, given, gradients, strict=True):
                p.data.copy_(value)
                p.grad = gradient.clone()
    of = {"c": params} | {name: triplets_of(side.params) for name, side in sides.items()}
    sides["c"] = OverC(params, grads, timer, SCHEDULE)
    for side in sides.values():
        side.step()
    agree(of)
    captured = sides.pop("captured")
    times = {}
    for operation in ("orthogonality", "step"):
        works = {name: getattr(side, operation) for name, side in sides.items()}
        graphs = timer.graphs({"c": works["c"], "torch": getattr(captured, operation)})
        times[operation] = timer.times(works | graphs)
    return times


def agree(params: dict[str, list[Triplet]]) -> None:
    """Refuse to time what computes something else: parameters after one step, and what the mask left of E."""
    expected = params["c"]
    for name, found in params.items():
        for k, (got, want) in enumerate(zip(found, expected, strict=True)):
            for matrix, p, q in zip("AEB", got, want, strict=True):
                # Where rounding decides which of two triplets is kept, one E is 0.
                differ = (~torch.isclose(p.flatten(), q.flatten(), rtol=1e-4, atol=1e-6)).sum().item()
                if differ > (0 if matrix != "E" else 1):
                    raise SystemExit(
                        f"layer {k}: {differ} elements of {matrix} differ between {name} and the C interface"
                    )
