"""The report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dau_fast.engine.profiling import OUTSIDE, WAITING
from dau_fast.errors import printable
from dau_fast.report.reading import ATTACKS, attack_labels, method_name, seconds_text
from dau_fast.report.verdict import verdict

# The share of waiting from which the table speaks of it.
_NOTED = 0.1


def table(report: dict[str, Any]) -> Table:
    """One row a method: what it scores, how far that is from the retrained model, what it cost."""
    run = report["run"]
    forget = run["forget"]
    rows = Table(
        title=Text(
            f"{run['dataset']}, {run['arch']}: {forget['count']:,} of "
            f"{run['sets']['train']:,} training images forgotten ({printable(forget['spec'])})"
        ),
        caption=Text(printable(_caption(report))),
        caption_justify="left",
        title_justify="left",
        title_style="bold",
        caption_style="",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    rows.add_column("method", no_wrap=True)
    others = {name: label for name, label in attack_labels(report).items() if name not in ATTACKS}
    for heading in ("UA", "RA", "TA", "MIA-efficacy", *others.values(), "avg gap", "seconds", "speedup"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for name, entry in report["methods"].items():
        rows.add_row(method_name(report, name), *_cells(name, entry, others), style=_style(name))
    return rows


def _cells(name: str, entry: dict[str, Any], attacks: Iterable[str]) -> list[str]:
    others = {f"attack_{attack}": (entry.get("attacks") or {}).get(attack) for attack in attacks}
    shown = entry | others

    def cell(key: str, decimals: int = 1, unit: str = "") -> str:
        value = shown[key]
        return "-" if value is None else f"{value:.{decimals}f}{unit}"

    # Spread beside every number does not fit a terminal; the page has it.
    spread = (entry.get("spread") or {}).get("avg_gap")
    gap = cell("avg_gap", 2) + (f" ± {spread:.2f}" if spread is not None else "")
    rates = [cell(key) for key in ("ua", "ra", "ta", "mia_efficacy", *others)]
    return [*rates, "reference" if name == "retrain" else gap, cell("seconds", 2), cell("speedup", 1, "x")]


def _style(name: str) -> str:
    return {"original": "dim", "retrain": "bold"}.get(name, "")


def _caption(report: dict[str, Any]) -> str:
    words = verdict(report)
    return "\n".join(
        [
            words.headline,
            *words.details[:1],
            *words.notes,
            *_tuning(report.get("tuning")),
            *_waiting(report["run"].get("waiting", {})),
            "avg gap: mean distance to the retrained model in the four rates, in points; smaller is better.",
            "UA: error on the forget set; RA, TA: accuracy on retain and test set; "
            "MIA-efficacy: forget images an attack takes for unseen ones.",
        ]
    )


def _tuning(tuned: dict[str, dict[str, Any]] | None) -> list[str]:
    """A line that says how the settings of `tuned` methods were found."""
    if not tuned:
        return []
    most = max(len(tuning["trials"]) for tuning in tuned.values())
    seconds = seconds_text(sum(tuning["seconds"] for tuning in tuned.values()))
    return [
        f"Tuned on validation images: {len(tuned)} methods, {most} settings each, in {seconds} s; "
        "seconds and speedup are of the best one alone."
    ]


def _waiting(shares: dict[str, float]) -> list[str]:
    """A line that names the loops whose steps waited long for data; `shares`: 0 to 1, by loop."""
    slow = [f"{100 * share:.0f} % in {loop}" for loop, share in shares.items() if share > _NOTED]
    return [f"Steps waited for data, of their time: {', '.join(slow)}."] if slow else []


def profile_table(loops: dict[str, dict[str, Any]]) -> Table:
    """Percent of a step's time by section and loop, and the milliseconds of a step."""
    most = max(found["steps"] for found in loops.values())
    rows = Table(
        title=Text(f"where the time goes, percent (first {most} steps of each loop)"),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    rows.add_column("section", no_wrap=True)
    for loop in loops:
        rows.add_column(loop, justify="right")
    # Waiting lies inside the sections.
    wholes = [
        sum(taken for name, taken in found["seconds"].items() if name != WAITING) for found in loops.values()
    ]
    sections = dict.fromkeys(name for found in loops.values() for name in found["seconds"])
    for name in sorted(sections, key=(OUTSIDE, WAITING).__contains__):
        shares = [
            f"{100 * found['seconds'][name] / whole:.1f}" if name in found["seconds"] and whole else "-"
            for found, whole in zip(loops.values(), wholes, strict=True)
        ]
        rows.add_row(name, *shares)
    steps = [found["steps"] for found in loops.values()]
    milliseconds = [f"{1000 * whole / n:.2f}" for whole, n in zip(wholes, steps, strict=True)]
    rows.add_row("ms a step", *milliseconds, style="bold")
    return rows
