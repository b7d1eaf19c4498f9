"""Every setting of a run, with its unit and its source, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from dau_fast.errors import UserError, brief, check_choice

S = TypeVar("S")


def change(settings: S, asked: Mapping[str, Any], owner: str) -> S:
    """`settings`, a dataclass, with the fields that `asked` names changed; lists become tuples, as in JSON.

    owner: what messages call them. Raises UserError for an unknown field or a wrong value.
    """
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"{owner} has no setting '{unknown[0]}': expected some of {', '.join(known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    return replace(settings, **values)  # type: ignore[type-var]


def _check(
    settings: Any,
    *names: str,
    low: float = 0,
    high: float = math.inf,
    whole: bool = False,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """UserError unless every field of `names` is a finite number from `low` to `high`, `whole` if asked for.

    open_low, open_high: whether the borders are refused. None passes where it is a field's default.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None and getattr(type(settings), name, ...) is None:
            continue
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        fits = number and low <= value <= high and value != math.inf
        if not fits or (open_low and value == low) or (open_high and value == high):
            kind = "a whole number" if whole else "a number"
            begin = f"{'above' if open_low else 'from'} {low:g}"
            end = "" if open_low else " up"
            if high < math.inf:
                end = f" to {'below ' if open_high else ''}{high:g}"
            raise UserError(f"`{name}={brief(value)}`: expected {kind} {begin}{end}")
        most = _MOST.get(name, 10**9 if whole else 10**6)
        if value > most:
            raise UserError(f"`{name}={brief(value)}`: expected no more than {most:,}")


# What nobody means: it would run for ever, take all memory or ruin any model. Other whole numbers may be a
# billion, others a million.
_MOST = {
    "epochs": 10**6,
    "turns": 10**6,
    "warmup_steps": 10**6,
    "attacker_steps": 10**4,
    "attacker_hidden": 2**14,
    "batch_size": 2**16,
    "forget_batch_size": 2**16,
    "iterations": 10**6,
    "search_steps": 10**4,
    "relearning_steps": 10**6,
    "attack_steps": 10**4,
    "lr": 10**3,
    "attacker_lr": 10**3,
    "forget_lr": 10**3,
    "relearning_lr": 10**3,
}


# For settings that stand in their method's own file.
check_numbers = _check


