#!/usr/bin/env python3
"""Compile kernels.cu to kernels.ptx by NVRTC, or check that this is what was done.

    ptx.py            writes src/backend/cuda/kernels.ptx
    ptx.py --check    compiles again and compares, and has ptxas make machine code of it: no register may spill

NVRTC is the oldest of CUDA 12, so that drivers from 525 on take what it writes; both tools are PyPI's wheels
`nvidia-cuda-nvrtc-cu12` and `nvidia-cuda-nvcc-cu12`, of the versions in python_shim/constraints.txt.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "backend" / "cuda" / "kernels.cu"
PTX = SOURCE.with_suffix(".ptx")
CONSTRAINTS = ROOT / "python_shim" / "constraints.txt"
OPTIONS = ["--gpu-architecture=compute_80", "--std=c++17"]
# Ampere, Hopper and Blackwell's workstation cards.
ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]


class Failure(Exception):
    """What the message says."""


def same_every_time(ptx: str) -> str:
    """PTX without what NVRTC puts into internal names: a hash of the moment, and the process."""
    identities = {ptx[found.end() - 10 :][: int(found[1])][10:] for found in re.finditer(r"_ZN(\d+)_INTERNAL_", ptx)}
    for identity in identities:
        for scope in ("_INTERNAL_", "_GLOBAL__N__"):
            name = scope + identity
            ptx = ptx.replace(f"{len(name)}{name}", f"{len(scope)}{scope}")
    return ptx


def wheel_file(package: str, ending: str) -> Path:
    """A file of an installed package, which has to be of the version that the constraints name."""
    pinned = re.search(rf"^{package}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if not pinned:
        raise Failure(f"{CONSTRAINTS} names no version of {package}")
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise Failure(f"{package}=={pinned[1]} is not installed in {sys.prefix}") from None
    if found.version != pinned[1]:
        raise Failure(f"{package}: found {found.version}, expected {pinned[1]}")
    paths = [file for file in found.files or () if str(file).endswith(ending)]
    if len(paths) != 1:
        raise Failure(f"{package} {found.version}: found {len(paths)} files {ending}, expected one")
    return Path(paths[0].locate())


def compile_to_ptx(source: Path) -> tuple[bytes, str]:
    """The PTX that NVRTC makes of a file, and its warnings."""
    nvrtc = ctypes.CDLL(str(wheel_file("nvidia-cuda-nvrtc-cu12", "/libnvrtc.so.12")))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def call(function: str, *arguments: object) -> None:
        status = getattr(nvrtc, function)(*arguments)
        if status:
            raise Failure(f"{function}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, buffer)
        return buffer.value

    call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
        status = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
        log = text("ProgramLog").decode().strip()
        if status:
            raise Failure(f"{source}: {nvrtc.nvrtcGetErrorString(status).decode()}\n{log}")
        return same_every_time(text("PTX").decode()).encode(), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@dataclass
class Usage:
    """What ptxas says that a kernel takes."""

    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int


def assemble(ptx: Path, architecture: str) -> list[Usage]:
    """What the kernels take on an architecture."""
    ptxas = wheel_file("nvidia-cuda-nvcc-cu12", "/bin/ptxas")
    ptxas.chmod(ptxas.stat().st_mode | 0o111)
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [ptxas, "--verbose", f"--gpu-name={architecture}", f"--output-file={folder}/kernels.cubin", ptx],
            capture_output=True,
            text=True,
        )
    said = run.stdout + run.stderr
    if run.returncode:
        raise Failure(f"ptxas for {architecture} failed\n{said}")
    usages = []
    for part in said.split("Compiling entry function '")[1:]:
        kernel = part.split("'")[0]

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        usages.append(
            Usage(
                kernel,
                registers=number(r"Used (\d+) registers"),
                shared=number(r"(\d+) bytes smem"),
                stack=number(r"(\d+) bytes stack frame"),
                spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    entries = set(re.findall(r"^\.visible \.entry (\w+)\(", ptx.read_text(), re.MULTILINE))
    if entries != {usage.kernel for usage in usages} or not all(usage.registers for usage in usages):
        raise Failure(f"ptxas for {architecture} did not report on every kernel\n{said}")
    return usages


def check() -> None:
    """Compare the file with the source, and look at what its kernels take."""
    ptx, warnings = compile_to_ptx(SOURCE)
    if warnings:
        raise Failure(f"NVRTC warns\n{warnings}")
    if not PTX.exists() or ptx != PTX.read_bytes():
        raise Failure(f"{PTX.relative_to(ROOT)} is not what NVRTC makes of {SOURCE.name}: run `make ptx`")
    print(f"{PTX.relative_to(ROOT)} is what NVRTC makes of {SOURCE.name}")
    spilling = []
    for architecture in ARCHITECTURES:
        print(f"{architecture:34} registers  shared  stack  spills")
        for usage in sorted(assemble(PTX, architecture), key=lambda usage: usage.kernel):
            print(f"  {usage.kernel:32} {usage.registers:9} {usage.shared:7} {usage.stack:6} {usage.spills:7}")
            if usage.spills:
                spilling.append(f"{usage.kernel} on {architecture}")
    if spilling:
        raise Failure(f"registers spill in {', '.join(spilling)}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare, and run ptxas")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check()
        else:
            ptx, warnings = compile_to_ptx(SOURCE)
            PTX.write_bytes(ptx)
            if warnings:
                print(warnings, file=sys.stderr)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
