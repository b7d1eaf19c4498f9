"""`python -m dau_fast` is `python -m dau_fast.unlearn`, unless a further command's name follows."""

import sys

from dau_fast.unlearn import run_command, unlearn


def main() -> None:
    """Entry point: a command's name, or options of unlearning."""
    name, arguments = sys.argv[1:2], sys.argv[2:]
    if name == ["audit"]:
        from dau_fast.commands.audit import make_audit  # what only audits need takes a while to import

        run_command(make_audit(unlearn.params), "python -m dau_fast audit", arguments)
    elif name == ["selfcheck"]:
        from dau_fast.commands.selfcheck import make_selfcheck

        run_command(make_selfcheck(), "python -m dau_fast selfcheck", arguments)
    else:
        run_command(unlearn, "python -m dau_fast.unlearn", sys.argv[1:])


if __name__ == "__main__":
    main()
