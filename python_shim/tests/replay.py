#!/usr/bin/env python3
"""Replay recorded training runs through the C interface, step by step, and compare every recorded tensor.

    replay.py [--library FILE] [--dtype float32|float64] [--device cpu|software-cuda|cuda] [--threads N] FOLDER...

A folder holds cases, each as NAME.json (what the run is made from, and its log) and NAME.safetensors; the README of
golden/ beside this file names the tensors. The base layers and the loss are NumPy, in the run's type; adapters,
orthogonality, AdamW, importance and selection are the library's.

On "software-cuda" and "cuda" all arrays lie in device memory: of the stand-in that building the C++ tests makes, and
of a GPU, by the libraries in ADALORA_CUDA_FOLDER where that is set; base layers and loss stay on the host.

Each case runs twice: once with `update`, `scores` and `select` as calls of their own, told what is not finite, and once
with `step`, which is the three and looks itself; both meet the recording, and each other bit for bit. Both go through
the ways in which a forward and backward pass can be asked for: with h kept, in stages, and with h computed again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

# The package of this checkout, where none is installed.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))
import device_arrays

import adalora
from adalora import Stage, Triplets

# What has to agree with the recording: everything but the run's start and its batches.
COMPARED = re.compile(
    r"step/\d+/\d+/(x|y|dy|dx|[AEB]|d[AEB]|d[AEB]_task|delta_weight|[AEB]_after_adamw|E_after_allocate"
    r"|exp_avg_(ipt|unc)_[AEB])|final/\d+/([AEB]|delta_weight)"
)
KNOWN = re.compile(COMPARED.pattern + r"|init/\d+/(W|bias|A|E|B)|step/\d+/(x|target)")


class Mismatch(Exception):
    """The run and its recording differ in something that has no tolerance."""


@dataclass
class Comparison:
    """Compares named tensors with the recorded ones, and remembers the worst."""

    recorded: dict[str, np.ndarray]
    worst: float = 0.0
    where: str = ""
    seen: set[str] = field(default_factory=set)

    def tensor(self, name: str, array: Any) -> None:
        """Compare a tensor, if it is recorded."""
        if name not in self.recorded:
            return
        self.seen.add(name)
        got = np.asarray(array)
        want = self.recorded[name].astype(np.float64)
        if got.size != want.size:
            raise Mismatch(f"{name}: shape {got.shape}, recorded {want.shape}")
        scale = np.abs(want).max(initial=0.0)
        self.error(name, np.abs(got.astype(np.float64).reshape(want.shape) - want), scale)

    def number(self, name: str, got: float, want: float) -> None:
        """Compare a number."""
        self.error(name, np.array([abs(got - want)]), abs(want))

    def error(self, name: str, difference: np.ndarray, scale: float) -> None:
        """Take an error in: absolute differences, and the largest element that they are relative to."""
        # A NaN is the worst there is, and stays so.
        relative = difference.max(initial=0.0) / max(scale, 1e-12)
        if not relative <= self.worst and not np.isnan(self.worst):
            self.worst, self.where = float(relative), name


@dataclass
class Base:
    """A frozen base layer."""

    W: np.ndarray
    bias: np.ndarray | None

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Its output; W is [out, in] here."""
        y = x @ self.W.T
        return y if self.bias is None else y + self.bias


@dataclass
class Buffers:
    """The arrays that one layer's adapter works on, where it computes, and its prepared calls."""

    x: Any
    y: Any
    dy: Any
    dx: Any
    grads: Triplets
    keeping: adalora.GroupCall
    staged: adalora.GroupCall
    computing_again: adalora.GroupCall

    @classmethod
    def make(cls, adapter: adalora.Adapter, params: Triplets, grads: Triplets, tokens: int) -> Buffers:
        """Buffers for a number of tokens."""
        sizes = adapter.in_features, adapter.out_features, adapter.init_r
        x, dx, y, dy, h, g = (
            adapter.memory.array(np.zeros((tokens, n), params.A.dtype), "buffers") for n in sizes for _ in range(2)
        )
        call = lambda **saved: adapter.call(x, params, grads=grads, y=y, dy=dy, dx=dx, **saved)  # noqa: E731
        return cls(x, y, dy, dx, grads, keeping=call(h=h), staged=call(h=h, g=g), computing_again=call())

    def forward(self, way: int) -> None:
        """Add the adapter's output to y."""
        if way == 0:
            self.keeping.forward()
        elif way == 1:
            self.staged.forward(Stage.PROJECT)
            self.staged.forward(Stage.EXPAND)
        else:
            self.computing_again.forward()

    def backward(self, way: int) -> None:
        """Write the gradients, and add to dx."""
        if way == 0:
            self.keeping.backward(accumulate=False)
        elif way == 1:
            self.staged.backward(Stage.PROJECT, accumulate=False)
            self.staged.backward(Stage.EXPAND, accumulate=False)
        else:
            for array in self.grads:
                array[...] = 0
            self.computing_again.backward(accumulate=True)


