"""One look for every picture: colours, style, and a figure as an SVG element.

A method has one colour and one marker everywhere, a set of images has one colour and one line style,
and none of the colours needs full colour vision: they are those of Okabe and Ito 2008 and of Tol 2021, made
darker where they stand out from white by less than 3 to 1. Every colour has a counterpart for dark pages,
which the page's style sheet chooses by itself.
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

INK, MUTED, PAPER = "#1c1d1f", "#5a5a5a", "#ffffff"
BAND, GRID = "#e4e4e4", "#e6e6e6"

SETS = {
    "forget": ("#D55E00", "-"),
    "validation": ("#332288", "-"),
    "retain": ("#117733", "-"),
    "test": ("#2E8BC0", "--"),
}

_LOOKS = {
    "original": ("#767676", "s"),
    "retrain": (INK, "D"),
    "retrain_fast": ("#555555", "d"),
    "retrain_clean": ("#882255", "X"),
    "dau": ("#0072B2", "o"),
    "ft": ("#B57C00", "^"),
    "ga": ("#008560", "v"),
}
_FURTHER_COLORS = ("#B85C91", "#84842A", "#2E8B7C")
_FURTHER_LOOKS = [
    (color, markers[(place + shift) % 3])
    for markers in ("P<>", "*hp")
    for shift in range(3)
    for place, color in enumerate(_FURTHER_COLORS)
]

# What stands on a dark page for each colour of a light one.
DARK = {
    INK: "#e6e7e9", MUTED: "#a0a5ab", PAPER: "#202225", BAND: "#3a3d42", GRID: "#33363a",
    "#D55E00": "#F08A3C", "#332288": "#A79BF0", "#117733": "#4FBF77", "#2E8BC0": "#7CC7F2",
    "#767676": "#9A9A9A", "#555555": "#B8BCC1", "#882255": "#E07FB0", "#0072B2": "#4FA8E8",
    "#B57C00": "#E6A820", "#008560": "#2FC093",
    "#B85C91": "#DD93BE", "#84842A": "#B9B95A", "#2E8B7C": "#5CC4B3",
}  # fmt: skip

# Inches, of 96 CSS pixels: 900 for a page, and 355 for a telephone.
_WIDE, _NARROW = 9.375, 3.7
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
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.facecolor": PAPER,
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


def page_wide(height: float, *, narrow: bool = False) -> Figure:
    """A figure as wide as the page, or as a telephone, and `height` inches high, with room between panels."""
    return Figure(
        figsize=(_NARROW if narrow else _WIDE, height),
        layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06),
    )


def write_colors(*, dark: bool = False) -> str:
    """The colours of all pictures as custom properties of a style sheet."""
    pairs = DARK.items() if dark else zip(DARK, DARK, strict=True)
    return " ".join(f"{_property(color)}: {shown.lower()};" for color, shown in pairs)


def css_color(color: str) -> str:
    """The light page's `color`, #rrggbb, which the style sheet may replace."""
    return f"var({_property(color)}, {color.lower()})" if color in DARK else color


def _property(color: str) -> str:
    return f"--c-{color[1:].lower()}"


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """`text` `offset` points from `at`, on paper so that no line runs through it."""
    look = {"ha": "center", "va": "bottom", "fontsize": 9.5, "annotation_clip": False, **look}
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
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
    text = re.sub(r'style="[^"]*"', _replaceable, text)
    label = escape(description, quote=True)
    rounded = 'stroke-linejoin="round" stroke-linecap="butt"'
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" {rounded}', 1).strip()


def _replaceable(found: re.Match[str]) -> str:
    """A style attribute in which our colours can be replaced by the page's style sheet."""
    ours = {color.lower(): css_color(color) for color in DARK}
    return re.sub(r"#[0-9a-f]{6}\b", lambda color: ours.get(color[0], color[0]), found[0])


def suffixed(picture: str, narrow: bool) -> str:
    """The name of a picture's wide or narrow form, of which both may be on one page."""
    return f"{picture}-narrow" if narrow else picture
