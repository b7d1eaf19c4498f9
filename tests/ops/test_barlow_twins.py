"""The Barlow Twins loss: cases computed by hand, invariances, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dau_fast.ops import barlow_twins_loss


def pair(n: int = 12, d: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 100 * d)
    a = torch.randn(n, d, dtype=torch.float64, generator=generator)
    b = 0.5 * a + torch.randn(n, d, dtype=torch.float64, generator=generator)
    return a, b


def by_definition(a: Tensor, b: Tensor, lambd: float, eps: float) -> float:
    """Equations 1 and 2 of Zbontar et al. 2021, entry by entry."""
    n, d = a.shape
    columns = []
    for z in (a, b):
        centred = z - z.sum(0) / n
        columns.append(centred / ((centred**2).sum(0) / n + eps) ** 0.5)
    total = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(columns[0][k, i] * columns[1][k, j] for k in range(n)).item() / n
            total += (1 - c) ** 2 if i == j else lambd * c**2
    return total


def test_a_case_computed_by_hand() -> None:
    """C = [[1, -1], [1, -1]]: the diagonal costs 0 and 4, the rest 1 and 1."""
    a = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert barlow_twins_loss(a, b, lambd=0.25, eps=0.0).item() == pytest.approx(4 + 0.25 * 2)


def test_eps_is_added_to_the_population_variance() -> None:
    """Deviations of 1 with eps 3 become halves, so C = 1/4 everywhere."""
    a = torch.tensor([[4.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    found = barlow_twins_loss(a, a, lambd=0.5, eps=3.0).item()
    assert found == pytest.approx(2 * 0.75**2 + 0.5 * 2 * 0.25**2)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (12, 5), (4, 9)])
@pytest.mark.parametrize("lambd", [0.0, 5e-3, 1.0])
def test_the_loss_equals_its_definition(n: int, d: int, lambd: float) -> None:
    a, b = pair(n, d)
    expected = by_definition(a, b, lambd, 1e-5)
    assert barlow_twins_loss(a, b, lambd).item() == pytest.approx(expected, rel=1e-9)


def test_the_usual_weight_is_that_of_the_paper() -> None:
    a, b = pair()
    assert barlow_twins_loss(a, b) == barlow_twins_loss(a, b, 5e-3, 1e-5)


def test_perfectly_correlated_and_otherwise_independent_columns_cost_nothing() -> None:
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert barlow_twins_loss(a, a, lambd=1.0, eps=0.0).item() == pytest.approx(0, abs=1e-15)
    assert barlow_twins_loss(a, -a, lambd=1.0, eps=0.0).item() == pytest.approx(8)


def test_scaling_and_shifting_columns_changes_nothing() -> None:
    a, b = pair()
    scale, shift = torch.tensor([0.1, 1, 2, 30, 100.0]), torch.tensor([-50, 0, 3, 1e3, 7.0])
    expected = barlow_twins_loss(a, b, 0.3, eps=0.0)
    torch.testing.assert_close(barlow_twins_loss(a * scale + shift, b, 0.3, eps=0.0), expected)
    torch.testing.assert_close(barlow_twins_loss(a, b * scale + shift, 0.3, eps=0.0), expected)


def test_the_order_of_pairs_does_not_matter_but_pairing_does() -> None:
    a, b = pair()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(barlow_twins_loss(a[order], b[order]), barlow_twins_loss(a, b))
    assert barlow_twins_loss(a[order], b) > barlow_twins_loss(a, b)


def test_both_sides_are_alike() -> None:
    a, b = pair()
    torch.testing.assert_close(barlow_twins_loss(a, b), barlow_twins_loss(b, a))


@pytest.mark.parametrize(("n", "d"), [(6, 4), (3, 7)])
def test_gradients_are_those_of_finite_differences(n: int, d: int) -> None:
    a, b = (z.requires_grad_() for z in pair(n, d))
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins_loss(x, y, 0.1), (a, b))


def test_a_factor_in_front_scales_the_gradient() -> None:
    a, b = (z.requires_grad_() for z in pair())
    (single,) = torch.autograd.grad(barlow_twins_loss(a, b), [a])
    (double,) = torch.autograd.grad(2 * barlow_twins_loss(a, b), [a])
    torch.testing.assert_close(double, 2 * single)


def test_constant_columns_cost_1_each_and_have_a_finite_gradient() -> None:
    a = torch.full((8, 3), 2.5, requires_grad=True)
    b = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    loss = barlow_twins_loss(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(3, abs=1e-4)
    assert a.grad.isfinite().all()


@pytest.mark.parametrize(
    ("a", "b"), [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((1, 3), (1, 3)), ((0, 3), (0, 3)), ((4,), (4,))]
)
def test_shapes_that_cannot_be_paired_are_an_error_that_shows_them(
    a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="expected one shape") as raised:
        barlow_twins_loss(torch.zeros(a), torch.zeros(b))
    assert str(list(a)) in str(raised.value)
    assert str(list(b)) in str(raised.value)


def test_three_dimensions_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="expected one shape"):
        barlow_twins_loss(torch.zeros(4, 3, 2), torch.zeros(4, 3, 2))
