"""The command `dau_fast`: its further commands, help in groups, own networks, and requests in files."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from calling import Called, call, environment, succeed
from safetensors.torch import save_file

from dau_fast import __main__ as program
from dau_fast.commands.audit import make_audit
from dau_fast.commands.env import make_env
from dau_fast.commands.evaluate import make_evaluate
from dau_fast.commands.help import COMMANDS, GROUPS
from dau_fast.commands.page import make_report
from dau_fast.unlearn import unlearn

QUICK = ("--methods", "ga", "--epochs", 1)


def run(*arguments: object, columns: int = 200) -> tuple[int, str, str]:
    """What `dau_fast` with `arguments` leaves, prints and complains of, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dau_fast", *map(str, arguments)])
        patch.setenv("COLUMNS", str(columns))
        try:
            program.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            torch.set_flush_denormal(False)
    return code, out.getvalue(), err.getvalue()


# ---- help


def commands() -> dict[str, click.Command]:
    return {
        "unlearn": unlearn,
        "audit": make_audit(unlearn.params),
        "evaluate": make_evaluate(unlearn.params),
        "report": make_report(),
        "env": make_env(),
    }


def test_every_option_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    options = {
        parameter.name
        for command in commands().values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    assert options == set(grouped)


@pytest.mark.parametrize("name", ["unlearn", "audit", "evaluate", "report", "env"])
def test_help_shows_groups_examples_and_the_other_commands(name: str) -> None:
    code, shown, told = run(name, "--help")
    assert (code, told) == (0, "")
    assert shown.startswith(f"Usage: dau_fast {name}")
    for other, about in COMMANDS.items():
        assert re.search(rf"dau_fast {other} +{re.escape(about)}", shown)
    for title, options in GROUPS.items():
        mine = [p for p in commands()[name].params if p.name in options and isinstance(p, click.Option)]
        assert (f"\n{title}:\n" in shown) == bool(mine)
    if name in ("unlearn", "audit", "evaluate"):
        examples = shown.split("\nExamples:\n")[1].split("\n\n")[0]
        assert "  dau_fast" in examples
        flags = set(re.findall(r"--[a-z-]+", examples))
        assert flags <= {option for parameter in commands()[name].params for option in parameter.opts}


def test_the_version_is_told_without_loading_anything(tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['dau_fast', '--version']; from dau_fast.__main__ import main; main(); "
    script += "assert 'torch' not in sys.modules"
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert re.fullmatch(r"dau_fast \d+\.\d+\.\d+\n", found.stdout)


def test_importing_the_call_brings_no_library_that_it_may_not_need(tmp_path: Path) -> None:
    script = (
        "import sys, dau_fast; assert 'torch' not in sys.modules; import dau_fast.api; "
        "heavy = 'sklearn', 'scipy', 'torchvision', 'matplotlib', 'rich', 'jinja2', 'torch._dynamo'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "[]\n", "")


def test_the_commands_name_may_be_left_out(tmp_path: Path) -> None:
    given = ("--epochs", 1, "--methods", "ga", "--device", "cpu")
    for folder, command in (("with", ["unlearn"]), ("without", [])):
        code, _, told = run(*command, *given, "--out", tmp_path / folder)
        assert (code, told) == (0, "")
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("with", "without"))
    assert one["methods"]["ga"]["attacks"] == other["methods"]["ga"]["attacks"]


# ---- env


def test_env_says_what_is_here() -> None:
    code, shown, told = run("env")
    assert (code, told) == (0, "")
    for word in ("python", "torch", "dau-fast", "cpu", "gpus", "compiled extension"):
        assert re.search(rf"^{word} +\S", shown, re.MULTILINE), word


# ---- report


def test_report_makes_the_page_again(tmp_path: Path, once: Called) -> None:
    (tmp_path / "report.json").write_bytes((once.folder / "report.json").read_bytes())
    code, shown, told = run("report", tmp_path / "report.json")
    assert (code, told) == (0, "")
    assert str(tmp_path / "report.html") in shown
    assert (tmp_path / "report.html").read_bytes() == (once.folder / "report.html").read_bytes()
    code, _, _ = run("report", tmp_path / "report.json", "--out", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_bytes() == (once.folder / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "is no report of dau_fast"),
        ("{", "cannot be read as JSON"),
        ("[" * 99999, "cannot be read as JSON"),
        ('{"schema": 7, "methods": {}}', "is of schema 7"),
        ('{"schema": 1, "methods": {}}', "or a damaged one"),
        ('{"schema": 1, "run": {"forget": 3}, "methods": {"original": {}}}', "or a damaged one"),
    ],
)  # fmt: skip
def test_what_is_no_report_costs_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "report.json").write_text(text)
    code, shown, told = run("report", tmp_path / "report.json")
    assert (code, shown) == (2, "")
    assert complaint in told
    assert told.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


