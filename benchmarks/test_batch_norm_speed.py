"""BatchNorm with an addition and a ReLU behind it, against PyTorch's operations one after the other.

    pytest benchmarks/test_batch_norm_speed.py --device cuda
    pytest benchmarks/test_batch_norm_speed.py                 on the CPU, where the op is these operations

Forward and backward on ResNet-18's layers, 256 images at 32x32, in channels_last: bfloat16 on CUDA, with
parameters and statistics in float32, and float32 on the CPU. PyTorch adds and cuts off in place, as
torchvision's blocks do. On CUDA also as replays of a captured graph, which leave out the launches. Floor, in
arrays as large as x: forward x read twice and y written, backward x and the gradient read twice and a
gradient written; where something is added that is read, y twice, and one more gradient is written. From 128
channels on arrays fit in the cache of a large GPU, which may then beat the floor. `extra_info` as in
measuring.record_row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.measuring import captured, record_row
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.ops import batch_norm

BATCH = 256
# (channels, height and width)
SIZES, SMOKE_SIZES = [(64, 32), (128, 16), (256, 8), (512, 4)], [(8, 4)]
# Whether something is added, and whether a ReLU follows.
KINDS = {"plain": (False, False), "ReLU": (False, True), "addition and ReLU": (True, True)}
Layer = Callable[[nn.BatchNorm2d, Tensor, Tensor | None, bool], Tensor]


def ours(norm: nn.BatchNorm2d, x: Tensor, more: Tensor | None, relu: bool) -> Tensor:
    return batch_norm(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked, add=more,
        relu=relu,
    )  # fmt: skip


def one_by_one(norm: nn.BatchNorm2d, x: Tensor, more: Tensor | None, relu: bool) -> Tensor:
    y = norm(x)
    if more is not None:
        y += more
    return F.relu(y, inplace=True) if relu else y


ROWS: dict[str, Layer] = {"dau_fast": ours, "PyTorch": one_by_one, "PyTorch compiled": one_by_one}
CAPTURED = [f"{name} captured" for name in ROWS]


def layer_of(row: str, smoke: bool) -> Layer:
    name = row.removesuffix(" captured")
    if not name.endswith("compiled"):
        return ROWS[name]
    torch.compiler.reset()
    return torch.compile(ROWS[name], dynamic=False, backend="eager" if smoke else "inductor")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = SMOKE_SIZES if metafunc.config.getoption("--smoke") else SIZES
    metafunc.parametrize(("channels", "side"), sizes, ids=[f"{channels}x{side}" for channels, side in sizes])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [*ROWS, *CAPTURED])
def test_forward_and_backward(
    benchmark: Any, device: torch.device, smoke: bool, row: str, kind: str, channels: int, side: int
) -> None:
    if row in CAPTURED and device.type != "cuda":
        pytest.skip("captured graphs need CUDA")
    layer, (add, relu) = layer_of(row, smoke), KINDS[kind]
    norm = nn.BatchNorm2d(channels).to(device)
    x, pull, *more = some_images(2 + add, 8 if smoke else BATCH, channels, side, device)
    leaves = [x.requires_grad_(), *norm.parameters(), *(image.requires_grad_() for image in more)]

    def work() -> None:
        y = layer(norm, x, more[0] if add else None, relu)
        torch.autograd.grad(y, leaves, pull)

    record_row(
        benchmark,
        captured(work) if row in CAPTURED else work,
        device,
        case=f"{channels}x{side}, {kind}",
        implementation=row,
        moved=(12 if add else 8) * x.nbytes,
        gradient_bytes=(1 + add) * x.nbytes,
        smoke=smoke,
    )


def some_images(count: int, batch: int, channels: int, side: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, batch, channels, side, side, generator=generator)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [image.to(device, dtype, memory_format=torch.channels_last) for image in drawn]
