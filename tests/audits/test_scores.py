"""Audits on arrays: margins, ROC, RMIA, U-LiRA, KLoM, the challenge's score, neighbours; by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dau_fast.audits import challenge, klom, rmia
from dau_fast.audits.neighbours import mean_distributions, neighbour_distance
from dau_fast.audits.roc import auc, tpr_at
from dau_fast.audits.signals import log_probabilities, margins
from dau_fast.audits.ulira import ulira


def normal(seed: int, *shape: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, shape)


# ---- margins


def test_a_margin_is_the_log_odds_of_the_true_label() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], dtype=torch.float64).log() + 5
    found = margins(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(found, torch.tensor([0.7 / 0.3, 0.1 / 0.9], dtype=torch.float64).log())
    np.testing.assert_allclose(np.exp(log_probabilities(found.numpy())), [0.7, 0.1])


def test_margins_stay_exact_where_probabilities_round_to_0_and_1() -> None:
    found = margins(torch.tensor([[300.0, 0.0, 0.0]] * 2), torch.tensor([0, 1])).numpy()
    np.testing.assert_allclose(found, [300 - math.log(2), -300 - math.log1p(math.exp(-300))])
    assert np.isfinite(log_probabilities(np.array([-1e4, 1e4]))).all()


# ---- ROC


def test_auc_counts_pairs_and_halves_of_ties() -> None:
    assert auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == 100 * (2 + 0.5) / 4
    assert auc(np.array([5.0]), np.array([1.0, 2.0])) == 100
    assert auc(np.zeros(3), np.zeros(4)) == 50


def test_tpr_lets_no_more_negatives_pass_than_asked_for() -> None:
    negatives = np.arange(100.0)
    positives = np.array([98.5, 99.5, 97.5, 0.0])
    assert tpr_at(positives, negatives, 1) == 50  # 98 is passed by one negative, 99
    assert tpr_at(positives, negatives, 0.1) == 25  # by none
    assert tpr_at(positives, negatives, 100) == 100
    assert tpr_at(negatives, negatives, 1) == 1


# ---- RMIA


def test_rmia_scores_are_shares_of_the_population_by_the_definition() -> None:
    x, prior_x = np.array([0.9, 0.2]), np.array([0.5, 0.4])
    z, prior_z = np.array([0.8, 0.3, 0.6]), np.array([0.8, 0.6, 0.2])
    for gamma in (1.0, 2.0):
        expected = [
            np.mean([(p / pr) / (q / qr) >= gamma for q, qr in zip(z, prior_z, strict=True)])
            for p, pr in zip(x, prior_x, strict=True)
        ]
        found = rmia.rmia_scores(*map(np.log, (x, prior_x, z, prior_z)), gamma=gamma)
        assert found.tolist() == expected
    assert rmia.rmia_scores(*map(np.log, (x, prior_x, z, prior_z)), gamma=1.0).tolist() == [2 / 3, 1 / 3]


def test_rmia_priors_are_means_of_probabilities() -> None:
    out, inside = np.array([[0.2, 0.6], [0.4, 0.8]]), np.array([[0.9, 1.0]])
    np.testing.assert_allclose(np.exp(rmia.offline_prior(np.log(out), a=1)), [0.3, 0.7])
    # With a = 0.3, models trained on the image are taken to give it 0.3 * 0.3 + 0.7.
    np.testing.assert_allclose(np.exp(rmia.offline_prior(np.log(out), a=0.3))[0], (0.3 + 0.3 * 0.3 + 0.7) / 2)
    np.testing.assert_allclose(np.exp(rmia.online_prior(np.log(inside), np.log(out))), [0.6, 0.85])


def rmia_auc(leak: float) -> float:
    """AUC of 400 images whose margins are `leak` above those of models that never saw them."""
    hardness = normal(0, 1200, spread=3)
    models = hardness + normal(1, 5, 1200)
    audited, references = models[0].copy(), log_probabilities(models[1:])
    audited[:400] += leak
    target, prior = log_probabilities(audited), rmia.offline_prior(references, a=0.3)
    scores = rmia.rmia_scores(target[:800], prior[:800], target[800:], prior[800:], gamma=1.0)
    return auc(scores[:400], scores[400:])


def test_rmia_is_chance_for_exchangeable_models_and_finds_a_planted_leak() -> None:
    assert rmia_auc(0) == pytest.approx(50, abs=5)  # the standard error is 2
    assert rmia_auc(2) > 75
    assert rmia_auc(12) > 95


# ---- U-LiRA


def test_ulira_is_chance_for_exchangeable_models_and_certain_where_they_are_far_apart() -> None:
    found = ulira(normal(0, 8, 500), normal(1, 8, 500))
    assert found.accuracy == pytest.approx(50, abs=3)
    assert found.auc == pytest.approx(50, abs=3)
    assert found.tpr[1.0] < 3
    apart = ulira(normal(0, 8, 500, mean=9), normal(1, 8, 500))
    assert apart.accuracy == apart.auc == apart.tpr[0.1] == 100
    assert apart.by_image.tolist() == [100.0] * 500


def test_ulira_of_a_shift_is_the_best_possible_accuracy() -> None:
    """Of two normal distributions 2 apart the best rule is right with probability Phi(1)."""
    found = ulira(normal(0, 40, 400, mean=2), normal(1, 40, 400))
    assert found.accuracy == pytest.approx(100 * stats.norm.cdf(1), abs=1)
    assert found.auc == pytest.approx(100 * stats.norm.cdf(2 / math.sqrt(2)), abs=1)


def test_ulira_never_judges_a_model_that_it_was_fitted_to() -> None:
    """A model far off from all others of its kind is not recognised by itself."""
    unlearned, retrained = normal(0, 4, 200), normal(1, 4, 200)
    unlearned[0] += 50
    assert ulira(unlearned, retrained).accuracy < 75


def test_ulira_takes_more_models_of_one_kind() -> None:
    found = ulira(normal(0, 3, 300), normal(1, 9, 300))
    assert found.accuracy == pytest.approx(50, abs=4)


# ---- KLoM


@pytest.mark.parametrize("estimate", [klom.klom_histogram, klom.klom_normal])
def test_klom_of_equal_sets_is_0_and_of_distant_ones_the_ceiling(estimate) -> None:
    one = normal(0, 30, 7, spread=0.1)  # within one of 20 bins over a range of 60
    np.testing.assert_allclose(estimate(one, one), 0, atol=1e-12)
    np.testing.assert_allclose(estimate(one + 60, one), klom.CEILING, rtol=1e-4)
    constant = np.ones((4, 3))
    np.testing.assert_allclose(estimate(constant, constant), 0, atol=1e-12)


def test_klom_of_shifted_normals_is_the_closed_form() -> None:
    """Half the square of the shift over the spread, for both estimates where there are many models."""
    one, other = normal(0, 20000, 3, mean=1.5, spread=2), normal(1, 20000, 3, spread=2)
    np.testing.assert_allclose(klom.klom_normal(one, other), (1.5 / 2) ** 2 / 2, rtol=0.05)
    np.testing.assert_allclose(klom.klom_histogram(one, other), (1.5 / 2) ** 2 / 2, rtol=0.05)


def test_klom_of_normals_of_other_spread_is_the_integral() -> None:
    p, q = stats.norm(0.4, 0.7), stats.norm(-0.3, 1.3)
    integral = integrate.quad(lambda t: p.pdf(t) * (p.logpdf(t) - q.logpdf(t)), -8, 8)[0]
    unlearned = stats.zscore(normal(0, 50, 1), ddof=1) * 0.7 + 0.4
    retrained = stats.zscore(normal(1, 50, 1), ddof=1) * 1.3 - 0.3
    assert klom.klom_normal(unlearned, retrained)[0] == pytest.approx(integral, rel=1e-9)


def test_klom_histogram_by_hand() -> None:
    """Over 0 to 4 in four bins: shares (1/2, 1/2, 0, 0) against (1/4, 0, 1/2, 1/4), an empty one 1e-5."""
    unlearned = np.array([0.0, 0.5, 1.0, 1.9])[:, None]
    retrained = np.array([0.2, 2.0, 2.5, 4.0])[:, None]
    whole = 1 + 1e-5
    by_hand = 0.5 * math.log(0.5 / (0.25 / whole)) + 0.5 * math.log(0.5 / (1e-5 / whole))
    assert klom.klom_histogram(unlearned, retrained, bins=4)[0] == pytest.approx(by_hand, rel=1e-12)


def test_klom_histogram_is_scipys_on_the_same_counts() -> None:
    unlearned, retrained = normal(0, 40, 6, mean=1), normal(1, 40, 6)
    for column, found in enumerate(klom.klom_histogram(unlearned, retrained)):
        sides = unlearned[:, column], retrained[:, column]
        edges = np.histogram_bin_edges(np.concatenate(sides), bins=20)
        p, q = (np.histogram(side, edges)[0] / 40 for side in sides)
        assert found == pytest.approx(stats.entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q)), rel=1e-9)


# ---- the challenge of 2023


def epsilon(unlearned: list[float], retrained: list[float]) -> float:
    return float(challenge.epsilons(np.array(unlearned)[:, None], np.array(retrained)[:, None])[0])


def test_an_image_whose_models_are_told_apart_has_no_finite_epsilon() -> None:
    assert epsilon([1, 2, 3, 4], [5, 6, 7, 8]) == math.inf
    assert epsilon([5, 6, 7, 8], [1, 2, 3, 4]) == math.inf
    assert epsilon([4, 4.5, 5, 5.5], [1, 2, 8, 9]) == math.inf  # by two thresholds
    assert epsilon([4, 4, 4, 4], [1, 2, 5, 9]) == math.inf  # no wider than a point


def test_an_epsilon_by_hand() -> None:
    """Between 2 and 3 one of four is on the wrong side: FPR = FNR = 1/4, so epsilon = log 3."""
    assert epsilon([1, 2, 2.1, 4], [0, 3, 3.5, 5]) == pytest.approx(math.log((0.75 - 1e-5) / 0.25))


def test_equal_models_have_epsilon_0() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert epsilon(values, values) == pytest.approx(0, abs=2e-5)


def test_points_halve_with_every_half_of_epsilon_and_end_where_models_end() -> None:
    found = challenge.forgetting_quality(np.array([0.1, 0.6, 1.4, 1.9, 2.1, math.inf]), models=8)
    # log 7 rounded up is 2: four steps.
    assert found == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8 + 0 + 0) / 6)


def test_the_challenges_score_multiplies_by_what_is_kept() -> None:
    assert challenge.challenge_score(0.5, (90, 100), (40, 50)) == pytest.approx(0.5 * 0.9 * 0.8)


def test_retrained_models_score_higher_than_models_that_forgot_nothing() -> None:
    retrained, again, original = normal(0, 30, 50), normal(1, 30, 50), normal(2, 30, 50, mean=4)
    scores = [challenge.forgetting_quality(challenge.epsilons(m, retrained), 30) for m in (again, original)]
    assert scores[0] > 5 * scores[1]


# ---- neighbouring classes


def test_distances_between_mean_distributions_by_hand() -> None:
    labels = np.array([0, 0, 2])
    one = mean_distributions(np.array([[0.2, 0.8, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0]]), labels)
    np.testing.assert_allclose(one[[0, 2]], [[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]])
    assert np.isnan(one[1]).all()
    other = mean_distributions(np.array([[0.2, 0.2, 0.6], [0.2, 0.2, 0.6], [0.5, 0.0, 0.5]]), labels)
    counts = np.array([2, 0, 1])
    assert neighbour_distance(one, one, counts) == 0
    assert neighbour_distance(one, other, counts) == pytest.approx(100 * (2 * 0.6 + 0.5) / 3)
