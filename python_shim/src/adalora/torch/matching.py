"""Which modules of a model a configuration targets: what PEFT would adapt."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any, NoReturn

from torch import nn

from ..errors import InvalidArgumentError
from .config import TASK_HEADS, AdaLoraConfig
from .convolution import SVDConv1d, SVDConv2d
from .embedding import SVDEmbedding
from .layers import SVDLayer, SVDLinear, is_conv1d, uncompiled

# What is targeted in models of a known type where the configuration does not say, as in PEFT: names, or one expression.
_QUERY_VALUE = ("q_proj", "v_proj")
_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_USUAL_TARGETS: dict[str, tuple[str, ...] | str] = {
    "bart": _BART,
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "gemma": _QUERY_VALUE,
    "gemma2": _QUERY_VALUE,
    "gemma3_text": _QUERY_VALUE,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _QUERY_VALUE,
    "gpt_neox": ("query_key_value",),
    "gptj": _QUERY_VALUE,
    "llama": _QUERY_VALUE,
    "llama4": _QUERY_VALUE,
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _BART,
    "qwen2": _QUERY_VALUE,
    "qwen3": _QUERY_VALUE,
    "roberta": ("query", "key", "value", "dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}
# The kernels of these models read the weights of these modules and never call them.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_BY_MAMBA = ("conv1d", "out_proj")
_KINDS = (SVDLinear, SVDConv2d, SVDConv1d, SVDEmbedding)


def matching_modules(model: nn.Module, config: AdaLoraConfig) -> dict[str, nn.Module]:
    """The modules that a configuration targets, by path, in the model's order.

    A match is a layer that `svd_layer` can wrap, or an `SVDLayer` that gets a further adapter; what an `SVDLayer` is
    made of never matches. Heads that the task type says are trained whole do not either.

    "all-linear" is every linear layer but the output embeddings, and nothing else. (In PEFT it becomes a list of names,
    which by their ends can mean other modules too.)

    It warns where part of what was asked for has no effect.

    Args:
        model: any module. It is not changed, nor is the configuration, unless to bring fields to plain types.
        config: what to target.

    Raises:
        InvalidArgumentError: nothing matches, or a match is of a type that cannot be adapted.

    """
    config.check()
    model = uncompiled(model)
    modules = dict(_outside_adapters(model))
    targets = _usual_targets(model, config) if config.target_modules is None else config.target_modules
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    output_embeddings = _output_embeddings(model)
    saved = (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type or "", ()))

    allowed = {path: module for path, module in modules.items() if not _is_excluded(path, config, saved)}
    matched = {}
    for path, module in allowed.items():
        if all_linear:
            hit = _is_linear(module) and module is not output_embeddings
        else:
            hit = _is_targeted(path, targets, config)
        if hit:
            matched[path] = module

    if not matched:
        _refuse_no_match(modules, targets, config, excluded=len(modules) - len(allowed))
    for path, module in matched.items():
        _check_adaptable(path, module, model)
    for warning in _without_effect(model, config, modules, matched):
        warnings.warn(warning, stacklevel=3)
    return matched


def svd_layer(module: nn.Module) -> SVDLayer:
    """A layer around a module, of the kind that its type needs; an `SVDLayer` as it is.

    Raises:
        InvalidArgumentError: the module is of a type that cannot be adapted.

    """
    return module if isinstance(module, SVDLayer) else _kind(module)(module)


def _kind(module: nn.Module) -> type[SVDLayer]:
    return next((kind for kind in _KINDS if isinstance(module, kind.base_types)), SVDLinear)


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the model itself and what adapted layers are made of."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path and not path.startswith(inside):
            yield path, module
            if isinstance(module, SVDLayer):
                inside = (f"{path}.",)


def _usual_targets(model: nn.Module, config: AdaLoraConfig) -> set[str] | str:
    model_type = _model_type(model)
    targets = _USUAL_TARGETS.get(model_type) if isinstance(model_type, str) else None
    if targets is None:
        raise InvalidArgumentError(
            "target_modules: expected names, a regular expression or 'all-linear', since nothing is known of what is "
            f"usual for a model of type {model_type!r}, found None"
        )
    if isinstance(targets, str):
        if config.layers_to_transform is not None:
            raise InvalidArgumentError(
                f"layers_to_transform: expected None, since the usual targets for a model of type {model_type!r} are a "
                f"regular expression, found {config.layers_to_transform}"
            )
        return targets
    return set(targets)


def _model_type(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    # Where this is not loaded, no model is of its class.
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    return model.get_output_embeddings()


def _is_excluded(path: str, config: AdaLoraConfig, saved: Sequence[str]) -> bool:
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        excluded = bool(exclude) and re.fullmatch(exclude, path) is not None
    else:
        excluded = bool(exclude) and _is_named(path, exclude)
    return excluded or any(re.match(rf"(?:.*\.)?{name}(?:$|\.)", path) for name in saved)


def _is_targeted(path: str, targets: Set[str] | str, config: AdaLoraConfig) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    # A whole path needs no number, as in PEFT.
    if path in targets:
        return True
    if not _is_named(path, targets):
        return False
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    number = _layer_number(path, config.layers_pattern or [])
    return number is not None and number in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_number(path: str, patterns: Collection[str] | str) -> int | None:
    """The number of the layer that a path belongs to: the first one, since experts and the like have theirs too."""
    prefixes = [rf"(?:.*?\.)??{p}" for p in ([patterns] if isinstance(patterns, str) else patterns)]
    for prefix in prefixes or [r".*?\.[^.]*"]:
        found = re.match(rf"{prefix}\.(?P<idx>\d+)\.", path)
        if found:
            return int(found["idx"]) if found["idx"] else None
    return None


def _is_named(path: str, names: Set[str]) -> bool:
    """Whether a name is the path or its end from a dot on."""
    return not names.isdisjoint(_ends(path))


def _ends(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.partition(".")[2]


def _is_linear(module: nn.Module) -> bool:
    base = _base(module)
    return isinstance(base, nn.Linear) or is_conv1d(base)


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, SVDLayer) else module


def _check_adaptable(path: str, module: nn.Module, model: nn.Module) -> None:
    kind = _kind(module)
    refusal = None if isinstance(module, SVDLayer) else kind.refusal(module)
    if refusal is not None:
        others = "" if isinstance(module, kind.base_types) else ", or a torch.nn.Conv2d, Conv1d or Embedding"
        raise InvalidArgumentError(
            f"target_modules: expected {refusal.expected}{others}, found {path}, which {refusal.found}"
        )
    model_type = _model_type(model)
    if model_type in _MAMBA and path.rpartition(".")[2] in _READ_BY_MAMBA:
        raise InvalidArgumentError(
            f"target_modules: expected modules whose forward is called, found {path}, whose weight the kernels of "
            f"{model_type} read"
        )


def _refuse_no_match(
    modules: dict[str, nn.Module], targets: Set[str] | str, config: AdaLoraConfig, excluded: int
) -> NoReturn:
    text = f"target_modules: expected what matches modules of the model, found {_few(targets)}"
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            text += f" with {name}={getattr(config, name)!r}"
    text += ", which matches none"
    if isinstance(targets, str) and targets.lower() != "all-linear":
        text += " (a string is a regular expression for whole paths; give names as a list)"
    if excluded:
        text += f" (excluded by exclude_modules, modules_to_save and the task type: {excluded} modules)"
    # The first module of each name.
    present: dict[str, str] = {}
    for path, module in modules.items():
        if _is_linear(module):
            present.setdefault(path.rpartition(".")[2], path)
    raise InvalidArgumentError(
        f"{text}; linear modules of the model: {_few(present.values())}" if present else f"{text}; no module is linear"
    )


def _few(names: Collection[str] | str) -> str:
    if isinstance(names, str):
        return repr(names)
    listed = sorted(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(map(repr, listed[:5])) + more


def _without_effect(
    model: nn.Module, config: AdaLoraConfig, modules: dict[str, nn.Module], matched: dict[str, nn.Module]
) -> Iterator[str]:
    """What to warn of."""
    if config.target_modules is not None and not isinstance(config.target_modules, str):
        unknown = set(config.target_modules).difference(end for path in modules for end in _ends(path))
        if unknown:
            yield f"target_modules: no module of the model has a name like {_few(unknown)}"
    if config.exclude_modules and not any(_is_excluded(path, config, ()) for path in modules):
        yield f"exclude_modules: no module of the model matches {_few(config.exclude_modules)}"
    linear = [path for path, module in matched.items() if isinstance(_base(module), nn.Linear)]
    if config.fan_in_fan_out and linear:
        yield f"fan_in_fan_out: found True, but {linear[0]} is a torch.nn.Linear, and adapted as one"

    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for path, module in matched.items():
        weight = getattr(_base(module), "weight", None)
        others = [each for each in owners.get(id(weight), ()) if each not in (path, f"{path}.base_layer")]
        if others:
            yield f"{path}: shares its weight with {others[0]}, where the adapter does not act, but merging it does"
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            yield f"{path}: torch.nn.MultiheadAttention reads its weight and never calls it: its adapter does nothing"
        if isinstance(parent, nn.TransformerEncoderLayer):
            yield (
                f"{path}: in evaluation without gradients torch.nn.TransformerEncoderLayer reads its weight and does "
                "not call it: merge the adapter there"
            )
