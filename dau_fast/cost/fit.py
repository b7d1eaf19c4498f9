"""Seconds from counts: a machine's constants, found in measured runs, and what they predict for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from dau_fast.cost.memory import find_fullest
from dau_fast.cost.passes import FORWARDS_A_STEP
from dau_fast.cost.work import Job, count_work
from dau_fast.methods.dau.difficulty import IMAGE_FLOPS


@dataclass(frozen=True)
class Machine:
    """Seconds a unit of work.

    training, evaluation: a FLOP of the defender. operation: a kernel that is launched, or a PyTorch call
    that is made. update: a parameter's update. attacker_step; attacker: a FLOP of the attacker. logit:
    what losses and attack features do with one. normed: what a synchronised BatchNorm takes longer for a
    number than an ordinary one. hop: a message's latency. byte: on the wire. start:
    once a job. processors: that processes share; None where each has a device of its own.
    """

    training: float
    evaluation: float
    operation: float
    update: float
    attacker_step: float
    attacker: float
    logit: float
    normed: float
    hop: float
    byte: float
    start: float
    processors: int | None = None

    @property
    def constants(self) -> dict[str, float]:
        """Seconds a unit, by name."""
        return {name: value for name, value in asdict(self).items() if name in CONSTANTS}


CONSTANTS = tuple(field.name for field in fields(Machine) if field.name != "processors")


@dataclass(frozen=True)
class Cost:
    """seconds, by constant of the machine. memory: bytes by part, of one process when it needs most."""

    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    phase: str

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())


def predict(job: Job, machine: Machine) -> Cost:
    """What `job` costs on `machine`."""
    units = count_units(job, machine.processors)
    seconds = {name: count * getattr(machine, name) for name, count in units.items()}
    phase, parts = find_fullest(job)
    return Cost(seconds, parts, phase)


def count_units(job: Job, processors: int | None = None) -> dict[str, float]:
    """By constant of Machine, how many units of it `job` takes.

    processors: where more processes than these share them, everything takes as many times longer: a
    message waits until the process that handles it has its turn.
    """
    done, network = count_work(job), job.network
    weights = (job.columns + job.config.attacker_hidden + 1) * job.config.attacker_hidden
    forward = done.evaluated_images + done.taught_images
    units = {
        "training": FORWARDS_A_STEP * network.flops * done.training_images,
        "evaluation": network.flops * (forward + done.norm_images) + IMAGE_FLOPS * done.rated_images,
        "operation": network.operations * (FORWARDS_A_STEP * done.turns + done.evaluation_batches),
        "update": done.updates,
        "attacker_step": done.attacker_steps,
        "attacker": 2 * weights * (FORWARDS_A_STEP * done.attacker_rows + done.judged_rows),
        "logit": network.classes * (done.training_images + forward),
        "normed": network.normed
        * (FORWARDS_A_STEP * done.training_images + done.norm_images)
        * (job.processes > 1),
        "hop": done.hops,
        "byte": done.wire_bytes,
        "start": 1,
    }
    crowd = 1.0 if processors is None else max(1.0, job.processes / processors)
    return {name: count * crowd for name, count in units.items()}


def fit_machine(measurements: Sequence[tuple[Job, float]], processors: int | None = None) -> Machine:
    """The machine whose predictions come closest to `measurements` (job, seconds), by relative error.

    Least squares with no constant below 0. A constant that no measurement needs is 0. Raises ValueError
    without measurements.
    """
    from scipy.optimize import nnls

    if not measurements:
        raise ValueError("no measurements to fit: give pairs of a job and its seconds")
    units = [[count_units(job, processors)[name] for name in CONSTANTS] for job, _ in measurements]
    relative = np.array(units) / np.array([[seconds] for _, seconds in measurements])
    # Columns of one size: units differ by many orders of magnitude.
    scale = np.maximum(relative.max(0), np.finfo(float).tiny)
    found, _ = nnls(relative / scale, np.ones(len(measurements)))
    constants = dict(zip(CONSTANTS, (found / scale * (relative.max(0) > 0)).tolist(), strict=True))
    return Machine(**constants, processors=processors)
