"""Adapters in PEFT's files, and training state beside them, so that a resumed run goes on bit for bit."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checkpoint as files
from ..arrays import Triplets
from ..checkpoint import Checkpoint, SavedAdapter, TensorInfo
from ..errors import AdaLoRAError, CorruptDataError, InvalidArgumentError, InvalidStateError
from .compaction import compacted_pattern, cut, keep_pattern, resize
from .config import TASK_HEADS, AdaLoraConfig
from .convolution import SVDConv1d, SVDConv2d
from .distributed import (
    copy_whole,
    fsdp_modules,
    gather_objects,
    in_first_process,
    is_dtensor,
    reshard,
    spread_state,
    whole,
)
from .embedding import SVDEmbedding
from .layers import SVDLayer, uncompiled
from .matching import matching_modules, svd_layer
from .model import adapt, get_config, named_adapters, saved_modules

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "training_state.safetensors"

# PEFT's paths begin at its wrapper of the model.
_PREFIX = "base_model.model."
_DICTS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
# What a run does not go on without.
_TRAINING = {"allocator", "optimizer", "scheduler"}
# What reading values of unexpected kinds ends in.
_RUBBISH = (AttributeError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    rank_pattern: Mapping[str, Sequence[bool]] | None = None,
) -> None:
    """Save an adapter, and what is trained beside it, as PEFT does: `PeftModel.from_pretrained` loads the folder.

    Tensors are saved as they are, masked triplets too, and `rank_pattern` is null: what is saved is what ran, and a run
    may go on from it. Once the ranks are fixed, `rank_pattern` makes the files smaller. An adapter that
    `RankAllocator.compact` made smaller has its own pattern, and a run goes on from it, too.

    Files are replaced together or not at all. Of a model that `fully_shard` has sharded, all processes make the call,
    and the first one writes.

    Args:
        model: what `adapt` returned.
        folder: made if it is not there.
        adapter_name: which adapter.
        rank_pattern: save these triplets alone, for inference: what `RankAllocator.rank_pattern` returns. E of all
            others has to be 0.

    """
    config = get_config(model, adapter_name)
    layers = named_adapters(model, adapter_name)
    reshard(model)
    own = compacted_pattern(config, layers)
    if own is not None and rank_pattern is not None and own != {p: list(kept) for p, kept in rank_pattern.items()}:
        raise InvalidArgumentError("rank_pattern: expected that of the compacted adapter, or None, found another")
    _save(
        files.save,
        folder,
        bool(fsdp_modules(model)),
        config=config.to_dict(),
        adapters=_saved_adapters(layers, adapter_name, rank_pattern if own is None else own),
        tensors={key: _plain(tensor, key) for key, tensor in _tensors_beside(model, config, layers).items()},
    )


def export_lora(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter as plain LoRA, for programs that know no AdaLoRA; E and the scaling go into B.

    The outputs are the same, to the rounding of B's elements. All layers get one rank, the largest number of triplets
    that is left in any of them, filled up with zeros, so that the files need no pattern of ranks. Processes as in
    `save_adapter`.

    Args:
        model: what `adapt` returned.
        folder: made if it is not there.
        adapter_name: which adapter.

    Raises:
        InvalidArgumentError: a convolution has groups, a dilation or a padding mode that LoRA leaves out; merge it.

    """
    config = get_config(model, adapter_name)
    layers = named_adapters(model, adapter_name)
    reshard(model)
    adapters = _saved_adapters(layers, adapter_name, compacted_pattern(config, layers))
    _save(
        files.export_lora,
        folder,
        bool(fsdp_modules(model)),
        config=config.to_dict(),
        adapters={path: adapter._replace(**_in_lora(layers[path], path)) for path, adapter in adapters.items()},
        tensors={key: _plain(tensor, key) for key, tensor in _tensors_beside(model, config, layers).items()},
    )


