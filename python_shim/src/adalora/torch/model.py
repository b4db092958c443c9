"""Adapters on a whole model: put on, chosen, switched off, merged, taken off."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import AdaLoRAError, InvalidArgumentError, InvalidStateError
from .config import TASK_HEADS, AdaLoraConfig
from .layers import SharedInput, SVDLayer, SVDLinear, uncompiled
from .matching import matching_modules, svd_layer

SHARED_INPUTS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of siblings that read the same x in the models of transformers."""


def adapt(
    model: nn.Module, config: AdaLoraConfig, adapter_name: str = "default", *, autocast_adapter_dtype: bool = True
) -> nn.Module:
    """Put an adapter on every module of a model that the configuration targets, and freeze the rest.

    The model is changed in place: each target becomes the `base_layer` of an `SVDLayer`. The first adapter is active
    at once; further ones wait for `set_adapter`. One adapter at most may be trained: the others need
    `inference_mode`. Biases and modules that are trained whole exist once, and so go with a model's first adapter
    alone. Siblings that usually read the same input (query, key and value; gate and up) are computed together, see
    `SharedInput`.

    Args:
        model: any module; `model.adalora_config` receives a copy of the configuration under the adapter's name.
        config: which modules, ranks, scaling, schedule.
        adapter_name: name of the adapter in the parameters' names.
        autocast_adapter_dtype: parameters in float32 where the base weight is in half precision, as in PEFT.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: nothing matches, a match cannot be adapted, or the name is taken. The model is unchanged.

    """
    if not isinstance(config, AdaLoraConfig):
        hint = "; AdaLoraConfig.from_dict(config.to_dict()) makes one of PEFT's" if hasattr(config, "to_dict") else ""
        raise InvalidArgumentError(f"config: expected adalora.torch.AdaLoraConfig, found {type(config)}{hint}")
    given, model = model, uncompiled(model)
    configs: dict[str, AdaLoraConfig] = getattr(model, "adalora_config", {})
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise InvalidArgumentError(f"adapter_name: expected a name without dots, found {adapter_name!r}")
    if hasattr(nn.ParameterDict, adapter_name):
        raise InvalidArgumentError(
            f"adapter_name: expected a name that torch.nn.ParameterDict has no use for, found {adapter_name!r}"
        )
    if adapter_name in configs:
        raise InvalidArgumentError(f"adapter_name: expected a new name, found {adapter_name!r}, which the model has")
    trained = [name for name, other in configs.items() if not other.inference_mode]
    if trained and not config.inference_mode:
        raise InvalidArgumentError(
            f"config: expected inference_mode, since the adapter {trained[0]!r} is trained already, found a second "
            "adapter to train"
        )
    peft = sys.modules.get("peft.tuners.tuners_utils")
    wrapped_by_peft = [path for path, each in model.named_modules() if peft and isinstance(each, peft.BaseTunerLayer)]
    if wrapped_by_peft:
        raise InvalidArgumentError(
            f"model: expected one without PEFT's adapters, found one at {wrapped_by_peft[0]}: unload it first"
        )
    config = copy.deepcopy(config)
    config.rank_pattern = None
    targets = matching_modules(model, config)
    beside = saved_modules(model, config)
    if configs and (beside or config.bias != "none"):
        what = next(iter(beside), "biases")
        raise InvalidArgumentError(
            f"config: expected a further adapter alone, found one with {what} trained whole: a model has one copy, "
            f"which {next(iter(configs))!r} uses too; put it on another model"
        )
    wrapped = {path: svd_layer(module) for path, module in targets.items()}
    _refuse_merged(path for path, layer in wrapped.items() if layer.merged_adapters)
    taken = [path for path, layer in wrapped.items() if adapter_name in layer.lora_A]
    if taken:
        raise InvalidArgumentError(
            f"adapter_name: expected a new name, found {adapter_name!r}, which {taken[0]} has from a call for a part "
            "of the model"
        )

    if not configs:
        model.requires_grad_(False)
    for path, layer in wrapped.items():
        dtype, _ = layer.placement()
        if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        layer.add_adapter(
            adapter_name,
            r=config.init_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            init_lora_weights=config.init_lora_weights,
            dtype=dtype,
        )
        for p in layer.triplets(adapter_name):
            p.requires_grad_(not config.inference_mode)
        layer.train(targets[path].training)
        if layer is not targets[path]:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    model.adalora_config = {**configs, adapter_name: config}
    if not configs:
        set_adapter(model, adapter_name)
    if not config.inference_mode:
        _train_beside(model, config.bias, wrapped, beside)
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in wrapped):
        _share_inputs(model.get_submodule(parent))
    return given


