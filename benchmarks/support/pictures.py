"""The pictures that tasks draw from, decoded once and kept as one array in the bank's folder."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from dau_fast.data import named
from dau_fast.data.images import Images
from dau_fast.errors import UserError
from support.bank import write_whole


def read_pictures(bank: Path, data: Path | None, image_size: int) -> Images:
    """All pictures below `data`, train/<class>/ and test/<class>/, at `image_size` pixels, not augmented.

    They are decoded once and kept in the folder `bank`, as long as no file below `data` comes, goes or
    changes its size. data: None for what `bank` keeps. Raises UserError where that is nothing or not one
    set, and as `dau_fast.data.named.load` does.
    """
    if data is None:
        kept = sorted(bank.glob(f"pictures-{image_size}-*.npz"))
        if len(kept) != 1:
            raise UserError(
                f"'{bank}' keeps {len(kept)} sets of pictures of {image_size} pixels: name with `data` "
                "a folder that holds train/ and test/"
            )
        return _load(kept[0])
    path = bank / f"pictures-{image_size}-{_fingerprint(data)}.npz"
    if path.is_file():
        try:
            return _load(path)
        except UserError as error:
            logging.getLogger("dau_fast").warning("%s: it is made again", error)
    images = named.load("folder", data, image_size=image_size, stream="off")
    write_whole(path, lambda place: _save(place, images))
    return _load(path)


def _fingerprint(data: Path) -> str:
    """Of the names and sizes of all files below `data`, 16 hexadecimal digits."""
    files = sorted(
        (os.path.relpath(os.path.join(folder, name), data), os.path.getsize(os.path.join(folder, name)))
        for folder, _, names in os.walk(data, followlinks=True)
        for name in names
    )
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _save(path: Path, images: Images) -> None:
    assert images.test is not None
    with path.open("wb") as file:
        np.savez(
            file,
            pixels=np.ascontiguousarray(images.pixels.numpy()),
            labels=images.labels.numpy(),
            test=images.test.numpy(),
            mean=images.mean.numpy(),
            std=images.std.numpy(),
            class_names=np.array(images.class_names),
        )


def _load(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels, test, mean, std = (
                torch.from_numpy(file[name]) for name in ("pixels", "labels", "test", "mean", "std")
            )
            class_names = tuple(map(str, file["class_names"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is damaged: remove it, and give `data` ({error})") from error
    return Images(pixels, labels, class_names, test, mean, std)
