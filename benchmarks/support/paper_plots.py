"""The paper's attack figure: what every attack says of every method, beside retrained models."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dau_fast.report.drawing import BAND, INK, choose_look, house_style
from dau_fast.report.reading import ATTACKS
from support.paper_tables import RETRAINED, TITLES, Summary, name_pruning


def draw_attacks(summaries: Sequence[Summary]) -> Figure:
    """A panel for every task and pruning: the share of the forget set that each attack calls unseen.

    A dot is a method's mean over seeds, the line that of the retrained models, the band all of them.
    """
    tasks = list(dict.fromkeys(each["task"] for each in summaries))
    prunings = list(dict.fromkeys(map(name_pruning, summaries)))
    names = list(dict.fromkeys(one["entry"] for each in summaries for one in each["entries"]))
    with house_style():
        figure = Figure(figsize=(5.2 * len(tasks), 0.8 + 2.2 * len(prunings)), layout="constrained")
        panels = figure.subplots(len(prunings), len(tasks), squeeze=False, sharex=True, sharey=True)
        for place in panels.flat:
            place.set_visible(False)
        for each in summaries:
            axes = panels[prunings.index(name_pruning(each)), tasks.index(each["task"])]
            axes.set_visible(True)
            _draw_panel(axes, each, names)
        for axes in panels[:, 0]:
            axes.set_ylabel("called unseen, %")
        legends = [axes.get_legend_handles_labels() for axes in panels.flat]
        handles, labels = max(legends, key=lambda legend: len(legend[1]))
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4 * len(tasks)))
    return figure


def _draw_panel(axes: Axes, summary: Summary, names: Sequence[str]) -> None:
    retrained = summary[RETRAINED]
    look = {"methods": dict.fromkeys(names)}
    for place, attack in enumerate(ATTACKS):
        ends = [place - 0.45, place + 0.45]
        labels = {"band": "retrained, all", "line": "retrained, mean"} if place == 0 else {}
        axes.fill_between(ends, retrained["lowest"][attack], retrained["highest"][attack], color=BAND, lw=0,
                          label=labels.get("band"))  # fmt: skip
        axes.plot(ends, [retrained["rates"][attack]] * 2, color=INK, lw=1.2, label=labels.get("line"))
    for entry in summary["entries"]:
        if "rates" not in entry:
            continue
        offset = 0.8 * ((names.index(entry["entry"]) + 0.5) / len(names) - 0.5)
        color, marker = choose_look(look, entry["entry"])
        heights = [entry["rates"][attack] for attack in ATTACKS]
        axes.plot([place + offset for place in range(len(ATTACKS))], heights, marker, color=color, ms=5,
                  label=entry["entry"])  # fmt: skip
    axes.set_xticks(range(len(ATTACKS)), [label.replace(" ", "\n") for label in ATTACKS.values()])
    axes.set(ylim=(-3, 103), title=f"{TITLES.get(summary['task'], summary['task'])}, {name_pruning(summary)}")
    axes.grid(axis="y")
