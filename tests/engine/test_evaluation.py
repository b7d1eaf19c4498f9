"""Outputs over a set: complete, in order, in evaluation mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dau_fast.engine import evaluation
from dau_fast.engine.evaluation import (
    EVALUATION_BATCH,
    count_batches,
    of_one_shape,
    predict,
    predict_each,
)
from dau_fast.engine.ranks import ALONE
from dau_fast.models import Classifier

IMAGES = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))


def a_model() -> Classifier:
    """BatchNorm and dropout give other outputs in training mode."""
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)))


@pytest.mark.parametrize("batch_size", [1, 4, 22, 23, EVALUATION_BATCH])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_those_of_the_model_in_evaluation_mode_row_by_row(
    batch_size: int, training: bool
) -> None:
    model = a_model().eval()
    index = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    expected = model(IMAGES[index])
    outputs = predict(model.train(training), IMAGES.__getitem__, index, batch_size=batch_size)
    torch.testing.assert_close(outputs.features, expected.features)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert all(module.training == training for module in model.modules())


def test_batches_are_never_larger_than_asked_for() -> None:
    sizes: list[int] = []

    def load(index: Tensor) -> Tensor:
        sizes.append(len(index))
        return IMAGES[index]

    predict(a_model(), load, torch.arange(23), batch_size=10)
    assert sizes == [8, 8, 7]


def test_prediction_builds_no_graph_and_changes_no_statistics() -> None:
    model = a_model()
    before = model.network[1].running_mean.clone()
    outputs = predict(model, IMAGES.__getitem__, torch.arange(23))
    assert not outputs.logits.requires_grad
    assert torch.equal(model.network[1].running_mean, before)


def test_an_empty_set_has_no_rows() -> None:
    outputs = predict(a_model(), IMAGES.__getitem__, torch.arange(0))
    assert (outputs.features.shape, outputs.logits.shape) == ((0, 4), (0, 3))
    assert predict_each(a_model(), IMAGES.__getitem__, torch.arange(0), logits_of).shape == (0, 3)


def logits_of(logits: Tensor, batch: Tensor) -> Tensor:
    assert not logits.requires_grad
    return logits


@pytest.mark.parametrize("batch_size", [7, EVALUATION_BATCH])
def test_of_each_batch_is_kept_what_was_asked_for(batch_size: int) -> None:
    model, index = a_model(), torch.arange(22, -1, -1)
    whole = predict(model, IMAGES.__getitem__, index, batch_size=batch_size).logits
    found = predict_each(model, IMAGES.__getitem__, index, logits_of, batch_size=batch_size)
    assert torch.equal(found, whole)
    found = predict_each(
        model,
        IMAGES.__getitem__,
        index,
        lambda logits, batch: torch.stack([logits[:, 1], batch.float()], 1),
        batch_size=batch_size,
    )
    assert torch.equal(found, torch.stack([whole[:, 1], index.float()], 1))
    assert model.training
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_where_loading_fails() -> None:
    def load(index: Tensor) -> Tensor:
        raise OSError("gone")

    model = a_model().train()
    for ask, more in ((predict, ()), (predict_each, (logits_of,))):
        with pytest.raises(OSError, match="gone"):
            ask(model, load, torch.arange(3), *more)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("images", [1000, 4500, 5000, 10_000])
def test_the_passes_of_a_game_on_cifar_have_one_shape(images: int) -> None:
    """A GPU plans its convolutions for each shape anew, and the clock counts it."""
    assert {len(batch) for batch in ALONE.batches(torch.arange(images), EVALUATION_BATCH)} == {500}
    assert images == 500 * count_batches(images, EVALUATION_BATCH)


def test_the_last_batch_is_filled_up_to_the_shape_of_the_others() -> None:
    batches = of_one_shape(ALONE.batches(torch.arange(23), 10))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert torch.cat(batches)[:23].tolist() == list(range(23))
    assert batches[-1][-1] == 22
    for left in (torch.arange(20).split(10), [torch.arange(7)], [torch.arange(4), torch.arange(0)]):
        assert of_one_shape(list(left)) == list(left)


def test_what_fills_up_a_batch_is_not_among_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    model, index = a_model(), torch.arange(23)
    expected = predict(model, IMAGES.__getitem__, index, batch_size=10)
    sizes: list[int] = []

    def load(index: Tensor) -> Tensor:
        sizes.append(len(index))
        return IMAGES[index]

    monkeypatch.setattr(evaluation, "_plans_by_shape", lambda device: True)
    found = predict(model, load, index, batch_size=10)
    assert sizes == [8, 8, 8]
    assert found.logits.shape == expected.logits.shape
    torch.testing.assert_close(found.logits, expected.logits)