def _refuse_merged(paths: Iterable[str]) -> None:
    for path in paths:
        raise InvalidStateError(
            f"model: expected adapters that are not merged, found {path} merged: call unmerge first"
        )


def _train_beside(model: nn.Module, bias: str, layers: dict[str, SVDLayer], saved: dict[str, nn.Module]) -> None:
    """What is trained beside the adapters: biases and whole modules."""
    if bias == "all":
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                p.requires_grad_(True)
    elif bias == "lora_only":
        for layer in layers.values():
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
    for module in saved.values():
        module.requires_grad_(True)


def saved_modules(model: nn.Module, config: AdaLoraConfig) -> dict[str, nn.Module]:
    """The modules that are trained whole and saved with the adapter: `modules_to_save` and the task type's heads."""
    named = lambda path, name: path == name or path.endswith(f".{name}")  # noqa: E731
    paths = dict(uncompiled(model).named_modules())
    asked = tuple(config.modules_to_save or ())
    missing = [name for name in asked if not any(named(path, name) for path in paths)]
    if missing:
        raise InvalidArgumentError(f"modules_to_save: expected names of modules of the model, found {missing[0]!r}")
    names = (*asked, *TASK_HEADS.get(config.task_type or "", ()))
    return {path: module for path, module in paths.items() if any(named(path, name) for name in names)}


def _share_inputs(parent: nn.Module) -> None:
    for names in SHARED_INPUTS:
        layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), SVDLinear)]
        share_input([layer for layer in layers if layer.in_features == layers[0].in_features])


def share_input(layers: Sequence[SVDLinear]) -> None:
    """Compute layers together that are given the same x one after the other.

    `adapt` does it for the usual names; results are the same to rounding.

    Args:
        layers: with the same number of input features, in the order of their calls.

    """
    widths = {layer.in_features for layer in layers}
    if len(widths) > 1:
        raise InvalidArgumentError(f"layers: expected the same number of input features, found {sorted(widths)}")
    if len(layers) > 1:
        shared = SharedInput(layers)
        for layer in layers:
            layer.shared_input = shared


def named_adapters(model: nn.Module, adapter_name: str | None = "default") -> dict[str, SVDLayer]:
    """The layers that have an adapter, by path, in the model's order.

    Args:
        model: what `adapt` returned.
        adapter_name: the adapter; None: any.

    """
    return {
        path: module
        for path, module in uncompiled(model).named_modules()
        if isinstance(module, SVDLayer) and (adapter_name is None or adapter_name in module.lora_A)
    }


def get_config(model: nn.Module, adapter_name: str) -> AdaLoraConfig:
    """The configuration of one of a model's adapters."""
    configs = getattr(model, "adalora_config", None)
    if not configs:
        raise InvalidArgumentError("model: expected one with adapters, found none: call adapt or load_adapter first")
    if adapter_name not in configs:
        raise InvalidArgumentError(f"adapter_name: expected one of {list(configs)}, found {adapter_name!r}")
    return configs[adapter_name]


