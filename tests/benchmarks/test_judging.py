"""The judge against numbers by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dau_fast.errors import UserError
from dau_fast.job.assembly import measure_model
from dau_fast.metrics.unlearning import Measures

if TYPE_CHECKING:
    from support.judging import Judge
    from support.tasks import Tasks

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture
def tasks(pictures: Path, tmp_path: Path) -> Tasks:
    from support.bank import Bank
    from support.settings import SMOKE
    from support.tasks import Tasks

    return Tasks(Bank(tmp_path), pictures, SMOKE)


def measures(ua: float, ra: float, ta: float, confidence: float, entropy: float) -> Measures:
    return Measures(ua, ra, ta, {"confidence": confidence, "entropy": entropy}, {})


# Three retrained models, and one that is judged.
RETRAINED = (measures(50, 99, 48, 60, 10), measures(54, 100, 50, 62, 20), measures(46, 98, 52, 64, 30))
JUDGED = measures(40, 100, 51, 50, 25)


@pytest.fixture
def judge(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Of a mislabelled batch: the logits only say which of the measures above a model has."""
    from support.judging import Judge
    from support.outputs import Outputs

    shape = len(tasks.problem("mislabelled", 0).images.labels), 3

    def retrained(outputs: Outputs, number: int) -> torch.Tensor:
        return torch.full(shape, float(number))

    def measure(outputs: Outputs, logits: torch.Tensor) -> Measures:
        return (*RETRAINED, JUDGED)[int(logits[0, 0])]

    monkeypatch.setattr(Outputs, "retrained", retrained)
    monkeypatch.setattr(Outputs, "measure", measure)
    return Judge(tasks.problem("mislabelled", 0), tasks.bank, 3)


def test_gaps(judge: Judge) -> None:
    # Differences in UA, RA, TA and MIA-efficacy between 0 and 1, 0 and 2, 1 and 2.
    floors = [(4 + 1 + 2 + 2) / 4, (4 + 1 + 4 + 4) / 4, (8 + 2 + 2 + 2) / 4]
    assert judge.floor == pytest.approx(sum(floors) / 3)
    found = judge.judge_logits(torch.full((44, 3), 3.0))
    gaps = [(10 + 1 + 3 + 10) / 4, (14 + 0 + 1 + 12) / 4, (6 + 2 + 1 + 14) / 4]
    assert found.avg_gap == pytest.approx(sum(gaps) / 3)
    # The retrained models' means are 50, 99, 50, 62 and, of the entropy attack, 20.
    assert found.gap_to_mean == pytest.approx((10 + 1 + 1 + 12) / 4)
    assert found.rates == {"ua": 40, "ra": 100, "ta": 51, "confidence": 50, "entropy": 25}
    assert found.signed == {"ua": -10, "ra": 1, "ta": 1, "confidence": -12, "entropy": 5}
    other = judge.judge_retrained(0)
    assert other.avg_gap == pytest.approx((floors[0] + floors[1]) / 2)
    assert other.signed == {"ua": 0, "ra": 0, "ta": -3, "confidence": -3, "entropy": -15}


def test_extra_measures_stand_beside_those_of_retrained_models(judge: Judge) -> None:
    problem = judge.outputs.problem
    logits = torch.full((44, 3), 3.0)  # the first class everywhere, where logits are equal
    said = problem.measure_extra(logits)
    found = judge.judge_logits(logits)
    assert found.extra == said
    assert found.extra_signed == {"label_error": 0, "true_accuracy": 0}
    logits[problem.split.forget, problem.images.labels[problem.split.forget]] += 1
    found = judge.judge_logits(logits)
    assert found.extra == {"label_error": 100, "true_accuracy": 0}
    assert found.extra_signed["label_error"] == pytest.approx(100 - said["label_error"])


def test_of_a_class_a_new_head_says_what_the_features_know(tasks: Tasks) -> None:
    from support.judging import Judge

    problem = tasks.problem("class", 0)
    judge, original = Judge(problem, tasks.bank, 2), tasks.bank.get(problem.original())
    found = judge.judge(original)
    assert found.extra["new_head"] == judge.judge_original().extra["new_head"]
    references = [judge.judge(tasks.bank.get(problem.retrained(i))).extra["new_head"] for i in range(2)]
    assert found.extra_signed["new_head"] == pytest.approx(found.extra["new_head"] - sum(references) / 2)
    with torch.no_grad():
        original.head.weight.zero_()
    assert judge.judge(original).extra["new_head"] == found.extra["new_head"], "the old head does not count"


def test_a_single_retrained_model_has_no_spread(tasks: Tasks, judge: Judge) -> None:
    from support.judging import Judge

    with pytest.raises(UserError, match="`retrained=1`"):
        Judge(judge.outputs.problem, tasks.bank, 1)
    two = Judge(judge.outputs.problem, tasks.bank, 2)
    with pytest.raises(UserError, match="3 or more"):
        two.judge_retrained(0)


