"""Mistakes on the command line, malicious files and Ctrl-C: one line each, and nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import LABELS, Called, call, contents, environment
from safetensors.torch import save_file

from dau_fast import unlearn
from dau_fast.data.split import VALIDATION
from dau_fast.prune import Masks
from dau_fast.prune.sparse_file import compress


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def files(place: Path, once: Called, pictures: Path) -> Path:
    """A folder of things that cannot be used, and some that can."""
    folder = place / "files"
    folder.mkdir()
    validation = np.flatnonzero(once.roles() == VALIDATION)
    for name, text in {
        "twice": "3 5 3", "range": "0 1797", "huge": "9" * 30, "digits": "9" * 5000, "negative": "4\n-1",
        "empty": " \n", "word": "1 two", "validation": str(validation[0]),
        "everything": " ".join(map(str, range(len(LABELS)))),
    }.items():  # fmt: skip
        (folder / f"{name}.txt").write_text(text)
    (folder / "binary.txt").write_bytes(b"\xff\xfe1")
    good = (once.folder / "original.safetensors").read_bytes()
    (folder / "good.safetensors").write_bytes(good)
    (folder / "short.safetensors").write_bytes(good[:100_000])
    (folder / "nothing.safetensors").write_bytes(b"")
    for name, metadata in (("odd", "3"), ("odd_split", '{"split": 3}')):
        save_file(once.weights("original"), folder / f"{name}.safetensors", {"dau_fast": metadata})
    for name, damage in SPARSE_DAMAGE.items():
        tensors, shapes = compress(once.weights("original"), Masks({"head.weight": torch.ones(10, 64) > 0}))
        metadata = json.dumps({"sparse": damage(tensors) or shapes})
        save_file(tensors, folder / f"{name}.sparse.safetensors", {"dau_fast": metadata})
    whole = (folder / "whole.sparse.safetensors").read_bytes()
    (folder / "short.sparse.safetensors").write_bytes(whole[:100_000])
    torch.save(once.weights("original"), folder / "whole.pt")
    (folder / "short.pt").write_bytes((folder / "whole.pt").read_bytes()[:100_000])
    torch.save({0: torch.zeros(1)}, folder / "numbered.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    png = (pictures / "test" / "red" / "00.png").read_bytes()
    # The header's length is wrong: Pillow gives up with a ValueError.
    damaged = png[:8] + b"\0\0\0\5" + png[12:]
    for file, content in {
        "damaged/train/a/0.png": damaged, "damaged/test/a/0.png": damaged, "test_only/test/a/0.png": png,
    }.items():  # fmt: skip
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_bytes(content)
    return folder


LONG = "x" * 300

# What is wrong with the tensors of a sparse file, or the shapes it gives its masks.
SPARSE_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], str | None]] = {
    "whole": lambda tensors: None,
    "odd": lambda tensors: "[3",
    "bits": lambda tensors: '{"head.weight": [10, 640]}',
    "kept": lambda tensors: tensors.update({"head.weight": torch.zeros(639)}),
}

# Arguments, and what the message must name.
MISTAKES = [
    ("--dataset mnist", "--dataset mnist: expected one of digits, "),
    ("--arch alexnet_9", "--arch alexnet_9: expected small, "),
    ("--methods dau,magic", "method 'magic'"),
    ("--methods all,magic", "method 'magic'"),
    ("--methods dua", "did you mean dau?"),
    ("--dataset cifar", "did you mean cifar10?"),
    ("--tune 0", "--tune"),
    ("--methods dau,", "method ''"),
    ("--sensitivity labels", "--sensitivity labels: expected one of none, "),
    ("--device cuda", "--device cuda"),
    ("--device tpu", "--device tpu: expected one of auto, "),
    ("--precision fp8", "--precision fp8: expected one of auto, "),
    ("--retrain-recipe slow", "--retrain-recipe slow: expected one of both, literature, fast"),
    ("--engine jit", "--engine jit: expected one of auto, eager, compiled, graphed, captured"),
    ("--shard", "--shard shares a model out to several processes, and there is one"),
    ("--engine captured", "--engine captured needs a CUDA device"),
    ("--forget random:0", "'random:0'"),
    ("--forget random:1.5", "'random:1.5'"),
    ("--forget random:nan", "'random:nan'"),
    ("--forget random:", "'random:'"),
    ("--forget random:0.0001", "no forget images"),
    ("--forget random:0.9999", "no retain images"),
    ("--forget indices:{files}/everything.txt", "no retain images"),
    ("--forget class:99", "'class:99'"),
    ("--forget class:", "'class:'"),
    ("--forget nonsense", "'nonsense'"),
    ("--forget indices:{files}/twice.txt", "3 twice"),
    ("--forget indices:{files}/range.txt", "1797 is out of range"),
    ("--forget indices:{files}/huge.txt", "huge.txt"),
    ("--forget indices:{files}/digits.txt", "digits.txt"),
    ("--forget indices:{files}/negative.txt", "'-1'"),
    ("--forget indices:{files}/empty.txt", "empty.txt' is empty"),
    ("--forget indices:{files}/word.txt", "'two'"),
    ("--forget indices:{files}/binary.txt", "binary.txt"),
    ("--forget indices:{files}/missing.txt", "missing.txt"),
    ("--forget indices:{files}", "cannot be read"),
    (
        "--checkpoint {files}/good.safetensors --forget indices:{files}/validation.txt",
        "is a validation image",
    ),
    ("--prune magnitude", "--prune magnitude: expected one of imp, "),
    ("--prune omp --sparsity 1", "--sparsity 1.0: expected a number from 0 to below 1"),
    ("--prune omp --sparsity -0.1", "--sparsity -0.1: expected"),
    ("--prune synflow --sparsity nan", "--sparsity nan: expected"),
    ("--prune omp --sparsity most", "'most'"),
    ("--sparsity 0.9", "add --prune"),
    ("--methods dau,retrain_clean", "add --prune"),
    ("--prune imp --checkpoint {files}/good.safetensors", "--prune imp"),
    ("--prune synflow --checkpoint {files}/good.safetensors", "--prune synflow"),
    ("--image-size 16", "--image-size 16 is for folder, arrow"),
    ("--dataset folder", "--data DIR"),
    ("--dataset folder --data {files}/missing", "missing' is not a folder"),
    ("--dataset folder --data {files}/twice.txt", "twice.txt' is not a folder"),
    ("--dataset folder --data {files}/test_only", "'train' folder"),
    ("--dataset folder --data {files}/damaged", "0.png"),
    ("--dataset cifar10 --data {files}/missing", "--download"),
    ("--dataset cifar10 --data {files}/twice.txt", "twice.txt"),
    ("--checkpoint {files}/missing.pt", "missing.pt' does not exist"),
    ("--checkpoint {files}", "files"),
    ("--checkpoint {files}/short.safetensors", "short.safetensors"),
    ("--checkpoint {files}/nothing.safetensors", "nothing.safetensors"),
    ("--checkpoint {files}/odd.safetensors", "checkpoint"),
    ("--checkpoint {files}/odd_split.safetensors", "checkpoint"),
    ("--checkpoint {files}/short.sparse.safetensors", "short.sparse.safetensors"),
    ("--checkpoint {files}/odd.sparse.safetensors", "odd.sparse.safetensors"),
    ("--checkpoint {files}/bits.sparse.safetensors", "bits.sparse.safetensors"),
    ("--checkpoint {files}/kept.sparse.safetensors", "kept.sparse.safetensors"),
    ("--checkpoint {files}/short.pt", "short.pt"),
    ("--checkpoint {files}/twice.txt", "twice.txt"),
    ("--checkpoint {files}/numbered.pt", "numbered.pt"),
    ("--checkpoint {files}/list.pt", "list.pt"),
    ("--checkpoint {files}/whole.pt --arch resnet18", "another architecture"),
    ("--checkpoint {files}/good.safetensors --arch resnet18", "another architecture"),
    ("--checkpoint {long}", "xxx"),
    ("--dataset folder --data {long}", "xxx"),
    ("--wrong", "--wrong"),
    ("extra", "extra"),
    ("--seed one", "'one'"),
    ("--seed -1", "-1"),
    ("--repeats 0", "--repeats"),
    ("--epochs 0", "--epochs"),
    ("--epochs 99999999999999999999", "--epochs 99999999999999999999: expected no more than 1,000,000"),
    ("--retain-sample nan", "--retain-sample nan: expected a number above 0"),
    ("--retain-sample inf", "--retain-sample inf: expected a number above 0"),
    ("--timeout nan", "--timeout nan: expected seconds from 1"),
    ("--timeout inf", "--timeout inf: expected seconds from 1"),
    ("--accumulate 99999999999", "--accumulate"),
    ("--repeats 99999999999", "--repeats"),
    ("--image-size 99999999999 --dataset folder --data {files}", "--image-size"),
]


def assert_one_line(called: Called, code: int, beginning: str) -> None:
    assert called.code == code
    assert called.stdout == ""
    assert re.fullmatch(rf"{beginning}[^\n]+\n", called.stderr), called.stderr


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_costs_one_line_and_leaves_nothing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    used = tmp_path / "used"
    used.mkdir()
    (used / "report.json").write_text("older")
    before, given = contents(tmp_path), [part.format(files=files, long=LONG) for part in arguments.split()]
    for folder in (used, tmp_path / "new" / "out"):
        called = call(folder, *given)
        assert contents(tmp_path) == before
        assert named in called.stderr
        assert_one_line(called, 2, "error: ")


def test_a_training_that_breaks_costs_one_line_and_leaves_what_was_there(files: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("older")
    (tmp_path / "config.toml").write_text("[settings.ft]\nlr = 1000\nepochs = 30\n")
    before = contents(tmp_path)
    good = files / "good.safetensors"
    called = call(tmp_path, "--checkpoint", good, "--methods", "ft", "--config", tmp_path / "config.toml")
    assert contents(tmp_path) == before
    told = (
        r"error: ft diverged, the loss of ft is NaN or infinite in step \d+ of \d+, first in layer 'blocks.*"
    )
    assert_one_line(called, 2, told)


@pytest.mark.parametrize("out", ["file", "file/below/it", LONG])
def test_an_output_folder_that_cannot_be_costs_one_line(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    called = call(tmp_path / out)
    assert contents(tmp_path) == before
    assert str(tmp_path / out) in called.stderr
    assert_one_line(called, 2, "error: ")


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**70])
def test_a_large_seed_works_or_is_refused(tmp_path: Path, seed: int) -> None:
    called = call(tmp_path / "out", "--seed", seed, "--methods", "ga", "--repeats", 2, "--epochs", 1)
    assert called.code in (0, 2)
    if called.code:
        assert_one_line(called, 2, "error: ")


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.safetensors", "evil"])
@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path, name: str, container: str) -> None:
    made, file, out = tmp_path / "made", tmp_path / name, tmp_path / "out"
    content = io.BytesIO()
    if container == "torch":
        torch.save({"stem.0.weight": Malicious(made)}, content)
        torch.load(io.BytesIO(content.getvalue()), weights_only=False)
    else:
        pickle.dump({"stem.0.weight": Malicious(made)}, content)
        pickle.loads(content.getvalue())
    file.write_bytes(content.getvalue())
    made.rmdir()  # Reading it carelessly made the folder.
    called = call(out, "--checkpoint", file)
    assert not made.exists()
    assert not out.exists()
    assert name in called.stderr
    assert_one_line(called, 2, "error: ")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "memory is short (none is left): "),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes\nat"),
            "memory is short",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "memory is short (CUDA out of memory. Tried): ",
        ),
        (
            ImportError("libx.so: failed to map segment from shared object"),
            "memory is short (libx.so: failed",
        ),
        (OSError(errno.EIO, "Input/output error", "disk/images"), "the system refused: "),
    ],
    ids=["none", "CPU", "GPU", "library", "disk"],
)
def test_what_the_machine_cannot_do_costs_one_line(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(unlearn, "make_experiment", fail)
    called = call(tmp_path / "out")
    assert_one_line(called, 1, f"error: {re.escape(told)}")
    assert list(tmp_path.iterdir()) == []


# Says on stdout whenever an optimiser has taken a step.
TELLING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from torch.optim.optimizer import register_optimizer_step_post_hook as hook
from dau_fast.unlearn import main
hook(lambda *_: print("step", flush=True))
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_in_the_middle_of_training_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, "--epochs", "100000", "--device", "cpu", "--out", str(out)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    giving_up = threading.Timer(60, process.kill)
    giving_up.start()
    try:
        assert process.stdout
        # The first steps are of warming up.
        assert [process.stdout.readline() for _ in range(10)] == ["step\n"] * 10
        (staging,) = out.iterdir()
        assert staging.name.startswith(".unfinished-")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    finally:
        giving_up.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    # click ends the line of the terminal's ^C first.
    assert re.fullmatch(r"interrupted[^\n]+", stderr.strip()), stderr
