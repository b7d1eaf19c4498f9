"""Images of earlier requests in the game of a later one: they stand in its batches and do not come back."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from games import CLASSWISE, SPREAD, percent_right
from torch import Tensor
from torch.nn import functional as F
from toys import ONE_CLASS, TENTH, game_of, trained, with_earlier

from dau_fast.config import DauConfig
from dau_fast.data.split import Forget, Split
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


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_what_was_forgotten_does_not_come_back(seed: int) -> None:
    """It takes images of an earlier request for other classes; all that is left speaks for their own."""
    task = with_earlier(trained(TENTH, seed), 20)
    split = task.split
    index = torch.cat([split.earlier, split.retain])
    said = torch.cat([(task.labels[split.earlier] + 1) % 3, task.labels[split.retain]])
    task = replace(task, original=taught(task, index, said))
    before = percent_right(task, task.original, split.earlier)
    came_back = [
        percent_right(task, game.unlearn(replace(task, split=known), SPREAD).model, split.earlier) - before
        for known in (split, replace(split, earlier=split.earlier[:0]))
    ]
    assert came_back[1] >= 20
    assert came_back[0] <= came_back[1] / 2


def taught(task: Task, index: Tensor, labels: Tensor) -> Classifier:
    """The original of `task`, trained on the images `index` [N] with `labels` [N] until it knows them."""
    model = copy.deepcopy(task.original).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(task.images.batch(index)).logits, labels).backward()
        optimizer.step()
    return model.eval()
