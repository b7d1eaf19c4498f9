"""Retraining, fine-tuning, gradient ascent and the original's training: what each sees and changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import blobs, perceptron

from dau_fast.config import (
    FAST_RETRAINING,
    FINE_TUNE,
    GRADIENT_ASCENT_CLASSWISE,
    GRADIENT_ASCENT_RANDOM,
    TrainingRecipe,
)
from dau_fast.data.images import Choice, Images
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.engine.batches import steps_for
from dau_fast.engine.evaluation import predict
from dau_fast.errors import UserError
from dau_fast.methods import finetune, gradient_ascent, original, retrain
from dau_fast.methods import supervised as _sgd
from dau_fast.methods.method import Method
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task, Unlearned
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier

AGAIN = replace(get_method("retrain"), name="retrain_again", run=retrain.unlearn_again)
RIVALS: dict[str, Method[TrainingRecipe]] = {
    "retrain": get_method("retrain"),
    "retrain again": AGAIN,
    "retrain fast": get_method("retrain_fast"),
    "ft": get_method("ft"),
    "ga": get_method("ga"),
}
FAST = TrainingRecipe(4, 32, 0.1, milestones=(), warm_up=0.5, nesterov=True, label_smoothing=0.2)
NOTHING = 1e-60  # a learning rate of which float32 sees nothing; 0 is none
FIFTH, ONE_CLASS = Forget("random:0.2", fraction=0.2), Forget("class:1", label=1)
every_rival = pytest.mark.parametrize("name", RIVALS)


def untrained(forget: Forget = FIFTH, seed: int = 0) -> Task:
    images = blobs(240)
    roles = hold_out(images.labels, None, seed, validation_share=0.2, test_share=0.2)
    split = make_split(roles, images.labels, forget, seed)
    recipe = TrainingRecipe(epochs=10, batch_size=32, lr=0.05)
    return Task(images, split, seed, perceptron(seed), perceptron, recipe)


def carry_out(name: str, task: Task, recipe: TrainingRecipe | None = None) -> Unlearned:
    """A rival by `recipe`, None for its own; the fast one is made for blobs."""
    asked = recipe or (FAST if name == "retrain fast" else None)
    method = RIVALS[name]
    return method.run(task, method.resolve(task, asked))


@pytest.fixture(scope="module")
def trained() -> Task:
    task = untrained()
    original.train(task)
    task.original.eval()
    return task


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every image that was asked for."""
    indices: set[int] = set()
    choose = Images.choose

    def spy(self: Images, index: Tensor, *drawn: Any) -> Choice:
        indices.update(index.tolist())
        return choose(self, index, *drawn)

    monkeypatch.setattr(Images, "choose", spy)
    return indices


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def loss_on(task: Task, model: Classifier, index: Tensor) -> float:
    logits = predict(model, task.images.batch, index).logits
    return F.cross_entropy(logits, task.labels[index]).item()


# ---- what each sees


@pytest.mark.parametrize("name", ["retrain", "retrain again", "retrain fast", "ft"])
@pytest.mark.parametrize("forget", [FIFTH, ONE_CLASS], ids=["spread", "class"])
def test_retraining_and_fine_tuning_see_the_retain_set_and_nothing_else(
    name: str, forget: Forget, seen: set[int]
) -> None:
    task = untrained(forget)
    carry_out(name, task)
    assert seen == set(task.split.retain.tolist())


def test_gradient_ascent_sees_the_forget_set_and_nothing_else(trained: Task, seen: set[int]) -> None:
    carry_out("ga", trained)
    assert seen == set(trained.split.forget.tolist())


def test_the_original_sees_the_whole_training_set_and_nothing_else(seen: set[int]) -> None:
    task = untrained()
    original.train(task)
    assert seen == set(task.split.train.tolist())


# ---- what each changes


@every_rival
def test_the_original_and_the_global_random_state_stay_as_they_were(name: str, trained: Task) -> None:
    before, state = weights(trained.original), torch.get_rng_state()
    result = carry_out(name, trained).model
    assert torch.equal(torch.get_rng_state(), state)
    after = weights(trained.original)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module.training for module in trained.original.modules())
    assert not same(result, trained.original)
    assert not set(result.parameters()) & set(trained.original.parameters())


@every_rival
def test_the_same_task_gives_the_same_weights_whatever_ran_before(name: str, trained: Task) -> None:
    torch.manual_seed(1)
    first = carry_out(name, trained).model
    torch.manual_seed(2)
    assert same(carry_out(name, trained).model, first)


@every_rival
def test_another_seed_gives_other_weights(name: str, trained: Task) -> None:
    first, other = (carry_out(name, replace(trained, seed=seed)).model for seed in (0, 1))
    assert not same(first, other)


