"""Shell completion: the names that commands know, without what takes seconds to import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from calling import environment
from test_commands import commands
from torchvision import models

from dau_fast.commands.attest import attest
from dau_fast.commands.completion import make_program
from dau_fast.commands.help import COMMANDS
from dau_fast.commands.selfcheck import make_selfcheck
from dau_fast.commands.verify import verify
from dau_fast.config import RETRAIN_RECIPES, SENSITIVITIES
from dau_fast.data.named import NAMES, STREAMING
from dau_fast.data.normalisation import NORMALISATIONS
from dau_fast.engine.runtime import ENGINES
from dau_fast.methods.registry import find_methods
from dau_fast.prune.registry import find_pruners

REAL = {**commands(), "attest": attest, "verify": verify, "selfcheck": make_selfcheck()}


def completions(tmp_path: Path, *words: str) -> list[str]:
    """What the shell is told of the last of `words`, by a process that did not import PyTorch."""
    script = (
        "import sys; sys.argv = ['dau_fast']\n"
        "from dau_fast.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'rich'} & sys.modules.keys()"
    )
    line = {"COMP_WORDS": " ".join(("dau_fast", *words)), "COMP_CWORD": str(len(words))}
    told = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**environment(), **line, "_DAU_FAST_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")
    return [row.partition(",")[2] for row in told.stdout.splitlines() if row]


def values(option: str) -> list[str]:
    """All that `option` of unlearning can be, as completion has it."""
    program = make_program()
    (parameter,) = [one for one in program.params if one.name == option]
    return [item.value for item in parameter.shell_complete(click.Context(program), "")]


@pytest.mark.parametrize("name", COMMANDS)
def test_completion_knows_the_options_that_a_command_has(name: str) -> None:
    def options(command: click.Command) -> dict[str, tuple[bool, bool]]:
        found = [one for one in command.params if isinstance(one, click.Option)]
        return {"/".join((*one.opts, *one.secondary_opts)): (one.is_flag, one.multiple) for one in found}

    assert options(make_program().commands[name]) == options(REAL[name])


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("methods", {"all", *find_methods()}),
        ("prune", {"none", *find_pruners()}),
        ("dataset", set(NAMES)),
        ("arch", {"small", "timm:", *models.list_models(models)}),
        ("stream", set(STREAMING)),
        ("mean", {"timm", *NORMALISATIONS}),
        ("retrain_recipe", set(RETRAIN_RECIPES)),
        ("sensitivity", set(SENSITIVITIES)),
        ("engine", {"auto", *ENGINES}),
        ("precision", {"auto", "fp32", "bf16", "fp64"}),
    ],
)
def test_completion_knows_the_names_that_an_option_takes(option: str, known: set[str]) -> None:
    found = values(option)
    assert len(found) == len(set(found))
    assert set(found) == known


def test_a_shell_is_told_at_once(tmp_path: Path) -> None:
    assert completions(tmp_path, "--methods", "dau,retrain_") == ["dau,retrain_fast", "dau,retrain_clean"]
    assert completions(tmp_path, "unlearn", "--dataset", "cifar") == ["cifar10", "cifar100"]
    assert completions(tmp_path, "--arch", "resnet1") == ["resnet101", "resnet152", "resnet18"]
    assert completions(tmp_path, "") == sorted(COMMANDS)
    assert "--original" in completions(tmp_path, "evaluate", "--")


MINE = """
import dau_fast
from dau_fast import pruner
raise RuntimeError("this is never run")

@dau_fast.method("shrink", label="Shrunk")
def shrink(task): ...

@dau_fast.method(name="retrench")
def another(task): ...

@pruner("strided")
def strided(search): ...
"""


def test_methods_and_pruners_of_others_are_completed_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def (")
    plugged = ("--plugin", "mine.py")
    assert completions(tmp_path, "--methods", "dau,shr") == []
    assert completions(tmp_path, *plugged, "--methods", "dau,shr") == ["dau,shrink"]
    assert completions(tmp_path, "unlearn", *plugged, "--methods", "retrain,ret") == [
        "retrain,retrain_fast", "retrain,retrain_clean", "retrain,retrench",
    ]  # fmt: skip
    assert completions(tmp_path, *plugged, "--prune", "s") == ["synflow", "strided"]
    unreadable = ("--plugin", "broken.py", "--plugin", "none.py", "--plugin", "no.module", *plugged)
    assert completions(tmp_path, *unreadable, "--prune", "s") == ["synflow", "strided"]


def test_methods_of_installed_packages_are_completed_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "__init__.py").write_text("1 / 0")
    (tmp_path / "somebodys" / "methods.py").write_text(MINE)
    installed = tmp_path / "somebodys-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[dau_fast.methods]\nanother = somebodys.methods:shrink\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert completions(tmp_path, "--methods", "shr") == ["shrink"]
    assert {"shrink", "retrench"} <= set(values("methods"))


def test_bash_reads_what_is_printed_for_it(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    program = tmp_path / "dau_fast"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dau_fast "$@"\n')
    program.chmod(0o755)
    script = (
        'PATH="$PWD:$PATH"; eval "$(_DAU_FAST_COMPLETE=bash_source dau_fast)"; '
        "COMP_WORDS=(dau_fast --methods neg); COMP_CWORD=2; _dau_fast_completion dau_fast; "
        'echo "${COMPREPLY[@]}"; complete -p dau_fast'
    )
    told = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.splitlines()[0] == "neggrad", told.stderr
    assert "_dau_fast_completion" in told.stdout.splitlines()[1]
