"""Adapters in PEFT's files, and training state beside them, so that a resumed run goes on bit for bit."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CorruptDataError, InvalidArgumentError, InvalidStateError
from .config import TASK_HEADS, AdaLoraConfig
from .layers import SVDLayer
from .matching import matching_modules, svd_layer
from .model import adapt, get_config, named_adapters, saved_modules

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "training_state.safetensors"

# PEFT's paths begin at its wrapper of the model.
_PREFIX = "base_model.model."
_DICTS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter, and what is trained beside it, as PEFT does: `PeftModel.from_pretrained` loads the folder.

    Tensors are saved as they are, masked triplets too, and `rank_pattern` is null: what is saved is what ran.

    Each file is replaced as a whole or not at all.

    Args:
        model: what `adapt` returned.
        folder: made if it is not there.
        adapter_name: which adapter.

    """
    config = get_config(model, adapter_name)
    layers = named_adapters(model, adapter_name)
    tensors = _adapter_tensors(layers, adapter_name) | _tensors_beside(model, config, layers)
    plain = {key: _plain(tensor, key) for key, tensor in tensors.items()}
    values = {**config.to_dict(), "rank_pattern": None}
    _write(
        folder,
        {
            CONFIG_FILE: json.dumps(values, indent=2, sort_keys=True).encode() + b"\n",
            ADAPTER_FILE: safetensors.torch.save(plain, {"format": "pt"}),
        },
    )


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> nn.Module:
    """Load an adapter that `save_adapter` or PEFT saved, and what was trained beside it.

    Where the model does not have the adapter, it is put on as `adapt` does. Otherwise values are copied into the
    parameters that are there, whatever their device and type of element, and the adapter's configuration stays.
    Triplets that PEFT left out, by the file's `rank_pattern`, are zero. To go on with a run, `load_training_state`
    comes next; without it a new `RankAllocator` begins with all triplets, unless `set_rank_pattern` says which to keep.

    Args:
        model: any module; it is changed in place.
        folder: where the files are.
        adapter_name: the adapter's name in the model; the files hold none.
        is_trainable: the new adapter is to be trained; False: it has `inference_mode`.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: the files are not of an adapter for this model. The model is unchanged.
        CorruptDataError: a file is damaged. The model is unchanged.
        InvalidStateError: the adapter is merged. The model is unchanged.

    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE, is_trainable)
    is_new = adapter_name not in getattr(model, "adalora_config", {})
    if is_new:
        with warnings.catch_warnings():
            # Once is enough: `adapt` looks again.
            warnings.simplefilter("ignore")
            matched = matching_modules(model, config)
        layers = {path: svd_layer(each) for path, each in matched.items()}
    else:
        layers = named_adapters(model, adapter_name)
        _check_present(layers, get_config(model, adapter_name), config, adapter_name, is_trainable)

    expected = {key: (tuple(t.shape), t.dtype) for key, t in _tensors_beside(model, config, layers).items()}
    r = config.init_r
    for path, layer in layers.items():
        for name, shape in ("A", (r, layer.in_features)), ("E", (r, 1)), ("B", (layer.out_features, r)):
            expected[f"{_PREFIX}{path}.lora_{name}"] = shape, torch.float32
    values, _ = _read(folder / ADAPTER_FILE)
    if config.bias == "all":
        _drop_doubles(values, saved_modules(model, config))
    _restore_masked(values, config, layers, folder)
    _check_tensors(values, expected, folder / ADAPTER_FILE)

    if is_new:
        adapt(model, config, adapter_name)
        layers = named_adapters(model, adapter_name)
    targets = _adapter_tensors(layers, adapter_name) | _tensors_beside(model, config, layers)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(values[key])
    return model


def _adapter_tensors(layers: Mapping[str, SVDLayer], adapter_name: str) -> dict[str, Tensor]:
    """An adapter's parameters by their names in the file."""
    return {
        f"{_PREFIX}{path}.lora_{name}": p
        for path, layer in layers.items()
        for name, p in zip("AEB", layer.triplets(adapter_name), strict=True)
    }


