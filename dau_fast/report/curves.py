"""Further pictures of the report: what closeness costs in time, and one attack at all its thresholds."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from dau_fast.report.drawing import (
    BAND,
    INK,
    MUTED,
    PAPER,
    SETS,
    choose_look,
    house_style,
    note,
    page_wide,
    suffixed,
    to_svg,
)
from dau_fast.report.plots import before_and_after
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


def roc(report: Report, *, narrow: bool = False) -> str | None:
    """The attack by a threshold on the margin, for every method; None where it was not measured."""
    shown = [name for name in method_order(report) if report["methods"][name].get("roc")]
    if not shown:
        return None
    with house_style():
        figure = page_wide(3.8, narrow=narrow)
        axes = figure.subplots()
        rates = report["methods"][shown[0]]["roc"]["false"]
        look: dict[str, Any] = {"color": MUTED, "lw": 1, "ls": (0, (4, 2))}
        axes.plot(rates, rates, **look, label="guessing")
        for name in shown:
            found, (color, marker) = report["methods"][name]["roc"], choose_look(report, name)
            look = {"color": color, "marker": marker, "ms": 5, "mec": PAPER, "mew": 0.5, "lw": 1.6}
            axes.plot(found["false"], found["true"], **look, label=method_name(report, name))
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)
        axes.set(xlim=(rates[0], 100), ylim=(0, 105))
        ticks = [0.1, 1, 10, 100]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axes.minorticks_off()
        axes.set_xlabel("test set called member (%), log scale")
        axes.set_ylabel("forget set called member (%)")
        axes.grid()
        figure.legend(loc="outside upper left", ncols=2 if narrow else min(len(shown) + 1, 7))
        names = ", ".join(method_name(report, name) for name in shown)
        return to_svg(figure, suffixed("roc", narrow), f"ROC curves of a membership attack on {names}")


def margins(report: Report, *, narrow: bool = False) -> str | None:
    """Histograms of the margin of the true label, as `plots.confidences`; None where it was not measured."""
    methods = before_and_after(report, "margins")
    if not methods:
        return None
    count = len(methods)
    with house_style():
        figure = page_wide(2.1 * count + 0.5 if narrow else 3.1, narrow=narrow)
        shape = (count, 1) if narrow else (1, count)
        panels = figure.subplots(*shape, sharey=True, sharex=True, squeeze=False).ravel()
        for axes, method in zip(panels, methods, strict=True):
            found = report["methods"][method]["margins"]
            for name in (name for name in SETS if name in found):
                color, line = SETS[name]
                bins: dict[str, Any] = {"edges": found["edges"], "color": color}
                axes.stairs(found[name], **bins, ls=line, lw=1.8, label=f"{name} set")
                if name == "forget":
                    axes.stairs(found[name], **bins, alpha=0.22, fill=True)
            axes.set_title(method_name(report, method), loc="left", weight="bold")
            axes.set_xlabel("margin (nats)")
            axes.grid(axis="y")
        panels[0].set_ylim(0, None)
        figure.supylabel("share of the set (%)", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2 if narrow else len(handles))
        names = ", ".join(method_name(report, name) for name in methods)
        text = f"Histograms of the margin on forget, validation and test set: {names}"
        return to_svg(figure, suffixed("margins", narrow), text)


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
