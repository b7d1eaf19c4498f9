"""The counts against what a real game does, alone and on several processes."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch.distributed as dist
from counting import CONFIGS, Watched, count_game, job_of
from machines import USUAL
from ranks import together
from torch import nn
from toys import TENTH, trained, with_earlier

from dau_fast.config import DauConfig
from dau_fast.cost import count_work
from dau_fast.data.split import Forget
from dau_fast.engine.runtime import Runtime
from dau_fast.models import Classifier


@pytest.mark.parametrize("forget", [TENTH, Forget("random:0.5", fraction=0.5)], ids=["tenth", "half"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_work_is_that_of_a_real_game(name: str, forget: Forget) -> None:
    task = trained(forget)
    predicted = asdict(count_work(job_of(task, CONFIGS[name])))
    assert [predicted.pop(name) for name in ("collectives", "hops", "wire_bytes")] == [0, 0, 0]
    assert count_game(task, CONFIGS[name]) == {name: count for name, count in predicted.items() if count}


def test_the_work_after_earlier_requests_is_that_of_a_real_game() -> None:
    task = with_earlier(trained(TENTH), 30)
    predicted = {name: count for name, count in asdict(count_work(job_of(task, USUAL))).items() if count}
    assert count_game(task, USUAL) == predicted
    assert predicted["taught_images"] == 2 * count_work(job_of(trained(TENTH), USUAL)).taught_images


def test_without_batchnorm_there_is_no_pass_for_it() -> None:
    task = trained(TENTH)
    bare = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    task = replace(task, original=bare, fresh=lambda _: bare)
    found = count_game(task, USUAL)
    predicted = count_work(job_of(task, USUAL))
    assert predicted.norm_images == 0
    assert "norm_images" not in found
    assert found["evaluation_batches"] == predicted.evaluation_batches


def compare_processes(rank: int, ranks: int, config: DauConfig) -> None:
    task = trained(TENTH)
    job = job_of(task, config, ranks)
    sent: list[tuple[str, int]] = []
    shared = Watched(rank, ranks)
    task.original.network = shared.prepare(task.original.network)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast"):
            given = getattr(dist, name)

            def noted(first: Any, *rest: Any, name: str = name, given: Any = given, **more: Any) -> Any:
                mine = rest[0] if name == "all_gather" else first
                sent.append((name, mine.numel() * mine.element_size()))
                return given(first, *rest, **more)

            patch.setattr(dist, name, noted)
        found = count_game(replace(task, runtime=Runtime(ranks=shared)), config)
    # By rings: each part travels to all but one, twice where it is also added up.
    travels = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "broadcast": 1}
    hops = {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "broadcast": 1}
    found |= {"collectives": len(sent), "hops": sum(hops[name] for name, _ in sent)}
    wire = sum(travels[name] * size for name, size in sent)
    if rank:
        return
    predicted = asdict(count_work(job))
    assert predicted.pop("wire_bytes") == pytest.approx(wire, rel=1e-9)
    assert found == predicted


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")
@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        pytest.param(2, USUAL, id="no Barlow Twins"),
        pytest.param(2, replace(USUAL, beta=1e-3), id="gathered views", marks=pytest.mark.slow),
        pytest.param(3, CONFIGS["sampled"], id="reduced correlation", marks=pytest.mark.slow),
        pytest.param(2, CONFIGS["another view"], id="another view", marks=pytest.mark.slow),
    ],
)
def test_the_work_of_several_processes_and_what_they_tell_each_other(ranks: int, config: DauConfig) -> None:
    together(ranks, compare_processes, ranks, config)
