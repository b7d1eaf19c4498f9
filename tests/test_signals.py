"""Signals, from the first second on: one line, an exit code that says which, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import environment
from test_mistakes import TELLING

from dau_fast.engine.launch import Stopped, end_cleanly_when_stopped, undisturbed
from dau_fast.engine.starting import ENDING, is_command_line

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
EVERY = (signal.SIGINT, *ENDING)


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All handlers are as before afterwards."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {number: signal.getsignal(number) for number in EVERY}
    for number in EVERY:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs handlers between two instructions of this thread


def test_what_ends_a_process_is_all_there() -> None:
    names = {signal.Signals(number).name for number in ENDING}
    assert names == {"SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2"}


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", ENDING)
def test_every_signal_unwinds_the_program_once(number: int) -> None:
    end_cleanly_when_stopped()
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.number == number
    for further in EVERY:
        send(further)  # does nothing


class Dropping:
    """Its destructor is interrupted, of which Python drops the exception."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_signal_that_comes_where_exceptions_are_dropped_comes_again(
    number: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    end_cleanly_when_stopped()
    doomed = [Dropping(number)]
    doomed.clear()
    with pytest.raises(error):
        time.sleep(1)
    assert told == []


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_does_not_disturb_what_the_first_one_clears_up() -> None:
    end_cleanly_when_stopped()
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    send(signal.SIGINT)
    send(signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_a_third_ctrl_c_ends_the_process_where_it_is() -> None:
    child = os.fork()
    if child == 0:
        try:
            end_cleanly_when_stopped()
            try:
                send(signal.SIGINT)
            except KeyboardInterrupt:
                send(signal.SIGINT)
                send(signal.SIGINT)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.usefixtures("handlers")
def test_what_is_ignored_stays_so() -> None:
    """As by nohup, and Ctrl-C in a shell's background."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_cleanly_when_stopped()
    send(signal.SIGHUP)
    send(signal.SIGINT)
    with pytest.raises(Stopped):
        send(signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_nothing_disturbs_while_the_reason_is_told() -> None:
    end_cleanly_when_stopped()
    with undisturbed():
        for number in EVERY:
            send(number)


def test_nothing_is_changed_in_other_peoples_programs() -> None:
    assert not is_command_line()
    code = "import signal, dau_fast.engine.starting; print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)"
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True)
    assert found.stdout == b"True\n"


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process has a handler for signal `number`."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to see handlers")
@pytest.mark.parametrize("module", ["dau_fast", "dau_fast.unlearn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_first_second_costs_one_line(module: str, number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--out", str(tmp_path / "out")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    began = time.monotonic()
    while not catches(process, signal.SIGHUP):
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.fullmatch(r"(interrupted|stopped): nothing was written\n", stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, *(pytest.param(n, marks=pytest.mark.slow) for n in ENDING if n != signal.SIGHUP)],
)
def test_a_signal_in_the_middle_of_training_leaves_nothing(number: int, tmp_path: Path) -> None:
    """A terminal that is closed, and what schedulers send."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            TELLING,
            "--epochs",
            "100000",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out"),
        ],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(10)] == ["step\n"] * 10
        process.send_signal(number)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    assert stderr == "stopped: nothing was written\n"
    assert list(tmp_path.iterdir()) == []
