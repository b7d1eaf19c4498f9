"""How many images pass through the defender, by what for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dau_fast.config import DauConfig
from dau_fast.engine.evaluation import EVALUATION_BATCH, count_batches
from dau_fast.methods.dau.difficulty import LESSON_IMAGES
from dau_fast.methods.dau.schedule import Schedule
from dau_fast.methods.dau.unseen import NEIGHBOURS
from dau_fast.methods.dau.view import View

# A backward pass costs two forward ones: gradients of inputs, and of weights.
FORWARDS_A_STEP = 3


@dataclass(frozen=True)
class Passes:
    """Images that one process sees in a game, each time counted; the first process's share is the largest.

    turns: forward and backward. teaching, looks, lesson, batchnorm: forward alone, through the original in
    every turn, shown to the referee, to the attacker before the first turn, and for BatchNorm's statistics.
    departing: through the original, which says where forget images depart to. levelling: for the level of the
    logits of a class.
    """

    turns: int
    teaching: int
    looks: int
    lesson: int
    batchnorm: int
    departing: int = 0
    levelling: int = 0

    @property
    def equivalents(self) -> float:
        """Image equivalents: 1 for an image forward and backward, 1/3 for one forward."""
        return self.turns + self.forward / FORWARDS_A_STEP

    @property
    def forward(self) -> int:
        """Images that pass forward alone."""
        shown = self.looks + self.lesson + self.levelling
        return self.teaching + self.departing + shown + self.batchnorm


def count_passes(
    config: DauConfig,
    *,
    forget: int,
    retain: int,
    validation: int,
    classes: int,
    features: int,
    batchnorm: bool,
    earlier: int = 0,
    classwise: bool = False,
    pictures: bool = True,
    processes: int = 1,
) -> Passes:
    """A game's, played to its last turn on sets of as many images in `classes` classes.

    features: of an image, that the last layer takes. batchnorm: whether the network has any. earlier: images
    of requests before this one. classwise: whether whole classes are forgotten. pictures: whether inputs are
    such. processes: that share every batch. The
    sensitivities "input" and "full" take passes of their own, which are not among these.
    """
    schedule = plan_schedule(config, forget=forget, retain=retain, classes=classes, features=features)
    rows = share_rows(config.batch_size, processes)
    norm_batches = split_norm_batches(schedule.norm_images) if batchnorm else {}
    shown, lesson = (sizes(schedule, forget, validation) for sizes in (look_sizes, lesson_sizes))
    asked = departing_sizes(config, schedule, forget, validation, classwise=classwise, pictures=pictures)
    return Passes(
        turns=3 * schedule.turns * rows,
        teaching=count_taught_sets(config, earlier) * schedule.turns * rows,
        looks=schedule.looks * sum(share_rows(count, processes) for count in shown),
        lesson=sum(share_rows(count, processes) for count in (*lesson, *exposing_sizes(config, shown))),
        batchnorm=sum(times * share_rows(size, processes) for size, times in norm_batches.items()),
        departing=sum(times * share_rows(count, processes) for count, times in asked),
        levelling=(classwise and config.departure > 0) * share_rows(shown[-1], processes),
    )


def plan_schedule(config: DauConfig, *, forget: int, retain: int, classes: int, features: int) -> Schedule:
    """The game's own, on sets of as many images in `classes` classes; features: of an image."""
    columns = View.of(config).count_columns(classes, features)
    return Schedule.plan(config, retain=retain, forget=forget, columns=columns)


def count_taught_sets(config: DauConfig, earlier: int) -> int:
    """Sets of a batch that the original is shown: retain, and the forget part after earlier requests."""
    return (config.anchor > 0) * (1 + (earlier > 0))


def look_sizes(schedule: Schedule, forget: int, validation: int) -> list[int]:
    """Images of forget, validation and retain set that the referee looks at."""
    return [min(count, schedule.look_images) for count in (forget, validation, schedule.retain_images)]


def lesson_sizes(schedule: Schedule, forget: int, validation: int) -> list[int]:
    """Images of forget and validation set that the attacker warms up on."""
    return [min(count, schedule.lesson_images) for count in (forget, validation)]


def departing_sizes(
    config: DauConfig, schedule: Schedule, forget: int, validation: int, *, classwise: bool, pictures: bool
) -> list[tuple[int, int]]:
    """Images that the original is asked about before a game, and how many times each.

    Of a class the forget images; spread over classes what is beside them and beside retain images, and
    validation.
    """
    if not config.departure:
        return []
    if classwise:
        return [(forget, 1)]
    beside = NEIGHBOURS if pictures else 1
    return [(forget, beside), (ranked_images(schedule), beside), (validation, 1)]


def ranked_images(schedule: Schedule) -> int:
    """Retain images that forget images are ranked among."""
    return min(schedule.look_images, learned_images(schedule))


def learned_images(schedule: Schedule) -> int:
    """Retain images that the plain model learns from."""
    return min(LESSON_IMAGES, schedule.retain_images)


def exposing_sizes(config: DauConfig, looks: list[int]) -> list[int]:
    """Images of validation and retain set that say how exposed a class is; looks: those of `look_sizes`."""
    return [] if config.label_conditioned else looks[1:]


def share_rows(count: int, processes: int) -> int:
    """The first process's part of `count` rows, as Ranks.rows deals them out."""
    return math.ceil(count / processes)


def split_norm_batches(images: int) -> dict[int, int]:
    """Batches of the BatchNorm pass over `images`, of all processes: by their images, how many."""
    if images < 2:
        return {}
    count = count_batches(images, EVALUATION_BATCH)
    size, larger = divmod(images, count)
    return {size: count - larger} | ({size + 1: larger} if larger else {})
