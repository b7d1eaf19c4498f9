"""BatchNorm with what follows it: its numbers and gradients, on every path."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.ops import batch_norm
from dau_fast.ops._library import PATHS
from dau_fast.ops.batch_norm import FusedBatchNorm, batch_norm_backward_op, batch_norm_op

# [B, C, H, W]: of CIFAR's layers, with sizes that nothing divides, and of one pixel.
SHAPES = [(4, 64, 9, 8), (5, 3, 7, 3), (2, 130, 3, 5), (3, 16, 1, 1), (70, 8, 8, 9)]
Norm = Callable[..., Tensor]


def sample(shape: tuple[int, ...], dtype: torch.dtype, add: bool) -> dict[str, Tensor | None]:
    """Arguments of `batch_norm`, with means that are large beside deviations."""
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def lay(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    channels = shape[1]
    x = lay(draw(*shape) * draw(channels, 1, 1) + 5 * draw(channels, 1, 1))
    lines = dict(zip(("weight", "bias", "running_mean"), draw(3, channels), strict=True))
    lines["running_var"] = draw(channels).square()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": x, **{name: line.to(wide) for name, line in lines.items()}, "batches": torch.tensor(3),
        "add": lay(draw(*shape)) if add else None,
    }  # fmt: skip


def defined(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    batches: Tensor | None, add: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    """PyTorch's own, one after the other."""
    if batches is not None:
        batches.add_(1)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, 0.1, 1e-5)
    y = y if add is None else y + add
    return y.relu() if relu else y


def results(norm: Norm, given: dict[str, Tensor | None], relu: bool, dtype: torch.dtype | None = None):
    """Result, gradients, and what was changed in place. dtype: of all numbers instead of their own."""
    own = {name: None if x is None else x.detach().clone() for name, x in given.items()}
    if dtype is not None:
        own = {name: x if x is None or not x.is_floating_point() else x.to(dtype) for name, x in own.items()}
    leaves = [own[name].requires_grad_() for name in ("x", "weight", "bias", "add") if own[name] is not None]
    y = norm(**own, relu=relu)
    pull = torch.arange(1, y.numel() + 1, device=y.device, dtype=torch.float64).cos().view(y.shape)
    pull = pull.to(y.dtype).contiguous(memory_format=torch.channels_last)
    found = [y.detach(), *torch.autograd.grad(y, leaves, pull)]
    return found + [own[name] for name in ("running_mean", "running_var", "batches") if own[name] is not None]


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_and_gradients_are_those_of_the_definition_in_float64(
    device: torch.device, shape: tuple[int, ...], relu: bool, add: bool, dtype: torch.dtype
) -> None:
    given = {name: x if x is None else x.to(device) for name, x in sample(shape, dtype, add).items()}
    exact = results(defined, given, relu, torch.float64)
    usual = [error(*pair) for pair in zip(results(defined, given, relu), exact, strict=True)]
    found = [error(*pair) for pair in zip(results(batch_norm, given, relu), exact, strict=True)]
    # Of rounded numbers some that a ReLU lets through are others than in float64, on any path.
    least = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert all(ours <= 3 * max(theirs, least) for ours, theirs in zip(found, usual, strict=True)), (
        found,
        usual,
    )


def test_captured_in_a_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    given = {
        name: x if x is None else x.to(device) for name, x in sample(SHAPES[0], torch.bfloat16, True).items()
    }
    given["x"].requires_grad_()

    def work() -> tuple[Tensor, Tensor]:
        y = batch_norm(**given, relu=True)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), given["x"])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        given["x"].mul_(-2)
    graph.replay()
    again = [x.clone() for x in captured]
    for one, other in zip(again, work(), strict=True):
        assert torch.equal(one, other)


# ---- the op's own definition


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_the_definition_of_the_ops_is_pytorchs(relu: bool, add: bool) -> None:
    given = sample(SHAPES[0], torch.float64, add)
    expected = results(defined, given, relu)
    own = {name: None if x is None else x.clone() for name, x in given.items()}
    y, lines = batch_norm_op(*own.values(), relu, 0.1, 1e-5)
    pull = torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().view(y.shape)
    of_x, of_add, sums = batch_norm_backward_op(pull, own["x"], y, lines, relu, add and relu)
    found = [y, of_x, sums[1], sums[0]]
    if add:
        found.append(of_add if relu else pull)
    found += [own[name] for name in ("running_mean", "running_var", "batches")]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_works_without_running_statistics() -> None:
    given = sample(SHAPES[1], torch.float32, False) | {
        "running_mean": None,
        "running_var": None,
        "batches": None,
    }
    for one, other in zip(results(batch_norm, given, True), results(defined, given, True), strict=True):
        assert torch.equal(one, other)