def _in_lora(layer: SVDLayer, path: str) -> dict[str, Any]:
    """What plain LoRA has to know of a layer."""
    if isinstance(layer, SVDEmbedding):
        return {"embedding": True}
    if not isinstance(layer, SVDConv1d | SVDConv2d):
        return {}
    base = layer.base_layer
    for name, plain in (("groups", 1), ("dilation", (1,) * len(base.kernel_size)), ("padding_mode", "zeros")):
        found = getattr(base, name)
        if found != plain:
            raise InvalidArgumentError(
                f"{path}: expected a convolution with {name}={plain!r}, since LoRA's has no other, found {found!r}"
            )
    return {"kernel": base.kernel_size}


def _saved_adapters(
    layers: Mapping[str, SVDLayer], adapter_name: str, rank_pattern: Mapping[str, Sequence[bool]] | None
) -> dict[str, SavedAdapter]:
    if rank_pattern is not None and rank_pattern.keys() != layers.keys():
        raise InvalidArgumentError(
            f"rank_pattern: expected the adapted layers, {_few(layers)}, found {_few(rank_pattern) or 'none'}"
        )
    return {
        path: SavedAdapter(
            Triplets(
                *(
                    _plain(p, f"{_PREFIX}{path}.lora_{name}")
                    for name, p in zip("AEB", layer.triplets(adapter_name), strict=True)
                )
            ),
            layer.ranknum[adapter_name],
            None if rank_pattern is None else rank_pattern[path],
        )
        for path, layer in layers.items()
    }


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

    Triplets that the file's `rank_pattern` leaves out are not there in a new adapter without `is_trainable`, as if
    `RankAllocator.compact` had taken them out; a compacted adapter that is there takes files with its own pattern
    alone. Otherwise they are zero. To go on with a run, `load_training_state` comes next, which takes them out where
    the run was compacted; without it a new `RankAllocator` begins with all triplets, unless `set_rank_pattern` says
    which to keep.

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
    with Checkpoint(folder) as checkpoint:
        config = _read_config(checkpoint, Path(folder) / CONFIG_FILE, is_trainable)
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
        kept = _kept(checkpoint)
        if is_new:
            compacted = kept is not None and not is_trainable
        else:
            compacted = _check_compacted(get_config(model, adapter_name), layers, kept, Path(folder) / CONFIG_FILE)
        for path, layer in layers.items():
            r = sum(kept[path]) if compacted and path in kept else config.init_r
            shapes = _shapes(r, layer.in_features, layer.out_features)
            expected |= {f"{_PREFIX}{path}.lora_{name}": (shape, torch.float32) for name, shape in shapes.items()}
        found = _found(checkpoint, compacted)
        if config.bias == "all":
            _drop_doubles(found, saved_modules(model, config))
        _check_tensors(found, expected, Path(folder) / ADAPTER_FILE)
        values = _values(checkpoint, found)

    reshard(model)
    if is_new:
        adapt(model, config, adapter_name)
        layers = named_adapters(model, adapter_name)
        if compacted:
            _take_out(layers, adapter_name, kept)
            keep_pattern(get_config(model, adapter_name), kept)
    targets = _adapter_tensors(layers, adapter_name) | _tensors_beside(model, config, layers)
    with torch.no_grad():
        for key, target in targets.items():
            copy_whole(values[key], target)
    return model


