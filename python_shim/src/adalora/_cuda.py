"""What of CUDA's own libraries the exchange of arrays needs. Nothing here computes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AdaLoRAError, BackendUnavailableError

_DEVICE, _MANAGED = 2, 3
_DISABLE_TIMING = 2
_NOLOAD = os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_LOCAL

# By CUDA's major version: the libraries' folders in NVIDIA's wheels.
_WHEELS = {
    13: {"libcudart.so.13": "cu13/lib", "libcublas.so.13": "cu13/lib"},
    12: {"libcudart.so.12": "cuda_runtime/lib", "libcublas.so.12": "cublas/lib"},
}


class Runtime:
    """The CUDA runtime that a context computes with: whose memory an address is, and one stream after another.

    Args:
        description: what the context says about itself, which names the file.

    """

    def __init__(self, description: str) -> None:
        # A path may hold any character.
        found = re.search(r"libcudart [\d.]+ \((.+)\), libcublas [\d.]+ \(", description)
        if found is None:
            raise BackendUnavailableError(f"description: expected the path of libcudart, found {description!r}")
        self._library = ctypes.CDLL(found[1])
        self._library.cudaGetErrorName.restype = ctypes.c_char_p

    def device_of(self, address: int) -> int | None:
        """The device whose memory an address is; None: the host's."""
        # Longer than the structure of any version, whose first two fields are the same in all.
        attributes = (ctypes.c_int * 64)()
        self._call("cudaPointerGetAttributes", attributes, ctypes.c_void_p(address))
        return attributes[1] if attributes[0] in (_DEVICE, _MANAGED) else None

    def order(self, device: int, stream: int | None, after: int | None) -> None:
        """Let what comes in a stream wait for what is in another one by now."""
        if (stream or 1) == (after or 1):
            return
        event = ctypes.c_void_p()
        with self._current(device):
            self._call("cudaEventCreateWithFlags", ctypes.byref(event), ctypes.c_uint(_DISABLE_TIMING))
            try:
                self._call("cudaEventRecord", event, ctypes.c_void_p(after))
                self._call("cudaStreamWaitEvent", ctypes.c_void_p(stream), event, ctypes.c_uint(0))
            finally:
                # It goes when it is over.
                self._call("cudaEventDestroy", event)

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        before = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(before))
        if before.value == device:
            # To set it would make its primary context current in place of any other.
            yield
            return
        self._call("cudaSetDevice", ctypes.c_int(device))
        try:
            yield
        finally:
            self._call("cudaSetDevice", before)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            # The next one in this thread who asks, such as PyTorch, would take it for an error of its own.
            self._library.cudaGetLastError()
            raise AdaLoRAError(f"{name}: {self._library.cudaGetErrorName(status).decode()} ({status})")


def load_wheels() -> None:
    """Load CUDA's libraries from NVIDIA's wheels, where they are installed: those that the process lacks.

    The native library takes what is loaded before it looks elsewhere; the wheels' folders are on no search path.
    """
    lacking = {
        major: {name: folder for name, folder in names.items() if not _is_loaded(name)}
        for major, names in ((major, _WHEELS[major]) for major in _majors())
    }
    if not all(lacking.values()):
        return
    # Of the version of which the process has one already.
    begun = [names for major, names in lacking.items() if len(names) < len(_WHEELS[major])]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        for names in begun or lacking.values():
            files = [Path(root) / folder / name for name, folder in names.items()]
            if all(file.is_file() for file in files):
                for file in files:
                    ctypes.CDLL(str(file))
                return


def _majors() -> list[int]:
    """CUDA's versions, the newest first, but before all others those that the driver serves, if it can be asked."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return list(_WHEELS)
    return sorted(_WHEELS, key=lambda major: major * 1000 > version.value)


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=_NOLOAD)
    except OSError:
        return False
    return True
