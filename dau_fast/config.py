"""Every setting of a run, with its unit and its source, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from dau_fast.errors import UserError

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
        fits = number and math.isfinite(value) and low <= value <= high
        if not fits or (open_low and value == low) or (open_high and value == high):
            kind = "a whole number" if whole else "a number"
            begin = f"{'above' if open_low else 'from'} {low:g}"
            end = "" if open_low else " up"
            if high < math.inf:
                end = f" to {'below ' if open_high else ''}{high:g}"
            raise UserError(f"`{name}={value}`: expected {kind} {begin}{end}")


# For settings that stand in their method's own file.
check_numbers = _check


def _check_switch(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not isinstance(value, bool):
        raise UserError(f"`{name}={value}`: expected True or False")


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
        if not isinstance(self.milestones, tuple) or not all(map(_is_share, self.milestones)):
            raise UserError(f"`milestones={self.milestones}`: expected shares of the steps, from 0 to 1")
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


@dataclass(frozen=True)
class DauConfig:
    """The game. Chosen on digits, on seeds 0 to 33; measured on seeds from 100 on."""

    label_conditioned: bool  # the attacker sees the sensitivity at the true label, or at the predicted one
    alpha: float  # weight of the attacker's verdict in the defender's loss
    game_epochs: float  # longest game, in passes over the retain set
    batch_size: int  # images of each of retain, forget and validation set
    recovery_epochs: float = 4  # passes over the retain set after the game, without the attacker
    retain_sample: float | None = None  # times as many retain images as forget images are played with,
    # drawn once: the cost then follows the forget set and not the data set; None for all of them
    sensitivity: str = "classifier"  # what the attacker sees of a sample's gradient: see dau/view.py
    beta: float = 1e-3  # weight of the Barlow Twins term
    lambd: float = 5e-3  # its off-diagonal weight (Zbontar et al. 2021, section 3)
    lr: float = 0.03  # defender, during the game
    recovery_lr: float = 0.1  # defender, decayed linearly to 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    attacker_hidden: int = 64  # units a layer
    attacker_lr: float = 1e-2  # Adam
    warmup_steps: int = 50  # attacker steps on the frozen original
    attacker_steps: int = 3  # for each defender step
    looks_per_epoch: int = 3  # how often the referee looks at both sets
    exam_share: float = 0.25  # part of forget and validation that the attacker never trains on

    def __post_init__(self) -> None:
        _check_switch(self, "label_conditioned")
        _check(self, "batch_size", low=2, whole=True)
        _check(self, "attacker_hidden", "looks_per_epoch", low=1, whole=True)
        _check(self, "warmup_steps", "attacker_steps", whole=True)
        _check(self, "game_epochs", "recovery_epochs", "retain_sample", open_low=True)
        _check(self, "lr", "recovery_lr", "attacker_lr", open_low=True)
        _check(self, "alpha", "beta", "lambd", "weight_decay")
        _check(self, "momentum", "exam_share", high=1, open_high=True)

    @classmethod
    def default(
        cls,
        *,
        classwise: bool,
        retain_images: int,
        pruned: bool = False,
        forget_images: int = 0,
        retain_sample: float | None = None,
    ) -> DauConfig:
        """The settings for forgetting whole classes, or images spread over classes.

        With the true label in sight class-wise forgetting fails: the attacker learns that high loss
        means forget, and the defender answers by becoming more certain of the forgotten label.
        The batch is the power of two that leaves about 12 steps a pass, from 32 to 256: on digits
        larger batches recover worse, on more images smaller ones only cost time.
        A pruned model needs a stronger push to forget images that are spread over classes. Where it forgets
        a whole class, it loses more of the others on the way: smaller steps and a longer recovery.
        A sample of the retain set stands for images that are not seen again, and that large steps would lose.
        """
        alpha, conditioned = 1.0 if pruned else 0.5, not classwise
        shared = cls(conditioned, alpha, 1, 256, retain_sample=retain_sample)
        played_with = sample_size(retain_images, forget_images, shared.retain_sample)
        sampled = played_with < retain_images
        batch_size = min(256, max(32, 1 << max(1, played_with // 12).bit_length() - 1))
        shared = replace(shared, batch_size=batch_size)
        if not classwise:
            return replace(shared, lr=0.01, recovery_lr=0.01) if sampled else shared
        shared = replace(shared, alpha=1.0, game_epochs=2, recovery_epochs=3)
        if pruned:
            shared = replace(shared, lr=0.01, recovery_epochs=5)
        # Chosen on digits and on CIFAR-10 at 8x8, both on seeds 10 and 11.
        return replace(shared, lr=0.003, recovery_lr=0.003) if sampled else shared


def sample_size(retain_images: int, forget_images: int, retain_sample: float | None) -> int:
    """How many retain images the game plays with, at least one."""
    if retain_sample is None:
        return retain_images
    return min(retain_images, max(1, round(retain_sample * forget_images)))


# The rivals' recipes are those of Jia et al. 2023's reference implementation.
FINE_TUNE = TrainingRecipe(epochs=10, lr=0.01, milestones=())
GRADIENT_ASCENT_RANDOM = TrainingRecipe(epochs=5, lr=1e-3, milestones=())
GRADIENT_ASCENT_CLASSWISE = TrainingRecipe(epochs=5, lr=1e-4, milestones=())


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
