"""A backend with its device and threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import _bindings as c
from ._cuda import Runtime, load_wheels
from ._handle import Handle, NativeObject
from ._library import Library, load
from .arrays import Array, Memory, as_values
from .errors import InvalidArgumentError
from .values import StepValues

_BACKENDS = {"cpu": c.ADALORA_BACKEND_CPU, "cuda": c.ADALORA_BACKEND_CUDA}


class Context(NativeObject):
    """What computes. Adapters and allocators are made from it, and go on working after it is closed.

    >>> with adalora.Context(threads=4) as context:
    ...     adapter = adalora.Adapter(context, in_features=768, out_features=768, init_r=12)

    Args:
        backend: "cpu", over arrays in host memory, or "cuda", over arrays on the device.
        device: number of the CUDA device.
        threads: how many threads compute, the calling one included; 0: as many as the process may run on.
        parallel: run on threads of the caller's instead of an own pool: a C function in the shape of `GOMP_parallel`,
            as a ctypes function (`ctypes.CDLL("libgomp.so.1").GOMP_parallel`) or its address.
        log: receives messages as `log(level, text)`, from any thread that is inside a call. It must not call the
            library.
        cublas_handle: address of a `cublasHandle_t` to borrow.
        library_folder: where CUDA's libraries are, one folder or several separated by ":"; None: those that are loaded
            are taken, else those of NVIDIA's wheels, else those that the loader finds.
        tf32: CUDA: let products of float32 be computed in TF32.
        to_device: CUDA: makes an array on the device of one of NumPy's, such as `cupy.asarray`, for what the package
            makes: workspace, state, zeros, numbers. What it returns is ready, or tells by DLPack or
            `__cuda_array_interface__` in which stream it will be. None: those arrays are to be given, too.
        library: the native library, or its file; None: see `adalora.load`.

    """

    def __init__(
        self,
        backend: str = "cpu",
        *,
        device: int = 0,
        threads: int = 0,
        parallel: Any = None,
        log: Callable[[int, str], None] | None = None,
        cublas_handle: int | None = None,
        library_folder: str | os.PathLike[str] | None = None,
        tf32: bool = False,
        to_device: Callable[[np.ndarray], Array] | None = None,
        library: Library | str | os.PathLike[str] | None = None,
    ) -> None:
        if backend not in _BACKENDS:
            raise InvalidArgumentError(f"backend: expected one of {', '.join(_BACKENDS)}, found {backend!r}")
        self.backend = backend
        self.library = library if isinstance(library, Library) else load(library)
        desc = c.adalora_context_desc_t(ctypes.sizeof(c.adalora_context_desc_t), _BACKENDS[backend])
        desc.device = device
        desc.threads = threads
        desc.cublas_handle = cublas_handle
        desc.tf32 = tf32
        desc.library_folder = os.fsencode(library_folder) if library_folder is not None else None
        if parallel is not None:
            desc.parallel = _parallel_function(parallel)
        if log is not None:
            desc.log = c.adalora_log_fn(lambda user, level, text: log(level, text.decode()))
        # The library may call these for as long as anything that was made from this context lives.
        self.callbacks = (parallel, desc.parallel, desc.log)
        pointer = ctypes.POINTER(c.adalora_context_t)()
        on_device = backend == "cuda"
        if on_device and library_folder is None:
            load_wheels()
        self.library.adalora_context_create(ctypes.byref(desc), ctypes.byref(pointer))
        self._handle = Handle(self.library, pointer, self.library.adalora_context_destroy, self.callbacks)
        self.memory = Memory(device, to_device, Runtime(self.describe())) if on_device else Memory()

    def prepare(self, stream: int | None = None) -> None:
        """Take now what the context would otherwise take at its first computation, such as the pool's threads."""
        handle = self.handle
        self.library.adalora_context_prepare(handle.pointer, stream)

    def describe(self) -> str:
        """What it computes with, in words: version, backend, threads, instruction set, libraries."""
        handle, size = self.handle, ctypes.c_size_t()
        self.library.adalora_context_describe(handle.pointer, None, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.library.adalora_context_describe(handle.pointer, text, ctypes.byref(size))
        return text.value.decode()

    def gradient_factor(
        self,
        sum_of_squares: Array | StepValues,
        grad_factor: Array | None = None,
        *,
        loss_scale: Array | None = None,
        max_norm: float = float("inf"),
        stream: int | None = None,
    ) -> None:
        """Make the factor that unscales and clips gradients: `min(1, max_norm / (norm + 1e-6)) / loss_scale`.

        Args:
            sum_of_squares: one float64: the sum of the squares of all gradients, as `Allocator.gradient_norm` adds to;
                or `StepValues`, whose own it is, with their `grad_factor` and `loss_scale` in place of the arguments.
            grad_factor: one float64, receives the factor.
            loss_scale: one float64, what the loss was multiplied by; None: 1.
            max_norm: above 0; infinity clips nothing.
            stream: CUDA stream.

        """
        handle = self.handle
        if isinstance(sum_of_squares, StepValues):
            if not (grad_factor is loss_scale is None):
                raise InvalidArgumentError(
                    "grad_factor, loss_scale: expected those of the values, found others beside them"
                )
            squares_at, scale_at, factor_at = sum_of_squares.of_factor(self.memory)
        else:
            value = partial(as_values, dtype=np.float64, size=1, lease=self.memory.lease(stream))
            squares_at = value(sum_of_squares, "sum_of_squares")
            scale_at = None if loss_scale is None else value(loss_scale, "loss_scale")
            factor_at = value(grad_factor, "grad_factor", writable=True)
        self.library.adalora_context_gradient_factor(handle.pointer, squares_at, scale_at, max_norm, factor_at, stream)


def _parallel_function(parallel: Any) -> Any:
    if isinstance(parallel, int):
        return c.adalora_parallel_fn(parallel)
    return ctypes.cast(parallel, c.adalora_parallel_fn)
