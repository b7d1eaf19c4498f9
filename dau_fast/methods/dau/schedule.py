"""How long a game lasts: the counts that follow from its settings and from the sizes of the sets."""

from __future__ import annotations

from dataclasses import dataclass

from dau_fast.config import DauConfig, sample_size
from dau_fast.engine.batches import steps_for

# Numbers that the attacker's warm-up holds of either set, half a GB in float32; of larger sets a sample.
_LESSON_NUMBERS = 2**27


@dataclass(frozen=True)
class Schedule:
    """retain_images: those played with. turns: of the game, at most. look_every: turns between looks.

    recovery_steps: after the game. lesson_images: of either set that the attacker warms up on, at most.
    """

    retain_images: int
    turns: int
    look_every: int
    recovery_steps: int
    lesson_images: int

    @classmethod
    def plan(cls, config: DauConfig, *, retain: int, forget: int, classes: int) -> Schedule:
        """For sets of `retain` and `forget` images in `classes` classes."""
        count = sample_size(retain, forget, config.retain_sample)
        turns = steps_for(config.game_epochs, count, config.batch_size)
        return cls(
            retain_images=count,
            turns=turns,
            look_every=max(1, round(turns / (config.game_epochs * config.looks_per_epoch))),
            recovery_steps=steps_for(config.recovery_epochs, count, config.batch_size),
            # Of each image the warm-up holds u, and four hidden layers.
            lesson_images=max(1, _LESSON_NUMBERS // (classes + 1 + 4 * config.attacker_hidden)),
        )

    @property
    def looks(self) -> int:
        """Of the referee, where it never ends the game early; the first is at the original."""
        return 1 + self.turns // self.look_every
