"""The roles of images, the sets of a run and their integrity."""

from __future__ import annotations

import base64
import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dau_fast.data.split import (
    TEST,
    TRAINING,
    VALIDATION,
    Forget,
    Split,
    decode_roles,
    encode_roles,
    hold_out,
    make_split,
)
from dau_fast.errors import UserError


def roles_of(*parts: tuple[int, int]) -> np.ndarray:
    """Roles from (role, count) one after the other."""
    return np.concatenate([np.full(count, role, dtype=np.int8) for role, count in parts])


def lists(split: Split) -> dict[str, list[int]]:
    names = ("train", "validation", "test", "forget", "retain")
    return {name: getattr(split, name).tolist() for name in names}


# ---- roles


def uneven_labels() -> Tensor:
    """10, 20 and 40 images of three classes, mixed."""
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 40)
    return labels[torch.randperm(70, generator=torch.Generator().manual_seed(0))]


def counts(roles: np.ndarray, labels: Tensor, role: int) -> list[int]:
    return np.bincount(labels.numpy()[roles == role], minlength=3).tolist()


def test_every_class_gives_its_share_to_validation_and_test() -> None:
    labels = uneven_labels()
    roles = hold_out(labels, None, 0, validation_share=0.2, test_share=0.3)
    assert counts(roles, labels, TEST) == [3, 6, 12]
    assert counts(roles, labels, VALIDATION) == [2, 4, 8]
    assert counts(roles, labels, TRAINING) == [5, 10, 20]


def test_an_official_test_part_is_the_test_part_and_validation_comes_from_the_rest() -> None:
    labels, test = uneven_labels(), torch.arange(50, 70)
    roles = hold_out(labels, test, 0, validation_share=0.1, test_share=0.3)
    assert np.flatnonzero(roles == TEST).tolist() == list(range(50, 70))
    training = np.bincount(labels[:50].numpy(), minlength=3)
    assert counts(roles, labels, VALIDATION) == [max(1, round(0.1 * n)) for n in training]


def test_every_class_has_a_validation_image_however_small_the_share() -> None:
    labels = uneven_labels()
    roles = hold_out(labels, None, 0, validation_share=0.001, test_share=0.0)
    assert counts(roles, labels, VALIDATION) == [1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_images_to_keep_are_never_held_out(seed: int) -> None:
    labels = uneven_labels()
    keep = list(range(0, 70, 5))
    roles = hold_out(labels, None, seed, validation_share=0.2, test_share=0.3, keep=keep)
    assert (roles[keep] == TRAINING).all()
    assert counts(roles, labels, TEST) == [3, 6, 12]
    assert counts(roles, labels, VALIDATION) == [2, 4, 8]


def test_an_image_of_the_official_test_part_cannot_be_kept_and_one_that_is_not_there_is_ignored() -> None:
    labels = uneven_labels()
    roles = hold_out(labels, torch.tensor([5]), 0, validation_share=0.1, test_share=0.3, keep=[5, 70, 999])
    assert roles[5] == TEST


def test_roles_depend_on_the_seed_and_on_nothing_else() -> None:
    labels = uneven_labels()

    def roles(seed: int) -> np.ndarray:
        return hold_out(labels, None, seed, validation_share=0.2, test_share=0.3)

    first = roles(3)
    np.random.seed(9)
    torch.manual_seed(9)
    np.testing.assert_array_equal(roles(3), first)
    assert (roles(4) != first).any()
    assert first.dtype == np.int8


# ---- the sets


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Tensor, Forget, int]:
    count = draw(st.integers(20, 80))
    labels = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    test = torch.arange(count - 8, count) if draw(st.booleans()) else None
    seed = draw(st.integers(0, 2**32))
    roles = hold_out(labels, test, seed, validation_share=0.2, test_share=0.3)
    training = np.flatnonzero(roles == TRAINING).tolist()
    requests = [
        st.floats(0.01, 0.99).map(lambda f: Forget("r", fraction=f)),
        st.integers(0, 3).map(lambda c: Forget("c", label=c)),
        st.lists(st.sampled_from(training), min_size=1, unique=True).map(
            lambda i: Forget("i", indices=tuple(i))
        ),
    ]
    return roles, labels, draw(st.one_of(requests)), seed