def _tensors_beside(model: nn.Module, config: AdaLoraConfig, layers: Collection[str]) -> dict[str, Tensor]:
    """What is trained beside the adapter, by its names in the file: the same before `adapt` and after."""
    # Paths before `adapt`, of layers that have any adapter: a layer may have another adapter than this one.
    wrapped = {f"{path}.base_layer": path for path in named_adapters(model, None)}
    tensors = {}
    for path, module in model.named_modules():
        bias, path = module._parameters.get("bias"), wrapped.get(path, path)
        if bias is not None and (config.bias == "all" or (config.bias == "lora_only" and path in layers)):
            name = f"{path}.base_layer.bias" if path in layers else f"{path}.bias"
            tensors[_PREFIX + name.removeprefix(".")] = bias
    for path, module in saved_modules(model, config).items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            owner, _, last = f"{path}.{name}".rpartition(".")
            layer, _, kind = owner.rpartition(".")
            if not (kind in ("lora_A", "lora_E", "lora_B") and f"{layer}.base_layer" in wrapped):
                tensors[f"{_PREFIX}{wrapped.get(owner, owner)}.{last}"] = tensor
    return tensors


def _read_config(path: Path, is_trainable: bool) -> AdaLoraConfig:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{path}: expected JSON, found what is not: {error}") from None
    if not isinstance(values, dict):
        raise CorruptDataError(f"{path}: expected a JSON object, found {type(values).__name__}")
    values["inference_mode"] = not is_trainable
    # PEFT lists every usual name of a head there, of which the model has some; they come with the task type.
    saved, heads = values.get("modules_to_save"), TASK_HEADS.get(str(values.get("task_type")), ())
    if isinstance(saved, list):
        values["modules_to_save"] = [name for name in saved if name not in heads] or None
    try:
        return AdaLoraConfig.from_dict(values)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from None


def _check_present(
    layers: Mapping[str, SVDLayer], present: AdaLoraConfig, config: AdaLoraConfig, adapter_name: str, trainable: bool
) -> None:
    """Check that what is in a folder suits the adapter that is there."""
    merged = [path for path, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise InvalidStateError(f"model: expected an adapter that is not merged, found {merged[0]} merged")
    if trainable and present.inference_mode:
        raise InvalidArgumentError("is_trainable: expected False, since the adapter has inference_mode, found True")
    # Shapes show most differences, but not a different scaling.
    for name in ("init_r", "lora_alpha"):
        ours, found = getattr(present, name), getattr(config, name)
        if ours != found:
            raise InvalidArgumentError(f"{name}: expected {ours}, as the adapter in the model has, found {found}")


def _drop_doubles(values: dict[str, Tensor], saved: Collection[str]) -> None:
    """Drop what PEFT saves twice with `bias="all"`: biases of modules that are saved whole."""
    doubles = tuple(f"{_PREFIX}{path}.{copy}." for path in saved for copy in ("original_module", "modules_to_save"))
    for key in [key for key in values if key.startswith(doubles)]:
        del values[key]


def _restore_masked(values: dict[str, Tensor], config: AdaLoraConfig, layers: Collection[str], folder: Path) -> None:
    """Put the triplets that PEFT saved back in their places: it cuts those off that `rank_pattern` masks."""
    for name, kept in (config.rank_pattern or {}).items():
        # PEFT's names end in the adapter's name, or not.
        path = name.rpartition(".lora_E")[0]
        where = f"{folder / CONFIG_FILE}: rank_pattern"
        if path not in layers:
            raise InvalidArgumentError(f"{where}: expected names of lora_E of adapted modules, found {name!r}")
        if len(kept) != config.init_r:
            raise InvalidArgumentError(f"{where}[{name!r}]: expected init_r, {config.init_r} values, found {len(kept)}")
        for factor, dim in ("A", 0), ("E", 0), ("B", 1):
            key = f"{_PREFIX}{path}.lora_{factor}"
            cut = values.get(key)
            if cut is None:
                continue
            if cut.dim() != 2 or cut.shape[dim] != sum(kept):
                raise InvalidArgumentError(
                    f"{folder / ADAPTER_FILE}: {key}: expected the {sum(kept)} triplets that rank_pattern keeps in "
                    f"dimension {dim}, found shape {tuple(cut.shape)}"
                )
            shape = list(cut.shape)
            shape[dim] = len(kept)
            values[key] = cut.new_zeros(shape).index_copy_(dim, torch.tensor(kept).nonzero().flatten(), cut)


def _check_tensors(
    values: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], path: Path
) -> None:
    missing, unexpected = expected.keys() - values.keys(), values.keys() - expected.keys()
    if missing or unexpected:
        raise InvalidArgumentError(
            f"{path}: expected the adapter's {len(expected)} tensors, found {len(values)}"
            + (f", without {_few(missing)}" if missing else "")
            + (f", unexpected {_few(unexpected)}" if unexpected else "")
        )
    for key, (shape, dtype) in expected.items():
        value = values[key]
        if value.shape != shape:
            raise InvalidArgumentError(f"{path}: {key}: expected shape {shape}, found {tuple(value.shape)}")
        if dtype.is_floating_point != value.is_floating_point() or (
            not dtype.is_floating_point and value.dtype != dtype
        ):
            wanted = "a floating-point type" if dtype.is_floating_point else dtype
            raise InvalidArgumentError(f"{path}: {key}: expected {wanted}, found {value.dtype}")


