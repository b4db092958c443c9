"""Which of CUDA's libraries a context takes: the real ones, which come with PyTorch, mostly without a driver.

Each case is a process of its own: what a process has loaded, it keeps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child import package

import adalora
from adalora._cuda import _WHEELS

# Where building the C++ tests leaves libraries that answer as CUDA does, in a folder for each version.
STUBS = Path(__file__).resolve().parents[2] / "target" / "cpp" / "stub_cuda"

# Prints what the context or the refusal says, the files of CUDA that the process has then, and what they are.
REPORT = """
import ctypes, json, re
import adalora

try:
    with adalora.Context("cuda", **arguments) as context:
        kind, text = "Context", context.describe()
except adalora.AdaLoRAError as error:
    kind, text = type(error).__name__, str(error)
maps = open("/proc/self/maps").read()
files = sorted(set(re.findall(r"/\\S*/lib(?:cudart|cublas)\\.so\\S*", maps)))
runtime = next((ctypes.CDLL(file) for file in files if "/libcudart" in file), None)
versions = [ctypes.c_int(), ctypes.c_int()]
if runtime is not None:
    runtime.cudaRuntimeGetVersion(ctypes.byref(versions[0]))
    runtime.cudaDriverGetVersion(ctypes.byref(versions[1]))
print(json.dumps([kind, text, files, [version.value for version in versions]]))
"""


def report(before: str = "", **arguments: object) -> tuple[str, str, list[str], list[int]]:
    program = f"{before}\narguments = {arguments!r}\n{REPORT}"
    command, environment = [sys.executable, "-c", program], os.environ | package(adalora.load())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def wheels() -> list[Path]:
    """Folders of the wheels that a machine without PyTorch in the process would use."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        for names in _WHEELS.values():
            files = [Path(root) / folder / name for name, folder in names.items()]
            if all(file.is_file() for file in files):
                return [file.parent for file in files]
    pytest.skip("no wheel of CUDA's libraries is installed")


def check(found: tuple[str, str, list[str], list[int]], folders: list[Path]) -> None:
    kind, text, files, (runtime, driver) = found
    assert len(files) == 2, "one libcudart and one libcublas, and no second copy"
    assert {Path(file).resolve().parent for file in files} == {folder.resolve() for folder in folders}
    assert f"libcudart {runtime // 1000}.{runtime % 1000 // 10} (/" in text
    assert f"libcublas {runtime // 1000}." in text
    for name in ("libcudart", "libcublas"):
        assert f"/{name}.so.{runtime // 1000})" in text
    if driver == 0:
        assert kind == "BackendUnavailableError"
        assert "cudaGetDeviceCount: cudaErrorInsufficientDriver (35): " in text
        assert "no CUDA driver" in text
    elif kind != "Context":
        assert kind == "BackendUnavailableError"
        assert "cudaGetDeviceCount: cudaError" in text


def test_of_pytorch_where_it_is_imported() -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("PyTorch was built without CUDA")
    check(report("import torch"), wheels())


def test_of_wheels_where_nothing_is_loaded() -> None:
    check(report(), wheels())


def installed(root: Path, *majors: int) -> str:
    """Make wheels of such libraries, and say how a program comes to see them alone."""
    (root / "nvidia").mkdir()
    (root / "nvidia" / "__init__.py").touch()
    for major in majors:
        for name, folder in _WHEELS[major].items():
            file = STUBS / f"cuda{major}" / name
            if not file.is_file():
                pytest.skip("no stand-in for CUDA (make test-cpp builds it)")
            (root / "nvidia" / folder).mkdir(parents=True, exist_ok=True)
            (root / "nvidia" / folder / name).symlink_to(file)
    return f"import ctypes, sys\nsys.path.insert(0, {str(root)!r})\n"


def check_wheels(found: tuple[str, str, list[str], list[int]], root: Path, major: int) -> None:
    kind, text, _, _ = found
    assert kind == "Context", text
    for name, folder in _WHEELS[major].items():
        assert f"({root / 'nvidia' / folder / name})" in text


@pytest.mark.parametrize("loaded", ["libcudart.so.12", "libcublas.so.12"])
def test_of_wheels_what_the_process_lacks(loaded: str, tmp_path: Path) -> None:
    """CUDA 12's wheels have a folder for each library, and some programs load one of the two alone."""
    before = installed(tmp_path, 12, 13)
    place = tmp_path / "nvidia" / _WHEELS[12][loaded] / loaded
    check_wheels(report(f"{before}ctypes.CDLL({str(place)!r})"), tmp_path, 12)


@pytest.mark.parametrize("driver", [12, 13])
def test_of_wheels_the_newest_that_the_driver_serves(driver: int, tmp_path: Path) -> None:
    before = installed(tmp_path, 12, 13)
    place = STUBS / f"driver{driver}" / "libcuda.so.1"
    check_wheels(report(f"{before}ctypes.CDLL({str(place)!r})"), tmp_path, driver)


def test_of_the_folder_that_is_named() -> None:
    folders = wheels()
    check(report(library_folder=":".join(map(str, dict.fromkeys(folders)))), folders)


def test_a_folder_without_them_is_refused_even_where_they_are_loaded(tmp_path: Path) -> None:
    wheels()
    kind, text, _, _ = report("from adalora._cuda import load_wheels\nload_wheels()", library_folder=str(tmp_path))
    assert kind == "BackendUnavailableError"
    assert "libcudart.so.13 (not there), libcublas.so.13 (not there), libcudart.so.12 (not there)" in text
    assert str(tmp_path) in text


def test_every_name_is_told_where_there_are_none() -> None:
    hidden = "import adalora.context\nadalora.context.load_wheels = lambda: None"
    kind, text, files, _ = report(hidden)
    if files:
        pytest.skip("the loader finds a CUDA of this machine")
    assert kind == "BackendUnavailableError"
    for name in ("libcudart.so.13", "libcublas.so.13", "libcudart.so.12", "libcublas.so.12"):
        assert f"{name}: cannot open shared object file" in text


def test_a_lent_handle_needs_its_library() -> None:
    hidden = "import adalora.context\nadalora.context.load_wheels = lambda: None"
    kind, text, _, _ = report(hidden, cublas_handle=4096)
    assert kind == "InvalidArgumentError"
    assert "desc.cublas_handle: found a handle, and no cuBLAS in this process" in text


def test_arguments_of_the_cpu_are_refused() -> None:
    with pytest.raises(adalora.InvalidArgumentError, match="threads: found 2, expected 0 on the CUDA backend"):
        adalora.Context("cuda", threads=2)
    with pytest.raises(adalora.InvalidArgumentError, match="device: found -1"):
        adalora.Context("cuda", device=-1)
