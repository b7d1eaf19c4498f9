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
    departing_sizes,
    exposing_sizes,
    learned_images,
    lesson_sizes,
    look_sizes,
    plan_schedule,
    ranked_images,
    share_rows,
    split_norm_batches,
)
from dau_fast.engine.evaluation import EVALUATION_BATCH
from dau_fast.engine.losses import ASKED_TOGETHER
from dau_fast.methods.dau.schedule import Schedule
from dau_fast.methods.dau.unseen import count_unseen
from dau_fast.methods.dau.view import View

# DistributedDataParallel averages gradients in buckets: a first small one, the others of 25 MiB.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20


@dataclass(frozen=True)
class Job:
    """One unlearning. forget, retain, validation: images. image_bytes: of one uint8 image.

    processes: that share every batch, each on a device of its own. number_bytes: of activations, 2 for
    bf16 under autocast. streamed: whether images stay off the device until they are needed. earlier: images
    of requests before this one. classwise: whether whole classes are forgotten. pictures: whether inputs are
    such.
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
    earlier: int = 0
    classwise: bool = False
    pictures: bool = True

    @property
    def schedule(self) -> Schedule:
        """The game's own."""
        network, sizes = self.network, {"forget": self.forget, "retain": self.retain}
        return plan_schedule(self.config, **sizes, classes=network.classes, features=network.features)

    @property
    def levels(self) -> bool:
        """Whether the logits of a class that is gone are made a constant."""
        return self.classwise and self.config.departure > 0

    @property
    def columns(self) -> int:
        """How many numbers the attacker sees of a sample."""
        return View.of(self.config).count_columns(self.network.classes, self.network.features)

    @property
    def look_sizes(self) -> list[int]:
        """Images of forget, validation and retain set that the referee looks at."""
        return look_sizes(self.schedule, self.forget, self.validation)

    @property
    def lesson_sizes(self) -> list[int]:
        """Images of forget and validation set that the attacker warms up on."""
        return lesson_sizes(self.schedule, self.forget, self.validation)

    @property
    def norm_batches(self) -> dict[int, int]:
        """Batches of the BatchNorm pass, of all processes: by their images, how many."""
        return split_norm_batches(self.schedule.norm_images) if self.network.norms else {}

    @property
    def passes(self) -> Passes:
        """Of the first process."""
        return count_passes(
            self.config,
            forget=self.forget,
            retain=self.retain,
            validation=self.validation,
            classes=self.network.classes,
            features=self.network.features,
            batchnorm=self.network.norms > 0,
            earlier=self.earlier,
            classwise=self.classwise,
            pictures=self.pictures,
            processes=self.processes,
        )


@dataclass(frozen=True)
class Work:
    """What the first process does, which has the largest share.

    turns: of the defender. looks: of the referee, those at the original and at the finished model included.
    training_images: forward and backward. taught_images: forward through the original.
    evaluated_images: shown to the referee and to the attacker. norm_images: of the BatchNorm pass.
    evaluation_batches: of these three. rated_images: through the features of the plain model of the retain
    set, no pass of the defender. attacker_steps; attacker_rows: forward and backward, in its own steps and in
    the defender's loss; judged_rows: forward, at looks. updates: parameters times turns.
    collectives, of all kinds; by ring algorithms, hops: messages one after the other, and wire_bytes: that a
    process sends.
    """

    turns: int
    looks: int
    training_images: int
    taught_images: int
    evaluated_images: int
    norm_images: int
    evaluation_batches: int
    rated_images: int
    attacker_steps: int
    attacker_rows: int
    judged_rows: int
    updates: int
    collectives: int
    hops: int
    wire_bytes: float


def count_work(job: Job) -> Work:
    """The first process's share of `job`, one game to its last turn."""
    config, schedule, passes = job.config, job.schedule, job.passes
    turns = schedule.turns
    rows = share_rows(config.batch_size, job.processes)
    messages = list(_list_messages(job))
    return Work(
        turns=turns,
        looks=schedule.looks,
        training_images=passes.turns,
        taught_images=passes.teaching + passes.departing,
        evaluated_images=passes.looks + passes.lesson + passes.levelling,
        norm_images=passes.batchnorm,
        evaluation_batches=_count_evaluation_batches(job),
        rated_images=_count_rated_images(job),
        attacker_steps=config.warmup_steps + turns * config.attacker_steps,
        attacker_rows=config.warmup_steps * sum(job.lesson_sizes)
        + turns * (config.attacker_steps * 2 * config.batch_size + rows),
        judged_rows=passes.looks,
        updates=turns * job.network.parameters,
        collectives=sum(times for times, _, _ in messages),
        hops=sum(times * hops for times, hops, _ in messages),
        wire_bytes=sum(times * size for times, _, size in messages),
    )


