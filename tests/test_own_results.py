"""What a call gives back: results, requests one after the other, and what stands at the package's top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own import (
    CLASSES,
    ROWS,
    SHORT,
    Net,
    make_sets,
    seeded,
    whole,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dau_fast
from dau_fast.api import _warn_of_ruin, unlearn
from dau_fast.errors import UserError
from dau_fast.methods.registry import get_method

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


@pytest.mark.parametrize("referenced", [True, False])
def test_a_report_lists_the_images_at_risk_and_the_settings_of_the_call(
    referenced: bool, tmp_path: Path
) -> None:
    x, y = whole()
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    sets = {name: make_sets(ROWS)[name] for name in ("validation", "test")}
    result = unlearn(
        network, train=(x, y), forget=[50, 7, 21], **sets, config=SHORT, device="cpu",
        retrain=fit if referenced else None,
    )  # fmt: skip
    page = result.report(tmp_path / "out").read_text()
    at_risk = json.loads((tmp_path / "out" / "report.json").read_text())["at_risk"]
    assert result.after is not None
    margins = dict(zip((7, 21, 50), result.after.forget_margins or (), strict=True))
    theirs = dict.fromkeys(margins, 0.0)
    if referenced:
        assert result.reference is not None
        assert result.reference.measures is not None
        theirs = dict(zip(margins, result.reference.measures.forget_margins or (), strict=True))
    surest = sorted(margins, key=lambda i: theirs[i] - margins[i])
    assert [entry["index"] for entry in at_risk["images"]] == surest
    for entry in at_risk["images"]:
        assert entry["margin"] == margins[entry["index"]]
        assert entry["retrained"] == (theirs[entry["index"]] if referenced else None)
        assert entry["label"] == str(int(y[entry["index"]]))
    assert ("furthest above a retrained model in" in page) == referenced
    assert ("Forgotten images that DAU is surest of" in page) != referenced
    assert f'<tr><th scope="row">{surest[0]}</th>' in page
    assert "--thumbnails" not in page
    assert '<pre class="command"' not in page
    assert f"turns {SHORT['turns']}" in page[page.index("<dt>settings</dt>") :]


def test_a_report_of_imbalanced_classes_says_so(tmp_path: Path) -> None:
    x, y = whole()
    kept = torch.cat([(y == 0).nonzero()[2:6, 0], (y == 1).nonzero()[:, 0]])
    test = torch.cat([(y == 0).nonzero()[:2, 0], (y == 1).nonzero()[:1, 0]])
    network = seeded(lambda: Net(nn.Linear(6, 8), 8))
    result = unlearn(
        network, forget=(x[y == 2][:4], y[y == 2][:4]), retain=(x[kept], y[kept]),
        validation=make_sets(ROWS)["validation"], test=(x[test], y[test]), config=SHORT, device="cpu",
    )  # fmt: skip
    page = result.report(tmp_path / "out").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["class_sizes"] == {"retain": [4, 20], "test": [1, 2]}
    assert result.after is not None
    assert report["methods"]["dau"]["balanced"] == result.after.balanced
    assert "Classes are imbalanced, images a class 4 to 20 in the retain set, 1 to 2 in the test set" in page


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


@pytest.mark.parametrize(
    ("after", "count", "said"),
    [
        (98.9, 800, "cost the model more than it should"),
        (99.1, 800, ""),
        (97.5, 40, ""),
        (97.0, 800, "ruined"),
    ],
)
def test_retain_accuracy_that_is_gone_is_told(
    after: float, count: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A point of it, where that is not an image or two."""
    _warn_of_ruin(get_method("ga"), 100.0, after, count)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


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
