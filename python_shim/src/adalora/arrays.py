"""Arrays by pointer: what the library reads and writes is the caller's own memory, never a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from . import _bindings as c
from ._cuda import Runtime
from ._exchange import CODES, Lease, View, by_cuda_array_interface, by_dlpack, place
from .errors import InvalidArgumentError

try:
    import ml_dtypes
except ImportError:
    _BFLOAT16: np.dtype | None = None
else:
    _BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Where the library wants more than the element's own alignment (workspace and state), it wants this.
ALIGNMENT = 64

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = c.ADALORA_FLOAT32, c.ADALORA_FLOAT64, c.ADALORA_BFLOAT16, c.ADALORA_FLOAT16
NAMES = {code: name for name, code in CODES.items()}
_CODES: dict[Any, int] = {np.dtype(np.float32): FLOAT32, np.dtype(np.float64): FLOAT64, np.dtype(np.float16): FLOAT16}
if _BFLOAT16 is not None:
    _CODES[_BFLOAT16] = BFLOAT16


class BFloat16:
    """Marks an array of uint16 as one of bfloat16, for where the package `ml_dtypes` is not at hand.

    `bits` is the array itself, of NumPy or on a device: element by element the upper half of a float32.
    """

    __slots__ = ("bits",)

    def __init__(self, bits: Any) -> None:
        on_device = hasattr(bits, "__cuda_array_interface__") or hasattr(bits, "__dlpack__")
        if bits.dtype != np.uint16 if isinstance(bits, np.ndarray) else not on_device:
            raise InvalidArgumentError(
                f"bits: expected an array of uint16, found {getattr(bits, 'dtype', type(bits).__name__)}"
            )
        self.bits = bits

    @classmethod
    def from_float32(cls, values: Any) -> BFloat16:
        """A new array with the nearest bfloat16 of each value, ties to even."""
        words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (words + (0x7FFF + (words >> 16 & 1))) >> 16
        # A NaN keeps its sign and upper bits, and stays a NaN.
        bits = np.where(words & 0x7FFFFFFF > 0x7F800000, words >> 16 | 0x40, rounded)
        return cls(bits.astype(np.uint16).reshape(np.shape(values)))

    def to_float32(self) -> np.ndarray:
        """A new array with the same values in float32."""
        return (self.bits.astype(np.uint32) << 16).view(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.bits.shape

    def __repr__(self) -> str:
        return f"BFloat16({self.to_float32()!r})"


Array = Any
"""What `view` knows: NumPy's arrays, `BFloat16`, and arrays of every framework that speaks DLPack or
`__cuda_array_interface__`: CuPy's, JAX's, PyTorch's and others, in host memory or on a CUDA device."""


class Triplets(NamedTuple):
    """The triplets of one adapter, or what belongs to them element by element: gradients, moments, averages."""

    A: Array
    """Right vectors, [rank, in_features]."""
    E: Array
    """Values, [rank] (PEFT's [rank, 1] is taken too)."""
    B: Array
    """Left vectors, [out_features, rank]."""


@singledispatch
def view(array: Any, name: str, lease: Lease) -> View:
    """Look at an array-like. Each kind of array that there is registers how."""
    if hasattr(array, "__dlpack_device__"):
        return by_dlpack(array, name, lease)
    if hasattr(array, "__cuda_array_interface__"):
        return by_cuda_array_interface(array, name, lease)
    raise InvalidArgumentError(
        f"{name}: expected an array of numpy, or one with DLPack or __cuda_array_interface__, found "
        f"{type(array).__name__}, which would have to be copied; the library works on the caller's own memory"
    )


@view.register(np.ndarray)
def _(array: np.ndarray, name: str, lease: Lease) -> View:
    lease.check(None, name)
    kind = array.dtype.name if array.dtype.isnative else f"{array.dtype.name} in foreign byte order"
    address, code = array.ctypes.data, _CODES.get(array.dtype)
    return View(address, array.shape, array.strides, array.itemsize, code, array.flags.writeable, kind)


@view.register(BFloat16)
def _(array: BFloat16, name: str, lease: Lease) -> View:
    v = view(array.bits, name, lease)
    if v.kind != "uint16":
        raise InvalidArgumentError(f"{name}: expected bits of bfloat16 in an array of uint16, found {v.kind}")
    return v._replace(dtype=BFLOAT16, kind="bfloat16")


