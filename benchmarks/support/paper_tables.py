"""The paper's tables: rows of judgements, what they come to over seeds, and that as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from support.comparing import interval, summarise
from support.entries import Row, is_about

TITLES = {"random": "Random forgetting", "class": "Class-wise forgetting"}
PRUNINGS = {"omp": "OMP", "synflow": "SynFlow", "imp": "IMP"}
# Those that papers report, in their order.
RATES = {"ua": "UA", "confidence": "MIA-efficacy", "ra": "RA", "ta": "TA"}
RETRAINED = "retrained"

Summary = dict[str, Any]


def summarise_paper(rows: Sequence[Row]) -> list[Summary]:
    """For every task and pruning: floor, retrained models, and every entry, the nearest first."""
    found = []
    for about in list_groups(rows):
        here = [row for row in rows if is_about(row, about | {"seed": row["seed"]})]
        original = [row for row in here if row["entry"] == "original"]
        floors = {row["seed"]: row["floor"] for row in original}
        entries = [
            _summarise([row for row in here if row["entry"] == name])
            for name in dict.fromkeys(row["entry"] for row in here)
            if not name.startswith(RETRAINED)
        ]
        found.append(
            about
            | {
                "seeds": sorted(floors),
                "floor": fmean(floors.values()),
                "retraining_seconds": fmean(row["retraining_seconds"] for row in original),
                RETRAINED: _describe_retrained(here, original),
                "entries": sorted(entries, key=_rank),
            }
        )
    return found


def list_groups(rows: Sequence[Row]) -> list[Summary]:
    """Task, pruning and sparsity of all rows, each once."""
    found: list[Summary] = []
    for row in rows:
        about = {key: row.get(key) for key in ("task", "pruning", "sparsity")}
        if about not in found:
            found.append(about)
    return found


def name_pruning(summary: Summary) -> str:
    """Such as "OMP 80 %"."""
    if summary["pruning"] is None:
        return "dense"
    return f"{PRUNINGS.get(summary['pruning'], summary['pruning'])} {100 * summary['sparsity']:g} %"


def _describe_retrained(here: Sequence[Row], original: Sequence[Row]) -> Summary:
    """Rates in percent: the mean of all retrained models, the lowest and the highest one of all seeds."""
    names = original[0]["rates"]
    singles = [row["rates"] for row in here if row["entry"].startswith(RETRAINED)]
    return {
        "rates": {
            name: fmean(row["rates"][name] - row["signed"][name] for row in original) for name in names
        },
        "lowest": {name: min(rates[name] for rates in singles) for name in names},
        "highest": {name: max(rates[name] for rates in singles) for name in names},
    }


def _summarise(rows: Sequence[Row]) -> Summary:
    """One entry over seeds; `interval` and `tests` against the noise floor where there are two seeds or more.

    share: of the seconds that retraining takes, the mean over seeds.
    """
    kept = [row for row in rows if "failed" not in row]
    found: Summary = {"entry": rows[0]["entry"], "seeds": len(kept), "failed": len(rows) - len(kept)}
    if not kept:
        return found
    gaps, floors = [row["avg_gap"] for row in kept], [row["floor"] for row in kept]
    found |= {
        "avg_gap": fmean(gaps),
        "floors": fmean(gaps) / fmean(floors),
        "seconds": fmean(row["seconds"] for row in kept),
        "share": fmean(row["seconds"] / row["retraining_seconds"] for row in kept),
    }
    for what in ("rates", "signed", "margins"):
        found[what] = {name: fmean(row[what][name] for row in kept) for name in kept[0][what]}
    if len(kept) > 1:
        found |= {"interval": asdict(interval(gaps)), "tests": asdict(summarise(gaps, floors))}
    return found


def _rank(entry: Summary) -> tuple[bool, float]:
    return entry["entry"] != "original", entry.get("avg_gap", float("inf"))


# ---- Markdown


def write_tables(summaries: Sequence[Summary]) -> str:
    """A table for every task."""
    parts = []
    for task in dict.fromkeys(each["task"] for each in summaries):
        here = [each for each in summaries if each["task"] == task]
        lines = [f"## {TITLES.get(task, task)}", "", *map(_introduce, here), ""]
        heads = ["pruning", "method", *RATES.values(), "avg gap [95 %]", "floors", "RTE"]
        lines += [_join(heads), _join(["---"] * len(heads))]
        for each in here:
            lines += [_join(_retrained_cells(each)), *(_join(_cells(each, one)) for one in each["entries"])]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND]) + "\n"


LEGEND = (
    "UA, MIA-efficacy (confidence attack), RA, TA: percent, in brackets less the mean of the retrained\n"
    "models. avg gap: mean distance to single retrained models in the four, in points, with the interval of\n"
    "the mean over seeds where there are two or more; of a retrained model to the others it is the noise\n"
    "floor. RTE: seconds, and the share of what retraining takes, of which a tenth was timed beside them."
)


def _introduce(summary: Summary) -> str:
    seeds = ", ".join(map(str, summary["seeds"]))
    several = "s" if len(summary["seeds"]) > 1 else ""
    return f"- {name_pruning(summary)}: seed{several} {seeds}; noise floor {summary['floor']:.2f}."


def _retrained_cells(summary: Summary) -> list[str]:
    rates = [f"{summary[RETRAINED]['rates'][name]:.1f}" for name in RATES]
    seconds = f"{summary['retraining_seconds']:.1f}"
    return [name_pruning(summary), RETRAINED, *rates, f"{summary['floor']:.2f}", "1.0", seconds]


def _cells(summary: Summary, entry: Summary) -> list[str]:
    name = entry["entry"] if entry["entry"] == "original" else f"`{entry['entry']}`"
    if "avg_gap" not in entry:
        return [name_pruning(summary), name, "failed", *[""] * (len(RATES) + 2)]
    if entry["seeds"] < len(summary["seeds"]):
        name += f", {entry['seeds']} of {len(summary['seeds'])} seeds"
    rates = [f"{entry['rates'][rate]:.1f} ({entry['signed'][rate]:+.1f})" for rate in RATES]
    gap = f"{entry['avg_gap']:.2f}"
    if "interval" in entry:
        gap += f" [{entry['interval']['low']:.2f}, {entry['interval']['high']:.2f}]"
    cost = f"{entry['seconds']:.1f} ({entry['share']:.2f})" if entry["seconds"] else "0"
    return [name_pruning(summary), name, *rates, gap, f"{entry['floors']:.1f}", cost]


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
