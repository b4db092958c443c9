"""Finds the native library, checks that it fits, and gives its functions their types."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from . import _bindings as c
from .errors import LibraryLoadError, error_of

# Where the wheel puts the library.
BUNDLED = Path(__file__).resolve().with_name("libadalora.so")
ENVIRONMENT = "ADALORA_LIBRARY"

_loaded: dict[str, Library] = {}
_lock = threading.Lock()


class Library:
    """The loaded library: each function of the C interface is an attribute of the same name.

    A function that returns a status raises the exception for it where that is not success. While a call runs, other
    Python threads go on.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise LibraryLoadError(f"cannot load {path}: {error}") from error
        self.abi_version = self._check_abi_version()
        for name, function in c.FUNCTIONS.items():
            setattr(self, name, self._typed(name, function))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.path} has no {name}")

    def __repr__(self) -> str:
        return f"Library({self.path!r})"

    @property
    def version(self) -> tuple[int, int, int]:
        """Version of the library: major, minor, patch."""
        packed = self.adalora_version()
        return packed >> 16, packed >> 8 & 0xFF, packed & 0xFF

    def _check_abi_version(self) -> int:
        # Before anything else: the other functions may be of another shape in another version.
        try:
            function = self._library.adalora_abi_version
        except AttributeError:
            raise LibraryLoadError(f"{self.path} is no adalora library: it exports no adalora_abi_version") from None
        function.restype, function.argtypes = ctypes.c_uint32, []
        found = function()
        if found != c.ADALORA_ABI_VERSION:
            raise LibraryLoadError(
                f"{self.path} serves version {found} of the C interface, "
                f"and this package speaks version {c.ADALORA_ABI_VERSION}: install the two from one source"
            )
        return found

    def _typed(self, name: str, function: c.Function) -> Any:
        try:
            symbol = getattr(self._library, name)
        except AttributeError:
            raise LibraryLoadError(
                f"{self.path} exports no {name}: install library and package from one source"
            ) from None
        symbol.restype = function.restype
        symbol.argtypes = [kind for _, kind in function.arguments]
        symbol.__doc__ = function.doc
        if function.is_status:
            symbol.errcheck = self._raise_on_failure
        return symbol

    def _raise_on_failure(self, status: int, function: Any, arguments: tuple[Any, ...]) -> int:
        if status != c.ADALORA_SUCCESS:
            raise error_of(status, self.adalora_last_error().decode())
        return status


def load(path: str | os.PathLike[str] | None = None) -> Library:
    """Load the native library: from `path`, else from where `ADALORA_LIBRARY` says, else the one in this package.

    A library is loaded once per process.
    """
    chosen = os.fspath(path) if path is not None else os.environ.get(ENVIRONMENT) or os.fspath(BUNDLED)
    if not os.path.isfile(chosen):
        raise LibraryLoadError(
            f"there is no native library at {chosen}: install the package with pip, "
            f"or name the library in the environment variable {ENVIRONMENT}"
        )
    resolved = os.path.realpath(chosen)
    with _lock:
        if resolved not in _loaded:
            _loaded[resolved] = Library(resolved)
        return _loaded[resolved]