class Memory:
    """Where a context's arrays lie.

    Args:
        device: number of the CUDA device; None: host memory.
        to_device: makes an array there of one of NumPy's; None: nobody does.
        runtime: of the device.

    """

    def __init__(
        self,
        device: int | None = None,
        to_device: Callable[[np.ndarray], Array] | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.device, self._to_device, self._runtime = device, to_device, runtime

    def lease(self, stream: int | None = None) -> Lease:
        """For the arrays of a call in a stream."""
        return Lease(self.device, stream, self._runtime)

    def array(self, values: np.ndarray, name: str) -> Array:
        """An array with these values here: itself in host memory."""
        if self.device is None:
            return values
        if self._to_device is None:
            raise InvalidArgumentError(
                f"{name}: expected an array {place(self.device)}, or a context with to_device to make one, found "
                "neither"
            )
        return self._to_device(values)

    def zeros(self, shape: tuple[int, ...], code: int, name: str) -> Array:
        """A new array of zeros; of bfloat16 in host memory as `ml_dtypes` has it, if installed, else `BFloat16`."""
        if code == BFLOAT16 and (_BFLOAT16 is None or self.device is not None):
            return BFloat16(self.array(np.zeros(shape, np.uint16), name))
        return self.array(np.zeros(shape, _BFLOAT16 if code == BFLOAT16 else NAMES[code]), name)

    def aligned_bytes(self, size: int, name: str) -> Array:
        """Zero bytes for workspace or state."""
        # Memory of a device begins at multiples of 256.
        return aligned_bytes(size) if self.device is None else self.array(np.zeros(size, np.uint8), name)


HOST = Memory()


def as_matrix(
    array: Any,
    name: str,
    *,
    shape: tuple[int, ...],
    dtypes: Sequence[int],
    writable: bool = False,
    lease: Lease | None = None,
) -> c.adalora_matrix_t:
    """The C descriptor of an array: `shape` and one of `dtypes` are expected, row-major, rows at any distance.

    For a vector, `shape` has one element, and n x 1 and 1 x n are as good. Without a lease, host memory is expected.
    """
    v = view(array, name, lease or Lease())
    _check_dtype(v, name, dtypes)
    if v.shape != shape and not (len(shape) == 1 and v.shape in ((*shape, 1), (1, *shape))):
        raise InvalidArgumentError(f"{name}: expected shape {_words(shape)}, found {_words(v.shape)}")
    _check_writable(v, name, writable)
    rows, columns = (1, *v.shape)[-2:]
    row_bytes, element_bytes = (0, *v.strides)[-2:]
    if rows == 0 or columns == 0:
        return c.adalora_matrix_t(None, rows, columns, 0, v.dtype, 0)
    # NumPy leaves the stride of a dimension with one element undefined.
    if columns > 1 and element_bytes != v.itemsize:
        raise InvalidArgumentError(
            f"{name}: expected a row-major array, found {element_bytes} bytes from one element of a row to the next "
            f"instead of {v.itemsize}"
        )
    stride = row_bytes // v.itemsize if rows > 1 else 0
    if rows > 1 and (row_bytes % v.itemsize or stride < columns):
        raise InvalidArgumentError(
            f"{name}: expected a row-major array, found {row_bytes} bytes from one row to the next "
            f"where a row has {columns * v.itemsize}"
        )
    _check_alignment(v, name)
    return c.adalora_matrix_t(v.address, rows, columns, stride, v.dtype, 0)


def as_buffer(
    array: Any,
    name: str,
    *,
    shape: tuple[int, ...],
    dtypes: Sequence[int],
    writable: bool = True,
    lease: Lease | None = None,
) -> tuple[int, int]:
    """Address and element type of an array without gaps, of any shape with as many elements as `shape`."""
    v = view(array, name, lease or Lease())
    _check_dtype(v, name, dtypes)
    return _gapless(v, name, shape, writable), v.dtype  # type: ignore[return-value]


def as_values(
    array: Any, name: str, *, dtype: type, size: int, writable: bool = False, lease: Lease | None = None
) -> int:
    """Address of an array of `size` plain numbers (counters, flags, sums) without gaps."""
    v = view(array, name, lease or Lease())
    expected = np.dtype(dtype).name
    if v.kind != expected:
        raise InvalidArgumentError(f"{name}: expected an array of {expected}, found {v.kind}")
    return _gapless(v, name, (size,), writable)


def as_flags(array: Any, name: str, *, size: int | None = None, lease: Lease | None = None) -> int:
    """Address of an array of yes-or-no bytes, uint8 or bool, as many as `size` says."""
    v = view(array, name, lease or Lease())
    if v.kind not in ("bool", "uint8"):
        raise InvalidArgumentError(f"{name}: expected an array of uint8 or bool, found {v.kind}")
    return _gapless(v, name, v.shape if size is None else (size,), False)


def one_value(value: Any, dtype: type, memory: Memory, name: str) -> Any:
    """A number as a new array of one element; an array as it is, to be used where it lies."""
    is_number = isinstance(value, (int, float, np.number))
    return memory.array(np.array([value], dtype), name) if is_number else value


def aligned_bytes(size: int) -> np.ndarray:
    """`size` zero bytes that begin at a multiple of 64, as workspace and state have to."""
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size]


