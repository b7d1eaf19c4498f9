"""BatchNorm's kernels without a GPU: their numbers in Triton's interpreter, their builds by ptxas."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import CAPABILITIES, Launches, build, with_sizes_of_one
from test_batch_norm import SHAPES, Norm, defined, error, results, sample
from torch import Tensor

from dau_fast.ops import batch_norm
from dau_fast.ops._library import PATHS
from dau_fast.ops.batch_norm import FusedBatchNorm

# Of several parts and several blocks of columns.
MANY = (9, 130, 8, 8)


@pytest.fixture
def launchers() -> ModuleType:
    """The launchers, which take CPU tensors in the interpreter."""
    return importlib.import_module("dau_fast.ops._batch_norm_cuda")


@pytest.fixture
def fused(launchers: ModuleType, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Norm:
    """`batch_norm` as on a GPU; memory that a kernel forgets to write shows as NaN."""
    module = sys.modules["dau_fast.ops.batch_norm"]
    monkeypatch.setattr(module, "_one_by_one", FusedBatchNorm.apply)
    monkeypatch.setattr(module, "batch_norm_op", launchers.batch_norm)
    monkeypatch.setattr(module, "_backward", launchers.batch_norm_backward)
    return batch_norm


def assert_as_exact(norm: Norm, given: dict[str, Tensor | None], relu: bool) -> None:
    """Errors against float64 are no larger than those of PyTorch's own."""
    exact = results(defined, given, relu, torch.float64)
    usual = [error(*pair) for pair in zip(results(defined, given, relu), exact, strict=True)]
    found = [error(*pair) for pair in zip(results(norm, given, relu), exact, strict=True)]
    least = 4 * torch.finfo(torch.float32).eps
    close = [ours <= 3 * max(theirs, least) for ours, theirs in zip(found, usual, strict=True)]
    assert all(close), (found, usual)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [*SHAPES, MANY])
