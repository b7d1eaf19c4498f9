"""Filling a bank: which models tasks need, training those that are missing, and how long the rest takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from support.bank import Bank, Training
from support.settings import Setting
from support.tasks import Tasks, check_kind


@dataclass(frozen=True)
class Job:
    """One model of a task. role: "influence", "original" or "retrained", with its `number`."""

    kind: str
    seed: int
    role: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed} {self.role} {self.number}"


def list_jobs(
    tasks: Tasks, kinds: Sequence[str], seeds: Sequence[int], retrained: int, references: int
) -> list[Job]:
    """The models of every task, those first that others wait for.

    references: further originals and retrained models of the first seed.
    """
    found = []
    for seed in seeds:
        further = references if seed == seeds[0] else 0
        for kind in kinds:
            check_kind(kind)
            counts = {"influence": len(tasks.influence_trainings(kind, seed)), "original": 1 + further}
            counts["retrained"] = retrained + further
            found += [Job(kind, seed, role, i) for role, count in counts.items() for i in range(count)]
    return found


@dataclass(frozen=True)
class Place:
    """Where a bank and its pictures are, for any process to open."""

    bank: Path
    data: Path | None
    setting: Setting


@cache
def open_tasks(place: Place) -> Tasks:
    """The tasks at `place`, the same ones for the whole process."""
    return Tasks(Bank(place.bank), place.data, place.setting)


def find_training(tasks: Tasks, job: Job) -> Training | None:
    """How the model of `job` is trained; None as long as models are missing that decide this."""
    first = tasks.influence_trainings(job.kind, job.seed)
    if job.role == "influence":
        return first[job.number]
    if job.role == "original":
        # Whatever these kinds come to forget, they train on the images of random.
        return tasks.problem("random" if first else job.kind, job.seed).original(job.number)
    if not all(map(tasks.bank.holds, first)):
        return None
    return tasks.problem(job.kind, job.seed).retrained(job.number)


class Filling:
    """The models of `jobs` in a bank, tasks that share one counted once. workers: processes that train."""

    def __init__(self, place: Place, jobs: Sequence[Job], workers: int) -> None:
        self.place, self.workers = place, workers
        self.tasks = open_tasks(place)
        self._trainings: dict[Job, Training] = {}
        self.jobs = self._drop_shared(jobs)

    def run(self, report: Callable[[str], None]) -> None:
        """Train what is missing; `report` is told after every model.

        Models that other processes are training are left to them, and waited for in the end.
        """
        with _workers(self.workers) as make_each:
            left = [job for job in self.jobs if not self._holds(job)]
            for wait in (False, True):
                busy = []
                for job, made in make_each(self.place, left, wait):
                    if not made:
                        busy.append(job)
                    else:
                        report(f"{job}: {self.describe()}")
                left = busy

    def describe(self) -> str:
        """How many models are there, and how long the others take by those that are there."""
        missing = [job for job in self.jobs if not self._holds(job)]
        there = f"{len(self.jobs) - len(missing)} of {len(self.jobs)} models are there"
        if not missing:
            return there
        costs = self.tasks.bank.measure_costs()
        shapes, works = zip(*map(self._describe_work, missing), strict=True)
        if not costs.keys() >= set(shapes):
            return f"{there}; how long the rest takes is known after the first of each size"
        seconds = sum(costs[shape] * work for shape, work in zip(shapes, works, strict=True))
        return f"{there}, the rest takes about {_minutes(seconds / self.workers)}"

    def _find(self, job: Job) -> Training | None:
        if job not in self._trainings and (training := find_training(self.tasks, job)):
            self._trainings[job] = training
        return self._trainings.get(job)

    def _holds(self, job: Job) -> bool:
        training = self._find(job)
        return training is not None and self.tasks.bank.holds(training)

    def _describe_work(self, job: Job) -> tuple[str, int]:
        """Shape and work of the training of `job`."""
        if training := self._find(job):
            return training.shape, training.work
        # What is not known yet is trained on nearly all training images, of which the halves are two.
        halves = self.tasks.influence_trainings(job.kind, job.seed)[:2]
        return halves[0].shape, sum(half.work for half in halves)

    def _drop_shared(self, jobs: Sequence[Job]) -> list[Job]:
        """`jobs` without those whose model another one has."""
        found: dict[str, Job] = {}
        for job in jobs:
            training = self._find(job)
            found.setdefault(training.key if training else str(job), job)
        return list(found.values())


MakeEach = Callable[[Place, Sequence[Job], bool], Iterator[tuple[Job, bool]]]


@contextmanager
def _workers(count: int) -> Iterator[MakeEach]:
    """What makes the models of jobs, in this process or in `count` others, each on one core.

    It yields each job with whether its model is there now: not where another process is training it.
    """
    if count == 1:
        yield lambda place, jobs, wait: ((job, _make(place, job, wait)) for job in jobs)
        return
    # Not forked: PyTorch's threads do not survive that.
    pool = ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))

    def make_each(place: Place, jobs: Sequence[Job], wait: bool) -> Iterator[tuple[Job, bool]]:
        running = {pool.submit(_make, place, job, wait): job for job in jobs}
        for done in as_completed(running):
            yield running[done], done.result()

    try:
        yield make_each
    finally:
        pool.shutdown(cancel_futures=True)


def _make(place: Place, job: Job, wait: bool) -> bool:
    tasks = open_tasks(place)
    if find_training(tasks, job) is None:
        tasks.problem(job.kind, job.seed)  # trains what decides it, or waits for who does
    training = find_training(tasks, job)
    assert training is not None
    return tasks.bank.make(training, wait=wait)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
