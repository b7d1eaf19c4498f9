"""The report's pictures: SVG strings drawn from the report dictionary and from nothing else.

Every picture is 900 CSS pixels wide, or 355 for telephones ("narrow"), where its panels are below each
other, and the same bytes for the same dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

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
from dau_fast.report.reading import (
    MEASURES,
    Report,
    attack_labels,
    difference,
    is_reference,
    known,
    method_name,
    method_order,
    signed_text,
    spread,
)

# ---- the four pictures


def comparison(report: Report, *, narrow: bool = False) -> str:
    """How far every method is from the retrained; the rates themselves where none was retrained."""
    has_reference = "retrain" in report["methods"]
    rows = [name for name in method_order(report) if name != "retrain"]
    count = 5 if has_reference else 4
    with house_style():
        panel = 1.15 + 0.46 * len(rows)
        figure = page_wide(count * (panel + 0.1) if narrow else panel, narrow=narrow)
        axes = figure.subplots(*((count, 1) if narrow else (1, count)), sharey=True)
        if has_reference:
            _differences(report, rows, axes)
        else:
            _rates(report, rows, axes)
        _label_rows(report, axes[0], rows)
        names = ", ".join(method_name(report, name) for name in rows)
        what = "distance to the retrained model" if has_reference else "the rates themselves"
        text = f"Dot plot of UA, RA, TA and MIA-efficacy, {what}: {names}"
        return to_svg(figure, suffixed("comparison", narrow), text)


def attacks(report: Report, *, narrow: bool = False) -> str:
    """Share of the forget set that each of the attacks calls non-member, for every method."""
    methods = method_order(report)
    with house_style():
        figure = page_wide(1.4 + 0.75 * len(methods) if narrow else 3.6, narrow=narrow)
        axes = figure.subplots()
        for place, method in enumerate(methods):
            offset = (place - (len(methods) - 1) / 2) * 0.84 / len(methods)
            _attack_bars(axes, report, method, offset, lying=narrow)
        _attack_references(axes, report, lying=narrow)
        labels = attack_labels(report)
        across, along = (axes.yaxis, axes.xaxis) if narrow else (axes.xaxis, axes.yaxis)
        across.set_ticks(range(len(labels)), [name.replace(" ", "\n") for name in labels.values()])
        across.set_tick_params(length=0, labelsize=10)
        along.set_label_text("forget set called non-member (%)")
        along.grid(True)
        ends, highest = (-0.5, len(labels) - 0.5), axes.dataLim.x1 if narrow else axes.dataLim.y1
        limits = ends, (0, max(1.0, highest * (1.18 if narrow else 1.1)))
        axes.set(**dict(zip(("ylim", "xlim") if narrow else ("xlim", "ylim"), limits, strict=True)))
        if narrow:
            axes.invert_yaxis()
        figure.legend(loc="outside upper left", ncols=min(len(methods), 2 if narrow else 6))
        names = ", ".join(method_name(report, name) for name in methods)
        text = f"Bar chart of {len(labels)} membership attacks on {names}"
        return to_svg(figure, suffixed("attacks", narrow), text)


def confidences(report: Report, *, narrow: bool = False) -> str:
    """Histograms of the probability of the true label, before, retrained and after unlearning."""
    methods = before_and_after(report, "confidence")
    count = max(1, len(methods))
    with house_style():
        figure = page_wide(2.3 * count + 0.5 if narrow else 3.3, narrow=narrow)
        shape = (count, 1) if narrow else (1, count)
        panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
        floor = _histogram_floor(report, methods)
        for axes, method in zip(panels, methods, strict=False):
            _histogram(axes, report["methods"][method]["confidence"], floor)
            before = " (before)" if method == "original" else ""
            axes.set_title(method_name(report, method) + before, loc="left", weight="bold")
        figure.supylabel("share of the set (%), log scale", fontsize=10)
        if methods:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=2 if narrow else len(handles))
        names = ", ".join(method_name(report, name) for name in methods) or "no method"
        text = f"Histograms of the confidence on forget, validation and test set: {names}"
        return to_svg(figure, suffixed("confidences", narrow), text)


def game(report: Report, *, narrow: bool = False) -> str | None:
    """The attacker's AUC and the accuracies over the game; None if there was none."""
    history = report.get("game")
    if not history:
        return None
    with house_style():
        figure = page_wide(5.8 if narrow else 3.2, narrow=narrow)
        first, second = figure.subplots(*((2, 1) if narrow else (1, 2)))
        _game_auc(first, history)
        _game_accuracies(second, history, report)
        for axes in (first, second):
            axes.set_xlabel("game step (0 is the original)")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
        text = "Line charts over the game: the attacker's AUC, and accuracies of three sets"
        return to_svg(figure, suffixed("game", narrow), text)


# ---- comparison