def as_aligned(array: Any, name: str, size: int, lease: Lease | None = None) -> tuple[int | None, int]:
    """Where an array of at least `size` bytes begins, at a multiple of 64 (None for no bytes), and how many it has."""
    v = view(array, name, lease or Lease())
    if v.kind != "uint8" or len(v.shape) != 1 or not v.gapless:
        raise InvalidArgumentError(f"{name}: expected a vector of uint8 without gaps, found {v.kind}")
    if v.size < size:
        raise InvalidArgumentError(f"{name}: expected at least {size} bytes, found {v.size}")
    _check_writable(v, name, True)
    if v.size == 0:
        return None, 0
    if v.address % ALIGNMENT:
        raise InvalidArgumentError(f"{name}: expected an address that {ALIGNMENT} divides, found {v.address:#x}")
    return v.address, v.size


def dtype_code(dtype: Any, name: str = "dtype") -> int:
    """The code of an element type that is given as a name, such as "bfloat16", or as NumPy has it."""
    if isinstance(dtype, str):
        for code, text in NAMES.items():
            if dtype == text:
                return code
    try:
        return _CODES[np.dtype(dtype)]
    except (KeyError, TypeError):
        expected = ", ".join(NAMES.values())
        raise InvalidArgumentError(f"{name}: expected one of {expected}, found {dtype!r}") from None


def compute_dtype(code: int) -> int:
    """The type that sums, saved activations and optimiser state have for parameters of this one."""
    return FLOAT64 if code == FLOAT64 else FLOAT32


def size_of(array: Array) -> int:
    """Number of elements."""
    return math.prod(array.shape)


def named(prefix: str, triplets: Sequence[Triplets]) -> Iterator[tuple[str, Array]]:
    """The arrays of a list of triplets with names such as `prefix/0/A`."""
    for k, group in enumerate(triplets):
        for matrix, array in group._asdict().items():
            yield f"{prefix}/{k}/{matrix}", array


def _gapless(v: View, name: str, shape: tuple[int, ...], writable: bool) -> int:
    if v.size != math.prod(shape):
        raise InvalidArgumentError(f"{name}: expected shape {_words(shape)}, found {_words(v.shape)}")
    if not v.gapless:
        raise InvalidArgumentError(
            f"{name}: expected a row-major array without gaps, found strides {v.strides} in bytes"
        )
    _check_writable(v, name, writable)
    _check_alignment(v, name)
    return v.address


def _check_dtype(v: View, name: str, dtypes: Sequence[int]) -> None:
    if v.dtype not in dtypes:
        expected = " or ".join(NAMES[code] for code in dict.fromkeys(dtypes))
        hint = "; mark bits of bfloat16 as BFloat16(array)" if v.kind == "uint16" and BFLOAT16 in dtypes else ""
        raise InvalidArgumentError(f"{name}: expected an array of {expected}, found {v.kind}{hint}")


def _check_writable(v: View, name: str, writable: bool) -> None:
    if writable and not v.writable:
        raise InvalidArgumentError(f"{name}: expected an array that may be written to, found {v.read_only}")


def _check_alignment(v: View, name: str) -> None:
    if v.address % v.itemsize:
        raise InvalidArgumentError(f"{name}: expected an address that {v.itemsize} divides, found {v.address:#x}")


def _words(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
