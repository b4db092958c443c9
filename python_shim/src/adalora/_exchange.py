"""Where arrays lie, whatever framework they come from: DLPack and `__cuda_array_interface__`, without copying."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np

from . import _bindings as c
from ._cuda import Runtime
from .errors import InvalidArgumentError

CODES: dict[str, int] = {
    "float32": c.ADALORA_FLOAT32,
    "float64": c.ADALORA_FLOAT64,
    "bfloat16": c.ADALORA_BFLOAT16,
    "float16": c.ADALORA_FLOAT16,
}


class View(NamedTuple):
    """Where an array lies and what it holds, whatever framework it comes from."""

    address: int
    shape: tuple[int, ...]
    # From one element to the next along each dimension, in bytes.
    strides: tuple[int, ...]
    itemsize: int
    # One of the codes of the C interface, or None for a type that it does not compute with.
    dtype: int | None
    writable: bool
    # What to call the element type in a message.
    kind: str
    # Number of the CUDA device; None: host memory.
    device: int | None = None
    # What to call an array that may not be written to.
    read_only: str = "a read-only one"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def gapless(self) -> bool:
        """Whether the elements follow one another in row-major order."""
        expected = self.itemsize
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return self.size == 0
            expected *= extent
        return True


class Lease:
    """The arrays of one call or object: on which device they have to be, and in which stream they are used.

    It keeps what was handed over with them, such as DLPack's capsules, until nobody holds it any more.

    Args:
        device: number of the CUDA device; None: host memory.
        stream: CUDA stream.
        runtime: of the device.

    """

    __slots__ = ("device", "kept", "runtime", "stream")

    def __init__(self, device: int | None = None, stream: int | None = None, runtime: Runtime | None = None) -> None:
        if stream is not None and not (isinstance(stream, int) and 0 <= stream < 1 << 64):
            raise InvalidArgumentError(
                f"stream: expected the address of a cudaStream_t as an int, or None, found {type(stream).__name__} "
                f"{stream}"
            )
        self.device, self.stream, self.runtime = device, stream, runtime
        self.kept: list[Any] = []

    def check(self, device: int | None, name: str) -> None:
        """Refuse an array that lies elsewhere."""
        if device != self.device:
            raise InvalidArgumentError(f"{name}: expected an array {place(self.device)}, found one {place(device)}")


def place(device: int | None) -> str:
    """A device in words."""
    return "in host memory" if device is None else f"on cuda:{device}"


# DLPack, as dlpack.h has it.

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_READ_ONLY, _IS_COPIED = 1, 2
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_BOOL = 6
_FROZEN = ("jax", "jaxlib")


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def by_dlpack(array: Any, name: str, lease: Lease) -> View:
    """Look at an array by DLPack. What keeps it is the capsule, whose own destructor gives the tensor back."""
    kind, number = map(int, array.__dlpack_device__())
    if kind not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise InvalidArgumentError(
            f"{name}: expected an array {place(lease.device)}, found one on DLPack's device type {kind}"
        )
    device = number if kind in (_CUDA, _CUDA_MANAGED) else None
    lease.check(device, name)
    # The default stream has a number of its own there.
    stream = None if device is None else lease.stream or 1
    try:
        try:
            capsule = array.__dlpack__(stream=stream, max_version=(1, 0), copy=False)
        except TypeError:
            # Of before version 1.
            capsule = array.__dlpack__(stream=stream)
    except Exception as error:
        raise InvalidArgumentError(f"{name}: expected an array that DLPack can hand over, found {error}") from error
    flags = 0
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise InvalidArgumentError(f"{name}: expected DLPack's version 1, found {versioned.major}")
        tensor, flags = versioned.tensor, versioned.flags
    elif _is_valid(capsule, b"dltensor"):
        tensor = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    else:
        raise InvalidArgumentError(f"{name}: expected DLPack's capsule, found {capsule!r}")
    if flags & _IS_COPIED:
        raise InvalidArgumentError(
            f"{name}: expected an array that DLPack can hand over as it lies, found one that it copies"
        )
    lease.kept.append(capsule)
    itemsize = -(-tensor.bits // 8)
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    if shape and tensor.strides:
        strides = tuple(stride * itemsize for stride in tensor.strides[: tensor.ndim])
    else:
        strides = _row_major(shape, itemsize)
    element = "bool" if tensor.code == _BOOL else f"{_KINDS.get(tensor.code, f'type {tensor.code} of ')}{tensor.bits}"
    if tensor.lanes != 1:
        element += f" in vectors of {tensor.lanes}"
    frozen = type(array).__module__.split(".")[0] in _FROZEN
    return View(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        strides,
        itemsize,
        CODES.get(element),
        not flags & _READ_ONLY and not frozen,
        element,
        device,
        "one of JAX, whose arrays never change" if frozen else "a read-only one",
    )


def by_cuda_array_interface(array: Any, name: str, lease: Lease) -> View:
    """Look at an array by `__cuda_array_interface__`, and order the lease's stream after the array's."""
    described = array.__cuda_array_interface__
    version = described["version"]
    if version < 2:
        raise InvalidArgumentError(f"{name}: expected __cuda_array_interface__ of version 2 or 3, found {version}")
    if described.get("mask") is not None:
        raise InvalidArgumentError(f"{name}: expected an array without a mask, found one with")
    if lease.device is None:
        raise InvalidArgumentError(f"{name}: expected an array in host memory, found one on a CUDA device")
    dtype, shape = np.dtype(described["typestr"]), tuple(described["shape"])
    address, read_only = described["data"]
    device = lease.runtime.device_of(address) if math.prod(shape) else lease.device
    lease.check(device, name)
    stream = described.get("stream") if version >= 3 else None
    if stream == 0:
        raise InvalidArgumentError(f"{name}: expected a stream other than 0 in __cuda_array_interface__, found 0")
    if stream is not None:
        lease.runtime.order(lease.device, lease.stream, stream)
    strides = described.get("strides")
    kind = dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order"
    return View(
        address,
        shape,
        _row_major(shape, dtype.itemsize) if strides is None else tuple(strides),
        dtype.itemsize,
        CODES.get(kind),
        not read_only,
        kind,
        device,
    )


def _row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for extent in reversed(shape):
        strides.insert(0, itemsize)
        itemsize *= extent
    return tuple(strides)
