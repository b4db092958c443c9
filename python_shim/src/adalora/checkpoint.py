"""Checkpoints: adapters in PEFT's files, and training state beside them, over NumPy arrays.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads and writes, and
`training_state.safetensors`. All arrays are in host memory. Files that are read are not trusted.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from . import _bindings as c
from ._handle import Handle, NativeObject
from ._library import Library, load
from .arrays import BFLOAT16, HOST, NAMES, Array, Lease, Triplets, as_matrix, view
from .errors import InvalidArgumentError, OutOfMemoryError

__all__ = ["AdapterInfo", "Checkpoint", "SavedAdapter", "TensorInfo", "export_lora", "save"]

# The types of tensors in files, by the names that PyTorch, NumPy and ml_dtypes give them.
_CODES = {
    **{name: code for code, name in NAMES.items()},
    "bool": c.ADALORA_BOOL,
    "uint8": c.ADALORA_UINT8,
    "int8": c.ADALORA_INT8,
    "uint16": c.ADALORA_UINT16,
    "int16": c.ADALORA_INT16,
    "uint32": c.ADALORA_UINT32,
    "int32": c.ADALORA_INT32,
    "uint64": c.ADALORA_UINT64,
    "int64": c.ADALORA_INT64,
    "complex64": c.ADALORA_COMPLEX64,
    "float8_e4m3fn": c.ADALORA_FLOAT8_E4M3FN,
    "float8_e5m2": c.ADALORA_FLOAT8_E5M2,
    "float8_e8m0fnu": c.ADALORA_FLOAT8_E8M0FNU,
    "float8_e4m3fnuz": c.ADALORA_FLOAT8_E4M3FNUZ,
    "float8_e5m2fnuz": c.ADALORA_FLOAT8_E5M2FNUZ,
}
DTYPES: Mapping[int, str] = MappingProxyType({code: name for name, code in _CODES.items()})
"""Names of the types that a tensor in a file may have, by their codes in the C interface."""


class SavedAdapter(NamedTuple):
    """An adapter to be saved."""

    params: Triplets
    """All `rank` triplets, or those alone that `pattern` keeps."""
    rank: int
    """Triplets at creation, PEFT's `init_r`; the same for all adapters of a checkpoint."""
    pattern: Sequence[bool] | None = None
    """Which of them are kept, the others' E being 0; None: all are saved, masked ones too."""
    scaling: float = 0.0
    """For `export_lora`: multiplier of the adapter's output; 0: what `lora_alpha` says."""
    kernel: Sequence[int] = ()
    """For `export_lora`: extents of a convolution's kernel."""
    embedding: bool = False
    """For `export_lora`: whether the module is an embedding, whose matrices have other names there."""


class AdapterInfo(NamedTuple):
    """An adapter in a checkpoint."""

    name: str
    """Path of its module in the model."""
    rank: int
    """Triplets at creation, PEFT's `init_r`: what the scaling is divided by."""
    kept: int
    """Triplets in the file."""
    in_features: int
    out_features: int
    pattern: tuple[bool, ...] | None
    """Which triplets the file holds; None: all."""
    dtypes: Triplets
    """Names of the element types of A, E and B."""


class TensorInfo(NamedTuple):
    """A tensor in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name of the element type, such as "float32"."""
    nbytes: int


def save(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    adapters: Mapping[str, SavedAdapter] = MappingProxyType({}),
    tensors: Mapping[str, Array] = MappingProxyType({}),
    state: str | None = None,
    state_tensors: Mapping[str, Array] = MappingProxyType({}),
    library: Library | str | os.PathLike[str] | None = None,
) -> None:
    """Write a checkpoint: the adapter's files, the training state, or both; every file of it, or none.

    Args:
        folder: made if it is not there.
        config: what `adapter_config.json` is to say, by PEFT's names. `peft_type`, `init_r`, `rank_pattern` and, if it
            is not given, `target_modules` come from the adapters; a `lora_alpha` of 0 is written as `init_r`. None:
            the adapter's files stay as they are.
        adapters: by their modules' paths in the model.
        tensors: what was trained beside them, by names that begin with "base_model.model.".
        state: a text of your own for the training state; None: its file stays as it is.
        state_tensors: arrays of the training state, such as `Training.named_arrays()` and `Allocator.save_state()`.
        library: see `Context`.

    Raises:
        InvalidArgumentError: what does not fit is named. Files are as they were, as for the other errors.
        FileError: the operating system refused to write.

    """
    contents = _Contents(folder, config, adapters, tensors, state, state_tensors)
    _library(library).adalora_checkpoint_write(ctypes.byref(contents.desc))


