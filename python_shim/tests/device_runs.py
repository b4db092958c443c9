"""Arrays in device memory, over the CUDA that the environment names, or software CUDA: run by test_device_arrays.py."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import device_arrays
import numpy as np
import pytest
from device_arrays import Device, DeviceArray
from dlpack import BFLOAT16, CUDA, FLOAT32, FLOAT64, Exported

import adalora
from adalora import Adapter, Allocator, Hyper, InvalidArgumentError, Share, StepValues, Triplets
from adalora.arrays import FLOAT32 as CODE
from adalora.arrays import as_matrix, as_values


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(library_folder=device_arrays.folder(software=True))


@pytest.fixture(scope="module")
def bare() -> adalora.Context:
    """A context on the same device that can make no array."""
    return adalora.Context("cuda", library_folder=device_arrays.folder(software=True))


class Described:
    """Memory as an array of which nothing but `__cuda_array_interface__` is known."""

    def __init__(self, array: DeviceArray, **changed: Any) -> None:
        self.array, self.shape = array, array.shape
        described = {k: v for k, v in array.__cuda_array_interface__.items() if k != "stream"} | {"version": 2}
        self.__cuda_array_interface__ = described | changed


def by_dlpack(array: DeviceArray, dtype: tuple[int, int], **options: Any) -> Exported:
    return Exported(array.address, array.shape, dtype, (CUDA, array.device.number), keep=array, **options)


def test_what_the_interface_describes(device):
    array = device.array(np.arange(24, dtype=np.float32).reshape(4, 6))
    lease = device.context.memory.lease()
    for given, rows, stride in (
        (array, 4, 6),
        (Described(array), 4, 6),
        (Described(array, shape=(2, 6), strides=(48, 4)), 2, 12),
        (by_dlpack(array, FLOAT32), 4, 6),
    ):
        matrix = as_matrix(given, "x", shape=(rows, 6), dtypes=(CODE,), writable=True, lease=lease)
        assert (matrix.data, matrix.rows, matrix.row_stride) == (array.address, rows, stride)
    empty = device.empty((0, 6), np.float32)
    assert as_matrix(empty, "x", shape=(0, 6), dtypes=(CODE,), lease=lease).data is None
    bits = adalora.BFloat16(device.array(np.zeros((2, 3), np.uint16)))
    every = tuple(adalora.arrays.NAMES)
    assert as_matrix(bits, "x", shape=(2, 3), dtypes=every, lease=lease).dtype == adalora.arrays.BFLOAT16
    wrong = adalora.BFloat16(device.array(np.zeros((2, 3), np.float32)))
    with pytest.raises(InvalidArgumentError, match="x: expected bits of bfloat16 in an array of uint16, found float32"):
        as_matrix(wrong, "x", shape=(2, 3), dtypes=every, lease=lease)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"version": 1}, "expected __cuda_array_interface__ of version 2 or 3, found 1"),
        ({"mask": 0}, "expected an array without a mask"),
        ({"version": 3, "stream": 0}, "expected a stream other than 0"),
        ({"typestr": ">f4"}, "expected an array of float32, found float32 in foreign byte order"),
        ({"typestr": "<f8"}, "expected an array of float32, found float64"),
        ({"strides": (4, 16)}, "expected a row-major array"),
        ({"shape": (6, 4)}, r"expected shape \[4, 6\], found \[6, 4\]"),
    ],
)
def test_refusals(device, changed, text):
    given = Described(device.empty((4, 6), np.float32), **changed)
    with pytest.raises(InvalidArgumentError, match=f"^x: {text}"):
        as_matrix(given, "x", shape=(4, 6), dtypes=(CODE,), lease=device.context.memory.lease())


def test_read_only_arrays_are_inputs(device):
    array = device.empty((4, 6), np.float32)
    array.writable = False
    lease = device.context.memory.lease()
    as_matrix(array, "x", shape=(4, 6), dtypes=(CODE,), lease=lease)
    with pytest.raises(
        InvalidArgumentError, match=r"^x: expected an array that may be written to, found a read-only one"
    ):
        as_matrix(array, "x", shape=(4, 6), dtypes=(CODE,), writable=True, lease=lease)


def test_device_and_context_agree(device):
    on_host, on_device = np.zeros((4, 6), np.float32), device.empty((4, 6), np.float32)
    # Host memory that says of itself that it is the device's.
    lying = Described(on_device, data=(on_host.ctypes.data, False))
    here, there = device.context.memory.lease(), adalora.Context().memory.lease()
    for given, lease, text in (
        (on_host, here, "expected an array on cuda:0, found one in host memory"),
        (lying, here, "expected an array on cuda:0, found one in host memory"),
        (on_device, there, "expected an array in host memory, found one on a CUDA device"),
        (by_dlpack(on_device, FLOAT32), there, "expected an array in host memory, found one on cuda:0"),
        (Exported(4096, (4, 6), FLOAT32, (CUDA, 1)), here, "expected an array on cuda:0, found one on cuda:1"),
        (Exported(4096, (4, 6), FLOAT32), here, "expected an array on cuda:0, found one in host memory"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^x: {text}"):
            as_matrix(given, "x", shape=(4, 6), dtypes=(CODE,), lease=lease)


def test_another_device(device):
    count = ctypes.c_int()
    device.call("cudaGetDeviceCount", ctypes.byref(count))
    if count.value < 2:
        pytest.skip("one device")
    other = Device(1, library_folder=device_arrays.folder(software=True))
    adapter = Adapter(other.context, 6, 4, init_r=2)
    params = adapter.new_params(3)
    here = Adapter(device.context, 6, 4, init_r=2)
    for found, want in zip(params, here.new_params(3), strict=True):
        np.testing.assert_array_equal(found, want)
    with pytest.raises(InvalidArgumentError, match=r"^params\.A: expected an array on cuda:0, found one on cuda:1"):
        here.initialize(params, 1)


def waits(device: Device) -> int | None:
    """How often a stream was made to wait for an event; None where CUDA does not tell."""
    try:
        calls = device.library.software_cuda_calls_of
    except AttributeError:
        return None
    calls.restype = ctypes.c_int64
    return calls(b"cudaStreamWaitEvent")


@pytest.mark.parametrize("use", ["interface", "dlpack"])
def test_an_arrays_stream_comes_first(device, use):
    """What one stream writes and another one reads: without order, some round would be wrong."""
    writer = Adapter(device.context, 8, 16, init_r=3, dtype="float64")
    reader = Adapter(device.context, 8, 4, init_r=2, dtype="float64")
    first, second = device.stream(), device.stream()
    rng = np.random.default_rng(5)
    for _ in range(6):
        values = [Triplets(*(rng.normal(size=shape) for shape in adapter.shapes)) for adapter in (writer, reader)]
        made, params = (Triplets(*map(device.array, each)) for each in values)
        x, y = device.array(np.full((16, 8), np.nan)), device.array(np.zeros((16, 4)))
        device.synchronize()
        writer.delta_weight(made, x, stream=first)
        before = waits(device)
        if use == "interface":
            x.stream = first
            given = x
        else:
            given = by_dlpack(x, FLOAT64)
            device.synchronize()
        reader.call(given, params, y=y, stream=second).forward(stream=second)
        if use == "interface" and before is not None:
            assert waits(device) == before + 1
        if use == "dlpack":
            # The exporter is told our stream, and orders it.
            assert given.streams == [second]
        (A, E, B), (C, F, D) = values
        wanted_x = writer.scaling * (B * E) @ A
        want = reader.scaling * ((wanted_x @ C.T) * F) @ D.T
        np.testing.assert_allclose(np.asarray(y), want, rtol=1e-10, atol=1e-10)


def test_the_order_of_streams_leaves_the_current_context(device):
    if not hasattr(device.library, "software_cuda_calls_of"):
        pytest.skip("CUDA does not tell what was called")
    device.library.software_cuda_calls_of.restype = ctypes.c_int64
    array, lease = device.array(np.zeros(3)), device.context.memory.lease(device.stream())
    array.stream = device.stream()
    before = device.library.software_cuda_calls_of(b"cudaSetDevice")
    as_values(array, "x", dtype=np.float64, size=3, lease=lease)
    assert device.library.software_cuda_calls_of(b"cudaSetDevice") == before


def test_streams_that_need_no_order(device):
    lease = device.context.memory.lease(device.stream())
    array = device.empty((3,), np.float64)
    before = waits(device)
    for stream in (None, lease.stream):
        array.stream = stream
        as_values(array, "x", dtype=np.float64, size=3, lease=lease)
    # The legacy default stream by either of its names.
    array.stream = 1
    as_values(array, "x", dtype=np.float64, size=3, lease=device.context.memory.lease())
    assert waits(device) == before
    given = by_dlpack(array, FLOAT64)
    as_values(given, "x", dtype=np.float64, size=3, lease=device.context.memory.lease())
    assert given.streams == [1]


def test_rebind_orders_the_stream_that_it_is_given(device):
    """And not that of the first bind, which nothing waits for any longer: a capture would fail with it."""
    adapter = Adapter(device.context, 6, 4, init_r=2)
    allocator = Allocator(device.context, [adapter], target_r=1, total_step=10)
    rate, stream = device.array(np.array([0.1])), device.stream()
    run = allocator.bind_all([adapter.new_params(1)], hyper=Hyper(rate, weight_decay=rate))
    grads = [part.g.address for part in run.slices]
    rate.stream = stream
    device.synchronize()
    before = waits(device)
    device.call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(0))
    graph = ctypes.c_void_p()
    try:
        allocator.rebind(grads, [Hyper(rate, weight_decay=rate)], stream=stream)
    finally:
        device.call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
    assert waits(device) == before
    # What is given is held, also by a rebind that leaves it as it is.
    allocator.rebind(grads, stream=stream)
    device.call("cudaGraphDestroy", graph)


@pytest.mark.parametrize("stream", [-1, 1 << 64, "7", 1.5, object()])
def test_what_is_no_stream_is_refused(device, stream):
    adapter = Adapter(device.context, 6, 4, init_r=2)
    params, x, y = adapter.new_params(1), *(device.empty(shape, np.float32) for shape in ((5, 6), (5, 4)))
    with pytest.raises(InvalidArgumentError, match=r"^stream: expected the address of a cudaStream_t as an int, or No"):
        adapter.call(x, params, y=y, stream=stream)


def test_an_error_is_told_once(device):
    lease = device.context.memory.lease()
    with pytest.raises(adalora.AdaLoRAError, match=r"^cudaSetDevice: cudaErrorInvalidDevice \(101\)$"):
        lease.runtime.order(1 << 20, None, device.stream())
    assert device.library.cudaGetLastError() == 0


def test_folders_may_have_any_name(tmp_path):
    folder = tmp_path / "of (software) CUDA, new [2]; x"
    folder.symlink_to(device_arrays.folder(software=True))
    with adalora.Context("cuda", library_folder=folder) as context:
        assert f"({folder}/libcudart.so.13)" in context.describe()


def test_who_can_make_no_array_gives_all(bare, device):
    adapter = Adapter(bare, 6, 4, init_r=2)
    text = "expected an array on cuda:0, or a context with to_device to make one, found neither"
    with pytest.raises(InvalidArgumentError, match=f"^zeros: {text}"):
        adapter.new_params(1)
    new = lambda shape, dtype=np.float32: device.array(np.zeros(shape, dtype))  # noqa: E731
    params, grads = (Triplets(*map(new, adapter.shapes)) for _ in range(2))
    adapter.initialize(params, 1)
    x, y = new((5, 6)), new((5, 4))
    with pytest.raises(InvalidArgumentError, match=f"^workspace: {text}"):
        adapter.call(x, params, y=y)
    size = adalora.GroupCall([Share(adapter, params, y=y)], x, workspace=new(1 << 26, np.uint8)).workspace_bytes
    adalora.GroupCall([Share(adapter, params, y=y)], x, workspace=new(size, np.uint8)).forward()
    with pytest.raises(InvalidArgumentError, match=f"^workspace: expected at least {size} bytes, found {size - 64}"):
        adalora.GroupCall([Share(adapter, params, y=y)], x, workspace=new(size - 64, np.uint8))

    allocator = Allocator(bare, [adapter], target_r=1, total_step=10)
    own = [Triplets(*map(new, adapter.shapes)) for _ in range(4)]
    slices = [
        adalora.Slice(
            0,
            matrix,
            *(getattr(each, matrix) for each in (params, grads, *own[:2])),
            *(getattr(each, matrix) for each in own[2:]),
        )
        for matrix in "AEB"
    ]
    with pytest.raises(InvalidArgumentError, match=f"^state: {text}"):
        allocator.bind(slices)
    with pytest.raises(InvalidArgumentError, match=f"^lr: {text}"):
        Hyper(0.1, context=bare)
    state, workspace = (new(size, np.uint8) for size in allocator.sizes(3)[:2])
    with pytest.raises(InvalidArgumentError, match=r"^hypers\[0\]\.lr: expected an array on cuda:0, found one in host"):
        allocator.bind(slices, [Hyper(0.1)], state=state, workspace=workspace)
    rate = device.array(np.array([0.1]))
    allocator.bind(slices, [Hyper(rate, weight_decay=rate)], state=state, workspace=workspace)
    with pytest.raises(InvalidArgumentError, match=f"^step: {text}"):
        allocator.step(1)
    with pytest.raises(InvalidArgumentError, match=r"^step: expected values on cuda:0, .*found some in host memory"):
        allocator.step(StepValues(1))
    before = np.asarray(params.A)
    assert allocator.orthogonality(0.5) is None
    allocator.step(StepValues(device.array(np.array([1])), context=bare))
    assert allocator.read().last_step == 1
    assert (np.asarray(params.A) != before).any()
    digest = new(1, np.uint64)
    assert allocator.digest(digest) is None
    assert digest[0] != 0
    with pytest.raises(InvalidArgumentError, match=r"^digest: expected an array on cuda:0, found one in host memory"):
        allocator.digest()


def test_capsules_live_as_long_as_what_holds_addresses(device):
    adapter = Adapter(device.context, 6, 4, init_r=2, dtype="bfloat16")
    bits = [np.full(shape, 0x3F80, np.uint16) for shape in adapter.shapes]
    given = Triplets(*(by_dlpack(device.array(array), BFLOAT16) for array in bits))
    x = adalora.BFloat16(device.array(np.full((5, 6), 0x3F80, np.uint16)))
    y = adalora.BFloat16(device.array(np.zeros((5, 4), np.uint16)))
    call = adapter.call(x, given, y=y)
    gc.collect()
    assert [each.live for each in given] == [1, 1, 1]
    call.forward()
    want = adapter.scaling * 2 * 6
    found = adalora.BFloat16(np.asarray(y.bits)).to_float32()
    np.testing.assert_allclose(found, want, rtol=1e-2)
    del call
    gc.collect()
    assert [each.live for each in given] == [0, 0, 0]
