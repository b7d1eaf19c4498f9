"""The report as one self-contained HTML page, from the report dictionary and from nothing else.

The words and numbers are put together here; `page.html.jinja` holds the layout and `plots` the
pictures. The page asks for nothing from outside, so it can be mailed, archived and printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dau_fast.report import plots
from dau_fast.report.plots import MEASURES, Report, known, method_name

_TEMPLATE = "page.html.jinja"
_UNKNOWN = "\u2013"
_METHODS = {
    "original": "the trained model, untouched",
    "retrain": "trained from scratch on the retain set",
    "dau": "discriminative adversarial unlearning",
    "ft": "fine-tuning on the retain set",
    "ga": "gradient ascent on the forget set",
}
_SENSITIVITY = {
    "classifier": "norm of the per-sample gradient with respect to the classifier layer",
    "input": "norm of the per-sample gradient with respect to the input",
    "parameters": "norm of the per-sample gradient with respect to all parameters",
}


def render(report: Report) -> str:
    """The HTML page for `report`, the content of report.json; equal reports give equal pages."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
    )
    game, floor = plots.game(report), report.get("noise_floor")
    return environment.get_template(_TEMPLATE).render(
        repeats=report["run"].get("repeats", 1),
        subject=_subject(report["run"]),
        verdict=_verdict(report),
        rows=[_row(report, name) for name in plots.method_order(report)],
        has_reference="retrain" in report["methods"],
        has_spread=any("spread" in measured for measured in report["methods"].values()),
        noise_floor=_number(floor, 2) if known(floor) else None,
        comparison=Markup(plots.comparison(report)),
        attacks=Markup(plots.attacks(report)),
        confidences=Markup(plots.confidences(report)),
        game=Markup(game) if game else None,
        stopped=(report.get("game") or {}).get("stopped", "").rstrip("."),
        facts=_facts(report["run"]),
    )


