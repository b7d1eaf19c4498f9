"""The command line on several processes, as torchrun starts them: one voice, one report, never a hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calling import call, environment, short_game, succeed

from dau_fast.data.decoding import count_decoder_threads
from dau_fast.engine.launch import Launch

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")

SHORT = ["--epochs", "3", "--retrain-recipe", "literature", "--device", "cpu"]

# What happens to a rank in the middle of its first training, while the others wait for it.
TROUBLE = """
import os, sys, time
from dau_fast.unlearn import main
from dau_fast.engine import training
from dau_fast.errors import UserError

RECOMPUTE = training.train
def train(*arguments, **named):
    if os.environ["RANK"] == "{rank}":
        {what}
    return RECOMPUTE(*arguments, **named)
from dau_fast.methods import supervised as _sgd
_sgd.train = train
main()
"""


# Says on stdout when a process is about to take the first step of a training.
TRAINING = """
from dau_fast.unlearn import main
from dau_fast.methods import supervised

TRAIN = supervised.train
def train(*arguments, **named):
    print("training", flush=True)
    return TRAIN(*arguments, **named)
supervised.train = train
main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(ranks: int, command: list[str], machines: Sequence[Path] = ()) -> list[subprocess.Popen[str]]:
    """`command` in as many processes, with what torchrun puts into their environment.

    machines: a folder for temporary files by rank; processes with one of their own know of no others.
    """
    port = free_port()
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank),
                **({"TMPDIR": str(machines[rank])} if machines else {}),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], seconds: float = 100) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; one that hangs fails the test."""
    deadline = time.monotonic() + seconds
    try:
        found = [(*p.communicate(timeout=deadline - time.monotonic()), p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, out, err) for out, err, code in found]


def rates(entry: dict[str, Any]) -> dict[str, float]:
    return {key: entry[key] for key in ("ua", "ra", "ta", "mia_efficacy", "avg_gap")}


@pytest.mark.parametrize(
    ("count", "dataset"),
    [
        (2, "folder"),
        (3, "folder"),
        (3, "digits"),
    ],
)
@pytest.mark.slow
def test_several_processes_report_what_one_does(
    count: int, dataset: str, tmp_path: Path, pictures: Path
) -> None:
    """In float64 and few turns, so that rounding sends nothing another way; shards are of unequal size."""
    exact = [*SHORT, "--precision", "fp64", "--methods", "dau,retrain,ft", "--dataset", dataset]
    exact += ["--config", str(short_game(32))]
    exact += ["--data", str(pictures)] if dataset == "folder" else []
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "dau_fast.unlearn"]
    run = subprocess.run(
        [sys.executable, *command, *exact, "--out", tmp_path / "several"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    alone = call(tmp_path / "one", *exact)
    report = json.loads((tmp_path / "several" / "report.json").read_text())
    assert report["run"]["processes"] == count
    assert alone.report["run"]["processes"] == 1
    assert report["run"]["forget"] == alone.report["run"]["forget"]
    assert report["game"]["step"] == alone.report["game"]["step"]
    for name, entry in alone.report["methods"].items():
        found = report["methods"][name]
        assert rates(found) == pytest.approx(rates(entry), abs=1e-6), name
        # The SVM stops short of its optimum: an image at the border may fall to either side.
        border = 2 * 100 / 90 + 1e-6 if dataset == "digits" else 1e-6
        assert found["attacks"] == pytest.approx(entry["attacks"], abs=border), name
    assert run.stdout.count("images forgotten") == 1
    assert sorted(p.name for p in (tmp_path / "several").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


def trouble(
    tmp_path: Path, what: str, *arguments: str, rank: int = 1, ranks: int = 2
) -> list[tuple[int, str, str]]:
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE.format(what=what, rank=rank))
    return ended(start(ranks, [str(script), *SHORT, "--out", str(tmp_path / "out"), *arguments]))


@pytest.mark.parametrize(
    ("what", "codes", "told"),
    [
        ("os._exit(7)", [1, 7], "error: process 0 lost contact with another, which failed or hangs: "),
        pytest.param(
            'raise UserError("the disk is on fire")', [1, 2], "error: the disk is on fire\n",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dies", "fails"],
)  # fmt: skip
def test_a_process_that_ends_early_ends_the_run(
    tmp_path: Path, what: str, codes: list[int], told: str
) -> None:
    found = trouble(tmp_path, what)
    assert [code for code, _, _ in found] == codes
    assert all(out == "" for _, out, _ in found)
    (line,) = "".join(err for _, _, err in found).splitlines(keepends=True)
    assert line.startswith(told)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    began = time.monotonic()
    (code, out, err), (late, _, _) = trouble(tmp_path, "time.sleep(8)", "--timeout", "3")
    assert (code, late) == (1, 1)
    assert out == ""
    assert err.startswith("error: process 0 lost contact with another")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out").exists()


def test_one_line_for_bad_input(tmp_path: Path) -> None:
    found = ended(start(2, ["-m", "dau_fast.unlearn", *SHORT, "--forget", "class:x", "--out", str(tmp_path)]))
    assert [code for code, _, _ in found] == [2, 2]
    (line,) = "".join(err for _, _, err in found).splitlines()
    assert line.startswith("error: --forget 'class:x'")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_processes_refuse_to_resume(tmp_path: Path) -> None:
    found = ended(start(2, ["-m", "dau_fast.unlearn", *SHORT, "--resume", "--out", str(tmp_path)]))
    assert [code for code, _, _ in found] == [2, 2]
    (line,) = "".join(err for _, _, err in found).splitlines()
    assert line == "error: --resume is for one process: leave it out, or start without torchrun"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_that_share_a_model_report_what_one_does(tmp_path: Path) -> None:
    arguments = [*SHORT, "--precision", "fp64", "--methods", "dau", "--retain-sample", "2", "--epochs", "1"]
    arguments += ["--config", str(short_game(16))]
    command = ["-m", "dau_fast.unlearn", *arguments, "--shard", "--out", str(tmp_path / "two")]
    found = ended(start(2, command))
    assert [code for code, _, _ in found] == [0, 0], found
    assert all(err == "" for _, _, err in found)
    one = succeed(tmp_path / "one", *arguments)
    two = replace(one, folder=tmp_path / "two")
    assert (one.report["run"]["sharded"], two.report["run"]["sharded"]) == (False, True)
    assert two.report["run"]["engine"]["loops"]["game"].startswith("eager: ")
    assert two.report["game"]["step"] == one.report["game"]["step"]
    for name, entry in one.report["methods"].items():
        assert rates(two.report["methods"][name]) == pytest.approx(rates(entry), abs=1e-6), name
        torch.testing.assert_close(two.weights(name), one.weights(name), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_profiled_as_one_is(tmp_path: Path) -> None:
    arguments = [*SHORT, "--epochs", "1", "--methods", "dau", "--profile", "--timeout", "20"]
    arguments += ["--config", str(short_game(16))]
    found = ended(start(2, ["-m", "dau_fast.unlearn", *arguments, "--out", str(tmp_path)]))
    assert [code for code, _, _ in found] == [0, 0], found
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["run"]["profile"]) == {"original", "game"}
    assert report["run"]["sensitivity_costs"]["seconds"]["full"] > 0


@pytest.mark.slow
def test_what_does_not_go_with_it_costs_one_line(tmp_path: Path) -> None:
    command = ["-m", "dau_fast.unlearn", *SHORT, "--shard", "--sensitivity", "full", "--out", str(tmp_path)]
    found = ended(start(2, command))
    assert [code for code, _, _ in found] == [2, 2]
    (line,) = "".join(err for _, _, err in found).splitlines()
    assert line.startswith("error: --sensitivity full takes gradients that --shard does not share out: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_ends_all_and_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    """As a terminal's Ctrl-C and a scheduler do."""
    processes = start(2, ["-c", TRAINING, "--device", "cpu", "--out", str(tmp_path / "out")])
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
    assert (tmp_path / "out").exists()
    for process in processes:
        process.send_signal(number)
    found = ended(processes)
    # Who waits inside a collective hears of it from the other, who is gone. Python lets SIGINT itself end a
    # process that it met inside an import, after the message.
    assert {c for c, _, _ in found} <= {code, 1, -signal.SIGINT}, found
    lines = "".join(err for _, _, err in found).splitlines()
    # PyTorch's store may log that its other end is gone, before we can say anything.
    (line,) = (told for told in lines if told.startswith(("error: ", "stopped: ", "interrupted: ")))
    assert "nothing was written" in line or "lost contact" in line
    assert not (tmp_path / "out").exists()


