"""The sensitivity ops as drop-ins: accuracy on every path, autograd, compilation, dtypes, strange values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calling import environment
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dau_fast.ops import _native, attack_features, sensitivity
from dau_fast.ops._library import PATHS
from dau_fast.ops.reference import sensitivity_reference
from dau_fast.ops.sensitivity import backward_op, forward_op

# (B, C, D)
SHAPES = [(1, 2, 1), (5, 3, 0), (7, 10, 33), (33, 17, 5), (3, 1000, 64), (2, 5003, 3)]


def sample(b: int, c: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, C], features [B, D] and targets [B]; one sample in two is of the most likely class."""
    generator = torch.Generator().manual_seed(b + 100 * c + 10_000 * d)
    logits = 3 * torch.randn(b, c, dtype=torch.float64, generator=generator)
    features = torch.randn(b, d, dtype=torch.float64, generator=generator)
    targets = torch.randint(c, (b,), generator=generator)
    targets[::2] = logits.argmax(1)[::2]
    return logits.to(dtype), features.to(dtype), targets


def defined(
    z: Tensor, h: Tensor, y: Tensor, bias: bool = True, softmax: bool = False, predicted: bool = False
) -> Tensor:
    s = sensitivity_reference(z, h, z.argmax(1) if predicted else y, bias)
    return torch.cat([z.softmax(1), s.unsqueeze(1)], 1) if softmax else s


