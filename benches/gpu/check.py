#!/usr/bin/env python3
"""Check the library on a GPU, and time it there: `make gpu-check`.

    check.py [--only PART,...] [--minutes N] [--device cuda|software-cuda] [--software FOLDER]

Needs what `make gpu-check-bundle` put into target/gpu-check, Python with PyTorch, NumPy, safetensors, ml_dtypes and
pytest, and a GPU; neither a network nor Rust. Every part has a time limit, and a part that fails stops no other. Parts
that only look run side by side; the benchmark runs last, and alone.

The outcome goes to benches/results/gpu-CARD.json: parts that were not run keep what an earlier run on the same card
and driver found, with the revision that it looked at. Where the environment names a folder OUT, it goes there too, with
all output. With --device software-cuda the parts that need no GPU run over the tests' own CUDA, and nothing is written.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "target" / "gpu-check"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A few rows of each operation: a sanitizer makes everything many times slower.
SANITIZED = [
    "initialize.bf16_is_its_rounded_master",
    "forward_and_backward.f32_f32_64_tokens_65_to_33_rank_8",
    "forward_and_backward.bf16_f32_130_tokens_13_to_65_rank_12",
    "forward_and_backward.bf16_f32_33_tokens_13_to_33_rank_5_with_gaps",
    "forward_and_backward_with_dropout.bf16_f32_three_adapters*",
    "delta_weight.f32_to_bf16*",
    "merge_and_unmerge.f32_to_bf16*",
    "gradient_factor.*",
    "gradient_norm_says_what_is_not_finite.f32*",
    "orthogonality.several_layers__f32*",
    "update.bf16_gradients_f32_master_AdamW_and_importance",
    "scores.f32",
    "select.f32",
    "set_pattern.f32",
    "digest.f32",
    "run.f32_with_events",
]
BENCH_SECONDS = 110
# How much longer parts may take over software CUDA.
SOFTWARE_SLOWNESS = 20


@dataclass
class Part:
    """Something that is run, and what came of it."""

    name: str
    command: list[str | Path]
    limit: float
    """Seconds."""
    needs_gpu: bool = False
    shards: int = 1
    """Processes that share the tests of a program of GoogleTest's."""
    outcome: str = ""
    seconds: float = 0.0
    output: str = ""

    def run(self, environment: dict[str, str], until: float) -> Part:
        """Run it, and note the outcome."""
        begin = time.monotonic()
        if not self.command[0]:
            self.outcome = "not run: not installed"
            return self
        left = min(self.limit, until - begin)
        if left < 1:
            self.outcome = "failed: no time was left"
            return self
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(self.shards)]
            processes = [self._start(environment, k, file) for k, file in enumerate(files)]
            try:
                for process in processes:
                    process.wait(max(begin + left - time.monotonic(), 0))
                failed = [process.returncode for process in processes if process.returncode]
                self.outcome = f"failed: status {failed[0]}" if failed else "passed"
            except subprocess.TimeoutExpired:
                self.outcome = f"failed: stopped after {left:.0f} s"
                for process in processes:
                    # With what it started: a sanitizer's program is a process of its own.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            for file in files:
                file.seek(0)
                self.output += file.read()
        if self.outcome == "passed" and "[==========] 0 tests" in self.output:
            self.outcome = "failed: no test was found"
        self.seconds = time.monotonic() - begin
        return self

    def _start(self, environment: dict[str, str], shard: int, output: TextIO) -> subprocess.Popen[str]:
        if self.shards > 1:
            environment = environment | {"GTEST_TOTAL_SHARDS": str(self.shards), "GTEST_SHARD_INDEX": str(shard)}
        return subprocess.Popen(
            list(map(str, self.command)),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def summary(self) -> str:
        """What its output says of how much was looked at."""
        lines = [line.strip(" =") for line in self.output.splitlines()]
        said = [
            f"{sum(map(int, counts))} tests {word.lower()}"
            for word in ("PASSED", "SKIPPED", "FAILED")
            if (counts := re.findall(rf"^\[  {word} *\] (\d+) tests?\b", self.output, re.MULTILINE))
        ]
        of_pytest = re.compile(r"\d+ (passed|failed|error|skipped).* in [\d.]+s.*")
        said += [line for line in lines if of_pytest.fullmatch(line) or line.startswith("ERROR SUMMARY")]
        replays = [line[:4].strip() for line in lines if re.match(r"(ok  |FAIL) \w+ +", line)]
        if replays:
            said.append(f"{replays.count('ok')} of {len(replays)} recorded runs agree")
        return "; ".join(dict.fromkeys(said))


def parts(device: str) -> list[Part]:
    """Everything that there is to run."""
    tests = BUNDLE / "bin"
    operations = tests / "test_operations"
    python = sys.executable
    golden = [ROOT / "python_shim" / "tests" / "golden"]
    if any((BUNDLE / "golden").glob("*.json")):
        golden.append(BUNDLE / "golden")
    replay = [python, ROOT / "python_shim" / "tests" / "replay.py", "--device", device]
    # Most of the time goes into the expected values, on the host.
    shards = 1 if device == "software-cuda" else 4
    suites = sorted(file for file in tests.glob("test_*") if file != operations)
    found = [
        Part("operations", [operations, "--gtest_filter=cuda_*-cuda_graph_*"], 150, shards=shards),
        Part("graphs", [operations, "--gtest_filter=cuda_graph_*"], 150, shards=shards),
        *(Part(f"replays_{dtype}", [*replay, "--dtype", dtype, *golden], 100) for dtype in ("float64", "float32")),
        *(Part(file.name.removeprefix("test_"), [file], 100) for file in suites),
        Part(
            "torch",
            [python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "python_shim/tests/torch/cuda"],
            150,
            needs_gpu=True,
        ),
    ]
    rows = "--gtest_filter=" + ":".join(f"cuda_{row}" for row in SANITIZED)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool in SANITIZERS:
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "9", operations]
        found.append(Part(tool, [*command, rows], 150, needs_gpu=True))
    bench = [python, ROOT / "benches" / "gpu" / "bench.py", "--output", BUNDLE / "bench.json"]
    return [*found, Part("bench", bench, BENCH_SECONDS, needs_gpu=True)]


