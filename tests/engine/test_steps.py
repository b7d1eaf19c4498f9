"""Engines: one step, however it runs, does one thing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ConstantLR
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TENTH, batches_of, blobs, engines, game_of, perceptron, trained

from dau_fast.config import DauConfig
from dau_fast.engine import steps
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.steps import Players, prepare
from dau_fast.engine.training import train
from dau_fast.errors import UserError
from dau_fast.methods.dau import game
from dau_fast.models import Classifier

SPREAD = DauConfig(label_conditioned=True, alpha=0.5, turns=16, batch_size=32)


@pytest.fixture
def fast_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as torch.compile does, without generating code, and without graph breaks."""
    torch._dynamo.reset()

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(steps, "_compile", compile)


def taught(
    engine: str = "eager", taken: int = 5, seed: int = 0, optimizer: type[Optimizer] = SGD
) -> tuple[Classifier, LoopCost]:
    """A perceptron after `taken` steps on blobs, and what they cost."""
    images, model = blobs(96), perceptron(seed)
    order = torch.arange(96).split(32) * 2
    taught_by = optimizer(model.parameters(), lr=0.05, **({"momentum": 0.9} if optimizer is SGD else {}))
    scheduler = ConstantLR(taught_by, 1.0)
    (cost,) = train(
        model,
        batches_of(images, order),
        steps=taken,
        optimizer=taught_by,
        scheduler=scheduler,
        runtime=Runtime(engine=engine),
    )
    return model, cost


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 0) -> None:
    torch.testing.assert_close(
        dict(one.state_dict()), dict(other.state_dict()), rtol=tolerance, atol=tolerance
    )


