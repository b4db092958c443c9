"""PEFT's AdaLoRA model over this library, and what makes one of a model that PEFT made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import adalora as theirs
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.mixed import MixedModel as TheirMixedModel
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import get_gptqmodel_quant_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError
from ..torch.distributed import fsdp_modules, reshard
from .allocator import RankAllocator, by_path, check_config
from .layers import CLASSES, FACTORS, accelerated_class


class AdaLoraModel(theirs.AdaLoraModel):
    """A model with AdaLoRA adapters (PEFT's class): what `model.base_model` is of a PEFT model that is accelerated."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; in training, `loss` has the orthogonality penalty of the trained adapter in it."""
        outputs = self.model.forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if self.training and isinstance(loss, Tensor):
            config = self._trained()[1]
            if config is not None and config.orth_reg_weight != 0 and not self._is_in_trainer():
                outputs.loss = loss + self.orthogonality_loss().to(loss.device, loss.dtype)
        return outputs

    def orthogonality_loss(self, weight: float | None = None) -> Tensor:
        """The orthogonality penalty of the trained adapter, for losses that the model does not compute itself.

        Args:
            weight: of the penalty; None: the configuration's `orth_reg_weight`.

        """
        self._penalty_was_taken = True
        return self._allocator("orthogonality_loss").orthogonality_loss(weight)

    def update_and_allocate(self, global_step: int) -> None:
        """Update importance, and mask what the schedule says: after the optimiser's step, before `zero_grad`.

        Args:
            global_step: number of the optimiser's step, from 0 on.

        """
        allocator = self._allocator("update_and_allocate")
        _, pattern = allocator.update_and_allocate(self.model, global_step)
        if pattern is not None:
            allocator.peft_config.rank_pattern = pattern
        weight = 0 if allocator.in_trainer else allocator.peft_config.orth_reg_weight
        if weight and not self.__dict__.get("_penalty_was_taken", False):
            warnings.warn(
                f"orth_reg_weight: expected the penalty in the loss, since the weight is {weight}, found none: it is "
                "added where base_model returns a loss in training, and a PEFT model without task_type does not call "
                "that; add model.base_model.orthogonality_loss() to your loss, or set orth_reg_weight to 0",
                stacklevel=2,
            )
        # Once is enough.
        self._penalty_was_taken = True

    def _check_new_adapter_config(self, config: AdaLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        check_config(config)

    @staticmethod
    def _create_new_module(
        lora_config: AdaLoraConfig, adapter_name: str, target: nn.Module, device_map: Any = None, **kwargs: Any
    ) -> nn.Module:
        check_config(lora_config)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        in_8bit, in_4bit = (kwargs.pop(f"loaded_in_{bits}bit", False) for bits in (8, 4))
        gptq = get_gptqmodel_quant_linear(kwargs.get("gptq_quantization_config"), device_map=device_map)
        if in_8bit and is_bnb_available() and _is_bitsandbytes(base, "Linear8bitLt"):
            kind = theirs.SVDLinear8bitLt
        elif in_4bit and is_bnb_4bit_available() and _is_bitsandbytes(base, "Linear4bit"):
            kind = theirs.SVDLinear4bit
        elif gptq is not None and isinstance(target, gptq):
            kind = theirs.SVDQuantLinear
        elif isinstance(base, nn.Conv2d):
            kind = theirs.SVDConv2d
        elif isinstance(base, nn.Linear | Conv1D):
            kind = theirs.SVDLinear
            transposed = isinstance(base, Conv1D)
            if lora_config.fan_in_fan_out != transposed:
                warnings.warn(
                    f"fan_in_fan_out is set to {not transposed} but the target module is `{type(base).__name__}`. "
                    f"Setting fan_in_fan_out to {transposed}.",
                    stacklevel=2,
                )
                lora_config.fan_in_fan_out = transposed
        else:
            # Which of GPTQ's kernels trains this model, PEFT says.
            kernel = "" if gptq is None else f': `{gptq.__name__}`, which GPTQConfig(backend="auto_trainable") loads'
            raise UnsupportedType(
                f"Target module {target} is not supported. Expected `torch.nn.Linear`, `Conv1D` or `torch.nn.Conv2d`, "
                f"or a layer quantized by 8 or 4 bits or GPTQ{kernel}."
            )
        return CLASSES[kind](target, adapter_name, config=lora_config, **kwargs)

    # Files

    def resize_modules_by_rank_pattern(self, rank_pattern: Mapping[str, Any], adapter_name: str) -> None:
        """Give every layer the triplets that a file holds, as its `rank_pattern` says. Scalings stay.

        An adapter that is to be trained on, above its target budget, keeps the others too, with E zero: they may come
        back.
        """
        if self._is_in_trainer():
            return
        config, layers = self.peft_config[adapter_name], self._layers(adapter_name)
        patterns = {path: _flags(path, kept) for path, kept in by_path(rank_pattern).items()}
        for path, kept in patterns.items():
            if path not in layers:
                raise InvalidArgumentError(f"rank_pattern: expected names of adapted layers, found {path!r}")
            r = layers[path].lora_E[adapter_name].shape[0]
            if len(kept) != r and sum(kept) != r:
                raise InvalidArgumentError(f"rank_pattern[{path!r}]: expected {r} flags, found {len(kept)}")
        total = sum(map(sum, patterns.values()))
        goes_on = not config.inference_mode and total > config.target_r * len(layers)
        # A run that stands at its end goes on with all of its triplets, which its optimiser knows.
        goes_on = goes_on or (self._trains(adapter_name) and self.rankallocator.final_pattern() == patterns)
        for path, kept in patterns.items():
            layer = layers[path]
            if all(kept) or len(kept) != layer.lora_E[adapter_name].shape[0]:
                continue
            if goes_on:
                layer.place_when_loaded(adapter_name, kept)
            else:
                layer.keep(adapter_name, kept)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: Mapping[str, Any], state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """Leave masked triplets out of a state dict that is to be saved, once the last mask was taken.

        Before, all are in it, since masked ones learn and may come back; the configuration's pattern says so.
        """
        config, trains = self.peft_config[adapter_name], self._trains(adapter_name)
        there = self.rankallocator.there() if trains else {}
        saved: dict[str, list[bool]] = {}
        for path in self._layers(adapter_name):
            full = f"{path}.lora_E.{adapter_name}"
            # PEFT takes the adapter's name out wherever it occurs.
            names = full, f"{path}.lora_E", full.replace(f".{adapter_name}", "")
            kept = next((_flags(path, rank_pattern[name]) for name in names if name in rank_pattern), None)
            if kept is None:
                continue
            keys = [f"base_model.model.{path}.lora_{factor}.{adapter_name}" for factor in "AEB"]
            A, E, B = (state_dict[key] for key in keys)
            own = there.get(path, [True] * len(kept))
            index = torch.tensor([flag for flag, is_there in zip(kept, own, strict=True) if is_there], dtype=torch.bool)
            if E.shape[0] == len(index):
                index = index.to(E.device)
                if (trains and self.rankallocator.keeps_masked()) or bool(E[~index].any()):
                    kept = own
                elif not index.all():
                    state_dict.update(zip(keys, (A[index], E[index], B[:, index]), strict=True))
            elif E.shape[0] != sum(kept):
                # The pattern is of other triplets: all that there are go into the file.
                kept = [True] * E.shape[0]
            # Of triplets that a file left out before, nobody knows which they were.
            kept = kept + [False] * (config.init_r - len(kept))
            if not all(kept) and config.lora_alpha <= 0:
                # It stands for the rank, which PEFT takes for the one in the file.
                config.lora_alpha = config.init_r
            saved[f"{path}.lora_E"] = kept
        config.rank_pattern = saved
        return state_dict

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self.peft_config:
            self._make_room(name, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _make_room(self, adapter_name: str, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Let layers have the ranks of a run's end, or the initial ones, where a state dict has those.

        PEFT resizes them by the configuration's pattern, but a model that is there keeps its own configuration.
        """
        config, layers = self.peft_config[adapter_name], self._layers(adapter_name)
        names = {path: {name: f"{prefix}{path}.{name}.{adapter_name}" for name in FACTORS} for path in layers}
        if any(name not in state_dict for each in names.values() for name in each.values()):
            return
        ranks = {path: len(state_dict[each["lora_E"]]) for path, each in names.items()}
        awaited = {path: layer.awaited(adapter_name) for path, layer in layers.items()}
        initial = dict.fromkeys(layers, config.init_r)
        if ranks == awaited or (sum(ranks.values()) != config.target_r * len(layers) and ranks != initial):
            return
        rooms = {path: layer.room(adapter_name, ranks[path]) for path, layer in layers.items()}
        shapes = {names[path][name]: tensor.shape for path, room in rooms.items() for name, tensor in room.items()}
        if any(state_dict[key].shape != shape for key, shape in shapes.items()):
            return
        config.rank_pattern = {}
        for path, layer in layers.items():
            layer.give(adapter_name, rooms[path])
            # Which they were, the parameters do not say.
            config.rank_pattern[f"{path}.lora_E"] = [k < ranks[path] for k in range(initial[path])]

    # Layers and adapters

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights: into all of them or none."""
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        self._check_merge_allowed()
        for each in self.model.modules():
            if isinstance(each, tuple(CLASSES.values())):
                # Values are looked at only then.
                with onload_layer(each) if safe_merge else nullcontext():
                    each.check_merge(safe_merge, adapter_names)

    def _layers(self, adapter_name: str) -> dict[str, AdaLoraLayer]:
        found = self.model.named_modules()
        return {path: each for path, each in found if isinstance(each, AdaLoraLayer) and adapter_name in each.lora_A}

    def _trains(self, adapter_name: str) -> bool:
        """Whether the allocator is that adapter's."""
        allocator = self.__dict__.get("rankallocator")
        return isinstance(allocator, RankAllocator) and allocator.adapter_name == adapter_name

    def _is_in_trainer(self) -> bool:
        return isinstance(allocator := self.__dict__.get("rankallocator"), RankAllocator) and allocator.in_trainer

    def _trained(self) -> tuple[str | None, AdaLoraConfig | None]:
        """The name and the configuration of the adapter that is trained."""
        for name, config in self.peft_config.items():
            if not config.inference_mode:
                return name, config
        return None, None

    def _allocator(self, call: str) -> RankAllocator:
        """The trained adapter's allocator; another one for another adapter."""
        name, config = self._trained()
        if name is None:
            raise InvalidStateError(f"{call}: expected an adapter that is trained, found inference_mode in all")
        found = self.__dict__.get("rankallocator")
        if found is None or found.peft_config is not config or found.adapter_name != name:
            self.trainable_adapter_name, self.rankallocator = name, RankAllocator(self.model, config, name)
        return self.rankallocator


class MixedModel(TheirMixedModel):
    """A model with adapters of several kinds (PEFT's class): what `base_model` of a mixed model is."""

    @staticmethod
    def _create_new_module(config: PeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(config, AdaLoraConfig):
            return AdaLoraModel._create_new_module(config, adapter_name, target, **kwargs)
        return TheirMixedModel._create_new_module(config, adapter_name, target, **kwargs)


class UnsupportedType(InvalidArgumentError, UnsupportedError):
    """A module of a type that cannot be adapted; PEFT raises ValueError."""


def accelerate(model: nn.Module) -> nn.Module:
    """Let this library compute what PEFT's AdaLoRA layers, penalty and rank allocator compute in a model.

    The model is changed in place, and stays what it is: parameters are the very tensors that PEFT made, and names,
    state dict, hooks, optimisers and `print(model)` do not change. A run may be under way: importance and pattern go
    on. It comes before `fully_shard`, and once more after it: in the forward pass, where the penalty belongs, sharded
    parameters do not show.

    Args:
        model: a PEFT model with an AdaLoRA adapter, or any module that contains PEFT's AdaLoRA layers.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: there is no AdaLoRA layer, or a configuration is wrong. The model is unchanged.
        UnsupportedError: a layer cannot be computed here. The model is unchanged.

    """
    layers = [each for each in model.modules() if isinstance(each, AdaLoraLayer)]
    if not layers:
        raise InvalidArgumentError(
            f"model: expected a PEFT model with an AdaLoRA adapter, found {type(model).__name__} without one"
        )
    classes = [accelerated_class(layer) for layer in layers]
    for layer, cls in zip(layers, classes, strict=True):
        _refuse_groups(layer)
        # Another class would change nothing.
        if "forward" in vars(layer) and not isinstance(layer, cls):
            raise UnsupportedError(
                f"model: expected {type(layer).__name__}.forward of PEFT's, found another one on the layer itself, as "
                "accelerate's hooks put it there: accelerate the model before"
            )
    tuners = [each for each in model.modules() if isinstance(each, theirs.AdaLoraModel)]
    for tuner in tuners:
        if type(tuner) is not theirs.AdaLoraModel and not isinstance(tuner, AdaLoraModel):
            raise UnsupportedError(f"model: expected PEFT's AdaLoraModel, found {type(tuner)}")
        for config in tuner.peft_config.values():
            check_config(config)
    for layer, cls in zip(layers, classes, strict=True):
        layer.__class__ = cls
        layer.keep_ranknum_constant()
    for each in model.modules():
        if type(each) is TheirMixedModel:
            each.__class__ = MixedModel
    is_sharded = bool(fsdp_modules(model))
    reshard(model)
    for tuner in tuners:
        if not isinstance(tuner, AdaLoraModel):
            tuner.__class__ = AdaLoraModel
        for name, config in tuner.peft_config.items():
            for layer in tuner._layers(name).values():
                layer.restore_ranknum(name, config.init_r)
        allocator = tuner.__dict__.get("rankallocator")
        if isinstance(allocator, theirs.RankAllocator):
            ours = RankAllocator(tuner.model, allocator.peft_config, allocator.adapter_name)
            ours.take_over(allocator)
            allocator = tuner.rankallocator = ours
        if is_sharded and isinstance(allocator, RankAllocator):
            allocator.parameters()
    return model


def _is_bitsandbytes(base: nn.Module, name: str) -> bool:
    import bitsandbytes

    return isinstance(base, getattr(bitsandbytes.nn, name))


def _refuse_groups(layer: AdaLoraLayer) -> None:
    """Refuse convolutions that PEFT made with A of all channels: no weight has that shape, and they compute nothing."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        expected = base.weight[0].numel()
        for name, A in layer.lora_A.items():
            if A.shape[1] != expected:
                raise UnsupportedError(
                    f"model: expected lora_A of {expected} columns for {base}, found {A.shape[1]} in {name!r}: PEFT "
                    "gives it the channels of all groups; make the model after adalora.peft.install()"
                )


def _flags(path: str, kept: Any) -> list[bool]:
    if isinstance(kept, Tensor):
        kept = kept.flatten().tolist()
    if not isinstance(kept, list) or not all(isinstance(flag, bool) for flag in kept):
        raise InvalidArgumentError(f"rank_pattern[{path!r}]: expected a list of bool, found {kept!r}")
    return kept
