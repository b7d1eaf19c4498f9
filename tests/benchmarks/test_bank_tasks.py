"""The tasks of the bank: who is forgotten, what is shared, and what is measured beside the usual."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data.images import Augmentation, Images
from dau_fast.errors import UserError
from dau_fast.methods.task import Task
from dau_fast.models import Classifier, Outputs
from dau_fast.prune import Masks

if TYPE_CHECKING:
    from support.bank import Training
    from support.tasks import Tasks

pytestmark = pytest.mark.usefixtures("importable")

PICTURE_KINDS = ("random", "class", "memorised", "mislabelled", "backdoor", "one", "five", "half")


@pytest.fixture
def tasks(pictures: Path, tmp_path: Path) -> Tasks:
    from support.bank import Bank
    from support.settings import SMOKE
    from support.tasks import Tasks

    return Tasks(Bank(tmp_path), pictures, SMOKE)


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_a_task_follows_from_kind_and_seed_and_its_sets_are_apart(tasks: Tasks, kind: str) -> None:
    from support.tasks import Tasks

    problem = tasks.problem(kind, 2)
    split = problem.split
    parts = [split.forget, split.retain, split.validation, split.test]
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    assert torch.equal(torch.cat(parts[:2]).sort().values, split.train)
    assert len(split.train) == 24
    assert problem.images.augmentation == Augmentation()
    sizes = {"one": 1, "half": 12, "class": int((problem.images.labels[:24] == 2).sum())}
    assert len(split.forget) == sizes.get(kind, 4)
    again = Tasks(tasks.bank, tasks.data, tasks.setting).problem(kind, 2)
    assert torch.equal(again.images.pixels, problem.images.pixels)
    assert again.retrained(1).key == problem.retrained(1).key != problem.retrained(0).key
    # Half of the images are the other seed's too, here where there are few.
    assert tasks.problem(kind, 3).original().key != problem.original().key


def test_augmented_tasks_are_of_more_images_and_passes(tasks: Tasks) -> None:
    from support.tasks import Tasks

    setting = replace(tasks.setting, more=1.25, validation=5)
    problem = Tasks(tasks.bank, tasks.data, setting).problem("augmented", 2)
    split, images = problem.split, problem.images
    sizes = [len(part) for part in (split.forget, split.retain, split.validation, split.test)]
    assert sizes == [5, 25, 6, 12]
    assert problem.recipe == replace(setting.recipe, epochs=2)
    assert images.augmentation == Augmentation(pad=1, flip=True)
    assert images.class_names == ("blue", "green", "red"), "classes of other names are all used"


def test_classes_are_chosen_by_name(tasks: Tasks) -> None:
    from support.tasks import choose_classes

    pictures = tasks._pictures
    found = choose_classes(pictures, ("red", "blue"))
    kept = [i for i, label in enumerate(pictures.labels.tolist()) if pictures.class_names[label] != "green"]
    assert found.class_names == ("red", "blue")
    assert torch.equal(found.pixels, pictures.pixels[kept])
    names = [[images.class_names[label] for label in images.labels] for images in (found, pictures)]
    assert names[0] == [names[1][i] for i in kept]
    assert pictures.test is not None
    assert found.test is not None
    assert [kept[i] for i in found.test] == [i for i in pictures.test.tolist() if names[1][i] != "green"]


def test_tasks_on_the_same_images_share_their_original(tasks: Tasks) -> None:
    keys = {kind: tasks.problem(kind, 0).original().key for kind in PICTURE_KINDS}
    shared = {keys[kind] for kind in ("random", "class", "memorised", "one", "five", "half")}
    assert len(shared) == 1
    assert len({*keys.values()}) == 3
    assert tasks.problem("five", 0).retrained(0).key == tasks.problem("random", 0).retrained(0).key
    assert tasks.problem("random", 0).original(1).key not in keys.values()


def test_a_pruned_task_has_the_images_of_the_dense_one_and_one_original_for_all_kinds(tasks: Tasks) -> None:
    pruning = PruneConfig("synflow", 0.5)
    dense, pruned = tasks.problem("random", 0), tasks.problem("random", 0, pruning)
    assert pruned.images is dense.images
    assert pruned.original().key == tasks.problem("class", 0, pruning).original().key != dense.original().key
    assert pruned.retrained(0).key != dense.retrained(0).key
    assert pruned.retrained(0).masks == pruned.masks == tasks.bank.get_masks(pruned.original())
    task = tasks.task("random", 0, pruning)
    assert task.masks == Masks.from_zeros(task.original.network)
    assert task.pruning == pruning
    assert tasks.task("random", 0).masks is None


def test_a_class_is_forgotten_as_everywhere(tasks: Tasks) -> None:
    problem = tasks.problem("class", 4)  # three classes: number 1
    split, labels = problem.split, problem.images.labels
    assert split.classwise
    assert set(labels[split.forget].tolist()) == {1}
    for index in (split.retain, split.validation, split.test):
        assert 1 not in labels[index]


def test_mislabelled_images_have_wrong_labels_and_only_those(tasks: Tasks) -> None:
    problem, clean = tasks.problem("mislabelled", 0), tasks.problem("random", 0)
    forget = problem.split.forget
    assert problem.truth is not None
    assert torch.equal(problem.truth, clean.images.labels[forget])
    assert (problem.images.labels[forget] != problem.truth).all()
    assert torch.equal(problem.images.labels[4:], clean.images.labels[4:])
    assert torch.equal(problem.images.pixels, clean.images.pixels)


def test_a_backdoor_is_worn_by_the_forget_set_and_by_copies_of_test_images(tasks: Tasks) -> None:
    problem, clean = tasks.problem("backdoor", 2), tasks.problem("random", 2)
    images, forget, triggered = problem.images, problem.split.forget, problem.triggered
    assert problem.target == 2
    assert (images.labels[forget] == 2).all()
    assert (clean.images.labels[forget] != 2).all()
    assert triggered is not None
    tests = clean.split.test[clean.images.labels[clean.split.test] != 2]
    assert torch.equal(images.labels[triggered], clean.images.labels[tests])
    for worn, plain in [(triggered, tests), (forget, forget)]:
        difference = images.pixels[worn] != clean.images.pixels[plain]
        assert (images.pixels[worn][..., -2:, -2:] == 255).all()
        assert not difference[..., :-2, :].any()
        assert not difference[..., :, :-2].any()
    assert triggered.min() > problem.split.test.max()
    unworn = torch.cat([problem.split.retain, problem.split.validation, problem.split.test])
    assert torch.equal(images.pixels[unworn], clean.images.pixels[unworn])


def test_extra_measures(tasks: Tasks) -> None:
    problem = tasks.problem("mislabelled", 0)
    forget, truth = problem.split.forget, problem.truth
    assert truth is not None
    said = truth.clone()
    said[0] = problem.images.labels[forget[0]]  # one of four as it was mislabelled, the others right
    logits = torch.zeros(len(problem.images.labels), 3)
    logits[forget, said] = 1
    assert problem.measure_extra(logits) == {"label_error": 25, "true_accuracy": 75}
    backdoor = tasks.problem("backdoor", 0)
    assert backdoor.triggered is not None
    logits = torch.zeros(len(backdoor.images.labels), 3)
    logits[:, 1] = 1
    logits[backdoor.triggered[: len(backdoor.triggered) // 2], 0] = 2
    share = 100 * (len(backdoor.triggered) // 2) / len(backdoor.triggered)
    assert backdoor.measure_extra(logits) == {"attack_success": pytest.approx(share)}
    assert tasks.problem("random", 0).measure_extra(logits) == {}


class Table(nn.Module):
    """A model that gives to the image of number i the logits [i]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Outputs:
        rows = self.logits[images[:, 0].long()]
        return Outputs(rows, rows)


