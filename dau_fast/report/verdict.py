"""What the numbers say, in plain words: for the page and for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dau_fast.report.reading import (
    Report,
    factor_text,
    is_control,
    is_reference,
    known,
    measuring_noise,
    method_name,
    method_order,
    number_text,
    seconds_text,
)


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence. details: what it rests on. tone: "good", "open" or "bad".

    notes: what must not be overlooked, of any method.
    """

    headline: str
    details: tuple[str, ...]
    tone: str
    notes: tuple[str, ...] = ()


def verdict(report: Report) -> Verdict:
    """Which method came closest to retraining, how close, and how sure that is.

    None is named that does not come closer than the original by more than the noise, and no control.
    """
    methods = report["methods"]
    gaps = {
        name: methods[name].get("avg_gap")
        for name in method_order(report)
        if not is_reference(report, name) and known(methods[name].get("avg_gap"))
    }
    controls = {name: gap for name, gap in gaps.items() if is_control(report, name)}
    gaps = {name: gap for name, gap in gaps.items() if name not in controls}
    notes = (*_ruined(report), *_imbalanced(report), *_controls(report, controls), *_earlier(report))
    if "retrain" not in methods:
        found = _without_reference(report)
    else:
        found = _judge(report, gaps) if gaps else _nothing_unlearned(report)
    return replace(found, notes=notes)


def _judge(report: Report, gaps: dict[str, float]) -> Verdict:
    """gaps: of the methods that may be named, the smallest first; at least one."""
    methods = report["methods"]
    closest = next(iter(gaps))
    gap, before = gaps[closest], methods["original"].get("avg_gap")
    noise = measuring_noise(report)
    if known(before) and abs(before - gap) <= noise:  # on either side: less than that says nothing
        return Verdict(
            "No method brought the model closer to one retrained from scratch by more than the noise: "
            f"avg gap {gap:.2f} points at best ({method_name(report, closest)}), {before:.2f} before.",
            (_name_noise(report, noise), *_others(report, gaps)),
            "open",
        )
    if known(before) and gap > before:
        headline = (
            "No method brought the model closer to one retrained from scratch than it was when "
            f"untouched: avg gap {gap:.2f} points at best ({method_name(report, closest)}), "
            f"{before:.2f} before."
        )
        return Verdict(headline, _others(report, gaps), "bad")
    among = "Of the methods that do not retrain, " if _retrained_closer(report, gap) else ""
    headline = (
        f"{among}{method_name(report, closest)} comes closest to a model retrained from scratch: avg gap "
        f"{gap:.2f} points{_speed(methods[closest])}."
    )
    tone, certainty = _against_noise(report, gap)
    return Verdict(headline, (certainty, _basis(report, closest), *_others(report, gaps)), tone)


def _retrained_closer(report: Report, gap: float) -> bool:
    """Whether a model that was retrained by another recipe stands in the table with a smaller gap."""
    others = [name for name in report["methods"] if is_reference(report, name) and name != "retrain"]
    gaps = [report["methods"][name].get("avg_gap") for name in others]
    return any(known(found) and found < gap for found in gaps)


def _name_noise(report: Report, noise: float) -> str:
    if known(report.get("noise_floor")):
        return f"Two independent retrainings differ by {noise:.2f} points on average."
    return (
        f"One image more or less in every rate makes {noise:.2f} points here; several repeats measure how "
        "far retrainings differ."
    )


# Points of retain accuracy, beyond two standard errors, that a method may cost and not have ruined the model.
_LOSS = 2.0


def _ruined(report: Report) -> tuple[str, ...]:
    """Who left a model that no longer knows its retain set, which no average may hide.

    Nobody is asked for more of it than a retrained model knows.
    """
    methods, count = report["methods"], report["run"].get("sets", {}).get("retain")
    before, retrained = (methods.get(name, {}).get("ra") for name in ("original", "retrain"))
    if not known(before):
        return ()
    wanted = min(before, retrained) if known(retrained) else before
    error = math.sqrt(before * (100 - before) / count) if count else 0.0
    lost = [
        f"{method_name(report, name)} {measured['ra']:.1f} %"
        for name, measured in methods.items()
        if name != "original"
        and not is_reference(report, name)
        and known(measured.get("ra"))
        and measured["ra"] < wanted - _LOSS - 2 * error
    ]
    if not lost:
        return ()
    return (f"Ruined, from {before:.1f} % of the retain set known before: {', '.join(lost)}.",)


