"""A caller's own networks and data, of many kinds: each goes in as it is and comes out changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import dau_fast
from dau_fast.api import Result, unlearn
from dau_fast.errors import UserError

SETS = {"forget": 10, "retain": 40, "validation": 20, "test": 20}
CLASSES = 3
SHORT = {"turns": 4, "batch_size": 8, "warmup_steps": 2}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


# ---- networks


class HeadOutputs(NamedTuple):
    """As torchvision's networks with a second head answer in training."""

    logits: Tensor
    aux: Tensor


@dataclass
class Answer:
    """As Hugging Face's outputs are."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Net(nn.Module):
    """A body, a Linear head, and whatever is made of its logits."""

    def __init__(self, body: nn.Module, features: int, told: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.body, self.head, self.told = body, nn.Linear(features, CLASSES), told

    def forward(self, x: Tensor) -> Any:
        return self.told(self.head(self.body(x)))


class Two(Net):
    """Takes a second input, and forgets it."""

    def forward(self, x: Tensor, told: Tensor | None = None) -> Any:
        return super().forward(x)


class Reader(nn.Module):
    """Tokens through an embedding, and something that reads along."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.kind = kind
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embedding(input_ids)
        if self.kind == "lstm":
            x = self.lstm(x)[0]
        if self.kind == "transformer":
            x = self.encoder(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        if attention_mask is None:
            return self.classifier(x.mean(1))
        weights = attention_mask[..., None].to(x)
        return Answer(self.classifier((x * weights).sum(1) / weights.sum(1).clamp_min(1)))


class Vision(nn.Module):
    """Takes pixels by name and answers with an object."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
        assert labels is None
        x = self.encoder(self.patches(pixel_values).flatten(2).transpose(1, 2))
        return Answer(self.classifier(x.mean(1)), (x,))


def mlp(norm: bool) -> nn.Module:
    middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.ReLU(), nn.Linear(16, CLASSES))


def cnn(norm: nn.Module) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(body, 8)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=CLASSES)


def torchvision_net(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=CLASSES)


ROWS, IMAGES, TOKENS = (6,), (3, 8, 8), (7,)
# Of each network what it is given.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp with BatchNorm": (lambda: mlp(True), ROWS),
    "mlp": (lambda: mlp(False), ROWS),
    "logistic regression": (lambda: nn.Linear(6, CLASSES), ROWS),
    "cnn with BatchNorm": (lambda: cnn(nn.BatchNorm2d(8)), IMAGES),
    "cnn with GroupNorm": (lambda: cnn(nn.GroupNorm(2, 8)), IMAGES),
    "cnn": (lambda: cnn(nn.Identity()), IMAGES),
    "torchvision ViT": (torchvision_vit, IMAGES),
    "torchvision ShuffleNet": (lambda: torchvision_net("shufflenet_v2_x0_5"), (3, 32, 32)),
    "tuple": (lambda: Net(nn.Linear(6, 8), 8, lambda y: (y, y.detach().sum())), ROWS),
    "dict": (lambda: Net(nn.Linear(6, 8), 8, lambda y: {"loss": None, "logits": y}), ROWS),
    "named tuple": (lambda: Net(nn.Linear(6, 8), 8, lambda y: HeadOutputs(y, y[:, :1])), ROWS),
    "object": (lambda: Net(nn.Linear(6, 8), 8, Answer), ROWS),
    "embedding": (lambda: Reader("mean"), TOKENS),
    "lstm": (lambda: Reader("lstm"), TOKENS),
    "text transformer": (lambda: Reader("transformer"), TOKENS),
    "named pixels": (Vision, IMAGES),
}


def inputs(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    if shape == TOKENS:
        return torch.randint(50, (count, *shape), generator=torch.Generator().manual_seed(seed))
    return draw((count, *shape), seed)


def make_sets(shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        name: (inputs(count, shape, seed), labels(count)) for seed, (name, count) in enumerate(SETS.items())
    }


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


# ---- forms of one set


class Pairs(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


class Dicts(Pairs):
    """Items as Hugging Face's data sets have them, with what no network takes."""

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i].tolist(), "label": int(self.y[i]), "file": f"{i}.png"}


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate("xy")}


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "arrays of float64": lambda x, y: (x.double().numpy(), y.numpy().astype(np.int32)),
    "lists of labels": lambda x, y: (x, y.tolist()),
    "small labels": lambda x, y: (x, y.to(torch.uint8)),
    "TensorDataset": TensorDataset,
    "own data set": Pairs,
    "subset": lambda x, y: Subset(Pairs(torch.cat([x, x]), torch.cat([y, y])), range(len(y))),
    "list of pairs": lambda x, y: [(a, int(b)) for a, b in zip(x, y, strict=True)],
    "loader": lambda x, y: DataLoader(Pairs(x, y), batch_size=7),
    "loader that collates": lambda x, y: DataLoader(Pairs(x, y), collate_fn=collate),
    "dicts": Dicts,
    "dict of tensors": lambda x, y: ({"x": x}, y),
    "dict of arrays": lambda x, y: ({"x": x.numpy(), "words": ["a"] * len(y)}, y.numpy()),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_set_gives_the_same(form: str, stream: bool) -> None:
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    sets = make_sets(ROWS)
    plain = unlearn(network, **sets, config=SHORT, device="cpu")
    formed = {name: FORMS[form](*pair) for name, pair in sets.items()}
    result = unlearn(network, **formed, config=SHORT, device="cpu", stream=stream)
    for key, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    assert result.after == plain.after


