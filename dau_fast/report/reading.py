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


def attack_labels(report: Report) -> dict[str, str]:
    """The five attacks, and those of others that some method of the report has, by name."""
    measured = [name for entry in report["methods"].values() for name in entry.get("attacks") or ()]
    return ATTACKS | {name: name.replace("_", " ") for name in measured if name not in ATTACKS}


_UNKNOWN = "\u2013"


def known(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number: it may be null, and a ruined model gives NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def method_order(report: Report) -> list[str]:
    """The report's methods: the original, the retrained ones, then the others from the closest on."""
    methods = report["methods"]
    references = [name for name in methods if is_reference(report, name)]
    others = [name for name in methods if name not in references]
    gaps = {name: methods[name].get("avg_gap") for name in others}
    others.sort(key=lambda name: gaps[name] if known(gaps[name]) else math.inf)
    references.sort(key=lambda name: (name != "original", name != "retrain"))
    return references + others


def is_reference(report: Report, method: str) -> bool:
    """Whether the others start from `method` or are held to it."""
    row = _row(report, method)
    return bool(row["reference"]) if row else method == "original" or method.startswith("retrain")


def is_control(report: Report, method: str) -> bool:
    """Whether `method` hides and does not forget, so that nobody is to take it for the best."""
    return bool((_row(report, method) or {}).get("control"))


def measuring_noise(report: Report) -> float:
    """Points of avg gap that chance alone makes: the noise floor, or one image more or less in every rate."""
    floor, sets = report.get("noise_floor"), report["run"].get("sets", {})
    if known(floor):
        return floor
    counts = [sets.get(name) for name in ("forget", "forget", "retain", "test")]
    return sum(100 / count for count in counts if count) / 4


def method_name(report: Report, method: str) -> str:
    """What people read for `method`."""
    row = _row(report, method)
    return str(row["label"]) if row else method


def method_about(report: Report, method: str) -> str:
    """What `method` does, one phrase."""
    if method == "original":
        return "the trained model, untouched"
    row = _row(report, method)
    return str(row["about"]) if row else ""


def _row(report: Report, method: str) -> dict[str, Any] | None:
    """What the run says of `method`; None of the original."""
    found: dict[str, Any] | None = report["run"].get("methods", {}).get(method)
    return found


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