def _check_switch(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not isinstance(value, bool):
        raise UserError(f"`{name}={brief(value)}`: expected True or False")


def _check_milestones(settings: Any) -> None:
    shares = settings.milestones
    if not isinstance(shares, tuple) or not all(map(_is_share, shares)):
        raise UserError(f"`milestones={brief(shares)}`: expected shares of the steps, from 0 to 1")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class TrainingRecipe:
    """SGD. Defaults: the literature's CIFAR protocol (Jia et al. 2023, arXiv 2304.04934)."""

    epochs: int = 182  # passes over the training images
    batch_size: int = 256  # images
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of the steps after which lr is divided by 10
    # 91 and 136 of 182 epochs in the protocol.
    warm_up: float | None = None  # share of the steps in which lr rises to its value, then it falls to 0;
    # None for the step decay at the milestones instead.
    nesterov: bool = False
    label_smoothing: float = 0.0  # share of the target that is spread over all classes

    def __post_init__(self) -> None:
        _check(self, "epochs", "batch_size", low=1, whole=True)
        _check(self, "lr", open_low=True)
        _check(self, "momentum", high=1, open_high=True)
        _check(self, "label_smoothing", high=1, open_high=True)
        _check(self, "weight_decay")
        _check(self, "warm_up", high=1)
        _check_switch(self, "nesterov")
        _check_milestones(self)
        if self.nesterov and not self.momentum:
            raise UserError("`nesterov=True` needs `momentum` above 0: take 0.9, or leave it out")


RETRAIN_RECIPES = ("both", "literature", "fast")
FAST_RETRAINING = TrainingRecipe(
    epochs=30, lr=0.2, milestones=(), warm_up=0.25, nesterov=True, label_smoothing=0.1
)
# On 900 digits accuracy no longer rises after about 100 epochs.
_EPOCHS = {"digits": 100}
# The shortest that reach the literature recipe's test accuracy: measured on digits, seeds 10 to 13; elsewhere
# a guess from published one-cycle trainings of ResNet-18 (Smith and Topin 2018, arXiv 1708.07120).
_FAST_EPOCHS = {"digits": 15}


def training_recipe(dataset: str, epochs: int | None = None) -> TrainingRecipe:
    """The recipe for `dataset`, for the original and for retraining; `epochs` overrides its length."""
    recipe = TrainingRecipe()
    return replace(recipe, epochs=epochs or _EPOCHS.get(dataset, recipe.epochs))


def fast_recipe(dataset: str, epochs: int | None = None) -> TrainingRecipe:
    """The fast recipe for retraining on `dataset`.

    epochs: those of the literature's recipe where these were overridden; the fast one then takes the
    same share of them as usual.
    """
    usual = training_recipe(dataset).epochs
    length = _FAST_EPOCHS.get(dataset, FAST_RETRAINING.epochs)
    if epochs is not None:
        length = max(1, round(epochs * length / usual))
    return replace(FAST_RETRAINING, epochs=length)


@dataclass(frozen=True)
class PruneConfig:
    """Pruning of the original, and of what is retrained beside it. Defaults as Jia et al. 2023."""

    method: str  # a pruner's name
    sparsity: float = 0.95  # share of the convolutions' weights that is masked, over all layers together
    rewind: float = 8 / 182  # share of the training after which omp and imp take up the weights again
    rate: float = 0.2  # share of the weights left that a round of imp masks
    iterations: int = 100  # of synflow (Tanaka et al. 2020, section 6)

    def __post_init__(self) -> None:
        _check(self, "sparsity", "rewind", high=1, open_high=True)
        _check(self, "rate", high=1, open_low=True, open_high=True)
        _check(self, "iterations", low=1, whole=True)


# What the attacker sees of a sample's gradient: nothing, or its norm with respect to the classifier layer,
# the input, or all parameters.
SENSITIVITIES = ("none", "classifier", "input", "full")


# Passes that a game makes over a retain set, and over a forget set that is spread over classes, at least, and
# the images of a batch by which it does so, at most.
_RETAIN_PASSES, _FORGET_PASSES, _LARGEST_BATCH = 2, 10, 256


@dataclass(frozen=True)
class DauConfig:
    """The game. Chosen on CIFAR-10 (JPEG) at 16x16, seeds 500 to 505; measured on seeds from 100 on."""

    label_conditioned: bool  # the attacker sees the true label and its margin, or the others without it
    alpha: float  # weight of the attacker's verdict, times how much it counts: the square of the original's
    # exposure, or of how sure so many images are
    turns: int  # steps of the defender, over which lr falls to 0
    batch_size: int = 64  # images of each of retain, forget and validation set
    departure: float = 0.0  # weight of the divergence of forget images from what a model that never saw them
    # would say; where they are spread over classes, times how much the verdict counts
    plain_share: float = 0.5  # of a plain model of the retain set in saying what they are taken for, 0 to 1;
    # the rest is the original's
    anchor: float = 1.0  # weight of the divergence from the original on the retain set, and on images of
    # earlier requests
    half_sure: float = 1000.0  # images of the smaller of forget and validation set by which a verdict is half
    # sure, however little is exposed
    anchor_logits: float = 0.01  # of the anchor, the squared distance of the logits on the retain set, as far
    # as the verdict counts for more than the exposure says
    retain_sample: float | None = None  # times as many retain images as forget images are played with,
    # drawn once: the cost then follows the forget set and not the data set; None for all of them
    sensitivity: str = "none"  # one of SENSITIVITIES: what else the attacker sees
    features: bool = False  # whether it sees the defender's features
    difficulty: bool = True  # whether it sees how hard an image is for a plain model of the retain set
    wrong_labels: float | None = None  # share of the forget set whose labels are wrong, which validation is
    # shown with too; None: estimated from difficulties
    pull: float = 1.0  # largest norm of the attacker's gradient at the logits of one image, where that of
    # cross-entropy is below 1.42; 0 for no limit
    beta: float = 0.0  # weight of the Barlow Twins term between images of one class
    lambd: float = 5e-3  # its off-diagonal weight (Zbontar et al. 2021, section 3)
    lr: float = 0.02  # defender; by default scaled to what normalises the network, see `choose` of the method
    momentum: float = 0.9
    weight_decay: float = 5e-4
    settled: float = 0.0  # share of the turns, the last ones, in which BatchNorm normalises by statistics of
    # the retain set, as afterwards
    attacker_hidden: int = 64  # units a layer
    attacker_lr: float = 1e-2  # Adam
    warmup_steps: int = 100  # attacker steps on the frozen original
    attacker_steps: int = 3  # for each defender step
    looks: int = 4  # how often the referee looks between start and end
    look_images: int = 1000  # of each set that it looks at, at most
    norm_images: int = 10_000  # of the retain set that BatchNorm's statistics are taken of, at most
    exam_share: float = 0.0  # part of forget and validation that the attacker never trains on; 0: its AUC is
    # that on images it learns from

    def __post_init__(self) -> None:
        _check_switch(self, "label_conditioned")
        _check_switch(self, "difficulty")
        _check_switch(self, "features")
        _check(self, "batch_size", "norm_images", low=2, whole=True)
        _check(self, "turns", "attacker_hidden", "looks", "look_images", low=1, whole=True)
        _check(self, "warmup_steps", "attacker_steps", whole=True)
        _check(self, "retain_sample", "lr", "attacker_lr", "half_sure", open_low=True)
        _check(self, "alpha", "anchor", "anchor_logits", "departure", "beta", "lambd", "weight_decay")
        _check(self, "pull")
        _check(self, "momentum", "exam_share", "settled", high=1, open_high=True)
        _check(self, "wrong_labels", "plain_share", high=1)
        check_choice("sensitivity", self.sensitivity, SENSITIVITIES)

    @property
    def asks_plain(self) -> bool:
        """Whether a plain model of the retain set is fitted."""
        return self.difficulty or self.departure > 0 < self.plain_share

    @classmethod
    def default(
        cls,
        *,
        classwise: bool,
        retain_images: int,
        forget_images: int,
        retain_sample: float | None = None,
    ) -> DauConfig:
        """The settings for forgetting whole classes, or images spread over classes.

        The number of steps counts, and not how often each image is seen: six passes over a small retain
        set, or twelve over a forget set that is large beside it, a part of one over large sets. These are
        played with larger batches, as small ones lose more of the retain set than is won back. Where whole
        classes are forgotten, validation has none of their images; the label is then left out of what the
        attacker compares, and features stand in for it.
        """
        played_with = sample_size(retain_images, forget_images, retain_sample)
        turns = min(320, max(128, round(6 * max(played_with, 2 * forget_images) / 64)))
        passed = max(_RETAIN_PASSES * played_with, 0 if classwise else _FORGET_PASSES * forget_images)
        batch_size = 64 if played_with >= 2000 else 32
        # Not beyond the forget set: filled up with other images, a batch would say less of it.
        while batch_size * turns < passed and 2 * batch_size <= min(forget_images, _LARGEST_BATCH):
            batch_size *= 2
        # Few images are forgotten with less: what large sets need costs a model more than they are worth.
        few = not classwise and forget_images < batch_size
        alpha = 0.2 if classwise else 4.0 if few else 10.0
        return cls(
            not classwise, alpha, turns, batch_size, departure=0.0 if few else 1.0,
            retain_sample=retain_sample, features=classwise, difficulty=not classwise,
            settled=0.5 if classwise else 0.0,
        )  # fmt: skip


def sample_size(retain_images: int, forget_images: int, retain_sample: float | None) -> int:
    """How many retain images the game plays with, at least one."""
    if retain_sample is None:
        return retain_images
    # What is no number is refused where it becomes a setting.
    return round(min(retain_images, max(1, retain_sample * forget_images)))


# The rivals' recipes are those of Jia et al. 2023's reference implementation.
FINE_TUNE = TrainingRecipe(epochs=10, lr=0.01, milestones=())
GRADIENT_ASCENT_RANDOM = TrainingRecipe(epochs=5, lr=1e-3, milestones=())
GRADIENT_ASCENT_CLASSWISE = TrainingRecipe(epochs=5, lr=1e-4, milestones=())


@dataclass(frozen=True)
class UnlearningRecipe:
    """SGD from the original's weights on. Defaults: Jia et al. 2023's reference implementation."""

    epochs: int = 10  # passes over what is trained on
    batch_size: int = 256  # images of each set in a batch
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = ()  # shares of the steps after which lr is divided by 10

    def __post_init__(self) -> None:
        _check(self, "epochs", "batch_size", low=1, whole=True)
        _check(self, "lr", open_low=True)
        _check(self, "momentum", high=1, open_high=True)
        _check(self, "weight_decay")
        _check_milestones(self)

    def check(self, *names: str, **limits: Any) -> None:
        """For those that add fields: UserError unless the fields of `names` are numbers within `limits`.

        limits: low (0), high, and whole, open_low, open_high, whether only whole numbers and which border
        is refused.
        """
        _check(self, *names, **limits)

    def check_switch(self, name: str) -> None:
        """UserError unless field `name` is True or False."""
        _check_switch(self, name)


@dataclass(frozen=True)
class SplitConfig:
    """Shares held out per class."""

    validation_share: float = 0.1  # of the training part: 45,000 + 5,000 on CIFAR
    test_share: float = 0.3  # where the data set has no official test part

    def __post_init__(self) -> None:
        _check(self, "validation_share", "test_share", high=1, open_low=True, open_high=True)


def split_config(dataset: str) -> SplitConfig:
    """Digits holds out more for validation: 10 % would leave 18 images a class."""
    return SplitConfig(validation_share=0.2) if dataset == "digits" else SplitConfig()


@dataclass(frozen=True)
class AuditConfig:
    """What audits look at, and how closely."""

    most_images: int = 10_000  # of each set that are looked at, drawn once where it has more
    rmia_gamma: float = 1.0  # how much likelier than a population image (Zarifzadeh et al. 2024: the tool's)
    rmia_offline: float = 0.3  # a of its offline prior, 0 to 1 (the same: for CIFAR-10)
    histogram_from: int = 50  # models of each kind from which on KLoM is published's histogram; ours
    head_share: float = 0.02  # of the training images, per class, that a new head sees (Jeon et al. 2024)
    relearning_lr: float = 0.01  # SGD with momentum 0.9; ours
    relearning_steps: int = 200  # after which the search for the forget accuracy is given up; ours
    radius: float = 0.03  # of changes to an image, in pixels of the range 0 to 1 (Hsu et al. 2025)
    noisy_copies: int = 20  # of each forget image; 100 in Hsu et al. 2025
    search_steps: int = 5  # for an image in the ball that is recognised; ours

    def __post_init__(self) -> None:
        _check(self, "most_images", "histogram_from", low=2, whole=True)
        _check(self, "relearning_steps", "noisy_copies", "search_steps", low=1, whole=True)
        _check(self, "rmia_gamma", "relearning_lr", "radius", open_low=True)
        _check(self, "rmia_offline", high=1)
        _check(self, "head_share", high=1, open_low=True, open_high=True)