# Training state


def save_training_state(
    folder: str | os.PathLike[str],
    *,
    allocator: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    rng: bool = True,
    **more: Any,
) -> None:
    """Save what training needs to go on, beside the adapter: a file of tensors and JSON, without pickle.

    Give each checkpoint a folder of its own, so that adapter and state are of the same step, and save between steps of
    the optimiser: gradients and the place in the data are not in it.

    >>> save_adapter(model, folder)
    >>> save_training_state(folder, optimizer=optimizer, scheduler=scheduler)

    Args:
        folder: made if it is not there.
        allocator: a `RankAllocator`. `adalora.torch.AdamW` saves its own with itself.
        optimizer: any optimiser.
        scheduler: any scheduler.
        rng: save the states of PyTorch's, Python's and NumPy's global random generators too.
        more: other objects with `state_dict` and `load_state_dict`, by names of your own.

    Raises:
        InvalidArgumentError: a state dict holds what cannot be stored: the message says where. It may be nested
            dicts (with keys str and int), lists and tuples of tensors, numbers, str, bool, bytes and None.

    """
    objects = _stateful(allocator=allocator, optimizer=optimizer, scheduler=scheduler, **more)
    state = {name: each.state_dict() for name, each in objects.items()}
    if rng:
        state["rng"] = _rng_state()
    tensors: dict[str, Tensor] = {}
    structure = {name: _encode(value, name, tensors) for name, value in state.items()}
    # One entry alone: the order of several differs from run to run.
    metadata = {"training_state": json.dumps(structure, allow_nan=False)}
    _write(folder, {STATE_FILE: safetensors.torch.save(tensors, metadata)})


