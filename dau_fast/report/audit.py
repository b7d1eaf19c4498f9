"""What an audit found, as a dictionary and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dau_fast.audits import calibration
from dau_fast.audits.calibration import Calibrated
from dau_fast.audits.catalogue import find_audits
from dau_fast.errors import printable
from dau_fast.job.audit import AuditOutcome, AuditRequest
from dau_fast.metrics.gaps import gap_to_mean, mean_gap, mean_measures, signed_gaps
from dau_fast.report.facts import count_sets, describe_forget_set, list_versions
from dau_fast.report.verdict import Verdict

SCHEMA = 1


def describe_audit(
    request: AuditRequest, outcome: AuditOutcome, started: datetime, seconds: float
) -> dict[str, Any]:
    """audit.json: how it ran, the verdict, every audit, and every rate's signed gap."""
    run, found, split = request.run, outcome.audited, outcome.task.split
    return {
        "schema": SCHEMA,
        "run": {
            "dataset": run.dataset,
            "arch": run.arch_name,
            "forget": describe_forget_set(run.to_options()["forget"], split),
            "seed": run.seed,
            "sets": count_sets(split),
            "checkpoints": [_text(path) for path in request.checkpoints],
            "original": _text(run.checkpoint),
            "references": [_text(name) for name in outcome.reference_files],
            "trained_references": len(outcome.trained),
            "settings": asdict(outcome.config),
            "versions": list_versions(),
            "started": started.isoformat(timespec="seconds"),
            "wall_seconds": seconds,
        },
        "verdict": _describe_verdict(found.verdict),
        "original": _describe_verdict(found.original_verdict),
        "gaps": _describe_gaps(outcome),
        "information_difference_index": found.index,
        "audits": {name: _describe(name, kept, found.originals) for name, kept in found.audits.items()},
        "skipped": found.skipped,
    }


def _text(path: object) -> str:
    return str(path).encode(errors="replace").decode()


def _describe_verdict(verdict: calibration.Verdict) -> dict[str, Any]:
    return {
        "inside": verdict.inside,
        "p_value": verdict.p_value,
        "false_alarm_rate": verdict.false_alarm_rate,
        "deviation": fmean(verdict.audited),
        "deviations_of_retrained": list(verdict.held_out),
        "audits": verdict.audits,
        "outside": verdict.outside,
        "outside_expected": verdict.expected,
    }


def _describe_gaps(outcome: AuditOutcome) -> dict[str, Any]:
    """To the mean of all references: signed, and the avg gap; beside it the mean of those to each of them."""
    theirs = [reference.measures for reference in outcome.references]
    middle = mean_measures(theirs)
    sides = {
        "audited": mean_measures([one.measures for one in outcome.models]),
        "original": outcome.original.measures,
    }
    floors = [gap_to_mean(one, [*theirs[:i], *theirs[i + 1 :]]) for i, one in enumerate(theirs)]
    return {
        **{
            name: {
                "signed": signed_gaps(one, middle),
                "to_mean": gap_to_mean(one, theirs),
                "mean_of_pairs": mean_gap(one, theirs),
            }
            for name, one in sides.items()
        },
        "retrained_to_mean_of_others": floors,
    }


def _describe(name: str, found: Calibrated, originals: Mapping[str, Calibrated]) -> dict[str, Any]:
    audit, before = find_audits()[name], originals.get(name)
    low, high = found.band
    return {
        "label": audit.label,
        "unit": audit.unit,
        "side": found.side,
        "value": found.value,
        "gap": found.value - fmean(found.held_out),
        "low": low,
        "high": high,
        "retrained": list(found.held_out),
        "outside": found.outside,
        "p_value": found.p_value,
        "false_alarm_rate": found.false_alarm_rate,
        "original": None if before is None else before.value,
        "original_outside": None if before is None else before.outside,
    }


# ---- what it says


def audit_verdict(report: dict[str, Any]) -> Verdict:
    """Whether the audits tell the models from retrained ones, and what that is worth."""
    verdict, before = report["verdict"], report["original"]
    retrained = len(report["run"]["references"])
    rate = 100 * verdict["false_alarm_rate"]
    told = (
        f"INSIDE: {verdict['audits']} audits together do not tell it from {retrained} retrained models."
        if verdict["inside"]
        else f"OUTSIDE: {verdict['audits']} audits together tell it from {retrained} retrained models."
    )
    power = (
        "The original is inside as well: these audits show nothing here."
        if before["inside"]
        else "The original is outside, as it must be."
    )
    sure = (
        f"p = {verdict['p_value']:.2f}. A retrained model would be called outside in about {rate:.0f} % "
        "of cases: more references lower that, nothing else does."
    )
    single = (
        f"Of single audits outside in {verdict['outside']} of {verdict['audits']}; a retrained model is "
        f"expected outside in {verdict['outside_expected']:.1f}."
    )
    tone = "bad" if not verdict["inside"] else "open" if before["inside"] else "good"
    return Verdict(told, (power, sure, single), tone)


def audit_word(entry: dict[str, Any]) -> str:
    """What the table says; what does not tell even the original from retrained models is blind."""
    if entry["outside"]:
        return "outside"
    return "blind" if entry["original_outside"] is False else "inside"


def audit_number(entry: dict[str, Any], key: str, sign: str = "") -> str:
    """A score in the audit's unit, with as many digits as mean something."""
    decimals = 1 if entry["unit"] in ("%", "steps") else 2
    return "-" if entry[key] is None else f"{entry[key]:{sign}.{decimals}f}"


# ---- the terminal


def audit_table(report: dict[str, Any]) -> Table:
    """One row an audit: the audited models, the band of retrained ones, the original, the verdict."""
    run = report["run"]
    rows = Table(
        title=Text(printable(f"{run['dataset']}, {run['arch']}: audit of {', '.join(run['checkpoints'])}")),
        caption=Text(printable(_caption(report))),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="",
        box=SIMPLE_HEAD,
        padding=0,
    )
    rows.add_column("audit", no_wrap=True)
    for heading in ("audited", "gap", "retrained", "original"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("verdict", no_wrap=True)
    for entry in report["audits"].values():
        rows.add_row(*_cells(entry), style="bold" if entry["outside"] else "")
    return rows


def _cells(entry: dict[str, Any]) -> list[str]:
    value, low, high, before = (audit_number(entry, key) for key in ("value", "low", "high", "original"))
    gap = audit_number(entry, "gap", "+")
    return [entry["label"], value, gap, f"{low} to {high}", before, audit_word(entry)]


def _caption(report: dict[str, Any]) -> str:
    words = audit_verdict(report)
    power, *rest = words.details
    return "\n".join(
        [
            f"{words.headline} {power}",
            *rest,
            "retrained: from the least to the largest score of retrained models, each held out and audited "
            "against the others. gap: audited minus their mean.",
            "blind: inside, and so is the original: the audit shows nothing here.",
            "Rates in percent, margins, information and KLoM in nats, relearning in steps.",
            "These are statistics of models on one split, and no proof of deletion.",
        ]
    )