# Every process fails, each when the file with its number is there.
IN_TURN = """
import os, sys, time
from pathlib import Path
import dau_fast.unlearn
from dau_fast.errors import UserError

def fail(*_):
    turn = Path(sys.argv[-1]).parent / os.environ["RANK"]
    while not turn.exists():
        time.sleep(0.01)
    raise UserError(f"process {turn.name} is on fire")
dau_fast.unlearn.make_experiment = fail
dau_fast.unlearn.main()
"""


def fail_in_turn(
    processes: list[subprocess.Popen[str]], order: list[int], folder: Path
) -> list[tuple[int, str, str]]:
    """What came of `processes`, which run IN_TURN: each ended before the next one failed."""
    try:
        for rank in order:
            (folder / str(rank)).touch()
            processes[rank].wait(timeout=100)
    except subprocess.TimeoutExpired:
        ended(processes, 0)
        raise
    found = ended(processes)
    assert [(code, out) for code, out, _ in found] == len(order) * [(2, "")], found
    return found


@pytest.mark.parametrize(
    "order",
    [[0, 1], pytest.param([1, 0], marks=pytest.mark.slow), pytest.param([0, 2, 1], marks=pytest.mark.slow)],
    ids=str,
)
def test_the_first_to_fail_speaks_for_all_in_whatever_order_they_do(tmp_path: Path, order: list[int]) -> None:
    """The first process holds the store: once it has ended, nobody can ask there any more."""
    command = ["-c", IN_TURN, "--device", "cpu", "--out", str(tmp_path / "out")]
    said = [err for _, _, err in fail_in_turn(start(len(order), command), order, tmp_path)]
    assert said[order[0]] == f"error: process {order[0]} is on fire\n"
    assert sorted(said) == ["", *(len(order) - 2) * [""], said[order[0]]]


