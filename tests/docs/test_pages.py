"""What README and docs name is there: files in backquotes, and the targets of links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dau_fast.methods.registry import find_methods
from dau_fast.prune.registry import find_pruners
from dau_fast.unlearn import unlearn

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Folders of the repository whose contents are named by their path, and files beside them by their name.
# Files that a reader writes, as the pages show them.
READERS = {"FILE.py", "net.py", "mine.py"}

_FOLDERS = r"(?:dau_fast|csrc|tests|benchmarks|docs|examples|\.github|\.ci)/"
_PATH = re.compile(rf"(?:{_FOLDERS}[\w./-]*|\b[\w-]+\.(?:py|md|toml|cff)|CMakeLists\.txt)(?![\w<>*{{/-])")


def paths_named(text: str) -> set[str]:
    """Paths of the repository in the backquotes of `text`; those with a <gap> to fill in are left out."""
    quoted = re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)
    words = (word for span in quoted for word in re.split(r"[\s`\"'(),=:]+", span))
    return {word.rstrip("./") for word in words if _PATH.fullmatch(word)}


def test_paths_are_told_from_other_words():
    text = (
        "`dau_fast/ops/` `python benchmarks/no.py --x 1` `setup.py` `DIR/train/` `out/report.json` `a.b` "
        "`tests/<room>/test_<what>.py` plain/docs/x.md\n```sh\npytest tests/ops/test_y.py::test_z\n```"
    )
    assert paths_named(text) == {"dau_fast/ops", "benchmarks/no.py", "setup.py", "tests/ops/test_y.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_backquotes_exists(page):
    named = paths_named(page.read_text(encoding="utf-8")) - READERS
    places = [ROOT, ROOT / "dau_fast"] if page.name == "architecture.md" else [ROOT]
    assert {path for path in named if not any((place / path).exists() for place in places)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_has_a_target(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    lost = []
    for link in links:
        file, _, heading = link.partition("#")
        target = (page.parent / file) if file else page
        if not target.exists() or (heading and heading not in headings(target)):
            lost.append(link)
    assert lost == []


def headings(page: Path) -> set[str]:
    """Anchors of the headings of `page`, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_figures_have_a_record(page):
    """A page that quotes medians, speed-ups or gaps links the folder they are from."""
    text = page.read_text(encoding="utf-8")
    measured = re.search(r"median|speed-up|times as fast|avg gap \d", text)
    assert not measured or "benchmarks/records/" in text


def listed(what: str) -> list[tuple[str, str]]:
    """Name and phrase of each row between the markers of `what` in docs/command-line.md."""
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    inside = text.partition(f"<!-- {what} -->")[2].partition(f"<!-- /{what} -->")[0]
    return re.findall(r"^\| `(\w+)` \| (.+) \|$", inside, re.MULTILINE)


def test_the_command_line_page_lists_methods_as_they_are_registered():
    assert listed("methods") == [(row.name, row.about) for row in find_methods().values()]


def test_the_command_line_page_lists_pruners_as_they_are_registered():
    assert listed("pruners") == [(row.name, row.about) for row in find_pruners().values()]


def test_the_command_line_page_names_every_option():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    options = {name for parameter in unlearn.params for name in parameter.opts if name.startswith("--")}
    assert {name for name in options if f"`{name}" not in text} == set()
