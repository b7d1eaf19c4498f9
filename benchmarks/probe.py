"""The first minutes on a new chip: its two ceilings, what steps and turns take on it, and where that goes.

    python benchmarks/probe.py --device cuda

Copy rate of a GB and rate of an 8192-cubed bf16 product, by events on random numbers; then images a second of
a ResNet-18 at 32x32 with everything a step needs, and turns of the game, by engine; a whole game part by
part, cold and warm; the other batch sizes; and all of it without cuDNN's search for the fastest algorithm.
Every figure goes to rows.jsonl as it is found, and one that fails says why; no row is begun after
`--minutes`. MFU: the model's FLOPs over what the product reached. kernels-<row>.txt lists the kernels of
graphed and captured steps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from support import loops
from support.jobs import experiment, settings, untrained
from support.loops import flops_an_image, playing, training
from support.measuring import bytes_per_second, flops_per_second, seconds
from support.parts import play_by_parts, write_kernels
from support.recording import append_row
from support.speed import ROWS, start

from dau_fast.engine import steps as steps_module
from dau_fast.engine.device import run_flushed
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
    for name, work in rows(device, smoke, folder):
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


def rows(
    device: torch.device, smoke: bool, folder: Path
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what measures them, in the order of what is most worth knowing."""
    on_cuda = device.type == "cuda"
    yield "copy", lambda: {"bytes_per_second": bytes_per_second(device, 2**12 if smoke else 2**24)}
    dtype = torch.bfloat16 if on_cuda else torch.float32
    yield (
        "matrix product",
        lambda: {"flops_per_second": flops_per_second(device, 256 if smoke else 1024, dtype)},
    )
    engines = ENGINES if on_cuda else ("eager",)
    first, *others = (8,) if smoke else BATCHES
    for engine in engines:
        yield (
            f"{engine}, batch {first}{', cuDNN searches' if on_cuda else ''}",
            partial(step, device, engine, first, on_cuda, smoke, folder),
        )
        yield f"{engine}, turn of the game", partial(turn, device, engine, smoke, folder)
    for forget in ("random:0.1", "random:0.1", "class:0"):
        yield f"whole game, {forget}", partial(whole_game, device, forget, smoke)
    for batch in others:
        for engine in engines:
            name = f"{engine}, batch {batch}{', cuDNN searches' if on_cuda else ''}"
            yield name, partial(step, device, engine, batch, on_cuda, smoke)
    if on_cuda:
        for batch in (first, *others):
            for engine in engines:
                yield f"{engine}, batch {batch}", partial(step, device, engine, batch, False, smoke)


def step(
    device: torch.device, engine: str, batch: int, search: bool, smoke: bool, folder: Path | None = None
) -> dict[str, Any]:
    """Seconds and images a second of one step, its share of the product's rate, and what preparing took.

    folder: for a table of its kernels.
    """
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
        "first_call_seconds": first, **_list_kernels(work, steps, f"{engine}-batch-{batch}", folder, engine),
    }  # fmt: skip


def turn(device: torch.device, engine: str, smoke: bool, folder: Path) -> dict[str, Any]:
    """Seconds of one turn of the game, and what preparing took."""
    gc.collect()
    task, steps = _task(device, engine, smoke), 2 if smoke else 20
    config = settings(task)
    began = time.perf_counter()
    work = playing(task, config, steps)
    work()
    first = time.perf_counter() - began
    taken = seconds(work, device, 2 if smoke else 5) / steps
    return {
        "engine": engine, "batch": config.batch_size, "seconds": taken, "first_call_seconds": first,
        **_list_kernels(work, steps, f"{engine}-turn", folder, engine),
    }  # fmt: skip


def whole_game(device: torch.device, forget: str, smoke: bool) -> dict[str, Any]:
    """A game by its defaults on an original that knows nothing, part by part."""
    gc.collect()
    task = untrained(experiment(device, smoke=smoke, forget=forget))
    config = replace(settings(task), turns=4) if smoke else settings(task)
    return run_flushed(lambda: play_by_parts(task, config), device)


def _list_kernels(
    work: Callable[[], None], steps: int, name: str, folder: Path | None, engine: str
) -> dict[str, float]:
    """Launched one by one they are those of a graph, in more time."""
    if folder is None or engine == "eager":
        return {}
    return write_kernels(work, steps, folder / f"kernels-{name}.txt")


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
