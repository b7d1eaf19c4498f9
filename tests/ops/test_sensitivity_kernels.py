"""The sensitivity kernels without a GPU: their numbers in Triton's interpreter, their builds by ptxas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import CAPABILITIES, Launches, build, with_sizes_of_one
from test_sensitivity_op import defined, sample
from torch import Tensor

# (B, C, D); from 4,097 classes on a row is cut into shares.
SHAPES = [(1, 2, 1), (1, 10, 5), (7, 10, 33), (6, 17, 600), (3, 1000, 20), (2, 4096, 3), (3, 4097, 17)]
WIDE = [(1, 9001, 5), (2, 50257, 3)]


@pytest.fixture
def launchers() -> ModuleType:
    """The launchers, which take CPU tensors in the interpreter."""
    return importlib.import_module("dau_fast.ops._sensitivity_cuda")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Memory that a kernel forgets to write shows as NaN."""


def run(
    launchers: ModuleType,
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    bias: bool = True,
    softmax: bool = False,
    predicted: bool = False,
) -> tuple[Tensor, ...]:
    """What is shown, and the gradients of a weighted sum of it."""
    logits, features, targets = inputs
    shown, stats, labels = launchers.forward(logits, features, None if predicted else targets, bias, softmax)
    labels = labels if predicted else targets
    grads = launchers.backward(weights_for(shown), logits, features, labels, stats, softmax, True, True)
    return shown, *grads


def weights_for(shown: Tensor) -> Tensor:
    return torch.arange(1, shown.numel() + 1, dtype=torch.float32).sin().view(shown.shape)


def expected_of(inputs: tuple[Tensor, Tensor, Tensor], **options: bool) -> tuple[Tensor, ...]:
    logits, features, targets = inputs
    z, h = logits.double().requires_grad_(), features.double().requires_grad_()
    shown = defined(z, h, targets, **options)
    return shown.detach(), *torch.autograd.grad((shown * weights_for(shown)).sum(), (z, h))


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 2e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.interpreter
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("predicted", [False, True])
def test_numbers_are_those_of_the_definition(
    launchers: ModuleType, b: int, c: int, d: int, softmax: bool, predicted: bool
) -> None:
    inputs = sample(b, c, d)
    options = {"softmax": softmax, "predicted": predicted}
    close(run(launchers, inputs, **options), expected_of(inputs, **options))


@pytest.mark.interpreter
@pytest.mark.parametrize(("b", "c", "d"), WIDE)
@pytest.mark.parametrize("predicted", [False, True])
def test_rows_in_many_shares(launchers: ModuleType, b: int, c: int, d: int, predicted: bool) -> None:
    inputs = sample(b, c, d)
    options = {"softmax": True, "predicted": predicted}
    close(run(launchers, inputs, **options), expected_of(inputs, **options))
    if not predicted:
        close(run(launchers, inputs, bias=False), expected_of(inputs, bias=False))


