"""Builds the native library by cargo and bundles it: the wheel holds no extension module, so it serves every Python 3.

The crate lies one folder up in a checkout; a source distribution carries a copy of it in `crate/`.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
LIBRARY = "libadalora.so"
# What cargo needs of the crate; what is not there yet is left out.
CRATE_FILES = (
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "README.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "src",
    "include",
    "benches",
    "tests",
)


def crate() -> Path:
    """The folder of the Rust crate."""
    for folder in (HERE / "crate", HERE.parent):
        if (folder / "Cargo.toml").is_file():
            return folder
    raise SystemExit(f"the Rust crate is neither in {HERE / 'crate'} nor in {HERE.parent}")


def build_library() -> Path:
    """Build the shared library, and return the file."""
    cargo = shutil.which("cargo") or shutil.which("cargo", path=str(Path.home() / ".cargo" / "bin"))
    if cargo is None:
        raise SystemExit("adalora is built by Rust's cargo, which is not on PATH: install Rust, and try again")
    command = [
        cargo,
        "rustc",
        "--release",
        "--locked",
        "--lib",
        "--crate-type",
        "cdylib",
        "--message-format",
        "json-render-diagnostics",
    ]
    done = subprocess.run(command, cwd=crate(), stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cargo could not build the library: status {done.returncode}")
    for message in map(json.loads, done.stdout.splitlines()):
        if message["reason"] == "compiler-artifact" and message["target"]["name"] == "adalora":
            for file in message["filenames"]:
                if file.endswith(".so"):
                    return Path(file)
    raise SystemExit("cargo named no shared library among what it built")


class BuildWithLibrary(build_py):
    """Puts the library beside the package's modules: into the build, or into the checkout of an editable install."""

    def run(self) -> None:
        """Build the Python files, then the library."""
        super().run()
        shutil.copy2(build_library(), self._bundled())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Everything that is installed."""
        return [*super().get_outputs(include_bytecode), self._bundled()]

    def _bundled(self) -> str:
        folder = HERE / "src" / "adalora" if self.editable_mode else Path(self.build_lib) / "adalora"
        return os.fspath(folder / LIBRARY)


class PlatformWheel(bdist_wheel):
    """Tags the wheel `py3-none-<platform>`: ctypes needs no particular interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag's three parts."""
        return "py3", "none", super().get_tag()[2]


class SdistWithCrate(sdist):
    """Carries the crate along, so that the source distribution builds by itself."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the Python files, then the crate."""
        super().make_release_tree(base_dir, files)
        for name in CRATE_FILES:
            source, target = crate() / name, Path(base_dir) / "crate" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.is_file():
                shutil.copy2(source, target)


class NativeDistribution(Distribution):
    """A distribution that depends on the platform."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel goes with the platform's libraries."""
        return True


setup(
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel, "sdist": SdistWithCrate},
)
