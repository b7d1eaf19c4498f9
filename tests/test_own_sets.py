"""A caller's own data, of many kinds: sets in every form, and one training set of which some is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own import (
    CLASSES,
    ROWS,
    SETS,
    SHORT,
    TOKENS,
    Dicts,
    Net,
    Pairs,
    Two,
    collate,
    draw,
    inputs,
    labels,
    make_sets,
    seeded,
    whole,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dau_fast.api import Result, unlearn
from dau_fast.errors import UserError

# ---- forms of one set


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


# ---- one training set, and what of it


class Named(Pairs):
    """As torchvision's ImageFolder names its files."""

    @property
    def samples(self) -> list[tuple[str, int]]:
        return [(f"/data/{'ab'[i % 2]}/{i:02}.png", int(label)) for i, label in enumerate(self.y)]


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
