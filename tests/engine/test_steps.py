"""Engines: one step, however it runs, does one thing."""

from __future__ import annotations

import copy
import gc
import time
import weakref
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
from dau_fast.engine import loop, steps
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.losses import Losses
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.steps import Players, Prepared, Step, prepare
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.errors import UserError
from dau_fast.methods.dau import game
from dau_fast.models import Classifier, SmallResNet

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


class Scripted:
    """A stopwatch that always reads the same."""

    seconds = 0.0

    def __init__(self, device: torch.device) -> None:
        pass

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def test_on_cuda_auto_captures_what_takes_more_than_a_few_steps() -> None:
    cuda = torch.device("cuda")
    runtime = Runtime(cuda, engine="auto")
    assert steps._choose(cuda, 20, runtime, None) == ("eager", "20 steps are too few to capture")
    assert steps._choose(cuda, 21, runtime, None)[0] == "graphed"


@pytest.mark.parametrize(
    ("taken", "replays", "engine", "reason"),
    [
        (320, 0.015, "graphed", "2 s of work are too few to compile for"),
        (35_000, 0.015, "graphed", "175 s of work are too few to compile for"),
        (40_000, 0.015, "captured", "200 s of work are worth compiling for"),
        (30, 30.0, "captured", "300 s of work are worth compiling for"),
    ],
)
def test_auto_compiles_where_replays_of_the_whole_loop_take_long(
    taken: int, replays: float, engine: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """replays: seconds of the few by which a step is timed."""
    monkeypatch.setattr(steps, "_capture", lambda step, inputs: step)
    found, _ = prepared("graphed", monkeypatch, taken=taken, replays=replays)
    assert (found.engine, found.reason) == (engine, reason)


def no_capture(step: Step, inputs: tuple[Tensor, ...]) -> Step:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")


def no_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*_: Any) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no ptxas"), None)

    return run


def prepared(
    engine: str, monkeypatch: pytest.MonkeyPatch, asked: str = "auto", taken: int = 100, replays: float = 0.03
) -> tuple[Prepared, nn.Module]:
    """A step of a module whose `auto` takes `engine`, as on CUDA."""
    model, x = nn.Linear(4, 2), torch.randn(6, 4)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

    def build(compile: Callable[..., Any], parts: int) -> Step:
        objective = compile(lambda x: model(x).square().mean())

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            objective(x).backward()
            optimizer.step()

        return step

    monkeypatch.setattr(steps, "_choose", lambda *_: (engine, ""))
    monkeypatch.setattr(steps, "Stopwatch", Scripted)
    monkeypatch.setattr(Scripted, "seconds", replays)
    runtime = Runtime(engine="auto")
    object.__setattr__(runtime, "engine", asked)  # the named ones need CUDA
    twin = copy.deepcopy(model)
    found = prepare("game", build, (x,), Players((model,), (optimizer,)), taken, runtime)
    assert_same(model, twin)
    return found, model


def test_what_cannot_be_captured_runs_compiled_or_as_it_is_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "_capture", no_capture)
    found, model = prepared("graphed", monkeypatch)
    assert found.engine == "eager"
    assert found.reason == (
        "graphed steps failed (CUDA error: operation not permitted when stream is capturing more of it)"
    )
    before = model.weight.detach().clone()
    found.step(torch.randn(6, 4))
    assert not torch.equal(model.weight, before)


def test_a_capture_that_fails_is_told_by_what_failed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(step: Step, inputs: tuple[Tensor, ...]) -> Step:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(steps, "_capture", capture)
    found, _ = prepared("graphed", monkeypatch)
    assert found.reason == "graphed steps failed (operation not permitted when stream is capturing)"


def test_what_cannot_be_compiled_is_captured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_compile", no_compiler)
    monkeypatch.setattr(steps, "_capture", lambda step, inputs: step)
    found, _ = prepared("graphed", monkeypatch, taken=32_000)
    assert found.engine == "graphed"
    assert found.reason.startswith("captured steps failed (")
    assert "no ptxas" in found.reason


def test_an_engine_that_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_capture", no_capture)
    with pytest.raises(UserError, match=r"steps of game cannot be captured .*not permitted.*`engine=eager`"):
        prepared("graphed", monkeypatch, asked="graphed")


def test_a_graphed_step_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Step] = []

    def capture(step: Step, inputs: tuple[Tensor, ...]) -> Step:
        captured.append(step)
        return step

    monkeypatch.setattr(steps, "_compile", no_compiler)
    monkeypatch.setattr(steps, "_capture", capture)
    found, _ = prepared("graphed", monkeypatch)
    assert found.engine == "graphed"
    assert captured == [found.step]


def test_a_replay_copies_its_inputs_and_holds_what_was_captured() -> None:
    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    def make_step() -> tuple[Step, weakref.ref[Tensor]]:
        held = torch.zeros(3)
        return lambda *_: held.zero_(), weakref.ref(held)

    graph: Any = Graph()
    step, known = make_step()
    replay = steps._Replay(step, (torch.zeros(2), torch.zeros(1)), graph)
    replay(torch.ones(2), torch.full((1,), 5.0))
    assert graph.replays == 1
    assert replay.static[0].tolist() == [1, 1]
    assert replay.static[1].tolist() == [5]
    del step
    gc.collect()
    assert known() is not None


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


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps count sound losses as on a GPU, where the host reads the count of steps that are long over."""

    def counting(device: torch.device, ranks: Ranks, *, at_once: bool) -> Losses:
        return Losses(device, ranks)

    monkeypatch.setattr(loop, "Losses", counting)
    monkeypatch.setattr(Losses, "find_broken", lambda *_, **__: None)


def test_no_turn_of_the_game_waits(counted: None) -> None:
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


def test_no_batch_of_batchnorm_statistics_waits() -> None:
    model = Classifier(SmallResNet(3, 4))
    images = torch.randn(40, 3, 8, 8)
    with Waits() as waits:
        recompute_batchnorm(model, images.__getitem__, torch.arange(40), batch_size=8)
    assert waits.seen == []
    norm = model.network.stem[1]
    assert norm.num_batches_tracked == 5
    assert norm.momentum == 0.1


def test_no_training_step_waits(counted: None) -> None:
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
