"""An exporter of DLPack that tells what became of its capsules: for tests."""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA, CUDA_HOST = 1, 2, 3
READ_ONLY, COPIED = 1, 2
FLOAT32, FLOAT64, UINT8, BFLOAT16 = (2, 32), (2, 64), (1, 8), (4, 16)

_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_api.PyCapsule_New.restype, _api.PyCapsule_New.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, _Destructor),
)
# A capsule that goes is no object any more.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
# By the structures' addresses: what each capsule was made of, and who exported it.
_alive: dict[int, tuple[Any, Exported]] = {}
_NAMES = (b"dltensor", b"dltensor_versioned")


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 2),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


@_Destructor
def _destroy(capsule: int) -> None:
    # As dlpack.h wants it: a capsule that nobody consumed gives its tensor back.
    for name in _NAMES:
        if _is_valid(capsule, name):
            _, exported = _alive.pop(_pointer(capsule, name))
            exported.live -= 1


class Exported:
    """Memory as an array of which nothing but DLPack is known.

    Attributes:
        live: capsules that were handed out and not given back.
        streams: what was asked for.

    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: tuple[int, int],
        device: tuple[int, int] = (CPU, 0),
        *,
        keep: Any = None,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        flags: int = 0,
        version: tuple[int, int] | None = (1, 0),
    ) -> None:
        self.address, self.shape, self.dtype, self.device = address, shape, dtype, device
        self.keep, self.strides, self.offset, self.flags, self.version = keep, strides, offset, flags, version
        self.live, self.streams = 0, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if self.version is None and options:
            raise TypeError("of before version 1")
        self.streams.append(stream)
        made = _Managed() if self.version is None else _Versioned(self.version, flags=self.flags)
        n = len(self.shape)
        shape = (ctypes.c_int64 * n)(*self.shape)
        strides = None if self.strides is None else (ctypes.c_int64 * n)(*self.strides)
        tensor = made.tensor
        tensor.data, tensor.device, tensor.ndim = self.address - self.offset, self.device, n
        tensor.dtype, tensor.lanes, tensor.byte_offset = self.dtype, 1, self.offset
        tensor.shape = ctypes.addressof(shape)
        tensor.strides = None if strides is None else ctypes.addressof(strides)
        _alive[ctypes.addressof(made)] = (made, shape, strides), self
        self.live += 1
        return _api.PyCapsule_New(ctypes.addressof(made), _NAMES[self.version is not None], _destroy)
