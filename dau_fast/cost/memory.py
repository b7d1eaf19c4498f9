"""What one process's device holds in each phase of a job, and how far the sets may grow until it is full."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dau_fast.cost.passes import count_taught_sets, learned_images, ranked_images, share_rows
from dau_fast.cost.work import Job
from dau_fast.engine.evaluation import EVALUATION_BATCH
from dau_fast.methods.dau.difficulty import FEATURES, count_patch_numbers
from dau_fast.methods.dau.unseen import count_unseen

# Of an image, on every process: its label, its places in the split and in the order of a pass, its exam.
_IMAGE_BYTES = 5 * 8 + 1
# Where classes go, also: its row in their targets, the class it goes to, and how much it says.
_DEPARTING_BYTES = 8 + 8 + 4
# Of an image, in the pass for BatchNorm's statistics: where it is cropped, and whether it is mirrored.
_DRAW_BYTES = 3 * 8
# Results of a residual block's layers that are there at once, where no graph keeps them.
_LIVE = 4
# Numbers a row of logits takes in a step beside the network's own: in float32, as softmax, in u and as
# gradients of these.
_LOGIT_COPIES = 6
# The same, of those that the original teaches from.
_TAUGHT_COPIES = 3
# The same of the targets of a class that goes: what both models say of it, their product, and one more.
_DEPARTING_COPIES = 4
# The same of images spread over classes, where more is kept until all of it is known.
_UNSEEN_COPIES = 6
# The same of a plain model's scores: before and after its bias, and without the label's.
_SCORE_COPIES = 4
# Numbers that a filter's answer to a patch takes.
_PATCH_COPIES = 5
# Numbers of float32 that a feature takes in the fit: as seen, twice, and standardised, and in float64 three
# times.
_FEATURE_COPIES = 9
# The same at a look, without gradients: logits, u, and two of the attacker's forms of it.
_JUDGED_COPIES = 4

Parts = dict[str, float]


def count_memory(job: Job) -> dict[str, Parts]:
    """Bytes by part of what one process's device holds, in each phase of `job`."""
    return {
        "difficulty of images": _hold_plain(job),
        "departures": _hold_departures(job),
        "warm-up of the attacker": _hold_lesson(job),
        "game": _hold_turn(job),
        "looks": _hold_look(job),
        "BatchNorm statistics": _hold_norm_batch(job),
    }


def count_training_memory(job: Job) -> Parts:
    """Bytes by part in a step of training alone, on one batch of the size of the game's, as in retraining."""
    return _hold_step(job, share_rows(job.config.batch_size, job.processes))


def predict_memory(job: Job) -> tuple[str, float]:
    """The phase that needs most memory, and its bytes."""
    phase, parts = find_fullest(job)
    return phase, sum(parts.values())


def find_fullest(job: Job) -> tuple[str, Parts]:
    """The phase that needs most memory, and its bytes by part."""
    return max(count_memory(job).items(), key=lambda item: sum(item[1].values()))


def _hold_always(job: Job) -> Parts:
    images = job.forget + job.retain + job.validation + job.earlier
    departs = job.config.departure > 0
    return {
        "weights": 2 * _weight_bytes(job),  # the original's and the defender's
        "images": 0.0 if job.streamed else job.image_bytes * images,
        "labels and indices": float((_IMAGE_BYTES + departs * _DEPARTING_BYTES) * images),
        "targets": departs * job.forget * _row_bytes(job),
    }


def _hold_trainee(job: Job) -> Parts:
    """What stays between the steps of a model in training."""
    weights = _weight_bytes(job)
    low = weights / 4 * job.number_bytes if job.number_bytes < 4 else 0.0
    return _hold_always(job) | {
        "gradients": weights,
        "optimiser state": weights,
        "low precision": low,
    }


def _hold_step(job: Job, rows: int) -> Parts:
    """A training step on `rows` images."""
    return _hold_trainee(job) | {
        "copies for the rehearsal": _weight_bytes(job),
        "activations": rows * job.network.activations,
        "logits": rows * _LOGIT_COPIES * _row_bytes(job),
    }


def _hold_turn(job: Job) -> Parts:
    """A step on three sets, the original's pass, and of several processes all that the attacker sees."""
    rows = share_rows(job.config.batch_size, job.processes)
    taught = count_taught_sets(job.config, job.earlier) * rows
    gathered = 0.0 if job.processes == 1 else 2 * 2 * job.config.batch_size * _seen_bytes(job)
    logits = (3 * rows * _LOGIT_COPIES + taught * _TAUGHT_COPIES) * _row_bytes(job)
    return _hold_step(job, 3 * rows) | {
        "activations": 3 * rows * job.network.activations + taught * _LIVE * job.network.largest,
        "logits": logits + gathered,
    }


