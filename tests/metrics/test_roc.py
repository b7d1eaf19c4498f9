"""The attack by one threshold: by hand, and against scikit-learn's curve."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_curve

from dau_fast.metrics.mia import Answers
from dau_fast.metrics.roc import FALSE_ALARMS, MARGIN_EDGES, count_margins, margin, true_alarms


def test_margin_is_the_log_odds_even_where_the_probability_is_1() -> None:
    answers = Answers(torch.tensor([[1.0, 3.0, 1.0], [0.0, 90.0, 0.0]]), torch.tensor([1, 1]))
    p = torch.softmax(answers.logits[0].double(), 0)[1]
    low, high = margin(answers)[:, 0].tolist()
    assert low == pytest.approx(torch.logit(p).item())
    assert high == pytest.approx(90 - torch.log(torch.tensor(2.0)).item())


def test_few_non_members_allow_no_false_alarm() -> None:
    found = true_alarms(torch.tensor([5.0, 1.0, 0.0, 9.0]), torch.tensor([4.0, 2.0]))
    assert dict(zip(FALSE_ALARMS, found, strict=True)) == {
        **dict.fromkeys(FALSE_ALARMS[:-2], 50.0), 50.0: 50.0, 100.0: 100.0,
    }  # fmt: skip


def test_members_that_are_like_a_non_member_do_not_pass_it() -> None:
    alike = torch.arange(10.0)
    found = dict(zip(FALSE_ALARMS, true_alarms(alike, alike), strict=True))
    assert (found[10.0], found[50.0]) == (10, 50)


def test_the_curve_is_that_of_scikit_learn() -> None:
    draw = torch.Generator().manual_seed(0)
    members, others = (torch.randn(1000, generator=draw, dtype=torch.float64) + m for m in (1, 0))
    labels = [1] * 1000 + [0] * 1000
    false, true, _ = roc_curve(labels, torch.cat([members, others]), drop_intermediate=False)
    for rate, ours in zip(FALSE_ALARMS, true_alarms(members, others), strict=True):
        assert ours == pytest.approx(100 * true[false <= rate / 100 + 1e-9].max())


def test_margins_beyond_the_bins_count_in_the_outermost() -> None:
    shares = count_margins(torch.tensor([-99.0, 0.5, 99.0, torch.inf]))
    assert len(shares) == len(MARGIN_EDGES) - 1
    assert (shares[0], shares[20], shares[-1]) == (25, 25, 50)
