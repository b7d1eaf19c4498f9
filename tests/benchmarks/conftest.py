"""Modules of benchmarks/ inside the test's own process."""

from __future__ import annotations

import pytest
from scripts import BENCHMARKS


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import scaling` and `import support` as in a command that is run from benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
