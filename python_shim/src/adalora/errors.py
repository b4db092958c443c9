"""What goes wrong, as exceptions: one class for each status of the C interface, and one for loading the library."""

from __future__ import annotations

from . import _bindings as c


class AdaLoRAError(Exception):
    """A call of the library failed.

    `status` is the number of the C interface, one of `ADALORA_ERROR_*`, and `status_name` its name. The message says
    which call, which adapter and which argument, what was found and what was expected.
    """

    status: int = c.ADALORA_ERROR_INTERNAL

    @property
    def status_name(self) -> str:
        """Name of the status, such as "ADALORA_ERROR_INVALID_ARGUMENT"."""
        return _NAMES.get(self.status, "unknown status")


class InvalidArgumentError(AdaLoRAError, ValueError):
    """An argument is wrong; nothing was changed."""

    status = c.ADALORA_ERROR_INVALID_ARGUMENT


class InvalidHandleError(AdaLoRAError):
    """The object is closed; nothing was changed."""

    status = c.ADALORA_ERROR_INVALID_HANDLE


class InvalidStateError(AdaLoRAError):
    """The call does not fit the object's state, such as an update before a bind; nothing was changed."""

    status = c.ADALORA_ERROR_INVALID_STATE


class OutOfMemoryError(AdaLoRAError, MemoryError):
    """Memory for the library's own use could not be had; nothing was changed."""

    status = c.ADALORA_ERROR_OUT_OF_MEMORY


class UnsupportedError(AdaLoRAError, NotImplementedError):
    """The combination is legal, and this backend does not have it; nothing was changed."""

    status = c.ADALORA_ERROR_UNSUPPORTED


class BackendUnavailableError(AdaLoRAError):
    """The backend is not in this library, or this machine lacks what it needs."""

    status = c.ADALORA_ERROR_BACKEND_UNAVAILABLE


class IncompleteError(AdaLoRAError):
    """Work failed after it had begun: the outputs that the message names are undefined."""

    status = c.ADALORA_ERROR_INCOMPLETE


class CorruptDataError(AdaLoRAError, ValueError):
    """Bytes from outside are damaged; nothing was changed."""

    status = c.ADALORA_ERROR_CORRUPT_DATA


class NotFoundError(AdaLoRAError, FileNotFoundError):
    """A file or folder is not there; nothing was changed."""

    status = c.ADALORA_ERROR_NOT_FOUND


class FileError(AdaLoRAError, OSError):
    """The operating system refused to read or write a file: the message says why. Files are as they were."""

    status = c.ADALORA_ERROR_IO


class InternalError(AdaLoRAError):
    """A defect of the library: the message says where. Please report it."""

    status = c.ADALORA_ERROR_INTERNAL


class LibraryLoadError(AdaLoRAError, ImportError):
    """The native library was not found, or it is not one that this package can use."""

    status = c.ADALORA_ERROR_BACKEND_UNAVAILABLE


_CLASSES = (
    InvalidArgumentError,
    InvalidHandleError,
    InvalidStateError,
    OutOfMemoryError,
    UnsupportedError,
    BackendUnavailableError,
    IncompleteError,
    CorruptDataError,
    NotFoundError,
    FileError,
    InternalError,
)
_BY_STATUS: dict[int, type[AdaLoRAError]] = {error.status: error for error in _CLASSES}
_NAMES: dict[int, str] = {
    value: name for name, value in vars(c).items() if name.startswith("ADALORA_ERROR_") or name == "ADALORA_SUCCESS"
}


def error_of(status: int, text: str) -> AdaLoRAError:
    """The exception for a status other than success."""
    error = _BY_STATUS.get(status, AdaLoRAError)(text)
    error.status = status
    return error
