"""The model bank: keys, claims, damaged files, fills that are killed, and the command."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner, Result
from scripts import succeed

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data.images import Augmentation, Images
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.prune import Masks, omp

if TYPE_CHECKING:
    from support.bank import Bank, Training

pytestmark = pytest.mark.usefixtures("importable")


def invented(count: int = 12) -> Images:
    """Noise of three classes, 8x8 pixels."""
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=chance)
    half = torch.full((3,), 0.5)
    return Images(pixels, torch.arange(count) % 3, ("a", "b", "c"), None, half, half)


def training(**changes: Any) -> Training:
    """One step on eight of the images."""
    from support.bank import Training

    made = Training(invented(), torch.arange(8), 1, TrainingRecipe(epochs=1, batch_size=8), "small")
    return replace(made, **changes)


def kept(sparsity: float) -> Masks:
    """Masks of some of the weights of the network before its training."""
    return omp(training().build().network, sparsity)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    from support.bank import Bank

    return Bank(tmp_path / "bank")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all trainings, in their order."""
    from support import bank

    seeds: list[int] = []
    train = bank.original.train

    def counted(task: Any) -> Any:
        seeds.append(task.seed)
        return train(task)

    monkeypatch.setattr(bank.original, "train", counted)
    return seeds


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(map(torch.equal, weights(one), weights(other)))


# ---- keys


def changed(name: str, place: int) -> Images:
    """The invented images with one pixel or label changed."""
    images = invented()
    values = getattr(images, name).clone()
    values[place] = (values[place] + 1) % 3
    return replace(images, **{name: values})


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"images": changed("pixels", 7)},
        lambda: {"images": changed("labels", 7)},
        lambda: {"images": replace(invented(), mean=torch.full((3,), 0.25))},
        lambda: {"images": replace(invented(), std=torch.full((3,), 0.25))},
        lambda: {"images": replace(invented(), augmentation=Augmentation(pad=1))},
        lambda: {"images": replace(invented(), class_names=("a", "b", "c", "d"))},
        lambda: {"index": torch.arange(8).flip(0)},
        lambda: {"index": torch.arange(7)},
        lambda: {"seed": 2},
        lambda: {"recipe": TrainingRecipe(epochs=1, batch_size=8, lr=0.2)},
        lambda: {"arch": "resnet18"},
        lambda: {"pruning": PruneConfig("synflow", 0.5)},
        lambda: {"masks": kept(0.5)},
        lambda: {"runtime": Runtime(torch.device("cuda"))},
        lambda: {"runtime": Runtime(torch.device("cuda"), torch.bfloat16)},
    ],
)  # fmt: skip
def test_a_key_changes_with_everything_that_makes_the_model(change: Callable[[], dict[str, Any]]) -> None:
    assert training(**change()).key != training().key


def test_a_key_stays_where_the_same_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from support import bank

    images = invented()
    rearranged = images.pixels.contiguous(memory_format=torch.channels_last)
    alike = [invented(), changed("pixels", 8), changed("labels", 8), replace(images, pixels=rearranged)]
    # The same images at other places of a larger set.
    moved = replace(images, pixels=images.pixels.roll(2, 0), labels=images.labels.roll(2, 0))
    keys = {training(images=each).key for each in alike}
    keys.add(training(images=moved, index=torch.arange(2, 10)).key)
    assert keys == {training().key}
    monkeypatch.setattr(bank, "FORMAT", bank.FORMAT + 1)
    assert training().key not in keys


# ---- models


def test_a_model_is_trained_once_and_comes_back_as_it_was(bank: Bank, fits: list[int]) -> None:
    assert not bank.holds(training())
    first, second = bank.get(training()), bank.get(training())
    assert fits == [1]
    assert bank.holds(training())
    assert not first.training
    assert not second.training
    assert same(first, second)
    assert same(first, training().train()[0])
    assert not same(first, bank.get(training(seed=2)))


def test_pruned_models_come_back_with_their_masks_and_retrained_ones_keep_to_them(bank: Bank) -> None:
    original = training(pruning=PruneConfig("omp", 0.5))
    masks = bank.get_masks(original)
    assert masks is not None
    assert masks.sparsity == pytest.approx(0.5, abs=0.01)
    assert Masks.from_zeros(bank.get(original).network) == masks
    retrained = training(index=torch.arange(4), masks=masks)
    assert Masks.from_zeros(bank.get(retrained).network) == masks == bank.get_masks(retrained)
    assert bank.get_masks(training()) is None
    assert training(masks=kept(0.5)).key != training(masks=kept(0.25)).key
    assert training(pruning=PruneConfig("omp", 0.5)).key != training(pruning=PruneConfig("omp", 0.6)).key


@pytest.mark.parametrize("damage", ["cut", "a byte", "another model"])
def test_a_damaged_file_is_found_and_trained_again(
    bank: Bank, fits: list[int], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = bank.get(training())
    path = bank.path(training())
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "a byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        bank.make(training(seed=2))
        path.write_bytes(bank.path(training(seed=2)).read_bytes())
    fits.clear()
    assert same(bank.get(training()), sound)
    assert fits == [1]
    assert "the model is trained again" in caplog.text
    assert path.read_bytes()[-100:] == content[-100:]


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    from support.bank import write_whole

    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "file"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, interrupted)
    assert target.read_text() == "before"
    write_whole(target, lambda path: path.write_text("after") and None)
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


