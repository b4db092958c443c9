"""The rank allocator over the adapters of a model: beside any optimiser, or in one pass with `AdamW`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ..adapter import Adapter
from ..allocator import Allocator, Budget, Hyper, Slice, Standing
from ..context import Context
from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError
from ..values import StepValues
from .compaction import compacted_pattern, cut, cut_states, keep_pattern, resize
from .config import AdaLoraConfig
from .distributed import ShardedPenalty, Sharding, flatten_gradients, is_dtensor, local, whole
from .functional import context, current_stream, native_adapter
from .model import get_config, named_adapters
from .penalty import Penalty, orthogonality_loss, state_dtype
from .steps import OptimizerSteps, step_number

_UNITS = ("triplets", "parameters")
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class AdaptedLayer(Protocol):
    """A layer with triplets: dictionaries of parameters A [r, in], E [r, 1] and B [out, r] by adapter."""

    lora_A: nn.ParameterDict
    lora_E: nn.ParameterDict
    lora_B: nn.ParameterDict


class ScheduleConfig(Protocol):
    """What an allocator reads of a configuration: `AdaLoraConfig`'s fields, or PEFT's."""

    target_r: int
    total_step: int | None
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float
    orth_reg_weight: float


class RankAllocator:
    """Spreads a falling budget of ranks over a model's adapters by the importance of their triplets (PEFT's class).

    >>> allocator = RankAllocator(model)
    >>> for step, batch in enumerate(batches):
    ...     model(**batch).loss.backward()
    ...     allocator.orthogonality()
    ...     optimizer.step()
    ...     allocator.update_and_allocate(step)
    ...     optimizer.zero_grad()

    With `adalora.torch.AdamW` as the optimiser, its step does what `update_and_allocate` does, in the same pass.

    Parameters and gradients are looked up anew by every call, so both may be replaced in between. An adapter none of
    whose parameters has a gradient takes no part in a step: its sensitivity is zero, the penalty gives it no gradient,
    and `AdamW` leaves it alone. Where some of the three have one, the others' count as zero.

    Over parameters that `fully_shard` has sharded, made after it, an allocator works on this process's rows, and
    reduces scores, norms and Gram matrices over processes. Then all processes make the same calls, `scores`,
    `orthogonality`, `finalize` and those of training among them.

    On CUDA the calls of training are put into PyTorch's current stream, and wait for nothing. A step may be captured by
    `torch.cuda.graph` after one that was not; which adapters have a gradient is then fixed.

    Args:
        model: what `adapt` returned.
        adapter_name: whose configuration and parameters.
        budget_unit: what the budget counts: "triplets", as in PEFT, or "parameters".

    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", *, budget_unit: str = "triplets") -> None:
        self._begin(named_adapters(model, adapter_name), get_config(model, adapter_name), adapter_name, budget_unit)

    @classmethod
    def over(
        cls,
        layers: Mapping[str, AdaptedLayer],
        config: ScheduleConfig,
        adapter_name: str = "default",
        *,
        budget_unit: str = "triplets",
        rank_pattern: Mapping[str, Sequence[bool]] | None = None,
    ) -> RankAllocator:
        """An allocator over layers of any make.

        Args:
            layers: by path, in an order that is the same in every run.
            config: of the schedule.
            adapter_name: whose parameters.
            budget_unit: what the budget counts: "triplets", as in PEFT, or "parameters".
            rank_pattern: for each layer, which of its initial triplets there are; None: all, or what `AdaLoraConfig`
                says.

        """
        allocator = cls.__new__(cls)
        allocator._begin(layers, config, adapter_name, budget_unit, rank_pattern)
        return allocator

    def _begin(
        self,
        layers: Mapping[str, AdaptedLayer],
        config: ScheduleConfig,
        adapter_name: str,
        budget_unit: str,
        rank_pattern: Mapping[str, Sequence[bool]] | None = None,
    ) -> None:
        self.config = config
        self.adapter_name = adapter_name
        self.budget_unit = budget_unit
        self.layers = dict(layers)
        """The adapted layers by path, in the model's order."""
        if not self.layers:
            raise InvalidArgumentError(f"model: expected layers with the adapter {adapter_name!r}, found none")
        if self.config.total_step is None:
            raise InvalidArgumentError("config.total_step: expected the number of training steps, found None")
        self.names = [f"{path}.{matrix}" for path in self.layers for matrix in "AEB"]
        # Dictionaries, since loading and moving may put another parameter in one's place.
        self._holders = [
            factor._parameters
            for layer in self.layers.values()
            for factor in (layer.lora_A, layer.lora_E, layer.lora_B)
        ]
        self._averages: list[tuple[Tensor, Tensor]] = []
        # What the library reads as the step's number.
        self._step: Tensor | None = None
        # AdamW's, where there is one: moments and the number of the parameter group, for each parameter.
        self.moments: list[tuple[Tensor, Tensor, int]] | None = None
        self.hypers: list[Hyper] = []
        # Zeros in the place of gradients, for adapters that have none; once a graph was captured they stay, since its
        # replays write there.
        self._no_gradients: dict[int, Tensor] = {}
        # The state of a run that goes on in other memory, until that is bound.
        self._carried: bytes | None = None
        # How parameters are spread over processes; and those last seen, since FSDP2 shows whole ones for a while.
        self._sharding: Sharding | None = None
        self._seen: list[nn.Parameter] = []
        self._bound_moments, self._bound_hypers = self.moments, self.hypers
        # Which of the initial triplets are there, for each layer, once the others were taken out.
        self._compacted: list[list[bool]] | None = None
        if rank_pattern is None and isinstance(config, AdaLoraConfig):
            rank_pattern = compacted_pattern(config, self.layers)
        if rank_pattern is not None:
            self._compacted = [list(rank_pattern[path]) for path in self.layers]
        # Those whose state compaction shrinks without being told.
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._make(self.parameters())
        self.optimizer_steps = OptimizerSteps(self.parameters)
        """Whether the optimisers' steps and the allocator's go together."""

    def parameters(self) -> list[nn.Parameter]:
        """A, E and B of every layer, in order."""
        try:
            params = [holder[self.adapter_name] for holder in self._holders]
        except KeyError:
            raise InvalidStateError(f"model: expected the adapter {self.adapter_name!r}, found it deleted") from None
        if self._sharding is not None:
            self._seen = params = [p if is_dtensor(p) else q for p, q in zip(params, self._seen, strict=True)]
        return params

    # Training

    @torch.no_grad()
    def orthogonality(self, weight: float | None = None, *, loss_scale: float | Tensor = 1.0) -> Tensor:
        """Add the gradient of the orthogonality penalty to the gradients of A and B: once per step, after backward.

        The penalty is `weight / (2 n) * (sum ||A A^T - I|| + ||B^T B - I||)` over the n adapters, as in PEFT.

        Args:
            weight: of the penalty; None: the configuration's `orth_reg_weight`.
            loss_scale: what the gradients at hand are multiplied by (`GradScaler.get_scale()` before `unscale_`).

        Returns:
            The penalty, without `loss_scale`: one float64 on the parameters' device; `float` reads it.

        """
        self._place_with_gradients("orthogonality")
        self._loss_scale.fill_(loss_scale)
        if self._sharding is not None:
            for p, grad in zip(self.parameters(), self._penalty_of_shards(weight, self._loss_scale), strict=True):
                if grad is not None and p.grad is not None:
                    # PyTorch counts it as little as what the library adds: a norm that was measured goes on counting.
                    local(p.grad).data.add_(grad)
        else:
            weight = self.config.orth_reg_weight if weight is None else weight
            self._native.orthogonality(weight, self._importance_values, stream=self._stream)
        return self._penalty_value.clone()

    def orthogonality_loss(self, weight: float | None = None) -> Tensor:
        """The penalty of `orthogonality` as a value to add to the loss, in place of that call. Once differentiable.

        Args:
            weight: of the penalty; None: the configuration's `orth_reg_weight`.

        """
        return orthogonality_loss(self, weight, self.parameters())

    @torch.no_grad()
    def update_and_allocate(self, global_step: int | Tensor) -> None:
        """Update importance from parameters and gradients, and mask what the schedule says: PEFT's method.

        To be called after the optimiser's step and before `zero_grad`, once per step; not with `adalora.torch.AdamW`,
        which does the same. A step whose gradients are not finite leaves importance as it is; one that
        `torch.amp.GradScaler` left out is such a step, and wants the call as any other. A call that is missing, or one
        too many, gives a warning.

        Args:
            global_step: number of the optimiser's step, from 0 on as in PEFT; as one int64 on the parameters' device,
                a captured step reads it at every replay.

        """
        if self.moments is not None:
            raise InvalidStateError(
                "update_and_allocate: expected another optimiser than adalora.torch.AdamW, whose step does it already"
            )
        self._place_with_gradients("update_and_allocate")
        self._set_step(global_step)
        values, found_inf = self._importance_values, self.optimizer_steps.follow()
        if found_inf is not None:
            self.note_inf(found_inf)
            values = self._noted_values
        elif self._sharding is not None:
            self.look_for_inf()
            values = self._noted_values
        self._run(values, global_step, with_adamw=False)
        increment_version(self.parameters()[1::3])

    @torch.no_grad()
    def flatten_gradients(self) -> Tensor:
        """Make all gradients of the adapters views of one buffer, for one all-reduce; from now on all have one.

        They stay there as long as gradients are zeroed in place, by `zero_grad(set_to_none=False)`.

        Returns:
            The buffer, a vector that holds what gradients there were.

        """
        params = [p for p in self.parameters() if p.requires_grad]
        dtypes = {p.dtype for p in params}
        if len(dtypes) != 1:
            found = ", ".join(sorted(map(str, dtypes))) or "none that are trained"
            raise InvalidArgumentError(f"parameters: expected trained ones of one type, found {found}")
        return flatten_gradients(params)

    # Where a run stands

    def budget(self, step: int) -> Budget:
        """The budget that the schedule sets for a step, and whether a mask falls on it."""
        return self._native.budget(step)

    def standing(self) -> Standing:
        """Pattern (of the initial triplets, after `compact` too), ranks, clocks and counters."""
        standing = self._native_standing()
        pattern = self._initial_pattern([kept.tolist() for kept in standing.pattern])
        return replace(standing, pattern=[np.array(kept, np.bool_) for kept in pattern])

    @property
    def initial_ranks(self) -> list[int]:
        """For each layer, its rank at creation."""
        return self._native.ranks if self._compacted is None else [len(there) for there in self._compacted]

    def compacted_pattern(self) -> dict[str, list[bool]] | None:
        """For each layer, which of its initial triplets there are; None where all are."""
        return None if self._compacted is None else dict(zip(self.layers, self._compacted, strict=True))

    def ranks(self) -> dict[str, int]:
        """For each layer, how many triplets are kept."""
        return dict(zip(self.layers, self.standing().ranks, strict=True))

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For each layer, which of its initial triplets are kept."""
        return {path: kept.tolist() for path, kept in zip(self.layers, self.standing().pattern, strict=True)}

    def scores(self) -> dict[str, Tensor]:
        """For each layer, the importance of its triplets, [r] in float64, by which a mask would choose now.

        Zeros at the start, and after the last mask, which clears the averages.
        """
        self.place()
        return dict(zip(self.layers, self._reduced_scores().split(self._native.ranks), strict=True))

    @torch.no_grad()
    def set_rank_pattern(self, pattern: Mapping[str, Sequence[bool]], final: bool = False) -> None:
        """Set which triplets are kept; E of the others becomes 0.

        Args:
            pattern: for each layer, as `rank_pattern` returns it; after `compact`, of what was kept then.
            final: whether the pattern is final from now on; a later mask may otherwise choose anew.

        """
        _check_keys("pattern", pattern, self.layers)
        there = [[True] * r for r in self.initial_ranks] if self._compacted is None else self._compacted
        flags = []
        for path, own in zip(self.layers, there, strict=True):
            given = pattern[path].tolist() if isinstance(pattern[path], Tensor) else pattern[path]
            given = [bool(kept) for kept in given]
            if len(given) != len(own):
                raise InvalidArgumentError(f"pattern[{path!r}]: expected {len(own)} flags, found {len(given)}")
            gone = [k for k, (kept, is_there) in enumerate(zip(given, own, strict=True)) if kept and not is_there]
            if gone:
                raise InvalidArgumentError(
                    f"pattern[{path!r}][{gone[0]}]: expected False for a triplet that compact took out, found True"
                )
            flags += [kept for kept, is_there in zip(given, own, strict=True) if is_there]
        self.place()
        self._native.set_pattern(
            torch.tensor(flags, dtype=torch.bool, device=self._step.device), final=final, stream=self._stream
        )
        self._show_masked()

    @torch.no_grad()
    def finalize(self) -> None:
        """Take the last mask now, as crossing `total_step - tfinal` would; nothing where the pattern is final."""
        self.place()
        self._native.finalize(None if self._sharding is None else self._reduced_scores(), stream=self._stream)
        self._show_masked()

    @torch.no_grad()
    def compact(self, *optimizers: Optimizer) -> None:
        """Take the masked triplets out of parameters, gradients and optimisers' states, once the last mask was taken.

        What the model computes stays the same to rounding, and costs what the ranks that are left cost; the penalty and
        the gradients' norm cover these alone from now on. `ranks`, `rank_pattern`, budget and scaling stay.
        `save_adapter` then leaves out what was taken out, as PEFT does, and `load_training_state` compacts a model that
        was not compacted yet.

        Parameters stay the same objects, so that optimisers, schedulers and hooks go on. What knows their shapes from
        before is to be made anew: `DistributedDataParallel`, `flatten_gradients`, averages of the weights.

        Args:
            optimizers: all that hold the adapters' parameters; `adalora.torch.AdamW` need not be named. Their states'
                tensors have a parameter's shape or one element.

        Raises:
            InvalidStateError: the last mask was not taken yet: `finalize` takes it. Nothing was changed.
            InvalidArgumentError: an optimiser that has made steps with the parameters is missing. Nothing was changed.
            UnsupportedError: an optimiser's state has tensors of other shapes, or parameters are sharded. Nothing was
                changed.

        """
        self._refuse_shards("compact")
        standing = self._native_standing()
        if not standing.is_final:
            raise InvalidStateError(
                "compact: expected a final pattern, found one that may still change: call it after the last mask, at "
                f"step {self.config.total_step - self.config.tfinal}, or after finalize"
            )
        states = [optimizer.state for optimizer in (*optimizers, *self._optimizers)]
        for optimizer in self.optimizer_steps.optimizers:
            if not any(optimizer.state is state for state in states):
                raise InvalidArgumentError(
                    "optimizers: expected all that hold the adapters' parameters, found none that is the "
                    f"{type(optimizer).__name__} that made steps with them"
                )
        kept = [pattern.tolist() for pattern in standing.pattern]
        self._shrink(kept, self._native.save_state(stream=self._stream), optimizers)

    def reset(self) -> None:
        """Begin a new run: pattern, clocks, averages and AdamW's moments as at the start; parameters stay.

        After `compact`, the pattern stays final.
        """
        self.place()
        self._native.reset(stream=self._stream)
        self.optimizer_steps.forget()

    def digest(self) -> int:
        """A hash of what processes that train together must agree on: pattern, whether it is final, last step."""
        self.place()
        digest = torch.empty((), dtype=torch.uint64, device=self._step.device)
        self._native.digest(digest, stream=self._stream)
        return digest.item()

    def state_dict(self) -> dict[str, Tensor]:
        """What a run needs beside parameters and the optimiser's state to go on bit for bit.

        The averages `exp_avg_ipt.<path>.A` and so on are the allocator's own tensors, sharded as the parameters are;
        `state` holds pattern, clocks and counters as bytes. The schedule is not in it: it is the configuration's. After
        `compact`, `rank_pattern` holds which of the initial triplets there are, layer by layer.
        """
        self.place()
        averages, params, sharding = zip(*self._averages, strict=True), self.parameters(), self._sharding
        state = {
            f"{average}.{name}": tensor if sharding is None else sharding.spread(tensor, p)
            for average, tensors in zip(_AVERAGES, averages, strict=True)
            for name, tensor, p in zip(self.names, tensors, params, strict=True)
        }
        saved = self._native.save_state(stream=self._stream)
        saved = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
        state |= {"state": saved, "budget_unit": torch.tensor(_UNITS.index(self.budget_unit))}
        if self._compacted is not None:
            state["rank_pattern"] = torch.tensor(list(chain.from_iterable(self._compacted)), dtype=torch.bool)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was called, once the parameters are restored. A wrong one changes nothing.

        The state of a compacted run compacts the model, where that has not happened.

        Args:
            state_dict: sharded as the parameters are, or whole, however they are.

        """
        own, kept = self.state_dict(), self._loaded_pattern(state_dict)
        if kept is not None:
            self._refuse_shards("load_state_dict: of a compacted run")
            # As if it had been compacted.
            own["rank_pattern"] = state_dict["rank_pattern"]
            for k, name in enumerate(self.names):
                for average in _AVERAGES:
                    own[f"{average}.{name}"] = cut(own[f"{average}.{name}"], name[-1], kept[k // 3])
        _check_keys("state_dict", state_dict, own)
        for name, tensor in own.items():
            found = state_dict[name]
            if not isinstance(found, Tensor) or (name == "state" and found.dtype != torch.uint8):
                expected = "bytes" if name == "state" else "a tensor"
                found = found.dtype if isinstance(found, Tensor) else type(found).__name__
                raise InvalidArgumentError(f"{name}: expected {expected}, found {found}")
            dense = found.layout is torch.strided and not found.is_meta
            if not dense or found.is_floating_point() != tensor.is_floating_point():
                kind = f"{found.dtype} of {found.layout} on {found.device}"
                raise InvalidArgumentError(f"{name}: expected a dense tensor like one of {tensor.dtype}, found {kind}")
            if name != "state" and found.shape != tensor.shape:
                raise InvalidArgumentError(f"{name}: expected shape {list(tensor.shape)}, found {list(found.shape)}")
        del own["state"]
        if state_dict["budget_unit"].item() != own.pop("budget_unit").item():
            raise InvalidArgumentError(
                f"budget_unit: expected {self.budget_unit!r}, found a state that counts otherwise"
            )
        part = whole if self._sharding is None else self._sharding.part
        state = state_dict["state"].cpu().numpy().tobytes()
        if kept is None:
            parts = {name: part(state_dict[name]) for name in own}
            self._native.load_state(state, stream=self._stream)
        else:
            parts = {name: whole(state_dict[name]) for name in own}
            self._shrink(kept, state)
        for average, tensors in zip(_AVERAGES, zip(*self._averages, strict=True), strict=True):
            for name, tensor in zip(self.names, tensors, strict=True):
                tensor.copy_(parts[f"{average}.{name}"])
        self.optimizer_steps.forget()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: what is native cannot be copied."""
        raise TypeError(
            "a RankAllocator cannot be copied or pickled: make another one for the model, and carry state_dict over"
        )

    # For AdamW

    def attach(self, optimizer: Optimizer) -> None:
        """Know an optimiser whose state `compact` has to shrink."""
        self._optimizers.add(optimizer)

    def fit(self, params: Sequence[nn.Parameter]) -> None:
        """Where parameters were cast or moved, let the run go on in memory that fits them."""
        if self._sharding is None and is_dtensor(params[0]):
            raise InvalidStateError(
                f"{self.names[0]}: expected a whole parameter, as when the allocator was made, found a sharded one: "
                "make the allocator after fully_shard, and before the model has run"
            )
        if [p.dtype for p in params] != self._param_dtypes or params[0].device != self._step.device:
            carried = self._native.save_state(stream=self._stream) if self._native.handle.bound else self._carried
            self._make(params)
            self._carried = carried

    def use_moments(self, moments: list[tuple[Tensor, Tensor, int]], steps: Sequence[int]) -> None:
        """Let AdamW's state be what the next steps work on.

        Args:
            moments: for each parameter both moments, of the state type, and the number of its hyperparameters.
            steps: for each adapter, how many updates led to them.

        """
        self.moments = moments
        self.place()
        if list(steps) != self._native.read(stream=self._stream).adam_steps:
            self._native.set_adam_steps(steps, stream=self._stream)

    def place(self) -> bool:
        """Bind where parameters and gradients lie now. Whether any adapter has a gradient."""
        params = self.parameters()
        self.fit(params)
        grads = [p.grad for p in params]
        found = True
        if any(g is None for g in grads):
            found = self._fill(params, grads)
        else:
            if not self._captured:
                self._no_gradients.clear()
            self._note_gradients([True] * len(self.layers))
        if not all(map(Tensor.is_contiguous, grads)):
            for k, p in enumerate(params):
                if not grads[k].is_contiguous():
                    grads[k] = p.grad = p.grad.contiguous()
        self._bind(params, grads)
        return found

    def gradient_norm(self, sum_of_squares: Tensor, found_inf: Tensor | None = None) -> None:
        """Add the sum of the squares of all adapters' gradients to a sum, over all processes; after `place`.

        Args:
            sum_of_squares: one float64 on the adapters' device, added to.
            found_inf: one float32, set to 1 where a gradient is not finite, else left alone.

        """
        if self._sharding is None:
            self._native.gradient_norm(sum_of_squares, found_inf, has_grad=self._has_grad, stream=self._stream)
            return
        found = torch.zeros_like(self.found_inf)
        squares = torch.zeros_like(sum_of_squares)
        self._native.gradient_norm(squares, found, has_grad=self._has_grad, stream=self._stream)
        squares, found = self._sharding.sum(torch.stack([squares, found.to(squares)]))
        sum_of_squares += squares
        if found_inf is not None:
            found_inf.copy_(found.clamp(max=1).to(found_inf).maximum(found_inf))

    def look_for_inf(self) -> Tensor:
        """Note whether a gradient of any adapter is not finite, in any process, in one value; after `place`."""
        self.found_inf.zero_()
        self.gradient_norm(torch.zeros_like(self.grad_factor), self.found_inf)
        return self.found_inf

    def note_inf(self, found_inf: Tensor) -> None:
        """Take over whether a gradient is not finite, in any process: above 0 where one is, one value."""
        self.found_inf.copy_(found_inf)
        if self._sharding is not None:
            # PyTorch's kernels take nothing but 0 and 1.
            self._sharding.sum(self.found_inf).clamp_(max=1)

    def adamw_step(self, global_step: int | None) -> None:
        """AdamW, importance and mask in one pass, from `grad_factor` and `found_inf`; after `place`.

        Args:
            global_step: number of the step; None: one more than that of the last step.

        """
        if global_step is None:
            self._step.add_(1)
        else:
            self._set_step(global_step)
        self.optimizer_steps.follow()
        self._run(self._adamw_values, self._step if global_step is None else global_step, with_adamw=True)
        increment_version(self.parameters())

    def updated(self) -> Tensor:
        """Which adapters `adamw_step` has just updated: [n_adapters], 1 or 0."""
        return self._has_grad * ((self.found_inf <= 0) & self.grad_factor.isfinite())

    @property
    def last_step(self) -> int:
        """Number of the last step that a call of training was given, read from the device; -1 before the first."""
        return int(self._step)

    @last_step.setter
    def last_step(self, number: int) -> None:
        self._set_step(number)

    def _set_step(self, number: int | Tensor) -> None:
        if isinstance(number, Tensor):
            self._step.copy_(number)
        else:
            self._step.fill_(step_number("global_step", number))

    def read_adam_steps(self, steps: Tensor) -> None:
        """Read each adapter's number of updates into a vector of int64 on the host."""
        library, handle = self._native.library, self._native.handle
        library.adalora_allocator_read_sync(handle.pointer, None, None, steps.data_ptr(), None, self._stream)

    def _run(self, values: StepValues, global_step: int | Tensor, *, with_adamw: bool) -> None:
        """Update, scores and selection; where parameters are sharded with the scores of all processes."""
        if self._sharding is None:
            self._native.step(values, with_adamw=with_adamw, stream=self._stream)
            return
        self._native.update(values, with_adamw=with_adamw, stream=self._stream)
        # A step without a mask looks at no score; the last mask falls on its step whatever deltaT is.
        step = int(global_step)
        masks = step == self._last_mask or self.budget(step).masks
        scores = self._reduced_scores() if masks else self._no_scores
        self._native.select(values, scores, stream=self._stream)

    def _show_masked(self) -> None:
        """Let others see that E has changed between steps: in what FSDP2 has gathered for a while, too."""
        Es = self.parameters()[1::3]
        increment_version(Es)
        for holder, E in zip(self._holders[1::3], Es, strict=True):
            shown = holder[self.adapter_name]
            if shown is not E:
                shown.copy_(whole(E))

    def _reduced_scores(self) -> Tensor:
        scores = torch.empty(self._native.total_rank, dtype=torch.float64, device=self._step.device)
        self._native.scores(scores, stream=self._stream)
        return scores if self._sharding is None else self._sharding.sum(scores)

    # Where everything lies

    def _make(self, params: Sequence[nn.Parameter]) -> None:
        """Make the native allocator for parameters of these types on this device."""
        if is_dtensor(params[0]):
            self._sharding, self._seen = Sharding(params, self.names), list(params)
        devices = {p.device for p in params}
        if len(devices) > 1:
            raise InvalidArgumentError(f"parameters: expected all on one device, found {sorted(map(str, devices))}")
        device = params[0].device
        on = context(device)
        adapters = []
        for k, path in enumerate(self.layers):
            dtypes = {p.dtype for p in params[3 * k : 3 * k + 3]}
            if len(dtypes) > 1:
                found = ", ".join(sorted(map(str, dtypes)))
                raise InvalidArgumentError(f"{path}: expected A, E and B of one type, found {found}")
            A, _, B = params[3 * k : 3 * k + 3]
            ranknum = 0 if self._compacted is None else len(self._compacted[k])
            adapters.append(native_adapter(on, A.shape[1], B.shape[0], A.shape[0], A.dtype, A.dtype, ranknum=ranknum))
        self._native = self._native_allocator(on, adapters)
        self._last_mask = self.config.total_step - self.config.tfinal
        self._sharded_penalty: ShardedPenalty | None = None
        self._loss_penalty: Penalty | None = None
        self._no_scores = torch.zeros(self._native.total_rank, dtype=torch.float64, device=device)
        self._param_dtypes = [p.dtype for p in params]
        sizes = self._native.sizes(len(params))
        self._memory = [torch.zeros(size, dtype=torch.uint8, device=device) for size in (sizes.state, sizes.workspace)]
        # A run that is moved or cast takes its averages along, and leaves its moments to AdamW.
        zeros = lambda p: torch.zeros(local(p).shape, dtype=state_dtype(p), device=device)  # noqa: E731
        self._averages = [
            (zeros(p), zeros(p))
            if not self._averages
            else tuple(t.to(device, state_dtype(p)) for t in self._averages[k])
            for k, p in enumerate(params)
        ]
        self.moments, self.hypers = None, []
        self._no_gradients.clear()
        # Values that the library reads where they lie, when the work runs.
        value = lambda dtype: torch.zeros((), dtype=dtype, device=device)  # noqa: E731
        self._step = value(torch.int64) - 1 if self._step is None else self._step.to(device)
        self._penalty_value, self._loss_scale, self.grad_factor = (value(torch.float64) for _ in range(3))
        self.found_inf = value(torch.float32)
        self._has_grad = torch.ones(len(adapters), dtype=torch.uint8, device=device)
        self._present: list[bool] | None = [True] * len(adapters)
        stream = current_stream(device)
        values = partial(StepValues, self._step, has_grad=self._has_grad, context=on, stream=stream)
        self._importance_values = values(loss_scale=self._loss_scale, penalty=self._penalty_value)
        self._noted_values = values(found_inf=self.found_inf)
        self._adamw_values = values(grad_factor=self.grad_factor, found_inf=self.found_inf)
        self._streams = {stream}
        # What is bound: addresses and types; nothing yet.
        self._captured = False
        self._places: list[int] = []
        self._dtypes: list[torch.dtype] = []
        self._grad_places: list[int] = []

    def _native_allocator(self, on: Context, adapters: Sequence[Adapter]) -> Allocator:
        config = self.config
        return Allocator(
            on,
            adapters,
            target_r=config.target_r,
            total_step=config.total_step,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=config.deltaT,
            beta1=config.beta1,
            beta2=config.beta2,
            budget_unit=self.budget_unit,
            sharded=self._sharding is not None,
        )

    @property
    def _stream(self) -> int | None:
        """PyTorch's current stream, in which the allocator's own memory is used from now on."""
        stream = current_stream(self._step.device)
        if stream not in self._streams:
            self._streams.add(stream)
            rates = [rate for hyper in self.hypers for rate in (hyper.lr, hyper.weight_decay)]
            values = self._step, self._penalty_value, self._loss_scale, self.grad_factor, self.found_inf
            own = [*self._memory, *chain(*self._averages), *values, self._has_grad, self._no_scores, *rates]
            own += [] if self._loss_penalty is None else self._loss_penalty.memory
            for tensor in own:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return stream

    def _place_with_gradients(self, call: str) -> None:
        if not self.place():
            raise InvalidStateError(f"{call}: expected gradients, found none: call it after backward, before zero_grad")

    def _fill(self, params: Sequence[nn.Parameter], grads: list[Tensor | None]) -> bool:
        """Put zeros where gradients are missing. Whether any adapter has a gradient."""
        present = []
        for k in range(0, len(params), 3):
            present.append(any(g is not None for g in grads[k : k + 3]))
            for i in range(k, k + 3):
                if present[-1]:
                    if not self._captured:
                        self._no_gradients.pop(i, None)
                    if grads[i] is None:
                        if not params[i].requires_grad:
                            raise InvalidArgumentError(
                                f"{self.names[i]}: expected requires_grad as its adapter's others, found False"
                            )
                        grads[i] = params[i].grad = torch.zeros_like(params[i])
                else:
                    if i not in self._no_gradients:
                        self._no_gradients[i] = torch.zeros_like(params[i])
                    grads[i] = self._no_gradients[i]
        self._note_gradients(present)
        return any(present)

    def _note_gradients(self, present: list[bool]) -> None:
        """Let the library know which adapters have a gradient."""
        capturing = self.is_capturing()
        if present == self._present and not capturing:
            return
        if len(set(present)) == 1:
            self._has_grad.fill_(present[0])
        elif not capturing:
            self._has_grad.copy_(torch.tensor(present, dtype=torch.uint8, device="cpu"))
        else:
            # Nothing is copied from the host while a graph is captured.
            for flag, value in zip(self._has_grad.unbind(), present, strict=True):
                flag.fill_(value)
        # What a graph writes is there once it runs, whenever that is.
        self._present = None if capturing else present

    def is_capturing(self) -> bool:
        """Whether PyTorch's current stream is captured into a graph."""
        return self._step.is_cuda and torch.cuda.is_current_stream_capturing()

    def _bind(self, params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
        """Bind anew what is not where it was."""
        shards = params
        if self._sharding is not None:
            self._sharding.check(grads, [f"{name}.grad" for name in self.names])
            shards, grads = list(map(local, params)), list(map(local, grads))
        places, grad_places = list(map(Tensor.data_ptr, shards)), list(map(Tensor.data_ptr, grads))
        dtypes = [t.dtype for t in (*params, *grads)]
        same = places == self._places and dtypes == self._dtypes and self.moments is self._bound_moments
        known, capturing = same and self.hypers is self._bound_hypers, self.is_capturing()
        # A graph binds what it was captured with at every replay, which nobody sees.
        self._captured = self._captured or capturing
        if known and grad_places == self._grad_places and not self._captured:
            return
        if capturing and not known:
            raise InvalidStateError(
                "capture: expected parameters, moments and hyperparameters as at the step before, found others: let a "
                "step go before that is not captured"
            )
        # Should binding fail, the next call begins from nothing.
        self._places = []
        if same and len(self.hypers) == len(self._bound_hypers):
            self._native.rebind(grad_places, self.hypers, stream=self._stream)
        else:
            self._bind_all(params, shards, grads)
        self._places, self._grad_places, self._dtypes = places, grad_places, dtypes
        self._bound_moments, self._bound_hypers = self.moments, self.hypers

    def _bind_all(self, params: Sequence[nn.Parameter], shards: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        begins = [0] * len(params)
        if self._sharding is not None:
            self._sharding.check(params, self.names)
            begins = [self._sharding.rows(p.shape[0])[0] * p.shape[1] for p in params]
        for k, (name, p) in enumerate(zip(self.names, params, strict=True)):
            if not shards[k].is_contiguous():
                raise InvalidArgumentError(f"{name}: expected a contiguous parameter, found strides {p.stride()}")
            adapter = self._native.adapters[k // 3]
            r = adapter.init_r
            shape = [(r, adapter.in_features), (r, 1), (adapter.out_features, r)][k % 3]
            if p.shape != shape:
                raise InvalidArgumentError(
                    f"{name}: expected shape {list(shape)}, as when the allocator was made, found {list(p.shape)}"
                )
            if p.device != self._step.device:
                raise InvalidArgumentError(f"{name}: expected a parameter on {self._step.device}, found {p.device}")
        state, workspace = self._memory
        slices = self._slices(shards, grads, self.moments, begins)
        self._native.bind(slices, self.hypers, state=state, workspace=workspace, stream=self._stream)
        if self._carried is not None:
            self._native.load_state(self._carried, stream=self._stream)
            self._carried = None

    def _slices(
        self,
        shards: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[tuple[Tensor, Tensor, int]] | None,
        begins: Sequence[int],
    ) -> list[Slice]:
        return [
            Slice(k // 3, "AEB"[k % 3], p.detach(), g, *averages, *map(local, own), begin=begin, hyper=hyper)
            for k, (p, g, averages, (*own, hyper), begin) in enumerate(
                zip(shards, grads, self._averages, moments or [(None, None, 0)] * len(shards), begins, strict=True)
            )
        ]

    # Compaction

    def _refuse_shards(self, call: str) -> None:
        if self._sharding is not None:
            raise UnsupportedError(f"{call}: expected whole parameters, found sharded ones: call it before fully_shard")

    def _native_standing(self) -> Standing:
        self.place()
        return self._native.read(stream=self._stream)

    def _initial_pattern(self, kept: list[list[bool]]) -> list[list[bool]]:
        """Which of the initial triplets are kept, from which are kept of those that are there."""
        if self._compacted is None:
            return kept
        rest = [iter(flags) for flags in kept]
        return [
            [is_there and next(flags) for is_there in there] for there, flags in zip(self._compacted, rest, strict=True)
        ]

    def _loaded_pattern(self, state_dict: Mapping[str, Tensor]) -> list[list[bool]] | None:
        """What a state to be loaded keeps of the triplets; None: what is there, as it is."""
        if not isinstance(state_dict, Mapping):
            raise InvalidArgumentError(f"state_dict: expected a dict, found {type(state_dict).__name__}")
        found = state_dict.get("rank_pattern")
        if found is not None and not isinstance(found, Tensor):
            raise InvalidArgumentError(f"rank_pattern: expected a tensor, found {type(found).__name__}")
        if self._compacted is not None:
            own = list(chain.from_iterable(self._compacted))
            if found is None or found.tolist() != own:
                what = "one that was not compacted" if found is None else "one that kept other triplets"
                raise InvalidArgumentError(
                    f"rank_pattern: expected the state of a run compacted to the model's triplets, found {what}"
                )
            return None
        if found is None:
            return None
        ranks = self._native.ranks
        if found.dtype != torch.bool or found.shape != (sum(ranks),):
            raise InvalidArgumentError(
                f"rank_pattern: expected {sum(ranks)} flags, found {found.dtype} of shape {list(found.shape)}"
            )
        return [flags.tolist() for flags in found.split(ranks)]

    def _shrink(self, kept: list[list[bool]], state: bytes, optimizers: Sequence[Optimizer] = ()) -> None:
        """Go on with some of the triplets alone, from a native state; where it fails, nothing is changed."""
        params = self.parameters()
        of = lambda tensor, k: cut(tensor, self.names[k][-1], kept[k // 3])  # noqa: E731
        smaller = [of(p.detach(), k) for k, p in enumerate(params)]
        grads = [None if p.grad is None else of(p.grad, k) for k, p in enumerate(params)]
        known = {id(optimizer.state): optimizer for optimizer in (*optimizers, *self._optimizers)}
        puts = [cut_states(optimizer, params, self.names, kept) for optimizer in known.values()]
        before = dict(self.__dict__)
        try:
            self._compacted, self._averages = self._initial_pattern(kept), []
            self._make(smaller)
            self._carried = state
            self._bind(smaller, [torch.zeros_like(p) for p in smaller])
        except Exception:
            self.__dict__.update(before)
            raise
        for put in puts:
            put()
        for p, values, grad in zip(params, smaller, grads, strict=True):
            resize(p, values, grad)
        increment_version(params)
        if isinstance(self.config, AdaLoraConfig):
            keep_pattern(self.config, dict(zip(self.layers, self._compacted, strict=True)))

    def _penalty_of_shards(self, weight: float | None, factor: Tensor | None) -> list[Tensor | None]:
        """Note the penalty in its place, and return its gradients for this process's rows of all parameters."""
        params = self.parameters()
        if self._sharded_penalty is None:
            dtypes = {p.dtype for p in params}
            if len(dtypes) > 1:
                raise UnsupportedError(
                    f"parameters: expected sharded ones of one type, found {', '.join(sorted(map(str, dtypes)))}"
                )
            self._sharded_penalty = ShardedPenalty(
                self._native_allocator(self._native.context, self._native.adapters),
                self._sharding,
                [(tuple(A.shape), tuple(B.shape)) for A, B in zip(params[::3], params[2::3], strict=True)],
                params[0].dtype,
                state_dtype(params[0]),
                self._step.device,
            )
        weight = self.config.orth_reg_weight if weight is None else weight
        A, B = list(map(local, params[::3])), list(map(local, params[2::3]))
        grads = self._sharded_penalty.gradients(A, B, weight, factor, self._penalty_value, self._stream)
        return [grad for A_grad, B_grad in grads for grad in (A_grad, None, B_grad)]

    def penalty_and_gradients(self, weight: float | None, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The penalty, and its gradients for all parameters, as new tensors."""
        self.fit(params)
        if self._sharding is not None:
            grads = self._penalty_of_shards(weight, None)
            zeros = [torch.zeros_like(local(p), dtype=state_dtype(p)) for p in params]
            filled = [zero if grad is None else grad for zero, grad in zip(zeros, grads, strict=True)]
            return self._penalty_value.clone(), [
                self._sharding.spread(grad, p) for grad, p in zip(filled, params, strict=True)
            ]
        if self._loss_penalty is None:
            native = self._native_allocator(self._native.context, self._native.adapters)
            self._loss_penalty = Penalty(native, params)
        grads = self._loss_penalty.gradients(
            params,
            lambda grads: self._slices(params, grads, None, [0] * len(params)),
            self.config.orth_reg_weight if weight is None else weight,
            self._penalty_value,
            self._stream,
        )
        return self._penalty_value.clone(), grads


def _check_keys(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, unknown = [key for key in expected if key not in found], [key for key in found if key not in expected]
    if missing or unknown:
        text = f"lacking {missing[0]!r}" if missing else f"{unknown[0]!r} beside"
        raise InvalidArgumentError(
            f"{name}: expected the {len(expected)} keys of this model's adapters, found one {text}"
        )
