"""docs/audits.md names what there is."""

from __future__ import annotations

from pathlib import Path

from dau_fast.audits.catalogue import find_audits
from dau_fast.commands.audit import make_audit
from dau_fast.commands.help import SHARED
from dau_fast.unlearn import unlearn

PAGE = (Path(__file__).parents[2] / "docs" / "audits.md").read_text(encoding="utf-8")


def test_the_page_names_every_option_of_its_own() -> None:
    own = [
        parameter for parameter in make_audit(unlearn.params).params if parameter.name not in SHARED["audit"]
    ]
    assert {parameter.opts[0] for parameter in own} == {
        "audited", "--original", "--references", "--train-references",
    }  # fmt: skip
    for name in ("--original", "--references", "--train-references", "--out"):
        assert f"`{name}`" in PAGE


def test_the_page_explains_every_audit() -> None:
    """By the words before a colon or a set's name, as its table groups them."""
    table = PAGE[PAGE.index("| audits | question") :]
    groups = {
        "attack": "five attacks", "RMIA against retrained": "RMIA against retrained", "RMIA online": "online",
        "margins": "margins: shift, distance", "KLoM": "KLoM", "U-LiRA": "U-LiRA", "challenge": "challenge:",
    }  # fmt: skip
    for audit in find_audits().values():
        known = next((words for start, words in groups.items() if audit.label.startswith(start)), None)
        assert (known or audit.label.split(":")[0]) in table, audit.label
