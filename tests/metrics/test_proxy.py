"""The proxy for distance to retraining: terms by hand, on a model whose every output is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dau_fast.data.split import Split
from dau_fast.errors import Diverged, UserError
from dau_fast.metrics.proxy import Behaviour, list_terms, observe, proxy_gap
from dau_fast.models import Outputs


class Identity(nn.Module):
    """A classifier whose images are its logits."""

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(images, images)


# Images of each set, and the confidence of the model in the label of each.
CONFIDENCES = {
    "forget": [0.99] * 3 + [0.6],
    "retain": [0.99] * 30 + [0.2] * 10,
    "validation": [0.6] * 8 + [0.4] * 2,
}


def known(
    confidences: dict[str, list[float]] = CONFIDENCES, classwise: bool = False
) -> tuple[Tensor, Tensor, Split]:
    """Logits [N, 2], labels, all 0, and the split; no test images."""
    sets, rows = {}, []
    for name, values in confidences.items():
        sets[name] = torch.arange(len(rows), len(rows) + len(values))
        rows += [[math.log(p), math.log(1 - p)] for p in values]
    train = torch.cat([sets["forget"], sets["retain"]])
    split = Split(train=train, test=train[:0], classwise=classwise, **sets)
    return torch.tensor(rows, dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64), split


def observed(logits: Tensor, labels: Tensor, split: Split, seed: int = 0) -> Behaviour:
    return observe(Identity(), logits.__getitem__, labels, split, torch.Generator().manual_seed(seed))


def test_accuracies_and_attack_are_those_of_the_sets() -> None:
    found = observed(*known())
    assert (found.forget, found.retain, found.validation) == (100, 75, 80)
    # 0.99 is a member's, 0.6 and 0.4 are not.
    assert (found.forget_mia, found.held_out_mia) == (25, 100)


def test_the_attack_is_asked_about_the_half_that_it_never_saw() -> None:
    """Two of four validation images look like members: what the other half holds decides."""
    confidences = {**CONFIDENCES, "retain": [0.99] * 8, "validation": [0.2, 0.2, 0.99, 0.99]}
    told_apart = set()
    for seed in range(20):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        strangers_held_out = int((order[2:] < 2).sum())
        if strangers_held_out < 2:  # else nothing was there to tell apart
            found = observed(*known(confidences), seed=seed).held_out_mia
            assert found == 50 * strangers_held_out
            told_apart.add(found)
    assert told_apart == {0, 50}


def test_equal_generators_halve_alike() -> None:
    assert observed(*known(), seed=3) == observed(*known(), seed=3)


def test_terms_are_distances_to_validation_and_to_before() -> None:
    before = Behaviour(100, 99, 80, 5, 60)
    now = Behaviour(forget=85, retain=97, validation=82, forget_mia=50, held_out_mia=54)
    terms = list_terms(now, before, classwise=False)
    assert terms == {
        "forget_beside_validation": 3, "mia_beside_held_out": 4, "retain_change": 2, "validation_change": 2,
    }  # fmt: skip
    assert proxy_gap(terms) == 2.75


def test_a_class_is_to_be_gone_and_never_seen() -> None:
    before = Behaviour(100, 99, 80, 5, 60)
    now = Behaviour(forget=6, retain=100, validation=79, forget_mia=92, held_out_mia=10)
    terms = list_terms(now, before, classwise=True)
    assert terms == {"forget_accuracy": 6, "mia_short": 8, "retain_change": 1, "validation_change": 1}
    assert proxy_gap(terms) == 4


def test_one_validation_image_is_refused() -> None:
    with pytest.raises(UserError, match="a validation set of one image cannot be halved for tuning"):
        observed(*known({**CONFIDENCES, "validation": [0.6]}))


@pytest.mark.parametrize("place", [0, 10, 46], ids=["forget", "retain", "validation"])
def test_outputs_that_are_not_finite_have_diverged(place: int) -> None:
    logits, labels, split = known({**CONFIDENCES, "retain": [0.99] * 5 + [0.2]})
    logits[min(place, len(logits) - 1)] = torch.nan
    with pytest.raises(Diverged):
        observed(logits, labels, split)
