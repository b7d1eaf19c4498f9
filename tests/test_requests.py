"""Request after request on the command line: what is forgotten stays so, and nothing is held out wrongly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import LABELS, Called, call, succeed
from safetensors.torch import save_file

from dau_fast import checkpoints
from dau_fast.data.split import FORGOTTEN, TEST, TRAINING, VALIDATION, encode_roles
from dau_fast.models import SmallResNet

QUICK = ("--methods", "ga", "--epochs", 1)


def listed(path: Path, indices: object) -> str:
    path.write_text("\n".join(map(str, indices)))  # type: ignore[call-overload]
    return f"indices:{path}"


# ---- a second request on top of a first


@pytest.fixture(scope="module")
def second(place: Path, once: Called) -> Called:
    """20 further images are forgotten by the model that forgot those of `once`."""
    roles = once.roles()
    first = set(once.report["run"]["forget"]["indices"])
    others = [int(i) for i in np.flatnonzero(roles == TRAINING) if i not in first][:20]
    forget = listed(place / "second.txt", others)
    return succeed(
        place / "second", "--checkpoint", once.folder / "dau.safetensors", "--forget", forget,
        "--methods", "ga,retrain", "--epochs", 1,
    )  # fmt: skip


def test_forgotten_is_a_role_in_the_file_for_good(once: Called, second: Called) -> None:
    first, then = (called.report["run"]["forget"]["indices"] for called in (once, second))
    assert (once.roles("original") != FORGOTTEN).all()
    for called, method, gone in (
        (once, "dau", first),
        (once, "retrain", first),
        (second, "original", first),
        (second, "ga", first + then),
        (second, "retrain", first + then),
    ):
        assert np.flatnonzero(called.roles(method) == FORGOTTEN).tolist() == sorted(gone), (method, gone)


def test_the_second_request_trains_on_nothing_of_the_first_and_measures_both(
    once: Called, second: Called
) -> None:
    first, run = once.report["run"], second.report["run"]
    assert run["sets"]["earlier"] == first["sets"]["forget"]
    assert run["sets"]["retain"] == first["sets"]["train"] - first["sets"]["forget"] - 20
    assert run["sets"]["validation"] == first["sets"]["validation"]
    for entry in second.report["methods"].values():
        assert set(entry["earlier"]) == {"ua", "correctness", "confidence", "entropy", "modified_entropy",
                                         "probability"}  # fmt: skip
    # The original of the second request is the first one's result.
    assert second.report["methods"]["original"]["earlier"]["ua"] == pytest.approx(
        once.report["methods"]["dau"]["ua"]
    )
    assert "images of earlier requests: original" in second.stdout
    assert "images of earlier requests: original" in (second.folder / "report.html").read_text()


def test_what_was_forgotten_before_cannot_be_asked_for_again(
    tmp_path: Path, once: Called, second: Called
) -> None:
    forget = listed(tmp_path / "again.txt", once.report["run"]["forget"]["indices"][:3])
    checkpoint = second.folder / "ga.safetensors"
    called = call(tmp_path / "out", "--checkpoint", checkpoint, "--forget", forget, *QUICK)
    assert called.code == 2
    assert "was forgotten by an earlier request (3 such)" in called.stderr


def test_a_class_that_is_gone_stays_out_of_validation_and_test(place: Path) -> None:
    first = succeed(place / "class first", "--forget", "class:3", *QUICK)
    checkpoint = first.folder / "ga.safetensors"
    then = succeed(place / "class then", "--checkpoint", checkpoint, "--forget", "random:0.05", *QUICK)
    assert then.report["run"]["sets"]["test"] == first.report["run"]["sets"]["test"]
    assert then.report["run"]["sets"]["validation"] == first.report["run"]["sets"]["validation"]
    assert not (LABELS[then.report["run"]["forget"]["indices"]] == 3).any()


def test_a_file_that_does_not_name_what_it_forgot_is_warned_of(
    tmp_path: Path, once: Called, caplog: pytest.LogCaptureFixture
) -> None:
    """As files of older versions are."""
    metadata = once.metadata("dau") | {"split": once.metadata("original")["split"]}
    save_file(once.weights("dau"), tmp_path / "old.safetensors", {"dau_fast": json.dumps(metadata)})
    succeed(tmp_path / "out", "--checkpoint", tmp_path / "old.safetensors", *QUICK)
    assert "was made to forget images that its file does not name" in caplog.text


# ---- a stranger's checkpoint


@pytest.fixture(scope="module")
def strange(place: Path, once: Called) -> Path:
    file = place / "strange.pt"
    torch.save(once.weights("original"), file)
    return file


def test_requested_images_are_never_drawn_for_validation_or_test(
    place: Path, once: Called, strange: Path
) -> None:
    roles = once.roles()
    asked = [int(i) for role in (VALIDATION, TEST, TRAINING) for i in np.flatnonzero(roles == role)[:10]]
    forget = listed(place / "asked.txt", asked)
    called = succeed(place / "strange", "--checkpoint", strange, "--forget", forget, *QUICK)
    assert called.report["run"]["forget"]["indices"] == sorted(asked)
    assert called.metadata("ga")["validation"] == "drawn"
    # Nor by a second request, of what the first one had to hold out.
    held = [int(i) for role in (VALIDATION, TEST) for i in np.flatnonzero(called.roles("ga") == role)[:5]]
    forget = listed(place / "held.txt", held)
    then = succeed(
        place / "strange then", "--checkpoint", called.folder / "ga.safetensors", "--forget", forget, *QUICK
    )
    assert then.report["run"]["forget"]["indices"] == sorted(held)
    assert np.flatnonzero(then.roles("ga") == FORGOTTEN).tolist() == sorted([*asked, *held])


def test_what_was_truly_held_out_cannot_be_forgotten(tmp_path: Path, once: Called) -> None:
    held = np.flatnonzero(once.roles() == VALIDATION)[:2]
    forget = listed(tmp_path / "held.txt", held)
    checkpoint = once.folder / "original.safetensors"
    called = call(tmp_path / "out", "--checkpoint", checkpoint, "--forget", forget, *QUICK)
    assert called.code == 2
    assert "is a validation image, which the original was never trained on" in called.stderr


def test_the_accuracy_of_a_checkpoint_is_told_before_any_work(
    tmp_path: Path, once: Called, strange: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = listed(tmp_path / "index.txt", [0])
    # It ends before a method runs: a later check fails.
    call(tmp_path / "out", "--checkpoint", strange, "--forget", index, "--methods", "rl", "--shard")
    called = call(tmp_path / "out", "--checkpoint", strange, *QUICK)
    told = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    test = once.report["methods"]["original"]["ta"]
    assert f"{test:.1f} % of {once.report['run']['sets']['test']} test images" in told[-1]
    assert "mean 0.305 and standard deviation 0.376" in told[-1]
    assert called.code == 0


def test_a_checkpoint_of_other_classes_is_warned_of(
    tmp_path: Path, once: Called, caplog: pytest.LogCaptureFixture
) -> None:
    weights = once.weights("original")
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name].roll(1, 0).contiguous()
    save_file(weights, tmp_path / "rolled.safetensors")
    succeed(tmp_path / "out", "--checkpoint", tmp_path / "rolled.safetensors", *QUICK)
    assert "is right on few of the images that it was trained on" in caplog.text


# ---- its own normalisation


def test_a_normalisation_is_taken_told_and_kept_in_the_files(
    place: Path, once: Called, strange: Path
) -> None:
    asked = ("--mean", "0.2", "--std", "0.5")
    called = succeed(place / "normal", "--checkpoint", strange, *asked, *QUICK)
    plain = succeed(place / "plain", "--checkpoint", strange, *QUICK)
    (found,) = [called.report["run"]["normalisation"]]
    assert found["mean"] == pytest.approx([0.2])
    assert found["std"] == pytest.approx([0.5])
    assert found["from"] == "the options"
    assert plain.report["run"]["normalisation"]["from"] == "the data set"
    ours, theirs = (c.report["methods"]["original"] for c in (called, plain))
    assert ours["confidence"] != theirs["confidence"]
    assert "mean 0.2, standard deviation 0.5" in (called.folder / "report.html").read_text()
    # What comes of it brings its normalisation along.
    again = succeed(place / "again normal", "--checkpoint", called.folder / "original.safetensors",
                    *QUICK)  # fmt: skip
    assert again.report["run"]["normalisation"] == found | {"from": "the checkpoint"}
    assert again.report["methods"]["original"]["confidence"] == ours["confidence"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--mean", "0.5"), "--mean and --std belong together"),
        (("--std", "0.5"), "--mean and --std belong together"),
        (("--mean", "0.5", "--std", "0"), "--std 0: expected numbers above 0 to 1"),
        (("--mean", "127", "--std", "0.5"), "--mean 127: expected numbers from 0 to 1"),
        (("--mean", "nan", "--std", "0.5"), "--mean nan"),
        (("--mean", "0.5,0.5", "--std", "0.5"), "has 2 numbers for images of 1 channels"),
        (("--mean", "imagenet"), "has 3 numbers for images of 1 channels"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    called = call(tmp_path / "out", *arguments)
    assert called.code == 2
    assert complaint in called.stderr


# ---- a folder with a validation part


def test_a_validation_folder_is_the_validation_set(place: Path, pictures: Path) -> None:
    data = place / "with val"
    shutil.copytree(pictures, data)
    for name in ("red", "green", "blue"):
        (data / "val" / name).mkdir(parents=True)
        for i in range(4):
            (data / "train" / name / f"{i:02}.png").rename(data / "val" / name / f"{i:02}.png")
    torch.manual_seed(0)
    checkpoint = place / "pictures.safetensors"
    checkpoints.save(checkpoint, SmallResNet(3, 3), {})
    forget = listed(place / "val.txt", range(8))
    called = succeed(
        place / "val run", "--dataset", "folder", "--data", data, "--checkpoint", checkpoint, "--forget",
        forget, *QUICK,
    )  # fmt: skip
    roles = called.roles("original", count=54)
    assert roles.tolist() == [TRAINING] * 24 + [VALIDATION] * 12 + [TEST] * 18
    assert "validation" not in called.metadata("ga")
    assert called.report["run"]["sets"]["validation"] == 8  # the class that is gone left out
    drawn = encode_roles(called.roles("ga", count=54))
    assert called.metadata("ga")["split"] == drawn
