"""The Barlow Twins op as a drop-in: accuracy, autograd, compilation, dtypes, strides, strange values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dau_fast.nn import BarlowTwinsLoss
from dau_fast.ops import _native, barlow_twins_loss
from dau_fast.ops._barlow_twins_op import (
    PRECISIONS,
    backward_op,
    forward_op,
    prefers_gram,
)
from dau_fast.ops._library import PATHS
from dau_fast.ops.reference import barlow_twins_reference

# (N, D), both forms: the Gram form runs where N < 0.75 D.
SHAPES = [(2, 1), (2, 3), (3, 2), (17, 5), (5, 17), (33, 47), (64, 16), (16, 64), (48, 64), (47, 64)]


def views(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    a = torch.randn(n, d, dtype=torch.float64, generator=generator)
    b = 0.5 * a + torch.randn(n, d, dtype=torch.float64, generator=generator) + 3
    return a.to(dtype), b.to(dtype)


def value_and_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = loss(a, b)
    return value.detach(), *torch.autograd.grad(value, (a, b))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    return (torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected)).item()


def defined(a: Tensor, b: Tensor, lambd: float = 5e-3, eps: float = 1e-5) -> Tensor:
    return barlow_twins_reference(a.double(), b.double(), lambd, eps)


@pytest.fixture(params=["C++", "PyTorch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Memory that is not written stays NaN."""
    if request.param == "PyTorch":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("the compiled extension is not installed")


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("lambd", [0.0, 5e-3, 1.0])
def test_value_and_gradients_are_those_of_the_definition(n: int, d: int, lambd: float) -> None:
    a, b = views(n, d)
    found = value_and_gradients(lambda x, y: barlow_twins_loss(x, y, lambd), a, b)
    expected = value_and_gradients(lambda x, y: defined(x, y, lambd), a, b)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize("gram", [True, False])
def test_both_forms_agree_on_every_shape(gram: bool) -> None:
    for n, d in SHAPES:
        a, b = views(n, d)
        loss, stats, products = forward_op(a, b, 0.1, 1e-5, gram, "ieee")
        grads = backward_op(loss.new_ones(()), a, b, stats, products, 0.1, gram, "ieee", True, True)
        expected = value_and_gradients(lambda x, y: defined(x, y, 0.1), a, b)
        for one, other in zip((loss, *grads), expected, strict=True):
            # The Gram form takes the diagonal off a sum of about 1, so it cannot see less than 1e-16.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * other.abs().max().item() + 1e-14)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("gram", [True, False])
def test_both_forms_agree_in_float32(gram: bool) -> None:
    for n, d in [*SHAPES, (200, 150), (70, 1)]:
        if n > 3:  # of fewer rows float32 leaves few digits, whatever computes them
            a, b = views(n, d, torch.float32)
            loss, stats, products = forward_op(a, b, 0.1, 1e-5, gram, "ieee")
            pulled = torch.full((), 0.5)
            grads = backward_op(pulled, a, b, stats, products, 0.1, gram, "ieee", True, True)
            expected = value_and_gradients(lambda x, y: defined(x, y, 0.1), a.double(), b.double())
            assert relative_error(loss, expected[0]) < 1e-5
            for one, other in zip(grads, expected[1:], strict=True):
                assert relative_error(2 * one, other) < 1e-5


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("n", "d"), [(1030, 107), (107, 1030)])
def test_several_threads(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More numbers than one thread is given, and columns and rows that do not divide evenly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    a, b = views(n, d, torch.float32)
    found = value_and_gradients(barlow_twins_loss, a, b)
    for one, other in zip(found, value_and_gradients(defined, a.double(), b.double()), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(("n", "d"), [(512, 128), (64, 1024)])
def test_float32_gradients_are_exact_to_1e_5(n: int, d: int) -> None:
    a, b = views(n, d, torch.float32)
    found = value_and_gradients(barlow_twins_loss, a, b)
    for one, other in zip(found, value_and_gradients(defined, a.double(), b.double()), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(("n", "d"), [(64, 16), (16, 64)])
def test_columns_far_from_zero_keep_their_digits(n: int, d: int) -> None:
    """Means 1,000 times the deviations: sums of squares would leave nothing in float32."""
    a, b = (z * 0.1 + 100 for z in views(n, d, torch.float32))
    found = value_and_gradients(barlow_twins_loss, a, b)
    for one, other in zip(found, value_and_gradients(defined, a.double(), b.double()), strict=True):
        assert relative_error(one, other) < 1e-3


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(64, 16), (16, 64)])
def test_half_precision_views_are_summed_in_float32(dtype: torch.dtype, n: int, d: int) -> None:
    a, b = views(n, d, dtype)
    loss, *grads = value_and_gradients(barlow_twins_loss, a, b)
    expected, *wanted = value_and_gradients(defined, a.double(), b.double())
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-5
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, other) < torch.finfo(dtype).eps


