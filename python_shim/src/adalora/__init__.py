"""AdaLoRA for any trainer: adapters in the form of a singular value decomposition whose ranks adapt during training.

The mathematics happens in a native library, over arrays that stay the caller's:

- `Context`: what computes.
- `Adapter`: one layer's adapter; `GroupCall` (or `Adapter.call`): its forward and backward pass, prepared once.
- `Allocator`: schedule, importance and selection over all adapters of a model, and AdamW.
- `checkpoint`: adapters in PEFT's files, and training state beside them.
"""

from . import checkpoint
from ._library import Library, load
from .adapter import Adapter, Dropout, GroupCall, Share, Stage
from .allocator import Allocator, Budget, Hyper, Sizes, Slice, Standing, Training
from .arrays import BFloat16, Triplets, aligned_bytes
from .context import Context
from .errors import (
    AdaLoRAError,
    BackendUnavailableError,
    CorruptDataError,
    FileError,
    IncompleteError,
    InternalError,
    InvalidArgumentError,
    InvalidHandleError,
    InvalidStateError,
    LibraryLoadError,
    NotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)
from .values import StepValues

__version__ = "0.1.0"

__all__ = [
    "AdaLoRAError",
    "Adapter",
    "Allocator",
    "BFloat16",
    "BackendUnavailableError",
    "Budget",
    "Context",
    "CorruptDataError",
    "Dropout",
    "FileError",
    "GroupCall",
    "Hyper",
    "IncompleteError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidHandleError",
    "InvalidStateError",
    "Library",
    "LibraryLoadError",
    "NotFoundError",
    "OutOfMemoryError",
    "Share",
    "Sizes",
    "Slice",
    "Stage",
    "Standing",
    "StepValues",
    "Training",
    "Triplets",
    "UnsupportedError",
    "aligned_bytes",
    "checkpoint",
    "load",
]
