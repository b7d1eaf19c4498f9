"""linear_sensitivity against the definition on the layer's logits, whatever pieces it works in."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dau_fast.ops import _native, linear_sensitivity
from dau_fast.ops._library import PATHS
from dau_fast.ops.linear_sensitivity import backward_op, forward_op, pieces
from dau_fast.ops.reference import sensitivity_reference

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor]
# (B, C, D)
SHAPES = [(1, 2, 1), (7, 10, 5), (3, 100, 17), (4, 5003, 6)]


def sample(b: int, c: int, d: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Layer:
    generator = torch.Generator().manual_seed(b + 100 * c + 10_000 * d)
    features = torch.randn(b, d, dtype=torch.float64, generator=generator)
    weight = 2 * torch.randn(c, d, dtype=torch.float64, generator=generator)
    offset = torch.randn(c, dtype=torch.float64, generator=generator).to(dtype) if bias else None
    targets = torch.randint(c, (b,), generator=generator)
    targets[::2] = c - 1  # in the last piece
    return features.to(dtype), weight.to(dtype), offset, targets


def defined(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return sensitivity_reference(F.linear(features, weight, bias), features, targets, bias is not None)


def values_and_gradients(function: object, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    *inputs, targets = layer
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    s = function(*leaves, targets)  # type: ignore[operator]
    weights = torch.arange(1, len(s) + 1, device=s.device).sin().to(s.dtype)
    given = [x for x in leaves if x is not None]
    return [s.detach(), *torch.autograd.grad((s * weights).sum(), given)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(params=["one piece", "many pieces", "many pieces, logits kept"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["dau_fast.ops.linear_sensitivity"]  # the function has its name
    if "kept" not in request.param:
        monkeypatch.setattr(module, "_KEPT", 0)
    if "many" in request.param:
        monkeypatch.setattr(module, "_PIECE", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(module, "_FEWEST_CLASSES", 7)


@pytest.fixture(params=["C++", "PyTorch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("the compiled extension is not installed")


@pytest.mark.usefixtures("_pieces", "_path", "poisoned_memory")
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_definition(
    b: int, c: int, d: int, bias: bool, dtype: torch.dtype
) -> None:
    layer = sample(b, c, d, dtype, bias)
    found = values_and_gradients(linear_sensitivity, layer, dtype)
    expected = values_and_gradients(defined, layer, torch.float64)
    close(found, expected, 2e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.usefixtures("_pieces", "_path")
def test_half_precision() -> None:
    """Logits round as a layer's do; everything after them is float32."""
    layer = sample(6, 50, 8, torch.bfloat16)
    found = values_and_gradients(linear_sensitivity, layer, torch.bfloat16)
    assert [x.dtype for x in found] == [torch.float32, *[torch.bfloat16] * 3]
    features, weight, bias, _ = layer
    rounded = F.linear(features, weight, bias).double()

    def with_rounded_logits(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w, b)
        return sensitivity_reference(z + (rounded - z).detach(), h, y)

    s, *grads = values_and_gradients(with_rounded_logits, layer, torch.float64)
    torch.testing.assert_close(found[0].double(), s, rtol=1e-5, atol=0)
    close(found[1:], grads, 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.usefixtures("_pieces", "_path")
def test_strange_values_stay_in_their_rows() -> None:
    features, weight, bias, targets = sample(4, 20, 3)
    features[1, 0], features[2, 0] = float("nan"), float("inf")
    s = linear_sensitivity(features, weight, bias, targets)
    assert s.isnan().tolist() == [False, True, True, False]
    assert bias is not None
    bias[:10] = float("-inf")  # classes that never happen, whole pieces of them
    features, weight, _, targets = sample(4, 20, 3)
    targets[0] = 3
    torch.testing.assert_close(
        linear_sensitivity(features, weight, bias, targets), defined(features, weight, bias, targets)
    )


@pytest.mark.usefixtures("_pieces", "_path")
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    features, weight, offset, targets = sample(3, 15, 4, torch.float64, bias)
    inputs = [x.requires_grad_() for x in (features, weight, offset) if x is not None]
    assert torch.autograd.gradcheck(lambda h, w, b=None: linear_sensitivity(h, w, b, targets), inputs)


def test_each_gradient_alone() -> None:
    layer = sample(4, 12, 5)
    _, *every = values_and_gradients(linear_sensitivity, layer, torch.float32)
    *inputs, targets = layer
    for wanted in range(3):
        leaves = [x.detach().clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        s = linear_sensitivity(*leaves, targets)
        weights = torch.arange(1, 5).sin()
        (grad,) = torch.autograd.grad((s * weights).sum(), [leaves[wanted]])
        torch.testing.assert_close(grad, every[wanted])


def test_opcheck() -> None:
    features, weight, bias, targets = sample(4, 12, 5)
    for offset in (bias, None):
        torch.library.opcheck(forward_op, (features, weight, offset, targets))
        s, stats, logits = forward_op(features, weight, offset, targets)
        saved = torch.ones_like(s), features, weight, offset, targets, stats, logits
        torch.library.opcheck(backward_op, (*saved, True, True, offset is not None))
        torch.library.opcheck(backward_op, (*saved, False, True, False))


def test_compiled_and_under_autocast() -> None:
    torch.compiler.reset()
    features, weight, bias, targets = sample(6, 12, 5)
    weight = weight.requires_grad_()

    def step(h: Tensor) -> Tensor:
        return 3 * linear_sensitivity(2 * h, weight, bias, targets).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(features), [weight]),
        torch.autograd.grad(step(features), [weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        s = linear_sensitivity(features, weight, bias, targets)
    assert s.dtype == torch.float32
    (grad,) = torch.autograd.grad(s.sum(), [weight])
    assert grad.dtype == torch.float32
    torch.testing.assert_close(s, defined(features, weight, bias, targets), rtol=0.05, atol=0.05)


def test_strides_and_no_samples() -> None:
    features, weight, bias, targets = sample(4, 12, 6)
    plain = linear_sensitivity(features, weight, bias, targets)
    turned = linear_sensitivity(features.T.contiguous().T, weight.T.contiguous().T, bias, targets)
    torch.testing.assert_close(turned, plain)
    weight = weight.requires_grad_()
    nothing = linear_sensitivity(features[:0], weight, bias, targets[:0])
    assert nothing.shape == (0,)
    (grad,) = torch.autograd.grad(nothing.sum(), [weight])
    assert (grad == 0).all()


def test_mistakes_are_named() -> None:
    features, weight, bias, targets = sample(4, 12, 5)
    with pytest.raises(ValueError, match=r"features have shape \[4, 5\], weight \[12, 4\], bias \[12\]"):
        linear_sensitivity(features, weight[:, :4], bias, targets)
    with pytest.raises(ValueError, match=r"bias \[5\]: expected \[B, D\], \[C, D\] and \[C\]"):
        linear_sensitivity(features, weight, bias[:5], targets)
    with pytest.raises(ValueError, match=r"torch.float32, torch.float64: expected one floating-point"):
        linear_sensitivity(features, weight.double(), bias, targets)
    s, stats, logits = forward_op(features, weight, bias, targets)
    with pytest.raises(ValueError, match=r"logits \[4, 11\]: expected \[4\], \[5, 4\] and \[4, 12\]"):
        backward_op(s, features, weight, bias, targets, stats, logits[:, 1:], True, True, True)
    with pytest.raises(ValueError, match=r"targets are torch\.int32"):
        linear_sensitivity(features, weight, bias, targets.int())
    for wrong in (12, -1):
        with pytest.raises(ValueError, match=rf"targets lie in .*{wrong}.*: expected 0 to 11"):
            linear_sensitivity(features, weight, bias, torch.full((4,), wrong))
    s = linear_sensitivity(features.requires_grad_(), weight, bias, targets)
    (grad,) = torch.autograd.grad(s.sum(), [features], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_sensitivity is differentiable once"):
        grad.sum().backward()


def test_pieces_cover_all_classes_once() -> None:
    for batch, classes in ((1, 5), (64, 50_257), (4096, 3000), (0, 10)):
        covered = [i for part in pieces(batch, classes, "cpu") for i in range(part.start, part.stop)]
        assert covered == list(range(classes))


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest result of any operation has."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_the_logits_of_very_many_classes_never_exist_at_once(device: str) -> None:
    features, weight, bias, targets = sample(256, 50_000, 4)
    with Sizes() as sizes:
        s, *kept = PATHS["linear_sensitivity_forward", device](features, weight, bias, targets)
        saved = torch.ones_like(s), features, weight, bias, targets, *kept
        PATHS["linear_sensitivity_backward", device](*saved, True, True, True)
    assert sizes.largest < 256 * 50_000 / 10


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("b", "c"), [(13, 40_001), (97, 50_000)])
def test_several_threads(b: int, c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More logits than one thread is given, kept and computed twice, and rows that do not divide evenly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    layer = sample(b, c, 3)
    found = values_and_gradients(linear_sensitivity, layer, torch.float32)
    close(found, values_and_gradients(defined, layer, torch.float64), 3e-5)


def test_logits_that_are_kept_stay_as_they_are() -> None:
    """A graph may be gone through twice."""
    features, weight, bias, targets = sample(8, 50, 4)
    leaves = [x.requires_grad_() for x in (features, weight, bias) if x is not None]
    s = linear_sensitivity(*leaves, targets)
    once, again = (torch.autograd.grad(s.sum(), leaves, retain_graph=True) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


# ---- on the device that was chosen with --device


@pytest.mark.parametrize(("b", "c", "d"), [*SHAPES, (64, 50_257, 32)])
def test_on_the_device(device: torch.device, b: int, c: int, d: int) -> None:
    features, weight, bias, targets = sample(b, c, d)
    assert bias is not None
    layer = features.to(device), weight.to(device), bias.to(device), targets.to(device)
    found = values_and_gradients(linear_sensitivity, layer, torch.float32)
    close(found, values_and_gradients(defined, layer, torch.float64), 3e-5)


class Launches(TorchDispatchMode):
    """Counts operations that are launches: not those that look at memory in another way, nor allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count += not (func.is_view or name.startswith(("prim::", "aten::empty", "aten::new_empty")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("c", [1000, 100_000])
def test_launches_follow_the_number_of_pieces(c: int) -> None:
    """It has no kernels of its own: this is what a GPU is asked for."""
    features, weight, bias, targets = sample(64, c, 4)
    with Launches() as forward:
        _, *kept = PATHS["linear_sensitivity_forward", "CUDA"](features, weight, bias, targets)
    with Launches() as backward:
        saved = torch.ones(64), features, weight, bias, targets, *kept
        PATHS["linear_sensitivity_backward", "CUDA"](*saved, True, True, True)
    count = len(pieces(64, c, "cpu"))
    assert forward.count <= 25 * count + 20
    assert backward.count <= 30 * count + 10
