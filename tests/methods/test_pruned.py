"""Every method on a pruned model: masked weights stay at zero; where the masks of each model come from."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data.images import Choice, Images
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.errors import UserError
from dau_fast.methods import original, retrain
from dau_fast.methods import pruned as _pruned
from dau_fast.methods.method import Method
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks, omp, synflow
from dau_fast.prune.registry import find_pruners
from dau_fast.report.record import zero_share

PRUNINGS = find_pruners()
# Settings by which there is something to dampen here.
ASKED = {"ssd": {"alpha": 1.0}}
FIFTH, ONE_CLASS = Forget("random:0.2", fraction=0.2), Forget("class:1", label=1)


def stripes(count: int) -> Images:
    """Three classes of 4x4 images: one of the first three rows is bright."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Images(3 * torch.eye(3, 4)[labels].view(count, 1, 4, 1) + noise, labels, ("a", "b", "c"))


def convolutions(seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3),
        ]  # fmt: skip
        return Classifier(nn.Sequential(*layers).to(memory_format=torch.channels_last))


def untrained(pruning: str, forget: Forget = FIFTH, sparsity: float = 0.7) -> Task:
    images = stripes(240)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.2)
    split = make_split(roles, images.labels, forget, 0)
    recipe = TrainingRecipe(epochs=4, batch_size=32, lr=0.05)
    config = PruneConfig(pruning, sparsity, rewind=0.25, iterations=10)
    return Task(images, split, 0, convolutions(0), convolutions, recipe, pruning=config)


def trained(pruning: str, forget: Forget = FIFTH) -> Task:
    task = untrained(pruning, forget)
    return replace(task, masks=run_timed("original", original.train, task).masks)


def finish(method: Method[Any], task: Task) -> Finished:
    """What comes of `method` with its usual settings, but for `ASKED`."""
    settings = method.resolve(task, ASKED.get(method.name))
    method.check(task, settings)
    return run_timed(method.name, lambda given: method.run(given, settings), task)


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


@pytest.mark.parametrize("forget", [FIFTH, ONE_CLASS], ids=["spread", "class"])
@pytest.mark.parametrize("name", find_methods())
def test_masked_weights_stay_at_zero(name: str, forget: Forget) -> None:
    task = trained("omp", forget)
    before = copy.deepcopy(task.original.network.state_dict())
    finished = finish(get_method(name), task)
    assert finished.masks is not None
    assert (finished.masks == task.masks) == (name != "retrain_clean")
    assert finished.masks.sparsity == pytest.approx(0.7, abs=1e-2)
    moved = 0
    for layer, weight in finished.masks.find_weights(finished.model.network).items():
        assert (weight[~finished.masks[layer]] == 0).all()
        assert (weight[finished.masks[layer]] != 0).all()
        moved += int((weight != before[layer]).sum())
    assert (moved > 0) == (name != "head_only")
    assert zero_share(finished.model.network, finished.masks) == pytest.approx(finished.masks.sparsity)
    after = task.original.network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_the_original_is_pruned_trained_and_sees_the_training_set(pruning: str, seen: set[int]) -> None:
    task = untrained(pruning)
    finished = run_timed("original", original.train, task)
    assert finished.model is task.original
    assert seen == set(task.split.train.tolist())
    assert finished.masks is not None
    assert zero_share(task.original.network, finished.masks) == finished.masks.sparsity
    outputs = task.original(task.images.batch(task.split.test)).logits
    assert (outputs.argmax(1) == task.labels[task.split.test]).float().mean() > 0.5


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_retraining_clean_sees_the_retain_set_alone_and_has_masks_of_its_own(
    pruning: str, seen: set[int]
) -> None:
    task = untrained(pruning)
    finished = finish(get_method("retrain_clean"), task)
    assert seen == set(task.split.retain.tolist())
    assert finished.masks is not None
    assert finished.masks != trained(pruning).masks


@pytest.mark.parametrize(("pruning", "phases"), [("omp", 3), ("imp", 8)])
def test_weights_are_rewound_to_those_of_early_training(
    pruning: str, phases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[tuple[float, float], Masks | None, dict[str, Tensor]]] = []

    def spy(model: Classifier, index: Tensor, task: Task, *arguments: Any, part: tuple[float, float]) -> Any:
        begun.append((part, task.masks, copy.deepcopy(model.network.state_dict())))
        return fit(model, index, task, *arguments, part=part)

    monkeypatch.setattr(_pruned, "fit", spy)
    initial = convolutions(0).network.state_dict()
    masks = original.train(untrained(pruning)).masks
    assert [part for part, _, _ in begun] == [(0, 0.25)] + [(0.25, 1)] * (phases - 1)
    assert [given is None for _, given, _ in begun] == [True, True] + [False] * (phases - 2)
    assert begun[-1][1] == masks
    early = begun[1][2]
    assert not torch.equal(early["0.weight"], initial["0.weight"])
    for _, given, state in begun[1:]:
        for name, tensor in state.items():
            kept = given[name] if given and name in given else torch.ones_like(tensor)
            assert torch.equal(tensor, early[name] * kept)


def test_synflow_prunes_the_untrained_network() -> None:
    task = untrained("synflow")
    initial = copy.deepcopy(task.original.network)
    masks = run_timed("original", original.train, task).masks
    assert masks == synflow(initial, 0.7, input_shape=(1, 4, 4), iterations=10)


def test_a_trained_model_is_pruned_by_its_weights_and_trained_on() -> None:
    task = untrained("omp")
    original.train(replace(task, pruning=None))
    weights = copy.deepcopy(task.original.network)
    finished = run_timed("original", original.prune_trained, task)
    assert finished.masks == omp(weights, 0.7)
    assert finished.model is task.original
    assert not torch.equal(finished.model.network[6].weight, weights[6].weight)


def test_pruning_repeats_with_its_seed() -> None:
    first, again = (trained("imp") for _ in range(2))
    assert first.masks == again.masks
    ours, theirs = (task.original.network.state_dict() for task in (first, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_retraining_clean_needs_pruning() -> None:
    task = replace(untrained("omp"), pruning=None)
    with pytest.raises(UserError, match=r"'retrain_clean' .*add `prune`"):
        retrain.check_clean(task, task.recipe)
