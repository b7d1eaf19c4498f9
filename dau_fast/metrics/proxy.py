"""How far a model is from having forgotten, judged without a retrained model and without test images.

A model that forgot treats the forget set as validation images that it never saw, and everything else as
before. Terms in percentage points, each 0 at best:

    spread over classes    |forget - validation accuracy|, |MIA(forget) - MIA(held out)|
    whole classes          forget accuracy, 100 - MIA(forget)
    both                   |change of retain accuracy|, |change of validation accuracy|

MIA: share that the confidence attack calls non-member. The attack is fitted to a sample of the retain set and
to one half of the validation set; the other half is held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from dau_fast.data.split import Split
from dau_fast.engine.batches import Load
from dau_fast.engine.evaluation import predict_each
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.errors import UserError
from dau_fast.metrics import svm
from dau_fast.metrics.accuracy import percent
from dau_fast.metrics.mia import Answers, confidence, correctness


@dataclass(frozen=True)
class Behaviour:
    """Of a model, all in percent. forget, retain, validation: accuracy on that set.

    forget_mia, held_out_mia: share of the forget set, and of the validation half that is held out, that the
    attack calls non-member.
    """

    forget: float
    retain: float
    validation: float
    forget_mia: float
    held_out_mia: float


def observe(
    model: nn.Module,
    load: Load,
    labels: Tensor,
    split: Split,
    generator: torch.Generator,
    *,
    ranks: Ranks = ALONE,
) -> Behaviour:
    """Run `model` once over forget, retain and validation set.

    generator: draws the halves of the validation set and the retain sample; seed it alike for every model.
    Raises UserError for a validation set of a single image, and Diverged for outputs that are not finite.
    """
    check_halves(split)

    def summarise(logits: Tensor, batch: Tensor) -> Tensor:
        return _summary(Answers(logits, labels[batch]))

    sets = (split.forget, split.retain, split.validation)
    forget, retain, validation = (predict_each(model, load, index, summarise, ranks=ranks) for index in sets)
    order = torch.randperm(len(validation), generator=generator, device=validation.device)
    fitted, held_out = validation[order, 1:].tensor_split(2)
    size = min(len(fitted), len(retain))
    sample = torch.randperm(len(retain), generator=generator, device=retain.device)[:size]
    calls_non_member = svm.fit(retain[sample, 1:], fitted[:size])
    return Behaviour(
        percent(forget[:, 0]),
        percent(retain[:, 0]),
        percent(validation[:, 0]),
        percent(calls_non_member(forget[:, 1:])),
        percent(calls_non_member(held_out)),
    )


def list_terms(now: Behaviour, before: Behaviour, *, classwise: bool) -> dict[str, float]:
    """The terms of the model that behaves as `now`, by name; before: the original."""
    if classwise:
        forgotten = {"forget_accuracy": now.forget, "mia_short": 100 - now.forget_mia}
    else:
        forgotten = {
            "forget_beside_validation": abs(now.forget - now.validation),
            "mia_beside_held_out": abs(now.forget_mia - now.held_out_mia),
        }
    return forgotten | {
        "retain_change": abs(now.retain - before.retain),
        "validation_change": abs(now.validation - before.validation),
    }


def proxy_gap(terms: dict[str, float]) -> float:
    """The mean of the terms, in percentage points: what is smaller is better."""
    return fmean(terms.values())


def check_halves(split: Split) -> None:
    """UserError unless both halves of the validation set hold an image."""
    if len(split.validation) < 2:
        raise UserError("a validation set of one image cannot be halved for tuning: expected two or more")


def _summary(answers: Answers) -> Tensor:
    """1 for a right answer and else 0, and the confidence in the true label; float64 [B, 2]."""
    parts = [torch.cat([correctness(part), confidence(part)], 1) for part in answers.parts()]
    return torch.cat(parts)
