"""Arrays by pointer: what is taken as it lies, and what is refused with the argument's name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import adalora
from adalora import Triplets
from adalora.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    aligned_bytes,
    as_aligned,
    as_buffer,
    as_matrix,
    dtype_code,
)

BASE = np.zeros((8, 10), np.float32)


@pytest.mark.parametrize(
    ("array", "shape", "expected"),
    [
        (BASE, (8, 10), (8, 10, 10)),
        (BASE[:, :4], (8, 4), (8, 4, 10)),
        (BASE[::2, 1:3], (4, 2), (4, 2, 20)),
        (BASE[3:4, ::2], None, "row-major"),
        (BASE.T[:, :1], (10, 1), None),
        (BASE[:1].T, (10, 1), (10, 1, 1)),
        (BASE[:1, :3], (1, 3), (1, 3, 0)),
        (BASE[0], (10,), (1, 10, 0)),
        (BASE[0, :, None], (10,), (10, 1, 1)),
        (BASE[:1], (10,), (1, 10, 0)),
        (BASE[:, :1], (8,), (8, 1, 10)),
        (BASE[:0], (0, 10), (0, 10, 0)),
        (BASE[:, :0], (8, 0), (8, 0, 0)),
        (BASE.T, None, "row-major"),
        (BASE[::-1], None, "row-major"),
        (BASE[:, ::-1], None, "row-major"),
        (np.broadcast_to(np.float32(1), (8, 10)), None, "row-major"),
        (np.broadcast_to(BASE[0], (8, 10)), None, "row-major"),
    ],
)
def test_layouts(array: np.ndarray, shape: tuple[int, ...] | None, expected: tuple[int, ...] | str | None) -> None:
    if isinstance(expected, str):
        with pytest.raises(adalora.InvalidArgumentError, match=f"the_name: .*{expected}"):
            as_matrix(array, "the_name", shape=array.shape, dtypes=(FLOAT32,))
        return
    matrix = as_matrix(array, "the_name", shape=shape, dtypes=(FLOAT32,))
    if expected is not None:
        assert (matrix.rows, matrix.columns, matrix.row_stride) == expected
    assert matrix.dtype == FLOAT32
    assert matrix.data == (array.ctypes.data if array.size else None)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((2, 3), np.float32), FLOAT32),
        (np.zeros((2, 3), np.float64), FLOAT64),
        (np.zeros((2, 3), np.float16), FLOAT16),
        (np.zeros((2, 3), ml_dtypes.bfloat16), BFLOAT16),
        (adalora.BFloat16(np.zeros((2, 3), np.uint16)), BFLOAT16),
    ],
)
def test_element_types(array: np.ndarray | adalora.BFloat16, dtype: int) -> None:
    every = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
    assert as_matrix(array, "x", shape=(2, 3), dtypes=every).dtype == dtype
    others = [code for code in every if code != dtype]
    with pytest.raises(adalora.InvalidArgumentError, match=r"^x: expected an array of .* or .* or .*, found "):
        as_matrix(array, "x", shape=(2, 3), dtypes=others)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((2, 3), np.int32), "found int32"),
        (np.zeros((2, 3), ">f4"), "found float32 in foreign byte order"),
        (np.zeros((2, 3), np.float64), "expected an array of float32, found float64"),
        (np.zeros((3, 2), np.float32), r"expected shape \[2, 3\], found \[3, 2\]"),
        (np.zeros(6, np.float32), r"expected shape \[2, 3\], found \[6\]"),
        (np.zeros((1, 2, 3), np.float32), r"expected shape \[2, 3\], found \[1, 2, 3\]"),
        ([[0.0] * 3] * 2, "found list, which would have to be copied"),
        (None, "found NoneType"),
        (
            np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float32).reshape(2, 3),
            "expected an address that 4 divides",
        ),
    ],
)
def test_refusals_name_the_argument(array: object, text: str) -> None:
    with pytest.raises(adalora.InvalidArgumentError, match=f"^some.name: .*{text}") as caught:
        as_matrix(array, "some.name", shape=(2, 3), dtypes=(FLOAT32,))
    assert isinstance(caught.value, ValueError)
    assert caught.value.status_name == "ADALORA_ERROR_INVALID_ARGUMENT"


def test_unmarked_bits_are_refused_with_a_hint() -> None:
    with pytest.raises(adalora.InvalidArgumentError, match=r"mark bits of bfloat16 as BFloat16\(array\)"):
        as_matrix(np.zeros((2, 3), np.uint16), "x", shape=(2, 3), dtypes=(BFLOAT16,))
    with pytest.raises(adalora.InvalidArgumentError, match="expected an array of uint16, found float32"):
        adalora.BFloat16(np.zeros(3, np.float32))


def test_outputs_have_to_be_writable() -> None:
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    as_matrix(array, "x", shape=(2, 3), dtypes=(FLOAT32,))
    with pytest.raises(adalora.InvalidArgumentError, match=r"^y: .*read-only"):
        as_matrix(array, "y", shape=(2, 3), dtypes=(FLOAT32,), writable=True)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^h: .*read-only"):
        as_buffer(array, "h", shape=(2, 3), dtypes=(FLOAT32,))


def test_buffers_have_no_gaps() -> None:
    with pytest.raises(adalora.InvalidArgumentError, match=r"^h: .*without gaps"):
        as_buffer(BASE[:, :4], "h", shape=(8, 4), dtypes=(FLOAT32,))
    with pytest.raises(adalora.InvalidArgumentError, match=r"^h: expected shape \[8, 4\]"):
        as_buffer(BASE, "h", shape=(8, 4), dtypes=(FLOAT32,))
    assert as_buffer(BASE, "h", shape=(80,), dtypes=(FLOAT32,)) == (BASE.ctypes.data, FLOAT32)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_aligned_bytes(size: int) -> None:
    for _ in range(5):
        array = aligned_bytes(size)
        assert array.shape == (size,)
        assert not array.any()
        address, found = as_aligned(array, "workspace", size)
        assert found == size
        assert address is None if size == 0 else address % 64 == 0


def test_workspaces_are_checked() -> None:
    whole = aligned_bytes(200)
    assert as_aligned(whole, "workspace", 100) == (whole.ctypes.data, 200)
    for array, text in (
        (whole[1:], "expected an address that 64 divides"),
        (whole[:99], "expected at least 100 bytes, found 99"),
        (whole[::2], "expected a vector of uint8 without gaps"),
        (whole.reshape(2, 100), "expected a vector of uint8 without gaps"),
        (np.zeros(200, np.int8), "expected a vector of uint8 without gaps, found int8"),
        (bytearray(200), "found bytearray"),
    ):
        with pytest.raises(adalora.InvalidArgumentError, match=f"^workspace: .*{text}"):
            as_aligned(array, "workspace", 100)


def test_element_type_names() -> None:
    assert dtype_code("float32") == dtype_code(np.float32) == dtype_code(np.dtype(np.float32)) == FLOAT32
    assert dtype_code("bfloat16") == dtype_code(ml_dtypes.bfloat16) == BFLOAT16
    for wrong in ("float8", np.int64, 3, object(), ">f4"):
        with pytest.raises(adalora.InvalidArgumentError, match=r"^dtype: expected one of float32"):
            dtype_code(wrong)


def test_bfloat16_bits_are_those_of_ml_dtypes(rng: np.random.Generator) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    exact = adalora.BFloat16(every).to_float32()
    np.testing.assert_array_equal(
        exact.view(np.uint32), every.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)
    )
    words = np.concatenate(
        [rng.integers(0, 1 << 32, 100_000, dtype=np.uint32), exact.view(np.uint32) + np.uint32(0x8000)]
    )
    floats = words.view(np.float32)
    rounded = adalora.BFloat16.from_float32(floats)
    numbers = ~np.isnan(floats)
    expected = floats[numbers].astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(rounded.bits[numbers], expected)
    assert np.isnan(rounded.to_float32()[~numbers]).all()
    assert adalora.BFloat16.from_float32(np.zeros((2, 0, 3))).shape == (2, 0, 3)


def test_triplets_are_asked_for_by_name(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 3, 2, init_r=1)
    params = adapter.new_params(1)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^params: expected Triplets\(A, E, B\), found dict"):
        adapter.initialize({"A": params.A}, 1)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^params\.B: expected shape \[2, 1\], found \[1, 2\]"):
        adapter.initialize(params._replace(B=np.zeros((1, 2), np.float32)), 1)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^params\.E: .*float64"):
        adapter.initialize(Triplets(params.A, np.zeros(1), params.B), 1)


def test_training_without_ml_dtypes(context: adalora.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> tuple[str, bytes]:
        adapter = adalora.Adapter(context, 5, 4, init_r=3, dtype="bfloat16")
        params, grads = adapter.new_params(3), adapter.zeros("bfloat16")
        allocator = adalora.Allocator(context, [adapter], target_r=1, total_step=10)
        training = allocator.bind_all([params], [grads], hyper=adalora.Hyper(0.1))
        training.zero_grad()
        allocator.orthogonality(0.5)
        allocator.step(1)
        bits = [array.bits if isinstance(array, adalora.BFloat16) else array for array in (*params, *grads)]
        return type(params.A).__name__, b"".join(array.tobytes() for array in bits)

    with_package = train()
    monkeypatch.setattr(adalora.arrays, "_BFLOAT16", None)
    without = train()
    assert (with_package[0], without[0]) == ("ndarray", "BFloat16")
    assert with_package[1] == without[1]
