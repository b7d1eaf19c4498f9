"""Progress on stderr: bars in a terminal and in a notebook, and a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from dau_fast.data.progress import Progress

# Seconds between two lines of the same work, where there are no bars.
_NOTEBOOK, _LOG = 5.0, 30.0


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A `Progress` that draws one bar for each announced piece of work, gone when all is done.

    Where nothing can be drawn, as in a log or in a notebook without ipywidgets, it writes lines instead.
    """
    console = Console(stderr=True)
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        yield _make_lines(_NOTEBOOK if console.is_jupyter else _LOG)
        return
    bars = Bars(
        TextColumn("{task.description:>28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    def announce(description: str, steps: int) -> Callable[[], None]:
        bar = bars.add_task(description, total=steps)
        return lambda: bars.advance(bar)

    with bars:
        yield announce


def _make_lines(every: float) -> Progress:
    """A `Progress` that writes a line `every` so many seconds, and none of work that takes less."""

    def announce(description: str, steps: int) -> Callable[[], None]:
        began = told = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, told
            done += 1
            now = time.monotonic()
            if now - told >= every:
                told = now
                left = round((now - began) / done * (steps - done))
                print(
                    f"{description}: {done:,} of {steps:,}, {left // 60}:{left % 60:02} left", file=sys.stderr
                )

        return advance

    return announce
