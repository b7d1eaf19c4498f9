"""The jobs whose cost is measured, on random images: in one process, or in several with Gloo.

Quality does not matter for cost, so nothing is trained first, and no model counts as ruined, as none knows
anything: every run does the work that dau_fast.cost predicts.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.cost import Job, Network, count_network
from dau_fast.data.images import Augmentation, Images
from dau_fast.data.split import Split
from dau_fast.engine.device import warm_up
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.job.assembly import network_builder
from dau_fast.methods.dau import game, referee
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task
from support.measuring import peak_memory

ARCH, ROUNDS = "small", 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One point of a series. x: what the series varies. forget, retain, validation: images.

    turns: None for the usual ones. size: of images, pixels. held_out: kept out of the fit, which is decided
    by its place in the series.
    """

    series: str
    x: float
    forget: int
    retain: int
    validation: int = 300
    classes: int = 10
    batch: int = 64
    turns: int | None = None
    sample: float | None = None
    size: int = 8
    processes: int = 1
    held_out: bool = False

    @property
    def config(self) -> DauConfig:
        """The usual game, of as many turns and with batches as large as the case says."""
        usual = DauConfig.default(
            classwise=False, retain_images=self.retain, forget_images=self.forget, retain_sample=self.sample
        )
        return replace(usual, batch_size=self.batch, turns=self.turns or usual.turns)

    @property
    def name(self) -> str:
        return f"{self.series}, {self.x:g}"


