"""The rival of whole runs plays the same game: turn by turn, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import ONE_CLASS, TENTH, game_of, trained

from dau_fast.config import DauConfig
from dau_fast.data.split import Forget
from dau_fast.methods.dau.shown import prepare_shown

SPREAD = DauConfig(label_conditioned=True, alpha=0.5, turns=5, batch_size=16, warmup_steps=3, exam_share=0.0)
OTHERS = replace(SPREAD, label_conditioned=False, difficulty=False)
GAMES: dict[str, tuple[Forget, DauConfig]] = {
    "spread": (TENTH, SPREAD),
    "spread as usual": (TENTH, replace(SPREAD, departure=0.7)),
    "many images": (TENTH, replace(SPREAD, departure=0.7, half_sure=1.0, anchor_logits=0.3)),
    "many images of a class": (ONE_CLASS, replace(SPREAD, half_sure=1e-3, anchor_logits=0.3)),
    "class": (ONE_CLASS, replace(OTHERS, features=True, departure=0.7, pull=0.1)),
    "other weights": (TENTH, replace(SPREAD, sensitivity="classifier", anchor=0.3)),
    "the predicted label": (ONE_CLASS, replace(OTHERS, difficulty=True, sensitivity="classifier")),
}


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", GAMES)
def test_the_rival_takes_the_same_turns(name: str) -> None:
    from support import plain_data, plain_game

    forget, config = GAMES[name]
    task = trained(forget)
    pixels = task.images.pixels.double()
    task = replace(task, images=replace(task.images, pixels=pixels), original=task.original.double())
    networks = [copy.deepcopy(task.original.network) for _ in range(2)]
    job: Any = plain_data.Job(
        task.images, task.split, networks[0], task.original.head_name, task.recipe, config
    )
    with game_of(task, config, config.turns) as ours:
        ours.warm_up()
        shown = [ours.referee.reveal(task.original, i) for i in (task.split.forget, task.split.validation)]
        departures = ours.shown.departures
        says = torch.ones(len(task.labels)) if departures is None else departures.counts
        theirs = plain_game.Game(
            networks[0], networks[1], job, (*shown, says[task.split.validation].double())
        )
        # An attacker's first weights are drawn: the rival's takes over ours, with what it has learned.
        theirs.attacker.load_state_dict(ours.attacker.state_dict())
        theirs.attack.load_state_dict(copy.deepcopy(ours._attack.state_dict()))
        rated = ours.shown.difficulty
        ours.play()
    if rated is None:
        rated = torch.zeros(len(task.labels))
    sets = task.split.retain, task.split.forget, task.split.validation
    batches = task.feed("game", 16, *sets)
    for _, batch in zip(range(config.turns), batches, strict=False):
        index = batch.indices
        columns = [batch.images, ours.shown.labels[index], rated[index], says[index].double()]
        if departures is not None:
            columns.append(departures.look_up(index).exp())
        theirs.turn(*zip(*(column.chunk(3) for column in columns), strict=True))
    for found, expected in ((theirs.network, ours.defender.network), (theirs.attacker, ours.attacker)):
        states = dict(found.state_dict()), dict(expected.state_dict())
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    assert theirs.defend.param_groups[0]["lr"] == pytest.approx(config.lr / config.turns)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("forget", [ONE_CLASS, TENTH], ids=["class", "tenth"])
def test_the_rival_expects_of_the_forget_set_what_the_game_does(forget: Forget, share: float) -> None:
    from support import plain_data, plain_game

    settings = OTHERS if forget is ONE_CLASS else SPREAD
    config = replace(settings, departure=1.0, plain_share=share)
    task = trained(forget)
    ours = prepare_shown(task, config).departures
    assert ours is not None
    network = task.original.network
    job: Any = plain_data.Job(task.images, task.split, network, task.original.head_name, task.recipe, config)
    theirs = plain_game.Rated(plain_data.Pictures, job, network)
    split = task.split
    torch.testing.assert_close(theirs.targets[split.forget], ours.targets.exp(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(theirs.counts, ours.counts, rtol=1e-3, atol=1e-5)