def test_views_of_two_dtypes() -> None:
    a, b = views(16, 8, torch.float32)
    loss, grad_a, grad_b = value_and_gradients(barlow_twins_loss, a.bfloat16(), b)
    assert (loss.dtype, grad_a.dtype, grad_b.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert relative_error(loss, defined(a.bfloat16(), b)) < 1e-5


@pytest.mark.parametrize("gram", [True, False])
def test_opcheck(gram: bool) -> None:
    a, b = views(9, 6, torch.float32)
    settings = (5e-3, 1e-5, gram, "ieee")
    torch.library.opcheck(forward_op, (a, b, *settings))
    loss, stats, products = forward_op(a, b, *settings)
    for wanted in ((True, True), (True, False), (False, True)):
        rest = (5e-3, gram, "ieee", *wanted)
        torch.library.opcheck(backward_op, (torch.ones_like(loss), a, b, stats, products, *rest))
    strided = torch.randn(6, 9).T
    torch.library.opcheck(forward_op, (strided, b.bfloat16(), *settings))


@pytest.mark.parametrize(("n", "d"), [(6, 4), (4, 9)])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradcheck(n: int, d: int, wanted: tuple[bool, bool]) -> None:
    inputs = [z.requires_grad_(want) for z, want in zip(views(n, d), wanted, strict=True)]
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins_loss(x, y, 0.1), inputs)


