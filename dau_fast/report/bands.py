"""The picture of an audit: every score against the band of retrained models, all in one unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from dau_fast.report.drawing import (
    BAND,
    GRID,
    INK,
    MUTED,
    PAPER,
    house_style,
    page_wide,
    suffixed,
    to_svg,
)

# Half a band from its middle, up to which the picture goes.
_LIMIT = 100.0
# Colour and marker of what is shown of every audit.
_AUDITED, _OUTSIDE, _ORIGINAL, _RETRAINED = ("#0072B2", "o"), ("#D55E00", "X"), ("#767676", "s"), (INK, "|")


def bands(report: dict[str, Any], *, narrow: bool = False) -> str:
    """One row an audit: the retrained models, the original and the audited models, in half bands."""
    entries = list(report["audits"].values())
    with house_style():
        figure = page_wide(1.1 + (0.3 if narrow else 0.27) * len(entries), narrow=narrow)
        axes = figure.subplots()
        axes.axvspan(-1, 1, color=BAND, lw=0, zorder=0)
        for name, look, values in _list_marks(entries):
            _mark(axes, name, look, values)
        _scale(axes, [entry["label"] for entry in entries], narrow=narrow)
        figure.legend(loc="outside upper left", ncols=2 if narrow else 4)
        outside = [entry["label"] for entry in entries if entry["outside"]]
        text = (
            f"Dot plot of {len(entries)} audits against the band of retrained models; "
            f"outside: {', '.join(outside) or 'none'}"
        )
        return to_svg(figure, suffixed("bands", narrow), text)


Marks = list[tuple[int, float]]


def _list_marks(entries: Sequence[dict[str, Any]]) -> list[tuple[str, tuple[str, str], Marks]]:
    """What is drawn, by its name in the legend: colour and marker, and (row, place) of each."""
    retrained: Marks = []
    original: Marks = []
    audited: dict[bool, Marks] = {False: [], True: []}
    for row, entry in enumerate(entries):
        retrained += [(row, _place(entry, value)) for value in entry["retrained"]]
        if entry["original"] is not None:
            original.append((row, _place(entry, entry["original"])))
        audited[entry["outside"]].append((row, _place(entry, entry["value"])))
    return [
        ("retrained", _RETRAINED, retrained),
        ("original", _ORIGINAL, original),
        ("audited, inside", _AUDITED, audited[False]),
        ("audited, outside", _OUTSIDE, audited[True]),
    ]


def _place(entry: dict[str, Any], value: float) -> float:
    """`value` in half bands from the middle of the band, -1 and 1 its ends, cut off at the picture's."""
    middle, half = (entry["low"] + entry["high"]) / 2, (entry["high"] - entry["low"]) / 2
    away = value - middle
    if abs(away) >= _LIMIT * half and away:
        return _LIMIT if away > 0 else -_LIMIT
    return away / half if half else 0.0


def _mark(axes: Axes, name: str, look: tuple[str, str], marks: Marks) -> None:
    if not marks:
        return
    color, marker = look
    rows, places = zip(*marks, strict=True)
    edge: dict[str, Any] = {} if marker == "|" else {"mec": PAPER, "mew": 0.8}
    axes.plot(places, rows, color=color, marker=marker, ms=8, ls="", label=name, clip_on=False, **edge)


def _scale(axes: Axes, labels: Sequence[str], *, narrow: bool) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xscale("symlog", linthresh=1, linscale=1)
    axes.set_xlim(-_LIMIT, _LIMIT)
    ticks = {-100: "\u2264 \u2212100", -10: "\u221210", -1: "\u22121", 1: "1", 10: "10", 100: "\u2265 100"}
    shown = [tick for tick in ticks if not narrow or abs(tick) != 10]
    axes.set_xticks(shown, [ticks[tick] for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel("half bands from the middle" if narrow else "half bands from the middle of the band")
    axes.tick_params(axis="y", length=0, pad=10, labelsize=8 if narrow else 9)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=MUTED, lw=0.8, zorder=0.5)
    axes.grid(axis="y", color=GRID)
