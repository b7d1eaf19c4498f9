"""The kernels of masks and masked steps without a GPU: in Triton's interpreter, and built by ptxas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import CAPABILITIES, Launches, build
from torch import Tensor

from dau_fast.ops import pack_mask

SIZES = [(1,), (7,), (33, 40), (1024,), (1025,), (3, 5, 7), (0,)]


@pytest.fixture
def launchers() -> ModuleType:
    """The launchers, which take CPU tensors in the interpreter."""
    return importlib.import_module("dau_fast.ops._masked_step_cuda")


def some(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in SIZES]


def some_masks() -> list[Tensor]:
    """All kept, none kept, and shares of both."""
    generator = torch.Generator().manual_seed(99)
    masks = [torch.rand(size, generator=generator) < 0.2 for size in SIZES]
    masks[0].fill_(True)
    masks[3].fill_(False)
    return masks


def zeroed(tensors: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    return [torch.where(mask, x, 0.0) for x, mask in zip(tensors, masks, strict=True)]


@pytest.mark.interpreter
def test_masked_weights_become_zero_and_no_others(launchers: ModuleType) -> None:
    weights, masks = some(0), some_masks()
    weights[2][0, 0] = float("nan")
    masks[2][0, 0] = False
    expected = zeroed(weights, masks)
    launchers.apply(weights, [pack_mask(mask) for mask in masks])
    for found, wanted in zip(weights, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": torch.tensor(0.05), "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
    ],
)
def test_steps_of_sgd_are_torchs_followed_by_masking(launchers: ModuleType, options: dict[str, Any]) -> None:
    masks = some_masks()
    bits = [None if mask.all() else pack_mask(mask) for mask in masks]
    weights = zeroed(some(0), masks)
    momenta = [torch.full_like(w, float("nan")) for w in weights]
    usual = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(usual, **options)
    settings = {
        "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
    } | options  # fmt: skip
    if not settings["momentum"]:
        momenta = []
    # What is masked is never read: momenta hold 0 there from the start.
    for buffer, mask in zip(momenta, masks, strict=False):
        buffer[~mask] = 0
    for step in range(4):
        grads = some(step + 1)
        launchers.sgd(weights, grads, momenta, bits, [step == 0] * len(weights), **settings)
        for w, grad in zip(usual, grads, strict=True):
            w.grad = grad.clone()
        optimizer.step()
        with torch.no_grad():
            for w, mask in zip(usual, masks, strict=True):
                w.mul_(mask)
    for found, wanted, mask in zip(weights, usual, masks, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
        assert (found[~mask] == 0).all()
    for buffer, mask in zip(momenta, masks, strict=False):
        assert buffer.isfinite().all()
        assert (buffer[~mask] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": torch.tensor(1e-2), "weight_decay": 0.3, "betas": (0.8, 0.95)},
        {"lr": 1e-2, "eps": 1e-3, "maximize": True},
    ],
)
def test_steps_of_adamw_are_torchs_followed_by_masking(
    launchers: ModuleType, options: dict[str, Any]
) -> None:
    masks = some_masks()
    bits = [None if mask.all() else pack_mask(mask) for mask in masks]
    weights = zeroed(some(0), masks)
    averages, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]
    usual = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(usual, **options)
    given = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "maximize": False} | options
    beta1, beta2 = given.pop("betas")
    for step in range(5):
        grads = some(step + 1)
        launchers.adamw(weights, grads, averages, squares, steps, bits, beta1=beta1, beta2=beta2, **given)
        for w, grad in zip(usual, grads, strict=True):
            w.grad = grad.clone()
        optimizer.step()
        with torch.no_grad():
            for w, mask in zip(usual, masks, strict=True):
                w.mul_(mask)
    for found, wanted, mask in zip(weights, usual, masks, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
        assert (found[~mask] == 0).all()
    for state in (*averages, *squares):
        assert state.isfinite().all()


# ---- tables


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["apply", "sgd", "adamw"])
def test_in_a_capture_the_same_happens_without_the_cache(
    launchers: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that a graph reads may be in a cache that can drop it, nor come from the host."""
    masks = some_masks()
    bits = [pack_mask(mask) for mask in masks]
    results = []
    for capturing in (False, True):
        monkeypatch.setattr(launchers, "_capturing", lambda _, answer=capturing: answer)
        before = launchers._copied.cache_info()
        weights, first, second = (zeroed(some(seed), masks) for seed in range(3))
        second = [x.abs() for x in second]
        if kind == "apply":
            weights = some(0)
            launchers.apply(weights, bits)
        elif kind == "sgd":
            begun = [False, True] * 3 + [False]
            launchers.sgd(weights, some(3), first, bits, begun, 0.1, 0.9, 0.2, 0.1, False, False)
        else:
            steps = [torch.tensor(3.0) for _ in weights]
            launchers.adamw(
                weights, some(3), first, second, steps, bits, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.1, False
            )
        results.append([*weights, *first, *second])
        assert (launchers._copied.cache_info() == before) == capturing
    assert all(map(torch.equal, *results))


