#!/usr/bin/env python3
"""Time the library on a GPU beside PEFT's AdaLoRA and plain LoRA.

    bench.py [--device cuda|cpu] [--seconds N] [--output FILE]

Prints a table, and writes FILE: the card, and `rows` with medians in milliseconds. README.md of the folder above says
what each operation covers. On the CPU tiny shapes are run, which shows that the script works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The package of this checkout, where none is installed.
sys.path.append(str(ROOT / "python_shim" / "src"))
warnings.filterwarnings("ignore")
import adalora  # noqa: E402
import passes  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import update  # noqa: E402
from adalora.torch.functional import context  # noqa: E402
from timing import Timer, Times  # noqa: E402

try:
    import peft
except ImportError:
    peft = None

# Layers enough that what one leaves in the caches is gone when its turn comes again.
PASSES = [passes.Shape(8192, 4096, 12, 3), passes.Shape(2048, 4096, 64, 8), passes.Shape(8192, 1024, 12, 8)]
UPDATES = [(24, 4096, 12), (224, 4096, 12)]
SIZES = [training.Size(24, 256, 256, 8), training.Size(48, 768, 2048, 12), training.Size(64, 4096, 2048, 12)]
TINY = [passes.Shape(16, 32, 4, 2)], [(2, 32, 4)], [training.Size(3, 32, 16, 4)]


def describe(timer: Timer) -> dict[str, Any]:
    """What the numbers belong to."""
    about = {
        "card": platform.processor() or platform.machine(),
        # Names of libraries, without the folders that they were found in.
        "backend": re.sub(r"/\S*/", "", context(timer.device).describe()),
        "versions": {
            "adalora": adalora.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": peft.__version__ if peft else None,
        },
    }
    if timer.on_cuda:
        about["card"] = torch.cuda.get_device_name(timer.device)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return about


def measure(timer: Timer, shapes: tuple[Any, Any, Any], copy: float) -> list[dict[str, Any]]:
    """All rows; what cannot be timed has its error in the place of times."""
    rows: list[dict[str, Any]] = []

    def add(operation: str, times: Times, floor_bytes: int | None, **about: Any) -> None:
        row = {
            "operation": operation,
            **about,
            "ms": times.ms,
            "kernels": [kernel._asdict() for kernel in times.kernels[:12]],
        }
        if floor_bytes is not None:
            row["floor_ms"] = floor_bytes / copy
        rows.append(row)
        text = " ".join(f"{name} {ms:.4f}" for name, ms in times.ms.items())
        floor = f" floor {row['floor_ms']:.4f}" if floor_bytes is not None else ""
        print(operation, *about.values(), text + floor, flush=True)
        for kernel in row["kernels"]:
            print("  {us:9.1f} us {launches:6.1f} launches  {name}".format(**kernel), flush=True)

    def attempt(operation: str, about: dict[str, Any], work: Any) -> Any:
        try:
            return work()
        except (Exception, SystemExit) as error:  # Whatever is wrong with one shape, the others are timed.
            rows.append({"operation": operation, **about, "error": f"{type(error).__name__}: {error}"})
            print(operation, *about.values(), rows[-1]["error"], flush=True)
            return None
        finally:
            if timer.on_cuda:
                torch.cuda.empty_cache()

    for shape in shapes[0]:
        about = shape._asdict()
        by_operation = attempt("forward_backward", about, lambda shape=shape: passes.compare(shape, timer, peft))
        for operation, times in (by_operation or {}).items():
            add(operation, times.divided(shape.layers), shape.floor_bytes(operation) // shape.layers, **about)
    for layers, width, rank in shapes[1]:
        about = {"layers": layers, "width": width, "rank": rank}
        arguments = (layers, width, rank, timer, peft)
        by_operation = attempt("step", about, lambda arguments=arguments: update.compare(*arguments))
        parameters = layers * rank * (2 * width + 1)
        for operation, times in (by_operation or {}).items():
            # The penalty reads parameters and adds to gradients. The norm reads gradients; the update reads
            # parameters, gradients, moments and averages, and writes all but the gradients.
            add(operation, times, 4 * parameters * (3 if operation == "orthogonality" else 12), **about)
    for size in shapes[2]:
        times = attempt("training_step", size._asdict(), lambda size=size: training.compare(size, timer, peft))
        if times is not None:
            add("training_step", times, None, **size._asdict())
    return rows


def main() -> int:
    """Time what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    timer = Timer(device, options.seconds)
    if peft is None:
        print("PEFT is not installed: its side is left out")
    copy = timer.copy_bytes_per_ms()
    print(f"copy: {copy / 1e9:.3f} TB/s", flush=True)
    rows = measure(timer, (PASSES, UPDATES, SIZES) if timer.on_cuda else TINY, copy)
    result = {**describe(timer), "copy_tb_s": copy / 1e9, "rows": rows, "notes": timer.notes}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