@settings(deadline=None, max_examples=150)
@given(problems())
def test_forget_and_retain_partition_the_training_images(
    problem: tuple[np.ndarray, Tensor, Forget, int],
) -> None:
    roles, labels, forget, seed = problem
    try:
        split = make_split(roles, labels, forget, seed)
    except UserError:
        assume(False)
        return
    sets = lists(split)
    for name, index in sets.items():
        assert index == sorted(set(index)), name
        assert getattr(split, name).dtype == torch.int64
    assert sorted(sets["forget"] + sets["retain"]) == sets["train"]
    assert not set(sets["forget"]) & set(sets["retain"])
    assert sets["train"] == np.flatnonzero(roles == TRAINING).tolist()
    assert not set(sets["train"]) & set(sets["validation"] + sets["test"])
    assert not set(sets["validation"]) & set(sets["test"])
    assert set(sets["validation"]) <= set(np.flatnonzero(roles == VALIDATION).tolist())
    assert set(sets["test"]) <= set(np.flatnonzero(roles == TEST).tolist())
    assert all(sets.values())
    if forget.indices is not None:
        assert sets["forget"] == sorted(forget.indices)
    if forget.label is not None:
        assert (labels[split.forget] == forget.label).all()
        assert (labels[split.retain] != forget.label).all()
    if forget.fraction is not None:
        assert len(sets["forget"]) == round(forget.fraction * len(sets["train"]))
    forgotten = set(labels[split.forget].tolist())
    assert split.classwise == (not forgotten & set(labels[split.retain].tolist()))
    if split.classwise:
        assert not forgotten & set(labels[split.validation].tolist() + labels[split.test].tolist())
    else:
        assert len(sets["validation"]) == (roles == VALIDATION).sum()
        assert len(sets["test"]) == (roles == TEST).sum()


def a_problem() -> tuple[np.ndarray, Tensor]:
    """20 training, 6 validation and 6 test images of classes 0 and 1, in turn."""
    return roles_of((TRAINING, 20), (VALIDATION, 6), (TEST, 6)), torch.arange(32) % 2


def test_a_random_forget_set_depends_on_the_seed_and_on_nothing_else() -> None:
    roles, labels = a_problem()

    def drawn(seed: int) -> list[int]:
        return make_split(roles, labels, Forget("r", fraction=0.5), seed).forget.tolist()

    first = drawn(1)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn(1) == first
    assert drawn(2) != first
    assert len(first) == 10


def test_forgetting_a_class_takes_it_out_of_validation_and_test() -> None:
    roles, labels = a_problem()
    split = make_split(roles, labels, Forget("class:1", label=1), 0)
    assert split.classwise
    assert split.forget.tolist() == list(range(1, 20, 2))
    assert split.retain.tolist() == list(range(0, 20, 2))
    assert split.validation.tolist() == [20, 22, 24]
    assert split.test.tolist() == [26, 28, 30]


def test_naming_every_image_of_a_class_is_forgetting_the_class() -> None:
    roles, labels = a_problem()
    by_name = make_split(roles, labels, Forget("class:1", label=1), 0)
    by_index = make_split(roles, labels, Forget("i", indices=tuple(range(19, 0, -2))), 0)
    assert by_index.classwise
    assert lists(by_index) == lists(by_name)


