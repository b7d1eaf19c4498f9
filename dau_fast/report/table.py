"""The report as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dau_fast.report.reading import method_name
from dau_fast.report.verdict import verdict


def table(report: dict[str, Any]) -> Table:
    """One row a method: what it scores, how far that is from the retrained model, what it cost."""
    run = report["run"]
    forget = run["forget"]
    rows = Table(
        title=Text(
            f"{run['dataset']}, {run['arch']}: {forget['count']:,} of "
            f"{run['sets']['train']:,} training images forgotten ({forget['spec']})"
        ),
        caption=Text(_caption(report)),
        caption_justify="left",
        title_justify="left",
        title_style="bold",
        caption_style="",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    rows.add_column("method", no_wrap=True)
    for heading in ("UA", "RA", "TA", "MIA-efficacy", "avg gap", "seconds", "speedup"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for name, entry in report["methods"].items():
        rows.add_row(method_name(name), *_cells(name, entry), style=_style(name))
    return rows


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    def cell(key: str, decimals: int = 1, unit: str = "") -> str:
        value = entry[key]
        return "-" if value is None else f"{value:.{decimals}f}{unit}"

    # Spread beside every number does not fit a terminal; the page has it.
    spread = (entry.get("spread") or {}).get("avg_gap")
    gap = cell("avg_gap", 2) + (f" ± {spread:.2f}" if spread is not None else "")
    rates = [cell(key) for key in ("ua", "ra", "ta", "mia_efficacy")]
    return [*rates, "reference" if name == "retrain" else gap, cell("seconds", 2), cell("speedup", 1, "x")]


def _style(name: str) -> str:
    return {"original": "dim", "retrain": "bold"}.get(name, "")


def _caption(report: dict[str, Any]) -> str:
    words = verdict(report)
    return "\n".join(
        [
            words.headline,
            *words.details[:1],
            "avg gap: mean distance to the retrained model in the four rates, in points; smaller is better.",
            "UA: error on the forget set; RA, TA: accuracy on retain and test set; "
            "MIA-efficacy: forget images an attack takes for unseen ones.",
        ]
    )
