"""The rank allocator of a PEFT model: PEFT's interface over `adalora.torch.RankAllocator`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer, deepspeed_config
from torch import Tensor, nn
from torch.optim import Optimizer

from ..allocator import Standing
from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError
from ..torch import AdaLoraConfig as CheckedConfig
from ..torch import RankAllocator as LayersAllocator
from ..torch.compaction import cut
from ..torch.distributed import is_dtensor
from ..torch.functional import traced
from ..torch.operators import penalty_by_operator
from ..torch.steps import OptimizerSteps, step_number
from ..values import StepValues

_SCHEDULE = ("target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2")


def check_config(config: AdaLoraConfig) -> None:
    """Check ranks, schedule and penalty of a configuration that is to be trained, which PEFT does in part.

    Raises:
        InvalidArgumentError: a field is wrong; it is named.

    """
    if not config.inference_mode:
        CheckedConfig(**{name: getattr(config, name) for name in (*_SCHEDULE, "init_r", "orth_reg_weight")})


class RankAllocator:
    """Spreads a falling budget of ranks over the adapters of a PEFT model (PEFT's class).

    `model.base_model.rankallocator` is one. Parameters and gradients are looked up at every call; the schedule is what
    the configuration says at that time. It copies and pickles with its model.

    Args:
        model: with PEFT's layers.
        peft_config: PEFT's configuration of the adapter.
        adapter_name: which adapter is trained.

    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str) -> None:
        check_config(peft_config)
        self.model, self.peft_config, self.adapter_name = model, peft_config, adapter_name
        # What does the work, made when it is first needed, and what it was made for.
        self._over: LayersAllocator | None = None
        self._made_for: tuple[Any, ...] = ()
        # The state to go on from.
        self._carried: dict[str, Tensor] | None = None
        # Whether there was a step, or another run's state.
        self._has_begun = False
        self._last_step = -1
        self._nonzero: dict[str, Tensor] = {}
        self._final_pattern: dict[str, list[bool]] | None = None
        # What `there` returns of a copy.
        self._were_there: dict[str, list[bool]] = {}
        # Optimisers' steps, before anything is there that follows them.
        self._unfollowed = OptimizerSteps(self._found_parameters)
        self.in_trainer = False
        """Whether a trainer's callback is at work: it adds the penalty's gradient itself, so that losses are without;
        and since the trainer loads what it has saved, files hold masked triplets until it ends."""

    @property
    def init_bgt(self) -> int:
        """The initial budget: how many triplets there are."""
        return sum(layer.lora_E[self.adapter_name].shape[0] for layer in self.layers().values())

    @property
    def target_bgt(self) -> int:
        """The budget at the end."""
        return self.peft_config.target_r * len(self.layers())

    @property
    def exp_avg_ipt(self) -> dict[str, Tensor]:
        """Smoothed sensitivity by the parameters' names: the tensors that the next step works on."""
        return self._averages("exp_avg_ipt")

    @property
    def exp_avg_unc(self) -> dict[str, Tensor]:
        """Smoothed uncertainty of the sensitivity, likewise."""
        return self._averages("exp_avg_unc")

    def layers(self) -> dict[str, AdaLoraLayer]:
        """The adapted layers by path, in the model's order."""
        found = self.model.named_modules()
        return {
            path: each for path, each in found if isinstance(each, AdaLoraLayer) and self.adapter_name in each.lora_A
        }

    # PEFT's interface

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Update importance, and mask what the schedule says: once per optimiser step, before `zero_grad`.

        Args:
            model: with PEFT's layers.
            global_step: number of the optimiser's step.
            force_mask: mask to the step's budget where the schedule has no mask.

        Returns:
            The budget, and which triplets are kept, by the names of the `lora_E`, where a mask fell on the step or the
            pattern is final.

        """
        step = step_number("global_step", global_step)
        over = self._for(model)
        if deepspeed_config() is not None:
            raise UnsupportedError("update_and_allocate: expected whole gradients, found DeepSpeed's ZeRO-3")
        end = self.peft_config.total_step - self.peft_config.tfinal
        self._check_step(over, step, end)
        over.update_and_allocate(step)
        self._has_begun, self._last_step = True, step
        budget, masks = over.budget(step)
        if step >= end:
            if self._final_pattern is None:
                self._final_pattern = self._pattern(over)
            return budget, self._final_pattern
        if masks:
            return budget, self._pattern(over)
        return budget, self.mask_to_budget(model, budget) if force_mask else None

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """The budget that the schedule sets for a step, and whether a mask falls on it."""
        budget, masks = self._for().budget(step)
        return budget, masks

    def update_ipt(self, model: nn.Module) -> None:
        """Update importance from parameters and gradients, and nothing else."""
        over = self._for(model)
        over._place_with_gradients("update_ipt")
        # The schedule does not matter to it before its end.
        step = torch.zeros((), dtype=torch.int64, device=over._step.device)
        found_inf = None if over._sharding is None else over.look_for_inf()
        values = StepValues(
            step, found_inf=found_inf, has_grad=over._has_grad, context=over._native.context, stream=over._stream
        )
        over._native.update(values, with_adamw=False, stream=over._stream)

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Keep the `budget` triplets of the highest scores, ties by lower layer, then lower triplet.

        Returns:
            Which triplets are kept, by the names of the `lora_E`.

        """
        over = self._for(model)
        over.place()
        n = sum(self._ranks())
        if not 0 <= budget <= n:
            raise InvalidArgumentError(f"budget: expected 0 to {n}, the number of triplets, found {budget}")
        scores = over._reduced_scores()
        kept = torch.zeros(n, dtype=torch.bool, device=scores.device)
        kept[scores.sort(descending=True, stable=True).indices[:budget]] = True
        flags = over._initial_pattern([each.tolist() for each in kept.split(self._ranks())])
        over.set_rank_pattern(dict(zip(over.layers, flags, strict=True)))
        return self._pattern(over)

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, list[bool]]) -> None:
        """Keep what a pattern says; names may end in the adapter's name or not."""
        over = self._for(model)
        over.set_rank_pattern(by_path(rank_pattern))

    def reset_ipt(self) -> None:
        """Begin importance anew."""
        for average in (self.exp_avg_ipt, self.exp_avg_unc):
            for tensor in average.values():
                tensor.zero_()

    def set_total_step(self, total_step: int) -> None:
        """Set how many steps the run has."""
        self.peft_config.total_step = total_step

    # Beyond PEFT's

    def orthogonality_loss(self, weight: float | None = None) -> Tensor:
        """The orthogonality penalty, `weight / (2 n) * (sum ||A A^T - I|| + ||B^T B - I||)` over the n layers.

        Args:
            weight: of the penalty; None: the configuration's `orth_reg_weight`.

        """
        if traced():
            # A compiler makes nothing native.
            weight = self.peft_config.orth_reg_weight if weight is None else weight
            return penalty_by_operator(self._found_parameters(), weight)
        return self._for().orthogonality_loss(weight)

    def orthogonality(self, weight: float | None = None, *, loss_scale: float | Tensor = 1.0) -> Tensor:
        """Add the penalty's gradient to the gradients of A and B; see `adalora.torch.RankAllocator.orthogonality`."""
        return self._for().orthogonality(weight, loss_scale=loss_scale)

    def parameters(self) -> list[nn.Parameter]:
        """A, E and B of every layer, in order."""
        return self._for().parameters()

    @property
    def optimizer_steps(self) -> OptimizerSteps:
        """Whether the optimisers' steps and the allocator's go together."""
        return self._for().optimizer_steps

    def standing(self) -> Standing:
        """Pattern, ranks, clocks and counters."""
        return self._for().standing()

    def ranks(self) -> dict[str, int]:
        """For each layer, how many triplets are kept."""
        return self._for().ranks()

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For each layer, which triplets are kept."""
        return self._for().rank_pattern()

    def finalize(self) -> dict[str, list[bool]]:
        """Take the last mask now, where a run ends before `total_step - tfinal`; returns which triplets are kept."""
        over = self._for()
        over.finalize()
        self._has_begun = True
        self._final_pattern = self.peft_config.rank_pattern = self._pattern(over)
        return self._final_pattern

    def compact(self, *optimizers: Optimizer) -> None:
        """Take the masked triplets out of parameters, gradients and optimisers' states, once the last mask was taken.

        What the model computes stays the same to rounding, and costs what the ranks that are left cost; so do its
        files. Parameters stay the same objects; see `adalora.torch.RankAllocator.compact`.

        Args:
            optimizers: all that hold the adapter's parameters.

        """
        over = self._for()
        over.compact(*optimizers)
        self._note_ranks(over)

    def reset(self) -> None:
        """Begin a new run: pattern, clocks and averages as at the start; parameters stay."""
        self._for().reset()
        self._has_begun, self._last_step, self._final_pattern = False, -1, None

    def keeps_masked(self) -> bool:
        """Whether files are to hold masked triplets too: where these may come back, or could not be put back."""
        is_sharded = self._over is not None and self._over._sharding is not None
        return self.in_trainer or is_sharded or self._final_pattern is None

    def final_pattern(self) -> dict[str, list[bool]] | None:
        """For each layer, which of its initial triplets the last mask has kept; None before it."""
        return None if self._final_pattern is None else by_path(self._final_pattern)

    def there(self) -> dict[str, list[bool]]:
        """For each layer, which of its initial triplets there are, where a file or `compact` took others out."""
        return self._were_there if self._over is None else self._over.compacted_pattern() or {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a run needs beside parameters and the optimiser's state to go on bit for bit.

        After the last mask, `masked.<path>.A` and so on are what files leave out from then on, unless `compact` took
        it out.
        """
        over = self._for()
        state = over.state_dict()
        if not self.keeps_masked():
            for path, kept in by_path(self._final_pattern).items():
                factors = {matrix: getattr(over.layers[path], f"lora_{matrix}")[self.adapter_name] for matrix in "AEB"}
                if len(factors["E"]) == len(kept) and not all(kept):
                    state[f"masked.{path}.kept"] = torch.tensor(kept)
                    for matrix, p in factors.items():
                        state[f"masked.{path}.{matrix}"] = cut(p.detach(), matrix, [not flag for flag in kept])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was called, once the parameters are restored. A wrong one changes nothing.

        The state of a compacted run compacts the model, where that has not happened. That of another one puts masked
        triplets back, where the model's file has left them out.
        """
        if not isinstance(state_dict, Mapping):
            raise InvalidArgumentError(f"state_dict: expected a dict, found {type(state_dict).__name__}")
        state = dict(state_dict)
        masked = {name: state.pop(name) for name in state_dict if str(name).startswith("masked.")}
        over, there = self._for(), self._there(state)
        whole = self._with_masked(masked, over.layers)
        before = {path: self._exchange(path, values) for path, values in whole.items()}
        try:
            is_cut = there is not None and there != over.compacted_pattern()
            if is_cut or self._ranks(over.layers) != self._made_for[1]:
                over = LayersAllocator.over(self.layers(), self.peft_config, self.adapter_name, rank_pattern=there)
            over.load_state_dict(state)
            kept = over.rank_pattern()
            for path in whole:
                if masked[f"masked.{path}.kept"].tolist() != kept[path]:
                    raise InvalidArgumentError(
                        f"masked.{path}.kept: expected what the run's last mask has kept, {kept[path]}, found "
                        f"{masked[f'masked.{path}.kept'].tolist()}"
                    )
        except Exception:
            for path, values in before.items():
                self._exchange(path, values)
            raise
        self._over = over
        self._note_ranks(over)
        self._take_over(over)

    def take_over(self, other: Any) -> None:
        """Go on from where PEFT's own allocator of the adapter stands."""
        pattern = self.peft_config.rank_pattern
        if not other.exp_avg_ipt and not pattern:
            return
        over = self._for()
        names = {f"{path}.lora_{matrix}.{self.adapter_name}" for path in over.layers for matrix in "AEB"}
        known = names <= other.exp_avg_ipt.keys()
        if known:
            for average in ("exp_avg_ipt", "exp_avg_unc"):
                for name, tensor in self._averages(average).items():
                    tensor.copy_(getattr(other, average)[name])
        kept = by_path(pattern or {})
        fits = kept.keys() == over.layers.keys() and tuple(map(len, kept.values())) == self._ranks()
        # PEFT drops importance with the last mask. Before it, masked triplets learn, and a pattern would stop them: one
        # that keeps more than the target is of an earlier step.
        if fits and not known and sum(map(sum, kept.values())) <= self.target_bgt:
            over.set_rank_pattern(kept, final=True)
            self._final_pattern = self._pattern(over)
        self._has_begun = known or self._final_pattern is not None

    def __getstate__(self) -> dict[str, Any]:
        carried = self._carried if self._over is None else self._over.state_dict()
        state = {**self.__dict__, "_over": None, "_carried": carried, "_were_there": self.there()}
        del state["_unfollowed"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unfollowed = OptimizerSteps(self._found_parameters)

    # What does the work

    def _for(self, model: nn.Module | None = None) -> LayersAllocator:
        """The allocator over the layers as they are, under the schedule as it is."""
        if model is not None and model is not self.model:
            # The run goes on in another model, such as a copy.
            carried = self._carried if self._over is None else self._over.state_dict()
            self.model, self._over, self._carried = model, None, carried
        schedule = tuple(getattr(self.peft_config, name) for name in _SCHEDULE)
        ranks = self._ranks(self.layers() if self._over is None else self._over.layers)
        if self._over is not None and self._made_for == (schedule, ranks):
            return self._over
        if self._made_for and self._made_for[1] != ranks:
            # It is another run.
            self._carried = None
            self._has_begun, self._last_step, self._final_pattern = False, -1, None
        elif self._over is not None and (self._has_begun or not self.there()):
            # A cut model's run that has not begun may have another target from now on.
            self._carried = self._over.state_dict()
        check_config(self.peft_config)
        there = self._left_by_file() if self._carried is None else self._there(self._carried)
        self._over = LayersAllocator.over(self.layers(), self.peft_config, self.adapter_name, rank_pattern=there)
        self._made_for = schedule, ranks
        self._unfollowed.stop()
        # Before the optimiser's next step moves those that are masked.
        self._nonzero = {
            path: layer.lora_E[self.adapter_name].flatten() != 0 for path, layer in self._over.layers.items()
        }
        if self._carried is not None:
            self._over.load_state_dict(self._carried)
            self._carried = None
            self._note_ranks(self._over)
            self._take_over(self._over)
        return self._over

    def _found_parameters(self) -> list[nn.Parameter]:
        factors = ((layer.lora_A, layer.lora_E, layer.lora_B) for layer in self.layers().values())
        return [factor[self.adapter_name] for each in factors for factor in each]

    def _ranks(self, layers: Mapping[str, AdaLoraLayer] | None = None) -> tuple[int, ...]:
        name, layers = self.adapter_name, self._over.layers if layers is None else layers
        try:
            return tuple(layer.lora_E[name].shape[0] for layer in layers.values())
        except KeyError:
            raise InvalidStateError(f"model: expected the adapter {name!r}, found it deleted") from None

    def _left_by_file(self) -> dict[str, list[bool]] | None:
        """Which of the initial triplets there are, where the model's file is one of the run's end."""
        pattern, layers = by_path(self.peft_config.rank_pattern or {}), self.layers()
        if pattern.keys() != layers.keys():
            return None
        ranks, found = self._ranks(layers), {path: list(pattern[path]) for path in layers}
        # With more than the target, there is a budget to spread yet.
        is_end = tuple(map(sum, found.values())) == ranks and sum(ranks) == self.target_bgt
        return found if is_end and sum(map(len, found.values())) > sum(ranks) else None

    def _there(self, state_dict: Mapping[str, Tensor]) -> dict[str, list[bool]] | None:
        """Which of the initial triplets there are, where model and state are those of a compacted run."""
        found = state_dict.get("rank_pattern") if isinstance(state_dict, Mapping) else None
        pattern, layers = by_path(self.peft_config.rank_pattern or {}), self.layers()
        if not isinstance(found, Tensor) or pattern.keys() != layers.keys():
            return None
        sizes = [len(pattern[path]) for path in layers]
        if found.numel() != sum(sizes):
            return None
        there = {path: flags.tolist() for path, flags in zip(layers, found.flatten().split(sizes), strict=True)}
        return there if tuple(map(sum, there.values())) == self._ranks(layers) else None

    def _with_masked(
        self, masked: Mapping[str, Any], layers: Mapping[str, AdaLoraLayer]
    ) -> dict[str, dict[str, Tensor]]:
        """All triplets of the layers whose masked ones a state holds, where these are in their parameters or not."""
        unknown = masked.keys() - {f"masked.{path}.{what}" for path in layers for what in ("kept", *"AEB")}
        if unknown:
            raise InvalidArgumentError(f"state_dict: expected names of adapted layers, found {min(unknown)!r}")
        found = {}
        for path, layer in layers.items():
            kept = masked.get(f"masked.{path}.kept")
            if kept is None:
                continue
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.dim() != 1:
                raise InvalidArgumentError(f"masked.{path}.kept: expected a vector of bool, found {kept!r}")
            there = layer.lora_E[self.adapter_name].shape[0]
            if there not in (kept.sum(), len(kept)):
                continue
            # Where each triplet is, once the masked ones stand behind the others.
            order = kept.to(torch.int8).argsort(descending=True, stable=True)
            n_kept = int(kept.sum())
            found[path] = {}
            for matrix, dim in (("A", 0), ("E", 0), ("B", 1)):
                p, name = getattr(layer, f"lora_{matrix}")[self.adapter_name].detach(), f"masked.{path}.{matrix}"
                if is_dtensor(p):
                    raise UnsupportedError(
                        f"{name}: expected whole parameters to put masked triplets back into, found sharded ones"
                    )
                place = order.to(p.device)
                shape = list(p.shape)
                shape[dim] = len(kept) - n_kept
                values = masked.get(name)
                if not isinstance(values, Tensor) or list(values.shape) != shape:
                    what = f"shape {list(values.shape)}" if isinstance(values, Tensor) else "none"
                    raise InvalidArgumentError(
                        f"{name}: expected shape {shape}, for what the model's file has left out, found {what}"
                    )
                left = p if there == n_kept else p.index_select(dim, place[:n_kept])
                both = torch.cat([left, values.to(p)], dim)
                found[path][f"lora_{matrix}"] = torch.empty_like(both).index_copy_(dim, place, both)
        return found

    def _exchange(self, path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give a layer other values of A, E and B; returns those it had."""
        layer = self.layers()[path]
        params = {factor: getattr(layer, factor)[self.adapter_name] for factor in values}
        before = {factor: p.detach().clone() for factor, p in params.items()}
        layer.give(self.adapter_name, values)
        with torch.no_grad():
            for factor, p in params.items():
                p.copy_(values[factor])
        return before

    def _note_ranks(self, over: LayersAllocator) -> None:
        """Let layers and configuration know which triplets there are."""
        ranks = self._ranks(over.layers)
        if ranks != self._made_for[1]:
            for layer, r in zip(over.layers.values(), ranks, strict=True):
                layer.r[self.adapter_name] = r
            self.peft_config.rank_pattern = self._pattern(over)
        self._made_for = self._made_for[0], ranks

    def _take_over(self, over: LayersAllocator) -> None:
        standing = over.standing()
        self._has_begun, self._last_step = True, standing.last_step
        self._final_pattern = self._pattern(over) if standing.is_final else None
        if standing.is_final:
            self.peft_config.rank_pattern = self._final_pattern

    def _check_step(self, over: LayersAllocator, step: int, end: int) -> None:
        """Report a clock that does not go on, and a run that goes on without its state."""
        if step <= self._last_step:
            warnings.warn(
                f"update_and_allocate: expected a step after {self._last_step}, found {step}: call it once per "
                "optimiser step; for a new run, call rankallocator.reset() first",
                stacklevel=4,
            )
        elif self._has_begun:
            return
        elif step >= end:
            # What a run in its last phase left in the parameters: which values are zero.
            if sum(int(flags.sum()) for flags in self._nonzero.values()) != self.target_bgt:
                raise InvalidStateError(
                    f"update_and_allocate: expected steps before the last mask's, {end}, or the state of a run by "
                    f"load_state_dict, found step {step} of a new run"
                )
            kept = over._initial_pattern([flags.tolist() for flags in self._nonzero.values()])
            over.set_rank_pattern(dict(zip(over.layers, kept, strict=True)), final=True)
        elif step > max(self.peft_config.tinit, 1):
            warnings.warn(
                f"update_and_allocate: found step {step} first: importance begins anew; to go on with a run, load its "
                "state by rankallocator.load_state_dict",
                stacklevel=4,
            )

    def _pattern(self, over: LayersAllocator) -> dict[str, list[bool]]:
        return {f"{path}.lora_E.{self.adapter_name}": kept for path, kept in over.rank_pattern().items()}

    def _averages(self, average: str) -> dict[str, Tensor]:
        state, name = self._for().state_dict(), self.adapter_name
        return {
            f"{path}.lora_{matrix}.{name}": state[f"{average}.{path}.{matrix}"]
            for path in self.layers()
            for matrix in "AEB"
        }


def by_path(rank_pattern: Mapping[str, list[bool]]) -> dict[str, list[bool]]:
    """A rank pattern by the layers' paths: its names end in the adapter's name, or after saving do not."""
    return {name.rpartition(".lora_E")[0]: kept for name, kept in rank_pattern.items()}