@pytest.mark.parametrize(
    ("relu", "add", "dtype"),
    [(relu, add, torch.float32) for relu in (False, True) for add in (False, True)]
    + [(True, True, torch.float16)],
)
def test_numbers_and_gradients_are_those_of_the_definition_in_float64(
    fused: Norm, shape: tuple[int, ...], relu: bool, add: bool, dtype: torch.dtype
) -> None:
    """Statistics that move, and the count of batches, among them."""
    assert_as_exact(fused, sample(shape, dtype, add), relu)


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [1, 12])
def test_parts_of_several_tiles(
    launchers: ModuleType, fused: Norm, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "FILL", programs)
    _, parts, share = launchers._share(9 * 8 * 8, 130)
    assert (parts, share // launchers.SUMMED) == {1: (1, 9), 12: (3, 3)}[programs]
    assert_as_exact(fused, sample(MANY, torch.float32, True), True)


@pytest.mark.interpreter
def test_bfloat16(fused: Norm) -> None:
    """The interpreter cuts it off where the device rounds."""
    given = sample(SHAPES[0], torch.bfloat16, True)
    exact = results(defined, given, False, torch.float64)
    found = results(fused, given, False)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert max(error(*pair) for pair in zip(found, exact, strict=True)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.interpreter
@pytest.mark.parametrize("away", [30.0, 1000.0])
def test_means_that_are_large_beside_deviations(fused: Norm, away: float) -> None:
    """A sum of squares would have no digit of the variance left."""
    given = sample(MANY, torch.float32, False)
    x = given["x"]
    centred = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    given["x"] = (centred + away * torch.linspace(-1, 1, x.shape[1]).view(-1, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )
    exact = results(defined, given, False, torch.float64)
    found = results(fused, given, False)
    # The mean itself is rounded to float32, which is away times as much of a deviation.
    limit = 4 * away * torch.finfo(torch.float32).eps
    assert max(error(*pair) for pair in zip(found, exact, strict=True)) < limit


@pytest.mark.interpreter
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("place", [0, 70, -1], ids=["first", "in the middle", "last"])
def test_a_nan_stays_in_its_channel(fused: Norm, place: int, relu: bool) -> None:
    given = sample(MANY, torch.float32, True)
    clean = results(fused, given, relu)
    rows = given["x"].permute(0, 2, 3, 1).flatten(0, 2)  # a view: one row a pixel
    rows[place, 65] = float("nan")
    found = results(fused, given, relu)
    expected = results(defined, given, relu)
    for one, theirs, before in zip(found, expected, clean, strict=True):
        assert torch.equal(one.isnan(), theirs.isnan())
        channels = one.movedim(1, 0) if one.ndim == 4 else one
        others = before.movedim(1, 0) if before.ndim == 4 else before
        if one.ndim:
            kept = torch.arange(len(channels)) != 65
            assert torch.equal(channels[kept], others[kept])


@pytest.mark.interpreter
def test_a_nan_that_is_added_stays_where_it_is(fused: Norm) -> None:
    given = sample(SHAPES[1], torch.float32, True)
    given["add"][1, 2, 3, 1] = float("nan")
    found = results(fused, given, True)
    expected = results(defined, given, True)
    assert found[0].isnan().sum() == 1
    for one, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.interpreter
def test_what_is_not_tracked_is_not_touched(fused: Norm) -> None:
    given = sample(SHAPES[0], torch.float32, False)
    none = {"running_mean": None, "running_var": None, "batches": None}
    assert_as_exact(fused, given | none, True)
    # Only the count is missing, and only the count is there.
    assert_as_exact(fused, given | {"batches": None}, False)
    count = torch.tensor(3)
    fused(**given | none | {"batches": count})
    assert count == 4


@pytest.mark.interpreter
def test_results_are_the_same_every_time_and_of_their_own(fused: Norm) -> None:
    given = sample(MANY, torch.float32, True)
    first, second = (results(fused, given, True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    y = fused(**given | {"x": given["x"].clone().requires_grad_()})
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.mul_(2)  # which autograd refuses for a view of what a Function made
    y.sum().backward()


@pytest.mark.interpreter
def test_a_gpu_finds_them_by_their_names() -> None:
    given = sample(SHAPES[1], torch.float32, True)
    pull = torch.ones_like(given["x"])
    found = []
    for device in ("CUDA", "CPU"):
        own = [None if x is None else x.clone() for x in given.values()]
        y, lines = PATHS["batch_norm", device](*own, True, 0.1, 1e-5)
        pulled = PATHS["batch_norm_backward", device](pull, own[0], y, lines, True, True)
        found.append([y, lines, *pulled, *own])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ---- ahead of time

KERNELS = ("moments", "batch_statistics", "normalise", "sums", "join", "gradients")
LARGE = {"x_ptr", "more_ptr", "y_ptr", "grad_ptr", "of_x_ptr", "of_more_ptr"}


def arguments_of(name: str, view: str, columns: int, parts: int, aligned: bool) -> dict[str, Any]:
    """Types as the launchers pass them. view: of x and what is like it. aligned: to 16 bytes, as most are."""
    from dau_fast.ops import _batch_norm_cuda as cuda

    by_sixteen = ":16" if aligned else ""
    found: dict[str, Any] = {"count_ptr": "*i64", "momentum": "fp32", "eps": "fp32", "PARTS": parts}
    found |= dict.fromkeys(LARGE, f"*{view}{by_sixteen}") | dict.fromkeys("RC", f"i32{by_sixteen}")
    found["ROWS"] = cuda.SUMMED if name in ("moments", "sums") else cuda.ROWS
    found["COLUMNS"] = cuda.JOINED if name in ("batch_statistics", "join") else columns
    parameters = [parameter.name for parameter in getattr(cuda, f"{name}_kernel").params]
    unsaid = {other: f"*fp32{by_sixteen}" if other.endswith("_ptr") else "i32" for other in parameters}
    return {other: found.get(other, unsaid[other]) for other in parameters}


def warps_of(name: str) -> int:
    from dau_fast.ops import _batch_norm_cuda as cuda

    return cuda.JOIN_WARPS if name in ("batch_statistics", "join") else cuda.WARPS


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("view", "columns", "parts", "aligned"), [("bf16", 64, 512, True), ("fp32", 16, 64, False)]
)
def test_every_kernel_builds_without_spilling(
    capability: int, name: str, view: str, columns: int, parts: int, aligned: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _batch_norm_cuda as cuda

    given = arguments_of(name, view, columns, parts, aligned)
    found = build(getattr(cuda, f"{name}_kernel"), given, capability, tmp_path, num_warps=warps_of(name))
    assert found.spilled == 0, found
    assert found.registers <= 128


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_builds_for_sizes_of_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _batch_norm_cuda as cuda

    given = with_sizes_of_one(arguments_of(name, "fp32", 16, 64, False))
    build(getattr(cuda, f"{name}_kernel"), given, 90, tmp_path, num_warps=warps_of(name))


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_there_are_three_launches_forward_and_three_backward(
    tracked: bool, relu: bool, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _batch_norm_cuda as cuda

    launches = Launches(cuda, monkeypatch)
    given = sample(SHAPES[0], torch.bfloat16, add)
    if not tracked:
        given |= {"running_mean": None, "running_var": None, "batches": None}
    y, lines = cuda.batch_norm(*given.values(), relu, 0.1, 1e-5)
    assert launches.names == ["moments_kernel", "batch_statistics_kernel", "normalise_kernel"]
    cuda.batch_norm_backward(y, given["x"], y, lines, relu, relu and add)
    assert launches.names[3:] == ["sums_kernel", "join_kernel", "gradients_kernel"]


def test_rows_are_shared_out_without_one_left_or_a_part_empty() -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _batch_norm_cuda as cuda

    for rows in [2, 63, 64, 65, 16_896, 16_897, 65_536, 262_144, 262_145, 2**31 - 1]:
        for columns in (1, 3, 16, 17, 64, 65, 512, 2048, 20_000):
            width, parts, share = cuda._share(rows, columns)
            assert 16 <= width <= cuda.COLUMNS
            assert (parts - 1) * share < rows <= parts * share
            assert parts <= cuda._room(parts)
