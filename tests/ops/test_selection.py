"""Masks of the smallest values: exactly as many as were asked for, the first of equal ones, every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dau_fast.ops import _native, count_kept, mask_smallest, unpack_mask
from dau_fast.ops.reference import mask_smallest_reference


@pytest.fixture(params=["extension", "plain"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("dau_fast._C is not built")


def unpacked(tensors: list[Tensor], k: int) -> list[Tensor]:
    masks = mask_smallest(tensors, k)
    return [unpack_mask(mask, tensor.shape) for mask, tensor in zip(masks, tensors, strict=True)]


def test_known_answer_across_tensors_with_ties() -> None:
    a, b = torch.tensor([[3.0, -1.0], [0.5, 1.0]]), torch.tensor([-1.0, 0.0, -9.0])
    assert [x.tolist() for x in unpacked([a, b], 4)] == [[[True, False], [False, False]], [True, False, True]]
    assert [x.sum().item() for x in unpacked([a, b], 5)] == [1, 1]


@given(
    sizes=st.lists(st.sampled_from([0, 1, 9, 16, 17, 20_000]) | st.integers(0, 300), min_size=1, max_size=4),
    share=st.floats(0, 1),
    coarse=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_equals_a_stable_sort(sizes: list[int], share: float, coarse: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator) for n in sizes]
    if coarse:
        tensors = [(2 * x).round() / 2 for x in tensors]
    k = int(share * sum(sizes))
    found, expected = unpacked(tensors, k), mask_smallest_reference(tensors, k)
    assert all(map(torch.equal, found, expected))
    packed = mask_smallest(tensors, k)
    kept = sum(count_kept(mask, n) for mask, n in zip(packed, sizes, strict=True))
    assert kept == sum(sizes) - k


def test_denormals_infinity_and_negative_zero_are_in_order() -> None:
    x = torch.tensor([float("-inf"), 1e-45, -0.0, 0.0, -3e38, 2e-45])
    for k, dropped in enumerate(
        [[], [2], [2, 3], [1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    ):
        (mask,) = unpacked([x], k)
        assert (~mask).nonzero().flatten().tolist() == dropped


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([4.0, -2.0, 3.0, 1.0], dtype=dtype)
    (mask,) = unpacked([x], 2)
    assert mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.95, 1.0])
def test_values_that_are_one_in_float32_are_told_apart(dtype: torch.dtype, share: float) -> None:
    """Whole stretches that round to one number, to 0 and to infinity; and mixed with float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator, dtype=torch.float64)
    x[:900] = 1 + 1e-12 * x[:900]
    x[900:1200] *= 1e-60
    x[1200:1300] *= 1e60
    for tensors in ([x.to(dtype), x[:70].to(dtype).view(7, 10)], [x.to(dtype), x[500:1000].float()]):
        k = int(share * sum(t.numel() for t in tensors))
        found, expected = unpacked(tensors, k), mask_smallest_reference(tensors, k)
        assert all(map(torch.equal, found, expected))
    with pytest.raises(ValueError, match=r"^tensor 1 has NaN values"):
        mask_smallest([x.to(dtype), torch.tensor([float("nan")], dtype=dtype)], 5)


def test_strides_and_parameters() -> None:
    x = torch.nn.Parameter(torch.randn(12, 8))
    for view in (x, x.T, x[:, ::2]):
        (mask,) = unpacked([view], view.numel() // 3)
        (expected,) = mask_smallest_reference([view], view.numel() // 3)
        assert torch.equal(mask, expected)


def test_mistakes_are_named() -> None:
    for k in (-1, 7):
        with pytest.raises(ValueError, match=rf"^k is {k}: expected 0 to 6, the number of values$"):
            mask_smallest([torch.ones(2), torch.ones(4)], k)
    with pytest.raises(ValueError, match=r"^tensor 1 has NaN values: expected numbers"):
        mask_smallest([torch.ones(2), torch.tensor([1.0, float("nan")])], 1)
    assert mask_smallest([], 0) == []
