"""A network, a job and a machine to predict with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dau_fast.config import DauConfig
from dau_fast.cost import Job, Machine, Network

USUAL = DauConfig(label_conditioned=True, alpha=0.5, turns=40, batch_size=16)
NETWORK = Network(1e8, 50, 100_000, 64, 10, 5e5, 6e4, 9, 300, 1e5)
JOB = Job(NETWORK, replace(USUAL, batch_size=64), 200, 1000, 200, 3072.0)
MACHINE = Machine(
    training=2e-11, evaluation=1e-11, operation=1e-5, update=3e-10, attacker_step=1e-3, attacker=4e-11,
    logit=2e-8, normed=1e-9, hop=1e-4, byte=1e-9, start=0.1, processors=2,
)  # fmt: skip


def various() -> list[Job]:
    """Jobs that differ in everything that has a constant of its own."""
    jobs = [
        replace(JOB, forget=forget, validation=validation, retain=retain)
        for forget in (20, 500, 3000) for validation in (100, 2000) for retain in (500, 4000)
    ]  # fmt: skip
    jobs += [replace(JOB, processes=ranks, forget=forget) for ranks in (2, 3, 4) for forget in (20, 900)]
    jobs += [replace(JOB, config=replace(JOB.config, batch_size=batch, warmup_steps=w))
             for batch in (16, 256) for w in (5, 500)]  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"classes": 1000}, {"flops": 1e9}, {"parameters": 10_000_000}, {"operations": 400}, {"norms": 50},
        {"normed": 1e6},
    ]  # fmt: skip
    networks = [replace(NETWORK, **change) for change in changes]
    return jobs + [replace(JOB, network=one, processes=ranks) for ranks in (1, 2) for one in networks]
