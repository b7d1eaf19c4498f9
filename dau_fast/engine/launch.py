"""Joining the processes that torchrun started, and reporting a failure once for all of them."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.starting import ENDING
from dau_fast.errors import UserError

_MOST_SECONDS = 10_000_000  # four months
_MOST_PROCESSES = 2**20


class Launch:
    """What torchrun says in the environment: one process of several, or one alone without it.

    rank: this process's number, from 0, and local_rank: on its machine; None where it is alone.
    local_count: how many processes its machine has.
    """

    def __init__(self) -> None:
        count = _read("WORLD_SIZE", "1", least=1)
        several = "RANK" in os.environ and count > 1
        self.rank = _read("RANK", "0", below=count) if several else 0
        self.local_count = _read("LOCAL_WORLD_SIZE", "1", least=1) if several else 1
        self.local_rank = _read("LOCAL_RANK", "0") if several else None
        self._several = several
        self._word: _FirstWord | None = None

    def join(self, device: torch.device, seconds: float) -> Ranks:
        """Meet the other processes, which then wait for one another for at most `seconds`.

        All but the first say nothing from here on.
        """
        if not 1 <= seconds <= _MOST_SECONDS:
            raise UserError(f"`timeout={seconds}`: expected seconds from 1 to {_MOST_SECONDS:,}")
        if not self._several:
            return ALONE
        _check_meeting_point()
        if self.rank > 0:
            logging.getLogger("dau_fast").setLevel(logging.CRITICAL)
            warnings.simplefilter("ignore")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Builds of PyTorch without torch.distributed do not have it.
        from torch.distributed.rendezvous import rendezvous

        patience = timedelta(seconds=seconds)
        store, rank, count = next(rendezvous("env://", timeout=patience))
        self._word = _FirstWord(store, count)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
        return Ranks(rank, count, self.local_count)

    def speaks(self) -> bool:
        """Whether this process is to tell why the run failed: the first one that asks, once they met.

        What goes wrong before is the same in all of them.
        """
        return self.rank == 0 if self._word is None else self._word.take()

    def leave(self) -> None:
        """Part with the other processes."""
        if dist.is_available() and dist.is_initialized():
            gc.collect()  # what still uses the group goes first: its threads must not outlive it
            dist.destroy_process_group()


def _read(name: str, usual: str, *, least: int = 0, below: int = _MOST_PROCESSES) -> int:
    """A number that torchrun leaves in the environment. UserError for anything else."""
    text = os.environ.get(name, usual)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) < below):
        raise UserError(
            f"the environment has {name}={text!r}: expected a whole number from {least} to {below - 1}, as "
            "torchrun sets it; start with torchrun, or unset RANK and WORLD_SIZE to run alone"
        )
    return int(text)


def _check_meeting_point() -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"the environment has RANK and no {name}: start with torchrun, or unset RANK to run alone"
            )
    _read("MASTER_PORT", "0", below=2**16)


class _FirstWord:
    """What the first of `count` processes that takes it has, even where others have ended by then.

    `store` may go down with the process that holds it. A machine's processes therefore share a file that
    has no name any more, and lasts as long as one of them does: each appends a mark when it has opened the
    file, and another one when it takes the word. Of several machines' first ones the store decides; without
    it each of them has the word.
    """

    _OPENED, _TAKEN = b".", b"!"

    def __init__(self, store: Any, count: int) -> None:
        self._store, self._count = store, count
        name = store.compare_set("dau_fast name", "", secrets.token_hex(16)).decode()
        path = Path(tempfile.gettempdir(), f"dau_fast-{name}")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, self._OPENED)
        try:
            if store.add("dau_fast opened", 1) == count:
                store.set("dau_fast all opened", "")
            store.wait(["dau_fast all opened"])
        finally:
            with suppress(OSError):  # another process was faster, or the system keeps names of open files
                path.unlink()

    def take(self) -> bool:
        """Whether this process is the first one; no second time."""
        os.write(self._file, self._TAKEN)
        marks = os.lseek(self._file, 0, os.SEEK_CUR)
        before = os.pread(self._file, marks - 1, 0)
        if self._TAKEN in before:
            return False
        if len(before) == self._count:
            return True  # all processes are on this machine
        try:
            return bool(self._store.add("dau_fast failed", 1) == 1)
        except RuntimeError:
            return True


def lost_contact(error: RuntimeError) -> str | None:
    """What was said about it where `error` comes from another process that failed or hangs, else None."""
    lines = str(error).strip().splitlines() or [""]
    distributed = isinstance(error, dist.DistError) if dist.is_available() else False
    return lines[0] if distributed or "gloo" in str(error).lower() else None


class Stopped(BaseException):
    """The process was asked to end by the signal `number`."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number


def end_cleanly_when_stopped() -> None:
    """Let every signal that ends a process unwind the program, so that nothing half-written is left behind.

    Further ones are ignored, as they would leave behind what the first one clears up; the third Ctrl-C ends
    the process where it is. What is ignored stays so, as by nohup and in a shell's background. One that comes
    where Python drops exceptions, as in a destructor, comes again after it.
    """
    presses = itertools.count(1)
    taken = [n for n in (signal.SIGINT, *ENDING) if signal.getsignal(n) is not signal.SIG_IGN]

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, insist if other == signal.SIGINT else signal.SIG_IGN)
        if number == signal.SIGINT:
            next(presses)
            raise KeyboardInterrupt
        raise Stopped(number)

    def insist(number: int, _frame: FrameType | None) -> None:
        if next(presses) >= 3:
            os._exit(128 + number)

    def arm() -> None:
        for number in taken:
            signal.signal(number, stop)

    drop = sys.unraisablehook

    def come_again(dropped: sys.UnraisableHookArgs) -> None:
        error = dropped.exc_value
        if not isinstance(error, (KeyboardInterrupt, Stopped)):
            drop(dropped)
            return
        arm()
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        # Not here, where it would be dropped as well.
        again = threading.Timer(0.01, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    sys.unraisablehook = come_again
    arm()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals, such as torchrun's once a process failed, do nothing inside; after it the next ends all."""
    every = (signal.SIGINT, *ENDING)
    for number in every:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number in every:
            signal.signal(number, signal.SIG_DFL)
