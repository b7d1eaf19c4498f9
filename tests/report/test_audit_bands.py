"""The page of an audit: its verdict, its scores, and each of them beside the band of retrained models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reports import Page, audited
from test_commands import run
from test_hostile_names import HOSTILE, TOGETHER, Seen, poison
from test_page_access import Tags

from dau_fast.report.audit_page import render_audit
from dau_fast.report.bands import _list_marks, bands


def test_the_page_holds_every_score_and_what_was_audited() -> None:
    html = render_audit(audited())
    found = Page(html)
    assert found.headings[0] == "Audit"
    assert found.rows[1:] == [
        ["UA %", "5.0", "+0.0", "4.0 to 6.0", "0.0", "0.50", "inside"],
        ["margins forget: shift nats", "3.00", "+2.94", "-0.50 to 0.50", "9.00", "0.50", "outside"],
        ["noisy forget images known %", "80.0", "+0.0", "80.0 to 80.0", "79.0", "0.50", "inside"],
        ["KLoM forget: mean nats", "1.00", "-0.25", "0.00 to 2.00", "1.50", "0.50", "blind"],
    ]
    assert "out/dau.safetensors: 90 images forgotten (random:0.1), digits, small" in html
    assert "ulira_auc, ulira_accuracy (needs 3); challenge_score (needs 4)" in html
    for fact in ("ab" * 32, "torch 2.15.0", "reference_4.safetensors", "relearning_steps 200", "1.25"):
        assert fact in html
    assert "no proof that data was deleted" in html
    assert render_audit(audited()) == html


@pytest.mark.parametrize(
    ("inside", "original_inside", "tone", "words"),
    [
        (True, False, "good", "INSIDE: 4 audits together do not tell it from 4 retrained models."),
        (True, True, "open", "The original is inside as well: these audits show nothing here."),
        (False, False, "bad", "OUTSIDE: 4 audits together tell it from 4 retrained models."),
    ],
)
def test_the_verdict_stands_first(inside: bool, original_inside: bool, tone: str, words: str) -> None:
    html = render_audit(audited(inside=inside, original_inside=original_inside))
    shown = re.search(rf'<section class="verdict {tone}".*?</section>', html, re.DOTALL)
    assert shown
    assert words in shown[0]
    assert "A retrained model would be called outside in about 20 % of cases" in shown[0]


def test_scores_are_drawn_in_half_bands_from_the_middle() -> None:
    """UA 5 in 4 to 6, the margin 3 in -0.5 to 0.5, all retrained models alike, and KLoM 1 in 0 to 2."""
    marks = {name: dict(places) for name, _, places in _list_marks(list(audited()["audits"].values()))}
    assert marks["audited, inside"] == {0: 0.0, 2: 0.0, 3: 0.0}
    assert marks["audited, outside"] == {1: 6.0}
    assert marks["original"] == {0: -5.0, 1: 18.0, 2: -100.0, 3: 0.5}
    retrained = next(places for name, _, places in _list_marks(list(audited()["audits"].values())))
    assert sorted(place for row, place in retrained if row == 1) == [-1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("narrow", [False, True])
def test_the_picture_says_what_is_outside_and_has_the_colours_of_both_schemes(narrow: bool) -> None:
    svg = bands(audited(), narrow=narrow)
    assert "4 audits against the band of retrained models; outside: margins forget: shift" in svg
    assert not re.search(r"(?<!, )#[0-9a-f]{6};", svg)
    assert not re.search(r"<text(?![^>]*fill: var)", svg)
    width = float(re.findall(r'width="([\d.]+)pt"', svg)[0])
    assert width == pytest.approx(266.4 if narrow else 675)


def test_it_can_be_read_by_ear_and_by_keyboard() -> None:
    tags = Tags(render_audit(audited())).found
    ids = {str(found["id"]) for _, found, _ in tags if "id" in found}
    for tag, found, _ in tags:
        if tag in ("section", "figure") or found.get("role") == "region":
            assert found.get("aria-label") or found.get("aria-labelledby") in ids, tag
        if tag == "th":
            assert found["scope"] in ("row", "col")


@pytest.mark.parametrize("names", TOGETHER, ids=" ".join)
def test_no_name_becomes_a_tag_or_an_attribute(names: tuple[str, ...]) -> None:
    page = render_audit(poison(audited(), "".join(map(HOSTILE.__getitem__, names)), "name"))
    assert Seen(page).found == []


def test_the_command_draws_it_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    file.write_text(json.dumps(audited()))
    code, shown, _ = run("report", file)
    assert (code, shown.strip()) == (0, f"{tmp_path / 'audit.html'} shows the pictures.")
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == render_audit(audited())
    damaged = audited()
    del damaged["gaps"]
    file.write_text(json.dumps(damaged))
    code, _, told = run("report", file)
    assert code == 2
    assert re.fullmatch(r"error: .*a damaged one: it lacks 'gaps'\n", told)