@pytest.mark.slow
def test_of_two_machines_the_first_to_fail_speaks(tmp_path: Path) -> None:
    machines = [tmp_path / "one", tmp_path / "two"]
    for machine in machines:
        machine.mkdir()
    command = ["-c", IN_TURN, "--device", "cpu", "--out", str(tmp_path / "out")]
    found = fail_in_turn(start(2, command, machines), [1, 0], tmp_path)
    assert [err for _, _, err in found] == ["", "error: process 1 is on fire\n"]
    assert [list(machine.iterdir()) for machine in machines] == [[], []]


@pytest.mark.slow
def test_one_of_those_left_speaks_for_a_first_process_that_died(tmp_path: Path) -> None:
    found = trouble(tmp_path, "os._exit(7)", rank=0, ranks=3)
    assert [code for code, _, _ in found] == [7, 1, 1]
    (line,) = "".join(err for _, _, err in found).splitlines()
    assert re.match(r"error: process [12] lost contact with another, which failed or hangs: ", line)


def test_a_signal_while_the_reason_is_told_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sends SIGTERM to the others as soon as one process failed."""

    def speaks(_: Launch) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(Launch, "speaks", speaks)
    called = call(tmp_path / "out", "--forget", "nonsense")
    assert called.code == 2
    assert called.stderr.startswith("error: --forget 'nonsense' is not understood")
    assert called.stderr.count("\n") == 1


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launch = Launch()
    assert (launch.rank, launch.local_rank, launch.local_count) == (0, None, 1)
    assert launch.speaks()


def test_a_process_knows_how_many_its_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SOUND, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    launch = Launch()
    assert (launch.rank, launch.local_rank, launch.local_count) == (5, 1, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert Launch().local_count == 1


SOUND = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "x"), ("RANK", ""), ("RANK", "8"), ("RANK", "-1"), ("RANK", "9" * 5000), ("WORLD_SIZE", "x"),
        ("WORLD_SIZE", "2.5"), ("LOCAL_RANK", "one"), ("LOCAL_WORLD_SIZE", "0"), ("MASTER_PORT", "http"),
        ("MASTER_PORT", "99999"),
    ],
)  # fmt: skip
def test_an_environment_that_torchrun_did_not_make_costs_one_line(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, sound in SOUND.items():
        monkeypatch.setenv(other, sound)
    if name.startswith("MASTER"):
        monkeypatch.setenv("RANK", "0")  # who speaks for all
    monkeypatch.setenv(name, value)
    called = call(tmp_path / "out")
    assert called.code == 2
    assert called.stderr.startswith(f"error: the environment has {name}='{value[:20]}")
    assert called.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_processes_without_a_place_to_meet_cost_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, sound in SOUND.items():
        monkeypatch.setenv(other, sound)
    monkeypatch.setenv("RANK", "0")  # who speaks for all
    monkeypatch.delenv(name)
    called = call(tmp_path / "out")
    assert called.stderr.startswith(f"error: the environment has RANK and no {name}: start with torchrun")
    assert called.stderr.count("\n") == 1


# Says how many processes reading was told of, and how many threads decode.
READING = """
from dau_fast.unlearn import main
from dau_fast.data import named as data
LOAD = data.load
def load(*arguments, processes, **named):
    images = LOAD(*arguments, processes=processes, **named)
    print("told", processes, images.source.threads, flush=True)
    return images
data.load = load
main()
"""


@pytest.mark.slow
def test_processes_of_a_machine_share_it_when_they_read(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    job = ["--dataset", "folder", "--data", str(pictures), "--stream", "on", "--methods", "ft"]
    processes = start(2, ["-c", READING, *SHORT, *job, "--out", str(tmp_path / "out")])
    for code, out, err in ended(processes):
        assert code == 0, err
        assert f"told 2 {count_decoder_threads(2)}\n" in out
