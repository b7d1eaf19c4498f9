"""The C++ tests of csrc/ under AddressSanitizer and UBSan, built by plain CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_cpp_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    if os.name == "nt" or not any(map(shutil.which, compilers)):
        pytest.skip("needs g++ or clang++")
    if shutil.which("cmake") is None or shutil.which("ctest") is None:
        pytest.skip("needs cmake and ctest")
    build = str(tmp_path)
    run("cmake", "-S", str(ROOT), "-B", build, "-DDAU_FAST_TESTS=ON", "-DDAU_FAST_MODULE=OFF")
    # What users run is built and tested as the module; this is for what only sanitizers see.
    run("cmake", "--build", build, "--parallel", "2", "--target", "tests_sanitized")
    said = run("ctest", "--test-dir", build, "--output-on-failure", "-R", "sanitized")
    assert "100% tests passed" in said
    assert "out of 1" in said
