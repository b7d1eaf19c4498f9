"""How long a game lasts and how much it looks at, by its settings and the sizes of the sets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dau_fast.config import DauConfig, sample_size

# Numbers that the attacker's warm-up holds of either set, half a GB in float32; of larger sets a sample.
_LESSON_NUMBERS = 2**27


@dataclass(frozen=True)
class Schedule:
    """retain_images: those played with. turns: of the game. settled_turns: of these, the last ones, in which
    BatchNorm's statistics are at rest. look_every: turns between looks.

    look_images: of each of retain, forget and validation that are looked at, at most. norm_images: of retain
    that BatchNorm's statistics are taken of. lesson_images: of forget and validation each that the attacker
    warms up on, at most.
    """

    retain_images: int
    turns: int
    settled_turns: int
    look_every: int
    look_images: int
    norm_images: int
    lesson_images: int

    @classmethod
    def plan(cls, config: DauConfig, *, retain: int, forget: int, columns: int) -> Schedule:
        """For sets of `retain` and `forget` images, of which the attacker sees as many `columns` each."""
        count = sample_size(retain, forget, config.retain_sample)
        return cls(
            retain_images=count,
            turns=config.turns,
            settled_turns=min(config.turns - 1, round(config.settled * config.turns)),
            look_every=math.ceil(config.turns / config.looks),
            look_images=config.look_images,
            norm_images=min(count, config.norm_images),
            # Of each image the warm-up holds u, and four hidden layers.
            lesson_images=max(1, _LESSON_NUMBERS // (columns + 4 * config.attacker_hidden)),
        )

    @property
    def looks(self) -> int:
        """Of the referee in a whole game; the first is at the original, the last at the finished model."""
        return 2 + (self.turns - 1) // self.look_every