class Run:
    """One case on the library."""

    def __init__(
        self, context: adalora.Context, case: dict[str, Any], recorded: dict[str, np.ndarray], dtype: str
    ) -> None:
        self.case, self.recorded, self.memory = case, recorded, context.memory
        self.dtype = np.dtype(dtype)
        self.conv1d = case.get("fan_in_fan_out", False)
        self.n_layers = len(case["dims"])
        self.base, self.params, self.adapters = [], [], []
        for k, (in_features, out_features) in enumerate(case["dims"]):
            W = self.initial(f"{k}/W")
            bias = self.initial(f"{k}/bias") if f"init/{k}/bias" in recorded else None
            self.base.append(Base(W.T.copy() if self.conv1d else W, bias))
            self.params.append(
                Triplets(*(self.memory.array(self.initial(f"{k}/{matrix}"), "params") for matrix in "AEB"))
            )
            self.adapters.append(
                adalora.Adapter(
                    context,
                    in_features,
                    out_features,
                    init_r=self.params[k].A.shape[0],
                    lora_alpha=case["lora_alpha"],
                    dtype=dtype,
                )
            )
        self.allocator = adalora.Allocator(
            context,
            self.adapters,
            target_r=case["target_r"],
            tinit=case["tinit"],
            tfinal=case["tfinal"],
            total_step=case["total_step"],
            deltaT=case["delta_t"],
            beta1=case["beta1"],
            beta2=case["beta2"],
            budget_unit=case.get("budget_unit", "triplets"),
        )
        hyper = adalora.Hyper(
            case["lr"],
            weight_decay=case["weight_decay"],
            betas=tuple(case["adam_betas"]),
            eps=case["adam_eps"],
            context=context,
        )
        self.training = self.allocator.bind_all(self.params, hyper=hyper)
        self.found_inf = self.memory.array(np.zeros(1, np.float32), "found_inf")
        self.penalty = self.memory.array(np.zeros(1), "penalty")
        self.looks_itself = self.training.values
        self.is_told = adalora.StepValues(
            self.looks_itself.step,
            grad_factor=self.looks_itself.grad_factor,
            found_inf=self.found_inf,
            has_grad=self.looks_itself.has_grad,
            context=context,
        )
        self.buffers: list[Buffers] = []

    def initial(self, name: str) -> np.ndarray:
        """A tensor of the run's start, in the run's type."""
        return self.recorded[f"init/{name}"].astype(self.dtype)

    def delta_weight(self, k: int) -> np.ndarray:
        """B diag(E) A, scaled, in the layout of the base weight."""
        adapter = self.adapters[k]
        shape = (adapter.out_features, adapter.in_features)
        w = self.memory.array(np.full(shape[::-1] if self.conv1d else shape, np.nan, self.dtype), "w")
        adapter.delta_weight(self.params[k], w, fan_in_fan_out=self.conv1d)
        return np.asarray(w)

    def pass_through(self, t: int, way: int, scale: float, compare: Comparison) -> float:
        """Forward, task loss and backward of one step; returns the loss."""
        x = self.recorded[f"step/{t}/x"].astype(self.dtype)
        target = self.recorded[f"step/{t}/target"].astype(self.dtype)
        if not self.buffers or len(self.buffers[0].x) != len(x):
            make = zip(self.adapters, self.params, self.training.grads, strict=True)
            self.buffers = [Buffers.make(adapter, params, grads, len(x)) for adapter, params, grads in make]
        for k, buffers in enumerate(self.buffers):
            for matrix, array in self.params[k]._asdict().items():
                compare.tensor(f"step/{t}/{k}/{matrix}", array)
            buffers.x[...] = x
            buffers.y[...] = self.base[k].forward(x)
            buffers.forward(way)
            compare.tensor(f"step/{t}/{k}/x", buffers.x)
            compare.tensor(f"step/{t}/{k}/y", buffers.y)
            if f"step/{t}/{k}/delta_weight" in self.recorded:
                compare.tensor(f"step/{t}/{k}/delta_weight", self.delta_weight(k))
            x = np.asarray(buffers.y)
            x = np.tanh(x) if k + 1 < self.n_layers else x
        loss = float(np.mean((x - target) ** 2, dtype=np.float64))
        dy = self.dtype.type(scale * 2) * (x - target) / self.dtype.type(x.size)
        for k in reversed(range(self.n_layers)):
            buffers = self.buffers[k]
            buffers.dy[...] = dy
            buffers.dx[...] = dy @ self.base[k].W
            buffers.backward(way)
            compare.tensor(f"step/{t}/{k}/dy", buffers.dy)
            compare.tensor(f"step/{t}/{k}/dx", buffers.dx)
            for matrix, array in self.training.grads[k]._asdict().items():
                compare.tensor(f"step/{t}/{k}/d{matrix}_task", array)
            dy = np.asarray(buffers.dx) * (1 - np.asarray(buffers.x) ** 2)
        return loss

    def step(self, n: int, want: dict[str, Any], combined: bool, compare: Comparison) -> None:
        """The n-th step of the run, with the log entry that it has to meet."""
        t, allocator, training = want["step"], self.allocator, self.training
        event = self.case.get("events", {}).get(str(t), {})
        scale = event.get("loss_scale", 1.0)
        loss = self.pass_through(t, n % 3, scale, compare)
        allocator.orthogonality(self.case["orth_reg_weight"], factor=scale, value=self.penalty)
        penalty = float(self.penalty[0])
        compare.number(f"step/{t}/task_loss", loss, want["task_loss"])
        compare.number(f"step/{t}/total_loss", loss + penalty, want["total_loss"])
        for name, array in gradients(training):
            k, matrix = name.split("/")
            compare.tensor(f"step/{t}/{k}/d{matrix}", array)
        poke = event.get("non_finite")
        if poke:
            gradient = getattr(training.grads[poke["layer"]], poke["matrix"])
            gradient[np.unravel_index(poke["index"], gradient.shape)] = float(poke["value"])
        self.gradient_norm(t, bool(poke), compare)
        idle = event.get("idle", ())
        # The library finds what is not finite itself, or is told: among gradients that it does not read it has to be.
        told = not combined or (poke and poke["layer"] in idle)
        values = self.is_told if told else self.looks_itself
        values.step[0] = t
        values.grad_factor[0] = event.get("clip", 1.0) / scale
        values.has_grad[:] = [k not in idle for k in range(self.n_layers)]
        budget = allocator.budget(t)
        agree(f"step {t}: budget", budget.budget, want["budget"])
        agree(f"step {t}: scheduled mask", budget.masks, want["scheduled_mask"])
        if combined:
            allocator.step(values)
        else:
            allocator.update(values)
            for k, params in enumerate(self.params):
                compare.tensor(f"step/{t}/{k}/E_after_adamw", params.E)
            allocator.select(values, allocator.scores())
        self.compare_standing(t, want, compare)

    def gradient_norm(self, t: int, poked: bool, compare: Comparison) -> None:
        """Whether a gradient is infinite, by the library, and the sum of their squares."""
        sum_of_squares = self.memory.array(np.zeros(1), "sum_of_squares")
        self.found_inf[0] = 0
        self.allocator.gradient_norm(sum_of_squares, self.found_inf)
        agree(f"step {t}: found_inf", bool(self.found_inf[0]), poked)
        if not poked:
            squares = sum(np.sum(np.asarray(array, np.float64) ** 2) for _, array in gradients(self.training))
            compare.number(f"step/{t}/sum_of_squares", float(sum_of_squares[0]), float(squares))

    def compare_standing(self, t: int, want: dict[str, Any], compare: Comparison) -> None:
        """What holds after the selection of a step."""
        standing = self.allocator.read()
        kept = [pattern.tolist() for pattern in standing.pattern] if standing.has_pattern else None
        agree(f"step {t}: kept", kept, None if want["kept"] is None else [list(map(bool, q)) for q in want["kept"]])
        agree(f"step {t}: skipped", standing.skipped, want.get("skipped", 0))
        for k, params in enumerate(self.params):
            compare.tensor(f"step/{t}/{k}/A_after_adamw", params.A)
            compare.tensor(f"step/{t}/{k}/B_after_adamw", params.B)
            compare.tensor(f"step/{t}/{k}/E_after_allocate", params.E)
            for average in ("exp_avg_ipt", "exp_avg_unc"):
                for matrix, array in getattr(self.training, average)[k]._asdict().items():
                    if standing.is_final and np.asarray(array).any():
                        raise Mismatch(f"step {t}: {average} of layer {k}, {matrix}, is not cleared at the end")
                    compare.tensor(f"step/{t}/{k}/{average}_{matrix}", array)

    def all_bits(self) -> bytes:
        """Everything that a later step depends on."""
        arrays = b"".join(np.asarray(array).tobytes() for _, array in self.training.named_arrays())
        return arrays + self.allocator.save_state()


