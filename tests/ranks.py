"""Running a test's work in several processes of one Gloo group."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def start(rank: int, ranks: int, folder: str, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timeout=timedelta(seconds=60), rank=rank, world_size=ranks
    )
    try:
        work(rank, *arguments)
    finally:
        gc.collect()  # what still uses the group must go first: Gloo's threads would outlive it
        dist.destroy_process_group()


# Importing these takes seconds: a server does it once, and processes fork off it.
SHARED = ["dau_fast.api", "dau_fast.job.experiment", "pytest", "torch._dynamo", "torch.distributed.fsdp"]


def together(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run work(rank, *arguments) in `ranks` processes; an assertion that fails in one fails the test."""
    mp.set_forkserver_preload(SHARED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(start, (ranks, folder, work, *arguments), nprocs=ranks, start_method="forkserver")
