"""A pytest plugin: `adalora.peft.install()`, PEFT's functions that it replaces made to fail, native calls counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from peft.tuners import adalora as theirs

import adalora.peft
from adalora import _bindings

calls: Counter[str] = Counter()


def replaced_functions() -> list[FunctionType]:
    """What PEFT's code is never to run again once this package is installed."""
    model, layer = ("forward", "update_and_allocate"), ("forward", "get_delta_weight", "merge", "unmerge")
    model += ("_create_new_module", "resize_modules_by_rank_pattern", "resize_state_dict_by_rank_pattern")
    functions = [getattr(theirs.AdaLoraModel, name) for name in model]
    functions += [getattr(cls, name) for cls in (theirs.SVDLinear, theirs.SVDConv2d) for name in layer]
    functions += [each for each in vars(theirs.RankAllocator).values() if isinstance(each, FunctionType)]
    quantized = (getattr(theirs, name, None) for name in ("SVDQuantLinear", "SVDLinear8bitLt", "SVDLinear4bit"))
    return functions + [cls.forward for cls in quantized if cls is not None]


def refuse(*args: Any, **kwargs: Any) -> None:
    """Stands in the place of a replaced function's code."""
    raise AssertionError("a function of PEFT that adalora.peft replaces was called")


def count_native_calls() -> None:
    """Count every call of a native function in `calls`."""
    library = adalora.load()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    for name in _bindings.FUNCTIONS:
        setattr(library, name, counted(name, getattr(library, name)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write the counts."""
    parser.addoption("--native-calls", type=Path, required=True, help="file for the number of calls by function")


def pytest_configure() -> None:
    """Before any test is collected."""
    functions = replaced_functions()
    adalora.peft.install()
    for function in functions:
        # Whoever holds the function meets this.
        function.__code__ = refuse.__code__
    count_native_calls()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the counts."""
    session.config.getoption("--native-calls").write_text(json.dumps(calls))
