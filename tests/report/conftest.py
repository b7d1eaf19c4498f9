"""What tests of the page share."""

from __future__ import annotations

import pytest

from dau_fast.report import page


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out of the page, for tests that look at words and numbers."""
    for name in page.PICTURES:
        monkeypatch.setitem(page.PICTURES, name, lambda _: None)
