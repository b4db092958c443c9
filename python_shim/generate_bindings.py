#!/usr/bin/env python3
"""Generate src/adalora/_bindings.py, the ctypes declarations, from include/adalora.h.

    generate_bindings.py [--header FILE] [--output FILE]

The header is cbindgen's, so this parser knows its few shapes and refuses whatever else it meets: number constants,
opaque structs, type aliases, function pointers, structs and functions, each below its documentation in `//` lines.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADER = HERE.parent / "include" / "adalora.h"
OUTPUT = HERE / "src" / "adalora" / "_bindings.py"
WIDTH = 120

SCALARS = {
    "char": "c_char",
    "double": "c_double",
    "float": "c_float",
    "int32_t": "c_int32",
    "int64_t": "c_int64",
    "size_t": "c_size_t",
    "uint8_t": "c_uint8",
    "uint32_t": "c_uint32",
    "uint64_t": "c_uint64",
}


@dataclass
class Variable:
    """A field or a parameter."""

    name: str
    c_type: str
    doc: list[str] = field(default_factory=list)

    @property
    def declaration(self) -> str:
        """The C text that declares it."""
        if "(*)" in self.c_type:
            return self.c_type.replace("(*)", f"(*{self.name})", 1)
        return f"{self.c_type} {self.name}"


@dataclass
class Constant:
    """A `#define` of a number."""

    name: str
    value: str
    doc: list[str]


@dataclass
class Opaque:
    """A struct that only the library sees into."""

    name: str
    doc: list[str]


@dataclass
class Alias:
    """Another name of a number type."""

    name: str
    c_type: str
    doc: list[str]


@dataclass
class Callback:
    """A pointer to a function of the caller's."""

    name: str
    returns: str
    parameters: list[Variable]
    doc: list[str]


@dataclass
class Struct:
    """A descriptor or a value."""

    name: str
    fields: list[Variable]
    doc: list[str]


@dataclass
class Function:
    """A function that the library exports."""

    name: str
    returns: str
    parameters: list[Variable]
    doc: list[str]


Declaration = Constant | Opaque | Alias | Callback | Struct | Function


def parse(text: str) -> list[Declaration]:
    """All declarations of the header, in its order."""
    declarations: list[Declaration] = []
    doc: list[str] = []
    pending: list[str] = []
    lines = iter(re.sub(r"/\*.*?\*/", "", text, flags=re.S).splitlines())
    for line in lines:
        line = line.strip()
        if line in ("#ifdef __cplusplus", "#endif // __cplusplus"):
            continue
        if line == 'extern "C" {' or line.startswith('}  // extern "C"'):
            continue
        if not pending and line.startswith("//"):
            doc.append(line[2:].strip())
        elif line.startswith("#"):
            define = re.fullmatch(r"#define (ADALORA_\w+) (-?\d+)", line)
            if define:
                declarations.append(Constant(define[1], define[2], doc))
            elif not re.match(r"#(ifndef|endif|include|define ADALORA_H$)", line):
                raise ValueError(f"unknown directive: {line}")
            doc = []
        elif line:
            pending.append(line)
            joined = "\n".join(pending)
            if line.endswith(";") and joined.count("{") == joined.count("}"):
                declarations.append(_declaration(joined, doc))
                pending, doc = [], []
        elif not pending:
            doc = []
    if pending:
        raise ValueError(f"unfinished declaration: {pending}")
    return declarations


def _declaration(text: str, doc: list[str]) -> Declaration:
    if struct := re.fullmatch(r"typedef struct (\w+) \{\n(.*)\n\} \1;", text, flags=re.S):
        return Struct(struct[1], _fields(struct[2]), doc)
    text = " ".join(text.split())
    if opaque := re.fullmatch(r"typedef struct (\w+) \1;", text):
        return Opaque(opaque[1], doc)
    if callback := re.fullmatch(r"typedef (\w+) \(\*(\w+)\)\((.*)\);", text):
        return Callback(callback[2], callback[1], _parameters(callback[3]), doc)
    if alias := re.fullmatch(r"typedef (\w+) (\w+);", text):
        return Alias(alias[2], alias[1], doc)
    if function := re.fullmatch(r"([\w ]+?[ *]+)(adalora_\w+)\((.*)\);", text):
        return Function(function[2], _type(function[1]), _parameters(function[3]), doc)
    raise ValueError(f"unknown declaration: {text}")


