"""setup.py with and without a C++ compiler. No network: it runs in this interpreter, unisolated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parent.parent
LINE = "installed WITHOUT its compiled extension dau_fast._C; the slower PyTorch path will run"
MODULE = "_C*.so" if os.name != "nt" else "_C*.pyd"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` with its output in `folder`; `environment` is added to this one."""
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (result.stdout + result.stderr).splitlines() if LINE in line]


def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake, to see it fail to find a compiler")
    result = build(tmp_path, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    (line,) = said(result)
    assert line.endswith("Reason: CMake failed, its errors are above")
    assert "/nonexistent/c++" in result.stderr
    assert list(tmp_path.rglob(MODULE)) == []


def test_without_cmake_the_install_succeeds_and_says_so(tmp_path: Path) -> None:
    result = build(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (line,) = said(result)
    assert "'cmake'" in line


def test_a_failed_build_does_not_ship_an_older_module(tmp_path: Path) -> None:
    older = tmp_path / "lib" / "dau_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    older.parent.mkdir(parents=True)
    older.touch()
    assert build(tmp_path, PATH=str(tmp_path)).returncode == 0
    assert not older.exists()


@pytest.mark.slow
def test_with_a_compiler_the_module_is_built_where_python_finds_it(tmp_path: Path) -> None:
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    if shutil.which("cmake") is None or not any(map(shutil.which, compilers)):
        pytest.skip("needs cmake and a C++ compiler")
    pytest.importorskip("pybind11")
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    assert said(result) == []
    (module,) = (tmp_path / "lib" / "dau_fast").glob(MODULE)
    program = "import _C; print(_C.count(bits=(0, 0), n=0), _C.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(module.parent)}
    loaded = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert loaded.split() == ["0", str(module)]
