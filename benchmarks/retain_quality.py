"""Whether a sampled retain set costs quality: one forget set, a retain set, and one 10 times as large.

Each is compared with models retrained on its own sets, and with how far two of these lie apart.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from dau_fast import data
from dau_fast.config import DauConfig, SplitConfig, fast_recipe
from dau_fast.engine.runtime import choose_precision, warm_up
from dau_fast.experiment import Experiment, builder, run_seed
from dau_fast.images import Images
from dau_fast.split import TRAINING, VALIDATION, Forget
from dau_fast.task import silent

# Images: forgotten, held out, tested on, and the small retain set; retain images for each forgotten one.
FORGET, VALIDATION_IMAGES, TEST, RETAIN, TIMES, SAMPLE = 200, 600, 1500, 1800, 10, 9.0
EPOCHS = 12


def measure(folder: Path, image_size: int, seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """Mean measures over seeds from 100 on, with the small and the large retain set."""
    shrunk = 20 if smoke else 1
    forget, validation, test, retain = (n // shrunk for n in (FORGET, VALIDATION_IMAGES, TEST, RETAIN))
    needed = forget + validation + TIMES * retain
    device = torch.device("cpu")
    warm_up(device)
    with _some_of(folder, needed, test) as part:
        images = data.load("folder", part, image_size=image_size)
    return [
        {"retain_images": count}
        | _means([_seed(images, seed, forget, validation, count, 1 if smoke else EPOCHS) for seed in range(100, 100 + seeds)])
        for count in (retain, TIMES * retain)
    ]  # fmt: skip


def _seed(images: Images, seed: int, forget: int, validation: int, retain: int, epochs: int) -> dict[str, float]:
    recipe = fast_recipe("cifar10", epochs * 6)
    known = np.setdiff1d(np.arange(len(images.labels)), images.test.numpy())
    order = np.random.default_rng(seed).permutation(known)
    chosen = order[: forget + validation + retain]
    forgotten, held, kept = np.split(chosen, [forget, forget + validation])
    # Only these images exist for the run; the forget and validation sets are the same for both retain sets.
    index = np.concatenate([forgotten, kept, held, images.test.numpy()])
    few = _subset(images, torch.from_numpy(index), test=len(images.test))
    roles = np.full(len(index), TRAINING, np.int8)
    raise NotImplementedError


def _subset(images: Images, index: torch.Tensor, test: int) -> Images:
    raise NotImplementedError
