"""Masks: bits and layout by hand, every way in and out, and masks that do not fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from dau_fast.errors import UserError
from dau_fast.prune import Masks


def mixed(seed: int = 0) -> dict[str, Tensor]:
    """Sizes around a byte and a word, an empty tensor and a scalar among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [
        (1,),
        (7,),
        (8,),
        (3, 3),
        (63,),
        (64,),
        (5, 13),
        (2, 3, 4, 5),
        (0, 4),
        (),
    ]
    return {f"p{i}": torch.rand(shape, generator=generator) < 0.4 for i, shape in enumerate(shapes)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def of_network(seed: int = 0, share: float = 0.4) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (3, 2, 3, 3), "3.weight": (4, 12)}
    return Masks({name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()})


def same(masks: Masks, expected: dict[str, Tensor]) -> bool:
    return list(masks) == list(expected) and all(
        torch.equal(masks[name], expected[name]) for name in expected
    )


# ---- bits


def test_known_bits_at_whole_words() -> None:
    masks = Masks(
        {"a": torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]).bool(), "b": torch.tensor([[0, 1], [1, 0]]).bool()}
    )
    assert masks.arena.tolist() == [1 + 4 + 8, 1, 0, 0, 0, 0, 0, 0, 2 + 4, 0, 0, 0, 0, 0, 0, 0]
    assert masks.packed("a").tolist() == [13, 1]
    assert masks.packed("b").data_ptr() == masks.arena.data_ptr() + 8
    assert (masks.weights, masks.kept) == (13, 6)
    assert masks.sparsity == pytest.approx(7 / 13)
    assert masks.layer_sparsity == {"a": pytest.approx(5 / 9), "b": 0.5}


