"""Packed masks: known answers, the plain definition, every error, with and without C++."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dau_fast.ops import _native
from dau_fast.ops.packed_masks import apply_masks_, count_kept, pack_mask, unpack_mask
from dau_fast.ops.reference import (
    apply_masks_reference_,
    pack_mask_reference,
    unpack_mask_reference,
)

NAN, INF = float("nan"), float("inf")
SIZES = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65]) | st.integers(0, 400)
# The fixture below is the same for every example of a property.
properties = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


@pytest.fixture(params=["extension", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs through C++ and through plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("dau_fast._C is not built")
    return str(request.param)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Bool masks of one to three dimensions: whole words of ones and of zeros, and mixtures."""
    n = draw(SIZES)
    last = draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(n,), (n, last), (last, n), (2, n, last)]))
    random = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return random < draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0 and holds for NaN."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- known answers


def test_bit_order_least_significant_first() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [1 + 4 + 8 + 128, 2]
    assert torch.equal(unpack_mask(packed, (2, 5)), mask)
    assert count_kept(packed, 10) == 5


def test_padding_is_written_as_zero_and_never_read() -> None:
    assert pack_mask(torch.ones(9, dtype=torch.bool)).tolist() == [255, 1]
    dirty = torch.tensor([0, 0b11111110], dtype=torch.uint8)
    assert count_kept(dirty, 9) == 0
    assert unpack_mask(dirty, (9,)).tolist() == [False] * 9
    weights = torch.ones(9)
    apply_masks_([weights], [dirty])
    assert weights.tolist() == [0.0] * 9


def test_apply_zeroes_where_the_mask_is_false() -> None:
    weights = torch.tensor([[1.0, -2.0, NAN], [-INF, 5.0, INF]])
    mask = torch.tensor([[True, False, False], [False, True, True]])
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, INF]])
    for form in (mask, pack_mask(mask)):
        changed = weights.clone()
        apply_masks_([changed], [form])
        assert same_bits(changed, expected)


@pytest.mark.parametrize("n", [5, 8, 64, 100])
def test_masked_nan_infinity_and_negatives_become_positive_zero(n: int) -> None:
    for value in (NAN, -NAN, INF, -INF, -1.0, -0.0):
        weights = torch.full((n,), value)
        mask = torch.arange(n) % 3 == 0
        apply_masks_([weights], [pack_mask(mask)])
        assert same_bits(weights[~mask], torch.zeros(int((~mask).sum())))
        assert same_bits(weights[mask], torch.full((int(mask.sum()),), value))


def test_kept_nan_stays_nan() -> None:
    weights = torch.full((65,), NAN)
    apply_masks_([weights], [torch.ones(65, dtype=torch.bool)])
    assert weights.isnan().all()


# ---- properties


@given(mask=masks())
@properties
def test_pack_and_unpack_are_inverse_and_equal_the_definition(mask: Tensor) -> None:
    packed = pack_mask(mask)
    assert packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(packed, pack_mask_reference(mask))
    unpacked = unpack_mask(packed, mask.shape)
    assert torch.equal(unpacked, mask)
    assert torch.equal(unpacked, unpack_mask_reference(packed, mask.shape))
    assert count_kept(packed, mask.numel()) == int(mask.sum())


@given(mask=masks(), packed=st.booleans(), data=st.data())
@properties
def test_apply_equals_the_definition(mask: Tensor, packed: bool, data: st.DataObject) -> None:
    weights = torch.randn(mask.shape)
    for value in (NAN, INF, -INF):
        weights[torch.rand(mask.shape) < data.draw(st.sampled_from([0.0, 0.3]))] = value
    form = pack_mask(mask) if packed else mask
    expected = weights.clone()
    apply_masks_reference_([expected], [form])
    apply_masks_([weights], [form])
    assert same_bits(weights, expected)