def test_training_the_original_happens_in_place() -> None:
    task = untrained()
    before = weights(task.original)
    assert original.train(task).model is task.original
    assert any(not torch.equal(before[key], tensor) for key, tensor in weights(task.original).items())
    index = task.split.train
    outputs = predict(task.original, task.images.batch, index)
    assert accuracy(outputs.logits, task.labels[index]) > 90


def test_retraining_begins_at_a_fresh_network_and_not_at_the_original(trained: Task) -> None:
    started = retrain.unlearn(trained, replace(trained.recipe, lr=NOTHING)).model
    expected = perceptron(trained.derive_seed("retrain"))
    for ours, theirs in zip(started.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(started.head.weight, trained.original.head.weight)


def test_two_retrainings_share_neither_beginning_nor_result(trained: Task) -> None:
    for recipe in (trained.recipe, replace(trained.recipe, lr=NOTHING)):
        first, again = (run(trained, recipe).model for run in (retrain.unlearn, retrain.unlearn_again))
        assert not same(first, again)
    assert not torch.equal(first.head.weight, again.head.weight)


@pytest.mark.parametrize("name", ["retrain", "retrain again"])
def test_retraining_learns_the_retain_set_without_the_forgotten_class(name: str) -> None:
    task = untrained(ONE_CLASS)
    model = carry_out(name, task).model
    split = task.split
    right = {
        part: accuracy(predict(model, task.images.batch, index).logits, task.labels[index])
        for part, index in {"forget": split.forget, "retain": split.retain}.items()
    }
    assert right["retain"] > 95
    assert right["forget"] == 0


def test_fine_tuning_begins_at_the_original_and_fits_the_retain_set_better(trained: Task) -> None:
    started = finetune.unlearn(trained, replace(FINE_TUNE, lr=NOTHING)).model
    for ours, theirs in zip(started.parameters(), trained.original.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    model = finetune.unlearn(trained, FINE_TUNE).model
    retain = trained.split.retain
    assert loss_on(trained, model, retain) < loss_on(trained, trained.original, retain)


def test_gradient_ascent_raises_the_loss_on_the_forget_set(trained: Task) -> None:
    recipe = TrainingRecipe(epochs=10, batch_size=16, lr=0.02, milestones=())
    model = gradient_ascent.unlearn(trained, recipe).model
    forget = trained.split.forget
    assert loss_on(trained, model, forget) > loss_on(trained, trained.original, forget)


def test_gradient_ascent_takes_the_gradient_of_fine_tuning_in_the_other_direction(trained: Task) -> None:
    """One step from one point on one batch, without momentum's and weight decay's part."""
    forget = trained.split.forget
    recipe = TrainingRecipe(
        epochs=1, batch_size=len(forget), lr=0.1, momentum=0.0, weight_decay=0.0, milestones=()
    )
    up = gradient_ascent.unlearn(trained, recipe).model
    swapped = replace(trained, split=replace(trained.split, retain=forget))
    down = finetune.unlearn(swapped, recipe).model
    triples = zip(trained.original.parameters(), up.parameters(), down.parameters(), strict=True)
    for middle, above, below in triples:
        torch.testing.assert_close(above - middle, middle - below, rtol=1e-3, atol=1e-5)


# ---- recipes


def recipe_of(
    name: str, task: Task, monkeypatch: pytest.MonkeyPatch, asked: TrainingRecipe | None = None
) -> TrainingRecipe:
    """The recipe that a rival trains by; nothing is trained."""
    used: list[TrainingRecipe] = []

    def spy(
        model: Classifier, index: Tensor, task: Task, recipe: TrainingRecipe, *_: Any, **__: Any
    ) -> tuple[()]:
        used.append(recipe)
        return ()

    for module in (retrain, finetune, gradient_ascent):
        monkeypatch.setattr(module, "fit", spy)
    method = RIVALS[name]
    method.run(task, method.resolve(task, asked))
    return used[0]


@pytest.mark.parametrize("classwise", [True, False])
def test_every_rival_has_its_recipe(classwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = untrained(ONE_CLASS if classwise else FIFTH)
    assert task.split.classwise == classwise
    ascent = GRADIENT_ASCENT_CLASSWISE if classwise else GRADIENT_ASCENT_RANDOM
    expected = {"retrain": task.recipe, "retrain again": task.recipe, "ft": FINE_TUNE, "ga": ascent}
    for name, recipe in (expected | {"retrain fast": FAST_RETRAINING}).items():
        assert recipe_of(name, task, monkeypatch) == recipe


@every_rival
def test_settings_replace_a_rivals_own_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TrainingRecipe(epochs=1)
    task = untrained()
    assert recipe_of(name, task, monkeypatch, own) is own
    usual = recipe_of(name, task, monkeypatch)
    assert RIVALS[name].resolve(task, {"epochs": 3}) == replace(usual, epochs=3)


def test_the_learning_rate_falls_tenfold_at_the_milestones(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def spy(*_: Any, steps: int, optimizer: torch.optim.SGD, scheduler: Any, **__: Any) -> tuple[()]:
        for _step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        group = optimizer.param_groups[0]
        assert (group["momentum"], group["weight_decay"]) == (0.8, 0.02)
        return ()

    monkeypatch.setattr(_sgd, "train", spy)
    task = untrained()
    recipe = TrainingRecipe(20, len(task.split.train), 1.0, 0.8, 0.02, milestones=(0.5, 0.75))
    original.train(replace(task, recipe=recipe))
    assert rates == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)


def test_the_fast_recipe_is_one_triangle_with_nesterov_and_smooth_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    losses: list[float] = []
    logits, labels = torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([0])

    def spy(
        *_: Any, steps: int, optimizer: torch.optim.SGD, scheduler: Any, loss: Any, **__: Any
    ) -> tuple[()]:
        for _step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["nesterov"]
        losses.append(loss(logits, labels).item())
        return ()

    monkeypatch.setattr(_sgd, "train", spy)
    task = untrained()
    fast = replace(FAST, epochs=8, batch_size=len(task.split.retain))
    retrain.unlearn_fast(task, fast)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.075, 0.05, 0.025])
    log_p = logits.log_softmax(1)[0]
    assert losses[0] == pytest.approx(-(0.8 * log_p[0] + 0.2 * log_p.mean()).item())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_fast_recipe_fits_into_any_number_of_steps(steps: int) -> None:
    task = untrained()
    fast = replace(FAST, epochs=steps, batch_size=len(task.split.retain))
    model = retrain.unlearn_fast(task, fast).model
    assert all(p.isfinite().all() for p in model.parameters())


@every_rival
def test_progress_is_told_of_every_step(name: str, trained: Task) -> None:
    announced: list[tuple[str, int]] = []
    advanced: list[int] = []

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append((description, steps))
        return lambda: advanced.append(1)

    carry_out(name, replace(trained, progress=progress))
    split = trained.split
    recipes = {
        "ft": (FINE_TUNE, split.retain),
        "ga": (GRADIENT_ASCENT_RANDOM, split.forget),
        "retrain fast": (FAST, split.retain),
    }
    recipe, index = recipes.get(name, (trained.recipe, split.retain))
    steps = steps_for(recipe.epochs, len(index), recipe.batch_size)
    assert announced == [(name, steps)]
    assert len(advanced) == steps


# ---- methods by name, and running them


def test_a_method_is_found_by_its_name() -> None:
    assert list(find_methods()) == [
        "retrain", "retrain_clean", "retrain_fast",
        "dau", "fisher", "ft", "ga", "head_only", "influence", "mu_mis", "ssd",
    ]  # fmt: skip
    for name, row in find_methods().items():
        assert row.name == name
        assert get_method(name) is row


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match="unknown method 'scrub': expected some of retrain, retrain_clean, retrain_fast, dau"
    ):
        get_method("scrub")