def export_lora(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    adapters: Mapping[str, SavedAdapter],
    tensors: Mapping[str, Array] = MappingProxyType({}),
    library: Library | str | os.PathLike[str] | None = None,
) -> None:
    """Write adapters as plain LoRA, for programs that know no AdaLoRA: E and the scaling go into B.

    All get one rank, the largest number of triplets whose E is not 0, filled up with zeros; the multiplier is 1. Each
    element of B is rounded once, half precision becomes float32.

    Args:
        folder: made if it is not there.
        config: AdaLoRA's, as for `save`; its fields that LoRA does not have are left out.
        adapters: by their modules' paths in the model.
        tensors: what was trained beside them.
        library: see `Context`.

    """
    contents = _Contents(folder, config, adapters, tensors, None, {})
    _library(library).adalora_checkpoint_export_lora(ctypes.byref(contents.desc))


class Checkpoint(NativeObject):
    """A checkpoint that is read: its files were checked when it was opened, its arrays are read when asked for.

    >>> with adalora.checkpoint.Checkpoint(folder) as checkpoint:
    ...     params = {name: checkpoint.read_adapter(name) for name in checkpoint.adapters}

    Args:
        folder: where the files are.
        adapter: open the adapter's files, which this library or PEFT wrote.
        state: open the training state.
        library: see `Context`.

    Raises:
        NotFoundError: a file is not there.
        CorruptDataError: a file is damaged.
        InvalidArgumentError: the files do not fit together, or are not of AdaLoRA, as those of `export_lora`.

    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        adapter: bool = True,
        state: bool = False,
        library: Library | str | os.PathLike[str] | None = None,
    ) -> None:
        self.library = _library(library)
        files = adapter * c.ADALORA_FILES_ADAPTER | state * c.ADALORA_FILES_STATE
        pointer = ctypes.POINTER(c.adalora_checkpoint_t)()
        self.library.adalora_checkpoint_open(_path(folder), files, ctypes.byref(pointer))
        self._handle = Handle(self.library, pointer, self.library.adalora_checkpoint_destroy, ())
        self._adapters = {info.name: (i, info) for i, info in enumerate(self._list_adapters())} if adapter else {}
        self._tensors = {
            files: {info.name: (i, info) for i, info in enumerate(self._list_tensors(files))}
            for files, opened in ((c.ADALORA_FILES_ADAPTER, adapter), (c.ADALORA_FILES_STATE, state))
            if opened
        }

    @property
    def config(self) -> dict[str, Any]:
        """What `adapter_config.json` says."""
        return json.loads(self._text(c.ADALORA_FILES_ADAPTER))

    @property
    def state(self) -> str:
        """The text of the training state."""
        return self._text(c.ADALORA_FILES_STATE)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters, by their modules' paths."""
        return {name: info for name, (_, info) in self._adapters.items()}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What was saved beside the adapters, by name."""
        return {name: info for name, (_, info) in self._tensors.get(c.ADALORA_FILES_ADAPTER, {}).items()}

    @property
    def state_tensors(self) -> dict[str, TensorInfo]:
        """The arrays of the training state, by name."""
        return {name: info for name, (_, info) in self._tensors.get(c.ADALORA_FILES_STATE, {}).items()}

    def read_adapter(self, name: str, params: Triplets | None = None, *, compact: bool = False) -> Triplets:
        """Read an adapter's triplets.

        Args:
            name: path of its module.
            params: arrays to read into, of any of the four types that are computed with: the values are converted.
                Their number of triplets decides, as `compact` does for new ones. None: new arrays of the file's types.
            compact: the triplets of the file alone, [kept, in], [kept, 1] and [out, kept]; otherwise all come to their
                places among `rank`, and zeros where the file holds none.

        """
        index, info = _item(self._adapters, name)
        if params is None:
            r = info.kept if compact else info.rank
            shapes = (r, info.in_features), (r, 1), (info.out_features, r)
            try:
                params = Triplets(
                    *(HOST.zeros(s, _CODES[d], "params") for s, d in zip(shapes, info.dtypes, strict=True))
                )
            except MemoryError:
                raise no_memory(name, *shapes) from None
        lease = HOST.lease()
        triplets = _triplets(params, "params", lease, writable=True)
        self.library.adalora_checkpoint_read_adapter(self.handle.pointer, index, ctypes.byref(triplets))
        return params

    def read_tensor(self, name: str, out: Array | None = None) -> Array:
        """Read what was saved beside the adapters, into a new array or into `out`, which has its shape and type."""
        return self._read(c.ADALORA_FILES_ADAPTER, name, out)

    def read_state_tensor(self, name: str, out: Array | None = None) -> Array:
        """Read an array of the training state."""
        return self._read(c.ADALORA_FILES_STATE, name, out)

    def _text(self, files: int) -> str:
        size = ctypes.c_size_t()
        self.library.adalora_checkpoint_text(self.handle.pointer, files, None, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.library.adalora_checkpoint_text(self.handle.pointer, files, text, ctypes.byref(size))
        return text.value.decode()

    def _sizes(self, files: int) -> tuple[int, int]:
        adapters, tensors = ctypes.c_int64(), ctypes.c_int64()
        self.library.adalora_checkpoint_sizes(self.handle.pointer, files, ctypes.byref(adapters), ctypes.byref(tensors))
        return adapters.value, tensors.value

    def _list_adapters(self) -> list[AdapterInfo]:
        found = []
        for i in range(self._sizes(c.ADALORA_FILES_ADAPTER)[0]):
            info = c.adalora_adapter_info_t(ctypes.sizeof(c.adalora_adapter_info_t))
            self.library.adalora_checkpoint_adapter(self.handle.pointer, i, ctypes.byref(info))
            kept = ctypes.string_at(info.pattern, info.rank) if info.pattern else None
            pattern = None if kept is None else tuple(map(bool, kept))
            dtypes = Triplets(*(DTYPES[code] for code in (info.a_dtype, info.e_dtype, info.b_dtype)))
            name, sizes = info.name.decode(), (info.rank, info.kept, info.in_features, info.out_features)
            found.append(AdapterInfo(name, *sizes, pattern, dtypes))
        return found

    def _list_tensors(self, files: int) -> list[TensorInfo]:
        found = []
        for i in range(self._sizes(files)[1]):
            info = c.adalora_tensor_t(ctypes.sizeof(c.adalora_tensor_t))
            self.library.adalora_checkpoint_tensor(self.handle.pointer, files, i, ctypes.byref(info))
            shape = (ctypes.c_int64 * info.n_dims).from_address(info.shape) if info.n_dims else ()
            found.append(TensorInfo(info.name.decode(), tuple(shape), DTYPES[info.dtype], info.bytes))
        return found

    def _read(self, files: int, name: str, out: Array | None) -> Array:
        index, info = _item(self._tensors.get(files, {}), name)
        if out is None:
            out = _new(info)
        lease = HOST.lease()
        address, dtype = _elements(out, "out", lease, info.shape, writable=True)
        if DTYPES[dtype] != info.dtype:
            raise InvalidArgumentError(f"out: expected an array of {info.dtype}, found {DTYPES[dtype]}")
        self.library.adalora_checkpoint_read_tensor(self.handle.pointer, files, index, address, info.nbytes)
        return out


class _Contents:
    """The C descriptor of a checkpoint to write, and what it points to."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None,
        adapters: Mapping[str, SavedAdapter],
        tensors: Mapping[str, Array],
        state: str | None,
        state_tensors: Mapping[str, Array],
    ) -> None:
        self._lease = HOST.lease()
        self._kept: list[Any] = [adapters, tensors, state_tensors, self._lease]
        self.desc = c.adalora_checkpoint_desc_t(ctypes.sizeof(c.adalora_checkpoint_desc_t), _path(folder))
        if config is not None:
            try:
                text = json.dumps(config, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise InvalidArgumentError(f"config: expected what JSON can hold, found: {error}") from None
            self.desc.config = _bytes(text, "config")
        entries = [self._entry(*item) for item in adapters.items()]
        self.desc.adapters, self.desc.adapter_stride, self.desc.n_adapters = self._array(
            c.adalora_adapter_entry_t, entries
        )
        beside = [self._tensor(*item) for item in tensors.items()]
        self.desc.tensors, self.desc.tensor_stride, self.desc.n_tensors = self._array(c.adalora_tensor_t, beside)
        if state is not None:
            self.desc.state = _bytes(state, "state")
        of_state = [self._tensor(*item) for item in state_tensors.items()]
        self.desc.state_tensors, self.desc.state_tensor_stride, self.desc.n_state_tensors = self._array(
            c.adalora_tensor_t, of_state
        )

    def _array(self, kind: Any, items: list[Any]) -> tuple[Any, int, int]:
        array = (kind * len(items))(*items)
        self._kept += [array, items]
        return ctypes.cast(array, ctypes.POINTER(kind)), ctypes.sizeof(kind), len(items)

    def _entry(self, name: str, adapter: SavedAdapter) -> c.adalora_adapter_entry_t:
        entry = c.adalora_adapter_entry_t(ctypes.sizeof(c.adalora_adapter_entry_t), _bytes(name, "adapters"))
        entry.params = _triplets(adapter.params, f"adapters[{name!r}].params", self._lease)
        entry.rank, entry.scaling, entry.embedding = adapter.rank, adapter.scaling, adapter.embedding
        if adapter.pattern is not None:
            pattern = np.ascontiguousarray(adapter.pattern, np.uint8)
            if pattern.shape != (adapter.rank,):
                raise InvalidArgumentError(
                    f"adapters[{name!r}].pattern: expected rank, {adapter.rank} values, found shape {pattern.shape}"
                )
            entry.pattern = self._address(pattern)
        entry.kernel, entry.n_kernel = self._address(np.array(adapter.kernel, np.int64)), len(adapter.kernel)
        return entry

    def _tensor(self, name: str, array: Array) -> c.adalora_tensor_t:
        tensor = c.adalora_tensor_t(ctypes.sizeof(c.adalora_tensor_t), _bytes(name, "tensors"))
        shape = view(array, name, self._lease).shape
        tensor.data, tensor.dtype = _elements(array, name, self._lease, shape)
        tensor.shape, tensor.n_dims = self._address(np.array(shape, np.int64)), len(shape)
        return tensor

    def _address(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data


def _library(library: Library | str | os.PathLike[str] | None) -> Library:
    return library if isinstance(library, Library) else load(library)


def _path(folder: str | os.PathLike[str]) -> bytes:
    """A path for C, where a zero character would end it."""
    encoded = os.fsencode(folder)
    if b"\0" in encoded:
        raise InvalidArgumentError(f"folder: expected a path without a zero character, found {folder!r}")
    return encoded


def _bytes(text: str, name: str) -> bytes:
    """A text for C."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{name}: expected text that UTF-8 can hold, found {text!r} ({error})") from None
    if b"\0" in encoded:
        raise InvalidArgumentError(f"{name}: expected text without a zero character, found {text!r}")
    return encoded


def _elements(
    array: Array, name: str, lease: Lease, shape: tuple[int, ...], *, writable: bool = False
) -> tuple[int, int]:
    """Address and type of an array of any of the types that files hold."""
    v = view(array, name, lease)
    if v.kind not in _CODES:
        raise InvalidArgumentError(f"{name}: expected one of {', '.join(_CODES)}, found {v.kind}")
    if v.shape != shape:
        raise InvalidArgumentError(f"{name}: expected shape {shape}, found {v.shape}")
    if not v.gapless:
        raise InvalidArgumentError(f"{name}: expected a row-major array without gaps, found strides {v.strides}")
    if writable and not v.writable:
        raise InvalidArgumentError(f"{name}: expected an array that may be written to, found {v.read_only}")
    return v.address, _CODES[v.kind]


def _triplets(params: Triplets, name: str, lease: Lease, *, writable: bool = False) -> c.adalora_triplets_t:
    matrices = []
    for matrix, array in zip("AEB", params, strict=True):
        of = f"{name}.{matrix}"
        shape = view(array, of, lease).shape
        if len(shape) != 2 and not (matrix == "E" and len(shape) == 1):
            raise InvalidArgumentError(f"{of}: expected two dimensions, found shape {shape}")
        matrices.append(as_matrix(array, of, shape=shape, dtypes=tuple(NAMES), writable=writable, lease=lease))
    return c.adalora_triplets_t(*matrices)


def _new(info: TensorInfo) -> Array:
    try:
        if _CODES[info.dtype] == BFLOAT16:
            return HOST.zeros(info.shape, BFLOAT16, "out")
        return np.empty(info.shape, info.dtype)
    except MemoryError:
        raise no_memory(info.name, info.shape) from None
    except TypeError:
        raise InvalidArgumentError(
            f"out: expected an array for {info.name} of {info.dtype}, a type that NumPy lacks, found none"
        ) from None


def no_memory(name: str, *shapes: tuple[int, ...]) -> OutOfMemoryError:
    """What a file holds, and this machine cannot."""
    return OutOfMemoryError(f"{name}: expected memory for shape {', '.join(map(str, shapes))}, found none")


def _item(items: Mapping[str, Any], name: str) -> Any:
    try:
        return items[name]
    except KeyError:
        raise InvalidArgumentError(f"name: expected one of {', '.join(items) or 'nothing'}, found {name!r}") from None
