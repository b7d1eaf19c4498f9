"""The five membership attacks at the size of CIFAR: seconds, and agreement with scikit-learn's machine.

    pytest benchmarks/test_evaluation_speed.py                 on the CPU
    pytest benchmarks/test_evaluation_speed.py --device cuda

10,000 members, 10,000 non-members, 4,500 targets. Logits are simulated: noise, and a margin of the true
class that is larger for members (overfitted) or hardly so (calibrated, where both sides overlap and the
verdicts hang on details). scikit-learn runs once a case: its five fits take minutes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dau_fast.metrics import svm
from dau_fast.metrics.mia import ATTACKS, Answers

# Mean and spread of the margin of members, non-members and targets.
NETWORKS = {
    "overfitted": ((14.0, 3.0), (9.0, 4.5), (13.0, 3.5)),
    "calibrated": ((8.0, 3.0), (7.8, 3.0), (8.0, 3.0)),
}
CASES = [(network, classes) for network in NETWORKS for classes in (10, 100)]
Verdicts = dict[str, Tensor]


@cache
def sets(network: str, classes: int, smoke: bool, device: torch.device) -> tuple[Answers, ...]:
    """Members, non-members and targets."""
    generator = torch.Generator().manual_seed(0)

    def some(mean: float, spread: float, rows: int) -> Answers:
        labels = torch.arange(rows) % classes
        logits = 2 * torch.randn(rows, classes, generator=generator)
        logits[torch.arange(rows), labels] += mean + spread * torch.randn(rows, generator=generator)
        return Answers(logits.to(device), labels.to(device))

    sizes = (400, 400, 300) if smoke else (10_000, 10_000, 4_500)
    return tuple(some(*margin, rows) for margin, rows in zip(NETWORKS[network], sizes, strict=True))


def battery(answers: tuple[Answers, ...], exact_limit: int) -> Verdicts:
    """Whom each attack calls non-member. Answers are made anew: they remember their distributions."""
    members, non_members, target = (Answers(part.logits, part.labels) for part in answers)
    return {
        name: svm.fit(score(members), score(non_members), exact_limit=exact_limit)(score(target)).cpu()
        for name, score in ATTACKS.items()
    }


@cache
def exact(network: str, classes: int, smoke: bool, device: torch.device) -> Verdicts:
    return battery(sets(network, classes, smoke, device), exact_limit=10**9)


# scikit-learn first, so that its verdicts are there to be compared with.
@pytest.mark.parametrize("name", ["scikit-learn", "dau_fast"])
@pytest.mark.parametrize(("network", "classes"), CASES)
def test_battery(
    benchmark: Any, device: torch.device, smoke: bool, network: str, classes: int, name: str
) -> None:
    case = network, classes, smoke, device
    benchmark.group = f"{network}, {classes} classes"
    benchmark.extra_info.update(case=benchmark.group, implementation=name)
    if name == "scikit-learn":
        benchmark.pedantic(exact, case, rounds=1)
        return
    found = benchmark.pedantic(battery, (sets(*case), 0), rounds=2 if smoke else 7, warmup_rounds=1)
    agreement = {
        attack: 100 * (found[attack] == verdicts).double().mean().item()
        for attack, verdicts in exact(*case).items()
    }
    benchmark.extra_info.update(
        seconds=benchmark.stats.stats.median,
        lowest_agreement_percent=min(agreement.values()),
        agreement_percent=agreement,
    )
