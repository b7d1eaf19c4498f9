"""Image equivalents of the other methods, from their settings and the sizes of the sets.

One equivalent is an image forward and backward; an image forward costs a third of it. Gradients of single
images count as those of a batch do, also where they cost more, and what the last layer alone takes counts
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dau_fast.cost.passes import FORWARDS_A_STEP
from dau_fast.engine.batches import steps_for


@dataclass(frozen=True)
class Sizes:
    """Images of each set. classwise: whether whole classes are forgotten."""

    forget: int
    retain: int
    validation: int
    classwise: bool


# Settings of a method and the sizes of the sets -> image equivalents.
Count = Callable[[Any, Sizes], float]

_FORWARD = 1 / FORWARDS_A_STEP


def count_rival(name: str, settings: Any, sizes: Sizes) -> float | None:
    """What method `name` costs with `settings`; None for one that is not known here.

    Of `amun` and `influence`, whose searches end when they have found something, the least that they cost.
    """
    count = COUNTS.get(name)
    return None if count is None else count(settings, sizes)


def _trained_on(settings: Any, images: int, batch_size: int, epochs: float | None = None) -> int:
    """Images of all steps of `batch_size` that make the passes over so many images."""
    wanted = settings.epochs if epochs is None else epochs
    return steps_for(wanted, images, batch_size) * batch_size


def _forget(settings: Any, sizes: Sizes) -> float:
    return _trained_on(settings, sizes.forget, settings.batch_size)


def _retain(settings: Any, sizes: Sizes) -> float:
    return _trained_on(settings, sizes.retain, settings.batch_size)


def _both(settings: Any, sizes: Sizes) -> float:
    """Batches of both sets, as often as the retain set asks for."""
    return 2 * _retain(settings, sizes)


def _by_turns(settings: Any, sizes: Sizes) -> float:
    """In every epoch a pass over the forget set and one over the retain set."""
    passes = (_trained_on(settings, n, settings.batch_size, 1) for n in (sizes.forget, sizes.retain))
    return settings.epochs * sum(passes)


def _scrub(settings: Any, sizes: Sizes) -> float:
    batch = settings.forget_batch_size
    ascents = min(settings.max_epochs, settings.epochs) * _trained_on(settings, sizes.forget, batch, 1)
    descents = settings.epochs * _trained_on(settings, sizes.retain, settings.batch_size, 1)
    return (ascents + descents) * (1 + _FORWARD)  # the original is asked about every image


def _bad_teacher(settings: Any, sizes: Sizes) -> float:
    lesson = max(1, round(settings.retain_share * sizes.retain)) + sizes.forget
    return _trained_on(settings, lesson, settings.batch_size) * (1 + 2 * _FORWARD)


def _amun(settings: Any, sizes: Sizes) -> float:
    neighbours = sizes.forget * (1 + _FORWARD)  # of images that one step turns
    return neighbours + _trained_on(settings, sizes.retain + 2 * sizes.forget, settings.batch_size)


def _head_only(settings: Any, sizes: Sizes) -> float:
    stand_ins = 0 if sizes.classwise else sizes.forget
    return (min(sizes.retain, settings.retain_images) + sizes.forget + stand_ins) * _FORWARD


def _mu_mis(settings: Any, sizes: Sizes) -> float:
    # Forward, two gradients of the input, each as much again, and a backward pass through all three, which
    # takes twice as much as they.
    return 3 * _forget(settings, sizes)


def _sfron(settings: Any, sizes: Sizes) -> float:
    descents = steps_for(settings.epochs, sizes.retain, settings.batch_size)
    ascents = math.ceil(descents / settings.forget_every)
    return sizes.forget + sizes.retain + (descents + ascents) * settings.batch_size


COUNTS: Mapping[str, Count] = {
    "amun": _amun,
    "bad_teacher": _bad_teacher,
    "boundary_expand": _forget,
    "boundary_shrink": lambda settings, sizes: sizes.forget * (1 + _FORWARD) + _forget(settings, sizes),
    "fisher": lambda _, sizes: sizes.retain,
    "ft": _retain,
    "ga": _forget,
    "head_only": _head_only,
    "influence": lambda settings, s: s.forget + s.retain + min(settings.samples, s.retain),
    "l1_sparse": _retain,
    "mu_mis": _mu_mis,
    "neggrad": _both,
    "noise": _retain,
    "regun": lambda settings, sizes: sizes.validation * _FORWARD + _both(settings, sizes),
    "rl": _by_turns,
    "salun": lambda settings, sizes: sizes.forget + _by_turns(settings, sizes),
    "scrub": _scrub,
    "sfron": _sfron,
    "ssd": lambda _, sizes: sizes.forget + sizes.retain,
    "uniform": _both,
}
