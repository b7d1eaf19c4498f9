"""What a job is, and what the first of its processes does, counted as the game does it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dau_fast.config import DauConfig
from dau_fast.cost.network import Network
from dau_fast.cost.passes import (
    Passes,
    count_passes,
    lesson_sizes,
    share_rows,
    split_norm_batches,
)
from dau_fast.engine.evaluation import EVALUATION_BATCH
from dau_fast.methods.dau.schedule import Schedule

# DistributedDataParallel averages gradients in buckets: a first small one, the others of 25 MiB.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20


@dataclass(frozen=True)
class Job:
    """One unlearning. forget, retain, validation: images. image_bytes: of one uint8 image.

    processes: that share every batch, each on a device of its own. number_bytes: of activations, 2 for
    bf16 under autocast. streamed: whether images stay off the device until they are needed.
    """

    network: Network
    config: DauConfig
    forget: int
    retain: int
    validation: int
    image_bytes: float
    processes: int = 1
    number_bytes: int = 4
    streamed: bool = False

    @property
    def schedule(self) -> Schedule:
        """The game's own."""
        classes = self.network.classes
        return Schedule.plan(self.config, retain=self.retain, forget=self.forget, classes=classes)

    @property
    def lesson_sizes(self) -> list[int]:
        """Images of forget and validation set that the attacker warms up on."""
        return lesson_sizes(self.schedule, self.forget, self.validation)

    @property
    def norm_batches(self) -> dict[int, int]:
        """Batches of the BatchNorm pass, of all processes: by their images, how many."""
        return split_norm_batches(self.schedule.retain_images) if self.network.norms else {}

    @property
    def passes(self) -> Passes:
        """Of the first process."""
        return count_passes(
            self.config,
            forget=self.forget,
            retain=self.retain,
            validation=self.validation,
            classes=self.network.classes,
            batchnorm=self.network.norms > 0,
            processes=self.processes,
        )


@dataclass(frozen=True)
class Work:
    """What the first process does, which has the largest share.

    turns, recovery_steps: of the defender. looks: of the referee, the one at the original included.
    training_images: forward and backward. evaluated_images: shown to the referee. norm_images: of the
    BatchNorm pass. evaluation_batches: of both. attacker_steps; attacker_rows: forward and backward, in
    its own steps and in the defender's loss; judged_rows: forward, at looks. updates: parameters times
    steps. collectives, of all kinds; by ring algorithms, hops: messages one after the other, and
    wire_bytes: that a process sends.
    """

    turns: int
    recovery_steps: int
    looks: int
    training_images: int
    evaluated_images: int
    norm_images: int
    evaluation_batches: int
    attacker_steps: int
    attacker_rows: int
    judged_rows: int
    updates: int
    collectives: int
    hops: int
    wire_bytes: float


def count_work(job: Job) -> Work:
    """The first process's share of `job`, played to the game's last turn."""
    config, schedule, passes = job.config, job.schedule, job.passes
    turns, steps = schedule.turns, schedule.turns + schedule.recovery_steps
    rows = share_rows(config.batch_size, job.processes)
    messages = list(_list_messages(job))
    return Work(
        turns=turns,
        recovery_steps=schedule.recovery_steps,
        looks=schedule.looks,
        training_images=passes.turns + passes.recovery,
        evaluated_images=passes.looks + passes.lesson,
        norm_images=passes.batchnorm,
        evaluation_batches=_count_evaluation_batches(job),
        attacker_steps=config.warmup_steps + turns * config.attacker_steps,
        attacker_rows=config.warmup_steps * sum(job.lesson_sizes)
        + turns * (config.attacker_steps * 2 * config.batch_size + rows),
        judged_rows=passes.looks,
        updates=steps * job.network.parameters,
        collectives=sum(times for times, _, _ in messages),
        hops=sum(times * hops for times, hops, _ in messages),
        wire_bytes=sum(times * size for times, _, size in messages),
    )


def _count_evaluation_batches(job: Job) -> int:
    """Of looks, of the attacker's lesson and of the BatchNorm pass."""
    shown = job.schedule.looks * [job.forget, job.validation] + job.lesson_sizes
    batches = (math.ceil(share_rows(count, job.processes) / EVALUATION_BATCH) for count in shown)
    return sum(batches) + sum(job.norm_batches.values())


def _list_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """(how often, hops, bytes on the wire) of every kind of collective, in float32."""
    if job.processes == 1:
        return
    yield from _list_step_messages(job)
    yield from _list_turn_messages(job)
    yield from _list_look_messages(job)
    ranks = job.processes
    yield 2, ranks - 1, (ranks - 1) * 8  # rows of a batch, by process, once for each loop


def _list_step_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """Gradients, and statistics of BatchNorm."""
    ranks, network, schedule = job.processes, job.network, job.schedule
    steps, norms = schedule.turns + schedule.recovery_steps, network.norms
    buckets = 1 + max(0, math.ceil((4 * network.parameters - _FIRST_BUCKET) / _BUCKET))
    yield buckets * steps, *_reduce(ranks, network.parameters / buckets)
    if norms:
        # Sums, then squares; in the backward pass both gradients at once. Every layer counts as a mean one.
        channels = network.channels / norms
        passes = steps + sum(job.norm_batches.values())
        yield norms * passes, *_reduce(ranks, channels + 1)
        yield norms * passes, *_reduce(ranks, channels)
        yield norms * steps, *_reduce(ranks, 2 * channels)


def _list_turn_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """What the attacker sees and may study, and features or their correlation."""
    ranks, batch, features = job.processes, job.config.batch_size, job.network.features
    turns = job.schedule.turns
    yield turns, *_gather(ranks, batch, 2 * (job.network.classes + 1) + 2)
    if batch < features:
        yield turns, *_gather(ranks, batch, 2 * features)
    else:
        yield 2 * turns, *_reduce(ranks, 2 * features)
        yield turns, *_reduce(ranks, features**2)


def _list_look_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """The lesson's u, and what the referee learns at each look."""
    ranks, looks = job.processes, job.schedule.looks
    for shown, taught in zip((job.forget, job.validation), job.lesson_sizes, strict=True):
        yield 1, *_gather(ranks, taught, job.network.classes + 1)
        yield looks, *_gather(ranks, shown, 2)  # the attacker's score, and whether the label was right
    yield looks, 1, 1  # the first process's verdict


def _reduce(ranks: int, numbers: float) -> tuple[int, float]:
    """Hops and bytes of a sum over `ranks`, which goes round the ring twice."""
    return 2 * (ranks - 1), 2 * (ranks - 1) / ranks * 4 * numbers


def _gather(ranks: int, rows: int, width: int) -> tuple[int, float]:
    """Hops and bytes where each rank gets all of `rows`."""
    return ranks - 1, (ranks - 1) * 4 * share_rows(rows, ranks) * width
