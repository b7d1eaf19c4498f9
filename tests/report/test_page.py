"""The page says what the numbers say, asks for nothing from outside, and is the same every time."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from reports import Page, full, method, repeated

from dau_fast.report import page, plots
from dau_fast.report.drawing import choose_look, css_color, method_color
from dau_fast.report.page import render
from dau_fast.report.reading import method_order

SVG = "{http://www.w3.org/2000/svg}"


def verdict(html: str) -> str:
    """The verdict's headline and sentences, as one text."""
    found = re.search(r'<section class="verdict.*?</section>', html, re.DOTALL)
    assert found
    return " ".join(re.sub(r"<[^>]+>", "", found[0]).split())


def texts(svg: str) -> list[str]:
    """Every text of a picture, which must be well-formed XML by itself."""
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# ---- what the page says


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the page says in words: drawing takes a second."""
    monkeypatch.setattr(page, "PICTURES", dict.fromkeys(page.PICTURES, lambda report: None))


def test_full_report() -> None:
    html = render(full())
    found = Page(html)
    assert verdict(html).startswith(
        "DAU comes closest to a model retrained from scratch: avg gap 0.68 points, 4.6 times as "
        "fast as retraining."
    )
    assert "noise floor needs at least two repeats" in verdict(html)
    assert "original&#39;s avg gap is 3.95. DAU took 0.87 s, retraining 4.02 s" in verdict(html)
    assert "FT 3.12, GA 35.06" in verdict(html)
    assert [row[0].split()[0] for row in found.rows[:6]] == [
        "method", "original", "retrained", "DAU", "FT", "GA",
    ]  # fmt: skip
    assert found.rows[3][1:] == [
        "4.4 \u22121.2", "99.8 \u22120.2", "98.1 \u22120.2", "10.0 \u22121.1",
        "0.68", "0.87", "4.6",
    ]  # fmt: skip
    assert found.rows[2][0].endswith("(the reference)")
    assert found.rows[2][1:6] == ["5.6", "100.0", "98.3", "11.1", "reference"]
    assert found.scopes == ["col"] * 8 + ["row"] * 5 + ["col"] * 6 + ["row"] * 5
    assert html.count('<svg role="img" aria-label="') == 2 * 7
    assert found.headings[-1] == "What this page does not show"
    assert "The game between model and attacker" in found.headings
    for fact in ("ab" * 32, "torch 2.15.0", "classifier: norm of", "random:0.1, 90 images"):
        assert fact in html
    assert "4 turns, learning rate 0.005 at its start, falling to 0; 1 before it ruined the model" in html
    assert "not a proof that data was\ndeleted" in html


@pytest.mark.usefixtures("words_only")
@pytest.mark.usefixtures("without_pictures")
def test_compile_time_is_shown_beside_the_time() -> None:
    report = full()
    report["methods"]["dau"]["compile_seconds"] = 3.2
    html = render(report)
    assert Page(html).rows[3][6] == "0.87 + 3.20 compiling"
    assert "DAU took 0.87 s (and 3.20 s compiling)" in verdict(html)


def pruned() -> dict[str, Any]:
    report = full()
    report["methods"]["retrain_clean"] = method((5.0, 99.9, 98.0, 10.9), 4.5, 0.01, 0.9)
    for name, measured in report["methods"].items():
        measured |= {"sparsity": 0.9, "avg_gap_clean": 0.5 if name == "dau" else 1.25}
    report["run"]["prune"] = {
        "method": "omp", "sparsity": 0.9, "scope": "global",
        "mask_from": {"original": "the training set", "retrain_clean": "the retain set"},
        "layers": {"original": {"stem.weight": 0.25, "block.weight": 0.915}},
    }  # fmt: skip
    return report


@pytest.mark.usefixtures("words_only")
@pytest.mark.usefixtures("without_pictures")
def test_tuning_is_a_fact_of_the_run() -> None:
    report = full()
    trials = [{"settings": {"lr": lr, "alpha": 2}, "score": 1.0} for lr in (0.1, 0.03)]
    report["tuning"] = {"dau": {"trials": trials, "chosen": 1, "seconds": 4.5}}
    assert "DAU: 2 settings in 4.50 s, best lr 0.03, alpha 2" in render(report)
    assert "<dt>tuning" not in render(full())


@pytest.mark.usefixtures("words_only")
@pytest.mark.usefixtures("without_pictures")
def test_pruning_is_a_fact_of_the_run() -> None:
    html, dense = render(pruned()), render(full())
    for fact in (
        "omp, 90.0 % of the convolutions&#39; weights",
        "original: the training set; retrained clean: the retain set",
        "original: stem.weight 25.0 %, block.weight 91.5 %",
        "DAU: 90.0 %",
        "DAU: 0.50",
        "the same with masks found on the retain set",
    ):
        assert fact in html, fact
    for fact in ("zeros at the end", "masks from", "clean masks"):
        assert fact in html
        assert fact not in dense


@pytest.mark.usefixtures("without_pictures")
def test_a_cleanly_retrained_model_is_a_reference_and_no_way_to_unlearn() -> None:
    report = pruned()
    words = verdict(render(report))
    assert "DAU comes closest" in words
    assert "clean" not in words
    assert method_order(report)[:3] == ["original", "retrain", "retrain_clean"]
    for name in ("dau", "ft", "ga"):
        del report["methods"][name]
    assert "no unlearning method ran" in verdict(render(report))
    assert "retrained clean" not in plots.confidences(report)


@pytest.mark.usefixtures("without_pictures")
def test_without_retraining_nothing_is_compared() -> None:
    report = full()
    del report["methods"]["retrain"]
    for measured in report["methods"].values():
        measured["avg_gap"] = measured["speedup"] = None
    html = render(report)
    assert verdict(html).startswith("No model was retrained in this run")
    assert "closest" not in verdict(html)
    assert Page(html).rows[1][1:] == ["0.0", "100.0", "98.5", "1.1", "\u2013", "4.10", "\u2013"]
    assert "difference (points)" not in texts(plots.comparison(report))
    assert texts(plots.comparison(report)).count("percent") == 4
    assert "retrained" not in texts(plots.attacks(report))


@pytest.mark.usefixtures("words_only")
@pytest.mark.usefixtures("without_pictures")
def test_nothing_unlearned() -> None:
    report = full()
    report["methods"] = {name: report["methods"][name] for name in ("retrain", "original")}
    assert "no unlearning method ran. The original is 3.95 points" in verdict(render(report))


def test_without_a_game_there_is_no_picture_of_it() -> None:
    report = full()
    report["game"] = None
    assert plots.game(report) is None
    found = Page(render(report))
    assert "How sure the models are" in found.headings
    assert "The game between model and attacker" not in found.headings


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize(
    ("floor", "tone", "sentence"),
    [(0.72, "good", "within the noise floor"), (0.5, "open", "above the noise floor")],
)
def test_repeats_bring_spread_and_noise_floor(floor: float, tone: str, sentence: str) -> None:
    report = repeated()
    report["noise_floor"] = floor
    html = render(report)
    row = Page(html).rows[3]
    assert f'<section class="verdict {tone}"' in html
    assert f"That is {sentence}: two independent retrainings differ by {floor:.2f}" in verdict(html)
    assert row[1] == "4.4 ± 1.3 \u22121.2"
    assert row[5] == "0.68 ± 0.19" + (" within noise" if tone == "good" else "")
    assert "standard deviation over 4 repeats" in html
    assert "from a single run" not in html


@pytest.mark.usefixtures("words_only")
@pytest.mark.usefixtures("without_pictures")
def test_a_method_worse_than_doing_nothing_is_called_that() -> None:
    report = full()
    report["methods"] = {name: report["methods"][name] for name in ("original", "retrain", "ga")}
    html = render(report)
    assert '<section class="verdict bad"' in html
    assert "35.06 points at best (GA), 3.95 before" in verdict(html)


@pytest.mark.usefixtures("words_only")
@pytest.mark.usefixtures("without_pictures")
def test_slower_than_retraining_is_said() -> None:
    report = full()
    report["methods"]["dau"]["speedup"] = 0.25
    assert "but it takes 4.0 times as long as retraining" in verdict(render(report))


@pytest.mark.usefixtures("without_pictures")
def test_missing_numbers_are_marked_as_missing() -> None:
    report = full()
    report["methods"]["ga"].update(ua=float("nan"), avg_gap=float("nan"), speedup=None)
    report["methods"]["ga"]["attacks"]["entropy"] = None
    row = Page(render(report)).rows[5]
    assert [row[i] for i in (1, 5, 7)] == ["\u2013"] * 3
    assert texts(plots.comparison(report)).count("not measured") == 2


# ---- the pictures


def test_comparison_shows_distances_and_an_outlier_does_not_set_the_scale() -> None:
    shown = texts(plots.comparison(full()))
    assert {"\u22121.2", "\u22124.5", "+33.3", "retrained: 5.6 %"} <= set(shown)
    assert shown.count("+10") == 4
    assert [shown.index(name) for name in ("original", "DAU", "FT", "GA")] == sorted(
        shown.index(name) for name in ("original", "DAU", "FT", "GA")
    )


def test_comparison_shows_the_noise_floor_and_error_bars() -> None:
    plain, svg = plots.comparison(full()), plots.comparison(repeated())
    assert "noise floor: 0.72" in texts(svg)
    assert not any("noise floor" in text for text in texts(plain))
    assert "LineCollection" in svg
    assert "LineCollection" not in plain


def test_attacks_shows_every_method_under_every_attack() -> None:
    report = full()
    shown = texts(plots.attacks(report))
    values = [v for m in report["methods"].values() for v in m["attacks"].values()]
    assert len(values) == 25
    assert all(f"{value:.1f}" in shown for value in values)


def test_confidences_shows_before_retrained_and_after() -> None:
    report = full()
    shown = texts(plots.confidences(report))
    assert [name for name in ("original (before)", "retrained", "DAU", "FT") if name in shown] == [
        "original (before)", "retrained", "DAU",
    ]  # fmt: skip
    del report["methods"]["dau"]
    assert "FT" in texts(plots.confidences(report))
    # The smallest bin holds 0.5 %, so the axis must reach below it.
    assert {"0", "1", "10", "100"} <= set(shown)


def test_the_game_shows_what_becomes_of_all_three_sets() -> None:
    shown = texts(plots.game(full()) or "")
    assert {"forget set", "validation set", "retain set", "forget set, retrained"} <= set(shown)


def test_a_method_has_one_colour_everywhere() -> None:
    report = full()
    colors = {name: method_color(report, name) for name in report["methods"]}
    assert len(set(colors.values())) == 5
    html = render(report)
    colors = {name: css_color(color) for name, color in colors.items()}
    assert all(f'style="background:{color}"' in html for color in colors.values())
    bars, dots = plots.attacks(report), plots.comparison(report)
    assert all(f"fill: {color}" in bars for color in colors.values())
    assert all(f"stroke: {color}" in dots for color in colors.values())


def test_unknown_methods_get_their_own_colours() -> None:
    report = full()
    for name in ("magic", "salve"):
        report["methods"][name] = method((2.0, 99.0, 98.0, 8.0), 1.0, 2.1, 4.0)
    assert len({method_color(report, name) for name in report["methods"]}) == 7
    assert "magic" in texts(plots.comparison(report))


def test_many_unknown_methods_are_told_apart_by_colour_and_marker() -> None:
    report = full()
    for number in range(18 - len(report["methods"])):
        report["methods"][f"method {number}"] = method((2.0, 99.0, 98.0, 8.0), 1.0, 2.1, 4.0)
    looks = {choose_look(report, name) for name in report["methods"]}
    assert len(looks) == len(report["methods"]) == 18


# ---- safe and reproducible


def test_names_from_outside_are_escaped() -> None:
    report = full()
    bad = '<script>alert("x")</script>$y$'
    run = report["run"]
    run["forget"]["spec"], run["dataset"], run["arch"] = f"class:{bad}", bad, bad
    run["versions"][bad] = run["sensitivity"] = run["device"] = bad
    report["methods"][bad] = method((2.0, 99.0, 98.0, 8.0), 1.0, 2.1, 4.0)
    html = render(report)
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    assert bad in texts(plots.comparison(report))
    Page(html)


def test_nothing_is_loaded_from_outside() -> None:
    html = render(repeated())
    without_namespaces = re.sub(r' xmlns(:\w+)?="[^"]*"', "", html)
    for word in ("http://", "https://", "src=", "@import", "<link", "<script", "<!DOCTYPE svg"):
        assert word not in without_namespaces
    references = re.findall(r'(?:href="|url\()([^")]+)', html)
    found = Page(html)
    assert references
    assert {reference[1:] for reference in references} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


@pytest.mark.slow
def test_same_report_same_bytes_in_any_process_and_under_any_user_settings() -> None:
    report = repeated()
    before = copy.deepcopy(report)
    html = render(report)
    assert report == before
    with matplotlib.rc_context(
        {"font.size": 30, "axes.linewidth": 9, "svg.hashsalt": "x", "svg.fonttype": "path"}
    ):
        assert render(report) == html
        assert matplotlib.rcParams["font.size"] == 30
    program = (
        "import hashlib, json, sys\n"
        "from dau_fast.report.page import render\n"
        "html = render(json.load(sys.stdin))\n"
        "print(hashlib.sha256(html.encode()).hexdigest(), 'matplotlib.pyplot' in sys.modules)\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(report),
        env={**os.environ, "PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stderr == ""
    assert other.stdout.split() == [hashlib.sha256(html.encode()).hexdigest(), "False"]
