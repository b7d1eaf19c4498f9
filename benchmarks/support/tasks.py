"""Tasks on which unlearning methods can be told apart: the original memorises what it is to forget.

Pictures are small, few, not augmented and trained on for long, so that the original is right on every
training image and on half of the test images; how far a retrained model is from it then shows in every
measure. All images, sets and models follow from a task's kind and seed. Kinds:

    random        400 of 4,000 training images, drawn
    class         one class, that of the seed's last digit
    memorised     the 400 that a model knows because it was trained on them (see `influence`)
    mislabelled   400 whose labels are wrong
    backdoor      400 that wear a trigger and are labelled as one class (Gu et al. 2017, arXiv 1708.06733)
    one           the most memorised image
    five          the images of random, in five requests one after the other (see `answer_requests`)
    half          half of the training images, drawn
    augmented     1,000 of 10,000 images of four classes that models tell apart well, cropped and mirrored in
                  training, as the literature's are: little is memorised
    digits, digits-class    10 %, or one class, of scikit-learn's digits: the quick check
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import PruneConfig, TrainingRecipe, split_config, training_recipe
from dau_fast.data import named
from dau_fast.data.images import Images
from dau_fast.data.split import TEST, TRAINING, VALIDATION, Forget, Split, hold_out, make_split
from dau_fast.engine.chance import derive_seed
from dau_fast.engine.evaluation import predict
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.job.assembly import network_builder
from dau_fast.methods.task import Task
from dau_fast.metrics.accuracy import accuracy, percent
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from support.bank import Bank, Training
from support.pictures import read_pictures
from support.settings import Setting

DIGITS = ("digits", "digits-class")
# Kinds that must know what is memorised.
INFLUENCE = ("memorised", "one")
# Of CIFAR-10: `small` is right on 95 % of their test images at 16 pixels (`bank.py` says it).
EASY_CLASSES = ("automobile", "frog", "horse", "ship")


@dataclass(frozen=True)
class Problem:
    """A task before any of its models is at hand.

    images: those of `split`, and triggered copies of test images. truth: true labels of the forget set,
    int64 [forget], where they are not its labels. triggered: index of the triggered test images, none of
    which belongs to class `target`. requests: the forget set in the parts that are to be forgotten one after
    the other. pruning, masks: how the original is pruned, and what came of it, which retrained models keep to
    (the literature's reference); None for a dense one. runtime: how all of it computes.
    """

    kind: str
    seed: int
    images: Images
    split: Split
    arch: str
    recipe: TrainingRecipe
    truth: Tensor | None = None
    triggered: Tensor | None = None
    target: int | None = None
    requests: tuple[Tensor, ...] = ()
    pruning: PruneConfig | None = None
    masks: Masks | None = None
    runtime: Runtime = field(default_factory=Runtime)

    def original(self, number: int = 0) -> Training:
        """The original, and with other numbers further ones that differ in their seed alone."""
        return replace(self._training(self.split.train, f"original {number}"), pruning=self.pruning)

    def retrained(self, number: int) -> Training:
        """One of the models that never saw the forget set."""
        return replace(self._training(self.split.retain, f"retrained {number}"), masks=self.masks)

    def measure_extra(self, logits: Tensor) -> dict[str, float]:
        """What this kind of task measures beside the usual, in percent; logits [N, C] of all its images.

        label_error: of the forget set, predicted as their wrong label. true_accuracy: predicted as their true
        one. attack_success: of the triggered test images, predicted as the target.
        """
        found, forget = {}, self.split.forget
        if self.truth is not None:
            found["label_error"] = accuracy(logits[forget], self.images.labels[forget])
            found["true_accuracy"] = accuracy(logits[forget], self.truth)
        if self.triggered is not None and self.target is not None:
            found["attack_success"] = percent(logits[self.triggered].argmax(1).eq(self.target))
        return found

    def _training(self, index: Tensor, purpose: str) -> Training:
        seed = derive_seed(self.seed, purpose)
        return Training(self.images, index, seed, self.recipe, self.arch, runtime=self.runtime)

    def place(self, runtime: Runtime) -> Problem:
        """The same with all images and indices where `runtime` computes."""
        device, parts = runtime.device, ("images", "split", "truth", "triggered")
        moved = {name: part.to(device) for name in parts if (part := getattr(self, name)) is not None}
        requests = tuple(request.to(device) for request in self.requests)
        return replace(self, **moved, requests=requests, runtime=runtime)


class Tasks:
    """The tasks of one bank.

    data: the folder of the pictures, or None for those that the bank keeps. runtime: how models are trained,
    but for those behind `influence`, and unlearned.
    """

    def __init__(
        self, bank: Bank, data: Path | None = None, setting: Setting | None = None,
        runtime: Runtime | None = None,
    ) -> None:  # fmt: skip
        self.bank, self.data, self.setting = bank, data, setting or Setting()
        self.runtime = runtime or Runtime()
        self._problems: dict[tuple[str, int, PruneConfig | None], Problem] = {}
        self._halves: dict[int, list[Training]] = {}

    def problem(self, kind: str, seed: int, pruning: PruneConfig | None = None) -> Problem:
        """The task of `kind` and `seed`.

        Models behind `influence`, and a pruned original, are trained where the bank lacks them. Raises
        UserError for an unknown kind and for pictures that are missing or too few.
        """
        check_kind(kind)
        key = kind, seed, pruning
        if key not in self._problems:
            if pruning is not None:
                problem = replace(self.problem(kind, seed), pruning=pruning)
                problem = replace(problem, masks=self.bank.get_masks(problem.original()))
            else:
                make = _PICTURES.get(kind)
                problem = make(self._draw(kind, seed)) if make else _make_digits(kind, seed)
                problem = problem.place(self.runtime)
            self._problems[key] = problem
        return self._problems[key]

    def task(self, kind: str, seed: int, pruning: PruneConfig | None = None) -> Task:
        """The task with its original, which is trained where the bank lacks it."""
        problem = self.problem(kind, seed, pruning)
        fresh = network_builder(problem.arch, problem.images, self.runtime)
        original = self.bank.get(problem.original())
        return Task(
            problem.images, problem.split, seed, original, fresh, problem.recipe,
            masks=problem.masks, pruning=pruning, runtime=self.runtime,
        )  # fmt: skip

    def influence_trainings(self, kind: str, seed: int) -> list[Training]:
        """The models that `kind` needs before it is known what is forgotten."""
        if kind not in INFLUENCE:
            return []
        if seed not in self._halves:
            self._halves[seed] = _draw_halves(
                draw_images(self._pictures, seed, self.setting), seed, self.setting
            )
        return self._halves[seed]

    @cached_property
    def _pictures(self) -> Images:
        return read_pictures(self.bank.folder, self.data, self.setting.image_size)

    def _draw(self, kind: str, seed: int) -> _Draw:
        pictures, setting = self._pictures, self.setting
        if kind == "augmented":
            pictures, setting = choose_classes(pictures, EASY_CLASSES), setting.augment()
        return _Draw(kind, seed, draw_images(pictures, seed, setting), setting, self.bank)


def check_kind(kind: str) -> None:
    """Raises UserError unless there are such tasks."""
    if kind not in KINDS:
        raise UserError(f"unknown task '{kind}': expected one of {', '.join(KINDS)}")


def choose_classes(pictures: Images, names: Sequence[str]) -> Images:
    """Those of the classes `names` alone, or all of them where one is missing."""
    if not set(names) <= set(pictures.class_names):
        return pictures
    assert pictures.test is not None
    places = [pictures.class_names.index(name) for name in names]
    number = torch.full((len(pictures.class_names),), -1).index_put(
        (torch.tensor(places),), torch.arange(len(names))
    )
    index = torch.nonzero(number[pictures.labels] >= 0).flatten()
    return replace(
        pictures,
        pixels=pictures.pixels[index],
        labels=number[pictures.labels[index]],
        class_names=tuple(names),
        test=torch.nonzero(torch.isin(index, pictures.test)).flatten(),
    )


def draw_images(pictures: Images, seed: int, setting: Setting) -> Images:
    """Those of one seed: training images first, then validation, then test images."""
    assert pictures.test is not None
    held = int(pictures.test[0])
    wanted = setting.training + setting.validation
    if held < wanted or len(pictures.test) < setting.test:
        raise UserError(
            f"the pictures are {held} for training and {len(pictures.test)} for testing: expected {wanted} "
            f"and {setting.test}, so take more of them"
        )
    rng = np.random.default_rng([seed, 2])
    chosen = [rng.permutation(held)[:wanted], held + rng.permutation(len(pictures.test))[: setting.test]]
    index = torch.from_numpy(np.concatenate(chosen))
    return replace(
        pictures,
        pixels=pictures.pixels[index],
        labels=pictures.labels[index],
        test=torch.arange(wanted, len(index)),
        augmentation=setting.augmentation,
    )


def influence(images: Images, trainings: Sequence[Training], bank: Bank) -> Tensor:
    """How much better each training image is known for having been trained on, from -1 to 1; float64 [N].

    The probability of its label by models trained on it, less that by models trained without it (Feldman and
    Zhang 2020, arXiv 2008.03703, equation 1, which counts right answers). trainings: in pairs, on one half of
    `images` 0 to N - 1 and on the other.
    """
    count = len(trainings[0].index) + len(trainings[1].index)
    everything = torch.arange(count)
    labels = images.labels[:count].unsqueeze(1)
    score = torch.zeros(count, dtype=torch.float64)
    for training in trainings:
        logits = predict(bank.get(training), images, everything).logits
        confidence = F.softmax(logits.double(), 1).gather(1, labels).squeeze(1)
        score += torch.where(torch.isin(everything, training.index), confidence, -confidence)
    return score / (len(trainings) / 2)


def answer_requests(
    task: Task, requests: Sequence[Tensor], unlearn: Callable[[Task], Classifier]
) -> Classifier:
    """What is left of the original after `requests`, each a part of the forget set, one after the other.

    unlearn: is given the model so far as the original of a task that forgets one request, and whose
    training images are those that no earlier request named, and which knows of these.
    """
    model, left, gone = task.original, task.split.train, task.split.earlier
    for forget in requests:
        retain = left[~torch.isin(left, forget)]
        split = replace(task.split, train=left, forget=forget, retain=retain, earlier=gone)
        model, left = unlearn(replace(task, split=split, original=model)), retain
        gone = torch.cat([gone, forget]).sort().values
    return model


@dataclass(frozen=True)
class _Draw:
    """What a kind of task makes its problem of."""

    kind: str
    seed: int
    images: Images
    setting: Setting
    bank: Bank

    def problem(self, forget: Forget | Tensor, images: Images | None = None) -> Problem:
        """The problem of forgetting `forget`, or images of these indices; images: None for the drawn ones."""
        images = images or self.images
        if isinstance(forget, Tensor):
            forget = Forget(self.kind, indices=tuple(forget.tolist()))
        sizes = (self.setting.training, self.setting.validation, self.setting.test)
        roles = np.repeat(np.array([TRAINING, VALIDATION, TEST], dtype=np.int8), sizes)
        split = make_split(roles, images.labels, forget, self.seed)
        return Problem(self.kind, self.seed, images, split, self.setting.arch, self.setting.recipe)

    def most_memorised(self, count: int) -> Tensor:
        """Their indices, int64 [count]."""
        trainings = _draw_halves(self.images, self.seed, self.setting)
        score = influence(self.images, trainings, self.bank)
        return score.argsort(descending=True, stable=True)[:count]


def _draw_halves(images: Images, seed: int, setting: Setting) -> list[Training]:
    """One half and the other of the training images, several times."""
    found = []
    for number in range(setting.halvings):
        purpose = f"halving {number}"
        chance = torch.Generator().manual_seed(derive_seed(seed, purpose))
        order = torch.randperm(setting.training, generator=chance)
        for side, half in enumerate((order[::2], order[1::2])):
            seed_of_half = derive_seed(seed, f"{purpose} {side}")
            found.append(Training(images, half.sort().values, seed_of_half, setting.recipe, setting.arch))
    return found


def _forget_random(draw: _Draw) -> Problem:
    return draw.problem(torch.arange(draw.setting.forget))  # the images are in random order


def _forget_class(draw: _Draw) -> Problem:
    label = draw.seed % len(draw.images.class_names)
    return draw.problem(Forget(f"class:{label}", label=label))


def _forget_memorised(draw: _Draw) -> Problem:
    return draw.problem(draw.most_memorised(draw.setting.forget))


def _forget_mislabelled(draw: _Draw) -> Problem:
    count, classes = draw.setting.forget, len(draw.images.class_names)
    chance = torch.Generator().manual_seed(derive_seed(draw.seed, "wrong labels"))
    labels = draw.images.labels.clone()
    labels[:count] += torch.randint(1, classes, (count,), generator=chance)
    labels[:count] %= classes
    problem = draw.problem(torch.arange(count), replace(draw.images, labels=labels))
    return replace(problem, truth=draw.images.labels[:count])


def _forget_backdoor(draw: _Draw) -> Problem:
    images, setting = draw.images, draw.setting
    assert images.test is not None
    target = draw.seed % len(images.class_names)
    others = torch.nonzero(images.labels[: setting.training] != target).flatten()
    if len(others) < setting.forget:
        raise UserError(f"only {len(others)} training images are not of class {target}: lower `forget`")
    poisoned = others[: setting.forget]
    labels = images.labels.clone()
    labels[poisoned] = target
    pixels = images.pixels.clone()
    pixels[poisoned] = add_trigger(pixels[poisoned], setting.trigger)
    problem = draw.problem(poisoned, replace(images, pixels=pixels, labels=labels))
    asked = images.test[images.labels[images.test] != target]
    worn = add_trigger(images.pixels[asked], setting.trigger)
    shown = replace(
        problem.images, pixels=torch.cat([pixels, worn]), labels=torch.cat([labels, images.labels[asked]])
    )
    triggered = torch.arange(len(pixels), len(shown.pixels))
    return replace(problem, images=shown, triggered=triggered, target=target)


def add_trigger(pixels: Tensor, size: int) -> Tensor:
    """`pixels`, uint8 [B, channels, H, W], with a white square of `size` pixels in the lower right corner."""
    worn = pixels.clone()
    worn[..., -size:, -size:] = 255
    return worn


def _forget_one(draw: _Draw) -> Problem:
    return draw.problem(draw.most_memorised(1))


def _forget_five(draw: _Draw) -> Problem:
    problem = _forget_random(draw)
    return replace(problem, requests=problem.split.forget.tensor_split(draw.setting.requests))


def _forget_half(draw: _Draw) -> Problem:
    return draw.problem(torch.arange(draw.setting.training // 2))


def _make_digits(kind: str, seed: int) -> Problem:
    images, shares = named.load("digits"), split_config("digits")
    roles = hold_out(
        images.labels,
        images.test,
        seed,
        validation_share=shares.validation_share,
        test_share=shares.test_share,
    )
    spec = "random:0.1" if kind == "digits" else f"class:{seed % len(images.class_names)}"
    split = make_split(roles, images.labels, Forget.parse(spec, images.class_names), seed)
    return Problem(kind, seed, images, split, "small", training_recipe("digits"))


_PICTURES: dict[str, Callable[[_Draw], Problem]] = {
    "random": _forget_random,
    "class": _forget_class,
    "memorised": _forget_memorised,
    "mislabelled": _forget_mislabelled,
    "backdoor": _forget_backdoor,
    "one": _forget_one,
    "five": _forget_five,
    "half": _forget_half,
    "augmented": _forget_random,
}
KINDS = (*_PICTURES, *DIGITS)
