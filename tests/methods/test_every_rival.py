"""What holds for every rival with a loss of its own: what it sees, what it leaves alone, seeds and space."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from by_hand import ONE_CLASS, QUARTER, exact, run
from ranks import together
from torch import Tensor, nn
from toys import engines

from dau_fast.config import UnlearningRecipe
from dau_fast.data.images import Choice, Images
from dau_fast.data.split import Forget
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.task import Task

# Those that see the forget set alone, and those that see the retain set too or alone.
FORGET_ALONE = ("boundary_shrink", "boundary_expand")
RETAIN_ALONE = ("l1_sparse", "noise")
BOTH = ("neggrad", "uniform", "rl", "salun", "scrub", "bad_teacher", "amun", "sfron")
RIVALS = (*FORGET_ALONE, *RETAIN_ALONE, *BOTH, "regun")
SHARDED = [name for name in RIVALS if name not in ("salun", "sfron")]
ONE_IMAGE = Forget("one image", indices=(7,))
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 36, "lr": 0.05}
every_rival = pytest.mark.parametrize("name", RIVALS)


def asked_of(name: str) -> dict[str, Any]:
    return SHORT | ({"milestones": ()} if name == "amun" else {})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every image that was asked for."""
    indices: set[int] = set()
    choose, batches = Images.choose, Images.batches

    def spy(self: Images, index: Tensor, *drawn: Any) -> Choice:
        indices.update(index.tolist())
        return choose(self, index, *drawn)

    def spy_on_passes(self: Images, given: Iterable[Tensor]) -> Any:
        kept = list(given)
        for index in kept:
            indices.update(index.tolist())
        return batches(self, kept)

    monkeypatch.setattr(Images, "choose", spy)
    monkeypatch.setattr(Images, "batches", spy_on_passes)
    return indices


@every_rival
def test_it_sees_the_sets_that_it_is_about_and_no_others(name: str, seen: set[int]) -> None:
    task = exact()
    seen.clear()  # of what the original was trained on
    split = task.split
    run(name, task, **asked_of(name) | ({"retain_share": 1.0} if name == "bad_teacher" else {}))
    sets = {
        **dict.fromkeys(FORGET_ALONE, (split.forget,)),
        **dict.fromkeys(RETAIN_ALONE, (split.retain,)),
        **dict.fromkeys(BOTH, (split.forget, split.retain)),
        "regun": (split.forget, split.retain, split.validation),
    }
    assert seen == {int(index) for index in torch.cat(sets[name])}


@every_rival
def test_the_original_and_the_global_random_state_stay_as_they_were(name: str) -> None:
    task = exact()
    before, state = {k: v.clone() for k, v in task.original.state_dict().items()}, torch.get_rng_state()
    model = run(name, task, **asked_of(name)).model
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in task.original.state_dict().items():
        assert torch.equal(value, before[key])
    for module in task.original.modules():
        assert not module.training
        assert not isinstance(module, nn.Module) or not module._forward_hooks
    assert all(weight.requires_grad for weight in (*task.original.parameters(), *model.parameters()))
    assert not set(model.parameters()) & set(task.original.parameters())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.head.out_features == 3


@every_rival
def test_weights_follow_the_seed_and_nothing_else(name: str) -> None:
    task = exact()
    torch.manual_seed(1)
    first = run(name, task, **asked_of(name)).model
    torch.manual_seed(2)
    again = run(name, task, **asked_of(name)).model
    other = run(name, replace(task, seed=1), **asked_of(name)).model
    for weight, twice in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, twice)
    assert not torch.equal(first.head.weight, other.head.weight)


@every_rival
def test_progress_is_told_of_every_step(name: str) -> None:
    announced: list[tuple[str, int]] = []
    advanced: list[int] = []

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append((description, steps))
        return lambda: advanced.append(1)

    run(name, replace(exact(), progress=progress), **asked_of(name))
    assert announced == [(name, len(advanced))]
    assert len(advanced) > 1


