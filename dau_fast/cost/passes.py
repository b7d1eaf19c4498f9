"""How many images pass through the defender, by what for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dau_fast.config import DauConfig
from dau_fast.engine.evaluation import EVALUATION_BATCH
from dau_fast.methods.dau.schedule import Schedule

# A backward pass costs two forward ones: gradients of inputs, and of weights.
FORWARDS_A_STEP = 3


@dataclass(frozen=True)
class Passes:
    """Images that one process sees in a game, each time counted; the first process's share is the largest.

    turns, recovery: forward and backward. looks, lesson, batchnorm: forward alone, shown to the referee, to
    the attacker before the first turn, and for BatchNorm's statistics.
    """

    turns: int
    recovery: int
    looks: int
    lesson: int
    batchnorm: int

    @property
    def equivalents(self) -> float:
        """Image equivalents: 1 for an image forward and backward, 1/3 for one forward."""
        return self.turns + self.recovery + (self.looks + self.lesson + self.batchnorm) / FORWARDS_A_STEP


def count_passes(
    config: DauConfig,
    *,
    forget: int,
    retain: int,
    validation: int,
    classes: int,
    batchnorm: bool,
    processes: int = 1,
) -> Passes:
    """A game's, played to its last turn on sets of as many images in `classes` classes.

    batchnorm: whether the network has any. processes: that share every batch. A sensitivity other than
    "classifier" takes passes of its own, which are not among these.
    """
    schedule = Schedule.plan(config, retain=retain, forget=forget, classes=classes)
    rows = share_rows(config.batch_size, processes)
    norm_batches = split_norm_batches(schedule.retain_images) if batchnorm else {}
    return Passes(
        turns=3 * schedule.turns * rows,
        recovery=schedule.recovery_steps * rows,
        looks=schedule.looks * sum(share_rows(count, processes) for count in (forget, validation)),
        lesson=sum(share_rows(count, processes) for count in lesson_sizes(schedule, forget, validation)),
        batchnorm=sum(times * share_rows(size, processes) for size, times in norm_batches.items()),
    )


def lesson_sizes(schedule: Schedule, forget: int, validation: int) -> list[int]:
    """Images of forget and validation set that the attacker warms up on."""
    return [min(count, schedule.lesson_images) for count in (forget, validation)]


def share_rows(count: int, processes: int) -> int:
    """The first process's part of `count` rows, as Ranks.rows deals them out."""
    return math.ceil(count / processes)


def split_norm_batches(images: int) -> dict[int, int]:
    """Batches of the BatchNorm pass over `images`, of all processes: by their images, how many."""
    if images < 2:
        return {}
    count = math.ceil(images / EVALUATION_BATCH)
    size, larger = divmod(images, count)
    return {size: count - larger} | ({size + 1: larger} if larger else {})
