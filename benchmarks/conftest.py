"""Options of the pytest-benchmark files: `pytest benchmarks/test_..._speed.py --device cuda`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dau_fast.engine.runtime import choose_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the operations run")
    parser.addoption("--smoke", action="store_true", help="toy sizes, to see that everything runs")
    parser.addoption("--rows", type=Path, help="file that gets a line of JSON a row as it is measured")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Compilers last: where time runs out, rows that need none are there."""
    items.sort(key=lambda item: "compiled" in item.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Append what a row measured, or why it failed, before the next one begins."""
    report = yield
    file = item.config.getoption("--rows")
    if file and (report.failed or (report.passed and report.when == "call")):
        with file.open("a") as out:
            out.write(json.dumps(_describe(item, call, report)) + "\n")
    return report


def _describe(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> dict[str, Any]:
    row = {"row": item.name}
    if report.failed:
        return row | {"failed": str(call.excinfo and call.excinfo.value)[:500]}
    benchmark = getattr(item, "funcargs", {})["benchmark"]
    stats = benchmark.stats.stats
    return row | {"median_seconds": stats.median, "rounds": stats.rounds, **benchmark.extra_info}


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return choose_device(request.config.getoption("--device"))
