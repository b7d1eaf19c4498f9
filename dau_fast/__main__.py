"""`python -m dau_fast` is `python -m dau_fast.unlearn`; other commands have names: audit, attest, verify."""

import sys

from dau_fast.engine import starting  # noqa: F401  isort: skip  # first: what follows takes seconds to import
from dau_fast.unlearn import run_command, unlearn


def main() -> None:
    """Entry point: a command's name, or options of unlearning."""
    name, arguments = sys.argv[1:2], sys.argv[2:]
    if name == ["audit"]:
        from dau_fast.commands.audit import make_audit  # what only audits need takes a while to import

        run_command(make_audit(unlearn.params), "python -m dau_fast audit", arguments)
    elif name == ["attest"]:
        from dau_fast.commands.attest import attest

        run_command(attest, "python -m dau_fast attest", arguments)
    elif name == ["verify"]:
        from dau_fast.commands.verify import verify

        run_command(verify, "python -m dau_fast verify", arguments)
    else:
        run_command(unlearn, "python -m dau_fast.unlearn", sys.argv[1:])


if __name__ == "__main__":
    main()
