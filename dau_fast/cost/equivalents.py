"""The game beside retraining and the other methods, in image equivalents: no clock, passes alone.

One equivalent is an image forward and backward, the unit of training; an image forward costs a third of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.cost.passes import FORWARDS_A_STEP, Passes, count_passes
from dau_fast.cost.rivals import Sizes, count_rival
from dau_fast.engine.batches import steps_for


@dataclass(frozen=True)
class Equivalents:
    """What a run's methods cost, on all processes together.

    game: one, to its last turn. retraining: image equivalents, by method. step_images: images of the
    largest step, by method, whose activations are held at once unless steps are taken in parts. others: the
    equivalents of methods beside these, by name.
    """

    game: Passes
    retraining: Mapping[str, int]
    step_images: Mapping[str, int]
    others: Mapping[str, float] = field(default_factory=dict)

    def list_totals(self) -> dict[str, float]:
        """Image equivalents by method, the game's as "dau"."""
        return {"dau": self.game.equivalents, **self.retraining, **self.others}

    def describe(self) -> str:
        """All of it in one line."""
        game = self.game
        forward = {"original": game.teaching + game.departing, "looks": game.looks + game.levelling}
        forward |= {"lesson": game.lesson, "BatchNorm": game.batchnorm}
        parts = {"turns": game.turns} | {name: n / FORWARDS_A_STEP for name, n in forward.items()}
        within = ", ".join(f"{name} {count:,.0f}" for name, count in parts.items())
        costs = [f"dau {game.equivalents:,.0f} ({within})"]
        costs += [f"{name} {count:,}" for name, count in self.retraining.items()]
        costs += [f"{name} {count:,.0f}" for name, count in self.others.items()]
        steps = ", ".join(f"{name} {count:,}" for name, count in self.step_images.items())
        line = f"image equivalents: {', '.join(costs)}; images of a step: {steps}"
        if not self.retraining:
            return line
        faster = " and ".join(
            f"{count / game.equivalents:.1f} times as fast as {name}"
            for name, count in self.retraining.items()
        )
        return f"{line}; by passes alone, a game is at most {faster}"


def count_equivalents(
    config: DauConfig,
    recipes: Mapping[str, TrainingRecipe],
    *,
    forget: int,
    retain: int,
    validation: int,
    classes: int,
    features: int,
    batchnorm: bool,
    earlier: int = 0,
    classwise: bool = False,
    pictures: bool = True,
    others: Mapping[str, Any] | None = None,
) -> Equivalents:
    """For a game by `config` and retraining by `recipes`, by method, on sets of as many images.

    features: of an image, that the last layer takes. batchnorm: whether the network has any. earlier: images
    of requests before this one. classwise: whether whole classes are forgotten. pictures: whether inputs are
    such. others: settings of methods beside these, by name; those that `count_rival` does not know are left
    out.
    """
    game = count_passes(
        config, forget=forget, retain=retain, validation=validation, classes=classes, features=features,
        batchnorm=batchnorm, earlier=earlier, classwise=classwise, pictures=pictures,
    )  # fmt: skip
    retraining = {
        name: steps_for(recipe.epochs, retain, recipe.batch_size) * recipe.batch_size
        for name, recipe in recipes.items()
    }
    steps = {name: recipe.batch_size for name, recipe in recipes.items()}
    sizes = Sizes(forget, retain, validation, classwise)
    found = {name: count_rival(name, settings, sizes) for name, settings in (others or {}).items()}
    known = {name: count for name, count in found.items() if count is not None}
    return Equivalents(game, retraining, {"dau": 3 * config.batch_size, **steps}, known)
