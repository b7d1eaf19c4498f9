"""Every example runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_example_has_a_test():
    assert [path.name for path in sorted(EXAMPLES.glob("*.py"))] == ["own_model.py"]


def test_own_model_forgets_and_keeps_the_rest(capsys: pytest.CaptureFixture[str]):
    # In this process, because importing PyTorch takes longer than the example; the test's draws stay its own.
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / "own_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rates = {
        when: [float(rate) for rate in re.findall(r"([\d.]+) %", line)]
        for when, line in re.findall(r"^(before|after) (.*)$", printed, re.MULTILINE)
    }
    (forget, retain, test, _), (after_forget, after_retain, after_test, _) = rates["before"], rates["after"]
    assert forget < 5
    assert retain > 97
    assert after_forget > 90
    assert after_retain > 93
    assert after_test > test - 5
    assert "result.model" in printed