def set_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Choose which adapters the forward pass adds: one, several or none. What is trained stays as it is.

    Raises:
        InvalidStateError: an adapter is merged: call `unmerge` first.

    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in names:
        get_config(model, name)
    layers = named_adapters(model, None)
    _refuse_merged(path for path, layer in layers.items() if layer.merged_adapters)
    for layer in layers.values():
        layer.active_adapters = [name for name in names if name in layer.lora_A]


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter; where it was a layer's last, the base layer takes its place again."""
    get_config(model, adapter_name)
    layers = named_adapters(model, adapter_name)
    _refuse_merged(path for path, layer in layers.items() if adapter_name in layer.merged_adapters)
    for path, layer in layers.items():
        layer.delete_adapter(adapter_name)
        if not layer.lora_A:
            _restore(model, path, layer)
    model.adalora_config = {name: config for name, config in model.adalora_config.items() if name != adapter_name}


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off, merged ones too: within, the model computes what it did before `adapt`.

    Biases and modules that are trained whole stay as they are.

    >>> with disable_adapters(model):
    ...     model(**batch)
    """
    layers = named_adapters(model, None).values()
    before = [(layer, layer.disable_adapters, layer.merged_adapters, layer._unmerged_weight) for layer in layers]
    try:
        unmerge(model)
        for layer in layers:
            layer.disable_adapters = True
        yield
    finally:
        for layer, disabled, merged, backup in before:
            layer.disable_adapters = disabled
            layer.merge(adapter_names=merged, backup=backup is not None)


def merge(
    model: nn.Module, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, backup: bool = True
) -> None:
    """Merge adapters into the base weights of all layers, or of none where it fails.

    Active adapters that are not merged go on beside; merged ones get no gradient.

    Args:
        model: what `adapt` returned.
        safe_merge: look whether every merged weight is finite, and change nothing where one is not.
        adapter_names: which; None: the active ones.
        backup: keep the base weights as they were, so that `unmerge` restores them exactly; otherwise it subtracts.

    Raises:
        InvalidArgumentError: with `safe_merge`, a merged weight is not finite: the layer is named.
        UnsupportedError: a layer is quantised, sharded, computes its weight, or is of an unknown type: it is named.

    """
    for name in adapter_names or ():
        get_config(model, name)
    layers = named_adapters(model, None)
    _check_each(layers, lambda layer: layer.check_merge(adapter_names, safe_merge))
    for layer in layers.values():
        layer.merge(adapter_names=adapter_names, backup=backup)


def unmerge(model: nn.Module) -> None:
    """Take all merged adapters out of the base weights, exactly where `merge` kept a backup; or none, where it fails.

    Raises:
        UnsupportedError: `fully_shard` has a merged layer: it is named.

    """
    layers = named_adapters(model, None)
    _check_each(layers, lambda layer: layer.check_unmerge())
    # In reverse: layers may share a weight, and each keeps it as it found it.
    for layer in reversed(layers.values()):
        layer.unmerge()


def _check_each(layers: Mapping[str, SVDLayer], check: Callable[[SVDLayer], None]) -> None:
    """Raise the first error of a check, with the layer's path, before any layer is changed."""
    for path, layer in layers.items():
        try:
            check(layer)
        except AdaLoRAError as error:
            raise type(error)(f"{path}: {error}") from None


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters off: every base layer stands in its place again, unmerged. Base parameters stay frozen.

    Args:
        model: what `adapt` returned; it is changed in place.

    Returns:
        The model.

    """
    unmerge(model)
    return _bare(model)


def merge_and_unload(
    model: nn.Module, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
) -> nn.Module:
    """Merge adapters into the base weights, and take all off: a plain model that computes the same.

    Args:
        model: what `adapt` returned; it is changed in place.
        safe_merge: as in `merge`.
        adapter_names: which are merged; None: the active ones.

    Returns:
        The model.

    """
    merge(model, safe_merge, adapter_names, backup=False)
    return _bare(model)


def _bare(model: nn.Module) -> nn.Module:
    for path, layer in named_adapters(model, None).items():
        _restore(model, path, layer)
    if hasattr(model, "adalora_config"):
        del model.adalora_config
    return model


def _restore(model: nn.Module, path: str, layer: SVDLayer) -> None:
    if isinstance(layer, SVDLinear) and layer.shared_input is not None:
        layer.shared_input.separate()
    parent, _, name = path.rpartition(".")
    setattr(uncompiled(model).get_submodule(parent), name, layer.base_layer)
