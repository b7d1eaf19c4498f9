"""Options of the pytest-benchmark files: `pytest benchmarks/test_..._speed.py --device cuda`."""

from __future__ import annotations

import pytest
import torch

from dau_fast.engine.runtime import choose_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the operations run")
    parser.addoption("--smoke", action="store_true", help="toy sizes, to see that everything runs")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return choose_device(request.config.getoption("--device"))
