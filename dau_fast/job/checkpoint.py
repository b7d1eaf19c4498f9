"""The checkpoint that a run starts from: its weights, what it was trained on, and how well it does here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dau_fast import checkpoints
from dau_fast.data.images import Images
from dau_fast.data.normalisation import Constants, describe_normalisation, normalise_by
from dau_fast.data.split import FORGOTTEN, TEST, TRAINING, decode_roles
from dau_fast.engine.evaluation import predict_each
from dau_fast.errors import UserError
from dau_fast.job.experiment import Checkpoint, Experiment
from dau_fast.job.provenance import DRAWN
from dau_fast.job.saving import hash_file
from dau_fast.metrics.accuracy import percent

# Images of each part that a given original is looked at on, before any work.
_LOOKED_AT = 2000


def start_from(experiment: Experiment, path: Path, *, normalised: bool) -> Experiment:
    """`experiment` with the model in `path` as its original, after a line that says how well it does.

    normalised: whether somebody asked for a normalisation, which then goes before that of the file. Raises
    UserError as `checkpoints.load` does.
    """
    model = experiment.fresh(experiment.seed)
    metadata = checkpoints.load(path, model.network)
    masks = checkpoints.load_masks(path)
    given = Checkpoint(
        model.eval(),
        _read_roles(path, metadata, len(experiment.images.labels)),
        masks and masks.to(model.head.weight.device),
        hash_file(path),
        guessed="split" not in metadata or metadata.get("validation") == DRAWN,
    )
    if not normalised and "normalisation" in metadata:
        images = normalise_by(experiment.images, _read_normalisation(path, metadata, experiment.images))
        experiment = replace(experiment, images=images, normalised_by="the checkpoint")
    experiment = replace(experiment, checkpoint=given)
    _tell(path, experiment)
    return experiment


def _read_roles(path: Path, metadata: Mapping[str, str], count: int) -> np.ndarray | None:
    """The role every image had, int8 [N], None where the file does not say it; a warning where it matters."""
    warn = logging.getLogger("dau_fast").warning
    if "split" not in metadata:
        warn(
            "%s does not say which images it was trained on: taking this run's training images; if it "
            "has seen the validation images too, the result is not to be trusted",
            path,
        )
        return None
    roles = decode_roles(metadata["split"], count)
    if "forget" in metadata and FORGOTTEN not in roles:
        warn(
            "%s was made to forget images that its file does not name: this run may train on them again; "
            "make it anew with this version",
            path,
        )
    return roles


def _read_normalisation(path: Path, metadata: Mapping[str, str], images: Images) -> Constants:
    try:
        found = json.loads(metadata["normalisation"])
        mean, std = ([float(value) for value in found[key]] for key in ("mean", "std"))
        if len(mean) == len(std) == len(images.mean) and all(0 < value < 1e3 for value in std):
            return mean, std
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"checkpoint '{path}' has a damaged record of its normalisation: give `mean` and `std`")


def _tell(path: Path, experiment: Experiment) -> None:
    """How often the original is right, which somebody who knows it can hold against what it should be."""
    labels, roles = experiment.images.labels, experiment.draw_roles(experiment.seed)
    parts = {"training": TRAINING, "test": TEST}
    found = []
    for name, role in parts.items():
        index = _thin_out(torch.from_numpy(np.flatnonzero(roles == role)).to(labels.device))
        if len(index):
            found.append((name, len(index), _measure(experiment, index)))
    if not experiment.runtime.ranks.first:
        return
    told = " and ".join(f"{rate:.1f} % of {count:,} {name} images" for name, count, rate in found)
    log = logging.getLogger("dau_fast")
    log.info("%s is right on %s, with %s", path, told, describe_normalisation(experiment.images))
    if any(name == "training" and rate < 50 for name, _, rate in found):
        log.warning(
            "%s is right on few of the images that it was trained on: is its normalisation (--mean, --std), "
            "and the order of its classes, that of this run?",
            path,
        )


def _thin_out(index: Tensor) -> Tensor:
    """At most so many of `index` [N], evenly over it."""
    return index[:: max(1, -(-len(index) // _LOOKED_AT))]


def _measure(experiment: Experiment, index: Tensor) -> float:
    labels = experiment.images.labels
    assert experiment.checkpoint is not None
    right = predict_each(
        experiment.checkpoint.model,
        experiment.images,
        index,
        lambda logits, batch: (logits.argmax(1) == labels[batch]).float(),
        ranks=experiment.runtime.ranks,
    )
    return percent(right)