# ---- claims


def test_two_do_not_train_the_same_model_at_once(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import bank as module

    begun, may_end, trained = threading.Event(), threading.Event(), []
    train = module.original.train

    def slow(task: Any) -> Any:
        trained.append(threading.current_thread().name)
        begun.set()
        assert may_end.wait(30)
        return train(task)

    monkeypatch.setattr(module.original, "train", slow)
    first = threading.Thread(target=bank.make, args=(training(),))
    first.start()
    assert begun.wait(30)
    assert not bank.make(training(), wait=False)
    second = threading.Thread(target=bank.get, args=(training(),))
    second.start()
    may_end.set()
    for thread in (first, second):
        thread.join(30)
        assert not thread.is_alive()
    assert len(trained) == 1


def test_a_claim_dies_with_its_process_and_what_it_left_is_cleared(bank: Bank) -> None:
    left = Path(f"{bank.path(training())}.123")
    left.write_text("half a model")
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(bank.claim_path(training()))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert not bank.make(training(), wait=False)
        other.kill()
    assert bank.make(training(), wait=False)
    assert not left.exists()


# ---- fills and the command


def fill(pictures: Path, folder: Path, *arguments: str) -> Result:
    from bank import main

    given = ["--data", str(pictures), "--bank", str(folder), "--smoke", "--seeds", "0", "--retrained", "2"]
    return CliRunner().invoke(main, [*given, *arguments])


def test_the_command_fills_once_and_says_what_is_there(
    pictures: Path, tmp_path: Path, fits: list[int]
) -> None:
    arguments = ("--tasks", "random,class,five,memorised", "--record", str(tmp_path / "record"))
    first = fill(pictures, tmp_path / "bank", *arguments)
    assert first.exit_code == 0, first.output
    assert "0 of 9 models are there" in first.output
    # An original for all four, two halves, two retrained models of random and five, of class, of memorised.
    assert len(fits) == 1 + 3 * 2 + 2
    assert len(set(fits)) == 1 + 2 + 2  # the seeds of retrained models are the same for every kind
    again = fill(pictures, tmp_path / "bank", *arguments)
    assert again.exit_code == 0, again.output
    assert len(fits) == 9
    assert "9 of 9 models are there" in again.output
    rows = [line.split() for line in again.output.splitlines() if ":0 " in line]
    assert [row[0] for row in rows] == ["random:0", "class:0", "five:0", "memorised:0"]
    assert {row[-1] for row in rows} <= {"yes", "no"}
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"environment.json", "summary.json"}


def test_a_fill_that_is_killed_goes_on_where_it_was(
    pictures: Path, tmp_path: Path, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import bank

    count, save = [0], bank.checkpoints.save

    def killed(path: Path, *others: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            path.write_text("half")
            raise SystemExit(9)
        save(path, *others)

    monkeypatch.setattr(bank.checkpoints, "save", killed)
    assert fill(pictures, tmp_path, "--tasks", "random,class").exit_code == 9
    monkeypatch.setattr(bank.checkpoints, "save", save)
    lost = fits.pop()
    done = fill(pictures, tmp_path, "--tasks", "random,class")
    assert done.exit_code == 0, done.output
    assert "2 of 5 models are there, the rest takes about" in done.output
    assert len(fits) == 5
    assert fits[2] == lost


def test_references_are_further_models_of_the_first_seed(pictures: Path, tmp_path: Path) -> None:
    from support.filling import Place, list_jobs, open_tasks
    from support.settings import SMOKE

    tasks = open_tasks(Place(tmp_path, pictures, SMOKE))
    jobs = [str(job) for job in list_jobs(tasks, ["random"], [4, 5], 2, 1)]
    assert jobs == [
        "random:4 original 0", "random:4 original 1",
        "random:4 retrained 0", "random:4 retrained 1", "random:4 retrained 2",
        "random:5 original 0", "random:5 retrained 0", "random:5 retrained 1",
    ]  # fmt: skip


@pytest.mark.slow
def test_several_processes_fill_one_bank(pictures: Path, tmp_path: Path) -> None:
    arguments = ("--data", pictures, "--bank", tmp_path, "--smoke", "--seeds", "0", "--retrained", "2")
    printed = succeed("bank.py", *arguments, "--tasks", "random,memorised", "--workers", "2")
    assert "7 of 7 models are there" in printed


def test_a_mistake_is_one_line(pictures: Path, tmp_path: Path) -> None:
    for arguments, reason in [
        (("--tasks", "random,everything"), "unknown task 'everything'"),
        (("--seeds", "3-1"), "names none"),
        (("--seeds", "x"), "is not understood"),
        (("--data", str(tmp_path / "nowhere")), "is not a folder"),
    ]:
        done = fill(pictures, tmp_path, *arguments)
        assert done.exit_code == 2
        assert reason in done.output


def test_seeds_are_numbers_and_ranges() -> None:
    from bank import parse_seeds

    assert parse_seeds("100-102, 7,101") == (100, 101, 102, 7)
    with pytest.raises(UserError, match="not understood"):
        parse_seeds("1-")
