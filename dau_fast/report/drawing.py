"""One look for every picture: colours, style, and a figure as an SVG element.

A method has one colour and one marker everywhere, a set of images has one colour and one line style,
and none of the colours (Okabe and Ito 2008, Tol 2021) needs full colour vision.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dau_fast.report.reading import Report

SETS = {
    "forget": ("#D55E00", "-"),
    "validation": ("#332288", "-"),
    "retain": ("#117733", "-"),
    "test": ("#56B4E9", "--"),
}

_LOOKS = {
    "original": ("#808080", "s"),
    "retrain": ("#000000", "D"),
    "retrain_fast": ("#555555", "d"),
    "retrain_clean": ("#882255", "X"),
    "dau": ("#0072B2", "o"),
    "ft": ("#E69F00", "^"),
    "ga": ("#009E73", "v"),
}
_FURTHER_LOOKS = [
    (color, markers[(place + shift) % 3])
    for markers in ("P<>", "*hp")
    for shift in range(3)
    for place, color in enumerate(("#CC79A7", "#999933", "#44AA99"))
]

MUTED = "#5a5a5a"
_WIDTH = 9.375  # inches; 900 CSS pixels at 96 an inch
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class named "$5$" is a name, not mathematics
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "figure.facecolor": "white",
}


def method_color(report: Report, method: str) -> str:
    """The colour, as #rrggbb, that `method` has in every picture of `report`."""
    return choose_look(report, method)[0]


def choose_look(report: Report, method: str) -> tuple[str, str]:
    """Colour and marker of `method`."""
    if method in _LOOKS:
        return _LOOKS[method]
    further = sorted(name for name in report["methods"] if name not in _LOOKS)
    return _FURTHER_LOOKS[further.index(method) % len(_FURTHER_LOOKS)]


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's own settings are; restored on leaving."""
    with style.context(["default", _STYLE]):
        yield


def page_wide(height: float) -> Figure:
    """A page-wide figure, `height` inches high, with room between its panels."""
    return Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.06))


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """`text` `offset` points from `at`, on white so that no line runs through it."""
    look = {"ha": "center", "va": "bottom", "fontsize": 9.5, "annotation_clip": False, **look}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
    axes.annotate(text, at, offset, textcoords="offset points", bbox=box, **look)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """`figure` as an <svg> element for a page: no prologue, no date, ids that begin with `name`."""
    buffer = io.StringIO()
    with style.context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # An SVG inside HTML shares the page's ids and its styles.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    label = escape(description, quote=True)
    rounded = 'stroke-linejoin="round" stroke-linecap="butt"'
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" {rounded}', 1).strip()
