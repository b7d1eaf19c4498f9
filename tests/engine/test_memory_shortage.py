"""Memory that runs short: smaller batches, the same results, one line that says so."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from toys import TENTH, trained

from dau_fast.engine.evaluation import predict, predict_each
from dau_fast.engine.training import recompute_batchnorm
from dau_fast.errors import UserError
from dau_fast.methods import finetune
from dau_fast.models import Classifier


class Narrow(nn.Module):
    """Takes at most `most` images at a time, as a small GPU would."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} images")
        return self.layers(x)


IMAGES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
EVERY = torch.arange(50)


def pair(most: int) -> tuple[Classifier, Classifier]:
    """A model with room for all images, and its twin that takes `most` at a time."""
    torch.manual_seed(0)
    wide = Narrow(50)
    narrow = copy.deepcopy(wide)
    narrow.most = most
    return Classifier(wide).eval(), Classifier(narrow).eval()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]


@pytest.mark.parametrize("most", [49, 20, 3, 1])
def test_outputs_are_the_same(most: int, caplog: pytest.LogCaptureFixture) -> None:
    wide, narrow = pair(most)
    found, expected = (predict(m, IMAGES.__getitem__, EVERY, batch_size=32) for m in (narrow, wide))
    torch.testing.assert_close(found, expected)
    kept = predict_each(narrow, IMAGES.__getitem__, EVERY, lambda logits, _: logits.argmax(1))
    assert torch.equal(kept, expected.logits.argmax(1))
    said = warnings_of(caplog)
    assert all("memory is short in evaluation" in line for line in said)
    assert said if most < 32 else said[0].endswith("25 images are taken at a time from here on")


def test_where_memory_does_not_hold_one_image_the_pass_ends() -> None:
    with pytest.raises(UserError, match="does not hold a pass over 1 images"):
        predict(pair(0)[1], IMAGES.__getitem__, EVERY)


def test_statistics_are_those_of_smaller_batches(caplog: pytest.LogCaptureFixture) -> None:
    wide, narrow = pair(15)
    recompute_batchnorm(wide, IMAGES.__getitem__, EVERY, batch_size=13)
    recompute_batchnorm(narrow, IMAGES.__getitem__, EVERY, batch_size=50)
    assert len(warnings_of(caplog)) == 2  # 50 images, 25, and then 12
    again = pair(50)[0]
    recompute_batchnorm(again, IMAGES.__getitem__, EVERY, batch_size=12)
    torch.testing.assert_close(dict(narrow.named_buffers()), dict(again.named_buffers()), rtol=0, atol=0)
    assert not narrow.training


def test_where_memory_does_not_hold_two_images_the_statistics_stay() -> None:
    model = pair(1)[1]
    before = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(UserError, match="does not hold the pass for BatchNorm statistics"):
        recompute_batchnorm(model, IMAGES.__getitem__, EVERY)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_a_pass_that_cannot_be_read_leaves_statistics_momenta_and_mode() -> None:
    model = pair(50)[0].train()
    norm = model.network.layers[1]
    norm.momentum = 0.3
    before = copy.deepcopy(dict(model.named_buffers()))

    def load(index: Tensor) -> Tensor:
        if 20 in index:
            raise UserError("image 20 cannot be read")
        return IMAGES[index]

    with pytest.raises(UserError, match="image 20"):
        recompute_batchnorm(model, load, EVERY, batch_size=10)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert norm.momentum == 0.3
    assert model.training


def test_a_loop_says_in_how_many_parts_its_batches_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Classifier.forward

    def narrow(self: Classifier, images: Tensor) -> object:
        if self.training and len(images) > 20:
            raise torch.OutOfMemoryError
        return forward(self, images)

    task = trained(TENTH)
    monkeypatch.setattr(Classifier, "forward", narrow)
    (cost,) = finetune.unlearn(task, task.recipe).loops
    assert cost.parts == 2  # of 32 images


def test_where_memory_does_not_hold_one_image_of_a_step_the_loop_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def narrow(self: Classifier, images: Tensor) -> object:
        raise torch.OutOfMemoryError

    task = trained(TENTH)
    monkeypatch.setattr(Classifier, "forward", narrow)
    with pytest.raises(UserError, match="does not hold a step of ft, not even with 32 parts of its batch"):
        finetune.unlearn(task, task.recipe)