# A set counts as imbalanced where its largest class has so many times the images of its smallest. Our draws,
# which are per class, stay far below that, and the usual long-tailed sets begin at 10 (arXiv 1901.05555).
_IMBALANCED = 3


def _imbalanced(report: Report) -> tuple[str, ...]:
    """Accuracies in which every class counts alike, where a few classes make up most of a set."""
    sizes = report["run"].get("class_sizes") or {}
    if not any(most >= _IMBALANCED * least for least, most in sizes.values()):
        return ()
    ranges = ", ".join(f"{least:,} to {most:,} in the {name} set" for name, (least, most) in sizes.items())
    found = [
        f"{method_name(report, name)} {number_text(rates['ra'])} and {number_text(rates['ta'])} %"
        for name in method_order(report)
        if (rates := report["methods"][name].get("balanced"))
    ]
    told = f"; RA and TA as means over classes: {', '.join(found)}" if found else ""
    return (f"Classes are imbalanced, images a class {ranges}{told}.",)


def _controls(report: Report, gaps: dict[str, float]) -> tuple[str, ...]:
    found = [f"{method_name(report, name)} {gap:.2f}" for name, gap in gaps.items()]
    return (f"Controls, which hide and do not forget: {', '.join(found)}.",) if found else ()


def _earlier(report: Report) -> tuple[str, ...]:
    """What became of images that earlier requests forgot, where there were any."""
    found = [
        f"{method_name(report, name)} {measured['earlier']['ua']:.1f} %"
        for name in method_order(report)
        if (measured := report["methods"][name]).get("earlier")
    ]
    count = report["run"].get("sets", {}).get("earlier")
    return (f"Error on {count:,} images of earlier requests: {', '.join(found)}.",) if found and count else ()


def _without_reference(report: Report) -> Verdict:
    details = [
        f"{method_name(report, name)}: forget-set accuracy {100 - measured['ua']:.1f} %, test accuracy "
        f"{number_text(measured.get('ta'))} %{_after(measured.get('seconds'))}."
        for name, measured in report["methods"].items()
        if known(measured.get("ua"))
    ]
    headline = (
        "No model was retrained in this run, so it cannot say how close any method comes to one; "
        "a run with retrain among its methods can."
    )
    return Verdict(headline, tuple(details), "open")


def _after(seconds: object) -> str:
    return f", after {seconds_text(seconds)} s" if known(seconds) else ""


def _nothing_unlearned(report: Report) -> Verdict:
    gap = report["methods"]["original"].get("avg_gap")
    distance = f"{gap:.2f} points from it on average" if known(gap) else "at an unknown distance"
    return Verdict(
        "Only the original and the retrained model were measured: no unlearning method ran.",
        (f"The original is {distance}; that is the gap a method has to close.",),
        "open",
    )


def _speed(measured: dict[str, Any]) -> str:
    speedup, against_fast = measured.get("speedup"), measured.get("speedup_fast")
    if not known(speedup) or speedup <= 0:
        return ""
    fast = ""
    if known(against_fast) and against_fast > 0:
        fast = f" ({factor_text(against_fast)} times by the fast recipe)"
    if speedup >= 1:
        return f", {factor_text(speedup)} times as fast as retraining{fast}"
    return f", but it takes {factor_text(1 / speedup)} times as long as retraining"


def _basis(report: Report, closest: str) -> str:
    """What the closest method is compared with, and what it cost."""
    methods = report["methods"]
    before, compiling = methods["original"].get("avg_gap"), methods[closest].get("compile_seconds")
    start = f"The untouched original's avg gap is {before:.2f}. " if known(before) else ""
    more = f" (and {seconds_text(compiling)} s compiling)" if known(compiling) and compiling else ""
    taken, retraining = (seconds_text(methods[name].get("seconds")) for name in (closest, "retrain"))
    return f"{start}{method_name(report, closest)} took {taken} s{more}, retraining {retraining} s."


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


def _others(report: Report, gaps: dict[str, float]) -> tuple[str, ...]:
    rest = [f"{method_name(report, name)} {gap:.2f}" for name, gap in list(gaps.items())[1:]]
    return (f"The other methods' avg gaps: {', '.join(rest)}.",) if rest else ()
