#!/usr/bin/env python3
"""Build the CUDA backend with one mistake after another, and see that the tests notice each.

    check.py --build BUILD --work WORK

BUILD is where CMake has built the tests and software CUDA. Mistakes in Rust are built in a copy of the crate, those in
kernels as another device of software CUDA, both in WORK, which a later run goes on with. Both copies have to pass
without a mistake first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mistakes import KERNELS, MISTAKES, Mistake

ROOT = Path(__file__).resolve().parents[2]
# Tests that have not ended by then wait for ever, which is a failure too.
SECONDS = 40


class Failure(Exception):
    """What the message says."""


class Crate:
    """A copy of the crate, built without optimisation."""

    def __init__(self, work: Path):
        self.folder = work / "crate"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = {
            "CARGO_TARGET_DIR": str(work / "target"),
            "CARGO_PROFILE_DEV_DEBUG": "0",
            "CARGO_INCREMENTAL": "1",
        }
        self.library = work / "lib" / "libadalora.so.0"
        self.library.parent.mkdir(exist_ok=True)
        for name in ("Cargo.toml", "Cargo.lock", "build.rs"):
            shutil.copy2(ROOT / name, self.folder / name)
        shutil.rmtree(self.folder / "src", ignore_errors=True)
        shutil.copytree(ROOT / "src", self.folder / "src")
        self.environment = {"LD_LIBRARY_PATH": str(self.library.parent)}

    def build(self, file: str, text: str):
        """Build with another text of a file, which is put back."""
        path = self.folder / file
        right = path.read_text()
        try:
            path.write_text(text)
            command = ["cargo", "rustc", "--quiet", "--locked", "--crate-type", "cdylib"]
            run(command, cwd=self.folder, env=os.environ | self.settings)
        finally:
            path.write_text(right)
        shutil.copy2(Path(self.settings["CARGO_TARGET_DIR"]) / "debug/libadalora.so", self.library)


class Device:
    """Software CUDA's device, with a copy of the kernels."""

    def __init__(self, work: Path, build: Path):
        self.kernels = work / "kernels.cu"
        self.folder = work / "device"
        shutil.copy2(ROOT / KERNELS, self.kernels)
        settings = {"ADALORA_LIBRARY": build / "lib/libadalora.so.0", "ADALORA_KERNELS": self.kernels}
        options = [f"-D{name}={value}" for name, value in settings.items()]
        run(["cmake", "-S", str(ROOT / "cpp_tests"), "-B", str(self.folder), "-G", "Ninja", *options])
        self.environment = {"SOFTWARE_CUDA_DEVICE": str(self.folder / "software_cuda/lib/software_cuda_device")}

    def build(self, file: str, text: str):
        """Build with another text of the kernels."""
        self.kernels.write_text(text)
        run(["cmake", "--build", str(self.folder), "--target", "software_cuda_device"])


def run(command: list[str], **options):
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def test(build: Path, program: str, tests: str, environment: dict[str, str]) -> tuple[bool, int, str]:
    """Return whether the tests pass, how many there were, and their output."""
    command = [str(build / program), f"--gtest_filter={tests}", "--gtest_fail_fast"]
    environment = os.environ | {"ADALORA_CUDA_FOLDER": str(build / "software_cuda/lib")} | environment
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False, 1, f"no end after {SECONDS} s"
    output = done.stdout + done.stderr
    return done.returncode == 0, output.count("[ RUN      ]"), output


def reason(output: str) -> str:
    """Return the line that says best what was noticed."""
    lines = output.splitlines()
    for sign in ("what is allowed", "exception with description", "no end after", "software CUDA:", ": Failure"):
        for line in lines:
            if sign in line:
                return line.strip()[:120]
    return "the program ended early"


def check(copy: Crate | Device, build: Path, mistakes: list[Mistake]) -> list[str]:
    """Return the mistakes that were not noticed."""
    if not mistakes:
        return []
    file = mistakes[0].file
    copy.build(file, (ROOT / file).read_text())
    for program in sorted({m.program for m in mistakes}):
        filters = sorted({m.filter for m in mistakes if m.program == program})
        for one in filters:
            passed, ran, output = test(build, program, one, copy.environment)
            if not passed or ran == 0:
                raise Failure(f"{program} --gtest_filter={one}: {ran} tests, expected them to pass:\n{output}")
    missed = []
    for mistake in mistakes:
        copy.build(mistake.file, (ROOT / mistake.file).read_text().replace(mistake.right, mistake.wrong))
        passed, ran, output = test(build, mistake.program, mistake.filter, copy.environment)
        if passed or ran == 0:
            missed.append(mistake.name)
            print(f"NOT NOTICED: {mistake.name}", flush=True)
        else:
            print(f"noticed: {mistake.name} [{reason(output)}]", flush=True)
    return missed


def main() -> int:
    """Print what was noticed; 1 where something was not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="where CMake has built the tests")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is built here")
    parser.add_argument("--only", default="", help="mistakes whose name contains this")
    arguments = parser.parse_args()
    build, work = arguments.build.resolve(), arguments.work.resolve()
    mistakes = [m for m in MISTAKES if arguments.only in m.name]
    begin = time.monotonic()
    try:
        for mistake in mistakes:
            places = (ROOT / mistake.file).read_text().count(mistake.right)
            if places != 1:
                raise Failure(f"{mistake.name}: found {places} places in {mistake.file}, expected one")
        copies = [Crate(work), Device(work, build)]
        shares = [[m for m in mistakes if (m.file == KERNELS) == of_kernels] for of_kernels in (False, True)]
        with ThreadPoolExecutor() as pool:
            missed = [name for names in pool.map(check, copies, [build] * 2, shares) for name in names]
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{len(mistakes) - len(missed)} of {len(mistakes)} noticed in {time.monotonic() - begin:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
