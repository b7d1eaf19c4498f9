"""Unlearning from Python with a caller's own network and sets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from dau_fast.api import Result, unlearn
from dau_fast.config import DauConfig
from dau_fast.errors import Diverged, UserError
from dau_fast.prune import Masks, omp

Pair = tuple[Tensor, Tensor]
CONFIG = DauConfig(label_conditioned=False, alpha=0.5, turns=64, batch_size=32, departure=1.0, lr=0.01)


def blobs(count: int, labels: tuple[int, ...], seed: int) -> Pair:
    """Overlapping normal distributions in six dimensions, one a label."""
    y = torch.tensor(labels)[torch.arange(count) % len(labels)]
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return 3 * torch.eye(3, 6)[y] + noise, y


def some_sets() -> dict[str, Pair]:
    """Class 2 is to be forgotten; validation and test set hold all three classes."""
    return {
        "forget": blobs(80, (2,), 1),
        "retain": blobs(160, (0, 1), 2),
        "validation": blobs(90, (0, 1, 2), 3),
        "test": blobs(90, (0, 1, 2), 4),
    }


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


@pytest.fixture(scope="module")
def fitted() -> nn.Module:
    """A network trained on forget and retain set."""
    torch.manual_seed(0)
    network = perceptron()
    sets = some_sets()
    images, labels = (torch.cat(column) for column in zip(sets["forget"], sets["retain"], strict=True))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture
def network(fitted: nn.Module) -> nn.Module:
    return copy.deepcopy(fitted)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def percent_right(model: nn.Module, data: Pair, without: int | None = None) -> float:
    images, labels = data
    with torch.no_grad():
        right = (copy.deepcopy(model).eval()(images).argmax(1) == labels)[labels != without]
    return 100 * right.double().mean().item()


class Images(Dataset[tuple[Tensor, int]]):
    """A map-style data set with plain integers for labels."""

    def __init__(self, data: Pair) -> None:
        self.images, self.labels = data

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])


# ---- what comes back


def test_a_class_given_as_tensors_is_forgotten_and_measured(network: nn.Module) -> None:
    sets = some_sets()
    result = unlearn(network, **sets, config=CONFIG)
    assert percent_right(result.model, sets["forget"]) <= 2
    assert percent_right(result.model, sets["retain"]) >= 95
    assert result.before is not None
    assert result.after is not None
    assert result.before.ua == pytest.approx(100 - percent_right(network, sets["forget"]))
    assert result.after.ua == pytest.approx(100 - percent_right(result.model, sets["forget"]))
    assert result.after.ra == pytest.approx(percent_right(result.model, sets["retain"]))
    assert result.before.ta == pytest.approx(percent_right(network, sets["test"], without=2))
    assert result.after.ta == pytest.approx(percent_right(result.model, sets["test"], without=2))
    assert result.seconds > 0
    assert result.compile_seconds > 0
    assert result.history is not None
    assert result.history["forget_accuracy"][0] == pytest.approx(percent_right(network, sets["forget"]))


@pytest.mark.parametrize("wrap", [Images, lambda pair: TensorDataset(*pair)], ids=["own", "TensorDataset"])
def test_data_sets_give_what_tensors_give(wrap: Callable[[Pair], Any], network: nn.Module) -> None:
    sets = some_sets()
    tensors = unlearn(network, **sets, config=CONFIG)
    wrapped = unlearn(network, **{name: wrap(pair) for name, pair in sets.items()}, config=CONFIG)
    mixed = unlearn(network, **(sets | {"forget": wrap(sets["forget"])}), config=CONFIG)
    for other in (wrapped, mixed):
        assert same(weights(other.model), weights(tensors.model))
        assert other.after == tensors.after


def test_without_a_test_set_nothing_is_measured_and_the_model_is_the_same(network: nn.Module) -> None:
    sets = some_sets()
    measured = unlearn(network, **sets, config=CONFIG)
    del sets["test"]
    result = unlearn(network, **sets, config=CONFIG)
    assert result.before is None
    assert result.after is None
    assert result.history is not None
    assert same(weights(result.model), weights(measured.model))


@pytest.mark.parametrize("method", ["ft", "ga"])
def test_other_methods_have_no_history(method: str, network: nn.Module) -> None:
    before = weights(network)
    result = unlearn(network, **some_sets(), method=method)
    assert result.history is None
    assert not same(weights(result.model), before)
    assert same(weights(network), before)
    assert result.after is not None


def test_without_a_configuration_the_usual_one_is_taken(network: nn.Module) -> None:
    result = unlearn(network, **some_sets())
    assert result.before is not None
    assert result.after is not None
    assert result.after.ua > result.before.ua
    assert result.after.ra > 90


def test_a_handful_of_images_is_enough(network: nn.Module) -> None:
    sets = {name: (images[:9], labels[:9]) for name, (images, labels) in some_sets().items()}
    result = unlearn(network, **sets)
    assert all(tensor.isfinite().all() for tensor in weights(result.model).values())


def test_the_configuration_is_the_one_that_is_played(network: nn.Module) -> None:
    result = unlearn(network, **some_sets(), config=replace(CONFIG, turns=90, looks=3, lr=0.005))
    assert result.history is not None
    assert result.history["step"] == [0, 30, 60, 90]
    assert result.history["lr"] == 0.005


def test_the_same_seed_gives_the_same_result_and_another_seed_another(network: nn.Module) -> None:
    def played(seed: int) -> Result:
        torch.manual_seed(seed + 17)
        return unlearn(network, **some_sets(), config=CONFIG, seed=seed)

    first, again, other = played(3), played(3), played(4)
    assert same(weights(first.model), weights(again.model))
    assert (first.after, first.history) == (again.after, again.history)
    assert not same(weights(first.model), weights(other.model))


def test_progress_is_told(network: nn.Module) -> None:
    announced: list[str] = []

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append(description)
        return lambda: None

    unlearn(network, **some_sets(), config=CONFIG, progress=progress)
    assert announced == ["dau"]


def test_pictures_go_through_a_convolutional_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    sets = {
        name: (torch.randn(16, 3, 8, 8), torch.arange(16) % 2)
        for name in ("forget", "retain", "validation", "test")
    }
    result = unlearn(network, **sets)
    assert result.after is not None
    assert result.model(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


class TwoHeads(nn.Module):
    """Its last Linear layer is not the one that answers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_the_classifier_layer_can_be_named() -> None:
    network = TwoHeads()
    result = unlearn(network, **some_sets(), classifier="head")
    assert isinstance(result.model, TwoHeads)
    assert not torch.equal(result.model.head.weight, network.head.weight)
    assert torch.equal(result.model.unused.weight, network.unused.weight)


