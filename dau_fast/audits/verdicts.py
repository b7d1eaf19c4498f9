"""All audits of some models against references, calibrated on the references themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dau_fast.audits.calibration import Calibrated, Verdict, judge, leave_out
from dau_fast.audits.catalogue import Audit, find_audits
from dau_fast.audits.comparing import Context, Group
from dau_fast.audits.probes import information_difference_index
from dau_fast.errors import UserError


@dataclass(frozen=True)
class Audited:
    """What came of it, by the name of the audit.

    audits: of the audited models. originals: the same of the original alone, which an audit with any power
    tells from retrained models; without those that need several models. skipped: why an audit did not run.
    index: the information difference index, None where it is not defined.
    """

    audits: dict[str, Calibrated]
    originals: dict[str, Calibrated]
    skipped: dict[str, str]
    index: float | None

    @property
    def verdict(self) -> Verdict:
        """Of the audited models."""
        return judge(list(self.audits.values()))

    @property
    def original_verdict(self) -> Verdict:
        """Of the original."""
        return judge(list(self.originals.values()))


def audit_models(audited: Group, references: Group, context: Context) -> Audited:
    """Audit `audited` against `references`, and each fold of references against the others.

    Raises UserError where there are too few references for two folds.
    """
    size = len(audited)
    folds = leave_out(len(references), size)
    if len(folds) < 2:
        raise UserError(
            f"{len(references)} references for {size} audited models: expected at least {2 * size}, so that "
            "as many can be held out twice"
        )
    left = len(references) - size
    audits, originals, skipped = {}, {}, {}
    for name, audit in find_audits().items():
        if size < audit.audited or left < audit.references:
            skipped[name] = (
                f"needs {audit.audited} audited models, and {audit.references} references beside as many"
            )
            continue
        audits[name] = _calibrate(audit, audited, references, context, folds)
        if audit.audited == 1:
            originals[name] = _calibrate(audit, context.originals, references, context, folds)
    return Audited(audits, originals, skipped, _index(audits, originals))


def _calibrate(
    audit: Audit, group: Group, references: Group, context: Context, folds: list[tuple[list[int], list[int]]]
) -> Calibrated:
    ours, theirs = [], []
    for out, left in folds:
        against = [references[i] for i in left]
        ours.append(audit.score(group, against, context))
        theirs.append(audit.score([references[i] for i in out], against, context))
    assert all(map(math.isfinite, (*ours, *theirs))), audit.name
    images = int(context.forget_counts.sum())
    resolution = 100 / images if audit.resolution is None else audit.resolution
    return Calibrated(tuple(ours), tuple(theirs), audit.side, resolution)


def _index(audits: dict[str, Calibrated], originals: dict[str, Calibrated]) -> float | None:
    ours, before = audits["information"], originals["information"]
    retrained = sum(ours.held_out) / len(ours.held_out)
    return information_difference_index(ours.value, before.value, retrained)