# ---- evaluate


def evaluate(folder: Path, *arguments: object) -> tuple[int, dict[str, Any], str, str]:
    code, shown, told = run("evaluate", *arguments, "--device", "cpu", "--out", folder)
    file = folder / "evaluation.json"
    return code, json.loads(file.read_text()) if file.exists() else {}, shown, told


def test_evaluate_measures_what_the_run_measured_and_trains_nothing(
    tmp_path: Path, once: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.optim.SGD.step", lambda *_: pytest.fail("a step of training"))
    dau, original, retrain = (once.folder / f"{name}.safetensors" for name in ("dau", "original", "retrain"))
    code, found, shown, told = evaluate(tmp_path, dau, "--original", original, "--reference", retrain)
    assert code == 0, told
    assert list(found["methods"]) == ["original", "retrain", "dau"]
    for name, entry in found["methods"].items():
        expected = once.report["methods"][name]
        for key in ("ua", "ra", "ta", "attacks", "avg_gap", "gaps", "confidence"):
            assert entry[key] == expected[key], (name, key)
        assert entry["seconds"] is None
    assert found["run"]["forget"] == once.report["run"]["forget"]
    assert re.search(r"^ dau +\d", shown, re.MULTILINE)
    assert "retrained" in shown


def test_evaluate_without_a_reference_has_no_gaps(tmp_path: Path, once: Called) -> None:
    dau, original = once.folder / "dau.safetensors", once.folder / "original.safetensors"
    code, found, _, told = evaluate(tmp_path, dau, "--original", original)
    assert code == 0, told
    assert found["methods"]["dau"]["avg_gap"] is None


def test_an_evaluation_leaves_the_weights_beside_it_alone(tmp_path: Path, once: Called) -> None:
    for name in ("dau", "original"):
        (tmp_path / f"{name}.safetensors").write_bytes((once.folder / f"{name}.safetensors").read_bytes())
    for _ in range(2):
        code, _, _, told = evaluate(
            tmp_path, tmp_path / "dau.safetensors", "--original", tmp_path / "original.safetensors"
        )
        assert code == 0, told
    assert {file.name for file in tmp_path.iterdir()} >= {"dau.safetensors", "original.safetensors"}


def test_models_that_do_not_belong_together_are_refused(tmp_path: Path, once: Called) -> None:
    dau, original = once.folder / "dau.safetensors", once.folder / "original.safetensors"
    code, _, _, told = evaluate(tmp_path / "1", dau, "--original", original, "--forget", "class:3")
    assert code == 2
    assert "was made to forget other images" in told
    code, _, _, told = evaluate(tmp_path / "2", dau, dau, "--original", original)
    assert code == 2
    assert "is named twice" in told


# ---- an own network

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.answer = nn.Linear(24, 10)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return {"logits": self.answer(self.body(x))}

def make():
    return Net()

class Softened(Net):
    def forward(self, x):
        return super().forward(x)["logits"].softmax(1)

def softened():
    return Softened()

def wrong():
    return 3

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 10))

thing = 4
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    file = tmp_path / "net.py"
    file.write_text(NET)
    return file


def test_an_own_network_is_trained_unlearned_and_taken_up_again(tmp_path: Path, net: Path) -> None:
    spec = f"{net}:make"
    called = succeed(tmp_path / "out", "--model", spec, "--methods", "dau,retrain", "--epochs", 2, turns=16)
    assert called.report["run"]["arch"] == spec
    assert "answer.weight" in called.weights("dau")
    torch.save({"epoch": 3, "model": {f"_orig_mod.{k}": v for k, v in called.weights("original").items()}},
               tmp_path / "compiled.pt")  # fmt: skip
    again = succeed(tmp_path / "again", "--model", spec, "--checkpoint", tmp_path / "compiled.pt", *QUICK)
    for key, tensor in called.weights("original").items():
        assert torch.equal(again.weights("original")[key], tensor)


