"""`dau_fast` and `python -m dau_fast`: commands by their names, and unlearning without one."""

import os
import sys
from typing import Any

from dau_fast.engine import starting  # noqa: F401  isort: skip  # first: what follows takes seconds to import

# Each is imported when it is asked for: what only audits need takes a while.
_COMMANDS = {
    "audit": ("dau_fast.commands.audit", "make_audit"),
    "evaluate": ("dau_fast.commands.evaluate", "make_evaluate"),
    "report": ("dau_fast.commands.page", "make_report"),
    "attest": ("dau_fast.commands.attest", "attest"),
    "verify": ("dau_fast.commands.verify", "verify"),
    "env": ("dau_fast.commands.env", "make_env"),
    "selfcheck": ("dau_fast.commands.selfcheck", "make_selfcheck"),
}


def main() -> None:
    """Entry point: a command's name, or options of unlearning."""
    name, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if name == "--version":
        from dau_fast import __version__

        print(f"dau_fast {__version__}")
        return
    if instruction := os.environ.get("_DAU_FAST_COMPLETE"):
        from dau_fast.commands.completion import complete

        sys.exit(complete(instruction))
    from dau_fast.unlearn import run_command, unlearn

    if name in _COMMANDS:
        found = _find(*_COMMANDS[name])
        command = found
        if name in ("audit", "evaluate"):
            command = found(unlearn.params)
        elif name in ("report", "env", "selfcheck"):
            command = found()
        run_command(command, f"dau_fast {name}", arguments)
    elif name == "unlearn":
        run_command(unlearn, "dau_fast unlearn", arguments)
    else:
        run_command(unlearn, "python -m dau_fast.unlearn", sys.argv[1:])


def _find(module: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(module), name)


if __name__ == "__main__":
    main()