@pytest.mark.parametrize(("n", "d"), [(24, 8), (8, 24)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(n: int, d: int, dynamic: bool) -> None:
    torch.compiler.reset()
    step = torch.compile(
        lambda x, y: 3 * barlow_twins_loss(2 * x, y), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for rows in (n, n + 1) if dynamic else (n,):
        a, b = views(rows, d, torch.float32)
        for one, other in zip(
            value_and_gradients(step, a, b),
            value_and_gradients(lambda x, y: 3 * barlow_twins_loss(2 * x, y), a, b),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_strides_do_not_matter() -> None:
    a, b = views(12, 10, torch.float32)
    wide = torch.zeros(24, 20)
    wide[::2, ::2] = a
    plain = value_and_gradients(barlow_twins_loss, a, b)
    for strided in (a.T.contiguous().T, wide[::2, ::2]):
        assert strided.stride() != a.stride()
        for one, other in zip(value_and_gradients(barlow_twins_loss, strided, b), plain, strict=True):
            torch.testing.assert_close(one, other)
    same = a[:1].expand(12, 10)
    assert barlow_twins_loss(same, b).item() == pytest.approx(10)


def test_a_factor_and_accumulation_and_views_used_twice() -> None:
    a, b = (z.requires_grad_() for z in views(8, 12))
    (once,) = torch.autograd.grad(barlow_twins_loss(a, b), [a])
    (3 * barlow_twins_loss(a, b)).backward()
    barlow_twins_loss(a, b).backward()
    torch.testing.assert_close(a.grad, 4 * once)
    (both,) = torch.autograd.grad(barlow_twins_loss(a, a), [a])
    expected = torch.autograd.grad(defined(a, a), [a])[0]
    torch.testing.assert_close(both, expected)


def test_under_no_grad_nothing_is_recorded() -> None:
    a, b = (z.requires_grad_() for z in views(8, 4))
    with torch.no_grad():
        assert not barlow_twins_loss(a, b).requires_grad
    assert not barlow_twins_loss(a.detach(), b.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_views_are_taken_as_they_come(dtype: torch.dtype) -> None:
    a, b = views(16, 8, torch.float32)
    layer = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype):
        z = layer(a)
        loss = barlow_twins_loss(z, b)
    assert z.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert relative_error(loss.detach(), defined(z.detach(), b)) < 1e-5


def test_only_shapes_are_needed_for_fake_and_meta_tensors() -> None:
    for n, d in ((4, 6), (6, 4)):
        with FakeTensorMode():
            a = torch.empty(n, d, requires_grad=True)
            loss = barlow_twins_loss(a, torch.empty(n, d))
            loss.backward()
            assert loss.shape == ()
            assert a.grad is not None
            assert a.grad.shape == (n, d)
        on_meta = barlow_twins_loss(torch.empty(n, d, device="meta"), torch.empty(n, d, device="meta"))
        assert on_meta.shape == ()


def test_no_columns_cost_nothing() -> None:
    a = torch.zeros(4, 0, requires_grad=True)
    loss = barlow_twins_loss(a, torch.zeros(4, 0))
    loss.backward()
    assert loss.item() == 0
    assert a.grad is not None
    assert a.grad.shape == (4, 0)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(("n", "d"), [(24, 8), (8, 24)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_loss_and_the_gradient(n: int, d: int, value: float) -> None:
    a, b = views(n, d, torch.float32)
    a[1, 2] = value
    loss, grad_a, grad_b = value_and_gradients(barlow_twins_loss, a, b)
    assert loss.isnan()
    assert grad_a.isnan().any()
    assert grad_b.isnan().any()


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(("n", "d"), [(24, 8), (8, 24)])
def test_constant_columns_cost_1_each(n: int, d: int) -> None:
    _, b = views(n, d, torch.float32)
    loss, grad, _ = value_and_gradients(barlow_twins_loss, torch.full((n, d), 2.5), b)
    assert loss.item() == pytest.approx(d, rel=1e-3)
    assert grad.isfinite().all()


def test_functional_transforms_are_refused() -> None:
    a, b = views(6, 9)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(barlow_twins_loss)(a, b)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(barlow_twins_loss)(a.expand(2, 6, 9), b.expand(2, 6, 9))


def test_a_second_derivative_is_refused() -> None:
    a, b = (z.requires_grad_() for z in views(6, 9))
    (grad,) = torch.autograd.grad(barlow_twins_loss(a, b), [a], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_mistakes_are_named() -> None:
    a, b = views(4, 3)
    with pytest.raises(ValueError, match="precision 'fp8' is unknown: expected one of ieee, tf32x3, tf32"):
        barlow_twins_loss(a, b, precision="fp8")
    with pytest.raises(ValueError, match="expected floating point"):
        barlow_twins_loss(a.long(), b.long())


@pytest.mark.parametrize(("n", "d", "gram"), [(74, 100, True), (75, 100, False), (76, 100, False)])
def test_the_form_is_chosen_by_flops(n: int, d: int, gram: bool) -> None:
    assert prefers_gram(n, d) == gram


@pytest.mark.parametrize(("n", "d"), [(8, 64), (64, 8)])
def test_no_larger_array_than_needed_is_kept(n: int, d: int) -> None:
    """Kept from forward to backward: the views themselves, 7 rows of statistics, and the products."""
    a, b = (z.requires_grad_() for z in views(n, d, torch.float32))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        barlow_twins_loss(a, b)
    own = [t for t in kept if t.data_ptr() not in (a.data_ptr(), b.data_ptr())]
    assert sum(t.numel() for t in own) <= 7 * d + min(2 * n * n, d * d)


# ---- on the device that was chosen with --device


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (33, 47), (130, 20), (20, 130), (512, 128), (256, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device(device: torch.device, precision: str, n: int, d: int, dtype: torch.dtype) -> None:
    a, b = (z.to(device) for z in views(n, d, dtype))
    found = value_and_gradients(lambda x, y: barlow_twins_loss(x, y, precision=precision), a, b)
    expected = value_and_gradients(defined, a.double(), b.double())
    coarse = precision == "tf32" or dtype == torch.bfloat16
    if n > 2:  # two rows are +1 and -1 whatever they hold, and the gradient is nearly 0
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < (8e-3 if coarse else 1e-5)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "d"), [(2, 8), (2, 128), (3, 128), (4, 128)])
def test_batches_of_few_rows_lose_no_more_digits_than_the_definition(n: int, d: int) -> None:
    """Columns of two rows are +1 and -1 whatever they hold: the gradient is nearly 0, and float32 coarse."""

    def coarse(a: Tensor, b: Tensor) -> Tensor:
        return barlow_twins_reference(a, b, 5e-3, 1e-5)

    worst = {barlow_twins_loss: 0.0, coarse: 0.0}
    for seed in range(10):
        a, b = views(n, d, torch.float32, seed=seed)
        exact = value_and_gradients(defined, a.double(), b.double())
        for function in worst:
            found = value_and_gradients(function, a, b)
            errors = [relative_error(one, other) for one, other in zip(found[1:], exact[1:], strict=True)]
            worst[function] = max(worst[function], *errors)
    assert worst[barlow_twins_loss] < 8 * worst[coarse] + 1e-6


def test_captured_in_a_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    for n, d in ((64, 16), (16, 64)):
        a, b = (z.to(device).requires_grad_() for z in views(n, d, torch.float32))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(barlow_twins_loss(a, b), (a, b))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(barlow_twins_loss(a, b), (a, b))
        with torch.no_grad():
            a.copy_(views(n, d, torch.float32, seed=1)[0])
        graph.replay()
        for one, other in zip(captured, value_and_gradients(defined, a, b)[1:], strict=True):
            assert relative_error(one, other) < 1e-5


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_plain_pytorch_takes_over_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    a, b = views(6, 9, torch.float32)
    for _ in range(2):
        loss, stats, products = PATHS["barlow_twins_forward", "CUDA"](a, b, 5e-3, 1e-5, True, "ieee")
        saved = stats, products, 5e-3, True, "ieee", True, True
        PATHS["barlow_twins_backward", "CUDA"](loss.new_ones(()), a, b, *saved)
    assert relative_error(loss, defined(a, b)) < 1e-5
    (record,) = caplog.records
    assert "plain PyTorch runs on the GPU instead; install triton" in record.message


# ---- the module


def test_module_is_the_function_with_its_settings() -> None:
    a, b = views(12, 8)
    assert BarlowTwinsLoss()(a, b) == barlow_twins_loss(a, b)
    assert BarlowTwinsLoss(0.1, eps=0.5)(a, b) == barlow_twins_loss(a, b, 0.1, 0.5)
    for module in (copy.deepcopy(BarlowTwinsLoss(0.2)), pickle.loads(pickle.dumps(BarlowTwinsLoss(0.2)))):
        assert module(a, b) == barlow_twins_loss(a, b, 0.2)
    assert "lambda_param=0.2" in repr(BarlowTwinsLoss(0.2))
    assert BarlowTwinsLoss(gather_distributed=True)(a, b) == barlow_twins_loss(a, b)


def test_module_with_the_conventions_of_other_projects() -> None:
    """Written out from the formulas of lightly, facebookresearch/barlowtwins and solo-learn."""
    a, b = views(12, 8)
    za, zb = (nn.BatchNorm1d(8, affine=False).double()(z) for z in (a, b))
    c = za.T @ zb / 12
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = (c - c.diag().diag()).square().sum()
    torch.testing.assert_close(BarlowTwinsLoss(0.0051)(a, b), on_diagonal + 0.0051 * off_diagonal)
    scaled = BarlowTwinsLoss(5e-3, scale=0.025)(a, b)
    torch.testing.assert_close(scaled, 0.025 * (on_diagonal + 5e-3 * off_diagonal))
