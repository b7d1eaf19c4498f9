"""Options and fixtures of the whole suite."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where device tests run")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen with --device; asking for CUDA where there is none is an error, not a skip."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: PyTorch finds no CUDA device", returncode=2)
    return torch.device(name)