# ---- what stays as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["dau", "ft", "ga"])
def test_the_callers_model_and_sets_stay_as_they_were(
    method: str, training: bool, network: nn.Module
) -> None:
    network.train(training)
    sets = some_sets()
    F.cross_entropy(network(sets["retain"][0]), sets["retain"][1]).backward()
    before = weights(network)
    gradients = [p.grad.clone() for p in network.parameters()]
    result = unlearn(network, **sets, method=method)
    assert same(weights(network), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))
    assert all(module.training == training for module in network.modules())
    assert all(module.training == training for module in result.model.modules())
    assert result.model is not network
    assert type(result.model) is type(network)
    assert not set(result.model.parameters()) & set(network.parameters())
    assert {p.device for p in network.parameters()} == {p.device for p in result.model.parameters()}
    for name, (images, labels) in some_sets().items():
        assert torch.equal(sets[name][0], images)
        assert torch.equal(sets[name][1], labels)


def test_a_layer_that_the_caller_keeps_in_evaluation_mode_comes_back_in_it(network: nn.Module) -> None:
    network.train()
    network[1].eval()
    result = unlearn(network, **some_sets(), config=CONFIG)
    assert [module.training for module in result.model] == [True, False, True, True]
    assert [module.training for module in network] == [True, False, True, True]


@pytest.mark.parametrize("method", ["dau", "ft", "ga"])
def test_frozen_parameters_are_respected(method: str, network: nn.Module) -> None:
    network[0].requires_grad_(False)
    result = unlearn(network, **some_sets(), method=method)
    assert torch.equal(result.model[0].weight, network[0].weight)
    assert torch.equal(result.model[0].bias, network[0].bias)
    assert not torch.equal(result.model[3].weight, network[3].weight)
    assert [p.requires_grad for p in result.model.parameters()] == [False, False, True, True, True, True]


