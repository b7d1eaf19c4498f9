"""Further pictures of the report: what closeness costs in time."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from dau_fast.report.drawing import (
    BAND,
    INK,
    PAPER,
    choose_look,
    house_style,
    note,
    page_wide,
    suffixed,
    to_svg,
)
from dau_fast.report.reading import Report, known, method_name, method_order


def gap_against_time(report: Report, *, narrow: bool = False) -> str | None:
    """Every method by its seconds and its avg gap; None where fewer than two have both."""
    methods = report["methods"]
    shown = [
        name
        for name in method_order(report)
        if known(methods[name].get("avg_gap"))
        and known(seconds := methods[name].get("seconds"))
        and seconds > 0
    ]
    if len(shown) < 2:
        return None
    with house_style():
        figure = page_wide(3.6, narrow=narrow)
        axes = figure.subplots()
        floor = report.get("noise_floor")
        if known(floor):
            axes.axhspan(0, floor, color=BAND, lw=0)
        for name in shown:
            _point(axes, report, name)
        _scales(axes, [methods[name]["seconds"] for name in shown])
        figure.legend(loc="outside upper left", ncols=2 if narrow else min(len(shown), 6))
        names = ", ".join(method_name(report, name) for name in shown)
        text = f"Scatter plot of avg gap against seconds, logarithmic: {names}"
        return to_svg(figure, suffixed("cost", narrow), text)


def _point(axes: Axes, report: Report, name: str) -> None:
    measured, (color, marker) = report["methods"][name], choose_look(report, name)
    spread = measured.get("spread") or {}
    at = measured["seconds"], measured["avg_gap"]
    deviation = spread.get("avg_gap")
    if known(deviation):
        axes.errorbar(*at, yerr=deviation, color=color, capsize=3, lw=1.2)
    label = method_name(report, name)
    axes.plot(*at, color=color, marker=marker, ms=9, mec=PAPER, mew=0.8, ls="", label=label, clip_on=False)
    if name in ("original", "retrain", "dau"):
        note(axes, label, at, (0, 8), fontsize=9)


def _scales(axes: Axes, seconds: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 2, max(seconds) * 2)
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if max(seconds) < 50 * min(seconds) else (1.0,))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("seconds, log scale")
    axes.set_ylabel("avg gap (points)")
    axes.set_ylim(0, max(axes.dataLim.y1 * 1.2, 0.1))
    axes.axhline(0, color=INK, lw=1.4, clip_on=False, zorder=1.5)
    axes.grid()