def cases(smoke: bool) -> list[Case]:
    """All series; every second point of each is held out, of the weak scaling every third."""
    unit, few = (40, 4) if smoke else (1000, 24)
    most = 2 if smoke else 3
    total = 3 * unit
    known = [
        [Case("forget set", share, max(1, round(share * total)), total - max(1, round(share * total)),
              turns=2 * few) for share in (0.01, 0.05, 0.1, 0.25, 0.5)],
        [Case("retain set", factor * unit, unit // 5, factor * unit) for factor in (1, 2, 5, 10)],
        [Case("retain set, sampled", factor * unit, unit // 5, factor * unit, sample=4.0)
         for factor in (1, 2, 5, 10)],
        [Case("classes", count, unit // 5, unit, classes=count, turns=2 * few)
         for count in (10, 100, 1000, 3000)],
        [Case("batch", batch, unit // 5, 2 * unit, batch=batch, turns=2 * few)
         for batch in (32, 64, 128, 256)],
        [Case("forget and validation set", factor * unit // 2, factor * unit // 2, unit,
              validation=factor * unit // 2, turns=few) for factor in (1, 2, 4, 8)],
        [Case("validation set", factor * unit, unit // 5, unit, validation=factor * unit, turns=few)
         for factor in (1, 2, 4)],
    ]  # fmt: skip
    for size, divisor in ((8, 1), (32, 2)):
        retain, shape, turns = unit // divisor, f"{size}x{size} images", few // divisor
        known.append([
            Case(f"strong scaling, {shape}", ranks, unit // 5, retain, turns=turns, size=size,
                 processes=ranks)
            for ranks in range(1, most + 1)
        ])  # fmt: skip
        known.append([
            Case(f"weak scaling, {shape}", ranks, ranks * unit // 5, ranks * retain, ranks * 300,
                 batch=ranks * 64, turns=turns, size=size, processes=ranks)
            for ranks in range(1, most + 1)
        ])  # fmt: skip
    # Two processes are in the fit of one kind of scaling, and three in that of the other.
    return [
        replace(case, held_out=place == 2 if case.series.startswith("weak") else place % 2 == 1)
        for series in known
        for place, case in enumerate(series[:2] if smoke else series)
    ]


def task_of(case: Case, ranks: Ranks = ALONE) -> Task:
    """Random images with random labels, forget, retain and validation one after the other."""
    sizes = [case.forget, case.retain, case.validation]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (sum(sizes), 3, case.size, case.size), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(0, case.classes, (sum(sizes),), generator=generator)
    names, half = tuple(str(label) for label in range(case.classes)), torch.full((3,), 0.5)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    images = Images(pixels, labels, names, None, half, half / 2, Augmentation(pad=1, flip=True))
    index = torch.arange(sum(sizes))
    forget, retain, validation = index.split(sizes)
    split = Split(index[: len(forget) + len(retain)], validation, index[:0], forget, retain, False)
    runtime = Runtime(ranks=ranks)
    fresh = network_builder(ARCH, images, runtime)
    return Task(images, split, 0, fresh(0), fresh, TrainingRecipe(), runtime=runtime)


def network_of(case: Case) -> Network:
    task = task_of(replace(case, forget=4, retain=4, validation=4))
    return count_network(task.original, task.images.batch(torch.arange(8)))


def job_of(case: Case) -> Job:
    image_bytes = 3 * case.size**2
    return Job(
        network_of(case), case.config, case.forget, case.retain, case.validation, image_bytes, case.processes
    )


# ---- seconds


@contextmanager
def once() -> Iterator[None]:
    """Games are played to their last turn and not again, whatever becomes of the model."""
    with mock.patch.multiple(referee, _LOSS=math.inf, _LEFT=0.0):
        yield


def timed(chosen: Sequence[Case], rounds: int, ranks: Ranks = ALONE) -> dict[str, list[float]]:
    """Seconds of every round, by case. Rounds go over all cases in turn, so that drift hits them alike."""
    found: dict[str, list[float]] = {case.name: [] for case in chosen}
    with once():
        for _ in range(rounds):
            for case in chosen:
                play = partial(game.unlearn, config=case.config)
                finished = run_timed("dau", play, task_of(case, ranks))
                assert finished.history is not None
                assert finished.history["step"][-1] == case.config.turns
                found[case.name].append(finished.seconds)
    return found


def measured(chosen: Sequence[Case], rounds: int) -> dict[str, list[float]]:
    """`timed`, with one thread a process, and for several processes in groups of their own."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted({case.processes for case in chosen}):
            mine = [case for case in chosen if case.processes == count]
            file = Path(folder) / f"{count}.json"
            # One process is a process of its own too: threads and libraries are then alike.
            mp.spawn(_rank, (count, folder, str(file), mine, rounds), nprocs=count)
            found |= json.loads(file.read_text())
    return found


def _rank(rank: int, count: int, folder: str, file: str, chosen: Sequence[Case], rounds: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warm_up(CPU)
    if count > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting-{count}", rank=rank, world_size=count)
    try:
        found = timed(chosen, rounds, Ranks(rank, count))
        if rank == 0:
            Path(file).write_text(json.dumps(found))
    finally:
        if count > 1:
            gc.collect()  # what still uses the group must go first: Gloo's threads would outlive it
            dist.destroy_process_group()


def typical(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians, by case."""
    return {name: median(rounds) for name, rounds in seconds.items()}


# ---- memory


def memory_cases(smoke: bool) -> list[Case]:
    """Each of which needs most in another phase."""
    if smoke:
        return [Case("memory", 0, 20, 64, 20, batch=32, turns=4)]
    known = [
        (100, 512, 100, 10, 128),
        (100, 512, 100, 10, 512),
        (4000, 128, 4000, 10, 32),
        (300, 128, 300, 5000, 32),
        (50, 64, 50, 20_000, 32),
        (2000, 64, 2000, 2000, 32),
    ]
    return [
        Case("memory", place, forget, retain, validation, classes, batch, turns=8)
        for place, (forget, retain, validation, classes, batch) in enumerate(known)
    ]


def held(case: Case) -> float:
    """Bytes at the worst moment of a run, images and the original included; timing is worthless then."""
    task = task_of(case)
    own = [task.images.pixels, *task.original.parameters()]
    with once():
        return peak_memory(lambda: game.unlearn(task, case.config), CPU) + sum(
            tensor.nbytes for tensor in own
        )
