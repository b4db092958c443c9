"""Small C programs and libraries, made by the C compiler while the tests run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import generate_bindings as header

HEADER = header.HEADER


def compile_library(folder: Path, source: str, name: str = "library") -> Path:
    """Compile C text to a shared library."""
    text, built = folder / f"{name}.c", folder / f"lib{name}.so"
    text.write_text(source)
    include = ["-I", str(HEADER.parent)]
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", *include, "-o", built, text, "-ldl", "-lm"], check=True)
    return built


def run_program(folder: Path, source: str) -> str:
    """Compile and run C text; returns what it prints."""
    text, built = folder / "program.c", folder / "program"
    text.write_text(source)
    subprocess.run(["cc", "-std=c11", "-Wall", "-Werror", "-I", HEADER.parent, "-o", built, text], check=True)
    return subprocess.run([built], check=True, capture_output=True, text=True).stdout


def cpp_program(folder: Path, name: str, library: str) -> Path:
    """Compile a C++ program of the repository's tests against the library; returns the file."""
    soname, built = folder / "libadalora.so.0", folder / name
    if not soname.exists():
        soname.symlink_to(library)
    source = HEADER.parents[1] / "cpp_tests" / f"{name}.cpp"
    link = ["-L", folder, "-l:libadalora.so.0", f"-Wl,-rpath,{folder}"]
    subprocess.run(["c++", "-std=c++17", "-I", HEADER.parent, "-o", built, source, *link], check=True)
    return built


def forwarding_source(real: str, function: str, statement: str) -> str:
    """C text of a library that hands every call to the one at `real`, but runs a statement first in one function.

    The statement may change that function's parameters, which it sees by their names.
    """
    lines = [
        "#include <dlfcn.h>",
        "#include <math.h>",
        "#include <stdlib.h>",
        '#include "adalora.h"',
        "static void *real(const char *name) {",
        f'  void *library = dlopen("{real}", RTLD_NOW | RTLD_LOCAL);',
        "  if (library == NULL) abort();",
        "  return dlsym(library, name);",
        "}",
    ]
    found = False
    for d in header.parse(HEADER.read_text()):
        if not isinstance(d, header.Function):
            continue
        parameters = ", ".join(p.declaration for p in d.parameters) or "void"
        arguments = ", ".join(p.name for p in d.parameters)
        changed = statement if d.name == function else ""
        found |= d.name == function
        hand = "" if d.returns == "void" else "return "
        lines.append(f"{d.returns} {d.name}({parameters}) {{")
        lines.append(f'  {changed} {hand}(({d.returns} (*)({parameters}))real("{d.name}"))({arguments});')
        lines.append("}")
    if not found:
        raise ValueError(f"the header has no {function}")
    return "\n".join(lines) + "\n"