def test_influence_is_confidence_inside_less_outside() -> None:
    from support.bank import Training
    from support.tasks import influence

    images = Images(torch.arange(4.0)[:, None], torch.tensor([0, 1, 0, 1]), ("a", "b"))
    halves = [[0, 1], [2, 3], [0, 2], [1, 3]]
    # Probability of label 0, by model and image.
    given = torch.tensor(
        [[0.9, 0.2, 0.5, 0.4], [0.3, 0.6, 0.7, 0.1], [0.8, 0.5, 0.6, 0.5], [0.4, 0.3, 0.6, 0.2]],
        dtype=torch.float64,
    )
    expected = [
        ((0.9 - 0.3) + (0.8 - 0.4)) / 2,
        ((0.8 - 0.4) + (0.7 - 0.5)) / 2,
        ((0.7 - 0.5) + (0.6 - 0.6)) / 2,
        ((0.9 - 0.6) + (0.8 - 0.5)) / 2,
    ]
    recipe = TrainingRecipe(epochs=1)
    trainings = [Training(images, torch.tensor(half), i, recipe, "small") for i, half in enumerate(halves)]

    class Known:
        def get(self, training: Training) -> nn.Module:
            p = given[training.seed]
            return Table(torch.stack([p, 1 - p], 1).log())

    found = influence(images, trainings, Known())  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_most_memorised_images_are_forgotten(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import tasks as module

    score = torch.zeros(24)
    score[[3, 20, 7, 11]] = torch.tensor([0.5, 1.0, 0.9, 0.7])
    monkeypatch.setattr(module, "influence", lambda *_: score)
    assert tasks.problem("memorised", 0).split.forget.tolist() == [3, 7, 11, 20]
    assert tasks.problem("one", 0).split.forget.tolist() == [20]


def test_requests_are_answered_one_after_the_other(tasks: Tasks) -> None:
    from support.tasks import answer_requests

    @dataclass
    class Numbered:
        number: int

    task, problem = tasks.task("five", 0), tasks.problem("five", 0)
    assert [request.tolist() for request in problem.requests] == [[0, 1], [2, 3]]
    seen = []

    def unlearn(task: Task) -> Classifier:
        split = task.split
        seen.append((task.original.number, len(split.train), len(split.retain), split.earlier.tolist()))
        assert torch.equal(torch.cat([split.forget, split.retain]).sort().values, split.train)
        return Numbered(task.original.number + 1)  # type: ignore[return-value]

    left = answer_requests(replace(task, original=Numbered(0)), problem.requests, unlearn)  # type: ignore[arg-type]
    assert left == Numbered(2)
    assert seen == [(0, 24, 22, []), (1, 22, 20, [0, 1])]


@pytest.mark.parametrize(("kind", "classwise"), [("digits", False), ("digits-class", True)])
def test_digits_are_split_as_the_command_line_does(tasks: Tasks, kind: str, classwise: bool) -> None:
    problem = tasks.problem(kind, 103)
    assert problem.split.classwise == classwise
    assert len(problem.split.train) == 899
    assert problem.recipe.epochs == 100
    if classwise:
        assert set(problem.images.labels[problem.split.forget].tolist()) == {3}


def test_pictures_are_decoded_once_and_again_after_a_change(
    tasks: Tasks, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import pictures as module

    first = module.read_pictures(tasks.bank.folder, pictures, 8)
    with monkeypatch.context() as patch:
        patch.setattr(module.named, "load", lambda *_, **__: pytest.fail("decoded again"))
        for data in (pictures, None):
            second = module.read_pictures(tasks.bank.folder, data, 8)
            assert second.class_names == ("blue", "green", "red")
            for name in ("pixels", "labels", "test", "mean", "std"):
                assert torch.equal(getattr(first, name), getattr(second, name))
    file = next(tasks.bank.folder.glob("pictures-8-*.npz"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        module.read_pictures(tasks.bank.folder, None, 8)
    assert torch.equal(module.read_pictures(tasks.bank.folder, pictures, 8).pixels, first.pixels)
    with pytest.raises(UserError, match="keeps 0 sets of pictures of 9 pixels"):
        module.read_pictures(tasks.bank.folder, None, 9)


def test_too_few_pictures_are_a_mistake(tasks: Tasks) -> None:
    from support.settings import Setting
    from support.tasks import Tasks

    many = Tasks(tasks.bank, tasks.data, Setting(image_size=8))
    with pytest.raises(UserError, match="36 for training and 18 for testing: expected 4500 and 2000"):
        many.problem("random", 0)
    with pytest.raises(UserError, match="`halvings=0`"):
        Setting(halvings=0)