def gradients(training: adalora.Training) -> Iterator[tuple[str, Any]]:
    """The gradients, with names such as `0/A`."""
    for k, grads in enumerate(training.grads):
        for matrix, array in grads._asdict().items():
            yield f"{k}/{matrix}", array


def agree(what: str, got: object, want: object) -> None:
    """Refuse any difference."""
    if got != want:
        raise Mismatch(f"{what}: {got}, recorded {want}")


def replay(context: adalora.Context, meta: Path, dtype: str) -> tuple[Comparison, float]:
    """Run one case in both ways; returns the comparison and the tolerance that it has to meet."""
    document = json.loads(meta.read_text())
    case, log = document["case"], document["steps"]
    recorded = load_file(meta.with_suffix(".safetensors"))
    compare = Comparison(recorded)
    separate, combined = (Run(context, case, recorded, dtype) for _ in range(2))
    for n, want in enumerate(log):
        separate.step(n, want, combined=False, compare=compare)
        combined.step(n, want, combined=True, compare=compare)
        if separate.all_bits() != combined.all_bits():
            raise Mismatch(f"step {want['step']}: `step` and its parts differ in their bits")
    for k, params in enumerate(separate.params):
        for matrix, array in params._asdict().items():
            compare.tensor(f"final/{k}/{matrix}", array)
        compare.tensor(f"final/{k}/delta_weight", separate.delta_weight(k))
    missed = sorted(name for name in recorded if COMPARED.fullmatch(name) and name not in compare.seen)
    if missed:
        raise Mismatch(f"{len(missed)} recorded tensors were not met, such as {missed[0]}")
    if dtype == "float32":
        return compare, 1e-4
    return compare, 2e-6 if case.get("store") == "float32" else 1e-10


