"""The Barlow Twins kernels without a GPU: their numbers in Triton's interpreter, their builds by ptxas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import CAPABILITIES, Launches, build, with_sizes_of_one
from test_barlow_twins_op import defined, relative_error, value_and_gradients, views
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(2, 1), (2, 3), (3, 2), (17, 33), (33, 17), (66, 70), (130, 20), (20, 130), (5, 300)]


@pytest.fixture
def launchers() -> ModuleType:
    """The launchers, which take CPU tensors in the interpreter."""
    return importlib.import_module("dau_fast.ops._barlow_twins_cuda")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Memory that a kernel forgets to write shows as NaN."""


def run(
    launchers: ModuleType, a: Tensor, b: Tensor, *, gram: bool, precision: str = "ieee", factor: float = 1.0
) -> tuple[Tensor, ...]:
    """Loss and gradients, with `factor` in front."""
    loss, stats, products = launchers.forward(a, b, 0.1, 1e-5, gram, precision)
    grad_loss = torch.tensor(factor)
    grads = launchers.backward(grad_loss, a, b, stats, products, 0.1, gram, precision, True, True)
    return loss, *grads


def expected_of(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return value_and_gradients(lambda x, y: defined(x, y, 0.1), a.double(), b.double())


@pytest.mark.interpreter
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("gram", [True, False])
def test_numbers_are_those_of_the_definition(launchers: ModuleType, n: int, d: int, gram: bool) -> None:
    a, b = views(n, d, torch.float32)
    for found, expected in zip(run(launchers, a, b, gram=gram), expected_of(a, b), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("gram", [True, False])
def test_errors_are_those_of_float32(launchers: ModuleType, gram: bool) -> None:
    a, b = views(96, 80, torch.float32)
    for found, expected in zip(run(launchers, a, b, gram=gram), expected_of(a, b), strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("gram", [True, False])
def test_the_gradient_carries_the_factor_in_front(launchers: ModuleType, gram: bool) -> None:
    a, b = views(20, 24, torch.float32)
    once, tripled = run(launchers, a, b, gram=gram), run(launchers, a, b, gram=gram, factor=3.0)
    for one, three in zip(once[1:], tripled[1:], strict=True):
        torch.testing.assert_close(three, 3 * one)


@pytest.mark.interpreter
@pytest.mark.parametrize("gram", [True, False])
def test_strides_and_half_precision(launchers: ModuleType, gram: bool) -> None:
    a, b = views(18, 20, torch.float32)
    strided = a.T.contiguous().T, torch.stack([b, b], 2)[:, :, 0]
    for found, plain in zip(
        run(launchers, *strided, gram=gram), run(launchers, a, b, gram=gram), strict=True
    ):
        torch.testing.assert_close(found, plain)
    half, other = a.bfloat16(), b.half()
    found = run(launchers, half, other, gram=gram)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float16]
    for one, expected in zip(found, expected_of(half, other), strict=True):
        assert relative_error(one, expected) < 4e-3


@pytest.mark.interpreter
@pytest.mark.parametrize("gram", [True, False])
def test_one_side_alone_and_no_columns(launchers: ModuleType, gram: bool) -> None:
    a, b = views(6, 5, torch.float32)
    _, stats, products = launchers.forward(a, b, 0.1, 1e-5, gram, "ieee")
    saved = torch.tensor(1.0), a, b, stats, products, 0.1, gram, "ieee"
    both = launchers.backward(*saved, True, True)
    assert torch.equal(launchers.backward(*saved, True, False)[0], both[0])
    assert torch.equal(launchers.backward(*saved, False, True)[1], both[1])
    nothing = torch.zeros(6, 0)
    loss, stats, products = launchers.forward(nothing, nothing, 0.1, 1e-5, gram, "ieee")
    assert loss.item() == 0
    saved = torch.tensor(1.0), nothing, nothing, stats, products, 0.1, gram, "ieee"
    assert launchers.backward(*saved, True, True)[0].shape == (6, 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("gram", [True, False])
def test_a_value_that_is_not_finite_shows(launchers: ModuleType, gram: bool) -> None:
    a, b = views(18, 20, torch.float32)
    a[3, 4] = float("inf")
    loss, grad_a, grad_b = run(launchers, a, b, gram=gram)
    assert loss.isnan()
    assert grad_a.isnan().any()
    assert grad_b.isnan().any()


class Calls(TorchDispatchMode):
    """Notes PyTorch's own operations, each of which is a launch; not those that only allocate or look."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is filled is filled with NaN: the poison of these tests.
        made = ("new_empty", "unbind", "select", "view", "empty", "fill_")
        if not any(word in func._schema.name for word in made):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("n", "d", "kernels"),
    [
        (256, 8192, ["statistics", "gram", "gram_loss", "gram_pull", "gram_backward"]),
        (512, 128, ["statistics", "correlation", "primal_loss", "primal_backward"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_loss_and_gradients_are_few_launches(
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    d: int,
    kernels: list[str],
    dtype: torch.dtype,
    sides: tuple[bool, bool],
) -> None:
    """Five in the Gram form and four in the other, and nothing of PyTorch's among them."""
    pytest.importorskip("triton")
    cuda, of_gram = (importlib.import_module(f"dau_fast.ops.{name}") for name in (PRIMAL, GRAM))
    counted = [Launches(module, monkeypatch) for module in (cuda, of_gram)]
    a, b = (torch.empty(n, d, dtype=dtype, device="meta") for _ in range(2))
    grad_loss = torch.empty((), device="meta")
    with Calls() as calls:
        _, stats, products = cuda.forward(a, b, 0.1, 1e-5, n < d, "tf32x3")
        cuda.backward(grad_loss, a, b, stats, products, 0.1, n < d, "tf32x3", *sides)
    assert calls.seen == []
    launched = [name for one in counted for name in one.names]
    assert sorted(launched) == sorted(f"{name}_kernel" for name in kernels)


@pytest.mark.interpreter
def test_equal_views_give_equal_bits_whatever_was_in_memory(launchers: ModuleType) -> None:
    for n, d in ((70, 300), (130, 70)):
        a, b = views(n, d, torch.float32)
        once, again = (run(launchers, a, b, gram=n < d) for _ in range(2))
        assert all(map(torch.equal, once, again))


# ---- ahead of time


def arguments_of(kernel: Any, view: str, aligned: bool) -> dict[str, Any]:
    """Types as the launchers pass them; aligned: the sizes and strides that networks have."""
    from dau_fast.ops import _barlow_twins_gram_cuda as of_gram
    from dau_fast.ops import _barlow_twins_parts_cuda as cuda

    by_sixteen = ":16" if aligned else ""
    found: dict[str, Any] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in ("a_ptr", "b_ptr", "grad_a_ptr", "grad_b_ptr"):
            found[name] = f"*{view}{by_sixteen}"
        elif name == "finished_ptr":
            found[name] = f"*i32{by_sixteen}"
        elif name.endswith("_ptr"):
            found[name] = f"*fp32{by_sixteen}"
        elif name in ("eps", "lambd"):
            found[name] = "fp32"
        elif name in ("stride_ad", "stride_bd"):
            found[name] = 1 if aligned else "i32"
        elif name in ("tiles", "shares", "first"):
            found[name] = "i32"
        elif name[0].islower() or name in ("N", "D"):
            found[name] = f"i32{by_sixteen}"
    constants = {"TILE": cuda.TILE, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK": of_gram.LOSS_BLOCK}
    return found | {n: v for n, v in constants.items() if n in {p.name for p in kernel.params}}


PRIMAL, GRAM = "_barlow_twins_cuda", "_barlow_twins_gram_cuda"
KERNELS = {
    "statistics_kernel": PRIMAL, "correlation_kernel": PRIMAL, "primal_loss_kernel": PRIMAL,
    "primal_backward_kernel": PRIMAL, "gram_kernel": GRAM, "gram_loss_kernel": GRAM, "gram_pull_kernel": GRAM,
    "gram_backward_kernel": GRAM,
}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("view", "aligned"), [("fp32", True), ("bf16", False)])
def test_every_kernel_builds_without_spilling(
    name: str, capability: int, view: str, aligned: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _barlow_twins_parts_cuda as cuda

    kernel = getattr(importlib.import_module(f"dau_fast.ops.{KERNELS[name]}"), name)
    arguments = arguments_of(kernel, view, aligned)
    products = "PRECISION" in {parameter.name for parameter in kernel.params}
    for precision in ("tf32x3", "ieee") if aligned and products else ("tf32",):
        tiling = dict(cuda.TILING[precision])
        stages = {"num_stages": tiling.pop("num_stages")} if products else {}
        if name == "gram_kernel":
            stages = {"num_stages": importlib.import_module(f"dau_fast.ops.{GRAM}").PRODUCT_STAGES}
        chosen = {"PRECISION": precision, **tiling} if products else {}
        found = build(kernel, arguments | chosen, capability, tmp_path, num_warps=cuda.WARPS, **stages)
        assert found.spilled == 0, (precision, found)
        assert found.registers <= 255


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_builds_for_sizes_of_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _barlow_twins_parts_cuda as cuda

    kernel = getattr(importlib.import_module(f"dau_fast.ops.{KERNELS[name]}"), name)
    products = {"PRECISION": "tf32", "DEPTH": 32} if "PRECISION" in kernel.arg_names else {}
    given = with_sizes_of_one(arguments_of(kernel, "fp32", True)) | products
    build(kernel, given, 90, tmp_path, num_warps=cuda.WARPS)
