"""A loss that is NaN or infinite ends its loop in one line, which says where; nothing was changed by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from toys import TENTH, batches_of, blobs, perceptron, trained

from dau_fast.config import DauConfig
from dau_fast.engine import loop as loops
from dau_fast.engine import steps
from dau_fast.engine.losses import BrokenLoss, Losses, find_broken_layer
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import train
from dau_fast.errors import Diverged
from dau_fast.methods import original
from dau_fast.methods.dau import game
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.running import run_timed
from dau_fast.models import Classifier

STEPS, ROWS = 12, 8
KIND = {"nan": float("nan"), "inf": float("inf")}


def learn(runtime: Runtime | None = None, *, broken: int = 5, value: float = float("nan")) -> Classifier:
    """Train a perceptron for 12 steps on images of which number `broken` * 8 + 2 holds `value`."""
    images, model = blobs(STEPS * ROWS), perceptron(0)
    pixels = images.pixels.clone()
    if broken < STEPS:
        pixels[broken * ROWS + 2, 3] = value
    optimizer = SGD(model.parameters(), lr=0.05)
    train(
        model,
        batches_of(replace(images, pixels=pixels), torch.arange(len(pixels)).split(ROWS)),
        steps=STEPS,
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer, 1.0),
        runtime=runtime,
        name="lesson",
    )
    return model


@pytest.fixture
def fast_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as torch.compile does, without generating code."""
    torch._dynamo.reset()
    monkeypatch.setattr(steps, "_compile", lambda function: torch.compile(function, backend="aot_eager"))


@pytest.mark.parametrize(
    ("engine", "value", "broken"),
    [("eager", "nan", 0), ("eager", "inf", 5), ("eager", "nan", STEPS - 1), ("compiled", "nan", 5)],
)
def test_step_and_image_are_named(engine: str, value: str, broken: int, fast_compiler: None) -> None:
    told = (
        f"the loss of lesson is NaN or infinite in step {broken + 1} of 12, first in the image itself for "
        f"image {broken * ROWS + 2}$"
    )
    with pytest.raises(BrokenLoss, match=told):
        learn(Runtime(engine=engine), broken=broken, value=KIND[value])


def test_a_loop_of_sound_losses_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = learn(broken=STEPS).state_dict()
    late(monkeypatch)
    assert all(torch.equal(value, at_once[name]) for name, value in learn(broken=STEPS).state_dict().items())


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have losses looked at as on a GPU: by what a step has counted."""

    def watch(device: torch.device, ranks: Ranks, *, at_once: bool) -> Losses:
        return Losses(device, ranks)

    monkeypatch.setattr(loops, "Losses", watch)


@pytest.mark.parametrize("value", KIND)
@pytest.mark.parametrize("broken", [0, 5, STEPS - 1])
def test_what_steps_count_names_the_first_broken_one(
    value: str, broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch)
    first = broken * ROWS
    told = rf"in step {broken + 1} of 12 \(a batch of images {first}, {first + 1}, {first + 2} and 5 more\)$"
    with pytest.raises(BrokenLoss, match=told):
        learn(broken=broken, value=KIND[value])


def test_a_gpu_is_asked_now_and_then_and_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what waits for the device are events of a step that is long over."""
    losses, waited = Losses(torch.device("cpu"), ALONE), []
    losses.device = torch.device("cuda")
    step = 0

    class Event:
        def __init__(self) -> None:
            self.recorded = step

        def synchronize(self) -> None:
            waited.append((step, self.recorded))

    class Stream:
        def record_event(self) -> Event:
            return Event()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    real = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **k: real(self, "cpu", copy=True))
    found = []
    for step in range(1, 33):
        losses.note(torch.tensor(float("nan") if step == 11 else 1.0))
        losses.end_step()
        found.append(losses.find_broken(step, last=False))
    assert waited == [(16, 8), (24, 16), (32, 24)]
    assert [(step, one) for step, one in enumerate(found, 1) if one is not None] == [(24, 11), (32, 11)]
    assert losses.find_broken(32, last=True) == 11


# ---- which layer


def breaking(layer: str, images: Tensor) -> nn.Module:
    """A classifier of images [3, 4] in which `layer` gives infinity for image 2, which may be `images`."""

    def infinite(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(0, torch.tensor([2]), float("inf"))

    model = Classifier(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    if layer == "images":
        images[2, 1] = float("nan")
    elif layer:
        model.get_submodule(layer).register_forward_hook(infinite)
    return model


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("images", "the image itself"), ("network.0", "layer '0'"), ("network.2", "layer '2'"),
        ("network", "its outputs"),
    ],
)  # fmt: skip
def test_the_layer_is_found(layer: str, words: str) -> None:
    images = torch.ones(3, 4)
    model = breaking(layer, images)
    assert find_broken_layer(model, images) == (words, [2])
    assert not any(len(module._forward_hooks) > 1 for module in model.modules())


def test_sound_outputs_have_no_broken_layer() -> None:
    assert find_broken_layer(breaking("", torch.ones(3, 4)), torch.ones(3, 4)) is None


# ---- every method


def break_the_loss(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Loss number `call` is NaN; the first one is that of a rehearsal."""
    note, calls = Losses.note, []

    def broken(self: Losses, loss: Tensor) -> None:
        calls.append(loss)
        note(self, loss * float("nan") if len(calls) == call else loss)

    monkeypatch.setattr(Losses, "note", broken)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# Without steps, judged by a referee, or of pruned models.
OTHERS = ("dau", "fisher", "influence", "ssd", "noise", "retrain_clean")


@pytest.mark.parametrize("name", [name for name in find_methods() if name not in OTHERS])
def test_every_method_says_in_which_step_it_broke(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, method = trained(TENTH), get_method(name)
    before = weights(task.original)
    settings = method.resolve(task, {"batch_size": 12})
    break_the_loss(monkeypatch, 3)
    told = rf"^{name} diverged, the loss of [^:\n]* is NaN or infinite in step [123] of \d+.*: leave it out"
    with pytest.raises(Diverged, match=told):
        run_timed(name, lambda given: method.run(given, settings), task)
    assert all(torch.equal(value, before[key]) for key, value in task.original.state_dict().items())


def test_training_the_original_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(TENTH)
    break_the_loss(monkeypatch, 3)
    told = r"^original diverged, the loss of original is NaN .* in step 2 of .*: lower its learning rate, or"
    with pytest.raises(Diverged, match=told):
        run_timed("original", original.train, replace(task, original=task.fresh(0)))


def test_a_game_tells_its_turn_and_is_played_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = trained(TENTH)
    config = DauConfig(label_conditioned=True, alpha=0.5, turns=16, batch_size=32)
    build = game.Game._build_turn
    games: list[game.Game] = []

    def breaking(self: game.Game, *given: Any) -> Callable[..., Tensor]:
        turn = build(self, *given)
        games.append(self)

        def broken(*inputs: Any) -> Tensor:
            loss = turn(*inputs)
            return loss * float("nan") if self is games[0] and self.taken == 4 else loss

        return broken

    monkeypatch.setattr(game.Game, "_build_turn", breaking)
    result = run_timed("dau", lambda given: game.unlearn(given, config), task)
    assert caplog.messages[0].startswith(
        "the loss of game is NaN or infinite in step 5 of 16 (a batch of images "
    )
    assert caplog.messages[1].startswith("a game of 16 turns with lr ")
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
