"""Reports that were made by hand, and a page taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from dau_fast.methods.registry import find_methods
from dau_fast.report.facts import describe_methods

ROWS = describe_methods(find_methods().values())

ATTACKS = ("correctness", "confidence", "entropy", "modified_entropy", "probability")


def method(
    rates: tuple[float, float, float, float], seconds: float, gap: float, speedup: float
) -> dict[str, Any]:
    """One entry of report["methods"]; rates are UA, RA, TA and MIA-efficacy."""
    ua, ra, ta, mia = rates
    sure = [0.0] * 18 + [10.0, 90.0]
    return {
        "ua": ua, "ra": ra, "ta": ta, "mia_efficacy": mia,
        "attacks": {name: mia + i / 10 for i, name in enumerate(ATTACKS, start=-1)},
        "seconds": seconds, "compile_seconds": 0.0, "avg_gap": gap, "speedup": speedup,
        "confidence": {
            "edges": [round(0.05 * i, 2) for i in range(21)],
            "forget": sure, "validation": [0.5] * 10 + [9.5] * 10, "test": [5.0] * 20,
        },
        "roc": {"false": [0.1, 1.0, 10.0, 100.0], "true": [0.0, 2.0, 12.0 + ua, 100.0]},
        "margins": {
            "edges": [-20.0, -10.0, 0.0, 10.0, 20.0],
            "forget": [0.0, ua, 100 - ua, 0.0], "validation": [5.0, 15.0, 75.0, 5.0], "test": [25.0] * 4,
        },
    }  # fmt: skip


def full() -> dict[str, Any]:
    return {
        "schema": 1,
        "run": {
            "methods": ROWS, "dataset": "digits", "arch": "small", "seed": 7, "repeats": 1, "device": "cpu",
            "forget": {"spec": "random:0.1", "count": 90, "sha256": "ab" * 32, "indices": [3, 5]},
            "epochs": 100, "versions": {"dau_fast": "0.1.0", "torch": "2.15.0"},
            "sets": {"train": 898, "validation": 359, "test": 540, "forget": 90, "retain": 808},
            "sensitivity": "classifier", "wall_seconds": 23.1,
            "started": "2026-01-01T10:00:00+00:00", "command": "dau_fast --forget random:0.1",
        },
        "methods": {
            "original": method((0.0, 100.0, 98.5, 1.1), 4.1, 3.95, 0.98),
            "ga": method((38.9, 62.1, 59.3, 41.1), 0.05, 35.06, 80.4),
            "dau": method((4.4, 99.8, 98.1, 10.0), 0.87, 0.68, 4.62),
            "retrain": method((5.6, 100.0, 98.3, 11.1), 4.02, 0.0, 1.0),
            "ft": method((1.1, 100.0, 98.5, 3.3), 0.61, 3.12, 6.6),
        },
        "game": {
            "step": [0, 2, 4], "auc": [0.74, 0.6, 0.51], "forget_accuracy": [100, 98.0, 94.4],
            "validation_accuracy": [98.1, 97.5, 96.9], "retain_accuracy": [100, 99.5, 99.8], "lr": 0.005,
            "turns": [2, 4],
        },
        "noise_floor": None,
    }  # fmt: skip


def repeated() -> dict[str, Any]:
    report = full()
    report["run"]["repeats"], report["noise_floor"] = 4, 0.72
    for measured in report["methods"].values():
        measured["spread"] = {
            "ua": 1.31, "ra": 0.22, "ta": 0.44, "mia_efficacy": 1.77, "avg_gap": 0.19,
            "attacks": dict.fromkeys(ATTACKS, 1.5), "seconds": 0.03, "speedup": 0.25,
        }  # fmt: skip
    return report


def score(
    label: str, value: float, retrained: list[float], original: float | None, **more: Any
) -> dict[str, Any]:
    """One entry of an audit.json's "audits", of a score that is held against a model on both sides."""
    low, high = min(retrained), max(retrained)
    return {
        "label": label, "unit": "%", "side": "both", "value": value,
        "gap": value - sum(retrained) / len(retrained), "low": low, "high": high, "retrained": retrained,
        "outside": not low <= value <= high, "p_value": 0.5, "false_alarm_rate": 0.4, "original": original,
        "original_outside": None if original is None else not low <= original <= high,
    } | more  # fmt: skip


def audited(*, inside: bool = True, original_inside: bool = False) -> dict[str, Any]:
    """The content of an audit.json, of four audits against four retrained models."""
    verdict = {
        "p_value": 0.4, "false_alarm_rate": 0.2, "deviation": 1.0, "deviations_of_retrained": [0.5] * 4,
        "audits": 4, "outside": 1, "outside_expected": 1.6,
    }  # fmt: skip
    gaps = {"signed": {"ua": -1.0}, "to_mean": 1.25, "mean_of_pairs": 1.5}
    return {
        "schema": 1,
        "run": {
            "dataset": "digits", "arch": "small", "seed": 7, "checkpoints": ["out/dau.safetensors"],
            "forget": {"spec": "random:0.1", "count": 90, "sha256": "ab" * 32, "indices": [3, 5]},
            "sets": {"train": 898, "validation": 359, "test": 540, "forget": 90, "retain": 808},
            "original": "out/original.safetensors", "trained_references": 4,
            "references": [f"reference_{i}.safetensors" for i in (1, 2, 3, 4)],
            "settings": {"relearning_steps": 200}, "versions": {"torch": "2.15.0"},
            "started": "2026-01-01T10:00:00+00:00", "wall_seconds": 23.1,
        },
        "verdict": verdict | {"inside": inside},
        "original": verdict | {"inside": original_inside},
        "gaps": {"audited": gaps, "original": gaps, "retrained_to_mean_of_others": [0.5] * 4},
        "information_difference_index": None,
        "audits": {
            "ua": score("UA", 5.0, [4.0, 5.0, 6.0, 5.0], 0.0),
            "margin": score("margins forget: shift", 3.0, [-0.5, 0.25, 0.5, 0.0], 9.0, unit="nats"),
            "noisy": score("noisy forget images known", 80.0, [80.0] * 4, 79.0),
            "klom": score("KLoM forget: mean", 1.0, [0.0, 1.0, 2.0, 2.0], 1.5, unit="nats"),
        },
        "skipped": {"ulira_auc": "needs 3", "ulira_accuracy": "needs 3", "challenge_score": "needs 4"},
    }  # fmt: skip


class Page(HTMLParser):
    """Ids, table rows, headings and text of a page; fails where tags do not close in order."""

    VOID = frozenset({"meta", "br", "wbr", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.scopes: list[str | None] = []
        self.headings: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "th":
            self.scopes.append(found.get("scope"))
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data