def test_bools_come_back_from_every_size() -> None:
    given = mixed()
    masks = Masks(given)
    assert same(masks, given)
    assert masks.kept == sum(int(mask.sum()) for mask in given.values())
    for name, mask in given.items():
        assert masks.shape(name) == tuple(mask.shape)
        assert masks.packed(name).numel() == -(-mask.numel() // 8)
        assert (masks.packed(name).data_ptr() - masks.arena.data_ptr()) % 8 == 0 or not mask.numel()
    assert len(masks.arena) % 8 == 0


def test_a_mask_in_another_memory_order_is_the_same_mask() -> None:
    mask = torch.rand(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert Masks({"w": mask.to(memory_format=torch.channels_last)}) == Masks({"w": mask})
    assert torch.equal(Masks({"w": mask.transpose(0, 1)})["w"], mask.transpose(0, 1))


def test_masks_are_equal_in_names_shapes_and_bits_alone() -> None:
    given = mixed()
    masks = Masks(given)
    assert masks == Masks(given)
    assert masks != Masks({f"{name}'": mask for name, mask in given.items()})
    assert masks != Masks({name: mask.reshape(-1) for name, mask in given.items()})
    assert masks != Masks({**given, "p0": ~given["p0"]})
    assert masks != given


# ---- combining


def test_union_and_intersection() -> None:
    one, other = mixed(0), mixed(1)
    assert same(Masks(one) & Masks(other), {name: one[name] & other[name] for name in one})
    assert same(Masks(one) | Masks(other), {name: one[name] | other[name] for name in one})
    assert same(Masks(one), one)


@pytest.mark.parametrize("operation", [lambda a, b: a & b, lambda a, b: a | b], ids=["and", "or"])
@pytest.mark.parametrize(
    ("other", "named"),
    [({"b": (2, 3)}, "'a'"), ({"a": (3, 2)}, r"\[2, 3\] .* \[3, 2\]"), ({"a": (2, 3), "b": (1,)}, "'b'")],
)
def test_masks_of_two_models_do_not_combine(
    operation: Callable[[Masks, Masks], Masks], other: dict[str, tuple[int, ...]], named: str
) -> None:
    ours = Masks({"a": torch.ones(2, 3, dtype=torch.bool)})
    theirs = Masks({name: torch.ones(shape, dtype=torch.bool) for name, shape in other.items()})
    with pytest.raises(UserError, match=f"of two models: .*{named}"):
        operation(ours, theirs)


# ---- models


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_applying_zeroes_what_is_masked_and_nothing_else(layout: torch.memory_format) -> None:
    model, masks = network().to(memory_format=layout), of_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks.apply_(model)
    for name, tensor in model.state_dict().items():
        kept = masks[name] if name in masks else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor, before[name].masked_fill(~kept, 0))
    assert Masks.from_zeros(model, linear=True) == masks
    assert list(Masks.from_zeros(model)) == ["0.weight"]


@pytest.mark.parametrize(
    ("masks", "named"),
    [
        ({"0.weight": (3, 2, 3, 3), "9.weight": (2,)}, "'9.weight'"),
        ({"3.weight": (4, 12), "0.weight": (3, 2, 3, 1)}, r"\[3, 2, 3, 1\] .* \[3, 2, 3, 3\]"),
    ],
)
def test_masks_of_another_model_change_nothing(masks: dict[str, tuple[int, ...]], named: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=f"another model than this Sequential: .*{named}"):
        Masks({name: torch.zeros(shape, dtype=torch.bool) for name, shape in masks.items()}).apply_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_shared_parameter_may_go_by_either_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    Masks({"b.weight": torch.eye(3).bool()}).apply_(model)
    assert torch.equal(model["a"].weight != 0, torch.eye(3).bool())


def test_pytorchs_pruning_and_back() -> None:
    model, masks = network(), of_network()
    images = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    applied = copy.deepcopy(model)
    masks.apply_(applied)
    masks.to_torch_prune(model)
    assert torch_prune.is_pruned(model)
    assert torch.equal(model.eval()(images), applied.eval()(images))
    assert Masks.from_torch_prune(model) == masks
    with pytest.raises(UserError, match=r"'0' is computed from other parameters .*make it permanent"):
        masks.apply_(model)
    for layer in (model[0], model[3]):
        torch_prune.remove(layer, "weight")
    masks.apply_(model)
    with pytest.raises(UserError, match=r"is not pruned by torch\.nn\.utils\.prune"):
        Masks.from_torch_prune(model)


# ---- saving


def test_a_state_comes_back_through_torch_save() -> None:
    masks, file = Masks(mixed()), io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    assert Masks.from_state_dict(torch.load(file, weights_only=True)) == masks


def test_a_file_comes_back_and_holds_a_bit_a_weight(tmp_path: Path) -> None:
    file, masks = tmp_path / "masks.safetensors", Masks({"w": torch.rand(80_000) < 0.05})
    masks.save(file)
    assert Masks.load(file) == masks
    assert file.stat().st_size < 10_000 + 300


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"arena": torch.zeros(8, dtype=torch.uint8)},
        {"arena": torch.zeros(8, dtype=torch.uint8), "shapes": {}},
        {"arena": torch.zeros(8, dtype=torch.uint8), "shapes": {"a": (65,)}},
        {"arena": torch.zeros(8), "shapes": {"a": (64,)}},
        {"arena": [0] * 8, "shapes": {"a": (64,)}},
        {"arena": torch.zeros(8, dtype=torch.uint8), "shapes": {"a": (-1,)}},
        {"arena": torch.zeros(8, dtype=torch.uint8), "shapes": ["a"]},
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Masks.from_state_dict(state)


@pytest.mark.parametrize("what", ["missing", "another", "short", "odd"])
def test_a_file_without_masks_is_refused_by_name(tmp_path: Path, what: str) -> None:
    file = tmp_path / "x.safetensors"
    if what == "another":
        save_file({"w": torch.zeros(3)}, file)
    elif what == "odd":
        save_file({"arena": torch.zeros(3)}, file, {"dau_fast_masks": "3"})
    elif what == "short":
        Masks(mixed()).save(file)
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x\.safetensors'"):
        Masks.load(file)


# ---- the rest


def test_a_person_can_read_them() -> None:
    kept = torch.zeros(1000, dtype=torch.bool)
    kept[:50] = True
    lines = repr(Masks({"conv.weight": kept, "a": torch.ones(2, dtype=torch.bool)})).splitlines()
    assert lines[0] == "Masks of 2 tensors: 52 of 1,002 weights kept, 94.8 % masked"
    assert lines[1].split() == ["conv.weight", "95.0", "%", "of", "1,000"]
    assert lines[2].split() == ["a", "0.0", "%", "of", "2"]


def test_nothing_to_mask_and_masks_that_are_not_bool_are_refused() -> None:
    with pytest.raises(UserError, match="nothing to mask"):
        Masks({})
    with pytest.raises(UserError, match=r"'w' is float32: expected bool"):
        Masks({"w": torch.ones(3)})


def test_masks_move_to_a_device(device: torch.device) -> None:
    masks = Masks(mixed())
    moved = masks.to(device)
    assert moved.device.type == device.type
    assert moved == masks
    assert same((moved & masks).to("cpu"), dict(masks))