def test_margins() -> None:
    from support.outputs import margins

    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 50.0]])
    expected = [3 - math.log(math.exp(1) + math.exp(2)), -50.0]
    found = margins(logits, torch.tensor([2, 0]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)
    stacked = margins(torch.stack([logits, logits]), torch.tensor([2, 0]))
    assert torch.equal(stacked, torch.stack([found, found]))


def test_distance_of_margins() -> None:
    from support.judging import standardised_distance

    retrained = torch.tensor([[0.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    # Means 1 and 3, variances 2 and 2: 3 squared over 2 (1 + 1/2).
    margin = torch.tensor([4.0, 6.0], dtype=torch.float64)
    assert standardised_distance(margin, retrained) == pytest.approx(math.sqrt(9 / 3))
    assert standardised_distance(retrained.mean(0), retrained) == 0


def test_another_retraining_has_distance_one() -> None:
    from support.judging import standardised_distance

    chance = torch.Generator().manual_seed(0)
    models = torch.randn(4, 100_000, dtype=torch.float64, generator=chance)
    assert standardised_distance(models[0], models[1:]) == pytest.approx(1, abs=0.02)


def test_outputs_are_computed_once_and_measured_as_models_are(
    tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import outputs as module

    task, problem = tasks.task("backdoor", 0), tasks.problem("backdoor", 0)
    outputs = module.Outputs(problem, tasks.bank)
    logits = outputs.original()
    assert outputs.measure(logits) == measure_model(task.original, task)
    shown = problem.images.batch(problem.split.forget)
    torch.testing.assert_close(outputs.stack_originals(1, "forget")[0], task.original(shown).logits)
    assert outputs.stack_retrained(2, "validation").shape == (2, 8, 3)
    assert torch.equal(outputs.labels("forget"), torch.zeros(4, dtype=torch.long))
    monkeypatch.setattr(module, "predict_each", lambda *_: pytest.fail("asked again"))
    assert outputs.original() is logits
    assert torch.equal(outputs.stack_retrained(2, "test")[1], outputs.retrained(1)[problem.split.test])


def test_a_task_tells_where_all_three_conditions_hold() -> None:
    from support.judging import Telling

    assert Telling(floor=2.0, original_gap=10.0, train=99.0, test=79.0).tells
    assert not Telling(floor=2.0, original_gap=9.9, train=99.0, test=79.0).tells
    assert not Telling(floor=2.0, original_gap=10.0, train=98.9, test=50.0).tells
    assert not Telling(floor=2.0, original_gap=10.0, train=99.0, test=79.1).tells
    assert Telling(floor=0.0, original_gap=10.0, train=99.0, test=50.0).floors == math.inf


def test_the_judge_runs_on_models(tasks: Tasks) -> None:
    from support.judging import Judge

    task = tasks.task("random", 0)
    judge = Judge(tasks.problem("random", 0), tasks.bank, 3)
    assert judge.judge(task.original) == judge.judge_original()
    assert judge.judge_original().margins.keys() == {"forget", "retain", "validation"}
    gaps = [judge.judge_retrained(number).avg_gap for number in range(3)]
    assert sum(gaps) / 3 == pytest.approx(judge.floor)
    assert judge.telling().original_gap == judge.judge_original().avg_gap


# ---- over seeds


def tail(t: float) -> float:
    """Of Student's t with two degrees of freedom, in closed form."""
    return (1 - t / math.sqrt(t * t + 2)) / 2


def test_intervals() -> None:
    from support.comparing import interval, paired_interval

    # Mean 2, standard error 1 / sqrt(3), 4.302653 of them.
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 2.484138, 2 + 2.484138))
    assert paired_interval([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == found
    with pytest.raises(UserError, match="not paired"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(UserError, match="2 seeds or more"):
        interval([1.0])


def test_tests_over_seeds() -> None:
    from support.comparing import p_above, p_equivalent

    error = 1 / math.sqrt(3)
    assert p_above([1.0, 2.0, 3.0]) == pytest.approx(tail(2 / error))
    assert p_above([1.0, 2.0, 3.0], 2.0) == pytest.approx(0.5)
    # Within 10 on both sides: the nearer border, 8 away, decides.
    assert p_equivalent([1.0, 2.0, 3.0], 10.0) == pytest.approx(tail(8 / error))
    assert p_equivalent([-1.0, -2.0, -3.0], 10.0) == pytest.approx(tail(8 / error))
    assert p_equivalent([1.0, 2.0, 3.0], 1.0) > 0.5
    assert (p_above([1.0, 1.0]), p_above([0.0, 0.0]), p_equivalent([1.0, 1.0], 2.0)) == (0, 1, 0)


def test_a_method_beside_the_floor() -> None:
    from support.comparing import interval, p_equivalent, summarise

    found = summarise([2.0, 2.5, 3.5], [2.0, 2.0, 2.0])
    assert (found.seeds, found.floor, found.margin) == (3, 2.0, 0.5)
    assert found.gap == pytest.approx(8 / 3)
    assert found.difference == interval([0.0, 0.5, 1.5])
    assert found.p_equivalent == p_equivalent([0.0, 0.5, 1.5], 0.5)
    assert summarise([2.0, 2.5, 3.5], [2.0, 2.0, 2.0], margin=5.0).p_equivalent < 0.05