def test_several_inputs_by_name_reach_the_network_as_they_were() -> None:
    """Token ids, a mask and a floating-point score: packed for batches, and unpacked before the network."""
    seen: list[tuple[Tensor, ...]] = []

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, CLASSES)

        def forward(self, input_ids: Tensor, mask: Tensor, score: Tensor) -> Tensor:
            seen.append((input_ids, mask, score))
            weights = mask[..., None].float() * score[:, None, None]
            return self.head((self.embedding(input_ids) * weights).mean(1))

    def columns(count: int, seed: int) -> dict[str, Tensor]:
        ids = inputs(count, TOKENS, seed)
        return {"input_ids": ids, "mask": ids > 20, "score": draw((count,), seed), "other": ids}

    sets = {name: (columns(count, seed), labels(count)) for seed, (name, count) in enumerate(SETS.items())}
    result = unlearn(seeded(Mixed), **sets, config=SHORT, device="cpu")
    kinds = {tuple((tensor.dtype, tensor.shape[1:]) for tensor in call) for call in seen}
    assert kinds == {((torch.int64, (7,)), (torch.bool, (7,)), (torch.float32, ()))}
    every = {name: torch.cat([sets[key][0][name] for key in SETS]) for name in ("input_ids", "mask", "score")}
    given = {
        (tuple(row.tolist()), float(score))
        for row, score in zip(every["input_ids"], every["score"], strict=True)
    }
    for ids, mask, score in seen:
        assert torch.equal(mask, ids > 20)
        assert {(tuple(row.tolist()), float(s)) for row, s in zip(ids, score.detach(), strict=True)} <= given
    assert result.after is not None


@pytest.mark.parametrize("stream", [False, True])
def test_sets_of_several_forms_go_together_where_there_is_one_input(stream: bool) -> None:
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    sets = make_sets(ROWS)
    plain = unlearn(network, **sets, config=SHORT, device="cpu")
    for first, rest in (("dicts", "own data set"), ("dict of tensors", "arrays"), ("arrays", "dicts")):
        mixed = {name: FORMS[first if name == "forget" else rest](*pair) for name, pair in sets.items()}
        assert unlearn(network, **mixed, config=SHORT, device="cpu", stream=stream).after == plain.after
    x, y = sets["retain"]
    several = sets | {"retain": ({"x": x, "told": x}, y)}
    with pytest.raises(UserError, match="the retain set has several inputs by name, unlike the first set"):
        unlearn(Two(nn.Linear(6, 8), 8), **several, config=SHORT, device="cpu", stream=stream)


