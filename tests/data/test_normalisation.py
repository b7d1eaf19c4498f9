"""Constants that images are normalised by: numbers, and names for usual ones."""

from __future__ import annotations

import pytest

from dau_fast.data.normalisation import NORMALISATIONS, parse_normalisation
from dau_fast.errors import UserError


def test_a_name_as_mean_stands_for_both() -> None:
    """ImageNet's are those that torchvision's and timm's weights were trained with."""
    assert parse_normalisation("imagenet", None, 3) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert parse_normalisation("half", None, 3) == ([0.5] * 3, [0.5] * 3)
    assert parse_normalisation("none", None, 1) == ([0.0], [1.0])
    for name in NORMALISATIONS:
        assert parse_normalisation(name, None, 3) == parse_normalisation(name, name, 3)


def test_timm_has_the_same_constants() -> None:
    constants = pytest.importorskip("timm.data.constants")
    for name, theirs in (
        ("imagenet", "IMAGENET_DEFAULT"),
        ("clip", "OPENAI_CLIP"),
        ("half", "IMAGENET_INCEPTION"),
    ):
        expected = [list(getattr(constants, f"{theirs}_{kind}")) for kind in ("MEAN", "STD")]
        assert list(parse_normalisation(name, None, 3) or ()) == expected


def test_numbers_are_one_for_all_channels_or_one_a_channel() -> None:
    assert parse_normalisation("0.2", "0.5", 3) == ([0.2] * 3, [0.5] * 3)
    assert parse_normalisation("0.1,0.2,0.3", "imagenet", 3) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert parse_normalisation(None, None, 3) is None
    with pytest.raises(
        UserError, match=r"`mean=0.1,0.2` has 2 numbers for images of 3 channels: expected 1 or 3"
    ):
        parse_normalisation("0.1,0.2", "0.5", 3)
