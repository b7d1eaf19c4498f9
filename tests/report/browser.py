"""Headless Chromium, which shows pages in frames of a given width: no window is as narrow as a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SCHEMES = {"dark": 0, "light": 1}

_FRAME = '<iframe class="frame" style="border:0;width:%dpx;height:9000px" srcdoc="%s"></iframe>'
# Every frame's answer, in their order, when the last one has answered.
_ASK = """<!DOCTYPE html>%s
<script>
%s
const told = document.createElement("pre");
told.id = "told";
addEventListener("load", async () => {
  const frames = [...document.querySelectorAll(".frame")];
  const answers = [];
  for (const frame of frames) answers.push(await ask(frame.contentWindow, frame.contentDocument));
  told.textContent = JSON.stringify(answers);
  document.body.append(told);
});
</script>"""


def chromium(folder: Path, *arguments: str) -> str:
    """What it prints; `folder` is for its profile."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def prefer(scheme: str) -> str:
    return f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"


def ask(folder: Path, pages: list[tuple[str, int]], scheme: str, question: str) -> list[Any]:
    """The answers of `pages`, each with its width in CSS pixels, to `question`.

    question: JavaScript that defines `async function ask(view, page)` of a window and its document.
    """
    frames = "\n".join(_FRAME % (width, html.escape(page, quote=True)) for page, width in pages)
    probe = folder / "probe.html"
    probe.write_text(_ASK % (frames, question), encoding="utf-8")
    dom = chromium(folder, prefer(scheme), "--virtual-time-budget=20000", "--dump-dom", probe.as_uri())
    found = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    answers: list[Any] = json.loads(html.unescape(found[1]))
    return answers
