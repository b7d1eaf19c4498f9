"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from dau_fast.data.progress import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A `Progress` that draws one bar for each announced piece of work, gone when all is done."""
    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description:>28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    def announce(description: str, steps: int) -> Callable[[], None]:
        bar = bars.add_task(description, total=steps)
        return lambda: bars.advance(bar)

    with bars:
        yield announce
