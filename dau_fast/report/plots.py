"""The report's pictures: SVG strings drawn from the report dictionary and from nothing else.

Every picture is 900 CSS pixels wide and the same bytes for the same dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from dau_fast.report.drawing import MUTED, SETS, choose_look, house_style, note, page_wide, to_svg
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


def comparison(report: Report) -> str:
    """How far every method is from the retrained; the rates themselves where none was retrained."""
    has_reference = "retrain" in report["methods"]
    rows = [name for name in method_order(report) if name != "retrain"]
    with house_style():
        figure = page_wide(1.15 + 0.46 * len(rows))
        axes = figure.subplots(1, 5 if has_reference else 4, sharey=True)
        if has_reference:
            _differences(report, rows, axes)
        else:
            _rates(report, rows, axes)
        _label_rows(report, axes[0], rows)
        names = ", ".join(method_name(report, name) for name in rows)
        what = "distance to the retrained model" if has_reference else "the rates themselves"
        return to_svg(figure, "comparison", f"Dot plot of UA, RA, TA and MIA-efficacy, {what}: {names}")


def attacks(report: Report) -> str:
    """Share of the forget set that each of the attacks calls non-member, for every method."""
    methods = method_order(report)
    with house_style():
        figure = page_wide(3.6)
        axes = figure.subplots()
        for place, method in enumerate(methods):
            _attack_bars(axes, report, method, (place - (len(methods) - 1) / 2) * 0.84 / len(methods))
        _attack_references(axes, report)
        labels = attack_labels(report)
        axes.set_xticks(range(len(labels)), list(labels.values()), fontsize=10)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("forget set called non-member (%)")
        axes.grid(axis="y")
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(0, max(1.0, axes.dataLim.y1 * 1.1))
        figure.legend(loc="outside upper left", ncols=min(len(methods), 6))
        names = ", ".join(method_name(report, name) for name in methods)
        return to_svg(figure, "attacks", f"Bar chart of {len(labels)} membership attacks on {names}")


def confidences(report: Report) -> str:
    """Histograms of the probability of the true label, before, retrained and after unlearning."""
    methods = _before_and_after(report)
    with house_style():
        figure = page_wide(3.3)
        panels = figure.subplots(1, max(1, len(methods)), sharey=True, squeeze=False)[0]
        floor = _histogram_floor(report, methods)
        for axes, method in zip(panels, methods, strict=False):
            _histogram(axes, report["methods"][method]["confidence"], floor)
            before = " (before)" if method == "original" else ""
            axes.set_title(method_name(report, method) + before, loc="left", weight="bold")
        panels[0].set_ylabel("share of the set (%), log scale")
        if methods:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=len(handles))
        names = ", ".join(method_name(report, name) for name in methods) or "no method"
        text = f"Histograms of the confidence on forget, validation and test set: {names}"
        return to_svg(figure, "confidences", text)


def game(report: Report) -> str | None:
    """The attacker's AUC and the accuracies over the game; None if there was none."""
    history = report.get("game")
    if not history:
        return None
    with house_style():
        figure = page_wide(3.2)
        left, right = figure.subplots(1, 2)
        _game_auc(left, history)
        _game_accuracies(right, history, report)
        for axes in (left, right):
            axes.set_xlabel("game step (0 is the original)")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
        text = "Line charts over the game: the attacker's AUC, and accuracies of three sets"
        return to_svg(figure, "game", text)


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
            axes.axvspan(-deviation, deviation, color="#e4e4e4", lw=0)
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
        axes.axvspan(0, floor, color="#e4e4e4", lw=0)
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
    axes.plot(end, row, color=color, marker=marker, ms=8, mec="white", mew=0.8, clip_on=False)
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
        panel.axvline(0, color="black", lw=1.4, zorder=1.5)


def _subtitle(axes: Axes, text: str) -> None:
    note(axes, text, (0, 1), (0, 4), xycoords="axes fraction", ha="left", color=MUTED)


# ---- attacks


def _attack_bars(axes: Axes, report: Report, method: str, offset: float) -> None:
    methods, names = report["methods"], attack_labels(report)
    values = [methods[method]["attacks"].get(name) for name in names]
    heights = [value if known(value) else math.nan for value in values]
    deviations = methods[method].get("spread", {}).get("attacks", {})
    errors = [deviations.get(name) or 0 for name in names]
    places = [place + offset for place in range(len(names))]
    color, width = choose_look(report, method)[0], 0.84 / len(methods)
    axes.bar(places, heights, width, color=color, edgecolor="white", label=method_name(report, method))
    if any(errors):
        axes.errorbar(places, heights, errors, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    if len(methods) > 6:
        return
    for place, height, error in zip(places, heights, errors, strict=True):
        if known(height):
            text = f"{height:.1f}" if height < 99.95 else "100"
            note(axes, text, (place, height + error), (0, 3), fontsize=9)


def _attack_references(axes: Axes, report: Report) -> None:
    """The retrained's level across each group, so that every bar has it beside it."""
    levels = report["methods"].get("retrain", {}).get("attacks", {})
    for place, name in enumerate(attack_labels(report)):
        if known(levels.get(name)):
            axes.hlines(levels[name], place - 0.46, place + 0.46, color="#555555", lw=1, zorder=0.9)


# ---- confidences


def _before_and_after(report: Report) -> list[str]:
    """The original, the retrained and DAU, or without it the closest other method."""
    measured = [name for name in method_order(report) if report["methods"][name].get("confidence")]
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
    axes.plot(history["step"], _numbers(history["auc"]), color="#333333", marker="o", ms=4, lw=1.8)
    axes.axhline(0.5, color="black", lw=1, ls=(0, (4, 2)))
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