def test_texts_of_unequal_length_are_refused_with_the_way_out() -> None:
    class Ragged(Dicts):
        def __getitem__(self, i: int) -> Any:
            return {"x": list(range(3 + i % 2)), "label": int(self.y[i])}

    sets = {name: Ragged(*pair) for name, pair in make_sets(ROWS).items()}
    with pytest.raises(
        UserError, match=r"item 1 of the forget set has the inputs x \[4\].*padded to one length"
    ):
        unlearn(Net(nn.Linear(6, 8), 8), **sets, device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (draw((4, 6)), r"the retain set is a Tensor: expected \(inputs, labels\)"),
        ({"x": draw((4, 6))}, "the retain set is a dict"),
        (3, "the retain set is a int"),
        ((["a", "b"], [0, 1]), "the retain set's inputs are a list"),
        ((draw((2, 6)), ["a", "b"]), "the retain set's labels are list"),
        ((draw((2, 6)), draw((2,))), r"the retain set's labels are torch\.float32"),
        (({"pixels": draw((2, 6))}, [0, 1]), "no inputs that the model takes: expected x"),
        ([({"pixels": draw((6,))}, 0)], "no inputs that the model takes"),
        ([{"x": draw((6,))}], "no label: expected one of label"),
    ],
)  # fmt: skip
def test_what_is_no_set_is_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        unlearn(Net(nn.Linear(6, 8), 8), **(make_sets(ROWS) | {"retain": given}), device="cpu")
    assert "\n" not in str(raised.value)


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

    sets = make_sets(ROWS)
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    unlearn(network, **sets, config=SHORT, device="cpu")
    unlearn(network, **{name: Pairs(*pair) for name, pair in sets.items()}, config=SHORT, device="cpu")
    assert caplog.text == ""
    for stream in (False, True):
        caplog.clear()
        noisy = sets | {"retain": Noisy(*sets["retain"])}
        unlearn(network, **noisy, config=SHORT, device="cpu", stream=stream)
        (told,) = [record.getMessage() for record in caplog.records]
        assert "of the retain set is another one every time it is read" in told


# ---- one training set, and what of it


class Named(Pairs):
    """As torchvision's ImageFolder names its files."""

    @property
    def samples(self) -> list[tuple[str, int]]:
        return [(f"/data/{'ab'[i % 2]}/{i:02}.png", int(label)) for i, label in enumerate(self.y)]


def whole() -> tuple[Tensor, Tensor]:
    return inputs(60, ROWS, 9), labels(60)