@pytest.mark.interpreter
@pytest.mark.parametrize("c", [10, 5000])
def test_the_predicted_label_is_the_first_of_the_largest(launchers: ModuleType, c: int) -> None:
    logits, features, _ = sample(4, c, 3)
    logits[1] = 0
    logits[2, [c // 2, c - 1]] = 50
    predicted = launchers.forward(logits, features, None, True, False)[2]
    assert predicted.tolist() == [logits[0].argmax().item(), 0, c // 2, logits[3].argmax().item()]


@pytest.mark.interpreter
@pytest.mark.parametrize("c", [10, 5000])
def test_strides_and_half_precision(launchers: ModuleType, c: int) -> None:
    logits, features, targets = sample(5, c, 6)
    plain = run(launchers, (logits, features, targets), softmax=True)
    apart = torch.stack([features, features], 2)[:, :, 0]
    strided = logits.T.contiguous().T, apart, torch.stack([targets, targets], 1)[:, 0]
    for one, other in zip(run(launchers, strided, softmax=True), plain, strict=True):
        torch.testing.assert_close(one, other)
    half = logits.bfloat16(), features.half(), targets
    found = run(launchers, half)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float16]
    close(found, expected_of(half), 8e-3)


@pytest.mark.interpreter
@pytest.mark.parametrize("c", [10, 5000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("predicted", [False, True])
def test_a_value_that_is_not_finite_stays_in_its_row(
    launchers: ModuleType, c: int, value: float, predicted: bool
) -> None:
    logits, features, targets = sample(3, c, 4)
    logits[1, c - 1 if value < 0 else 2] = value
    if value < 0:
        logits[1, c // 2 :] = value  # a whole share of them
        targets[1] = 0
    found = run(launchers, (logits, features, targets), softmax=True, predicted=predicted)
    for row, expected in ((0, True), (1, value < 0), (2, True)):
        for part in found:
            assert part[row].isfinite().all().item() == expected
    if value < 0:
        close(found, expected_of((logits, features, targets), softmax=True, predicted=predicted))


@pytest.mark.interpreter
@pytest.mark.parametrize("c", [10, 5000])
def test_where_the_answer_is_exact_the_gradient_is_0(launchers: ModuleType, c: int) -> None:
    logits, features, targets = sample(2, c, 4)
    logits[:] = 0
    logits[torch.arange(2), targets] = 2000
    features[1] = 0
    for bias in (True, False):
        shown, *grads = run(launchers, (logits, features, targets), bias=bias)
        assert (shown == 0).all()
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.interpreter
def test_one_gradient_alone_and_nothing_at_all(launchers: ModuleType) -> None:
    logits, features, targets = sample(4, 10, 5)
    shown, stats, _ = launchers.forward(logits, features, targets, True, False)
    saved = torch.ones_like(shown), logits, features, targets, stats, False
    both = launchers.backward(*saved, True, True)
    assert torch.equal(launchers.backward(*saved, True, False)[0], both[0])
    assert torch.equal(launchers.backward(*saved, False, True)[1], both[1])
    assert [x.numel() for x in launchers.backward(*saved, False, False)] == [0, 0]
    for b, d in ((0, 5), (3, 0)):
        logits, features, targets = sample(b, 10, d)
        shown, grad_logits, grad_features = run(launchers, (logits, features, targets))
        assert (shown.shape, grad_logits.shape, grad_features.shape) == ((b,), (b, 10), (b, d))
        assert shown.isfinite().all()


# ---- ahead of time

KERNELS: dict[str, list[dict[str, Any]]] = {
    "forward_kernel": [
        {"PREDICTED": p, "SOFTMAX": s, "ROWS": rows, "BLOCK_C": block}
        for p, s in ((False, False), (True, True))
        for rows, block in ((4, 16), (1, 4096))
    ],
    "share_kernel": [{"PREDICTED": False}, {"PREDICTED": True}],
    "finish_kernel": [{"PREDICTED": p, "SOFTMAX": p, "SHARES": 64} for p in (False, True)],
    "softmax_kernel": [{}],
    "mean_kernel": [{}],
    "backward_kernel": [
        {"SOFTMAX": False, "SHARES": 0, "ROWS": 4, "BLOCK_C": 16},
        {"SOFTMAX": True, "SHARES": 0, "ROWS": 1, "BLOCK_C": 4096},
        {"SOFTMAX": True, "SHARES": 64, "ROWS": 1, "BLOCK_C": 4096},
    ],
}


def arguments_of(kernel: Any, view: str, aligned: bool) -> dict[str, Any]:
    """Types as the launchers pass them; aligned: contiguous arrays of the sizes that networks have."""
    from dau_fast.ops import _sensitivity_cuda as cuda

    by_sixteen = ":16" if aligned else ""
    found: dict[str, Any] = {"BIAS": True, "WIDTH": cuda.WIDTH, "SHARE": cuda.SHARE}
    for parameter in kernel.params:
        name = parameter.name
        if name in ("targets_ptr", "labels_ptr", "predicted_ptr", "places_ptr"):
            found[name] = f"*i64{by_sixteen}"
        elif name in ("z_ptr", "h_ptr", "grad_z_ptr", "grad_h_ptr"):
            found[name] = f"*{view}{by_sixteen}"
        elif name.endswith("_ptr"):
            found[name] = f"*fp32{by_sixteen}"
        elif name in ("stride_zc", "stride_hd", "stride_gc", "stride_t", "stride_l"):
            found[name] = 1 if aligned else "i32"
        elif name.startswith("stride") or name in ("B", "C", "D"):
            found[name] = f"i32{by_sixteen}"
        elif name in ("shares", "blocks", "z_blocks"):
            found[name] = "i32"
    return {name: given for name, given in found.items() if name in {p.name for p in kernel.params}}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("view", "aligned"), [("fp32", True), ("bf16", False)])
def test_every_kernel_builds_without_spilling(
    name: str, capability: int, view: str, aligned: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _sensitivity_cuda as cuda

    kernel = getattr(cuda, name)
    for constants in KERNELS[name]:
        given = arguments_of(kernel, view, aligned) | constants
        checks = cuda.CHECKS if "targets_ptr" in given else {}
        found = build(kernel, given, capability, tmp_path, num_warps=cuda.WARPS, **checks)
        assert found.spilled == 0, (constants, found)
        assert found.registers <= 255


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_builds_for_sizes_of_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _sensitivity_cuda as cuda

    kernel = getattr(cuda, name)
    for constants in KERNELS[name]:
        given = with_sizes_of_one(arguments_of(kernel, "fp32", True)) | constants
        build(kernel, given, 90, tmp_path, num_warps=cuda.WARPS)


def test_the_build_checks_targets(tmp_path: Path) -> None:
    """Without the launch option the assertion would be left out of the code."""
    pytest.importorskip("triton")
    from dau_fast.ops import _sensitivity_cuda as cuda

    kernel = cuda.finish_kernel
    given = arguments_of(kernel, "fp32", True) | KERNELS["finish_kernel"][0]
    build(kernel, given, 90, tmp_path, num_warps=cuda.WARPS, **cuda.CHECKS)
    assert b"__assertfail" in (tmp_path / "kernel.cubin").read_bytes()
    build(kernel, given, 90, tmp_path, num_warps=cuda.WARPS)
    assert b"__assertfail" not in (tmp_path / "kernel.cubin").read_bytes()


@pytest.mark.parametrize("classes", [10, 5000])
def test_no_number_of_rows_is_too_many_for_a_grid(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the first axis a grid ends at 65,535."""
    pytest.importorskip("triton")
    from dau_fast.ops import _sensitivity_cuda as cuda

    launches, rows = Launches(cuda, monkeypatch), 300_000
    meta = {"device": "meta"}
    logits, features = torch.empty(rows, classes, **meta), torch.empty(rows, 7, **meta)
    targets = torch.empty(rows, dtype=torch.int64, **meta)
    shown, stats, _ = cuda.forward(logits, features, targets, True, True)
    cuda.backward(shown, logits, features, targets, stats, True, True, True)
    assert launches.names == (
        ["forward_kernel", "backward_kernel"]
        if classes == 10
        else ["share_kernel", "finish_kernel", "softmax_kernel", "mean_kernel", "backward_kernel"]
    )
    assert all(len(grid) == 1 and grid[0] < 2**31 for _, grid in launches.grids)
