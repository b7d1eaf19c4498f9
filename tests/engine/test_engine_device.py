"""The clock of a run, and denormal numbers: zero on every thread, and the caller's mode as before."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from dau_fast.engine import device, loop, steps
from dau_fast.engine.batches import Batch
from dau_fast.engine.device import Stopwatch, fastest_convolutions, run_flushed, warm_up
from dau_fast.engine.runtime import Runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_stopwatch_reads_the_seconds_of_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100.0, 102.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    with Stopwatch(CPU) as watch:
        assert watch.seconds == 0
    assert watch.seconds == 2.5


def test_a_stopwatch_measures_real_time() -> None:
    with Stopwatch(CPU) as watch:
        time.sleep(0.02)
    assert 0.015 < watch.seconds < 1


def test_a_stopwatch_stops_on_an_exception_and_lets_it_through() -> None:
    watch = Stopwatch(CPU)
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.seconds > 0


def test_a_stopwatch_waits_for_the_device_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))

    def read() -> float:
        events.append("read")
        return 0.0

    monkeypatch.setattr(time, "perf_counter", read)
    with Stopwatch(CUDA):
        events.append("work")
    assert events == ["cuda", "read", "work", "cuda", "read"]


def test_warming_up_runs_where_there_is_no_gpu() -> None:
    warm_up(CPU)


# ---- denormal numbers


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def on_fresh_thread(work: Callable[[], None]) -> None:
    """Do `work` where no worker thread has started yet."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def denormals() -> int:
    """How many of a million products stay denormal, on all threads that share the work."""
    return int((torch.full((2**20,), 1e-30) * 1e-10).count_nonzero())


@pytest.mark.usefixtures("two_threads")
def test_workers_that_started_before_are_no_exception() -> None:
    def check() -> None:
        torch.set_flush_denormal(False)  # whatever ran before in this process
        assert denormals() == 2**20  # and so two workers have started
        torch.set_flush_denormal(True)
        assert 0 < denormals() < 2**20
        torch.set_flush_denormal(False)
        assert run_flushed(denormals, CPU) == 0
        assert denormals() == 2**20

    on_fresh_thread(check)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's OpenMP")
def test_workers_take_the_mode_and_give_it_back_where_they_are() -> None:
    """On another thread small steps take twice as long."""

    def check() -> None:
        torch.set_flush_denormal(False)
        assert denormals() == 2**20
        here = threading.get_ident()
        assert run_flushed(lambda: (denormals(), threading.get_ident()), CPU) == (0, here)
        assert denormals() == 2**20

    on_fresh_thread(check)


@pytest.mark.usefixtures("two_threads")
def test_where_workers_cannot_take_the_mode_others_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_share_mode", lambda: None)

    def check() -> None:
        torch.set_flush_denormal(False)
        assert denormals() == 2**20
        here = threading.get_ident()
        found, there = run_flushed(lambda: (denormals(), threading.get_ident()), CPU)
        assert (found, denormals()) == (0, 2**20)
        assert there != here

    on_fresh_thread(check)


@pytest.mark.usefixtures("two_threads")
def test_where_all_threads_flush_nothing_is_moved_to_another_one() -> None:
    def check() -> None:
        torch.set_flush_denormal(True)
        here = threading.get_ident()
        assert run_flushed(lambda: (denormals(), threading.get_ident()), CPU) == (0, here)
        assert denormals() == 0

    on_fresh_thread(check)


@pytest.mark.parametrize("flush", [True, False])
def test_the_callers_mode_is_as_before(flush: bool) -> None:
    def check() -> None:
        torch.set_flush_denormal(flush)
        with pytest.raises(KeyError):
            run_flushed(lambda: {}[1], CPU)
        assert bool(torch.tensor(1e-30) * torch.tensor(1e-10) == 0) == flush

    on_fresh_thread(check)


def test_an_error_on_another_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_workers_flush", lambda: False)
    with pytest.raises(KeyError):
        run_flushed(lambda: {}[1], CPU)


def test_ctrl_c_ends_the_work_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_workers_flush", lambda: False)
    ended: list[type[BaseException]] = []
    begun = threading.Event()
    interrupt = partial(signal.pthread_kill, threading.get_ident(), signal.SIGINT)
    # Not while the one thread is still handing over to the other.
    threading.Thread(target=lambda: begun.wait(60) and (time.sleep(0.3), interrupt())).start()

    def work() -> None:
        try:
            begun.set()
            for _ in range(2000):
                time.sleep(0.005)
        except BaseException as error:
            ended.append(type(error))
            raise

    # A process that was started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_flushed(work, CPU)
    finally:
        signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 10
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    assert ended == [KeyboardInterrupt]


# ---- convolutions of steps are searched for


@pytest.mark.parametrize("before", [False, True])
def test_the_fastest_convolutions_are_searched_for_inside_and_as_before_after(before: bool) -> None:
    kept = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before
    try:
        with fastest_convolutions(CUDA):
            assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark == before
        with fastest_convolutions(CPU):
            assert torch.backends.cudnn.benchmark == before
    finally:
        torch.backends.cudnn.benchmark = kept


def test_steps_and_their_rehearsal_search_and_passes_between_them_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU that is taken for CUDA: a search inside a pass would be inside the clock."""
    searching, seen = [False], []

    @contextmanager
    def pretended(_: torch.device) -> Iterator[None]:
        searching[0] = True
        yield
        searching[0] = False

    for module in (loop, steps):
        monkeypatch.setattr(module, "fastest_convolutions", pretended)
    model = torch.nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda *_: seen.append(searching[0]))
    given = loop.Loop(
        "some", model, torch.optim.SGD(model.parameters(), 0.1), iter(_batches()), 3,
        loss=lambda compile, forward: lambda part, x: forward(x).sum(),
        inputs=lambda batch: (batch.images,),
        after=lambda _: bool(model(torch.ones(1, 2)).sum() > 1e9),
    )  # fmt: skip
    loop.run_loop(given, Runtime())
    assert seen == [True, *[True, False] * 3]


def _batches() -> list[Batch]:
    return [Batch(torch.ones(4, 2), torch.zeros(4), torch.arange(4)) for _ in range(3)]