def test_indices_a_mask_names_and_files_ask_for_the_same(tmp_path: Path) -> None:
    x, y = whole()
    asked = [3, 17, 4, 30]
    rest = [i for i in range(60) if i not in asked]
    mask = torch.zeros(60, dtype=torch.bool)
    mask[asked] = True
    (tmp_path / "asked.csv").write_text("file,why\n" + "".join(f"{i:02}.png,because\n" for i in asked))
    (tmp_path / "asked.json").write_text(str(asked))
    others = {name: make_sets(ROWS)[name] for name in ("validation", "test")}
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))

    def run(**sets: Any) -> Result:
        return unlearn(network, **sets, **others, config=SHORT, device="cpu")

    expected = run(train=(x, y), forget=asked)
    named = Named(x, y)
    for forget in (
        torch.tensor(asked), np.array(asked), mask, mask.numpy(), [np.int64(i) for i in asked],
        tmp_path / "asked.json", tmp_path / "asked.csv", [f"{i:02}.png" for i in asked],
        [named.samples[i][0] for i in asked], np.array([f"{'ab'[i % 2]}/{i:02}.png" for i in asked]),
    ):  # fmt: skip
        result = run(train=named, forget=forget)
        assert result.after == expected.after, forget
        assert result.forgotten == ((3, 4, 17, 30),)
    # The same as two sets, up to the order in which batches are drawn.
    two = run(forget=(x[sorted(asked)], y[sorted(asked)]), retain=(x[rest], y[rest]))
    assert two.before is not None
    assert expected.before is not None
    assert two.before.ua == expected.before.ua
    assert two.before.ra == expected.before.ra


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([3, 60], "the index 60: the training set has 60 images"),
        ([-1], "the index -1"),
        ([3, 3], "names 3 twice"),
        ([], "`forget` is empty"),
        ([1.5], "`forget` holds a float"),
        (torch.tensor([1.5]), r"`forget` is float32 of shape \[1\]"),
        (torch.zeros(7, dtype=torch.bool), r"`forget` is bool of shape \[7\]"),
        ("everything", "`forget` is a str"),
        (["03.jpg"], r"names '03.jpg', which no image is called: did you mean '.*03\.png'"),
        ([".png"], "which no image is called"),
    ],
)
def test_what_is_not_in_the_training_set_cannot_be_asked_for(forget: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        unlearn(Net(nn.Linear(6, 8), 8), train=Named(*whole()), forget=forget, device="cpu")


@pytest.mark.parametrize(("name", "other"), [("train", 41), ("validation", 2)])
def test_a_copy_that_stays_of_an_image_to_be_forgotten_is_remarked(
    name: str, other: int, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {name: make_sets(ROWS)[name] for name in ("validation", "test")} | {"train": whole()}
    sets[name][0][other] = sets["train"][0][17]
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    unlearn(network, **sets, forget=[3, 17], method="ga", device="cpu")
    (told,) = [line for line in caplog.messages if "stay equal" in line]
    assert f"image 17 of `train` is image {other} of the {name} set" in told
    caplog.clear()
    if name == "train":
        unlearn(network, **sets, forget=[3, 17, 41], method="ga", device="cpu")
        assert not [line for line in caplog.messages if "stay equal" in line]


def test_retain_or_train_must_be_given_and_not_both() -> None:
    network, sets = Net(nn.Linear(6, 8), 8), make_sets(ROWS)
    with pytest.raises(UserError, match="neither `retain` nor `train`"):
        unlearn(network, forget=sets["forget"], validation=sets["validation"])
    with pytest.raises(UserError, match="both given"):
        unlearn(network, forget=[1], retain=sets["retain"], train=sets["retain"])


def test_a_validation_set_that_is_missing_is_held_out_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, y = whole()
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    result = unlearn(network, train=(x, y), forget=[1, 2, 3], config=SHORT, device="cpu")
    assert len(result.held_out) == 6
    assert not {1, 2, 3} & set(result.held_out)
    assert "there is no validation set: 6 images" in caplog.text
    assert (result.before, result.after) == (None, None)
    assert 0 <= result.validation_accuracy[1] <= 100
    again = unlearn(network, train=(x, y), forget=[1, 2, 3], config=SHORT, device="cpu")
    assert again.held_out == result.held_out
    caplog.clear()
    sets = make_sets(ROWS)
    given = unlearn(network, **{k: sets[k] for k in ("forget", "retain")}, config=SHORT, device="cpu")
    assert min(given.held_out) >= SETS["forget"]
    assert "there is no validation set" in caplog.text
    assert unlearn(network, **sets, config=SHORT, device="cpu").held_out == ()


# ---- request after request


def test_a_result_goes_in_again_and_remembers_what_was_forgotten() -> None:
    x, y = whole()
    sets = make_sets(ROWS)
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    others = {"test": sets["test"], "config": SHORT, "device": "cpu"}
    first = unlearn(network, train=(x, y), forget=[1, 2], validation=sets["validation"], **others)
    second = unlearn(first, forget=[5, 7, 9], config=SHORT, device="cpu")
    third = unlearn(second, forget=[11], config=SHORT, device="cpu")
    assert third.forgotten == ((1, 2), (5, 7, 9), (11,))
    assert first.after is not None
    assert first.after.earlier is None
    assert second.before is not None
    assert second.before.earlier is not None
    assert second.before.earlier["ua"] == first.after.ua
    assert third.after is not None
    assert third.after.earlier is not None
    with pytest.raises(UserError, match="index 2 was forgotten by an earlier request"):
        unlearn(second, forget=[2, 20], config=SHORT, device="cpu")
    with pytest.raises(UserError, match="leave `train` and `retain` out"):
        unlearn(second, forget=[20], train=(x, y))


def test_a_request_that_gives_sets_is_followed_by_one_that_gives_sets() -> None:
    sets = make_sets(ROWS)
    x, y = sets["retain"]
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    first = unlearn(network, **sets, config=SHORT, device="cpu")
    with pytest.raises(UserError, match="was given `retain`"):
        unlearn(first, forget=(x[:5], y[:5]))
    second = unlearn(first, forget=(x[:5], y[:5]), retain=(x[5:], y[5:]), config=SHORT, device="cpu")
    assert second.before is not None
    assert second.before.earlier is not None
    assert first.after is not None
    assert second.before.earlier["ua"] == first.after.ua
    assert len(second.forgotten) == 2


def test_what_a_request_held_out_is_held_out_by_the_next_unless_it_is_asked_for() -> None:
    x, y = whole()
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    first = unlearn(network, train=(x, y), forget=[1], config=SHORT, device="cpu")
    asked = first.held_out[0]
    second = unlearn(first, forget=[asked], config=SHORT, device="cpu")
    assert second.held_out == first.held_out[1:]
    assert second.forgotten == ((1,), (asked,))


# ---- results


def test_a_result_is_shown_in_one_line() -> None:
    result = unlearn(seeded(lambda: Net(nn.Linear(6, 8), 8)), **make_sets(ROWS), config=SHORT, device="cpu")
    shown = repr(result)
    assert len(shown) < 200
    assert "\n" not in shown
    assert shown.startswith("Result(dau: forget error ")
    assert "Linear" not in shown


def test_a_model_is_changed_in_place_where_that_is_asked_for() -> None:
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    before = network.head.weight.clone()
    result = unlearn(network, **make_sets(ROWS), config=SHORT, device="cpu", inplace=True)
    assert result.model is network
    assert not torch.equal(network.head.weight, before)


def fit(retain: Dataset[Any]) -> nn.Module:
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        for x, y in DataLoader(retain, batch_size=16):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network


def test_a_retraining_is_a_reference() -> None:
    sets = make_sets(ROWS)
    seen: list[int] = []

    def retrain(retain: Dataset[Any]) -> nn.Module:
        seen.append(len(retain))  # type: ignore[arg-type]
        assert torch.equal(torch.stack([retain[i][0] for i in range(40)]), sets["retain"][0])
        return fit(retain)

    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    result = unlearn(network, **sets, config=SHORT, device="cpu", retrain=retrain)
    assert seen == [40]
    assert result.reference is not None
    assert result.reference.seconds is not None
    assert result.after is not None
    assert result.reference.measures is not None
    assert result.avg_gap == pytest.approx(
        dau_fast.metrics.unlearning.avg_gap(result.after, result.reference.measures)
    )
    given = unlearn(network, **sets, config=SHORT, device="cpu", retrain=result.reference.model)
    assert given.avg_gap == result.avg_gap
    assert given.reference is not None
    assert given.reference.seconds is None
    with pytest.raises(UserError, match="`retrain` made a NoneType"):
        unlearn(network, **sets, config=SHORT, device="cpu", retrain=lambda retain: None)


@pytest.mark.parametrize("referenced", [True, False])
def test_a_result_writes_its_report(referenced: bool, tmp_path: Path) -> None:
    sets = make_sets(ROWS)
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    result = unlearn(network, **sets, config=SHORT, device="cpu", retrain=fit if referenced else None)
    page = result.report(tmp_path / "out")
    assert {file.name for file in page.parent.iterdir()} == {"report.json", "report.html", "dau.safetensors"}
    text = page.read_text()
    assert "Unlearning report" in text
    assert "own data, Net" in text
    from safetensors.torch import load_file

    weights = load_file(page.parent / "dau.safetensors")
    assert all(torch.equal(weights[key], tensor) for key, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("own", [False, True])
def test_a_result_is_saved_with_a_card(own: bool, tmp_path: Path) -> None:
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    network.register_parameter("tied", network.head.weight)
    result = unlearn(network, **make_sets(ROWS), config=SHORT, device="cpu")
    if own:
        result.model.save_pretrained = lambda folder: (Path(folder) / "config.json").write_text("{}")
    result.save_pretrained(tmp_path / "card")
    files = {file.name for file in (tmp_path / "card").iterdir()}
    assert files == {"README.md", "config.json" if own else "model.safetensors"}
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"| test accuracy | {result.before.ta:.1f} | {result.after.ta:.1f} |" in card
    assert "no proof of deletion" in card


def test_without_a_test_set_there_is_no_report(tmp_path: Path) -> None:
    sets = make_sets(ROWS)
    del sets["test"]
    result = unlearn(Net(nn.Linear(6, 8), 8), **sets, config=SHORT, device="cpu")
    with pytest.raises(UserError, match="give a `test` set"):
        result.report(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_ruins_the_model_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    x, y = whole()
    means = 4 * torch.eye(CLASSES, 6)[y] + 0.1 * x
    network = fit(TensorDataset(means, y))
    result = unlearn(network, train=(means, y), forget=[0, 1, 2, 3], validation=(means, y), method="ga",
                     config={"lr": 5.0, "epochs": 20}, device="cpu")  # fmt: skip
    assert result.retain_accuracy[1] < result.retain_accuracy[0] - 10
    assert "ga ruined the model: it was right on" in caplog.text


# ---- the package itself


def test_the_call_stands_at_the_top_and_the_module_can_be_called() -> None:
    import dau_fast.unlearn as module
    from dau_fast.unlearn import main

    assert callable(main)
    assert callable(dau_fast.unlearn)
    sets = make_sets(ROWS)
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    one = module(network, **sets, config=SHORT, device="cpu")
    assert one.after == unlearn(network, **sets, config=SHORT, device="cpu").after


def test_names_at_the_top_are_listed_and_found() -> None:
    listed = dir(dau_fast)
    assert {"unlearn", "method", "Result", "UserError", "DauConfig", "ops", "prune", "__version__"} <= set(
        listed
    )
    for name in listed:
        assert getattr(dau_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        dau_fast.forget  # noqa: B018