@every_rival
def test_a_single_image_and_a_whole_class_can_be_forgotten(name: str) -> None:
    for forget in (ONE_IMAGE, ONE_CLASS):
        model = run(name, exact(forget), **asked_of(name)).model
        assert all(value.isfinite().all() for value in model.state_dict().values())


# ---- settings


def test_recipes_are_checked() -> None:
    for field, value in {
        "epochs": 0, "batch_size": 2.5, "lr": 0, "momentum": 1.0, "weight_decay": -1, "milestones": [0.5],
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"`{field}="):
            UnlearningRecipe(**{field: value})


@pytest.mark.parametrize(("name", "field", "value"), [
    ("salun", "share", 0), ("salun", "share", 1.1), ("scrub", "temperature", 0), ("scrub", "alpha", -1),
    ("scrub", "max_epochs", 1.5), ("scrub", "forget_batch_size", 0), ("bad_teacher", "retain_share", 0),
    ("bad_teacher", "temperature", -1), ("boundary_shrink", "bound", -0.1), ("amun", "radius", 0),
    ("amun", "attack_steps", 0), ("sfron", "forget_every", 0), ("sfron", "max_norm", 0),
    ("sfron", "threshold", -1), ("sfron", "forget_lr", 0),
])  # fmt: skip
def test_what_is_out_of_range_is_refused_by_its_field(name: str, field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"`{field}={value}`: expected a"):
        get_method(name).resolve(exact(), {field: value})


@pytest.mark.parametrize("name", [name for name, row in find_methods().items() if row.space])
def test_the_space_to_tune_in_holds_the_published_values_and_none_that_is_refused(name: str) -> None:
    method, task = get_method(name), exact()
    usual = asdict(method.resolve(task))
    assert 1 <= len(method.space) <= 3
    for field, values in method.space.items():
        assert 3 <= len(values) == len(set(values)) <= 7
        assert usual[field] in values
        for value in values:
            method.resolve(task, {field: value})


def test_every_rival_has_a_space_with_learning_rate_and_length() -> None:
    for name in ("ft", "ga", *RIVALS):
        assert {"lr", "epochs"} <= get_method(name).space.keys()


# ---- engines and processes


def together_as_alone(task: Task, names: Iterable[str], shard: bool) -> None:
    ranks, shared = Ranks.from_group(), copy.deepcopy(task.original)
    shared.network = ranks.prepare(shared.network)
    for name in names:
        asked = asked_of(name) | {"epochs": 1}
        alone = run(name, task, **asked).model
        given = replace(task, original=copy.deepcopy(shared), runtime=Runtime(ranks=ranks, shard=shard))
        found = run(name, given, **asked).model
        for key, value in found.state_dict().items():
            torch.testing.assert_close(
                value, alone.state_dict()[key], rtol=1e-7, atol=1e-9, msg=f"{name} {key}"
            )
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(value, first), f"{name} {key}"


def work(rank: int, forget: Forget, shard: bool) -> None:
    together_as_alone(exact(forget), SHARDED if shard else RIVALS, shard)


needs_gloo = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")


@needs_gloo
def test_two_processes_do_what_one_does() -> None:
    together(2, work, QUARTER, False)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("forget", [QUARTER, ONE_CLASS, ONE_IMAGE], ids=["spread", "class", "image"])
def test_three_processes_do_so_whatever_is_forgotten(forget: Forget, shard: bool) -> None:
    together(3, work, forget, shard)


@pytest.mark.slow
@every_rival
def test_compiled_steps_do_what_eager_ones_do(name: str) -> None:
    task = exact()
    found = run(name, replace(task, runtime=Runtime(engine="compiled")), **asked_of(name))
    expected = run(name, task, **asked_of(name)).model
    # Adam makes something of gradients that are nothing but rounding.
    torch.testing.assert_close(
        dict(found.model.state_dict()), dict(expected.state_dict()), rtol=1e-6, atol=1e-8
    )
    assert set(engines(found.loops).values()) == {"compiled"}
