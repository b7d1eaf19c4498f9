"""What the report dictionary holds, in the order, by the names and in the words that readers see."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

Report = dict[str, Any]

MEASURES = {"ua": "UA", "ra": "RA", "ta": "TA", "mia_efficacy": "MIA-efficacy"}
ATTACKS = {
    "correctness": "correctness",
    "confidence": "confidence",
    "entropy": "entropy",
    "modified_entropy": "modified entropy",
    "probability": "probability",
}

# What the methods start from and what they are compared with.
REFERENCES = ("original", "retrain", "retrain_fast", "retrain_clean")

_NAMES = {
    "retrain": "retrained", "retrain_fast": "retrained fast", "retrain_clean": "retrained clean",
    "dau": "DAU", "ft": "FT", "ga": "GA",
}  # fmt: skip
_UNKNOWN = "\u2013"


def known(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number: it may be null, and a ruined model gives NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def method_order(report: Report) -> list[str]:
    """The report's methods: the original, the retrained ones, then the others from the closest on."""
    methods = report["methods"]
    others = [name for name in methods if name not in REFERENCES]
    gaps = {name: methods[name].get("avg_gap") for name in others}
    others.sort(key=lambda name: gaps[name] if known(gaps[name]) else math.inf)
    return [name for name in REFERENCES if name in methods] + others


def method_name(method: str) -> str:
    """What the page calls `method`."""
    return _NAMES.get(method, method)


def difference(report: Report, method: str, measure: str) -> float | None:
    """`measure` of `method` minus that of the retrained, in percentage points; None if unknown."""
    value = report["methods"][method].get(measure)
    reference = report["methods"].get("retrain", {}).get(measure)
    return value - reference if known(value) and known(reference) else None


def spread(report: Report, method: str, key: str) -> float:
    """Standard deviation over the repeats, 0 where none was taken."""
    value = report["methods"][method].get("spread", {}).get(key)
    return float(value) if known(value) else 0.0


def number_text(value: object, decimals: int = 1) -> str:
    return f"{value:.{decimals}f}" if known(value) else _UNKNOWN


def seconds_text(value: object) -> str:
    """Three digits or all whole seconds."""
    if not known(value):
        return _UNKNOWN
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def factor_text(value: object) -> str:
    if not known(value):
        return _UNKNOWN
    return f"{value:,.{2 if value < 2 else 1 if value < 100 else 0}f}"


def signed_text(value: float, decimals: int = 1) -> str:
    """A difference with its sign, a real minus, and no sign on what rounds to zero."""
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "\u2212") if text.strip("+-0.") else text[1:]
