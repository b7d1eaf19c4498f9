"""Images of earlier requests in the game of a later one: they stand in its batches and do not come back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from games import CLASSWISE, SPREAD
from torch import Tensor
from toys import ONE_CLASS, TENTH, game_of, trained, with_earlier

from dau_fast.config import DauConfig
from dau_fast.data.split import Forget, Split
from dau_fast.engine.evaluation import predict
from dau_fast.methods.dau import game
from dau_fast.methods.dau.rows import choose_rows
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


@pytest.mark.parametrize(
    ("forget", "earlier", "copies", "filled"),
    [
        (40, 0, 1, 0),
        (3, 0, 1, 29),
        (40, 30, 1, 0),
        (40, 170, 4, 0),
        (1, 100, 3, 0),
        (2, 10, 1, 20),
        (1, 31, 1, 0),
    ],
)
def test_about_half_of_the_rows_are_of_the_forget_set(
    forget: int, earlier: int, copies: int, filled: int
) -> None:
    ends = itertools.pairwise(itertools.accumulate((0, forget, earlier, 300)))
    requested, before, retain = (torch.arange(*end) for end in ends)
    empty = torch.empty(0, dtype=torch.int64)
    split = Split(empty, empty, empty, requested, retain, classwise=False, earlier=before)
    rows = choose_rows(split, 32, torch.Generator().manual_seed(0))
    counts = rows.bincount(minlength=forget + earlier + 300)
    assert counts[:forget].tolist() == [copies] * forget
    assert counts[forget : forget + earlier].tolist() == [1] * earlier
    assert counts[forget + earlier :].sum() == filled
    assert counts[forget + earlier :].max() <= 1


@pytest.mark.parametrize(
    ("forget", "config"), [(TENTH, SPREAD), (ONE_CLASS, CLASSWISE)], ids=["tenth", "class"]
)
def test_the_attacker_learns_nothing_of_them_and_the_defender_holds_them(
    forget: Forget, config: DauConfig
) -> None:
    task = with_earlier(trained(forget), 60)
    requested, before = (set(index.tolist()) for index in (task.split.forget, task.split.earlier))
    with game_of(task, config) as players:
        players.warm_up()
        seen = set()
        for batch in itertools.islice(players._batches, 6):
            _, _, _, study, asked, held, *_ = players._show(batch)
            retain, middle, validation = batch.indices.chunk(3)
            assert not before & set(torch.cat([retain, validation]).tolist())
            assert asked.chunk(3)[1].tolist() == [float(i in requested) for i in middle.tolist()]
            assert held.chunk(3)[1].tolist() == [float(i in before) for i in middle.tolist()]
            assert not study.chunk(3)[1][held.chunk(3)[1] > 0].any()
            seen |= set(middle.tolist())
    assert seen <= requested | before
    assert seen & requested
    assert seen & before


def answers(model: Classifier, task: Task, index: Tensor) -> Tensor:
    return predict(model, task.images.batch, index).logits.log_softmax(1)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_forgotten_stays_what_it_was(seed: int) -> None:
    """Later games move the answers on it, and where it stands in their batches less than half as far."""
    first = trained(TENTH, seed)
    split, forgetful = first.split, game.unlearn(first, SPREAD).model
    gone, forget, left = split.forget, split.retain[:40], split.retain[40:]
    before, moved = answer(forgetful, first), []
    for earlier in (gone, gone[:0]):
        later = replace(split, train=split.retain, forget=forget, retain=left, earlier=earlier)
        model = game.unlearn(replace(first, original=forgetful, split=later), SPREAD).model
        moved.append(float((before.exp() * (before - answer(model, first))).sum(1).mean()))
    assert moved[0] < 0.5 * moved[1]


def answer(model: Classifier, task: Task) -> Tensor:
    """Log-probabilities of the forget set."""
    return predict(model, task.images.batch, task.split.forget).logits.log_softmax(1)
