"""Finding and loading the native library."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import native
import pytest

import adalora
from adalora import _bindings as c
from adalora import _library


def test_version_is_the_packages(library: adalora.Library) -> None:
    assert ".".join(map(str, library.version)) == adalora.__version__
    project = (Path(native.header.HERE) / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', project, flags=re.M)[1] == adalora.__version__
    assert library.abi_version == c.ADALORA_ABI_VERSION


def test_another_abi_version_is_refused_and_both_are_named(tmp_path: Path) -> None:
    fake = native.compile_library(
        tmp_path, "#include <stdint.h>\nuint32_t adalora_abi_version(void) { return 4711; }\n"
    )
    with pytest.raises(adalora.LibraryLoadError, match=rf"version 4711 .* version {c.ADALORA_ABI_VERSION}\b") as caught:
        adalora.load(fake)
    assert isinstance(caught.value, ImportError)
    assert str(fake) in str(caught.value)


def test_a_library_without_one_of_the_functions_is_refused(tmp_path: Path) -> None:
    source = f"#include <stdint.h>\nuint32_t adalora_abi_version(void) {{ return {c.ADALORA_ABI_VERSION}; }}\n"
    with pytest.raises(adalora.LibraryLoadError, match="exports no adalora_"):
        adalora.load(native.compile_library(tmp_path, source))


def test_another_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(adalora.LibraryLoadError, match="no adalora library"):
        adalora.load(native.compile_library(tmp_path, "int something(void) { return 1; }\n"))
    (tmp_path / "text.so").write_text("no library at all")
    with pytest.raises(adalora.LibraryLoadError, match="cannot load"):
        adalora.load(tmp_path / "text.so")
    with pytest.raises(adalora.LibraryLoadError, match="ADALORA_LIBRARY"):
        adalora.load(tmp_path / "nowhere.so")


def test_lookup_order(tmp_path: Path, library: adalora.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {}
    for name in ("argument", "environment", "bundled"):
        places[name] = tmp_path / f"{name}.so"
        shutil.copy2(library.path, places[name])
    monkeypatch.setenv("ADALORA_LIBRARY", str(places["environment"]))
    monkeypatch.setattr(_library, "BUNDLED", places["bundled"])
    assert adalora.load(places["argument"]).path == str(places["argument"])
    assert adalora.load().path == str(places["environment"])
    monkeypatch.delenv("ADALORA_LIBRARY")
    assert adalora.load().path == str(places["bundled"])


def test_a_library_is_loaded_once(library: adalora.Library, tmp_path: Path) -> None:
    assert adalora.load(library.path) is library
    link = tmp_path / "link.so"
    link.symlink_to(library.path)
    assert adalora.load(link) is library


def test_contexts_of_two_libraries_live_side_by_side(tmp_path: Path, library: adalora.Library) -> None:
    copy = tmp_path / "copy.so"
    shutil.copy2(library.path, copy)
    with adalora.Context(library=copy) as one, adalora.Context(library=library) as other:
        assert one.library.path == str(copy)
        assert one.describe() and other.describe()


def test_status_names(library: adalora.Library) -> None:
    for name, status in vars(c).items():
        if name.startswith("ADALORA_ERROR_") or name == "ADALORA_SUCCESS":
            assert library.adalora_status_name(status).decode() == name
    assert library.adalora_status_name(4711) == b"unknown status"


@pytest.mark.parametrize("name", [name for name in vars(c) if name.startswith("ADALORA_ERROR_")])
def test_every_status_has_an_exception(name: str) -> None:
    error = adalora.errors.error_of(getattr(c, name), "the text")
    assert isinstance(error, adalora.AdaLoRAError)
    assert type(error) is not adalora.AdaLoRAError
    assert (error.status, error.status_name, str(error)) == (getattr(c, name), name, "the text")


def test_an_unknown_status_is_an_error_all_the_same() -> None:
    error = adalora.errors.error_of(4711, "the text")
    assert (error.status, error.status_name) == (4711, "unknown status")