def test_the_global_random_state_stays_as_it_was(network: nn.Module) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    unlearn(network, **some_sets(), config=CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


# ---- mistakes


def edited(name: str, images: Any = None, labels: Any = None) -> dict[str, Any]:
    """The sets with one of them changed by functions of its images and of its labels."""
    sets: dict[str, Any] = some_sets()
    x, y = sets[name]
    sets[name] = (images(x) if images else x, labels(y) if labels else y)
    return sets


@pytest.mark.parametrize("name", ["forget", "retain", "validation", "test"])
def test_a_set_must_hold_as_many_labels_as_images_and_at_least_one(name: str, network: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"the {name} set has \d+ images and 7 labels"):
        unlearn(network, **edited(name, labels=lambda y: y[:7]))
    with pytest.raises(UserError, match=f"the {name} set has 0 images and 0 labels"):
        unlearn(network, **edited(name, lambda x: x[:0], lambda y: y[:0]))
    empty = some_sets() | {name: Images((torch.zeros(0, 6), torch.zeros(0)))}
    with pytest.raises(UserError, match=f"the {name} set is empty"):
        unlearn(network, **empty)


def test_images_must_be_as_the_model_takes_them_and_labels_whole_numbers(network: nn.Module) -> None:
    with pytest.raises(UserError, match=r"the forget set has torch\.uint8 images"):
        unlearn(network, **edited("forget", lambda x: x.to(torch.uint8)))
    with pytest.raises(UserError, match=r"the test set's labels are torch\.float32 of shape \[90\]"):
        unlearn(network, **edited("test", labels=lambda y: y.float()))


def test_labels_must_be_one_number_an_image(network: nn.Module) -> None:
    with pytest.raises(UserError, match="forget"):
        unlearn(network, **edited("forget", labels=lambda y: y[:, None]))


def test_all_images_must_have_one_shape(network: nn.Module) -> None:
    with pytest.raises(UserError, match="the sets hold images of different shapes"):
        unlearn(network, **edited("retain", lambda x: x[:, :5]))


def test_all_images_of_a_data_set_must_have_one_shape(network: nn.Module) -> None:
    class Ragged(Images):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(i)
            return image[: 6 - i % 2], label

    with pytest.raises(UserError, match="forget"):
        unlearn(network, **(some_sets() | {"forget": Ragged(some_sets()["forget"])}))


def test_images_must_fit_the_model(network: nn.Module) -> None:
    narrow = {name: (images[:, :5], labels) for name, (images, labels) in some_sets().items()}
    with pytest.raises(UserError, match=r"the model cannot take images of shape \(5,\)"):
        unlearn(network, **narrow)
    double = {name: (images.double(), labels) for name, (images, labels) in some_sets().items()}
    with pytest.raises(UserError, match="the model cannot take images"):
        unlearn(network, **double)


def test_labels_must_fit_the_model(network: nn.Module) -> None:
    with pytest.raises(UserError, match="with C of at least 4"):
        unlearn(network, **edited("forget", labels=lambda y: y + 1))
    with pytest.raises(UserError, match="a label is negative"):
        unlearn(network, **edited("retain", labels=lambda y: y - 1))


def test_a_model_must_give_one_row_of_features_and_logits_an_image() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.view(-1, 3, 2)).mean(1)

    with pytest.raises(UserError, match=r"gives features \[2, 3, 2\]"):
        unlearn(Tokens(), **some_sets())


def test_a_classifier_layer_must_be_there_and_in_use(network: nn.Module) -> None:
    with pytest.raises(UserError, match="no Linear layer 'head'"):
        unlearn(network, **some_sets(), classifier="head")
    with pytest.raises(UserError, match="no Linear layer to read features from"):
        unlearn(nn.Sequential(nn.BatchNorm1d(6)), **some_sets())
    with pytest.raises(UserError, match="layer 'unused' takes no part in the forward pass"):
        unlearn(TwoHeads(), **some_sets(), classifier="unused")


def test_something_must_be_free_to_change(network: nn.Module) -> None:
    with pytest.raises(UserError, match="no parameter of the model requires grad"):
        unlearn(network.requires_grad_(False), **some_sets())


