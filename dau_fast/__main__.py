"""`python -m dau_fast` is `python -m dau_fast.unlearn`, and `python -m dau_fast audit` audits checkpoints."""

import sys

from dau_fast.engine import starting  # noqa: F401  isort: skip  # first: what follows takes seconds to import
from dau_fast.unlearn import run_command, unlearn


def main() -> None:
    """Entry point: a command's name, or options of unlearning."""
    name, arguments = sys.argv[1:2], sys.argv[2:]
    if name == ["audit"]:
        from dau_fast.commands.audit import make_audit  # what only audits need takes a while to import

        run_command(make_audit(unlearn.params), "python -m dau_fast audit", arguments)
    else:
        run_command(unlearn, "python -m dau_fast.unlearn", sys.argv[1:])


if __name__ == "__main__":
    main()
