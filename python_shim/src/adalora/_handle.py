"""Native handles whose lifetime is that of a Python object."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

from ._library import Library
from .errors import InvalidHandleError

T = TypeVar("T", bound="NativeObject")


class Handle:
    """Owns one native handle, and destroys it when nothing refers to it any more.

    A running call refers to it too, so closing an object while another thread is inside a call on it is safe.
    `keep` is what the library may still call, and `bound` what it holds the addresses of: both live as long.
    """

    __slots__ = ("__weakref__", "bound", "library", "pointer")

    def __init__(self, library: Library, pointer: Any, destroy: Any, keep: tuple[Any, ...]) -> None:
        self.library = library
        self.pointer = pointer
        self.bound: tuple[Any, ...] = ()
        finalizer = weakref.finalize(self, _destroy, destroy, pointer, keep)
        # At the interpreter's end a daemon thread may still be inside a call: the process' end frees everything anyway.
        finalizer.atexit = False


def _destroy(destroy: Any, pointer: Any, keep: tuple[Any, ...]) -> None:
    destroy(pointer)


class NativeObject:
    """Base of the objects that own a native handle: a context manager, closable, not to be copied or pickled."""

    _handle: Handle | None = None

    @property
    def handle(self) -> Handle:
        """The native handle."""
        handle = self._handle
        if handle is None:
            raise InvalidHandleError(f"this {type(self).__name__} is closed")
        return handle

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle is None

    def close(self) -> None:
        """Give the native object back. Objects made from it go on working. Closing twice does nothing."""
        self._handle = None

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy(self)


def refuse_copy(thing: object) -> None:
    """Refuse `copy.copy`, `copy.deepcopy` and `pickle`: what lies behind a handle or an address cannot be copied so."""
    name = type(thing).__name__
    raise TypeError(
        f"a {name} belongs to this process' native library and cannot be copied or pickled: make another one, "
        "and carry arrays and Allocator.save_state() over"
    )
