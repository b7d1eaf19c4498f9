# mypy: disable-error-code="import-untyped,misc"
"""Runs the CMake build of dau_fast._C and shortens README for the index; the rest is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds with CMake. A failure leaves the extension out and does not stop the install."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.unlink(missing_ok=True)  # so that a failed build cannot ship an older one
        try:
            _cmake_install(prefix=module.parent.parent)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error if isinstance(error, OSError) else "CMake failed, its errors are above"
            print(
                f"dau_fast: installed WITHOUT its compiled extension {ext.name}; the slower "
                f"PyTorch path will run. Reason: {reason}",
                file=sys.stderr,
                flush=True,
            )

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # an editable install must not keep an older one either
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def _cmake_install(prefix: Path) -> None:
    """Place the module in `prefix`/dau_fast."""
    environment = dict(os.environ)
    # CMake finds MSVC by itself, but not for Ninja.
    if shutil.which("ninja") and os.name != "nt":
        environment.setdefault("CMAKE_GENERATOR", "Ninja")
    # A new folder each time: a CMake cache would remember the ninja of a deleted isolated build.
    with tempfile.TemporaryDirectory() as build:
        for arguments in (
            ["-S", str(ROOT), "-B", build, f"-DPython_EXECUTABLE={sys.executable}"],
            ["--build", build, "--config", "Release"],
            ["--install", build, "--config", "Release", "--prefix", str(prefix)],
        ):
            subprocess.run(["cmake", *arguments], check=True, env=environment)


def describe() -> str:
    """README without what leads nowhere on a package index: pictures, and links into the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    text = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return f"{text}\nThe files that are named here are in the source distribution.\n"


setup(
    long_description=describe(),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "dau_fast._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=["CMakeLists.txt", *sorted(glob("csrc/*.h"))],  # for the source distribution
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
