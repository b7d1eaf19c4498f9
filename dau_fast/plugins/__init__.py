"""How installed packages bring along methods, pruners and attacks of theirs."""
