"""Lifetime of the objects, their errors, callbacks, and what they refuse."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import adalora
from adalora import _bindings as c


def make_all(context: adalora.Context) -> dict[str, Any]:
    """One object of each kind."""
    adapter = adalora.Adapter(context, 3, 2, init_r=2)
    allocator = adalora.Allocator(context, [adapter], target_r=1, total_step=10)
    call = adapter.call(np.zeros((4, 3), np.float32), adapter.new_params(1), y=np.zeros((4, 2), np.float32))
    return {
        "context": context,
        "adapter": adapter,
        "allocator": allocator,
        "call": call,
        "values": adalora.StepValues(1),
    }


def test_objects_cannot_be_copied_or_pickled(context: adalora.Context) -> None:
    for thing in make_all(context).values():
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=rf"a {type(thing).__name__} belongs to .* cannot be copied or pickled"):
                way(thing)


def test_closed_objects_say_so() -> None:
    context = adalora.Context(threads=1)
    made = make_all(context)
    for name in ("context", "adapter", "allocator"):
        thing = made[name]
        with thing as entered:
            assert entered is thing
            assert not thing.closed
        thing.close()
        assert thing.closed
    with pytest.raises(adalora.InvalidHandleError, match="this Context is closed"):
        context.describe()
    with pytest.raises(adalora.InvalidHandleError, match="this Context is closed"):
        adalora.Adapter(context, 1, 1)
    with pytest.raises(adalora.InvalidHandleError, match="this Adapter is closed"):
        made["adapter"].new_params(1)
    with pytest.raises(adalora.InvalidHandleError, match="this Allocator is closed"):
        made["allocator"].budget(1)
    # What a prepared call needs, it keeps.
    made["call"].forward()


@pytest.mark.parametrize("order", list(itertools.permutations(["context", "adapter", "allocator"])))
def test_objects_close_in_any_order(order: tuple[str, ...]) -> None:
    made = make_all(adalora.Context(threads=2))
    made["call"].forward()
    for name in order:
        made[name].close()
        if not made["allocator"].closed:
            assert made["allocator"].budget(0).budget == 2
        if not made["adapter"].closed:
            assert made["adapter"].new_params(3).A.any()


def test_dropped_objects_are_destroyed() -> None:
    context = adalora.Context(threads=1)
    watched = []
    for thing in list(make_all(context).values())[1:3]:
        watched.append(weakref.ref(thing.handle))
    del thing
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_bound_arrays_live_as_long_as_the_library_needs_them(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 3, 2, init_r=2)
    allocator = adalora.Allocator(context, [adapter], target_r=1, total_step=10)
    training = allocator.bind_all([adapter.new_params(1)])
    watched = weakref.ref(training.grads[0].A)
    del training
    gc.collect()
    assert watched() is not None
    allocator.bind_all([adapter.new_params(1)])
    gc.collect()
    assert watched() is None


def test_describe(library: adalora.Library) -> None:
    with adalora.Context(threads=3) as context:
        text = context.describe()
        assert "3" in text
        assert ".".join(map(str, library.version)) in text


def test_context_arguments_are_checked() -> None:
    with pytest.raises(adalora.InvalidArgumentError, match="backend: expected one of cpu, cuda, found 'gpu'"):
        adalora.Context("gpu")
    with pytest.raises(adalora.InvalidArgumentError, match="threads"):
        adalora.Context(threads=-1)
    with pytest.raises(adalora.InvalidArgumentError, match="device"):
        adalora.Context(device=1)
    with pytest.raises(adalora.InvalidArgumentError, match="cublas_handle"):
        adalora.Context(cublas_handle=64)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("in_features", {"in_features": 0}),
        ("out_features", {"out_features": -3}),
        ("rank", {"init_r": -1}),
        ("alpha", {"lora_alpha": -1.0}),
        ("alpha", {"lora_alpha": float("nan")}),
        ("dropout", {"lora_dropout": 1.0}),
        ("dropout", {"lora_dropout": float("nan")}),
        ("activation_dtype", {"dtype": "float64", "activation_dtype": "float32"}),
        ("operand_terms", {"operand_terms": 4}),
        ("in_local", {"in_local": 9}),
        ("in_begin", {"in_local": 2, "in_begin": 7}),
        ("out_local", {"out_local": -1}),
    ],
)
def test_adapter_arguments_are_checked(context: adalora.Context, field: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"in_features": 8, "out_features": 8, "init_r": 2} | wrong
    with pytest.raises(adalora.InvalidArgumentError, match=field):
        adalora.Adapter(context, **arguments)


def test_errors_belong_to_their_thread(context: adalora.Context, library: adalora.Library) -> None:
    found: dict[str, str] = {}
    barrier = threading.Barrier(2)

    def fail(field: str, **wrong: Any) -> None:
        for _ in range(200):
            barrier.wait()
            with pytest.raises(adalora.InvalidArgumentError) as caught:
                adalora.Adapter(context, **({"in_features": 4, "out_features": 4} | wrong))
            assert field in str(caught.value)
        found[field] = library.adalora_last_error().decode()

    threads = [
        threading.Thread(target=fail, args=("in_features",), kwargs={"in_features": -1}),
        threading.Thread(target=fail, args=("dropout",), kwargs={"lora_dropout": 2.0}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {"in_features", "dropout"}
    assert "in_features" in found["in_features"] and "dropout" in found["dropout"]


def test_a_callers_threads_compute(context: adalora.Context, rng: np.random.Generator) -> None:
    asked = []

    def parallel(body: Any, data: int, threads: int, flags: int) -> None:
        asked.append((threads, flags))
        others = [threading.Thread(target=body, args=(data,)) for _ in range(threads - 1)]
        for other in others:
            other.start()
        body(data)
        for other in others:
            other.join()

    x = rng.normal(size=(257, 300)).astype(np.float32)
    results = []
    function = c.adalora_parallel_fn(parallel)
    address = ctypes.cast(function, ctypes.c_void_p).value
    for own in (function, address, None):
        with adalora.Context(threads=2, parallel=own) as one:
            adapter = adalora.Adapter(one, 300, 200, init_r=8)
            params = adapter.new_params(5)
            params.E[:] = 1
            y = np.zeros((257, 200), np.float32)
            adapter.call(x, params, y=y).forward()
            results.append(y)
    assert asked and all(threads <= 2 and flags == 0 for threads, flags in asked)
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[2])


def test_log_messages_arrive() -> None:
    messages: list[tuple[int, str]] = []
    with adalora.Context(threads=2, log=lambda level, text: messages.append((level, text))) as context:
        context.prepare()
        adapter = adalora.Adapter(context, 4, 4, init_r=2)
        adalora.Allocator(context, [adapter], target_r=1, total_step=10)
    assert messages
    assert all(level in (c.ADALORA_LOG_WARNING, c.ADALORA_LOG_INFO) and text for level, text in messages)


def test_shares_have_to_be_given(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 3, 2, init_r=2)
    with pytest.raises(adalora.InvalidArgumentError, match="shares: expected at least one"):
        adalora.GroupCall([], np.zeros((1, 3), np.float32))
    with pytest.raises(adalora.InvalidArgumentError, match="to count tokens by"):
        adapter.call(None, adapter.new_params(1))


def test_arguments_of_a_group_are_named_with_their_share(context: adalora.Context) -> None:
    adapters = [adalora.Adapter(context, 3, 2, init_r=2) for _ in range(2)]
    x, y = np.zeros((5, 3), np.float32), np.zeros((5, 2), np.float32)
    good = adalora.Share(adapters[0], adapters[0].new_params(1), y=y)
    params = adapters[1].new_params(2)
    for field, wrong, text in (
        ("y", np.zeros((4, 2), np.float32), r"expected shape \[5, 2\], found \[4, 2\]"),
        ("dy", np.zeros((5, 2)), "expected an array of float32, found float64"),
        ("h", np.zeros((2, 5), np.float32).T, "without gaps"),
        ("g", np.zeros((5, 3), np.float32), r"expected shape \[5, 2\]"),
        ("pattern", np.ones(3, np.uint8), r"expected shape \[2\], found \[3\]"),
        ("pattern", np.ones(2, np.int32), "expected an array of uint8 or bool, found int32"),
        ("grads", adapters[1].zeros()._replace(E=np.zeros(3, np.float32)), r"expected shape \[2\], found \[3\]"),
        ("dropout", adalora.Dropout(np.zeros(1, np.int64)), "expected an array of uint64, found int64"),
    ):
        with pytest.raises(adalora.InvalidArgumentError, match=rf"^shares\[1\]\.{field}.*: .*{text}"):
            adalora.GroupCall([good, adalora.Share(adapters[1], params, **{field: wrong})], x)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^dx: .*read-only"):
        adapters[0].call(x, params, dx=np.broadcast_to(np.float32(0), (5, 3)))


def test_overlapping_outputs_are_refused(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 4, 4, init_r=2)
    x = np.zeros((5, 4), np.float32)
    with pytest.raises(adalora.InvalidArgumentError, match="overlap"):
        adapter.call(x, adapter.new_params(1), y=x).forward()