def _differences(report: Report, rows: Sequence[str], panels: Sequence[Axes]) -> None:
    limit = _difference_limit(report, rows)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=False):
        reference = report["methods"]["retrain"].get(measure)
        axes.set_title(f"{title}\n", loc="left", weight="bold")
        shown = f"retrained: {reference:.1f} %" if known(reference) else "retrained: unknown"
        _subtitle(axes, shown)
        deviation = spread(report, "retrain", measure)
        if deviation:
            axes.axvspan(-deviation, deviation, color=BAND, lw=0)
        axes.set_xlim(-limit, limit)
        axes.set_xticks([-limit, 0, limit], [signed_text(-limit, 0), "0", signed_text(limit, 0)])
        axes.set_xlabel("difference (points)")
        for row, method in enumerate(rows):
            value = difference(report, method, measure)
            _dot(axes, row, method, report, value, spread(report, method, measure), signed=True)
    _gap_panel(report, rows, panels[-1], limit)


def _gap_panel(report: Report, rows: Sequence[str], axes: Axes, limit: float) -> None:
    floor = report.get("noise_floor")
    axes.set_title("avg gap\n", loc="left", weight="bold")
    _subtitle(axes, f"noise floor: {floor:.2f}" if known(floor) else "mean of the four")
    if known(floor):
        axes.axvspan(0, floor, color=BAND, lw=0)
    axes.set_xlim(0, limit)
    axes.set_xticks([0, limit / 2, limit], ["0", f"{limit / 2:g}", f"{limit:g}"])
    axes.set_xlabel("avg gap (points)")
    for row, method in enumerate(rows):
        value = report["methods"][method].get("avg_gap")
        _dot(axes, row, method, report, value, spread(report, method, "avg_gap"), signed=False)


def _rates(report: Report, rows: Sequence[str], panels: Sequence[Axes]) -> None:
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        axes.set_title(title, loc="left", weight="bold")
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent")
        for row, method in enumerate(rows):
            value = report["methods"][method].get(measure)
            _dot(axes, row, method, report, value, spread(report, method, measure), signed=False)


def _difference_limit(report: Report, rows: Sequence[str]) -> float:
    """A round axis end, in points, with room for the closer half of the methods.

    One ruined model must not squeeze the others onto the reference line; it gets an arrow instead.
    """
    worst = sorted(
        max((abs(d) for m in MEASURES if (d := difference(report, name, m)) is not None), default=0)
        for name in rows
    )
    wanted = 1.1 * worst[(len(worst) - 1) // 2]
    return next((end for end in (5.0, 10.0, 20.0, 50.0) if end >= wanted), 100.0)


def _dot(
    axes: Axes,
    row: int,
    method: str,
    report: Report,
    value: float | None,
    deviation: float,
    *,
    signed: bool,
) -> None:
    """One value as a marker on a stem, with its number above; an arrow where it leaves the axis."""
    low, high = axes.get_xlim()
    if value is None or not known(value):
        axes.text((low + high) / 2, row, "not measured", ha="center", va="center", color=MUTED)
        return
    color, marker = choose_look(report, method)
    end = min(max(value, low), high)
    axes.plot([0, end], [row, row], color=color, lw=2.5, solid_capstyle="butt", alpha=0.55)
    if end == value:
        axes.errorbar(value, row, xerr=deviation or None, color=color, capsize=3, lw=1.2)
    else:
        marker = ">" if value > high else "<"
    axes.plot(end, row, color=color, marker=marker, ms=8, mec=PAPER, mew=0.8, clip_on=False)
    place = (end - low) / (high - low)
    align = "left" if place < 0.15 else "right" if place > 0.85 else "center"
    note(axes, signed_text(value) if signed else f"{value:.1f}", (end, row), (0, 6), ha=align)


def _label_rows(report: Report, axes: Axes, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), [method_name(report, name) for name in rows])
    axes.set_ylim(len(rows) - 0.6, -0.75)
    for panel in axes.figure.axes:
        panel.tick_params(axis="y", length=0, pad=10)
        panel.spines["left"].set_visible(False)
        panel.grid(axis="x")
        panel.axvline(0, color=INK, lw=1.4, zorder=1.5)


def _subtitle(axes: Axes, text: str) -> None:
    note(axes, text, (0, 1), (0, 4), xycoords="axes fraction", ha="left", color=MUTED)


# ---- attacks