def shown_and_gradients(shown: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.arange(1, shown.numel() + 1, device=shown.device).sin().view(shown.shape)
    return shown.detach(), *torch.autograd.grad((shown * weights).sum(), (z, h))


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference over the largest of `expected`, row by row."""
    if expected.numel() == 0:
        return torch.zeros(len(expected), dtype=torch.float64)
    found, expected = (x.double().cpu().reshape(len(x), -1) for x in (found, expected))
    scale = expected.abs().amax(1).clamp_min(1e-30)
    return (found - expected).abs().amax(1) / scale


def error(found: Tensor, expected: Tensor) -> float:
    """The same of the worst row."""
    return row_errors(found, expected).max().item()


def attainable(z: Tensor, labels: Tensor) -> Tensor:
    """What float32 can reach in each row of the gradient to `z` [B, C], whatever the order of operations.

    log p = z - lse is off by the rounding of both, so p by eps (|z - lse| + |lse|), and some more of exp
    and of sums. The gradient p (e - <p, e>) enlarges that where it is a difference of near equals.
    """
    z, labels = z.detach().double().cpu(), labels.cpu()
    lse = z.logsumexp(1, keepdim=True)
    p = (z - lse).exp()
    e = p - torch.nn.functional.one_hot(labels, z.shape[1])
    gradient = p * (e - (p * e).sum(1, keepdim=True))
    enlarged = ((p * e.abs()).amax(1) / gradient.abs().amax(1)).clamp_min(1)
    units = 4 + lse.abs()[:, 0] + (z - lse).abs().amax(1)
    return torch.finfo(torch.float32).eps * units * enlarged


@pytest.fixture(params=["compiled extension", "plain PyTorch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain PyTorch":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("the compiled extension is not installed")


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("predicted", [False, True])
def test_values_and_gradients_are_those_of_the_definition(
    b: int, c: int, d: int, softmax: bool, predicted: bool
) -> None:
    z, h, y = sample(b, c, d)
    check(z, h, z.argmax(1) if predicted else y, softmax=softmax, predicted=predicted)


def check(z: Tensor, h: Tensor, labels: Tensor, *, softmax: bool, predicted: bool) -> None:
    """Values and gradients against float64."""
    z, h = z.requires_grad_(), h.requires_grad_()
    shown = attack_features(z, h, None if predicted else labels) if softmax else sensitivity(z, h, labels)
    found = shown_and_gradients(shown, z, h)
    exact = [x.detach().double().requires_grad_() for x in (z, h)]
    expected = shown_and_gradients(defined(*exact, labels, softmax=softmax), *exact)
    usual = torch.full((len(z),), 3e-6, dtype=torch.float64)
    for one, other, limit in zip(found, expected, (usual, attainable(z, labels), usual), strict=True):
        rounding = 0 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        assert (row_errors(one, other) < rounding + limit).all()


@pytest.mark.usefixtures("_path")
def test_an_unlikely_label_among_thousands_costs_no_digits() -> None:
    """What the others' gradient takes off is small beside the two numbers near 1 that it is between."""
    z, h, y = sample(16, 5000, 8)
    z = (z / 2).requires_grad_()
    (found,) = torch.autograd.grad(sensitivity(z, h, y).sum(), z)
    exact = z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(defined(exact, h.double(), y).sum(), exact)
    assert (row_errors(found, expected) < attainable(z, y)).all()


@pytest.mark.usefixtures("_path")
def test_without_a_bias() -> None:
    z, h, y = sample(9, 10, 7)
    h[3] = 0
    found = sensitivity(z.requires_grad_(), h.requires_grad_(), y, bias=False)
    exact = [x.detach().double().requires_grad_() for x in (z, h)]
    for one, other in zip(
        shown_and_gradients(found, z, h),
        shown_and_gradients(defined(*exact, y, bias=False), *exact),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_path")
def test_a_logit_far_below_the_others_counts_as_it_should() -> None:
    """Probabilities from 1 to 1e-37, each compared by its own size."""
    z = torch.linspace(0, -85, 40).repeat(40, 1)
    h, y = torch.ones(40, 1), torch.arange(40)
    u = attack_features(z, h, y)
    torch.testing.assert_close(
        u.double(), defined(z.double(), h.double(), y, softmax=True), rtol=2e-5, atol=0
    )


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("c", [5, 50])
def test_a_value_that_is_not_finite_stays_in_its_row(value: float, c: int) -> None:
    z, h, y = sample(4, c, 6)
    z[1, 2], h[3, 0] = value, value
    z, h = z.requires_grad_(), h.requires_grad_()
    for found in (sensitivity(z, h, y), attack_features(z, h, None)):
        shown, grad_z, grad_h = shown_and_gradients(found, z, h)
        shown = shown.reshape(4, -1)
        assert [row.isfinite().all().item() for row in shown] == [True, False, True, False]
        assert shown[1].isnan().any()
        assert grad_z[[0, 2]].isfinite().all()
        assert grad_h[[0, 2]].isfinite().all()
        assert grad_z[1].isnan().any()


@pytest.mark.usefixtures("_path")
def test_targets_that_are_no_class_are_refused() -> None:
    z, h, y = sample(4, 10, 3)
    for wrong in (10, -1, -100):
        targets = y.clone()
        targets[2] = wrong
        for function in (sensitivity, attack_features):
            with pytest.raises(ValueError, match=rf"targets lie in .*{wrong}.*: expected 0 to 9"):
                function(z, h, targets)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("function", [sensitivity, attack_features])
def test_targets_that_are_changed_behind_autograds_back_are_refused(function: Callable[..., Any]) -> None:
    z, h, y = sample(4, 10, 3)
    for change in (lambda: y.data.fill_(10**9), lambda: y.numpy().fill(-(10**9))):
        y.fill_(1)
        found = function(z.clone().requires_grad_(), h, y)
        change()
        with pytest.raises(ValueError, match=r"targets lie in .*000.*: expected 0 to 9"):
            sum(part.sum() for part in (found if isinstance(found, tuple) else (found,))).backward()


def test_mistakes_are_named() -> None:
    z, h, y = sample(4, 10, 3)
    with pytest.raises(ValueError, match=r"logits have shape \[4, 10\], features \[3, 3\]: expected"):
        sensitivity(z, h[:3], y)
    with pytest.raises(ValueError, match=r"at least one class"):
        sensitivity(z[:, :0], h, y)
    with pytest.raises(ValueError, match=r"targets are torch.int32 of shape \[4\]: expected int64"):
        sensitivity(z, h, y.int())
    with pytest.raises(ValueError, match=r"of shape \[4, 1\]: expected int64 of shape \[4\]"):
        attack_features(z, h, y.unsqueeze(1))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(softmax: bool, dtype: torch.dtype) -> None:
    z, h, y = sample(5, 6, 4, dtype)
    for targets in (y, None):
        torch.library.opcheck(forward_op, (z, h, targets, True, softmax))
        shown, stats, predicted = forward_op(z, h, targets, True, softmax)
        labels = predicted if targets is None else targets
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                backward_op, (torch.ones_like(shown), z, h, labels, stats, softmax, *wanted)
            )
    torch.library.opcheck(forward_op, (z.bfloat16(), h.T.contiguous().T, y, False, softmax))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradcheck(wanted: tuple[bool, bool]) -> None:
    z, h, y = sample(4, 5, 3, torch.float64)
    z, h = z.requires_grad_(wanted[0]), h.requires_grad_(wanted[1])
    assert torch.autograd.gradcheck(lambda z, h: sensitivity(z, h, y), (z, h))
    assert torch.autograd.gradcheck(lambda z, h: attack_features(z, h, y), (z, h))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(z: Tensor, h: Tensor, y: Tensor) -> Tensor:
        return 3 * sensitivity(2 * z, h, y).sum() + attack_features(z, h, None).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9) if dynamic else (6,):
        z, h, y = sample(rows, 10, 4)
        z, h = z.requires_grad_(), h.requires_grad_()
        found = torch.autograd.grad(compiled(z, h, y), (z, h))
        for one, other in zip(found, torch.autograd.grad(step(z, h, y), (z, h)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    z, h, y = sample(8, 10, 40, dtype)
    found = sensitivity(z.requires_grad_(), h.requires_grad_(), y)
    assert found.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (z, h)]
    shown, *grads = shown_and_gradients(found, z, h)
    expected, *wanted = shown_and_gradients(defined(*exact, y), *exact)
    assert error(shown, expected) < 1e-6
    for one, other in zip(grads, wanted, strict=True):
        assert one.dtype == dtype
        assert error(one, other) < torch.finfo(dtype).eps


def test_under_autocast_sums_stay_in_float32() -> None:
    layer = nn.Linear(6, 5)
    _, h, y = sample(8, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(h)
        found = sensitivity(z, h, y)
    assert (z.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    assert error(found.detach(), defined(z.detach().double(), h.double(), y)) < 1e-6
    found.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.usefixtures("_path")
def test_strides_do_not_matter() -> None:
    z, h, y = sample(6, 10, 8)
    plain = attack_features(z, h, y)
    apart = torch.stack([y, y], 1)[:, 0]
    for logits, features in ((z.T.contiguous().T, h[:, ::2].repeat_interleave(1, 1)), (z, h)):
        if features.shape[1] == 8:
            assert torch.equal(attack_features(logits, features, apart), plain)
    wide = torch.zeros(12, 20)
    wide[::2, ::2] = z
    assert torch.equal(attack_features(wide[::2, ::2], h.T.contiguous().T, apart), plain)
    assert sensitivity(z[:1].expand(6, 10), h, y).shape == (6,)


def test_a_factor_and_accumulation() -> None:
    z, h, y = sample(6, 10, 8)
    z = z.requires_grad_()
    (once,) = torch.autograd.grad(sensitivity(z, h, y).sum(), [z])
    (3 * sensitivity(z, h, y)).sum().backward()
    sensitivity(z, h, y).sum().backward()
    torch.testing.assert_close(z.grad, 4 * once)


def test_under_no_grad_nothing_is_recorded() -> None:
    z, h, y = sample(3, 4, 2)
    with torch.no_grad():
        assert not sensitivity(z.requires_grad_(), h, y).requires_grad
    assert not attack_features(z.detach(), h, None).requires_grad


def test_only_five_numbers_a_sample_are_kept() -> None:
    z, h, y = (x.requires_grad_() if x.is_floating_point() else x for x in sample(4, 50, 6))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sensitivity(z, h, y)
    given = {x.data_ptr() for x in (z, h, y)}
    assert sum(t.numel() for t in kept if t.data_ptr() not in given) == 5 * 4


def test_only_shapes_are_needed_for_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        z = torch.empty(4, 10, requires_grad=True)
        u = attack_features(z, torch.empty(4, 3), None)
        u.sum().backward()
        assert u.shape == (4, 11)
        assert z.grad is not None
        assert z.grad.shape == (4, 10)
    meta = {"device": "meta"}
    y = torch.empty(4, dtype=torch.int64, **meta)
    assert sensitivity(torch.empty(4, 10, **meta), torch.empty(4, 3, **meta), y).shape == (4,)


@pytest.mark.usefixtures("_path")
def test_no_samples() -> None:
    z, h, y = sample(0, 10, 3)
    z = z.requires_grad_()
    u = attack_features(z, h, None)
    u.sum().backward()
    assert u.shape == (0, 11)
    assert sensitivity(z, h, y).shape == (0,)
    assert z.grad is not None
    assert z.grad.shape == (0, 10)


def test_functional_transforms_and_second_derivatives_are_refused() -> None:
    z, h, y = sample(3, 5, 2)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda z: sensitivity(z, h, y).sum())(z)
    (grad,) = torch.autograd.grad(sensitivity(z.requires_grad_(), h, y).sum(), [z], create_graph=True)
    with pytest.raises(RuntimeError, match="sensitivity and attack_features are differentiable once"):
        grad.sum().backward()


def test_large_batches_on_several_threads() -> None:
    """More numbers than one thread is given, and rows that do not divide evenly."""
    z, h, y = sample(29, 100_003, 2)
    z = z.requires_grad_()
    found = shown_and_gradients(attack_features(z, h.requires_grad_(), y), z, h)
    exact = [x.detach().double().requires_grad_() for x in (z, h)]
    for one, other in zip(found, shown_and_gradients(defined(*exact, y, softmax=True), *exact), strict=True):
        assert error(one, other) < 1e-5


# ---- on the device that was chosen with --device


@pytest.mark.parametrize(("b", "c", "d"), [*SHAPES, (512, 10, 512), (64, 50_257, 128)])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device(
    device: torch.device, b: int, c: int, d: int, softmax: bool, predicted: bool, dtype: torch.dtype
) -> None:
    z, h, y = (x.to(device) for x in sample(b, c, d, dtype))
    # Rounded logits may have two largest: the definition must be told which one is first.
    check(z, h, z.argmax(1) if predicted else y, softmax=softmax, predicted=predicted)


def test_captured_in_a_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    for c in (10, 5000):
        z, h, y = (x.to(device) for x in sample(16, c, 8))
        z, h = z.requires_grad_(), h.requires_grad_()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(sensitivity(z, h, y).sum(), (z, h))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(sensitivity(z, h, y).sum(), (z, h))
        with torch.no_grad():
            z.mul_(0.5)
        graph.replay()
        exact = [x.detach().double().requires_grad_() for x in (z, h)]
        expected = torch.autograd.grad(defined(*exact, y).sum(), exact)
        usual = torch.full((len(z),), 3e-6, dtype=torch.float64)
        for one, other, limit in zip(captured, expected, (attainable(z, y), usual), strict=True):
            assert (row_errors(one, other) < limit).all()


def test_a_wrong_target_stops_a_cuda_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    # In a process of its own: the assertion leaves the device of this one unusable.
    code = (
        "import torch; from dau_fast.ops import sensitivity\n"
        "z, h = torch.randn(3, {c}, device='cuda'), torch.randn(3, 4, device='cuda')\n"
        "print(sensitivity(z, h, torch.tensor([0, {y}, 1], device='cuda')).tolist())"
    )
    for c, y in ((10, 10), (10, -1), (5000, 5000)):
        command = [sys.executable, "-c", code.format(c=c, y=y)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "device-side assert" in done.stderr
        assert "a target is no class" in done.stdout + done.stderr


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_plain_pytorch_takes_over_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    z, h, y = sample(6, 9, 4)
    for _ in range(2):
        s, stats, _ = PATHS["sensitivity_forward", "CUDA"](z, h, y, True, False)
        PATHS["sensitivity_backward", "CUDA"](torch.ones_like(s), z, h, y, stats, False, True, True)
    assert error(s, defined(z.double(), h.double(), y)) < 1e-5
    (record,) = caplog.records
    assert "plain PyTorch runs on the GPU instead; install triton" in record.message
