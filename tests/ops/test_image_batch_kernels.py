"""The kernel of the image batch without a GPU: its numbers in Triton's interpreter, its builds by ptxas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import CAPABILITIES, Launches, build, with_sizes_of_one
from test_image_batch import SHAPES, arguments, sample

from dau_fast.ops.reference import image_batch_reference


@pytest.fixture
def launchers() -> ModuleType:
    """The launchers, which take CPU tensors in the interpreter."""
    return importlib.import_module("dau_fast.ops._image_batch_cuda")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Memory that a kernel forgets to write shows as NaN."""


# Images of several blocks, of a block, and several images a block.
@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 20, 21, 2, 4), (2, 4, 16, 16, 3, 1), (40, 1, 4, 4, 70, 1)])
def test_numbers_are_those_of_the_definition(launchers: ModuleType, shape: tuple[int, ...]) -> None:
    store, windows = sample(*shape)
    plain, mirrored = {}, {"flip": windows["flip"]}
    cropped = {name: windows[name] for name in ("rows", "columns", "pad")}
    for chosen in (plain, mirrored, cropped, windows):
        for dtype in (torch.float32, torch.float16):
            found = launchers.image_batch(*arguments(store, chosen, dtype))
            assert found.dtype == dtype
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(found, image_batch_reference(**store, **chosen, dtype=dtype))
        # The interpreter cuts bfloat16 off where the device rounds.
        found = launchers.image_batch(*arguments(store, chosen, torch.bfloat16)).float()
        expected = image_batch_reference(**store, **chosen)
        torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.interpreter
def test_strides_types_and_one_scale_for_all_channels(launchers: ModuleType) -> None:
    store, windows = sample(6, 3, 8, 5, 9, 2)
    wide = torch.zeros(12, 5, 16, 11, dtype=torch.uint8)
    wide[::2, 1:4, ::2, 1::2] = store["pixels"]
    store["pixels"] = wide[::2, 1:4, ::2, 1::2]
    for name in ("rows", "columns", "flip"):
        windows[name] = torch.stack([windows[name], windows[name]], 1)[:, 0]
    windows["rows"], windows["columns"] = windows["rows"].int(), windows["columns"].to(torch.uint8)
    windows["flip"] = windows["flip"].long() * 2
    store["mean"], store["std"] = store["mean"][:1], torch.stack([store["std"], store["std"]], 1)[:, 0]
    found = launchers.image_batch(*arguments(store, windows, torch.float32))
    assert torch.equal(found, image_batch_reference(**store, **windows))


@pytest.mark.interpreter
def test_no_images(launchers: ModuleType) -> None:
    none, scale = torch.zeros(0, dtype=torch.int64), torch.ones(1)
    for shape in ((5, 3, 8, 8), (0, 3, 8, 8)):
        pixels = torch.zeros(shape, dtype=torch.uint8)
        found = launchers.image_batch(pixels, none, scale, scale, none, none, none, 0, torch.float32)
        assert found.shape == (0, 3, 8, 8)


@pytest.mark.interpreter
def test_more_than_2_to_the_31_pixels(launchers: ModuleType) -> None:
    count = 2**31 // 64 + 3
    pixels = torch.empty(count, 1, 8, 8, dtype=torch.uint8)  # the system gives memory where it is written
    pixels[-1] = torch.arange(64).view(8, 8)
    store = pixels, torch.tensor([count - 1]), torch.zeros(1), torch.ones(1)
    found = launchers.image_batch(*store, None, None, None, 0, torch.float32)
    assert torch.equal(found.flatten(), torch.arange(64) / 255)


# ---- ahead of time

# (C, H, W): CIFAR, digits, ImageNet, and sizes that nothing divides.
SIZES = [(3, 32, 32), (1, 8, 8), (3, 224, 224), (5, 7, 13)]


def arguments_of(view: str, size: tuple[int, int, int], windows: bool, aligned: bool) -> dict[str, Any]:
    """Types as the launcher passes them; aligned: contiguous arrays in channels_last."""
    from dau_fast.ops import _image_batch_cuda as cuda

    by_sixteen = ":16" if aligned else ""
    channels, height, width = size
    found: dict[str, Any] = {"C": channels, "H": height, "W": width, "CROP": windows, "FLIP": windows}
    found |= cuda.tile_of(channels * height * width)
    for parameter in cuda.image_batch_kernel.params:
        name = parameter.name
        if name == "flip_ptr":
            found[name] = "*i1"
        elif name in ("index_ptr", "rows_ptr", "columns_ptr"):
            found[name] = f"*i64{by_sixteen}"
        elif name == "pixels_ptr":
            found[name] = f"*u8{by_sixteen}"
        elif name == "out_ptr":
            found[name] = f"*{view}:16"
        elif name.endswith("_ptr"):
            found[name] = "*fp32"
        elif name in ("stride_n", "stride_h"):
            found[name] = f"i32{by_sixteen}"
        elif name.startswith("stride_") and name != "stride_w":
            found[name] = 1 if aligned else "i32"
        elif name in ("N", "B", "pad", "stride_w"):
            found[name] = "i32"
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("view", "windows", "aligned"), [("fp32", True, True), ("bf16", False, False)])
def test_the_kernel_builds_without_spilling(
    capability: int, size: tuple[int, int, int], view: str, windows: bool, aligned: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _image_batch_cuda as cuda

    given = arguments_of(view, size, windows, aligned)
    found = build(cuda.image_batch_kernel, given, capability, tmp_path, num_warps=cuda.WARPS, **cuda.CHECKS)
    assert found.spilled == 0, found
    assert found.registers <= 128


def test_the_kernel_builds_for_sizes_of_one_and_checks_what_it_is_given(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _image_batch_cuda as cuda

    given = with_sizes_of_one(arguments_of("fp32", (1, 1, 1), True, False))
    build(cuda.image_batch_kernel, given, 90, tmp_path, num_warps=cuda.WARPS, **cuda.CHECKS)
    # Without the launch option the assertions would be left out of the code.
    assert b"__assertfail" in (tmp_path / "kernel.cubin").read_bytes()


def test_a_batch_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _image_batch_cuda as cuda

    launches = Launches(cuda, monkeypatch)
    store, windows = sample(*SHAPES[0])
    cuda.image_batch(*arguments(store, windows, torch.bfloat16))
    assert launches.names == ["image_batch_kernel"]