def _fields(body: str) -> list[Variable]:
    fields, doc = [], []
    for line in map(str.strip, body.splitlines()):
        if line.startswith("//"):
            doc.append(line[2:].strip())
        else:
            fields.append(_variable(line.removesuffix(";"), doc))
            doc = []
    return fields


def _parameters(text: str) -> list[Variable]:
    if text == "void":
        return []
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [_variable(part.strip(), []) for part in parts]


def _variable(text: str, doc: list[str]) -> Variable:
    if pointer := re.fullmatch(r"(\w+) \(\*(\w+)\)\((.*)\)", text):
        return Variable(pointer[2], f"{pointer[1]} (*)({pointer[3]})", doc)
    plain = re.fullmatch(r"(.*[ *])(\w+)", text)
    if not plain:
        raise ValueError(f"unknown variable: {text}")
    return Variable(plain[2], _type(plain[1]), doc)


def _type(text: str) -> str:
    return " ".join(text.replace("*", " * ").split())


class Writer:
    """Turns declarations into Python."""

    def __init__(self, declarations: list[Declaration]) -> None:
        self.declarations = declarations
        self.structs = {d.name for d in declarations if isinstance(d, (Struct, Opaque))}
        self.names = {d.name for d in declarations if isinstance(d, (Alias, Callback))} | self.structs
        self.used: set[str] = set()

    def ctypes_type(self, c_type: str) -> str:
        """The ctypes type of a C type.

        A pointer to numbers becomes an address, `c_void_p`: what lies there belongs to the caller, on the host or on
        a device. A pointer to a struct keeps its type, so that a handle of the wrong kind is refused.
        """
        if callback := re.fullmatch(r"(\w+) \(\*\)\((.*)\)", c_type):
            return self._function_type(callback[1], _parameters(callback[2]))
        words = [word for word in c_type.split() if word not in ("const", "struct")]
        base, stars = words[0], words.count("*")
        if len(words) != 1 + stars:
            raise ValueError(f"unknown type: {c_type}")
        if stars == 0:
            return self._use(SCALARS[base]) if base in SCALARS else self._named(base)
        if base in self.structs:
            self.used.add("POINTER")
            return "POINTER(" * stars + base + ")" * stars
        if stars > 1:
            raise ValueError(f"unknown pointer: {c_type}")
        return self._use("c_char_p" if base == "char" and "const" in c_type.split() else "c_void_p")

    def _function_type(self, returns: str, parameters: list[Variable]) -> str:
        result = "None" if returns == "void" else self.ctypes_type(returns)
        self.used.add("CFUNCTYPE")
        return f"CFUNCTYPE({', '.join([result, *(self.ctypes_type(p.c_type) for p in parameters)])})"

    def _use(self, name: str) -> str:
        self.used.add(name)
        return name

    def _named(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"unknown type: {name}")
        return name

    def text(self) -> str:
        """The whole module."""
        body, after_class = "", True
        for d in self.declarations:
            if not isinstance(d, Function):
                is_class = isinstance(d, (Opaque, Struct))
                body += ("\n\n" if is_class or after_class else "\n") + self._write(d)
                after_class = is_class
        functions = [d for d in self.declarations if isinstance(d, Function)]
        body += "\n\nFUNCTIONS: dict[str, Function] = {\n"
        body += "".join(map(self._write_function, functions)) + "}\n"
        self.used |= {"Structure"}
        names = sorted(self.used, key=lambda n: (n.islower(), not n.isupper(), n))
        return HEAD.replace("IMPORTS\n", "".join(f"    {name},\n" for name in names)) + body

    def _write(self, d: Declaration) -> str:
        match d:
            case Constant():
                return f"{_comment(d.doc)}{d.name} = {d.value}\n"
            case Opaque():
                return f"class {d.name}(Structure):\n{_docstring(d.doc)}"
            case Alias():
                return f"{_comment(d.doc)}{d.name} = {self.ctypes_type(d.c_type)}\n"
            case Callback():
                return f"{_comment(d.doc)}{d.name} = {self._function_type(d.returns, d.parameters)}\n"
            case Struct():
                fields = "".join(
                    f'{_comment(f.doc, 8)}        ("{f.name}", {self.ctypes_type(f.c_type)}),\n' for f in d.fields
                )
                return f"class {d.name}(Structure):\n{_docstring(d.doc)}\n    _fields_ = [\n{fields}    ]\n"
        raise TypeError(d)

    def _write_function(self, d: Function) -> str:
        restype = "None" if d.returns == "void" else self.ctypes_type(d.returns)
        pairs = [f'("{p.name}", {self.ctypes_type(p.c_type)}),' for p in d.parameters]
        arguments = (
            f"({''.join(pairs)})"
            if len(pairs) < 2
            else "(\n" + "".join(f"            {p}\n" for p in pairs) + "        )"
        )
        status = d.returns == "adalora_status_t"
        return (
            f'    "{d.name}": Function(\n        restype={restype},\n        is_status={status},\n'
            f"        arguments={arguments},\n        doc={_string(d.doc)},\n    ),\n"
        )


