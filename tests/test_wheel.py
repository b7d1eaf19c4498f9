"""What others are given: a source distribution, a wheel that is built from it, and a clean install of that.

No network: the build runs in this interpreter, unisolated, and the clean install borrows its libraries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pip")

ROOT = Path(__file__).resolve().parent.parent
# Built where it is found, or made by a build.
MADE = ("PKG-INFO", "setup.cfg", "dau_fast.egg-info")

# That are supported, besides this one.
PYTHONS = [f"3.{minor}" for minor in range(11, 15) if minor != sys.version_info[1]]
# Of a wheel alone: PyTorch, which dau_fast imports when it is needed, need not be there.
UNPACKED = """
import sys
sys.path.insert(0, sys.argv[1])
import dau_fast._C as compiled
assert compiled.__file__.startswith(sys.argv[1]), compiled.__file__
print(compiled.count(bits=(0, 0), n=0))
"""

INSTALLED = """
import sys
from importlib.resources import files
import dau_fast, dau_fast._C as compiled
assert dau_fast.__file__.startswith(sys.prefix), dau_fast.__file__
assert compiled.__file__.startswith(sys.prefix), compiled.__file__
for page in ("page", "audit", "layout", "picture"):
    assert files("dau_fast.report").joinpath(page + ".html.jinja").is_file()
print(compiled.count(bits=(0, 0), n=0))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=others | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, so that a build leaves nothing beside them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, to tell the repository's files from others")
    copy = tmp_path_factory.mktemp("tree")
    # What git follows: a virtual environment beside it is some GB.
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    program = f"import setuptools.build_meta as build; build.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=tree)
    (packed,) = folder.glob("dau_fast-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


def test_the_source_distribution_holds_what_the_repository_holds(tree: Path, sdist: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    apart = {name for name in files(tree) ^ files(sdist) if not name.startswith(MADE)}
    assert {name for name in apart if not name.startswith(".github/")} == set()


def test_what_an_index_shows_has_no_picture_or_link_that_leads_nowhere(sdist: Path) -> None:
    metadata = message_from_string((sdist / "PKG-INFO").read_text(encoding="utf-8"))
    shown = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert isinstance(shown, str)
    assert {"# dau_fast", "## Try it", "## Limits"} <= set(shown.splitlines())
    assert "docs/own-model.md" in shown
    assert "![" not in shown
    links = re.findall(r"\]\(([^)]*)\)", shown)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_works_in_a_clean_environment(sdist: Path, tmp_path: Path) -> None:
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    if shutil.which("cmake") is None or not any(map(shutil.which, compilers)):
        pytest.skip("needs cmake and a C++ compiler")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path)
    run(*pip, *build, cwd=sdist)
    (wheel,) = tmp_path.glob("dau_fast-*.whl")
    assert f"-cp{sys.version_info[0]}{sys.version_info[1]}-" in wheel.name
    place = tmp_path / "clean"
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=tmp_path)
    scheme = {"base": str(place), "platbase": str(place)}
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / Path(sys.executable).name
    # A path in a .pth file lends the libraries there, without an editable install of this very package.
    borrowed = Path(sysconfig.get_path("purelib", "venv", scheme)) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib"))
    install = ("--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    run(*pip, *install, cwd=tmp_path)
    assert run(python, "-c", INSTALLED, cwd=tmp_path).split() == ["0"]
    assert "Usage" in run(python, "-m", "dau_fast", "--help", cwd=tmp_path)


def find_python(version: str) -> str | None:
    """An interpreter of `version` that starts, on the path or among pyenv's."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for place in (shutil.which(f"python{version}"), *sorted(kept.glob(f"{version}.*/bin/python"))):
        if place and subprocess.run([place, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(place)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_another_pythons_wheel_has_the_compiled_module(sdist: Path, tmp_path: Path, version: str) -> None:
    """Built by what this Python has of build tools, which are Python alone or programs."""
    pytest.importorskip("pybind11")
    python = find_python(version)
    if python is None or shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip(f"needs Python {version}, cmake and a C++ compiler")
    program = f"import setuptools.build_meta as build; print(build.build_wheel({str(tmp_path)!r}))"
    run(python, "-c", program, cwd=sdist, PYTHONPATH=sysconfig.get_path("purelib"))
    (wheel,) = tmp_path.glob("dau_fast-*.whl")
    tag = "cp" + version.replace(".", "")
    assert f"-{tag}-{tag}-" in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    assert run(python, "-c", UNPACKED, tmp_path / "unpacked", cwd=tmp_path).split() == ["0"]
