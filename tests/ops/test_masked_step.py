"""The masked steps on both paths: the definition in float64, strange values, layouts, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dau_fast.ops import _native, pack_mask
from dau_fast.ops.masked_step import masked_adamw_op, masked_sgd_op
from dau_fast.ops.reference import masked_adamw_reference_, masked_sgd_reference_

NAN = float("nan")
# Odd tails, several threads, and pieces of 16,384 with nearly all cache lines masked.
SIZES = st.sampled_from([0, 1, 15, 16, 17, 64, 16385]) | st.integers(0, 400)
KEPT = st.sampled_from([0.0, 0.002, 0.05, 0.5, 0.95, 1.0, None])
properties = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)


@pytest.fixture(params=["extension", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs through C++ and through plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("dau_fast._C is not built")
    return str(request.param)


class Case:
    """Weights, gradients and two states of random tensors; masked weights and states are 0."""

    def __init__(self, sizes: list[int], kept: list[float | None], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.masks: list[Tensor | None] = []
        self.tensors: list[list[Tensor]] = []
        for n, share in zip(sizes, kept, strict=True):
            mask = None if share is None else torch.rand(n, generator=generator) < share
            w, g, m, v = torch.randn(4, n, generator=generator)
            v = v.abs()
            for x in (w, m, v):
                if mask is not None:
                    x[~mask] = 0
            self.tensors.append([w.clone(), g.clone(), m.clone(), v.clone()])
            self.masks.append(mask)

    def lists(self, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
        """Fresh copies: weights, gradients, first and second state."""
        return [[tensors[i].to(dtype, copy=True) for tensors in self.tensors] for i in range(4)]

    def packed(self) -> list[Tensor | None]:
        return [None if mask is None else pack_mask(mask) for mask in self.masks]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(SIZES, min_size=1, max_size=3))
    return Case(sizes, [draw(KEPT) for _ in sizes], draw(st.integers(0, 999)))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=3e-6)


def assert_positive_zero(families: list[list[Tensor]], masks: list[Tensor | None]) -> None:
    for family in families:
        for tensor, mask in zip(family, masks, strict=True):
            if mask is not None:
                assert (tensor[~mask].view(torch.int32) == 0).all()


# ---- values


@given(
    case=cases(), moving=st.booleans(), first=st.booleans(), nesterov=st.booleans(), maximize=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]), tensor_lr=st.booleans(),
)  # fmt: skip
@properties
def test_sgd_equals_the_definition_in_float64(
    case: Case, moving: bool, first: bool, nesterov: bool, maximize: bool, decay: float, tensor_lr: bool
) -> None:
    w, g, m, _ = case.lists()
    exact_w, exact_g, exact_m, _ = case.lists(torch.float64)
    firsts = [first] * len(w) if moving else []
    dampening = 0.0 if nesterov else 0.25
    lr = (0.0, torch.tensor(0.1)) if tensor_lr else (0.1, None)
    settings = (0.9, dampening, decay, nesterov, maximize)
    masked_sgd_op(w, g, m if moving else [], case.packed(), firsts, *lr, *settings)
    masked_sgd_reference_(exact_w, exact_g, exact_m if moving else [], case.masks, firsts, 0.1, *settings)
    assert_close([*w, *m], [*exact_w, *exact_m])
    assert_positive_zero([w, m], case.masks)


@given(case=cases(), before=st.sampled_from([0, 3, 5000]), maximize=st.booleans(), tensor_lr=st.booleans())
@properties
def test_adamw_equals_the_definition_in_float64(
    case: Case, before: int, maximize: bool, tensor_lr: bool
) -> None:
    w, g, m, v = case.lists()
    exact = case.lists(torch.float64)
    steps = [torch.tensor(float(before)) for _ in w]
    exact_steps = [step.double() for step in steps]
    lr = (0.0, torch.tensor(0.01)) if tensor_lr else (0.01, None)
    settings = (0.9, 0.999, 1e-6, 0.1, maximize)
    masked_adamw_op(w, g, m, v, steps, case.packed(), *lr, *settings)
    exact_w, exact_g, exact_m, exact_v = exact
    masked_adamw_reference_(exact_w, exact_g, exact_m, exact_v, exact_steps, case.masks, 0.01, *settings)
    assert [step.item() for step in steps] == [before + 1] * len(w)
    assert_close([*w, *m, *v], [*exact_w, *exact_m, *exact_v])
    assert_positive_zero([w, m, v], case.masks)


def test_known_answers() -> None:
    """By hand: g = 2 + 0.5 * 4, m = 0.9 * 1 + 0.5 * g, w = 4 - 0.1 * m; then without a mask."""
    w, m = [torch.tensor([4.0, 0.0])], [torch.tensor([1.0, 0.0])]
    mask = pack_mask(torch.tensor([True, False]))
    masked_sgd_op(w, [torch.tensor([2.0, NAN])], m, [mask], [False], 0.1, None, 0.9, 0.5, 0.5, False, False)
    torch.testing.assert_close(m[0], torch.tensor([2.9, 0.0]))
    torch.testing.assert_close(w[0], torch.tensor([3.71, 0.0]))
    masked_sgd_op(w, [torch.ones(2)], [], [None], [], 1.0, None, 0.0, 0.0, 0.0, False, True)
    torch.testing.assert_close(w[0], torch.tensor([4.71, 1.0]))


@pytest.mark.parametrize("n", [5, 16, 50])
def test_masked_gradients_that_are_not_finite_do_nothing(n: int) -> None:
    keep = torch.arange(n) % 3 == 0
    for value in (NAN, float("inf")):
        grads = torch.where(keep, 1.0, value)
        w, m, v = torch.zeros(3, n).unbind()
        masked_sgd_op([w], [grads], [m], [pack_mask(keep)], [True], 1.0, None, 0.9, 0.0, 0.1, False, False)
        assert torch.equal(w, -keep.float())
        assert torch.equal(m, keep.float())
        for x in (w, m):
            x.zero_()
        step = torch.tensor(0.0)
        masked_adamw_op(
            [w], [grads], [m], [v], [step], [pack_mask(keep)], 0.5, None, 0.9, 0.999, 1e-8, 0.0, False
        )
        torch.testing.assert_close(w, -0.5 * keep.float())
        assert_positive_zero([[w], [m], [v]], [keep])


def test_slices_at_any_offset_leave_their_neighbours_alone() -> None:
    for offset in range(1, 18):
        w, m, g = torch.randn(3, 60).unbind()
        keep = torch.rand(31) < 0.5
        before = w.clone(), m.clone()
        inside = slice(offset, offset + 31)
        for x in (w, m):
            x[inside] *= keep
        masked_sgd_op(
            [w[inside]], [g[inside]], [m[inside]], [pack_mask(keep)], [False], 0.1, None, 0.9, 0.0, 0.0,
            False, False,
        )  # fmt: skip
        outside = torch.ones(60, dtype=torch.bool)
        outside[inside] = False
        for x, original in zip((w, m), before, strict=True):
            assert torch.equal(x[outside], original[outside])
            assert (x[inside][~keep] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_layouts_are_stepped_among_contiguous_float32(dtype: torch.dtype) -> None:
    keep = torch.rand(6, 10) < 0.5
    layouts = [
        torch.randn(6, 10),
        torch.randn(10, 6).T,
        torch.randn(6, 20)[:, ::2],
        torch.randn(6, 10).to(dtype),
    ]
    weights = [x.mul_(keep) for x in layouts]
    grads = [torch.randn(6, 10).to(x.dtype) for x in weights]
    grads[0] = torch.randn(10, 6).T
    momenta = [torch.zeros_like(x) for x in weights]
    expected = [(x - 0.5 * g) * keep for x, g in zip(weights, grads, strict=True)]
    settings = (0.9, 0.0, 0.0, False, False)
    masked_sgd_op(weights, grads, momenta, [pack_mask(keep)] * 4, [True] * 4, 0.5, None, *settings)
    for found, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, other)
        assert (found[~keep] == 0).all()


# ---- as torch ops


def arguments(op: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    case = Case([9, 20], [0.5, None], 0)
    w, g, m, v = case.lists(dtype)
    if op is masked_sgd_op:
        return w, g, m, case.packed(), [False, True], 0.1, None, 0.9, 0.0, 0.1, False, False
    steps = [torch.zeros(()) for _ in w]
    return w, g, m, v, steps, case.packed(), 0.1, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.1, False


@pytest.mark.parametrize("op", [masked_sgd_op, masked_adamw_op], ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(op: Any, dtype: torch.dtype) -> None:
    torch.library.opcheck(op, arguments(op, dtype))


@pytest.mark.parametrize("op", [masked_sgd_op, masked_adamw_op], ids=["sgd", "adamw"])
def test_compiled_without_a_graph_break(op: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend="aot_eager")
    found, expected = arguments(op), arguments(op)
    compiled(*found)
    op(*expected)
    for family in range(3):
        for one, other in zip(found[family], expected[family], strict=True):
            assert torch.equal(one, other)


def test_autograd_notices_the_change() -> None:
    w = torch.randn(40, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        masked_sgd_op([w], [torch.ones(40)], [], [None], [], 0.1, None, 0.0, 0.0, 0.0, False, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, w)


def test_fake_tensors_need_no_memory() -> None:
    with FakeTensorMode():
        masked_sgd_op(
            [torch.ones(9)], [torch.ones(9)], [], [None], [], 0.1, None, 0.0, 0.0, 0.0, False, False
        )


def test_cpp_takes_what_it_can_in_one_call(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "plain":
        pytest.skip("about the extension only")
    calls: list[int] = []

    class Spy:
        def masked_sgd(self, *, weights: tuple[list[int], list[int]], **_: Any) -> None:
            calls.append(len(weights[0]))

    monkeypatch.setattr(_native, "extension", Spy())
    weights = [torch.zeros(4), torch.zeros(4, dtype=torch.float64), torch.zeros(4)]
    grads = [torch.ones_like(w) for w in weights]
    masked_sgd_op(weights, grads, [], [None] * 3, [], 0.1, None, 0.0, 0.0, 0.0, False, False)
    assert calls == [2]
    assert weights[1].tolist() == [-0.1] * 4


@pytest.mark.parametrize("family", [1, 2])
def test_tensors_on_two_devices_are_refused(family: int) -> None:
    families = [[torch.ones(9)], [torch.ones(9)], [torch.ones(9)]]
    families[family] = [torch.ones(9, device="meta")]
    with pytest.raises(ValueError, match="is on meta, its weight on cpu: expected one device"):
        masked_sgd_op(*families, [None], [False], 0.1, None, 0.9, 0.0, 0.0, False, False)
    assert families[0][0].tolist() == [1.0] * 9
