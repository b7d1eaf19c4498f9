"""The page in headless Chromium: nothing is cut off, both schemes are readable, and it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import CHROMIUM, SCHEMES, ask, chromium, prefer
from PIL import Image
from reports import audited, full, repeated

from dau_fast.report.audit_page import render_audit
from dau_fast.report.page import render

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.slow,
]
# What is cut off, which texts in which colours, and how much can be reached by the keyboard.
LOOK = """async function ask(view, page) {
  const width = page.documentElement.clientWidth;
  const visible = [...page.body.querySelectorAll("*")].filter(e => e.checkVisibility())
    .filter(e => !e.matches(".skip"));
  const scrolled = e => e.parentElement && e.parentElement.closest(".scroll");
  const cut = visible.filter(e => {
    const box = e.getBoundingClientRect();
    const outside = box.right > width + 1 || box.left < -1 || (e.tagName === "svg" && box.width < 200);
    return outside && !scrolled(e);
  });
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = view.getComputedStyle(e).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
  };
  const speaks = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const texts = visible.filter(speaks).map(e => {
    const style = view.getComputedStyle(e), drawn = e instanceof view.SVGElement;
    const scale = drawn ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
    const size = scale * parseFloat(style.fontSize);
    return [e.textContent.trim().slice(0, 30), drawn ? style.fill : style.color, behind(e), size];
  });
  const svgs = visible.filter(e => e.tagName === "svg").length;
  const reached = visible.filter(e => e.matches("[tabindex='0'], a[href], summary")).length;
  const wide = page.documentElement.scrollWidth;
  return {wide, cut: cut.map(e => e.outerHTML.slice(0, 90)), texts, svgs, reached};
}"""


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, of two CSS colours rgb(r, g, b)."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_cut_off_and_all_texts_are_readable(tmp_path: Path, scheme: str) -> None:
    pages = {"report": render(repeated()), "audit": render_audit(audited())}
    asked = [(kind, width) for kind in pages for width in (390, 1280)]
    answers = ask(tmp_path, [(pages[kind], width) for kind, width in asked], scheme, LOOK)
    for (kind, width), found in zip(asked, answers, strict=True):
        assert found["wide"] <= width
        assert (kind, width, found["cut"]) == (kind, width, [])
        assert found["svgs"] == (7 if kind == "report" else 1)
        # The table, and the numbers that can be unfolded.
        assert found["reached"] == (2 if kind == "report" else 1)
        dark = contrast(found["texts"][0][2], "rgb(0, 0, 0)") < 2
        assert dark == (scheme == "dark")
        for text, ink, paper, size in found["texts"]:
            assert contrast(ink, paper) >= 4.5, (text, ink, paper)
            assert size >= 8.5, (text, size)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_screenshot_has_the_colours_of_its_scheme(tmp_path: Path, scheme: str) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(render(full()), encoding="utf-8")
    chromium(tmp_path, prefer(scheme), "--window-size=1280,3000", f"--screenshot={shot}", page.as_uri())
    levels = Image.open(shot).convert("L").histogram()
    bright, total = sum(levels[200:]), sum(levels)
    assert bright / total > 0.85 if scheme == "light" else bright / total < 0.1


def test_it_prints_on_paper_whatever_the_scheme(tmp_path: Path) -> None:
    page, printed = tmp_path / "report.html", tmp_path / "page.pdf"
    page.write_text(render(full()), encoding="utf-8")
    chromium(
        tmp_path,
        prefer("dark"),
        "--no-pdf-header-footer",
        f"--print-to-pdf={printed}",
        page.as_uri(),
    )
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 8
