"""Arrays of other frameworks in host memory: DLPack's types, flags, versions, and how long its capsules live."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest
from dlpack import BFLOAT16, COPIED, CUDA, CUDA_HOST, FLOAT32, FLOAT64, READ_ONLY, Exported

import adalora
from adalora import InvalidArgumentError, Triplets
from adalora.arrays import Lease, as_matrix, view


def exported(array: np.ndarray, dtype: tuple[int, int], **options) -> Exported:
    return Exported(array.ctypes.data, array.shape, dtype, keep=array, **options)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
def test_what_dlpack_hands_over(version):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for given, rows, stride in (
        (exported(array, FLOAT32, version=version), 4, 6),
        (exported(array, FLOAT32, version=version, strides=(6, 1), offset=array.nbytes), 4, 6),
        (Exported(array.ctypes.data, (2, 6), FLOAT32, version=version, strides=(12, 1)), 2, 12),
        (exported(array, FLOAT32, version=version, device=(CUDA_HOST, 0)), 4, 6),
    ):
        lease = Lease()
        matrix = as_matrix(given, "x", shape=(rows, 6), dtypes=(adalora.arrays.FLOAT32,), writable=True, lease=lease)
        assert (matrix.data, matrix.rows, matrix.columns, matrix.row_stride) == (array.ctypes.data, rows, 6, stride)
        assert (given.streams, given.live) == ([None], 1)
        del lease
        gc.collect()
        assert given.live == 0


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (FLOAT64, "float64"),
        (BFLOAT16, "bfloat16"),
        ((2, 16), "float16"),
        ((1, 8), "uint8"),
        ((6, 8), "bool"),
        ((0, 64), "int64"),
        ((5, 64), "complex64"),
    ],
)
def test_element_types(dtype, kind):
    v = view(Exported(4096, (3, 5), dtype), "x", Lease())
    assert (v.kind, v.itemsize, v.shape, v.strides) == (kind, dtype[1] // 8, (3, 5), (5 * dtype[1] // 8, dtype[1] // 8))
    assert v.dtype == adalora._exchange.CODES.get(kind)


class OfJax(Exported):
    """Like JAX's."""

    __module__ = "jaxlib._jax"


@pytest.mark.parametrize(
    ("change", "writable", "text"),
    [
        ({"flags": READ_ONLY}, True, "expected an array that may be written to, found a read-only one"),
        ({"flags": COPIED}, False, "as it lies, found one that it copies"),
        ({"version": (2, 0)}, False, "expected DLPack's version 1, found 2"),
        ({"device": (CUDA, 1)}, False, "expected an array in host memory, found one on cuda:1"),
        ({"device": (7, 0)}, False, "expected an array in host memory, found one on DLPack's device type 7"),
        ({"strides": (1, 4)}, False, "expected a row-major array"),
    ],
)
def test_refusals(change, writable, text):
    array = np.zeros((4, 6), np.float32)
    given = exported(array, FLOAT32, **change)
    with pytest.raises(InvalidArgumentError, match=f"^x: .*{text}"):
        as_matrix(given, "x", shape=(4, 6), dtypes=(adalora.arrays.FLOAT32,), writable=writable)
    gc.collect()
    assert given.live == 0


def test_arrays_of_jax_are_inputs_alone(context):
    adapter = adalora.Adapter(context, 6, 4, init_r=2)
    x, y, params = np.ones((5, 6), np.float32), np.zeros((5, 4), np.float32), adapter.new_params(1)
    given = OfJax(x.ctypes.data, x.shape, FLOAT32, keep=x)
    adapter.call(given, params, y=y).forward()
    with pytest.raises(InvalidArgumentError, match=r"^y: .*found one of JAX, whose arrays never change"):
        adapter.call(given, params, y=OfJax(y.ctypes.data, y.shape, FLOAT32))


def test_an_exporter_that_refuses_is_heard():
    class Refusing(Exported):
        def __dlpack__(self, **options):
            raise BufferError("requires grad")

    with pytest.raises(InvalidArgumentError, match=r"^x: .* that DLPack can hand over, found requires grad"):
        view(Refusing(4096, (2,), FLOAT32), "x", Lease())


def test_capsules_live_as_long_as_what_holds_addresses(context, rng):
    adapter = adalora.Adapter(context, 6, 4, init_r=2, dtype="float64")
    arrays = {"x": rng.normal(size=(5, 6)), "y": np.zeros((5, 4)), "E": np.ones(2)}
    given = {name: exported(array, FLOAT64) for name, array in arrays.items()}
    params = adapter.new_params(1)._replace(E=given["E"])
    call = adapter.call(given["x"], params, y=given["y"])
    gc.collect()
    assert [each.live for each in given.values()] == [1, 1, 1]
    call.forward()
    want = adapter.scaling * ((arrays["x"] @ params.A.T) * arrays["E"]) @ params.B.T
    np.testing.assert_allclose(arrays["y"], want, rtol=1e-12)
    del call
    gc.collect()
    assert [each.live for each in given.values()] == [0, 0, 0]

    # A single call hands its arrays back when it returns, an allocator when others are bound or it goes.
    adapter.delta_weight(params, np.zeros((4, 6)))
    gc.collect()
    assert given["E"].live == 0
    allocator = adalora.Allocator(context, [adapter], target_r=1, total_step=10)
    allocator.bind_all([params])
    gc.collect()
    assert given["E"].live == 1
    allocator.bind_all([adapter.new_params(2)])
    gc.collect()
    assert given["E"].live == 0
    allocator.bind_all([params])
    allocator.close()
    del allocator
    gc.collect()
    assert given["E"].live == 0


def test_bits_of_bfloat16_by_dlpack(context, rng):
    adapter = adalora.Adapter(context, 6, 4, init_r=2, dtype="bfloat16")
    params = Triplets(*(rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in adapter.shapes))
    w, want = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32)
    adapter.delta_weight(params, want)
    adapter.delta_weight(Triplets(*(exported(array, BFLOAT16) for array in params)), w)
    np.testing.assert_array_equal(w, want)
    assert want.any()
