"""ResNet-50 at 224x224 on random images of ImageNet's shape: speed, utilisation and memory by batch size.

Steps of training and turns of the game, with everything they need, on uint8 images that lie on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.cost import Job, Network, count_memory, count_network, count_training_memory
from dau_fast.data.images import Images
from dau_fast.data.split import Forget
from dau_fast.engine.runtime import Runtime, choose_precision
from dau_fast.errors import UserError
from dau_fast.job.assembly import network_builder
from dau_fast.job.experiment import Experiment
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from support.jobs import settings, synthetic, untrained
from support.loops import flops_an_image, playing, training
from support.measuring import flops_per_second, peak_memory, seconds
from support.recording import append_row

BATCHES, STEPS, ROUNDS = (32, 64, 128, 256), 10, 5


def task(device: torch.device, engine: str, smoke: bool) -> Task:
    """An untrained ResNet-50 on as many images as show what resident ones cost; toys: the small network."""
    count, size, classes, arch = (180, 16, 10, "small") if smoke else (6000, 224, 1000, "resnet50")
    images = _images(count, size, classes, device)
    runtime = Runtime(device, choose_precision("auto", device), engine)
    job = Experiment(
        images, Forget("random:0.1", fraction=0.1), (get_method("dau"),),
        network_builder(arch, images, runtime), TrainingRecipe(), runtime=runtime,
    )  # fmt: skip
    return untrained(job)


@cache
def _images(count: int, size: int, classes: int, device: torch.device) -> Images:
    """Made once: a GB of random numbers takes longer than a row."""
    return synthetic(count, size, classes).to(device)


def rows(device: torch.device, smoke: bool, file: Path) -> list[dict[str, Any]]:
    """One row for each batch size, engine and kind of step, in `file` as it comes.

    A batch that memory does not hold says so.
    """
    found = []
    for engine in ("eager", "captured") if device.type == "cuda" else ("eager",):
        for batch in (8,) if smoke else BATCHES:
            for what in ("training", "game"):
                found.append({"what": what, "engine": engine, "batch": batch} | _row(
                    device, engine, batch, what, smoke
                ))  # fmt: skip
                append_row(file, found[-1])
                print(found[-1], flush=True)
    return found


def _row(device: torch.device, engine: str, batch: int, what: str, smoke: bool) -> dict[str, Any]:
    gc.collect()  # what the last row held
    if device.type == "cuda":
        torch.cuda.empty_cache()
    steps = 2 if smoke else STEPS
    chosen = task(device, engine, smoke)
    config = replace(settings(chosen), batch_size=batch)
    model = chosen.original
    network = count_network(model, chosen.images.batch(chosen.split.train[:8]))
    expected = {"predicted_bytes": predicted(chosen, network, config, what)}
    flops = flops_an_image(model, chosen)
    peak = flops_per_second(device, 256 if smoke else 1024, model.precision or torch.float32)
    try:
        game = what == "game"
        work = playing(chosen, config, steps) if game else training(chosen, batch, steps)
        taken = seconds(work, device, 2 if smoke else ROUNDS)
        held = most_held(work, device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True} | expected
    except UserError as error:
        # The engine tries smaller parts before it gives up, which says so.
        short = "memory does not hold" in str(error)
        return ({"out_of_memory": True} if short else {"failed": str(error)}) | expected
    rate = (3 if game else 1) * batch * steps / taken
    return {
        "images_per_second": rate,
        "utilisation_percent": 100 * rate * flops / peak,
        "peak_bytes": held,
        "flops_an_image": flops,
        "matrix_product_flops_per_second": peak,
    } | expected


def most_held(work: Callable[[], None], device: torch.device) -> int:
    """Bytes at the worst moment of `work`: on CUDA all there are, on the CPU those that came with it."""
    if device.type != "cuda":
        return peak_memory(work, device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def predicted(task: Task, network: Network, config: DauConfig, what: str) -> float:
    """Bytes that the model of memory expects in a whole job's phase."""
    split, pixels = task.split, task.images.pixels
    number = 2 if task.original.precision == torch.bfloat16 else 4
    job = Job(
        network, config, len(split.forget), len(split.retain), len(split.validation),
        pixels[0].nbytes, number_bytes=number,
    )  # fmt: skip
    parts = count_memory(job)["game"] if what == "game" else count_training_memory(job)
    return sum(parts.values())
