"""Time the library beside PEFT's AdaLoRA: one process, equal threads, turn by turn.

    bench.py [--quick] [--threads N ...] [--dtype float32 bfloat16] [--output FILE]

Prints a table and writes FILE (default: target/bench.json): `machine`, and `rows` with medians in milliseconds.
README.md beside this file says what each operation covers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "python_shim" / "examples"))
warnings.filterwarnings("ignore")
import adalora  # noqa: E402
import adalora.torch  # noqa: E402
import minilm_peft  # noqa: E402
import minilm_tweets  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from adalora.torch.functional import context  # noqa: E402
from torch import nn  # noqa: E402

ALPHA, ORTH_REG_WEIGHT, LR, MAX_NORM = 32, 0.5, 1e-4, 1.0
# A schedule that masks on every step of the benchmark, and is far from its end.
SCHEDULE = {"tinit": 1, "tfinal": 10, "deltaT": 1, "total_step": 1_000_000}
FIRST_STEP = 100
LINE = (
    "{operation:20} {layers:>6} {in_features:>5} {out_features:>5} {rank:>4} {tokens:>6} {dtype:>9} {threads:>7} "
    "{ours_ms:>9.3f} {peft_ms:>9.3f} {ratio:>6.2f}"
)
TITLES = f"{'operation':20} layers    in   out rank tokens     dtype threads   ours ms   PEFT ms  ratio"


class Shape(NamedTuple):
    """What is timed: that many layers, each with an adapter, on that many tokens."""

    layers: int
    in_features: int
    out_features: int
    rank: int
    tokens: int


SHAPES = [
    Shape(24, 768, 768, 12, 512),
    Shape(24, 768, 768, 12, 128),
    Shape(24, 768, 768, 12, 2048),
    Shape(24, 768, 768, 4, 512),
    Shape(24, 768, 768, 64, 512),
    Shape(24, 384, 1536, 12, 512),
    Shape(12, 768, 3072, 12, 512),
]


class Prepared(nn.Linear):
    """A base layer that costs nothing: it returns a y that was prepared."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape.in_features, shape.out_features, bias=False)
        self.register_buffer("y", torch.zeros(shape.tokens, shape.out_features, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, whatever x is."""
        return self.y.detach()


class Peft:
    """PEFT's side: a stack of layers, each called on an input of its own."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        base = nn.ModuleDict({str(k): Prepared(shape, dtype) for k in range(shape.layers)})
        config = peft.AdaLoraConfig(
            init_r=shape.rank,
            target_r=max(shape.rank // 3, 1),
            lora_alpha=ALPHA,
            orth_reg_weight=ORTH_REG_WEIGHT,
            target_modules=[str(k) for k in range(shape.layers)],
            **SCHEDULE,
        )
        self.model = peft.get_peft_model(base, config)
        self.layers = [self.model.base_model.model[str(k)] for k in range(shape.layers)]
        self.params = [layer_params(layer) for layer in self.layers]
        for _, E, _ in self.params:
            nn.init.normal_(E)
        self.trained = [p for triplets in self.params for p in triplets]
        self.x = [torch.randn(shape.tokens, shape.in_features).to(dtype).requires_grad_() for _ in self.layers]
        self.dy = [torch.randn(shape.tokens, shape.out_features).to(dtype) for _ in self.layers]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.01, fused=True)
        self.step_number = FIRST_STEP

    def forward_backward(self) -> None:
        """One pass through every adapter; gradients for A, E, B and x."""
        for p in (*self.trained, *self.x):
            p.grad = None
        for layer, x, dy in zip(self.layers, self.x, self.dy, strict=True):
            layer(x).backward(dy)

    def orthogonality(self) -> torch.Tensor:
        """The penalty as AdaLoraModel.forward computes it, and its gradient."""
        penalty = 0
        for A, _, B in self.params:
            for gram in (A @ A.T, B.T @ B):
                identity = torch.eye(*gram.size(), out=torch.empty_like(gram))
                penalty = penalty + torch.norm(gram - identity, p="fro")
        penalty = ORTH_REG_WEIGHT * penalty / (2 * len(self.params))
        penalty.backward()
        return penalty

    def optimizer_allocator(self) -> None:
        """Clipping, fused AdamW, importance, and a mask."""
        self.step_number += 1
        nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.step_number)


def layer_params(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, E and B of one of PEFT's layers."""
    return layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]


class Ours:
    """Our side, over arrays of its own that begin with PEFT's values."""

    def __init__(self, shape: Shape, dtype: torch.dtype, other: Peft) -> None:
        # On PyTorch's threads, as adalora.torch computes.
        self.context = context(torch.device("cpu"))
        activation = "bfloat16" if dtype == torch.bfloat16 else "float32"
        self.adapters = [
            adalora.Adapter(
                self.context,
                shape.in_features,
                shape.out_features,
                init_r=shape.rank,
                lora_alpha=ALPHA,
                activation_dtype=activation,
            )
            for _ in range(shape.layers)
        ]
        self.allocator = adalora.Allocator(
            self.context, self.adapters, target_r=max(shape.rank // 3, 1), beta1=0.85, beta2=0.85, **SCHEDULE
        )
        self.params = [adapter.zeros() for adapter in self.adapters]
        for own, theirs in zip(self.params, other.params, strict=True):
            for mine, p in zip((own.A, own.E, own.B), theirs, strict=True):
                mine[...] = p.detach().numpy().reshape(mine.shape)
        self.training = self.allocator.bind_all(self.params, hyper=adalora.Hyper(lr=LR, weight_decay=0.01))
        arrays = [
            (numpy_of(x), numpy_of(torch.zeros_like(dy)), numpy_of(dy), numpy_of(torch.zeros_like(x)))
            for x, dy in zip(other.x, other.dy, strict=True)
        ]
        self.kept = [np.zeros((shape.tokens, shape.rank), np.float32) for _ in self.adapters]
        self.calls = [
            adapter.call(x, params, grads=grads, y=y, dy=dy, dx=dx, h=h)
            for adapter, params, grads, (x, y, dy, dx), h in zip(
                self.adapters, self.params, self.training.grads, arrays, self.kept, strict=True
            )
        ]
        self.y, self.dx = [a[1] for a in arrays], [a[3] for a in arrays]
        self.sum_of_squares, self.factor = np.zeros(1), np.ones(1)
        self.found_inf, self.penalty = np.zeros(1, np.float32), np.zeros(1)
        self.step = adalora.StepValues(FIRST_STEP, grad_factor=self.factor, found_inf=self.found_inf)

    def forward_backward(self) -> None:
        """One pass through every adapter; gradients for A, E, B and x."""
        for call in self.calls:
            call.forward()
            call.backward(accumulate=False)

    def orthogonality(self) -> None:
        """The penalty and its gradient."""
        self.allocator.orthogonality(ORTH_REG_WEIGHT, value=self.penalty)

    def optimizer_allocator(self) -> None:
        """Clipping, AdamW with importance, and a mask."""
        self.step.step[0] += 1
        self.sum_of_squares[0] = self.found_inf[0] = 0
        self.allocator.gradient_norm(self.sum_of_squares, self.found_inf)
        self.context.gradient_factor(self.sum_of_squares, self.factor, max_norm=MAX_NORM)
        self.allocator.step(self.step)


def numpy_of(tensor: torch.Tensor) -> Any:
    """The same memory as an array; bfloat16 as the bits that the library reads."""
    tensor = tensor.detach().clone()
    if tensor.dtype == torch.bfloat16:
        return adalora.BFloat16(tensor.view(torch.uint16).numpy())
    return tensor.numpy()


def values(array: Any) -> np.ndarray:
    """An array as float32."""
    if isinstance(array, adalora.BFloat16):
        return (array.bits.astype(np.uint32) << 16).view(np.float32)
    return array


def check_equal(ours: Ours, other: Peft, tolerance: float) -> None:
    """Refuse to time two things that compute different results."""
    other.forward_backward()
    ours.forward_backward()

    def close(name: str, got: np.ndarray, want: torch.Tensor) -> None:
        reference = want.detach().float().numpy().reshape(got.shape)
        error = np.abs(got - reference).max() / np.abs(reference).max()
        if not error <= tolerance:
            raise SystemExit(f"{name}: relative error {error:.1e}, expected at most {tolerance:.0e}")

    for k, layer in enumerate(other.layers):
        close(f"layer {k}: y", values(ours.y[k]), layer.base_layer.y)
        close(f"layer {k}: dx", values(ours.dx[k]), other.x[k].grad)
        grads = ours.training.grads[k]
        for name, got, p in zip("AEB", (grads.A, grads.E, grads.B), other.params[k], strict=True):
            close(f"layer {k}: d{name}", got, p.grad)
    penalty = other.orthogonality()
    ours.orthogonality()
    close("penalty", ours.penalty, penalty)
    for k, (A, _, B) in enumerate(other.params):
        close(f"layer {k}: dA with the penalty", ours.training.grads[k].A, A.grad)
        close(f"layer {k}: dB with the penalty", ours.training.grads[k].B, B.grad)


class Demo:
    """One side of the demo: MiniLM on tweets, its training step on the same batches as the other side's."""

    def __init__(self, method: Any) -> None:
        self.job = minilm_tweets.Job(minilm_tweets.parse(["--seed", "0"]))
        self.batches = list(itertools.islice(self.job.batches(), 16))
        self.parts = self.job.build(method)
        self.parts[0].train()
        self.steps = 0

    def demo_step(self) -> torch.Tensor:
        """Forward, backward, penalty, AdamW with importance, and the mask where one is due; returns the loss."""
        inputs, labels = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        # The model's own dropout drops the same on both sides.
        torch.manual_seed(self.steps)
        return self.job.step(*self.parts, inputs, labels)

    def shape(self) -> Shape:
        """36 layers; most are 384 to 384, every sixth 384 to 1536 and back. Tokens as they are on average."""
        tokens = statistics.mean(inputs["input_ids"].numel() for inputs, _ in self.batches)
        return Shape(36, 384, 384, 12, round(tokens))


def demo_step(seconds: float) -> tuple[Shape, float, float]:
    """The shape of the demo's step, and medians in milliseconds of ours and of PEFT's."""
    ours, other = Demo(adalora.torch), Demo(minilm_peft)
    for _ in range(3):
        losses = ours.demo_step().item(), other.demo_step().item()
        if not abs(losses[0] - losses[1]) < 1e-4:
            raise SystemExit(f"demo_step: losses {losses}, expected to differ by less than 1e-4")
    return ours.shape(), *medians(ours.demo_step, other.demo_step, seconds)


def medians(a: Callable[[], Any], b: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Medians of both in milliseconds, turn by turn, so that a drift of the machine meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for f in (a, b, a, b):
        f()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 7:
        for f, list_ in zip((a, b), times, strict=True):
            begin = time.perf_counter()
            f()
            list_.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def machine(on: adalora.Context) -> dict[str, Any]:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in cpuinfo.splitlines()) if v}
    sets = [
        f for f in field.get("flags", "").split() if f in {"avx2", "fma", "f16c"} or f.startswith(("avx512", "amx"))
    ]
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": " ".join(field.get(k, "?") for k in ("model name", "cpu family", "model")),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": sets,
        "backend": on.describe(),
        "versions": {
            "adalora": adalora.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "peft": peft.__version__,
            "rustc": rustc,
        },
    }


