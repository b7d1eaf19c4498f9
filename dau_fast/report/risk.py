"""Which forgotten images the unlearned model still knows best: furthest above a retrained one by margin."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dau_fast.data.images import Images
from dau_fast.data.split import Split
from dau_fast.job.experiment import SeedResult
from dau_fast.methods.registry import find_methods
from dau_fast.metrics.unlearning import Measures, avg_gap

# How many images are listed, and the pixels of their longer side where they are shown.
_LISTED, _PIXELS = 12, 64


def describe_at_risk(result: SeedResult, *, thumbnails: bool = False) -> dict[str, Any] | None:
    """The images at risk in the model closest to the retrained one; None where no method unlearned.

    margins in nats, of the model and of the retrained one. thumbnails: with pictures, PNG as data URIs, where
    the data are images in memory of 1 or 3 channels. They are copies of what is to be forgotten.
    """
    measures, split, images = result.outcome.measures, result.split, result.outcome.task.images
    method = _find_closest(measures)
    if method is None:
        return None
    listed = list_at_risk(measures[method], measures.get("retrain"), split, name_forgotten(images, split))
    if thumbnails and _are_pictures(images):
        for entry in listed:
            entry["thumbnail"] = _draw(images.pixels[entry["index"]])
    return {"method": method, "images": listed} if listed else None


def name_forgotten(images: Images, split: Split) -> list[str]:
    """The class of every image of the forget set; empty where classes have no names."""
    if not images.class_names:
        return []
    return [images.class_names[label] for label in images.labels[split.forget].tolist()]


def list_at_risk(
    measured: Measures, reference: Measures | None, split: Split, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """The images of the forget set at risk, the surest first. classes: the names of each one's class."""
    if measured.forget_margins is None:
        return []
    mine, retrained = np.array(measured.forget_margins), None
    if reference is not None:
        retrained = np.array(reference.forget_margins)
    order = np.argsort(-(mine if retrained is None else mine - retrained), kind="stable")[:_LISTED]
    return [
        {
            "index": int(split.forget[place]),
            "margin": float(mine[place]),
            "retrained": None if retrained is None else float(retrained[place]),
            "label": classes[place] if classes else None,
        }
        for place in order.tolist()
    ]


def _find_closest(measures: dict[str, Measures]) -> str | None:
    """The method closest to the retrained model, the first where there is none; no reference or control."""
    rows = find_methods()
    names = [
        name for name in measures if name in rows and not rows[name].reference and not rows[name].control
    ]
    if "retrain" in measures:
        names.sort(key=lambda name: avg_gap(measures[name], measures["retrain"]))
    return next(iter(names), None)


def _are_pictures(images: Images) -> bool:
    pixels = getattr(images, "pixels", None)
    return isinstance(pixels, Tensor) and not images.ready and images.shape[0] in (1, 3)


def _draw(pixels: Tensor) -> str:
    """uint8 [channels, H, W] as a data URI of a PNG whose longer side has 64 pixels at most."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).cpu().numpy())
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
