"""Which images the forget part of a batch is drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from dau_fast.data.split import Split, draw_sample


def choose_rows(split: Split, batch_size: int, generator: torch.Generator) -> Tensor:
    """int64 [N]: the forget set and images that stand beside it, enough for a batch where there are as many.

    Images of earlier requests stand beside it, as training on all others brings them back; where they are
    many, each forget image is there more than once, so that about half of a batch is of the forget set, or
    each of its images in about every batch. A set smaller than a batch is filled up with retain images:
    copies of few images would bend its statistics.
    """
    forget, earlier = split.forget, split.earlier
    copies = max(1, len(earlier) // max(len(forget), batch_size))
    rows = torch.cat([forget.repeat(copies), earlier])
    missing = max(0, batch_size - len(rows))
    return torch.cat([rows, draw_sample(split.retain, missing, generator)]) if missing else rows
