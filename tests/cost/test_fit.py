"""Constants found again from results that they made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from machines import JOB, MACHINE, various

from dau_fast.cost import fit_machine, predict


def test_a_fit_finds_the_constants_behind_the_measurements() -> None:
    truth = [(job, predict(job, MACHINE).total_seconds) for job in various()]
    found = fit_machine(truth, processors=2)
    assert found.constants == pytest.approx(MACHINE.constants, rel=1e-3)
    unseen = replace(JOB, forget=77, retain=2222, processes=3)
    cost = predict(unseen, found)
    assert cost.total_seconds == pytest.approx(predict(unseen, MACHINE).total_seconds, rel=1e-4)


def test_no_constant_is_negative_and_one_that_nothing_needs_is_none() -> None:
    alone = [job for job in various() if job.processes == 1]
    noise = torch.linspace(0.7, 1.4, len(alone)).tolist()
    found = fit_machine(
        [(job, n * predict(job, MACHINE).total_seconds) for job, n in zip(alone, noise, strict=True)]
    )
    values = found.constants
    assert min(values.values()) >= 0
    assert values["hop"] == values["byte"] == 0


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="no measurements"):
        fit_machine([])


def test_processes_that_share_processors_take_longer_and_fewer_do_not() -> None:
    def seconds(processes: int, processors: int | None) -> float:
        machine = replace(MACHINE, processors=processors)
        return predict(replace(JOB, processes=processes), machine).total_seconds

    assert seconds(4, 2) == pytest.approx(2 * seconds(4, None))
    assert seconds(2, 2) == seconds(2, None) == seconds(2, 8)


def test_the_cost_of_a_sample_does_not_follow_the_retain_set() -> None:
    sampled = replace(JOB, config=replace(JOB.config, retain_sample=2.0))
    few, many = (predict(replace(sampled, retain=n), MACHINE) for n in (1000, 100_000))
    assert few.total_seconds == many.total_seconds
    assert many.memory["images"] > few.memory["images"]
