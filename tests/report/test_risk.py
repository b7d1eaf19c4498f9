"""Images most at risk: the right ones, and pictures of them only where they are asked for."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from reports import Page, full

from dau_fast.data.images import Images
from dau_fast.metrics.unlearning import Measures
from dau_fast.report.page import render
from dau_fast.report.risk import describe_at_risk


def measures(margins: list[float], ua: float) -> Measures:
    return Measures(ua, 100.0, 90.0, {"confidence": ua}, {}, forget_margins=tuple(margins))


def result(pixels: torch.Tensor, margins: dict[str, Measures]) -> Any:
    images = Images(pixels, torch.zeros(len(pixels), dtype=torch.long), ("cat",))
    count = len(next(iter(margins.values())).forget_margins or ())
    outcome = SimpleNamespace(measures=margins, task=SimpleNamespace(images=images))
    return SimpleNamespace(outcome=outcome, split=SimpleNamespace(forget=torch.arange(10, 10 + count)))


def found(pixels: torch.Tensor, *, count: int = 20, thumbnails: bool = False) -> Any:
    """20 images, of which the last is furthest above the retrained in DAU."""
    rising = [float(i) for i in range(count)]
    kinds = {"original": (99.0, 0.0), "retrain": (5.0, 5.0), "dau": (0.0, 5.0), "ft": (50.0, 1.0)}
    made = {
        name: measures(rising if name == "dau" else [level] * count, ua)
        for name, (level, ua) in kinds.items()
    }
    return describe_at_risk(result(pixels, made), thumbnails=thumbnails)


GREY = torch.randint(256, (40, 1, 100, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_those_furthest_above_the_retrained_are_listed() -> None:
    at_risk = found(GREY)
    assert at_risk["method"] == "dau"
    assert [entry["index"] for entry in at_risk["images"]] == list(range(29, 17, -1))
    assert at_risk["images"][0] == {"index": 29, "margin": 19.0, "retrained": 5.0, "label": "cat"}


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_small_pngs(channels: int) -> None:
    entries = found(GREY.expand(-1, channels, -1, -1), thumbnails=True)["images"]
    assert len(entries) == 12
    for entry in entries:
        kind, content = entry["thumbnail"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (32, 64)


def test_what_is_no_image_has_no_picture() -> None:
    for pixels in (torch.rand(40, 7), torch.zeros(40, 2, 8, 8, dtype=torch.uint8)):
        assert "thumbnail" not in found(pixels, thumbnails=True)["images"][0]


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize("thumbnails", [False, True])
def test_the_page_lists_them(thumbnails: bool) -> None:
    report = full()
    report["at_risk"] = found(GREY, thumbnails=thumbnails)
    html = render(report)
    rows = [row for row in Page(html).rows if row[0] == "29"]
    assert rows == [["29", *[""] * thumbnails, "cat", "19.0", "5.0"]]
    assert html.count("<img ") == 12 * thumbnails
    assert html.count('alt="image ') == 12 * thumbnails
    assert ("copies of what is to be forgotten: delete" in html) == thumbnails


@pytest.mark.usefixtures("words_only")
def test_a_picture_from_elsewhere_is_not_shown() -> None:
    report = full()
    report["at_risk"] = found(GREY)
    report["at_risk"]["images"][0]["thumbnail"] = "http://example.org/a.png"
    assert "example.org" not in render(report)
