"""Sharing a batch: every row belongs to one rank, and weighted means add up to the mean of all rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.errors import UserError

counts = st.integers(1, 9)


@given(count=counts, rows=st.integers(0, 60))
def test_every_row_belongs_to_one_rank_and_shares_are_even(count: int, rows: int) -> None:
    every = [Ranks(rank, count) for rank in range(count)]
    assert [i for ranks in every for i in range(rows)[ranks.own_rows(rows)]] == list(range(rows))
    sizes = every[0].rows(rows)
    assert sizes == [len(range(rows)[ranks.own_rows(rows)]) for ranks in every]
    assert max(sizes) - min(sizes) <= 1


@given(count=counts, rows=st.integers(0, 60), batch_size=st.integers(1, 70))
def test_every_rank_has_as_many_batches_of_its_rows(count: int, rows: int, batch_size: int) -> None:
    index = torch.arange(rows) + 5
    every = [Ranks(rank, count).batches(index, batch_size) for rank in range(count)]
    assert len({len(batches) for batches in every}) == 1
    for rank, batches in enumerate(every):
        assert torch.equal(torch.cat(batches), index[Ranks(rank, count).own_rows(rows)])
        assert all(len(batch) <= batch_size for batch in batches)
        assert all(len(batch) > 0 for batch in batches[:-1])
    if count == 1:
        # No more of them than needed, and of one size but for the last.
        assert len(every[0]) == len(index.split(batch_size))
        assert len({len(batch) for batch in every[0][:-1]}) <= 1


@settings(deadline=None)
@given(count=counts, rows=st.integers(1, 20), sets=st.integers(1, 4))
def test_positions_are_this_ranks_rows_of_every_set(count: int, rows: int, sets: int) -> None:
    found = []
    for rank in range(count):
        ranks = Ranks(rank, count)
        positions = ranks.own_positions(rows, sets, torch.device("cpu"))
        if positions is None:
            assert count == 1
            return
        mine = list(range(rows)[ranks.own_rows(rows)])
        assert positions.tolist() == [rows * part + row for part in range(sets) for row in mine]
        found += positions.tolist()
    assert sorted(found) == list(range(rows * sets))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(3, 40), min_size=1, max_size=5), parts=st.integers(1, 3))
def test_weighted_means_of_all_parts_average_to_the_mean_over_the_batch(sizes: list[int], parts: int) -> None:
    values = torch.randn(sum(sizes), dtype=torch.float64)
    total = 0.0
    for rank, own in enumerate(values.split(sizes)):
        found = Ranks(rank, len(sizes)).micro_batches(sizes, parts)
        assert torch.equal(torch.cat([own[part.rows] for part in found]), own)
        assert all(part.sizes[rank] == len(own[part.rows]) for part in found)
        total += sum(part.weight * own[part.rows].mean() for part in found) / len(sizes)
    torch.testing.assert_close(total, values.mean())


def test_one_process_with_a_whole_batch_weighs_nothing() -> None:
    (part,) = ALONE.micro_batches([32], 1)
    assert (part.rows, part.sizes, part.weight) == (slice(0, 32), [32], 1)


def test_a_batch_too_small_to_share_is_refused() -> None:
    with pytest.raises(
        UserError, match="a batch of 5 images cannot be shared by 3 processes, each taken in 2 parts"
    ):
        Ranks(0, 3).micro_batches([2, 2, 1], 2)
