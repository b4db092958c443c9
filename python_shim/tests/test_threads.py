"""Python threads beside each other, and children of a fork."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_allocator import Model

import adalora
from adalora import Triplets


class Layer:
    """A prepared pass over random arrays, and what it gave the first time."""

    def __init__(self, context: adalora.Context, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.adapter = adalora.Adapter(context, 97, 61, init_r=6, lora_dropout=0.2)
        params = Triplets(*(rng.normal(size=shape).astype(np.float32) for shape in self.adapter.shapes))
        self.grads = self.adapter.zeros()
        x, dy = (rng.normal(size=(200, n)).astype(np.float32) for n in (97, 61))
        self.y, self.dx = np.zeros_like(dy), np.zeros_like(x)
        drop = adalora.Dropout(seed, 1)
        self.call = self.adapter.call(x, params, dx=self.dx, grads=self.grads, y=self.y, dy=dy, dropout=drop)
        self.want = self.run()

    def run(self) -> bytes:
        """Forward and backward; everything that they gave."""
        self.y[...] = 0
        self.dx[...] = 0
        self.call.forward()
        self.call.backward(accumulate=False)
        return b"".join(array.tobytes() for array in (self.y, self.dx, *self.grads))


@pytest.mark.parametrize("native_threads", [1, 3])
def test_layers_run_side_by_side(native_threads: int) -> None:
    with adalora.Context(threads=native_threads) as context:
        layers = [Layer(context, seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(50):
                for layer, got in zip(layers, pool.map(Layer.run, layers), strict=True):
                    assert got == layer.want


def test_one_adapter_serves_several_threads(context: adalora.Context) -> None:
    layers = [Layer(context, 3) for _ in range(2)]
    calls = [
        adalora.GroupCall(
            [share._replace(adapter=layers[0].adapter) for share in layer.call.shares], layer.call.x, dx=layer.dx
        )
        for layer in layers
    ]
    for layer, call in zip(layers, calls, strict=True):
        layer.call = call
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            assert [layer.want for layer in layers] == list(pool.map(Layer.run, layers))


def test_objects_close_while_another_thread_computes(context: adalora.Context) -> None:
    for _ in range(20):
        layer, stop = Layer(context, 1), threading.Event()

        def work(layer: Layer = layer, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                assert layer.run() == layer.want

        thread = threading.Thread(target=work)
        thread.start()
        layer.adapter.close()
        stop.set()
        thread.join()


def test_allocators_take_turns_with_themselves(context: adalora.Context) -> None:
    model = Model.make(context)
    failures = []

    def work(first: int) -> None:
        try:
            for step in range(first, 400, 4):
                model.allocator.update(step % 10)
                model.allocator.scores()
                model.allocator.read()
        except adalora.AdaLoRAError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.allocator.read().adam_steps == [400] * 4


def _in_child(layer: Layer, results: multiprocessing.Queue) -> None:
    got = [layer.run() == layer.want for _ in range(3)]
    with adalora.Context(threads=2) as fresh:
        got.append(Layer(fresh, 5).run() is not None)
    layer.adapter.close()
    results.put(got)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_of_a_fork_compute(context: adalora.Context) -> None:
    context.prepare()
    layer = Layer(context, 5)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    children = [fork.Process(target=_in_child, args=(layer, results)) for _ in range(3)]
    for child in children:
        child.start()
    for _ in children:
        assert results.get(timeout=60) == [True] * 4
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert layer.run() == layer.want


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_may_leave_without_closing_anything(context: adalora.Context) -> None:
    layer = Layer(context, 6)
    child = os.fork()
    if child == 0:
        os._exit(0 if layer.run() == layer.want else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