def report(
    rows: list[dict[str, Any]],
    operation: str,
    shape: Shape,
    dtype: str,
    threads: int,
    ours_ms: float,
    peft_ms: float,
) -> None:
    """Keep a row, and print it."""
    row = {"operation": operation, **shape._asdict(), "dtype": dtype, "threads": threads}
    rows.append(row | {"ours_ms": ours_ms, "peft_ms": peft_ms, "ratio": peft_ms / ours_ms})
    print(LINE.format(**rows[-1]), flush=True)


def main() -> None:
    """Time what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first shape alone, for less time")
    parser.add_argument("--threads", type=int, nargs="+", help="default: all cores, and 1")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="activations")
    parser.add_argument("--output", type=Path, default=ROOT / "target" / "bench.json")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    shapes, seconds = (SHAPES[:1], 1.0) if options.quick else (SHAPES, 3.0)
    rows = []
    print(TITLES)
    for threads in options.threads or sorted({cores, 1}, reverse=True):
        torch.set_num_threads(threads)
        for shape, name in itertools.product(shapes, options.dtype):
            dtype = getattr(torch, name)
            torch.manual_seed(0)
            other = Peft(shape, dtype)
            ours = Ours(shape, dtype, other)
            check_equal(ours, other, 1e-4 if name == "float32" else 2e-2)
            # What comes after the passes does not read activations, so that it is timed once.
            operations = ["forward_backward"]
            if name == "float32":
                operations += ["orthogonality", "optimizer_allocator"]
            for operation in operations:
                ours_ms, peft_ms = medians(getattr(ours, operation), getattr(other, operation), seconds)
                report(rows, operation, shape, name, threads, ours_ms, peft_ms)
        if "float32" in options.dtype:
            shape, ours_ms, peft_ms = demo_step(5 * seconds)
            report(rows, "demo_step", shape, "float32", threads, ours_ms, peft_ms)
    document = {"machine": machine(ours.context), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