def op_arguments(dtype: torch.dtype, add: bool) -> tuple[list[Tensor | None], list[Tensor | bool]]:
    """Of the op, and of the one backward, which may not be asked for a gradient."""
    given = list(sample(SHAPES[1], dtype, add).values())
    y, lines = batch_norm_op(*(None if x is None else x.clone() for x in given), True, 0.1, 1e-5)
    return given, [torch.ones_like(y), given[0], y, lines, True, add]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("add", [False, True])
def test_opcheck(dtype: torch.dtype, add: bool) -> None:
    given, pulled = op_arguments(dtype, add)
    torch.library.opcheck(batch_norm_op, (*given, True, 0.1, 1e-5))
    torch.library.opcheck(batch_norm_backward_op, tuple(pulled))


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops and their backward pass."""
    monkeypatch.setattr(sys.modules["dau_fast.ops.batch_norm"], "_one_by_one", FusedBatchNorm.apply)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(batch_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in (SHAPES[0], SHAPES[1]) if dynamic else (SHAPES[0],):
        given = sample(shape, torch.float32, True)
        for one, other in zip(results(compiled, given, True), results(batch_norm, given, True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_gradcheck(relu: bool, add: bool) -> None:
    given = sample(SHAPES[1], torch.float64, add)
    names = [name for name in ("x", "weight", "bias", "add") if given[name] is not None]
    rest = {name: None for name in given if name not in names}
    leaves = [given[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *x: batch_norm(**rest | dict(zip(names, x, strict=True)), relu=relu), leaves, fast_mode=True
    )


@pytest.mark.usefixtures("_as_on_cuda")
def test_a_second_derivative_is_refused() -> None:
    given = sample(SHAPES[1], torch.float64, False)
    x = given["x"].requires_grad_()
    (slope,) = torch.autograd.grad(batch_norm(**given, relu=True).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm has no second derivative"):
        slope.square().sum().backward()


@pytest.mark.usefixtures("_as_on_cuda")
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    given = sample(SHAPES[1], torch.float64, True)
    given["bias"].requires_grad_()
    y = batch_norm(**given, relu=True)
    y.sum().backward()
    torch.testing.assert_close(given["bias"].grad, (y > 0).sum((0, 2, 3)).double())
    assert given["x"].grad is None


@pytest.mark.usefixtures("_as_on_cuda")
def test_autocast_changes_nothing() -> None:
    given = sample(SHAPES[1], torch.float32, True)
    expected = results(batch_norm, given, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(batch_norm, given, True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_plain_pytorch_takes_over_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    given, pulled = op_arguments(torch.float32, True)
    for _ in range(2):
        y, _lines = PATHS["batch_norm", "CUDA"](*(x.clone() for x in given), True, 0.1, 1e-5)
        PATHS["batch_norm_backward", "CUDA"](*pulled)
    assert torch.equal(y, pulled[2])
    (record,) = caplog.records
    assert "plain PyTorch runs on the GPU instead; install triton" in record.message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"x": torch.zeros(3, 4)},
            r"x is float32 of shape \[3, 4\]: expected floating point of shape \[B, C, H, W\]",
        ),
        ({"x": torch.zeros(1, 3, 1, 1)}, "expected two numbers or more of each channel"),
        ({"weight": torch.zeros(2)}, r"weight is float32 of shape \[2\]: expected shape \[3\]"),
        ({"running_var": None}, "one is None: expected both or neither"),
        ({"batches": torch.tensor(1.0)}, r"batches is float32 of shape \[\]: expected int64"),
        ({"add": torch.zeros(5, 3, 7, 2)}, r"add is float32 of shape \[5, 3, 7, 2\]: expected float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | None], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        batch_norm(**(sample(SHAPES[1], torch.float32, False) | change))


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_the_ops_refuse_it_too(device: str) -> None:
    """Before any kernel is launched, and where only shapes are known."""
    given, pulled = op_arguments(torch.float32, True)
    wrong = {
        "batch_norm": [
            ([given[0], torch.zeros(2), *given[2:], True, 0.1, 1e-5], r"weight is .*: expected shape \[3\]"),
            ([torch.zeros(3, 4), *given[1:], True, 0.1, 1e-5], "expected floating point of shape"),
        ],
        "batch_norm_backward": [
            ([torch.zeros(5, 3, 7, 2), *pulled[1:]], r"grad is .*\[5, 3, 7, 2\]: expected floating point"),
            ([*pulled[:2], torch.zeros(5), *pulled[3:]], r"y is float32 of shape \[5\]"),
            ([*pulled[:3], torch.zeros(4, 2), *pulled[4:]], r"lines is .*: expected .* of shape \[4, 3\]"),
        ],
    }  # fmt: skip
    for name, cases in wrong.items():
        for arguments, told in cases:
            with pytest.raises(ValueError, match=told):
                PATHS[name, device](*arguments)
            meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
            with pytest.raises(ValueError, match=told):
                getattr(torch.ops.dau_fast, name)(*meta)