def _shapes(r: int, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
    return {"A": (r, in_features), "E": (r, 1), "B": (out_features, r)}


def _kept(checkpoint: Checkpoint) -> dict[str, list[bool]] | None:
    """For each layer, which triplets the file has; None where it has no pattern."""
    infos = checkpoint.adapters
    if all(info.pattern is None for info in infos.values()):
        return None
    return {path: list(info.pattern or [True] * info.rank) for path, info in infos.items()}


def _check_compacted(
    present: AdaLoraConfig, layers: Collection[str], found: dict[str, list[bool]] | None, path: Path
) -> bool:
    """Whether the adapter that is there is compacted; then a file has to have the same triplets."""
    expected = compacted_pattern(present, layers)
    if expected is not None and found != expected:
        raise InvalidArgumentError(
            f"{path}: rank_pattern: expected the triplets that the compacted adapter in the model has, found "
            f"{'null' if found is None else 'others'}"
        )
    return expected is not None


def _take_out(layers: Mapping[str, SVDLayer], adapter_name: str, kept: Mapping[str, list[bool]]) -> None:
    """Leave an adapter as many triplets as a file has, whatever their values."""
    for path, layer in layers.items():
        for matrix, p in zip("AEB", layer.triplets(adapter_name), strict=True):
            resize(p, cut(p.detach(), matrix, kept[path]))


def _found(checkpoint: Checkpoint, compacted: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of all tensors, as they are in the file, or once masked triplets are back in their places."""
    found = {key: (info.shape, _dtype(info)) for key, info in checkpoint.tensors.items()}
    for path, info in checkpoint.adapters.items():
        shapes = _shapes(info.kept if compacted else info.rank, info.in_features, info.out_features)
        for (name, shape), dtype in zip(shapes.items(), info.dtypes, strict=True):
            found[f"{_PREFIX}{path}.lora_{name}"] = shape, getattr(torch, dtype)
    return found


def _values(checkpoint: Checkpoint, wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    values = {key: _empty(key, shape, dtype) for key, (shape, dtype) in wanted.items()}
    for path in checkpoint.adapters:
        checkpoint.read_adapter(path, Triplets(*(values[f"{_PREFIX}{path}.lora_{name}"] for name in "AEB")))
    for key in checkpoint.tensors.keys() & values.keys():
        checkpoint.read_tensor(key, values[key])
    return values


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
    for path, module in uncompiled(model).named_modules():
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


def _read_config(checkpoint: Checkpoint, path: Path, is_trainable: bool) -> AdaLoraConfig:
    values = checkpoint.config
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
    if present.init_r != config.init_r:
        raise InvalidArgumentError(
            f"init_r: expected {present.init_r}, as the adapter in the model has, found {config.init_r}"
        )
    # 0 stands for the rank, and is written as it.
    ours, found = (each.lora_alpha or each.init_r for each in (present, config))
    if ours != found:
        raise InvalidArgumentError(f"lora_alpha: expected {ours}, as the adapter in the model has, found {found}")


def _drop_doubles(values: dict[str, Any], saved: Collection[str]) -> None:
    """Drop what PEFT saves twice with `bias="all"`: biases of modules that are saved whole."""
    doubles = tuple(f"{_PREFIX}{path}.{copy}." for path in saved for copy in ("original_module", "modules_to_save"))
    for key in [key for key in values if key.startswith(doubles)]:
        del values[key]


def _check_tensors(
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    path: Path,
) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        raise InvalidArgumentError(
            f"{path}: expected the adapter's {len(expected)} tensors, found {len(found)}"
            + (f", without {_few(missing)}" if missing else "")
            + (f", unexpected {_few(unexpected)}" if unexpected else "")
        )
    for key, (shape, dtype) in expected.items():
        its_shape, its_dtype = found[key]
        if its_shape != shape:
            raise InvalidArgumentError(f"{path}: {key}: expected shape {shape}, found {its_shape}")
        if dtype.is_floating_point != its_dtype.is_floating_point or (
            not dtype.is_floating_point and its_dtype != dtype
        ):
            wanted = "a floating-point type" if dtype.is_floating_point else dtype
            raise InvalidArgumentError(f"{path}: {key}: expected {wanted}, found {its_dtype}")


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
    the optimiser: gradients and the place in the data are not in it. Where states are sharded (`fully_shard`), all
    processes make the call, and the first one writes: states as a whole, which any number of processes may load, and
    the random generators of each.

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
    sharded = _has_dtensor(state)
    if rng:
        state["rng"] = gather_objects(_rng_state()) if sharded else _rng_state()
    tensors: dict[str, Tensor] = {}
    structure = {name: _encode(value, name, tensors) for name, value in state.items()}
    _save(files.save, folder, sharded, state=json.dumps(structure, allow_nan=False), state_tensors=tensors)


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
    What an object makes of a state that is not its own, only it can say: those before it have theirs by then.

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
        more: as saved; None leaves one out, such as `report=None`.

    Raises:
        InvalidArgumentError: the arguments are not those of saving; they are named. Nothing was changed, unless it is
            an object that refused its state.
        CorruptDataError: the file is damaged. Nothing was changed.

    """
    path = Path(folder) / STATE_FILE
    objects = _stateful(allocator=allocator, optimizer=optimizer, scheduler=scheduler, **more)
    with Checkpoint(folder, adapter=False, state=True) as checkpoint:
        text, infos = checkpoint.state, checkpoint.state_tensors
        tensors = {key: _empty(key, info.shape, _dtype(info)) for key, info in infos.items()}
        for key, tensor in tensors.items():
            checkpoint.read_state_tensor(key, tensor)
    try:
        state = {name: _decode(value, tensors) for name, value in json.loads(text).items()}
    except _RUBBISH as error:
        raise CorruptDataError(f"{path}: expected what save_training_state wrote, found {error!r}") from None
    generators = state.pop("rng", None)
    left_out = [name for name, each in more.items() if each is None]
    if state.keys() - left_out != objects.keys():
        missing = state.keys() - objects.keys() - _TRAINING - set(left_out)
        hint = f" ({min(missing)}=None leaves it out)" if missing else ""
        raise InvalidArgumentError(
            f"{path}: expected arguments for what it holds, {_few(state) or 'nothing'}, found "
            f"{_few(objects) or 'none'}{hint}"
        )
    if rng and generators is None:
        raise InvalidArgumentError(f"{path}: expected states of random generators (or rng=False), found none")
    if rng and isinstance(generators, list):
        size = dist.get_world_size() if dist.is_initialized() else 1
        if len(generators) != size:
            raise InvalidArgumentError(
                f"{path}: expected random generators of {size} processes (or rng=False), found {len(generators)}"
            )
        generators = generators[dist.get_rank() if dist.is_initialized() else 0]
    if rng:
        _check_rng_state(generators, path)
    devices = len(generators.get("cuda", ())) if rng else 0
    if devices and devices != torch.cuda.device_count():
        raise InvalidArgumentError(
            f"{path}: expected random generators of {torch.cuda.device_count()} CUDA devices, as there are here "
            f"(or rng=False), found {devices}"
        )
    for name, each in objects.items():
        try:
            each.load_state_dict(
                spread_state(each, state[name]) if isinstance(each, torch.optim.Optimizer) else state[name]
            )
        except AdaLoRAError as error:
            error.args = (f"{path}: {name}: {error}",)
            raise
        except _RUBBISH as error:
            raise InvalidArgumentError(
                f"{path}: {name}: expected a state that this {type(each).__name__} takes, found one with {error!r}"
            ) from error
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


def _save(write: Callable[..., None], folder: str | os.PathLike[str], sharded: bool, **content: Any) -> None:
    """Write files; where all processes have made the call, in the first one."""
    work = partial(write, folder, **content)
    in_first_process(work) if sharded else work()


def _has_dtensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_dtensor, value.values()))
    return any(map(_has_dtensor, value)) if isinstance(value, (list, tuple)) else is_dtensor(value)


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _check_rng_state(state: Any, path: Path) -> None:
    """Check what `_set_rng_state` will be given, on generators of one's own."""
    try:
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        for each in state.get("cuda", ()):
            if each.dtype != torch.uint8:
                raise TypeError(f"cuda: expected bytes, found {each.dtype}")
    except _RUBBISH as error:
        raise CorruptDataError(f"{path}: rng: expected states of random generators, found {error!r}") from None


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
    tensor = whole(tensor)
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        kind = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else "other"
        raise InvalidArgumentError(f"{name}: expected a dense tensor, found {type(tensor).__name__} ({kind})")
    if str(tensor.dtype).removeprefix("torch.") not in files.DTYPES.values():
        raise InvalidArgumentError(f"{name}: expected a type that safetensors can hold, found {tensor.dtype}")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _dtype(info: TensorInfo) -> torch.dtype:
    try:
        return getattr(torch, info.dtype)
    except AttributeError:
        raise InvalidArgumentError(f"{info.name}: expected a type that PyTorch has, found {info.dtype}") from None


def _empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        # The shape was checked.
        raise files.no_memory(name, shape) from None


def _few(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(map(repr, listed[:3])) + more
