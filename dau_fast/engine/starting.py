"""The first seconds of the command line, while PyTorch is imported: a signal ends it in one line.

Imported before everything else; it does nothing in other people's programs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

# What asks a process to end, where the system has it: a closed terminal, Ctrl-\, alarms and schedulers.
ENDING = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


def is_command_line() -> bool:
    """Whether this process runs the package, and does not only use it."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec else Path(sys.argv[0] if sys.argv else "").stem
    return name in ("dau_fast.unlearn", "dau_fast.__main__", "dau-fast", "dau_fast")


def end_quietly_when_stopped() -> None:
    """Let Ctrl-C and signals end the process at once, in one line; what is ignored stays so, as by nohup."""

    def leave(number: int, _frame: FrameType | None) -> None:
        word = "interrupted" if number == signal.SIGINT else "stopped"
        os.write(2, f"{word}: nothing was written\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, *ENDING):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


if is_command_line():
    end_quietly_when_stopped()
    # No picture needs a window, and a name that Matplotlib does not know would end its import.
    os.environ["MPLBACKEND"] = "agg"
