"""The generated declarations against the header, the library and the C compiler."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import native
import pytest

import adalora
import generate_bindings as header
from adalora import _bindings as c

DECLARATIONS = header.parse(native.HEADER.read_text())
STRUCTS = [d for d in DECLARATIONS if isinstance(d, header.Struct)]
CONSTANTS = [d for d in DECLARATIONS if isinstance(d, header.Constant)]


def test_bindings_are_what_the_header_gives() -> None:
    assert header.OUTPUT.read_text() == header.generate(native.HEADER.read_text()), "run generate_bindings.py"


def test_every_exported_function_has_types(library: adalora.Library) -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", library.path], check=True, capture_output=True, text=True)
    exported = {line.split()[-1].split("@")[0] for line in symbols.stdout.splitlines()}
    assert {name for name in exported if name.startswith("adalora_")} == set(c.FUNCTIONS)
    for name, declared in c.FUNCTIONS.items():
        function = getattr(library, name)
        assert list(function.argtypes) == [kind for _, kind in declared.arguments]
        assert function.restype == declared.restype
        assert declared.restype is not None or name.endswith("_destroy")
        assert function.__doc__


def test_every_function_of_the_header_is_declared() -> None:
    functions = {d.name: d for d in DECLARATIONS if isinstance(d, header.Function)}
    assert set(functions) == set(c.FUNCTIONS)
    for name, d in functions.items():
        assert [p.name for p in d.parameters] == [argument for argument, _ in c.FUNCTIONS[name].arguments]


def test_sizes_and_offsets_are_the_c_compilers(tmp_path: Path) -> None:
    lines = []
    for struct in STRUCTS:
        lines.append(f'printf("{struct.name} %zu\\n", sizeof({struct.name}));')
        for f in struct.fields:
            where = f"offsetof({struct.name}, {f.name}), sizeof((({struct.name} *)0)->{f.name})"
            lines.append(f'printf("{struct.name}.{f.name} %zu %zu\\n", {where});')
    program = '#include <stdio.h>\n#include "adalora.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0; }\n"
    expected = []
    for struct in STRUCTS:
        kind = getattr(c, struct.name)
        expected.append(f"{struct.name} {ctypes.sizeof(kind)}")
        for f in struct.fields:
            place = getattr(kind, f.name)
            expected.append(f"{struct.name}.{f.name} {place.offset} {place.size}")
    assert native.run_program(tmp_path, program).splitlines() == expected


def test_constants_are_the_c_compilers(tmp_path: Path) -> None:
    lines = [f'printf("{d.name} %lld\\n", (long long){d.name});' for d in CONSTANTS]
    program = '#include <stdio.h>\n#include "adalora.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0; }\n"
    assert native.run_program(tmp_path, program).splitlines() == [f"{d.name} {getattr(c, d.name)}" for d in CONSTANTS]


def test_a_handle_of_the_wrong_kind_is_refused_by_its_type(library: adalora.Library) -> None:
    wrong = ctypes.POINTER(c.adalora_context_t)()
    with pytest.raises(ctypes.ArgumentError):
        library.adalora_adapter_destroy(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "#define ADALORA_SOMETHING (1 << 3)\n",
        "#pragma once\n",
        "typedef union adalora_u { int32_t a; } adalora_u;\n",
        "long long adalora_thing(void);\n",
        "int32_t adalora_thing(unknown_t x);\n",
        "int32_t adalora_thing(const double **x);\n",
        "int32_t adalora_thing(int32_t x)\n",
    ],
)
def test_what_the_generator_does_not_know_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        header.generate(text)