def load_training_state(
    folder: str | os.PathLike[str],
    *,
    allocator: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    rng: bool = True,
    **more: Any,
) -> None:
    """Load what `save_training_state` saved into objects made as they were for the saved run.

    The file is read and checked as a whole first; then each object is given its state, in the order of the arguments.

    >>> load_adapter(model, folder, is_trainable=True)
    >>> optimizer = AdamW([p for p in model.parameters() if p.requires_grad], RankAllocator(model))
    >>> load_training_state(folder, optimizer=optimizer)
    >>> for step in range(optimizer.global_step, total_step):
    ...     ...

    Args:
        folder: where the file is.
        allocator: as saved.
        optimizer: as saved.
        scheduler: as saved.
        rng: restore the random generators too; False leaves them as they are.
        more: as saved.

    Raises:
        InvalidArgumentError: the arguments are not those of saving; they are named. Nothing was changed.
        CorruptDataError: the file is damaged. Nothing was changed.

    """
    path = Path(folder) / STATE_FILE
    objects = _stateful(allocator=allocator, optimizer=optimizer, scheduler=scheduler, **more)
    tensors, metadata = _read(path)
    try:
        state = {name: _decode(value, tensors) for name, value in json.loads(metadata["training_state"]).items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptDataError(f"{path}: expected what save_training_state wrote, found {error!r}") from None
    generators = state.pop("rng", None)
    if state.keys() != objects.keys():
        raise InvalidArgumentError(
            f"{path}: expected arguments for what it holds, {_few(state) or 'nothing'}, found {_few(objects) or 'none'}"
        )
    if rng and generators is None:
        raise InvalidArgumentError(f"{path}: expected states of random generators (or rng=False), found none")
    devices = len(generators.get("cuda", ())) if rng else 0
    if devices and devices != torch.cuda.device_count():
        raise InvalidArgumentError(
            f"{path}: expected random generators of {torch.cuda.device_count()} CUDA devices, as there are here "
            f"(or rng=False), found {devices}"
        )
    for name, each in objects.items():
        each.load_state_dict(state[name])
    if rng:
        _set_rng_state(generators)


def _stateful(**objects: Any) -> dict[str, Any]:
    given = {name: each for name, each in objects.items() if each is not None}
    for name, each in given.items():
        if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
            raise InvalidArgumentError(
                f"{name}: expected an object with state_dict and load_state_dict, found {type(each).__name__}"
            )
    return given


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON: what JSON lacks becomes an object with one member, named by the type; tensors are put aside."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind in (list, tuple):
        items = [_encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if isinstance(value, Tensor):
        # Keys with dots may make two paths the same.
        key = path
        while key in tensors:
            key += "'"
        tensors[key] = _plain(value, path)
        return {"tensor": key}
    if kind in _DICTS.values():
        for key in value:
            if type(key) not in (int, str):
                raise InvalidArgumentError(f"{path}: expected keys of type str or int, found {key!r}")
        return {kind.__name__: [[key, _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    raise InvalidArgumentError(
        f"{path}: expected a tensor, int, float, str, bool, bytes, None, or a list, tuple or dict of them, "
        f"found {kind.__module__}.{kind.__qualname__}"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return _DICTS[kind]({key: _decode(item, tensors) for key, item in content})


# Files


def _plain(tensor: Any, name: str) -> Tensor:
    """A tensor's values in memory of their own, on the CPU, as safetensors wants them."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        kind = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else "other"
        raise InvalidArgumentError(f"{name}: expected a dense tensor, found {type(tensor).__name__} ({kind})")
    if not _is_storable(tensor.dtype):
        raise InvalidArgumentError(f"{name}: expected a type that safetensors can hold, found {tensor.dtype}")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@cache
def _is_storable(dtype: torch.dtype) -> bool:
    """Whether this version of safetensors saves and loads a type."""
    try:
        saved = safetensors.torch.save({"values": torch.empty(0, dtype=dtype)})
        return safetensors.torch.load(saved)["values"].dtype == dtype
    except (KeyError, ValueError, SafetensorError):
        return False


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, in memory of their own, and its metadata."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}
    except (KeyError, SafetensorError) as error:
        raise CorruptDataError(f"{path}: expected a whole safetensors file, found: {error}") from None


def _write(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write files so that each is there as a whole, or as it was: nothing is replaced before all are on the disk."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{uuid4().hex}" for name in files}
    try:
        for name, content in files.items():
            with open(temporary[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _few(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(map(repr, listed[:3])) + more
