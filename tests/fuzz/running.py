"""Cases in processes of their own, so that a crash or a hang is found too."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from .damage import damage
from .ops import OPS
from .readers import TARGETS as READERS

TARGETS = {**READERS, "ops": OPS}
# Seconds after which a case hangs, and bytes that a process of cases may take.
HANGS, MEMORY = 10, 8 << 30


def run_case(name: str, number: int, samples: list[bytes], folder: Path) -> str | None:
    """Case `number` of target `name` in the new folder `folder`: None where it passes, else the trouble."""
    target, chance = TARGETS[name], random.Random(f"{name} {number}")
    content = damage(chance.choice(samples), chance)
    inside = folder / "inside"
    inside.mkdir(parents=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            target.run(content, inside, chance)
    except target.passes:
        pass
    except Exception:
        return traceback.format_exc()
    if [path.name for path in folder.iterdir()] != ["inside"]:
        return f"wrote outside: {sorted(path.name for path in folder.iterdir())}"
    return None


def run_batch(name: str, first: int, count: int) -> list[tuple[int, str]]:
    """Cases from `first` on in a process of their own: the number and the trouble of each that fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(name, first, count, os.fdopen(writer, "w"))
    os.close(writer)
    failures: list[tuple[int, str]] = []
    at = first
    with os.fdopen(reader) as told:
        for line in told:
            number, trouble = json.loads(line)
            at = number if trouble is None else at
            if trouble is not None:
                failures.append((number, trouble))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return failures
    ended = "hangs" if code == -signal.SIGALRM else f"ends the process ({code})"
    return [*failures, (at, ended), *run_batch(name, at + 1, first + count - at - 1)]


def _work(name: str, first: int, count: int, told: Any) -> None:
    """Run the cases, telling each before it begins, and leave the process."""
    faulthandler.disable()  # crashes are told by the exit code
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "ASAN_OPTIONS" not in os.environ:  # its shadow is larger than any memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    samples, root = TARGETS[name].samples(), Path(tempfile.mkdtemp(prefix="dau_fast-fuzz-"))
    try:
        for number in range(first, first + count):
            print(json.dumps([number, None]), file=told, flush=True)
            signal.alarm(HANGS)
            trouble = run_case(name, number, samples, root / str(number))
            shutil.rmtree(root / str(number), ignore_errors=True)
            if trouble is not None:
                print(json.dumps([number, trouble]), file=told, flush=True)
        signal.alarm(0)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        told.close()
        os._exit(0)
