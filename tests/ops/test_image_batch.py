"""The image batch: its numbers on every path, views, windows, mistakes, compilation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from calling import environment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dau_fast.ops import _native, image_batch
from dau_fast.ops._library import PATHS
from dau_fast.ops.image_batch import image_batch_op
from dau_fast.ops.reference import image_batch_reference

# (N, C, H, W, B, pad): more padding than image and sides of 1 among them.
SHAPES = [
    (5, 3, 8, 8, 7, 2), (9, 1, 8, 8, 21, 1), (6, 1, 5, 7, 9, 2), (4, 2, 3, 5, 6, 4), (3, 4, 6, 1, 5, 0),
    (2, 1, 1, 1, 3, 2),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sample(n: int, c: int, h: int, w: int, b: int, pad: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pixels, index, mean and std; and windows of which the first ones are the outermost."""
    generator = torch.Generator().manual_seed(n + 10 * c + 100 * h + 1000 * w)

    def below(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    pixels = below(256, n, c, h, w).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = torch.rand(2, c, generator=generator) + torch.tensor([[0.0], [0.1]])
    rows, columns = below(2 * pad + 1, b), below(2 * pad + 1, b)
    rows[0], rows[1], columns[0], columns[1] = 0, 2 * pad, 2 * pad, 0
    flip = below(2, b).bool()
    store = {"pixels": pixels, "index": below(n, b), "mean": mean, "std": std}
    return store, {"rows": rows, "columns": columns, "flip": flip, "pad": pad}


def exact(
    pixels: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    flip: Tensor | None = None,
    pad: int = 0,
) -> Tensor:
    """Image by image in float64: padded, cut out, mirrored, normalised."""
    height, width = pixels.shape[-2:]
    images = []
    for i, n in enumerate(index.tolist()):
        image = pixels[n].double()
        if rows is not None and columns is not None:
            top, left = int(rows[i]), int(columns[i])
            padded = torch.nn.functional.pad(image, (pad,) * 4)
            image = padded[:, top : top + height, left : left + width]
        if flip is not None and flip[i]:
            image = image.flip(-1)
        images.append((image / 255 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1))
    return torch.stack(images)


def close_to_exact(found: Tensor, store: dict[str, Any], expected: Tensor) -> None:
    """Within the three roundings of (x / 255 - mean) / std in float32, and the last one to the dtype."""
    mean, std = (store[name].double().view(-1, 1, 1) for name in ("mean", "std"))
    bound = 2**-24 * ((1 + 2 * (1 + mean)) / std).expand_as(expected) * 1.001
    if found.dtype in (torch.bfloat16, torch.float16):
        bound = bound + expected.abs() * torch.finfo(found.dtype).eps / 2 * 1.001
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.fixture(params=["compiled extension", "plain PyTorch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Both paths; memory that one forgets to write shows as NaN."""
    if request.param == "plain PyTorch":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("the compiled extension is not installed")


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_the_definition_bit_for_bit_and_near_the_exact_ones(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    store, windows = sample(*shape)
    plain, mirrored = {}, {"flip": windows["flip"]}
    cropped = {name: windows[name] for name in ("rows", "columns", "pad")}
    for chosen in (plain, mirrored, cropped, windows):
        found = image_batch(**store, **chosen, dtype=dtype)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, image_batch_reference(**store, **chosen, dtype=dtype))
        close_to_exact(found, store, exact(**store, **chosen))


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_a_pixel(dtype: torch.dtype) -> None:
    """For usual constants, for denormals and overflow of float16, for no number, and for ties in halves."""
    ties = [-(2**-11), -3 * 2**-11, -(2**-8), -3 * 2**-8]  # what white becomes: 1 and half a step, or 3 / 2
    mean = torch.tensor([0.4914, 0.0, 0.5, 0.3, 0.2, 100 / 255, 0.1, *ties])
    std = torch.tensor([0.247, 1.0, 3e4, 1e8, 1e-5, 0.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    pixels = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(1, len(mean), 16, 16)
    store = {"pixels": pixels, "index": torch.tensor([0]), "mean": mean, "std": std}
    found = image_batch(**store, dtype=dtype)
    expected = ((pixels.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(dtype)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert found[0, 6].isnan().all()
    ordinary = {"mean": mean[:1], "std": std[:1]}
    close_to_exact(found[:, :1], ordinary, exact(pixels[:, :1], torch.tensor([0]), **ordinary))


@pytest.mark.usefixtures("_path")
def test_strides_and_integer_types_do_not_matter() -> None:
    store, windows = sample(6, 3, 8, 5, 9, 2)
    expected = image_batch(**store, **windows)
    wide = torch.zeros(12, 5, 16, 11, dtype=torch.uint8)
    wide[::2, 1:4, ::2, 1::2] = store["pixels"]
    for pixels in (store["pixels"].contiguous(), wide[::2, 1:4, ::2, 1::2]):
        assert torch.equal(image_batch(**store | {"pixels": pixels}, **windows), expected)
    apart = {name: torch.stack([x, x], 1)[:, 0] for name, x in {**store, **windows}.items()
             if name in ("index", "mean", "std", "rows", "columns", "flip")}  # fmt: skip
    assert torch.equal(image_batch(store["pixels"], pad=2, **apart), expected)
    small = {"rows": windows["rows"].int(), "columns": windows["columns"].to(torch.uint8)}
    for kind in (torch.int64, torch.uint8):
        flip = {"flip": windows["flip"].to(kind) * 2}
        assert torch.equal(image_batch(**store, **windows | small | flip), expected)


@pytest.mark.usefixtures("_path")
def test_one_mean_and_deviation_for_all_channels() -> None:
    store, windows = sample(4, 3, 5, 5, 6, 1)
    for name in ("mean", "std"):
        store[name] = store[name][:1]
    spread = {name: store[name].repeat(3) for name in ("mean", "std")}
    assert torch.equal(image_batch(**store, **windows), image_batch(**store | spread, **windows))


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (0, 3, 8, 8), (5, 3, 0, 8), (5, 0, 8, 8)])
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    pixels, scale = torch.zeros(shape, dtype=torch.uint8), torch.ones(1)
    for index in (none, none if shape[0] == 0 else torch.tensor([1, 0])):
        starts = torch.zeros_like(index)
        for chosen in ({}, {"rows": starts, "columns": starts, "flip": starts}):
            found = image_batch(pixels, index, scale, scale, **chosen)
            assert found.shape == (len(index), *shape[1:])
            assert found.isfinite().all()


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("image", [5, -1, 2**40])
def test_an_index_that_is_no_image_is_refused(image: int) -> None:
    store, windows = sample(5, 3, 8, 8, 7, 2)
    store["index"][3] = image
    for chosen in ({}, windows):
        with pytest.raises(IndexError, match=rf"index holds .*{image}.*: expected 0 to 4"):
            image_batch(**store, **chosen)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("start", [5, -1])
def test_a_window_outside_the_padded_image_is_refused(name: str, start: int) -> None:
    store, windows = sample(5, 3, 8, 8, 7, 2)
    windows[name][6] = start
    with pytest.raises(ValueError, match=rf"{name} hold .*{start}.*: expected 0 to 4, twice the padding"):
        image_batch(**store, **windows)


def test_mistakes_are_named() -> None:
    store, windows = sample(5, 3, 8, 8, 7, 2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"pixels": store["pixels"].float()}, r"pixels are float32 of shape \[5, 3, 8, 8\]: expected uint8"),
        ({"pixels": store["pixels"][0]}, r"expected uint8 of shape \[N, C, H, W\]"),
        ({"index": store["index"].int()}, r"index is int32 of shape \[7\]: expected int64 of shape \[B\]"),
        ({"index": store["index"].view(7, 1)}, r"index is int64 of shape \[7, 1\]"),
        ({"mean": store["mean"].double()}, r"mean is float64 of shape \[3\]: expected float32"),
        ({"std": store["std"][:2]}, r"std is float32 of shape \[2\]: expected float32 of shape \[3\]"),
        ({"std": store["std"].to("meta")}, "std is on meta, pixels on cpu: expected one device"),
        ({"rows": None}, "of rows and columns one is None: expected both or neither"),
        ({"rows": windows["rows"].float()}, r"rows is float32 of shape \[7\]: expected integers"),
        ({"columns": windows["flip"]}, r"columns is bool of shape \[7\]: expected integers"),
        ({"flip": windows["flip"][:6]}, r"flip is bool of shape \[6\]: expected bool or integers"),
        ({"flip": windows["flip"].to("meta")}, "flip is on meta, pixels on cpu: expected one device"),
        ({"pad": -1}, "pad is -1: expected 0 or more"),
        ({"pad": 2**62}, "pad is 4611686018427387904: expected 0 or more, and at most"),
        ({"dtype": torch.int32}, "dtype is torch.int32: expected one of floating point"),
    ]  # fmt: skip
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            image_batch(**store | windows | changed)


def test_several_threads(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """More numbers than one thread is given, and images that do not divide evenly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    store, windows = sample(4, 3, 32, 32, 301, 4)
    assert torch.equal(image_batch(**store, **windows), image_batch_reference(**store, **windows))


def test_more_than_2_to_the_31_pixels() -> None:
    count = 2**31 // 64 + 3
    pixels = torch.empty(count, 1, 8, 8, dtype=torch.uint8)  # the system gives memory where it is written
    pixels[-1] = torch.arange(64).view(8, 8)
    found = image_batch(pixels, torch.tensor([count - 1]), torch.zeros(1), torch.ones(1))
    assert torch.equal(found.flatten(), torch.arange(64) / 255)


def test_autocast_changes_nothing() -> None:
    store, windows = sample(5, 3, 8, 8, 7, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image_batch(**store, **windows), image_batch_reference(**store, **windows))


def arguments(store: dict[str, Any], windows: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """As the op takes them."""
    names = ("rows", "columns", "flip")
    return *store.values(), *(windows.get(name) for name in names), windows.get("pad", 0), dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(shape: tuple[int, ...]) -> None:
    store, windows = sample(*shape)
    for dtype in (torch.float32, torch.bfloat16):
        for chosen in (windows, {}):
            torch.library.opcheck(image_batch_op, arguments(store, chosen, dtype))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(store: dict[str, Any], windows: dict[str, Any]) -> Tensor:
        return 2 * image_batch(**store, **windows, dtype=torch.bfloat16)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (6, 9) if dynamic else (6,):
        given = sample(5, 3, 8, 8, batch, 2)
        assert torch.equal(compiled(*given), step(*given))


def test_only_shapes_are_needed_for_fake_and_meta_tensors() -> None:
    def batch(device: str) -> Tensor:
        pixels = torch.empty(5, 3, 8, 8, dtype=torch.uint8, device=device)
        index, scale = torch.empty(4, dtype=torch.int64, device=device), torch.empty(3, device=device)
        return image_batch(pixels, index, scale, scale, flip=index, dtype=torch.bfloat16)

    with FakeTensorMode():
        found = batch("cpu")
    for one in (found, batch("meta")):
        assert (one.shape, one.dtype) == ((4, 3, 8, 8), torch.bfloat16)
        assert one.stride() == (192, 1, 24, 3)


# ---- on the device that was chosen with --device


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("shape", [*SHAPES, (300, 3, 32, 32, 256, 4), (3, 3, 224, 224, 5, 28)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_device_gives_the_same_numbers(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    store, windows = sample(*shape)
    for chosen in (windows, {}):
        found = image_batch(**moved(store, device), **moved(chosen, device), dtype=dtype)
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), image_batch_reference(**store, **chosen, dtype=dtype))


def test_captured_in_a_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    store, windows = (moved(given, device) for given in sample(5, 3, 8, 8, 7, 2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        image_batch(**store, **windows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = image_batch(**store, **windows)
    for name in ("rows", "columns", "flip"):
        windows[name].copy_(windows[name].flip(0))
    store["index"].copy_(store["index"].flip(0))
    graph.replay()
    assert torch.equal(captured, image_batch(**store, **windows))


def test_what_does_not_exist_stops_a_cuda_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    # In processes of their own: the assertion leaves the device of this one unusable.
    code = (
        "import torch; from dau_fast.ops import image_batch\n"
        "pixels = torch.zeros(5, 3, 8, 8, dtype=torch.uint8, device='cuda')\n"
        "scale = torch.ones(3, device='cuda')\n"
        "index, start = (torch.tensor([i], device='cuda') for i in ({index}, {start}))\n"
        "print(image_batch(pixels, index, scale, scale, rows=start, columns=start, pad=1).sum().item())"
    )
    for index, start, message in ((5, 0, "an index is no image"), (-1, 0, "an index is no image"),
                                  (0, 3, "a window lies outside")):  # fmt: skip
        command = [sys.executable, "-c", code.format(index=index, start=start)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_plain_pytorch_takes_over_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    store, windows = sample(5, 3, 8, 8, 7, 2)
    for _ in range(2):
        found = PATHS["image_batch", "CUDA"](*arguments(store, windows, torch.float32))
    assert torch.equal(found, image_batch_reference(**store, **windows))
    (record,) = caplog.records
    assert "plain PyTorch runs on the GPU instead; install triton" in record.message
