"""What a run asks of its device: time, no denormal numbers, and nothing lazy left to load."""

from __future__ import annotations

import contextvars
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from dau_fast.engine.chance import seeded

T = TypeVar("T")


class Stopwatch:
    """`seconds` of wall clock inside the `with` block, all work queued on `device` finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._synchronise()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._synchronise()
        self.seconds = time.perf_counter() - self._start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """On CUDA each new shape of a convolution inside is tried by every algorithm, and the fastest kept.

    That takes a while: it is for shapes that come again and again, and are rehearsed first.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def run_flushed(work: Callable[[], T], device: torch.device) -> T:
    """Do `work` with denormal numbers treated as zero on every thread that takes part in it.

    On a CPU some steps run 50 times slower with them. The mode belongs to a thread and is inherited by the
    worker threads that it starts: where those of this thread have started without it, they take it from this
    one for as long as `work` lasts. Where that cannot be had, `work` is done on another thread, whose workers
    have it; small steps take twice as long there, as two pools of workers wait for one another. This
    thread's mode is as before afterwards.
    """
    # PyTorch can set the mode but not tell it; products of normal numbers do.
    before = bool(torch.tensor(1e-30) * torch.tensor(1e-10) == 0)
    torch.set_flush_denormal(True)
    try:
        if device.type != "cpu" or _workers_flush():
            return work()
        with _flushing_workers() as flushing:
            if flushing:
                return work()
    finally:
        torch.set_flush_denormal(before)
    return _run_on_fresh_thread(work)


def _workers_flush() -> bool:
    return not (torch.full((_SPREAD * torch.get_num_threads(),), 1e-30) * 1e-10).any()


# Numbers that give each worker thread some of them (PyTorch's own grain is 32,768).
_SPREAD = 2**16


@contextmanager
def _flushing_workers() -> Iterator[bool]:
    """Workers that were started without the mode have it inside the block; whether that worked."""
    _share_mode()
    try:
        yield _workers_flush()
    finally:
        torch.set_flush_denormal(False)
        _share_mode()


def _share_mode() -> None:
    """Give this thread's floating-point environment to all its workers, where OpenMP's are GNU's.

    fesetenv (C99, section 7.6.4.3) takes what fegetenv has written, as does a function that OpenMP runs on
    every thread of a team. Without either nothing is changed.
    """
    try:
        process = ctypes.CDLL(None)
        run_on_all, take, give = process.GOMP_parallel, process.fesetenv, process.fegetenv
    except (OSError, TypeError, AttributeError):
        return
    environment = ctypes.create_string_buffer(_ENVIRONMENT)
    give(environment)
    run_on_all(take, environment, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


# Bytes, more than any platform's fenv_t has.
_ENVIRONMENT = 1024


def _run_on_fresh_thread(work: Callable[[], T]) -> T:
    result: Future[T] = Future()

    def run() -> None:
        torch.set_flush_denormal(True)
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="dau_fast work")
    try:
        thread.start()
        # Not `join`, which takes a thread that Ctrl-C interrupted it at for ended (CPython issue 90882).
        wait([result])
    except BaseException as error:  # Ctrl-C reaches this thread only
        # Once: another one would come up in the midst of what the first one lets run.
        _raise_in(thread, type(error))
        while thread.is_alive() and not result.done():
            wait([result], timeout=0.1)
        raise
    return result.result()


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Let `error` come up in `thread`, between two of its Python instructions."""
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    raise_in(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


_SOLVED = 128  # rows of a system


def warm_up(device: torch.device) -> None:
    """Pay PyTorch's one-time costs (lazy imports, thread pools, libraries) before anything is timed."""
    with seeded(0, device):
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).to(device)
        for optimizer in (torch.optim.SGD(network.parameters(), 0.1), torch.optim.Adam(network.parameters())):
            network(torch.randn(4, 1, 8, 8, device=device)).square().sum().backward()
            optimizer.step()
        # Solvers load libraries of their own on CUDA, those of large systems others than those of small ones.
        square = torch.eye(_SOLVED, device=device)
        torch.linalg.eigh(square)
        torch.linalg.solve(square.double(), square[:, :2].double())
