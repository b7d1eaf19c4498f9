"""What a checkpoint of ours says of how it came about, and whether that fits another one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dau_fast.data.split import FORGOTTEN, Split, decode_roles, encode_roles, mark_forgotten
from dau_fast.errors import UserError
from dau_fast.methods.registry import find_methods
from dau_fast.methods.task import Task

# Of validation images that a run drew from what a stranger's model may have been trained on.
DRAWN = "drawn"
_AGAIN = "give `forget` and `seed` as in the run that made it"


def describe_origin(
    dataset: str, arch: str, method: str, roles: np.ndarray, task: Task, *, guessed: bool = False
) -> dict[str, str]:
    """The metadata of a model that `method` made of a run's `task`; roles int8 [N], of its original.

    "original" is no method and forgets nothing. What others forget has that role in their files, for good:
    whoever takes one of them for an original can train on none of it. guessed: see Experiment.
    """
    images, split = task.images, task.split
    constants = {"mean": images.mean.tolist(), "std": images.std.tolist()}
    kept = {"dataset": dataset, "arch": arch, "method": method, "normalisation": json.dumps(constants)}
    kept |= {"validation": DRAWN} if guessed else {}
    if method == "original":
        return {**kept, "split": encode_roles(roles)}
    return {**kept, "split": encode_roles(mark_forgotten(roles, split)), "forget": split.forget_sha256}


def check_unlearned(path: Path, metadata: Mapping[str, str], roles: np.ndarray, split: Split) -> None:
    """UserError where the model in `path` was made on another split, or to forget other images.

    Of what the file does not say, a warning.
    """
    if "split" not in metadata:
        logging.getLogger("dau_fast").warning(
            "%s does not say which images it was trained on: taking those of the original", path
        )
        return
    _check_split(path, metadata, roles)
    if metadata.get("forget", split.forget_sha256) != split.forget_sha256:
        raise UserError(f"checkpoint '{path}' was made to forget other images: {_AGAIN}")


def check_reference(path: Path, metadata: Mapping[str, str], roles: np.ndarray, split: Split) -> str:
    """The method that retrained the model in `path`.

    UserError where it may have seen the forget set, or was trained on another split.
    """
    method = metadata.get("method")
    row = find_methods().get(method or "")
    if method is not None and not (row and row.reference):
        raise UserError(
            f"reference '{path}' was trained on the forget set, as '{method}' is: take models that were "
            "retrained without it"
        )
    if method is None or "split" not in metadata or "forget" not in metadata:
        raise UserError(
            f"reference '{path}' does not say how it was trained: take a retrained model of this version, or "
            "have some trained by `train_references`"
        )
    _check_split(path, metadata, roles)
    if metadata["forget"] != split.forget_sha256:
        raise UserError(f"reference '{path}' was retrained without other images: {_AGAIN}")
    return method


def _check_split(path: Path, metadata: Mapping[str, str], roles: np.ndarray) -> None:
    found = decode_roles(metadata["split"], len(roles))
    # What this model forgot, whatever it is, the original knew: its hash is compared, which names it better.
    newly = (found == FORGOTTEN) & (roles != FORGOTTEN)
    if not np.array_equal(np.where(newly, roles, found), roles):
        raise UserError(
            f"checkpoint '{path}' was trained on another split than the original: all models of an audit "
            "need one training, validation and test set"
        )