@pytest.mark.parametrize("method", ["retrain", "retrain_clean"])
def test_retraining_a_callers_model_is_refused(method: str, network: nn.Module) -> None:
    with pytest.raises(UserError, match=f"'{method}' needs the recipe"):
        unlearn(network, **some_sets(), method=method)


@pytest.mark.parametrize("method", ["dau", "ft", "ga"])
def test_weights_that_are_masked_stay_zero(method: str, network: nn.Module) -> None:
    masks = omp(network, 0.5, linear=True)
    masks.apply_(network)
    before = weights(network)
    result = unlearn(network, **some_sets(), masks=masks, method=method)
    after = weights(result.model)
    masks.apply_(result.model)
    assert same(weights(result.model), after)
    assert not same(after, before)
    assert same(weights(network), before)


def test_masks_of_another_model_are_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match="masks are of another model than this Sequential"):
        unlearn(network, **some_sets(), masks=Masks({"stem.weight": torch.ones(2, dtype=torch.bool)}))


def test_an_unknown_method_or_device_is_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match="unknown method 'wish'"):
        unlearn(network, **some_sets(), method="wish")
    with pytest.raises(UserError, match="`device=tpu`"):
        unlearn(network, **some_sets(), device="tpu")


def test_cuda_where_there_is_none_is_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device"):
        unlearn(network, **some_sets(), device="cuda")


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_set_that_holds_the_forgotten_class_alone_cannot_do_its_work(name: str, network: nn.Module) -> None:
    with pytest.raises(UserError, match=f"leaves no {name} images"):
        unlearn(network, **(some_sets() | {name: blobs(20, (2,), 5)}))


def test_a_model_that_gives_nothing_finite_is_refused(network: nn.Module) -> None:
    with torch.no_grad():
        network[3].weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"'3.weight' of the model holds NaN or infinity \(1 of its tensors"):
        unlearn(network, **some_sets())


def test_images_without_a_pixel_are_refused(network: nn.Module) -> None:
    sets = {name: (images[:, :0], labels) for name, (images, labels) in some_sets().items()}
    with pytest.raises(
        UserError, match=r"images of the forget set have shape \[0\]: expected no side of length 0"
    ):
        unlearn(network, **sets)


class Overflowing(nn.Module):
    """A layer that gives infinity for one image, and for that alone."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, images: Tensor) -> Tensor:
        hit = (images == self.image).all(1, keepdim=True)
        return torch.where(hit, float("inf"), images)


@pytest.mark.parametrize(("name", "place"), [("forget", 3), ("retain", 60)])
@pytest.mark.parametrize("method", ["dau", "ft"])
def test_the_image_and_the_layer_that_give_nothing_finite_are_named(
    name: str, place: int, method: str, network: nn.Module
) -> None:
    sets = some_sets()
    model = nn.Sequential(Overflowing(sets[name][0][place]), network)
    if method == "ft" and name == "forget":
        return  # which fine-tuning does not look at
    told = rf"the original itself gives .* image {place} of the {name} set \(1 such\), first in layer '0'"
    with pytest.raises(UserError, match=told):
        unlearn(model, **sets, method=method)


def test_the_test_image_that_gives_nothing_finite_is_named(network: nn.Module) -> None:
    sets = some_sets()
    model = nn.Sequential(Overflowing(sets["test"][0][7]), network)
    with pytest.raises(UserError, match=r"gives NaN or infinity for image \d of the test set"):
        unlearn(model, **sets, method="ft")


@pytest.mark.parametrize("method", ["ft", "ga", "neggrad"])
def test_a_training_that_breaks_is_told_and_leaves_the_model_alone(method: str, network: nn.Module) -> None:
    before = weights(network)
    told = (
        rf"^{method} diverged, the loss of {method}.* is NaN or infinite in step \d+ of \d+[, ][^:]*: leave"
    )
    with pytest.raises(Diverged, match=told):
        unlearn(network, **some_sets(), method=method, config={"lr": 1000, "epochs": 60})
    assert same(weights(network), before)
    assert not network.training


def test_every_mistake_is_a_value_error(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        unlearn(network, **some_sets(), method="")