def replay_folder(folder: Path, run: Callable[[Path], tuple[Comparison, float]]) -> bool:
    """Replay all cases of a folder, a line each; returns whether there are any and all agree."""
    names = {file.stem for suffix in ("json", "safetensors") for file in folder.glob(f"*.{suffix}")}
    if not names:
        print(f"FAIL {folder}: no case")
        return False
    good = True
    for name in sorted(names):
        meta = folder / f"{name}.json"
        try:
            compare, tolerance = run(meta)
        except Exception as error:  # Whatever is wrong with one case, the others are replayed.
            print(f"FAIL {name:12} {type(error).__name__}: {error}")
            good = False
            continue
        ok = compare.worst <= tolerance
        good &= ok
        unknown = [tensor for tensor in compare.recorded if not KNOWN.fullmatch(tensor)]
        note = f", {len(unknown)} of unknown name not compared, such as {unknown[0]}" if unknown else ""
        print(
            f"{'ok  ' if ok else 'FAIL'} {name:12} worst relative error {compare.worst:.1e} at {compare.where or '-'} "
            f"(tolerance {tolerance:.0e}, {len(compare.seen)} tensors{note})"
        )
    return good


def make_context(options: argparse.Namespace) -> adalora.Context:
    """What computes."""
    if options.device == "cpu":
        return adalora.Context(threads=options.threads, library=options.library)
    folder = device_arrays.folder(options.device == "software-cuda")
    return device_arrays.Device(library_folder=folder, library=options.library).context


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="the native library; else the package's")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--device", choices=["cpu", "software-cuda", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0: as many as the process may run on")
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    try:
        context = make_context(options)
    except adalora.AdaLoRAError as error:
        parser.error(str(error))
    with context:
        results = [replay_folder(folder, partial(replay, context, dtype=options.dtype)) for folder in options.folders]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