def test_an_own_network_that_ends_in_a_softmax_is_warned_of(
    tmp_path: Path, net: Path, caplog: pytest.LogCaptureFixture
) -> None:
    succeed(tmp_path / "out", "--model", f"{net}:softened", *QUICK)
    assert "ends in a softmax" in caplog.text


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("{net}", "expected FILE.py:factory or module:factory"),
        ("{net}:nothing", "has no function 'nothing', but"),
        ("{net}:thing", "has no function 'thing', but"),
        ("{net}:wrong", "made a int: expected a torch.nn.Module"),
        ("{net}:narrow", "the model cannot take images of shape (1, 8, 8)"),
        ("missing.py:make", "'missing.py' is not a file"),
        ("nowhere.at.all:make", "'nowhere.at.all' cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_network_that_cannot_be_made_costs_one_line(
    tmp_path: Path, net: Path, spec: str, complaint: str
) -> None:
    called = call(tmp_path / "out", "--model", spec.format(net=net))
    assert (called.code, called.stdout) == (2, "")
    assert complaint in called.stderr
    assert called.stderr.count("\n") == 1


def test_what_is_wrong_with_files_is_said_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dau_fast.data.named.load", lambda *_, **__: pytest.fail("images were read"))
    (tmp_path / "short.pt").write_bytes(b"no weights")
    (tmp_path / "empty.txt").write_text("\n")
    for arguments in (
        ("--checkpoint", tmp_path / "missing.pt"), ("--checkpoint", tmp_path / "short.pt"),
        ("--forget", f"file:{tmp_path / 'missing.csv'}"), ("--forget", f"file:{tmp_path / 'empty.txt'}"),
        ("--forget", f"indices:{tmp_path / 'empty.txt'}"),
    ):  # fmt: skip
        assert call(tmp_path / "out", *arguments).code == 2


def test_a_resnet_with_its_ordinary_stem_has_a_name() -> None:
    from dau_fast.models import build

    ours, theirs = (build(name, 10, (3, 32, 32)) for name in ("resnet18", "torchvision:resnet18"))
    assert ours.conv1.weight.shape[-1] == 3
    assert theirs.conv1.weight.shape[-1] == 7


def test_another_stem_is_hinted_at(tmp_path: Path, pictures: Path) -> None:
    from dau_fast.models import build

    save_file(build("torchvision:resnet18", 3, (3, 16, 16)).state_dict(), tmp_path / "r.safetensors")
    given = ("--dataset", "folder", "--data", pictures, "--arch", "resnet18")
    called = call(tmp_path / "out", *given, "--checkpoint", tmp_path / "r.safetensors")
    assert "with --arch, such as torchvision:resnet18, whose stem is the ordinary one" in called.stderr


# ---- requests in files


def test_files_are_asked_for_by_their_names(tmp_path: Path, pictures: Path) -> None:
    asked = ["train/red/03.png", "train/green/00.png"]
    requests = tmp_path / "requests.csv"
    requests.write_text("date;path\n" + "".join(f"2026-01-01;{name}\n" for name in asked))
    given = ("--dataset", "folder", "--data", pictures, "--forget", f"file:{requests}")
    called = succeed(tmp_path / "out", *given, *QUICK)
    # Classes in alphabetical order: blue, green, red.
    assert called.report["run"]["forget"]["indices"] == [12, 27]
    requests.write_text("03.png\n")
    called = call(tmp_path / "two", *given)
    assert called.code == 2
    assert "which 6 images end in" in called.stderr or "images end in" in called.stderr


@pytest.mark.parametrize("name", ["r.npy", "r.json", "r.txt", "r.csv", "objects.json"])
def test_indices_are_asked_for_in_files_of_any_kind(tmp_path: Path, name: str) -> None:
    asked, file = [5, 9, 700], tmp_path / name
    if name == "r.npy":
        np.save(file, np.array(asked))
    else:
        texts = {
            "r.json": json.dumps({"indices": asked}),
            "r.txt": "5 9\n700\n",
            "r.csv": "index,why\n5,a\n9,b\n700,c\n",
            "objects.json": json.dumps([{"index": index} for index in asked]),
        }  # fmt: skip
        file.write_text(texts[name])
    called = succeed(tmp_path / "out", "--forget", f"file:{file}", *QUICK)
    assert called.report["run"]["forget"]["indices"] == asked


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_reader_that_leaves_early_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As behind `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["dau_fast", "--help"])
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            with pytest.raises(SystemExit) as leaving:
                program.main()
        finally:
            torch.set_flush_denormal(False)
    assert leaving.value.code == 141
    assert capfd.readouterr().err == ""
