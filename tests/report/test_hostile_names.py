"""Names that would be markup, in every place of a report and of an image folder: no browser runs one."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, chromium
from calling import call
from PIL import Image
from reports import repeated

from dau_fast.report.page import render

OWN = 'document.documentElement.setAttribute("data-owned", "yes")'
HOSTILE = {
    "script": f"<script>{OWN}</script>",
    "attribute": f"\" onmouseover='{OWN}' x=\"'><img src=x onerror='{OWN}'>",
    "apostrophe": f"' onload='{OWN}' '><svg onload='{OWN}'>",
    "closing": f"--></title></style></svg></td></table></textarea><script>{OWN}</script>",
    "template": f"{{{{ 7919 * 104729 }}}}{{% raw %}}<iframe srcdoc='<script>parent.{OWN}</script>'></iframe>",
    "entity": f"&lt;script&gt;{OWN}&#60;/script&#62;&#x22;<a href='javascript:{OWN}'>",
    "steering": "\x1b[2J\x00\u202egnp\ud800</b>\r\n<b>",
    "mathematics": r"$\frac{1}{0}$_^&%#~",
}
TOGETHER = [
    ("script", "attribute", "apostrophe"),
    ("closing", "template", "entity"),
    ("steering", "mathematics"),
]


def poison(value: Any, word: str, key: str = "") -> Any:
    """`value` with `word` behind every text in it but for dates and names of methods, which are keys."""
    if isinstance(value, dict):
        return {name: poison(inner, word, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner, word, key) for inner in value]
    return value + word if isinstance(value, str) and key not in ("started", "name") else value


class Seen(HTMLParser):
    """All tags of a page and all attributes, for what no page of ours has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "img", "object", "embed", "b", "base", "form", "link"):
            self.found.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (name in ("data-owned", "srcdoc", "href") and not _inside(value)):
                self.found.append(f"{tag} {name}={value}")


def _inside(value: str | None) -> bool:
    """A reference to a part of the page itself."""
    return value is not None and value.startswith("#")


def poisoned(word: str) -> str:
    """The page of a report that says `word` wherever it says anything."""
    report = poison(repeated(), word)
    for named in (report["methods"], report["run"]["methods"]):
        named[word] = named.pop("ga")
    return render(report)


@pytest.mark.parametrize("names", TOGETHER, ids=" ".join)
def test_no_name_becomes_a_tag_or_an_attribute(names: tuple[str, ...]) -> None:
    page = poisoned("".join(map(HOSTILE.__getitem__, names)))
    assert Seen(page).found == []
    assert str(7919 * 104729) not in page
    page.encode()


def test_markup_that_gets_through_would_be_seen() -> None:
    for name in ("script", "attribute", "apostrophe", "closing", "entity", "template"):
        assert Seen(f"<p title='{HOSTILE[name]}'>{HOSTILE[name]}").found, name


def browse(page: Path) -> str:
    """The page as a browser has it after all that it runs."""
    return chromium(page.parent, "--virtual-time-budget=2000", "--dump-dom", page.as_uri())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_no_browser_runs_a_name(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<p>{HOSTILE['script']}")
    assert "<html data-owned" in browse(page), "what is not escaped is run and seen"
    for word in HOSTILE.values():
        page.write_text(poisoned(word))
        seen = browse(page)
        assert "<html data-owned" not in seen
        assert Seen(seen).found == []


@pytest.mark.skipif(os.name == "nt", reason="such names are not allowed")
def test_hostile_names_of_classes_and_files_are_harmless_in_page_and_terminal(tmp_path: Path) -> None:
    classes = ["<img src=x onerror=alert(1)>", "\x1b]0;owned\x07' onload='x"]
    for place, name in enumerate(classes):
        for part, count in (("train", 12), ("test", 4)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (8, 8), (200 * place, 20 * number, 40))
                picture.save(folder / f"<b>{number}\x1b[2J.png")
    out = tmp_path / "<script>alert(1)<" / "\x1b[31mout"
    given = ("--dataset", "folder", "--data", tmp_path / "data", "--image-size", 8, "--forget", "random:0.2")
    called = call(out, *given, "--methods", "ft", "--epochs", 1)
    assert called.code == 0, called.stderr
    assert "\x1b" not in called.stdout + called.stderr
    assert "\x07" not in called.stdout + called.stderr
    assert Seen((out / "report.html").read_text()).found == []
