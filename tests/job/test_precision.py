"""Batches in the dtype that autocast rounds them to: the same outputs, and full precision where it counts."""

from __future__ import annotations

import pytest
import torch

from dau_fast.data.images import Images
from dau_fast.engine.runtime import Runtime
from dau_fast.job.assembly import match_precision
from dau_fast.methods.adversarial import Units
from dau_fast.models import Classifier, SmallResNet
from dau_fast.ops import input_grad_norms

CPU, HALF = torch.device("cpu"), torch.bfloat16


def some_images() -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    return Images(pixels, torch.arange(20) % 4, tuple("abcd"), None, mean, std)


@pytest.mark.parametrize(
    ("precision", "narrow", "dtype"),
    [
        (HALF, True, HALF),
        (HALF, False, torch.float32),
        (None, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_batches_have_the_dtype_that_networks_take(
    precision: torch.dtype | None, narrow: bool, dtype: torch.dtype
) -> None:
    images = match_precision(some_images(), Runtime(precision=precision), narrow=narrow)
    assert images.batch(torch.arange(3)).dtype == dtype


def test_under_autocast_narrow_batches_change_no_bit_of_the_outputs() -> None:
    torch.manual_seed(0)
    model, index = Classifier(SmallResNet(3, 4), precision=HALF).eval(), torch.arange(20)
    wide = some_images()
    narrow = match_precision(wide, Runtime(precision=HALF), narrow=True)
    with torch.no_grad():
        for one, other in zip(model(wide.batch(index)), model(narrow.batch(index)), strict=True):
            assert torch.equal(one, other)


def test_what_changes_images_a_little_has_them_in_full() -> None:
    narrow = match_precision(some_images(), Runtime(precision=HALF), narrow=True)
    index = torch.arange(20)
    assert torch.equal(narrow.widened().batch(index), some_images().batch(index))
    assert Units.of(narrow).scale.dtype == torch.float32
    double = match_precision(some_images(), Runtime(precision=torch.float64))
    assert double.widened() is not None
    assert double.widened().batch(index).dtype == torch.float64


def test_norms_of_input_gradients_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).to(HALF)
    x, y = torch.randn(5, 3, 2, 2).to(HALF), torch.arange(5) % 3
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    found = input_grad_norms(model, x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, leaf.grad.float().flatten(1).norm(dim=1))