HEAD = '''"""The C interface of libadalora in ctypes.

Generated from include/adalora.h by generate_bindings.py: generate it again instead of editing it.
"""

from __future__ import annotations

from ctypes import (
IMPORTS
)
from typing import Any, NamedTuple


class Function(NamedTuple):
    """A function of the library."""

    restype: Any
    # Whether the result is a status, 0 where all went well.
    is_status: bool
    # Names and types of the arguments.
    arguments: tuple[tuple[str, Any], ...]
    doc: str
'''


def _wrapped(doc: list[str], indent: int, prefix: str = "") -> list[str]:
    """Documentation at the width of the file: one paragraph for each block of lines and for each `@` entry."""
    paragraphs: list[str] = [""]
    for line in doc:
        if not line:
            paragraphs += ["", ""]
        elif line.startswith("@") or not paragraphs[-1]:
            paragraphs += [line] if paragraphs[-1] else []
            paragraphs[-1] = line
        else:
            paragraphs[-1] += " " + line
    lines: list[str] = []
    for paragraph in paragraphs:
        wrapped = textwrap.wrap(paragraph, WIDTH - indent - len(prefix), break_long_words=False, break_on_hyphens=False)
        lines += wrapped or [""]
    return [" " * indent + prefix + line if line else (" " * indent + prefix).rstrip() for line in lines]


def _comment(doc: list[str], indent: int = 0) -> str:
    return "".join(line + "\n" for line in _wrapped(doc, indent, "# "))


def _docstring(doc: list[str]) -> str:
    lines = _wrapped(doc, 7)
    if len(lines) == 1 and len(lines[0]) + 3 <= WIDTH:
        return f'    """{lines[0].strip()}"""\n'
    lines = [" " * 4 + line.strip() if line else "" for line in lines]
    return '    """' + _literal("\n".join(lines)).lstrip() + '\n    """\n'


def _string(doc: list[str]) -> str:
    # Room for the indented `doc="""` before its first line and for the closing `""",` after its last.
    lines = [line.strip() for line in _wrapped(doc, 19)]
    return '"""' + _literal("\n".join(lines)).rstrip() + '\n"""' if len(lines) > 1 else f'"""{_literal(lines[0])}"""'


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def generate(header: str) -> str:
    """The text of src/adalora/_bindings.py for the text of a header."""
    return Writer(parse(header)).text()


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--header", type=Path, default=HEADER)
    arguments.add_argument("--output", type=Path, default=OUTPUT)
    options = arguments.parse_args()
    options.output.write_text(generate(options.header.read_text()))


if __name__ == "__main__":
    main()
