"""What docs/method.md proves of the method, checked on small numbers."""

from __future__ import annotations

import itertools

import torch

from dau_fast.ops import barlow_twins_loss

LAMBD = 0.3


def losses_of_all_pairings(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """The loss of `z_a` with every order of the rows of `z_b`, float64 [N!]."""
    orders = itertools.permutations(range(len(z_b)))
    return torch.stack([barlow_twins_loss(z_a, z_b[list(order)], LAMBD, eps=1e-14) for order in orders])


def test_barlow_twins_of_rows_paired_by_chance_is_a_constant_on_average():
    """Equation (12): the same for two pairs of views, and without a gradient."""
    generator = torch.Generator().manual_seed(0)
    n, d = 5, 3
    expected = d * (1 + 1 / (n - 1)) + LAMBD * d * (d - 1) / (n - 1)
    for scale in (1.0, 30.0):
        z_a, z_b = scale * torch.randn(2, n, d, generator=generator, dtype=torch.float64)
        z_b = z_b + z_a.square()  # features that depend on one another change nothing
        z_a.requires_grad_()
        losses = losses_of_all_pairings(z_a, z_b)
        assert losses.std() > 0.1  # single pairings differ; their mean does not
        torch.testing.assert_close(losses.mean().item(), expected, rtol=1e-9, atol=0)
        (grad,) = torch.autograd.grad(losses.mean(), z_a)
        (single,) = torch.autograd.grad(barlow_twins_loss(z_a, z_b, LAMBD, eps=1e-14), z_a)
        assert grad.norm() < 1e-9 * single.norm()
