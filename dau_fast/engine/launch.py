"""Joining the processes that torchrun started, and reporting a failure once for all of them."""

from __future__ import annotations

import gc
import logging
import os
import signal
import warnings
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dau_fast.engine.ranks import ALONE, Ranks


class Launch:
    """What torchrun says in the environment: one process of several, or one alone without it.

    rank: this process's number, from 0, and local_rank: on its machine; None where it is alone.
    local_count: how many processes its machine has.
    """

    def __init__(self) -> None:
        several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.rank = int(os.environ["RANK"]) if several else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if several else None
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several else 1
        self._several = several
        self._store: Any = None

    def join(self, device: torch.device, seconds: float) -> Ranks:
        """Meet the other processes, which then wait for one another for at most `seconds`.

        All but the first say nothing from here on.
        """
        if not self._several:
            return ALONE
        if self.rank > 0:
            logging.getLogger("dau_fast").setLevel(logging.CRITICAL)
            warnings.simplefilter("ignore")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Builds of PyTorch without torch.distributed do not have it.
        from torch.distributed.rendezvous import rendezvous

        patience = timedelta(seconds=seconds)
        self._store, rank, count = next(rendezvous("env://", timeout=patience))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=count, timeout=patience)
        return Ranks(rank, count, self.local_count)

    def speaks(self) -> bool:
        """Whether this process is to tell why the run failed: the first one that asks, once they met."""
        if self._store is None:
            return self.rank == 0
        try:
            return bool(self._store.add("dau_fast failed", 1) == 1)
        except RuntimeError:
            return True  # the store went down with the process that held it

    def leave(self) -> None:
        """Part with the other processes."""
        if dist.is_available() and dist.is_initialized():
            gc.collect()  # what still uses the group goes first: its threads must not outlive it
            dist.destroy_process_group()


def lost_contact(error: RuntimeError) -> str | None:
    """What was said about it where `error` comes from another process that failed or hangs, else None."""
    lines = str(error).strip().splitlines() or [""]
    distributed = isinstance(error, dist.DistError) if dist.is_available() else False
    return lines[0] if distributed or "gloo" in str(error).lower() else None


class Stopped(BaseException):
    """The process was asked to end (SIGTERM)."""


def end_cleanly_when_stopped() -> None:
    """Let SIGTERM unwind the program as Ctrl-C does, so that nothing half-written is left behind."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
