"""Streams of index batches: every image as often as every other."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dau_fast.engine.batches import index_stream, steps_for


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_every_pass_over_the_set_holds_every_image_once(count: int, batch_size: int, seed: int) -> None:
    index = 100 + 3 * torch.arange(count)
    stream = index_stream(index, batch_size, torch.Generator().manual_seed(seed))
    batches = list(itertools.islice(stream, 4 * count // batch_size + 1))
    assert all(batch.shape == (batch_size,) for batch in batches)
    seen = torch.cat(batches)
    for one_pass in seen[: len(seen) // count * count].view(-1, count):
        assert torch.equal(one_pass.sort().values, index)


@pytest.mark.parametrize("count", [1, 3, 31])
def test_a_set_smaller_than_the_batch_fills_it_evenly(count: int) -> None:
    stream = index_stream(torch.arange(count), 32, torch.Generator().manual_seed(0))
    for batch in itertools.islice(stream, 10):
        often = batch.bincount(minlength=count)
        assert often.sum() == 32
        # A batch cuts a pass at either end, so an image may be one ahead and another one behind.
        assert often.max() - often.min() <= 2


def test_the_order_changes_from_pass_to_pass_and_follows_the_generator() -> None:
    def passes(seed: int) -> list[list[int]]:
        stream = index_stream(torch.arange(50), 50, torch.Generator().manual_seed(seed))
        return [batch.tolist() for batch in itertools.islice(stream, 3)]

    first, second, third = passes(0)
    assert first != second != third != first
    assert passes(0) == [first, second, third]
    assert passes(1)[0] != first


def test_the_stream_leaves_the_index_as_it_is() -> None:
    index = torch.arange(10)
    list(itertools.islice(index_stream(index, 4, torch.Generator()), 9))
    assert torch.equal(index, torch.arange(10))


@pytest.mark.parametrize(
    ("epochs", "count", "batch_size", "steps"),
    [(1, 100, 10, 10), (2.5, 100, 10, 25), (182, 45000, 256, 31992), (1, 104, 10, 10), (1, 106, 10, 11)],
)
def test_steps_make_the_asked_for_passes(epochs: float, count: int, batch_size: int, steps: int) -> None:
    assert steps_for(epochs, count, batch_size) == steps


@pytest.mark.parametrize(("epochs", "count"), [(1, 1), (0.01, 100), (0, 100)])
def test_there_is_always_at_least_one_step(epochs: float, count: int) -> None:
    assert steps_for(epochs, count, 256) == 1
