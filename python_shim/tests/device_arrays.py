"""Arrays in a CUDA device's memory without any framework: for tests, over the runtime that a context computes with."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

import adalora

_TO_DEVICE, _TO_HOST = 1, 2
_NON_BLOCKING = 1

SOFTWARE = Path(__file__).resolve().parents[2] / "target" / "cpp" / "software_cuda" / "lib"
"""Where building the C++ tests leaves software CUDA."""


def folder(software: bool) -> str | Path | None:
    """Where the tests' CUDA is: `ADALORA_CUDA_FOLDER`, else software CUDA, or None: what a context finds."""
    return os.environ.get("ADALORA_CUDA_FOLDER") or (SOFTWARE if software else None)


def is_there() -> bool:
    """Whether the tests' CUDA is there."""
    return (Path(folder(software=True)) / "libcudart.so.13").is_file()


class Device:
    """A CUDA device, and functions of the runtime: those of the library that the context's description names.

    Args:
        options: of the context, such as `library_folder`; None: the machine's own CUDA.

    """

    def __init__(self, number: int = 0, **options: Any) -> None:
        self.number = number
        self.context = adalora.Context("cuda", device=number, to_device=self.array, **options)
        words = self.context.describe().replace(",", " ").replace(";", " ").replace("(", " ").replace(")", " ").split()
        self.library = ctypes.CDLL(next(word for word in words if "/libcudart.so" in word))
        self.library.cudaGetErrorName.restype = ctypes.c_char_p

    def array(self, values: Any) -> DeviceArray:
        """A new array with these values."""
        values = np.ascontiguousarray(values)
        made = self.empty(values.shape, values.dtype)
        made[...] = values
        return made

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array."""
        return DeviceArray(self, shape, np.dtype(dtype))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the runtime with this device as the current one."""
        for function, given in (("cudaSetDevice", (self.number,)), (name, arguments)):
            status = getattr(self.library, function)(*given)
            if status:
                raise RuntimeError(f"{function}: {self.library.cudaGetErrorName(status).decode()}")

    def stream(self) -> int:
        """A new stream that the default one does not wait for."""
        made = ctypes.c_void_p()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(made), ctypes.c_uint(_NON_BLOCKING))
        return made.value

    def synchronize(self) -> None:
        """Wait for everything."""
        self.call("cudaDeviceSynchronize")


class DeviceArray:
    """An array in a device's memory, to be read and written as a whole; `np.asarray` copies it back.

    Attributes:
        stream: what `__cuda_array_interface__` says about streams; None: nothing is under way.
        writable: whether it may be written to.

    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.device, self.shape, self.dtype = device, tuple(shape), dtype
        self.stream: int | None = None
        self.writable, self.version = True, 3
        address = ctypes.c_void_p()
        device.call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(self.nbytes, 1)))
        self.address = address.value

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.device.call("cudaFree", ctypes.c_void_p(self.address))

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.size else 0, not self.writable),
            "version": self.version,
            "stream": self.stream,
        }

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        self._copy(values.ctypes.data, self.address, _TO_HOST)
        return values if dtype is None else values.astype(dtype)

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        values = np.asarray(self)
        values[key] = value
        self._copy(self.address, values.ctypes.data, _TO_DEVICE)

    def _copy(self, to: int, source: int, kind: int) -> None:
        if self.nbytes:
            size, kind = ctypes.c_size_t(self.nbytes), ctypes.c_int(kind)
            # The copy is in the default stream, which `Device.stream` does not wait for, and which
            # need not have ended when the call returns. Nor does it wait for those streams.
            self.device.synchronize()
            self.device.call("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), size, kind)
            self.device.synchronize()