# ---- the verdict


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence. details: what it rests on. tone: "good", "open" or "bad"."""

    headline: str
    details: tuple[str, ...]
    tone: str


def _verdict(report: Report) -> Verdict:
    methods = report["methods"]
    gaps = {
        name: methods[name].get("avg_gap")
        for name in plots.method_order(report)
        if name not in ("original", "retrain") and known(methods[name].get("avg_gap"))
    }
    if "retrain" not in methods:
        return _without_reference(report)
    if not gaps:
        return _nothing_unlearned(report)
    closest = next(iter(gaps))
    gap, before = gaps[closest], methods["original"].get("avg_gap")
    if known(before) and gap >= before:
        headline = (
            "No method brought the model closer to one retrained from scratch than it was when "
            f"untouched: avg gap {gap:.2f} points at best ({method_name(closest)}), "
            f"{before:.2f} before."
        )
        return Verdict(headline, _others(gaps), "bad")
    headline = (
        f"{method_name(closest)} comes closest to a model retrained from scratch: avg gap "
        f"{gap:.2f} points{_speed(methods[closest].get('speedup'))}."
    )
    tone, noise = _against_noise(report, gap)
    return Verdict(headline, (noise, _basis(methods, closest), *_others(gaps)), tone)


def _without_reference(report: Report) -> Verdict:
    details = [
        f"{method_name(name)}: forget-set accuracy {100 - measured['ua']:.1f} %, test accuracy "
        f"{_number(measured.get('ta'))} %, after {_seconds(measured.get('seconds'))} s."
        for name, measured in report["methods"].items()
        if known(measured.get("ua"))
    ]
    headline = (
        "No model was retrained in this run, so it cannot say how close any method comes to one; "
        "a run with retrain among its methods can."
    )
    return Verdict(headline, tuple(details), "open")


def _nothing_unlearned(report: Report) -> Verdict:
    gap = report["methods"]["original"].get("avg_gap")
    distance = f"{gap:.2f} points from it on average" if known(gap) else "at an unknown distance"
    return Verdict(
        "Only the original and the retrained model were measured: no unlearning method ran.",
        (f"The original is {distance}; that is the gap a method has to close.",),
        "open",
    )


def _speed(speedup: object) -> str:
    if not known(speedup) or speedup <= 0:
        return ""
    if speedup >= 1:
        return f", {_factor(speedup)} times as fast as retraining"
    return f", but it takes {_factor(1 / speedup)} times as long as retraining"


def _basis(methods: Report, closest: str) -> str:
    """What the closest method is compared with, and what it cost."""
    before, compiling = methods["original"].get("avg_gap"), methods[closest].get("compile_seconds")
    start = f"The untouched original's avg gap is {before:.2f}. " if known(before) else ""
    more = f" (and {_seconds(compiling)} s compiling)" if known(compiling) and compiling else ""
    return (
        f"{start}{method_name(closest)} took {_seconds(methods[closest].get('seconds'))} s{more}, "
        f"retraining {_seconds(methods['retrain'].get('seconds'))} s."
    )


def _against_noise(report: Report, gap: float) -> tuple[str, str]:
    """Tone and sentence: whether another retraining would have come closer."""
    floor = report.get("noise_floor")
    if not known(floor):
        return "open", (
            "Whether another retraining would have come closer is not known: the noise floor needs "
            "at least two repeats of the run."
        )
    two = f"two independent retrainings differ by {floor:.2f} points on average"
    if gap <= floor:
        return "good", f"That is within the noise floor: {two}, so one more would be no closer."
    return "open", f"That is above the noise floor: {two}, so the difference is still measurable."


def _others(gaps: dict[str, float]) -> tuple[str, ...]:
    rest = [f"{method_name(name)} {gap:.2f}" for name, gap in list(gaps.items())[1:]]
    return (f"The other methods' avg gaps: {', '.join(rest)}.",) if rest else ()


# ---- the table


def _row(report: Report, method: str) -> dict[str, Any]:
    measured, spread = report["methods"][method], report["methods"][method].get("spread", {})
    is_reference = method == "retrain"
    cells = [
        {
            "value": _number(measured.get(measure)),
            "spread": _number(spread.get(measure)),
            "difference": _difference(report, method, measure),
        }
        for measure in MEASURES
    ]
    gap, floor = measured.get("avg_gap"), report.get("noise_floor")
    compiling = measured.get("compile_seconds")
    return {
        "name": method_name(method),
        "about": _METHODS.get(method, ""),
        "color": plots.method_color(report, method),
        "is_reference": is_reference,
        "cells": cells,
        "gap": None if is_reference else _number(gap, 2),
        "gap_spread": _number(spread.get("avg_gap"), 2),
        "within_noise": known(gap) and known(floor) and gap <= floor and not is_reference,
        "seconds": _seconds(measured.get("seconds")),
        "seconds_spread": _seconds(spread.get("seconds")),
        "compiling": _seconds(compiling) if known(compiling) and compiling > 0 else None,
        "speedup": _factor(measured.get("speedup")),
        "speedup_spread": _factor(spread.get("speedup")),
    }


def _difference(report: Report, method: str, measure: str) -> str | None:
    value = None if method == "retrain" else plots.difference(report, method, measure)
    return None if value is None else plots.signed_text(value)


# ---- how this was run


def _subject(run: Report) -> str:
    count = run["forget"]["count"]
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"{images} forgotten ({run['forget']['spec']}), {run['dataset']}, {run['arch']}"


def _facts(run: Report) -> list[tuple[str, str]]:
    """What a reader needs to run it again, as (term, text); what the report lacks is left out."""
    sets, forget, sensitivity = run.get("sets", {}), run["forget"], run.get("sensitivity")
    facts = [
        ("dataset", run["dataset"]),
        ("architecture", run["arch"]),
        ("images", ", ".join(f"{name} {count:,}" for name, count in sets.items())),
        ("forget set", f"{forget['spec']}, {forget['count']:,} images"),
        ("forget indices, SHA-256", forget.get("sha256")),
        ("seed", run.get("seed")),
        ("repeats", run.get("repeats")),
        ("training epochs", run.get("epochs")),
        ("sensitivity", sensitivity and _explained(sensitivity)),
        ("device", run.get("device")),
        ("versions", ", ".join(f"{name} {v}" for name, v in run.get("versions", {}).items())),
        ("started", run.get("started")),
        ("whole run", f"{_seconds(run['wall_seconds'])} s" if run.get("wall_seconds") else None),
    ]
    return [(term, str(text)) for term, text in facts if text not in (None, "")]


def _explained(sensitivity: str) -> str:
    meaning = _SENSITIVITY.get(sensitivity)
    return f"{sensitivity}: {meaning}" if meaning else sensitivity


# ---- numbers


def _number(value: object, decimals: int = 1) -> str:
    return f"{value:.{decimals}f}" if known(value) else _UNKNOWN


def _seconds(value: object) -> str:
    """Three digits or all whole seconds."""
    if not known(value):
        return _UNKNOWN
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _factor(value: object) -> str:
    if not known(value):
        return _UNKNOWN
    return f"{value:,.{2 if value < 2 else 1 if value < 100 else 0}f}"