def _count_evaluation_batches(job: Job) -> int:
    """Of the original, of looks, of the attacker's lesson, of the level and of the BatchNorm pass."""
    taught = job.schedule.turns * (job.config.anchor > 0)
    shown = (
        job.schedule.looks * job.look_sizes + job.lesson_sizes + exposing_sizes(job.config, job.look_sizes)
    )
    shown += job.levels * job.look_sizes[-1:]
    sizes = job.schedule, job.forget, job.validation
    for count, times in departing_sizes(job.config, *sizes, classwise=job.classwise, pictures=job.pictures):
        shown += times * [count]
    batches = (math.ceil(share_rows(count, job.processes) / EVALUATION_BATCH) for count in shown)
    return taught + sum(batches) + sum(job.norm_batches.values())


def _count_rated_images(job: Job) -> int:
    """What the plain model learns from, on every process, and its share of what is rated."""
    config, sets = job.config, (job.forget, job.validation)
    if not config.asks_plain:
        return 0
    learned = learned_images(job.schedule)
    count = learned + config.difficulty * share_rows(sum(sets), job.processes)
    if not config.departure > 0 < config.plain_share:
        return count
    scored: tuple[int, ...] = sets
    if not job.classwise:  # another plain model learns from both sets, and rates validation once more
        count += count_unseen(job.forget, learned, job.retain)
        scored = (*sets, job.validation, ranked_images(job.schedule))
    return count + sum(share_rows(size, job.processes) for size in scored)


def _list_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """(how often, hops, bytes on the wire) of every kind of collective, in float32."""
    if job.processes == 1:
        return
    yield from _list_step_messages(job)
    yield from _list_turn_messages(job)
    yield from _list_look_messages(job)
    ranks = job.processes
    if job.config.difficulty:
        yield 2, *_gather(ranks, job.forget + job.validation, 1)  # with true labels, and with wrong ones
    if job.config.departure:
        yield from _list_departure_messages(job)
    loops = 2 if job.schedule.settled_turns and job.network.norms else 1
    yield loops, ranks - 1, (ranks - 1) * 8  # rows of a batch, by process


def _list_departure_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """What both models say, and of a class that is gone the least logit of retain images."""
    ranks, classes = job.processes, job.network.classes
    ranked = () if job.classwise else (ranked_images(job.schedule),)
    scored = (job.forget, job.validation, *ranked, *(job.validation for _ in ranked))
    for count in (job.forget, *ranked, *(scored if job.config.plain_share else ())):
        yield 1, *_gather(ranks, count, classes)
    if job.levels:
        yield 1, *_gather(ranks, job.look_sizes[-1], 1)
        return
    for count in (job.forget, *ranked, job.validation, job.validation):
        yield 1, *_gather(ranks, count, 1)


def _list_step_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """Gradients, and statistics of BatchNorm."""
    ranks, network = job.processes, job.network
    steps, norms = job.schedule.turns, network.norms
    buckets = 1 + max(0, math.ceil((4 * network.parameters - _FIRST_BUCKET) / _BUCKET))
    yield buckets * steps, *_reduce(ranks, network.parameters / buckets)
    if norms:
        # Sums, then squares; in the backward pass both gradients at once. Every layer counts as a mean one.
        channels = network.channels / norms
        normed = steps - job.schedule.settled_turns
        passes = normed + sum(job.norm_batches.values())
        yield norms * passes, *_reduce(ranks, channels + 1)
        yield norms * passes, *_reduce(ranks, channels)
        yield norms * normed, *_reduce(ranks, 2 * channels)


def _list_turn_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """What the attacker sees and may study, whether losses were finite, features or their correlation."""
    ranks, batch, features = job.processes, job.config.batch_size, job.network.features
    turns = job.schedule.turns
    yield turns, *_gather(ranks, batch, 2 * job.columns + 2)
    yield turns // ASKED_TOGETHER + 1, *_gather(ranks, ranks, 2)  # how many losses were finite, of 8 bytes
    if not job.config.beta:
        return
    if batch < features:
        yield turns, *_gather(ranks, batch, 2 * features)
    else:
        yield 2 * turns, *_reduce(ranks, 2 * features)
        yield turns, *_reduce(ranks, features**2)


def _list_look_messages(job: Job) -> Iterator[tuple[int, int, float]]:
    """The lesson's u, and what the referee learns at each look."""
    ranks, looks = job.processes, job.schedule.looks
    for count in job.lesson_sizes:
        yield 1, *_gather(ranks, count, job.columns)
    for count in job.look_sizes:
        yield looks, *_gather(ranks, count, 2)  # the attacker's score, and whether the label was right
    for count in exposing_sizes(job.config, job.look_sizes):
        yield 1, *_gather(ranks, count, 3 + job.network.classes)
    yield looks + 1, 1, 1  # the first process's verdict, and in the end whether the model was ruined


def _reduce(ranks: int, numbers: float) -> tuple[int, float]:
    """Hops and bytes of a sum over `ranks`, which goes round the ring twice."""
    return 2 * (ranks - 1), 2 * (ranks - 1) / ranks * 4 * numbers


def _gather(ranks: int, rows: int, width: int) -> tuple[int, float]:
    """Hops and bytes where each rank gets all of `rows`."""
    return ranks - 1, (ranks - 1) * 4 * share_rows(rows, ranks) * width
