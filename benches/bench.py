"""Time the library beside PEFT's AdaLoRA: one process, equal threads, turn by turn.

    bench.py [--quick] [--threads N ...] [--dtype float32 bfloat16] [--compile] [--output FILE]

Prints a table and writes FILE (default: target/bench.json): `machine`, and `rows` with medians in milliseconds.
README.md beside this file says what each operation covers; plot.py draws what FILE holds.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
COLUMNS = {
    "operation": "{:26}", "layers": "{:>6}", "in_features": "{:>5}", "out_features": "{:>5}", "rank": "{:>4}",
    "live_rank": "{:>4}", "tokens": "{:>6}", "dtype": "{:>8}", "threads": "{:>7}", "ours_ms": "{:>9}",
    "peft_ms": "{:>9}", "compiled_ms": "{:>9}", "lora_ms": "{:>9}", "floor_ms": "{:>9}", "ratio": "{:>6}",
    "over_floor": "{:>6}",
}  # fmt: skip
TITLES = (
    *("operation", "layers", "in", "out", "rank", "live", "tokens", "dtype", "threads"),
    *("ours ms", "PEFT ms", "compiled", "LoRA ms", "floor ms", "ratio", "/floor"),
)
# Calls that are timed together where one takes microseconds.
CALLS = 1000
# Elements that are copied, and rounds of multiply-adds, to see what the machine can do.
COPIED, ROUNDS = 1 << 26, 1_000_000


class Shape(NamedTuple):
    """What is timed: that many layers, each with an adapter, on that many tokens."""

    layers: int
    in_features: int
    out_features: int
    rank: int
    tokens: int

    @property
    def parameters(self) -> int:
        """Elements of A, E and B of all layers."""
        return self.layers * self.rank * (self.in_features + self.out_features + 1)


SHAPES = [
    Shape(24, 768, 768, 12, 512),
    # How cost grows with tokens, rank and layers.
    Shape(24, 768, 768, 12, 64),
    Shape(24, 768, 768, 12, 128),
    Shape(24, 768, 768, 12, 2048),
    Shape(12, 768, 768, 12, 4096),
    Shape(24, 768, 768, 4, 512),
    Shape(24, 768, 768, 64, 512),
    # As allocation leaves it: no multiple of anything.
    Shape(24, 768, 768, 7, 512),
    Shape(12, 768, 768, 12, 512),
    Shape(36, 768, 768, 12, 512),
    Shape(224, 768, 768, 12, 64),
    # Other widths.
    Shape(24, 384, 1536, 12, 512),
    Shape(12, 768, 3072, 12, 512),
    Shape(12, 1024, 4096, 12, 512),
    Shape(6, 4096, 4096, 12, 512),
    # Parameters, gradients, moments and averages take a gigabyte, more than any cache holds.
    Shape(224, 4096, 4096, 12, 64),
]


class Machine(NamedTuple):
    """What some threads of this machine can do, at most."""

    bytes_per_ms: float
    """Read and written by a copy."""
    flops_per_ms: float
    """Of multiply-adds in registers, float32."""


class Meter:
    """Measures what some threads of this machine can do: virtual ones differ from minute to minute."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.source, self.target = torch.zeros(COPIED), torch.empty(COPIED)
        self.parts = [np.array_split(array.numpy(), threads) for array in (self.target, self.source)]
        self.sums = np.zeros((threads, 64), np.float32)
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/peak.so"
            command = ["cc", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", library]
            subprocess.run([*command, Path(__file__).with_name("peak.c")], check=True)
            self.multiply_add = ctypes.CDLL(library).multiply_add
        self.multiply_add.restype = ctypes.c_int64
        self.multiply_add.argtypes = [ctypes.c_int64, ctypes.c_void_p]

    def measure(self) -> Machine:
        """The best of several copies, PyTorch's and NumPy's in threads of our own, and of several runs of peak.c."""
        copies = (lambda: self.target.copy_(self.source), lambda: list(self.pool.map(np.copyto, *self.parts)))
        copy = min(elapsed(each) for _ in range(7) for each in copies)
        flops = sum(self.multiply())
        return Machine(2 * 4 * COPIED / copy, flops / min(elapsed(self.multiply) for _ in range(7)))

    def multiply(self) -> list[int]:
        """Operations done by each thread."""
        return list(self.pool.map(lambda sums: self.multiply_add(ROUNDS, sums.ctypes.data), self.sums))


def elapsed(f: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begin = time.perf_counter()
    f()
    return (time.perf_counter() - begin) * 1e3


def floor_ms(operation: str, shape: Shape, live_rank: int, dtype: torch.dtype, machine: Machine) -> float:
    """No implementation takes less: the bytes that have to move, or the operations, whichever take longer."""
    width = shape.in_features + shape.out_features
    size = torch.finfo(dtype).bits // 8
    if operation.startswith("forward_backward"):
        # Forward reads x and adds to y; backward reads dy and x and adds to dx.
        moved = shape.layers * shape.tokens * size * (width + shape.out_features + width + 2 * shape.in_features)
        flops = 3 * 2 * shape.layers * shape.tokens * live_rank * width
    elif operation == "orthogonality":
        # Parameters are read, and gradients added to.
        moved = 3 * 4 * shape.parameters
        flops = 2 * 2 * shape.layers * shape.rank**2 * width
    else:
        # The norm reads gradients; the update reads parameters, gradients, moments and averages and writes all but
        # the gradients.
        moved, flops = 12 * 4 * shape.parameters, 0
    return max(moved / machine.bytes_per_ms, flops / machine.flops_per_ms)


class Prepared(nn.Linear):
    """A base layer that costs nothing: it returns a y that was prepared."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = shape.in_features, shape.out_features
        # Nobody reads it: one element takes the place of all.
        self.weight = nn.Parameter(torch.zeros(()).expand(shape.out_features, shape.in_features), requires_grad=False)
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

    def zero_y(self) -> None:
        """PEFT adds to the base layers' output in place: begin anew."""
        for layer in self.layers:
            layer.base_layer.y.zero_()

    def lora(self) -> None:
        """As `forward_backward`, by plain LoRA of the same rank in PyTorch's operators."""
        for p in (*self.trained, *self.x):
            p.grad = None
        for (A, _, B), layer, x, dy in zip(self.params, self.layers, self.x, self.dy, strict=True):
            y = layer.base_layer(x)
            y += (x.to(A.dtype) @ A.T @ B.T) * (ALPHA / len(A))
            y.backward(dy)

    def compiled(self) -> None:
        """As `forward_backward`, with PEFT's expression compiled."""
        for p in (*self.trained, *self.x):
            p.grad = None
        for (A, E, B), layer, x, dy in zip(self.params, self.layers, self.x, self.dy, strict=True):
            compiled_expression(layer.base_layer(x), x, A, E, B, float(len(A))).backward(dy)

    def orthogonality(self) -> torch.Tensor:
        """The penalty and its gradient."""
        penalty = penalty_of(self.params)
        penalty.backward()
        return penalty

    def compiled_orthogonality(self) -> None:
        """As `orthogonality`, by `torch.compile`."""
        compiled_penalty(self.params).backward()

    def optimizer_allocator(self) -> None:
        """Clipping, fused AdamW, importance, and a mask."""
        self.step_number += 1
        nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.step_number)


def penalty_of(params: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The penalty as AdaLoraModel.forward computes it, of A, E and B of each layer."""
    penalty = torch.zeros(())
    for A, _, B in params:
        for gram in (A @ A.T, B.T @ B):
            identity = torch.eye(*gram.size(), out=torch.empty_like(gram))
            penalty = penalty + torch.norm(gram - identity, p="fro")
    return ORTH_REG_WEIGHT * penalty / (2 * len(params))


compiled_penalty = torch.compile(penalty_of, dynamic=False)


@torch.compile(dynamic=False)
def compiled_expression(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, E: torch.Tensor, B: torch.Tensor, ranknum: float
) -> torch.Tensor:
    """What PEFT's SVDLinear computes beside its base layer."""
    return y + ((x.to(A.dtype) @ (A * E).T @ B.T) * ALPHA / (ranknum + 1e-5)).to(y.dtype)


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
        # One workspace for all, as in adalora.torch: no two passes run at once.
        workspace = None

        def calls(pattern: np.ndarray | None) -> list[adalora.GroupCall]:
            nonlocal workspace
            made = []
            for adapter, params, grads, (x, y, dy, dx), h in zip(
                self.adapters, self.params, self.training.grads, arrays, self.kept, strict=True
            ):
                share = adalora.Share(adapter, params, grads=grads, y=y, dy=dy, h=h, pattern=pattern)
                made.append(adalora.GroupCall([share], x, dx=dx, workspace=workspace))
                workspace = made[0].workspace
            return made

        self.calls = calls(None)
        # The same with a final pattern that keeps a third of the triplets.
        pattern = np.arange(shape.rank) % 3 == 2
        self.live_rank = int(pattern.sum())
        self.compacted = calls(pattern)
        self.y, self.dx = [a[1] for a in arrays], [a[3] for a in arrays]
        self.sum_of_squares, self.factor = np.zeros(1), np.ones(1)
        self.found_inf, self.penalty = np.zeros(1, np.float32), np.zeros(1)
        self.step = adalora.StepValues(
            FIRST_STEP,
            grad_factor=self.factor,
            found_inf=self.found_inf,
            sum_of_squares=self.sum_of_squares,
            penalty=self.penalty,
        )

    def forward_backward(self) -> None:
        """One pass through every adapter; gradients for A, E, B and x."""
        for call in self.calls:
            call.forward()
            call.backward(accumulate=False)

    def forward_backward_compacted(self) -> None:
        """As `forward_backward`, once the pattern is final and keeps a third of the triplets."""
        for call in self.compacted:
            call.forward()
            call.backward(accumulate=False)

    def orthogonality(self) -> None:
        """The penalty and its gradient."""
        self.allocator.orthogonality(ORTH_REG_WEIGHT, self.step)

    def optimizer_allocator(self) -> None:
        """Clipping, AdamW with importance, and a mask."""
        self.step.step[0] += 1
        self.sum_of_squares[0] = self.found_inf[0] = 0
        self.allocator.gradient_norm(self.step)
        self.context.gradient_factor(self.step, max_norm=MAX_NORM)
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


def check_equal(ours: Ours, other: Peft, tolerance: float, with_compiled: bool) -> None:
    """Refuse to time things that compute different results."""
    gradients = []
    for run in (other.compiled, other.forward_backward) if with_compiled else (other.forward_backward,):
        run()
        gradients.append([p.grad.float() for p in (*other.trained, *other.x)])
    for found, expected in zip(gradients[0], gradients[-1], strict=True):
        if not (found - expected).abs().max() <= tolerance * expected.abs().max():
            raise SystemExit("the compiled expression's gradients differ from PEFT's")
    other.zero_y()
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


def demo_step(seconds: float) -> tuple[Shape, dict[str, float]]:
    """The shape of the demo's step, and medians in milliseconds of ours and of PEFT's."""
    ours, other = Demo(adalora.torch), Demo(minilm_peft)
    for _ in range(3):
        losses = ours.demo_step().item(), other.demo_step().item()
        if not abs(losses[0] - losses[1]) < 1e-4:
            raise SystemExit(f"demo_step: losses {losses}, expected to differ by less than 1e-4")
    return ours.shape(), medians({"ours_ms": ours.demo_step, "peft_ms": other.demo_step}, seconds)


def eager_call(seconds: float) -> tuple[Shape, dict[str, float]]:
    """An adapted layer's forward pass on no tokens: what a call costs beside the computation."""
    shape = Shape(1, 768, 768, 12, 0)
    base, x = nn.Linear(shape.in_features, shape.out_features), torch.zeros(shape.tokens, shape.in_features)
    options = {"init_r": shape.rank, "target_r": shape.rank // 3, "total_step": SCHEDULE["total_step"]}
    ours = adalora.torch.adapt(nn.Sequential(base), adalora.torch.AdaLoraConfig(**options, target_modules="all-linear"))
    other = peft.get_peft_model(nn.Sequential(base), peft.AdaLoraConfig(**options, target_modules=["0"]))
    sides = {"ours_ms": ours[0], "peft_ms": other.base_model.model[0]}

    def calls(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                layer(x)

        return run

    times = medians({side: calls(layer) for side, layer in sides.items()}, seconds)
    return shape, times | {side: times[side] / CALLS for side in sides}


def medians(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Medians in milliseconds and how many turns there were: turn by turn, so that a drift of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for f in 2 * list(functions.values()):
        f()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 7:
        for name, f in functions.items():
            times[name].append(elapsed(f))
    return {name: statistics.median(each) for name, each in times.items()} | {"turns": len(next(iter(times.values())))}


def output_of(*command: str) -> str:
    """What a program prints; nothing where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def describe() -> dict[str, Any]:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in cpuinfo.splitlines()) if v}
    sets = [
        f for f in field.get("flags", "").split() if f in {"avx2", "fma", "f16c"} or f.startswith(("avx512", "amx"))
    ]
    rustc = output_of("rustc", "--version")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "revision": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "processor": " ".join(field.get(k, "?") for k in ("model name", "cpu family", "model")),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": sets,
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
    rows: list[dict[str, Any]], times: dict[str, float], floor: float | None, machine: Machine, **about: Any
) -> None:
    """Keep a row, and print it."""
    row = about | times | {"ratio": times["peft_ms"] / times["ours_ms"]}
    row |= {"copy_gb_s": machine.bytes_per_ms / 1e6, "peak_gflop_s": machine.flops_per_ms / 1e6}
    if floor is not None:
        row |= {"floor_ms": floor, "over_floor": times["ours_ms"] / floor}
    rows.append(row)
    texts = {name: f"{row[name]:.3f}" if isinstance(row.get(name), float) else row.get(name, "") for name in COLUMNS}
    for name in ("ratio", "over_floor"):
        texts[name] = f"{row[name]:.2f}" if name in row else ""
    print(" ".join(form.format(texts[name]) for name, form in COLUMNS.items()), flush=True)


def main() -> None:
    """Time what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first shape alone, for less time")
    parser.add_argument("--threads", type=int, nargs="+", help="default: all cores, and 1")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="activations")
    parser.add_argument("--compile", action="store_true", help="also PEFT's expression under torch.compile")
    parser.add_argument("--output", type=Path, default=ROOT / "target" / "bench.json")
    options = parser.parse_args()
    # One for each shape and type.
    torch._dynamo.config.recompile_limit = 10 * len(SHAPES)
    cores = len(os.sched_getaffinity(0))
    shapes, seconds = (SHAPES[:1], 1.0) if options.quick else (SHAPES, 2.0)
    rows: list[dict[str, Any]] = []
    backends = {}
    print(" ".join(form.format(title) for form, title in zip(COLUMNS.values(), TITLES, strict=True)))
    for threads in options.threads or sorted({cores, 1}, reverse=True):
        torch.set_num_threads(threads)
        meter, backends[threads] = Meter(threads), context(torch.device("cpu")).describe()
        for shape, name in itertools.product(shapes, options.dtype):
            dtype = getattr(torch, name)
            torch.manual_seed(0)
            other = Peft(shape, dtype)
            ours = Ours(shape, dtype, other)
            check_equal(ours, other, 1e-4 if name == "float32" else 2e-2, options.compile)
            operations = {
                "forward_backward": {"ours_ms": ours.forward_backward, "peft_ms": other.forward_backward},
                "forward_backward_compacted": {
                    "ours_ms": ours.forward_backward_compacted,
                    "peft_ms": other.forward_backward,
                },
            }
            operations["forward_backward"]["lora_ms"] = other.lora
            if options.compile:
                operations["forward_backward"]["compiled_ms"] = other.compiled
            # What comes after the passes does not read activations, so that it is timed once.
            if name == "float32":
                for operation in ("orthogonality", "optimizer_allocator"):
                    operations[operation] = {
                        "ours_ms": getattr(ours, operation),
                        "peft_ms": getattr(other, operation),
                    }
                # Compiled for each number of layers, which takes a while.
                if options.compile and shape == SHAPES[0]:
                    operations["orthogonality"]["compiled_ms"] = other.compiled_orthogonality
            for operation, functions in operations.items():
                live_rank = ours.live_rank if operation.endswith("compacted") else shape.rank
                machine = meter.measure()
                times = medians(functions, seconds)
                floor = floor_ms(operation, shape, live_rank, dtype, machine)
                about = {"operation": operation, **shape._asdict(), "live_rank": live_rank}
                report(rows, times, floor, machine, **about, dtype=name, threads=threads)
        if "float32" in options.dtype:
            machine = meter.measure()
            shape, times = demo_step(5 * seconds)
            about = {"operation": "demo_step", **shape._asdict(), "live_rank": shape.rank}
            report(rows, times, None, machine, **about, dtype="float32", threads=threads)
            shape, times = eager_call(seconds)
            about = {"operation": "eager_call", **shape._asdict(), "live_rank": shape.rank}
            report(rows, times, None, machine, **about, dtype="float32", threads=threads)
    about = describe() | {"backends": backends}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