@pytest.mark.interpreter
def test_gradients_at_other_addresses_are_found(launchers: ModuleType) -> None:
    """More of them than the cache has places, and then those of the first step again."""
    weights, masks = [torch.zeros(40)], [pack_mask(torch.arange(40) % 2 == 0)]
    grads = [[torch.full((40,), float(i))] for i in range(70)]
    for grad in [*grads, grads[0], grads[69]]:
        weights[0].zero_()
        launchers.sgd(weights, grad, [], masks, [], 1.0, 0.0, 0.0, 0.0, False, False)
        assert torch.equal(weights[0], -grad[0] * (torch.arange(40) % 2 == 0))


def test_tables_that_kernels_write_hold_every_address() -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _masked_step_cuda as cuda

    rows = tuple((0, 2**63 - 1 - i, 2**33 + 1, 7 * i) for i in range(300))
    assert torch.equal(cuda._written_by_kernels(rows, torch.device("cpu")), torch.tensor(rows))


def test_a_table_says_what_comes_before_each_tensor() -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _masked_step_cuda as cuda

    columns, counts = ((5, 6, 7), (0, 8, 0)), (2 * cuda.BLOCK + 1, 0, 1)
    table = cuda._table(columns, counts, torch.device("cpu"))
    assert table.tolist() == [[5, 0, counts[0], 0], [6, 8, 0, 3], [7, 0, 1, 3]]
    assert cuda._count_blocks(counts) == 4


def test_a_learning_rate_elsewhere_is_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _masked_step_cuda as cuda

    monkeypatch.setattr(cuda, "_capturing", lambda _: True)
    lr = torch.empty((), device="meta")
    with pytest.raises(RuntimeError, match=r"lr is a tensor on meta.*expected one on cpu; make it with"):
        cuda._on(lr, [torch.ones(2)])


# ---- builds

KERNELS: dict[str, list[dict[str, Any]]] = {
    "apply_kernel": [{}, {"TENSORS": 1024}],
    "sgd_kernel": [
        {"LR_IS_TENSOR": captured, "MOMENTUM": True, "NESTEROV": captured, "MAXIMIZE": False}
        for captured in (False, True)
    ],
    "adamw_kernel": [{"LR_IS_TENSOR": captured, "MAXIMIZE": False} for captured in (False, True)],
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_builds_without_spilling(name: str, capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _masked_step_cuda as cuda

    kernel = getattr(cuda, name)
    types = {"table_ptr": "*i64:16", "lr_ptr": "*fp32:16", "biases_ptr": "*fp32:16"}
    types |= {"tensors": "i32", "first": "i32"}
    given = {n: types.get(n, "fp32") for n in kernel.arg_names} | {"BLOCK": cuda.BLOCK, "TENSORS": 64}
    for constants in KERNELS[name]:
        found = build(kernel, given | constants, capability, tmp_path, num_warps=cuda.WARPS)
        assert found.spilled == 0, found
        assert found.registers <= 128


def test_a_step_is_one_launch_whatever_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _masked_step_cuda as cuda

    launches = Launches(cuda, monkeypatch)
    weights, grads, momenta = some(0), some(1), some(2)
    bits = [pack_mask(mask) for mask in some_masks()]
    count = len(weights)
    cuda.apply(weights, bits)
    cuda.sgd(weights, grads, momenta, bits, [False] * count, 0.1, 0.9, 0.0, 0.1, False, False)
    steps = [torch.zeros(()) for _ in weights]
    cuda.adamw(weights, grads, momenta, some(3), steps, bits, 0.1, 0.9, 0.99, 1e-8, 0.1, False)
    assert launches.names == ["apply_kernel", "sgd_kernel", "adamw_kernel"]
    # Weights that have had a step and others that have not are a launch each.
    cuda.sgd(weights, grads, momenta, bits, [True] + [False] * (count - 1), 0.1, 0.9, 0.0, 0.1, False, False)
    assert launches.names[3:] == ["sgd_kernel"] * 2
