"""Calling the command line inside the test's own process, and looking at what it left behind."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from dau_fast.data.split import decode_roles
from dau_fast.engine.starting import ENDING
from dau_fast.unlearn import main

Report = dict[str, Any]

LABELS = load_digits().target


@dataclass(frozen=True)
class Called:
    """What one call of the command line left behind."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def report(self) -> Report:
        return json.loads((self.folder / "report.json").read_text(), parse_constant=_no_constant)

    def weights(self, method: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{method}.safetensors")

    def metadata(self, method: str) -> dict[str, str]:
        with safe_open(self.folder / f"{method}.safetensors", "pt") as file:
            return json.loads(file.metadata()["dau_fast"])

    def roles(self, method: str = "original", count: int = len(LABELS)) -> np.ndarray:
        return decode_roles(self.metadata(method)["split"], count)


def _no_constant(name: str) -> None:
    pytest.fail(f"{name} in report.json is not JSON")


# What Python does not show unless it is asked to.
_SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def call(
    folder: Path, *arguments: object, turns: int | None = None, start: Callable[[], None] = main
) -> Called:
    """Run the command line in this process with --out `folder`; an exception that escapes fails the test.

    Short trainings, one retraining, on the CPU, unless `arguments` say otherwise. turns: of the game, for
    tests to which its length does not matter. start: what reads the arguments.

    stderr holds the warnings that Python would have printed there, too.
    """
    given = ["dau-fast", "--epochs", "3", "--retrain-recipe", "literature", "--device", "cpu"]
    given += ["--out", folder, *arguments]
    if turns is not None:
        given += ["--config", short_game(turns)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        patch.setattr(sys, "argv", [str(argument) for argument in given])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setenv("COLUMNS", "400")
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
            patch.delenv(name, raising=False)
        try:
            start()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            torch.set_flush_denormal(False)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    shown = [w for w in warned if not issubclass(w.category, _SILENT)]
    stderr = err.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in shown)
    return Called(code, out.getvalue(), stderr, folder)


@functools.cache
def short_game(turns: int) -> Path:
    """A file for --config that lets the game end after as many turns."""
    file = Path(tempfile.mkdtemp(prefix="short-game-")) / "config.toml"
    file.write_text(f"[settings.dau]\nturns = {turns}\n")
    atexit.register(shutil.rmtree, file.parent)
    return file


def succeed(
    folder: Path, *arguments: object, turns: int | None = None, start: Callable[[], None] = main
) -> Called:
    called = call(folder, *arguments, turns=turns, start=start)
    assert called.code == 0, called.stderr
    return called


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: files with their bytes, folders with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def environment() -> dict[str, str]:
    """What a process of its own needs to find the package as this one does.

    It is no worker of pytest-xdist, even where this one is: pytest-benchmark would not measure in one.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
