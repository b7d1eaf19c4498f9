"""The first three minutes on a new chip: its two ceilings, and what a step of training takes on it.

    python benchmarks/probe.py --device cuda

Copy rate of a GB and rate of an 8192-cubed bf16 product, by events on random numbers; then images a second of
a ResNet-18 at 32x32 with everything a step needs, by batch size and engine, with cuDNN's search for the
fastest algorithm and without. Every figure goes to rows.jsonl as it is found, and one that fails says why;
no row is begun after `--minutes`. MFU: the model's FLOPs over what the product reached.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from support import loops
from support.jobs import experiment, untrained
from support.loops import flops_an_image, training
from support.measuring import bytes_per_second, flops_per_second, seconds
from support.recording import append_row
from support.speed import ROWS, start

from dau_fast.engine import steps as steps_module
from dau_fast.methods.task import Task

# The recipe's first.
BATCHES = (256, 64, 1024)
# A compiled step that is not captured says least, for half a minute.
ENGINES = ("eager", "graphed", "captured")


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="After which no row is begun.")
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-probe-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(device_name: str, minutes: float | None, record: Path | None, smoke: bool) -> None:
    """Measure row after row."""
    folder, device = start("probe", device_name, record)
    began, failed = time.perf_counter(), False
    for name, work in rows(device, smoke):
        if minutes and time.perf_counter() - began > 60 * minutes:
            print(f"out of time before {name}")
            break
        row: dict[str, Any] = {"row": name}
        try:
            row |= work()
        except Exception as error:
            row["failed"], failed = repr(error)[:500], True
        append_row(folder / ROWS, row)
        print(row, flush=True)
    if failed:
        raise SystemExit(1)


def rows(device: torch.device, smoke: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what measures them, in the order of what is most worth knowing."""
    on_cuda = device.type == "cuda"
    yield "copy", lambda: {"bytes_per_second": bytes_per_second(device, 2**12 if smoke else 2**24)}
    dtype = torch.bfloat16 if on_cuda else torch.float32
    yield (
        "matrix product",
        lambda: {"flops_per_second": flops_per_second(device, 256 if smoke else 1024, dtype)},
    )
    for search in (True, False) if on_cuda else (False,):
        for batch in (8,) if smoke else BATCHES:
            for engine in ENGINES if on_cuda else ("eager",):
                name = f"{engine}, batch {batch}{', cuDNN searches' if search else ''}"
                yield name, lambda e=engine, b=batch, s=search: step(device, e, b, s, smoke)


def step(device: torch.device, engine: str, batch: int, search: bool, smoke: bool) -> dict[str, Any]:
    """Seconds and images a second of one step, its share of the product's rate, and what preparing took."""
    gc.collect()
    task = _task(device, engine, smoke)
    steps = 2 if smoke else max(4, 4096 // batch)
    began = time.perf_counter()
    with nullcontext() if search else _unsearched():
        work = training(task, batch, steps)
        work()
        first = time.perf_counter() - began
        taken = seconds(work, device, 2 if smoke else 5) / steps
    peak = flops_per_second(device, 256 if smoke else 1024, task.original.precision or torch.float32)
    rate = batch / taken
    return {
        "engine": engine, "batch": batch, "cudnn_benchmark": search, "seconds": taken,
        "images_per_second": rate, "mfu_percent": 100 * rate * flops_an_image(task.original, task) / peak,
        "first_call_seconds": first,
    }  # fmt: skip


@contextmanager
def _unsearched() -> Iterator[None]:
    """The engine's steps take the algorithms that cuDNN guesses."""
    with ExitStack() as stack:
        for module in (steps_module, loops):
            stack.enter_context(mock.patch.object(module, "fastest_convolutions", return_value=nullcontext()))
        yield


def _task(device: torch.device, engine: str, smoke: bool) -> Task:
    return untrained(experiment(device, smoke=smoke, engine=engine))


if __name__ == "__main__":
    main()
