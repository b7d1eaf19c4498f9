"""The jobs that loops and whole runs are timed on: digits on a CPU, CIFAR's shape on CUDA."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import torch

from dau_fast.config import DauConfig, fast_recipe, split_config, training_recipe
from dau_fast.data import named as data
from dau_fast.data.split import Forget
from dau_fast.engine.runtime import Runtime, choose_precision
from dau_fast.job.assembly import network_builder
from dau_fast.job.experiment import Experiment, make_task
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task


@cache
def synthetic(count: int, size: int = 32, classes: int = 10) -> data.Images:
    """Random images of CIFAR's shape, augmented as CIFAR is; the last sixth is the test part."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    half = torch.full((3,), 0.5)
    names = tuple(str(label) for label in range(classes))
    return data.Images(
        pixels.contiguous(memory_format=torch.channels_last), labels, names,
        torch.arange(count - count // 6, count), half, half / 2, data.Augmentation(pad=4, flip=True),
    )  # fmt: skip


def experiment(
    device: torch.device,
    *,
    smoke: bool,
    engine: str = "auto",
    precision: str = "auto",
    forget: str = "random:0.1",
    epochs: int | None = None,
    methods: tuple[str, ...] = ("dau", "retrain"),
) -> Experiment:
    """The main job: digits and the small network; on CUDA CIFAR's shape and size and a ResNet-18."""
    on_cuda = device.type == "cuda"
    name, arch = ("cifar10", "resnet18") if on_cuda else ("digits", "small")
    images = (synthetic(60_000) if on_cuda else data.load("digits")).to(device)
    epochs = epochs or (2 if smoke or on_cuda else None)
    recipe, fast = training_recipe(name, epochs), fast_recipe(name, epochs)
    runtime = Runtime(device, choose_precision(precision, device), engine)
    return Experiment(
        images,
        Forget.parse(forget, images.class_names),
        tuple(get_method(method) for method in methods),
        network_builder(arch, images, runtime),
        recipe,
        {"retrain_fast": asdict(fast)},
        shares=split_config(name),
        runtime=runtime,
    )


def untrained(job: Experiment) -> Task:
    """The task of the job's first seed with an original that was never trained, for loops alone."""
    return make_task(job, job.draw_roles(job.seed), job.seed)


def settings(task: Task) -> DauConfig:
    """The game as the command line plays it."""
    chosen: DauConfig = get_method("dau").resolve(task)
    return chosen
