"""Device, precision and engine of a run: what is chosen, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import ENGINES, Runtime, choose_device, choose_precision
from dau_fast.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("cpu", False, "cpu"),
        ("cpu", True, "cpu"),
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cuda", True, "cuda"),
    ],
)
def test_a_device_is_chosen_by_name_and_by_what_is_there(
    name: str, available: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device(name) == torch.device(expected)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device here: take `device=cpu`"):
        choose_device("cuda")


@pytest.mark.parametrize("local_rank", [0, 3])
def test_where_gpus_are_too_few_every_process_says_so(
    local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert choose_device("cpu", local_rank, 4) == CPU
    with pytest.raises(UserError, match="4 processes are too many for the 2 GPUs that PyTorch finds here"):
        choose_device("auto", local_rank, 4)


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:7", "mps"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"`device={name}`: expected one of auto, cpu, cuda"):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CPU, None),
        ("auto", CUDA, torch.bfloat16),
        ("fp32", CUDA, None),
        ("bf16", CPU, torch.bfloat16),
    ],
)
def test_a_precision_is_chosen_by_name_and_device(
    name: str, device: torch.device, expected: torch.dtype | None
) -> None:
    assert choose_precision(name, device) is expected


@pytest.mark.parametrize("name", ["fp16", "", "BF16"])
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"`precision={name}`: expected one of auto, fp32, bf16"):
        choose_precision(name, CPU)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_a_runtime_knows_its_precision_by_name(name: str) -> None:
    assert Runtime(precision=choose_precision(name, CPU)).precision_name == name


@pytest.mark.parametrize("name", ["auto", *ENGINES[:2]])
def test_an_engine_that_is_named_is_taken(name: str) -> None:
    assert Runtime(engine=name).engine == name


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"engine": "jit"}, "`engine=jit`: expected one of auto, eager, compiled, graphed, captured"),
    ({"engine": "captured"}, "`engine=captured` needs a CUDA device: take eager or compiled here"),
    ({"engine": "graphed"}, "`engine=graphed` needs a CUDA device: take eager or compiled here"),
    ({"engine": "compiled", "ranks": Ranks(0, 2)}, "`engine=compiled` is for one process, and there are 2"),
    ({"shard": True}, "`shard=True` shares a model out .* there is one: start them with torchrun, or leave"),
    ({"accumulate": 0}, "`accumulate=0`: expected how many parts of a batch, from 1 to 65536"),
]


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=[" ".join(settings) for settings, _ in WRONG])
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Runtime(**settings)