def test_settings_of_another_method_or_unknown_ones_are_refused(trained: Task) -> None:
    own, other = "'ft' are a TrainingRecipe", "not a DauConfig: give one, or a dict of some of its fields"
    with pytest.raises(UserError, match=f"the settings of method {own}, {other}"):
        get_method("ft").resolve(trained, get_method("dau").resolve(trained))
    with pytest.raises(UserError, match="ft has no setting 'alpha': expected some of epochs, batch_size"):
        get_method("ft").resolve(trained, {"alpha": 1.0})
    with pytest.raises(UserError, match="`lr=0`: expected a number above 0"):
        get_method("ft").resolve(trained, {"lr": 0})


def test_a_finished_method_is_timed_and_in_evaluation_mode(trained: Task) -> None:
    finished = run_timed("ft", lambda task: finetune.unlearn(task, FINE_TUNE), trained)
    assert finished.seconds > 0
    assert finished.compile_seconds > 0, "of the rehearsal"
    assert finished.history is None
    assert not any(module.training for module in finished.model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_method_that_diverged_is_refused_by_name(value: float, trained: Task) -> None:
    def diverging(task: Task) -> Unlearned:
        model = copy.deepcopy(task.original)
        with torch.no_grad():
            model.head.bias[1] = value
        return Unlearned(model)

    with pytest.raises(UserError, match="ga diverged"):
        run_timed("ga", diverging, trained)


def test_statistics_that_are_no_longer_finite_have_diverged_too(trained: Task) -> None:
    def diverging(task: Task) -> Unlearned:
        model = copy.deepcopy(task.original)
        model.network[1].running_var.fill_(float("nan"))
        return Unlearned(model)

    with pytest.raises(UserError, match="ga diverged"):
        run_timed("ga", diverging, trained)
