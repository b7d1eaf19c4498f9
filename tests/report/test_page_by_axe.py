"""The pages by axe-core, the accessibility rules of WCAG and of good practice, in headless Chromium."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, SCHEMES, ask
from reports import audited, full, repeated
from test_risk import GREY, found

from dau_fast.report.audit_page import render_audit
from dau_fast.report.page import render


def find_axe() -> Path | None:
    """axe.min.js of the package that brings it; the first one's is newer and needs Playwright, too."""
    for name in ("axe_playwright_python", "axe_core_python"):
        spec = find_spec(name)
        for place in spec.submodule_search_locations or () if spec else ():
            if (Path(place) / "axe.min.js").exists():
                return Path(place) / "axe.min.js"
    return None


AXE = find_axe()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(AXE is None, reason="axe-core-python is not installed"),
    pytest.mark.slow,
]

# Everything that can be unfolded is read, too.
LOOK = """async function ask(view, page) {
  page.querySelectorAll("details").forEach(e => e.open = true);
  const found = await view.axe.run(page, {resultTypes: ["violations"]});
  return {
    passes: found.passes.length,
    violations: found.violations.map(v => [v.id, v.impact, v.help, v.nodes.map(n => n.html.slice(0, 120))]),
  };
}"""
WIDTHS = (390, 1280)


def examined(page: str) -> str:
    """The page with axe in it."""
    assert AXE is not None
    return page.replace("</head>", f'<script src="{AXE.as_uri()}"></script></head>')


def shown_pages() -> dict[str, str]:
    risky = repeated()
    risky["at_risk"] = found(GREY, thumbnails=True)
    bare = full()
    del bare["methods"]["retrain"], bare["game"]
    for measured in bare["methods"].values():
        measured["avg_gap"] = measured["speedup"] = None
    return {
        "report": render(risky), "without a reference": render(bare),
        "audit": render_audit(audited()), "audit outside": render_audit(audited(inside=False)),
    }  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_on_any_page(tmp_path: Path, scheme: str) -> None:
    pages = shown_pages()
    asked = [(name, width) for name in pages for width in WIDTHS]
    answers = ask(tmp_path, [(examined(pages[name]), width) for name, width in asked], scheme, LOOK)
    assert [(place, answer["violations"]) for place, answer in zip(asked, answers, strict=True)] == [
        (place, []) for place in asked
    ]
    assert all(answer["passes"] > 20 for answer in answers)


def test_axe_would_find_what_is_wrong(tmp_path: Path) -> None:
    page = render_audit(audited()).replace("--muted: #5d6167", "--muted: #bbbbbb").replace(' lang="en"', "")
    answer: dict[str, Any]
    (answer,) = ask(tmp_path, [(examined(page), 1280)], "light", LOOK)
    assert {name for name, *_ in answer["violations"]} >= {"color-contrast", "html-has-lang"}