# ---- preparing changes nothing


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize("taken", [0, 3])
def test_a_prepared_step_has_changed_nothing_yet(optimizer: type[Optimizer], taken: int) -> None:
    """Neither weights nor statistics nor optimiser states, whether these exist before or not."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizers = optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is SGD else {}))
    x = torch.randn(6, 4)

    def step(x: Tensor) -> None:
        optimizers.zero_grad()
        model(x).square().sum().backward()
        optimizers.step()

    for _ in range(taken):
        step(x)
    twin = copy.deepcopy(model)
    states = copy.deepcopy(optimizers.state_dict()["state"])
    torch.manual_seed(3)
    prepare("twin", lambda *_: step, (x,), Players((model,), (optimizers,)), 1, Runtime())
    assert torch.initial_seed() == 3
    assert_same(model, twin)
    for key, state in optimizers.state_dict()["state"].items():
        for name, value in state.items():
            before = states[key][name] if taken else torch.zeros_like(value)
            assert torch.equal(value, before), name
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)), "the rehearsal drew from the global generator"


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_rehearsing_leaves_no_trace_in_what_is_trained(optimizer: type[Optimizer]) -> None:
    """Against the same loop written by hand."""
    images, model = blobs(96), perceptron(0)
    by_hand = optimizer(model.parameters(), lr=0.05, **({"momentum": 0.9} if optimizer is SGD else {}))
    model.train()
    for index in (torch.arange(96).split(32) * 2)[:5]:
        by_hand.zero_grad()
        nn.functional.cross_entropy(model(images.batch(index)).logits, images.labels[index]).backward()
        by_hand.step()
    found, _ = taught(optimizer=optimizer)
    torch.testing.assert_close(dict(found.named_parameters()), dict(model.named_parameters()))


def test_the_time_of_a_rehearsal_is_kept_apart() -> None:
    found = prepare(
        "twin", lambda *_: lambda x: time.sleep(0.02), (torch.ones(1),), Players((), ()), 1, Runtime()
    )
    assert found.seconds >= 0.02
    assert taught(taken=1)[1].compile_seconds > 0


def test_a_loop_without_steps_costs_nothing_and_takes_no_batch() -> None:
    model = perceptron(0)
    optimizer = SGD(model.parameters(), lr=0.05)
    batches = batches_of(blobs(32), [torch.arange(32)])
    assert train(model, batches, steps=0, optimizer=optimizer, scheduler=ConstantLR(optimizer, 1.0)) == ()
    assert len(list(batches)) == 1


# ---- engines agree


def test_compiled_steps_train_as_eager_ones(fast_compiler: None) -> None:
    assert_same(taught("compiled")[0], taught("eager")[0], 1e-5)


def test_inductor_trains_as_eager_steps_do() -> None:
    torch._dynamo.reset()
    assert_same(taught("compiled")[0], taught("eager")[0], 1e-5)


@pytest.mark.parametrize("label_conditioned", [False, True])
def test_a_compiled_game_is_the_eager_one(label_conditioned: bool, fast_compiler: None) -> None:
    task, config = trained(TENTH), replace(SPREAD, label_conditioned=label_conditioned, turns=8)
    eager = game.unlearn(task, config)
    compiled = game.unlearn(replace(task, runtime=Runtime(engine="compiled")), config)
    assert engines(compiled.loops) == {"game": "compiled"}
    assert_same(compiled.model, eager.model, 1e-3)
    assert compiled.history is not None
    assert eager.history is not None
    assert compiled.history["auc"] == pytest.approx(eager.history["auc"], abs=0.02)


def test_a_second_model_of_the_same_architecture_is_not_compiled_again(fast_compiler: None) -> None:
    taught("compiled", seed=0)
    counters.clear()
    taught("compiled", seed=1)
    assert counters["stats"]["unique_graphs"] == 0


def test_a_sensitivity_with_a_gradient_inside_runs_eagerly_and_says_so(fast_compiler: None) -> None:
    task = replace(trained(TENTH), runtime=Runtime(engine="compiled"))
    found = game.unlearn(task, replace(SPREAD, sensitivity="input"))
    assert engines(found.loops) == {"game": "eager: sensitivity 'input' cannot be compiled"}


def test_a_step_that_cannot_be_compiled_is_one_clear_line(fast_compiler: None) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    network = nn.Sequential(Breaks(), nn.Linear(6, 3))
    images, model = blobs(32), Classifier(network)
    optimizer = sgd(network, None, lr=0.1, momentum=0.9, weight_decay=0)
    with pytest.raises(UserError, match=r"the steps of training cannot be compiled .*: take `engine=eager`"):
        train(
            model,
            batches_of(images, [torch.arange(32)]),
            steps=1,
            optimizer=optimizer,
            scheduler=ConstantLR(optimizer, 1.0),
            runtime=Runtime(engine="compiled"),
        )


# ---- choosing


def test_an_engine_that_is_named_runs_and_gives_no_reason() -> None:
    _, cost = taught("eager", 1)
    assert (cost.loop, cost.engine, cost.reason) == ("training", "eager", "")


def test_on_a_cpu_auto_does_not_compile_and_says_why() -> None:
    _, cost = taught("auto", 2)
    assert engines([cost]) == {"training": "eager: compiling takes longer than it saves on a CPU"}


# ---- no step waits for the device


class Waits(TorchDispatchMode):
    """Notes every operation whose result or shape the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        indices = args[1] if name.startswith("aten.index") and isinstance(args[1], list | tuple) else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.")
        if by_mask or any(word in name for word in waiting):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).any()), lambda x: x.nonzero()],
)
def test_waits_are_noticed(wait: Callable[[Tensor], object]) -> None:
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.seen


def test_no_turn_of_the_game_waits() -> None:
    taken: list[int] = []

    def after_turn() -> None:
        taken.append(1)
        if len(taken) == 1:
            waits.seen.clear()  # the rehearsal before it may wait

    with game_of(trained(TENTH), SPREAD, turns=21) as players:
        players.warm_up()
        with Waits() as waits:
            players.play(after_turn)
    assert len(taken) == 21
    assert waits.seen == []


def test_no_training_step_waits() -> None:
    images, model = blobs(96), perceptron(0)
    optimizer = sgd(model, None, lr=0.1, momentum=0.9, weight_decay=0)
    with Waits() as waits:
        train(
            model,
            batches_of(images, torch.arange(96).split(32)),
            steps=3,
            optimizer=optimizer,
            scheduler=ConstantLR(optimizer, 1.0),
        )
    assert waits.seen == []
