"""A caller's own networks, of many kinds: each goes in as it is and comes out changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own import (
    CLASSES,
    NETWORKS,
    ROWS,
    SHORT,
    TOKENS,
    Net,
    Pairs,
    Reader,
    draw,
    make_sets,
    seeded,
)
from torch import Tensor, nn

from dau_fast.api import unlearn
from dau_fast.errors import UserError


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_goes_in_as_it_is_and_comes_out_changed(name: str) -> None:
    make, shape = NETWORKS[name]
    network = seeded(make)
    before = copy.deepcopy(network.state_dict())
    result = unlearn(network, **make_sets(shape), config=SHORT, device="cpu")
    assert type(result.model) is type(network)
    after = result.model.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in before)
    assert result.after is not None
    told = type(network.eval()(make_sets(shape)["test"][0][:2]))
    assert isinstance(result.model.eval()(make_sets(shape)["test"][0][:2]), told)


@pytest.mark.parametrize("method", ["ft", "ga", "rl", "scrub", "salun", "boundary_expand", "head_only"])
@pytest.mark.parametrize("name", ["text transformer", "object"])
def test_other_methods_take_them_too(name: str, method: str) -> None:
    make, shape = NETWORKS[name]
    fields = {"epochs": 1} if method != "ft" else {"epochs": 1, "batch_size": 16}
    result = unlearn(seeded(make), **make_sets(shape), method=method, config=fields, device="cpu")
    assert result.after is not None


@pytest.mark.parametrize("method", ["amun", "boundary_shrink", "mu_mis"])
def test_methods_that_move_images_a_little_refuse_tokens(method: str) -> None:
    with pytest.raises(UserError, match=f"method '{method}'"):
        unlearn(seeded(lambda: Reader("mean")), **make_sets(TOKENS), method=method, device="cpu")


# ---- which layer answers


class Heads(nn.Module):
    """Two heads that answer side by side, and a Linear layer after them that does not."""

    def __init__(self, told: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.shape, self.colour, self.late = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES), nn.Linear(8, 5)
        self.told = told

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).relu()
        return self.told(self.shape(features), self.colour(features) + 0 * self.late(features).sum())


@pytest.mark.parametrize(
    "told", [lambda a, b: (a, b), lambda a, b: {"shape": a, "colour": b}], ids=["tuple", "dict"]
)
@pytest.mark.parametrize("named", ["shape", "colour"])
def test_one_of_several_heads_can_be_named(named: str, told: Any) -> None:
    network = seeded(lambda: Heads(told))
    with pytest.raises(
        UserError, match=r"answers by several layers \(shape, colour\): name one of them as `classifier`"
    ):
        unlearn(network, **make_sets(ROWS), device="cpu")
    result = unlearn(network, **make_sets(ROWS), classifier=named, config=SHORT, device="cpu")
    other = {"shape": "colour", "colour": "shape"}[named]
    old, new = network.state_dict(), result.model.state_dict()
    assert not torch.equal(old[f"{named}.weight"], new[f"{named}.weight"])
    assert torch.equal(old[f"{other}.weight"], new[f"{other}.weight"])


def test_the_layer_that_answers_is_found_wherever_it_stands() -> None:
    network = seeded(lambda: Heads(lambda a, b: a))
    result = unlearn(network, **make_sets(ROWS), config=SHORT, device="cpu")
    assert not torch.equal(result.model.get_submodule("shape").weight, network.get_submodule("shape").weight)


def test_a_wrong_layer_is_refused() -> None:
    """Its features would be somebody else's."""
    network = seeded(lambda: Heads(lambda a, b: a))
    for wrong in ("late", "colour", "body"):
        with pytest.raises(UserError, match=f"does not answer by its layer '{wrong}'"):
            unlearn(network, **make_sets(ROWS), classifier=wrong, device="cpu")
    scaled = Net(nn.Linear(6, 8), 8, lambda y: 3 * y)
    with pytest.raises(UserError, match="no Linear layer gives what the model returns"):
        unlearn(scaled, **make_sets(ROWS), device="cpu")


@pytest.mark.parametrize("last", [lambda y: y.softmax(1), lambda y: y.log_softmax(1)], ids=["softmax", "log"])
def test_a_softmax_at_the_end_is_warned_of_and_looked_behind(
    last: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ending, plain = (seeded(lambda told=told: Net(nn.Linear(6, 8), 8, told)) for told in (last, lambda y: y))
    one, other = (unlearn(model, **make_sets(ROWS), config=SHORT, device="cpu") for model in (ending, plain))
    assert "ends in a softmax" in caplog.text
    for key, tensor in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[key], tensor)
    assert torch.allclose(one.model(draw((2, 6))), last(other.model(draw((2, 6)))))


def test_random_augmentation_in_a_data_set_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Noisy(Pairs):
        def __getitem__(self, i: int) -> Any:
            return self.x[i] + torch.randn(6), self.y[i]

    def told() -> list[str]:  # so short a game may also say that it ruined the model
        return [text for r in caplog.records if "every time it is read" in (text := r.getMessage())]

    sets = make_sets(ROWS)
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    unlearn(network, **sets, config=SHORT, device="cpu")
    unlearn(network, **{name: Pairs(*pair) for name, pair in sets.items()}, config=SHORT, device="cpu")
    assert not told()
    for stream in (False, True):
        caplog.clear()
        noisy = sets | {"retain": Noisy(*sets["retain"])}
        unlearn(network, **noisy, config=SHORT, device="cpu", stream=stream)
        (text,) = told()
        assert "of the retain set is another one" in text
