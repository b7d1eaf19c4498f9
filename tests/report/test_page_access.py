"""The page can be read in both schemes, on a telephone, by keyboard, by ear and on paper."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from reports import full, repeated

from dau_fast.report import curves
from dau_fast.report.drawing import _FURTHER_LOOKS, _LOOKS, DARK, INK, MUTED, PAPER, SETS
from dau_fast.report.page import PICTURES, render


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def schemes(html: str) -> dict[str, dict[str, str]]:
    """The custom properties of the page's three style blocks."""
    blocks = [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", block)) for block in html.split(":root {")[1:]]
    light, dark, printed = blocks
    return {"light": light, "dark": light | dark, "print": light | dark | printed}


def test_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_stands_out_in_every_scheme(scheme: str) -> None:
    colors = schemes(render(full()))[scheme]
    for paper in ("--paper", "--shade", "--card"):
        for ink in ("--ink", "--muted", "--good"):
            assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_stand_out_in_both_schemes(dark: bool) -> None:
    def shown(color: str) -> str:
        return DARK[color] if dark else color

    for ink in (INK, MUTED):
        assert contrast(shown(ink), shown(PAPER)) >= 4.5
    marks = {look[0] for look in (*_LOOKS.values(), *_FURTHER_LOOKS, *SETS.values())}
    for mark in marks:
        assert contrast(shown(mark), shown(PAPER)) >= 3, mark
    assert len({shown(mark) for mark in marks}) == len(marks)


@pytest.mark.parametrize("name", PICTURES)
def test_no_colour_of_a_picture_stays_as_it_is_in_the_dark(name: str) -> None:
    for narrow in (False, True):
        svg = PICTURES[name](repeated(), narrow=narrow)
        assert svg is not None
        assert not re.search(r"(?<!, )#[0-9a-f]{6};", svg)
        # What is drawn without a colour would be black.
        assert not re.search(r"<text(?![^>]*fill: var)", svg)


def test_the_pictures_of_a_telephone_are_as_narrow() -> None:
    for name, draw in PICTURES.items():
        widths = [float(re.findall(r'width="([\d.]+)pt"', draw(full(), narrow=n) or "")[0]) for n in (0, 1)]
        assert widths == [675, pytest.approx(266.4)], name


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the tags around it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes), list(self.open)))
        if tag not in ("meta", "br", "wbr", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes), list(self.open)))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()


def test_landmarks_names_and_regions() -> None:
    html = render(repeated())
    tags = Tags(html).found
    names = [tag for tag, _, _ in tags]
    for landmark in ("header", "main", "footer", "h1"):
        assert names.count(landmark) == 1
    ids = {str(found["id"]) for _, found, _ in tags if "id" in found}
    for tag, found, around in tags:
        if tag in ("section", "figure") or found.get("role") == "region":
            assert found.get("aria-label") or found.get("aria-labelledby") in ids, tag
        if "scroll" in (found.get("class") or ""):
            assert (found["role"], found["tabindex"]) == ("region", "0")
        if tag == "svg":
            assert found["role"] == "img"
            assert found["aria-label"]
            assert "figure" in around
        if tag == "th":
            assert found["scope"] in ("row", "col")
        if tag == "table":
            assert "div" in around
    assert names.count("caption") == names.count("table")
    assert names.count("figcaption") == names.count("figure")
    assert names[names.index("body") + 1] == "a"
    assert 'lang="en"' in html


@pytest.mark.usefixtures("words_only")
def test_the_command_is_shown_and_cannot_break_the_page() -> None:
    report = full()
    report["run"]["command"] = "dau_fast --data '</pre><b>' --forget class:3"
    assert "dau_fast --data &#39;&lt;/pre&gt;&lt;b&gt;&#39; --forget class:3</pre>" in render(report)
    del report["run"]["command"]
    assert '<pre class="command"' not in render(report)


def test_closeness_against_time_needs_two_methods() -> None:
    report = full()
    drawn = curves.gap_against_time(report)
    assert drawn is not None
    assert all(f">{name}<" in drawn for name in ("original", "retrained", "DAU", "FT", "GA"))
    for measured in report["methods"].values():
        measured["avg_gap"] = None
    assert curves.gap_against_time(report) is None
    assert "Closeness against time" not in render(report)


def test_a_report_from_before_the_curve_has_no_picture_of_it() -> None:
    report = full()
    for measured in report["methods"].values():
        del measured["roc"], measured["margins"]
    assert curves.roc(report) is curves.margins(report) is None
