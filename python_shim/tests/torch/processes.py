"""Processes that compute together over gloo: started once, and given one function after the other."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 120


class Processes:
    """Processes of one group.

    Args:
        size: how many.
        folder: where they find each other.

    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self._begun = size, folder, 0
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function, which a module has by name, returns in each of them."""
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((function, args))
            return self._results()
        except BaseException:
            # Others may wait for the one that failed.
            self.end()
            raise

    def end(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._begun += 1
        spawn = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            here, there = spawn.Pipe()
            args = there, rank, self.size, self.folder / f"store{self._begun}"
            self._processes.append(spawn.Process(target=_serve, args=args, daemon=True))
            self._pipes.append(here)
            self._processes[-1].start()
            there.close()

    def _results(self) -> list[Any]:
        results: dict[int, Any] = {}
        end = time.monotonic() + TIMEOUT
        while len(results) < self.size:
            missing = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(missing, max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"expected results from {self.size} processes, found {len(results)}")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                failed, results[rank] = pipe.recv()
                if failed:
                    raise AssertionError(f"process {rank}: {results[rank]}")
        return [results[rank] for rank in range(self.size)]


def _serve(pipe: Connection, rank: int, size: int, store: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