def card() -> tuple[str, str]:
    """Name and driver of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no GPU: {error}") from None
    name, driver = said.splitlines()[0].split(", ")
    return name, driver


def wheels_folder() -> Path | None:
    """Where PyTorch's CUDA lies, if it came in wheels: programs without PyTorch find it there."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) / "cu13" / "lib" for place in (spec.submodule_search_locations or () if spec else ())]
    return next((folder for folder in folders if (folder / "libcublas.so.13").exists()), None)


def keep(done: list[Part], name: str, driver: str) -> None:
    """Write the outcome beside what earlier runs on this card found."""
    file_name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    file = ROOT / "benches" / "results" / file_name
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if (result.get("card"), result.get("driver")) != (name, driver):
        result = {"card": name, "driver": driver, "parts": {}}
    about = {
        "revision": (BUNDLE / "revision").read_text().strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    for part in done:
        noted = {"outcome": part.outcome, "seconds": round(part.seconds, 1), "summary": part.summary, **about}
        result["parts"][part.name] = noted
        if part.name == "bench" and part.output and (BUNDLE / "bench.json").exists():
            result["bench"] = json.loads((BUNDLE / "bench.json").read_text()) | about
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file.relative_to(ROOT)}", flush=True)
    if os.environ.get("OUT"):
        out = Path(os.environ["OUT"])
        shutil.copy(file, out / file_name)
        (out / "gpu-check.log").write_text("".join(f"===== {part.name}\n{part.output}\n" for part in done))


def main() -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="parts, with commas between; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which everything has ended")
    parser.add_argument("--jobs", type=int, default=4, help="parts that run at once")
    parser.add_argument("--device", choices=["cuda", "software-cuda"], default="cuda")
    parser.add_argument("--software", type=Path, default=ROOT / "target" / "cpp" / "software_cuda" / "lib")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    on_gpu = options.device == "cuda"
    todo = [part for part in parts(options.device) if on_gpu or not part.needs_gpu]
    for part in todo:
        part.limit *= 1 if on_gpu else SOFTWARE_SLOWNESS
    if options.only:
        names = {part.name for part in todo}
        asked = options.only.split(",")
        unknown = [name for name in asked if name not in names]
        if unknown:
            parser.error(f"--only: expected some of {', '.join(sorted(names))}, found {unknown[0]}")
        todo = [part for part in todo if part.name in asked]
    if not (BUNDLE / "revision").exists():
        parser.error(f"{BUNDLE}: expected what `make gpu-check-bundle` puts there, found nothing")
    name, driver = card() if on_gpu else ("software CUDA", "")
    print(f"{name}, driver {driver}, revision {(BUNDLE / 'revision').read_text().strip()}", flush=True)
    environment = dict(
        os.environ,
        # Before what leads to the driver.
        LD_LIBRARY_PATH=":".join(filter(None, [str(BUNDLE / "lib"), os.environ.get("LD_LIBRARY_PATH")])),
        ADALORA_LIBRARY=str(BUNDLE / "lib" / "libadalora.so.0"),
        PYTHONPATH=str(ROOT / "python_shim" / "src"),
        PYTHONUNBUFFERED="1",
        OMP_NUM_THREADS="2",
    )
    environment["ADALORA_TEST_CUDA"] = "1"
    folder = wheels_folder() if on_gpu else options.software.resolve()
    if folder:
        environment["ADALORA_CUDA_FOLDER"] = str(folder)
    last = [part for part in todo if part.name == "bench"]
    reserved = BENCH_SECONDS if last else 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs if on_gpu else 1) as pool:
        running = [pool.submit(part.run, environment, until - reserved) for part in todo if part not in last]
        for future in concurrent.futures.as_completed(running):
            report(future.result())
    for part in last:
        report(part.run(environment, until))
        print(part.output)
    if on_gpu:
        keep(todo, name, driver)
    return 0 if not any(part.outcome.startswith("failed") for part in todo) else 1


def report(part: Part) -> None:
    """Say what came of a part."""
    print(f"{part.outcome:28} {part.name:18} {part.seconds:6.1f} s  {part.summary}", flush=True)
    if part.outcome != "passed":
        telling = [
            line for line in part.output.splitlines() if not line.startswith(("[ RUN  ", "[       OK", "[-----"))
        ]
        print("\n".join(telling[-60:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
