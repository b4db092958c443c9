"""AdamW behind PyTorch's interface, which does the rank allocator's work in the same pass over the parameters."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim.adamw import adamw

from ..allocator import Hyper
from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError
from .allocator import RankAllocator
from .distributed import any_is_not_finite, local, spread_state, total_norm
from .functional import context
from .penalty import state_dtype
from .steps import step_number


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, with importance and masks of an allocator's adapters in the same pass.

    >>> optimizer = AdamW([p for p in model.parameters() if p.requires_grad], RankAllocator(model), lr=1e-3)
    >>> for batch in batches:
    ...     model(**batch).loss.backward()
    ...     optimizer.allocator.orthogonality()
    ...     optimizer.clip_grad_norm_(1.0)
    ...     optimizer.step()
    ...     optimizer.zero_grad()

    Parameter groups, schedulers, hooks and closures work as they do there, and state dicts pass to and from
    `torch.optim.AdamW`. Parameters that are no adapter's are updated by PyTorch's fused kernel. A step on which any
    gradient is not finite changes no parameter and no average; it is counted, and a mask that falls on it still
    happens. `torch.amp.GradScaler` hands over its scale and what it found.

    `global_step` is the number of the next step, by which the schedule goes; it begins at 0, may be set, and is part of
    `state_dict`. `allocator` is the allocator. `amsgrad`, `maximize` and the like are not served.

    On CUDA a step reads nothing back, and may be captured by `torch.cuda.graph` (see `RankAllocator`): `capturable`
    need not be set. Replays count steps, and read a learning rate that is a tensor on the device.

    Args:
        params: as for any optimiser; all of the allocator's trained parameters have to be among them at the first step.
        allocator: whose adapters.
        lr: learning rate; a tensor is read at each step, and may be on the parameters' device.
        betas: decays of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.

    """

    def __init__(
        self,
        params: Any,
        allocator: RankAllocator,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if not isinstance(allocator, RankAllocator):
            raise InvalidArgumentError(f"allocator: expected a RankAllocator, found {type(allocator).__name__}")
        self.allocator = allocator
        allocator.attach(self)
        # Whether a graph has a step, whose replays nobody sees: then the number is read from the device.
        self._captured = False
        self.global_step = 0
        # The norm of the last clip_grad_norm_, and what it may be.
        self._clip: tuple[Tensor, float] | None = None
        self._pairing: list[Any] | None = None
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @property
    def global_step(self) -> int:
        """Number of the next step, by which the schedule goes. Once a step was captured, it is read from the device."""
        return self.allocator.last_step + 1 if self._captured else self._global_step

    @global_step.setter
    def global_step(self, number: int) -> None:
        self._global_step = step_number("global_step", number)
        self.allocator.last_step = self._global_step - 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, the allocator's or others."""
        super().add_param_group(param_group)
        self._pairing = None
        self._check_options(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, and what `clip_grad_norm_` noted about them."""
        self._clip = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Let the next step see gradients whose norm, over all parameters, is at most `max_norm`.

        The norm and the factor are those of `torch.nn.utils.clip_grad_norm_`, but gradients are multiplied within the
        step, and stay as they are until then. All parameters are meant. Of several calls before a step the last one
        counts.

        Args:
            max_norm: above 0.

        Returns:
            The norm.

        """
        if not max_norm > 0:
            raise InvalidArgumentError(f"max_norm: expected a number above 0, found {max_norm}")
        self._pair()
        allocator = self.allocator
        allocator.place()
        squares = torch.zeros_like(allocator.grad_factor)
        allocator.gradient_norm(squares)
        others = self._other_gradients()
        if others:
            squares += total_norm(others).to(squares) ** 2
        norm = squares.sqrt()
        self._clip = norm, float(max_norm)
        self._measured = [(weakref.ref(g), g._version) for g in map(local, self._gradients())]
        wide = torch.float64 in {t.dtype for t in (*allocator.parameters(), *others)}
        return norm if wide else norm.float()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform the step of number `global_step`.

        Args:
            closure: evaluates the model anew and returns the loss.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pair()
        allocator = self.allocator
        allocator.place()
        clip, self._clip = self._clip, None
        if clip is not None and not self._are_measured():
            # Somebody dropped the gradients that were measured, and began anew.
            clip = None
        # Where a GradScaler is at work, it has looked already.
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None:
            allocator.note_inf(found_inf)
        else:
            self._look_for_inf(clip)
        allocator.grad_factor.fill_(1)
        if clip is not None:
            norm, max_norm = clip
            allocator.grad_factor.copy_((max_norm / (norm + 1e-6)).clamp(max=1))
        if scale is not None:
            allocator.grad_factor.div_(scale)
        self._update_others(clip, scale)
        self._captured = self._captured or allocator.is_capturing()
        allocator.adamw_step(None if self._captured else self._global_step)
        self._global_step += 1
        if self._steps.is_cuda:
            # Counted there: `state_dict` looks.
            self._steps.view(-1, 3).add_(allocator.updated().unsqueeze(1))
        else:
            self._read_steps()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's, and under `allocator` and `global_step` what importance and schedule need to go on bit for bit."""
        self._pair()
        self._read_steps()
        return {**super().state_dict(), "allocator": self.allocator.state_dict(), "global_step": self.global_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was called, once the parameters are restored.

        Args:
            state_dict: of this class, or of `torch.optim.AdamW`: then allocator and `global_step` stay as they are.

        """
        self._check_options(state_dict["param_groups"])
        state_dict = spread_state(self, state_dict)
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        found, expected = ([len(group["params"]) for group in each] for each in (groups, self.param_groups))
        if found != expected:
            raise InvalidArgumentError(f"param_groups: expected {expected} parameters by group, found {found}")
        if "allocator" in state_dict:
            # First, since it checks all before it changes anything.
            self.allocator.load_state_dict(state_dict["allocator"])
            self.global_step = int(state_dict["global_step"])
        super().load_state_dict({**state_dict, "param_groups": groups})
        mine = set(self.allocator.parameters())
        numbers = chain.from_iterable(group["params"] for group in groups)
        for number, p in zip(numbers, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            source, dtype = self.state.get(p, {}), None
            if source and p in mine and p.dtype != state_dtype(p):
                # PyTorch has cast the moments to the parameter's half precision.
                source, dtype = state_dict["state"][number], torch.float32
            if source:
                # What was loaded stays the caller's.
                self.state[p] = {name: tensor.to(p.device, dtype, copy=True) for name, tensor in source.items()}
        self._pairing = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: what is native cannot be copied."""
        raise TypeError("an AdamW cannot be copied or pickled: make another one, and carry state_dict over")

    def _check_options(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what is not served, in groups that become or are this optimiser's."""
        mine = set(self.allocator.parameters())
        for k, (group, own) in enumerate(zip(groups, self.param_groups, strict=False)):
            for option in ("amsgrad", "maximize", "differentiable"):
                if group.get(option) and not mine.isdisjoint(own["params"]):
                    raise UnsupportedError(
                        f"param_groups[{k}].{option}: expected False for an adapter's parameters, found {group[option]}"
                    )

    def _pair(self) -> None:
        """Give the allocator hyperparameters, and its parameters' moments where they are not those that it knows."""
        allocator = self.allocator
        params = allocator.parameters()
        groups = [list(map(id, group["params"])) for group in self.param_groups]
        key = groups, [(id(p), p.dtype, p.device) for p in params]
        if self._pairing == key and allocator.moments is self._moments and self._state_is_known():
            self._set_hypers()
            return
        if allocator.is_capturing():
            raise InvalidStateError("capture: expected a step before that is not captured, found none since changes")
        # For cast or moved parameters, before it is given what is made for them.
        allocator.fit(params)
        numbers = {p: k for k, group in enumerate(self.param_groups) for p in group["params"]}
        for name, p in zip(allocator.names, params, strict=True):
            if p.requires_grad and p not in numbers:
                raise InvalidArgumentError(
                    f"params: expected all that the allocator's adapters train, found no {name}; where parameters of "
                    "the model were replaced, make the optimiser anew"
                )
        mine = set(params)
        self._others = [[p for p in group["params"] if p not in mine] for group in self.param_groups]
        # Adapters that are frozen as a whole are in no group, and nothing of theirs changes.
        states: list[dict[str, Tensor]] = [self.state[p] if p in numbers else {} for p in params]
        # PyTorch's steps, one for each parameter; and the library's, one for each adapter.
        self._steps = torch.zeros(len(params), dtype=torch.float32, device=params[0].device)
        self._clocks = torch.zeros(len(allocator.layers), dtype=torch.int64, device="cpu")
        for k, (p, state) in enumerate(zip(params, states, strict=True)):
            self._steps[k] = state.get("step", 0)
            state["step"] = self._steps[k]
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state.get(name)
                state[name] = torch.zeros_like(p) if moment is None else moment
                state[name] = state[name].to(p.device, state_dtype(p)).contiguous()
        steps = self._steps.view(-1, 3).tolist()
        for path, found in zip(allocator.layers, steps, strict=True):
            if len(set(found)) > 1:
                raise InvalidArgumentError(f"state: expected one step for A, E and B of {path}, found {found}")
        self._moments = [
            (state["exp_avg"], state["exp_avg_sq"], numbers.get(p, 0)) for p, state in zip(params, states, strict=True)
        ]
        self._constants: list[tuple[float, ...]] = []
        self._rates: list[float | None] = [None] * (2 * len(self.param_groups))
        self._rate_values = torch.zeros(len(self.param_groups), 2, dtype=torch.float64, device=params[0].device)
        self._set_hypers()
        allocator.use_moments(self._moments, [int(found[0]) for found in steps])
        self._known = [(state, m, v) for state, (m, v, _) in zip(states, self._moments, strict=True) if state]
        self._states = list(self.state.values())
        self._pairing = key

    def _state_is_known(self) -> bool:
        """Whether the moments are those that the allocator has: trainers load and clear `state` by hand, too."""
        # Other parameters' may have come since. To look parameters up would take longer than the rest of a small step.
        return (
            len(self.state) >= len(self._states)
            and all(map(operator.is_, self._states, self.state.values()))
            and all(s.get("exp_avg") is m and s.get("exp_avg_sq") is v for s, m, v in self._known)
        )

    def _set_hypers(self) -> None:
        groups = self.param_groups
        capturing = self.allocator.is_capturing()
        rates = [group[name] for group in groups for name in ("lr", "weight_decay")]
        for k, (rate, known) in enumerate(zip(rates, self._rates, strict=True)):
            if isinstance(rate, Tensor):
                self._rate_values[k // 2, k % 2].copy_(rate)
            elif rate != known or capturing:
                self._rate_values[k // 2, k % 2].fill_(rate)
                # What a graph writes is there once it runs, whenever that is.
                self._rates[k] = None if capturing else rate
        constants = [(*map(float, group["betas"]), float(group["eps"])) for group in groups]
        if constants != self._constants:
            self.allocator.hypers = [
                Hyper(lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, context=context(lr.device))
                for (lr, weight_decay), (beta1, beta2, eps) in zip(self._rate_values, constants, strict=True)
            ]
            self._constants = constants

    def _other_gradients(self) -> list[Tensor]:
        return [p.grad for group in self._others for p in group if p.grad is not None]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _are_measured(self) -> bool:
        """Whether the gradients are those that `clip_grad_norm_` saw."""
        # FSDP2 adds to what a DTensor holds.
        grads = list(map(local, self._gradients()))
        return len(grads) == len(self._measured) and all(
            ref() is g and version == g._version for g, (ref, version) in zip(grads, self._measured, strict=True)
        )

    def _look_for_inf(self, clip: tuple[Tensor, float] | None) -> None:
        """Note whether a gradient of any parameter is not finite."""
        if clip is not None:
            self.allocator.found_inf.copy_(~clip[0].isfinite())
            return
        found_inf = self.allocator.look_for_inf()
        others = self._other_gradients()
        if others:
            found_inf += any_is_not_finite(others).to(found_inf.device)

    def _update_others(self, clip: tuple[Tensor, float] | None, scale: Tensor | None) -> None:
        """PyTorch's own update of the parameters that are no adapter's."""
        for group, others in zip(self.param_groups, self._others, strict=True):
            if clip is not None:
                clip_grads_with_norm_(others, clip[1], clip[0])
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = ([] for _ in range(6))
            has_complex = self._init_group(
                {**group, "params": others, "fused": True}, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
            )
            if not params:
                continue
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = (
                list(map(local, tensors)) for tensors in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
            )
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.is_cuda:
                # What the fused kernel reads.
                lr = lr.float()
            adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
                fused=True,
                capturable=group["capturable"],
                grad_scale=scale,
                found_inf=self.allocator.found_inf,
                has_complex=has_complex,
                amsgrad=group["amsgrad"],
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )

    def _read_steps(self) -> None:
        self.allocator.read_adam_steps(self._clocks)
        self._steps.view(-1, 3).copy_(self._clocks.unsqueeze(1))
