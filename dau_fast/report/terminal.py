"""What is told on the terminal once the results are complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from dau_fast.errors import printable


@contextmanager
def terminal(folder: Path) -> Iterator[Console]:
    """The console on which results in `folder` are shown.

    Where it takes no text, as on a full disk, one line says where they are, and click exits with code 1.
    """
    try:
        yield Console()
        sys.stdout.flush()
    except OSError as error:
        told = f"the results are complete in '{folder}', but could not be shown: {error.strerror}"
        print(f"error: {printable(told)}", file=sys.stderr, flush=True)
        _give_up_on_stdout()
        raise click.exceptions.Exit(1) from error


def _give_up_on_stdout() -> None:
    """Python would try once more to write what is left when it ends, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
