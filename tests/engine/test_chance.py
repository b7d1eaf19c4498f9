"""Randomness by seed and purpose, and PyTorch's global generators left as they were."""

from __future__ import annotations

import pytest
import torch

from dau_fast.engine.chance import derive_seed, generator_for, seeded

CPU = torch.device("cpu")


def draws(seed: int, purpose: str) -> list[float]:
    return torch.rand(8, generator=generator_for(seed, purpose, CPU)).tolist()


def test_a_generator_depends_on_seed_and_purpose_alone() -> None:
    first = draws(3, "game")
    torch.manual_seed(9)
    generator_for(4, "exam", CPU)
    assert draws(3, "game") == first


def test_different_purposes_draw_different_numbers() -> None:
    purposes = ["game", "exam", "statistics sample", "retrain", "retrain again", "original", ""]
    assert len({tuple(draws(0, purpose)) for purpose in purposes}) == len(purposes)


def test_different_seeds_draw_different_numbers() -> None:
    seeds = [0, 1, 2, 3, 100, 2**31, 2**32 - 1]
    assert len({tuple(draws(seed, "game")) for seed in seeds}) == len(seeds)


def test_different_seeds_initialise_networks_differently() -> None:
    drawn = set()
    for seed in range(5):
        with seeded(derive_seed(seed, "retrain"), CPU):
            drawn.add(tuple(torch.rand(4).tolist()))
    assert len(drawn) == 5


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**100])
def test_any_seed_from_0_up_is_a_seed(seed: int) -> None:
    assert draws(seed, "game") == draws(seed, "game") != draws(seed + 1, "game")


def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    draws(0, "game")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_derived_seed_is_that_of_the_generator() -> None:
    assert generator_for(3, "game", CPU).initial_seed() == derive_seed(3, "game")


def test_inside_a_seeded_block_the_seed_decides_and_nothing_is_left_of_it() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    drawn = []
    for seed in (4, 4, 5):
        with seeded(seed, CPU):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(3), expected)


def test_a_seeded_block_that_fails_leaves_nothing_either() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(4, CPU):
        raise KeyError(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("error")
def test_a_seeded_block_on_the_cpu_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own fork_rng() looks at every GPU, and warns where there are many."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("a GPU was looked for"))
    with seeded(4, CPU):
        torch.rand(3)