def test_naming_all_but_one_image_of_a_class_is_not_forgetting_the_class() -> None:
    roles, labels = a_problem()
    split = make_split(roles, labels, Forget("i", indices=tuple(range(3, 20, 2))), 0)
    assert not split.classwise
    assert len(split.validation) == len(split.test) == 6


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (20, "forget index 20 is a validation image"),
        (31, "forget index 31 is a test image"),
        (32, "forget index 32 is out of range: the data set has 32 images"),
        (10**12, "out of range"),
    ],
)
def test_an_index_the_original_was_never_trained_on_is_refused(index: int, complaint: str) -> None:
    roles, labels = a_problem()
    with pytest.raises(UserError, match=complaint):
        make_split(roles, labels, Forget("i", indices=(3, index)), 0)


@pytest.mark.parametrize(
    ("forget", "missing"),
    [
        (Forget("i", indices=tuple(range(20))), "retain"),
        (Forget("random:0.99", fraction=0.99), "retain"),
        (Forget("random:0.01", fraction=0.01), "forget"),
        (Forget("class:5", label=5), "forget"),
    ],
)
def test_a_request_that_leaves_a_set_empty_is_refused(forget: Forget, missing: str) -> None:
    roles, labels = a_problem()
    with pytest.raises(UserError, match=f"leaves no {missing} images out of 20") as raised:
        make_split(roles, labels, forget, 0)
    assert forget.spec in str(raised.value)


@pytest.mark.parametrize(("role", "name"), [(VALIDATION, "validation"), (TEST, "test")])
def test_a_class_without_which_validation_or_test_is_empty_cannot_be_forgotten(role: int, name: str) -> None:
    roles, labels = a_problem()
    labels[torch.from_numpy(roles == role)] = 1
    with pytest.raises(UserError, match=f"leaves no {name} images"):
        make_split(roles, labels, Forget("class:1", label=1), 0)


def test_only_the_test_set_may_be_missing() -> None:
    labels = torch.arange(20) % 2
    split = make_split(roles_of((TRAINING, 15), (VALIDATION, 5)), labels, Forget("r", fraction=0.2), 0)
    assert split.test.tolist() == []
    with pytest.raises(UserError, match="leaves no validation images"):
        make_split(roles_of((TRAINING, 15), (TEST, 5)), labels, Forget("r", fraction=0.2), 0)


def test_moving_a_split_moves_every_set() -> None:
    roles, labels = a_problem()
    split = make_split(roles, labels, Forget("class:1", label=1), 0)
    moved = split.to(torch.device("meta"))
    for name in lists(split):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(split, name).shape
    assert moved.classwise


def test_forget_sha256_is_that_of_the_indices_as_little_endian_int64() -> None:
    roles, labels = a_problem()
    split = make_split(roles, labels, Forget("i", indices=(7, 2, 19)), 0)
    expected = hashlib.sha256(struct.pack("<3q", 2, 7, 19)).hexdigest()
    assert split.forget_sha256 == expected


# ---- roles as text


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([TRAINING, VALIDATION, TEST]), max_size=300))
def test_roles_come_back_from_text_as_they_were(roles: list[int]) -> None:
    text = encode_roles(np.array(roles, dtype=np.int8))
    assert text.isascii()
    decoded = decode_roles(text, len(roles))
    assert decoded.tolist() == roles
    assert decoded.dtype == np.int8


def test_the_roles_of_another_data_set_are_refused_with_both_sizes() -> None:
    text = encode_roles(roles_of((TRAINING, 10)))
    with pytest.raises(UserError, match=r"10 images, this one has 11"):
        decode_roles(text, 11)


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "ä",
        "not base64!",
        base64.b64encode(b"not zlib").decode(),
        base64.b64encode(zlib.compress(bytes(10))[:-3]).decode(),
        packed(bytes([0, 1, 2, 7, 0, 0, 0, 0, 0, 0])),
    ],
    ids=["nothing", "padding", "not ASCII", "not base64", "not zlib", "cut short", "no such role"],
)
def test_damaged_roles_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="damaged"):
        decode_roles(text, 10)


def test_roles_that_unpack_to_far_more_than_expected_take_no_memory() -> None:
    text = packed(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="a data set of more images, this one has 10"):
        decode_roles(text, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
