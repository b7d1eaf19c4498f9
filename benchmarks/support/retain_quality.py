"""Whether a sampled retain set costs quality: one forget set, a retain set, and one 10 times as large.

Each is compared with models retrained on its own sets, and with how far two of these lie apart.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dau_fast.config import FAST_RETRAINING, SplitConfig
from dau_fast.data import named as data
from dau_fast.data.images import Images
from dau_fast.data.split import Forget
from dau_fast.engine.device import warm_up
from dau_fast.engine.runtime import Runtime
from dau_fast.job.assembly import network_builder
from dau_fast.job.experiment import Experiment, run_seed
from dau_fast.methods.registry import get_method
from dau_fast.report.record import describe_seed

# Images: forgotten, held out, tested on, and the small retain set; retain images for each forgotten one.
FORGET, VALIDATION_IMAGES, TEST, RETAIN, TIMES, SAMPLE = 200, 600, 1500, 1800, 10, 9.0
EPOCHS, FIRST_SEED = 12, 100


def measure(folder: Path, image_size: int, seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """Means over seeds from 100 on, with the small retain set and the large one."""
    shrunk = 20 if smoke else 1
    forget, validation, test, retain = (n // shrunk for n in (FORGET, VALIDATION_IMAGES, TEST, RETAIN))
    warm_up(torch.device("cpu"))
    with _some_of(folder, {"train": forget + validation + TIMES * retain, "test": test}) as part:
        images = data.load("folder", part, image_size=image_size, stream="off")
    found = []
    for count in (retain, TIMES * retain):
        rows = [
            _seed(images, seed, forget, validation, count, 1 if smoke else EPOCHS)
            for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        ]
        found.append({"retain_images": count} | {key: mean(row[key] for row in rows) for key in rows[0]})
        print(found[-1], flush=True)
    return found


def _seed(
    images: Images, seed: int, forget: int, validation: int, retain: int, epochs: int
) -> dict[str, float]:
    """One seed on a part of the images; the forget set is the same whatever the retain set."""
    assert images.test is not None
    count = forget + retain + validation
    order = torch.randperm(int(images.test[0]), generator=torch.Generator().manual_seed(seed))
    index = torch.cat([order[:count], images.test])
    part = replace(
        images, pixels=images.pixels[index], labels=images.labels[index], test=torch.arange(count, len(index))
    )
    # By the fast recipe throughout: what is compared is one retain set with the other.
    recipe = replace(FAST_RETRAINING, epochs=epochs)
    experiment = Experiment(
        part, Forget("indices", indices=tuple(range(forget))),
        (get_method("retrain"), get_method("dau")), network_builder("small", part, Runtime()), recipe,
        {"dau": {"retain_sample": SAMPLE}}, seed, shares=SplitConfig(validation_share=validation / count),
    )  # fmt: skip
    result = run_seed(experiment, seed, twice=True)
    assert result.retraining_gap is not None
    entries = describe_seed(result)
    dau = entries["dau"]
    return {
        "avg_gap": dau["avg_gap"],
        "noise_floor": result.retraining_gap,
        "original": entries["original"]["avg_gap"],
        "seconds": dau["seconds"],
        "retraining_seconds": entries["retrain"]["seconds"],
    }


@contextmanager
def _some_of(folder: Path, counts: dict[str, int]) -> Iterator[Path]:
    """A folder of links to `counts` images of each part, as many of every class, so that no other is read."""
    with tempfile.TemporaryDirectory() as place:
        for part, count in counts.items():
            classes = sorted(path for path in (folder / part).iterdir() if path.is_dir())
            for kind in classes:
                target = Path(place) / part / kind.name
                target.mkdir(parents=True)
                for file in sorted(kind.iterdir())[: math.ceil(count / len(classes))]:
                    (target / file.name).symlink_to(file.resolve())
        yield Path(place)
