"""The attacker's loss, its score, and what it makes of its input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dau_fast.methods.dau.attacker import Attacker, attacker_gradients, attacker_loss, auc


class Known(nn.Module):
    """Says of a sample what its first column holds."""

    def forward(self, u: Tensor) -> Tensor:
        return u[:, 0]


def shown(rows: int, shift: float, seed: int = 0) -> Tensor:
    """u of three classes; `shift` moves both the softmax and the sensitivity."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=generator) + torch.tensor([shift, 0, 0])
    noise = torch.randn(rows, 1, generator=generator)
    return torch.cat([logits.softmax(1), torch.exp(noise - 3 * shift)], 1)


def all_of(*sets: Tensor) -> tuple[Tensor, ...]:
    """The sets, and equal weights for their rows."""
    return *sets, *(torch.ones(len(rows)) for rows in sets)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_is_the_mean_cross_entropy_of_both_sets() -> None:
    forget, validation = [2.0, -1.0, 0.5], [0.3, -4.0]
    member = -sum(math.log(sigmoid(z)) for z in forget) / 3
    non_member = -sum(math.log(1 - sigmoid(z)) for z in validation) / 2
    sets = torch.tensor(forget)[:, None], torch.tensor(validation)[:, None]
    found = attacker_loss(Known(), *all_of(*sets))
    assert found.item() == pytest.approx((member + non_member) / 2, rel=1e-6)


def test_an_attacker_that_knows_nothing_loses_log_2_whatever_the_sizes() -> None:
    sets = torch.zeros(1, 1), torch.zeros(99, 1)
    assert attacker_loss(Known(), *all_of(*sets)).item() == pytest.approx(math.log(2))


def test_rows_without_weight_leave_no_trace() -> None:
    forget, validation = shown(8, 1, 1), shown(6, 0, 2)
    attacker = Attacker(forget, 8)
    of_forget, of_validation = torch.arange(8) % 3 != 0, torch.arange(6) < 2
    expected = attacker_loss(attacker, *all_of(forget[of_forget], validation[of_validation]))
    found = attacker_loss(attacker, forget, validation, of_forget.float(), of_validation.float())
    torch.testing.assert_close(found, expected)
    nothing = attacker_loss(attacker, forget, validation, torch.zeros(8), torch.zeros(6))
    assert nothing.item() == 0


def test_forget_is_member_and_validation_is_not() -> None:
    sure = torch.full((4, 1), 10.0)
    assert attacker_loss(Known(), *all_of(sure, -sure)) < 1e-3
    assert attacker_loss(Known(), *all_of(-sure, sure)) > 9


def test_the_loss_of_very_wrong_verdicts_is_finite() -> None:
    sets = torch.full((2, 1), -1e4), torch.full((2, 1), 1e4)
    assert attacker_loss(Known(), *all_of(*sets)).item() == 1e4


# ---- AUC


@pytest.mark.parametrize("values", [2, 5, 1000])
@pytest.mark.parametrize(("members", "others"), [(1, 1), (40, 25), (3, 200)])
def test_auc_is_that_of_scikit_learn_also_with_ties(members: int, others: int, values: int) -> None:
    rng = np.random.default_rng(members + values)
    one, other = rng.integers(0, values, members) + values // 4, rng.integers(0, values, others)
    expected = roc_auc_score([1] * members + [0] * others, np.concatenate([one, other]))
    found = auc(torch.from_numpy(one).float(), torch.from_numpy(other).float())
    assert found == pytest.approx(expected, abs=1e-12)


def test_auc_of_known_scores() -> None:
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auc(torch.tensor([0.0]), torch.tensor([1.0, 2.0])) == 0
    assert auc(torch.ones(5), torch.ones(7)) == 0.5
    assert auc(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_auc_of_more_scores_than_pairs_of_them_could_be_held() -> None:
    """Member k + 1/2 lies above k + 1 of the 2 n non-members 0, 1, 2 and so on."""
    n = 300_000
    members = torch.arange(n, dtype=torch.float64) + 0.5
    expected = (n + 1) / 2 / (2 * n)
    assert auc(members.flip(0), torch.arange(2 * n, dtype=torch.float64)) == pytest.approx(
        expected, rel=1e-12
    )


# ---- the network


def test_the_attacker_gives_one_logit_a_sample() -> None:
    seen = shown(20, 0)
    assert Attacker(seen, 8)(seen[:5]).shape == (5,)
    assert Attacker(seen, 8)(seen[:1]).shape == (1,)


def test_inputs_are_standardised_by_what_was_seen_of_the_original() -> None:
    seen = shown(500, 1)
    attacker = Attacker(seen, 8)
    inside: list[Tensor] = []
    attacker.layers[0].register_forward_pre_hook(lambda _, inputs: inside.append(inputs[0]))
    attacker(seen)
    torch.testing.assert_close(inside[0].mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    assert ((inside[0].std(0) > 0.9) & (inside[0].std(0) <= 1)).all()


def test_inputs_that_never_vary_give_finite_verdicts() -> None:
    seen = torch.tensor([[1.0, 0.0, 0.0]]).repeat(6, 1)
    assert Attacker(seen, 8)(seen).isfinite().all()


def test_two_samples_are_enough_to_standardise_by() -> None:
    assert Attacker(shown(2, 0), 8)(shown(5, 0)).isfinite().all()


def test_the_statistics_are_not_trained() -> None:
    attacker = Attacker(shown(20, 0), 8)
    assert {name for name, _ in attacker.named_buffers()} == {"mean", "std"}
    assert all(name.startswith("layers.") for name, _ in attacker.named_parameters())


@pytest.mark.parametrize("left_out", [0, 3, 8])
def test_gradients_by_formula_are_those_of_the_loss(left_out: int) -> None:
    torch.manual_seed(left_out)
    forget, validation = (torch.randn(rows, 5, dtype=torch.float64) * 3 for rows in (8, 11))
    attacker = Attacker(torch.cat([forget, validation]), 16).double()
    # As games give them: in float32, of sums whose inverse float32 does not hold.
    weights = torch.ones(8), torch.randint(2, (11,)).float()
    weights[0][:left_out] = 0
    seen = forget, validation, *weights
    expected = torch.autograd.grad(attacker_loss(attacker, *seen), list(attacker.parameters()))
    found = attacker_gradients(attacker, *seen)
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-14)
    assert found[4].abs().max() > 0


def test_gradients_of_sure_verdicts_are_finite() -> None:
    seen = shown(8, 0)
    attacker = Attacker(seen, 4)
    far = 1e6 * torch.randn(8, seen.shape[1], generator=torch.Generator().manual_seed(1))
    assert all(part.isfinite().all() for part in attacker_gradients(attacker, *all_of(far, -far)))


def test_an_attacker_learns_to_tell_two_sets_apart() -> None:
    torch.manual_seed(0)
    forget, validation = shown(64, 1, 1), shown(64, 0, 2)
    attacker = Attacker(torch.cat([forget, validation]), 16)
    optimizer = torch.optim.Adam(attacker.parameters(), lr=1e-2)
    for _ in range(60):
        found = attacker_gradients(attacker, *all_of(forget, validation))
        for parameter, gradient in zip(attacker.parameters(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert auc(attacker(shown(200, 1, 3)), attacker(shown(200, 0, 4))) > 0.85


def test_verdicts_carry_gradients_to_what_the_defender_shows() -> None:
    u = shown(6, 0).requires_grad_()
    Attacker(shown(20, 0), 8)(u).sum().backward()
    assert u.grad is not None
    assert (u.grad != 0).any(dim=0).all()