def _hold_departures(job: Job) -> Parts:
    """What both models say of the forget images while it is made one."""
    if not job.config.departure:
        return _hold_always(job)
    rows = job.forget * _DEPARTING_COPIES
    if not job.classwise:  # what the plain model says of validation and of images to rank among, too
        rows = job.forget * _UNSEEN_COPIES + 2 * job.validation + 2 * ranked_images(job.schedule)
    return _hold_always(job) | {"targets": rows * _row_bytes(job)}


def _hold_plain(job: Job) -> Parts:
    """The plain model of the retain set while it is fitted, in float64, or while it scores a batch."""
    if not job.config.asks_plain:
        return _hold_always(job)
    learned = learned_images(job.schedule)
    if job.config.departure > 0 < job.config.plain_share and not job.classwise:
        learned += count_unseen(job.forget, learned, job.retain)
    rows = min(EVALUATION_BATCH, share_rows(job.forget + job.validation, job.processes))
    weights = 8.0 * FEATURES * job.network.classes
    # Sums by class and, of the larger system, its solution; then both once more in float32.
    fit = {
        "features": _FEATURE_COPIES * 4.0 * FEATURES * learned,
        "plain model": weights * (1.5 if learned < FEATURES else 2.5),
    }
    answers = rows * _PATCH_COPIES * 4.0 * count_patch_numbers(math.sqrt(job.image_bytes / 3))
    scores = rows * _SCORE_COPIES * _row_bytes(job)
    use = {
        "features": 4.0 * FEATURES * learned,
        "plain model": weights / 2,
        "activations": max(answers, scores),
    }
    return _hold_always(job) | max(fit, use, key=lambda parts: sum(parts.values()))


def _hold_lesson(job: Job) -> Parts:
    forget, validation = (_seen_bytes(job) * count for count in job.lesson_sizes)
    hidden = 4.0 * 4 * job.config.attacker_hidden
    return _hold_always(job) | {
        "u of the lesson": forget + validation,
        "attacker": max(2 * (forget + validation), forget + 2 * validation) + hidden * sum(job.lesson_sizes),
    }


def _hold_look(job: Job) -> Parts:
    rows = min(EVALUATION_BATCH, share_rows(max(job.look_sizes), job.processes))
    return _hold_trainee(job) | {
        "activations": rows * _LIVE * job.network.largest,
        "logits": rows * _JUDGED_COPIES * _row_bytes(job),
    }


def _hold_norm_batch(job: Job) -> Parts:
    rows = max([0, *(share_rows(size, job.processes) for size in job.norm_batches)])
    images = job.forget + job.retain + job.validation
    return _hold_trainee(job) | {
        "activations": rows * _LIVE * job.network.largest,
        "labels and indices": float((_IMAGE_BYTES + _DRAW_BYTES) * images),
    }


def _weight_bytes(job: Job) -> float:
    return 4.0 * job.network.parameters


def _row_bytes(job: Job) -> float:
    """Of logits."""
    return 4.0 * job.network.classes


def _seen_bytes(job: Job) -> float:
    """Of what the attacker sees of a sample."""
    return 4.0 * job.columns


# ---- limits


@dataclass(frozen=True)
class Breaking:
    """What fails first when all sets grow together. growth: the largest factor that works, 0 for none.

    part, phase: of memory, the part that is largest in the first phase that does not fit.
    """

    part: str
    phase: str
    growth: float


def what_breaks_first(job: Job, memory_bytes: float) -> Breaking:
    """Where `job` meets the limits of a device of `memory_bytes`; growth below 1: it already has."""
    if job.processes > job.config.batch_size:
        return Breaking("batch: fewer images than processes", "game", 0.0)

    def fits(factor: float) -> bool:
        return predict_memory(grow_sets(job, factor))[1] <= memory_bytes

    low, high = 1e-6, 1e6
    growth = 0.0
    if fits(low):
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        growth = low
    phase, parts = find_fullest(grow_sets(job, high if growth else low))
    return Breaking(max(parts, key=lambda name: parts[name]), phase, growth)


def grow_sets(job: Job, factor: float) -> Job:
    """`job` with `factor` times the images in each set, at least one."""
    sizes = {name: max(1, round(factor * getattr(job, name))) for name in ("forget", "retain", "validation")}
    return replace(job, **sizes)