@given(n=SIZES, offset=st.integers(0, 9), seed=st.integers(0, 99))
@properties
def test_slices_at_any_offset_leave_their_neighbours_alone(n: int, offset: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(offset + n + 9, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.5
    bits = torch.full((offset + -(-n // 8) + 9,), 0b10101010, dtype=torch.uint8)
    packed = bits[offset : offset + -(-n // 8)]
    packed.copy_(pack_mask(mask))
    expected = weights.clone()
    expected[offset : offset + n][~mask] = 0
    apply_masks_([weights[offset : offset + n]], [packed])
    assert same_bits(weights, expected)
    assert torch.equal(unpack_mask(packed, (n,)), mask)
    assert count_kept(packed, n) == int(mask.sum())
    flags = torch.ones(offset + n, dtype=torch.bool)
    flags[offset:] = mask
    assert torch.equal(pack_mask(flags[offset:]), packed)


# ---- what autograd, layouts and other dtypes expect


def test_parameters_that_require_grad() -> None:
    model = torch.nn.Linear(9, 7)
    forms = [torch.rand(7, 9) < 0.5, pack_mask(torch.arange(7) < 3)]
    apply_masks_(list(model.parameters()), forms)
    assert (model.weight[~forms[0]] == 0).all()
    assert (model.weight[forms[0]] != 0).all()
    assert (model.bias[3:] == 0).all()
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in model.parameters())


@pytest.mark.parametrize("packed", [True, False])
def test_autograd_notices_the_change(packed: bool) -> None:
    weights = torch.randn(70, requires_grad=True)
    loss = (weights * weights).sum()
    mask = torch.arange(70) % 2 == 0
    apply_masks_([weights], [pack_mask(mask) if packed else mask])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weights = torch.arange(1, 71).to(dtype)
    mask = torch.arange(70) % 3 == 0
    apply_masks_([weights], [pack_mask(mask)])
    assert torch.equal(weights, torch.where(mask, torch.arange(1, 71).to(dtype), 0))


@pytest.mark.parametrize("packed", [True, False])
def test_memory_layouts(packed: bool) -> None:
    mask = torch.rand(5, 3, 4, 6) < 0.5
    form = pack_mask(mask) if packed else mask
    wide = torch.randn(5, 3, 4, 12)
    layouts = [
        torch.randn(5, 3, 4, 6),
        torch.randn(5, 3, 4, 6).to(memory_format=torch.channels_last),
        torch.randn(6, 4, 3, 5).permute(3, 2, 1, 0),
        wide[..., ::2],
    ]
    before, between = [layout.clone() for layout in layouts], wide[..., 1::2].clone()
    apply_masks_(layouts, [form] * len(layouts))
    for layout, original in zip(layouts, before, strict=True):
        assert same_bits(layout, torch.where(mask, original, 0.0))
    assert same_bits(wide[..., 1::2], between)


@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_that_changes_is_not_taken_for_what_it_was(packed: bool) -> None:
    """In channels_last masks are laid out anew, whoever changed them: NumPy does so unseen."""
    first, second = torch.rand(2, 4, 3, 5, 5) < 0.5
    memory = (pack_mask(first) if packed else first.clone()).numpy()
    mask = torch.from_numpy(memory)
    for expected in (first, second):
        memory[...] = (pack_mask(expected) if packed else expected).numpy()
        weights = torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last)
        apply_masks_([weights], [mask])
        assert torch.equal(weights, expected.float())


def test_masks_in_any_layout() -> None:
    mask = torch.rand(9, 10) < 0.5
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))
    expanded = torch.tensor([[True], [False]]).expand(2, 5)
    assert pack_mask(expanded).tolist() == [0b00011111, 0]
    packed = torch.stack([pack_mask(mask)] * 2, dim=1)[:, 0]
    assert not packed.is_contiguous()
    assert torch.equal(unpack_mask(packed, (9, 10)), mask)
    assert count_kept(packed, 90) == int(mask.sum())
    weights = torch.ones(9, 10)
    apply_masks_([weights], [packed])
    assert torch.equal(weights, mask.float())


def test_no_tensors_and_empty_tensors() -> None:
    apply_masks_([], [])
    apply_masks_([torch.empty(0, 3)], [torch.empty(0, dtype=torch.uint8)])
    assert pack_mask(torch.empty(3, 0, dtype=torch.bool)).shape == (0,)
    assert unpack_mask(torch.empty(0, dtype=torch.uint8), (3, 0)).shape == (3, 0)
    scalar = torch.tensor(2.0)
    apply_masks_([scalar], [pack_mask(torch.tensor(False))])
    assert scalar.item() == 0.0


def test_fake_tensors_take_the_plain_path() -> None:
    with torch._subclasses.FakeTensorMode():
        packed = pack_mask(torch.ones(9, dtype=torch.bool))
        apply_masks_([torch.ones(9)], [packed])
        assert unpack_mask(packed, (3, 3)).shape == (3, 3)


def test_compiles_to_one_graph() -> None:
    def step(weights: Tensor, mask: Tensor, packed: Tensor) -> Tensor:
        apply_masks_([weights], [packed])
        return weights * unpack_mask(pack_mask(mask), (9,))

    weights, mask = torch.full((9,), 3.0), torch.arange(9) % 2 == 0
    packed = pack_mask(mask)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(weights, mask, packed), mask * 3.0)
    assert torch.equal(weights, mask * 3.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu() -> None:
    mask = torch.rand(13, 11) < 0.5
    weights = torch.randn(13, 11)
    packed = pack_mask(mask.cuda())
    assert torch.equal(packed.cpu(), pack_mask(mask))
    assert count_kept(packed, 143) == int(mask.sum())
    for form in (mask.cuda(), packed):
        on_device = weights.cuda()
        apply_masks_([on_device], [form])
        assert same_bits(on_device.cpu(), torch.where(mask, weights, 0.0))


def test_cpp_takes_float32_without_gaps_and_nothing_else(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "plain":
        pytest.skip("about the extension only")
    spy = Mock(wraps=_native.extension)
    monkeypatch.setattr(_native, "extension", spy)
    mask = torch.rand(4, 4) < 0.5
    apply_masks_([torch.ones(4, 4), torch.nn.Parameter(torch.ones(4, 4))], [mask, pack_mask(mask)])
    assert [len(call.kwargs["weights"][0]) for call in spy.apply.call_args_list] == [2]
    apply_masks_([torch.ones(4, 4)[:, 1:], torch.ones(4, 4).double()], [mask[:, 1:], mask])
    assert spy.apply.call_count == 1
    apply_masks_([torch.ones(4, 4).T], [mask])
    assert spy.apply.call_count == 2


# ---- mistakes


def packed_ones(n: int) -> Tensor:
    return pack_mask(torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize(
    ("tensors", "wrong", "message"),
    [
        ([torch.ones(3)], [], "1 tensors and 0 masks: expected one mask a tensor"),
        ([torch.ones(3)], [torch.ones(3)], "mask 0 is float32: expected bool, or uint8"),
        ([torch.ones(3)], [torch.ones(4).bool()], r"mask 0 has shape \[4\], its tensor \[3\]"),
        ([torch.ones(2, 3)], [torch.ones(6).bool()], r"mask 0 has shape \[6\], its tensor \[2, 3"),
        ([torch.ones(17)], [packed_ones(16)], r"mask 0 has shape \[2\]: expected \[3\] for 17 w"),
        ([torch.ones(9)], [torch.ones(9).byte()], r"mask 0 has shape \[9\]: expected \[2\] for 9"),
        ([torch.ones(9)], [packed_ones(9)[None]], r"mask 0 has shape \[1, 2\]: expected \[2\]"),
        ([torch.ones(3)], [torch.ones(3, device="meta").bool()], "mask 0 is on meta, its tensor"),
    ],
)
def test_apply_says_what_is_wrong(tensors: Sequence[Tensor], wrong: Sequence[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}[^\n]*; [^\n]+$"):
        apply_masks_(tensors, wrong)


def test_nothing_is_changed_when_one_pair_is_wrong() -> None:
    first = torch.ones(3)
    with pytest.raises(ValueError, match=r"^mask 1 "):
        apply_masks_([first, torch.ones(3)], [torch.zeros(3).bool(), torch.zeros(4).bool()])
    assert first.tolist() == [1.0] * 3


def test_pack_unpack_and_count_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"^mask is float32: expected bool; convert it"):
        pack_mask(torch.ones(3))
    with pytest.raises(ValueError, match=r"^packed mask is bool: expected uint8; pack a bool"):
        unpack_mask(torch.ones(1).bool(), (3,))
    with pytest.raises(ValueError, match=r"^packed mask has shape \[2\]: expected \[1\] for 8 w"):
        unpack_mask(packed_ones(9), (2, 4))
    with pytest.raises(ValueError, match=r"^packed mask is int64: expected uint8"):
        count_kept(torch.ones(1).long(), 3)
    for n in (17, -9):
        with pytest.raises(ValueError, match=rf"^packed mask has shape \[2\].* for {n} weights"):
            count_kept(packed_ones(9), n)


# ---- the extension, present, absent and broken


def load_with(module: ModuleType | ImportError, monkeypatch: pytest.MonkeyPatch) -> object:
    def import_module(name: str) -> ModuleType:
        assert name == "dau_fast._C"
        if isinstance(module, ImportError):
            raise module
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)
    return _native._load()


def test_a_present_extension_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("dau_fast._C")
    assert load_with(module, monkeypatch) is module
    assert caplog.records == []


def test_an_absent_extension_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _native._warn_once.cache_clear()
    # None in sys.modules is Python's own way to make an import fail as if nothing were there.
    monkeypatch.setitem(sys.modules, "dau_fast._C", None)
    assert _native._load() is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("dau_fast", logging.WARNING)
    assert record.getMessage() == (
        "the compiled extension dau_fast._C is not installed: the slower PyTorch path runs; to "
        "get it, install dau-fast again with a C++20 compiler"
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("_C.so: undefined\nsymbol: x", name="dau_fast._C"),
        ModuleNotFoundError("undefined symbol: x", name="something_it_needs"),
    ],
)
def test_a_broken_extension_is_one_warning_with_its_reason(
    error: ImportError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _native._warn_once.cache_clear()
    assert load_with(error, monkeypatch) is None
    (record,) = caplog.records
    assert "dau_fast._C cannot be loaded (" in record.getMessage()
    assert "undefined symbol: x)" in record.getMessage()
    assert "slower PyTorch path" in record.getMessage()
