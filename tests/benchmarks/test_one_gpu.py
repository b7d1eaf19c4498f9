"""The predictions for one GPU: counts against real turns, and the tables in the docs."""

from __future__ import annotations

import copy

import pytest
import torch
from scripts import ROOT
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("importable")


@pytest.mark.parametrize("forget", ["random:0.1", "class:3"])
def test_the_kernels_of_a_turn_are_those_of_a_real_one(forget: str) -> None:
    from support import one_gpu
    from support.jobs import experiment, settings, untrained

    from dau_fast.engine.loop import prepare_loop
    from dau_fast.methods.dau.attacker import attacker_gradients
    from dau_fast.methods.dau.game import Game, plan_game
    from dau_fast.methods.dau.shown import prepare_shown

    task = untrained(experiment(torch.device("cpu"), smoke=True, forget=forget))
    config = settings(task)
    task, schedule = plan_game(task, config)
    shown = prepare_shown(task, config)
    with Game(copy.deepcopy(task.original), task.original.eval(), task, config, schedule, shown) as game:
        game.warm_up()
        loop = game.make_loop()
        loop.model.train()
        step = prepare_loop(loop, loop.inputs(next(loop.batches)), task.runtime).step
        with one_gpu.Kernels() as made:
            inputs = loop.inputs(next(loop.batches))
        with one_gpu.Kernels() as turn:
            step(*inputs)
        with one_gpu.Kernels() as trained:
            F.cross_entropy(game.defender(inputs[0]).logits, inputs[1]).backward()
        with torch.no_grad(), one_gpu.Kernels() as taught:
            task.original(inputs[0][: config.batch_size])
        width = game.attacker.mean.numel()
        seen = [torch.randn(64, width) for _ in range(2)]
        with one_gpu.Kernels() as learned:
            game._learner(attacker_gradients)(*seen, torch.ones(64), torch.ones(64))
    rest = len(turn.seen) - len(trained.seen) - len(taught.seen)
    own = one_gpu.TURN_KERNELS + config.label_conditioned * one_gpu.LOGITS_KERNELS
    assert rest == pytest.approx(own, rel=0.05)
    assert len(learned.seen) == pytest.approx(one_gpu.ATTACKER_KERNELS, rel=0.1)
    assert len(made.seen) <= one_gpu.BATCH_KERNELS


def test_a_step_costs_three_passes_and_a_captured_one_less_than_an_eager_one() -> None:
    from support import one_gpu

    flops = [sum(k.flops for k in one_gpu.network_kernels(64, trains)) for trains in (True, False)]
    # No gradient of the images themselves is taken.
    assert flops[0] == pytest.approx(3 * flops[1], rel=0.01)
    assert flops[1] / 64 == pytest.approx(1.11e9, rel=0.02)
    for batch in (64, 256):
        eager, graphed, captured = (
            one_gpu.training_step(batch, engine) for engine in ("eager", "graphed", "captured")
        )
        assert captured < graphed < eager


@pytest.mark.parametrize("classwise", [False, True], ids=["tenth", "class"])
def test_every_method_by_its_defaults_on_cifar(classwise: bool) -> None:
    from support.one_gpu import default_equivalents

    found = default_equivalents(classwise)
    assert found["dau"] <= 300_000
    assert found["retrain"] == 7_371_008
    # Those that learn the retain set for ten epochs see it about ten times.
    assert found["ft"] == pytest.approx(10 * 40_500, rel=0.01)
    assert all(0 < count <= found["retrain"] for count in found.values())


def test_the_tables_in_the_docs_are_those_that_the_command_prints() -> None:
    from support.one_gpu import one_gpu_tables

    text = (ROOT / "docs" / "scaling.md").read_text()
    shown = text.partition("<!-- one GPU -->\n")[2].partition("<!-- end of one GPU -->")[0]
    assert shown.strip() == one_gpu_tables()