def _attack_bars(axes: Axes, report: Report, method: str, offset: float, *, lying: bool) -> None:
    methods, names = report["methods"], attack_labels(report)
    values = [methods[method]["attacks"].get(name) for name in names]
    heights = [value if known(value) else math.nan for value in values]
    deviations = methods[method].get("spread", {}).get("attacks", {})
    errors = [deviations.get(name) or 0 for name in names]
    places = [place + offset for place in range(len(names))]
    color, width = choose_look(report, method)[0], 0.84 / len(methods)
    draw = axes.barh if lying else axes.bar
    draw(places, heights, width, color=color, edgecolor=PAPER, label=method_name(report, method))
    if any(errors):
        look: dict[str, Any] = {"fmt": "none", "color": INK, "elinewidth": 1, "capsize": 2}
        if lying:
            axes.errorbar(heights, places, xerr=errors, **look)
        else:
            axes.errorbar(places, heights, yerr=errors, **look)
    if len(methods) > 6 and not lying:
        return
    for place, height, error in zip(places, heights, errors, strict=True):
        if known(height):
            text, end = f"{height:.1f}" if height < 99.95 else "100", height + error
            at, away = ((end, place), (3, 0)) if lying else ((place, end), (0, 3))
            side: dict[str, Any] = {"ha": "left", "va": "center"} if lying else {}
            note(axes, text, at, away, fontsize=9, **side)


def _attack_references(axes: Axes, report: Report, *, lying: bool) -> None:
    """The retrained's level across each group, so that every bar has it beside it."""
    levels = report["methods"].get("retrain", {}).get("attacks", {})
    for place, name in enumerate(attack_labels(report)):
        if known(levels.get(name)):
            draw = axes.vlines if lying else axes.hlines
            draw(levels[name], place - 0.46, place + 0.46, color=MUTED, lw=1, zorder=0.9)


# ---- confidences


def before_and_after(report: Report, key: str) -> list[str]:
    """The original, the retrained and DAU, or without it the closest other method, of those with `key`."""
    measured = [name for name in method_order(report) if report["methods"][name].get(key)]
    others = [name for name in measured if not is_reference(report, name)]
    after = "dau" if "dau" in others else next(iter(others), None)
    return [name for name in measured if name in ("original", "retrain", after)]


def _histogram_floor(report: Report, methods: Sequence[str]) -> float:
    """A power of ten below the smallest bin that is not empty, in percent."""
    histograms = [report["methods"][name]["confidence"] for name in methods]
    shares = [share for bins in histograms for name in _shown(bins) for share in bins[name] if share > 0]
    return 10.0 ** math.floor(math.log10(min(shares, default=1.0) / 1.5))


def _shown(confidence: Report) -> list[str]:
    """The sets of which there is a histogram."""
    return [name for name in SETS if name in confidence]


def _histogram(axes: Axes, confidence: Report, floor: float) -> None:
    edges = confidence["edges"]
    axes.set_yscale("log")
    for name in _shown(confidence):
        color, line = SETS[name]
        shares = [max(share, floor) for share in confidence[name]]
        bins = {"edges": edges, "baseline": floor, "color": color}
        axes.stairs(shares, **bins, ls=line, lw=1.8, label=f"{name} set")
        if name == "forget":
            axes.stairs(shares, **bins, alpha=0.22, fill=True)
    axes.set_ylim(floor, 130)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("probability of the true label")
    axes.minorticks_off()
    ticks = [10.0**power for power in range(round(math.log10(floor)), 3)]
    axes.set_yticks(ticks, ["0" if tick == floor else f"{tick:g}" for tick in ticks])
    axes.grid(axis="y")


# ---- game


def _game_auc(axes: Axes, history: Report) -> None:
    axes.plot(history["step"], _numbers(history["auc"]), color=INK, marker="o", ms=4, lw=1.8)
    axes.axhline(0.5, color=INK, lw=1, ls=(0, (4, 2)))
    beside = {"xycoords": ("axes fraction", "data"), "va": "top", "ha": "left", "color": MUTED}
    note(axes, "0.5: no better than guessing", (0.02, 0.5), (0, -6), **beside)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.42), max(high, 0.6))
    axes.set_ylabel("attacker's AUC")
    axes.set_title("Attacker", loc="left", weight="bold")


def _game_accuracies(axes: Axes, history: Report, report: Report) -> None:
    for name in ("forget", "validation", "retain"):
        color, _ = SETS[name]
        values = _numbers(history[f"{name}_accuracy"])
        axes.plot(history["step"], values, color=color, marker="o", ms=4, lw=1.8, label=f"{name} set")
    forgotten = report["methods"].get("retrain", {}).get("ua")
    if known(forgotten):
        label = "forget set, retrained"
        axes.axhline(100 - forgotten, color=SETS["forget"][0], lw=1.2, ls=(0, (4, 2)), label=label)
    axes.set_ylabel("accuracy (%)")
    low, high = axes.get_ylim()
    # A flat line near 100 must not look like an event.
    axes.set_ylim(min(low, 95), max(high, 100.5))
    axes.set_title("Defender", loc="left", weight="bold")
    axes.legend(loc="best", fontsize=9.5, frameon=True, framealpha=0.85, edgecolor="none")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
