"""`python -m dau_fast selfcheck`: it covers every op, names the path that ran, and sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dau_fast.commands.selfcheck import make_selfcheck
from dau_fast.ops import _native
from dau_fast.ops._library import PATHS
from dau_fast.ops._selfcheck import _Paths, check_all
from dau_fast.ops._selfcheck_cases import list_cases

needs_extension = pytest.mark.skipif(_native.extension is None, reason="the extension is not compiled")


def findings_of(op: str, device: torch.device) -> list[Any]:
    return [finding for finding in check_all(device) if finding.case.op == op]


def test_every_op_is_right_on_the_device(device: torch.device) -> None:
    wrong = [f for f in check_all(device) if not f.right]
    assert not wrong, [(f.case.op, f.case.sizes, f.error, f.failed) for f in wrong]


def test_every_op_is_covered() -> None:
    seen = set()

    class Names(_Paths):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    for case in list_cases():
        given = case.make(torch.Generator().manual_seed(0))
        with Names():
            case.compute(*(x.to(case.dtype) if x.is_floating_point() else x for x in given))
    assert {f"dau_fast::{name}" for name, _ in PATHS} <= seen


@needs_extension
def test_it_prints_one_table_and_ends_well() -> None:
    done = CliRunner().invoke(make_selfcheck(), ["--device", "cpu"])
    assert done.exit_code == 0, done.output
    count = len(list_cases())
    assert f"{count} of {count} are right on" in done.output
    assert "plain PyTorch, as there is no C++ for it: gram_squares" in done.output
    assert "WRONG" not in done.output


def replaced(name: str, function: Callable[..., Any]) -> Any:
    """The extension with another function in place of `name`."""
    known = {key: getattr(_native.extension, key) for key in dir(_native.extension) if key[0] != "_"}
    return SimpleNamespace(**known | {name: function})


@needs_extension
@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("sensitivity_forward", "sensitivity"),
        ("sensitivity_backward", "attack_features"),
        ("add_logits", "linear_sensitivity"),
        ("pull_logits", "linear_sensitivity"),
        ("normalise_views", "barlow_twins_loss"),
        ("standardise_views", "barlow_twins_loss"),
        ("finish_gradient", "barlow_twins_loss"),
        ("image_batch", "image_batch"),
        ("masked_sgd", "masked_sgd_"),
        ("apply", "apply_masks_"),
    ],
)
def test_a_path_that_writes_nothing_is_wrong(
    name: str, op: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    assert hasattr(_native.extension, name)
    monkeypatch.setattr(_native, "extension", replaced(name, lambda **_: None))
    assert not all(finding.right for finding in findings_of(op, torch.device("cpu")))
    done = CliRunner().invoke(make_selfcheck(), ["--device", "cpu"])
    assert done.exit_code == 1
    assert f"WRONG {op}" in done.output


@needs_extension
def test_a_path_that_fails_costs_no_other_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(_native, "extension", replaced("pack", fail))
    found = {finding.case.op: finding for finding in check_all(torch.device("cpu"))}
    assert found["pack_mask"].failed.startswith("RuntimeError: no kernel image")
    assert found["sensitivity"].right


def test_without_the_extension_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", None)
    done = CliRunner().invoke(make_selfcheck(), ["--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "plain PyTorch, as C++ is not installed here: sensitivity, attack_features" in done.output


def test_it_leaves_pytorchs_settings_as_they_were() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    next(iter(check_all(torch.device("cpu"))))
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32) == before
