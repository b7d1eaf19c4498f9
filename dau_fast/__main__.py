"""`python -m dau_fast` is `python -m dau_fast.unlearn`."""

from dau_fast.unlearn import main

main()
