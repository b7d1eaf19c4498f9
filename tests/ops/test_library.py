"""What all ops share: one way to register, one rule for which path runs, no circle among their modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dau_fast.ops
from dau_fast.ops import _native, apply_masks_, mask_smallest, pack_mask
from dau_fast.ops._library import PATHS, _on_its_device

FOLDER = Path(dau_fast.ops.__file__).parent


def imported(source: Path) -> Iterator[str]:
    """Modules of this folder that `source` imports, inside functions too."""
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dau_fast.ops"):
            continue
        name = (node.module or "").removeprefix("dau_fast.ops").removeprefix(".")
        yield from [name] if name else [alias.name for alias in node.names]


def test_no_two_modules_need_one_another() -> None:
    modules = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    needs = {name: set(imported(path)) & set(modules) for name, path in modules.items()}
    assert "_library" in needs["sensitivity"]
    order = list(TopologicalSorter(needs).static_order())  # raises CycleError for a circle
    assert order.index("_library") < order.index("_barlow_twins_op") < order.index("barlow_twins")


def test_every_op_went_through_define() -> None:
    known = {
        name.removeprefix("dau_fast::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dau_fast::")
    }
    assert len(known) >= 13
    assert set(PATHS) == {(name, device) for name in known for device in ("CPU", "CUDA")}


def test_only_the_library_and_what_it_asks_know_what_is_compiled() -> None:
    for path in FOLDER.glob("*.py"):
        if path.stem not in ("_native", "_library"):
            assert "_native.extension" not in path.read_text(), path
            assert "_native.kernels" not in path.read_text(), path


@pytest.mark.usefixtures("_without_triton")
def test_one_line_says_that_triton_is_missing_whatever_is_called(caplog: pytest.LogCaptureFixture) -> None:
    w, bits = [torch.ones(9)], [pack_mask(torch.arange(9) % 2 == 0)]
    PATHS["apply_masks_", "CUDA"](w, bits)
    assert w[0].tolist() == [1.0, 0.0] * 4 + [1.0]
    PATHS["masked_sgd_", "CUDA"](w, w, [], bits, [], 0.5, None, 0.0, 0.0, 0.0, False, False)
    assert w[0].tolist() == [0.5, 0.0] * 4 + [0.5]
    pixels, index = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([1])
    PATHS["image_batch", "CUDA"](pixels, index, w[0][:1], w[0][:1], None, None, None, 0, torch.float32)
    x = torch.ones(1, 1, 2, 3)
    assert PATHS["gram_squares", "CUDA"](x, x).tolist() == [36.0]
    (record,) = caplog.records
    assert "Triton cannot be imported" in record.message
    assert "install triton for the fused kernels" in record.message


@pytest.mark.parametrize("name", sorted({name for name, _ in PATHS}))
def test_autocast_is_off_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of what an op is given stay in float32: seen for two of them, and that all share the guard."""
    assert PATHS[name, "CPU"].__qualname__ == PATHS["gram_squares", "CPU"].__qualname__
    if name == "gram_squares":
        x = torch.full((1, 1, 2, 3), 1.001)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.ops.dau_fast.gram_squares(x, x)
        assert torch.equal(found, torch.ops.dau_fast.gram_squares(x, x))


def test_a_tensor_twice_with_two_masks_loses_what_either_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shared weights have; also where there is work for several threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    generator = torch.Generator().manual_seed(0)
    for n in (100, 1_000_003):
        masks = [torch.rand(n, generator=generator) < 0.5 for _ in range(2)]
        weights = torch.ones(n)
        apply_masks_([weights, weights], masks)
        assert torch.equal(weights, (masks[0] & masks[1]).float())


def test_ops_need_tensors_on_one_device() -> None:
    with pytest.raises(ValueError, match="tensors are on cpu, meta: expected one device"):
        mask_smallest([torch.ones(2), torch.ones(2, device="meta")], 1)


def test_the_extension_is_asked_for_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", None)
    assert pack_mask(torch.tensor([True, False, True])).tolist() == [5]


@pytest.mark.interpreter
def test_what_a_gpu_runs_is_found_by_its_name() -> None:
    draw = torch.Generator().manual_seed(0)
    z, h, a, b = (torch.randn(shape, generator=draw) for shape in ((4, 5), (4, 3), (6, 4), (6, 4)))
    x, labels = torch.randn(2, 1, 3, 4, generator=draw), torch.tensor([0, 4, 2, 1])
    pixels, mean = torch.randint(256, (3, 1, 4, 4), generator=draw, dtype=torch.uint8), torch.full((1,), 0.5)
    for name, arguments in {
        "sensitivity_forward": (z, h, labels, True, False),
        "barlow_twins_forward": (a, b, 5e-3, 1e-5, False, "ieee"),
        "image_batch": (pixels, torch.tensor([2, 0]), mean, mean, None, None, None, 0, torch.float32),
        "gram_squares": (x, x),
    }.items():
        ours, expected = (PATHS[name, device](*arguments) for device in ("CUDA", "CPU"))
        if isinstance(ours, tuple):
            ours, expected = ours[0], expected[0]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, msg=name)
    shown, stats, _ = PATHS["sensitivity_forward", "CUDA"](z, h, labels, True, False)
    pulled = PATHS["sensitivity_backward", "CUDA"](shown, z, h, labels, stats, False, True, True)
    assert [grad.shape for grad in pulled] == [z.shape, h.shape]
    loss, stats, products = PATHS["barlow_twins_forward", "CUDA"](a, b, 5e-3, 1e-5, False, "ieee")
    pulled = PATHS["barlow_twins_backward", "CUDA"](
        loss, a, b, stats, products, 5e-3, False, "ieee", True, True
    )
    assert [grad.shape for grad in pulled] == [a.shape, b.shape]


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a second GPU while the first one is current: without a GPU, both are pretended."""
    current = [0]

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", entered)
    launch = _on_its_device(lambda kernels, *arguments: current[0])
    with FakeTensorMode():
        first, second = (torch.empty(3, device=f"cuda:{index}") for index in range(2))
        assert launch(None, second) == 1
        assert launch(None, [second, second], 0.5) == 1
        assert launch(None, first) == 0
    assert launch(None, torch.empty(3)) == 0
    assert current == [0]
